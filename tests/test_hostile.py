"""Hostile and clumsy input: one sentence and a code that is not 0, never a traceback, a lost
result, a hang, or code that was handed over and run."""

import ast
import contextlib
import hashlib
import io
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
import urllib.error
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import tomli_w

import cmbook
from cmbook import experiment, perceptual, runs
from cmbook.__main__ import main
from cmbook.data import Images, Toy, fetch, inspect
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
    assert bad(range(300), built) == []


@pytest.mark.slow
def test_ten_thousand_mutated_recipes_are_read_or_refused():
    assert bad(range(1000, 11_000), built) == []


@cache
def accepted(n: int, most: int, start: str = "") -> list[int]:
    """Seeds of mutations that are recipes still, of recipes whose names start so."""
    found: list[int] = []
    for seed in range(most):
        with contextlib.suppress(ValueError):
            if mutated(seed)[0].startswith(start):
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
    found = bad(range(100, 1100), lambda seed: spoiled(made, capsys, seed, [names[seed % 6]]))
    assert found == []


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
def test_three_thousand_damaged_sets_are_read_or_refused():
    assert bad(range(1000, 4000), look) == []


# models from elsewhere

MODELS = hostile.models()


def convert(files: dict[str, bytes], capsys) -> str:
    """What `cmbook convert` says of a model, if it refuses it; then nothing is left of it."""
    shutil.rmtree("out", ignore_errors=True)
    laid(Path("model"), files)
    name = next(iter(files))
    source = f"model/{name}" if len(files) == 1 else "model"
    heads = ["--head-channels", "16"] if name.startswith(("cd_", "a.")) else []
    size = ["--image-size", "16"] if name.endswith(".msgpack") else []
    kind = ["--kind", "consistency"] if name.endswith((".pt", ".safetensors", ".pkl")) else []
    refused = told(capsys, ["convert", source, "out", *heads, *size, *kind])
    assert not refused or not Path("out").exists()
    assert not list(Path().glob(".unfinished*"))
    return refused


@pytest.mark.parametrize("name", MODELS)
def test_the_models_that_are_spoiled_are_models(name, capsys):
    assert convert(MODELS[name], capsys) == ""


def spoiled_model(seed: int, capsys) -> None:
    draw = random.Random(seed)
    convert(hostile.model(MODELS[draw.choice(list(MODELS))], draw), capsys)


def test_spoiled_models_are_read_or_refused(capsys):
    assert bad(range(30), lambda seed: spoiled_model(seed, capsys)) == []


@pytest.mark.slow
def test_two_hundred_spoiled_models_are_read_or_refused(capsys):
    assert bad(range(100, 300), lambda seed: spoiled_model(seed, capsys)) == []


# code, which no loader runs


