"""What docs/reliability.md promises: of damage, exchanged parts, another input, several writers, and strangers' files."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import coba_triton
from coba_triton import (
    CobaLIF,
    CobaLIFFeedForwardState,
    CobaLIFRecurrent,
    CobaLIFState,
    EventSource,
    MemorySink,
    NpzSink,
    PoissonSource,
    Record,
    ZarrSink,
    open_result,
    simulate,
)
from coba_triton.stream import sinks
from coba_triton.stream.identity import checksum_of
from coba_triton.stream.store import Store, describe_group
from helpers.runs import (
    BLOCK,
    INPUTS,
    NEURON,
    RECORD,
    N,
    Stop,
    T,
    assert_same,
    begin,
    contents,
    drive,
    recurrent,
    run,
    stop_at,
    whole,
)
from programs.fuzz_stores import everything, fuzz, same

zarr = pytest.importorskip("zarr", reason="the extra stream is not installed")


def input_of(steps: int = T) -> Tensor:
    return drive(steps=steps)[:]


def changed(x: Tensor, step: int) -> Tensor:
    """The last bit of a number in one step is another one."""
    x = x.clone()
    x.view(torch.int32)[step, 3] ^= 1
    return x


# The same input


def memmap(x: Tensor, folder: Path) -> Any:
    np.save(folder / "x.npy", x.numpy())
    return np.load(folder / "x.npy", mmap_mode="r")


FORMS: dict[str, Callable[[Tensor, Path], Any]] = {
    "tensor": lambda x, folder: x,
    "numpy": lambda x, folder: x.numpy(),
    "part": lambda x, folder: torch.cat([x, x], 1)[:, :N],
    "memmap": memmap,
    "iterable": lambda x, folder: iter(x.split(130)),
}


@pytest.mark.parametrize("step", [0, BLOCK - 1, 2 * BLOCK + 40, T - 1])
@pytest.mark.parametrize("form", FORMS)
def test_another_input_is_refused(form: str, step: int, tmp_path: Path) -> None:
    """Wherever it differs in what was read: the finished run's last step, and what an interrupted one had read."""
    x, path = input_of(), tmp_path / "run.zarr"
    first = step // BLOCK * BLOCK
    message = f"run.zarr was begun with another input: steps {first} to {min(first + BLOCK, T):,} of source differ"
    for finished in (False, True):
        if not finished and step >= 3 * BLOCK:
            continue
        shutil.rmtree(path, ignore_errors=True)
        if finished:
            run(path, source=FORMS[form](x, tmp_path))
        else:
            begin(path, source=FORMS[form](x, tmp_path))
        before = contents(path)
        with pytest.raises(ValueError, match=message):
            run(path, source=FORMS[form](changed(x, step), tmp_path), resume=True)
        assert contents(path) == before
        assert run(path, source=FORMS[form](x, tmp_path), resume=True).finished


def test_what_was_not_read_yet_may_change(tmp_path: Path) -> None:
    x = changed(input_of(), 500)
    begin(tmp_path / "run.zarr", source=input_of())
    run(tmp_path / "run.zarr", source=x, resume=True)
    run(tmp_path / "whole.zarr", source=x)
    assert_same(tmp_path / "run.zarr", tmp_path / "whole.zarr")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what such strong input does to the neurons
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_every_dtype_are_compared(dtype: torch.dtype, tmp_path: Path) -> None:
    x = (input_of(100) > 0).to(dtype)
    network = CobaLIF(NEURON, 0.1).to(dtype) if dtype == torch.float64 else CobaLIF(NEURON, 0.1)
    run(tmp_path / "run.zarr", network=network, source=x)
    x[99, 0] = 1 - x[99, 0].to(torch.float32)
    with pytest.raises(ValueError, match="steps 96 to 100 of source differ"):
        run(tmp_path / "run.zarr", network=network, source=x, resume=True)


