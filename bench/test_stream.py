"""Streamed runs to a zarr group against their kernels alone: one process, interleaved, equal spikes first.

python -m pytest bench/test_stream.py -s
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
from interleaved import compare
from torch import Tensor

from coba_triton import CobaLIF, CobaLIFParameters, PoissonSource, Record, Result, coba_lif_integral, simulate
from coba_triton.cli import job
from coba_triton.cli.config import load
from coba_triton.cli.inputs import open_source
from coba_triton.cli.weights import open_recurrent
from coba_triton.problems import SPARSE_VALUES

NEURON = CobaLIFParameters(**SPARSE_VALUES)


def words(result: Result) -> Tensor:
    return torch.from_numpy(result.spikes.words(0, result.steps))


def test_unconnected(tmp_path: Path) -> None:
    """1000 neurons, packed spikes: blocks that are in memory, and Poisson spikes of 100 Hz that are made on the way."""
    steps, block_steps = 2**18, 2**14
    source = PoissonSource(100.0, steps, (1000,), 0.1, weight=0.008, seed=1)
    x = source[:]
    network = CobaLIF(NEURON, 0.1, spike_dtype="bits")
    number = itertools.count()

    def kernels() -> Tensor:
        blocks, state = [], None
        with torch.no_grad():
            for block in x.split(block_steps):
                spikes, state = network(block, state)
                blocks.append(spikes)
        return torch.cat(blocks)

    def streamed(source: Any, to_disk: bool = True) -> Result:
        sink = tmp_path / f"{next(number)}.zarr" if to_disk else None
        return simulate(network, source, sink=sink, block_steps=block_steps, progress=False)

    def poisson() -> None:
        buffer = torch.empty(block_steps, 1000)
        for start in range(0, steps, block_steps):
            source.fill(start, buffer)

    expected = kernels()
    assert torch.equal(words(streamed(x)), expected)
    assert torch.equal(words(streamed(source)), expected)
    runs = {
        "kernels": kernels,
        "to zarr": lambda: streamed(x),
        "to memory": lambda: streamed(x, to_disk=False),
        "poisson": poisson,
        "poisson to zarr": lambda: streamed(source),
    }
    compare(f"{steps} steps of 1000 neurons", runs, x.numel())


def test_cobanet(tmp_path: Path) -> None:
    """The built-in configuration for 6 s: 4000 connected neurons, Poisson input made on the way, spikes and counts.

    With traces of three neurons as well, kernels store the states of all; alone they do so in blocks of 2016 steps.
    """
    config = load("cobanet")[1]
    config = config.model_copy(update={"simulation": config.simulation.model_copy(update={"duration": 6000.0})})
    source, recurrent = open_source(config), open_recurrent(config)
    network = job.make_network(config, source, recurrent)
    feed = job.Feed(source.channels, config.simulation.steps)
    x = feed[:]
    traced = job.what_to_record(config, recurrent)
    spikes_only = dataclasses.replace(traced, neurons=(), inputs=False)
    number = itertools.count()

    def kernels(record_states: bool) -> Tensor:
        weights = network.get_parameter("input_weights"), network.get_parameter("recurrent_weights")
        options: Any = {"spike_dtype": "bits", "record_states": record_states}
        blocks, state = [], None
        with torch.no_grad():
            for block in x.split(2016 if record_states else len(x)):
                spikes, state = coba_lif_integral(block, state, *weights, network.p, network.dt, **options)
                state = type(state)(*(field[-1].clone() for field in state)) if record_states else state
                blocks.append(spikes)
        return torch.cat(blocks)

    def streamed(record: Record) -> Result:
        return simulate(network, feed, sink=tmp_path / f"{next(number)}.zarr", record=record, progress=False)

    assert torch.equal(words(streamed(traced)), kernels(False))
    runs = {
        "kernels": lambda: kernels(False),
        "to zarr": lambda: streamed(spikes_only),
        "kernels, states": lambda: kernels(True),
        "to zarr, traces": lambda: streamed(traced),
    }
    compare(f"{len(x)} steps of cobanet", runs, len(x) * config.neuron.count)
