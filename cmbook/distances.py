"""Distances d(x, y) between a prediction and its target: one number per sample."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cmbook.protocols import PerSample, Samples

LARGEST = 4096  # side of an image that a distance may make


@dataclass(frozen=True)
class L2:
    """The mean over the sample of the squared difference.

    Attributes:
        resize: If given, both images are first resized bilinearly to `resize` x `resize`; the
            released code calls this `l2-32` and uses it for large images.

    Note: The paper writes the sum; the released code takes the mean, and so do we.

    Source: Song et al. (2023), §4; released code for `resize`.
    """

    resize: int | None = None

    def __post_init__(self) -> None:
        if self.resize is not None and not 1 <= self.resize <= LARGEST:
            raise ValueError(f"resize must lie in 1 ... {LARGEST} pixels; got {self.resize}")

    def __call__(self, prediction: Samples, target: Samples) -> PerSample:
        """The distances."""
        return _rows(self._shrunk(prediction) - self._shrunk(target)).square().mean(1)

    def _shrunk(self, images: Samples) -> Tensor:
        if self.resize is None:
            return images
        if images.ndim != 4:
            raise ValueError(
                f"L2(resize=...) expects images (b, c, h, w); got shape {tuple(images.shape)}"
            )
        return F.interpolate(images, (self.resize, self.resize), mode="bilinear")


@dataclass(frozen=True)
class L1:
    """The mean over the sample of the absolute difference.

    Note: The paper writes the sum; the released code takes the mean, and so do we.

    Source: Song et al. (2023), §4.
    """

    def __call__(self, prediction: Samples, target: Samples) -> PerSample:
        """The distances."""
        return _rows(prediction - target).abs().mean(1)


@dataclass(frozen=True)
class Norm:
    """The Euclidean norm of the whole difference, not squared.

    Where prediction equals target its gradient is 0, not infinite.

    Source: Geng et al. (2024, ECT), released code (`c = 0`).
    """

    def __call__(self, prediction: Samples, target: Samples) -> PerSample:
        """The distances."""
        norm: PerSample = torch.linalg.vector_norm(_rows(prediction - target), dim=1)
        return norm


@dataclass(frozen=True)
class PseudoHuber:
    r"""Quadratic near zero, linear far away: $\sqrt{\lVert x - y\rVert^2 + c^2} - c$.

    The norm is that of the whole sample. Applied pixel by pixel, as several code bases do, it
    is a different distance.

    Attributes:
        c: Where quadratic becomes linear. `None` is $0.00054\sqrt{d}$ for samples of d numbers.

    Source: Song and Dhariwal (2023, iCT), pseudo-Huber metric.
    """

    c: float | None = None

    def __post_init__(self) -> None:
        if self.c is not None and not 0 <= self.c < math.inf:
            raise ValueError(f"c must be at least 0; got {self.c}")

    def __call__(self, prediction: Samples, target: Samples) -> PerSample:
        """The distances."""
        rows = _rows(prediction - target)
        c = 0.00054 * math.sqrt(rows.shape[1]) if self.c is None else self.c
        # c as one more coordinate of the vector: its norm has a finite slope even at c = 0.
        norm: PerSample = torch.linalg.vector_norm(F.pad(rows, (0, 1), value=c), dim=1)
        return norm - c


@dataclass(frozen=True)
class LInf:
    """The largest absolute difference within the sample.

    Source: Song et al. (2023), released CIFAR-10 code.
    """

    def __call__(self, prediction: Samples, target: Samples) -> PerSample:
        """The distances."""
        return _rows(prediction - target).abs().amax(1)


AnyDistance = L2 | L1 | Norm | PseudoHuber | LInf


def _rows(difference: Tensor) -> Tensor:
    return difference.flatten(1)
