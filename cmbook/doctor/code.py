"""The code that made a run, beside the code that is at hand."""

from collections.abc import Iterator

import cmbook
from cmbook import sources
from cmbook.doctor.findings import Finding, found
from cmbook.doctor.patient import Patient, Undone

SHOWN, WIDTH = 2, 300  # functions, and letters of each, that are quoted


def code(p: Patient) -> Iterator[Finding]:
    """Whether the functions that trained were those of this package, line by line."""
    now, before = _both(p)
    names = sources.changed(now, before)
    said = "; ".join(_quoted(name, now[name], before[name]) for name in names[:SHOWN])
    more = f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    cause = f"other code than cmbook's trained this run: {said}{more}"
    remedy = "Undo that, or see what it does: it stands in code.json.gz"
    yield found("code", len(names), "look" if names else "well", cause, remedy)


def another(p: Patient) -> bool:
    """Whether it is known that some of them were not.

    Source: ours.
    """
    try:
        return bool(sources.changed(*_both(p)))
    except Undone:
        return False


def _both(p: Patient) -> tuple[dict[str, str], dict[str, str]]:
    """The code that is at hand, and the code that trained."""
    if p.run.record.get("cmbook") != cmbook.__version__:
        raise Undone("the run was made by another version of cmbook")
    try:
        return sources.sources(), sources.read(p.run.folder)
    except ValueError as why:
        raise Undone("which code trained it was not recorded") from why


def _quoted(name: str, now: str, before: str) -> str:
    """What a function was, in place of what it is."""
    here, there = sources.lines(now, before)
    shown = [" / ".join(_telling(each) or ["nothing"]) for each in (there, here)]
    shown = ["".join(c if c.isprintable() else "?" for c in each) for each in shown]
    was, instead = (each if len(each) <= WIDTH else each[:WIDTH] + " ..." for each in shown)
    return f"{name} had `{was}` in place of `{instead}`"


def _telling(lines: list[str]) -> list[str]:
    """Without first lines of functions, which say little."""
    return [line for line in lines if line and not line.startswith(("def ", "@"))]
