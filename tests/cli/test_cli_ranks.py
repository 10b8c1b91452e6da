"""The command simulate under torchrun: processes share the neurons of a run, and one result comes out."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coba_triton import open_result
from coba_triton.cli import main

pytest.importorskip("zarr")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("several processes need torch with gloo", allow_module_level=True)
OPTIONS = ["--set", "duration=60ms", "--set", "simulation.block_steps=64"]


def torchrun(ranks: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "coba_triton", *arguments]


def run(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(torchrun(ranks, *arguments), capture_output=True, text=True, timeout=240)


def assert_same_runs(ours: Path, theirs: Path) -> None:
    one, other = (open_result(folder / "result.zarr") for folder in (ours, theirs))
    assert one.finished and other.finished and one.steps == other.steps
    assert np.array_equal(one.spikes[:], other.spikes[:]) and one.spikes[:].any()
    for name in ("v", "g_e", "g_i"):
        assert np.array_equal(one.traces[name][:], other.traces[name][:])
    for name in ("counts", "input_e", "input_i"):
        assert np.array_equal(one.array(name), other.array(name))
    summaries = [json.loads((folder / "summary.json").read_text("utf-8")) for folder in (ours, theirs)]
    for name in ("spikes", "rates_hz", "recurrent"):
        assert summaries[0][name] == summaries[1][name]


@pytest.mark.slow
def test_the_result_of_one_process(tmp_path: Path) -> None:
    assert main(["simulate", "va", "--out", str(tmp_path / "one"), *OPTIONS]) == 0
    done = run(2, "simulate", "va", "--out", str(tmp_path / "two"), *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "2 processes share the 4,000 neurons, at most 2,000 each" in done.stdout
    assert done.stdout.count("Wrote result.zarr") == 1
    assert_same_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_rank_that_is_killed_stops_all_and_others_go_on(tmp_path: Path) -> None:
    """Within seconds, with a sentence; three processes go on where two were stopped, to the bits of one."""
    long = ["--set", "duration=400ms", "--set", "simulation.block_steps=64"]
    out = tmp_path / "shared"
    running = subprocess.Popen(
        torchrun(2, "simulate", "va", "--out", str(out), *long), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    progress = out / "result.zarr" / "progress" / "c.0"
    until = time.monotonic() + 120
    while not (progress.exists() and int.from_bytes(progress.read_bytes()[:8], "little") >= 128):
        assert time.monotonic() < until and running.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    ranks = [pid for pid in map(int, children) if b"coba_triton" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = running.communicate(timeout=180)
    assert time.monotonic() - began < 30 and running.returncode != 0
    assert re.search("lost another rank|Signal 9", errors)
    steps = open_result(out / "result.zarr").steps
    assert 128 <= steps < 4000
    done = run(3, "simulate", "va", "--out", str(out), "--resume", *long)
    assert done.returncode == 0, done.stderr
    assert main(["simulate", "va", "--out", str(tmp_path / "one"), *long]) == 0
    assert_same_runs(out, tmp_path / "one")


@pytest.mark.slow
def test_what_is_refused(tmp_path: Path) -> None:
    done = run(2, "simulate", "va", "--out", str(tmp_path / "x"), "--format", "npz", *OPTIONS)
    assert done.returncode != 0 and "several processes cannot write one .npz; leave out --format npz" in done.stderr


@pytest.mark.parametrize(
    ("environment", "cause"),
    [
        ({"WORLD_SIZE": "2"}, "environment variable RANK expected"),
        ({"WORLD_SIZE": "two"}, "environment variable RANK expected"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "timed out"),
    ],
)
def test_other_processes_that_are_not_there(
    environment: dict[str, str], cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As where a script sets a variable, or the first process has not started."""
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["simulate", "va", "--out", str(tmp_path / "x"), "--wait", "1"]) == 2
    said = capsys.readouterr().err
    assert f"coba-triton: WORLD_SIZE is {environment['WORLD_SIZE']} in the environment, and the other processes" in said
    assert cause in said and "start all with torchrun, or unset WORLD_SIZE for a run of one process" in said
    assert not (tmp_path / "x").exists()
