"""A run: a recipe carried out in a folder, with checkpoints, a log, Ctrl-C and resume.

This stands on floor 4, not 3: it reads recipes, and `experiment` lives here.

    runs/digits/cd/
        experiment.toml     the recipe, and a record of seed, versions, threads and data
        log.csv             loss, seconds, gradient norm, learning rate and images, by steps
        checkpoints/        the last two
        tensorboard/        if asked for: the log as curves, and samples at every save
"""

import csv
import math
import platform
import shutil
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import nn

import cmbook
from cmbook import checkpoints, disk, doctor, experiment, sources
from cmbook.board import Board, summary_writer
from cmbook.data import Data, ImageData, TensorData, endless, fingerprint
from cmbook.data.readers import MOST_CLASSES
from cmbook.experiment import Experiment
from cmbook.guidance import guided
from cmbook.interop.foreign import skeleton
from cmbook.losses import ConsistencyTraining, ProgressiveDistillation
from cmbook.networks import MLP, Network
from cmbook.noise import PerImage, seeded
from cmbook.parameterization import ConsistencyScalings, EDMScalings, Preconditioned
from cmbook.processes import ALONE, Processes
from cmbook.protocols import Clock, Denoiser, Generator, Labels, Samples
from cmbook.samplers import multistep, ode_sample, prior, progressive
from cmbook.training import Diverged, State, Step, check_shards, distilled, train

LOG_EVERY = 50
_STUDENTS = Path(str(files("cmbook") / "students"))
SHOWN = 64  # images on TensorBoard
_FILES = ("checkpoints", "tensorboard", "log.csv", sources.NAME, "experiment.toml")  # the mark last


