"""What comes before training: the data, the recipe, the teacher and its walk."""

import math
from collections.abc import Iterator
from dataclasses import fields, replace

import torch

from cmbook.data import Images
from cmbook.doctor.findings import Finding, Verdict, found, over, under
from cmbook.doctor.parts import unlike
from cmbook.doctor.patient import CONSISTENCY, EARLY, LEVELS, Patient, Undone, ask, scatter
from cmbook.losses import EDM, ConsistencyDistillation, ConsistencyTraining, ProgressiveDistillation
from cmbook.noise import NoiseRange, normal, seeded
from cmbook.protocols import Batch, Clock, Samples
from cmbook.samplers import ode_sample, progressive


def data_variety(p: Patient) -> Iterator[Finding]:
    """Flat and repeated samples."""
    x = p.seen.x.flatten(1).double()
    if x.shape[1] >= 16:  # in few dimensions, flat samples and near neighbors are as they should be
        flat = float((x.std(1, correction=0) < 1e-3).double().mean())
        cause = f"{flat:.0%} of the samples are constant: one flat color"
        yield found("data constant", flat, over(flat, 0.02, 0.2), cause)
        rows = x[:1024]
        apart = torch.cdist(rows, rows)
        near = 0.02 * float(apart.median())
        copies = float((apart.fill_diagonal_(math.inf).amin(1) <= near).double().mean())
        # What is drawn anew without end may well repeat itself; files of pictures should not.
        bad = over(copies, 0.2 if p.length is None else 0.05, 0.6)
    else:
        copies = 1 - len(torch.unique(x, dim=0)) / len(x)
        bad = over(copies, 0.1, 0.5 if p.length is not None else math.inf)
    cause = f"the data repeat themselves: {copies:.0%} of them are like another"
    yield found("data copies", copies, bad, cause)


def data_range(p: Patient) -> Iterator[Finding]:
    """Whether images lie in [-1, 1]."""
    x, image = p.seen.x, p.seen.x.ndim == 4
    low, high = float(x.min()), float(x.max())
    largest, where = max(abs(low), abs(high)), ""
    # Worlds of points have tails and reach a little over 1; pixels cannot.
    if not math.isfinite(largest):
        yield found("data range", largest, "ill", "the data hold NaN or infinity", "Leave them out")
        return
    if largest > (1.2 if image else 3.0):
        where = "[0, 255]" if low >= 0 and largest > 20 else f"[{low:.3g}, {high:.3g}]"
    elif image and low > -1e-3 and high > 0:
        where = f"[0, {high:.3g}]"
    elif image and high < 1e-3 and low < 0:
        where = f"[{low:.3g}, {high:.3g}]"
    cause = f"the data lie in {where}, not in [-1, 1]"
    remedy = "For bytes use x / 127.5 - 1" if where == "[0, 255]" else ""
    rows = x.flatten(1).abs().amax(1)
    usual = float(rows.double().quantile(0.97))
    if usual < largest / 4:
        few = float((rows > 2 * usual).double().mean())
        cause = f"{few:.1%} of the data are outliers that reach {largest:.3g}, the rest {usual:.3g}"
        remedy = "Look at them, and leave them out"
    yield found("data range", largest, "ill" if where else "well", cause, remedy)


def data_spread(p: Patient) -> Iterator[Finding]:
    """Whether points lie around 0, all coordinates alike."""
    x = p.seen.x.double()
    if x.ndim == 2 and bool(x.isfinite().all()):  # of pixels, a few bright ones on black do not
        center, std = float(x.mean().abs()) / p.std, x.std(0, correction=0)
        cause = (
            f"the data lie around {float(x.mean()):.3g}, far from 0 for their std of {p.std:.3g}"
        )
        yield found("data center", center, over(center, 3), cause)
        never = int((std < 1e-9 * p.std).sum())
        cause = f"{never} of {len(std)} coordinates never change"
        yield found("data fixed", never / len(std), over(never, 0), cause)
        ends = ((x == x.amin(0)) | (x == x.amax(0))).any(1)
        piled = float(ends.double().mean()) if len(x) >= 200 else 0.0
        cause = f"{piled:.0%} of the data lie exactly on their bounds: they have been clamped"
        yield found("data piled up", piled, over(piled, 0.05), cause)
        values = min(len(column.unique()) for column in x.T) / len(x)
        cause = "coordinates are rounded: they have few different values"
        yield found("data rounded", values, under(values, 0.3 if never == 0 else 0.0), cause)
        alike = float(std.max() / std[std > 0].min()) if bool(std.any()) else 1.0
        cause = f"coordinates have other scales: one varies {alike:.2g} times as much as another"
        yield found("data scales", alike, over(alike, 8), cause)


