"""TensorBoard: the log of a run as curves, and its samples as pictures. Optional."""

from pathlib import Path
from types import TracebackType
from typing import Any

from cmbook.protocols import Samples


class Board:
    """Event files that `tensorboard --logdir FOLDER` shows.

    Args:
        folder: Where they are written; made if missing.
        step: Steps already taken. What an interrupted run has shown after them is hidden.

    Raises:
        ValueError: If TensorBoard is not installed, with the command that installs it.

    Source: ours.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.writer = summary_writer()(str(folder), purge_step=step + 1)

    def __enter__(self) -> "Board":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.writer.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One point of every curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, step: int, images: Samples) -> None:
        """A grid of images in [-1, 1]."""
        self.writer.add_images("samples", ((images + 1) / 2).clamp(0, 1), step)


def summary_writer() -> Any:
    """The writer of TensorBoard's event files.

    Raises:
        ValueError: If TensorBoard is not installed, with the command that installs it.

    Source: ours.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "TensorBoard is not installed: pip install 'cmbook[tensorboard]', or leave out "
            "--tensorboard; log.csv holds the same numbers"
        ) from error
    return SummaryWriter
