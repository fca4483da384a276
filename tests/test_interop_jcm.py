"""The official CIFAR-10 code: its files, networks, losses and samplers, number by number."""

import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from cmbook.distances import L1, L2, LInf, Norm
from cmbook.interop import jcm
from cmbook.losses import (
    EDM,
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousDistillation,
    ContinuousTraining,
    ProgressiveDistillation,
    tangent,
)
from cmbook.losses.regression import neighbors, regress
from cmbook.networks import NCSNpp
from cmbook.noise import NoiseRange, Replay, add_noise, normal, seeded
from cmbook.ode import heun_step, solve, velocity
from cmbook.parameterization import ConsistencyScalings, EDMScalings, Preconditioned
from cmbook.protocols import Batch, Clock, Models
from cmbook.samplers import ode_sample, one_step, prior
from cmbook.schedules import FixedLevels

pytestmark = pytest.mark.parity
RANGE = NoiseRange()
PIXELS = 3 * 16 * 16
DISTANCES = {"l1": L1(), "l2": L2(), "linf": LInf()}
WEIGHTS = {
    "uniform": "uniform",
    "snr": "snr",
    "snrp1": "snr_plus_one",
    "truncated_snr": "truncated_snr",
}


def arrays(name):
    """Weights in the official names and layout."""
    path = GOLDEN / f"jax_ncsnpp_{name}_weights.safetensors"
    return {k: w.float() for k, w in load_file(path).items()}


def read(name, scalings=ConsistencyScalings()):  # noqa: B008
    return jcm.read(arrays(name), scalings=scalings, image_size=16)


def model(name, scalings=ConsistencyScalings()):  # noqa: B008
    return read(name, scalings).model().requires_grad_(name == "student")


def teacher():
    return model("teacher", EDMScalings())


def nchw(images):
    return images.permute(0, 3, 1, 2).contiguous()


def assert_stored(ours, stored, rtol=1e-4, atol=2e-5):
    torch.testing.assert_close(ours, nchw(stored), rtol=rtol, atol=atol)


@pytest.fixture
def stored(request, golden):
    """Numbers of the official code."""
    return golden(f"jax_{request.param}")


def use(name):
    return pytest.mark.parametrize("stored", [name], indirect=True)


# ── the network, and what dresses it ──


@use("ncsnpp")
def test_the_network_says_what_the_official_one_says(stored):
    out = model("student").net(nchw(stored["x"]), stored["time_cond"])
    assert_stored(out, stored["out"])


def test_ddpmpp_says_what_the_official_one_says(golden):
    """No filter, no pyramid, and frequencies that are not drawn."""
    weights = load_file(GOLDEN / "jax_vp_weights.safetensors")
    read = jcm.read(weights, scalings=EDMScalings(), image_size=16)
    assert read.network == NCSNpp(
        8, (1, 2, 2), 2, (8,), embedding="positional", taps=(1, 1), pyramid=False
    )
    stored = golden("jax_vp")
    assert_stored(read.model().net(nchw(stored["x"]), stored["time_cond"]), stored["out"])


@use("wrappers")
@pytest.mark.parametrize(
    ("scalings", "name"),
    [
        (EDMScalings(), "denoiser"),
        (ConsistencyScalings(), "distiller"),
        (ConsistencyScalings(NoiseRange(sigma_min=0.05)), "distiller_pred_t_05"),
    ],
)
def test_the_dressed_network_equals_the_official_one(stored, scalings, name):
    """Below its sigma_min a consistency model of ours is the identity; theirs goes on."""
    above = stored["t"] >= scalings.noise_range.sigma_min
    out = model("student", scalings)(nchw(stored["x"]), stored["t"])
    assert_stored(out[above], stored[name][above], atol=5e-5)
    if not bool(above.all()):
        assert torch.equal(out[~above], nchw(stored["x"])[~above])


@use("wrappers")
def test_the_direction_of_the_path_is_the_official_score(stored):
    """dx/dσ = -σ · score, compared where numbers are of order 1."""
    x, sigma = nchw(stored["x"]), stored["t"]
    slope = velocity(x, model("student", EDMScalings())(x, sigma), sigma)
    square = stored["t"][:, None, None, None] ** 2
    sigma = sigma[:, None, None, None]
    torch.testing.assert_close(-slope * sigma, nchw(stored["score"] * square), rtol=1e-4, atol=5e-5)


# ── losses, on the official draws ──


