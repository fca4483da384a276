"""Every block of every guide is run, top to bottom, in an empty folder, as a reader would.

A guide says what a reader sees, and here it is compared: words exactly, numbers to 10%. Where a
block takes too long or needs what is not here, a comment in the page, right above it, says what
the test does instead; a block without a comment runs as it stands.

    <!-- in the test: steps=4000 => steps=20 -->        other words in their place; several by ;
    <!-- in the test: training.steps=20 -->             added to each `cmbook train`
    <!-- only parsed in the test: needs eight GPUs -->  commands are read, recipes built, not run

After a changed block, outputs are no longer compared. A block with a title is a file.

    python tests/test_guides.py samplers FOLDER     runs a guide unchanged, and prints what it says
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
FENCE = re.compile(r"^``` ?(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
COMMENT = re.compile(r"^<!-- (in the test|only parsed in the test): (.+) -->$")
OUTPUT = "{ .text .output }"
TITLED = re.compile(r'\{ \.(?:toml|python) title="([\w./-]+)" \}')
SERVER = """
import json, os, signal, socket, sys, traceback
import torch, cmbook.__main__, cmbook.runs, cmbook.plotting, cmbook.reports, cmbook.interop.convert

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
while True:
    talk, _ = listening.accept()
    if os.fork():
        talk.close()
        continue
    told, streams, *_ = socket.recv_fds(talk, 1 << 20, 3)
    if not told:  # somebody has asked whether this is ready
        os._exit(0)
    arguments, folder, environment = json.loads(told)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdout = open(1, "w", closefd=False)  # the old one remembers what it was connected to
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    try:
        cmbook.__main__.main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    talk.sendall(bytes([code]))
    os._exit(0)
