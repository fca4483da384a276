"""The code that trains, as it is in memory: what made a run, and where other code is another.

A recipe says what is to be done, not by which lines. Who edits the package, or replaces one of its
functions, trains something else under the same recipe. So a run keeps the text of all functions
that training is made of, eighty kilobytes once compressed, and the doctor compares them with those
it knows.
"""

import ast
import gzip
import inspect
import json
import linecache
import sys
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import cached_property, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from cmbook import disk

NAME = "code.json.gz"
MOST = 1 << 24  # bytes of text: all of cmbook is a fortieth
LONG = 20_000  # letters: the longest function here is a quarter of it
_PARTS = (
    *("data", "distances", "guidance", "losses", "networks", "noise", "ode", "parameterization"),
    *("perceptual", "protocols", "schedules", "training", "weights"),
)
_LIBRARIES = ("torch", "numpy", "scipy", "sklearn", "PIL", "jaxtyping", "einops", "cmbook")
_PLACES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")} - {None})


def sources() -> dict[str, str]:
    """The text of every function that training is made of, by its name.

    What a module has from elsewhere stands there by that name, so that a function which was put
    in the place of another shows.

    Returns:
        Texts such as `def __call__(self, ...): ...`, by names such as `losses.edm.EDM.__call__`.

    Source: ours.
    """
    found = dict[str, str]()
    for name, module in sorted(sys.modules.items()):
        package, _, rest = name.partition(".")
        if package == "cmbook" and rest.split(".")[0] in _PARTS and module is not None:
            for key, value in vars(module).items():
                found |= {f"{rest}.{k}": text for k, text in _texts(module, key, value)}
    return found


def _texts(module: ModuleType, key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Those of a function, of the methods of a class, or of a table of functions."""
    if key.startswith("__"):
        return
    if isinstance(value, type) and value.__module__ == module.__name__:
        for name, member in vars(value).items():
            if (function := _function(member)) is not None and (text := _text(function)):
                yield f"{key}.{name}", text
    elif isinstance(value, dict) and all(callable(each) for each in value.values()):
        yield from ((f"{key}[{name!r}]", _named(each, module)) for name, each in value.items())
    elif callable(value):
        yield key, _named(value, module)


def _named(value: Any, module: ModuleType) -> str:
    """The text of what is at home here, or comes from nowhere known; else its name."""
    function, home = _function(value), getattr(value, "__module__", None) or ""
    package = home.split(".")[0]
    known = package in _LIBRARIES or package in sys.stdlib_module_names - {"__main__"}
    if function is None or (known and home != module.__name__):
        return f"{home}.{getattr(value, '__qualname__', type(value).__name__)}"
    return _text(function)


def _function(value: Any) -> FunctionType | None:
    """The function in a method, a property, or what a library has wrapped around it."""
    if isinstance(value, staticmethod | classmethod | MethodType):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, cached_property | partial):
        value = value.func
    value = inspect.unwrap(value, stop=_written) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _written(function: Any) -> bool:
    """Whether somebody wrote it by hand, and not a library."""
    file = function.__code__.co_filename if isinstance(function, FunctionType) else "<"
    ours = file.startswith(str(Path(__file__).parent))
    return ours or not file.startswith(("<", *_PLACES))


def _text(function: FunctionType, deep: bool = True) -> str:
    """As it is written, with what it calls that is not ours; made by `dataclass`: nothing."""
    code: CodeType = function.__code__
    written = linecache.getlines(code.co_filename)
    if not written:
        names = ", ".join([*code.co_names, *map(repr, code.co_consts)])
        ours = (function.__module__ or "").startswith("cmbook.")
        return "" if ours else f"{function.__qualname__}: not from a file, it names {names}"
    text = textwrap.dedent("".join(inspect.getblock(written[code.co_firstlineno - 1 :])))
    if deep and not code.co_filename.startswith((str(Path(__file__).parent), *_PLACES)):
        called = (_function(function.__globals__.get(name)) for name in code.co_names)
        text += "".join(_text(each, False) for each in called if each and _written(each))
    return text


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """The names in both whose code is another, comments and docstrings apart.

    Source: ours.
    """
    both = [name for name in now if name in before and before[name] != now[name]]
    return [name for name in both if _bare(before[name]) != _bare(now[name])]


def _bare(text: str) -> str:
    """Without comments and docstrings; as it is if it cannot be read."""
    try:
        tree = ast.parse(text if len(text) < LONG else "")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        return ast.unparse(tree) or text
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text


def lines(before: str, now: str) -> tuple[list[str], list[str]]:
    """The lines that only one of two texts has, of their first hundreds.

    Source: ours.
    """
    one, two = (
        [t.strip() for t in _bare(text)[:LONG].splitlines()[:400]] for text in (before, now)
    )
    left, right = list[str](), list[str]()
    for kind, i, j, k, m in SequenceMatcher(None, one, two, autojunk=False).get_opcodes():
        if kind != "equal":
            left += one[i:j]
            right += two[k:m]
    return left, right


def keep(folder: Path) -> list[str]:
    """Write the code of this process into the folder of a run.

    Returns:
        Which functions were others in the code that was there.

    Source: ours.
    """
    now, path = sources(), folder / NAME
    try:
        before = read(folder)
    except ValueError:
        before = {}
    if before != now:
        with disk.replacing(path) as file:
            file.write(gzip.compress(json.dumps(now).encode(), mtime=0))
    return changed(before, now)


def read(folder: Path) -> dict[str, str]:
    """The code that made a run, as text; it is never executed.

    Raises:
        ValueError: If it is not there, or not whole.

    Source: ours.
    """
    path = folder / NAME
    try:
        with gzip.open(path) as file:
            found = json.loads(file.read(MOST))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the code of the run is not there, or not whole") from error
    match found:
        case dict() if all(isinstance(text, str) for text in found.values()):
            return found
    raise ValueError(f"{path}: the code of the run is not there, or not whole")
