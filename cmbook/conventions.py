"""Noise levels as other code bases write them, turned into plain levels and back, exactly.

cmbook's samplers take the levels themselves, largest first. Two evaluations, the second at index
22 of a grid of 40, are written in as many ways as there are code bases:

    >>> OpenAI(40).sigmas([0, 22, 39])
    tensor([80.0000,  1.3824], dtype=torch.float64)
    >>> Diffusers(40).written(OpenAI(40).sigmas([0, 22, 39]))
    [22, 0]

An index means nothing without its grid, so those who write indices are told how many levels the
grid has. What a code base would misread is refused, with the reason. All of them start from noise
of `sigma_max`, so a list for sampling from noise begins there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cmbook.noise import NoiseRange
from cmbook.protocols import Grid
from cmbook.schedules import check_decreasing


@dataclass(frozen=True)
class OpenAI:
    """`--ts 0,22,39 --steps 40`: rising indices, the last being that of `sigma_min`.

    The last entry is no evaluation. It says how much noise is added to the last result: that of
    `sigma_min`, none. With any other last entry noise is left in the image.

    Attributes:
        levels: Length of the grid; `--steps` there.
        noise_range: The range of the grid.

    Raises:
        ValueError: When called, if the list would not be sampled there as it is meant.

    Source: Song et al. (2023), released code, `stochastic_iterative_sampler`.
    """

    levels: int = 40
    noise_range: NoiseRange = NoiseRange()

    def sigmas(self, written: Sequence[int]) -> Grid:
        """The levels that a list of indices means, one for each evaluation."""
        indices, grid, last = (
            [int(i) for i in written],
            self.noise_range.grid(self.levels),
            self.levels - 1,
        )
        _check_rising("ts", "rise", indices, indices, self.levels)
        if indices[-1] != last or len(indices) < 2:
            raise ValueError(
                f"ts must end with {last}, the index of sigma_min, after at least one evaluation; "
                f"got {indices}. Noise of level {float(grid[indices[-1]]):.4g} would be left in "
                f"the image. Did you mean {[*indices, last] if indices != [last] else [0, last]}?"
            )
        return grid[indices[:-1]]

    def written(self, sigmas: Grid) -> list[int]:
        """The indices to write there for these levels."""
        indices, last = _indices(sigmas, self.noise_range, self.levels), self.levels - 1
        if indices[-1] == last:
            raise ValueError(
                f"sigma_min = {self.noise_range.sigma_min:g} is where the list of indices ends, "
                "not a level to evaluate: there the model changes nothing. Leave it out."
            )
        return [*indices, last]


@dataclass(frozen=True)
class JCM:
    """`ts=[0, 11, 17]`: as in `OpenAI`, on the 18 levels of the CIFAR-10 models.

    Attributes:
        levels: Length of the grid; `num_scales` there.
        noise_range: The range of the grid.

    Raises:
        ValueError: As in `OpenAI`.

    Source: Song et al. (2023), released CIFAR-10 code, its notebook.
    """

    levels: int = 18
    noise_range: NoiseRange = NoiseRange()

    def sigmas(self, written: Sequence[int]) -> Grid:
        """The levels that a list of indices means, one for each evaluation."""
        return OpenAI(self.levels, self.noise_range).sigmas(written)

    def written(self, sigmas: Grid) -> list[int]:
        """The indices to write there for these levels."""
        return OpenAI(self.levels, self.noise_range).written(sigmas)


@dataclass(frozen=True)
class Diffusers:
    """`timesteps=[22, 0]`: falling indices, read from the right; no entry for the end.

    Index 0 is the noisiest level all the same, and is evaluated first.

    Attributes:
        levels: Length of the grid; `num_train_timesteps` there.
        noise_range: The range of the grid.

    Raises:
        ValueError: When called, if the list would not be sampled there as it is meant.

    Source: von Platen et al. (2022, diffusers), `CMStochasticIterativeScheduler`.
    """

    levels: int = 40
    noise_range: NoiseRange = NoiseRange()

    def sigmas(self, written: Sequence[int]) -> Grid:
        """The levels that a list of indices means, one for each evaluation."""
        given = [int(i) for i in written]
        indices = given[::-1]
        _check_rising("timesteps", "fall", indices, given, self.levels)
        return self.noise_range.grid(self.levels)[indices]

    def written(self, sigmas: Grid) -> list[int]:
        """The indices to write there for these levels."""
        return _indices(sigmas, self.noise_range, self.levels)[::-1]


@dataclass(frozen=True)
class Kinyugo:
    """`sigmas=[80.0, 2.25]`: the levels themselves, as in cmbook.

    Raises:
        ValueError: When called, if the levels do not decrease.

    Source: Kinyugo (2023, consistency_models), `ConsistencySamplingAndEditing`.
    """

    def sigmas(self, written: Sequence[float]) -> Grid:
        """The same levels, as a tensor."""
        sigmas = torch.tensor(list(written), dtype=torch.float64)
        check_decreasing(sigmas)
        return sigmas

    def written(self, sigmas: Grid) -> list[float]:
        """The same levels, as a list."""
        check_decreasing(sigmas)
        return sigmas.tolist()


@dataclass(frozen=True)
class ECT:
    """`--mid_t 0.821`: every level but the first, which is always `sigma_max`.

    Note: The released sampler adds noise of the whole next level σ, as if paths ended at 0;
    Algorithm 1 adds √(σ² - ε²).

    Attributes:
        noise_range: Its `sigma_max` is the first level; `t_max` there.

    Raises:
        ValueError: When called, if the levels do not decrease, or do not begin at `sigma_max`.

    Source: Geng et al. (2024, ECT), released code, `generator_fn`.
    """

    noise_range: NoiseRange = NoiseRange()

    def sigmas(self, written: Sequence[float]) -> Grid:
        """The levels that a list of middle levels means; `[]` is one evaluation."""
        return Kinyugo().sigmas([self.noise_range.sigma_max, *written])

    def written(self, sigmas: Grid) -> list[float]:
        """The middle levels to write there for these levels."""
        first, *rest = Kinyugo().written(sigmas)
        if abs(first / self.noise_range.sigma_max - 1) > _CLOSE:
            raise ValueError(
                f"ECT begins at sigma_max = {self.noise_range.sigma_max:g} and writes only what "
                f"follows; the first level is {first:g}"
            )
        return rest


_CLOSE = 1e-5  # as far as float32 arithmetic strays from a grid


def _indices(sigmas: Grid, noise_range: NoiseRange, levels: int) -> list[int]:
    """Where the levels stand in the grid."""
    check_decreasing(sigmas)
    grid, indices = noise_range.grid(levels), []
    for sigma in sigmas.tolist():
        i = int((grid - sigma).abs().argmin())
        nearest = float(grid[i])
        if abs(sigma / nearest - 1) > _CLOSE:
            raise ValueError(
                f"{sigma:.8g} is no level of this grid of {levels}; the nearest is index {i}, "
                f"{nearest:.8g}"
            )
        indices.append(i)
    return indices


def _check_rising(name: str, verb: str, rising: list[int], given: list[int], levels: int) -> None:
    """Refuse indices that are out of range or out of order; `given` is how they were written."""
    if not rising or not all(0 <= i < levels for i in rising):
        raise ValueError(f"{name} must be indices in 0 ... {levels - 1}; got {given}")
    if rising != sorted(set(rising)):
        hint = f" Did you mean {given[::-1]}?" if rising[::-1] == sorted(set(rising)) else ""
        raise ValueError(f"{name} must {verb}; got {given}.{hint}")
