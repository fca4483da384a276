"""Exact answers must be exact: against closed forms, stored numbers and each other."""

import time

import pytest
import torch
from scipy import stats
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from cmbook.data import WORLDS
from cmbook.noise import NoiseRange, normal, seeded
from cmbook.ode import solve
from cmbook.oracle import Gaussian, GaussianMixture, worlds


def full(n: int, sigma: float) -> torch.Tensor:
    return torch.full((n,), sigma, dtype=torch.float64)


def cdf(x: torch.Tensor, world: GaussianMixture, sigma: float) -> torch.Tensor:
    """The CDF of the first coordinate of an axis-aligned mixture."""
    spread = (world.covariances[:, 0, 0] + sigma**2).sqrt()
    return (world.weights * torch.special.ndtr((x[:, None] - world.means[:, 0]) / spread)).sum(1)


def through_the_cdf(world: GaussianMixture, x: torch.Tensor, sigma: float, end: float):
    """In one dimension paths keep the CDF: solve F_end(y) = F_sigma(x) by bisection."""
    level = cdf(x, world, sigma)
    low, high = torch.full_like(x, -10), torch.full_like(x, 10)
    for _ in range(80):
        middle = (low + high) / 2
        below = cdf(middle, world, end) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


@pytest.mark.parity
def test_the_gaussian_equals_stored_closed_forms(golden):
    stored = golden("gaussian")
    world = Gaussian.isotropic(stored["mean"], float(stored["std"]))
    x, sigma = stored["x"], stored["t"]
    torch.testing.assert_close(world.denoiser(x, sigma), stored["denoised"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(world.consistency(x, sigma), stored["f"], rtol=1e-12, atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("level", range(7))
def test_the_mixture_equals_stored_closed_forms(golden, level):
    stored = golden("gmm2d")
    world = GaussianMixture(stored["weights"], stored["means"], stored["covs"])
    case = {k.split("/")[1]: v for k, v in stored.items() if k.startswith(f"level{level}/")}
    x, sigma = case["x"], case["sigma"].expand(len(case["x"]))
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(world.denoiser(x, sigma), case["denoised"], **tolerance)
    torch.testing.assert_close(world.score(x, sigma), case["score"], **tolerance)
    torch.testing.assert_close(world.log_density(x, sigma), case["logp"], **tolerance)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("start", "sigma", "end"), [("xT", "", "f_xT"), ("x_mid", "t_mid", "f_mid")]
)
def test_the_mixtures_paths_equal_those_of_another_solver(golden, start, sigma, end):
    stored = golden("gmm2d")
    world = GaussianMixture(stored["weights"], stored["means"], stored["covs"])
    x = stored[start]
    level = stored[sigma].expand(len(x)) if sigma else full(len(x), 80.0)
    torch.testing.assert_close(world.consistency(x, level), stored[end], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sigma", [80.0, 1.0, 0.1])
def test_ten_thousand_paths_are_right_and_quick(separable, sigma):
    x = separable.sample(10_000, sigma, generator=seeded(0)).x
    start = time.process_time()
    end = separable.consistency(x, full(10_000, sigma))
    seconds = time.process_time() - start
    assert seconds < 5

    along_x = through_the_cdf(separable, x[:, 0], sigma, 0.002)
    shrink = ((0.2**2 + 0.002**2) / (0.2**2 + sigma**2)) ** 0.5
    along_y = 0.1 + (x[:, 1] - 0.1) * shrink
    errors = (end - torch.stack([along_x, along_y], 1)).abs().amax(1)
    assert float(errors.median()) < 1e-8
    assert float(errors.max()) < 1e-6


def test_narrow_modes_are_solved_as_well_as_by_a_thousandfold_tolerance(monkeypatch):
    world = WORLDS["ring"]()
    x = world.sample(2000, 1.0, generator=seeded(0)).x
    end = world.consistency(x, full(2000, 1.0))
    tight = worlds.integrate
    monkeypatch.setattr(worlds, "integrate", lambda *a: tight(*a, tolerance=1e-13))
    errors = (end - world.consistency(x, full(2000, 1.0))).abs().amax(1)
    assert float(errors.median()) < 1e-8
    assert float(errors.max()) < 1e-6


# In three dimensions the axes of Σ are no reflection: taking their transpose is another rotation.

_A = 0.6 * normal(torch.empty(3, 3, 3, dtype=torch.float64), seeded(7))
_STD = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)
MEANS = normal(torch.empty(3, 3, dtype=torch.float64), seeded(8))
SHARES = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
TURNED, ROUND = _A @ _A.mT, _STD[:, None, None] ** 2 * EYE
SOLID = {
    "gaussian": (Gaussian(MEANS[0], TURNED[0]), TURNED[:1]),
    "mixture": (GaussianMixture(SHARES, MEANS, TURNED), TURNED),
    "round mixture": (GaussianMixture.isotropic(MEANS, _STD, SHARES), ROUND),
}


def as_torch_knows_it(covariances, sigma, components=None):
    """The noisy world, or some of its components, as a distribution of torch."""
    components = components or slice(len(covariances))
    normals = MultivariateNormal(MEANS[components], covariances[components] + sigma**2 * EYE)
    return MixtureSameFamily(Categorical(SHARES[components]), normals)


def check_density_score_and_denoiser(world, truth, sigma, *label):
    x = 2 * normal(torch.empty(32, 3, dtype=torch.float64), seeded(1))
    density = truth.log_prob(x.requires_grad_(True))
    (slope,) = torch.autograd.grad(density.sum(), x)
    args = (x.detach(), full(32, sigma), *label)
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(world.log_density(*args), density.detach(), **tolerance)
    torch.testing.assert_close(world.score(*args), slope, **tolerance)
    torch.testing.assert_close(world.denoiser(*args), args[0] + sigma**2 * slope, **tolerance)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 20.0])
