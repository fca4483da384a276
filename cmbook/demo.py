"""The demonstration: a teacher, a distilled and a trained consistency model, on real digits.

Every model is measured on 5,000 images with the held-out label frequencies against the held-out
digits, in pixel space. The Frechet distance is biased by the number of images, so all models draw
the same number. Two rows of real data show how low it can go.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmbook import disk, experiment, plotting
from cmbook.data import Digits, TensorData
from cmbook.evaluation import frechet_distance, nearest_distance, precision_recall
from cmbook.experiment import Experiment
from cmbook.noise import PerImage, integers, seeded
from cmbook.ode import Counted
from cmbook.protocols import Denoiser, Generator, Samples
from cmbook.runs import Run, clear, run
from cmbook.samplers import multistep, ode_sample, one_step, prior

IMAGES = 5000
Sampler = Callable[[Denoiser, Samples, Tensor, Generator], Samples]


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        name: Who made the images.
        nfe: Network evaluations per image, counted.
        ms_per_image: Milliseconds per image, in batches of 1,000.
        frechet: Frechet distance to the held-out digits, in pixel space.
        precision: Share of the images that look real.
        recall: Share of the held-out digits that the images cover.
        nearest_train: Mean distance to the nearest training digit; 0 is memorization.
        seconds_training: Seconds of training, without the teacher's.
    """

    name: str
    nfe: int | None
    ms_per_image: float | None
    frechet: float
    precision: float
    recall: float
    nearest_train: float
    seconds_training: float | None


def demo(
    out: Path = Path("runs/demo"),
    seed: int = 0,
    overwrite: bool = False,
    overrides: tuple[str, ...] = (),
    progress: bool = True,
) -> list[Row]:
    """Train the three models, then write `demo.png` and `report.json` into a folder.

    Runs that are already finished there are used as they are, interrupted ones go on.

    Args:
        out: The folder.
        seed: Of everything.
        overwrite: Start from nothing.
        overrides: Settings for all three recipes, such as `training.steps=100`.
        progress: Show bars.

    Returns:
        The rows of the report.

    Source: ours.
    """
    recipes = {name: recipe_of(name, out, seed, overrides) for name in ("edm", "cd", "ct")}
    if overwrite:  # all at once: students of the old teacher would not fit the new one
        for name in recipes:
            clear(out / name)
    edm, cd, ct = (trained(recipe, out / name, progress) for name, recipe in recipes.items())
    data = edm.recipe.data.build()
    assert isinstance(data, TensorData)
    rows, pictures = _real_rows(data, seed)
    samplers = {
        "teacher, {} evaluations": (edm, walk_of(edm)),
        "teacher, forced to {}": (edm, jump_of(edm)),
        "CD, {} evaluation": (cd, multistep_of(cd, 1)),
        "CD, {} evaluations": (cd, multistep_of(cd, 2)),
        "CT, {} evaluation": (ct, multistep_of(ct, 1)),
        "CT, {} evaluations": (ct, multistep_of(ct, 2)),
    }
    for name, (made, sampler) in samplers.items():
        row, picture = measure(name, made, sampler, data, seed)
        rows.append(row)
        pictures[row.name] = picture
    with plotting.book_style():
        title = "Handwritten digits from noise: every model starts from the same noise"
        plotting.save(plotting.image_rows(pictures, title), out / "demo.png")
    _write_report(out / "report.json", rows, (edm, cd, ct))
    return rows


