"""``bench/networks.py`` and its peers: the same network, the same spikes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "bench"
PEERS = BENCH / "peers"


def run(script: Path, *arguments: Any, python: str = sys.executable) -> dict[str, Any]:
    """The JSON that a script prints last."""
    done = subprocess.run([python, script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def python_with(module: str) -> str:
    """The Python that has a peer: this one, or the one that an environment variable such as ``BRIAN2_PYTHON`` names."""
    named = os.environ.get(f"{module.upper()}_PYTHON")
    if named is None and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is optional: bench/peers/README.md")
    return named or sys.executable


@pytest.fixture(scope="module")
def va(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of Brette et al. (2007)."""
    path = tmp_path_factory.mktemp("networks") / "va.npz"
    subprocess.run([sys.executable, PEERS / "network.py", "va", path], check=True, capture_output=True)
    return path


def spikes_of(path: Path) -> set[tuple[int, int]]:
    with np.load(path) as file:
        steps = file["steps"] if "steps" in file.files else np.round(file["times"] / 0.1).astype(int)
        return set(zip(steps.tolist(), file["neurons"].tolist(), strict=True))


def test_benchmark_runs(va: Path, tmp_path: Path) -> None:
    found = run(BENCH / "networks.py", va, "--seconds", 0.3, "--spikes", tmp_path / "spikes.npz")
    assert found["neurons"] == 4000 and found["spikes"] == len(spikes_of(tmp_path / "spikes.npz"))
    assert found["bytes_per_synapse"] < 4.2
    assert 8 < found["rate_exc"] < 25 and found["wall"] > 0


def test_spikes_are_those_of_brian2(va: Path, tmp_path: Path) -> None:
    """With forward Euler in double precision, every spike is in the same step."""
    python = python_with("brian2")
    ours = run(BENCH / "networks.py", va, "--seconds", 0.5, "--dtype", "float64", "--spikes", tmp_path / "ours.npz")
    theirs = run(
        PEERS / "brian2_va.py",
        va,
        "--seconds",
        0.5,
        "--spikes",
        tmp_path / "theirs.npz",
        "--directory",
        tmp_path / "build",
        python=python,
    )
    assert spikes_of(tmp_path / "ours.npz") == spikes_of(tmp_path / "theirs.npz")
    assert ours["spikes"] > 20_000
    for name in ("rate_exc", "rate_inh", "cv"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6)


def test_rates_are_those_of_nest(va: Path, tmp_path: Path) -> None:
    """NEST solves the equations with Runge-Kutta: the network is chaotic, and agrees in its statistics."""
    python = python_with("nest")
    ours = run(BENCH / "networks.py", va, "--seconds", 0.5, "--spikes", tmp_path / "ours.npz")
    theirs = run(PEERS / "nest_va.py", va, "--seconds", 0.5, python=python)
    assert ours["rate_exc"] == pytest.approx(theirs["rate_exc"], rel=0.15)
    assert ours["rate_inh"] == pytest.approx(theirs["rate_inh"], rel=0.15)
