"""Several processes: they take the steps of one, and stop, resume and fail together.

One pair of processes plays all scenes of pair.py; another is started by torchrun.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from pair import METHODS, RECIPE, RING, recipe, trained

import cmbook
from cmbook import load, run
from cmbook.checkpoints import checkpoints
from cmbook.processes import ALONE, Processes, together

HERE = Path(__file__).parent
PACKAGE = Path(cmbook.__file__).parents[1]
# CPU, float32. Two parts: a + b is b + a. More: sums of another order.
EXACT = {"rtol": 0.0, "atol": 0.0}
ROUNDED = {"rtol": 1e-5, "atol": 1e-6}
PLAY = """
from jaxtyping import install_import_hook
install_import_hook("cmbook", "typecheck.typecheck")
import sys, pathlib, pair
pair.everything(pathlib.Path(sys.argv[1]))
"""


def environment(**more):
    paths = os.pathsep.join([str(PACKAGE), str(HERE), os.environ.get("PYTHONPATH", "")])
    quiet = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **quiet, **more}


def free_port():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return str(door.getsockname()[1])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in each of the processes: another number of threads may add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run of one process, in two shards, that was stopped after three steps; and its whole."""
    folder = tmp_path_factory.mktemp("half")
    run(recipe(accumulation=2), folder / "whole", progress=False)
    shutil.copytree(folder / "whole", folder / "half")
    shutil.rmtree(folder / "half/checkpoints/step-00000006")
    return folder


@pytest.fixture(scope="module")
def played(half, tmp_path_factory):
    """What each of two processes found, their exit codes, and the folder of their runs."""
    folder = tmp_path_factory.mktemp("played")
    shutil.copytree(half / "half", folder / "resumed")
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PLAY, str(folder)],
            env=environment(
                RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            ),
            cwd=folder,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        codes = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    return found, codes, folder


def weights(folder, step=6):
    """Every file of weights of a checkpoint, to its last byte."""
    path = folder / f"checkpoints/step-{step:08d}"
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


# they take the steps of one


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_take_the_steps_of_one_with_two_shards(played, method):
    """Weights, averages, losses, levels and norms; though the second began with other weights."""
    alone = trained(method, ALONE, 2)
    for found in played[0]:
        for name, expected in alone.items():
            torch.testing.assert_close(found[method][name], expected, **EXACT)


def test_two_processes_of_two_shards_take_the_steps_of_one_with_four(played):
    alone = trained("cd", ALONE, 4)
    for name, expected in alone.items():
        torch.testing.assert_close(played[0][0]["two shards each"][name], expected, **ROUNDED)


@pytest.mark.parametrize("method", [*METHODS, "two shards each"])
def test_all_processes_hold_equal_bits(played, method):
    first, second = (found[method] for found in played[0])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_forgotten_sums_are_noticed(played):
    """What a wrapper would do whose hook a forward-mode derivative goes around."""
    first, second = (found["without sums"] for found in played[0])
    right = trained("continuous training", ALONE, 2)
    assert not torch.allclose(first["state"], right["state"], **ROUNDED)
    assert not torch.equal(first["state"], second["state"])
    for found in (first, second):
        assert "ValueError: processes [1] no longer hold the weights" in found["said"]


def test_every_sample_is_taken_once(played):
    """Shard by shard: the first process has the first two quarters of every batch."""
    shares = [found["shares"].unflatten(0, (4, 2)) for found in played[0]]
    batches = RING.batches(16, 0)
    for step in range(4):
        taken = torch.cat([share[step].flatten(0, 1) for share in shares])
        assert torch.equal(taken, next(batches).x)


def test_one_process_answers_for_all(played):
    first, second = (found["on main"] for found in played[0])
    assert first == second
    assert [found["any"] for found in played[0]] == [[True, True, False]] * 2


# a run of several


def test_a_run_of_one_is_resumed_by_two_and_ends_as_if_undisturbed(half, played):
    found, _, folder = played
    assert [each["resumed"] for each in found] == [6, 6]
    assert weights(folder / "resumed") == weights(half / "whole")


