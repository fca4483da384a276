"""Reports: figures beside those of real data, from images that do not depend on the batch."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cmbook import frechet_distance, load, reports, run
from cmbook.__main__ import main
from cmbook.data import Digits, TensorData
from cmbook.evaluation import Moments
from cmbook.experiment import loads, recipe_text
from cmbook.features import GlyphNet, Pixels, from_bytes
from cmbook.references import Provenance, Statistics, save_samples, save_statistics
from cmbook.reports import Evaluation, compare, table

QUICK = {"n": 40, "rounds": 2, "progress": False, "extractor": Pixels()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A consistency model of digits and one of points, both hardly trained."""
    folder = tmp_path_factory.mktemp("runs")
    tiny = ("training.steps=2", "training.batch_size=4")
    unet = "network={kind='UNet', channels=16, multipliers=[1], blocks=1}"
    for name, network in (
        ("digits/ct", unet),
        ("toy/ct", "network={kind='MLP', width=8, depth=2}"),
    ):
        recipe = loads(recipe_text(name), [*tiny, network])
        run(recipe, folder / name, progress=False)
    return folder


@pytest.fixture
def digits(runs):
    return load(runs / "digits/ct")


def test_images_do_not_depend_on_the_batch(digits):
    """Sums are taken in another order, so a pixel on the border of two levels may take either."""
    drawn = [
        Evaluation(n=100, batch=batch, steps=steps, progress=False).draw(
            digits, digits.recipe.data.build()
        )
        for batch, steps in [(7, 2), (100, 2), (100, 1)]
    ]
    apart = (drawn[0][0] - drawn[1][0]).abs() * 127.5
    assert float(apart.max()) < 1.5
    assert int((apart > 0.5).sum()) <= 6  # of 6,400 pixels
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert [nfe for *_, nfe in drawn] == [2, 2, 1]


def test_a_sample_has_the_class_proportions_of_the_data(digits):
    data = digits.recipe.data.build()
    label = Evaluation(n=599, progress=False).draw(digits, data)[1]
    assert torch.equal(label.bincount(), data.held_out().label.bincount())


@pytest.mark.parametrize("extractor", [Pixels(), GlyphNet()], ids=["pixels", "glyphnet"])
def test_a_report_has_every_figure_beside_that_of_real_data(digits, tmp_path, extractor):
    report = Evaluation(**QUICK | {"extractor": extractor})(digits, tmp_path)
    figures = report["figures"]
    assert {name for name in figures if f"{name}_real" in figures} >= {
        *["frechet_of_40", "precision_of_40", "recall_of_40", "nearest_training", "memorized"]
    }
    assert figures["frechet_of_40_real"] < figures["frechet_of_40"]
    assert figures["frechet"]["low"] <= figures["frechet"]["value"] <= figures["frechet"]["high"]
    assert ("inception_score_of_40_real" in figures) == (extractor == GlyphNet())
    assert (report["samples"], report["nfe"]) == (40, 1)
    assert report["training_images"] == report["reference"]["images"] == 1198
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "40 samples, NFE 1, by " in table(report)


def test_the_figures_are_those_of_the_saved_images(digits, tmp_path):
    report = Evaluation(**QUICK)(digits, tmp_path)
    with np.load(tmp_path / "samples.npz") as arrays:
        x = from_bytes(torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2))
    real = Pixels()(digits.recipe.data.build().x).features
    expected = frechet_distance(x, real)
    assert report["figures"]["frechet"]["value"] == pytest.approx(expected, rel=1e-9)


def test_saved_images_give_the_same_report(digits, tmp_path):
    drawn = Evaluation(**QUICK)(digits, tmp_path / "a")
    again = Evaluation(**QUICK)(digits, tmp_path / "b", tmp_path / "a" / "samples.npz")
    assert again["figures"] == drawn["figures"]
    assert (again["nfe"], again["seed"]) == (None, None)


def test_training_images_are_seen_to_be_memorized(digits, tmp_path):
    save_samples(tmp_path / "copies.npz", digits.recipe.data.build().x[:100])
    figures = Evaluation(**QUICK)(digits, tmp_path, tmp_path / "copies.npz")["figures"]
    assert figures["nearest_training"] == pytest.approx(0, abs=1e-5)
    assert figures["memorized"] == 1


def test_real_images_get_the_figures_of_real_images(digits, tmp_path):
    save_samples(tmp_path / "real.npz", digits.recipe.data.build().held_out().x)
    report = Evaluation(**QUICK)(digits, tmp_path, tmp_path / "real.npz")
    figures = report["figures"]
    assert figures["memorized"] == pytest.approx(0.5, abs=1e-4)
    expected = figures["frechet_of_599_real"]
    assert figures["frechet_of_599"] == pytest.approx(expected, rel=1e-6)


