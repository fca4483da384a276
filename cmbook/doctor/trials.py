"""Trials: what is wrong with a recipe, found by training it anew with other settings.

Settings of the nearest published recipe take the place of the run's: those that are suspected,
or all at once. If samples then come much nearer to the data, half of these settings are tried, and
half of that half, until one is left that does it alone. Data, seed, teacher and number of steps
stay what they are. If no setting does it, more steps are tried.
"""

import math
import time
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import tomli_w
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cmbook import experiment
from cmbook.data import AnyData, Digits, Toy
from cmbook.doctor.answers import stray
from cmbook.doctor.findings import Finding, Verdict, found
from cmbook.doctor.parts import apart, chance
from cmbook.doctor.patient import Patient, Undone
from cmbook.experiment import Experiment
from cmbook.guidance import guided
from cmbook.losses import ProgressiveDistillation
from cmbook.noise import PerImage
from cmbook.protocols import Labels, Samples
from cmbook.samplers import ode_sample, prior
from cmbook.training import train

if TYPE_CHECKING:  # runs warns by this package
    from cmbook.runs import Run

SECONDS = 120.0  # of all trials together
TIMED = 60  # steps are taken to see how long a trial is,
MOST_FLOPS = 3e12  # if they take no more operations
LEAST = 3  # at least one part of so many of the run's steps tells what the whole would
LOW = 0.001  # nearer than that, samples are good enough
NEARER = 2.0  # times: what other seeds and orders of sums do not do
SURE = 2.5  # times, of a run without symptoms: settings that were suspected are at fault
MOST = 0.5, 0.75  # of the logarithm of a gain: enough for fewer settings; no need to look further
SAME = 0.25  # settings that differ by a factor of less than e to this power are the same
STRAY, BESIDE = 0.25, 0.02  # share that strays without harm, and what more of them counts
LONGER = 4, 10  # times the steps, at least and at most, that may be too few
LARGER = 10  # times the operations of the run's network,
SMALL = 1e6  # unless there are no more than that
_PARTS = ("objective", "scalings", "network", "noise_range", "training")
_KEPT = {  # how long and how it is computed, not what
    f"training.{name}"
    for name in ("steps", "save_every", "keep", "also_average", "accumulation", "compile")
}
Tables = dict[str, Any]


class Change(NamedTuple):
    """One setting, or one table whose kind is another.

    Attributes:
        name: Such as `network.depth`.
        ours: What the run has; `None` if it is left out.
        theirs: What the published recipe has.
        source: The recipe's name.
    """

    name: str
    ours: Any
    theirs: Any
    source: str

    @property
    def far(self) -> float:
        """How far apart they are; 1 is a factor of e."""
        a, b = self.ours, self.theirs
        if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in (a, b)):
            return 1.5
        if self.name.endswith("decay"):
            a, b = 1 - a, 1 - b
        return abs(math.log(a / b)) if a * b > 0 else min(abs(a - b), 3.0)

    def suspected(self, said: str) -> bool:
        """Whether it has been spoken of, as "network.depth = 20", or as its last word."""
        word = self.name.split(".")[-1]
        return f"{self.name} " in said or ("_" in word and word in said)


# ── the other settings ──


def differences(p: Patient, lend: bool = True) -> list[Change]:
    """What the nearest published recipe has otherwise, as it suits this run.

    Args:
        p: Whose run.
        lend: Where its table is of another kind, such as a curriculum, fields are compared with
            those of the next recipe that has this kind; otherwise the whole table differs.

    Source: ours.
    """
    ours, (name, *others) = _tables(p.recipe), _nearest(p)
    recipe = _published(name)
    theirs, lent = _tables(recipe), dict[str, str]()
    for part, mine in ours["objective"].items() if lend else ():
        if not isinstance(mine, dict) or theirs["objective"][part].get("kind") == mine.get("kind"):
            continue
        for other in others:
            table = _tables(_published(other))["objective"][part]
            if table.get("kind") == mine["kind"]:
                near = theirs["objective"][part]
                same = {key: near[key] for key in table.keys() & near.keys() - {"kind"}}
                theirs["objective"][part] = table | same
                lent |= {f"objective.{part}.{key}": other for key in table.keys() - same.keys()}
                break
    _suit(p, ours, theirs, recipe)
    return [c for c in _changes(ours, theirs, name, lent) if c.far > SAME]