def test_the_command_line_does_the_same_and_the_main_process_alone_speaks(half, played):
    found, _, folder = played
    assert "commanded is done: 6 steps" in found[0]["commanded"]
    assert found[1]["commanded"] == ""
    assert weights(folder / "commanded") == weights(half / "whole")
    log = (folder / "commanded/log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in log] == ["step", "3", "6"]
    without_time = [
        [row.split(",")[:2] + row.split(",")[3:] for row in rows]
        for rows in (log, (half / "whole/log.csv").read_text().splitlines())
    ]
    assert without_time[0] == without_time[1]


def record(folder):
    return tomllib.loads((folder / "experiment.toml").read_text())["record"]


def test_the_record_tells_the_number_of_processes(half, played):
    assert record(half / "whole")["processes"] == 1
    assert record(played[2] / "commanded")["processes"] == 2
    assert record(played[2] / "commanded")["device"] == "cpu"


@pytest.mark.parametrize("scene", ["uneven", "uneven batch"])
def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_made(played, scene):
    found, _, folder = played
    for each in found:
        assert each[scene] == (
            "ValueError: a batch of 9 cannot be cut into 2 equal shards; choose a batch size that "
            "accumulation times the number of processes = 2 divides"
        )
    assert not (folder / "uneven").exists()


def test_one_process_claims_the_folder_and_if_it_is_taken_all_stop(played):
    main, other = (found["occupied"] for found in played[0])
    assert re.search(r"ValueError: .* already holds a run; --resume", main)
    assert other == "Abandoned: process 1 of 2 stops with the main process"


def test_a_signal_to_one_process_stops_all_after_the_step_with_one_checkpoint(played):
    found, _, folder = played
    for each in found:
        assert each["interrupted"].startswith("Interrupted: stopped after step 4 of 6;")
    names = [path.name for path in checkpoints(folder / "interrupted/checkpoints")]
    assert names == ["step-00000003", "step-00000004"]


# That of the processes sent a signal in the midst of a step.
OTHER_CODE = "note: from step 4 on: other code in losses.ct.ConsistencyTraining.__call__\n"


def test_what_two_processes_began_one_ends_with_two_shards(half, played, tmp_path, capsys):
    folder = shutil.copytree(played[2] / "interrupted", tmp_path / "run")
    run(recipe(accumulation=2), folder, resume=True, progress=False)
    assert weights(folder) == weights(half / "whole")
    assert capsys.readouterr().err == OTHER_CODE
    assert record(folder)["processes"] == 1


def test_who_resumes_with_other_shards_is_told(half, played, tmp_path, capsys):
    folder = shutil.copytree(played[2] / "interrupted", tmp_path / "run")
    assert run(recipe(), folder, resume=True, progress=False).finished
    said = capsys.readouterr().err
    said = said.removesuffix(OTHER_CODE)
    assert re.search(r"^note: .*run were cut into 2, .* now into 1: .*accumulation = 2\n$", said)
    assert weights(folder) != weights(half / "whole")


def test_another_accumulation_is_another_recipe_unless_the_shards_are_the_same(half, tmp_path):
    folder = shutil.copytree(half / "half", tmp_path / "run")
    with pytest.raises(ValueError, match=r"training\.accumulation was 2, now 4"):
        run(recipe(accumulation=4), folder, resume=True, progress=False)


def test_when_one_process_dies_the_other_ends(played):
    found, codes, _ = played
    assert codes == [7, -signal.SIGKILL]
    assert found[0]["bereaved"].startswith("Abandoned: process 0 of 2 stops, for it has lost")


# torchrun


def test_torchrun_is_stopped_by_a_signal_and_gone_on_with_by_one_process(tmp_path):
    """A cluster that takes its machine back sends SIGTERM to torchrun."""
    (tmp_path / "ring.toml").write_text(RECIPE, encoding="utf-8")
    knobs = {"steps": 150, "save_every": 5}
    settings = [f"training.{name}={value}" for name, value in knobs.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    training = ["--nproc-per-node", "2", "-m", "cmbook", "train", "ring.toml", *settings]
    started = subprocess.Popen(
        [*launcher, *training, "--device", "cpu", "--out", "run"],
        env=environment(), cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 200
        while not checkpoints(tmp_path / "run/checkpoints") and time.monotonic() < until:
            time.sleep(0.05)
        started.send_signal(signal.SIGTERM)
        said = started.communicate(timeout=100)[1]
    finally:
        started.kill()
    stopped = re.findall(r"cmbook: stopped after step (\d+) of 150; .* Go on with --resume", said)
    assert len(stopped) == 1, said
    assert load(tmp_path / "run").step == int(stopped[0]) < 150
    whole, again = recipe(**knobs, accumulation=2), tmp_path / "whole"
    run(whole, tmp_path / "run", resume=True, progress=False)
    run(whole, again, progress=False)
    assert weights(tmp_path / "run", 150) == weights(again, 150)


# alone


def test_alone_nothing_happens():
    a = torch.ones(2)
    ALONE.add([a])
    ALONE.copy([a])
    ALONE.check_equal([a])
    assert ALONE.gather(a) is a
    assert (ALONE.any(True), ALONE.any(False), ALONE.on_main(lambda: 5)) == (True, False, 5)
    assert torch.equal(a, torch.ones(2))
    assert Processes(3, 8).shards(2) == range(6, 8)


def test_a_process_without_torchrun_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with together() as processes:
        assert processes is ALONE


def test_training_alone_does_without_accelerate(tmp_path):
    (tmp_path / "ring.toml").write_text(RECIPE, encoding="utf-8")
    code = "import sys; from cmbook.__main__ import main; main(['train', 'ring.toml']); "
    code += "print('accelerate' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=tmp_path, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "False"


MANY = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("without", "device", "message"),
    [
        ("LOCAL_RANK", "cpu", "WORLD_SIZE = 2 says .* but LOCAL_RANK is not set; .* torchrun"),
        ("", "cuda:1", "takes the GPU of its own number; got 'cuda:1', expected auto, cpu or cuda"),
        ("", "cuda", "process 0 of this machine has no GPU, for there are 0; .* --device cpu"),
    ],
)
def test_what_cannot_be_is_refused_before_anyone_is_waited_for(
    monkeypatch, without, device, message
):
    for name, value in MANY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(without, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=message), together(device):
        pass
