"""Worlds with exact answers: the ground truth that models, samplers and losses are held against.

A world knows its denoiser, score, density and consistency function at every noise level. These
have the types of networks, `Denoiser` and `FlowMap`, so nothing can tell them from a model.
Everything is computed in float64 and handed back in the dtype of `x`.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cmbook.noise import choose, normal
from cmbook.oracle.integrate import integrate
from cmbook.protocols import (
    Batch,
    Generator,
    Labels,
    Matrices,
    Matrix,
    PerSample,
    Samples,
    Vector,
    Vectors,
    Weights,
)

_TINY = 1e-150  # in place of a variance of 0: a point mass without noise
SIGMA_END = 0.002  # ε of the paper: where the consistency functions below end, unless told


@runtime_checkable
class Paths(Protocol):
    """Points, and the paths they take: all that a distance to the truth needs."""

    @property
    def std(self) -> float:
        """The standard deviation of the data, per coordinate: the unit of every distance."""
        ...

    def sample(self, n: int, sigma: float = 0.0, *, generator: Generator) -> Batch:
        """`n` points at noise level `sigma`, and the class each comes from."""
        ...

    def denoiser(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        """The posterior mean E[x0 | x]: the exact `Denoiser`."""
        ...

    def consistency(
        self,
        x: Samples,
        sigma: PerSample,
        label: Labels | None = None,
        *,
        sigma_end: float = SIGMA_END,
    ) -> Samples:
        """The exact consistency function: where the path through x ends."""
        ...

    def flow_map(
        self, x: Samples, sigma: PerSample, sigma_next: PerSample, label: Labels | None = None
    ) -> Samples:
        """The point of the path at another level: the exact `FlowMap`."""
        ...


@runtime_checkable
class World(Paths, Protocol):
    """What every world offers. `label`, where given, restricts the world to one class."""

    def score(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        """The gradient of the log density."""
        ...

    def log_density(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> PerSample:
        """Log p_σ(x)."""
        ...


@dataclass(frozen=True, eq=False)
class Gaussian:
    r"""One Gaussian $N(m, \Sigma)$: every answer in closed form.

    Along an eigenvector of Σ with eigenvalue l, paths are
    $x(\sigma') - m = (x(\sigma) - m)\sqrt{(l + \sigma'^2)/(l + \sigma^2)}$.

    Attributes:
        mean: m, shape (d,).
        covariance: Σ, shape (d, d), symmetric and positive semidefinite.

    Raises:
        ValueError: If shapes do not fit or the covariance is not symmetric and positive.

    Source: Song et al. (2023), eq. 2, solved for Gaussian data.
    """

    mean: Vector
    covariance: Matrix

    def __post_init__(self) -> None:
        _check_covariances(self.covariance, self.mean)

    @classmethod
    def isotropic(cls, mean: Tensor | list[float], std: float) -> "Gaussian":
        """N(mean, std² I)."""
        m = torch.as_tensor(mean, dtype=torch.float64)
        return cls(m, std**2 * torch.eye(len(m), dtype=torch.float64))

    @property
    def std(self) -> float:
        """Root of the mean variance per coordinate."""
        return float(self._lengths.mean().sqrt())

    def sample(self, n: int, sigma: float = 0.0, *, generator: Generator) -> Batch:
        """`n` points of N(m, Σ + σ² I); the label of all is 0."""
        noise = normal(self.mean.new_empty(n, len(self.mean)).double(), generator)
        scaled = noise * (self._lengths + sigma**2).sqrt()
        return Batch(self.mean + scaled @ self._axes.T, torch.zeros(n, dtype=torch.int64))

    def denoiser(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        r"""$m + \Sigma(\Sigma + \sigma^2 I)^{-1}(x - m)$."""
        return self._scaled(x, self._lengths / self._variance(sigma))

    def score(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        r"""$(\Sigma + \sigma^2 I)^{-1}(m - x)$."""
        return self._scaled(x, -1 / self._variance(sigma), shift=False)

    def log_density(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> PerSample:
        r"""$\log N(x; m, \Sigma + \sigma^2 I)$."""
        along, variance = (x.double() - self.mean) @ self._axes, self._variance(sigma)
        return _log_normal(along, variance).to(x.dtype)

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
        return self._scaled(x, (self._variance(sigma_next) / self._variance(sigma)).sqrt())

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        lengths, axes = torch.linalg.eigh(self.covariance.double())
        return lengths.clamp(min=0), axes

    @property
    def _lengths(self) -> Tensor:
        return self._eigen[0]

    @property
    def _axes(self) -> Tensor:
        return self._eigen[1]

    def _variance(self, sigma: PerSample) -> Tensor:
        return (self._lengths + sigma.double()[:, None] ** 2).clamp(min=_TINY)

    def _scaled(self, x: Samples, factors: Tensor, shift: bool = True) -> Samples:
        """Stretch x - m along the axes of Σ, and put m back."""
        moved = ((x.double() - self.mean) @ self._axes * factors) @ self._axes.T
        return (moved + self.mean if shift else moved).to(x.dtype)


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    r"""A mixture $\sum_k w_k N(m_k, \Sigma_k)$ in any dimension.

    Density, score and denoiser are closed forms. Paths are integrated in log σ by a Runge-Kutta
    pair of order 8 whose step adapts to each point alone: over 10,000 points of the marginal
    the endpoint is right to 1e-8 in the median and 1e-6 at worst. On one core they take about 2
    seconds for 8 round components in 2-D, and some 15 seconds for 128.

    Two neighbors on either side of a *seam* between modes end in different modes. Near seams
    the Jacobian of the consistency function is large (its norm exceeds 10, and has no bound as
    components grow narrow): there no network, and no float32 input, can be exact.
    `consistency_jacobian` tells where.

    Attributes:
        weights: w, shape (k,), positive; normalized to sum 1.
        means: m, shape (k, d).
        covariances: Σ, shape (k, d, d).
        classes: The class of each component, shape (k,), numbered from 0; by default each
            component is a class of its own. With a label, every method answers for that class
            alone: the exact class-conditional world.

    Raises:
        ValueError: If shapes do not fit, weights are not positive, covariances not symmetric
            and positive semidefinite, or a class has no component; when called, if a label names
            no class.

    Source: Song et al. (2023), eq. 2, with the score of a Gaussian mixture; the solver is that
        of Hairer, Nørsett and Wanner (1993), DOP853, with scipy's coefficients.
    """

    weights: Weights
    means: Vectors
    covariances: Matrices
    classes: Labels | None = None

    def __post_init__(self) -> None:
        if not bool(((self.weights > 0) & self.weights.isfinite()).all()):
            raise ValueError(f"weights must be positive and finite; got {self.weights.tolist()}")
        _check_covariances(self.covariances, self.means)
        if self.classes is not None:
            found = self.classes.unique()
            if self.classes.shape != self.weights.shape or not torch.equal(
                found, torch.arange(len(found), device=found.device)
            ):
                raise ValueError(
                    f"classes must be {len(self.weights)} numbers that use 0, 1, 2, ... without "
                    f"a gap; got {self.classes.tolist()}"
                )

    @classmethod
    def isotropic(
        cls,
        means: Tensor,
        std: float | Tensor,
        weights: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> "GaussianMixture":
        """Round components: `std` is one number or one per component."""
        k, d = means.shape
        variance = torch.as_tensor(std, dtype=torch.float64).expand(k)[:, None, None] ** 2
        equal = torch.full((k,), 1 / k, dtype=torch.float64)
        eye = torch.eye(d, dtype=torch.float64)
        return cls(equal if weights is None else weights, means.double(), variance * eye, classes)

    @property
    def std(self) -> float:
        """Root of the mean variance per coordinate: within components, and between them."""
        share, means = self._log_weights.exp(), self.means.double()
        between = share @ (means - share @ means).square().mean(1)
        return float((share @ self._lengths.mean(1) + between).sqrt())

    @cached_property
    def n_classes(self) -> int:
        """How many classes there are."""
        return len(self.weights) if self.classes is None else int(self.classes.max()) + 1

    def sample(self, n: int, sigma: float = 0.0, *, generator: Generator) -> Batch:
        """`n` points at noise level `sigma`, and the class that each comes from."""
        part = choose(n, self.weights, generator).to(self.means.device)
        noise = normal(self.means.new_empty(n, self.means.shape[1]).double(), generator)
        scaled = noise * (self._lengths[part] + sigma**2).sqrt()
        turned = torch.einsum("bij,bj->bi", self._axes[part], scaled)
        return Batch(self.means.double()[part] + turned, self._class_of[part])

    def denoiser(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        """E[x0 | x], by Tweedie's formula: x + σ² score."""
        wide, level = x.double(), sigma.double()
        return (wide + level[:, None] ** 2 * self._score(wide, level, label)).to(x.dtype)

    def score(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        """The components' scores, weighted by how likely each made x."""
        return self._score(x.double(), sigma.double(), label).to(x.dtype)

    def log_density(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> PerSample:
        """Log p_σ(x), or log p_σ(x | label)."""
        joint, _ = self._parts(x.double(), sigma.double(), label)
        return joint.logsumexp(1).to(x.dtype)

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
        """Where the path through x at σ is at σ′, cleaner or noisier.

        Levels below 1e-9 count as 1e-9: log σ must be finite, and the path moves no more there.
        """

        def slope(points: Tensor, log_sigma: Tensor, rows: Tensor) -> Tensor:
            level = log_sigma.exp()  # dx/dlog σ = σ (x - D)/σ = -σ² score
            some = None if label is None else label[rows]
            return -(level[:, None] ** 2) * self._score(points, level, some)

        start, end = (s.double().clamp(min=1e-9).log() for s in (sigma, sigma_next))
        return integrate(slope, x.double(), start, end).to(x.dtype)

    def consistency_jacobian(
        self, x: Samples, sigma: PerSample, *, sigma_end: float = SIGMA_END
    ) -> Tensor:
        """The Jacobian of the consistency function, shape (b, d, d).

        Its 2-norm, `torch.linalg.matrix_norm(J, 2)`, is the factor by which an error in x grows.
        It is the path's own linearization, integrated beside it.
        """
        d = self.means.shape[1]

        def slope(state: Tensor, log_sigma: Tensor, rows: Tensor) -> Tensor:
            points, level = state[:, :d], log_sigma.exp()
            score, hessian = self._score_and_hessian(points, level)
            spread = hessian @ state[:, d:].unflatten(1, (d, d))
            return -(level[:, None] ** 2) * torch.cat([score, spread.flatten(1)], 1)

        eye = torch.eye(d, dtype=torch.float64, device=x.device).flatten().expand(len(x), -1)
        start = sigma.double().clamp(min=1e-9).log()
        state = integrate(
            slope, torch.cat([x.double(), eye], 1), start, start.clamp(max=math.log(sigma_end))
        )
        jacobian: Tensor = state[:, d:].unflatten(1, (d, d))
        return jacobian

    def _score(self, x: Tensor, sigma: Tensor, label: Labels | None) -> Tensor:
        if self._round is not None:
            return self._round_score(x, sigma, label, self._round)
        joint, pull = self._parts(x, sigma, label)
        weighted = (joint.softmax(1)[:, :, None] * pull).flatten(1)
        return -weighted @ self._axes.transpose(1, 2).flatten(0, 1)

    def _score_and_hessian(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The first and second derivatives of log p_σ, shapes (b, d) and (b, d, d).

        With the pulls p_k = (Σ_k + σ² I)⁻¹(m_k - x), the second is the spread of the pulls less
        the mean of the (Σ_k + σ² I)⁻¹.
        """
        joint, pull = self._parts(x, sigma, None)
        share = joint.softmax(1)[:, :, None]
        pulls = -torch.einsum("kde,bke->bkd", self._axes, pull)
        score = (share * pulls).sum(1)
        apart = pulls - score[:, None]
        variance = (self._lengths + (sigma**2)[:, None, None]).clamp(min=_TINY)
        axes = torch.einsum("kde,kfe->kedf", self._axes, self._axes).flatten(2).flatten(0, 1)
        stiff = ((share / variance).flatten(1) @ axes).view(-1, *self._axes.shape[1:])
        return score, (share * apart).mT @ apart - stiff

    def _round_score(
        self, x: Tensor, sigma: Tensor, label: Labels | None, variances: Tensor
    ) -> Tensor:
        """The same without axes: k numbers a point in place of k vectors, several times faster."""
        means, variance = self.means.double(), (variances + (sigma**2)[:, None]).clamp(min=_TINY)
        squared = x.square().sum(1, keepdim=True) - 2 * x @ means.T + means.square().sum(1)
        joint = self._prior(label) - 0.5 * (squared / variance + x.shape[1] * variance.log())
        pull = joint.softmax(1) / variance
        return pull @ means - pull.sum(1, keepdim=True) * x

    def _parts(self, x: Tensor, sigma: Tensor, label: Labels | None) -> tuple[Tensor, Tensor]:
        """Log w_k N(x; m_k, Σ_k + σ² I), and (Σ_k + σ² I)⁻¹(x - m_k) along each Σ_k's axes."""
        along = (x @ self._axes.permute(1, 0, 2).flatten(1) - self._centers).unflatten(
            1, self.means.shape
        )
        variance = (self._lengths + (sigma**2)[:, None, None]).clamp(min=_TINY)
        return self._prior(label) + _log_normal(along, variance), along / variance

    def _prior(self, label: Labels | None) -> Tensor:
        """Log w, or for every labelled row log w within its class: -inf outside."""
        if label is None:
            return self._log_weights
        if label.numel() and not 0 <= int(label.min()) <= int(label.max()) < self.n_classes:
            raise ValueError(
                f"labels must lie in 0 ... {self.n_classes - 1}; got "
                f"{int(label.min())} ... {int(label.max())}"
            )
        return self._log_weights_within[label]

    @cached_property
    def _class_of(self) -> Tensor:
        """The class of each component."""
        own = torch.arange(len(self.weights), device=self.means.device)
        return own if self.classes is None else self.classes.to(own)

    @cached_property
    def _log_weights_within(self) -> Tensor:
        """Log w_k within class c, shape (classes, k)."""
        inside = self._class_of == torch.arange(self.n_classes, device=self.means.device)[:, None]
        joint = self._log_weights.masked_fill(~inside, -math.inf)
        return joint - joint.logsumexp(1, keepdim=True)

    @cached_property
    def _round(self) -> Tensor | None:
        """The variance of each component, if all are round."""
        least, most = self._lengths.aminmax(dim=1)
        return least if bool((most - least <= 1e-14).all()) else None

    @cached_property
    def _log_weights(self) -> Tensor:
        return (self.weights.double() / self.weights.double().sum()).log()

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        lengths, axes = torch.linalg.eigh(self.covariances.double())
        return lengths.clamp(min=0), axes

    @property
    def _lengths(self) -> Tensor:
        return self._eigen[0]

    @property
    def _axes(self) -> Tensor:
        return self._eigen[1]

    @cached_property
    def _centers(self) -> Tensor:
        return torch.einsum("kd,kde->ke", self.means.double(), self._axes).flatten()


def _log_normal(along: Tensor, variance: Tensor) -> Tensor:
    """The log density of independent normal numbers along the last axis."""
    d = along.shape[-1]
    quadratic = (along.square() / variance).sum(-1)
    return -0.5 * (quadratic + variance.log().sum(-1) + d * math.log(2 * math.pi))


def _check_covariances(covariances: Tensor, means: Tensor) -> None:
    d = means.shape[-1]
    if covariances.shape != (*means.shape, d):
        raise ValueError(
            f"means of shape {tuple(means.shape)} need covariances of shape "
            f"{(*means.shape, d)}; got {tuple(covariances.shape)}"
        )
    if not bool(means.isfinite().all() and covariances.isfinite().all()):
        raise ValueError("means and covariances must be finite; some are NaN or infinite")
    symmetric = torch.allclose(covariances, covariances.mT)
    least = float(torch.linalg.eigvalsh(covariances.double()).min())
    if not symmetric or least < -1e-12:
        raise ValueError(
            "covariances must be symmetric and positive semidefinite; "
            f"the least eigenvalue is {least:.3g}"
        )
