"""Progressive distillation: one student step for two of the teacher's, then again."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from cmbook.distances import L2
from cmbook.losses.regression import Dropout, regress
from cmbook.noise import NoiseRange, add_noise, expand, integers, normal
from cmbook.ode import euler_step
from cmbook.protocols import Batch, Clock, Distance, Generator, Loss, Models
from cmbook.schedules import check_choice
from cmbook.weights import WEIGHTS, Weight


@dataclass(frozen=True)
class ProgressiveDistillation:
    r"""Teach a diffusion model to land in one Euler step where its teacher lands in two.

    On a grid of 2S intervals, the teacher walks from σ over σ′ to σ″; the target is the denoised
    sample for which one step lands on the same point:

    $$\tilde x = x - \sigma\,\frac{x'' - x}{\sigma'' - \sigma},\qquad
      \mathcal L = E\big[\lambda(\sigma)\, d\big(D_\theta(x, \sigma),\ \tilde x\big)\big]$$

    S halves from round to round, and each round's student is the next round's teacher: `rounds`
    lists them, and a recipe of this objective carries them all out.

    Attributes:
        noise_range: The range of noise levels.
        steps: S, the steps that the student of the first round learns to take. Levels count
            intervals here: the grid of the student has S + 1 levels, and its last is sigma_min.
        last: S of the last round.
        distance: d.
        weight: λ; the paper's is truncated.

    Note: The released PyTorch code cannot run (the trainer passes arguments that its loss does
        not take); this follows the CIFAR-10 code.

    Raises:
        ValueError: If halving `steps` does not lead to `last`, there are too many, or no teacher
            is given.

    Source: Salimans and Ho (2022), Algorithm 2; Song et al. (2023), §6.2.
    """

    needs_teacher: ClassVar[bool] = True

    noise_range: NoiseRange = NoiseRange()
    steps: int = 8
    last: int = 1
    distance: Distance = L2()
    weight: Weight = "truncated_snr"

    def __post_init__(self) -> None:
        # an interval has no gap of its own here: the weight is that of one level
        check_choice("weight", self.weight, [name for name in WEIGHTS if name != "inverse_gap"])
        halved = self.steps
        while halved > self.last and halved % 2 == 0:
            halved //= 2
        self.noise_range.grid(2 * max(self.steps, 1) + 1)  # which refuses too many
        if self.last < 1 or halved != self.last:
            raise ValueError(
                f"steps must be last times a power of 2, such as 8 and 1; got steps={self.steps} "
                f"and last={self.last}"
            )

    @property
    def rounds(self) -> list["ProgressiveDistillation"]:
        """One objective a round, the one with the most steps first; each teaches the next."""
        rounds, steps = [], self.steps
        while steps >= self.last:
            rounds.append(replace(self, steps=steps, last=steps))
            steps //= 2
        return rounds

    def target_decay(self, clock: Clock) -> float:
        """0: there is no target network."""
        return 0.0

    def __call__(self, models: Models, batch: Batch, *, clock: Clock, generator: Generator) -> Loss:
        """The loss of one step of the first round."""
        if models.teacher is None:
            raise ValueError("distillation needs models.teacher, a diffusion model")
        dtype = torch.promote_types(batch.x.dtype, torch.float32)
        grid = self.noise_range.grid(2 * self.steps + 1).to(batch.x.device, dtype)
        i = 2 * integers(len(batch.x), self.steps, generator).to(batch.x.device)
        sigma, sigma_mid, sigma_end = grid[i], grid[i + 1], grid[i + 2]  # t, t', t''
        x = add_noise(batch.x, normal(batch.x, generator), sigma)
        with torch.no_grad():
            x_mid = euler_step(models.teacher, x, sigma, sigma_mid, batch.label)
            x_end = euler_step(models.teacher, x_mid, sigma_mid, sigma_end, batch.label)
            target = x - expand(sigma / (sigma_end - sigma), x) * (x_end - x)  # x̃
        with Dropout(generator, x.device):
            denoised = models.student(x, sigma, batch.label)
        scale = WEIGHTS[self.weight](sigma, sigma_end, self.noise_range)
        return regress(denoised, target, sigma, self.distance, scale)
