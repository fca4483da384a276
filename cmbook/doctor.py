"""The doctor: what is wrong with a run, the likely cause first.

A check measures one number that means something whatever the fault: what the weights could have
moved, what is left of the first weights in an average, how much better than a denoiser that knows
means and variances alone. Limits lie where the meaning changes, far from what healthy runs show.

What is upstream is named first: bad data explain a bad teacher, a bad teacher explains a bad
student. Some findings are suspicions: they are the diagnosis only if there is a symptom as well.
"""

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cmbook import checkpoints
from cmbook.data import Data, ImageData, TensorData
from cmbook.evaluation import nearest_training
from cmbook.experiment import Experiment
from cmbook.guidance import guided
from cmbook.losses import (
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousDistillation,
    ContinuousTraining,
    ProgressiveDistillation,
    tangent,
)
from cmbook.noise import NoiseRange, PerImage, add_noise, integers, normal, seeded
from cmbook.ode import velocity
from cmbook.oracle import Dataset
from cmbook.parameterization import AnyScalings, ConsistencyScalings, Preconditioned
from cmbook.protocols import Batch, Clock, Denoiser, Labels, Loss, Models, PerSample, Samples
from cmbook.samplers import ode_sample

if TYPE_CHECKING:  # runs warns by this module, so it is imported by `examine` alone
    from cmbook.runs import Run

Verdict = Literal["well", "look", "ill"]
CONSISTENCY = (
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousDistillation,
    ContinuousTraining,
)
LEVELS = (0.2, 0.5, 1.0, 2.0, 4.0)  # noise in standard deviations of the data: where images form
NUMBERS, SAMPLES = 1 << 24, 2048  # at most so many numbers, and samples, of the data are looked at
FLOPS = 2e9  # of one probe, of about a hundred: some seconds in all on one core
POOR = 1.5  # times the error of a denoiser that knows means and variances alone


@dataclass(frozen=True)
class Finding:
    """One check: what was measured, what is normal, and what follows.

    Attributes:
        check: Its name.
        measured: A number, in the unit that `normal` speaks of.
        normal: What healthy runs show, and why.
        verdict: `well`; `look`, which need not be a fault; or `ill`.
        cause: The likely cause, if not well.
        remedy: What to do, if not well.
        suspicion: Whether it becomes the diagnosis if the model itself turns out to be bad.
        symptom: Whether it is measured of what the model answers.

    Source: ours.
    """

    check: str
    measured: float
    normal: str
    verdict: Verdict = "well"
    cause: str = ""
    remedy: str = ""
    suspicion: bool = False
    symptom: bool = False


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
        return f"ill: {worst.cause}. {worst.remedy}"

    def __str__(self) -> str:
        """The headline, a table, and what was not done."""
        lines = [self.headline, ""]
        width = max((len(finding.check) for finding in self.findings), default=0)
        for found in self.findings:
            lines.append(
                f"{found.verdict:4}  {found.check:{width}}  {found.measured:9.3g}   {found.normal}"
            )
            if found.verdict != "well":
                lines.append(f"{'':{width + 20}}-> {found.cause}. {found.remedy}")
        lines += [f"note  {note}" for note in self.notes]
        lines += [f"not done: {check}, {why}" for check, why in self.skipped.items()]
        return "\n".join(lines)

    def numbers(self) -> dict[str, Any]:
        """The same for a program to read."""
        return {"healthy": self.healthy, "headline": self.headline, **asdict(self)}


class Norm(NamedTuple):
    """What is normal for a check, what to do otherwise, and which part it plays.

    Attributes:
        normal: What healthy runs show, and why.
        remedy: What to do, where the finding does not say it better.
        role: A `suspicion` is a diagnosis only beside a `symptom`, which is measured of what the
            model answers; a `fault` always is.

    Source: ours.
    """

    normal: str
    remedy: str = ""
    role: Literal["fault", "suspicion", "symptom"] = "fault"


_LOWER = "Lower training.optimizer.lr, or set training.clip=1"
_LONGER = "Train longer, or look at learning rate and levels"
_PICTURES = "Look at the data: cmbook data check PATH --sheet sheet.png"
NORMS = {
    "finite": Norm("weights and rows of the log that are NaN: 0", _LOWER),
    "data range": Norm("largest number: 1, as noise levels expect", "For bytes use x / 127.5 - 1"),
    "data copies": Norm("share of copies: 0, or they are learned by heart", _PICTURES),
    "data constant": Norm("share of samples of one flat color: 0", _PICTURES),
    "data near-copies": Norm("share within 2% of the usual distance of another: 0", _PICTURES),
    "data layout": Norm("correlation of neighboring pixels: above 0.2", _PICTURES),
    "data channels": Norm("largest over smallest std of a channel: 1 to 2", "Scale them alike"),
    "class balance": Norm("effective share of the classes: 1", "Balance them, or leave them out"),
    "label meaning": Norm(
        "neighbors of one class, over chance: well above 1",
        "Check that samples and labels are in the same order",
    ),
    "same data": Norm(
        "1: those of the run's record", "Bring them back, or train anew", "suspicion"
    ),
    "sigma_data": Norm("over the data's std: 1"),
    "sigma_max": Norm("over the data's std: 20 to 160, where they drown"),
    "sigma_min": Norm("over the data's std: 0.004, invisible", "Set noise_range.sigma_min=0.002"),
    "dress": Norm("0: the scalings suit the objective"),
    "boundary": Norm(
        "relative error of f(x, sigma_min) = x: 0, whatever the weights",
        'Train with scalings = { kind = "ConsistencyScalings" }; the record may have been edited',
    ),
    "levels": Norm("N at the end: 8 to 1281", "Raise the levels of the objective", "suspicion"),
    "teacher denoises": Norm("error over that of means and variances alone: below 1"),
    "teacher labels": Norm(
        "what the right label saves, over what it could: 0.3 to 2", "Train it with right labels"
    ),
    "finished": Norm("share of the steps that are taken: 1"),
    "frozen weights": Norm(
        "share of weights that are as they began: 0",
        "Check requires_grad, the optimizer's parameters, and that the loss is not detached",
    ),
    "moved": Norm(
        "way of the weights, over their size: 0.1 to 5",
        "Look at training.optimizer.lr",
        "suspicion",
    ),
    "step size": Norm("a step of Adam over a weight: 0.001 to 0.1", _LOWER, "suspicion"),
    "reach": Norm(
        "all steps together over a weight: 2 to 1000",
        "Raise training.optimizer.lr, to about 1e-3 for small networks, or training.steps",
        "suspicion",
    ),
    "loss": Norm("at the end over the start: below 1", _LOWER, "suspicion"),
    "loss at the end": Norm("last quarter over before: below 1.5", _LOWER, "suspicion"),
    "gradient": Norm("largest over typical norm: below 10", _LOWER, "suspicion"),
    "clipping": Norm("typical norm over clip: below 10", "Raise training.clip", "suspicion"),
    "batch": Norm("samples in a step: 32 or more", "Raise training.batch_size", "suspicion"),
    "epochs": Norm("times each sample was seen: 1 or more", "Raise training.steps", "suspicion"),
    "data size": Norm("samples: hundreds at least", "Get more data", "suspicion"),
    "average memory": Norm("share of the first weights in it: below 0.01", "", "suspicion"),
    "average moves": Norm("its way over the student's: 1", "Call blend after every step"),
    "target moves": Norm(
        "its way over the student's: 1",
        "Lower mu, or check that the target is updated after every step",
        "suspicion",
    ),
    "average behind": Norm(
        "denoising error over the student's: 1", "Lower training.average_decay", "suspicion"
    ),
    "hears sigma": Norm(
        "change of the network's answer with sigma: 0.1 to 1",
        "Check the time embedding, and that c_noise reaches the network",
    ),
    "copies": Norm(
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
        "error over that of means and variances alone: below 1",
        "Set the scalings, sigma_data or range that it was trained with",
        "symptom",
    ),
    "learned": Norm("of what the data teach beyond that: 0.5 or more", _LONGER, "symptom"),
    "variety": Norm("variance that noise makes, over the data's: 0.7 to 1.2", _LONGER, "symptom"),
    "sample range": Norm("share of numbers far outside the data's: 0", _LONGER, "symptom"),
    "modes": Norm("mass of the data that is missed: below 0.25", _LONGER, "symptom"),
    "grid": Norm(
        "what the walk loses on N levels, over chance: below 0.3",
        "Raise objective.levels, or use Heun",
        "suspicion",
    ),
    "follows teacher": Norm("distance from its walk, over chance: below 0.6", _LONGER, "symptom"),
    "tangent": Norm("answer's change as sigma doubles, over the data: below 2", _LOWER, "symptom"),
    "loss by sigma": Norm(
        "largest share of an eighth of the levels: below 0.8",
        'Set objective.weight, such as "inverse_gap"',
    ),
}


