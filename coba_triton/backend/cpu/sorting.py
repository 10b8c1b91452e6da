"""The order of synapses by source and target, counted: no comparison of keys, two passes over the synapses.

Memory that is touched for the first time costs more than what is computed here. So the synapses of several lists go straight
to where they end, and a weight or a delay that synapses share is written once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .numba_bridge import borrow, compiled, entry_point


@compiled
def place(order: Any, before: Any, keys: Any, first: Any) -> None:
    """Fill ``order`` with what ``before`` has, by the key of each; of equal keys, in the order of before.

    ``first [K + 1]``: zeros, which become where each key's synapses begin.
    """
    for s in range(len(keys)):
        first[keys[s] + 1] += 1
    for k in range(1, len(first)):
        first[k] += first[k - 1]
    for s in range(len(before)):
        key = keys[before[s]]
        order[first[key]] = before[s]
        first[key] += 1
    for k in range(len(first) - 1, 0, -1):
        first[k] = first[k - 1]
    first[0] = 0


@functools.cache
def order_kernel() -> Any:
    """``order`` and ``indptr`` of synapses with ``targets`` and ``origins``, by origin, then target, then as they were."""

    def order(targets: Any, origins: Any, starts: Any, by_target: Any, indptr: Any, order: Any) -> None:
        """``starts [N + 1]`` and ``indptr`` are zeros; ``order`` and ``by_target`` have a number for each synapse."""
        targets, origins, starts = borrow(targets), borrow(origins), borrow(starts)
        by_target, indptr, order = borrow(by_target), borrow(indptr), borrow(order)
        for s in range(len(order)):
            order[s] = s
        place(by_target, order, targets, starts)
        place(order, by_target, origins, indptr)

    return entry_point(order)


def order_of(targets: Any, origins: Any, neurons: int, count: int) -> tuple[Any, Any]:
    """``indptr [count + 1]`` and the order, both int64, of int64 arrays of targets below ``neurons`` and their origins."""
    size = len(targets)
    indptr, order = np.zeros(count + 1, np.int64), np.empty(size, np.int64)
    order_kernel()(targets, origins, np.zeros(neurons + 1, np.int64), np.empty(size, np.int64), indptr, order)
    return indptr, order


class Listed(NamedTuple):
    """A list of synapses, of cells that have numbers in the whole.

    Attributes:
        pre: which of ``sources`` each synapse comes from, int32 ``[S]``.
        post: which of ``neurons`` it goes to, likewise.
        weights: float64 ``[S]``, without the ``sign``.
        delays: in steps, int32 ``[S]``.
        sources: numbers of the sources, int64; the synapses of negative ones are left out, as those without a weight are.
        neurons: numbers of the neurons, int64.
        sign: what weights are multiplied with, 1.0 or -1.0.
    """

    pre: Any
    post: Any
    weights: Any
    delays: Any
    sources: Any
    neurons: Any
    sign: float


class Gathered(NamedTuple):
    """Synapses by source, then target, then as they came.

    Attributes:
        indptr: int64 ``[K + 1]``.
        targets: int32 ``[S]``.
        weights: float64: one for each synapse ``[S]``, for each source ``[K, 1]`` or for all ``[1]``.
        delays: in steps, float32, of such a shape.
    """

    indptr: Any
    targets: Any
    weights: Any
    delays: Any


@functools.cache
def tally_kernel() -> Any:
    """Counts the synapses of each source, and says whether those of a source are alike."""

    def tally(listed: Listed, counts: Any, weights: Any, delays: Any, alike: Any) -> None:
        """``weights [K]`` and ``delays [K]`` become the first ones of each source.

        ``alike [2]`` becomes False where another weight, or another delay, of a source is not the first one.
        """
        pre, each, steps, numbers = borrow(listed.pre), borrow(listed.weights), borrow(listed.delays), borrow(listed.sources)
        counts, weights, delays = borrow(counts), borrow(weights), borrow(delays)
        same_weights, same_delays = True, True
        for s in range(len(pre)):
            source = numbers[pre[s]]
            if source >= 0 and each[s] != 0:
                weight = listed.sign * each[s]
                if counts[source] == 0:
                    weights[source] = weight
                    delays[source] = steps[s]
                same_weights &= weights[source] == weight
                same_delays &= delays[source] == steps[s]
                counts[source] += 1
        alike[0] &= same_weights
        alike[1] &= same_delays

    return entry_point(tally)


@functools.cache
def gather_kernel() -> Any:
    """Puts the synapses of a list where they belong."""

    def gather(listed: Listed, indptr: Any, at: Any, targets: Any, weights: Any, delays: Any, ordered: Any) -> None:
        """``at [K]``: where the next synapse of each source goes. ``weights`` or ``delays`` without elements are not wanted.

        ``ordered [1]`` becomes False if the targets of a source do not ascend.
        """
        pre, post, each, steps = borrow(listed.pre), borrow(listed.post), borrow(listed.weights), borrow(listed.delays)
        numbers, neurons = borrow(listed.sources), borrow(listed.neurons)
        indptr, at, targets, weights, delays = borrow(indptr), borrow(at), borrow(targets), borrow(weights), borrow(delays)
        ascending = True
        for s in range(len(pre)):
            source = numbers[pre[s]]
            if source >= 0 and each[s] != 0:
                place, target = at[source], neurons[post[s]]
                ascending &= place == indptr[source] or targets[place - 1] <= target
                at[source] = place + 1
                targets[place] = target
                if weights.size > 0:
                    weights[place] = listed.sign * each[s]
                if delays.size > 0:
                    delays[place] = steps[s]
        ordered[0] &= ascending

    return entry_point(gather)


def gather(lists: Sequence[Listed], count: int, neurons: int) -> Gathered:
    """The synapses of several lists, from ``count`` sources onto ``neurons``."""
    counts, alike = np.zeros(count, np.int64), np.ones(2, bool)
    weights, delays = np.empty(count), np.empty(count, np.float32)
    for listed in lists:
        tally_kernel()(listed, counts, weights, delays, alike)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    size = int(indptr[-1])
    targets, ordered = np.empty(size, np.int32), np.ones(1, bool)
    own_weights: Any = np.empty(0 if alike[0] else size)
    own_delays: Any = np.empty(0 if alike[1] else size, np.float32)
    at = indptr[:-1].copy()
    for listed in lists:
        gather_kernel()(listed, indptr, at, targets, own_weights, own_delays, ordered)
    if not ordered[0]:
        origins = np.repeat(np.arange(count), counts)
        _, order = order_of(targets.astype(np.int64), origins, neurons, count)
        targets = targets[order]
        own_weights, own_delays = (own[order] if len(own) else own for own in (own_weights, own_delays))
    used = counts > 0

    def shared(firsts: Any) -> Any:
        some = firsts[used]
        return some[:1] if (some == some[0]).all() else np.where(used, firsts, some[0])[:, np.newaxis]

    if size and alike[0]:
        own_weights = shared(weights)
    if size and alike[1]:
        own_delays = shared(delays)
    return Gathered(indptr, targets, own_weights, own_delays)
