"""Run what depends on torch, triton and numpy with each set of versions that is supported, and print a table.

``python tests/programs/matrix.py`` makes an environment for each set in ``.matrix/``, which later runs use again; it
downloads gigabytes, as torch 2.11 is on PyPI as a CUDA build alone. ``--only 3.6`` runs the sets whose names contain this.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".matrix"


class Versions(NamedTuple):
    """A set of versions that is supported together."""

    python: str
    torch: str
    triton: str
    numpy: str

    @property
    def name(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self._asdict().items())


# Triton 3.6's interpreter fails with numpy from 2.4 on: there the tests that need it are skipped.
SETS = (
    Versions("3.12", "2.11.0", "3.6.0", "2.5.2"),
    Versions("3.11", "2.11.0", "3.6.0", "2.3.5"),
    Versions("3.11", "2.13.0", "3.6.0", "2.3.5"),
    Versions("3.11", "2.13.0", "3.7.1", "2.4.6"),
    Versions("3.12", "2.13.0", "3.9.0", "2.5.2"),
)
# Name to the files, and the variables of a process that runs them.
SUITES: dict[str, tuple[list[str], dict[str, str]]] = {
    "calls": (["dry/test_calls.py"], {"TRITON_INTERPRET": "0", "COBA_TRITON_DRY": "1"}),
    "executed": (["kernels/test_compiled.py"], {}),
    "interpreter": (
        [
            *("kernels/test_feed_forward_kernels.py", "kernels/test_recurrent.py", "kernels/test_recurrent_kernels.py"),
            *("kernels/test_sparse_kernels.py", "kernels/test_time_chunk_kernels.py"),
        ],
        {},
    ),
    "CPU path": (["backend/test_cpu.py", "backend/test_cpu_recurrent.py"], {}),
    "PyTorch": (
        [
            "ops/test_operators.py",
            "ops/test_transforms.py",
            "bench/test_training.py",
            "backend/test_backends.py",
            "test_modules.py",
        ],
        {},
    ),
}


def find_python(version: str) -> str | None:
    """A Python of this version: on the path, beside the running one, or among pyenv's."""
    beside = Path(sys.base_prefix).parent
    found = [shutil.which(f"python{version}"), *map(str, sorted(beside.glob(f"{version}.*/bin/python{version}")))]
    return next((path for path in found if path and _is_version(path, version)), None)


def _is_version(path: str, version: str) -> bool:
    done = subprocess.run([path, "--version"], capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.startswith(f"Python {version}.")


def make(versions: Versions) -> Path | str:
    """The interpreter of an environment with these versions, made if it is not there; or why there is none."""
    folder = ENVIRONMENTS / re.sub(r"[^0-9.]+", "-", versions.name).strip("-")
    python, complete = folder / "bin" / "python", folder / ".complete"
    if not complete.exists():
        base = find_python(versions.python)
        if base is None:
            return f"no Python {versions.python} here"
        subprocess.run([base, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        pins = f"torch=={versions.torch}", f"numpy=={versions.numpy}", "-e", ".[test]"
        # CUDA builds of torch ask for the one Triton that they bring
        for command in ([*pip, *pins], [*pip, "--no-deps", f"triton=={versions.triton}"]):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                return next((line for line in done.stderr.splitlines() if line.startswith("ERROR: No")), "pip failed")
        complete.touch()
    return python


def run(python: Path, suite: str) -> str:
    """A cell of the table: what pytest counted."""
    files, variables = SUITES[suite]
    command = [str(python), "-m", "pytest", "-q", "-m", "not slow", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist"] if suite in ("calls", "executed") else ["-n", "2"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, *files], cwd=ROOT / "tests", env=os.environ | variables, capture_output=True, text=True
    )  # fmt: skip
    log = python.parents[1] / f"{suite.replace(' ', '-')}.log"
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    last = (done.stdout.strip().splitlines() or ["nothing was said"])[-1].strip("= ")
    counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)", last)) or last
    return f"{counts}, {time.monotonic() - started:.0f} s" + ("" if done.returncode == 0 else f" (see {log})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="run the sets of versions whose names contain this")
    arguments = parser.parse_args()
    print("| | " + " | ".join(SUITES) + " |", flush=True)
    print("| --- |" + " --- |" * len(SUITES), flush=True)
    broken = False
    for versions in SETS:
        if arguments.only not in versions.name:
            continue
        python = make(versions)
        cells = [python if isinstance(python, str) else run(python, suite) for suite in SUITES]
        broken |= any("(see " in cell for cell in cells) or isinstance(python, str)
        print(f"| {versions.name} | " + " | ".join(cells) + " |", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
