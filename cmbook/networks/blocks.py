"""Bricks that several networks share: what a network is told, residual blocks, attention, norms."""

import math
from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmbook.noise import normal
from cmbook.protocols import Labels, PerSample, Samples

WIDEST, DEEPEST = 100_000, 1000  # beyond, building the layers alone takes minutes and gigabytes

# Constants name their device, so that a network built on the meta device has them all the same.


class Sinusoids(nn.Module):
    r"""c_noise as cosines, then sines, of some frequencies; never below float32.

    Args:
        frequencies: In radians per unit of c_noise = ln(σ)/4.
        scale: Of c_noise before that.
        drawn: Whether they were drawn at random, so that they must be saved with the weights.

    Source: Vaswani et al. (2017), §3.5.
    """

    frequencies: Tensor

    def __init__(self, frequencies: Tensor, *, scale: float = 1.0, drawn: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("frequencies", frequencies, persistent=drawn)

    @property
    def width(self) -> int:
        """Of the vector."""
        return 2 * len(self.frequencies)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Sinusoids":
        """Move with the weights, but keep the type: rounded frequencies are other frequencies."""
        exact = self.frequencies
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.frequencies.dtype != exact.dtype:
            self.frequencies = exact.to(self.frequencies.device)
        return self

    def forward(self, c_noise: PerSample) -> Tensor:
        """Shape (b, width)."""
        wide = torch.promote_types(c_noise.dtype, torch.float32)
        angles = (self.scale * c_noise.to(wide))[:, None] * self.frequencies.to(wide)
        return torch.cat([angles.cos(), angles.sin()], 1)


def octaves(width: int) -> Tensor:
    """Frequencies from a quarter of a turn to four turns a unit.

    c_noise spans some two units, so these tell neighboring noise levels apart and still vary
    smoothly between them.

    Source: ours.
    """
    turns = torch.logspace(math.log2(0.25), math.log2(4), width // 2, base=2.0, device="cpu")
    return 2 * math.pi * turns


def geometric(width: int, *, endpoint: bool = False) -> Tensor:
    """Frequencies from 1 down to 1/10000, a fixed ratio apart; with `endpoint` to the very end.

    They were made for time steps up to 1000, so the official consistency models tell the ADM
    1000 c_noise; EDM's networks are told c_noise itself.

    Source: Vaswani et al. (2017), §3.5; openai/consistency_models, `cm/nn.py` (without the end);
        NVlabs/edm and openai/consistency_models_cifar10, DDPM++ (with it).
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device="cpu") / max(half - endpoint, 1)
    return torch.exp(-math.log(10_000) * steps)


def gaussian(width: int, scale: float = 16.0) -> Tensor:
    """Random frequencies, normal with standard deviation `scale` turns a unit.

    Source: Tancik et al. (2020); NCSN++ of Song et al. (2021).
    """
    return (
        2 * math.pi * scale * normal(torch.empty(width // 2, device="cpu"), torch.default_generator)
    )


class Conditioning(nn.Module):
    """The vector that tells every block σ and, if there are classes, which.

    With `label_dropout` there is one class more, number `classes`, which says nothing: in
    training some labels are replaced by it, and no label at all means it. So one network answers
    with a class and without, as guidance needs.

    Args:
        width: Of the vector.
        embedding: Of c_noise.
        classes: How many, or None.
        label_dropout: Share of labels that are dropped in training.
        early: Whether the class is told before the two layers, as NCSN++ does, or after them.
        augment: Numbers that say how a training image was augmented, told before the layers.
        two_times: Whether a second noise level is told, through two layers of its own that say
            nothing at first.

    Raises:
        ValueError: If a label is missing, unexpected, not an integer or out of range, or a second
            noise level is missing or unexpected.

    Source: Dhariwal and Nichol (2021), released code: class embedding added to the time's; Ho
        and Salimans (2022), Algorithm 1, for the dropout; Karras et al. (2022), App. F.2, for
        the augmentation.
    """

    def __init__(
        self,
        width: int,
        embedding: Sinusoids,
        classes: int | None,
        label_dropout: float = 0.0,
        *,
        early: bool = False,
        augment: int = 0,
        two_times: bool = False,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.label_dropout = label_dropout
        self.early = early
        self.sinusoids = embedding
        told = embedding.width
        if not told:
            raise ValueError("a network of 1 channel cannot be told σ; channels must be at least 2")
        self.layers = nn.Sequential(nn.Linear(told, width), nn.SiLU(), nn.Linear(width, width))
        rows = (classes or 0) + bool(label_dropout)  # the last one says nothing
        self.label = nn.Embedding(rows, told if early else width) if classes else None
        self.augment = nn.Linear(augment, told, bias=False) if augment else None
        self.second = nn.Sequential(
            nn.Linear(told, width), nn.SiLU(), zeroed(nn.Linear(width, width))
        ) if two_times else None  # fmt: skip

    def forward(
        self,
        c_noise: PerSample,
        label: Labels | None,
        c_noise_next: PerSample | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Shape (b, width), in the dtype of the weights."""
        dtype = cast(Tensor, self.layers[0].weight).dtype
        vector = self.sinusoids(c_noise).to(dtype)
        named = self._named(label, c_noise)
        if augment is not None:
            if self.augment is None:
                raise ValueError("this network was built without augment; call it without")
            vector = vector + self.augment(augment.to(dtype))
        if named is not None and self.early:
            vector = vector + named
        vector = cast(Tensor, self.layers(vector))
        if named is not None and not self.early:
            vector = vector + named
        if (self.second is None) != (c_noise_next is None):
            has, gets = ("one", "two") if self.second is None else ("two", "one")
            raise ValueError(f"this network is told {has} noise level(s); it was given {gets}")
        if c_noise_next is not None and c_noise_next.shape != c_noise.shape:
            raise ValueError(
                f"both noise levels must be one a sample, {tuple(c_noise.shape)}; got "
                f"{tuple(c_noise_next.shape)}"
            )
        if self.second is not None and c_noise_next is not None:
            vector = vector + cast(Tensor, self.second(self.sinusoids(c_noise_next).to(dtype)))
        return vector

    def _named(self, label: Labels | None, c_noise: PerSample) -> Tensor | None:
        """What is said of the class."""
        if self.label is None:
            if label is not None:
                raise ValueError("this network has no classes; call it without a label")
            return None
        if self.label_dropout:
            label = self._dropped(label, c_noise)
        return cast(Tensor, self.label(self._checked(label, len(c_noise))))

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
        whole = label.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
        if not whole or label.shape != (n,):
            raise ValueError(f"label must be {expected}; got {label.dtype} {tuple(label.shape)}")
        # Looking at the values waits for a GPU, whose own embedding stops on a bad index; so does
        # a compiled one.
        looks = label.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and not bool(((label >= 0) & (label < classes)).all()):
            raise ValueError(f"label must be {expected}; got {label.unique().tolist()}")
        return label.long()


def check_sizes(most: int = WIDEST, **sizes: int) -> None:
    """Refuse sizes of a network that are not at least 1, or beyond what anybody has.

    Raises:
        ValueError: Naming the first.

    Source: ours.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
        if size > most:
            raise ValueError(f"{name} must be at most {most:,}; got {size}")


def check_multipliers(multipliers: tuple[int, ...]) -> None:
    """Refuse multiples of channels that are not 1 or more, one a resolution.

    Raises:
        ValueError: Saying so.

    Source: ours.
    """
    if not multipliers or min(multipliers) < 1 or max(multipliers) > 1000:
        raise ValueError(
            f"multipliers must be 1 or more, one a resolution, at most 1000; got {multipliers}"
        )


def check_dropout(rate: float, name: str = "dropout") -> None:
    """Refuse a rate that is not in [0, 1).

    Raises:
        ValueError: Saying so.

    Source: ours.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must lie in [0, 1); got {rate}")


def check_image(x: Samples, shape: tuple[int, ...]) -> None:
    """Refuse images of another shape than the network was built for.

    Raises:
        ValueError: Naming both.

    Source: ours.
    """
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"this network takes images {shape}; got {tuple(x.shape[1:])}")


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weights and bias 0: a block that starts as the identity.

    Source: Goyal et al. (2017), §5.1.
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


Groups = Literal["powers", "quarters", "all"]


def groups_of(channels: int, rule: Groups) -> int:
    """Groups of a normalization: 32, but for few channels, where families differ.

    `powers`: the largest power of two that leaves at least 4 channels each (ours). `quarters`: a
    quarter of the channels (EDM, NCSN++). `all`: 32, come what may (the ADM).

    Raises:
        ValueError: If the groups do not divide the channels.

    Source: openai/consistency_models, `normalization`; NVlabs/edm, `GroupNorm`.
    """
    if rule == "powers":
        rising = (g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 4)
        return next(rising, 1)
    groups = 32 if rule == "all" else max(min(32, channels // 4), 1)
    if channels % groups:
        raise ValueError(f"{channels} channels cannot be shared among {groups} groups ({rule})")
    return groups


class GroupNorm(nn.GroupNorm):
    """Group normalization, never below float32: half precision loses the mean.

    Source: Wu and He (2018); the official networks compute it in float32 too.
    """

    def __init__(self, channels: int, groups: Groups, eps: float = 1e-5) -> None:
        super().__init__(groups_of(channels, groups), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Shape of `x`."""
        device = "cpu" if x.is_meta else x.device.type  # the meta device knows no autocast
        with torch.autocast(device, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            weight, bias = self.weight.to(wide), self.bias.to(wide)
            return F.group_norm(x.to(wide), self.num_groups, weight, bias, self.eps).to(x.dtype)


class Attention(nn.Module):
    r"""Every pixel looks at every other: x + out(softmax(q kᵀ / √d) v), times `rescale`.

    The channels of `qkv` are (which of the three, head, dimension of the head). Other layouts
    are converted at the doors.

    Raises:
        ValueError: If the heads do not divide the channels.

    Source: Vaswani et al. (2017), §3.2; Dhariwal and Nichol (2021), §3.
    """

    def __init__(
        self, channels: int, heads: int, norm: Callable[[int], nn.Module], rescale: float = 1.0
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared among {heads} heads")
        self.heads = heads
        self.rescale = rescale
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Shape of `x`."""
        # The fused kernels need the numbers of a head side by side, hence the copy.
        pixels = rearrange(self.qkv(self.norm(x)), "b c y x -> b (y x) c").contiguous()
        q, k, v = rearrange(pixels, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        seen = F.scaled_dot_product_attention(q, k, v)
        side = x.shape[-1]
        out = self.out(rearrange(seen, "b h (y x) d -> b (h d) y x", x=side))
        return _sum(x, cast(Tensor, out), self.rescale)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a path that skips them; then attention, if any.

    What the network is told enters between the two: as a scale and a shift after the second norm,
    or, with `add`, added before it.

    Args:
        c_in: Channels that enter.
        c_out: Channels that leave.
        told: Width of what the network is told.
        norm: Makes a normalization for so many channels.
        heads: Of the attention that follows; 0 is none.
        dropout: Before the second convolution.
        add: Whether what is told is added.
        resample: Halves or doubles the sides, on both paths, before the first convolution.
        project: Whether the skipping path has a 1x1 convolution even where channels stay.
        rescale: Of every sum of two paths; √½ keeps the variance.

    Source: Dhariwal and Nichol (2021), §3 (BigGAN's blocks); Song et al. (2021), App. H, for `add`
        and `rescale`.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        told: int,
        *,
        norm: Callable[[int], nn.Module],
        heads: int = 0,
        dropout: float = 0.0,
        add: bool = False,
        resample: nn.Module | None = None,
        project: bool = False,
        rescale: float = 1.0,
    ) -> None:
        super().__init__()
        self.add, self.rescale = add, rescale
        self.resample = resample or nn.Identity()
        self.before = nn.Sequential(
            norm(c_in),
            nn.Sequential(nn.SiLU(), self.resample),
            nn.Conv2d(c_in, c_out, 3, padding=1),
        )
        self.told = nn.Linear(told, c_out if add else 2 * c_out)
        self.norm = norm(c_out)
        self.after = nn.Sequential(
            nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        )
        same = c_in == c_out and not project
        self.skip = nn.Identity() if same else nn.Conv2d(c_in, c_out, 1)
        self.attention = Attention(c_out, heads, norm, rescale) if heads else nn.Identity()

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """Shape (b, c_out, height, width), halved or doubled by `resample`."""
        h, said = self.before(x), self.told(told)[:, :, None, None]
        if self.add:
            h = self.norm(h + said)
        else:
            scale, shift = said.chunk(2, 1)
            h = torch.addcmul(shift, self.norm(h), 1 + scale)
        h = _sum(self.skip(self.resample(x)), self.after(h), self.rescale)
        return cast(Tensor, self.attention(h))


def _sum(x: Tensor, y: Tensor, rescale: float) -> Tensor:
    """A sum of two paths; a product with 1 would cost a pass over memory."""
    return x + y if rescale == 1 else (x + y) * rescale


class Halve(nn.Module):
    """Each 2x2 square becomes its mean.

    Source: Dhariwal and Nichol (2021), released code.
    """

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        """Half the sides of `x`."""
        return F.avg_pool2d(x, 2)


class Double(nn.Module):
    """Each pixel becomes a 2x2 square.

    Source: Dhariwal and Nichol (2021), released code.
    """

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        """Twice the sides of `x`."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Filter(nn.Module):
    """Blur every channel with a symmetric filter and keep, or make, every second pixel.

    The filter 1, 3, 3, 1 does not alias as the square 1, 1 of `Halve` and `Double` does.

    Args:
        taps: Of the filter along one side; their sum does not matter.
        stride: 2 halves the sides, 1 keeps them.
        up: Double the sides instead.
        padding: Zeros around the image; by default those that halve or double exactly.

    Source: Zhang (2019); Karras et al. (2020), App. B.
    """

    taps: Tensor

    def __init__(
        self,
        taps: tuple[int, ...],
        *,
        stride: int = 2,
        up: bool = False,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        row = torch.tensor(taps, dtype=torch.float32, device="cpu")
        square = torch.outer(row, row) / row.sum() ** 2
        self.register_buffer("taps", square * (4 if up else 1), persistent=False)
        self.stride, self.up = stride, up
        self.padding = (len(taps) - 1) // 2 if padding is None else padding

    def forward(self, x: Tensor) -> Tensor:
        """Half or twice the sides of `x`, or its own."""
        channels = x.shape[1]
        kernel = self.taps.to(x.dtype).expand(channels, 1, -1, -1)
        move = F.conv_transpose2d if self.up else F.conv2d
        return move(x, kernel, stride=self.stride, padding=self.padding, groups=channels)
