"""Noise levels and curricula against printed tables, formulas and stored numbers."""

import math

import pytest
import torch

from cmbook.protocols import Clock
from cmbook.schedules import (
    AdaptiveLevels,
    DoublingLevels,
    FixedLevels,
    check_decreasing,
    decay_at,
    karras_sigmas,
    levels_at,
)


@pytest.mark.parametrize(
    ("n", "i", "sigma"),
    [
        (18, 1, 57.585985), (18, 11, 0.585348), (18, 12, 0.296442), (18, 16, 0.007528),
        (40, 1, 69.450946), (40, 16, 5.380004), (40, 17, 4.365562), (40, 20, 2.240440),
        (40, 22, 1.382368), (151, 62, 5.248503), (151, 67, 3.991219), (201, 106, 1.912844),
    ],
)  # fmt: skip
def test_levels_match_the_published_time_points(n, i, sigma):
    assert float(karras_sigmas(n, 0.002, 80, 7)[i]) == pytest.approx(sigma, abs=6e-7)


@pytest.mark.parametrize(("low", "high", "rho"), [(0.002, 80, 7), (0.1, 0.3, 1), (1e-5, 1e3, 3)])
def test_levels_decrease_and_hit_both_ends_exactly(low, high, rho):
    sigmas = karras_sigmas(33, low, high, rho)
    assert sigmas.dtype == torch.float64
    assert (float(sigmas[0]), float(sigmas[-1])) == (high, low)
    assert bool((sigmas.diff() < 0).all())


@pytest.mark.parity
def test_levels_equal_the_official_ones(golden):
    stored = golden("sigmas")
    for case in range(5):
        n, low, high, rho = stored[f"case{case}/args"].tolist()
        ours = karras_sigmas(int(n), low, high, rho).float()
        torch.testing.assert_close(ours, stored[f"case{case}/sigmas"][:-1], rtol=2e-5, atol=1e-6)


@pytest.mark.parity
def test_a_grid_of_one_level_is_refused_where_the_official_code_returns_it(golden):
    """There n = 1 gives sigma_max and 0. One level bounds no interval, so we ask for two."""
    stored = golden("sigmas")
    assert stored["case5/sigmas"].tolist() == pytest.approx([80.0, 0.0], rel=1e-6)
    with pytest.raises(ValueError, match="at least 2 levels; got n = 1"):
        karras_sigmas(1, 0.002, 80, 7)


@pytest.mark.parametrize(
    "bad", [(1, 0.1, 1, 7), (4, 0, 1, 7), (4, 1, 1, 7), (4, 2, 1, 7), (4, 0.1, math.inf, 7),
            (4, 0.1, 1, 0), (4, math.nan, 1, 7)],
)  # fmt: skip
def test_impossible_grids_are_refused(bad):
    with pytest.raises(ValueError, match=r"levels|sigma_min|rho"):
        karras_sigmas(*bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1.0, 2.0], r"must decrease; got \[1.0, 2.0\]. Did you mean sigmas.flip\(0\)\?"),
        ([2.0, 2.0], "must decrease"),
        ([2.0, math.nan], "finite"),
        ([1.0, -1.0], "at least 0"),
        ([], "at least one"),
    ],
)
def test_levels_that_do_not_decrease_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        check_decreasing(torch.tensor(bad))


@pytest.mark.parametrize(
    ("k", "n", "mu_paper", "mu_code"),
    [
        (0, 2, 0.9, 0.81), (1, 3, 0.93217, 0.9), (8000, 16, 0.98692, 0.98605),
        (200000, 76, 0.99723, 0.99719), (400000, 107, 0.99803, 0.99801),
        (800000, 151, 0.99861, 0.99860),
    ],
)  # fmt: skip
def test_curriculum_matches_the_table_of_cifar10(k, n, mu_paper, mu_code):
    clock = Clock(k, 800_000)
    assert levels_at(clock, 2, 150) == n
    assert decay_at(n, 2, 0.9, "paper") == pytest.approx(mu_paper, abs=6e-6)
    assert decay_at(n, 2, 0.9, "code") == pytest.approx(mu_code, abs=6e-6)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "start", "end", "decay", "steps"),
    [
        ("adaptive_imagenet64", 2, 200, 0.95, 800_000),
        ("adaptive_lsun", 2, 150, 0.95, 1_000_000),
        ("adaptive_cifar", 2, 150, 0.9, 800_000),
        ("adaptive_short", 10, 1280, 0.9, 400),
    ],
)
def test_curriculum_equals_the_official_one(golden, name, start, end, decay, steps):
    stored = golden("schedules")
    curriculum = AdaptiveLevels(start, end, decay, "code")
    clocks = [Clock(int(k), steps) for k in stored[f"{name}/steps"]]
    levels = torch.tensor([curriculum.levels_at(clock) for clock in clocks])
    decays = torch.tensor([curriculum.decay_at(clock) for clock in clocks], dtype=torch.float64)
    torch.testing.assert_close(levels, stored[f"{name}/scales"].long(), rtol=0, atol=0)
    torch.testing.assert_close(decays, stored[f"{name}/ema"].double(), rtol=1e-12, atol=0)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "curriculum"),
    [
        ("adaptive_cifar", AdaptiveLevels(2, 150, 0.9, "code")),
        ("adaptive_b", AdaptiveLevels(5, 60, 0.95, "code")),
    ],
)
def test_curriculum_equals_that_of_the_cifar10_code(golden, name, curriculum):
    """That code computes in float32. None of the stored steps is so near a ceiling as to tell."""
    stored = golden("schedules_jax")
    clocks = [Clock(int(k), 800_000) for k in stored["steps"]]
    assert stored[f"{name}/scales"].tolist() == [curriculum.levels_at(clock) for clock in clocks]
    decays = torch.tensor([curriculum.decay_at(clock) for clock in clocks], dtype=torch.float64)
    torch.testing.assert_close(decays, stored[f"{name}/ema"], rtol=1e-6, atol=0)


