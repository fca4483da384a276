"""Evaluation: against closed forms, scipy and brute force."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from cmbook import frechet_distance, nearest_distance, normal, precision_recall, seeded


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
