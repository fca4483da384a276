"""The disk: a file is whole or not there, and a folder has one writer at a time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

LOCK = ".lock"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that is whole or not there: an older one is replaced when all is on disk.

    Args:
        path: Its folder is made if missing.

    Yields:
        Where to write.

    Source: ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        flush(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


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
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # another user's, or on a disk that cannot be written: it locks all the same
        if not (folder / LOCK).exists():
            raise
        handle = os.open(folder / LOCK, os.O_RDONLY)
    try:
        if not _lock(handle):
            other = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            raise ValueError(
                f"{other} is at work in {folder}; wait until it ends, stop it, or choose another "
                "folder"
            )
        with suppress(OSError):  # a full disk: then nobody reads whose it is
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
