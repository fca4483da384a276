"""Samplers with exact models keep the exact law; with stored draws they equal the official ones."""

import math

import pytest
import torch
from scipy import stats

from cmbook.noise import NoiseRange, PerImage, Replay, normal, seeded
from cmbook.ode import Counted
from cmbook.oracle import Gaussian, GaussianMixture
from cmbook.samplers import (
    Churn,
    ancestral,
    dpm,
    greedy_levels,
    grid_to_zero,
    invert,
    midpoint_step,
    multistep,
    ode_sample,
    one_step,
    prior,
    progressive,
)

RANGE = NoiseRange()
POINTS = 200_000
LINE = Gaussian.isotropic([0.3], 0.5)
ROUND = Gaussian.isotropic([0.0], 0.5)


def order(sizes: list[int], errors: list[float]) -> float:
    """Minus the slope of the errors over the sizes, both in logarithms."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (sizes, errors))
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def std_of_result(sampler, levels: int) -> float:
    """Of N(0, 0.5²) started from its own law, exactly: no sample is drawn.

    With a linear denoiser the result is linear in the start and in every draw. Row i of the batch
    is given one of them and 0 for the others, and the squares of the results add.
    """
    one_of = torch.eye(levels + 1, dtype=torch.float64)
    start = math.sqrt(0.5**2 + 80**2) * one_of[:, :1]
    draws = Replay(normals=[one_of[:, i : i + 1] for i in range(1, levels + 1)])
    sigmas = grid_to_zero(NoiseRange(sigma_min=1e-4), levels)  # so the step to 0 costs nothing
    return float(sampler(ROUND.denoiser, start, sigmas, generator=draws).norm())


def projected(world: Gaussian, x: torch.Tensor, direction: list[float], sigma: float):
    """Standardized coordinates of x along a direction: standard normal if x has the world's law."""
    along = torch.tensor(direction, dtype=torch.float64)
    along = along / along.norm()
    variance = along @ world.covariance @ along + sigma**2
    return ((x - world.mean) @ along / variance.sqrt()).numpy()


