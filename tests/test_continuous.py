"""Derivatives along paths, the continuous-time losses, and what they refuse.

That the losses are the limits they claim to be is in test_theorems.py.
"""

import pytest
import torch
from torch import nn

from cmbook.distances import L1, L2, LInf, Norm, PseudoHuber
from cmbook.guidance import guided
from cmbook.losses import (
    ContinuousDistillation,
    ContinuousTraining,
    ProgressiveDistillation,
    check_jvp,
    tangent,
)
from cmbook.losses.continuous import curvature
from cmbook.networks import MLP, NCSNpp, ResidualMLP, UNet
from cmbook.noise import NoiseRange, Replay, normal, seeded
from cmbook.ode import euler_step, velocity
from cmbook.oracle import Gaussian, GaussianMixture
from cmbook.parameterization import ConsistencyScalings, EDMScalings, Preconditioned
from cmbook.protocols import Batch, Clock, Models
from cmbook.schedules import karras_sigmas
from cmbook.training import frozen_view

CLOCK, RANGE = Clock(0, 10), NoiseRange()
WORLD = Gaussian.isotropic([0.3, -0.1], 0.5)


def dressed(network, shape, classes=None, seed=0) -> Preconditioned:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = network.build(shape, classes)
        for p in net.parameters():  # the zeroed output layers would hide everything
            nn.init.normal_(p, std=0.1)
        return Preconditioned(net, ConsistencyScalings(RANGE))


def level(sigma: float, n: int) -> torch.Tensor:
    return torch.full((n,), sigma, dtype=torch.float64)


# ── tangent ──


@pytest.mark.parametrize("sigma", [0.01, 0.7, 20.0, 80.0])
def test_the_exact_function_does_not_change_along_its_paths(sigma):
    x = WORLD.sample(50, sigma, generator=seeded(0)).x
    dx = velocity(x, WORLD.denoiser(x, level(sigma, 50)), level(sigma, 50))
    value, change = tangent(WORLD.consistency, x, level(sigma, 50), dx)
    assert torch.allclose(value, WORLD.consistency(x, level(sigma, 50)))
    assert float(change.abs().max()) < 1e-12


def test_off_its_paths_the_exact_function_changes():
    x = WORLD.sample(50, 1.0, generator=seeded(0)).x
    _, change = tangent(WORLD.consistency, x, level(1.0, 50), torch.zeros_like(x))
    assert float(change.abs().min()) > 0


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (MLP(width=16, depth=2), (2,)),
        (ResidualMLP(width=32, depth=1, told=16), (1, 8, 8)),
        (UNet(channels=16, attention=(8, 4), heads=2), (1, 8, 8)),
        (UNet(channels=32, resample="block", time_scale=1000.0, groups="all"), (1, 8, 8)),
        (UNet(channels=16, resample="conv", told="add"), (1, 8, 8)),
        (NCSNpp(channels=16, multipliers=(1, 2), blocks=1, attention=(4,)), (1, 8, 8)),
    ],
    ids=["mlp", "residual", "unet with attention", "adm", "strided", "ncsn++"],
)
def test_our_networks_have_right_derivatives(network, shape):
    """Where cosines of 1000 c_noise turn fast, the finite differences are the less exact ones."""
    x = normal(torch.empty(3, *shape), seeded(1))
    sigma = torch.tensor([0.05, 0.8, 10.0])
    fast = getattr(network, "time_scale", None) or isinstance(network, NCSNpp)
    allowed = 1e-5 if fast else 1e-8
    assert check_jvp(dressed(network, shape), x, sigma, generator=seeded(2)) < allowed


def test_a_frozen_view_has_the_derivative_of_the_model():
    model = dressed(MLP(width=16, depth=2), (2,)).double()
    x, sigma = normal(torch.empty(4, 2).double(), seeded(1)), level(0.5, 4)
    theirs, ours = (tangent(m, x, sigma, torch.ones_like(x)) for m in (model, frozen_view(model)))
    assert torch.allclose(ours[1], theirs[1], rtol=1e-12)
    assert theirs[1].requires_grad
    assert not ours[1].requires_grad


def test_a_model_that_detaches_is_found_out():
    model = dressed(MLP(width=16, depth=2), (2,)).double()

    def detached(x, sigma, label=None):
        return model(x.detach(), sigma.detach(), label)

    x = normal(torch.empty(4, 2), seeded(1))
    with pytest.raises(ValueError, match="it is 0: something inside detaches"):
        check_jvp(detached, x, torch.ones(4), generator=seeded(2))


