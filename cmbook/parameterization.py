"""From a bare network to a denoiser: c_skip, c_out, c_in and c_noise (Song et al. App. C)."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from cmbook.noise import NoiseRange, expand
from cmbook.protocols import Grid, Labels, PerSample, Samples


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


@dataclass(frozen=True)
class VPScalings:
    r"""The scalings of a variance-preserving model (DDPM++): the network says which noise is in x.

    $$c_{skip} = 1,\quad c_{out} = -\sigma,\quad c_{in} = \frac{1}{\sqrt{\sigma^2 + 1}},\quad
      c_{noise} = (M - 1)\,t(\sigma)$$

    where σ(t) = √(exp(β_d t²/2 + β_min t) - 1) is the noise level at time t in (0, 1], and t(σ)
    its inverse.

    Any σ is taken as it is: nothing is rounded or clamped. Outside `sigma_range` the network is
    told times that it was not trained on. The data count as of unit variance, so the sigma_data
    of the range is not used.

    Attributes:
        noise_range: Of sampling.
        beta_d: β_d, how fast noise comes faster.
        beta_min: β_min, how fast it comes at first.
        epsilon_t: The least time in training.
        steps: M, the time steps of DDPM, which the network counts in.

    Source: Karras et al. (2022), Table 1, column VP; Song et al. (2021), App. C.
    """

    noise_range: NoiseRange = NoiseRange()
    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5
    steps: int = 1000

    def __post_init__(self) -> None:
        betas = self.beta_d > 0 and self.beta_min >= 0 and self.beta_d / 2 + self.beta_min < 700
        if not (betas and 0 < self.epsilon_t < 1):  # 700: beyond, σ(1) is no number
            raise ValueError(
                "expected beta_d > 0, beta_min >= 0, below 700, and 0 < epsilon_t < 1; got "
                f"{self.beta_d}, {self.beta_min} and {self.epsilon_t}"
            )
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2; got {self.steps}")

    def c_skip(self, sigma: PerSample) -> PerSample:
        """How much of x passes by the network: all of it."""
        return torch.ones_like(sigma)

    def c_out(self, sigma: PerSample) -> PerSample:
        """The scale of the network's output."""
        return -sigma

    def c_in(self, sigma: PerSample) -> PerSample:
        """The scale of the network's input."""
        return 1 / (sigma**2 + 1).sqrt()

    def c_noise(self, sigma: PerSample) -> PerSample:
        """How the network is told σ: as a time step, 0 ... M - 1, between the steps too."""
        root = (self.beta_min**2 + 2 * self.beta_d * (sigma**2).log1p()).sqrt()
        return (self.steps - 1) * (root - self.beta_min) / self.beta_d

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The noise levels of training: σ(epsilon_t) and σ(1)."""
        low, high = (
            math.sqrt(math.expm1(self.beta_d * t**2 / 2 + self.beta_min * t))
            for t in (self.epsilon_t, 1.0)
        )
        return low, high


@dataclass(frozen=True)
class VEScalings:
    r"""The scalings of a variance-exploding model (NCSN++): x as it is, and what to add to it.

    $$c_{skip} = 1,\quad c_{out} = \sigma,\quad c_{in} = 1,\quad
      c_{noise} = \ln(\sigma / 2)$$

    Any σ is taken as it is: nothing is rounded, and only σ below 1e-9 is told as if it were 1e-9,
    since ln 0 is not finite. The models were trained on 0.02 ... 100. The sigma_data of the range
    is not used.

    Source: Karras et al. (2022), Table 1, column VE; Song et al. (2021), App. C.
    """

    noise_range: NoiseRange = NoiseRange(sigma_min=0.02, sigma_max=100.0)

    def c_skip(self, sigma: PerSample) -> PerSample:
        """How much of x passes by the network: all of it."""
        return torch.ones_like(sigma)

    def c_out(self, sigma: PerSample) -> PerSample:
        """The scale of the network's output."""
        return sigma

    def c_in(self, sigma: PerSample) -> PerSample:
        """The scale of the network's input."""
        return torch.ones_like(sigma)

    def c_noise(self, sigma: PerSample) -> PerSample:
        """How the network is told σ."""
        return (0.5 * sigma.clamp(min=1e-9)).log()


