"""Letters and digits rendered from the fonts that come with matplotlib: endless, and offline."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cmbook.data.tensors import fresh
from cmbook.noise import integers, seeded, uniform
from cmbook.protocols import Batch

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

FONTS = (
    *["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold"],
    *["DejaVuSerif-Italic", "DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneral", "cmr10"],
    *["STIXGeneralBol", "STIXGeneralItalic", "cmss10", "cmtt10", "cmb10"],
)


@dataclass(frozen=True)
class Glyphs:
    """Images of characters: the class is the character, everything else is drawn anew.

    Font, size, place and, in color, ink and paper are random; no two images are alike.

    Attributes:
        characters: The classes, in order.
        size: Side of the images in pixels.
        color: Whether ink and paper have colors; else white on black.
        labelled: Whether the network is told the character.

    Source: ours.
    """

    characters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    size: int = 32
    color: bool = False
    labelled: bool = True

    def __post_init__(self) -> None:
        if not self.characters or len(set(self.characters)) < len(self.characters):
            raise ValueError(f"characters must be different ones; got {self.characters!r}")
        if not all(" " < c <= "~" for c in self.characters):
            raise ValueError(f"characters must be visible ASCII ones; got {self.characters!r}")
        if not 8 <= self.size <= 1024:
            raise ValueError(f"size must lie in 8 ... 1024 pixels; got {self.size}")

    def build(self) -> "GlyphData":
        """The data set."""
        return GlyphData(self)


class GlyphData:
    """Characters without end.

    Source: ours.
    """

    def __init__(self, knobs: Glyphs) -> None:
        self.knobs = knobs
        self.shape = (3 if knobs.color else 1, knobs.size, knobs.size)
        self.classes = len(knobs.characters) if knobs.labelled else None

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Fresh images without end.

        Raises:
            ValueError: If the size is not positive.
        """
        return fresh(self._draw, size, seed, start)

    def held_out(self) -> Batch:
        """1,000 images of a stream of their own."""
        return self._draw(1000, seeded("held out"))

    def sha256(self) -> str:
        """A fingerprint of what is drawn: the settings, and 64 images."""
        digest = hashlib.sha256(repr(self.knobs).encode())
        digest.update(self._draw(64, seeded("fingerprint")).x.numpy().tobytes())
        return digest.hexdigest()

    def _draw(self, n: int, generator: torch.Generator) -> Batch:
        label = integers(n, len(self.knobs.characters), generator)
        font = integers(n, len(FONTS), generator)
        height, across, down = (uniform(n, generator) for _ in range(3))
        colors = uniform(6 * n, generator).view(n, 2, 3)
        masks = [
            drawn(self.knobs.characters[c], self.knobs.size, int(f), float(h), float(x), float(y))
            for c, f, h, x, y in zip(label, font, height, across, down, strict=True)
        ]
        ink = torch.from_numpy(np.stack(masks))[:, None].float() / 255
        if not self.knobs.color:
            return Batch(2 * ink - 1, label if self.knobs.labelled else None)
        light, dark = 0.5 + 0.5 * colors[:, 0], 0.45 * colors[:, 1]
        on_dark = uniform(n, generator)[:, None] < 0.5
        front, back = torch.where(on_dark, light, dark), torch.where(on_dark, dark, light)
        x = ink * front[..., None, None] + (1 - ink) * back[..., None, None]
        return Batch(2 * x - 1, label if self.knobs.labelled else None)


def drawn(character: str, size: int, font: int, height: float, x: float, y: float) -> np.ndarray:
    """Where the ink of one character lies, 0 ... 255.

    Source: ours.
    """
    from PIL import Image, ImageDraw

    face = _face(FONTS[font], round(size * (0.6 + 0.35 * height)))
    left, top, right, bottom = face.getbbox(character)
    free = [size - (right - left), size - (bottom - top)]
    place = [round(f * (0.25 + 0.5 * u)) for f, u in zip(free, (x, y), strict=True)]
    picture = Image.new("L", (size, size))
    ImageDraw.Draw(picture).text((place[0] - left, place[1] - top), character, 255, face)
    return np.asarray(picture)


@lru_cache(maxsize=4096)
def _face(name: str, height: int) -> "FreeTypeFont":
    from PIL import ImageFont

    found = find_spec("matplotlib")  # its place, without the seconds of its import
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(folder / f"{name}.ttf", height)
