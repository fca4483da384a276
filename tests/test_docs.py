"""The docs tell the truth: names exist, sources are named, code blocks run, notebooks convert."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
import re
from pathlib import Path
from types import ModuleType
from typing import get_args
from unittest import mock

import markdown
import nbformat
import pytest
import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from torch import Tensor

import cmbook
import cmbook.schedules
from cmbook import plotting
from cmbook.oracle import GaussianMixture, Guided
from cmbook.parameterization import ConsistencyScalings, EDMScalings

ROOT = Path(__file__).resolve().parents[1]
API = "\n".join(page.read_text() for page in sorted((ROOT / "docs/api").glob("*.md")))
FLOORS_0_TO_2 = [
    *["protocols", "noise", "schedules", "conventions", "ode", "distances", "weights", "guidance"],
    *[f"oracle.{name}" for name in ("worlds", "dataset", "guided", "distance", "integrate")],
    *["parameterization", "networks.blocks", "networks.mlp", "networks.unet", "networks.ncsnpp"],
    "perceptual",
    *[f"losses.{name}" for name in ("regression", "tangent", "edm", "progressive", "cd", "ct")],
    *["losses.continuous", "samplers", "editing"],
]
ABOVE = [
    *[f"data.{name}" for name in ("tensors", "worlds", "digits", "glyphs", "images", "readers")],
    *["data.prepare", "data.inspect", "data.fetch"],
    *[
        "training",
        "processes",
        "checkpoints",
        "disk",
        "evaluation",
        "clouds",
        "features",
        "references",
    ],
    *[
        f"interop.{name}"
        for name in (
            "foreign",
            "official",
            "convert",
            "openai",
            "jcm",
            "flax",
            "edm",
            "inert",
            "diffusers",
        )
    ],
    *["experiment", "costs", "sources", "runs", "board", "reports", "pictures", "plotting", "demo"],
]
ABOVE += [f"doctor.{name}" for name in ("findings", "patient", "history", "answers", "code")]
ABOVE += [f"doctor.{name}" for name in ("views", "parts", "marred", "worlds", "upstream")]
ABOVE += [f"doctor.{name}" for name in ("usual", "replay", "loop", "slips", "trials")]
EXTENSIONS = ["attr_list", "md_in_html", "tables", "pymdownx.superfences", "pymdownx.arithmatex"]
GIF = "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
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
        or name.endswith((".World", ".Paths", ".Scalings", ".Measurement"))
    )


def code_blocks() -> list[pytest.param]:
    """Every Markdown block marked as python, of the site and the README; a file's blocks chain.

    The guides, but for one that has nothing to show, are those of `test_guides.py`.
    """
    pages = [p for p in sorted((ROOT / "docs").rglob("*.md")) if p.parent.name != "guides"]
    files = [*pages, ROOT / "docs/guides/costs.md", ROOT / "README.md"]
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
    packages = [
        f"cmbook.{name}" for name in ("data", "doctor", "interop", "losses", "networks", "oracle")
    ]
    listed = [f"cmbook.{name}" for name in [*FLOORS_0_TO_2, *ABOVE, "__main__"]]
    assert sorted([*listed, *packages, "cmbook"]) == modules()


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
    commands = [
        "demo",
        "train",
        "doctor",
        "sample",
        "edit",
        "evaluate",
        "compare",
        "export",
        "configs",
    ]
    commands += ["data get", "data check", "data reference", "data export-lsun", "notebooks"]
    for command in commands:
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


@pytest.mark.parametrize("name", ["memory", "steps", "samples", "norms"])
def test_the_tables_of_what_was_measured_are_filled_in(name):
    made = load("hooks").on_page_markdown(f"<!-- measured: {name} -->", files=Files([]))
    lines = made.splitlines()
    assert len(lines) > 5
    assert all(line.startswith("|") for line in lines)
    assert len({line.count("|") for line in lines}) == 1


def test_a_floor_above_what_was_measured_is_called_noise():
    over = load("hooks")._over
    ours = {"loss and backward": 9.0}
    assert over(ours, {"loss and backward": 10.0}) == (
        "floor, taken later; ours is 0.90 times it, which shows the noise"
    )
    beside = {"loss and backward": 6.0, "in turns": True}
    assert over(ours, beside) == "floor; ours is 1.50 times it"


def test_the_page_of_costs_lists_every_stored_figure_that_is_not_faster():
    page = (ROOT / "docs/guides/costs.md").read_text(encoding="utf-8")
    slow, measured = page[page.index("What is not faster") :], load("hooks").measured
    small = measured("sample-small")
    for code in ("official", "diffusers"):
        ratio = small["ours"]["seconds"] / small[code]["seconds"]
        assert (ratio <= 1) or f"| {ratio:.2f} |" in slow
    optimizers = []
    for name in ("small-cd", "small-ct", "full-cd", "full-ct"):
        found = measured(f"step-{name}")
        ours, theirs = found["ours"], found["reference"]
        whole = ours["whole step"] / theirs["whole step"]
        assert whole <= 1 or f"| {whole:.2f} |" in slow
        assert ours["averages"] < theirs["averages"]
        optimizers.append(ours["optimizer"] / theirs["optimizer"])
        assert round(ours["peak_gb"] / theirs["peak_gb"], 2) <= 1.02
    said = f"| the optimizer alone | {min(optimizers):.2f} to {max(optimizers):.2f} |"
    assert said in slow


def test_the_estimate_of_memory_is_within_15_percent_of_what_was_measured():
    """Of the committed measurement; below a gigabyte the libraries' own memory counts."""
    rows = load("hooks").measured("costs")["recipes"]
    large = [row for row in rows.values() if row["measured_gb"] > 1]
    assert len(large) >= 8
    assert all(abs(row["measured over estimated"] - 1) < 0.15 for row in large)
    larger = [row for row in large if row["measured_gb"] > 3]
    assert len(larger) >= 5
    assert all(abs(row["measured over estimated"] - 1) < 0.05 for row in larger)


