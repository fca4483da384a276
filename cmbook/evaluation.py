"""How good are samples: Frechet distance, Inception Score, precision and recall, memorization.

Features are flattened to `(n, d)`: pixels for digits, coordinates for points, or what an
extractor of `cmbook.features` sees. Two sets may differ in size, which is why they are plain
tensors here: `Samples` share one b.

No figure means anything without its counts: the Frechet distance falls as sets grow, recall rises.
`real_floor` says what real data would get, `bootstrap` how far a figure could move by chance.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from cmbook.noise import integers, shuffled
from cmbook.protocols import Generator

CHUNK = 1000  # rows that are compared at once


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of features, in float64: all that the Frechet distance needs.

    The sum of two is the moments of both sets together, so batches can be added one by one, in
    memory that does not grow.

    Attributes:
        mean: `(d,)`.
        covariance: `(d, d)`, unbiased as in the field's evaluators.
        count: Of the features behind them; `None` if a file does not say.

    Example:
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> parts = Moments.streamed(x.split(30))
        >>> torch.allclose(parts.covariance, Moments.of(x).covariance)
        True

    Source: Chan, Golub and LeVeque (1983), for the sum.
    """

    mean: Tensor = field(repr=False)
    covariance: Tensor = field(repr=False)
    count: int | None = None

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """The moments of a set, flattened to `(n, d)`.

        Raises:
            ValueError: If the set is empty, or holds NaN or infinity.
        """
        if len(features) > 5 * CHUNK:  # float64 copies of all of it would cost memory
            return cls.streamed(features.split(5 * CHUNK))
        x = features.flatten(1).double()
        if not len(x):
            raise ValueError("an empty set has no mean; got features of shape (0, ...)")
        _check_finite(x)
        mean = x.mean(0)
        centered = x - mean
        return cls(mean, centered.T @ centered / max(len(x) - 1, 1), len(x))

    @classmethod
    def streamed(cls, batches: Iterable[Tensor]) -> "Moments":
        """The moments of all batches together.

        Raises:
            ValueError: If there is no batch.
        """
        parts = map(cls.of, batches)
        first = next(parts, None)
        if first is None:
            raise ValueError("there are no batches to take moments of")
        return reduce(lambda whole, part: whole + part, parts, first)

    def __add__(self, other: "Moments") -> "Moments":
        if self.count is None or other.count is None:
            raise ValueError("moments of unknown count cannot be added to others")
        n, m = self.count, other.count
        shift = other.mean - self.mean
        scatter = self.covariance * (n - 1) + other.covariance * (m - 1)
        scatter += torch.outer(shift, shift) * (n * m / (n + m))
        mean = self.mean + shift * (m / (n + m))
        return type(self)(mean, scatter / max(n + m - 1, 1), n + m)