def gradients(dressed):
    """By official name and in official layout."""
    with torch.no_grad():
        for parameter in dressed.net.parameters():
            parameter.copy_(parameter.grad)
        dressed.net.conditioning.sinusoids.frequencies.zero_()  # they do not learn
    return jcm.export(dressed, read("student").network)


def check_loss(
    objective, models, stored, case, *, uniforms=(), normals=(), factor=1.0, value=True, rtol=5e-5
):
    """Value, length of the gradient, and the gradients that were kept; theirs is ours x factor."""
    batch = Batch(nchw(stored["image"]))
    draws = Replay(
        normals=[*normals, nchw(stored["noise"])],
        uniforms=uniforms,
        integers=[stored["indices"].long()] if "indices" in stored else [],
    )
    loss = objective(models, batch, clock=Clock(0, 1), generator=draws)
    if value:
        theirs = float(stored[f"{case}loss"])
        assert factor * float(loss.value.detach()) == pytest.approx(theirs, rel=rtol)
    loss.value.backward()
    found = gradients(models.student)
    length = torch.stack([g.double().square().sum() for g in found.values()]).sum().sqrt()
    theirs = float(stored[f"{case}grad_norm"])
    assert factor * float(length) == pytest.approx(theirs, rel=rtol)
    for name in (n for n in stored if n.startswith(f"{case}grad/")):
        ours, theirs = factor * found[name.removeprefix(f"{case}grad/")], stored[name]
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


@use("loss_edm")
def test_denoising(stored):
    """Theirs is the sum over the pixels, ours the mean."""
    law = (stored["t"].log() - EDM().sigma_law.mean) / EDM().sigma_law.std
    student = model("student", EDMScalings())
    check_loss(EDM(), Models(student), stored, "", normals=[law], factor=PIXELS)


@use("loss_cd")
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_consistency_distillation(stored, distance, weight):
    objective = ConsistencyDistillation(distance=DISTANCES[distance], weight=WEIGHTS[weight])
    models = Models(model("student"), model("target"), teacher())
    check_loss(objective, models, stored, f"{distance}/{weight}/")


@use("loss_cd")
def test_consistency_distillation_by_euler(stored):
    models = Models(model("student"), model("target"), teacher())
    check_loss(ConsistencyDistillation(solver="euler"), models, stored, "euler/")


@use("loss_cd")
def test_consistency_distillation_through_its_own_target(stored):
    """No objective of ours lets the target learn; the bricks that they are made of would."""
    student, guide = model("student"), teacher()

    class Open:
        """An objective whose target is the student, gradient and all."""

        def __call__(self, models, batch, *, clock, generator):
            sigma, sigma_next = neighbors(RANGE.grid(18), batch.x, generator)
            x = add_noise(batch.x, normal(batch.x, generator), sigma)
            x_next = heun_step(guide, x, sigma, sigma_next)
            ends = student(x, sigma), student(x_next, sigma_next)
            return regress(*ends, sigma, L2(), torch.ones_like(sigma))

    check_loss(Open(), Models(student), stored, "nostopgrad_selftarget/")
    draws = Replay(normals=[nchw(stored["noise"])], integers=[stored["indices"].long()])
    student, batch = model("student"), Batch(nchw(stored["image"]))
    models = Models(student, student, guide)
    loss = ConsistencyDistillation()(models, batch, clock=Clock(0, 1), generator=draws)
    theirs = float(stored["nostopgrad_selftarget/loss"])
    assert float(loss.value.detach()) == pytest.approx(theirs, rel=5e-5)


@use("loss_ct")
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_consistency_training(stored, distance, weight):
    """Their Euler step with the clean image as denoiser is our line of noise."""
    objective = ConsistencyTraining(
        curriculum=FixedLevels(18), distance=DISTANCES[distance], weight=WEIGHTS[weight]
    )
    models = Models(model("student"), model("target"))
    check_loss(objective, models, stored, f"{distance}/{weight}/")


