"""Lists of spikes as inputs: the steps they fall into, and the files and objects that have them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coba_triton import CobaLIF, EventSource, PoissonSource, Record, read_events, simulate, stream_blocks
from helpers.runs import NEURON

TIMES, NEURONS = np.array([0.1, 2.5, 2.5, 0.3, 30.0]), np.array([0, 2, 1, 2, 0])


def events(count: int = 500, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 100.0, count), rng.integers(0, 6, count)


def dense(times: Any, neurons: Any, weights: Any, steps: int, dt: float = 0.1) -> Any:
    """The definition, spike by spike."""
    x = np.zeros((steps, 6))
    for time, neuron, weight in zip(times, neurons, weights, strict=True):
        step = next(k for k in range(steps) if k * dt < time <= (k + 1) * dt or time == 0)
        x[step, neuron] += weight
    return x.astype(np.float32)


@pytest.mark.parametrize("weight", ["one", "each"])
def test_steps_of_spikes(weight: str) -> None:
    times, neurons = events()
    times[:3] = 0.0, 0.05, 99.99
    weights = np.full(500, 0.002) if weight == "one" else np.random.default_rng(1).normal(size=500)
    source = EventSource(times, neurons, 6, 0.1, weight=0.002 if weight == "one" else weights, steps=1000)
    np.testing.assert_array_equal(source[:].numpy(), dense(times, neurons, weights, 1000))
    assert (source.shape, source.dtype) == ((1000, 6), torch.float32)


@pytest.mark.parametrize("block", [1, 7, 32, 999, 5000])
def test_blocks_change_no_bit(block: int) -> None:
    times, neurons = events()
    weights = np.random.default_rng(1).normal(size=500)
    source = EventSource(times, neurons, (2, 3), 1.0, weight=weights, steps=100)
    blocks = list(stream_blocks(source, block))
    assert torch.equal(torch.cat(blocks), source[:])
    assert (source[:] != 0).sum() < 500  # some fall into one step
    added = torch.ones(40, 2, 3)
    source.fill(20, added, add=True)
    assert torch.equal(added, source[20:60] + 1)


@pytest.mark.parametrize("dt", [0.1, 0.001, 1 / 3, 0.7])
def test_spikes_on_the_grid_of_results(dt: float) -> None:
    """Whatever the rounding of their times is: of a product, a quotient, single precision, or the digits of a file."""
    steps = np.arange(20_000)
    exact = (steps + 1) * dt
    for times in (exact, np.round(exact, 9), np.cumsum(np.full(20_000, dt)), exact.astype(np.float32)[:500]):
        source = EventSource(times, np.zeros(len(times), int), 1, dt)
        assert source.shape == (len(times), 1)
        assert source[:].sum() == source[:].count_nonzero() == len(times)


def test_part_of_a_list() -> None:
    times, neurons = events()
    whole = EventSource(times, neurons + 101, 6, 0.1, first=101, steps=1000)
    part = EventSource(times, neurons, 6, 0.1, start=30.0, steps=400)
    assert torch.equal(part[:], whole[300:700])
    on_the_grid = EventSource([29.9, 30.0, 30.1], [0, 1, 2], 3, 0.1, start=30.0)
    assert on_the_grid[:].tolist() == [[0, 0, 1]]
    assert EventSource([], [], 3, 0.1, steps=5)[:].tolist() == [[0, 0, 0]] * 5


def test_a_run_on_the_events_of_another(tmp_path: Path) -> None:
    """Its spikes by way of every file that it can write, and as they are."""
    first = simulate(
        CobaLIF(NEURON, 0.1), PoissonSource(1500.0, 2000, 6, 0.1, weight=2**-9, seed=2), sink=tmp_path / "r.npz"
    )
    assert first.spike_counts().min() > 5
    simulate(CobaLIF(NEURON, 0.1), PoissonSource(1500.0, 2000, 6, 0.1, weight=2**-9, seed=2), sink=tmp_path / "r.zarr")
    first.to_csv(tmp_path / "r.csv")
    np.savez(tmp_path / "events.npz", times=first.events()[0], neurons=first.events()[1])
    record = Record(neurons=[3])
    want = simulate(CobaLIF(NEURON, 0.1), torch.from_numpy(first.spikes[:]).float() * 0.25, record=record)
    for name in ("r.npz", "r.zarr", "r.csv", "events.npz"):
        source = EventSource(*read_events(tmp_path / name), shape=6, dt=0.1, steps=2000, weight=0.25)
        got = simulate(CobaLIF(NEURON, 0.1), source, record=record, block_steps=96)
        np.testing.assert_array_equal(got.traces["v"][:], want.traces["v"][:])
        np.testing.assert_array_equal(got.spikes[:], want.spikes[:])
    described = got.attributes["config"]["source"]
    assert (described["kind"], described["events"]) == ("events", len(first.events()[0]))
    other = EventSource(TIMES, NEURONS, 6, 0.1, steps=2000)
    assert json.dumps(other.describe()) != json.dumps(EventSource(TIMES + 0.1, NEURONS, 6, 0.1, steps=2000).describe())


NEST = "# NEST version: 3.8.0\n# RecordingBackendASCII version: 2\n"
ROWS = [f"{neuron}\t{time:.3f}" for time, neuron in zip(TIMES, NEURONS, strict=True)]
CSV = [f"{time},{neuron}" for time, neuron in zip(TIMES, NEURONS, strict=True)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.csv", "time_ms,neuron\n" + "\n".join(CSV)),
        ("e.csv", "\ufefftime_ms,neuron\r\n" + "\r\n".join(CSV) + "\r\n"),
        ("e.csv", '"neuron","cell","time_ms"\n' + "\n".join(f"{n},7,{t}" for t, n in zip(TIMES, NEURONS, strict=True))),
        ("spikes-7-0.dat", NEST + "sender\ttime_ms\n" + "\n".join(ROWS) + "\n"),
        ("spikes-7-0.DAT", NEST + "# sender\ttime_ms\n" + "\n".join(ROWS)),
        ("spikes-7-0.dat", NEST + "sender\ttime_ms\tV_m\n" + "\n".join(f"{row}\t-55.1" for row in ROWS)),
        ("spikes-7-0.gdf", "\n".join(ROWS)),
    ],
    ids=["csv", "csv of Windows", "csv with other columns", "nest", "nest with #", "nest with V_m", "gdf"],
)
def test_text_files(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode())
    times, neurons = read_events(tmp_path / name)
    np.testing.assert_array_equal(times, TIMES)
    np.testing.assert_array_equal(neurons, NEURONS)
    assert neurons.dtype == np.int64
    header = content.split("\n0\t")[0].split("\n0.1")[0].split("\n0,")[0]
    (tmp_path / f"empty-{name}").write_bytes(b"" if name.endswith("gdf") else header.encode())
    assert [len(column) for column in read_events([tmp_path / f"empty-{name}"] * 2)] == [0, 0]
    times, neurons = read_events([tmp_path / name, str(tmp_path / name)])
    np.testing.assert_array_equal(times, [*TIMES, *TIMES])


def test_npz_of_nest_and_of_other_machines(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", senders=NEURONS.astype(">u2"), times=TIMES.astype(">f8"))
    times, neurons = read_events(tmp_path / "e.npz")
    np.testing.assert_array_equal(times, TIMES)
    np.testing.assert_array_equal(neurons, NEURONS)


def test_nwb(tmp_path: Path) -> None:
    """A table of units as the format lays it out: concatenated times in s, and where those of each unit end."""
    h5py = pytest.importorskip("h5py", reason="the extra nwb is not installed")
    order = np.argsort(NEURONS, kind="stable")
    with h5py.File(tmp_path / "e.nwb", "w") as file:
        units = file.create_group("units")
        units["id"] = np.array([11, 12, 13, 14])
        units["spike_times"] = TIMES[order] / 1000
        units["spike_times_index"] = np.array([2, 3, 5, 5], np.uint8)
    times, neurons = read_events(tmp_path / "e.nwb")
    # a division by 1000 and its inverse round twice, 2.2e-16 each
    np.testing.assert_allclose(times, TIMES[order], rtol=1e-14)
    np.testing.assert_array_equal(neurons, NEURONS[order])
    with h5py.File(tmp_path / "none.nwb", "w") as file:
        file["acquisition"] = 1
    (tmp_path / "text.nwb").write_text("hello")
    for name in ("none.nwb", "text.nwb"):
        with pytest.raises(
            ValueError, match=rf"{name} has no table of units with spike times \(.*; give an NWB file that has"
        ):
            read_events(tmp_path / name)


class _Train:
    """What is asked of a spike train of Neo."""

    def __init__(self, times: Any) -> None:
        self.magnitude = np.asarray(times)

    def rescale(self, unit: str) -> _Train:
        assert unit == "ms"
        return self


class _Segment:
    def __init__(self, *trains: _Train) -> None:
        self.spiketrains = trains


class _Block:
    def __init__(self, *segments: _Segment) -> None:
        self.segments = segments


def test_trains_of_neo() -> None:
    segment = _Segment(*(_Train(TIMES[n == NEURONS]) for n in range(4)))
    for source in (segment, _Block(segment)):
        times, neurons = read_events(source)
        order = np.argsort(NEURONS, kind="stable")
        np.testing.assert_array_equal(times, TIMES[order])
        np.testing.assert_array_equal(neurons, NEURONS[order])
    with pytest.raises(ValueError, match="_Block must have one segment, got 2; pass the segment, or times and neurons"):
        read_events(_Block(segment, segment))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_neo(tmp_path: Path) -> None:
    neo = pytest.importorskip("neo", reason="the extra neo is not installed")
    source = PoissonSource(1500.0, 2000, 6, 0.1, weight=2**-9, seed=2)
    result = simulate(CobaLIF(NEURON, 0.1), source)
    block = result.to_neo()
    given = EventSource(*read_events(block), shape=6, dt=0.1, steps=2000)[:]
    np.testing.assert_array_equal(given.bool().numpy(), result.spikes[:])
    neo.io.NeoMatlabIO(str(tmp_path / "e.mat")).write_block(block)
    given = EventSource(*read_events(tmp_path / "e.mat"), shape=6, dt=0.1, steps=2000)[:]
    np.testing.assert_array_equal(given.bool().numpy(), result.spikes[:])
    (tmp_path / "e.unknown").write_text("hello")
    with pytest.raises(ValueError, match=r"e.unknown is nothing that Neo reads as one block \(.*; give another file"):
        read_events(tmp_path / "e.unknown")


@pytest.mark.parametrize(("name", "package"), [("e.nwb", "h5py"), ("e.nix", "neo")])
def test_missing_packages(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).touch()
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=r'which is not installed.* pip install "coba-triton\[(nwb|neo)\]"'):
        read_events(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.csv", "t;n\n1;2", "must begin with the header time_ms,neuron, got 't;n'; write it there"),
        ("e.csv", "time_ms,neuron\n1.0,x", "is no list of spikes below its header (could not convert string 'x'"),
        ("e.csv", "time_ms,neuron\n1.0", "is no list of spikes below its header ("),
        ("e.csv", "time_ms,neuron\n1.0,2.5", "must number its neurons, got 2.5; are the columns exchanged?"),
        ("e.csv", b"\xe9", "is no text in UTF-8 ("),
        (
            "e.dat",
            "sender\ttime_step\ttime_offset\n1\t3\t0.0",
            "has sender, time_step, time_offset; record with time_in_steps=F",
        ),
        ("e.npz", b"PK\x03\x04", "is no .npz file of numbers, or damaged ("),
        ("e.npz", {"a": np.ones(3)}, "must have arrays times, in ms, and neurons, got a; rename them"),
        ("e.npz", {"times": np.ones(3), "neurons": np.ones(2, int)}, "must have a time and a neuron for every spike, got"),
        ("e.npz", {"times": np.ones(3), "neurons": np.array(["a"] * 3)}, "for every spike, got float64 [3] and <U1 [3]"),
        ("e.pkl", b"", "is a pickle, which may run any code when it is read"),
    ],
)
def test_message_for_a_file(name: str, content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, dict):
        np.savez(tmp_path / name, **content)
    else:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_events(tmp_path / name)


@pytest.mark.parametrize("name", ["e.csv", "e.npz", "e.dat", "e.nwb"])
def test_a_pipe_is_no_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)  # reading it would wait for a writer
    with pytest.raises(ValueError, match="is no regular file; give the path of a list of spikes"):
        read_events(tmp_path / name)


def test_messages_for_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file 'x.csv'; give the path of a list of spikes"):
        read_events("x.csv")
    with pytest.raises(TypeError, match="source must be a path, a Block or Segment of Neo, or several, got int"):
        read_events(3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"neurons": [0, 1]}, ValueError, "a number and an integer for every spike, got float64 [3] and int64 [2]"),
        ({"neurons": [0.0, 1.0, 2.0]}, ValueError, "got float64 [3] and float64 [3]"),
        (
            {"neurons": [0, 1, 3]},
            ValueError,
            "neurons must be from 0 to 2 for channels [3], got 0 to 3; change shape or first",
        ),
        ({"first": 1}, ValueError, "neurons must be from 1 to 3 for channels [3], got 0 to 2"),
        ({"times": [0.1, -1.0, 0.2]}, ValueError, "times must not be negative, got -1.0 ms; pass start="),
        ({"times": [0.1, np.nan, 0.2]}, ValueError, "times must be finite, got nan at [1]"),
        ({"weight": np.inf}, ValueError, "weight must be finite, got inf at [0]"),
        ({"weight": np.ones(2)}, ValueError, "weight must be a number or one for every spike, [3], got [2]"),
        ({"times": [0.1, 0.2, 1e300]}, ValueError, "times must be of the first 281,474,976,710,656 steps, got 1e+300 ms"),
        ({"times": [10**400, 0.1, 0.2]}, TypeError, "times must be numbers, got [1000"),
        ({"start": 5.0}, ValueError, "steps must be given if there is no spike, got None"),
        ({"steps": 0}, ValueError, "steps must be a positive int, got 0"),
        ({"dt": -1.0}, ValueError, "dt must be a positive finite number"),
        ({"shape": (3, 0)}, ValueError, "every size in shape must be a positive int, got 0"),
    ],
)
def test_message(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"times": [0.1, 0.2, 0.3], "neurons": [0, 1, 2], "shape": 3, "dt": 0.1} | change
    with pytest.raises(error, match=re.escape(message)):
        EventSource(**arguments)
