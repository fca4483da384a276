"""Train, kill at a random moment, resume, and again: what test_survival.py starts as a program.

    python tests/killed.py FOLDER STEPS KILLS PROCESSES

It imports everything and computes nothing, so what it forks is a fresh process in no time. Saving
takes most of the time of this run, so many of the kills are in the middle of a save.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pair import recipe

from cmbook import run
from cmbook.checkpoints import checkpoints
from cmbook.processes import together
from cmbook.training import RAdam

SAVES = 3  # that a life may see


def begin(folder: Path, steps: int, rank: int, count: int, port: int) -> int:
    """Fork a process that starts the run, or goes on with it; its number."""
    child = os.fork()
    if child:
        return child
    try:
        if count > 1:
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in told.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        ring = recipe(steps=steps, save_every=2, optimizer=RAdam())
        resume = (folder / "experiment.toml").is_file()
        with together("cpu") as processes:
            run(ring, folder, resume=resume, progress=False, processes=processes)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def main(folder: Path, steps: int, kills: int, count: int) -> None:
    """Kill; then let the run end, and say how often a save was hit."""
    chance, in_saves, early, pace = random.Random(kills + count), 0, 0, 0.05
    for k in range(kills + 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [begin(folder, steps, rank, count, port) for rank in range(count)]
        if k == kills:
            if any(os.waitpid(child, 0)[1] for child in children):
                sys.exit("the last process failed")
            break
        saves = chance.randrange(-1, SAVES + 1)
        if saves < 0:
            early += 1  # while they start
        else:
            pace = live(folder, children, saves) or pace
        time.sleep(chance.uniform(0, pace))
        chance.shuffle(children)
        for child in children:  # not all at once, and not always the main one first
            os.kill(child, signal.SIGKILL)
            time.sleep(chance.uniform(0, 0.02))
        ends = [os.waitpid(child, 0)[1] for child in children]
        left = {signal.SIGKILL, 1 << 8}  # who is left stops by itself if it notices in time
        if ends[0] != signal.SIGKILL or not left >= set(ends[1:]):
            sys.exit(f"a process ended or failed by itself before kill {k + 1}")
        in_saves += any((folder / "checkpoints").glob(".unfinished-*"))
    print(json.dumps({"kills": kills, "in a save": in_saves, "while starting": early}))


def live(folder: Path, children: list[int], saves: int) -> float:
    """Wait until one has the folder to itself and has saved so often; the seconds of a save."""
    wait(lambda: owner(folder) in children)
    before, began = newest(folder), time.monotonic()
    wait(lambda: newest(folder) >= before + 2 * saves)
    return (time.monotonic() - began) / saves if saves else 0.0


def wait(until: Callable[[], bool]) -> None:
    """Wait for something, for a minute at most."""
    began = time.monotonic()
    while not until() and time.monotonic() - began < 60:
        time.sleep(0.002)


def owner(folder: Path) -> int:
    """The process that last had the folder to itself."""
    lock = folder / ".lock"
    words = lock.read_text().split() if lock.is_file() else []
    return int(words[1]) if words else -1


def newest(folder: Path) -> int:
    """The step of the last checkpoint."""
    found = checkpoints(folder / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(number) for number in sys.argv[2:]))
