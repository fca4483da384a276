"""Distances of clouds: equal to those of scipy and scikit-learn, and to closed forms."""

import numpy as np
import pytest
import torch
from scipy.stats import energy_distance as scipy_energy
from scipy.stats import wasserstein_distance
from sklearn.metrics.pairwise import rbf_kernel

from cmbook.clouds import energy_distance, mmd, sliced_wasserstein
from cmbook.evaluation import frechet_distance
from cmbook.noise import normal, seeded


def draws(n, d, seed=0):
    return normal(torch.empty(n, d, dtype=torch.float64), seeded(seed))


SIZES = [(40, 40), (30, 55), (1500, 7)]


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_mmd_is_that_of_scikit_learns_kernels(n, m):
    x, y, widths = draws(n, 3, 1), 0.5 * draws(m, 3, 2) + 1, (0.5, 2.0)
    expected = 0.0
    for w in widths:
        xx, yy, xy = (rbf_kernel(a, b, 1 / (2 * w**2)) for a, b in [(x, x), (y, y), (x, y)])
        expected += (xx.sum() - n) / (n * (n - 1)) + (yy.sum() - m) / (m * (m - 1)) - 2 * xy.mean()
    assert mmd(x, y, widths) == pytest.approx(expected / 2, rel=1e-9)


def test_mmd_is_zero_on_average_for_one_law():
    values = [mmd(draws(50, 2, 2 * i), draws(50, 2, 2 * i + 1), (1.0,)) for i in range(100)]
    error = np.std(values) / 10
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0


def test_mmd_of_far_clouds_is_what_two_points_give():
    x = torch.zeros(2, 1)
    assert mmd(x, x + 100, (1.0,)) == pytest.approx(2)


def test_the_default_width_is_the_median_distance():
    x, y = draws(20, 2, 1), draws(30, 2, 2)
    both = torch.cat([x, y])
    width = float(torch.cdist(both, both)[tuple(torch.triu_indices(50, 50, 1))].median())
    assert mmd(x, y) == pytest.approx(mmd(x, y, (width,)), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_on_a_line_the_distances_are_scipys(n, m):
    x, y = draws(n, 1, 1), 0.5 * draws(m, 1, 2) + 1
    a, b = x[:, 0].numpy(), y[:, 0].numpy()
    assert energy_distance(x, y) == pytest.approx(scipy_energy(a, b), rel=1e-9)
    moved = sliced_wasserstein(x, y, directions=2, generator=seeded(0))
    assert moved == pytest.approx(wasserstein_distance(a, b), rel=1e-9)


def test_a_shift_moves_its_length_along_each_line():
    """W of a cloud and its shift by s along θ is |θ·s|; in the plane, its mean is 2 |s| / π."""
    x = draws(60, 2)
    moved = sliced_wasserstein(
        x, x + torch.tensor([3.0, 0.0]), directions=4000, generator=seeded(0)
    )
    assert moved == pytest.approx(6 / np.pi, rel=0.02)


def test_of_second_order_a_shift_gives_its_length_over_the_root_of_the_dimension():
    x, shift = draws(60, 4), torch.tensor([2.0, 0, 0, 0])
    moved = sliced_wasserstein(x, x + shift, order=2, directions=4000, generator=seeded(0))
    assert moved == pytest.approx(1, rel=0.03)


def test_equal_clouds_are_at_distance_zero():
    x = draws(30, 2)
    order = torch.arange(29, -1, -1)
    assert energy_distance(x, x[order]) == pytest.approx(0, abs=1e-6)
    assert sliced_wasserstein(x, x[order], generator=seeded(0)) == pytest.approx(0, abs=1e-12)


def test_they_see_what_the_frechet_distance_does_not():
    """A ring and a Gaussian of the same mean and covariance."""
    angle = torch.arange(500) * (2 * np.pi / 500)
    ring = torch.stack([angle.cos(), angle.sin()], 1)
    blob = draws(500, 2)
    blob = (blob - blob.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(blob.T.cov())).T
    blob = blob * float(ring[:, 0].std())
    assert frechet_distance(ring, blob) < 1e-5
    fresh = draws(500, 2, 1) * float(ring[:, 0].std())
    for distance in (lambda a, b: mmd(a, b, (0.3,)), energy_distance):
        assert distance(ring, blob) > 3 * abs(distance(fresh, blob))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(5, 2), torch.zeros(5, 3)),
        (torch.zeros(1, 2), torch.zeros(5, 2)),
        (torch.zeros(5, 1, 2, 2), torch.zeros(5, 1, 2, 2)),
        (torch.full((5, 2), float("nan")), torch.zeros(5, 2)),
    ],
    ids=["dimensions", "one point", "images", "nan"],
)
def test_what_is_no_pair_of_clouds_is_refused(x, y):
    distances = [mmd, energy_distance, lambda *z: sliced_wasserstein(*z, generator=seeded(0))]
    for distance in distances:
        with pytest.raises(ValueError, match=r"expected clouds|NaN or infinity"):
            distance(x, y)


def test_knobs_that_mean_nothing_are_refused():
    x = draws(5, 2)
    with pytest.raises(ValueError, match="widths must be positive"):
        mmd(x, x, (0.0,))
    with pytest.raises(ValueError, match="coincide"):
        mmd(torch.zeros(5, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="order and directions"):
        sliced_wasserstein(x, x, order=0, generator=seeded(0))