@pytest.mark.parametrize("direction", [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
@pytest.mark.parametrize(
    "sigmas", [[80.0], [80.0, 1.4], [80.0, 10.0, 1.4, 0.3], [80.0, 0.002], [0.5, 0.1]]
)
def test_multistep_with_the_exact_function_keeps_the_law(gaussian, sigmas, direction):
    """Kolmogorov-Smirnov along four projections, 200,000 points, p > 1e-3."""
    start = gaussian.sample(POINTS, sigmas[0], generator=seeded(1)).x
    x0 = multistep(
        gaussian.consistency, start, torch.tensor(sigmas), noise_range=RANGE, generator=seeded(2)
    )
    values = projected(gaussian, x0, direction, RANGE.sigma_min)
    assert stats.kstest(values, "norm").pvalue > 1e-3


def test_adding_the_full_noise_would_not_keep_the_law():
    """The variance is τ² - ε², not τ²: with a large ε the difference is plain to see."""
    wide = NoiseRange(sigma_min=0.4, sigma_max=2.0)
    world = Gaussian.isotropic([0.0], 0.5)

    def consistency(x, sigma, label=None):
        return world.consistency(x, sigma, label, sigma_end=0.4)

    start = world.sample(POINTS, 2.0, generator=seeded(1)).x
    for sigma_min, keeps in ((0.4, True), (1e-6, False)):
        x0 = multistep(
            consistency, start, torch.tensor([2.0, 0.5]),
            noise_range=NoiseRange(sigma_min, 2.0), generator=seeded(2),
        )  # fmt: skip
        p = stats.kstest(projected(world, x0, [1.0], wide.sigma_min), "norm").pvalue
        assert bool(p > 1e-3) is keeps


def test_one_step_is_multistep_with_one_level(gaussian, generator):
    x = prior(torch.empty(5, 2, dtype=torch.float64), RANGE, generator)
    several = multistep(
        gaussian.consistency, x, torch.tensor([80.0]), noise_range=RANGE, generator=Replay()
    )
    assert torch.equal(one_step(gaussian.consistency, x, RANGE), several)


def test_the_walk_reaches_the_law_of_the_data(gaussian):
    x = gaussian.sample(50_000, 80.0, generator=seeded(0)).x
    x0 = ode_sample(gaussian.denoiser, x, RANGE, levels=64)
    assert stats.kstest(projected(gaussian, x0, [1.0, 1.0], 0.0), "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    ("solver", "levels", "nfe"), [("heun", 18, 35), ("heun", 40, 79), ("euler", 18, 18)]
)
def test_walks_take_the_published_number_of_evaluations(gaussian, solver, levels, nfe):
    counted = Counted(gaussian.denoiser)
    ode_sample(counted, torch.ones(1, 2), RANGE, levels=levels, solver=solver)
    assert counted.nfe == nfe


@pytest.mark.parametrize("n", [1, 2, 5])
def test_multistep_takes_one_evaluation_a_level(gaussian, generator, n):
    counted = Counted(gaussian.consistency)
    multistep(counted, torch.ones(1, 2), RANGE.grid(8)[:n], noise_range=RANGE, generator=generator)
    assert counted.nfe == n


@pytest.mark.parametrize("intervals", [17, 34])
def test_progressive_is_eulers_walk_that_ends_at_sigma_min(intervals):
    """On a Gaussian the walk multiplies by (s² + σσ′)/(s² + σ²) at every step."""
    x = torch.tensor([[60.0]], dtype=torch.float64)
    grid = RANGE.grid(intervals + 1)
    factors = (0.25 + grid[:-1] * grid[1:]) / (0.25 + grid[:-1] ** 2)
    end = progressive(LINE.denoiser, x, RANGE, steps=intervals)
    torch.testing.assert_close(end, 0.3 + factors.prod() * (x - 0.3), rtol=1e-12, atol=0)


def test_dpm_converges_with_order_two():
    intervals, errors = [64, 96, 128, 192, 256], []
    x = torch.tensor([[60.0]], dtype=torch.float64)
    exact = LINE.consistency(x, torch.tensor([80.0], dtype=torch.float64))
    for n in intervals:
        errors.append(float((dpm(LINE.denoiser, x, RANGE.grid(n + 1)) - exact).abs()))
    assert order(intervals, errors) == pytest.approx(2, abs=0.1)


def test_a_midpoint_step_to_zero_looks_at_an_eighth_of_sigma(gaussian, spy):
    model, sigma = spy(gaussian.denoiser), torch.tensor([4.0], dtype=torch.float64)
    midpoint_step(model, torch.ones(1, 2, dtype=torch.float64), sigma, 0 * sigma)
    torch.testing.assert_close(torch.cat(model.sigmas), sigma * torch.tensor([1.0, 0.125]))


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [(ancestral, 1), (Churn(5.0), 2), (Churn(5.0, solver="dpm"), 2)],
    ids=["ancestral", "heun", "dpm"],
)
def test_walks_with_noise_reach_the_law_with_their_order(sampler, expected):
    levels = [128, 192, 256, 384]
    errors = [abs(std_of_result(sampler, n) - 0.5) for n in levels]
    assert order(levels, errors) == pytest.approx(expected, abs=0.1)


def test_churn_with_larger_noise_reaches_another_law():
    errors = [abs(std_of_result(Churn(5.0, noise_scale=1.05), n) - 0.5) for n in (128, 384)]
    assert errors[1] > 3e-3
    assert errors[1] == pytest.approx(errors[0], rel=0.3)


@pytest.mark.parametrize("levels", [2, 3, 7])
def test_ancestral_steps_are_exact_in_any_number_where_the_data_are_one_point(levels):
    """Each x′ is drawn from its exact law given x and x0: N(x0, σ′²) again."""
    world = Gaussian.isotropic([0.3], 0.0)
    x = world.sample(POINTS, 80.0, generator=seeded(1)).x
    sigmas = RANGE.grid(8)[:levels]
    x = ancestral(world.denoiser, x, sigmas, generator=seeded(2))
    values = projected(world, x, [1.0], float(sigmas[-1]))
    assert stats.kstest(values, "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    ("sampler", "levels"),
    [(ancestral, 400), (Churn(40.0), 64), (Churn(40.0, solver="dpm"), 64)],
    ids=["ancestral", "heun", "dpm"],
)
def test_walks_with_noise_reach_the_law_of_a_mixture(separable, sampler, levels):
    """Kolmogorov-Smirnov along both axes, 5,000 points, p > 1e-3."""
    x = separable.sample(5_000, 80.0, generator=seeded(1)).x
    x0 = sampler(separable.denoiser, x, grid_to_zero(RANGE, levels), generator=seeded(2))

    def cdf(values):
        parts = zip([0.3, 0.5, 0.2], [-0.5, 0.4, 0.9], [0.15, 0.1, 0.2], strict=True)
        return sum(weight * stats.norm.cdf(values, mean, std) for weight, mean, std in parts)

    assert stats.kstest(x0[:, 0].numpy(), cdf).pvalue > 1e-3
    assert stats.kstest(x0[:, 1].numpy(), "norm", args=(0.1, 0.2)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("sampler", "nfe"),
    [
        (lambda model, x: ancestral(model, x, grid_to_zero(RANGE, 18), generator=seeded(0)), 18),
        (lambda model, x: dpm(model, x, grid_to_zero(RANGE, 18)), 36),
        (lambda model, x: Churn()(model, x, grid_to_zero(RANGE, 18), generator=seeded(0)), 35),
        (lambda model, x: Churn()(model, x, grid_to_zero(RANGE, 256), generator=seeded(0)), 511),
        (lambda model, x: progressive(model, x, RANGE, steps=4), 4),
    ],
    ids=["ancestral", "dpm", "churn", "churn as published", "progressive"],
)
def test_evaluations_of_the_other_walks_are_counted(gaussian, sampler, nfe):
    counted = Counted(gaussian.denoiser)
    sampler(counted, torch.ones(1, 2))
    assert counted.nfe == nfe


def test_churn_of_zero_is_the_plain_walk_and_draws_nothing(gaussian):
    x = gaussian.sample(3, 80.0, generator=seeded(0)).x
    sigmas = grid_to_zero(RANGE, 9)
    still = Churn(0.0)(gaussian.denoiser, x, sigmas, generator=Replay())
    assert torch.equal(still, ode_sample(gaussian.denoiser, x, RANGE, levels=9))
    still = Churn(0.0, solver="dpm")(gaussian.denoiser, x, sigmas, generator=Replay())
    assert torch.equal(still, dpm(gaussian.denoiser, x, sigmas))


@pytest.mark.parametrize(("low", "high", "churned"), [(0.5, 20.0, [9, 3, 1]), (3.0, 3.0, [3])])
def test_churn_adds_noise_within_its_window_alone(gaussian, spy, low, high, churned):
    """γ = 1.2/6 for six steps: a level σ of the window is evaluated at 1.2 σ."""
    model, draws = spy(gaussian.denoiser), Replay(normals=[torch.ones(1, 2)] * len(churned))
    sigmas = torch.tensor([81.0, 27, 9, 3, 1, 0.3, 0])
    Churn(1.2, low, high)(model, torch.ones(1, 2), sigmas, generator=draws)
    raised = [round(1.2 * sigma, 4) for sigma in churned]
    told = [round(float(sigma), 4) for sigma in model.sigmas]
    assert [level for level in told if level in raised] == raised
    assert draws.queues["normal"] == []


# ── the official samplers, with their draws ──


DENOISERS = {
    "tanh": lambda x, sigma, label=None: torch.tanh(
        x / (sigma[:, None, None, None] ** 2 + 0.25).sqrt()
    ),
    "gauss": lambda x, sigma, label=None: (
        0.1 + (x - 0.1) * 0.25 / (0.25 + sigma[:, None, None, None] ** 2)
    ),
}
SEVEN = grid_to_zero(RANGE, 7)


def official(golden, name: str, case: str, used=slice(None)):
    """The start, the recorded draws that are not multiplied by 0, and the stored result."""
    stored = golden(f"samplers_{name}")
    draws = stored[f"{case}/noise"][used] if f"{case}/noise" in stored else []
    return stored["x_T"], Replay(normals=list(draws)), stored[f"{case}/out"]


@pytest.mark.parity
@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("indices", [(0, 3, 6), (0, 6), (0, 1, 2, 3, 4, 5, 6)])
def test_multistep_equals_the_official_sampler(golden, name, indices):
    """Its last index is sigma_min, where it draws noise and multiplies it by 0."""
    case = f"multistep_{'_'.join(map(str, indices))}"
    x, draws, out = official(golden, name, case, slice(len(indices) - 2))
    sigmas = SEVEN[list(indices[:-1])]
    ours = multistep(DENOISERS[name], x, sigmas, noise_range=RANGE, generator=draws)
    torch.testing.assert_close(ours, out, rtol=1e-4, atol=2e-5)
    assert draws.queues["normal"] == []


@pytest.mark.parity
@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize(
    ("case", "sampler"),
    [
        ("onestep", lambda denoise, x: one_step(denoise, x, RANGE)),
        ("heun", lambda denoise, x: ode_sample(denoise, x, RANGE, levels=7)),
        ("euler", lambda denoise, x: ode_sample(denoise, x, RANGE, levels=7, solver="euler")),
        ("dpm", lambda denoise, x: dpm(denoise, x, SEVEN)),
        ("progdist", lambda denoise, x: progressive(denoise, x, RANGE, steps=6)),
    ],
)
def test_walks_without_noise_equal_the_official_samplers(golden, name, case, sampler):
    """`denoised_last` is D at the last level of the grid; the midpoint rule looks once more."""
    x, _, out = official(golden, name, case)
    answers = []

    def denoise(x, sigma, label=None):
        answers.append(DENOISERS[name](x, sigma))
        return answers[-1]

    torch.testing.assert_close(sampler(denoise, x), out, rtol=1e-4, atol=2e-5)
    if case != "onestep":
        last = golden(f"samplers_{name}")[f"{case}/denoised_last"]
        ours = answers[-2 if case == "dpm" else -1]
        torch.testing.assert_close(ours, last, rtol=1e-4, atol=2e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", DENOISERS)
def test_ancestral_equals_the_official_sampler(golden, name):
    """It draws noise for the last step too, to 0, and multiplies it by 0."""
    x, draws, out = official(golden, name, "ancestral", slice(6))
    ours = ancestral(DENOISERS[name], x, SEVEN, generator=draws)
    torch.testing.assert_close(ours, out, rtol=1e-4, atol=2e-5)
    assert draws.queues["normal"] == []


@pytest.mark.parity
@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("solver", ["heun", "dpm"])
@pytest.mark.parametrize(
    ("case", "settings", "used"),
    [("churn", (2.1, 0.05, 50.0, 1.003), slice(1, 6)), ("churn_all", (40.0,), slice(None))],
)
def test_churn_equals_the_official_samplers(golden, name, solver, case, settings, used):
    """It draws noise for every step, and multiplies it by 0 outside of the window.

    With D = tanh a path that runs close to 0 is torn to one side or the other, and the noise
    decides late. There one rounding in float32 moves the result by more than 1e-6, so that the
    stored result itself is not that of exact arithmetic. Those pixels, at most 1 in 100, are left
    out; the others agree to the stated tolerance.
    """
    x, draws, out = official(golden, name, f"{solver}_{case}", used)
    sampler, noises = Churn(*settings, solver=solver), list(draws.queues["normal"])
    ours = sampler(DENOISERS[name], x, SEVEN, generator=draws)
    assert draws.queues["normal"] == []

    def rounded(by: float) -> torch.Tensor:
        again = Replay(normals=[by * noise.double() for noise in noises])
        return sampler(DENOISERS[name], by * x.double(), SEVEN, generator=again)

    steady = (rounded(1 + 1e-7) - rounded(1.0)).abs() < 1e-6
    assert float(steady.double().mean()) > 0.99
    torch.testing.assert_close(ours[steady], out[steady], rtol=1e-4, atol=2e-5)


@pytest.mark.parity
@pytest.mark.parametrize("i", range(7))
def test_ancestral_levels_equal_the_official_ones(golden, i):
    """Where D = 0, a start at σ without noise ends at σ_down, and noise alone at σ_up."""

    def nothing(x, sigma, label=None):
        return torch.zeros_like(x)

    start = SEVEN[i] * torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    draws = Replay(normals=[torch.tensor([[0.0], [1.0]], dtype=torch.float64)])
    down_up = ancestral(nothing, start, SEVEN[i : i + 2], generator=draws)[:, 0]
    expected = golden("sigmas")["ancestral/down_up"][i]
    torch.testing.assert_close(down_up, expected, rtol=2e-5, atol=1e-6)


def test_an_edit_is_applied_after_every_evaluation(gaussian, generator):
    seen = []

    def edit(x0):
        seen.append(x0)
        return torch.zeros_like(x0)

    x0 = multistep(
        gaussian.consistency, torch.ones(1, 2), RANGE.grid(4)[:3],
        noise_range=RANGE, generator=generator, edit=edit,
    )  # fmt: skip
    assert len(seen) == 3
    assert float(x0.abs().max()) == 0


def test_an_image_does_not_depend_on_its_batch(gaussian):
    like = torch.empty(4, 2, dtype=torch.float64)

    def draw(seeds, n):
        draws = PerImage(seeds)
        x = prior(like[:n], RANGE, draws)
        sigmas = torch.tensor([80.0, 1.0])
        return multistep(gaussian.consistency, x, sigmas, noise_range=RANGE, generator=draws)

    together = draw(range(4), 4)
    torch.testing.assert_close(together[2:3], draw([2], 1), rtol=1e-12, atol=1e-12)


def test_levels_that_rise_are_refused(gaussian, generator):
    with pytest.raises(ValueError, match="sigmas must decrease"):
        multistep(
            gaussian.consistency, torch.ones(1, 2), torch.tensor([1.0, 80.0]),
            noise_range=RANGE, generator=generator,
        )  # fmt: skip


@pytest.mark.parametrize(
    "sampler",
    [ancestral, Churn(), lambda *a, generator: dpm(*a)],
    ids=["ancestral", "churn", "dpm"],
)
def test_levels_that_rise_are_refused_by_every_walk(gaussian, generator, sampler):
    with pytest.raises(ValueError, match=r"Did you mean sigmas.flip\(0\)"):
        sampler(gaussian.denoiser, torch.ones(1, 2), torch.tensor([1.0, 80.0]), generator=generator)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amount": -1.0}, "amount must be at least 0"),
        ({"amount": math.inf}, "amount must be at least 0"),
        ({"sigma_low": -0.1}, "expected 0 <= sigma_low <= sigma_high"),
        ({"sigma_low": 2.0, "sigma_high": 1.0}, "expected 0 <= sigma_low <= sigma_high"),
        ({"noise_scale": -1.0}, "noise_scale must be at least 0"),
        ({"noise_scale": math.nan}, "noise_scale must be at least 0"),
    ],
)
def test_impossible_churn_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Churn(**settings)


