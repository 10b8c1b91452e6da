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

import numba
import numpy as np

from ..backend.cpu.numba_bridge import OPTIONS, entry_point

DRAWS = 16  # counters in one vectorised batch; each gives two gaps
_HIGH = np.uint64(32)
_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476


@numba.njit(inline="always", **OPTIONS)
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Philox4x32-10: four random words from a counter of four words and a key of two, all uint32."""
    for _ in range(10):
        a = np.uint64(0xD2511F53) * np.uint64(c0)
        b = np.uint64(0xCD9E8D57) * np.uint64(c2)
        c0, c1, c2, c3 = np.uint32(b >> _HIGH) ^ c1 ^ k0, np.uint32(b), np.uint32(a >> _HIGH) ^ c3 ^ k1, np.uint32(a)
        k0 = np.uint32(k0 + np.uint32(0x9E3779B9))
        k1 = np.uint32(k1 + np.uint32(0xBB67AE85))
    return c0, c1, c2, c3


@numba.njit(inline="always", **OPTIONS)
def exponential_gaps(gaps: Any, words: Any, first: Any, stream: Any, low: Any, high: Any, k0: Any, k1: Any) -> None:
    """Fill ``gaps [2 DRAWS]`` with ``-log(u)``, u uniform in (0, 1) with 52 bits."""
    for i in range(DRAWS):
        a, b, c, d = philox(np.uint32(first + np.uint32(i)), stream, low, high, k0, k1)
        words[i] = (np.uint64(a) << _HIGH) | np.uint64(b)
        words[DRAWS + i] = (np.uint64(c) << _HIGH) | np.uint64(d)
    bits = gaps.view(np.uint64)
    for i in range(2 * DRAWS):
        gaps[i] = (np.float64(np.int64(words[i] >> np.uint64(12))) + 0.5) * 2.0**-52
    for i in range(2 * DRAWS):  # u = m 2^e with m in [1/2, 1)
        words[i] = bits[i] >> np.uint64(52)
        bits[i] = (bits[i] & np.uint64(0x000FFFFFFFFFFFFF)) | np.uint64(0x3FE0000000000000)
    for i in range(2 * DRAWS):  # log m = log(1/2) / 2 + 2 artanh(s); |s| < 0.172, so the series is short
        s = (gaps[i] - _SQRT_HALF) / (gaps[i] + _SQRT_HALF)
        q = s * s
        series = (((1 / 23 * q + 1 / 21) * q + 1 / 19) * q + 1 / 17) * q + 1 / 15
        series = (((series * q + 1 / 13) * q + 1 / 11) * q + 1 / 9) * q + 1 / 7
        series = ((series * q + 1 / 5) * q + 1 / 3) * q + 1.0
        gaps[i] = -((np.float64(np.int64(words[i])) - 1022.5) * _LN2 + 2.0 * s * series)


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
