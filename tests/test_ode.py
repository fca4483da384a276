"""The probability-flow ODE against exact paths."""

import pytest
import torch

from cmbook.noise import NoiseRange, normal, seeded
from cmbook.ode import Counted, euler_step, heun_step, solve, trace, velocity, walk
from cmbook.oracle import Gaussian

LINE = Gaussian.isotropic([0.3], 0.5)
START = torch.tensor([[60.0]], dtype=torch.float64)


def error(intervals: int, solver: str) -> float:
    end = solve(LINE.denoiser, START, NoiseRange().grid(intervals + 1), solver=solver)
    exact = LINE.consistency(START, torch.tensor([80.0], dtype=torch.float64))
    return float((end - exact).abs())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1.0), ("heun", 2.0)])
def test_solvers_converge_with_their_order(solver, order):
    intervals = torch.tensor([64, 96, 128, 192, 256, 384, 512], dtype=torch.float64)
    errors = torch.tensor([error(int(n), solver) for n in intervals], dtype=torch.float64)
    x, y = intervals.log(), errors.log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert -float(slope) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(
    ("intervals", "euler", "heun"),
    [(17, 5.74e-2, 2.06e-2), (34, 2.99e-2, 4.84e-3), (136, 7.716e-3, 2.886e-4)],
)
def test_errors_are_those_of_the_table(intervals, euler, heun):
    assert error(intervals, "euler") == pytest.approx(euler, rel=5e-3)
    assert error(intervals, "heun") == pytest.approx(heun, rel=5e-3)


def test_euler_on_a_gaussian_gives_the_known_number():
    end = solve(LINE.denoiser, START, NoiseRange().grid(18), solver="euler")
    assert float(end) == pytest.approx(0.615692260415, abs=1e-11)


def test_velocity_is_minus_sigma_times_score(gaussian, generator):
    sigma = torch.tensor([0.01, 0.5, 20.0], dtype=torch.float64)
    x = normal(torch.empty(3, 2, dtype=torch.float64), generator)
    slope = velocity(x, gaussian.denoiser(x, sigma), sigma)
    torch.testing.assert_close(slope, -sigma[:, None] * gaussian.score(x, sigma))


def test_the_exact_flow_map_has_the_velocity_as_its_derivative(gaussian, generator):
    x = normal(torch.empty(4, 2, dtype=torch.float64), generator)
    sigma = torch.tensor([0.1, 0.5, 3.0, 40.0], dtype=torch.float64)
    moved = [gaussian.flow_map(x, sigma, sigma * (1 + h)) for h in (1e-6, -1e-6)]
    slope = (moved[0] - moved[1]) / (2e-6 * sigma[:, None])
    expected = velocity(x, gaussian.denoiser(x, sigma), sigma)
    torch.testing.assert_close(slope, expected, rtol=1e-8, atol=1e-8)


def test_heun_falls_back_to_euler_where_sigma_reaches_zero(gaussian, generator):
    x = normal(torch.empty(2, 2, dtype=torch.float64), generator)
    sigma = torch.tensor([0.5, 0.5], dtype=torch.float64)
    sigma_next = torch.tensor([0.0, 0.2], dtype=torch.float64)
    heun = heun_step(gaussian.denoiser, x, sigma, sigma_next)
    euler = euler_step(gaussian.denoiser, x, sigma, sigma_next)
    assert torch.equal(heun[0], euler[0])
    assert not torch.allclose(heun[1], euler[1])


def test_a_heun_step_to_zero_asks_nothing_there_and_has_a_finite_slope(gaussian, spy):
    """At 0 the velocity is 0/0: masked in the result, it would come back in the gradient."""
    model, x = spy(gaussian.denoiser), torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([0.5, 0.5], dtype=torch.float64)
    sigma_next = torch.tensor([0.0, 0.2], dtype=torch.float64)
    heun_step(model, x, sigma, sigma_next).sum().backward()
    assert bool((torch.cat(model.sigmas) > 0).all())
    assert bool(x.grad.isfinite().all())


