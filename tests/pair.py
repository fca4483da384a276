"""What each of two processes does for test_processes.py: everything, then one of them dies.

The test starts them with the variables that torchrun sets, but without torchrun, so that nobody
ends a process whose partner is gone.
"""

import contextlib
import io
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cmbook import (
    AdaptiveLevels,
    ConsistencyDistillation,
    ConsistencyScalings,
    ConsistencyTraining,
    ContinuousDistillation,
    ContinuousTraining,
    Experiment,
    NoiseRange,
    Preconditioned,
    ResidualMLP,
    Toy,
    experiment,
    run,
    train,
)
from cmbook.__main__ import main
from cmbook.processes import Processes, together
from cmbook.training import RAdam, State

RANGE = NoiseRange(sigma_max=10.0)
RING = Toy("ring").build()
METHODS = {
    "cd": ConsistencyDistillation(RANGE),
    "ct with a target": ConsistencyTraining(RANGE, AdaptiveLevels(2, 20)),
    "continuous training": ContinuousTraining(RANGE),
    "continuous distillation": ContinuousDistillation(RANGE),
    "through the derivative": ContinuousDistillation(RANGE, frozen_target=False),
}
RECIPE = """# A small ring.
data = { kind = "Toy" }
network = { kind = "ResidualMLP", width = 16, depth = 1, told = 8, dropout = 0.5 }
scalings = { kind = "ConsistencyScalings" }
[noise_range]
sigma_max = 10.0
[objective]
kind = "ConsistencyTraining"
curriculum = { kind = "AdaptiveLevels", start = 2, end = 8 }
[training]
steps = 6
batch_size = 8
optimizer = { kind = "Adam" }
average_decay = 0.5
also_average = [0.9]
save_every = 3
[sampling]
sigmas = [10.0, 1.0]
"""


def recipe(**knobs: Any) -> Experiment:
    """The small ring."""
    whole = experiment.loads(RECIPE)
    return replace(whole, training=replace(whole.training, **knobs))


def trained(
    method: str, processes: Processes, accumulation: int, size: int = 16, first: int = 0
) -> dict[str, torch.Tensor]:
    """All that four steps come to; `first` is the seed of the first weights."""
    objective = METHODS[method]
    with torch.random.fork_rng():
        torch.manual_seed(first)
        net = ResidualMLP(16, 1, 8, dropout=0.5).build((2,))
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    student = Preconditioned(net, ConsistencyScalings(RANGE))
    optimizer = RAdam(1e-2).build(student)
    state = State.begin(student, optimizer, objective, (0.9,))
    steps = train(
        student,
        RING.batches(size, 0),
        objective,
        steps=4,
        optimizer=optimizer,
        teacher=RING.world.denoiser,
        average_decay=0.5,
        also_average=(0.9,),
        accumulation=accumulation,
        clip=0.05,
        state=state,
        processes=processes,
    )
    told = [(s.loss.value, s.loss.per_sample, s.loss.sigma, s.gradient_norm) for s in steps]
    names = ("losses", "per sample", "sigmas", "norms")
    found = {n: torch.stack(each) for n, each in zip(names, zip(*told, strict=True), strict=True)}
    return found | {"state": torch.cat([t.detach().flatten() for t in state.tensors])}


def shares(processes: Processes) -> torch.Tensor:
    """The samples that this process's shards are made of, step by step."""
    seen, objective = [], METHODS["cd"]

    class Spied(ConsistencyDistillation):
        def __call__(self, models: Any, batch: Any, **knobs: Any) -> Any:
            seen.append(batch.x)
            return objective(models, batch, **knobs)

    METHODS["spied"] = Spied(RANGE)
    trained("spied", processes, 2)
    return torch.stack(seen)


def without_sums(processes: Processes) -> dict[str, Any]:
    """A training that forgets to add up the gradients, and what the check says of it."""
    alone = replace(processes)
    object.__setattr__(alone, "add", lambda tensors: None)
    found = trained("continuous training", alone, 1)
    return found | {"said": error_of(lambda: processes.check_equal([found["state"]]))}


def error_of(do: Callable[[], Any]) -> str:
    """The error that something raises."""
    try:
        do()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def interrupted(folder: Path, processes: Processes) -> str:
    """One process is asked to stop in its fourth step."""
    asked, called = processes.rank == 1, ConsistencyTraining.__call__

    def asking(self: Any, models: Any, batch: Any, *, clock: Any, generator: Any) -> Any:
        if asked and clock.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return called(self, models, batch, clock=clock, generator=generator)

    ConsistencyTraining.__call__ = asking
    try:
        return error_of(lambda: run(recipe(), folder, progress=False, processes=processes))
    finally:
        ConsistencyTraining.__call__ = called


def commanded(folder: Path) -> str:
    """What the command line prints when it does the same."""
    (folder / "ring.toml").write_text(RECIPE, encoding="utf-8")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        main(["train", str(folder / "ring.toml"), "--out", str(folder / "commanded")])
    return printed.getvalue()


def bereaved(processes: Processes) -> str:
    """One process dies without a word; what the other says."""
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return error_of(lambda: trained("cd", processes, 1))


def everything(folder: Path) -> None:
    """Keep what each scene comes to in a file of this process."""
    found: dict[str, Any] = {}
    with together("cpu") as processes:
        rank, knobs = processes.rank, {"progress": False, "processes": processes}
        scenes: dict[str, Callable[[], Any]] = {
            **{m: lambda m=m: trained(m, processes, 1, first=rank) for m in METHODS},
            "two shards each": lambda: trained("cd", processes, 2),
            "shares": lambda: shares(processes),
            "without sums": lambda: without_sums(processes),
            "uneven": lambda: run(recipe(batch_size=9), folder / "uneven", **knobs),
            "uneven batch": lambda: trained("cd", processes, 1, size=9),
            "on main": lambda: processes.on_main(lambda: os.getpid()),
            "any": lambda: [processes.any(rank == r) for r in (0, 1, 2)],
            "interrupted": lambda: interrupted(folder / "interrupted", processes),
            "occupied": lambda: run(recipe(), folder / "interrupted", **knobs),
            "resumed": lambda: run(recipe(), folder / "resumed", resume=True, **knobs).step,
            "commanded": lambda: commanded(folder),
        }
        for name, scene in scenes.items():
            try:
                found[name] = scene()
            except (Exception, SystemExit) as error:
                found[name] = f"{type(error).__name__}: {error}"
        torch.save(found, folder / f"{rank}.pt")
        found["bereaved"] = bereaved(processes)
        torch.save(found, folder / f"{rank}.pt")
        os._exit(7)  # there is nobody left to say goodbye to
