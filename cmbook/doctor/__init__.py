"""The doctor: what is wrong with a run, the likely cause first.

A check measures one number that means something whatever the fault: what the weights have moved,
what is left of the first weights in an average, how much better than a denoiser that knows means
and variances alone. Limits lie where the meaning changes, far from what healthy runs show.

What is upstream is named first: bad data explain a bad teacher, a bad teacher explains a bad
student. Some findings are suspicions: they are the diagnosis only if there is a symptom as well.

Read in order: what a check finds (`findings`), what it needs (`patient`), then the checks: what
comes before training (`views`, `parts`, `marred`, `worlds`, `upstream`, `usual`), training itself,
taken anew (`replay`, by `loop` and `slips`) and read (`code`), its traces (`history`), and what the
model says (`answers`). If all of that explains nothing, the recipe is tried with other settings
(`trials`), or for longer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from cmbook.data import Data
from cmbook.doctor import answers, history, parts, upstream
from cmbook.doctor.code import code
from cmbook.doctor.findings import NORMS, Diagnosis, Finding, Verdict, found, over, ranked
from cmbook.doctor.patient import NUMBERS, Patient, Undone, admit
from cmbook.doctor.replay import averages_anew, steps_anew
from cmbook.doctor.trials import recipe_anew
from cmbook.doctor.usual import settings
from cmbook.doctor.worlds import known_data
from cmbook.experiment import Experiment
from cmbook.losses import ConsistencyTraining
from cmbook.protocols import Clock

if TYPE_CHECKING:  # runs warns by this package, so it is imported by `examine` alone
    from cmbook.runs import Run

Check = Callable[[Patient], Iterator[Finding]]
__all__ = ["CHECKS", "NORMS", "Diagnosis", "Finding", "Watch", "examine", "warnings"]


def teacher_itself(p: Patient) -> Iterator[Finding]:
    """What the doctor says of the teacher, though not of its own teacher."""
    theirs = p.teacher
    if theirs is None:
        return
    said = examine(theirs, device=p.device, with_teacher=False)
    ill = sum(finding.verdict == "ill" for finding in said.findings)
    first = said.findings[0]
    remedy = f"{first.remedy}. The whole list: cmbook doctor {theirs.folder}".removeprefix(". ")
    verdict: Verdict = "ill" if ill else first.verdict
    cause = f"the teacher {'is ill' if ill else 'may be odd'}: {first.cause}"
    if not ill and first.norm.role in ("symptom", "late"):
        verdict = "well"  # that is measured of it with this run's levels, too
    yield found("teacher itself", ill, verdict, cause, remedy)


CHECKS: tuple[Check, ...] = (  # upstream first
    *(upstream.data_variety, upstream.data_range, upstream.data_spread, known_data),
    *(upstream.data_layout, upstream.data_negatives, upstream.data_labels, upstream.data_flip),
    *(parts.placeholders, parts.cut_elsewhere, parts.pictures, parts.held_out),
    *(upstream.noise_range, settings, upstream.finite, upstream.boundary),
    *(upstream.guidance, answers.teacher_labels, teacher_itself, upstream.teacher),
    *(upstream.unlabelled, upstream.walk, upstream.teacher_samples, upstream.first_round),
    *(history.bits, history.values, history.kin, steps_anew, code, averages_anew),
    *(history.progress, history.moved, answers.told, history.repeats, history.gradients),
    *(history.optimizer, history.curves, history.averages),
    *(upstream.levels, upstream.drawn_levels, upstream.same_data),
    *(answers.hears_sigma, answers.copies, answers.labels, answers.denoises, answers.walk),
    *(answers.variety, answers.inside, answers.modes, answers.follows, answers.tangents),
    *(answers.agrees, answers.samples, answers.loss_by_sigma),
)


def examine(
    run: "Run | Path | str",
    *,
    data: Data | None = None,
    device: str = "cpu",
    average: float | None = None,
    with_teacher: bool = True,
) -> Diagnosis:
    """Measure a run and say what is wrong with it: the likely cause first.

    Args:
        run: A run, its folder, one of its checkpoints, an exported model, or a student's name.
        data: What it was trained on; by default what its recipe says, if that is at hand.
        device: Where to compute.
        average: The decay of the moving average to examine, if there are several.
        with_teacher: Whether to examine its teacher, too.

    Returns:
        The findings. Checks whose data, teacher, log or weights are not at hand are listed apart.

    Raises:
        ValueError: If there is no such run, or its checkpoint is damaged.

    Example:
        >>> print(examine("digits/cd").headline)
        healthy

    Source: ours.
    """
    from cmbook import runs

    made = runs.load(run, device, average=average) if isinstance(run, Path | str) else run
    patient = admit(made, data, device)
    findings, skipped = list[Finding](), dict[str, str]()
    for check in CHECKS if with_teacher else [c for c in CHECKS if c is not teacher_itself]:
        if check in (history.repeats, history.gradients) and _known(findings):
            continue  # they would say the same, less exactly
        if check is averages_anew and not _same(findings):
            continue  # no step is what it should be
        _carry_out(check, patient, findings, skipped)
    findings += _too_short(patient, findings)
    if _puzzling(findings, patient):
        _carry_out(_trial(findings), patient, findings, skipped)
        findings = findings if patient.early else _cleared(findings)
    notes = tuple(_notes(patient.recipe))
    return Diagnosis(ranked(findings, patient.early), skipped, notes)


def _same(findings: list[Finding]) -> bool:
    """Whether steps were taken anew, and nothing was wrong."""
    return any(f.check == "steps anew" and f.verdict == "well" for f in findings)


def _too_short(p: Patient, findings: list[Finding]) -> Iterator[Finding]:
    """Whether a run was to end before it has learned what comes late."""
    late = [f.verdict for f in findings if f.verdict != "well" and f.norm.role == "late"]
    if p.run.finished:
        seen = p.run.step * p.recipe.training.batch_size
        bad: Verdict = "ill" if p.early and ("ill" in late or len(late) > 1) else "well"
        cause = (
            f"it was trained too short: it has seen {seen:,} samples, and what it makes is not "
            "like the data yet"
        )
        yield found("samples seen", seen, bad, cause)


def _carry_out(check: Check, p: Patient, findings: list[Finding], skipped: dict[str, str]) -> None:
    """Add what it finds, or why it could not be done."""
    try:
        findings += check(p)
    except Undone as why:
        skipped[check.__name__.replace("_", " ")] = str(why)
    except (RuntimeError, ValueError, ArithmeticError, LookupError, TypeError) as error:
        # What breaks one check, such as a decomposition of NaN, is what the others tell of.
        skipped[check.__name__.replace("_", " ")] = f"it failed: {error}".splitlines()[0]


def _trial(findings: list[Finding]) -> Check:
    """The recipe with other settings: first those that are suspected."""
    odd = [f for f in findings if f.verdict != "well" and f.norm.role in ("suspicion", "vague")]
    sick = any(f.verdict == "ill" and f.norm.role in ("symptom", "late") for f in findings)

    def trial(p: Patient) -> Iterator[Finding]:
        said = " ".join(f"{f.cause} {f.remedy}" for f in odd)
        yield from recipe_anew(p, said, sick)

    return trial


def _puzzling(findings: list[Finding], p: Patient) -> bool:
    """Whether the run is bad, or its settings are odd, and nothing says why."""
    bad = [f for f in findings if f.verdict != "well"]
    wrong = any(f.verdict == "ill" and f.check == "steps anew" for f in bad)
    if wrong or any((f.verdict, f.norm.role) == ("ill", "fault") for f in bad):
        return False
    late = () if p.early else ("late",)
    sick = any(
        f.norm.role in ("symptom", *late) for f in bad if f.verdict == "ill" or f.check == "samples"
    )
    odd = {f.check for f in bad}
    astray = "stray" in odd and "teacher itself" not in odd
    if p.early:
        return sick or (p.run.finished and {"settings", "stray"} <= odd)
    return sick or "settings" in odd or astray


def _cleared(findings: list[Finding]) -> list[Finding]:
    """Without a suspicion of settings that a trial has found to be as good as others."""
    *before, last = findings
    if last.check != "settings":
        return findings
    return [*(f for f in before if f.check != "settings"), last]


def _known(findings: list[Finding]) -> bool:
    """The same, or it is known what was wrong."""
    return _same(findings) or any(f.check == "slip" for f in findings)


def _notes(recipe: Experiment) -> Iterator[str]:
    """What is no fault."""
    if not isinstance(recipe.objective, ConsistencyTraining):
        return
    curriculum, steps = recipe.objective.curriculum, recipe.training.steps
    clocks = [Clock(k, steps) for k in (0, steps // 2, steps - 1)]
    levels = ", ".join(str(curriculum.levels_at(clock)) for clock in clocks)
    decays = ", ".join(f"{curriculum.decay_at(clock):.3g}" for clock in clocks)
    yield f"N(k) is {levels} and mu(k) {decays} at the start, the middle and the end"
    if history.grows(recipe):
        yield "the loss need not fall while N grows: every N is another, harder question"


# ── while training ──


def warnings(recipe: Experiment, data: Data) -> list[str]:
    """What can be said before the first step, a line each: data, sigma_data, the average.

    Source: ours.
    """
    size = max(16, min(256, NUMBERS // 16 // max(1, torch.Size(data.shape).numel())))
    x, knobs = next(data.batches(size, recipe.seed)).x, recipe.training
    std, largest = float(x.double().std(correction=0)), float(x.abs().max())
    cause = f"the data reach {largest:.3g}, not 1"
    return _said(
        found("data range", largest, over(largest, 3), cause, "For bytes use x / 127.5 - 1"),
        upstream.sigma_data_finding(std, recipe.noise_range),
        history.memory_finding(knobs.average_decay, knobs.steps),
    )


@dataclass
class Watch:
    """Sees the rows of the log as they are written, and says each thing once.

    Source: ours.
    """

    norms: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def __call__(self, norm: float, student: nn.Module) -> list[str]:
        """Warnings, if it is time for some: the gradient explodes, or no weight moves.

        Args:
            norm: Of the gradient, the mean since the last row.
            student: What learns.
        """
        self.norms.append(norm)
        sums = [float(p.detach().double().sum()) for p in student.parameters()]
        still, self.before = sums == self.before, sums
        cause = "no weight has moved since the last row of the log: the student is frozen"
        new = [found("frozen weights", still, "ill" if still else "well", cause)]
        if len(self.norms) >= 5:
            new.append(history.gradient_finding(self.norms))
        new = [f for f in new if f.check not in self.said]
        self.said |= {f.check for f in new if f.verdict != "well"}
        return _said(*new)


def _said(*findings: Finding) -> list[str]:
    return [f"{f.cause}. {f.remedy}" for f in findings if f.verdict != "well"]
