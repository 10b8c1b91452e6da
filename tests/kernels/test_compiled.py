"""The tests of ``compiled/``: kernels as they are compiled for a GPU, executed on the CPU by ``ptxsim``.

Each run is a process of its own, as Triton's interpreter is on in this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels, and it is not installed")

from helpers.marks import slow
from ptxsim import build

TESTS = Path(__file__).parents[1]


def execute(arch: int, file: str, *arguments: str) -> None:
    """Run a file of ``compiled/`` as for one GPU architecture; its failures are this test's."""
    try:
        build.compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    pytest_arguments = ["-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    # small problems: to compile takes longer than to execute
    executor = ["-m", "ptxsim", "--arch", str(arch), "--optimise=-O0"]
    command = [sys.executable, *executor, *pytest_arguments, f"compiled/{file}", *arguments]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(command)} failed:\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}", pytrace=False)


RAGGED = "ragged or sliced"


def test_ragged_programs() -> None:
    execute(80, "test_kernels.py", "-k", RAGGED)


def test_kernels() -> None:
    """All others."""
    execute(80, "test_kernels.py", "-k", f"not ({RAGGED})")


@pytest.mark.slow
def test_kernels_where_sm_90_differs() -> None:
    """``test_compile.py`` compares the PTX: it is sm_80's but for the rounding of gradients to bfloat16.

    The atomic operations of programs that meet differ between these GPUs.
    """
    execute(90, "test_kernels.py", "-k", "bfloat16 or slices or sliced or sweep or together")


@pytest.mark.parametrize("arch", [80, *slow(90)])
def test_sparse_kernels(arch: int) -> None:
    """Of sparse networks; atomic operations and what is held in registers differ between these GPUs."""
    execute(arch, "test_sparse_kernels.py")


@pytest.mark.slow
def test_the_executor() -> None:
    execute(80, "test_ptxsim.py", "compiled/test_fast_compiler.py")


@pytest.mark.slow
def test_the_executor_where_sm_90_compiles_differently() -> None:
    """Warp-group matrix products, other conversions, native half-precision atomics."""
    execute(90, "test_ptxsim.py", "-k", "dot or bf16 or atomics or barrier")
