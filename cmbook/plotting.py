"""Pictures: every function takes arrays and an axis, draws, and returns the axis.

None draws random numbers, trains, or calls `show()`. This is the only file that imports
matplotlib.
"""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field as field_
from importlib.resources import as_file, files
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from cmbook.disk import replacing
from cmbook.networks.blocks import Attention
from cmbook.oracle import DistanceToTruth
from cmbook.protocols import Path as Path_
from cmbook.protocols import Samples

DATA, TRUTH, TEACHER, CD, CT = "#888888", "#000000", "#0072B2", "#D55E00", "#009E73"
ENDS, BLOCK, RESAMPLE, ATTENTION, BRIDGE = "#333333", "#9FB4C7", "#E69F00", "#CC79A7", "#56B4E9"


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


def field(ax: Axes, points: Samples, arrows: Samples, color: str = TRUTH) -> Axes:
    """Arrows at 2-D points, both `(n, 2)`; the long ones are shortened, their directions kept.

    Source: ours.
    """
    x, y = points.detach().cpu().double().T.numpy()
    length = arrows.detach().cpu().double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    u, v = (arrows.detach().cpu() / length * (length / length.max()).sqrt()).T.numpy()
    ax.quiver(x, y, u, v, color=color, pivot="mid", scale=22, width=0.004)
    ax.set_aspect("equal")
    return ax


def distance(
    ax: Axes, found: DistanceToTruth, quantity: Literal["median", "rms", "off"] = "rms"
) -> Axes:
    """How far a model is from the truth at every noise level, and whose fault it is.

    The bands are 95% intervals.

    Source: ours.
    """
    parts = (("discretization", TEACHER, "--"), ("network", CD, "-."), ("total", TRUTH, "-"))
    for name, color, line in parts:
        value, low, high = (100 * v.cpu() for v in getattr(getattr(found, name), quantity))
        alone = "o" if len(value) == 1 else None
        ax.plot(found.sigmas.cpu(), value, line, color=color, label=name, marker=alone)
        ax.fill_between(found.sigmas.cpu(), low, high, color=color, alpha=0.2, linewidth=0)
    said = {"median": "median distance", "rms": "rms distance", "off": "points off by > ¼ std"}
    unit = "%" if quantity == "off" else "% of the data's std"
    ax.set(xscale="log", xlabel="noise level σ", ylabel=f"{said[quantity]} ({unit})")
    ax.set_ylim(bottom=0)
    ax.legend()
    return ax


@dataclass(frozen=True)
class Film:
    """A short animation: shows itself in a notebook, and can be saved as a GIF.

    Attributes:
        gif: The whole file.

    Source: ours.
    """

    gif: bytes = field_(repr=False)

    def save(self, path: Path) -> None:
        """Write the GIF; an older file is replaced only by a whole one."""
        with replacing(path) as file:
            file.write(self.gif)

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, str]:
        return {"image/gif": b64encode(self.gif).decode(), "text/plain": repr(self)}


def film(
    points: Path_,
    captions: Sequence[str],
    *,
    data: Samples | None = None,
    color: str = TEACHER,
    limit: float = 1.3,
    seconds: float = 5.0,
) -> Film:
    """2-D points on the move, `(frames, n, 2)`: one frame for each caption.

    The last frame is held for a second. With 60 frames of 500 points it weighs about 200 KB.

    Args:
        points: What moves.
        captions: One line of text for each frame.
        data: Points that stand still behind them.
        color: Of the moving points.
        limit: The picture shows [-limit, limit] in both directions.
        seconds: How long it plays, before the last frame is held.

    Raises:
        ValueError: If there are no frames, or not as many captions as frames.

    Source: ours.
    """
    _check_captions(points, captions)
    with book_style():
        figure = Figure(figsize=(3.2, 3.4))
        frames = []
        for cloud, caption in zip(points, captions, strict=True):
            figure.clear()
            _scene(figure.subplots(), cloud, caption, data, color, limit)
            frames.append(_pixels(figure))
    last = len(frames) - 1
    durations = [max(20, round(1000 * seconds / len(frames)))] * last + [1000]
    file = BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return Film(file.getvalue())


