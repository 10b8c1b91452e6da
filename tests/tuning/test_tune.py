"""The tuner's loop with a fake workload and clock, its files, and ``coba-triton tune`` for real on the CPU."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from coba_triton.backend.cpu import launch as cpu_launch
from coba_triton.cli import main
from coba_triton.tools import tuner
from coba_triton.tools.tuner import Journal, Task, Timed, Trial
from coba_triton.tuning import tables as tuning
from coba_triton.tuning.tables import TableError

TASK = Task("cpu", "feed_forward_backward", "float32", 4096, 1)
RULE = {"tile": 1024, "threads": torch.get_num_threads(), "checkpoint_every": 16}
TARGET = tuning.machine("cpu", torch.device("cpu"))
HEADER = {"machine": list(TARGET)}


class Clock:
    """Goes on by what is slept."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """Calls that take what a formula says, of which some sets of parameters are wrong, spill, or cannot win."""

    neuron_steps, bytes_moved = 1000, 8000

    def __init__(self, clock: Clock, wrong: int = 0, spills: int = 0, slow: int = 0) -> None:
        self.clock, self.wrong, self.spills, self.slow = clock, wrong, spills, slow
        self.timed: list[dict] = []

    @property
    def parameters(self) -> dict:
        return dict(tuning.forced_parameters[TASK.kernel])

    def verify(self) -> float:
        if self.parameters["tile"] == self.wrong:
            raise ValueError("changes bits: result 0[1] is 2.0, expected 1.0")
        return 0.0

    def time(self, samples: int) -> list[float]:
        self.timed.append(self.parameters)
        # tile 256 and K = 32 are the best
        once = 1.0 + abs(self.parameters["tile"] - 256) / 256 + abs(self.parameters["checkpoint_every"] - 32) / 16
        self.clock.now += samples * once
        return [once * (0.99 + 0.02 * (number % 2)) for number in range(samples)]

    def floor(self, parameters: dict) -> float:
        return 100.0 if parameters["tile"] == self.slow else 0.5

    def compiled(self, parameters: dict) -> dict:
        return {"spills": 12, "occupancy": 0.5} if parameters["tile"] == self.spills else {}


@pytest.fixture
def journal(tmp_path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "t.journal.jsonl", HEADER, resume=False)
    yield journal
    journal.close(finished=True)


def test_quick_changes_the_best_one_parameter_at_a_time(journal) -> None:
    fake = Fake(clock := Clock())
    seen = []
    outcome = tuner.tune(TASK, fake, journal, "quick", clock=clock, show=seen.append)
    assert outcome.complete and outcome.trials[0].parameters == RULE
    assert outcome.best.parameters | {"threads": 0} == {"tile": 256, "checkpoint_every": 32, "threads": 0}
    assert len(outcome.trials) == seen[-1].done == seen[-1].total
    assert seen[-1].best.parameters == outcome.best.parameters and seen[-1].eta == 0 and seen[2].eta > 0
    assert len(outcome.trials) == 1 + sum(len(values) - 1 for values in TASK.space().values())


def test_full_tries_every_combination(journal) -> None:
    outcome = tuner.tune(TASK, Fake(clock := Clock()), journal, "full", clock=clock)
    sets = {tuple(trial.parameters.items()) for trial in outcome.trials}
    count = 1
    for values in TASK.space().values():
        count *= len(values)
    assert len(sets) == len(outcome.trials) == count


def test_what_is_wrong_spills_or_cannot_win_is_not_timed(journal) -> None:
    fake = Fake(clock := Clock(), wrong=512, spills=128, slow=64)
    outcome = tuner.tune(TASK, fake, journal, "quick", clock=clock)
    reasons = {trial.parameters["tile"]: (trial.status, trial.reason) for trial in outcome.trials}
    assert reasons[512] == ("failed", "changes bits: result 0[1] is 2.0, expected 1.0")
    assert reasons[128] == ("pruned", "spills 12 registers")
    assert reasons[64][0] == "pruned" and reasons[64][1].startswith("roofline: no faster than 1e+05 ms")
    assert not {512, 128, 64} & {parameters["tile"] for parameters in fake.timed}
    entry = tuner.entry_of(outcome, 1e9, {})
    assert {trial["status"] for trial in entry["trials"]} == {"timed", "failed", "pruned"}
    assert entry["parameters"]["tile"] == 256 and entry["trials"][0]["gb_per_s"] > 0


def test_a_rule_that_is_wrong_ends_it(journal) -> None:
    with pytest.raises(ValueError, match="the launcher's own parameters failed: changes bits"):
        tuner.tune(TASK, Fake(Clock(), wrong=1024), journal)


def test_the_rule_stays_where_the_best_is_within_its_spread() -> None:
    rule = Trial({"threads": 2}, "timed", "", 0.9, 1.0, 1.1)
    other = Trial({"threads": 1}, "timed", "", 0.9, 0.95, 1.0)
    assert tuner.Outcome(TASK, [rule, other], True, 1, 1).best is rule
    other.p50 = 0.8
    assert tuner.Outcome(TASK, [rule, other], True, 1, 1).best is other


def test_a_budget_ends_it_and_resume_goes_on(tmp_path) -> None:
    path = tmp_path / "t.journal.jsonl"
    journal = Journal(path, HEADER, resume=False)
    fake = Fake(clock := Clock())
    first = tuner.tune(TASK, fake, journal, "full", deadline=600.0, clock=clock)
    assert not first.complete and 2 < len(first.trials) < 10
    journal.close(finished=False)
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + len(first.trials)
    path.write_text("\n".join(lines) + '\n{"task": {"backend": "cp')  # killed while it wrote

    with pytest.raises(TableError, match="did not end; continue it with --resume"):
        Journal(path, HEADER, resume=False)
    journal = Journal(path, HEADER, resume=True)
    again = Fake(clock := Clock())
    whole = tuner.tune(TASK, again, journal, "full", clock=clock)
    assert whole.complete
    measured_before = [trial.parameters for trial in first.trials[1:]]
    # but for the run-off of the rule and the best
    assert not [p for p in again.timed if p in measured_before and p not in (RULE, whole.best.parameters)]
    journal.close(finished=True)
    assert not path.exists()


def test_a_journal_of_another_machine_is_refused(tmp_path) -> None:
    Journal(tmp_path / "j", HEADER, resume=False).close(finished=False)
    with pytest.raises(TableError, match="of another machine, or of other kernels"):
        Journal(tmp_path / "j", HEADER | {"threads": 99}, resume=True)
    Journal(tmp_path / "j", HEADER, resume=True).close(finished=True)


def journal_of_one(path: Path) -> str:
    """Keep an unfinished journal of a single trial; returns its text."""
    journal = Journal(path, HEADER, resume=False)
    journal.add(TASK, Trial(RULE, "timed", "", 0.5, 1.0, 1.5))
    journal.close(finished=False)
    return path.read_text()


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{}",
        "[" * 10**5,
        '{"task": {}, "parameters": {}, "status": "timed", "p20": 1.0, "p50": "fast", "p80": 1.0}',
        '{"task": {}, "parameters": {}, "status": "timed"}',
        '{"task": {}, "parameters": {}, "status": "failed", "compiled": []}',
        '{"task": {}, "parameters": {}, "status": "failed", "other": 1}',
    ],
    ids=range(7),
)
def test_what_is_no_line_of_a_journal_ends_it(tmp_path, line) -> None:
    path = tmp_path / "j"
    whole = journal_of_one(path)
    path.write_text(f"{whole}{line}\n{whole.splitlines()[1]}\n")
    journal = Journal(path, HEADER, resume=True)
    assert len(journal.trials) == 1 and journal.find(TASK, RULE).p50 == 1.0
    journal.close(finished=False)
    assert path.read_text() == whole


def test_a_journal_survives_a_kill_while_it_is_read(tmp_path, monkeypatch) -> None:
    """Nothing that was measured is taken away before all of it stands elsewhere."""
    path = tmp_path / "j"
    whole = journal_of_one(path)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Journal(path, HEADER, resume=True)
    assert path.read_text() == whole and os.listdir(tmp_path) in (["j"], ["j", ".j.lock"], [".j.lock", "j"])


@pytest.mark.parametrize("kind", ["pipe", "folder", "text"])
def test_a_journal_that_is_none_is_refused(tmp_path, kind) -> None:
    path = tmp_path / "j"
    make = {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "text": lambda: path.write_bytes(b"\xff")}
    make[kind]()
    with pytest.raises(TableError, match="j cannot be read .*; remove it, or name another --out"):
        Journal(path, HEADER, resume=True)


def test_a_link_does_not_lead_a_writer_elsewhere(tmp_path) -> None:
    """Names of parts cannot be guessed, and a table that is a link is replaced, not written through."""
    other = tmp_path / "other"
    other.write_text("mine")
    table = tmp_path / "table.json"
    for name in (".table.json.part", f".table.json.{os.getpid()}.part"):
        (tmp_path / name).symlink_to(other)
    tuner.write_table(table, TARGET, [])
    assert other.read_text() == "mine" and tuning.read_table(table)["entries"] == []


def test_two_runs_do_not_share_a_journal(tmp_path) -> None:
    journal = Journal(tmp_path / "j", HEADER, resume=False)
    with pytest.raises(TableError, match="is being written by another tuning run"):
        Journal(tmp_path / "j", HEADER, resume=True)
    journal.close(finished=True)


def test_concurrent_writers_lose_no_entry(tmp_path) -> None:
    path = tmp_path / "table.json"

    def write(number: int) -> None:
        for size in range(5):
            entry = {"kernel": TASK.kernel, "dtype": "float32", "neurons": 10 * number + size + 1, "batch": 1}
            tuner.write_table(path, TARGET, [entry | {"parameters": RULE, "sources": tuning.source_hash("cpu")}])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    table = tuning.read_table(path)
    assert len(tuning.entries_for(table, TARGET)) == 20
    write(0)
    assert len(tuning.read_table(path)["entries"]) == 20


def test_a_table_that_waits_for_another_writer(tmp_path) -> None:
    path = tmp_path / "table.json"
    lock = FileLock(tmp_path / ".table.json.lock")
    lock.acquire()
    thread = threading.Thread(target=tuner.write_table, args=(path, TARGET, []))
    thread.start()
    time.sleep(0.2)
    assert not path.exists()
    lock.release()
    thread.join()
    assert path.exists()


def test_what_has_no_effect_is_not_varied() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    space = Task("triton", "recurrent_forward", "float32", 1000, 1).space()
    assert len(space["tile"]) == 1 and len(space["num_warps"]) > 2
    assert len(Task("triton", "recurrent_backward", "float32", 100, 1).space()["num_warps"]) == 1
    assert set(Task("cpu", "feed_forward_forward", "float32", 10, 1).space()["tile"]) <= {64, 1024}


@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_every_kernel_is_verified_and_timed(kernel, journal, monkeypatch) -> None:
    monkeypatch.setattr(tuner, "NEURON_STEPS", 2**14)
    monkeypatch.setattr(tuner, "SAMPLE_SECONDS", 0.0)
    task = Task("cpu", kernel, "float32", 40, 2)
    outcome = tuner.tune(task, Timed(task, 1e12), journal)
    assert {trial.status for trial in outcome.trials} == {"timed"}
    assert all(trial.p20 <= trial.p50 <= trial.p80 and trial.max_error < 1e-3 for trial in outcome.trials)


def test_a_launch_that_changes_bits_fails(journal, monkeypatch) -> None:
    """A planted bug: another result with another tile."""
    forward = cpu_launch.feed_forward_forward

    def spoiled(x, state, constants, final, out, call):
        forward(x, state, constants, final, out, call)
        if tuning.forced_parameters.get("feed_forward_forward", {}).get("tile") == 64:
            final[0, 0] += 1e-6

    monkeypatch.setattr(cpu_launch, "feed_forward_forward", spoiled)
    monkeypatch.setattr(tuner, "NEURON_STEPS", 2**12)
    task = Task("cpu", "feed_forward_forward", "float32", 100, 1)
    outcome = tuner.tune(task, Timed(task, 1e12), journal)
    failed = [trial for trial in outcome.trials if trial.status == "failed"]
    assert [trial.parameters["tile"] for trial in failed] == [64]
    assert failed[0].reason.startswith("not the reference's bits: output 1[0]")


ARGUMENTS = ["tune", "--neurons", "100", "--kernel", "feed_forward_forward", "--device", "cpu"]


def test_the_command_writes_a_table_that_launches_use(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tuner, "NEURON_STEPS", 2**12)
    out = tmp_path / "folder" / "t.json"
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Copy bandwidth" in printed and "p50 / p80 ms" in printed and f"Wrote {out}" in printed
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and not out.with_suffix(".journal.jsonl").exists()
    table = json.loads(out.read_text())
    (entry,) = table["entries"]
    assert table["device"] == TARGET.name and entry["device"] == TARGET.name and entry["versions"]["torch"]
    assert entry["trials"][0]["max_error"] == 0 and entry["trials"][0]["p20"] > 0 and entry["sources"]
    tuning.use(out)
    try:
        assert tuning.explain("feed_forward_forward", 100).source == str(out)
    finally:
        tuning.use(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "feed_forward"], "--kernel must be one of"),
        (["--neurons", "0"], "must be positive"),
        (["--dtype", "float16"], "--dtype must be one of float32, float64, got 'float16'"),
        (["--effort", "fast"], "--effort must be one of quick, full"),
        (["--budget", "-1"], "--budget must be a positive number of seconds"),
        (["--arch", "sm_90"], "--arch goes with --compile-only"),
        (["--compile-only"], "TRITON_INTERPRET is set; unset it" if os.environ["TRITON_INTERPRET"] == "1" else "--arch"),
        (["--backend", "reference"], "nothing to check"),
        (["--out", "/proc/no/t.json"], "cannot write"),
    ],
)
def test_bad_arguments(arguments, message, capsys) -> None:
    assert main([*ARGUMENTS, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("coba-triton: ") and message in error


def test_a_file_that_is_no_table_is_not_replaced(tmp_path, capsys) -> None:
    out = tmp_path / "t.json"
    out.write_text("precious")
    assert main([*ARGUMENTS, "--out", str(out)]) == 2
    assert "is no JSON" in capsys.readouterr().err and out.read_text() == "precious"
    out.write_text(
        json.dumps(
            {"format": tuning.FORMAT, "version": tuning.VERSION, "backend": "triton", "device": "NVIDIA H100", "entries": []}
        )
    )
    assert main([*ARGUMENTS, "--out", str(out)]) == 2
    assert "is for triton on NVIDIA H100; remove it, or name another --out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_do_as_well_and_let_go_of_the_lock(name, tmp_path, monkeypatch, capsys) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr(tuner, "NEURON_STEPS", 2**12)
    attempt, calls = tuner.try_parameters, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(number)
        return attempt(*args)

    monkeypatch.setattr(tuner, "try_parameters", interrupt)
    out = tmp_path / "t.json"
    assert main([*ARGUMENTS, "--out", str(out)]) == 128 + number
    assert "continue with --resume" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["t.journal.jsonl"]
    assert len(out.with_suffix(".journal.jsonl").read_text().splitlines()) == 3
    assert signal.getsignal(number) == signal.SIG_DFL
    signal.signal(number, signal.SIG_IGN)  # as nohup has it
    assert main([*ARGUMENTS, "--out", str(out), "--resume"]) == 0
    signal.signal(number, before)


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tuner, "NEURON_STEPS", 2**12)
    attempt = tuner.try_parameters
    calls = []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attempt(*args)

    monkeypatch.setattr(tuner, "try_parameters", interrupt)
    out = tmp_path / "t.json"
    assert main([*ARGUMENTS, "--out", str(out)]) == 130
    assert "continue with --resume" in capsys.readouterr().out
    assert len(out.with_suffix(".journal.jsonl").read_text().splitlines()) == 3
    assert main([*ARGUMENTS, "--out", str(out)]) == 2
    assert "continue it with --resume, or remove it" in capsys.readouterr().err
    assert main([*ARGUMENTS, "--out", str(out), "--resume"]) == 0
    assert out.exists()


def compile_only(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coba_triton.cli", "tune", "--compile-only", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_compile_only_needs_no_gpu(arch, tmp_path) -> None:
    out = tmp_path / "c.json"
    done = compile_only("--neurons", "1024", "--kernel", "recurrent_forward", "--arch", arch, "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["compiled"]
    assert len(rows) > 5 and all(row["compiled"]["registers"] > 10 and 0 < row["compiled"]["occupancy"] <= 1 for row in rows)
    assert rows[0]["compiled"]["spills"] == 0
    if arch == "sm_90":  # one warp for 1024 neurons
        assert any(row["compiled"]["spills"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("arguments", "message"), [([], "add --arch, one of sm_80"), (["--arch", "sm_91"], "--arch must be one of")]
)
def test_compile_only_bad_arguments(arguments, message) -> None:
    done = compile_only("--neurons", "8", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_occupancy() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from coba_triton.tools.compiler import occupancy

    assert occupancy("sm_90", 32, 4, 0) == 1.0
    assert occupancy("sm_90", 64, 4, 0) == 0.5
    assert occupancy("sm_90", 32, 1, 0) == 0.5  # 32 programs of one warp
    assert occupancy("sm_90", 255, 16, 0) == 0.0  # such a program does not fit
    assert occupancy("sm_90", 32, 4, 200_000) == pytest.approx(4 / 64)
    assert occupancy("gfx942", 64, 4, 0) == 1.0 and occupancy("gfx942", 256, 4, 0) == 0.25


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_kill_leaves_a_journal_to_resume(tmp_path) -> None:
    out = tmp_path / "t.json"
    arguments = ["tune", "--neurons", "20000", "--kernel", "feed_forward_backward", "--effort", "full", "--device", "cpu"]
    command = [sys.executable, "-m", "coba_triton.cli", *arguments, "--out", str(out), "--budget", "100"]
    path = out.with_suffix(".journal.jsonl")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (path.exists() and len(path.read_text().splitlines()) > 2):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    lines = Path(path).read_text().splitlines()
    assert len(lines) > 2
    # the kill also let go of the lock
    journal = Journal(path, json.loads(lines[0]) | {}, resume=True)
    assert len(journal.trials) >= len(lines) - 2
    journal.close(finished=False)
