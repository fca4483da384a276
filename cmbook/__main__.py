"""The command line.

cmbook demo | train | doctor | estimate | sample | edit | evaluate | compare | export
cmbook get | convert | data | configs | notebooks
"""

import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import tyro

if TYPE_CHECKING:
    from torch import Tensor

    from cmbook.features import Extractor
    from cmbook.runs import Run

MOST = 10_000_000  # samples, of one call
LONGEST = 2000  # characters of an error: paths are long, but what was given may have no end
BEYOND_MEMORY = (
    "out of memory|allocate memory|not enough memory|size calculation overflow|"
    "multiplication overflow"
)
BATCH = 1 << 20  # numbers that `cmbook sample` draws at a time; the samples do not depend on it


@dataclass(frozen=True)
class Demo:
    """Train three models on handwritten digits and draw digits in one step. Start here.

    Takes a few minutes on a laptop. Writes demo.png and report.json into the folder --out.
    Call it again after an interruption, and it goes on where it stopped.
    """

    out: Path = Path("runs/demo")
    """Folder for the picture, the report and the three runs."""
    seed: int = 0
    """Of weights, data order and noise."""
    overwrite: bool = False
    """Start from nothing, even if the folder holds finished runs."""
    set: tuple[str, ...] = ()
    """Settings for all three recipes, such as training.steps=100."""

    def __call__(self) -> None:
        """Do it."""
        from cmbook.demo import demo, table

        rows = demo(self.out, self.seed, self.overwrite, self.set)
        print(f"\n{table(rows)}\n\nThe picture: {self.out / 'demo.png'}")


@dataclass(frozen=True)
class Train:
    """Carry out a recipe: one that comes with cmbook, or a TOML file of your own.

    For example:  cmbook train digits/edm
                  cmbook train digits/cd objective.levels=40 training.steps=500 --out runs/short

    Ctrl-C or SIGTERM stops after the current step with a checkpoint; --resume goes on from there.
    On 8 GPUs: torchrun --nproc-per-node 8 -m cmbook train digits/cd
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """A name from `cmbook configs`, or the path of a .toml file."""
    settings: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE ...")
    ] = ()
    """Settings to replace, as key=value."""
    out: Path | None = None
    """Folder of the run; by default runs/NAME."""
    resume: bool = False
    """Go on with the run in that folder."""
    changed: bool = False
    """With --resume: also with other settings, data or teacher than it had; says which."""
    overwrite: bool = False
    """Replace the run in that folder."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    tensorboard: bool = False
    """Also write what TensorBoard shows: the log as curves, samples at every save."""

    def __call__(self) -> None:
        """Do it."""
        from cmbook import experiment, runs
        from cmbook.processes import together

        recipe = experiment.loads(experiment.recipe_text(self.recipe), self.settings)
        name = self.recipe if not self.recipe.endswith(".toml") else Path(self.recipe).stem
        folder = self.out or Path("runs") / name
        with together(self.device) as processes:
            try:
                done = runs.run(
                    recipe,
                    folder,
                    resume=self.resume,
                    changed=self.changed,
                    overwrite=self.overwrite,
                    device=processes.device or _device(self.device),
                    tensorboard=self.tensorboard,
                    processes=processes,
                )
            except runs.Interrupted as stop:
                if not processes.is_main:
                    sys.exit(130)
                raise runs.Interrupted(f"{stop}. Go on with --resume.") from stop
        if processes.is_main:
            print(f"{folder} is done: {done.step} steps. Draw from it: cmbook sample {folder}")


