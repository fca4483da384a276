"""Survival: whatever stops a run, nothing is lost, and the end is that of an undisturbed one."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import cmbook
from cmbook import ProgressiveDistillation, Toy, checkpoints, disk, load, run, runs
from cmbook.__main__ import main
from cmbook.data import TensorData
from cmbook.protocols import Batch
from cmbook.runs import Interrupted
from cmbook.training import Adam, Diverged, RAdam
from tests.test_runs import (
    CT_RUN,
    EDM_RUN,
    SHARDED_RUN,
    TARGETED_RUN,
    TRAINING,
    files,
    make,
    numbers,
)

HERE = Path(__file__).parent


def saved(folder):
    """The checkpoints of a run, oldest first."""
    return checkpoints.checkpoints(folder / "checkpoints")


def rows(folder):
    """log.csv without its seconds."""
    lines = (folder / "log.csv").read_text().splitlines()
    return [[cell for i, cell in enumerate(line.split(",")) if i != 2] for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    make(CT_RUN, folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


# kill -9


def killed(folder, steps, kills, processes):
    """What tests/killed.py says after so many kills."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(cmbook.__file__).parents[1])
    command = [sys.executable, str(HERE / "killed.py"), str(folder)]
    numbers = [str(number) for number in (steps, kills, processes)]
    done = subprocess.run(
        [*command, *numbers], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_kills(tmp_path, kills, processes):
    steps = 12 * kills
    killed(tmp_path / "undisturbed", steps, 0, processes)
    told = killed(tmp_path / "killed", steps, kills, processes)
    assert told["kills"] == kills
    ours, theirs = (saved(tmp_path / name)[-1] for name in ("killed", "undisturbed"))
    assert ours.name == theirs.name == f"step-{steps:08d}"
    assert numbers(ours) == numbers(theirs)
    assert rows(tmp_path / "killed") == rows(tmp_path / "undisturbed")
    return told


def test_eight_kills_change_no_bit(tmp_path):
    check_kills(tmp_path, 8, 1)


@pytest.mark.slow
def test_eighty_kills_change_no_bit_and_many_hit_a_save(tmp_path):
    assert check_kills(tmp_path, 80, 1)["in a save"] >= 10


@pytest.mark.slow
def test_twenty_kills_of_two_processes_change_no_bit(tmp_path):
    check_kills(tmp_path, 20, 2)


# signals


def stop_at_first_save(monkeypatch, number):
    """This very process gets a signal in the middle of its first save."""
    save = checkpoints.save

    def interrupted(*arguments, **knobs):
        monkeypatch.setattr(checkpoints, "save", save)
        os.kill(os.getpid(), number)
        return save(*arguments, **knobs)

    monkeypatch.setattr(checkpoints, "save", interrupted)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path, monkeypatch, name):
    before = signal.getsignal(getattr(signal, name))
    make(TARGETED_RUN, tmp_path / "undisturbed")
    stop_at_first_save(monkeypatch, getattr(signal, name))
    with pytest.raises(Interrupted, match="stopped after step 4 of 6; the checkpoint is in"):
        make(TARGETED_RUN, tmp_path / "run")
    assert [path.name for path in saved(tmp_path / "run")] == ["step-00000003", "step-00000004"]
    assert signal.getsignal(getattr(signal, name)) == before
    make(TARGETED_RUN, tmp_path / "run", resume=True)
    ours, theirs = (saved(tmp_path / name)[-1] for name in ("run", "undisturbed"))
    assert numbers(ours) == numbers(theirs)


