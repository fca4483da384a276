"""Networks of NVlabs/edm, Karras et al. (2022): DDPM++, NCSN++ and the ADM.

A released file is a pickle of a dictionary whose entry `ema` is a preconditioner around a network
(`cmbook.interop.inert` reads it). Its state dict, with R the side of the features:

    model.map_layer{0,1}                          the two layers that tell σ
    model.map_noise.freqs                         random frequencies, in turns (NCSN++)
    model.map_label, model.map_augment            classes and augmentation, if told
    model.enc.RxR_conv                            the first convolution
    model.enc.RxR_{down,blockN}                   blocks on the way down
    model.enc.RxR_aux_residual                    the image, shown again (NCSN++)
    model.dec.RxR_{in0,in1}                       the middle
    model.dec.RxR_{blockN,up}                     blocks on the way up
    model.dec.RxR_aux_{norm,conv}, out_{norm,conv}    the end of SongUNet, of DhariwalUNet
    ....{conv0,skip,aux_residual}.resample_filter     constants, which we check and drop

Four layouts differ. The channels of qkv are (head, dimension, which of the three). SongUNet puts
sines before cosines, so what meets them is turned by half: columns of the first layer, and what
is said of class and augmentation. It multiplies a class's one-hot vector by the square root of
their number, and adds a bias: a row of ours is all of that. No class is the vector 0.
"""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cmbook.interop.foreign import (
    Foreign,
    Weights,
    check_fit,
    check_weights,
    looks_like,
    read_safetensors,
    skeleton,
)
from cmbook.interop.inert import Inert, number, read_pickle, table, tensors
from cmbook.interop.official import local
from cmbook.interop.openai import read_pt
from cmbook.networks import NCSNpp, UNet
from cmbook.networks.blocks import check_dropout
from cmbook.noise import NoiseRange
from cmbook.parameterization import (
    AnyScalings,
    ConsistencyScalings,
    EDMScalings,
    IDDPMScalings,
    Preconditioned,
    Scalings,
    VEScalings,
    VPScalings,
)

Song = NCSNpp  # SongUNet of the repository; its DhariwalUNet is our UNet
BLOCK = [  # (ours, theirs) inside a block
    ("before.0", "norm0"),
    ("before.2", "conv0"),
    ("told", "affine"),
    ("norm", "norm1"),
    ("after.2", "conv1"),
    ("skip", "skip"),
    ("attention.norm", "norm2"),
    ("attention.qkv", "qkv"),
    ("attention.out", "proj"),
]
OUTSIDE = [  # (ours, theirs) outside the blocks
    ("conditioning.sinusoids.frequencies", "map_noise.freqs"),
    ("conditioning.augment", "map_augment"),
    ("conditioning.layers.0", "map_layer0"),
    ("conditioning.layers.2", "map_layer1"),
]
LABEL = "conditioning.label.weight"
TAPS: dict[int, tuple[int, ...]] = {2: (1, 1), 4: (1, 3, 3, 1)}  # by their number
ADM_SETTINGS: dict[str, Any] = {  # of every DhariwalUNet
    "head_channels": 64, "heads_up": None, "middle": True, "resample": "block",
    "told": "scale-shift", "time_scale": 1.0, "groups": "quarters", "patch": 1, "two_times": False,
}  # fmt: skip
SONG_SETTINGS: dict[str, Any] = {"heads": 1, "two_times": False}  # of every SongUNet
BLOCK_NAME = re.compile(r"enc\.(\d+)x\1_block(\d+)\.conv1\.weight")
VP_NUMBERS = ("beta_d", "beta_min", "epsilon_t")


