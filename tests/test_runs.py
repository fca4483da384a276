"""Runs: resumed is undisturbed, nothing is lost, and a record says how it was made."""

import csv
import io
import json
import os
import shutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cmbook
from cmbook import (
    EDM,
    L2,
    LPIPS,
    MLP,
    AdaptiveLevels,
    Clock,
    ConsistencyDistillation,
    ConsistencyScalings,
    ConsistencyTraining,
    ContinuousTraining,
    Digits,
    DoublingLevels,
    EDMScalings,
    Experiment,
    NoiseRange,
    PerImage,
    ProgressiveDistillation,
    ResidualMLP,
    Toy,
    UNet,
    checkpoints,
    experiment,
    export,
    guided,
    load,
    ode_sample,
    perceptual,
    prior,
    run,
    runs,
    seeded,
    solve,
)
from cmbook.experiment import Sampling, Training
from cmbook.parameterization import Preconditioned
from cmbook.processes import Processes
from cmbook.protocols import Batch
from cmbook.training import Adam, RAdam, train

TRAINING = Training(
    steps=6, batch_size=8, optimizer=Adam(), warmup=2, decay="cosine", average_decay=0.5,
    save_every=3,
)  # fmt: skip
EDM_RUN = Experiment(
    Toy(), EDM(), EDMScalings(), MLP(16, 2), NoiseRange(sigma_max=10.0), training=TRAINING,
    sampling=Sampling(4, "heun", (10.0,)),
)  # fmt: skip
CT_RUN = replace(
    EDM_RUN,
    objective=ConsistencyTraining(curriculum=DoublingLevels(4, 8)),
    scalings=ConsistencyScalings(),
    sampling=Sampling(sigmas=(10.0, 1.0)),
)
TARGETED_RUN = replace(
    CT_RUN,
    objective=ConsistencyTraining(curriculum=AdaptiveLevels(2, 8)),
    network=ResidualMLP(16, 1, 8, dropout=0.5),
    training=replace(TRAINING, optimizer=RAdam()),
)
BF16_RUN = replace(EDM_RUN, training=replace(TRAINING, precision="bfloat16"))
SHARDED_RUN = replace(CT_RUN, training=replace(TRAINING, accumulation=2, clip=0.1))
AVERAGED_RUN = replace(TARGETED_RUN, training=replace(TRAINING, also_average=(0.9, 0.0)))
DIGITS_RUN = replace(
    EDM_RUN, data=Digits(), network=UNet(8, (1,), attention=()), noise_range=NoiseRange()
)


