"""MkDocs hooks: notebooks become pages, terms explain themselves, commands print their help.

Notebooks are never executed here. Their outputs are stored, and the tests compare them.
"""

import contextlib
import io
import json
import os
import re
from base64 import b64decode
from html import escape
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from nbformat.v4 import new_markdown_cell

TEMPLATE = """{%- extends 'markdown/index.md.j2' -%}
{% block stream %}
``` {.text .output}
{{ output.text.rstrip() }}
```
{% endblock %}"""
SILENT = r"""<(pre|code|h\d|a|autoref|summary|script|title)\b.*?</\1>
    |<(?:span|div)\ class="arithmatex">.*?</(?:span|div)>|<[^>]*>"""  # no term is explained here


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page, its figures and the notebook itself for every notebook."""
    root = Path(config.config_file_path).parent
    learn: list[object] = next(
        (entry["Learn"] for entry in config.nav or [] if "Learn" in entry), []
    )
    for place, notebook in enumerate(sorted((root / "notebooks").glob("*.ipynb")), 1):
        text, figures = page_of(notebook)
        page = f"learn/{notebook.stem}.md"
        files.append(File.generated(config, page, content=text))
        files.append(File.generated(config, f"learn/{notebook.name}", abs_src_path=str(notebook)))
        for name, picture in figures.items():
            files.append(File.generated(config, f"learn/{name}", content=picture))
        learn.insert(place, {f"{chapter(notebook)} {title(text)}".strip(): page})
    return files


def on_page_markdown(markdown: str, *, files: Files, **kwargs: object) -> str:
    """Fill in what a page would otherwise repeat by hand."""
    markdown = re.sub(r"<!-- help: ([\w -]+?) -->", lambda found: help_of(found[1]), markdown)
    markdown = re.sub(
        r"<!-- notebooks: ([\d ]+) -->", lambda found: links(files, found[1].split()), markdown
    )
    markdown = re.sub(r"<!-- measured: (\w+) -->", lambda found: MEASURED[found[1]](), markdown)
    return markdown.replace("<!-- notebooks -->", contents(files))


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, **kwargs: object) -> str:
    """Let terms explain themselves under the pointer, and figures open alone to be looked into."""
    html = re.sub(r'<img [^>]*src="([^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', html)
    glossary = Path(config.docs_dir) / "glossary.md"
    terms = hovers(glossary.read_text(encoding="utf-8")) if glossary.is_file() else {}
    return html if page.file.src_uri == glossary.name else explained(html, terms)


# ── notebooks ──


def page_of(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """A stored notebook as Markdown, and the figures that it shows, by file name."""
    book = nbformat.read(notebook, as_version=4)
    cells: list[nbformat.NotebookNode] = []
    figures: dict[str, bytes] = {}
    for i, cell in enumerate(book.cells):
        if cell.cell_type == "markdown":
            text = re.sub(r"\]\(([\w-]+)\.ipynb", r"](\1.md", cell.source)  # to another notebook
            text = text.replace("](../docs/", "](../").replace("<details>", "<details markdown>")
            cells.append(new_markdown_cell(text))
            continue
        figures |= pull_figures(cell, f"{notebook.stem}_{i}", alt_text(book.cells[: i + 2]))
        if "solution" in cell.metadata.get("tags", []):
            fold = '<details class="solution" markdown>\n<summary>Solution</summary>'
            cells += [new_markdown_cell(fold), cell, new_markdown_cell("</details>")]
        else:
            cells.append(cell)
    heading, line, rest = cells[0].source.partition("\n")
    anchor = f" {{ #notebook-{chapter(notebook)} }}"
    load = f"\n\n[Download this notebook]({notebook.name}){{ .download download }}\n"
    cells[0].source = heading + anchor + load + line + rest
    book = nbformat.v4.new_notebook(cells=cells, metadata=book.metadata)
    return MarkdownExporter(raw_template=TEMPLATE).from_notebook_node(book)[0], figures


def pull_figures(cell: nbformat.NotebookNode, name: str, alt: str) -> dict[str, bytes]:
    """The pictures that a cell shows, each replaced by a link; an animation before its still."""
    figures = {}
    for place, output in enumerate(cell.outputs):
        kind = next((k for k in ("gif", "png") if f"image/{k}" in output.get("data", {})), None)
        if kind:
            file = f"{name}_{place}.{kind}"
            figures[file] = b64decode(output.data[f"image/{kind}"])
            output.data = {"text/markdown": f"![{alt}]({file})\n"}
    return figures


def alt_text(cells: list[nbformat.NotebookNode]) -> str:
    """What a figure shows: "In the picture: …" in the cell below it, or the heading above."""
    below = re.match(r"\*In the picture: ([^*]+)\*", cells[-1].source)
    above = [re.findall(r"^#+ (.+)", c.source, re.M) for c in cells if c.cell_type == "markdown"]
    heading = next((found[-1] for found in reversed(above) if found), "Figure")
    return re.sub(r"[\[\]$\\`\s]+", " ", below[1] if below else heading).strip()


def chapter(notebook: Path) -> str:
    """The number that a notebook's name begins with."""
    return "".join(re.findall(r"^\d+", notebook.stem))


