"""Models of diffusers: consistency models in and out, and teachers of other kinds as denoisers.

A folder of `ConsistencyModelPipeline` holds `unet/config.json` and its weights, in which

    time_embedding.linear_{1,2}            the two layers that tell σ
    class_embedding                        the classes, if there are any
    conv_in, conv_norm_out, conv_out       the ends
    down_blocks.L.resnets.N                a block, .attentions.N its attention
    down_blocks.L.downsamplers.0           the one that halves
    mid_block.resnets.{0,1}, .attentions.0 the middle
    up_blocks.L.resnets.N, .upsamplers.0   the way up; L counts from the coarsest

Its attention keeps queries, keys and values apart, as 2-D layers. Reading a folder does not need
diffusers itself; pipelines and teachers do: `pip install 'cmbook[diffusers]'`.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from cmbook.interop.foreign import Foreign, Weights, check_fit, read_safetensors, skeleton
from cmbook.interop.openai import check_official, read_pt
from cmbook.networks import UNet
from cmbook.noise import NoiseRange
from cmbook.parameterization import (
    ConsistencyScalings,
    EDMScalings,
    Preconditioned,
    Scalings,
)
from cmbook.protocols import Labels, PerSample, Samples

LARGEST = 100_000  # of the numbers of a config
Prediction = Literal["epsilon", "v_prediction", "sample"]
OUTSIDE = [  # (ours, theirs) outside the blocks
    ("conditioning.layers.0", "time_embedding.linear_1"),
    ("conditioning.layers.2", "time_embedding.linear_2"),
    ("conditioning.label", "class_embedding"),
    ("inlet", "conv_in"),
    ("outlet.0", "conv_norm_out"),
    ("outlet.2", "conv_out"),
]
INSIDE = [  # (ours, theirs) inside a block
    ("before.0", "norm1"),
    ("before.2", "conv1"),
    ("told", "time_emb_proj"),
    ("norm", "norm2"),
    ("after.2", "conv2"),
    ("skip", "conv_shortcut"),
    ("convolution", "conv"),
]
FIXED: dict[str, Any] = {  # settings whose other values our U-Net does not compute
    "act_fn": "silu", "add_attention": True, "center_input_sample": False,
    "class_embed_type": None, "flip_sin_to_cos": True, "freq_shift": 0,
    "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32,
    "mid_block_type": "UNetMidBlock2D", "time_embedding_type": "positional",
    "downsample_padding": 1, "time_embedding_dim": None,
}  # fmt: skip


def load(
    source: Any, *, scalings: Scalings | None = None, image_size: int | None = None
) -> Preconditioned:
    """A consistency model of diffusers, or a bare `UNet2DModel`, as a denoiser.

    Args:
        source: A folder of a `ConsistencyModelPipeline` or of a `UNet2DModel`, or such an object.
        scalings: What kind of model a bare U-Net is; a pipeline's scheduler tells.
        image_size: Where the settings do not tell.

    Raises:
        ValueError: If there is no such model, its files are damaged or would run code, or it has
            settings that our U-Net does not compute.

    Source: diffusers, `ConsistencyModelPipeline` and `UNet2DModel`.
    """
    return read(source, scalings=scalings, image_size=image_size).model()


def read(
    source: Any, *, scalings: Scalings | None = None, image_size: int | None = None
) -> Foreign:
    """As `load`, but in parts: network, shape, classes, scalings, and weights by our names.

    Raises:
        ValueError: As `load`.

    Source: as `load`.
    """
    if isinstance(source, str | Path):
        config, state, scheduler = _folder(Path(source))
        origin = str(source)
    else:
        unet = getattr(source, "unet", source)
        if not hasattr(unet, "config") or not hasattr(unet, "state_dict"):
            raise ValueError(f"expected a pipeline or U-Net of diffusers; got {type(source)}")
        config, state, origin = dict(unet.config), dict(unet.state_dict()), type(source).__name__
        scheduler = dict(source.scheduler.config) if hasattr(source, "scheduler") else None
        if scheduler is not None:
            scheduler.setdefault("_class_name", type(source.scheduler).__name__)
    scalings = scalings or _scalings(scheduler, origin)
    network, shape, classes = _network(config, image_size, origin)
    if not isinstance(scalings, EDMScalings | ConsistencyScalings):
        network = replace(network, time_scale=1.0)  # c_noise is the time step itself
    if network.blocks > len(state):
        raise ValueError(f"{origin} was cut short: it has only {len(state)} weights")
    ours = skeleton(network, shape, classes).state_dict()
    names = {name: _theirs(name, network) for name in ours}
    expected = {
        theirs: size
        for name, pieces in names.items()
        for theirs, size in zip(pieces, _shapes(ours[name], pieces), strict=True)
    }
    check_fit(expected, state, origin)
    weights = {
        name: torch.cat([state[piece].float() for piece in pieces]).view(ours[name].shape)
        for name, pieces in names.items()
    }
    return Foreign(network, shape, classes, scalings, weights, origin)


def export(model: Preconditioned, network: UNet) -> Weights:
    """A model of ours as the state dict of a `UNet2DModel`.

    Args:
        model: To be exported.
        network: What its network was built from.

    Raises:
        ValueError: If diffusers has no such network.

    Source: as `load`.
    """
    check_official(network)
    weights: Weights = {}
    for name, weight in model.net.state_dict().items():
        pieces = _theirs(name, network)
        parts = weight.detach().chunk(len(pieces))
        for piece, part, shape in zip(pieces, parts, _shapes(weight, pieces), strict=True):
            weights[piece] = part.reshape(shape).clone()
    return weights


def pipeline(model: Preconditioned, network: UNet, *, levels: int = 40) -> Any:
    """A consistency model of ours as a `ConsistencyModelPipeline`.

    The pipeline clips its images to [-1, 1], and draws random classes if it is given none.

    Args:
        model: Of `ConsistencyScalings`.
        network: What its network was built from.
        levels: Of the grid in which the pipeline's `timesteps` are indices, counted from the end.

    Raises:
        ValueError: If diffusers is missing, the model is no consistency model, or diffusers has
            no such network.

    Source: diffusers, `ConsistencyModelPipeline`.
    """
    theirs = _diffusers()
    if not isinstance(model.scalings, ConsistencyScalings):
        raise ValueError(f"ConsistencyModelPipeline holds consistency models; got {model.scalings}")
    net: Any = model.net
    unet = theirs.UNet2DModel(**config_of(network, net.shape, net.conditioning.classes))
    unet.load_state_dict(export(model, network))
    r = model.scalings.noise_range
    scheduler = theirs.CMStochasticIterativeScheduler(
        num_train_timesteps=levels, sigma_min=r.sigma_min, sigma_max=r.sigma_max,
        sigma_data=r.sigma_data, rho=r.rho,
    )  # fmt: skip
    return theirs.ConsistencyModelPipeline(unet=unet.eval(), scheduler=scheduler)


def save(model: Preconditioned, network: UNet, folder: Path, *, levels: int = 40) -> Path:
    """Write a consistency model of ours as a folder that diffusers opens.

    Args:
        model: As in `pipeline`.
        network: As in `pipeline`.
        folder: Must not exist yet.
        levels: As in `pipeline`.

    Raises:
        ValueError: As `pipeline`; or if the folder exists.

    Source: diffusers, `save_pretrained`.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; name another folder")
    made = pipeline(model, network, levels=levels)
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    made.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def config_of(network: UNet, shape: tuple[int, ...], classes: int | None) -> dict[str, Any]:
    """The settings of the `UNet2DModel` that computes what a U-Net of ours does.

    Raises:
        ValueError: If there is none.

    Source: diffusers, `UNet2DModel`.
    """
    check_official(network)
    if network.resample == "plain" or network.head_channels is None or network.heads_up:
        raise ValueError(
            "diffusers needs resample = 'block' or 'conv', and head_channels in place of heads; "
            f"got {network}"
        )
    attends = [
        shape[1] // 2**level in network.attention for level in range(len(network.multipliers))
    ]
    block = network.resample == "block"
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if block
        else ("DownBlock2D", "UpBlock2D")
    )
    down = ["AttnDownBlock2D" if attend else plain[0] for attend in attends]
    up = ["AttnUpBlock2D" if attend else plain[1] for attend in reversed(attends)]
    shifts = network.told == "scale-shift"
    return {
        "sample_size": shape[1],
        "in_channels": shape[0],
        "out_channels": shape[0],
        "layers_per_block": network.blocks,
        "num_class_embeds": classes,
        "block_out_channels": [network.channels * m for m in network.multipliers],
        "attention_head_dim": network.head_channels,
        "down_block_types": down,
        "up_block_types": up,
        "resnet_time_scale_shift": "scale_shift" if shifts else "default",
        "attn_norm_num_groups": 32,
        "upsample_type": "resnet" if block else "conv",
        "downsample_type": "resnet" if block else "conv",
        "dropout": network.dropout,
    }


