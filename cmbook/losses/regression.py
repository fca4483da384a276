"""What every loss is made of: predict at a noisy point, regress onto a frozen target."""

from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

import torch
from torch import Tensor

from cmbook.noise import NoiseRange, PerImage, Replay, add_noise, integers, normal
from cmbook.protocols import (
    Distance,
    Generator,
    Grid,
    Labels,
    Loss,
    Models,
    Pair,
    PerSample,
    Samples,
)
from cmbook.weights import WEIGHTS, Weight


def neighbors(grid: Grid, x: Samples, generator: Generator) -> tuple[PerSample, PerSample]:
    """A random pair of neighboring levels for each sample, the noisier first.

    A grid of N levels has N - 1 pairs, all equally likely. The levels come in the dtype of `x`,
    but never below float32.

    Source: Song et al. (2023), Algorithms 2 and 3: n ~ U[1, N - 1].
    """
    grid = grid.to(x.device, torch.promote_types(x.dtype, torch.float32))
    i = integers(len(x), len(grid) - 1, generator).to(x.device)
    return grid[i], grid[i + 1]


def same_noise(x0: Samples, sigma: PerSample, sigma_next: PerSample, generator: Generator) -> Pair:
    """Two points on one straight line: the same noise at two levels.

    Source: Song et al. (2023), Algorithm 3.
    """
    noise = normal(x0, generator)
    return Pair(add_noise(x0, noise, sigma), sigma, add_noise(x0, noise, sigma_next), sigma_next)


def self_consistency(
    models: Models,
    pair: Pair,
    label: Labels | None,
    *,
    noise_range: NoiseRange,
    distance: Distance,
    weight: Weight,
    generator: Generator,
) -> Loss:
    """λ(σ) d(f_θ(x, σ), f_θ⁻(x′, σ′)), both under the same dropout mask.

    Raises:
        ValueError: If `models` has no target.

    Source: Song et al. (2023), eq. 7.
    """
    if models.target is None:
        raise ValueError("a consistency loss needs models.target; with μ = 0 pass the student")
    dropout = Dropout(generator, pair.x.device)
    with dropout:
        prediction = models.student(pair.x, pair.sigma, label)
    with dropout, torch.no_grad():
        target = models.target(pair.x_next, pair.sigma_next, label)
    scale = WEIGHTS[weight](pair.sigma, pair.sigma_next, noise_range)
    return regress(prediction, target, pair.sigma, distance, scale)


def regress(
    prediction: Samples, target: Samples, sigma: PerSample, distance: Distance, scale: PerSample
) -> Loss:
    """The mean over the batch of weight times distance.

    Source: Song et al. (2023), eq. 7.
    """
    per_sample = scale * distance(prediction, target)
    return Loss(per_sample.mean(), per_sample.detach(), sigma)


class Dropout:
    """A context in which dropout masks are a function of the generator: re-enter for the same.

    The global random state is left as it was found. Under `Replay` nothing is drawn, and a
    network that drops out is refused, since recorded draws hold no masks.

    Note: The official code saves the CPU's random state only, so on a GPU its masks differ.

    Source: Song et al. (2023), released code, by its intent.
    """

    def __init__(self, generator: Generator, device: torch.device) -> None:
        self.device = device
        self.seed = None
        if not isinstance(generator, Replay):
            n = len(generator.generators) if isinstance(generator, PerImage) else 1
            self.seed = int(integers(n, 2**31 - 1, generator)[0])

    def __enter__(self) -> None:
        devices = [self.device] if self.device.type == "cuda" else []
        self.stack = ExitStack()
        fork: AbstractContextManager[None] = torch.random.fork_rng(devices)
        self.stack.enter_context(fork)
        self.before = self._state()
        if self.seed is not None:  # only what was saved: torch.manual_seed would seed every device
            torch.default_generator.manual_seed(self.seed)
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(self.seed)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        drawn = self.seed is None and not torch.equal(self._state(), self.before)
        self.stack.close()
        if drawn and error is None:
            raise ValueError("Replay cannot replay dropout masks; build the network with dropout 0")

    def _state(self) -> Tensor:
        if self.device.type == "cuda":
            return torch.cuda.get_rng_state(self.device)
        return torch.get_rng_state()
