"""Forward-mode derivatives: how a denoiser's answer changes along a path."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from cmbook.noise import expand, normal
from cmbook.protocols import Denoiser, Generator, Labels, PerSample, Samples


def tangent(
    model: Denoiser, x: Samples, sigma: PerSample, dx: Samples, label: Labels | None = None
) -> tuple[Samples, Samples]:
    r"""f(x, σ), and how fast it changes as σ grows and x moves with it.

    $$\frac{df}{d\sigma} = \partial_\sigma f + J_x f\, \frac{dx}{d\sigma}$$

    One forward pass computes both. It runs outside autocast, in the dtype of `x`, and with the
    plain attention kernel, because the fused ones have no forward mode.

    Args:
        model: f. Frozen or not: gradients flow through both results if they flow through f.
        x: Samples, float32 or float64.
        sigma: Their noise levels.
        dx: The direction dx/dσ, such as `velocity(x, denoised, sigma)`, or the noise itself.
        label: Classes, if the model has them.

    Raises:
        ValueError: If f is compiled (its derivatives are silently wrong), wrapped for many
            processes (its gradients would not be synchronized) or in half precision (the
            derivative is a difference of nearly equal numbers).

    Source: Song et al. (2023), App. B; released CIFAR-10 code, whose `jvp` has the direction
        reversed, and so the sign.
    """
    _check_differentiable(model, x, dx)
    device = "cpu" if x.is_meta else x.device.type  # the meta device knows no autocast
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(device, enabled=False):
        found = torch.func.jvp(
            lambda x, sigma: model(x, sigma, label), (x, sigma), (dx, torch.ones_like(sigma))
        )
    return found[0], found[1]


def check_jvp(
    model: Denoiser,
    x: Samples,
    sigma: PerSample,
    label: Labels | None = None,
    *,
    generator: Generator,
    tolerance: float = 1e-4,
) -> float:
    """Compare a model's forward-mode derivative with finite differences, along a random direction.

    A network is copied and checked in float64 and eval mode, so that rounding hides nothing.

    Args:
        model: Your network, dressed as a denoiser.
        x: Some noisy samples.
        sigma: Their noise levels, above sigma_min: below, a consistency model does not depend on σ.
        label: Classes, if the model has them.
        generator: Draws the direction.
        tolerance: Largest relative difference that passes.

    Returns:
        The largest relative difference of any sample: about 1e-9 if all is well.

    Raises:
        ValueError: If the two differ, with the usual reasons, or there are no samples.

    Source: ours.
    """
    if not len(x):
        raise ValueError(f"there are no samples to check at: got shape {tuple(x.shape)}")
    _check_differentiable(model, x)
    if isinstance(model, nn.Module):
        model = deepcopy(model).double().eval()
    x, sigma = x.double(), sigma.double()
    dx = normal(x, generator)
    with torch.no_grad():
        _, change = tangent(model, x, sigma, dx, label)
        lengths = (1e-5, 1e-4, 1e-3)  # a network of float32 inside needs a longer step
        each = [_difference(model, x, sigma, dx, label, change, length) for length in lengths]
    found, worst = torch.stack(each).amin(0).max(0)
    if not float(found) <= tolerance:
        why = (
            "it is 0: something inside detaches its input or computes in inference mode"
            if not bool(change[worst].any())
            else "an operation inside has a wrong forward-mode rule, rounds (half precision), or "
            "is random or not smooth, as a consistency model is at sigma_min"
        )
        raise ValueError(
            f"the forward-mode derivative differs from finite differences by {float(found):.2g} "
            f"(relative), at sigma = {float(sigma[worst]):.4g}; {why}"
        )
    return float(found)


def _difference(
    model: Denoiser,
    x: Samples,
    sigma: PerSample,
    dx: Samples,
    label: Labels | None,
    change: Samples,
    length: float,
) -> PerSample:
    """How far a derivative is from the difference quotient, relative to the latter."""
    step = length * sigma
    ahead = model(x + expand(step, x) * dx, sigma + step, label)
    behind = model(x - expand(step, x) * dx, sigma - step, label)
    quotient = (ahead - behind) / expand(2 * step, x)
    off, size = ((d.flatten(1).norm(dim=1)) for d in (change - quotient, quotient))
    found: PerSample = off / size.clamp(min=1e-300)
    return found


def _check_differentiable(model: Denoiser, *given: Tensor) -> None:
    """Refuse what differentiates wrongly without an error."""
    parts = _parts(model)
    if any(isinstance(part, DistributedDataParallel) for part in parts):
        raise ValueError(
            "forward-mode derivatives do not pass through DistributedDataParallel, and its "
            ".module would skip the synchronization of gradients; differentiate the frozen target"
        )
    if any(hasattr(part, "_torchdynamo_orig_callable") or _is_compiled(part) for part in parts):
        raise ValueError(
            "forward-mode derivatives of a compiled model can be silently wrong; pass the model "
            "as it was before torch.compile"
        )
    weights = (p for part in parts if isinstance(part, nn.Module) for p in part.parameters(False))
    halves = {t.dtype for t in (*given, *weights)} & {torch.float16, torch.bfloat16}
    if halves:
        raise ValueError(
            f"a derivative in {halves.pop()} would be rounding noise; pass float32 samples and "
            "directions, and keep the weights in float32 (autocast is switched off here)"
        )


def _parts(model: object) -> list[object]:
    """A model and all that is inside: its modules, and what `frozen_view` and `guided` wrap."""
    parts: list[object] = list(model.modules()) if isinstance(model, nn.Module) else [model]
    wrapped = getattr(model, "__wrapped__", None)
    return parts if wrapped is None else parts + _parts(wrapped)


def _is_compiled(part: object) -> bool:
    in_place = getattr(part, "_compiled_call_impl", None) is not None
    return in_place or type(part).__name__ == "OptimizedModule"
