r"""The limit of many levels: continuous-time CD and CT, App. B of Song et al. (2023).

As N grows, two neighbors of the grid become one point and a direction, and the difference of two
answers becomes the derivative along the path, $f' = \partial_\sigma f + J_x f\,dx/d\sigma$. With
levels $\sigma = \tau(u)$, u uniform in [0, 1], the gap between neighbors is $\tau'(u)/(N - 1)$.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from cmbook.distances import L1, L2, LInf, Norm, PseudoHuber
from cmbook.losses.regression import Dropout
from cmbook.losses.tangent import tangent
from cmbook.noise import NoiseRange, add_noise, normal, uniform
from cmbook.ode import velocity
from cmbook.protocols import (
    Batch,
    Clock,
    Distance,
    Generator,
    Loss,
    Models,
    PerSample,
    Samples,
)
from cmbook.schedules import check_choice
from cmbook.weights import WEIGHTS, Weight

KINKED = (L1, Norm, LInf)  # d(tx, ty) = t d(x, y): a slope at 0, and no curvature


def curvature(distance: Distance, at: Samples, direction: Samples) -> Samples:
    r"""$H v$, with $H = \partial_y^2\, d(y, x)\,|_{y=x}$: how a distance bends where it is 0.

    A distance that is 0 and smooth at y = x bends alike in both arguments, so H is also the
    paper's G. The Hessian itself is never formed.

    Args:
        distance: d, twice differentiable.
        at: x.
        direction: v.

    Source: Song et al. (2023), Theorems 3 and 5.
    """
    frozen = at.detach()
    slope = torch.func.grad(lambda y: distance(y, frozen).sum())
    # H is symmetric, so backward will do; forward through a norm could not be trained through.
    bent: Samples = torch.func.vjp(slope, at)[1](direction)[0]
    return bent


@dataclass(frozen=True)
class ContinuousDistillation:
    r"""Distillation with infinitely many levels: make $f'$ vanish along the teacher's paths.

    With a frozen target, the pseudo-objective of Theorem 5, whose gradient is

    $$\nabla\, E\big[\lambda(\sigma)\,\tau'(u)\ f_\theta^T H(f_{\theta^-})\, f'_{\theta^-}\big],$$

    and without, the true losses of Theorem 3 (smooth d) and Theorem 4 (l1 and other norms):

    $$E\big[\tfrac12\lambda(\sigma)\,\tau'(u)^2\ f'^T G(f) f'\big],\qquad
      E\big[\lambda(\sigma)\,\tau'(u)\ d(f', 0)\big].$$

    The value that the frozen form reports is $\tfrac12\lambda\tau' f'^T H f'$: the size of what
    should vanish. Only its gradient trains; the value need not fall.

    Attributes:
        noise_range: The range of noise levels; its grid, made continuous, is τ.
        distance: d.
        weight: λ. `"inverse_gap"` is $1/\tau'$, the paper's choice for all its continuous runs;
            there it leaves a factor $\tau'$ in Theorem 3 alone.
        frozen_target: Whether θ⁻ is the student without gradient (the paper's better choice).
            If not, gradients flow through the derivative, at twice the cost.

    Note: The released code drops the factor $\tau'$ of Theorem 3, the factor 2 of l2's H, and
        calls `l2` what is the norm: `Norm()` with `frozen_target=False`.

    Raises:
        ValueError: If the target is frozen and the distance has no curvature at 0, if it is
            `PseudoHuber(0)`, or if no teacher is given.

    Source: Song et al. (2023), Theorems 3, 4 and 5.
    """

    needs_teacher: ClassVar[bool] = True

    noise_range: NoiseRange = NoiseRange()
    distance: Distance = L2()
    weight: Weight = "inverse_gap"
    frozen_target: bool = True

    def __post_init__(self) -> None:
        check_choice("weight", self.weight, WEIGHTS)
        if self.frozen_target or self.distance == PseudoHuber(0.0):
            check_smooth(self.distance)

    def target_decay(self, clock: Clock) -> float:
        """0: a target that lags has no limit as N grows (iCT's argument)."""
        return 0.0

    def __call__(self, models: Models, batch: Batch, *, clock: Clock, generator: Generator) -> Loss:
        """The loss of one step."""
        if models.teacher is None:
            raise ValueError("distillation needs models.teacher, a diffusion model")
        sigma, gap, _, x = levels(self.noise_range, batch.x, generator)
        with torch.no_grad():
            dx = velocity(x, models.teacher(x, sigma, batch.label), sigma)
        scale = WEIGHTS[self.weight](sigma, sigma - gap, self.noise_range) * gap
        if self.frozen_target:
            return pull(models, batch, x, sigma, dx, self.distance, scale, generator)
        with Dropout(generator, x.device):
            value, change = tangent(models.student, x, sigma, dx, batch.label)
        if isinstance(self.distance, KINKED):
            per_sample = scale * self.distance(change, torch.zeros_like(change))
        else:
            bent = curvature(self.distance, value, change)
            per_sample = scale * gap * (change * bent).flatten(1).sum(1) / 2
        return Loss(per_sample.mean(), per_sample.detach(), sigma)


@dataclass(frozen=True)
class ContinuousTraining:
    r"""Consistency training with infinitely many levels: the noise z in the place of the teacher.

    $$\nabla\, E\big[\lambda(\sigma)\,\tau'(u)\ f_\theta^T H(f_{\theta^-})
        \big(\partial_\sigma f_{\theta^-} + J_x f_{\theta^-} z\big)\big]$$

    The noise is the path's direction on average, $E[z\,|\,x] = dx/d\sigma$, and it enters
    linearly, so the gradient is that of `ContinuousDistillation` with the exact teacher. It
    would not be, if the gradient flowed through the target: the square of a noisy derivative has
    another mean. So the target is frozen here, always.

    Attributes:
        noise_range: The range of noise levels; its grid, made continuous, is τ.
        distance: d, twice differentiable.
        weight: λ, as in `ContinuousDistillation`.

    Raises:
        ValueError: If the distance has no curvature at 0.

    Source: Song et al. (2023), Theorem 6.
    """

    needs_teacher: ClassVar[bool] = False

    noise_range: NoiseRange = NoiseRange()
    distance: Distance = L2()
    weight: Weight = "inverse_gap"

    def __post_init__(self) -> None:
        check_choice("weight", self.weight, WEIGHTS)
        check_smooth(self.distance)

    def target_decay(self, clock: Clock) -> float:
        """0: a target that lags has no limit as N grows (iCT's argument)."""
        return 0.0

    def __call__(self, models: Models, batch: Batch, *, clock: Clock, generator: Generator) -> Loss:
        """The loss of one step."""
        sigma, gap, noise, x = levels(self.noise_range, batch.x, generator)
        scale = WEIGHTS[self.weight](sigma, sigma - gap, self.noise_range) * gap
        return pull(models, batch, x, sigma, noise, self.distance, scale, generator)


def levels(
    noise_range: NoiseRange, x0: Samples, generator: Generator
) -> tuple[PerSample, PerSample, Samples, Samples]:
    """σ = τ(u) for u uniform in [0, 1), τ'(u), the noise, and x0 with that much of it.

    Source: Song et al. (2023), App. B.1.
    """
    dtype = torch.promote_types(x0.dtype, torch.float32)
    sigma, gap = noise_range.warp(uniform(len(x0), generator).to(x0.device, dtype))
    noise = normal(x0, generator)
    return sigma, gap, noise, add_noise(x0, noise, sigma)


def pull(
    models: Models,
    batch: Batch,
    x: Samples,
    sigma: PerSample,
    dx: Samples,
    distance: Distance,
    scale: PerSample,
    generator: Generator,
) -> Loss:
    r"""The pseudo-objective $f_\theta^T H f'_{\theta^-}$, whose value is made $\tfrac12 f'^T H f'$.

    Raises:
        ValueError: If `models` has no target.

    Source: Song et al. (2023), Theorems 5 and 6.
    """
    if models.target is None:
        raise ValueError("a consistency loss needs models.target; with μ = 0 pass the student")
    dropout = Dropout(generator, x.device)
    with dropout:
        prediction = models.student(x, sigma, batch.label)
    with dropout, torch.no_grad():
        target, change = tangent(models.target, x, sigma, dx, batch.label)
        bent = curvature(distance, target, change)
        half = (change * bent).flatten(1).sum(1) / 2
    moved = ((prediction - prediction.detach()) * bent).flatten(1).sum(1)
    per_sample = scale * (half + moved)
    return Loss(per_sample.mean(), per_sample.detach(), sigma)


def check_smooth(distance: Distance) -> None:
    """Refuse a distance that has no curvature where it is 0.

    Raises:
        ValueError: Saying which to take instead.

    Source: ours.
    """
    if isinstance(distance, KINKED) or distance == PseudoHuber(0.0):
        raise ValueError(
            f"{distance} has a kink at 0 and no curvature, and the limit with a frozen target "
            "needs one. Use L2() or PseudoHuber(c) with c > 0; to distill, also L1(), Norm() or "
            "LInf() with frozen_target=False"
        )
