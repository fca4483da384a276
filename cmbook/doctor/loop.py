"""The recipe's loop and its loss, a method for each line that somebody can get wrong."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from cmbook import checkpoints
from cmbook.data import Data
from cmbook.doctor.patient import Patient
from cmbook.experiment import Experiment
from cmbook.guidance import guided
from cmbook.losses import EDM, ConsistencyDistillation, ConsistencyTraining
from cmbook.losses.regression import Dropout, neighbors, regress
from cmbook.noise import add_noise, normal, seeded
from cmbook.ode import SOLVERS
from cmbook.parameterization import Preconditioned
from cmbook.protocols import (
    Batch,
    Clock,
    Denoiser,
    Distance,
    Generator,
    Labels,
    Loss,
    Models,
    Pair,
    PerSample,
    Samples,
)
from cmbook.training import State, blend, frozen_view
from cmbook.weights import WEIGHTS

Row = tuple[float, float]  # mean loss, mean norm of the gradient


class Loop:
    """A recipe's loop and its loss, a method for each line that can be wrong.

    As it stands it does what `cmbook.train` does. A slip gets one line wrong.

    Args:
        p: Whose recipe.
        what: What is wrong, in words.
        remedy: What to do.
        lines: The lines that are wrong, in place of methods.

    Source: Song et al. (2023), Algorithms 2 and 3.
    """

    def __init__(
        self, p: Patient, what: str = "", remedy: str = "", **lines: Callable[..., Any]
    ) -> None:
        self.p, self.what, self.remedy = p, what, remedy
        for name, line in lines.items():
            setattr(self, name, MethodType(line, self))

    def rows(self, start: Path | None, ends: list[int]) -> Iterator[Row]:
        """Means of loss and gradient's norm, from the start or a checkpoint up to each end."""
        self.start = start
        self.begin()
        done = self.state.step
        for end in ends:
            taken = [self.step(k) for k in range(done, end)]
            loss, norm = (sum(each) / len(taken) for each in zip(*taken, strict=True))
            yield loss, norm
            done = end

    def begin(self) -> None:
        """Before the first step."""
        p, recipe, knobs = self.p, self.p.recipe, self.p.recipe.training
        assert p.data is not None
        shared = deepcopy(p.teacher.model).eval() if p.teacher is not None else None
        self.student = self.untrained(recipe, p.data, shared).to(p.device).train()
        self.optimizer = self.optimizer_of(self.student)
        self.state = State.begin(self.student, self.optimizer, recipe.objective, knobs.also_average)
        if self.start is not None:
            checkpoints.restore(self.start, self.state)
        self.moving = self.state.target
        self.target = frozen_view(self.student) if self.moving is None else self.moving
        if shared is not None and knobs.teacher_precision == "bfloat16":
            shared.net.bfloat16()
        asked = shared if recipe.objective.needs_teacher else None
        self.teacher: Denoiser | None = None if asked is None else self.guide(asked)
        self.batches = p.data.batches(knobs.batch_size, recipe.seed, self.state.step)

    def untrained(
        self, recipe: Experiment, data: Data, teacher: Preconditioned | None
    ) -> Preconditioned:
        """The student."""
        from cmbook import runs

        return runs.untrained(recipe, data, teacher)

    def optimizer_of(self, student: nn.Module) -> torch.optim.Optimizer:
        """Its optimizer."""
        return self.p.recipe.training.optimizer.build(student)

    def guide(self, teacher: Preconditioned) -> Denoiser:
        """The teacher as it is asked."""
        scale = self.p.recipe.guidance
        return teacher if scale == 1 else guided(teacher, scale)

    def step(self, k: int) -> Row:
        """One step."""
        recipe, knobs = self.p.recipe, self.p.recipe.training
        self.clock = self.time(k)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(knobs.learning_rate(self.clock))
        n = knobs.accumulation * int(self.p.run.record.get("processes", 1))
        x, label = self.batch()
        labels = [None] * n if label is None else label.chunk(n)
        self.zero()
        value = 0.0
        for s, (part, told) in enumerate(zip(x.chunk(n), labels, strict=True)):
            keys = (k,) if n == 1 else (k, s)
            generator = self.generator(recipe.seed, *keys)
            shard = self.shown(
                part.to(self.p.device), None if told is None else told.to(part.device)
            )
            with torch.autocast(
                x.device.type, torch.bfloat16, enabled=knobs.precision == "bfloat16"
            ):
                loss = self.loss(shard, generator)
            (self.descended(loss) / n).backward()
            value += float(loss.value.detach()) / n
        parameters = [*self.student.parameters()]
        longest = self.longest(knobs.clip)
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if longest is None else longest)
        self.optimizer.step()
        self.follow()
        return value, float(norm)

    def time(self, k: int) -> Clock:
        """Which step it is."""
        return Clock(k, self.p.recipe.training.steps)

    def rate(self, rate: float) -> float:
        """The learning rate."""
        return rate

    def batch(self) -> Batch:
        """The next samples."""
        return next(self.batches)

    def zero(self) -> None:
        """Before the gradient is computed."""
        self.optimizer.zero_grad()

    def generator(self, seed: int, *keys: int) -> torch.Generator:
        """What draws the noise."""
        return seeded(seed, "step", *keys, device=self.p.device)

    def shown(self, x: Samples, label: Labels | None) -> Batch:
        """The samples as they are shown."""
        return Batch(x, label)

    def descended(self, loss: Loss) -> Tensor:
        """What the optimizer descends."""
        return loss.value

    def longest(self, clip: float | None) -> float | None:
        """To which norm the gradient is clipped."""
        return clip

    def follow(self) -> None:
        """The target follows the student."""
        if self.moving is not None:
            decay = self.p.recipe.objective.target_decay(self.clock)
            blend(self.moving, self.student, self.decay(decay))

    def decay(self, decay: float) -> float:
        """How slowly."""
        return decay

    # ── the loss ──

    def loss(self, batch: Batch, generator: Generator) -> Loss:
        """Of one batch; that of a method which has no lines here is the objective's own."""
        objective, (x0, label) = self.p.recipe.objective, batch
        if isinstance(objective, EDM):
            return self.denoising(objective, x0, label, generator)
        if isinstance(objective, ConsistencyDistillation | ConsistencyTraining):
            return self.consistency(x0, label, generator)
        models = Models(self.student, self.target, self.teacher)
        return objective(models, batch, clock=self.clock, generator=generator)

    def denoising(self, objective: EDM, x0: Samples, label: Labels | None, g: Generator) -> Loss:
        """That of a diffusion model."""
        sigma = self.drawn(objective.sigma_law(len(x0), g).to(x0.device))
        z = self.noise(x0, g)
        x = self.noisy(x0, z, sigma)
        with Dropout(g, x.device):
            denoised = self.dressed(self.student)(x, sigma, label)
        return self.regressed(denoised, self.truth(x0, x, z), sigma, sigma)

    def consistency(self, x0: Samples, label: Labels | None, g: Generator) -> Loss:
        """That of a consistency model."""
        sigma, sigma_next = self.neighbors(x0, g)
        z = self.noise(x0, g)
        x = self.noisy(x0, z, sigma)
        x_next = self.onward(x0, z, x, sigma, sigma_next, label, g)
        pair, dropout = self.pair(Pair(x, sigma, x_next, sigma_next)), Dropout(g, x.device)
        with dropout:
            prediction = self.dressed(self.student)(pair.x, pair.sigma, label)
        with dropout:
            target = self.aim(pair, x0, label)
        return self.regressed(prediction, target, sigma, sigma_next)

    def drawn(self, sigma: PerSample) -> PerSample:
        """Noise levels of a diffusion model."""
        return sigma

    def levels(self) -> int:
        """N."""
        objective = self.p.recipe.objective
        if isinstance(objective, ConsistencyTraining):
            return objective.curriculum.levels_at(self.clock)
        assert isinstance(objective, ConsistencyDistillation)
        return objective.levels

    def neighbors(self, x0: Samples, g: Generator) -> tuple[PerSample, PerSample]:
        """Noise levels of a pair."""
        return neighbors(self.p.range.grid(self.levels()), x0, g)

    def noise(self, x0: Samples, g: Generator) -> Samples:
        """Standard normal noise."""
        return normal(x0, g)

    def noisy(self, x0: Samples, z: Samples, sigma: PerSample) -> Samples:
        """The noisy point."""
        return add_noise(x0, z, sigma)

    def onward(
        self,
        x0: Samples,
        z: Samples,
        x: Samples,
        sigma: PerSample,
        sigma_next: PerSample,
        label: Labels | None,
        g: Generator,
    ) -> Samples:
        """The second point of a pair."""
        if self.teacher is None:
            return self.noisy(x0, self.second(z, g), sigma_next)
        with torch.no_grad():
            return self.solver()(self.teacher, x, sigma, sigma_next, label)

    def solver(self) -> Callable[..., Samples]:
        """The teacher's step."""
        objective = self.p.recipe.objective
        assert isinstance(objective, ConsistencyDistillation)
        return SOLVERS[objective.solver]

    def second(self, z: Samples, g: Generator) -> Samples:
        """The noise of the second point: the same."""
        return z

    def pair(self, pair: Pair) -> Pair:
        """Which point is whose."""
        return pair

    def dressed(self, model: Denoiser) -> Denoiser:
        """The student, or its target, as it is asked."""
        return model

    def aim(self, pair: Pair, x0: Samples, label: Labels | None) -> Samples:
        """What the student is to answer."""
        with torch.no_grad():
            return self.dressed(self.target)(pair.x_next, pair.sigma_next, label)

    def truth(self, x0: Samples, x: Samples, z: Samples) -> Samples:
        """What a diffusion model is to answer."""
        return x0

    def regressed(
        self, prediction: Samples, target: Samples, sigma: PerSample, sigma_next: PerSample
    ) -> Loss:
        """Weight times distance."""
        scale = self.weighted(sigma, sigma_next)
        return regress(prediction, target, sigma, self.distance(), scale)

    def distance(self) -> Distance:
        """How far answer and target are apart."""
        distance: Distance = self.p.recipe.objective.distance
        return distance

    def weighted(self, sigma: PerSample, sigma_next: PerSample) -> PerSample:
        """The weight of each sample."""
        return WEIGHTS[self.p.recipe.objective.weight](sigma, sigma_next, self.p.range)