def data_layout(p: Patient) -> Iterator[Finding]:
    """Whether neighboring pixels belong together."""
    x = p.seen.x.double()
    if x.ndim != 4 or min(x.shape[2:]) < 4:
        return
    yield from _pixels(x)
    centered = x - x.mean((2, 3), keepdim=True)
    power = float(centered.square().mean()) or 1.0
    across = float((centered[..., 1:] * centered[..., :-1]).mean()) / power
    down = float((centered[..., 1:, :] * centered[..., :-1, :]).mean()) / power
    # Drawings of 8x8 pixels still show 0.4. Scrambled pixels show 0, and so do, in one direction,
    # images that were reshaped where they should have been transposed.
    least = min(across, down)
    cause = "neighboring pixels have nothing in common: the data are noise or were reshaped wrongly"
    yield found("data layout", least, under(least, 0.2, 0.05), cause)
    dead = float((x.std(0, correction=0) < 1e-3).double().mean())
    cause = f"{dead:.0%} of the pixels are the same in all pictures: they have wide frames"
    yield found("data fixed", dead, over(dead, 0.5), cause)
    yield from _blocks(x)
    if x.shape[1] > 1:
        each = x.std((0, 2, 3))
        ratio = float(each.max() / each.min().clamp(min=1e-12))
        cause = "the channels of the data have different scales"
        yield found("data channels", ratio, over(ratio, 4, 10), cause)


def _pixels(x: Samples) -> Iterator[Finding]:
    """Single pixels unlike their neighbors, and pictures of another range than the others."""
    half = 0.5 * float(x.max() - x.min())
    beside = torch.stack([x[..., :-2, 1:-1], x[..., 2:, 1:-1], x[..., 1:-1, :-2], x[..., 1:-1, 2:]])
    inner = x[..., 1:-1, 1:-1]
    alone = (inner < beside.amin(0) - half) | (inner > beside.amax(0) + half)
    share, most = float(alone.double().mean()), 0.004 if min(x.shape[2:]) < 16 else 0.001
    cause = f"single pixels, {share:.2%}, are unlike all their neighbors: bytes overflow, or noise"
    yield found("data pixels", share, over(share, most), cause)
    above = float((x.flatten(1).amin(1) > -0.02).double().mean())
    mixed = above if above < 0.9 else 0.0  # all of them are told elsewhere
    cause = f"{mixed:.0%} of the pictures lie in [0, 1], the others in [-1, 1]"
    yield found("data mixed", mixed, over(mixed, 0.04), cause, "Scale all to [-1, 1]")


def _blocks(x: Samples) -> Iterator[Finding]:
    """Pictures made of squares of equal pixels: some neighbors are always equal, others not."""
    inner = x[..., 1:].abs() < 0.99 * float(x.abs().max())
    same = ((x[..., 1:] == x[..., :-1]) & inner).sum((0, 1, 2)).double()
    shares = same / inner.sum((0, 1, 2)).clamp(min=1)
    within = float((shares > 0.97).double().mean()) if float(shares.min()) < 0.8 else 0.0
    cause = "pixels come in squares of equal ones: the pictures are enlarged from small ones"
    yield found("data blocks", within, over(within, 0.35), cause)


