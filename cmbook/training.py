"""Training in one screen: an iterator that takes one step at a time.

The caller logs, plots, saves or stops; `runs.py` is one such caller.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cmbook.noise import NoiseRange, seeded
from cmbook.parameterization import Preconditioned, Scalings
from cmbook.processes import ALONE, Processes
from cmbook.protocols import (
    Batch,
    Clock,
    Denoiser,
    Labels,
    Loss,
    Models,
    Objective,
    PerSample,
    Samples,
)
from cmbook.schedules import check_choice

Precision = Literal["float32", "bfloat16"]


@dataclass
class State:
    """Everything that training changes; a checkpoint is this, saved.

    Attributes:
        student: θ, learns.
        target: θ⁻, part of the algorithm, decay μ(k); `None` if it is the student itself.
        average: The moving average for sampling.
        optimizer: Of the student's parameters.
        step: The number of steps taken.
        averages: Further moving averages for sampling, by their decays.
    """

    student: Preconditioned
    optimizer: torch.optim.Optimizer
    average: Preconditioned
    target: Preconditioned | None = None
    step: int = 0
    averages: dict[float, Preconditioned] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        student: Preconditioned,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        also_average: tuple[float, ...] = (),
    ) -> "State":
        """Before the first step: target and averages are copies of the student."""
        follows = objective.target_decay(Clock(0, 1)) > 0
        target = frozen_copy(student).train() if follows else None
        averages = {decay: frozen_copy(student).eval() for decay in also_average}
        return cls(student, optimizer, frozen_copy(student).eval(), target, averages=averages)

    @property
    def tensors(self) -> list[Tensor]:
        """Every weight and buffer of student, average, target and further averages."""
        models = [self.student, self.average, self.target, *self.averages.values()]
        both = [(*model.parameters(), *model.buffers()) for model in models if model is not None]
        return [tensor for each in both for tensor in each]


class Diverged(ValueError):
    """A loss or gradient is no longer finite; the step was not taken, and the state is as before.

    Attributes:
        step: The number of the step, from 0.
        sample: Of its batch, the first whose loss is not finite; `None` if all are.

    Source: ours.
    """

    def __init__(self, message: str, step: int, sample: int | None) -> None:
        super().__init__(message)
        self.step, self.sample = step, sample


@dataclass(frozen=True)
class Step:
    """What `train` yields after each step; valid until the next.

    Attributes:
        clock: Which step it was.
        loss: Of its batch.
        state: After it.
        gradient_norm: Of all parameters together, before clipping.
        learning_rate: That it was taken with.
    """

    clock: Clock
    loss: Loss
    state: State = field(repr=False)
    gradient_norm: Tensor
    learning_rate: float

    @property
    def average(self) -> Preconditioned:
        """The model to sample from."""
        return self.state.average


def train(
    student: Preconditioned,
    batches: Iterator[Batch],
    objective: Objective,
    *,
    steps: int,
    optimizer: torch.optim.Optimizer,
    teacher: Denoiser | None = None,
    average_decay: float = 0.9999,
    also_average: tuple[float, ...] = (),
    learning_rate: "LearningRate | None" = None,
    accumulation: int = 1,
    clip: float | None = None,
    precision: Precision = "float32",
    seed: int = 0,
    state: State | None = None,
    processes: Processes = ALONE,
) -> Iterator[Step]:
    """Train, yielding after every step.

    Step k draws from a generator that is a function of (seed, k): any step replays alone, and
    resuming saves no random state.

    N processes with `accumulation` A take the steps that one process takes with N·A, and each
    yields all of them.

    Args:
        student: The model that learns; changed in place.
        batches: Clean samples without end, the same on every process, which takes its part. When
            resuming, they must continue where the state stopped.
        objective: What is trained.
        steps: K, the length of the whole training.
        optimizer: Of the student's parameters.
        teacher: A frozen diffusion model, for objectives that distill.
        average_decay: Of the moving average for sampling.
        also_average: Decays of further averages, kept in `state.averages`.
        learning_rate: As a function of the clock; `None` leaves the optimizer's alone.
        accumulation: Equal shards of a batch, evaluated one after the other: a batch that is too
            large for the memory becomes several that are not. Shard s of step k draws from a
            generator of its own, a function of (seed, k, s).
        clip: The largest norm of the gradient; a longer one is shortened to it.
        precision: `"bfloat16"` puts autocast around the whole objective, so that student and
            target see the same rounding. `"float32"` is what it says: cuDNN's convolutions in
            TF32, PyTorch's default on GPUs, are off during a step, for their 10 bits would be more
            rounding than neighbors on a fine grid differ by.
        seed: Of the noise.
        state: Where to go on, when resuming.
        processes: Those that train this student together, as in `with together() as processes`.
            They begin with the weights of the main process.

    Yields:
        A `Step` after each optimization step.

    Raises:
        ValueError: If two noise ranges disagree, `steps` or another knob is out of range, a batch
            cannot be cut into equal shards, or the batches end.
        Diverged: If a loss or gradient is not finite, before it reaches a weight. Naming the
            sample and its sigma.

    Source: Song et al. (2023), Algorithms 2 and 3: the loop around the loss.
    """
    _check(student, objective, steps, precision)
    check_averages(average_decay, also_average)
    check_gradients(accumulation, clip)
    state = state or State.begin(student, optimizer, objective, also_average)
    if state.student is not student or state.optimizer is not optimizer:
        raise ValueError("the state to go on from belongs to another student or optimizer")
    if tuple(state.averages) != also_average:
        raise ValueError(
            f"the state to go on from has further averages {tuple(state.averages)}; "
            f"also_average asks for {also_average}"
        )
    device = next(student.parameters()).device
    target = frozen_view(student) if state.target is None else state.target
    models = Models(student, target, teacher)
    shards, parameters = accumulation * processes.count, [*student.parameters()]
    whole_float32 = _whole_float32 if torch.cuda.is_available() else nullcontext
    processes.copy(state.tensors)
    student.train()
    while state.step < steps:
        clock = Clock(state.step, steps)
        if learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(clock)
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"the batches ended before step {clock.step}; they must never end")
        optimizer.zero_grad()
        losses = []
        for keys, shard in _shards(batch, shards, processes.shards(accumulation), device):
            generator = seeded(seed, "step", clock.step, *keys, device=device)
            with whole_float32():
                with _autocast(device.type, precision == "bfloat16"):
                    loss = objective(models, shard, clock=clock, generator=generator)
                (loss.value / shards).backward()
            losses.append(loss.detach())
        processes.add([p.grad for p in parameters if p.grad is not None])
        loss, norm = _joined(losses, processes), gradient_norm(parameters)
        _check_finite(loss, norm, clock)  # a GPU is waited for here, once a step
        if clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        optimizer.step()
        if state.target is not None:
            blend(state.target, student, objective.target_decay(clock))  # θ⁻ ← μ θ⁻ + (1 - μ) θ
        blend(state.average, student, average_decay)
        for decay, average in state.averages.items():
            blend(average, student, decay)
        state.step += 1
        yield Step(clock, loss, state, norm, optimizer.param_groups[0]["lr"])


def _autocast(device: str, enabled: bool) -> AbstractContextManager[object]:
    """Autocast to bfloat16, on or off; where it is off already, nothing, for that is faster."""
    if not enabled and not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.bfloat16, enabled=enabled)


@contextmanager
def _whole_float32() -> Iterator[None]:
    """No convolution in TF32; afterwards all is as it was."""
    cudnn = torch.backends.cudnn
    try:
        before = cudnn.allow_tf32
    except RuntimeError:  # set by PyTorch's newer names, one for each operation: that was a choice
        yield
        return
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


@torch.no_grad()
def blend(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move an average toward a model: decay * average + (1 - decay) * model.

    Source: Song et al. (2023), Algorithm 2, last line.
    """
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)


