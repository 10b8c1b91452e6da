"""The pages of the site that are made from the code: ``make docs`` calls this as a hook of mkdocs.

The home page is the README. The page of the command line comes from its options, the tables of keys from the records of
``coba_triton.cli.config``, which read a configuration. Pages of functions come from docstrings, without this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The specimens and kernels of ``tests/budgets.json`` that the page of the kernels shows.
SPECIMENS = {
    "inference": ("forward_kernel",),
    "inference packed": ("forward_kernel",),
    "inference uint8": ("forward_kernel",),
    "inference in chunks": ("speculate_kernel", "repair_kernel", "settle_kernel"),
    "training": ("forward_kernel", "backward_kernel"),
    "training float64": ("forward_kernel", "backward_kernel"),
    "recurrent 100": ("recurrent_forward_kernel", "recurrent_backward_kernel", "driven_kernel", "projection_kernel"),
    "recurrent 1024": ("recurrent_forward_kernel", "shared_backward_kernel"),
    "recurrent 1024, many rows": ("recurrent_backward_kernel",),
    "sparse 4000": ("sparse_forward_kernel", "sparse_backward_kernel"),
}


def home() -> str:
    """The README, with links as they are between the pages."""
    return (ROOT / "README.md").read_text("utf-8").replace("](docs/", "](")


def commands() -> str:
    """The page of the command line."""
    import typer
    from typer.cli import get_docs_for_click

    from coba_triton.cli.app import app

    group = typer.main.get_command(app)
    context = group.make_context("coba-triton", ["--help"], resilient_parsing=True)
    return get_docs_for_click(obj=group, ctx=context, name="coba-triton", title="The command line")


def keys() -> str:
    """Every table of a configuration and its keys, as ``coba-triton simulate --keys`` lists them."""
    from coba_triton.cli.keys import sections

    lines = []
    for section in sections():
        purpose = (section.model.__doc__ or "").strip().partition("\n")[0].replace("``", "`")
        heading = f"`{section.heading}`" if section.heading.startswith("[") else section.heading.capitalize()
        lines += [f"### {heading}", "", purpose, ""]
        if section.keys:
            lines += ["| key | unit or type | default | meaning |", "| --- | --- | --- | --- |"]
            lines += [f"| `{key.name}` | {key.unit} | {key.default} | {key.meaning} |" for key in section.keys] + [""]
    return "\n".join(lines)


def example() -> str:
    """The configuration with all keys and comments that the documentation of the records has."""
    from coba_triton.cli import config

    text = (config.__doc__ or "").split("\n", 2)[2]
    lines: list[str] = []
    inside = False
    for line in text.replace("``", "`").splitlines():
        if line.startswith("    ") and not inside:
            lines += ["```toml"]
            inside = True
        elif line and not line.startswith("    ") and inside:
            while lines[-1] == "":
                lines.pop()
            lines += ["```", ""]
            inside = False
        lines.append(line.removeprefix("    ") if inside else line.removesuffix("::") + ":" * line.endswith("::"))
    return "\n".join([*lines, "```"] if inside else lines)


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls it with the files of docs/; those that are made here join them."""
    from mkdocs.structure.files import File

    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    for name, text in {"index.md": home(), "commands.md": commands(), "changelog.md": changelog}.items():
        files.append(File.generated(config, name, content=text))
    return files


def budgets() -> str:
    """What some kernels were compiled to for sm_90, from ``tests/budgets.json``."""
    content = json.loads((ROOT / "tests" / "budgets.json").read_text("utf-8"))
    rows = [
        f"Triton {content['triton']}, for sm_90:",
        "",
        "| kernel | of | registers | occupancy | instructions | bytes |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for specimen, names in SPECIMENS.items():
        for name in names:
            found = content["budgets"][f"sm_90, {specimen}, {name}"]
            numbers = [found[figure] for figure in ("instructions_per_neuron_step", "bytes_per_neuron_step")]
            cells = [f"`{name}`", specimen, found["registers"], f"{found['occupancy']:.0%}", *numbers]
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls it with the text of every page."""
    for mark, made in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return markdown


MARKS = {
    "<!-- the tables of keys -->": lambda: f"{example()}\n\n## Every table\n\n{keys()}",
    "<!-- the table of budgets -->": budgets,
}
