"""Scalings against stored numbers; the boundary condition for any weights, in any precision."""

import pytest
import torch
from torch import nn

from cmbook.networks import MLP, ResidualMLP, UNet
from cmbook.noise import NoiseRange, normal, seeded
from cmbook.parameterization import (
    ConsistencyScalings,
    EDMScalings,
    IDDPMScalings,
    Preconditioned,
    VEScalings,
    VPScalings,
)

RANGE = NoiseRange()


class Loud(nn.Module):
    """A network that says the same large number everywhere."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(1e4))

    def forward(self, x, c_noise, label=None):
        return self.value.expand_as(x)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["c_skip", "c_out", "c_in"])
@pytest.mark.parametrize(
    ("kind", "scalings"), [("diffusion", EDMScalings()), ("consistency", ConsistencyScalings())]
)
@pytest.mark.parametrize(("dtype", "rtol"), [("f64", 1e-12), ("f32", 2e-6)])
def test_scalings_equal_the_official_ones(golden, kind, scalings, name, dtype, rtol):
    stored = golden("scalings")
    key = f"{kind}_c_in_{dtype}" if name == "c_in" else f"{kind}_{name}_{dtype}"
    ours = getattr(scalings, name)(stored[f"sigma_{dtype}"])
    torch.testing.assert_close(ours, stored[key], rtol=rtol, atol=1e-300)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("scalings", "least"), [(EDMScalings(), 0.0), (ConsistencyScalings(), 0.002)]
)
def test_the_official_time_input_is_a_thousand_times_ours(golden, scalings, least):
    stored = golden("scalings")
    sigma, official = stored["sigma_f64"], stored["rescaled_t_f64"]
    ours = 1000 * scalings.c_noise(sigma)
    kept = sigma >= least
    assert int(kept.sum()) > 20
    torch.testing.assert_close(ours[kept], official[kept], rtol=1e-9, atol=1e-9)


def test_a_consistency_model_takes_levels_below_sigma_min_for_sigma_min():
    scalings = ConsistencyScalings(NoiseRange(sigma_min=0.1))
    below, least = torch.tensor([0.0, 0.01, 0.1]), torch.full((3,), 0.1)
    for name in ("c_skip", "c_out", "c_in", "c_noise"):
        assert torch.equal(getattr(scalings, name)(below), getattr(scalings, name)(least))


@pytest.mark.parametrize("sigma", [0.0, 1e-9, 0.001, 0.002])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_boundary_holds_for_any_weights(sigma, dtype):
    model = Preconditioned(Loud(), ConsistencyScalings())
    x = normal(torch.empty(4, 3, dtype=dtype), seeded(0))
    assert torch.equal(model(x, torch.full((4,), sigma)), x)


@pytest.mark.parametrize(
    ("net", "shape"),
    [(MLP(), (2,)), (ResidualMLP(), (1, 8, 8)), (UNet(), (1, 8, 8))],
    ids=["mlp", "residual", "unet"],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_the_boundary_holds_for_networks_under_autocast(net, shape, bf16):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = net.build(shape)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    model = Preconditioned(module, ConsistencyScalings())
    x = normal(torch.empty(3, *shape), seeded(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert torch.equal(model(x, torch.full((3,), 0.002)), x)
        assert not torch.allclose(model(x, torch.full((3,), 1.0)), x)


def test_above_the_boundary_the_network_speaks():
    model = Preconditioned(Loud(), ConsistencyScalings())
    assert float(model(torch.zeros(1, 1), torch.tensor([0.003])).detach()) > 1


def test_a_diffusion_model_at_sigma_zero_returns_its_input():
    model = Preconditioned(Loud(), EDMScalings())
    x = torch.ones(2, 3)
    assert torch.equal(model(x, torch.zeros(2)), x)


def test_the_dress_of_edm_fits_a_gaussian_without_a_network():
    """For data N(0, sigma_data²) the best network says 0: D = c_skip x."""
    from cmbook.oracle import Gaussian

    x = normal(torch.empty(5, 2, dtype=torch.float64), seeded(0))
    sigma = torch.logspace(-2, 1.5, 5, dtype=torch.float64)
    skip = EDMScalings().c_skip(sigma)[:, None] * x
    torch.testing.assert_close(skip, Gaussian.isotropic([0.0, 0.0], 0.5).denoiser(x, sigma))


def test_input_and_target_of_the_network_have_unit_variance():
    """Var(c_in x) = 1 and Var((x0 - c_skip x)/c_out) = 1 for data of variance sigma_data²."""
    s, c = torch.logspace(-2, 1.9, 7, dtype=torch.float64), EDMScalings()
    data = RANGE.sigma_data**2
    torch.testing.assert_close(c.c_in(s) ** 2 * (data + s**2), torch.ones_like(s))
    target = ((1 - c.c_skip(s)) ** 2 * data + c.c_skip(s) ** 2 * s**2) / c.c_out(s) ** 2
    torch.testing.assert_close(target, torch.ones_like(s))


def test_the_two_dresses_nearly_agree_far_above_the_boundary():
    s = torch.tensor([1.0, 80.0], dtype=torch.float64)
    for name in ("c_skip", "c_out"):
        edm, consistency = (getattr(kind(), name)(s) for kind in (EDMScalings, ConsistencyScalings))
        torch.testing.assert_close(edm, consistency, rtol=5e-3, atol=0)


class Told(nn.Module):
    """A network that says what it is given."""

    def forward(self, x, c_noise, label=None):
        return x.sin() + c_noise[:, None]


@pytest.mark.parametrize(("kind", "eps"), [(EDMScalings, 0.0), (ConsistencyScalings, 0.1)])
def test_the_model_is_its_equation_by_hand(kind, eps):
    """Karras et al. (2022), eq. 7, and Song et al. (2023), eq. 5, for data of another spread."""
    model = Preconditioned(Told(), kind(NoiseRange(sigma_min=0.1, sigma_data=0.3)))
    x = normal(torch.empty(5, 2, dtype=torch.float64), seeded(0))
    s = torch.logspace(-1, 1.9, 5, dtype=torch.float64)[:, None]
    root = (s**2 + 0.09).sqrt()
    said = (x / root).sin() + s.log() / 4
    expected = 0.09 / ((s - eps) ** 2 + 0.09) * x + 0.3 * (s - eps) / root * said
    torch.testing.assert_close(model(x, s[:, 0]), expected)


def test_half_precision_sigma_is_refused():
    model = Preconditioned(Loud(), EDMScalings())
    with pytest.raises(ValueError, match="sigma must be float32 or float64"):
        model(torch.ones(1, 1), torch.ones(1, dtype=torch.bfloat16))


def test_float64_sigma_does_not_promote_float32_samples():
    model = Preconditioned(Loud(), ConsistencyScalings())
    assert model(torch.ones(1, 1), torch.ones(1, dtype=torch.float64)).dtype == torch.float32


# ── the dresses of other papers ──

OTHERS = [VPScalings(), VEScalings(), IDDPMScalings()]


@pytest.mark.parametrize("scalings", OTHERS, ids=lambda s: type(s).__name__)
def test_other_dresses_are_their_column_of_the_table(scalings):
    """Karras et al. (2022), Table 1; and D(x, 0) = x."""
    s = torch.logspace(-2, 1.9, 7, dtype=torch.float64)
    up = -1 if not isinstance(scalings, VEScalings) else 1
    torch.testing.assert_close(scalings.c_skip(s), torch.ones_like(s))
    torch.testing.assert_close(scalings.c_out(s), up * s)
    scaled = torch.ones_like(s) if up > 0 else (1 + s**2) ** -0.5
    torch.testing.assert_close(scalings.c_in(s), scaled)
    x = torch.ones(2, 3)
    assert torch.equal(Preconditioned(Loud(), scalings)(x, torch.zeros(2)), x)
    assert scalings.c_noise(s).dtype == s.dtype
    assert scalings.c_noise(s.float()).dtype == torch.float32


def test_vp_is_told_the_time_of_a_noise_level():
    scalings = VPScalings()
    t = torch.linspace(1e-5, 1, 50, dtype=torch.float64)
    sigma = (19.9 * t**2 / 2 + 0.1 * t).expm1().sqrt()
    torch.testing.assert_close(scalings.c_noise(sigma), 999 * t)
    assert scalings.sigma_range == pytest.approx((float(sigma[0]), float(sigma[-1])))
    assert scalings.sigma_range == pytest.approx((0.001, 152.2), rel=1e-3)
    root = (1 + sigma**2).rsqrt()  # alpha: signal and noise together keep unit variance
    torch.testing.assert_close(root**2 + (root * sigma) ** 2, torch.ones_like(root))


def test_ve_is_told_the_logarithm_of_half_the_level():
    sigma = torch.tensor([0.02, 2.0, 100.0], dtype=torch.float64)
    told = VEScalings().c_noise(sigma)
    torch.testing.assert_close(told, (sigma / 2).log())
    assert VEScalings().noise_range == NoiseRange(0.02, 100.0)


def test_iddpm_levels_follow_their_recurrence():
    scalings = IDDPMScalings(C_1=0.002, C_2=0.01, M=50)
    u = scalings.levels
    kept = (torch.pi / 2 * torch.arange(51).double() / 50 / 1.01).sin() ** 2
    for j in range(50, 0, -1):
        ratio = max(float(kept[j - 1] / kept[j]), 0.002)
        assert float(u[j - 1]) == pytest.approx((float(u[j] ** 2 + 1) / ratio - 1) ** 0.5)
    assert float(u[50]) == 0
    usual = IDDPMScalings().levels
    assert usual[[0, 8, 999]].tolist() == pytest.approx([20291.17, 80.2037, 0.0064], rel=5e-3)


def test_iddpm_is_told_the_nearest_level():
    scalings = IDDPMScalings()
    u = scalings.levels
    told = scalings.c_noise(u)
    assert told.tolist() == [999.0 - j for j in range(1001)]
    between = (0.6 * u[:-1] + 0.4 * u[1:]).float()
    assert torch.equal(scalings.c_noise(between), told[:-1].float())
    assert torch.equal(scalings.round_sigma(between), u[:-1].float())
    outside = torch.tensor([0.0, 1e6], dtype=torch.float64)
    assert scalings.c_noise(outside).tolist() == [-1.0, 999.0]


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (VPScalings, {"beta_d": 0.0}, "expected beta_d > 0"),
        (VPScalings, {"epsilon_t": 1.0}, "expected beta_d > 0"),
        (VPScalings, {"steps": 1}, "steps must be at least 2"),
        (IDDPMScalings, {"C_1": 0.0}, "expected 0 < C_1 < 1"),
        (IDDPMScalings, {"M": 1}, "expected 0 < C_1 < 1"),
    ],
)
def test_dresses_refuse_numbers_that_make_no_levels(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        kind(**settings)