@dataclass(frozen=True)
class Doctor:
    """Say what is wrong with a run, the likely cause first; exit with 1 if it is ill.

    For example:  cmbook doctor runs/digits/cd
                  cmbook doctor digits/cd --json

    Nothing is trained or written. What data, teacher or log would tell is left out, and said so,
    where they are not at hand.
    """

    run: tyro.conf.Positional[Path]
    """Folder of a run, or of one of its checkpoints; or a student that comes with cmbook."""
    json: bool = False
    """Print numbers for a program to read."""
    average: float | None = None
    """Decay of the moving average, if the run has several; by default training.average_decay."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""

    def __call__(self) -> None:
        """Do it."""
        import json

        from cmbook import doctor

        loaded = _load(self.run, _device(self.device), self.average)
        found = doctor.examine(loaded, device=_device(self.device))
        print(json.dumps(found.numbers(), indent=1) if self.json else found)
        if not found.healthy:
            raise SystemExit(1)


@dataclass(frozen=True)
class Estimate:
    """Say what a recipe costs before it runs: parameters, FLOPs, memory, hours.

    For example:  cmbook estimate imagenet64/cd --gpus 64
                  cmbook estimate imagenet64/cd-one-gpu training.accumulation=256

    Nothing is trained, and neither data nor teacher need be there.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """A name from `cmbook configs`, or the path of a .toml file."""
    settings: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE ...")
    ] = ()
    """Settings to replace, as key=value."""
    gpus: int = 1
    """How many share every batch."""
    utilization: float = 0.4
    """The share of the peak speed that is reached."""
    json: bool = False
    """Print numbers for a program to read."""

    def __call__(self) -> None:
        """Do it."""
        import json

        from cmbook import costs, experiment

        if not 0 < self.utilization <= 1:
            raise ValueError(f"--utilization is a share of 1, such as 0.4; got {self.utilization}")
        recipe = experiment.loads(experiment.recipe_text(self.recipe), self.settings)
        found = costs.estimate(recipe, gpus=self.gpus)
        hardware = costs.HARDWARE | {"this machine": costs.this_machine()}
        if self.json:
            print(json.dumps(costs.numbers(found, hardware, self.utilization), indent=1))
        else:
            print(costs.report(found, hardware, self.utilization))