@use("loss_progdist")
@pytest.mark.parametrize("weight", ["snr", "snrp1", "truncated_snr"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_progressive_distillation(stored, distance, weight):
    objective = ProgressiveDistillation(
        steps=18, last=18, distance=DISTANCES[distance], weight=WEIGHTS[weight]
    )
    models = Models(model("student", EDMScalings()), teacher=model("target", EDMScalings()))
    check_loss(objective, models, stored, f"{distance}/{weight}/")


# ── losses in continuous time ──


def clean_image(stored):
    """The denoiser whose direction is the noise itself: how theirs trains without a teacher."""
    return lambda x, sigma, label=None: nchw(stored["image"]).to(x)


def uniforms_of(stored):
    """The uniform draws of their levels: the grid made continuous, backwards."""
    low, high = (end ** (1 / RANGE.rho) for end in (RANGE.sigma_min, RANGE.sigma_max))
    return [(stored["t"].double() ** (1 / RANGE.rho) - low) / (high - low)]


@use("loss_continuous")
@pytest.mark.parametrize("method", ["cd", "ct"])
def test_the_derivative_along_the_path(stored, method):
    """Theirs runs towards the data, so it is minus ours. Their frozen loss is -dF · F."""
    sigma, student = stored["t"], model("student").requires_grad_(False)
    x = add_noise(nchw(stored["image"]), nchw(stored["noise"]), sigma)
    assert_stored(x, stored[f"{method}/x_t"], atol=1e-6)
    guide = teacher() if method == "cd" else clean_image(stored)
    dx = velocity(x, guide(x, sigma), sigma)
    value, change = tangent(student, x, sigma, dx)
    assert_stored(value, stored[f"{method}/F"])
    assert_stored(-change, stored[f"{method}/dF"], atol=1e-4)
    frozen = (change * value).flatten(1).sum(1).mean()
    assert float(frozen) == pytest.approx(float(stored[f"{method}/l2_stopgrad/loss"]), rel=5e-5)


@use("loss_continuous")
@pytest.mark.parametrize("distance", ["l1", "l2", "linf"])
@pytest.mark.parametrize("method", ["cd", "ct"])
def test_continuous_losses_through_the_derivative(stored, method, distance):
    """Their `l2` is the norm. Training alone is distillation from the clean image."""
    objective = ContinuousDistillation(
        distance={"l1": L1(), "l2": Norm(), "linf": LInf()}[distance], frozen_target=False
    )
    guide = teacher() if method == "cd" else clean_image(stored)
    models = Models(model("student"), teacher=guide)
    case = f"{method}/{distance}/"
    check_loss(objective, models, stored, case, uniforms=uniforms_of(stored))


@use("loss_continuous")
@pytest.mark.parametrize("method", ["cd", "ct"])
def test_continuous_losses_with_a_frozen_target(stored, method):
    """Of the mean of squares, H is 2 / pixels; theirs is 1. The value is another on purpose."""
    objective = ContinuousDistillation() if method == "cd" else ContinuousTraining()
    student = model("student")
    check_loss(
        objective,
        Models(student, student, teacher() if method == "cd" else None),
        stored,
        f"{method}/l2_stopgrad/",
        uniforms=uniforms_of(stored),
        factor=PIXELS / 2,
        value=False,
    )


# ── samplers ──


@use("samplers")
@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_walks(stored, solver):
    x, denoise = nchw(stored["x_init"]), teacher()
    out = ode_sample(denoise, x, RANGE, levels=7, solver=solver)
    assert_stored(out, stored[f"{solver}/out"], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        out = solve(denoise, x, RANGE.grid(7), solver=solver)
    assert_stored(out, stored[f"{solver}_nodenoise/out"], rtol=1e-4, atol=1e-4)


@use("samplers")
def test_one_step(stored):
    out = one_step(model("student"), nchw(stored["onestep/x"]), RANGE)
    assert_stored(out, stored["onestep/out"], rtol=1e-4, atol=1e-4)


# ── files ──

NAMED = {  # the paths of all official files, and whose scalings they need
    "edm_cifar10_ema": EDMScalings(),
    **{
        f"{run}/checkpoints/checkpoint_{number}": ConsistencyScalings()
        for run, number in [
            *[("cd-l1", 80), ("cd-l2", 80), ("cd-lpips", 80), ("ct-lpips", 74)],
            *[(f"cifar10-continuous-cd-{d}", 40) for d in ("l2", "l2-stopgrad", "lpips-stopgrad")],
            *[("continuous-ct-l2", 80), ("continuous-ct-lpips", 40)],
        ]
    },
}


def packed(value):
    """MessagePack as flax writes it."""
    if isinstance(value, torch.Tensor):
        raw = value.contiguous().numpy().tobytes()
        inner = packed([list(value.shape), str(value.dtype).removeprefix("torch."), raw])
        return b"\xc9" + struct.pack(">Ib", len(inner), 1) + inner
    if isinstance(value, dict):
        pairs = b"".join(packed(k) + packed(v) for k, v in value.items())
        return b"\xde" + struct.pack(">H", len(value)) + pairs
    if isinstance(value, list):
        return b"\xdc" + struct.pack(">H", len(value)) + b"".join(map(packed, value))
    if isinstance(value, str):
        return b"\xd9" + struct.pack(">B", len(value)) + value.encode()
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    return bytes([value])  # 0 ... 127


def tree(flat):
    """Joined names to a tree of dictionaries."""
    found = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        inner = found
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
    return found


def state(**parts):
    """The state of a training, as the official code saves it."""
    student, average = tree(arrays("student")), tree(arrays("teacher"))
    moments = {"count": torch.tensor(3, dtype=torch.int32), "mu": student, "nu": student}
    return {
        "step": torch.tensor(800_000, dtype=torch.int32),
        "lr": 4e-4,
        "ema_rate": torch.tensor(0.9999),
        "params": student,
        "params_ema": average,
        "model_state": {},
        "opt_state": {"0": moments, "1": {}},
        "rng_state": {"0": torch.zeros(2, dtype=torch.uint32), "1": {}},
    } | parts


def written(folder, content, name="cd-lpips/checkpoints/checkpoint_80"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else packed(content))
    return path


@pytest.mark.parametrize("name", NAMED)
def test_an_official_file_needs_no_flags(tmp_path, name):
    extra = {"target_params": tree(arrays("target"))} if name.startswith("ct") else {}
    loaded = jcm.load(written(tmp_path, state(**extra), name))
    assert loaded.scalings == NAMED[name]
    assert not loaded.training
    x = prior(torch.empty(1, 3, 32, 32), RANGE, seeded(0))
    other = jcm.load(arrays("teacher"), scalings=NAMED[name])
    assert torch.equal(one_step(loaded, x, RANGE), one_step(other, x, RANGE))


def test_the_network_in_training_can_be_taken_instead_of_its_average(tmp_path):
    read = jcm.read(written(tmp_path, state()), average=False)
    student = jcm.read(arrays("student"), scalings=ConsistencyScalings())
    assert all(torch.equal(w, student.weights[n]) for n, w in read.weights.items())


def test_a_file_of_one_bare_network_is_read(tmp_path):
    read = jcm.read(written(tmp_path, tree(arrays("teacher")), "edm_cifar10_ema"))
    assert read.scalings == EDMScalings()
    assert read.origin.endswith("edm_cifar10_ema")


def test_an_array_in_pieces_is_joined(tmp_path):
    flat = arrays("teacher")
    whole = flat["Conv_0/kernel"]
    pieces = dict(zip("012", whole.flatten().split(80), strict=True))
    shape = {str(i): n for i, n in enumerate(whole.shape)}
    flat["Conv_0/kernel"] = {"__msgpack_chunked_array__": 1, "shape": shape, "chunks": pieces}
    read = jcm.read(written(tmp_path, state(params_ema=tree(flat))))
    assert torch.equal(read.weights["inlet.weight"], whole.permute(3, 2, 0, 1))


@pytest.mark.parametrize(
    ("name", "network", "parameters"),
    [
        ("ve", NCSNpp(), 56_395_523),
        ("ve_deep", NCSNpp(blocks=8), 97_610_499),
        ("vp", NCSNpp(embedding="positional", taps=(1, 1), pyramid=False), 55_732_739),
    ],
)
def test_the_full_size_networks_have_the_official_names_and_shapes(name, network, parameters):
    keys = json.loads((GOLDEN / "keys_cifar10.json").read_text())[name]
    empty = {k: torch.empty(shape, device="meta") for k, shape in keys.items()}
    read = jcm.read(empty, scalings=ConsistencyScalings())
    assert (read.network, read.shape) == (network, (3, 32, 32))
    model = read.model()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {k: list(w.shape) for k, w in jcm.export(model, network).items()} == keys


@pytest.mark.parametrize("file", ["jax_ncsnpp_student_weights", "jax_vp_weights"])
def test_there_and_back_every_bit_is_the_same(file):
    """But of random frequencies: times 2π and back, a number of float32 may move by one."""
    theirs = {k: w.float() for k, w in load_file(GOLDEN / f"{file}.safetensors").items()}
    read = jcm.read(theirs, scalings=EDMScalings(), image_size=16)
    back = jcm.export(read.model(), read.network)
    waves = "GaussianFourierProjection_0/W"
    assert back.keys() == theirs.keys()
    assert [k for k, w in theirs.items() if k != waves and not torch.equal(back[k], w)] == []
    if waves in theirs:
        torch.testing.assert_close(back[waves], theirs[waves], rtol=1.2e-7, atol=0)
    again = jcm.read(back, scalings=EDMScalings(), image_size=16)
    assert all(torch.equal(w, read.weights[name]) for name, w in again.weights.items())


# ── what is refused ──


class Marker:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_not_run(tmp_path, protocol):
    mark = tmp_path / "mark"
    path = written(tmp_path, pickle.dumps(Marker(mark), protocol))
    with pytest.raises(ValueError, match=r"would run code|no file of flax"):
        jcm.load(path)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.01, 0.3, 0.9, 0.999999])
def test_a_file_that_was_cut_short_is_refused(tmp_path, share):
    whole = packed(state())
    path = written(tmp_path, whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"cut short|is empty"):
        jcm.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 a zip file, as PyTorch writes them", "no file of flax"),
        (b"<html>Not found</html>", "no file of flax"),
        (b"\xc1", "is damaged"),
        (b"\x91" * 10_000, "is damaged"),
        (b"\x81\x01\x01", "int is not allowed"),
        (b"\x81\xa1a\xd4\x09\x00", "no extension 9"),
        (b"\x81\xa1a\xc7\x0a\x01\x93\x91\x03\xa2O8\xc4\x01\x00\x00", "is damaged|cut short"),
        (packed({"a": 1}), "it begins with|it is empty"),
        (packed(state(params_ema={})), "it is empty"),
        (packed({"params": tree(arrays("student"))}), "holds no 'params_ema'"),
        (packed(state(params_ema={"NCSNpp_0": {}, "NCSNpp_1": {}})), "two networks"),
        (
            packed(state(params_ema={"input_blocks.0.0.weight": torch.ones(1)})),
            "looks like a U-Net of openai/consistency_models ",
        ),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        jcm.load(written(tmp_path, content))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        jcm.load(tmp_path / "cd-l2")


def test_a_path_that_does_not_tell_the_scalings_is_refused(tmp_path):
    path = written(tmp_path, state(), "mine/checkpoint_80")
    with pytest.raises(ValueError, match=r"scalings=EDMScalings\(\) or"):
        jcm.load(path)
    assert jcm.load(path, scalings=EDMScalings()).scalings == EDMScalings()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Conv_1/bias": None}, r"Conv_1/bias is missing, expected \[3\]$"),
        ({"Dense_2/bias": torch.ones(2)}, r"Dense_2/bias is \[2\], expected none$"),
        (
            {"Conv_1/kernel": torch.ones(3, 3, 16, 6)},
            r"is \[3, 3, 16, 6\], expected \[3, 3, 16, 3\]$",
        ),
        ({f"AttnBlockpp_0/NIN_{n}/W": None for n in range(4)}, r"is missing, expected"),
        ({f"more_{n}": torch.ones(1) for n in range(7)}, r"more_4 .*; and 2 more$"),
        ({"ResnetBlockBigGANpp_1/Conv_2/kernel": None}, "does not fit"),
        ({"Conv_0/kernel": None}, "cut short: it has no Conv_0/kernel"),
    ],
)
def test_weights_that_are_not_those_of_one_network_are_refused(change, message):
    weights = {k: w for k, w in (arrays("student") | change).items() if w is not None}
    with pytest.raises(ValueError, match=message):
        jcm.load(weights, scalings=EDMScalings())


