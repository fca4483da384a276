"""The U-Net for images: down to coarse features, up again, with a bridge at every resolution.

One file from a laptop's network to the ADM of Dhariwal and Nichol (2021) with the
296 million of ImageNet 64x64 and the 526 million of LSUN 256x256.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmbook.networks.blocks import (
    DEEPEST,
    Conditioning,
    Double,
    GroupNorm,
    Groups,
    Halve,
    ResidualBlock,
    Sinusoids,
    check_dropout,
    check_image,
    check_multipliers,
    check_sizes,
    geometric,
    octaves,
    zeroed,
)
from cmbook.protocols import Labels, PerSample, Samples
from cmbook.schedules import check_choice

Resample = Literal["plain", "conv", "block"]
Told = Literal["scale-shift", "add"]


@dataclass(frozen=True)
class UNet:
    """A U-Net for images.

    The defaults train on a laptop. The network of the paper's ImageNet 64x64 models is

        >>> imagenet64 = UNet(
        ...     channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8),
        ...     head_channels=64, middle=True, resample="block", time_scale=1000.0, groups="all",
        ... )  # build((3, 64, 64), 1000): 295,899,267 parameters

    and that of its LSUN 256x256 models has `channels=256, multipliers=(1, 1, 2, 2, 4, 4),
    blocks=2, told="add"` instead, and no classes: 526,304,771.

    Attributes:
        channels: At the full resolution.
        multipliers: Channels at each resolution, as multiples; each is half the size of the last.
        blocks: Residual blocks at each resolution, on the way down.
        attention: The sides of the features at which blocks attend, such as 8 for 8x8.
        heads: Attention heads.
        dropout: Inside each residual block.
        label_dropout: Share of labels that are dropped in training, for guidance.
        patch: Squares of so many pixels a side become channels before the first convolution, and
            pixels again after the last: 2 makes a step about four times cheaper.
        head_channels: Channels of one attention head; given, `heads` follows from it.
        heads_up: Heads on the way up, where they differ.
        middle: Whether the two blocks in the middle have attention between them; by default as
            the blocks beside them.
        resample: How sides are halved and doubled: `plain` by means and repetition, `conv` by a
            strided convolution and by one after repetition, `block` inside a residual block.
        told: How a block hears σ and the class: as a scale and a shift, or added.
        time_scale: Of c_noise before the frequencies 1 ... 1/10000 of the ADM: 1000 in the
            official consistency models, 1 in EDM's ADM; left out, frequencies are our own.
        groups: Of the normalizations; the rules differ below 128 channels only (`groups_of`).
        two_times: Whether the network is told a second noise level, as flow maps are.

    Source: Dhariwal and Nichol (2021), §3 and released code; Ronneberger et al. (2015); Song et
        al. (2023), App. C, for the settings.
    """

    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (8,)
    heads: int = 4
    dropout: float = 0.0
    label_dropout: float = 0.0
    patch: int = 1
    head_channels: int | None = None
    heads_up: int | None = None
    middle: bool | None = None
    resample: Resample = "plain"
    told: Told = "scale-shift"
    time_scale: float | None = None
    groups: Groups = "powers"
    two_times: bool = False

    def __post_init__(self) -> None:
        check_sizes(channels=self.channels, heads=self.heads, patch=self.patch)
        check_sizes(DEEPEST, blocks=self.blocks)
        check_sizes(head_channels=self.head_channels or 1, heads_up=self.heads_up or 1)
        check_choice("resample", self.resample, get_args(Resample))
        check_choice("told", self.told, get_args(Told))
        check_choice("groups", self.groups, get_args(Groups))
        check_dropout(self.dropout)
        check_dropout(self.label_dropout, "label_dropout")
        check_multipliers(self.multipliers)

    def build(self, shape: tuple[int, ...], classes: int | None = None) -> nn.Module:
        """The module for images of `shape` (channels, height, width).

        Raises:
            ValueError: If the shape is not an image whose sides can be halved often enough.
        """
        halvings = self.patch * 2 ** (len(self.multipliers) - 1)
        if len(shape) != 3 or shape[1] % halvings or shape[2] % halvings:
            raise ValueError(
                f"UNet with {len(self.multipliers)} resolutions needs images "
                f"(channels, height, width) with sides divisible by {halvings}; got {shape}"
            )
        return UNetModule(shape, classes, self)


class UNetModule(nn.Module):
    """What `UNet` builds."""

    def __init__(self, shape: tuple[int, ...], classes: int | None, knobs: UNet) -> None:
        super().__init__()
        self.shape = shape
        told, side = 4 * knobs.channels, shape[1] // knobs.patch
        width = knobs.channels * knobs.multipliers[0]
        self.patch, pixels = knobs.patch, shape[0] * knobs.patch**2
        norm = partial(GroupNorm, groups=knobs.groups)
        embedding = (
            Sinusoids(octaves(64))
            if knobs.time_scale is None
            else Sinusoids(geometric(knobs.channels), scale=knobs.time_scale)
        )
        self.conditioning = Conditioning(
            told, embedding, classes, knobs.label_dropout, two_times=knobs.two_times
        )
        residual = partial(
            ResidualBlock, told=told, norm=norm, dropout=knobs.dropout, add=knobs.told == "add"
        )

        def stage(c_in: int, c_out: int, attends: bool, heads: int = knobs.heads) -> ResidualBlock:
            if attends and knobs.head_channels:
                if c_out % knobs.head_channels:
                    raise ValueError(
                        f"{c_out} channels cannot be cut into heads of head_channels = "
                        f"{knobs.head_channels}"
                    )
                heads = c_out // knobs.head_channels
            return residual(c_in, c_out, heads=heads if attends else 0)

        def down() -> nn.Module:
            if knobs.resample == "block":
                return residual(width, width, resample=Halve())
            return Halve() if knobs.resample == "plain" else _StridedConvolution(width)

        def up() -> nn.Module:
            if knobs.resample == "block":
                return residual(width, width, resample=Double())
            return Double() if knobs.resample == "plain" else _DoubledConvolution(width)

        self.inlet = nn.Conv2d(pixels, width, 3, padding=1)
        self.down, self.up, bridges = nn.ModuleList(), nn.ModuleList(), [width]
        for level, multiplier in enumerate(knobs.multipliers):
            if level > 0:
                self.down.append(down())
                side //= 2
                bridges.append(width)
            for _ in range(knobs.blocks):
                self.down.append(stage(width, knobs.channels * multiplier, side in knobs.attention))
                width = knobs.channels * multiplier
                bridges.append(width)
        middle = side in knobs.attention if knobs.middle is None else knobs.middle
        self.middle = nn.ModuleList([stage(width, width, middle), stage(width, width, False)])
        self.joins = []  # whether a layer on the way up takes a bridge
        for level, multiplier in reversed(list(enumerate(knobs.multipliers))):
            for _ in range(knobs.blocks + 1):
                wider, heads = width + bridges.pop(), knobs.heads_up or knobs.heads
                width = knobs.channels * multiplier
                self.up.append(stage(wider, width, side in knobs.attention, heads))
                self.joins.append(True)
            if level > 0:
                self.up.append(up())
                self.joins.append(False)
                side *= 2
        self.outlet = nn.Sequential(
            norm(width), nn.SiLU(), zeroed(nn.Conv2d(width, pixels, 3, padding=1))
        )

    def forward(
        self,
        x: Samples,
        c_noise: PerSample,
        label: Labels | None = None,
        c_noise_next: PerSample | None = None,
    ) -> Samples:
        """The raw output, shaped as `x`.

        Raises:
            ValueError: If `x`, a label or a noise level is not what the network was built for.
        """
        check_image(x, self.shape)
        told = F.silu(self.conditioning(c_noise, label, c_noise_next))
        h = self.inlet(F.pixel_unshuffle(x, self.patch))
        bridges = [h]
        for layer in self.down:
            h = layer(h, told)
            bridges.append(h)
        for layer in self.middle:
            h = layer(h, told)
        for layer, joins in zip(self.up, self.joins, strict=True):
            h = layer(torch.cat([h, bridges.pop()], 1) if joins else h, told)
        return F.pixel_shuffle(self.outlet(h), self.patch)


class _StridedConvolution(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return cast(Tensor, self.convolution(x))


class _DoubledConvolution(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.repeat = Double()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return cast(Tensor, self.convolution(self.repeat(x)))
