"""Plant one wrong line at a time, and see which test notices.

    python benchmarks/mutations.py [--notebooks] [PART_OF_A_NAME ...]

The wrong lines stand in mutations.toml, each with the test that should notice it. Each is planted
in a copy of the repository, where that test must fail, and by its assertion: a program that cannot
even run proves nothing about its tests. If the test passes, all tests are tried, then all
notebooks, so the report says whether anything would have noticed.

With --notebooks, a line that names a lesson is shown to that lesson too, and if all lines are
planted, benchmarks/results/mutations.json is written.

Ends with an error if a line was not noticed as it should be. About four minutes on two cores, and
six with --notebooks.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import pytest
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/mutations.json"
WORKERS = 2
ASSERTIONS = ("assert ", "AssertionError", "Failed: DID NOT RAISE", "Cell outputs differ")
# Heavy imports are made once: tests run in forks of a process that has made them.
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["__main__", "torch", "scipy.stats", "nbformat", "jupyter_client", "beartype"]
# This one reads the planted lines themselves.
EVERY_TEST = ["cmbook", "tests", "--ignore=tests/test_mutations.py"]


@dataclass(frozen=True)
class Mutation:
    """One wrong line, and who should notice.

    Attributes:
        name: What is wrong.
        file: Where, in cmbook/.
        old: The right text, which occurs there once.
        new: The wrong text.
        test: The test that should notice, in tests/.
        why: What would go wrong, or where it went wrong before.
        notebook: A lesson that should notice, too.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    why: str
    notebook: str = ""


@dataclass(frozen=True)
class Failure:
    """What noticed.

    Attributes:
        where: The test, or the cell of a notebook.
        line: The line that failed.
        message: What it said.
    """

    where: str
    line: str
    message: str

    @property
    def proves(self) -> bool:
        """Whether an assertion failed, or only the program."""
        return self.message.startswith(ASSERTIONS)


@dataclass(frozen=True)
class Finding:
    """What became of a mutation: in the tests, and in its lesson if that was asked."""

    mutation: Mutation
    failure: Failure | None
    lesson: Failure | None
    with_lesson: bool
    seconds: float

    @property
    def trouble(self) -> str:
        """Why this is no success; empty if it is one."""
        found = [trouble(self.failure, f"tests/{self.mutation.test}")]
        if self.with_lesson:
            found.append(trouble(self.lesson, f"notebooks/{self.mutation.notebook}"))
        return "; ".join(filter(None, found))


def trouble(failure: Failure | None, expected: str) -> str:
    """Why this is not what was expected; empty if it is."""
    if failure is None:
        return f"{expected} did not notice, nor did anything else that was tried"
    where = failure.where.split("[")[0]  # without parameters
    if where != expected and not where.startswith(f"{expected}::"):
        return f"noticed only by {failure.where}"
    return "" if failure.proves else f"broke before it was noticed: {failure}"


def mutations() -> list[Mutation]:
    """The planted lines."""
    text = (ROOT / "benchmarks/mutations.toml").read_text(encoding="utf-8")
    return [Mutation(**table) for table in tomllib.loads(text)["mutation"]]


