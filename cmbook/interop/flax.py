"""Files of `flax.serialization`: a tree of dictionaries and arrays, written as MessagePack.

The format holds data alone, so reading cannot run code. On MessagePack flax puts

    extension 1                       an array: (shape, name of its dtype, its bytes in C order)
    extension 2                       a complex number: (real, imaginary)
    extension 3                       a NumPy scalar, written as an array without axes
    {"__msgpack_chunked_array__"}     an array above 1 GiB: its shape, and pieces of it, flattened
"""

import math
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

Tree = dict[str, Any]
CHUNKED = "__msgpack_chunked_array__"


def read_tree(path: Path) -> Tree:
    """The tree of a file; its arrays are read-only.

    Raises:
        ValueError: If there is no such file, it is of another kind, or it was cut short.

    Source: flax, `serialization.msgpack_restore`.
    """
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"there is no file {path}, or it is empty")
    data = np.memmap(path, np.uint8, mode="r").data
    if data[0] == 0x80 and len(data) > 1 and 2 <= data[1] <= 5:
        raise ValueError(f"{path} is a pickle, and loading it would run code; it was not loaded")
    try:
        tree = msgpack.unpackb(data, ext_hook=_extension, object_pairs_hook=_tree)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(
            f"{path} is no file of flax, is damaged or was cut short: {str(error) or repr(error)}"
        ) from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no file of flax: it does not hold one dictionary")
    return tree


def _extension(kind: int, data: bytes) -> Any:
    """What flax adds to MessagePack."""
    if kind not in (1, 2, 3):
        raise ValueError(f"flax writes no extension {kind}")
    parts = msgpack.unpackb(data)
    if kind == 2:
        return complex(*parts)
    shape, name, raw = parts
    dtype = np.dtype(name)
    if dtype.kind not in "biufc":
        raise ValueError(f"an array of {name} cannot be read")
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array {shape} of {name} has {len(raw)} bytes")
    array: Any = np.frombuffer(raw, dtype).reshape(shape) if len(raw) else np.empty(shape, dtype)
    return array if kind == 1 else array[()]


def _tree(pairs: list[tuple[Any, Any]]) -> Any:
    """A dictionary; or an array that was written in pieces."""
    found: Tree = dict(pairs)
    if CHUNKED not in found:
        return found
    try:
        shape, pieces = ([*found[part].values()] for part in ("shape", "chunks"))
    except (KeyError, AttributeError) as error:
        raise ValueError("an array in pieces lacks its shape or its pieces") from error
    return np.concatenate(pieces).reshape(shape)