def frechet_distance(x: Tensor | Moments, y: Tensor | Moments) -> float:
    r"""The Frechet distance between Gaussians fitted to two sets of features.

    $$\lVert m_x - m_y\rVert^2
        + \operatorname{tr}\big(C_x + C_y - 2\,(C_x C_y)^{1/2}\big)$$

    It falls as either set grows: compare only figures made with the same counts. The square root
    is taken by eigenvalues of a symmetric matrix, so sets with fewer samples than dimensions need
    no correction, and nothing imaginary has to be dropped.

    Args:
        x: Tensor or features, flattened to `(n, d)`, at least 2; or their moments.
        y: The other set; the distance is symmetric.

    Returns:
        The squared distance, as the field reports it. On Inception features it is called FID.

    Raises:
        ValueError: If a set has fewer than 2 samples, or dimensions differ.

    Source: Heusel et al. (2017), eq. 6; covariances are unbiased as in the field's evaluators.
    """
    a, b = (z if isinstance(z, Moments) else Moments.of(z) for z in (x, y))
    _check_dimensions(len(a.mean), len(b.mean))
    if any(moments.count is not None and moments.count < 2 for moments in (a, b)):
        raise ValueError(f"each set needs at least 2 samples; got {a.count} and {b.count}")
    root = _square_root(a.covariance)
    # tr (Ca Cb)^½ = tr (Ca^½ Cb Ca^½)^½, and the right side is symmetric
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean - b.mean).square().sum()
    return float(shift + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def real_floor(real: Tensor, n: int, *, rounds: int = 1, generator: Generator) -> float:
    """The Frechet distance that real data get: `n` of them against the rest.

    A model that draws `n` samples and is measured against as many others can hardly do better,
    and a figure below this floor is no sign of quality.

    Args:
        real: Real features.
        n: How many stand for the model's samples.
        rounds: How many random halves are averaged.
        generator: Chooses them.

    Raises:
        ValueError: If not at least 2 are left on each side.

    Source: ours.
    """
    if not 2 <= n <= len(real) - 2:
        raise ValueError(
            f"of {len(real)} real samples, n = {n} leave {len(real) - n}; each side needs 2"
        )
    orders = (shuffled(len(real), generator).to(real.device) for _ in range(rounds))
    distances = [frechet_distance(real[order[:n]], real[order[n:]]) for order in orders]
    return sum(distances) / rounds


class Score(NamedTuple):
    """The Inception Score: mean and standard deviation over splits."""

    mean: float
    std: float


def inception_score(probabilities: Tensor, splits: int = 10) -> Score:
    r"""How sure a classifier is of each sample, and how many classes the samples spread over.

    $$\exp\,\mathbb{E}_x\,\mathrm{KL}\big(p(y|x)\,\Vert\,p(y)\big)$$

    It is 1 if all samples get the same answer, and the number of classes if each answer is sure
    and all are equally frequent. It never sees real data, so it cannot see memorization.

    Args:
        probabilities: `(n, classes)`, each row summing to 1. The field's come from a softmax
            without the bias of the last layer.
        splits: Parts of consecutive samples that are scored alone; the field takes 10 of 5,000.

    Raises:
        ValueError: If rows are not probabilities, or there are fewer rows than splits.

    Source: Salimans et al. (2016), §4; splits as in their released code.
    """
    p, n = probabilities.double(), len(probabilities)
    if p.ndim != 2 or bool((p < 0).any()) or bool(((p.sum(1) - 1).abs() > 1e-3).any()):
        raise ValueError(f"expected rows of probabilities (n, classes); got {tuple(p.shape)}")
    if not 1 <= splits <= n:
        raise ValueError(f"{n} samples cannot be cut into {splits} splits")
    scores = []
    for i in range(splits):
        part = p[i * n // splits : (i + 1) * n // splits]
        mean = part.mean(0)
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, mean)).sum(1)
        scores.append(divergence.mean().exp())
    each = torch.stack(scores)
    return Score(float(each.mean()), float(each.std(correction=0)))


def precision_recall(samples: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """How many samples look real, and how much of the real the samples cover.

    A point counts as covered if it lies within the distance from some point of the other set
    to that point's k-th nearest neighbor. Distances are taken in chunks of 1,000 rows.

    Args:
        samples: Generated samples.
        real: Real samples.
        k: The neighbor that sets the radius; 3 is the field's choice.

    Returns:
        Precision (share of samples within the real set's balls) and recall (the reverse).

    Raises:
        ValueError: If a set has no more than k samples, k is not positive, or dimensions differ.

    Source: Kynkäänniemi et al. (2019), Algorithm 1. They used VGG features; evaluators since have
    used the pool features of Inception.
    """
    a, b = _features(samples, real)
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    if min(len(a), len(b)) <= k:
        raise ValueError(f"each set needs more than k = {k} samples; got {len(a)} and {len(b)}")
    radius_a, radius_b = _radii(a, k), _radii(b, k)
    covers, covered = [], torch.zeros(len(b), dtype=torch.bool, device=b.device)
    for rows, radius in zip(a.split(CHUNK), radius_a.split(CHUNK), strict=True):
        distance = torch.cdist(rows, b)  # one pass answers both questions
        covers.append((distance <= radius_b).any(1))
        covered |= (distance <= radius[:, None]).any(0)
    return float(torch.cat(covers).double().mean()), float(covered.double().mean())


class Nearest(NamedTuple):
    """The nearest training sample of each sample: which one, and how far."""

    which: Tensor
    distance: Tensor


def nearest_training(samples: Tensor, train: Tensor) -> Nearest:
    """For each sample the nearest training sample: put them side by side and look.

    Source: ours.
    """
    a, b = _features(samples, train)
    found = [torch.cdist(rows, b).min(1) for rows in a.split(CHUNK)]
    return Nearest(torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]))


