"""The pages of the site that are made from the code: ``make docs`` calls this as a hook of mkdocs.

The home page is the README. The page of the command line comes from its options, the tables of keys from the records of
``coba_triton.cli.config``, which read a configuration. Pages of functions come from docstrings, without this file.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[2]
# The specimens and kernels of ``tests/budgets.json`` that the page of the kernels shows.
SPECIMENS = {
    "inference": ("forward_kernel",),
    "inference packed": ("forward_kernel",),
    "inference uint8": ("forward_kernel",),
    "training": ("forward_kernel", "backward_kernel"),
    "training float64": ("forward_kernel", "backward_kernel"),
    "recurrent 100": ("recurrent_forward_kernel", "recurrent_backward_kernel", "driven_kernel", "projection_kernel"),
    "recurrent 1024": ("recurrent_forward_kernel", "recurrent_backward_kernel"),
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


def tables() -> Iterator[tuple[str, Any]]:
    """Every table that a configuration may have: where it stands, and its record."""
    from coba_triton.cli.config import Config

    seen = set()
    waiting = [("", Config)]
    while waiting:
        where, record = waiting.pop(0)
        if (where, record) in seen:
            continue
        seen.add((where, record))
        yield where, record
        for key, field in record.model_fields.items():
            for inner, several in records_in(field.annotation):
                waiting.append((f"{where}.{key}".strip(".") + "[]" * several, inner))


def records_in(annotation: Any, several: bool = False) -> Iterator[tuple[Any, bool]]:
    """The records within a type, and whether there may be several of each."""
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        yield annotation, several
    for part in get_args(annotation):
        yield from records_in(part, several or get_origin(annotation) is list)


def value(annotation: Any, metadata: Any = ()) -> str:
    """What may be written for a type, in words."""
    from coba_triton.cli.config import Unit

    for unit in metadata:
        if isinstance(unit, Unit):
            other = f", or in {unit.or_else}" if unit.or_else else ""
            sign = {"positive": " above 0", "not negative": ", 0 or more", "any": ""}[unit.sign]
            return f'{unit.kind}{sign}, such as `"{unit.example}"`{other}'
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return value(parts[0], parts[1:])
    if origin in (Union, types.UnionType):
        words = dict.fromkeys(value(part) for part in parts if part is not type(None))
        return " or ".join(words)
    if origin is Literal:
        return " or ".join(f'`"{part}"`' for part in parts)
    if origin is list:
        return f"a list: {value(parts[0])}"
    if hasattr(annotation, "model_fields"):
        name = name_of(annotation)
        return f"table [{name}](#{re.sub(r'[^a-z ]', '', name.lower()).replace(' ', '-')})"
    limits = limits_of(metadata)
    if annotation is Path:
        return "a path, relative to the configuration"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "`true` or `false`", Any: "a table"}
    return names[annotation] + limits


def limits_of(metadata: Any) -> str:
    signs = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    found = [
        f"{word} {getattr(mark, sign):g}" for mark in flat(metadata) for sign, word in signs.items() if hasattr(mark, sign)
    ]
    return f", {' and '.join(found)}" if found else ""


def flat(metadata: Any) -> Iterator[Any]:
    """Marks of a type, those within a pydantic field as well."""
    for mark in metadata:
        yield from flat(mark.metadata) if hasattr(mark, "metadata") else (mark,)


def name_of(record: Any) -> str:
    """The name of a record; one for numbers of any unit has the unit with it."""
    name, bracket, _ = record.__name__.partition("[")
    marks = [mark for field in record.model_fields.values() for mark in field.metadata]
    return f"{name} ({next(mark.symbol for mark in marks if hasattr(mark, 'symbol'))})" if bracket else name


def keys() -> str:
    """Every table of a configuration with its keys, what may be written for them, and what holds without them."""
    pages = []
    grouped: dict[Any, list[str]] = {}
    for where, record in tables():
        grouped.setdefault(record, []).append(where)
    for record, places in grouped.items():
        places = [f"`[[{place[:-2]}]]`" if place.endswith("[]") else f"`[{place}]`" for place in places if place]
        title = name_of(record)
        rows = ["| key | value | default |", "| --- | --- | --- |"]
        for key, field in record.model_fields.items():
            default = "required" if field.is_required() else shown(field.get_default())
            rows.append(f"| `{key}` | {value(field.annotation, field.metadata)} | {default} |")
        text = (record.__doc__ or "").strip().partition("\n")[0].replace("``", "`")
        where = f"In {', '.join(places)}. " if places else "The whole file. "
        pages.append("\n".join([f"### {title}", "", where + text, "", *rows, ""]))
    return "\n".join(pages)


def shown(default: Any) -> str:
    if default is None or default in ("", []):
        return "none"
    if hasattr(type(default), "model_fields"):
        return "as if it were empty"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f'`"{default}"`' if isinstance(default, str) else f"`{default}`"


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
