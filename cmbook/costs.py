"""Costs: what a run takes of memory, arithmetic and time, before it begins.

The recipe's own objective takes one step with networks that have shapes and no numbers, on
PyTorch's meta device. A ledger writes down every product and every allocation. So whatever an
objective does is counted as it is done: the teacher's evaluations, two of them under guidance,
forward-mode derivatives, the trunk of LPIPS.
"""

import math
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from cmbook import experiment
from cmbook.data import Images
from cmbook.experiment import Experiment
from cmbook.guidance import guided
from cmbook.interop.foreign import skeleton
from cmbook.losses import ProgressiveDistillation
from cmbook.networks import Network
from cmbook.parameterization import EDMScalings, Preconditioned
from cmbook.perceptual import LPIPS
from cmbook.protocols import Batch, Clock, Denoiser, Models
from cmbook.training import Precision, RAdam, distilled, frozen_copy, frozen_view

META = torch.device("meta")
UTILIZATION = 0.4
FETCHED = {"fashion-mnist": ((1, 28, 28), 10)}  # by `cmbook data get`: shape, classes


@dataclass(frozen=True)
class Hardware:
    """An accelerator, by its data sheet: dense products, without sparsity.

    Attributes:
        gigabytes: Of memory.
        float32: Tera-operations a second in float32, without TF32.
        bfloat16: The same in bfloat16, summed in float32.

    Source: the makers' data sheets.
    """

    gigabytes: float
    float32: float
    bfloat16: float

    def peak(self, precision: Precision) -> float:
        """Operations a second."""
        return 1e12 * float(getattr(self, precision))


HARDWARE = {
    "A100": Hardware(80, 19.5, 312),
    "H100": Hardware(80, 67, 989),
    "H200": Hardware(141, 67, 989),
    "L40S": Hardware(48, 91.6, 362),
    "RTX 4090": Hardware(24, 82.6, 165),
    "RTX 3090": Hardware(24, 35.6, 71),
    "L4": Hardware(24, 30.3, 121),
}