def load(
    path_or_state_dict: str | Path | Weights,
    *,
    scalings: Scalings | None = None,
    label_dropout: float | None = None,
) -> Preconditioned:
    """A network of NVlabs/edm as a denoiser, `D(x, sigma, label) -> x0`.

    Args:
        path_or_state_dict: A released pickle such as `edm-cifar10-32x32-uncond-vp.pkl`, or a
            state dict, its file or itself, with or without `model.` before its names.
        scalings: By default those of the pickle, and `EDMScalings()` for a dictionary. A file of
            bare tensors does not tell, nor does a pickle of an unknown class.
        label_dropout: Above 0, the network can be called without a class, which is the official
            vector 0; by default as it was trained. Networks trained without give something that
            nobody trained.

    Note: An ADM's `map_augment` is dropped: without augmentation it adds 0. So are a second half
        of output channels, the variance of iDDPM.

    Raises:
        ValueError: If there is no such file, it is damaged or would run code, it is of another
            kind, or its weights are not those of one network.

    Source: Karras et al. (2022), Tables 1 and 7; NVlabs/edm, `training/networks.py`.
    """
    return read(path_or_state_dict, scalings=scalings, label_dropout=label_dropout).model()


def read(
    path_or_state_dict: str | Path | Weights,
    *,
    scalings: Scalings | None = None,
    label_dropout: float | None = None,
) -> Foreign:
    """As `load`, but in parts: network, shape, classes, scalings, and weights by our names.

    Raises:
        ValueError: As `load`.

    Source: as `load`.
    """
    own: AnyScalings | None = EDMScalings()
    origin, dropped = "the state dict", 0.0
    if isinstance(path_or_state_dict, dict):
        state = check_weights(path_or_state_dict, origin)
    else:
        file = local(path_or_state_dict)
        origin = str(file)
        state, own, dropped = _read_file(file)
    scalings = scalings or own
    if scalings is None:
        raise ValueError(
            f"{origin} does not tell how its network becomes a denoiser; say "
            "scalings=EDMScalings() or another; on the command line, --kind"
        )
    dropped = dropped if label_dropout is None else label_dropout
    check_dropout(dropped, "label_dropout")
    state = {n.removeprefix("model."): w for n, w in state.items() if n != "u"}  # levels of iDDPM
    if "map_layer0.weight" not in state:
        raise ValueError(f"{origin} is not a network of NVlabs/edm: {looks_like(state)}")
    try:
        network, shape = _architecture(state)
    except (KeyError, IndexError, StopIteration) as error:
        what = error.args[0] if error.args else "convolution at its beginning or end"
        raise ValueError(f"{origin} was cut short: it has no {what}") from error
    classes = state["map_label.weight"].shape[1] if "map_label.weight" in state else None
    network = replace(network, label_dropout=dropped if classes else 0.0)
    state = _trimmed(state, network, shape[0])
    names = _names(network, shape, classes)
    check_fit(_expected(names, network, shape, classes), state, origin)
    _check_filters(state, origin)
    weights = {ours: _turned(theirs, state[theirs], network) for ours, theirs in names.items()}
    if classes:
        weights[LABEL] = _rows(state, network)
    weights = {name: weight.float() for name, weight in weights.items()}
    return Foreign(network, shape, classes, scalings, weights, origin)


def export(model: Preconditioned, network: NCSNpp | UNet) -> Weights:
    """A model of ours as a state dict in the official layout, for `EDMPrecond.load_state_dict`.

    Everything comes back bit for bit, but for two things that are rounded: random frequencies,
    which come back as numbers that mean the same ones, and the classes of an `NCSNpp`, whose
    bias is what is said without a class (0 if the network has no `label_dropout`).

    Args:
        model: To be exported.
        network: What its network was built from.

    Raises:
        ValueError: If the official code has no such network.

    Source: as `load`.
    """
    check_official(network)
    state: Weights = {n: w.detach() for n, w in model.net.state_dict().items()}
    shape: tuple[int, ...] = model.net.shape  # type: ignore[assignment]
    classes: int | None = model.net.conditioning.classes  # type: ignore[union-attr, assignment]
    names = _names(network, shape, classes)
    given = {theirs: _turned_back(theirs, state[ours], network) for ours, theirs in names.items()}
    if classes:
        given |= _label(state[LABEL], network, classes)
    given |= {name: _filter(_taps(network)) for name in _filters(network, shape)}
    return {f"model.{name}": weight.clone() for name, weight in given.items()}


