"""``coba-triton simulate`` from the arguments to the files."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coba_triton import (
    CobaLIF,
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    CobaLIFState,
    NpzSink,
    ZarrSink,
    coba_lif_feed_forward_integral,
    coba_lif_integral,
    open_result,
    simulate,
)
from coba_triton.cli import config as cli_config
from coba_triton.cli import job, main, report
from coba_triton.cli.config import UserError
from coba_triton.cli.inputs import open_source
from coba_triton.cli.weights import open_recurrent, read_array
from coba_triton.stream import block_run, steppers

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


def dense(out: Path) -> np.ndarray[Any, Any]:
    return open_result(out / "result.zarr").spikes[:]


@pytest.mark.parametrize("form", ["zarr", "npz"])
def test_result_is_the_cores_whole_run_bit_for_bit(config: str, tmp_path: Path, form: str) -> None:
    out = tmp_path / "new" / "out"
    assert main(["simulate", config, "--out", str(out), "--format", form]) == 0
    spikes, states = whole_run(config)
    assert 20 < spikes.sum() < 1000
    result = open_result(out / f"result.{form}")
    assert (result.finished, result.dt) == (True, 0.1)
    np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())
    assert result.recorded.tolist() == [3, 0]
    for name in ("v", "g_e", "g_i"):
        np.testing.assert_array_equal(result.traces[name][:], getattr(states, name)[:, [3, 0]].numpy())
    assert result.array("input_e").shape == result.array("input_i").shape == (T,)
    assert result.array("input_e").mean() == pytest.approx(2000 / 1000 * 0.1 * 0.002, rel=0.1)
    assert result.attributes["config"]["attributes"]["settings"]["input"]["seed"] == 1
    assert sorted(path.name for path in out.iterdir()) == sorted([f"result.{form}", *report.FILES])


@pytest.mark.parametrize("block", ["block_steps = 1", "block_steps = 97", ""])
def test_block_length_changes_nothing(config: str, tmp_path: Path, block: str) -> None:
    change(config, "block_steps = 100", block)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0
    np.testing.assert_array_equal(dense(tmp_path / "out"), whole_run(config)[0].bool().numpy())


def test_summary(config: str, tmp_path: Path) -> None:
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    rates = dense(tmp_path / "out").sum(0) / 0.06
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
    assert summary["spikes"] == dense(tmp_path / "out").sum()
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
    width, height = png_size(tmp_path / "out" / "raster.png")
    assert (width, height > 500) == (1320, True)


def test_plot(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["simulate", config, "--out", str(out)]) == 0
    capsys.readouterr()
    for arguments, name in (
        ([str(out)], "plot.png"),
        ([str(out / "result.zarr"), "--out", str(tmp_path / "a.svg"), "--start", "10", "--stop", "30"], "../a.svg"),
    ):
        assert main(["plot", *arguments]) == 0
        assert capsys.readouterr().out.strip().endswith(Path(name).name)
        assert (out / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no result at nowhere"),
        (["{out}", "--out", "x.bmp"], "--out must end in .png, .pdf, .svg, .html, got 'x.bmp'"),
        (["{out}", "--start", "30", "--stop", "10"], "start and stop must be times in ms from 0 to 60, start first"),
        (["{out}", "--stop", "70"], "start and stop must be times in ms from 0 to 60"),
        (["{out}", "--html", "--out", "x.png"], "--out must end in .html with --html, got 'x.png'"),
        (["{config}"], "is no result of coba_triton, or damaged"),
    ],
)
def test_plot_message(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert main(["simulate", config, "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["plot", *(a.format(out=out, config=config) for a in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not (out / "plot.png").exists()


def test_table_and_list(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "600 of 600 (0.06 s, dt 0.1 ms)" in printed.out
    assert re.search(r"backend *│ cpu *│", printed.out)
    assert "Wrote result.zarr, raster.png and summary.json to" in printed.out
    assert printed.err == ""
    assert main(["simulate", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ecg      a real ECG")
    assert lines[1].startswith("poisson  neurons with")
    assert lines[2].startswith("va       4000 connected neurons")


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
    assert "MIT-BIH" in summary["recording"]
    assert summary["seeds"] == {"input.fan_out.seed": 1}
    result = open_result(tmp_path / "out" / "result.zarr")
    assert result.array("events").shape == (3000, 2)
    peak = int(result.array("signal").argmax())  # of the only QRS complex
    near = dense(tmp_path / "out")[peak - 200 : peak + 300].sum()
    assert near > 0.9 * summary["spikes"] > 100


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """A real signal before the block that begins at this step is finished."""
    finish = block_run.BlockRun.finish

    def interrupted(self: block_run.BlockRun, running: Any) -> Any:
        if running.start == step:
            signal.raise_signal(number)
        return finish(self, running)

    monkeypatch.setattr(block_run.BlockRun, "finish", interrupted)


def test_interrupted_run_is_resumed(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt_at(monkeypatch, 384)
    assert main(["simulate", config, "--out", str(out)]) == 130
    message = "Interrupted after 384 of 600 steps; what was finished is written; continue with --resume."
    assert message in capsys.readouterr().err
    monkeypatch.undo()
    spikes, states = whole_run(config)
    np.testing.assert_array_equal(dense(out), spikes[:384].bool().numpy())
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["interrupted"], summary["steps_done"], summary["T"]) == (True, 384, 600)
    assert (out / "raster.png").is_file()
    assert main(["simulate", config, "--out", str(out), "--resume"]) == 0
    np.testing.assert_array_equal(dense(out), spikes.bool().numpy())
    np.testing.assert_array_equal(open_result(out / "result.zarr").traces["v"][:], states.v[:, [3, 0]].numpy())
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["interrupted"], summary["steps_done"]) == (False, 600)


def test_a_signal_that_ends_processes_leaves_what_was_finished(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 384, signal.SIGTERM)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 128 + signal.SIGTERM
    assert "Interrupted after 384 of 600 steps; what was finished is written" in capsys.readouterr().err
    assert open_result(tmp_path / "out" / "result.zarr").steps == 384


def test_changed_configuration_is_not_resumed(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 384)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 130
    monkeypatch.undo()
    capsys.readouterr()
    change(config, "seed = 1", "seed = 2")
    assert main(["simulate", config, "--out", str(tmp_path / "out"), "--resume"]) == 2
    printed = capsys.readouterr().err
    assert "was begun with another configuration: attributes.settings.input.seed was 1 and is 2" in printed
    assert open_result(tmp_path / "out" / "result.zarr").steps == 384


def test_a_longer_duration_goes_on(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Poisson spikes, which their settings describe, are those of the longer run from the beginning."""
    for out in (tmp_path / "out", tmp_path / "whole"):
        if out.name == "out":
            change(config, '"60 ms"', '"25 ms"')
            assert main(["simulate", config, "--out", str(out)]) == 0
            change(config, '"25 ms"', '"60 ms"')
        assert main(["simulate", config, "--out", str(out), "--resume"]) == 0
    np.testing.assert_array_equal(dense(tmp_path / "out"), dense(tmp_path / "whole"))
    assert json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["T"] == T
    change(config, '"60 ms"', '"25 ms"')
    capsys.readouterr()
    assert main(["simulate", config, "--out", str(tmp_path / "out"), "--resume"]) == 2
    assert "source.steps was 600 and is 250" in capsys.readouterr().err


