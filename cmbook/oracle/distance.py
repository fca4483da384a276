"""How wrong a consistency model is, and whose fault it is."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cmbook.noise import NoiseRange, integers
from cmbook.ode import SOLVERS, Solver
from cmbook.oracle.worlds import Paths
from cmbook.protocols import Denoiser, Generator, Grid
from cmbook.schedules import check_choice

_RESAMPLES = 200
_SEEN = 17  # at most so many noise levels are looked at


class Interval(NamedTuple):
    """A number for each noise level, and the 95% interval of its sampling error.

    Source: Efron and Tibshirani (1993), the percentile bootstrap.
    """

    value: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Errors:
    """How far points lie from where they should be, in units of the data's standard deviation.

    Attributes:
        median: Half of the points are closer.
        rms: The root of the mean square; a few points across a seam dominate it.
        off: The share of points that are off by more than a quarter.

    Source: ours.
    """

    median: Interval
    rms: Interval
    off: Interval


@dataclass(frozen=True)
class DistanceToTruth:
    """What `distance_to_truth` finds; printing it gives a table for the noisiest level.

    Attributes:
        sigmas: The noise levels that were looked at, largest first.
        discretization: The solver's path on the grid against the exact function: what even a
            perfect student of this grid gets wrong.
        network: The model against the solver's path: what learning got wrong.
        total: The model against the exact function.

    Source: ours; after Song et al. (2023), Theorem 1, which bounds the first part.
    """

    sigmas: Grid
    discretization: Errors
    network: Errors
    total: Errors

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("discretization", "network", "total")}
        lines = [f"{f'at sigma {float(self.sigmas[0]):.3g}':15}{'median':>9}{'rms':>9}{'off':>9}"]
        for name, errors in parts.items():
            values = [100 * float(q.value[0]) for q in (errors.median, errors.rms, errors.off)]
            lines.append(f"{name:15}" + "".join(f"{value:8.1f}%" for value in values))
        return "\n".join(lines)


@torch.no_grad()
def distance_to_truth(
    model: Denoiser,
    world: Paths,
    noise_range: NoiseRange,
    *,
    levels: int = 18,
    solver: Solver = "heun",
    n: int = 10_000,
    labelled: bool = False,
    generator: Generator,
) -> DistanceToTruth:
    r"""How far a consistency model is from the exact function, split into two causes.

    `n` exact paths are drawn, and each is looked at from every noise level of the grid that the
    model was trained on (from 17 levels spread over it, if it has more). With f the exact
    function, $\hat f$ the end of the solver's path that starts at the same point, and
    $f_\theta$ the model,

    $$f_\theta - f = \underbrace{(\hat f - f)}_{\text{discretization}}
        + \underbrace{(f_\theta - \hat f)}_{\text{network}}$$

    Lengths are Euclidean, divided by the standard deviation of the data per coordinate. The
    solver follows the exact denoiser, so for a student of a learned teacher the teacher's own
    errors count as the network's.

    Args:
        model: A consistency model.
        world: Where the truth is known: a world, or a guided one.
        noise_range: The range of the model: paths end at its `sigma_min`.
        levels: N, the levels of its grid. A model trained alone learned from the last N(k).
        solver: The solver that it was distilled with. What training alone converges to on
            Gaussian data is the path of `"euler"`.
        n: Number of paths.
        labelled: Whether the model is told the class of each point.
        generator: Draws the paths, and the resamples behind the intervals.

    Raises:
        ValueError: If there are fewer than 2 levels or 2 paths, the solver is not known, the world
            is a single point, or the model's answers have another shape or are not finite.

    Source: ours; the two parts are those of Song et al. (2023), Theorem 1 and its proof.
    """
    check_choice("solver", solver, SOLVERS)
    if n < 2:
        raise ValueError(f"distances need at least 2 paths; got n={n}")
    if not world.std > 0:
        raise ValueError("this world is one point: its standard deviation is no unit of distance")
    grid = noise_range.grid(levels)
    seen = torch.linspace(0, levels - 2, min(_SEEN, levels - 1)).round().long().tolist()
    points, label = world.sample(n, float(grid[0]), generator=generator)
    label = label if labelled else None
    step = SOLVERS[solver]

    predicted, crowd = [], points.new_empty(0, *points.shape[1:])
    previous = 0
    for i in range(levels - 1):
        if i in seen:  # the next point of every exact path joins those who walk since earlier
            sigma, sigma_seen = grid[previous].expand(n), grid[i].expand(n)
            points = world.flow_map(points, sigma, sigma_seen, label) if i else points
            crowd = torch.cat([crowd, points])
            predicted.append(_checked(model(points, sigma_seen, label), points))
            previous = i
        labels = None if label is None else label.repeat(len(crowd) // n)
        crowd = step(
            world.denoiser,
            crowd,
            grid[i].expand(len(crowd)),
            grid[i + 1].expand(len(crowd)),
            labels,
        )
    truth = world.flow_map(points, grid[previous].expand(n), grid[-1].expand(n), label)
    walked, said = crowd.unflatten(0, (-1, n)), torch.stack(predicted)

    rows = [integers(n, n, generator) for _ in range(_RESAMPLES)]
    parts = (walked - truth, said - walked, said - truth)
    found = [_errors(part.flatten(2).norm(dim=2) / world.std, rows) for part in parts]
    return DistanceToTruth(grid[seen], *found)


def _checked(said: Tensor, points: Tensor) -> Tensor:
    """What the model said, in float64, if it can be compared."""
    if said.shape != points.shape:
        raise ValueError(
            f"the model answers {tuple(points.shape)} points with shape {tuple(said.shape)}"
        )
    if not bool(said.isfinite().all()):
        share = float((~said.isfinite()).any(1).double().mean())
        raise ValueError(f"{share:.1%} of the model's answers are NaN or infinite")
    return said.double()


def _errors(lengths: Tensor, rows: list[Tensor]) -> Errors:
    """Statistics over the points, with 95% intervals from the bootstrap: `(levels, n)`."""
    # Sorted once, a resample is a list of ranks, and its median the middle rank.
    ordered = lengths.sort(1).values
    squares, far = ordered.square(), (ordered > 0.25).double()
    middle = (ordered.shape[1] - 1) // 2
    drawn: list[list[Tensor]] = [[], [], []]
    for ranks in rows:
        counts = ranks.bincount(minlength=ordered.shape[1]).double()
        half = int((counts.cumsum(0) > middle).nonzero()[0])
        drawn[0].append(ordered[:, half])
        drawn[1].append((squares @ counts / counts.sum()).sqrt())
        drawn[2].append(far @ counts / counts.sum())
    values = (ordered[:, middle], squares.mean(1).sqrt(), far.mean(1))
    bounds = torch.tensor([0.025, 0.975], dtype=ordered.dtype)
    intervals = [
        Interval(value, *torch.stack(samples).quantile(bounds, 0))
        for value, samples in zip(values, drawn, strict=True)
    ]
    return Errors(*intervals)
