"""Checkpoints of openai/consistency_models: the paper's ImageNet 64x64 and LSUN 256x256 models.

A checkpoint is a dictionary of float32 tensors, saved by PyTorch:

    time_embed.{0,2}                          the two layers that tell σ
    label_emb                                 the classes, if there are any
    input_blocks.0.0                          the first convolution
    input_blocks.I.0.{in,emb,out}_layers.N    a block on the way down, or one that halves
    input_blocks.I.0.op                       in its place: a strided convolution
    input_blocks.I.1.{norm,qkv,proj_out}      its attention, if it has one
    middle_block.{0,1,2}                      block, attention, block
    output_blocks.J.0, output_blocks.J.1      block and attention on the way up
    output_blocks.J.{1,2}                     after the last of a resolution: the one that doubles
    out.{0,2}                                 norm and last convolution

In ours, blocks are counted through: what halves and what doubles has a number of its own.
"""

import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from cmbook.interop.foreign import Foreign, Weights, check_fit, check_weights, looks_like, skeleton
from cmbook.interop.official import local
from cmbook.networks import UNet
from cmbook.parameterization import ConsistencyScalings, EDMScalings, Preconditioned, Scalings

FIRST = ("input_blocks.0.0.weight", "time_embed.0.weight")
COARSEST = 8  # the side of the coarsest features in every official model
INSIDE = [  # (ours, theirs) inside a block
    ("before.0", "in_layers.0"),
    ("before.2", "in_layers.2"),
    ("told", "emb_layers.1"),
    ("norm", "out_layers.0"),
    ("after.2", "out_layers.3"),
    ("skip", "skip_connection"),
    ("convolution", "op"),  # on the way down
    ("convolution", "conv"),  # on the way up
]
ATTENTION = [("norm", "norm"), ("qkv", "qkv"), ("out", "proj_out")]
OUTSIDE = [  # (ours, theirs) outside the blocks
    ("conditioning.layers.0", "time_embed.0"),
    ("conditioning.layers.2", "time_embed.2"),
    ("conditioning.label", "label_emb"),
    ("inlet", "input_blocks.0.0"),
    ("outlet.0", "out.0"),
    ("outlet.2", "out.2"),
]


_ADM: dict[str, Any] = {
    "attention": (32, 16, 8), "head_channels": 64, "middle": True, "resample": "block",
    "time_scale": 1000.0, "groups": "all",
}  # fmt: skip
PUBLISHED: dict[str, tuple[UNet, tuple[int, ...], int | None]] = {
    "imagenet64": (UNet(192, (1, 2, 3, 4), 3, **_ADM), (3, 64, 64), 1000),
    "lsun256": (UNet(256, (1, 1, 2, 2, 4, 4), 2, told="add", **_ADM), (3, 256, 256), None),
}


def load(
    path_or_state_dict: str | Path | Weights,
    *,
    scalings: Scalings | None = None,
    head_channels: int = 64,
    image_size: int | None = None,
    new_attention_order: bool = False,
) -> Preconditioned:
    """An official checkpoint as a denoiser, `D(x, sigma, label) -> x0`.

    Args:
        path_or_state_dict: The file, its URL, or what `torch.load` gave.
        scalings: `EDMScalings()` for a diffusion model, `ConsistencyScalings()` for a consistency
            model. Read off an official file's name, else required: the weights do not tell, and
            the wrong one gives slightly wrong images without an error.
        head_channels: Channels of one attention head, which the weights do not tell either.
        image_size: Of the images; by default the coarsest features are 8x8, as in every official
            model.
        new_attention_order: As guided-diffusion's flag of this name, for its own checkpoints,
            which save attention as 1-D convolutions: its 64x64 model has it, the others do not.

    Note: guided-diffusion's models predict the noise at numbered time steps: their scalings are
        `IDDPMScalings` or `VPScalings`, and the network is then told the time step itself.

    Raises:
        ValueError: If the file cannot be read without running code, is of another kind, or its
            weights are not those of one network.

    Source: Song et al. (2023), App. C; openai/consistency_models, `cm/unet.py`.
    """
    return read(
        path_or_state_dict,
        scalings=scalings,
        head_channels=head_channels,
        image_size=image_size,
        new_attention_order=new_attention_order,
    ).model()


