"""How training went: steps, weights, losses, gradients, averages."""

import math
from collections.abc import Iterable, Iterator
from copy import deepcopy
from statistics import median
from typing import get_args

import torch
from torch import Tensor

from cmbook.doctor.findings import Finding, Verdict, found, over, under
from cmbook.doctor.patient import Patient, Undone
from cmbook.experiment import Experiment
from cmbook.losses import (
    EDM,
    AnyObjective,
    ConsistencyDistillation,
    ConsistencyTraining,
    ProgressiveDistillation,
)
from cmbook.noise import seeded
from cmbook.parameterization import Preconditioned
from cmbook.protocols import Clock, Denoiser, Models
from cmbook.training import frozen_view

Weights = dict[str, Tensor]
_OTHER = (
    "Look at your loss (is the target detached? do both points of a pair share their noise?), at "
    "the loop and at the loader"
)


def progress(p: Patient) -> Iterator[Finding]:
    """Whether all steps were taken, and of how many samples each."""
    steps, size = p.recipe.training.steps, p.recipe.training.batch_size
    cause = f"training was not finished: step {p.run.step} of {steps}"
    remedy = f"Go on: cmbook train RECIPE --out {p.run.folder} --resume"
    done = p.run.step / steps
    yield found("finished", done, under(done, 1), cause, remedy)
    cause = f"the batch of {size} is too small: its gradient is mostly noise"
    yield found("batch", size, under(size, 8), cause)
    first, second = p.recipe.training.optimizer.betas
    cause = (
        f"Adam remembers gradients longer than their squares, betas = ({first:g}, {second:g}): its "
        "steps go on where they no longer should"
    )
    yield found("betas", first, "look" if first > max(second, 0.95) else "well", cause)
    dropped = max(
        (getattr(p.recipe.network, name, 0.0) for name in ("dropout", "label_dropout")), default=0.0
    )
    cause = f"dropout {dropped:g} leaves little to learn from"
    yield found("dropout", dropped, over(dropped, 0.3), cause)
    warming = p.recipe.training.warmup / steps
    cause = f"the rate warms up for {p.recipe.training.warmup} of {steps} steps: it never stays up"
    yield found("warm-up", warming, over(warming, 0.5), cause)
    weights = sum(w.numel() for w in p.weights["average"].values())
    each = weights / math.prod(p.run.record["shape"])
    cause = f"the network is small: {weights} weights for samples of {p.run.record['shape']}"
    yield found("network size", each, under(each, 100), cause)
    if p.rows and p.rows[-1].get("step") == p.run.step and p.rows[-1].get("learning_rate"):
        said = p.recipe.training.learning_rate(Clock(p.run.step - 1, steps))
        ratio = p.rows[-1]["learning_rate"] / max(said, 1e-300)
        cause = f"the learning rate of the last step was {ratio:.2g} times what the recipe says"
        yield found("rate again", ratio, "well" if 0.9 < ratio < 1.1 else "look", cause)


