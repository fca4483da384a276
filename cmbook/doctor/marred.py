"""What no view explains: how pictures differ from the known ones that they were made from.

Some pixels may differ from those of the picture that is surely meant. Or all were made from it by
one rule, which nobody has to know before: grays for grays, every pixel a sum of others, two
pictures in one. Such a rule is fitted to every other picture, and has to explain the rest.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cmbook.doctor.findings import Verdict
from cmbook.protocols import Samples

Told = tuple[float, Verdict, str]
SAME = 0.02  # 1 - correlation: of one picture turned twice 0.01, of two digits 0.05
SOME = 0.08  # a share of the pictures that is no accident
RIDGE = 1e-3  # of the variance of pixels: where nothing is known, a pixel stays what it is
ROUNDS = 8  # of pairing pictures, and fitting
EXACT = 0.002  # as SAME, of what was written as bytes and read again


def normed(x: Tensor) -> Tensor:
    """Without mean and contrast.

    Source: ours.
    """
    rows = x.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return unit


def slopes(x: Tensor, known: Tensor) -> Tensor:
    """The color of every picture that is a gray one in color: `(b, c)`.

    Source: ours.
    """
    rows = known.flatten(2) - known.mean((2, 3))[..., None]
    each: Tensor = (x.flatten(2) * rows).sum(2) / rows.square().sum(2).clamp(min=1e-6)
    return each


def marred(x: Samples, known: Tensor) -> Told | None:
    """Where pictures differ from the known ones that they were made from.

    Args:
        x: `(b, 1, h, w)` in [-1, 1].
        known: The same, of another number.

    Source: ours.
    """
    beside = _pairs(x[:256], known)
    special = None if beside is None else _special(*beside)
    return special or ruled(x, known) or (_vague(*beside) if beside else _noisy(x[:256], known))


# ── beside the picture that is surely meant ──


def _pairs(x: Samples, known: Tensor) -> tuple[Tensor, Tensor] | None:
    """Pictures, or their negatives, and what they were made from, if most are surely known."""
    full = 2 * (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6) - 1
    tries = [_beside(each, known, power) for each in (x, full, -x, -full) for power in (1, 2)]
    changed, few, nearest, sure = max(tries, key=lambda each: float(each[3].float().mean()))
    if float(sure.float().mean()) < 0.8:
        return None
    which = few.gather(1, nearest)[sure, 0]
    return changed[sure][:, 0], known[which][:, 0]


def _beside(x: Tensor, known: Tensor, power: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, the known pictures most like each, which of these is nearest, and if surely so.

    Absolute differences see past what covers a part, squared ones past noise.
    """
    few = (normed(x) @ normed(known).T).topk(40).indices
    differ = (x[:, None] - known[few]).abs().clamp(max=0.5).pow(power).flatten(2).mean(2)
    least, second = differ.topk(2, largest=False).values.T
    return x, few, differ.argmin(1, keepdim=True), least < 0.75 * second


def _special(x: Tensor, known: Tensor) -> Told | None:
    """What is wrong with some pixels."""
    off = x - known
    mask = off.abs() > 0.2
    some = mask.flatten(1).any(1)
    share = float(some.float().mean())
    if share <= SOME or float(off[~mask].abs().mean()) >= 0.01:
        return None
    often = mask[some].float().mean(0)
    there = often > 0.3 * often.max()
    if float(there.float().mean()) < 0.5 and float(often[~there].mean()) < 0.02:
        return share, "ill", f"with something else in {_place(there)}"
    if _blocked(mask[some]):
        return share, "ill", "with a part of them covered"
    if float(mask[some].float().mean()) < 0.3:
        return (
            share,
            "ill",
            "with single pixels that are not theirs: salt and pepper, or lost numbers",
        )
    return None


def _vague(x: Tensor, known: Tensor) -> Told | None:
    """How much they differ."""
    off = x - known
    spread = float(off.std())
    if spread < 0.07:
        return None
    beside = float((off[..., 1:] * off[..., :-1]).mean()) / spread**2
    if beside < 0.2:
        verdict: Verdict = "ill" if spread > 0.09 else "look"
        return 1.0, verdict, f"with noise of about {spread:.2g} in them"
    return 1.0, "look", f"and their pixels are off by about {spread:.2g}"


def _noisy(x: Samples, known: Tensor) -> Told | None:
    """Whether they are known ones, each another, but for noise that no two pixels share."""
    alike, which = (normed(x) @ normed(known).T).max(1)
    meant, many = known[which], len(which.unique()) / len(which)
    slope = slopes(x, meant)[..., None, None]
    off = x - slope * meant
    off = off - off.mean((2, 3), keepdim=True)
    beside = [(off[..., 1:] * off[..., :-1]).mean(), (off[..., 1:, :] * off[..., :-1, :]).mean()]
    spread, shared = float(off.std() / slope.mean()), max(map(abs, beside)) / off.var()
    if float((alike > 0.7).float().mean()) < 0.9 or many < 0.7 or spread < 0.09 or shared > 0.1:
        return None
    return 1.0, "ill", f"with noise of about {spread:.2g} in them"


def _place(there: Tensor) -> str:
    """Rows and columns of pixels, counted from 0."""
    rows, columns = there.any(1).nonzero().flatten(), there.any(0).nonzero().flatten()
    return f"rows {rows[0]} to {rows[-1]}, columns {columns[0]} to {columns[-1]}"


def _blocked(mask: Tensor) -> bool:
    """Whether what differs fills a small rectangle in each picture."""
    rows, columns = mask.any(2), mask.any(1)
    sides = [
        line.shape[1] - line.int().argmax(1) - line.flip(1).int().argmax(1)
        for line in (rows, columns)
    ]
    area = (sides[0] * sides[1]).float()
    filled = mask.sum((1, 2)) / area
    return float(filled.median()) > 0.4 and float(area.median()) < 0.5 * mask[0].numel()


# ── made from it by a rule ──


class Rule(NamedTuple):
    """What was done to all pictures alike.

    Attributes:
        shown: What the known pictures would be.
        said: In words.
    """

    shown: Tensor
    said: Callable[[], str]


def ruled(x: Samples, known: Tensor) -> Told | None:
    """The simplest rule that explains pictures better than none, which others of them have taught.

    Source: ours.
    """
    rows, old = x.flatten(1), known.flatten(1)
    some, others = rows[::2], rows[1::2]
    plain = 1 - _alike(others, old).amax(1)
    if float((plain < EXACT).float().mean()) > 0.8:
        return None
    nearest = _alike(some, old).argmax(1)
    # The same grays, wherever they are.
    anywhere = (normed(some.sort(1).values) @ normed(old.sort(1).values).T).argmax(1)
    for fit, pairs in ((_tones, nearest), (_sums, nearest), (_sums, anywhere)):
        rule = _fitted(some, old, fit, pairs)
        rest = 1 - _alike(others, rule.shown).amax(1)
        if float((rest < torch.minimum(plain / 3, torch.tensor(SAME))).float().mean()) > 0.8:
            return 1.0, "ill", rule.said()
    return _ghosts(rows, old)


def _fitted(
    x: Tensor, known: Tensor, fit: Callable[[Tensor, Tensor, Tensor], Rule], pairs: Tensor
) -> Rule:
    """A rule is fitted to pairs of pictures and known ones, which makes better pairs, and so on."""
    rule = fit(known[pairs], x, known)
    for _ in range(ROUNDS):
        rule = fit(known[_alike(x, rule.shown).argmax(1)], x, known)
    return rule


def _alike(x: Tensor, shown: Tensor) -> Tensor:
    """Correlation of what changes from picture to picture, be they negatives or not."""
    return (normed(x - x.mean(0)) @ normed(shown - shown.mean(0)).T).abs()


def _tones(meant: Tensor, x: Tensor, known: Tensor) -> Rule:
    """Other grays, the same everywhere."""
    tone, every = ((8 * (k + 1)).round().long().clamp(0, 16) for k in (meant, known))
    count = torch.zeros(17).index_put_((tone,), torch.ones_like(x), accumulate=True)
    gray = torch.zeros(17).index_put_((tone,), x, accumulate=True) / count.clamp(min=1)
    k = int((gray - torch.linspace(-1, 1, 17)).abs().mul(count > 0).argmax())
    said = f"with other grays: where they are {k / 8 - 1:.2g}, here is {gray[k]:.2g}"
    return Rule(gray[every], lambda: said)


def _sums(meant: Tensor, x: Tensor, known: Tensor) -> Rule:
    """Every pixel a sum of all, and a number."""
    middle, mean = meant.mean(0), x.mean(0)
    a, b = meant - middle, x - mean
    much, eye = a.square().sum().clamp(min=1e-6), torch.eye(len(mean))
    scale = (a * b).sum() / much
    square = a.T @ a + RIDGE * much / len(mean) * eye
    weights = torch.linalg.solve(square, a.T @ (b - scale * a)) + scale * eye
    return Rule((known - middle) @ weights + mean, lambda: _filter(weights.T, a.square().mean(0)))


def _filter(weights: Tensor, variance: Tensor) -> str:
    """What a matrix does to pictures: from every pixel (column) to every pixel (row)."""
    side = int(len(weights) ** 0.5)
    much = weights.square() * variance
    own = float(much.diagonal().sum() / much.sum())
    if own > 0.95:
        lively = variance > 0.1 * variance.max()
        gain = weights.diagonal()
        low, high = (int(torch.where(lively, sign * gain, -9.0).argmax()) for sign in (-1, 1))
        return (
            f"with a contrast that depends on the place: {gain[high]:.2g} in row {high // side}, "
            f"column {high % side}, {gain[low]:.2g} in row {low // side}, column {low % side}"
        )
    if own < 0.5 and float(much.amax(1).sum() / much.sum()) > 0.8:
        return "with their pixels in other places"
    if float(weights.clamp(max=0).sum() / weights.abs().sum()) < -0.2:
        how = "sharpened"
    else:
        how = _blurred(much / much.sum(), side)
    return f"{how}: every pixel is mixed with others, by the same rule in all"


def _blurred(weight: Tensor, side: int) -> str:
    """How, by the shares that pixels (columns) have in pixels (rows)."""
    line = torch.arange(side).float()

    def width(place: Tensor) -> float:
        far = place[:, None] - place
        return float((weight * far.square()).sum() - (weight * far).sum().square())

    down, across = width(line.repeat_interleave(side)), width(line.repeat(side))
    if max(across, down) <= 3 * min(across, down):
        return "blurred"
    return f"blurred {'across' if across > down else 'from top to bottom'}, as by motion"


def _ghosts(x: Tensor, known: Tensor) -> Told | None:
    """Whether they are two known pictures in one, by the best pair of all."""
    unit = normed(known)
    gram = unit @ unit.T
    rest = torch.where(gram < 0.95, 1 - gram.square(), torch.inf)  # two that differ
    double, single = 0, 0
    for row in normed(x[:48]):
        c = unit @ row
        squares = (c.square()[:, None] + c.square() - 2 * c[:, None] * c * gram) / rest
        i, j = divmod(int(squares.argmax()), len(unit))
        parts = torch.stack([c[i] - gram[i, j] * c[j], c[j] - gram[i, j] * c[i]]) / rest[i, j]
        if float(c.max()) > 1 - SAME:
            single += 1
        elif float(squares[i, j]) > 1 - EXACT and float(parts.min()) > 0.15 * float(parts.sum()):
            double += 1
    n = min(48, len(x))
    if single + double < 0.8 * n or double < SOME * n:
        return None
    return double / n, "ill", "shown with another one laid over it"
