"""Evaluation: against closed forms, scipy and brute force."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from cmbook import frechet_distance, nearest_distance, normal, precision_recall, seeded
from cmbook.evaluation import (
    Moments,
    bootstrap,
    inception_score,
    memorized,
    nearest_training,
    real_floor,
)


def draws(n, d, seed=0):
    return normal(torch.empty(n, d, dtype=torch.float64), seeded(seed))


def shaped(mean, covariance, n=50, seed=0):
    """Points whose sample mean and unbiased sample covariance are exactly these."""
    x = draws(n, len(mean), seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


MEANS = torch.tensor([[0.0, 1.0, -2.0], [0.5, 0.0, 3.0]], dtype=torch.float64)


@pytest.mark.parametrize("n", [4, 50])
def test_the_frechet_distance_of_diagonal_gaussians_is_the_closed_form(n):
    a, b = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 4.0, 9.0], [0.25, 1.0, 16.0]))
    expected = (MEANS[0] - MEANS[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    x = shaped(MEANS[0], torch.diag(a), n, seed=1)
    y = shaped(MEANS[1], torch.diag(b), n + 9, seed=2)
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-10)


def test_the_frechet_distance_is_scipys_formula():
    x, y = draws(40, 5, 1) @ draws(5, 5, 2), draws(60, 5, 3) @ draws(5, 5, 4) + 1
    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    shift = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = float(shift) + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_a_set_to_itself_is_zero():
    x = draws(30, 4)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_the_frechet_distance_is_symmetric():
    x, y = draws(30, 4, 1), 2 * draws(20, 4, 2)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-10)


def test_the_frechet_distance_does_not_see_the_shape_of_an_image():
    x, y = draws(30, 8, 1), draws(20, 8, 2)
    assert frechet_distance(x.reshape(-1, 2, 2, 2), y) == frechet_distance(x, y)


def test_a_constant_pixel_does_not_disturb_the_frechet_distance():
    x, y = draws(30, 3, 1), draws(30, 3, 2)
    wide = [torch.cat([z, torch.ones(30, 1, dtype=z.dtype)], 1) for z in (x, y)]
    assert frechet_distance(*wide) == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_the_frechet_distance_in_one_dimension_is_the_closed_form():
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [10.0]])
    assert frechet_distance(x, y) == pytest.approx(6**2 + (2**0.5 - 18**0.5) ** 2)


def brute_share_inside(points, centers, k):
    """Kynkäänniemi et al. (2019), Algorithm 1, with loops."""
    inside = 0
    for point in points:
        for i, center in enumerate(centers):
            others = sorted(float((center - c).norm()) for j, c in enumerate(centers) if j != i)
            if float((point - center).norm()) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_precision_and_recall_are_those_of_brute_force(shift, k):
    x, y = draws(30, 2, 1) + shift, 0.5 * draws(25, 2, 2)
    expected = brute_share_inside(x, y, k), brute_share_inside(y, x, k)
    assert precision_recall(x, y, k) == expected


def test_precision_and_recall_are_counted_over_every_chunk():
    """More than the 1,000 rows that are compared at once."""
    x = draws(1500, 2)
    samples = torch.cat([x[:1200], x[:300] + 1000])
    assert precision_recall(samples, x)[0] == 0.8


def test_a_set_covers_itself():
    x = draws(20, 3)
    assert precision_recall(x, x) == (1.0, 1.0)


def test_a_memorized_mode_is_precise_but_recalls_little():
    real = torch.cat([draws(50, 2, 1), draws(50, 2, 2) + 100])
    precision, recall = precision_recall(0.5 * draws(100, 2, 3), real)
    assert precision > 0.9
    assert recall <= 0.5


@pytest.mark.parametrize("n", [7, 1500])
def test_the_nearest_distance_is_that_of_brute_force(n):
    x, train = draws(n, 3, 1), draws(11, 3, 2)
    expected = torch.stack([(train - point).norm(dim=1).min() for point in x]).mean()
    assert nearest_distance(x, train) == pytest.approx(float(expected), rel=1e-9)


def test_copies_of_training_samples_have_nearest_distance_zero():
    train = draws(40, 64)
    assert nearest_distance(train[:30], train) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("measure", [frechet_distance, precision_recall, nearest_distance])
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(5, 2), torch.zeros(5, 3), "sets of 2 and 3 dimensions"),
        (torch.full((5, 2), float("nan")), torch.zeros(5, 2), "NaN or infinity"),
        (torch.zeros(5, 2), torch.full((5, 2), float("inf")), "NaN or infinity"),
    ],
    ids=["dimensions", "nan", "infinity"],
)
def test_sets_that_cannot_be_compared_are_refused(measure, x, y, message):
    with pytest.raises(ValueError, match=message):
        measure(x, y)


@pytest.mark.parametrize(
    ("measure", "n", "message"),
    [
        (frechet_distance, 1, "at least 2 samples; got 1 and 5"),
        (precision_recall, 3, "more than k = 3 samples; got 3 and 5"),
    ],
)
def test_too_few_samples_are_refused(measure, n, message):
    with pytest.raises(ValueError, match=message):
        measure(torch.zeros(n, 2), torch.zeros(5, 2))


# moments


@pytest.mark.parametrize("sizes", [[100], [1, 99], [30, 30, 40], [1] * 100])
def test_streamed_moments_are_those_of_the_whole(sizes):
    x = draws(100, 6) + 1000  # far from 0, where sums of squares lose digits
    moments = Moments.streamed(x.split(sizes))
    expected = np.cov(x.numpy(), rowvar=False)
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.covariance, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    assert moments.count == 100


def test_the_moments_of_a_large_set_are_taken_in_chunks():
    x = draws(12_000, 3).float()
    moments = Moments.of(x)
    torch.testing.assert_close(moments.covariance, x.double().T.cov())
    assert moments.mean.dtype == torch.float64


def test_moments_stand_for_their_set():
    x, y = draws(40, 5, 1), draws(60, 5, 2)
    assert frechet_distance(Moments.of(x), y) == frechet_distance(x, Moments.of(y))
    assert frechet_distance(x, Moments.of(y)) == pytest.approx(frechet_distance(x, y), rel=1e-12)


def test_moments_of_unknown_count_can_be_measured_but_not_added():
    known = Moments.of(draws(9, 2))
    unknown = Moments(known.mean, known.covariance)
    assert frechet_distance(known, unknown) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="unknown count"):
        known + unknown


@pytest.mark.parametrize(
    ("batches", "message"), [([], "no batches"), ([torch.zeros(0, 2)], "empty set")]
)
def test_moments_of_nothing_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        Moments.streamed(batches)


@pytest.mark.parametrize(("least", "rel"), [(0.5, 1e-12), (0.0, 1e-7)])
def test_the_distance_of_gaussians_is_the_closed_form(least, rel):
    """Commuting covariances: the squared distance of means plus that of standard deviations.

    Where one vanishes, the root of a rounding error is left, about 1e-8.
    """
    turn, _ = torch.linalg.qr(draws(4, 4))
    a, b = torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([2.0, 2, least, 1]).double()
    one = Moments(torch.zeros(4).double(), turn @ torch.diag(a**2) @ turn.T, 10)
    two = Moments(torch.ones(4).double(), turn @ torch.diag(b**2) @ turn.T, 10)
    expected = 4 + float((a - b).square().sum())
    assert frechet_distance(one, two) == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("n", [15, 400], ids=["fewer than dimensions", "more"])
def test_eigenvalues_give_what_sqrtm_gives(n):
    """Full rank: to 1e-6. Deficient: sqrtm itself knows only half of the digits."""
    x, y = draws(n, 40, 1) @ draws(40, 40, 2), draws(n, 40, 3) @ draws(40, 40, 4) + 0.3
    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    shift = float((x.mean(0) - y.mean(0)).square().sum())
    if n < 40:  # the nonzero part of Ca Cb, by singular values of the centered sets
        c, d = (z - z.mean(0) for z in (x, y))
        cross = torch.linalg.svdvals(c @ d.T).sum() / (n - 1)
        expected = shift + np.trace(a + b) - 2 * float(cross)
        assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    else:
        expected = shift + np.trace(a + b - 2 * sqrtm(a @ b).real)
        assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


# the floor


def test_the_floor_falls_as_counts_grow():
    real = draws(2000, 10)
    floors = [real_floor(real, n, generator=seeded(0)) for n in (50, 200, 1000)]
    assert floors[0] > floors[1] > floors[2] > 0


def test_the_floor_of_gaussians_is_that_of_theory():
    """To first order in 1/n, two sets of n from N(0, I) lie 2 d/n + d (d + 1)/2n apart."""
    n, d = 1000, 8
    floor = real_floor(draws(20_000, d)[: 2 * n], n, rounds=40, generator=seeded(0))
    assert floor == pytest.approx(d * (d + 5) / (2 * n), rel=0.1)


@pytest.mark.parametrize("n", [1, 9, 10])
def test_a_floor_without_two_on_each_side_is_refused(n):
    with pytest.raises(ValueError, match="each side needs 2"):
        real_floor(draws(10, 2), n, generator=seeded(0))


# Inception Score


def test_sure_and_spread_answers_score_the_number_of_classes():
    assert inception_score(torch.eye(7).repeat(30, 1)) == (pytest.approx(7), pytest.approx(0))


def test_equal_answers_score_one():
    assert inception_score(torch.full((50, 4), 0.25)) == (pytest.approx(1), pytest.approx(0))


def test_the_inception_score_is_the_official_formula():
    p = draws(103, 6).softmax(1)
    parts, n, splits = p.numpy(), 103, 10
    scores = []
    for i in range(splits):
        part = parts[i * n // splits : (i + 1) * n // splits]
        kl = part * (np.log(part) - np.log(np.mean(part, 0, keepdims=True)))
        scores.append(np.exp(np.mean(np.sum(kl, 1))))
    score = inception_score(p)
    assert score.mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert score.std == pytest.approx(np.std(scores), rel=1e-9)


@pytest.mark.parametrize(
    ("p", "splits", "message"),
    [
        (torch.ones(4, 3), 1, "rows of probabilities"),
        (torch.tensor([[1.5, -0.5]]), 1, "rows of probabilities"),
        (torch.eye(4), 10, "4 samples cannot be cut into 10"),
    ],
)
def test_what_is_no_score_is_refused(p, splits, message):
    with pytest.raises(ValueError, match=message):
        inception_score(p, splits)


# memorization


def test_the_nearest_training_sample_is_found():
    train = draws(1200, 4)
    chosen = torch.tensor([7, 1100, 0])
    found = nearest_training(train[chosen] + 1e-4, train)
    assert found.which.tolist() == chosen.tolist()
    torch.testing.assert_close(found.distance, torch.full((3,), 2e-4).double())


def test_fresh_data_are_not_memorized_and_copies_are():
    train, held_out, fresh = draws(300, 2, 1), draws(1000, 2, 2), draws(1000, 2, 3)
    assert memorized(fresh, train, held_out) == pytest.approx(0.5, abs=0.03)
    assert memorized(train, train, held_out) == 1
    assert memorized(held_out + 100, train, held_out) == 0
    assert memorized(held_out, train, held_out) == 0.5


def test_memorization_is_the_share_of_pairs():
    x, train, held_out = draws(9, 2, 1).round(), draws(5, 2, 2).round(), draws(8, 2, 3).round()
    pairs = [
        0.5 if a == b else float(a < b)
        for a in nearest_training(x, train).distance.tolist()
        for b in nearest_training(held_out, train).distance.tolist()
    ]
    assert memorized(x, train, held_out) == pytest.approx(sum(pairs) / len(pairs))


# intervals


def mean(x):
    return float(x.mean())


def test_the_interval_of_a_mean_is_that_of_theory():
    x = draws(400, 1)
    found = bootstrap(mean, x, rounds=2000, generator=seeded(0))
    error = float(x.std()) / 20
    assert found.value == mean(x)
    assert found.bias == pytest.approx(0, abs=0.1 * error)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.15 * error)


def test_the_frechet_distance_is_biased_once_more_and_the_interval_is_not():
    x, y = draws(200, 6, 1), draws(200, 6, 2)
    found = bootstrap(frechet_distance, x, y, rounds=50, generator=seeded(0))
    assert found.bias > 0
    assert found.low < found.value < found.high


def test_an_interval_repeats():
    both = [bootstrap(mean, draws(9, 1), generator=seeded(4)) for _ in range(2)]
    assert both[0] == both[1]


@pytest.mark.parametrize(("sets", "knobs"), [([], {}), ([0], {"rounds": 1}), ([0], {"level": 1.0})])
def test_an_interval_of_nothing_is_refused(sets, knobs):
    with pytest.raises(ValueError, match="bootstrap needs"):
        bootstrap(mean, *[draws(4, 1) for _ in sets], generator=seeded(0), **knobs)


def test_no_neighbor_sets_no_radius():
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        precision_recall(torch.zeros(5, 2), torch.zeros(5, 2), k=0)
