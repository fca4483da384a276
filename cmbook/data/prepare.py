"""Pictures as training sees them: decoded, cropped, resized; done once and kept in a cache.

The preparation is that of the ADM code, which the consistency models' code kept: halve with a box
filter while the short side is at least twice as large, resize with a bicubic filter so that the
short side fits, crop the center.
"""

import errno
import hashlib
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmbook.data.readers import Bytes, Found, Pictures, Rows

if TYPE_CHECKING:
    from PIL import Image

NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
CHUNK = 128  # pictures between two marks that a killed preparation goes on from
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # EPS, for one, is a program
LARGEST = 100_000_000  # pixels of one picture
Channels = int | None  # 1, 3, or whatever is there


def check_size(size: int | None) -> None:
    """Refuse a side that no picture can have.

    Raises:
        ValueError: Saying so.

    Source: ours.
    """
    if size is not None and not 1 <= size <= math.isqrt(LARGEST):
        raise ValueError(
            f"size must be at least 1 pixel, at most {math.isqrt(LARGEST):,}; got {size}"
        )


def center_crop(picture: "Image.Image", size: int) -> "Image.Image":
    """A picture as a square of `size` pixels.

    Raises:
        ValueError: If it is so long that it would become too large on the way.

    Source: Dhariwal and Nichol (2021), released code, `center_crop_arr`.
    """
    from PIL import Image

    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    if picture.width * picture.height * scale**2 > LARGEST:
        raise ValueError(f"is {picture.width}x{picture.height} pixels, which is too narrow")
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def decoded(data: bytes, channels: Channels, upright: bool = True) -> "Image.Image":
    """A picture from the bytes of its file, gray (`L`) or `RGB`; transparency lies on white.

    Args:
        data: PNG, JPEG, BMP, GIF, WebP, TIFF or PPM.
        channels: 1 makes it gray, 3 makes it RGB; `None` leaves it what it is.
        upright: Whether to turn it the way its camera was held.

    Raises:
        ValueError: If it is no picture, is damaged, has no 8-bit colors, or is too large.

    Source: ours.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():  # of sizes, which are measured here, and of odd remarks
            warnings.simplefilter("ignore")
            picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            if picture.width * picture.height > LARGEST:
                raise ValueError(f"is {picture.width}x{picture.height} pixels, which is too large")
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"has {picture.mode} pixels; save it as a picture of 8-bit colors")
            if any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ())):
                raise ValueError("has 16 bits a color; save it as a picture of 8-bit colors")
            if upright:
                picture = ImageOps.exif_transpose(picture)
            picture.load()
    except ValueError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"has too many pixels ({error})") from error
    except UnidentifiedImageError as error:  # whose own words name an object in memory
        raise ValueError("is no picture that can be read") from error
    except Exception as error:  # damaged pictures raise all kinds of errors
        raise ValueError(f"is no picture that can be read ({error})") from error
    gray = channels == 1 or (channels is None and picture.mode in ("1", "L", "LA"))
    if "A" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if gray else "RGB")


def prepared(found: Found, size: int | None, channels: Channels, upright: bool) -> Rows:
    """Images of one size and kind. Pictures, and images of another size, go through the cache.

    Raises:
        ValueError: Naming the files that cannot be used, at most five of them.

    Source: ours.
    """
    if isinstance(found, Pictures):
        rows = _cached(found, size, channels, upright)
        return replace(rows, label=found.label, classes=found.classes)
    rows, (c, height, width) = found.rows, found.rows.shape
    if (size or height, size or width, channels or c) == (height, width, c):
        return rows

    def as_file(i: int) -> bytes:
        from PIL import Image

        pixels = rows[np.array([i])][0]
        out = io.BytesIO()
        Image.fromarray(pixels[0] if c == 1 else pixels.transpose(1, 2, 0)).save(out, "bmp")
        return out.getvalue()

    names = tuple(f"image {i}" for i in range(len(rows)))
    pictures = Pictures(names, as_file, rows.unlabelled().sha256(), found.name)
    made = _cached(pictures, size, channels, upright=False)
    return replace(made, label=rows.label, classes=rows.classes)


def cache_folder() -> Path:
    """Where prepared images are kept: `$CMBOOK_CACHE`, else the user's cache folder.

    Source: ours.
    """
    named = os.environ.get("CMBOOK_CACHE")
    if named:
        return Path(named)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or (Path.home() / ".cache")
    except RuntimeError as error:
        raise ValueError(f"{error}; the variable CMBOOK_CACHE names a cache folder") from error
    return Path(base) / "cmbook"


def _cached(found: Pictures, size: int | None, channels: Channels, upright: bool) -> Rows:
    """The prepared images, from the cache or newly made."""
    first = attempt(found.open, 0, lambda data: decoded(data, channels, upright))
    if isinstance(first, str):
        raise ValueError(f"{found.name}: {found.names[0]} {first}")
    kind = 1 if first.mode == "L" else 3
    side = size and (size, size)
    height, width = side or (first.height, first.width)
    shape = (len(found.names), kind, height, width)
    one = partial(_one, channels=channels, upright=upright, size=size, shape=shape[1:])
    facts = (2, found.stamp, shape, upright, size, channels)
    place = cache_folder() / hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    if _fingerprint(place, shape) is None:
        try:
            _make(found, one, shape, place)
        except OSError as error:
            if error.errno in NO_PLACE:
                raise ValueError(
                    f"the cache {cache_folder()} cannot be written ({error.strerror}); the "
                    "variable CMBOOK_CACHE names another folder"
                ) from error
            raise OSError(error.errno, error.strerror, str(place)) from error
    images = np.memmap(place / "images.u8", np.uint8, "r", 0, shape)
    made = ["as stored" if size is None else "ADM center crop", *(["upright"] if upright else [])]
    return Rows((images,), preparation=", ".join(made), fingerprint=_fingerprint(place, shape))


def _fingerprint(place: Path, shape: tuple[int, ...]) -> str | None:
    """That of a finished cache; `None` if it is not finished, or damaged."""
    try:
        facts = json.loads((place / "finished.json").read_text(encoding="utf-8"))
        whole = (place / "images.u8").stat().st_size == int(np.prod(shape))
        return str(facts["sha256"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _one(
    data: bytes, channels: Channels, upright: bool, size: int | None, shape: tuple[int, ...]
) -> Bytes:
    """One picture as pixels (channels, height, width)."""
    picture = decoded(data, channels, upright)
    if size is not None and picture.size != (size, size):
        picture = center_crop(picture, size)
    kind = 1 if picture.mode == "L" else 3
    if kind != shape[0]:
        names = {1: "gray", 3: "in color"}
        raise ValueError(
            f"is {names[kind]}, the first is {names[shape[0]]}; data.channels = 3 makes all RGB"
        )
    if (picture.height, picture.width) != shape[1:]:
        raise ValueError(
            f"is {picture.width}x{picture.height} pixels, the first is {shape[2]}x{shape[1]}; "
            "data.size = 64, for example, makes all the same"
        )
    pixels = np.asarray(picture, np.uint8)
    return pixels[None] if kind == 1 else pixels.transpose(2, 0, 1)


def _make(
    found: Pictures, one: Callable[[bytes], Bytes], shape: tuple[int, ...], place: Path
) -> None:
    """Prepare all images, going on where an earlier attempt was killed."""
    from tqdm import tqdm

    place.mkdir(parents=True, exist_ok=True)
    bad: dict[int, str] = {}
    n = len(found.names)
    each = int(np.prod(shape[1:]))
    (place / "images.u8").touch()
    with (
        _locked(place / "lock"),
        (place / "images.u8").open("r+b") as images,  # not "a": there, pwrite would append
        (place / "done").open("a+b") as marks,
        ThreadPoolExecutor(os.cpu_count()) as workers,
    ):
        if _fingerprint(place, shape) is not None:  # made by another process while this one waited
            return
        (place / "finished.json").unlink(missing_ok=True)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(images.fileno(), 0, shape[0] * each)  # a full disk shows here
        marks.seek(0)
        done = {int(line) for line in marks.read().split(b"\n")[:-1] if line.isdigit()}
        starts = [s for s in range(0, n, CHUNK) if s not in done]
        bar = tqdm(total=n, initial=n - sum(min(CHUNK, n - s) for s in starts),
                   desc=f"preparing {found.name}", unit="image", mininterval=0.5,
                   disable=n < 500)  # fmt: skip
        with bar:
            for start in starts:
                chunk = range(start, min(start + CHUNK, n))
                results = list(workers.map(lambda i: attempt(found.open, i, one), chunk))
                wrong = {i: r for i, r in zip(chunk, results, strict=True) if isinstance(r, str)}
                bad |= wrong
                if not wrong:
                    _write(images, start * each, b"".join(r.tobytes() for r in results))
                    os.write(marks.fileno(), f"{start}\n".encode())
                bar.update(len(chunk))
        if bad:
            named = "; ".join(f"{found.names[i]} {why}" for i, why in list(bad.items())[:5])
            more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise ValueError(
                f"{found.name}: {len(bad)} of {n} pictures cannot be used: {named}{more}"
            )
        whole = np.memmap(place / "images.u8", np.uint8, "r", 0, shape)
        _finish(
            place, {"origin": found.name, "sha256": Rows((whole,)).sha256(), "shape": list(shape)}
        )


def attempt(read: Callable[[int], bytes], i: int, use: Callable[[bytes], Any]) -> Any:
    """What `use` makes of file number i, or the reason why it cannot.

    Source: ours.
    """
    try:
        return use(read(i))
    except Exception as error:  # a damaged file or archive may raise anything
        return str(error) or repr(error)


def _write(file: Any, position: int, data: bytes) -> None:
    """Put bytes where they belong, and wait until they are on disk."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view, position)
        view, position = view[written:], position + written
    os.fsync(file.fileno())


def _finish(place: Path, facts: dict[str, Any]) -> None:
    unfinished = place / "unfinished.json"
    unfinished.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    unfinished.replace(place / "finished.json")
    (place / "done").unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process prepares, others wait."""
    with path.open("w") as file:
        try:
            import fcntl
        except ImportError:  # not on this system
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
