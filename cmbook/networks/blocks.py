"""Bricks that several networks share: how a network is told σ and the class."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmbook.protocols import Labels, PerSample


class Sinusoids(nn.Module):
    r"""c_noise as cosines and sines of `width // 2` frequencies, never below float32.

    c_noise = ln(σ)/4 spans some two units, so frequencies from a quarter of a turn to four turns
    a unit tell neighboring noise levels apart and still vary smoothly between them.

    Source: Vaswani et al. (2017), §3.5; the range of frequencies is ours.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        turns = torch.logspace(math.log2(0.25), math.log2(4), width // 2, base=2.0)
        self.register_buffer("frequencies", 2 * math.pi * turns, persistent=False)

    def forward(self, c_noise: PerSample) -> Tensor:
        """Shape (b, width)."""
        wide = torch.promote_types(c_noise.dtype, torch.float32)
        angles = c_noise.to(wide)[:, None] * self.frequencies.to(wide)
        return torch.cat([angles.cos(), angles.sin()], 1)


class Conditioning(nn.Module):
    """The vector that tells every block σ and, if there are classes, which.

    With `label_dropout` there is one class more, number `classes`, which says nothing: in
    training some labels are replaced by it, and no label at all means it. So one network answers
    with a class and without, as guidance needs.

    Raises:
        ValueError: If a label is missing, unexpected, not an integer or out of range.

    Source: Dhariwal and Nichol (2021), released code: class embedding added to the time's; Ho
        and Salimans (2022), Algorithm 1, for the dropout.
    """

    def __init__(
        self, width: int, classes: int | None, label_dropout: float = 0.0, sinusoids: int = 64
    ) -> None:
        super().__init__()
        self.classes = classes
        self.label_dropout = label_dropout
        self.sinusoids = Sinusoids(sinusoids)
        self.layers = nn.Sequential(nn.Linear(sinusoids, width), nn.SiLU(), nn.Linear(width, width))
        rows = (classes or 0) + bool(label_dropout)  # the last one says nothing
        self.label = nn.Embedding(rows, width) if classes else None

    def forward(self, c_noise: PerSample, label: Labels | None) -> Tensor:
        """Shape (b, width), in the dtype of the weights."""
        dtype = self.layers[0].weight.dtype
        vector = cast(Tensor, self.layers(self.sinusoids(c_noise).to(dtype)))
        if self.label is None:
            if label is not None:
                raise ValueError("this network has no classes; call it without a label")
            return vector
        if self.label_dropout:
            label = self._dropped(label, c_noise)
        return vector + cast(Tensor, self.label(self._checked(label, len(c_noise))))

    def _dropped(self, label: Labels | None, c_noise: PerSample) -> Tensor:
        nothing = torch.full(c_noise.shape, self.classes or 0, device=c_noise.device)
        if label is None:
            return nothing
        kept = F.dropout(torch.ones_like(c_noise.float()), self.label_dropout, self.training)
        return torch.where(kept > 0, label, nothing)

    def _checked(self, label: Labels | None, n: int) -> Tensor:
        classes = (self.classes or 0) + bool(self.label_dropout)
        expected = f"{n} integers in 0 ... {classes - 1}"
        if label is None:
            raise ValueError(
                f"this network has {classes} classes: label must be {expected}. To call it "
                "without one, as guidance does, build and train it with label_dropout"
            )
        if label.is_floating_point() or label.shape != (n,):
            raise ValueError(f"label must be {expected}; got {label.dtype} {tuple(label.shape)}")
        # Looking at the values waits for a GPU, whose own embedding stops on a bad index.
        if label.device.type == "cpu" and not bool(((label >= 0) & (label < classes)).all()):
            raise ValueError(f"label must be {expected}; got {label.unique().tolist()}")
        return label


def check_sizes(**sizes: int) -> None:
    """Refuse sizes of a network that are not at least 1.

    Raises:
        ValueError: Naming the first.

    Source: ours.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")


def check_dropout(rate: float, name: str = "dropout") -> None:
    """Refuse a rate that is not in [0, 1).

    Raises:
        ValueError: Saying so.

    Source: ours.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must lie in [0, 1); got {rate}")


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weights and bias 0: a block that starts as the identity.

    Source: Goyal et al. (2017), §5.1.
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
