"""Compare the time of runs into a zarr group with the time of their kernels alone, in turns, after a check of the spikes.

python -m pytest bench/test_stream.py -s
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coba_triton import (
    CobaLIF,
    CobaLIFParameters,
    PoissonSource,
    Record,
    Result,
    ZarrSink,
    coba_lif_integral,
    simulate,
    unpack_spikes,
)
from coba_triton.cli import job
from coba_triton.cli.config import load
from coba_triton.cli.inputs import open_source
from coba_triton.cli.weights import open_recurrent
from coba_triton.tools.contenders import time_interleaved
from coba_triton.tools.problems import SPARSE_VALUES

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "7"))
NEURON = CobaLIFParameters(**SPARSE_VALUES)


def compare(title: str, runs: dict[str, Callable[[], Any]], neuron_steps: int) -> None:
    """Time the runs and print a row for each. The first run is the baseline.

    A row has the median time of a call, the spread (half the range between the quartiles), the time for one neuron and step,
    and how many times faster than the baseline the call is.
    """
    seconds = time_interleaved(runs, ROUNDS, torch.device("cpu"))
    machine = platform.processor() or platform.machine()
    print(f"\n{title} ({machine}, torch {torch.__version__}, {torch.get_num_threads()} threads)")
    baseline = statistics.median(next(iter(seconds.values())))
    for name, measured in seconds.items():
        low, median, high = statistics.quantiles(measured, n=4)
        print(
            f"  {name:11} {median * 1e3:9.2f} ms ± {(high - low) / 2e-3:.2f}  {median / neuron_steps * 1e9:7.2f} ns"
            f"  x{baseline / median:.1f}"
        )


def words(result: Result) -> Tensor:
    return torch.from_numpy(result.spikes.words(0, result.steps))


class Repeated:
    """An input in memory that is repeated."""

    def __init__(self, x: Tensor, times: int) -> None:
        self.x, self.shape = x, (times * len(x), *x.shape[1:])

    def __getitem__(self, steps: slice) -> Tensor:
        begin = steps.start % len(self.x) if steps.start else 0
        return self.x[begin : begin + steps.stop - (steps.start or 0)]


@pytest.fixture(params=sorted({1, torch.get_num_threads()}), ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """The number of the kernels' threads: one, so that the other cores pack and write, or as many as there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("block_steps", [2**14, 2**16], ids="blocks of {}".format)  # defaults: source, tensor
@pytest.mark.parametrize("weight", [0.004, 0.008], ids=["9 Hz", "46 Hz"])
def test_unconnected(tmp_path: Path, weight: float, block_steps: int) -> None:
    """1000 neurons with packed spikes. The input is in memory, or it is Poisson spikes that are made when they are read."""
    times, steps = 16, 2**18
    source = PoissonSource(100.0, times * steps, (1000,), 0.1, weight=weight, seed=1)
    x = source[:steps]
    network = CobaLIF(NEURON, 0.1, spike_dtype="bits")

    def kernels(times: int = times) -> Tensor:
        blocks, state = [], None
        with torch.no_grad():
            for _ in range(times):
                blocks.clear()
                for block in x.split(block_steps):
                    spikes, state = network(block, state)
                    blocks.append(spikes)
        return torch.cat(blocks)

    def streamed(source: Any) -> Result:
        sink = ZarrSink(tmp_path / "run.zarr", overwrite=True)
        return simulate(network, source, sink=sink, block_steps=block_steps, progress=False)

    def poisson() -> None:
        buffer = torch.empty(block_steps, 1000)
        for start in range(0, times * steps, block_steps):
            source.fill(start, buffer)

    rate = unpack_spikes(kernels(1), steps)[-block_steps:].mean(dtype=torch.float32).item() * 1e4  # steps of 0.1 ms
    assert torch.equal(words(streamed(x)), kernels(1))
    assert torch.equal(words(streamed(source))[: steps // 32], kernels(1))
    runs = {
        "kernels": kernels,
        "to zarr": lambda: streamed(Repeated(x, times)),
        "poisson": poisson,
        "poisson to zarr": lambda: streamed(source),
    }
    compare(f"{times * steps} steps of 1000 neurons at {rate:.0f} Hz in blocks of {block_steps}", runs, times * x.numel())


def test_va(tmp_path: Path) -> None:
    """The built-in configuration for 30 s: 4000 connected neurons that keep themselves going.

    Spikes and counts are recorded, and in another run also the traces of three neurons. The kernels alone get the first 6 s
    of the input from memory, five times.
    """
    times, config = 5, load("va")[1]
    config = config.model_copy(update={"simulation": config.simulation.model_copy(update={"duration": times * 6000.0})})
    source, recurrent = open_source(config), open_recurrent(config)
    network = job.make_network(config, source, recurrent)
    feed = job.Feed(source.channels, config.simulation.steps)
    x = feed[: config.simulation.steps // times]
    assert recurrent is not None
    weights, initial = (source.weights, recurrent.synapses), job.initial_state(config, True, torch.device("cpu"))
    traced = job.what_to_record(config, recurrent)
    spikes_only = dataclasses.replace(traced, neurons=(), inputs=False)

    def kernels() -> Tensor:
        first, state = None, initial
        with torch.no_grad():
            for _ in range(times):
                spikes, state = coba_lif_integral(x, state, *weights, network.p, network.dt, spike_dtype="bits")
                first = spikes if first is None else first
        assert first is not None
        return first

    def streamed(record: Record) -> Result:
        sink = ZarrSink(tmp_path / "run.zarr", overwrite=True)
        return simulate(network, feed, sink=sink, state=initial, record=record, progress=False)

    assert torch.equal(words(streamed(traced))[: len(x) // 32], kernels())
    runs = {
        "kernels": kernels,
        "to zarr": lambda: streamed(spikes_only),
        "to zarr, traces": lambda: streamed(traced),
    }
    compare(f"{times * len(x)} steps of va", runs, times * len(x) * config.neuron.count)
