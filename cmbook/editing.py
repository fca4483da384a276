r"""Zero-shot editing: Algorithm 4 of Song et al. (2023) as one projection.

What is known of an image is a linear measurement y = A x. After every jump to the data, what was
measured is put back and the rest is kept:

$$x_0 \leftarrow x_0 + A^+(y - A x_0)$$

The paper writes the same with an orthogonal matrix and a mask: rotate, so that what is known
becomes some of the coordinates, replace these, rotate back (`orthogonal_basis`).

This is replacement, not sampling from the posterior: the samples agree with y exactly, but with
any practical number of levels the rest of them does not follow the law of x given y. On a Gaussian
the difference can be computed, and falls about like 1/N; notebook 07 does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from cmbook.noise import NoiseRange, normal
from cmbook.protocols import (
    Denoiser,
    Generator,
    Grid,
    Labels,
    Matrix,
    Path,
    PerSample,
    Samples,
    Vector,
)
from cmbook.samplers import multistep, one_step
from cmbook.schedules import check_decreasing

LUMINANCE = (0.2989, 0.5870, 0.1140)
STROKE_SIGMAS = (5.38, 2.24)  # levels 16 and 20 of the paper's 40


@runtime_checkable
class Measurement(Protocol):
    """A linear map A, and its pseudo-inverse."""

    def __call__(self, x: Samples) -> Any:
        """Y = A x: a tensor whose first axis is the batch, or a tuple of them."""
        ...

    def pinv(self, y: Any) -> Samples:
        """A⁺ y: of all x with A x = y the one nearest to 0."""
        ...


@dataclass(frozen=True, eq=False)
class Inpainting:
    """Some pixels are known.

    Attributes:
        known: Where, as booleans that broadcast to the images: `(h, w)`, `(c, h, w)` or
            `(b, c, h, w)`. The paper's Ω is the opposite: 1 where pixels are to be made.

    Raises:
        ValueError: If `known` is not boolean, or all or no pixels are known; when called, if it
            does not fit the images.

    Source: Song et al. (2023), App. D, inpainting.
    """

    known: Tensor

    def __post_init__(self) -> None:
        if self.known.dtype != torch.bool:
            raise ValueError(
                f"known must be boolean, True where the image is kept; got {self.known.dtype}. "
                "Write mask > 0.5"
            )
        share = float(self.known.double().mean())
        if share in (0.0, 1.0):
            raise ValueError(
                f"{'every' if share else 'no'} pixel is known: "
                + ("nothing is left to fill in" if share else "draw a sample instead")
            )

    def __call__(self, x: Samples) -> Samples:
        """The image with 0 where it is not known."""
        sides = zip(self.known.shape[::-1], x.shape[::-1], strict=False)
        if self.known.ndim > x.ndim or any(k not in (1, side) for k, side in sides):
            raise ValueError(
                f"known has shape {tuple(self.known.shape)}, the images {tuple(x.shape)}; expected "
                "(h, w), (c, h, w) or (b, c, h, w) of these images"
            )
        return torch.where(self.known.to(x.device), x, torch.zeros_like(x))

    def pinv(self, y: Samples) -> Samples:
        """The same."""
        return self(y)


@dataclass(frozen=True)
class Grayscale:
    """The brightness of a color image is known, of shape (b, 1, h, w).

    Attributes:
        weights: How much each channel counts.

    Raises:
        ValueError: When called, if an image has not one channel for each weight, or y has more
            than one.

    Source: Song et al. (2023), App. D, colorization.
    """

    weights: tuple[float, ...] = LUMINANCE

    def __call__(self, x: Samples) -> Tensor:
        """The weighted sum of the channels."""
        if x.ndim != 4 or x.shape[1] != len(self.weights):
            raise ValueError(
                f"expected images (b, {len(self.weights)}, h, w), a channel for each weight; got "
                f"{tuple(x.shape)}"
            )
        return (x * self._column(x)).sum(1, keepdim=True)

    def pinv(self, y: Tensor) -> Samples:
        """The shortest color with this brightness: along the weights."""
        if y.ndim != 4 or y.shape[1] != 1:
            raise ValueError(
                f"expected the brightness of images, (b, 1, h, w); got {tuple(y.shape)}. Of color "
                "images it is measure(images)"
            )
        column = self._column(y)
        return y * column / column.square().sum()

    def _column(self, like: Tensor) -> Tensor:
        return torch.tensor(self.weights, dtype=like.dtype, device=like.device)[:, None, None]


@dataclass(frozen=True)
class Downsampling:
    """The mean of every patch is known: an image of 1/`factor` of the side.

    Attributes:
        factor: Side of a patch, in pixels.

    Raises:
        ValueError: If the factor is below 2; when called, if patches do not tile the images.

    Source: Song et al. (2023), App. D, super-resolution.
    """

    factor: int

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"factor must be at least 2; got {self.factor}")

    def __call__(self, x: Samples) -> Tensor:
        """The means."""
        if x.ndim != 4 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"patches of {self.factor}x{self.factor} do not tile {tuple(x.shape)}; expected "
                "images (b, c, h, w) with sides divisible by the factor"
            )
        return F.avg_pool2d(x, self.factor)

    def pinv(self, y: Tensor) -> Samples:
        """Every mean, repeated over its patch."""
        if y.ndim != 4:
            raise ValueError(
                f"expected the means of patches, (b, c, h, w); got {tuple(y.shape)}. Of images "
                f"they are measure(images), {self.factor} times smaller"
            )
        return y.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


@dataclass(frozen=True, eq=False)
class Linear:
    """Any linear measurement: the rows of a matrix, each a question about the flattened sample.

    Attributes:
        matrix: A, shape (m, d), for samples of d numbers.
        shape: Of one sample.
        tolerance: How far y may be from what any sample measures, in units of the longest row.

    Raises:
        ValueError: If the matrix does not fit the shape; when used, if y does not fit the matrix,
            or no sample has these measurements.

    Source: Song et al. (2023), Algorithm 4, whose A is the full rotation.
    """

    matrix: Tensor
    shape: tuple[int, ...]
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or self.matrix.shape[1] != math.prod(self.shape):
            raise ValueError(
                f"samples of shape {self.shape} need a matrix of {math.prod(self.shape)} columns; "
                f"got shape {tuple(self.matrix.shape)}"
            )

    def __call__(self, x: Samples) -> Tensor:
        """A x, shape (b, m)."""
        y: Tensor = x.flatten(1) @ self.matrix.to(x).T
        return y

    def pinv(self, y: Tensor) -> Samples:
        """A⁺ y; found in float64."""
        if y.ndim != 2 or y.shape[1] != len(self.matrix):
            raise ValueError(
                f"a matrix of {len(self.matrix)} rows measures (b, {len(self.matrix)}); got "
                f"{tuple(y.shape)}"
            )
        a = self.matrix.to(y.device, torch.float64)
        # What a float32 matrix says twice, it says twice but for its rounding.
        rounding = torch.finfo(torch.promote_types(self.matrix.dtype, torch.float32)).eps
        x = y.double() @ torch.linalg.pinv(a, rtol=max(a.shape) * rounding).T
        off, longest = float((x @ a.T - y).abs().amax()), float(a.norm(dim=1).amax())
        if not off <= self.tolerance * longest:
            raise ValueError(
                f"no sample has these measurements: the nearest misses them by {off:.2g}. Rows "
                "that depend on each other must agree; do all come from one sample? If so, allow a "
                "larger tolerance"
            )
        found: Samples = x.to(y.dtype).unflatten(1, self.shape)
        return found


@dataclass(frozen=True, eq=False)
class Both:
    """Two measurements of one image, y being a pair.

    Putting back one and then the other is no projection onto both, unless they commute (a mask
    and brightness do, a mask and patch means need not). So the two take turns until both hold;
    that leads to the projection, fast if they nearly commute.

    Attributes:
        first: A measurement.
        second: Another; it may itself be `Both`.
        tolerance: How well both must hold, in units of the image.
        sweeps: Most turns.

    Raises:
        ValueError: When used, if no image has both measurements.

    Source: ours; von Neumann's alternating projections.
    """

    first: Measurement
    second: Measurement
    tolerance: float = 1e-6
    sweeps: int = 2000

    def __call__(self, x: Samples) -> tuple[Any, Any]:
        """Both measurements."""
        return self.first(x), self.second(x)

    def pinv(self, y: tuple[Any, Any]) -> Samples:
        """The image nearest to 0 that has both measurements; found in float64."""
        dtype, y = _first(y).dtype, _double(y)
        x = self.first.pinv(y[0])
        for _ in range(self.sweeps):
            x = x + self.second.pinv(minus(y[1], self.second(x)))
            back = self.first.pinv(minus(y[0], self.first(x)))
            if float(back.abs().amax()) <= self.tolerance / 2:
                return (x + back).to(dtype)
            x = x + back
        off = float(self.second.pinv(minus(y[1], self.second(x))).abs().amax())
        if off <= self.tolerance:
            return x.to(dtype)
        raise ValueError(
            f"after {self.sweeps} turns the measurements still disagree by {off:.2g}: do they come "
            "from one image? If so, allow more sweeps or a larger tolerance"
        )


def minus(y: Any, other: Any) -> Any:
    """The difference of two measurements, in parts if they have parts.

    Source: ours.
    """
    if isinstance(y, tuple):
        return tuple(minus(a, b) for a, b in zip(y, other, strict=True))
    return y - other


def _first(y: Any) -> Tensor:
    """The first tensor of a measurement."""
    found: Tensor = _first(y[0]) if isinstance(y, tuple) else y
    return found


def _double(y: Any) -> Any:
    return tuple(_double(part) for part in y) if isinstance(y, tuple) else y.double()


def _parts(y: Any) -> list[Tensor]:
    return [t for part in y for t in _parts(part)] if isinstance(y, tuple) else [y]


def consistent_with(
    y: Any, measure: Measurement, limit: float | None = 1.0
) -> Callable[[Samples], Samples]:
    """The edit of `multistep` that keeps what was measured: clamp first, then put back.

    Args:
        y: What was measured.
        measure: How.
        limit: Samples are clamped to [-limit, limit] before, as in the released code; `None`
            for data that are no images.

    Source: Song et al. (2023), Algorithm 4, lines 4 and 8; released code for the order.
    """

    def put_back(x0: Samples) -> Samples:
        if limit is not None:
            x0 = x0.clamp(-limit, limit)
        return x0 + measure.pinv(minus(y, measure(x0)))

    return put_back


def edit(
    consistency: Denoiser,
    y: Any,
    measure: Measurement,
    label: Labels | None = None,
    *,
    noise_range: NoiseRange,
    generator: Generator,
    sigmas: Grid | None = None,
    start: Samples | None = None,
    limit: float | None = 1.0,
) -> Samples:
    """Samples that agree with a measurement: inpainting, colorization, super-resolution, any A.

    The result agrees with y to rounding, some 1e-6 in float32. Saved in 8 bits, known pixels that
    came from 8 bits are what they were; brightness and means are rounded, and clipped where the
    result leaves [-1, 1].

    Args:
        consistency: A consistency model.
        y: What is known, as `measure` would measure it: for `Inpainting` the image itself.
        measure: What of an image is known.
        label: Classes, if the model has them.
        noise_range: The range of the model.
        generator: Draws all noise.
        sigmas: Decreasing noise levels, one evaluation each; by default all 40 of the paper's
            grid.
        start: What noise of level `sigmas[0]` is added to; by default A⁺y, where unknown pixels
            are 0 as in the released CIFAR-10 code. The PyTorch release has -1 there:
            `torch.where(known, image, -1.0)`. At sigma 80 the two hardly differ.
        limit: As in `consistent_with`.

    Raises:
        ValueError: If values lie far outside [-limit, limit], as those of an image in [0, 255]
            do, the levels do not decrease or exceed sigma_max, or the measurement or `start` does
            not fit.

    Source: Song et al. (2023), Algorithm 4.
    """
    for part in _parts(y):
        _check_images(part)
    known = measure.pinv(y)
    start = known if start is None else start
    if start.shape != known.shape:
        raise ValueError(
            f"start has shape {tuple(start.shape)}; y belongs to samples of {tuple(known.shape)}"
        )
    if limit is not None:
        check_values(start, limit)
    sigmas = noise_range.grid(40) if sigmas is None else sigmas
    _check_levels(sigmas, noise_range)
    x = start + float(sigmas[0]) * normal(start, generator)
    put_back = consistent_with(y, measure, limit)
    return multistep(
        consistency, x, sigmas, label, noise_range=noise_range, generator=generator, edit=put_back
    )


def stroke(
    consistency: Denoiser,
    painting: Samples,
    label: Labels | None = None,
    *,
    noise_range: NoiseRange,
    generator: Generator,
    sigmas: Grid | None = None,
) -> Samples:
    """A picture after a rough painting: drown the strokes in noise, then sample on from there.

    Args:
        consistency: A consistency model.
        painting: In [-1, 1].
        label: Classes, if the model has them.
        noise_range: The range of the model.
        generator: Draws all noise.
        sigmas: Where to start, and further evaluations; by default 5.38 and 2.24. The higher the
            first, the freer the result.

    Note: Algorithm 4 read literally, with everything unknown, would erase the painting first.

    Raises:
        ValueError: If values lie far outside [-1, 1], or the levels do not decrease or exceed
            sigma_max.

    Source: Song et al. (2023), App. D, stroke-guided editing; Meng et al. (2021, SDEdit).
    """
    check_values(painting, 1.0)
    sigmas = torch.tensor(STROKE_SIGMAS, dtype=torch.float64) if sigmas is None else sigmas
    _check_levels(sigmas, noise_range)
    x = painting + float(sigmas[0]) * normal(painting, generator)
    return multistep(consistency, x, sigmas, label, noise_range=noise_range, generator=generator)


@torch.no_grad()
def denoise(
    consistency: Denoiser, noisy: Samples, sigma: PerSample, label: Labels | None = None
) -> Samples:
    """A clean sample that may have been behind a noisy one, in one evaluation.

    Not the average of all of them, as a diffusion model would say, but the end of one path: it
    looks clean, and its squared error is larger.

    Args:
        consistency: A consistency model.
        noisy: Samples with noise.
        sigma: How much, in the units of the data (images in [-1, 1]).
        label: Classes, if the model has them.

    Raises:
        ValueError: If there are no images, or sigma is negative or not finite.

    Source: Song et al. (2023), App. D, denoising.
    """
    _check_images(noisy)
    if not bool(((sigma >= 0) & sigma.isfinite()).all()):
        raise ValueError(f"sigma must be finite and at least 0; got {sigma.tolist()}")
    return consistency(noisy, sigma, label)


def slerp(start: Samples, end: Tensor, fraction: float | PerSample) -> Samples:
    r"""From one noise to another along the great circle, each sample by its own angle.

    $$z = \frac{\sin((1 - a)\psi)\, z_1 + \sin(a\psi)\, z_2}{\sin\psi},\qquad
      \cos\psi = \frac{\langle z_1, z_2\rangle}{\lVert z_1\rVert \lVert z_2\rVert}$$

    A straight line would pass through noise that is too short, which the model never saw.

    Args:
        start: $z_1$.
        end: $z_2$.
        fraction: a, from 0 to 1; one number, or one for each sample.

    Raises:
        ValueError: If the shapes differ, the fraction lies outside [0, 1], or two noises are
            opposite, so that no circle is the shortest.

    Source: Song et al. (2023), App. D, interpolation; Shoemake (1985).
    """
    if start.shape != end.shape:
        raise ValueError(f"shapes differ: {tuple(start.shape)} and {tuple(end.shape)}")
    a, b = start.flatten(1), end.flatten(1)
    cosine = F.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    if bool((cosine < -1 + 1e-6).any()):
        raise ValueError("two noises are opposite: there is no shortest way between them")
    angle = cosine.arccos()
    share = torch.as_tensor(fraction, dtype=angle.dtype, device=angle.device).expand_as(angle)
    if not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError(f"fraction must lie in [0, 1]; got {fraction}")
    near = angle < 1e-3  # sin ψ is nearly 0, and a straight line is as good
    sine = torch.where(near, torch.ones_like(angle), angle.sin())
    first = torch.where(near, 1 - share, ((1 - share) * angle).sin() / sine)
    second = torch.where(near, share, (share * angle).sin() / sine)
    return (first[:, None] * a + second[:, None] * b).view_as(start)


def interpolate(
    consistency: Denoiser,
    start: Samples,
    end: Samples,
    steps: int,
    noise_range: NoiseRange,
    label: Labels | None = None,
) -> Path:
    """Samples between the samples of two noises, `(steps, b, ...)`, both ends included.

    Args:
        consistency: A consistency model.
        start: Noise of standard deviation `sigma_max`, as `prior` makes it.
        end: Another.
        steps: How many samples on the way, at least 2.
        noise_range: The range of the model.
        label: Classes, if the model has them.

    Raises:
        ValueError: If `steps` is below 2, or as in `slerp`.

    Source: Song et al. (2023), App. D, interpolation.
    """
    if steps < 2:
        raise ValueError(f"an interpolation has at least its 2 ends; got steps={steps}")
    noises = [slerp(start, end, i / (steps - 1)) for i in range(steps)]
    return torch.stack([one_step(consistency, x, noise_range, label) for x in noises])


def orthogonal_basis(first: Vector) -> Matrix:
    r"""An orthogonal matrix Q whose first column points along `first`.

    With it, replacement is Algorithm 4's: $A x = Q^T x$, and its first coordinate is known. For
    `LUMINANCE` this is the paper's matrix for colorization; for p² ones, that for
    super-resolution. `Grayscale` and `Downsampling` do the same without it.

    Raises:
        ValueError: If `first` is 0.

    Source: Song et al. (2023), App. D: QR decomposition, the sign fixed by the first column.
    """
    if not bool(first.any()):
        raise ValueError("a direction of length 0 points nowhere")
    start = torch.eye(len(first), dtype=torch.float64)
    start[:, 0] = first.double() / first.double().norm()
    q: Tensor = torch.linalg.qr(start)[0]
    return q if float(q[:, 0] @ start[:, 0]) > 0 else -q


def check_values(images: Samples, limit: float) -> None:
    """Refuse images whose values are not on the scale of the model.

    Raises:
        ValueError: Saying how to rescale.

    Source: ours.
    """
    _check_images(images)
    largest = float(images.abs().amax())
    if not largest <= 1.5 * limit:
        hint = " Pixels of 0 ... 255 become x / 127.5 - 1." if largest > 100 else ""
        raise ValueError(
            f"values should lie in [{-limit:g}, {limit:g}]; the largest is {largest:.4g}.{hint} "
            "For data that are no images, limit=None"
        )


def _check_images(images: Tensor) -> None:
    """Refuse no images at all, and pixels that are still integers."""
    if not images.numel():
        raise ValueError(f"there are no images: got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(
            f"expected floating-point numbers; got {images.dtype}. Pixels of 0 ... 255 become "
            "x / 127.5 - 1"
        )


def _check_levels(sigmas: Grid, noise_range: NoiseRange) -> None:
    check_decreasing(sigmas)
    top = noise_range.sigma_max
    if float(sigmas[0]) > top * (1 + 1e-6):  # the model never saw so much noise
        raise ValueError(f"sigmas may start at sigma_max = {top:g}; got {float(sigmas[0]):g}")
