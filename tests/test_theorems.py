"""The six theorems of Song et al. (2023) as experiments, in float64 and by quadrature.

No Monte Carlo: expectations over the clean point, the noise and the level are Gauss sums, so what
remains is the theorem's own error, and its order is a slope that can be measured. The student is
a small smooth network that is not the consistency function: at the truth most of these
statements would be 0 = 0.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

from cmbook.distances import L1, L2, PseudoHuber
from cmbook.losses import (
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousDistillation,
    ContinuousTraining,
)
from cmbook.noise import NoiseRange, Replay
from cmbook.ode import solve
from cmbook.oracle import Gaussian, GaussianMixture
from cmbook.parameterization import ConsistencyScalings, Preconditioned
from cmbook.protocols import Batch, Clock, Distance, Models
from cmbook.schedules import FixedLevels
from cmbook.training import frozen_view

# A range that is short, so that the asymptotic regime begins at a few dozen levels.
RANGE = NoiseRange(sigma_min=0.1, sigma_max=4.0, rho=3.0, sigma_data=0.5)
MEAN, STD, NODES = 0.3, 0.5, 24
WORLD = Gaussian.isotropic([MEAN], STD)
START, SQUARED = Clock(0, 1), L2()


class Smooth(torch.nn.Module):
    """Two layers whose weights are a function of the seed."""

    def __init__(self, seed: int, dim: int = 1) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        sizes = [(dim + 1, 6), (7, dim)]
        self.layers = torch.nn.ParameterList(
            torch.randn(s, generator=draw, dtype=torch.float64) for s in sizes
        )

    def forward(self, x, c_noise, label=None):
        told = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        hidden = torch.tanh(told @ self.layers[0] + c_noise[:, None])
        return torch.cat([hidden, torch.ones_like(x[:, :1])], 1) @ self.layers[1]


def student(seed: int, dim: int = 1) -> Preconditioned:
    return Preconditioned(Smooth(seed, dim), ConsistencyScalings(RANGE))


def frozen(seed: int) -> Preconditioned:
    return student(seed).requires_grad_(False)


@cache
def gauss_hermite(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and weights for the mean over 2 dim standard normal numbers: x0, then z."""
    nodes = NODES if dim == 1 else 7
    point, weight = np.polynomial.hermite_e.hermegauss(nodes)
    axes, weights = [torch.tensor(point)] * 2 * dim, [torch.tensor(weight / weight.sum())] * 2 * dim
    return torch.cartesian_prod(*axes), torch.cartesian_prod(*weights).prod(1)


@dataclass(frozen=True, eq=False)
class Weighed:
    """A distance that carries the weights of a quadrature, so that losses become Gauss sums."""

    distance: Distance
    weights: torch.Tensor

    def __call__(self, prediction, target):
        return self.weights * self.distance(prediction, target)