@dataclass(frozen=True)
class Sample:
    """Draw samples from a run, as a picture or as numbers.

    For example:  cmbook sample digits/cd
                  cmbook sample runs/digits/cd --n 100 --label 7 --out sevens.png

    An image depends on its seed alone, not on how many are drawn with it.
    """

    run: tyro.conf.Positional[Path]
    """Folder of a run, or of one of its checkpoints; or a student that comes with cmbook."""
    n: int = 100
    """How many."""
    steps: int | None = None
    """Consistency model: evaluations (default 1). Diffusion model: levels of the grid."""
    label: int | None = None
    """The class; by default all classes in turn."""
    guidance: float = 1.0
    """Of a diffusion model that was trained with label_dropout: w, 1 being none."""
    seed: int = 0
    """Of the first sample; the next has seed + 1."""
    average: float | None = None
    """Decay of the moving average, if the run has several; by default training.average_decay."""
    out: Path = Path("samples.png")
    """A .png picture, or .npz with arr_0 (samples) and arr_1 (labels)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""

    def __call__(self) -> None:
        """Do it."""
        import torch
        from tqdm import tqdm

        from cmbook.noise import PerImage

        _check_output(self.n, self.seed, self.out)
        if not math.isfinite(self.guidance):
            raise ValueError(f"--guidance must be a number such as 1.5; got {self.guidance}")
        loaded = _load(self.run, _device(self.device), self.average)
        label = _labels(loaded, self.label, self.n, self.device)
        size = max(1, BATCH // math.prod(loaded.record["shape"]))
        drawn = []
        for first in tqdm(range(0, self.n, size), "drawing", leave=False, disable=size >= self.n):
            some = slice(first, min(first + size, self.n))
            samples = loaded.sample(
                some.stop - first,
                None if label is None else label[some],
                steps=self.steps,
                guidance=self.guidance,
                generator=PerImage(range(self.seed + first, self.seed + some.stop)),
            )
            drawn.append(samples.cpu())
        _save(torch.cat(drawn), None if label is None else label.cpu(), self.out)
        print(f"{self.n} samples: {self.out}")


@dataclass(frozen=True)
class Edit:
    """Edit a picture with a consistency model that was trained for nothing of the kind.

    For example:  cmbook edit runs/digits/cd --task inpaint --image seven.png --mask hole.png
                  cmbook edit runs/digits/cd --task superres --image small.png --n 8 --label 3

    The .png shows what the model was given, then what it made of it; .npz holds the results
    alone, as 8-bit pictures (arr_0) and their labels (arr_1).
    """

    run: tyro.conf.Positional[Path]
    """Folder of a run, or of one of its checkpoints; or a student that comes with cmbook."""
    task: Literal["inpaint", "colorize", "superres", "stroke", "denoise", "interpolate"]
    """What to do; see below what each needs."""
    image: Path | None = None
    """The picture; not for interpolate."""
    mask: Path | None = None
    """For inpaint: white where to fill in."""
    n: int = 9
    """How many results; for interpolate, pictures on the way."""
    label: int | None = None
    """Their class; by default all classes in turn. For interpolate, 0."""
    levels: int | None = None
    """Evaluations: by default the paper's 40, for stroke 2."""
    sigma: float | None = None
    """For denoise: noise to add and remove (0.3). For stroke: where to start (5.38)."""
    factor: int | None = None
    """For superres: make the picture so much smaller first. Leave out if it is small."""
    fit: bool = False
    """Crop and resize pictures of another size than the model's."""
    seed: int = 0
    """Of the first result; the next has seed + 1."""
    out: Path = Path("edited.png")
    """A .png picture or .npz."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""

    def __call__(self) -> None:
        """Do it."""
        import torch

        from cmbook import pictures
        from cmbook.noise import PerImage, seeded

        _check_output(self.n, self.seed, self.out, most=10_000)  # all are edited at once
        loaded = _load(self.run, _device(self.device))
        label = _labels(loaded, self.label, self.n, self.device)
        each = PerImage(range(self.seed, self.seed + self.n))
        edited = pictures.edit_picture(
            loaded,
            self.task,
            self.image,
            self.mask,
            n=self.n,
            label=label,
            levels=self.levels,
            sigma=self.sigma,
            factor=self.factor,
            fit=self.fit,
            generator=seeded(self.seed) if self.task == "interpolate" else each,
        )
        results, shown = edited.results.cpu(), None if label is None else label.cpu()
        if self.out.suffix == ".png" and self.task != "interpolate":
            results = torch.cat([edited.given.cpu(), results])
        _save(results, shown, self.out)
        print(f"{self.task}: {self.out}")


@dataclass(frozen=True)
class Evaluate:
    """Measure a run: how far its samples are from real data, always beside what real data get.

    For example:  cmbook evaluate runs/digits/cd --features pixels
                  cmbook evaluate runs/cifar10/cd --n 50000 --features inception

    Images: Frechet distance (with Inception features: FID, sFID, Inception Score), precision and
    recall, distance to the nearest training image. Points: MMD, energy distance, sliced
    Wasserstein. Writes report.json and samples.npz into the folder --out.
    """

    run: tyro.conf.Positional[Path]
    """Folder of a run, or of one of its checkpoints; or a student that comes with cmbook."""
    n: int = 10_000
    """How many samples. Compare only figures made with the same number."""
    steps: int | None = None
    """Consistency model: evaluations (default 1). Diffusion model: levels of the grid."""
    features: Literal["pixels", "glyphnet", "inception"] = "glyphnet"
    """What sees the images: themselves, the small network of cmbook, or the field's network."""
    inception: Path = Path("inception-2015-12-05.pt")
    """For inception: its TorchScript file."""
    inception_sha256: str | None = None
    """For inception: the hash of another file than the official one. The file is code."""
    reference: Path | None = None
    """An .npz with mu and sigma; by default the training set of the run."""
    comparable_anyway: bool = False
    """Use a reference that was made otherwise, or does not say how."""
    samples: Path | None = None
    """Measure this .npz of samples instead of drawing."""
    seed: int = 0
    """Of the first sample; the next has seed + 1."""
    batch: int = 100
    """Samples per batch; they do not depend on it."""
    rounds: int = 20
    """Of the bootstrap; 0 leaves intervals out."""
    out: Path | None = None
    """Folder for the report; by default RUN/evaluation, of a student of cmbook: evaluation."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""

    def __call__(self) -> None:
        """Do it."""
        from cmbook import reports, runs

        device = _device(self.device)
        extractor = _extractor(self.features, self.inception, self.inception_sha256, device)
        out = self.out or (self.run if self.run.exists() else Path()) / "evaluation"
        evaluation = reports.Evaluation(
            n=self.n,
            steps=self.steps,
            extractor=extractor,
            reference=self.reference,
            comparable_anyway=self.comparable_anyway,
            seed=self.seed,
            batch=self.batch,
            rounds=self.rounds,
        )
        report = evaluation(runs.load(self.run, device), out, self.samples)
        print(f"{reports.table(report)}\n\nThe report: {out / 'report.json'}")


@dataclass(frozen=True)
class Compare:
    """Put two reports of cmbook evaluate side by side, if they were made alike.

    For example:  cmbook compare runs/a/evaluation/report.json runs/b/evaluation/report.json

    Refused if extractor, reference, data or counts differ: then the difference may be theirs.
    """

    first: tyro.conf.Positional[Path]
    """A report.json."""
    second: tyro.conf.Positional[Path]
    """Another."""
    comparable_anyway: bool = False
    """You know better."""

    def __call__(self) -> None:
        """Do it."""
        from cmbook import reports

        print(reports.compare(self.first, self.second, comparable_anyway=self.comparable_anyway))


@dataclass(frozen=True)
class Export:
    """Write the model of a run alone, without what only training needs: to share, or to keep.

    For example:  cmbook export runs/digits/cd models/digits --half

    cmbook sample and cmbook edit read the new folder like a run.
    """

    run: tyro.conf.Positional[Path]
    """Folder of a run, or of one of its checkpoints."""
    folder: tyro.conf.Positional[Path]
    """The new folder."""
    half: bool = False
    """Store weights in half precision, in half the space."""
    average: float | None = None
    """Decay of the moving average, if the run has several; by default training.average_decay."""

    def __call__(self) -> None:
        """Do it."""
        from cmbook import runs

        made = runs.load(self.run, average=self.average)
        runs.export(made, self.folder, half=self.half)
        print(f"the model is in {self.folder}")


@dataclass(frozen=True)
class Official:
    """Fetch an official checkpoint, or list them all.

    For example:  cmbook get cd_imagenet64_lpips
                  cmbook convert weights/cd_imagenet64_lpips.pt models/imagenet64
                  cmbook sample models/imagenet64 --label 207 --n 4 --steps 2

    An interrupted fetch is gone on with.
    """

    name: tyro.conf.Positional[str | None] = None
    """The checkpoint; without a name they are listed."""
    to: Path = Path("weights")
    """The folder that its file goes to."""

    def __call__(self) -> None:
        """Do it."""
        from cmbook.interop import official

        if self.name is None:
            for name, entry in official.OFFICIAL.items():
                print(f"{name:38} {entry.what}")
            return
        file = official.get(self.name, self.to)
        print(f"{file}. Next: cmbook convert {shlex.quote(str(file))} models/{self.name}")


@dataclass(frozen=True)
class Convert:
    """Write a model from elsewhere as a folder that cmbook samples, edits and evaluates like a run.

    For example:  cmbook convert weights/cd_imagenet64_lpips.pt models/imagenet64
                  cmbook convert some/diffusers/folder models/theirs

    Official checkpoints of the paper (.pt, and flax for CIFAR-10), NVIDIA's EDM pickles and
    folders of diffusers are recognized. No code that a file carries is run.
    """

    source: tyro.conf.Positional[str]
    """A file, its URL, or a folder of diffusers."""
    folder: tyro.conf.Positional[Path]
    """The new folder."""
    kind: Literal["diffusion", "consistency"] | None = None
    """What kind of model it is, where neither name nor settings tell."""
    head_channels: int | None = None
    """Of one attention head of an official U-Net, which its weights do not tell; 64 by default."""
    image_size: int | None = None
    """Side of the images, where the coarsest features are not 8x8."""

    def __call__(self) -> None:
        """Do it."""
        from cmbook.interop.convert import convert
        from cmbook.parameterization import ConsistencyScalings, EDMScalings

        kinds = {"diffusion": EDMScalings(), "consistency": ConsistencyScalings(), None: None}
        made = convert(
            self.source,
            self.folder,
            scalings=kinds[self.kind],
            head_channels=self.head_channels,
            image_size=self.image_size,
        )
        kind = type(made.recipe.scalings).__name__.removesuffix("Scalings")
        print(f"read as: {kind}, {made.recipe.network}, {made.record['shape']}")
        print(f"the model is in {self.folder}. Next: cmbook sample {shlex.quote(str(self.folder))}")


@dataclass(frozen=True)
class Get:
    """Fetch a data set that anyone may have: fashion-mnist, mnist, cifar10.

    For example:  cmbook data get fashion-mnist

    An interrupted fetch is gone on with; every file is checked against its published checksum.
    """

    name: tyro.conf.Positional[str]
    """The data set."""
    to: Path = Path("data")
    """Its folder is made in this one."""

    def __call__(self) -> None:
        """Do it."""
        from cmbook.data import fetch

        place = fetch.get(self.name, self.to)
        print(f"{self.name} is in {place}. Look at it: cmbook data check {place}")


@dataclass(frozen=True)
class Check:
    """Look at images before training on them: how many, how large, which classes, what is broken.

    For example:  cmbook data check my/pictures --size 64 --sheet sheet.png
    """

    path: tyro.conf.Positional[str]
    """As data.path in a recipe: a folder, a .zip, an .npz, or hf://NAME."""
    size: int | None = None
    """Look at them at this size."""
    channels: Literal[1, 3] | None = None
    """1: gray, 3: RGB."""
    sheet: Path | None = None
    """Draw some of them into this .png."""

    def __call__(self) -> None:
        """Do it."""
        from cmbook.data import inspect

        if self.sheet is not None:
            _check_output(1, 0, self.sheet)
        checked = inspect.check(self.path, self.size, self.channels)
        print(checked)
        if self.sheet is not None and checked.sheet is None:
            raise ValueError("the pictures differ in size: --sheet needs --size, such as --size 64")
        if self.sheet is not None:
            assert checked.sheet is not None
            _save(checked.sheet, None, self.sheet)
            print(f"  sheet    {self.sheet}")
        if checked.broken:
            raise SystemExit(1)