def table(rows: list[Row]) -> str:
    """The report as text.

    Source: ours.
    """
    head = ("", "NFE", "ms/image", "Frechet", "precision", "recall", "nearest", "training")
    lines = [[*head]]
    for row in rows:
        ms, seconds = row.ms_per_image, row.seconds_training
        lines.append(
            [
                row.name,
                "" if row.nfe is None else str(row.nfe),
                "" if ms is None else f"{ms:.3f}",
                f"{row.frechet:.2f}",
                f"{row.precision:.2f}",
                f"{row.recall:.2f}",
                f"{row.nearest_train:.2f}",
                "" if seconds is None else f"{seconds:.0f} s",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def recipe_of(name: str, out: Path, seed: int, overrides: tuple[str, ...]) -> Experiment:
    """One of the three recipes; all are read before the first is trained."""
    text = experiment.recipe_text(f"digits/{name}")
    recipe = experiment.loads(text, [f"seed={seed}", *overrides])
    if recipe.data != Digits():
        raise ValueError(f"the demonstration is about labelled digits; got {recipe.data}")
    if recipe.teacher is not None:
        recipe = replace(recipe, teacher=(out / "edm").as_posix())
    return recipe


def trained(recipe: Experiment, folder: Path, progress: bool) -> Run:
    """The run of one recipe: loaded if it is there, gone on with if it was interrupted."""
    there = (folder / "experiment.toml").is_file()
    return run(recipe, folder, resume=there, progress=progress)


def walk_of(made: Run) -> Sampler:
    """The sampler that walks the ODE as the recipe says."""
    knobs = made.recipe.sampling

    def sample(model: Denoiser, x: Samples, label: Tensor, generator: Generator) -> Samples:
        noise_range = made.recipe.noise_range
        return ode_sample(model, x, noise_range, label, levels=knobs.levels, solver=knobs.solver)

    return sample


def jump_of(made: Run) -> Sampler:
    """The sampler that takes one evaluation, of whatever model."""

    def sample(model: Denoiser, x: Samples, label: Tensor, generator: Generator) -> Samples:
        return one_step(model, x, made.recipe.noise_range, label)

    return sample


def multistep_of(made: Run, steps: int) -> Sampler:
    """The sampler that takes the first `steps` noise levels of the recipe."""
    sigmas = torch.tensor(made.recipe.sampling.sigmas[:steps], dtype=torch.float64)

    def sample(model: Denoiser, x: Samples, label: Tensor, generator: Generator) -> Samples:
        noise_range = made.recipe.noise_range
        return multistep(model, x, sigmas, label, noise_range=noise_range, generator=generator)

    return sample


def measure(
    name: str, made: Run, sampler: Sampler, data: TensorData, seed: int
) -> tuple[Row, Samples]:
    """5,000 images, measured; and ten of them, one of each class, to look at."""
    real, like = data.held_out(), torch.empty(1, *data.shape)
    assert real.label is not None
    labels = real.label[torch.arange(IMAGES) % len(real.label)]
    counted, made_images, seconds = Counted(made.model), [], 0.0
    generator = seeded(seed, "demo", "images")
    for label in labels.split(1000):
        x = prior(like.expand(len(label), *data.shape), made.recipe.noise_range, generator)
        start = time.perf_counter()
        made_images.append(sampler(counted, x, label, generator))
        seconds += time.perf_counter() - start
    nfe = counted.nfe // len(made_images)
    samples = torch.cat(made_images).clamp(-1, 1)
    digits = torch.arange(10)
    one_each = PerImage([1000 * (seed + 1) + int(d) for d in digits])
    x = prior(like.expand(10, *data.shape), made.recipe.noise_range, one_each)
    picture = sampler(made.model, x, digits, one_each)
    row = _row(name.format(nfe), samples, data)
    return (
        replace(row, nfe=nfe, ms_per_image=1000 * seconds / IMAGES, seconds_training=made.seconds),
        picture,
    )


def _real_rows(data: TensorData, seed: int) -> tuple[list[Row], dict[str, Samples]]:
    """The floor: the training digits, once each and drawn 5,000 times, against the held-out."""
    real = data.held_out()
    assert real.label is not None
    assert data.label is not None
    generator = seeded(seed, "demo", "real")
    drawn = []
    for label in real.label[torch.arange(IMAGES) % len(real.label)].tolist():
        same = (data.label == label).nonzero()[:, 0]
        drawn.append(same[integers(1, len(same), generator)])
    first = torch.stack([(real.label == d).nonzero()[0, 0] for d in range(10)])
    rows = [
        _row(f"real: the {len(data.x):,} training digits", data.x, data),
        _row(f"real: {IMAGES:,} draws from them", data.x[torch.cat(drawn)], data),
    ]
    return rows, {"real": real.x[first]}


def _row(name: str, samples: Samples, data: TensorData) -> Row:
    real = data.held_out().x
    precision, recall = precision_recall(samples, real)
    return Row(
        name=name,
        nfe=None,
        ms_per_image=None,
        frechet=frechet_distance(samples, real),
        precision=precision,
        recall=recall,
        nearest_train=nearest_distance(samples, data.x),
        seconds_training=None,
    )


def _write_report(path: Path, rows: list[Row], runs: tuple[Run, ...]) -> None:
    report: dict[str, Any] = {
        "data": "scikit-learn digits, 8x8, pixel space",
        "images": IMAGES,
        "reference": "the held-out digits",
        "record": runs[0].record,
        "rows": [vars(row) for row in rows],
    }
    with disk.replacing(path) as file:
        file.write(f"{json.dumps(report, indent=1)}\n".encode())
