"""Consistency training: Algorithm 3 of Song et al. (2023), §5."""

from dataclasses import dataclass
from typing import ClassVar

from cmbook.distances import L2
from cmbook.losses.regression import neighbors, same_noise, self_consistency
from cmbook.noise import NoiseRange
from cmbook.protocols import Batch, Clock, Distance, Generator, Loss, Models
from cmbook.schedules import AdaptiveLevels, Curriculum, check_choice
from cmbook.weights import WEIGHTS, Weight


@dataclass(frozen=True)
class ConsistencyTraining:
    r"""Make the student agree with itself along one line of noise; no teacher.

    $$\mathcal L_{CT} = E\big[\lambda(\sigma_{n+1})\,
        d\big(f_\theta(x_0 + \sigma_{n+1} z, \sigma_{n+1}),\
              f_{\theta^-}(x_0 + \sigma_n z, \sigma_n)\big)\big]$$

    Attributes:
        noise_range: The range of noise levels.
        curriculum: N(k), the number of levels, and μ(k), the decay of the target θ⁻.
        distance: d.
        weight: λ; the paper's is uniform.

    Source: Song et al. (2023), Algorithm 3; N(k) and μ(k) from Table 3, column CIFAR-10 CT.
    """

    needs_teacher: ClassVar[bool] = False

    noise_range: NoiseRange = NoiseRange()
    curriculum: Curriculum = AdaptiveLevels()
    distance: Distance = L2()
    weight: Weight = "uniform"

    def __post_init__(self) -> None:
        check_choice("weight", self.weight, WEIGHTS)

    def target_decay(self, clock: Clock) -> float:
        """μ(k)."""
        return self.curriculum.decay_at(clock)

    def __call__(self, models: Models, batch: Batch, *, clock: Clock, generator: Generator) -> Loss:
        """The loss of one step."""
        grid = self.noise_range.grid(self.curriculum.levels_at(clock))
        sigma, sigma_next = neighbors(grid, batch.x, generator)
        return self_consistency(
            models,
            same_noise(batch.x, sigma, sigma_next, generator),  # x0 + t_n+1 z, x0 + t_n z
            batch.label,
            noise_range=self.noise_range,
            distance=self.distance,
            weight=self.weight,
            generator=generator,
        )
