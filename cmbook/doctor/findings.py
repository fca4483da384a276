"""What a check finds, what is normal, and the order in which it is told."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

Verdict = Literal["well", "look", "ill"]


class Norm(NamedTuple):
    """What is normal for a check, what to do otherwise, and which part it plays.

    Attributes:
        normal: What healthy runs show, and why.
        remedy: What to do, where the finding does not say it better.
        role: A `fault` is a diagnosis by itself. A `suspicion` is one beside a symptom. What
            is `vague` is told after all faults that say more. A `symptom` is measured of what the
            model answers; one that is `late` is no fault yet in a run that has hardly begun.

    Source: ours.
    """

    normal: str
    remedy: str = ""
    role: Literal["fault", "suspicion", "vague", "symptom", "late"] = "fault"


_LOWER = "Lower training.optimizer.lr, or set training.clip=1"
LONGER = "Train longer, or look at learning rate and levels"
_PICTURES = "Look at the data: cmbook data check PATH --sheet sheet.png"
NORMS = {
    "data constant": Norm("share of samples of one flat color: 0", _PICTURES),
    "data copies": Norm("share that is nearly the same as another: 0", _PICTURES),
    "data range": Norm(
        "largest number: 1, as noise levels expect", "Scale them to [-1, 1]; files, to 0 to 255"
    ),
    "data layout": Norm("correlation of neighboring pixels: above 0.2", _PICTURES),
    "data channels": Norm("largest over smallest std of a channel: 1 to 2", "Scale them alike"),
    "data scales": Norm(
        "largest over smallest std of a coordinate: 1 to 4", "Scale them alike", "suspicion"
    ),
    "data center": Norm(
        "distance of their mean from 0, over their std: below 1", "Subtract it", "suspicion"
    ),
    "data fixed": Norm("share of coordinates that never change: 0 to 0.5", "", "suspicion"),
    "data piled up": Norm(
        "share of points on their own bounds: 0", "Leave them as they are", "suspicion"
    ),
    "data pixels": Norm(
        "share of pixels unlike all their neighbors: 0 to 0.002",
        "Scale before you cast to bytes, and to 255 at most",
        "suspicion",
    ),
    "data mixed": Norm("share of pictures in another range: 0", _PICTURES, "suspicion"),
    "held out": Norm(
        "energy distance of training to held-out samples: near 0",
        "Look at both: were they read, scaled and chosen alike?",
    ),
    "data placeholder": Norm("share of one and the same sample: 0", "Leave it out"),
    "data missing": Norm("share of one value of a coordinate: 0", "Leave these out"),
    "data cut off": Norm("share of pictures flat at one side: below 0.03", _PICTURES),
    "data channel copies": Norm("pairs of channels that are always equal: 0", _PICTURES),
    "data color space": Norm(
        "black and white pixels whose other channels are in the middle: 0", "Convert them to RGB"
    ),
    "data compressed": Norm("steps of JPEG, of 255: 0 to 14", "Get the originals"),
    "data cut elsewhere": Norm(
        "likeness of the end of a picture and the beginning of the next: that of others", _PICTURES
    ),
    "data gray": Norm("share of gray ones among colored: below 0.1", _PICTURES, "suspicion"),
    "data turned": Norm(
        "how foreign pictures are once turned, over how they are otherwise: about 1", _PICTURES
    ),
    "data dead pixels": Norm("pixels that never change amid others that do: 0", _PICTURES),
    "data stamp": Norm("share with the same in one corner: 0", _PICTURES, "suspicion"),
    "data kinds": Norm("share of pictures of another kind: 0", _PICTURES, "suspicion"),
    "data seam": Norm("difference at a seam, over that beside it: near 1", _PICTURES, "suspicion"),
    "data rounded": Norm(
        "different values of a coordinate, over samples: 1", "Leave them as they are", "suspicion"
    ),
    "data blocks": Norm("columns that always equal the next: 0", _PICTURES, "suspicion"),
    "known data": Norm(
        "share of known pictures that were changed: 0", "Undo it where the data are made or read"
    ),
    "data negatives": Norm("share of negatives of others: 0", _PICTURES),
    "labels wrong": Norm(
        "samples amid another class: below 0.05", "Check how labels were made", "suspicion"
    ),
    "class balance": Norm("effective share of the classes: 1", "Balance them, or leave them out"),
    "classes missing": Norm(
        "classes without samples: 0", "Look at data.limit and the folders; number classes from 0"
    ),
    "label meaning": Norm(
        "neighbors of one class, over chance: well above 1",
        "Check that samples and labels are in the same order",
    ),
    "flip": Norm(
        "how far mirrored samples lie from the others, over samples: 1", "Set data.flip=false"
    ),
    "same data": Norm(
        "1: those of the run's record", "Bring them back, or train anew", "suspicion"
    ),
    "data size": Norm("samples: hundreds at least", "Get more data", "suspicion"),
    "sigma_data": Norm("over the data's std: 1"),
    "sigma_max": Norm("over the data's std: 10 or more, where they drown"),
    "sigma_max high": Norm("over the data's std: below 1500", "", "suspicion"),
    "rho": Norm("of the grid: 7, or 3 to 20", "Set noise_range.rho=7", "suspicion"),
    "settings": Norm("how many no published recipe comes near: 0", "Look at them", "vague"),
    "sigma_min": Norm("over the data's std: below 0.03"),
    "finite": Norm("numbers that are NaN or infinite: 0", _LOWER),
    "dress": Norm("0: the scalings suit the objective", 'Set scalings = { kind = "EDMScalings" }'),
    "boundary": Norm(
        "relative error of f(x, sigma_min) = x: 0, whatever the weights",
        'Train with scalings = { kind = "ConsistencyScalings" }; the record may have been edited',
    ),
    "drawn levels": Norm(
        "share of draws near the data's std: above 0.2",
        "Choose objective.sigma_law, or the noise range, so that they are",
        "suspicion",
    ),
    "levels": Norm("N at the end: 8 to 1281", "Raise the levels of the objective", "suspicion"),
    "first levels": Norm(
        "N at the start: 2 to 160", "Begin with 10, as objective.curriculum can", "suspicion"
    ),
    "guidance": Norm("1, which is none, or more", "Set guidance=1"),
    "itself": Norm("faults that the teacher itself shows: 0"),
    "unlabelled": Norm("of what the data teach without a label: 0.5 or more"),
    "kind": Norm("0: it is a diffusion model", "", "suspicion"),
    "walk": Norm(
        "share of it far outside the data: 0", "Lower guidance, or look at the teacher", "suspicion"
    ),
    "walk variety": Norm(
        "variance in a class that guidance leaves, over the data's: above 0.3", "Lower guidance"
    ),
    "first round": Norm(
        "energy distance of what it learns to the data: below 0.003; bad from 0.02",
        "Begin with more, such as 16: they halve from round to round",
    ),
    "grid": Norm("what the walk loses on its grid, over chance: below 0.3", "", "suspicion"),
    "precision": Norm("bits of a rounded answer", "Set training.precision=float32", "suspicion"),
    "slip": Norm("difference to the log that one leaves: nothing is wrong that would explain it"),
    "steps anew": Norm(
        "loss and gradient of some steps, taken anew, off the log's: below 0.001", "", "vague"
    ),
    "code": Norm("functions that were others than cmbook's: 0", "", "suspicion"),
    "recipe anew": Norm(
        "times that samples come nearer if it is trained anew as it is: below 2",
        "Look at your loss, at the loop and at the loader",
        "vague",
    ),
    "trial": Norm("times that samples come nearer with published settings, or more steps: below 2"),
    "finished": Norm("share of the steps that are taken: 1"),
    "samples seen": Norm(
        "100,000 at least, 300,000 by a consistency model", "Raise training.steps", "vague"
    ),
    "kept": Norm(
        "of what the weights began as, where they have not grown: 0.6 to 1",
        "Take the weights as they were trained",
        "suspicion",
    ),
    "frozen weights": Norm(
        "share of weights that are as they began: 0",
        "Check requires_grad, the optimizer's parameters, that the loss is not detached, and that "
        "weights from elsewhere were all loaded",
    ),
    "kin": Norm(
        "share of matrices that resemble nothing they began as: 0",
        "Convert them anew, and compare answers before and after",
    ),
    "values": Norm(
        "different values in a matrix, over its numbers: near 1",
        "Take the weights as they were before they were compressed",
    ),
    "weight bits": Norm(
        "bits of a number that is trained: 32",
        "Keep weights, moments and averages in float32; training.precision casts what may be less",
    ),
    "one value": Norm(
        "share of it in a matrix: 0", "Take the weights as they were trained", "suspicion"
    ),
    "step size": Norm("a step of Adam over a weight: 0.001 to 0.1", _LOWER, "suspicion"),
    "moved": Norm(
        "way of the weights, over their size: 0.1 to 5",
        "Raise training.optimizer.lr, to about 1e-3 for small networks, or training.steps",
        "suspicion",
    ),
    "loss": Norm("at the end over the start: below 1", _LOWER, "suspicion"),
    "loss at the end": Norm("last quarter over before: below 1.5", _LOWER, "suspicion"),
    "noise told": Norm(
        "noise that its answers suit, over what it is told: 1", "Look at add_noise and the loss"
    ),
    "loss again": Norm(
        "on fresh noise and samples, over that in the log: 0.75 to 1.3",
        "Draw both anew in every step: look at loader, seed of the generator, and loss",
    ),
    "gradient again": Norm(
        "the recipe's, computed anew, over that in the log: 0.5 to 1.8; bad from 2.5"
    ),
    "optimizer steps": Norm(
        "share of the steps that it has counted: 1", "Make it once, before the loop", "suspicion"
    ),
    "weight decay": Norm("of the optimizer: 0", "Set it to 0", "suspicion"),
    "gradient": Norm("largest over typical norm: below 10", _LOWER, "suspicion"),
    "average memory": Norm("share of the first weights in it: below 0.1", "", "suspicion"),
    "average moves": Norm("its way over the student's: 1", "Call blend after every step"),
    "weights anew": Norm("of the last checkpoint, off those of the steps anew: 0", "", "vague"),
    "average anew": Norm("difference to what its decay makes, over the student's way: 0"),
    "target moves": Norm(
        "its way over the student's: 1",
        "Lower mu, or check that the target is updated after every step",
        "suspicion",
    ),
    "average behind": Norm(
        "denoising error over the student's: 1", "Lower training.average_decay", "suspicion"
    ),
    "batch": Norm("samples in a step: 32 or more", "Raise training.batch_size", "suspicion"),
    "betas": Norm(
        "of Adam, the first: 0 to 0.95", "Set training.optimizer.betas=[0.9,0.999]", "suspicion"
    ),
    "warm-up": Norm("share of the steps: below 0.5", "Lower training.warmup", "suspicion"),
    "network size": Norm(
        "weights for each number of a sample: hundreds", "Take a larger network", "suspicion"
    ),
    "rate again": Norm(
        "the log's over the recipe's: 1", "Look at what else sets the optimizer's", "suspicion"
    ),
    "dropout": Norm("share that is dropped: 0 to 0.3", "Lower it", "suspicion"),
    "hears sigma": Norm(
        "change of the network's answer with sigma: 0.1 to 1",
        "Check the time embedding, and that c_noise reaches the network",
    ),
    "by heart": Norm(
        "share of samples that nearly are training samples: 0",
        "Use more data, fewer steps or a smaller network",
        "symptom",
    ),
    "labels": Norm(
        "what the right label saves, over what it could: 0.3 to 2",
        "Check that labels reach the network in training, in the order of the data",
        "symptom",
    ),
    "denoises": Norm(
        "error over that of means and variances alone: below 1; bad from 1.5",
        "Set the scalings, sigma_data or range that it was trained with",
        "symptom",
    ),
    "answers": Norm(
        "slope of the truth against them: 1, as means have",
        "Set the scalings that it was trained with; look at add_noise and the loss",
        "symptom",
    ),
    "learned": Norm("of what the data teach beyond that: 0.5 or more", LONGER, "late"),
    "variety": Norm(
        "variance that noise makes, over the data's: 0.7 to 1.2, bad at 0.2", LONGER, "late"
    ),
    "sample range": Norm("share of numbers far outside the data's: 0", LONGER, "late"),
    "samples": Norm(
        "energy distance to the data: below 0.003; bad from 0.02, a teacher's from 0.015",
        LONGER,
        "late",
    ),
    "stray": Norm(
        "share of samples farther from the data than 9 in 10 of these are: 0.1 to 0.35",
        LONGER,
        "symptom",
    ),
    "modes": Norm("mass of the data that is missed: below 0.25; bad from 0.5", LONGER, "late"),
    "follows teacher": Norm("distance from its walk, over chance: below 0.6", LONGER, "symptom"),
    "agreement": Norm(
        "difference of answers at sigma_max and at half of it, over the data's std: below 0.1",
        LONGER,
        "late",
    ),
    "tangent": Norm("answer's change as sigma doubles, over the data: below 2", _LOWER, "symptom"),
    "loss by sigma": Norm(
        "largest share of an eighth of the levels: below 0.8",
        'Set objective.weight, such as "inverse_gap"',
    ),
}


@dataclass(frozen=True)
class Finding:
    """One check: what was measured, and what follows.

    Attributes:
        check: Its name, as in `NORMS`. What is said of the teacher begins with "teacher".
        measured: A number, in the unit that `normal` speaks of.
        verdict: `well`; `look`, which need not be a fault; or `ill`.
        cause: The likely cause, if not well.
        remedy: What to do, if not well.

    Source: ours.
    """

    check: str
    measured: float
    verdict: Verdict = "well"
    cause: str = ""
    remedy: str = ""

    @property
    def norm(self) -> Norm:
        """What is normal. A teacher is upstream: its symptoms are faults."""
        norm = NORMS[self.check.removeprefix("teacher ")]
        fault = self.check.startswith("teacher ") and norm.role not in ("suspicion", "vague")
        return norm._replace(role="fault") if fault else norm


def found(check: str, measured: float, verdict: Verdict, cause: str, remedy: str = "") -> Finding:
    """A finding: what is well needs neither cause nor remedy.

    Source: ours.
    """
    plain = Finding(check, float(measured))
    if verdict == "well":
        return plain
    return replace(plain, verdict=verdict, cause=cause, remedy=remedy or plain.norm.remedy)


def over(value: float, look: float, ill: float = math.inf) -> Verdict:
    """Too much is bad, and so is what is no number.

    Source: ours.
    """
    if not value <= ill:
        return "ill"
    return "look" if value > look else "well"


def under(value: float, look: float, ill: float = -math.inf) -> Verdict:
    """Too little is bad, and so is what is no number.

    Source: ours.
    """
    if not value >= ill:
        return "ill"
    return "look" if value < look else "well"


def ranked(findings: list[Finding], early: bool) -> tuple[Finding, ...]:
    """The ill first, upstream before downstream; then those to look at, then the rest.

    Args:
        findings: In the order of their checks, upstream first.
        early: Whether the run has hardly begun, so that what comes late is no fault.

    Source: ours.
    """
    bad = {f.norm.role for f in findings if f.verdict == "ill"}
    sick = bool(bad & {"symptom", "late"})
    surely = "symptom" in bad or (sick and not early)
    # What is odd about a teacher is why its samples are bad, if nothing else is.
    known = {f.check for f in findings if f.verdict == "ill" and f.check.startswith("teacher ")}
    poor = known == {"teacher samples"}
    anew = {f.check: f.verdict for f in findings if f.check.endswith(" anew")}

    def judged(f: Finding) -> Finding:
        if f.check == "code" and f.verdict == "look" and anew:
            return _matters(f, anew)
        if f.verdict == "look" and {"suspicion": sick, "vague": surely}.get(f.norm.role):
            return replace(f, verdict="ill")
        if poor and f.verdict == "look" and f.check == "teacher itself":
            return replace(f, verdict="ill")
        if early and f.verdict == "ill" and f.norm.role == "late":
            return replace(f, verdict="look")
        return f

    def rank(f: Finding) -> tuple[int, int]:
        if f.verdict != "ill":  # this run comes before its teacher, and what a trial says first
            later = {"trial": -1, "teacher itself": 1, "stray": 2}.get(f.check, 0)
            return ("look", "well").index(f.verdict) + 1, later
        said = {"suspicion": 2, "vague": 3, "symptom": 4, "late": 4}.get(f.norm.role, 0)
        certain = {"code": 0, "steps anew": 1}  # if vague
        return 0, certain.get(f.check, said)

    return tuple(sorted(map(judged, findings), key=rank))


def _matters(f: Finding, anew: dict[str, Verdict]) -> Finding:
    """Other code is a fault if it makes a difference, and nothing to look at if it makes none."""
    if "ill" in anew.values():
        return replace(f, verdict="ill")
    same = all(anew.get(check) == "well" for check in ("steps anew", "average anew"))
    return Finding(f.check, f.measured) if same else f


@dataclass(frozen=True)
class Diagnosis:
    """All findings, the likely cause first.

    Attributes:
        findings: Ill ones first, upstream before downstream, then those to look at, then the rest.
        skipped: Checks that could not be done, and why.
        notes: What is true of this run and often mistaken for a fault.

    Source: ours.
    """

    findings: tuple[Finding, ...]
    skipped: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing is ill."""
        return all(finding.verdict != "ill" for finding in self.findings)

    @property
    def headline(self) -> str:
        """One line: healthy, or the likely cause and what to do."""
        worst = self.findings[0] if self.findings else None
        if worst is None or worst.verdict == "well":
            return "healthy"
        if worst.verdict == "look":
            return f"healthy, but look: {worst.cause}"
        return f"ill: {worst.cause}. {worst.remedy}".strip()

    def __str__(self) -> str:
        """The headline, a table, and what was not done."""
        lines = [self.headline, ""]
        width = max((len(f.check) for f in self.findings), default=0)
        for f in self.findings:
            lines.append(f"{f.verdict:4}  {f.check:{width}}  {f.measured:9.3g}   {f.norm.normal}")
            if f.verdict != "well":
                lines.append(f"{'':{width + 20}}-> {f.cause}. {f.remedy}".rstrip())
        lines += [f"note  {note}" for note in self.notes]
        for why in dict.fromkeys(self.skipped.values()):
            checks = ", ".join(check for check, reason in self.skipped.items() if reason == why)
            lines.append(f"not done: {checks}; {why}")
        return "\n".join(lines)

    def numbers(self) -> dict[str, Any]:
        """The same for a program to read; what is no number is `None`, which JSON knows."""
        rows = [
            {
                **asdict(f),
                "measured": f.measured if math.isfinite(f.measured) else None,
                "normal": f.norm.normal,
            }
            for f in self.findings
        ]
        return {
            "healthy": self.healthy,
            "headline": self.headline,
            "findings": rows,
            "skipped": self.skipped,
            "notes": list(self.notes),
        }
