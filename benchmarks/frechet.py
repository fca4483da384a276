"""Time and memory of FID on 50,000 x 2,048 features, against sqrtm; precision and recall at 10,000.

    python benchmarks/frechet.py        (a few minutes on two cores, 1.2 GB)

Features are random, with the falling spectrum that features of networks have. Each part runs in a
process of its own, so that its peak memory is its own. Writes benchmarks/results/frechet.json.
"""

import json
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from cmbook.evaluation import Moments, frechet_distance, precision_recall
from cmbook.noise import normal, seeded

RESULTS = Path(__file__).parent / "results" / "frechet.json"
D = 2048


def features(n: int, seed: int) -> Tensor:
    """Correlated and not negative, as pool features are."""
    mixing = normal(torch.empty(D, D), seeded("mixing"))
    mixing *= torch.linspace(0, 4, D).neg().exp()[:, None] / D**0.5
    chunks = (normal(torch.empty(5000, D), seeded(seed, i)) @ mixing for i in range(n // 5000))
    return torch.cat([chunk.add_(0.1 * seed).relu_() for chunk in chunks])


def statistics() -> dict[str, object]:
    """From features to the distance: one set of 50,000, the reference's moments being known."""
    reference, x = Moments.of(features(10_000, 2)), features(50_000, 1)
    start = time.perf_counter()
    moments = Moments.of(x)
    middle = time.perf_counter()
    distance = frechet_distance(moments, reference)
    end = time.perf_counter()
    return {"seconds_moments": middle - start, "seconds_distance": end - middle, "fid": distance}


def by_sqrtm() -> dict[str, object]:
    """The same distance as the field's evaluators take it, from the same moments."""
    a, b = Moments.of(features(50_000, 1)), Moments.of(features(10_000, 2))
    mean, other = a.mean.numpy(), b.mean.numpy()
    start = time.perf_counter()
    root = np.real(scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()))
    trace = np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * root)
    distance = float(((mean - other) ** 2).sum() + trace)
    return {"seconds_distance": time.perf_counter() - start, "fid": distance}


def neighbors() -> dict[str, object]:
    """Precision and recall of 10,000 against 10,000."""
    x, y = features(10_000, 1), features(10_000, 1).flip(1)
    y[:5000] = x[:5000] + 0.01
    start = time.perf_counter()
    precision, recall = precision_recall(x, y)
    return {"seconds": time.perf_counter() - start, "precision": precision, "recall": recall}


def measured(part: Callable[[], dict[str, object]], queue: multiprocessing.Queue) -> None:
    found = part()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    queue.put({**found, "peak_gb": round(peak, 2)})


def main() -> None:
    load = os.getloadavg()[0]  # above 0, others were computing too
    context = multiprocessing.get_context("spawn")
    parts: dict[str, object] = {}
    for part in (statistics, by_sqrtm, neighbors):
        queue = context.Queue()
        process = context.Process(target=measured, args=(part, queue))
        process.start()
        parts[part.__name__] = queue.get()
        process.join()
        print(part.__name__, parts[part.__name__], flush=True)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "load_before": round(load, 1),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "features": f"50,000 x {D} against 10,000 x {D}",
        **parts,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
