"""Readers of the field's image files, without running anything that is inside them.

`find(path)` looks what lies at a path. What is stored as numbers comes back as `Stored` arrays,
in memory or mapped; files of pictures come back as `Pictures`, still to be decoded.
"""

import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Label = NDArray[np.int64]
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
HUB = "hf://"
LARGEST_FILE = 2**28  # bytes of one picture's file, unpacked
MOST_CLASSES = 100_000
IN_MEMORY = 2**31  # arrays up to this many bytes are read at once; larger ones must be mapped


@dataclass(frozen=True)
class Rows:
    """8-bit images `(n, channels, height, width)`: arrays one after the other, and their labels.

    Attributes:
        parts: Arrays of one shape; mapped ones stay on disk.
        label: Classes from 0, or `None`.
        classes: Their names, if known.
        preparation: What was done to them since they were stored.
        fingerprint: Of the images alone, where it has been taken before.
    """

    parts: tuple[Bytes, ...]
    label: Label | None = None
    classes: tuple[str, ...] = ()
    preparation: str = "as stored"
    fingerprint: str | None = None

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, i: NDArray[np.int64]) -> Bytes:
        """A copy of images number `i`."""
        chosen = np.empty((len(i), *self.shape), np.uint8)
        start = 0
        for part in self.parts:
            here = (start <= i) & (i < start + len(part))
            chosen[here] = part[i[here] - start]
            start += len(part)
        return chosen

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return tuple(self.parts[0].shape[1:])

    def first(self, n: int) -> "Rows":
        """The first `n` images."""
        starts = np.cumsum([0, *(len(part) for part in self.parts)])[:-1]
        pairs = zip(self.parts, starts, strict=True)
        parts = [part[: n - start] for part, start in pairs if start < n]
        label = None if self.label is None else self.label[:n]
        return replace(self, parts=tuple(parts), label=label, fingerprint=None)

    def split(self, share: float) -> tuple["Rows", "Rows"]:
        """Two sets: of every 1 / share images, the last is put aside."""
        every = np.arange(len(self))
        aside = np.floor((every + 1) * share) > np.floor(every * share)
        if not aside.any() or aside.all():
            raise ValueError(f"held_out = {share} of {len(self)} images leaves one set empty")
        return self._taken(every[~aside]), self._taken(every[aside])

    def unlabelled(self) -> "Rows":
        """The images alone."""
        return replace(self, label=None, classes=())

    def sha256(self) -> str:
        """A fingerprint of images and labels."""
        if self.fingerprint is not None and self.label is None:
            return self.fingerprint
        digest = hashlib.sha256((self.fingerprint or repr(self.shape)).encode())
        for part in self.parts if self.fingerprint is None else ():
            for start in range(0, len(part), 4096):
                digest.update(part[start : start + 4096].tobytes())
        if self.label is not None:
            digest.update(self.label.tobytes())
        return digest.hexdigest()

    def _taken(self, i: NDArray[np.int64]) -> "Rows":
        label = None if self.label is None else self.label[i]
        return replace(self, parts=(self[i],), label=label, fingerprint=None)


@dataclass(frozen=True)
class Stored:
    """Images that are stored as numbers.

    Attributes:
        rows: All of them.
        name: The file or folder, for messages.
    """

    rows: Rows
    name: str

    @property
    def label(self) -> Label | None:
        """Their classes."""
        return self.rows.label


@dataclass(frozen=True)
class Pictures:
    """Pictures in files of their own, in a folder or an archive, still to be decoded.

    Attributes:
        names: Of the files, in order.
        open: Gives the bytes of file number i.
        stamp: Changes when a file does.
        name: The folder or archive, for messages.
        label: Classes from 0, or `None`.
        classes: Their names.
    """

    names: tuple[str, ...]
    open: Callable[[int], bytes]
    stamp: str
    name: str
    label: Label | None = None
    classes: tuple[str, ...] = ()


Found = Stored | Pictures


