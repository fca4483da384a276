"""Pictures: every function takes arrays and an axis, draws, and returns the axis.

None draws random numbers, trains, or calls `show()`. This is the only file that imports
matplotlib.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cmbook.protocols import Path as Path_
from cmbook.protocols import Samples

DATA, TRUTH, TEACHER, CD, CT = "#888888", "#000000", "#0072B2", "#D55E00", "#009E73"


@contextmanager
def book_style() -> Iterator[None]:
    """The look of every figure of the book, inside a `with`.

    Source: ours.
    """
    with as_file(files("cmbook") / "cmbook.mplstyle") as path, style.context(str(path)):
        yield


def use_style() -> None:
    """The look of every figure of the book, from here on: for notebooks.

    Source: ours.
    """
    with as_file(files("cmbook") / "cmbook.mplstyle") as path:
        style.use(str(path))


def scatter(ax: Axes, points: Samples, color: str = DATA, label: str | None = None) -> Axes:
    """A cloud of 2-D points, `(n, 2)`, on equal axes.

    Source: ours.
    """
    x, y = points.detach().cpu().double().T.numpy()
    ax.scatter(x, y, s=3, alpha=0.5, linewidths=0, color=color, label=label)
    ax.set_aspect("equal")
    return ax


def paths(ax: Axes, points: Path_, color: str = TEACHER) -> Axes:
    """The paths of 2-D points, `(levels, n, 2)`, as `trace` gives them.

    Source: ours.
    """
    x, y = points.detach().cpu().double().permute(2, 0, 1).numpy()
    ax.plot(x, y, color=color, alpha=0.5, linewidth=0.8)
    ax.set_aspect("equal")
    return ax


def loss_curve(ax: Axes, steps: Sequence[float], losses: Sequence[float]) -> Axes:
    """A loss against steps, on a logarithmic axis.

    Source: ours.
    """
    ax.plot(steps, losses)
    ax.set(yscale="log", xlabel="step", ylabel="loss")
    return ax


def images(ax: Axes, batch: Samples, columns: int = 10) -> Axes:
    """Images `(n, channels, height, width)` in [-1, 1] as one mosaic; gray ones as ink on paper.

    Source: ours.
    """
    mosaic = _mosaic(batch, columns).numpy()
    if mosaic.shape[2] == 1:
        ax.imshow(1 - mosaic[:, :, 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        ax.imshow(mosaic, interpolation="nearest")
    ax.set_axis_off()
    return ax


def image_rows(rows: Mapping[str, Samples], title: str = "") -> Figure:
    """One row of images for each name: the figure that compares models.

    Source: ours.
    """
    n = max(len(batch) for batch in rows.values())
    figure = Figure(figsize=(0.62 * n + 2.6, 0.62 * len(rows) + (0.5 if title else 0.1)))
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for ax, (name, batch) in zip(axes, rows.items(), strict=True):
        images(ax, batch, columns=n)
        ax.text(-0.02, 0.5, name, transform=ax.transAxes, ha="right", va="center")
    if title:
        figure.suptitle(title, x=0.02, ha="left", fontsize=12)
    return figure


def sheet(samples: Samples) -> Figure:
    """One figure of all samples: a mosaic of images, or a cloud of points.

    Source: ours.
    """
    figure = Figure(figsize=(6, 6))
    ax = figure.subplots()
    if samples.ndim == 4:
        images(ax, samples, columns=min(10, len(samples)))
    else:
        scatter(ax, samples, color=CD)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure; an older file is replaced only by a whole one.

    Source: ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    figure.savefig(unfinished, format=path.suffix.lstrip(".") or "png")
    unfinished.replace(path)


def _mosaic(batch: Samples, columns: int) -> Tensor:
    """Images side by side, one pixel apart: `(height, width, channels)` in [0, 1]."""
    if batch.ndim != 4:
        raise ValueError(f"expected images (n, channels, h, w); got shape {tuple(batch.shape)}")
    n, channels, _, width = batch.shape
    blank = -1.0 if channels == 1 else 1.0  # the color of paper
    tiles = torch.nn.functional.pad(
        batch.detach().cpu().float().clamp(-1, 1), (0, 1, 0, 1), value=blank
    )
    missing = -n % columns
    tiles = torch.cat([tiles, tiles.new_full((missing, *tiles.shape[1:]), blank)])
    grid = tiles.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)
    mosaic: Tensor = grid.reshape(-1, columns * (width + 1), channels)[:-1, :-1]
    return (mosaic + 1) / 2