def nearest_distance(samples: Tensor, train: Tensor) -> float:
    """The mean Euclidean distance from a sample to the nearest training sample: 0 is memory.

    Source: ours.
    """
    return float(nearest_training(samples, train).distance.mean())


def memorized(samples: Tensor, train: Tensor, held_out: Tensor) -> float:
    """How often a sample lies nearer to the training set than a held-out real sample does.

    All pairs of one sample and one held-out sample are compared by the distance to their nearest
    training sample; a tie counts half. 0.5 is what fresh real data would get. Near 1 the model
    copies (or blurs: in pixels, a blurred image is near to many); near 0 it misses the data.

    Source: Meehan, Chaudhuri and Dasgupta (2020), the statistic of their test for data copying,
    without cells and as a share.
    """
    distances = (nearest_training(z, train).distance for z in (samples, held_out))
    return share_nearer(*distances)


def share_nearer(ours: Tensor, theirs: Tensor) -> float:
    """Of all pairs of one distance of ours and one of theirs: how often ours is less, ties half.

    Source: Mann and Whitney (1947), as a share.
    """
    ranked = theirs.sort().values
    less, not_more = (
        len(ranked) - torch.searchsorted(ranked, ours, right=right) for right in (True, False)
    )
    return float((less + not_more).double().mean() / (2 * len(ranked)))


class Interval(NamedTuple):
    """A figure, and how far it could have moved by chance.

    Attributes:
        value: Of the sets as they are.
        low: Lower end.
        high: Upper end.
        bias: How much larger the figure is, on average, of sets drawn again from these.
    """

    value: float
    low: float
    high: float
    bias: float


def bootstrap(
    statistic: Callable[..., float],
    *sets: Tensor,
    rounds: int = 100,
    level: float = 0.95,
    generator: Generator,
) -> Interval:
    """How far a figure could move by chance: measure it of sets drawn again from the sets.

    Every set is drawn anew, with replacement. A biased figure such as the Frechet distance is
    biased once more by that; so the interval is centered on the value, and the bias is told. It
    speaks of sets of these counts, not of the limit of many.

    Args:
        statistic: A function of the sets.
        sets: Tensors whose first axis counts samples. What shall not vary is no set: bind it.
        rounds: How many times.
        level: The share of the rounds that the interval holds.
        generator: Draws.

    Raises:
        ValueError: If there is no set, fewer than 2 rounds, or `level` is not within (0, 1).

    Source: Efron and Tibshirani (1993), §6 and §10.
    """
    if not sets or rounds < 2 or not 0 < level < 1:
        raise ValueError(
            f"bootstrap needs a set, 2 rounds and a level in (0, 1); got {len(sets)} sets, "
            f"{rounds} rounds, level {level}"
        )
    value = statistic(*sets)
    again = torch.tensor(
        [
            statistic(*(z[integers(len(z), len(z), generator).to(z.device)] for z in sets))
            for _ in range(rounds)
        ],
        dtype=torch.float64,
    )
    tail = (1 - level) / 2
    bias = float(again.mean()) - value
    low, high = torch.quantile(again - bias, torch.tensor([tail, 1 - tail]).double()).tolist()
    return Interval(value, low, high, bias)


def _radii(points: Tensor, k: int) -> Tensor:
    """The distance from each point to its k-th nearest neighbor, itself not counted."""
    near = (torch.cdist(rows, points).kthvalue(k + 1).values for rows in points.split(CHUNK))
    return torch.cat([*near])


def _square_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _features(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.flatten(1).double(), y.flatten(1).double()
    _check_dimensions(a.shape[1], b.shape[1])
    _check_finite(a)
    _check_finite(b)
    return a, b


def _check_dimensions(a: int, b: int) -> None:
    if a != b:
        raise ValueError(f"sets of {a} and {b} dimensions cannot be compared")


def _check_finite(x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise ValueError("samples hold NaN or infinity; they cannot be measured")