"""
CLIENT = """#!{python} -IS
import json, os, socket, sys
talk = socket.socket(socket.AF_UNIX)
talk.connect({address!r})
told = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(talk, [told], [0, 1, 2])
sys.exit(talk.recv(1)[0])
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a guide, and what is to be done with it."""

    language: str
    text: str
    rule: str = ""
    told: str = ""
    output: str | None = None

    @property
    def file(self) -> str | None:
        """The name of the file that it is, if it is one."""
        found = TITLED.fullmatch(self.language)
        return found[1] if found else None

    @property
    def changed(self) -> str:
        """The text that is run."""
        text = self.text
        if self.rule != "in the test":
            return text
        for told in self.told.split("; "):
            old, arrow, new = told.partition(" => ")
            if arrow:
                assert old in text, f"the comment changes {old!r}, which the block does not have"
                text = text.replace(old, new)
            else:
                pattern = r"^((?:.*\\\n)*.*\bcmbook train\b(?:.*\\\n)*.*)$"
                text, count = re.subn(pattern, rf"\1 {told}", text, flags=re.MULTILINE)
                assert count, "the comment adds settings, but nothing is trained"
        return text


def blocks_of(page: str) -> list[Block]:
    """All blocks of a page, outputs put to the block before."""
    found: list[Block] = []
    for fence in FENCE.finditer(page):
        language, text = fence.groups()
        if language == OUTPUT:
            assert found, "an output stands before everything that could print it"
            found[-1] = Block(**vars(found[-1]) | {"output": text})
            continue
        above = page[: fence.start()].rstrip("\n").rsplit("\n", 1)[-1]
        comment = COMMENT.fullmatch(above)
        found.append(Block(language, text, *(comment.groups() if comment else ())))
    return found


PARSED = {"costs"}  # its commands only count, for long; its Python is run by test_docs.py
GIVEN = {"healthy": ("cmbook/students/digits/cd", "runs/digits/cd")}  # a run to look at
PAGES = {path.stem: blocks_of(path.read_text(encoding="utf-8")) for path in GUIDES}


# ── running a page ──


@dataclass
class Reader:
    """Who works through a page: a folder, a shell, and a Python that remembers."""

    folder: Path
    environment: dict[str, str]
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__page__"})

    def run(self, block: Block, text: str) -> str:
        """Do what a block says, and return what it prints."""
        if block.file is not None:
            path = self.folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return ""
        return self.python(text) if block.language == "python" else self.bash(text)

    def python(self, text: str) -> str:
        said = io.StringIO()
        sys.path.insert(0, str(self.folder))  # for the files that the page has written
        try:
            with contextlib.redirect_stdout(said), contextlib.chdir(self.folder):
                exec(compile(text, "<block>", "exec"), self.names)
        finally:
            sys.path.remove(str(self.folder))
        return said.getvalue()

    def bash(self, text: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def environment_of(folder: Path) -> dict[str, str]:
    """That of a shell in which `cmbook` is the package of this checkout, and a port is free."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        "CMBOOK_CACHE": str(folder / "cache"),
        "FREE_PORT": port,
    }


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """A shell whose `cmbook` is a fork of one process that has imported everything already."""
    folder = tmp_path_factory.mktemp("bin")
    address = str(folder / "s")
    client = folder / "cmbook"
    client.write_text(CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
    client.chmod(0o755)
    environment = environment_of(folder)
    server = subprocess.Popen([sys.executable, "-c", SERVER, address], env=environment)
    for _ in range(600):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as talk:
            talk.connect(address)
            break
        time.sleep(0.1)
    yield environment
    server.kill()
    server.wait()


@pytest.mark.parametrize("page", PAGES)
def test_a_guide_runs_from_top_to_bottom_and_shows_what_it_says(page, shell, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    reader, as_shown = Reader(tmp_path, shell), True
    if page in GIVEN:
        shutil.copytree(ROOT / GIVEN[page][0], tmp_path / GIVEN[page][1])
    with torch.random.fork_rng([]):
        for block in PAGES[page]:
            if page in PARSED or block.rule == "only parsed in the test":
                parse(block.text) if block.language == "bash" else compile(block.text, page, "exec")
                continue
            as_shown = as_shown and not block.rule
            said = reader.run(block, block.changed)
            if as_shown and block.output is not None:
                assert_same(said, block.output)


def assert_same(said: str, shown: str) -> None:
    """Compare words exactly, numbers to 10% or two hundredths; `...` stands for anything."""
    number = r"-?\d[\d,]*\.?\d*(?:e[-+]?\d+)?"
    pattern, values = "", []
    for part in re.split(rf"(\.\.\.|\s+|{number})", shown.strip()):
        if re.fullmatch(number, part):
            values.append(float(part.replace(",", "")))
        pattern += (
            ".*?" if part == "..." else r"\s+" if part.isspace() else
            f"({number})" if re.fullmatch(number, part) else re.escape(part)
        )  # fmt: skip
    found = re.fullmatch(pattern, said.strip(), re.DOTALL)
    assert found, f"the page shows\n{shown}\nand this was said:\n{said}"
    for there, value in zip(found.groups(), values, strict=True):
        here = float(there.replace(",", ""))
        assert abs(here - value) <= 0.1 * abs(value) + 0.02, f"{value} in the page, {here} here"


# ── what is only parsed ──


def parse(text: str) -> None:
    """Read every command of a block as its own parser would; build the recipe that it names."""
    from torch.distributed.run import get_args_parser

    commands = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").split("\n")]
    for words in filter(None, commands):
        if words[0] == "torchrun":
            told = get_args_parser().parse_args(words[1:])
            assert told.module
            assert told.training_script == "cmbook"
            words = ["cmbook", *told.training_script_args]
        assert words[0] == "cmbook", words
        parse_command(words[1:])


def parse_command(arguments: list[str]) -> None:
    from cmbook import __main__ as line
    from cmbook import experiment
    from cmbook.interop import official
    from cmbook.interop.foreign import skeleton

    command = tyro.cli(
        line.Command,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
    )
    if isinstance(command, line.Official):
        assert command.name in official.OFFICIAL
    if isinstance(command, line.Train | line.Estimate) and not command.recipe.endswith(".toml"):
        recipe = experiment.loads(experiment.recipe_text(command.recipe), command.settings)
        if recipe.network is not None:
            assert skeleton(recipe.network, (3, 64, 64), None) is not None


# ── nothing is skipped ──


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_above_it_what_is_done_instead(page):
    text = (ROOT / f"docs/guides/{page}.md").read_text(encoding="utf-8")
    fences = re.findall(r"^[ >]*(?:```|~~~)", text, re.MULTILINE)  # an indented one is not read
    assert len(fences) == 2 * len(FENCE.findall(text))
    for block in PAGES[page]:
        known = block.language in ("bash", "python") or block.file
        assert known, f"what to do with {block.language}?"
        assert block.changed
    comments = re.findall(r"^<!-- (?!help|measured).*$", text, re.MULTILINE)
    assert len(comments) == sum(bool(block.rule) for block in PAGES[page]), "one is not read"


@pytest.mark.parametrize("page", PAGES)
def test_a_file_of_a_guide_is_used(page):
    blocks = PAGES[page]
    for place, block in enumerate(blocks):
        if block.file:
            path = Path(block.file)
            called = f"-m {path.parent}" if path.stem == "__main__" else path.stem
            later = "\n".join(other.text for other in blocks[place + 1 :])
            assert called in later, f"{block.file} is written and not used"


def test_what_is_added_from_outside_takes_less_than_forty_lines_each():
    files = [block for block in PAGES["extend"] if (block.file or "").endswith(".py")]
    assert {Path(block.file).stem for block in files} > {"method", "distance", "data"}
    assert all(len(block.text.splitlines()) < 40 for block in files)


def test_every_guide_is_in_the_navigation_of_the_site():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [path.name for path in GUIDES if f"guides/{path.name}" not in nav] == []


@pytest.mark.parametrize(
    ("told", "run"),
    [
        ("steps=9 => steps=2", "cmbook train a \\\n  steps=2\ncmbook sample b\n"),
        ("seed=1", "cmbook train a \\\n  steps=9 seed=1\ncmbook sample b\n"),
        ("steps=9 => steps=2; seed=1", "cmbook train a \\\n  steps=2 seed=1\ncmbook sample b\n"),
    ],
)
def test_a_comment_above_a_block_changes_what_is_run(told, run):
    code = "cmbook train a \\\n  steps=9\ncmbook sample b"
    (block,) = blocks_of(f"<!-- in the test: {told} -->\n\n```bash\n{code}\n```")
    assert block.changed == run


def test_a_comment_that_changes_nothing_is_an_error():
    (block,) = blocks_of("<!-- in the test: a => b -->\n\n```bash\ncmbook configs\n```")
    with pytest.raises(AssertionError, match="does not have"):
        _ = block.changed


@pytest.mark.parametrize(
    "command", ["cmbook train toy/ct objective.levles=3", "cmbook training toy/ct"]
)
def test_a_mistake_in_what_is_only_parsed_is_noticed(command):
    with pytest.raises((ValueError, SystemExit)):
        parse(command)


@pytest.mark.parametrize(
    ("said", "shown", "same"),
    [
        ("loss 1.04, done", "loss 1.0, done", True),
        ("loss 1.4, done", "loss 1.0, done", False),
        ("loss 1.0, gone", "loss 1.0, done", False),
        ("a\nb\nc 3", "a\n...\nc 3", True),
        ("1,010 images", "1,000 images", True),
    ],
)
def test_what_is_said_is_compared_with_what_is_shown(said, shown, same):
    with contextlib.nullcontext() if same else pytest.raises(AssertionError):
        assert_same(said, shown)


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "Agg"
    work = Path(sys.argv[2])
    work.mkdir(parents=True, exist_ok=True)
    (work / ".bin").mkdir(exist_ok=True)
    alias = work / ".bin" / "cmbook"
    alias.write_text(f'#!/bin/sh\nexec {sys.executable} -m cmbook "$@"\n', encoding="utf-8")
    alias.chmod(0o755)
    alone = Reader(work, environment_of(alias.parent))
    for each in PAGES[sys.argv[1]]:
        if each.rule != "only parsed in the test":
            start = time.perf_counter()
            print(f"── {each.language}, {each.text.strip().splitlines()[0]}", flush=True)
            print(alone.run(each, each.text), f"({time.perf_counter() - start:.1f} s)", flush=True)