# ── teachers of other kinds ──


@dataclass(frozen=True)
class StepScalings:
    r"""The scalings of a network that was trained at numbered time steps, as DDPM is.

    Its noisy samples have variance about 1: $x_{vp} = x / \sqrt{1 + \sigma^2}$, with
    $\sigma = \sqrt{(1 - \bar\alpha)/\bar\alpha}$. What it predicts is

    - `epsilon`, the noise: $D = x - \sigma F$;
    - `v_prediction`: $D = x / (1 + \sigma^2) - \sigma F / \sqrt{1 + \sigma^2}$;
    - `sample`, the clean sample: $D = F$.

    The network is told the time step, which between trained levels is interpolated in ln σ.
    Outside them it is told the nearest end, while x is still scaled by its true σ: below the least
    level it removes a little less noise than there is, above the largest it takes x for what the
    last step would have been. A last level without signal (σ infinite) is left out.

    Attributes:
        noise_range: From the least to the largest trained level.
        prediction: What the network says.
        levels: σ of every time step, rising.

    Source: Ho et al. (2020), eq. 4; Salimans and Ho (2022), App. D; Karras et al. (2022), Table 1.
    """

    noise_range: NoiseRange
    prediction: Prediction
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise ValueError(
                f"prediction must be one of {', '.join(get_args(Prediction))}; got "
                f"{self.prediction!r}"
            )

    def c_skip(self, sigma: PerSample) -> PerSample:
        """How much of x passes by the network."""
        if self.prediction == "epsilon":
            return torch.ones_like(sigma)
        return 1 / (1 + sigma**2) if self.prediction == "v_prediction" else torch.zeros_like(sigma)

    def c_out(self, sigma: PerSample) -> PerSample:
        """The scale of the network's output."""
        if self.prediction == "epsilon":
            return -sigma
        return -sigma * self.c_in(sigma) if self.prediction == "v_prediction" else sigma**0

    def c_in(self, sigma: PerSample) -> PerSample:
        """The scale of the network's input."""
        return 1 / (1 + sigma**2).sqrt()

    def c_noise(self, sigma: PerSample) -> PerSample:
        """The time step, fractional between trained levels."""
        logs = torch.tensor(self.levels, dtype=torch.float64, device=sigma.device).log()
        at = sigma.double().clamp(min=1e-300).log().clamp(logs[0], logs[-1])
        right = torch.searchsorted(logs, at).clamp(1, len(logs) - 1)
        share = (at - logs[right - 1]) / (logs[right] - logs[right - 1])
        return (right - 1 + share).to(sigma.dtype)


