"""What the official PyTorch code computed with networks, and what ours compute with the same.

Every number comes from a whole network with the official weights, read through its door, and from
the public interface on recorded draws: outputs, gradients, losses, whole training steps, samples.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from conftest import GOLDEN
from einops import rearrange
from safetensors.torch import load_file
from torch import nn

from cmbook.distances import L1, L2
from cmbook.interop import openai
from cmbook.losses import EDM, ConsistencyDistillation, ConsistencyTraining, ProgressiveDistillation
from cmbook.networks.blocks import Attention, Double, GroupNorm, Halve, Sinusoids, geometric
from cmbook.noise import LogNormal, NoiseRange, Replay
from cmbook.parameterization import ConsistencyScalings, EDMScalings
from cmbook.protocols import Batch, Clock, Models, Objective
from cmbook.samplers import (
    Churn,
    ancestral,
    dpm,
    grid_to_zero,
    multistep,
    ode_sample,
    one_step,
    progressive,
)
from cmbook.schedules import AdaptiveLevels, FixedLevels
from cmbook.training import RAdam, State, frozen_copy, train

pytestmark = pytest.mark.parity
RANGE = NoiseRange()
SCALINGS = {"consistency": ConsistencyScalings(), "diffusion": EDMScalings()}
NORMS = {"l1": L1(), "l2": L2(), "l2-32": L2(resize=32)}
WEIGHTS = {
    "uniform": "uniform",
    "snr": "snr",
    "snr+1": "snr_plus_one",
    "karras": "karras",
    "truncated-snr": "truncated_snr",
}
SETTINGS = {
    "unet_B": {"head_channels": 32},
    "unet_C": {"head_channels": 16, "image_size": 16},  # its heads are counted, see below
}


def read(name, scalings="consistency"):
    """A stored network with the official weights: a model, and what its network was built from."""
    model, network = once(name, scalings)
    return deepcopy(model), network


@cache
def once(name, scalings):
    stored = load_file(GOLDEN / f"{name}_weights.safetensors")
    settings = SETTINGS.get(name, {"head_channels": 16})
    found = openai.read(stored, scalings=SCALINGS[scalings], **settings)
    if name == "unet_C":  # two heads on the way down, one on the way up, whatever the channels
        network = replace(found.network, head_channels=None, heads=2, heads_up=1)
        found = replace(found, network=network)
    return found.model().requires_grad_(True), found.network


def gradients(model, network):
    """Those of a model, by the official names."""
    held = deepcopy(model)
    with torch.no_grad():
        for copy, parameter in zip(held.parameters(), model.parameters(), strict=True):
            copy.copy_(parameter.grad)
    return openai.export(held, network)


def close(ours, stored, share=0.0, **tolerance):
    """Equal up to a share of the largest, or to `rtol` and `atol`."""
    tolerance = tolerance or {"rtol": 0, "atol": share * float(stored.abs().max())}
    torch.testing.assert_close(ours, stored, **tolerance)


# ── the network ──

ACTIVATIONS = {  # theirs -> ours
    "time_embedding": "conditioning.sinusoids",
    "emb": "conditioning",
    "after_input_block_0": "inlet",
    "after_input_block_1": "down.0",
    "after_input_block_2": "down.1",
    "after_middle": "middle.1",
}
UNHEARD = {"grad/time_embed.0.weight"}  # by network B


@pytest.mark.parametrize("name", ["unet_A", "unet_B", "unet_C"])
def test_every_stored_number_of_a_network_is_ours(golden, name):
    """Outputs, what stands between, and gradients of s = sum(out * linspace(-1, 1)).

    Network B adds what it is told before a normalization whose groups are single channels, which
    takes it away again: B hears nothing, and its gradient of the time embedding is rounding.
    """
    (model, network), stored, found = read(name), golden(name), {}
    for theirs, ours in ACTIVATIONS.items():
        model.net.get_submodule(ours).register_forward_hook(
            lambda module, given, out, theirs=theirs: found.update({theirs: out})
        )
    x = stored["x"].requires_grad_()
    found["out"] = model.net(x, stored["timesteps"] / 1000, stored.get("y"))
    (found["out"].flatten() @ torch.linspace(-1, 1, found["out"].numel())).backward()
    for key in ["out", *ACTIVATIONS]:
        close(found[key], stored[key], rtol=1e-4, atol=2e-5)
    ours = {f"grad/{k}": g for k, g in gradients(model, network).items()} | {"grad_x": x.grad}
    unheard = UNHEARD if name == "unet_B" else set()
    compared = [k for k in stored if k.startswith("grad") and k not in unheard]
    assert len(compared) == 5 - len(unheard)
    for key in compared:
        close(ours[key], stored[key], 2e-5)
    for key in unheard:
        assert max(float(g.abs().max()) for g in (ours[key], stored[key])) < 1e-6


def test_attention_computed_in_half_precision_is_within_its_rounding(golden):
    """Of the official branches two agree to the bit, and one computes attention in float16."""
    stored, (model, _) = golden("unet_A_attention_variants"), read("unet_A")
    out = model.net(stored["x"], stored["timesteps"] / 1000, stored["y"])
    close(out, stored["out_flash"], rtol=1e-4, atol=2e-5)
    close(out, stored["out_new_attention_order"], rtol=1e-4, atol=2e-5)
    close(out, stored["out_legacy_half"], rtol=0, atol=1e-3)


LAYOUTS = {
    "out_three_h_d": "(three h d)",
    "out_flash": "(three h d)",
    "out_guided_new_three_h_d": "(three h d)",
    "out_guided_legacy_h_three_d": "(h three d)",
    "out_edm_h_d_three": "(h d three)",
}


@pytest.mark.parametrize("key", [*LAYOUTS, "out_cm_legacy_half"])
def test_attention_agrees_in_every_layout_once_the_channels_are_ours(golden, key):
    stored, layout = golden("attention_layouts"), LAYOUTS.get(key, "(three h d)")
    ours = rearrange(stored["qkv"], f"b {layout} t -> b (three h d) t", three=3, h=3)
    attention = Attention(96, 3, lambda channels: nn.Identity())
    attention.qkv, attention.out = nn.Identity(), nn.Identity()
    # What it reads are not its own channels, so it is shown them, and the x that it adds, apart.
    attention.qkv.forward = lambda x: rearrange(ours, "b c (y x) -> b c y x", x=5)
    out = attention(torch.zeros(2, 96, 5, 5)).flatten(2)
    half = key == "out_cm_legacy_half"
    close(out, stored[key], rtol=1e-5, atol=2e-3 if half else 1e-6)


def test_the_bricks_equal_the_official_ones(golden):
    """Odd widths and other periods of the time embedding, no network of ours has."""
    stored = golden("ops")
    told = Sinusoids(geometric(32), scale=1000.0)(stored["t"] / 1000)
    close(told, stored["emb_even"], rtol=0, atol=2e-4)
    norm = GroupNorm(32, "all")
    norm.load_state_dict({"weight": stored["gn_weight"], "bias": stored["gn_bias"]})
    close(norm(stored["x"]), stored["gn_out"], rtol=1e-4, atol=1e-5)
    close(Double()(stored["x"]), stored["up"], rtol=0, atol=0)
    close(Halve()(stored["x"]), stored["down"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_network_denoises_as_the_official_one(golden, kind):
    stored, (model, _) = golden("denoise"), read("unet_A", kind)
    asked = stored["x_t"], stored["sigmas"], stored["y"]
    close(model.raw(*asked), stored[f"{kind}_model_output"], rtol=1e-4, atol=2e-5)
    close(model(*asked), stored[f"{kind}_denoised"], rtol=1e-4, atol=2e-5)


# ── losses ──


def trained(objective, stored, draws, kind):
    """A loss on recorded draws, and its gradients: (loss, by name, norm of all)."""
    student, network = read("loss_student", kind)
    target, teacher = read("loss_target")[0], read("loss_teacher", "diffusion")[0]
    loss = objective(
        Models(student, target.requires_grad_(False), teacher.requires_grad_(False)),
        Batch(stored["x_start"], stored["y"]),
        clock=Clock(0, 1),
        generator=draws,
    )
    loss.value.backward()
    assert not any(draws.queues.values())  # everything that was recorded was drawn
    grads = gradients(student, network)
    return loss, grads, torch.stack([g.norm() for g in grads.values()]).norm()


def assert_loss_equals(found, stored, case, share):
    """Values and norms up to a share of each, gradients up to a share of the largest."""
    loss, grads, norm = found
    prefix = f"{case}/" if case else ""
    close(loss.per_sample, stored[f"{prefix}loss"], rtol=share, atol=0)
    close(loss.value.double(), stored[f"{prefix}mean_loss"], rtol=share, atol=0)
    close(norm.double(), stored[f"{prefix}grad_norm"], rtol=share, atol=0)
    kept = [k for k in stored if k.startswith(f"{prefix}grad/")]
    for key in kept:
        close(grads[key.removeprefix(f"{prefix}grad/")], stored[key], share)
    return len(kept)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["cd", "ct"])
def test_consistency_losses_and_their_gradients_are_the_official_ones(golden, method, norm, weight):
    """Ten times closer than stated. What remains is their grid, which is float32, and ours not."""
    stored, settings = golden(f"loss_{method}"), (NORMS[norm], WEIGHTS[weight])
    objective = (
        ConsistencyDistillation(RANGE, 18, "heun", *settings)
        if method == "cd"
        else ConsistencyTraining(RANGE, FixedLevels(18), *settings)
    )
    draws = Replay(normals=[stored["noise"]], integers=[stored["indices"]])
    found = trained(objective, stored, draws, "consistency")
    assert_loss_equals(found, stored, f"{norm}/{weight}", 1e-4)
    if (norm, weight) == ("l2", "uniform"):  # the one whose gradients are recorded
        assert assert_loss_equals(found, stored, "", 1e-4) == 5


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_loss_of_a_diffusion_model_and_its_gradients_are_the_official_ones(golden, weight):
    """Noise levels are recorded; the draws that make them are ln σ, standardized."""
    stored, law = golden("loss_edm"), LogNormal()
    drawn = (stored["sigmas"].double().log() - law.mean) / law.std
    draws = Replay(normals=[drawn.float(), stored["noise"]])
    found = trained(EDM(RANGE, law, weight=WEIGHTS[weight]), stored, draws, "diffusion")
    close(found[0].sigma, stored["sigmas"], rtol=1e-6, atol=0)
    assert assert_loss_equals(found, stored, weight, 1e-5) == (5 if weight == "karras" else 0)


@pytest.mark.parametrize("weight", ["uniform", "truncated-snr"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_loss_of_progressive_distillation_is_the_official_one(golden, norm, weight):
    """Called directly: the official trainer cannot call it. Its N counts intervals, as ours."""
    stored = golden("loss_progdist")
    objective = ProgressiveDistillation(RANGE, 18, 18, NORMS[norm], WEIGHTS[weight])
    draws = Replay(normals=[stored["noise"]], integers=[stored["indices"]])
    found = trained(objective, stored, draws, "diffusion")
    assert_loss_equals(found, stored, f"{norm}/{weight}", 1e-4)


# ── nine steps of training ──


@dataclass
class Recorded:
    """An objective whose draws at step k are the recorded ones, on the schedule of 8 steps.

    The official run takes one step more than its schedule is long.
    """

    objective: Objective
    stored: dict[str, torch.Tensor]

    def target_decay(self, clock):
        return self.objective.target_decay(Clock(clock.step, 8))

    def __call__(self, models, batch, *, clock, generator):
        noise, indices = (self.stored[name][clock.step] for name in ("noise", "indices"))
        draws = Replay(normals=[noise], integers=[indices])
        return self.objective(models, batch, clock=Clock(clock.step, 8), generator=draws)


def assert_moved_alike(ours, stored, start, steps):
    """What changed is compared: to 1e-4 of the largest change, and a last bit for every step.

    A weight is a thousand times its change, so the last bit is what decides.
    """
    change = float((stored - start).abs().max())
    bit = torch.finfo(torch.float32).eps * float(start.abs().max())
    close(ours - start, stored - start, rtol=0, atol=1e-4 * change + steps * bit)


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("cd", ConsistencyDistillation(RANGE, 18, "heun", decay=0.95)),
        ("ct", ConsistencyTraining(RANGE, AdaptiveLevels(2, 20, 0.95, "code"))),
    ],
)
def test_nine_steps_of_training_are_the_official_ones(golden, method, objective):
    """Losses, student and target on the way, and both averages at the end.

    RAdam changes its rule after step 5. μ(k) of the curriculum divides by N(k) - 1 there.
    """
    stored = golden(f"train_{method}")
    (student, network), (target, _) = read("loss_student"), read("loss_target")
    teacher, _ = read("loss_teacher", "diffusion")
    models = {"student": student, "target": target.requires_grad_(False)}
    start = {who: openai.export(model, network) for who, model in models.items()}
    optimizer = RAdam(lr=0.02).build(student)
    average, further = (frozen_copy(student).eval() for _ in range(2))
    state = State(student, optimizer, average, target, averages={0.99: further})
    training = train(
        student,
        (Batch(x, y) for x, y in zip(stored["x"], stored["y"], strict=True)),
        Recorded(objective, stored),
        steps=9,
        optimizer=optimizer,
        teacher=teacher,
        average_decay=0.9,
        also_average=(0.99,),
        state=state,
    )
    seen = 0
    for step in training:
        k = step.clock.step
        close(step.loss.per_sample, stored["losses"][k], rtol=1e-4, atol=0)
        decay = objective.target_decay(Clock(k, 8))
        assert decay == pytest.approx(float(stored["target_ema"][k]), rel=1e-12)
        norms = [nn.utils.get_total_norm(list(m.parameters())).double() for m in models.values()]
        close(torch.stack(norms), stored["param_norms_student_target"][k], rtol=1e-6, atol=0)
        for key in (key for key in stored if key.startswith(f"step{k + 1}/")):
            _, who, name = key.split("/")
            ours = openai.export(models[who], network)[name]
            assert_moved_alike(ours, stored[key], start[who][name], k + 1)
            seen += 1
    for key in (key for key in stored if key.startswith("final/")):
        _, decay, name = key.split("/")
        ours = openai.export({"ema_0.9": average, "ema_0.99": further}[decay], network)[name]
        assert_moved_alike(ours, stored[key], start["student"][name], 9)
        seen += 1
    assert seen == 4 * 2 * 4 + 2 * 4


def test_the_curriculum_of_the_nine_steps_is_the_official_one(golden):
    stored, curriculum = golden("train_ct"), AdaptiveLevels(2, 20, 0.95, "code")
    levels = [curriculum.levels_at(Clock(k, 8)) for k in range(9)]
    assert levels == stored["num_scales"].tolist() == stored["scales_from_schedule"].tolist()


# ── samples ──


def clipped(model):
    """A denoiser of images in [-1, 1]: samplers of ours take one where the official ones clip."""
    return lambda x, sigma, label=None: model(x, sigma, label).clamp(-1, 1)


def sampled(name, model, x, label, noise):
    """A sample of the sampler that the official code calls `name`."""
    sigmas, grid = grid_to_zero(RANGE, 7), RANGE.grid(7)
    if name == "heun":
        churn = Churn(2.0, 0.05, 50.0, 1.003)
        inside = [z for z, s in zip(noise, grid, strict=True) if 0.05 <= s <= 50]
        return churn(model, x, sigmas, label, generator=Replay(normals=inside))
    if name == "dpm":
        return dpm(model, x, sigmas, label)
    if name == "ancestral":
        return ancestral(model, x, sigmas, label, generator=Replay(normals=list(noise)))
    if name == "euler":
        return ode_sample(model, x, RANGE, label, levels=7, solver="euler")
    if name == "onestep":
        return one_step(model, x, RANGE, label)
    if name == "multistep":  # --ts 0,3,6
        draws = Replay(normals=list(noise))
        return multistep(model, x, grid[[0, 3]], label, noise_range=RANGE, generator=draws)
    return progressive(model, x, RANGE, label, steps=7)


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize(
    "name", ["heun", "dpm", "ancestral", "euler", "onestep", "multistep", "progdist"]
)
def test_samples_of_networks_are_the_official_ones(golden, name, clips):
    """Ten times closer than stated. The last images are clipped in both; noise[0] is the start.

    They draw noise at every level; ours draw where it is used.
    """
    stored, case = golden("karras_sample"), name if clips else f"{name}_noclip"
    jumps = name in ("onestep", "multistep")
    model, _ = read("loss_student") if jumps else read("loss_teacher", "diffusion")
    noise = stored[f"{case}/noise"]
    denoiser = clipped(model) if clips else model
    out = sampled(name, denoiser, RANGE.sigma_max * noise[0], stored["y"], noise[1:])
    atol = 5e-6 if jumps else 5e-5
    close(out.clamp(-1, 1), stored[f"{case}/out"], rtol=0, atol=atol)