def test_churn_with_another_solver_is_refused():
    with pytest.raises((ValueError, Exception), match="solver"):
        Churn(solver="euler")


@pytest.mark.parametrize("sampler", [ancestral, Churn()], ids=["ancestral", "churn"])
def test_a_single_level_is_where_one_stands(gaussian, sampler):
    x = torch.ones(2, 2)
    assert torch.equal(sampler(gaussian.denoiser, x, torch.ones(1), generator=Replay()), x)


def test_samplers_build_no_graph(generator):
    weight = torch.ones(1, requires_grad=True)

    def model(x, sigma, label=None):
        return x * weight

    x = normal(torch.empty(2, 2), generator)
    for sampler in SAMPLERS.values():
        assert not sampler(model, x, None).requires_grad


THREE = grid_to_zero(RANGE, 3)
SAMPLERS = {
    "one step": lambda model, x, label: one_step(model, x, RANGE, label),
    "multistep": lambda model, x, label: multistep(
        model, x, torch.tensor([80.0, 10.0, 1.0]), label, noise_range=RANGE, generator=seeded(0)
    ),
    "heun": lambda model, x, label: ode_sample(model, x, RANGE, label, levels=3),
    "euler": lambda model, x, label: ode_sample(model, x, RANGE, label, levels=3, solver="euler"),
    "dpm": lambda model, x, label: dpm(model, x, THREE, label),
    "churn": lambda model, x, label: Churn()(model, x, THREE, label, generator=seeded(0)),
    "ancestral": lambda model, x, label: ancestral(model, x, THREE, label, generator=seeded(0)),
    "progressive": lambda model, x, label: progressive(model, x, RANGE, label, steps=3),
}


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [
        *[("one step", 1), ("multistep", 3), ("heun", 5), ("euler", 3)],
        *[("dpm", 6), ("churn", 5), ("ancestral", 3), ("progressive", 3)],
    ],
)
def test_every_evaluation_is_told_the_class(gaussian, spy, name, evaluations):
    model, label = spy(gaussian.denoiser), torch.tensor([2, 0])
    SAMPLERS[name](model, torch.ones(2, 2), label)
    assert len(model.labels) == evaluations
    assert all(told is label for told in model.labels)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("samples", [torch.bfloat16, torch.float32])
