"""Compiled loops of long runs: one makes Poisson spikes, and one counts spikes in packed words.

Poisson spikes of one step: lay the channels side by side on a line; a channel's piece is as long as its expected number of
spikes. Points with independent, exponentially distributed gaps are a Poisson process on this line. The number of points in
a channel's piece is the channel's number of spikes. So the time for a step is proportional to its spikes.

Every step has its own random numbers: draw ``d`` of step ``t`` is Philox4x32-10 of the counter ``(d, stream, t mod 2**32,
t / 2**32)`` with the seed as the key (Salmon, Moraes, Dror and Shaw 2011, doi:10.1145/2063384.2063405). The logarithm is
written out in operations that IEEE 754 rounds in the same way everywhere, so every machine makes the same spikes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend.cpu.draws import DRAWS, exponential_gaps
from ..backend.cpu.numba_bridge import entry_point

_HIGH = np.uint64(32)


def poisson_fill(
    out: Any,
    start: int,
    first: int,
    last: int,
    seed: Any,
    stream: Any,
    expected: float,
    cumulative: Any,
    weight: Any,
    add: bool,
) -> None:
    """Write the spikes of steps ``start``, ``start + 1``, ... times ``weight`` to ``out [t, last - first]``, or add them.

    ``out`` has the channels from ``first`` to ``last``. If ``cumulative [channels + 1]`` is empty, each channel has
    ``expected`` spikes per step; else channel c has ``cumulative[c + 1] - cumulative[c]``.
    """
    gaps, words = np.empty(2 * DRAWS), np.empty(2 * DRAWS, np.uint64)
    k0, k1 = np.uint32(seed), np.uint32(seed >> _HIGH)
    uniform = len(cumulative) == 0
    scale = 1.0 / expected if uniform else 1.0
    for t in range(out.shape[0]):
        row = out[t]
        if not add:
            for n in range(len(row)):
                row[n] = 0
        step = np.uint64(start + t)
        low, high = np.uint32(step), np.uint32(step >> _HIGH)
        position, channel, draw, inside = 0.0, 0, np.uint32(0), True
        while inside:
            exponential_gaps(gaps, words, draw, stream, low, high, k0, k1)
            draw = np.uint32(draw + np.uint32(DRAWS))
            for i in range(2 * DRAWS):
                position += gaps[i] * scale
                if uniform:
                    inside = position < last
                    channel = int(position) if inside else last
                else:
                    while channel < last and cumulative[channel + 1] <= position:
                        channel += 1
                    inside = channel < last
                if not inside:
                    break
                if channel >= first:
                    row[channel - first] += weight


def count_spikes(words: Any, members: Any, counts: Any) -> None:
    """Fill ``counts [32 W]`` with the number of spikes in every step of ``words [W, M]``, for the neurons in ``members``."""
    lanes = np.zeros(8, np.uint32)  # byte j of lane b counts bit 8 j + b; a byte counts at most 255 words
    for w in range(words.shape[0]):
        block = counts[32 * w : 32 * w + 32]
        block[:] = 0
        for begin in range(0, len(members), 255):
            lanes[:] = 0
            for member in members[begin : begin + 255]:
                word = np.uint32(words[w, member])
                for b in range(8):
                    lanes[b] += (word >> np.uint32(b)) & np.uint32(0x01010101)
            for bit in range(32):
                block[bit] += np.int32((lanes[bit % 8] >> np.uint32(bit // 8 * 8)) & np.uint32(255))


poisson_kernel = entry_point(poisson_fill)
count_kernel = entry_point(count_spikes)