def test_nohup_is_heard(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_at_first_save(monkeypatch, signal.SIGHUP)
        assert make(CT_RUN, tmp_path).finished
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_that_comes_twice_is_one(tmp_path, monkeypatch, name):
    save = checkpoints.save

    def interrupted(*arguments, **knobs):
        monkeypatch.setattr(checkpoints, "save", save)
        for _ in range(3):
            os.kill(os.getpid(), getattr(signal, name))
        return save(*arguments, **knobs)

    monkeypatch.setattr(checkpoints, "save", interrupted)
    with pytest.raises(Interrupted, match="stopped after step 4 of 6"):
        make(CT_RUN, tmp_path)
    assert load(tmp_path).step == 4


def test_a_second_ctrl_c_that_comes_later_stops_at_once(monkeypatch):
    now = iter([0.0, 0.0, 0.5, 0.5, 3.0, 3.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))

    def three():
        with runs._patience(False) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped.is_set()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        three()


def test_a_signal_in_the_last_step_of_a_round_stops_before_the_next(tmp_path, monkeypatch):
    make(EDM_RUN, tmp_path / "teacher")
    recipe = replace(
        EDM_RUN, objective=ProgressiveDistillation(steps=4, last=2), network=None,
        teacher=str(tmp_path / "teacher"), training=replace(TRAINING, save_every=6),
    )  # fmt: skip
    stop_at_first_save(monkeypatch, signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"stopped after step 6 of 6; the checkpoint is in .*p-4"):
        make(recipe, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    slower = replace(recipe, training=replace(recipe.training, optimizer=Adam(lr=1e-4)))
    made = make(slower, tmp_path / "p", resume=True, changed=True)  # the finished round stays
    assert made.recipe.training == slower.training
    assert load(tmp_path / "p-4").recipe.training == recipe.training


# the disk


FAILING = {
    "of weights": ("cmbook.checkpoints.save_file", SafetensorError("I/O error: No space left")),
    "of the optimizer": ("torch.save", RuntimeError("unexpected pos 64 vs 0")),
    "at the end": ("os.fsync", OSError(errno.ENOSPC, "No space left on device")),
}


@pytest.mark.parametrize(("name", "error"), FAILING.values(), ids=FAILING.keys())
def test_a_full_disk_ends_in_a_sentence_and_takes_nothing(tmp_path, monkeypatch, name, error):
    save = checkpoints.save

    def fail(*arguments, **knobs):
        raise error

    def second(*arguments, **knobs):
        with monkeypatch.context() as broken:
            if saved(tmp_path):
                broken.setattr(name, fail)
            return save(*arguments, **knobs)

    monkeypatch.setattr(checkpoints, "save", second)
    told = r"step 6 of .* could not be saved: .*step-00000003 is good; mend .* with --resume"
    with pytest.raises(OSError, match=told):
        make(CT_RUN, tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000003"]
    assert make(CT_RUN, tmp_path, resume=True).finished


def test_a_disk_that_is_really_full_ends_in_a_sentence(tmp_path):
    limited = f"ulimit -f 64; exec {sys.executable} -m cmbook train toy/edm --out run"
    environment = {**os.environ, "PYTHONPATH": str(Path(cmbook.__file__).parents[1])}
    done = subprocess.run(
        ["bash", "-c", f"{limited} training.steps=3 training.save_every=1"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "step 1 of run could not be saved" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "run" / "checkpoints") == []


def test_what_cannot_be_saved_is_not_begun(tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(ValueError, match=r"a checkpoint of this run takes .* GB left; make room"):
        make(CT_RUN, tmp_path)


def test_a_folder_that_cannot_be_written_ends_in_a_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "toy/edm", "--out", "/proc/self/run"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("cmbook: ")


def test_old_checkpoints_go_when_the_new_one_is_on_disk(tmp_path, monkeypatch):
    events, rmtree, fsync = [], shutil.rmtree, os.fsync

    def flushed(handle):
        events.append("flush")
        fsync(handle)

    def removed(path, *rest, **knobs):
        events.append(Path(path).name)
        if "unfinished-step-00000002" in str(path):  # the oldest of three
            checkpoints.verify(tmp_path / "checkpoints" / "step-00000006")
            assert events[-2] == "flush"
        rmtree(path, *rest, **knobs)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    make(replace(CT_RUN, training=replace(TRAINING, save_every=2)), tmp_path)
    assert ".unfinished-step-00000002" in events


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "log.csv"
    with disk.replacing(path) as file:
        file.write(b"old")

    def killed():
        with disk.replacing(path) as file:
            file.write(b"n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["log.csv"]


def test_a_log_is_not_lost_when_a_resume_is_killed(copied, monkeypatch):
    before = (copied / "log.csv").read_bytes()
    shutil.rmtree(saved(copied)[-1])

    def kill(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        runs._Log(copied / "log.csv", 3)
    assert (copied / "log.csv").read_bytes() == before


def test_a_refused_replacement_leaves_the_old_run(copied, monkeypatch):
    full = shutil.disk_usage(copied)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    before = files(copied)
    wider = replace(CT_RUN, network=replace(CT_RUN.network, width=512))
    with pytest.raises(ValueError, match="make room"):
        make(wider, copied, overwrite=True)
    assert {**files(copied), ".lock": b""} == {**before, ".lock": b""}


def test_a_disk_that_is_full_is_called_full(tmp_path, monkeypatch):
    def fail(state, file):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(runs, "_check_room", lambda *arguments: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match="could not be saved: no space left on the disk"):
        make(CT_RUN, tmp_path)


def test_a_row_that_cannot_be_written_waits_for_the_next(finished, tmp_path, monkeypatch, capsys):
    real, failed = Path.open, []

    def full(self, mode="r", **knobs):
        if self.name == "log.csv" and "a" in mode and not failed:
            failed.append(self)
            with real(self, mode, **knobs) as file:
                file.write("1,0.5")  # what had room
            raise OSError(errno.ENOSPC, "no space left")
        return real(self, mode, **knobs)

    monkeypatch.setattr(Path, "open", full)
    make(CT_RUN, tmp_path / "run")
    assert failed
    assert "log.csv cannot be written: no space left; its rows wait" in capsys.readouterr().err
    shutil.copy(tmp_path / "run/log.csv", tmp_path / "log.csv")
    runs._Log(tmp_path / "log.csv", CT_RUN.training.steps)  # what a resumed run reads
    assert rows(tmp_path) == rows(finished)


# one writer


def test_two_runs_in_one_folder_are_kept_apart(copied):
    shutil.rmtree(saved(copied)[-1])
    before = files(copied)
    told = rf"process {os.getpid()} of .* is at work in .*run; wait until it ends"
    with disk.owned(copied):
        for knobs in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=told):
                make(CT_RUN, copied, **knobs)
    assert {**files(copied), ".lock": b""} == {**before, ".lock": b""}
    assert make(CT_RUN, copied, resume=True).finished


def test_the_lock_of_another_user_locks_too(tmp_path, monkeypatch):
    real = os.open

    def foreign(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "not yours", str(path))
        return real(path, flags, *mode)

    with disk.owned(tmp_path):
        monkeypatch.setattr(os, "open", foreign)
        with pytest.raises(ValueError, match="is at work"), disk.owned(tmp_path):
            pass
    with disk.owned(tmp_path):
        pass
    (tmp_path / disk.LOCK).unlink()
    with pytest.raises(PermissionError), disk.owned(tmp_path):
        pass


def test_who_reads_while_checkpoints_are_pruned_gets_the_newer_one(copied, monkeypatch):
    old, real, asked = saved(copied)[-1], checkpoints.verify, []

    def pruned(path):
        asked.append(path.name)
        if len(asked) == 1:  # meanwhile the run has gone on
            shutil.copytree(path, path.with_name("step-99999999"))
            shutil.rmtree(path)
        real(path)

    monkeypatch.setattr(checkpoints, "verify", pruned)
    assert load(copied).finished
    assert asked == [old.name, "step-99999999"]


def test_checkpoints_are_ordered_by_their_steps_however_many(tmp_path):
    for step in (100_000_000, 99_999_999, 5):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "manifest.json").touch()
    (tmp_path / "step-00000007-copy").mkdir()
    (tmp_path / "step-00000007-copy" / "manifest.json").touch()
    found = [path.name for path in checkpoints.checkpoints(tmp_path)]
    assert found == ["step-00000005", "step-99999999", "step-100000000"]


def test_rounds_that_were_being_replaced_when_they_were_killed_can_be_resumed(tmp_path):
    teacher = tmp_path / "teacher"
    make(EDM_RUN, teacher)
    recipe = replace(
        EDM_RUN, objective=ProgressiveDistillation(steps=4, last=2), network=None,
        teacher=str(teacher),
    )  # fmt: skip
    make(recipe, tmp_path / "run")
    anew = replace(recipe, seed=1)

    def killed(*given, **knobs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            make(anew, tmp_path / "run", overwrite=True)
    make(anew, tmp_path / "run", resume=True)
    make(anew, tmp_path / "straight")
    ours, theirs = (saved(tmp_path / name)[-1] for name in ("run", "straight"))
    weights = [load_file(path / "average.safetensors") for path in (ours, theirs)]
    assert all(torch.equal(weights[0][name], w) for name, w in weights[1].items())


def test_clearing_spares_what_is_no_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is no run of cmbook"):
        runs.clear(tmp_path)
    runs.clear(tmp_path / "nothing")
    make(EDM_RUN, tmp_path / "run")
    with disk.owned(tmp_path / "run"), pytest.raises(ValueError, match="is at work"):
        runs.clear(tmp_path / "run")
    runs.clear(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_run_that_ended_meanwhile_is_not_written_into(tmp_path, monkeypatch):
    owned = disk.owned

    def late(folder):
        monkeypatch.setattr(disk, "owned", owned)
        make(EDM_RUN, folder)  # another was faster
        return owned(folder)

    monkeypatch.setattr(disk, "owned", late)
    with pytest.raises(ValueError, match="already holds a run"):
        make(CT_RUN, tmp_path)
    assert load(tmp_path).recipe == EDM_RUN


@pytest.mark.parametrize("what", ["deleted", "begun anew"])
def test_a_folder_that_was_taken_away_is_not_written_into(tmp_path, monkeypatch, what):
    save, folder = checkpoints.save, tmp_path / "run"

    def late(*arguments, **knobs):
        monkeypatch.setattr(checkpoints, "save", save)
        path = save(*arguments, **knobs)
        shutil.rmtree(folder)
        if what == "begun anew":
            make(EDM_RUN, folder)
        return path

    monkeypatch.setattr(checkpoints, "save", late)
    with pytest.raises(ValueError, match="was moved, deleted or begun anew while this run was at"):
        make(CT_RUN, folder)
    assert folder.exists() == (what == "begun anew")
    if folder.exists():
        assert load(folder).recipe == EDM_RUN


def test_where_no_locks_are_known_a_run_goes_on(tmp_path, monkeypatch):
    import fcntl

    def unknown(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    assert make(CT_RUN, tmp_path).finished


# another recipe


def test_another_recipe_is_gone_on_with_if_told(copied, capsys):
    shutil.rmtree(saved(copied)[-1])
    faster = replace(CT_RUN, training=replace(TRAINING, optimizer=RAdam(lr=0.01)))
    with pytest.raises(ValueError, match=r"lr was 0\.001, now 0\.01.* go on with these by --chang"):
        make(faster, copied, resume=True)
    make(faster, copied, resume=True, changed=True)
    assert "note: from step 3 on: training.optimizer.kind was 'Adam', now 'RAdam'" in (
        capsys.readouterr().err
    )
    assert load(copied).record["changes"][0].startswith("from step 3 on: training.optimizer.kind")
    group = torch.load(saved(copied)[-1] / "state.pt", weights_only=True)["optimizer"]
    assert group["param_groups"][0]["lr"] == pytest.approx(faster.training.learning_rate.peak, 1)


def test_a_change_is_told_once_and_kept(copied, capsys):
    shutil.rmtree(saved(copied)[-1])
    longer = replace(CT_RUN, training=replace(TRAINING, steps=8))
    longest = replace(CT_RUN, training=replace(TRAINING, steps=12))
    make(longer, copied, resume=True, changed=True)
    capsys.readouterr()
    make(longer, copied, resume=True, changed=True)
    assert "from step" not in capsys.readouterr().err
    make(longest, copied, resume=True, changed=True)
    steps = [line.split(":")[0] for line in load(copied).record["changes"]]
    assert steps == ["from step 3 on", "from step 8 on"]
    assert load(copied).step == 12


def test_more_steps_rescale_what_depends_on_their_number_and_say_so(copied, capsys):
    longer = replace(CT_RUN, training=replace(TRAINING, steps=60))
    make(longer, copied, resume=True, changed=True)
    told = capsys.readouterr().err
    assert "from step 6 on: training.steps was 6, now 60" in told
    assert "schedules are functions of k/K, and K is another" in told
    assert "N was 9, now 5" in told


@pytest.mark.parametrize("steps", [5, 6])
def test_steps_that_are_taken_are_not_taken_back(copied, steps):
    shorter = replace(CT_RUN, training=replace(TRAINING, steps=steps, average_decay=0.25))
    before = files(copied)
    with pytest.raises(ValueError, match=f"has taken 6 steps, and this recipe wants {steps}"):
        make(shorter, copied, resume=True, changed=True)
    assert {**files(copied), ".lock": b""} == {**before, ".lock": b""}


def test_an_average_cannot_begin_in_the_middle(copied):
    longer = replace(CT_RUN, training=replace(TRAINING, steps=60, also_average=(0.25,)))
    before = files(copied)
    with pytest.raises(ValueError, match=r"an average of decay 0\.25 cannot begin at step 6"):
        make(longer, copied, resume=True, changed=True)
    assert {**files(copied), ".lock": b""} == {**before, ".lock": b""}


def test_changed_alone_is_refused(tmp_path):
    for knobs in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match="--changed goes on with a run that is there"):
            make(CT_RUN, tmp_path / "run", changed=True, **knobs)


def test_the_record_tells_of_another_machine(copied, capsys):
    shutil.rmtree(saved(copied)[-1])
    path = copied / "experiment.toml"
    path.write_text(re.sub(r'torch = ".*"', 'torch = "2.0.0"', path.read_text()))
    make(CT_RUN, copied, resume=True)
    told = f"from step 3 on: torch was 2.0.0, now {torch.__version__}"
    assert load(copied).record["changes"] == [told]
    assert told in capsys.readouterr().err


def test_other_data_are_gone_on_with_if_told(copied, capsys):
    shutil.rmtree(saved(copied)[-1])
    other = replace(CT_RUN, data=Toy("moons"))
    make(other, copied, resume=True, changed=True)
    assert "data.world was" in (told := capsys.readouterr().err)
    assert "other data" in told
    assert load(copied).recipe == other


def test_another_network_is_refused_before_anything_is_written(copied):
    shutil.rmtree(saved(copied)[-1])
    before = files(copied)
    wider = replace(CT_RUN, network=replace(CT_RUN.network, width=32))
    with pytest.raises(ValueError, match="does not fit the network"):
        make(wider, copied, resume=True, changed=True)
    assert {**files(copied), ".lock": b""} == {**before, ".lock": b""}


# NaN


class Poisoned(TensorData):
    """Twelve points, the eighth of which is not finite, though that was never checked."""

    def __init__(self):
        super().__init__(torch.linspace(-1, 1, 24).reshape(12, 2))
        self.x[7, 1] = torch.nan


@pytest.mark.parametrize("recipe", [EDM_RUN, SHARDED_RUN], ids=["whole", "in shards"])
def test_data_that_are_not_finite_are_named_and_nothing_is_lost(tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(Toy, "build", lambda self: Poisoned())
    recipe = replace(recipe, training=replace(recipe.training, steps=60, batch_size=2))
    batches = Poisoned().batches(2, recipe.seed)
    bad = next(k for k, batch in enumerate(batches) if not bool(batch.x.isfinite().all()))
    where = int((~next(Poisoned().batches(2, recipe.seed, bad)).x.isfinite()).any(1).int().argmax())
    told = rf"in step {bad + 1}: the loss of sample {where} of its batch is nan, at sigma [\d.]+, "
    with pytest.raises(Diverged, match=told + "number 7 of the data, which is itself not finite"):
        make(recipe, tmp_path)
    if bad:
        assert load(tmp_path).step == bad
        weights = checkpoints.read_weights(saved(tmp_path)[-1], "student").values()
        assert all(bool(weight.isfinite().all()) for weight in weights)


def test_a_gradient_that_is_not_finite_reaches_no_weight(tmp_path):
    wild = replace(EDM_RUN, training=replace(TRAINING, optimizer=Adam(lr=1e36), warmup=0))
    with pytest.raises(Diverged, match=r"training has diverged.*step-0000000\d is good|yet"):
        make(wild, tmp_path)
    for path in saved(tmp_path):
        weights = checkpoints.read_weights(path, "student").values()
        assert all(bool(weight.isfinite().all()) for weight in weights)


def test_a_run_goes_on_after_a_diverged_step_with_a_smaller_rate(tmp_path):
    data, calls = Toy().build(), []

    class Once:
        """Data that were broken once."""

        shape, classes = data.shape, data.classes

        def batches(self, size, seed, start=0):
            for k, batch in enumerate(data.batches(size, seed, start), start):
                broken = k == 4 and not calls
                yield Batch(batch.x * torch.nan if broken else batch.x, batch.label)

        def held_out(self):
            return data.held_out()

        def sha256(self):
            return data.sha256()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Toy, "build", lambda self: Once())
        with pytest.raises(Diverged, match=r"in step 5.*which is itself not finite.*4 is good"):
            make(EDM_RUN, tmp_path)
        calls.append("mended")
        make(EDM_RUN, tmp_path, resume=True)
    make(EDM_RUN, tmp_path / "undisturbed")
    ours, theirs = (saved(folder)[-1] for folder in (tmp_path, tmp_path / "undisturbed"))
    assert numbers(ours) == numbers(theirs)


# the clock


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    make(CT_RUN, tmp_path / "undisturbed")
    jumps = iter([1e9, -1e9, 0.0, 4e9] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    run(CT_RUN, tmp_path / "run", progress=True)
    ours, theirs = (saved(tmp_path / name)[-1] for name in ("run", "undisturbed"))
    assert numbers(ours) == numbers(theirs)
    lines = (tmp_path / "run/log.csv").read_text().splitlines()[1:]
    seconds = [float(line.split(",")[2]) for line in lines]
    assert seconds == sorted(seconds)
    assert 0 < seconds[-1] < 60


def test_a_record_without_changes_tells_none(finished):
    record = tomllib.loads((finished / "experiment.toml").read_text())["record"]
    assert "changes" not in record