@dataclass(frozen=True)
class FlowScalings:
    r"""The scalings of a flow-matching network: $x_t = (1 - t)\,x_0 + t z$, and F is $z - x_0$.

    With $\sigma = t/(1 - t)$ the sample is $x_t = x/(1 + \sigma)$, so
    $D = (x - \sigma F)/(1 + \sigma)$.

    Every σ has its t, so nothing lies outside; t = 1, pure noise, is σ = ∞.

    Attributes:
        noise_range: σ from which to which one walks.
        steps: What t = 1 is called.

    Source: Lipman et al. (2023), eq. 20 to 23; diffusers, `FlowMatchEulerDiscreteScheduler`.
    """

    noise_range: NoiseRange = NoiseRange()
    steps: int = 1000

    def c_skip(self, sigma: PerSample) -> PerSample:
        """How much of x passes by the network."""
        return 1 / (1 + sigma)

    def c_out(self, sigma: PerSample) -> PerSample:
        """The scale of the network's output."""
        return -sigma / (1 + sigma)

    def c_in(self, sigma: PerSample) -> PerSample:
        """The scale of the network's input."""
        return 1 / (1 + sigma)

    def c_noise(self, sigma: PerSample) -> PerSample:
        """t, in time steps."""
        return self.steps * sigma / (1 + sigma)


