"""Steps of the run taken anew: they must give what the log says.

Every step is a function of recipe, weights and step number, so the first rows of a log, and those
after the last checkpoint but one, can be had again, to six digits on the same kind of machine. If
they differ, something else was trained than the recipe says, whatever it was. Then the same steps
are taken with one slip after the other that people make, and the slip that gives the same log is
what happened.
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import cmbook
from cmbook import checkpoints
from cmbook.doctor.code import another
from cmbook.doctor.findings import Finding, found, over
from cmbook.doctor.history import way_between
from cmbook.doctor.loop import Loop, Row
from cmbook.doctor.patient import Patient, Undone
from cmbook.doctor.slips import later, scaled, slips
from cmbook.losses import EDM
from cmbook.training import blend

ROWS = 2  # of the log, each time
MOST = 1e12  # floating-point operations, of all steps: some seconds to a minute
EXACT = 2e-5  # relative: the same numbers, up to another order of sums
SAME = 1e-3  # the same on another processor
ALIKE = 0.06  # the same but for the random numbers of some 50 steps


class Span(NamedTuple):
    """Rows of the log that can be had again.

    Attributes:
        start: The checkpoint that they follow, or `None`.
        ends: The last step of each.
        logged: What they say.
    """

    start: Path | None
    ends: list[int]
    logged: list[Row]

    def off(self, loop: Loop, most: float = math.inf) -> float:
        """The largest relative difference to what this loop gives; over `most`, any further one."""
        off = 0.0
        try:
            for row, logged in zip(loop.rows(self.start, self.ends), self.logged, strict=True):
                for a, b in zip(row, logged, strict=True):
                    one = abs(a - b) / max(abs(b), 1e-30)
                    off = max(off, one if math.isfinite(one) else math.inf)
                if off > most:
                    break
        except (RuntimeError, ValueError, ArithmeticError, LookupError, TypeError):
            return math.inf  # what cannot even be carried out was not
        return off


def steps_anew(p: Patient) -> Iterator[Finding]:
    """Whether steps that are taken anew have the loss and the gradient that the log says."""
    spans = _spans(p)
    each = [span.off(Loop(p)) for span in spans]
    off, cause, remedy = max(each), "", ""
    if not off < SAME:
        first = next(i for i, one in enumerate(each) if not one < SAME)
        slip, left = _slip(p, spans[first], each[first], late=first > 0)
        worst = each.index(off)
        if slip is None and worst > first:  # there, what was learned wrongly shows
            slip, left = _slip(p, spans[worst], off, late=False)
        if slip is not None:
            again = "what" if left < SAME else f"within {left:.0%} what"
            why = f"{slip.what}: with that slip, the steps taken anew give {again} the log says"
            yield found("slip", left, "ill", why, slip.remedy)
        cause = (
            "what was trained is not what the recipe says: its steps, taken anew, have another "
            f"loss or gradient, {f'{off:.1%} off' if off < 1 else 'far from'} the log's"
        )
        remedy = "Look at your loss, at the loop and at the loader"
        if first > 0 and (path := spans[first].start) is not None:
            cause = (
                f"the weights in {path.name} are not those that the run left there, or something "
                "changed meanwhile: the first steps are what the log says, those after it are not"
            )
            remedy = "Bring them back, or train anew"
    # In 8 bits, another processor rounds otherwise.
    same = 10 * SAME if p.recipe.training.precision == "bfloat16" else SAME
    yield found("steps anew", off, over(off, same, 10 * same), cause, remedy)


def averages_anew(p: Patient) -> Iterator[Finding]:
    """Whether the average is what its decay makes of the student, from the checkpoint before."""
    span, decay = _spans(p)[-1], p.run.average
    if span.start is None or "student" not in p.weights:
        raise Undone("there is no checkpoint before the last")
    if p.run.step - _step(span.start) > _reach(p) / 3:
        raise Undone("its steps take too long here")
    strayed, (off,) = _averaged(p, span.start, [lambda k: decay])
    cause = f"the weights of step {p.run.step} are not those that its steps lead to"
    yield found("weights anew", strayed, over(strayed, 0.02), cause, "Go on from the one before")
    if strayed > 0.02:
        return
    how = ""
    if off > 0.03:
        others = _other_decays(decay)
        _, offs = _averaged(p, span.start, [*others.values()])
        best, said = min(zip(offs, others, strict=True))
        how = f": {said}" if best < 0.01 else ""
    cause = f"the average is not what training.average_decay = {decay:g} makes{how}"
    yield found("average anew", off, over(off, 0.03, 0.1), cause, "Call blend after every step")


def _other_decays(decay: float) -> dict[str, Callable[[int], float]]:
    """What people blend by, as a function of the step."""
    return {
        "it was never moved": lambda k: 1.0,
        "it is the student itself": lambda k: 0.0,
        "it was moved by its decay, not by what is left of 1": lambda k: 1 - decay,
        "its decay warmed up, as (1 + k) / (10 + k)": lambda k: min(decay, (1 + k) / (10 + k)),
    } | {
        f"its decay was {other:g}": lambda k, other=other: other
        for other in (0.5, 0.9, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999)
        if other not in (decay, 1 - decay)
    }


def _averaged(
    p: Patient, start: Path, decays: list[Callable[[int], float]]
) -> tuple[float, list[float]]:
    """How far student and averages end from those of the last checkpoint, over the way there."""
    loop = Loop(p)
    loop.start = start
    loop.begin()
    before = {name: w.detach().clone() for name, w in loop.student.named_parameters()}
    began = loop.state.averages.get(p.run.average, loop.state.average)
    made, steps = [deepcopy(began) for _ in decays], range(loop.state.step, p.run.step)
    for k in tqdm(steps, "taking steps anew", leave=False, disable=None):
        loop.step(k)
        for average, decay in zip(made, decays, strict=True):
            blend(average, loop.student, decay(k))
    way = max(way_between(before, p.weights["student"]), 1e-30)
    strayed, *offs = (
        way_between(dict(model.named_parameters()), p.weights[which]) / way
        for model, which in [(loop.student, "student"), *((each, "average") for each in made)]
    )
    return strayed, offs


def _reach(p: Patient) -> float:
    """How many steps can be taken here in some seconds to a minute."""
    # Forward, twice backward, and whoever else is asked.
    asked = 1 if isinstance(p.recipe.objective, EDM) else 3 if p.recipe.teacher else 2
    return MOST / ((2 + asked) * p.flops * p.recipe.training.batch_size)


def _spans(p: Patient) -> list[Span]:
    from cmbook import runs

    record = p.run.record
    if p.data is None:
        raise Undone(p.missing)
    if p.recipe.teacher is not None and p.teacher is None:
        raise Undone(f"the teacher {p.recipe.teacher} is not at hand")
    elsewhere = record.get("cmbook") != cmbook.__version__ or record.get("changes")
    if elsewhere or {record.get("device"), p.device} != {"cpu"}:
        raise Undone("steps can be taken anew with the same version and settings, on a CPU")
    starts, saved = list[Path | None](), checkpoints.checkpoints(p.run.folder / "checkpoints")
    if record.get("torch") == torch.__version__:  # another may draw other first weights
        starts.append(None)
    starts += [path for path in saved if _step(path) < p.run.step][-1:]
    spans = [span for start in starts if (span := _span(p, start, _reach(p)))]
    if not spans:
        raise Undone("its steps take too long here, or the log does not tell of them")
    now = runs.inputs_of(p.data, None if p.teacher is None else p.teacher.model)
    if any(record.get(name) != fingerprint for name, fingerprint in now.items()):
        raise Undone("data or teacher are not those that it was trained with")
    return spans


def _span(p: Patient, start: Path | None, most: float) -> Span | None:
    """The rows that follow a checkpoint, as far as that many steps reach."""
    begin = 0 if start is None else _step(start)
    rows = [row for row in p.rows if begin < row.get("step", 0) <= min(p.run.step, begin + most)]
    ends = [int(row["step"]) for row in rows[:ROWS]]
    logged = [
        (row.get("loss", math.nan), row.get("gradient_norm", math.nan)) for row in rows[:ROWS]
    ]
    known = all(math.isfinite(number) for row in logged for number in row)
    return Span(start, ends, logged) if ends and known else None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _slip(p: Patient, span: Span, off: float, late: bool) -> tuple[Loop | None, float]:
    """The slip that gives what the log says, if there is one, and what difference it leaves."""
    tried = [*later(p)] if late else [*scaled(p, *_ratio(p, span)), *slips(p)]
    scores = list[tuple[float, Loop]]()
    for slip in tqdm(tried, "trying what may have gone wrong", leave=False, disable=None):
        scores.append((span.off(slip, ALIKE), slip))
        if scores[-1][0] < EXACT:
            break
    scores.sort(key=lambda score: score[0])
    if not scores:
        return None, off
    (left, slip), second = scores[0], scores[1][0] if len(scores) > 1 else math.inf
    # So far off, it is no other order of sums on another processor.
    near = off > 10 * SAME and left < min(ALIKE, off / 3, 0.6 * second)
    alike = left < EXACT or (near and not another(p))  # where the lines are known, no guess is told
    return (slip, left) if alike else (None, off)


def _ratio(p: Patient, span: Span) -> Row:
    """Of the log's first row to the same steps taken anew."""
    try:
        anew = next(Loop(p).rows(span.start, span.ends))
    except (RuntimeError, ValueError, ArithmeticError, LookupError, TypeError):
        return 1.0, 1.0
    loss, norm = (b / a if a else 1.0 for a, b in zip(anew, span.logged[0], strict=True))
    return loss, norm
