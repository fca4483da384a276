"""Distances against their formulas, and their slopes where formulas are delicate."""

import math

import pytest
import torch

from cmbook.distances import L1, L2, LInf, Norm, PseudoHuber
from cmbook.noise import normal, seeded

X, Y = (normal(torch.empty(3, 2, 4, 4, dtype=torch.float64), seeded(i)) for i in (0, 1))
SQUARES = (X - Y).square().sum((1, 2, 3))


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        (L2(), SQUARES / 32),
        (L1(), (X - Y).abs().mean((1, 2, 3))),
        (LInf(), (X - Y).abs().amax((1, 2, 3))),
        (Norm(), SQUARES.sqrt()),
        (PseudoHuber(0.3), (SQUARES + 0.09).sqrt() - 0.3),
        (PseudoHuber(), (SQUARES + 0.00054**2 * 32).sqrt() - 0.00054 * math.sqrt(32)),
        (PseudoHuber(0.0), SQUARES.sqrt()),
    ],
)
def test_distances_are_their_formulas(distance, expected):
    torch.testing.assert_close(distance(X, Y), expected, rtol=1e-12, atol=1e-12)


def test_pseudo_huber_takes_the_norm_of_the_whole_sample_not_of_each_pixel():
    per_pixel = ((X - Y).square() + 0.09).sqrt().sub(0.3).sum((1, 2, 3))
    assert not torch.allclose(PseudoHuber(0.3)(X, Y), per_pixel, rtol=0.1)


@pytest.mark.parametrize("distance", [L2(), L1(), LInf(), Norm(), PseudoHuber(), PseudoHuber(0.0)])
def test_the_slope_is_zero_and_finite_where_prediction_equals_target(distance):
    x = X.clone().requires_grad_(True)
    distance(x, X).sum().backward()
    assert float(x.grad.abs().max()) == 0


@pytest.mark.parametrize(("scale", "power"), [(1e-3, 2.0), (1e3, 1.0)])
def test_pseudo_huber_is_quadratic_near_and_linear_far(scale, power):
    near, far = (PseudoHuber(1.0)(X * s, torch.zeros_like(X)) for s in (scale, 1.01 * scale))
    assert float((far / near).log().mean() / math.log(1.01)) == pytest.approx(power, abs=0.01)


def test_l2_resized_sees_only_the_small_image():
    big = torch.nn.functional.interpolate(X.float(), (64, 64), mode="nearest")
    checker = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    assert (
        float(L2(resize=32)(big + checker, big).max()) < 1e-6 < float(L2()(big + checker, big)[0])
    )


def test_l2_resized_refuses_points():
    with pytest.raises(ValueError, match="expects images"):
        L2(resize=32)(torch.ones(2, 3), torch.ones(2, 3))


def test_a_negative_c_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        PseudoHuber(-1.0)
