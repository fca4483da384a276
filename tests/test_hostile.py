"""Hostile and clumsy input: one sentence and a code that is not 0, never a traceback, a lost
result, a hang, or code that was handed over and run."""

import contextlib
import random
from functools import cache
from pathlib import Path

import hostile
import pytest

from cmbook import experiment
from cmbook.__main__ import main
from cmbook.data import Toy
from cmbook.interop.foreign import skeleton
from cmbook.runs import rounds

TEXTS = {name: experiment.recipe_text(name) for name in experiment.recipes()}
MEMORY = 3 << 30  # bytes that no refusal needs


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test starts in an empty folder, with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path


def told(capsys, arguments: list[str]) -> str:
    """How a command ends: nothing if it succeeds, its one sentence if it refuses."""
    capsys.readouterr()
    code = 0
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    if code in (0, 2):  # 2: what the parser says of a wrong usage
        return ""
    last = shown.splitlines()[-1] if shown else ""
    assert code in (1, 130), code
    assert last.startswith("cmbook: "), shown
    assert 10 < len(last) < 2100, last
    assert last.isprintable(), last
    return last


def bad(cases, check) -> list[str]:
    """What hangs, takes gigabytes, or raises what is neither a refusal nor nothing."""
    return hostile.failures(cases, check)


# recipes


def mutated(seed: int) -> tuple[str, bytes]:
    """A shipped recipe, changed; a function of the seed."""
    draw = random.Random(seed)
    name = draw.choice(list(TEXTS))
    return name, hostile.recipe(TEXTS[name], draw)


def read(seed: int) -> experiment.Experiment:
    file = Path("recipe.toml")
    file.write_bytes(mutated(seed)[1])
    return experiment.loads(experiment.recipe_text(str(file)))


def built(seed: int) -> None:
    """Read it; what is accepted has a network, rounds, and a text that reads back."""
    recipe = read(seed)
    shape = (2,) if isinstance(recipe.data, Toy) else (3, 32, 32)
    assert experiment.loads(experiment.dumps(recipe)) == recipe or "nan" in experiment.dumps(recipe)
    rounds(recipe, Path("run"))
    if recipe.network is not None:
        skeleton(recipe.network, shape, None)


def test_a_mutated_recipe_is_read_or_refused():
    assert bad(range(400), built) == []


@pytest.mark.slow
def test_ten_thousand_mutated_recipes_are_read_or_refused():
    assert bad(range(1000, 11_000), built) == []


@cache
def accepted(n: int, most: int) -> list[int]:
    """Seeds of mutations that are recipes still."""
    found: list[int] = []
    for seed in range(most):
        with contextlib.suppress(ValueError):
            read(seed)
            found.append(seed)
        if len(found) == n:
            break
    return found
