"""The doctor: broken runs are named by their cause, good ones are left in peace."""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmbook import (
    EDM,
    MLP,
    ConsistencyDistillation,
    ConsistencyScalings,
    ConsistencyTraining,
    ContinuousDistillation,
    Digits,
    DoublingLevels,
    EDMScalings,
    Experiment,
    NoiseRange,
    ProgressiveDistillation,
    ResidualMLP,
    TensorData,
    Toy,
    doctor,
    run,
    training,
)
from cmbook.distances import PseudoHuber
from cmbook.experiment import Sampling, Training
from cmbook.noise import LogNormal
from cmbook.parameterization import VEScalings
from cmbook.training import Adam, RAdam


def trains(recipe, **knobs):
    return replace(recipe, training=replace(recipe.training, **knobs))


def ranged(recipe, **knobs):
    return replace(recipe, noise_range=replace(recipe.noise_range, **knobs))


TRAINING = Training(
    steps=700, batch_size=256, optimizer=Adam(3e-3), decay="cosine", average_decay=0.98,
    save_every=10_000,
)  # fmt: skip
RING = Experiment(
    Toy("ring"), EDM(), EDMScalings(), MLP(64, 3), NoiseRange(sigma_max=20.0), training=TRAINING,
    sampling=Sampling(12, "heun", (20.0, 0.5)),
)  # fmt: skip
DIGITS = replace(
    RING, data=Digits(), network=ResidualMLP(128, 2, 64),
    objective=EDM(sigma_law=LogNormal(-0.3)),
    noise_range=NoiseRange(sigma_max=20.0, sigma_data=0.75),
)  # fmt: skip
QUICK = trains(DIGITS, steps=60, average_decay=0.9)  # what is wrong with data shows at once
CD = ConsistencyDistillation(levels=12, distance=PseudoHuber(), weight="inverse_gap")
CT = ConsistencyTraining(
    curriculum=DoublingLevels(5, 40), distance=PseudoHuber(), weight="inverse_gap"
)


def taught(recipe, objective=CD, teacher="edm", scalings=None):
    """The recipe of a student; the teacher is a case."""
    scalings = scalings or ConsistencyScalings()
    return replace(recipe, objective=objective, scalings=scalings, network=None, teacher=teacher)


# ── the runs ──


@dataclass(frozen=True)
class Case:
    """A run, and what is done to it that no recipe says.

    Attributes:
        recipe: What it is made from. A teacher is the name of another case.
        cause: What the headline of a broken run says.
        fault: Holds while training and while it is examined.
        edit: Done to its folder afterwards.
    """

    recipe: Experiment
    cause: str = ""
    fault: Callable[[], AbstractContextManager] = nullcontext
    edit: Callable[[Path], None] = lambda folder: None


def digits_as(change):
    """The digits, spoiled."""
    real = Digits().build()
    data = change(real.x, real.label)
    return lambda: mock.patch.object(Digits, "build", return_value=data)


def bytes_(x, label):
    return TensorData(127.5 * (x + 1), label, bounded=False)


def shuffled(x, label):
    return TensorData(x, label.roll(333))


def constant(x, label):
    return TensorData(x.mean((1, 2, 3), keepdim=True).expand_as(x).contiguous(), label)


def copied(x, label):
    return TensorData(x[:40].repeat(30, 1, 1, 1), label[:40].repeat(30))


def scrambled(x, label):
    """Columns of memory read as rows: reshaped where it should have been transposed."""
    return TensorData(x.flatten(1).T.reshape(x.shape).contiguous(), label)


def deaf():
    return mock.patch.object(EDMScalings, "c_noise", lambda self, sigma: torch.zeros_like(sigma))


def frozen():
    """The optimizer is given a copy of the weights: nothing that the loss knows."""

    def build(self, model):
        own = [p.detach().clone().requires_grad_() for p in model.parameters()]
        return torch.optim.Adam(own, self.lr)

    return mock.patch.object(Adam, "build", build)


def target_left_behind():
    """Only averages for sampling are blended, never the target."""
    real = training.blend

    def blend(average, model, decay):
        if decay != 0.95:
            real(average, model, decay)

    return mock.patch.object(training, "blend", blend)


