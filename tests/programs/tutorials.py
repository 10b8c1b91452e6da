"""The pages of the tutorials: ``python -m programs.tutorials --write [NAME...]`` runs ``examples/`` and writes them.

The tutorials are notebooks as programs, in the percent format of jupytext. A page, in ``docs/tutorials``, is one of them,
with what its cells print and draw. ``tests/docs/test_tutorials.py`` runs the programs and compares the pages with them.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "tutorials"
NAMES = ("neurons", "network", "classifier", "long_run", "fit", "kernels")


class Cell(NamedTuple):
    """A cell of a tutorial: Markdown or Python."""

    markdown: bool
    text: str


def cells(name: str) -> list[Cell]:
    """The cells of a program in the percent format."""
    program = (ROOT / "examples" / f"{name}.py").read_text("utf-8")
    found = []
    for part in re.split(r"^# %%", program, flags=re.MULTILINE)[1:]:
        kind, _, text = part.partition("\n")
        markdown = "[markdown]" in kind
        found.append(Cell(markdown, (re.sub(r"^# ?", "", text, flags=re.MULTILINE) if markdown else text).strip()))
    return found


def write(name: str) -> None:
    """Run a tutorial as a notebook, in an empty folder, and write its page with its pictures."""
    import jupytext
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter
    from traitlets.config import Config

    notebook = jupytext.read(ROOT / "examples" / f"{name}.py")
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, kernel_name="python3", timeout=600, resources={"metadata": {"path": folder}}).execute()
    exporter = MarkdownExporter(config=Config({"NbConvertBase": {"display_data_priority": ["image/png", "text/plain"]}}))
    text, resources = exporter.from_notebook_node(notebook, {"unique_key": name, "output_files_dir": "."})
    for old in PAGES.glob(f"{name}_*.png"):
        old.unlink()
    for file, content in resources["outputs"].items():
        (PAGES / Path(file).name).write_bytes(content)
    (PAGES / f"{name}.md").write_text(tidy(text) + f"\n\nThis page is `examples/{name}.py`, run.\n", "utf-8")


def tidy(page: str) -> str:
    """A page without the bold and italic text of a terminal, and without empty lines around what a cell prints."""
    page = re.sub(r"\x1b\[[0-9;]*m", "", page)
    page = re.sub(r"!\[png\]\((?:\./)?([^)]+)\)", r"![what the cell draws](\1)", page)
    parts = re.split(r"(^```.*?^```$)", page, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", part) for part in parts[::2]]  # what is not code
    return "".join(parts).strip()


def main() -> None:
    if sys.argv[1:2] != ["--write"]:
        sys.exit(__doc__)
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["COLUMNS"] = "100"
    PAGES.mkdir(exist_ok=True)
    for name in sys.argv[2:] or NAMES:
        write(name)
        print(f"wrote docs/tutorials/{name}.md", flush=True)


if __name__ == "__main__":
    main()