def _suit(p: Patient, ours: Tables, theirs: Tables, recipe: Experiment) -> None:
    """What depends on data, teacher and length is as these ask."""
    mine, other = p.recipe.training, recipe.training
    if p.recipe.teacher is not None:  # the student is a copy, and knows its teacher's levels
        network = ours["network"].items()
        theirs["network"] = {k: 0.0 if k == "dropout" else v for k, v in network}
        theirs["noise_range"] |= {
            k: v for k, v in _tables(p.at_hand.recipe)["noise_range"].items() if k != "rho"
        }
    elif 2 / 3 < p.range.sigma_data / p.std < 3 / 2:
        theirs["noise_range"]["sigma_data"] = p.range.sigma_data
    else:
        theirs["noise_range"]["sigma_data"] = float(f"{p.std:.2g}")
    if p.recipe.teacher is None and _large(p, recipe):
        theirs["network"] = ours["network"]
    if 4 * mine.batch_size >= other.batch_size:
        theirs["training"]["batch_size"] = mine.batch_size
    # An average remembers a share of the steps.
    left = min(0.1, (1 - other.average_decay) * other.steps / mine.steps)
    near = 0.25 < left / (1 - mine.average_decay) < 4
    decay = mine.average_decay if near else round(1 - left, 5)
    theirs["training"]["average_decay"] = decay


def _large(p: Patient, recipe: Experiment) -> bool:
    """Whether its network does not suit these data, or is too large to be tried here."""
    shape, classes = tuple(p.run.record["shape"]), p.classes or None
    assert recipe.network is not None
    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            net = recipe.network.build(shape, classes).to("meta")  # buffers, too
            label = torch.zeros(1, dtype=torch.int64) if classes else None
            net(torch.zeros(1, *shape), torch.ones(1), label)
    except (ValueError, RuntimeError, ArithmeticError):
        return True
    return bool(counter.get_total_flops() > max(LARGER * p.flops, SMALL))


def _tables(recipe: Experiment) -> Tables:
    """The tables that may change."""
    every = tomllib.loads(experiment.dumps(recipe))
    return {name: every.get(name, {}) for name in _PARTS}


def _published(name: str) -> Experiment:
    return experiment.loads(experiment.recipe_text(name))


def _nearest(p: Patient) -> list[str]:
    """The published recipes with the same objective, those for similar data first."""
    kind, size = type(p.recipe.objective), math.prod(p.run.record["shape"])

    def far(recipe: Experiment) -> tuple[float, bool, bool]:
        distance = abs(math.log(_numbers(recipe.data) / size))
        labelled = bool(getattr(recipe.data, "labelled", False))
        return distance, labelled != bool(p.classes), recipe.guidance != p.recipe.guidance

    known = {name: _published(name) for name in experiment.recipes()}
    names = [name for name, recipe in known.items() if type(recipe.objective) is kind]
    if not names:
        raise Undone("no published recipe has such an objective")
    return sorted(names, key=lambda name: far(known[name]))


def _numbers(data: AnyData) -> int:
    """Of one sample, without reading any."""
    if isinstance(data, Toy):
        return 2
    if isinstance(data, Digits):
        return 192 if data.tinted else 64
    side = getattr(data, "size", None) or 28
    colors = getattr(data, "channels", None) or (3 if getattr(data, "color", False) else 1)
    return int(colors * side**2)


def _changes(
    ours: Tables, theirs: Tables, source: str, lent: dict[str, str], prefix: str = ""
) -> Iterator[Change]:
    """Where two recipes differ; tables of two kinds differ as a whole."""
    for key in {**ours, **theirs}:
        name, a, b = f"{prefix}{key}", ours.get(key), theirs.get(key)
        if a == b or name in _KEPT:
            continue
        source_ = lent.get(name, source)
        like = name == "training.optimizer"  # whose kinds have the same fields
        if isinstance(a, dict) and isinstance(b, dict) and (like or a.get("kind") == b.get("kind")):
            yield from _changes(a, b, source_, lent, f"{name}.")
        else:
            yield Change(name, a, b, source_)


