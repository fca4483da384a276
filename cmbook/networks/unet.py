"""The U-Net for images: down to coarse features, up again, with a bridge at every resolution.

Blocks follow the ADM of Dhariwal and Nichol (2021), at a size that trains on a laptop.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmbook.networks.blocks import Conditioning, check_dropout, check_sizes, zeroed
from cmbook.protocols import Labels, PerSample, Samples


@dataclass(frozen=True)
class UNet:
    """A U-Net for images of 8x8 to 32x32.

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

    Source: Dhariwal and Nichol (2021), §3; Ronneberger et al. (2015).
    """

    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (8,)
    heads: int = 4
    dropout: float = 0.0
    label_dropout: float = 0.0
    patch: int = 1

    def __post_init__(self) -> None:
        check_sizes(channels=self.channels, blocks=self.blocks, heads=self.heads, patch=self.patch)
        check_dropout(self.dropout)
        check_dropout(self.label_dropout, "label_dropout")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"multipliers must be 1 or more, one a resolution; got {self.multipliers}"
            )

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
        told, side, width = 4 * knobs.channels, shape[1] // knobs.patch, knobs.channels
        self.patch, pixels = knobs.patch, shape[0] * knobs.patch**2
        self.conditioning = Conditioning(told, classes, knobs.label_dropout)

        def stage(c_in: int, c_out: int) -> "_Stage":
            attends = side in knobs.attention
            return _Stage(c_in, c_out, told, knobs.heads if attends else 0, knobs.dropout)

        self.inlet = nn.Conv2d(pixels, width, 3, padding=1)
        self.down, self.up, bridges = nn.ModuleList(), nn.ModuleList(), [width]
        for level, multiplier in enumerate(knobs.multipliers):
            if level > 0:
                self.down.append(_Down())
                side //= 2
                bridges.append(width)
            for _ in range(knobs.blocks):
                self.down.append(stage(width, knobs.channels * multiplier))
                width = knobs.channels * multiplier
                bridges.append(width)
        self.middle = nn.ModuleList([stage(width, width), stage(width, width)])
        for level, multiplier in reversed(list(enumerate(knobs.multipliers))):
            for _ in range(knobs.blocks + 1):
                self.up.append(stage(width + bridges.pop(), knobs.channels * multiplier))
                width = knobs.channels * multiplier
            if level > 0:
                self.up.append(_Up())
                side *= 2
        self.outlet = nn.Sequential(
            _GroupNorm(width), nn.SiLU(), zeroed(nn.Conv2d(width, pixels, 3, padding=1))
        )

    def forward(self, x: Samples, c_noise: PerSample, label: Labels | None = None) -> Samples:
        """The raw output, shaped as `x`."""
        told = F.silu(self.conditioning(c_noise, label))
        h = self.inlet(F.pixel_unshuffle(x, self.patch))
        bridges = [h]
        for layer in self.down:
            h = layer(h, told)
            bridges.append(h)
        for layer in self.middle:
            h = layer(h, told)
        for layer in self.up:
            h = layer(h, told) if isinstance(layer, _Up) else layer(
                torch.cat([h, bridges.pop()], 1), told
            )  # fmt: skip
        return F.pixel_shuffle(self.outlet(h), self.patch)


class _Stage(nn.Module):
    """A residual block, then attention if it has heads."""

    def __init__(self, c_in: int, c_out: int, told: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.before = nn.Sequential(
            _GroupNorm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.told = nn.Linear(told, 2 * c_out)
        self.norm = _GroupNorm(c_out)
        self.after = nn.Sequential(
            nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        )
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.attention = _Attention(c_out, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.told(told)[:, :, None, None].chunk(2, 1)
        h = self.norm(self.before(x)) * (1 + scale) + shift
        return cast(Tensor, self.attention(self.skip(x) + self.after(h)))


class _Attention(nn.Module):
    """Every pixel looks at every other."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared among {heads} heads")
        self.heads = heads
        self.norm = _GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(self.norm(x)), "b (three h d) y x -> three b h (y x) d", three=3, h=self.heads
        )
        seen = F.scaled_dot_product_attention(q, k, v)
        side = x.shape[-1]
        return x + cast(Tensor, self.out(rearrange(seen, "b h (y x) d -> b (h d) y x", x=side)))


class _GroupNorm(nn.GroupNorm):
    """Group normalization, never below float32: half precision loses the mean."""

    def __init__(self, channels: int) -> None:
        groups = next((g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 4), 1)
        super().__init__(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            weight, bias = self.weight.to(wide), self.bias.to(wide)
            return F.group_norm(x.to(wide), self.num_groups, weight, bias, self.eps).to(x.dtype)


class _Down(nn.Module):
    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class _Up(nn.Module):
    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
