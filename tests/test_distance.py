"""Distance to truth: right where the answer is known, with intervals that mean what they say."""

import pytest
import torch

from cmbook.data import WORLDS
from cmbook.noise import NoiseRange, seeded
from cmbook.ode import solve
from cmbook.oracle import Dataset, Gaussian, distance_to_truth

RANGE = NoiseRange()
QUANTITIES = ("median", "rms", "off")


def measure(model, world, **knobs):
    settings = {"noise_range": RANGE, "levels": 8, "n": 500, "generator": seeded(0)} | knobs
    return distance_to_truth(model, world, **settings)


def lengthened(world, length):
    """The exact function, moved by `length(standardized x)` standard deviations of the data."""

    def model(x, sigma, label=None):
        standard = (x - world.mean) / (world.covariance[0, 0] + sigma[:, None] ** 2).sqrt()
        move = torch.zeros_like(x)
        move[:, 0] = world.std * length(standard[:, 0])
        return world.consistency(x, sigma) + move

    return model


def test_the_exact_function_is_at_no_distance(separable):
    found = measure(separable.consistency, separable)
    for quantity in QUANTITIES:
        assert float(getattr(found.total, quantity).value.max()) < 1e-7
        torch.testing.assert_close(
            getattr(found.network, quantity).value, getattr(found.discretization, quantity).value,
            rtol=1e-5, atol=1e-8,
        )  # fmt: skip


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_solvers_own_path_leaves_nothing_to_the_network(separable, solver):
    grid = RANGE.grid(8)

    def walked(x, sigma, label=None):
        rest = grid[int((grid - sigma[0]).abs().argmin()) :]
        return solve(separable.denoiser, x, rest, solver=solver)

    found = measure(walked, separable, solver=solver)
    assert float(found.network.rms.value.max()) < 1e-12
    torch.testing.assert_close(found.total.rms.value, found.discretization.rms.value)


@pytest.mark.parametrize(("length", "off"), [(0.24, 0.0), (0.26, 1.0)])
def test_lengths_are_in_units_of_the_datas_standard_deviation(length, off):
    world = Gaussian.isotropic([3.0, -1.0], 0.2)
    found = measure(lengthened(world, lambda z: torch.full_like(z, length)), world)
    assert found.total.median.value.tolist() == pytest.approx([length] * 7)
    assert found.total.rms.value.tolist() == pytest.approx([length] * 7)
    assert found.total.off.value.tolist() == [off] * 7


def test_intervals_are_as_wide_as_theory_says():
    """Lengths uniform on [0, 1]: the standard errors of all three statistics are known."""
    world, n = Gaussian.isotropic([0.0], 0.5), 20_000
    found = measure(lengthened(world, torch.special.ndtr), world, n=n)
    standard_errors = {"median": 0.5, "rms": (4 / 45) ** 0.5 / (2 / 3**0.5), "off": 0.1875**0.5}
    for quantity, expected in zip(QUANTITIES, (0.5, 3**-0.5, 0.75), strict=True):
        value, low, high = getattr(found.total, quantity)
        error = standard_errors[quantity] / n**0.5
        assert value.tolist() == pytest.approx([expected] * 7, abs=4 * error)
        assert (high - low).tolist() == pytest.approx([2 * 1.96 * error] * 7, rel=0.3)
        assert bool(((low <= value) & (value <= high)).all())


def test_intervals_are_those_of_95_percent_and_not_of_90():
    """Those of 90% would be narrower by a sixth; the mean of three widths tells."""
    world, n = Gaussian.isotropic([0.0], 0.5), 20_000
    found = measure(lengthened(world, torch.special.ndtr), world, levels=2, n=n).total
    expected = {"median": 0.5, "rms": (4 / 45) ** 0.5 / (2 / 3**0.5), "off": 0.1875**0.5}
    widths = [
        float(getattr(found, quantity).high - getattr(found, quantity).low) * n**0.5 / error
        for quantity, error in expected.items()
    ]
    assert sum(widths) / 3 == pytest.approx(2 * 1.96, rel=0.08)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_discretization_is_the_solvers_error_of_the_paths_own_factor(solver, order):
    """On a Gaussian each step multiplies x - m by a known factor."""
    world = Gaussian.isotropic([0.3], 0.5)
    sigmas = RANGE.grid(8)
    factor, factors = 1.0, []
    for i in reversed(range(7)):
        s, t = float(sigmas[i]), float(sigmas[i + 1])
        slope, slope_next = s / (0.25 + s * s), t / (0.25 + t * t)
        step = 1 + (t - s) * slope
        factor *= step if order == 1 else 1 + (t - s) * (slope + slope_next * step) / 2
        spread, end = (0.25 + s * s) ** 0.5, (0.25 + RANGE.sigma_min**2) ** 0.5
        factors.insert(0, abs(factor * spread - end) / 0.5)  # times a standard normal
    found = measure(world.consistency, world, solver=solver, n=40_000)
    assert found.discretization.rms.value.tolist() == pytest.approx(factors, rel=0.02)