def frozen_copy(model: Preconditioned) -> Preconditioned:
    """A copy that does not learn.

    Source: ours.
    """
    return deepcopy(model).requires_grad_(False)


def frozen_view(model: Denoiser) -> Denoiser:
    """The model itself, evaluated without gradient: no second copy of the weights.

    Only the gradient is off. A detached tensor or inference mode would turn the forward-mode
    derivatives of later chapters into silent zeros.

    Source: ours.
    """

    def frozen(x: Samples, sigma: PerSample, label: Labels | None = None) -> Samples:
        with torch.no_grad():
            return model(x, sigma, label)

    return update_wrapper(frozen, model, (), ())  # `frozen.__wrapped__` is the model


def distilled(teacher: Preconditioned, scalings: Scalings) -> Preconditioned:
    """A student that starts as a copy of the teacher's network, in the dress of `scalings`.

    A copy: without it, training the student would train the teacher.

    Source: Song et al. (2023), Algorithm 2: θ initialized to φ.
    """
    return Preconditioned(deepcopy(teacher.net).requires_grad_(True), scalings)


@dataclass(frozen=True)
class LearningRate:
    """A linear warm-up, then constant, or down to 0 in a straight line or a half cosine.

    Attributes:
        peak: The rate after the warm-up.
        warmup: Steps of the warm-up.
        decay: What follows it.

    Source: ours; the paper's runs use a constant rate without warm-up.
    """

    peak: float
    warmup: int = 0
    decay: Literal["none", "linear", "cosine"] = "none"

    def __call__(self, clock: Clock) -> float:
        """The rate of this step."""
        rate = self.peak * min(1.0, (clock.step + 1) / (self.warmup + 1))
        if self.decay == "linear":
            rate *= 1 - clock.progress
        if self.decay == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * clock.progress))
        return rate


