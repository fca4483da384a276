"""Noise: the range of its levels, the one way to add it, and the one way to draw it.

Nothing in cmbook is random unless it is handed a `generator`, and every draw goes through
`normal`, `uniform` and `integers` below. So a run repeats exactly, a step replays alone, and
recorded draws can be fed through the public interface.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmbook.protocols import Generator, Grid, PerSample, Samples
from cmbook.schedules import karras_sigmas

FAR = 1e12  # from 1: squares of noise levels, and their inverses, are still numbers of float32


@dataclass(frozen=True)
class NoiseRange:
    """The noise levels of a model, written once and shared by everything that needs them.

    Attributes:
        sigma_min: ε, where paths end: 0.002 in the paper.
        sigma_max: T, where paths begin: 80 in the paper.
        rho: How strongly a grid is denser near the data.
        sigma_data: The standard deviation of the data, over all samples and coordinates.

    Raises:
        ValueError: If not `0 < sigma_min < sigma_max`, or `rho` or `sigma_data` is not positive;
            or if they lie so far from 1 that their squares leave float32.

    Source: Karras et al. (2022), Table 1; Song et al. (2023), §2 and App. C.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        self.grid(2)
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive; got {self.sigma_data}")
        sizes = (self.sigma_min, self.sigma_max, self.sigma_data)
        if not 1 / FAR <= min(sizes) <= max(sizes) <= FAR or self.rho > 1000:
            raise ValueError(
                f"noise levels must lie in {1 / FAR:g} ... {FAR:g}, and rho in 0.1 ... 1000; "
                f"got {self}"
            )

    def grid(self, levels: int) -> Grid:
        """`levels` decreasing noise levels from `sigma_max` to `sigma_min`, in float64."""
        return karras_sigmas(levels, self.sigma_min, self.sigma_max, self.rho)

    def warp(self, u: PerSample) -> tuple[PerSample, PerSample]:
        r"""The grid made continuous: τ(u) and τ'(u), from `sigma_min` at u = 0 to `sigma_max` at 1.

        $$\tau(u) = \big(\epsilon^{1/\rho} + u\,(T^{1/\rho} - \epsilon^{1/\rho})\big)^\rho$$
        """
        low, high = (end ** (1 / self.rho) for end in (self.sigma_min, self.sigma_max))
        root = low + u * (high - low)
        return root**self.rho, self.rho * (high - low) * root ** (self.rho - 1)


def expand(value: PerSample, like: Samples) -> Tensor:
    """One number per sample, shaped and typed to multiply samples: `(b,)` becomes `(b, 1, ...)`.

    Source: ours.
    """
    return value.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Samples, noise: Samples, sigma: PerSample) -> Samples:
    r"""Clean data at noise level σ: $x = x_0 + \sigma z$.

    Source: Song et al. (2023), §2.
    """
    return x0 + expand(sigma, x0) * noise


