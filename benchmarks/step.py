"""One training step, timed by its parts, beside the official code on the same weights.

    python benchmarks/step.py                                   (small: minutes)
    python benchmarks/step.py --size full --repeats 3           (296 million parameters, 12 GB)
    python benchmarks/step.py --reference path/to/consistency_models

With --reference, a checkout of openai/consistency_models runs in the same session, in turns with
ours: its network and its loss, in float32, with the fastest attention kernel of PyTorch in place
of the one that needs a GPU. Both take the same weights, images and noise levels, and must agree on
the loss. Every measurement is a process of its own, so that its peak memory is its own. The floor
is the sum of the network's convolutions and products alone, measured in turns with the codes in
the same session, each operation at the best of all turns. --levers frozen-bfloat16 also says how
far a target in bfloat16 lags behind the student, compared with one in float32, once RAdam is past
its first five steps, which are not rectified.
Writes benchmarks/results/step-SIZE-METHOD.json.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
import types
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmbook.interop import openai
from cmbook.losses import ConsistencyDistillation, ConsistencyTraining
from cmbook.networks import UNet
from cmbook.noise import Replay, integers, normal, seeded
from cmbook.parameterization import ConsistencyScalings, EDMScalings, Preconditioned
from cmbook.protocols import Batch, Clock, Models
from cmbook.schedules import FixedLevels
from cmbook.training import RAdam, blend, distilled, frozen_copy

RESULTS = Path(__file__).parent / "results"
ADM: dict[str, Any] = {
    "head_channels": 64, "middle": True, "resample": "block", "time_scale": 1000.0, "groups": "all",
}  # fmt: skip
SIZES = {
    "small": (UNet(64, (1, 2), 2, (16,), **ADM), (3, 32, 32), 10, 16),
    "full": (UNet(192, (1, 2, 3, 4), 3, (32, 16, 8), **ADM), (3, 64, 64), 1000, 1),
}
LEVERS = "bfloat16, teacher-bfloat16, frozen-bfloat16 (teacher and target), compile: with commas"
LEVELS = {"cd": 40, "ct": 200}
SETTLED = 12  # steps after which RAdam's are rectified


def random_weights(net: nn.Module) -> None:
    """No weight is zero, so that no path is closed."""
    with torch.no_grad():
        for i, weight in enumerate(net.parameters()):
            weight.copy_(0.03 * normal(weight, seeded("weights", i)))


def draws(size: str, method: str, k: int) -> tuple[Tensor, Tensor]:
    """Noise and grid indices of step k, for both codes."""
    _, shape, _, n = SIZES[size]
    noise = normal(torch.empty(n, *shape), seeded("noise", k))
    return noise, integers(n, LEVELS[method] - 1, seeded("levels", k))


def batch_of(size: str) -> Batch:
    """The images and classes that all are given."""
    _, shape, classes, n = SIZES[size]
    images = normal(torch.empty(n, *shape), seeded("images")).clamp(-1, 1)
    return Batch(images, torch.arange(n) % classes)


def run(
    steps: int,
    optimizer: torch.optim.Optimizer,
    forward_backward: Callable[[int], float],
    averages: Callable[[], None],
) -> dict[str, Any]:
    """Seconds of each part of each step, and the losses."""
    seconds: dict[str, list[float]] = {"loss and backward": [], "optimizer": [], "averages": []}
    losses = []
    for k in range(steps):
        optimizer.zero_grad()
        for name, part in (
            ("loss and backward", lambda k=k: losses.append(forward_backward(k))),
            ("optimizer", optimizer.step),
            ("averages", averages),
        ):
            begin = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - begin)
    return {"seconds": seconds, "losses": losses}


def ours(size: str, method: str, steps: int, levers: set[str]) -> dict[str, Any]:
    """The parts of a step as `train` takes them."""
    network, shape, classes, _ = SIZES[size]
    net = network.build(shape, classes)
    random_weights(net)
    teacher = Preconditioned(net, EDMScalings()).requires_grad_(False).eval()
    student = distilled(teacher, ConsistencyScalings()).train()
    target, average = frozen_copy(student), frozen_copy(student)
    if method == "ct":
        del teacher, net
        models = Models(student, target)
        objective: Any = ConsistencyTraining(curriculum=FixedLevels(LEVELS["ct"], 0.95))
    else:
        if levers & {"teacher-bfloat16", "frozen-bfloat16"}:
            teacher.net.bfloat16()
        if "frozen-bfloat16" in levers:
            target.net.bfloat16()
        models = Models(student, target, teacher)
        objective = ConsistencyDistillation(levels=LEVELS["cd"], decay=0.95)
    if "compile" in levers:
        student.net = torch.compile(student.net)
    optimizer = RAdam(1e-5).build(student)
    batch = batch_of(size)

    def forward_backward(k: int) -> float:
        noise, indices = draws(size, method, k)
        recorded = Replay(normals=[noise], integers=[indices])
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in levers):
            loss = objective(models, batch, clock=Clock(k, 1000), generator=recorded)
        loss.value.backward()
        return float(loss.value.detach())

    rounded = "frozen-bfloat16" in levers
    exact = frozen_copy(student) if rounded else target

    def averages() -> None:
        if rounded:
            blend_bfloat16(target.net, student.net, 0.95)
        blend(exact, student, 0.95)
        blend(average, student, 0.999)

    measured = run(max(steps, SETTLED) if rounded else steps, optimizer, forward_backward, averages)
    if rounded:
        measured["target's lag over float32's"] = lag(target, student) / lag(exact, student)
    return measured


@torch.no_grad()
def blend_bfloat16(average: nn.Module, model: nn.Module, decay: float) -> None:
    """As `blend`, stored in bfloat16."""
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.copy_(ours.float().lerp_(theirs, 1 - decay))


@torch.no_grad()
def lag(target: nn.Module, student: nn.Module) -> float:
    """How far a target is behind, summed over all weights."""
    pairs = zip(target.parameters(), student.parameters(), strict=True)
    return sum(float((theirs - ours.float()).abs().sum()) for ours, theirs in pairs)


def reference(size: str, method: str, steps: int, levers: set[str]) -> dict[str, Any]:
    """The official network, loss and updates."""
    from cm.karras_diffusion import KarrasDenoiser  # type: ignore[import-not-found]
    from cm.nn import update_ema  # type: ignore[import-not-found]
    from cm.unet import UNetModel  # type: ignore[import-not-found]

    network, shape, classes, _ = SIZES[size]
    ours_net = network.build(shape, classes)
    random_weights(ours_net)
    weights = openai.export(Preconditioned(ours_net, EDMScalings()), network)
    del ours_net

    def build() -> nn.Module:
        net: nn.Module = UNetModel(
            shape[1], 3, network.channels, 3, network.blocks,
            tuple(shape[1] // side for side in network.attention),
            channel_mult=network.multipliers, num_classes=classes, num_head_channels=64,
            use_scale_shift_norm=True, resblock_updown=True,
        )  # fmt: skip
        net.load_state_dict(weights)
        return net

    student, target, average = build(), build().requires_grad_(False), build().requires_grad_(False)
    teacher = build().requires_grad_(False).eval() if method == "cd" else None
    weights.clear()
    settings = {"weight_schedule": "uniform", "loss_norm": "l2"}
    diffusion = KarrasDenoiser(distillation=True, **settings)
    teachers = KarrasDenoiser(distillation=False, **settings)
    optimizer = torch.optim.RAdam(student.parameters(), 1e-5)
    batch = batch_of(size)

    def forward_backward(k: int) -> float:
        noise, indices = draws(size, method, k)
        told, real = {"y": batch.label}, torch.randint
        torch.randint = lambda *_, **__: indices
        try:
            losses = diffusion.consistency_losses(
                student, batch.x, LEVELS[method], told, target, teacher, teachers, noise
            )
        finally:
            torch.randint = real
        loss = losses["loss"].mean()
        loss.backward()
        return float(loss)

    def averages() -> None:
        update_ema(target.parameters(), student.parameters(), 0.95)
        update_ema(average.parameters(), student.parameters(), 0.999)

    return run(steps, optimizer, forward_backward, averages)


def stand_ins(checkout: str) -> None:
    """The official code as a module, without what it needs and this measurement does not."""
    sys.path.insert(0, checkout)

    class FlashAttention(nn.Module):
        """The fastest attention that PyTorch has here."""

        def __init__(self, **_: object) -> None:
            super().__init__()

        def forward(self, qkv: Tensor, **_: object) -> tuple[Tensor, None]:
            q, k, v = qkv.contiguous().permute(2, 0, 3, 1, 4)  # else no kernel is fused
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2), None

    names: dict[str, dict[str, Any]] = {
        "flash_attn": {}, "flash_attn.flash_attention": {"FlashAttention": FlashAttention},
        "piq": {"LPIPS": None}, "torchvision": {}, "torchvision.transforms": {"RandomCrop": None},
        "blobfile": {}, "mpi4py": {"MPI": None},
    }  # fmt: skip
    for name, contents in names.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module


def operations(size: str, repeats: int) -> list[tuple[int, float, float]]:
    """The network's convolutions and products alone, each distinct one with its own shapes.

    Returns:
        How often a forward pass takes it, and its seconds forward, and forward and backward, at
        the best of several runs.
    """
    network, shape, classes, _ = SIZES[size]
    net = network.build(shape, classes)
    random_weights(net)
    seen: dict[tuple[Any, ...], tuple[Callable[[], Tensor], list[Tensor]]] = {}
    count: dict[tuple[Any, ...], int] = {}

    def note(
        key: tuple[Any, ...], make: Callable[[], tuple[Callable[[], Tensor], list[Tensor]]]
    ) -> None:
        count[key] = count.get(key, 0) + 1
        if key not in seen:
            seen[key] = make()

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        def make() -> tuple[Callable[[], Tensor], list[Tensor]]:
            x = inputs[0].detach().clone().requires_grad_()
            return lambda: layer(x), [x, *layer.parameters()]

        key = (type(layer).__name__, tuple(inputs[0].shape), tuple(layer.weight.shape), str(layer))
        note(key, make)

    real = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def make() -> tuple[Callable[[], Tensor], list[Tensor]]:
            own = [t.detach().clone().requires_grad_() for t in (q, k, v)]
            return lambda: real(*own), own

        note(("attention", tuple(q.shape)), make)
        return real(q, k, v)

    hooks = [
        m.register_forward_hook(hook) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    batch = batch_of(size)
    with torch.no_grad():
        net(batch.x, torch.zeros(len(batch.x)), batch.label)
    F.scaled_dot_product_attention = real  # type: ignore[assignment]
    for h in hooks:
        h.remove()
    found = []
    for key, (call, leaves) in seen.items():
        plain, full = [], []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            with torch.no_grad():
                out = call()
            plain.append(time.perf_counter() - begin)
            gradient = torch.ones_like(out)
            begin = time.perf_counter()
            torch.autograd.grad(call(), leaves, gradient)
            full.append(time.perf_counter() - begin)
        found.append((count[key], min(plain), min(full)))
    return found


def floor(turns: list[dict[str, Any]], method: str) -> dict[str, float]:
    """Seconds of all operations of a loss and its gradient, each at the best of all turns.

    Evaluations without gradient count forward only.
    """
    each = list(zip(*(turn["operations"] for turn in turns), strict=True))
    forward = sum(same[0][0] * min(turn[1] for turn in same) for same in each)
    both = sum(same[0][0] * min(turn[2] for turn in same) for same in each)
    without = {"cd": 3, "ct": 1}[method]  # target and two of the teacher; target
    return {"forward": forward, "loss and backward": both + without * forward}


def measured(code: str, arguments: argparse.Namespace, levers: list[str]) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    command = [sys.executable, __file__, "--worker", code, "--size", arguments.size]
    command += ["--method", arguments.method, "--steps", str(arguments.steps)]
    command += ["--reference", arguments.reference or "", "--levers", ",".join(levers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(arguments: argparse.Namespace) -> None:
    """What a process of its own does: measure, print, end."""
    if arguments.reference:
        stand_ins(arguments.reference)
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    levers = set(filter(None, arguments.levers.split(",")))
    if arguments.worker == "floor":
        print(json.dumps({"operations": operations(arguments.size, arguments.steps)}))
        return
    codes = {"ours": ours, "reference": reference}
    result = codes[arguments.worker](arguments.size, arguments.method, arguments.steps, levers)
    result["peak_bytes"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline)
    print(json.dumps(result))


def best(results: list[dict[str, Any]], part: str) -> float:
    """The fastest of all steps but each process's first."""
    return min(second for result in results for second in result["seconds"][part][1:])


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the table."""
    parts = {part: best(results, part) for part in results[0]["seconds"]}
    peak = min(result["peak_bytes"] for result in results)
    further = {key: results[0][key] for key in results[0] if key.startswith("target")}
    return parts | {"whole step": sum(parts.values()), "peak_gb": peak / 1e9} | further


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--method", choices=LEVELS, default="cd")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference", default="")
    parser.add_argument("--levers", default="", help=LEVERS)
    parser.add_argument("--worker", choices=("ours", "reference", "floor"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments)
    kinds = {"ours": ("ours", [])} | {
        f"ours, {lever}": ("ours", [lever]) for lever in filter(None, arguments.levers.split(","))
    }
    if arguments.reference:
        kinds["reference"] = ("reference", [])
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    floors: list[dict[str, Any]] = []
    for turn in range(arguments.repeats):
        for kind, (code, levers) in kinds.items():
            if turn and levers:  # these are told apart without a second look
                continue
            results[kind].append(measured(code, arguments, levers))
            print(f"{turn + 1} of {arguments.repeats}: {kind}", file=sys.stderr)
        floors.append(measured("floor", arguments, []))
        print(f"{turn + 1} of {arguments.repeats}: floor", file=sys.stderr)
    table: dict[str, Any] = {kind: summary(found) for kind, found in results.items()}
    if arguments.reference:
        pairs = zip(results["ours"][0]["losses"], results["reference"][0]["losses"], strict=True)
        table["largest relative difference of a loss"] = max(abs(a / b - 1) for a, b in pairs)
    for kind in kinds:  # the first loss is of the same weights, whatever the levers
        pair = [results[k][0]["losses"][0] for k in (kind, "ours")]
        table[kind]["first loss over ours"] = pair[0] / pair[1]
    table["floor"] = floor(floors, arguments.method) | {"in turns": True}
    for kind in kinds:
        over = table[kind]["loss and backward"] / table["floor"]["loss and backward"]
        table[kind]["loss and backward over its floor"] = over
    path = RESULTS / f"step-{arguments.size}-{arguments.method}.json"
    path.write_text(
        json.dumps(
            {
                "date": date.today().isoformat(),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                **table,
            },
            indent=1,
        )
        + "\n"
    )
    print(path.read_text())


if __name__ == "__main__":
    main()