def read(
    path_or_state_dict: str | Path | Weights,
    *,
    scalings: Scalings | None = None,
    head_channels: int = 64,
    image_size: int | None = None,
    new_attention_order: bool = False,
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
        state, origin = read_pt(file), str(file)
    if not any(name in state for name in FIRST):
        raise ValueError(
            f"{origin} is not a U-Net of openai/consistency_models: {looks_like(state)}"
        )
    scalings = scalings or _scalings(origin)
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1; got {image_size}")
    try:
        network, shape, classes = _architecture(state, head_channels, image_size)
        if not isinstance(scalings, EDMScalings | ConsistencyScalings):
            network = replace(network, time_scale=1.0)  # c_noise is the time step itself
        net = skeleton(network, shape, classes)
    except KeyError as error:
        raise ValueError(f"{origin} was cut short: it has no {error.args[0]}") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{origin} holds no network of openai/consistency_models: {error}"
        ) from error
    names = _names(network, net.state_dict())
    expected = {theirs: net.state_dict()[ours].shape for ours, theirs in names.items()}
    state = _modern(state, head_channels, new_attention_order)
    try:
        check_fit(expected, state, origin)
    except ValueError as error:
        raise ValueError(f"{error}{_nearest(state)}") from None
    weights = {ours: state[theirs].float() for ours, theirs in names.items()}
    return Foreign(network, shape, classes, scalings, weights, origin)


def export(model: Preconditioned, network: UNet) -> Weights:
    """A model of ours as a state dict in the official layout, for `torch.save`.

    Args:
        model: To be exported.
        network: What its network was built from.

    Raises:
        ValueError: If the official code has no such network.

    Source: as `load`.
    """
    check_official(network)
    state = model.net.state_dict()
    return {theirs: state[ours].detach().clone() for ours, theirs in _names(network, state).items()}


def check_official(network: UNet) -> None:
    """Refuse a U-Net with switches that the official code does not have.

    Raises:
        ValueError: Naming them.

    Source: openai/consistency_models, `cm/unet.py`.
    """
    official: dict[str, Any] = {
        "patch": 1, "middle": True, "time_scale": 1000.0, "groups": "all", "two_times": False,
        "label_dropout": 0.0,
    }  # fmt: skip
    odd = [f"{k} = {getattr(network, k)}" for k, v in official.items() if getattr(network, k) != v]
    if odd:
        raise ValueError(
            f"the official U-Net knows no {', '.join(odd)}; it needs "
            + ", ".join(f"{k} = {v}" for k, v in official.items())
        )