def teacher(unet: nn.Module, scheduler: Any) -> Preconditioned:
    """A diffusion model of another kind as a denoiser, for walks and for distillation.

    Args:
        unet: Called as `unet(sample, timestep, class_labels=..., return_dict=False)`, such as a
            `UNet2DModel`. Channels beyond those of the sample, a learned variance, are left out.
        scheduler: The scheduler that it was trained with: of DDPM's family (with
            `alphas_cumprod`), or flow matching.

    Raises:
        ValueError: If the scheduler is of neither kind.

    Source: `StepScalings` and `FlowScalings`.
    """
    config = scheduler.config
    if hasattr(scheduler, "alphas_cumprod"):
        signal = scheduler.alphas_cumprod.double()
        sigmas = ((1 - signal) / signal).sqrt()
        levels = tuple(sigmas[: -1 if sigmas[-1].isinf() else None].tolist())
        if not 0 < levels[0] < levels[-1] < float("inf") or sorted(set(levels)) != list(levels):
            raise ValueError(f"the scheduler's alphas_cumprod must fall from below 1; got {signal}")
        noise_range = NoiseRange(sigma_min=levels[0], sigma_max=levels[-1])
        scalings: Scalings = StepScalings(noise_range, config.prediction_type, levels)
    elif type(scheduler).__name__.startswith("FlowMatch"):
        scalings = FlowScalings(steps=config.num_train_timesteps)
    else:
        raise ValueError(
            f"{type(scheduler).__name__} is neither of DDPM's family, with alphas_cumprod, nor of "
            "flow matching"
        )
    return Preconditioned(_Told(unet), scalings).eval().requires_grad_(False)


