"""What the CPU kernels do with synapses and spikes beside the steps: sort, gather, add up, list."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coba_triton import Synapses
from coba_triton.backend.cpu.magnitudes import magnitudes_of
from coba_triton.backend.cpu.sorting import Listed, gather
from coba_triton.backend.cpu.spike_lists import spikes_of
from coba_triton.ops import grid as grid_module
from coba_triton.ops.grid import make_grid
from coba_triton.ops.spikes import pack_spikes


def one_by_one(lists: list[Listed], count: int, neurons: int) -> Synapses:
    """What :func:`gather` is to find, by the public constructor."""
    pre = np.concatenate([listed.sources[listed.pre] for listed in lists])
    post = np.concatenate([listed.neurons[listed.post] for listed in lists])
    weights = np.concatenate([listed.sign * listed.weights for listed in lists])
    delays = np.concatenate([listed.delays for listed in lists])
    there = (pre >= 0) & (weights != 0)
    found = post[there], pre[there], weights[there], delays[there].astype(np.float32)
    return Synapses.from_coo(*found, shape=(neurons, count))


@pytest.mark.parametrize("weight", ["all", "source", "synapse"])
@pytest.mark.parametrize("delay", ["all", "source", "synapse"])
@pytest.mark.parametrize("order", ["by target", "mixed"])
def test_lists_are_gathered_as_the_constructor_sorts_them(weight: str, delay: str, order: str) -> None:
    """Several synapses of a pair, sources of no number, synapses without a weight, and a source and a neuron with none."""
    rng = np.random.default_rng(5)
    count, neurons = 12, 9
    of_source = {"weight": rng.uniform(0.5, 1.0, count), "delay": rng.integers(1, 9, count)}
    lists = []
    for sign, size in ((1.0, 80), (-1.0, 60), (1.0, 0)):
        sources = rng.permutation(np.arange(-3, count - 1))[:8]  # the last one has no synapse
        targets = rng.permutation(neurons - 1)
        pre, post = rng.integers(0, len(sources), size), rng.integers(0, len(targets), size)
        if order == "by target":
            targets = np.sort(targets)
            post = np.sort(post)
        whose = sources[pre]
        weights = {"all": np.full(size, 0.5), "source": of_source["weight"][whose], "synapse": rng.uniform(0, 1, size)}[
            weight
        ]
        delays = {"all": np.full(size, 3), "source": of_source["delay"][whose], "synapse": rng.integers(1, 9, size)}[delay]
        if weight == "synapse":
            weights[rng.random(size) < 0.2] = 0.0
        columns = pre.astype(np.int32), post.astype(np.int32), weights.astype(np.float64), delays.astype(np.int32)
        lists.append(Listed(*columns, sources, targets, sign if weight == "synapse" else 1.0))
    found, wanted = gather(lists, count, neurons), one_by_one(lists, count, neurons)
    sources = np.repeat(np.arange(count), np.diff(found.indptr))
    assert np.array_equal(found.indptr, wanted.indptr.numpy()) and np.array_equal(found.targets, wanted.targets.numpy())
    assert (found.indptr.dtype, found.targets.dtype) == (np.int64, np.int32)
    assert (found.weights.dtype, found.delays.dtype) == (np.float64, np.float32)
    assert wanted.delays is not None
    for kind, mine, theirs in ((weight, found.weights, wanted.weights), (delay, found.delays, wanted.delays)):
        assert mine.shape == {"all": (1,), "source": (count, 1), "synapse": (len(found.targets),)}[kind]
        each = mine[sources, 0] if kind == "source" else np.broadcast_to(mine, len(found.targets))
        assert np.array_equal(each, np.broadcast_to(theirs.numpy(), len(found.targets)))


def test_nothing_is_gathered_of_nothing() -> None:
    empty, number = np.empty(0, np.int32), np.zeros(1, np.int64)
    for lists in ([], [Listed(empty, empty, np.empty(0), empty, number, number, 1.0)]):
        indptr, targets, weights, delays = gather(lists, 3, 2)
        assert indptr.tolist() == [0, 0, 0, 0] and len(targets) == len(weights) == len(delays) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", ["all", "source", "synapse"])
@pytest.mark.parametrize("few_bits", [True, False])
def test_the_grid_is_the_same_by_the_kernel(
    dtype: torch.dtype, shape: str, few_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    count, neurons = 40, 30
    targets, sources = (torch.randint(most, (900,), generator=generator) for most in (neurons, count - 1))
    synapses = Synapses.from_coo(targets, sources, 1.0, shape=(neurons, count))
    size = {"all": (1,), "source": (count, 1), "synapse": (900,)}[shape]
    weights = torch.randn(size, generator=generator, dtype=dtype)
    weights = (
        torch.where(weights > 0, 0.75, -0.5).to(dtype)
        if few_bits
        else weights * 10.0 ** torch.arange(-8, 2).to(dtype)[torch.randint(10, size, generator=generator)]
    )
    if shape == "source":
        weights[-1] = 1e-3  # of a source without synapses
    made, calls = [], []
    monkeypatch.setattr("coba_triton.backend.cpu.magnitudes.magnitudes_of", lambda *a: calls.append(1) or magnitudes_of(*a))
    for counted_from in (0, 10**9):
        monkeypatch.setattr(grid_module, "COUNTED_FROM", counted_from)
        made.append(make_grid(weights, synapses.indptr, synapses.targets, neurons, True))
    assert calls == [1]
    assert torch.equal(made[0].scales, made[1].scales) and made[0].sums == made[1].sums
    assert made[0].sums == (torch.int32 if few_bits else torch.int64) or shape == "all"


@pytest.mark.parametrize("rate", [0.0, 0.01, 1.0])
def test_spikes_are_listed_from_words(rate: float) -> None:
    spikes = torch.rand(100, 7, generator=torch.Generator().manual_seed(2)) < rate
    steps, neurons = spikes_of(pack_spikes(spikes).numpy())
    assert steps.dtype == neurons.dtype == np.int64
    order = np.lexsort((steps, neurons, steps // 32))
    assert np.array_equal(order, np.arange(len(steps)))  # by word, then neuron, then step
    wanted = np.zeros((100, 7), bool)
    wanted[steps, neurons] = True
    assert len(steps) == int(spikes.sum()) and np.array_equal(wanted, spikes.numpy())