@pytest.mark.parametrize("name", SOLID)
def test_a_solid_world_has_the_density_that_torch_gives_it(name, sigma):
    world, covariances = SOLID[name]
    check_density_score_and_denoiser(world, as_torch_knows_it(covariances, sigma), sigma)


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("name", ["mixture", "round mixture"])
def test_a_component_of_a_solid_world_has_the_density_that_torch_gives_it(name, k):
    world, covariances = SOLID[name]
    truth = as_torch_knows_it(covariances, 0.7, slice(k, k + 1))
    check_density_score_and_denoiser(world, truth, 0.7, torch.full((32,), k))


@pytest.mark.parametrize("sigma", [0.0, 0.7])
@pytest.mark.parametrize("name", SOLID)
def test_samples_of_a_solid_world_have_its_means_and_covariances(name, sigma):
    world, covariances = SOLID[name]
    x, label = world.sample(200_000, sigma, generator=seeded(3))
    for k, covariance in enumerate(covariances):
        own, noisy = x[label == k], covariance + sigma**2 * EYE
        torch.testing.assert_close(own.mean(0), MEANS[k], rtol=0, atol=0.03)
        torch.testing.assert_close(own.T.cov(), noisy, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", SOLID)
def test_paths_of_a_solid_world_are_those_of_a_fine_walk(name):
    world, _ = SOLID[name]
    x = world.sample(16, 5.0, generator=seeded(0)).x
    walked = solve(world.denoiser, x, NoiseRange(0.1, 5.0).grid(1000))
    there = world.flow_map(x, full(16, 5.0), full(16, 0.1))
    torch.testing.assert_close(there, walked, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        world.consistency(x, full(16, 5.0), sigma_end=0.1), there, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", WORLDS)
def test_every_toy_world_is_consistent_with_itself(name):
    """The score is the slope of the log density, and D = x + σ² score."""
    world = WORLDS[name]()
    x = world.sample(64, 0.3, generator=seeded(1)).x.requires_grad_(True)
    sigma = full(64, 0.3)
    (slope,) = torch.autograd.grad(world.log_density(x, sigma).sum(), x)
    torch.testing.assert_close(world.score(x, sigma), slope, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(world.denoiser(x, sigma), x + 0.09 * slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", WORLDS)
def test_every_toy_world_lies_in_the_unit_square(name):
    points = WORLDS[name]().sample(20_000, generator=seeded(0)).x
    assert float((points.abs() > 1).double().mean()) < 0.01


def test_samples_have_the_law_of_the_density(separable):
    x = separable.sample(200_000, 0.4, generator=seeded(3)).x
    assert stats.kstest(cdf(x[:, 0], separable, 0.4).numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", WORLDS)
def test_the_unit_of_distances_is_the_spread_of_the_samples(name):
    world = WORLDS[name]()
    x = world.sample(100_000, generator=seeded(0)).x
    assert world.std == pytest.approx(float(x.var(0).mean().sqrt()), rel=0.01)


def test_labels_are_those_of_the_components(separable):
    batch = separable.sample(100_000, generator=seeded(0))
    for k in range(3):
        own = batch.x[batch.label == k]
        assert len(own) / 100_000 == pytest.approx(float(separable.weights[k]), abs=0.01)
        torch.testing.assert_close(own.mean(0), separable.means[k], rtol=0, atol=0.01)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_label_leaves_one_component_alone(separable, k):
    world = Gaussian(separable.means[k], separable.covariances[k])
    x, sigma = normal(torch.empty(8, 2, dtype=torch.float64), seeded(0)), full(8, 0.7)
    label = torch.full((8,), k)
    for method in ("denoiser", "score", "log_density", "consistency"):
        torch.testing.assert_close(
            getattr(separable, method)(x, sigma, label), getattr(world, method)(x, sigma),
            rtol=1e-8, atol=1e-8,
        )  # fmt: skip


def test_a_mixture_of_one_is_a_gaussian(gaussian):
    mixture = GaussianMixture(
        torch.ones(1, dtype=torch.float64), gaussian.mean[None], gaussian.covariance[None]
    )
    x = gaussian.sample(32, 5.0, generator=seeded(0)).x
    there = mixture.flow_map(x, full(32, 5.0), full(32, 0.01))
    torch.testing.assert_close(
        there, gaussian.flow_map(x, full(32, 5.0), full(32, 0.01)), rtol=1e-9, atol=1e-9
    )


def test_paths_compose_and_return(separable):
    x = separable.sample(64, 2.0, generator=seeded(0)).x
    halfway = separable.flow_map(x, full(64, 2.0), full(64, 0.3))
    direct = separable.consistency(x, full(64, 2.0))
    torch.testing.assert_close(
        separable.consistency(halfway, full(64, 0.3)), direct, rtol=1e-7, atol=1e-7
    )
    back = separable.flow_map(direct, full(64, 0.002), full(64, 2.0))
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


def test_each_point_may_start_at_a_level_of_its_own(separable):
    x = separable.sample(3, 0.5, generator=seeded(0)).x
    sigma = torch.tensor([0.001, 0.5, 80.0], dtype=torch.float64)
    together = separable.consistency(x, sigma)
    alone = torch.cat([separable.consistency(x[i : i + 1], sigma[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    assert torch.equal(together[0], x[0])


def test_a_flow_map_reaches_sigma_zero(separable):
    x = separable.sample(16, 0.5, generator=seeded(0)).x
    zero = separable.flow_map(x, full(16, 0.5), full(16, 0.0))
    near = separable.flow_map(x, full(16, 0.5), full(16, 1e-4))
    torch.testing.assert_close(zero, near, rtol=0, atol=1e-6)


@pytest.mark.parametrize("d", [2, 3])
def test_the_jacobian_is_the_slope_of_the_consistency_function(separable, d):
    world = {2: separable, 3: SOLID["mixture"][0]}[d]
    x = world.sample(16, 1.0, generator=seeded(2)).x
    sigma = full(16, 1.0)
    jacobian = world.consistency_jacobian(x, sigma)
    for j in range(d):
        shift = 1e-5 * torch.eye(d, dtype=torch.float64)[j]
        ends = [world.consistency(x + s * shift, sigma) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(jacobian[:, :, j], slope, rtol=1e-4, atol=1e-4)


def test_near_seams_the_jacobian_is_large():
    world = WORLDS["ring"]()
    seam = torch.tensor([[0.35, 0.145]], dtype=torch.float64)  # between the modes at 0 and 45°
    modes = world.means[:1] * 1.1
    norms = torch.linalg.matrix_norm(
        world.consistency_jacobian(torch.cat([seam, modes]), full(2, 0.5)), 2
    )
    assert float(norms[0]) > 10 > 1 > float(norms[1])


def test_float32_points_come_back_as_float32(separable):
    x, sigma = torch.zeros(2, 2), torch.ones(2)
    for method in ("denoiser", "score", "log_density", "consistency"):
        assert getattr(separable, method)(x, sigma).dtype == torch.float32


@pytest.mark.parametrize("label", [torch.tensor([3]), torch.tensor([-1])])
def test_labels_without_a_component_are_refused(separable, label):
    with pytest.raises(ValueError, match=r"0 \.\.\. 2"):
        separable.denoiser(torch.zeros(1, 2), torch.ones(1), label)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture(torch.tensor([1.0, 0.0]), torch.zeros(2, 1), torch.ones(2, 1, 1)),
         "positive"),
        (lambda: Gaussian(torch.zeros(2), -torch.eye(2)), "positive semidefinite"),
        (lambda: Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
    ],
)  # fmt: skip
def test_impossible_worlds_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_point_mass_without_noise_is_its_own_denoiser():
    """Finite data are mixtures of point masses: at sigma 0 nothing may become NaN."""
    spot = Gaussian.isotropic([0.3, -0.2], 0.0)
    spots = GaussianMixture.isotropic(torch.tensor([[0.3, -0.2], [1.0, 1.0]]), 0.0)
    for world in (spot, spots):
        x = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
        torch.testing.assert_close(world.denoiser(x, full(1, 0.0)), x)
        assert bool(torch.isfinite(world.score(x, full(1, 0.0))).all())


@pytest.mark.parametrize(
    ("x", "sigma"), [(float("nan"), 1.0), (float("inf"), 1.0), (0.0, float("inf"))]
)
def test_a_path_from_nowhere_is_refused_instead_of_followed_for_ever(separable, x, sigma):
    with pytest.raises(ValueError, match="must be finite"):
        separable.consistency(torch.full((1, 2), x, dtype=torch.float64), full(1, sigma))


def test_the_jacobian_ends_where_it_is_told():
    world = GaussianMixture.isotropic(torch.tensor([[-0.5, 0.0], [0.5, 0.0]]), 0.1)
    x, aside = torch.tensor([[0.02, 0.3]]).double(), torch.tensor([[1e-6, 0.0]]).double()
    ahead, behind = (world.consistency(x + s * aside, full(1, 1.0), sigma_end=0.3) for s in (1, -1))
    jacobian = world.consistency_jacobian(x, full(1, 1.0), sigma_end=0.3)
    torch.testing.assert_close(jacobian[:, :, 0], (ahead - behind) / 2e-6, rtol=1e-3, atol=1e-4)
