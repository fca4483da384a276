"""Data: worlds that are what they say, digits that never change, and doors that check."""

from itertools import islice

import pytest
import torch
from sklearn.datasets import load_digits

from cmbook.data import WORLDS, Digits, TensorData, Toy, check_labels, check_samples
from cmbook.oracle import GaussianMixture
from cmbook.protocols import Batch

DATA = [Toy(), Toy("pinwheel", labelled=True), Digits(), Digits(labelled=False)]


@pytest.mark.parametrize("world", WORLDS)
def test_every_world_is_a_mixture_with_exact_answers(world):
    assert isinstance(Toy(world).build().world, GaussianMixture)


@pytest.mark.parametrize("world", WORLDS)
def test_points_of_a_world_have_the_mean_of_its_mixture(world):
    data = Toy(world).build()
    points = data.held_out().x.double()
    expected = data.world.weights @ data.world.means
    error = (points.mean(0) - expected).abs()
    assert (error < 5 * points.std(0) / len(points) ** 0.5).all()


@pytest.mark.parametrize("world", WORLDS)
def test_points_of_a_world_have_the_covariance_of_its_mixture(world):
    mixture, points = Toy(world).build().world, Toy(world).build().held_out().x.double()
    centered = mixture.means - mixture.weights @ mixture.means
    between = torch.einsum("k,ki,kj->ij", mixture.weights, centered, centered)
    within = torch.einsum("k,kij->ij", mixture.weights, mixture.covariances.double())
    torch.testing.assert_close(points.T.cov(), between + within, atol=0.02, rtol=0)


@pytest.mark.parametrize("world", WORLDS)
def test_a_world_nearly_fits_the_square_from_minus_one_to_one(world):
    assert (Toy(world).build().held_out().x.abs() <= 1).float().mean() > 0.99


def test_a_labelled_point_lies_at_its_component():
    data = Toy("ring", labelled=True).build()
    batch = data.held_out()
    distance = (batch.x - data.world.means[batch.label]).norm(dim=1)
    assert distance.max() < 6 * 0.05


@pytest.mark.parametrize(
    ("name", "classes"),
    [("ring", 8), ("moons", 2), ("spirals", 2), ("pinwheel", 5), ("checkerboard", 8)],
)
def test_a_labelled_world_has_the_classes_one_sees(name, classes):
    data = Toy(name, labelled=True).build()
    x, label = data.held_out()
    assert data.classes == classes == len(label.unique())
    nearest = torch.cdist(x.double(), data.world.means).argmin(1)
    assert float((data.world._class_of[nearest] == label).double().mean()) > 0.95


def test_a_fingerprint_knows_which_classes_are_told():
    prints = {Toy("moons", told).build().sha256() for told in (True, False)}
    assert len(prints) == 2


def test_training_and_held_out_digits_are_scikit_learns_1797_images():
    data, real = Digits().build(), load_digits()
    third = torch.arange(1797) % 3 == 2
    together = torch.empty(1797, 1, 8, 8)
    together[third], together[~third] = data.held_out().x, data.x
    torch.testing.assert_close((together[:, 0] + 1) * 8, torch.tensor(real.images).float())


def test_digits_keep_their_labels():
    data, real = Digits().build(), torch.tensor(load_digits().target)
    third = torch.arange(1797) % 3 == 2
    assert torch.equal(data.label, real[~third])
    assert torch.equal(data.held_out().label, real[third])


def test_digits_fill_the_range_from_minus_one_to_one():
    x = Digits().build().x
    assert (x.min(), x.max()) == (-1, 1)


def test_the_digits_are_those_that_every_published_number_was_made_with():
    expected = "d9223ec47b887b6209956ee60f120722107ced75da29dcd20c2618fbe61b7185"
    assert Digits().build().sha256() == expected


def test_the_fingerprint_sees_a_single_changed_label():
    x, label = torch.zeros(3, 2), torch.tensor([0, 1, 1])
    other = torch.tensor([0, 1, 0])
    assert TensorData(x, label).sha256() != TensorData(x, other).sha256()


