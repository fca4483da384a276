"""Guidance with exact answers: what it does to the denoiser, to the paths and to the law."""

import math
from dataclasses import dataclass

from torch import Tensor

from cmbook.guidance import guided
from cmbook.oracle.integrate import integrate
from cmbook.oracle.worlds import SIGMA_END, GaussianMixture
from cmbook.protocols import Batch, Generator, Labels, PerSample, Samples


@dataclass(frozen=True, eq=False)
class Guided:
    r"""A labelled world, guided: its denoiser is $D + w\,(D_c - D)$, exactly.

    The guided score $\nabla\log p_\sigma + w\,(\nabla\log p_\sigma(\cdot\,|\,c) - \nabla\log
    p_\sigma)$ belongs, at each noise level alone, to the law $p_\sigma^{1-w}\,
    p_\sigma(\cdot\,|\,c)^w$. But these laws are not one law with more and more noise, so the end
    of the guided paths has neither that law at σ = 0 nor any other simple one: the samples must
    be drawn to be seen. `consistency` draws them exactly.

    Attributes:
        world: A mixture with classes.
        scale: w; 1 is the conditional world, 0 the unconditional one, more exaggerates.

    Source: Ho and Salimans (2022), eq. 6, where w is our w - 1; Bradley and Nakkiran (2024) for
        what it does not sample.
    """

    world: GaussianMixture
    scale: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite; got {self.scale}")

    @property
    def std(self) -> float:
        """That of the world: guidance does not change the unit of distances."""
        return self.world.std

    def sample(self, n: int, sigma: float = 0.0, *, generator: Generator) -> Batch:
        """`n` points at noise level `sigma`, on guided paths that begin in the world's noise at 80.

        There the classes hardly differ, and guidance changes nothing yet.
        """
        start = max(80.0, sigma)
        x, label = self.world.sample(n, start, generator=generator)
        top, bottom = (x.new_full((n,), level) for level in (start, sigma))
        return Batch(self.flow_map(x, top, bottom, label), label)

    def denoiser(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        """The guided `Denoiser`."""
        return guided(self.world.denoiser, self.scale)(x, sigma, label)

    def score(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        """(D - x)/σ² with the guided D."""
        return guided(self.world.score, self.scale)(x, sigma, label)

    def consistency(
        self,
        x: Samples,
        sigma: PerSample,
        label: Labels | None = None,
        *,
        sigma_end: float = SIGMA_END,
    ) -> Samples:
        """Where the guided path through x at σ is at `sigma_end`."""
        return self.flow_map(x, sigma, sigma.clamp(max=sigma_end), label)

    def flow_map(
        self, x: Samples, sigma: PerSample, sigma_next: PerSample, label: Labels | None = None
    ) -> Samples:
        """Where the guided path through x at σ is at σ′."""

        def slope(points: Tensor, log_sigma: Tensor, rows: Tensor) -> Tensor:
            level = log_sigma.exp()
            own = None if label is None else label[rows]
            return -(level[:, None] ** 2) * self.score(points, level, own)

        start, end = (s.double().clamp(min=1e-9).log() for s in (sigma, sigma_next))
        return integrate(slope, x.double(), start, end).to(x.dtype)
