"""One-step sampling, timed beside the official code and diffusers on the same weights.

    python benchmarks/sample.py                                 (small: a minute)
    python benchmarks/sample.py --size full                     (296 million parameters, 6 GB)
    python benchmarks/sample.py --reference path/to/consistency_models

All draw from the same noise and must agree on the images. Each code runs in a process of its own,
in turns, in float32. Writes benchmarks/results/sample-SIZE.json.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from step import RESULTS, SIZES, random_weights, stand_ins
from torch import Tensor

from cmbook.interop import openai
from cmbook.interop.diffusers import pipeline
from cmbook.noise import normal, seeded
from cmbook.parameterization import ConsistencyScalings, Preconditioned
from cmbook.samplers import one_step


def model_of(size: str) -> Preconditioned:
    """A consistency model with random weights."""
    network, shape, classes, _ = SIZES[size]
    net = network.build(shape, classes)
    random_weights(net)
    return Preconditioned(net, ConsistencyScalings()).eval().requires_grad_(False)


def start(size: str) -> tuple[Tensor, Tensor]:
    """Noise of level 80, and classes."""
    _, shape, classes, n = SIZES[size]
    return 80 * normal(torch.empty(n, *shape), seeded("start")), torch.arange(n) % classes


def ours(size: str, bfloat16: bool) -> Callable[[], Tensor]:
    """Our sampler."""
    model, (x, label) = model_of(size), start(size)
    if bfloat16:
        model.net.bfloat16()
    return lambda: one_step(model, x, model.scalings.noise_range, label).clamp(-1, 1)


def official(size: str, _: bool) -> Callable[[], Tensor]:
    """The official network and denoiser."""
    from cm.karras_diffusion import KarrasDenoiser  # type: ignore[import-not-found]
    from cm.unet import UNetModel  # type: ignore[import-not-found]

    network, shape, classes, _n = SIZES[size]
    net = UNetModel(
        shape[1], 3, network.channels, 3, network.blocks,
        tuple(shape[1] // side for side in network.attention),
        channel_mult=network.multipliers, num_classes=classes, num_head_channels=64,
        use_scale_shift_norm=True, resblock_updown=True,
    )  # fmt: skip
    net.load_state_dict(openai.export(model_of(size), network))
    net.eval().requires_grad_(False)
    diffusion = KarrasDenoiser(distillation=True, weight_schedule="uniform", loss_norm="l2")
    x, label = start(size)
    sigma = torch.full((len(x),), 80.0)

    def draw() -> Tensor:
        denoised: Tensor = diffusion.denoise(net, x, sigma, y=label)[1]
        return denoised.clamp(-1, 1)

    return draw


def diffusers(size: str, _: bool) -> Callable[[], Tensor]:
    """The pipeline of diffusers; what it imports of a torchvision of another build is declared."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    pipe = pipeline(model_of(size), SIZES[size][0])
    pipe.set_progress_bar_config(disable=True)
    x, label = start(size)

    def draw() -> Tensor:
        images: Tensor = pipe(
            batch_size=len(x), class_labels=label, num_inference_steps=1, latents=x / 80,
            output_type="pt",
        ).images  # fmt: skip
        return images * 2 - 1

    return draw


CODES = {"ours": ours, "ours, bfloat16": ours, "official": official, "diffusers": diffusers}


def work(arguments: argparse.Namespace) -> None:
    """What a process of its own does: draw, time, print, end."""
    if arguments.worker == "official":
        stand_ins(arguments.reference)
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    draw = CODES[arguments.worker](arguments.size, "bfloat16" in arguments.worker)
    seconds = []
    with torch.no_grad():
        for _ in range(arguments.draws + 1):
            begin = time.perf_counter()
            images = draw()
            seconds.append(time.perf_counter() - begin)
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline)
    pixels = images.flatten()[:: max(1, images.numel() // 500)].tolist()
    print(json.dumps({"seconds": seconds[1:], "peak_gb": peak / 1e9, "pixels": pixels}))


def measured(code: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    command = [sys.executable, __file__, "--worker", code, "--size", arguments.size]
    command += ["--draws", str(arguments.draws), "--reference", arguments.reference]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference", default="")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--worker", choices=CODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments)
    codes = ["ours", "diffusers"]
    codes += ["ours, bfloat16"] if arguments.bfloat16 else []
    codes += ["official"] if arguments.reference else []
    results: dict[str, list[dict[str, Any]]] = {code: [] for code in codes}
    for turn in range(arguments.repeats):
        for code in codes:
            results[code].append(measured(code, arguments))
            print(f"{turn + 1} of {arguments.repeats}: {code}", file=sys.stderr)
    n = SIZES[arguments.size][3]
    table = {
        code: {
            "seconds": min(min(result["seconds"]) for result in found),
            "images": n,
            "peak_gb": min(result["peak_gb"] for result in found),
            "largest difference from ours": max(
                abs(a - b)
                for a, b in zip(found[0]["pixels"], results["ours"][0]["pixels"], strict=True)
            ),
        }
        for code, found in results.items()
    }
    path = RESULTS / f"sample-{arguments.size}.json"
    about = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    path.write_text(json.dumps(about | table, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