def check_official(network: NCSNpp | UNet) -> None:
    """Refuse a network with switches that the official code does not have.

    Raises:
        ValueError: Naming them.

    Source: NVlabs/edm, `training/networks.py`.
    """
    official = SONG_SETTINGS if isinstance(network, Song) else ADM_SETTINGS
    odd = [f"{k} = {getattr(network, k)}" for k, v in official.items() if getattr(network, k) != v]
    if odd:
        raise ValueError(
            f"the networks of NVlabs/edm know no {', '.join(odd)}; they need "
            + ", ".join(f"{k} = {v}" for k, v in official.items())
        )


# ── files ──


def _read_file(path: Path) -> tuple[Weights, AnyScalings | None, float]:
    """The state dict of a file, its scalings if it tells them, and its label_dropout."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix in (".pt", ".pth"):
        return read_pt(path), None, 0.0
    if path.suffix == ".safetensors":
        return read_safetensors(path), None, 0.0
    held = read_pickle(path)
    if isinstance(held, dict) and not isinstance(held, Inert):
        held = held.get("ema", held)
    if not isinstance(held, Inert):
        return check_weights(held, str(path)), None, 0.0
    inner = table(held, "_modules").get("model")
    dropped = number(inner, "label_dropout", 0.0) if isinstance(inner, Inert) else 0.0
    return check_weights(tensors(held), str(path)), _scalings(held), dropped


def _scalings(precond: Inert) -> AnyScalings | None:
    """By the class of the preconditioner and its numbers.

    The range is that of EDM's sampler, within what the model supports.
    """
    told, levels = partial(number, precond), NoiseRange()
    levels = NoiseRange(
        max(levels.sigma_min, told("sigma_min", 0.0)),
        min(levels.sigma_max, told("sigma_max", math.inf)),
        sigma_data=told("sigma_data", levels.sigma_data),
    )
    if precond.name == "VPPrecond":
        numbers = {name: told(name, getattr(VPScalings, name)) for name in VP_NUMBERS}
        return VPScalings(levels, **numbers, steps=int(told("M", VPScalings.steps)))
    if precond.name == "VEPrecond":
        return VEScalings(levels)
    if precond.name == "iDDPMPrecond":
        numbers = {name: told(name, getattr(IDDPMScalings, name)) for name in ("C_1", "C_2")}
        return IDDPMScalings(levels, **numbers, M=int(told("M", IDDPMScalings.M)))
    if precond.name == "ECMPrecond":
        return ConsistencyScalings(levels)
    return EDMScalings(levels) if precond.name == "EDMPrecond" else None


# ── architecture ──


def _architecture(state: Weights) -> tuple[NCSNpp | UNet, tuple[int, ...]]:
    """The network, read off names and shapes."""
    first = next(n for n in state if re.fullmatch(r"enc\.\d+x\d+_conv\.weight", n))
    width, pixels = state[first].shape[:2]
    blocks = [(int(m[1]), int(m[2])) for m in map(BLOCK_NAME.match, state) if m]
    if not blocks:
        raise KeyError("enc.*_block0.conv1.weight")
    if max(block for _, block in blocks) > len(state):
        raise ValueError("its blocks are numbered beyond the number of its weights")
    sides = sorted({side for side, _ in blocks}, reverse=True)
    song = "out_conv.weight" not in state
    channels = width if song else state["map_layer0.weight"].shape[1]
    common: dict[str, Any] = {
        "channels": channels,
        "multipliers": tuple(
            state[f"enc.{r}x{r}_block0.conv1.weight"].shape[0] // channels for r in sides
        ),
        "blocks": 1 + max(block for _, block in blocks),
        "attention": tuple(r for r in sides if f"enc.{r}x{r}_block0.qkv.weight" in state),
    }
    shape = (pixels, sides[0], sides[0])
    if not song:
        return UNet(**common, **ADM_SETTINGS), shape
    if (last := f"dec.{sides[0]}x{sides[0]}_aux_conv.weight") not in state:
        raise KeyError(last)
    filters = [w for n, w in state.items() if n.endswith("resample_filter")]
    network = NCSNpp(
        **common,
        **SONG_SETTINGS,
        embedding="fourier" if "map_noise.freqs" in state else "positional",
        taps=TAPS.get(filters[0].shape[-1], (1, 1)) if filters else (1, 1),
        pyramid=any("aux_residual" in name for name in state),
        augment=state["map_augment.weight"].shape[1] if "map_augment.weight" in state else 0,
    )
    return network, shape


def _blocks(network: NCSNpp | UNet, shape: tuple[int, ...]) -> dict[str, str]:
    """Our places of blocks to theirs, as `down.1` to `enc.16x16_down`."""
    sides = [f"{shape[1] >> i}x{shape[1] >> i}" for i in range(len(network.multipliers))]
    down, up = [], []
    for level, side in enumerate(sides):
        down += [f"enc.{side}_down"] if level else []
        down += [f"enc.{side}_block{i}" for i in range(network.blocks)]
    for level, side in reversed(list(enumerate(sides))):
        up += [f"dec.{side}_block{i}" for i in range(network.blocks + 1)]
        up += [f"dec.{sides[level - 1]}_up"] if level else []
    middle = [f"dec.{sides[-1]}_in{i}" for i in (0, 1)]
    parts = {"down": down, "middle": middle, "up": up}
    return {f"{part}.{i}": name for part, names in parts.items() for i, name in enumerate(names)}


def _names(network: NCSNpp | UNet, shape: tuple[int, ...], classes: int | None) -> dict[str, str]:
    """Our names to theirs, of all weights but the classes'."""
    side, blocks = f"{shape[1]}x{shape[1]}", _blocks(network, shape)
    end = f"dec.{side}_aux" if isinstance(network, Song) else "out"
    pairs = [*OUTSIDE, ("inlet", f"enc.{side}_conv")]
    pairs += [("outlet.0", f"{end}_norm"), ("outlet.2", f"{end}_conv")]
    pairs += [(f"{a}.{x}", f"{b}.{y}") for a, b in blocks.items() for x, y in BLOCK]
    shown = [f"enc.{shape[1] >> i}x{shape[1] >> i}" for i in range(1, len(network.multipliers))]
    pairs += [(f"pyramid.{i}.convolution", f"{b}_aux_residual") for i, b in enumerate(shown)]
    known = dict(pairs)
    names = {}
    for ours in skeleton(network, shape, classes).state_dict():
        place, _, last = ours.rpartition(".")
        if ours != LABEL:
            names[ours] = known[ours] if ours in known else f"{known[place]}.{last}"
    return names