class _Told(nn.Module):
    """A network of diffusers, called as ours are."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Samples, c_noise: PerSample, label: Labels | None = None) -> Samples:
        told = {} if label is None else {"class_labels": label}
        out = self.unet(x, c_noise, **told, return_dict=False)[0]
        return cast(Tensor, out[:, : x.shape[1]])


# ── files and names ──


def _diffusers() -> Any:
    try:
        import diffusers

        _ = (
            diffusers.ConsistencyModelPipeline
        )  # diffusers imports its parts when they are asked for
    except ImportError as error:
        raise ValueError("this needs diffusers: pip install 'cmbook[diffusers]'") from error
    except RuntimeError as error:
        raise ValueError(
            f"diffusers cannot be used here: {str(error).splitlines()[-1]}. If that names "
            "torchvision, it is not of the torch that is installed"
        ) from error
    return diffusers


def _folder(folder: Path) -> tuple[dict[str, Any], Weights, dict[str, Any] | None]:
    """Settings and weights of the U-Net, and the settings of the scheduler, if there is one."""
    whole = (folder / "model_index.json").is_file()
    place = folder / "unet" if whole else folder
    config = _json(place / "config.json")
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(
            f"{place} holds {config.get('_class_name')!r}; only UNet2DModel can be read"
        )
    scheduler = _json(folder / "scheduler/scheduler_config.json") if whole else None
    file = place / "diffusion_pytorch_model.safetensors"
    older = file.with_suffix(".bin")
    if not file.is_file() and older.is_file():
        return config, read_pt(older), scheduler
    return config, read_safetensors(file), scheduler


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} is missing: is this a folder of diffusers?") from error
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a table of settings; it holds {type(found).__name__}")
    return found


def _scalings(scheduler: dict[str, Any] | None, origin: str) -> Scalings:
    """By the scheduler beside the network."""
    if scheduler is None:
        raise ValueError(
            f"{origin} is a bare U-Net; say scalings=EDMScalings() or "
            "scalings=ConsistencyScalings(); on the command line, --kind"
        )
    if scheduler.get("_class_name") != "CMStochasticIterativeScheduler":
        raise ValueError(
            f"{origin} has the scheduler {scheduler.get('_class_name')!r}, so it is no consistency "
            "model; cmbook.interop.diffusers.teacher makes a denoiser of it"
        )
    names = ("sigma_min", "sigma_max", "rho", "sigma_data")
    try:
        given = {name: float(scheduler[name]) for name in names if name in scheduler}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{origin}: the scheduler's settings are no numbers: {error}") from error
    return ConsistencyScalings(NoiseRange(**given))


def _network(
    config: dict[str, Any], image_size: int | None, origin: str
) -> tuple[UNet, tuple[int, ...], int | None]:
    """Our U-Net of these settings."""
    odd = [f"{k} = {config[k]!r}" for k, v in FIXED.items() if k in config and config[k] != v]
    try:
        sides = list(config["block_out_channels"])
        down, up = list(config["down_block_types"]), list(config["up_block_types"])
        attends = ["Attn" in kind for kind in down]
        shifts = config.get("resnet_time_scale_shift", "default") == "scale_shift"
        kinds = {config.get(f"{way}sample_type", "conv") for way in ("up", "down")}
        known = {"AttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"}
        odd += [f"down_block_types with {kind}" for kind in down if kind not in known]
        if attends != ["Attn" in kind for kind in reversed(up)]:
            odd.append("attention at other sides on the way up than on the way down")
        if kinds not in ({"resnet"}, {"conv"}):
            odd.append(f"resampling by {', '.join(sorted(map(str, kinds)))}")
        if config.get("attn_norm_num_groups", 32 if not shifts else None) != 32 and shifts:
            odd.append("attention without normalization by 32 groups")
        if any(side % sides[0] for side in sides):
            odd.append(f"block_out_channels = {sides}")
        if odd:
            raise ValueError(
                f"{origin} has settings that our U-Net does not compute: {'; '.join(odd)}"
            )
        side = config["sample_size"] if image_size is None else image_size
        channels, counts = config["in_channels"], [config["layers_per_block"], side]
        counts += [config["in_channels"], config["attention_head_dim"], config["num_class_embeds"]]
        if any(type(n) is not int or not 0 < n <= LARGEST for n in counts if n is not None):
            raise ValueError(
                f"{origin}: layers_per_block, sample_size, in_channels, attention_head_dim and "
                f"num_class_embeds must be whole numbers in 1 ... {LARGEST}"
            )
        if config["attention_head_dim"] is None:
            raise ValueError(f"{origin}: attention_head_dim must be given")
        if side is None or config["out_channels"] != channels:
            raise ValueError(
                f"{origin}: sample_size and channels must be whole numbers; say image_size"
            )
        network = UNet(
            channels=sides[0],
            multipliers=tuple(wide // sides[0] for wide in sides),
            blocks=config["layers_per_block"],
            attention=tuple(side // 2**level for level, yes in enumerate(attends) if yes),
            head_channels=config["attention_head_dim"],
            middle=True,
            resample="block" if kinds == {"resnet"} else "conv",
            told="scale-shift" if shifts else "add",
            time_scale=1000.0,
            groups="all",
            dropout=float(config.get("dropout", 0.0)),
        )
        return network, (channels, side, side), config.get("num_class_embeds")
    except KeyError as error:
        raise ValueError(f"{origin}: the settings of the U-Net lack {error.args[0]!r}") from error
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{origin}: the settings of the U-Net are odd: {error}") from error


def _theirs(name: str, network: UNet) -> list[str]:
    """Their names of one weight of ours: one, or three of an attention's qkv."""
    part, *path = name.split(".")
    if part not in ("down", "middle", "up"):
        return [next(f"{b}{name.removeprefix(a)}" for a, b in OUTSIDE if name.startswith(f"{a}."))]
    index, inner, per_level = int(path[0]), ".".join(path[1:]), network.blocks + 1 + (part == "up")
    level, n = divmod(index, per_level)
    resampler = part != "middle" and n == per_level - 1
    place = "mid_block" if part == "middle" else f"{part}_blocks.{level}"
    number = index if part == "middle" else 0 if resampler else n
    group = ("downsamplers" if part == "down" else "upsamplers") if resampler else "resnets"
    if inner.startswith("attention."):
        kind, end = inner.removeprefix("attention.").split(".")
        own = f"{place}.attentions.{0 if part == 'middle' else number}"
        layers = {"norm": ["group_norm"], "qkv": ["to_q", "to_k", "to_v"], "out": ["to_out.0"]}[
            kind
        ]
        return [f"{own}.{layer}.{end}" for layer in layers]
    return [next(
        f"{place}.{group}.{number}.{b}{inner.removeprefix(a)}" for a, b in INSIDE
        if inner.startswith(f"{a}.")
    )]  # fmt: skip


def _shapes(ours: Tensor, pieces: list[str]) -> list[tuple[int, ...]]:
    """Of what one weight of ours is there: layers of attention are 2-D, not 1x1 convolutions."""
    flat = ".attentions." in pieces[0]
    shape = (ours.shape[0] // len(pieces), *(ours.shape[1:2] if flat else ours.shape[1:]))
    return [shape] * len(pieces)