def edited(change, *names):
    """Weights of the last checkpoint, changed behind the run's back; its checksums agree."""

    def edit(folder):
        (path,) = (folder / "checkpoints").glob("step-*")
        sums = json.loads((path / "manifest.json").read_text())
        for name in names:
            file = path / f"{name}.safetensors"
            save_file({key: change(w) for key, w in load_file(file).items()}, file)
            sums[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        (path / "manifest.json").write_text(json.dumps(sums))

    return edit


def rewritten(before, after):
    """The record of a run, changed behind its back; its checksums agree."""

    def edit(folder):
        (path,) = (folder / "checkpoints").glob("step-*")
        text = (path / "experiment.toml").read_text().replace(before, after)
        for file in (folder / "experiment.toml", path / "experiment.toml"):
            file.write_text(text)
        sums = json.loads((path / "manifest.json").read_text())
        sums["experiment.toml"] = hashlib.sha256(text.encode()).hexdigest()
        (path / "manifest.json").write_text(json.dumps(sums))

    return edit


def with_nan(w):
    w = w.clone()
    w.view(-1)[0] = torch.nan
    return w


GOOD = {
    "edm": Case(RING),
    "cd": Case(taught(RING)),
    "ct, levels grow": Case(
        replace(trains(RING, steps=1200), objective=CT, scalings=ConsistencyScalings())
    ),
    "continuous cd": Case(taught(trains(RING, optimizer=RAdam(1e-3)), ContinuousDistillation())),
    "progressive": Case(
        taught(RING, ProgressiveDistillation(steps=8, last=4), scalings=EDMScalings())
    ),
    "digits": Case(DIGITS),
    "digits cd": Case(taught(DIGITS, CD, "digits")),
}
BROKEN = {
    "sigma_data": Case(ranged(RING, sigma_data=5.0), "sigma_data is 5, .* std is 0.49"),
    "bytes": Case(QUICK, r"data lie in \[0, 255\]", digits_as(bytes_)),
    "labels": Case(QUICK, "labels are shuffled", digits_as(shuffled)),
    "constant": Case(QUICK, "constant: one flat color", digits_as(constant)),
    "copies": Case(QUICK, "data repeat themselves", digits_as(copied)),
    "layout": Case(QUICK, "reshaped wrongly", digits_as(scrambled)),
    "rate too high": Case(trains(RING, optimizer=Adam(0.5)), "learning rate.* too high"),
    "rate too low": Case(trains(RING, optimizer=Adam(1e-7)), "learning rate.* too low"),
    "average": Case(trains(RING, average_decay=0.9999), "average still remembers"),
    "teacher in another dress": Case(taught(RING, CD, "ve"), "teacher is "),
    "teacher of other data": Case(taught(RING, CD, "moons"), "teacher is made for other data"),
    "frozen": Case(RING, "student is frozen", frozen),
    "target": Case(
        taught(RING, replace(CD, decay=0.95)), "target does not move", target_left_behind
    ),
    "deaf": Case(RING, "does not hear sigma", deaf),
    "nan": Case(RING, "NaN", edit=edited(with_nan, "average")),
    "coarse": Case(
        taught(RING, replace(CD, levels=3, solver="euler")), "objective.levels = 3 are too few"
    ),
    "boundary": Case(taught(RING, scalings=EDMScalings()), "boundary is violated"),
    "sigma_max": Case(ranged(RING, sigma_max=1.0), "sigma_max = 1 is too small"),
}
TEACHERS = {
    "ve": Case(replace(RING, scalings=VEScalings()), edit=rewritten("VEScalings", "EDMScalings")),
    "moons": Case(replace(RING, data=Toy("moons"))),
}
CASES = GOOD | BROKEN | TEACHERS


@dataclass(frozen=True)
class Clinic:
    """Runs and their diagnoses, each made once and only if asked for."""

    root: Path
    known: dict[str, doctor.Diagnosis] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        folder, case = self.root / name, CASES[name]
        if not folder.exists():
            recipe = case.recipe
            if recipe.teacher is not None:
                recipe = replace(recipe, teacher=str(self.folder(recipe.teacher)))
            with case.fault():
                run(recipe, folder, progress=False)
            case.edit(folder)
        return folder

    def diagnosis(self, name: str) -> doctor.Diagnosis:
        if name not in self.known:
            folder = self.folder(name)
            with CASES[name].fault():
                self.known[name] = doctor.examine(folder)
        return self.known[name]


@pytest.fixture(scope="session")
def clinic(tmp_path_factory):
    return Clinic(tmp_path_factory.mktemp("clinic"))


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_is_named_first(clinic, name):
    found = clinic.diagnosis(name)
    assert not found.healthy
    assert found.headline.startswith("ill: ")
    assert re.search(CASES[name].cause, found.headline), str(found)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_run_raises_no_alarm(clinic, name):
    found = clinic.diagnosis(name)
    assert found.healthy, str(found)
