"""NCSN++ and DDPM++: the networks of the paper's CIFAR-10 models.

They differ from the ADM in `unet.py` in what they were tuned for: every sum of two paths is scaled
by √½, what is told is added, and sides change by blocks that blur as they go. NCSN++ also shows
the noisy image itself, smaller and smaller, to every resolution on the way down.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmbook.networks.blocks import (
    DEEPEST,
    Attention,
    Conditioning,
    Filter,
    GroupNorm,
    ResidualBlock,
    Sinusoids,
    check_dropout,
    check_image,
    check_multipliers,
    check_sizes,
    gaussian,
    geometric,
)
from cmbook.protocols import Labels, PerSample, Samples
from cmbook.schedules import check_choice

Embedding = Literal["fourier", "positional"]

ROOT_HALF = math.sqrt(0.5)


@dataclass(frozen=True)
class NCSNpp:
    """NCSN++, or with other switches DDPM++.

    The defaults are the network of the paper's CIFAR-10 models, 56,395,523 parameters; `blocks=8`
    is the deeper one of its continuous-time models, 97,610,499. DDPM++ is

        >>> ddpmpp = NCSNpp(embedding="positional", taps=(1, 1), pyramid=False)  # 55,732,739

    Attributes:
        channels: Of the first convolution.
        multipliers: Channels at each resolution, as multiples; each is half the size of the last.
        blocks: Residual blocks at each resolution, on the way down.
        attention: The sides of the features at which blocks attend: every block on the way down,
            the last of its resolution on the way up. The middle always attends.
        heads: Attention heads.
        dropout: Inside each residual block.
        label_dropout: Share of labels that are dropped in training, for guidance.
        embedding: Of c_noise: random Fourier features, or the frequencies 1 ... 1/10000.
        taps: Of the filter that blurs where sides are halved and doubled.
        pyramid: Whether the noisy image is shown to every resolution on the way down.
        augment: Numbers that say how a training image was augmented; 0 is none.
        two_times: Whether the network is told a second noise level, as flow maps are.

    Source: Song et al. (2021), App. H; Karras et al. (2022), Table 7; Song et al. (2023), App. C;
        openai/consistency_models_cifar10, configs `ve` and `vp`.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (2, 2, 2)
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    heads: int = 1
    dropout: float = 0.0
    label_dropout: float = 0.0
    embedding: Embedding = "fourier"
    taps: tuple[int, ...] = (1, 3, 3, 1)
    pyramid: bool = True
    augment: int = 0
    two_times: bool = False

    def __post_init__(self) -> None:
        check_sizes(channels=self.channels, heads=self.heads)
        check_sizes(DEEPEST, blocks=self.blocks)
        check_choice("embedding", self.embedding, get_args(Embedding))
        check_dropout(self.dropout)
        check_dropout(self.label_dropout, "label_dropout")
        check_multipliers(self.multipliers)
        if len(self.taps) % 2 or not sum(self.taps) or self.taps != self.taps[::-1]:
            raise ValueError(
                f"taps must be an even number of weights, the same from both ends; got {self.taps}"
            )
        if self.augment < 0:
            raise ValueError(f"augment must be at least 0; got {self.augment}")
        check_sizes(augment=self.augment or 1)

    def build(self, shape: tuple[int, ...], classes: int | None = None) -> nn.Module:
        """The module for images of `shape` (channels, height, width).

        Raises:
            ValueError: If the shape is not an image whose sides can be halved often enough.
        """
        halvings = 2 ** (len(self.multipliers) - 1)
        if len(shape) != 3 or shape[1] % halvings or shape[2] % halvings:
            raise ValueError(
                f"NCSNpp with {len(self.multipliers)} resolutions needs images "
                f"(channels, height, width) with sides divisible by {halvings}; got {shape}"
            )
        return NCSNppModule(shape, classes, self)