def test_levels_are_never_below_float32(gaussian, spy, name, samples):
    model = spy(gaussian.denoiser)
    x0 = SAMPLERS[name](model, torch.ones(2, 2, dtype=samples), torch.tensor([2, 0]))
    assert {sigma.dtype for sigma in model.sigmas} == {torch.float32}
    assert x0.dtype == samples


def test_the_prior_is_noise_of_standard_deviation_sigma_max():
    wide = NoiseRange(sigma_max=20.0)
    x = prior(torch.empty(POINTS, 1), wide, seeded(0))
    assert stats.kstest((x[:, 0] / 20.0).numpy(), "norm").pvalue > 1e-3
    noise = torch.tensor([[1.0, -2.0]])
    assert prior(noise, wide, Replay(normals=[noise])).tolist() == [[20.0, -40.0]]


@pytest.mark.parametrize("sigma", [0.002, 0.001, 0.0])
def test_steps_at_or_below_sigma_min_change_nothing(gaussian, generator, sigma):
    """There is no noise to add, and the exact function is the identity."""
    x = prior(torch.empty(4, 2, dtype=torch.float64), RANGE, generator)
    x0 = multistep(
        gaussian.consistency, x, torch.tensor([80.0, sigma], dtype=torch.float64),
        noise_range=RANGE, generator=generator,
    )  # fmt: skip
    torch.testing.assert_close(x0, one_step(gaussian.consistency, x, RANGE), rtol=0, atol=1e-9)


