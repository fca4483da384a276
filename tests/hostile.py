"""Hostile input: mutations of good files, each a function of its seed, and guards against excess."""

import random
import resource
import signal
import string
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tomli_w

SECONDS = 20  # that one file may take; what hangs, takes longer
ROOM = 2 << 30  # bytes of address space that one file may take

NUMBERS: list[Any] = [
    *[0, 1, -1, 2, 3, 7, 255, 1000, 10**6, 2**31, 2**32, 2**53, 10**9, 10**18, 2**63 - 1, 2**63],
    *[-(2**63), 10**40, 0.0, -0.0, 0.5, 0.99, -1.5, 1e-320, 1e-30, 1e-6, 1e6, 1e30, 1e308, -1e308],
    *[float("nan"), float("inf"), -float("inf")],
]
ODD: list[Any] = [
    *[*NUMBERS, True, False, "", " ", "a", "\n", "\0", "\x1b[31m", "é数字🙂"],
    *["..", "/", "/dev/zero", "~nobody/x", "x" * 5000, "{0}", "%s", [], [[]], [0], [1, "a"], {}],
    *[{"kind": "MLP"}, {"kind": ""}, {"": 1}, {"a": {"b": {"c": 1}}}, ["x"] * 50, [1e308, 1.0]],
]
WORDS = [  # what stands in recipes, so that some mutations mean something
    *["kind", "data", "network", "objective", "scalings", "training", "sampling", "noise_range"],
    *["teacher", "seed", "base", "guidance", "steps", "levels", "MLP", "UNet", "Toy", "Digits"],
    *["width", "depth", "channels", "blocks", "size", "classes", "labelled", "sigmas", "LPIPS"],
]
TEXTS = [  # pieces of TOML and of what is none
    *["\0", "\ufeff", "\r\n", "\r", "\x7f", "é", "数", "🙂", "\u202e", '"', "'", '"""', "'''", "="],
    *["[", "[[", "]]", "{", "}", "#", ".", ",", "[a]", "[[a]]", "a.b.c = 1", "= 1", "inf", "0x"],
    *["1979-05-27T07:32:00Z", "\\u0000", "'\\'", "_", "1__0", "+", "nan", "key = 1\nkey = 2"],
]


def recipe(text: str, draw: random.Random) -> bytes:
    """A recipe that somebody has edited badly, or a disk has."""
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        change = draw.choice([_settings, _settings, _settings, _settings, _lines, _pieces])
        text = change(text, draw)
    text = _monster(text, draw) if draw.random() < 0.1 else text
    raw = text.encode("utf-8", "surrogatepass")
    return flipped(raw, draw) if draw.random() < 0.15 else raw


def flipped(raw: bytes, draw: random.Random) -> bytes:
    """With a few bytes changed, cut out or put in."""
    found = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        at = draw.randrange(len(found) + 1)
        how = draw.randrange(4)
        if how == 0 and found:
            found[at % len(found)] ^= 1 << draw.randrange(8)
        elif how == 1 and found:
            found[at % len(found)] = draw.choice([0, 0xFF, 0x80, draw.randrange(256)])
        elif how == 2:
            del found[at : at + draw.choice([1, 4, 100])]
        else:
            found[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice([1, 4, 8])))
    return bytes(found)


