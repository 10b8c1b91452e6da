"""Spikes that are packed along time, as a list."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .numba_bridge import borrow, entry_point, sources

WORD_BITS = 32


@functools.cache
def list_kernel() -> Any:
    """Lists the bits of words that are 1."""
    digest = sources()

    def list_spikes(words: Any, steps: Any, neurons: Any) -> int:
        """Fill ``steps`` and ``neurons``, which must be long enough; returns how many spikes there are."""
        _ = digest  # part of the key of the disk cache
        words, steps, neurons = borrow(words), borrow(steps), borrow(neurons)
        count = 0
        for w in range(words.shape[0]):
            for n in range(words.shape[1]):
                word = np.uint32(words[w, n])
                if word != 0:
                    for bit in range(WORD_BITS):
                        if (word >> np.uint32(bit)) & np.uint32(1):
                            steps[count] = WORD_BITS * w + bit
                            neurons[count] = n
                            count += 1
        return count

    return entry_point(list_spikes)


def spikes_of(words: Any) -> tuple[Any, Any]:
    """The steps and the neurons of the spikes, int64, in int32 ``words [W, N]``: by word, then neuron, then step."""
    most = WORD_BITS * int(np.count_nonzero(words))  # of memory that is not touched, nothing is taken
    steps, neurons = np.empty(most, np.int64), np.empty(most, np.int64)
    count = list_kernel()(words, steps, neurons)
    return steps[:count], neurons[:count]
