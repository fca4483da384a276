"""The disk: a file is whole or not there, and a folder has one writer at a time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file under another name, which becomes `path` once every byte is on disk.

    Whatever stops the writing, what lay at `path` is still there, and nothing else stays.

    Args:
        path: What is to be written, or replaced; its folder is made if missing.

    Yields:
        Where to write.

    Source: ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        yield unfinished
        flush(unfinished)
        unfinished.replace(path)
        flush(path.parent)
    except BaseException:  # also Ctrl-C
        unfinished.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk.

    Source: ours.
    """
    if os.name == "nt":  # there, what is open for reading cannot be flushed
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Be the only one that writes into a folder, until the end or the death of this process.

    The system holds the lock, not the file: what a kill leaves behind locks nobody out.

    Args:
        folder: Must exist.

    Raises:
        ValueError: If another process is at work there.

    Source: ours.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _lock(handle):
            other = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            raise ValueError(
                f"{other} is at work in {folder}; wait until it ends, stop it, or choose another "
                "folder"
            )
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} of {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Whether the lock is ours; also where the file system knows no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
