"""Spikes that are packed along time, as a list."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .numba_bridge import borrow, compiled, entry_point

WORD_BITS = 32


@compiled
def ones_of(word: Any) -> Any:
    """How many bits of a word are 1: sums of twos, fours and eights side by side, which the compiler does for many words."""
    word = word - ((word >> np.uint32(1)) & np.uint32(0x55555555))
    word = (word & np.uint32(0x33333333)) + ((word >> np.uint32(2)) & np.uint32(0x33333333))
    word = (word + (word >> np.uint32(4))) & np.uint32(0x0F0F0F0F)
    return (word * np.uint32(0x01010101) & np.uint32(0xFFFFFFFF)) >> np.uint32(24)


@functools.cache
def list_kernel() -> Any:
    """Lists the bits of words that are 1."""

    def list_spikes(words: Any, steps: Any, neurons: Any) -> int:
        """Fill ``steps`` and ``neurons``, if they have elements; returns how many spikes there are."""
        words, steps, neurons = borrow(words), borrow(steps), borrow(neurons)
        count = 0
        if len(steps) == 0:
            for w in range(words.shape[0]):
                for n in range(words.shape[1]):
                    count += ones_of(np.uint32(words[w, n]))
            return count
        for w in range(words.shape[0]):
            for n in range(words.shape[1]):
                word = np.uint32(words[w, n])
                while word != 0:
                    rest = word & (word - np.uint32(1))  # without the lowest bit that is 1
                    steps[count] = WORD_BITS * w + ones_of((word ^ rest) - np.uint32(1))
                    neurons[count] = n
                    count += 1
                    word = np.uint32(rest)
        return count

    return entry_point(list_spikes)


def spikes_of(words: Any) -> tuple[Any, Any]:
    """The steps and the neurons of the spikes, int64, in int32 ``words [W, N]``: by word, then neuron, then step."""
    none = np.empty(0, np.int64)
    count = list_kernel()(words, none, none)
    if count == 0:
        return none, none
    steps, neurons = np.empty(count, np.int64), np.empty(count, np.int64)
    list_kernel()(words, steps, neurons)
    return steps, neurons