def title(text: str) -> str:
    """The first heading of a page."""
    return "".join(re.findall(r"^# (.+?)(?: \{.*\})?$", text, re.M)[:1])


def chapters(files: Files) -> dict[str, File]:
    """The pages that were notebooks, by number."""
    pages = (f for f in files.documentation_pages() if f.generated_by)
    return {chapter(Path(f.src_uri)): f for f in pages if f.src_uri.startswith("learn/")}


def contents(files: Files) -> str:
    """The list of the notebooks, each with its promise."""
    entries = []
    for number, file in chapters(files).items():
        text = file.content_string
        promise = "".join(re.findall(r"^\*\*The promise\.\*\* (.+)", text, re.M)[:1])
        entries.append(f"- **{number} [{title(text)}]({Path(file.src_uri).name})** {promise}")
    return "\n".join(entries)


def links(files: Files, numbers: list[str]) -> str:
    """Links from a page of Learn to the notebooks of these numbers, as far as they exist."""
    there = chapters(files)
    return ", ".join(f"[{n}]({Path(there[n].src_uri).name})" for n in numbers if n in there)


# ── terms and commands ──


def hovers(glossary: str) -> dict[str, str]:
    """The terms that explain themselves: those marked so, with their first paragraph."""
    entries = re.findall(r"^### (.+) \{ \.hover \}\n\n((?:.+\n?)+)", glossary, re.M)
    return {term: " ".join(words.split()) for term, words in entries}


def explained(html: str, terms: dict[str, str]) -> str:
    """Mark each term where a section first uses it, but not in headings, links, code or math."""
    spelled = {t[0].upper() + t[1:]: words for t, words in terms.items()} | terms
    longest_first = map(re.escape, sorted(spelled, key=len, reverse=True))
    seen: set[str] = set()

    def mark(found: re.Match[str]) -> str:
        text, term = found[0], found["term"]
        if term is None:
            if re.match(r"<h\d", text):
                seen.clear()
        elif spelled[term] not in seen:
            seen.add(spelled[term])
            return f'<abbr title="{escape(spelled[term])}">{term}</abbr>'
        return text

    return re.sub(rf"(?xs){SILENT}|\b(?P<term>{'|'.join(longest_first)})\b", mark, html)


def help_of(command: str) -> str:
    """What `cmbook COMMAND --help` prints."""
    from cmbook.__main__ import main

    said = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "80"}),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        main([*command.split(), "--help"])
    lines = [line.rstrip() for line in said.getvalue().strip().splitlines()]
    return "\n".join(["``` {.text .help}", *lines, "```"])


# ── what benchmarks/ has measured ──


def measured(name: str) -> dict[str, Any]:
    """The numbers that a script of benchmarks/ wrote."""
    path = Path(__file__).parent.parent / "benchmarks" / "results" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown: the first column to the left, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def memory_table() -> str:
    """Of each recipe, what was measured and what was estimated."""
    found = measured("costs")["recipes"]
    rows = [
        [
            f"`{recipe}`",
            f"{row['measured_gb']:.2f}",
            f"{row['estimated_gb']:.2f}",
            f"{row['measured over estimated']:.2f}",
        ]
        for recipe, row in found.items()
    ]
    return table(["", "measured, GB", "estimated, GB", "ratio"], rows)


