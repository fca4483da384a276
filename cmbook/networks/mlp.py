"""Multilayer perceptrons: a plain one for clouds of points, a residual one for small images."""

import math
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from cmbook.networks.blocks import (
    DEEPEST,
    Conditioning,
    Sinusoids,
    check_dropout,
    check_sizes,
    octaves,
    zeroed,
)
from cmbook.protocols import Labels, PerSample, Samples


@dataclass(frozen=True)
class MLP:
    """A few wide layers; σ and the class are added before each but the last.

    Attributes:
        width: Of every hidden layer.
        depth: Hidden layers.
        label_dropout: Share of labels that are dropped in training, for guidance.

    Example:
        >>> net = MLP(width=64, depth=3).build((2,))

    Source: ours.
    """

    width: int = 128
    depth: int = 4
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(width=self.width)
        check_sizes(DEEPEST, depth=self.depth)
        check_dropout(self.label_dropout, "label_dropout")

    def build(self, shape: tuple[int, ...], classes: int | None = None) -> nn.Module:
        """The module for samples of `shape`."""
        return MLPModule(shape, classes, self)


class MLPModule(nn.Module):
    """What `MLP` builds."""

    def __init__(self, shape: tuple[int, ...], classes: int | None, knobs: MLP) -> None:
        super().__init__()
        size, width = math.prod(shape), knobs.width
        self.conditioning = Conditioning(
            width, Sinusoids(octaves(64)), classes, knobs.label_dropout
        )
        self.inlet = nn.Linear(size, width)
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(knobs.depth - 1)])
        self.outlet = nn.Linear(width, size)

    def forward(self, x: Samples, c_noise: PerSample, label: Labels | None = None) -> Samples:
        """The raw output, shaped as `x`."""
        told = self.conditioning(c_noise, label)
        h = self.inlet(x.flatten(1))
        for layer in self.hidden:
            h = layer(nn.functional.silu(h + told))
        if not self.hidden:  # the last layer is the only one that can be told
            h = h + told
        return cast(Tensor, self.outlet(nn.functional.silu(h))).view_as(x)


@dataclass(frozen=True)
class ResidualMLP:
    """Blocks that each add to a running vector: deep enough for 8x8 images.

    Attributes:
        width: Of the running vector.
        depth: Number of blocks, of two layers each.
        told: Width of the vector that tells σ and the class.
        dropout: Inside each block.
        label_dropout: Share of labels that are dropped in training, for guidance.

    Source: He et al. (2016), pre-activation blocks; Perez et al. (2018), scale and shift.
    """

    width: int = 384
    depth: int = 4
    told: int = 128
    dropout: float = 0.0
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(width=self.width, told=self.told)
        check_sizes(DEEPEST, depth=self.depth)
        check_dropout(self.dropout)
        check_dropout(self.label_dropout, "label_dropout")

    def build(self, shape: tuple[int, ...], classes: int | None = None) -> nn.Module:
        """The module for samples of `shape`."""
        return ResidualMLPModule(shape, classes, self)


class ResidualMLPModule(nn.Module):
    """What `ResidualMLP` builds."""

    def __init__(self, shape: tuple[int, ...], classes: int | None, knobs: ResidualMLP) -> None:
        super().__init__()
        size, width = math.prod(shape), knobs.width
        self.conditioning = Conditioning(
            knobs.told, Sinusoids(octaves(64)), classes, knobs.label_dropout
        )
        self.inlet = nn.Linear(size, width)
        self.blocks = nn.ModuleList(
            [_Block(width, knobs.told, knobs.dropout) for _ in range(knobs.depth)]
        )
        self.outlet = nn.Sequential(nn.LayerNorm(width), zeroed(nn.Linear(width, size)))

    def forward(self, x: Samples, c_noise: PerSample, label: Labels | None = None) -> Samples:
        """The raw output, shaped as `x`."""
        told = nn.functional.silu(self.conditioning(c_noise, label))
        h = self.inlet(x.flatten(1))
        for block in self.blocks:
            h = block(h, told)
        return cast(Tensor, self.outlet(h)).view_as(x)


class _Block(nn.Module):
    """Two layers, whose input is scaled and shifted by what the network is told."""

    def __init__(self, width: int, told: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.told = nn.Linear(told, 2 * width)
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Linear(width, width))
        )

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.told(told).chunk(2, 1)
        return h + cast(Tensor, self.layers(self.norm(h) * (1 + scale) + shift))
