"""The tests of ``dry/``: what calls on a GPU launch, and that the host waits for nothing, on a driver that executes nothing.

They run in a process of their own, as Triton's interpreter is on in this one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton compiles and launches the kernels, and it is not installed")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="a C compiler builds the driver, on Linux")
def test_calls() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "COBA_TRITON_DRY": "1", "OMP_NUM_THREADS": "1"}
    arguments = [
        "-q",
        "--show-capture=no",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "dry/test_calls.py",
    ]
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(command)} failed:\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}", pytrace=False)