def dotted(node: ast.AST) -> str:
    """`np.load` of the expression that says so."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


RISKY = re.compile(
    r"(torch|np|numpy|torch\.jit|torch\.hub|pickle|joblib|dill|marshal|shelve|yaml|onnx)\.load\w*"
    r"|pickle\.\w*Unpickler|np\.(memmap|fromfile)|tarfile\.open|zipfile\.ZipFile|gzip\.open"
    r"|Image\.open|lmdb\.open|lpips\.LPIPS|datasets\.load_dataset|msgpack\.unpackb|load_file"
    r"|json\.loads?|tomllib\.loads?|eval|exec|__import__|importlib\.\w+|os\.(system|popen)"
    r"|subprocess\.\w+|\w+\.from_pretrained|shutil\.unpack_archive|runpy\.\w+"
)


def loaders() -> set[str]:
    """Every place of the package that may read a file which holds code, and how."""
    root, found = Path(cmbook.__file__).parent, set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = dotted(node) if isinstance(node, ast.Attribute | ast.Name) else ""
            if RISKY.fullmatch(name):
                found.add(f"{path.relative_to(root).as_posix()} {name}")
    return found


INERT = {  # formats without code: text, tensors, pixels
    *["experiment.py tomllib.loads", "runs.py tomllib.loads", "checkpoints.py json.loads"],
    *["data/prepare.py json.loads", "data/readers.py json.loads", "references.py json.loads"],
    *["reports.py json.loads", "interop/diffusers.py json.loads", "checkpoints.py load_file"],
    *["features.py load_file", "interop/foreign.py load_file", "interop/flax.py np.memmap"],
    *["interop/flax.py msgpack.unpackb", "data/readers.py np.memmap", "data/prepare.py np.memmap"],
    *["data/readers.py gzip.open", "data/readers.py zipfile.ZipFile", "data/readers.py lmdb.open"],
    *["sources.py gzip.open", "sources.py json.loads", "doctor/trials.py tomllib.loads"],
}


def into(name: str, content: bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)
    return name


def evil_arrays() -> bytes:
    return hostile.arrays(arr_0=np.array([hostile.Code(Path("RAN").resolve())], object))


def by_resume(made, evil, monkeypatch):
    shutil.copytree(made, "run")
    step = sorted(Path("run/checkpoints").iterdir())[-1]
    (step / "state.pt").write_bytes(evil)
    hostile.seal(step)
    recipe = into("faces.toml", FACES.replace("steps = 4", "steps = 2").encode())
    return ["train", recipe, "training.steps=2", "--resume", "--out", "run"]


def by_samples(made, evil, monkeypatch):
    shutil.copytree(made, "run")
    return ["evaluate", "run", "--samples", into("a.npz", evil_arrays()), "--features", "pixels"]


def by_reference(made, evil, monkeypatch):
    evil = np.array([hostile.Code(Path("RAN").resolve())], object)
    file = into("a.npz", hostile.arrays(mu=evil, sigma=evil))
    return ["evaluate", str(made), "--n", "20", "--reference", file, "--out", "e"]


def by_inception(made, evil, monkeypatch):
    digest = hashlib.sha256(evil).hexdigest()
    hashed = ["--inception", into("i.pt", evil), "--inception-sha256", digest]
    return ["evaluate", str(made), "--n", "20", "--features", "inception", *hashed, "--out", "e"]


def by_trunk(made, evil, monkeypatch):
    name = f"vgg16-{hashlib.sha256(evil).hexdigest()[:8]}.pth"
    monkeypatch.setenv("TORCH_HOME", str(Path("torch").resolve()))
    monkeypatch.setitem(perceptual.FILES, "vgg", (name, 528))
    into(f"torch/hub/checkpoints/{name}", evil)
    images = 'data={kind="Glyphs",size=32,color=true}'
    knobs = ["training.steps=1", "training.batch_size=2", 'objective.distance={kind="LPIPS"}']
    return ["train", into("faces.toml", FACES.encode()), images, *knobs, "training.save_every=1"]


def by_address(made, evil, monkeypatch):
    """A pickle whose array of objects lies over bytes of its own: addresses, once looked at."""
    kind = b"cnumpy\ndtype\n(S'O'\ntR"
    objects = b"cnumpy\nndarray\n((I1\nt" + kind + b"S'AAAAAAAA'\ntR"
    program = b"(dS'data'\n" + objects + b"sS'labels'\n(lI0\nas."
    into("set/data_batch_1", program)
    return ["data", "check", "set"]


def by_script(made, evil, monkeypatch):
    text = "import os, datasets\nos.mkdir('RAN')\n"
    into("set/set.py", text.encode())
    return ["data", "check", f"hf://{Path('set').resolve()}"]


def by_tar(made, evil, monkeypatch):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as packed:
        for name in ("../RAN", str(Path("RAN").resolve()), "x/../../RAN"):
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.DIRTYPE
            packed.addfile(entry)
            packed.addfile(tarfile.TarInfo(f"{name}/RAN"))
        link = tarfile.TarInfo("data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/dev/zero"
        packed.addfile(link)
    file = Path(into("set.tar.gz", out.getvalue()))
    remote = fetch.Remote(file.name, (file.resolve().as_uri(),), file.stat().st_size)
    monkeypatch.setitem(fetch.DATASETS, "cifar10", (remote,))
    main(["data", "get", "cifar10"])
    return ["data", "check", "data/cifar10"]


def by_postscript(made, evil, monkeypatch):
    head = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    into("set/a.png", head + b"(RAN) (w) file\nshowpage\n")
    return ["data", "check", "set", "--size", "8", "--sheet", "s.png"]


def by_storage(made, evil, monkeypatch):
    """A pickle that holds another, as the numbers of a tensor."""
    call = b"ctorch.storage\n_load_from_bytes\n"
    return ["convert", into("x.pkl", call + pickle.dumps((evil,), 2)[2:-1] + b"R."), "o"]


def file_to(*arguments: str, name: str, objects: bool = False):
    """A command that is given the file itself."""

    def way(made, evil, monkeypatch):
        file = into(name, evil_arrays() if objects else evil)
        return [file if argument == "FILE" else argument for argument in arguments]

    return way


WAYS: dict[str, Any] = {
    "checkpoints.py torch.load": by_resume,
    "interop/openai.py torch.load": file_to("convert", "FILE", "o", name="cd_x.pt"),
    "interop/inert.py pickle.Unpickler": file_to("convert", "FILE", "o", name="x.pkl"),
    "interop/inert.py torch.load": by_storage,
    "data/readers.py pickle._Unpickler": file_to("data", "check", "set", name="set/data_batch_1"),
    "data/readers.py np.load": file_to("data", "check", "FILE", name="set.npy"),
    "data/readers.py objects": file_to("data", "check", "FILE", name="set.npz", objects=True),
    "data/readers.py addresses": by_address,
    "references.py np.load": by_samples,
    "references.py statistics": by_reference,
    "features.py torch.jit.load": by_inception,
    "perceptual.py lpips.LPIPS": by_trunk,
    "perceptual.py torch.load": by_trunk,
    "data/readers.py datasets.load_dataset": by_script,
    "data/fetch.py tarfile.open": by_tar,
    "data/prepare.py Image.open": by_postscript,
}


def test_every_loader_of_the_package_is_known():
    """A new one needs a way in WAYS that hands it code, or a place among the formats without."""
    assert loaders() - INERT - {*WAYS} == set()
    assert loaders() >= INERT


@pytest.mark.parametrize("kind", ["pickle", "archive"])
@pytest.mark.parametrize("way", WAYS)
def test_no_loader_runs_the_code_of_a_file(way, kind, made, capsys, monkeypatch, request):
    if way.startswith("perceptual"):
        request.getfixturevalue("lpips")
    if "datasets" in way:
        pytest.importorskip("datasets")
    marker = Path("RAN").resolve()
    evil = hostile.code(marker) if kind == "pickle" else hostile.zipped(marker)
    refused = told(capsys, WAYS[way](made, evil, monkeypatch))
    ran = [path for path in marker.parent.rglob("RAN") if path.parent.name != "cifar10"]
    assert ran == []
    assert refused or way == "data/prepare.py Image.open"


# the command line


def words(draw: random.Random) -> list[str]:
    """A command with arguments that are odd, and may even be right."""
    numbers = {
        "sample": ["--n", "--steps", "--label", "--guidance", "--seed", "--average"],
        "edit": ["--n", "--label", "--levels", "--sigma", "--factor", "--seed"],
        "evaluate": ["--n", "--steps", "--seed", "--batch", "--rounds"],
        "estimate": ["--gpus", "--utilization"],
        "check": ["--size"],
        "convert": ["--head-channels", "--image-size"],
        "lsun": ["--limit"],
        "reference": ["--size", "--batch"],
        "train": [],
        "export": ["--average"],
    }
    paths = ["--out", "--device", "--image", "--mask", "--reference", "--samples", "--inception"]
    command = draw.choice(list(numbers))
    task = draw.choice(["inpaint", "superres", "stroke", "denoise", "interpolate", "colorize"])
    file = draw.choice(["p.png", "faces.toml", "set", "nothing", "a b/é.png", hostile.word(draw)])
    given = {
        "sample": ["sample", "run", "--n", "2"],
        "edit": ["edit", "run", "--task", task, "--n", "2", "--image", file],
        "evaluate": ["evaluate", "run", "--n", "20", "--rounds", "0", "--features", "pixels"],
        "estimate": ["estimate", "faces.toml", f"training.batch_size={hostile.word(draw)}"],
        "check": ["data", "check", draw.choice(["set", file])],
        "convert": ["convert", file, "out"],
        "lsun": ["data", "export-lsun", file, "out"],
        "reference": ["data", "reference", "set", "r.npz", "--features", "pixels"],
        "train": [
            "train",
            "faces.toml",
            "training.steps=1",
            f"{setting(draw)}={hostile.word(draw)}",
        ],
        "export": ["export", draw.choice(["run", file]), draw.choice(["out", file])],
    }[command]
    for _ in range(draw.choice([0, 1, 1, 2])):
        if numbers[command] and draw.random() < 0.7:
            given += [draw.choice(numbers[command]), str(draw.choice(hostile.NUMBERS))]
        else:
            given += [draw.choice(paths), draw.choice([file, hostile.word(draw)])]
    if draw.random() < 0.2:
        given[draw.randrange(1, len(given))] = hostile.word(draw)
    long = {"/": "/proc/none", "1000000": "7"}  # all of a disk, a million samples: allowed
    return [long.get(word, word) for word in given]


def setting(draw: random.Random) -> str:
    parts = [
        "training",
        "objective",
        "network",
        "data",
        "noise_range",
        "sampling",
        "seed",
        "teacher",
    ]
    return draw.choice([draw.choice(parts), f"{draw.choice(parts)}.{draw.choice(hostile.WORDS)}"])


@pytest.fixture
def desk(made):
    """A folder with a run, a recipe, and pictures, in which commands are typed."""
    shutil.copytree(made, "run")
    into("faces.toml", FACES.encode())
    into("p.png", hostile.picture("png", (8, 8), "L"))
    laid(Path("set"), SETS["folder"])
    return Path.cwd()


def typed(seed: int, capsys, monkeypatch) -> None:
    given = words(random.Random(seed))
    kept = {name: Path(name).read_bytes() for name in ("faces.toml", "p.png")}
    monkeypatch.setattr("urllib.request.urlopen", refused_connection)
    try:
        told(capsys, given)
        assert {name: Path(name).read_bytes() for name in kept} == kept
        assert not list(Path().rglob(".unfinished*"))
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{given}: {error!r}") from error
    finally:
        for name in ("out", "runs", "faces", "samples.png", "edited.png"):
            shutil.rmtree(name, ignore_errors=True) if Path(name).is_dir() else Path(name).unlink(
                missing_ok=True
            )


def refused_connection(*ignored: object, **named: object) -> None:
    raise urllib.error.URLError("no network in this test")


def test_odd_arguments_end_in_a_result_or_a_sentence(desk, capsys, monkeypatch):
    assert bad(range(100), lambda seed: typed(seed, capsys, monkeypatch)) == []


@pytest.mark.slow
def test_a_thousand_odd_commands_end_in_a_result_or_a_sentence(desk, capsys, monkeypatch):
    assert bad(range(1000, 2000), lambda seed: typed(seed, capsys, monkeypatch)) == []


DIGITS = "cmbook sample digits/cd --n 2"
SHELL = {  # what is typed, the exit code, what stdout and stderr end with
    "who has seen enough": ("cmbook configs | head -1", 0, b"\n", b""),
    "a full disk": ("cmbook configs > /dev/full", 1, b"", b"cmbook: No space left on device\n"),
    "nobody listens": (f"{DIGITS} --out a.npz <&- >&- 2>&-; ls a.npz", 0, b"a.npz\n", b""),
    "no home": (f"HOME=/proc/none MPLCONFIGDIR=m {DIGITS}", 0, b"samples.png\n", b""),
    "no home at all": (f"unset HOME; {DIGITS} --out a.npz", 0, b"a.npz\n", b""),
    "no cache": (
        "unset CMBOOK_CACHE XDG_CACHE_HOME; HOME=/proc/none cmbook data check set.npz --size 4",
        *(1, b"", b"CMBOOK_CACHE names another folder\n"),
    ),
    "ASCII alone": (f"PYTHONIOENCODING=ascii {DIGITS} --out é.npz", 0, b"\\xe9.npz\n", b""),
    "no text": ("cmbook sample $'\\xff\\n' --n 1", 1, b"", b"--out \\udcff\n"),
    "no width": ("COLUMNS=0 PYTHONIOENCODING=ascii cmbook train --help", 0, b"\n", b""),
    "no name in UTF-8": (
        "cmbook train toy/ct --out $'\\xff'",
        *(1, b"", b"--out names another folder\n"),
    ),
}
SELDOM = {"nobody listens", "no home", "no home at all", "no text", "no name in UTF-8"}  # 5 s each


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] if c in SELDOM else []) for c in SHELL]
)
def test_a_real_shell_sees_a_result_or_a_sentence(case, here):
    typed, code, out, err = SHELL[case]
    into("set.npz", SETS["npz"]["set.npz"])
    environment = os.environ | {"PYTHONPATH": str(Path(cmbook.__file__).parents[1])}
    command = f'set -o pipefail; cmbook() {{ {sys.executable} -m cmbook "$@"; }}; {typed}'
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, timeout=300
    )
    assert (done.returncode, b"Traceback" in done.stderr) == (code, False), done.stderr
    assert done.stdout.endswith(out), done.stdout
    assert done.stderr.endswith(err), done.stderr
    assert b"Exception" not in done.stderr


# training with what is accepted

TINY = ["training.steps=2", "training.batch_size=4", "network={kind='MLP', width=8, depth=2}"]
PICTURES = """data = { kind = "Glyphs", size = 8, characters = "ab" }
network = { kind = "UNet", channels = 4, attention = [4] }
scalings = { kind = "VPScalings" }
objective = { kind = "EDM" }
"""
SMALL = {
    "points": (TEXTS["toy/ct"], [*TINY, "training.clip=1.0", "training.also_average=[0.5]"]),
    "teacher": (TEXTS["toy/edm"], TINY),
    "limit": (TEXTS["toy/continuous-ct"].replace("teacher =", "# teacher ="), TINY),
    "pictures": (PICTURES, TINY[:2]),
}
TAKES_TIME = ("steps", "save_every", "compile")  # what is accepted of them is not wrong, but long
TAKES_MEMORY = ("network.", "training.batch_size", "data.size")


def flat(table: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{before}{key}.") if inner else {before + key: value}
    return found


def silly() -> list[tuple[str, str, Any]]:
    """Every number of a few small recipes, and what it may be set to."""
    cases = []
    for name, (text, small) in SMALL.items():
        settings = flat(tomllib.loads(experiment.dumps(experiment.loads(text, small))))
        for key, value in settings.items():
            for number in hostile.NUMBERS:
                large = (
                    abs(number) > 64 and key.startswith(TAKES_MEMORY) and abs(number) < 10**6 + 1
                )
                if key.endswith(TAKES_TIME) or large or isinstance(value, str | bool):
                    continue
                cases.append((name, key, [number] if isinstance(value, list) else number))
    return cases


def trained(case: tuple[str, str, Any], capsys) -> None:
    """A setting of a small recipe, and a run with it: the file, not Python, gives its type."""
    name, key, value = case
    text, small = SMALL[name]
    tables = tomllib.loads(experiment.dumps(experiment.loads(text, small)))
    holder, *_, last = tables, *key.split(".")
    for part in key.split(".")[:-1]:
        holder = holder[part]
    holder[last] = value
    into("odd.toml", tomli_w.dumps(tables).encode())
    refused = told(capsys, ["train", "odd.toml", "--out", "run", "--overwrite"])
    if not refused:
        assert runs.load(Path("run")).finished
    shutil.rmtree("run", ignore_errors=True)


def test_silly_settings_train_or_are_refused(capsys):
    cases = random.Random(0).sample(silly(), 50)
    assert bad(cases, lambda case: trained(case, capsys)) == []


@pytest.mark.slow
def test_seven_hundred_silly_settings_train_or_are_refused(capsys):
    assert bad(random.Random(1).sample(silly(), 700), lambda case: trained(case, capsys)) == []


def test_steps_without_end_stop_at_a_key_and_nothing_is_lost(capsys):
    into("long.toml", experiment.dumps(experiment.loads(*SMALL["teacher"])).encode())

    def press() -> None:
        while not Path("run/log.csv").is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    said = told(capsys, ["train", "long.toml", f"training.steps={2**63 - 1}", "--out", "run"])
    assert "stopped after step" in said
    assert runs.load(Path("run")).step > 0


def estimated(seed: int, capsys) -> None:
    into("recipe.toml", mutated(seed)[1])
    told(capsys, ["estimate", "recipe.toml"])


def test_mutated_recipes_are_estimated_or_refused(capsys):
    assert bad(accepted(8, 1000, "toy"), lambda seed: estimated(seed, capsys)) == []


@pytest.mark.slow
def test_ten_more_mutated_recipes_are_estimated_or_refused(capsys):
    assert bad(accepted(10, 2000), lambda seed: estimated(seed, capsys)) == []


# places and files that are no plain ones


def bomb(name: str) -> bytes:
    """An archive with a member that unpacks to 3 GB of nothing."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        if not name.endswith(".npy"):
            packed.writestr("a.png", hostile.picture())
        with packed.open(name, "w", force_zip64=True) as member:
            if name.endswith(".npy"):
                np.lib.format.write_array_header_1_0(
                    member, {"descr": "|u1", "fortran_order": False, "shape": (3 << 30,)}
                )
            for _ in range(3 << 6):
                member.write(bytes(1 << 24))
    return out.getvalue()


