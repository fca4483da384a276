"""The students that come with the package: makes those that are missing, and measures all.

    OMP_NUM_THREADS=1 python benchmarks/students.py

Delete a folder of cmbook/students, and runs/students, to make it anew: digits take a quarter of an
hour on one core. Writes benchmarks/results/students.json and prints the tables of
cmbook/students/README.md.
"""

import json
import platform
import time
from pathlib import Path
from typing import NamedTuple

import torch

from cmbook import experiment
from cmbook.demo import measure, multistep_of, walk_of
from cmbook.evaluation import frechet_distance
from cmbook.runs import Run, export, load, run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "students.json"
RUNS = Path("runs/students")


class Recipe(NamedTuple):
    name: str
    settings: tuple[str, ...] = ()


STUDENTS = {  # what is trained for each: a teacher, and its student, which is exported
    "digits/cd": (
        Recipe("digits/edm", ("network.width=192",)),
        Recipe("digits/cd", ("training.steps=3000",)),
    ),
}


def trained(recipe: Recipe, teacher: Path | None) -> Path:
    folder = RUNS / recipe.name
    settings = [*recipe.settings, *([f"teacher='{teacher.as_posix()}'"] if teacher else [])]
    there = (folder / "experiment.toml").is_file()
    run(experiment.loads(experiment.recipe_text(recipe.name), settings), folder, resume=there)
    return folder


def made(name: str) -> Run:
    folder = ROOT / "cmbook" / "students" / name
    if not folder.exists():
        teacher = None
        for recipe in STUDENTS[name]:
            teacher = trained(recipe, teacher)
        export(load(teacher), folder, half=True)
    return load(folder)


def measured(student: Run) -> dict[str, float]:
    """Frechet distances to the held-out data, in pixel space."""
    data = student.recipe.data.build()
    figures = {"training data": frechet_distance(data.x, data.held_out().x)}
    if Path(student.recipe.teacher).is_dir():
        teacher = load(student.recipe.teacher)
        row, _ = measure("teacher, {} evaluations", teacher, walk_of(teacher), data, 0)
        figures[row.name] = row.frechet
    for steps in range(1, len(student.recipe.sampling.sigmas) + 1):
        name = "student, {} evaluation" + "s" * (steps > 1)
        row, _ = measure(name, student, multistep_of(student, steps), data, 0)
        figures[row.name] = row.frechet
    return figures


def main() -> None:
    students = {name: made(name) for name in STUDENTS}
    figures = {name: measured(student) for name, student in students.items()}
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "frechet": figures,
        "bytes": {
            name: sum(p.stat().st_size for p in student.folder.iterdir())
            for name, student in students.items()
        },
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, rows in figures.items():
        print(f"\n| {name} | Frechet |\n| --- | --- |")
        for row, value in rows.items():
            print(f"| {row} | {value:.2f} |")


if __name__ == "__main__":
    main()
