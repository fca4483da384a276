"""Evaluation of a run: every figure with its counts, its interval and what real data would get.

The reference is the training set, as in the field; precision, recall and memorization use it too.
Held-out images give the floor: real data measured exactly as the samples are, at their own count.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import cmbook
from cmbook import clouds, disk, references
from cmbook.data import Data, ImageData
from cmbook.data.images import images
from cmbook.data.readers import bounded
from cmbook.evaluation import (
    Moments,
    bootstrap,
    frechet_distance,
    inception_score,
    nearest_training,
    precision_recall,
    share_nearer,
)
from cmbook.features import Activations, Extractor, GlyphNet, extract, from_bytes, to_bytes
from cmbook.noise import PerImage, seeded, shuffled
from cmbook.protocols import Labels, Samples
from cmbook.references import Statistics
from cmbook.runs import Run

FEWEST = 20  # of samples and of real images
MOST_REAL = 50_000  # training images that are looked at
MOST, MOST_AT_ONCE, MOST_ROUNDS = 10_000_000, 10_000, 10_000  # samples, in a batch; bootstraps
MOST_PAIRS = 10_000  # of each set where all pairs are compared
Report = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """How a run is measured.

    Attributes:
        n: How many images are drawn; of points, at most 5,000 are compared.
        steps: Network evaluations of a consistency model, levels of a diffusion model; `None`
            takes the default of `Run.sample`.
        extractor: What sees the images.
        reference: File of reference statistics; `None` takes the run's own training set.
        comparable_anyway: Use a reference although its provenance differs or is unknown.
        seed: Of the first image; the next has seed + 1.
        batch: Images per batch. The images do not depend on it.
        rounds: Of the bootstrap; 0 leaves intervals out.
        progress: Show bars.

    Source: ours.
    """

    n: int = 10_000
    steps: int | None = None
    extractor: Extractor = GlyphNet()
    reference: Path | None = None
    comparable_anyway: bool = False
    seed: int = 0
    batch: int = 100
    rounds: int = 20
    progress: bool = True

    def __post_init__(self) -> None:
        if self.n < FEWEST or self.batch < 1:
            raise ValueError(
                f"expected n of {FEWEST} or more and batch of 1 or more; got {self.n}, {self.batch}"
            )
        if self.n > MOST or self.batch > MOST_AT_ONCE:
            raise ValueError(
                f"expected n of at most {MOST:,} and batch of at most {MOST_AT_ONCE:,}; got "
                f"{self.n}, {self.batch}"
            )
        if self.rounds == 1 or not 0 <= self.rounds <= MOST_ROUNDS:
            raise ValueError(
                f"rounds must be 0 (no intervals) or 2 or more, at most {MOST_ROUNDS:,}; got "
                f"{self.rounds}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in 0 ... {2**32 - 1}; got {self.seed}")

    def __call__(self, made: Run, out: Path, samples: Path | None = None) -> Report:
        """Measure a run; write `report.json` and `samples.npz` into a folder.

        Args:
            made: The run.
            out: The folder.
            samples: A file of samples that are there already; nothing is drawn then.

        Returns:
            The report.

        Raises:
            ValueError: If the samples are not of the run's shape, or the reference is not
                comparable.
        """
        start = time.perf_counter()
        data = made.recipe.data.build()
        reference = self._reference(data)  # what is not comparable is refused before any work
        if samples is None:
            x, label, nfe = self.draw(made, data)
        else:
            (x, label), nfe = references.load_samples(samples), None
        if tuple(x.shape[1:]) != tuple(data.shape):
            raise ValueError(
                f"{samples} holds samples of shape {tuple(x.shape[1:])}; the run's data has "
                f"{tuple(data.shape)}"
            )
        figures = self._of_images(x, data, reference) if x.ndim == 4 else self._of_points(x, data)
        report = {
            "run": str(made.folder),
            "step": made.step,
            "samples": len(x),
            "nfe": nfe,
            "seed": self.seed if samples is None else None,
            "samples_from": None if samples is None else str(samples),
            **figures,
            "data_sha256": data.sha256(),
            "date": time.strftime("%Y-%m-%d"),
            "cmbook": cmbook.__version__,
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - start, 1),
        }
        references.save_samples(out / "samples.npz", x, label)
        with disk.replacing(out / "report.json") as file:
            file.write((json.dumps(report, indent=1) + "\n").encode())
        return report

    @torch.no_grad()
    def draw(self, made: Run, data: Data) -> tuple[Samples, Labels | None, int]:
        """`n` samples, their classes in the proportions of the data, and evaluations of each.

        Images are rounded to 8 bits, as every file of samples is. Each has a seed of its own, so
        it does not depend on the batch: of 192,000 pixels drawn in batches of 7 and of 100, none
        differed.
        """
        device = next(made.model.parameters()).device
        label = _labels(made, data, self.n)
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        parts: list[Tensor] = []
        hook = made.model.register_forward_hook(count)
        try:
            for first in self._bar(range(0, self.n, self.batch), "drawing"):
                seeds = range(self.seed + first, self.seed + min(first + self.batch, self.n))
                told = None if label is None else label[first : first + len(seeds)].to(device)
                drawn = made.sample(len(seeds), told, steps=self.steps, generator=PerImage(seeds))
                parts.append(to_bytes(drawn.cpu()) if drawn.ndim == 4 else drawn.cpu())
        finally:
            hook.remove()
        x = torch.cat(parts)
        return from_bytes(x) if x.ndim == 4 else x, label, calls // len(parts)

    def _reference(self, data: Data) -> Statistics | None:
        """The statistics of the file that is named, if they are comparable."""
        if self.reference is None:
            return None
        found = references.load_statistics(self.reference)
        here = references.provenance(
            self.extractor, tuple(data.shape), preprocessing=_preparation(data)
        )
        references.check_comparable(
            asdict(here), asdict(found.provenance), comparable_anyway=self.comparable_anyway
        )
        return found

    def _of_images(self, x: Samples, data: Data, reference: Statistics | None) -> Report:
        real, held_out = _training(data), _held_out(data)
        fresh = held_out is not None
        if held_out is None:  # half of the training images stand for others; the model knows them
            real, held_out = real[::2], real[1::2]
        fewest = min(len(x), len(real), len(held_out))
        if fewest < FEWEST:
            raise ValueError(f"nothing can be said of {fewest} images; {FEWEST} are needed")
        ours, train, new = (
            self._seen(z, what)
            for z, what in ((x, "samples"), (real, "training images"), (held_out, "held-out"))
        )
        file = None if self.reference is None else _sha256(self.reference)
        if reference is None:
            reference = Statistics.of(
                train,
                self.extractor,
                tuple(data.shape),
                data="the run's training set" if fresh else "half of the run's training set",
                preprocessing=_preparation(data),
            )
        neighbors = _neighbors(ours.features, train.features, new.features)
        if not fresh:  # a model that copies would pass for half a copier
            neighbors = {k: v for k, v in neighbors.items() if not k.startswith("memorized")}
        return {
            "extractor": _knobs(self.extractor),
            "reference": asdict(reference.provenance),
            "reference_file_sha256": file,
            "training_images": len(real),
            "held_out_images": len(held_out) if fresh else 0,
            "figures": {
                **self._distances("frechet", ours.features, new.features, reference.moments),
                **self._distances("sfid", ours.spatial, new.spatial, reference.spatial),
                **_scores(ours.probabilities, new.probabilities),
                **neighbors,
            },
        }

    def _distances(
        self, name: str, ours: Tensor | None, new: Tensor | None, reference: Moments | None
    ) -> Report:
        """The distance of all samples, and that of samples and real images of equal count."""
        if ours is None or new is None or reference is None:
            return {}
        k = min(len(ours), len(new))
        return {
            name: self._interval(ours, reference),
            f"{name}_of_{k}": frechet_distance(ours[:k], reference),
            f"{name}_of_{k}_real": frechet_distance(new[:k], reference),
        }

    def _of_points(self, x: Samples, data: Data) -> Report:
        held_out = data.held_out().x
        k = min(len(x), len(held_out))
        fresh = next(data.batches(k, self.seed)).x
        generator = seeded(self.seed, "evaluation")
        figures: Report = {}
        for name, cloud in (("", x[:k]), ("_real", fresh)):
            figures[f"mmd{name}"] = clouds.mmd(cloud, held_out[:k])
            figures[f"energy{name}"] = clouds.energy_distance(cloud, held_out[:k])
            figures[f"sliced_wasserstein{name}"] = clouds.sliced_wasserstein(
                cloud, held_out[:k], generator=generator
            )
        return {
            "extractor": None,
            "compared": k,
            "reference": "held-out points",
            "figures": figures,
        }

    def _seen(self, x: Samples, what: str) -> Activations:
        return extract(self.extractor, self._bar(x.split(self.batch), what))

    def _interval(self, features: Tensor, reference: Moments) -> dict[str, float]:
        def statistic(drawn: Tensor) -> float:
            return frechet_distance(drawn, reference)

        if not self.rounds:
            return {"value": statistic(features)}
        generator = seeded(self.seed, "bootstrap")
        found = bootstrap(statistic, features, rounds=self.rounds, generator=generator)
        return found._asdict()

    def _bar(self, parts: Any, what: str) -> Iterator[Any]:
        return iter(tqdm(parts, desc=what, disable=not self.progress, leave=False))


def table(report: Report) -> str:
    """A report as a small table: each figure beside that of real data.

    Source: ours.
    """
    figures, extractor = report["figures"], report["extractor"]
    lines = [("", "this run", "real data")]
    for name, value in figures.items():
        if not name.endswith("_real"):
            lines.append((name, _shown(value), _shown(figures.get(f"{name}_real"))))
    nfe = "unknown" if report["nfe"] is None else report["nfe"]
    terms = f"{report['samples']:,} samples, NFE {nfe}"
    if extractor is None:
        terms += f", {report['compared']:,} of them against as many held-out points"
    else:
        against = report["reference"]
        terms += f", by {extractor['name']} against {against['images'] or 'an unknown number'} of "
        terms += against["data"] or "unknown data"
    return f"{terms}\n\n{_aligned(lines)}"


def compare(first: Path, second: Path, *, comparable_anyway: bool = False) -> str:
    """The figures of two reports side by side, if they were made alike.

    Args:
        first: A `report.json`.
        second: Another.
        comparable_anyway: You know better.

    Raises:
        ValueError: If they differ in extractor, reference, data or counts, naming what; or if a
            file is no report.

    Source: ours.
    """
    a, b = (_read(path) for path in (first, second))
    terms = ["samples", "reference", "data_sha256"]
    terms += ["compared"] if "compared" in a else ["extractor", "held_out_images"]
    names = (*terms, *(["reference_file_sha256"] if a.get("reference_file_sha256") else []))
    references.check_comparable(a, b, names, comparable_anyway=comparable_anyway)
    shared = [name for name in a["figures"] if name in b["figures"]]
    rows = [(name, _shown(a["figures"][name]), _shown(b["figures"][name])) for name in shared]
    return _aligned([("", str(first), str(second)), *rows])


def _read(path: Path) -> Report:
    try:
        report = json.loads(bounded(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no report of cmbook evaluate: {error}") from error
    if not isinstance(report, dict) or not isinstance(report.get("figures"), dict):
        raise ValueError(f"{path} is no report of cmbook evaluate: it has no figures")
    for name, value in report["figures"].items():
        kinds = value.values() if isinstance(value, dict) else [value]
        known = ({"value"}, {"value", "low", "high", "bias"}, {"mean", "std"})
        named = not isinstance(value, dict) or {*value} in known
        if not named or not all(isinstance(n, int | float) and abs(n) < 1e300 for n in kinds):
            raise ValueError(f"{path} is no report of cmbook evaluate: {name} is no figure")
    return report


def _preparation(data: Data) -> str:
    return str(getattr(data, "preparation", "as stored"))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _scores(ours: Tensor | None, new: Tensor | None) -> Report:
    """The Inception Score of all samples, and that of samples and real images of equal count."""
    if ours is None or new is None:
        return {}
    k = min(len(ours), len(new))
    return {
        "inception_score": inception_score(ours)._asdict(),
        f"inception_score_of_{k}": inception_score(ours[:k])._asdict(),
        f"inception_score_of_{k}_real": inception_score(new[:k])._asdict(),
    }


def _neighbors(ours: Tensor, train: Tensor, new: Tensor) -> Report:
    """Precision, recall and memorization: of samples, and of as many real images."""
    k = min(len(ours), len(new), MOST_PAIRS)
    few = train[:k]
    (precision, recall), (real_precision, real_recall) = (
        precision_recall(z[:k], few) for z in (ours, new)
    )
    far, real_far = (nearest_training(z[:MOST_PAIRS], train).distance for z in (ours, new))
    return {
        f"precision_of_{k}": precision,
        f"precision_of_{k}_real": real_precision,
        f"recall_of_{k}": recall,
        f"recall_of_{k}_real": real_recall,
        "nearest_training": float(far.mean()),
        "nearest_training_real": float(real_far.mean()),
        "memorized": share_nearer(far, real_far),
        "memorized_real": 0.5,
    }


def _labels(made: Run, data: Data, n: int) -> Labels | None:
    """Classes in the proportions of the held-out images; without these, all in turn."""
    classes = made.record["classes"]
    if not classes:
        return None
    try:
        label = data.held_out().label
    except ValueError:
        label = None
    return (
        torch.arange(n) % classes if label is None else _mixed(label)[torch.arange(n) % len(label)]
    )


def _training(data: Data) -> Samples:
    """The training images, or 50,000 of them."""
    x = getattr(data, "x", None)
    if isinstance(x, Tensor):
        return _mixed(x)[:MOST_REAL]
    if isinstance(data, ImageData):  # its batches may be mirrored
        return images(data.rows, shuffled(len(data), seeded("evaluation"))[:MOST_REAL]).x
    n = min(len(data), MOST_REAL) if isinstance(data, Sized) else MOST_REAL
    return next(data.batches(n, 0)).x


def _held_out(data: Data) -> Samples | None:
    try:
        return _mixed(data.held_out().x)[:MOST_REAL]
    except ValueError:
        return None


def _mixed(x: Tensor) -> Tensor:
    """In random order, always the same: files are sorted by class, and a part must be fair."""
    return x[shuffled(len(x), seeded("evaluation")).to(x.device)]


def _knobs(extractor: Extractor) -> dict[str, Any]:
    """What decides its features; not where it runs or where its file lies."""
    return {name: getattr(extractor, name) for name in ("name", "sha256", "quantization")}


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, dict):
        return f"{value:.4g}"
    if "low" in value:
        return f"{value['value']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
    return (
        f"{value['mean']:.4g} ± {value['std']:.2g}" if "mean" in value else _shown(value["value"])
    )


def _aligned(lines: list[tuple[str, str, str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