def a_pipe(folder: Path) -> str:
    os.mkfifo(folder / "x.png")
    return "x.png is no plain file"


def a_batch_that_is_a_pipe(folder: Path) -> str:
    os.mkfifo(folder / "data_batch_1")
    return "is no plain file"


def arrays_that_are_a_pipe(folder: Path) -> str:
    os.mkfifo(folder / "x.npz")
    return "holds no pictures"


def a_ring_of_links(folder: Path) -> str:
    (folder / "a.png").write_bytes(hostile.picture())
    for name in ("one", "two", "three"):
        (folder / name).symlink_to(folder)
    return "the class 'one' has no pictures"


def a_thread(folder: Path) -> str:
    (folder / "long.png").write_bytes(hostile.picture(size=(200_000, 1)))
    return "is 200000x1 pixels, which is too narrow"


def a_huge_table(folder: Path) -> str:
    (folder / "set.zip").write_bytes(bomb("dataset.json"))
    return "dataset.json cannot be read as labels"


def a_huge_array(folder: Path) -> str:
    (folder / "set.npz").write_bytes(bomb("arr_0.npy"))
    return "would unpack to 3.2 GB"


PLACES = [
    *[a_pipe, a_batch_that_is_a_pipe, arrays_that_are_a_pipe, a_ring_of_links, a_thread],
    *[pytest.param(make, marks=pytest.mark.slow) for make in (a_huge_table, a_huge_array)],
]