@dataclass(frozen=True)
class Estimate:
    """What a recipe costs. Sizes are in bytes; one multiplication with its addition is 2 FLOPs.

    Attributes:
        shape: Of a sample.
        classes: How many; 0 for none.
        parameters: Of one network.
        steps: Of the whole run, all rounds together.
        batch_size: Of a step.
        gpus: That share a batch.
        shard: Samples that one of them holds at a time.
        precision: That the recipe asks for.
        flops_forward: Of one sample through the network.
        flops_step: Of one sample in a training step, teacher, target and distance included.
        flops_by: The same by the precision of the products. LPIPS and forward-mode derivatives
            stay in float32 whatever the recipe's precision is.
        memory: Of one GPU, by part.
        per_image: What one sample more in the shard adds.
        checkpoint: On disk.

    Source: ours.
    """

    shape: tuple[int, ...]
    classes: int
    parameters: int
    steps: int
    batch_size: int
    gpus: int
    shard: int
    precision: Precision
    flops_forward: int
    flops_step: int
    flops_by: dict[Precision, int]
    memory: dict[str, int]
    per_image: int
    checkpoint: int

    @property
    def peak(self) -> int:
        """Of all parts together."""
        return sum(self.memory.values())

    def hours(self, hardware: Hardware, utilization: float = UTILIZATION) -> float:
        """Of the whole run, if that share of the data sheet's speed is reached."""
        seconds = self.batch_size * self.steps * self.flops_step / self.speed(hardware)
        return seconds / (utilization * self.gpus) / 3600

    def speed(self, hardware: Hardware) -> float:
        """Operations a second at the data sheet's speeds, each precision at its own."""
        seconds = sum(flops / hardware.peak(each) for each, flops in self.flops_by.items())
        return self.flops_step / seconds if seconds else hardware.peak(self.precision)

    def largest_shard(self, hardware: Hardware) -> int:
        """Samples that fit beside the weights, a tenth of the memory left free; 0 if none does."""
        room = 0.9e9 * hardware.gigabytes - (self.peak - self.per_image * self.shard)
        return max(0, int(room // self.per_image))


def estimate(
    recipe: Experiment,
    *,
    gpus: int = 1,
    shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    on_gpu: bool = True,
) -> Estimate:
    """What a recipe costs on so many GPUs.

    Memory is that of PyTorch's tensors. What a driver, the libraries of the convolutions and
    fragments take comes on top: on a GPU commonly some hundred megabytes.

    Args:
        recipe: What to do.
        gpus: That share every batch.
        shape: Of a sample; by default what the recipe says, or else what its data has.
        classes: How many; by default what the recipe says, or else what its data has.
        on_gpu: Whether the optimizer takes all weights at once, which needs memory of its own.

    Raises:
        ValueError: If the recipe leaves shape or classes to data that is not there, names neither
            network nor a teacher that says which, there is no GPU, or a batch cannot be shared
            evenly.

    Source: ours.
    """
    knobs = recipe.training
    parts = gpus * knobs.accumulation
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1; got {gpus}")
    if knobs.batch_size % parts:
        raise ValueError(
            f"a batch of {knobs.batch_size} cannot be cut into {gpus} GPUs times accumulation "
            f"{knobs.accumulation} equal shards"
        )
    if shape is None or classes is None:
        shape, classes = of_data(recipe)
    shard = knobs.batch_size // parts
    net = skeleton(_network(recipe), shape, classes or None).to(META)
    models = _models(recipe, net)
    student = models.student
    assert isinstance(student, Preconditioned)
    weights = _bytes(student)
    theirs = weights // 2 if knobs.teacher_precision == "bfloat16" else weights
    step = _Traced(recipe, models, shape, classes)
    one, more = step.peak(1), step.peak(max(2, shard))
    per_image = max(1, (more - one) // (max(2, shard) - 1))
    held = one if shard == 1 else more
    whole = weights if gpus > 1 or (on_gpu and isinstance(knobs.optimizer, RAdam)) else 0
    memory = {
        "student": weights,
        "teacher": theirs if recipe.objective.needs_teacher else 0,
        "target": weights if isinstance(models.target, nn.Module) else 0,
        "averages": weights * (1 + len(knobs.also_average)),
        "optimizer": 2 * weights,  # two moments: of Adam as of RAdam
        "distance": _bytes_of(getattr(recipe.objective, "distance", None)),
        "gradients, activations, workspace": max(held, weights + whole),
    }
    resting = sum(memory[part] for part in ("student", "target", "averages", "optimizer"))
    rounds = 1
    if isinstance(recipe.objective, ProgressiveDistillation):
        rounds = len(recipe.objective.rounds)
    return Estimate(
        shape,
        classes,
        sum(p.numel() for p in student.parameters()),
        knobs.steps * rounds,
        knobs.batch_size,
        gpus,
        shard,
        knobs.precision,
        step.flops_forward,
        sum(step.flops.values()),
        step.flops,
        memory,
        per_image,
        resting,
    )


def this_machine() -> Hardware:
    """What is here: the first GPU, or the processor, by its memory and large products.

    Source: ours.
    """
    found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if found.type == "cuda":
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9
    else:
        gigabytes = _memory() / 1e9
    speeds = [_speed(found, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return Hardware(round(gigabytes, 1), *(float(f"{speed / 1e12:.3g}") for speed in speeds))


def report(found: Estimate, hardware: dict[str, Hardware], utilization: float) -> str:
    """The estimate as a page of text.

    Source: ours.
    """
    shares = (
        f"{each} {flops / found.flops_step:.0%}" for each, flops in found.flops_by.items() if flops
    )
    size = "x".join(str(side) for side in found.shape)
    lines = [
        f"samples      {size}, {found.classes or 'no'} classes",
        f"network      {found.parameters:,} parameters, {_flops(found.flops_forward)} a sample",
        f"step         {_flops(found.flops_step)} a sample: "
        f"{found.flops_step / found.flops_forward:.1f} times the network's",
        f"run          {found.steps:,} steps of {found.batch_size:,}: "
        f"{_flops(found.flops_step * found.batch_size * found.steps)}",
        f"products     in {', in '.join(shares)}",
        f"checkpoint   {_size(found.checkpoint)} on disk, of which two are kept",
        "",
        f"memory of one GPU of {found.gpus}, a shard of {found.shard:,} at a time",
        *(f"  {_size(bytes_):>9}  {part}" for part, bytes_ in found.memory.items() if bytes_),
        f"  {_size(found.peak):>9}  together; one sample more in the shard: "
        f"{_size(found.per_image)}",
        "",
        f"the whole run, if {utilization:.0%} of the peak speed is reached",
        f"  {'':12} {'GB':>6} {'TFLOP/s':>8} {'hours':>9} {'largest shard':>14}",
    ]
    for title, each in hardware.items():
        speed, hours = found.speed(each) / 1e12, found.hours(each, utilization)
        largest = found.largest_shard(each)
        lines.append(
            f"  {title:12} {each.gigabytes:>6g} {speed:>8.3g} {_rounded(hours):>9} "
            f"{f'{largest:,}' if largest else 'none fits':>14}"
            f"{'' if found.shard <= largest else f'  {found.shard:,} do not fit'}"
        )
    return "\n".join(lines)


def numbers(found: Estimate, hardware: dict[str, Hardware], utilization: float) -> dict[str, Any]:
    """The same for a program to read; sizes in bytes.

    Source: ours.
    """
    rows = {
        title: {
            "fits": found.shard <= found.largest_shard(each),
            "gigabytes": each.gigabytes,
            "flops_per_second": found.speed(each),
            "flops_per_second_by": {kind: each.peak(kind) for kind in found.flops_by},
            "hours": found.hours(each, utilization),
            "largest_shard": found.largest_shard(each),
        }
        for title, each in hardware.items()
    }
    return asdict(found) | {"peak": found.peak, "utilization": utilization, "hardware": rows}


class Ledger(TorchDispatchMode):
    """Counts the FLOPs of what happens inside it, and the bytes that tensors of `META` hold.

    Attributes:
        flops: Of all products and convolutions.
        flops_by: The same by the precision of what is multiplied.
        now: Bytes that are held.
        peak: The most that was.

    Source: ours.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.flops_by: dict[Precision, int] = {"float32": 0, "bfloat16": 0}
        self._held: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            first = next(tensor for tensor in tree_leaves(args) if isinstance(tensor, Tensor))
            kind: Precision = "bfloat16" if first.dtype == torch.bfloat16 else "float32"
            self.flops_by[kind] += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._hold(tensor.untyped_storage())
        return out

    @property
    def flops(self) -> int:
        """Of all precisions together."""
        return sum(self.flops_by.values())

    def _hold(self, storage: Any) -> None:
        key = id(storage)  # PyTorch gives a storage one Python object as long as it lives
        if key not in self._held:
            self._held[key] = storage.nbytes()
            self.now += self._held[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._held.pop(key)


FORMULAS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, out_val=None, **__: sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, out_val=None, **__: sdpa_backward_flop_count(
            grad.shape, q.shape, k.shape, v.shape
        )
    ),
}
ROUNDED = (F.conv2d, F.linear, F.scaled_dot_product_attention)


class _AsOnDevices(TorchFunctionMode):
    """The two things that the meta device does otherwise: autocast, and attention in one kernel.

    What autocast is asked for is told by the processor's, which nothing here runs on.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in ROUNDED and torch.is_autocast_enabled("cpu"):
            args = tree_map_only(Tensor, lambda t: t.bfloat16(), args)
        if func is F.scaled_dot_product_attention and torch.backends.cuda.flash_sdp_enabled():
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return func(*args, **(kwargs or {}))


class _Nothing:
    """A generator whose draws have shapes and no numbers."""

    device = META

    def normal(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device=META)

    def uniform(self, n: int) -> Tensor:
        return torch.empty(n, device=META)

    def integers(self, n: int, high: int) -> Tensor:
        return torch.zeros(n, dtype=torch.int64)


class _Traced:
    """Steps of a recipe without numbers."""

    def __init__(
        self, recipe: Experiment, models: Models, shape: tuple[int, ...], classes: int
    ) -> None:
        self.recipe, self.models = recipe, models
        self.shape, self.classes = shape, classes
        with self._ledger() as ledger, torch.no_grad():
            batch = self._batch(1)
            models.student(batch.x, torch.ones(1, device=META), batch.label)
        self.flops_forward, self.flops = ledger.flops, ledger.flops_by

    def peak(self, shard: int) -> int:
        """The most that a shard's loss and its gradient hold beside the weights."""
        knobs, batch, student = self.recipe.training, self._batch(shard), self.models.student
        assert isinstance(student, nn.Module)
        student.zero_grad()
        with self._ledger() as ledger:
            if knobs.accumulation > 1:  # from the second shard on, the gradients are there already
                for weight in student.parameters():
                    weight.grad = torch.empty_like(weight)
            with torch.autocast("cpu", torch.bfloat16, enabled=knobs.precision == "bfloat16"):
                loss = self.recipe.objective(
                    self.models, batch, clock=Clock(0, knobs.steps), generator=_Nothing()
                )
            loss.value.backward()
        self.flops = {kind: flops // shard for kind, flops in ledger.flops_by.items()}
        return ledger.peak

    def _batch(self, n: int) -> Batch:
        label = torch.zeros(n, dtype=torch.int64, device=META) if self.classes else None
        return Batch(torch.zeros(n, *self.shape, device=META), label)

    @contextmanager
    def _ledger(self) -> Iterator[Ledger]:
        with Ledger() as ledger, _AsOnDevices():
            yield ledger


def _models(recipe: Experiment, net: nn.Module) -> Models:
    """Student, target and teacher, as a run has them."""
    dressed = Preconditioned(net, EDMScalings(recipe.noise_range)).eval().requires_grad_(False)
    student = distilled(dressed, recipe.scalings).train()
    follows = recipe.objective.target_decay(Clock(0, recipe.training.steps)) > 0
    target: Denoiser = frozen_copy(student) if follows else frozen_view(student)
    if not recipe.objective.needs_teacher:
        return Models(student, target)
    if recipe.training.teacher_precision == "bfloat16":
        dressed.net.bfloat16()
    teacher: Denoiser = dressed
    if recipe.guidance != 1:
        teacher = guided(dressed, recipe.guidance)
    return Models(student, target, teacher)


def _network(recipe: Experiment) -> Network:
    """The recipe's network; where it names none, its teacher's."""
    if recipe.network is not None:
        return recipe.network
    folder = Path(str(recipe.teacher))
    written, name = folder / "experiment.toml", "/".join(folder.parts[-2:])
    if written.is_file():
        network = experiment.loads(written.read_text(encoding="utf-8")).network
    elif name in experiment.recipes():
        network = experiment.loads(experiment.recipe_text(name)).network
    else:
        raise ValueError(
            f"the recipe has no [network] and its teacher {folder} is not there to say which"
        )
    assert network is not None
    return network


def of_data(recipe: Experiment) -> tuple[tuple[int, ...], int]:
    """Shape and classes of samples: what the recipe states, or else what its data has.

    Raises:
        ValueError: If the recipe leaves them to data that is not there.

    Source: ours.
    """
    data = recipe.data
    if isinstance(data, Images) and data.size and data.channels:
        stated = data.classes if data.labelled is not False else 0
        if stated is not None:
            return (data.channels, data.size, data.size), stated
    try:
        built = data.build()
    except ValueError as error:
        for name, known in FETCHED.items():
            if data == Images(f"data/{name}"):
                return known
        raise ValueError(
            f"{error}. Without the images, say what they are: data.size=64 data.channels=3, and "
            "data.classes=1000 or data.labelled=false"
        ) from error
    return tuple(built.shape), built.classes or 0


def _bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def _bytes_of(distance: object) -> int:
    """Of the trunk of LPIPS; other distances have no weights."""
    return _bytes(distance.prepare(META)) if isinstance(distance, LPIPS) else 0


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large product, the best of several."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        begin = perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        best = min(best, perf_counter() - begin)
    return 2 * n**3 / best


def _rounded(hours: float) -> str:
    """Three digits that count."""
    if hours >= 100:
        return f"{hours:,.0f}"
    return f"{hours:.3g}" if hours >= 0.01 else "< 0.01"


def _flops(count: float) -> str:
    """With the prefix that fits."""
    return f"{_scaled(count)}FLOP"


def _size(count: float) -> str:
    return f"{_scaled(count)}B"


def _scaled(count: float) -> str:
    power = min(7, max(0, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z')[power]}"