def find(path: str | Path) -> tuple[Found, Found | None]:
    """What lies at a path: images to learn, and a test set if the format has one.

    Raises:
        ValueError: If there is nothing, or nothing that is known.

    Source: ours.
    """
    if str(path).startswith(HUB):
        return hub(str(path)), None
    try:
        there = Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error
    if not str(path).strip():
        raise ValueError("data.path is empty; it names a file or folder")
    if there.suffix in (".npz", ".npy") and there.is_file():
        return _npz([there], str(path)), None
    if there.is_file() and zipfile.is_zipfile(there):
        return archive(there), None
    if not there.is_dir():
        what = "cannot be read as images" if there.exists() else "does not exist"
        raise ValueError(
            f"{path} {what}; data.path names a folder of pictures, a .zip, an .npz, or the folder "
            "of MNIST's, Fashion-MNIST's or CIFAR-10's official files (cmbook data get NAME)"
        )
    names = {file.name.removesuffix(".gz") for file in there.iterdir()}
    if any(name.endswith("-idx3-ubyte") for name in names):
        test = idx_pair(there, "t10k") if "t10k-images-idx3-ubyte" in names else None
        return idx_pair(there, "train"), test
    if any(re.fullmatch(r"data_batch_\d+", name) for name in names):
        test = cifar(there, ["test_batch"]) if "test_batch" in names else None
        return cifar(there, sorted(n for n in names if re.fullmatch(r"data_batch_\d+", n))), test
    if "data.mdb" in names:
        raise ValueError(
            f"{path} is a database of LSUN; unpack it first: cmbook data export-lsun {path} FOLDER"
        )
    if "cifar-10-batches-py" in names:
        return find(there / "cifar-10-batches-py")
    arrays = sorted(file for file in there.glob("*.npz") if file.is_file())
    if arrays:
        aside = [file for file in arrays if file.name.startswith("val_")]
        learned = [file for file in arrays if file not in aside]
        if not learned:
            raise ValueError(f"{path} holds validation files alone: {aside[0].name}")
        return _npz(learned, str(path)), _npz(aside, str(path)) if aside else None
    return folder(there), None


def read_idx(file: Path) -> NDArray[np.uint8]:
    """An idx file of bytes, packed by gzip or not: images (n, height, width) or labels (n,).

    An unpacked file is mapped, not read.

    Raises:
        ValueError: If it is no such file, or cut short.

    Source: LeCun, Cortes and Burges, the MNIST database (format).
    """
    packed = file.suffix == ".gz"
    try:
        with gzip.open(file) if packed else file.open("rb") as stream:
            zeros, kind, axes = struct.unpack(">HBB", stream.read(4))
            if (zeros, kind) != (0, 8) or not 1 <= axes <= 4:
                raise ValueError("its first bytes are not those of an idx file of bytes")
            shape = struct.unpack(f">{axes}I", stream.read(4 * axes))
            if math.prod(shape) > IN_MEMORY:
                raise ValueError(f"it claims to hold {math.prod(shape):,} bytes")
            begin = 4 + 4 * axes
            if not packed:
                size = file.stat().st_size
                if size != begin + math.prod(shape):
                    raise ValueError(f"it has {size:,} bytes, its header says otherwise")
                return np.memmap(file, np.uint8, "r", begin, shape)
            data = stream.read(math.prod(shape))
            if stream.read(1):  # which also makes gzip compare its checksum
                raise ValueError("it goes on after what its header says")
        return np.frombuffer(data, np.uint8).reshape(shape)
    except (OSError, EOFError, struct.error, zlib.error, ValueError) as error:
        raise ValueError(f"{file} is not a whole idx file: {error}") from error


def idx_pair(folder: Path, name: str) -> Stored:
    """Images and labels of `train` or `t10k`.

    Raises:
        ValueError: If a file is missing or damaged, or they do not belong together.

    Source: Xiao, Rasul and Vollgraf (2017); LeCun et al. (1998).
    """
    found = {}
    for kind in ("images-idx3", "labels-idx1"):
        file = folder / f"{name}-{kind}-ubyte"
        file = file if file.is_file() else file.with_name(f"{file.name}.gz")
        if not file.is_file():
            raise ValueError(f"{folder} has no {file.name}; cmbook data get fetches it")
        found[kind] = read_idx(file)
    images, label = found["images-idx3"], found["labels-idx1"]
    if images.ndim != 3 or not len(images) or label.shape != (len(images),):
        raise ValueError(
            f"{folder}: {name} has images {images.shape} but labels {label.shape}; they do not "
            "belong together"
        )
    number = _checked(label, len(images), folder)
    classes = tuple(str(i) for i in range(10)) if number.max() < 10 else ()
    return Stored(Rows((images[:, None],), number, classes), f"{folder} ({name})")


