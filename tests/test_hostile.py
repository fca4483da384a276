"""Hostile and clumsy input: one sentence and a code that is not 0, never a traceback, a lost
result, a hang, or code that was handed over and run."""

import contextlib
import random
import shutil
from functools import cache
from pathlib import Path

import hostile
import pytest

from cmbook import experiment, runs
from cmbook.__main__ import main
from cmbook.data import Images, Toy, inspect
from cmbook.interop.foreign import skeleton

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
    runs.rounds(recipe, Path("run"))
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


# checkpoints

FACES = """# A consistency model of digits.
data = { kind = "Digits" }
network = { kind = "MLP", width = 8, depth = 2 }
scalings = { kind = "ConsistencyScalings" }
[objective]
kind = "ConsistencyTraining"
curriculum = { kind = "AdaptiveLevels", start = 2, end = 8 }
[training]
steps = 4
batch_size = 8
optimizer = { kind = "Adam" }
also_average = [0.5]
save_every = 2
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small run that can be gone on with."""
    folder = tmp_path_factory.mktemp("made")
    recipe = experiment.loads(FACES, ["training.steps=2"])
    runs.run(recipe, folder / "run", progress=False)
    return folder / "run"


COMMANDS = {
    "sample": ["sample", "run", "--n", "2", "--out", "a.npz"],
    "average": ["sample", "run", "--n", "2", "--out", "a.npz", "--average", "0.5"],
    "export": ["export", "run", "alone"],
    "resume": ["train", "faces.toml", "--resume", "--out", "run"],
    "evaluate": ["evaluate", "run", "--n", "20", "--rounds", "0", "--features", "pixels"],
    "edit": ["edit", "run", "--task", "interpolate", "--n", "2", "--out", "b.npz"],
}


def state_of(folder: Path) -> dict[str, object]:
    """What lies there: names, kinds, and contents of plain files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file() and path.stat().st_size < 1 << 24
        else (path.is_dir(), path.is_fifo(), path.is_symlink())
        for path in folder.rglob("*")
    }


def spoiled(made: Path, capsys, seed: int, names: list[str]) -> None:
    """Spoil the last checkpoint of a copy of the run, and use it every way."""
    draw = random.Random(seed)
    for place in ("run", "alone"):
        shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(made, "run")
    Path("faces.toml").write_text(FACES.replace("steps = 4", "steps = 2"), encoding="utf-8")
    last = sorted(Path("run/checkpoints").iterdir())[-1]
    how = hostile.checkpoint(last, draw)
    try:
        for name in names:
            before = state_of(Path("run"))
            refused = told(capsys, COMMANDS[name])
            if refused:
                assert state_of(Path("run")) == before, f"{how}: {name} changed what it refused"
            assert not list(Path().rglob("RAN")), f"{how}: {name} ran code"
            assert not list(Path().rglob(".unfinished*")), f"{how}: {name} left a part"
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{how}, {name}: {error!r}") from error


def test_a_spoiled_checkpoint_is_used_or_refused(made, capsys):
    names = list(COMMANDS)
    found = bad(range(60), lambda seed: spoiled(made, capsys, seed, [names[seed % len(names)]]))
    assert found == []


@pytest.mark.slow
def test_a_thousand_spoiled_checkpoints_are_used_or_refused(made, capsys):
    names = list(COMMANDS)
    assert bad(range(100, 1100), lambda seed: spoiled(made, capsys, seed, names)) == []


# data files


def laid(folder: Path, files: dict[str, bytes]) -> str:
    """Write the files of a set; its path, as a recipe names it."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    lone = next(iter(files)) if len(files) == 1 else ""
    return str(folder / lone if lone.endswith((".zip", ".npz")) else folder)


def damaged_set(seed: int) -> str:
    """A small set of some format with one file damaged."""
    draw = random.Random(seed)
    files = SETS[draw.choice(list(SETS))].copy()
    name = draw.choice(list(files))
    files[name] = hostile.damaged(files[name], draw)
    if draw.random() < 0.1:
        files[name] = draw.choice([f for each in SETS.values() for f in each.values()])
    return laid(Path("set"), files)


SETS = hostile.data_sets()


def look(seed: int) -> None:
    path = damaged_set(seed)
    inspect.check(path, 8, 3)
    data = Images(path, 8, 3).build()
    next(data.batches(4, 0))
    data.sha256()


@pytest.mark.parametrize("name", SETS)
def test_the_sets_that_are_damaged_are_sets(name):
    assert len(Images(laid(Path("set"), SETS[name]), 8, 3).build()) > 1


def test_damaged_data_are_read_or_refused():
    assert bad(range(250), look) == []


@pytest.mark.slow
def test_five_thousand_damaged_sets_are_read_or_refused():
    assert bad(range(1000, 6000), look) == []