def _filters(network: NCSNpp | UNet, shape: tuple[int, ...]) -> list[str]:
    """Names of the constants that blur."""
    places = [b for b in _blocks(network, shape).values() if b.endswith(("_down", "_up"))]
    names = [f"{place}.{layer}" for place in places for layer in ("conv0", "skip")]
    if isinstance(network, Song) and network.pyramid:
        names += [p.replace("_down", "_aux_residual") for p in places if p.endswith("_down")]
    return [f"{name}.resample_filter" for name in names]


def _expected(
    names: dict[str, str], network: NCSNpp | UNet, shape: tuple[int, ...], classes: int | None
) -> dict[str, Any]:
    """Their names, and their shapes."""
    ours = skeleton(network, shape, classes).state_dict()
    expected: dict[str, Any] = {theirs: ours[name].shape for name, theirs in names.items()}
    if classes:
        told = ours[LABEL].shape[1]
        expected["map_label.weight"] = (told, classes)
        expected |= {"map_label.bias": (told,)} if isinstance(network, Song) else {}
    taps = len(_taps(network))
    return expected | {name: (1, 1, taps, taps) for name in _filters(network, shape)}


def _trimmed(state: Weights, network: NCSNpp | UNet, pixels: int) -> Weights:
    """Without what has no use here: see the note of `load`."""
    if isinstance(network, Song):
        return state
    state = {name: weight for name, weight in state.items() if name != "map_augment.weight"}
    if state["out_conv.weight"].shape[0] == 2 * pixels:
        state |= {n: state[n][:pixels] for n in ("out_conv.weight", "out_conv.bias") if n in state}
    return state