class NCSNppModule(nn.Module):
    """What `NCSNpp` builds."""

    def __init__(self, shape: tuple[int, ...], classes: int | None, knobs: NCSNpp) -> None:
        super().__init__()
        self.shape = shape
        pixels, side, width, told = shape[0], shape[1], knobs.channels, 4 * knobs.channels
        norm = partial(GroupNorm, groups="quarters", eps=1e-6)
        embedding = (
            Sinusoids(gaussian(2 * width), drawn=True)
            if knobs.embedding == "fourier"
            else Sinusoids(geometric(width, endpoint=True))
        )
        self.conditioning = Conditioning(
            told,
            embedding,
            classes,
            knobs.label_dropout,
            early=True,
            augment=knobs.augment,
            two_times=knobs.two_times,
        )
        residual = partial(
            ResidualBlock, told=told, norm=norm, dropout=knobs.dropout, add=True, rescale=ROOT_HALF
        )

        def stage(c_in: int, c_out: int, attends: bool) -> ResidualBlock:
            return residual(c_in, c_out, heads=knobs.heads if attends else 0)

        def resampled(up: bool) -> ResidualBlock:
            return residual(width, width, resample=Filter(knobs.taps, up=up), project=True)

        self.inlet = nn.Conv2d(pixels, width, 3, padding=1)
        self.down, self.up, bridges = nn.ModuleList(), nn.ModuleList(), [width]
        self.pyramid, shown = nn.ModuleList(), pixels
        for level, multiplier in enumerate(knobs.multipliers):
            if level > 0:
                self.down.append(resampled(up=False))
                side //= 2
                bridges.append(width)
                if knobs.pyramid:
                    self.pyramid.append(_Shown(shown, width, knobs.taps))
                    shown = width
            for _ in range(knobs.blocks):
                self.down.append(stage(width, knobs.channels * multiplier, side in knobs.attention))
                width = knobs.channels * multiplier
                bridges.append(width)
        self.middle = nn.ModuleList([stage(width, width, True), stage(width, width, False)])
        self.joins = []  # whether a layer on the way up takes a bridge
        for level, multiplier in reversed(list(enumerate(knobs.multipliers))):
            for block in range(knobs.blocks + 1):
                wider, width = width + bridges.pop(), knobs.channels * multiplier
                last = block == knobs.blocks
                self.up.append(stage(wider, width, last and side in knobs.attention))
                self.joins.append(True)
            if level > 0:
                self.up.append(resampled(up=True))
                self.joins.append(False)
                side *= 2
        self.outlet = nn.Sequential(norm(width), nn.SiLU(), nn.Conv2d(width, pixels, 3, padding=1))
        _initialize(self)

    def forward(
        self,
        x: Samples,
        c_noise: PerSample,
        label: Labels | None = None,
        c_noise_next: PerSample | None = None,
        augment: Tensor | None = None,
    ) -> Samples:
        """The raw output, shaped as `x`.

        Raises:
            ValueError: If `x`, a label or a noise level is not what the network was built for.
        """
        check_image(x, self.shape)
        told = F.silu(self.conditioning(c_noise, label, c_noise_next, augment))
        h, shown, smaller = self.inlet(x), x, iter(self.pyramid)
        bridges = [h]
        for layer in self.down:
            before, h = h, layer(h, told)
            if h.shape[-1] < before.shape[-1] and self.pyramid:
                h = shown = (h + next(smaller)(shown)) * ROOT_HALF
            bridges.append(h)
        for layer in self.middle:
            h = layer(h, told)
        for layer, joins in zip(self.up, self.joins, strict=True):
            h = layer(torch.cat([h, bridges.pop()], 1) if joins else h, told)
        return cast(Tensor, self.outlet(h))


class _Shown(nn.Module):
    """The image as the next resolution is shown it: blurred, then a strided convolution."""

    def __init__(self, c_in: int, c_out: int, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.blur = Filter(taps, stride=1, padding=len(taps) // 2)
        self.convolution = nn.Conv2d(c_in, c_out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.convolution(self.blur(x)))


def _initialize(module: NCSNppModule) -> None:
    """Xavier's uniform weights, zero biases, and almost zero where a path ends.

    Source: Karras et al. (2022), released code.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    factors = [(module.outlet[-1], 1e-5)]
    for layer in module.modules():
        if isinstance(layer, ResidualBlock):
            factors.append((layer.after[-1], 1e-5))
        if isinstance(layer, Attention):
            factors += [(layer.qkv, math.sqrt(0.2)), (layer.out, 1e-5)]
    if module.conditioning.second is not None:
        factors.append((module.conditioning.second[-1], 0.0))
    with torch.no_grad():
        for layer, factor in factors:
            cast(nn.Conv2d, layer).weight.mul_(factor)
