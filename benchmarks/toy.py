"""Eight Gaussians in a minute: how far from the truth does a network get, and whose fault is it?

Three networks of one size, trained for the same time: one regressed directly on exact endpoints
(which nobody has outside such worlds: it shows what the network can hold), one distilled from the
exact denoiser, one trained alone. The ring has eight Gaussians (radius 0.7, standard deviation
0.05); distances are in units of its standard deviation per coordinate, at sigma 80.

    python benchmarks/toy.py [--seconds 60] [--seeds 3]
    python benchmarks/toy.py --draw     # the figure again, from the results of the last run

Writes benchmarks/results/toy.json and docs/assets/toy.png. With the defaults about twelve minutes.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from cmbook import plotting
from cmbook.data import ToyData, ring
from cmbook.distances import Norm, PseudoHuber
from cmbook.losses import ConsistencyDistillation, ConsistencyTraining
from cmbook.losses.regression import regress
from cmbook.networks import MLP
from cmbook.noise import NoiseRange, integers, seeded
from cmbook.ode import Solver
from cmbook.oracle import DistanceToTruth, distance_to_truth
from cmbook.parameterization import ConsistencyScalings, Preconditioned
from cmbook.protocols import Batch, Clock, Generator, Loss, Models, Objective
from cmbook.schedules import DoublingLevels
from cmbook.training import Adam, LearningRate, train

ROOT = Path(__file__).parents[1]
WORLD, RANGE, LEVELS, BATCH = ring(), NoiseRange(sigma_data=0.5), 18, 512
AIMS = {"network median": 0.02, "total rms": 0.07, "total off": 0.01}
CHECKS = 12  # how often a training is interrupted to be measured


@dataclass(frozen=True)
class Endpoints:
    """Regression on exact endpoints, precomputed: `points` are `(levels, n, 2)`."""

    points: torch.Tensor
    noise_range: NoiseRange = RANGE

    def target_decay(self, clock: Clock) -> float:
        return 0.0

    def __call__(self, models: Models, batch: Batch, *, clock: Clock, generator: Generator) -> Loss:
        n = len(batch.x)
        level = integers(n, LEVELS - 1, generator)
        path = integers(n, self.points.shape[1], generator)
        sigma = RANGE.grid(LEVELS).float()[level]
        prediction = models.student(self.points[level, path], sigma, None)
        return regress(prediction, self.points[-1, path], sigma, Norm(), torch.ones(n))


def exact_paths(n: int) -> torch.Tensor:
    """Points of `n` exact paths at every level of the grid."""
    grid = RANGE.grid(LEVELS)
    points = [WORLD.sample(n, RANGE.sigma_max, generator=seeded("paths")).x]
    for sigma, sigma_next in pairwise(grid):
        points.append(WORLD.flow_map(points[-1], sigma.expand(n), sigma_next.expand(n)))
    return torch.stack(points).float()


def student(seed: int) -> Preconditioned:
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        return Preconditioned(MLP(128, 4).build((2,)), ConsistencyScalings(RANGE))


def batches(seed: int) -> Iterator[Batch]:
    return ToyData(WORLD).batches(BATCH, seed)


def rate(objective: Objective) -> float:
    """Steps per second, over 300 steps after a start."""
    net = student(0)
    optimizer = Adam(2e-3).build(net)
    stamps = [
        time.perf_counter()
        for _ in train(net, batches(0), objective, steps=350, optimizer=optimizer,
                       teacher=WORLD.denoiser)
    ]  # fmt: skip
    return 300 / (stamps[-1] - stamps[49])


def measure(model: Preconditioned, levels: int, solver: Solver, n: int) -> DistanceToTruth:
    return distance_to_truth(
        model, WORLD, RANGE, levels=levels, solver=solver, n=n, generator=seeded("measure")
    )


def numbers(found: DistanceToTruth) -> dict[str, dict[str, list[float]]]:
    """Value and interval of every statistic at sigma_max."""
    return {
        part: {
            name: [round(float(v[0]), 5) for v in getattr(getattr(found, part), name)]
            for name in ("median", "rms", "off")
        }
        for part in ("discretization", "network", "total")
    }


def trained(
    objective: Objective, seconds: float, seed: int, levels: int, solver: Solver
) -> tuple[dict[str, object], DistanceToTruth]:
    """One training, measured on the way; the time of measuring is not counted."""
    steps = round(rate(objective) * seconds)
    net, peak = student(seed), 2e-3
    taken, start, curve = 0.0, time.perf_counter(), []
    for step in train(
        net, batches(seed), objective, steps=steps, optimizer=Adam(peak).build(net),
        teacher=WORLD.denoiser, average_decay=0.999, seed=seed,
        learning_rate=LearningRate(peak, 100, "cosine"),
    ):  # fmt: skip
        done = step.clock.step + 1
        if done % max(1, steps // CHECKS) == 0 or done == steps:
            taken += time.perf_counter() - start
            rms = float(measure(step.average, levels, solver, 2000).total.rms.value[0])
            curve.append([round(taken, 1), round(rms, 4)])
            start = time.perf_counter()
    found = measure(step.average, levels, solver, 10_000)
    reached = next((t for t, rms in curve if rms <= AIMS["total rms"]), None)
    report = numbers(found) | {
        "seed": seed, "steps": steps, "seconds": round(taken, 1),
        "steps per second": round(steps / taken, 1),
        "seconds to a total rms of 7%": reached, "total rms by seconds": curve,
    }  # fmt: skip
    return report, found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draw", action="store_true")
    told = parser.parse_args()
    results = ROOT / "benchmarks/results/toy.json"
    if told.draw:
        return draw(json.loads(results.read_text(encoding="utf-8")))

    began = time.perf_counter()
    paths = exact_paths(10_000)
    print(f"10,000 exact paths in {time.perf_counter() - began:.0f} s\n")
    curriculum = DoublingLevels(start=10, end=160)
    methods: dict[str, tuple[Objective, int, Solver]] = {
        "regressed on exact endpoints": (Endpoints(paths), LEVELS, "heun"),
        "distilled from the exact denoiser": (
            ConsistencyDistillation(
                RANGE, LEVELS, distance=PseudoHuber(), weight="inverse_gap"
            ), LEVELS, "heun",
        ),
        "trained alone": (
            ConsistencyTraining(RANGE, curriculum, PseudoHuber(), "inverse_gap"), 161, "euler",
        ),
    }  # fmt: skip
    rows = {}
    for name, (objective, levels, solver) in methods.items():
        runs = [trained(objective, told.seconds, s, levels, solver) for s in range(told.seeds)]
        rows[name] = [report for report, _ in runs]
        print(f"{name}, seed 0\n{runs[0][1]}\n")

    distilled = rows["distilled from the exact denoiser"]
    summary = {}
    for aim, most in AIMS.items():
        part, statistic = aim.split()
        values = [report[part][statistic][0] for report in distilled]
        summary[aim] = {"median of seeds": statistics.median(values), "worst": max(values)}
        print(f"distilled, {aim}: {summary[aim]}, aim at most {most}")
    result = {
        "date": date.today().isoformat(),
        "machine": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "seconds each": told.seconds,
        "aims": AIMS,
        "distilled": summary,
        "runs": rows,
    }
    text = json.dumps(result, indent=1)
    results.write_text(text + "\n", encoding="utf-8")

    draw(result)


def draw(result: dict[str, Any]) -> None:
    """Error against time, and what is left at the end, part by part."""
    colors = dict(zip(result["runs"], (plotting.TRUTH, plotting.CD, plotting.CT), strict=True))
    with plotting.book_style():
        figure = Figure(figsize=(8, 3.2))
        left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
        for name, runs in result["runs"].items():
            for i, run in enumerate(runs):
                seconds, rms = zip(*run["total rms by seconds"], strict=True)
                percent = [100 * value for value in rms]
                left.loglog(seconds, percent, color=colors[name], label=None if i else name)
        by_heun = result["runs"]["distilled from the exact denoiser"][0]["discretization"]
        floor = 100 * by_heun["rms"][0]
        left.axhline(floor, ls="--", c=plotting.TEACHER, label="discretization, 18 levels")
        left.set(
            xlabel="seconds on 2 cores", ylabel="total rms distance (% of std)", ylim=(0.8, 150)
        )
        left.set_xticks([5, 10, 20, 40, 60], [5, 10, 20, 40, 60], minor=False)
        left.set_yticks([1, 3, 5, 10, 20, 50], [1, 3, 5, 10, 20, 50], minor=False)
        left.minorticks_off()
        left.legend(fontsize=8)
        shown = [("network", "median"), ("network", "rms"), ("total", "rms"), ("total", "off")]
        for k, (part, statistic) in enumerate(shown):
            for shift, (name, runs) in zip((-0.2, 0, 0.2), result["runs"].items(), strict=True):
                values = [100 * run[part][statistic][0] for run in runs]
                right.plot([k + shift] * len(values), values, "o", color=colors[name], ms=4)
            aim = result["aims"].get(f"{part} {statistic}")
            if aim is not None:
                right.hlines(100 * aim, k - 0.35, k + 0.35, color=plotting.DATA)
        names = [f"{part}\n{statistic}" for part, statistic in shown]
        right.set(yscale="log", ylabel="%, each dot a seed; gray: the aim")
        right.set_xticks(range(len(shown)), names)
        right.set_yticks([0.3, 1, 3, 10], [0.3, 1, 3, 10], minor=False)
        right.minorticks_off()
        plotting.save(figure, ROOT / "docs/assets/toy.png")


if __name__ == "__main__":
    main()