def cifar(folder: Path, batches: list[str]) -> Stored:
    """CIFAR-10's python batches: those that are named, however many rows each has.

    The files are pickles. They are read by an unpickler that knows arrays and lists and refuses
    everything else, so nothing in them is run.

    Raises:
        ValueError: Naming the file that is damaged, or holds what a batch does not.

    Source: Krizhevsky (2009).
    """
    images, labels = [], []
    for name in batches:
        read = _unpickled(folder / name)
        try:
            data = _numbers(read[b"data"])
            if data.dtype != np.uint8:
                raise ValueError(f"its data are {data.dtype}, expected uint8")
            images.append(data.reshape(-1, 3, 32, 32))
            labels.append(_checked(_numbers(read[b"labels"]), len(images[-1]), folder / name))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{folder / name} is no batch of CIFAR-10: {error}") from error
    classes = tuple(str(i) for i in range(10))
    meta = folder / "batches.meta"
    if meta.is_file():
        names = _unpickled(meta).get(b"label_names", ())
        if not isinstance(names, list | tuple) or not all(isinstance(n, bytes) for n in names):
            raise ValueError(f"{meta} holds no list of names")
        classes = tuple(name.decode("latin1") for name in names)
    if max(int(label.max()) for label in labels) >= len(classes):
        raise ValueError(f"{folder}: a label is larger than the {len(classes)} classes")
    return Stored(Rows(tuple(images), np.concatenate(labels), classes), str(folder))


def folder(root: Path) -> Pictures:
    """Pictures in a folder.

    With sub-folders, the one right below the root names the class. Without, the class is the file
    name up to the first `_`, as in the official code, if every name has one and more than one
    class results.

    Raises:
        ValueError: If there is no picture, or a class without one.

    Source: Dhariwal and Nichol (2021), released code (flat layout).
    """
    chosen = sorted(file for file in _files(root) if file.suffix.lower() in PICTURES)
    names = [file.relative_to(root).as_posix() for file in chosen]
    names = [name for name in names if not any(s.startswith(".") for s in name.split("/"))]
    files = [root / name for name in names]
    empty = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    empty -= {name.split("/")[0] for name in names if "/" in name}
    if not files:
        kinds = ", ".join(sorted(PICTURES))
        raise ValueError(f"{root} holds no pictures ({kinds})")
    if empty:
        raise ValueError(
            f"{root}: the class {sorted(empty)[0]!r} has no pictures; fill its folder or remove it"
        )
    facts = [(name, file.stat()) for name, file in zip(names, files, strict=True)]
    stamp = _stamp([str(root.resolve()), *((n, s.st_size, s.st_mtime_ns) for n, s in facts)])
    label, classes = _classes(names, str(root))
    return Pictures(tuple(names), lambda i: bounded(files[i]), stamp, str(root), label, classes)


def _files(root: Path) -> Iterator[Path]:
    """Everything below a folder, links followed, but none that leads back to where it lies."""
    for at, below, names in os.walk(root, followlinks=True):
        here = Path(at).resolve()
        below[:] = [name for name in below if (here / name).resolve() not in (here, *here.parents)]
        yield from (Path(at) / name for name in names)


def archive(file: Path) -> Pictures:
    """Pictures in a .zip archive, never unpacked as a whole.

    Classes come from its `dataset.json`, if there is one (the layout of StyleGAN and EDM), else
    as in a folder.

    Raises:
        ValueError: If the archive holds no pictures, or a picture that unpacks to more than 256 MB.

    Source: Karras et al. (2022), released code (`dataset.json`).
    """
    try:
        packed = zipfile.ZipFile(file)
    except Exception as error:  # a damaged archive may raise anything
        raise ValueError(f"{file} is not a whole .zip archive: {error}") from error
    entries = [e for e in packed.infolist() if Path(e.filename).suffix.lower() in PICTURES]
    entries = [entry for entry in entries if not entry.is_dir()]
    entries = sorted((e for e in entries if "__MACOSX" not in e.filename), key=lambda e: e.filename)
    if not entries:
        raise ValueError(f"{file} holds no pictures")
    for entry in entries:
        if entry.file_size > LARGEST_FILE:
            raise ValueError(
                f"{file}: {entry.filename} would unpack to {entry.file_size / 1e6:,.0f} MB; that "
                "is no picture of a data set"
            )
    names = [entry.filename for entry in entries]
    label, classes = _classes(names, str(file))
    if "dataset.json" in packed.namelist():
        label, classes = _dataset_json(packed, names, file), ()

    def read(i: int) -> bytes:
        with zipfile.ZipFile(file) as again, again.open(entries[i]) as stream:
            return stream.read(LARGEST_FILE)

    stamp = _stamp([(e.filename, e.file_size, e.CRC) for e in entries])
    return Pictures(tuple(names), read, stamp, str(file), label, classes)


