"""A finite data set is a mixture of point masses, however it is cut into chunks."""

import pytest
import torch

from cmbook.noise import normal, seeded
from cmbook.oracle import Dataset, GaussianMixture, Guided, World
from cmbook.oracle.integrate import integrate

POINTS = normal(torch.empty(60, 2, dtype=torch.float64), seeded(1)) * 0.5
CLASS = torch.arange(60) % 3
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def full(n: int, sigma: float) -> torch.Tensor:
    return torch.full((n,), sigma, dtype=torch.float64)


@pytest.fixture
def spots():
    return GaussianMixture.isotropic(POINTS, 0.0, classes=CLASS)


@pytest.mark.parametrize("label", [None, 2])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 20.0])
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_a_data_set_answers_as_a_mixture_of_point_masses(spots, chunk, sigma, label):
    data = Dataset(POINTS, CLASS, chunk=chunk)
    x = spots.sample(16, sigma, generator=seeded(2)).x
    args = (x, full(16, sigma), None if label is None else torch.full((16,), label))
    for method in ("denoiser", "score", "log_density"):
        torch.testing.assert_close(
            getattr(data, method)(*args), getattr(spots, method)(*args), **EXACT
        )


@pytest.mark.parametrize("label", [None, 1])
def test_its_paths_are_those_of_the_mixture(spots, label):
    data = Dataset(POINTS, CLASS, chunk=25)
    x = spots.sample(8, 3.0, generator=seeded(2)).x
    own = None if label is None else torch.full((8,), label)
    there = data.flow_map(x, full(8, 3.0), full(8, 0.2), own)
    torch.testing.assert_close(
        there, spots.flow_map(x, full(8, 3.0), full(8, 0.2), own), rtol=1e-7, atol=1e-7
    )


def test_a_path_ends_on_a_point_of_the_data():
    data = Dataset(POINTS)
    x = data.sample(8, 3.0, generator=seeded(2)).x
    ends = data.consistency(x, full(8, 3.0))
    assert float(torch.cdist(ends, POINTS).amin(1).max()) < 0.01


def test_without_noise_the_denoiser_gives_the_nearest_point():
    data = Dataset(POINTS, chunk=8)
    x = normal(torch.empty(32, 2, dtype=torch.float64), seeded(5))
    nearest = POINTS[torch.cdist(x, POINTS).argmin(1)]
    torch.testing.assert_close(data.denoiser(x, full(32, 0.0)), nearest)


def test_images_are_points_too():
    flat = Dataset(POINTS.repeat(1, 8))
    images = Dataset(POINTS.repeat(1, 8).view(60, 1, 4, 4), chunk=9)
    x, sigma = flat.sample(5, 0.4, generator=seeded(0)).x, full(5, 0.4)
    for method in ("denoiser", "score", "consistency"):
        expected = getattr(flat, method)(x, sigma).view(5, 1, 4, 4)
        torch.testing.assert_close(
            getattr(images, method)(x.view(5, 1, 4, 4), sigma), expected, rtol=1e-7, atol=1e-7
        )
    torch.testing.assert_close(
        images.log_density(x.view(5, 1, 4, 4), sigma), flat.log_density(x, sigma)
    )


def test_samples_are_points_with_noise_and_keep_their_classes():
    x, label = Dataset(POINTS, CLASS).sample(50_000, 0.3, generator=seeded(0))
    clean, own = Dataset(POINTS, CLASS).sample(200, generator=seeded(0))
    assert float(torch.cdist(clean, POINTS).amin(1).max()) < 1e-6
    assert torch.equal(own, CLASS[torch.cdist(clean, POINTS).argmin(1)])
    assert float(x.var(0).mean()) == pytest.approx(Dataset(POINTS).std ** 2 + 0.09, rel=0.02)
    assert label is not None


def test_the_unit_of_distances_is_the_spread_of_the_points():
    assert Dataset(POINTS).std == pytest.approx(float(POINTS.var(0, correction=0).mean().sqrt()))


def test_a_data_set_is_a_world():
    assert isinstance(Dataset(POINTS), World)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dataset(POINTS[:0]), "at least 1 point"),
        (lambda: Dataset(POINTS, chunk=0), "chunk=0"),
        (
            lambda: Dataset(POINTS).denoiser(POINTS[:1], full(1, 1.0), torch.tensor([0])),
            "no labels",
        ),
        (
            lambda: Dataset(POINTS, CLASS).denoiser(POINTS[:1], full(1, 1.0), torch.tensor([7])),
            "no point has the label 7",
        ),
    ],
)
def test_impossible_questions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_points_of_several_classes_and_levels_walk_as_if_alone():
    """Rows that are done leave the batch; those that go on keep their own labels."""
    data = Dataset(POINTS, CLASS)
    x = normal(torch.empty(6, 2, dtype=torch.float64), seeded(3))
    sigma = torch.tensor([0.01, 3.0, 0.02, 2.0, 0.05, 1.0], dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 2, 1, 0])
    together = data.consistency(x, sigma, label)
    for k in range(6):
        alone = data.consistency(x[k : k + 1], sigma[k : k + 1], label[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], alone, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Dataset(POINTS, CLASS - 1), "numbers from 0"),
        (lambda: Dataset(POINTS * torch.nan), "points must be finite"),
        (lambda: Dataset(POINTS, CLASS).denoiser(POINTS[:2], full(2, 1.0), torch.tensor([0, -1])),
         "no point has the label -1"),
        (lambda: GaussianMixture.isotropic(POINTS * torch.nan, 0.1), "must be finite"),
        (lambda: Guided(GaussianMixture.isotropic(POINTS, 0.1), torch.inf), "scale must be finite"),
    ],
)  # fmt: skip
def test_worlds_that_are_none_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_derivative_that_is_not_finite_does_not_hang():
    with pytest.raises(ValueError, match="the derivative is not finite"):
        integrate(lambda x, t, rows: x / 0, torch.ones(2, 2).double(), full(2, 0.0), full(2, 1.0))
