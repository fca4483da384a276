"""What the trainer costs beside a loop written by hand, and a save beside the bytes it writes.

    python benchmarks/overhead.py                    (ten minutes, 12 GB of memory and of disk)
    python benchmarks/overhead.py --only toy

Steps: a run with its log, bar, norms, checks and generators, and a bare loop around the same
objective, optimizer and average, take turns of one thread; each turn gives a difference per step,
and the median is told. Between them comes the bare loop that looks at its gradient before it takes
the step: that promise is the floor. Time is that of the processor, so that a busy machine matters
less. Saves: the state of the full ImageNet-64 network, by `checkpoints.save` and as raw bytes with
an fsync to as many files, in turns. Writes benchmarks/results/overhead.json.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from cmbook import checkpoints
from cmbook.experiment import Experiment, loads, recipe_text
from cmbook.noise import seeded
from cmbook.parameterization import ConsistencyScalings, Preconditioned
from cmbook.protocols import Clock, Models
from cmbook.runs import initialized, run
from cmbook.training import RAdam, State, blend, frozen_copy, frozen_view, gradient_norm

RESULTS = Path(__file__).parent / "results" / "overhead.json"
CASES = {  # recipe, settings, steps of a turn, turns
    "toy": ("toy/ct", [], 200, 31),
    "digits": ("digits/ct", ["training.batch_size=256"], 60, 21),
}


def bare(recipe: Experiment, steps: int, looks: bool = False) -> float:
    """Seconds a step of a loop written by hand, which looks for what is not finite, or not."""
    data, knobs = recipe.data.build(), recipe.training
    assert recipe.network is not None
    net = initialized(recipe.network, data.shape, data.classes, recipe.seed)
    student = Preconditioned(net, recipe.scalings).train()
    average, optimizer = frozen_copy(student).eval(), knobs.optimizer.build(student)
    models, batches = Models(student, frozen_view(student)), data.batches(knobs.batch_size, 0)
    generator, parameters, began = seeded(0), [*student.parameters()], 0.0
    for k in range(steps):
        if k == steps // 6:
            began = time.process_time()
        clock = Clock(k, steps)
        optimizer.param_groups[0]["lr"] = knobs.learning_rate(clock)
        optimizer.zero_grad()
        loss = recipe.objective(models, next(batches), clock=clock, generator=generator).value
        loss.backward()
        if looks and not math.isfinite(float(loss.detach() + gradient_norm(parameters))):
            raise ArithmeticError(f"not finite in step {k}")
        del loss  # its graph need not outlive the step
        optimizer.step()
        blend(average, student, knobs.average_decay)
    return (time.process_time() - began) / (steps - steps // 6)


def whole(recipe: Experiment, steps: int) -> float:
    """Seconds a step of the trainer: of its bar, between two of its steps."""
    from tqdm import tqdm

    times: list[float] = []
    update = tqdm.update

    def timed(bar: Any, n: int = 1) -> bool | None:
        times.append(time.process_time())
        return update(bar, n)

    tqdm.update = timed  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            run(recipe, Path(folder) / "run")
    finally:
        tqdm.update = update  # type: ignore[method-assign]
    first = steps // 6
    return (times[-2] - times[first - 1]) / (steps - 1 - first)


def steps_of(case: str) -> dict[str, Any]:
    """Both loops in turns."""
    name, settings, steps, turns = CASES[case]
    torch.set_num_threads(1)  # or two threads that wait for a busy core are what is measured
    settings = [*settings, f"training.steps={steps}", f"training.save_every={steps}"]
    recipe = loads(recipe_text(name), settings)
    bare(recipe, steps), whole(recipe, steps)  # both are warm then
    loops = [lambda: bare(recipe, steps), lambda: bare(recipe, steps, looks=True)]
    loops.append(lambda: whole(recipe, steps))
    times = [tuple(loop() for loop in loops) for _ in range(turns)]
    pairs, looked = [(b, w) for b, _, w in times], [f - b for b, f, _ in times]
    return {
        "recipe": name,
        "bare loop, ms": 1000 * statistics.median(b for b, _ in pairs),
        "trainer, ms": 1000 * statistics.median(w for _, w in pairs),
        "overhead, µs a step": 1e6 * statistics.median(w - b for b, w in pairs),
        "ratio": statistics.median(w / b for b, w in pairs),
        "of that a look at the gradient, µs a step": 1e6 * statistics.median(looked),
        "quartiles, µs a step": [
            round(1e6 * q, 1) for q in statistics.quantiles([w - b for b, w in pairs], n=4)
        ],
        "turns": [[round(1000 * t, 4) for t in turn] for turn in times],
    }


def seconds(do: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def saves(turns: int) -> dict[str, Any]:
    """A checkpoint of the full ImageNet-64 network, and its bytes alone."""
    recipe = loads(recipe_text("imagenet64/cd"))
    assert recipe.network is not None
    with torch.device("meta"):
        net = recipe.network.build((3, 64, 64), 1000)
    net = net.to_empty(device="cpu")
    for tensor in net.state_dict().values():
        tensor.zero_().add_(0.5)
    student = Preconditioned(net, ConsistencyScalings())
    optimizer = RAdam().build(student)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    state = State(student, optimizer, frozen_copy(student), frozen_copy(student))
    models = [state.student, state.target, state.average]
    parts = [[*model.state_dict().values()] for model in models if model is not None]
    parts.append([m for moments in optimizer.state.values() for m in moments.values()])

    def raw(folder: Path) -> None:
        for i, tensors in enumerate(parts):
            with (folder / str(i)).open("wb") as file:
                for tensor in tensors:
                    file.write(tensor.detach().contiguous().numpy())  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())

    pairs, size = [], sum(t.nbytes for part in parts for t in part)
    with tempfile.TemporaryDirectory(dir=".") as place:
        for turn in range(turns):
            folder = Path(place) / "raw"
            folder.mkdir()
            plain = seconds(lambda folder=folder: raw(folder))
            shutil.rmtree(folder)
            state.step = turn + 1
            saved = seconds(lambda: checkpoints.save(Path(place) / "saved", state, "", keep=1))
            shutil.rmtree(Path(place) / "saved")
            pairs.append((plain, saved))
    return {
        "gigabytes": size / 1e9,
        "bytes alone, s": statistics.median(p for p, _ in pairs),
        "save, s": statistics.median(s for _, s in pairs),
        "ratio": statistics.median(s / p for p, s in pairs),
        "turns": [[round(p, 2), round(s, 2)] for p, s in pairs],
    }


def main() -> None:
    """Measure what is asked for; keep the other results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=[*CASES, "save"])
    only = parser.parse_args().only
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for case in CASES:
        if only in (None, case):
            found[case] = steps_of(case)
            print(case, json.dumps(found[case], ensure_ascii=False))
    if only in (None, "save"):
        found["save"] = saves(5)
        print("save", json.dumps(found["save"]))
    found["machine"] = {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