def data_negatives(p: Patient) -> Iterator[Finding]:
    """Samples that are negatives of others."""
    x = p.seen.x[:1024].flatten(1).double()
    if x.shape[1] < 16 or len(x) < 128 or not bool(x.isfinite().all()):
        return
    near, turned = (torch.cdist(each, x).fill_diagonal_(math.inf).amin(1) for each in (x, -x))
    share, others = (
        float((a < 0.8 * b).double().mean()) for a, b in ((turned, near), (near, turned))
    )
    mixed = share if share < 0.4 else 0.0  # half would be data that are their own negatives
    cause = f"some samples, {mixed:.0%} or more, are negatives of the others"
    # Where both colors of a figure are drawn at random, negatives are as they should be.
    ill = 0.03 if others > 2.5 * share else math.inf
    yield found("data negatives", mixed, over(mixed, 0.01, ill), cause)


def data_labels(p: Patient) -> Iterator[Finding]:
    """Whether all classes are there, and mean something."""
    x, label = p.seen
    if label is None or p.classes < 2:
        return
    share = label.bincount(minlength=p.classes).double() / len(label)
    none = [str(c) for c in range(p.classes) if not share[c]]
    enough = len(label) >= 20 * p.classes or p.length == len(label)
    which = ", ".join(none[:10]) + (", …" if len(none) > 10 else "")
    cause = f"{len(none)} of the {p.classes} classes have no samples in the training set: {which}"
    yield found("classes missing", len(none), "ill" if none and enough else "well", cause)
    # exp(entropy) counts classes by how much they are there.
    effective = float(torch.special.entr(share).sum().exp()) / p.classes
    cause = f"one class dominates: {float(share.max()):.0%} of the data"
    yield found("class balance", effective, under(effective, 0.5, 1.2 / p.classes), cause)
    if len(x) < 20 * p.classes:
        raise Undone("too few samples of each class are at hand to compare neighbors")
    rows = x.flatten(1).double()
    apart = torch.cdist(rows, rows).fill_diagonal_(math.inf)
    agree = float((label[apart.argmin(1)] == label).double().mean())
    chance = float(share.square().sum())
    noise = math.sqrt(chance * (1 - chance) / len(rows))
    bad: Verdict = "ill" if agree < chance + 4 * noise and chance < 0.95 else "well"
    cause = "the labels are shuffled: neighbors share a class no more often than by chance"
    yield found("label meaning", agree / chance, bad, cause)
    three = label[apart.topk(3, largest=False).indices]
    sure = (three == three[:, :1]).all(1)
    if float(sure.double().mean()) > 0.25:  # else neighbors say little of classes
        wrong = float((three[sure, 0] != label[sure]).double().mean())
        cause = f"about {wrong:.0%} of the labels are wrong: samples amid another class"
        yield found("labels wrong", wrong, over(wrong, 0.08, 0.15), cause)


def data_flip(p: Patient) -> Iterator[Finding]:
    """Whether the data are their own mirror images, where half of them are mirrored."""
    recipe = p.recipe.data
    if not getattr(recipe, "flip", False) or p.seen.x.ndim != 4:
        return
    assert isinstance(recipe, Images)
    x = next(replace(recipe, flip=False).build().batches(min(1024, len(p.seen.x)), 0)).x.double()
    known, others = x.flatten(1).chunk(2)
    if len(others) < 32:
        raise Undone("the samples at hand are too few to compare them with their mirror images")
    mirrored = others.view(-1, *p.seen.x.shape[1:]).flip(-1).flatten(1)
    plain, turned = (
        float(torch.cdist(each, known).amin(1).median()) for each in (others, mirrored)
    )
    ratio = turned / max(plain, 1e-12)
    cause = (
        f"flip mirrors pictures that have a right way round: mirrored ones lie {ratio:.2g} times "
        "as far from the others"
    )
    yield found("flip", ratio, over(ratio, 1.15, 1.3), cause)


def same_data(p: Patient) -> Iterator[Finding]:
    """Whether the data are those of the record."""
    if p.data is None or (p.length or 0) > 200_000:  # a fingerprint reads all of them
        return
    same = p.data.sha256() == p.run.record.get("data_sha256")
    cause = "the data at hand are not those that the run was trained on"
    yield found("same data", float(same), "well" if same else "look", cause)
    if p.length is not None:
        limit = getattr(p.recipe.data, "limit", None)
        why = "" if limit is None else f", for data.limit = {limit} leaves out the others"
        cause = f"{p.length} samples are too few: a model learns them by heart{why}"
        yield found("data size", p.length, under(p.length, 100 if limit is None else 500), cause)
    if p.recipe.training.precision == "bfloat16" and p.jumps:
        drop = "answers are rounded to 8 bits, and neighbors on a fine grid differ by less"
        yield found("precision", 8, "look", f"precision is bfloat16: {drop}")


def sigma_data_finding(std: float, noise_range: NoiseRange) -> Finding:
    """Whether sigma_data is the standard deviation of the data.

    Args:
        std: Of the data, over all samples and coordinates.
        noise_range: The recipe's.

    Source: Karras et al. (2022), Table 1: c_in makes inputs of unit variance.
    """
    ratio = noise_range.sigma_data / max(std, 1e-12)
    # 2.5 times off, the network's inputs have 6 times the variance it is made for, or a sixth.
    verdict = over(max(ratio, 1 / ratio), 1.3, 2.5)
    cause = f"sigma_data is {noise_range.sigma_data:g}, but the data's std is {std:.3g}"
    return found("sigma_data", ratio, verdict, cause, f"Set noise_range.sigma_data={std:.2g}")


def noise_range(p: Patient) -> Iterator[Finding]:
    """Whether the noise levels suit the data."""
    yield sigma_data_finding(p.std, p.range)
    # At 4 standard deviations 6% of the variance is still data, which sampling begins without.
    top, low = p.range.sigma_max / p.std, p.range.sigma_min / p.std
    cause = f"sigma_max = {p.range.sigma_max:g} is far more than drowns the data: levels are wasted"
    remedy = f"Set noise_range.sigma_max={160 * p.std:.2g}"
    yield found("sigma_max high", top, over(top, 1500), cause, remedy)
    cause = f"sigma_max = {p.range.sigma_max:g} is too small: under that noise the data still show"
    remedy = f"Set noise_range.sigma_max={20 * p.std:.2g} or more"
    yield found("sigma_max", top, under(top, 10, 4), cause, remedy)
    rho, where = p.range.rho, "the largest" if p.range.rho < 7 else "the smallest"
    cause = f"rho = {rho:g} is unusual: most levels of the grid lie among {where}"
    yield found("rho", rho, "well" if 3 <= rho <= 20 else "look", cause)
    cause = f"sigma_min = {p.range.sigma_min:g} is too large: samples keep that much noise"
    remedy = f"Set noise_range.sigma_min={0.004 * p.std:.1g}"
    yield found("sigma_min", low, over(low, 0.03, 0.1), cause, remedy)


def finite(p: Patient) -> Iterator[Finding]:
    """Whether weights and losses are numbers."""
    broken = {
        f"the {name}'s weights": sum(int((~w.isfinite()).sum()) for w in weights.values())
        for name, weights in p.weights.items()
        if name != "first"
    }
    broken["losses"] = sum(not math.isfinite(row.get("loss", 0.0)) for row in p.rows)
    what = " and ".join(name for name, count in broken.items() if count)
    count = sum(broken.values())
    cause = f"{what} are NaN or infinite: training has diverged, or a file is damaged"
    yield found("finite", count, "ill" if count else "well", cause)


def boundary(p: Patient) -> Iterator[Finding]:
    """Whether f(x, sigma_min) = x."""
    objective = p.recipe.objective
    if isinstance(objective, EDM | ProgressiveDistillation):
        name = type(objective).__name__
        cause = f"{name} trains a diffusion model in a consistency model's scalings"
        yield found("dress", p.jumps, "ill" if p.jumps else "well", cause)
        return
    if not (p.jumps or isinstance(objective, CONSISTENCY)):
        return  # a method from outside in scalings of its own
    scale = p.range.sigma_data
    x = scale * p.noise("boundary")
    answer = ask(p.run.model, x, p.range.sigma_min, p.told)
    off = float((answer - x).square().mean().sqrt()) / scale
    # c_skip = 1 and c_out = 0 there, whatever the weights, so only rounding is left.
    cause = (
        "the boundary is violated: f(x, sigma_min) is not x, so these are not the scalings of a "
        "consistency model"
    )
    yield found("boundary", off, "well" if off < 1e-5 else "ill", cause)