def copy_to(folder: Path) -> Path:
    """What git knows of the repository, or would: nothing that is ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run_pytest(copy: Path, args: list[str]) -> None:
    """In a process of its own: run tests of a copy, with the package of the copy."""
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)  # for notebooks, and programs that tests start
    with open("output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    status = pytest.main(args)
    package = sys.modules.get("cmbook")
    if package and Path(package.__file__ or "") != copy / "cmbook/__init__.py":
        raise RuntimeError(f"{package.__file__} was tested in place of the copy")
    sys.exit(status)


def first_failure(copy: Path, *args: str, timeout: float) -> Failure | None:
    """Run tests until one fails; `None` if all pass."""
    report = copy / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--junitxml={report}", *args]
    process = FORKS.Process(target=run_pytest, args=(copy, options))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        return Failure(args[-1], "", f"not finished after {timeout:.0f} s")
    if process.exitcode == 0:
        return None
    cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
    for case in cases:
        for told in (*case.iter("failure"), *case.iter("error")):
            return read_failure(case, told)
    return Failure(args[-1], "", (copy / "output.txt").read_text()[-2000:])


def read_failure(case: ElementTree.Element, told: ElementTree.Element) -> Failure:
    """What pytest or nbval writes in its report."""
    file, text = case.get("classname", "").replace(".", "/"), told.text or ""
    if file.endswith("/ipynb"):
        text = re.sub(r"(#x1B|\x1b)\[[\d;]*m", "", text)  # colors
        file = f"{file.removesuffix('/ipynb')}.ipynb"
        lines = re.findall(r"^-+> \d+\s+(.+)$", text, re.MULTILINE)
        messages = re.findall(r"^\w*Error\b.*|Cell outputs differ", text, re.MULTILINE)
    else:
        file = f"{file}.py"
        lines, messages = re.findall(r"^>\s+(.+)$", text, re.MULTILINE), [told.get("message", "")]
    return Failure(f"{file}::{case.get('name')}", (lines or [""])[-1], (messages or [text])[-1])


@contextmanager
def planted(copy: Path, mutation: Mutation) -> Iterator[None]:
    """The copy with one wrong line."""
    path = copy / "cmbook" / mutation.file
    right = path.read_text(encoding="utf-8")
    if right.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} should hold once, not {right.count(mutation.old)} "
                         f"times: {mutation.old}")  # fmt: skip
    path.write_text(right.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(right, encoding="utf-8")


def find(copy: Path, mutation: Mutation, with_lesson: bool) -> Finding:
    """Who notices."""
    start, lesson = time.time(), None
    with planted(copy, mutation):
        failure = (
            first_failure(copy, f"tests/{mutation.test}", timeout=120)
            or first_failure(copy, *EVERY_TEST, timeout=1800)
            or first_failure(copy, "--nbval", "notebooks", timeout=1800)
        )
        seconds = time.time() - start
        if with_lesson:
            lesson = first_failure(copy, "--nbval", f"notebooks/{mutation.notebook}", timeout=600)
    return Finding(mutation, failure, lesson, with_lesson, seconds)


def check_unharmed(copy: Path, chosen: list[Mutation], lessons: set[str]) -> None:
    """Without a wrong line everything passes: otherwise a failure says nothing."""
    tests = sorted({f"tests/{m.test}" for m in chosen})
    runs = [tests, ["--nbval", *sorted(f"notebooks/{name}" for name in lessons)]]
    for run in runs if lessons else runs[:1]:
        failure = first_failure(copy, *run, timeout=1200)
        if failure is not None:
            sys.exit(f"this fails before anything is planted: {failure}")


def report(findings: list[Finding], seconds: float) -> dict[str, object]:
    """What is kept of a run."""
    rows = [
        {
            "name": f.mutation.name, "file": f"cmbook/{f.mutation.file}",
            "old": f.mutation.old.strip(), "new": f.mutation.new.strip(), "why": f.mutation.why,
            "noticed_by": f.failure.where if f.failure else None,
            "by_the_line": f.failure.line if f.failure else None,
            "as_it_should_be": not f.trouble, "seconds": round(f.seconds, 1),
        }
        | ({"noticed_in": f.lesson.where if f.lesson else None} if f.with_lesson else {})
        for f in findings
    ]  # fmt: skip
    return {
        "planted": len(rows), "noticed": sum(bool(row["as_it_should_be"]) for row in rows),
        "mutations": rows, "seconds": round(seconds), "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def main(parts: list[str], notebooks: bool) -> None:
    """Plant the lines whose names have one of the parts, or all."""
    chosen = [m for m in mutations() if not parts or any(part in m.name for part in parts)]
    if not chosen:
        sys.exit(f"no line of mutations.toml has {' or '.join(map(repr, parts))} in its name")
    lessons = {m.notebook for m in chosen if m.notebook and notebooks}
    start = time.time()
    FORKS.set_forkserver_preload(PRELOADED)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONDONTWRITEBYTECODE": "1",  # a stale cache would hide a change of equal length
    }
    with TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        copies: Queue[Path] = Queue()
        for worker in range(WORKERS):
            copies.put(copy_to(Path(folder).resolve() / str(worker)))

        def find_in_some_copy(mutation: Mutation) -> Finding:
            copy = copies.get()
            try:
                return find(copy, mutation, mutation.notebook in lessons)
            finally:
                copies.put(copy)

        check_unharmed(copies.queue[0], chosen, lessons)
        found = pool.map(find_in_some_copy, chosen)
        findings = list(tqdm(found, total=len(chosen), unit="line", leave=False))

    for f in findings:
        print(f"{f.mutation.name:64}{f.failure.where.removeprefix('tests/') if f.failure else '-'}")
        for failure in filter(None, (f.failure, f.lesson)):
            print(f"{'':64}{failure.line if failure is f.failure else failure.where}")
    if lessons and not parts:
        text = json.dumps(report(findings, time.time() - start), indent=1, ensure_ascii=False)
        RESULTS.write_text(text + "\n", encoding="utf-8")
    bad = [f"{f.mutation.name}: {f.trouble}" for f in findings if f.trouble]
    print(f"{len(findings) - len(bad)} of {len(findings)} noticed as they should be")
    sys.exit("\n".join(bad) or None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART_OF_A_NAME")
    parser.add_argument("--notebooks", action="store_true")
    main(**vars(parser.parse_args()))
