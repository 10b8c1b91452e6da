"""The page on the architecture shows the code as it is, and the rooms keep their rules."""

from __future__ import annotations

import graphlib

from programs import architecture


def test_the_drawing_is_that_of_the_code() -> None:
    assert architecture.PAGE.read_text("utf-8") == architecture.page(), (
        "run `python -m programs.architecture --write` in tests/"
    )


def test_rooms_import_only_what_is_below_them() -> None:
    """Imports at the top of a module make no circle of rooms."""
    below: dict[str, set[str]] = {}
    for (room, imported), lazy in architecture.arrows().items():
        if not lazy:
            below.setdefault(room, set()).add(imported)
    order = list(graphlib.TopologicalSorter(below).static_order())
    assert {"cli", "stream", "tools"} <= set(order[-6:])


def test_implementations_do_not_import_each_other() -> None:
    backends = {"backend.reference", "backend.triton", "backend.cpu"}
    assert not [pair for pair in architecture.arrows() if set(pair) <= backends]
    assert all(
        room == "kernels" or not room.startswith("backend") for room, imported in architecture.arrows() if imported == "cli"
    )


def test_the_neuron_imports_nothing() -> None:
    assert not [pair for pair in architecture.arrows() if pair[0] == "neuron"]