def hub(address: str) -> Pictures:
    """A data set of the Hugging Face hub: `hf://name`, or `hf://name?split=test&config=plain`.

    Its first column of pictures is read, and its first column of class labels, if it has one.

    Raises:
        ValueError: If the package `datasets` is missing, or the set cannot be had or used.

    Source: ours.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{address} needs a package: pip install 'cmbook[hub]'") from error
    name, _, query = address.removeprefix(HUB).partition("?")
    knobs = dict(parse_qsl(query))
    if unknown := sorted({*knobs} - {"split", "config", "data_dir"}):
        raise ValueError(f"{address}: {unknown[0]} is not known; use split, config or data_dir")
    split, config = knobs.pop("split", "train"), knobs.pop("config", None)
    try:
        found = datasets.load_dataset(name, config, split=split, **knobs)
    except Exception as error:  # it raises what its many back ends raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{address} cannot be loaded: {reason}") from error
    pictures = [k for k, v in found.features.items() if isinstance(v, datasets.Image)]
    labels = [k for k, v in found.features.items() if isinstance(v, datasets.ClassLabel)]
    if not pictures:
        raise ValueError(f"{address} has no column of pictures; it has {', '.join(found.features)}")
    raw = found.cast_column(pictures[0], datasets.Image(decode=False))

    def read(i: int) -> bytes:
        cell = raw[i][pictures[0]]
        data: bytes = cell["bytes"] or Path(cell["path"]).read_bytes()
        return data

    label = np.array(found[labels[0]], np.int64) if labels else None
    classes = tuple(found.features[labels[0]].names) if labels else ()
    stamp = _stamp([found._fingerprint, len(found)])
    names = tuple(f"picture {i}" for i in range(len(found)))
    return Pictures(names, read, stamp, address, label, classes)


def export_lsun(database: Path, folder: Path, limit: int | None = None) -> int:
    """Unpack the pictures of an LSUN database into a folder, as the files that they are.

    Args:
        database: The folder that holds `data.mdb`.
        folder: Where to put them; files that are there already stay.
        limit: So many at most.

    Returns:
        How many pictures the folder now has of the database.

    Raises:
        ValueError: If the package `lmdb` is missing, there is no such database, or the limit is
            not positive.

    Source: Yu et al. (2015), LSUN (format).
    """
    try:
        import lmdb
    except ImportError as error:
        raise ValueError("LSUN's databases need a package: pip install 'cmbook[lsun]'") from error
    from tqdm import tqdm

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 picture; got {limit}")
    if not (database / "data.mdb").is_file():
        raise ValueError(
            f"{database} holds no data.mdb; name the folder that LSUN's .zip unpacks to"
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        source = lmdb.open(str(database), readonly=True, lock=False, readahead=False)
        with source, source.begin() as reading:
            total = min(source.stat()["entries"], limit or source.stat()["entries"])
            pairs = zip(range(total), reading.cursor(), strict=False)
            for _, (key, data) in tqdm(pairs, total=total, desc="unpacking", disable=total < 500):
                place = folder / f"{key.decode('ascii')}{_suffix(data)}"
                if Path(place.name) != Path(place.relative_to(folder)):
                    raise ValueError(f"{database}: the key {key!r} is no name of a picture")
                if not place.is_file():
                    unfinished = place.with_name(f".unfinished-{place.name}")
                    unfinished.write_bytes(data)
                    unfinished.replace(place)
    except (lmdb.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{database} cannot be read: {error}") from error
    return int(total)


def _suffix(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return ".png" if data[:4] == b"\x89PNG" else ".jpg"


def read_npz(file: Path) -> Rows:
    """Images in an .npz or .npy file, 8-bit: `arr_0`, `images` or `data`.

    Layouts: `(n, height, width, channels)`, `(n, channels, height, width)`, `(n, height, width)`,
    and the flat `(n, 3 height height)` of down-sampled ImageNet, whose labels count from 1.
    Labels: `arr_1` or `labels`.

    Raises:
        ValueError: If the file is damaged, holds Python objects, or no such images.

    Source: Chrabaszcz et al. (2017), down-sampled ImageNet; Dhariwal and Nichol (2021), released
    code (`arr_0`).
    """
    try:
        if file.suffix == ".npy":
            found = {"arr_0": np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))}
        else:
            found = _arrays(file)
    except Exception as error:  # a damaged archive may raise anything
        raise ValueError(f"{file} cannot be read as arrays: {error}") from error
    images = next((found[k] for k in ("arr_0", "images", "data") if k in found), None)
    if images is None or images.dtype != np.uint8:
        has = ", ".join(f"{k} {a.dtype}{a.shape}" for k, a in found.items())
        raise ValueError(f"{file} holds no 8-bit images arr_0, images or data; it has {has}")
    label = next((found[k] for k in ("arr_1", "labels") if k in found), None)
    flat = images.ndim == 2
    if label is not None:
        if label.dtype.kind not in "iu":
            raise ValueError(f"{file}: labels must be integers, got {label.dtype}")
        label = label.astype(np.int64).ravel() - (1 if flat else 0)
        label = _checked(label, len(images), file)
    classes = found.get("label_names", np.empty(0, str))
    return Rows((_planes(images, file),), label, tuple(str(name) for name in classes))


def _npz(files: list[Path], name: str) -> Stored:
    each = [read_npz(file) for file in files]
    shapes = {rows.shape for rows in each}
    if len(shapes) > 1:
        raise ValueError(f"{name} holds images of different shapes: {sorted(shapes)}")
    label = None
    if all(rows.label is not None for rows in each):
        label = np.concatenate([rows.label for rows in each if rows.label is not None])
    parts = tuple(part for rows in each for part in rows.parts)
    return Stored(Rows(parts, label, each[0].classes), name)


def _planes(images: Bytes, file: Path) -> Bytes:
    """Any layout as (n, channels, height, width), without a copy."""
    shape = images.shape
    if not images.size:
        raise ValueError(f"{file} holds no images: {shape}")
    side = math.isqrt(shape[1] // 3) if images.ndim == 2 else 0
    if images.ndim == 2 and side and shape[1] == 3 * side * side:
        return images.reshape(-1, 3, side, side)
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and shape[3] in (1, 3):
        return images.transpose(0, 3, 1, 2)
    if images.ndim == 4 and shape[1] in (1, 3):
        return images
    raise ValueError(f"{file}: images of shape {shape} are in no known layout; see read_npz")


def _arrays(file: Path) -> dict[str, Any]:
    """The arrays of an .npz; those that are stored unpacked are mapped."""
    found: dict[str, Any] = {}
    with zipfile.ZipFile(file) as packed, file.open("rb") as raw:
        for entry in packed.infolist():
            name = entry.filename.removesuffix(".npy")
            with packed.open(entry) as stream:
                shape, fortran, dtype = _header(stream)
                offset = stream.tell()
            if dtype.hasobject:
                raise ValueError(f"{name} holds Python objects, which are not read")
            size = math.prod(shape) * dtype.itemsize
            if offset + size != entry.file_size:
                raise ValueError(f"{name} says {size:,} bytes, the archive {entry.file_size:,}")
            if entry.compress_type == zipfile.ZIP_STORED and not fortran and size:
                raw.seek(entry.header_offset + 26)
                begin = raw.tell() + 4 + sum(struct.unpack("<HH", raw.read(4))) + offset
                found[name] = np.memmap(file, dtype, "r", begin, shape)
            elif size > IN_MEMORY:
                raise ValueError(
                    f"{name} would unpack to {size / 1e9:,.1f} GB; save it with np.savez, not "
                    "savez_compressed, and it stays on disk"
                )
            else:
                data = np.frombuffer(packed.read(entry)[offset:], dtype)
                found[name] = data.reshape(shape, order="F" if fortran else "C")
    return found


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"unknown version {version} of the array format")
    return read[version](stream)


class _Inert(pickle._Unpickler):
    """Reads arrays of whole numbers, lists and strings; names of anything else are refused.

    NumPy's own classes would not do: an array of Python objects over bytes from the file is a list
    of addresses that the file has chosen. Nor would the unpickler in C, whose memory is as large
    as a file says.
    """

    def find_class(self, module: str, name: str) -> Any:
        core = ("numpy.core.multiarray", "numpy._core.multiarray")
        if (module, name) == ("numpy", "ndarray") or (name == "_reconstruct" and module in core):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _Kind
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 pickles them in protocol 2
            return _encode
        raise pickle.UnpicklingError(f"it would call {module}.{name}, which a data file never does")


class _Kind:
    """A type of whole numbers, in the place of `numpy.dtype`."""

    def __init__(self, name: Any, *ignored: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name
        if self.name not in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"):
            raise pickle.UnpicklingError(f"it holds numbers of type {self.name!r}")
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        self.order = {"<": "<", ">": ">", "|": "|"}[order]


class _Array:
    """Numbers, in the place of `numpy.ndarray`."""

    numbers: NDArray[Any]

    def __init__(self, *ignored: Any) -> None:
        self.numbers = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Kind):
            raise pickle.UnpicklingError(f"its type of numbers is {kind!r}")
        flat = np.frombuffer(data, np.dtype(kind.order + kind.name))
        self.numbers = flat.reshape(shape, order="F" if fortran else "C")


def _numbers(read: Any) -> NDArray[Any]:
    return read.numbers if isinstance(read, _Array) else np.asarray(read)


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _unpickled(file: Path) -> dict[Any, Any]:
    try:
        read = _Inert(io.BytesIO(bounded(file, IN_MEMORY)), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file} holds a {type(read).__name__}, expected a table")
    return read


def _classes(names: list[str], origin: str) -> tuple[Label | None, tuple[str, ...]]:
    """Classes by folder; in a flat folder by the file name up to `_`."""
    below = {name.split("/")[0] for name in names if "/" in name}
    if below and any("/" not in name for name in names):
        lone = next(name for name in names if "/" not in name)
        raise ValueError(
            f"{origin} has pictures both in folders and beside them ({lone}); put each into the "
            "folder of its class"
        )
    flat = [name.rsplit("/", 1)[-1] for name in names]
    if not below and not all("_" in name for name in flat):
        return None, ()
    of = [name.split("/")[0] for name in names] if below else [n.split("_")[0] for n in flat]
    classes = sorted(set(of))
    if len(classes) < 2:
        return None, ()
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[name] for name in of], np.int64), tuple(classes)


def _dataset_json(packed: zipfile.ZipFile, names: list[str], file: Path) -> Label | None:
    try:
        with packed.open("dataset.json") as stream:
            text = stream.read(LARGEST_FILE)
    except Exception as error:  # a damaged archive may raise anything
        raise ValueError(f"{file}: dataset.json cannot be unpacked: {error}") from error
    try:
        labels = json.loads(text)["labels"]
        if labels is None:
            return None
        of = {str(name): label for name, label in labels}
        return _checked(np.array([of[name] for name in names]), len(names), file)
    except KeyError as error:
        raise ValueError(f"{file}: dataset.json gives no label for {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: dataset.json cannot be read as labels: {error}") from error


def _checked(label: NDArray[Any], n: int, origin: Path) -> Label:
    """Labels that are `n` whole numbers from 0, and not absurdly large."""
    if label.dtype.kind not in "iu" or label.shape != (n,):
        raise ValueError(
            f"{origin}: expected {n} whole numbers as labels; got {label.dtype} {label.shape}"
        )
    if n and not 0 <= int(label.min()) <= int(label.max()) < MOST_CLASSES:
        raise ValueError(
            f"{origin}: labels must lie in 0 ... {MOST_CLASSES - 1}; got {label.min()} ... "
            f"{label.max()}"
        )
    return label.astype(np.int64)


def bounded(file: Path, most: int = LARGEST_FILE) -> bytes:
    """What a plain file holds; a pipe may never end, and neither does /dev/zero.

    Raises:
        ValueError: If it is no plain file, or a larger one.

    Source: ours.
    """
    if not file.exists():
        raise ValueError("does not exist")
    if not file.is_file():
        raise ValueError("is no plain file")
    if file.stat().st_size > most:
        raise ValueError(f"is larger than {most / 1e6:,.0f} MB")
    return file.read_bytes()


def _stamp(facts: list[Any]) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()