@dataclass(frozen=True)
class IDDPMScalings:
    r"""The scalings of improved DDPM and of the ADM: those of VP, told whole time steps.

    $$c_{skip} = 1,\quad c_{out} = -\sigma,\quad c_{in} = \frac{1}{\sqrt{\sigma^2 + 1}},\quad
      c_{noise} = M - 1 - \arg\min_j |u_j - \sigma|$$

    with the noise levels $u_M = 0$ and, for $\bar\alpha_j = \sin^2\frac{\pi j}{2M(C_2 + 1)}$,

    $$u_{j-1}^2 = \frac{u_j^2 + 1}{\max(\bar\alpha_{j-1}/\bar\alpha_j,\ C_1)} - 1.$$

    The network is told the nearest of these levels: u_0, which is 20291, for all σ above it, and
    u_M = 0 for those near 0 (the least level above is 0.0064). Every other use of σ is exact.
    `round_sigma` gives that level, for samplers that stop at such levels only. The sigma_data of
    the range is not used.

    A network that says the variance too has twice the channels. Only the first half, the noise,
    is of use here, and `cmbook.interop.edm` drops the rest.

    Attributes:
        noise_range: Of sampling.
        C_1: Bounds how much noise one step may add.
        C_2: Bounds how little noise the least level has.
        M: The time steps of training.

    Source: Karras et al. (2022), Table 1, column iDDPM; Nichol and Dhariwal (2021), §3.2.
    """

    noise_range: NoiseRange = NoiseRange()
    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000

    def __post_init__(self) -> None:
        if not (0 < self.C_1 < 1 and 0 < self.C_2 < math.inf and 2 <= self.M <= 10_000):
            raise ValueError(
                "expected 0 < C_1 < 1, C_2 > 0 and M in 2 ... 10,000; got "
                f"{self.C_1}, {self.C_2} and {self.M}"
            )

    def c_skip(self, sigma: PerSample) -> PerSample:
        """How much of x passes by the network: all of it."""
        return torch.ones_like(sigma)

    def c_out(self, sigma: PerSample) -> PerSample:
        """The scale of the network's output."""
        return -sigma

    def c_in(self, sigma: PerSample) -> PerSample:
        """The scale of the network's input."""
        return 1 / (sigma**2 + 1).sqrt()

    def c_noise(self, sigma: PerSample) -> PerSample:
        """How the network is told σ: by the number of the nearest level, from -1 for 0."""
        return (self.M - 1 - self._nearest(sigma)).to(sigma.dtype)

    def round_sigma(self, sigma: PerSample) -> PerSample:
        """The nearest level of training, or 0."""
        return self.levels.to(sigma)[self._nearest(sigma)]

    @property
    def levels(self) -> Grid:
        """The noise levels u_0 ... u_M, largest first, in float64; the last is 0."""
        return _iddpm_levels(self.C_1, self.C_2, self.M)

    def _nearest(self, sigma: PerSample) -> Tensor:
        return (sigma[:, None] - self.levels.to(sigma)).abs().argmin(1)


@lru_cache(maxsize=8)
def _iddpm_levels(c_1: float, c_2: float, m: int) -> Grid:
    """Products of ᾱ's ratios, from the last step back: 1 + u_j² grows by one factor a step."""
    steps = torch.arange(m + 1, dtype=torch.float64, device="cpu")
    kept = (math.pi / 2 * steps / m / (c_2 + 1)).sin() ** 2
    ratios = (kept[:-1] / kept[1:]).clamp(min=c_1)
    grown = -ratios.log().flip(0).cumsum(0).flip(0)
    return torch.cat([grown.expm1().sqrt(), grown.new_zeros(1)])


AnyScalings = EDMScalings | ConsistencyScalings | VPScalings | VEScalings | IDDPMScalings


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