@pytest.mark.parametrize("make", PLACES)
def test_a_set_that_never_ends_or_unpacks_without_end_is_refused(make, here, capsys):
    Path("set").mkdir()
    says = make(here / "set")
    archive = next(Path("set").glob("set.*"), Path("set"))
    with hostile.bounded(60):
        said = told(capsys, ["data", "reference", str(archive), "r.npz", "--size", "64",
                             "--features", "pixels"])  # fmt: skip
    assert says in said
    assert not Path("r.npz").exists()


@pytest.mark.parametrize("option", ["--image", "--samples", "--reference", "--inception", ""])
@pytest.mark.parametrize("odd", ["pipe", "/dev/zero", "folder"])
def test_what_is_no_plain_file_is_not_waited_for(option, odd, desk, capsys):
    os.mkfifo("pipe")
    Path("folder").mkdir()
    commands = {
        "--image": ["edit", "run", "--task", "denoise"],
        "--samples": ["evaluate", "run", "--features", "pixels"],
        "--reference": ["evaluate", "run", "--features", "pixels", "--n", "20"],
        "--inception": ["evaluate", "run", "--features", "inception", "--n", "20"],
        "": ["compare", odd],
    }
    with hostile.bounded(10):
        assert told(capsys, [*commands[option], *([option] if option else []), odd])
        assert told(capsys, ["convert", odd, "out"])
        assert told(capsys, ["train", "digits/edm", f"teacher={odd}"])


