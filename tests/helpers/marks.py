"""Marks of the tests."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """Values of one parameter that ``-m "not slow"`` leaves out."""
    return slow_cases(*((value,) for value in values))


def slow_cases(*cases: tuple[Any, ...]) -> list[Any]:
    """Values of several parameters that ``-m "not slow"`` leaves out."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]
