"""Why the paper's plain distillation is worse on digits: who damages whom, by noise level.

Distills one teacher for 600 steps under several losses and measures, at every noise level, how
far the student is from the end of the teacher's own path. Then takes a good student and trains
it further on the high noise levels alone.

    python benchmarks/why_weight.py [RUN_OF_THE_TEACHER]      (default runs/digits/edm)

Writes benchmarks/results/why_weight.json and docs/assets/why_weight.png. About five minutes.
"""

import json
import platform
import sys
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from cmbook import plotting
from cmbook.distances import PseudoHuber
from cmbook.evaluation import frechet_distance
from cmbook.losses import ConsistencyDistillation
from cmbook.losses.regression import neighbors, self_consistency
from cmbook.noise import NoiseRange, add_noise, normal, seeded
from cmbook.ode import heun_step, solve
from cmbook.parameterization import ConsistencyScalings, Preconditioned
from cmbook.protocols import Batch, Clock, Generator, Loss, Models, Pair
from cmbook.runs import load
from cmbook.samplers import multistep, ode_sample, prior
from cmbook.training import Adam, LearningRate, distilled, train

ROOT = Path(__file__).parents[1]
TEACHER = load(sys.argv[1] if len(sys.argv) > 1 else "runs/digits/edm")
DATA = TEACHER.recipe.data.build()
DIGITS = NoiseRange(0.002, 20.0, sigma_data=TEACHER.recipe.noise_range.sigma_data)
PAPER = replace(DIGITS, sigma_max=80.0)
SIGMAS = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 4.0, 8.0, 18.0])


@dataclass(frozen=True)
class SomeLevels:
    """Distillation that draws only noise levels in [low, high)."""

    whole: ConsistencyDistillation
    low: float = 0.0
    high: float = 99.0

    @property
    def noise_range(self) -> NoiseRange:
        return self.whole.noise_range

    def target_decay(self, clock: Clock) -> float:
        return 0.0

    def __call__(self, models: Models, batch: Batch, *, clock: Clock, generator: Generator) -> Loss:
        grid = self.noise_range.grid(self.whole.levels)
        drawn = ((grid[:-1] >= self.low) & (grid[:-1] < self.high)).nonzero()[:, 0]
        grid = grid[int(drawn[0]) : int(drawn[-1]) + 2]
        sigma, sigma_next = neighbors(grid, batch.x, generator)
        x = add_noise(batch.x, normal(batch.x, generator), sigma)
        with torch.no_grad():
            x_next = heun_step(models.teacher, x, sigma, sigma_next, batch.label)
        return self_consistency(
            models, Pair(x, sigma, x_next, sigma_next), batch.label, noise_range=self.noise_range,
            distance=self.whole.distance, weight=self.whole.weight, generator=generator,
        )  # fmt: skip


def student_of(objective: ConsistencyDistillation) -> Preconditioned:
    return distilled(TEACHER.model, ConsistencyScalings(objective.noise_range))


def trained(student: Preconditioned, objective: object, steps: int, lr: float, decay: str):
    optimizer = Adam(lr).build(student)
    rate = LearningRate(lr, decay=decay)
    batches = DATA.batches(64, seed=0)
    for step in train(
        student, batches, objective, steps=steps, optimizer=optimizer, teacher=TEACHER.model,
        average_decay=0.98, learning_rate=rate,
    ):  # fmt: skip
        last = step
    return last.average


@torch.no_grad()
def errors(model: Preconditioned) -> list[float]:
    """Root mean square per pixel, at each of SIGMAS, to where the teacher's path ends."""
    held_out, found = DATA.held_out(), []
    for sigma in SIGMAS.tolist():
        x = add_noise(held_out.x, normal(held_out.x, seeded(0, "why")), torch.full((599,), sigma))
        grid = replace(DIGITS, sigma_max=sigma).grid(24)
        end = solve(TEACHER.model, x, grid, held_out.label)
        ours = model(x, torch.full((599,), sigma), held_out.label)
        found.append(float((ours - end).square().mean().sqrt()))
    return found


def frechet(model: Preconditioned, noise_range: NoiseRange, sigmas: list[float]) -> float:
    held_out, draws = DATA.held_out(), seeded(0, "why", "images")
    label = held_out.label[torch.arange(5000) % 599]
    x = prior(torch.empty(5000, *DATA.shape), noise_range, draws)
    x0 = multistep(model, x, torch.tensor(sigmas), label, noise_range=noise_range, generator=draws)
    return frechet_distance(x0.clamp(-1, 1), held_out.x)


