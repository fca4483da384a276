"""Data of two kinds: some that are unlike the others, or all unlike what was held out."""

import math
from collections.abc import Iterator
from itertools import combinations
from statistics import median

import torch
from torch import Tensor

from cmbook.data import ImageData, TensorData
from cmbook.data.images import images
from cmbook.doctor.findings import Finding, Verdict, found, over, under
from cmbook.doctor.patient import Patient, Undone
from cmbook.doctor.views import View
from cmbook.noise import normal, seeded, shuffled
from cmbook.protocols import Samples

MOST = 2**22  # numbers of each of two sets that are compared


def views(p: Patient) -> dict[str, View]:
    """What people show in place of samples, by its name; "samples are shown ...".

    Source: ours.
    """
    shape = p.seen.x.shape[1:]
    seen: dict[str, View] = {
        "in [0, 1] and not in [-1, 1]": lambda x: (x + 1) / 2,
        "in [0, 255] and not in [-1, 1]": lambda x: 127.5 * (x + 1),
        "as if they were in [0, 1], scaled to [-1, 1] a second time": lambda x: 2 * x - 1,
        "scaled to a standard deviation of 1": lambda x: x / p.std,
        "scaled to a standard deviation of 0.5": lambda x: x / (2 * p.std),
        "without their mean": lambda x: x - p.seen.x.mean(0),
        "half as large": lambda x: x / 2,
        "twice as large": lambda x: 2 * x,
        "as negatives": torch.neg,
        "with noise of 0.1 in them": lambda x: x + 0.1 * normal(x, seeded("doctor", "grain")),
    }
    if len(shape) == 1 and shape[0] > 1:
        seen["with their coordinates in the other order"] = lambda x: x.flip(-1)
    return seen | (pictured(shape[0], shape[1] == shape[2]) if len(shape) == 3 else {})


