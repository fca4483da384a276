"""Data: 2-D worlds with exact answers, the embedded handwritten digits, and your own tensors.

Everything yields `Batch`es without end. Batch k is a function of (seed, k), so there is no
loader state to save and a resumed run sees what the undisturbed run would have seen.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from cmbook.noise import seeded, shuffled
from cmbook.oracle import GaussianMixture
from cmbook.protocols import Batch, Labels, Samples


@runtime_checkable
class Data(Protocol):
    """What a built data set offers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        ...

    @property
    def classes(self) -> int | None:
        """The number of classes; `None` without labels."""
        ...

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Batches number `start`, `start + 1`, ... without end."""
        ...

    def held_out(self) -> Batch:
        """Samples that training never sees."""
        ...

    def sha256(self) -> str:
        """A fingerprint of everything that training may see."""
        ...


class TensorData:
    """Samples that fit in memory, checked once at this door.

    Args:
        x: All samples, `(n, ...)`, with values in [-1, 1].
        label: Their classes, integers from 0; or `None`.
        classes: How many classes there are; by default the largest label plus one.
        held_out: Samples kept for evaluation.
        bounded: Whether values outside [-1, 1] are refused.

    Raises:
        ValueError: Naming the first sample that is not finite or out of range, or what is wrong
            with the labels.

    Example:
        >>> data = TensorData(torch.zeros(10, 2))
        >>> next(data.batches(4, seed=0)).x.shape
        torch.Size([4, 2])

    Source: ours.
    """

    def __init__(
        self,
        x: Samples,
        label: Labels | None = None,
        *,
        classes: int | None = None,
        held_out: Batch | None = None,
        bounded: bool = True,
    ) -> None:
        check_samples(x, bounded)
        if label is not None:
            classes, label = check_labels(label, len(x), classes), label.long()
        if held_out is not None:
            check_samples(held_out.x, bounded, "held-out sample")
            if held_out.x.shape[1:] != x.shape[1:]:
                raise ValueError(
                    f"held-out samples have shape {tuple(held_out.x.shape[1:])}, the others "
                    f"{tuple(x.shape[1:])}"
                )
            if held_out.label is not None:
                check_labels(held_out.label, len(held_out.x), classes)
        self.x, self.label = x, label
        self.classes = None if label is None else classes
        self.shape = tuple(x.shape[1:])
        self._held_out = held_out

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Batches without end: every epoch is a new order of all samples.

        Raises:
            ValueError: If the size is not positive.
        """
        if size < 1:
            raise ValueError(f"a batch needs at least 1 sample; got size {size}")
        n = len(self.x)

        @lru_cache(maxsize=2)
        def order(epoch: int) -> Tensor:
            return shuffled(n, seeded(seed, "data", epoch))

        position = start * size
        while True:
            first, last = position // n, (position + size - 1) // n  # epochs that it reaches into
            orders = torch.cat([order(epoch) for epoch in range(first, last + 1)])
            i = orders[position - first * n :][:size]
            yield Batch(self.x[i], None if self.label is None else self.label[i])
            position += size

    def held_out(self) -> Batch:
        """Samples that training never sees.

        Raises:
            ValueError: If none were given.
        """
        if self._held_out is None:
            raise ValueError("this data has no held-out part; pass held_out=Batch(x, label)")
        return self._held_out

    def sha256(self) -> str:
        """A fingerprint of samples and labels."""
        return fingerprint(self.x, *([] if self.label is None else [self.label]))


def check_samples(x: Samples, bounded: bool = True, what: str = "sample") -> None:
    """Refuse samples that are no samples, not finite, or (if `bounded`) not within [-1, 1].

    Raises:
        ValueError: Naming the first bad sample.

    Source: ours.
    """
    if not len(x) or not x.is_floating_point() or x.ndim < 2:
        raise ValueError(
            f"data must be floating-point samples (n, ...), n at least 1; got {x.dtype} "
            f"{tuple(x.shape)}"
        )
    rows = x.flatten(1)
    bad = (~torch.isfinite(rows)).any(1)
    if bool(bad.any()):
        raise ValueError(f"{what} {int(bad.nonzero()[0])} holds NaN or infinity")
    bad = (rows.abs() > 1 + 1e-6).any(1)
    if bounded and bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"{what} {i} reaches from {float(rows[i].min()):.3g} to {float(rows[i].max()):.3g}; "
            "data must lie in [-1, 1]. For 8-bit images use x / 127.5 - 1"
        )


def check_labels(label: Tensor, n: int, classes: int | None = None) -> int:
    """Refuse labels that are not `n` integers from 0; return the number of classes.

    Raises:
        ValueError: Saying what is wrong.

    Source: ours.
    """
    if label.is_floating_point() or label.dtype == torch.bool or label.shape != (n,):
        raise ValueError(
            f"labels must be {n} integers, shape ({n},); got {label.dtype} {tuple(label.shape)}"
        )
    least, most = int(label.min()), int(label.max())
    if least < 0 or (classes is not None and most >= classes):
        top = "" if classes is None else f" ... {classes - 1}"
        raise ValueError(f"labels must lie in 0{top}; got {least} ... {most}")
    return most + 1 if classes is None else classes


