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
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cmbook import checkpoints
from cmbook.data import Data, ImageData, TensorData
from cmbook.evaluation import nearest_training, share_nearer
from cmbook.experiment import Experiment
from cmbook.guidance import guided
from cmbook.losses import (
    EDM,
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
from cmbook.protocols import Batch, Clock, Denoiser, Labels, Loss, Models, Samples
from cmbook.samplers import ode_sample, prior

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
FLOPS = 2e9  # of one evaluation of all probes: some seconds in all on one core


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
        if (length := _length(self.data)) is not None:
            size = min(size, length)
        return next(self.data.batches(size, self.recipe.seed))

    @cached_property
    def some(self) -> Batch:
        """As many of them as the model can be asked about in a few seconds."""
        x, label = self.seen
        n = min(len(x), self.count)
        return Batch(
            x[:n].to(self.device), None if label is None else label[:n].to(self.device)
        )

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
        low, high = self.range.sigma_min, self.range.sigma_max
        return [r * self.std for r in LEVELS if low < r * self.std <= high] or [high]

    @cached_property
    def labels(self) -> Labels | None:
        """Labels to sample with: those of the data, or all in turn."""
        classes = self.run.record["classes"]
        if not classes:
            return None
        if self.data is not None and self.some.label is not None:
            return self.some.label
        return torch.arange(self.count, device=self.device) % classes

    @cached_property
    def drawn(self) -> tuple[Samples, Samples]:
        """Two sets of samples: other noise, the same labels."""
        n = self.count if self.labels is None else len(self.labels)
        first, second = (
            self.run.sample(n, self.labels, generator=PerImage(range(i * n, (i + 1) * n)))
            for i in range(2)
        )
        return first, second

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


def _length(data: Data) -> int | None:
    """How many samples there are; `None` for data without end."""
    if isinstance(data, TensorData):
        return len(data.x)
    return len(data) if isinstance(data, ImageData) else None


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
    normal = "largest size of a number: 1; noise levels are meant for data in [-1, 1]"
    largest = max(abs(low), abs(high))
    cause = remedy = ""
    # Worlds of points have tails and reach a little over 1; pixels cannot.
    if not math.isfinite(largest):
        cause, remedy = "the data hold NaN or infinity", "Mend or remove those samples"
    elif largest > (1.2 if image else 3.0):
        where = "[0, 255]" if low >= 0 and largest > 20 else f"[{low:.3g}, {high:.3g}]"
        cause, remedy = f"the data lie in {where}, not in [-1, 1]", "Use x / 127.5 - 1 for bytes"
    elif image and low >= -1e-3 and high > 0:
        cause, remedy = "the data lie in [0, 1], not in [-1, 1]", "Use 2 x - 1"
    elif image and high < 1e-3:
        cause, remedy = "the data lie in [-1, 0], not in [-1, 1]", "Check how they are scaled"
    yield Finding("data range", largest, normal, "ill" if cause else "well", cause, remedy)


def _data_variety(p: _Patient) -> Iterator[Finding]:
    x = p.seen.x.flatten(1)
    distinct = len(torch.unique(x, dim=0)) / len(x)
    normal = "share of samples that are no exact copy of another: 1; copies are learned by heart"
    bad: Verdict = "ill" if distinct < 0.5 else "look" if distinct < 0.95 else "well"
    cause = f"the data repeat themselves: of {len(x)} samples {round(distinct * len(x))} differ"
    yield _told(Finding("data copies", 1 - distinct, normal.replace(": 1;", ":"), bad, cause,
                        "Remove duplicates, or check how the samples are read"))  # fmt: skip
    flat = float((x.std(1, correction=0) < 1e-3).double().mean()) if x.shape[1] > 2 else 0.0
    bad = "ill" if flat > 0.2 else "look" if flat > 0.02 else "well"
    yield _told(Finding("data constant", flat, "share of samples that are one flat color: 0", bad,
                        f"{flat:.0%} of the samples are constant", "Remove empty or unreadable files"))  # fmt: skip
    if x.shape[1] >= 16 and len(x) >= 64:  # in few dimensions, many points are always near
        rows = x[:512].double()
        apart = torch.cdist(rows, rows)
        typical = float(apart[apart > 0].median()) if bool((apart > 0).any()) else 0.0
        apart.fill_diagonal_(math.inf)
        near = float((apart.min(1).values < 0.02 * typical).double().mean())
        bad = "ill" if near > 0.5 else "look" if near > 0.1 else "well"
        yield _told(Finding("data near-copies", near,
                            "share of samples within 2% of the usual distance of another: 0", bad,
                            "most samples are nearly the same few: the data repeat themselves",
                            "Remove duplicates, or check how the samples are read"))  # fmt: skip


def _data_layout(p: _Patient) -> Iterator[Finding]:
    x = p.seen.x
    if x.ndim != 4 or min(x.shape[2:]) < 4:
        return
    centered = (x - x.mean((2, 3), keepdim=True)).double()
    power = float(centered.square().mean())
    if power == 0:
        return
    across = float((centered[..., 1:] * centered[..., :-1]).mean()) / power
    down = float((centered[..., 1:, :] * centered[..., :-1, :]).mean()) / power
    least = min(across, down)
    # Drawings of 8x8 pixels still show 0.3; scrambled pixels, and images that were reshaped where
    # they should have been transposed, show none in one direction.
    bad: Verdict = "ill" if least < 0.05 else "well"
    yield _told(Finding("data layout", least, "correlation of neighboring pixels: above 0.2", bad,
                        "neighboring pixels have nothing to do with each other: the data are noise or were reshaped wrongly",
                        "Look at them: cmbook data check --sheet sheet.png"))  # fmt: skip
    if x.shape[1] > 1:
        each = x.double().std((0, 2, 3))
        ratio = float(each.max() / each.min().clamp(min=1e-12))
        bad = "ill" if ratio > 10 else "look" if ratio > 4 else "well"
        yield _told(Finding("data channels", ratio, "largest over smallest spread of a channel: 1 to 2", bad,
                            "the channels have different scales", "Scale all channels alike"))  # fmt: skip


def _data_labels(p: _Patient) -> Iterator[Finding]:
    x, label = p.seen
    if label is None:
        return
    classes = p.run.record["classes"] or int(label.max()) + 1
    counts = label.bincount(minlength=classes).double()
    share = counts / counts.sum()
    effective = float(torch.special.entr(share).sum().exp()) / classes
    # exp(entropy) counts classes by how much they are there; under a half, most hardly are.
    bad: Verdict = "ill" if effective < 0.5 else "look" if effective < 0.7 else "well"
    yield _told(Finding("class balance", effective, "effective share of the classes: near 1", bad,
                        f"one class dominates: {float(share.max()):.0%} of the data",
                        "Balance the classes, or train without labels"))  # fmt: skip
    rows = x.flatten(1).double()[:2048]
    label = label[: len(rows)]
    if len(rows) < 20 * classes or classes < 2:  # too few of each to have neighbors
        return
    apart = torch.cdist(rows, rows)
    apart.fill_diagonal_(math.inf)
    agree = float((label[apart.argmin(1)] == label).double().mean())
    chance = float(share.square().sum())
    noise = math.sqrt(chance * (1 - chance) / len(rows))
    bad = "ill" if agree < chance + 4 * noise else "well"
    yield _told(Finding("label meaning", agree / chance,
                        "nearest neighbors of one class, over chance: well above 1", bad,
                        "labels of the data are shuffled: neighbors share a class no more often than by chance",
                        "Check that samples and labels are in the same order"))  # fmt: skip


def _same_data(p: _Patient) -> Iterator[Finding]:
    if p.data is None or (_length(p.data) or 0) > 200_000:
        return
    same = p.data.sha256() == p.run.record.get("data_sha256")
    yield _told(Finding("same data", float(same), "1: the data are those of the run's record",
                        "well" if same else "look",
                        "the data at hand are not those that the run was trained on",
                        "Bring back the data, or train anew", suspicion=True))  # fmt: skip


# ── the noise range ──


def sigma_data_finding(std: float, noise_range: NoiseRange) -> Finding:
    """Whether sigma_data is the standard deviation of the data.

    Args:
        std: Of the data, over all samples and coordinates.
        noise_range: The recipe's.

    Source: Karras et al. (2022), Table 1: c_in makes inputs of unit variance.
    """
    ratio = noise_range.sigma_data / max(std, 1e-12)
    off = max(ratio, 1 / max(ratio, 1e-12))
    # A factor of 2.5 gives the network inputs of 1/6 or 6 times the variance it is made for.
    bad: Verdict = "ill" if off > 2.5 else "look" if off > 1.3 else "well"
    return _told(Finding("sigma_data", ratio, "sigma_data over the data's std: 0.8 to 1.25", bad,
                         f"sigma_data is {noise_range.sigma_data:g}, but the data's is {std:.3g}",
                         f"Set noise_range.sigma_data={std:.2g}"))  # fmt: skip


def _noise_range(p: _Patient) -> Iterator[Finding]:
    low, high, std = p.range.sigma_min, p.range.sigma_max, max(p.std, 1e-12)
    yield sigma_data_finding(p.std, p.range)
    # At 4 standard deviations 6% of the variance is still data, which sampling begins without.
    top = high / std
    bad: Verdict = "ill" if top < 4 else "look" if top < 10 else "well"
    yield _told(Finding("sigma_max", top, "over the data's std: 20 to 160, where data drown", bad,
                        f"sigma_max = {high:g} is too small: noise of that level still shows the data",
                        f"Set noise_range.sigma_max={max(20 * std, 10):.2g} or more"))  # fmt: skip
    end = low / std
    bad = "ill" if end > 0.1 else "look" if end > 0.03 else "well"
    yield _told(Finding("sigma_min", end, "over the data's std: 0.004, invisible", bad,
                        f"sigma_min = {low:g} is too large: samples keep that much noise",
                        "Set noise_range.sigma_min=0.002"))  # fmt: skip


# ── the recipe ──


def _weights_finite(p: _Patient) -> Iterator[Finding]:
    broken = sum(
        int((~w.isfinite()).sum()) for which in p.weights.values() for w in which.values()
    )
    rows = sum(not math.isfinite(row.get("loss", 0.0)) for row in p.rows)
    yield _told(Finding("finite", broken + rows, "weights and log rows that are NaN: 0",
                        "ill" if broken + rows else "well",
                        "weights or losses are NaN: training has diverged",
                        "Lower training.optimizer.lr, or set training.clip=1"))  # fmt: skip


def _boundary(p: _Patient) -> Iterator[Finding]:
    wants = isinstance(p.recipe.objective, CONSISTENCY)
    if not wants and not p.jumps:
        return
    if p.jumps and not wants:
        yield Finding("dress", 1, "0: the scalings suit the objective", "ill",
                      f"{type(p.recipe.objective).__name__} trains a diffusion model, but the scalings are a consistency model's",
                      'Set scalings = { kind = "EDMScalings" }')  # fmt: skip
        return
    low, scale = p.range.sigma_min, p.range.sigma_data
    like = torch.empty(64, *p.run.record["shape"], device=p.device)
    x = scale * normal(like, seeded("doctor", "boundary"))
    label = None if p.labels is None else p.labels[torch.arange(64) % len(p.labels)]
    off = float((_ask(p.run.model, x, low, label) - x).square().mean().sqrt()) / scale
    # c_skip = 1 and c_out = 0 there whatever the weights, so only rounding is left: 1e-7.
    yield _told(Finding("boundary", off, "f(x, sigma_min) = x, relative error: 0",
                        "well" if off < 1e-5 else "ill",
                        "the boundary is violated: f(x, sigma_min) is not x, so these are not a consistency model's scalings",
                        'Train with scalings = { kind = "ConsistencyScalings" }; the record may have been edited'))  # fmt: skip


# ── the teacher ──


def _teacher(p: _Patient) -> Iterator[Finding]:
    if p.recipe.teacher is None:
        return
    if p.teacher is None:
        raise _Undone(f"the teacher {p.recipe.teacher} is not at hand")
    theirs = p.teacher
    found = _excess(theirs.model, p.some, p.levels, p.variances)
    worst = max(found)
    cause = ""
    if worst > 1.5:
        cause = _misdressed(p, theirs.model, worst, 1.0) or ""
        if not cause and theirs.record.get("data_sha256") != p.run.record.get("data_sha256"):
            cause = "made for other data"
        cause = f"the teacher is {cause or 'untrained, or trained too little'}"
    yield _told(Finding("teacher denoises", worst,
                        "its error over that of means and variances alone: below 1",
                        "ill" if cause else "well", cause,
                        f"Examine it: cmbook doctor {p.recipe.teacher}"))  # fmt: skip
    yield from _labels_heard(p, theirs.model, "teacher labels", "the teacher")


# ── the training ──


def _progress(p: _Patient) -> Iterator[Finding]:
    done = p.run.step / p.recipe.training.steps
    if "step" in p.run.record and not p.run.recipe.training.optimizer:
        return
    bad: Verdict = "ill" if done < 0.9 else "look" if done < 1 else "well"
    yield _told(Finding("finished", done, "share of the steps that are taken: 1", bad,
                        f"training was not finished: step {p.run.step} of {p.recipe.training.steps}",
                        f"Go on: cmbook train RECIPE --out {p.run.folder} --resume"))  # fmt: skip


def _reach(p: _Patient) -> Iterator[Finding]:
    knobs = p.recipe.training
    own = p.weights.get("first", p.weights["average"])
    size = _size(own)
    every = max(1, p.run.step // 1000)
    rates = [knobs.learning_rate(Clock(k, knobs.steps)) for k in range(0, p.run.step, every)]
    # Adam moves a weight by at most about the learning rate a step, whatever the gradient.
    one, reach = knobs.optimizer.lr / size, sum(rates) * every / size
    bad: Verdict = "ill" if one > 1 else "look" if one > 0.2 else "well"
    yield _told(Finding("step size", one, "of a step of Adam over a weight's size: 0.001 to 0.1", bad,
                        f"the learning rate {knobs.optimizer.lr:g} is too high: a step is {one:.2g} times the size of a weight",
                        f"Set training.optimizer.lr={0.02 * size:.1g}", suspicion=True))  # fmt: skip
    bad = "ill" if reach < 0.2 else "look" if reach < 10 else "well"
    yield _told(Finding("reach", reach, "how far all steps could move a weight, over its size: 10 to 1000", bad,
                        f"the learning rate is too low or the steps too few: {knobs.optimizer.lr:g} over {p.run.step} steps cannot move the weights far",
                        "Raise training.optimizer.lr, about 1e-3 for small networks, or training.steps", suspicion=True))  # fmt: skip


def _moved(p: _Patient) -> Iterator[Finding]:
    first, now = p.weights.get("first"), p.weights.get("student")
    if first is None or now is None:
        raise _Undone("the first weights or the student's are not at hand")
    still = sum(w.numel() for name, w in now.items() if torch.equal(w, first[name]))
    share = still / sum(w.numel() for w in now.values())
    bad: Verdict = "ill" if share > 0.2 else "look" if share > 0 else "well"
    cause = "the student never learned: its weights are those it began with"
    if share < 1:
        cause = f"{share:.0%} of the student's weights are frozen: they are as they began"
    yield _told(Finding("frozen weights", share, "share that are as they began: 0", bad, cause,
                        "Check requires_grad, the optimizer's parameters, and that the loss is not detached"))  # fmt: skip
    if share < 1:
        moved = _apart(now, first) / max(_norm(first), 1e-12)
        bad = "ill" if moved < 0.003 else "look" if moved < 0.03 or moved > 10 else "well"
        cause = "the learning rate is too low or the steps too few: the weights have hardly moved"
        remedy = "Raise training.optimizer.lr or training.steps"
        if moved > 10:
            cause = "the learning rate is too high: the weights have run away from where they began"
            remedy = "Lower training.optimizer.lr"
        yield _told(Finding("moved", moved, "distance of the weights from the first, over their size: 0.1 to 5",
                            bad, cause, remedy, suspicion=True))  # fmt: skip


def _curves(p: _Patient) -> Iterator[Finding]:
    rows = [row for row in p.rows if math.isfinite(row.get("loss", math.nan))]
    if len(rows) < 4:
        raise _Undone("the log has fewer than 4 rows")
    losses, quarter = [row["loss"] for row in rows], max(1, len(rows) // 4)
    last, before = (median(part) for part in (losses[-quarter:], losses[:-quarter]))
    grows = _grows(p.recipe)
    if not grows and last > 0:
        start = max(losses[0], 1e-300)
        if not isinstance(p.recipe.objective, CONSISTENCY):  # theirs may begin near 0 and rise
            ratio = last / start
            yield _told(Finding("loss", ratio, "at the end over the start: below 1",
                                "ill" if ratio > 2 else "look" if ratio > 1.1 else "well",
                                "the loss has risen since the start: the learning rate is too high",
                                "Lower training.optimizer.lr, or set training.clip=1", suspicion=True))  # fmt: skip
        ratio = last / max(before, 1e-300)
        yield _told(Finding("loss at the end", ratio, "last quarter over what was before: about 1 or less",
                            "look" if ratio > 3 else "well",
                            "the loss goes up at the end: training has become unstable",
                            "Lower training.optimizer.lr, set training.decay=cosine", suspicion=True))  # fmt: skip
    norms = [row["gradient_norm"] for row in rows if "gradient_norm" in row]
    if norms:
        typical = median(norms)
        if typical == 0:
            yield Finding("gradient", 0, "its norm is above 0", "ill",
                          "there is no gradient: nothing is learned",
                          "Check that the loss is not detached and the weights are not frozen")  # fmt: skip
            return
        yield gradient_finding(norms)
        clip = p.recipe.training.clip
        if clip is not None:
            ratio = typical / clip
            yield _told(Finding("clipping", ratio, "typical gradient norm over clip: below 10",
                                "look" if ratio > 100 else "well",
                                "almost all of every gradient is clipped away",
                                f"Set training.clip={typical:.1g} or more", suspicion=True))  # fmt: skip


def gradient_finding(norms: list[float]) -> Finding:
    """Whether the gradient has exploded.

    Args:
        norms: Means of its norm, row by row of the log.

    Source: ours.
    """
    ratio = max(norms) / max(median(norms), 1e-300)
    # A curriculum raises norms tenfold; only an explosion raises a mean over 50 steps 100-fold.
    return _told(Finding("gradient", ratio, "largest over typical norm: below 10",
                         "look" if not ratio < 100 else "well",
                         "the gradient explodes: the learning rate is too high, or an objective is unstable",
                         "Lower training.optimizer.lr, or set training.clip", suspicion=True))  # fmt: skip


def _schedule(p: _Patient) -> Iterator[Finding]:
    objective, steps = p.recipe.objective, p.recipe.training.steps
    if isinstance(objective, ConsistencyTraining):
        levels = objective.curriculum.levels_at(Clock(steps - 1, steps))
    elif isinstance(objective, ConsistencyDistillation):
        levels = objective.levels
    else:
        return
    # With 2 levels the target of pure noise is the data themselves, so the answer is their mean.
    bad: Verdict = "ill" if levels < 4 else "look" if levels < 7 else "well"
    yield _told(Finding("levels", levels, "N at the end: 8 to 1281", bad,
                        f"too few noise levels, N = {levels}: neighbors are too far apart to agree",
                        "Raise objective.levels, or the curriculum's end", suspicion=True))  # fmt: skip


def _coverage(p: _Patient) -> Iterator[Finding]:
    knobs, length = p.recipe.training, None if p.data is None else _length(p.data)
    images = p.run.step * knobs.batch_size
    bad: Verdict = "look" if knobs.batch_size < 8 else "well"
    yield _told(Finding("batch", knobs.batch_size, "samples in a step: 32 or more, or gradients are noise", bad,
                        f"the batch of {knobs.batch_size} is too small: its gradient is mostly noise",
                        "Raise training.batch_size", suspicion=True))  # fmt: skip
    if length is not None:
        epochs = images / length
        bad = "look" if epochs < 1 else "well"
        yield _told(Finding("epochs", epochs, "how often each sample was seen: 1 or more", bad,
                            f"training saw only {epochs:.0%} of the data: too few steps",
                            "Raise training.steps or batch_size", suspicion=True))  # fmt: skip
        few = length < 100
        yield _told(Finding("data size", length, "samples: hundreds at least", "look" if few else "well",
                            f"{length} samples are few: a model learns them by heart", "Get more data", suspicion=True))  # fmt: skip


def memory_finding(decay: float, steps: int, name: str = "average") -> Finding:
    """How much of a moving average is still the weights of the start.

    Args:
        decay: Of the average; its weight of the start is `decay` to the power of the steps.
        steps: How many are taken.
        name: What is averaged, for the message.

    Source: ours.
    """
    left = decay**steps
    # Over a half, the average is more its start than all that was learned; a tenth shows.
    bad: Verdict = "ill" if left > 0.5 else "look" if left > 0.1 else "well"
    return _told(Finding(f"{name} memory", left, "share of the first weights in it: below 0.01", bad,
                         f"the {name} still remembers the first weights: {left:.0%} of it after {steps} steps, with decay {decay:g} too near 1",
                         f"Set training.average_decay={max(0.0, 1 - 10 / max(steps, 11)):.3g}, or train longer",
                         suspicion=True))  # fmt: skip


def _averages(p: _Patient) -> Iterator[Finding]:
    yield memory_finding(p.run.average, p.run.step)
    first, student = p.weights.get("first"), p.weights.get("student")
    average, target = p.weights["average"], p.weights.get("target")
    if student is None:
        raise _Undone("the student's weights are not at hand, only its average")
    if first is not None and (way := _apart(student, first)) > 0:
        if _apart(average, first) == 0 and p.run.step * (1 - p.run.average) > 1e-3:
            yield Finding("average moves", 0, "its way from the start over the student's: about 1",
                          "ill", "the average was never moved: it is the first weights",
                          "Check that blend is called after every step")  # fmt: skip
        if target is not None:
            expected = _remembered(p)
            ratio = _apart(target, first) / way
            frozen = ratio < 0.1  # whatever μ, one that follows has gone most of the way
            yield _told(Finding("target moves", ratio, "its way from the start over the student's: about 1",
                                "ill" if frozen else "look" if ratio < 0.5 else "well",
                                f"the target does not move: {'with mu this near 1 it keeps' if expected > 0.5 else 'it is frozen at'} the first weights",
                                "Lower the decay mu of the objective, or check that the target is updated", suspicion=True))  # fmt: skip
    if p.data is not None:
        model = _with(p.run.model, student)
        theirs, ours = (
            sum(_excess(each, p.some, p.levels, p.variances)) for each in (model, p.run.model)
        )
        behind = ours / max(theirs, 1e-300)
        yield _told(Finding("average behind", behind, "its denoising error over the student's: 1 or less",
                            "look" if not behind < 1.5 else "well",
                            f"the average is far behind the student: decay {p.run.average:g} is too near 1 for {p.run.step} steps",
                            "Lower training.average_decay or train longer", suspicion=True))  # fmt: skip


def _remembered(p: _Patient) -> float:
    """What is left of the first weights in the target."""
    steps, taken = p.recipe.training.steps, p.run.step
    every = max(1, taken // 1000)
    decays = [p.recipe.objective.target_decay(Clock(k, steps)) for k in range(0, taken, every)]
    return math.prod(decay**every for decay in decays)


# ── the model ──


def _told_sigma(p: _Patient) -> Iterator[Finding]:
    like = torch.empty(64, *p.run.record["shape"], device=p.device)
    z = normal(like, seeded("doctor", "sigma"))
    label = None if p.labels is None else p.labels[torch.arange(64) % len(p.labels)]
    net, c = p.run.model.net, p.recipe.scalings
    grid = p.range.grid(6)[1:-1].tolist()
    with torch.no_grad():
        said = torch.stack(
            [net(z, c.c_noise(torch.full((64,), s, device=p.device)), label) for s in grid]
        ).double()
    change = float((said - said.mean(0)).square().mean().sqrt() / said.square().mean().sqrt().clamp(min=1e-12))  # fmt: skip
    yield _told(Finding("hears sigma", change, "how much the network's answer changes with sigma: 0.1 to 1",
                        "ill" if change < 0.005 else "well",
                        "the network does not hear sigma: its answer is the same at every noise level",
                        "Check the time embedding, and that c_noise reaches the network"))  # fmt: skip


def _denoises(p: _Patient) -> Iterator[Finding]:
    # One of the samples that x may have come from is twice as far off as their mean.
    times = 2.0 if p.jumps or isinstance(p.recipe.objective, CONSISTENCY) else 1.0
    levels = p.levels
    found = _excess(p.run.model, p.some, levels, p.variances, times)
    worst = max(found)
    limit = 1.5
    cause, remedy = "", ""
    if not worst < limit:
        at = levels[found.index(worst)]
        cause = _misdressed(p, p.run.model, worst, times) or ""
        remedy = "Set the scalings, sigma_data or data that it was trained with"
        if cause:
            cause = f"the model is {cause}"
        else:
            cause, remedy = _why_poor(p, at)
    yield Finding("denoises", worst, f"its error over that of means and variances alone{', twice' if times == 2 else ''}: below 1",
                  "ill" if cause else "well", cause, remedy, symptom=True)  # fmt: skip


def _why_poor(p: _Patient, sigma: float) -> tuple[str, str]:
    """Why a model does worse than means and variances at some level."""
    try:
        near = (p.loss.sigma / sigma).log().abs() < math.log(2)
        share = float(near.double().mean())
    except (_Undone, ValueError):
        share = 1.0
    if share < 0.01:
        return (
            f"noise levels near {sigma:.2g} are hardly ever trained ({share:.1%} of the draws)",
            "Set objective.sigma_law, or the noise range, so that they are",
        )
    return (
        f"the model has not learned to denoise at sigma {sigma:.2g}: it was trained too little, with "
        "a learning rate that does not suit, or on other data",
        "Train longer, or try another training.optimizer.lr",
    )


def _labels_heard(p: _Patient, model: Denoiser, name: str, whose: str) -> Iterator[Finding]:
    batch, classes = p.some, p.run.record["classes"]
    if not classes or classes < 2 or batch.label is None:
        return
    x, label = p.seen
    if len(label.unique() if label is not None else ()) < classes:
        raise _Undone("the samples at hand do not hold every class")
    n = len(batch.x)
    if len(x) < 2 * n:  # the reference must not know the very points it is asked about
        n = len(x) // 2
        batch = Batch(batch.x[:n], batch.label[:n])
    if n < 16 or len(x) == n:
        raise _Undone("there are too few samples")
    levels = [level for level in p.levels if level >= 0.5 * p.std * 0.99]
    world = Dataset(x[n:].to(p.device), None if label is None else label[n:].to(p.device))
    try:
        expected = _gain(world.denoiser, batch, levels, classes)
    except ValueError as error:
        raise _Undone("the samples at hand do not hold every class") from error
    gain = _gain(model, batch, levels, classes)
    k = max(range(len(levels)), key=lambda i: expected[i])
    if expected[k] < 0.05:
        return  # then labels say nothing that could be heard here
    ratio = gain[k] / expected[k]
    cause = f"{whose} ignores the label: a wrong one costs nothing; it may have learned from shuffled labels"
    if ratio < -0.1:
        cause = f"{whose} has other labels than the data: a wrong one does better than the right one"
    yield _told(Finding(name, ratio, "what the right label saves, over what it could: 0.3 to 2",
                        "ill" if ratio < 0.05 else "look" if ratio < 0.15 else "well", cause,
                        "Check that labels reach the network in training, in the order of the data",
                        symptom=True))  # fmt: skip


def _labels(p: _Patient) -> Iterator[Finding]:
    return _labels_heard(p, p.run.model, "labels", "the model")


# ── its samples ──


def _response(p: _Patient) -> Iterator[Finding]:
    one, two = (each.double() for each in p.drawn)
    apart = float((one - two).flatten(1).square().sum(1).mean()) / 2
    natural = p.within if p.data is not None else p.range.sigma_data**2 * one[0].numel()
    ratio = apart / max(natural, 1e-300)
    # A mean in place of samples leaves a small part of the variance; guidance takes some by intent.
    guidance = max(1.0, p.recipe.guidance)
    cause, remedy, bad = "", "", "well"
    if not math.isfinite(ratio) or ratio > 4:
        bad, cause = "ill", "the samples are scattered far beyond the data"
        remedy = "Train longer or with a smaller learning rate; look at sigma_data and sigma_max"
    elif ratio < 0.02:
        bad, cause = "ill", "the model has collapsed: it answers the same whatever the noise"
        remedy = "Look at the learning rate, the target's decay and the number of levels"
    elif ratio < 0.3 / guidance:
        bad, cause = "ill", "the samples are blurred: means in place of samples, too alike"
        remedy = "Train longer; raise the levels at the end, lower them at the start"
    elif ratio < 0.5 / guidance or ratio > 1.8:
        bad, cause = "look", "the samples vary less than the data, or more"
        remedy = "Look at them: cmbook sample"
    yield Finding("variety", ratio, "variance that noise makes, over that of the data: 0.7 to 1.2",
                  bad, cause, remedy, symptom=True)  # type: ignore[arg-type]  # fmt: skip


def _inside(p: _Patient) -> Iterator[Finding]:
    x = p.drawn[0].double()
    low, high = (
        (float(p.seen.x.min()), float(p.seen.x.max())) if p.data is not None else (-1.0, 1.0)
    )
    margin = 0.2 * (high - low)
    out = float(((x < low - margin) | (x > high + margin) | ~x.isfinite()).double().mean())
    cause = "many samples lie outside the range of the data"
    yield _told(Finding("sample range", out, "share of numbers far outside the data's range: 0",
                        "ill" if out > 0.1 else "look" if out > 0.02 else "well", cause,
                        "Train longer or with a smaller learning rate; check the range of the data",
                        symptom=True))  # fmt: skip


def _modes(p: _Patient) -> Iterator[Finding]:
    real, made = p.seen.x.double().flatten(1), p.drawn[0].double().flatten(1).cpu()
    if len(real) < 64 or not bool(made.isfinite().all()):
        raise _Undone("there are too few samples, or some are not finite")
    centers = _centers(real, 8)
    theirs, ours = (
        torch.cdist(x, centers).argmin(1).bincount(minlength=8).double() / len(x)
        for x in (real, made)
    )
    missing = float((theirs - ours).clamp(min=0).sum())
    # Chance alone misplaces about 10% of a few hundred; over a half, most of the mass is elsewhere.
    yield _told(Finding("modes", missing, "share of the data's mass where too few samples are: below 0.25",
                        "ill" if missing > 0.5 else "look" if missing > 0.35 else "well",
                        "the samples miss much of the data: modes have collapsed, or they are of other data",
                        "Train longer or with larger batches; check data and labels", symptom=True))  # fmt: skip


def _copies(p: _Patient) -> Iterator[Finding]:
    if math.prod(p.run.record["shape"]) < 16 or (length := _length_of(p)) is None:
        return  # in few dimensions, many points are always near; endless data cannot be copied
    x, made = p.seen.x.flatten(1).double(), p.drawn[0].flatten(1).double().cpu()
    if not bool(made.isfinite().all()):
        raise _Undone("some samples are not finite")
    apart = torch.cdist(x[:512], x)
    apart[torch.arange(len(apart)), torch.arange(len(apart))] = math.inf
    usual = apart.min(1).values
    near = nearest_training(made, x).distance
    copied = float((near < 0.25 * usual[usual > 0].median()).double().mean()) if bool((usual > 0).any()) else 1.0  # fmt: skip
    nearer = share_nearer(near, usual)
    yield _told(Finding("copies", copied, "share of samples that nearly are training samples: 0",
                        "ill" if copied > 0.5 else "look" if copied > 0.1 else "well",
                        f"the model repeats its training samples: it has learned {length} by heart",
                        "Use more data, fewer steps or a smaller network", symptom=True))  # fmt: skip
    del nearer


def _length_of(p: _Patient) -> int | None:
    return None if p.data is None else _length(p.data)


def _follows(p: _Patient) -> Iterator[Finding]:
    if not p.jumps or p.recipe.teacher is None or not p.recipe.objective.needs_teacher:
        return
    if p.walker is None:
        raise _Undone("the teacher is not at hand")
    n = min(64, p.count, len(p.some.x) if p.data is not None else 64)
    like = torch.empty(n, *p.run.record["shape"], device=p.device)
    x = prior(like, p.range, seeded("doctor", "walk"))
    label = None if p.labels is None else p.labels[:n]
    fine = ode_sample(p.walker, x, p.range, label).double()
    spread = math.sqrt(2 * (p.within if p.data is not None else _within(fine, label)))

    def off(answer: Tensor) -> float:
        return float((answer - fine).flatten(1).square().sum(1).mean().sqrt()) / max(spread, 1e-300)

    objective = p.recipe.objective
    if isinstance(objective, ConsistencyDistillation):
        coarse = ode_sample(
            p.walker, x, p.range, label, levels=objective.levels - 1 or 1, solver=objective.solver
        ) if objective.levels > 2 else _ask(p.walker, x, p.range.sigma_max, label)  # fmt: skip
        lost = off(coarse.double())
        yield _told(Finding("grid", lost, "what the teacher loses on the student's grid, over chance: below 0.3",
                            "look" if lost > 0.6 else "well",
                            f"the grid of {objective.levels} levels is too coarse for the teacher's path",
                            "Raise objective.levels, or use Heun", suspicion=True))  # fmt: skip
    found = off(_ask(p.run.model, x, p.range.sigma_max, label))
    # 1 is what two samples that have nothing to do with each other get.
    yield _told(Finding("follows teacher", found, "distance from where the teacher walks, over chance: below 0.6",
                        "ill" if not found < 0.95 else "look" if found > 0.8 else "well",
                        "the student does not land where its teacher walks: it was trained too little, or its teacher was changed",
                        "Train longer", symptom=True))  # fmt: skip


def _tangents(p: _Patient) -> Iterator[Finding]:
    if not isinstance(p.recipe.objective, ContinuousDistillation | ContinuousTraining):
        return
    batch, found = Batch(*(None if t is None else t[:64] for t in p.some)), []  # type: ignore[arg-type]
    for sigma in p.levels:
        x = _noisy(batch.x, sigma)
        level = x.new_full((len(x),), sigma)
        dx = (x - batch.x) / sigma
        with torch.no_grad():
            if p.walker is not None:
                dx = velocity(x, p.walker(x, level, batch.label), level)
            _, change = tangent(p.run.model, x, level, dx, batch.label)
        found.append(sigma * float(change.double().flatten(1).norm(dim=1).median()))
    size = max(found) / max(math.sqrt(float(p.variances.sum())), 1e-300)
    # 0 at the truth. Over 10, a step of a tenth of sigma leaves the data's whole range.
    yield _told(Finding("tangent", size, "change of the answer as sigma grows by its own size, over the data's: below 2",
                        "ill" if not size < 10 else "look" if size > 3 else "well",
                        "the tangents explode: continuous training is unstable",
                        "Lower training.optimizer.lr, start from a trained teacher, set training.clip", symptom=True))  # fmt: skip


def _loss_by_sigma(p: _Patient) -> Iterator[Finding]:
    loss = p.loss
    edges = torch.tensor([math.log(s) for s in p.range.grid(9).tolist()][::-1]).to(loss.sigma)
    bins = torch.bucketize(loss.sigma.log(), edges[1:-1].contiguous())
    parts = torch.zeros(8, dtype=torch.float64).to(loss.sigma.device).double()
    parts.index_add_(0, bins, loss.per_sample.double().abs())
    share = float(parts.max() / parts.sum().clamp(min=1e-300))
    at = math.exp(float(edges[int(parts.argmax())] + edges[int(parts.argmax()) + 1]) / 2)
    yield _told(Finding("loss by sigma", share, "largest share of one eighth of the levels: below 0.8",
                        "look" if share > 0.9 else "well",
                        f"levels near sigma {at:.2g} are {share:.0%} of the loss and drown the others",
                        "Set objective.weight, such as inverse_gap"))  # fmt: skip


CHECKS: tuple[Callable[[_Patient], Iterator[Finding]], ...] = (
    *(_weights_finite, _data_range, _data_variety, _data_layout, _data_labels),
    *(_noise_range, _boundary, _teacher, _progress, _moved, _reach, _curves, _averages),
    *(_schedule, _coverage, _same_data, _told_sigma, _copies, _labels, _denoises),
    *(_response, _inside, _modes, _follows, _tangents, _loss_by_sigma),
)


# ── while training ──


def warnings(recipe: Experiment, data: Data) -> list[str]:
    """What can be said before the first step, a line each: data, sigma_data, the average.

    Source: ours.
    """
    size = max(16, min(256, NUMBERS // 16 // math.prod(data.shape)))
    x = next(data.batches(size, recipe.seed)).x
    found = [sigma_data_finding(float(x.double().std(correction=0)), recipe.noise_range)]
    knobs = recipe.training
    found.append(memory_finding(knobs.average_decay, knobs.steps))
    return [f"{f.cause}. {f.remedy}" for f in found if f.verdict != "well"]


@dataclass
class Watch:
    """Rows of the log as they are written: says once that the gradient explodes.

    Source: ours.
    """

    norms: list[float] = field(default_factory=list)
    said: bool = False

    def __call__(self, norm: float) -> str | None:
        """A warning, or nothing."""
        self.norms.append(norm)
        found = gradient_finding(self.norms)
        if self.said or len(self.norms) < 5 or found.verdict == "well":
            return None
        self.said = True
        return f"{found.cause}. {found.remedy}"


def _notes(recipe: Experiment) -> Iterator[str]:
    """What is no fault."""
    if not isinstance(recipe.objective, ConsistencyTraining):
        return
    curriculum, steps = recipe.objective.curriculum, recipe.training.steps
    clocks = [Clock(k, steps) for k in (0, steps // 2, steps - 1)]
    levels = [curriculum.levels_at(clock) for clock in clocks]
    decays = [curriculum.decay_at(clock) for clock in clocks]
    yield (
        f"N(k) is {', '.join(map(str, levels))} and mu(k) {', '.join(f'{d:.3g}' for d in decays)} "
        "at the start, the middle and the end"
    )
    if _grows(recipe):
        yield "the loss need not fall while N grows: every N is another, harder question"


def _grows(recipe: Experiment) -> bool:
    """Whether the number of levels grows, so that losses cannot be compared."""
    if not isinstance(recipe.objective, ConsistencyTraining):
        return False
    curriculum, steps = recipe.objective.curriculum, recipe.training.steps
    return curriculum.levels_at(Clock(0, steps)) < curriculum.levels_at(Clock(steps - 1, steps))


# ── small things ──


def _told(found: Finding) -> Finding:
    """Without cause and remedy, if it is well."""
    return replace(found, cause="", remedy="") if found.verdict == "well" else found


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