def test_halving_the_steps_of_heun_quarters_the_discretization():
    world = Gaussian.isotropic([0.3, 0.0], 0.5)
    coarse, fine = (
        measure(world.consistency, world, levels=n).discretization.rms.value[0] for n in (33, 65)
    )
    assert float(coarse / fine) == pytest.approx(4, rel=0.1)


def test_the_floor_of_eight_gaussians_is_that_of_eighteen_levels():
    world = WORLDS["ring"]()
    found = measure(world.denoiser, world, levels=18, n=1000)
    assert float(found.discretization.rms.value[0]) == pytest.approx(0.029, abs=0.001)
    assert found.sigmas.tolist() == RANGE.grid(18)[:-1].tolist()


def test_a_long_grid_is_looked_at_from_seventeen_of_its_levels(gaussian):
    found = measure(gaussian.consistency, gaussian, levels=160, n=50)
    grid = RANGE.grid(160)
    assert len(found.sigmas) == 17
    assert set(found.sigmas.tolist()) <= set(grid.tolist())
    assert (found.sigmas[0], found.sigmas[-1]) == (grid[0], grid[-2])
    assert float(found.total.rms.value.max()) < 1e-9


def test_a_model_that_knows_classes_is_told_them(separable):
    told = measure(separable.consistency, separable, labelled=True, n=100)
    untold = measure(separable.consistency, separable, labelled=False, n=100)
    assert max(float(f.total.rms.value.max()) for f in (told, untold)) < 1e-7

    def deaf(x, sigma, label):
        return separable.consistency(x, sigma)

    assert float(measure(deaf, separable, labelled=True, n=100).total.off.value[0]) > 0.2


def test_the_same_generator_gives_the_same_answer(separable):
    first, second = (measure(separable.denoiser, separable) for _ in range(2))
    assert torch.equal(first.total.rms.high, second.total.rms.high)


def test_a_model_in_float32_is_measured(gaussian):
    def coarse(x, sigma, label=None):
        return gaussian.consistency(x.float(), sigma.float())

    assert float(measure(coarse, gaussian).total.rms.value.max()) < 1e-4


def test_the_answer_prints_as_a_table_for_the_noisiest_level(gaussian):
    shown = str(measure(gaussian.consistency, gaussian, levels=18)).splitlines()
    assert shown[0].split() == ["at", "sigma", "80", "median", "rms", "off"]
    assert shown[3].split() == ["total", "0.0%", "0.0%", "0.0%"]


def test_the_table_shows_the_percentages_of_the_noisiest_level(separable):
    found = measure(separable.denoiser, separable)
    for row in str(found).splitlines()[1:]:
        name, *shown = row.split()
        values = [float(getattr(getattr(found, name), q).value[0]) for q in QUANTITIES]
        assert values[0] > 1e-3
        assert shown == [f"{100 * value:.1f}%" for value in values]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"levels": 1}, "at least 2 levels"),
        ({"n": 1}, "at least 2 paths"),
    ],
)
def test_impossible_measurements_are_refused(gaussian, knobs, message):
    with pytest.raises(ValueError, match=message):
        measure(gaussian.consistency, gaussian, **knobs)


# ── labels, and answers that cannot be compared ──


def test_every_point_keeps_its_label_on_the_whole_walk():
    """By a reference that walks one point at a time, from each of four levels."""
    world, levels, n = WORLDS["moons"](), 5, 12
    grid = RANGE.grid(levels)
    found = measure(
        world.consistency, world, levels=levels, n=n, labelled=True, solver="euler"
    ).discretization.rms.value
    points, label = world.sample(n, float(grid[0]), generator=seeded(0))
    assert len(label.unique()) > 1
    for i in range(levels - 1):
        here = grid[i].expand(n)
        x = world.flow_map(points, grid[0].expand(n), here, label) if i else points
        ends = torch.cat([
            solve(world.denoiser, x[k : k + 1], grid[i:], label[k : k + 1], solver="euler")
            for k in range(n)
        ])  # fmt: skip
        far = (ends - world.consistency(x, here, label)).norm(dim=1) / world.std
        assert float(found[i]) == pytest.approx(float(far.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x, s, label=None: x * torch.nan, "100.0% of the model's answers are NaN"),
        (lambda x, s, label=None: x[:, :1], r"answers \(500, 2\) points with shape \(500, 1\)"),
    ],
)
def test_answers_that_cannot_be_compared_are_refused(separable, answer, words):
    with pytest.raises(ValueError, match=words):
        measure(answer, separable)


def test_a_single_point_is_no_world_to_measure_in():
    world = Dataset(torch.zeros(1, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="is no unit of distance"):
        measure(world.consistency, world)