# ── notebooks become pages ──


@pytest.fixture
def notebook(tmp_path):
    v4 = nbformat.v4
    figure = v4.new_output("display_data", {"image/png": PNG, "text/plain": "<Figure>"})
    moving = {"image/gif": GIF, "image/png": PNG, "text/plain": "<Image>"}
    said = v4.new_output("stream", name="stdout", text="4\n")
    book = v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# A title\n\n**The promise.** Much."),
            v4.new_markdown_cell("$$\nx_0 + \\sigma_{max} z, \\quad \\lVert x_1\\rVert_2\n$$"),
            v4.new_code_cell("draw()", outputs=[figure]),
            v4.new_markdown_cell(
                "*In the picture: a [dot] of $x_0$.* See [on](01_next.ipynb#end)."
            ),
            v4.new_code_cell("animate()", outputs=[v4.new_output("display_data", moving)]),
            v4.new_markdown_cell("![The roles](../docs/assets/roles.svg)"),
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
    shown = re.findall(r"!\[(.*?)\]\((00_.*?)\)", text)
    assert [name for _, name in shown] == list(figures)
    assert [alt for alt, _ in shown] == ["a dot of x_0 .", "A title", "A heading"]
    first, *_, last = figures.values()
    assert first.startswith(b"\x89PNG")
    assert last.startswith(b"\x89PNG")
    assert text.startswith("# A title { #notebook-00 }\n\n[Download this notebook](00_small.ipynb)")
    assert "<Figure>" not in text


def test_an_animation_is_shown_in_place_of_its_still(notebook):
    text, figures = load("hooks").page_of(notebook)
    (name,) = (name for name in figures if name.endswith(".gif"))
    assert figures[name].startswith(b"GIF89a")
    assert f"![A title]({name})" in text
    assert "<Image>" not in text


