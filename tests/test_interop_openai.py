"""The official U-Net, name by name and number by number."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from cmbook.interop import openai
from cmbook.parameterization import ConsistencyScalings

SETTINGS = {
    "A": {"head_channels": 16},
    "B": {"head_channels": 32},
    "C": {"head_channels": 16, "image_size": 16},  # its heads are counted, see below
}


def weights(name):
    return {k: w.float() for k, w in load_file(GOLDEN / f"{name}_weights.safetensors").items()}


@pytest.fixture(params=SETTINGS)
def official(request, golden):
    """A network of ours with the official weights, and what the official one said."""
    read = openai.read(
        weights(f"unet_{request.param}"),
        scalings=ConsistencyScalings(),
        **SETTINGS[request.param],
    )
    if request.param == "C":  # two heads on the way down, one on the way up, whatever the channels
        network = replace(read.network, head_channels=None, heads=2, heads_up=1)
        read = replace(read, network=network)
    return read.model().requires_grad_(True).net, golden(f"unet_{request.param}")


def test_outputs_and_gradients_equal_the_official_ones(official):
    net, stored = official
    x = stored["x"].requires_grad_()
    out = net(x, stored["timesteps"] / 1000, stored.get("y"))
    torch.testing.assert_close(out, stored["out"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["imagenet64", "lsun256"])
def test_the_full_size_networks_have_the_official_names_and_shapes(family):
    stored = json.loads((GOLDEN / f"keys_{family}.json").read_text())
    state = {k: torch.empty(shape, device="meta") for k, shape in stored["keys"].items()}
    read = openai.read(state, scalings=ConsistencyScalings())
    assert sum(w.numel() for w in read.weights.values()) == stored["n_params"]
    read.model()
