"""Recipes: strict on the way in, complete on the way out."""

import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cmbook import (
    EDM,
    L1,
    L2,
    LPIPS,
    MLP,
    ConsistencyDistillation,
    ConsistencyScalings,
    ConsistencyTraining,
    Digits,
    Experiment,
    IDDPMScalings,
    Images,
    LInf,
    NoiseRange,
    PseudoHuber,
    ResidualMLP,
    Toy,
    UNet,
    VEScalings,
    VPScalings,
)
from cmbook.experiment import dumps, loads, recipe_text, recipes
from cmbook.schedules import FixedLevels
from cmbook.training import Adam, RAdam

RING = """
data = { kind = "Toy" }
network = { kind = "MLP" }
scalings = { kind = "ConsistencyScalings" }
[noise_range]
sigma_max = 10.0
[objective]
kind = "ConsistencyTraining"
[training]
steps = 10_000
optimizer = { kind = "RAdam" }
[sampling]
sigmas = [10.0, 1.0]
"""


def test_the_shipped_recipes_are_a_teacher_and_two_students_of_two_worlds():
    expected = {f"{world}/{name}" for world in ("toy", "digits") for name in ("edm", "cd", "ct")}
    assert expected <= set(recipes())


@pytest.mark.parametrize("name", recipes())
def test_every_shipped_recipe_comes_back_equal(name):
    recipe = loads(recipe_text(name))
    assert loads(dumps(recipe)) == recipe


@pytest.mark.parametrize("name", recipes())
def test_every_shipped_recipe_builds(name, tmp_path):
    recipe = loads(recipe_text(name))
    if isinstance(recipe.data, Images):  # a tiny file stands for what must be fetched
        np.savez(tmp_path / "set.npz", np.zeros((10, 28, 28), np.uint8), np.arange(10))
        recipe = replace(recipe, data=replace(recipe.data, path=str(tmp_path / "set.npz")))
    data, network = recipe.data.build(), recipe.network or MLP()
    with torch.device("meta"):
        net = network.build(data.shape, data.classes)
    optimizer = recipe.training.optimizer.build(net)
    assert optimizer.param_groups[0]["lr"] == recipe.training.optimizer.lr


@pytest.mark.parametrize("name", recipes())
def test_every_shipped_recipe_opens_with_a_sentence_for_the_list(name):
    first = recipe_text(name).splitlines()[0]
    assert (first.startswith("# "), len(first) <= 100) == (True, True)


@pytest.mark.parametrize("name", recipes())
def test_every_teacher_of_a_shipped_recipe_is_the_run_of_a_shipped_recipe(name):
    teacher = loads(recipe_text(name)).teacher
    assert teacher is None or teacher.removeprefix("runs/") in recipes()


EXPERIMENTS = [
    Experiment(Toy("moons"), EDM(), ConsistencyScalings(), MLP(), seed=2**32 - 1),
    Experiment(
        Digits(labelled=False),
        ConsistencyTraining(curriculum=FixedLevels(7, 0.25), distance=PseudoHuber(c=0.125)),
        ConsistencyScalings(),
        UNet(multipliers=(1, 2, 3), attention=()),
        NoiseRange(0.01, 80.0, 3.0, 0.1 + 0.2),
    ),
    Experiment(
        Toy(),
        ConsistencyDistillation(levels=3, solver="euler", distance=LInf(), decay=1 / 3),
        ConsistencyScalings(),
        ResidualMLP(dropout=1e-300),
        teacher='a "strange"\n folder \\ Ω',
    ),
    Experiment(Toy(), EDM(), VPScalings(beta_d=1 / 3, steps=7), MLP()),
    Experiment(Toy(), EDM(), VEScalings(), MLP()),
    Experiment(Toy(), EDM(), IDDPMScalings(C_1=1e-4, M=7), MLP()),
]


@pytest.mark.parametrize("recipe", EXPERIMENTS, ids=["plain", "nested", "odd", "vp", "ve", "iddpm"])
def test_a_recipe_written_and_read_is_equal(recipe):
    assert loads(dumps(recipe)) == recipe


def test_every_setting_is_written():
    written = tomllib.loads(dumps(loads(RING)))
    assert written["training"] == {
        "steps": 10_000, "batch_size": 512, "warmup": 0, "decay": "none", "average_decay": 0.9999,
        "also_average": [], "accumulation": 1, "precision": "float32", "save_every": 1000,
        "keep": 2, "teacher_precision": "float32", "compile": False,
        "optimizer": {"kind": "RAdam", "lr": 4e-4, "betas": [0.9, 0.999]},
    }  # fmt: skip


def test_the_noise_range_is_written_once():
    assert dumps(loads(RING)).count("sigma_max") == 1


def test_the_one_noise_range_reaches_scalings_and_objective():
    recipe = loads(RING, ["noise_range.sigma_data=0.25"])
    expected = NoiseRange(sigma_max=10.0, sigma_data=0.25)
    assert recipe.objective.noise_range == recipe.scalings.noise_range == expected