def test_a_model_with_a_wrong_derivative_is_found_out():
    def rounding(x, sigma, label=None):
        return x.float().half().to(x) * (1 + 0 * sigma[:, None])

    with pytest.raises(ValueError, match="differs from finite differences"):
        check_jvp(
            rounding, normal(torch.empty(4, 2), seeded(1)), torch.ones(4), generator=seeded(2)
        )


def test_derivatives_ignore_autocast():
    model, x = dressed(MLP(width=16, depth=2), (2,)), normal(torch.empty(4, 2), seeded(1))
    plain = tangent(model, x, torch.ones(4), torch.ones_like(x))[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tangent(model, x, torch.ones(4), torch.ones_like(x))[1], plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    x = torch.ones(2, 2, dtype=dtype)
    with pytest.raises(ValueError, match="rounding noise; pass float32 samples"):
        tangent(WORLD.consistency, x, torch.ones(2), x)
    halved = dressed(MLP(width=16, depth=2), (2,)).to(dtype)
    with pytest.raises(ValueError, match="keep the weights in float32"):
        tangent(halved, torch.ones(2, 2), torch.ones(2), torch.ones(2, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_model_is_refused_and_so_is_a_wrapped_one():
    model = dressed(MLP(width=16, depth=2), (2,))
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        tangent(torch.compile(model), x, torch.ones(2), x)
    model.net = torch.compile(model.net)
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        tangent(model, x, torch.ones(2), x)

    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(ValueError, match="differentiate the frozen target"):
        tangent(wrapped, x, torch.ones(2), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_direction_in_half_precision_is_refused(dtype):
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match="float32 samples and directions"):
        tangent(WORLD.consistency, x, torch.ones(2), x.to(dtype))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "view", [frozen_view, lambda m: guided(m, 2.0), lambda m: frozen_view(guided(m, 2.0))],
    ids=["frozen", "guided", "both"],
)  # fmt: skip
def test_what_would_differentiate_wrongly_is_seen_through_wrappers(view):
    """In training the target is a frozen view of the student."""
    x, network = torch.ones(2, 2), MLP(width=16, depth=2)
    with pytest.raises(ValueError, match="keep the weights in float32"):
        tangent(view(dressed(network, (2,)).half()), x, torch.ones(2), x)
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        tangent(view(torch.compile(dressed(network, (2,)))), x, torch.ones(2), x)
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        tangent(view(wrapped), x, torch.ones(2), x)


def test_one_wrong_sample_is_found_among_larger_ones():
    def wrong(x, sigma, label=None):
        first = torch.arange(len(x))[:, None] == 0
        return torch.where(first, 1e-6 * x.detach(), x) * (1 + 0 * sigma[:, None])

    x = normal(torch.empty(4, 2), seeded(1))
    with pytest.raises(ValueError, match=r"by 1 \(relative\), at sigma = 0\.3; it is 0"):
        check_jvp(wrong, x, torch.tensor([0.3, 1.0, 1.0, 1.0]), generator=seeded(2))


def test_at_the_boundary_the_kink_is_named():
    """Just above it the same model passes."""
    model, x = dressed(MLP(width=16, depth=2), (2,)), normal(torch.empty(4, 2), seeded(1))
    with pytest.raises(
        ValueError, match=r"sigma = 0\.002; .* as a consistency model is at sigma_m"
    ):
        check_jvp(model, x, torch.full((4,), 0.002), generator=seeded(2))
    assert check_jvp(model, x, torch.full((4,), 0.0021), generator=seeded(2)) < 1e-6


def test_checking_leaves_the_model_as_it_was():
    """The copy is in float64 and eval mode: dropout would look like a wrong derivative."""
    model = dressed(ResidualMLP(width=32, depth=1, told=16, dropout=0.5), (1, 8, 8)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = normal(torch.empty(3, 1, 8, 8), seeded(1))
    anything = float("inf")
    assert check_jvp(model, x, torch.ones(3), generator=seeded(2), tolerance=anything) < 1e-8
    assert model.training
    after = model.state_dict()
    assert all(after[name].dtype == torch.float32 for name in before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_nothing_to_check_is_refused():
    with pytest.raises(ValueError, match="no samples to check at"):
        check_jvp(WORLD.consistency, torch.empty(0, 2), torch.empty(0), generator=seeded(2))


# ── curvature ──


@pytest.mark.parametrize("distance", [L2(), PseudoHuber(0.4), PseudoHuber()], ids=str)
def test_curvature_is_the_hessian_in_either_argument(distance):
    at, direction = torch.randn(2, 1, 5, generator=seeded(0), dtype=torch.float64)
    first, second = (
        torch.autograd.functional.hessian(f, at)[0, :, 0, :]
        for f in (lambda y: distance(y, at).sum(), lambda y: distance(at, y).sum())
    )
    assert torch.allclose(first, second)
    assert torch.allclose(curvature(distance, at, direction)[0], first @ direction[0])


@pytest.mark.parametrize("distance", [L1(), Norm(), LInf(), PseudoHuber(0.0)], ids=str)
@pytest.mark.parametrize("kind", [ContinuousDistillation, ContinuousTraining])
def test_a_frozen_target_needs_a_smooth_distance(kind, distance):
    with pytest.raises(ValueError, match=r"has a kink at 0 and no curvature"):
        kind(distance=distance)


# ── the losses ──


SMOOTH, KINKED = [L2(), PseudoHuber(0.4)], [L1(), Norm(), LInf()]


@pytest.mark.parametrize(
    ("distance", "frozen"),
    [*((d, True) for d in SMOOTH), *((d, False) for d in SMOOTH + KINKED)],
    ids=str,
)
def test_distillation_at_the_exact_function_is_zero(distance, frozen):
    objective = ContinuousDistillation(distance=distance, frozen_target=frozen)
    batch = WORLD.sample(100, generator=seeded(0))
    models = Models(WORLD.consistency, WORLD.consistency, WORLD.denoiser)
    assert float(objective(models, batch, clock=CLOCK, generator=seeded(1)).value) < 1e-11


def by_hand(model, x0, u, noise, direction):
    """σ, x, f and f' by finite differences, for the formulas below."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = (low + u * (high - low)) ** 7
    x = x0 + sigma[:, None] * noise
    dx, h = direction(x, sigma), 1e-5 * sigma
    with torch.no_grad():
        ahead = model(x + h[:, None] * dx, sigma + h)
        behind = model(x - h[:, None] * dx, sigma - h)
    gap = 7 * (high - low) * sigma ** (6 / 7)
    return sigma, x, (ahead - behind) / (2 * h[:, None]), gap


@pytest.mark.parametrize("method", ["cd", "ct"])
@pytest.mark.parametrize("weight", ["inverse_gap", "uniform", "snr"])
def test_the_gradient_is_theorem_5_by_hand(method, weight):
    model = dressed(MLP(width=16, depth=2), (2,)).double()
    x0 = WORLD.sample(20, generator=seeded(0)).x
    u = torch.rand(20, generator=seeded(3), dtype=torch.float64)
    noise = normal(x0, seeded(4))
    kind = ContinuousDistillation if method == "cd" else ContinuousTraining
    direction = (lambda x, s: (x - WORLD.denoiser(x, s)) / s[:, None]) if method == "cd" else (
        lambda x, s: noise
    )  # fmt: skip
    loss = kind(weight=weight)(
        Models(model, frozen_view(model), WORLD.denoiser), Batch(x0), clock=CLOCK,
        generator=Replay(normals=[noise], uniforms=[u]),
    )  # fmt: skip
    sigma, x, change, gap = by_hand(model, x0, u, noise, direction)
    scale = {"inverse_gap": 1 / gap, "uniform": 1.0, "snr": sigma**-2}[weight] * gap
    # H is 2/d for the mean over d = 2 coordinates
    mine = (scale * (model(x, sigma) * 2 / 2 * change).sum(1)).mean()
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
        for value in (loss.value, mine)
    ]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-10)
    assert torch.allclose(loss.per_sample, scale * change.square().mean(1), rtol=1e-5)
    assert torch.equal(loss.sigma, sigma)


def test_without_a_frozen_target_the_value_is_the_same_and_the_gradient_another():
    """λ = 1/τ': Theorem 3 keeps one factor τ', which the frozen form does not have."""
    model = dressed(MLP(width=16, depth=2), (2,)).double()
    batch = Batch(WORLD.sample(20, generator=seeded(0)).x)
    losses = [
        ContinuousDistillation(frozen_target=frozen)(
            Models(model, frozen_view(model), WORLD.denoiser), batch, clock=CLOCK,
            generator=seeded(1),
        )
        for frozen in (True, False)
    ]  # fmt: skip
    gap = 7 * (80 ** (1 / 7) - 0.002 ** (1 / 7)) * losses[0].sigma ** (6 / 7)
    assert torch.allclose(losses[1].per_sample, gap * losses[0].per_sample, rtol=1e-6)
    one, two = (torch.autograd.grad(loss.value, model.net.outlet.weight)[0] for loss in losses)
    assert float(torch.cosine_similarity(one.flatten(), two.flatten(), 0)) < 0.99


def flat_gradient(value, model):
    found = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize(
    ("distance", "bends"),
    [(L2(), 2 / 2), (PseudoHuber(0.4), 1 / 0.4), (PseudoHuber(), 1 / (0.00054 * 2**0.5))],
    ids=str,
)
def test_without_a_frozen_target_the_gradient_is_theorem_3_by_hand(distance, bends):
    """½ λ τ'² f'ᵀ H f': H is 2/d for the mean over d = 2, 1/c for pseudo-Huber."""
    model = dressed(MLP(width=16, depth=2), (2,)).double()
    x0 = WORLD.sample(20, generator=seeded(0)).x
    u = torch.rand(20, generator=seeded(3), dtype=torch.float64)
    noise = normal(x0, seeded(4))
    loss = ContinuousDistillation(distance=distance, frozen_target=False)(
        Models(model, None, WORLD.denoiser), Batch(x0), clock=CLOCK,
        generator=Replay(normals=[noise], uniforms=[u]),
    )  # fmt: skip
    sigma, gap = RANGE.warp(u)
    x, h = x0 + sigma[:, None] * noise, 1e-5 * sigma
    dx = velocity(x, WORLD.denoiser(x, sigma), sigma)
    ahead, behind = (model(x + s * h[:, None] * dx, sigma + s * h) for s in (1, -1))
    change = (ahead - behind) / (2 * h[:, None])
    mine = (gap * bends * change.square().sum(1) / 2).mean()  # λ = 1/τ' leaves one τ'
    assert torch.allclose(loss.value, mine, rtol=1e-6)
    ours, theirs = flat_gradient(loss.value, model), flat_gradient(mine, model)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    "objective",
    [ContinuousDistillation(), ContinuousTraining(), ContinuousDistillation(frozen_target=False),
     ProgressiveDistillation()],
    ids=["distillation", "training", "not frozen", "progressive"],
)  # fmt: skip
def test_dropout_is_a_function_of_the_generator(objective):
    """Of the student and of the target: nothing is left to the global random state."""
    model = dressed(ResidualMLP(width=32, depth=1, told=16, dropout=0.5), (1, 8, 8)).train()
    batch = Batch(normal(torch.empty(8, 1, 8, 8), seeded(1)))
    teacher = dressed(ResidualMLP(width=32, depth=1, told=16), (1, 8, 8), seed=1)
    losses = []
    for seed in (0, 1):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            losses.append(
                objective(
                    Models(model, frozen_view(model), teacher), batch, clock=CLOCK,
                    generator=seeded(2),
                ).per_sample
            )  # fmt: skip
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*losses)


def test_a_kinked_pseudo_huber_is_refused_without_a_frozen_target_too():
    """Its curvature at 0 would be 0, silently, and with it the loss."""
    with pytest.raises(ValueError, match=r"c > 0; to distill, also L1\(\), Norm\(\)"):
        ContinuousDistillation(distance=PseudoHuber(0.0), frozen_target=False)


@pytest.mark.parametrize("kind", [ContinuousDistillation, ProgressiveDistillation])
def test_methods_that_distill_ask_for_a_teacher(kind):
    batch = WORLD.sample(3, generator=seeded(0))
    models = Models(WORLD.denoiser, WORLD.denoiser)
    with pytest.raises(ValueError, match=r"needs models\.teacher, a diffusion model"):
        kind()(models, batch, clock=CLOCK, generator=seeded(1))


def test_the_levels_are_those_of_the_grid_made_continuous():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigma, gap = RANGE.warp(u)
    assert torch.allclose(sigma.flip(0), karras_sigmas(11, 0.002, 80.0, 7.0))
    ahead, behind = (RANGE.warp(u + h)[0] for h in (1e-6, -1e-6))
    assert torch.allclose(gap, (ahead - behind) / 2e-6, rtol=1e-6)


# ── progressive distillation ──


def test_one_step_to_the_target_lands_where_two_steps_of_the_teacher_land():
    world = GaussianMixture.isotropic(torch.tensor([[-0.5, 0.0], [0.5, 0.2]]), 0.2)
    asked = {}

    class Student:
        def __call__(self, x, sigma, label=None):
            asked["x"], asked["sigma"] = x, sigma
            return torch.zeros_like(x)

    class Keep:
        def __call__(self, prediction, target):
            asked["target"] = target
            return (prediction - target).square().mean(1)

    objective = ProgressiveDistillation(steps=4, last=4, distance=Keep(), weight="uniform")
    batch = Batch(world.sample(64, generator=seeded(0)).x)
    objective(Models(Student(), None, world.denoiser), batch, clock=CLOCK, generator=seeded(1))
    grid = karras_sigmas(9, 0.002, 80.0, 7.0)
    i = (grid[None] - asked["sigma"][:, None]).abs().argmin(1)
    assert torch.equal(grid[i], asked["sigma"])
    assert set(i.tolist()) == {0, 2, 4, 6}
    x, target = asked["x"], asked["target"]
    landed = euler_step(lambda x, s, label=None: target, x, grid[i], grid[i + 2])
    middle = euler_step(world.denoiser, x, grid[i], grid[i + 1])
    twice = euler_step(world.denoiser, middle, grid[i + 1], grid[i + 2])
    assert torch.allclose(landed, twice, atol=1e-12)


def test_a_perfect_student_of_every_round_walks_as_the_first_teacher():
    """What one step should say is known in closed form: the fixed point has loss 0."""
    steps, grid = 2, karras_sigmas(5, 0.002, 80.0, 7.0)

    def perfect(x, sigma, label=None):
        i = (grid[None] - sigma[:, None]).abs().argmin(1)
        middle = euler_step(WORLD.denoiser, x, grid[i], grid[i + 1])
        end = euler_step(WORLD.denoiser, middle, grid[i + 1], grid[i + 2])
        share = (sigma / (grid[i + 2] - sigma))[:, None]
        return x - share * (end - x)

    objective = ProgressiveDistillation(steps=steps, last=steps)
    batch = WORLD.sample(100, generator=seeded(0))
    models = Models(perfect, None, WORLD.denoiser)
    assert float(objective(models, batch, clock=CLOCK, generator=seeded(1)).value) < 1e-24


def test_a_progressive_loss_is_weighed_at_the_level_where_the_step_begins():
    """By default with the paper's max(1/σ², 1): at a student that says 0, of known targets."""
    asked = {}

    class Keep:
        def __call__(self, prediction, target):
            asked["target"] = target
            return target.square().mean(1)

    objective = ProgressiveDistillation(steps=8, last=8, distance=Keep())
    models = Models(lambda x, sigma, label=None: torch.zeros_like(x), None, WORLD.denoiser)
    batch = WORLD.sample(64, generator=seeded(0))
    loss = objective(models, batch, clock=CLOCK, generator=seeded(1))
    weight = (1 / loss.sigma**2).clamp(min=1)
    assert len(weight.unique()) > 2
    assert torch.allclose(loss.per_sample, weight * asked["target"].square().mean(1))


def test_rounds_halve_the_steps():
    rounds = ProgressiveDistillation(steps=16, last=2).rounds
    assert [r.steps for r in rounds] == [16, 8, 4, 2]
    assert all(r.last == r.steps and len(r.rounds) == 1 for r in rounds)


@pytest.mark.parametrize(("steps", "last"), [(6, 4), (1, 2), (12, 1), (8, 0), (8, 3)])
def test_steps_that_do_not_halve_down_are_refused(steps, last):
    with pytest.raises(ValueError, match="steps must be last times a power of 2"):
        ProgressiveDistillation(steps=steps, last=last)


def test_a_weight_that_needs_a_gap_is_refused():
    with pytest.raises(ValueError, match="weight must be one of"):
        ProgressiveDistillation(weight="inverse_gap")


def test_progressive_students_keep_the_dress_of_a_diffusion_model():
    """D(x, 0) = x needs EDM's scalings; the boundary of a consistency model would be in the way."""
    model = Preconditioned(MLP(width=16, depth=2).build((2,)), EDMScalings(RANGE))
    batch = Batch(torch.zeros(8, 2))
    loss = ProgressiveDistillation()(
        Models(model, None, frozen_view(model)), batch, clock=CLOCK, generator=seeded(0)
    )
    loss.value.backward()
    assert all(p.grad is not None for p in model.parameters())
