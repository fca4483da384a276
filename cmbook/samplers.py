"""Sampling: one evaluation, several (Algorithm 1 of Song et al. 2023), or a walk along the ODE.

Noise levels are plain numbers, largest first. Nothing is clipped: images are clipped when they
are shown or saved.
"""

from collections.abc import Callable

import torch

from cmbook.noise import NoiseRange, normal
from cmbook.ode import Solver, solve
from cmbook.protocols import Denoiser, Generator, Grid, Labels, Samples
from cmbook.schedules import check_decreasing


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
    dtype = torch.promote_types(x.dtype, torch.float32)
    sigma = torch.full((len(x),), noise_range.sigma_max, dtype=dtype, device=x.device)
    return consistency(x, sigma, label)


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
    grid = noise_range.grid(levels)
    return solve(denoise, x, torch.cat([grid, grid.new_zeros(1)]), label, solver=solver)
