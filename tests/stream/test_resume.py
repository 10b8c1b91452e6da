"""Runs that are killed, that fill the disk, or find something else where their result should be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coba_triton import CobaLIF, NpzSink, Record, ZarrSink, open_result
from helpers.runs import BLOCK, NEURON, RECORD, T, assert_same, begin, contents, drive, recurrent, run

zarr = pytest.importorskip("zarr")

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("steps", [0, BLOCK, 7 * BLOCK, 10 * BLOCK])
@pytest.mark.parametrize("network", ["feed-forward", "recurrent", "iterator"])
def test_resumed_run_is_the_uninterrupted_one(network: str, steps: int, tmp_path: Path) -> None:
    def changes() -> dict[str, Any]:
        if network == "recurrent":
            return {"network": recurrent(), "source": drive((6,))}
        return {"source": iter(drive()[:].split(130))} if network == "iterator" else {}

    run(tmp_path / "whole.zarr", **changes())
    begin(tmp_path / "run.zarr", steps, **changes())
    part = open_result(tmp_path / "run.zarr")
    assert (part.steps, part.finished) == (steps, False)
    whole = open_result(tmp_path / "whole.zarr")
    np.testing.assert_array_equal(part.spikes[:], whole.spikes[:steps])
    result = run(tmp_path / "run.zarr", resume=True, **changes())
    assert (result.steps, result.finished) == (T, True)
    assert_same(tmp_path / "run.zarr", tmp_path / "whole.zarr")


def test_resume_begins_what_is_not_there_and_returns_what_is_finished(tmp_path: Path) -> None:
    run(tmp_path / "run.zarr", resume=True)
    before = contents(tmp_path / "run.zarr")
    assert run(tmp_path / "run.zarr", resume=True).finished
    assert contents(tmp_path / "run.zarr") == before


@pytest.mark.filterwarnings("ignore:.*neurons fire in every step", "ignore:the neurons of CobaLIF fired in")
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_kernels_and_of_blosc_change_no_byte(threads: int, tmp_path: Path) -> None:
    """Blocks that two threads share, and chunks of more than one Blosc block."""
    from numcodecs import Blosc, blosc

    from coba_triton.stream.sinks import BLOSC

    x = torch.rand(10_000, 1000, generator=torch.Generator().manual_seed(1)) / 50
    words = CobaLIF(NEURON, 0.1, spike_dtype="bits")(x)[0].numpy()
    before = blosc.use_threads
    torch.set_num_threads(threads)
    result = run(tmp_path / "run.zarr", source=x, block_steps=4096)
    assert blosc.use_threads == before
    np.testing.assert_array_equal(result.spikes.words(0, 10_000), words)
    first = Blosc(**BLOSC, shuffle=Blosc.NOSHUFFLE).encode(words[: 4096 // 32])
    assert (tmp_path / "run.zarr/spikes/c.0.0").read_bytes()[:-4] == first


@pytest.mark.parametrize("slow", ["kernels", "writing"])
@pytest.mark.parametrize("network", ["feed-forward", "recurrent"])
def test_at_most_three_blocks_are_lost(network: str, slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first step that is not written yet to the last one that is begun."""
    from coba_triton.stream.block_run import BlockRun

    begun, on_their_way = [0], set()
    begin = BlockRun.begin

    def noted(self: BlockRun, x: torch.Tensor, start: int, given: int | None) -> Any:
        begun[0] = start // BLOCK + 1
        if slow == "kernels":
            time.sleep(0.005)
        return begin(self, x, start, given)

    class Noting(ZarrSink):
        def write(self, start: int, *others: Any) -> None:
            if slow == "writing":
                time.sleep(0.02)
            on_their_way.add(begun[0] - start // BLOCK)
            super().write(start, *others)

    monkeypatch.setattr(BlockRun, "begin", noted)
    changes = {"network": recurrent(), "source": drive((6,))} if network == "recurrent" else {}
    run(tmp_path / "run.zarr", sink=Noting(tmp_path / "run.zarr"), **changes)
    assert on_their_way
    assert on_their_way <= {1, 2, 3}


CHILD = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import zarr
from helpers.runs import run

torch.set_num_threads(1)
path, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(seed)

def attempt(pipe):
    try:
        run(path, block_steps=32, resume=True, progress=(lambda done: os.write(pipe, b".")) if pipe else False)
        os._exit(0)
    finally:
        os._exit(1)

killed = 0
while killed < kills:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        attempt(writing)
    os.close(writing)
    early = draw.random() < 0.3  # while the result is made or opened; else after a number of blocks
    for _ in range(0 if early else draw.randrange(4)):
        os.read(reading, 1)
    time.sleep(draw.uniform(0, 0.3 if early else 0.02))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(reading)
    if not os.WIFSIGNALED(status):
        sys.exit(f"finished with {status} after {killed} kills")
    killed += 1
child = os.fork()
if not child:
    attempt(None)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_25_times_at_random_moments(tmp_path: Path) -> None:
    """One process forks a run again and again, kills it with SIGKILL, and lets the last one end."""
    source = drive(steps=20_000)
    run(tmp_path / "whole.zarr", source=source, block_steps=32)
    script = CHILD.replace("resume=True", "resume=True, source=source").replace(
        "from helpers.runs import run", "from helpers.runs import drive, run\nsource = drive(steps=20_000)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run.zarr"), "25", "1"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert_same(tmp_path / "run.zarr", tmp_path / "whole.zarr")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": drive(steps=T - 1)}, "source.steps was 1000 and is 999"),
        ({"network": CobaLIF(NEURON._replace(v_thresh=-51.0), 0.1)}, "parameters.v_thresh was -50.0 and is -51.0"),
        ({"network": CobaLIF(NEURON, 0.2), "source": drive()[:]}, "dt_ms was 0.1 and is 0.2"),
        ({"network": CobaLIF(NEURON, 0.1, order="jump_first")}, 'order was "decay_first" and is "jump_first"'),
        ({"block_steps": 128}, "block_steps was 96 and is 128"),
        ({"record": Record(neurons=[1])}, "record.inputs was true and is false"),
        ({"record": replace(RECORD, every=2)}, "record.every was 1 and is 2"),
        ({"source": drive()[:]}, "source.described was true and is false"),
    ],
    ids=["steps", "threshold", "dt", "order", "block", "record", "every", "input"],
)
def test_changed_configuration_touches_nothing(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    begin(tmp_path / "run.zarr")
    before = contents(tmp_path / "run.zarr")
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tmp_path / "run.zarr", resume=True, **change)
    assert contents(tmp_path / "run.zarr") == before


