"""Settings that no published recipe comes near."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Any

from cmbook import experiment
from cmbook.doctor.findings import Finding, found, over
from cmbook.doctor.patient import Patient
from cmbook.experiment import Experiment
from cmbook.losses import (
    EDM,
    ContinuousDistillation,
    ContinuousTraining,
    ProgressiveDistillation,
)

FAR = 6.0  # times what published recipes have, or a fraction of it
_FAR = {
    "objective.sigma_law.std": 2.0,  # its levels are those of e to this power
    "network.depth": 3.0,  # and signals, those of some number to this
}
# Of others it matters little what was taken, or another check measures what they do.
_JUDGED = (
    *("objective.weight", "objective.distance.c", "objective.curriculum.", "objective.decay"),
    "objective.levels",
    *("objective.sigma_law.", "noise_range.sigma_min", "noise_range.sigma_max"),
    *("network.width", "network.depth", "network.channels", "network.time_scale"),
    *("network.dropout", "network.label_dropout"),
    *("training.optimizer.lr", "training.batch_size", "training.average_decay"),
)
# What suits depends on the data, too.
_SIZED = ("training.optimizer.lr", "network.width", "objective.levels")
_BOTH = (".kind", ".mu_variant")  # all of them are published
_NEAR_ONE = ("decay", "start_decay", "average_decay")
# Answers are means only if the distance is L2; consistency may be measured by any.
_MEANS = (EDM, ProgressiveDistillation, ContinuousDistillation, ContinuousTraining)


def settings(p: Patient) -> Iterator[Finding]:
    """Which settings are far from those of all recipes with this objective."""
    kind, odd = type(p.recipe.objective).__name__, list[str]()
    if not _usual(kind):
        return  # a method from outside
    for name, value in _judged(p.recipe).items():
        for data in ("", type(p.recipe.data).__name__):
            known = _usual(kind, data).get(name)
            if known and (not data or name in _SIZED) and not _comes_near(name, value, known):
                these = ", ".join(map(str, sorted(known, key=str)[:6]))
                whose = f"recipes for {data}" if data else "published recipes"
                odd.append(f"{name} = {value} ({whose}: {these})")
                break
    cause = f"unusual settings: {'; '.join(odd)}"
    yield found("settings", len(odd), over(len(odd), 0), cause)


def _comes_near(name: str, value: Any, known: set[Any]) -> bool:
    """Whether a published recipe has the same, or a number that is about as large."""
    numbers = [each for each in known if isinstance(each, int | float)]
    if value in known or isinstance(value, str) or not numbers:
        return value in known
    if name.split(".")[-1] in _NEAR_ONE:
        value, numbers = 1 - value, [1 - each for each in numbers]
    numbers = [each for each in numbers if each]
    if not numbers:
        return True  # nobody else has any
    if min(numbers) < 0 or value < 0:  # a logarithm
        return bool(min(numbers) - 1 <= value <= max(numbers) + 1)
    far = _FAR.get(name, FAR)
    return bool(min(numbers) / far <= value <= max(numbers) * far)


@cache
def _usual(kind: str, data: str = "") -> dict[str, set[Any]]:
    """The values that the recipes of an objective have, for some data, by the names of settings."""
    values = defaultdict[str, set[Any]](set)
    for name in experiment.recipes():
        recipe = experiment.loads(experiment.recipe_text(name))
        if type(recipe.objective).__name__ == kind and data in ("", type(recipe.data).__name__):
            for setting, value in _judged(recipe).items():
                values[setting].add(value)
    return dict(values)


def _judged(recipe: Experiment) -> dict[str, Any]:
    """Its settings that are judged."""
    every = experiment.settings(recipe).items()
    judged = {k: v for k, v in every if k.startswith(_JUDGED) and not k.endswith(_BOTH)}
    if isinstance(recipe.objective, _MEANS):
        judged["objective.distance"] = type(recipe.objective.distance).__name__
    return judged
