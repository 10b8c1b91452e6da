"""``docs/norse.md``: its blocks run one after the other; those that need norse do where it is installed."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "norse.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def run(blocks: list[str]) -> dict[str, Any]:
    """Run blocks in one namespace; errors name the page's lines."""
    names: dict[str, Any] = {}
    text = PAGE.read_text("utf-8")
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile(ast.increment_lineno(ast.parse(block), line), PAGE, "exec"), names)
    return names


def test_page_runs_without_norse() -> None:
    """All blocks but those that import norse, or use what they made."""
    names = run([block for block in BLOCKS if "norse" not in block])
    assert names["spikes"].shape == (500, 8, 20)


def test_page_runs_with_norse() -> None:
    pytest.importorskip("norse", reason="norse is optional: pip install 'coba-triton[norse]'")
    names = run(BLOCKS)
    assert names["before"].any() and names["p"].alpha == 1.0