def test_a_changed_file_is_not_resumed(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path(config).read_text(encoding="utf-8")
    x = np.random.default_rng(0).integers(0, 2, (T, N)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    source = '[input]\nkind = "file"\npath = "x.npy"\nweight = "0.5 nS"\n[record]'
    Path(config).write_text(re.sub(r"\[input\].*\[record\]", source, text, flags=re.DOTALL), encoding="utf-8")
    arguments = ["simulate", config, "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main([*arguments, "--resume"]) == 0
    x[300, 2] = 1 - x[300, 2]
    np.save(tmp_path / "x.npy", x)
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 2
    assert "was begun with another input: steps 256 to 384 of source differ" in capsys.readouterr().err


def test_every_nth_step_is_recorded(config: str, tmp_path: Path) -> None:
    change(config, "neurons = [3, 0]", "neurons = [3, 0]\nevery = 10")
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0
    result = open_result(tmp_path / "out" / "result.zarr")
    np.testing.assert_array_equal(result.traces["v"][:], whole_run(config)[1].v[9::10][:, [3, 0]].numpy())
    assert main(["plot", str(tmp_path / "out"), "--start", "10", "--stop", "10.5"]) == 0


@pytest.mark.parametrize("form", ["zarr", "npz"])
def test_one_command_writes_to_a_folder(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """From the simulation to the summary."""
    out = tmp_path / "out"
    overview, codes = report.overview, []

    def another(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(report, "overview", overview)
        codes.append(main(["simulate", config, "--out", str(out), "--format", form]))
        return overview(*arguments, **options)

    monkeypatch.setattr(report, "overview", another)
    assert main(["simulate", config, "--out", str(out), "--format", form]) == 0
    assert codes == [2]
    assert f"another command is writing to {out}; wait for its end, or give another --out" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == sorted([f"result.{form}", *report.FILES])


def test_a_result_that_is_a_link_is_said_in_words(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", config, "--out", str(tmp_path / "there")]) == 0
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.zarr").symlink_to(tmp_path / "there" / "result.zarr")
    capsys.readouterr()
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 2
    assert "result.zarr is a symbolic link; give the path that it leads to" in capsys.readouterr().err


def test_npz_cannot_be_resumed(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", config, "--out", str(tmp_path / "out"), "--format", "npz", "--resume"]) == 2
    assert "a run into .npz cannot be resumed" in capsys.readouterr().err


def test_interrupt_before_the_first_block(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 0)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 130
    assert "Interrupted before the first block of steps was finished" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.zarr"]


def test_interrupted_write_leaves_no_half_file(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 0

    def interrupted_draw(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "overview", interrupted_draw)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 130
    assert "Interrupted; nothing more was written." in capsys.readouterr().err
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["result.zarr"]  # the picture and the summary were of the earlier result


def in_the_folder(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if not path.name.startswith("."))


def look_at(monkeypatch: pytest.MonkeyPatch, out: Path) -> list[list[str]]:
    """What is in a folder while a run goes on, which is what a kill would leave, is added to the list."""
    finish, seen = block_run.BlockRun.finish, []

    def looked_at(self: block_run.BlockRun, running: Any) -> Any:
        seen.append(in_the_folder(out))
        return finish(self, running)

    monkeypatch.setattr(block_run.BlockRun, "finish", looked_at)
    return seen


def test_a_run_that_goes_on_has_no_report_of_an_earlier_one(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the run that it replaces, nor of the one that it resumes."""
    out = tmp_path / "out"
    for options in ([], ["--resume"]):
        interrupt_at(monkeypatch, 384)
        assert main(["simulate", config, "--out", str(out)]) == 130
        assert in_the_folder(out) == ["raster.png", "result.zarr", "summary.json"]
        monkeypatch.undo()
        seen = look_at(monkeypatch, out)
        assert main(["simulate", config, "--out", str(out), *options]) == 0
        monkeypatch.undo()
        assert seen and set(map(tuple, seen)) == {("result.zarr",)}
        assert in_the_folder(out) == ["raster.png", "result.zarr", "summary.json"]


def test_the_report_of_an_npz_goes_when_the_npz_is_replaced(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, files = tmp_path / "out", ["raster.png", "result.npz", "summary.json"]
    arguments = ["simulate", config, "--out", str(out), "--format", "npz"]
    assert main(arguments) == 0
    earlier = (out / "result.npz").read_bytes()
    seen = look_at(monkeypatch, out)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    assert main(arguments) == 2
    assert seen and all(names == files for names in seen)
    assert in_the_folder(out) == files and (out / "result.npz").read_bytes() == earlier  # the earlier run is whole
    monkeypatch.undo()
    monkeypatch.setattr(report, "overview", full)
    assert main(arguments) == 2
    assert in_the_folder(out) == ["result.npz"]


@pytest.mark.parametrize(("old", "new"), [("zarr", "npz"), ("npz", "zarr")])
def test_a_result_of_the_other_format_is_replaced_as_well(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    """When the new one appears, and not before: that of zarr at the beginning of its run, an .npz at the end."""
    out = tmp_path / "out"
    assert main(["simulate", config, "--out", str(out), "--format", old]) == 0
    change(config, '"60 ms"', '"25 ms"')
    before = in_the_folder(out)

    def refuse(*_: Any) -> None:
        raise ValueError("no such run")

    with monkeypatch.context() as patch:
        patch.setattr(block_run.BlockRun, "__init__", refuse)
        assert main(["simulate", config, "--out", str(out), "--format", new]) == 2
    assert in_the_folder(out) == before
    with monkeypatch.context() as patch:
        seen = look_at(patch, out)
        assert main(["simulate", config, "--out", str(out), "--format", new]) == 0
    assert seen and all(names == (before if new == "npz" else ["result.zarr"]) for names in seen)
    assert sorted(path.name for path in out.iterdir()) == ["raster.png", f"result.{new}", "summary.json"]
    assert open_result(out / f"result.{new}").steps == 250


@pytest.mark.parametrize(("form", "options"), [("zarr", []), ("zarr", ["--resume"]), ("npz", [])])
def test_an_interrupt_before_the_run_begins_leaves_the_earlier_one(
    config: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    options: list[str],
) -> None:
    """It is not reported as the new one."""
    out = tmp_path / "out"
    arguments = ["simulate", config, "--out", str(out), "--format", form]
    assert main(arguments) == 0
    summary = (out / "summary.json").read_bytes()
    capsys.readouterr()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(block_run.BlockRun, "__init__", interrupted)
    assert main([*arguments, *options]) == 130
    assert capsys.readouterr() == ("", "Interrupted; nothing more was written.\n")
    assert (out / "summary.json").read_bytes() == summary
    assert in_the_folder(out) == ["raster.png", f"result.{form}", "summary.json"]


def test_a_result_is_back_if_the_new_one_cannot_take_its_place(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["simulate", config, "--out", str(out)]) == 0
    replace = Path.replace

    def fail(self: Path, target: Path) -> Any:
        if Path(target).suffix == ".npz":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    assert main(["simulate", config, "--out", str(out), "--format", "npz"]) == 2
    assert [path.name for path in out.iterdir()] == ["result.zarr"]
    assert open_result(out / "result.zarr").steps == T


def test_a_resumed_run_removes_no_other_result(config: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["simulate", config, "--out", str(out), "--format", "npz"]) == 0
    assert main(["simulate", config, "--out", str(out), "--resume"]) == 0
    assert in_the_folder(out) == ["raster.png", "result.npz", "result.zarr", "summary.json"]


@pytest.mark.parametrize(
    ("form", "other", "kind"),
    [
        ("zarr", "result.npz", "something else"),
        ("zarr", "result.npz", "a link"),
        ("npz", "result.zarr", "something else"),
        ("npz", "result.zarr", "a link"),
        ("npz", "result.zarr", "something besides"),
    ],
)
def test_what_is_no_result_is_not_removed_with_the_other_format(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, other: str, kind: str
) -> None:
    out = tmp_path / "out"
    if kind == "something else":
        out.mkdir()
        np.savez(out / "result.npz", x=np.ones(3))
        if other == "result.zarr":
            (out / "result.npz").rename(out / other)
    else:
        assert main(["simulate", config, "--out", str(out), "--format", other[7:]]) == 0
    if kind == "a link":
        (out / other).rename(tmp_path / other)
        (out / other).symlink_to(tmp_path / other)
    if kind == "something besides":
        (out / other / "mine.txt").touch()
    before = in_the_folder(out)
    capsys.readouterr()
    assert main(["simulate", config, "--out", str(out), "--format", form]) == 2
    printed = capsys.readouterr().err
    assert f"result.{form} takes the place of {out / other}, which cannot be replaced (" in printed
    assert "move that away, or give another --out" in printed and printed.count("\n") == 1
    assert in_the_folder(out) == before


@pytest.mark.parametrize("change_to", ["another configuration", "a shorter run"])
def test_a_resume_that_is_refused_changes_nothing(config: str, tmp_path: Path, change_to: str) -> None:
    out = tmp_path / "out"
    assert main(["simulate", config, "--out", str(out)]) == 0
    summary = (out / "summary.json").read_bytes()
    change(config, *{"another configuration": ("seed = 1", "seed = 2"), "a shorter run": ('"60 ms"', '"25 ms"')}[change_to])
    assert main(["simulate", config, "--out", str(out), "--resume"]) == 2
    assert in_the_folder(out) == ["raster.png", "result.zarr", "summary.json"]
    assert (out / "summary.json").read_bytes() == summary


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

    monkeypatch.setattr(steppers, "coba_lif_feed_forward_integral", fail)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 2
    assert "the simulation failed: this backend cannot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate"], "no configuration given"),
        (["simulate", "ecg"], "add --out DIR"),
        (["simulate", "egc", "--out", "x"], "did you mean 'ecg'?"),
        (["simulate", "ecg", "--oot", "x"], "--oot"),
        (["simulate", "ecg", "--out", "x", "--wait", "inf"], "'--wait': Input should be less than or equal to 10000000"),
        (["simulat"], "simulat"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_folder_in_the_place_of_the_picture_is_named(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raster.png").mkdir()
    assert main(["simulate", config, "--out", str(tmp_path)]) == 2
    assert f"cannot remove {tmp_path / 'raster.png'}, as of an earlier run" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["raster.png", "test.toml"]


def test_folder_that_cannot_be_written(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["simulate", config, "--out", str(tmp_path / "file")]) == 2
    assert "file: File exists; give another folder with --out" in capsys.readouterr().err


def test_full_disk(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ZarrSink, "write", fail)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 2
    assert "(No space left on device); 0 steps are kept: make room and continue with --resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["simulate", config, "--out", str(tmp_path / "out"), "--resume"]) == 0


def test_an_error_without_the_system_s_words_is_told_in_its_own(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("Cannot call rmtree on a symbolic link")

    monkeypatch.setattr(ZarrSink, "begin", fail)
    assert main(["simulate", config, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert "result.zarr: Cannot call rmtree on a symbolic link" in printed and "None" not in printed


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large", "deep", "binary"])
def test_what_is_no_configuration_is_told_in_one_sentence(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.toml"
    make: dict[str, Callable[[], Any]] = {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "large": lambda: path.write_text("#" * (2**24 + 1)),
        "deep": lambda: path.write_text("x = " + "[" * 10**5),
        "binary": lambda: path.write_bytes(b"\xff\xfe\x00x"),
    }
    make[kind]()
    assert main(["simulate", str(path), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("coba-triton: ") and printed.count("\n") == 1 and "; " in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "truncated", "compressed"])
def test_what_is_no_array_is_told_in_one_sentence(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.arange(1000.0))
    content = bytearray(path.read_bytes())
    if kind in ("pipe", "folder"):
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    elif kind == "truncated":
        path.write_bytes(content[:-30])
    else:
        content[60:90] = b"\xff" * 30
        path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read .* no regular file|is no .npy or .npz file of numbers"):
        read_array(path, None)


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs:/bucket/run", "file:///run", "simplecache::s3://bucket/run"])
def test_an_address_is_no_path(
    address: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a path it would be a folder called s3:; a Path has already lost one of its slashes."""
    monkeypatch.chdir(tmp_path)
    message = "must be a path of this machine's file system, got the address"
    result = simulate(CobaLIF(dt=0.1), torch.zeros(32, 2), progress=False)
    for path in (f"{address}.zarr", Path(f"{address}.zarr"), f"{address}.npz"):
        kind = NpzSink if str(path).endswith("npz") else ZarrSink
        attempts: list[Callable[[], Any]] = [
            lambda path=path: simulate(CobaLIF(dt=0.1), torch.zeros(32, 2), sink=path),
            lambda path=path, kind=kind: kind(path),
            lambda path=path: open_result(path),
            lambda path=path: result.to_csv(path),
        ]
        for attempt in attempts:
            with pytest.raises(ValueError, match=message):
                attempt()
    for arguments in (
        ["simulate", config, "--out", address],
        ["plot", address],
        ["plot", str(tmp_path), "--out", f"{address}.png"],
        ["tune", "--neurons", "8", "--out", f"{address}.json"],
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".toml"] == []


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


def run_of(config: str, out: Path) -> Any:
    assert main(["simulate", config, "--out", str(out)]) == 0
    return open_result(out / "result.zarr")


@pytest.mark.parametrize("connected", [False, True])
def test_populations_offsets_and_starts(connected: bool, config: str, tmp_path: Path) -> None:
    change(
        config,
        "[input]",
        """i_offset = "50 pA"
[[population]]
name = "late"
neurons = [8, 12]
tau_syn_exc = "8 ms"
c_m = "300 pF"
i_offset = "-0.02 nA"
v_init = { low = "-60 mV", high = "-52 mV", seed = 3 }
[input]""",
    )
    if connected:
        change(config, "[input]", """[recurrent]
seed = 1
probability = 0.4
excitatory_fraction = 0.5
excitatory_weight = "0.0009765625 uS"
inhibitory_weight = "0.001953125 uS"
[input]""")  # fmt: skip
    result = run_of(config, tmp_path / "out")
    settings = cli_config.load(config)[1]
    late = torch.arange(N) >= 8

    def each(all_others: float, own: float) -> torch.Tensor:
        return torch.where(late, own, torch.full((N,), all_others, dtype=torch.float64)).float()

    p = CobaLIFParameters(
        tau_syn_exc_inv=each(1 / 5, 1 / 8),
        tau_syn_inh_inv=1 / 10,
        c_m_inv=each(1 / 0.2, 1 / 0.3),
        g_l=0.01,
        e_rev_I=-80.0,
        e_rev_E=0.0,
        v_rest=each(-65.0 + 0.05 / 0.01, -65.0 - 0.02 / 0.01),
        v_reset=-65.0,
        v_thresh=-50.0,
    )
    v = np.full(N, -65.0)
    v[8:] = np.random.default_rng(3).uniform(-60.0, -52.0, 4)
    source, start = open_source(settings), torch.from_numpy(v).float()
    if connected:
        recurrent = open_recurrent(settings)
        assert recurrent is not None
        weights = source.weights, recurrent.synapses
        x = torch.from_numpy(source.channels(0, T))
        spikes, states = coba_lif_integral(
            x, CobaLIFState(0.0, start, 0.0, 0.0), *weights, p, 0.1, backend="reference", record_states=True
        )
    else:
        x = torch.from_numpy(source.read(0, T))
        state = CobaLIFFeedForwardState(start, 0.0, 0.0)
        spikes, states = coba_lif_feed_forward_integral(x, state, p, 0.1, backend="reference", record_states=True)  # type: ignore[assignment]
    assert 20 < spikes.sum() < T
    np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())
    np.testing.assert_array_equal(result.traces["v"][:], states.v[:, [3, 0]].numpy())
    assert {name: members.tolist() for name, members in result.populations.items()} == {
        "late": [8, 9, 10, 11],
        "all others": list(range(8)),
    }


@pytest.mark.parametrize("connected", [False, True])
def test_synapses_that_are_currents(config: str, tmp_path: Path, connected: bool) -> None:
    change(config, 'e_rev_E = "0 mV"\ne_rev_I = "-80 mV"\n', 'synapses = "current"\n')
    change(config, '"2000 Hz", weight = "2 nS"', '"2000 Hz", weight = "60 pA"')
    change(config, '"500 Hz", weight = "2 nS"', '"500 Hz", weight = "0.03 nA"')
    if connected:
        change(config, "[input]", """[recurrent]
seed = 1
probability = 0.4
excitatory_fraction = 0.5
excitatory_weight = "0.03125 nA"
inhibitory_weight = "62.5 pA"
[input]""")  # fmt: skip
    result = run_of(config, tmp_path / "out")
    settings = cli_config.load(config)[1]
    p = CobaLIFParameters(1 / 5, 1 / 10, 1 / 0.2, 0.01, -1.0, 1.0, -65.0, -65.0, -50.0, conductance_based=0)
    source, recurrent = open_source(settings), open_recurrent(settings)
    if recurrent is not None:
        x, weights = torch.from_numpy(source.channels(0, T)), (source.weights, recurrent.synapses)
        spikes, _ = coba_lif_integral(x, None, *weights, p, 0.1, backend="reference")
    else:
        spikes, _ = coba_lif_feed_forward_integral(torch.from_numpy(source.read(0, T)), None, p, 0.1, backend="reference")
    assert connected == (recurrent is not None) and 20 < spikes.sum() < 1000
    np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())
    assert result.parameter("conductance_based").tolist() == [0.0] * N


def test_a_range_of_starts_is_drawn_once(config: str, tmp_path: Path) -> None:
    """A population that does not say where it starts has its part of what is drawn for all."""
    change(
        config,
        "[input]",
        """v_init = { low = "-65 mV", high = "-55 mV", seed = 1 }
[[population]]
name = "a"
neurons = [0, 4]
v_rest = "-70 mV"
[[population]]
name = "b"
neurons = [4, 8]
v_init = "-51 mV"
[input]""",
    )
    state = job.initial_state(cli_config.load(config)[1], False, torch.device("cpu"))
    want = np.random.default_rng(1).uniform(-65, -55, N)
    want[4:8] = -51
    assert state is not None
    np.testing.assert_array_equal(state.v, torch.from_numpy(want).float())
    change(config, 'v_init = { low = "-65 mV", high = "-55 mV", seed = 1 }', "")
    state = job.initial_state(cli_config.load(config)[1], False, torch.device("cpu"))
    assert state is not None
    np.testing.assert_array_equal(state.v, [-70] * 4 + [-51] * 4 + [-65] * 4)


def test_events_of_a_run_drive_another(config: str, tmp_path: Path) -> None:
    """Every neuron's own, with either sign or both, and as channels."""
    first = run_of(config, tmp_path / "first")
    first.to_csv(tmp_path / "spikes.csv")
    spikes = torch.from_numpy(first.spikes[:]).float()
    poisson = """kind = "poisson"
seed = 1
excitatory = { rate = "2000 Hz", weight = "2 nS" }
inhibitory = { rate = "500 Hz", weight = "2 nS" }"""
    excitatory = 'kind = "events"\nexcitatory = { path = "spikes.csv", weight = "30 nS" }'
    change(config, poisson, excitatory + '\ninhibitory = { path = "first/result.zarr", weight = "10 nS" }')
    p = job.parameters(cli_config.load(config)[1])
    net = (np.float32(0.03) * spikes.numpy()) + np.float32(-0.01) * spikes.numpy()
    want, states = coba_lif_feed_forward_integral(torch.from_numpy(net), None, p, 0.1, record_states=True)
    result = run_of(config, tmp_path / "own")
    np.testing.assert_array_equal(result.traces["g_e"][:], states.g_e[:, [3, 0]].numpy())
    np.testing.assert_array_equal(result.spikes[:], want.bool().numpy())
    assert want.any()

    change(config, '"first/result.zarr"', '["spikes.csv", "first/result.zarr"]')  # the spikes twice
    twice = open_source(cli_config.load(config)[1]).read(0, T)
    np.testing.assert_array_equal(twice, np.float32(0.03) * spikes.numpy() + np.float32(-0.02) * spikes.numpy())
    change(config, '["spikes.csv", "first/result.zarr"]', '"first/result.zarr"')

    part = '\nstart = "20 ms"\nfirst = 0'
    change(config, '\ninhibitory = { path = "first/result.zarr", weight = "10 nS" }', part)
    source = open_source(cli_config.load(config)[1])
    np.testing.assert_array_equal(source.read(0, 300), np.float32(0.03) * spikes[200:500].numpy())
    assert not source.read(400, T).any()

    change(config, excitatory + part, """kind = "channels"
spikes = { source = "events", path = "spikes.csv", channels = 20, first = 0 }
fan_out = { seed = 1, probability = 0.9, weight = "20 nS", excitatory_fraction = 0.8 }""")  # fmt: skip
    channels = open_source(cli_config.load(config)[1])
    np.testing.assert_array_equal(channels.channels(0, T)[:, :N], spikes.numpy())
    assert run_of(config, tmp_path / "channels").spike_counts().any()
    change(config, "channels = 20, first = 0", "channels = 11, first = 1")
    with pytest.raises(
        cli_config.UserError, match=r"^input.spikes: neurons must be from 1 to 11 for channels \[11\], got 0 to"
    ):
        open_source(cli_config.load(config)[1])
    change(config, "spikes.csv", "other.csv")
    with pytest.raises(
        cli_config.UserError, match=r"^input.spikes: there is no file '.*other.csv'; give the path of a list"
    ):
        open_source(cli_config.load(config)[1])


def test_inhibition_alone(config: str, tmp_path: Path) -> None:
    both = open_source(cli_config.load(config)[1]).read(0, T)
    change(config, 'excitatory = { rate = "2000 Hz", weight = "2 nS" }', 'excitatory = { rate = "0 Hz", weight = "2 nS" }')
    want = open_source(cli_config.load(config)[1]).read(0, T)
    change(config, 'excitatory = { rate = "0 Hz", weight = "2 nS" }\n', "")
    got = open_source(cli_config.load(config)[1]).read(0, T)
    np.testing.assert_array_equal(got, want)
    assert got.min() < 0 == got.max() and (both > 0).any()
    result = run_of(config, tmp_path / "out")
    assert result.traces["v"][:].min() < -65.5 and not result.spike_counts().any()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("module", ["torch", "typer"])
@pytest.mark.parametrize("program", ["package", "module", "script", "library"])
def test_ctrl_c_while_it_is_imported(program: str, module: str, tmp_path: Path) -> None:
    """The command line ends at once and in silence; an import within somebody's program is interrupted as ever."""
    (tmp_path / f"{module}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    script = Path(sys.executable).with_name("coba-triton")
    if program == "script" and not script.is_file():
        pytest.skip("the command is not installed beside Python")
    command = {
        "package": ["-m", "coba_triton", "info"],
        "module": ["-m", "coba_triton.cli", "info"],
        "script": [str(script), "info"],
        "library": ["-c", "import coba_triton.cli as cli; cli.main(['--help'])"],
    }[program]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == -signal.SIGINT
    assert ("KeyboardInterrupt" in done.stderr) == (program == "library")
    assert program == "library" or done.stdout + done.stderr == ""
