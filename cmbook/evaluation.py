"""How good are samples: Frechet distance, precision and recall, distance to the training set.

Features are the flattened samples themselves: pixel space for digits, coordinates for points.
The two sets may differ in size, which is why they are plain tensors here: `Samples` share one b.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def frechet_distance(x: Tensor, y: Tensor) -> float:
    r"""The Frechet distance between Gaussians fitted to two sets of features.

    $$\lVert m_x - m_y\rVert^2
        + \operatorname{tr}\big(C_x + C_y - 2\,(C_x C_y)^{1/2}\big)$$

    It falls as either set grows: compare only figures made with the same counts.

    Args:
        x: Tensor or features, flattened to `(n, d)`, at least 2.
        y: The other set; the distance is symmetric.

    Returns:
        The squared distance, as the field reports it.

    Raises:
        ValueError: If a set has fewer than 2 samples, or dimensions differ.

    Source: Heusel et al. (2017), eq. 6; covariances are unbiased as in the field's evaluators.
    """
    a, b = _features(x, y)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"each set needs at least 2 samples; got {len(a)} and {len(b)}")
    root = _square_root(_covariance(a))
    # tr (Ca Cb)^½ = tr (Ca^½ Cb Ca^½)^½, and the right side is symmetric
    cross = torch.linalg.eigvalsh(root @ _covariance(b) @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return float(shift + a.var(0).sum() + b.var(0).sum() - 2 * cross)


def precision_recall(samples: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """How many samples look real, and how much of the real the samples cover.

    A point counts as covered if it lies within the distance from some point of the other set
    to that point's k-th nearest neighbor.

    Args:
        samples: Generated samples.
        real: Real samples.
        k: The neighbor that sets the radius; 3 is the field's choice.

    Returns:
        Precision (share of samples within the real set's balls) and recall (the reverse).

    Raises:
        ValueError: If a set has no more than k samples, or dimensions differ.

    Source: Kynkäänniemi et al. (2019), Algorithm 1.
    """
    a, b = _features(samples, real)
    if min(len(a), len(b)) <= k:
        raise ValueError(f"each set needs more than k = {k} samples; got {len(a)} and {len(b)}")
    return _share_inside(a, b, k), _share_inside(b, a, k)


def nearest_distance(samples: Tensor, train: Tensor) -> float:
    """The mean Euclidean distance from a sample to the nearest training sample: 0 is memory.

    Source: ours.
    """
    a, b = _features(samples, train)
    return float(_chunked(a, lambda rows: torch.cdist(rows, b).amin(1)).mean())


def _share_inside(points: Tensor, centers: Tensor, k: int) -> float:
    """The share of points that lie in the k-nearest-neighbor ball of some center."""
    radius = _chunked(centers, lambda rows: torch.cdist(rows, centers).kthvalue(k + 1).values)
    inside = _chunked(points, lambda rows: (torch.cdist(rows, centers) <= radius).any(1))
    return float(inside.double().mean())


def _chunked(rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([function(chunk) for chunk in rows.split(1000)])


def _covariance(features: Tensor) -> Tensor:
    d = features.shape[1]
    return features.T.cov().reshape(d, d)  # of a single coordinate, cov() is a bare number


def _square_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _features(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.flatten(1).double(), y.flatten(1).double()
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"sets of {a.shape[1]} and {b.shape[1]} dimensions cannot be compared")
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise ValueError("samples hold NaN or infinity; they cannot be measured")
    return a, b
