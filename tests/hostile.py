"""Hostile input: mutations of good files, each a function of its seed; guards against excess."""

import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import string
import struct
import tomllib
import traceback
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import msgpack
import numpy as np
import safetensors.torch
import tomli_w
import torch
from conftest import GOLDEN
from PIL import Image

SECONDS = 20  # that one file may take; what hangs, takes longer
ROOM = 2 << 30  # bytes of address space that one file may take

NUMBERS: list[Any] = [
    *[0, 1, -1, 2, 3, 7, 255, 1000, 10**6, 2**31, 2**32, 2**53, 10**9, 10**18, 2**63 - 1, 2**63],
    *[-(2**63), 10**40, 0.0, -0.0, 0.5, 0.99, -1.5, 1e-320, 1e-30, 1e-6, 1e6, 1e30, 1e308, -1e308],
    *[float("nan"), float("inf"), -float("inf")],
]
ODD: list[Any] = [
    *[*NUMBERS, True, False, "", " ", "a", "\n", "\0", "\x1b[31m", "é数字🙂"],
    *["..", "/", "/dev/zero", "~nobody/x", "x" * 5000, "{0}", "%s", [], [[]], [0], [1, "a"], {}],
    *[{"kind": "MLP"}, {"kind": ""}, {"": 1}, {"a": {"b": {"c": 1}}}, ["x"] * 50, [1e308, 1.0]],
]
WORDS = [  # what stands in recipes, so that some mutations mean something
    *["kind", "data", "network", "objective", "scalings", "training", "sampling", "noise_range"],
    *["teacher", "seed", "base", "guidance", "steps", "levels", "MLP", "UNet", "Toy", "Digits"],
    *["width", "depth", "channels", "blocks", "size", "classes", "labelled", "sigmas", "LPIPS"],
]
TEXTS = [  # pieces of TOML and of what is none
    *["\0", "\ufeff", "\r\n", "\r", "\x7f", "é", "数", "🙂", "\u202e", '"', "'", '"""', "'''", "="],
    *["[", "[[", "]]", "{", "}", "#", ".", ",", "[a]", "[[a]]", "a.b.c = 1", "= 1", "inf", "0x"],
    *["1979-05-27T07:32:00Z", "\\u0000", "'\\'", "_", "1__0", "+", "nan", "key = 1\nkey = 2"],
]


def recipe(text: str, draw: random.Random) -> bytes:
    """A recipe that somebody has edited badly, or a disk has."""
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        change = draw.choice([_settings, _settings, _settings, _settings, _lines, _pieces])
        text = change(text, draw)
    text = _monster(text, draw) if draw.random() < 0.1 else text
    raw = text.encode("utf-8", "surrogatepass")
    return flipped(raw, draw) if draw.random() < 0.15 else raw


def flipped(raw: bytes, draw: random.Random) -> bytes:
    """With a few bytes changed, cut out or put in."""
    found = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        at = draw.randrange(len(found) + 1)
        how = draw.randrange(4)
        if how == 0 and found:
            found[at % len(found)] ^= 1 << draw.randrange(8)
        elif how == 1 and found:
            found[at % len(found)] = draw.choice([0, 0xFF, 0x80, draw.randrange(256)])
        elif how == 2:
            del found[at : at + draw.choice([1, 4, 100])]
        else:
            found[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice([1, 4, 8])))
    return bytes(found)


