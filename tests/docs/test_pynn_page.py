"""``docs/pynn.md`` names the models that there are."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

import coba_triton.pynn as sim

PAGE = (Path(__file__).parents[2] / "docs" / "pynn.md").read_text("utf-8")


def test_models_that_there_are() -> None:
    there = PAGE[: PAGE.index("## What exactly is computed")]
    currents = ["ACSource", "DCSource", "NoisyCurrentSource", "StepCurrentSource"]
    for name in [*sim.list_standard_models(), "StaticSynapse", *currents]:
        assert f"`{name}`" in there, name
