"""Draw which room of the package imports which, from the imports in the code: ``python -m programs.architecture --write``.

The drawing is a part of ``docs/architecture.md``, in Mermaid. A dotted arrow is an import within a function: the room is
imported when it is first needed.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = "coba_triton"
# Rooms that are more than a file or a folder of the package, and those that the drawing leaves out.
SPLIT = ("backend",)
LEFT_OUT = (
    *("", "common", "__init__", "__main__", "_old_names", "_public"),
    *("backend.__init__", "backend.choose", "backend.protocol"),
)


def files() -> Iterator[tuple[str, Path]]:
    """Every module by its name within the package."""
    for folder, prefix in ((ROOT / PACKAGE, ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if not (folder.name == PACKAGE and parts[0] == "kernels"):  # the link to kernels/
                yield prefix + ".".join(parts), path


def room_of(module: str, known: set[str]) -> str:
    """The room of a module: its folder, or the file itself; a folder in ``SPLIT`` has a room for each of its entries."""
    first, _, rest = module.partition(".")
    if first in SPLIT and rest and (inner := rest.partition(".")[0]) in known:
        return f"{first}.{inner}"
    return first


def imports(module: str, path: Path) -> Iterator[tuple[str, bool]]:
    """The modules of the package that a module imports, and whether it does so only within a function."""
    tree = ast.parse(path.read_text("utf-8"))
    within = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = package[:-1] if path.name == "__init__.py" else package
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing:
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
        elif (node.module or "").split(".")[0] == PACKAGE:
            base = []
        else:
            continue
        name = (node.module or "").removeprefix(PACKAGE).strip(".") if not node.level else node.module or ""
        prefix = ".".join([*base, *([name] if name else [])])
        for alias in node.names:
            yield ".".join(filter(None, (prefix, alias.name))), id(node) in within


@functools.cache
def arrows() -> dict[tuple[str, str], bool]:
    """(room, room that it imports) to whether this happens only within functions."""
    modules = dict(files())
    names = set(modules)
    inner = {name.split(".")[1] for name in names if name.split(".")[0] in SPLIT}
    found: dict[tuple[str, str], bool] = {}
    for module, path in modules.items():
        for imported, lazy in imports(module, path):
            target = imported
            while target and target not in names and f"{target}.__init__" not in names:
                target = target.rpartition(".")[0]
            pair = room_of(module, inner), room_of(target, inner)
            if pair[0] != pair[1] and not set(pair) & set(LEFT_OUT):
                found[pair] = found.get(pair, True) and lazy
    return found


def shortest(found: dict[tuple[str, str], bool]) -> dict[tuple[str, str], bool]:
    """The arrows that do not follow from others: if a room imports b, and b imports c, the room may import c as well."""

    def leads(start: str, end: str, direct: bool) -> bool:
        steps = [imported for (room, imported), lazy in found.items() if room == start and not lazy]
        return any((step == end and not direct) or (step != end and leads(step, end, False)) for step in steps)

    return {pair: lazy for pair, lazy in found.items() if not leads(*pair, True)}


def drawing() -> str:
    """The drawing in Mermaid."""
    lines = ["```mermaid", "graph TD"]
    for (room, imported), lazy in sorted(shortest(arrows()).items()):
        ends = (f'{name.replace(".", "_")}["{name.replace(".", "/")}"]' for name in (room, imported))
        lines.append(("    {} -.-> {}" if lazy else "    {} --> {}").format(*ends))
    return "\n".join([*lines, "```"])


def page() -> str:
    """The page with the drawing as it is now."""
    before, _, rest = PAGE.read_text("utf-8").partition("```mermaid")
    return before + drawing() + rest.partition("```")[2]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), "utf-8")
    else:
        print(drawing())