def strip(
    points: Path_,
    captions: Sequence[str],
    *,
    data: Samples | None = None,
    color: str = TEACHER,
    limit: float = 1.3,
) -> Figure:
    """The same as a `film`, for paper: one panel for each frame, side by side.

    Raises:
        ValueError: If there are no frames, or not as many captions as frames.

    Source: ours.
    """
    _check_captions(points, captions)
    with book_style():
        figure = Figure(figsize=(min(8.0, 2.0 * len(points)), 2.3))
        axes = figure.subplots(1, len(points), squeeze=False)[0]
        for ax, cloud, caption in zip(axes, points, captions, strict=True):
            _scene(ax, cloud, caption, data, color, limit)
    return figure


def anatomy(ax: Axes, module: nn.Module) -> Axes:
    """A U-Net as its code runs: one box a layer from left to right, one row a resolution.

    A box is as tall as it has channels; one that attends ends in a colored strip. An arc is a
    bridge, from the layer that leaves it to the one that takes it. Dotted lines show the image
    itself to NCSN++, smaller and smaller. Shapes are found by a run without numbers, on the meta
    device: it takes a second at any size, and the module need not have weights.

    Args:
        ax: Where to draw; 8 by 4.4 inches suit the large networks.
        module: What `UNet` or `NCSNpp` built.

    Raises:
        ValueError: If the module has no way down, middle and way up.

    Source: ours; the form is that of Ronneberger et al. (2015), Figure 1.
    """
    if not all(hasattr(module, name) for name in ("inlet", "down", "middle", "up", "joins")):
        raise ValueError(f"only a U-Net can be drawn so; got {type(module).__name__}")
    parts, bridges = _parts(module), _bridges(module)
    rows, bottom = dict[int, float](), 0.0  # the height of each row's middle
    for side in sorted({part.side for part in parts}, reverse=True):
        half = max(part.height for part in parts if part.side == side) / 2
        arcs = [pair for pair in bridges if parts[pair[0]].side == side]
        rows[side] = bottom - 0.3 - 0.1 * len(arcs) - half
        bottom = rows[side] - half
        for depth, (start, end) in enumerate(arcs):  # the innermost first
            x, y = [start, start, end, end], rows[side] + half + 0.1 * (depth + 1)
            ax.plot(x, [rows[side], y, y, rows[side]], color=BRIDGE, lw=1, zorder=0, gid="bridge")
        ax.text(-1.6, rows[side], f"{side} × {side}", ha="right", va="center")
    top, shown = rows[parts[0].side], _shown(module)
    for i in shown:
        y = rows[parts[i].side]
        ax.plot([-0.8, -0.8, i], [top, y, y], ":", color=DATA, lw=1.4, zorder=0, gid="shown")
    for i, part in enumerate(parts):
        _part(ax, i, rows[part.side], part, parts[max(i - 1, 0)])
    heights = [rows[part.side] for part in parts]
    for i, (y, y_next) in enumerate(pairwise(heights)):  # down from a block, up into the next
        turn = (i, y_next) if y_next < y else (i + 1, y)
        ax.plot([i, turn[0], i + 1], [y, turn[1], y_next], color=ENDS, lw=1, zorder=1)
    ax.plot([-1.3, 0], [top, top], [len(parts) - 1, len(parts) + 0.3], [top, top], color=ENDS, lw=1)
    named = {"convolution": ENDS, "residual block": BLOCK, "halves or doubles": RESAMPLE}
    named |= {"then attention": ATTENTION, "bridge": BRIDGE}
    named |= {"the image, smaller": DATA} if shown else {}
    keys = [Patch(color=color, label=name) for name, color in named.items()]
    ax.legend(handles=keys, loc="lower right", fontsize=8, handlelength=1, borderaxespad=0)
    ax.set(xlim=(-1.3, max(len(parts), 14) + 0.3), ylim=(bottom - 0.25, 0))
    ax.set_axis_off()
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
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix.lstrip(".") or "png")


