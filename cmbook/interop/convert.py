"""Any checkpoint that a door knows, as a folder of ours: `cmbook sample` reads it like a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import torch

import cmbook
from cmbook import checkpoints, experiment
from cmbook.data import Images, fingerprint
from cmbook.experiment import Experiment, Sampling, Training
from cmbook.interop import edm, jcm, openai
from cmbook.interop.foreign import Foreign, Weights, read_safetensors
from cmbook.interop.official import local, published
from cmbook.interop.openai import read_pt
from cmbook.losses import EDM, ConsistencyTraining
from cmbook.parameterization import AnyScalings, ConsistencyScalings, Scalings
from cmbook.runs import Run, load

SECOND = 22  # of 40 levels: where the paper's ImageNet models are evaluated a second time


def read(
    source: str | Path,
    *,
    scalings: Scalings | None = None,
    head_channels: int | None = None,
    image_size: int | None = None,
) -> Foreign:
    """A model from elsewhere, through the door that fits what lies there.

    Args:
        source: A file, its URL, or a folder of diffusers.
        scalings: What kind of model it is; needed where the file does not tell.
        head_channels: Of an official U-Net, whose weights do not tell; by default 64.
        image_size: Where the file does not tell.

    Raises:
        ValueError: If there is nothing, no door fits, or its door takes no such argument.

    Source: ours.
    """
    path = local(source)
    if not path.exists():
        raise ValueError(
            f"there is nothing at {path}; `cmbook get` lists the official checkpoints, and "
            "`cmbook get NAME` fetches one"
        )
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"{path} is neither a file nor a folder")
    if (path / "manifest.json").is_file():
        raise ValueError(f"{path} is a folder of cmbook already: cmbook sample {path}")
    try:
        door, takes = _door(path)
        given = {"head_channels": head_channels, "image_size": image_size}
        knobs = {name: value for name, value in given.items() if value is not None}
        for name in knobs:
            if name not in takes:
                raise ValueError(f"{path} tells its {name}; leave it out")
        foreign: Foreign = door(path, scalings=scalings, **knobs)
        return foreign
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a model: {error!r}") from error
    except TypeError as error:
        raise ValueError(f"{path} cannot be read as a model: {error}") from error


def _door(path: Path) -> tuple[Callable[..., Foreign], set[str]]:
    """Who reads what lies there, by its contents, and which arguments that takes."""
    if path.is_dir():
        from cmbook.interop.diffusers import read as read_diffusers

        return read_diffusers, {"image_size"}
    if path.suffix == ".pkl":
        return edm.read, set()
    with path.open("rb") as file:
        first = file.read(9)
    if first[:2] == b"PK" or path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return _by_names(read_pt(path))
    if path.suffix == ".safetensors" or first[8:] == b"{":
        return _by_names(read_safetensors(path))
    return jcm.read, {"image_size"}


def _by_names(weights: Weights) -> tuple[Callable[..., Foreign], set[str]]:
    """Whose names tensors have; the official U-Net's door says what is wrong with others."""
    if any(name.removeprefix("model.") == "map_layer0.weight" for name in weights):
        return edm.read, set()

    def official(path: Path, *, scalings: Scalings | None, **knobs: Any) -> Foreign:
        if path.suffix != ".safetensors":
            return openai.read(path, scalings=scalings, **knobs)
        return openai.read(weights, scalings=scalings, **knobs)

    return official, {"head_channels", "image_size"}


def convert(
    source: str | Path,
    folder: Path,
    *,
    scalings: Scalings | None = None,
    head_channels: int | None = None,
    image_size: int | None = None,
) -> Run:
    """Write a model from elsewhere as a folder of ours, with weights, recipe and record.

    The recipe is not that of its authors: it says what the model is, how to sample from it, and
    how one would go on training it here. The record names the file that it was made from.

    Args:
        source: As in `read`.
        folder: Must not exist yet.
        scalings: As in `read`.
        head_channels: As in `read`.
        image_size: As in `read`.

    Returns:
        The folder, loaded.

    Raises:
        ValueError: As `read`; or if the folder exists.

    Source: ours; sampling as the authors published it.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; name another folder")
    foreign = read(source, scalings=scalings, head_channels=head_channels, image_size=image_size)
    model = foreign.model()
    record = {
        "seed": 0,
        "shape": list(foreign.shape),
        "classes": foreign.classes or 0,
        "data_sha256": "",
        "origin": str(source),
        "weights_sha256": fingerprint(*foreign.weights.values()),
        "cmbook": cmbook.__version__,
        "torch": torch.__version__,
        "step": 0,
    }
    text = f"{experiment.dumps(recipe_of(foreign))}\n{tomli_w.dumps({'record': record})}"
    checkpoints.share(folder, model, text)
    return load(folder)


def recipe_of(foreign: Foreign) -> Experiment:
    """A recipe around a model from elsewhere: to sample from it, and to go on training it.

    Raises:
        ValueError: If its scalings are of a kind that recipes cannot name.

    Source: ours; sampling as the authors published it.
    """
    scalings, noise_range = foreign.scalings, foreign.scalings.noise_range
    if not isinstance(scalings, AnyScalings):
        raise ValueError(
            f"a recipe knows no {type(scalings).__name__}; use the model in Python, as load gave it"
        )
    consistent = isinstance(scalings, ConsistencyScalings)
    known, sigmas = published(foreign.origin), [noise_range.sigma_max]
    if consistent:
        grid = noise_range.grid(40).tolist()
        sigmas = known.sigmas(noise_range) if known and known.second else [grid[0], grid[SECOND]]
    side = foreign.shape[-1]
    return Experiment(
        data=Images(path="data/images", size=side, labelled=bool(foreign.classes)),
        objective=ConsistencyTraining(noise_range) if consistent else EDM(noise_range),
        scalings=scalings,
        network=foreign.network,
        noise_range=noise_range,
        sampling=Sampling(levels=known.levels if known else 18, sigmas=tuple(sigmas)),
        training=Training(),
    )
