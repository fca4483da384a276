"""Numbers of the reference implementations that belong to more than one module.

Scalings, weights, grids, curricula, samplers and closed forms are compared in the tests of their
modules; here stands the rest.
"""

import pytest
import torch
from torch import nn

from cmbook.distances import L1, L2
from cmbook.losses import ConsistencyTraining
from cmbook.losses.regression import neighbors, self_consistency
from cmbook.noise import NoiseRange, PerImage, Replay, add_noise, integers, normal, seeded
from cmbook.oracle import GaussianMixture
from cmbook.parameterization import ConsistencyScalings, EDMScalings, Preconditioned
from cmbook.protocols import Batch, Clock, Models, Pair
from cmbook.schedules import FixedLevels
from cmbook.weights import WEIGHTS

pytestmark = pytest.mark.parity
RANGE = NoiseRange()

# ── the losses of distillation and of training alone, on recorded points and outputs ──

NORMS = {"l1": L1(), "l2": L2(), "l2-32": L2(resize=32)}
OFFICIAL_WEIGHTS = {
    "uniform": "uniform",
    "snr": "snr",
    "snr+1": "snr_plus_one",
    "karras": "karras",
    "truncated-snr": "truncated_snr",
}


class Recorded:
    """A model that says what it once said, and keeps what it is asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, None

    def __call__(self, x, sigma, label=None):
        self.asked = (x, sigma, label)
        return self.answer


def assert_points_close(ours, stored):
    """Points at σ are of size σ: the stated tolerance is 1e-4 of the largest."""
    torch.testing.assert_close(ours, stored, rtol=0, atol=1e-4 * float(stored.abs().max()))


@pytest.mark.parametrize("weight", OFFICIAL_WEIGHTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["cd", "ct"])
def test_self_consistency_equals_the_official_loss(golden, method, norm, weight):
    """Every weight is taken at the larger level.

    A hundred times closer than stated, and without slack: the least losses are below 1e-6.
    """
    stored = golden(f"loss_{method}")
    pair = Pair(*(stored[name] for name in ("x_t", "t", "x_t2", "t2")))
    loss = self_consistency(
        Models(Recorded(stored["distiller"]), Recorded(stored["distiller_target"])),
        pair,
        stored["y"],
        noise_range=RANGE,
        distance=NORMS[norm],
        weight=OFFICIAL_WEIGHTS[weight],
        generator=Replay(),
    )
    case = f"{norm}/{weight}"
    torch.testing.assert_close(loss.per_sample, stored[f"{case}/loss"], rtol=1e-5, atol=0)
    mean = stored[f"{case}/mean_loss"].float()
    torch.testing.assert_close(loss.value, mean, rtol=1e-5, atol=0)
    assert torch.equal(loss.sigma, stored["t"])


@pytest.mark.parametrize("weight", OFFICIAL_WEIGHTS)
@pytest.mark.parametrize("norm", NORMS)
def test_consistency_training_equals_the_official_one_on_its_draws(golden, norm, weight):
    """From clean images, noise and indices on; only what the networks said is recorded.

    Their Euler step from x_t with the clean image as denoiser is our line of noise.
    """
    stored = golden("loss_ct")
    student, target = Recorded(stored["distiller"]), Recorded(stored["distiller_target"])
    objective = ConsistencyTraining(
        RANGE, FixedLevels(18), distance=NORMS[norm], weight=OFFICIAL_WEIGHTS[weight]
    )
    loss = objective(
        Models(student, target),
        Batch(stored["x_start"], stored["y"]),
        clock=Clock(0, 1),
        generator=Replay(normals=[stored["noise"]], integers=[stored["indices"]]),
    )
    expected = stored[f"{norm}/{weight}/loss"]
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-3, atol=1e-5)
    for model, x, t in ((student, "x_t", "t"), (target, "x_t2", "t2")):
        asked_x, asked_sigma, asked_label = model.asked
        assert_points_close(asked_x, stored[x])
        torch.testing.assert_close(asked_sigma, stored[t], rtol=2e-5, atol=1e-6)
        assert torch.equal(asked_label, stored["y"])


def test_distillation_starts_at_the_official_points(golden):
    """The way on to x_t2 is the teacher's, a network, whose answers are not recorded."""
    stored = golden("loss_cd")
    draws = Replay(integers=[stored["indices"]])
    sigma, sigma_next = neighbors(RANGE.grid(18), stored["x_start"], draws)
    torch.testing.assert_close(sigma, stored["t"], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(sigma_next, stored["t2"], rtol=2e-5, atol=1e-6)
    assert_points_close(add_noise(stored["x_start"], stored["noise"], sigma), stored["x_t"])


@pytest.mark.parametrize("method", ["cd", "ct"])
def test_the_target_of_the_smallest_pair_is_the_point_itself(golden, method):
    """At sigma_min a consistency model is the identity, whatever its weights."""
    stored = golden(f"loss_{method}")
    smallest = stored["indices"] == 16
    assert int(smallest.sum()) > 0
    target, point = stored["distiller_target"][smallest], stored["x_t2"][smallest]
    torch.testing.assert_close(target, point, rtol=1e-5, atol=1e-6)


# ── scalings ──


class Said(nn.Module):
    """A network that says what it once said."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, c_noise, label=None):
        return self.answer


@pytest.mark.parametrize(
    ("kind", "scalings"), [("diffusion", EDMScalings()), ("consistency", ConsistencyScalings())]
)
def test_a_dressed_network_equals_the_official_denoiser(golden, kind, scalings):
    stored = golden("denoise")
    model = Preconditioned(Said(stored[f"{kind}_model_output"]), scalings)
    denoised = model(stored["x_t"], stored["sigmas"])
    torch.testing.assert_close(denoised, stored[f"{kind}_denoised"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", OFFICIAL_WEIGHTS)
def test_weights_equal_the_official_ones_in_float32_too(golden, name):
    stored = golden("scalings")
    sigma = stored["sigma_f32"]
    weight = WEIGHTS[OFFICIAL_WEIGHTS[name]](sigma, sigma / 2, RANGE)
    torch.testing.assert_close(weight, stored[f"weight_{name}_f32"], rtol=2e-6, atol=0)


# ── paths of the exact mixture ──


def test_paths_of_the_mixture_equal_stored_ones_at_every_level(golden):
    stored = golden("gmm2d")
    world = GaussianMixture(stored["weights"], stored["means"], stored["covs"])
    sigmas, points = stored["traj_sigmas"], stored["traj_x"]
    torch.testing.assert_close(sigmas, RANGE.grid(18), rtol=1e-12, atol=0)
    n, count = points.shape[:2]
    start, end = stored["xT"][:count].repeat(n, 1), sigmas.repeat_interleave(count)
    moved = world.flow_map(start, sigmas[:1].expand(n * count), end)
    torch.testing.assert_close(moved.unflatten(0, (n, count)), points, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("points", "sigma", "name"),
    [
        ("f_xT", RANGE.sigma_min, "logp_f_xT_at_sigma_min"),
        ("xT", RANGE.sigma_max, "logp_xT_at_sigma_max"),
    ],
)
def test_densities_at_both_ends_of_the_paths_equal_stored_ones(golden, points, sigma, name):
    stored = golden("gmm2d")
    world = GaussianMixture(stored["weights"], stored["means"], stored["covs"])
    levels = torch.full((len(stored[points]),), sigma, dtype=torch.float64)
    density = world.log_density(stored[points], levels)
    torch.testing.assert_close(density, stored[name], rtol=1e-9, atol=1e-9)


# ── draws ──


@pytest.mark.parametrize(("name", "first"), [("randn1", 0), ("randn_after_done3", 3)])
def test_one_seed_an_image_draws_what_the_official_generator_draws(golden, name, first):
    """`determ-indiv` of 7 images seeds image i with i + 7 · 42. The last bit is the machine's."""
    stored, like = golden("generators"), torch.empty(3, 3, 4, 4)
    draws = PerImage([i + 7 * 42 for i in range(first, first + 3)])
    expected = stored[f"determ-indiv/{name}"]
    torch.testing.assert_close(normal(like, draws), expected, rtol=0, atol=1e-6)
    if first == 0:
        second = stored["determ-indiv/randn2"]
        torch.testing.assert_close(normal(like, draws), second, rtol=0, atol=1e-6)
        assert integers(3, 1000, draws).tolist() == stored["determ-indiv/randint"][:, 0].tolist()


def test_one_seed_for_all_draws_what_the_official_generator_draws(golden):
    """`determ` draws for all 7 images at once and keeps the rows it is asked for."""
    stored, draws, like = golden("generators"), seeded(42), torch.empty(7, 3, 4, 4)
    first, second, third = normal(like, draws), normal(like, draws), integers(7, 1000, draws)
    torch.testing.assert_close(first[:3], stored["determ/randn1"], rtol=0, atol=1e-6)
    torch.testing.assert_close(second[:3], stored["determ/randn2"], rtol=0, atol=1e-6)
    assert third[:3].tolist() == stored["determ/randint"].tolist()
    torch.testing.assert_close(first[3:6], stored["determ/randn_after_done3"], rtol=0, atol=1e-6)
