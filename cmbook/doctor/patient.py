"""A run on the table: what several checks need of it, measured once."""

import csv
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cmbook import checkpoints
from cmbook.data import Data, ImageData, TensorData
from cmbook.experiment import Experiment
from cmbook.guidance import guided
from cmbook.losses import (
    EDM,
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousDistillation,
    ContinuousTraining,
    ProgressiveDistillation,
)
from cmbook.noise import NoiseRange, PerImage, add_noise, normal, seeded
from cmbook.ode import Solver
from cmbook.oracle import Dataset
from cmbook.parameterization import (
    AnyScalings,
    ConsistencyScalings,
    EDMScalings,
    Preconditioned,
)
from cmbook.protocols import Batch, Clock, Denoiser, Labels, Loss, Models, PerSample, Samples
from cmbook.samplers import ode_sample

if TYPE_CHECKING:  # runs warns by this package, so it is imported by `admit` alone
    from cmbook.runs import Run

CONSISTENCY = (
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousDistillation,
    ContinuousTraining,
)
LEVELS = (0.2, 0.5, 1.0, 2.0, 4.0)  # noise in standard deviations of the data: where images form
NUMBERS, SAMPLES = 1 << 24, 2048  # at most so many numbers, and samples, of the data are looked at
FLOPS = 2e9  # of one probe, of about a hundred: some seconds in all on one core
EARLY = 100_000  # samples seen: what training has not taught by then may still come
LATER = 300_000  # of consistency models: they learn from the least noise up
POOR = 1.5  # times the error of a denoiser that knows means and variances alone


class Undone(Exception):
    """A check cannot be done; the text says why."""


class Skill(NamedTuple):
    """What a model's answers are worth.

    Attributes:
        levels: The noise levels at which it was asked.
        worst: The largest of its errors, over that of a denoiser that knows means and variances
            alone; and the level where it is.
        learned: Of what the data teach beyond that, at the level where it knows most; `None` if
            there is little to know, or are few samples.
        slope: Of the truth against its answers. It is 1 where they are means, so that nothing in
            them says how far off they are.

    Source: ours.
    """

    levels: list[float]
    worst: tuple[float, float]
    learned: float | None
    slope: float

    @property
    def poor(self) -> bool:
        """Whether it knows less than means and variances, or other ones."""
        return not (self.worst[0] < POOR and 0.5 < self.slope < 2)


