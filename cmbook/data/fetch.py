"""Fetch the data sets that anyone may fetch: resumed, checked, and whole or not there at all."""

import hashlib
import os
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

BLOCK = 1 << 20


@dataclass(frozen=True)
class Remote:
    """A file that is known: where it lies, and what it must be.

    Attributes:
        name: Of the file.
        urls: Where it can be had, tried in order.
        size: In bytes; `None` where it is not published: then the server's word is taken.
        sha256: Of its contents; `None` where it is not published.
        md5: The checksum that its authors publish.
    """

    name: str
    urls: tuple[str, ...]
    size: int | None
    sha256: str | None = None
    md5: str | None = None


def fetch(remote: Remote, folder: Path, *, progress: bool = True) -> Path:
    """The file in a folder: there already, or fetched; an interrupted fetch is gone on with.

    Args:
        remote: What to fetch.
        folder: Where to put it; made if missing.
        progress: Show a bar.

    Raises:
        ValueError: If it cannot be had (saying which file to put where), or is not what it must be.

    Source: ours.
    """
    from tqdm import tqdm

    place = folder / remote.name
    if place.is_file():
        wrong = _wrong(place, remote)
        if wrong:
            raise ValueError(f"{place} is not the official file: {wrong}. Move it away, and again")
        return place
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{remote.name}.partial"
    reasons = []
    with tqdm(
        total=remote.size, unit="B", unit_scale=True, desc=remote.name, disable=not progress
    ) as bar:
        for url in remote.urls:
            try:
                announced = _go_on(url, partial, remote.size, bar)
            except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
                reasons.append(f"{url}: {getattr(error, 'reason', None) or repr(error)}")
                continue
            known = replace(remote, size=remote.size or announced)
            wrong = _wrong(partial, known)
            if not wrong:
                partial.replace(place)
                return place
            reasons.append(f"{url}: {wrong}")
            if partial.stat().st_size >= (known.size or 0):  # a shorter one was cut: gone on with
                partial.unlink()
                bar.reset()
    raise ValueError(
        f"{remote.name} could not be fetched ({'; '.join(reasons)}). On a machine with a network, "
        f"download it from one of these addresses and put it into {folder}"
    )


def get(name: str, folder: Path, *, progress: bool = True) -> Path:
    """A whole data set in a folder of its own, ready for `data.path`.

    Args:
        name: One of `DATASETS`.
        folder: Its files go to `folder / name`.
        progress: Show bars.

    Raises:
        ValueError: If there is no such data set, or a file cannot be had.

    Source: ours.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no data set {name!r} to fetch; known: {', '.join(DATASETS)}")
    place = folder / name
    for remote in DATASETS[name]:
        file = fetch(remote, place, progress=progress)
        if file.name.endswith(".tar.gz"):
            _unpack(file, place)
    return place


def _go_on(url: str, partial: Path, size: int | None, bar: "tqdm[None]") -> int | None:  # type: ignore[name-defined] # noqa: F821
    """Fetch what is missing of a file; returns the size that it must have, where that is known."""
    have = partial.stat().st_size if partial.is_file() else 0
    if size is not None and have >= size:
        return size
    request = urllib.request.Request(url, headers={"User-Agent": "cmbook"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with _opened(request) as answer:
        if answer is None:  # nothing lies beyond what is there
            return have
        resumed = getattr(answer, "status", None) == 206
        if have and not resumed and url.startswith("file:"):
            answer.seek(have)
            resumed = True
        whole = answer.headers.get("Content-Length")
        beside = have if resumed and not url.startswith("file:") else 0  # a part was announced
        expected = size if size is not None else None if whole is None else beside + int(whole)
        bar.n, bar.total = have if resumed else 0, expected
        with partial.open("ab" if resumed else "wb") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
                if expected is not None and file.tell() > expected:
                    break  # more than it should be: the check will say so
    return expected


@contextmanager
def _opened(request: urllib.request.Request) -> Iterator[Any]:
    """What a server answers; None if it has nothing beyond what was fetched."""
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        yield None
        return
    with answer:
        yield answer


def _wrong(file: Path, remote: Remote) -> str | None:
    """What is wrong with a file, if anything is."""
    size = file.stat().st_size
    if remote.size is not None and size != remote.size:
        return f"it has {size:,} bytes instead of {remote.size:,}"
    for kind in ("sha256", "md5"):
        expected = getattr(remote, kind)
        if expected is not None:
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, kind).hexdigest()
            if found != expected:
                return f"its {kind} is {found}, expected {expected}"
    return None


def _unpack(file: Path, place: Path) -> None:
    """The files of an archive, without its folders; each whole or not there at all."""
    try:
        _unpack_each(file, place)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be unpacked: {error}") from error


def _unpack_each(file: Path, place: Path) -> None:
    with tarfile.open(file) as packed:
        for entry in packed:
            name = Path(entry.name).name
            stream = packed.extractfile(entry) if entry.isfile() else None
            if stream is None or (place / name).exists():
                continue
            unfinished = place / f"{name}.partial"
            with unfinished.open("wb") as out:
                while block := stream.read(BLOCK):
                    out.write(block)
                out.flush()
                os.fsync(out.fileno())
            unfinished.replace(place / name)


def _idx(base: tuple[str, ...], *files: tuple[str, int, str]) -> tuple[Remote, ...]:
    return tuple(
        Remote(name, tuple(f"{start}{name}" for start in base), size, sha256)
        for name, size, sha256 in files
    )


DATASETS: dict[str, tuple[Remote, ...]] = {
    "fashion-mnist": _idx(
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        (
            "train-images-idx3-ubyte.gz",
            26421880,
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            29515,
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        (
            "t10k-images-idx3-ubyte.gz",
            4422102,
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        (
            "t10k-labels-idx1-ubyte.gz",
            5148,
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "mnist": _idx(
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        (
            "train-images-idx3-ubyte.gz",
            9912422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            28881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        (
            "t10k-images-idx3-ubyte.gz",
            1648877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        (
            "t10k-labels-idx1-ubyte.gz",
            4542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "cifar10": (
        Remote(
            "cifar-10-python.tar.gz",
            ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
            170498071,
            md5="c58f30108f718f92721af3b95e74349a",
        ),
    ),
}
