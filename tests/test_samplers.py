"""Samplers with exact models keep the exact law; with stored draws they equal the official ones."""

import pytest
import torch
from scipy import stats

from cmbook.noise import NoiseRange, PerImage, Replay, normal, seeded
from cmbook.ode import Counted
from cmbook.oracle import Gaussian
from cmbook.samplers import multistep, ode_sample, one_step, prior

RANGE = NoiseRange()
POINTS = 200_000


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


@pytest.mark.parity
@pytest.mark.parametrize("indices", [(0, 3, 6), (0, 6), (0, 1, 2, 3, 4, 5, 6)])
def test_multistep_equals_the_official_sampler(golden, indices):
    """Its last index is sigma_min, where it draws noise and multiplies it by 0."""
    stored = golden("samplers_tanh")
    case = f"multistep_{'_'.join(map(str, indices))}"

    def denoise(x, sigma, label=None):
        return torch.tanh(x / (sigma[:, None, None, None] ** 2 + 0.25).sqrt())

    out = multistep(
        denoise,
        stored["x_T"],
        stored["sigmas"][list(indices[:-1])],
        noise_range=RANGE,
        generator=Replay(normals=list(stored[f"{case}/noise"])[:-1]),
    )
    torch.testing.assert_close(out, stored[f"{case}/out"], rtol=1e-4, atol=1e-5)


@pytest.mark.parity
def test_one_step_equals_the_official_sampler(golden):
    stored = golden("samplers_tanh")

    def denoise(x, sigma, label=None):
        return torch.tanh(x / (sigma[:, None, None, None] ** 2 + 0.25).sqrt())

    out = one_step(denoise, stored["x_T"], RANGE)
    torch.testing.assert_close(out, stored["onestep/out"], rtol=1e-4, atol=1e-5)


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


def test_samplers_build_no_graph(generator):
    weight = torch.ones(1, requires_grad=True)

    def model(x, sigma, label=None):
        return x * weight

    x = normal(torch.empty(2, 2), generator)
    assert not one_step(model, x, RANGE).requires_grad
    assert not ode_sample(model, x, RANGE, levels=3).requires_grad


SAMPLERS = {
    "one step": lambda model, x, label: one_step(model, x, RANGE, label),
    "multistep": lambda model, x, label: multistep(
        model, x, torch.tensor([80.0, 10.0, 1.0]), label, noise_range=RANGE, generator=seeded(0)
    ),
    "heun": lambda model, x, label: ode_sample(model, x, RANGE, label, levels=3),
    "euler": lambda model, x, label: ode_sample(model, x, RANGE, label, levels=3, solver="euler"),
}


@pytest.mark.parametrize(
    ("name", "evaluations"), [("one step", 1), ("multistep", 3), ("heun", 5), ("euler", 3)]
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
