"""MkDocs hooks: notebooks become the pages of Learn, and the command line prints its own help.

Notebooks are never executed here. Their outputs are stored, and the tests compare them.
"""

import contextlib
import io
import os
import re
from pathlib import Path
from unittest import mock

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbformat.v4 import new_markdown_cell

TEMPLATE = """{%- extends 'markdown/index.md.j2' -%}
{% block stream %}
``` {.text .output}
{{ output.text.rstrip() }}
```
{% endblock %}
{% block data_png %}
![{{ cell.metadata.alt }}]({{ output.metadata.filenames['image/png'] | path2url }})
{% endblock %}"""


def page_of(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """A stored notebook as Markdown, and the figures that it shows, by file name."""
    book = nbformat.read(notebook, as_version=4)
    cells = []
    for i, cell in enumerate(book.cells):
        if cell.cell_type == "markdown":
            text = re.sub(r"\]\(([\w-]+)\.ipynb", r"](\1.md", cell.source)  # to another notebook
            text = text.replace("](../docs/", "](../").replace("<details>", "<details markdown>")
            cells.append(new_markdown_cell(text))
        elif "solution" in cell.metadata.get("tags", []):
            fold = '<details class="solution" markdown>\n<summary>Solution</summary>'
            cells += [new_markdown_cell(fold), cell, new_markdown_cell("</details>")]
        else:
            cells.append(cell)
        cell.metadata.setdefault("alt", alt_text(book.cells[: i + 2]))
    title, line, rest = cells[0].source.partition("\n")
    load = f"\n[Download this notebook]({notebook.name}){{ .download download }}\n"
    cells[0].source = title + "\n" + load + line + rest
    exporter = MarkdownExporter(raw_template=TEMPLATE)
    resources = {"unique_key": notebook.stem, "output_files_dir": ""}
    text, resources = exporter.from_notebook_node(
        nbformat.v4.new_notebook(cells=cells, metadata=book.metadata), resources
    )
    return text, resources["outputs"]


def alt_text(cells: list[nbformat.NotebookNode]) -> str:
    """What a figure shows: "In the picture: …" in the cell below it, or the heading above."""
    below = re.match(r"\*In the picture: ([^*]+)\*", cells[-1].source)
    above = [re.findall(r"^#+ (.+)", c.source, re.M) for c in cells if c.cell_type == "markdown"]
    heading = next((found[-1] for found in reversed(above) if found), "Figure")
    return re.sub(r"[\[\]$\\`\s]+", " ", below[1] if below else heading).strip()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page, its figures and the notebook itself for every notebook."""
    root = Path(config.config_file_path).parent
    learn = next((entry["Learn"] for entry in config.nav or [] if "Learn" in entry), [])
    for place, notebook in enumerate(sorted((root / "notebooks").glob("*.ipynb")), 1):
        text, figures = page_of(notebook)
        page = f"learn/{notebook.stem}.md"
        files.append(File.generated(config, page, content=text))
        files.append(File.generated(config, f"learn/{notebook.name}", abs_src_path=str(notebook)))
        for name, png in figures.items():
            files.append(File.generated(config, f"learn/{name}", content=png))
        learn.insert(place, {f"{chapter(notebook)} {title(text)}".strip(): page})
    return files


def chapter(notebook: Path) -> str:
    """The number that a notebook's name begins with."""
    return "".join(re.findall(r"^\d+", notebook.stem))


def title(text: str) -> str:
    """The first heading of a page."""
    return "".join(re.findall(r"^# (.+)", text, re.M)[:1])


def on_page_markdown(markdown: str, *, files: Files, **kwargs: object) -> str:
    """Fill in what a page would otherwise repeat by hand."""
    markdown = re.sub(r"<!-- help: (\w+) -->", lambda found: help_of(found[1]), markdown)
    return markdown.replace("<!-- notebooks -->", contents(files))


def contents(files: Files) -> str:
    """The list of the notebooks, each with its promise."""
    entries = []
    for file in files.documentation_pages():
        if file.generated_by and file.src_uri.startswith("learn/"):
            text = file.content_string
            promise = "".join(re.findall(r"^\*\*The promise\.\*\* (.+)", text, re.M)[:1])
            number = chapter(Path(file.src_uri))
            entries.append(f"- **{number} [{title(text)}]({Path(file.src_uri).name})** {promise}")
    return "\n".join(entries)


def help_of(command: str) -> str:
    """What `cmbook COMMAND --help` prints."""
    from cmbook.__main__ import main

    said = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "80"}),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        main([command, "--help"])
    lines = [line.rstrip() for line in said.getvalue().strip().splitlines()]
    return "\n".join(["``` {.text .help}", *lines, "```"])
