"""The README and the pages of docs/: every block of Python runs alone, and every command and configuration is a right one.

A block runs in a folder of its own and with nothing but what it imports. One that imports a package that is optional and not
installed is skipped.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from coba_triton.cli.config import Config
from coba_triton.cli.keys import sections
from programs import pages

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONAL = {"norse": "coba-triton[norse]", "pyNN": "coba-triton[pynn]", "neo": "coba-triton[neo]", "sklearn": "scikit-learn"}
TUTORIALS = ROOT / "docs" / "tutorials"  # test_tutorials.py runs those


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The blocks of a language on a page, and the lines on which they begin."""
    text = page.read_text("utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text[: match.start(1)].count("\n") + 1, match[1]


def everywhere(language: str) -> list[Any]:
    """All blocks of a language, as parameters of a test."""
    found = []
    for page in PAGES:
        if page.parent != TUTORIALS:
            found += [
                pytest.param(page, line, block, id=f"{name_of(page)}:{line}") for line, block in blocks(page, language)
            ]
    return found


def imported(block: str) -> set[str]:
    """The packages that a block imports."""
    names = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    names = {"pyNN" if name == "coba_triton.pynn" else name for name in names}
    return {name.partition(".")[0] for name in names}


def of_the_published_network(names: dict[str, Any]) -> None:
    assert names["spikes"].shape == (2000, 1, 4000)
    assert 8 < names["spikes"][1000:].float().mean() / 0.1e-3 < 25


def of_the_trained_classifier(names: dict[str, Any]) -> None:
    """28 runs had 91 % at the least."""
    assert names["loss_and_hits"](names["test"])[1].mean() > 0.9


def of_the_trained_rate(names: dict[str, Any]) -> None:
    assert 8 < names["rate"] < 12


# What the names of a block must be after it: of the block that has this text.
CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "# Brette et al. 2007, benchmark 1": of_the_published_network,
    "from sklearn.datasets import load_digits": of_the_trained_classifier,
    "# wanted: 10 Hz": of_the_trained_rate,
}


@pytest.mark.filterwarnings("default::DeprecationWarning:norse")
@pytest.mark.parametrize(("page", "line", "block"), everywhere("python"))
def test_block_runs_alone(page: Path, line: int, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in sorted(imported(block) & OPTIONAL.keys()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is optional: pip install '{OPTIONAL[package]}'")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    program = ast.increment_lineno(ast.parse(block), line - 1)  # so that errors name the page's lines
    exec(compile(program, page, "exec"), names)
    for text, check in CHECKS.items():
        if text in block:
            check(names)


def test_checks_are_of_blocks_that_there_are() -> None:
    for text in CHECKS:
        assert sum(text in parameters.values[2] for parameters in everywhere("python")) == 1, text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_right_ones(page: Path) -> None:
    """The commands, their options and their values are known, and extras exist; nothing is run."""
    import typer

    from coba_triton.cli.app import app

    text = page.read_text("utf-8")
    group = typer.main.get_command(app)
    for command in re.findall(r"^(?:\$ |    )coba-triton (.*)$", text, re.MULTILINE):
        arguments = shlex.split(command, comments=True)
        if not arguments[0].startswith("-"):
            assert arguments[0] in group.commands, f"{page}: {command}"
            group.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for named in re.findall(r"(?:coba-triton|\.)\[([a-z,]+)\]\"", text):
        assert set(named.split(",")) <= extras.keys(), f"{page}: {named}"


@pytest.mark.parametrize(("page", "line", "block"), everywhere("toml"))
def test_configurations_are_right_ones(page: Path, line: int, block: str) -> None:
    Config.model_validate(tomllib.loads(block))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Files are there. mkdocs looks at the links between pages and their headings."""
    made = {"index.md", "commands.md", "changelog.md"}
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target and target not in made:
            assert (page.parent / target).exists(), f"{page}: {target}"


# Files that a page names and that are not in this repository: what they are.
ELSEWHERE = {"pyNN/coba_triton.py": "a file that a reader may add to PyNN"}
MADE = ("out/",)  # folders in which the examples write
FILE = re.compile(r"[\w.*-]+(?:/[\w.*-]+)+\.(?:c|cff|cpp|h|in|ipynb|json|md|npz|png|py|toml|txt|yml)")


def files_named_on(page: Path) -> set[str]:
    """What stands in backticks on a page, has a slash, and ends as a file does; blocks of code are left out."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    words = [word for quoted in re.findall(r"`([^`]+)`", text) for word in quoted.split()]
    return {word for word in words if FILE.fullmatch(word) and word not in ELSEWHERE and not word.startswith(MADE)}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name_of)
def test_files_that_are_named_are_there(page: Path) -> None:
    """From the root of the repository, the folder of the page, the package, or the backends, which pages shorten to."""
    bases = (ROOT, page.parent, ROOT / "coba_triton", ROOT / "coba_triton" / "backend")
    for named in files_named_on(page):
        assert any(next(base.glob(named), None) for base in bases), f"{page}: there is no file {named}"


def test_the_search_for_named_files_finds_some() -> None:
    assert {"coba_triton/stream/store.py", "tests/stream/test_resume.py"} <= files_named_on(ROOT / "docs" / "reliability.md")


def test_every_picture_is_on_a_page() -> None:
    shown = "".join(page.read_text("utf-8") for page in PAGES)
    for picture in (ROOT / "docs").rglob("*.png"):
        assert f"{picture.name})" in shown, picture


def test_readme_is_short_and_says_first_on_which_gpu_it_was_measured() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 120
    assert any("On GPUs" in line and "H100" in line for line in lines[:12])


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in PAGES[1:]:
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in menu, page


def test_every_key_is_documented() -> None:
    """The keys of all tables are in those of the page, and in its commented example."""
    tables, example = pages.keys(), pages.example()
    for section in sections():
        for key in section.model.model_fields:
            assert f"| `{key}` |" in tables or f"{key} = " in section.heading or section.model is Config, key
            assert re.search(rf"\b{key}\b", example), f"{section.heading} {key}"


def test_every_command_is_documented() -> None:
    import typer

    from coba_triton.cli.app import app

    text = pages.commands()
    for name, command in typer.main.get_command(app).commands.items():
        assert f"## `coba-triton {name}`" in text
        for parameter in command.params:
            for option in parameter.opts:
                assert f"`{option}" in text or f" {option}" in text or option == parameter.name, (name, option)


def test_every_public_name_is_documented() -> None:
    import coba_triton

    reference = "\n".join(page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    for name in coba_triton.__all__:
        assert name == "__version__" or f"::: coba_triton.{name}\n" in reference, name


def test_budgets_of_the_page_are_there() -> None:
    table = pages.budgets()
    assert len(table.splitlines()) == 4 + sum(map(len, pages.SPECIMENS.values()))
