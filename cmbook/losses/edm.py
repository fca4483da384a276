"""The teacher: denoising score matching with the design choices of EDM (Karras et al. 2022)."""

from dataclasses import dataclass
from typing import ClassVar

from cmbook.distances import L2
from cmbook.losses.regression import Dropout, regress
from cmbook.noise import LogNormal, NoiseRange, add_noise, normal
from cmbook.protocols import Batch, Clock, Distance, Generator, Loss, Models
from cmbook.schedules import check_choice
from cmbook.weights import WEIGHTS, Weight


@dataclass(frozen=True)
class EDM:
    r"""Learn to denoise: regress D(x0 + σz, σ) onto x0.

    $$\mathcal L = E\big[\lambda(\sigma)\, d\big(D_\theta(x_0 + \sigma z, \sigma),\, x_0\big)\big],
        \qquad \ln\sigma \sim N(P_{mean}, P_{std}^2)$$

    Attributes:
        noise_range: The range of noise levels; the weight uses its sigma_data.
        sigma_law: How noise levels are drawn.
        distance: d.
        weight: λ; `"karras"` lets the network's own error count evenly.

    Note: EDM's code sums over pixels, the consistency-model code takes the mean, and so do we.

    Source: Karras et al. (2022), eq. 2 and Table 1; `EDMLoss` of the released code.
    """

    needs_teacher: ClassVar[bool] = False

    noise_range: NoiseRange = NoiseRange()
    sigma_law: LogNormal = LogNormal()
    distance: Distance = L2()
    weight: Weight = "karras"

    def __post_init__(self) -> None:
        # one noise level has no gap to the next
        check_choice("weight", self.weight, [name for name in WEIGHTS if name != "inverse_gap"])

    def target_decay(self, clock: Clock) -> float:
        """0: there is no target network."""
        return 0.0

    def __call__(self, models: Models, batch: Batch, *, clock: Clock, generator: Generator) -> Loss:
        """The loss of one step."""
        sigma = self.sigma_law(len(batch.x), generator).to(batch.x.device)
        x = add_noise(batch.x, normal(batch.x, generator), sigma)
        with Dropout(generator, x.device):
            denoised = models.student(x, sigma, batch.label)
        scale = WEIGHTS[self.weight](sigma, sigma, self.noise_range)
        return regress(denoised, batch.x, sigma, self.distance, scale)
