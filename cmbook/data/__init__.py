"""Data: 2-D worlds with exact answers, digits, letters, the field's image files, your own tensors.

Read in order: what every data set offers (`tensors`); worlds, digits and rendered letters, which
need no download; then pictures: the files they come in (`readers`), what is done to each
(`prepare`), and 8-bit images as batches (`images`). `fetch` and `inspect` are `cmbook data`.
"""

from cmbook.data.digits import Digits
from cmbook.data.glyphs import Glyphs
from cmbook.data.images import ImageData, Images
from cmbook.data.tensors import (
    Data,
    TensorData,
    check_labels,
    check_samples,
    endless,
    fingerprint,
)
from cmbook.data.worlds import (
    WORLDS,
    Toy,
    ToyData,
    WorldName,
    checkerboard,
    moons,
    pinwheel,
    ring,
    spirals,
)

AnyData = Toy | Digits | Glyphs | Images

__all__ = [
    "WORLDS",
    "AnyData",
    "Data",
    "Digits",
    "Glyphs",
    "ImageData",
    "Images",
    "TensorData",
    "Toy",
    "ToyData",
    "WorldName",
    "check_labels",
    "check_samples",
    "checkerboard",
    "endless",
    "fingerprint",
    "moons",
    "pinwheel",
    "ring",
    "spirals",
]
