"""Kernels with a bug, whose programs meet: some schedule must show it, as no schedule shows the kernels without it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Schedules of :func:`.concurrent_interpreter.programs_take_turns`. Under these no program of kernels that are right looks at
# a counter as often as this before the others arrive.
SEEDS = range(3)
PATIENCE = 1500


def load(source: str, edits: dict[str, str], package: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the ``package`` from the edited source, at a path that has no other one.

    Python takes a file that changes within a second for the one before, if it is as long.
    """
    for old, new in edits.items():
        assert old in source, old
        source = source.replace(old, new)
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"{package}.planted", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def assert_every_bug_shows(
    bugs: dict[str, dict[str, str]], plant: Callable[[str, dict[str, str]], None], goes_wrong: Callable[[int], bool]
) -> None:
    """``plant`` puts a bug in the place of the kernels; ``goes_wrong`` says whether a result is wrong under a schedule."""
    assert not any(goes_wrong(seed) for seed in SEEDS)
    for bug, edits in bugs.items():
        plant(bug, edits)
        assert any(goes_wrong(seed) for seed in SEEDS), bug
