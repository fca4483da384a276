"""Guidance, exactly: what it does to the denoiser, the score, the paths and the law."""

import pytest
import torch
from scipy import stats

from cmbook.data import WORLDS, ToyData
from cmbook.distances import PseudoHuber
from cmbook.guidance import guided
from cmbook.losses import ConsistencyDistillation, ConsistencyTraining
from cmbook.networks import MLP
from cmbook.noise import NoiseRange, seeded
from cmbook.ode import solve
from cmbook.oracle import GaussianMixture, Guided, distance_to_truth
from cmbook.parameterization import ConsistencyScalings, EDMScalings, Preconditioned
from cmbook.protocols import Batch, Clock, Models
from cmbook.training import LearningRate, frozen_view, train

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def full(n: int, sigma: float) -> torch.Tensor:
    return torch.full((n,), sigma, dtype=torch.float64)


@pytest.fixture
def moons():
    return WORLDS["moons"]()


@pytest.fixture
def line():
    """Two classes on a line that overlap."""
    means = torch.tensor([[-0.4], [0.4]], dtype=torch.float64)
    return GaussianMixture.isotropic(means, 0.4)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_a_class_of_many_components_has_the_law_of_those_alone(moons, sigma):
    alone = GaussianMixture.isotropic(moons.means[24:], 0.04)
    x, label = alone.sample(16, sigma, generator=seeded(0)).x, torch.ones(16, dtype=torch.int64)
    for method in ("denoiser", "score", "log_density"):
        torch.testing.assert_close(
            getattr(moons, method)(x, full(16, sigma), label),
            getattr(alone, method)(x, full(16, sigma)), **EXACT,
        )  # fmt: skip


def test_classes_of_oblong_components_weigh_them_within_the_class():
    weights = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    means = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    spread = torch.diag_embed(torch.tensor([[0.1, 0.4], [0.2, 0.3], [0.3, 0.1]]).double())
    world = GaussianMixture(weights, means, spread, classes=torch.tensor([1, 1, 0]))
    alone = GaussianMixture(weights[:2], means[:2], spread[:2])
    x = world.sample(16, 0.3, generator=seeded(0)).x
    for method in ("denoiser", "log_density"):
        torch.testing.assert_close(
            getattr(world, method)(x, full(16, 0.3), torch.ones(16, dtype=torch.int64)),
            getattr(alone, method)(x, full(16, 0.3)), **EXACT,
        )  # fmt: skip


def test_bayes_rule_holds_between_classes_and_the_whole(moons):
    x = moons.sample(16, 0.3, generator=seeded(0)).x
    inside = [moons.log_density(x, full(16, 0.3), torch.full((16,), c)) for c in (0, 1)]
    whole = (torch.stack(inside).exp() / 2).sum(0).log()
    torch.testing.assert_close(moons.log_density(x, full(16, 0.3)), whole, **EXACT)


@pytest.mark.parametrize("label", [None, 0, 1])
def test_the_labels_of_samples_are_their_classes(moons, label):
    x, own = moons.sample(4000, generator=seeded(0))
    nearest = torch.cdist(x, moons.means).argmin(1)
    assert float((own == (nearest >= 24)).double().mean()) > 0.99


@pytest.mark.parametrize(("scale", "told"), [(0.0, False), (1.0, True)])
def test_scale_one_is_the_class_and_scale_zero_the_whole(moons, scale, told):
    x, label = moons.sample(16, 0.5, generator=seeded(0))
    world = Guided(moons, scale)
    for method in ("denoiser", "score", "consistency"):
        torch.testing.assert_close(
            getattr(world, method)(x, full(16, 0.5), label),
            getattr(moons, method)(x, full(16, 0.5), label if told else None),
            rtol=1e-7, atol=1e-7,
        )  # fmt: skip


def test_the_guided_score_is_that_of_the_tilted_density(moons):
    """At each noise level alone: the slope of (1 - w) log p + w log p_c."""
    x, label = moons.sample(16, 0.3, generator=seeded(0))
    x.requires_grad_(True)
    tilted = -2 * moons.log_density(x, full(16, 0.3)) + 3 * moons.log_density(
        x, full(16, 0.3), label
    )
    (slope,) = torch.autograd.grad(tilted.sum(), x)
    world = Guided(moons, 3.0)
    torch.testing.assert_close(world.score(x.detach(), full(16, 0.3), label), slope, **EXACT)
    denoised = x.detach() + 0.09 * slope
    torch.testing.assert_close(world.denoiser(x.detach(), full(16, 0.3), label), denoised, **EXACT)


def test_guided_paths_are_those_of_a_fine_walk_along_the_guided_denoiser(line):
    x, label = line.sample(16, 5.0, generator=seeded(0))
    world = Guided(line, 2.5)
    walked = solve(guided(line.denoiser, 2.5), x, NoiseRange(0.01, 5.0).grid(1500), label)
    ends = world.consistency(x, full(16, 5.0), label, sigma_end=0.01)
    torch.testing.assert_close(ends, walked, rtol=0, atol=1e-4)


def test_without_a_label_guidance_changes_nothing(line):
    x, _ = line.sample(16, 1.0, generator=seeded(0))
    assert torch.equal(
        guided(line.denoiser, 5.0)(x, full(16, 1.0)), line.denoiser(x, full(16, 1.0))
    )


