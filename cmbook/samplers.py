"""Sampling: one evaluation, several (Algorithm 1 of Song et al. 2023), or a walk to the data.

A consistency model jumps: `one_step`, `multistep`. A diffusion model walks, along the ODE
(`ode_sample`, `dpm`, `progressive`) or with fresh noise on the way (`Churn`, `ancestral`).

Noise levels are plain numbers, largest first. Nothing is clipped: images are clipped when they
are shown or saved.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch

from cmbook.noise import NoiseRange, expand, normal, seeded
from cmbook.ode import Solver, euler_step, heun_step, solve, velocity
from cmbook.protocols import Denoiser, Generator, Grid, Labels, PerSample, Samples, Vector
from cmbook.schedules import check_choice, check_decreasing


def prior(like: Samples, noise_range: NoiseRange, generator: Generator) -> Samples:
    """Where sampling starts: pure noise at `sigma_max`, shaped as `like`.

    Source: Song et al. (2023), §2.
    """
    return noise_range.sigma_max * normal(like, generator)


@torch.no_grad()
def one_step(
    consistency: Denoiser, x: Samples, noise_range: NoiseRange, label: Labels | None = None
) -> Samples:
    """Data from noise by a single evaluation: f(x, sigma_max).

    Args:
        consistency: A consistency model.
        x: Noise of standard deviation `sigma_max`, as `prior` makes it.
        noise_range: The range of the model.
        label: Classes, if the model has them.

    Source: Song et al. (2023), §3, sampling.
    """
    return consistency(x, _everywhere(noise_range.sigma_max, x), label)


def identity(x0: Samples) -> Samples:
    """Leave samples as they are.

    Source: ours.
    """
    return x0


@torch.no_grad()
def multistep(
    consistency: Denoiser,
    x: Samples,
    sigmas: Grid,
    label: Labels | None = None,
    *,
    noise_range: NoiseRange,
    generator: Generator,
    edit: Callable[[Samples], Samples] = identity,
) -> Samples:
    r"""Jump to the data, add a little less noise, jump again.

    $$x_{\tau} = x_0 + \sqrt{\tau^2 - \epsilon^2}\,z,\qquad x_0 \leftarrow f(x_\tau, \tau)$$

    With the exact consistency function every step keeps the law of the data.

    Args:
        consistency: A consistency model.
        x: Noise of standard deviation `sigmas[0]`.
        sigmas: Decreasing noise levels, one evaluation each: `torch.tensor([80.0, 1.4])` is two
            steps. The released code writes this as indices into a grid (`--ts 0,22,39`).
        label: Classes, if the model has them.
        noise_range: The range of the model; paths end at its `sigma_min`.
        generator: Draws the noise that is added between evaluations.
        edit: Applied to every x0; editing lives here.

    Raises:
        ValueError: If the levels do not decrease.

    Source: Song et al. (2023), Algorithm 1.
    """
    check_decreasing(sigmas)
    sigmas = sigmas.to(x.device, torch.promote_types(x.dtype, torch.float32))
    x0 = edit(consistency(x, sigmas[:1].expand(len(x)), label))
    for sigma in sigmas[1:]:
        scale = (sigma**2 - noise_range.sigma_min**2).clamp(min=0).sqrt().to(x.dtype)
        x = x0 + scale * normal(x0, generator)
        x0 = edit(consistency(x, sigma.expand(len(x)), label))
    return x0


@torch.no_grad()
def ode_sample(
    denoise: Denoiser,
    x: Samples,
    noise_range: NoiseRange,
    label: Labels | None = None,
    *,
    levels: int = 18,
    solver: Solver = "heun",
) -> Samples:
    """Walk the probability-flow ODE of a diffusion model from noise to data.

    The grid of `levels` noise levels is followed by 0, so Heun takes `2 * levels - 1`
    evaluations and Euler `levels`.

    Args:
        denoise: A diffusion model.
        x: Noise of standard deviation `sigma_max`, as `prior` makes it.
        noise_range: The range of the model.
        label: Classes, if the model has them.
        levels: Number of noise levels above 0.
        solver: `"heun"` or `"euler"`.

    Source: Karras et al. (2022), Algorithm 1.
    """
    return solve(denoise, x, grid_to_zero(noise_range, levels), label, solver=solver)


def grid_to_zero(noise_range: NoiseRange, levels: int) -> Grid:
    """The grid of a noise range and then 0, where a diffusion model has removed all noise.

    Example:
        >>> grid_to_zero(NoiseRange(1.0, 3.0, rho=1.0), 3)
        tensor([3., 2., 1., 0.], dtype=torch.float64)

    Source: Karras et al. (2022), eq. 5: t_N = 0.
    """
    grid = noise_range.grid(levels)
    return torch.cat([grid, grid.new_zeros(1)])


@torch.no_grad()
def progressive(
    denoise: Denoiser,
    x: Samples,
    noise_range: NoiseRange,
    label: Labels | None = None,
    *,
    steps: int,
) -> Samples:
    """Walk as a progressively distilled model was trained to: `steps` Euler steps to `sigma_min`.

    Args:
        denoise: A diffusion model, made to take few and long steps.
        x: Noise of standard deviation `sigma_max`, as `prior` makes it.
        noise_range: The range of the model.
        label: Classes, if the model has them.
        steps: Number of steps and of evaluations. The grid has one level more, and no 0.

    Source: Salimans and Ho (2022), Algorithm 2; Song et al. (2023), released code (`progdist`).
    """
    return solve(denoise, x, noise_range.grid(steps + 1), label, solver="euler")


def midpoint_step(
    denoise: Denoiser,
    x: Samples,
    sigma: PerSample,
    sigma_next: PerSample,
    label: Labels | None = None,
) -> Samples:
    r"""One second-order step from σ to σ′ with the slope from between: two evaluations.

    The middle is that of the cube roots, $\big((\sigma^{1/3} + \sigma'^{1/3})/2\big)^3$. It is
    above 0 even where σ′ is 0, so the last step needs no exception.

    Source: Lu et al. (2022), DPM-Solver-2; Song et al. (2023), released code (`dpm`).
    """
    sigma_mid = ((sigma ** (1 / 3) + sigma_next ** (1 / 3)) / 2) ** 3
    x_mid = euler_step(denoise, x, sigma, sigma_mid, label)
    slope = velocity(x_mid, denoise(x_mid, sigma_mid, label), sigma_mid)
    return x + expand(sigma_next - sigma, x) * slope


@torch.no_grad()
def dpm(denoise: Denoiser, x: Samples, sigmas: Grid, label: Labels | None = None) -> Samples:
    """Walk the probability-flow ODE by midpoint steps: two evaluations each, the last included.

    Args:
        denoise: A diffusion model.
        x: Noise of standard deviation `sigmas[0]`.
        sigmas: Decreasing noise levels, as `grid_to_zero` makes them.
        label: Classes, if the model has them.

    Raises:
        ValueError: If the levels do not decrease.

    Source: Song et al. (2023), released code (`dpm`).
    """
    for sigma, sigma_next in _steps(sigmas):
        x = midpoint_step(denoise, x, _everywhere(sigma, x), _everywhere(sigma_next, x), label)
    return x


@dataclass(frozen=True)
class Churn:
    r"""A walk that first goes back a little: add fresh noise, then step over it and on.

    $$\hat\sigma = (1 + \gamma)\,\sigma,\qquad
      \hat x = x + \sqrt{\hat\sigma^2 - \sigma^2}\; S_{noise}\, z,\qquad
      \gamma = \min(S_{churn}/n,\ \sqrt2 - 1)$$

    for n steps, and then one step of the solver from $\hat\sigma$ to σ′. Fresh noise wears away
    the errors of earlier steps; the price is that each step is longer.

    Attributes:
        amount: $S_{churn}$; 0 is the plain walk, which draws nothing.
        sigma_low: $S_{tmin}$; below it no noise is added.
        sigma_high: $S_{tmax}$; nor above it.
        noise_scale: $S_{noise}$. Only 1 keeps the law of the data; a little more makes up for
            networks that remove too much noise.
        solver: `"heun"`, or `"dpm"` for `midpoint_step`.

    EDM's values for ImageNet-64, with 256 levels, are `Churn(40, 0.05, 50, 1.003)`.

    Note: Noise is drawn where it is added. The released code draws it for every step, and
        multiplies it by 0 outside the window.

    Raises:
        ValueError: If a setting is out of range; when called, if the levels do not decrease.

    Source: Karras et al. (2022), Algorithm 2; Song et al. (2023), released code for `"dpm"`.
    """

    amount: float = 40.0
    sigma_low: float = 0.0
    sigma_high: float = math.inf
    noise_scale: float = 1.0
    solver: Literal["heun", "dpm"] = "heun"

    def __post_init__(self) -> None:
        if not 0 <= self.amount < math.inf:
            raise ValueError(f"amount must be at least 0; got {self.amount}")
        if not 0 <= self.sigma_low <= self.sigma_high:
            raise ValueError(
                f"expected 0 <= sigma_low <= sigma_high; got {self.sigma_low} and {self.sigma_high}"
            )
        if not 0 <= self.noise_scale < math.inf:
            raise ValueError(f"noise_scale must be at least 0; got {self.noise_scale}")
        check_choice("solver", self.solver, ["heun", "dpm"])

    @torch.no_grad()
    def __call__(
        self,
        denoise: Denoiser,
        x: Samples,
        sigmas: Grid,
        label: Labels | None = None,
        *,
        generator: Generator,
    ) -> Samples:
        """Walk from `sigmas[0]` to `sigmas[-1]`; the arguments are those of `ancestral`."""
        steps = _steps(sigmas)
        for sigma, sigma_next in steps:
            gamma = min(self.amount / len(steps), math.sqrt(2) - 1)
            if gamma > 0 and self.sigma_low <= sigma <= self.sigma_high:
                added = sigma * math.sqrt(gamma * (2 + gamma))  # √(σ̂² - σ²)
                x = x + self.noise_scale * added * normal(x, generator)
                sigma = (1 + gamma) * sigma  # σ̂
            step = self._step(sigma_next)
            x = step(denoise, x, _everywhere(sigma, x), _everywhere(sigma_next, x), label)
        return x

    def _step(self, sigma_next: float) -> Callable[..., Samples]:
        if self.solver == "dpm":
            return midpoint_step
        return heun_step if sigma_next > 0 else euler_step


@torch.no_grad()
def ancestral(
    denoise: Denoiser,
    x: Samples,
    sigmas: Grid,
    label: Labels | None = None,
    *,
    generator: Generator,
) -> Samples:
    r"""Step down further than asked, and add noise up to where one should be.

    $$x \leftarrow x + (\sigma_{down} - \sigma)\frac{x - D}{\sigma} + \sigma_{up}\, z,\qquad
      \sigma_{down} = \frac{\sigma'^2}{\sigma},\quad
      \sigma_{up} = \sigma'\sqrt{1 - \sigma'^2/\sigma^2}$$

    This draws $x'$ as it lies between x and a known clean sample D, and $\sigma_{down}^2 +
    \sigma_{up}^2 = \sigma'^2$. Where the data are one point it is exact in any number of steps;
    else it becomes so as steps grow short.

    Args:
        denoise: A diffusion model; one evaluation a step.
        x: Noise of standard deviation `sigmas[0]`.
        sigmas: Decreasing noise levels, as `grid_to_zero` makes them.
        label: Classes, if the model has them.
        generator: Draws the noise.

    Note: A step to 0 draws no noise. The released code draws it and multiplies it by 0.

    Raises:
        ValueError: If the levels do not decrease.

    Source: Ho et al. (2020), Algorithm 2; Song et al. (2023), released code (`ancestral`).
    """
    for sigma, sigma_next in _steps(sigmas):
        down = sigma_next**2 / sigma
        x = euler_step(denoise, x, _everywhere(sigma, x), _everywhere(down, x), label)
        if sigma_next > 0:
            x = x + math.sqrt(sigma_next**2 - down**2) * normal(x, generator)
    return x


def greedy_levels(
    consistency: Denoiser,
    x: Samples,
    score: Callable[[Samples], float],
    grid: Grid,
    label: Labels | None = None,
    *,
    steps: int,
    noise_range: NoiseRange,
    seed: int,
) -> Vector:
    """Choose noise levels for `multistep` one after the other, each by a ternary search.

    Every new level is sought between the last one found and the end of the grid. All candidates
    start from the same x and draw the same noise, and none is scored twice. A ternary search finds
    the best level if the score first falls and then rises along the grid; if it does not quite,
    a good one.

    Args:
        consistency: A consistency model.
        x: Noise of standard deviation `grid[0]`.
        score: What to make small: a function of samples, such as a Frechet distance.
        grid: Decreasing levels to choose from; the first is taken, the last never.
        label: Classes, if the model has them.
        steps: How many levels, the first included.
        noise_range: The range of the model.
        seed: Of the noise between evaluations.

    Note: The released search cannot run, and where one level lies between its bounds it returns
        a level it did not mean (`m1` for `left`).

    Raises:
        ValueError: If the grid is too short for so many steps, or does not decrease, or a score
            is NaN, which is neither better nor worse than another.

    Source: Song et al. (2023), App. C, ternary search; released code.
    """
    check_decreasing(grid)
    if not 1 <= steps < len(grid):
        raise ValueError(f"{len(grid)} levels hold 1 to {len(grid) - 1} steps; got steps={steps}")
    known: dict[int, float] = {}
    chosen = [0]

    def scored(i: int) -> float:
        if i not in known:
            draws = seeded(seed, "greedy levels", device=x.device)
            samples = multistep(
                consistency, x, grid[[*chosen, i]], label, noise_range=noise_range, generator=draws
            )
            known[i] = score(samples)
            if math.isnan(known[i]):
                raise ValueError(f"the score with level {float(grid[i]):.4g} is NaN; look at it")
        return known[i]

    while len(chosen) < steps:
        known.clear()
        left, right = chosen[-1] + 1, len(grid) - 2 - (steps - len(chosen) - 1)
        while right - left >= 3:
            third = (right - left) // 3
            if scored(left + third) <= scored(right - third):
                right -= third
            else:
                left += third
        chosen.append(min(range(left, right + 1), key=scored))
    return grid[chosen]


class Inverse(NamedTuple):
    """A noisy point that a consistency model sends to a sample, as nearly as was found.

    Attributes:
        x: The noisy point.
        error: How far f(x) is from the sample: root mean square, in units of sigma_data.

    Source: ours.
    """

    x: Samples
    error: PerSample


def invert(
    consistency: Denoiser,
    x0: Samples,
    sigma: float,
    label: Labels | None = None,
    *,
    noise_range: NoiseRange,
    iterations: int = 300,
    rate: float = 0.05,
) -> Inverse:
    r"""Noise that leads back to a sample: make $\lVert f(x, \sigma) - x_0\rVert^2$ small over x.

    The exact consistency function has an inverse, the path walked backwards. A network has none
    that is promised: samples that it cannot make have no noise, and others may have several. So
    this searches, by Adam on x in units of its own standard deviation, starts where a Gaussian
    of the data's size would have come from, and says how near it came. The higher σ, the steeper
    f is near its seams and the flatter elsewhere, and the worse the search.

    With a diffusion model there is no need to search: `solve` on a rising path, or its exact
    `flow_map`.

    Args:
        consistency: A consistency model.
        x0: Samples to find noise for.
        sigma: The noise level to find it at.
        label: Classes, if the model has them.
        noise_range: The range of the model.
        iterations: Steps of the search, one evaluation with gradient each.
        rate: Of Adam, in units of the standard deviation of noisy data.

    Returns:
        The best points met, and their errors; each sample is searched for on its own.

    Raises:
        ValueError: If σ is not above sigma_min, where f is the identity, samples are not finite,
            or there are no iterations.

    Source: ours; the question is that of Song et al. (2023), released code, issue 15.
    """
    data = noise_range.sigma_data
    if not noise_range.sigma_min < sigma < math.inf:
        raise ValueError(f"sigma must exceed sigma_min = {noise_range.sigma_min:g}; got {sigma:g}")
    if iterations < 1 or not 0 < rate < math.inf:
        raise ValueError(
            f"expected iterations >= 1 and a rate above 0; got {iterations} and {rate:g}"
        )
    if not bool(x0.isfinite().all()):
        raise ValueError("x0 holds NaN or infinity; only finite samples can be searched for")
    scale, levels = math.hypot(sigma, data), _everywhere(sigma, x0)
    whitened = (x0 / data).clone().requires_grad_(True)
    best, least = whitened.detach().clone(), torch.full_like(levels, math.inf)
    adam = torch.optim.Adam([whitened], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    for _ in range(iterations):
        with torch.enable_grad():
            off = (consistency(scale * whitened, levels, label) - x0).flatten(1)
            squares = off.square().mean(1)
            (whitened.grad,) = torch.autograd.grad(squares.sum(), whitened)
        error = squares.detach().sqrt().to(least) / data
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(expand(better.to(least), x0) > 0, whitened.detach(), best)
        adam.step()
        schedule.step()
    return Inverse(scale * best, least)


def _steps(sigmas: Grid) -> list[tuple[float, float]]:
    """Every level with the next."""
    check_decreasing(sigmas)
    return list(pairwise(sigmas.tolist()))


def _everywhere(sigma: float, x: Samples) -> PerSample:
    """One level for every sample, never below float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.full((len(x),), sigma, dtype=dtype, device=x.device)