def every(levels: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean points and noise of the quadrature at every level, one level after the other."""
    points, weights = gauss_hermite(dim)
    points = points.repeat(len(levels), 1)
    return MEAN + STD * points[:, :dim], points[:, dim:], weights.repeat(len(levels))


def discrete(kind, intervals: int, distance: Distance = SQUARED, dim: int = 1, **knobs):
    """The loss on a grid as a function of `models`: the mean over all pairs, points and noise."""
    pairs = torch.arange(intervals).repeat_interleave(len(gauss_hermite(dim)[0]))
    x0, noise, weights = every(torch.arange(intervals), dim)
    weighed = Weighed(distance, weights)
    if kind is ConsistencyTraining:
        objective = kind(RANGE, FixedLevels(intervals + 1), weighed, **knobs)
    else:
        objective = kind(RANGE, intervals + 1, "euler", weighed, **knobs)
    return lambda models: _sum(
        objective(models, Batch(x0), clock=START, generator=_replay(noise, pairs)), intervals
    )


def continuous(kind, distance: Distance = SQUARED, dim: int = 1, **knobs):
    """The loss in continuous time, u integrated by Gauss and Legendre."""
    node, share = np.polynomial.legendre.leggauss(24)
    x0, noise, weights = every(torch.arange(24), dim)
    each = len(gauss_hermite(dim)[0])
    u = torch.tensor((node + 1) / 2).repeat_interleave(each)
    weights = weights * torch.tensor(share / 2).repeat_interleave(each) * 24
    kinked = isinstance(distance, L1)  # told by its type, so it cannot be dressed
    objective = kind(RANGE, distance if kinked else Weighed(distance, weights), **knobs)

    def loss(models):
        draws = Replay(normals=[noise], uniforms=[u])
        found = objective(models, Batch(x0), clock=START, generator=draws)
        return (weights * found.per_sample).sum() / 24 if kinked else _sum(found, 24)

    return loss


def _replay(noise, pairs):
    return Replay(normals=[noise], integers=[pairs])


def _sum(loss, levels: int) -> torch.Tensor:
    """The mean over levels of the Gauss sums: `Loss.value` is a mean over all rows."""
    return loss.value * len(loss.per_sample) / levels


def gradient(loss, model: Preconditioned) -> torch.Tensor:
    """With a frozen target; on a grid and in continuous time alike."""

    value = loss(
        Models(model, frozen_view(model), WORLD2.denoiser if _dim(model) == 2 else WORLD.denoiser)
    )
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


WORLD2 = Gaussian.isotropic([MEAN, MEAN], STD)


def _dim(model) -> int:
    return model.net.layers[1].shape[1]


def slope(intervals: list[int], errors: list[float]) -> float:
    """Order of convergence: minus the slope of log error against log N - 1."""
    return -float(np.polyfit(np.log(intervals), np.log(errors), 1)[0])


# ── Theorem 1: a student whose loss is 0 is as wrong as its solver, to the order of the solver ──


@pytest.mark.parametrize(("solver", "order"), [("euler", 1.0), ("heun", 2.0)])
def test_theorem_1_a_perfect_student_errs_by_the_order_of_its_solver(solver, order):
    """The fixed point is built by backward induction: f_1 is the identity, f_n+1 = f_n ∘ step."""
    means = torch.tensor([[-0.6, 0.1], [0.5, 0.5], [0.3, -0.6]], dtype=torch.float64)
    world = GaussianMixture.isotropic(means, 0.2)
    noise_range = NoiseRange()
    x = world.sample(200, 80.0, generator=torch.Generator().manual_seed(0)).x
    exact = world.consistency(x, torch.full((200,), 80.0, dtype=torch.float64))
    intervals = [128, 256, 512]
    errors = []
    for n in intervals:
        end = solve(world.denoiser, x, noise_range.grid(n + 1), solver=solver)
        errors.append(float((end - exact).norm(dim=1).median()))
    assert slope(intervals, errors) == pytest.approx(order, abs=0.1)


def test_theorem_1_the_fixed_point_has_loss_zero():
    """What the walk on the grid says agrees with itself across every step: the loss is 0."""
    intervals = 12
    grid = RANGE.grid(intervals + 1)

    def fixed_point(x, sigma, label=None):
        ends = torch.empty_like(x)
        for i, level in enumerate(grid):
            here = sigma == level
            rest = solve(WORLD.denoiser, x[here], grid[i:], solver="euler") if i < intervals else 0
            ends[here] = rest if i < intervals else x[here]
        return ends

    loss = discrete(ConsistencyDistillation, intervals)
    assert float(loss(Models(fixed_point, fixed_point, WORLD.denoiser))) < 1e-28


# ── Theorem 2: training alone is distillation by Euler, up to terms that vanish faster ──


@pytest.mark.parametrize("distance", [L2(), PseudoHuber(1.0)], ids=["l2", "huber"])
def test_theorem_2_the_two_losses_differ_by_the_square_of_the_step(distance):
    """The paper states o(Δt), which allows any order above 1; the order is 2.

    The two targets differ by f⁻(x̂) - f⁻(x₀ + σ'z), whose argument has mean 0 given x. So its
    first-order term drops out, and the second is the variance of a step of length Δt. Student
    and target must differ: with equal ones both losses vanish like Δt² anyway, and the statement
    says nothing.
    """
    models = Models(frozen(1), frozen(2), WORLD.denoiser)
    intervals, apart = [32, 64, 128, 256], []
    for n in intervals:
        pair = [discrete(k, n, distance) for k in (ConsistencyDistillation, ConsistencyTraining)]
        cd, ct = (float(loss(models)) for loss in pair)
        apart.append(abs(cd - ct))
    assert cd > 0.01  # it does not vanish, the difference does
    assert slope(intervals, apart) == pytest.approx(2.0, abs=0.1)


# ── Theorems 3 and 4: the scaled losses have limits, if gradients may flow everywhere ──


@pytest.mark.parametrize("distance", [L2(), PseudoHuber(1.0)], ids=["l2", "huber"])
def test_theorem_3_the_loss_times_the_square_of_n_has_a_limit(distance):
    model = frozen(1)
    models = Models(model, model, WORLD.denoiser)
    limit = continuous(ContinuousDistillation, distance, weight="uniform", frozen_target=False)(
        models
    )
    intervals, apart = [64, 128, 256, 512], []
    for n in intervals:
        scaled = n**2 * float(discrete(ConsistencyDistillation, n, distance)(models))
        apart.append(abs(scaled / float(limit) - 1))
    assert slope(intervals, apart) == pytest.approx(1.0, abs=0.15)
    assert apart[-1] < 1e-3


def test_theorem_4_for_l1_the_loss_times_n_has_a_limit():
    model = frozen(1)
    models = Models(model, model, WORLD.denoiser)
    limit = continuous(ContinuousDistillation, L1(), weight="uniform", frozen_target=False)(models)
    intervals, apart = [64, 128, 256, 512], []
    for n in intervals:
        scaled = n * float(discrete(ConsistencyDistillation, n, L1())(models))
        apart.append(abs(scaled / float(limit) - 1))
    assert apart[-1] < 1e-4
    assert apart[-1] < apart[0] / 2


def test_theorem_4_the_limit_is_reached_with_order_one():
    """Off the exact function by 0.2 σ (2 + tanh x), whose change along a path is positive.

    So |f'| has no kink: on a network the quadrature of the kinks is off by as much as the limit.
    """

    def rising(x, sigma, label=None):
        return WORLD.consistency(x, sigma) + 0.2 * sigma[:, None] * (2 + torch.tanh(x))

    models = Models(rising, rising, WORLD.denoiser)
    limit = continuous(ContinuousDistillation, L1(), weight="uniform", frozen_target=False)(models)
    intervals = [64, 128, 256, 512]
    losses = [float(discrete(ConsistencyDistillation, n, L1())(models)) for n in intervals]
    apart = [abs(n * loss / float(limit) - 1) for n, loss in zip(intervals, losses, strict=True)]
    assert slope(intervals, apart) == pytest.approx(1.0, abs=0.05)


# ── Theorems 5 and 6: the scaled gradients have one limit, with a teacher and without ──


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("distance", [L2(), PseudoHuber(1.0)], ids=["l2", "huber"])
@pytest.mark.parametrize(
    ("kind", "limiting"),
    [(ConsistencyDistillation, ContinuousDistillation), (ConsistencyTraining, ContinuousTraining)],
    ids=["cd", "ct"],
)
def test_theorems_5_and_6_the_gradient_times_n_has_a_limit(kind, limiting, distance, dim):
    """Measured in 1-D: 3.3% off at N - 1 = 32 and 0.4% at 256, with a teacher and without."""
    model = student(1, dim)
    limit = gradient(continuous(limiting, distance, dim, weight="uniform"), model)
    intervals = [32, 64, 128, 256] if dim == 1 else [16, 32, 64]
    apart, cosine = [], []
    for n in intervals:
        scaled = n * gradient(discrete(kind, n, distance, dim), model)
        apart.append(float((scaled - limit).norm() / limit.norm()))
        cosine.append(float(torch.cosine_similarity(scaled, limit, 0)))
    assert slope(intervals, apart) == pytest.approx(1.0, abs=0.15)
    assert cosine[-1] > 0.999


@pytest.mark.parametrize("weight", ["uniform", "inverse_gap"])
def test_theorem_6_training_and_distillation_have_the_same_gradient(weight):
    """Exactly, not in a limit: the noise enters linearly, and its mean is the path's direction."""
    model = student(1)
    cd, ct = (
        gradient(continuous(kind, weight=weight), model)
        for kind in (ContinuousDistillation, ContinuousTraining)
    )
    assert float((cd - ct).norm() / cd.norm()) < 1e-8  # what the quadrature leaves


def test_the_inverse_gap_of_the_grid_is_the_papers_continuous_weight():
    """λ = (τ⁻¹)' is what 1/(σ - σ') becomes, divided by N - 1: no factor N is left to scale by."""
    model, n = student(1), 256
    limit = gradient(continuous(ContinuousDistillation), model)
    found = gradient(discrete(ConsistencyDistillation, n, weight="inverse_gap"), model)
    assert float((found - limit).norm() / limit.norm()) < 0.03


# ── and what has no limit ──


def test_a_target_that_lags_has_no_limit():
    """iCT's example: data are the point 0, f = (ε/σ) x + (1 - ε/σ) θ, at x = σ z, z = 1."""

    def pulled(gap: float, lag: float, theta: float = 0.5, sigma: float = 1.0) -> float:
        parameter = torch.tensor(theta, dtype=torch.float64, requires_grad=True)

        def answer(theta, sigma):
            return 0.1 + (1 - 0.1 / sigma) * theta

        off = answer(parameter, sigma) - answer(parameter.detach() + lag, sigma - gap)
        return float(torch.autograd.grad(off.square(), parameter)[0]) / gap

    assert pulled(1e-6, 0.0) == pytest.approx(2 * 0.1 * 0.9 * 0.5, rel=1e-4)  # down, to the data
    lagging = [pulled(gap, 0.01) for gap in (1e-2, 1e-3, 1e-4)]
    assert lagging[1] == pytest.approx(10 * lagging[0], rel=0.2)
    assert lagging[1] < 0  # back, up
    assert math.isclose(lagging[2], 10 * lagging[1], rel_tol=0.02)