def read_pt(path: Path) -> Weights:
    """The tensors of a file that PyTorch saved; nothing in it is run.

    Raises:
        ValueError: If there is no such file, it is of another kind, would run code, or is damaged.

    Source: PyTorch, `torch.load` with `weights_only`.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; `cmbook get` lists the official ones")
    with path.open("rb") as file:
        start = file.read(16)
    if not start.startswith((b"PK", b"\x80")):  # an archive, or what came before archives
        begins = f"it begins with {start!r}" if start else "it is empty"
        raise ValueError(f"{path} is no file that PyTorch saved: {begins}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and loading it would run code; it was not loaded"
        ) from error
    except Exception as error:  # a damaged archive may raise anything
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path} is damaged: {reason}") from error
    return check_weights(state, str(path))


def _nearest(state: Weights) -> str:
    """The published network that comes nearest to some weights, if one comes near."""
    shared: dict[str, float] = {}
    for name, (network, shape, classes) in PUBLISHED.items():
        ours = skeleton(network, shape, classes).state_dict()
        theirs = _names(network, ours)
        fits = sum(
            theirs[n] in state and state[theirs[n]].shape == w.shape for n, w in ours.items()
        )
        shared[name] = fits / len(ours)
    best = max(shared, key=lambda name: shared[name])
    if shared[best] < 0.5:
        return ""
    return (
        f". The recipes {best}/* would fit: {shared[best]:.0%} of their network's weights are there"
    )


def _scalings(origin: str) -> Scalings:
    """By the name of an official file."""
    kind = re.fullmatch(
        r"(edm|cd|ct)_(imagenet64|bedroom256|cat256)(_ema|_l2|_lpips)?\.pt",
        Path(origin).resolve().name,
    )
    if kind is None:
        raise ValueError(
            f"{origin} does not tell whether it is a diffusion model or a consistency model; say "
            "scalings=EDMScalings() or scalings=ConsistencyScalings(); on the command line, "
            "--kind diffusion or --kind consistency"
        )
    return EDMScalings() if kind[1] == "edm" else ConsistencyScalings()


def _architecture(
    state: Weights, head_channels: int, image_size: int | None
) -> tuple[UNet, tuple[int, ...], int | None]:
    """The network, read off names and shapes."""
    if head_channels < 1:
        raise ValueError(f"head_channels must be at least 1; got {head_channels}")
    there = {part: _numbers(state, part) for part in ("input_blocks", "output_blocks")}
    count = {part: 1 + max(numbers) for part, numbers in there.items()}
    if max(count.values()) > len(state):
        raise ValueError("its blocks are numbered beyond the number of its weights")
    lost = [j for j in range(count["output_blocks"]) if j not in there["output_blocks"]]
    if lost:
        raise KeyError(f"output_blocks.{lost[0]}")
    doubles = [
        n for n in state if re.fullmatch(r"output_blocks\.\d+\.[12]\..*(conv|layers\.2)\.weight", n)
    ]
    gaps = count["input_blocks"] - len(there["input_blocks"])
    halvings = len(doubles) or gaps  # averages have no weights and leave only a gap
    if count["output_blocks"] % (halvings + 1):  # every resolution has as many
        raise KeyError(f"output_blocks.{count['output_blocks']}")
    blocks = count["output_blocks"] // (halvings + 1) - 1
    firsts = [1 + level * (blocks + 1) for level in range(halvings + 1)]
    channels = state["time_embed.0.weight"].shape[1]
    widths = [state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in firsts]
    if any(width % channels for width in widths):
        raise ValueError(f"{widths} channels are no whole multiples of its first {channels}")
    coarsest = [
        level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in state
    ]
    side = image_size or COARSEST * 2**halvings
    resample: Any = (
        "block" if any("layers" in n for n in doubles) else "conv" if doubles else "plain"
    )
    told = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    classes = state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None
    network = UNet(
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=blocks,
        attention=tuple(side // 2**level for level in coarsest),
        head_channels=head_channels,
        middle=True,
        resample=resample,
        told="add" if told == widths[0] else "scale-shift",
        time_scale=1000.0,
        groups="all",
    )
    return network, (state["input_blocks.0.0.weight"].shape[1], side, side), classes


def _numbers(state: Weights, part: str) -> set[int]:
    """Of the blocks of a part that have weights."""
    numbers = {int(m[1]) for n in state if (m := re.match(rf"{part}\.(\d+)\.", n))}
    if not numbers:
        raise KeyError(part)
    return numbers


def _names(network: UNet, ours: dict[str, Any]) -> dict[str, str]:
    """Our names to theirs."""
    return {name: _theirs(name, network, ours) for name in ours}


def _theirs(name: str, network: UNet, ours: dict[str, Any]) -> str:
    part, *path = name.split(".")
    if part not in ("down", "middle", "up"):
        return next(f"{b}{name.removeprefix(a)}" for a, b in OUTSIDE if name.startswith(f"{a}."))
    index, inner = int(path[0]), ".".join(path[1:])
    attends, inner = inner.startswith("attention."), inner.removeprefix("attention.")
    pairs = ATTENTION if attends else [p for p in INSIDE if p[1] != ("conv", "op")[part == "up"]]
    layer = next(f"{b}{inner.removeprefix(a)}" for a, b in pairs if inner.startswith(f"{a}."))
    if part == "middle":
        return f"middle_block.{1 if attends else 2 * index}.{layer}"
    if part == "down":
        return f"input_blocks.{index + 1}.{int(attends)}.{layer}"
    level, block = divmod(index, network.blocks + 2)
    j = level * (network.blocks + 1) + min(block, network.blocks)
    if block > network.blocks:  # it doubles, in the last block's own group
        beside = any(n.startswith(f"up.{index - 1}.attention") for n in ours)
        return f"output_blocks.{j}.{1 + beside}.{layer}"
    return f"output_blocks.{j}.{int(attends)}.{layer}"


def _modern(state: Weights, head_channels: int, new_attention_order: bool) -> Weights:
    """Weights of guided-diffusion as the released code of the paper has them.

    It saved the attention's 1x1 convolutions as 1-D ones, with channels (head, which of the
    three, dimension of the head), and for a learned variance as many channels more at the end.
    """
    new = dict(state)
    for name, weight in state.items():
        if not name.endswith(("qkv.weight", "proj_out.weight")) or weight.dim() != 3:
            continue
        new[name] = weight[..., None]
        if name.endswith("qkv.weight") and not new_attention_order:
            bias = name.replace("weight", "bias")
            for part in [part for part in (name, bias) if part in new]:
                if new[part].shape[0] % (3 * head_channels):
                    raise ValueError(
                        f"{part} has {new[part].shape[0]} channels, not a multiple of "
                        f"3 x head_channels = {3 * head_channels}"
                    )
                new[part] = rearrange(
                    new[part], "(h three d) ... -> (three h d) ...", three=3, d=head_channels
                )
    images = state["input_blocks.0.0.weight"].shape[1]
    last = {name: state[name] for name in ("out.2.weight", "out.2.bias") if name in state}
    new |= {n: w[:images] for n, w in last.items() if len(w) == 2 * images}
    return new
