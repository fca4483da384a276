"""The losses at the truth, at the boundary, and what they send gradients to."""

from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import nn

from cmbook.distances import L2, Norm, PseudoHuber
from cmbook.losses import (
    EDM,
    AnyObjective,
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousDistillation,
)
from cmbook.losses.regression import Dropout, neighbors, same_noise
from cmbook.networks import MLP, ResidualMLP
from cmbook.noise import LogNormal, NoiseRange, PerImage, Replay, add_noise, normal, seeded
from cmbook.ode import euler_step, heun_step
from cmbook.oracle import Gaussian
from cmbook.parameterization import ConsistencyScalings, EDMScalings, Preconditioned
from cmbook.protocols import Batch, Clock, Models
from cmbook.schedules import AdaptiveLevels, FixedLevels

WORLD = Gaussian.isotropic([0.3], 0.5)
CLOCK = Clock(0, 10)
OBJECTIVES = [kind() for kind in get_args(AnyObjective)]


def model(scalings, seed=0, shape=(2,), net=None) -> Preconditioned:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Preconditioned((net or MLP(width=32, depth=2)).build(shape), scalings)


def every_pair(levels: int, repeats: int) -> tuple[Batch, Replay]:
    """A batch in which every pair of neighbors occurs equally often."""
    n = (levels - 1) * repeats
    x = WORLD.sample(n, generator=seeded(1)).x
    noise = normal(torch.empty(n, 1, dtype=torch.float64), seeded(2))
    return Batch(x), Replay(normals=[noise], integers=[torch.arange(n) % (levels - 1)])


