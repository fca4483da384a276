"""The code that trains is written down, and what is another in it is found."""

import functools
import gzip
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from cmbook import EDM, MLP, EDMScalings, Experiment, NoiseRange, Toy, run, schedules, sources
from cmbook.experiment import Sampling, Training
from cmbook.losses import edm
from cmbook.noise import add_noise
from cmbook.schedules import DoublingLevels

BEFORE = sources.sources()
SHORT = Experiment(
    data=Toy(world="ring"),
    network=MLP(width=8, depth=1),
    scalings=EDMScalings(NoiseRange()),
    objective=EDM(),
    training=Training(steps=20, batch_size=16, save_every=10),
    sampling=Sampling(),
)


def changed() -> dict[str, str]:
    now = sources.sources()
    return {name: now[name] for name in sources.changed(BEFORE, now)}


def test_every_line_that_trains_is_there():
    for name in ("losses.edm.EDM.__call__", "training.train", "noise.add_noise", "ode.heun_step"):
        assert "def " in BEFORE[name], name
    assert BEFORE["losses.edm.add_noise"] == "cmbook.noise.add_noise"
    assert BEFORE["losses.regression.WEIGHTS['snr']"] == "cmbook.weights.snr"
    assert changed() == {}


def shifted(x0, z, sigma):
    return twice(add_noise(x0, z, sigma))


def twice(x):
    return 2 * x


def test_a_function_in_the_place_of_another_is_found_with_what_it_calls():
    with mock.patch.object(edm, "add_noise", shifted):
        found = changed()
    assert [*found] == ["losses.edm.add_noise"]
    assert "return twice(add_noise" in found["losses.edm.add_noise"]
    assert "return 2 * x" in found["losses.edm.add_noise"]


def test_a_wrapper_hides_nothing():
    old = DoublingLevels.levels_at

    @functools.wraps(old)
    def levels_at(self, clock):
        return old(self, clock) // 2

    with mock.patch.object(DoublingLevels, "levels_at", levels_at):
        found = changed()
    assert "// 2" in found["schedules.DoublingLevels.levels_at"]


def test_code_that_never_was_in_a_file_is_found():
    space = {"__name__": "__main__"}
    exec("def check(good, message): return 12345", space)
    with mock.patch.object(schedules, "_check", space["check"]):
        assert "12345" in changed()["schedules._check"]


def test_comments_and_docstrings_do_not_count():
    text = BEFORE["training.train"]
    other = text.replace('"""', '"""More. ', 1) + "    # a word\n"
    assert sources.changed({"a": text}, {"a": other}) == []
    assert sources.changed({"a": text}, {"a": other + "    return None\n"}) == ["a"]
    assert sources.changed({"a": "no python ("}, {"a": "nor this ("}) == ["a"]


def test_lines_are_those_that_one_text_has_alone():
    one, other = "def f(x):\n    y = x\n    return y", "def f(x):\n    y = x + 1\n    return y"
    assert sources.lines(one, other) == (["y = x"], ["y = x + 1"])


@pytest.mark.parametrize(
    "text",
    ["(" * 5000, "[" * 100 + "]" * 100, "a\n" * 10**6, "\0", "x = 1\n" * 10**6, "-" * 9000 + "1"],
)
def test_no_text_is_too_strange_to_be_compared(text):
    assert sources.changed({"a": text}, {"a": "return 1"}) == ["a"]
    left, right = sources.lines(text, "return 1")
    assert right == ["return 1"]
    assert len(left) <= 400


# ── in the folder of a run ──


def test_a_run_keeps_its_code(tmp_path):
    run(SHORT, tmp_path / "run", progress=False)
    kept = sources.read(tmp_path / "run")
    assert kept == BEFORE
    assert (tmp_path / "run" / sources.NAME).stat().st_size < 200_000


def test_going_on_with_other_code_is_told_and_recorded(tmp_path, capsys):
    longer = replace(SHORT, training=replace(SHORT.training, steps=40, decay="none"))
    shorter = replace(longer, training=replace(longer.training, steps=20))
    run(shorter, tmp_path / "run", progress=False)
    capsys.readouterr()
    with mock.patch.object(edm, "add_noise", shifted):
        made = run(longer, tmp_path / "run", resume=True, changed=True, progress=False)
    said = "from step 20 on: other code in losses.edm.add_noise"
    assert f"note: {said}" in capsys.readouterr().err
    assert said in made.record["changes"]


BROKEN = {
    "empty": b"",
    "no gzip": b"no gzip",
    "no json": gzip.compress(b"no json"),
    "a list": gzip.compress(b"[1]"),
    "a number for a file": gzip.compress(json.dumps({"a": 1}).encode()),
    "deeply nested": gzip.compress(b"[" * 100_000),
    "too large": gzip.compress(b" " * (sources.MOST + 1) + b"{}"),
    "cut": gzip.compress(b"{}")[:-3],
    "damaged": gzip.compress(b"{}")[:10] + b"\xff" * 20,
}


# By name: gzip writes the time into its bytes, and a test whose name holds it is another test
# in each worker.
@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_no_code_is_refused_in_a_sentence(tmp_path, content):
    with pytest.raises(ValueError, match="not there, or not whole"):
        sources.read(tmp_path)
    Path(tmp_path / sources.NAME).write_bytes(content)
    with pytest.raises(ValueError, match="not there, or not whole"):
        sources.read(tmp_path)