# ── trials ──


@dataclass
class Bench:
    """Where the run is trained anew, and how far its samples are from what they should be.

    Attributes:
        p: Whose run.
        steps: How many are taken in a trial.
        real: What samples should be like.
        label: Their classes.
        known: What trials have said, by the names of the settings.
        began: When, in seconds of one core: what else runs here is not counted.
    """

    p: Patient
    steps: int
    real: Samples
    label: Labels | None
    known: dict[frozenset[str], float] = field(default_factory=dict)
    began: float = field(default_factory=time.process_time)
    pace: float = 0.0

    @classmethod
    def of(cls, p: Patient) -> "Bench":
        """For a run."""
        x, label = p.part(slice(p.many))
        if p.recipe.guidance != 1:  # then they should be like those of its guided teacher
            noise = prior(torch.empty_like(x), p.range, PerImage(range(len(x))))
            x = ode_sample(p.walker, noise, p.range, label, levels=18)
        return cls(p, p.recipe.training.steps, x, label)

    def off(self, run: "Run") -> float:
        """Energy distance of its samples, with their labels, to these, and more if many stray."""
        n = len(self.real)
        made = run.sample(n, self.label, generator=PerImage(range(2 * n, 3 * n)))
        made, real = self._told(made), self._told(self.real)
        off = apart(made, real) + BESIDE * max(0.0, stray(made, real) - STRAY)
        self.by_chance = chance(made, real)
        return off if math.isfinite(off) else math.inf

    def _told(self, x: Samples) -> Samples:
        """Samples that say their class, far from the others."""
        rows = x.flatten(1).double()
        if self.label is None:
            return rows
        side = math.sqrt(float(self.real.double().flatten(1).var(0).sum()))
        one_hot = torch.nn.functional.one_hot(self.label, self.p.classes)
        return torch.cat([rows, side * one_hot.to(rows)], 1)

    def recipe(self, swapped: list[Change]) -> Experiment:
        """The run's recipe with some settings swapped, and as many steps as a trial takes."""
        whole = tomllib.loads(experiment.dumps(self.p.recipe))
        for change in swapped:
            *path, last = change.name.split(".")
            table = whole
            for part in path:
                table = table[part]
            if change.theirs is None:
                table.pop(last, None)
            else:
                table[last] = deepcopy(change.theirs)
        knobs, share = whole["training"], self.steps / self.p.recipe.training.steps
        knobs["steps"], knobs["warmup"] = self.steps, int(knobs["warmup"] * share)
        knobs["average_decay"] **= 1 / share
        knobs["also_average"] = []
        top = whole["noise_range"]["sigma_max"]
        below = [s for s in whole["sampling"]["sigmas"] if s < top]
        whole["sampling"]["sigmas"] = [top, *below[: len(whole["sampling"]["sigmas"]) - 1]]
        return experiment.loads(tomli_w.dumps(whole))

    def trained(self, recipe: Experiment, most: int | None = None) -> "Run":
        """What this recipe makes, or its first steps."""
        from cmbook import runs

        p, knobs, data = self.p, recipe.training, self.p.data
        assert data is not None
        teacher = None if p.teacher is None else deepcopy(p.teacher.model).eval()
        student = runs.untrained(recipe, data, teacher).to(p.device)
        walker = (
            teacher if teacher is None or recipe.guidance == 1 else guided(teacher, recipe.guidance)
        )
        steps = train(
            student,
            data.batches(knobs.batch_size, recipe.seed),
            recipe.objective,
            steps=knobs.steps,
            optimizer=knobs.optimizer.build(student),
            teacher=walker if recipe.objective.needs_teacher else None,
            average_decay=knobs.average_decay,
            learning_rate=knobs.learning_rate,
            accumulation=knobs.accumulation,
            clip=knobs.clip,
            precision=knobs.precision,
            seed=recipe.seed,
        )
        bar = tqdm(steps, "training anew", knobs.steps, leave=False, disable=None)
        for step in bar:
            if most is not None and step.state.step >= most:
                break
            if time.process_time() - self.began > 1.5 * SECONDS:
                raise Undone("trials take too long here")
        return replace(p.run, recipe=recipe, model=step.average, step=step.state.step)

    def fit(self, swapped: list[Change]) -> None:
        """Choose how many steps a trial takes; the run and its like are to fit the time."""
        for some in ([], swapped):
            recipe = self.recipe(some)
            self.trained(recipe, 5)
            began = time.process_time()
            self.trained(recipe, 25)
            self.pace = max(self.pace, (time.process_time() - began) / 25)
        # The run itself, all settings, and two at each halving.
        trials = 2 + min(4, 2 * math.ceil(math.log2(max(1, len(swapped)))))
        for part in range(1, LEAST + 1):
            self.steps = self.p.recipe.training.steps // part
            if trials * self.steps * self.pace < SECONDS:
                return
        raise Undone("trials take too long here")

    def tried(self, swapped: list[Change]) -> float:
        """How far samples are once these settings are swapped."""
        names = frozenset(change.name for change in swapped)
        if names not in self.known:
            try:
                recipe = self.recipe(swapped)
                whole = not swapped and self.whole
                self.known[names] = self.off(self.p.run if whole else self.trained(recipe))
            except (RuntimeError, ValueError, ArithmeticError):  # they do not go together
                self.known[names] = math.inf
        return self.known[names]

    def gain(self, swapped: list[Change]) -> float:
        """How many times nearer they come."""
        low = max(LOW, self.by_chance / 3)
        return max(self.tried([]), low) / max(self.tried(swapped), low)

    def again(self) -> float:
        """How many times nearer they come if nothing is swapped: 1, if the run did what it says."""
        if not self.whole or self.spent:
            return 1.0  # that was the measure, or nothing is left
        low = max(LOW, self.by_chance / 3)
        return max(self.tried([]), low) / max(self.off(self.trained(self.recipe([]))), low)

    @property
    def whole(self) -> bool:
        """Whether a trial is as long as the run."""
        return self.steps == self.p.recipe.training.steps

    @property
    def odd(self) -> bool:
        """Whether the samples are off at all."""
        return self.tried([]) > LOW + self.by_chance / 2

    @property
    def spent(self) -> bool:
        """Whether no time is left for another trial."""
        return self.left < 0.7 * self.steps * self.pace

    @property
    def left(self) -> float:
        """Seconds for more trials."""
        return SECONDS - (time.process_time() - self.began)

    def longer(self) -> tuple[int, float]:
        """More steps, and how many times nearer they bring samples; 0 if that is no cure."""
        knobs = self.p.recipe.training
        usual = _published(_nearest(self.p)[0]).training.steps
        steps = knobs.steps * round(min(max(usual / knobs.steps, LONGER[0]), LONGER[1]))
        if not self.whole or self.left < steps * self.pace:
            return steps, 0.0
        low, before = max(LOW, self.by_chance / 3), self.tried([])
        recipe = self.recipe([])
        off = self.off(
            self.trained(replace(recipe, training=replace(recipe.training, steps=steps)))
        )
        cured = off < LOW + self.by_chance / 2
        return steps, before / max(off, low) if cured else 0.0