def slope(levels: list[int], losses: list[float]) -> float:
    x = torch.tensor([n - 1.0 for n in levels], dtype=torch.float64).log()
    y = torch.tensor(losses, dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize(("solver", "exponent"), [("euler", -4.0), ("heun", -6.0)])
def test_distillation_at_the_exact_function_vanishes_with_the_solvers_power(solver, exponent):
    losses = []
    for levels in (65, 97, 129, 193, 257):
        batch, replay = every_pair(levels, 200)
        objective = ConsistencyDistillation(levels=levels, solver=solver)
        models = Models(WORLD.consistency, WORLD.consistency, WORLD.denoiser)
        losses.append(float(objective(models, batch, clock=CLOCK, generator=replay).value))
    assert slope([65, 97, 129, 193, 257], losses) == pytest.approx(exponent, abs=0.15)


def test_training_at_the_exact_function_vanishes_like_the_square_of_the_step():
    """Its pairs lie on a line of noise, not on a path: order 2, whatever the solver."""
    losses = []
    for levels in (65, 129, 257):
        batch, replay = every_pair(levels, 200)
        objective = ConsistencyTraining(curriculum=FixedLevels(levels))
        models = Models(WORLD.consistency, WORLD.consistency)
        losses.append(float(objective(models, batch, clock=CLOCK, generator=replay).value))
    assert slope([65, 129, 257], losses) == pytest.approx(-2, abs=0.15)


def test_the_denoising_loss_is_least_at_the_exact_denoiser():
    """Off by a little in any direction, the loss is larger: the minimum of Karras et al. eq. 2."""
    batch = Batch(WORLD.sample(20_000, generator=seeded(1)).x)

    def loss(shift: float) -> float:
        def student(x, sigma, label=None):
            return WORLD.denoiser(x, sigma) + shift * EDMScalings().c_out(sigma)[:, None]

        return float(EDM()(Models(student), batch, clock=CLOCK, generator=seeded(3)).value)

    assert loss(0.0) < min(loss(0.05), loss(-0.05))


def test_pairs_of_training_lie_on_one_line_of_noise(generator):
    x0 = torch.ones(4, 2)
    sigma, sigma_next = torch.tensor([4.0, 3, 2, 1]), torch.tensor([3.0, 2, 1, 0.5])
    pair = same_noise(x0, sigma, sigma_next, generator)
    torch.testing.assert_close(
        (pair.x - x0) / sigma[:, None], (pair.x_next - x0) / sigma_next[:, None]
    )


def test_training_pairs_are_eulers_step_with_the_clean_sample_as_denoiser(generator):
    x0 = torch.ones(4, 2, dtype=torch.float64)
    sigma = torch.tensor([4.0, 3, 2, 1], dtype=torch.float64)
    pair = same_noise(x0, sigma, sigma / 2, generator)
    step = euler_step(lambda x, s, label=None: x0, pair.x, sigma, sigma / 2)
    torch.testing.assert_close(step, pair.x_next)


def test_neighbors_are_adjacent_and_every_pair_occurs(generator):
    grid = NoiseRange().grid(6)
    sigma, sigma_next = neighbors(grid, torch.empty(1000, 2, dtype=torch.float64), generator)
    pairs = {(float(a), float(b)) for a, b in zip(sigma, sigma_next, strict=True)}
    assert pairs == {(float(a), float(b)) for a, b in pairwise(grid)}


def test_neighbors_are_float32_for_half_precision_samples(generator):
    sigma, _ = neighbors(NoiseRange().grid(4), torch.empty(2, 2, dtype=torch.bfloat16), generator)
    assert sigma.dtype == torch.float32


BY_HAND = {
    "inverse_gap": lambda s, s_next: 1 / (s - s_next),
    "karras": lambda s, s_next: 1 / s**2 + 1 / 0.3**2,
}


@pytest.mark.parametrize("weight", BY_HAND)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_distillation_is_the_algorithm_box_by_hand(solver, weight):
    noise_range = NoiseRange(sigma_max=20.0, sigma_data=0.3)
    teacher = model(EDMScalings(noise_range), 1)
    student, target = (model(ConsistencyScalings(noise_range), seed) for seed in (2, 3))
    batch = Batch(normal(torch.empty(5, 2), seeded(0)))
    z, n = normal(torch.empty(5, 2), seeded(1)), torch.tensor([0, 3, 5, 8, 9])
    objective = ConsistencyDistillation(
        noise_range, levels=11, solver=solver, distance=Norm(), weight=weight
    )
    replay = Replay(normals=[z], integers=[n])
    loss = objective(Models(student, target, teacher), batch, clock=CLOCK, generator=replay)

    t = noise_range.grid(11).float()
    x = add_noise(batch.x, z, t[n])
    step = {"euler": euler_step, "heun": heun_step}[solver]
    x_hat = step(teacher, x, t[n], t[n + 1])
    gap = (student(x, t[n]) - target(x_hat, t[n + 1])).square().sum(1).sqrt()
    expected = BY_HAND[weight](t[n], t[n + 1]) * gap
    torch.testing.assert_close(loss.per_sample, expected.detach())
    torch.testing.assert_close(loss.value, expected.mean())
    assert torch.equal(loss.sigma, t[n])


@pytest.mark.parametrize("weight", BY_HAND)
def test_training_is_the_algorithm_box_by_hand(weight):
    """N(3) of 10 is 18: √(0.3 (31² - 2²) + 2²) - 1 = 16.06, rounded up, and 1."""
    noise_range = NoiseRange(sigma_max=20.0, sigma_data=0.3)
    student, target = (model(ConsistencyScalings(noise_range), seed) for seed in (2, 3))
    batch = Batch(normal(torch.empty(5, 2), seeded(0)))
    z, n = normal(torch.empty(5, 2), seeded(1)), torch.tensor([0, 3, 5, 8, 16])
    objective = ConsistencyTraining(
        noise_range, AdaptiveLevels(2, 30), distance=Norm(), weight=weight
    )
    replay = Replay(normals=[z], integers=[n])
    loss = objective(Models(student, target), batch, clock=Clock(3, 10), generator=replay)

    t = noise_range.grid(18).float()
    x, x_next = (batch.x + t[i][:, None] * z for i in (n, n + 1))
    gap = (student(x, t[n]) - target(x_next, t[n + 1])).square().sum(1).sqrt()
    expected = BY_HAND[weight](t[n], t[n + 1]) * gap
    torch.testing.assert_close(loss.per_sample, expected.detach())
    torch.testing.assert_close(loss.value, expected.mean())
    assert torch.equal(loss.sigma, t[n])


@pytest.mark.parametrize(
    ("weight", "by_hand"),
    [("karras", lambda s: 1 / s**2 + 1 / 0.3**2), ("snr", lambda s: 1 / s**2)],
)
def test_denoising_is_equation_2_by_hand(weight, by_hand):
    noise_range = NoiseRange(sigma_max=20.0, sigma_data=0.3)
    student = model(EDMScalings(noise_range), 2)
    batch = Batch(normal(torch.empty(5, 2), seeded(0)))
    z, u = normal(torch.empty(5, 2), seeded(1)), normal(torch.empty(5, 1), seeded(2))[:, 0]
    objective = EDM(noise_range, LogNormal(-0.5, 0.7), PseudoHuber(0.1), weight)
    loss = objective(Models(student), batch, clock=CLOCK, generator=Replay(normals=[u, z]))

    sigma = (-0.5 + 0.7 * u).exp()
    gap = (student(batch.x + sigma[:, None] * z, sigma) - batch.x).square().sum(1)
    expected = by_hand(sigma) * ((gap + 0.01).sqrt() - 0.1)
    torch.testing.assert_close(loss.per_sample, expected.detach())
    torch.testing.assert_close(loss.value, expected.mean())
    torch.testing.assert_close(loss.sigma, sigma)


@pytest.mark.parametrize(
    ("step", "mu"), [(0, 0.9), (1, 0.93217), (8000, 0.98692), (400_000, 0.99803)]
)
def test_the_target_of_training_decays_as_the_table_of_its_curriculum(step, mu):
    objective = ConsistencyTraining(curriculum=AdaptiveLevels(2, 150, 0.9))
    assert objective.target_decay(Clock(step, 800_000)) == pytest.approx(mu, abs=6e-6)


@pytest.mark.parametrize("step", [0, 7])
def test_the_target_of_distillation_decays_at_one_rate(step):
    assert ConsistencyDistillation(decay=0.7).target_decay(Clock(step, 10)) == 0.7


@pytest.mark.parametrize("objective", [*OBJECTIVES, ContinuousDistillation(frozen_target=False)])
def test_every_model_is_told_the_class(objective, spy):
    student, target, teacher = (spy(WORLD.denoiser) for _ in range(3))
    label = torch.tensor([2, 0, 1])
    batch = Batch(torch.ones(3, 1), label)
    objective(Models(student, target, teacher), batch, clock=CLOCK, generator=seeded(0))
    assert student.labels
    assert all(told is label for m in (student, target, teacher) for told in m.labels)


@pytest.mark.parametrize(
    ("objective", "evaluations"),
    [
        (EDM(), (1, 0, 0)),
        (ConsistencyDistillation(solver="heun"), (1, 1, 2)),
        (ConsistencyDistillation(solver="euler"), (1, 1, 1)),
        (ConsistencyTraining(), (1, 1, 0)),
    ],
)
def test_a_step_takes_these_evaluations_of_student_target_and_teacher(objective, evaluations, spy):
    spies = [spy(WORLD.denoiser) for _ in range(3)]
    objective(Models(*spies), Batch(torch.ones(3, 1)), clock=CLOCK, generator=seeded(0))
    assert tuple(len(s.labels) for s in spies) == evaluations


@pytest.mark.parametrize("objective", [ConsistencyDistillation(levels=5), ConsistencyTraining()])
def test_only_the_student_gets_gradients(objective, generator):
    teacher = model(EDMScalings(), 0)
    student, target = (model(ConsistencyScalings(), seed) for seed in (1, 2))
    batch = Batch(normal(torch.empty(64, 2), seeded(0)))
    objective(
        Models(student, target, teacher), batch, clock=CLOCK, generator=generator
    ).value.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for m in (target, teacher) for p in m.parameters())