@dataclass(frozen=True)
class Adam:
    """Adam, fused into one kernel.

    Source: Kingma and Ba (2015).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model's parameters."""
        return torch.optim.Adam(model.parameters(), self.lr, self.betas, fused=True)


@dataclass(frozen=True)
class RAdam:
    """Rectified Adam: needs no warm-up; the optimizer of all the paper's consistency models.

    PyTorch has no fused kernel for it.

    Source: Liu et al. (2020); Song et al. (2023), App. C.
    """

    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.999)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model's parameters."""
        return torch.optim.RAdam(model.parameters(), self.lr, self.betas)


AnyOptimizer = Adam | RAdam


def check_averages(average_decay: float, also_average: tuple[float, ...]) -> None:
    """Refuse decays outside [0, 1), and one that is there twice."""
    decays = (average_decay, *also_average)
    for i, decay in enumerate(decays):
        if not 0 <= decay < 1:
            name = "also_average" if i else "average_decay"
            raise ValueError(f"{name} must lie in [0, 1); got {decay}")
    if len(set(decays)) < len(decays):
        raise ValueError(
            f"also_average names decays other than average_decay = {average_decay}, each once; "
            f"got {also_average}"
        )


def check_gradients(accumulation: int, clip: float | None) -> None:
    """Refuse what would leave no gradient."""
    if accumulation < 1:
        raise ValueError(f"accumulation must be at least 1; got {accumulation}")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip must be positive, or left out; got {clip}")


def _check(student: Preconditioned, objective: Any, steps: int, precision: str) -> None:
    ranges: list[NoiseRange] = [student.scalings.noise_range]
    ranges += [objective.noise_range] if hasattr(objective, "noise_range") else []
    if len(set(ranges)) > 1:
        raise ValueError(
            f"the student's scalings use {ranges[0]} but the objective uses {ranges[1]}; "
            "give both the same NoiseRange"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    check_choice("precision", precision, get_args(Precision))


def check_shards(size: int, n: int) -> None:
    """Refuse a batch that cannot be cut into `n` equal shards.

    Raises:
        ValueError: Saying what must divide it.

    Source: ours.
    """
    if size % n:
        raise ValueError(
            f"a batch of {size} cannot be cut into {n} equal shards; choose a batch size that "
            f"accumulation times the number of processes = {n} divides"
        )


def _shards(
    batch: Batch, n: int, mine: range, device: torch.device
) -> Iterator[tuple[tuple[int, ...], Batch]]:
    """Parts of a batch, and what each adds to the keys of its generator: the only one, nothing."""
    check_shards(len(batch.x), n)
    x, label = batch.x.chunk(n), None if batch.label is None else batch.label.chunk(n)
    for s in mine:
        shard = Batch(x[s].to(device), None if label is None else label[s].to(device))
        yield () if n == 1 else (s,), shard


def _joined(losses: list[Loss], processes: Processes) -> Loss:
    """The loss of the whole batch, from those of its shards."""
    if len(losses) == processes.count == 1:
        return losses[0]
    value = processes.gather(torch.stack([loss.value for loss in losses])).mean()
    per_sample, sigma = (
        processes.gather(torch.cat([getattr(loss, name) for loss in losses]))
        for name in ("per_sample", "sigma")
    )
    return Loss(value, per_sample, sigma)


def _check_finite(loss: Loss, norm: Tensor, clock: Clock) -> None:
    """Refuse a step that would ruin every weight."""
    if math.isfinite(float(loss.value + norm)):
        return
    at, wrong = f"training has diverged in step {clock.step + 1}", ~loss.per_sample.isfinite()
    if not bool(wrong.any()):
        raise Diverged(f"{at}: its losses are finite, its gradient is not", clock.step, None)
    i = int(wrong.int().argmax())
    told = f"the loss of sample {i} of its batch is {float(loss.per_sample[i])}"
    raise Diverged(f"{at}: {told}, at sigma {float(loss.sigma[i]):.4g}", clock.step, i)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Of all together; the same as PyTorch's `get_total_norm`, in less time for small networks.

    Source: ours.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm
