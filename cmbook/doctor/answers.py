"""What the model answers: at single levels, and as samples."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmbook.doctor.findings import LONGER, Finding, found, over, under
from cmbook.doctor.parts import unlike
from cmbook.doctor.patient import POOR, Patient, Undone, ask, noisy
from cmbook.doctor.upstream import outside
from cmbook.evaluation import nearest_training
from cmbook.losses import (
    EDM,
    ContinuousDistillation,
    ContinuousTraining,
    ProgressiveDistillation,
    tangent,
)
from cmbook.noise import PerImage, integers, seeded
from cmbook.ode import velocity
from cmbook.oracle import Dataset
from cmbook.protocols import Batch, Denoiser, Samples

if TYPE_CHECKING:
    from cmbook.runs import Run

MOST = 20  # classes whose labels are all tried

# ── at single levels ──


def hears_sigma(p: Patient) -> Iterator[Finding]:
    """Whether the bare network's answer depends on sigma."""
    x, net, c = p.noise("sigma"), p.run.model.net, p.recipe.scalings
    with torch.no_grad():
        said = [net(x, c.c_noise(x.new_full((len(x),), s)), p.told) for s in p.range.grid(6)[1:-1]]
    answers = torch.stack(said).double()
    change = (answers - answers.mean(0)).square().mean() / answers.square().mean().clamp(min=1e-24)
    hears = float(change.sqrt())
    cause = "the network does not hear sigma: its answer is the same at every noise level"
    yield found("hears sigma", hears, "well" if hears > 0.005 else "ill", cause)


def told(p: Patient) -> Iterator[Finding]:
    """Whether a diffusion model is told the noise that it sees."""
    if not isinstance(p.recipe.objective, EDM) or p.recipe.guidance > 1:
        return
    skill = p.skill(p.run.model, p.recipe)
    levels = skill.levels
    scores = {}
    for noise in (0.25, 0.5, 1.0, 2.0, 4.0):
        errors, _ = p.errors(p.run.model, p.asked, levels, noise=noise)
        scores[noise] = sum(math.log(max(error, 1e-300)) for error in errors) / len(levels)
    best = min(scores, key=scores.__getitem__)
    if 0.5 < skill.slope < 2 or scores[best] > min(0.0, scores[1.0] - 0.1):
        best = 1.0  # its answers are means of what it sees, or no better with other noise
    much = "little" if best > 1 else "much"
    cause = (
        f"the model takes away too {much} noise: it was trained with {best:g} times what it was "
        "told"
    )
    yield found("noise told", best, "well" if best == 1 else "ill", cause)


def denoises(p: Patient) -> Iterator[Finding]:
    """What the answers are worth."""
    skill = p.skill(p.run.model, p.recipe)
    (worst, at), slope, learned = skill.worst, skill.slope, skill.learned
    dress = p.dress(p.run.model, skill) if skill.poor else None
    little = "too little, " if p.early else ""
    poor = (
        f"the model does not denoise as it should at sigma {at:.2g}: it was trained {little}"
        "unsteadily or on other data, or its weights are damaged"
    )
    cause = f"the model is {dress}" if dress else poor
    limit = 2 * POOR if p.early and not dress else POOR
    by_intent = p.recipe.guidance > 1  # guided answers are no means of the data
    limit = math.inf if by_intent and not dress else limit
    yield found("denoises", worst, over(worst, POOR, limit), cause, "" if dress else LONGER)
    if not dress:
        cause = "the model's answers are no means: it learned by heart, or with other noise"
        yield found("answers", slope, "well" if 0.5 < slope < 2 else "ill", cause)
    if learned is not None:
        yield found("learned", learned, under(learned, 0.3, -math.inf if by_intent else 0.1), poor)


def labels(p: Patient) -> Iterator[Finding]:
    """What the right label saves, over what it saves the data's own exact denoiser."""
    for finding in _heard(p, p.run, "labels", "the model"):
        taught = [] if p.teacher is None else [*_heard(p, p.teacher, "labels", "the teacher")]
        if finding.verdict == "look" and any(each.measured > 0.3 for each in taught):
            finding = replace(
                finding, verdict="ill", cause="the model ignores the label, which its teacher hears"
            )
        yield finding


def teacher_labels(p: Patient) -> Iterator[Finding]:
    """The same of the teacher."""
    if p.teacher is not None:
        yield from _heard(p, p.teacher, "teacher labels", "the teacher")


def _heard(p: Patient, run: "Run", name: str, whose: str) -> Iterator[Finding]:
    if p.classes < 2 or p.seen.label is None:
        return
    batch, (x, label) = p.asked, p.rest
    assert label is not None
    if len(label.unique()) < p.classes:  # points that are asked about must be others
        raise Undone("the samples at hand are too few for their classes")
    levels = [r * p.std for r in (0.5, 1.0, 2.0, 4.0) if r * p.std <= p.range.sigma_max]
    could, does = (
        _gain(each, batch, levels, p.classes) for each in (Dataset(x, label).denoiser, run.model)
    )
    if max(could, default=0.0) < 0.05:
        return  # then labels say nothing that could be heard
    heard = max(d / c for d, c in zip(does, could, strict=True) if c > max(could) / 2)
    cause = f"{whose} ignores the label, or learned it from shuffled ones: wrong ones cost nothing"
    if heard < -0.05:
        cause = f"{whose} has learned other labels than the data's: wrong ones do better"
    numbers = _numbers(run.model, batch, levels[could.index(max(could))], p.classes)
    if heard < 0.15 and numbers:
        some = ", ".join(f"their {i} is its {n}" for i, n in enumerate(numbers) if i != n)
        cause = f"{whose} numbers the classes otherwise than the data: {some}"
        yield found(name, heard, "ill", cause, "Number them alike, as by the names of folders")
        return
    # Who has learned nothing yet has not learned what labels mean, either.
    knows = (p.skill(run.model, run.recipe).learned or 0.0) > 0.3
    yield found(name, heard, under(heard, 0.15, 0.04 if knows else -math.inf), cause)


def _numbers(model: Denoiser, batch: Batch, sigma: float, classes: int) -> list[int]:
    """The label that serves each class of the data best, if these are the same in another order."""
    if classes > MOST:
        return []
    assert batch.label is not None
    x, errors = noisy(batch.x, sigma), []
    for told in range(classes):
        answer = ask(model, x, sigma, torch.full_like(batch.label, told))
        errors.append((answer - batch.x).flatten(1).square().sum(1))
    table = torch.stack(errors)  # of every label, for every sample
    means = torch.stack([table[:, batch.label == c].mean(1) for c in range(classes)])
    best = means.argmin(1).tolist()
    saved = 1 - means.amin(1).sum() / means.diag().sum().clamp(min=1e-300)
    another = sorted(best) == list(range(classes)) != best
    return best if another and float(saved) > 0.1 else []


def _gain(model: Denoiser, batch: Batch, levels: list[float], classes: int) -> list[float]:
    """How much of the error at each level the right label saves, against a wrong one."""
    assert batch.label is not None
    other = 1 + integers(len(batch.x), classes - 1, seeded("doctor", "label")).to(batch.label)
    gains = []
    for sigma in levels:
        x = noisy(batch.x, sigma)
        right, wrong = (
            float((ask(model, x, sigma, label) - batch.x).square().sum())
            for label in (batch.label, (batch.label + other) % classes)
        )
        gains.append(1 - right / max(wrong, 1e-300))
    return gains


def agrees(p: Patient) -> Iterator[Finding]:
    """Whether answers along one line of noise agree where sampling begins."""
    if not p.jumps:
        return
    x0, label, top = p.asked.x, p.asked.label, p.range.sigma_max
    one, other = (ask(p.run.model, noisy(x0, s), s, label) for s in (top, top / 2))
    gap = float((one - other).square().mean().sqrt()) / p.std
    cause = (
        f"answers at sigma {top:g} and at half of it do not agree: consistency has not been "
        "learned up there"
    )
    yield found("agreement", gap, over(gap, 0.13), cause)


