"""The recipes of the paper: its settings, its networks, and one real step of each."""

from dataclasses import replace

import pytest
import torch

from cmbook import L2, LPIPS, NoiseRange, seeded
from cmbook.experiment import Experiment, loads, recipe_text, recipes
from cmbook.noise import normal
from cmbook.parameterization import EDMScalings, Preconditioned
from cmbook.protocols import Batch
from cmbook.schedules import AdaptiveLevels
from cmbook.training import distilled, train

SHAPES = {
    "cifar10": ((3, 32, 32), None),
    "imagenet64": ((3, 64, 64), 1000),
    "lsun256": ((3, 256, 256), None),
}
FULL = [
    name
    for name in recipes()
    if name.split("/")[0] in SHAPES and not name.endswith(("-one-gpu", "-laptop"))
]
PARAMETERS = {
    "cifar10": 56_395_523,
    "cifar10/edm-deep": 97_610_499,
    "cifar10/continuous-cd": 97_610_499,
    "cifar10/continuous-ct": 97_610_499,
    "imagenet64": 295_899_267,
    "lsun256": 526_304_771,
}


def recipe(name: str, *overrides: str) -> Experiment:
    return loads(recipe_text(name), list(overrides))


def test_every_column_of_the_paper_is_there():
    kinds = ("edm", "cd", "ct", "progressive", "continuous-cd", "continuous-ct")
    expected = {f"cifar10/{kind}" for kind in kinds}
    expected |= {"cifar10/edm-deep"}
    expected |= {f"{family}/{kind}" for family in ("imagenet64", "lsun256") for kind in kinds[:3]}
    assert set(FULL) == expected
    beside = {f"{name}-{kind}" for name in FULL for kind in ("one-gpu", "laptop")}
    assert beside - {"cifar10/edm-deep-laptop"} <= set(recipes())


@pytest.mark.parametrize("name", FULL)
def test_the_network_has_the_published_size(name):
    (shape, classes), network = SHAPES[name.split("/")[0]], recipe(name).network
    with torch.device("meta"):
        net = network.build(shape, classes)
    expected = PARAMETERS.get(name, PARAMETERS[name.split("/")[0]])
    assert sum(p.numel() for p in net.parameters()) == expected


TABLE3 = {  # learning rate, batch, steps, average: Song et al. (2023), Table 3
    "cifar10/cd": (4e-4, 512, 800_000, 0.9999),
    "cifar10/ct": (4e-4, 512, 800_000, 0.9999),
    "imagenet64/cd": (8e-6, 2048, 600_000, 0.999943),
    "imagenet64/ct": (8e-6, 2048, 800_000, 0.999943),
    "lsun256/cd": (1e-5, 2048, 600_000, 0.0),  # Bedroom: none; Cat is in its first lines
    "lsun256/ct": (1e-5, 2048, 1_000_000, 0.999943),
}


@pytest.mark.parametrize("name", TABLE3)
def test_settings_are_those_of_table_3(name):
    made, (lr, batch, steps, average) = recipe(name), TABLE3[name]
    training = made.training
    assert (training.optimizer.lr, training.batch_size, training.steps) == (lr, batch, steps)
    assert (type(training.optimizer).__name__, training.average_decay) == ("RAdam", average)
    assert made.network.dropout == 0
    assert made.objective.weight == "uniform"
    large = not name.startswith("cifar10")
    pooling = "average" if large else "max"  # each as the code that trained them
    assert made.objective.distance == LPIPS(pooling=pooling)
    assert made.noise_range == NoiseRange(0.002, 80.0, 7.0, 0.5)
    if name.endswith("cd"):
        assert made.objective.levels == (40 if large else 18)
        assert made.objective.solver == "heun"
        assert made.objective.decay == (0.95 if large else 0.0)
    else:
        end = {"cifar10": 150, "imagenet64": 200, "lsun256": 150}[name.split("/")[0]]
        start_decay = 0.95 if large else 0.9
        assert made.objective.curriculum == AdaptiveLevels(2, end, start_decay)