def blamed(bench: Bench, every: list[Change], suspects: list[Change]) -> list[Change]:
    """The fewest settings that bring most of the gain; none if all do not.

    Source: Zeller and Hildebrandt (2002), delta debugging, without their complements.
    """
    some = every
    if suspects and bench.gain(suspects) >= NEARER:
        clearly = bench.gain(suspects) > 2 * NEARER or bench.spent
        some = suspects if clearly else max(suspects, every, key=bench.gain)
    if bench.gain(some) < NEARER:
        return []
    while len(some) > 1:
        half, log = (len(some) + 1) // 2, math.log(bench.gain(some))
        enough, plenty = (max(NEARER, math.exp(share * log)) for share in MOST)
        parts = [some[:half], some[half:], *([each] for each in some if len(some) > 2)]
        best, most = some, enough
        for k, part in enumerate(parts):
            if (best is not some and (most >= plenty or k > 1)) or bench.spent:
                break
            if (gain := bench.gain(part)) >= most:
                best, most = part, gain
        if best is some:
            break
        some = best
    return some


def recipe_anew(p: Patient, said: str = "", sick: bool = True) -> Iterator[Finding]:
    """Which settings of the recipe make its samples bad.

    Args:
        p: Whose.
        said: What is suspected; settings that it names are tried first.
        sick: Whether there are symptoms; if not, settings that nobody suspects are no fault.

    Source: ours.
    """
    if p.data is None:
        raise Undone(p.missing)
    if isinstance(p.recipe.objective, ProgressiveDistillation):
        raise Undone("rounds of distillation take too long for trials")
    every, whole = (
        sorted(differences(p, lend), key=lambda c: (not c.suspected(said), -c.far))
        for lend in (True, False)
    )
    bench = _ready(p, every)
    suspects = [change for change in every if change.suspected(said)]
    some = blamed(bench, every, suspects)
    if not some and whole != every and not bench.spent:
        some = blamed(bench, whole, [])
    if some and (again := bench.again()) > NEARER:
        cause = (
            "what was trained is not what the recipe says: trained anew as it is, its samples come "
            f"{_times(again)} to the data"
        )
        yield found("recipe anew", again, "ill", cause)
        return
    gain = bench.gain(some or every)
    if not (some and gain > 2 * NEARER):
        steps, nearer = bench.longer()
        if nearer > max(NEARER, 2 * gain if some else 0):
            yield _short(p.recipe.training.steps, steps, nearer, "ill" if sick else "look")
            return
    sure = sick or (gain > SURE and all(change in suspects for change in some))
    yield _told(some, every, gain, "ill" if sure else "look")
    if not some and suspects and bench.whole:
        yield found("settings", 0, "well", "")  # others would have done no better


