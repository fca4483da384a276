"""2-D worlds with exact answers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cmbook.data.tensors import fingerprint, fresh
from cmbook.noise import seeded
from cmbook.oracle import GaussianMixture
from cmbook.protocols import Batch


def ring() -> GaussianMixture:
    """Eight round Gaussians on a circle of radius 0.7, standard deviation 0.05.

    Source: ours.
    """
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    return GaussianMixture.isotropic(0.7 * _on_circle(angle), 0.05)


def moons() -> GaussianMixture:
    """Two interleaved half circles, two classes, each a string of 24 small Gaussians.

    Source: after scikit-learn's `make_moons`; written anew as a mixture.
    """
    half = torch.linspace(0, math.pi, 24, dtype=torch.float64)
    upper = 0.55 * _on_circle(half) + torch.tensor([-0.275, -0.15])
    return GaussianMixture.isotropic(torch.cat([upper, -upper]), 0.04, classes=_classes(2, 24))


def spirals() -> GaussianMixture:
    """Two arms that wind one and a half times around the center: two classes of 40 Gaussians.

    Source: ours.
    """
    turn = torch.linspace(0.15, 1, 40, dtype=torch.float64).sqrt()
    arm = 0.9 * turn[:, None] * _on_circle(3 * math.pi * turn)
    return GaussianMixture.isotropic(torch.cat([arm, -arm]), 0.025, classes=_classes(2, 40))


def pinwheel() -> GaussianMixture:
    """Five curved blades, five classes, each of 8 elongated Gaussians that widen outward.

    Source: ours.
    """
    means, covariances = [], []
    for blade in range(5):
        for i in range(8):
            radius = 0.2 + 0.1 * i
            angle = torch.tensor(2 * math.pi * blade / 5 + 0.9 * radius, dtype=torch.float64)
            along = _on_circle(angle + 0.5)
            narrow = 0.01 + 0.035 * radius
            means.append(radius * _on_circle(angle))
            covariances.append(
                narrow**2 * torch.eye(2) + (0.05**2 - narrow**2) * torch.outer(along, along)
            )
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    return GaussianMixture(weights, torch.stack(means), torch.stack(covariances), _classes(5, 8))


def checkerboard() -> GaussianMixture:
    """The eight dark fields of a 4x4 board, eight classes, each filled with 16 small Gaussians.

    Source: ours.
    """
    fields = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    inside = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    offsets = torch.cartesian_prod(inside, inside)
    means = torch.cat([torch.tensor(field) + offsets for field in fields]) / 2 - 1
    return GaussianMixture.isotropic(0.95 * means, 0.035, classes=_classes(8, 16))


WorldName = Literal["ring", "moons", "spirals", "pinwheel", "checkerboard"]
WORLDS: dict[WorldName, Callable[[], GaussianMixture]] = {
    "ring": ring,
    "moons": moons,
    "spirals": spirals,
    "pinwheel": pinwheel,
    "checkerboard": checkerboard,
}


@dataclass(frozen=True)
class Toy:
    """A 2-D world by name: each is a Gaussian mixture, so each has exact answers.

    Attributes:
        world: Which one.
        labelled: Whether the network is told the class a point comes from: which mode of the
            ring, which moon, arm, blade or field.

    Source: ours.
    """

    world: WorldName = "ring"
    labelled: bool = False

    def build(self) -> "ToyData":
        """The data set."""
        return ToyData(WORLDS[self.world](), self.labelled)


class ToyData:
    """An endless sample of a world; `world` holds the exact answers.

    Source: ours.
    """

    def __init__(self, world: GaussianMixture, labelled: bool = False) -> None:
        self.world, self.labelled = world, labelled
        self.shape = (world.means.shape[1],)
        self.classes = world.n_classes if labelled else None

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Fresh points without end.

        Raises:
            ValueError: If the size is not positive.
        """
        return fresh(self._draw, size, seed, start)

    def held_out(self) -> Batch:
        """5,000 points of a stream of their own."""
        return self._draw(5000, seeded("held out"))

    def sha256(self) -> str:
        """A fingerprint of the mixture, and of its classes if they are told."""
        world = self.world
        told = [world.classes] if self.labelled and world.classes is not None else []
        return fingerprint(world.weights, world.means, world.covariances, *told)

    def _draw(self, n: int, generator: torch.Generator) -> Batch:
        points = self.world.sample(n, generator=generator)
        return Batch(points.x.float(), points.label if self.labelled else None)


def _on_circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], -1)


def _classes(n: int, each: int) -> Tensor:
    """Class numbers of `n` classes that have `each` components, one class after the other."""
    return torch.arange(n).repeat_interleave(each)