def test_only_the_student_builds_a_graph(generator):
    building = {}

    def watched(name):
        def call(x, sigma, label=None):
            building[name] = torch.is_grad_enabled()
            return WORLD.denoiser(x, sigma)

        return call

    models = Models(*(watched(name) for name in ("student", "target", "teacher")))
    ConsistencyDistillation()(models, Batch(torch.ones(2, 1)), clock=CLOCK, generator=generator)
    assert building == {"student": True, "target": False, "teacher": False}


@pytest.mark.parametrize("objective", [ConsistencyDistillation(levels=2), ConsistencyTraining()])
def test_at_the_last_interval_the_target_is_its_input_for_any_weights(objective):
    """At σ′ = sigma_min the target is the identity, so its weights cannot matter."""
    objective = replace(objective, noise_range=NoiseRange(0.002, 0.01))
    values = set()
    for seed in (1, 2):
        models = Models(
            model(ConsistencyScalings(objective.noise_range), 0),
            model(ConsistencyScalings(objective.noise_range), seed),
            model(EDMScalings(objective.noise_range), 5),
        )
        batch = Batch(torch.ones(3, 2))
        loss = objective(models, batch, clock=Clock(0, 9), generator=seeded(0))
        values.add(float(loss.value.detach()))
    assert len(values) == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_repeats_under_the_same_generator(objective):
    student, teacher = model(ConsistencyScalings(), 0), model(EDMScalings(), 1)
    batch = Batch(torch.ones(16, 2))
    losses = [
        objective(Models(student, student, teacher), batch, clock=CLOCK, generator=seeded(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(losses[0].per_sample, losses[1].per_sample)
    assert not torch.equal(losses[0].per_sample, losses[2].per_sample)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_sample_s_loss_does_not_depend_on_its_batch(objective):
    student, teacher = model(ConsistencyScalings(), 0), model(EDMScalings(), 1)
    models = Models(student, student, teacher)
    x = normal(torch.empty(4, 2), seeded(0))
    objective = replace(objective, distance=L2())
    together = objective(models, Batch(x), clock=CLOCK, generator=PerImage(range(4))).per_sample
    alone = torch.cat([
        objective(models, Batch(x[i : i + 1]), clock=CLOCK, generator=PerImage([i])).per_sample
        for i in range(4)
    ])  # fmt: skip
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_student_and_target_share_their_dropout_masks_and_nothing_else_changes():
    net = ResidualMLP(width=32, depth=2, dropout=0.5)
    student = model(ConsistencyScalings(), 0, (1, 8, 8), net)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, sigma = torch.ones(2, 1, 8, 8), torch.ones(2)
    before = torch.get_rng_state()
    dropout, other = Dropout(seeded(0), x.device), Dropout(seeded(1), x.device)
    outputs = []
    for context in (dropout, dropout, other):
        with context:
            outputs.append(student(x, sigma))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(before, torch.get_rng_state())


def test_recorded_draws_and_dropout_do_not_go_together():
    net = ResidualMLP(width=16, depth=1, dropout=0.5)
    student = model(ConsistencyScalings(), 0, (1, 8, 8), net)
    replay = Replay(normals=[torch.zeros(1, 1, 8, 8)], integers=[torch.tensor([0])])
    with pytest.raises(ValueError, match="build the network with dropout 0"):
        ConsistencyTraining()(
            Models(student, student), Batch(torch.ones(1, 1, 8, 8)), clock=CLOCK, generator=replay
        )


def test_with_equal_weights_student_and_target_agree_exactly_in_bfloat16():
    """Autocast around the whole objective: the two see the same rounding."""
    student = model(ConsistencyScalings(), 0, (1, 8, 8), ResidualMLP(width=64, depth=2))
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.1)
    seen = {}

    def spy(name):
        def call(x, sigma, label=None):
            seen[name] = student(torch.ones_like(x), torch.full_like(sigma, 0.7), label)
            return seen[name]

        return call

    batch = Batch(torch.ones(2, 1, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        ConsistencyTraining()(
            Models(spy("student"), spy("target")), batch, clock=CLOCK, generator=seeded(0)
        )
        rounded = student(torch.ones(2, 1, 8, 8), torch.full((2,), 0.7))
    exact = student(torch.ones(2, 1, 8, 8), torch.full((2,), 0.7))
    assert torch.equal(seen["student"].detach(), seen["target"])
    assert torch.equal(rounded, seen["student"])
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize(
    ("objective", "models", "message"),
    [
        (ConsistencyDistillation(), Models(WORLD.denoiser, WORLD.denoiser), "needs models.teacher"),
        (ConsistencyTraining(), Models(WORLD.denoiser), "needs models.target"),
    ],
)
def test_missing_models_are_named(objective, models, message):
    with pytest.raises(ValueError, match=message):
        objective(models, Batch(torch.ones(2, 1)), clock=CLOCK, generator=seeded(0))


@pytest.mark.parametrize("bad", [{"levels": 1}, {"decay": 1.0}, {"decay": -0.1}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=r"levels|decay"):
        ConsistencyDistillation(**bad)
