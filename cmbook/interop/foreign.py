"""What every door shares: a model from elsewhere in our words, and what to say if it is not one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cmbook.checkpoints import SHOWN as SHOWN
from cmbook.checkpoints import check_fit as check_fit
from cmbook.networks import Network
from cmbook.parameterization import Preconditioned, Scalings

Weights = dict[str, Tensor]
LOOKS = {  # a name that only this family has -> what it is, and its door
    "input_blocks.0.0.weight": "a U-Net of openai/consistency_models (cmbook.interop.openai)",
    "conv_in.weight": "a UNet2DModel of diffusers (cmbook.interop.diffusers)",
    "map_layer0.weight": "a network of NVlabs/edm (cmbook.interop.edm)",
    "model.map_layer0.weight": "a network of NVlabs/edm (cmbook.interop.edm)",
    "Dense_0/kernel": "a network of openai/consistency_models_cifar10 (cmbook.interop.jcm)",
    "net.inlet.weight": "a model of cmbook itself (cmbook.load of its folder)",
}


@dataclass(frozen=True)
class Foreign:
    """A model from elsewhere, in our words.

    Attributes:
        network: What its network is here.
        shape: Of one sample.
        classes: How many it knows, or None.
        scalings: What makes a denoiser of it.
        weights: By our names, in our layout.
        origin: Where it came from, for messages and records.

    Source: ours.
    """

    network: Network
    shape: tuple[int, ...]
    classes: int | None
    scalings: Scalings
    weights: Weights = field(repr=False)
    origin: str

    def model(self) -> Preconditioned:
        """The denoiser, in eval mode and frozen.

        Raises:
            ValueError: If a weight is missing, too many, or of another shape than the network's.
        """
        check_weights(self.weights, self.origin)
        net = skeleton(self.network, self.shape, self.classes)
        check_fit({n: w.shape for n, w in net.state_dict().items()}, self.weights, self.origin)
        own = {name: weight.clone() for name, weight in self.weights.items()}  # nobody else's
        net.load_state_dict(own, assign=True)
        return Preconditioned(net, self.scalings).eval().requires_grad_(False)


def skeleton(network: Network, shape: tuple[int, ...], classes: int | None) -> nn.Module:
    """The network without memory for its weights: names, shapes, and the constants.

    Raises:
        ValueError: If it cannot be built for such samples, or PyTorch cannot count its weights.

    Source: ours.
    """
    try:
        with torch.device("meta"):
            return network.build(shape, classes)
    except (RuntimeError, ArithmeticError, StopIteration, TypeError) as error:
        reason = f"{network} cannot be built for samples of shape {shape}: {error!s}"
        raise ValueError(reason.splitlines()[0]) from error


def looks_like(weights: dict[str, Any]) -> str:
    """What weights are, told by their names.

    Source: ours.
    """
    found = next((what for name, what in LOOKS.items() if name in weights), None)
    if found:
        return f"it looks like {found}"
    first = ", ".join(repr(name) for name in list(weights)[:SHOWN])
    return f"it begins with {first}, which no door of cmbook knows" if first else "it is empty"


def check_weights(state: Any, origin: str) -> Weights:
    """A dictionary of dense tensors of real, finite numbers, or an error.

    Raises:
        ValueError: If it is anything else.

    Source: ours.
    """
    if not isinstance(state, dict) or not all(
        isinstance(n, str) and isinstance(w, Tensor) for n, w in state.items()
    ):
        raise ValueError(
            f"{origin} must hold a dictionary of names and tensors; it holds "
            f"{type(state).__name__}"
            + (
                f" with {', '.join(map(repr, list(state)[:SHOWN]))}"
                if isinstance(state, dict)
                else ""
            )
        )
    for name, weight in state.items():
        if weight.layout != torch.strided or not weight.is_floating_point():
            raise ValueError(
                f"{origin}: {name} must be a dense tensor of real numbers; it is "
                f"{weight.dtype}, {weight.layout}"
            )
        if not weight.is_meta and not bool(weight.isfinite().all()):
            raise ValueError(f"{origin}: {name} holds numbers that are not finite")
    return state


def read_safetensors(file: Path) -> Weights:
    """The tensors of a file of safetensors, which cannot hold code.

    Raises:
        ValueError: If there is no such file, or it is damaged.

    Source: safetensors.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    try:
        return check_weights(load_file(file), str(file))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error
