"""Checkpoints: whole or not there at all, and never what was not saved."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from cmbook import checkpoints
from cmbook.networks import MLP
from cmbook.parameterization import ConsistencyScalings, Preconditioned
from cmbook.training import Adam, RAdam, State, frozen_copy

FILES = [
    "average.safetensors", "student.safetensors", "target.safetensors", "state.pt",
    "experiment.toml", "manifest.json",
]  # fmt: skip


def state_of(step, seed=0, target=True, optimizer=Adam, width=8, averages=()):
    """A state whose every number depends on the seed and the step."""
    with torch.random.fork_rng():
        torch.manual_seed(1000 * seed + step)
        student, *others = [
            Preconditioned(MLP(width, 2).build((2,)), ConsistencyScalings()) for _ in range(3)
        ]
    built = optimizer().build(student)
    for parameter in student.parameters():
        parameter.grad = parameter.detach() ** 2
    built.step()
    average, second = (frozen_copy(model) for model in others)
    further = {decay: frozen_copy(average) for decay in averages}
    return State(student, built, average, second if target else None, step, further)


def bits(value):
    """Every number of a state, as something that compares exactly."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, torch.nn.Module | torch.optim.Optimizer):
        return bits(value.state_dict())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, State):
        return bits(vars(value))
    return [bits(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.fixture
def saved(tmp_path):
    return checkpoints.save(tmp_path, state_of(7), "# recipe\n")


@pytest.mark.parametrize("optimizer", [Adam, RAdam])
@pytest.mark.parametrize("target", [True, False])
def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path, target, optimizer):
    before = state_of(7, target=target, optimizer=optimizer)
    after = state_of(0, seed=1, target=target, optimizer=optimizer)
    checkpoints.restore(checkpoints.save(tmp_path, before, ""), after)
    assert bits(after) == bits(before)


def test_a_checkpoint_holds_these_files(saved):
    assert sorted(os.listdir(saved)) == sorted(FILES)


def test_a_checkpoint_without_target_holds_no_target(tmp_path):
    path = checkpoints.save(tmp_path, state_of(1, target=False), "")
    assert sorted({*FILES} - {*os.listdir(path)}) == ["target.safetensors"]


def test_the_newest_two_checkpoints_stay(tmp_path):
    for step in (5, 10, 15, 100):
        checkpoints.save(tmp_path, state_of(step), "")
    assert sorted(os.listdir(tmp_path)) == ["step-00000015", "step-00000100"]


KILLED = {
    "while tensors are written": (checkpoints, "save_file"),
    "while the optimizer is written": (torch, "save"),
    "while the recipe is written": (Path, "write_text"),
    "while bytes reach the disk": (os, "fsync"),
    "before the new name": (Path, "rename"),
    "while old checkpoints go": (shutil, "rmtree"),
}


@pytest.fixture(params=KILLED.values(), ids=KILLED.keys())
def killed(request, tmp_path, monkeypatch):
    """A folder with two checkpoints, whose third save was killed."""

    def kill(*arguments, **keywords):
        raise KeyboardInterrupt

    for step in (1, 2):
        checkpoints.save(tmp_path, state_of(step), "")
    monkeypatch.setattr(*request.param, kill)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path, state_of(3), "", keep=1)
    monkeypatch.undo()
    return tmp_path


def test_a_killed_save_leaves_the_previous_checkpoint_usable(killed):
    after = state_of(0)
    checkpoints.restore(killed / "step-00000002", after)
    assert bits(after) == bits(state_of(2))


def test_after_a_killed_save_every_checkpoint_is_whole(killed):
    for path in checkpoints.checkpoints(killed):
        checkpoints.verify(path)


def test_the_save_after_a_killed_one_succeeds_and_cleans_up(killed):
    checkpoints.save(killed, state_of(4), "")
    after = state_of(0)
    checkpoints.restore(checkpoints.checkpoints(killed)[-1], after)
    assert (bits(after), len(os.listdir(killed))) == (bits(state_of(4)), 2)