# ── choosing levels, and going back ──


class Remembers:
    """A model whose answer is the level it was last asked at, so that scores know it."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, sigma, label=None):
        self.calls += 1
        return sigma[:, None].to(x).expand_as(x)


def greedy(score, grid, steps, model=None):
    return greedy_levels(
        model or Remembers(), torch.zeros(2, 1), score, grid, steps=steps, noise_range=RANGE, seed=0
    )


@pytest.mark.parametrize("best", range(1, 39))
def test_a_greedy_search_finds_the_best_level_wherever_it_is(best):
    """With one level to choose, any score that falls and then rises is minimized exactly."""
    grid = RANGE.grid(40)

    def score(samples):
        i = int((grid - float(samples[0, 0])).abs().argmin())
        return abs(i - best) + 0.1 * (i > best)

    assert torch.equal(greedy(score, grid, 2), grid[[0, best]])


def test_a_greedy_search_looks_at_few_levels_and_at_none_twice():
    model, grid, scored = Remembers(), RANGE.grid(40), []

    def score(samples):
        scored.append(float(samples[0, 0]))
        return abs(math.log(scored[-1] / 1.4))

    found = greedy(score, grid, 2, model)
    assert len(scored) == len(set(scored)) < 20
    assert model.calls == 2 * len(scored)
    assert float(found[1]) == pytest.approx(1.3824, abs=1e-3)


def test_all_candidates_of_a_greedy_search_share_their_noise():
    noises = {}

    def model(x, sigma, label=None):
        if float(sigma[0]) < 80:
            scale = float((sigma[0].double() ** 2 - 0.002**2).sqrt())
            noises[float(sigma[0])] = x / scale
        return torch.zeros_like(x)

    greedy(lambda samples: 0.0, RANGE.grid(40), 2, model)
    first, *rest = noises.values()
    assert rest
    assert all(torch.allclose(first, other) for other in rest)


def test_more_levels_lie_one_below_the_other():
    grid = RANGE.grid(12)
    found = greedy(lambda samples: -float(samples[0, 0]), grid, 4)
    assert torch.equal(found, grid[:4])
    assert torch.equal(greedy(lambda samples: float(samples[0, 0]), grid, 11), grid[:11])


@pytest.mark.parametrize("steps", [0, 12])
def test_more_steps_than_levels_are_refused(steps):
    with pytest.raises(ValueError, match="12 levels hold 1 to 11 steps"):
        greedy(lambda samples: 0.0, RANGE.grid(12), steps)


@pytest.mark.parametrize("sigma", [0.5, 80.0])
def test_a_gaussian_is_inverted(sigma):
    world = Gaussian.isotropic([0.3, -0.2], 0.5)
    x = world.sample(20, sigma, generator=seeded(0)).x
    x0 = world.consistency(x, torch.full((20,), sigma, dtype=torch.float64))
    found = invert(world.consistency, x0, sigma, noise_range=RANGE)
    assert float(found.error.max()) < 1e-3
    assert torch.allclose(found.x, x, rtol=1e-2, atol=2e-3 * sigma)


def test_the_error_of_an_inversion_is_that_of_the_round_trip_and_samples_are_on_their_own():
    world = GaussianMixture.isotropic(torch.tensor([[-0.5, 0.0], [0.5, 0.0]]), 0.1)
    x0 = world.sample(8, generator=seeded(0)).x
    found = invert(world.consistency, x0, 2.0, noise_range=RANGE, iterations=20)
    again = world.consistency(found.x, torch.full((8,), 2.0, dtype=torch.float64))
    assert torch.allclose(found.error, (again - x0).square().mean(1).sqrt() / 0.5, rtol=1e-6)
    alone = invert(world.consistency, x0[3:4], 2.0, noise_range=RANGE, iterations=20)
    assert torch.allclose(found.x[3:4], alone.x)


def test_at_the_boundary_there_is_nothing_to_invert():
    with pytest.raises(ValueError, match="sigma must exceed sigma_min"):
        invert(lambda x, s, label=None: x, torch.zeros(1, 2), 0.002, noise_range=RANGE)


def test_the_best_point_met_is_kept_though_the_search_walks_on():
    """With far too large a rate most steps make it worse."""
    world, seen = Gaussian.isotropic([0.3], 0.5), []

    def watched(x, sigma, label=None):
        seen.append(world.consistency(x, sigma))
        return seen[-1]

    x0 = world.sample(8, generator=seeded(0)).x
    found = invert(watched, x0, 2.0, noise_range=RANGE, iterations=30, rate=3.0)
    errors = torch.stack([(y - x0).square().mean(1).sqrt() / 0.5 for y in seen]).detach()
    assert torch.allclose(found.error, errors.amin(0))
    assert float((errors[-1] / errors.amin(0)).max()) > 1.1
    again = world.consistency(found.x, torch.full((8,), 2.0, dtype=torch.float64))
    assert torch.allclose((again - x0).square().mean(1).sqrt() / 0.5, found.error)


def test_every_evaluation_of_a_search_is_told_the_class(spy):
    label, model = torch.tensor([2, 0]), spy(ROUND.consistency)
    greedy_levels(
        model, torch.ones(2, 1), lambda samples: 0.0, RANGE.grid(9), label, steps=3,
        noise_range=RANGE, seed=0,
    )  # fmt: skip
    invert(model, torch.ones(2, 1), 1.0, label, noise_range=RANGE, iterations=2)
    assert len(model.labels) > 4
    assert all(told is label for told in model.labels)


def test_the_second_level_is_sought_anew():
    """A level's score depends on those before it: what was known of the first search is stale."""
    grid, walked = RANGE.grid(40), []

    def model(x, sigma, label=None):
        if float(sigma[0]) > 79:
            walked.clear()
        walked.append(float(sigma[0]))
        return torch.zeros_like(x)

    def score(samples):
        i = int((grid - walked[-1]).abs().argmin())
        return abs(i - (10 if len(walked) == 2 else 25))

    assert torch.equal(greedy(score, grid, 3, model), grid[[0, 10, 25]])


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="is NaN"):
        greedy(lambda samples: math.nan, RANGE.grid(12), 2)


@pytest.mark.parametrize(
    ("knobs", "value", "words"),
    [
        ({"iterations": 0}, 0.0, "expected iterations >= 1"),
        ({"rate": math.nan}, 0.0, "a rate above 0"),
        ({}, math.nan, "only finite samples"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(knobs, value, words):
    with pytest.raises(ValueError, match=words):
        invert(ROUND.consistency, torch.full((2, 1), value), 1.0, noise_range=RANGE, **knobs)
