"""The wrong lines of benchmarks/mutations.toml can still be planted, so the list stays alive."""

import ast
import tomllib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLES = tomllib.loads((ROOT / "benchmarks/mutations.toml").read_text(encoding="utf-8"))["mutation"]


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def test_every_right_line_stands_once_in_its_file():
    lost = [t for t in TABLES if text(ROOT / "cmbook" / t["file"]).count(t["old"]) != 1]
    assert lost == []


def test_with_every_wrong_line_the_file_is_still_python():
    for table in TABLES:
        wrong = text(ROOT / "cmbook" / table["file"]).replace(table["old"], table["new"])
        assert ast.parse(wrong).body, table["name"]


def test_every_test_and_lesson_that_should_notice_exists():
    for table in TABLES:
        file, name = table["test"].split("::")
        assert f"\ndef {name}(" in text(ROOT / "tests" / file), table["name"]
        assert (ROOT / "notebooks" / table.get("notebook", "")).exists(), table["name"]


def test_every_wrong_line_says_why_and_no_two_have_one_name():
    assert all(table["why"] for table in TABLES)
    assert len({table["name"] for table in TABLES}) == len(TABLES)
