"""The order of synapses by source and target, counted: no comparison of keys, two passes over the synapses."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .numba_bridge import borrow, compiled, entry_point, sources


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
    digest = sources()

    def order(targets: Any, origins: Any, starts: Any, by_target: Any, indptr: Any, order: Any) -> None:
        """``starts [N + 1]`` and ``indptr`` are zeros; ``order`` and ``by_target`` have a number for each synapse."""
        _ = digest  # part of the key of the disk cache
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
