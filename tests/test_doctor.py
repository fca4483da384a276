"""The doctor: broken runs are named by their cause, good ones are left in peace."""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import cmbook
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
    FixedLevels,
    Glyphs,
    Images,
    NCSNpp,
    NoiseRange,
    ProgressiveDistillation,
    ResidualMLP,
    TensorData,
    Toy,
    doctor,
    load,
    run,
    runs,
    sources,
    training,
)
from cmbook.__main__ import main
from cmbook.distances import PseudoHuber
from cmbook.doctor import answers, findings, marred, parts, replay, worlds
from cmbook.doctor import trials as tried
from cmbook.doctor.code import code
from cmbook.doctor.patient import Undone, admit
from cmbook.experiment import Sampling, Training
from cmbook.features import to_bytes
from cmbook.losses import ct, edm, regression
from cmbook.noise import LogNormal, add_noise, normal, seeded
from cmbook.parameterization import VEScalings
from cmbook.runs import students
from cmbook.training import Adam, RAdam
from cmbook.weights import WEIGHTS


def trains(recipe, **knobs):
    return replace(recipe, training=replace(recipe.training, **knobs))


def ranged(recipe, **knobs):
    return replace(recipe, noise_range=replace(recipe.noise_range, **knobs))


TRAINING = Training(
    steps=500, batch_size=256, optimizer=Adam(3e-3), decay="cosine", average_decay=0.98,
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
BRIEF = trains(RING, steps=250)
BUGGY = trains(BRIEF, save_every=25)  # and so rows of the log that are soon taken anew
QUICK = trains(DIGITS, steps=60, average_decay=0.9)  # what is wrong with data shows at once
CD = ConsistencyDistillation(levels=12, distance=PseudoHuber(), weight="inverse_gap")
CT = ConsistencyTraining(
    curriculum=DoublingLevels(5, 40), distance=PseudoHuber(), weight="inverse_gap"
)


def taught(recipe, objective=CD, scalings=None, teacher="edm"):
    """The recipe of a student; the teacher is a case."""
    scalings = scalings or ConsistencyScalings()
    return replace(recipe, objective=objective, scalings=scalings, network=None, teacher=teacher)


# ── the runs ──


@dataclass(frozen=True)
class Case:
    """A run, and what is done to it that no recipe says.

    Attributes:
        recipe: What it is made from, with the name of another case as teacher. Or such a name: then
            it is a copy of that run.
        cause: What the headline of a broken run says.
        fault: Holds while training and while it is examined.
        bug: Holds while training.
        edit: Done to its folder afterwards.
        without: What the headline says if no step can be taken anew; by default the same.
    """

    recipe: Experiment | str
    cause: str = ""
    fault: Callable[[], AbstractContextManager] = nullcontext
    bug: Callable[[], AbstractContextManager] = nullcontext
    edit: Callable[[Path], None] = lambda folder: None
    without: str = ""


def digits_as(change):
    """The digits, spoiled."""
    real = Digits().build()
    data = change(real.x, real.label)
    return lambda: mock.patch.object(Digits, "build", return_value=data)


def points_as(scale, center):
    """The ring, squeezed and moved."""
    x = Toy().build().held_out().x  # in no order that the seed of a run knows
    data = TensorData(x * torch.tensor(scale) + center, bounded=False)
    return lambda: mock.patch.object(Toy, "build", return_value=data)


def bytes_(x, label):
    return TensorData(127.5 * (x + 1), label, bounded=False)


def shuffled(x, label):
    return TensorData(x, label.roll(333))


def three_of_ten(x, label):
    few = label < 3
    return TensorData(x[few], label[few], classes=10)


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


def uphill():
    """The loss with the wrong sign."""

    def regress(*given):
        loss = regression.regress(*given)
        return replace(loss, value=-loss.value)

    return mock.patch.object(edm, "regress", regress)


def half_the_noise():
    """Training adds less noise than it says."""
    return mock.patch.object(edm, "add_noise", lambda x, noise, s: add_noise(x, noise, s / 2))


def one_batch():
    """A loader that begins anew in every step."""
    real = training.train

    def train(student, batches, *given, **knobs):
        return real(student, repeat(next(batches)), *given, **knobs)

    return mock.patch.object(runs, "train", train)


def one_noise():
    """A generator that is seeded alike in every step."""
    return mock.patch.object(training, "seeded", lambda *given, **knobs: seeded(0, **knobs))


def renumbered(x, label):
    return TensorData(x, 9 - label)


def target_left_behind():
    """Only averages for sampling are blended, never the target."""
    real = training.blend

    def blend(average, model, decay):
        if decay != 0.95:
            real(average, model, decay)

    return mock.patch.object(training, "blend", blend)


def target_learns():
    """The target is not detached: both sides of the difference move."""

    def self_consistency(models, pair, label, *, noise_range, distance, weight, generator):
        one = models.student(pair.x, pair.sigma, label)
        other = models.student(pair.x_next, pair.sigma_next, label)
        scale = WEIGHTS[weight](pair.sigma, pair.sigma_next, noise_range)
        return regression.regress(one, other, pair.sigma, distance, scale)

    return mock.patch.object(ct, "self_consistency", self_consistency)


def never_zeroed():
    """Gradients add up from step to step."""
    return mock.patch.object(torch.optim.Optimizer, "zero_grad")


def made_anew():
    """The optimizer forgets its moments before every step."""
    real = torch.optim.Adam.step

    def step(self, *given):
        self.state.clear()
        return real(self, *given)

    return mock.patch.object(torch.optim.Adam, "step", step)


def forty(x, label):
    return TensorData(x[:40], label[:40], classes=10)


def other_loss():
    """The loss of a head that answers with twice the picture."""

    def regress(prediction, target, *given):
        return regression.regress(prediction / 2, target, *given)

    return mock.patch.object(edm, "regress", regress)


def with_outliers(x, label):
    x = x.clone()
    x[::70] *= 40
    return TensorData(x, label, bounded=False)


def edited(change, *names):
    """Weights of the last checkpoint, changed behind the run's back; its checksums agree."""

    def edit(folder):
        *_, path = sorted((folder / "checkpoints").glob("step-*"))
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
        *_, path = sorted((folder / "checkpoints").glob("step-*"))
        text = (path / "experiment.toml").read_text().replace(before, after)
        for file in (folder / "experiment.toml", path / "experiment.toml"):
            file.write_text(text)
        sums = json.loads((path / "manifest.json").read_text())
        sums["experiment.toml"] = hashlib.sha256(text.encode()).hexdigest()
        (path / "manifest.json").write_text(json.dumps(sums))

    return edit


def transposed(w):
    return w.T.contiguous() if w.ndim == 2 and len(set(w.shape)) == 1 else w


def three_bits(w):
    step = w.abs().max() / 3
    return (w / step).round() * step


def pruned(w):
    return torch.where(w.abs() < w.abs().median(), 0, w)


def with_nan(w):
    w = w.clone()
    w.view(-1)[0] = torch.nan
    return w


GOOD = {
    "edm": Case(trains(RING, steps=2000)),
    "cd": Case(taught(trains(RING, steps=400, save_every=25))),
    "ct": Case(replace(RING, objective=CT, scalings=ConsistencyScalings())),
    "continuous cd": Case(
        taught(trains(RING, optimizer=RAdam(1e-3), steps=300), ContinuousDistillation())
    ),
    "progressive": Case(
        taught(trains(RING, steps=150), ProgressiveDistillation(steps=4, last=2), EDMScalings())
    ),
    "digits": Case(DIGITS),
    "digits cd": Case(taught(trains(DIGITS, steps=150), teacher="digits")),
}
BROKEN = {
    # the data
    "bytes": Case(QUICK, r"data lie in \[0, 255\]", digits_as(bytes_)),
    "labels": Case(QUICK, "labels are shuffled", digits_as(shuffled)),
    "outliers": Case(
        QUICK, r"1.5% of the data are outliers that reach 40", digits_as(with_outliers)
    ),
    "classes": Case(QUICK, "7 of the 10 classes have no samples", digits_as(three_of_ten)),
    "constant": Case(QUICK, "constant: one flat color", digits_as(constant)),
    "copies": Case(QUICK, "data repeat themselves", digits_as(copied)),
    "layout": Case(QUICK, "reshaped wrongly", digits_as(scrambled)),
    # the recipe
    "sigma_data": Case(ranged(BRIEF, sigma_data=5.0), "sigma_data is 5, .* std is 0.49"),
    "sigma_max": Case(ranged(BRIEF, sigma_max=1.0), "sigma_max = 1 is too small"),
    "guidance": Case(
        replace(taught(QUICK, teacher="dropping"), guidance=0.0), "guidance 0 takes the label away"
    ),
    "boundary": Case("cd", "boundary is violated", edit=rewritten("ConsistencyS", "EDMS")),
    "coarse": Case(
        taught(BRIEF, replace(CD, levels=3, solver="euler")), "objective.levels = 3 are too few"
    ),
    "levels drawn": Case(
        replace(BRIEF, objective=EDM(sigma_law=LogNormal(-6.0, 0.5))), "hardly ever trained"
    ),
    # the teacher
    "teacher in another dress": Case(taught(QUICK, teacher="ve"), "dressed in VEScalings"),
    "teacher of other data": Case(taught(BRIEF, teacher="moons"), "teacher is made for other data"),
    "teacher numbers otherwise": Case(
        taught(QUICK, teacher="renumbered"), "teacher numbers the classes otherwise.* 0 is its 9"
    ),
    "teacher distilled": Case(
        taught(BRIEF, teacher="few steps"), "the teacher is itself distilled"
    ),
    "teacher untrained": Case(
        taught(BRIEF, teacher="untrained"), "teacher is ill: the average still remembers the first"
    ),
    "teacher converted": Case(
        taught(BRIEF, teacher="converted"),
        "the teacher is ill: weights were changed after training.*weight is transposed",
    ),
    "teacher compressed": Case(
        taught(BRIEF, teacher="compressed"),
        "the teacher is ill: weights are rounded: a matrix has no more than [1-7] different values",
    ),
    "teacher hardly without labels": Case(
        replace(taught(BRIEF, teacher="rarely"), data=Toy("pinwheel", labelled=True), guidance=2.0),
        "answer without a label.*was made with network.label_dropout = 0.001",
    ),
    "teacher of forty": Case(taught(QUICK, teacher="forty"), "the teacher is ill: "),
    # training
    "rate too high": Case(
        trains(BRIEF, optimizer=Adam(0.5)), "optimizer.lr = 0.5: trained anew with 0.002, as in"
    ),
    "one round": Case(
        taught(trains(RING, steps=150), ProgressiveDistillation(steps=1), EDMScalings()),
        "objective.steps = 1 is too few to begin with: the student learns 2 Euler steps",
    ),
    "short": Case(trains(RING, steps=100, average_decay=0.95), "it was trained too short: it has"),
    "rate too low": Case(trains(BRIEF, optimizer=Adam(1e-7)), "learning rate 1e-07 is too low"),
    "frozen": Case(BUGGY, "given a copy of the weights", bug=frozen, without="it never learned"),
    "sign": Case(BUGGY, "wrong sign: it is negative", bug=uphill, without="loss is negative"),
    "target learns": Case(
        replace(BUGGY, objective=CT, scalings=ConsistencyScalings()),
        "the target is not detached",
        bug=target_learns,
        without="not what the recipe says.* a gradient",
    ),
    "gradients add up": Case(
        trains(RING, save_every=25), "gradients add up from step to step", bug=never_zeroed
    ),
    "loss of another head": Case(
        BUGGY,
        "answers count 0.5 times",
        bug=other_loss,
        without="something else than the recipe says",
    ),
    "average": Case(trains(BRIEF, average_decay=0.9999), "average still remembers"),
    "one batch": Case(
        trains(DIGITS, batch_size=32, save_every=25), "same samples again", bug=one_batch
    ),
    "one noise": Case(trains(DIGITS, save_every=25), "same noise again and again", bug=one_noise),
    "target": Case(
        taught(trains(RING, steps=300, save_every=25), replace(CD, decay=0.95)),
        "target does not move",
        bug=target_left_behind,
    ),
    "nan": Case("edm", "NaN", edit=edited(with_nan, "average")),
    # the model
    "deaf": Case(BRIEF, "does not hear sigma", deaf),
    "noise": Case(
        BUGGY, "half of the noise is added", bug=half_the_noise, without="takes away too much noise"
    ),
    "two levels": Case("edm", "sampling.levels = 2 are too few", edit=rewritten("s = 12", "s = 2")),
}
ODD = {  # that need not be a fault
    "letters": Case(
        replace(
            trains(DIGITS, steps=100, batch_size=32),
            data=Glyphs("AB", 8),
            network=NCSNpp(channels=8, multipliers=(1,), blocks=1, attention=(), dropout=0.1),
        ),
        "sigma_data is 0.75, but the data's std is 0.56",
    ),
    "few steps": Case(
        trains(replace(RING, data=Toy("spirals")), steps=200, batch_size=512),
        "training.steps = 200 are too few",
    ),
    "betas": Case(trains(BRIEF, optimizer=Adam(3e-3, (0.999, 0.9))), "longer than their squares"),
    "dropout": Case(
        replace(BRIEF, data=Toy("ring", labelled=True), network=MLP(64, 3, label_dropout=0.95)),
        "dropout 0.95 leaves little",
    ),
    "forgetful": Case(
        BUGGY, "the optimizer has counted 1 of 250 steps: it was made anew", bug=made_anew
    ),
    "rounded": Case(
        taught(trains(RING, steps=2, precision="bfloat16", average_decay=0.0)),
        "answers are rounded to 8 bits",
    ),
    "weight": Case(
        replace(BRIEF, objective=replace(CT, weight="karras"), scalings=ConsistencyScalings()),
        "unusual settings: objective.weight = karras .published recipes: inverse_gap, uniform",
    ),
    "distance": Case(
        replace(BRIEF, objective=EDM(distance=PseudoHuber())),
        "unusual settings: objective.distance = PseudoHuber .published recipes: L2",
    ),
    "pruned": Case("edm", "[45].% of a matrix are 0: pruned", edit=edited(pruned, "average")),
    "depth": Case(replace(BRIEF, network=MLP(32, 20)), "unusual settings: network.depth = 20"),
    "rho": Case(ranged(BRIEF, rho=1.0), "rho = 1 is unusual: .* among the largest"),
    "center": Case(BRIEF, "the data lie around 1.5, far from 0", points_as([0.3, 0.3], 1.5)),
    "scales": Case(BRIEF, "coordinates have other scales", points_as([1.0, 0.01], 0.0)),
    "first levels": Case(
        replace(
            BRIEF,
            objective=replace(CT, curriculum=FixedLevels(300)),
            scalings=ConsistencyScalings(),
        ),
        "training begins with N = 300",
    ),
}
TEACHERS = {
    "ve": Case(
        trains(replace(DIGITS, scalings=VEScalings()), steps=300), edit=rewritten("VE", "EDM")
    ),
    "moons": Case(replace(RING, data=Toy("moons"))),
    "untrained": Case(trains(RING, steps=1)),
    "few steps": Case(
        taught(trains(RING, steps=200), ProgressiveDistillation(steps=8, last=1), EDMScalings())
    ),
    "forty": Case(trains(DIGITS, steps=1500), fault=digits_as(forty)),
    "dropping": Case(replace(DIGITS, network=ResidualMLP(128, 2, 64, label_dropout=0.1))),
    "renumbered": Case(DIGITS, fault=digits_as(renumbered)),
    "compressed": Case("edm", edit=edited(three_bits, "average")),
    "converted": Case("edm", edit=edited(transposed, "average")),
    "rarely": Case(
        replace(
            RING,
            data=Toy("pinwheel", labelled=True),
            network=MLP(64, 3, label_dropout=0.001),
        )
    ),
}
CASES = GOOD | BROKEN | ODD | TEACHERS
BRIEFLY = {"continuous cd", "digits cd"}  # nothing is wrong with them but that they are short
LONG = {
    *("teacher of forty", "forty", "guidance", "dropping", "one noise"),
    *("two levels", "few steps", "depth", "teacher of other data"),
}  # half a minute each


def brief(names):
    """These names; what takes long is marked as slow."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in names]


@dataclass(frozen=True)
class Clinic:
    """Runs and their diagnoses, each made once and only if asked for."""

    root: Path
    known: dict[str, doctor.Diagnosis] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        folder, case = self.root / name, CASES[name]
        if isinstance(case.recipe, str) and not folder.exists():
            shutil.copytree(self.folder(case.recipe), folder)
            case.edit(folder)
        elif not folder.exists():
            recipe = case.recipe
            if recipe.teacher is not None:
                recipe = replace(recipe, teacher=str(self.folder(recipe.teacher)))
            with case.fault(), case.bug():
                run(recipe, folder, progress=False)
            if (case.fault, case.bug) != (nullcontext, nullcontext):
                (folder / sources.NAME).unlink()  # it would tell of every bug, and of every mock
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


@pytest.mark.parametrize("name", brief(BROKEN))
def test_a_fault_is_named_first(clinic, name):
    found = clinic.diagnosis(name)
    assert found.headline.startswith("ill: "), str(found)
    assert re.search(CASES[name].cause, found.headline), str(found)


@pytest.mark.parametrize("name", brief(n for n, case in BROKEN.items() if case.bug != nullcontext))
def test_a_bug_is_named_even_where_no_step_can_be_taken_anew(clinic, name):
    """Such as on another device: by what it has left in log and weights."""
    checks = tuple(check for check in doctor.CHECKS if check is not doctor.steps_anew)
    with mock.patch.object(doctor, "CHECKS", checks):
        found = doctor.examine(clinic.folder(name))
    assert re.search(BROKEN[name].without or BROKEN[name].cause, found.headline), str(found)


def never_quite(old):
    """A mistake for which there is no slip: every third sample is shown twice as noisy."""

    def noisy(x0, z, sigma):
        sigma = sigma * (1 + (torch.arange(len(sigma)) % 3 == 0))
        return old(x0, z, sigma)

    return noisy


def test_a_line_that_was_another_is_quoted(tmp_path):
    with mock.patch.object(edm, "add_noise", never_quite(add_noise)):
        run(trains(RING, steps=50), tmp_path / "run", progress=False)
    with mock.patch.object(replay, "slips", return_value=()):  # there is none for it
        found = doctor.examine(tmp_path / "run")
    assert "losses.edm.add_noise had `sigma = sigma * (1 + (torch.arange" in found.headline
    assert "in place of `cmbook.noise.add_noise`" in found.headline


def test_a_line_that_changes_nothing_is_no_fault(tmp_path):
    def noisy(x0, z, sigma):
        return add_noise(x0, z, sigma)

    with mock.patch.object(edm, "add_noise", noisy):
        run(trains(RING, steps=50, save_every=25), tmp_path / "run", progress=False)
    found = doctor.examine(tmp_path / "run")
    (told,) = (f for f in found.findings if f.check == "code")
    assert (told.verdict, told.measured) == ("well", 1)
    patient = admit(load(tmp_path / "run"), None, "cpu")
    with (
        mock.patch.object(cmbook, "__version__", "9.0"),
        pytest.raises(Undone, match="another version"),
    ):
        [*code(patient)]


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_said(clinic, name):
    found = clinic.diagnosis(name)
    assert re.search(CASES[name].cause, str(found)), str(found)
    assert "it failed" not in str(found)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_run_raises_no_alarm(clinic, name):
    found = clinic.diagnosis(name)
    ill = {f.check for f in found.findings if f.verdict == "ill"}
    assert ill <= ({"samples seen"} if name in BRIEFLY else set()), str(found)
    assert len(found.findings) > 20
    assert "it failed" not in str(found)


def test_the_students_that_come_with_the_package_are_healthy():
    for name in students():
        assert doctor.examine(name).headline == "healthy", name


# ── what it says ──


def test_a_run_that_was_stopped_is_no_alarm(tmp_path):
    stopped, steady = tmp_path / "run", trains(BRIEF, decay="none")
    run(steady, stopped, progress=False)
    rewritten("steps = 250", "steps = 500")(stopped)  # of which the rate does not depend
    found = doctor.examine(stopped)
    assert found.headline.startswith("healthy, but look: training was not finished: step ")


def test_what_grows_is_told_not_to_be_a_fault(clinic):
    assert any("need not fall while N grows" in note for note in clinic.diagnosis("ct").notes)
    assert clinic.diagnosis("cd").notes == ()


class Outsider:
    """A method that the package does not know."""

    needs_teacher = False
    noise_range = RING.noise_range

    def target_decay(self, clock):
        return 0.0

    def __call__(self, models, batch, *, clock, generator):
        return replace(CT, noise_range=self.noise_range)(
            models, batch, clock=clock, generator=generator
        )


def test_mirrored_digits_are_noticed_and_mirrored_squares_are_not(tmp_path):
    """Of a folder of pictures, shown as their mirror images half of the time."""
    digits = Digits().build().x[:400]
    squares = torch.full((400, 1, 8, 8), -1.0)
    for i in range(400):
        row, column, side = i % 3, i // 3 % 3, 3 + i // 9 % 3
        squares[i, 0, row : row + side, column : column + side] = (i % 7 - 2) / 4
        squares[i] += squares[i].flip(-1)
    headlines = {}
    for name, x in {"digits": digits, "squares": squares.clamp(-1, 1)}.items():
        (tmp_path / name).mkdir()
        for i, picture in enumerate(to_bytes(x)):
            Image.fromarray(picture[0].numpy()).save(tmp_path / name / f"{i}.png")
        data = Images(str(tmp_path / name), labelled=False, flip=True, held_out=0.3)
        recipe = replace(QUICK, data=data, training=replace(QUICK.training, steps=2))
        found = doctor.examine(run(recipe, tmp_path / f"run {name}", progress=False))
        verdicts = {f.check: f.verdict for f in found.findings}
        headlines[name] = verdicts["flip"]
        assert verdicts["held out"] == "well"  # for they are compared as training shows them
    assert headlines == {"digits": "ill", "squares": "well"}


def test_a_method_from_outside_is_no_fault(clinic):
    known = load(clinic.folder("ct"))
    recipe = copy(known.recipe)
    object.__setattr__(recipe, "objective", Outsider())  # a recipe's own check knows no others
    found = doctor.examine(replace(known, recipe=recipe))
    assert found.healthy, str(found)
    assert {"boundary", "denoises", "variety"} <= {finding.check for finding in found.findings}


def test_every_check_has_a_norm_and_every_norm_a_check(clinic):
    seen = {
        f.check.removeprefix("teacher ")
        for n in CASES.keys() - LONG
        for f in clinic.diagnosis(n).findings
    }
    assert seen <= set(doctor.NORMS)
    # The digits are gray, not read from files, and nobody is guided. Steps are taken anew.
    apart = {
        "data channels",
        "data gray",
        "data channel copies",
        "data color space",
        "flip",
        "loss again",
        "gradient again",
        "recipe anew",
    }
    assert set(doctor.NORMS) - seen <= apart


def test_what_is_not_at_hand_is_listed_apart(clinic, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(clinic.folder("cd"), moved)
    rewritten(str(clinic.folder("edm")), "nowhere/edm")(moved)
    (moved / "log.csv").unlink()
    with mock.patch.object(Toy, "build", side_effect=ValueError("gone\nfor good")):
        found = doctor.examine(moved)
    assert found.healthy
    reasons = set(found.skipped.values())
    assert {"the data are not at hand (gone)", "the log has fewer than 4 rows"} <= reasons
    assert "the teacher nowhere/edm is not at hand" in reasons
    assert "not done: " in str(found)
    assert "boundary" in {finding.check for finding in found.findings}


def test_data_may_be_handed_over(clinic):
    shifted = TensorData(Digits().build().x, Digits().build().label.roll(333))
    found = doctor.examine(clinic.folder("digits"), data=shifted)
    assert "labels are shuffled" in found.headline


def some_wrong(x, label):
    label = label.clone()
    label[::4] = label[::4].flip(0)
    return TensorData(x, label)


def some_negative(x, label):
    x = x.clone()
    x[::8] *= -1
    return TensorData(x, label)


def framed(x, label):
    small = F.interpolate(x, scale_factor=0.5, mode="area")
    return TensorData(F.pad(small, (2, 2, 2, 2), value=-1.0), label)


def enlarged(x, label):
    small = F.interpolate(x, scale_factor=0.5, mode="area")
    return TensorData(F.interpolate(small, scale_factor=2.0, mode="nearest"), label)


def overflowing(x, label):
    """Sixteen grays times 16, cast to bytes: 256 is 0."""
    return TensorData(((x + 1) * 8 * 16 % 256) / 127.5 - 1, label)


def with_placeholders(x, label):
    x = x.clone()
    x[::20] = x[7]
    return TensorData(x, label)


def some_cut(x, label):
    x = x.clone()
    x[::6, :, 4:] = 0
    return TensorData(x, label)


def some_noisy(x, label):
    x = x.clone()
    x[::5] = (x[::5] + 0.2 * torch.randn(x[::5].shape, generator=seeded(0))).clamp(-1, 1)
    return TensorData(x, label)


def some_on_their_side(x, label):
    x = x.clone()
    x[::3] = x[::3].rot90(-1, (-2, -1))
    return TensorData(x, label)


def some_standing_on_their_head(x, label):
    x = x.clone()
    x[::4] = x[::4].flip(-1, -2)
    return TensorData(x, label)


def stamped(x, label):
    x = x.clone()
    x[::3, :, -2:, -2:] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    return TensorData(x, label)


def some_upside_down(x, label):
    """In the training set alone: half of it."""
    x, others = x.clone(), Digits().build().held_out()
    x[::2] = x[::2].flip(-2)
    return TensorData(x, label, held_out=others)


def as_jpeg(x, label):
    made = []
    for picture in x[:200]:
        file = io.BytesIO()
        Image.fromarray(to_bytes(picture[None])[0, 0].numpy()).save(file, "JPEG", quality=10)
        made.append(torch.from_numpy(np.array(Image.open(file))).float() / 127.5 - 1)
    return TensorData(torch.stack(made)[:, None], label[:200])


def header_left_in(x, label):
    """The sixteen bytes of an idx file taken for pixels."""
    flat = torch.cat([torch.zeros(16), x.flatten()])
    return TensorData(flat[: x.numel()].view_as(x), label)


def half_scaled(x, label):
    x = x.clone()
    x[::5] = (x[::5] + 1) / 2
    return TensorData(x, label)


@pytest.mark.parametrize(
    ("check", "spoil", "cause"),
    [
        ("data pixels", overflowing, "unlike all their neighbors: bytes overflow"),
        ("data mixed", half_scaled, "2.% of the pictures lie in .0, 1., the others in"),
        ("labels wrong", some_wrong, "about 2.% of the labels are wrong"),
        ("data negatives", some_negative, "are negatives of the others"),
        ("data placeholder", with_placeholders, "5.*% of the samples are one and the same"),
        ("data cut off", some_cut, "1.% of the pictures are cut off: they end in one flat color"),
        ("data turned", some_on_their_side, "some of the pictures are turned by 270 degrees"),
        ("data turned", some_standing_on_their_head, "some .* are turned by 180 degrees"),
        ("data compressed", as_jpeg, "strongly compressed as JPEG: .* in steps of [56]."),
        ("data cut elsewhere", header_left_in, "goes on where the one before it ends"),
        ("data stamp", stamped, "33% of the pictures have the same thing in one corner"),
        ("data kinds", some_noisy, "20% of them differ .* how many values their pixels have"),
        (
            "held out",
            some_upside_down,
            "not like those held out: about 50% are as if shown upside down",
        ),
        ("data fixed", framed, "7.% of the pixels are the same in all pictures"),
        ("data blocks", enlarged, "enlarged from small ones"),
    ],
)
def test_what_is_wrong_with_pictures_is_told(clinic, check, spoil, cause):
    digits = Digits().build()
    found = doctor.examine(clinic.folder("digits"), data=spoil(digits.x, digits.label))
    told = {finding.check: finding for finding in found.findings}
    assert told[check].verdict != "well"
    assert re.search(cause, told[check].cause), told[check]
    plain = {f.check: f.verdict for f in clinic.diagnosis("digits").findings}
    assert plain[check] == "well"


REAL, TINTED = Digits().build(), Digits(tinted=True).build()


def without_a_row(x):
    x = x.clone()
    x[..., 3, :] = 0
    return x


def moved_around(x):
    """Each by other numbers of pixels, most of them."""
    return torch.cat([x[i::9].roll((i // 3 - 1, i % 3 - 1), (-2, -1)) for i in range(9)])


def blue_moved(x):
    return torch.cat([x[:, :2], x[:, 2:].roll(1, -1)], 1)


@pytest.mark.parametrize(
    ("data", "spoil", "cause"),
    [
        (REAL, lambda x: F.interpolate(-x.mT, size=12), "scikit-learn, shown transposed"),
        (REAL, lambda x: torch.cat([x[:300], -x[300:].flip(-1)]), "2.% of them shown mirrored"),
        (REAL, without_a_row, "something else in rows 3 to 3"),
        (REAL, lambda x: x + 0.1 * normal(x, seeded("noise")), "with noise of about 0.1 in them"),
        (REAL, moved_around, "about 8.% of them shown moved by some pixels, around the edge"),
        (REAL, lambda x: x + 0.4 * normal(x, seeded("more")), "with noise of about 0.4"),
        (TINTED, lambda x: x.flip(1), "as channels 0 1 2 stand 2 1 0"),
        (TINTED, blue_moved, "channel 2 moved right by 1 of 8 pixels, around the edge, unlike"),
        (Glyphs("HARBOUR"[:4], 12).build(), lambda x: x.flip(-2), "characters, shown upside down"),
    ],
)
def test_known_pictures_are_known_though_all_are_changed(data, spoil, cause):
    x, _ = next(data.batches(400, 1))
    found = worlds.known_pictures(spoil(x))
    assert found.verdict == "ill"
    assert re.search(cause, found.cause), found


def mixed(x):
    """As by motion: every pixel is the mean of three in its row."""
    return (x + x.roll(1, -1) + x.roll(2, -1)) / 3


def light(x):
    """Bright on the left, dark on the right."""
    return (x + 1) * torch.linspace(1, 0.2, 8) - 1


def rotated(x):
    turn = torch.linspace(-1.5, 1.5, len(x))
    c, s, o = turn.cos(), turn.sin(), 0 * turn
    rows = torch.stack([torch.stack([c, s, o], 1), torch.stack([-s, c, o], 1)], 1)
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def converted(space):
    def spoil(x):
        rows = to_bytes(x).permute(0, 2, 3, 1).reshape(-1, 8, 3)
        other = torch.tensor(np.array(Image.fromarray(rows.numpy()).convert(space)))
        return other.reshape(-1, 8, 8, 3).permute(0, 3, 1, 2) / 127.5 - 1

    return spoil


def every_sixth(x):
    x = x.clone()
    x[::6] = normal(x[::6], seeded("else")).clamp(-1, 1)
    return x


@pytest.mark.parametrize(
    ("data", "spoil", "cause"),
    [
        (REAL, mixed, "blurred across, as by motion"),
        (REAL, lambda x: mixed(x.mT).mT, "blurred from top to bottom, as by motion"),
        (REAL, lambda x: 2.4 * x - 0.7 * mixed(x) - 0.7 * mixed(x.mT).mT, "sharpened"),
        (REAL, light, "contrast that depends on the place: .* in row ., column 1, .* column 6"),
        (REAL, lambda x: x[..., torch.tensor([3, 6, 1, 4, 7, 0, 2, 5])], "pixels in other places"),
        (REAL, lambda x: (x + x.flip(0)) / 2, "shown with another one laid over it"),
        (REAL, lambda x: (x > 0.6) * 2.0 - 1, "other grays: where they are 0.5, here is -1"),
        (REAL, rotated, "rotated, each by another angle"),
        (REAL, every_sixth, "about 1.% of them something else"),
        (TINTED, converted("HSV"), "tinted digits in HSV"),
    ],
)
def test_what_was_done_to_known_pictures_is_found_by_fitting_it(data, spoil, cause):
    x, _ = next(data.batches(1000, 1))
    found = worlds.known_pictures(spoil(x))
    assert found.verdict == "ill"
    assert re.search(cause, found.cause), found


def test_a_rule_is_not_found_where_there_is_none():
    x, _ = next(REAL.batches(1000, 1))
    assert marred.ruled(x, REAL.x) is None
    assert marred.ruled(0.3 * x - 0.5, REAL.x) is None
    smooth = F.interpolate(normal(x[..., :4, :4], seeded("smooth")), size=8, mode="bilinear")
    assert marred.ruled(smooth, REAL.x) is None


def test_labels_of_known_pictures_are_known():
    def told(label):
        return worlds.known_pictures(REAL.x[:500], label)

    label = REAL.label[:500]
    assert "0 is called 1, 1 is called 2" in told((label + 1) % 10).cause
    some = (label == 3) & (torch.arange(500) % 3 == 0)
    assert (
        "than most of the same digit: 3 is called 3, and 8"
        in told(torch.where(some, 8, label)).cause
    )
    assert told(label % 2).verdict == "well"


def test_weights_that_are_trained_in_eight_bits_of_mantissa_are_told(clinic, tmp_path):
    shutil.copytree(clinic.folder("edm"), tmp_path / "run")
    edited(lambda w: w.bfloat16(), "student")(tmp_path / "run")
    found = doctor.examine(tmp_path / "run")
    assert "weights are kept in bfloat16 while they train" in found.headline


def test_what_falls_beside_the_data_strays():
    batches = Toy("spirals").build().batches(1000, 0)
    real, others = next(batches).x, next(batches).x
    assert 0.06 < answers.stray(others, real) < 0.14
    beside = others + 0.1 * normal(others, seeded("beside"))
    assert answers.stray(beside, real) > 0.5
    assert parts.apart(beside, real) < 0.003  # which does not see it


def test_what_a_trial_says_comes_before_what_it_explains():
    told = [findings.found(name, 9.0, "look", name) for name in ("samples", "trial")]
    assert [f.check for f in findings.ranked(told, early=False)] == ["trial", "samples"]


def test_what_may_be_wanted_of_known_pictures_is_no_fault():
    x, own = REAL.x[REAL.label > 6], torch.tensor([[1.0, 0.5, 0.3], [0.4, 0.9, 0.6]])
    assert worlds.known_pictures(F.pad(-x, (2, 2, 2, 2), value=1.0)).verdict == "well"
    colored = (x + 1) * own[torch.arange(len(x)) % 2][:, :, None, None] - 1
    assert worlds.known_pictures(colored).verdict == "well"
    corners = [F.pad(x[i::4], (i % 2, 1 - i % 2, i // 2, 1 - i // 2), value=-1.0) for i in range(4)]
    moved = worlds.known_pictures(torch.cat(corners)[..., :8, :8])
    assert (moved.verdict, moved.cause[-14:]) == ("look", "by some pixels")
    letters = next(Glyphs("bdpq", 8, color=True).build().batches(200, 0)).x
    assert worlds.known_pictures(letters).verdict == "well"


def test_colors_and_seams_are_told():
    x = normal(torch.empty(400, 3, 16, 16), seeded("pictures"))
    for _ in range(3):
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x / float(x.abs().max())
    gray = torch.cat([x[:100].mean(1, keepdim=True).expand(-1, 3, -1, -1), x[100:]])

    def told(x):
        return {f.check: (f.verdict, f.measured) for f in parts.odd_pictures(x.double())}

    assert {verdict for verdict, _ in told(x).values()} == {"well"}
    assert told(gray)["data gray"] == ("look", 0.25)
    assert told(0.05 * x)["data compressed"][0] == "well"  # and no detail of less than half a step
    assert told(x[:, [0, 1, 0]])["data channel copies"] == ("ill", 1)
    assert told(x[:, :1].expand(-1, 3, -1, -1))["data channel copies"] == ("well", 0)
    lost = x.clone()
    lost[:, :, 7] = 0
    assert told(lost)["data dead pixels"] == ("ill", 14)
    assert told(x.roll(6, -1))["data seam"][0] == "look"
    assert told(x.roll(6, -2))["data seam"][0] == "look"


def test_luma_and_chroma_are_not_taken_for_colors():
    x = Digits(tinted=True).build().x[:500]
    red, green, blue = x.unbind(1)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    assert parts.luma(x) == 0
    assert parts.luma(torch.stack([y, 0.564 * (blue - y), 0.713 * (red - y)], 1)) > 0.99
    gray = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert parts.luma(gray) == 0
    gray = torch.cat([gray[:, :1], torch.zeros_like(x[:, 1:])], 1)  # and no color anywhere
    assert parts.luma(gray) == 0


def test_missing_values_are_told(clinic):
    moons = Toy("moons").build().held_out().x.clone()
    moons[::20, 1] = 0.0
    found = doctor.examine(clinic.folder("edm"), data=TensorData(moons))
    told = next(finding for finding in found.findings if finding.check == "data missing")
    assert told.verdict == "ill"
    assert re.match(r"coordinate 1 is 0 in [45]\..% of the samples: missing", told.cause)


def test_points_that_were_clamped_are_told(clinic):
    moons = Toy("moons").build().held_out().x
    found = doctor.examine(clinic.folder("edm"), data=TensorData(moons.clamp(-0.6, 0.6)))
    told = next(finding for finding in found.findings if finding.check == "data piled up")
    assert "lie exactly on their bounds: they have been clamped" in told.cause
    fixed = doctor.examine(clinic.folder("edm"), data=TensorData(moons * torch.tensor([1.0, 0.0])))
    assert "1 of 2 coordinates never change" in str(fixed)
    rounded = doctor.examine(clinic.folder("edm"), data=TensorData((moons * 20).round() / 20))
    assert "they have few different values" in str(rounded)


def test_nothing_is_written(clinic):
    folder = clinic.folder("cd")

    def state():
        return {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in folder.parent.rglob("*")}

    before = state()
    doctor.examine(folder)
    assert state() == before


def test_the_command_exits_with_1_if_a_run_is_ill(clinic, capsys):
    main(["doctor", str(clinic.folder("edm")), "--device", "cpu"])
    assert capsys.readouterr().out.startswith("healthy\n")
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(clinic.folder("nan")), "--device", "cpu"])
    assert stop.value.code == 1
    assert capsys.readouterr().out.startswith("ill: the average's weights are NaN")


def test_a_program_reads_the_same_as_json(clinic, capsys):
    with pytest.raises(SystemExit):
        main(["doctor", str(clinic.folder("nan")), "--json", "--device", "cpu"])

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    said = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert not said["healthy"]
    assert said["headline"].startswith("ill: ")
    first = said["findings"][0]
    assert first["check"] == "finite"
    assert first["verdict"] == "ill"
    assert first["normal"] == doctor.NORMS["finite"].normal
    assert any(finding["measured"] is None for finding in said["findings"])


def test_the_commands_of_the_guide_run(capsys):
    guide = Path(__file__).parents[1] / "docs/guides/healthy.md"
    commands = re.findall(r"^cmbook (.+)$", guide.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        main(command.split())
        assert "healthy" in capsys.readouterr().out


# ── trials ──


class Guessed(tried.Bench):
    """Trains nothing: every setting that is at fault hides what swapping the others would bring."""

    def __init__(self, *faults: str) -> None:
        self.faults, self.tries = {*faults}, list[set[str]]()

    def gain(self, swapped):
        names = {change.name for change in swapped}
        self.tries.append(names)
        return 20.0 if self.faults <= names else 1.2

    @property
    def spent(self):
        return False


def blamed(*faults, suspects=()):
    every = [tried.Change(name, 1, 2, "toy/edm") for name in "abcdefgh"]
    bench = Guessed(*faults)
    told = [change for change in every if change.name in suspects]
    return "".join(change.name for change in tried.blamed(bench, every, told)), len(bench.tries)


def test_the_setting_at_fault_is_found_by_halving():
    assert {blamed(name)[0] for name in "abcdefgh"} == {*"abcdefgh"}
    assert blamed("g")[1] < 20  # questions; those asked before cost nothing
    assert blamed("g", suspects="g")[0] == "g"
    assert blamed("none")[0] == ""
    assert blamed("a", "c")[0] == "abcd"  # neither does it alone


def test_settings_are_compared_with_those_of_the_nearest_recipe(clinic):
    patient = admit(load(clinic.folder("edm")), None, "cpu")
    told = {c.name: (c.ours, c.theirs, c.source) for c in tried.differences(patient)}
    assert told["network.width"] == (64, 128, "toy/edm")
    assert told["noise_range.sigma_max"] == (20.0, 80.0, "toy/edm")
    assert not {"training.steps", "noise_range.sigma_data", "network.label_dropout"} & told.keys()


# ── while training ──


def test_training_warns_of_what_shows_at_the_start():
    assert doctor.warnings(RING, RING.data.build()) == []
    wide = TensorData(127.5 * Digits().build().x, bounded=False)
    said = doctor.warnings(trains(DIGITS, average_decay=0.9999), wide)
    assert [line.split()[1] for line in said] == ["data", "is", "average"]
    assert said[0].startswith("the data reach 128, not 1. ")
    assert said[1].startswith("sigma_data is 0.75, but the data's std is ")
    assert "average still remembers the first weights" in said[2]


def test_training_warns_once_of_a_gradient_that_explodes():
    watch, student = doctor.Watch(), torch.nn.Linear(2, 2)
    said = []
    for norm in (1.0, 1.2, 0.9, 1.1, 1.0, 500.0, 900.0):
        with torch.no_grad():
            student.weight += 1
        said.append(watch(norm, student))
    assert [len(lines) for lines in said] == [0, 0, 0, 0, 0, 1, 0]
    assert "gradient explodes" in said[5][0]


def test_training_warns_once_of_weights_that_do_not_move():
    watch, student = doctor.Watch(), torch.nn.Linear(2, 2)
    said = [watch(1.0, student) for _ in range(4)]
    assert [len(lines) for lines in said] == [0, 1, 0, 0]
    assert "the student is frozen" in said[1][0]


def test_a_run_prints_these_warnings(tmp_path, capsys):
    with frozen():
        run(trains(RING, steps=120), tmp_path / "run", progress=False)
    assert capsys.readouterr().err.count("note: no weight has moved") == 1