def test_a_drawing_of_the_site_is_shown_in_a_notebooks_page(notebook):
    text, _ = load("hooks").page_of(notebook)
    assert "![The roles](../assets/roles.svg)" in text


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
    kinds = {"image/png", "image/gif"}
    drawn = sum(bool(kinds & set(out.get("data", {}))) for c in cells for out in c.outputs)
    shown = re.findall(rf"^!\[[^\]]{{3,}}\]\(({path.stem}[^)]+)\)", text, re.MULTILINE)
    assert len(figures) == drawn
    assert shown == list(figures)
    assert all(cell.source in text for cell in cells)
    assert text.count("<summary>Solution</summary>") == sum(
        "solution" in cell.metadata.get("tags", []) for cell in cells
    )


def test_a_page_lists_and_links_the_notebooks_that_exist(notebook):
    (notebook.parent / "notebooks").mkdir()
    notebook.rename(notebook.parent / "notebooks" / notebook.name)
    (notebook.parent / "docs").mkdir()
    config = MkDocsConfig(config_file_path=str(notebook.parent / "mkdocs.yml"))
    hooks = [str(ROOT / "docs/hooks.py")]
    config.load_dict({"site_name": "A", "plugins": [], "hooks": hooks, "nav": [{"Learn": []}]})
    assert config.validate() == ([], [])
    files = config.plugins.on_files(Files([]), config=config)
    assert config.nav == [{"Learn": [{"00 A title": "learn/00_small.md"}]}]
    page = "<!-- notebooks -->\n\n| <!-- notebooks: 00 07 --> |"
    filled = config.plugins.on_page_markdown(page, page=None, config=config, files=files)
    assert filled == "- **00 [A title](00_small.md)** Much.\n\n| [00](00_small.md) |"


# ── words and roles ──


def test_every_hover_definition_is_short_and_plain():
    """A pointer shows no formulas, no code and no links."""
    terms = load("hooks").hovers((ROOT / "docs/glossary.md").read_text(encoding="utf-8"))
    assert {"NFE", "CD", "CT", "EMA", "ODE", "LPIPS", "FID", "pseudo-Huber"} <= set(terms)
    for words in terms.values():
        assert 20 < len(words) < 160
        assert not set("$`[]*<>") & set(words)


def test_the_glossary_is_in_alphabetical_order():
    page = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^### (.+?)(?: \{.*\})?$", page, re.MULTILINE)
    assert terms == sorted(terms, key=str.lower)
    assert {"student", "target", "teacher", "average", "seam", "guidance"} <= set(terms)


@pytest.mark.parametrize(
    ("html", "marked"),
    [
        ("<p>NFE and NFE.</p>", "<p>[NFE] and NFE.</p>"),
        ("<p>NFE</p><h2>NFE</h2><p>NFE</p>", "<p>[NFE]</p><h2>NFE</h2><p>[NFE]</p>"),
        ("<p>Pseudo-Huber</p><p>pseudo-Huber</p>", "<p>[Pseudo-Huber]</p><p>pseudo-Huber</p>"),
        ("<p>nfe, NFEs, xNFE, <em>NFE</em></p>", "<p>nfe, NFEs, xNFE, <em>[NFE]</em></p>"),
        ('<a href="NFE">NFE</a>', '<a href="NFE">NFE</a>'),
        ('<img alt="NFE">', '<img alt="NFE">'),
        ("<pre><code>a < NFE\n</code></pre>", "<pre><code>a < NFE\n</code></pre>"),
        *[(text, text) for text in ("<code>NFE</code>", "<summary>NFE</summary>")],
        *[(text, text) for text in (r'<span class="arithmatex">\(NFE\)</span>',)],
    ],
)
def test_terms_explain_themselves_once_a_section_and_never_in_code_math_or_links(html, marked):
    terms = {"NFE": "A <count>.", "pseudo-Huber": "A distance."}
    shown = load("hooks").explained(html, terms)
    assert re.sub(r"<abbr title=\"[^\"<>]+\">(.*?)</abbr>", r"[\1]", shown) == marked