@pytest.mark.parametrize(("scale", "tilted"), [(1.0, True), (3.0, False)])
def test_guided_samples_do_not_follow_the_tilted_law(line, scale, tilted):
    """KS against the CDF of p^(1 - w) p_c^w, by quadrature: kept at w = 1, missed at w = 3."""
    n, label = 20_000, torch.ones(20_000, dtype=torch.int64)
    start = line.sample(n, 80.0, generator=seeded(0)).x
    ends = Guided(line, scale).consistency(start, full(n, 80.0), label)[:, 0]

    grid = torch.linspace(-4, 6, 20_001, dtype=torch.float64)[:, None]
    zero, ones = full(len(grid), 0.0), torch.ones(len(grid), dtype=torch.int64)
    density = (
        (1 - scale) * line.log_density(grid, zero) + scale * line.log_density(grid, zero, ones)
    ).exp()
    cdf = density.cumsum(0) / density.sum()
    at = torch.searchsorted(grid[:, 0].contiguous(), ends.contiguous()).clamp(max=20_000)
    p = stats.kstest(cdf[at].numpy(), "uniform").pvalue
    assert bool(p > 1e-3) is tilted


@pytest.mark.parametrize("classes", [[0, 2], [1, 2], [0]])
def test_classes_with_gaps_are_refused(classes):
    means = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="without a gap"):
        GaussianMixture.isotropic(means, 1.0, classes=torch.tensor(classes))


# ── networks that answer with a class and without ──


def conditioned(network=None) -> torch.nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return (network or MLP(width=16, depth=2, label_dropout=0.3)).build((2,), 3)


def test_no_label_is_the_class_that_says_nothing():
    net, x, told = conditioned().eval(), torch.ones(4, 2), torch.zeros(4)
    nothing = torch.full((4,), 3)
    assert torch.equal(net(x, told), net(x, told, nothing))
    assert not torch.allclose(net(x, told), net(x, told, torch.zeros(4, dtype=torch.int64)))


def test_labels_are_dropped_in_training_at_the_rate_asked_for_and_never_after():
    net, n = conditioned(), 20_000
    x, told, label = torch.ones(n, 2), torch.zeros(n), torch.ones(n, dtype=torch.int64)
    plain = net.eval()(x[:1], told[:1])
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        dropped = torch.isclose(net.train()(x, told, label), plain, atol=1e-5).all(1)
    assert float(dropped.double().mean()) == pytest.approx(0.3, abs=0.02)
    assert not bool(torch.isclose(net.eval()(x, told, label), plain, atol=1e-5).all(1).any())


def test_student_and_target_drop_the_same_labels():
    """Both are told by one seed, as with any dropout."""
    net, seen = conditioned().train(), []
    model = Preconditioned(net, ConsistencyScalings(NoiseRange()))
    net.conditioning.label.register_forward_hook(lambda m, told, out: seen.append(told[0].clone()))
    batch = Batch(torch.zeros(64, 2), torch.ones(64, dtype=torch.int64))
    ConsistencyTraining()(
        Models(model, frozen_view(model)), batch, clock=Clock(0, 1), generator=seeded(0)
    )
    assert torch.equal(*seen)
    assert set(seen[0].tolist()) == {1, 3}


def test_without_label_dropout_guidance_is_refused_with_the_reason():
    model = Preconditioned(conditioned(MLP(width=16, depth=2)), EDMScalings(NoiseRange()))
    with pytest.raises(ValueError, match="build and train it with label_dropout"):
        guided(model, 2.0)(torch.zeros(2, 2), torch.ones(2), torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_guidance_by_no_number_is_refused(line, scale):
    with pytest.raises(ValueError, match="scale must be a finite number"):
        guided(line.denoiser, scale)


def test_an_impossible_label_dropout_is_refused():
    with pytest.raises(ValueError, match=r"label_dropout must lie in \[0, 1\); got 1"):
        MLP(label_dropout=1.0)


# ── a guided teacher, distilled ──


def test_points_of_a_guided_world_lie_on_its_paths(line):
    """From noise to any level, then on to the end: the same end."""
    world = Guided(line, 3.0)
    noisy, end = (world.sample(50, s, generator=seeded(0)) for s in (1.0, 0.002))
    assert torch.equal(noisy.label, end.label)
    went_on = world.consistency(noisy.x, full(50, 1.0), noisy.label)
    torch.testing.assert_close(went_on, end.x, rtol=0, atol=1e-6)


def test_a_guided_teacher_distills_into_the_guided_world():
    """Nothing changes but the teacher: the student's distance is to the exact guided paths."""
    means = torch.tensor([[-0.4, 0.0], [0.4, 0.2]], dtype=torch.float64)
    world, noise_range = GaussianMixture.isotropic(means, 0.25), NoiseRange(sigma_max=10.0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = MLP(width=64, depth=3).build((2,), 2)
    student = Preconditioned(net, ConsistencyScalings(noise_range))
    objective = ConsistencyDistillation(
        noise_range, 12, distance=PseudoHuber(0.03), weight="inverse_gap"
    )
    *_, step = train(
        student,
        ToyData(world, labelled=True).batches(256, seed=0),
        objective,
        steps=500,
        optimizer=torch.optim.Adam(student.parameters(), fused=True),
        teacher=guided(world.denoiser, 3.0),
        average_decay=0.98,
        learning_rate=LearningRate(4e-3, decay="cosine"),
    )

    def median(truth):
        found = distance_to_truth(
            step.average, truth, noise_range, levels=12, n=500, labelled=True, generator=seeded(1)
        )
        return float(found.total.median.value[0])

    assert median(Guided(world, 3.0)) < 0.15 < 0.4 < median(Guided(world, 1.0))
