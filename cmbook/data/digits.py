"""The embedded handwritten digits: real images without a download."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cmbook.data.tensors import TensorData
from cmbook.protocols import Batch, Samples


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
            x, label, third = _tinted(x), label.repeat(len(TINTS)), third.repeat(len(TINTS))
        held_out = Batch(x[third], label[third])
        if not self.labelled:
            return TensorData(x[~third], held_out=Batch(held_out.x))
        return TensorData(x[~third], label[~third], classes=10, held_out=held_out)


TINTS = (
    (1, 0.25, 0.2),
    (1, 0.7, 0.1),
    (0.3, 0.9, 0.3),
    (0.2, 0.8, 0.9),
    (0.4, 0.5, 1),
    (1, 0.4, 0.9),
)


def _tinted(x: Samples) -> Tensor:
    """Gray images in every tint: (n, 1, h, w) becomes (6 n, 3, h, w), one tint after the other."""
    tints = torch.tensor(TINTS)[:, None, :, None, None]
    return ((x + 1) * tints - 1).flatten(0, 1)
