"""The table of the README: teacher, CD, CT and the paper's plain CD on digits, over three seeds.

    python benchmarks/digits.py [SEED ...]        (default 0 1 2)

Each seed is one `cmbook demo`, seven minutes on two cores; the first also trains digits/cd-paper.
Finished runs under runs/bench are used again. Writes benchmarks/results/digits.json and prints
the table.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from cmbook.demo import demo, measure, multistep_of, recipe_of, trained
from cmbook.evaluation import nearest_distance
from cmbook.runs import load

RESULTS = Path(__file__).parent / "results" / "digits.json"
COLUMNS = ("frechet", "precision", "recall", "nearest_train", "ms_per_image", "seconds_training")


def one_seed(seed: int, with_paper: bool) -> list[dict[str, object]]:
    out = Path(f"runs/bench/digits/seed{seed}")
    rows = [vars(row) for row in demo(out, seed)]
    if not with_paper:
        return rows
    paper = trained(recipe_of("cd-paper", out, seed, ()), out / "cd-paper", False, True)
    data = paper.recipe.data.build()
    for steps in (1, 2):
        name = "CD as in the paper, {} evaluation" + "s" * (steps > 1)
        rows.append(vars(measure(name, paper, multistep_of(paper, steps), data, seed)[0]))
    return rows


def summary(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    seeds = [int(seed) for seed in sys.argv[1:]] or [0, 1, 2]
    runs = {seed: one_seed(seed, seed == seeds[0]) for seed in seeds}
    data = load(f"runs/bench/digits/seed{seeds[0]}/edm").recipe.data.build()
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "nearest_train_of_held_out": nearest_distance(data.held_out().x, data.x),
        "seeds": runs,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    print("\n| | NFE | Frechet | to teacher | precision | recall | nearest | training |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for i, row in enumerate(runs[seeds[0]]):
        had = [seed for seed in seeds if i < len(runs[seed])]
        column = {c: [runs[seed][i][c] for seed in had] for c in COLUMNS}
        ratios = [runs[seed][i]["frechet"] / runs[seed][2]["frechet"] for seed in had]
        seconds = column["seconds_training"]
        cells = [
            row["name"],
            row["nfe"] or "",
            summary(column["frechet"]),
            f"{statistics.median(ratios):.2f}x" if i > 2 else "",
            f"{statistics.median(column['precision']):.2f}",
            f"{statistics.median(column['recall']):.2f}",
            f"{statistics.median(column['nearest_train']):.2f}",
            "" if seconds[0] is None else f"{statistics.median(seconds):.0f} s",
        ]
        print(f"| {' | '.join(map(str, cells))} |")
    nearest = report["nearest_train_of_held_out"]
    print(f"\nheld-out digits to the nearest training digit: {nearest:.2f}")


if __name__ == "__main__":
    main()
