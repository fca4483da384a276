"""Known pictures: what was done to all of them alike, so that nothing within them tells.

Who knows the digits of scikit-learn sees at once that they are transposed, or that red and blue
are exchanged. Here every picture is compared with all that it may have been made from: with each
of these digits, and with printed characters of all fonts that the package has. Contrast, colors,
size, place, and which classes are taken are a matter of choice. So pictures are only judged if one
of the known ones explains them nearly without a rest; all others are none of this check's business.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from cmbook.data.digits import TINTS, Digits
from cmbook.data.glyphs import FONTS, GlyphData, drawn
from cmbook.doctor.findings import Finding, found
from cmbook.doctor.marred import EXACT, SAME, SOME, Told, marred, normed, slopes
from cmbook.doctor.patient import Patient
from cmbook.doctor.views import CHOICES, SOFT, View, drifts, moves, retouches, turns
from cmbook.protocols import Labels, Samples

SMALL = 16  # pixels of a side: larger pictures are looked at in little first


class World(NamedTuple):
    """Pictures that are known, in gray, and what each of them shows.

    Source: ours.
    """

    name: str
    x: Tensor
    label: Tensor
    views: dict[str, list[View]]


class Match(NamedTuple):
    """How pictures are explained by a world.

    Attributes:
        world: The world.
        rest: Of every picture, for every view: 1 - correlation with the known one that is nearest.
        best: That known picture, in the view that suits.
        kind: What it shows.
        sign: Whether it is its negative: -1.

    Source: ours.
    """

    world: World
    rest: dict[str, Tensor]
    best: Tensor
    kind: Tensor
    sign: Tensor

    @property
    def least(self) -> Tensor:
        """What is left with the best view."""
        return torch.stack([*self.rest.values()]).amin(0)


PLAIN = "as they are"


def known_data(p: Patient) -> Iterator[Finding]:
    """Whether the pictures are known ones, and something was done to them."""
    x, label = p.seen
    if isinstance(p.data, GlyphData):
        return  # the package draws them as they are wanted
    if x.ndim != 4 or x.shape[2] != x.shape[3] or not 8 <= x.shape[2] <= 64:
        return
    if len(x) >= 64 and bool(x.isfinite().all()):
        yield known_pictures(x[:1000].float(), None if label is None else label[:1000])


def known_pictures(x: Samples, label: Labels | None = None) -> Finding:
    """The same of pictures.

    Source: ours.
    """
    gray = x.mean(1, keepdim=True)
    colored = x.shape[1] == 3 and float((x - gray).abs().max()) > 0.01
    alone = () if colored else (_negatives,)
    if colored and (space := _converted(x)):
        return found("known data", *space)
    if (digits := _as_digits(gray)) is not None:
        looks = (_colors(x), _named(label), _marred(gray), _foreign(label))
        return _said(digits, _viewed, *alone, *looks)
    if colored:
        channels = [_as_digits(x[:, c : c + 1]) for c in range(3)]
        known = [match for match in channels if match is not None]
        if len(known) == 3:
            return _said(known[0], lambda _: _parted(known))
    characters = _match(_framed(gray), _characters(x.shape[-1]))
    if _known(characters):
        return _said(characters, _viewed, *alone)
    if _native(gray):
        return _said(_match(gray[:1], _digits(gray)), _marred(gray))
    return found("known data", 0.0, "well", "")


def _known(match: Match, least: float = SAME) -> bool:
    """Whether they are of this world beyond doubt."""
    return float((match.least < least).float().mean()) > 0.6


def _as_digits(x: Tensor) -> Match | None:
    """Beside digits, if they are digits."""
    k = _frame(x)
    if x.shape[-1] > SMALL:
        inner = x[:48, :, k : x.shape[-1] - k, k : x.shape[-1] - k]
        small = interpolate(inner, size=8, mode="area")
        if not _known(_match(small, _sized(8, 0, "none")), 3 * SAME):
            return None
    match = _match(x, _digits(x))
    return match if _known(match) else None


def _native(x: Samples) -> bool:
    """Whether digits would have their own size: how others were enlarged can only be guessed."""
    return x.shape[-1] - 2 * _frame(x) == 8


def _marred(x: Samples) -> Callable[[Match], Told | None]:
    return lambda match: marred(x, match.world.x) if _native(x) else None


def _said(match: Match, *looks: Callable[[Match], Told | None]) -> Finding:
    """The first that is bad: how many are not as they were, how bad that is, and what it is."""
    told = next((told for look in looks if (told := look(match))), None)
    share, verdict, what = told or (0.0, "well", "")
    many = "" if share > 0.95 else f"about {share:.0%} of them "
    cause = f"the pictures are {match.world.name}, {many}{what}"
    return found("known data", share, verdict, cause)


# ── known pictures ──


def _digits(x: Tensor) -> World:
    """Scikit-learn's digits, enlarged as these are, and with a frame as they have."""
    size, frame = x.shape[-1], _frame(x)
    if size - 2 * frame == 8:
        return _sized(size, frame, "none")

    def rest(how: str) -> float:
        match = _match(x[:64], _sized(size, frame, how)._replace(views=_each(turns())))
        return float(match.least.mean())

    return _sized(size, frame, min(("bicubic", "bilinear", "nearest"), key=rest))