def test_a_full_disk_leaves_the_previous_checkpoint_usable(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, state_of(1), "")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(tmp_path, state_of(2), "")
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["step-00000001"]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name} (is not what was saved|cannot be read)"):
        checkpoints.verify(saved)


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_single_changed_byte_is_noticed(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not what was saved.*checkpoint before it"):
        checkpoints.restore(saved, state_of(0))


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_lost_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"has lost {name}"):
        checkpoints.verify(saved)


def test_a_checkpoint_without_manifest_is_none(saved):
    (saved / "manifest.json").unlink()
    assert checkpoints.checkpoints(saved.parent) == []


@pytest.mark.parametrize("manifest", ["{}", "[]", "5", "null", '{"state.pt": 3}'])
def test_a_manifest_that_vouches_for_nothing_is_refused(saved, manifest):
    (saved / "manifest.json").write_text(manifest, encoding="utf-8")
    with pytest.raises(ValueError, match=r"Delete .* to use the checkpoint before it"):
        checkpoints.verify(saved)


def test_an_incomplete_checkpoint_is_replaced_by_the_next_save_of_its_step(saved):
    (saved / "manifest.json").unlink()
    (saved / "state.pt").write_bytes(b"")
    checkpoints.save(saved.parent, state_of(7), "")
    checkpoints.verify(saved)


def test_other_folders_beside_checkpoints_do_not_disturb(saved):
    for name in ("step-", "step-last", "step-1", "notes"):
        (saved.parent / name).mkdir()
        (saved.parent / name / "manifest.json").write_text("{}", encoding="utf-8")
    assert checkpoints.checkpoints(saved.parent) == [saved]


def forged(path, name, content):
    """A file replaced by one who also corrects the manifest."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest[name] = checkpoints._sha256(path / name)
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("name", FILES[:4])
def test_a_forged_file_is_refused_in_one_sentence(saved, name):
    forged(saved, name, b"forged")
    with pytest.raises(ValueError, match=name):
        checkpoints.restore(saved, state_of(0))


def test_the_state_of_a_checkpoint_cannot_run_code(saved, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Code(), tmp_path / "code.pt")
    forged(saved, "state.pt", (tmp_path / "code.pt").read_bytes())
    with pytest.raises(ValueError, match=r"state\.pt"):
        checkpoints.restore(saved, state_of(0))
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network_are_refused_with_both_shapes(saved):
    with pytest.raises(ValueError, match=r"is \[8, 64\], expected \[9, 64\]"):
        checkpoints.restore(saved, state_of(0, width=9))


def test_a_refused_fill_leaves_the_model_as_it_was(saved):
    model = state_of(0).student
    before = bits(model)
    weights = checkpoints.read_weights(saved, "average")
    weights.popitem()
    with pytest.raises(ValueError, match=r"net.outlet.weight is missing, expected \[2, 8\]"):
        checkpoints.fill(model, weights, saved)
    assert bits(model) == before


def test_a_checkpoint_of_a_method_without_target_cannot_resume_one_with(tmp_path):
    path = checkpoints.save(tmp_path, state_of(1, target=False), "")
    with pytest.raises(ValueError, match="holds no target weights"):
        checkpoints.restore(path, state_of(0))


def test_further_averages_are_saved_and_restored_by_their_decays(tmp_path):
    before, after = (state_of(7, seed, averages=(0.99, 1e-5)) for seed in (0, 1))
    path = checkpoints.save(tmp_path, before, "")
    names = {"average-0.99.safetensors", "average-1e-05.safetensors"}
    assert names == {*os.listdir(path)} - {*FILES}
    checkpoints.restore(path, after)
    assert bits(after) == bits(before)


def test_a_checkpoint_without_an_average_cannot_resume_a_run_with_it(saved):
    with pytest.raises(ValueError, match=r"holds no average-0\.9 weights"):
        checkpoints.restore(saved, state_of(0, averages=(0.9,)))
