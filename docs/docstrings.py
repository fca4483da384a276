"""How docstrings become pages: small, quiet remarks, doctests as code, and who uses what.

mkdocstrings loads this file while it collects the package. `Source:` and `Note:` stand in the
docstrings; which notebooks use a thing is read from their code.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from griffe import Extension, Object

import cmbook

REMARK = re.compile(r"(?:^|(?<=\S)  +)(Source|Note): (.+(?:\n[^\n]+)*)", re.MULTILINE)
NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


class Quiet(Extension):
    """Give every remark a paragraph and a class of its own, and name the notebooks that use it."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            used = "" if obj.is_module else used_in(obj.path)
            obj.docstring.value = quiet(obj.docstring.value) + used


def quiet(text: str) -> str:
    """A docstring whose remarks and examples Markdown understands."""

    def remark(match: re.Match[str]) -> str:
        kind, words = match[1], " ".join(match[2].split())
        return f"\n\n**{kind}** {words}\n{{: .{kind.lower()} }}"

    return re.sub(r"^Example:$", "Examples:", REMARK.sub(remark, text), flags=re.MULTILINE)


def used_in(path: str) -> str:
    """A line of links to the notebooks whose code uses a public thing, given its full name.

    A thing may be imported from a package above the module that defines it.
    """
    *home, name = path.split(".")
    doors = {".".join([*home[:depth], name]) for depth in range(1, len(home) + 1)}
    numbers = [number for number, used in uses(NOTEBOOKS).items() if used & doors]
    links = ", ".join(f"[{number}][notebook-{number}]" for number in numbers)
    return f"\n\n**Used in** {links}\n{{: .used }}" if links else ""


@cache
def uses(notebooks: Path) -> dict[str, set[str]]:
    """For each notebook, by number: the full names of all that its code takes from the package."""
    found = {}
    for path in sorted(notebooks.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        found["".join(re.findall(r"^\d+", path.stem))] = set(taken(code))
    return found


def taken(code: str) -> Iterator[str]:
    """The names that code takes from cmbook: `cmbook.oracle.World`, however it was imported."""
    tree = ast.parse(code)
    local: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.split(".")[0]
                local[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom):
            local |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    for node in ast.walk(tree):
        name = dotted(node, local)
        if name.startswith("cmbook."):
            module, _, last = name.rpartition(".")
            yield (
                f"{cmbook._HOME[last]}.{last}"
                if module == "cmbook" and last in cmbook._HOME
                else name
            )


def dotted(node: ast.AST, local: dict[str, str]) -> str:
    """The full name behind `a` or `a.b.c`, if `a` was imported."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value, local)
        return f"{before}.{node.attr}" if before else ""
    return local.get(node.id, "") if isinstance(node, ast.Name) else ""