@dataclass(frozen=True, eq=False)
class Patient:
    """A run and everything that several checks need.

    Attributes:
        run: The run, with its average as the model.
        data: What it was trained on, if that is at hand.
        missing: Why it is not.
        teacher: The run of its teacher, if that is at hand.
        weights: Of the student, the target, the average, and the first, as far as they are there.
        rows: Of the log.
        device: Where to compute.

    Source: ours.
    """

    run: "Run"
    data: Data | None
    missing: str
    teacher: "Run | None"
    weights: dict[str, dict[str, Tensor]]
    rows: list[dict[str, float]]
    device: str

    @property
    def recipe(self) -> Experiment:
        """What it was made from."""
        return self.run.recipe

    @property
    def range(self) -> NoiseRange:
        """Its noise levels."""
        return self.recipe.noise_range

    @property
    def classes(self) -> int:
        """How many; 0 without."""
        return int(self.run.record["classes"])

    @property
    def jumps(self) -> bool:
        """Whether it is sampled as a consistency model."""
        return isinstance(self.recipe.scalings, ConsistencyScalings)

    @property
    def early(self) -> bool:
        """Whether training has hardly begun, or was not finished."""
        least = LATER if self.jumps else EARLY
        return not self.run.finished or self.run.step * self.recipe.training.batch_size < least

    @property
    def at_hand(self) -> "Run":
        """The teacher, which must be there."""
        if self.teacher is None:
            raise Undone(f"the teacher {self.recipe.teacher} is not at hand")
        return self.teacher

    @property
    def walker(self) -> Denoiser:
        """The teacher as training used it."""
        model, scale = self.at_hand.model, self.recipe.guidance
        return model if scale == 1 else guided(model, scale)

    @cached_property
    def seen(self) -> Batch:
        """Samples of the training set, as training sees them."""
        if self.data is None:
            raise Undone(self.missing)
        size = max(64, min(SAMPLES, NUMBERS // math.prod(self.data.shape)))
        return next(self.data.batches(min(size, self.length or size), self.recipe.seed))

    @property
    def length(self) -> int | None:
        """How many samples there are; `None` for data without end, or not at hand."""
        if isinstance(self.data, TensorData):
            return len(self.data.x)
        return len(self.data) if isinstance(self.data, ImageData) else None

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of one answer."""
        x = torch.zeros(1, *self.run.record["shape"], device=self.device)
        label = torch.zeros(1, dtype=torch.int64, device=self.device) if self.classes else None
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.run.model(x, torch.ones(1, device=self.device), label)
        return max(1, int(counter.get_total_flops()))

    @cached_property
    def count(self) -> int:
        """How many samples a model is asked about: fewer, the larger it is; always the same."""
        return int(min(512, max(32, FLOPS // self.flops)))

    @cached_property
    def many(self) -> int:
        """The same for samples, of which small differences to the data are to be seen."""
        return int(min(SAMPLES, len(self.seen.x), max(self.count, FLOPS / 8 / self.flops)))

    @cached_property
    def moments(self) -> dict[str, Any]:
        """The optimizer's state, as the last checkpoint has it."""
        saved = checkpoints.checkpoints(self.run.folder / "checkpoints")
        if not saved or "student" not in self.weights:
            raise Undone("the optimizer's moments are not at hand")
        return checkpoints.read_moments(saved[-1])

    def part(self, which: slice) -> Batch:
        """Some of the samples seen, on the device."""
        x, label = self.seen
        return Batch(
            x[which].to(self.device), None if label is None else label[which].to(self.device)
        )

    @cached_property
    def asked(self) -> Batch:
        """The samples that models are asked about."""
        return self.part(slice(min(self.count, (len(self.seen.x) + 1) // 2)))

    @cached_property
    def rest(self) -> Batch:
        """Others of the same kind: what may be known beforehand."""
        if len(self.seen.x) < 32:
            raise Undone("there are too few samples")
        return self.part(slice(len(self.asked.x), None))

    @cached_property
    def std(self) -> float:
        """Of all numbers of the data together: what sigma_data should be."""
        return max(float(self.seen.x.double().std(correction=0)), 1e-12)

    @cached_property
    def variances(self) -> Tensor:
        """Of every coordinate."""
        return self.seen.x.double().flatten(1).var(0, correction=0).to(self.device)

    @cached_property
    def within(self) -> float:
        """Variance of one class, summed over coordinates; without data, what sigma_data says."""
        if self.data is None:
            return float(self.range.sigma_data**2 * math.prod(self.run.record["shape"]))
        return scatter(*self.seen)

    @cached_property
    def labels(self) -> Labels | None:
        """Labels to sample with: those of the data, or all in turn."""
        if not self.classes:
            return None
        if self.data is not None and self.seen.label is not None:
            return self.seen.label[: self.count].to(self.device)
        turns: Labels = torch.arange(self.count, device=self.device) % self.classes
        return turns

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
    def told(self) -> Labels | None:
        """Labels of as many samples as `noise` draws."""
        return None if self.labels is None else self.labels[:64]

    def noise(self, what: str) -> Samples:
        """Standard normal numbers for at most 64 samples."""
        n = min(64, self.count) if self.told is None else len(self.told)
        like = torch.empty(n, *self.run.record["shape"], device=self.device)
        return normal(like, seeded("doctor", what))

    def walked(self, walker: Denoiser, levels: int = 40, solver: Solver = "heun") -> Samples:
        """Where a diffusion model walks, from `noise("walk")`; by default as it is meant."""
        x = self.range.sigma_max * self.noise("walk")
        return ode_sample(walker, x, self.range, self.told, levels=levels, solver=solver)

    def off(self, answer: Samples, walked: Samples) -> float:
        """How far off; 1 is what two samples get that have nothing to do with each other."""
        squared = float((answer.double() - walked).flatten(1).square().sum(1).mean())
        spread = self.within if self.data is not None else scatter(walked, self.told)
        return math.sqrt(squared / max(2 * spread, 1e-300))

    @cached_property
    def loss(self) -> Loss:
        """Of the last step, as training would compute it, from many samples."""
        model, objective = self.run.model, self.recipe.objective
        walker = self.walker if self.recipe.teacher is not None else None
        clock = Clock(max(0, self.recipe.training.steps - 1), self.recipe.training.steps)
        models = Models(model, model, walker)
        with torch.no_grad():
            return objective(models, self.asked, clock=clock, generator=seeded("doctor"))

    def skill(self, model: Denoiser, recipe: Experiment, batch: Batch | None = None) -> Skill:
        """What the answers of a model are worth that was made from this recipe."""
        levels, few = _levels(recipe, self.std), not isinstance(recipe.objective, EDM)
        own, slopes = self.errors(model, batch or self.asked, levels)
        # One of the samples that x may have come from, which few-step models answer, is twice as
        # far off in square as their mean.
        own = [error / 2 for error in own] if few else own
        shares = [
            (1 - error) / (1 - best)
            for error, best in zip(own, self._known(levels), strict=True)
            if best < 0.9
        ]
        k = max(range(len(own)), key=own.__getitem__)
        slope = max(slopes, key=lambda s: abs(math.log(s)) if s > 0 else math.inf)
        learned = max(shares, default=None)
        return Skill(levels, (own[k], levels[k]), learned, 1.0 if few else slope)

    def _known(self, levels: list[float]) -> list[float]:
        """Errors of the best that other samples of these data teach, without their labels."""
        try:
            rest = self.rest.x
        except Undone:
            return [1.0] * len(levels)
        linear, exact = (
            self.errors(model, Batch(self.asked.x), levels)[0]
            for model in (_linear(rest), Dataset(rest).denoiser)
        )
        return [min(pair) for pair in zip(linear, exact, strict=True)]

    def errors(
        self,
        model: Denoiser,
        batch: Batch,
        levels: list[float],
        scale: float = 1.0,
        noise: float = 1.0,
    ) -> tuple[list[float], list[float]]:
        r"""At every level: squared error over that of a denoiser that knows little, and slope.

        That denoiser knows mean and variance of each coordinate, $v\sigma^2/(v + \sigma^2)$, and
        so it beats both trivial ones: x as it is, and the mean of the data. The data may have
        another scale, and the noise be that many times what the model is told.
        """
        v, mean = scale**2 * self.variances, batch.x.double().mean(0)
        errors, slopes = [], []
        for told in levels:
            sigma = noise * told
            answer = ask(model, noisy(batch.x, sigma), told, batch.label)
            error = float((answer - batch.x).flatten(1).square().sum(1).mean())
            known = float((v * sigma**2 / (v + sigma**2)).sum())
            errors.append(error / max(known, 1e-300) if math.isfinite(error) else math.inf)
            said, truth = answer - mean, batch.x - mean
            slopes.append(float((said * truth).sum() / said.square().sum().clamp(min=1e-300)))
        return errors, slopes

    def dress(self, model: Preconditioned, skill: Skill) -> str | None:
        """If the same network does well in another dress, or on data in another range: which."""
        x, label = self.asked
        batch = Batch(x[:64], None if label is None else label[:64])
        own = model.scalings.noise_range.sigma_data

        def score(model: Denoiser, batch: Batch, scale: float = 1.0) -> float:
            levels = [scale * sigma for sigma in skill.levels]
            errors = self.errors(model, batch, levels, scale)[0]
            return sum(math.log(max(error, 1e-300)) for error in errors) / len(errors)

        found = {}
        for kind in get_args(AnyScalings):
            others = (0.25, 0.5, 1.0, 2.0, max(round(self.std, 2), 0.01))
            for sigma_data in {
                own,
                *(others if kind in (EDMScalings, ConsistencyScalings) else ()),
            }:
                dress = kind(replace(self.range, sigma_data=sigma_data))
                name = f"{kind.__name__} with sigma_data {sigma_data:g}"
                said = f"in the wrong dress: its network does well in {name}"
                found[said] = score(Preconditioned(model.net, dress), batch)
        for name, scale, shift in (("[0, 1]", 0.5, 0.5), ("[0, 255]", 127.5, 127.5)):
            said = f"made for data in {name}, not in [-1, 1]: it does well there"
            found[said] = score(model, Batch(scale * batch.x + shift, batch.label), scale)
        best = min(found, key=found.__getitem__)
        return best if found[best] < min(0.3, score(model, batch) - 0.2) else None


def admit(made: "Run", data: Data | None, device: str) -> Patient:
    """Gather what is at hand of a run.

    Source: ours.
    """
    from cmbook import runs

    missing, recipe = "", made.recipe
    if data is None:
        try:
            data = recipe.data.build()
        except (ValueError, OSError, ImportError) as error:
            missing = f"the data are not at hand ({str(error).splitlines()[0]})"
    teacher = None
    if recipe.teacher is not None:
        try:
            teacher = runs.load(recipe.teacher, device)
        except (ValueError, OSError):
            teacher = None
    weights = {"average": _parameters(made.model)}
    saved = checkpoints.checkpoints(made.folder / "checkpoints")
    for name in ("student", "target"):
        if saved and (saved[-1] / f"{name}.safetensors").is_file():
            read = checkpoints.read_weights(saved[-1], name)
            weights[name] = {key: read[key].to(device) for key in weights["average"]}
    if teacher is not None:
        weights["teacher"] = _parameters(teacher.model)
        weights["first"] = weights["teacher"]
    # Another version of torch may draw other first weights.
    elif recipe.teacher is None and made.record.get("torch") == torch.__version__:
        assert recipe.network is not None
        shape, classes = tuple(made.record["shape"]), made.record["classes"] or None
        net = runs.initialized(recipe.network, shape, classes, recipe.seed)
        weights["first"] = _parameters(Preconditioned(net, recipe.scalings).to(device))
    return Patient(made, data, missing, teacher, weights, _log(made.folder), device)


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


def _levels(recipe: Experiment, std: float) -> list[float]:
    """Noise levels that a model of this recipe knows, near the data's own spread if it may."""
    noise_range, objective = recipe.noise_range, recipe.objective
    if isinstance(objective, ProgressiveDistillation):  # it knows those of its grid alone
        return noise_range.grid(objective.steps + 1)[:-1].tolist()
    low, high = noise_range.sigma_min, noise_range.sigma_max
    return [r * std for r in LEVELS if low < r * std <= high] or [high]


def scatter(x: Samples, label: Labels | None) -> float:
    """Variance that is left when the class is known, summed over coordinates.

    Source: ours.
    """
    rows = x.double().flatten(1)
    parts = [rows] if label is None else [rows[label == c] for c in label.unique()]
    return sum(float((part - part.mean(0)).square().sum()) for part in parts) / len(rows)


@torch.no_grad()
def ask(model: Denoiser, x: Samples, sigma: float, label: Labels | None) -> Tensor:
    """The model's answers at one noise level, in float64.

    Source: ours.
    """
    labels = [None] * len(x) if label is None else label.split(64)
    answers = [
        model(part, part.new_full((len(part),), sigma, dtype=torch.float32), told)
        for part, told in zip(x.split(64), labels, strict=False)
    ]
    return torch.cat(answers).double()


def noisy(x: Samples, sigma: float) -> Samples:
    """The same noise for every model and level, so that differences are theirs.

    Source: ours.
    """
    return add_noise(x, normal(x, seeded("doctor", "noise")), x.new_full((len(x),), sigma))


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