def walk(levels: int) -> float:
    """The Frechet distance of the teacher's own walk on a grid of so many levels."""
    held_out, draws = DATA.held_out(), seeded(0, "why", "images")
    label = held_out.label[torch.arange(5000) % 599]
    x = prior(torch.empty(5000, *DATA.shape), DIGITS, draws)
    x0 = ode_sample(TEACHER.model, x, DIGITS, label, levels=levels)
    return frechet_distance(x0.clamp(-1, 1), held_out.x)


def measured(model: Preconditioned, noise_range: NoiseRange) -> dict[str, object]:
    top = noise_range.sigma_max
    return {
        "frechet_1": frechet(model, noise_range, [top]),
        "frechet_2": frechet(model, noise_range, [top, 0.7]),
        "errors": errors(model),
    }


def main() -> None:
    start, digits = time.time(), ConsistencyDistillation(DIGITS, 8)
    paper = ConsistencyDistillation(PAPER, 18)
    huber, gap = {"distance": PseudoHuber()}, {"weight": "inverse_gap"}
    variants = {
        "pseudo-Huber, inverse gap": replace(digits, **huber, **gap),
        "l2, inverse gap": replace(digits, **gap),
        "pseudo-Huber, uniform": replace(digits, **huber),
        "l2, uniform": digits,
        "paper (N = 18, 80): l2, uniform": paper,
        "paper, target average 0.95": replace(paper, decay=0.95),
        "paper, pseudo-Huber": replace(paper, **huber),
        "paper, pseudo-Huber, inverse gap": replace(paper, **huber, **gap),
    }
    rows, good = {}, None
    for name, objective in variants.items():
        model = trained(student_of(objective), objective, 600, 3e-3, "cosine")
        good = good or deepcopy(model)
        rows[name] = measured(model, objective.noise_range)
        print(
            f"{name:36} {rows[name]['frechet_1']:7.2f} {rows[name]['frechet_2']:7.2f}", flush=True
        )
    untrained = student_of(digits).eval()
    rows["untrained copy of the teacher"] = measured(untrained, DIGITS)

    further = {"before": errors(good)}
    for name, objective in {
        "all levels, l2, uniform": SomeLevels(digits),
        "only levels above 1, l2, uniform": SomeLevels(digits, low=1),
        "only levels below 1, l2, uniform": SomeLevels(digits, high=1),
        "all levels, pseudo-Huber, inverse gap": SomeLevels(replace(digits, **huber, **gap)),
    }.items():
        student = deepcopy(good).requires_grad_(True)
        further[name] = errors(trained(student, objective, 150, 1e-3, "none"))
        print(f"{name:40} error at 0.3: {further[name][3]:.3f}", flush=True)

    report = {
        "teacher": str(TEACHER.folder), "sigmas": SIGMAS.tolist(), "rows": rows,
        "further": further,
        "walks": {levels: walk(levels) for levels in (8, 18)},
        "seconds": time.time() - start, "torch": torch.__version__,
        "machine": platform.machine(), "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    (ROOT / "benchmarks/results/why_weight.json").write_text(json.dumps(report, indent=1) + "\n")
    with plotting.book_style():
        figure = Figure(figsize=(8.5, 3.3))
        left, right = figure.subplots(1, 2, sharey=True)
        for name in [*list(variants)[:4], "untrained copy of the teacher"]:
            dash = {"color": plotting.DATA, "ls": "--"} if "untrained" in name else {}
            left.plot(SIGMAS, rows[name]["errors"], marker="o", ms=3, label=name, **dash)
        for name, found in further.items():
            dash = {"color": plotting.DATA, "ls": "--"} if name == "before" else {}
            right.plot(SIGMAS, found, marker="o", ms=3, label=name, **dash)
        left.set(title="600 steps under four losses", ylabel="error to the teacher's path end")
        right.set(title="150 more steps from a good student")
        for ax in (left, right):
            ax.set(xscale="log", yscale="log", xlabel="noise level σ")
            ax.legend(fontsize=7.5)
        plotting.save(figure, ROOT / "docs/assets/why_weight.png")


if __name__ == "__main__":
    main()
