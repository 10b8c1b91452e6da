"""The compile matrix: every launch that the package makes compiles for every GPU, without a spill or a barrier.

What each compiled kernel needs is measured by ``budgets.py`` in processes of its own, as Triton's interpreter is on in this
one.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels, and it is not installed")
import triton

from coba_triton.tools.compiler import TARGETS
from programs import budgets
from programs.compile_targets import RECURRENT_SPECIMENS, SPARSE_SPECIMENS, SPECIMENS, specimens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is packaged for Linux"),
]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    """Target to the figures of every kernel of every specimen."""
    return budgets.measure_all(tuple(TARGETS))


@pytest.fixture(scope="module")
def matrix(rows) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(target, specimen) to the figures of its kernels."""
    table: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for target, kernels in rows.items():
        for row in kernels:
            table.setdefault((target, row["specimen"]), []).append(row)
    return table


@pytest.mark.parametrize(("target", "specimen"), [(t, s) for t in TARGETS for s in specimens(t) if s in SPECIMENS])
def test_compiles_without_spills_and_barriers(target: str, specimen: str, matrix) -> None:
    rows = matrix[target, specimen]
    forward, backward = {"forward_kernel"}, {"backward_kernel"}
    if "time_chunks" in SPECIMENS[specimen]:
        forward, backward = ({f"{name}{way}_kernel" for name in ("speculate", "repair", "settle")} for way in ("", "_back"))
    assert {row["kernel"] for row in rows} == forward | (backward if SPECIMENS[specimen].get("train") else set())
    for row in rows:
        assert row["instructions"] > 100
        clean = {name: row[name] for name in ("stack", "spills", "shared", "barriers")}
        assert clean == {"stack": 0, "spills": 0, "shared": 0, "barriers": 0}, row
        assert row.get("fused", 0) == 0, "a multiplication and an addition were fused: they must round twice"


@pytest.mark.parametrize(("target", "specimen"), [(t, s) for t in TARGETS for s in specimens(t) if s in RECURRENT_SPECIMENS])
def test_recurrent_kernels_compile_without_spills(target: str, specimen: str, matrix) -> None:
    rows = matrix[target, specimen]
    options = RECURRENT_SPECIMENS[specimen]
    kernels = {row["kernel"] for row in rows}
    dense, sliced = (options.get("path") == path for path in ("dense", "sliced"))
    forward = "driven_kernel" if dense else "sliced_forward_kernel" if sliced else "recurrent_forward_kernel"
    shared = ("recurrent 256 everything", "recurrent 256 refractory", "recurrent 1024")
    together = ("held" in specimen or "streamed" in specimen or specimen in shared) and target.startswith("sm")
    backward = "shared_backward_kernel" if together else "recurrent_backward_kernel"
    found = kernels & {"shared_backward_kernel", "recurrent_backward_kernel"}
    assert forward in kernels and found == ({backward} if options.get("train") else set())
    for row in rows:
        assert (row["stack"], row["spills"], row.get("fused", 0)) == (0, 0, 0), row


@pytest.mark.parametrize(("target", "specimen"), [(t, s) for t in TARGETS for s in specimens(t) if s in SPARSE_SPECIMENS])
def test_sparse_kernels_compile_without_spills(target: str, specimen: str, matrix) -> None:
    rows = matrix[target, specimen]
    options = SPARSE_SPECIMENS[specimen]
    expected = {"compact_kernel", "scatter_kernel", "sparse_forward_kernel"}
    if options.get("inputs", 40):
        expected |= {"sparse_projection_kernel", "sums_to_drive_kernel"}
    if options.get("train"):
        expected |= {"driven_kernel", "sparse_backward_kernel", "source_gradient_kernel", "synapse_gradient_kernel"}
    assert {row["kernel"] for row in rows} == expected
    for row in rows:
        assert (row["stack"], row["spills"], row.get("fused", 0)) == (0, 0, 0), row


@pytest.mark.parametrize("target", budgets.BUDGETED)
def test_no_figure_is_worse_than_its_budget(target: str, rows) -> None:
    """Registers, occupancy, and the instructions and bytes of the time loops are those of ``budgets.json``, or better."""
    version, committed = budgets.read()
    if version != triton.__version__:
        pytest.skip(f"the budgets hold for Triton {version}, installed is {triton.__version__}")
    here = {key: row for key, row in committed.items() if key.startswith(f"{target},")}
    worse, _ = budgets.differences(here, budgets.keyed({target: rows[target]}))
    assert not worse, "\n".join(["`make budgets` accepts these figures, and shows them:", *worse])


def test_only_conversions_of_bfloat16_have_other_ptx_for_sm_90_than_for_sm_80(rows) -> None:
    """So ``compiled/`` is executed as for sm_80, and what differs also as for sm_90."""
    code = [{(row["specimen"], row["kernel"]): row["ptx"] for row in rows[target]} for target in ("sm_80", "sm_90")]
    assert {key for key in code[0] if code[0][key] != code[1][key]} == {
        ("training heaviside bfloat16", "backward_kernel"),
        ("sparse 256 everything", "sparse_projection_kernel"),
    }


def test_a_worse_figure_is_told_from_a_better_one() -> None:
    budget = {"kernel": {"registers": 40, "occupancy": 0.5, "loop": {"instructions": 90, "barrier": 0}}}
    better = {"kernel": {"registers": 32, "occupancy": 0.75, "loop": {"instructions": 80}}}
    assert budgets.differences(budget, budget) == ([], [])
    assert budgets.differences(budget, better)[0] == [] and len(budgets.differences(budget, better)[1]) == 3
    assert budgets.differences(better, budget)[0] == ["kernel: occupancy 0.75 -> 0.5", "kernel: registers 32 -> 40"]
    barrier = {"kernel": {"registers": 40, "occupancy": 0.5, "loop": {"instructions": 90, "barrier": 1}}}
    assert budgets.differences(budget, barrier)[0] == ["kernel: barrier in the loop 0 -> 1"]
    assert budgets.differences(budget, {})[0] == ["kernel: compiled no more"]