def seeded(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is a function of its keys alone.

    `seeded(0)` is the plain seed 0. More keys name a stream of their own, as in
    `seeded(seed, "data", epoch)`: streams of different keys have nothing in common.

    Raises:
        ValueError: Without keys.

    Source: ours.
    """
    if not keys:
        raise ValueError("seeded() needs at least one key, for example seeded(0)")
    generator = torch.Generator(device)
    if len(keys) == 1 and isinstance(keys[0], int):
        return generator.manual_seed(keys[0])
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return generator.manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(like: Samples, generator: Generator) -> Samples:
    """Standard normal numbers of the shape, dtype and device of `like`.

    They are drawn where the generator lives, so a CPU generator gives the same numbers on
    every device.

    Source: ours.
    """
    if isinstance(generator, torch.Generator):
        drawn = torch.randn(
            like.shape, generator=generator, device=generator.device, dtype=like.dtype
        )
    else:
        drawn = generator.normal(like)
    return drawn.to(like)


def uniform(n: int, generator: Generator) -> PerSample:
    """`n` float32 numbers, uniform in [0, 1), on the generator's device.

    Source: ours.
    """
    if isinstance(generator, torch.Generator):
        return torch.rand(n, generator=generator, device=generator.device)
    return generator.uniform(n)


def integers(n: int, high: int, generator: Generator) -> Tensor:
    """`n` integers, uniform in 0 ... high - 1, on the generator's device.

    Source: ours.
    """
    if isinstance(generator, torch.Generator):
        return torch.randint(high, (n,), generator=generator, device=generator.device)
    return generator.integers(n, high)


def choose(n: int, weights: Tensor, generator: Generator) -> Tensor:
    """`n` indices drawn with the given weights: a uniform draw through the inverse CDF.

    Source: ours.
    """
    cdf = weights.double().cumsum(0)
    drawn = uniform(n, generator).double().to(cdf.device) * cdf[-1]
    return torch.searchsorted(cdf, drawn, right=True).clamp(max=len(weights) - 1)


def shuffled(n: int, generator: Generator) -> Tensor:
    """The integers 0 ... n - 1 in random order.

    Source: ours.
    """
    return uniform(n, generator).argsort(stable=True)


class PerImage:
    """One generator per image, so that an image does not depend on the batch it is drawn in.

    Example:
        >>> together = normal(torch.empty(3, 2), PerImage([5, 6, 7]))
        >>> alone = normal(torch.empty(1, 2), PerImage([6]))
        >>> torch.equal(together[1:2], alone)
        True

    Source: Karras et al. (2022), released code; written anew.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.generators = [seeded(seed, device=device) for seed in seeds]

    def normal(self, like: Tensor) -> Tensor:
        """One image per seed, each from its own stream."""
        return self._each(len(like), lambda g: normal(like[:1], g))

    def uniform(self, n: int) -> Tensor:
        """One number per seed."""
        return self._each(n, lambda g: uniform(1, g))

    def integers(self, n: int, high: int) -> Tensor:
        """One integer per seed."""
        return self._each(n, lambda g: integers(1, high, g))

    def _each(self, n: int, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        if n != len(self.generators):
            raise ValueError(f"PerImage holds {len(self.generators)} seeds; asked for {n} images")
        return torch.cat([draw(generator) for generator in self.generators])


class Replay:
    """Recorded draws, given back in the order in which they were made: one queue a kind.

    Shapes are checked. Random masks of dropout are not draws of this kind: under `Replay` a
    network must have dropout 0.

    Example:
        >>> normal(torch.empty(2, 1), Replay(normals=[torch.ones(2, 1)])).tolist()
        [[1.0], [1.0]]

    Raises:
        ValueError: When a queue is empty, or the shape asked for is not the recorded one.

    Source: ours.
    """

    def __init__(
        self,
        normals: Sequence[Tensor] = (),
        uniforms: Sequence[Tensor] = (),
        integers: Sequence[Tensor] = (),
    ) -> None:
        self.queues = {
            "normal": list(normals),
            "uniform": list(uniforms),
            "integer": list(integers),
        }

    def normal(self, like: Tensor) -> Tensor:
        """The next recorded noise."""
        return self._next("normal", like.shape)

    def uniform(self, n: int) -> Tensor:
        """The next recorded uniform numbers."""
        return self._next("uniform", (n,))

    def integers(self, n: int, high: int) -> Tensor:
        """The next recorded integers, which must lie in 0 ... high - 1."""
        drawn = self._next("integer", (n,))
        if len(drawn) and not 0 <= int(drawn.min()) <= int(drawn.max()) < high:
            raise ValueError(
                f"recorded integers must lie in 0 ... {high - 1}; got {drawn.tolist()}"
            )
        return drawn

    def _next(self, kind: str, shape: Sequence[int]) -> Tensor:
        if not self.queues[kind]:
            raise ValueError(
                f"no recorded {kind} draw is left; one of {tuple(shape)} was asked for"
            )
        drawn = self.queues[kind].pop(0)
        if drawn.shape != torch.Size(shape):
            raise ValueError(
                f"the next recorded {kind} draw is {tuple(drawn.shape)}; "
                f"{tuple(shape)} was asked for"
            )
        return drawn


@dataclass(frozen=True)
class LogNormal:
    """σ whose logarithm is normal: how EDM picks the noise levels it trains on.

    Attributes:
        mean: Of ln σ (P_mean).
        std: Of ln σ (P_std).

    Source: Karras et al. (2022), Table 1 (P_mean, P_std).
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"expected a finite mean and std > 0; got {self.mean}, {self.std}")

    def __call__(self, n: int, generator: Generator) -> PerSample:
        """`n` noise levels, float32, on the generator's device."""
        device: Any = getattr(generator, "device", "cpu")
        return (self.mean + self.std * normal(torch.empty(n, device=device), generator)).exp()
