"""What commands print, as people see it: help, versions, keys, progress, at 80 columns, piped and on a terminal."""

from __future__ import annotations

import logging
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line needs typer")
pytest.importorskip("pint", reason="the command line needs pint")

from rich.table import Table

import coba_triton
from coba_triton import open_result
from coba_triton.backend.cpu.numba_bridge import _Report, _reported
from coba_triton.cli import app as cli_app
from coba_triton.cli import keys, main
from coba_triton.cli.config import Config, load
from coba_triton.cli.errors import UserError
from coba_triton.cli.output import say
from coba_triton.common.messages import messages_on_stderr

COMMANDS = ("simulate", "plot", "info", "check", "tune", "bench", "warmup")

pytestmark = pytest.mark.usefixtures("compiles_in_silence")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


# Help


@pytest.mark.parametrize("columns", ["80", "200"])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_holds_at_80_columns_and_cuts_nothing(
    command: str, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    words = [command] if command else []
    long, short = printed(capsys, *words, "--help"), printed(capsys, *words, "-h")
    assert long == short
    assert "..." not in long.replace("[ARGS]...", "").replace("[OPTIONS]...", "").replace("cpu, ...;", "")
    for line in long.splitlines():
        assert len(line) <= 80


def test_the_bare_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys) == printed(capsys, "--help")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == f"coba-triton {coba_triton.__version__}\n"


# Output