def guidance(p: Patient) -> Iterator[Finding]:
    """Whether the teacher's guidance leaves labels their meaning."""
    scale = p.recipe.guidance
    if p.classes and p.recipe.teacher is not None:
        cause = (
            f"guidance {scale:g} takes the label away: 1 is none, more is stronger, 0 is no label"
        )
        yield found("guidance", scale, under(scale, 1, 0.5), cause)


def levels(p: Patient) -> Iterator[Finding]:
    """Whether the grid has enough levels at the end."""
    objective, steps = p.recipe.objective, p.recipe.training.steps
    if isinstance(objective, ConsistencyTraining):
        n = objective.curriculum.levels_at(Clock(steps - 1, steps))
    elif isinstance(objective, ConsistencyDistillation):
        n = objective.levels
    else:
        return
    # With 2 levels the target of pure noise is the data themselves, so the answer is their mean.
    cause = f"too few noise levels, N = {n}: neighbors are too far apart to agree"
    yield found("levels", n, under(n, 7, 4), cause)
    if isinstance(objective, ConsistencyTraining):
        n = objective.curriculum.levels_at(Clock(0, steps))
        cause = (
            f"training begins with N = {n}: neighbors hardly differ, so what the data teach at "
            "little noise reaches large noise too slowly"
        )
        yield found("first levels", n, over(n, 200), cause)


def drawn_levels(p: Patient) -> Iterator[Finding]:
    """Whether training sees the noise levels where images form."""
    if isinstance(p.recipe.objective, ProgressiveDistillation):
        return  # its last rounds see no others than the largest
    sigma, low, high = p.loss.sigma, LEVELS[0] * p.std / 2, LEVELS[-1] * p.std * 2
    share = float(((sigma > low) & (sigma < high)).double().mean())
    cause = f"noise levels of {low:.2g} to {high:.2g} are hardly ever trained: {share:.1%} of draws"
    yield found("drawn levels", share, under(share, 0.05), cause)


def teacher(p: Patient) -> Iterator[Finding]:
    """Whether the teacher knows these data."""
    if p.recipe.teacher is None:
        return
    theirs = p.at_hand
    kind = type(theirs.recipe.objective)
    distilled = kind is ProgressiveDistillation and not isinstance(p.recipe.objective, kind)
    cause = (
        "the teacher is itself distilled, by ProgressiveDistillation: it knows the levels of a few "
        "steps alone, and is no diffusion model whose path could be followed"
    )
    verdict: Verdict = "look" if distilled else "well"
    yield found("teacher kind", distilled, verdict, cause, "Take the one it was made from")
    skill = p.skill(theirs.model, theirs.recipe)
    ignorant = skill.learned is not None and skill.learned < 0.1
    seen = theirs.step * theirs.recipe.training.batch_size
    cause = "untrained, or trained too little" if seen < EARLY else "damaged, or badly trained"
    if skill.poor or ignorant:
        other = theirs.record.get("data_sha256") != p.run.record.get("data_sha256")
        cause = p.dress(theirs.model, skill) or (_other_data(p) if other else cause)
    cause, remedy = f"the teacher is {cause}", f"Examine it: cmbook doctor {p.recipe.teacher}"
    poor: Verdict = "ill" if skill.poor else "well"
    yield found("teacher denoises", skill.worst[0], poor, cause, remedy)
    yield found("teacher answers", skill.slope, poor, cause, remedy)
    if skill.learned is not None:
        yield found("teacher learned", skill.learned, under(skill.learned, 0.1, 0.1), cause, remedy)


def teacher_samples(p: Patient) -> Iterator[Finding]:
    """Whether the teacher's own samples are like the data, walked from where the student begins."""
    if p.recipe.teacher is None or not p.jumps:
        return
    theirs, top = p.at_hand, p.range.sigma_max
    if isinstance(theirs.recipe.objective, ProgressiveDistillation):
        return  # it knows few levels, which is told elsewhere
    real = p.part(slice(p.many))
    x = top * normal(real.x, seeded("doctor", "teacher"))
    walked = ode_sample(theirs.model, x, p.range, real.label, levels=40)
    off, bad = unlike(walked, real.x, 0.003, 0.015)
    known = theirs.recipe.noise_range.sigma_max
    cause = "the teacher's own samples are not distributed as the data"
    if known < top:
        cause += f": it was made for sigma up to {known:g}, and its walk begins at {top:g}"
    elif theirs.record.get("data_sha256") != p.run.record.get("data_sha256"):
        cause += f": it was {_other_data(p)}"
    yield found("teacher samples", off, bad, cause, f"Examine it: cmbook doctor {theirs.folder}")


