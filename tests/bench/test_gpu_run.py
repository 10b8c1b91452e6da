"""``make gpu`` where there is no GPU: the same script, for practice."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from coba_triton.tools import contenders
from coba_triton.tools.problems import Case

BENCH = Path(__file__).parents[2] / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return load("gpu")


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


@pytest.mark.parametrize("reference_runs", [True, False])
def test_a_wrong_result_is_never_timed(reference_runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither beside the reference, nor where this cannot run: nothing is compared with itself."""
    steps = load("gpu_steps")
    case = Case("gpu", "feed_forward", 20, 1, 8)

    def too_large() -> torch.Tensor:
        raise torch.OutOfMemoryError("planted")

    def planted(case: Case, backend: str, tensors: Any) -> list[contenders.Contender]:
        reference, ours, *_ = made(case, backend, tensors)
        reference = reference if reference_runs else replace(reference, run=too_large)
        return [reference, replace(ours, run=lambda: 1 - reference.run())]

    made = contenders.contenders
    monkeypatch.setattr(contenders, "contenders", planted)
    step = steps.Step("rivals", "cpu", tmp_path, True)
    with pytest.raises(AssertionError, match="spikes of cpu") if reference_runs else contextlib.nullcontext():
        steps.compete(step, case, "planted", "inference", 1e9, False, 8.0)
    step._lines.close()
    assert "median_s" not in (tmp_path / "rivals.jsonl").read_text()
