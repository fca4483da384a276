"""Checkpoints: a folder of weights, recipe and state that is whole or not there at all.

    step-00001000/
        average.safetensors     the moving average: sample from this
        average-0.99.safetensors   further averages, by their decays
        student.safetensors     the weights that learn
        target.safetensors      θ⁻, where the method has one
        state.pt                the optimizer and the step
        experiment.toml         the recipe
        manifest.json           the SHA-256 of every file above

A checkpoint is written under another name, flushed to disk and then renamed: whatever kills
the process, the last complete checkpoint is untouched.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.serialization import get_crc32_options, set_crc32_options

from cmbook.disk import flush
from cmbook.training import State

Weights = dict[str, Tensor]
SHARED = {"average.safetensors", "experiment.toml"}  # enough to sample from
ALWAYS = SHARED | {"student.safetensors", "state.pt"}
ROOM = 1 << 20  # bytes: a disk with less is full
SHOWN = 5  # names that an error lists


def save(folder: Path, state: State, recipe: str, keep: int = 2) -> Path:
    """Write `folder/step-XXXXXXXX`; afterwards delete all but the newest `keep` checkpoints.

    Args:
        folder: Where the checkpoints of a run lie; made if missing.
        state: What training changes.
        recipe: The TOML text that the run was made from.
        keep: How many checkpoints stay.

    Returns:
        The path of the checkpoint.

    Raises:
        OSError: If it cannot be written. Earlier checkpoints are then still there.

    Source: ours.
    """
    path = folder / f"step-{state.step:08d}"
    if path in checkpoints(folder):
        return path
    for rest in [*folder.glob(path.name), *folder.glob(".unfinished-*")]:
        shutil.rmtree(rest, ignore_errors=True)
    with _whole(path) as put:
        moments = {"step": state.step, "optimizer": state.optimizer.state_dict()}
        put("state.pt", partial(_pickled, moments))  # the largest first: it is summed up longest
        for name, model in _models(state).items():
            put(f"{name}.safetensors", partial(save_file, _weights(model)))
        put("experiment.toml", partial(Path.write_text, data=recipe, encoding="utf-8"))
    for old in checkpoints(folder)[:-keep]:
        with suppress(OSError):  # the new one is safe, and the next save tries again
            shutil.rmtree(old.rename(folder / f".unfinished-{old.name}"))
    return path


def share(folder: Path, model: nn.Module, recipe: str, *, half: bool = False) -> None:
    """Write a model alone, without what only training needs: a folder that can be given away.

    Args:
        folder: Must not exist yet.
        model: Saved as `average`.
        recipe: The TOML text that it was made from, with a record of its step.
        half: Whether to store the weights in half precision, in half the space.

    Raises:
        ValueError: If the folder exists, or a weight has no half-precision value.

    Source: ours.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; name another folder")
    weights = _weights(model)
    if half:
        halved = {n for n, w in weights.items() if w.is_floating_point() and "frequencies" not in n}
        weights = {n: w.half() if n in halved else w for n, w in weights.items()}
        if not all(bool(w.isfinite().all()) for w in weights.values()):
            raise ValueError("a weight is too large for half precision; export without half")
    shutil.rmtree(folder.with_name(f".unfinished-{folder.name}"), ignore_errors=True)
    with _whole(folder) as put:
        put("average.safetensors", partial(save_file, weights))
        put("experiment.toml", partial(Path.write_text, data=recipe, encoding="utf-8"))


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first.

    Source: ours.
    """
    found = folder.glob("step-" + 8 * "[0-9]" + "*")  # from 100,000,000 steps on, more digits
    steps = {path: path.name.removeprefix("step-") for path in found}
    whole = [p for p, step in steps.items() if step.isdecimal() and (p / "manifest.json").is_file()]
    return sorted(whole, key=lambda path: int(steps[path]))


def verify(path: Path) -> None:
    """Refuse a checkpoint whose files are not what was written.

    Raises:
        ValueError: Naming the file that is missing, cut short or changed.

    Source: ours.
    """
    instead = f"Delete {path} to use the checkpoint before it"
    try:
        sums = dict(json.loads((path / "manifest.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}/manifest.json cannot be read. {instead}") from error
    for name in sorted({*sums, *(ALWAYS if path.name.startswith("step-") else SHARED)}):
        file = path / Path(name).name
        if name not in sums or not file.is_file():
            raise ValueError(f"checkpoint {path} has lost {name}. {instead}")
        if _sha256(file) != sums[name]:
            raise ValueError(
                f"{file} is not what was saved (its checksum differs): it was cut short or "
                f"edited. {instead}"
            )


def read_weights(path: Path, name: str) -> Weights:
    """The tensors of `average`, `average-0.99`, `student` or `target`, of a verified checkpoint.

    Raises:
        ValueError: If the checkpoint holds no such weights, or they cannot be read.

    Source: ours.
    """
    file = path / f"{name}.safetensors"
    if not file.is_file():
        raise ValueError(f"checkpoint {path} holds no {name} weights")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def read_moments(path: Path) -> dict[str, Any]:
    """The state of the optimizer in a checkpoint; `verify` it first.

    Raises:
        ValueError: If it cannot be read.

    Source: ours.
    """
    try:
        return dict(_state(path)["optimizer"])
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path}/state.pt cannot be read: {error!r}") from error


def _state(path: Path) -> dict[str, Any]:
    return dict(torch.load(path / "state.pt", map_location="cpu", weights_only=True))


def restore(path: Path, state: State) -> None:
    """Bring a state to where a checkpoint left it; the optimizer's settings stay as they are.

    Raises:
        ValueError: If the checkpoint is not whole, or is of another network.

    Source: ours.
    """
    verify(path)
    for name, model in _models(state).items():
        fill(model, read_weights(path, name), path)
    try:
        saved = _state(path)
        groups = zip(state.optimizer.param_groups, saved["optimizer"]["param_groups"], strict=True)
        knobs = [{**ours, "params": theirs["params"]} for ours, theirs in groups]
        state.optimizer.load_state_dict({**saved["optimizer"], "param_groups": knobs})
        state.step = int(saved["step"])
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path}/state.pt does not fit this optimizer: {error!r}") from error


def fill(model: nn.Module, weights: Weights, origin: Path) -> None:
    """Put weights into a model, all of them or none.

    Raises:
        ValueError: If names, shapes or kinds of numbers are not those of the model.

    Source: ours.
    """
    ours = model.state_dict()
    check_fit({name: weight.shape for name, weight in ours.items()}, weights, str(origin))
    for name, weight in weights.items():
        if weight.is_floating_point() != ours[name].is_floating_point():
            raise ValueError(f"{origin}: {name} holds {weight.dtype}, expected {ours[name].dtype}")
    empty = any(weight.is_meta for weight in ours.values())
    weights = {name: weight.to(ours[name].dtype) for name, weight in weights.items()}
    model.load_state_dict(weights, assign=empty)


def check_fit(ours: dict[str, Any], theirs: dict[str, Tensor], origin: str) -> None:
    """Refuse weights that are not those of the network.

    Args:
        ours: The shapes that are expected, by name.
        theirs: What is there.
        origin: For the message.

    Raises:
        ValueError: With at most five names and their shapes, and how many more there are.

    Source: ours.
    """
    wrong = []
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        want = list(ours[name]) if name in ours else None
        have = list(theirs[name].shape) if name in theirs else None
        if want != have:
            here = "is missing" if have is None else f"is {have}"
            wrong.append(f"{name} {here}, expected {'none' if want is None else want}")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        listed = "; ".join(wrong[:SHOWN])
        raise ValueError(f"{origin} does not fit the network: {listed}{more}")


@contextmanager
def _whole(path: Path) -> Iterator[Callable[[str, Callable[[Path], object]], None]]:
    """A folder that is whole or not there: checksums are added, then it gets its name.

    While one file is written, the one before it is summed up and flushed to disk.

    Yields:
        What puts a file into it, by its name and what writes it.
    """
    unfinished, sums = path.with_name(f".unfinished-{path.name}"), {}
    try:
        unfinished.mkdir(parents=True)
        with ThreadPoolExecutor() as pool:

            def put(name: str, write: Callable[[Path], object]) -> None:
                write(unfinished / name)
                sums[name] = pool.submit(_sealed, unfinished / name)

            yield put
        manifest = json.dumps({name: sums[name].result() for name in sorted(sums)}, indent=1)
        (unfinished / "manifest.json").write_text(f"{manifest}\n", encoding="utf-8")
        flush(unfinished / "manifest.json")
        flush(unfinished)
        unfinished.rename(path)
        flush(path.parent)
    except BaseException as error:  # also Ctrl-C: what is not whole does not stay
        full = unfinished.is_dir() and shutil.disk_usage(unfinished).free < ROOM
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, RuntimeError | SafetensorError):  # so the two libraries say it
            why = "no space left on the disk" if full else str(error).splitlines()[0]
            raise OSError(why) from error
        raise


def _pickled(state: dict[str, Any], file: Path) -> None:
    """`torch.save` without a checksum of its own, which takes four times as long as the bytes."""
    before = get_crc32_options()
    try:
        set_crc32_options(False)
        torch.save(state, file)
    finally:
        set_crc32_options(before)


def _sealed(file: Path) -> str:
    """The checksum of a file that is on disk."""
    found = _sha256(file)
    flush(file)
    return found


def _models(state: State) -> dict[str, nn.Module]:
    """Everything with weights in a state, by the names of their files."""
    further = {f"average-{decay}": average for decay, average in state.averages.items()}
    target = {} if state.target is None else {"target": state.target}
    return {"average": state.average, "student": state.student, **target, **further}


def _weights(model: nn.Module) -> Weights:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    part = bytearray(min(1 << 26, file.stat().st_size))  # large, so that threads seldom meet
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(part):
            found.update(memoryview(part)[:count])
    return found.hexdigest()