def test_a_figure_opens_alone_and_terms_of_the_glossary_are_marked_on_a_page():
    config = MkDocsConfig()
    config.load_dict({"docs_dir": str(ROOT / "docs")})
    hooks, html = load("hooks"), '<p><img alt="CD" src="../a.png" /> CD</p>'
    for name in ("index.md", "glossary.md"):
        page = mock.Mock(file=mock.Mock(src_uri=name))
        shown = hooks.on_page_content(html, page=page, config=config)
        assert '<p><a href="../a.png"><img alt="CD" src="../a.png" /></a> ' in shown
        assert ("<abbr" in shown) is (name == "index.md")


def test_the_roles_are_drawn_in_the_colors_of_the_book():
    drawing = (ROOT / "docs/assets/roles.svg").read_text(encoding="utf-8")
    for color in (plotting.DATA, plotting.TEACHER, plotting.CD, plotting.CT):
        assert color in drawing
    for role in ("student", "target", "teacher", "average"):
        assert f">{role}" in drawing
    assert 'fill="#fff"' in drawing, "the paper of every figure is white"


def test_every_image_of_a_page_has_a_text_in_its_place():
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    shown = [
        (page.name, alt)
        for page in pages
        for alt in re.findall(r"!\[([^\]]*)\]\(", page.read_text())
    ]
    assert [page for page, alt in shown if len(alt) < 40] == []


# ── who uses what ──

CODE = """
import cmbook as cm
import cmbook.oracle
from cmbook import plotting, solve as walk
from cmbook.noise import NoiseRange
import torch
cm.EDM(); cm.losses.EDM; cmbook.oracle.World; walk(); plotting.scatter(NoiseRange.grid, torch.ones)
"""


def test_what_code_takes_from_the_package_is_found_however_it_is_imported():
    names = set(load("docstrings").taken(CODE))
    assert names == {
        *("cmbook.losses", "cmbook.losses.EDM", "cmbook.oracle", "cmbook.oracle.World"),
        *("cmbook.ode.solve", "cmbook.plotting", "cmbook.plotting.scatter"),
        *("cmbook.noise.NoiseRange", "cmbook.noise.NoiseRange.grid"),
    }


def test_a_docstring_names_the_notebooks_that_use_its_object(tmp_path, monkeypatch):
    v4, docstrings = nbformat.v4, load("docstrings")
    for name, code in (("02_a", CODE), ("05_b", "from cmbook import EDM\nEDM()")):
        book = v4.new_notebook(cells=[v4.new_markdown_cell("# A"), v4.new_code_cell(code)])
        nbformat.write(book, tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(docstrings, "NOTEBOOKS", tmp_path)
    links = "[02][notebook-02], [05][notebook-05]"
    assert docstrings.used_in("cmbook.losses.edm.EDM") == f"\n\n**Used in** {links}\n{{: .used }}"
    assert "[02]" in docstrings.used_in("cmbook.noise.NoiseRange")
    assert docstrings.used_in("cmbook.noise.normal") == ""


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_name_that_a_notebook_takes_exists(path):
    """The names behind "Used in" are those of real things."""
    for name in load("docstrings").uses(path.parent)[path.stem[:2]]:
        assert resolves(name), name


def resolves(name: str) -> bool:
    """Whether a dotted name leads to a thing of the package."""
    for split in range(name.count(".") + 1, 0, -1):
        module, rest = name.split(".")[:split], name.split(".")[split:]
        with contextlib.suppress(ModuleNotFoundError):
            thing = importlib.import_module(".".join(module))
            for attribute in rest:
                thing = getattr(thing, attribute, None) or getattr(
                    thing, "__dataclass_fields__", {}
                ).get(attribute)
            return thing is not None
    return False


# ── paper, code and folklore ──


FOLKLORE = (ROOT / "docs/learn/folklore.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", FOLKLORE, re.MULTILINE | re.DOTALL))
RANGE = cmbook.NoiseRange()


