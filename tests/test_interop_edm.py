"""The networks of NVlabs/edm, number by number, and their pickles, which must not run."""

import io
import json
import os
import pickle
import sys
import types
from collections import OrderedDict
from functools import partial
from math import sqrt

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from torch import nn

from cmbook.interop import edm, openai
from cmbook.interop.inert import Inert, tensors
from cmbook.losses import EDM
from cmbook.networks import NCSNpp, UNet
from cmbook.networks.blocks import (
    Filter,
    GroupNorm,
    ResidualBlock,
    Sinusoids,
    geometric,
)
from cmbook.noise import NoiseRange, Replay
from cmbook.ode import solve
from cmbook.parameterization import (
    ConsistencyScalings,
    EDMScalings,
    IDDPMScalings,
    Preconditioned,
    VEScalings,
    VPScalings,
)
from cmbook.protocols import Batch, Clock, Models
from cmbook.samplers import Churn, grid_to_zero, ode_sample

FAMILIES = ["ddpmpp", "ncsnpp", "adm"]


def weights(name):
    return {k: w.float() for k, w in load_file(GOLDEN / f"{name}_weights.safetensors").items()}


def official(name, **settings):
    """A network as read; with a row that says nothing, so that it can be called without labels."""
    return edm.read(weights(f"edm_{name}"), label_dropout=0.1, **settings)


def labels(stored):
    """One-hot vectors as numbers."""
    return stored["class_labels"].argmax(1) if "class_labels" in stored else None


class Augmented(nn.Module):
    """A network that is told how its image was augmented."""

    def __init__(self, net, augment):
        super().__init__()
        self.net, self.augment = net, augment

    def forward(self, x, c_noise, label=None):
        return self.net(x, c_noise, label, augment=self.augment)


# ── numbers of the reference ──

close = partial(torch.testing.assert_close, rtol=1e-5, atol=5e-6)


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_equal_the_official_ones(golden, name):
    model, stored = official(name).model(), golden(f"edm_{name}")
    sigma, label = stored["sigma"], labels(stored)
    x = stored["x"].requires_grad_()
    denoised = model(x, sigma, label)
    close(denoised, stored["D"])
    close(model(x, sigma), stored["D_no_labels"])
    close(model.net(stored["raw_input"], sigma.log() / 4, label), stored["raw_F"])
    close(model.raw(x, sigma, label), stored["raw_F"])
    slopes = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
    (denoised / sigma.reshape(-1, 1, 1, 1) * slopes).sum().backward()
    torch.testing.assert_close(x.grad, stored["grad_x"], rtol=1e-4, atol=3e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp"])
def test_augmented_images_are_told_as_the_official_networks_are(golden, name):
    model, stored = official(name).model(), golden(f"edm_{name}")
    told = Preconditioned(Augmented(model.net, stored["augment_labels"]), model.scalings)
    close(told(stored["x"], stored["sigma"], labels(stored)), stored["D_aug"])
    assert (stored["D_aug"] - stored["D"]).abs().max() > 0.1


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_and_its_gradients_equal_the_official_ones(golden, name):
    read, stored = official(name), golden(f"edm_{name}_loss")
    model = read.model().requires_grad_(True)
    loss = EDM()(
        Models(model),
        Batch(stored["images"], labels(stored)),
        clock=Clock(0, 1),
        generator=Replay(normals=[stored["rnd_normal"].flatten(), stored["noise"]]),
    )
    close(loss.sigma, stored["sigma"].flatten())
    close(loss.per_sample, stored["loss"].mean((1, 2, 3)))
    close(loss.value.double(), stored["mean_loss"])
    loss.value.backward()
    found = {n: p.grad for n, p in model.net.named_parameters()}
    ours = {theirs: n for n, theirs in edm._names(read.network, read.shape, read.classes).items()}
    checked = [key for key in stored if key.startswith("grad/")]
    assert len(checked) == 3
    for key in checked:
        close(found[ours[key.removeprefix("grad/model.")]], stored[key])
    rows = found.pop(edm.LABEL, None)  # theirs is a layer: by the chain rule
    squares = [float(g.square().sum()) for g in found.values() if g is not None]
    if rows is not None and isinstance(read.network, NCSNpp):
        squares += [read.classes * float(rows[:-1].square().sum()), float(rows.sum(0).norm()) ** 2]
    elif rows is not None:
        squares.append(float(rows[:-1].square().sum()))
    assert sqrt(sum(squares)) == pytest.approx(float(stored["grad_norm"]), rel=1e-5)


def in_the_clock_of_ve(model):
    """The ODE of VE, σ = √t: dx/dt = (x - D)/2t is that of a denoiser half as strong."""
    return lambda x, t, label=None: (x + model(x, t.sqrt(), label)) / 2


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_samplers_end_where_the_official_ones_do(golden, name):
    model, stored = official(name).model(), golden(f"edm_{name}_sampler")
    z, label = stored["latents"].double(), labels(stored)
    near = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)

    usual = NoiseRange()
    near(ode_sample(model, 80 * z, usual, label, levels=6), stored["determ/out"])
    other = NoiseRange(0.02, 30.0, rho=5.0)
    near(ode_sample(model, 30 * z, other, label, levels=5), stored["range/out"])
    euler = ode_sample(model, 80 * z, usual, label, levels=5, solver="euler")
    near(euler, stored["abl_euler/out"])

    sigmas = grid_to_zero(usual, 6)
    drawn = [
        e for e, sigma in zip(stored["churn/noise"], sigmas, strict=False) if 0.05 <= sigma <= 50
    ]
    assert len(drawn) == 4
    churn = Churn(2.5, 0.05, 50.0, 1.007)
    near(churn(model, 80 * z, sigmas, label, generator=Replay(drawn)), stored["churn/out"])

    times = 100.0**2 * (0.02 / 100.0) ** (2 * torch.arange(5).double() / 4)
    times = torch.cat([times, times.new_zeros(1)])
    near(solve(in_the_clock_of_ve(model), 100 * z, times, label), stored["abl_ve/out"])