def test_the_record_of_a_run_is_no_part_of_its_recipe():
    assert loads(f"{RING}\n[record]\nshape = [2]\n") == loads(RING)


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("training.steps=7", lambda e: e.training.steps, 7),
        ("training.steps = 7", lambda e: e.training.steps, 7),
        ("training.optimizer={kind='Adam'}", lambda e: e.training.optimizer, Adam()),
        ("training.optimizer.kind=RAdam", lambda e: e.training.optimizer, RAdam()),
        ("seed=1_000", lambda e: e.seed, 1000),
        ("objective.distance.kind=PseudoHuber", lambda e: e.objective.distance, PseudoHuber()),
        ("sampling.sigmas=[10, 2, 1]", lambda e: e.sampling.sigmas, (10.0, 2.0, 1.0)),
        ("data.world=moons", lambda e: e.data.world, "moons"),
        ("data.labelled=true", lambda e: e.data.labelled, True),
        ("noise_range.rho=3", lambda e: e.noise_range.rho, 3.0),
        ("teacher=runs/a=b", lambda e: e.teacher, "runs/a=b"),
    ],
)
def test_an_override_replaces_one_setting(override, read, expected):
    assert read(loads(RING, [override])) == expected


def test_the_last_of_two_overrides_wins():
    assert loads(RING, ["seed=1", "seed=2"]).seed == 2


def test_an_integer_for_a_float_becomes_a_float():
    assert isinstance(loads(RING, ["noise_range.rho=3"]).noise_range.rho, float)


REFUSED = [
    # names
    ("objective.levles=3", r"objective\.levles is not a setting\. ConsistencyTraining has curr"),
    ("objective.weightt='snr'", "objective.weightt is not a setting; did you mean 'weight'"),
    ("trainingg.steps=3", "trainingg is not a setting; did you mean 'training'"),
    ("training.optimiser.lr=1", "optimiser is not a setting; did you mean 'optimizer'"),
    (
        "data.kind=Digit",
        "data.kind must be one of Toy, Digits, Glyphs, Images; got 'Digit'; did you mean 'Digits'",
    ),
    ("data.world=rings", "did you mean 'ring'"),
    ("network.kind=Unet", "did you mean 'UNet'"),
    ("objective.distance.kind=L3", "one of L2, L1, Norm, PseudoHuber, LInf, LPIPS; got 'L3'"),
    ("objective.weight=karass", "did you mean 'karras'"),
    ("sampling.solver=huen", "did you mean 'heun'"),
    ("objective.noise_range.rho=3", r"set the table \[noise_range\]"),
    ("scalings.noise_range.rho=3", r"set the table \[noise_range\]"),
    # types
    ("training.steps=1e9", "training.steps must be of type int; got 1000000000.0"),
    ("training.steps=1e9x", "training.steps must be of type int; got '1e9x'"),
    ("training.steps=true", "must be of type int; got True"),
    ("training.steps=", "must be of type int; got ''"),
    ("noise_range.rho=true", "must be of type float; got True"),
    ("noise_range.rho='7'", "must be of type float; got '7'"),
    ("data.labelled=1", "must be of type bool; got 1"),
    ("teacher=3", "teacher must be of type str; got 3"),
    ("data=Toy", "data needs a kind, one of Toy, Digits, Glyphs, Images; got 'Toy'"),
    ("data={world='ring'}", "data needs a kind"),
    ("data={kind=['Toy']}", "data.kind must be one of"),
    ("data={kind={a=1}}", "data.kind must be one of"),
    ("training=3", "training must be a table of settings; got 3"),
    ("training.steps.x=3", "steps holds no settings of its own"),
    ("sampling.sigmas=10", "sampling.sigmas must be a list; got 10"),
    ("sampling.sigmas=['a']", r"sampling\.sigmas\[0\] must be of type float"),
    ("training.optimizer.betas=[0.9]", "betas must be a list of 2"),
    # values
    ("training.steps=-1", "training: steps must be at least 1; got -1"),
    ("training.batch_size=9223372036854775808", "batch_size must fit in 64 bits; got 92233"),
    ("training.batch_size=0", "batch_size must be at least 1; got 0"),
    ("training.save_every=0", "save_every must be at least 1; got 0"),
    ("training.keep=0", "keep must be at least 1; got 0"),
    ("training.warmup=-1", "warmup must be at least 0; got -1"),
    ("training.average_decay=1", r"average_decay must lie in \[0, 1\); got 1"),
    ("training.also_average=[0.5, 1]", r"training: also_average must lie in \[0, 1\); got 1"),
    ("training.also_average=0.5", r"training\.also_average must be a list; got 0.5"),
    ("training.also_average=[0.9999]", "names decays other than average_decay = 0.9999, each once"),
    ("training.accumulation=0", "accumulation must be at least 1; got 0"),
    ("training.accumulation=3", "divisible by accumulation = 3, so that its shards are equal; got"),
    ("training.clip=0", "clip must be positive, or left out; got 0"),
    ("training.optimizer.lr=0", "lr must be positive; got 0"),
    ("training.optimizer.lr=nan", "lr must be positive; got nan"),
    ("training.optimizer.lr=inf", "lr must be positive; got inf"),
    ("training.optimizer.betas=[0.9, 1]", r"betas must lie in \[0, 1\)"),
    ("noise_range.sigma_min=0", "expected 0 < sigma_min < sigma_max; got sigma_min = 0"),
    ("noise_range.sigma_min=nan", "expected 0 < sigma_min"),
    ("noise_range.sigma_max=inf", "expected 0 < sigma_min"),
    ("noise_range.rho=0", "rho must be at least 0.1"),
    ("noise_range.rho=1e-300", "noise_range: "),
    ("sampling.sigmas=[1, 10]", "sigmas must decrease; got"),
    ("sampling.sigmas=[10, 10]", "sigmas must decrease; got"),
    ("sampling.sigmas=[]", "at least one noise level"),
    ("sampling.sigmas=[10, nan]", "sigmas must be finite"),
    ("sampling.sigmas=[80]", "must begin at noise_range.sigma_max = 10.0"),
    ("sampling.levels=1", "sampling: levels must be at least 2; got 1"),
    ("seed=-1", r"seed must lie in 0 \.\.\. 4294967295; got -1"),
    ("objective={kind='ConsistencyDistillation'}", "ConsistencyDistillation needs a teacher"),
    # not a setting at all
    ("training.steps", "expected key=value, such as training.steps=1000; got 'training.steps'"),
    ("=3", "expected key=value"),
    ("training..steps=3", "expected key=value"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED, ids=[pair[0] for pair in REFUSED])
def test_a_wrong_setting_is_refused_with_what_was_expected(override, message):
    with pytest.raises(ValueError, match=message):
        loads(RING, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe has no data, which has no default"),
        ("a = = 3", "not valid TOML.*line 1"),
        ("data = 1", "data needs a kind, one of Toy, Digits, Glyphs, Images; got 1"),
        (RING.replace("MLP", "MLQ"), "did you mean 'MLP'"),
        (RING.replace("network", "# "), "a run without a teacher needs a network"),
    ],
)
def test_a_wrong_recipe_is_refused_with_what_is_missing(text, message):
    with pytest.raises(ValueError, match=message):
        loads(text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits/emd", "did you mean 'digits/edm'"),
        ("nothing", "`cmbook configs` lists them"),
        ("nothing.toml", "there is no recipe file nothing.toml"),
        ("", "there is no recipe ''"),
        ("../configs/digits/edm", "there is no recipe"),
    ],
)
def test_an_unknown_recipe_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        recipe_text(name)


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"cannot read the recipe .*binary\.toml"):
        recipe_text(str(path))