def cut(raw: bytes, draw: random.Random) -> bytes:
    """Cut short, often near an end."""
    n = len(raw)
    return raw[: draw.choice([0, 1, 4, 8, 16, n // 2, max(0, n - 1), draw.randrange(n + 1)])]


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """Flipped or cut."""
    return draw.choice([flipped, flipped, cut])(raw, draw)


def _settings(text: str, draw: random.Random) -> str:
    """Another value, name or place of one setting."""
    try:
        tables = tomllib.loads(text)
    except ValueError:
        return _pieces(text, draw)
    leaves = list(_leaves(tables))
    if not leaves:
        return text
    holder, key = draw.choice(leaves)
    how, number = draw.randrange(8), isinstance(holder[key], int | float)
    if how < 5:
        holder[key] = draw.choice(NUMBERS if number and draw.random() < 0.7 else ODD)
    elif how == 5 and isinstance(holder, dict):
        holder[draw.choice([*WORDS, str(key) + "x", "", "a\nb", "k" * 10_000])] = holder.pop(key)
    elif how == 6 and isinstance(holder, dict):
        del holder[key]
    elif isinstance(holder, dict):
        holder[draw.choice(WORDS)] = draw.choice([*ODD, holder[key]])
    else:
        holder.append(draw.choice(ODD))
    return tomli_w.dumps(tables)


def _leaves(table: Any) -> Iterator[tuple[Any, Any]]:
    """Every place that holds something: its table or list, and its key or number."""
    for key, value in table.items() if isinstance(table, dict) else enumerate(table):
        yield table, key
        if isinstance(value, dict | list):
            yield from _leaves(value)


def _lines(text: str, draw: random.Random) -> str:
    """A line lost, doubled, moved or cut."""
    lines = text.split("\n")
    i = draw.randrange(len(lines))
    how = draw.randrange(5)
    if how == 0:
        del lines[i]
    elif how == 1:
        lines.insert(draw.randrange(len(lines) + 1), lines[i])
    elif how == 2:
        lines[i] = lines[i][: draw.randrange(len(lines[i]) + 1)]
    elif how == 3:
        return "\r\n".join(lines)
    else:
        draw.shuffle(lines)
    return "\n".join(lines)


def _pieces(text: str, draw: random.Random) -> str:
    """Something put in somewhere."""
    at = draw.choice([0, len(text), draw.randrange(len(text) + 1)])
    return text[:at] + draw.choice(TEXTS) + text[at + draw.choice([0, 0, 1, 10]) :]


def _monster(text: str, draw: random.Random) -> str:
    """Much of something."""
    n = draw.choice([50, 500, 3000])
    return text + draw.choice([
        "\nx = " + "[" * n + "]" * n,
        "\nx = " + "{a=" * n + "1" + "}" * n,
        "\n" + ".".join(["a"] * n) + " = 1",
        "\n" + "k" * 100 * n + " = 1",
        "\nx = '" + "v" * 100 * n + "'",
        "\nseed = " + "9" * 2 * n,
        "\n[sampling]\nsigmas = [" + "80.0, " * n + "]",
        "\n[training]\nalso_average = [" + "0.5, " * n + "]",
        "\n[" + ".".join(["objective"] * n) + "]",
        "\n" + "\n".join(f"a{i} = {i}" for i in range(n)),
        "\nbase = '" + draw.choice(["toy/ct", "digits/edm", "../x", "x.toml", "/dev/zero"]) + "'",
    ])  # fmt: skip


def word(draw: random.Random) -> str:
    """Something that a user may type: odd values, and noise."""
    if draw.random() < 0.7:
        return str(draw.choice(ODD)).replace("\0", "")  # no system hands a NUL to a program
    alphabet = string.printable + "éß数字🙂\u202e\ud8ff"[:-1]
    return "".join(draw.choice(alphabet) for _ in range(draw.choice([1, 3, 20])))


class TooLong(BaseException):
    """It hangs. Nothing that is tested catches this."""


@contextmanager
def bounded(seconds: float = SECONDS, room: int = ROOM) -> Iterator[None]:
    """Let nothing inside take longer, or more memory."""

    def stop(number: int, frame: object) -> None:
        raise TooLong(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + room, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def failures(cases: Any, check: Callable[[Any], None]) -> list[str]:
    """What is wrong, of many cases: their names, and what they raised that is no refusal."""
    found = []
    for case in cases:
        try:
            with bounded():
                check(case)
        except ValueError:
            pass
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            found.append(f"{case}: {type(error).__name__}: {str(error)[:200]}")
    return found
