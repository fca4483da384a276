"""Any checkpoint that a door knows, as a folder of ours: `cmbook sample` reads it like a run."""

from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import cmbook
from cmbook import checkpoints, experiment
from cmbook.data import Images, fingerprint
from cmbook.experiment import Experiment, Sampling, Training
from cmbook.interop import openai
from cmbook.interop.foreign import Foreign, looks_like
from cmbook.interop.official import local, published
from cmbook.losses import EDM, ConsistencyTraining
from cmbook.parameterization import AnyScalings, ConsistencyScalings, Scalings

SECOND = 22  # of 40 levels: where the paper's ImageNet models are evaluated a second time


def read(source: str | Path, *, scalings: Scalings | None = None, **knobs: Any) -> Foreign:
    """A model from elsewhere, through the door that fits what lies there.

    Args:
        source: A file, its URL, or a folder of diffusers.
        scalings: Where the file does not tell what kind of model it is.
        **knobs: For the door: `head_channels` and `image_size` of the official U-Net.

    Raises:
        ValueError: If there is nothing, or no door fits.

    Source: ours.
    """
    path = local(source)
    if not path.exists():
        raise ValueError(
            f"there is nothing at {path}; `cmbook get` lists the official checkpoints, and "
            "`cmbook get NAME` fetches one"
        )
    if path.is_dir():
        from cmbook.interop.diffusers import read as read_diffusers

        return read_diffusers(path, scalings=scalings)
    if path.suffix == ".pkl":
        from cmbook.interop import edm

        return edm.read(path)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return openai.read(path, scalings=scalings, **knobs)
    if path.suffix == ".safetensors":
        return _by_names(_tensors(path), path, scalings, knobs)
    from cmbook.interop import jcm

    return jcm.read(path, scalings=scalings)


def convert(
    source: str | Path, folder: Path, *, scalings: Scalings | None = None, **knobs: Any
) -> Path:
    """Write a model from elsewhere as a folder of ours, with weights, recipe and record.

    The recipe is not that of its authors: it says what the model is, how to sample from it, and
    how one would go on training it here. The record names the file that it was made from.

    Args:
        source: As in `read`.
        folder: Must not exist yet.
        scalings: As in `read`.
        **knobs: As in `read`.

    Raises:
        ValueError: As `read`; or if the folder exists.

    Source: ours; sampling as the authors published it.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; name another folder")
    foreign = read(source, scalings=scalings, **knobs)
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
    return folder


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


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def _by_names(
    weights: dict[str, torch.Tensor], path: Path, scalings: Scalings | None, knobs: dict[str, Any]
) -> Foreign:
    """Bare tensors, through the door whose names they have."""
    if "input_blocks.0.0.weight" in weights:
        return openai.read(weights, scalings=scalings, **knobs)
    if any(name.removeprefix("model.") == "map_layer0.weight" for name in weights):
        from cmbook.interop import edm

        return edm.read(weights, scalings=scalings)
    raise ValueError(f"no door fits {path}: {looks_like(weights)}")