def make(recipe, folder, **knobs):
    return run(recipe, folder, progress=False, **knobs)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    make(EDM_RUN, folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished consistency model; copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    make(CT_RUN, folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def cd_run(teacher, **knobs):
    objective = ConsistencyDistillation(levels=5, **knobs)
    return replace(CT_RUN, objective=objective, network=None, teacher=str(teacher))


def files(folder):
    """Every file below a folder, to its last byte."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def numbers(checkpoint):
    """Weights, average, target, recipe and optimizer of a checkpoint, to the last bit."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return str(value.dtype), value.numpy().tobytes()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    kept = {k: v for k, v in files(checkpoint).items() if k not in ("state.pt", "manifest.json")}
    return kept | {"state": plain(torch.load(checkpoint / "state.pt", weights_only=True))}


RECIPES = {
    "edm": EDM_RUN,
    "edm in bfloat16": BF16_RUN,
    "ct in shards, clipped": SHARDED_RUN,
    "ct with three averages": AVERAGED_RUN,
    "edm on digits": DIGITS_RUN,
    "ct": CT_RUN,
    "ct with target and dropout": TARGETED_RUN,
    "cd": ConsistencyDistillation(levels=5),
    "cd with target": ConsistencyDistillation(levels=5, decay=0.5),
}


@pytest.mark.parametrize("name", RECIPES)
def test_resumed_equals_undisturbed_bit_for_bit(tmp_path, teacher, name):
    recipe = RECIPES[name]
    if not isinstance(recipe, Experiment):
        recipe = replace(CT_RUN, objective=recipe, network=None, teacher=str(teacher))
    make(recipe, tmp_path)
    last = tmp_path / "checkpoints" / "step-00000006"
    undisturbed = numbers(last)
    shutil.rmtree(last)  # as if killed after step 3
    make(recipe, tmp_path, resume=True)
    assert numbers(last) == undisturbed


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(copied):
    undisturbed = numbers(copied / "checkpoints" / "step-00000006")
    shutil.rmtree(copied / "checkpoints")
    make(CT_RUN, copied, resume=True)
    assert numbers(copied / "checkpoints" / "step-00000006") == undisturbed


def test_a_resumed_log_has_every_row_once(copied):
    before = (copied / "log.csv").read_text().splitlines()
    shutil.rmtree(copied / "checkpoints" / "step-00000006")
    make(CT_RUN, copied, resume=True)
    after = (copied / "log.csv").read_text().splitlines()
    without_time = [
        [row.split(",")[:2] + row.split(",")[3:] for row in log] for log in (before, after)
    ]
    assert without_time[0] == without_time[1]


OLD_LOG = b"step,loss,seconds\n3,0.5,1.25\n"  # as cmbook wrote it before it told the gradient
LOG = b"step,loss,seconds,gradient_norm,learning_rate,images\n3,0.5,1.25,2.5,0.001,24\n"


@pytest.mark.parametrize("log", [OLD_LOG, LOG])
@pytest.mark.parametrize(
    "junk", [b"6,0.1", b"a,b,c\n", b"\xff\xfe\n", b"6,0.1,x\n", b"\n\n", b"6,0.1,2.0,3,0.1"]
)
def test_a_log_cut_by_a_kill_does_not_stop_a_run(copied, log, junk):
    (copied / "log.csv").write_bytes(log + junk)
    assert load(copied).seconds == 1.25


def test_a_log_tells_loss_gradient_rate_and_images(finished):
    with (finished / "log.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6"]
    assert [row["images"] for row in rows] == ["24", "48"]
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([TRAINING.learning_rate(Clock(k, 6)) for k in (2, 5)], rel=1e-5)
    assert all(float(row["gradient_norm"]) > 0 for row in rows)


def test_an_old_log_goes_on_with_the_new_columns(copied):
    shutil.rmtree(copied / "checkpoints" / "step-00000006")
    (copied / "log.csv").write_bytes(OLD_LOG)
    make(CT_RUN, copied, resume=True)
    head, first, second = (copied / "log.csv").read_text().splitlines()
    assert (head.encode(), first) == (LOG.splitlines()[0], "3,0.5,1.25,,,")
    assert (second[:2], second.count(",")) == ("6,", 5)


def test_resuming_a_finished_run_changes_nothing(copied):
    before = files(copied)
    make(CT_RUN, copied, resume=True)
    assert files(copied) == before


def test_two_runs_of_one_recipe_are_equal_bit_for_bit(copied, tmp_path):
    make(CT_RUN, tmp_path / "again")
    name = "checkpoints/step-00000006/student.safetensors"
    assert (copied / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_first_weights_are_a_function_of_the_seed(tmp_path):
    short = replace(EDM_RUN, training=replace(TRAINING, steps=1))
    a = make(short, tmp_path / "a").model.state_dict()
    b = make(replace(short, seed=1), tmp_path / "b").model.state_dict()
    assert not torch.equal(a["net.inlet.weight"], b["net.inlet.weight"])


def test_a_run_leaves_global_randomness_alone(tmp_path):
    before = torch.get_rng_state()
    make(TARGETED_RUN, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_run_returned_is_the_run_on_disk(tmp_path):
    made, read = make(CT_RUN, tmp_path).model.state_dict(), load(tmp_path).model.state_dict()
    assert all(torch.equal(made[name], read[name]) for name in made)


# what a run leaves behind


def test_the_record_says_how_the_run_was_made(finished):
    record = tomllib.loads((finished / "experiment.toml").read_text())["record"]
    expected = {
        "seed": 0,
        "shape": [2],
        "classes": 0,
        "data_sha256": Toy().build().sha256(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "cmbook": cmbook.__version__,
        "torch": torch.__version__,
    }
    assert expected.items() <= record.items()


def test_the_recipe_can_be_read_back_from_the_run(finished):
    assert experiment.loads((finished / "experiment.toml").read_text()) == CT_RUN


def test_the_recipe_of_a_distilled_run_names_the_teachers_network(teacher, tmp_path):
    assert make(cd_run(teacher), tmp_path).recipe.network == EDM_RUN.network


@pytest.mark.parametrize(("step", "finished_"), [(3, False), (6, True)])
def test_one_checkpoint_can_be_loaded(finished, step, finished_):
    loaded = load(finished / "checkpoints" / f"step-{step:08d}")
    assert (loaded.step, loaded.finished, loaded.folder) == (step, finished_, finished)


@pytest.mark.parametrize(("keep", "steps"), [(1, (6,)), (2, (4, 6)), (9, (2, 4, 6))])
def test_as_many_checkpoints_stay_as_are_to_be_kept(tmp_path, keep, steps):
    make(replace(CT_RUN, training=replace(TRAINING, save_every=2, keep=keep)), tmp_path)
    found = checkpoints.checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in found] == [f"step-{step:08d}" for step in steps]
    assert all(load(path).sample(1, generator=seeded(0)).isfinite().all() for path in found)


def test_a_run_can_be_moved_to_another_folder(copied, tmp_path):
    moved = copied.rename(tmp_path / "ün ïcode 数字")
    assert make(CT_RUN, moved, resume=True).finished


def test_a_loaded_model_is_the_average_and_not_the_student(finished):
    path = finished / "checkpoints" / "step-00000006"
    loaded = load(finished).model.state_dict()
    average, student = (checkpoints.read_weights(path, name) for name in ("average", "student"))
    assert loaded.keys() == average.keys()
    assert all(torch.equal(loaded[name], average[name]) for name in average)
    assert not any(torch.equal(student[name], average[name]) for name in average)


def test_a_loaded_model_does_not_drop_out(tmp_path):
    model = make(replace(TARGETED_RUN, training=replace(TRAINING, steps=2)), tmp_path).model
    x, sigma = torch.ones(4, 2), torch.full((4,), 5.0)
    assert not model.training
    assert torch.equal(model(x, sigma), model(x, sigma))
    assert not torch.equal(model.train()(x, sigma), model(x, sigma))


def test_a_student_drops_out_and_its_teacher_does_not(tmp_path, monkeypatch):
    network = ResidualMLP(16, 1, 8, dropout=0.5)
    make(replace(EDM_RUN, network=network, training=replace(TRAINING, steps=1)), tmp_path / "edm")
    called, modes = ConsistencyDistillation.__call__, []

    def spied(self, models, batch, **knobs):
        modes.append((models.student.training, models.teacher.training))
        return called(self, models, batch, **knobs)

    monkeypatch.setattr(ConsistencyDistillation, "__call__", spied)
    make(cd_run(tmp_path / "edm"), tmp_path / "cd")
    assert modes == [(True, False)] * 6


# nothing is lost


def test_a_folder_that_holds_a_run_is_refused(copied):
    before = files(copied)
    with pytest.raises(ValueError, match=r"already holds a run; --resume .* --overwrite .* --out"):
        make(CT_RUN, copied)
    assert files(copied) == before


def test_checkpoints_without_recipe_are_a_run_too(copied):
    (copied / "experiment.toml").unlink()
    with pytest.raises(ValueError, match="already holds a run"):
        make(CT_RUN, copied)


def test_overwriting_replaces_the_run(copied):
    other = replace(CT_RUN, training=replace(TRAINING, steps=2))
    make(other, copied, overwrite=True)
    assert os.listdir(copied / "checkpoints") == ["step-00000002"]


def test_overwriting_spares_other_files(copied):
    (copied / "notes.txt").write_text("mine")
    make(CT_RUN, copied, overwrite=True)
    assert (copied / "notes.txt").read_text() == "mine"


def test_a_wrong_recipe_does_not_overwrite(copied):
    before = files(copied)
    with pytest.raises(ValueError, match=r"UNet .* needs images"):
        make(replace(CT_RUN, network=UNet()), copied, overwrite=True)
    assert files(copied) == before


def test_a_run_does_not_overwrite_its_own_teacher(teacher):
    before = files(teacher)
    with pytest.raises(ValueError, match="holds the teacher of this run"):
        make(cd_run(teacher), teacher, overwrite=True)
    assert files(teacher) == before


def test_a_run_does_not_overwrite_the_run_whose_checkpoint_it_distills(teacher):
    before = files(teacher)
    (checkpoint,) = sorted((teacher / "checkpoints").glob("step-*"))[-1:]
    with pytest.raises(ValueError, match="holds the teacher of this run"):
        make(cd_run(checkpoint), teacher, overwrite=True)
    assert files(teacher) == before


def test_overwrite_leaves_a_strangers_checkpoints_alone(tmp_path):
    mine = tmp_path / "checkpoints" / "model.ckpt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ValueError, match="is no run of cmbook"):
        make(CT_RUN, tmp_path, overwrite=True)
    assert mine.read_text() == "mine"


def test_resume_and_overwrite_exclude_each_other(copied):
    with pytest.raises(ValueError, match="choose one"):
        make(CT_RUN, copied, resume=True, overwrite=True)


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no run to resume in"):
        make(CT_RUN, tmp_path, resume=True)


def test_resuming_with_another_recipe_names_the_difference(copied):
    other = replace(CT_RUN, training=replace(TRAINING, steps=9))
    with pytest.raises(ValueError, match=r"training\.steps was 6, now 9"):
        make(other, copied, resume=True)


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


def test_resuming_with_other_data_is_refused(copied):
    edit(copied / "experiment.toml", Toy().build().sha256(), "0" * 64)
    with pytest.raises(ValueError, match=r"was made from .*data than this"):
        make(CT_RUN, copied, resume=True)


def test_resuming_with_another_teacher_in_the_same_place_is_refused(tmp_path):
    short = replace(EDM_RUN, training=replace(TRAINING, steps=1))
    recipe = cd_run(tmp_path / "edm")
    make(short, tmp_path / "edm")
    make(recipe, tmp_path / "cd")
    assert make(recipe, tmp_path / "cd", resume=True).finished
    make(replace(short, seed=1), tmp_path / "edm", overwrite=True)
    with pytest.raises(ValueError, match=r"was made from .*teacher than this"):
        make(recipe, tmp_path / "cd", resume=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[record]", "[other]"),
        ("classes = 0", 'classes = "none"'),
        ("classes = 0", ""),
        ("width = 16", "width = 'wide'"),
        ("width = 16", "widthh = 16"),
        ("seed = 0", "seed ="),
    ],
)
def test_a_recipe_edited_into_nonsense_is_refused_by_name(copied, old, new):
    edit(copied / "experiment.toml", old, new)
    with pytest.raises(ValueError, match=r"run/experiment\.toml"):
        make(CT_RUN, copied, resume=True)


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_serves(copied):
    path = copied / "checkpoints" / "step-00000006"
    (path / "average.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"Delete {path} to use the checkpoint before it"):
        load(copied)
    shutil.rmtree(path)
    assert load(copied).step == 3


def test_diverged_training_does_not_replace_good_checkpoints(tmp_path):
    knobs = replace(TRAINING, optimizer=Adam(lr=1e36), steps=50, save_every=1, warmup=0)
    recipe = replace(EDM_RUN, training=knobs)
    with pytest.raises(ValueError, match="training has diverged"):
        make(recipe, tmp_path)
    for path in checkpoints.checkpoints(tmp_path / "checkpoints"):
        weights = checkpoints.read_weights(path, "student")
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file; --out names the folder"):
        make(CT_RUN, tmp_path / "file")


# teachers


@pytest.mark.parametrize("name", ["digits/edm", "toy/edm"])
def test_a_missing_teacher_is_named_with_the_command_that_makes_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"make it first: cmbook train {name}$"):
        make(cd_run(f"runs/{name}"), tmp_path / "run")


def test_a_missing_teacher_elsewhere_is_named_with_its_folder(tmp_path):
    with pytest.raises(ValueError, match=r"cmbook train digits/edm --out .*/digits/edm$"):
        make(cd_run(tmp_path / "digits" / "edm"), tmp_path / "run")


def test_a_teacher_without_checkpoint_is_to_be_resumed(tmp_path, copied):
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(ValueError, match=r"--resume$"):
        make(cd_run(copied), tmp_path / "cd")


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no run"):
        make(cd_run(tmp_path / "nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_consistency_model_is_no_teacher(finished, tmp_path):
    with pytest.raises(ValueError, match="is a consistency model"):
        make(cd_run(finished), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": Toy(labelled=True)}, "0 classes; this recipe's data has .* and 8"),
        ({"noise_range": NoiseRange(sigma_max=10.0, sigma_data=0.3)}, "sigma_data 0.5, this reci"),
        ({"network": MLP(17, 2)}, r"leave out \[network\]"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make(replace(cd_run(teacher), **change), tmp_path)


@pytest.mark.parametrize(
    ("recipe", "network", "message"),
    [
        (DIGITS_RUN, UNet(channels=3), "3 channels cannot be shared among 4 heads"),
        (DIGITS_RUN, UNet(multipliers=(1,) * 5), "sides divisible by 16"),
    ],
    ids=["heads", "sides"],
)
def test_a_network_that_cannot_work_is_refused_before_the_folder_is_made(
    tmp_path, recipe, network, message
):
    with pytest.raises(ValueError, match=message):
        make(replace(recipe, network=network), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# sampling


@pytest.fixture(scope="module", params=["points", "images"])
def sampled(request, finished, tmp_path_factory):
    if request.param == "points":
        return load(finished), None
    data = replace(DIGITS_RUN, network=ResidualMLP(64, 2))
    return make(data, tmp_path_factory.mktemp("digits") / "run"), torch.arange(10)


def test_a_sample_depends_on_its_seed_alone(sampled):
    made, label = sampled
    together = made.sample(10, label, generator=PerImage(range(10)))
    alone = made.sample(1, None if label is None else label[7:8], generator=PerImage([7]))
    torch.testing.assert_close(together[7:8], alone, atol=1e-5, rtol=1e-5)


def test_a_sample_of_several_steps_depends_on_its_seed_alone(finished):
    together = load(finished).sample(10, steps=2, generator=PerImage(range(10)))
    alone = load(finished).sample(1, steps=2, generator=PerImage([7]))
    torch.testing.assert_close(together[7:8], alone, atol=1e-5, rtol=1e-5)


def test_sampling_repeats_bit_for_bit(sampled):
    made, label = sampled
    first, second = (made.sample(10, label, generator=seeded(5)) for _ in range(2))
    assert torch.equal(first, second)


def test_one_step_is_one_evaluation_at_sigma_max(finished):
    made = load(finished)
    x = 10.0 * torch.randn(4, 2, generator=seeded(3))
    expected = made.model(x, torch.full((4,), 10.0))
    assert torch.equal(made.sample(4, generator=seeded(3)), expected)


@pytest.mark.parametrize("recipe", [EDM_RUN, CT_RUN], ids=["diffusion", "consistency"])
def test_a_model_that_is_sampled_is_told_the_class(tmp_path, recipe):
    short = replace(recipe, data=Toy(labelled=True), training=replace(TRAINING, steps=1))
    made, label, told = make(short, tmp_path), torch.tensor([7, 2]), []
    made.model.register_forward_pre_hook(lambda model, args: told.append(args[2]))
    made.sample(2, label, steps=2, generator=seeded(0))
    assert len(told) >= 2
    assert all(t is label for t in told)


@pytest.mark.parametrize("steps", [0, 3, -1])
def test_more_steps_than_noise_levels_are_refused(finished, steps):
    with pytest.raises(ValueError, match=rf"names 2 noise levels.*{steps} steps were asked"):
        load(finished).sample(4, steps=steps, generator=seeded(0))


def test_a_checkpoint_that_was_renamed_says_so(copied):
    path = copied / "checkpoints" / "step-00000006"
    with pytest.raises(ValueError, match="was renamed"):
        load(path.rename(path.with_name("best")))


def test_batches_arrive_without_labels_where_there_are_none(finished):
    batch = next(load(finished).recipe.data.build().batches(4, 0))
    assert (type(batch), batch.label) == (Batch, None)


# ── rounds, guidance, and models to give away ──


def progressive_run(teacher, **knobs):
    return replace(
        EDM_RUN, objective=ProgressiveDistillation(steps=4, last=1), network=None,
        teacher=str(teacher), **knobs,
    )  # fmt: skip


def test_progressive_distillation_is_one_run_a_round_and_each_teaches_the_next(teacher, tmp_path):
    done = run(progressive_run(teacher), tmp_path / "run", progress=False)
    rounds = [load(tmp_path / name) for name in ("run-4", "run-2", "run")]
    assert [r.recipe.objective.steps for r in rounds] == [4, 2, 1]
    assert [r.recipe.teacher for r in rounds] == [
        str(teacher), str(tmp_path / "run-4"), str(tmp_path / "run-2")
    ]  # fmt: skip
    assert all(r.finished for r in rounds)
    assert done.folder == tmp_path / "run"


def test_a_progressive_student_takes_its_own_number_of_euler_steps(teacher, tmp_path):
    run(progressive_run(teacher), tmp_path / "run", progress=False)
    two = load(tmp_path / "run-2")
    noise_range, x = two.recipe.noise_range, None
    drawn = two.sample(5, generator=seeded(0))
    x = prior(torch.empty(5, 2), noise_range, seeded(0))
    assert torch.equal(drawn, solve(two.model, x, noise_range.grid(3), solver="euler"))


def test_a_progressive_run_resumes_in_the_round_where_it_stopped(teacher, tmp_path):
    whole = progressive_run(teacher)
    run(whole, tmp_path / "undisturbed", progress=False)
    run(replace(whole, objective=ProgressiveDistillation(steps=4, last=4)), tmp_path / "run-4",
        progress=False)  # fmt: skip
    before = files(tmp_path / "run-4")
    run(whole, tmp_path / "run", resume=True, progress=False)
    assert files(tmp_path / "run-4") == before
    ours, theirs = (load(tmp_path / name).model.state_dict() for name in ("run", "undisturbed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_folders_of_all_rounds_are_looked_at_before_the_first(teacher, tmp_path):
    """A run in the way of the last round shows at once, not after the others are trained."""
    (tmp_path / "run-2" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="run-2 already holds a run"):
        run(progressive_run(teacher), tmp_path / "run", progress=False)
    assert not (tmp_path / "run-4").exists()


def test_a_round_does_not_overwrite_the_teacher_of_the_first(teacher, tmp_path):
    """It lies where the second round would: overwriting would delete it after it has taught."""
    shutil.copytree(teacher, tmp_path / "run-2")
    before = files(tmp_path / "run-2")
    recipe = progressive_run(tmp_path / "run-2")
    with pytest.raises(ValueError, match="run-2 holds the teacher of this run"):
        run(recipe, tmp_path / "run", overwrite=True, progress=False)
    assert files(tmp_path / "run-2") == before
    assert not (tmp_path / "run-4").exists()


def test_a_round_that_another_teacher_has_taught_is_not_resumed(teacher, tmp_path):
    """The first round was made anew, by another seed: the later ones are not its students."""
    whole = progressive_run(teacher)
    run(whole, tmp_path / "run", progress=False)
    other = replace(whole, objective=ProgressiveDistillation(steps=4, last=4), seed=1)
    run(other, tmp_path / "other", progress=False)
    for name in ("average", "student"):  # as if training had ended elsewhere
        weights = f"checkpoints/step-00000006/{name}.safetensors"
        shutil.copy(tmp_path / "other" / weights, tmp_path / "run-4" / weights)
    manifest = "checkpoints/step-00000006/manifest.json"
    sums, theirs = (json.loads((tmp_path / d / manifest).read_text()) for d in ("run-4", "other"))
    sums |= {f"{n}.safetensors": theirs[f"{n}.safetensors"] for n in ("average", "student")}
    (tmp_path / "run-4" / manifest).write_text(json.dumps(sums))
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match="run-2 was made from another teacher than this"):
        run(whole, tmp_path / "run", resume=True, progress=False)
    assert files(tmp_path / "run") == before


def test_the_rounds_of_a_run_in_this_very_folder_lie_beside_it(teacher, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    whole = progressive_run(teacher)
    for name in (".", "../here", "deeper/.."):
        folders = [folder.resolve() for _, folder in cmbook.runs.rounds(whole, Path(name))]
        assert folders == [tmp_path / "here-4", tmp_path / "here-2", tmp_path / "here"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A teacher that knows classes, and can do without."""
    recipe = replace(
        EDM_RUN, data=Toy(world="moons", labelled=True), network=MLP(16, 2, label_dropout=0.2)
    )
    return run(recipe, tmp_path_factory.mktemp("labelled") / "run", progress=False)


def guided_cd(teacher):
    return replace(
        cd_run(teacher), data=Toy(world="moons", labelled=True), guidance=2.0, network=None
    )


def test_a_guided_teacher_is_distilled(labelled, tmp_path, monkeypatch):
    """The teacher that the objective sees is the guided one."""
    seen = []
    monkeypatch.setattr(
        cmbook.runs, "guided", lambda model, scale: seen.append((model, scale)) or model
    )
    run(guided_cd(labelled.folder), tmp_path / "run", progress=False)
    assert [scale for _, scale in seen] == [2.0]
    assert load(tmp_path / "run").recipe.guidance == 2.0


def test_sampling_with_guidance_walks_along_the_guided_denoiser(labelled):
    label = torch.tensor([0, 1, 1])
    drawn = labelled.sample(3, label, guidance=3.0, generator=seeded(0))
    x = prior(torch.empty(3, 2), labelled.recipe.noise_range, seeded(0))
    model = guided(labelled.model, 3.0)
    by_hand = ode_sample(model, x, labelled.recipe.noise_range, label, levels=4, solver="heun")
    assert torch.equal(drawn, by_hand)
    assert not torch.allclose(drawn, labelled.sample(3, label, generator=seeded(0)))


def test_guidance_needs_a_teacher_that_can_do_without_labels(teacher, tmp_path):
    with pytest.raises(ValueError, match=r"trained with network\.label_dropout"):
        run(replace(cd_run(teacher), guidance=2.0), tmp_path / "run", progress=False)


def test_a_consistency_model_takes_no_guidance_when_sampled(finished):
    with pytest.raises(ValueError, match="has it from its teacher"):
        load(finished).sample(2, guidance=2.0, generator=seeded(0))


@pytest.mark.parametrize("half", [False, True])
def test_an_exported_model_is_the_model(finished, tmp_path, half):
    made = load(finished)
    alone = load(export(made, tmp_path / "given away", half=half))
    assert (alone.step, alone.recipe) == (made.step, made.recipe)
    assert alone.folder == tmp_path / "given away"
    one, two = (r.sample(4, generator=seeded(0)) for r in (alone, made))
    assert torch.allclose(one, two, atol=1e-2 if half else 0)
    assert torch.equal(one, two) != half
    names = {path.name for path in (tmp_path / "given away").iterdir()}
    assert names == {"average.safetensors", "experiment.toml", "manifest.json"}


def test_an_exported_model_can_teach(labelled, tmp_path):
    folder = export(labelled, tmp_path / "teacher")
    assert run(guided_cd(folder), tmp_path / "run", progress=False).finished


def test_the_folder_of_an_export_may_be_a_string(finished, tmp_path):
    assert export(load(finished), str(tmp_path / "shared")) == tmp_path / "shared"


def test_an_export_replaces_nothing(finished, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already; name another folder"):
        export(load(finished), tmp_path / "there")


def test_a_damaged_export_is_refused(finished, tmp_path):
    weights = export(load(finished), tmp_path / "given away") / "average.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is not what was saved"):
        load(tmp_path / "given away")


# ── several averages ──


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged") / "run"
    make(AVERAGED_RUN, folder)
    return folder


def test_an_average_is_chosen_by_its_decay(averaged):
    path = averaged / "checkpoints" / "step-00000006"
    names = {None: "average", 0.5: "average", 0.9: "average-0.9", 0.0: "student"}
    for decay, name in names.items():
        made, weights = load(averaged, average=decay), checkpoints.read_weights(path, name)
        assert all(torch.equal(w, weights[key]) for key, w in made.model.state_dict().items())
        assert made.average == (0.5 if decay is None else decay)


def test_an_average_that_is_not_there_is_refused_with_those_that_are(averaged):
    with pytest.raises(ValueError, match=r"run has averages of decay 0\.5, 0\.9, 0\.0; got 0\.99$"):
        load(averaged, average=0.99)


def test_a_run_with_one_average_names_it(finished):
    with pytest.raises(ValueError, match=r"has averages of decay 0\.5; got 0\.9$"):
        load(finished, average=0.9)


def test_a_lost_average_is_named(averaged, tmp_path):
    copy = shutil.copytree(averaged, tmp_path / "run")
    (copy / "checkpoints" / "step-00000006" / "average-0.9.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has lost average-0\.9\.safetensors"):
        load(copy)


def test_an_exported_average_is_the_only_one_of_its_recipe(averaged, tmp_path):
    made = load(averaged, average=0.9)
    alone = load(export(made, tmp_path / "given away"))
    assert torch.equal(*(r.sample(4, generator=seeded(0)) for r in (alone, made)))
    assert alone.average == 0.9
    assert alone.recipe.training == replace(TRAINING, average_decay=0.9)
    with pytest.raises(ValueError, match=r"has averages of decay 0\.9; got 0\.5"):
        load(tmp_path / "given away", average=0.5)


def test_a_recipe_without_the_newer_settings_resumes(copied):
    """Runs made before accumulation, clipping and further averages go on."""
    for path in (copied / "experiment.toml", copied / "checkpoints/step-00000003/experiment.toml"):
        for line in ("also_average = []\n", "accumulation = 1\n"):
            assert line in path.read_text()
            edit(path, line, "")
    undisturbed = checkpoints.read_weights(copied / "checkpoints" / "step-00000006", "average")
    shutil.rmtree(copied / "checkpoints" / "step-00000006")
    edit(
        copied / "checkpoints/step-00000003/manifest.json",
        json.loads((copied / "checkpoints/step-00000003/manifest.json").read_text())[
            "experiment.toml"
        ],
        checkpoints._sha256(copied / "checkpoints/step-00000003/experiment.toml"),
    )
    resumed = make(CT_RUN, copied, resume=True).model.state_dict()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


# ── TensorBoard ──


SMALL_DIGITS = replace(DIGITS_RUN, network=ResidualMLP(16, 1, 8))


def board_of(folder):
    """What TensorBoard reads in a folder."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("shown") / "run"
    make(SMALL_DIGITS, folder, tensorboard=True)
    return folder


def test_tensorboard_shows_the_numbers_of_the_log(shown):
    events = board_of(shown)
    with (shown / "log.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert set(events.Tags()["scalars"]) == rows[0].keys() - {"step"}
    for name in events.Tags()["scalars"]:
        points = events.Scalars(name)
        assert [p.step for p in points] == [3, 6]
        told = [float(row[name]) for row in rows]
        assert [p.value for p in points] == pytest.approx(told, rel=1e-4, abs=1e-3)


def test_tensorboard_shows_samples_at_every_save(shown):
    pictures = board_of(shown).Images("samples")
    assert [p.step for p in pictures] == [3, 6]
    assert {(p.width, p.height) for p in pictures} == {(8 * 8, 8 * 8)}
    with Image.open(io.BytesIO(pictures[-1].encoded_image_string)) as picture:
        grid = torch.from_numpy(np.array(picture))[..., 0]
    made = load(shown)
    label = torch.arange(64) % 10
    drawn = made.sample(64, label, generator=PerImage(range(64)))
    drawn = ((drawn + 1) / 2).clamp(0, 1).reshape(8, 8, 8, 8).transpose(1, 2).reshape(64, 64)
    assert (grid - 255 * drawn).abs().max() <= 1


def test_a_run_that_is_shown_is_the_run(shown, tmp_path):
    make(SMALL_DIGITS, tmp_path / "run")
    name = "checkpoints/step-00000006"
    assert numbers(shown / name) == numbers(tmp_path / "run" / name)
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_what_an_interrupted_run_had_shown_is_not_shown_twice(shown, tmp_path):
    copy = shutil.copytree(shown, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    make(SMALL_DIGITS, copy, resume=True, tensorboard=True)
    assert [p.step for p in board_of(copy).Scalars("loss")] == [3, 6]


def test_overwriting_replaces_what_was_shown(shown, tmp_path):
    copy = shutil.copytree(shown, tmp_path / "run")
    make(replace(SMALL_DIGITS, training=replace(TRAINING, steps=2)), copy, overwrite=True)
    assert not (copy / "tensorboard").exists()


def test_points_are_shown_as_curves_alone(tmp_path):
    pytest.importorskip("tensorboard")
    make(EDM_RUN, tmp_path, tensorboard=True)
    assert board_of(tmp_path).Tags()["images"] == []


def test_without_tensorboard_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'cmbook\[tensorboard\]'"):
        make(CT_RUN, tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_a_student_may_drop_other_units_than_its_teacher(tmp_path):
    """The teacher with dropout, the student without, as in the paper: weights are copied."""
    unet = UNet(8, (1,), attention=(), dropout=0.5)
    training = replace(EDM_RUN.training, steps=1, batch_size=4)
    first = replace(
        EDM_RUN, data=Digits(), network=unet, noise_range=NoiseRange(), training=training
    )
    make(first, tmp_path / "edm")
    second = replace(
        cd_run(tmp_path / "edm"),
        data=Digits(),
        network=replace(unet, dropout=0.0),
        noise_range=NoiseRange(),
        sampling=Sampling(),
        training=training,
    )
    student = make(second, tmp_path / "cd").model
    rates = {part.p for part in student.modules() if isinstance(part, torch.nn.Dropout)}
    assert rates == {0.0}
    assert load(tmp_path / "cd").recipe.network.dropout == 0.0


# ── what a run does before it begins ──


def test_a_teacher_that_the_loss_never_asks_is_let_go(teacher, tmp_path, monkeypatch):
    """The student starts as its copy and the record knows it: nothing else needs its memory."""
    told = []

    def watched(*args, **knobs):
        told.append(knobs["teacher"])
        return train(*args, **knobs)

    monkeypatch.setattr(runs, "train", watched)
    begun = replace(CT_RUN, objective=ContinuousTraining(), network=None, teacher=str(teacher))
    made = make(begun, tmp_path / "ct")
    assert told == [None]
    assert made.record["teacher_sha256"]
    assert make(begun, tmp_path / "ct", resume=True).finished
    make(cd_run(teacher), tmp_path / "cd")
    assert told[1] is not None


@pytest.fixture
def no_weights(monkeypatch):
    """LPIPS on a machine without its weights."""

    def refuse(net):
        raise ValueError("LPIPS needs a file")

    monkeypatch.setattr(perceptual, "_pretrained", refuse)
    perceptual._network.cache_clear()
    yield
    perceptual._network.cache_clear()


def perceived():
    return replace(CT_RUN, objective=replace(CT_RUN.objective, distance=LPIPS()))


def test_without_what_a_distance_needs_no_folder_is_made(no_weights, tmp_path):
    with pytest.raises(ValueError, match="LPIPS needs a file"):
        make(perceived(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_what_a_distance_needs_the_old_run_is_not_overwritten(no_weights, copied):
    before = files(copied)
    with pytest.raises(ValueError, match="LPIPS needs a file"):
        make(perceived(), copied, overwrite=True)
    assert files(copied) == before


def test_a_finished_run_needs_no_distance(no_weights, copied):
    file = copied / "experiment.toml"
    text = file.read_text()
    recorded = experiment.dumps(perceived())
    file.write_text(recorded + text[text.index("[record]") :])
    assert make(perceived(), copied, resume=True).finished


def test_the_main_process_fetches_first():
    order = []

    class Distance(L2):
        def prepare(self, device):
            order.append(("prepare", device.type))

    class Two(Processes):
        def on_main(self, do):
            order.append("main begins")
            do()
            order.append("main is done")

    objective = replace(CT_RUN.objective, distance=Distance())
    student = Preconditioned(MLP(8, 1).build((2,)), ConsistencyScalings())
    runs._prepare(replace(CT_RUN, objective=objective), student, Two())
    prepared = ("prepare", "cpu")
    assert order == ["main begins", prepared, "main is done", prepared]
    order.clear()
    runs._prepare(CT_RUN, student, Two())
    assert order == []