@dataclass(frozen=True)
class _Part:
    """One layer of a U-Net, as it was seen at work; height 1 is that of the most channels."""

    color: str
    channels: int
    side: int
    height: float
    attends: bool


def _parts(net: Any) -> list[_Part]:
    """Inlet, way down, middle, way up and outlet, as they run on an image without numbers."""
    meta, layers = torch.device("meta"), [net.inlet, *net.down, *net.middle, *net.up, net.outlet]
    shapes = list[tuple[int, ...]]()
    hooks = [
        layer.register_forward_hook(lambda _, __, out: shapes.append(out.shape[1:3]))
        for layer in layers
    ]
    state = {name: w.to(meta) for name, w in [*net.named_parameters(), *net.named_buffers()]}
    level = torch.zeros(1, device=meta)
    told = {"label": level.long()} if net.conditioning.label else {}
    told |= {"c_noise_next": level} if net.conditioning.second else {}
    try:
        functional_call(net, state, (torch.zeros(1, *net.shape, device=meta), level), told)
    finally:
        for hook in hooks:
            hook.remove()
    most = max(channels for channels, _ in shapes)
    parts = list[_Part]()
    for layer, (channels, side) in zip(layers, shapes, strict=True):
        color = RESAMPLE if parts and side != parts[-1].side else BLOCK
        color = ENDS if layer in (net.inlet, net.outlet) else color
        attends = isinstance(getattr(layer, "attention", None), Attention)
        parts.append(_Part(color, channels, side, max(channels / most, 0.1), attends))
    return parts


def _bridges(net: Any) -> list[tuple[int, int]]:
    """From which part to which, the innermost first."""
    left, first = list(range(1 + len(net.down))), 1 + len(net.down) + len(net.middle)
    return [(left.pop(), first + i) for i, joins in enumerate(net.joins) if joins]


def _shown(net: Any) -> list[int]:
    """The parts that are shown the image itself: those of NCSN++ that halve."""
    if not len(getattr(net, "pyramid", [])):
        return []
    return [i for i, part in enumerate(net.down, 1) if not isinstance(part.resample, nn.Identity)]


def _part(ax: Axes, x: float, y: float, part: _Part, before: _Part) -> None:
    """A box around its place, its strip, and its channels if it is the first of a kind."""
    bottom = y - part.height / 2
    boxes = [(x - 0.37, 0.74, part.color)] + [(x + 0.12, 0.25, ATTENTION)] * part.attends
    for left, width, color in boxes:
        box = Rectangle((left, bottom), width, part.height, facecolor=color, lw=0, zorder=2)
        ax.add_patch(box)
    if part.color == BLOCK and (before.color, before.channels) != (BLOCK, part.channels):
        paper = {"facecolor": "white", "linewidth": 0, "pad": 0.5}
        y = bottom - 0.05
        ax.text(x, y, str(part.channels), ha="center", va="top", fontsize=7, bbox=paper)


def _check_captions(points: Path_, captions: Sequence[str]) -> None:
    if not 0 < len(points) == len(captions):
        raise ValueError(
            f"at least 1 frame, and a caption for each; got {len(points)} and {len(captions)}"
        )


def _scene(
    ax: Axes, cloud: Samples, caption: str, data: Samples | None, color: str, limit: float
) -> None:
    """One frame: the moving points before the standing ones."""
    if data is not None:
        scatter(ax, data, DATA)
    scatter(ax, cloud, color)
    ax.set(title=caption, xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])


def _pixels(figure: Figure) -> Image.Image:
    """A figure as it looks on the screen, in 32 colors."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    size = canvas.get_width_height()
    image = Image.frombytes("RGBA", size, bytes(canvas.buffer_rgba()))
    return image.convert("RGB").quantize(32)


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