def cut(raw: bytes, draw: random.Random) -> bytes:
    """Cut short, often near an end."""
    n = len(raw)
    return raw[: draw.choice([0, 1, 4, 8, 16, n // 2, max(0, n - 1), draw.randrange(n + 1)])]


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """Flipped or cut."""
    return draw.choice([flipped, flipped, cut])(raw, draw)


def _settings(text: str, draw: random.Random) -> str:
    """Another value, name or place of one setting."""
    try:
        tables = tomllib.loads(text)
    except ValueError:
        return _pieces(text, draw)
    leaves = list(_leaves(tables))
    if not leaves:
        return text
    holder, key = draw.choice(leaves)
    how, number = draw.randrange(8), isinstance(holder[key], int | float)
    if how < 5:
        holder[key] = draw.choice(NUMBERS if number and draw.random() < 0.7 else ODD)
    elif how == 5 and isinstance(holder, dict):
        holder[draw.choice([*WORDS, str(key) + "x", "", "a\nb", "k" * 10_000])] = holder.pop(key)
    elif how == 6 and isinstance(holder, dict):
        del holder[key]
    elif isinstance(holder, dict):
        holder[draw.choice(WORDS)] = draw.choice([*ODD, holder[key]])
    else:
        holder.append(draw.choice(ODD))
    return tomli_w.dumps(tables)


def _leaves(table: Any) -> Iterator[tuple[Any, Any]]:
    """Every place that holds something: its table or list, and its key or number."""
    for key, value in table.items() if isinstance(table, dict) else enumerate(table):
        yield table, key
        if isinstance(value, dict | list):
            yield from _leaves(value)


def _lines(text: str, draw: random.Random) -> str:
    """A line lost, doubled, moved or cut."""
    lines = text.split("\n")
    i = draw.randrange(len(lines))
    how = draw.randrange(5)
    if how == 0:
        del lines[i]
    elif how == 1:
        lines.insert(draw.randrange(len(lines) + 1), lines[i])
    elif how == 2:
        lines[i] = lines[i][: draw.randrange(len(lines[i]) + 1)]
    elif how == 3:
        return "\r\n".join(lines)
    else:
        draw.shuffle(lines)
    return "\n".join(lines)


def _pieces(text: str, draw: random.Random) -> str:
    """Something put in somewhere."""
    at = draw.choice([0, len(text), draw.randrange(len(text) + 1)])
    return text[:at] + draw.choice(TEXTS) + text[at + draw.choice([0, 0, 1, 10]) :]


def _monster(text: str, draw: random.Random) -> str:
    """Much of something."""
    n = draw.choice([50, 500, 3000])
    return text + draw.choice([
        "\nx = " + "[" * n + "]" * n,
        "\nx = " + "{a=" * n + "1" + "}" * n,
        "\n" + ".".join(["a"] * n) + " = 1",
        "\n" + "k" * 100 * n + " = 1",
        "\nx = '" + "v" * 100 * n + "'",
        "\nseed = " + "9" * 2 * n,
        "\n[sampling]\nsigmas = [" + "80.0, " * n + "]",
        "\n[training]\nalso_average = [" + "0.5, " * n + "]",
        "\n[" + ".".join(["objective"] * n) + "]",
        "\n" + "\n".join(f"a{i} = {i}" for i in range(n)),
        "\nbase = '" + draw.choice(["toy/ct", "digits/edm", "../x", "x.toml", "/dev/zero"]) + "'",
    ])  # fmt: skip


def word(draw: random.Random) -> str:
    """Something that a user may type: odd values, and noise."""
    if draw.random() < 0.7:
        return str(draw.choice(ODD)).replace("\0", "")  # no system hands a NUL to a program
    alphabet = string.printable + "éß数字🙂\u202e\ud8ff"[:-1]
    return "".join(draw.choice(alphabet) for _ in range(draw.choice([1, 3, 20])))


class TooLong(BaseException):
    """It hangs. Nothing that is tested catches this."""


@contextmanager
def bounded(seconds: float = SECONDS, room: int = ROOM) -> Iterator[None]:
    """Let nothing inside take longer, or more memory.

    Seconds are the processor's, so that a busy machine does not count; who waits for ever, as at
    a pipe, takes none of them, and is stopped after six times as many.
    """

    def stop(number: int, frame: object) -> None:
        raise TooLong(f"more than {seconds} seconds")

    before = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + room, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def failures(cases: Any, check: Callable[[Any], None]) -> list[str]:
    """What is wrong, of many cases: their names, and what they raised that is no refusal."""
    found = []
    for case in cases:
        try:
            with bounded():
                check(case)
        except ValueError:
            pass
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            at = next((f for f in reversed(frames) if "/cmbook/" in f.filename), frames[-1])
            where = f"{Path(at.filename).name}:{at.lineno}"
            found.append(f"{case}: {type(error).__name__} at {where}: {str(error)[:300]}")
    return found


# checkpoints


def checkpoint(path: Path, draw: random.Random) -> str:
    """Spoil a checkpoint, by accident or on purpose; says how."""
    files = sorted(file.name for file in path.iterdir() if file.name != "manifest.json")
    name = draw.choice(files)
    how = draw.choice(list(SPOILS))
    SPOILS[how](path, name, draw)
    sealed = how != "manifest" and draw.random() < 0.8
    if sealed:
        seal(path)
    return f"{how} of {name}{', sealed again' if sealed else ''}"


def seal(path: Path) -> None:
    """The manifest of whatever files are there: an attacker can count, too."""
    if (path / "manifest.json").is_dir():
        return
    files = [file for file in path.iterdir() if file.is_file() and file.stat().st_size < 1 << 24]
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}
    sums.pop("manifest.json", None)
    (path / "manifest.json").unlink(missing_ok=True)
    (path / "manifest.json").write_text(json.dumps(sums), encoding="utf-8")


def _damage(path: Path, name: str, draw: random.Random) -> None:
    file = path / name
    file.write_bytes(damaged(file.read_bytes(), draw))


def _swap(path: Path, name: str, draw: random.Random) -> None:
    other = draw.choice(sorted(file.name for file in path.iterdir()))
    (path / name).write_bytes((path / other).read_bytes())


def _manifest(path: Path, name: str, draw: random.Random) -> None:
    file = path / "manifest.json"
    sums = json.loads(file.read_text(encoding="utf-8"))
    odd = draw.choice([*ODD, "0" * 64, {"a": 1}, "../../x", "/etc/passwd", f"../{name}"])
    how = draw.randrange(5)
    if how == 0:
        sums[str(odd)] = sums.pop(name, "")
    elif how == 1:
        sums[name] = odd
    elif how == 2:
        sums = odd
    text = json.dumps(sums)
    text = "[" * 100_000 if how == 3 else text
    file.write_bytes(damaged(text.encode(), draw) if how == 4 else text.encode())


def _recipe(path: Path, name: str, draw: random.Random) -> None:
    file = path / "experiment.toml"
    text = file.read_text(encoding="utf-8")
    record = tomllib.loads(text)["record"]
    if draw.random() < 0.5:  # the record alone
        rest = text.partition("[record]")[0]
        lies = [
            [],
            [0],
            [-1],
            [2**40],
            [2] * 300,
            [1, 10**6, 10**6],
            [8, 8],
            [True],
            ["8"],
            [2**63],
        ]
        key = draw.choice([*record, "step", "shape", "classes"])
        record[key] = draw.choice([*lies, *ODD] if key == "shape" else ODD)
        file.write_text(f"{rest}\n{tomli_w.dumps({'record': record})}", encoding="utf-8")
    else:
        file.write_bytes(recipe(text, draw))


def _tensors(path: Path, name: str, draw: random.Random) -> None:
    """Safetensors of other names, shapes, types and numbers, or with a lying header."""
    file = path / draw.choice(["average.safetensors", "student.safetensors"])
    if not file.is_file():
        return
    weights = safetensors.torch.load_file(file)
    first = draw.choice(sorted(weights))
    how = draw.randrange(9)
    if how == 0:
        weights[first] = weights[first][..., :1].contiguous()
    elif how == 1:
        types = [
            torch.float64,
            torch.int8,
            torch.bool,
            torch.bfloat16,
            torch.complex64,
            torch.uint64,
        ]
        weights[first] = torch.zeros(weights[first].shape).to(draw.choice(types))
    elif how == 2:
        weights[first] = torch.full_like(weights[first], draw.choice([1e38, math.nan, math.inf]))
    elif how == 3:
        weights[draw.choice(["", "a\nb", "é" * 300, f"{first}x"])] = weights.pop(first)
    elif how == 4:
        weights = draw.choice([{}, {"x": torch.zeros(0)}, weights | {"more": torch.zeros(3)}])
    safetensors.torch.save_file(weights, file)
    if how > 4:
        raw = file.read_bytes()
        n = int.from_bytes(raw[:8], "little")
        head = json.loads(raw[8 : 8 + n])
        entry = head[draw.choice(sorted(set(head) - {"__metadata__"}))]
        if how == 5:
            entry["data_offsets"] = draw.choice([[0, 2**62], [4, 0], [-1, 3], [], ["a", 1], [0, 4]])
        elif how == 6:
            entry["shape"] = draw.choice([[2**62], [-1], [], [1e308], [2**31, 2**31], ["a"], None])
        elif how == 7:
            entry["dtype"] = draw.choice(["F99", "", None, 3, "F64", "I8"])
        text = json.dumps(head).encode() if how < 8 else b"{" * 5000
        size = draw.choice([len(text), len(text), 0, 2**63, 10**9]) if how == 8 else len(text)
        file.write_bytes(size.to_bytes(8, "little") + text + raw[8 + n :])


def _state(path: Path, name: str, draw: random.Random) -> None:
    """What an optimizer's file may hold instead."""
    file = path / "state.pt"
    if not file.is_file():
        return
    saved = torch.load(file, weights_only=True)
    moments, groups = saved["optimizer"]["state"], saved["optimizer"]["param_groups"]
    first = next(iter(moments), None)
    how = draw.randrange(9)
    if how == 0:
        saved = draw.choice([None, 3, [], {}, "x", torch.zeros(3), {"step": 1}, {"optimizer": {}}])
    elif how == 1:
        saved["step"] = draw.choice([*ODD, torch.zeros(2), None])
    elif how == 2 and first is not None:
        moments[first]["exp_avg"] = draw.choice([torch.zeros(3), 3, None, "x", torch.zeros(2**20)])
    elif how == 3 and first is not None:
        moments[draw.choice([99, -1, "a"])] = moments.pop(first)
    elif how == 4 and first is not None:
        moments[first]["step"] = draw.choice([*ODD, torch.tensor(math.nan), torch.zeros(3)])
    elif how == 5:
        groups[0][draw.choice(["lr", "betas", "params", "eps", "foreach"])] = draw.choice(ODD)
    elif how == 6:
        saved["optimizer"]["param_groups"] = draw.choice([[], groups * 2, None, 3, [{}]])
    elif how == 7:
        file.write_bytes(pickle.dumps(saved["step"], draw.randrange(6)))
        return
    else:
        file.write_bytes(draw.choice([code(path / "RAN"), zipped(path / "RAN")]))
        return
    torch.save(saved, file, _use_new_zipfile_serialization=draw.random() < 0.8)


def _place(path: Path, name: str, draw: random.Random) -> None:
    """Something that is no plain file, in the place of one."""
    file = path / draw.choice([name, name, "manifest.json"])
    file.unlink()
    how = draw.randrange(7)
    if how == 0:
        file.mkdir()
    elif how == 1:
        os.mkfifo(file)
    elif how == 2:
        file.write_bytes(b"")
    elif how < 6:
        file.symlink_to(["/dev/zero", file, "/etc/hostname"][how - 3])


SPOILS = {
    "damage": _damage,
    "swap": _swap,
    "manifest": _manifest,
    "recipe": _recipe,
    "tensors": _tensors,
    "state": _state,
    "place": _place,
}


# code, which nothing may run


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def code(marker: Path, protocol: int = 2) -> bytes:
    """A pickle that makes a folder when it is read by Python's own reader."""
    return pickle.dumps(Code(marker), protocol)


def zipped(marker: Path) -> bytes:
    """The same in an archive of PyTorch."""
    out = io.BytesIO()
    torch.save({"weight": Code(marker)}, out)
    return out.getvalue()


# data files


def idx(array: np.ndarray) -> bytes:
    """MNIST's format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def picture(kind: str = "png", size: tuple[int, int] = (9, 7), mode: str = "RGB") -> bytes:
    """A picture's file."""
    out = io.BytesIO()
    pixels = bytes(i * 37 % 256 for i in range(size[0] * size[1] * len(mode)))
    Image.frombytes(mode, size, pixels).save(out, kind)
    return out.getvalue()


def archive(members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A .zip, whose names are what they are said to be."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as packed:
        for name, content in members.items():
            packed.writestr(zipfile.ZipInfo(name), content, how)
    return out.getvalue()


def arrays(packed: bool = True, **named: Any) -> bytes:
    """An .npz; objects are pickled into it, as NumPy does unless told otherwise."""
    out = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(out, **named)
    return out.getvalue()


PIXELS = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
ROW = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)


def data_sets() -> dict[str, dict[str, bytes]]:
    """Small sets in every format that is read: names of files, and what they hold."""
    gray, label = PIXELS[..., 0], np.arange(4, dtype=np.uint8)
    batch = {b"data": ROW, b"labels": [0, 1], b"filenames": [b"a", b"b"]}
    names = {b"label_names": [b"cat", b"dog"]}
    pictures = {f"{c}/{i}.{k}": picture(k) for i, k in enumerate(KINDS) for c in ("a", "b")}
    labels = json.dumps({"labels": [[name, 1] for name in pictures]}).encode()
    return {
        "idx": {"train-images-idx3-ubyte": idx(gray), "train-labels-idx1-ubyte": idx(label)},
        "idx.gz": {
            "train-images-idx3-ubyte.gz": gzip.compress(idx(gray)),
            "train-labels-idx1-ubyte.gz": gzip.compress(idx(label)),
        },
        "cifar": {
            "data_batch_1": pickle.dumps(batch, 2),
            "batches.meta": pickle.dumps(names, 2),
        },
        "cifar of today": {"data_batch_1": pickle.dumps(batch, 4)},
        "npz": {"set.npz": arrays(arr_0=PIXELS, arr_1=np.arange(4))},
        "npz, stored": {"set.npz": arrays(False, arr_0=PIXELS, arr_1=np.arange(4))},
        "npz, flat": {"train_1.npz": arrays(data=ROW, labels=np.array([1, 2]))},
        "folder": pictures,
        "zip": {"set.zip": archive(pictures | {"dataset.json": labels})},
        "zip, stored": {"set.zip": archive(pictures, zipfile.ZIP_STORED)},
    }


KINDS = ("png", "jpeg", "bmp", "gif", "webp", "tiff", "ppm")


# models from elsewhere


def models() -> dict[str, dict[str, bytes]]:
    """Small models in the formats that `cmbook convert` reads."""
    unet = weights("unet_A")
    edm = weights("edm_ddpmpp")
    theirs = GOLDEN / "diffusers_pipeline"
    pipeline = [path for path in theirs.rglob("*") if path.is_file()]
    folder = {path.relative_to(theirs).as_posix(): path.read_bytes() for path in pipeline}
    bare = {name: content for name, content in folder.items() if name.endswith(".json")}
    tensors = safetensors.torch.load(folder["unet/diffusion_pytorch_model.safetensors"])
    return {
        "openai": {"cd_imagenet64_l2.pt": saved(unet)},
        "openai, old": {"cd_imagenet64_l2.pt": saved(unet, False)},
        "safetensors": {"a.safetensors": safetensors.torch.save(unet)},
        "edm": {"edm.pkl": nvidia(edm)},
        "edm, bare": {"edm.pt": saved(edm)},
        "jcm": {"cd-l2.msgpack": flax(weights("jax_ncsnpp_teacher"))},
        "diffusers": folder,
        "diffusers, bin": bare | {"unet/diffusion_pytorch_model.bin": saved(tensors)},
    }


def weights(name: str) -> dict[str, torch.Tensor]:
    """Stored ones, in their official layout."""
    stored = safetensors.torch.load_file(GOLDEN / f"{name}_weights.safetensors")
    return {key: weight.float() for key, weight in stored.items()}


def saved(value: Any, new: bool = True) -> bytes:
    """As PyTorch writes it."""
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=new)
    return out.getvalue()


def flax(weights: dict[str, torch.Tensor]) -> bytes:
    """A training of openai/consistency_models_cifar10, as flax writes it."""
    tree: dict[str, Any] = {}
    for name, weight in weights.items():
        *folders, last = name.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        parts = (tuple(weight.shape), str(weight.numpy().dtype), weight.numpy().tobytes())
        inner[last] = msgpack.ExtType(1, msgpack.packb(parts))
    return msgpack.packb({"step": 1, "params_ema": tree, "params": tree})


class _Blind(pickle._Pickler):
    """Writes names of modules that are not here."""

    dispatch: ClassVar[dict[Any, Any]] = pickle._Pickler.dispatch.copy()

    def save_global(self, obj: Any, name: str | None = None) -> None:
        self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch[types.FunctionType] = save_global
    dispatch[type] = save_global


def _reconstruct_persistent_obj(meta: Any) -> None:
    raise AssertionError("the official constructor was called")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class _Persistent:
    """A module of NVIDIA's, as their pickles hold it."""

    def __init__(self, kind: str, **state: Any) -> None:
        self.kind, self.state = kind, state

    def __reduce__(self) -> Any:
        meta = {"class_name": self.kind, "module_src": "1 / 0", "state": self.state}
        return _reconstruct_persistent_obj, (meta,)


def nvidia(weights: dict[str, torch.Tensor]) -> bytes:
    """A network of NVlabs/edm in a pickle of its format."""

    def node(inner: dict[str, Any], kind: str = "Block") -> _Persistent:
        own = {n: w for n, w in inner.items() if isinstance(w, torch.Tensor)}
        below = {n: node(w) for n, w in inner.items() if not isinstance(w, torch.Tensor)}
        return _Persistent(kind, _parameters=own, _buffers={}, _modules=below)

    tree: dict[str, Any] = {}
    for name, weight in weights.items():
        *folders, last = name.split(".")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = weight
    out = io.BytesIO()
    _Blind(out, 3).dump({"ema": node(tree, "EDMPrecond")})
    return out.getvalue()


def misnamed(weights: dict[str, torch.Tensor], draw: random.Random) -> dict[str, Any]:
    """Tensors with other names, shapes, types or numbers."""
    changed: dict[Any, Any] = dict(weights)
    for _ in range(draw.choice([1, 1, 3])):
        name = draw.choice(sorted(map(str, changed)))
        weight = changed.get(name)
        how = draw.randrange(7)
        if how == 0:
            changed.pop(name, None)
        elif how == 1:
            other = draw.choice(["9" * 12, "-1", "x", "", "7", "\n", "99"])
            changed[re.sub(r"\d+", other, name, count=1)] = changed.pop(name, weight)
        elif how == 2 and isinstance(weight, torch.Tensor):
            shape = draw.choice([(0,), (), (1,) * 9, (2, *weight.shape), tuple(weight.shape[:-1])])
            changed[name] = torch.zeros(shape)
        elif how == 3 and isinstance(weight, torch.Tensor):
            types = [torch.int64, torch.bool, torch.bfloat16, torch.complex64, torch.float64]
            changed[name] = weight.to(draw.choice(types))
        elif how == 4 and isinstance(weight, torch.Tensor):
            changed[name] = torch.full_like(weight, draw.choice([math.nan, math.inf, 1e38]))
        elif how == 5 and isinstance(weight, torch.Tensor):
            changed[name] = weight[..., : max(1, weight.shape[-1] // 2)] if weight.ndim else weight
        else:
            changed[name] = draw.choice([weight, None, "x", 3, [], {}, torch.zeros(1, 2**16)])
    return changed


def model(files: dict[str, bytes], draw: random.Random) -> dict[str, bytes]:
    """A model's files, one of them spoiled."""
    files = files.copy()
    name = draw.choice(list(files))
    content = files[name]
    if name.endswith(".json"):
        table = json.loads(content)
        table[draw.choice(sorted(table))] = draw.choice([v for v in ODD if v != 10**40])
        text = json.dumps(table).encode()
        files[name] = draw.choice([text, text, text, damaged(content, draw), b"[" * 10**5])
    elif draw.random() < 0.5:
        files[name] = damaged(content, draw)
    else:
        source = "edm_ddpmpp" if "edm" in name else "jax_ncsnpp_teacher"
        source = source if name.endswith(("edm.pt", ".pkl", ".msgpack")) else "unet_A"
        changed = misnamed(weights(source), draw)
        plain = {str(n): w for n, w in changed.items() if isinstance(w, torch.Tensor)}
        real = {n: w.float() for n, w in plain.items() if not w.is_complex()}
        if name.endswith(".safetensors"):
            files[name] = safetensors.torch.save({n: w.contiguous() for n, w in plain.items()})
        elif name.endswith(".msgpack"):
            files[name] = flax(real)
        elif name.endswith(".pkl"):
            with contextlib.suppress(TypeError, AttributeError):  # a name inside a name
                files[name] = nvidia(plain)
        else:
            files[name] = saved(changed, draw.random() < 0.8)
    return files