def pictured(channels: int, square: bool) -> dict[str, View]:
    """What they show in place of pictures.

    Source: ours.
    """
    seen: dict[str, View] = {
        "mirrored": lambda x: x.flip(-1),
        "upside down": lambda x: x.flip(-2),
        "turned by 180 degrees": lambda x: x.flip(-1, -2),
        "moved by a pixel": lambda x: x.roll(1, -1),
        "moved by half a picture": lambda x: x.roll(x.shape[-1] // 2, -1),
        "blurred": _blurred,
        "darkened, as by a wrong gamma": lambda x: 2 * ((x + 1) / 2).clamp(0, 1).pow(2.2) - 1,
        "brightened, as by a wrong gamma": lambda x: 2 * ((x + 1) / 2).clamp(0, 1).pow(0.45) - 1,
    }
    if square:
        seen |= {
            "transposed": lambda x: x.transpose(-1, -2),
            "turned by 90 degrees": lambda x: x.rot90(1, (-2, -1)),
            "turned by 270 degrees": lambda x: x.rot90(-1, (-2, -1)),
        }
    if channels > 1:
        seen |= {
            "with their channels in the other order": lambda x: x.flip(1),
            "in gray": lambda x: x.mean(1, keepdim=True).expand_as(x),
        }
    return seen


def _blurred(x: Tensor) -> Tensor:
    """The mean of nine pixels, with the outermost repeated."""
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    return torch.nn.functional.avg_pool2d(padded, 3, 1)


# ── all, beside what was held out ──


def apart(x: Samples, y: Samples) -> float:
    r"""Energy distance of two sets of samples, over the mean distance between them.

    It is 0 on average for two sets of the same law, and 1 for two points: unlike
    `clouds.energy_distance` it pairs no sample with itself, and so it can be told from chance.

    Source: Székely and Rizzo (2013).
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    between = float(torch.cdist(x, y).mean())
    within = sum(float(torch.cdist(a, a).sum()) / (len(a) * (len(a) - 1)) for a in (x, y))
    return (2 * between - within) / max(2 * between, 1e-300)


def chance(x: Samples, y: Samples) -> float:
    """More than that is no chance.

    Source: ours.
    """
    both = torch.cat([x, y.to(x)])
    orders = (shuffled(len(both), seeded("doctor", "order", i)) for i in range(5))
    return 3 * max(0.0, *(apart(*both[order].tensor_split([len(x)])) for order in orders))


def unlike(x: Samples, y: Samples, look: float, ill: float) -> tuple[float, Verdict]:
    """The same, and whether it is more than chance and a limit.

    Source: ours.
    """
    off, least = apart(x, y), chance(x, y)
    return off, over(off, least + look, least + ill)


def held_out(p: Patient) -> Iterator[Finding]:
    """Whether the data are like those that were held out."""
    y = _aside(p, max(128, MOST // p.seen.x[0].numel()))
    n = min(1024, len(p.seen.x), len(y))
    if n < 64:
        raise Undone("too few samples were held out to compare the data with")
    x, y = p.seen.x[:n], y[:n]
    off, bad = unlike(x, y, 0.002, 0.01)
    how = "" if bad == "well" else _explained(p, x, y, off)
    cause = f"the training samples are not like those held out{how}"
    yield found("held out", off, bad, cause)


def _aside(p: Patient, most: int) -> Samples:
    """At most so many of those held out, as training would show them."""
    if p.data is None:
        raise Undone(p.missing)
    generator = seeded("doctor", "others")
    if not isinstance(p.data, ImageData):
        try:
            x = p.data.held_out().x
        except ValueError as why:
            raise Undone("nothing was held out to compare the data with") from why
        return x[shuffled(len(x), generator)[:most]]
    if p.data.aside is None:
        raise Undone("nothing was held out to compare the data with")
    x = images(p.data.aside, shuffled(len(p.data.aside), generator)[:most]).x  # all may be many
    if p.data.flip:
        x[::2] = x[::2].flip(-1)
    return x


def _explained(p: Patient, x: Samples, y: Samples, off: float) -> str:
    """How those held out would have to be shown to be like the others."""
    scores = dict[str, float]()
    for name, view in views(p).items():
        seen = view(y)
        scores[f"all are as if shown {name}"] = apart(x, seen)
        for share in (0.5, 0.25):
            k = int(share * len(y))
            scores[f"about {share:.0%} are as if shown {name}"] = apart(
                x, torch.cat([seen[:k], y[k:]])
            )
    best = min(scores, key=scores.__getitem__)
    return f": {best}" if scores[best] < off / 3 else ""


# ── some, beside the others ──


def placeholders(p: Patient) -> Iterator[Finding]:
    """One sample again and again, or one value where others differ."""
    x = p.seen.x.flatten(1)
    if not bool(x.isfinite().all()):
        return
    _, counts = x.unique(dim=0, return_counts=True)
    top, second = _two_most(counts)
    share = top / len(x) if top > max(5 * second, 4) else 0.0
    cause = f"{share:.1%} of the samples are one and the same: a placeholder, or missing values"
    yield found("data placeholder", share, over(share, 0.005, 0.02), cause)
    if p.seen.x.ndim == 2 and len(x) >= 200:
        yield _atoms(x)


def _two_most(counts: Tensor) -> tuple[int, int]:
    """How often the most common comes, and the next."""
    top, second = [*counts.sort(descending=True).values[:2].tolist(), 0][:2]
    return top, second


def _atoms(x: Tensor) -> Finding:
    """The value that a coordinate has most often, where it has hardly any other twice."""
    most, where, at = 0.0, 0, 0.0
    for i, column in enumerate(x.T):
        values, counts = column.unique(return_counts=True)
        top, second = _two_most(counts)
        if second and top > max(10 * second, 4) and top / len(x) > most:
            most, where, at = top / len(x), i, float(values[counts.argmax()])
    cause = f"coordinate {where} is {at:.3g} in {most:.1%} of the samples: missing values"
    return found("data missing", most, over(most, 0.005, 0.02), cause)


def pictures(p: Patient) -> Iterator[Finding]:
    """Pictures that are unlike the others, or put together from parts."""
    x = p.seen.x.double()
    if x.ndim == 4 and min(x.shape[2:]) >= 8 and bool(x.isfinite().all()):
        yield from odd_pictures(x)


def cut_elsewhere(p: Patient) -> Iterator[Finding]:
    """Whether each picture of a file goes on where the one before it ends."""
    if isinstance(p.data, ImageData):
        x = images(p.data.rows, range(min(1024, len(p.data)))).x
    elif isinstance(p.data, TensorData):
        x = p.data.x[:1024]
    else:
        raise Undone(p.missing or "these data have no order")
    if x.ndim == 4 and len(x) >= 64 and bool(x.isfinite().all()):
        yield runs_on(x)


def runs_on(x: Samples) -> Finding:
    """The same of pictures in the order of their file.

    Source: ours.
    """
    last, first = x[:, :, -1].flatten(1).double(), x[:, :, 0].flatten(1).double()
    onward = _together(last[:-1], first[1:])
    chance = max(_together(last, first), _together(last[1:], first[:-1]), 0.05)
    cause = (
        "each picture goes on where the one before it ends: they are cut at the wrong places, as "
        "where the header of a file was not skipped, or in another size"
    )
    bad: Verdict = "ill" if onward > 0.25 and onward > 3 * chance else "well"
    return found("data cut elsewhere", onward, bad, cause)


def _together(a: Tensor, b: Tensor) -> float:
    """Correlation of the same pixels of two rows, over many pictures."""
    a, b = a - a.mean(0), b - b.mean(0)
    size = float((a.square().mean() * b.square().mean()).sqrt())
    return float((a * b).mean()) / max(size, 1e-12)


def odd_pictures(x: Tensor) -> Iterator[Finding]:
    """The same of a batch of them.

    Source: ours.
    """
    cut = cut_off(x)
    cause = f"{cut:.0%} of the pictures are cut off: they end in one flat color"
    yield found("data cut off", cut, over(cut, 0.03, 0.06), cause)
    if x.shape[1] == 3:
        share = luma(x)
        cause = "the colors are no RGB: luma and two channels of chroma, as in YCbCr or Lab"
        yield found("data color space", share, over(share, 0.5, 0.9), cause)
        gray = float(((x - x.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 0.01).double().mean())
        some = gray if gray < 0.95 else 0.0
        cause = f"{some:.0%} of the pictures are gray, the others in color"
        yield found("data gray", some, over(some, 0.1), cause)
    if x.shape[1] > 2:
        yield _copied_channels(x)
    step, clear = compressed(x)
    cause = f"the pictures were strongly compressed as JPEG: they keep detail in steps of {step}"
    coarse = step if clear > 0.2 else 0
    yield found("data compressed", coarse, over(coarse, 14, 29), cause)
    foreign, how = turned(x)
    cause = f"some of the pictures are turned by {how} degrees"
    yield found("data turned", foreign, under(foreign, 0.8, 0.65), cause)
    dead = _dead(x)
    cause = f"{dead} pixels never change, though those around them do: a dead line, or a lost row"
    yield found("data dead pixels", dead, over(dead, 0, 0), cause)
    marked = max(map(_stamped, _corners(x)))
    cause = f"{marked:.0%} of the pictures have the same thing in one corner: a mark, or a logo"
    large = x.shape[-1] >= 12 and marked < 0.95  # of a few pixels, many happen to be alike
    yield found("data stamp", marked, over(marked, 0.05, 0.15 if large else math.inf), cause)
    share, how = kinds(x)
    cause = f"the pictures are of two kinds: {share:.0%} of them differ from the others in {how}"
    yield found("data kinds", share, over(share, 0.0), cause)
    seam = max(_seam(x), _seam(x.transpose(-1, -2)))
    cause = "all pictures have a seam at the same place: put together from parts, or moved around"
    yield found("data seam", seam, over(seam, 1.7), cause)


def luma(x: Tensor) -> float:
    """The share of black and white whose other two channels are in the middle: what has no color.

    Of pictures in RGB about 0: there, black and white are that in all channels.

    Args:
        x: `(n, 3, h, w)` in [-1, 1].

    Source: ours; ITU-R BT.601 for chroma, which is 0 of what is gray.
    """
    first, chroma = x[:, 0], x[:, 1:].abs().amax(1)
    low, high = min(-0.8, float(first.min()) + 0.04), max(0.8, float(first.max()) - 0.04)
    ends = (first < low) | (first > high)
    if float(ends.float().mean()) < 0.01 or float((chroma > 0.1).float().mean()) < 0.02:
        return 0.0
    return float((chroma[ends] < 0.06).float().mean())


def compressed(x: Tensor) -> tuple[int, float]:
    """The step in which JPEG has rounded frequencies of 8x8 blocks, and how clearly that shows.

    Of pictures that were not compressed, or are of another size by now, below 0.1; of quality 50,
    steps are 10 to 14, of quality 10 five times that.

    Source: ours; ITU-T T.81 (1992), Annex A.3, for the transform.
    """
    k, i = torch.arange(8).double()[:, None], torch.arange(8).double()
    basis = 0.5 * torch.cos(math.pi * (2 * i + 1) * k / 16)
    bytes_ = 127.5 * (x[:600].double() + 1)
    weights = bytes_.new_tensor([0.299, 0.587, 0.114] if x.shape[1] == 3 else [1.0] * x.shape[1])
    gray = (bytes_ * (weights / weights.sum())[:, None, None]).sum(1)
    blocks = gray.unfold(1, 8, 8).unfold(2, 8, 8).reshape(-1, 8, 8)
    each, steps = list[tuple[float, int]](), torch.arange(8, 81).double()
    for u, v in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1)):
        part = torch.einsum("i,bij,j->b", basis[u], blocks, basis[v])
        part = part * (0.5**0.5) ** ((u == 0) + (v == 0))
        part = part[part.abs() > 3][:4096, None]
        if len(part) > 50:
            some = (
                part.abs() > steps / 2
            )  # what is less is near 0 steps, though nothing was rounded
            near = (torch.cos(2 * math.pi * part / steps) * some).sum(0) / some.sum(0).clamp(min=50)
            each.append((float(near.max()), int(steps[near.argmax()])))
    if len(each) < 4:
        return 0, 0.0
    return int(median(step for _, step in each)), float(median(clear for clear, _ in each))


def turned(x: Tensor) -> tuple[float, str]:
    """How foreign a quarter or half turn makes pictures, over what they are in other places.

    Pictures that have a right way up are as foreign to the others on their side as upside down, or
    more. If some of them lie on their side, those that stand find their like among them.

    Source: ours.
    """
    if x.shape[2] != x.shape[3]:
        return 1.0, ""
    x = x[: max(256, min(1024, MOST // x[0].numel()))]
    flat = x.flatten(1)
    near = torch.cdist(flat, flat).fill_diagonal_(math.inf).amin(1)

    def foreign(view: Tensor) -> float:
        there = torch.cdist(view.flatten(1), flat).fill_diagonal_(math.inf).amin(1)
        return float((near < 0.8 * there).double().mean())

    mirrored, half = foreign(x.flip(-1)), foreign(x.flip(-1, -2))
    quarters = {str(90 * k): foreign(x.rot90(k, (-2, -1))) for k in (3, 1)}
    least = min(quarters, key=quarters.__getitem__)
    if half > 0.3 and quarters[least] < 0.8 * half:
        return quarters[least] / half, least
    beside = min(mirrored, *quarters.values())
    return (min(1.0, half / beside) if beside > 0.3 and half < 0.5 * beside else 1.0), "180"


def _dead(x: Tensor) -> int:
    """How many inner pixels never change, between neighbors that do."""
    varies = x.std(0, correction=0).mean(0)
    rows = torch.minimum(varies[:-2, 1:-1], varies[2:, 1:-1])
    columns = torch.minimum(varies[1:-1, :-2], varies[1:-1, 2:])
    around = torch.maximum(rows, columns)
    still = (varies[1:-1, 1:-1] < 0.02 * around) & (around > 0.2 * varies.median())
    return int(still.sum())


def _copied_channels(x: Tensor) -> Finding:
    """Whether two channels are equal in all pictures, and others are not."""
    pairs = [*combinations(range(x.shape[1]), 2)]
    same = [(i, j) for i, j in pairs if float((x[:, i] - x[:, j]).abs().max()) < 0.01]
    some = same if len(same) < len(pairs) else []  # all alike are pictures in gray
    said = " and ".join(map(str, some[0])) if some else ""
    cause = f"channels {said} are equal in all pictures: one is a copy, and a color is lost"
    return found("data channel copies", len(some), "ill" if some else "well", cause)


def _corners(x: Tensor) -> tuple[Tensor, ...]:
    k = max(2, x.shape[-1] // 4)
    return x[..., :k, :k], x[..., :k, -k:], x[..., -k:, :k], x[..., -k:, -k:]


def _stamped(corner: Tensor) -> float:
    """The share of pictures that have the same there, if that is no flat color."""
    rows = corner.flatten(1)
    some = rows[corner.flatten(2).std(2).amax(1) > 0.1]
    if len(some) < 8:
        return 0.0
    _, counts = some.unique(dim=0, return_counts=True)
    top, second = _two_most(counts)
    return top / len(rows) if top > 5 * second else 0.0


def kinds(x: Tensor) -> tuple[float, str]:
    """The smaller share of pictures, if they are of two kinds, and in what these differ.

    Source: Otsu (1979), for where to divide.
    """
    for what, (value, least, gap) in _looks(x).items():
        apart, between, share = _divided(value)
        if apart > least and between > gap:
            return share, what
    return 0.0, ""


def _looks(x: Tensor) -> dict[str, tuple[Tensor, float, float]]:
    """A number of each picture, and how far apart two kinds are in it at least, over their spread.

    Where all are of one kind it is 3 to 4.5, as of MNIST, CIFAR-10, emoji, digits and letters.
    """
    flat = x.flatten(1)
    edge = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1).flatten(1)
    grays = torch.tensor([float(len(row.unique())) for row in flat]).double().log()
    across = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().mean((1, 2, 3))
    around = x[..., 2:, 1:-1] + x[..., :-2, 1:-1] + x[..., 1:-1, 2:] + x[..., 1:-1, :-2]
    bent = (4 * x[..., 1:-1, 1:-1] - around).abs().mean((1, 2, 3))
    half = x.shape[-1] // 2
    halves = (x[..., :half] - x[..., -half:]).abs().mean((1, 2, 3))
    looks = {
        "how many values their pixels have: noise, blur or compression": (grays, 8.0, 0.1),
        "their brightest pixel": (flat.amax(1), 30.0, 0.3),
        "their darkest pixel": (flat.amin(1), 30.0, 0.3),
        "their edges: frames": (edge.mean(1), 30.0, 0.3),
        "that left and right half are the same": ((halves + 1e-3).log(), 12.0, 2.0),
        "their contrast": (flat.std(1).clamp(min=1e-3).log(), 5.5, 0.4),
        "their brightness": (flat.mean(1), 6.0, 0.2),
        "their sharpness": (((bent + 1e-4) / (across + down + 1e-4)).log(), 5.5, 0.2),
    }
    if x.shape[1] == 3:
        looks["how colorful they are"] = ((x.amax(1) - x.amin(1)).mean((1, 2)), 5.0, 0.2)
    return looks


def _divided(value: Tensor) -> tuple[float, float, float]:
    """Of numbers that are best divided in two: the gap over the spread, itself, and the share."""
    v, n = value.sort().values, len(value)
    k = torch.arange(1, n, dtype=v.dtype)
    low, squares = v.cumsum(0), v.square().cumsum(0)
    one, other = low[:-1] / k, (low[-1] - low[:-1]) / (n - k)
    spread = (squares[:-1] / k - one**2).clamp(min=0) + (
        (squares[-1] - squares[:-1]) / (n - k) - other**2
    ).clamp(min=0)
    share = torch.minimum(k, n - k) / n
    floor = 1e-3 * max(float(v.std()), 1e-9)
    gap = torch.where(share > 0.07, (other - one) / (spread / 2).sqrt().clamp(min=floor), 0.0)
    best = int(gap.argmax())
    return float(gap[best]), float(other[best] - one[best]), float(share[best])


def _seam(x: Tensor) -> float:
    """How much more two columns differ somewhere than the pairs beside them."""
    differ = (x[..., 1:] - x[..., :-1]).abs().mean((0, 1, 2))
    beside = torch.maximum(differ[:-2], differ[2:]).clamp(min=0.1 * float(differ.mean()))
    return float((differ[1:-1] / beside.clamp(min=1e-12)).max())


def cut_off(x: Tensor) -> float:
    """The share of pictures with a side of one flat color, which the opposite side hardly has.

    Source: ours.
    """
    k, most = x.shape[-1] // 4, 0.0
    inner = x[x.flatten(1).std(1) > 0.02]
    if not len(inner):
        return 0.0
    edge = torch.cat([inner[..., [0, -1], :], inner[..., [0, -1]].mT], -1)
    pairs = (
        (inner[..., -k:, :], inner[..., :k, :]),
        (inner[..., -k:], inner[..., :k]),
    )
    for one, other in pairs:
        here, there = _flat(one), _flat(other)
        for color in here.keys() | there.keys():
            low, high = sorted((here.get(color, 0), there.get(color, 0)))
            near = (edge - torch.tensor(color, dtype=x.dtype).view(-1, 1, 1) / 20).abs() < 0.05
            background = float(near.all(1).double().mean()) - high / len(inner)
            if high >= 4 * low and background < 0.3:
                most = max(most, high / len(inner))
    return most


def _flat(side: Tensor) -> dict[tuple[int, ...], int]:
    """How many are of one color, and of which."""
    flat = (side.amax((2, 3)) - side.amin((2, 3))).amax(1) < 0.02
    colors, counts = (20 * side[flat].mean((2, 3))).round().long().unique(dim=0, return_counts=True)
    return {tuple(color): n for color, n in zip(colors.tolist(), counts.tolist(), strict=True)}
