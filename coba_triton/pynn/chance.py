"""Synapses that transmit a spike with a probability. Every spike draws anew at every one of them.

Whether a synapse transmits a spike follows from the seed, the segment, the projection, the synapse's number in it, the
sample of the spike, and how many spikes the source has sent in this sample before. So it does not depend on where runs are
cut, on the order of the spikes or on the rest of the network. Weights become integers, whose sums have no order either.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backend.cpu.draws import philox, unit
from ..backend.cpu.numba_bridge import entry_point

Array = NDArray[Any]

BITS = 46  # of the sum of one spike at all synapses of a neuron, which leaves room for 2**16 spikes of each source in a step


class Uncertain(NamedTuple):
    """The synapses of a projection that transmit with a probability.

    Attributes:
        cells: the source of every synapse: a neuron's number, or that of a source of spikes after all neurons.
        targets: the neuron of every synapse.
        weights: negative where they are inhibitory.
        delays: in steps from the sample of the spike to the step that it drives.
        probabilities: from 0 to 1.
        number: of the projection.
    """

    cells: Array
    targets: Array
    weights: Array
    delays: Array
    probabilities: Array
    number: int


def deliver(
    ring: Any,
    samples: Any,
    cells: Any,
    earlier: Any,
    starts: Any,
    synapses: Any,
    weights: Any,
    probabilities: Any,
    keys: Any,
) -> None:
    """Add to the ``ring [L, 2, N]`` what the spikes of ``samples`` and ``cells`` transmit.

    ``earlier``: how many spikes the cell has sent in the sample before. The synapses of cell ``k`` are ``starts[k]`` to
    ``starts[k + 1]``; ``synapses [S, 4]`` has their targets, delays, numbers and projections.
    """
    length = len(ring)
    for event in range(len(samples)):
        sample, before = np.uint64(samples[event]), np.uint32(earlier[event])
        low, high = np.uint32(sample), np.uint32(sample >> np.uint64(32))
        for s in range(starts[cells[event]], starts[cells[event] + 1]):
            target, delay, number, projection = synapses[s]
            a, b, _, _ = philox(np.uint32(number), low, high, before, keys[projection, 0], keys[projection, 1])
            if unit(a, b) < probabilities[s]:
                slot, sign = (samples[event] + delay) % length, 1 if weights[s] < 0 else 0
                ring[slot, sign, target] += abs(weights[s])


deliver_kernel = entry_point(deliver)


class Chance:
    """What is under way from synapses that transmit with a probability.

    Args:
        parts: the synapses of each projection.
        neurons: how many neurons there are.
        cells: how many neurons and sources of spikes.
        block: the most steps of a block; it may be shorter because of the delays.
    """

    def __init__(self, parts: list[Uncertain], neurons: int, cells: int, block: int) -> None:
        sizes = [len(part.cells) for part in parts]
        sources, targets, weights, delays, probabilities = (
            np.concatenate([getattr(part, name) for part in parts]) for name in Uncertain._fields[:5]
        )
        numbers = np.concatenate([np.arange(size) for size in sizes])
        order = np.argsort(sources, kind="stable")
        sources = sources[order]
        self._projections = [part.number for part in parts]
        self._starts = np.searchsorted(sources, np.arange(cells + 1))
        columns = targets, delays, numbers, np.repeat(np.arange(len(parts)), sizes)
        self._synapses = np.stack([column[order].astype(np.int64) for column in columns], 1)
        self._probabilities = probabilities[order].astype(np.float64)
        most = max(np.bincount(targets, np.abs(weights)).max(initial=0.0), np.finfo(np.float64).tiny)
        power = BITS - np.frexp(most)[1]
        self.unit = float(np.ldexp(1.0, -power))  # of the sums
        self._weights = np.rint(np.ldexp(weights[order], power)).astype(np.int64)
        of_neurons = self._synapses[: self._starts[neurons], 1]
        self.watches = bool(len(of_neurons))  # whether spikes of neurons have to be known
        # what neurons send in a block arrives after it
        self.block = int(min(block, of_neurons.min() + 1)) if self.watches else block
        self._ring = np.zeros((int(delays.max(initial=0)) + self.block + 1, 2, neurons), np.int64)

    @property
    def length(self) -> int:
        """For how many steps anything can be under way."""
        return len(self._ring)

    def begin(self, seed: int, segment: int) -> None:
        """Begin with nothing under way; what is drawn follows from the seed and the segment."""
        self._ring[:] = 0
        keys = [np.random.SeedSequence([seed, segment, number]).generate_state(2) for number in self._projections]
        self._keys = np.array(keys, np.uint32)

    def send(self, samples: Array, cells: Array, earlier: Array) -> None:
        """Let the spikes of ``cells`` in ``samples`` be transmitted, or not."""
        if len(samples):
            deliver_kernel(
                self._ring, samples, cells, earlier, self._starts, self._synapses, self._weights, self._probabilities,
                self._keys,
            )  # fmt: skip

    def arriving(self, first: int, count: int) -> Array:
        """What arrives in the steps from ``first`` on, float64 ``[2, count, N]``; it stays under way."""
        rows = self._ring[np.arange(first, first + count) % len(self._ring)]
        return np.swapaxes(rows, 0, 1) * self.unit

    def under_way(self, first: int) -> Array:
        """All that is under way before the step ``first``, int64 ``[2, length, N]`` in this unit."""
        return np.swapaxes(self._ring[np.arange(first, first + self.length) % self.length], 0, 1)

    def go_on(self, first: int, sums: Array) -> None:
        """Let sums ``[2, steps, n]`` in this unit arrive in the steps from ``first`` on, at the first neurons."""
        rows = (first + np.arange(sums.shape[1])) % self.length
        self._ring[rows, :, : sums.shape[2]] += np.swapaxes(sums, 0, 1)

    def forget(self, first: int, count: int) -> None:
        """Make room: these steps are over."""
        self._ring[np.arange(first, first + count) % len(self._ring)] = 0


def earlier_in_sample(samples: Array, sources: Array) -> Array:
    """For every event, how many events before it have the same source and the same sample."""
    order = np.lexsort((sources, samples))
    ordered = np.stack([samples[order], sources[order]])
    new = np.append(True, (ordered[:, 1:] != ordered[:, :-1]).any(0))[: len(samples)]
    places = np.arange(len(samples))
    found = np.empty(len(samples), np.int64)
    found[order] = places - np.maximum.accumulate(np.where(new, places, 0))
    return found
