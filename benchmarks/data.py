"""How fast do images come out of the cache, and does memory stay flat?

A folder of 64x64 pictures is prepared once, then read for 20 epochs in batches of 256, with flips,
as a run reads it. The aim: 2,000 images a second, memory within 5%.

    python benchmarks/data.py [--images 4000] [--epochs 20]

Writes benchmarks/results/data.json. About a minute.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from datetime import date
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cmbook.data import Images
from cmbook.protocols import Batch

ROOT = Path(__file__).parents[1]
SIZE, BATCH = 64, 256


def resident() -> float:
    """Megabytes of this process in memory, without pages of files (the cache is such)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not tell")


def _used(batch: Batch) -> float:
    """Memory while a batch is in use."""
    assert -1 <= float(batch.x.mean()) <= 1
    return resident()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=20)
    knobs = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # else what free() keeps looks like growth
        fixed = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
        os.execve(sys.executable, [sys.executable, *sys.argv], fixed)
    with tempfile.TemporaryDirectory() as folder:
        root, random = Path(folder), np.random.default_rng(0)
        os.environ["CMBOOK_CACHE"] = str(root / "cache")
        for i in range(knobs.images):  # smooth pictures, so that files have a usual size
            small = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8))
            place = root / "pictures" / f"class{i % 10}" / f"{i:05}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            small.resize((160, 120), Image.Resampling.BICUBIC).save(place)
        start = time.perf_counter()
        data = Images(str(root / "pictures"), SIZE, 3, flip=True).build()
        prepared = time.perf_counter() - start
        each, batches = knobs.images // BATCH, data.batches(BATCH, 0)
        memory, start = [], time.perf_counter()
        for _ in range(knobs.epochs):
            memory.append(max(_used(batch) for batch in islice(batches, each)))
        seconds = time.perf_counter() - start
    steady = memory[1:]  # the largest of each epoch
    found = {
        "date": date.today().isoformat(),
        "machine": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "images": knobs.images,
        "epochs": knobs.epochs,
        "prepared, images a second": round(knobs.images / prepared),
        "from the cache, images a second": round(knobs.epochs * each * BATCH / seconds),
        "most memory in an epoch, MB: of the first, and range of the others": [
            round(memory[0]),
            round(min(steady)),
            round(max(steady)),
        ],
        "memory spread": round(max(steady) / min(steady) - 1, 4),
    }
    (ROOT / "benchmarks" / "results" / "data.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