@dataclass(frozen=True)
class Reference:
    """Write reference statistics of a data set, with where they come from, for cmbook evaluate.

    For example:  cmbook data reference data/imagenet/train in64.npz --size 64 --channels 3
                      --features inception

    They are of every image there, unflipped. Memory does not grow with the set.
    """

    path: tyro.conf.Positional[str]
    """As data.path in a recipe: a folder, a .zip, an .npz, or hf://NAME."""
    out: tyro.conf.Positional[Path]
    """The .npz to write: mu and sigma, as the field's evaluators read them."""
    size: int | None = None
    """Prepare the images at this size, as training does."""
    channels: Literal[1, 3] | None = None
    """1: gray, 3: RGB."""
    features: Literal["pixels", "glyphnet", "inception"] = "inception"
    """What sees the images: themselves, the small network of cmbook, or the field's network."""
    inception: Path = Path("inception-2015-12-05.pt")
    """For inception: its TorchScript file."""
    inception_sha256: str | None = None
    """For inception: the hash of another file than the official one. The file is code."""
    batch: int = 100
    """Images at a time."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""

    def __call__(self) -> None:
        """Do it."""
        from cmbook import references
        from cmbook.data import Images

        if self.out.suffix != ".npz" or self.batch < 1:
            raise ValueError(
                f"expected OUT.npz and a batch of 1 or more; got {self.out}, {self.batch}"
            )
        device = _device(self.device)
        extractor = _extractor(self.features, self.inception, self.inception_sha256, device)
        data = Images(self.path, self.size, self.channels, labelled=False).build()
        batches = data.in_order(self.batch, progress=True)
        statistics = references.Statistics.streamed(
            batches, extractor, data.shape, data=self.path, preprocessing=data.preparation
        )
        references.save_statistics(self.out, statistics)
        print(f"statistics of {len(data):,} images: {self.out}")


@dataclass(frozen=True)
class ExportLsun:
    """Unpack the pictures of an LSUN database into a folder.

    For example:  cmbook data export-lsun bedroom_train_lmdb data/bedroom
    """

    database: tyro.conf.Positional[Path]
    """The folder that holds data.mdb."""
    folder: tyro.conf.Positional[Path]
    """Where to put them."""
    limit: int | None = None
    """So many at most."""

    def __call__(self) -> None:
        """Do it."""
        from cmbook.data import readers

        count = readers.export_lsun(self.database, self.folder, self.limit)
        print(f"{count} pictures are in {self.folder}")


@dataclass(frozen=True)
class Data:
    """Fetch a data set, look at one, write its reference statistics, or unpack LSUN."""

    what: (
        Annotated[Get, tyro.conf.subcommand("get")]
        | Annotated[Check, tyro.conf.subcommand("check")]
        | Annotated[Reference, tyro.conf.subcommand("reference")]
        | Annotated[ExportLsun, tyro.conf.subcommand("export-lsun")]
    )

    def __call__(self) -> None:
        """Do it."""
        self.what()


@dataclass(frozen=True)
class Configs:
    """List the recipes that come with cmbook, or print one."""

    name: tyro.conf.Positional[str | None] = None
    """The recipe to print."""

    def __call__(self) -> None:
        """Do it."""
        from cmbook import experiment

        if self.name is not None:
            print(experiment.recipe_text(self.name), end="")
            return
        for name in experiment.recipes():
            first = experiment.recipe_text(name).splitlines()[0].lstrip("# ")
            print(f"{name:20} {first}")


@dataclass(frozen=True)
class Notebooks:
    """Copy the book into a folder: its notebooks, and the small models that they need.

    For example:  cmbook notebooks book && jupyter lab book
    """

    folder: tyro.conf.Positional[Path]
    """Where to; made if missing."""
    overwrite: bool = False
    """Replace notebooks that are already there, and what you have changed in them."""

    def __call__(self) -> None:
        """Do it."""
        from cmbook.disk import replacing

        book = _book()
        paths = sorted([*book.glob("*.ipynb"), *(book / "weights").rglob("*.*")])
        copies = {path: self.folder / path.relative_to(book) for path in paths}
        there = [copy for copy in copies.values() if copy.exists()]
        if there and not self.overwrite:
            raise ValueError(
                f"{there[0]} is already there; --overwrite replaces it, or name another folder"
            )
        for path, copy in copies.items():
            with replacing(copy) as file:
                file.write(path.read_bytes())
        if find_spec("jupyterlab") is None:
            print("pip install 'cmbook[notebooks]'")
        print(f"jupyter lab {shlex.quote(str(self.folder))}")


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Estimate, tyro.conf.subcommand("estimate")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Edit, tyro.conf.subcommand("edit")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Official, tyro.conf.subcommand("get")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Configs, tyro.conf.subcommand("configs")]
    | Annotated[Notebooks, tyro.conf.subcommand("notebooks")]
)


def main(arguments: list[str] | None = None) -> None:
    """Consistency models, to learn, to check, to train and to extend."""
    if isinstance(sys.stdout, TextIOWrapper):  # names of files may hold what a terminal cannot say
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            command = tyro.cli(
                Command,
                prog="cmbook",
                description=main.__doc__,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
            )
            command()
        finally:
            _flush()
        return
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        return
    except OSError as error:
        why = error.strerror or str(error)
        said, code = f"{why}: {error.filename}" if error.filename else why, 1
    except ValueError as error:
        said, code = str(error), 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(BEYOND_MEMORY, str(error), re.I):
            raise
        said = "not enough memory; ask for a smaller batch or network, fewer levels or samples"
        code = 1
    except KeyboardInterrupt as stop:
        said, code = str(stop) or "stopped", 130
    _stop(said, code)  # only here, when the error has let go of its bars, which clear their lines


def _flush() -> None:
    """Write out what was printed, here where an error can still be told; then only once."""
    if sys.stdout is None:  # closed by who started us
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _stop(message: str, code: int = 1) -> NoReturn:
    """End with one sentence on one line, of what a terminal can show, and not without end."""
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} [...] {line[-LONGEST // 2 :]}"
    print(f"\ncmbook: {line}" if code == 130 else f"cmbook: {line}", file=sys.stderr)
    sys.exit(code)


def _load(folder: Path, device: str, average: float | None = None) -> "Run":
    """A run; or a student that comes with cmbook, in case the user meant a run of their own."""
    from cmbook import runs

    loaded = runs.load(folder, device, average=average)
    own = Path("runs") / folder
    if not folder.exists() and own.exists():
        print(f"{folder} is the student that comes with cmbook; your run is {own}", file=sys.stderr)
    return loaded


def _book() -> Path:
    """The notebooks: inside an installed package, beside the package in a clone."""
    package = Path(__file__).parent
    inside = package / "book"
    return inside if inside.is_dir() else package.parent / "notebooks"


def _check_output(n: int, seed: int, out: Path, most: int = MOST) -> None:
    """Refuse what could not be saved, before anything is computed."""
    if n < 1:
        raise ValueError(f"--n must be at least 1; got {n}")
    if n > most:
        raise ValueError(f"--n must be at most {most:,}; got {n}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must lie in 0 ... {2**32 - 1}; got {seed}")
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz; got {out}")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; --out names a file")


def _labels(loaded: "Run", wanted: int | None, n: int, device: str) -> "Tensor | None":
    """The class of each sample: the one that is wanted, or all in turn."""
    import torch

    classes = loaded.record["classes"]
    if not classes:
        if wanted is not None:
            raise ValueError(f"{loaded.folder} has no classes; leave out --label")
        return None
    if wanted is not None and not 0 <= wanted < classes:
        raise ValueError(f"--label must lie in 0 ... {classes - 1}; got {wanted}")
    label = torch.arange(n) % classes if wanted is None else torch.full((n,), wanted)
    return label.to(_device(device))


def _extractor(features: str, inception: Path, sha256: str | None, device: str) -> "Extractor":
    from cmbook.features import INCEPTION_SHA256, GlyphNet, Inception, Pixels

    if features == "inception":
        return Inception(inception, sha256 or INCEPTION_SHA256, device)
    return GlyphNet(device) if features == "glyphnet" else Pixels()


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here: {str(error).split('. ')[0]}") from error
    return name


def _save(samples: "Tensor", label: "Tensor | None", out: Path) -> None:
    """Write samples as a picture or as numbers; an older file is replaced only by a whole one."""
    from cmbook import plotting, references

    if not bool(samples.isfinite().all()):
        raise ValueError("the samples hold NaN or infinity; nothing was written")
    if out.suffix == ".npz":
        return references.save_samples(out, samples, label)
    with plotting.book_style():
        plotting.save(plotting.sheet(samples), out)


if __name__ == "__main__":
    main()