@dataclass(frozen=True)
class Digits:
    """Scikit-learn's 1,797 handwritten digits, 8x8 pixels, in [-1, 1]: no download.

    Every third image (599 of them) is held out; the other 1,198 are for training.

    Attributes:
        labelled: Whether the ten classes are given to the network.
        tinted: Whether they are in color: each of them in six colors on black, 7,188 for training.

    Source: Alpaydin and Kaynak (1998), UCI optical recognition of handwritten digits.
    """

    labelled: bool = True
    tinted: bool = False

    def build(self) -> TensorData:
        """The data set."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        x = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
        label = torch.from_numpy(bunch.target).long()
        third = torch.arange(len(x)) % 3 == 2
        if self.tinted:
            x, label, third = _tinted(x), label.repeat(len(_TINTS)), third.repeat(len(_TINTS))
        held_out = Batch(x[third], label[third])
        if not self.labelled:
            return TensorData(x[~third], held_out=Batch(held_out.x))
        return TensorData(x[~third], label[~third], classes=10, held_out=held_out)


_TINTS = (
    (1, 0.25, 0.2),
    (1, 0.7, 0.1),
    (0.3, 0.9, 0.3),
    (0.2, 0.8, 0.9),
    (0.4, 0.5, 1),
    (1, 0.4, 0.9),
)


def _tinted(x: Samples) -> Tensor:
    """Gray images in every tint: (n, 1, h, w) becomes (6 n, 3, h, w), one tint after the other."""
    tints = torch.tensor(_TINTS)[:, None, :, None, None]
    return ((x + 1) * tints - 1).flatten(0, 1)


def ring() -> GaussianMixture:
    """Eight round Gaussians on a circle of radius 0.7, standard deviation 0.05.

    Source: ours.
    """
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    return GaussianMixture.isotropic(0.7 * _on_circle(angle), 0.05)


def moons() -> GaussianMixture:
    """Two interleaved half circles, two classes, each a string of 24 small Gaussians.

    Source: after scikit-learn's `make_moons`; written anew as a mixture.
    """
    half = torch.linspace(0, math.pi, 24, dtype=torch.float64)
    upper = 0.55 * _on_circle(half) + torch.tensor([-0.275, -0.15])
    return GaussianMixture.isotropic(torch.cat([upper, -upper]), 0.04, classes=_classes(2, 24))


def spirals() -> GaussianMixture:
    """Two arms that wind one and a half times around the center: two classes of 40 Gaussians.

    Source: ours.
    """
    turn = torch.linspace(0.15, 1, 40, dtype=torch.float64).sqrt()
    arm = 0.9 * turn[:, None] * _on_circle(3 * math.pi * turn)
    return GaussianMixture.isotropic(torch.cat([arm, -arm]), 0.025, classes=_classes(2, 40))


def pinwheel() -> GaussianMixture:
    """Five curved blades, five classes, each of 8 elongated Gaussians that widen outward.

    Source: ours.
    """
    means, covariances = [], []
    for blade in range(5):
        for i in range(8):
            radius = 0.2 + 0.1 * i
            angle = torch.tensor(2 * math.pi * blade / 5 + 0.9 * radius, dtype=torch.float64)
            along = _on_circle(angle + 0.5)
            narrow = 0.01 + 0.035 * radius
            means.append(radius * _on_circle(angle))
            covariances.append(
                narrow**2 * torch.eye(2) + (0.05**2 - narrow**2) * torch.outer(along, along)
            )
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    return GaussianMixture(weights, torch.stack(means), torch.stack(covariances), _classes(5, 8))


def checkerboard() -> GaussianMixture:
    """The eight dark fields of a 4x4 board, eight classes, each filled with 16 small Gaussians.

    Source: ours.
    """
    fields = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    inside = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    offsets = torch.cartesian_prod(inside, inside)
    means = torch.cat([torch.tensor(field) + offsets for field in fields]) / 2 - 1
    return GaussianMixture.isotropic(0.95 * means, 0.035, classes=_classes(8, 16))


WorldName = Literal["ring", "moons", "spirals", "pinwheel", "checkerboard"]
WORLDS: dict[WorldName, Callable[[], GaussianMixture]] = {
    "ring": ring,
    "moons": moons,
    "spirals": spirals,
    "pinwheel": pinwheel,
    "checkerboard": checkerboard,
}


@dataclass(frozen=True)
class Toy:
    """A 2-D world by name: each is a Gaussian mixture, so each has exact answers.

    Attributes:
        world: Which one.
        labelled: Whether the network is told the class a point comes from: which mode of the
            ring, which moon, arm, blade or field.

    Source: ours.
    """

    world: WorldName = "ring"
    labelled: bool = False

    def build(self) -> "ToyData":
        """The data set."""
        return ToyData(WORLDS[self.world](), self.labelled)


class ToyData:
    """An endless sample of a world; `world` holds the exact answers.

    Source: ours.
    """

    def __init__(self, world: GaussianMixture, labelled: bool = False) -> None:
        self.world, self.labelled = world, labelled
        self.shape = (world.means.shape[1],)
        self.classes = world.n_classes if labelled else None

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Fresh points without end.

        Raises:
            ValueError: If the size is not positive.
        """
        if size < 1:
            raise ValueError(f"a batch needs at least 1 sample; got size {size}")
        k = start
        while True:
            yield self._draw(size, seeded(seed, "data", k))
            k += 1

    def held_out(self) -> Batch:
        """5,000 points of a stream of their own."""
        return self._draw(5000, seeded("held out"))

    def sha256(self) -> str:
        """A fingerprint of the mixture, and of its classes if they are told."""
        world = self.world
        told = [world.classes] if self.labelled and world.classes is not None else []
        return fingerprint(world.weights, world.means, world.covariances, *told)

    def _draw(self, n: int, generator: torch.Generator) -> Batch:
        points = self.world.sample(n, generator=generator)
        return Batch(points.x.float(), points.label if self.labelled else None)


AnyData = Toy | Digits


def _on_circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], -1)


def _classes(n: int, each: int) -> Tensor:
    """Class numbers of `n` classes that have `each` components, one class after the other."""
    return torch.arange(n).repeat_interleave(each)


def fingerprint(*tensors: Tensor) -> str:
    """The SHA-256 of tensors: of their types, shapes and values.

    Source: ours.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