def _ready(p: Patient, every: list[Change]) -> Bench:
    """A bench that knows how long a trial is, and that there is something to be explained."""
    if 6 * p.flops * p.recipe.training.batch_size * TIMED > MOST_FLOPS:
        raise Undone("trials take too long here")
    bench = Bench.of(p)
    if not bench.odd:
        raise Undone("its samples are as they should be")
    bench.fit(every)
    bench.known.clear()
    if not bench.odd:
        raise Undone("trials would have to be longer")
    return bench


def _told(some: list[Change], every: list[Change], gain: float, verdict: Verdict) -> Finding:
    """Which settings they are, and what they should be."""
    cause = f"{_cause(some, every)}, its samples come {_times(gain)} to the data"
    remedy = " ".join(["Set", *(f"{c.name}={_said(c.theirs)}" for c in some)])
    return found("trial", gain, verdict if some else "well", cause, remedy)


def _short(ours: int, steps: int, gain: float, verdict: Verdict) -> Finding:
    """More steps are a cure."""
    cause = (
        f"training.steps = {ours} are too few: trained anew with {steps}, its samples come "
        f"{_times(gain)} to the data"
    )
    return found("trial", gain, verdict, cause, f"Set training.steps={steps}, or more")


def _times(gain: float) -> str:
    return f"{gain:.1f} times nearer" if gain < 100 else "far nearer"


def _cause(some: list[Change], every: list[Change]) -> str:
    """Which settings; of a whole table, those of its fields that are unusual."""
    ours = list[str]()
    for c in some:
        inside = [e for e in every if e.name.startswith(f"{c.name}.")]
        ours += [f"{each.name} = {_named(each.ours)}" for each in inside or [c]]
    theirs = ", ".join(_named(c.theirs) for c in some)
    whose = ", ".join(dict.fromkeys(c.source for c in some))
    together = " together" if len(some) > 1 else ""
    return f"{', '.join(ours)}{together}: trained anew with {theirs}, as in {whose}"


def _named(value: Any) -> str:
    """As a recipe's dataclass is printed."""
    if not isinstance(value, dict):
        return _said(value)
    fields = ", ".join(f"{k}={_named(v)}" for k, v in value.items() if k != "kind")
    kind = str(value.get("kind", ""))
    return f"{kind}({fields})" if fields else kind


def _said(value: Any) -> str:
    """As TOML has it, in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_said(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return f'"{value}"'
    return "none" if value is None else str(value)
