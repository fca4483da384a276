"""Noise levels and curricula: the grid of Karras et al., and N(k) and μ(k) of Song et al. §5."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from cmbook.protocols import Clock, Grid

MOST = 1_000_000  # levels of a grid: 8 MB; the paper's largest has 1281


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float) -> Grid:
    r"""Noise levels from `sigma_max` down to `sigma_min`, denser near the data.

    $$\sigma_i = \Big(\sigma_{\max}^{1/\rho}
        + \tfrac{i}{n-1}\big(\sigma_{\min}^{1/\rho} - \sigma_{\max}^{1/\rho}\big)\Big)^{\rho}$$

    Args:
        n: Number of levels, 2 or more, at most a million; `n` levels bound `n - 1` intervals.
        sigma_min: The least level, above 0, in units of the data (whose std is about 0.5).
        sigma_max: The largest level.
        rho: 1 spaces the levels evenly; 7 is the paper's.

    Returns:
        Decreasing float64 levels whose two ends are exact. No final 0.

    Raises:
        ValueError: If `n` or `rho` is out of range, or the bounds are not
            `0 < sigma_min < sigma_max`.

    Example:
        >>> karras_sigmas(3, 1.0, 3.0, rho=1.0)
        tensor([3., 2., 1.], dtype=torch.float64)

    Source: Karras et al. (2022), eq. 5; Song et al. (2023), §2, with time reversed.
    """
    if n < 2:
        raise ValueError(f"a grid needs at least 2 levels; got n = {n}")
    if n > MOST:
        raise ValueError(f"a grid has at most {MOST:,} levels; got n = {n}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"expected 0 < sigma_min < sigma_max; got sigma_min = {sigma_min}, "
            f"sigma_max = {sigma_max}"
        )
    if not 0.1 <= rho < math.inf:  # below, the powers leave float64
        raise ValueError(f"rho must be at least 0.1; got {rho}. The paper uses 7.")
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas: Grid = (top + ramp * (bottom - top)) ** rho
    sigmas[0], sigmas[-1] = sigma_max, sigma_min
    return sigmas


def check_decreasing(sigmas: Grid) -> None:
    """Refuse noise levels that are not finite, not negative and strictly decreasing.

    Raises:
        ValueError: Naming the levels, and the flipped ones if those would do.

    Source: ours.
    """
    shown = [round(s, 4) for s in sigmas.tolist()]
    if sigmas.ndim != 1 or len(sigmas) == 0:
        raise ValueError(f"sigmas must be a list of at least one noise level; got {shown}")
    if not bool(torch.isfinite(sigmas).all()) or bool((sigmas < 0).any()):
        raise ValueError(f"sigmas must be finite and at least 0; got {shown}")
    if bool((sigmas.diff() >= 0).any()):
        hint = " Did you mean sigmas.flip(0)?" if bool((sigmas.diff() > 0).all()) else ""
        raise ValueError(f"sigmas must decrease; got {shown}.{hint}")


def levels_at(clock: Clock, start: int, end: int) -> int:
    r"""The number of noise levels N(k) of consistency training.

    $$N(k) = \Big\lceil \sqrt{\tfrac{k}{K}\big((s_1+1)^2 - s_0^2\big) + s_0^2} - 1
        \Big\rceil + 1$$

    Args:
        clock: Step k of K.
        start: s0, the levels at the beginning.
        end: s1; the schedule ends at s1 + 1 levels.

    Example:
        >>> [levels_at(Clock(k, 800_000), 2, 150) for k in (0, 1, 8_000, 400_000, 800_000)]
        [2, 3, 16, 107, 151]

    Source: Song et al. (2023), App. C; the released code agrees.
    """
    squared = clock.progress * ((end + 1) ** 2 - start**2) + start**2
    return max(math.ceil(math.sqrt(squared) - 1), 1) + 1


MuVariant = Literal["paper", "code"]


def decay_at(levels: int, start: int, start_decay: float, mu_variant: MuVariant = "paper") -> float:
    r"""The target's decay μ(k) for a given N(k).

    $$\mu(k) = \exp\Big(\frac{s_0 \ln \mu_0}{N(k)}\Big)$$

    Args:
        levels: N(k).
        start: s0.
        start_decay: μ0, in [0, 1); 0 stays 0.
        mu_variant: `"paper"` divides by N(k). `"code"` divides by N(k) - 1 as both released
            code bases do: at k = 0 with s0 = 2 that is μ0² in place of μ0.

    Example:
        >>> round(decay_at(2, 2, 0.9), 4), round(decay_at(2, 2, 0.9, "code"), 4)
        (0.9, 0.81)

    Source: Song et al. (2023), App. C.
    """
    if start_decay == 0:
        return 0.0
    divisor = levels if mu_variant == "paper" else levels - 1
    return math.exp(start * math.log(start_decay) / divisor)


@dataclass(frozen=True)
class FixedLevels:
    """The same number of levels, and the same decay, from the first step to the last.

    Attributes:
        levels: N.
        decay: μ; 0 makes the target the student itself.

    Source: Song et al. (2023), §4.
    """

    levels: int = 18
    decay: float = 0.0

    def __post_init__(self) -> None:
        _check(2 <= self.levels <= MOST, f"levels must lie in 2 ... {MOST}; got {self.levels}")
        _check(0 <= self.decay < 1, f"decay must lie in [0, 1); got {self.decay}")

    def levels_at(self, clock: Clock) -> int:
        """N(k)."""
        return self.levels

    def decay_at(self, clock: Clock) -> float:
        """μ(k)."""
        return self.decay


@dataclass(frozen=True)
class AdaptiveLevels:
    """The paper's curriculum: levels grow like the square root of time, and μ follows them.

    Few levels teach fast and with bias, many slowly and without: so one grows into the other.

    Attributes:
        start: s0, the levels of the first step.
        end: s1; the last step has s1 + 1 levels.
        start_decay: μ0.
        mu_variant: Whether μ(k) follows the paper or the released code; see `decay_at`.

    Source: Song et al. (2023), §5 and App. C; the values are those of CIFAR-10.
    """

    start: int = 2
    end: int = 150
    start_decay: float = 0.9
    mu_variant: MuVariant = "paper"

    def __post_init__(self) -> None:
        _check_span(self.start, self.end, least=2)
        _check(0 <= self.start_decay < 1, f"start_decay must lie in [0, 1); got {self.start_decay}")
        check_choice("mu_variant", self.mu_variant, get_args(MuVariant))

    def levels_at(self, clock: Clock) -> int:
        """N(k)."""
        return levels_at(clock, self.start, self.end)

    def decay_at(self, clock: Clock) -> float:
        """μ(k)."""
        return decay_at(self.levels_at(clock), self.start, self.start_decay, self.mu_variant)


@dataclass(frozen=True)
class DoublingLevels:
    """Levels that double at even intervals, from `start + 1` to `end + 1`; no moving target.

    Attributes:
        start: s0, the intervals of the first stage.
        end: s1, the intervals of the last.

    Source: Song and Dhariwal (2023, iCT), eq. for N(k); μ = 0 as argued there.
    """

    start: int = 10
    end: int = 1280

    def __post_init__(self) -> None:
        _check_span(self.start, self.end, least=1)

    def levels_at(self, clock: Clock) -> int:
        """N(k)."""
        every = max(int(clock.steps / (math.log2(self.end // self.start) + 1)), 1)  # K′
        return int(min(self.start * 2 ** (clock.step // every), self.end)) + 1

    def decay_at(self, clock: Clock) -> float:
        """μ(k) = 0: the target is the student itself."""
        return 0.0


Curriculum = FixedLevels | AdaptiveLevels | DoublingLevels


def check_choice(name: str, given: object, choices: Iterable[object]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: Naming the choices.

    Source: ours.
    """
    if given not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {given!r}")


def _check(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


def _check_span(start: int, end: int, least: int) -> None:
    told = f"expected {least} <= start <= end < {MOST}; got {start} and {end}"
    _check(least <= start <= end < MOST, told)
