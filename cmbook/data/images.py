"""Real images: whatever lies at a path, as 8-bit rows in memory or on disk, and batches of them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cmbook.data import prepare, readers
from cmbook.data.prepare import check_size
from cmbook.data.readers import MOST_CLASSES, Pictures, Rows, Stored
from cmbook.data.tensors import check_labels, endless
from cmbook.noise import seeded, uniform
from cmbook.protocols import Batch, Labels, Samples


@dataclass(frozen=True)
class Images:
    """The images at a path, in any format of the field: it looks what is there.

    A folder of idx files (MNIST, Fashion-MNIST) or of CIFAR-10's batches, an .npz file or a folder
    of them (down-sampled ImageNet), a .zip archive of pictures, or a folder of pictures. What has
    another size is prepared as in ADM and the consistency models' code: halved while it is twice
    as large, resized so that the short side fits, cropped at the center. That is done once, and
    kept in a cache.

    Attributes:
        path: File or folder.
        size: Side of the square images; `None` takes them as they are.
        channels: 1 makes them gray, 3 makes them RGB; `None` takes them as they are.
        labelled: Whether the network is told the class; `None`: if there are any.
        classes: How many there are. Stated, the size of the network does not wait for the files.
        flip: Whether every image is shown as its mirror image half of the time.
        upright: Whether a photograph is turned the way its camera was held. The official code
            ignores that: `false` gives its pixels, bit for bit.
        limit: Use only so many images, the first in order.
        held_out: The share kept aside, where the files hold no test set of their own.

    Source: Dhariwal and Nichol (2021), released code (preparation); ours (the rest).
    """

    path: str
    size: int | None = None
    channels: Literal[1, 3] | None = None
    labelled: bool | None = None
    classes: int | None = None
    flip: bool = False
    upright: bool = True
    limit: int | None = None
    held_out: float = 0.0

    def __post_init__(self) -> None:
        check_size(self.size)
        if self.classes is not None and not 1 <= self.classes <= MOST_CLASSES:
            raise ValueError(
                f"classes must be at least 1, at most {MOST_CLASSES}; got {self.classes}"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 image; got {self.limit}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is a share, 0 or more and less than 1; got {self.held_out}")

    def build(self) -> "ImageData":
        """The data set; what is not in the cache yet is prepared, with a bar.

        Raises:
            ValueError: If there is nothing at the path, or what is there cannot be used: with the
                names of the files that are to blame.
        """
        train, test = readers.find(self.path)
        rows = self._rows(train)
        aside = None if test is None else self._rows(test)
        if self.limit is not None:
            rows = rows.first(self.limit)
        if aside is None and self.held_out:
            rows, aside = rows.split(self.held_out)
        if self.classes and rows.label is not None and len(rows.classes) not in (0, self.classes):
            raise ValueError(f"{self.path} has {len(rows.classes)} classes, not {self.classes}")
        return ImageData(rows, aside, flip=self.flip, classes=self.classes)

    def _rows(self, found: Stored | Pictures) -> Rows:
        if self.labelled and found.label is None:
            raise ValueError(
                f"{self.path} has no classes: put each class into a folder of its own, or leave "
                "out labelled"
            )
        rows = prepare.prepared(found, self.size, self.channels, self.upright)
        return rows if self.labelled is not False else rows.unlabelled()


class ImageData:
    """8-bit images as batches in [-1, 1]: `x = pixel / 127.5 - 1`.

    Rows may lie on disk: only those of a batch are read.

    Args:
        rows: The images that are learned.
        held_out: Those that are not.
        flip: Whether an image is mirrored half of the time.
        classes: How many there are; by default as the rows say.

    Source: Song et al. (2023), released code (scaling, flips).
    """

    def __init__(
        self,
        rows: Rows,
        held_out: Rows | None = None,
        *,
        flip: bool = False,
        classes: int | None = None,
    ) -> None:
        if held_out is not None and held_out.shape != rows.shape:
            raise ValueError(
                f"held-out images have shape {held_out.shape}, the others {rows.shape}"
            )
        self.rows, self.aside, self.flip = rows, held_out, flip
        self.shape = rows.shape
        self.classes = None
        if rows.label is not None:
            named = len(rows.classes) or classes
            self.classes = check_labels(torch.from_numpy(rows.label), len(rows), named)

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Batches without end: every epoch is a new order of all images.

        Raises:
            ValueError: If the size is not positive.
        """
        for k, i in enumerate(endless(len(self.rows), size, seed, start), start):
            x, label = images(self.rows, i)
            if self.flip:
                mirrored = uniform(len(x), seeded(seed, "flip", k)) < 0.5
                x[mirrored] = x[mirrored].flip(-1)
            yield Batch(x, label)

    @property
    def preparation(self) -> str:
        """What was done to the images since they were stored; statistics must agree in it."""
        return self.rows.preparation

    def in_order(self, size: int, *, progress: bool = False) -> Iterator[Samples]:
        """Every image once, not mirrored, in batches of `size`; with a bar, if asked."""
        from tqdm import tqdm

        for start in tqdm(range(0, len(self.rows), size), disable=not progress, leave=False):
            yield images(self.rows, range(start, min(start + size, len(self.rows)))).x

    def held_out(self) -> Batch:
        """Images that training never sees.

        Raises:
            ValueError: If there are none.
        """
        if self.aside is None:
            raise ValueError("this data has no held-out part; set data.held_out = 0.1")
        return images(self.aside, torch.arange(len(self.aside)))

    def sha256(self) -> str:
        """A fingerprint of the images that are learned, their labels, and whether they flip."""
        flip = b"flipped" if self.flip else b""
        return hashlib.sha256(self.rows.sha256().encode() + flip).hexdigest()


def images(rows: Rows, i: Tensor | Sequence[int]) -> Batch:
    """Images number `i` in [-1, 1], and their labels.

    Source: Song et al. (2023), released code.
    """
    number = np.asarray(i)
    x: Samples = torch.from_numpy(rows[number]).float().div_(127.5).sub_(1)
    label: Labels | None = None
    if rows.label is not None:
        label = torch.from_numpy(rows.label[number])
    return Batch(x, label)