def _frame(x: Tensor) -> int:
    """How wide a frame is that no picture reaches, if 8x8 pixels are left at least."""
    k, varies = 0, x.flatten(0, 1).std(0)
    while x.shape[-1] - 2 * k > 8:
        inner = varies[k : len(varies) - k, k : len(varies) - k]
        edge = torch.cat([inner[0], inner[-1], inner[:, 0], inner[:, -1]])
        if float(edge.max()) > 1e-3:
            break
        k += 1
    return k


@lru_cache(maxsize=8)
def _sized(size: int, frame: int, how: str) -> World:
    data = Digits().build()
    aside, label = data.held_out(), data.label
    assert label is not None
    assert aside.label is not None
    x, views = torch.cat([data.x, aside.x]), _each(turns() | moves() | retouches()) | drifts()
    if how != "none":
        knobs = {} if how == "nearest" else {"antialias": True}
        x = interpolate(x, size=size - 2 * frame, mode=how, **knobs).clamp(-1, 1)
        views = {name: view for name, view in views.items() if name not in SOFT}
    x = pad(x, (frame,) * 4, value=-1.0)
    return World("the digits of scikit-learn", x, torch.cat([label, aside.label]), views)


@lru_cache(maxsize=4)
def _characters(size: int) -> World:
    """All visible characters in all fonts, in some sizes, without what is around them."""
    heights = 5 if size < SMALL else 3  # what is drawn large looks the same in any size
    signs = [chr(c) for c in range(33, 127)]
    x = torch.stack(
        [
            torch.tensor(drawn(c, size, font, height / (heights - 1), 0.5, 0.5)).float() / 127.5 - 1
            for c in signs
            for font in range(len(FONTS))
            for height in range(heights)
        ]
    )
    label = torch.arange(len(signs)).repeat_interleave(heights * len(FONTS))
    return World("printed characters", _framed(x[:, None]), label, _each(turns()))


def _each(views: dict[str, View]) -> dict[str, list[View]]:
    return {name: [view] for name, view in views.items()}