def damage_progress(path: Path) -> None:
    (path / "progress/c.0").write_bytes(b"12345678")


def damage_state(path: Path) -> None:
    for file in (path / "state").glob("c.*"):
        file.write_bytes(file.read_bytes()[:-8] + b"\0" * 8)


def damage_last_block(path: Path) -> None:
    file = path / "spikes/c.2.0"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_block(path: Path) -> None:
    (path / "v/c.1.0").unlink()


def lose_array(path: Path) -> None:
    shutil.rmtree(path / "g_e")


def lose_metadata(path: Path) -> None:
    (path / "zarr.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_progress, "run.zarr is damaged: block 0 of progress has changed"),
        (damage_state, "run.zarr is damaged: block 0 of state has changed"),
        (damage_last_block, "run.zarr is damaged: block 2 of spikes has changed"),
        (lose_block, "run.zarr is damaged: block 1 of v is missing; restore it from a copy"),
        (lose_array, "run.zarr is damaged: the array 'g_e' is missing"),
        (lose_metadata, "run.zarr is no result of coba_triton"),
    ],
)
def test_damage_is_found_and_touches_nothing(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    begin(tmp_path / "run.zarr")
    damage(tmp_path / "run.zarr")
    before = contents(tmp_path / "run.zarr")
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tmp_path / "run.zarr", resume=True)
    assert contents(tmp_path / "run.zarr") == before


def test_damage_in_an_older_block_is_found_where_it_is_read(tmp_path: Path) -> None:
    run(tmp_path / "run.zarr")
    file = tmp_path / "run.zarr/spikes/c.4.0"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    result = open_result(tmp_path / "run.zarr")
    assert result.spikes[: 4 * BLOCK].any()
    with pytest.raises(ValueError, match="is damaged: block 4 of spikes has changed"):
        result.events()


def foreign_group(path: Path) -> None:
    zarr.create_group(path).create_array("spikes", data=np.arange(5))


def foreign_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work", encoding="utf-8")


def foreign_file(path: Path) -> None:
    path.write_text("a text", encoding="utf-8")


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("foreign", [foreign_group, foreign_folder, foreign_file])
@pytest.mark.filterwarnings("ignore:Object at thesis.tex")
def test_what_is_no_result_is_left_alone(foreign: Callable[[Path], None], resume: bool, tmp_path: Path) -> None:
    foreign(tmp_path / "run.zarr")
    before = contents(tmp_path / "run.zarr")
    with pytest.raises(ValueError, match=r"run.zarr is .*no result of coba_triton"):
        run(tmp_path / "run.zarr", resume=resume, sink=ZarrSink(tmp_path / "run.zarr", overwrite=True))
    with pytest.raises(ValueError, match=r"run.zarr is .*no result of coba_triton"):
        open_result(tmp_path / "run.zarr")
    assert contents(tmp_path / "run.zarr") == before


