"""Weights λ(σ): how much each noise level counts in a loss.

Every weight is a function of (σ, σ′, noise range), σ being the larger of the two levels. The
paper writes λ(t_n), the smaller; the released code takes the larger, and so do we. For the
uniform weight, which every published run uses, there is no difference.
"""

from collections.abc import Callable
from typing import Literal

import torch

from cmbook.noise import NoiseRange
from cmbook.protocols import PerSample


def uniform(sigma: PerSample, sigma_next: PerSample, noise_range: NoiseRange) -> PerSample:
    """1.  Source: Song et al. (2023), §6: all of the paper's experiments."""
    return torch.ones_like(sigma)


def snr(sigma: PerSample, sigma_next: PerSample, noise_range: NoiseRange) -> PerSample:
    r"""$1/\sigma^2$.  Source: Song et al. (2023), released code."""
    return sigma**-2


def snr_plus_one(sigma: PerSample, sigma_next: PerSample, noise_range: NoiseRange) -> PerSample:
    r"""$1/\sigma^2 + 1$.  Source: Song et al. (2023), released code."""
    return sigma**-2 + 1


def karras(sigma: PerSample, sigma_next: PerSample, noise_range: NoiseRange) -> PerSample:
    r"""$1/\sigma^2 + 1/\sigma_{data}^2 = 1/c_{out}^2$: the network's error counts evenly.

    Source: Karras et al. (2022), Table 1.
    """
    return sigma**-2 + noise_range.sigma_data**-2


def truncated_snr(sigma: PerSample, sigma_next: PerSample, noise_range: NoiseRange) -> PerSample:
    r"""$\max(1/\sigma^2, 1)$.  Source: Salimans and Ho (2022), §4."""
    return (sigma**-2).clamp(min=1)


def inverse_gap(sigma: PerSample, sigma_next: PerSample, noise_range: NoiseRange) -> PerSample:
    r"""$1/(\sigma - \sigma')$: the loss per unit of noise crossed.

    Source: Song and Dhariwal (2023, iCT), weighting function.
    """
    return 1 / (sigma - sigma_next)


Weight = Literal["uniform", "snr", "snr_plus_one", "karras", "truncated_snr", "inverse_gap"]
WEIGHTS: dict[Weight, Callable[[PerSample, PerSample, NoiseRange], PerSample]] = {
    "uniform": uniform,
    "snr": snr,
    "snr_plus_one": snr_plus_one,
    "karras": karras,
    "truncated_snr": truncated_snr,
    "inverse_gap": inverse_gap,
}