def huber_by_pixel(*differences: float, c: float) -> float:
    return sum(math.sqrt(d**2 + c**2) - c for d in differences)


def training_loss_of_the_exact_function(levels: int) -> float:
    """By hand, for 1-D Gaussian data of variance 1/4: f(x, σ) = a(σ) x, and x = x0 + σ z."""
    sigma = RANGE.grid(levels)
    a = ((0.25 + RANGE.sigma_min**2) / (0.25 + sigma**2)).sqrt()
    return float((0.25 * a.diff() ** 2 + (a * sigma).diff() ** 2).mean())


def guided_and_sharpened(scale: float) -> list[Tensor]:
    """Mean and standard deviation of guided samples, and of the law that they are said to have."""
    world = GaussianMixture.isotropic(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), 0.5)
    starts = 80 * torch.special.ndtri((torch.arange(201, dtype=torch.float64) + 0.5) / 201)
    sigma, label = torch.full_like(starts, 80.0), torch.ones(201, dtype=torch.int64)
    ends = Guided(world, scale).consistency(starts[:, None], sigma, label)

    x = torch.linspace(-6, 8, 5001, dtype=torch.float64)[:, None]
    zero, label = torch.zeros(5001, dtype=torch.float64), torch.ones(5001, dtype=torch.int64)
    plain, own = world.log_density(x, zero), world.log_density(x, zero, label)
    law = torch.softmax((1 - scale) * plain + scale * own, dim=0)
    mean = (law * x[:, 0]).sum()
    std = (law * (x[:, 0] - mean) ** 2).sum().sqrt()
    return [ends.mean(), ends.std(), mean, std]


@functools.cache
def claims() -> dict[str, list[str]]:
    """The numbers of each section, computed."""
    snr = (RANGE.grid(18)[:-1] / RANGE.grid(18)[1:]) ** 2
    c_in = float(EDMScalings().c_in(torch.tensor([80.0])))
    edm, ours = (
        s.c_out(torch.tensor([0.01, 80.0])) for s in (EDMScalings(), ConsistencyScalings())
    )
    c, pixels = 0.00054 * math.sqrt(3072), 3072
    halfway = cmbook.schedules.levels_at(cmbook.Clock(400_000, 800_000), 2, 150)
    decay_at = cmbook.schedules.decay_at
    one, all_alike = [0.1], [0.1 / math.sqrt(pixels)] * pixels
    ratio = huber_by_pixel(*all_alike, c=c) / huber_by_pixel(*one, c=c)
    whole = cmbook.PseudoHuber()(torch.tensor([all_alike]), torch.zeros(1, pixels))
    assert abs(edm[1] / ours[1] - 1) < 1e-4, "the fifth digit"
    return {
        "The decay of the moving target": [
            *(f"{decay_at(2, 2, 0.95, v):g}" for v in ("paper", "code")),
            *(f"{decay_at(halfway, 2, 0.9, v):.5f}" for v in ("paper", "code")),
        ],
        "The level that is weighed": [f"{snr[0]:.1f}", f"{snr[-1]:.1f}"],
        "How a network hears the noise level": [
            f"{math.log(80) / 4:.4f}",
            f"{1000 * math.log(80) / 4:.1f}",
        ],
        "The direction of time": [f"{RANGE.grid(40)[i]:.4f}" for i in (22, 39 - 22)],
        "N counts levels": [f"{RANGE.grid(n)[1]:.2f}" for n in (18, 19)],
        "The last time point of a sampler": [f"{RANGE.grid(40)[22]:.4f}"],
        "A square root in the input scaling": [
            f"{c_in**2:.6f}",
            f"{c_in:.4f}",
            f"{80 * c_in**2:.4f}",
        ],
        "A boundary that nearly holds": [
            *(f"{s / math.sqrt(s**2 + 0.25):.{n}f}" for s, n in ((0.002, 4), (80, 2))),
            f"{ours[1]:.2f}",
            f"{0.25 / (10**2 + 0.25):.4f}",
        ],
        "Pseudo-Huber, pixel by pixel": ["0.1", f"{float(whole):.4f}", f"{ratio:.1f}"],
        "The sign of a mean": ["1.1", f"{math.exp(1.1):.2f}", f"{math.exp(-1.1):.2f}"],
        "How much noise goes back in": [f"{math.sqrt(0.003**2 - 0.002**2):.4f}", "0.003"],
        "Two files that look alike": [f"{edm[0]:.4f}", f"{ours[0]:.4f}"],
        '"The loss must fall"': [f"{training_loss_of_the_exact_function(n):.4f}" for n in (18, 35)],
        '"One samples from the moving average, so that is the target"': ["0.9999"],
        '"Guidance samples from a sharpened law"': [
            "0.5",
            *(f"{value:.1f}" for value in guided_and_sharpened(3.0)),
        ],
        '"A uniform weight is the safe choice"': ["0.92", "7.67", "0.82", "0.77"],
    }


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_of_the_folklore_is_computed(section):
    prose = re.sub(r"`[^`]*`|\$[^$]*\$|\]\S*", "", SECTIONS[section])
    assert sorted(set(re.findall(r"\d+\.\d+", prose))) == sorted(set(claims().get(section, [])))


