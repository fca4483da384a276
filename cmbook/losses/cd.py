"""Consistency distillation: Algorithm 2 of Song et al. (2023), §4."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from cmbook.distances import L2
from cmbook.losses.regression import neighbors, self_consistency
from cmbook.noise import NoiseRange, add_noise, normal
from cmbook.ode import SOLVERS, Solver
from cmbook.protocols import Batch, Clock, Distance, Generator, Loss, Models, Pair
from cmbook.schedules import check_choice
from cmbook.weights import WEIGHTS, Weight


@dataclass(frozen=True)
class ConsistencyDistillation:
    r"""Make the student agree with itself across one step of the teacher's ODE.

    $$\mathcal L_{CD} = E\big[\lambda(\sigma_{n+1})\,
        d\big(f_\theta(x_{n+1}, \sigma_{n+1}),\ f_{\theta^-}(\hat x_n^\phi, \sigma_n)\big)\big]$$

    Attributes:
        noise_range: The range of noise levels.
        levels: N, the number of levels of the grid (N - 1 intervals).
        solver: The step Φ from $x_{n+1}$ to $\hat x_n$: two teacher evaluations for Heun, one
            for Euler.
        distance: d.
        weight: λ; the paper's is uniform.
        decay: μ of the target θ⁻; 0 makes the target the student without gradient.

    Raises:
        ValueError: If there are fewer than 2 levels, μ is not in [0, 1), or no teacher is given.

    Source: Song et al. (2023), Algorithm 2; N, Φ and μ from Table 3, column CIFAR-10 CD.
    """

    needs_teacher: ClassVar[bool] = True

    noise_range: NoiseRange = NoiseRange()
    levels: int = 18
    solver: Solver = "heun"
    distance: Distance = L2()
    weight: Weight = "uniform"
    decay: float = 0.0

    def __post_init__(self) -> None:
        self.noise_range.grid(self.levels)
        check_choice("solver", self.solver, SOLVERS)
        check_choice("weight", self.weight, WEIGHTS)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1); got {self.decay}")

    def target_decay(self, clock: Clock) -> float:
        """μ, the same at every step."""
        return self.decay

    def __call__(self, models: Models, batch: Batch, *, clock: Clock, generator: Generator) -> Loss:
        """The loss of one step."""
        if models.teacher is None:
            raise ValueError("distillation needs models.teacher, a diffusion model")
        step = SOLVERS[self.solver]
        sigma, sigma_next = neighbors(self.noise_range.grid(self.levels), batch.x, generator)
        x = add_noise(batch.x, normal(batch.x, generator), sigma)  # x_n+1
        with torch.no_grad():
            x_next = step(models.teacher, x, sigma, sigma_next, batch.label)  # x̂_n, by φ
        return self_consistency(
            models,
            Pair(x, sigma, x_next, sigma_next),
            batch.label,
            noise_range=self.noise_range,
            distance=self.distance,
            weight=self.weight,
            generator=generator,
        )
