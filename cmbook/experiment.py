"""Experiment: the typed recipe of a run, read strictly from TOML and written back.

The dataclasses are the truth, TOML is how they are stored. A union is told apart by `kind`, the
name of the class. The one `[noise_range]` table is handed to scalings and objective, so no run
can hold two.
"""

import difflib
import math
import tomllib
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w
import torch

from cmbook.data import AnyData
from cmbook.distances import AnyDistance
from cmbook.losses import AnyObjective, ContinuousDistillation, ContinuousTraining
from cmbook.networks import Network
from cmbook.noise import NoiseRange
from cmbook.ode import Solver
from cmbook.parameterization import AnyScalings, ConsistencyScalings
from cmbook.perceptual import LPIPS
from cmbook.protocols import Distance, Objective
from cmbook.schedules import check_decreasing
from cmbook.training import (
    AnyOptimizer,
    LearningRate,
    Precision,
    RAdam,
    check_averages,
    check_gradients,
)

T = TypeVar("T")
MOST = 1_000_000  # samples of a batch
KINDS: dict[Any, Any] = {Distance: AnyDistance | LPIPS, Objective: AnyObjective}  # open -> known


@dataclass(frozen=True)
class Training:
    """How long, how fast, how often saved.

    Attributes:
        steps: K.
        batch_size: Samples per step.
        optimizer: Its `lr` is the peak rate.
        warmup: Steps of linear warm-up.
        decay: What follows it: nothing, or a straight line or half cosine down to 0.
        average_decay: Of the moving average for sampling.
        also_average: Decays of further averages, chosen by `cmbook sample --average`.
        accumulation: Equal shards of a batch, evaluated one after the other, where memory is short.
        clip: The largest norm of the gradient; left out, it is not clipped.
        precision: Of the networks' arithmetic. `"float32"` is without TF32.
        teacher_precision: Of the teacher's weights as they are kept. The target has no such
            choice: an average kept in bfloat16 lags about ten times as far behind the student.
        compile: Whether `torch.compile` makes the networks faster, after a first step that takes
            minutes. Not for continuous time, whose derivatives it breaks.
        save_every: Steps between checkpoints.
        keep: How many checkpoints stay, the newest. Any can be sampled and evaluated: keep as many
            as a curve of FID over training has points.

    Source: Song et al. (2023), Table 3.
    """

    steps: int = 10_000
    batch_size: int = 512
    optimizer: AnyOptimizer = RAdam()
    warmup: int = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    average_decay: float = 0.9999
    also_average: tuple[float, ...] = ()
    accumulation: int = 1
    clip: float | None = None
    precision: Precision = "float32"
    teacher_precision: Precision = "float32"
    compile: bool = False
    save_every: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.batch_size > MOST:
            raise ValueError(f"batch_size must be at most {MOST:,}; got {self.batch_size}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0; got {self.warmup}")
        check_averages(self.average_decay, self.also_average)
        check_gradients(self.accumulation, self.clip)
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size must be divisible by accumulation = {self.accumulation}, so that its "
                f"shards are equal; got {self.batch_size}"
            )
        if not 0 < self.optimizer.lr < math.inf:
            raise ValueError(f"optimizer.lr must be positive; got {self.optimizer.lr}")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise ValueError(f"optimizer.betas must lie in [0, 1); got {self.optimizer.betas}")

    @property
    def learning_rate(self) -> LearningRate:
        """The rate as a function of the clock."""
        return LearningRate(self.optimizer.lr, self.warmup, self.decay)