@pytest.mark.parametrize("data", DATA, ids=repr)
@pytest.mark.parametrize("k", [1, 7, 40])
def test_batch_k_is_a_function_of_seed_and_k(data, k):
    built = data.build()
    walked = next(islice(built.batches(37, seed=3), k, None))
    direct = next(built.batches(37, seed=3, start=k))
    assert torch.equal(walked.x, direct.x)
    assert (walked.label is None) or torch.equal(walked.label, direct.label)


@pytest.mark.parametrize("data", DATA, ids=repr)
def test_another_seed_gives_other_batches(data):
    built = data.build()
    assert not torch.equal(next(built.batches(8, 0)).x, next(built.batches(8, 1)).x)


@pytest.mark.parametrize("size", [1, 3, 10, 25])
def test_every_epoch_shows_every_sample_once(size):
    data = TensorData(torch.linspace(-1, 1, 10)[:, None])
    seen = torch.cat([batch.x for batch in islice(data.batches(size, seed=0), 100)])
    for epoch in seen[: len(seen) // 10 * 10].reshape(-1, 10):
        assert torch.equal(epoch.sort().values, data.x[:, 0])


def test_two_epochs_have_different_orders():
    first, second = islice(TensorData(torch.linspace(-1, 1, 100)[:, None]).batches(100, 0), 2)
    assert not torch.equal(first.x, second.x)


def test_a_label_stays_with_its_sample():
    data = TensorData(torch.arange(10).float()[:, None] / 10, torch.arange(10))
    batch = next(data.batches(25, seed=0))
    assert torch.equal((batch.x[:, 0] * 10).round().long(), batch.label)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_sample_that_is_not_finite_is_named(bad):
    x = torch.zeros(5, 1, 2, 2)
    x[3, 0, 1, 1] = bad
    with pytest.raises(ValueError, match="sample 3 holds NaN or infinity"):
        TensorData(x)


def test_the_sample_out_of_range_is_named_with_the_cure():
    x = torch.zeros(5, 2)
    x[2, 1] = 255
    with pytest.raises(ValueError, match=r"sample 2 reaches from 0 to 255.*127\.5 - 1"):
        TensorData(x)


def test_points_may_leave_the_range_if_one_says_so():
    assert TensorData(torch.full((3, 2), 5.0), bounded=False).shape == (2,)


def test_held_out_samples_are_checked_too():
    with pytest.raises(ValueError, match="sample 0"):
        TensorData(torch.zeros(2, 2), held_out=Batch(torch.full((1, 2), 7.0)))


@pytest.mark.parametrize("shape", [(0, 2), (3,)])
def test_what_is_no_set_of_samples_is_refused(shape):
    with pytest.raises(ValueError, match=r"samples \(n, \.\.\.\)"):
        check_samples(torch.zeros(shape))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (torch.tensor([0.0, 1.0]), r"2 integers.*float32"),
        (torch.tensor([True, False]), r"2 integers.*bool"),
        (torch.tensor([0, 1, 2]), r"2 integers.*\(3,\)"),
        (torch.tensor([[0, 1]]), r"2 integers.*\(1, 2\)"),
        (torch.tensor([0, -1]), r"0 \.\.\. 9; got -1"),
        (torch.tensor([0, 10]), r"0 \.\.\. 9; got 0 \.\.\. 10"),
    ],
)
def test_a_wrong_label_is_refused(label, message):
    with pytest.raises(ValueError, match=message):
        check_labels(label, 2, 10)


@pytest.mark.parametrize("data", [Toy(), Digits()], ids=repr)
def test_a_batch_of_nothing_is_refused(data):
    with pytest.raises(ValueError, match="at least 1 sample"):
        next(data.build().batches(0, seed=0))


def test_asking_for_held_out_samples_that_do_not_exist_says_how_to_give_them():
    with pytest.raises(ValueError, match="pass held_out="):
        TensorData(torch.zeros(2, 2)).held_out()
