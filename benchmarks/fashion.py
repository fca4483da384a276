"""Clothes in one evaluation: a teacher, its student, and two students that trained alone.

    cmbook data get fashion-mnist
    OMP_NUM_THREADS=1 python benchmarks/fashion.py [data/fashion-mnist]

Trains what is missing in runs/fashion, as `cmbook train fashion/NAME` would (each half an hour or
so on a busy core), exports the models that come with cmbook, measures the consistency models,
and writes benchmarks/results/fashion. Notebook 09 has a copy of these files, for `cmbook notebooks`
takes what lies in its folder.
"""

import json
import platform
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmbook import experiment
from cmbook.data import Images
from cmbook.evaluation import Moments, frechet_distance
from cmbook.features import GlyphNet, extract
from cmbook.parameterization import ConsistencyScalings
from cmbook.references import load_samples, save_samples
from cmbook.reports import Evaluation
from cmbook.runs import Run, export, load, run

ROOT = Path(__file__).parents[1]
RESULTS, COPY = ROOT / "benchmarks/results/fashion", ROOT / "notebooks/weights/fashion"
RUNS = Path("runs/fashion")
NAMES = ("edm", "cd", "ct", "ct-paper")
EXPORTED = {name: ROOT / "cmbook/students/fashion" / name for name in ("cd", "ct")}


def trained(name: str, data: str) -> Run:
    folder = RUNS / name
    if not (folder / "checkpoints").is_dir():
        recipe = experiment.loads(
            experiment.recipe_text(f"fashion/{name}"), [f"data.path='{data}'"]
        )
        run(recipe, folder)
    return load(folder)


def shipped(name: str, made: Run) -> Run:
    """The exported model; its recipe says where the data lies by default, not where it lay here."""
    if not EXPORTED[name].exists():
        default = experiment.loads(experiment.recipe_text(f"fashion/{name}")).data
        export(replace(made, recipe=replace(made.recipe, data=default)), EXPORTED[name], half=True)
    return load(EXPORTED[name])


def by_class(x: Tensor, label: Tensor, real: list[Moments]) -> list[float]:
    """The Frechet distance of each class to the training images of that class."""
    return [frechet_distance(seen(x[label == c]), real[c]) for c in range(10)]


def seen(x: Tensor) -> Tensor:
    return extract(GlyphNet(), x.split(100)).features


def faults(x: Tensor) -> dict[str, float]:
    """What the eye sees: a checkerboard, against the finest other patterns, and gray corners."""
    power, half = torch.fft.fft2(x[:, 0]).abs().square().mean(dim=0), x.shape[-1] // 2
    near = power[half - 2 : half, half - 2 : half].mean()
    return {
        "checkerboard": float(power[half, half] / near),
        "corner": float((x[:, :, :4, :4].mean() + 1) / 2),
    }


def figures(made: Run, steps: int, real: list[Moments]) -> dict[str, Any]:
    where = RUNS / f"evaluation/{made.folder.name}-{steps}"
    if not (where / "report.json").is_file():
        Evaluation(steps=steps, rounds=10, progress=False)(made, where)
    report = json.loads((where / "report.json").read_text(encoding="utf-8"))
    x, label = load_samples(where / "samples.npz")
    assert label is not None
    return {
        "nfe": report["nfe"],
        "samples": report["samples"],
        **report["figures"],
        "by_class": by_class(x, label, real),
        "faults": faults(x),
    }


def keep_some(name: str) -> None:
    """One picture of each class in one evaluation, and one in two, for the book to show."""
    found = []
    for steps in (1, 2):
        x, label = load_samples(RUNS / f"evaluation/{name}-{steps}/samples.npz")
        assert label is not None
        found.append(x[[label.tolist().index(c) for c in range(10)]])
    save_samples(RESULTS / f"{name}.npz", torch.cat(found), torch.arange(20) % 10)


def measured(name: str, data: str, real: list[Moments]) -> dict[str, Any]:
    made = trained(name, data)
    seconds, steps = made.seconds, made.step
    shutil.copyfile(made.folder / "log.csv", RESULTS / f"{name}.csv")
    if name in EXPORTED:
        made = shipped(name, made)
    made = replace(made, recipe=replace(made.recipe, data=replace(made.recipe.data, path=data)))
    consistency = isinstance(made.recipe.scalings, ConsistencyScalings)
    found = [figures(made, n, real) for n in ((1, 2) if consistency else ())]
    return {"steps": steps, "seconds": round(seconds), "figures": found}


def main(data: str = "data/fashion-mnist", *names: str) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    place, built = RESULTS / "figures.json", Images(data).build()
    learned, new = next(built.batches(len(built), 0)), built.held_out()
    real = [Moments.of(seen(learned.x[learned.label == c])) for c in range(10)]
    report = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {"runs": {}}
    report |= {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"CPU, {torch.get_num_threads()} thread, {platform.machine()}, shared",
        "torch": torch.__version__,
        "extractor": "glyphnet, against 50,000 of the training images",
        "real": {"by_class": by_class(*new, real), "faults": faults(new.x)},
    }
    for name in names or NAMES:  # some alone, to add them to figures.json
        done = report["runs"] | {name: measured(name, data, real)}
        report["runs"] = {each: done[each] for each in NAMES if each in done}
        place.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    keep_some("ct-paper")  # the others come with the package
    COPY.mkdir(parents=True, exist_ok=True)
    for file in RESULTS.iterdir():
        shutil.copyfile(file, COPY / file.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
