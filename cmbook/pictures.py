"""Pictures in files: read one, and edit it with a run. What `cmbook edit` does.

This stands on floor 4, beside `runs`: it needs a model and what is recorded of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from cmbook.data.prepare import decoded
from cmbook.data.readers import bounded
from cmbook.editing import (
    STROKE_SIGMAS,
    Downsampling,
    Grayscale,
    Inpainting,
    Measurement,
    denoise,
    edit,
    interpolate,
    stroke,
)
from cmbook.noise import add_noise, normal
from cmbook.parameterization import ConsistencyScalings
from cmbook.protocols import Generator, Grid, Labels, Samples
from cmbook.runs import Run
from cmbook.samplers import prior
from cmbook.schedules import check_choice, karras_sigmas

if TYPE_CHECKING:
    from PIL import Image

Task = Literal["inpaint", "colorize", "superres", "stroke", "denoise", "interpolate"]


@dataclass(frozen=True)
class Edited:
    """What came of an edit.

    Attributes:
        given: What the model was given to see, one image, at the size of the model.
        results: What it made of it.

    Source: ours.
    """

    given: Tensor
    results: Samples


def read_picture(path: Path, channels: int, size: tuple[int, int], *, fit: bool = False) -> Samples:
    """A picture file as one image `(1, channels, height, width)` in [-1, 1].

    Args:
        path: PNG, JPEG, BMP, GIF, WebP, TIFF or PPM.
        channels: 1 turns it gray, 3 makes it RGB; transparency lies on white.
        size: Height and width.
        fit: Whether a picture of another size is cropped at its center and resized.

    Raises:
        ValueError: If the file is no picture, has another size, or has no 8-bit colors.

    Source: ours.
    """
    import numpy as np
    from PIL import Image, ImageOps

    picture = _opened(path, channels)
    height, width = size
    if picture.size != (width, height):
        if not fit:
            raise ValueError(
                f"{path} is {picture.size[0]}x{picture.size[1]} pixels, expected "
                f"{width}x{height}; --fit crops and resizes it"
            )
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32))
    return (pixels.view(height, width, channels).permute(2, 0, 1) / 127.5 - 1)[None]


def _opened(path: Path, channels: int) -> "Image.Image":
    if channels not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels; this model has {channels}")
    try:
        return decoded(bounded(path), channels)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def edit_picture(
    made: Run,
    task: Task,
    image: Path | None = None,
    mask: Path | None = None,
    *,
    n: int = 1,
    label: Labels | None = None,
    levels: int | None = None,
    sigma: float | None = None,
    factor: int | None = None,
    fit: bool = False,
    generator: Generator,
) -> Edited:
    """Edit the picture in a file with a consistency model.

    Args:
        made: The run of the model.
        task: `"inpaint"` fills in where the mask is white; `"colorize"` keeps the brightness;
            `"superres"` keeps the means of patches, of a small picture or of one that is first
            made small; `"stroke"` starts from a rough painting; `"denoise"` adds noise to the
            picture and removes it in one evaluation; `"interpolate"` needs no picture and goes
            from one sample to another.
        image: The picture.
        mask: For `"inpaint"`: white where to fill in, of the same size.
        n: How many results; for `"interpolate"` the pictures on the way.
        label: Classes of the results, if the model has them.
        levels: Evaluations, on the grid of the paper: by default 40, and for `"stroke"` 2.
        sigma: For `"denoise"` how much noise (default 0.3), for `"stroke"` where to start.
        factor: For `"superres"`: how much smaller a picture is made first. Leave it out if the
            picture is small already.
        fit: Whether pictures of another size are cropped and resized.
        generator: Draws all noise.

    Raises:
        ValueError: If the model cannot do this, or something is missing, of the wrong size, or
            not used by the task.

    Source: Song et al. (2023), Algorithm 4 and App. D.
    """
    check_choice("task", task, get_args(Task))
    shape = tuple(made.record["shape"])
    _check(made, task, image, mask, n, sigma, factor, levels, fit, shape)
    noise_range, device = made.recipe.noise_range, next(made.model.parameters()).device
    options: dict[str, Any] = {"label": label, "noise_range": noise_range, "generator": generator}
    if task == "interpolate":
        path = _interpolated(made, n, None if label is None else label[:1], generator, device)
        return Edited(path[:1], path)
    assert image is not None  # _check has seen to it
    given = _given(task, image, shape, factor, fit).to(device)
    copies = given.expand(n, *given.shape[1:])
    if task == "stroke":
        painted = stroke(made.model, copies, sigmas=_stroke_sigmas(sigma, levels, made), **options)
        return Edited(given, painted)
    if task == "denoise":
        amount = torch.full((n,), 0.3 if sigma is None else sigma, device=device)
        noisy = add_noise(copies, normal(copies, generator), amount)
        return Edited(noisy[:1], denoise(made.model, noisy, amount, label))
    measure = _measurement(task, given, shape, mask, factor, fit)
    y = copies if given.shape[2] != shape[1] else measure(copies)
    seen = y[:1].expand(-1, shape[0], -1, -1) if task == "colorize" else measure.pinv(y[:1])
    sigmas = None if levels is None else noise_range.grid(levels)
    return Edited(seen, edit(made.model, y, measure, sigmas=sigmas, **options))


def _given(
    task: Task, image: Path, shape: tuple[int, ...], factor: int | None, fit: bool
) -> Samples:
    """The picture at the size of the model, or smaller for `"superres"` without a factor."""
    size = shape[1], shape[2]
    if task == "superres" and factor is None:
        return _small(image, shape[0], size)
    if task == "superres" and not fit:
        width, height = _opened(image, shape[0]).size
        if height < size[0] and width < size[1]:
            raise ValueError(
                f"{image} is {width}x{height} pixels, small already; leave out --factor, which is "
                f"for a picture of {size[1]}x{size[0]}"
            )
    return read_picture(image, shape[0], size, fit=fit)


def _measurement(
    task: Task,
    given: Samples,
    shape: tuple[int, ...],
    mask: Path | None,
    factor: int | None,
    fit: bool,
) -> Measurement:
    """What of the picture is known."""
    if task == "colorize":
        return Grayscale()
    if task == "superres":
        return Downsampling(shape[1] // given.shape[2] if factor is None else factor)
    assert mask is not None  # _check has seen to it
    white = read_picture(mask, 1, (shape[1], shape[2]), fit=fit)[0] > 0
    if bool(white.all()) or not bool(white.any()):
        raise ValueError(
            f"{mask} is all {'white' if bool(white.any()) else 'black'}; a mask is white where to "
            "fill in and black where to keep the picture"
        )
    return Inpainting(~white.to(given.device))


def _stroke_sigmas(sigma: float | None, levels: int | None, made: Run) -> Grid:
    """The paper's two levels, scaled to start elsewhere; or so many, down to sigma_min."""
    noise_range = made.recipe.noise_range
    top = min(STROKE_SIGMAS[0], noise_range.sigma_max) if sigma is None else sigma
    if levels is not None:
        return karras_sigmas(levels + 1, noise_range.sigma_min, top, noise_range.rho)[:-1]
    sigmas = torch.tensor(STROKE_SIGMAS, dtype=torch.float64) * (top / STROKE_SIGMAS[0])
    return sigmas[sigmas > noise_range.sigma_min]  # below, a model returns what it is given


