"""Files of `flax.serialization`: a tree of dictionaries and arrays, written as MessagePack.

The format holds data alone, so reading cannot run code. It is small enough to be read here, and
this reader leaves every array where it lies in the file until somebody asks for it: a training
state of five trees costs the memory of the one that is wanted.

    extension 1                       an array: (shape, name of its dtype, its bytes in C order)
    extension 2                       a complex number: (real, imaginary)
    extension 3                       a NumPy scalar, written as an array without axes
    {"__msgpack_chunked_array__"}     an array above 1 GiB: its shape, and pieces of it, flattened
"""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

Tree = dict[str, Any]
CHUNKED = "__msgpack_chunked_array__"
DEEPEST = 64  # trees inside trees; real ones have about six
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
NUMBERS = {
    0xCA: "f", 0xCB: "d",
    0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q",
    0xD0: "b", 0xD1: "h", 0xD2: "i", 0xD3: "q",
}  # fmt: skip
SIZED = {  # what comes, and the number that says how much of it
    0xC4: ("bytes", "B"), 0xC5: ("bytes", "H"), 0xC6: ("bytes", "I"),
    0xC7: ("extension", "B"), 0xC8: ("extension", "H"), 0xC9: ("extension", "I"),
    0xD9: ("text", "B"), 0xDA: ("text", "H"), 0xDB: ("text", "I"),
    0xDC: ("list", "H"), 0xDD: ("list", "I"),
    0xDE: ("tree", "H"), 0xDF: ("tree", "I"),
}  # fmt: skip
FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


def read_tree(path: Path) -> Tree:
    """The tree of a file. Its arrays are read-only and stay in the file until they are used.

    Raises:
        ValueError: If there is no such file, it is of another kind, or it was cut short.

    Source: flax, `serialization.msgpack_restore`.
    """
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"there is no file {path}, or it is empty")
    data = np.memmap(path, np.uint8, mode="r").data
    if data[0] == 0x80 and len(data) > 1 and 2 <= data[1] <= 5:
        raise ValueError(f"{path} is a pickle, and loading it would run code; it was not loaded")
    reader = _Reader(data)
    try:
        tree = reader.value()
    except EOFError as error:
        raise ValueError(f"{path} was cut short, or is no file of flax") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no file of flax, or is damaged: {error}") from error
    if not isinstance(tree, dict) or reader.at < len(data):
        raise ValueError(f"{path} is no file of flax: it does not hold one dictionary")
    return tree


class _Reader:
    """Values of MessagePack, one after the other."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at, self.depth = data, 0, 0

    def take(self, n: int) -> memoryview:
        if self.at + n > len(self.data):
            raise EOFError
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(f">{form}", self.take(struct.calcsize(form)))[0]

    def value(self) -> Any:
        code = self.number("B")
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 0x100
        if code < 0xC0:  # short ones, whose size is inside the code
            kind = "tree" if code < 0x90 else "list" if code < 0xA0 else "text"
            return self.sized(kind, code & (0x1F if kind == "text" else 0x0F))
        if code in CONSTANTS:
            return CONSTANTS[code]
        if code in NUMBERS:
            return self.number(NUMBERS[code])
        if code in FIXED_EXTENSIONS:
            return self.sized("extension", FIXED_EXTENSIONS[code])
        if code not in SIZED:
            raise ValueError(f"the code {code:#x} has no meaning")
        kind, form = SIZED[code]
        return self.sized(kind, self.number(form))

    def sized(self, kind: str, n: int) -> Any:
        if kind == "bytes":
            return self.take(n)
        if kind == "text":
            return bytes(self.take(n)).decode()
        if kind == "extension":
            return _extension(self.number("b"), self.take(n))
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        found = [self.value() for _ in range(n)] if kind == "list" else self.tree(n)
        self.depth -= 1
        return found

    def tree(self, n: int) -> Any:
        found: Tree = {}
        for _ in range(n):
            name = self.value()
            if not isinstance(name, str):
                raise ValueError(f"a name must be text; got {type(name).__name__}")
            found[name] = self.value()
        return _joined(found) if CHUNKED in found else found


def _extension(kind: int, data: memoryview) -> Any:
    """What flax adds to MessagePack."""
    if kind not in (1, 2, 3):
        raise ValueError(f"flax writes no extension {kind}")
    parts = _Reader(data).value()
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


def _joined(chunked: Tree) -> Any:
    """An array that was written in pieces."""
    try:
        shape, pieces = ([*chunked[part].values()] for part in ("shape", "chunks"))
    except (KeyError, AttributeError) as error:
        raise ValueError("an array in pieces lacks its shape or its pieces") from error
    return np.concatenate(pieces).reshape(shape)