class _Undone(Exception):
    """A check cannot be done; the text says why."""


@dataclass(frozen=True, eq=False)
class _Patient:
    """A run and everything that several checks need, measured once."""

    run: "Run"
    data: Data | None
    missing: str  # why there is no data
    teacher: "Run | None"
    walker: Denoiser | None  # the teacher as training used it
    weights: dict[str, dict[str, Tensor]]  # student, target, average and first
    rows: list[dict[str, float]]
    device: str

    @property
    def recipe(self) -> Experiment:
        return self.run.recipe

    @property
    def range(self) -> NoiseRange:
        return self.recipe.noise_range

    @property
    def jumps(self) -> bool:
        """Whether it is sampled as a consistency model."""
        return isinstance(self.recipe.scalings, ConsistencyScalings)

    @cached_property
    def seen(self) -> Batch:
        """Samples of the training set, as training sees them."""
        if self.data is None:
            raise _Undone(self.missing)
        size = max(64, min(SAMPLES, NUMBERS // math.prod(self.data.shape)))
        if self.length is not None:
            size = min(size, self.length)
        return next(self.data.batches(size, self.recipe.seed))

    @cached_property
    def some(self) -> Batch:
        """As many of them as the model can be asked about in a few seconds."""
        x, label = self.seen
        n = min(len(x), self.count)
        return Batch(x[:n].to(self.device), None if label is None else label[:n].to(self.device))

    @cached_property
    def count(self) -> int:
        """How many samples a model is asked about: fewer, the larger it is; always the same."""
        shape, classes = self.run.record["shape"], self.run.record["classes"]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            label = torch.zeros(1, dtype=torch.int64, device=self.device) if classes else None
            x = torch.zeros(1, *shape, device=self.device)
            self.run.model(x, torch.ones(1, device=self.device), label)
        return int(min(512, max(32, FLOPS // max(1, counter.get_total_flops()))))

    @cached_property
    def std(self) -> float:
        """Of all numbers of the data together: what sigma_data should be."""
        return float(self.seen.x.double().std(correction=0))

    @cached_property
    def variances(self) -> Tensor:
        """Of every coordinate."""
        return self.seen.x.double().flatten(1).var(0, correction=0)

    @cached_property
    def within(self) -> float:
        """Variance that is left when the class is known, summed over coordinates."""
        return _within(*self.seen)

    @cached_property
    def levels(self) -> list[float]:
        """Noise levels at which denoising is measured."""
        return _levels_of(self.recipe, self.std)

    @cached_property
    def labels(self) -> Labels | None:
        """Labels to sample with: those of the data, or all in turn."""
        classes = self.run.record["classes"]
        if not classes:
            return None
        if self.data is not None and self.some.label is not None:
            return self.some.label
        label: Labels = torch.arange(self.count, device=self.device) % classes
        return label

    @cached_property
    def drawn(self) -> tuple[Samples, Samples]:
        """Two sets of samples: other noise, the same labels."""
        n = self.count if self.labels is None else len(self.labels)
        first, second = (
            self.run.sample(n, self.labels, generator=PerImage(range(i * n, (i + 1) * n)))
            for i in range(2)
        )
        return first, second

    @property
    def length(self) -> int | None:
        """How many samples there are; `None` for data without end, or not at hand."""
        if isinstance(self.data, TensorData):
            return len(self.data.x)
        return len(self.data) if isinstance(self.data, ImageData) else None

    @property
    def told(self) -> Labels | None:
        """Labels of as many samples as `noise` draws."""
        return None if self.labels is None else self.labels[: len(self.noise(""))]

    def noise(self, what: str) -> Samples:
        """Standard normal numbers for at most 64 samples."""
        n = min(64, self.count if self.labels is None else len(self.labels))
        like = torch.empty(n, *self.run.record["shape"], device=self.device)
        return normal(like, seeded("doctor", what))

    @cached_property
    def loss(self) -> Loss:
        """Of the last step, as training would compute it, from many samples."""
        model, objective = self.run.model, self.recipe.objective
        if objective.needs_teacher and self.walker is None:
            raise _Undone("the teacher is not at hand")
        clock = Clock(max(0, self.recipe.training.steps - 1), self.recipe.training.steps)
        models = Models(model, model, self.walker)
        with torch.no_grad():
            return objective(models, self.some, clock=clock, generator=seeded("doctor"))


def examine(
    run: "Run | Path | str",
    *,
    data: Data | None = None,
    device: str = "cpu",
    average: float | None = None,
) -> Diagnosis:
    """Measure a run and say what is wrong with it: the likely cause first.

    Args:
        run: A run, its folder, one of its checkpoints, an exported model, or a student's name.
        data: What it was trained on; by default what its recipe says, if that is at hand.
        device: Where to compute.
        average: The decay of the moving average to examine, if there are several.

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
    patient = _patient(made, data, device)
    findings, skipped = list[Finding](), dict[str, str]()
    for check in CHECKS:
        try:
            findings += check(patient)
        except _Undone as why:
            skipped[check.__name__.strip("_").replace("_", " ")] = str(why)
    return Diagnosis(_ranked(findings), skipped, tuple(_notes(patient.recipe)))


def _ranked(findings: list[Finding]) -> tuple[Finding, ...]:
    """The ill first. With a symptom, what was merely suspect is the likely cause."""
    if any(finding.symptom and finding.verdict == "ill" for finding in findings):
        findings = [
            replace(f, verdict="ill") if f.suspicion and f.verdict == "look" else f
            for f in findings
        ]
    order = ("ill", "look", "well")
    return tuple(sorted(findings, key=lambda finding: order.index(finding.verdict)))


def _patient(made: "Run", data: Data | None, device: str) -> _Patient:
    """Gather what is at hand."""
    from cmbook import runs

    missing = ""
    if data is None:
        try:
            data = made.recipe.data.build()
        except (ValueError, OSError, ImportError) as error:
            missing = f"the data are not at hand ({str(error).splitlines()[0]})"
    teacher = None
    if made.recipe.teacher is not None:
        try:
            teacher = runs.load(made.recipe.teacher, device)
        except (ValueError, OSError):
            teacher = None
    walker: Denoiser | None = None if teacher is None else teacher.model
    if teacher is not None and made.recipe.guidance != 1:
        walker = guided(teacher.model, made.recipe.guidance)
    weights = {"average": _parameters(made.model)}
    saved = checkpoints.checkpoints(made.folder / "checkpoints")
    for name in ("student", "target"):
        if saved and (saved[-1] / f"{name}.safetensors").is_file():
            read = checkpoints.read_weights(saved[-1], name)
            weights[name] = {key: read[key].to(device) for key in weights["average"]}
    first = _first(made, teacher)
    if first is not None:
        weights["first"] = first
    return _Patient(made, data, missing, teacher, walker, weights, _log(made.folder), device)


def _first(made: "Run", teacher: "Run | None") -> dict[str, Tensor] | None:
    """The weights before the first step: the teacher's, or a function of the seed."""
    from cmbook import runs

    recipe, record = made.recipe, made.record
    if recipe.teacher is not None:
        return None if teacher is None else _parameters(teacher.model)
    if recipe.network is None or record.get("torch") != torch.__version__:
        return None  # another version may draw other weights
    shape, classes = tuple(record["shape"]), record["classes"] or None
    net = runs.initialized(recipe.network, shape, classes, recipe.seed)
    return _parameters(Preconditioned(net, recipe.scalings).to(next(made.model.parameters())))


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def _log(folder: Path) -> list[dict[str, float]]:
    """The rows of log.csv that are whole."""
    path, rows = folder / "log.csv", list[dict[str, float]]()
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                try:
                    rows.append({key: float(value) for key, value in row.items() if value})
                except (TypeError, ValueError):
                    continue
    return rows


def _levels_of(recipe: Experiment, std: float) -> list[float]:
    """Noise levels that a model of this recipe knows, near the data's own spread if it may."""
    noise_range, objective = recipe.noise_range, recipe.objective
    if isinstance(objective, ProgressiveDistillation):  # it knows those of its grid alone
        return noise_range.grid(objective.steps + 1)[:-1].tolist()
    low, high = noise_range.sigma_min, noise_range.sigma_max
    return [r * std for r in LEVELS if low < r * std <= high] or [high]


def _answers(recipe: Experiment) -> float:
    """How many times as far off as the mean of what x may have come from its answers may be.

    One of the samples that x may have come from, which few-step models answer, is twice as far.
    """
    few = (*CONSISTENCY, ProgressiveDistillation)
    return 2.0 if isinstance(recipe.objective, few) else 1.0


def _within(x: Samples, label: Labels | None) -> float:
    rows = x.double().flatten(1)
    if label is None:
        return float(rows.var(0, correction=0).sum())
    total = rows.new_zeros(())
    for c in label.unique():
        own = rows[label == c]
        total += (own - own.mean(0)).square().sum()
    return float(total / len(rows))


@torch.no_grad()
def _ask(model: Denoiser, x: Samples, sigma: float, label: Labels | None) -> Tensor:
    """The model's answers at one noise level, in float64."""
    answers = [
        model(part, part.new_full((len(part),), sigma, dtype=torch.float32), told)
        for part, told in zip(
            x.split(64), label.split(64) if label is not None else [None] * len(x), strict=False
        )
    ]
    return torch.cat(answers).double()


def _noisy(x: Samples, sigma: float) -> Samples:
    """The same noise for every model and level, so that differences are theirs."""
    noise = normal(x, seeded("doctor", "noise"))
    return add_noise(x, noise, x.new_full((len(x),), sigma))


def _excess(
    model: Denoiser, batch: Batch, levels: list[float], variances: Tensor, times: float = 1.0
) -> list[float]:
    r"""Squared error at every level over that of a denoiser that knows little.

    The reference knows mean and variance of each coordinate, $v\sigma^2/(v + \sigma^2)$, and so
    it beats both trivial ones: x as it is, and the mean of the data.
    """
    found = []
    for sigma in levels:
        answer = _ask(model, _noisy(batch.x, sigma), sigma, batch.label)
        error = float((answer - batch.x).flatten(1).square().sum(1).mean())
        v = variances.to(answer)
        known = float((v * sigma**2 / (v + sigma**2)).sum())
        found.append(error / max(known, 1e-300) / times if math.isfinite(error) else math.inf)
    return found


def _misdressed(p: _Patient, model: Preconditioned, now: float, times: float) -> str | None:
    """If the same network does well in another dress or on data in another range: which."""
    batch, levels, limit = p.some, p.levels, min(1.2, now / 2)
    ranges = {model.scalings.noise_range.sigma_data, round(p.std, 3)}
    best, said = math.inf, None
    for kind in get_args(AnyScalings):
        for sigma_data in ranges:
            scalings = kind(replace(p.range, sigma_data=sigma_data))
            if scalings == model.scalings:
                continue
            dressed = Preconditioned(model.net, scalings)
            found = max(_excess(dressed, batch, levels, p.variances, times))
            if found < min(limit, best):
                name = kind.__name__
                told = "" if sigma_data == p.range.sigma_data else f" with sigma_data {sigma_data}"
                best, said = found, f"in the wrong dress: its network does well in {name}{told}"
    for name, scale, shift in (("[0, 1]", 0.5, 0.5), ("[0, 255]", 127.5, 127.5)):
        other = Batch(scale * batch.x + shift, batch.label)
        stretched = [scale * sigma for sigma in levels]
        found = max(_excess(model, other, stretched, p.variances * scale**2, times))
        if found < min(limit, best):
            best, said = found, f"made for data in {name}, not in [-1, 1]: it does well there"
    return said


def _gain(model: Denoiser, batch: Batch, levels: list[float], classes: int) -> list[float]:
    """How much of the error at each level the right label saves, against a wrong one."""
    assert batch.label is not None
    other = 1 + integers(len(batch.x), classes - 1, seeded("doctor", "label")).to(batch.label)
    wrong = (batch.label + other) % classes
    found = []
    for sigma in levels:
        x = _noisy(batch.x, sigma)
        right, off = (
            float((_ask(model, x, sigma, label) - batch.x).square().sum())
            for label in (batch.label, wrong)
        )
        found.append(1 - right / max(off, 1e-300))
    return found


# ── the data ──


def _data_range(p: _Patient) -> Iterator[Finding]:
    x, image = p.seen.x, len(p.run.record["shape"]) == 3
    low, high = float(x.min()), float(x.max())
    largest, cause = max(abs(low), abs(high)), ""
    # Worlds of points have tails and reach a little over 1; pixels cannot.
    if not math.isfinite(largest):
        cause = "the data hold NaN or infinity"
    elif largest > (1.2 if image else 3.0):
        where = "[0, 255]" if low >= 0 and largest > 20 else f"[{low:.3g}, {high:.3g}]"
        cause = f"the data lie in {where}, not in [-1, 1]"
    elif image and low >= -1e-3 and high > 0:
        cause = "the data lie in [0, 1], not in [-1, 1]"
    elif image and high < 1e-3:
        cause = "the data lie in [-1, 0], not in [-1, 1]"
    yield _found("data range", largest, "ill" if cause else "well", cause)


def _data_variety(p: _Patient) -> Iterator[Finding]:
    x = p.seen.x.flatten(1)
    many = x.shape[1] >= 16  # in few dimensions, flat samples and near neighbors are as they should
    if many:
        flat = float((x.std(1, correction=0) < 1e-3).double().mean())
        cause = f"{flat:.0%} of the samples are constant: one flat color"
        yield _found("data constant", flat, _over(flat, 0.02, 0.2), cause)
    distinct = len(torch.unique(x, dim=0))
    copies = 1 - distinct / len(x)
    # Drawn without end, even simple things repeat; a set should hold everything once.
    bad = _over(copies, 0.3) if p.length is None and distinct > 100 else _over(copies, 0.1, 0.5)
    cause = f"the data repeat themselves: of {len(x)} samples only {distinct} differ"
    yield _found("data copies", copies, bad, cause)
    if many:
        rows = torch.unique(x[:512], dim=0).double()
        apart = torch.cdist(rows, rows)
        typical = float(apart.median())
        near = float((apart.fill_diagonal_(math.inf).amin(1) < 0.02 * typical).double().mean())
        cause = "the data repeat themselves: most samples are nearly the same few"
        yield _found("data near-copies", near, _over(near, 0.1, 0.5), cause)


def _data_layout(p: _Patient) -> Iterator[Finding]:
    x = p.seen.x.double()
    if x.ndim != 4 or min(x.shape[2:]) < 4:
        return
    centered = x - x.mean((2, 3), keepdim=True)
    power = float(centered.square().mean()) or 1.0
    across = float((centered[..., 1:] * centered[..., :-1]).mean()) / power
    down = float((centered[..., 1:, :] * centered[..., :-1, :]).mean()) / power
    # Drawings of 8x8 pixels still show 0.4. Scrambled pixels show 0, and so do, in one direction,
    # images that were reshaped where they should have been transposed.
    least = min(across, down)
    cause = "neighboring pixels have nothing in common: the data are noise or were reshaped wrongly"
    yield _found("data layout", least, _under(least, 0.1, 0.05), cause)
    if x.shape[1] > 1:
        each = x.std((0, 2, 3))
        ratio = float(each.max() / each.min().clamp(min=1e-12))
        cause = "the channels of the data have different scales"
        yield _found("data channels", ratio, _over(ratio, 4, 10), cause)


def _data_labels(p: _Patient) -> Iterator[Finding]:
    x, label = p.seen
    classes = p.run.record["classes"]
    if label is None or classes < 2:
        return
    share = label.bincount(minlength=classes).double() / len(label)
    # exp(entropy) counts classes by how much they are there.
    effective = float(torch.special.entr(share).sum().exp()) / classes
    cause = f"one class dominates: {float(share.max()):.0%} of the data"
    yield _found("class balance", effective, _under(effective, 0.7, 0.5), cause)
    if len(x) < 20 * classes:
        raise _Undone("too few samples of each class are at hand to compare neighbors")
    rows = x.flatten(1).double()
    apart = torch.cdist(rows, rows).fill_diagonal_(math.inf)
    agree = float((label[apart.argmin(1)] == label).double().mean())
    chance = float(share.square().sum())
    noise = math.sqrt(chance * (1 - chance) / len(rows))
    bad: Verdict = "ill" if agree < chance + 4 * noise and chance < 0.95 else "well"
    cause = "the labels are shuffled: neighbors share a class no more often than by chance"
    yield _found("label meaning", agree / chance, bad, cause)


def _same_data(p: _Patient) -> Iterator[Finding]:
    if p.data is None or (p.length or 0) > 200_000:  # a fingerprint reads all of them
        return
    same = p.data.sha256() == p.run.record.get("data_sha256")
    cause = "the data at hand are not those that the run was trained on"
    yield _found("same data", float(same), "well" if same else "look", cause)


# ── the recipe ──


def sigma_data_finding(std: float, noise_range: NoiseRange) -> Finding:
    """Whether sigma_data is the standard deviation of the data.

    Args:
        std: Of the data, over all samples and coordinates.
        noise_range: The recipe's.

    Source: Karras et al. (2022), Table 1: c_in makes inputs of unit variance.
    """
    ratio = noise_range.sigma_data / max(std, 1e-12)
    # 2.5 times off, the network's inputs have 6 times the variance it is made for, or a sixth.
    verdict = _over(max(ratio, 1 / ratio), 1.3, 2.5)
    cause = f"sigma_data is {noise_range.sigma_data:g}, but the data's std is {std:.3g}"
    return _found("sigma_data", ratio, verdict, cause, f"Set noise_range.sigma_data={std:.2g}")


def _noise_range(p: _Patient) -> Iterator[Finding]:
    std = max(p.std, 1e-12)
    yield sigma_data_finding(p.std, p.range)
    # At 4 standard deviations 6% of the variance is still data, which sampling begins without.
    top, low = p.range.sigma_max / std, p.range.sigma_min / std
    cause = f"sigma_max = {p.range.sigma_max:g} is too small: under that noise the data still show"
    yield _found("sigma_max", top, _under(top, 10, 4), cause, f"Set it to {20 * std:.2g} or more")
    cause = f"sigma_min = {p.range.sigma_min:g} is too large: samples keep that much noise"
    yield _found("sigma_min", low, _over(low, 0.03, 0.1), cause)


def _finite(p: _Patient) -> Iterator[Finding]:
    weights = [w for which in p.weights.values() for w in which.values()]
    broken = sum(int((~w.isfinite()).sum()) for w in weights)
    broken += sum(not math.isfinite(row.get("loss", 0.0)) for row in p.rows)
    cause = "weights or losses are NaN: training has diverged"
    yield _found("finite", broken, "ill" if broken else "well", cause)


def _boundary(p: _Patient) -> Iterator[Finding]:
    objective = p.recipe.objective
    if not isinstance(objective, CONSISTENCY):
        cause = (
            f"{type(objective).__name__} trains a diffusion model in a consistency model's scalings"
        )
        remedy = 'Set scalings = { kind = "EDMScalings" }'
        yield _found("dress", p.jumps, "ill" if p.jumps else "well", cause, remedy)
        return
    scale = p.range.sigma_data
    x = scale * p.noise("boundary")
    answer = _ask(p.run.model, x, p.range.sigma_min, p.told)
    off = float((answer - x).square().mean().sqrt()) / scale
    # c_skip = 1 and c_out = 0 there, whatever the weights, so only rounding is left.
    cause = (
        "the boundary is violated: f(x, sigma_min) is not x, so these are not the scalings of a "
        "consistency model"
    )
    yield _found("boundary", off, "well" if off < 1e-5 else "ill", cause)


def _levels(p: _Patient) -> Iterator[Finding]:
    objective, steps = p.recipe.objective, p.recipe.training.steps
    if isinstance(objective, ConsistencyTraining):
        levels = objective.curriculum.levels_at(Clock(steps - 1, steps))
    elif isinstance(objective, ConsistencyDistillation):
        levels = objective.levels
    else:
        return
    # With 2 levels the target of pure noise is the data themselves, so the answer is their mean.
    cause = f"too few noise levels, N = {levels}: neighbors are too far apart to agree"
    yield _found("levels", levels, _under(levels, 7, 4), cause)


# ── the teacher ──


def _teacher(p: _Patient) -> Iterator[Finding]:
    if p.recipe.teacher is None:
        return
    if p.teacher is None:
        raise _Undone(f"the teacher {p.recipe.teacher} is not at hand")
    theirs, cause = p.teacher, ""
    levels, times = _levels_of(theirs.recipe, p.std), _answers(theirs.recipe)
    worst = max(_excess(theirs.model, p.some, levels, p.variances, times))
    if not worst < POOR:
        cause = _misdressed(p, theirs.model, worst, times) or ""
        if not cause and theirs.record.get("data_sha256") != p.run.record.get("data_sha256"):
            cause = "made for other data"
        cause = f"the teacher is {cause or 'untrained, or trained too little'}"
    remedy = f"Examine it: cmbook doctor {p.recipe.teacher}"
    yield _found("teacher denoises", worst, "ill" if cause else "well", cause, remedy)
    yield from _labels_heard(p, theirs.model, "teacher labels", "the teacher")


# ── the training ──


def _progress(p: _Patient) -> Iterator[Finding]:
    steps = p.recipe.training.steps
    done = p.run.step / steps
    cause = f"training was not finished: step {p.run.step} of {steps}"
    remedy = f"Go on: cmbook train RECIPE --out {p.run.folder} --resume"
    yield _found("finished", done, _under(done, 1, 0.9), cause, remedy)


def _moved(p: _Patient) -> Iterator[Finding]:
    first, now = p.weights.get("first"), p.weights.get("student")
    if first is None or now is None:
        raise _Undone("the first weights or the student's are not at hand")
    still = sum(w.numel() for name, w in now.items() if torch.equal(w, first[name]))
    share = still / sum(w.numel() for w in now.values())
    cause = f"{share:.0%} of the student's weights are frozen: they are as they began"
    if share == 1:
        cause = "the student is frozen: it never learned, its weights are those it began with"
    yield _found("frozen weights", share, _over(share, 0.0, 0.2), cause)
    if share < 1:
        moved = _apart(now, first) / max(_norm(first), 1e-12)
        bad = _under(moved, 0.03, 0.003)
        cause = "the weights have hardly moved: the learning rate is too low or the steps too few"
        if moved > 10:
            bad, cause = "look", "the weights have run away: the learning rate is too high"
        yield _found("moved", moved, bad, cause)


def _reach(p: _Patient) -> Iterator[Finding]:
    knobs, size = p.recipe.training, _size(p.weights.get("first", p.weights["average"]))
    every = max(1, p.run.step // 1000)
    rates = [knobs.learning_rate(Clock(k, knobs.steps)) for k in range(0, p.run.step, every)]
    # Adam moves a weight by about the learning rate a step at most, whatever the gradient.
    lr, one, reach = knobs.optimizer.lr, knobs.optimizer.lr / size, sum(rates) * every / size
    cause = f"the learning rate {lr:g} is too high: a step is {one:.2g} times as large as a weight"
    yield _found("step size", one, _over(one, 0.2, 1), cause)
    cause = (
        f"the learning rate is too low or the steps too few: {lr:g} over {p.run.step} steps moves "
        f"a weight by {reach:.2g} times its size at most"
    )
    yield _found("reach", reach, _under(reach, 1, 0.1), cause)


def _curves(p: _Patient) -> Iterator[Finding]:
    rows = [row for row in p.rows if math.isfinite(row.get("loss", math.nan))]
    if len(rows) < 4:
        raise _Undone("the log has fewer than 4 rows")
    losses, quarter = [row["loss"] for row in rows], len(rows) // 4
    last, before = (median(part) for part in (losses[-quarter:], losses[:-quarter]))
    if not _grows(p.recipe) and min(losses) > 0:
        if not isinstance(p.recipe.objective, CONSISTENCY):  # theirs may begin near 0 and rise
            ratio = last / losses[0]
            cause = "the loss has risen since the start: the learning rate is too high"
            yield _found("loss", ratio, _over(ratio, 1.1, 2), cause)
        ratio = last / before
        cause = "the loss goes up at the end: training has become unstable"
        yield _found("loss at the end", ratio, _over(ratio, 3), cause)
    norms = [row["gradient_norm"] for row in rows if "gradient_norm" in row]
    if norms and median(norms) == 0:
        cause = "there is no gradient: nothing is learned, the student is frozen"
        yield _found("gradient", 0, "ill", cause, "Check that the loss is not detached")
    elif norms:
        yield gradient_finding(norms)
        clip = p.recipe.training.clip
        if clip is not None:
            ratio = median(norms) / clip
            cause = "almost all of every gradient is clipped away"
            yield _found("clipping", ratio, _over(ratio, 100), cause)


def gradient_finding(norms: list[float]) -> Finding:
    """Whether the gradient has exploded.

    Args:
        norms: Means of its norm, row by row of the log.

    Source: ours.
    """
    ratio = max(norms) / max(median(norms), 1e-300)
    # A curriculum raises norms tenfold; only an explosion raises a mean over 50 steps 100-fold.
    cause = "the gradient explodes: the learning rate is too high, or an objective is unstable"
    return _found("gradient", ratio, _over(ratio, 100), cause)


def _coverage(p: _Patient) -> Iterator[Finding]:
    size = p.recipe.training.batch_size
    cause = f"the batch of {size} is too small: its gradient is mostly noise"
    yield _found("batch", size, _under(size, 8), cause)
    if p.length is not None:
        epochs = p.run.step * size / p.length
        cause = f"training saw only {epochs:.0%} of the data: too few steps"
        yield _found("epochs", epochs, _under(epochs, 1), cause)
        cause = f"{p.length} samples are too few: a model learns them by heart"
        yield _found("data size", p.length, _under(p.length, 100), cause)


# ── the averages ──


def memory_finding(decay: float, steps: int, name: str = "average") -> Finding:
    """How much of a moving average is still the weights of the start.

    Args:
        decay: Of the average; the start counts with `decay` to the power of the steps.
        steps: How many are taken.
        name: What is averaged, for the message.

    Source: ours.
    """
    left = decay**steps
    # Over a half, the average is more its start than all that was learned; a tenth shows.
    cause = (
        f"the {name} still remembers the first weights: they are {left:.0%} of it after {steps} "
        f"steps, its decay {decay:g} is too near 1"
    )
    better = f"Set training.average_decay={max(0.0, 1 - 10 / max(steps, 11)):.3g}, or train longer"
    return _found(f"{name} memory", left, _over(left, 0.1, 0.5), cause, better)


def _averages(p: _Patient) -> Iterator[Finding]:
    yield memory_finding(p.run.average, p.run.step)
    first, student = p.weights.get("first"), p.weights.get("student")
    average, target = p.weights["average"], p.weights.get("target")
    if student is None:
        raise _Undone("the student's weights are not at hand, only its average")
    if first is not None and (way := _apart(student, first)) > 0:
        moves = _apart(average, first) / way
        if p.run.step * (1 - p.run.average) > 1:  # by now it should have gone most of the way
            cause = "the average is frozen: it was not moved after each step"
            yield _found("average moves", moves, _under(moves, 0.3, 0.05), cause)
        if target is not None:
            # Whatever mu, a target that follows has gone most of the way, even if at a distance.
            ratio, left = _apart(target, first) / way, _remembered(p)
            why = f"mu is too near 1: it keeps {left:.0%} of the first weights"
            cause = f"the target does not move: {why if left > 0.5 else 'it is frozen'}"
            yield _found("target moves", ratio, _under(ratio, 0.5, 0.1), cause)
    if p.data is not None:
        theirs, ours = (
            sum(_excess(each, p.some, p.levels, p.variances))
            for each in (_with(p.run.model, student), p.run.model)
        )
        cause = (
            f"the average is far behind the student: its decay {p.run.average:g} is too near 1 for "
            f"{p.run.step} steps"
        )
        ratio = ours / max(theirs, 1e-300)
        yield _found("average behind", ratio, _over(ratio, 1.5), cause)


def _remembered(p: _Patient) -> float:
    """What is left of the first weights in the target."""
    steps, every = p.recipe.training.steps, max(1, p.run.step // 1000)
    clocks = (Clock(k, steps) for k in range(0, p.run.step, every))
    return math.prod(p.recipe.objective.target_decay(clock) ** every for clock in clocks)


# ── the model ──


def _hears_sigma(p: _Patient) -> Iterator[Finding]:
    x, net, c = p.noise("sigma"), p.run.model.net, p.recipe.scalings
    with torch.no_grad():
        said = [net(x, c.c_noise(x.new_full((len(x),), s)), p.told) for s in p.range.grid(6)[1:-1]]
    answers = torch.stack(said).double()
    change = (answers - answers.mean(0)).square().mean() / answers.square().mean().clamp(min=1e-24)
    cause = "the network does not hear sigma: its answer is the same at every noise level"
    hears = float(change.sqrt())
    yield _found("hears sigma", hears, "well" if hears > 0.005 else "ill", cause)


def _denoises(p: _Patient) -> Iterator[Finding]:
    times = _answers(p.recipe)
    found = _excess(p.run.model, p.some, p.levels, p.variances, times)
    worst, cause, remedy = max(found), "", ""
    if not worst < POOR:
        at = p.levels[found.index(worst)]
        said = _misdressed(p, p.run.model, worst, times)
        cause, remedy = (f"the model is {said}", "") if said else _why_poor(p, at)
    yield _found("denoises", worst, "ill" if cause else "well", cause, remedy)


def _learned(p: _Patient) -> Iterator[Finding]:
    """What it knows beyond means and variances, of what these very data would teach."""
    n = min(p.count, len(p.seen.x) // 2)
    if n < 16:
        raise _Undone("there are too few samples")
    batch = Batch(p.some.x[:n], None if p.some.label is None else p.some.label[:n])
    rest = p.seen.x[n:].to(p.device)
    bare = Batch(batch.x)  # those who teach are told no classes
    linear, exact = (
        _excess(each, bare, p.levels, p.variances)
        for each in (_linear(rest), Dataset(rest).denoiser)
    )
    best = [min(pair) for pair in zip(linear, exact, strict=True)]
    k = min(range(len(best)), key=best.__getitem__)
    if best[k] > 0.9:
        return  # then there is little to know
    own = _excess(p.run.model, batch, [p.levels[k]], p.variances, _answers(p.recipe))[0]
    learned = (1 - own) / (1 - best[k])
    yield _found("learned", learned, _under(learned, 0.3, 0.1), *_why_poor(p, p.levels[k]))


def _linear(x: Samples) -> Denoiser:
    """The best linear denoiser, from the covariance of some samples (Wiener's)."""
    rows = x.double().flatten(1)
    rows = rows[:512] if rows.shape[1] > 1024 else rows
    mean = rows.mean(0)
    _, size, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    variances = size.square() / len(rows)

    def denoise(x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        along = (x.double().flatten(1) - mean) @ axes.T
        kept = variances / (variances + sigma.double()[:, None] ** 2)
        best: Samples = (mean + (along * kept) @ axes).view_as(x).to(x.dtype)
        return best

    return denoise


def _why_poor(p: _Patient, sigma: float) -> tuple[str, str]:
    """Why a model does worse at some level than means and variances."""
    try:
        near = (p.loss.sigma.double() / sigma).log().abs() < math.log(2)
        share = float(near.double().mean())
    except (_Undone, ValueError):
        share = 1.0
    if share < 0.01:
        return (
            f"noise levels near {sigma:.2g} are hardly ever trained: {share:.1%} of the draws",
            "Choose objective.sigma_law, or the noise range, so that they are",
        )
    return (
        f"the model has not learned to denoise at sigma {sigma:.2g}: it was trained too little, "
        "unsteadily, or on other data",
        "Train longer, or try another training.optimizer.lr",
    )


def _labels(p: _Patient) -> Iterator[Finding]:
    yield from _labels_heard(p, p.run.model, "labels", "the model")


def _labels_heard(p: _Patient, model: Denoiser, name: str, whose: str) -> Iterator[Finding]:
    """What the right label saves, over what it saves the data's own exact denoiser."""
    (x, label), classes, n = p.seen, p.run.record["classes"], min(p.count, len(p.seen.x) // 2)
    if label is None or classes < 2:
        return
    if n < 16 or len(label[n:].unique()) < classes:  # points that are asked about must be others
        raise _Undone("the samples at hand are too few for their classes")
    batch = Batch(p.some.x[:n], label[:n].to(p.device))
    world = Dataset(x[n:].to(p.device), label[n:].to(p.device))
    levels = [sigma for sigma in p.levels if sigma > 0.4 * p.std]
    could, does = (_gain(each, batch, levels, classes) for each in (world.denoiser, model))
    if max(could, default=0.0) < 0.05:
        return  # then labels say nothing that could be heard
    heard = max(d / c for d, c in zip(does, could, strict=True) if c > max(could) / 2)
    cause = (
        f"{whose} ignores the label, or learned it from shuffled ones: a wrong one costs nothing"
    )
    if heard < -0.05:
        cause = f"{whose} has learned other labels than the data's: wrong ones do better"
    yield _found(name, heard, _under(heard, 0.15, 0.04), cause)


# ── its samples ──


def _variety(p: _Patient) -> Iterator[Finding]:
    one, two = (each.double() for each in p.drawn)
    made = float((one - two).flatten(1).square().sum(1).mean()) / 2
    natural = p.within if p.data is not None else p.range.sigma_data**2 * one[0].numel()
    ratio = made / max(natural, 1e-300)
    blurred = 0.2 / max(1.0, p.recipe.guidance)  # guidance takes some of it by intent
    bad = _under(ratio, 2 * blurred, blurred)
    cause = "the samples are blurred: means in place of samples, too alike"
    if ratio < 0.02:
        cause = "the model has collapsed: it answers the same whatever the noise"
    if not ratio < 1.8:
        bad, cause = _over(ratio, 1.8, 4), "the samples are scattered far beyond the data"
    yield _found("variety", ratio, bad, cause)


def _inside(p: _Patient) -> Iterator[Finding]:
    x, seen = p.drawn[0], torch.tensor([-1.0, 1.0]) if p.data is None else p.seen.x
    low, high = float(seen.min()), float(seen.max())
    margin = 0.2 * (high - low)
    out = float((~((x > low - margin) & (x < high + margin))).double().mean())
    cause = "many samples lie outside the range of the data"
    yield _found("sample range", out, _over(out, 0.05, 0.15), cause)


def _modes(p: _Patient) -> Iterator[Finding]:
    real, made = (x.double().flatten(1).cpu() for x in (p.seen.x, p.drawn[0]))
    if len(real) < 64 or not bool(made.isfinite().all()):
        raise _Undone("there are too few samples, or some are not finite")
    centers = _centers(real, 8)
    theirs, ours = (
        torch.cdist(x, centers).argmin(1).bincount(minlength=8).double() / len(x)
        for x in (real, made)
    )
    # Chance alone misplaces about a tenth. Over a half, most of the mass is elsewhere.
    missing = float((theirs - ours).clamp(min=0).sum())
    cause = "the samples miss much of the data: modes have collapsed, or it learned other data"
    yield _found("modes", missing, _over(missing, 0.35, 0.5), cause)


def _copies(p: _Patient) -> Iterator[Finding]:
    if math.prod(p.run.record["shape"]) < 16 or p.length is None:
        return  # in few dimensions something is always near, and endless data cannot be copied
    x, made = (each.flatten(1).double().cpu() for each in (p.seen.x, p.drawn[0]))
    if not bool(made.isfinite().all()):
        raise _Undone("some samples are not finite")
    apart = torch.cdist(x, x).fill_diagonal_(math.inf).amin(1)
    usual = float(apart[apart > 0].median()) if bool((apart > 0).any()) else math.inf
    copied = float((nearest_training(made, x).distance < 0.25 * usual).double().mean())
    cause = f"the model repeats its training samples: it knows {p.length} of them by heart"
    yield _found("copies", copied, _over(copied, 0.1, 0.5), cause)


def _follows(p: _Patient) -> Iterator[Finding]:
    objective = p.recipe.objective
    if not p.jumps or not objective.needs_teacher:
        return
    if p.walker is None:
        raise _Undone("the teacher is not at hand")
    x = p.range.sigma_max * p.noise("walk")
    fine = ode_sample(p.walker, x, p.range, p.told).double()
    spread = math.sqrt(2 * (p.within if p.data is not None else _within(fine, p.told)))

    def off(answer: Tensor) -> float:
        """1 is what two samples get that have nothing to do with each other."""
        squared = (answer.double() - fine).flatten(1).square().sum(1)
        return float(squared.mean().sqrt()) / max(spread, 1e-300)

    if isinstance(objective, ConsistencyDistillation):
        n = max(2, objective.levels - 1)  # and the walk's last level is 0
        lost = off(ode_sample(p.walker, x, p.range, p.told, levels=n, solver=objective.solver))
        cause = f"the grid of {objective.levels} levels is too coarse for the teacher's path"
        yield _found("grid", lost, _over(lost, 0.6), cause)
    found = off(_ask(p.run.model, x, p.range.sigma_max, p.told))
    cause = (
        "the student does not land where its teacher walks: it was trained too little, or from "
        "another teacher"
    )
    yield _found("follows teacher", found, _over(found, 0.8, 0.95), cause)


def _tangents(p: _Patient) -> Iterator[Finding]:
    if not isinstance(p.recipe.objective, ContinuousDistillation | ContinuousTraining):
        return
    x0, label, found = p.some.x[:64], None if p.some.label is None else p.some.label[:64], []
    for sigma in p.levels:
        x, level = _noisy(x0, sigma), x0.new_full((len(x0),), sigma)
        dx = (x - x0) / sigma
        with torch.no_grad():
            if p.walker is not None:
                dx = velocity(x, p.walker(x, level, label), level)
            _, change = tangent(p.run.model, x, level, dx, label)
        found.append(sigma * float(change.double().flatten(1).norm(dim=1).median()))
    # 0 at the truth. Over 10, a change of sigma by a tenth carries the answer across all the data.
    size = max(found) / max(math.sqrt(float(p.variances.sum())), 1e-300)
    cause = "the tangents explode: continuous training is unstable"
    yield _found("tangent", size, _over(size, 3, 10), cause)


def _loss_by_sigma(p: _Patient) -> Iterator[Finding]:
    loss = p.loss
    if len(loss.sigma.unique()) < 9:
        return  # one level may well be all
    edges = p.range.grid(9).flip(0).log().to(loss.sigma)
    parts = torch.zeros(8, dtype=torch.float64, device=loss.sigma.device)
    which = torch.bucketize(loss.sigma.log(), edges[1:-1].contiguous())
    parts.index_add_(0, which, loss.per_sample.double().abs())
    k = int(parts.argmax())
    share, at = (
        float(parts[k] / parts.sum().clamp(min=1e-300)),
        float(edges[k : k + 2].mean().exp()),
    )
    cause = f"levels near sigma {at:.2g} are {share:.0%} of the loss and drown the others"
    yield _found("loss by sigma", share, _over(share, 0.9), cause)


CHECKS: tuple[Callable[[_Patient], Iterator[Finding]], ...] = (  # upstream first
    *(_finite, _data_variety, _data_range, _data_layout, _data_labels, _noise_range, _boundary),
    *(_teacher, _progress, _reach, _moved, _curves, _averages, _levels, _coverage, _same_data),
    *(
        _hears_sigma,
        _copies,
        _labels,
        _denoises,
        _learned,
        _variety,
        _inside,
        _modes,
        _follows,
        _tangents,
    ),
    _loss_by_sigma,
)


# ── while training ──


def warnings(recipe: Experiment, data: Data) -> list[str]:
    """What can be said before the first step, a line each: data, sigma_data, the average.

    Source: ours.
    """
    size = max(16, min(256, NUMBERS // 16 // math.prod(data.shape)))
    x, knobs = next(data.batches(size, recipe.seed)).x, recipe.training
    std, largest = float(x.double().std(correction=0)), float(x.abs().max())
    cause = f"the data reach {largest:.3g}, not 1"
    found = (
        _found("data range", largest, _over(largest, 3), cause),
        sigma_data_finding(std, recipe.noise_range),
        memory_finding(knobs.average_decay, knobs.steps),
    )
    return [f"{f.cause}. {f.remedy}" for f in found if f.verdict != "well"]


@dataclass
class Watch:
    """Rows of the log as they are written: says once that the gradient explodes.

    Source: ours.
    """

    norms: list[float] = field(default_factory=list)
    said: bool = False

    def __call__(self, norm: float) -> list[str]:
        """A warning, if it is time for one."""
        self.norms.append(norm)
        found = gradient_finding(self.norms)
        if self.said or len(self.norms) < 5 or found.verdict == "well":
            return []
        self.said = True
        return [f"{found.cause}. {found.remedy}"]


def _notes(recipe: Experiment) -> Iterator[str]:
    """What is no fault."""
    if not isinstance(recipe.objective, ConsistencyTraining):
        return
    curriculum, steps = recipe.objective.curriculum, recipe.training.steps
    clocks = [Clock(k, steps) for k in (0, steps // 2, steps - 1)]
    levels = ", ".join(str(curriculum.levels_at(clock)) for clock in clocks)
    decays = ", ".join(f"{curriculum.decay_at(clock):.3g}" for clock in clocks)
    yield f"N(k) is {levels} and mu(k) {decays} at the start, the middle and the end"
    if _grows(recipe):
        yield "the loss need not fall while N grows: every N is another, harder question"


def _grows(recipe: Experiment) -> bool:
    """Whether the number of levels grows, so that losses cannot be compared."""
    if not isinstance(recipe.objective, ConsistencyTraining):
        return False
    curriculum, steps = recipe.objective.curriculum, recipe.training.steps
    return curriculum.levels_at(Clock(0, steps)) < curriculum.levels_at(Clock(steps - 1, steps))


# ── small things ──


def _over(value: float, look: float, ill: float = math.inf) -> Verdict:
    """Too much is bad, and so is what is no number."""
    if not value <= ill:
        return "ill"
    return "look" if value > look else "well"


def _under(value: float, look: float, ill: float = -math.inf) -> Verdict:
    """Too little is bad, and so is what is no number."""
    if not value >= ill:
        return "ill"
    return "look" if value < look else "well"


def _found(check: str, measured: float, verdict: Verdict, cause: str, remedy: str = "") -> Finding:
    """A finding, with what the table says of its check."""
    norm = NORMS[check]
    if verdict == "well":
        return Finding(check, float(measured), norm.normal)
    role = {"suspicion": norm.role == "suspicion", "symptom": norm.role == "symptom"}
    return Finding(
        check, float(measured), norm.normal, verdict, cause, remedy or norm.remedy, **role
    )


def _with(model: Preconditioned, weights: dict[str, Tensor]) -> Denoiser:
    """The model with other weights."""

    def other(x: Samples, sigma: Any, label: Labels | None = None) -> Samples:
        answer: Samples = torch.func.functional_call(model, weights, (x, sigma, label))
        return answer

    return other


def _size(weights: dict[str, Tensor]) -> float:
    """The root mean square of matrices' weights, those that begin at 0 aside."""
    chosen = [w for w in weights.values() if w.ndim >= 2 and bool(w.any())]
    count = sum(w.numel() for w in chosen)
    return math.sqrt(sum(float(w.double().square().sum()) for w in chosen) / max(count, 1)) or 1e-12


def _norm(weights: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(w.double().square().sum()) for w in weights.values()))


def _apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The distance of two sets of weights."""
    return _norm({name: a[name].double() - b[name].double() for name in a})


def _centers(x: Tensor, k: int) -> Tensor:
    """Lloyd's k means, from a start that is always the same."""
    centers = x[integers(1, len(x), seeded("doctor", "means"))]
    while len(centers) < k:  # the farthest of a few: spread out, and no outlier hunt
        near = torch.cdist(x[:256], centers).min(1).values
        centers = torch.cat([centers, x[:256][near.argmax()][None]])
    for _ in range(15):
        which = torch.cdist(x, centers).argmin(1)
        centers = torch.stack(
            [x[which == i].mean(0) if bool((which == i).any()) else centers[i] for i in range(k)]
        )
    return centers
