"""The tutorials run, and their pages show what they say, print and draw now.

``python -m programs.tutorials --write`` wrote the pages. Times differ from run to run, and the last digits from machine to
machine, so numbers on a page may differ from those that a program prints now by as much as ``TOLERANCE`` says.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coba_triton.tuning.tables import cpu_name
from helpers.marks import slow
from programs import tutorials

NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?")
TOLERANCE = 0.1  # of a number; accuracies and fits move by less
# What is measured, and differs in every run, or is chaotic, as training with a surrogate that does not suit: lines with
# these words are compared without their numbers.
MEASURED = re.compile(r"wall time|\d s$|super, alpha")
# Lines that not every run prints: compiled code is kept, norse is optional, a machine has its own parameters to try, and a
# legend explains only what stands above it.
CHANCE = re.compile(
    r"compiling|^ *[am]: [am]|norse|Best:|Nothing is faster|^│(?! (num_warps|reference|cpu|compiled)|.*chunking)"
)


def printed(page: str) -> str:
    """What the cells of a page print: blocks that are indented and no code, without pictures."""
    without_code = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(line[4:] for line in without_code.splitlines() if line.startswith("    "))


def lines(text: str) -> list[str]:
    """Lines without blanks at their ends and without empty ones; frames of tables have the width of their numbers."""
    found = [re.sub(r"[━─┏┓┡┩└┘┌┐┳╇┴┬┼╈┻]+", "", line) for line in text.splitlines()]
    return [re.sub(r"\s+", " ", line).strip() for line in found if line.strip() and line.strip() != "Figure"]


def words(text: list[str]) -> set[str]:
    """The words of all lines but those that chance decides on, without those that have numbers."""
    kept = (word for line in text if not CHANCE.search(line) for word in line.split() if not NUMBER.search(word))
    return set(kept) - {"a", "m"}  # what limits a time: arithmetic or memory, as it happens


@pytest.mark.parametrize("name", tutorials.NAMES)
def test_page_has_the_program(name: str) -> None:
    page = (tutorials.PAGES / f"{name}.md").read_text("utf-8")
    at = 0
    for cell in tutorials.cells(name):
        code = cell.text.replace("# %matplotlib inline", "%matplotlib inline")
        shown = cell.text if cell.markdown else f"```python\n{code}\n```"
        assert shown in page[at:], f"{name}: run make tutorials; this cell is another on the page:\n{cell.text}"
        at += page[at:].index(shown) + len(shown)


@pytest.mark.parametrize("name", tutorials.NAMES)
def test_page_has_pictures(name: str) -> None:
    page = (tutorials.PAGES / f"{name}.md").read_text("utf-8")
    named = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", page))
    assert named == {path.name for path in tutorials.PAGES.glob(f"{name}_*.png")}
    assert (name == "kernels") == (not named)


@pytest.mark.parametrize("name", slow(*tutorials.NAMES))
def test_program_prints_what_the_page_shows(name: str, tmp_path: Path) -> None:
    if name == "kernels":
        pytest.importorskip("triton")
    environment = os.environ | {"MPLBACKEND": "agg", "COLUMNS": "100", "TRITON_INTERPRET": "0"}
    program = tutorials.ROOT / "examples" / f"{name}.py"
    done = subprocess.run([sys.executable, program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    now = lines(done.stdout.replace(cpu_name(), "AMD EPYC"))
    then = lines(printed((tutorials.PAGES / f"{name}.md").read_text("utf-8")))
    now, then = ([line for line in text if "compiling" not in line] for text in (now, then))
    if name == "kernels":  # a notebook breaks lines elsewhere
        assert words(now) == words(then), "run make tutorials"
        return
    assert [NUMBER.sub("#", line) for line in now] == [NUMBER.sub("#", line) for line in then], "run make tutorials"
    for new, old in zip(now, then, strict=True):
        if not MEASURED.search(old):
            for a, b in zip(NUMBER.findall(new), NUMBER.findall(old), strict=True):
                a, b = (float(number.replace(",", "").replace("−", "-")) for number in (a, b))
                assert abs(a - b) <= TOLERANCE * abs(b) + 0.05, f"{new!r} now, {old!r} on the page: run make tutorials"