def step_table() -> str:
    """A step of ours and of the official code by its parts, and the floor."""
    parts = ["loss and backward", "optimizer", "averages", "whole step", "peak_gb"]
    rows = []
    for size, method in (("small", "cd"), ("small", "ct"), ("full", "cd"), ("full", "ct")):
        found = measured(f"step-{size}-{method}")
        ours, theirs, floor = (found[kind] for kind in ("ours", "reference", "floor"))
        title = f"{size} {method.upper()}"
        rows.append([title, "ours", *(f"{ours[part]:.3g}" for part in parts)])
        rows.append(["", "official", *(f"{theirs[part]:.3g}" for part in parts)])
        ratios = (f"**{ours[part] / theirs[part]:.2f}**" for part in parts)
        rows.append(["", "ratio", *ratios])
        rows.append(["", _over(ours, floor), *_floor(floor)])
    head = ["", "", "loss and backward, s", "optimizer, s", "averages, s", "step, s", "peak, GB"]
    return table(head, rows)


def _over(ours: dict[str, float], floor: dict[str, float]) -> str:
    """What the floor says of ours; one that was not taken in turns may lie above it."""
    over = ours["loss and backward"] / floor["loss and backward"]
    when = "floor" if floor.get("in turns") else "floor, taken later"
    noise = ", which shows the noise" if over < 1 else ""
    return f"{when}; ours is {over:.2f} times it{noise}"


def _floor(floor: dict[str, float]) -> list[str]:
    return [f"{floor['loss and backward']:.3g}", "", "", "", ""]


def sample_table() -> str:
    """One-step sampling of three code bases."""
    rows = []
    for size in ("small", "full"):
        found = measured(f"sample-{size}")
        for code in ("ours", "official", "diffusers"):
            each = found[code]
            ratio = found["ours"]["seconds"] / each["seconds"]
            rows.append(
                [
                    f"{size}, {each['images']} at a time" if code == "ours" else "",
                    code,
                    f"{each['seconds']:.3g}",
                    f"{each['peak_gb']:.2f}",
                    "" if code == "ours" else f"{ratio:.2f}",
                    "" if code == "ours" else f"{each['largest difference from ours']:.1e}",
                ]
            )
    head = ["", "", "s a batch", "peak, GB", "ours over theirs", "largest difference"]
    return table(head, rows)


def overhead_table() -> str:
    """What the trainer costs beside a bare loop, and a save beside its bytes."""
    found = measured("overhead")
    rows = []
    for name in ("toy", "digits"):
        row = found[name]
        low, _, high = row["quartiles, µs a step"]
        rows.append(
            [
                f"a step of `{row['recipe']}`",
                f"{row['bare loop, ms']:.3g} ms",
                f"{row['trainer, ms']:.3g} ms",
                f"{row['ratio']:.3f}",
                f"{row['overhead, µs a step']:.0f} µs ({low:.0f} to {high:.0f})",
                f"{row['of that a look at the gradient, µs a step']:.0f} µs",
            ]
        )
    save = found["save"]
    title = f"a save of {save['gigabytes']:.1f} GB"
    times = [f"{save['bytes alone, s']:.1f} s", f"{save['save, s']:.1f} s"]
    rows.append([title, *times, f"{save['ratio']:.2f}", "", ""])
    head = ["", "bare", "ours", "ratio", "difference, and of half the turns", "floor"]
    return table(head, rows)


def norm_table() -> str:
    """What `cmbook doctor` measures, what is normal, and the part that each check plays."""
    from cmbook.doctor import NORMS

    rows = [[name, norm.normal, norm.role] for name, norm in NORMS.items()]
    return table(["check", "what is measured, and normal", "role"], rows)


MEASURED = {
    "memory": memory_table,
    "steps": step_table,
    "samples": sample_table,
    "norms": norm_table,
    "overhead": overhead_table,
}