def test_nothing_ends_in_blanks_and_no_word_is_torn(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", "what", title="a title that is left of its table", title_justify="left")
    table.add_row("a", "b")
    say(table, "a line " + "/a/long/path" * 20, "")
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "a title that is"  # as wide as the table
    assert "a line " + "/a/long/path" * 20 + "\n" in out
    assert "\x1b" not in out
    for line in out.splitlines():
        assert line == line.rstrip()


def test_on_a_terminal_texts_are_broken_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    text = "word-with-hyphens and another/path/that/is/long [not markup] " * 5
    say(text)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 80
    assert " ".join(lines).split() == text.split()


def test_messages_go_to_what_is_standard_error_now(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """A bar replaces standard error while it is drawn, and would be torn by what is written beside it."""
    with messages_on_stderr():
        monkeypatch.setattr(sys, "stderr", sys.stdout)
        logging.getLogger("coba_triton").info("told")
    assert capsys.readouterr().out == "coba_triton: told\n"


def test_messages_are_written_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The command line writes them, and what it calls may want to write them as well."""
    with messages_on_stderr():
        with messages_on_stderr():
            logging.getLogger("coba_triton").info("within")
        logging.getLogger("coba_triton").info("outside")
    logging.getLogger("coba_triton").info("afterwards")
    assert capsys.readouterr().err == "coba_triton: within\ncoba_triton: outside\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("to", ["full", "closed"])
def test_standard_output_that_takes_nothing(to: str) -> None:
    """A full disk under it is told in a sentence; where the shell has closed it, nothing is printed."""
    where = ">&-" if to == "closed" else ">/dev/full"
    command = f"exec {sys.executable} -m coba_triton --version {where}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment)
    if to == "closed":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        expected = "coba-triton: cannot write to standard output: No space left on device; make room, or send it elsewhere"
        assert (done.returncode, done.stderr) == (2, expected + "\n")


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_before_the_command_begins(
    number: str, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_app, "_commands", lambda: signal.raise_signal(getattr(signal, number)))
    # what started the tests may ignore it, as nohup does, and then it is to be ignored
    as_usual = signal.default_int_handler if number == "SIGINT" else signal.SIG_DFL
    before = signal.signal(getattr(signal, number), as_usual)
    try:
        assert main(["info"]) == status
    finally:
        signal.signal(getattr(signal, number), before)
    assert capsys.readouterr() == ("", "")


# Keys


def test_every_key_is_listed_with_a_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "simulate", "--keys")
    assert max(map(len, out.splitlines()[1:])) <= 80
    sections = keys.sections()
    assert [s.heading for s in sections if s.heading == "[simulation]"] and sections[0].model is Config
    listed = {f"{s.model.__name__.partition('[')[0]}.{k.name}" for s in sections for k in s.keys}
    assert {"Simulation.dt", "Neuron.tau_syn_exc", "Drive.weight", "FileSignal.unit", "Projection.autapses"} <= listed
    names = {name.partition(".")[2] for name in listed} | listed
    assert not set(keys.MEANINGS) - names - {"kind", "source", "law"}
    dt = next(k for s in sections if s.heading == "[simulation]" for k in s.keys if k.name == "dt")
    assert dt == keys.Key("dt", "ms", "required", "time step")
    weight = next(k for s in sections if s.heading == "[input.excitatory]" for k in s.keys if k.name == "weight")
    assert weight.unit == "uS or nA"


# --set


@pytest.mark.parametrize(
    ("change", "read", "value"),
    [
        ("simulation.duration=2s", lambda c: c.simulation.duration, 2000.0),
        ("duration = 20 ms", lambda c: c.simulation.duration, 20.0),
        ('duration="20 ms"', lambda c: c.simulation.duration, 20.0),
        ("count=7000", lambda c: c.neuron.count, 7000),
        ("block_steps=64", lambda c: c.simulation.block_steps, 64),
        ("projection.1.weight=5nS", lambda c: c.projection[1].weight, 0.005),
        ("record.variables=['g_e']", lambda c: c.record.variables, ["g_e"]),
        ("description=a = b", lambda c: c.description, "a = b"),
        ("input.spikes.rate=1 kHz", lambda c: c.input.spikes.rate, 1000.0),
    ],
)
def test_set(change: str, read: Any, value: Any) -> None:
    assert read(load("va", [change])[1]) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("duration", "--set must be KEY=VALUE such as simulation.duration=5s, got 'duration'"),
        ("durration=5s", "unknown key 'durration'"),
        ("simulation.dt=0.1", "simulation.dt: expected a time such as '5 ms', a number with its unit in quotes, got 0.1"),
        ("projection.9.weight=5nS", "--set projection.9.weight: projection has the numbers 0 to 1, got '9'"),
        ("projection.weight=5nS", "--set projection.weight: name a key of one of its tables"),
        ("simulation.dt.ms=1", "--set simulation.dt.ms: simulation.dt is no table; see simulate --keys"),
        ("seed=3", r"--set seed: several tables have this key; write .*input.spikes.seed"),
    ],
)
def test_set_message(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("va", [change])


def test_set_reaches_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Wrote" in printed(capsys, "simulate", "poisson", "--out", str(tmp_path), "--set", "duration=50ms")
    assert open_result(tmp_path / "result.zarr").duration == pytest.approx(50.0)


# Runs


@pytest.mark.filterwarnings("default")
def test_an_unstable_run_stops_unless_it_is_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "va", "--out", str(tmp_path), "--set", "duration=200ms", "--set", "projection.0.weight=2uS"]
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Euler" in line]
    assert line.startswith("coba-triton: the Euler step is unstable: dt * c_m_inv * (g_l + g_e + g_i) has reached")
    assert line.endswith("make dt or the weights smaller, or go on with --keep-going")
    assert int(re.search(r"by step (\d+)", line)[1]) <= 512  # type: ignore[index]
    assert main([*arguments, "--keep-going"]) == 0
    assert "coba-triton: warning: the Euler step is unstable" in capsys.readouterr().err


def test_plot_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "simulate", "va", "--out", str(tmp_path), "--set", "duration=100ms")
    out = printed(capsys, "plot", str(tmp_path))
    assert re.search(r"excitatory +│ 3,200 +│ [\d.]+ Hz", out)
    assert "synchrony: variance / mean of the spikes of 100 neurons in 3 ms" in out
    assert f"Wrote {tmp_path / 'plot.png'}" in out


# Compiling


class Compiled:
    def __init__(self, dispatcher: Any) -> None:
        self.data = {"dispatcher": dispatcher}


def test_the_time_for_compiling_is_summed_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("coba_triton.backend.cpu.numba_bridge.time.perf_counter", lambda: next(clock))
    report, kernel = _Report(), next(iter(_reported))
    report.on_start(Compiled("inner function"))
    report.on_start(Compiled(kernel))  # from 0 s
    report.on_start(Compiled(kernel))  # from 1 s, beside it
    report.on_end(Compiled(kernel))
    report.on_end(Compiled(kernel))  # to 3 s
    assert report.seconds == 3.0


def test_the_first_call_on_a_terminal_says_that_it_compiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report, kernel = _Report(), next(iter(_reported))
    report.on_start(Compiled(kernel))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report.on_start(Compiled(kernel))
    report.on_start(Compiled(kernel))
    assert capsys.readouterr().err == (
        "coba_triton: compiling CPU kernels, which takes seconds each; their code is kept on disk\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="terminals are POSIX's")
def test_a_run_on_a_terminal_of_80_columns(tmp_path: Path) -> None:
    """With kernels that are compiled anew beside the bar."""
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "coba_triton.cli", "simulate", "poisson", "--out", str(tmp_path / "out")]
    environment = os.environ | {"COLUMNS": "80", "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "TERM": "xterm"}
    process = subprocess.Popen([*command, "--set", "duration=100ms"], stdout=child, stderr=child, env=environment)
    os.close(child)
    seen = b""
    while True:
        try:
            data = os.read(parent, 65536)
        except OSError:
            break
        if not data:
            break
        seen += data
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    for line in re.split(r"[\r\n]+", text):
        assert line.count("coba_triton: compiling") <= 1
        assert not ("compiling the" in line and "steps/s" in line), line
    assert "wall time" in text and "compiling" in text
