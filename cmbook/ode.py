"""The probability-flow ODE: which way a noisy point moves, and how to walk there."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch

from cmbook.noise import expand
from cmbook.protocols import Denoiser, Grid, Labels, Path, PerSample, Samples
from cmbook.schedules import check_choice, check_decreasing


def velocity(x: Samples, denoised: Samples, sigma: PerSample) -> Samples:
    r"""The direction of the path through x at σ: $\dfrac{dx}{d\sigma} = \dfrac{x - D}{\sigma}$.

    Args:
        x: Noisy samples.
        denoised: D(x, σ), the posterior mean of x0.
        sigma: Noise levels, above 0.

    Source: Song et al. (2023), eq. 2 with the score (D - x)/σ²; Karras et al. (2022), eq. 3.
    """
    return (x - denoised) / expand(sigma, x)


def euler_step(
    denoise: Denoiser,
    x: Samples,
    sigma: PerSample,
    sigma_next: PerSample,
    label: Labels | None = None,
) -> Samples:
    """One first-order step from σ to σ′: one evaluation.

    Source: Song et al. (2023), §4, eq. 6.
    """
    slope = velocity(x, denoise(x, sigma, label), sigma)
    return x + expand(sigma_next - sigma, x) * slope


def heun_step(
    denoise: Denoiser,
    x: Samples,
    sigma: PerSample,
    sigma_next: PerSample,
    label: Labels | None = None,
) -> Samples:
    """One second-order step from σ to σ′: two evaluations.

    Where σ′ = 0 there is no second slope, and the step is Euler's.

    Source: Karras et al. (2022), Algorithm 1; Song et al. (2023), App. C.
    """
    slope = velocity(x, denoise(x, sigma, label), sigma)
    guess = x + expand(sigma_next - sigma, x) * slope
    safe = torch.where(sigma_next > 0, sigma_next, sigma)
    slope_next = velocity(guess, denoise(guess, safe, label), safe)
    slope_next = torch.where(expand(sigma_next, x) > 0, slope_next, slope)
    return x + expand(sigma_next - sigma, x) * (slope + slope_next) / 2


Solver = Literal["euler", "heun"]
SOLVERS: dict[Solver, Callable[..., Samples]] = {"euler": euler_step, "heun": heun_step}


def walk(
    denoise: Denoiser,
    x: Samples,
    sigmas: Grid,
    label: Labels | None = None,
    *,
    solver: Solver = "heun",
) -> Iterator[Samples]:
    """Yield the point of the path at every level of `sigmas`, the first being `x` itself.

    Args:
        denoise: The denoiser whose paths are followed.
        x: Samples at level `sigmas[0]`.
        sigmas: Decreasing noise levels; the last may be 0, and is then reached by Euler.
        label: Classes, if the denoiser has them.
        solver: `"euler"` (order 1) or `"heun"` (order 2).

    Raises:
        ValueError: If the levels do not decrease or the solver is unknown.

    Source: Karras et al. (2022), Algorithm 1.
    """
    check_decreasing(sigmas)
    check_choice("solver", solver, SOLVERS)
    levels = sigmas.to(x.device, torch.promote_types(x.dtype, torch.float32))
    yield x
    for sigma, sigma_next, last in zip(levels, levels[1:], sigmas[1:].tolist(), strict=False):
        step = SOLVERS[solver] if last > 0 else euler_step
        x = step(denoise, x, sigma.expand(len(x)), sigma_next.expand(len(x)), label)
        yield x


def trace(
    denoise: Denoiser,
    x: Samples,
    sigmas: Grid,
    label: Labels | None = None,
    *,
    solver: Solver = "heun",
) -> Path:
    """Every point of `solve`, the first being `x` itself: shape `(n, b, ...)`.

    Source: Karras et al. (2022), Algorithm 1.
    """
    return torch.stack(list(walk(denoise, x, sigmas, label, solver=solver)))


def solve(
    denoise: Denoiser,
    x: Samples,
    sigmas: Grid,
    label: Labels | None = None,
    *,
    solver: Solver = "heun",
) -> Samples:
    """Walk from `sigmas[0]` to `sigmas[-1]` and return where the path ends.

    The arguments are those of `walk`.

    Source: Karras et al. (2022), Algorithm 1.
    """
    for point in walk(denoise, x, sigmas, label, solver=solver):
        end = point
    return end


class Counted:
    """A denoiser that counts its evaluations: NFE is measured, never computed by formula.

    Example:
        >>> still = Counted(lambda x, sigma, label=None: x)
        >>> sigmas = torch.tensor([3.0, 2.0, 1.0, 0.0])
        >>> _ = solve(still, torch.ones(1, 2), sigmas), still.nfe
        >>> still.nfe
        5

    Source: ours.
    """

    def __init__(self, denoise: Denoiser) -> None:
        self.denoise = denoise
        self.nfe = 0

    def __call__(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        """Evaluate, and count."""
        self.nfe += 1
        return self.denoise(x, sigma, label)
