"""What a data set offers, and your own tensors as one.

Every data set yields `Batch`es without end. Batch k is a function of (seed, k), so there is no
loader state to save and a resumed run sees what the undisturbed run would have seen.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import count
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cmbook.noise import seeded, shuffled
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

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Batches without end: every epoch is a new order of all samples.

        Raises:
            ValueError: If the size is not positive.
        """
        for i in endless(len(self.x), size, seed, start):
            yield Batch(self.x[i], None if self.label is None else self.label[i])

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


def endless(n: int, size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """The members of batch `start`, `start + 1`, ...: every epoch is a new order of all `n`.

    Raises:
        ValueError: If the size is not positive.

    Source: ours.
    """
    if size < 1:
        raise ValueError(f"a batch needs at least 1 sample; got size {size}")

    @lru_cache(maxsize=2)
    def order(epoch: int) -> Tensor:
        return shuffled(n, seeded(seed, "data", epoch))

    position = start * size
    while True:
        first, last = position // n, (position + size - 1) // n  # epochs that it reaches into
        orders = torch.cat([order(epoch) for epoch in range(first, last + 1)])
        yield orders[position - first * n :][:size]
        position += size


def fresh(
    draw: Callable[[int, torch.Generator], Batch], size: int, seed: int, start: int = 0
) -> Iterator[Batch]:
    """Batches `start`, `start + 1`, ... of a source that never repeats, each from its own stream.

    Raises:
        ValueError: If the size is not positive.

    Source: ours.
    """
    if size < 1:
        raise ValueError(f"a batch needs at least 1 sample; got size {size}")
    for k in count(start):
        yield draw(size, seeded(seed, "data", k))


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


def fingerprint(*tensors: Tensor) -> str:
    """The SHA-256 of tensors: of their types, shapes and values.

    Source: ours.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