@pytest.mark.parametrize("name", ["run.zarr", "run.npz"])
def test_a_result_is_replaced_only_if_asked(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    run(path)
    before = contents(path)
    with pytest.raises(FileExistsError, match=rf"{name} exists; .*Sink\(path, overwrite=True\)"):
        run(path)
    assert contents(path) == before
    sink = (ZarrSink if name.endswith("zarr") else NpzSink)(path, overwrite=True)
    assert run(path, sink=sink, source=drive(steps=64)).steps == 64
    assert open_result(path).steps == 64
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_no_result_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("there is no result at")):
        open_result(tmp_path / "run.zarr")
    (tmp_path / "run.npz").write_bytes(b"PK\x03\x04hello")
    with pytest.raises(ValueError, match="run.npz is no result of coba_triton, or damaged"):
        open_result(tmp_path / "run.npz")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(small_disk: Path, tmp_path: Path) -> None:
    filler = small_disk / "filler"
    changes = {"source": drive(steps=30 * BLOCK)}
    begin(small_disk / "run.zarr", 3 * BLOCK, **changes)
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(OSError, match=r"steps are kept: make room and continue with resume=True") as caught:
        run(small_disk / "run.zarr", resume=True, **changes)
    assert caught.value.errno == 28
    kept = open_result(small_disk / "run.zarr").steps
    assert kept >= 3 * BLOCK
    filler.unlink()
    run(small_disk / "run.zarr", resume=True, **changes)
    run(tmp_path / "whole.zarr", **changes)
    assert_same(small_disk / "run.zarr", tmp_path / "whole.zarr")


def test_failing_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where no file system can be mounted: the write of the fourth block fails."""
    write = ZarrSink.write

    def fail(self: ZarrSink, start: int, *rest: Any) -> None:
        if start == 3 * BLOCK:
            raise OSError(28, "No space left on device")
        write(self, start, *rest)

    monkeypatch.setattr(ZarrSink, "write", fail)
    with pytest.raises(OSError, match=r"cannot write steps 288 to 384 \(No space left on device\); 288 steps are kept"):
        run(tmp_path / "run.zarr")
    monkeypatch.undo()
    run(tmp_path / "run.zarr", resume=True)
    run(tmp_path / "whole.zarr")
    assert_same(tmp_path / "run.zarr", tmp_path / "whole.zarr")


@pytest.mark.parametrize("name", ["run.zarr", "run.npz"])
def test_interrupt_keeps_what_was_finished(name: str, tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        if done == 4 * BLOCK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / name, progress=interrupt)
    result = open_result(tmp_path / name)
    assert (result.steps, result.finished) == (4 * BLOCK, False)
    whole = run(tmp_path / "memory", sink=None)
    np.testing.assert_array_equal(result.spikes[:], whole.spikes[: 4 * BLOCK])


def test_iterator_that_ends_before_the_finished_steps(tmp_path: Path) -> None:
    x = drive()[:]
    begin(tmp_path / "run.zarr", source=iter(x.split(100)))
    with pytest.raises(ValueError, match="the 288 steps that are finished already, it ended 188 steps before"):
        run(tmp_path / "run.zarr", source=iter([x[:100]]), resume=True)
    assert torch.equal(drive()[:], x)


MEMORY = """
import sys, tempfile
from pathlib import Path
from coba_triton import CobaLIF, PoissonSource, Record, simulate
from helpers.runs import NEURON
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
steps, imported = int(sys.argv[1]), peak()
with tempfile.TemporaryDirectory() as folder:
    simulate(
        CobaLIF(NEURON, 0.1), PoissonSource(100.0, steps, (1000,), 0.1, weight=0.008), sink=Path(folder) / "run.zarr",
        record=Record(variables=("v",), neurons=range(3), populations={"all": slice(None)}), progress=False,
    )
print(imported, peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow() -> None:
    """1000 neurons: the largest resident set of 100,000 and of 1,000,000 steps."""
    peaks = []
    for steps in (100_000, 1_000_000):
        command = [sys.executable, "-c", MEMORY, str(steps)]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        imported, peak = map(float, done.stdout.split())  # PyTorch alone takes 200 to 500 MiB, as it was built
        peaks.append(peak)
    print(f"peak resident memory in MiB: {peaks}, of which imports take {imported}")
    assert peaks[1] - imported < 380
    assert peaks[1] < peaks[0] + 50