WRITERS = {
    "picture": (["sample", "run", "--n", "2", "--out", "kept/a.png"], "a.png"),
    "numbers": (["sample", "run", "--n", "2", "--out", "kept/a.npz"], "a.npz"),
    "edit": (
        ["edit", "run", "--task", "denoise", "--image", "p.png", "--out", "kept/e.png"], "e.png",
    ),
    "report": (
        ["evaluate", "run", "--n", "20", "--features", "pixels", "--rounds", "0", "--out", "kept"],
        "report.json",
    ),
    "statistics": (
        ["data", "reference", "set", "kept/r.npz", "--size", "8", "--features", "pixels"], "r.npz",
    ),
    "notebooks": (["notebooks", "kept", "--overwrite"], "01_noise_and_the_score.ipynb"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITERS)
def test_what_cannot_be_written_leaves_the_older_file(case, desk, capsys, monkeypatch):
    command, name = WRITERS[case]
    into(f"kept/{name}", b"older")
    fsync = os.fsync

    def full(handle: int) -> None:
        if "kept" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        assert "No space left on device" in told(capsys, command)
    assert [(path.name, path.read_bytes()) for path in Path("kept").iterdir()] == [(name, b"older")]
    assert told(capsys, command) == ""
    assert Path("kept", name).read_bytes() != b"older"


NOWHERE = ["faces.toml/a.npz", "/proc/a.npz", "/dev/null/a.npz", f"{'x' * 300}.npz"]


@pytest.mark.parametrize("place", NOWHERE)
def test_a_place_that_cannot_be_written_is_said_in_a_sentence(place, desk, capsys):
    assert told(capsys, ["sample", "run", "--n", "2", "--out", place])


@pytest.mark.parametrize("name", SMALL)
def test_the_recipes_that_are_made_silly_train(name, capsys):
    into("plain.toml", experiment.dumps(experiment.loads(*SMALL[name])).encode())
    assert told(capsys, ["train", "plain.toml", "--out", "run"]) == ""
    assert runs.load(Path("run")).finished
