"""``docs/pynn.md``: its program runs, and it names the models that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

import coba_triton.pynn as sim

PAGE = (Path(__file__).parents[2] / "docs" / "pynn.md").read_text("utf-8")


def test_program(capsys: pytest.CaptureFixture[str]) -> None:
    program, stub = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    exec(compile(program, "docs/pynn.md", "exec"), {})
    rate, shape = capsys.readouterr().out.splitlines()
    assert 5 < float(rate.split()[0]) < 100 and shape == "(201, 2)"
    names: dict[str, object] = {}
    exec(stub, names)
    assert names["Population"] is sim.Population


def test_models_that_there_are() -> None:
    there = PAGE[: PAGE.index("## What exactly is computed")]
    currents = ["ACSource", "DCSource", "NoisyCurrentSource", "StepCurrentSource"]
    for name in [*sim.list_standard_models(), "StaticSynapse", *currents]:
        assert f"`{name}`" in there, name