class Interrupted(KeyboardInterrupt):
    """Training was stopped by the user after its checkpoint was written."""


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run, loaded.

    Attributes:
        folder: Where it lies.
        recipe: What it was made from.
        record: Seed, versions, threads, data: how it was made.
        model: The moving average, in eval mode.
        step: Steps taken.
        seconds: Seconds of training.
        average: The decay of that moving average.
    """

    folder: Path
    recipe: Experiment
    record: dict[str, Any]
    model: Preconditioned = field(repr=False)
    step: int
    seconds: float
    average: float

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.step >= self.recipe.training.steps

    def sample(
        self,
        n: int,
        label: Labels | None = None,
        *,
        steps: int | None = None,
        guidance: float = 1.0,
        generator: Generator,
    ) -> Samples:
        """`n` samples, by the recipe's `[sampling]` table.

        Args:
            n: How many.
            label: Classes, if the model has them.
            steps: Of a consistency model: evaluations. Of a diffusion model: levels; of a
                progressively distilled one: Euler steps.
            guidance: w of a diffusion model that was trained with `label_dropout`.
            generator: Draws all noise.

        Raises:
            ValueError: If more steps are asked for than the recipe has noise levels, or guidance
                of a consistency model, which must be distilled from a guided teacher.
        """
        knobs, noise_range = self.recipe.sampling, self.recipe.noise_range
        device = next(self.model.parameters()).device
        x = prior(torch.empty(n, *self.record["shape"], device=device), noise_range, generator)
        if not isinstance(self.recipe.scalings, ConsistencyScalings):
            denoise = self.model if guidance == 1 else guided(self.model, guidance)
            objective = self.recipe.objective
            if isinstance(objective, ProgressiveDistillation):
                steps = objective.steps if steps is None else steps
                return progressive(denoise, x, noise_range, label, steps=steps)
            levels = knobs.levels if steps is None else steps
            return ode_sample(denoise, x, noise_range, label, levels=levels, solver=knobs.solver)
        if guidance != 1:
            raise ValueError(
                "guidance steers the walk of a diffusion model; a consistency model has it from "
                "its teacher: distill one with guidance = w in the recipe"
            )
        steps = 1 if steps is None else steps
        if not 1 <= steps <= len(knobs.sigmas):
            raise ValueError(
                f"this recipe names {len(knobs.sigmas)} noise levels, sampling.sigmas = "
                f"{list(knobs.sigmas)}; {steps} steps were asked for"
            )
        sigmas = torch.tensor(knobs.sigmas[:steps], dtype=torch.float64)
        return multistep(self.model, x, sigmas, label, noise_range=noise_range, generator=generator)


def run(
    recipe: Experiment,
    folder: Path | str,
    *,
    resume: bool = False,
    changed: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    progress: bool = True,
    tensorboard: bool = False,
    processes: Processes = ALONE,
) -> Run:
    """Carry out a recipe in a folder.

    A recipe of several rounds takes several runs: all but the last lie beside the folder, named
    by their steps, as in `runs/toy/progressive-4`.

    Args:
        recipe: What to do.
        folder: Where; made if missing.
        resume: Go on from the last checkpoint. The end is bit for bit that of a run that was
            never interrupted (float32 on CPU, same number of threads).
        changed: When resuming: go on although settings, data or teacher are others than before.
            A note says which, and so does the record. What depends on k/K, the share of the steps
            that are taken, is then counted anew.
        overwrite: Replace a run that is already there.
        device: Where to train.
        progress: Show a bar with loss and steps per second.
        tensorboard: Also write the log and, of images, samples as `tensorboard` shows them.
        processes: Those that carry it out together, each on its own device. They share the
            shards of every batch, and all see the folder, but only the main one writes. The run
            may be resumed by another number of them.

    Returns:
        The finished run.

    Raises:
        ValueError: If the folder holds a run and neither `resume` nor `overwrite` is given, the
            recipe to resume is another, another process is at work in the folder, the teacher or
            what a distance needs is missing, a batch cannot be shared evenly, there is no room for
            a checkpoint, or TensorBoard is asked for and not installed.
        Diverged: If a loss or gradient is not finite; once the state before it is on disk.
        OSError: If the disk is full or cannot be written; the last checkpoint is still good.
        Interrupted: After Ctrl-C, SIGTERM or SIGHUP, once a checkpoint is on disk.

    Source: ours.
    """
    if changed and not resume:
        raise ValueError("--changed goes on with a run that is there; say --resume, too")
    parts = rounds(recipe, Path(folder))
    teacher, device = recipe.teacher, processes.device or device
    again = processes.on_main(lambda: _look(parts, teacher, resume, overwrite, tensorboard))
    folders = [where for _, where in parts]
    for i, ((part, where), goes_on) in enumerate(zip(parts, again, strict=True), 1):
        wish = _Wish(goes_on, changed, overwrite, tuple(folders[i:]))
        done = _carry_out(part, where, wish, device, progress, tensorboard, processes)
    return done


@dataclass(frozen=True)
class _Wish:
    """What the user allows with a folder, as in `run`, and where the rounds after it lie."""

    resume: bool
    changed: bool
    overwrite: bool
    later: tuple[Path, ...]


def _look(
    parts: list[tuple[Experiment, Path]],
    teacher: str | None,
    resume: bool,
    overwrite: bool,
    tensorboard: bool,
) -> list[bool]:
    """Refuse what cannot be, before anything is made; say which rounds are gone on with."""
    if tensorboard:
        summary_writer()
    again = [  # the first round is there to resume; a later one may not have begun
        resume and (i == 0 or (where / "experiment.toml").is_file())
        for i, (_, where) in enumerate(parts)
    ]
    for (part, where), goes_on in zip(parts, again, strict=True):
        for each in (teacher, part.teacher):
            _check_folder(where, each, goes_on, overwrite)
    return again


def rounds(recipe: Experiment, folder: Path) -> list[tuple[Experiment, Path]]:
    """The runs that a recipe takes, and their folders: each run teaches the next.

    Source: Salimans and Ho (2022), Algorithm 2.
    """
    if not isinstance(recipe.objective, ProgressiveDistillation):
        return [(recipe, folder)]
    folder = folder if folder.name not in ("", "..") else folder.resolve()  # . has no name
    parts = [replace(recipe, objective=objective) for objective in recipe.objective.rounds]
    steps = [objective.steps for objective in recipe.objective.rounds]
    folders = [*(folder.with_name(f"{folder.name}-{s}") for s in steps[:-1]), folder]
    for i, before in enumerate(folders[:-1], 1):
        parts[i] = replace(parts[i], teacher=str(before), guidance=1.0)  # taught once
    return list(zip(parts, folders, strict=True))


def _carry_out(
    recipe: Experiment,
    folder: Path,
    wish: _Wish,
    device: str,
    progress: bool,
    tensorboard: bool,
    processes: Processes,
) -> Run:
    """One run."""
    recipe = complete(recipe)
    data = recipe.data.build()
    teacher = _teacher(recipe, data)
    student = untrained(recipe, data, teacher).to(device)
    knobs = recipe.training
    check_shards(knobs.batch_size, knobs.accumulation * processes.count)
    optimizer = knobs.optimizer.build(student)
    state = State.begin(student, optimizer, recipe.objective, knobs.also_average)
    inputs = processes.on_main(lambda: inputs_of(data, teacher))
    if not recipe.objective.needs_teacher:
        teacher = None  # the student has begun as its copy, and no step asks it
    if not wish.resume:  # what is refused now leaves no folder
        _prepare(recipe, student, processes)
    with ExitStack() as owned:
        last, changes, notes = processes.on_main(
            lambda: _claim(folder, recipe, inputs, wish, processes.count, _bytes(state), owned)
        )
        if last is not None:
            checkpoints.restore(last, state)
        if state.step >= knobs.steps:  # nothing is left to do, nor to record
            return load(folder, device)
        if wish.resume:  # a run that has ended needs nothing more
            _prepare(recipe, student, processes)
        changes, said = processes.on_main(lambda: _keep_code(folder, state.step, changes))
        text = processes.on_main(
            lambda: _record(folder, recipe, data, inputs, changes, device, processes.count)
        )
        if processes.is_main:
            _warn([*notes, *said, *doctor.warnings(recipe, data)])
        if teacher is not None:
            teacher.to(device)
            if knobs.teacher_precision == "bfloat16":
                teacher.net.bfloat16()
        if knobs.compile:
            for model in (student, state.target, teacher):
                if model is not None:
                    model.net.compile()  # in place: names of weights stay what they are

        batches = data.batches(knobs.batch_size, recipe.seed, start=state.step)
        steps = train(
            student,
            batches,
            recipe.objective,
            steps=knobs.steps,
            optimizer=optimizer,
            teacher=_guided(teacher, recipe.guidance),
            average_decay=knobs.average_decay,
            also_average=knobs.also_average,
            learning_rate=knobs.learning_rate,
            accumulation=knobs.accumulation,
            clip=knobs.clip,
            precision=knobs.precision,
            seed=recipe.seed,
            state=state,
            processes=processes,
        )
        tensorboard, progress = tensorboard and processes.is_main, progress and processes.is_main
        shown = Board(folder / "tensorboard", state.step) if tensorboard else nullcontext()
        with shown as board:
            try:
                _follow(
                    *(steps, state, recipe, folder, text, bool(wish.later)),
                    *(progress, board, processes),
                )
            except Diverged as stop:  # on every process: all see the same numbers
                kept = processes.on_main(lambda: _keep(state, recipe, folder, text))
                raise Diverged(
                    f"{stop}{_named(stop, data, recipe, state)}. {kept}", stop.step, stop.sample
                ) from stop
        return load(folder, device)


def _follow(
    steps: Iterator[Step],
    state: State,
    recipe: Experiment,
    folder: Path,
    text: str,
    more: bool,
    progress: bool,
    board: Board | None,
    processes: Processes,
) -> None:
    """Take the steps; log, save, show a bar, and stop after a step if the user asks."""
    knobs = recipe.training
    bar, patience = _bar(recipe, folder, state.step, progress), _patience(processes.count > 1)
    watch = doctor.Watch()
    with bar, patience as stopped:
        log = _Log(folder / "log.csv", state.step) if processes.is_main else None
        for step in steps:
            last, stop = state.step == knobs.steps, processes.any(stopped.is_set())
            save = state.step % knobs.save_every == 0 or last or stop
            if log is not None:
                log.add(step)
                if state.step % LOG_EVERY == 0 or save:
                    _check_ours(folder, text)
                    row = log.write(step, state.step * knobs.batch_size)
                    _warn(watch(row["gradient_norm"], state.student))
                    bar.set_postfix_str(f"loss {row['loss']:.3g}", refresh=False)
                    if board is not None:
                        board.scalars(state.step, row)
            bar.update()
            if save:
                if not _is_finite(state):  # must not replace what is good
                    after = f"after step {state.step} its weights are not all finite"
                    raise Diverged(f"training has diverged: {after}", state.step - 1, None)
                processes.check_equal(state.tensors)
                processes.on_main(lambda: _save(state, recipe, folder, text, board))
            if last and more:
                stop = processes.any(stopped.is_set())  # also what came in this save
            if stop and (more or not last):
                taken = f"step {state.step} of {knobs.steps}"
                raise Interrupted(f"stopped after {taken}; the checkpoint is in {folder}")


def _save(state: State, recipe: Experiment, folder: Path, text: str, board: Board | None) -> None:
    _check_ours(folder, text)
    try:
        checkpoints.save(folder / "checkpoints", state, text, recipe.training.keep)
    except OSError as error:
        raise OSError(
            f"step {state.step} of {folder} could not be saved: {error.strerror or error}. "
            f"{_last_good(folder)}; mend what is wrong, such as no room, and go on with --resume"
        ) from error
    if board is not None:
        _show(board, state, recipe, folder, text)


def _show(board: Board, state: State, recipe: Experiment, folder: Path, text: str) -> None:
    """Samples of the average as it is now, from the same noise every time."""
    record = tomllib.loads(text)["record"]
    if len(record["shape"]) != 3:
        return
    decay = recipe.training.average_decay
    made = Run(folder, recipe, record, state.average, state.step, 0.0, decay)
    device, classes = next(state.average.parameters()).device, record["classes"]
    label = torch.arange(SHOWN, device=device) % classes if classes else None
    board.samples(state.step, made.sample(SHOWN, label, generator=PerImage(range(SHOWN))))


def students() -> list[str]:
    """The names of the models that come with cmbook, such as `digits/cd`; `load` takes them.

    Source: ours.
    """
    paths = _STUDENTS.rglob("manifest.json")
    return sorted(path.parent.relative_to(_STUDENTS).as_posix() for path in paths)


def load(folder: Path | str, device: str = "cpu", *, average: float | None = None) -> Run:
    """Load the last checkpoint of a run, the checkpoint at this very path, or an exported model.

    Args:
        folder: Where it lies. Where nothing is, the name of a model that comes with cmbook, such
            as `digits/cd`.
        device: Where to put the model.
        average: The decay of the moving average to take, if the run has several
            (`training.also_average`); by default `training.average_decay`.

    Raises:
        ValueError: If there is no run, naming the command that makes it, its checkpoint is
            damaged, or it has no such average.

    Source: ours.
    """
    folder = Path(folder)
    if not folder.exists() and folder.as_posix() in students():
        folder = _STUDENTS / folder
    this_very_one = (folder / "manifest.json").is_file()
    if this_very_one:
        path, folder = folder, folder.resolve().parent.parent
    else:
        found = checkpoints.checkpoints(folder / "checkpoints")
        if not found:
            again = " --resume" if (folder / "experiment.toml").is_file() else ""
            raise ValueError(
                f"there is no run with a checkpoint in {folder}; make it first: "
                f"{_command(folder)}{again}"
            )
        path = found[-1]
    try:
        checkpoints.verify(path)
    except ValueError:
        if this_very_one or path.exists():
            raise
        return load(folder, device, average=average)  # pruned meanwhile: there is a newer one
    recipe, record = _recorded(path / "experiment.toml")
    step = str(record.get("step", path.resolve().name.removeprefix("step-")))
    if not step.isdigit():
        raise ValueError(f"{path} was renamed; a checkpoint is called step-XXXXXXXX, by its step")
    folder = path if "step" in record else folder  # exported: there is no run around it
    assert recipe.network is not None  # `complete` has filled it in
    shape, classes = tuple(record["shape"]), record["classes"] or None
    try:
        net = skeleton(recipe.network, shape, classes)
    except (RuntimeError, ArithmeticError, StopIteration) as error:
        raise ValueError(f"{path}: {recipe.network} cannot be built. {error!s}") from error
    model = Preconditioned(net, recipe.scalings)
    average, name = _average(folder, recipe, average)
    checkpoints.fill(model, checkpoints.read_weights(path, name), path)
    model.eval().requires_grad_(False).to(device)
    seconds = _Log(folder / "log.csv", None).seconds
    return Run(folder, recipe, record, model, int(step), seconds, average)


def _average(folder: Path, recipe: Experiment, wanted: float | None) -> tuple[float, str]:
    """The decay of the average to take, and the name of its weights."""
    first, further = recipe.training.average_decay, recipe.training.also_average
    if wanted is None or wanted == first:
        return first, "average"
    if wanted not in further:
        there = ", ".join(str(decay) for decay in (first, *further))
        raise ValueError(f"{folder} has averages of decay {there}; got {wanted}")
    return wanted, f"average-{wanted}"


def export(made: Run, folder: Path | str, *, half: bool = False) -> Path:
    """Write the model of a run alone: weights, recipe and record, to share or to keep.

    Of several averages it is the one that was loaded, and the recipe is that of a run with this
    average alone.

    `load` reads the folder like a run, and so do `cmbook sample` and `cmbook edit`. It cannot be
    resumed.

    Args:
        made: The run.
        folder: Must not exist yet.
        half: Whether to store the weights in half precision, in half the space.

    Raises:
        ValueError: If the folder exists, or the weights do not fit in half precision.

    Source: ours.
    """
    record = made.record | {"step": made.step}
    training = replace(made.recipe.training, average_decay=made.average, also_average=())
    recipe = experiment.dumps(replace(made.recipe, training=training))
    text = f"{recipe}\n{tomli_w.dumps({'record': record})}"
    checkpoints.share(Path(folder), made.model, text, half=half)
    return Path(folder)


def complete(recipe: Experiment) -> Experiment:
    """The recipe with the network filled in: where it names none, the teacher's.

    The student's dropout may differ from the teacher's: the paper distills without.

    Raises:
        ValueError: If the teacher is missing, or recipe and teacher name different networks.

    Source: ours.
    """
    if recipe.teacher is None:
        return recipe
    theirs = load(recipe.teacher).recipe
    if recipe.network is None:
        return replace(recipe, network=theirs.network)
    if _undropped(recipe.network) != _undropped(theirs.network):
        raise ValueError(
            f"the student starts as a copy of the teacher's {theirs.network}; the recipe asks for "
            f"{recipe.network}. Only dropout may differ; or leave out [network]"
        )
    return recipe


def _undropped(network: Network | None) -> Network | None:
    """The network without its dropout, which has no weights."""
    if network is None or isinstance(network, MLP):
        return network
    return replace(network, dropout=0.0)


def _teacher(recipe: Experiment, data: Data) -> Preconditioned | None:
    if recipe.teacher is None:
        return None
    theirs = load(recipe.teacher)
    if isinstance(theirs.recipe.scalings, ConsistencyScalings):
        raise ValueError(
            f"the teacher {recipe.teacher} is a consistency model; a teacher is a diffusion "
            "model, such as cmbook train digits/edm makes"
        )
    if not isinstance(theirs.recipe.scalings, EDMScalings):
        raise ValueError(
            f"the teacher {recipe.teacher} has {type(theirs.recipe.scalings).__name__}: its "
            "network is told other times and says other things than a consistency model's, so a "
            "student cannot start as its copy. In Python, `train` takes any denoiser as teacher"
        )
    if (theirs.record["shape"], theirs.record["classes"]) != (list(data.shape), data.classes or 0):
        raise ValueError(
            f"the teacher {recipe.teacher} was made for samples of shape "
            f"{theirs.record['shape']} and {theirs.record['classes']} classes; this recipe's data "
            f"has {list(data.shape)} and {data.classes or 0}"
        )
    if theirs.recipe.noise_range.sigma_data != recipe.noise_range.sigma_data:
        raise ValueError(
            f"the teacher has sigma_data {theirs.recipe.noise_range.sigma_data}, this recipe "
            f"{recipe.noise_range.sigma_data}; they must agree"
        )
    network = theirs.recipe.network
    if recipe.guidance != 1 and not (data.classes and network and network.label_dropout):
        raise ValueError(
            f"guidance compares answers with a class and without; the teacher {recipe.teacher} "
            "must know classes and be trained with network.label_dropout, such as 0.1"
        )
    return theirs.model


def _prepare(recipe: Experiment, student: Preconditioned, processes: Processes) -> None:
    """Let a distance that needs files fetch them: the main process first, then they are there."""
    prepare = getattr(getattr(recipe.objective, "distance", None), "prepare", None)
    if prepare is not None:
        device = next(student.parameters()).device
        processes.on_main(lambda: prepare(device))
        prepare(device)


def _guided(teacher: Preconditioned | None, scale: float) -> Denoiser | None:
    return teacher if teacher is None or scale == 1 else guided(teacher, scale)


def untrained(recipe: Experiment, data: Data, teacher: Preconditioned | None) -> Preconditioned:
    """The student before its first step.

    Source: ours.
    """
    assert recipe.network is not None  # Experiment has checked it, or `complete` has filled it in
    if teacher is not None:
        student = distilled(teacher, recipe.scalings)
        for part in student.modules():
            if isinstance(part, nn.Dropout):
                part.p = getattr(recipe.network, "dropout", 0.0)
        return student
    return Preconditioned(
        initialized(recipe.network, data.shape, data.classes, recipe.seed), recipe.scalings
    )


def initialized(
    network: Network, shape: tuple[int, ...], classes: int | None, seed: int
) -> nn.Module:
    """A network whose first weights are a function of the seed; global randomness is untouched."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seeded(seed, "weights").initial_seed())
        try:
            net = network.build(shape, classes)
            label = torch.zeros(1, dtype=torch.int64) if classes else None
            with torch.no_grad():  # sizes that do not fit show here, not after the folder is made
                net(torch.zeros(1, *shape), torch.zeros(1), label)
            return net
        except (RuntimeError, ArithmeticError, StopIteration) as error:
            raise ValueError(f"{network} cannot be built. {error!s}".splitlines()[0]) from error