@pytest.mark.parity
def test_fixed_levels_equal_the_official_ones(golden):
    """Here, and here alone, the number given is N itself: nothing is added to it."""
    stored, schedule = golden("schedules"), FixedLevels(40, 0.95)
    clocks = [Clock(int(k), 600_000) for k in stored["fixed_fixed/steps"]]
    assert stored["fixed_fixed/scales"].tolist() == [schedule.levels_at(c) for c in clocks]
    assert stored["fixed_fixed/ema"].tolist() == [schedule.decay_at(c) for c in clocks]


@pytest.mark.parity
def test_growing_levels_under_a_fixed_decay_equal_the_official_ones(golden):
    """A mixed mode of the released code: N(k) of the curriculum, and μ = 0.99 throughout."""
    stored = golden("schedules")
    clocks = [Clock(int(k), 600_000) for k in stored["fixed_progressive/steps"]]
    assert stored["fixed_progressive/scales"].tolist() == [levels_at(c, 2, 120) for c in clocks]
    assert set(stored["fixed_progressive/ema"].tolist()) == {0.99}


def test_adaptive_levels_end_one_above_their_end_and_never_fall():
    curriculum = AdaptiveLevels(2, 150)
    levels = [curriculum.levels_at(Clock(k, 1000)) for k in range(1001)]
    assert (levels[0], levels[-1]) == (2, 151)
    assert levels == sorted(levels)


def test_doubling_levels_are_those_of_ict():
    curriculum = DoublingLevels(10, 1280)
    levels = [curriculum.levels_at(Clock(50_000 * i, 400_000)) for i in range(8)]
    assert levels == [11, 21, 41, 81, 161, 321, 641, 1281]


def test_doubling_survives_a_training_shorter_than_its_stages():
    assert DoublingLevels(10, 1280).levels_at(Clock(2, 3)) == 41


@pytest.mark.parametrize("end", [150, 155])
def test_doubling_levels_stop_at_their_end(end):
    """K′ = ⌊K/(log2 ⌊s1/s0⌋ + 1)⌋, and ⌊s1/s0⌋ = 15 for both."""
    curriculum, steps = DoublingLevels(10, end), 400_000
    every = math.floor(steps / (math.log2(15) + 1))
    for stage, levels in enumerate([11, 21, 41, 81, end + 1]):
        first, last = every * stage, min(every * (stage + 1), steps) - 1
        assert curriculum.levels_at(Clock(first, steps)) == levels
        assert curriculum.levels_at(Clock(last, steps)) == levels


def test_adaptive_levels_follow_the_paper_unless_told():
    assert AdaptiveLevels().decay_at(Clock(0, 1)) == pytest.approx(0.9, abs=1e-12)
    assert AdaptiveLevels(mu_variant="code").decay_at(Clock(0, 1)) == pytest.approx(0.81, abs=1e-12)


def test_fixed_levels_stay():
    curriculum = FixedLevels(40, 0.95)
    assert (curriculum.levels_at(Clock(7, 9)), curriculum.decay_at(Clock(7, 9))) == (40, 0.95)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedLevels(1),
        lambda: FixedLevels(18, 1.0),
        lambda: AdaptiveLevels(1, 150),
        lambda: AdaptiveLevels(20, 10),
        lambda: AdaptiveLevels(2, 150, -0.1),
        lambda: DoublingLevels(0, 10),
    ],
)
def test_impossible_curricula_are_refused(make):
    with pytest.raises(ValueError, match=r"must|expected"):
        make()