def tangents(p: Patient) -> Iterator[Finding]:
    """How fast answers change along the path, in continuous time."""
    if not isinstance(p.recipe.objective, ContinuousDistillation | ContinuousTraining):
        return
    x0, label = p.asked.x[:64], None if p.asked.label is None else p.asked.label[:64]
    sizes = []
    for sigma in p.skill(p.run.model, p.recipe).levels:
        x, level = noisy(x0, sigma), x0.new_full((len(x0),), sigma)
        dx = (x - x0) / sigma
        with torch.no_grad():
            if p.recipe.objective.needs_teacher:
                dx = velocity(x, p.walker(x, level, label), level)
            _, change = tangent(p.run.model, x, level, dx, label)
        sizes.append(sigma * float(change.double().flatten(1).norm(dim=1).median()))
    # 0 at the truth. Over 10, a change of sigma by a tenth carries the answer across all the data.
    size = max(sizes) / max(math.sqrt(float(p.variances.sum())), 1e-300)
    cause = "the tangents explode: continuous training is unstable"
    yield found("tangent", size, over(size, 3, 10), cause)


def loss_by_sigma(p: Patient) -> Iterator[Finding]:
    """Whether some levels drown the others in the loss."""
    loss = p.loss
    if len(loss.sigma.unique()) < 9:
        return  # one level may well be all
    edges = p.range.grid(9).flip(0).log().to(loss.sigma)
    which = torch.bucketize(loss.sigma.log(), edges[1:-1].contiguous())
    parts = torch.zeros(8, dtype=torch.float64, device=which.device)
    parts.index_add_(0, which, loss.per_sample.double().abs())
    share, k = float(parts.max() / parts.sum().clamp(min=1e-300)), int(parts.argmax())
    at = float(edges[k : k + 2].mean().exp())
    cause = f"levels near sigma {at:.2g} are {share:.0%} of the loss and drown the others"
    yield found("loss by sigma", share, over(share, 0.8), cause)


# ── as samples ──


def walk(p: Patient) -> Iterator[Finding]:
    """What a diffusion model loses on the grid that it is sampled on."""
    knobs = p.recipe.sampling
    if p.jumps or isinstance(p.recipe.objective, ProgressiveDistillation):
        return
    fine, coarse = p.walked(p.run.model), p.walked(p.run.model, knobs.levels, knobs.solver)
    lost = p.off(coarse, fine)
    cause = f"sampling.levels = {knobs.levels} are too few: the grid is too coarse for its path"
    yield found("grid", lost, over(lost, 0.4, 0.6), cause, "Raise it, or use Heun")


def variety(p: Patient) -> Iterator[Finding]:
    """How different two samples are that have the same label."""
    one, two = (each.double() for each in p.drawn)
    made = float((one - two).flatten(1).square().sum(1).mean()) / 2
    ratio = made / max(p.within, 1e-300)
    least = 0.2 if p.data is not None else 0.05  # without data, sigma_data knows no classes
    if p.recipe.guidance > 1:
        least = min(least, 0.1)  # some is gone by intent: `walk` says whether that is too much
    bad = under(ratio, 2 * least, least)
    cause = "the samples are blurred: means in place of samples, too alike"
    if ratio < 0.02:
        cause = "the model has collapsed: it answers the same whatever the noise"
    if not ratio < 2:
        bad, cause = over(ratio, 2, 4), "the samples are scattered far beyond the data"
    yield found("variety", ratio, bad, cause)


def inside(p: Patient) -> Iterator[Finding]:
    """Whether samples lie where the data do."""
    out = outside(p, p.drawn[0])
    cause = "many samples lie outside the range of the data"
    yield found("sample range", out, over(out, 0.1, 0.3), cause)