def _claim(
    folder: Path,
    recipe: Experiment,
    inputs: dict[str, str],
    wish: _Wish,
    processes: int,
    needed: int,
    owned: ExitStack,
) -> tuple[Path | None, list[str], list[str]]:
    """Make sure that no run is lost by writing into this folder; say where to go on, and how else.

    Returns:
        The last checkpoint, what is another than in the run so far, and what to say of that.
    """
    there, saved = folder / "experiment.toml", folder / "checkpoints"
    _check_folder(folder, recipe.teacher, wish.resume, wish.overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    owned.enter_context(disk.owned(folder))
    # Nothing was begun meanwhile:
    _check_folder(folder, recipe.teacher, wish.resume, wish.overwrite)
    found = checkpoints.checkpoints(saved) if wish.resume else []
    step = int(found[-1].name.removeprefix("step-")) if found else 0
    changes, notes = list[str](), list[str]()
    if wish.resume:
        changes, notes = _check_same(folder, there, recipe, inputs, processes, step, wish)
    if step < recipe.training.steps:
        _check_room(folder, needed, saved if wish.overwrite else None)
    if wish.overwrite:
        for later in wish.later:  # students of the old run would not fit the new one
            clear(later)
        _clear(folder)
    return (found[-1] if found else None), changes, notes


def clear(folder: Path) -> None:
    """Delete the run in a folder, if there is one, and nothing else there.

    Raises:
        ValueError: If another process is at work there, or what is there is no run.

    Source: ours.
    """
    if folder.is_dir():
        with disk.owned(folder):
            _check_folder(folder, None, resume=False, overwrite=True)
            _clear(folder)


def _clear(folder: Path) -> None:
    for name in _FILES:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _check_folder(folder: Path, teacher: str | None, resume: bool, overwrite: bool) -> None:
    """What can be said of a folder before anything is read: several rounds ask at the start."""
    there, saved = folder / "experiment.toml", folder / "checkpoints"
    try:
        str(folder.resolve()).encode()  # safetensors would write there, and could not read
    except UnicodeEncodeError as error:
        raise ValueError(f"{folder} is no name in UTF-8; --out names another folder") from error
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --out names the folder of a run")
    if teacher is not None:
        path = Path(teacher).resolve()
        if folder.resolve() in (path, *path.parents[:2]):
            raise ValueError(f"{folder} holds the teacher of this run; --out names another folder")
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite deletes it; choose one")
    if overwrite and saved.exists() and not there.exists():
        raise ValueError(f"{saved} is no run of cmbook; --out names another folder")
    if not (resume or overwrite) and (there.exists() or saved.exists()):
        raise ValueError(
            f"{folder} already holds a run; --resume goes on with it, --overwrite replaces it, "
            "--out names another folder"
        )


def _check_same(
    folder: Path,
    there: Path,
    recipe: Experiment,
    inputs: dict[str, str],
    processes: int,
    step: int,
    wish: _Wish,
) -> tuple[list[str], list[str]]:
    """What is another than in the run so far: all that ever was, for the record; and to be said.

    Raises:
        ValueError: If anything is, and that is not allowed.
    """
    if not there.is_file():
        raise ValueError(f"there is no run to resume in {folder}; leave out --resume")
    before, record = _recorded(there)
    old, new = (e.teacher and Path(e.teacher).resolve() for e in (before, recipe))
    if old == new:
        before = replace(before, teacher=recipe.teacher)  # one folder may have two names
    before = _shared_anew(folder, before, recipe, record.get("processes", 1), processes)
    told = [str(line) for line in record.get("changes", [])]
    changes = _differences(before, recipe)
    if changes and not wish.changed:
        raise ValueError(
            f"the recipe of {folder} is another one than this: {', '.join(changes)}. "
            "Resume with the settings it was started with, go on with these by --changed, or "
            "choose another --out"
        )
    had = before.training.also_average
    if begun := [decay for decay in recipe.training.also_average if decay not in had]:
        raise ValueError(
            f"an average of decay {begun[0]:g} cannot begin at step {step}: the checkpoint holds "
            f"none. Leave training.also_average={list(had)} as it was, or train anew with --out"
        )
    what = {"data_sha256": "other data", "teacher_sha256": "another teacher"}
    for name in [name for name, found in inputs.items() if record.get(name) != found]:
        if not wish.changed:
            raise ValueError(
                f"{folder} was made from {what[name]} than this; --changed goes on with this, "
                "--overwrite makes it anew, --out names another folder"
            )
        changes.append(what[name])
    done = step >= recipe.training.steps
    if done and (wish.later or not changes):  # a round that has ended stays as it was
        return told, []
    now = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    changes += _moved(record, now)
    many = _moved(record, {"processes": processes})  # `_shared_anew` says what that changes
    if done:
        raise ValueError(
            f"{folder} has taken {step} steps, and this recipe wants {recipe.training.steps}; "
            "raise training.steps, or choose another --out"
        )
    if not changes + many:
        return told, []
    since = f"from step {step} on: "
    said = [since + ", ".join(changes), *_rescaled(before, recipe, step)] if changes else []
    return [*told, since + ", ".join(changes + many)], said


def _keep_code(folder: Path, step: int, changes: list[str]) -> tuple[list[str], list[str]]:
    """Write down the code; what is another since a run was begun, for the record and to be said."""
    names = sources.keep(folder)
    if not (names and step):
        return changes, []
    said = f"from step {step} on: other code in {', '.join(names[:5])}" + " ..." * (len(names) > 5)
    return [*changes, said], [said]


def _moved(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What the record says otherwise."""
    return [f"{k} was {record[k]}, now {v}" for k, v in now.items() if record.get(k, v) != v]


def _rescaled(before: Experiment, after: Experiment, step: int) -> list[str]:
    """What jumps here because settings of a schedule are others, in a line."""
    old, new = (
        _schedule(recipe, Clock(min(step, recipe.training.steps - 1), recipe.training.steps))
        for recipe in (before, after)
    )
    moved = [
        f"{name} was {old[name]:.4g}, now {new[name]:.4g}"
        for name in old
        if name in new and old[name] != new[name]
    ]
    longer = before.training.steps != after.training.steps
    why = "schedules are functions of k/K, and K is another: " if longer else "here "
    return [why + ", ".join(moved)] if moved else []


def _schedule(recipe: Experiment, clock: Clock) -> dict[str, float]:
    found = {"the learning rate": recipe.training.learning_rate(clock)}
    if isinstance(recipe.objective, ConsistencyTraining):
        curriculum = recipe.objective.curriculum
        found |= {"N": curriculum.levels_at(clock), "mu": curriculum.decay_at(clock)}
    return found


def _shared_anew(
    folder: Path, before: Experiment, recipe: Experiment, old: int, new: int
) -> Experiment:
    """The recipe of a run that another number of processes goes on with, in as many shards.

    If only the number of processes is another, so is that of the shards: a note says so.
    """
    was, now = before.training.accumulation * old, recipe.training.accumulation * new
    if was == now:
        training = replace(before.training, accumulation=recipe.training.accumulation)
        return replace(before, training=training)
    if before.training.accumulation == recipe.training.accumulation:
        print(
            f"note: the batches of {folder} were cut into {was}, one part a process and "
            f"accumulation, and now into {now}: their noise is another from here on. "
            f"The same again: processes times training.accumulation = {was}",
            file=sys.stderr,
        )
    return before


def _recorded(path: Path) -> tuple[Experiment, dict[str, Any]]:
    """The recipe and the record of an experiment.toml."""
    try:
        text = path.read_text(encoding="utf-8")
        recipe = experiment.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    record = tomllib.loads(text).get("record", {})
    match record:
        case {"shape": [*sides], "classes": int(), "data_sha256": str()} if recipe.network:
            numbers = (*sides, record.get("processes", 1))
            whole = all(type(number) is int and 0 < number < 2**31 for number in numbers)
            if whole and sides and 0 <= record["classes"] <= MOST_CLASSES:
                return recipe, record
    raise ValueError(f"{path} holds no [record] of shape, classes and data: was it edited?")


def _differences(before: Experiment, after: Experiment) -> list[str]:
    old, new = experiment.settings(before), experiment.settings(after)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in keys]


def inputs_of(data: Data, teacher: Preconditioned | None) -> dict[str, str]:
    """Fingerprints of what a run is made from, beside its recipe, as its record has them.

    Source: ours.
    """
    inputs = {"data_sha256": data.sha256()}
    if teacher is not None:
        inputs["teacher_sha256"] = fingerprint(*teacher.state_dict().values())
    return inputs


def _record(
    folder: Path,
    recipe: Experiment,
    data: Data,
    inputs: dict[str, str],
    changes: list[str],
    device: str,
    processes: int,
) -> str:
    """Write experiment.toml: the recipe, and what else the numbers depend on."""
    record = {
        "seed": recipe.seed,
        "shape": list(data.shape),
        "classes": data.classes or 0,
        **inputs,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "device": device,
        "cmbook": cmbook.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **({"changes": changes} if changes else {}),
    }
    text = f"{experiment.dumps(recipe)}\n{tomli_w.dumps({'record': record})}"
    with disk.replacing(folder / "experiment.toml") as file:
        file.write(text.encode())
    return text


def _command(folder: Path) -> str:
    """The command that makes the run in this folder."""
    name = "/".join(folder.parts[-2:])
    if name in experiment.recipes():
        plain = folder == Path("runs") / name
        return f"cmbook train {name}" + ("" if plain else f" --out {folder}")
    return f"cmbook train RECIPE --out {folder}"


def _warn(said: list[str]) -> None:
    for line in said:
        print(f"note: {line}", file=sys.stderr)


def _keep(state: State, recipe: Experiment, folder: Path, text: str) -> str:
    """Save what a step that was not taken has left as it was; say what to do."""
    try:
        if state.step > 0 and _is_finite(state):
            checkpoints.save(folder / "checkpoints", state, text, recipe.training.keep)
    except OSError as error:
        return f"Step {state.step} could not be saved: {error}. {_last_good(folder)}"
    return _last_good(folder)


def _is_finite(state: State) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in state.tensors)


def _last_good(folder: Path) -> str:
    """What a run leaves that cannot go on."""
    good = checkpoints.checkpoints(folder / "checkpoints")
    if not good:
        return "There is no checkpoint yet"
    return f"{good[-1]} is good"


def _named(stop: Diverged, data: Data, recipe: Experiment, state: State) -> str:
    """Which sample of the data it was, and whether it is itself at fault."""
    if stop.sample is None:
        return ""
    if not _is_finite(state):
        return "; the weights were not all finite before it, so no sample is to blame"
    size, seed = recipe.training.batch_size, recipe.seed
    name = ""
    if isinstance(data, TensorData | ImageData):  # whose order is that of `endless`
        number = int(next(endless(len(data), size, seed, stop.step))[stop.sample])
        name = f", number {number} of the data"
    x = next(data.batches(size, seed, stop.step)).x[stop.sample]
    return name if bool(x.isfinite().all()) else f"{name}, which is itself not finite"


def _bytes(state: State) -> int:
    """What a checkpoint takes, about: the optimizer may not have begun."""
    moments = 2 * sum(p.nbytes for p in state.student.parameters())
    return sum(t.nbytes for t in state.tensors) + moments


def _check_room(folder: Path, needed: int, replaced: Path | None) -> None:
    """Refuse to begin what cannot be saved, before anything is deleted."""
    free = shutil.disk_usage(folder).free
    if replaced is not None:
        free += sum(path.stat().st_size for path in replaced.rglob("*") if path.is_file())
    if free < needed:
        raise ValueError(
            f"a checkpoint of this run takes {needed / 1e9:.3g} GB, and the disk of {folder} has "
            f"{free / 1e9:.3g} GB left; make room, or choose another --out"
        )


def _check_ours(folder: Path, text: str) -> None:
    """Refuse to write into a folder that was moved, deleted or begun anew meanwhile."""
    there = folder / "experiment.toml"
    if not there.is_file() or there.read_text(encoding="utf-8", errors="replace") != text:
        raise ValueError(
            f"{folder} was moved, deleted or begun anew while this run was at work; nothing more "
            "is written there"
        )


class _Log:
    """log.csv: loss and gradient norm are means since the last row, seconds those of training."""

    def __init__(self, path: Path, step: int | None) -> None:
        self.path = path
        self.since: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.unwritten = ""
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        head, *rows = [*csv.reader(text.splitlines())] or [_HEAD]
        rows = [row for row in rows if _is_whole(row, len(head))]
        if step is not None:  # what came after the checkpoint is written again
            rows = [row + [""] * (len(_HEAD) - len(row)) for row in rows if int(row[0]) <= step]
            lines = "".join(f"{','.join(row)}\n" for row in [_HEAD, *rows])
            with disk.replacing(path) as file:
                file.write(lines.encode())
        self.seconds = float(rows[-1][2]) if rows else 0.0
        self.started = time.perf_counter() - self.seconds

    def add(self, step: Step) -> None:
        self.since.append((step.loss.value, step.gradient_norm))

    def write(self, step: Step, images: int) -> dict[str, float]:
        """A row after this step, and its numbers by their names, the step aside."""
        loss, norm = (float(torch.stack(each).mean()) for each in zip(*self.since, strict=True))
        self.since.clear()
        self.seconds = time.perf_counter() - self.started
        rate, cells = step.learning_rate, f"{loss:.8g},{self.seconds:.3f},{norm:.6g}"
        self.unwritten += f"{step.state.step},{cells},{rate:.6g},{images}\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self.unwritten)
            self.unwritten = ""
        except OSError as error:  # rows can wait, and a save will say if it cannot be written
            if not self.unwritten.startswith("\n"):  # what came through may be half a row
                _warn([f"{self.path} cannot be written: {error.strerror or error}; its rows wait"])
                self.unwritten = f"\n{self.unwritten}"
        return dict(zip(_HEAD[1:], (loss, self.seconds, norm, rate, images), strict=True))


_HEAD = ["step", "loss", "seconds", "gradient_norm", "learning_rate", "images"]


def _is_whole(row: list[str], width: int) -> bool:
    """Whether a row of log.csv is one: a kill may have cut it, and older logs have 3 columns."""
    fits = len(row) == width in (3, len(_HEAD))
    return fits and row[0].isdecimal() and row[2].replace(".", "", 1).isdecimal()


def _bar(recipe: Experiment, folder: Path, done: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=recipe.training.steps,
        initial=done,
        desc=str(folder),
        unit="step",
        disable=not progress,
        dynamic_ncols=True,
        mininterval=0.5,
    )


@contextmanager
def _patience(together: bool) -> Iterator[threading.Event]:
    """Turn Ctrl-C into a request to stop after this step; again, a second later, it stops at once.

    So do SIGTERM, which schedulers send before they kill, and SIGHUP of a terminal that closes,
    unless `nohup` has turned that off. They may come several times, as by torchrun and by who
    stopped it; several processes never stop at once, for they save together.
    """
    stopped, asked = threading.Event(), [math.inf]
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}

    def ask(number: int, frame: object) -> None:
        stopped.set()
        if number == signal.SIGINT and not together:
            if time.monotonic() - asked[0] > 1:
                raise KeyboardInterrupt
            asked[0] = min(asked[0], time.monotonic())

    for number in before:
        signal.signal(number, ask)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