def unlabelled(p: Patient) -> Iterator[Finding]:
    """Whether the teacher can answer without a label, as guidance asks it to."""
    if p.recipe.guidance in (0, 1) or not p.classes:
        return
    theirs = p.at_hand
    batch = Batch(p.asked.x, None)
    learned = p.skill(theirs.model, theirs.recipe, batch).learned
    if learned is None:
        return
    dropout = getattr(theirs.recipe.network, "label_dropout", 0.0)
    cause = (
        "the teacher's answer without a label, which guidance moves away from, is hardly trained: "
        f"it was made with network.label_dropout = {dropout:g}"
    )
    remedy = "Train a teacher with network.label_dropout = 0.1"
    yield found("teacher unlabelled", learned, under(learned, 0.5, 0.2), cause, remedy)


def _other_data(p: Patient) -> str:
    """In which setting the teacher's data are others than the student's."""
    theirs, ours = p.at_hand.recipe.data, p.recipe.data
    if type(theirs) is not type(ours):
        return "made for other data"
    each = [(f.name, getattr(theirs, f.name), getattr(ours, f.name)) for f in fields(ours)]
    said = ", ".join(f"data.{n} was {a!r}, here {b!r}" for n, a, b in each if a != b)
    return "made for other data" + (f": {said}" if said else "")


def walk(p: Patient) -> Iterator[Finding]:
    """Where the teacher's walk leads, and what the grid of distillation loses of it."""
    objective = p.recipe.objective
    if not (p.jumps and objective.needs_teacher):
        return
    fine = p.walked(p.walker)
    out = outside(p, fine)
    why = f": guidance {p.recipe.guidance:g} is too strong" if p.recipe.guidance > 1 else ""
    yield found("walk", out, over(out, 0.1, 0.3), f"the teacher's walk leaves the data{why}")
    if p.recipe.guidance > 1 and p.data is not None:
        kept = scatter(fine, p.told) / max(p.within, 1e-300)
        cause = f"guidance {p.recipe.guidance:g} is too strong: it leaves {kept:.0%} of the variety"
        yield found("walk variety", kept, under(kept, 0.3, 0.15), cause)
    if isinstance(objective, ConsistencyDistillation):
        # The walk's last level is 0, where the grid ends on sigma_min.
        lost = p.off(p.walked(p.walker, max(2, objective.levels - 1), objective.solver), fine)
        n = objective.levels
        cause = f"objective.levels = {n} are too few: the grid is too coarse for the teacher's path"
        yield found("grid", lost, over(lost, 0.4, 0.6), cause, "Raise it, or use Heun")


def first_round(p: Patient) -> Iterator[Finding]:
    """Whether the steps of its teacher that a progressive student learns lead to the data."""
    objective = p.recipe.objective
    if not isinstance(objective, ProgressiveDistillation) or p.recipe.teacher is None:
        return
    real, s = p.part(slice(p.many)), objective.steps
    x = p.range.sigma_max * normal(real.x, seeded("doctor", "teacher"))
    off, bad = unlike(
        progressive(p.walker, x, p.range, real.label, steps=2 * s), real.x, 0.003, 0.02
    )
    cause = (
        f"objective.steps = {s} {'is' if s == 1 else 'are'} too few to begin with: the student "
        f"learns {2 * s} Euler steps of its teacher in {s}, and even those do not lead to the data"
    )
    yield found("first round", off, bad, cause)


def outside(p: Patient, x: Samples) -> float:
    """The share of numbers that lie far outside the range of the data.

    Source: ours.
    """
    seen = torch.tensor([-1.0, 1.0]) if p.data is None else p.seen.x
    low, high = float(seen.min()), float(seen.max())
    margin = 0.2 * (high - low)
    return float((~((x > low - margin) & (x < high + margin))).double().mean())