def _interpolated(
    made: Run, n: int, label: Labels | None, generator: Generator, device: torch.device
) -> Tensor:
    """`n` samples on the way from one to another."""
    noise_range, like = made.recipe.noise_range, torch.empty(1, *made.record["shape"])
    start, end = (prior(like, noise_range, generator).to(device) for _ in range(2))
    return interpolate(made.model, start, end, n, noise_range, label)[:, 0]


def _small(image: Path, channels: int, size: tuple[int, int]) -> Tensor:
    """A picture whose size divides that of the model."""
    width, height = _opened(image, channels).size
    factor = size[0] // height
    if factor < 2 or (height * factor, width * factor) != size:
        raise ValueError(
            f"{image} is {width}x{height} pixels; a small picture must be 1/2, 1/4, ... of "
            f"{size[1]}x{size[0]}. To make a large one small first, say --factor 2"
        )
    return read_picture(image, channels, (height, width))


def _check(
    made: Run,
    task: Task,
    image: Path | None,
    mask: Path | None,
    n: int,
    sigma: float | None,
    factor: int | None,
    levels: int | None,
    fit: bool,
    shape: tuple[int, ...],
) -> None:
    """Refuse what cannot work, before anything is read or drawn."""
    if not isinstance(made.recipe.scalings, ConsistencyScalings):
        raise ValueError(
            f"{made.folder} is a diffusion model; editing needs a consistency model, such as "
            "cmbook train digits/cd makes"
        )
    if len(shape) != 3:
        raise ValueError(f"{made.folder} makes samples of shape {shape}, which are no pictures")
    if task == "colorize" and shape[0] != 3:
        raise ValueError(f"{made.folder} makes gray pictures; colorize needs a model of 3 channels")
    if task == "interpolate" and image is not None:
        raise ValueError("interpolate goes from one sample to another; leave out --image")
    if task != "interpolate" and image is None:
        raise ValueError(f"{task} needs a picture, --image FILE")
    if (task == "inpaint") != (mask is not None):
        missing = "needs a mask, --mask FILE, white where to fill in"
        raise ValueError(
            f"{task} " + (missing if mask is None else "has no mask; leave out --mask")
        )
    used = {"sigma": ("denoise", "stroke"), "factor": ("superres",)}
    for name, value in (("sigma", sigma), ("factor", factor)):
        if value is not None and task not in used[name]:
            raise ValueError(f"--{name} is for {' and '.join(used[name])}, not for {task}")
    low, high = made.recipe.noise_range.sigma_min, made.recipe.noise_range.sigma_max
    if sigma is not None and not low < sigma <= high:
        raise ValueError(
            f"--sigma must lie within the model's range, above {low:g} and up to {high:g}; got "
            f"{sigma:g}"
        )
    if fit and task == "superres" and factor is None:
        raise ValueError(
            "--fit makes a picture as large as the model's, and superres without --factor needs a "
            "small one; leave out --fit, or say --factor 2"
        )
    if fit and task == "interpolate":
        raise ValueError("interpolate reads no picture; leave out --fit")
    if n < (2 if task == "interpolate" else 1):
        least = "2, the two ends" if task == "interpolate" else "1"
        raise ValueError(f"--n must be at least {least}; got {n}")
    if levels is not None and (task in ("denoise", "interpolate") or levels < 2):
        raise ValueError(
            f"--levels is at least 2, for tasks of several evaluations; got {levels} for {task}"
        )


__all__ = ["Edited", "Task", "edit_picture", "read_picture"]