def test_a_recipe_compares_by_value():
    recipe = loads(RING)
    assert recipe != replace(recipe, seed=1)


# ── recipes on a base ──


def test_a_recipe_on_a_base_states_only_what_differs():
    base = loads(recipe_text("fashion/cd"))
    ours = loads('base = "fashion/cd"\ntraining.steps = 3\nobjective.distance = { kind = "L1" }')
    expected = replace(
        base,
        training=replace(base.training, steps=3),
        objective=replace(base.objective, distance=L1()),
    )
    assert ours == expected


def test_another_kind_replaces_the_whole_table():
    ours = loads('base = "toy/ct"\nnetwork = { kind = "ResidualMLP" }')
    assert ours.network == ResidualMLP()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["kind=L2"], L2()),
        (["kind=PseudoHuber"], PseudoHuber(c=0.1)),  # the same kind: nothing is dropped
        (["kind=LPIPS", "pooling=average"], LPIPS(pooling="average")),
        (["pooling=average", "kind=LPIPS"], LPIPS(pooling="average")),  # in any order
        (["kind=LPIPS", "pooling=average", "kind=L2", "kind=PseudoHuber"], None),
    ],
)
def test_another_kind_on_the_command_line_drops_what_the_old_one_had(overrides, expected):
    text = recipe_text("cifar10/cd-laptop")
    keys = [f"objective.distance.{override}" for override in overrides]
    if expected is None:  # what was given by hand stays, and is refused by name
        with pytest.raises(ValueError, match=r"objective\.distance\.pooling is not a setting"):
            loads(text, keys)
    else:
        assert loads(text, keys).objective.distance == expected


def test_another_optimizer_on_the_command_line_has_its_own_rate():
    text = recipe_text("imagenet64/cd")
    assert loads(text, ["training.optimizer.kind=Adam"]).training.optimizer == Adam()
    both = ["training.optimizer.kind=Adam", "training.optimizer.lr=3e-5"]
    assert loads(text, both).training.optimizer == Adam(lr=3e-5)


def test_a_base_may_have_a_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.toml").write_text('base = "toy/ct"\nseed = 7', encoding="utf-8")
    ours = loads('base = "one.toml"\ntraining.steps = 3', ["seed=8"])
    assert (ours.seed, ours.training.steps, ours.network) == (8, 3, MLP(width=128, depth=4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "toy/cx"', "did you mean 'toy/c"),
        ("base = 3", "base must be the name of a recipe"),
        ('base = "self.toml"', "its own base: self.toml on self.toml"),
    ],
)
def test_a_base_that_cannot_be_is_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("self.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        loads(text)