@pytest.mark.parametrize(("threads", "tile"), [(1, 64), (1, 1024), (2, 64), (2, 128)])
@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (96, 200), (33, 130)])
def test_whoever_reads_the_input_makes_the_same_checksum(shape: tuple[int, int], threads: int, tile: int) -> None:
    """The kernels, by tiles and threads of any size, and what reads it alone."""
    from coba_triton.backend.cpu.launch import ForwardStream, lanes, row_sums
    from coba_triton.ops.constants import constants_table
    from coba_triton.tuning import tables as tuning

    x, neurons = torch.randn(shape, generator=torch.Generator().manual_seed(0)), shape[1]
    constants = constants_table(NEURON, 0.1, torch.float32, x.device, x.shape[1:])
    before, sums = torch.get_num_threads(), lanes(neurons)
    torch.set_num_threads(threads)
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            tuning.forced("feed_forward_forward", {"tile": tile, "threads": threads}),
        ):
            patch.setattr("coba_triton.backend.cpu.launch.shared.MIN_STEPS_PER_THREAD", 1)
            with contextlib.closing(ForwardStream(constants, False, torch.zeros(3, neurons), len(x))) as stream:
                for job in stream.submit(x, torch.empty(-(-len(x) // 32), neurons, dtype=torch.int32), sums)[1]:
                    job.result()
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(sums, row_sums(x))
    assert sums.any()


@pytest.mark.parametrize("kind", ["numbers", "spikes"])
@pytest.mark.parametrize("columns", [1, 20, 64, 130])
def test_changes_of_the_input_change_its_checksum(kind: str, columns: int) -> None:
    """Every bit, and what people do to a matrix: exchange, shift, mirror, negate, scale."""
    x = torch.randn(96, columns, generator=torch.Generator().manual_seed(1))
    if kind == "spikes":
        x = (x > 1).float()
    others = [
        -x,
        2 * x,
        x + 1,
        x.flip(0),
        x[:-1],
        *(x.roll(k, 0) for k in (1, 5, 32, 48)),
        *(x.roll(k, 1) for k in (1, 16, 17)),
    ]
    others += [x.flip(1), x.roll(columns // 2, 1), torch.cat([x[:, columns // 2 :], x[:, : columns // 2] * 0], 1)]
    for step in range(95):
        others.append(torch.cat([x[:step], x[step + 1 : step + 2], x[step : step + 1], x[step + 2 :]]))
    for place in range(0, x.numel(), 7):
        for bit in (0, 1, 13, 22, 23, 30, 31):
            others.append(x.clone())
            others[-1].view(torch.int32).view(-1)[place] ^= 1 << bit if bit < 31 else -(2**31)
    said = checksum_of(x)
    different = [
        other for other in others if other.shape != x.shape or not torch.equal(other.view(torch.int32), x.view(torch.int32))
    ]
    assert len(different) > 100 and all(checksum_of(other) != said for other in different)


def test_a_described_source_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "run.zarr")
    started: list[int] = []
    fill = PoissonSource.fill
    monkeypatch.setattr(
        PoissonSource,
        "fill",
        lambda self, start, *rest, **more: (started.append(start), fill(self, start, *rest, **more))[1],
    )
    run(tmp_path / "run.zarr", resume=True)
    assert min(start for start in started if start) == 3 * BLOCK
    started.clear()
    run(tmp_path / "run.zarr", resume=True)
    assert set(started) <= {0}  # the first steps, which tell its dtype
    with pytest.raises(ValueError, match="was begun with another configuration: source.seed was 2 and is 3"):
        run(tmp_path / "run.zarr", source=PoissonSource(1500.0, T, (N,), 0.1, weight=2**-9, seed=3), resume=True)


# Longer sources


@pytest.mark.parametrize("steps", [BLOCK, 3 * BLOCK, 4 * BLOCK + 40, T - 1], ids="to {}".format)
@pytest.mark.parametrize("form", ["poisson", "tensor", "iterable", "recurrent", "events"])
def test_a_run_is_extended_bit_for_bit(form: str, steps: int, tmp_path: Path) -> None:
    def changes(steps: int) -> dict[str, Any]:
        if form == "recurrent":
            return {"network": recurrent(), "source": drive((INPUTS,), steps)}
        if form == "poisson":
            return {"source": drive(steps=steps)}
        x = input_of()[:steps]
        if form == "events":
            step, neuron = x.nonzero(as_tuple=True)
            return {"source": EventSource((step + 1) * 0.1, neuron, N, 0.1, steps=steps, weight=2**-9)}
        return {"source": x if form == "tensor" else iter(x.split(77))}

    record = replace(RECORD, every=3)
    run(tmp_path / "run.zarr", record=record, **changes(steps))
    assert open_result(tmp_path / "run.zarr").steps == steps
    with pytest.raises(Stop):  # killed on the way as well
        run(tmp_path / "run.zarr", record=record, resume=True, progress=stop_at(steps // BLOCK * BLOCK), **changes(T))
    result = run(tmp_path / "run.zarr", record=record, resume=True, **changes(T))
    assert (result.steps, result.finished) == (T, True)
    run(tmp_path / "whole.zarr", record=record, **changes(T))
    assert_same(tmp_path / "run.zarr", tmp_path / "whole.zarr")
    assert zarr.open_group(tmp_path / "run.zarr", mode="r")["v"].shape == (T // 3, 2)


@pytest.mark.parametrize("steps", [0, BLOCK, 2 * BLOCK + 40])
def test_whenever_a_run_dies_it_is_resumed(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is begun (0), or extended, before each of the writes that it makes."""

    class Died(BaseException):
        pass

    put, replace_text = ZarrSink._put, sinks._replace_text
    total = 3 * BLOCK + 7
    path, writes, x = tmp_path / "run.zarr", [0], input_of(total)
    record = Record(neurons=[3])

    def dying(write: Callable[..., None], limit: int) -> Callable[..., None]:
        def count(*arguments: Any) -> None:
            writes[0] += 1
            if writes[0] > limit:
                raise Died
            write(*arguments)

        return count

    run(tmp_path / "whole.zarr", source=x, record=record)
    for limit in itertools.count():
        shutil.rmtree(path, ignore_errors=True)
        if steps:
            run(path, source=x[:steps], record=record)
        writes[0] = 0
        monkeypatch.setattr(ZarrSink, "_put", dying(put, limit))
        monkeypatch.setattr(sinks, "_replace_text", dying(replace_text, limit))
        with contextlib.suppress(Died):
            run(path, source=x, resume=True, record=record)
        monkeypatch.undo()
        assert not path.exists() or open_result(path).steps >= steps // BLOCK * BLOCK
        assert run(path, source=x, resume=True, record=record).steps == total
        assert_same(path, tmp_path / "whole.zarr")
        if writes[0] <= limit:
            break
    assert limit > 15
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.zarr", "whole.zarr"]


@pytest.mark.parametrize("steps", [BLOCK, T - 1])
def test_an_extension_from_another_beginning_is_refused(steps: int, tmp_path: Path) -> None:
    run(tmp_path / "run.zarr", source=input_of(steps))
    before = contents(tmp_path / "run.zarr")
    for source in (changed(input_of(), steps - 1), input_of(steps - 1), iter([input_of(steps - 1)])):
        with pytest.raises(ValueError, match=r"differ|source.steps was|ended 1 steps before"):
            run(tmp_path / "run.zarr", source=source, resume=True)
        assert contents(tmp_path / "run.zarr") == before


@pytest.mark.parametrize("sink", [None, "run.npz", "run.zarr"])
def test_the_last_state_goes_on(sink: str | None, tmp_path: Path) -> None:
    for network, source in ((CobaLIF(NEURON, 0.1), input_of()), (recurrent(), drive((INPUTS,))[:])):
        path = tmp_path / f"{type(network).__name__}-{sink}" if sink else None
        result = run(tmp_path, sink=path, network=network, source=source[:500], record=Record())
        found = (open_result(path) if path else result).state
        assert isinstance(found, CobaLIFState if network is not None and len(found) == 4 else CobaLIFFeedForwardState)
        _, states = whole(network, source)
        assert torch.equal(found.v, states.v[499])
        rest = simulate(network, source[500:], state=found, progress=False)
        expected = whole(network, source)[0][500:].bool().numpy()
        np.testing.assert_array_equal(rest.spikes[:], expected)


def test_a_result_without_steps_has_no_state(tmp_path: Path) -> None:
    begin(tmp_path / "run.zarr", 0)
    with pytest.raises(ValueError, match="the result has no state; run it for a step at least"):
        _ = open_result(tmp_path / "run.zarr").state


@pytest.mark.parametrize("every", [1, 2, 10, 33, 1000, 2000])
@pytest.mark.parametrize("sink", ["run.npz", "run.zarr"])
def test_every_nth_step_is_recorded(every: int, sink: str, tmp_path: Path) -> None:
    for network, source in ((CobaLIF(NEURON, 0.1), drive()), (recurrent(), drive((INPUTS,)))):
        path = tmp_path / f"{type(network).__name__}-{sink}"
        run(path, network=network, source=source, record=replace(RECORD, every=every))
        result, (spikes, states) = open_result(path), whole(network, source[:])
        assert result.every == every and result.traces["v"].shape == (T // every, 2)
        for name in ("v", "g_e", "g_i"):
            expected = getattr(states, name)[every - 1 :: every][:, [7, 0]].numpy()
            np.testing.assert_array_equal(result.traces[name][:], expected)
        np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())


def test_an_interval_that_no_block_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"record.every must have a common multiple with 32 of at most 65,536, got 2049"):
        simulate(CobaLIF(NEURON, 0.1), drive(), record=Record(every=2049))
    with pytest.raises(ValueError, match="record.every must be a positive int"):
        simulate(CobaLIF(NEURON, 0.1), drive(), record=Record(every=0))


def test_a_network_without_input_is_resumed(tmp_path: Path) -> None:
    network = CobaLIFRecurrent(0, N, NEURON._replace(v_rest=-45.0), 0.1)
    for name in ("run.zarr", "whole.zarr"):
        if name == "run.zarr":
            begin(tmp_path / name, network=network, source=torch.zeros(T, 0))
        assert run(tmp_path / name, network=network, source=torch.zeros(T, 0), resume=True).spikes[:].any()
    assert_same(tmp_path / "run.zarr", tmp_path / "whole.zarr")


# Damage


def part(path: Path, blocks: int = 5, seed: int = 2, **changes: Any) -> None:
    """An interrupted run, with arrays of the caller."""
    source = PoissonSource(1500.0, T, (N,), 0.1, weight=2**-9, seed=seed)
    changes.setdefault("sink", ZarrSink(path, arrays={"signal": np.arange(5.0) + seed}))
    with contextlib.suppress(Stop):
        run(path, source=source, progress=stop_at(blocks * BLOCK), **changes)


CHUNKS = ("spikes/c.3.0", "v/c.3.0", "g_e/c.0.0", "counts/c.4.0", "input_e/c.2", "recorded/c.0", "population_1/c.0")
CHUNKS += ("signal/c.0", "progress/c.0", "state/c.0.0.0", "checksums/c.3.0", "zarr.json")


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_missing_part_is_noticed(chunk: str, finished: bool, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    part(path, 11 if finished else 5)
    (path / ("state/c.1.0.0" if "state" in chunk and not finished else chunk)).unlink(missing_ok="state" in chunk)
    if "state" in chunk:
        for file in (path / "state").glob("c.*"):
            file.unlink()
    with pytest.raises(ValueError, match=r"is damaged: block \d of \w+ is missing|is no result of coba_triton"):
        everything(path)
    before = contents(path)
    with pytest.raises(ValueError, match="is missing; restore it from a copy|is no result of coba_triton"):
        run(path, sink=ZarrSink(path, arrays={"signal": np.arange(5.0) + 2}), resume=True)
    assert contents(path) == before


EXCHANGES = [
    ("spikes/c.3.0", "spikes/c.2.0"),
    ("v/c.0.0", "g_e/c.0.0"),
    ("v/c.0.0", "v/c.1.0"),
    ("checksums/c.0.0", "checksums/c.1.0"),
    ("population_0/c.0", "population_1/c.0"),
]


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda pair: pair[0])
def test_exchanged_parts_are_noticed(exchange: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    part(path)
    one, other = (path / name for name in exchange)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with pytest.raises(ValueError, match="run.zarr is damaged: block"):
        everything(path)


@pytest.mark.parametrize("chunk", [*CHUNKS[:8], "state/c.0.0.0", "checksums/c.3.0", "checksums/c.4.0"])
def test_parts_of_another_run_are_noticed(chunk: str, tmp_path: Path) -> None:
    path, other = tmp_path / "run.zarr", tmp_path / "other.zarr"
    part(path)
    part(
        other, seed=3, record=replace(RECORD, neurons=[3, 4], populations={"first": [1, 2, 3, 4, 5], "odd": range(0, N, 2)})
    )
    assert (path / chunk).read_bytes() != (other / chunk).read_bytes()
    shutil.copy(other / chunk, path / chunk)
    with pytest.raises(ValueError, match="run.zarr is damaged: "):
        everything(path)


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_older_state_or_progress_gives_no_other_bits(blocks: int, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    part(path, 7)
    newer = {name: (path / name).read_bytes() for name in ("state/c.0.0.0", "state/c.1.0.0", "progress/c.0")}
    shutil.rmtree(path)
    part(path, 7 - blocks)
    older = {name: (path / name).read_bytes() for name in newer}
    shutil.rmtree(path)
    part(path, 7)
    kept = contents(path)
    run(tmp_path / "whole.zarr", sink=ZarrSink(tmp_path / "whole.zarr", arrays={"signal": np.arange(5.0) + 2}))
    names = ["progress/c.0", "state/c.0.0.0", *(["state/c.1.0.0"] if blocks == 2 else [])]
    for name in names:  # the newest state is in row 0, that of the block before in row 1
        (path / name).write_bytes(older[name] if older[name] != (path / name).read_bytes() else older["state/c.1.0.0"])
        sink = ZarrSink(path, arrays={"signal": np.arange(5.0) + 2})
        try:
            run(path, sink=sink, resume=True)
        except ValueError as error:
            assert "is damaged: state is not that after block" in str(error)
        else:
            assert name != "state/c.0.0.0" and same(everything(path), everything(tmp_path / "whole.zarr"))
        shutil.rmtree(path)
        for file, (content, _) in kept.items():
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_bytes(content)


def write_progress(path: Path, steps: int) -> None:
    from google_crc32c import value

    data = np.array([steps]).tobytes()
    (path / "progress/c.0").write_bytes(data + value(data).to_bytes(4, "little"))


@pytest.mark.parametrize("steps", [-1, 1, 97, 5 * BLOCK - 1, 5 * BLOCK + 1, 6 * BLOCK, 2**62])
@pytest.mark.parametrize("resume", [False, True])
def test_progress_that_no_block_ends_with_is_refused(steps: int, resume: bool, tmp_path: Path) -> None:
    part(tmp_path / "run.zarr")
    write_progress(tmp_path / "run.zarr", steps)
    with pytest.raises(ValueError, match=r"progress is .* is the end of no block|of checksums is missing|progress is -1"):
        if resume:
            run(
                tmp_path / "run.zarr",
                sink=ZarrSink(tmp_path / "run.zarr", arrays={"signal": np.arange(5.0) + 2}),
                resume=True,
            )
        else:
            open_result(tmp_path / "run.zarr")


@pytest.mark.parametrize("how", ["grown", "extended", "replaced"])
def test_a_result_that_was_opened_before_a_run_wrote_on_is_not_called_damaged(how: str, tmp_path: Path) -> None:
    """What it had is read as ever, unless the run has written over it: then one opens it again."""
    path = tmp_path / "run.zarr"
    run(path, source=drive(steps=BLOCK + 7))
    opened = open_result(path)
    if how == "replaced":
        run(ZarrSink(path, overwrite=True), source=torch.zeros(BLOCK + 7, N))
    else:
        run(path, source=drive(steps=BLOCK + 9 if how == "extended" else 5 * BLOCK), resume=True)
    with pytest.raises(ValueError, match="has changed since it was opened, as a run has written to it: .*; open it again"):
        opened.state  # noqa: B018
    if how != "replaced":
        assert np.array_equal(opened.spikes[:BLOCK], open_result(path).spikes[:BLOCK])
    open_result(path).state  # noqa: B018


def test_progress_of_a_finished_run_is_its_length(tmp_path: Path) -> None:
    run(tmp_path / "run.zarr")
    write_progress(tmp_path / "run.zarr", 3 * BLOCK)
    with pytest.raises(ValueError, match="is damaged: it is finished with 1000 steps, and progress is 288"):
        open_result(tmp_path / "run.zarr")


# Strangers' files


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


def test_no_code_of_a_stranger_runs(tmp_path: Path) -> None:
    """A group of zarr format 2 whose codec unpickles: nothing opens it. That it would run is tried first."""
    from numcodecs import Pickle
    from numcodecs.registry import register_codec

    register_codec(Pickle)
    trace, path = tmp_path / "ran", tmp_path / "run.zarr"
    payload = pickle.dumps(Payload(trace))
    for name in ("progress", "spikes", "state"):
        (path / name).mkdir(parents=True)
        meta = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "compressor": {"id": "pickle"}, "order": "C"}
        (path / name / ".zarray").write_text(json.dumps(meta | {"fill_value": None, "filters": [{"id": "vlen-utf8"}]}))
        (path / name / "0").write_bytes(payload)
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    (path / ".zattrs").write_text(json.dumps({"format": "coba_triton result", "format_version": 2, "config": {}}))
    for version in (2, 3):
        for call in (
            lambda: open_result(path),
            lambda: run(path, resume=True),
            lambda: run(path, sink=ZarrSink(path, overwrite=True)),
        ):
            with pytest.raises(ValueError, match=r"run.zarr is "):
                call()
            assert not trace.exists()
        if version == 2:  # the same under the metadata of a good group of format 3
            good = tmp_path / "good.zarr"
            run(good)
            shutil.copy(good / "zarr.json", path / "zarr.json")
    pickle.loads(payload)
    assert trace.exists()


def craft(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Other attributes, with the checksum of those."""
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    change(attributes)
    (path / "zarr.json").write_text(describe_group(attributes))


CRAFTED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no config": lambda a: a.pop("config"),
    "config a list": lambda a: a.update(config=[]),
    "no record": lambda a: a["config"].pop("record"),
    "source": lambda a: a["config"].update(source=[]),
    "dt": lambda a: a["config"].update(dt_ms=-1),
    "huge": lambda a: a["config"].update(neurons=[10**10]),
    "neurons": lambda a: a["config"].update(neurons=[10**400]),
    "text": lambda a: a["config"].update(neurons="many"),
    "block_steps": lambda a: a["config"].update(block_steps=2**40),
    "every": lambda a: a["config"]["record"].update(every=0),
    "variables": lambda a: a["config"]["record"].update(variables=["../../etc"]),
    "populations": lambda a: a["config"]["record"].update(populations={"a": 1, "b": 2, "c": 3}),
    "parameters": lambda a: a["config"]["parameters"].update(v_thresh="x"),
    "arrays": lambda a: a["arrays"].update({"../up": a["arrays"]["recorded"]}),
    "shape": lambda a: a["arrays"]["recorded"].update(shape=[10**10]),
    "rows": lambda a: a["arrays"]["recorded"].update(rows=0),
    "dtype": lambda a: a["arrays"]["recorded"].update(dtype="O"),
    "checksums": lambda a: a["arrays"]["recorded"].update(checksums=3),
    "steps": lambda a: a.update(steps="all"),
    "run": lambda a: a.update(run=7),
    "finished": lambda a: a.update(finished=1),
    "versions": lambda a: a.update(versions=None),
    "version": lambda a: a.update(format_version=[1]),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_attributes_are_refused(name: str, tmp_path: Path) -> None:
    part(tmp_path / "run.zarr")
    craft(tmp_path / "run.zarr", CRAFTED[name])
    with pytest.raises(ValueError, match=r"run.zarr is (damaged|a result of format version|no result)"):
        everything(tmp_path / "run.zarr")


def test_attributes_that_say_too_much_take_no_memory(tmp_path: Path) -> None:
    """A chunk that would be 1.9 GiB large, of a file of some hundred bytes."""
    import tracemalloc

    run(tmp_path / "run.zarr", record=Record())
    craft(tmp_path / "run.zarr", lambda a: a["config"].update(block_steps=BLOCK * 2**20 // 4 // 3 * 3, neurons=[N * 8]))
    tracemalloc.start()
    with pytest.raises(ValueError, match="run.zarr is damaged"):
        everything(tmp_path / "run.zarr")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_older_results_say_who_wrote_them(tmp_path: Path) -> None:
    run(tmp_path / "run.zarr")
    craft(tmp_path / "run.zarr", lambda a: a.update(format_version=1, versions={"coba_triton": "0.1.0"}))
    message = "run.zarr is a result of format version 1, written by coba_triton 0.1.0, and this one reads 2"
    for call in (lambda: open_result(tmp_path / "run.zarr"), lambda: run(tmp_path / "run.zarr", resume=True)):
        with pytest.raises(ValueError, match=message):
            call()


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    for name in ("zarr.json", "progress/c.0", "spikes/c.0.0", "checksums/c.0.0"):
        path = tmp_path / "run.zarr"
        run(path)
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(ValueError, match="run.zarr is .*no regular file"):
            everything(path)
        shutil.rmtree(path)
    os.mkfifo(tmp_path / "run.npz")
    with pytest.raises(ValueError, match="run.npz is no result .*no regular file"):
        open_result(tmp_path / "run.npz")


@pytest.mark.parametrize(
    "name", ["state/c.0.0.0", "progress/c.0", "spikes/c.3.0", "zarr.json", "spikes", "state", "checksums"]
)
@pytest.mark.parametrize("hard", [False, True])
def test_links_in_a_result_are_not_written_through(name: str, hard: bool, tmp_path: Path) -> None:
    path, victim = tmp_path / "run.zarr", tmp_path / "victim"
    begin(path)
    place = path / name
    if place.is_dir():
        if hard:
            pytest.skip("folders have one name")
        place.rename(victim)
    else:
        victim.write_bytes(place.read_bytes() if place.exists() else b"dear")
        place.unlink(missing_ok=True)
    os.link(victim, place) if hard else place.symlink_to(victim)
    before = contents(victim)
    with contextlib.suppress(ValueError, OSError):
        run(path, resume=True)
    assert {file: found[0] for file, found in contents(victim).items()} == {file: found[0] for file, found in before.items()}


def test_guessable_names_are_not_followed(tmp_path: Path) -> None:
    """Links wait at the names that parts and locks had, and at the lock's."""
    victim = tmp_path / "victim"
    victim.write_text("dear")
    for name in ("run.zarr", "run.npz"):
        for link in (f".{name}.part", f".{name}.{os.getpid()}.part"):
            (tmp_path / link).symlink_to(victim)
        run(tmp_path / name)
        run(tmp_path / name, sink=(ZarrSink if name.endswith("zarr") else NpzSink)(tmp_path / name, overwrite=True))
        shutil.rmtree(tmp_path / name) if name.endswith("zarr") else (tmp_path / name).unlink()
        (tmp_path / f".{name}.lock").symlink_to(victim)
        with pytest.raises(OSError, match="cannot be written to"):
            run(tmp_path / name)
    assert victim.read_text() == "dear"


@pytest.mark.parametrize("name", ["notes.txt", "spikes/thesis.tex", "analysis/data", "spikes/old/c.0.0", "v/c.9.9.bak"])
def test_what_is_not_ours_is_not_removed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    run(path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("years of work")
    before = contents(path)
    with pytest.raises(ValueError, match="is no part of the result .*, so the result is not replaced; move it away"):
        run(path, sink=ZarrSink(path, overwrite=True))
    assert contents(path) == before
    assert run(path, resume=True).finished


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    run(tmp_path / "there.zarr")
    (tmp_path / "run.zarr").symlink_to(tmp_path / "there.zarr")
    with pytest.raises(ValueError, match="run.zarr is a symbolic link; give the path that it leads to"):
        run(tmp_path / "run.zarr", sink=ZarrSink(tmp_path / "run.zarr", overwrite=True))
    assert open_result(tmp_path / "run.zarr").finished


# Names and arrays of the caller

NAMES = [
    "L2/3",
    "../../up",
    "",
    ".",
    "..",
    "spikes",
    "file",
    "attributes",
    "état",
    "a\nb",
    "\ud800",
    "x" * 300,
    "v",
    "0",
    "C:\\x",
]


@pytest.mark.parametrize("sink", [None, "run.npz", "run.zarr"])
def test_any_text_names_a_population(sink: str | None, tmp_path: Path) -> None:
    populations = {name: range(number, number + 3) for number, name in enumerate(NAMES)}
    path = tmp_path / "inner" / sink if sink else None
    (tmp_path / "inner").mkdir()
    record = Record(populations=populations)
    result = run(tmp_path, sink=path, record=record)
    result = open_result(path) if path else result
    assert list(result.populations) == NAMES
    spikes = result.spikes[:]
    for name, members in populations.items():
        assert result.populations[name].tolist() == list(members)
        np.testing.assert_array_equal(result.counts(10, name), spikes[:, list(members)].reshape(100, 30).sum(1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["inner"]
    if sink == "run.zarr":
        assert run(tmp_path, sink=path, record=record, resume=True).finished


def test_a_population_has_text_as_its_name() -> None:
    with pytest.raises(TypeError, match="record.populations must have names.*, got 1"):
        simulate(CobaLIF(NEURON, 0.1), drive(), record=Record(populations={1: [0]}))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "sink", [MemorySink, lambda **more: NpzSink("x.npz", **more), lambda **more: ZarrSink("x.zarr", **more)]
)
def test_what_cannot_be_kept_is_refused_at_once(sink: Any) -> None:
    taken = ["file", "attributes", "spikes", "v", "state", "progress", "checksums", "recorded", "population_0", "v_thresh"]
    for name in [*taken, "a/b", "..", "", "é", "a" * 101, "1a", 3]:
        with pytest.raises(ValueError, match="the name of an array must be letters, digits and underscores"):
            sink(arrays={name: np.arange(3)})
    for array in (np.array([{}]), np.array(["a"]), np.array(["2020"], "M8[Y]"), np.zeros(2, [("a", "i4")]), [[1], [2, 3]]):
        with pytest.raises(ValueError, match=r"must hold booleans or numbers|inhomogeneous"):
            sink(arrays={"signal": array})
    with pytest.raises(TypeError, match="attributes must be plain JSON"):
        sink(attributes={"when": object()})


@pytest.mark.parametrize("sink", [NpzSink, ZarrSink])
def test_arrays_of_every_kind_are_kept(sink: Any, tmp_path: Path) -> None:
    arrays = {
        "scalar": np.float64(3.5),
        "empty": np.zeros((0, 3), np.int16),
        "flags": np.array([True, False]),
        "big_endian": np.arange(4, dtype=">f8"),
        "waves": np.array([1 + 2j]),
        "by_column": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "long": np.zeros((3, 2**22), np.float64) + np.arange(3)[:, None],  # of several chunks
    }
    path = tmp_path / f"run.{sink.__name__[:-4].lower()}"
    run(path, sink=sink(path, arrays=arrays), record=Record())
    for name, array in arrays.items():
        found = open_result(path).array(name)
        np.testing.assert_array_equal(found, array)
        assert found.dtype == np.asarray(array).dtype.newbyteorder("=")
        if sink is ZarrSink:
            np.testing.assert_array_equal(zarr.open_group(path, mode="r")[name][...], array)
    if sink is ZarrSink:
        with pytest.raises(ValueError, match="was begun with another configuration: arrays.flags.checksums was"):
            changed = arrays | {"flags": np.array([True, True])}
            run(path, sink=sink(path, arrays=changed), record=Record(), resume=True)


def test_blocks_that_no_chunk_can_hold_are_refused(tmp_path: Path) -> None:
    record = Record(neurons=range(2**15))
    with pytest.raises(ValueError, match="block_steps=65536 makes blocks of 8,589,934,592 bytes of v, more than the 2,147"):
        run(tmp_path / "run.zarr", source=torch.zeros(40, 2**15), record=record, block_steps=65_536)
    assert not list(tmp_path.iterdir())
    assert run(tmp_path / "run.zarr", source=torch.zeros(40, 2**15), record=record, block_steps=None).finished


# Several writers

WRITER = """
import sys, time
from pathlib import Path
import torch
from helpers.runs import run
torch.set_num_threads(1)
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
try:
    print(run(Path(sys.argv[1]), resume=True, progress=lambda done: time.sleep(0.02)).steps)
except BlockingIOError as error:
    sys.exit(f"refused: {error}")
"""


def writers(count: int, path: Path, signal_file: Path) -> list[Any]:
    command = [sys.executable, "-c", WRITER, str(path), str(signal_file)]
    options: dict[str, Any] = {
        "cwd": Path(__file__).parents[1],
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    return [subprocess.Popen(command, **options) for _ in range(count)]


@pytest.mark.slow
def test_one_of_several_processes_writes(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    started = writers(3, path, tmp_path / "go")
    time.sleep(6)
    (tmp_path / "go").touch()
    ended = [(process.communicate(timeout=120), process.returncode) for process in started]
    assert [code for _, code in ended].count(0) >= 1
    for (out, error), code in ended:
        assert out == "1000\n" if code == 0 else "refused: another run is writing to" in error, error
    run(tmp_path / "whole.zarr")
    assert_same(path, tmp_path / "whole.zarr")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    (tmp_path / "go").touch()
    [writer] = writers(1, path, tmp_path / "go")
    while not path.exists() or not open_result(path).steps:
        time.sleep(0.01)
    with pytest.raises(BlockingIOError, match="another run is writing to .*run.zarr; wait for its end"):
        run(path, resume=True)
    with pytest.raises(BlockingIOError, match="another run is writing"):
        run(path, sink=ZarrSink(path, overwrite=True))
    writer.kill()
    writer.communicate()
    assert run(path, resume=True).finished
    assert not list(tmp_path.glob(".*.lock"))


@pytest.mark.parametrize("name", ["run.zarr", "run.npz"])
def test_one_of_several_threads_writes(name: str, tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait(done: int) -> None:
        inside.set()
        go_on.wait(60)

    first = threading.Thread(target=run, args=(tmp_path / name,), kwargs={"progress": wait})
    first.start()
    inside.wait(60)
    for sink in (tmp_path / name, (ZarrSink if name.endswith("zarr") else NpzSink)(tmp_path / name, overwrite=True)):
        with pytest.raises(BlockingIOError, match="another run is writing"):
            run(tmp_path / name, sink=sink)
    go_on.set()
    first.join(60)
    assert open_result(tmp_path / name).finished
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_file_that_comes_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """By somebody who asks for no lock."""
    path = tmp_path / "run.npz"
    with pytest.raises(OSError, match=r"cannot be written .*; the result is kept in (\S+)") as caught:
        run(path, progress=lambda done: path.write_text("dear") and None)
    assert path.read_text() == "dear"
    saved = Path(re.search(r"kept in (.+?\.npz)", str(caught.value))[1])  # type: ignore[index]
    assert open_result(saved).finished
    shutil.rmtree(saved.parent)


# What can be known beforehand, and what cannot


@pytest.mark.parametrize("name", ["run.zarr", "run.npz"])
def test_a_missing_folder_is_refused_before_the_first_step(name: str, tmp_path: Path) -> None:
    steps: list[int] = []
    with pytest.raises(FileNotFoundError, match=f"there is no folder .*missing for {name}; make it"):
        run(tmp_path / "missing" / name, progress=steps.append)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"there is no folder .*file for {name}; make it"):
        run(tmp_path / "file" / name, progress=steps.append)
    assert not steps


@pytest.mark.parametrize("name", ["run.zarr", "run.npz"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).startswith(str(tmp_path)) and flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    steps: list[int] = []
    with pytest.raises(PermissionError, match="cannot be written to .Permission denied.; choose another path"):
        run(tmp_path / name, progress=steps.append)
    assert not steps


def full(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    save = np.savez_compressed

    def fail(file: Any, **arrays: Any) -> None:
        if any(str(file.name).startswith(str(folder)) for folder in folders):
            raise OSError(28, "No space left on device")
        save(file, **arrays)

    monkeypatch.setattr(np, "savez_compressed", fail)


def test_a_result_that_finds_no_room_at_the_end_is_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, temporary = tmp_path / "disk", tmp_path / "temporary"
    disk.mkdir(), temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    full(monkeypatch, disk)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\); the result is kept in") as caught:
        run(disk / "run.npz")
    [saved] = temporary.rglob("run.npz")
    assert str(saved) in str(caught.value) and caught.value.errno == 28
    monkeypatch.undo()
    expected = run(disk / "run.npz").spikes[:]
    np.testing.assert_array_equal(open_result(saved).spikes[:], expected)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    full(monkeypatch, disk, temporary)
    with pytest.raises(OSError, match="the result is in this error's `result`") as caught:
        run(disk / "other.npz")
    np.testing.assert_array_equal(caught.value.result.spikes[:], expected)  # type: ignore[attr-defined]
    assert [entry.name for entry in disk.iterdir()] == ["run.npz"]


def test_a_zarr_that_finds_no_room_at_the_end_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    begin(tmp_path / "run.zarr")
    monkeypatch.setattr(sinks, "written_whole", fail)
    message = r"cannot write \(No space left on device\); 1,000 steps are kept: make room and continue with resume=True"
    with pytest.raises(OSError, match=message):
        run(tmp_path / "run.zarr", resume=True)
    monkeypatch.undo()
    assert open_result(tmp_path / "run.zarr").steps == T
    run(tmp_path / "run.zarr", resume=True)
    run(tmp_path / "whole.zarr")
    assert_same(tmp_path / "run.zarr", tmp_path / "whole.zarr")


# An .npz file


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The file with other members."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez_compressed(path, **arrays)


def attributes(arrays: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(str(arrays["attributes"]))
    change(content)
    arrays["attributes"] = np.array(json.dumps(content))


NPZ: dict[str, Callable[[dict[str, Any]], Any]] = {
    "missing": lambda a: a.pop("g_e"),
    "more": lambda a: a.update(more=np.arange(3)),
    "exchanged": lambda a: a.update(v=a["g_e"], g_e=a["v"]),
    "shorter": lambda a: a.update(v=a["v"][:-1]),
    "objects": lambda a: a.update(v=np.array([Payload(Path("never"))])),
    "no attributes": lambda a: a.pop("attributes"),
    "numbers as attributes": lambda a: a.update(attributes=np.arange(3)),
    "list as attributes": lambda a: a.update(attributes=np.array("[]")),
    "deep attributes": lambda a: a.update(attributes=np.array("[" * 100_000)),
    "version": lambda a: attributes(a, lambda content: content.update(format_version=1)),
    "crafted": lambda a: attributes(a, lambda content: content["config"].pop("record")),
    "steps": lambda a: attributes(a, lambda content: content.update(steps_done=900)),
}


@pytest.mark.parametrize("name", NPZ)
def test_a_changed_npz_is_refused(name: str, tmp_path: Path) -> None:
    run(tmp_path / "run.npz")
    rewrite(tmp_path / "run.npz", NPZ[name])
    with pytest.raises(ValueError, match=r"run.npz is (no result of coba_triton|a result of format version 1|damaged)"):
        open_result(tmp_path / "run.npz")


def test_an_npz_takes_no_memory_before_it_is_known_to_be_good(tmp_path: Path) -> None:
    """A header that says 80 GB, and a file of zeros that is another one's."""
    import tracemalloc
    import zipfile

    run(tmp_path / "run.npz", record=Record())
    with np.load(tmp_path / "run.npz") as file:
        said = file["attributes"]

    def header(shape: tuple[int, ...]) -> bytes:
        text = str({"descr": "<i4", "fortran_order": False, "shape": shape}).encode()
        text += b" " * (-(len(text) + 11) % 64) + b"\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text

    for size, content in (((2 * 10**10,), b"\0" * 64), ((2**26, 1), bytes(2**28))):
        with zipfile.ZipFile(tmp_path / "bad.npz", "w", zipfile.ZIP_DEFLATED) as file:
            with file.open("attributes.npy", "w") as member:
                np.lib.format.write_array(member, said)
            file.writestr("spikes.npy", header(size) + content)
            file.writestr("state.npy", header(size) + content)
        tracemalloc.start()
        with pytest.raises(ValueError, match="bad.npz is no result of coba_triton, or damaged"):
            open_result(tmp_path / "bad.npz")
        assert tracemalloc.get_traced_memory()[1] < 2**25
        tracemalloc.stop()


def test_the_public_names_stay(tmp_path: Path) -> None:
    assert {"MemorySink", "NpzSink", "ZarrSink", "open_result"} <= set(coba_triton.__all__)
    run(tmp_path / "run.zarr")
    assert Store(tmp_path / "run.zarr").steps == T and sinks.VERSION == 2


@pytest.mark.slow
def test_damaged_stores_give_the_right_data_or_a_sentence(tmp_path: Path) -> None:
    """A few hundred of them, always the same ones; `python -m programs.fuzz_stores 4000` tries more."""
    outcomes = fuzz(300, 1, tmp_path)
    print(outcomes)
    assert sum(outcomes.values()) == 300 and not any("WRONG" in kind for kind in outcomes)
