"""A finite data set as a world: what a model that remembers everything would answer."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cmbook.noise import integers, normal
from cmbook.oracle.integrate import integrate
from cmbook.oracle.worlds import SIGMA_END
from cmbook.protocols import Batch, Generator, Labels, PerSample, Samples

_TINY = 1e-150  # in place of a variance of 0


@dataclass(frozen=True, eq=False)
class Dataset:
    r"""The world whose law is a finite set of points $y_1 \dots y_n$, each equally likely.

    Its denoiser is the exact minimizer of the diffusion loss on this data:

    $$D(x, \sigma) = \sum_i y_i \operatorname{softmax}_i\Big(-\frac{\|x - y_i\|^2}{2\sigma^2}\Big)$$

    Its paths end on the points themselves, so a model that learned it perfectly would generate
    its training data and nothing else. The points are visited in chunks, and only their distances
    to one chunk are in memory at a time.

    Attributes:
        points: y, shape (n, *shape): points of the plane or images.
        label: Their classes, shape (n,). With a label, every method answers for that class alone.
        chunk: Points visited at a time.

    Raises:
        ValueError: If there is no point, one is not finite, labels do not fit, or the chunk is
            not positive; when called, if a label is asked for that no point has.

    Source: Karras et al. (2022), App. B.3: the ideal denoiser of a data set.
    """

    points: Samples
    label: Labels | None = None
    chunk: int = 4096

    def __post_init__(self) -> None:
        if not len(self.points) or self.chunk < 1:
            raise ValueError(
                f"a data set needs at least 1 point and chunks of at least 1; got "
                f"{len(self.points)} points, chunk={self.chunk}"
            )
        if not bool(torch.isfinite(self.points).all()):
            raise ValueError("points must be finite; some are NaN or infinite")
        fits = self.label is None or (
            self.label.shape == (len(self.points),) and int(self.label.min()) >= 0
        )
        if not fits:
            raise ValueError(
                f"labels must be {len(self.points)} numbers from 0, one for each point; got "
                f"{self.label}"
            )

    @property
    def std(self) -> float:
        """Root of the mean variance per coordinate."""
        return float(self.points.double().flatten(1).var(0, correction=0).mean().sqrt())

    def sample(self, n: int, sigma: float = 0.0, *, generator: Generator) -> Batch:
        """`n` of the points, drawn with replacement, at noise level `sigma`."""
        i = integers(n, len(self.points), generator).to(self.points.device)
        x = self.points[i].double()
        return Batch(
            x + sigma * normal(x, generator), None if self.label is None else self.label[i]
        )

    def denoiser(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        """E[x0 | x]: the points, weighed by how likely each made x."""
        rows = x.double().flatten(1)
        return self._posterior(rows, sigma.double(), label)[0].view_as(x).to(x.dtype)

    def score(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        """(D - x)/σ²."""
        rows = x.double().flatten(1)
        return self._score(rows, sigma.double(), label).view_as(x).to(x.dtype)

    def log_density(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> PerSample:
        """Log p_σ(x), or log p_σ(x | label)."""
        rows, level = x.double().flatten(1), sigma.double()
        n = self._counts(label, len(x))
        d = rows.shape[1]
        variance = (level**2).clamp(min=_TINY)
        log_sum = self._posterior(rows, level, label)[1]
        return (log_sum - n.log() - d / 2 * (2 * math.pi * variance).log()).to(x.dtype)

    def consistency(
        self,
        x: Samples,
        sigma: PerSample,
        label: Labels | None = None,
        *,
        sigma_end: float = SIGMA_END,
    ) -> Samples:
        """Where the path through x at σ is at `sigma_end`; x itself if σ is no larger."""
        return self.flow_map(x, sigma, sigma.clamp(max=sigma_end), label)

    def flow_map(
        self, x: Samples, sigma: PerSample, sigma_next: PerSample, label: Labels | None = None
    ) -> Samples:
        """Where the path through x at σ is at σ′."""

        def slope(rows: Tensor, log_sigma: Tensor, which: Tensor) -> Tensor:
            level = log_sigma.exp()
            own = None if label is None else label[which]
            return rows - self._posterior(rows, level, own)[0]  # dx/dlog σ = x - D

        start, end = (s.double().clamp(min=1e-9).log() for s in (sigma, sigma_next))
        return integrate(slope, x.double().flatten(1), start, end).view_as(x).to(x.dtype)

    def _score(self, rows: Tensor, sigma: Tensor, label: Labels | None) -> Tensor:
        denoised = self._posterior(rows, sigma, label)[0]
        return (denoised - rows) / (sigma**2).clamp(min=_TINY)[:, None]

    def _posterior(
        self, rows: Tensor, sigma: Tensor, label: Labels | None
    ) -> tuple[Tensor, Tensor]:
        """The posterior mean, and the log of the sum of exp(-|x - y|²/(2σ²)): one pass."""
        self._counts(label, len(rows))
        variance = (sigma**2).clamp(min=_TINY)[:, None]
        top = rows.new_full((len(rows), 1), -math.inf)
        total, pulled = torch.zeros_like(top), torch.zeros_like(rows)
        for points, classes in self._chunks():
            squared = rows.square().sum(1, keepdim=True) - 2 * rows @ points.T
            logits = -(squared + points.square().sum(1)).clamp(min=0) / (2 * variance)
            if label is not None and classes is not None:
                logits = logits.masked_fill(classes != label[:, None], -math.inf)
            higher = torch.maximum(top, logits.amax(1, keepdim=True))
            keep = (top - higher).exp().nan_to_num(0.0)  # -inf - -inf: nothing seen so far
            share = (logits - higher).exp().nan_to_num(0.0)
            total = keep * total + share.sum(1, keepdim=True)
            pulled = keep * pulled + share @ points
            top = higher
        return pulled / total, (top + total.log())[:, 0]

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for i in range(0, len(self.points), self.chunk):
            label = None if self.label is None else self.label[i : i + self.chunk]
            yield self.points[i : i + self.chunk].double().flatten(1), label

    def _counts(self, label: Labels | None, n: int) -> Tensor:
        """How many points each row may come from."""
        if label is None:
            return torch.full((n,), len(self.points), dtype=torch.float64)
        if self.label is None:
            raise ValueError("this data set has no labels; call it without one")
        unknown = ~torch.isin(label, self.label)
        if bool(unknown.any()):
            raise ValueError(f"no point has the label {int(label[unknown][0])}")
        counts = self.label.bincount()[label]
        return counts.double()