@dataclass(frozen=True)
class Sampling:
    """How `cmbook sample` draws from the finished model.

    Attributes:
        levels: Of the grid that a diffusion model walks.
        solver: Of that walk.
        sigmas: Where a consistency model is evaluated, largest first: one step takes the first,
            two steps the first two.

    Source: Song et al. (2023), §6.
    """

    levels: int = 18
    solver: Solver = "heun"
    sigmas: tuple[float, ...] = (80.0,)

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"levels must be at least 2; got {self.levels}")
        check_decreasing(torch.tensor(self.sigmas, dtype=torch.float64))


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a run, and nothing else.

    Attributes:
        data: What is learned.
        objective: How.
        scalings: The dress of the network: `EDMScalings` for a diffusion model,
            `ConsistencyScalings` for a consistency model.
        network: The network; `None` takes the teacher's.
        noise_range: Of the whole run.
        teacher: Folder of the run that is distilled. The student starts as a copy of it.
        guidance: w of the teacher, which must know classes and have been trained with
            `label_dropout`; 1 is none.
        training: How long.
        sampling: How to draw from it.
        seed: Of weights, data order and noise.

    Source: ours.
    """

    data: AnyData
    objective: AnyObjective
    scalings: AnyScalings
    network: Network | None = None
    noise_range: NoiseRange = NoiseRange()
    teacher: str | None = None
    guidance: float = 1.0
    training: Training = Training()
    sampling: Sampling = Sampling()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("objective", "scalings"):
            part = replace(getattr(self, name), noise_range=self.noise_range)
            object.__setattr__(self, name, part)
        if self.network is None and self.teacher is None:
            raise ValueError("a run without a teacher needs a network")
        if self.objective.needs_teacher and self.teacher is None:
            raise ValueError(
                f"{type(self.objective).__name__} needs a teacher, the folder of a diffusion "
                'model\'s run, such as teacher = "runs/digits/edm"'
            )
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be at least 0; got {self.guidance}")
        if self.guidance != 1 and self.teacher is None:
            raise ValueError("guidance is a teacher's; this run has none")
        first, sigma_max = self.sampling.sigmas[0], self.noise_range.sigma_max
        if isinstance(self.scalings, ConsistencyScalings) and first != sigma_max:
            raise ValueError(
                f"sampling.sigmas must begin at noise_range.sigma_max = {sigma_max}, where pure "
                f"noise lies; got {list(self.sampling.sigmas)}"
            )
        continuous = isinstance(self.objective, ContinuousDistillation | ContinuousTraining)
        if continuous and self.training.compile:
            raise ValueError(
                f"{type(self.objective).__name__} needs forward-mode derivatives, which a compiled "
                "network gets wrong; leave out training.compile"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in 0 ... {2**32 - 1}; got {self.seed}")


def recipes() -> list[str]:
    """The names of the recipes that come with cmbook, such as `digits/cd`.

    Source: ours.
    """
    root = Path(str(files("cmbook") / "configs"))
    return sorted(
        path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.toml")
    )


def recipe_text(name_or_file: str) -> str:
    """The TOML of a recipe that comes with cmbook, or of a file.

    Raises:
        ValueError: If there is no such recipe, with the nearest name.

    Source: ours.
    """
    if name_or_file.endswith(".toml"):
        path = Path(name_or_file)
        if not path.is_file():
            raise ValueError(f"there is no recipe file {path}")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the recipe {path}: {error}") from error
    if name_or_file not in recipes():
        raise ValueError(
            f"there is no recipe {name_or_file!r}{nearest(name_or_file, recipes())} "
            "`cmbook configs` lists them; a file of your own ends in .toml"
        )
    return (files("cmbook") / "configs" / f"{name_or_file}.toml").read_text(encoding="utf-8")


def loads(text: str, overrides: tuple[str, ...] | list[str] = ()) -> Experiment:
    """Read a recipe, with settings replaced by `key=value` pairs.

    A recipe may begin with `base = "imagenet64/cd"`, the name or file of another: then it states
    only what differs. A table with another `kind` than the base's replaces it whole, and so does
    `key.kind=...`: what else that kind is to have is given beside it, or is its default.

    Args:
        text: TOML.
        overrides: Such as `objective.levels=40` or `training.optimizer.lr=1e-4`; values are
            TOML, and a bare word is a string.

    Raises:
        ValueError: Naming the setting that is unknown, missing or of the wrong type.

    Source: ours.
    """
    try:
        return _loaded(text, overrides)
    except RecursionError:  # whose own sentence speaks of Python
        raise ValueError("the recipe holds tables or lists within each other, too deep") from None


def _loaded(text: str, overrides: tuple[str, ...] | list[str]) -> Experiment:
    raw = _raw(text)
    raw.pop("record", None)
    given: set[tuple[str, ...]] = set()
    for override in overrides:
        given.add(_override(raw, override, given))
    for name in ("objective", "scalings"):
        if isinstance(raw.get(name), dict) and "noise_range" in raw[name]:
            raise ValueError(f"{name}.noise_range is not a setting; set the table [noise_range]")
    experiment: Experiment = _read(Experiment, raw, "")
    return experiment


def _raw(text: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tables of a recipe, on those of its base."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the recipe is not valid TOML: {error}") from error
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ValueError(f"base must be the name of a recipe, such as 'digits/cd'; got {base!r}")
    if base in above:
        raise ValueError(f"the recipe is its own base: {' on '.join((*above, base))}")
    return _merged(_raw(recipe_text(base), (*above, base)), raw)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """One table on another."""
    if above.get("kind", below.get("kind")) != below.get("kind"):
        return above
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merged(below[key], value) if both else value
    return merged


def dumps(experiment: Experiment) -> str:
    """Write a recipe as TOML, with every setting; `loads` reads it back to an equal one.

    Source: ours.
    """
    return tomli_w.dumps(_write(experiment, Experiment))


def settings(experiment: Experiment) -> dict[str, Any]:
    """Every setting of a recipe by its dotted name, such as `training.optimizer.lr`.

    Source: ours.
    """
    return _flat(tomllib.loads(dumps(experiment)))


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read(expected: Any, value: Any, where: str) -> Any:
    """The value as the expected type, or an error that names the setting."""
    expected = KINDS.get(expected, expected)
    options = [o for o in get_args(expected) if o is not types.NoneType]
    if get_origin(expected) in (Union, types.UnionType):
        return _read(options[0], value, where) if len(options) == 1 else _choose(
            options, value, where
        )  # fmt: skip
    if get_origin(expected) is Literal:
        if value not in options:
            hint = nearest(str(value), [str(o) for o in options])
            raise ValueError(f"{where} must be one of {_listed(options)}; got {value!r}{hint}")
        return value
    if get_origin(expected) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list; got {value!r}")
        items = options[:1] * len(value) if options[-1] is Ellipsis else options
        if len(value) != len(items):
            raise ValueError(f"{where} must be a list of {len(items)}; got {value!r}")
        pairs = enumerate(zip(items, value, strict=True))
        return tuple(_read(o, v, f"{where}[{i}]") for i, (o, v) in pairs)
    if is_dataclass(expected):
        return _build(expected, value, where)  # type: ignore[arg-type]
    if expected is float and _is(int, value):
        return float(value)
    if not _is(expected, value):
        raise ValueError(f"{where} must be of type {expected.__name__}; got {value!r}")
    if expected is int and abs(value) >= 2**63:
        raise ValueError(f"{where} must fit in 64 bits; got {value}")
    return value


def _choose(options: list[type], value: Any, where: str) -> Any:
    """A member of a union, told by its `kind`."""
    names = {option.__name__: option for option in options}
    if not isinstance(value, dict) or "kind" not in value:
        raise ValueError(f"{where} needs a kind, one of {_listed(names)}; got {value!r}")
    kind = value["kind"]
    if kind not in list(names):  # a list of names also answers for kinds that are no names
        hint = nearest(str(kind), list(names))
        raise ValueError(f"{where}.kind must be one of {_listed(names)}; got {kind!r}{hint}")
    return _build(names[kind], {k: v for k, v in value.items() if k != "kind"}, where)


def _build(expected: type[T], value: Any, where: str) -> T:
    """A dataclass from a table."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a table of settings; got {value!r}")
    hints, known = get_type_hints(expected), {f.name: f for f in fields(expected)}  # type: ignore[arg-type]
    dot = f"{where}." if where else ""
    for key in value:
        if key not in known:
            names = [name for name in known if name != "noise_range" or expected is Experiment]
            hint = nearest(key, names)
            has = f" {expected.__name__} has {_listed(names)}." if hint == "." else ""
            raise ValueError(f"{dot}{key} is not a setting{hint}{has}")
    settings = {key: _read(hints[key], item, f"{dot}{key}") for key, item in value.items()}
    for name, entry in known.items():
        if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"the recipe has no {dot}{name}, which has no default")
    try:
        return expected(**settings)
    except OverflowError as error:
        raise ValueError(f"{where}: these numbers are too large or too small: {value}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _write(value: Any, expected: Any) -> Any:
    """A value as TOML knows it; a union member gets its `kind`."""
    expected = KINDS.get(expected, expected)
    if isinstance(value, tuple):
        return [_write(item, type(item)) for item in value]
    if not is_dataclass(value):
        return value
    union = len([o for o in get_args(expected) if is_dataclass(o)]) > 1
    table: dict[str, Any] = {"kind": type(value).__name__} if union else {}
    hints = get_type_hints(type(value))
    for entry in fields(value):
        item = getattr(value, entry.name)
        nested_range = isinstance(item, NoiseRange) and not isinstance(value, Experiment)
        if item is not None and not nested_range:
            table[entry.name] = _write(item, hints[entry.name])
    return table


def _override(raw: dict[str, Any], override: str, given: set[tuple[str, ...]]) -> tuple[str, ...]:
    """Set one dotted key of a recipe. Of another kind, only what was given by hand stays."""
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ValueError(f"expected key=value, such as training.steps=1000; got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = raw
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ValueError(f"{key} is not a setting: {part} holds no settings of its own")
    if path[-1] == "kind" and table.get("kind", value) != value:
        kept = {p[len(path) - 1] for p in given if p[: len(path) - 1] == path[:-1]}
        for name in table.keys() - kept:
            del table[name]
    table[path[-1]] = value
    return path


def _is(expected: type, value: Any) -> bool:
    return isinstance(value, expected) and (expected is bool or not isinstance(value, bool))


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names)


def nearest(name: str, known: list[str]) -> str:
    """The end of a sentence about a name that is not known: the one that may be meant.

    Source: ours.
    """
    match = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {match[0]!r}?" if match else "."
