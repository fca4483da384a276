"""Hostile and clumsy input: one sentence and a code that is not 0, never a traceback, a lost
result, a hang, or code that was handed over and run."""

import ast
import contextlib
import hashlib
import io
import pickle
import random
import re
import shutil
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest

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
    assert bad(range(60), lambda seed: spoiled_model(seed, capsys)) == []


@pytest.mark.slow
def test_a_thousand_spoiled_models_are_read_or_refused(capsys):
    assert bad(range(100, 1100), lambda seed: spoiled_model(seed, capsys)) == []


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