def moved(p: Patient) -> Iterator[Finding]:
    """Whether the weights moved, and not too far at once."""
    knobs, first, now = p.recipe.training, p.weights.get("first"), p.weights.get("student")
    size = _size(first or p.weights["average"])
    lr, one = knobs.optimizer.lr, knobs.optimizer.lr / size
    # Adam moves a weight by about the learning rate a step at most, whatever the gradient.
    cause = f"the learning rate {lr:g} is too high: a step is {one:.2g} times as large as a weight"
    yield found("step size", one, over(one, 0.2, 1), cause)
    if first is None or now is None:
        every = max(1, p.run.step // 1000)
        rates = [knobs.learning_rate(Clock(k, knobs.steps)) for k in range(0, p.run.step, every)]
        way = 0.03 * sum(rates) * every / size  # of all steps together, most goes back and forth
    else:
        still = sum(w.numel() for name, w in now.items() if bool((w == first[name]).all()))
        share = still / sum(w.numel() for w in now.values())
        cause = f"{share:.0%} of the weights are frozen: they are as they began"
        if share == 1:
            cause = "the student is frozen: it never learned, all weights are as they began"
        yield found("frozen weights", share, over(share, 0.0, 0.2), cause)
        way = way_between(now, first) / max(_norm(first), 1e-12)
    clip = "" if knobs.clip is None else f", or training.clip = {knobs.clip:g} leaves nothing"
    cause = f"the weights have hardly moved: learning rate {lr:g} is too low, the steps few{clip}"
    yield found("moved", way, under(way, 0.03, 0.003), cause)


def bits(p: Patient) -> Iterator[Finding]:
    """Whether what is trained is kept in numbers that small steps can still change."""
    trained = [p.weights[name] for name in ("student", "target") if name in p.weights]
    if not trained:
        raise Undone("the weights that were trained are not at hand")
    kinds = (w.dtype for each in trained for w in each.values())
    least = min(kinds, key=lambda kind: kind.itemsize)
    cause = (
        f"weights are kept in {str(least).removeprefix('torch.')} while they train: small steps, "
        "and most of what an average moves by, are rounded away"
    )
    yield found("weight bits", 8 * least.itemsize, under(8 * least.itemsize, 32, 32), cause)


def values(p: Patient) -> Iterator[Finding]:
    """Whether weights take many values, as those that were trained do."""
    large = [w for w in p.weights["average"].values() if w.ndim > 1 and w.numel() >= 1024]
    if p.run.step < 10:
        raise Undone("so few steps leave few values")
    large = [w for w in large if bool((w != w.flatten()[0]).any())]  # zeros may have been frozen
    each = [w.unique().numel() for w in large]
    shares = [n / w.numel() for n, w in zip(each, large, strict=True)]
    least = min(shares, default=1.0)
    few = min(each, default=0)
    cause = f"weights are rounded: a matrix has no more than {few} different values"
    yield found("values", least, under(least, 0.1, 0.1 if few <= 256 else 0.0), cause)
    most, value = max(map(_most_common, large), default=(0.0, 0.0))
    cause = f"{most:.0%} of a matrix are {value:.3g}: pruned, clamped, or a part of it was lost"
    yield found("one value", most, over(most, 0.1), cause)


def _most_common(weight: Tensor) -> tuple[float, float]:
    """The share of the value that comes most often, and the value."""
    values, counts = weight.unique(return_counts=True)
    return float(counts.max()) / weight.numel(), float(values[counts.argmax()])


def kin(p: Patient) -> Iterator[Finding]:
    """Whether every matrix still resembles what it began as, which training alone leaves."""
    first, now = p.weights.get("first"), p.weights["average"]
    if first is None:
        raise Undone("the first weights are not at hand: torch is another one")
    names = [n for n, w in first.items() if w.ndim > 1 and w.numel() >= 256 and bool(w.any())]
    like = {name: _cosine(now[name], first[name]) for name in names}
    strange = {name: _became(name, now[name], first) for name in names if like[name] < 0.1}
    share = len(strange) / max(1, len(names))
    told = [f"{name} {became}" for name, became in strange.items() if became]
    known = ", ".join(told[:3]) + (", …" if len(told) > 3 else "")
    cause = f"weights were changed after training, as by a conversion: {known}"
    # A wild run forgets where it began, but no run learns to be its beginning, transposed.
    lost = bool(strange) and median(like.values()) > 0.5
    if lost and not told:
        some = ", ".join([*strange][:3])
        cause = f"weights are not those of the run: {some} resemble nothing that they began as"
    yield found("kin", share, "ill" if told or lost else "well", cause)
    grown = median([float(now[n].norm() / first[n].norm()) for n in names] or [1.0])
    kept = grown * median([*like.values()] or [1.0])
    # Training adds to the first weights; what lies between two networks is less of each.
    cause = (
        f"the weights have kept {kept:.0%} of what they began as, and have not grown: they were "
        "averaged with those of another network, or are damaged"
    )
    yield found("kept", kept, "look" if kept < 0.58 and grown < 1.2 else "well", cause)


def _became(name: str, weight: Tensor, first: Weights) -> str:
    """What became of the first weights, if that can be seen."""
    if _cosine(-weight, first[name]) > 0.3:
        return "has the other sign"
    if weight.ndim == 2 and len(set(weight.shape)) == 1 and _cosine(weight.T, first[name]) > 0.3:
        return "is transposed"
    for other, begun in first.items():
        if other != name and begun.shape == weight.shape and _cosine(weight, begun) > 0.3:
            return f"is {other}"
    for axis in range(weight.ndim):
        if _cosine(weight.flip(axis), first[name]) > 0.3:
            return f"is turned around along axis {axis}"
    return ""


def _cosine(a: Tensor, b: Tensor) -> float:
    one, other = a.double().flatten(), b.double().flatten()
    return float(torch.dot(one, other) / (one.norm() * other.norm()).clamp(min=1e-300))


def curves(p: Patient) -> Iterator[Finding]:
    """Whether the loss fell and the gradient stayed."""
    rows = [row for row in p.rows if math.isfinite(row.get("loss", math.nan))]
    if len(rows) < 4:
        raise Undone("the log has fewer than 4 rows")
    losses, quarter = [row["loss"] for row in rows], len(rows) // 4
    last, before = (median(part) for part in (losses[-quarter:], losses[:-quarter]))
    if min(losses) < 0:
        cause, remedy = "the loss is negative, which no distance is", "Look at its sign"
        yield found("loss", min(losses), "ill", cause, remedy)
    elif not grows(p.recipe) and min(losses) > 0:
        if isinstance(p.recipe.objective, EDM):  # that of others may begin near 0 and rise
            ratio = last / losses[0]
            cause = "the loss has risen since the start: the learning rate is too high"
            yield found("loss", ratio, over(ratio, 1.1, 2), cause)
        ratio = last / before
        cause = "the loss goes up at the end: training has become unstable"
        yield found("loss at the end", ratio, over(ratio, 3), cause)
    norms = [row["gradient_norm"] for row in rows if "gradient_norm" in row]
    if norms:
        yield gradient_finding(norms)


def gradient_finding(norms: list[float]) -> Finding:
    """Whether the gradient is 0, or has exploded.

    Args:
        norms: Means of its norm, row by row of the log.

    Source: ours.
    """
    usual = median(norms)
    if usual == 0:
        cause = "there is no gradient: nothing is learned, the student is frozen"
        return found("gradient", 0, "ill", cause, "Check that the loss is not detached")
    ratio = max(norms[1:], default=usual) / usual  # at first, all is to be learned
    # A curriculum raises norms tenfold; only an explosion raises a mean over 50 steps 100-fold.
    cause = "the gradient explodes: the learning rate is too high, or an objective is unstable"
    return found("gradient", ratio, over(ratio, 100), cause)


def memory_finding(decay: float, steps: int) -> Finding:
    """How much of the moving average is still the weights of the start.

    Args:
        decay: Of the average; the start counts with `decay` to the power of the steps.
        steps: How many are taken.

    Source: ours.
    """
    left = decay**steps
    # Over a half, the average is more its start than all that was learned; a tenth shows.
    cause = (
        f"the average still remembers the first weights: they are {left:.0%} of it after {steps} "
        f"steps, its decay {decay:g} is too near 1"
    )
    better = f"Set training.average_decay={max(0.0, 1 - 10 / max(steps, 11)):.3g}, or train longer"
    return found("average memory", left, over(left, 0.1, 0.5), cause, better)


def repeats(p: Patient) -> Iterator[Finding]:
    """Whether fresh noise and samples cost what the log says."""
    objective, step, steps = p.recipe.objective, p.run.step, p.recipe.training.steps
    if not isinstance(objective, EDM | ConsistencyDistillation | ConsistencyTraining):
        return  # of the others, the loss may be no distance, or depends on the round
    logged = _last(p, "loss")
    if logged < 0:
        return
    models = _last_models(p)  # in train mode, as the log's loss was taken: dropout costs
    n, size = min(4 * p.count, len(p.seen.x)), p.recipe.training.batch_size

    def loss(part: slice) -> Tensor:
        clock, generator = (
            Clock(max(0, step - 1), steps),
            seeded("doctor", "again", device=p.device),
        )
        with torch.no_grad():
            loss = objective(models, p.part(part), clock=clock, generator=generator)
            return loss.per_sample.double()

    fresh = loss(slice(-n, None))
    ratio, doubt = float(fresh.mean()) / logged, float(fresh.std()) / math.sqrt(n) / logged
    what = "noise"
    if p.length is not None and p.length > 2 * size:
        first = float(loss(slice(0, min(size, n))).mean()) / logged
        what = "samples" if first < (1 + ratio) / 2 else what
    cause = (
        f"training has seen the same {what} again and again, or something else than the recipe "
        f"says: on fresh ones the loss is {ratio:.2g} times that in the log"
    )
    bad: Verdict = "ill" if ratio - 3 * doubt > 1.3 else "well"
    remedy = ""
    if ratio + 3 * doubt < 0.75:
        bad, remedy = "ill", _OTHER
        cause = (
            "what was trained is not what the recipe says: its objective, on its data, costs "
            f"{ratio:.2g} times what the log says"
        )
    yield found("loss again", ratio, bad, cause, remedy)


def gradients(p: Patient) -> Iterator[Finding]:
    """Whether the recipe's objective has the gradient that the log tells of.

    A loss with a fault may cost as much as it should and lead elsewhere: one whose target learns
    along has the value of one whose target is frozen.
    """
    objective, step, knobs = p.recipe.objective, p.run.step, p.recipe.training
    if not isinstance(objective, get_args(AnyObjective)):
        return  # of a method from outside, nobody knows what its gradient depends on
    if isinstance(objective, ProgressiveDistillation):
        return  # its teacher is the student of the round before
    logged = _last(p, "gradient_norm")
    models = _last_models(p)
    assert isinstance(models.student, Preconditioned)
    clock, parameters = Clock(max(0, step - 1), knobs.steps), [*models.student.parameters()]
    n = min(8 * p.count if p.count > 64 else 16, len(p.seen.x))
    size, squares = min(knobs.batch_size, n // 4), []
    total: list[Tensor] = []
    for i in range(n // size):
        generator = seeded("doctor", "gradient", i, device=p.device)
        batch = p.part(slice(-n + i * size, -n + (i + 1) * size or None))
        value = objective(models, batch, clock=clock, generator=generator).value
        new = torch.autograd.grad(value, parameters, allow_unused=True)
        grads = [g for g in new if g is not None]
        total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
        squares.append(_squared(grads))
    k, mean = len(squares), sum(squares) / len(squares)
    # In E|g|^2 of a batch, what chance adds shrinks with its size; |E g|^2, of all batches, stays.
    steady = max(0.0, (_squared(total) / k - mean) / (k - 1))
    expected = steady + max(0.0, mean - steady) * size / knobs.batch_size
    ratio = math.sqrt(expected) / logged
    cause = (
        "what was trained is not what the recipe says: on the same weights, its objective has a "
        f"gradient {ratio:.2g} times as long as that in the log"
    )
    remedy = _OTHER
    if ratio < 0.4:
        again = max((f.measured for f in repeats(p)), default=1.0)
        if 0.75 < again < 1.3:
            cause = (
                f"the gradient in the log is {1 / ratio:.2g} times that of the recipe's objective, "
                "though its loss is right: gradients add up from step to step, or are scaled"
            )
            remedy = "Call optimizer.zero_grad() in every step; look at the loop"
    bad: Verdict = "well" if 0.5 < ratio < 1.8 else "look"
    yield found("gradient again", ratio, bad if 0.4 < ratio < 2.5 else "ill", cause, remedy)


def optimizer(p: Patient) -> Iterator[Finding]:
    """Whether one optimizer took all steps, and does not also shrink the weights."""
    saved = p.moments
    if not saved["state"]:
        raise Undone("the optimizer's moments are not at hand")
    steps = [float(each["step"]) for each in saved["state"].values() if "step" in each]
    share = min(steps, default=float(p.run.step)) / p.run.step
    cause = (
        f"the optimizer has counted {share * p.run.step:.0f} of {p.run.step} steps: it was made "
        "anew meanwhile, or leaves weights out, and forgets its moments"
    )
    yield found("optimizer steps", share, under(share, 0.9), cause)
    decay = max(float(group.get("weight_decay", 0.0)) for group in saved["param_groups"])
    cause = f"the optimizer shrinks the weights, by a weight decay of {decay:g}"
    yield found("weight decay", decay, over(decay, 0.05), cause)


def averages(p: Patient) -> Iterator[Finding]:
    """Whether average and target follow the student."""
    yield memory_finding(p.run.average, p.recipe.training.steps)
    first, student = p.weights.get("first"), p.weights.get("student")
    average, target = p.weights["average"], p.weights.get("target")
    if student is None:
        raise Undone("the student's weights are not at hand, only its average")
    if first is not None and (way := way_between(student, first)) > 0:
        moves = way_between(average, first) / way
        if p.run.step * (1 - p.run.average) > 1:  # by now it should have gone most of the way
            cause = "the average is frozen: it was not moved after each step"
            yield found("average moves", moves, under(moves, 0.3, 0.05), cause)
        if target is not None:
            # Whatever mu, a target that follows has gone most of the way, even if at a distance.
            ratio, left = way_between(target, first) / way, _remembered(p)
            why = f"mu is too near 1: it keeps {left:.0%} of the first weights"
            cause = f"the target does not move: {why if left > 0.5 else 'it is frozen'}"
            yield found("target moves", ratio, under(ratio, 0.5, 0.1), cause)
    if p.data is not None:
        levels = p.skill(p.run.model, p.recipe).levels
        theirs, ours = (
            p.errors(model, p.asked, levels)[0]
            for model in (_filled(p.run.model, student), p.run.model)
        )
        cause = (
            f"the average is far worse than the student: its decay {p.run.average:g} is too near 1 "
            f"for {p.run.step} steps, or it did not follow"
        )
        ratio = max(own / max(other, 1e-300) for own, other in zip(ours, theirs, strict=True))
        yield found("average behind", ratio, over(ratio, 1.5), cause)


def grows(recipe: Experiment) -> bool:
    """Whether the number of levels grows, so that losses cannot be compared.

    Source: ours.
    """
    if not isinstance(recipe.objective, ConsistencyTraining):
        return False
    curriculum, steps = recipe.objective.curriculum, recipe.training.steps
    return curriculum.levels_at(Clock(0, steps)) < curriculum.levels_at(Clock(steps - 1, steps))


def _last_models(p: Patient) -> Models:
    """Those of the last step, in train mode."""
    student = _filled(p.run.model, p.weights["student"]).requires_grad_().train()
    target: Denoiser = frozen_view(student)
    if "target" in p.weights:
        target = _filled(p.run.model, p.weights["target"]).train()
    return Models(student, target, p.walker if p.recipe.objective.needs_teacher else None)


def _last(p: Patient, column: str) -> float:
    """The last number of a log that reaches the checkpoint."""
    if not p.rows or p.rows[-1].get("step") != p.run.step or "student" not in p.weights:
        raise Undone("the log does not reach the checkpoint")
    last = p.rows[-1].get(column, math.nan)
    if not (math.isfinite(last) and last != 0):
        raise Undone(f"the log's last {column} says nothing")
    return last


def _remembered(p: Patient) -> float:
    """What is left of the first weights in the target."""
    steps, every = p.recipe.training.steps, max(1, p.run.step // 1000)
    clocks = (Clock(k, steps) for k in range(0, p.run.step, every))
    return math.prod(p.recipe.objective.target_decay(clock) ** every for clock in clocks)


def _filled(model: Preconditioned, weights: Weights) -> Preconditioned:
    """A copy of the model with other weights; what is no weight stays."""
    other = deepcopy(model)
    other.load_state_dict(weights, strict=False)
    return other


def _size(weights: Weights) -> float:
    """The root mean square of matrices' weights, those that begin at 0 aside."""
    chosen = [w for w in weights.values() if w.ndim >= 2 and bool(w.any())]
    count = sum(w.numel() for w in chosen)
    return math.sqrt(_squared(chosen) / max(count, 1)) or 1e-12


def _norm(weights: Weights) -> float:
    return math.sqrt(_squared(weights.values()))


def _squared(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)


@torch.no_grad()
def way_between(a: Weights, b: Weights) -> float:
    """The distance of two sets of weights.

    Source: ours.
    """
    return _norm({name: a[name].double() - b[name].double() for name in a})