def _framed(x: Tensor) -> Tensor:
    """What is drawn on a flat ground, enlarged to the same square: no place, no size."""
    flat = x[:, 0]
    edge = torch.cat([flat[:, 0], flat[:, -1], flat[..., 0], flat[..., -1]], 1)
    ink = (flat - edge.median(1).values[:, None, None]).abs()
    on = ink > 0.25 * ink.amax((1, 2), keepdim=True)
    cut = []
    for picture, mask in zip(x, on, strict=True):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if not len(rows):
            rows = columns = torch.tensor([0, x.shape[-1] - 1])
        part = picture[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        cut.append(interpolate(part[None], size=(10, 10), mode="bilinear", antialias=True)[0])
    return torch.stack(cut)


# ── the comparison ──


def _match(x: Tensor, world: World) -> Match:
    """Every picture beside the known one that is most like it, in every view."""
    x = x[: max(128, 6 * 10**8 // (len(world.x) * world.x[0].numel()))]
    few = x[:48]
    if len(x) > len(few) and float((_match(few, world).least < SAME).float().mean()) < 0.3:
        x = few  # it is another world
    rows, rest = normed(x), dict[str, Tensor]()
    best, sign = torch.zeros_like(x), torch.ones(len(rows))
    kind, least = torch.zeros(len(rows), dtype=torch.int64), torch.full((len(rows),), math.inf)
    same: list[View] = [lambda x: x]
    for name, views in {PLAIN: same, **world.views}.items():
        for view in views:
            shown = view(world.x)
            if shown.shape != world.x.shape:
                continue  # it needs an even size
            alike = rows @ normed(shown).T
            value, which = alike.abs().max(1)
            left = (1 - value).clamp(min=1e-5)
            rest[name] = torch.minimum(left, rest.get(name, left))
            nearer = left < least
            best[nearer], kind[nearer] = shown[which[nearer]], world.label[which[nearer]]
            sign[nearer] = alike[torch.arange(len(rows)), which].sign()[nearer]
            least = torch.minimum(least, left)
        if name == PLAIN and float((least < SAME / 10).float().mean()) > 0.97:
            break  # nothing is left to be explained
    return Match(world, rest, best, kind, sign)


def _viewed(match: Match) -> Told | None:
    """The view that explains most of those that are not as they were."""
    plain, least, name, share = match.rest[PLAIN], match.least, PLAIN, 0.0
    for view, rest in match.rest.items():
        better = (rest < 0.5 * plain) & (rest < SAME) & (rest <= least)
        if float(better.float().mean()) > share:
            name, share = view, float(better.float().mean())
    if share < SOME:
        return None
    # Of a picture that is its own mirror image nothing can be said.
    surely = float(((plain < 0.5 * match.rest[name]) & (plain < SAME)).float().mean())
    share /= share + surely
    some = share < 0.9  # which is what augmentation does: moves, but no others
    wanted = name in CHOICES - retouches().keys() if some else name in CHOICES
    wanted = wanted or (some and name.startswith("rotated"))
    return share, "look" if wanted else "ill", f"shown {name}"


def _negatives(match: Match) -> Told | None:
    """Whether some are negatives, and others are not."""
    share = float((match.sign[match.least < SAME] < 0).float().mean())
    share = min(share, 1 - share)
    return None if share < SOME / 2 else (share, "ill", "shown as negatives")


def _colors(x: Samples) -> Callable[[Match], Told | None]:
    """Whether colors are those of tinted digits, with their channels confused."""

    def look(match: Match) -> Told | None:
        if x.shape[1] != 3:
            return None
        tint = slopes(x[: len(match.best)], match.best)
        off = {
            name: torch.cdist(tint, torch.tensor(TINTS) @ matrix).amin(1)
            for name, matrix in _confusions().items()
        }
        plain, name, share = off[PLAIN], PLAIN, 0.0
        least = torch.stack([*off.values()]).amin(0)
        for how, rest in off.items():
            better = float(((rest < 0.05) & (plain > 0.1) & (rest <= least)).float().mean())
            if better > share:
                name, share = how, better
        if share < SOME or float((least < 0.05).float().mean()) < 0.6:
            return None
        share /= share + float(((plain < 0.05) & (off[name] > 0.1)).float().mean())
        return share, "ill", f"shown {name}"

    return look


def _converted(x: Samples) -> Told | None:
    """Whether they are tinted digits in another color space."""
    if x.shape[2:] != (8, 8):
        return None
    bytes_ = 127.5 * (x[:128].flatten(1) + 1)
    for space in ("HSV", "LAB"):
        off = torch.cdist(bytes_, _tinted(space), p=1).amin(1) / bytes_.shape[1]
        share = float((off < 4).float().mean())
        if share > 0.8:
            return share, "ill", f"the pictures are tinted digits in {space}, and no RGB"
    return None


@lru_cache(maxsize=2)
def _tinted(space: str) -> Tensor:
    """All of them, as bytes of a color space."""
    data = Digits(tinted=True).build()
    x = 127.5 * (torch.cat([data.x, data.held_out().x]) + 1)
    tall = x.permute(0, 2, 3, 1).reshape(-1, 8, 3).round().byte()
    return (
        torch.tensor(np.array(Image.fromarray(tall.numpy()).convert(space)))
        .reshape(len(x), 8, 8, 3)
        .permute(0, 3, 1, 2)
        .flatten(1)
        .float()
    )


def _confusions() -> dict[str, Tensor]:
    """What becomes of three channels, as matrices on the right of a color."""
    eye = torch.eye(3)
    seen = {PLAIN: eye}
    for order in permutations(range(3)):
        if order != (0, 1, 2):
            name = " ".join(map(str, order))
            seen[f"with their colors exchanged: as channels 0 1 2 stand {name}"] = eye[:, order]
    for i in range(3):
        seen[f"without channel {i}"] = eye - eye[i].diag()
        seen[f"with the negative of channel {i}"] = eye - 2 * eye[i].diag()
        for j in {0, 1, 2} - {i}:
            one = [j if k == i else k for k in range(3)]
            seen[f"with channel {j} in place of channel {i}, which is lost"] = eye[:, one]
    return seen


def _parted(channels: list[Match]) -> Told | None:
    """Whether the channels of a picture are not those of the same one, or not shown alike."""
    ways = [torch.stack([*match.rest.values()]).argmin(0) for match in channels]
    usual = [float((way == 0).float().mean()) for way in ways]
    odd = min(range(3), key=usual.__getitem__)
    others = [c for c in range(3) if c != odd]
    moved = float((ways[odd] != ways[others[0]]).float().mean())
    if moved > SOME:
        some = ways[odd][ways[odd] > 0]
        how = [*channels[odd].rest][int(some.mode().values)] if len(some) else PLAIN
        return moved, "ill", f"shown with channel {odd} {how}, unlike the others"
    for c in (1, 2):
        foreign = float((channels[0].kind != channels[c].kind).float().mean())
        if foreign > SOME:
            return foreign, "ill", f"shown with a channel {c} that is another picture's"
    return None


def _named(label: Labels | None) -> Callable[[Match], Told | None]:
    """Whether labels are those of the digits, by another name at most."""

    def look(match: Match) -> Told | None:
        if label is None:
            return None
        sure = match.least < SAME
        counts = torch.zeros(10, int(label.max()) + 1)
        at = (match.kind[sure], label[: len(sure)][sure])
        counts.index_put_(at, torch.ones(int(sure.sum())), accumulate=True)
        return _mistaken(counts) or _renamed(counts)

    return look


def _foreign(label: Labels | None) -> Callable[[Match], Told | None]:
    """Whether there are others among them, which are called digits, too."""

    def look(match: Match) -> Told | None:
        # What is flat has no correlation with anything, and is told elsewhere.
        known, other = match.least < EXACT, (match.least > 3 * SAME) & (match.least < 0.99)
        share = float(other.float().mean())
        if share < SOME / 2 or float((known | other).float().mean()) < 0.95:
            return None
        own = label is not None and not bool(
            torch.isin(label[: len(known)][other], label[: len(known)][known]).any()
        )
        return share, "look" if own else "ill", "something else"

    return look


def _mistaken(counts: Tensor) -> Told | None:
    """Whether some of a digit have another label than most of it."""
    share = 1 - float(counts.amax(1).sum() / counts.sum())
    if not 0.03 < share < 0.45:
        return None  # labels of another meaning
    others = counts.scatter(1, counts.argmax(1, keepdim=True), 0.0)
    digit, told = divmod(int(others.argmax()), counts.shape[1])
    how = f"{digit} is called {int(counts[digit].argmax())}, and {told}"
    return share, "ill", f"with another label than most of the same digit: {how}"


def _renamed(counts: Tensor) -> Told | None:
    """Whether all ten have names of their own, and wrong ones."""
    names = counts.argmax(1)
    wrong = [
        f"{digit} is called {name}" for digit, name in enumerate(names.tolist()) if digit != name
    ]
    pure = float(counts.amax(1).sum() / counts.sum()) > 0.9
    if not (pure and bool((counts.sum(1) >= 3).all()) and len(names.unique()) >= 7 and wrong):
        return None
    return 1.0, "ill", f"with labels that are not theirs: {', '.join(wrong)}"
