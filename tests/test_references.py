"""References: they come back as they were saved, and what is not comparable is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cmbook import normal, seeded
from cmbook.disk import replacing
from cmbook.evaluation import Moments, frechet_distance
from cmbook.features import Activations, Pixels, from_bytes
from cmbook.references import (
    Provenance,
    Statistics,
    check_comparable,
    distance,
    load_samples,
    load_statistics,
    save_samples,
    save_statistics,
)

SIZE = (1, 2, 3)


def draws(n, seed=0):
    return normal(torch.empty(n, 6), seeded(seed))


def statistics(seed=0, n=30):
    seen = Activations(draws(n, seed), draws(n, seed + 100))
    return Statistics.of(seen, Pixels(), SIZE, data="noise")


def test_statistics_come_back_as_they_were(tmp_path):
    saved = statistics()
    save_statistics(tmp_path / "new" / "a.npz", saved)
    read = load_statistics(tmp_path / "new" / "a.npz")
    assert read.provenance == saved.provenance
    assert read.provenance == Provenance("noise", "as stored", 30, SIZE, "pixels", "", "round")
    assert read.moments.count == 30
    for one, other in ((saved.moments, read.moments), (saved.spatial, read.spatial)):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.covariance, other.covariance)


def test_the_field_can_read_our_file(tmp_path):
    save_statistics(tmp_path / "a.npz", statistics())
    with np.load(tmp_path / "a.npz") as arrays:
        x = draws(30).double().numpy()
        np.testing.assert_allclose(arrays["mu"], x.mean(0))
        np.testing.assert_allclose(arrays["sigma"], np.cov(x, rowvar=False))


def test_an_official_file_is_read_and_its_provenance_is_unknown(tmp_path):
    x = draws(40).double().numpy()
    np.savez(tmp_path / "a.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    official = load_statistics(tmp_path / "a.npz")
    assert official.provenance == Provenance()
    assert official.spatial is None
    with pytest.raises(ValueError, match="extractor is 'pixels' here and unknown there"):
        distance(statistics(), official)
    known = frechet_distance(draws(30), draws(40))
    assert distance(statistics(), official, comparable_anyway=True) == pytest.approx(known)


def test_what_was_made_alike_is_compared():
    one, other = statistics(0), statistics(1, n=50)
    assert distance(one, other) == pytest.approx(frechet_distance(draws(30), draws(50, 1)))


@pytest.mark.parametrize(
    "change",
    [
        {"extractor": "glyphnet"},
        {"extractor_sha256": "abc"},
        {"quantization": "truncate"},
        {"size": (3, 2, 3)},
        {"preprocessing": "BOX halving"},
        {"preprocessing": None},
    ],
    ids=str,
)
def test_what_was_not_made_alike_is_refused_by_name(change):
    one = statistics()
    other = replace(one, provenance=replace(one.provenance, **change))
    with pytest.raises(ValueError, match=f"not comparable: {next(iter(change))} is"):
        distance(one, other)
    assert distance(one, other, comparable_anyway=True) == pytest.approx(0, abs=1e-9)


def test_figures_of_other_counts_are_refused():
    with pytest.raises(ValueError, match="images is 50000 here and 10000 there"):
        check_comparable({"images": 50_000}, {"images": 10_000}, ("images",))


def test_every_difference_is_named():
    with pytest.raises(ValueError, match=r"a is 1 here and 2 there; b is unknown here"):
        check_comparable({"a": 1}, {"a": 2, "b": 3}, ("a", "b"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros(3)}, "holds no statistics"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "do not fit"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.zeros((1, 1))}, "cannot be read"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "must be real numbers"),
        ({"mu": np.zeros(1), "sigma": np.eye(1) * 1j}, "must be real numbers"),
        ({"mu": np.array([np.nan]), "sigma": np.eye(1)}, "NaN or infinity"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 1], [0, 1]])}, "not symmetric"),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "provenance": np.array("{")}, "provenance"),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "provenance": np.array("[1]")}, "provenance"),
        (
            {"mu": np.zeros(1), "sigma": np.eye(1), "provenance": np.array('{"images": "9"}')},
            "images = '9'",
        ),
    ],
)
def test_bad_statistics_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_statistics(tmp_path / "a.npz")


@pytest.mark.parametrize("read", [load_statistics, load_samples])
def test_files_that_are_none_are_named(tmp_path, read):
    with pytest.raises(ValueError, match="there is no file"):
        read(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"cannot be read as \.npz"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_as_they_were(tmp_path, channels):
    levels = torch.arange(2 * channels * 30, dtype=torch.uint8).reshape(2, channels, 5, 6)
    x = from_bytes(levels)
    save_samples(tmp_path / "a.npz", x, torch.tensor([4, 2]))
    read, label = load_samples(tmp_path / "a.npz")
    assert torch.equal(read, x)
    assert label.tolist() == [4, 2]
    with np.load(tmp_path / "a.npz") as arrays:
        assert (arrays["arr_0"].dtype, arrays["arr_0"].shape) == (np.uint8, (2, 5, 6, channels))


def test_points_come_back_as_they_were(tmp_path):
    save_samples(tmp_path / "a.npz", draws(5))
    read, label = load_samples(tmp_path / "a.npz")
    assert torch.equal(read, draws(5))
    assert label is None


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 3, 8, 8)), np.zeros((2, 3, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)],
    ids=["floats", "channels first", "empty"],
)
def test_what_are_no_samples_is_refused(tmp_path, array):
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(ValueError, match="expected arr_0"):
        load_samples(tmp_path / "a.npz")


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def fail():
        with replacing(path) as file:
            file.write(b"half of the ne")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.txt", b"old")]


def test_moments_of_unknown_count_are_told_as_such(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert load_statistics(tmp_path / "a.npz").moments.count is None
    assert isinstance(load_statistics(tmp_path / "a.npz").moments, Moments)