@pytest.mark.parametrize("name", [n for n in recipes() if n.endswith("-one-gpu")])
def test_one_gpu_changes_the_shards_and_whose_student_it_is_alone(name):
    ours, full = recipe(name), recipe(name.removesuffix("-one-gpu"))
    assert ours.training.accumulation > 1
    training = replace(ours.training, accumulation=full.training.accumulation)
    assert replace(ours, training=training, teacher=full.teacher) == full
    if full.teacher is None:
        assert ours.teacher is None
    else:  # the run that the same machine can make
        assert ours.teacher == f"{full.teacher}-one-gpu"
        assert ours.teacher.removeprefix("runs/") in recipes()


def test_the_cat_of_lsun_has_the_average_of_table_3():
    line = next(line for line in recipe_text("lsun256/cd").splitlines() if "# Cat:" in line)
    settings = line.removeprefix("# Cat: ").partition(";")[0].split()
    assert recipe("lsun256/cd", *settings).training.average_decay == 0.999943


@pytest.mark.parametrize(
    ("name", "levels", "index"),
    [("imagenet64/cd", 40, 22), ("imagenet64/ct", 201, 106), ("lsun256/cd", 40, 17),
     ("lsun256/ct", 151, 67), ("cifar10/cd", 18, 11)],
)  # fmt: skip
def test_two_step_sampling_is_at_the_published_index(name, levels, index):
    made = recipe(name)
    assert made.noise_range.grid(levels)[index] == pytest.approx(made.sampling.sigmas[1], abs=1e-4)


def test_the_time_points_of_comments_are_those_of_the_grid():
    grid = NoiseRange().grid
    for name, levels, index in [("lsun256/cd", 40, 18), ("lsun256/ct", 151, 62)]:
        assert f"[80.0, {grid(levels)[index]:.4f}]" in recipe_text(name)


@pytest.mark.parametrize("name", [n for n in recipes() if n.endswith("-laptop")])
def test_a_laptop_takes_a_real_step_of_every_recipe(name):
    """Data, network, objective and optimizer as `cmbook train` builds them."""
    made = recipe(name, "training.batch_size=4")
    full = recipe(name.removesuffix("-laptop"))
    assert type(made.objective) is type(full.objective)
    assert type(made.network) is type(full.network)
    data = made.data.build()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = made.network.build(data.shape, data.classes)
    teacher = None
    if made.teacher is not None:
        teacher = Preconditioned(net, EDMScalings(made.noise_range)).eval().requires_grad_(False)
        student = distilled(teacher, made.scalings)
    else:
        student = Preconditioned(net, made.scalings)
    before = [p.detach().clone() for p in student.parameters()]
    steps = train(
        student,
        data.batches(4, made.seed),
        made.objective,
        steps=2,
        optimizer=made.training.optimizer.build(student),
        teacher=teacher if made.objective.needs_teacher else None,
    )
    losses = [float(step.loss.value) for step in steps]
    assert all(loss == loss and abs(loss) < 1e6 for loss in losses)
    moved = [not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)]
    assert any(moved)


def test_a_one_line_override_changes_the_distance():
    for name in ("imagenet64/cd", "cifar10/ct"):
        assert recipe(name, "objective.distance.kind=L2").objective.distance == L2()


@pytest.mark.slow
def test_imagenet64_cd_takes_a_real_step_at_full_size():
    """Student, target, teacher and average, batch of one, with l2 in place of LPIPS."""
    made = recipe("imagenet64/cd", "objective.distance.kind=L2")
    shape, classes = SHAPES["imagenet64"]
    net = made.network.build(shape, classes)
    teacher = Preconditioned(net, EDMScalings()).eval().requires_grad_(False)
    student = distilled(teacher, made.scalings)
    batch = Batch(normal(torch.empty(1, *shape), seeded(0)), torch.tensor([207]))
    steps = train(
        student, iter([batch]), made.objective, steps=1, teacher=teacher,
        optimizer=made.training.optimizer.build(student),
    )  # fmt: skip
    step = next(steps)
    assert step.loss.value > 0
    assert step.gradient_norm > 0
    assert step.state.target is not None