@pytest.mark.parity
@pytest.mark.parametrize("scalings", [VPScalings(), VEScalings()], ids=["VPPrecond", "VEPrecond"])
def test_the_dresses_of_vp_and_ve_equal_the_official_ones(golden, request, scalings):
    stored = golden("edm_other_precond")
    model = official("ddpmpp", scalings=scalings).model()
    want = stored[request.node.callspec.id]
    torch.testing.assert_close(model(stored["x"], stored["sigma"]), want, rtol=1e-5, atol=2e-4)


@pytest.mark.parity
def test_the_network_of_ect_wears_two_dresses(golden):
    stored = golden("ect_precond")
    x, sigma, label = stored["x"], stored["sigma"], labels(stored)
    training = edm.load(weights("ect_net"))
    close(training(x, sigma, label), stored["D_train"])
    model = edm.load(weights("ect_net"), scalings=ConsistencyScalings(NoiseRange(0.003)))
    close(model(x, sigma, label), stored["D_eval"])
    assert torch.equal(model(x, sigma, label)[0], x[0])


@pytest.mark.parity
def test_a_block_equals_the_official_one(golden):
    stored = golden("edm_blocks")
    norm = partial(GroupNorm, groups="quarters", eps=1e-6)
    block = ResidualBlock(16, 32, 24, norm=norm, heads=2, add=True, rescale=sqrt(0.5), project=True)
    theirs = {n.removeprefix("block/"): w for n, w in stored.items() if n.startswith("block/")}
    state = {
        f"{a}.{part}": theirs[f"{b}.{part}"] for a, b in edm.BLOCK for part in ("weight", "bias")
    }
    for part in ("weight", "bias"):
        name = f"attention.qkv.{part}"
        state[name] = edm._turned(f".qkv.{part}", state[name], NCSNpp())
    block.load_state_dict(state)
    close(block(stored["block_x"], stored["block_emb"]), stored["block_out"])


