"""What people do to pictures, most of it by mistake.

Every view is a function of pictures in [-1, 1], black being -1; "pictures are shown ...".
"""

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate, pad

View = Callable[[Tensor], Tensor]


def turns() -> dict[str, View]:
    """How a picture may lie.

    Source: ours.
    """
    return {
        "transposed": lambda x: x.mT,
        "mirrored": lambda x: x.flip(-1),
        "upside down": lambda x: x.flip(-2),
        "turned by 180 degrees": lambda x: x.flip(-1, -2),
        "turned by 90 degrees": lambda x: x.rot90(1, (-2, -1)),
        "turned by 270 degrees": lambda x: x.rot90(-1, (-2, -1)),
        "transposed and turned by 180 degrees": lambda x: x.rot90(2, (-2, -1)).mT,
    }


def moves() -> dict[str, View]:
    """How its rows, columns and blocks may be exchanged.

    Source: ours.
    """
    return (
        _shifts()
        | {
            "moved by half a picture across": lambda x: x.roll(x.shape[-1] // 2, -1),
            "moved by half a picture down": lambda x: x.roll(x.shape[-2] // 2, -2),
            "with their quarters exchanged": lambda x: x.roll(
                (x.shape[-2] // 2, x.shape[-1] // 2), (-2, -1)
            ),
            "with their rows interlaced wrongly": lambda x: torch.cat(
                [x[..., ::2, :], x[..., 1::2, :]], -2
            ),
            "with every other row reversed": _serpentine,
            "with neighboring rows exchanged": lambda x: _exchanged(x.mT).mT,
            "with neighboring columns exchanged": _exchanged,
            "sheared: each row is moved on by one pixel": lambda x: _sheared(x, 1),
            "sheared: each row is moved back by one pixel": lambda x: _sheared(x, -1),
            "with rows and columns of their blocks exchanged": _blocks,
            "four times side by side, each shrunk": lambda x: _squeezed(x, 2, 2).repeat(1, 1, 2, 2),
            "twice side by side, each squeezed": lambda x: _squeezed(x, 1, 2).repeat(1, 1, 1, 2),
            "twice, one above the other": lambda x: _squeezed(x, 2, 1).repeat(1, 1, 2, 1),
            "shrunk to half their size, in the upper left corner": _cornered,
            "squeezed to half their width": lambda x: _centered(_squeezed(x, 1, 2), x.shape[-1]),
            "squeezed to half their height": lambda x: _centered(_squeezed(x, 2, 1), x.shape[-1]),
            "with every other row lost, the others twice": lambda x: _twice(x.mT).mT,
            "with every other column lost, the others twice": _twice,
        }
        | {f"rotated by {angle} degrees": _rotated(angle) for angle in (15, 30, 45, -15, -30, -45)}
        | _halves()
    )


def _shifts() -> dict[str, View]:
    shifts = {(0, 1): "right", (0, -1): "left", (1, 0): "down", (-1, 0): "up"}
    seen: dict[str, View] = {}
    for (down, right), where in shifts.items():
        for k in (1, 2):
            seen[f"moved {where} by {k} of 8 pixels, around the edge"] = _rolled(down, right, k)
            seen[f"moved {where} by {k} of 8 pixels"] = _pushed(down, right, k)
    return seen


def drifts() -> dict[str, list[View]]:
    """How pictures may be moved, turned or cropped, each in another way.

    Source: ours.
    """
    around = [by for by in product(range(-3, 5), repeat=2) if any(by)]
    near = [by for by in around if max(map(abs, by)) <= 2]
    return {
        "moved by some pixels": [_pushed(a, b, 1) for a, b in near],
        "moved by some pixels, around the edge": [_rolled(a, b, 1) for a, b in around],
        "rotated, each by another angle": [_rotated(angle) for angle in range(-90, 91, 5) if angle],
        "cropped, each to another part, and enlarged": [
            _cropped(down, right, k)
            for k in (4, 5, 6, 7)
            for down, right in product(range(9 - k), repeat=2)
        ],
    }


def _rolled(down: int, right: int, eighths: int) -> View:
    def view(x: Tensor) -> Tensor:
        k = max(1, eighths * x.shape[-1] // 8)
        return x.roll((k * down, k * right), (-2, -1))

    return view


def _pushed(down: int, right: int, eighths: int) -> View:
    """What leaves on one side does not come back on the other."""

    def view(x: Tensor) -> Tensor:
        k, s = max(1, eighths * x.shape[-1] // 8), x.shape[-1]
        y, top, left = pad(x, (2 * k,) * 4, value=-1.0), k * (2 - down), k * (2 - right)
        return y[..., top : top + s, left : left + s]

    return view


def _cropped(down: int, right: int, eighths: int) -> View:
    """A square part of it, in the size of the whole."""

    def view(x: Tensor) -> Tensor:
        k = x.shape[-1] // 8
        top, left, size = down * k, right * k, eighths * k
        part = x[..., top : top + size, left : left + size]
        large: Tensor = interpolate(part, size=x.shape[-1], mode="bilinear")
        return large

    return view


def _serpentine(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 1::2, :] = x[..., 1::2, :].flip(-1)
    return x


def _exchanged(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if x.shape[-1] % 2 == 0 else x


def _sheared(x: Tensor, by: int) -> Tensor:
    return torch.stack([row.roll(by * i, -1) for i, row in enumerate(x.unbind(-2))], -2)


def _blocks(x: Tensor) -> Tensor:
    """Four by four blocks, transposed."""
    if x.shape[-1] % 4:
        return x
    k = x.shape[-1] // 4
    y = x.reshape(*x.shape[:-2], 4, k, 4, k)
    return y.transpose(-4, -2).reshape(x.shape)


def _squeezed(x: Tensor, down: int, right: int) -> Tensor:
    size = (x.shape[-2] // down, x.shape[-1] // right)
    small: Tensor = interpolate(x, size=size, mode="area")
    return small


def _cornered(x: Tensor) -> Tensor:
    small = _squeezed(x, 2, 2)
    return pad(
        small, (0, x.shape[-1] - small.shape[-1], 0, x.shape[-2] - small.shape[-2]), value=-1.0
    )


def _centered(x: Tensor, size: int) -> Tensor:
    """On black."""
    down, right = size - x.shape[-2], size - x.shape[-1]
    return pad(x, (right // 2, right - right // 2, down // 2, down - down // 2), value=-1.0)


def _twice(x: Tensor) -> Tensor:
    return x[..., ::2].repeat_interleave(2, -1)[..., : x.shape[-1]]


def _rotated(angle: int) -> View:
    """Around the middle, counterclockwise; corners are black."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))

    def view(x: Tensor) -> Tensor:
        turn = torch.tensor([[c, s, 0], [-s, c, 0]]).expand(len(x), 2, 3)
        grid = affine_grid(turn, list(x.shape), align_corners=False)
        return grid_sample(x + 1, grid, align_corners=False) - 1

    return view


def _halves() -> dict[str, View]:
    """Half of a picture, and black or its mirror image."""
    seen: dict[str, View] = {}
    for k, half in enumerate(("upper", "right", "lower", "left")):

        def lost(x: Tensor, k: int = k) -> Tensor:
            x = x.rot90(k, (-2, -1)).clone()
            x[..., : x.shape[-2] // 2, :] = -1
            return x.rot90(-k, (-2, -1))

        def mirrored(x: Tensor, k: int = k) -> Tensor:
            x = x.rot90(k, (-2, -1)).clone()
            h = x.shape[-2] // 2
            x[..., :h, :] = x.flip(-2)[..., :h, :]
            return x.rot90(-k, (-2, -1))

        seen[f"without their {half} half"] = lost
        seen[f"with a mirror image in place of their {half} half"] = mirrored
    return seen


def retouches() -> dict[str, View]:
    """How gray may change.

    Source: ours.
    """
    return {
        "blurred": lambda x: _blur(x, 1),
        "blurred strongly": lambda x: _blur(_blur(x, 1), 1),
        "sharpened": lambda x: (2 * x - _blur(x, 1)).clamp(-1, 1),
        "reduced to edges": lambda x: (x - _blur(x, 1)).abs(),
        "coarse: enlarged from half their size": lambda x: _coarse(x, "nearest"),
        "soft: enlarged from half their size": lambda x: _coarse(x, "bilinear"),
        "cropped, and enlarged": lambda x: _zoomed(x, 1),
        "shrunk, with a frame": lambda x: _zoomed(x, -1),
        "darkened, as by a wrong gamma": lambda x: 2 * ((x + 1) / 2).clamp(0, 1).pow(2.2) - 1,
        "brightened, as by a wrong gamma": lambda x: 2 * ((x + 1) / 2).clamp(0, 1).pow(0.45) - 1,
        "clipped: all above the middle is white": lambda x: x.clamp(max=0.0),
        "clipped: all below the middle is black": lambda x: x.clamp(min=0.0),
        "with black in place of all that is darker than the middle": lambda x: torch.where(
            x < 0, -1.0, x
        ),
        "folded: below the middle they are negatives": torch.abs,
        "wrapped: the brightest is black": lambda x: torch.where(x > 0.99, -1.0, x),
        "wrapped at the middle, as signed bytes are": lambda x: torch.where(x > 0, x - 1, x + 1),
        "black and white": lambda x: (x > 0).float(),
        "in four grays": lambda x: ((x + 1) * 1.5).round(),
        "in three grays": lambda x: (x + 1).round(),
    }


CHOICES = frozenset(
    {
        *("black and white", "shrunk, with a frame", "cropped, and enlarged"),
        *(
            name
            for name in moves() | drifts()
            if name.startswith("moved") and name[-6:] == "pixels"
        ),
    }
)  # that people may want of all pictures
SOFT = frozenset(
    {
        *("blurred", "blurred strongly", "sharpened", "soft: enlarged from half their size"),
        "coarse: enlarged from half their size",
    }
)  # what enlarging does as well


def _blur(x: Tensor, k: int) -> Tensor:
    return avg_pool2d(pad(x, (k,) * 4, mode="replicate"), 2 * k + 1, 1)


def _coarse(x: Tensor, mode: str) -> Tensor:
    small = interpolate(x, size=x.shape[-1] // 2, mode="area")
    return interpolate(small, size=x.shape[-1], mode=mode)


def _zoomed(x: Tensor, by: int) -> Tensor:
    k, s = max(1, x.shape[-1] // 8), x.shape[-1]
    part = x[..., k:-k, k:-k] if by > 0 else pad(x, (k,) * 4, value=-1.0)
    return interpolate(part, size=s, mode="bilinear", antialias=True)
