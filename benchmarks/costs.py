"""Measured memory and speed of real training steps, beside what `cmbook estimate` says of them.

    python benchmarks/costs.py                       (half an hour, 20 GB)
    python benchmarks/costs.py --only cifar10/ct     (these rows anew, the others stay)

Each recipe takes real steps in a process of its own, on the processor, in float32, with random
weights and noise for images; where LPIPS takes part, its trunk is random too. Memory is what the
process grows by from before the networks are built, the libraries being there, to its largest.
Speed is the estimate's FLOPs over the fastest step's seconds, as a share of that of a large matrix
product; on a busy machine it says little.
Writes benchmarks/results/costs.json.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmbook import perceptual
from cmbook.costs import estimate, of_data, this_machine
from cmbook.experiment import Experiment, loads, recipe_text
from cmbook.losses import ConsistencyTraining
from cmbook.networks import UNet
from cmbook.noise import normal, seeded
from cmbook.parameterization import ConsistencyScalings, EDMScalings, Preconditioned
from cmbook.protocols import Batch
from cmbook.training import RAdam, distilled, train

RESULTS = Path(__file__).parent / "results"
PRODUCT = "gflop_per_second of a product"
FLOAT = ["training.precision=float32"]
L2 = ["objective.distance.kind=L2", *FLOAT]
CASES = {  # recipe, batch, accumulation: what a machine of 24 GB can take
    "fashion/ct": (128, 1, []),
    "cifar10/edm": (8, 1, []),
    "cifar10/edm-deep": (4, 1, []),
    "cifar10/cd": (8, 1, L2),
    "cifar10/cd with LPIPS": (2, 1, FLOAT),
    "cifar10/ct": (8, 2, L2),
    "cifar10/progressive": (8, 1, []),
    "cifar10/continuous-cd": (4, 1, []),
    "cifar10/continuous-ct": (4, 1, []),
    "imagenet64/edm": (4, 1, FLOAT),
    "imagenet64/cd": (1, 1, L2),
    "imagenet64/ct": (2, 1, L2),
    "imagenet64/ct in two shards": (4, 2, L2),
    "lsun256/edm": (1, 1, FLOAT),
    "lsun256/cd": (1, 1, L2),
    "lsun256/ct": (1, 1, L2),
}


def recipe_of(case: str) -> Experiment:
    """The recipe with the batch that fits."""
    batch, accumulation, further = CASES[case]
    sizes = [f"training.batch_size={batch}", f"training.accumulation={accumulation}"]
    return loads(recipe_text(case.split()[0]), [*sizes, *further])


def random_trunk(net: perceptual.Trunk) -> nn.Module:
    """LPIPS without its trained weights, which change neither memory nor work."""
    trunk = perceptual._hollow(net).to_empty(device="cpu")
    for i, weight in enumerate(trunk.parameters()):
        weight.data.copy_(0.03 * normal(weight.data, seeded("trunk", i)))
    return trunk


def warm_up() -> None:
    """A step of a tiny network, so that the libraries are there before anything is measured."""
    student = Preconditioned(UNet(8, attention=(4,)).build((1, 8, 8)), ConsistencyScalings())
    batches = repeat(Batch(torch.zeros(2, 1, 8, 8)))
    next(train(student, batches, ConsistencyTraining(), steps=1, optimizer=RAdam().build(student)))


def work(case: str, steps: int) -> None:
    """What a process of its own does: take the steps, print, end."""
    recipe = recipe_of(case)
    perceptual._pretrained = random_trunk
    shape, classes = of_data(recipe)
    warm_up()
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert recipe.network is not None
    net = recipe.network.build(shape, classes or None)
    teacher = None
    if recipe.objective.needs_teacher:
        teacher = Preconditioned(net, EDMScalings(recipe.noise_range)).eval().requires_grad_(False)
        student = distilled(teacher, recipe.scalings)
    else:
        student = Preconditioned(net, recipe.scalings)
    del net
    knobs = recipe.training

    def batches() -> Iterator[Batch]:
        x = normal(torch.empty(knobs.batch_size, *shape), seeded("images"))
        label = torch.arange(len(x)) % classes if classes else None
        while True:
            yield Batch(x, label)

    taken = train(
        student, batches(), recipe.objective, steps=steps, teacher=teacher,
        optimizer=knobs.optimizer.build(student), accumulation=knobs.accumulation,
    )  # fmt: skip
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        next(taken)
        seconds.append(time.perf_counter() - begin)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline
    known = estimate(recipe, on_gpu=False)  # here, since it takes memory itself
    speed = known.flops_step * knobs.batch_size / min(seconds)
    print(
        json.dumps(
            {
                "measured_gb": 1024 * grown / 1e9,
                "estimated_gb": known.peak / 1e9,
                "measured over estimated": 1024 * grown / known.peak,
                "seconds a step": min(seconds),
                "gflop_a_step": known.flops_step * knobs.batch_size / 1e9,
                "gflop_per_second": speed / 1e9,
            }
        )
    )


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="a recipe")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, arguments.steps)
    file = RESULTS / "costs.json"
    stored = json.loads(file.read_text(encoding="utf-8")) if arguments.only else {}
    product = stored.get(PRODUCT) or this_machine().float32 * 1e3
    table: dict[str, Any] = {}
    for case in CASES:
        if not case.startswith(arguments.only):
            continue
        command = [sys.executable, __file__, "--worker", case, "--steps", str(arguments.steps)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{case}: {done.stderr[-2000:]}")
        table[case] = json.loads(done.stdout.splitlines()[-1])
        table[case]["utilization"] = table[case]["gflop_per_second"] / product
        print(f"{case}: {table[case]['measured over estimated']:.2f}", file=sys.stderr)
    about = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        PRODUCT: product,
    }
    if arguments.only:
        about, table = stored, stored["recipes"] | table
    rows = {case: table[case] for case in CASES if case in table}
    file.write_text(json.dumps(about | {"recipes": rows}, indent=1) + "\n", encoding="utf-8")
    print(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
