"""Weights against formulas and stored numbers."""

import pytest
import torch

from cmbook.noise import NoiseRange
from cmbook.parameterization import EDMScalings
from cmbook.weights import WEIGHTS

RANGE = NoiseRange()


@pytest.mark.parity
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("uniform", "uniform"),
        ("snr", "snr"),
        ("snr_plus_one", "snr+1"),
        ("karras", "karras"),
        ("truncated_snr", "truncated-snr"),
    ],
)
def test_weights_equal_the_official_ones(golden, ours, theirs):
    stored = golden("scalings")
    sigma = stored["sigma_f64"]
    weight = WEIGHTS[ours](sigma, sigma / 2, RANGE)
    torch.testing.assert_close(weight, stored[f"weight_{theirs}_f64"].double(), rtol=1e-12, atol=0)


def test_the_karras_weight_undoes_c_out():
    sigma = torch.logspace(-2.5, 1.9, 9, dtype=torch.float64)
    product = WEIGHTS["karras"](sigma, sigma, RANGE) * EDMScalings(RANGE).c_out(sigma) ** 2
    torch.testing.assert_close(product, torch.ones_like(sigma))


def test_the_inverse_gap_times_the_gap_is_one():
    grid = RANGE.grid(18)
    gap = WEIGHTS["inverse_gap"](grid[:-1], grid[1:], RANGE) * (grid[:-1] - grid[1:])
    torch.testing.assert_close(gap, torch.ones(17, dtype=torch.float64))
