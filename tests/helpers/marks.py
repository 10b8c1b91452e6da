"""Marks of the tests."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """Values of one parameter that ``-m "not slow"`` leaves out."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
