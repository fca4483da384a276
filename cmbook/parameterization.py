"""From a bare network to a denoiser: c_skip, c_out, c_in and c_noise (Song et al. App. C)."""

from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from cmbook.noise import NoiseRange, expand
from cmbook.protocols import Labels, PerSample, Samples


@runtime_checkable
class Scalings(Protocol):
    """Four functions of σ that dress a network as a denoiser."""

    @property
    def noise_range(self) -> NoiseRange:
        """The range whose sigma_min and sigma_data they use."""
        ...

    def c_skip(self, sigma: PerSample) -> PerSample:
        """How much of x passes by the network."""
        ...

    def c_out(self, sigma: PerSample) -> PerSample:
        """The scale of the network's output."""
        ...

    def c_in(self, sigma: PerSample) -> PerSample:
        """The scale of the network's input."""
        ...

    def c_noise(self, sigma: PerSample) -> PerSample:
        """How the network is told σ."""
        ...


@dataclass(frozen=True)
class EDMScalings:
    r"""The scalings of a diffusion teacher.

    $$c_{skip} = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2},\quad
      c_{out} = \frac{\sigma\,\sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}},\quad
      c_{in} = \frac{1}{\sqrt{\sigma^2 + \sigma_d^2}},\quad
      c_{noise} = \tfrac14 \ln\sigma$$

    Input and target of the network then have unit variance at every σ, and D(x, 0) = x.

    Source: Karras et al. (2022), Table 1.
    """

    noise_range: NoiseRange = NoiseRange()

    def c_skip(self, sigma: PerSample) -> PerSample:
        """How much of x passes by the network."""
        return self._data**2 / (sigma**2 + self._data**2)

    def c_out(self, sigma: PerSample) -> PerSample:
        """The scale of the network's output."""
        return sigma * self._data / (sigma**2 + self._data**2).sqrt()

    def c_in(self, sigma: PerSample) -> PerSample:
        """The scale of the network's input."""
        return 1 / (sigma**2 + self._data**2).sqrt()

    def c_noise(self, sigma: PerSample) -> PerSample:
        """How the network is told σ; below 1e-9 as if σ were 1e-9, since ln 0 is not finite."""
        return sigma.clamp(min=1e-9).log() / 4

    @property
    def _data(self) -> float:
        return self.noise_range.sigma_data


@dataclass(frozen=True)
class ConsistencyScalings:
    r"""The scalings of a consistency model: f(x, σ) = x for σ ≤ ε, whatever the weights.

    $$c_{skip} = \frac{\sigma_d^2}{(\sigma - \epsilon)^2 + \sigma_d^2},\qquad
      c_{out} = \frac{\sigma_d(\sigma - \epsilon)}{\sqrt{\sigma^2 + \sigma_d^2}}$$

    and c_in, c_noise as in `EDMScalings`. Note the plain σ under the root of c_out. Levels
    below ε = sigma_min count as ε, so the boundary holds there too.

    Source: Song et al. (2023), App. C; the released code agrees.
    """

    noise_range: NoiseRange = NoiseRange()

    def c_skip(self, sigma: PerSample) -> PerSample:
        """How much of x passes by the network: exactly 1 at sigma_min."""
        return self._data**2 / (self._above(sigma) ** 2 + self._data**2)

    def c_out(self, sigma: PerSample) -> PerSample:
        """The scale of the network's output: exactly 0 at sigma_min."""
        return self._data * self._above(sigma) * self.c_in(sigma)

    def c_in(self, sigma: PerSample) -> PerSample:
        """The scale of the network's input."""
        return 1 / (self._clamped(sigma) ** 2 + self._data**2).sqrt()

    def c_noise(self, sigma: PerSample) -> PerSample:
        """How the network is told σ."""
        return self._clamped(sigma).log() / 4

    def _clamped(self, sigma: PerSample) -> PerSample:
        return sigma.clamp(min=self.noise_range.sigma_min)

    def _above(self, sigma: PerSample) -> PerSample:
        return self._clamped(sigma) - self.noise_range.sigma_min

    @property
    def _data(self) -> float:
        return self.noise_range.sigma_data


AnyScalings = EDMScalings | ConsistencyScalings


class Preconditioned(nn.Module):
    r"""A network in its dress, itself a `Denoiser`.

    $$D(x, \sigma) = c_{skip}(\sigma)\,x + c_{out}(\sigma)\,F\big(c_{in}(\sigma)\,x,\,
        c_{noise}(\sigma)\big)$$

    σ stays in float32 or float64, since neighboring levels collapse in less; only the network's
    input is cast to the type of its weights.

    Source: Karras et al. (2022), eq. 7; Song et al. (2023), eq. 5.
    """

    def __init__(self, net: nn.Module, scalings: Scalings) -> None:
        super().__init__()
        self.net = net
        self.scalings = scalings

    def forward(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        """The estimate of x0, in the dtype of `x`."""
        if sigma.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"sigma must be float32 or float64; got {sigma.dtype}")
        c = self.scalings
        raw = self.raw(x, sigma, label).to(x.dtype)
        return expand(c.c_skip(sigma), x) * x + expand(c.c_out(sigma), x) * raw

    def raw(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        """F: what the bare network says, in the dtype of its weights."""
        c = self.scalings
        weights = next(self.net.parameters(), x)
        inputs = (expand(c.c_in(sigma), x) * x).to(weights.dtype)
        return cast(Tensor, self.net(inputs, c.c_noise(sigma), label))
