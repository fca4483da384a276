"""The door to the official U-Net: names, layouts, and what it says to files that are none.

The numbers that such networks give are compared in test_official_numbers.py.
"""

import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN
from einops import rearrange
from safetensors.torch import load_file

from cmbook.interop import openai
from cmbook.networks import UNet
from cmbook.parameterization import ConsistencyScalings, EDMScalings, Preconditioned

HEAD = {"A": 16, "B": 32, "C": 16}
CONSISTENCY = ConsistencyScalings()


def weights(name="A"):
    stored = load_file(GOLDEN / f"unet_{name}_weights.safetensors")
    return {k: w.float() for k, w in stored.items()}


def load(state, **settings):
    return openai.load(state, **{"scalings": CONSISTENCY, "head_channels": 16, **settings})


def said(model):
    """An answer of a model at the sizes of network A."""
    x = torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)
    return model(x, torch.tensor([0.7]), torch.tensor([3]))


# ── what is read ──


@pytest.mark.parametrize("name", HEAD)
def test_what_is_read_is_written_again_to_the_bit(name):
    image_size = 16 if name == "C" else None
    read = openai.read(
        weights(name), scalings=CONSISTENCY, head_channels=HEAD[name], image_size=image_size
    )
    written = openai.export(read.model(), read.network)
    assert written.keys() == weights(name).keys()
    assert all(torch.equal(written[k], w) for k, w in weights(name).items())


def test_what_is_written_is_a_copy():
    read = openai.read(weights(), scalings=CONSISTENCY, head_channels=16)
    model = read.model()
    openai.export(model, read.network)["out.2.bias"].fill_(7)
    assert not (model.net.outlet[2].bias == 7).any()


def test_a_network_that_the_official_code_does_not_know_is_not_written():
    read = openai.read(weights(), scalings=CONSISTENCY, head_channels=16)
    with pytest.raises(ValueError, match=r"knows no groups = powers; it needs patch = 1, "):
        openai.export(read.model(), replace(read.network, groups="powers"))


COMMON = UNet(
    channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), head_channels=64,
    middle=True, resample="block", time_scale=1000.0, groups="all",
)  # fmt: skip
FULL = {
    "imagenet64": (COMMON, (3, 64, 64), 1000),
    "lsun256": (
        replace(COMMON, channels=256, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, told="add"),
        (3, 256, 256),
        None,
    ),
}


@pytest.mark.parametrize("family", FULL)
def test_the_full_size_networks_have_the_official_names_and_shapes(family):
    """They are found to be the networks that `UNet` documents."""
    stored = json.loads((GOLDEN / f"keys_{family}.json").read_text())
    state = {k: torch.empty(shape, device="meta") for k, shape in stored["keys"].items()}
    read = openai.read(state, scalings=CONSISTENCY)
    assert (read.network, read.shape, read.classes) == FULL[family]
    assert sum(w.numel() for w in read.weights.values()) == stored["n_params"]
    read.model()


def test_a_network_that_halves_by_means_is_read():
    """It has no weights where sides change: what tells the halvings is the gap in the numbers."""
    network = UNet(
        channels=32, multipliers=(1, 2, 1), attention=(4,), head_channels=16, middle=True,
        time_scale=1000.0, groups="all",
    )  # fmt: skip
    model = Preconditioned(network.build((3, 16, 16), None), CONSISTENCY)
    read = openai.read(
        openai.export(model, network), scalings=CONSISTENCY, head_channels=16, image_size=16
    )
    assert (read.network, read.shape, read.classes) == (network, (3, 16, 16), None)
    for name, weight in model.net.state_dict().items():
        assert torch.equal(read.weights[name], weight)


def legacy(state, head_channels=16):
    """The same network as guided-diffusion saved it."""
    old = dict(state)
    for name in [n for n in state if ".qkv." in n]:
        old[name] = rearrange(
            state[name], "(three h d) ... -> (h three d) ...", three=3, d=head_channels
        )
    for name in [n for n in state if n.endswith(("qkv.weight", "proj_out.weight"))]:
        old[name] = old[name][..., 0]
    return old


def test_the_layout_of_guided_diffusion_is_read():
    old = legacy(weights())
    assert old["middle_block.1.qkv.weight"].shape == (192, 64, 1)
    assert not torch.equal(old["middle_block.1.qkv.bias"], weights()["middle_block.1.qkv.bias"])
    assert torch.equal(said(load(old)), said(load(weights())))


def test_a_learned_variance_is_left_out():
    old = weights()
    for name in ("out.2.weight", "out.2.bias"):
        old[name] = torch.cat([old[name], torch.full_like(old[name], 9.0)])
    assert torch.equal(said(load(old)), said(load(weights())))


def test_half_precision_is_read_as_float32():
    """The stored weights are exact in float16."""
    model = load({k: w.half() for k, w in weights().items()})
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(said(model), said(load(weights())))


@pytest.mark.parametrize(
    ("name", "scalings"),
    [
        ("cd_imagenet64_l2.pt", ConsistencyScalings()),
        ("ct_cat256.pt", ConsistencyScalings()),
        ("edm_bedroom256_ema.pt", EDMScalings()),
    ],
)
def test_the_name_of_an_official_file_tells_its_scalings(tmp_path, name, scalings):
    torch.save(weights(), tmp_path / name)
    model = openai.load(tmp_path / name, head_channels=16)
    assert model.scalings == scalings
    assert torch.equal(said(model), said(load(weights(), scalings=scalings)))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_the_file_of_a_training_is_read_when_told_its_scalings(tmp_path):
    torch.save(weights(), tmp_path / "ema_0.9999_000010.pt")
    read = openai.read(tmp_path / "ema_0.9999_000010.pt", scalings=CONSISTENCY, head_channels=16)
    assert torch.equal(said(read.model()), said(load(weights())))
    with pytest.raises(ValueError, match=r"000010.pt does not tell whether it is a diffusion"):
        openai.read(tmp_path / "ema_0.9999_000010.pt", head_channels=16)


# ── what is refused ──


def without(*starts):
    return {k: w for k, w in weights().items() if not k.startswith(starts)}


def wide(factor):
    """The first layer of the time embedding of a network `factor` times as wide."""
    return weights() | {"time_embed.0.weight": torch.zeros(128, int(32 * factor))}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without("out.2"), r"out\.2\.weight is missing, expected \[3, 32, 3, 3\]; out\.2\.b"),
        (without("out.0.bias"), r"network: out\.0\.bias is missing, expected \[32\]$"),
        (without("middle_block"), r"([^;]* is missing, expected [^;]*; ){5}and 21 more$"),
        (without("output_blocks"), r"was cut short: it has no output_blocks$"),
        (without("output_blocks.1."), r"was cut short: it has no output_blocks\.1$"),
        (without("output_blocks.3"), r"was cut short: it has no output_blocks\.3$"),
        (without("input_blocks.3"), r"cut short: it has no input_blocks\.3\.0\.out_layers\.3\.w"),
        (without("input_blocks.0"), r"cut short: it has no input_blocks\.0\.0\.weight$"),
        (without("time_embed"), r"cut short: it has no time_embed\.0\.weight$"),
        (dict(list(weights().items())[:100]), r"was cut short: it has no time_embed\.0\.weight$"),
        ({**weights(), "more": torch.ones(2)}, r"more is \[2\], expected none$"),
        ({**weights(), "input_blocks.x.0": torch.ones(2)}, r"x\.0 is \[2\], expected none"),
        ({**weights(), 7: torch.ones(2)}, r"must hold a dictionary of names and tensors"),
        ({}, r"is not a U-Net of openai/consistency_models: it is empty$"),
        ({"conv_in.weight": torch.ones(1)}, r"it looks like a UNet2DModel of diffusers"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, r"it begins with 'a', 'b', which no door"),
        (wide(2), r"\[32, 64\] channels are no whole multiples of its first 64$"),
        (weights() | {"time_embed.0.weight": torch.ones(())}, r"holds no network of openai"),
        (legacy(weights()) | {"middle_block.1.qkv.bias": torch.ones(7)}, r"has 7 channels, not a"),
    ],
)  # fmt: skip
def test_a_state_dict_of_another_kind_is_refused(state, message):
    with pytest.raises(ValueError, match=message) as error:
        load(state)
    assert str(error.value).startswith(("the state dict", "middle_block.1.qkv.bias"))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scalings": None}, r"the state dict does not tell whether .* say scalings=EDMScalings"),
        ({"head_channels": 24}, r"32 channels cannot be cut into heads of head_channels = 24$"),
        ({"head_channels": 64}, r"32 channels cannot be cut into heads of head_channels = 64$"),
        ({"head_channels": 0}, r"head_channels must be at least 1; got 0$"),
        ({"image_size": 15}, r"sides divisible by 2; got \(3, 15, 15\)$"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load(weights(), **settings)


class Runs:
    """What a harmful file holds: an instruction to make a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_file_is_not_run(tmp_path):
    path, marker = tmp_path / "cd_imagenet64_l2.pt", tmp_path / "it ran"
    torch.save({**weights(), "more": Runs(marker)}, path)
    with pytest.raises(ValueError, match=r"l2\.pt holds more than tensors, and loading it would"):
        openai.load(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it would have
    assert marker.exists()


def written(path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind in ("cut", "tensor", "optimizer", "module"):
        adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
        what = {
            "cut": weights(), "tensor": torch.ones(3), "optimizer": adam.state_dict(),
            "module": torch.nn.Linear(2, 2),
        }[kind]  # fmt: skip
        torch.save(what, path)
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:100_000])
    elif kind != "nothing":
        path.write_text({"page": "<html>404 Not Found</html>", "empty": ""}[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", r"there is no file .*cd_imagenet64_l2\.pt"),
        ("folder", r"there is no file .*cd_imagenet64_l2\.pt"),
        ("empty", r"l2\.pt is no file that PyTorch saved: it is empty$"),
        ("page", r"l2\.pt is no file that PyTorch saved: it begins with b'<html>404 Not Fo'$"),
        ("cut", r"l2\.pt is damaged: PytorchStreamReader failed"),
        ("tensor", r"l2\.pt must hold a dictionary of names and tensors; it holds Tensor$"),
        ("optimizer", r"l2\.pt must hold .* it holds dict with 'state', 'param_groups'$"),
        ("module", r"l2\.pt holds more than tensors, and loading it would run code"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, kind, message):
    path = tmp_path / "cd_imagenet64_l2.pt"
    written(path, kind)
    with pytest.raises(ValueError, match=message) as error:
        openai.load(path, head_channels=16)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_cut_short_is_told_which_recipes_it_is_of():
    stored = json.loads((GOLDEN / "keys_imagenet64.json").read_text())["keys"]
    state = {name: torch.empty(shape, device="meta") for name, shape in stored.items()}
    for name in list(state)[-60:-3]:
        del state[name]
    with pytest.raises(ValueError, match=r"The recipes imagenet64/\* would fit: 8\d% of"):
        openai.read(state, scalings=ConsistencyScalings())
