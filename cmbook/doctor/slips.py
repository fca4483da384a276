"""Slips: what people get wrong in a loop or a loss, each of them a line or two of `loop.Loop`."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cmbook.data import ImageData, TensorData
from cmbook.data.images import images
from cmbook.distances import L1, L2, Norm, PseudoHuber
from cmbook.doctor.loop import Loop
from cmbook.doctor.parts import views
from cmbook.doctor.patient import Patient
from cmbook.guidance import guided
from cmbook.losses import EDM, ConsistencyDistillation, ConsistencyTraining
from cmbook.losses.regression import neighbors
from cmbook.noise import add_noise, integers, normal, seeded, uniform
from cmbook.ode import SOLVERS
from cmbook.parameterization import (
    AnyScalings,
    ConsistencyScalings,
    EDMScalings,
    Preconditioned,
    VEScalings,
    VPScalings,
)
from cmbook.protocols import Batch, Clock, Denoiser, Labels, Loss, Pair, PerSample, Samples
from cmbook.training import frozen_view
from cmbook.weights import WEIGHTS

Slip = Callable[..., Loop]
_LOADER, _LOOP, _LOSS = "Look at the loader", "Look at the loop", "Look at your loss"


def slips(p: Patient) -> Iterator[Loop]:
    """All that this recipe leaves room for, the likeliest first.

    Source: ours.
    """
    slip, objective = partial(Loop, p), p.recipe.objective
    pairs = isinstance(objective, ConsistencyDistillation | ConsistencyTraining)
    yield from _pairs(p, slip) if pairs else ()
    yield from _noise(p, slip) if pairs or isinstance(objective, EDM) else ()
    yield from _answers(p, slip) if pairs or isinstance(objective, EDM) else ()
    yield from _loop(p, slip)
    yield from _loader(p, slip)


def later(p: Patient) -> Iterator[Loop]:
    """Those that do not show in the first steps.

    Source: ours.
    """
    slip, objective, knobs = partial(Loop, p), p.recipe.objective, p.recipe.training
    if isinstance(objective, ConsistencyTraining):
        yield from _curriculum(p, objective, slip)

    def forgetful(loop: Loop) -> None:
        Loop.begin(loop)
        loop.optimizer.state.clear()

    yield slip("the optimizer was made anew at this step", "Bring it back, too", begin=forgetful)
    yield slip(
        "the rate is not lowered: it stays as it began",
        "Set training.decay",
        rate=lambda loop, rate: knobs.optimizer.lr,
    )

    def restarted(loop: Loop) -> None:
        Loop.begin(loop)
        assert p.data is not None
        loop.batches = p.data.batches(knobs.batch_size, p.recipe.seed)

    yield slip("the loader began anew at this step", _LOADER, begin=restarted)
    if isinstance(objective, ConsistencyDistillation | ConsistencyTraining):
        yield from _targets(p, slip)


def scaled(p: Patient, loss: float, norm: float) -> Iterator[Loop]:
    """A loss, or a gradient, that is as many times too large.

    Source: ours.
    """
    if abs(loss - 1) > 0.001:

        def times(loop: Loop, batch: Batch, generator: Any) -> Loss:
            one = Loop.loss(loop, batch, generator)
            return replace(one, value=loss * one.value)

        what = f"the loss is {loss:.3g} times the recipe's"
        yield Loop(p, what, "Take the mean over samples and coordinates", loss=times)
    if abs(norm - 1) > 0.001:
        what = f"the gradient is {norm:.3g} times the recipe's"
        remedy = "Divide the loss of a shard by the number of shards; look at the loop"
        yield Loop(p, what, remedy, descended=lambda loop, loss: norm * loss.value)


def _loop(p: Patient, slip: Slip) -> Iterator[Loop]:
    recipe, knobs = p.recipe, p.recipe.training
    yield slip(
        "gradients add up from step to step",
        "Call optimizer.zero_grad() in every step",
        zero=lambda loop: None,
    )

    def anew(loop: Loop) -> None:
        Loop.zero(loop)
        loop.optimizer.state.clear()

    yield slip("the optimizer is made anew in every step", "Make it before the loop", zero=anew)
    yield slip(
        "every step draws the same noise again and again",
        "Seed the generator once, or by the number of the step",
        generator=lambda loop, *keys: seeded(0, device=p.device),
    )
    yield slip("the loss has the wrong sign", "Turn it", descended=lambda loop, loss: -loss.value)

    def negative(loop: Loop, batch: Batch, generator: Any) -> Loss:
        one = Loop.loss(loop, batch, generator)
        return replace(one, value=-one.value)

    yield slip("the loss has the wrong sign: it is negative", "Turn it", loss=negative)
    yield slip(
        "no weight moves: the student is frozen",
        "Call optimizer.step() after the gradient is there",
        rate=lambda loop, rate: 0.0,
    )
    yield slip(
        "the optimizer was given a copy of the weights: the student is frozen",
        "Give it the parameters of the model that the loss knows",
        optimizer_of=lambda loop, student: knobs.optimizer.build(deepcopy(student)),
    )
    for factor in (0.01, 0.1, 0.5, 2.0, 10.0, 100.0):
        what = f"the optimizer's learning rate is {factor:g} times the recipe's"
        yield slip(what, _LOOP, rate=lambda loop, rate, f=factor: f * rate)
    for decay in (0.1, 1.0):
        build = partial(torch.optim.AdamW, lr=knobs.optimizer.lr, weight_decay=decay)
        what = f"the optimizer shrinks the weights, by a weight decay of {decay:g}"
        yield slip(what, "Set it to 0", optimizer_of=lambda loop, s, b=build: b(s.parameters()))
    for name in ("SGD", "Adam", "RAdam", "RMSprop"):
        if name == type(knobs.optimizer).__name__ and knobs.optimizer.betas == (0.9, 0.999):
            continue
        build = partial(getattr(torch.optim, name), lr=knobs.optimizer.lr)
        yield slip(
            f"the optimizer is {name}, with the defaults of PyTorch",
            "Build it as training.optimizer says",
            optimizer_of=lambda loop, s, b=build: b(s.parameters()),
        )
    for steps in (100, 1000):
        yield slip(
            f"the rate warms up for {steps} steps",
            "Set training.warmup",
            rate=lambda loop, rate, n=steps: rate * min(1.0, (loop.clock.step + 1) / n),
        )
    if knobs.clip is not None:
        yield slip("the gradient is not clipped", "Set clip", longest=lambda loop, clip: None)
    for longest in {0.1, 1.0} - {knobs.clip}:
        yield slip(
            f"the gradient is clipped to {longest:g}",
            f"Set training.clip={longest:g}",
            longest=lambda loop, clip, n=longest: n,
        )
    if recipe.teacher is not None:
        yield slip(
            "the student does not begin as a copy of its teacher",
            "Copy the teacher's network, as cmbook.training.distilled does",
            untrained=lambda loop, recipe, data, teacher: Loop.untrained(loop, recipe, data, None),
        )
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in p.run.model.modules()):

        def evaluating(loop: Loop) -> None:
            Loop.begin(loop)
            loop.student.eval()

        yield slip("the student is in eval mode: it drops nothing", _LOOP, begin=evaluating)


def _loader(p: Patient, slip: Slip) -> Iterator[Loop]:
    data, size, seed = p.data, p.recipe.training.batch_size, p.recipe.seed
    assert data is not None
    yield slip(
        "every step sees the same samples again and again",
        "Make the loader's iterator once, before the loop",
        batch=lambda loop: next(data.batches(size, seed)),
    )
    if isinstance(data, TensorData | ImageData):

        def in_order(loop: Loop) -> Batch:
            which = (torch.arange(size) + loop.clock.step * size) % len(data)
            if isinstance(data, ImageData):
                return images(data.rows, which)
            return Batch(data.x[which], None if data.label is None else data.label[which])

        yield slip("samples come in the order of the file", "Shuffle them", batch=in_order)
    yield slip(
        "half of every batch is lost",
        _LOADER,
        shown=lambda loop, x, label: Batch(
            x[: len(x) // 2], None if label is None else label[: len(x) // 2]
        ),
    )
    for how, change in views(p).items():
        yield slip(
            f"samples are shown {how}",
            _LOADER,
            shown=lambda loop, x, label, f=change: Batch(f(x), label),
        )
    for how, some in _augmented(p).items():
        yield slip(
            f"samples are augmented: {how}",
            "Leave out what a classifier's loader does: a model draws what it was shown",
            shown=lambda loop, x, label, f=some: Batch(
                f(x, seeded("doctor", "augment", loop.clock.step)), label
            ),
        )
    if not p.classes:
        return
    yield slip("no labels are handed on", _LOADER, shown=lambda loop, x, label: Batch(x))
    told: dict[str, Callable[[Tensor], Tensor]] = {
        "all labels are 0": torch.zeros_like,
        "labels belong to other samples": lambda label: label.roll(1),
        "labels are one too high": lambda label: (label + 1) % p.classes,
        "labels count backward": lambda label: p.classes - 1 - label,
    }
    for what, turn in told.items():
        yield slip(what, _LOADER, shown=lambda loop, x, label, f=turn: Batch(x, f(label)))


def _augmented(p: Patient) -> dict[str, Callable[[Samples, torch.Generator], Samples]]:
    """What loaders do at random; it is known by what it makes of many samples."""

    def some(view: Callable[[Tensor], Tensor], x: Samples, g: torch.Generator) -> Samples:
        which = uniform(len(x), g).view(-1, *[1] * (x.ndim - 1)) < 0.5
        return torch.where(which, view(x), x)

    def mixed(x: Samples, g: torch.Generator) -> Samples:
        share = uniform(len(x), g).view(-1, *[1] * (x.ndim - 1))
        return share * x + (1 - share) * x.roll(1, 0)

    def moved(x: Samples, g: torch.Generator, far: int) -> Samples:
        padded = nn.functional.pad(x, (far,) * 4, value=-1.0)
        rows, columns = (integers(len(x), 2 * far + 1, g).tolist() for _ in range(2))
        height, width = x.shape[2:]
        places = zip(padded, rows, columns, strict=True)
        return torch.stack([one[:, i : i + height, j : j + width] for one, i, j in places])

    def erased(x: Samples, g: torch.Generator) -> Samples:
        x, side = x.clone(), max(1, min(x.shape[2:]) // 2)
        for one, i, j in zip(x, integers(len(x), side, g), integers(len(x), side, g), strict=True):
            one[:, i : i + side, j : j + side] = 0
        return x

    known: dict[str, Callable[[Samples, torch.Generator], Samples]] = {
        "two are mixed, as by mixup": mixed
    }
    if p.seen.x.ndim != 4:
        return known
    known["a part is erased"] = erased
    for far in (1, 2, 4):
        known[f"cropped at random after a border of {far}"] = partial(moved, far=far)
    seen = views(p)
    for name in ("mirrored", "upside down", "turned by 90 degrees", "in gray"):
        if name in seen:
            known[f"half of them {name}"] = partial(some, seen[name])
    return known


def _noise(p: Patient, slip: Slip) -> Iterator[Loop]:
    yield slip(
        "the noisy points are clamped to [-1, 1]",
        "Clamp samples at the end, if at all; noisy points lie where they lie",
        noisy=lambda loop, x0, z, sigma: add_noise(x0, z, sigma).clamp(-1, 1),
    )
    other: dict[str, Callable[[Tensor], Tensor]] = {
        "half of the noise": lambda sigma: sigma / 2,
        "twice the noise": lambda sigma: 2 * sigma,
        "noise a second time": lambda sigma: 2**0.5 * sigma,
        "noise of variance sigma, not sigma squared,": lambda sigma: sigma.sqrt(),
        "noise of deviation sigma squared, not sigma,": lambda sigma: sigma**2,
        "noise of sigma times sigma_data": lambda sigma: p.range.sigma_data * sigma,
        "no noise": torch.zeros_like,
    }
    if p.range.sigma_data == 0.5:
        del other["noise of sigma times sigma_data"]  # the half is there
    for what, change in other.items():
        yield slip(
            f"{what} is added",
            "Add sigma times standard normal noise",
            noisy=lambda loop, x0, z, sigma, f=change: add_noise(x0, z, f(sigma)),
        )
    yield slip(
        "the data are shrunk while noise is added, as in a variance-preserving process",
        "Add noise to the data as they are: here variance explodes",
        noisy=lambda loop, x0, z, s: (
            add_noise(x0, z, s) / (1 + s.square()).sqrt().view(-1, *[1] * (x0.ndim - 1))
        ),
    )
    drawn: dict[str, Callable[[Tensor], Tensor]] = {
        "uniform in [0, 1], and not normal": lambda z: torch.special.ndtr(z),
        "uniform in [-1, 1], and not normal": lambda z: 2 * torch.special.ndtr(z) - 1,
        "never negative": torch.Tensor.abs,
        "clamped to [-1, 1]": lambda z: z.clamp(-1, 1),
    }
    for what, f in drawn.items():
        yield slip(
            f"the noise is {what}",
            "Draw it with torch.randn, of the shape of the samples",
            noise=lambda loop, x0, g, f=f: f(normal(x0, g)),
        )
    few: dict[str, Callable[[Tensor], Tensor]] = {
        "the same for all samples of a batch": lambda x: x[:1]
    }
    if p.seen.x.ndim > 2:
        few["the same in all pixels"] = lambda x: x[..., :1, :1]
    if p.seen.x.ndim == 4 and p.seen.x.shape[1] > 1:
        few["the same in all channels"] = lambda x: x[:, :1]
    for what, part in few.items():
        yield slip(
            f"the noise is {what}",
            "Draw it with torch.randn, of the shape of the samples",
            noise=lambda loop, x0, g, f=part: normal(f(x0), g).expand_as(x0),
        )
    yield slip(
        "the noise comes from torch.rand, not torch.randn",
        "Draw it with torch.randn, of the shape of the samples",
        noise=lambda loop, x0, g: uniform(x0.numel(), g).view_as(x0),
    )
    yield slip(
        "all samples of a batch have the same noise level",
        "Draw a level for each",
        drawn=lambda loop, sigma: sigma[:1].expand_as(sigma),
        neighbors=lambda loop, x0, g: tuple(
            sigma[:1].expand_as(sigma) for sigma in Loop.neighbors(loop, x0, g)
        ),
    )
    if not isinstance(p.recipe.objective, EDM):
        return
    low, high, law = p.range.sigma_min, p.range.sigma_max, p.recipe.objective.sigma_law
    mean, std = law.mean, law.std
    laws: dict[str, Callable[[Tensor], Tensor]] = {
        f"are drawn uniformly between {low:g} and {high:g}": lambda u: low + (high - low) * u,
        f"are drawn log-uniformly between {low:g} and {high:g}": lambda u: low * (high / low) ** u,
        "are drawn evenly on the grid of sampling": lambda u: p.range.grid(1000).to(u)[
            (999 * u).long()
        ],
        "are drawn uniformly between 0 and 1": lambda u: u,
        "are powers of 10 and not of e": lambda u: 10 ** (mean + std * torch.special.ndtri(u)),
        "have std where mean belongs": lambda u: (std + mean * torch.special.ndtri(u)).exp(),
        "have the mean 0": lambda u: (std * torch.special.ndtri(u)).exp(),
    }

    def ranks(sigma: Tensor) -> Tensor:
        """Uniform numbers, from the levels that were drawn."""
        drawn: Tensor = torch.special.ndtr((sigma.double().log() - mean) / std)
        return drawn.clamp(1e-7, 1 - 1e-7)

    for what, f in laws.items():
        yield slip(
            f"noise levels {what}",
            "Draw them as objective.sigma_law says",
            drawn=lambda loop, sigma, f=f: f(ranks(sigma)).to(sigma),
        )


def _pairs(p: Patient, slip: Slip) -> Iterator[Loop]:
    recipe, objective = p.recipe, p.recipe.objective

    def learns(loop: Loop, pair: Pair, x0: Samples, label: Labels | None) -> Samples:
        return loop.dressed(loop.student)(pair.x_next, pair.sigma_next, label)

    yield slip("the target is not detached: it learns, too", "Detach it", aim=learns)
    yield slip(
        "the student is asked for the data themselves, as a denoiser is",
        "Its target is what the target network says of the cleaner point",
        aim=lambda loop, pair, x0, label: x0,
    )
    yield from _targets(p, slip)
    paired: dict[str, Callable[[Pair], Pair]] = {
        "student and target are asked about each other's point": lambda pair: Pair(
            pair.x_next, pair.sigma_next, pair.x, pair.sigma
        ),
        "the target is told the noise level of the student's point": lambda pair: pair._replace(
            sigma_next=pair.sigma
        ),
        "the student is told the noise level of the target's point": lambda pair: pair._replace(
            sigma=pair.sigma_next
        ),
        "the target is asked about the student's point": lambda pair: pair._replace(x_next=pair.x),
        "the student is asked about the target's point": lambda pair: pair._replace(x=pair.x_next),
        "student and target are asked about the same point": lambda pair: Pair(
            pair.x, pair.sigma, pair.x, pair.sigma
        ),
        "points and noise levels of a pair are crossed": lambda pair: Pair(
            pair.x, pair.sigma_next, pair.x_next, pair.sigma
        ),
    }
    for what, change in paired.items():
        yield slip(what, _LOSS, pair=lambda loop, pair, f=change: f(pair))
    for far in (2, 3):

        def skipping(loop: Loop, x0: Samples, g: Any, far: int = far) -> tuple[Tensor, Tensor]:
            sigma, sigma_next = Loop.neighbors(loop, x0, g)
            grid = p.range.grid(loop.levels()).to(sigma)
            i = (grid - sigma_next[:, None]).abs().argmin(1)
            return sigma, grid[(i + far - 1).clamp(max=len(grid) - 1)]

        yield slip(f"a pair lies {far} levels apart, not one", _LOSS, neighbors=skipping)
    low, high = p.range.sigma_min, p.range.sigma_max
    grids: dict[str, Callable[[int], Tensor]] = {
        "lie evenly between sigma_min and sigma_max": lambda n: torch.linspace(high, low, n),
        "lie evenly in their logarithm": lambda n: torch.linspace(
            math.log(high), math.log(low), n
        ).exp(),
        "lie as with 1 / rho in place of rho": lambda n: replace(p.range, rho=1 / p.range.rho).grid(
            n
        ),
        "are one more": lambda n: p.range.grid(n + 1),
        "are one less": lambda n: p.range.grid(max(2, n - 1)),
    }
    for what, grid in grids.items():
        yield slip(
            f"the levels {what}",
            "Take them from noise_range.grid",
            neighbors=lambda loop, x0, g, f=grid: neighbors(f(loop.levels()).to(x0), x0, g),
        )
    if isinstance(objective, ConsistencyTraining):
        yield slip(
            "the noise of the second point of a pair is drawn anew",
            "Both lie on one line: use the same noise for them",
            second=lambda loop, z, g: normal(z, g),
        )
        yield from _curriculum(p, objective, slip)
        return
    assert isinstance(objective, ConsistencyDistillation)
    yield slip(
        "the second point of a pair is not the teacher's step: it has the same noise",
        "Let the teacher step from the noisier point",
        onward=lambda loop, x0, z, x, sigma, sigma_next, *rest: loop.noisy(x0, z, sigma_next),
    )
    for name, solver in SOLVERS.items():
        if name != objective.solver:
            yield slip(f"the solver is {name}", _LOSS, solver=lambda loop, s=solver: s)

    def away(model: Denoiser, x: Samples, sigma: PerSample, to: PerSample, label: Any) -> Samples:
        return SOLVERS[objective.solver](model, x, sigma, 2 * sigma - to, label)

    yield slip("the teacher steps toward more noise", _LOSS, solver=lambda loop: away)
    if recipe.guidance != 1:
        yield slip("the teacher is not guided", _LOSS, guide=lambda loop, teacher: teacher)
        scale = recipe.guidance
        for other, why in (
            (scale + 1, "where 0 is none"),
            (scale - 1, "which is what the label adds"),
            (1 - scale, "with label and none exchanged"),
        ):
            yield slip(
                f"the teacher is guided by {other:g}, {why}",
                "Here 1 is no guidance",
                guide=lambda loop, teacher, w=other: guided(teacher, w),
            )
    if p.classes:

        def deaf(loop: Loop, teacher: Preconditioned) -> Denoiser:
            return lambda x, sigma, label=None: Loop.guide(loop, teacher)(
                x, sigma, torch.zeros_like(label)
            )

        yield slip("the teacher is told no labels", _LOSS, guide=deaf)

    def itself(loop: Loop) -> None:
        Loop.begin(loop)
        loop.teacher = frozen_view(loop.student)

    yield slip("the student steps, in place of its teacher", _LOSS, begin=itself)


def _curriculum(p: Patient, objective: ConsistencyTraining, slip: Slip) -> Iterator[Loop]:
    steps = p.recipe.training.steps
    ends = [objective.curriculum.levels_at(Clock(k, steps)) for k in (0, steps - 1)]
    for n in sorted({*ends, 18, 40, 150, 1280}):
        what = f"N is {n} throughout"
        yield slip(what, "Let objective.curriculum say N", levels=lambda loop, n=n: n)
    yield slip(
        "the clock stands still: every step is as the first",
        "Count the steps",
        time=lambda loop, k: Clock(0, steps),
    )


def _targets(p: Patient, slip: Slip) -> Iterator[Loop]:
    if p.recipe.objective.target_decay(Clock(0, p.recipe.training.steps)) == 0:
        return
    anywhere = "Move it after every step, as cmbook.training.blend does"
    yield slip("the target does not move: it is frozen", anywhere, follow=lambda loop: None)
    yield slip("the target moves by mu, not by 1 - mu", anywhere, decay=lambda loop, mu: 1 - mu)

    def follows(loop: Loop) -> None:
        Loop.begin(loop)
        loop.target = frozen_view(loop.student)

    yield slip("the target is the student itself, not its average", anywhere, begin=follows)


def _answers(p: Patient, slip: Slip) -> Iterator[Loop]:
    objective, noise_range, real = p.recipe.objective, p.range, p.recipe.scalings
    dresses: dict[str, Any] = {
        f"is dressed in {kind.__name__}": kind(noise_range)
        for kind in (EDMScalings, ConsistencyScalings, VEScalings, VPScalings)
        if not isinstance(real, kind)
    } | {
        "is not told sigma": _but(real, c_noise=torch.zeros_like),
        "is told sigma itself, not c_noise": _but(real, c_noise=lambda sigma: sigma),
        "is told log sigma, not a quarter of it": _but(real, c_noise=torch.log),
        "is dressed for sigma_data 1": type(real)(replace(noise_range, sigma_data=1.0)),
        "is given x as it is, not c_in times x": _but(real, c_in=torch.ones_like),
        "answers without c_skip": _but(real, c_skip=torch.zeros_like),
        "answers without c_skip and c_out": _but(
            real, c_skip=torch.zeros_like, c_out=torch.ones_like
        ),
    }
    for what, scalings in dresses.items():

        def dressed(loop: Loop, model: Denoiser, scalings: Any = scalings) -> Denoiser:
            inner: Any = getattr(model, "__wrapped__", model)
            other = Preconditioned(inner.net, scalings)
            return other if inner is model else frozen_view(other)

        yield slip(
            f"the network {what}", "Call the model that the recipe's scalings make", dressed=dressed
        )
    for name, weight in WEIGHTS.items():
        if name != objective.weight and not (isinstance(objective, EDM) and "gap" in name):
            yield slip(
                f"the weight is {name}",
                f'Set objective.weight, or weigh as "{objective.weight}"',
                weighted=lambda loop, a, b, w=weight: w(a, b, noise_range),
            )
    powers = {"divides and does not multiply": -1.0, "is its own root": 0.5, "is squared": 2.0}
    for what, power in powers.items() if objective.weight != "uniform" else ():
        yield slip(
            f"the weight {what}",
            f'Multiply by it, as "{objective.weight}" says',
            weighted=lambda loop, a, b, n=power: Loop.weighted(loop, a, b) ** n,
        )
    for distance in (L2(), L1(), Norm(), PseudoHuber(), PseudoHuber(0.03), PseudoHuber(1.0)):
        if distance != objective.distance:
            c = getattr(distance, "c", None)
            yield slip(
                f"the distance is {type(distance).__name__}" + (f", c = {c:g}" if c else ""),
                "Set objective.distance, or measure as it says",
                distance=lambda loop, d=distance: d,
            )
    if isinstance(objective.distance, PseudoHuber):

        def by_pixel(loop: Loop) -> Any:
            distance = loop.p.recipe.objective.distance
            return lambda one, other: (
                distance((one - other).flatten()[:, None], torch.zeros(one.numel(), 1).to(one))
                .view(len(one), -1)
                .sum(1)
            )

        yield slip(
            "pseudo-Huber is taken of every coordinate, not of the whole sample",
            "The norm is that of the whole sample",
            distance=by_pixel,
        )
    for factor in (0.5, 2.0):
        yield slip(
            f"answers count {factor:g} times in the loss",
            _LOSS,
            regressed=lambda loop, answer, *rest, f=factor: Loop.regressed(loop, f * answer, *rest),
        )
    if isinstance(objective, EDM):
        truths: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            "the noisy point": lambda x0, x, z: x,
            "the noise": lambda x0, x, z: z,
            "other samples of the batch": lambda x0, x, z: x0.roll(1, 0),
        }
        for what, truth in truths.items():
            yield slip(
                f"the model is asked for {what}, not for the clean sample",
                _LOSS,
                truth=lambda loop, x0, x, z, f=truth: f(x0, x, z),
            )


def _but(real: AnyScalings, **functions: Callable[[Tensor], Tensor]) -> Any:
    """These scalings, but for some of the four functions."""
    names = ("noise_range", "c_skip", "c_out", "c_in", "c_noise")
    return SimpleNamespace(**{name: getattr(real, name) for name in names} | functions)
