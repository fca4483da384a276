"""Checkpoints of openai/consistency_models_cifar10: the paper's CIFAR-10 models.

A checkpoint is the whole state of a training, as flax writes it (`cmbook.interop.flax`):

    step, lr, ema_rate     numbers; where training stood
    params                 the network as it was being trained
    params_ema             its moving average: what the paper samples from, and what `load` takes
    target_params          θ⁻, only where it is not θ itself, see below
    model_state            empty: no layer keeps statistics
    opt_state, rng_state   the optimizer's moments and the random keys, by position: "0", "1", ...

| run | objective | has `target_params` |
| --- | --- | --- |
| `edm_cifar10_ema` | denoising score matching | no |
| `cd-l1`, `cd-l2`, `cd-lpips` | consistency distillation with μ = 0 | no |
| `ct-lpips` | consistency training, adaptive N(k) and μ(k) | yes: θ⁻ |
| `cifar10-continuous-cd-*`, `continuous-ct-*` | the continuous-time losses | no |
| (none released) | consistency training with fixed N and μ | yes: θ⁻ |
| (none released) | progressive distillation | yes: the teacher; its average has decay 0 |

So the released code writes and reads them; a file that holds one bare network is read too.

Each of the trees is one network (written `Dense_0/kernel`: the tree's names joined):

    GaussianFourierProjection_0/W            frequencies in turns, if they are random
    Dense_0, Dense_1                         the two layers that tell σ
    Conv_0, GroupNorm_0, Conv_1              the first convolution, the last norm and convolution
    ResnetBlockBigGANpp_K                    the K-th block, counted through: down, middle, up
        GroupNorm_0, Conv_0, Dense_0, GroupNorm_1, Conv_1
        Conv_2                               where it has a projection to skip with
    AttnBlockpp_A                            the A-th attention; it follows the block before it
        GroupNorm_0, NIN_0 ... NIN_2         norm, queries, keys, values
        NIN_3                                what leaves
    Downsample_P/Conv2d_0                    what shows the image to the next resolution

Blocks that halve come after those of their resolution, blocks that double likewise, and both are
counted with the rest. A convolution's kernel has axes (height, width, in, out), a matrix
(in, out). The embedding is sines, then cosines; in ours it is the other way around.

Some things the weights do not tell: which resolution attends (where they are equally wide), and
the blurring filter. Without the pyramid of images it is DDPM++, which has none.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmbook.interop.flax import Tree, read_tree
from cmbook.interop.foreign import Foreign, Weights, check_fit, check_weights, looks_like, skeleton
from cmbook.interop.official import local, published
from cmbook.networks import NCSNpp
from cmbook.parameterization import ConsistencyScalings, EDMScalings, Preconditioned, Scalings

BLOCK, ATTENTION, SHOWN = "ResnetBlockBigGANpp_", "AttnBlockpp_", "Downsample_"
WAVES = "GaussianFourierProjection_0/W"
OUTSIDE = [  # (ours, theirs) outside the blocks
    ("conditioning.layers.0", "Dense_0"),
    ("conditioning.layers.2", "Dense_1"),
    ("inlet", "Conv_0"),
    ("outlet.0", "GroupNorm_0"),
    ("outlet.2", "Conv_1"),
]
INSIDE = [  # (ours, theirs) inside a block
    ("before.0", "GroupNorm_0"),
    ("before.2", "Conv_0"),
    ("told", "Dense_0"),
    ("norm", "GroupNorm_1"),
    ("after.2", "Conv_1"),
    ("skip", "Conv_2"),
]
FILTER = (1, 3, 3, 1)  # of NCSN++; DDPM++ has none


def load(
    path_or_state_dict: str | Path | Weights,
    *,
    scalings: Scalings | None = None,
    average: bool = True,
    image_size: int = 32,
    attention: tuple[int, ...] | None = None,
) -> Preconditioned:
    """An official CIFAR-10 checkpoint as a denoiser, `D(x, sigma) -> x0`.

    Args:
        path_or_state_dict: The file, or one network's arrays by joined name (`Dense_0/kernel`),
            in their layout.
        scalings: `EDMScalings()` for a diffusion model, `ConsistencyScalings()` for a consistency
            model. Read off the path of an official file, whose folders are named `cd-lpips` and
            the like, else required: the weights do not tell, and the wrong one gives slightly
            wrong images without an error.
        average: Whether to take the moving average or the network as it was being trained.
        image_size: Of the images.
        attention: The sides of the features that attend; by default half of `image_size`, as in
            every official model.

    Raises:
        ValueError: If the file cannot be read, is of another kind, or its weights are not those
            of one network.

    Source: Song et al. (2023), App. C; openai/consistency_models_cifar10, `jcm/models/ncsnpp.py`
        and `jcm/train.py`.
    """
    return read(
        path_or_state_dict,
        scalings=scalings,
        average=average,
        image_size=image_size,
        attention=attention,
    ).model()


def read(
    path_or_state_dict: str | Path | Weights,
    *,
    scalings: Scalings | None = None,
    average: bool = True,
    image_size: int = 32,
    attention: tuple[int, ...] | None = None,
) -> Foreign:
    """As `load`, but in parts: network, shape, classes, scalings, and weights by our names.

    Raises:
        ValueError: As `load`.

    Source: as `load`.
    """
    if isinstance(path_or_state_dict, dict):
        state, origin = check_weights(path_or_state_dict, "the state dict"), "the state dict"
    else:
        file = local(path_or_state_dict)
        origin = str(file)
        state = _chosen(read_tree(file), average, origin)
    if "Dense_0/kernel" not in state or f"{BLOCK}0/Conv_0/kernel" not in state:
        raise ValueError(
            f"{origin} is not a network of openai/consistency_models_cifar10: {looks_like(state)}"
        )
    scalings = scalings or _scalings(origin)
    try:
        network, shape = _architecture(state, image_size, attention, origin)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{origin} was cut short: it has no {error.args[0]!s}") from error
    net = skeleton(network, shape, None)
    expected = {name: w.shape for name, w in _to_theirs(net, net.state_dict()).items()}
    check_fit(expected, state, origin)
    return Foreign(network, shape, None, scalings, _to_ours(net, state), origin)


def export(model: Preconditioned, network: NCSNpp) -> Weights:
    """A model of ours as arrays in the official layout, by joined name.

    Every number is kept to the last bit but random frequencies, which are W here and 2πW in ours.

    Args:
        model: To be exported.
        network: What its network was built from.

    Raises:
        ValueError: If the official code has no such network.

    Source: as `load`.
    """
    state = {name: w.detach() for name, w in model.net.state_dict().items()}
    check_official(network)
    if any(name.startswith("conditioning.label") for name in state):
        raise ValueError("the official CIFAR-10 networks know no classes; this one does")
    return {name: w.clone() for name, w in _to_theirs(model.net, state).items()}


def check_official(network: NCSNpp) -> None:
    """Refuse a network with switches that the official code does not have.

    Raises:
        ValueError: Naming them.

    Source: openai/consistency_models_cifar10, `jcm/models/ncsnpp.py`.
    """
    official: dict[str, Any] = {
        "heads": 1, "label_dropout": 0.0, "augment": 0, "two_times": False,
        "taps": FILTER if network.pyramid else (1, 1),
    }  # fmt: skip
    odd = [f"{k} = {getattr(network, k)}" for k, v in official.items() if getattr(network, k) != v]
    if odd:
        raise ValueError(
            f"the official CIFAR-10 networks know no {', '.join(odd)}; they need "
            + ", ".join(f"{k} = {v}" for k, v in official.items())
        )


def _chosen(tree: Tree, average: bool, origin: str) -> Weights:
    """One network of a training state, by joined names."""
    wanted = "params_ema" if average else "params"
    if "params" in tree or "params_ema" in tree:
        if not isinstance(tree.get(wanted), dict):
            held = ", ".join(map(repr, tree))
            raise ValueError(f"{origin} holds no {wanted!r} (average={average}); it holds {held}")
        tree = tree[wanted]
    if "NCSNpp_0" in tree:
        raise ValueError(f"{origin} holds two networks (joint_ncsnpp), which no paper's model has")
    return {name: torch.from_numpy(np.array(array)) for name, array in _joined(tree).items()}


def _joined(tree: Tree, before: str = "") -> dict[str, Any]:
    """The arrays of a tree by joined name; what is no array is left out."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _joined(value, f"{before}{name}/")
        elif isinstance(value, np.ndarray):
            found[f"{before}{name}"] = value
    return found


