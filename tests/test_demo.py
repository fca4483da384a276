"""The demonstration, at a size that takes seconds."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cmbook import (
    Digits,
    PerImage,
    load,
    multistep,
    normal,
    ode_sample,
    seeded,
)
from cmbook import (
    demo as module,
)
from cmbook.demo import Row, demo, table
from cmbook.evaluation import frechet_distance, nearest_distance, precision_recall

TINY = (
    "training.steps=4",
    "training.batch_size=16",
    'network={kind="ResidualMLP", width=32, depth=1, told=16}',
)
MODELS = [
    "teacher, 35 evaluations", "teacher, forced to 1", "CD, 1 evaluation", "CD, 2 evaluations",
    "CT, 1 evaluation", "CT, 2 evaluations",
]  # fmt: skip
KEYS = [
    "name", "nfe", "ms_per_image", "frechet", "precision", "recall", "nearest_train",
    "seconds_training",
]  # fmt: skip


def tiny(folder, **knobs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "IMAGES", 60)
        return demo(folder, overrides=TINY, progress=False, **knobs)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    tiny(folder)
    return folder


@pytest.fixture(scope="module")
def report(made):
    return json.loads((made / "report.json").read_text(encoding="utf-8"))


def test_the_demo_draws_a_picture(made):
    assert (made / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_every_row_of_the_report_has_these_keys(report):
    assert [list(row) for row in report["rows"]] == [KEYS] * 8


def test_evaluations_are_counted(report):
    assert [row["nfe"] for row in report["rows"]] == [None, None, 35, 1, 1, 2, 1, 2]


def test_a_name_says_the_evaluations_that_were_counted(report):
    assert [row["name"] for row in report["rows"][2:]] == MODELS


def by_hand(made, name, label, generator):
    """The images of a row, from the run on disk."""
    run = load(made / {"teacher": "edm", "CD": "cd", "CT": "ct"}[name[:7].split(",")[0]])
    noise_range = run.recipe.noise_range
    x = noise_range.sigma_max * normal(torch.empty(len(label), 1, 8, 8), generator)
    if name == "teacher, 35 evaluations":
        return ode_sample(run.model, x, noise_range, label)
    if "2" not in name:
        return run.model(x, torch.full((len(label),), noise_range.sigma_max), label)
    sigmas = torch.tensor([noise_range.sigma_max, 1.0])
    return multistep(run.model, x, sigmas, label, noise_range=noise_range, generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_measures_the_images_that_its_name_says(made, report, name):
    digits = Digits().build()
    real = digits.held_out()
    images = by_hand(made, name, real.label[:60], seeded(0, "demo", "images")).clamp(-1, 1)
    (row,) = (row for row in report["rows"] if row["name"] == name)
    precision, recall = precision_recall(images, real.x)
    assert row["frechet"] == pytest.approx(frechet_distance(images, real.x), rel=1e-6)
    assert (row["precision"], row["recall"]) == (precision, recall)
    assert row["nearest_train"] == pytest.approx(nearest_distance(images, digits.x), rel=1e-6)


def test_no_two_rows_of_models_are_the_same(report):
    assert len({row["frechet"] for row in report["rows"]}) == 8


def test_the_picture_shows_ten_digits_of_every_row_from_the_same_noise(made, monkeypatch):
    drawn, shown = module.plotting.image_rows, {}
    monkeypatch.setattr(
        module.plotting, "image_rows", lambda rows, title: shown.update(rows) or drawn(rows, title)
    )
    tiny(made)
    assert list(shown) == ["real", *MODELS]
    for name in MODELS:
        generator = PerImage(range(1000, 1010))
        expected = by_hand(made, name, torch.arange(10), generator)
        torch.testing.assert_close(shown[name], expected, rtol=1e-5, atol=1e-5)


def test_images_are_clamped_before_they_are_measured(made, monkeypatch):
    monkeypatch.setattr(module, "IMAGES", 60)
    digits = Digits().build()
    loud = 3 * normal(torch.empty(60, 1, 8, 8), seeded(0))
    row, _ = module.measure("{}", load(made / "cd"), lambda *_: loud, digits, 0)
    expected = frechet_distance(loud.clamp(-1, 1), digits.held_out().x)
    assert row.frechet == pytest.approx(expected, rel=1e-6)


def test_images_have_the_held_out_classes_and_the_picture_one_of_each(made, monkeypatch):
    monkeypatch.setattr(module, "IMAGES", 1500)
    digits, told = Digits().build(), []

    def sampler(model, x, label, generator):
        told.append(label)
        return model(x, torch.ones(len(x)), label)

    row, picture = module.measure("{}", load(made / "ct"), sampler, digits, 0)
    held_out = digits.held_out().label
    assert torch.equal(torch.cat(told[:-1]), torch.cat([held_out] * 3)[:1500])
    assert told[-1].tolist() == list(range(10))
    assert (row.name, row.nfe, len(picture)) == ("1", 1, 10)


def test_the_first_row_measures_the_training_digits_against_the_held_out(report):
    digits = Digits().build()
    real, row = digits.held_out().x, report["rows"][0]
    precision, recall = precision_recall(digits.x, real)
    assert precision != recall
    assert (row["precision"], row["recall"]) == (precision, recall)
    assert row["frechet"] == pytest.approx(frechet_distance(digits.x, real), rel=1e-6)


def test_the_training_digits_themselves_have_distance_zero(report):
    assert report["rows"][0]["nearest_train"] == pytest.approx(0, abs=1e-6)


def test_real_digits_come_nearer_to_the_held_out_ones_than_untrained_models(report):
    distances = [row["frechet"] for row in report["rows"]]
    assert distances[0] < min(distances[2:])


def test_the_report_says_how_it_was_made(report):
    assert (report["record"]["shape"], report["record"]["classes"]) == ([1, 8, 8], 10)


def test_models_took_time_to_train_and_real_digits_none(report):
    seconds = [row["seconds_training"] for row in report["rows"]]
    assert seconds[:2] == [None, None]
    assert min(seconds[2:]) > 0


def weights(folder):
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*.safetensors")
    }


def test_a_second_demo_reuses_what_is_finished_and_finishes_the_rest(made, monkeypatch):
    before = weights(made)
    shutil.rmtree(made / "ct" / "checkpoints")
    monkeypatch.chdir(made.parent)
    tiny(Path("out"))
    after = weights(made)
    assert {name for name in before if before[name] != after[name]} == {
        name for name in before if name.parts[0] == "ct"
    }


def test_a_demo_with_another_seed_in_the_same_folder_is_refused(made):
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        tiny(made, seed=1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.labelled=false", "is about labelled digits; got Digits"),
        ("data={kind='Toy'}", "is about labelled digits; got Toy"),
        ("training.stesp=3", "did you mean 'steps'"),
        ("network.width=3", "network needs a kind"),
        ("seed=-1", "seed must lie in"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_trained(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        demo(tmp_path / "out", overrides=(override,), progress=False)
    assert not (tmp_path / "out").exists()


def test_the_table_shows_every_row_with_aligned_columns():
    rows = [
        Row("real", None, None, 1.25, 0.5, 0.25, 0.0, None),
        Row("a model", 35, 0.125, 100.0, 1.0, 1.0, 3.5, 61.2),
    ]
    assert table(rows).splitlines() == [
        "         NFE  ms/image  Frechet  precision  recall  nearest  training",
        "real                       1.25       0.50    0.25     0.00          ",
        "a model   35     0.125   100.00       1.00    1.00     3.50      61 s",
    ]
