"""The compile matrix: every launch that the package makes compiles for every GPU, without a spill or a barrier.

What each compiled kernel needs is measured by ``compile_targets.py`` in processes of its own, as Triton's interpreter
is on in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from compile_targets import RECURRENT_SPECIMENS, SPECIMENS, TARGETS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is packaged for Linux"),
]
SCRIPT = Path(__file__).with_name("compile_targets.py")


def compile_all(target: str) -> list[dict[str, Any]]:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, SCRIPT, target], env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"compiling for {target} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def matrix() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(target, specimen) to the figures of its kernels."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for rows in pool.map(compile_all, TARGETS) for row in rows]
    table: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        table.setdefault((row["target"], row["specimen"]), []).append(row)
    return table


@pytest.mark.parametrize("specimen", SPECIMENS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills_and_barriers(target: str, specimen: str, matrix) -> None:
    rows = matrix[target, specimen]
    kernels = [row["kernel"] for row in rows]
    assert kernels == ["forward_kernel", "backward_kernel"][: 2 if SPECIMENS[specimen].get("train") else 1]
    for row in rows:
        assert row["instructions"] > 100
        clean = {name: row[name] for name in ("stack", "spills", "shared", "barriers")}
        assert clean == {"stack": 0, "spills": 0, "shared": 0, "barriers": 0}, row
        assert row.get("fused", 0) == 0, "a multiplication and an addition were fused: they must round twice"


@pytest.mark.parametrize("specimen", RECURRENT_SPECIMENS)
@pytest.mark.parametrize("target", TARGETS)
def test_recurrent_kernels_compile_without_spills(target: str, specimen: str, matrix) -> None:
    rows = matrix[target, specimen]
    options = RECURRENT_SPECIMENS[specimen]
    kernels = {row["kernel"] for row in rows}
    dense, sliced = (options.get("path") == path for path in ("dense", "sliced"))
    forward = "driven_kernel" if dense else "sliced_forward_kernel" if sliced else "recurrent_forward_kernel"
    assert forward in kernels and ("recurrent_backward_kernel" in kernels) == options.get("train", False)
    for row in rows:
        assert (row["stack"], row["spills"], row.get("fused", 0)) == (0, 0, 0), row
