"""Several processes that train one model: on GPUs with NCCL, on CPUs with gloo.

    torchrun --nproc-per-node 8 -m cmbook train imagenet64/cd

Every process holds the whole model and takes its part of every batch; after backward the gradients
are added up, so all take the same step. Nothing is wrapped around the model: forward-mode
derivatives do not pass through `DistributedDataParallel`, and taken of the model inside it they
would skip its sum, without an error.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun
PATIENCE = timedelta(days=1)  # while the main process reads or saves; the end of one shows at once


class Abandoned(ConnectionError):
    """Another process has stopped, and this one cannot go on without it."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; by default it is alone.

    Every method but `is_main` is a meeting: all processes must call it, or the others wait. Alone,
    nothing happens and nothing is copied.

    Attributes:
        rank: Number of this process; 0 is the main one, which alone writes.
        count: How many there are.
        device: The device that belongs to it; `None` alone, where any may be used.
        words: The group on which they talk of things other than tensors of the model.

    Source: ours; the sum of gradients is that of Goyal et al. (2017), §3.
    """

    rank: int = 0
    count: int = 1
    device: str | None = None
    words: Any = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def shards(self, each: int) -> range:
        """The numbers of the shards that are this process's, `each` to a process."""
        return range(self.rank * each, (self.rank + 1) * each)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in one message."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self._meeting():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all processes in one tensor, in their order."""
        if self.count == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.count)]
        with self._meeting():
            dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @torch.no_grad()
    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by those of the main process."""
        if self.count > 1:
            with self._meeting():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def any(self, yes: bool) -> bool:
        """Whether any process says yes."""
        if self.count == 1:
            return yes
        said = torch.tensor(int(yes))
        with self._meeting():
            dist.all_reduce(said, dist.ReduceOp.MAX, self.words)
        return bool(said)

    def on_main(self, do: Callable[[], T]) -> T:
        """What the main process gets when it does something that the others must not do.

        Raises:
            Abandoned: On the others, if it failed; the main process raises the error itself.
        """
        if self.count == 1:
            return do()
        said: list[Any] = [None, False]
        try:
            if self.is_main:
                said = [do(), True]
        finally:
            with self._meeting():
                dist.broadcast_object_list(said, 0, self.words)
        if not said[1]:
            raise Abandoned(f"process {self.rank} of {self.count} stops with the main process")
        done: T = said[0]
        return done

    def check_equal(self, tensors: Iterable[Tensor]) -> None:
        """Refuse to go on if one process holds other bits than the main one.

        Raises:
            ValueError: Naming the process.
        """
        if self.count == 1:
            return
        sums = [t.detach().flatten().view(torch.uint8).sum(dtype=torch.int64) for t in tensors]
        mine = torch.stack(sums).cpu()
        each = [torch.empty_like(mine) for _ in range(self.count)]
        with self._meeting():
            dist.all_gather(each, mine, self.words)
        wrong = [rank for rank, theirs in enumerate(each) if not torch.equal(theirs, each[0])]
        if wrong:
            raise ValueError(
                f"processes {wrong} no longer hold the weights of process 0: they run on other "
                "hardware or versions, or the network has buffers that learn, such as BatchNorm's"
            )

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise Abandoned(
                f"process {self.rank} of {self.count} stops, for it has lost another: "
                f"{str(error).splitlines()[0]}"
            ) from error


ALONE = Processes()


@contextmanager
def together(device: str = "auto") -> Iterator[Processes]:
    """Meet the processes that torchrun has started with this one, on one machine or several.

    Without torchrun, or something else that sets its variables, this process is alone.

    Args:
        device: `"cpu"` or `"cuda"`; `"auto"` takes GPUs if there are any. Each process gets the
            GPU that is numbered as it is on its machine.

    Yields:
        This process among them.

    Raises:
        ValueError: If a variable is missing, another device is asked for, or there are more
            processes on this machine than GPUs.

    Source: ours, through Accelerate.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    on_gpu = _on_gpu(device)
    from accelerate import PartialState

    atexit.unregister(_leave)
    state: Any = PartialState(cpu=not on_gpu, backend="nccl" if on_gpu else "gloo")
    words = dist.new_group(backend="gloo", timeout=PATIENCE)
    mine = str(state.device) if on_gpu else "cpu"
    yield Processes(state.process_index, state.num_processes, mine, words)
    atexit.register(_leave)  # once: a second meeting in this program has the same connections


def _leave() -> None:
    """Say goodbye, at the end of a program; not after an error, when others may not come."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _on_gpu(device: str) -> bool:
    """Whether these processes compute on GPUs; refuses what cannot be."""
    missing = [name for name in TOLD if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']} says that there are several processes, but "
            f"{', '.join(missing)} is not set; start them with torchrun, or unset WORLD_SIZE"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"each of several processes takes the GPU of its own number; got {device!r}, expected "
            "auto, cpu or cuda"
        )
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return False
    here, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if here >= gpus:
        raise ValueError(
            f"process {here} of this machine has no GPU, for there are {gpus}; start fewer "
            "processes, or say --device cpu"
        )
    return True