@pytest.mark.parity
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)], ids=["11", "1331"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_filters_equal_the_official_resampling(golden, taps, way):
    stored = golden("edm_blocks")
    x, key = stored["block_x"], f"conv_{''.join(map(str, taps))}_{way}"
    moved = Filter(taps, up=way == "up")(x)
    close(moved, stored[f"{key}_plain_k0/out"])
    weight, bias = (stored[f"{key}_plain_k3/{part}"] for part in ("weight", "bias"))
    close(nn.functional.conv2d(moved, weight, bias, padding=1), stored[f"{key}_plain_k3/out"])
    weight, bias = (stored[f"{key}_fused_k3/{part}"] for part in ("weight", "bias"))
    if way == "down":  # as the pyramid does
        moved = Filter(taps, stride=1, padding=len(taps) // 2)(x)
        fused = nn.functional.conv2d(moved, weight, bias, stride=2)
    else:
        moved = Filter(taps, up=True, padding=0)(x)
        fused = nn.functional.conv2d(moved, weight, bias, padding=1 if len(taps) == 2 else 0)
    close(fused, stored[f"{key}_fused_k3/out"])


@pytest.mark.parity
@pytest.mark.parametrize(("key", "endpoint"), [("pos", False), ("pos_endpoint", True)])
def test_positions_equal_the_official_ones(golden, key, endpoint):
    stored = golden("edm_blocks")
    close(Sinusoids(geometric(16, endpoint=endpoint))(stored["t"]), stored[key])


FULL = {
    "cifar10_ddpmpp": NCSNpp(embedding="positional", taps=(1, 1), pyramid=False, augment=9),
    "cifar10_ncsnpp": NCSNpp(augment=9),
    "imagenet64_adm": UNet(
        channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8),
        head_channels=64, middle=True, resample="block", time_scale=1.0, groups="quarters",
    ),
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("name", FULL)
def test_the_full_size_networks_have_the_official_names_and_shapes(name):
    stored = json.loads((GOLDEN / f"edm_keys_{name}.json").read_text())
    state = {k: torch.empty(shape, device="meta") for k, shape in stored["keys"].items()}
    read = edm.read(state)
    assert read.network == FULL[name]
    assert (read.classes or 0) == stored["config"]["label_dim"]
    model = read.model()
    assert sum(p.numel() for p in model.parameters()) == stored["n_params"]
    names = {k: list(w.shape) for k, w in edm.export(model, read.network).items()}
    assert names == stored["keys"]


# ── in and out ──


@pytest.mark.parametrize("name", [f"edm_{family}" for family in FAMILIES] + ["ect_net"])
def test_export_gives_back_what_was_read(name):
    given = weights(name)
    read = edm.read(given, label_dropout=0.1)
    back = edm.export(read.model(), read.network)
    rounded = {"model.map_noise.freqs"}
    rounded |= {"model.map_label.weight"} if isinstance(read.network, NCSNpp) else set()
    assert back.keys() == given.keys()
    for key in given:
        assert back[key].dtype == torch.float32
        if key in rounded:
            torch.testing.assert_close(back[key], given[key], rtol=2e-7, atol=2e-7)
        else:
            assert torch.equal(back[key], given[key]), key
    again = edm.read(back, label_dropout=0.1).weights
    for key, weight in read.weights.items():
        if key == edm.LABEL:
            torch.testing.assert_close(again[key], weight, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(again[key], weight), key


def test_a_conditional_network_that_never_saw_no_class_needs_one(golden):
    stored = golden("edm_ddpmpp")
    model = edm.load(weights("edm_ddpmpp"))
    close(model(stored["x"], stored["sigma"], labels(stored)), stored["D"])
    with pytest.raises(ValueError, match="label must be 3 integers"):
        model(stored["x"], stored["sigma"])


def test_names_may_lack_the_prefix_and_a_variance_is_dropped(golden):
    stored, state = golden("edm_adm"), weights("edm_adm")
    bare = {name.removeprefix("model."): weight for name, weight in state.items()}
    doubled = bare | {n: bare[n].repeat(2, *[1] * (bare[n].ndim - 1)) * torch.tensor(
        [1.0, 1, 1, 9, 9, 9]).reshape(-1, *[1] * (bare[n].ndim - 1))
        for n in ("out_conv.weight", "out_conv.bias")}  # fmt: skip
    doubled |= {"map_augment.weight": torch.ones(32, 9), "u": torch.ones(1001)}
    for weights_ in (bare, doubled):
        model = edm.load(weights_)
        close(model(stored["x"], stored["sigma"], labels(stored)), stored["D"])


@pytest.mark.parametrize("network", [UNet(), NCSNpp(heads=2)])
def test_export_refuses_what_the_official_code_cannot_say(network):
    with pytest.raises(ValueError, match=r"NVlabs/edm know no h"):
        edm.export(Preconditioned(network.build((3, 16, 16)), EDMScalings()), network)


# ── pickles ──


@pytest.fixture
def nvidia(monkeypatch):
    """Write a pickle as the official code does, with classes of its own making."""
    made = {name: types.ModuleType(name) for name in ("torch_utils", "dnnlib", "dnnlib.util")}
    persistence = made["torch_utils.persistence"] = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the official constructor was called")

    class EasyDict(dict):
        pass

    for thing, home in (
        (_reconstruct_persistent_obj, persistence),
        (EasyDict, made["dnnlib.util"]),
    ):
        thing.__module__, thing.__qualname__ = home.__name__, thing.__name__
        setattr(home, thing.__name__, thing)

    class Persistent(nn.Module):
        kind, source = "Conv2d", ""

        def __reduce__(self):
            meta = {"type": "class", "version": 6, "module_src": self.source}
            meta |= {"class_name": self.kind, "state": self.__dict__}
            return _reconstruct_persistent_obj, (meta,), None

    def tree(state, kind="UNetBlock"):
        """Modules nested as the names are; the two dictionaries are PyTorch's own."""
        node = Persistent()
        node.kind, node.skip_scale = kind, np.sqrt(0.5)
        node._init_args, node._init_kwargs = (), EasyDict(init=EasyDict(mode="xavier_uniform"))
        inner: dict = {}
        for name, weight in state.items():
            first, _, rest = name.partition(".")
            if rest:
                inner.setdefault(first, {})[rest] = weight
            elif first in ("resample_filter", "freqs"):
                node.register_buffer(first, weight)
            else:
                node.register_parameter(first, nn.Parameter(weight, requires_grad=False))
        node.register_parameter("nothing", None)
        for name, part in inner.items():
            node.add_module(name, tree(part))
        for name in {"enc", "dec"} & inner.keys():
            node._modules[name] = nn.ModuleDict(node._modules[name]._modules)
        return node

    def write(state, kind="EDMPrecond", label_dropout=0, extra=None, source="", **numbers):
        Persistent.source = source
        ema = tree(state, kind)
        ema.model.label_dropout = label_dropout
        for name, number in numbers.items():
            setattr(ema, name, number)
        held = {"ema": ema, "loss_fn": tree({}, "EDMLoss"), "dataset_kwargs": EasyDict(path="x")}
        with monkeypatch.context() as patch:
            for name, module in made.items():
                patch.setitem(sys.modules, name, module)
            return pickle.dumps(held | {"extra": extra})

    return write


def test_a_pickle_in_the_official_format_is_read_and_not_run(golden, nvidia, tmp_path):
    file, stored = tmp_path / "edm-tiny.pkl", golden("edm_ddpmpp")
    file.write_bytes(
        nvidia(weights("edm_ddpmpp"), sigma_min=0, sigma_max=float("inf"), sigma_data=0.5)
    )
    read = edm.read(file)
    assert read.scalings == EDMScalings()
    assert (read.shape, read.classes, read.network.label_dropout) == ((3, 16, 16), 10, 0.0)
    close(read.model()(stored["x"], stored["sigma"], labels(stored)), stored["D"])
    assert not {"torch_utils", "dnnlib"} & sys.modules.keys()


@pytest.mark.parametrize(
    ("kind", "numbers", "scalings"),
    [
        ("EDMPrecond", {"sigma_data": 0.25}, EDMScalings(NoiseRange(sigma_data=0.25))),
        (
            "VPPrecond",
            {"beta_d": 15.0, "beta_min": 0.2, "M": 500, "sigma_min": 0.004, "sigma_max": 70.0},
            VPScalings(NoiseRange(0.004, 70.0), beta_d=15.0, beta_min=0.2, steps=500),
        ),
        ("VEPrecond", {"sigma_min": 0.02, "sigma_max": 100}, VEScalings(NoiseRange(0.02))),
        ("iDDPMPrecond", {"C_1": 0.002, "M": 100}, IDDPMScalings(C_1=0.002, M=100)),
        ("ECMPrecond", {"sigma_min": 0.003}, ConsistencyScalings(NoiseRange(0.003))),
    ],
)
def test_the_preconditioner_tells_the_scalings(nvidia, tmp_path, kind, numbers, scalings):
    file = tmp_path / "network.pkl"
    file.write_bytes(nvidia(weights("edm_adm"), kind, 0.1, **numbers))
    read = edm.read(file)
    assert read.scalings == scalings
    assert read.network.label_dropout == 0.1
    assert edm.read(file, scalings=EDMScalings(), label_dropout=0.0).scalings == EDMScalings()


class Evil:
    """Pickled, it is a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    ("function", "word"),
    [(os.system, "system"), (exec, "exec"), (eval, "eval"), (io.open, "open")],
    ids=["system", "exec", "eval", "open"],
)
def test_code_in_a_pickle_is_not_run(nvidia, tmp_path, function, word, hidden):
    marker, file = tmp_path / "marker", tmp_path / "evil.pkl"
    code = {
        os.system: (f"touch {marker}",),
        io.open: (str(marker), "w"),
    }.get(function, (f"open({str(marker)!r}, 'w')",))
    evil = Evil(function, *code)
    data = nvidia(weights("edm_adm"), extra=evil) if hidden else pickle.dumps({"ema": evil})
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"would run \w+\.{word}; it was not loaded"):
        edm.load(file)
    assert not marker.exists()


def test_source_code_in_a_pickle_is_not_run(nvidia, tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "source.pkl"
    file.write_bytes(nvidia(weights("edm_adm"), source=f"open({str(marker)!r}, 'w')"))
    edm.load(file)
    assert not marker.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00xK\x01sb.",  # sets an attribute
        b"cos\nsystem\n(X\x01\x00\x00\x00xtR.",
        b"(X\x01\x00\x00\x00xios\nsystem\n.",  # protocol 0's instances
        b"X\x01\x00\x00\x00xQ.",  # something outside the file
    ],
)
def test_programs_written_by_hand_are_refused(tmp_path, program):
    before = vars(torch._utils._rebuild_tensor_v2).copy()
    file = tmp_path / "evil.pkl"
    file.write_bytes(program)
    with pytest.raises(ValueError, match="would run"):
        edm.load(file)
    assert vars(torch._utils._rebuild_tensor_v2) == before


def test_tensors_that_hold_code_are_refused(tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "evil.pkl"
    inner = io.BytesIO()
    torch.save(Evil(os.system, f"touch {marker}"), inner, _use_new_zipfile_serialization=False)
    file.write_bytes(pickle.dumps(Evil(torch.storage._load_from_bytes, inner.getvalue())))
    with pytest.raises(ValueError, match="would run code inside a tensor"):
        edm.load(file)
    assert not marker.exists()


def test_modules_that_hold_themselves_are_refused():
    module = Inert()
    module.state["_modules"] = {"again": module}
    with pytest.raises(ValueError, match="lies in two places"):
        tensors(module)


# ── what is refused ──


def test_files_that_are_no_networks_end_in_one_sentence(nvidia, tmp_path):
    file = tmp_path / "network.pkl"
    with pytest.raises(ValueError, match="there is no file"):
        edm.load(file)
    whole = nvidia(weights("edm_adm"))
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is damaged or no pickle"):
            edm.load(file)
    file.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="must hold a dictionary of names and tensors"):
        edm.load(file)
    file.write_bytes(pickle.dumps(OrderedDict(weights("edm_adm"))))
    assert edm.read(file, scalings=EDMScalings()).classes == 5
    torch.save(weights("edm_adm"), tmp_path / "network.pt")
    assert edm.read(tmp_path / "network.pt", scalings=EDMScalings()).classes == 5
    for untold in (file, tmp_path / "network.pt"):
        with pytest.raises(ValueError, match="does not tell how its network becomes a denoiser"):
            edm.read(untold)


def test_a_preconditioner_of_an_unknown_class_is_not_taken_for_edms(nvidia, tmp_path):
    file = tmp_path / "network.pkl"
    file.write_bytes(nvidia(weights("edm_adm"), "Unheard", 0.1))
    with pytest.raises(ValueError, match="does not tell how its network becomes a denoiser"):
        edm.read(file)
    assert edm.read(file, scalings=VEScalings()).scalings == VEScalings()


def test_networks_of_other_families_are_named():
    with pytest.raises(
        ValueError, match="not a network of NVlabs/edm: it looks like a U-Net of op"
    ):
        edm.load(weights("unet_A"))
    with pytest.raises(ValueError, match="it looks like a network of NVlabs/edm"):
        openai.load(weights("edm_adm"))


def cut(state, *names):
    return {n: w for n, w in state.items() if n.removeprefix("model.") not in names}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: cut(s, "enc.16x16_conv.weight"), "it has no convolution at its beginning"),
        (lambda s: cut(s, "dec.16x16_aux_conv.weight"), "it has no dec.16x16_aux_conv.weight"),
        (lambda s: {n: w for n, w in s.items() if "block" not in n}, "it has no enc.*_block0"),
        (lambda s: cut(s, "map_label.bias"), "map_label.bias is missing"),
        (lambda s: cut(s, "enc.8x8_down.skip.resample_filter"), "resample_filter is missing"),
        (lambda s: s | {"model.odd": torch.ones(2)}, r"odd is \[2\], expected none"),
        (
            lambda s: s | {"model.enc.8x8_down.conv0.resample_filter": torch.ones(1, 1, 2, 2)},
            "blurs by another filter",
        ),
        (lambda s: {n: w for n, w in s.items() if ".dec.8x8_block" not in n}, "; and .* more"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        edm.load(change(weights("edm_ddpmpp")))