def _scalings(origin: str) -> Scalings:
    """By the folders of an official file, the nearest first."""
    known = published(origin)
    if known is not None:
        return EDMScalings() if known.what.startswith("teacher") else ConsistencyScalings()
    for part in reversed(Path(origin).parts):
        if part.startswith("edm_cifar10"):
            return EDMScalings()
        if re.match(r"(cifar10-)?(continuous-)?(cd|ct)-(l1|l2|lpips)", part):
            return ConsistencyScalings()
    raise ValueError(
        f"{origin} does not tell whether it is a diffusion model or a consistency model; say "
        "scalings=EDMScalings() or scalings=ConsistencyScalings()"
    )


def _architecture(
    state: Weights, side: int, attention: tuple[int, ...] | None, origin: str
) -> tuple[NCSNpp, tuple[int, ...]]:
    """The network, read off names and shapes."""
    residuals, attentions = (_count(state, part) for part in (BLOCK, ATTENTION))
    if max(residuals, attentions) > len(state):
        raise ValueError(f"{origin}: its blocks are numbered beyond the number of its weights")
    resamples = [  # they alone project without need
        k
        for k in range(residuals)
        if (skip := state.get(f"{BLOCK}{k}/Conv_2/kernel")) is not None
        and skip.shape[2] == skip.shape[3]
    ]
    resolutions = 1 + len(resamples) // 2
    blocks = (residuals // resolutions - 3) // 2  # 2 of the middle, one more each on the way up
    if blocks < 1:
        raise ValueError(f"{origin} was cut short: it has only {residuals} residual blocks")
    channels = state["Conv_0/kernel"].shape[3]
    firsts = [f"{BLOCK}{level * (blocks + 1)}/Conv_0/kernel" for level in range(resolutions)]
    network = NCSNpp(
        channels=channels,
        multipliers=tuple(state[first].shape[3] // channels for first in firsts),
        blocks=blocks,
        attention=_attention((attentions - 1) // (blocks + 1), resolutions, side, attention),
        embedding="fourier" if WAVES in state else "positional",
    )
    if not _count(state, SHOWN):
        network = replace(network, pyramid=False, taps=(1, 1))
    return network, (state["Conv_0/kernel"].shape[2], side, side)


def _count(state: Weights, part: str) -> int:
    """How many parts of a name there are, told by the last one's number."""
    numbers = (re.match(rf"{part}(\d+)/", name) for name in state)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def _attention(
    attending: int, resolutions: int, side: int, given: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The sides at which so many resolutions attend."""
    if given is not None:
        return given
    sides = tuple(side // 2**level for level in range(resolutions))
    if attending in (0, resolutions):
        return sides[:attending]
    if attending > 1:
        raise ValueError(
            f"{attending} of {resolutions} resolutions attend, and the weights do not tell which; "
            f"say attention=(...), some of {sides}"
        )
    return sides[1:2]


def _places(net: nn.Module) -> list[tuple[str, str]]:
    """(ours, theirs) of every layer but attention's, in our order."""
    found = list(OUTSIDE)
    for k, block in enumerate(_residuals(net)):
        found += [(f"{block}.{ours}", f"{BLOCK}{k}/{theirs}") for ours, theirs in INSIDE]
    for a, block in enumerate(_attentions(net)):
        found.append((f"{block}.attention.norm", f"{ATTENTION}{a}/GroupNorm_0"))
    shown = range(len(net.pyramid))  # type: ignore[arg-type]
    return found + [(f"pyramid.{p}.convolution", f"{SHOWN}{p}/Conv2d_0") for p in shown]


def _residuals(net: nn.Module) -> list[str]:
    """Our blocks in the order in which theirs are made."""
    counts = ((part, len(getattr(net, part))) for part in ("down", "middle", "up"))
    return [f"{part}.{index}" for part, count in counts for index in range(count)]


def _attentions(net: nn.Module) -> list[str]:
    """Those of them that attend."""
    there = net.state_dict()
    return [block for block in _residuals(net) if f"{block}.attention.qkv.weight" in there]


def _to_theirs(net: nn.Module, ours: Weights) -> Weights:
    """Our weights by their names, in their layout."""
    found: Weights = {}
    for here, there in _places(net):
        if f"{here}.weight" in ours:
            weight = ours[f"{here}.weight"]
            if here == "conditioning.layers.0":
                weight = weight.roll(weight.shape[1] // 2, 1)  # [cos, sin] to [sin, cos]
            name = "scale" if weight.dim() == 1 else "weight" if SHOWN in there else "kernel"
            found[f"{there}/{name}"] = _turned_back(weight)
            found[f"{there}/bias"] = ours[f"{here}.bias"]
    for a, block in enumerate(_attentions(net)):
        for layer, first, count in (("qkv", 0, 3), ("out", 3, 1)):
            both = (ours[f"{block}.attention.{layer}.{part}"] for part in ("weight", "bias"))
            pieces = (tensor.chunk(count) for tensor in both)
            for n, (weight, bias) in enumerate(zip(*pieces, strict=True), first):
                found[f"{ATTENTION}{a}/NIN_{n}/W"] = _turned_back(weight[:, :, 0, 0])
                found[f"{ATTENTION}{a}/NIN_{n}/b"] = bias
    if (frequencies := ours.get("conditioning.sinusoids.frequencies")) is not None:
        found[WAVES] = (frequencies.double() / (2 * math.pi)).to(frequencies.dtype)
    return {name: weight.contiguous() for name, weight in found.items()}


def _to_ours(net: nn.Module, theirs: Weights) -> Weights:
    """Their weights by our names, in our layout and in float32."""
    found: Weights = {}
    for here, there in _places(net):
        if f"{there}/bias" in theirs:
            kinds = (f"{there}/{name}" for name in ("scale", "weight", "kernel"))
            weight = _turned(next(theirs[name] for name in kinds if name in theirs))
            if here == "conditioning.layers.0":
                weight = weight.roll(weight.shape[1] // 2, 1)  # [sin, cos] to [cos, sin]
            found[f"{here}.weight"], found[f"{here}.bias"] = weight, theirs[f"{there}/bias"]
    for a, block in enumerate(_attentions(net)):
        for layer, numbers in (("qkv", (0, 1, 2)), ("out", (3,))):
            weights, biases = (
                torch.cat([_turned(theirs[f"{ATTENTION}{a}/NIN_{n}/{part}"]) for n in numbers])
                for part in ("W", "b")
            )
            found[f"{block}.attention.{layer}.weight"] = weights[:, :, None, None]
            found[f"{block}.attention.{layer}.bias"] = biases
    if WAVES in theirs:
        found["conditioning.sinusoids.frequencies"] = 2 * math.pi * theirs[WAVES].double()
    return {name: weight.float().contiguous() for name, weight in found.items()}


def _turned(weight: Tensor) -> Tensor:
    """(height, width, in, out) to (out, in, height, width), and (in, out) to (out, in)."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(weight.dim())
    return weight.permute(axes) if axes else weight


def _turned_back(weight: Tensor) -> Tensor:
    """The way back."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(weight.dim())
    return weight.permute(axes) if axes else weight