def test_trace_holds_every_point_of_solve(gaussian, generator):
    x = 80 * normal(torch.empty(3, 2), generator)
    sigmas = NoiseRange().grid(7)
    points = trace(gaussian.denoiser, x, sigmas)
    assert points.shape == (7, 3, 2)
    assert torch.equal(points[0], x)
    for n in range(2, 8):
        assert torch.equal(points[n - 1], solve(gaussian.denoiser, x, sigmas[:n]))


@pytest.mark.parametrize(
    ("solver", "to_zero", "nfe"),
    [("heun", True, 35), ("heun", False, 34), ("euler", True, 18), ("euler", False, 17)],
)
def test_evaluations_are_counted(gaussian, solver, to_zero, nfe):
    grid = NoiseRange().grid(18)
    sigmas = torch.cat([grid, torch.zeros(1, dtype=torch.float64)]) if to_zero else grid
    counted = Counted(gaussian.denoiser)
    solve(counted, torch.ones(2, 2), sigmas, solver=solver)
    assert counted.nfe == nfe


def test_float32_samples_stay_float32_on_a_float64_grid(gaussian):
    assert solve(gaussian.denoiser, torch.ones(1, 2), NoiseRange().grid(4)).dtype == torch.float32


@pytest.mark.parity
@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_walks_equal_the_official_samplers(golden, solver):
    stored = golden("samplers_tanh")

    def denoise(x, sigma, label=None):
        return torch.tanh(x / (sigma[:, None, None, None] ** 2 + 0.25).sqrt())

    out = solve(denoise, stored["x_T"], stored["sigmas"], solver=solver)
    torch.testing.assert_close(out, stored[f"{solver}/out"], rtol=1e-4, atol=1e-5)


def test_levels_that_rise_are_refused(gaussian):
    with pytest.raises(ValueError, match=r"Did you mean sigmas.flip\(0\)"):
        solve(gaussian.denoiser, torch.ones(1, 2), torch.tensor([0.1, 1.0]))


def test_an_unknown_solver_is_refused(gaussian):
    with pytest.raises((ValueError, Exception), match="solver"):
        list(walk(gaussian.denoiser, torch.ones(1, 2), torch.tensor([1.0, 0.1]), solver="midpoint"))


def test_a_walk_up_and_down_returns(gaussian):
    x = gaussian.sample(5, 1.0, generator=seeded(1)).x
    ones = torch.ones(5, dtype=torch.float64)
    there = gaussian.flow_map(x, ones, 30 * ones)
    torch.testing.assert_close(gaussian.flow_map(there, 30 * ones, ones), x)


HALF = torch.tensor([0.5, 0.5])


@pytest.mark.parametrize(
    ("walked", "evaluations"),
    [
        (lambda model, x, label: euler_step(model, x, 2 * HALF, HALF, label), 1),
        (lambda model, x, label: heun_step(model, x, 2 * HALF, HALF, label), 2),
        (lambda model, x, label: heun_step(model, x, HALF, 0 * HALF, label), 2),
        (lambda model, x, label: solve(model, x, NoiseRange().grid(4), label, solver="euler"), 3),
        (lambda model, x, label: solve(model, x, NoiseRange().grid(4), label, solver="heun"), 6),
        (lambda model, x, label: trace(model, x, NoiseRange().grid(4), label), 6),
    ],
    ids=["euler step", "heun step", "heun step to 0", "euler", "heun", "trace"],
)
def test_every_evaluation_is_told_the_class(gaussian, spy, walked, evaluations):
    model, label = spy(gaussian.denoiser), torch.tensor([2, 0])
    walked(model, torch.ones(2, 2), label)
    assert len(model.labels) == evaluations
    assert all(told is label for told in model.labels)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(
    ("samples", "told"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_levels_come_in_the_dtype_of_the_samples_but_never_below_float32(
    gaussian, spy, solver, samples, told
):
    model = spy(gaussian.denoiser)
    end = solve(model, torch.ones(1, 2, dtype=samples), NoiseRange().grid(4), solver=solver)
    assert {sigma.dtype for sigma in model.sigmas} == {told}
    assert end.dtype == samples
