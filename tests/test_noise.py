"""Randomness: repeatable, independent of the batch, replayable."""

import math

import pytest
import torch
from scipy import stats

from cmbook.noise import (
    LogNormal,
    NoiseRange,
    PerImage,
    Replay,
    add_noise,
    choose,
    expand,
    integers,
    normal,
    seeded,
    shuffled,
    uniform,
)


def test_a_range_is_refused_when_impossible():
    for bad in ({"sigma_min": 0.0}, {"sigma_max": 0.001}, {"rho": 0.0}, {"sigma_data": -1.0}):
        with pytest.raises(ValueError, match=r"sigma|rho"):
            NoiseRange(**bad)


def test_noise_is_scaled_per_sample():
    x0, noise = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    sigma = torch.tensor([0.0, 1.0, 80.0])
    assert add_noise(x0, noise, sigma)[:, 0, 0, 0].tolist() == [0.0, 1.0, 80.0]


def test_expand_takes_the_dtype_of_the_samples():
    assert expand(torch.ones(2, dtype=torch.float64), torch.ones(2, 3)).dtype == torch.float32


def test_streams_of_different_keys_differ_and_the_same_repeat():
    like = torch.empty(4)
    keys = [(0,), (1,), (0, "data"), (0, "data", 1), (0, "step", 1), (1, "data", 1)]
    streams = [tuple(normal(like, seeded(*k)).tolist()) for k in keys]
    assert len(set(streams)) == len(keys)
    assert streams == [tuple(normal(like, seeded(*k)).tolist()) for k in keys]


def test_seeded_needs_a_key():
    with pytest.raises(ValueError, match="at least one key"):
        seeded()


def test_an_image_does_not_depend_on_its_batch():
    like = torch.empty(5, 2, 3)
    together = normal(like, PerImage(range(5)))
    alone = torch.cat([normal(like[:1], PerImage([i])) for i in range(5)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("draw", [lambda g: normal(torch.empty(2), g), lambda g: uniform(2, g)])
def test_per_image_refuses_another_number_of_images(draw):
    with pytest.raises(ValueError, match="holds 3 seeds; asked for 2"):
        draw(PerImage([0, 1, 2]))


def test_replay_gives_back_draws_by_kind_in_order():
    replay = Replay(
        normals=[torch.ones(2), torch.zeros(2)],
        uniforms=[torch.tensor([0.5])],
        integers=[torch.tensor([1, 0])],
    )
    assert integers(2, 2, replay).tolist() == [1, 0]
    assert normal(torch.empty(2), replay).tolist() == [1, 1]
    assert uniform(1, replay).tolist() == [0.5]
    assert normal(torch.empty(2), replay).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        (Replay(), r"no recorded integer draw is left; one of \(2,\)"),
        (Replay(integers=[torch.zeros(3, dtype=torch.int64)]), r"is \(3,\); \(2,\) was asked for"),
        (Replay(integers=[torch.tensor([0, 9])]), "must lie in 0 ... 4"),
    ],
)
def test_replay_checks_what_is_asked_for(replay, message):
    with pytest.raises(ValueError, match=message):
        integers(2, 5, replay)


def test_log_normal_levels_have_their_mean_and_spread(generator):
    logs = LogNormal(-1.2, 1.2)(200_000, generator).log()
    assert stats.kstest(logs.numpy(), "norm", args=(-1.2, 1.2)).pvalue > 1e-3


def test_noise_levels_are_by_default_those_of_edm():
    """Karras et al. (2022), Table 1: half of them lie below exp(-1.2), five of six below 1."""
    at = Replay(normals=[torch.tensor([0.0, 1.0])])
    assert LogNormal()(2, at).tolist() == pytest.approx([0.301194, 1.0], rel=1e-5)


def test_weighted_choices_follow_their_weights(generator):
    weights = torch.tensor([0.1, 0.0, 0.6, 0.3])
    counts = torch.bincount(choose(100_000, weights, generator), minlength=4).double()
    assert counts[1] == 0
    kept = weights > 0
    expected = 100_000 * weights[kept].double()
    assert stats.chisquare(counts[kept], expected * counts.sum() / expected.sum()).pvalue > 1e-3


def test_a_shuffle_is_a_permutation(generator):
    assert sorted(shuffled(50, generator).tolist()) == list(range(50))


def test_a_cpu_generator_serves_every_dtype(generator):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert normal(torch.empty(3, dtype=dtype), generator).dtype == dtype


def test_normal_numbers_are_normal(generator):
    drawn = normal(torch.empty(100_000, dtype=torch.float64), generator)
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-3
    assert math.isfinite(float(drawn.sum()))


@pytest.mark.parametrize("bad", [(0.0, 0.0), (0.0, -1.0), (math.nan, 1.0)])
def test_an_impossible_law_of_noise_levels_is_refused(bad):
    with pytest.raises(ValueError, match="finite mean and std > 0"):
        LogNormal(*bad)


def test_integers_of_each_image_reach_the_highest():
    drawn = integers(400, 50, PerImage(range(400)))
    assert (int(drawn.min()), int(drawn.max())) == (0, 49)


def test_a_recorded_integer_that_is_too_high_is_refused():
    with pytest.raises(ValueError, match=r"recorded integers must lie in 0 \.\.\. 4; got \[5\]"):
        integers(1, 5, Replay(integers=[torch.tensor([5])]))
