"""The shapes of things: what a denoiser, a distance, an objective and a batch look like.

Every shape string of the package stands in this file. `b` is the batch; samples are images
`(b, channels, height, width)` or points `(b, dimension)`.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Samples = Float[Tensor, "b *shape"]  # data lies in [-1, 1]
PerSample = Float[Tensor, " b"]  # one number per sample: sigma, weight, distance
Labels = Int[Tensor, " b"]  # class numbers; `None` means unconditional
Grid = Float[Tensor, " n"]  # decreasing noise levels
Path = Float[Tensor, "n b *shape"]  # one point per level of a grid
Scalar = Float[Tensor, ""]
Vector = Float[Tensor, " d"]
Matrix = Float[Tensor, "d d"]
Weights = Float[Tensor, " k"]  # of a mixture of k components
Vectors = Float[Tensor, "k d"]
Matrices = Float[Tensor, "k d d"]


@runtime_checkable
class Denoiser(Protocol):
    """Estimates clean data from noisy data: D(x, sigma, label) -> x0.

    Teachers, students, targets, exact answers and guided models all have this one shape.
    """

    def __call__(self, x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        """The estimate of x0 for samples `x` at the noise levels `sigma`."""
        ...


@runtime_checkable
class FlowMap(Protocol):
    """Moves a point along its path: (x, sigma, sigma_next, label) -> x at sigma_next."""

    def __call__(
        self, x: Samples, sigma: PerSample, sigma_next: PerSample, label: Labels | None = None
    ) -> Samples:
        """The point at level `sigma_next` of the path that passes through `x` at `sigma`."""
        ...


@runtime_checkable
class Distance(Protocol):
    """Says how far each prediction is from its target, one number per sample.

    One that needs files may have a method `prepare(device)`, which a run calls before it begins.
    """

    def __call__(self, prediction: Samples, target: Samples) -> PerSample:
        """The distances, at least 0."""
        ...


@runtime_checkable
class Draws(Protocol):
    """A source of random numbers that is not a `torch.Generator`: see `PerImage`, `Replay`."""

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape of `like`."""
        ...

    def uniform(self, n: int) -> Tensor:
        """`n` numbers in [0, 1)."""
        ...

    def integers(self, n: int, high: int) -> Tensor:
        """`n` integers in 0 ... high - 1."""
        ...


Generator = torch.Generator | Draws  # what every argument called `generator` accepts


class Batch(NamedTuple):
    """Clean samples, and their classes if they have any.

    Attributes:
        x: Samples in [-1, 1], shape `(b, ...)`.
        label: Class numbers, int64, shape `(b,)`; or `None`.

    Source: ours.
    """

    x: Samples
    label: Labels | None = None


class Pair(NamedTuple):
    """Two points of one path, the noisier first.

    Attributes:
        x: The noisier point.
        sigma: Its noise level, shape `(b,)`.
        x_next: The cleaner point.
        sigma_next: Its noise level.

    Source: Song et al. (2023), Algorithms 2 and 3.
    """

    x: Samples
    sigma: PerSample
    x_next: Samples
    sigma_next: PerSample


@dataclass(frozen=True)
class Models:
    """Who takes part in a training step.

    Attributes:
        student: θ, learns.
        target: θ⁻, a frozen view or a moving average of the student; part of the algorithm.
        teacher: φ, a frozen diffusion model.

    Source: Song et al. (2023), Algorithm 2.
    """

    student: Denoiser
    target: Denoiser | None = None
    teacher: Denoiser | None = None


@dataclass(frozen=True)
class Loss:
    """One weighted regression, and enough to see where it hurts.

    Attributes:
        value: What the optimizer descends: the mean of `per_sample`.
        per_sample: The loss of each sample, without gradient.
        sigma: The noisier level of each sample.

    Source: ours.
    """

    value: Scalar
    per_sample: PerSample
    sigma: PerSample

    def detach(self) -> "Loss":
        """The same numbers without the graph behind them."""
        return replace(self, value=self.value.detach())


class Clock(NamedTuple):
    """Where training stands: step k of K.

    Attributes:
        step: k, from 0.
        steps: K.

    Source: Song et al. (2023), Algorithm 3.
    """

    step: int
    steps: int

    @property
    def progress(self) -> float:
        """The share of the training that is done, in [0, 1)."""
        return self.step / self.steps


@runtime_checkable
class Objective(Protocol):
    """What is trained, and how its target follows."""

    def __call__(self, models: Models, batch: Batch, *, clock: Clock, generator: Generator) -> Loss:
        """The loss of one step."""
        ...

    def target_decay(self, clock: Clock) -> float:
        """μ(k) of the moving average θ⁻; 0 means that θ⁻ is the student without gradient."""
        ...
