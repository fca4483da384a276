"""Pickles read without running what they carry: every object becomes a record of itself.

A pickle is a program. It names functions of any module, and Python's own reader calls them. This
reader calls only those that put tensors together. Classes become empty stand-ins that keep the
arguments and the state they are given; a call of anything else ends the reading.

NVIDIA's pickles carry the source code of their classes and build each object by
`torch_utils.persistence._reconstruct_persistent_obj(meta)`, where `meta` is a dictionary with

    class_name    of the object
    state         its attributes; of a module, with _parameters, _buffers and _modules
    module_src    the source code, which we neither run nor keep
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmbook.interop.foreign import Weights

# Whose calls may occur in an official file. They are recorded, not made.
RECORDED = ("torch", "numpy", "dnnlib", "torch_utils", "training", "collections")


class Inert(dict[Any, Any]):
    """An object of a pickle as a record: it does nothing.

    Attributes:
        name: Of its class.
        state: Its attributes.

    Source: ours.
    """

    name = ""
    state: dict[str, Any]

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        """Nothing is built; arguments are ignored."""
        made = super().__new__(cls)
        made.state = {}
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.state.update(part)

    def append(self, item: Any) -> None:
        """What a list would keep."""
        self.setdefault("items", []).append(item)


def read_pickle(path: Path) -> Any:
    """What a pickle holds: numbers, texts, containers and tensors as they are, the rest `Inert`.

    Raises:
        ValueError: If the file is damaged, or reading it would run code.

    Source: Python, `pickle.Unpickler.find_class`.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file).load()
    except _Code as error:
        raise ValueError(f"{path} would run {error}; it was not loaded, and nothing ran") from error
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or no pickle: {reason}") from error


def tensors(module: Inert) -> Weights:
    """Parameters and buffers of a recorded module, by the names of its state dict.

    Raises:
        ValueError: If a module lies in two places.

    Source: PyTorch, `torch.nn.Module.state_dict`.
    """
    found: Weights = {}
    seen: set[int] = set()
    open_: list[tuple[str, Inert]] = [("", module)]
    while open_:
        prefix, record = open_.pop()
        if id(record) in seen:
            raise ValueError(f"the module {prefix.rstrip('.') or 'at the top'} lies in two places")
        seen.add(id(record))
        for kind in ("_parameters", "_buffers"):
            items = table(record, kind).items()
            found |= {f"{prefix}{n}": w.detach() for n, w in items if isinstance(w, Tensor)}
        children = table(record, "_modules").items()
        open_ += [(f"{prefix}{n}.", child) for n, child in children if isinstance(child, Inert)]
    return found


def table(record: Inert, name: str) -> dict[Any, Any]:
    """An attribute that is a dictionary, or an empty one.

    Source: ours.
    """
    found = record.state.get(name)
    return found if isinstance(found, dict) else {}


def number(record: Inert, name: str, otherwise: float) -> float:
    """An attribute that is a number, or another one.

    Source: ours.
    """
    found = record.state.get(name)
    return float(found) if isinstance(found, int | float) else otherwise


class _Code(Exception):
    """A call that no file of tensors needs."""


class _Call:
    """A function that a pickle may call. It has no attributes for a pickle to set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise _Code("a change of a function")


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """A known function, or a stand-in."""
        full = f"{module}.{name}"
        return _Call(KNOWN[full]) if full in KNOWN else _stand_in(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """Nothing lies outside the file."""
        raise _Code(f"a reference to {pid!r} outside the file")


def _stand_in(module: str, name: str) -> type[Inert]:
    def refuse(self: Inert, *_: Any, **__: Any) -> None:  # not reached where state is restored
        raise _Code(f"{module}.{name}")

    members: dict[str, Any] = {"name": name}
    if module.split(".")[0] not in RECORDED:
        members["__init__"] = refuse
    return type("Inert", (Inert,), members)


def _persistent(meta: Any) -> Inert:
    made = _stand_in("torch_utils", str(meta["class_name"]))()
    made.__setstate__(meta["state"])
    return made


def _storage(saved: bytes) -> Any:
    """The numbers of one tensor, which PyTorch wrote as a file inside the file."""
    try:
        return torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _Code("code inside a tensor") from error


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    """A tensor that lies within its numbers; PyTorch itself does not check that."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError(f"a tensor must lie in a storage; got {type(storage).__name__}")
    there = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    if min([offset, *stride, *size]) < 0 or (0 not in tuple(size) and last >= there):
        raise ValueError(f"a tensor {tuple(size)} reaches beyond its {there} numbers")
    made: Tensor = torch._utils._rebuild_tensor_v2(storage, offset, size, stride, *rest)
    return made


KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.storage._load_from_bytes": _storage,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
}