def test_samples_of_another_shape_are_refused(digits, tmp_path):
    save_samples(tmp_path / "a.npz", torch.zeros(30, 3, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\); the run's data has \(1, 8, 8\)"):
        Evaluation(**QUICK)(digits, tmp_path, tmp_path / "a.npz")


def test_an_official_reference_needs_to_be_vouched_for(digits, tmp_path):
    real = Moments.of(digits.recipe.data.build().x)
    save_statistics(tmp_path / "a.npz", Statistics(real, None, Provenance()))
    evaluation = Evaluation(reference=tmp_path / "a.npz", **QUICK)
    with pytest.raises(ValueError, match="unknown there"):
        evaluation(digits, tmp_path)
    report = replace(evaluation, comparable_anyway=True)(digits, tmp_path)
    assert report["reference"]["data"] is None
    assert "an unknown number of unknown data" in table(report)


def test_data_without_held_out_images_are_halved(digits, tmp_path, monkeypatch):
    x = Digits().build().x
    label = Digits().build().label
    monkeypatch.setattr(Digits, "build", lambda self: TensorData(x, label, classes=10))
    report = Evaluation(**QUICK)(digits, tmp_path)
    assert (report["training_images"], report["held_out_images"]) == (599, 0)
    assert report["reference"]["data"] == "half of the run's training set"
    assert not any(name.startswith("memorized") for name in report["figures"])


def test_many_training_images_are_sampled_fairly(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("cmbook.reports.MOST_REAL", 300)
    report = Evaluation(**QUICK)(digits, tmp_path)
    assert (report["training_images"], report["held_out_images"]) == (300, 300)


def test_points_are_measured_as_clouds(runs, tmp_path):
    report = Evaluation(**{**QUICK, "n": 300})(load(runs / "toy/ct"), tmp_path)
    figures = report["figures"]
    assert list(figures) == [
        *["mmd", "energy", "sliced_wasserstein"],
        *["mmd_real", "energy_real", "sliced_wasserstein_real"],
    ]
    assert figures["energy_real"] < figures["energy"]
    assert report["compared"] == 300
    assert "300 samples, NFE 1, 300 of them against as many held-out points" in table(report)


def test_reports_of_equal_terms_are_compared_and_others_refused(digits, tmp_path):
    for name, knobs in [("a", {}), ("b", {"seed": 100}), ("c", {"n": 50})]:
        Evaluation(**QUICK | knobs)(digits, tmp_path / name)
    a, b, c = (tmp_path / name / "report.json" for name in "abc")
    assert "frechet_of_40" in compare(a, b)
    with pytest.raises(ValueError, match="not comparable: samples is 40 here and 50 there"):
        compare(a, c)
    assert "memorized" in compare(a, c, comparable_anyway=True)
    (tmp_path / "d.json").write_text('{"figures": {"a": 1}}')
    with pytest.raises(ValueError, match="not comparable: samples is unknown here"):
        compare(tmp_path / "d.json", tmp_path / "d.json")


def test_references_of_which_nothing_is_known_are_told_apart_by_their_file(digits, tmp_path):
    for name, scale in (("a", 1.0), ("b", 2.0)):
        sigma = scale * np.eye(GlyphNet()(torch.zeros(2, 1, 8, 8)).features.shape[1])
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(len(sigma)), sigma=sigma)
        knobs = {"reference": tmp_path / f"{name}.npz", "comparable_anyway": True}
        Evaluation(**{**QUICK, "extractor": GlyphNet(), **knobs})(digits, tmp_path / name)
    with pytest.raises(ValueError, match="reference_file_sha256 is"):
        compare(tmp_path / "a" / "report.json", tmp_path / "b" / "report.json")


def test_a_reference_that_does_not_fit_is_refused_before_anything_is_drawn(digits, tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match="not comparable"):
        Evaluation(**{**QUICK, "reference": tmp_path / "ref.npz"})(digits, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("figures", ["3", '{"a": [1]}', '{"a": {}}', '{"a": "1"}', "}"])
def test_what_is_no_report_is_named(tmp_path, figures, capsys):
    (tmp_path / "a.json").write_text(f'{{"figures": {figures}}}')
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")])
    assert stop.value.code == 1
    assert "a.json is no report of cmbook evaluate" in capsys.readouterr().err


def test_nothing_is_said_of_few_images(digits, tmp_path):
    save_samples(tmp_path / "a.npz", torch.zeros(5, 1, 8, 8))
    with pytest.raises(ValueError, match="nothing can be said of 5 images"):
        Evaluation(**QUICK)(digits, tmp_path, tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"n": 5}, "n of 20"), ({"batch": 0}, "batch of 1"), ({"rounds": 1}, "rounds must be 0")],
)
def test_knobs_that_mean_nothing_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**knobs)


def test_without_rounds_there_is_no_interval(digits, tmp_path):
    report = Evaluation(**QUICK | {"rounds": 0})(digits, tmp_path)
    assert list(report["figures"]["frechet"]) == ["value"]


def test_the_bars_need_no_widgets_of_notebooks():
    """`tqdm.auto` warns in a notebook without ipywidgets, as soon as it is imported."""
    assert reports.tqdm.__module__ == "tqdm.std"
