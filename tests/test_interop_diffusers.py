"""diffusers: its consistency models in, ours out, and its other models as teachers."""

import json
import math
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from torch import nn

import cmbook
from cmbook.conventions import Diffusers
from cmbook.interop import convert, diffusers, openai
from cmbook.interop.diffusers import FlowScalings, StepScalings, teacher
from cmbook.noise import NoiseRange, Replay, normal, seeded
from cmbook.ode import solve
from cmbook.oracle import Gaussian, GaussianMixture
from cmbook.parameterization import ConsistencyScalings, EDMScalings
from cmbook.samplers import multistep

PIPELINE = GOLDEN / "diffusers_pipeline"
RUNS = {"run0": [0], "run1": [20, 0], "run2": [22, 0], "run3": [36, 20, 9, 0]}
LABELS = torch.tensor([1, 3])


@pytest.fixture(scope="module")
def theirs(torchvision):
    """The library itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        return pytest.importorskip("diffusers")


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(PIPELINE, tmp_path / "theirs"))


@pytest.fixture(scope="module")
def read():
    return diffusers.read(PIPELINE)


def test_the_network_of_a_folder_equals_theirs(golden, read):
    stored = golden("diffusers_pipeline_out")
    out = read.model().net(stored["unet_x"], stored["unet_timesteps"] / 1000, stored["unet_y"])
    torch.testing.assert_close(out, stored["unet_out"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("run", RUNS)
def test_the_images_of_a_folder_equal_those_of_the_pipeline(golden, read, run):
    stored = golden("diffusers_pipeline_out")
    noise_range = NoiseRange()
    if len(RUNS[run]) == 1:
        levels, draws = noise_range.grid(40)[:1], []
    else:
        levels = noise_range.grid(40)[sorted(40 - 40 + i for i in RUNS[run])]
        draws = list(stored[f"{run}/noise"])[: len(levels) - 1]
    x = 80 * stored[f"{run}/latents"]
    recorded = Replay(normals=draws)

    def clipped(x, sigma, label=None):
        return model(x, sigma, label).clamp(-1, 1)

    model = read.model()
    out = multistep(clipped, x, levels, LABELS, noise_range=noise_range, generator=recorded)
    images = ((out + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(images, stored[f"{run}/images"], rtol=1e-4, atol=2e-5)


def test_a_folder_tells_what_it_is_without_flags(read):
    assert (read.shape, read.classes) == ((3, 16, 16), 10)
    assert read.scalings == ConsistencyScalings()
    official = openai.read(_weights(), scalings=ConsistencyScalings(), head_channels=16)
    assert read.network == official.network
    assert all(torch.equal(read.weights[name], official.weights[name]) for name in read.weights)


def test_there_and_back_is_exact(read):
    there = diffusers.export(read.model(), read.network)
    stored = load_file(PIPELINE / "unet/diffusion_pytorch_model.safetensors")
    assert there.keys() == stored.keys()
    assert all(torch.equal(there[name], stored[name].float()) for name in stored)


@pytest.mark.parametrize("family", ["imagenet64", "lsun256"])
def test_the_full_size_networks_have_their_names_and_shapes(family):
    stored = json.loads((GOLDEN / f"diffusers_keys_{family}.json").read_text())
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in stored["keys"].items()}
        network, shape, classes = diffusers._network(stored["unet_config"], None, family)
        net = network.build(shape, classes)
    names = {piece for name in net.state_dict() for piece in diffusers._theirs(name, network)}
    assert names == state.keys()
    ours = diffusers.config_of(network, shape, classes)
    told = {k: v for k, v in stored["unet_config"].items() if k in ours}
    assert {k: ours[k] for k in told} | {"attn_norm_num_groups": None} == told | {
        "attn_norm_num_groups": None
    }


def test_ours_go_out_and_the_same_noise_gives_the_same_image(theirs, read, tmp_path):
    folder = diffusers.save(read.model(), read.network, tmp_path / "ours")
    opened = theirs.ConsistencyModelPipeline.from_pretrained(folder)
    opened.set_progress_bar_config(disable=True)
    noise = [normal(torch.empty(2, 3, 16, 16), seeded(i)) for i in range(3)]
    draws = iter(noise[1:])
    theirs.schedulers.scheduling_consistency_models.randn_tensor, real = (
        lambda *_, **__: next(draws),
        theirs.schedulers.scheduling_consistency_models.randn_tensor,
    )
    try:
        images = opened(
            batch_size=2, class_labels=LABELS, num_inference_steps=None, timesteps=[22, 0],
            latents=noise[0].clone(), output_type="np",
        ).images  # fmt: skip
    finally:
        theirs.schedulers.scheduling_consistency_models.randn_tensor = real

    def clipped(x, sigma, label=None):
        return model(x, sigma, label).clamp(-1, 1)

    model, noise_range = read.model(), NoiseRange()
    levels = Diffusers(noise_range=noise_range).sigmas([22, 0])
    recorded = Replay(normals=noise[1:2])
    out = multistep(
        clipped, 80 * noise[0], levels, LABELS, noise_range=noise_range, generator=recorded
    )
    ours = ((out + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, torch.from_numpy(images), rtol=1e-4, atol=2e-5)


def test_an_object_is_read_as_its_folder_is(theirs, read):
    made = diffusers.pipeline(read.model(), read.network)
    again = diffusers.read(made)
    assert (again.network, again.scalings) == (read.network, read.scalings)
    bare = diffusers.read(made.unet, scalings=EDMScalings())
    assert bare.scalings == EDMScalings()
    with pytest.raises(ValueError, match="is a bare U-Net; say scalings"):
        diffusers.read(made.unet)


def test_their_network_says_what_ours_says(theirs, read):
    for sizes in ((3, 16, 16), (3, 8, 8)):
        network = cmbook.UNet(
            32, (1, 2), 1, (8,), head_channels=16, middle=True, resample="conv", told="add",
            time_scale=1000.0, groups="all",
        )  # fmt: skip
        model = convert_random(network, sizes)
        unet = diffusers.pipeline(model, network).unet
        x = normal(torch.empty(2, *sizes), seeded(0))
        c_noise = torch.tensor([-1.0, 0.9])
        out = unet(x, 1000 * c_noise, return_dict=False)[0]
        torch.testing.assert_close(model.net(x, c_noise), out, rtol=1e-4, atol=2e-5)


def convert_random(network, shape):
    net = network.build(shape)
    with torch.no_grad():
        for i, weight in enumerate(net.parameters()):
            weight.copy_(0.1 * normal(weight, seeded("weights", i)))
    return cmbook.Preconditioned(net, ConsistencyScalings()).eval().requires_grad_(False)


def _weights():
    stored = load_file(GOLDEN / "unet_A_weights.safetensors")
    return {name: weight.float() for name, weight in stored.items()}


def test_a_folder_converts_on_the_command_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert.convert(str(folder), Path("ours"))
    assert cmbook.load("ours").sample(2, LABELS, steps=2, generator=seeded(0)).shape[0] == 2


# ── teachers of other kinds, on worlds with exact answers ──

WORLDS = {
    "gaussian": Gaussian(
        torch.tensor([0.3, -0.2], dtype=torch.float64),
        torch.tensor([[0.25, 0.1], [0.1, 0.09]], dtype=torch.float64),
    ),
    "mixture": GaussianMixture.isotropic(
        torch.tensor([[-0.5, 0.1], [0.4, 0.6], [0.9, -0.4]], dtype=torch.float64), 0.15
    ),
}


class Exact(nn.Module):
    """What a perfect network of diffusers would say of a world."""

    def __init__(self, world, kind, sigma_of):
        super().__init__()
        self.world, self.kind, self.sigma_of = world, kind, sigma_of
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        sigma = self.sigma_of(timestep)
        s = sigma[:, None]
        x = sample * ((1 + s) if self.kind == "flow" else (1 + s**2).sqrt())
        clean = self.world.denoiser(x, sigma)
        noise = (x - clean) / s
        root = (1 + s**2).sqrt()
        said = {
            "epsilon": noise,
            "v_prediction": (noise - s * clean) / root,  # α ε - σ_vp x0
            "sample": clean,
            "flow": noise - clean,
        }
        return (said[self.kind],)


def levels_of(scheduler):
    signal = scheduler.alphas_cumprod.double()
    return ((1 - signal) / signal).sqrt()


def between(levels):
    """σ of a fractional time step: straight in ln σ."""

    def sigma_of(t):
        low = t.double().floor().clamp(0, len(levels) - 2).long()
        logs = levels.log()
        return (logs[low] + (t - low) * (logs[low + 1] - logs[low])).exp()

    return sigma_of


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_ddpm_network_becomes_the_exact_denoiser(theirs, kind, world):
    scheduler = theirs.DDPMScheduler(prediction_type=kind)
    levels = levels_of(scheduler)
    denoise = teacher(Exact(WORLDS[world], kind, between(levels)), scheduler)
    sigma = torch.cat([levels[::37], torch.logspace(-1.9, 2.1, 60, dtype=torch.float64)])
    x = normal(torch.empty(len(sigma), 2, dtype=torch.float64), seeded(0)) * sigma[:, None]
    exact = WORLDS[world].denoiser(x, sigma)
    torch.testing.assert_close(denoise(x, sigma), exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("world", WORLDS)
def test_a_perfect_flow_becomes_the_exact_denoiser(theirs, world):
    scheduler = theirs.FlowMatchEulerDiscreteScheduler()

    def sigma_of(t):
        return (t / 1000) / (1 - t / 1000)

    denoise = teacher(Exact(WORLDS[world], "flow", sigma_of), scheduler)
    sigma = torch.logspace(-2.5, 1.9, 80, dtype=torch.float64)
    x = normal(torch.empty(80, 2, dtype=torch.float64), seeded(0)) * sigma[:, None]
    exact = WORLDS[world].denoiser(x, sigma)
    torch.testing.assert_close(denoise(x, sigma), exact, rtol=1e-8, atol=1e-8)


def test_a_walk_by_such_a_teacher_ends_where_the_exact_path_ends(theirs):
    scheduler = theirs.DDPMScheduler(prediction_type="v_prediction")
    world, levels = WORLDS["gaussian"], levels_of(scheduler)
    denoise = teacher(Exact(world, "v_prediction", between(levels)), scheduler)
    noise_range = denoise.scalings.noise_range
    x = normal(torch.empty(50, 2, dtype=torch.float64), seeded(0)) * noise_range.sigma_max
    walked = solve(denoise, x, noise_range.grid(200))
    start = torch.full((50,), noise_range.sigma_max, dtype=torch.float64)
    torch.testing.assert_close(walked, world.consistency(x, start), rtol=0, atol=2e-2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("step", [0, 17, 500, 999])
def test_the_clean_sample_equals_the_schedulers_own(theirs, kind, step):
    scheduler = theirs.DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    sigma = levels_of(scheduler)[step]
    said = normal(torch.empty(2, 3, 4, 4, dtype=torch.float64), seeded(1))

    class Says(nn.Module):
        def forward(self, sample, timestep, return_dict=True):
            assert torch.allclose(timestep, torch.full((2,), float(step), dtype=torch.float64))
            return (said,)

    x = normal(said, seeded(2)) * (1 + sigma**2).sqrt()
    ours = teacher(Says(), scheduler)(x, sigma.expand(2))
    stepped = scheduler.step(said, step, x / (1 + sigma**2).sqrt())
    torch.testing.assert_close(ours, stepped.pred_original_sample.double(), rtol=1e-5, atol=1e-5)


def test_outside_the_trained_levels_the_nearest_step_is_told(theirs):
    levels = (0.01, 0.1, 1.0, 10.0)
    scalings = StepScalings(NoiseRange(sigma_min=0.01, sigma_max=10.0), "epsilon", levels)
    sigma = torch.tensor([0.0, 0.001, 0.01, 10**-0.5, 10.0, 500.0], dtype=torch.float64)
    expected = torch.tensor([0, 0, 0, 1.5, 3, 3], dtype=torch.float64)
    torch.testing.assert_close(scalings.c_noise(sigma), expected)
    torch.testing.assert_close(scalings.c_in(sigma), 1 / (1 + sigma**2).sqrt())


def test_a_last_level_without_signal_is_left_out(theirs):
    scheduler = theirs.DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, beta_schedule="scaled_linear"
    )
    denoise = teacher(nn.Linear(1, 1), scheduler)
    assert math.isfinite(denoise.scalings.noise_range.sigma_max)


def test_flow_has_no_outside():
    t = FlowScalings().c_noise(torch.tensor([0.0, 1.0, 1e6], dtype=torch.float64))
    torch.testing.assert_close(t, torch.tensor([0.0, 500.0, 999.999], dtype=torch.float64))


def test_a_scheduler_of_another_kind_is_refused(theirs):
    with pytest.raises(ValueError, match="neither of DDPM"):
        teacher(nn.Linear(1, 1), theirs.CMStochasticIterativeScheduler())


# ── what is no model, or a hostile one ──


def changed(folder, **settings):
    file = folder / "unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"act_fn": "gelu"}, "does not compute: act_fn = 'gelu'"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos = False"),
        ({"attn_norm_num_groups": None}, "attention without normalization"),
        ({"downsample_type": "conv"}, "resampling by conv, resnet"),
        ({"up_block_types": ["ResnetUpsampleBlock2D"] * 2}, "attention at other sides"),
        ({"block_out_channels": [32, 64, 64]}, "does not fit|odd"),
        ({"block_out_channels": 3}, "odd"),
        ({"layers_per_block": 2}, "is missing, expected"),
        ({"sample_size": None}, "say image_size"),
        ({"_class_name": "UNet2DConditionModel"}, "only UNet2DModel can be read"),
        ({"attention_head_dim": 7}, "cannot be cut into heads"),
    ],
)
def test_settings_that_lie_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        diffusers.load(changed(folder, **settings))


def test_files_that_are_damaged_or_missing_are_refused(folder):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        diffusers.load(folder)
    weights.write_bytes(whole)
    (folder / "scheduler/scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        diffusers.load(folder)
    (folder / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(ValueError, match="is missing"):
        diffusers.load(folder)
    with pytest.raises(ValueError, match="is missing: is this a folder of diffusers"):
        diffusers.load(folder / "nowhere")


def test_another_scheduler_is_no_consistency_model(folder):
    (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    with pytest.raises(ValueError, match="so it is no consistency model"):
        diffusers.load(folder)


class Hostile:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_weights_that_would_run_code_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": Hostile()}, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="run code"):
        diffusers.load(folder)
    assert not Path("ran").exists()


def test_bin_weights_are_read(folder, read):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    again = diffusers.read(folder)
    assert all(torch.equal(again.weights[name], read.weights[name]) for name in read.weights)


def test_a_network_that_diffusers_cannot_hold_is_refused(read):
    network = cmbook.UNet()
    model = cmbook.Preconditioned(network.build((3, 16, 16)), ConsistencyScalings())
    with pytest.raises(ValueError, match="knows no"):
        diffusers.export(model, network)


def test_a_missing_package_is_said(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'cmbook\[diffusers\]'"):
        diffusers.pipeline(read.model(), read.network)


def test_a_folder_of_another_kind_says_so(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is missing: is this a folder"):
        diffusers.load(tmp_path)