def modes(p: Patient) -> Iterator[Finding]:
    """How much of the data the samples miss."""
    real, made = (x.double().flatten(1).cpu() for x in (p.seen.x, p.drawn[0]))
    if len(real) < 64 or not bool(made.isfinite().all()):
        raise Undone("there are too few samples, or some are not finite")
    centers = _centers(real, 8)
    theirs, ours = (
        torch.cdist(x, centers).argmin(1).bincount(minlength=8).double() / len(x)
        for x in (real, made)
    )
    # Chance alone misplaces about a tenth. Over a half, most of the mass is elsewhere.
    missing = float((theirs - ours).clamp(min=0).sum())
    more = 0.2 if p.recipe.guidance > 1 else 0.0  # guidance moves some of it by intent
    cause = "the samples miss much of the data: modes have collapsed, or it learned other data"
    yield found("modes", missing, over(missing, 0.35 + more, 0.5 + more), cause)


def _centers(x: Tensor, k: int) -> Tensor:
    """Lloyd's k means, from a start that is always the same."""
    centers = x[integers(1, len(x), seeded("doctor", "means"))]
    while len(centers) < k:  # the farthest of a few: spread out, and no outlier hunt
        near = torch.cdist(x[:256], centers).min(1).values
        centers = torch.cat([centers, x[:256][near.argmax()][None]])
    for _ in range(15):
        which = torch.cdist(x, centers).argmin(1)
        parts = [x[which == i] for i in range(k)]
        centers = torch.stack(
            [part.mean(0) if len(part) else centers[i] for i, part in enumerate(parts)]
        )
    return centers


def samples(p: Patient) -> Iterator[Finding]:
    """How far the samples are from the data, or from where a guided teacher walks."""
    if p.recipe.guidance == 1:
        real, label = p.part(slice(p.many))
        n, whose = len(real), "the data"
        made = p.run.sample(n, label, generator=PerImage(range(2 * n, 3 * n)))
    else:
        made, real, whose = p.drawn[0], p.walked(p.walker), "what its guided teacher draws"
    off, bad = unlike(made, real, 0.003, 0.02)
    yield found("samples", off, bad, f"the samples are not distributed as {whose}", LONGER)
    astray = stray(made, real)
    cause = f"{astray:.0%} of the samples lie beside {whose}"
    yield found("stray", astray, over(astray, 0.5), cause, LONGER)


def stray(made: Samples, real: Samples) -> float:
    """The share of samples that are farther from half of the data than 9 in 10 of the others are.

    So 0.1 is as good as real. Unlike a distance between laws it sees points that fall beside a thin
    line, though no farther than its neighbor.

    Source: ours, after precision as Kynkäänniemi et al. (2019), §3, measure it.
    """
    known, others = real.flatten(1).double().chunk(2)
    usual = torch.cdist(others, known).amin(1).quantile(0.9)
    return float((torch.cdist(made.flatten(1).double(), known).amin(1) > usual).double().mean())


def copies(p: Patient) -> Iterator[Finding]:
    """Whether samples are training samples."""
    if math.prod(p.run.record["shape"]) < 16 or p.length is None:
        return  # in few dimensions something is always near, and endless data cannot be copied
    x, made = (each.flatten(1).double().cpu() for each in (p.seen.x, p.drawn[0]))
    if not bool(made.isfinite().all()):
        raise Undone("some samples are not finite")
    apart = torch.cdist(x, x).fill_diagonal_(math.inf).amin(1)
    usual = float(apart[apart > 0].median()) if bool((apart > 0).any()) else math.inf
    copied = float((nearest_training(made, x).distance < 0.25 * usual).double().mean())
    cause = f"the model repeats its training samples: it knows {p.length} of them by heart"
    yield found("by heart", copied, over(copied, 0.1, 0.5), cause)


def follows(p: Patient) -> Iterator[Finding]:
    """Whether the student lands where its teacher walks."""
    if not (p.jumps and p.recipe.objective.needs_teacher):
        return
    x = p.range.sigma_max * p.noise("walk")
    off = p.off(ask(p.run.model, x, p.range.sigma_max, p.told), p.walked(p.walker))
    cause = (
        "the student does not land where its teacher walks: it was trained too little, or from "
        "another teacher"
    )
    yield found("follows teacher", off, over(off, 0.8, 0.95), cause)
