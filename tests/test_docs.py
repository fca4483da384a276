"""The docs tell the truth: names exist, sources are named, code blocks run, notebooks convert."""

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import get_args

import markdown
import nbformat
import pytest

import cmbook

ROOT = Path(__file__).resolve().parents[1]
API = "\n".join(page.read_text() for page in sorted((ROOT / "docs/api").glob("*.md")))
FLOORS_0_TO_2 = [
    *["protocols", "noise", "schedules", "ode", "distances", "weights", "oracle"],
    *["parameterization", "networks.blocks", "networks.mlp", "networks.unet"],
    *["losses.regression", "losses.edm", "losses.cd", "losses.ct", "samplers"],
]
ABOVE = ["data", "training", "checkpoints", "evaluation", "experiment", "runs", "plotting", "demo"]
EXTENSIONS = ["attr_list", "md_in_html", "tables", "pymdownx.superfences", "pymdownx.arithmatex"]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="


def modules() -> list[str]:
    """Every module of the package, read from disk."""
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "cmbook").rglob("*.py"))
    return sorted(".".join(file.parts).removesuffix(".__init__") for file in files)


def load(name: str) -> ModuleType:
    """A file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public_definitions() -> list[tuple[str, str]]:
    """Public functions and classes of floors 0 to 2: their names and docstrings."""
    found = []
    for name in FLOORS_0_TO_2:
        path = ROOT / "cmbook" / f"{name.replace('.', '/')}.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found.append((f"{name}.{node.name}", ast.get_docstring(node) or ""))
    return found


def without_source(name: str, text: str) -> bool:
    """Shapes and protocols define nothing that a paper could, and a module is told by its maker."""
    return (
        name.startswith("protocols.")
        or text.startswith("What `")
        or name.endswith((".World", ".Scalings"))
    )


def code_blocks() -> list[pytest.param]:
    """Every Markdown block marked as python, of the site and the README; a file's blocks chain."""
    files = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
    texts = {file: file.read_text(encoding="utf-8") for file in files if file.is_file()}
    found = []
    for file, text in texts.items():
        blocks = re.findall(r"^``` ?python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if blocks:
            found.append(pytest.param(blocks, id=file.relative_to(ROOT).as_posix()))
    return found


# ── what the package says of itself ──


@pytest.mark.parametrize("name", cmbook.__all__)
def test_every_public_name_has_a_docstring(name):
    thing = getattr(cmbook, name)
    assert inspect.getdoc(thing)
    assert not thing.__doc__.startswith(f"{name}("), "the docstring that dataclass makes up"


def test_every_module_of_floors_0_to_2_is_checked_for_sources():
    packages = ["cmbook", "cmbook.losses", "cmbook.networks"]
    listed = [f"cmbook.{name}" for name in [*FLOORS_0_TO_2, *ABOVE, "__main__"]]
    assert sorted([*listed, *packages]) == modules()


@pytest.mark.parametrize(("name", "text"), public_definitions())
def test_everything_public_on_floors_0_to_2_names_its_source(name, text):
    assert text
    if not without_source(name, text):
        assert re.search(r"(^|  )Source: \S", text, re.MULTILINE), f"{name} names no source"


@pytest.mark.parametrize("name", modules())
def test_every_module_is_on_an_api_page(name):
    importlib.import_module(name)
    told = [f"`{name}`"] if name in ("cmbook", "cmbook.__main__") else [f"::: {name}\n"]
    assert any(words in API + "\n" for words in told), f"no page of docs/api shows {name}"


def test_the_list_of_public_names_is_complete_and_in_order():
    house = (ROOT / "docs/api/index.md").read_text(encoding="utf-8")
    assert re.findall(r"\[`(\w+)`\]\[cmbook\.", house) == list(cmbook.__all__)


@pytest.mark.parametrize("name", ["ode.Solver", "weights.Weight", "schedules.MuVariant"])
def test_the_choices_of_a_setting_are_all_told(name):
    module, alias = name.split(".")
    row = re.search(rf"#cmbook\.{name} .*?\| (.*) \|", API)
    assert row is not None
    choices = get_args(getattr(importlib.import_module(f"cmbook.{module}"), alias))
    assert re.findall(r'"(\w+)"', row[1]) == list(choices)


def test_the_diff_from_distillation_to_training_alone_is_that_of_the_sources():
    page = (ROOT / "docs/api/floor2.md").read_text(encoding="utf-8")
    diff = re.search(r"``` \{ \.diff #the-pair \}\n(.*?)```", page, re.DOTALL)
    assert diff is not None
    cd, ct = (
        inspect.getsource(importlib.import_module(f"cmbook.losses.{name}")) for name in ("cd", "ct")
    )
    for signs, source in (("- ", cd), ("+ ", ct)):
        lines = [line[1:] for line in diff[1].splitlines() if line[0] in signs]
        assert "\n".join(f"        {line}" for line in lines) in source


# ── what the pages say ──


@pytest.mark.parametrize(("levels", "i"), [(40, 22), (201, 106), (18, 11)])
def test_the_levels_that_other_code_bases_mean_are_those_of_their_grids(levels, i):
    rows = (ROOT / "docs/notation.md").read_text(encoding="utf-8").splitlines()
    (row, *_) = [r for r in rows if f"{i}," in r and (f"steps {levels}" in r or f"{levels} l" in r)]
    assert f"`[80, {cmbook.NoiseRange().grid(levels)[i]:.4f}]`" in row


@pytest.mark.parametrize("blocks", code_blocks())
def test_the_code_of_a_page_runs(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace = {"__name__": "__page__"}
    for block in blocks:  # a page that trains is tested with a short training
        exec(re.sub(r"steps=\d{3,}", "steps=20", block), namespace)


def test_the_page_of_a_command_shows_its_help():
    for command in ("demo", "train", "sample", "configs"):
        assert f"<!-- help: {command} -->" in API
        shown = load("hooks").help_of(command)
        assert f"usage: cmbook {command}" in shown
        assert "--help" in shown


def test_remarks_of_a_docstring_become_quiet_paragraphs():
    text = "A title.\n\nNote: first\n    and on.\n\nExample:\n    >>> 1\n\nSource: A `b`;\n    c.\n"
    quiet = load("docstrings").quiet
    assert "**Note** first and on.\n{: .note }" in quiet(text)
    assert "**Source** A `b`; c.\n{: .source }" in quiet(text)
    assert "\nExamples:\n    >>> 1" in quiet(text)
    assert quiet("1.  Source: A.").split("\n") == ["1.", "", "**Source** A.", "{: .source }"]


# ── notebooks become pages ──


@pytest.fixture
def notebook(tmp_path):
    v4 = nbformat.v4
    figure = v4.new_output("display_data", {"image/png": PNG, "text/plain": "<Figure>"})
    said = v4.new_output("stream", name="stdout", text="4\n")
    book = v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# A title\n\n**The promise.** Much."),
            v4.new_markdown_cell("$$\nx_0 + \\sigma_{max} z, \\quad \\lVert x_1\\rVert_2\n$$"),
            v4.new_code_cell("draw()", outputs=[figure]),
            v4.new_markdown_cell(
                "*In the picture: a [dot] of $x_0$.* See [on](01_next.ipynb#end)."
            ),
            v4.new_markdown_cell(
                "## A heading\n\n<details><summary>Hint</summary>\n\n`2`\n\n</details>"
            ),
            v4.new_code_cell("print(2 + 2)", outputs=[said], metadata={"tags": ["solution"]}),
            v4.new_code_cell("draw()", outputs=[figure]),
        ],
        metadata={"language_info": {"name": "python"}},
    )
    nbformat.write(book, tmp_path / "00_small.ipynb")
    return tmp_path / "00_small.ipynb"


