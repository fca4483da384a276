"""How far apart two clouds of points are, without fitting Gaussians to them.

Two clouds may have the same mean and covariance, and so Frechet distance 0, and look nothing
alike. The three distances here see that. They are for points of few dimensions, as in the 2-D
worlds; in thousands of dimensions all points are about equally far from each other.
"""

import math

import torch
from torch import Tensor

from cmbook.noise import normal
from cmbook.protocols import Generator

CHUNK = 1000  # rows that are compared at once


def mmd(x: Tensor, y: Tensor, widths: tuple[float, ...] = ()) -> float:
    r"""The squared maximum mean discrepancy with Gaussian kernels, unbiased.

    $$\mathbb{E}\,k(x, x') + \mathbb{E}\,k(y, y') - 2\,\mathbb{E}\,k(x, y), \qquad
        k(a, b) = e^{-\lVert a - b\rVert^2 / 2 w^2}$$

    Being unbiased it is 0 on average, and often below 0, for two clouds of one law.

    Args:
        x: A cloud `(n, d)`, n at least 2.
        y: The other cloud.
        widths: w of each kernel; the kernels are averaged. By default one, the median distance
            between points of both clouds (of at most 1,000 of each).

    Raises:
        ValueError: If a cloud has fewer than 2 points, dimensions differ, or a width is not
            positive.

    Source: Gretton et al. (2012), eq. 3; the median width is their §8.
    """
    x, y = _clouds(x, y)
    widths = widths or (_median_distance(x, y),)
    if min(widths) <= 0:
        raise ValueError(f"widths must be positive; got {widths}")
    n, m = len(x), len(y)

    def total(a: Tensor, b: Tensor) -> float:
        kernel = 0.0
        for rows in a.split(CHUNK):
            square = _far(rows, b).square()
            kernel += sum(float((-square / (2 * w**2)).exp().sum()) for w in widths)
        return kernel / len(widths)

    within = (total(x, x) - n) / (n * (n - 1)) + (total(y, y) - m) / (m * (m - 1))
    return within - 2 * total(x, y) / (n * m)


def energy_distance(x: Tensor, y: Tensor) -> float:
    r"""The energy distance: 0 for equal clouds only.

    $$\sqrt{2\,\mathbb{E}\lVert x - y\rVert - \mathbb{E}\lVert x - x'\rVert
        - \mathbb{E}\lVert y - y'\rVert}$$

    Args:
        x: A cloud `(n, d)`, n at least 2.
        y: The other cloud.

    Raises:
        ValueError: If a cloud has fewer than 2 points, or dimensions differ.

    Source: Székely and Rizzo (2013), eq. 5; with the root, and over all pairs including a point
    with itself, as in scipy.
    """
    x, y = _clouds(x, y)

    def mean(a: Tensor, b: Tensor) -> float:
        return sum(float(_far(rows, b).sum()) for rows in a.split(CHUNK)) / (len(a) * len(b))

    return math.sqrt(max(2 * mean(x, y) - mean(x, x) - mean(y, y), 0.0))


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, order: int = 1, directions: int = 200, generator: Generator
) -> float:
    r"""The Wasserstein distance of shadows on random lines, which is exact on a line.

    $$\Big(\mathbb{E}_\theta\, W_p^p\big(\theta^\top x, \theta^\top y\big)\Big)^{1/p}$$

    Args:
        x: A cloud `(n, d)`, n at least 2.
        y: The other cloud; it may have another number of points.
        order: p.
        directions: How many lines.
        generator: Draws them.

    Raises:
        ValueError: If a cloud has fewer than 2 points, dimensions differ, or `order` or
            `directions` is below 1.

    Source: Bonneel et al. (2015), §2.
    """
    x, y = _clouds(x, y)
    if order < 1 or directions < 1:
        raise ValueError(f"order and directions start at 1; got {order} and {directions}")
    lines = normal(x.new_empty(directions, x.shape[1]), generator)
    lines = lines / lines.norm(dim=1, keepdim=True)
    n, m = len(x), len(y)
    # Both quantile functions are steps, of widths 1/n and 1/m: in units of 1/nm, whole numbers.
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    width = ends.diff(prepend=ends.new_zeros(1)).to(x) / (n * m)
    i, j = (ends - 1) // m, (ends - 1) // n
    moved = [
        (((x @ line).sort().values[i] - (y @ line).sort().values[j]).abs() ** order) @ width
        for line in lines
    ]
    return math.pow(float(torch.stack(moved).mean()), 1 / order)


def _far(x: Tensor, y: Tensor) -> Tensor:
    """All distances, without the short cut through products that makes near points inexact."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _median_distance(x: Tensor, y: Tensor) -> float:
    some = torch.cat([x[:CHUNK], y[:CHUNK]])
    width = float(torch.pdist(some).median())
    if width == 0:
        raise ValueError("half of the points coincide, so their median distance 0 is no width")
    return width


def _clouds(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"expected clouds (n, d) and (m, d) of at least 2 points; got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise ValueError("points hold NaN or infinity; they cannot be measured")
    return x.double(), y.double()
