"""Streamed runs against their kernels alone: one process, interleaved, equal spikes first.

python -m pytest bench/test_stream.py -s
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import compare
from torch import Tensor

from coba_triton import CobaLIF, CobaLIFParameters, PoissonSource, simulate

NEURON = CobaLIFParameters(
    tau_syn_exc_inv=1 / 5,
    tau_syn_inh_inv=1 / 10,
    c_m_inv=1 / 0.2,
    g_l=0.01,
    e_rev_E=0.0,
    e_rev_I=-80.0,
    v_rest=-65.0,
    v_reset=-65.0,
    v_thresh=-50.0,
)


def kernels(network: CobaLIF, x: Tensor, block_steps: int) -> Tensor:
    """The calls that a streamed run makes, on blocks that are there, and nothing else."""
    words, state = [], None
    with torch.no_grad():
        for block in x.split(block_steps):
            spikes, state = network(block, state)
            words.append(spikes)
    return torch.cat(words)


def test_unconnected(tmp_path: Path) -> None:
    """1000 neurons, packed spikes to a zarr group."""
    steps, block_steps = 2**18, 2**14
    source = PoissonSource(100.0, steps, (1000,), 0.1, weight=0.008, seed=1)
    x = source[:]
    network = CobaLIF(NEURON, 0.1, spike_dtype="bits")
    names = (tmp_path / f"{number}.zarr" for number in itertools.count())

    def stream(source: object) -> Callable[[], Tensor]:
        return lambda: torch.as_tensor(
            simulate(network, source, sink=next(names), block_steps=block_steps, progress=False).spikes.words(0, steps)
        )

    expected = kernels(network, x, block_steps)
    assert torch.equal(stream(x)(), expected) and torch.equal(stream(source)(), expected)
    runs = {
        "kernels": lambda: kernels(network, x, block_steps),
        "streamed": lambda: simulate(network, x, sink=next(names), block_steps=block_steps, progress=False),
        "poisson": lambda: simulate(network, source, sink=next(names), block_steps=block_steps, progress=False),
        "memory": lambda: simulate(network, x, block_steps=block_steps, progress=False),
    }
    compare(f"{steps} steps of 1000 neurons, {expected.count_nonzero()} words with spikes", runs, x.numel())
