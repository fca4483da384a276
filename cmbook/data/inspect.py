"""Look at a data set before training on it: what `cmbook data check` prints.

A file that cannot be used is named, and does not keep the others from being counted.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmbook.data import prepare, readers
from cmbook.data.readers import Pictures
from cmbook.protocols import Samples


@dataclass(frozen=True)
class Checked:
    """What is known of a data set.

    Attributes:
        name: File or folder.
        count: Images that can be used.
        shapes: (channels, height, width) and how many images have them.
        classes: Names (or numbers) and how many images each has; empty without classes.
        lowest: The darkest pixel, in [-1, 1].
        highest: The brightest.
        mean: Over all pixels and channels, in [-1, 1].
        std: The standard deviation over all images, channels and pixels: `sigma_data`.
        broken: Files that cannot be used, and why.
        sheet: Some images, for a picture, where all have one shape.

    Source: ours.
    """

    name: str
    count: int
    shapes: dict[tuple[int, ...], int]
    classes: dict[str, int]
    lowest: float
    highest: float
    mean: float
    std: float
    broken: dict[str, str]
    sheet: Samples | None = None

    @property
    def advice(self) -> list[str]:
        """What to do before training, in sentences."""
        said = []
        if self.broken:
            said.append(f"{len(self.broken)} files cannot be used: mend or move them")
        if len({shape[1:] for shape in self.shapes}) > 1 or any(s[1] != s[2] for s in self.shapes):
            said.append("the pictures differ in size or are not square: set data.size=64, or such")
        if len({shape[0] for shape in self.shapes}) > 1:
            said.append("some are gray and some in color: set data.channels=3 (or 1)")
        if self.classes and min(self.classes.values()) * 10 < max(self.classes.values()):
            few = min(self.classes, key=self.classes.__getitem__)
            said.append(f"classes differ much in size: {few!r} has {self.classes[few]}")
        if self.std > 0 and abs(self.std / 0.5 - 1) > 0.1:
            said.append(
                f"sigma_data is {self.std:.2f}, the default 0.5: set noise_range.sigma_data="
                f"{self.std:.2f}"
            )
        if self.count < 1000:
            said.append(f"{self.count} images are few: a model will learn them by heart")
        return said

    def __str__(self) -> str:
        """A few lines to read."""
        shapes = ", ".join(
            f"{count} of {shape[2]}x{shape[1]} {'gray' if shape[0] == 1 else 'RGB'}"
            for shape, count in Counter(self.shapes).most_common(5)
        )
        more = f" and {len(self.shapes) - 5} other sizes" if len(self.shapes) > 5 else ""
        classes = ", ".join(f"{name} {count}" for name, count in list(self.classes.items())[:12])
        further = f" and {len(self.classes) - 12} more" if len(self.classes) > 12 else ""
        lines = [
            self.name,
            f"  images   {self.count}: {shapes}{more}",
            f"  classes  {len(self.classes)}: {classes}{further}" if self.classes else
            "  classes  none",
            f"  pixels   {self.lowest:.2f} to {self.highest:.2f}, mean {self.mean:.3f}, standard "
            f"deviation {self.std:.3f}",
        ]  # fmt: skip
        lines += [f"  broken   {name} {why}" for name, why in list(self.broken.items())[:20]]
        if len(self.broken) > 20:
            lines.append(f"  broken   and {len(self.broken) - 20} more")
        return "\n".join([*lines, *(f"  -> {line}" for line in self.advice)])


def check(
    path: str | Path, size: int | None = None, channels: int | None = None, sheet: int = 64
) -> Checked:
    """Read every image at a path, and say what is there.

    Args:
        path: As in `Images`.
        size: Look at the images as training would see them at this size.
        channels: 1 or 3, likewise.
        sheet: How many images to keep for a picture.

    Raises:
        ValueError: If there are no images at all, or the size is not positive.

    Source: ours.
    """
    prepare.check_size(size)
    found, _ = readers.find(path)
    n = len(found.names) if isinstance(found, Pictures) else len(found.rows)
    tally = _Tally(every=max(1, n // max(sheet, 1)), room=sheet)
    if isinstance(found, Pictures):
        _read_pictures(found, tally, size, channels)
    else:
        rows = prepare.prepared(found, size, channels, True)
        for start in range(0, n, 1024):
            tally.add(start, rows[np.arange(start, min(start + 1024, n))])
    label, classes = found.label, _names(found)
    if label is not None and isinstance(found, Pictures):
        label = label[[name not in tally.broken for name in found.names]]
    counts = {} if label is None else dict(
        zip(classes, np.bincount(label, minlength=len(classes)).tolist(), strict=True)
    )  # fmt: skip
    return tally.result(found.name, counts)


class _Tally:
    """Sums over images as they pass."""

    def __init__(self, every: int, room: int) -> None:
        self.shapes: Counter[tuple[int, ...]] = Counter()
        self.sums = np.zeros(3)  # how many pixels, their sum, the sum of their squares
        self.ends = [255, 0]
        self.kept: list[Any] = []
        self.every, self.room, self.broken = every, room, dict[str, str]()

    def add(self, start: int, images: "readers.Bytes") -> None:
        """Count images number `start`, `start + 1`, ...; keep a few from the whole set."""
        self.shapes[tuple(images.shape[1:])] += len(images)
        values = images.astype(np.float64) / 127.5 - 1
        self.sums += values.size, values.sum(), np.square(values).sum()
        self.ends = [min(self.ends[0], int(images.min())), max(self.ends[1], int(images.max()))]
        few = images[-start % self.every :: self.every]
        self.kept += list(few[: self.room - len(self.kept)])

    def result(self, name: str, classes: dict[str, int]) -> Checked:
        count = sum(self.shapes.values())
        n, total, squares = self.sums
        mean = total / n if n else 0.0
        std = max(0.0, squares / n - mean**2) ** 0.5 if n else 0.0
        sheet = None
        if self.kept and len({image.shape for image in self.kept}) == 1:
            sheet = torch.from_numpy(np.stack(self.kept)).float() / 127.5 - 1
        low, high = (end / 127.5 - 1 for end in self.ends)
        shapes = dict(self.shapes)
        return Checked(name, count, shapes, classes, low, high, mean, std, self.broken, sheet)


def _read_pictures(found: Pictures, tally: _Tally, size: int | None, channels: int | None) -> None:
    from tqdm import tqdm

    for i in tqdm(range(len(found.names)), desc="reading", disable=len(found.names) < 500):
        picture = prepare.attempt(found.open, i, lambda data: _seen(data, size, channels))
        if isinstance(picture, str):
            tally.broken[found.names[i]] = picture
            continue
        pixels = np.asarray(picture, np.uint8)
        tally.add(i, pixels[None, None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)[None])


def _seen(data: bytes, size: int | None, channels: int | None) -> Any:
    picture = prepare.decoded(data, channels)
    return picture if size is None else prepare.center_crop(picture, size)


def _names(found: "readers.Found") -> list[str]:
    if found.label is None:
        return []
    known = found.classes if isinstance(found, Pictures) else found.rows.classes
    return list(known) or [str(i) for i in range(int(found.label.max()) + 1)]