def test_the_whole_numbers_of_the_folklore_are_true():
    assert f"has reached {levels_after(2)}\n  levels instead of {levels_after(1)}." in FOLKLORE
    assert f"{3 * 32 * 32:,} for an image of\n  CIFAR-10, 2 for a point" in FOLKLORE
    assert round(math.exp(2.2)) == 9  # "nine times the noise"
    assert 1 - math.sqrt(1 - (0.002 / 1.4) ** 2) < 1.1e-6  # "agree to a millionth"
    assert 2.5 < RANGE.grid(40)[22] / RANGE.sigma_data < 3  # "nearly three times that of the data"


def levels_after(times: int) -> int:
    return cmbook.schedules.levels_at(cmbook.Clock(800_000 * times, 800_000), 2, 150)


def test_the_measured_numbers_of_the_folklore_are_those_of_the_measurement():
    rows = (ROOT / "docs/learn/weights.md").read_text(encoding="utf-8")
    for row, number in (("pseudo-Huber, inverse gap", 0.77), ("l2, inverse gap", 0.82)):
        assert f"{row} | {number} |" in rows
    for row, number in (("l2, uniform", 0.92), ("pseudo-Huber, uniform", 7.67)):
        assert f"| {row} | {number} |" in rows


@pytest.mark.parametrize("section", SECTIONS)
def test_every_disagreement_is_told_whole_and_pinned_by_a_test_that_exists(section):
    text = SECTIONS[section]
    leads = re.findall(r"^- \*\*(.+?)\.?\*\*", text, re.MULTILINE)
    assert leads[0] in ("Paper", "Said")
    assert leads[1] in ("Code", "Elsewhere", "In truth")
    assert leads[2:] == ["Consequence", "cmbook", "Pinned by"]
    pins = re.findall(r"`(\S+?)::(\w+)`", text)
    assert pins or "nothing yet" in text or "`benchmarks/why_weight.py`" in text
    for file, name in pins:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["learn/folklore.md", "glossary.md"])
def test_the_names_that_a_page_links_exist(page):
    names = re.findall(r"\]\[(cmbook[\w.]*)\]", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert names
    assert [name for name in names if not resolves(name)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_no_notebook_shows_the_address_of_an_object(path):
    """Such an output says nothing, and differs in every run."""
    text, _ = load("hooks").page_of(path)
    assert re.findall(r"<.+ at 0x[0-9a-f]+>", text) == []


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