# ── layouts ──


def _turned(name: str, weight: Tensor, network: NCSNpp | UNet) -> Tensor:
    """A weight of theirs in our layout."""
    if ".qkv." in name:
        return rearrange(weight, "(hd three) ... -> (three hd) ...", three=3)
    if name == "map_noise.freqs":
        return 2 * math.pi * weight
    return _half_turn(name, weight, network)


def _turned_back(name: str, weight: Tensor, network: NCSNpp | UNet) -> Tensor:
    """A weight of ours in their layout."""
    if ".qkv." in name:
        return rearrange(weight, "(three hd) ... -> (hd three) ...", three=3)
    return _turns(weight) if name == "map_noise.freqs" else _half_turn(name, weight, network)


def _half_turn(name: str, weight: Tensor, network: NCSNpp | UNet) -> Tensor:
    """Cosines before sines, and back."""
    if isinstance(network, Song) and name in ("map_layer0.weight", "map_augment.weight"):
        dim = 1 if name == "map_layer0.weight" else 0
        return weight.roll(weight.shape[dim] // 2, dim)
    return weight


def _turns(radians: Tensor) -> Tensor:
    """Frequencies whose 2π-fold, in float32, is exactly what is given, if there are such."""
    near = (radians.double() / (2 * math.pi)).float()
    ends = near.new_tensor([-math.inf, math.inf])
    for other in (near.nextafter(ends[0]), near.nextafter(ends[1])):
        near = torch.where(2 * math.pi * near == radians, near, other)
    return near


def _rows(state: Weights, network: NCSNpp | UNet) -> Tensor:
    """What is said of every class, and, with label_dropout, of none."""
    rows = state["map_label.weight"].T
    nothing = torch.zeros_like(rows[0])
    if isinstance(network, Song):
        nothing = state["map_label.bias"]
        rows = math.sqrt(len(rows)) * rows + nothing
    if network.label_dropout:
        rows = torch.cat([rows, nothing[None]])
    return rows.roll(rows.shape[1] // 2, 1) if isinstance(network, Song) else rows


def _label(rows: Tensor, network: NCSNpp | UNet, classes: int) -> Weights:
    """The inverse of `_rows`."""
    if not isinstance(network, Song):
        return {"map_label.weight": rows[:classes].T}
    rows = rows.roll(rows.shape[1] // 2, 1).double()
    nothing = rows[classes] if network.label_dropout else torch.zeros_like(rows[0])
    weight = (rows[:classes] - nothing).T / math.sqrt(classes)
    return {"map_label.weight": weight.float(), "map_label.bias": nothing.float()}


def _taps(network: NCSNpp | UNet) -> tuple[int, ...]:
    return network.taps if isinstance(network, Song) else TAPS[2]


def _filter(taps: tuple[int, ...]) -> Tensor:
    row = torch.tensor(taps, dtype=torch.float32, device="cpu")
    return (torch.outer(row, row) / row.sum() ** 2)[None, None]


def _check_filters(state: Weights, origin: str) -> None:
    """Refuse filters that we would not have."""
    for name, weight in state.items():
        if name.endswith("resample_filter") and not weight.is_meta:
            taps = TAPS[weight.shape[-1]]
            if not torch.allclose(weight.float().cpu(), _filter(taps), rtol=0, atol=1e-6):
                raise ValueError(f"{origin} blurs by another filter than {taps}: see {name}")