def test_a_notebook_becomes_a_page_with_its_figures(notebook):
    text, figures = load("hooks").page_of(notebook)
    shown = re.findall(r"!\[(.*?)\]\((.*?)\)", text)
    assert [name for _, name in shown] == list(figures)
    assert [alt for alt, _ in shown] == ["a dot of x_0 .", "A heading"]
    assert all(png.startswith(b"\x89PNG") for png in figures.values())
    assert text.startswith("# A title\n\n[Download this notebook](00_small.ipynb)")


def test_the_math_of_a_notebook_survives(notebook):
    text, _ = load("hooks").page_of(notebook)
    assert "x_0 + \\sigma_{max} z, \\quad \\lVert x_1\\rVert_2" in text
    html = markdown.markdown(
        text, extensions=EXTENSIONS, extension_configs={"pymdownx.arithmatex": {"generic": True}}
    )
    assert re.search(r'<div class="arithmatex">\\\[\s*x_0 \+ \\sigma_\{max\} z', html)


def test_links_between_notebooks_lead_to_pages(notebook):
    text, _ = load("hooks").page_of(notebook)
    assert "[on](01_next.md#end)" in text


def test_solutions_and_hints_are_folded_and_rendered(notebook):
    text, _ = load("hooks").page_of(notebook)
    html = markdown.markdown(text, extensions=EXTENSIONS)
    hint, solution = re.findall(r"<details.*?</details>", html, re.DOTALL)
    assert "<code>2</code>" in hint
    assert "<summary>Solution</summary>" in solution
    assert "2 + 2" in re.sub("<[^>]+>", "", solution)
    assert "open" not in solution.split(">")[0]
    assert "draw" not in solution


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_notebook_of_the_book_converts_whole(path):
    text, figures = load("hooks").page_of(path)
    book = nbformat.read(path, as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    drawn = sum("image/png" in out.get("data", {}) for c in cells for out in c.outputs)
    assert len(figures) == drawn == len(re.findall(r"^!\[[^\]]{3,}\]\([^)]+\)", text, re.MULTILINE))
    assert all(cell.source in text for cell in cells)
    assert text.count("<summary>Solution</summary>") == sum(
        "solution" in cell.metadata.get("tags", []) for cell in cells
    )


def test_no_page_asks_another_host_for_anything():
    loads = r"""(?:src=|srcset=|@import|url\(|<link[^>]+href=)\s*["']?\s*(?:https?:)?//[^\s"')]+"""
    own = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.css"), ROOT / "mkdocs.yml"]
    assert [(f.name, found) for f in own for found in re.findall(loads, f.read_text())] == []


def test_the_fonts_of_the_formulas_are_here():
    folder = ROOT / "docs/assets/katex"
    named = set(re.findall(r"url\(([^)]+)\)", (folder / "katex.min.css").read_text()))
    assert named == {f"fonts/{font.name}" for font in (folder / "fonts").iterdir()}
    assert (folder / "LICENSE").is_file()
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 700_000