def test_where_to_attend_is_asked_for_only_where_the_weights_do_not_tell():
    network = NCSNpp(8, (1, 1, 1), 1, (16, 8))
    weights = jcm.export(Preconditioned(network.build((3, 16, 16)), EDMScalings()), network)
    with pytest.raises(ValueError, match=r"2 of 3 resolutions attend.*some of \(16, 8, 4\)"):
        jcm.read(weights, scalings=EDMScalings(), image_size=16)
    read = jcm.read(weights, scalings=EDMScalings(), image_size=16, attention=(16, 8))
    assert read.network == network


@pytest.mark.parametrize(
    ("knobs", "classes", "message"),
    [
        ({"heads": 2}, None, "no heads = 2"),
        ({"two_times": True, "augment": 9}, None, "augment = 9, two_times = True"),
        ({"taps": (1, 1)}, None, r"taps = \(1, 1\)"),
        ({}, 10, "no classes"),
    ],
)
def test_a_network_that_the_official_code_does_not_have_is_not_exported(knobs, classes, message):
    network = replace(NCSNpp(8, (1, 1), 1), **knobs)
    dressed = Preconditioned(network.build((3, 8, 8), classes), EDMScalings())
    with pytest.raises(ValueError, match=message):
        jcm.export(dressed, network)
