"""The house stands: no floor imports from a floor above, and randomness has one door."""

import ast
from pathlib import Path

import pytest

import cmbook

ROOT = Path(cmbook.__file__).parent
FLOORS = {
    0: {
        *["protocols", "noise", "schedules", "conventions", "ode", "distances", "weights"],
        *["guidance", "oracle"],
    },
    1: {"parameterization", "networks", "perceptual"},
    2: {"losses", "samplers", "editing"},
    3: {
        *[
            "data",
            "training",
            "checkpoints",
            "disk",
            "evaluation",
            "clouds",
            "features",
            "references",
        ],
        "processes",
    },
    4: {
        *["experiment", "costs", "runs", "doctor", "interop", "board", "reports", "pictures"],
        *["plotting", "sources"],
    },
    5: {"demo", "__main__", "__init__"},
}
THIRD_PARTY = {
    0: {"torch", "jaxtyping", "scipy"},
    1: {"torch", "einops", "lpips"},
    2: {"torch"},
    3: {
        *["torch", "numpy", "safetensors", "sklearn", "scipy", "PIL", "tqdm"],
        *["datasets", "lmdb", "accelerate"],
    },
    4: {
        *["torch", "einops", "tomli_w", "tqdm", "matplotlib", "PIL", "numpy"],
        *["safetensors", "msgpack", "diffusers"],
    },
    5: {"torch", "tyro", "tqdm", "numpy", "matplotlib"},
}
STANDARD = {
    "ast", "atexit", "base64", "collections", "concurrent", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "difflib", "errno", "fcntl", "functools", "gzip", "hashlib",
    "http", "importlib", "inspect", "io", "itertools", "json", "linecache", "math", "os",
    "pathlib", "pickle", "platform", "re", "shlex", "shutil", "signal", "socket", "statistics",
    "struct", "sys", "sysconfig", "tarfile", "textwrap", "threading", "time", "tomllib",
    "types", "typing", "urllib", "warnings", "weakref", "zipfile", "zlib",
}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def module(path: Path) -> str:
    """`losses` for `cmbook/losses/cd.py`."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def floor(name: str) -> int:
    return next(n for n, names in FLOORS.items() if name in names)


def imports(path: Path) -> set[str]:
    """Every imported module, wherever in the file: `cmbook.noise`, `torch`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "cmbook" else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_floor_imports_from_above(path):
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("cmbook.")}
    assert {n for n in ours if floor(n) > floor(module(path))} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_each_floor_uses_only_its_libraries(path):
    theirs = {name.split(".")[0] for name in imports(path)} - {"cmbook"}
    assert theirs - STANDARD <= THIRD_PARTY[floor(module(path))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_algorithms_name_no_concrete_network(path):
    if floor(module(path)) == 2:
        assert not {n for n in imports(path) if n.startswith("cmbook.networks")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_random_numbers_come_from_noise_alone(path):
    drawing = {"randn", "rand", "randint", "randperm", "multinomial", "bernoulli", "normal_"}
    drawing |= {"uniform_", "randn_like", "rand_like", "randint_like"}
    called = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert path.name == "noise.py" or not called & drawing


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_annotations_are_real_objects(path):
    """Run-time shape checks need annotations that are not strings."""
    assert "__future__" not in imports(path)


def test_matplotlib_has_one_door():
    doors = [p for p in FILES if any(n.split(".")[0] == "matplotlib" for n in imports(p))]
    assert {module(p) for p in doors} == {"plotting"}
