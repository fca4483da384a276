"""Steps taken anew: the loop is the trainer's, and each slip leaves a trace of its own."""

import math
import shutil
from dataclasses import replace
from itertools import combinations, count
from unittest import mock

import numpy as np
import pytest
import torch
from test_doctor import CD, CT, DIGITS, RING, edited, rewritten, taught, trains, transposed

from cmbook import (
    EDM,
    MLP,
    ConsistencyScalings,
    ContinuousDistillation,
    Digits,
    EDMScalings,
    Images,
    ProgressiveDistillation,
    Toy,
    doctor,
    load,
    run,
    training,
)
from cmbook.data import ImageData
from cmbook.data.images import images
from cmbook.doctor import history, slips
from cmbook.doctor.loop import Loop
from cmbook.doctor.patient import admit
from cmbook.doctor.replay import ALIKE, EXACT, Span
from cmbook.features import to_bytes
from cmbook.losses import ct, regression
from cmbook.protocols import Batch, Clock
from cmbook.schedules import AdaptiveLevels

LABELLED = trains(
    replace(RING, data=Toy("pinwheel", labelled=True), network=MLP(32, 2, label_dropout=0.1)),
    steps=100, batch_size=64, save_every=50,
)  # fmt: skip
MOVING = replace(CT, curriculum=AdaptiveLevels(4, 30, 0.9))
METHODS = {
    "edm": LABELLED,
    "ct": replace(LABELLED, objective=CT, scalings=ConsistencyScalings()),
    "ct with a target, shards and a clip": trains(
        replace(LABELLED, objective=MOVING, scalings=ConsistencyScalings()),
        accumulation=2, clip=0.5, warmup=20, also_average=(0.5,),
    ),
    "cd": taught(LABELLED, replace(CD, decay=0.9)),
    "guided cd": replace(taught(LABELLED), guidance=2.0),
    "continuous cd": taught(LABELLED, ContinuousDistillation()),
    "progressive": taught(LABELLED, ProgressiveDistillation(steps=4, last=4), EDMScalings()),
    "rounded": trains(LABELLED, precision="bfloat16"),
    "digits": trains(DIGITS, steps=60, batch_size=32, save_every=1000),
}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Folders of runs, each made once and only if asked for."""
    root = tmp_path_factory.mktemp("methods")

    def made(name):
        if not (root / name).exists():
            recipe = METHODS[name]
            if recipe.teacher is not None:
                recipe = replace(recipe, teacher=str(made("edm")))
            run(recipe, root / name, progress=False)
        return root / name

    return made


@pytest.fixture
def patient(folder):
    return lambda name: admit(load(folder(name)), None, "cpu")


def measured(found):
    return {finding.check: finding.measured for finding in found.findings}


# ── the loop ──


@pytest.mark.parametrize("name", METHODS)
def test_without_a_slip_the_steps_are_those_of_the_trainer(patient, name):
    (found,) = doctor.steps_anew(patient(name))
    assert found.measured < 1e-5


@pytest.mark.parametrize("name", ["edm", "ct with a target, shards and a clip", "cd"])
def test_they_go_on_from_a_checkpoint_as_the_trainer_does(patient, name):
    p = patient(name)
    (first, second) = sorted((p.run.folder / "checkpoints").glob("step-*"))
    assert [first.name, second.name] == ["step-00000050", "step-00000100"]
    ((loss, norm),) = Loop(p).rows(first, [100])
    assert loss == pytest.approx(p.rows[-1]["loss"], rel=1e-6)
    assert norm == pytest.approx(p.rows[-1]["gradient_norm"], rel=1e-5)


# ── slips ──


@pytest.mark.parametrize(
    "name",
    [
        *("edm", "ct with a target, shards and a clip"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("cd", "digits")),
    ],
)
def test_every_slip_leaves_a_trace_of_its_own(patient, name):
    """In the loss or the gradient of 12 steps; else it could not be told from others."""
    p = patient(name)
    rows = {}
    for slip in slips.slips(p):
        assert slip.what not in rows
        assert slip.remedy
        rows[slip.what] = tuple(*slip.rows(None, [12])) if carried_out(slip) else None
    nothing = tuple(*Loop(p).rows(None, [12]))
    carried = {what: row for what, row in rows.items() if row is not None}
    assert len(carried) > 50
    assert len(carried) >= len(rows) - 2  # a network that gets the wrong shapes refuses

    def same(one, other):
        return all(math.isclose(a, b, rel_tol=EXACT) for a, b in zip(one, other, strict=True))

    untold = [what for what, row in carried.items() if same(row, nothing)]
    # No gradient is long enough to show it.
    assert set(untold) <= {"the gradient is not clipped", "the gradient is clipped to 1"}
    told = [what for what in carried if what not in untold]
    twins = [pair for pair in combinations(told, 2) if same(*(carried[one] for one in pair))]
    assert not twins, twins


def carried_out(slip):
    try:
        next(slip.rows(None, [1]))
    except (RuntimeError, ValueError):
        return False
    return True


def test_a_loss_or_a_gradient_that_is_too_large_is_named_with_the_factor(folder):
    real = ct.self_consistency

    def summed(*given, **knobs):
        loss = real(*given, **knobs)
        return replace(loss, value=64 * loss.value)

    recipe, there = METHODS["ct"], folder("ct").with_name("summed")
    with mock.patch.object(ct, "self_consistency", summed):
        run(recipe, there, progress=False)
    slip, _ = doctor.steps_anew(admit(load(there), None, "cpu"))
    assert "the loss is 64 times the recipe's" in slip.cause


def test_noise_that_is_drawn_as_people_draw_it_wrongly_is_named(folder):
    """Uniform numbers take others from the generator than normal ones do."""

    def uniform(like, generator):
        return torch.rand(like.shape, generator=generator)

    there = folder("edm").with_name("uniform")
    with mock.patch("cmbook.losses.edm.normal", uniform):
        run(trains(METHODS["edm"], steps=20), there, progress=False)
    slip, _ = doctor.steps_anew(admit(load(there), None, "cpu"))
    assert "the noise comes from torch.rand" in slip.cause
    assert slip.measured < EXACT


def test_pictures_that_come_in_the_order_of_their_file_are_noticed(tmp_path):
    x, label = Digits().build().x, Digits().build().label
    ordered = (to_bytes(x)[:, 0].numpy(), label.numpy())
    np.savez(tmp_path / "d.npz", images=ordered[0], labels=ordered[1])
    recipe = trains(METHODS["digits"], steps=20, batch_size=16)
    recipe = replace(recipe, data=Images(str(tmp_path / "d.npz"), labelled=False))

    def in_order(self, size, seed, start=0):
        for k in count(start):
            yield Batch(images(self.rows, (torch.arange(size) + k * size) % len(self)).x, None)

    with mock.patch.object(ImageData, "batches", in_order):
        run(recipe, tmp_path / "run", progress=False)
    slip, _ = doctor.steps_anew(admit(load(tmp_path / "run"), None, "cpu"))
    assert "samples come in the order of the file" in slip.cause
    assert slip.measured < EXACT


def test_an_unknown_slip_is_told_as_that(folder):
    """Nothing in the list fits, so only the difference is told, and after what says more."""

    def cubed(prediction, target, *given):
        return regression.regress(prediction + 0.3 * prediction.detach() ** 3, target, *given)

    there = folder("edm").with_name("cubed")
    with mock.patch("cmbook.losses.edm.regress", cubed):
        run(trains(METHODS["edm"], steps=20), there, progress=False)
    (told,) = doctor.steps_anew(admit(load(there), None, "cpu"))
    assert told.verdict == "ill"
    assert "what was trained is not what the recipe says" in told.cause
    assert 0.01 < told.measured < 99


@pytest.mark.parametrize("steps", [60, 480])
def test_levels_that_do_not_grow_are_noticed(folder, steps):
    """N grows from 6 to 41 in the recipe, and stays at 6: it shows at once, or only later."""
    there = folder("edm").with_name(f"stuck {steps}")
    recipe = replace(METHODS["edm"], objective=CT, scalings=ConsistencyScalings())
    recipe = trains(recipe, steps=steps, batch_size=8, save_every=steps // 2)
    real = type(CT.curriculum).levels_at

    def first(self, clock):
        return real(self, Clock(0, clock.steps))

    with mock.patch.object(type(CT.curriculum), "levels_at", first):
        run(recipe, there, progress=False)
    p = admit(load(there), None, "cpu")
    slip, _ = doctor.steps_anew(p)
    assert "N is 6 throughout" in slip.cause


def test_weights_that_were_changed_afterwards_are_noticed(folder, tmp_path):
    there = tmp_path / "run"
    run(trains(METHODS["edm"], steps=150), there, progress=False)
    for name in ("student", "average"):  # of the earlier one of its two checkpoints
        with mock.patch("pathlib.Path.glob", lambda self, _: [self / "step-00000100"]):
            edited(lambda w: w + 0.05, name)(there)
    (told,) = doctor.steps_anew(admit(load(there), None, "cpu"))
    assert "the weights in step-00000100 are not those that the run left there" in told.cause


@pytest.mark.parametrize("name", ["edm", "guided cd"])
def test_a_loss_is_taken_anew_as_it_was_taken(patient, name):
    """With the dropout of labels: without it the loss would be another one."""
    (again,) = doctor.history.repeats(patient(name))
    assert 0.75 < again.measured < 1.3


# ── where it cannot be ──


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ('cmbook = "', 'cmbook = "0.', "with the same version"),
        ('device = "cpu"', 'device = "cuda"', "on a CPU"),
        ('device = "cpu"', 'device = "cpu"\nchanges = ["since step 50: lr"]', "same version"),
        ("sigma_data = 0.5", "sigma_data = 0.5", ""),
    ],
)
def test_steps_of_another_version_or_device_are_not_taken(folder, tmp_path, before, after, why):
    there = tmp_path / "run"
    shutil.copytree(folder("digits"), there)  # it has one checkpoint
    rewritten(before, after)(there)
    skipped = doctor.examine(there).skipped
    assert why in skipped.get("steps anew", "") if why else "steps anew" not in skipped


def test_steps_of_another_teacher_are_not_taken(patient):
    p = patient("cd")
    other = replace(p.teacher, model=p.run.model)
    with pytest.raises(Exception, match="are not those that it was trained with"):
        list(doctor.steps_anew(replace(p, teacher=other)))


def test_on_another_processor_the_last_digits_differ_and_that_is_no_slip(patient):
    p = patient("edm")
    p.rows[0]["loss"] *= 1.003
    (found,) = doctor.steps_anew(p)
    assert found.measured == pytest.approx(0.003, rel=0.01)
    assert found.verdict == "look"


def test_what_would_take_too_long_is_not_begun(patient):
    p = patient("edm")
    with mock.patch("cmbook.doctor.replay.MOST", 1.0), pytest.raises(Exception, match="too long"):
        list(doctor.steps_anew(p))


def test_a_loop_that_cannot_be_carried_out_fits_no_log(patient):
    p = patient("edm")
    span = Span(None, [1], [(1.0, 1.0)])
    assert span.off(Loop(p, loss=lambda loop, *given: torch.zeros(2).view(3))) == math.inf
    assert span.off(Loop(p, loss=lambda loop, *given: 1 / 0), ALIKE) == math.inf
    assert isinstance(p.recipe.objective, EDM)


# ── averages ──


@pytest.mark.parametrize(
    ("said", "decay"),
    [
        ("its decay was 0.5", lambda decay: 0.5),
        ("it was never moved", lambda decay: 1.0),
        ("it is the student itself", lambda decay: 0.0),
        ("it was moved by its decay, not by what is left of 1", lambda decay: 1 - decay),
        (None, lambda decay: 0.8),
        ("", lambda decay: decay),
    ],
)
def test_an_average_that_is_blended_otherwise_is_named(tmp_path, said, decay):
    real = training.blend

    def blend(average, model, given):
        real(average, model, decay(given))

    recipe = trains(RING, steps=60, save_every=40, average_decay=0.95)
    with mock.patch.object(training, "blend", blend):
        done = run(recipe, tmp_path / "run", progress=False)
    student, average = doctor.averages_anew(admit(done, None, "cpu"))
    assert student.measured < 1e-4
    if said == "":
        assert average.measured < 1e-4
        return
    assert average.verdict != "well"
    what = "the average is not what training.average_decay = 0.95 makes"
    assert average.cause == (what if said is None else f"{what}: {said}")


def test_weights_that_changed_after_the_last_checkpoint_but_one_are_told(folder, tmp_path):
    done = tmp_path / "run"
    shutil.copytree(folder("edm"), done)
    edited(lambda w: w + 0.01, "student")(done)
    (found,) = doctor.averages_anew(admit(load(done), None, "cpu"))
    assert found.cause == "the weights of step 100 are not those that its steps lead to"


# ── what came of the first weights ──


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: -w, "has the other sign"),
        (transposed, "is transposed"),
        (lambda w: w.flip(0), "is turned around along axis 0"),
    ],
)
def test_weights_that_were_changed_by_a_conversion_are_told(folder, tmp_path, change, said):
    done = tmp_path / "run"
    shutil.copytree(folder("edm"), done)
    edited(change, "average")(done)
    found, _ = history.kin(admit(load(done), None, "cpu"))
    assert found.verdict == "ill"
    assert said in found.cause
