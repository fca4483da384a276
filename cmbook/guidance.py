"""Guidance: exaggerate what a label changes."""

import math
from functools import update_wrapper

from cmbook.protocols import Denoiser, Labels, PerSample, Samples


def guided(denoise: Denoiser, scale: float) -> Denoiser:
    r"""The denoiser $D(x, \sigma) + w\,\big(D(x, \sigma, c) - D(x, \sigma)\big)$.

    Without a label it is D itself. The result is a `Denoiser` like any other: it can be walked
    along, and it can teach.

    Args:
        denoise: A denoiser that answers with a label and without one.
        scale: w; 1 means no guidance, 0 ignores the label.

    Raises:
        ValueError: If the scale is not finite.

    Source: Ho and Salimans (2022), eq. 6, for denoisers in place of noise predictions; their w
        is our w - 1.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, 1 for no guidance; got {scale}")

    def guide(x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        plain = denoise(x, sigma, None)
        return plain if label is None else plain + scale * (denoise(x, sigma, label) - plain)

    return update_wrapper(guide, denoise, (), ())  # `guide.__wrapped__` is the denoiser
