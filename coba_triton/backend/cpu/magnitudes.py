"""The sums of the magnitudes of each neuron's weights, in whole units: what the grid of the weights is made from."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .numba_bridge import borrow, entry_point


@functools.cache
def magnitudes_kernel() -> Any:
    """Adds up the magnitudes, each rounded up to a whole number."""

    def magnitudes(weights: Any, weight_of: int, indptr: Any, targets: Any, scales: Any, sums: Any) -> None:
        """Fill ``sums [2, N]``, of excitatory and of inhibitory weights, times ``scales [2]``.

        ``weight_of``: whether all synapses share a weight (0), those of a source do (1), or each has its own (2).
        """
        weights, indptr, targets = borrow(weights), borrow(indptr), borrow(targets)
        scales, sums = borrow(scales), borrow(sums)
        sums[:] = 0
        for source in range(len(indptr) - 1):
            for s in range(indptr[source], indptr[source + 1]):
                weight = np.float64(weights[s if weight_of == 2 else source * weight_of])
                sign = 1 if weight < 0 else 0
                sums[sign, targets[s]] += int(np.ceil(abs(weight) * scales[sign]))

    return entry_point(magnitudes)


def magnitudes_of(weights: Any, indptr: Any, targets: Any, neurons: int, scales: Any) -> Any:
    """``sums [2, N]`` of weights ``[S]``, ``[K, 1]`` or ``[1]``."""
    sums = np.empty((2, neurons), np.int64)
    weight_of = 1 if weights.ndim == 2 else 0 if len(weights) != len(targets) else 2
    magnitudes_kernel()(weights.reshape(-1), weight_of, indptr, targets, scales, sums)
    return sums
