"""``make gpu`` where there is no GPU: the same script, for practice."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", BENCH / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_practice_run(tmp_path: Path) -> None:
    """It compares before it times, says what is missing, and leaves results, a table and a picture."""
    command = [sys.executable, str(BENCH / "gpu.py"), "--device", "cpu", "--small", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--steps", "machine,smoke,feed-forward,rivals,profile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "results.json").read_text())
    assert [(run["step"], run["ok"]) for run in result["runs"]] == [
        ("machine", True), ("smoke", True), ("feed-forward", True), ("rivals", True), ("profile", True),
    ]  # fmt: skip
    (machine,) = result["results"]["machine"]
    assert machine["copy_gb_per_s"] > 0 and machine["versions"]["torch"] and len(machine["sources"]) == 16
    assert {line["text"].rpartition(": ")[2] for line in result["results"]["smoke"]} == {"the bits of the reference"}
    rows = {(row["case"], row["run"]): row for row in result["results"]["feed-forward"] if "median_s" in row}
    ours = rows["feed-forward 1024 inference", "cpu"]
    assert ours["ours"] and ours["percent_of_copy"] > 0 and ours["host_us"] > 0
    rivals = {(row["case"], row["run"]): row for row in result["results"]["rivals"] if "median_s" in row}
    compiled = rivals["feed-forward 64 training", "compiled step"]
    assert compiled["ps_per_neuron_step"] > 0 and compiled["times_eager"] > 0
    table = (tmp_path / "table.md").read_text()
    assert "| feed-forward 1024 inference | cpu, bits |" in table and "needs a CUDA device" in table and "goal" not in table
    assert (tmp_path / "feed-forward.png").stat().st_size > 10_000


def test_a_step_that_fails_or_hangs_is_told_and_stops_nothing(gpu: ModuleType, tmp_path: Path) -> None:
    arguments = argparse.Namespace(device="nowhere", small=True)
    failed = gpu.run_step("machine", arguments, tmp_path, dict(os.environ), 60.0)
    assert failed["state"] == "failed with exit status 1, see machine.log" and not failed["ok"]
    assert "nowhere" in (tmp_path / "machine.log").read_text()
    stopped = gpu.run_step("smoke", arguments, tmp_path, dict(os.environ), 0.05)
    assert stopped["state"] == "stopped after 0 s" and not stopped["ok"]
    (tmp_path / "recurrent.jsonl").write_text('{"case": "a", "run": "b", "median_s": 1.0}\n{"case": "c", "ru')
    result = gpu.collect(tmp_path, [failed, stopped])
    assert result["results"]["recurrent"] == [{"case": "a", "run": "b", "median_s": 1.0}]
    again = gpu.collect(tmp_path, [failed | {"state": "done"}])
    assert [run["state"] for run in again["runs"]] == ["done", "stopped after 0 s"]
    assert "| a | b | 1,000.000 |" in gpu.table(again)
