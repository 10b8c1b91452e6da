"""The CPU kernel of unconnected neurons for chunks of time that go on side by side; :mod:`.time_chunks` says what for.

Chunks go on in units of ``STEPS`` steps. :mod:`.chunks_back` has the kernel for the way back.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from .feed_forward import forward_row
from .lanes import LANES, copy_lanes, lowest_bit, transpose_lanes
from .meeting import memory_apart
from .numba_bridge import borrow, compiled, entry_point, numbers_in
from .rows import (
    CONSTANTS,
    FLOAT32,
    FLOAT64,
    FORWARD_ROWS,
    LEFT,
    LINE,
    ROW,
    STATE,
    SUMMED_STEPS,
    TILE,
    Strided,
    borrow_strided,
    copy,
    expand,
    load,
    load_shared,
    load_state,
    prefetch,
    row_of_field,
)

# Steps of a unit, before each of which the state is noted: a multiple of the bits of a word, and of the steps between two
# checkpoints. On the way back a unit has its own part of the gradient by the constants.
STEPS = SUMMED_STEPS
WORD = 32


@compiled
def put_chunk(tile: Any, lane: int, n: int, target: Any, row: int, every: int, begin: int, fields: int) -> None:
    """The state of a chunk, in the lanes from ``lane`` on, into the rows ``row``, ``row + every``, ... of ``target``."""
    for k in range(fields):
        at = row_of_field(STATE, LEFT, k) + lane
        for i in range(n):
            target[row + k * every, begin + i] = tile[at + i]


@compiled
def take_chunk(tile: Any, lane: int, n: int, source: Any, row: int, fields: int, per_neuron: Any, begin: int) -> None:
    """The state of a chunk from the rows ``row``, ``row + 1``, ... of ``source``, and its neurons' constants."""
    load_state(tile, STATE + lane, LEFT + lane, source, row, 1, 0, n, fields)
    if per_neuron is not None:
        for k in range(len(per_neuron)):
            for i in range(n):
                tile[CONSTANTS + k * ROW + lane + i] = per_neuron[k, begin + i]


@compiled
def move_chunk(tile: Any, lane: int, to: int, n: int) -> None:
    """All rows of a chunk into other lanes."""
    for row in range(len(tile) // ROW):
        for i in range(n):
            tile[row * ROW + to + i] = tile[row * ROW + lane + i]


@compiled
def has_bits(words: Any, lane: int, n: int, noted: Any, row: int, fields: int) -> bool:
    """Whether the state of a chunk has the bits in ``noted``; both are integers, so that -0 is not 0 and a NaN is itself."""
    for k in range(fields):
        at = row_of_field(STATE, LEFT, k) + lane
        for i in range(n):
            if words[at + i] != noted[row + k, i]:
                return False
    return True


@compiled
def leave_or_note(
    tile: Any, n: int, slots: Any, alive: int, at: Any, until: Any, late: bool, compare: bool, notes: Any, noted: Any,
    reached: Any, fields: int, written: int,
) -> int:  # fmt: skip
    """Let the chunks leave that have arrived, and note the states of the others. Returns how many go on.

    A chunk has arrived where ``until`` says, if it is ``late``, and, with ``compare``, where its state has the noted bits.
    Its state goes to ``reached``. Where a chunk is at the unit ``written``, its state is there already; -1: at none. The
    last chunk takes the lanes of the one that leaves.
    """
    bits, k = numbers_in(tile, noted.dtype), 0
    while k < alive:
        u = slots[k]
        if at[u] == until[u] or late or (compare and has_bits(bits, k * n, n, noted, at[u] * fields, fields)):
            if at[u] != written:
                put_chunk(tile, k * n, n, reached, u * fields, 1, 0, fields)
            alive -= 1
            slots[k] = slots[alive]
            move_chunk(tile, alive * n, k * n, n)
        else:
            put_chunk(tile, k * n, n, notes, at[u] * fields, 1, 0, fields)
            k += 1
    return alive


@compiled
def gather_rows(
    buffer: Any, width: int, line: Any, bits: Any, x: Strided, starts: Any, alive: int, steps: int, begin: int, n: int
) -> None:  # fmt: skip
    """What ``x`` has for the units that begin at ``starts``, into rows ``width`` apart; neurons are side by side in ``x``.

    Whole vectors are copied. Behind a chunk's last neuron is what comes next in memory: it goes to the lanes of the next
    chunk, whose turn is later, or to lanes that nobody reads.
    """
    source = numbers_in(x.data, buffer.dtype)
    for k in range(alive):
        t = starts[k]
        start = t * x.stride_t + begin
        if start + STEPS * x.stride_t + n + LANES <= len(source):
            for s in range(STEPS):
                for i in range(0, n, LANES):
                    copy_lanes(buffer, s * width + k * n + i, source, start + s * x.stride_t + i)
        else:
            count = min(STEPS, steps - t)
            for i in range(n):
                load(line, bits, x.data, x.code, start + i, x.stride_t, count)
                for s in range(count):
                    buffer[s * width + k * n + i] = line[s]


@compiled
def gather_columns(
    buffer: Any, width: int, lines: Any, bits: Any, x: Strided, starts: Any, alive: int, steps: int, begin: int, n: int
) -> None:  # fmt: skip
    """The same for any element type and strides: a line of steps for each lane, and then the lines become columns."""
    for lane in range(alive * n):
        t = starts[lane // n]
        start = t * x.stride_t + (begin + lane % n) * x.stride_m
        line = lane % LANES * STEPS
        load(lines[line : line + STEPS], bits, x.data, x.code, start, x.stride_t, min(STEPS, steps - t))
        if lane % LANES == LANES - 1 or lane == alive * n - 1:
            for s in range(0, STEPS, LANES):
                transpose_lanes(buffer, s * width + lane // LANES * LANES, width, lines, s, STEPS)


@compiled
def gather(
    buffer: Any, width: int, lines: Any, bits: Any, x: Strided, starts: Any, alive: int, steps: int, begin: int, n: int
) -> None:  # fmt: skip
    """The same, whichever of both is faster."""
    if n > 1 and x.stride_m == 1 and x.code == (FLOAT64 if buffer.itemsize == 8 else FLOAT32):
        gather_rows(buffer, width, lines, bits, x, starts, alive, steps, begin, n)
    else:
        gather_columns(buffer, width, lines, bits, x, starts, alive, steps, begin, n)


@compiled
def prefetch_part(x: Strided, starts: Any, ahead: int, alive: int, s: int, begin: int, n: int) -> None:
    """Ask for a part, number ``s`` of ``STEPS``, of the units that begin ``ahead`` of ``starts``."""
    steps = LINE // min(LINE, max(1, x.stride_t * x.itemsize))  # of a cache line
    for k in range(s % steps, alive, steps):
        prefetch(x, starts[k] + ahead + s // steps * steps, begin, n)


@compiled
def pack_row(packed: Any, fired: Any, bit: int, lanes: int) -> None:
    """Spikes of a step into one bit of their words, which are 0 before."""
    eights = numbers_in(fired, np.uint64)
    some = eights[0]
    for j in range(1, lanes // 8):
        some |= eights[j]
    if some != 0:
        for j in range(lanes):
            packed[j] |= np.int32(fired[j] << bit)


@compiled
def put_rows(spikes: Strided, one: int, fired: Any, lane: int, t: int, count: int, begin: int, n: int) -> None:
    """The spikes of a chunk's unit as elements, for ``count`` steps."""
    for s in range(count):
        at = (t + s) * spikes.stride_t + begin
        row = fired[s, lane : lane + n]
        if spikes.itemsize == 1:
            copy(spikes.data[at : at + n], row, 0, 1, n)
        else:
            expand(spikes.data, spikes.itemsize, one, at, row, n)


@compiled
def put_bits(spikes: Strided, one: int, packed: Any, lane: int, t: int, count: int, begin: int, n: int) -> None:
    """The same for few spikes: zeros, and then what the words have."""
    rows, elements = (1, count * n) if n == spikes.stride_t else (count, n)
    for row in range(rows):
        at = ((t + row) * spikes.stride_t + begin) * spikes.itemsize
        run = spikes.data[at : at + elements * spikes.itemsize]
        for i in range(len(run)):
            run[i] = 0
    at = t * spikes.stride_t + begin
    if spikes.itemsize == 1:
        put_ones(spikes.data, one, packed, lane, at, spikes.stride_t, count, n)
    elif spikes.itemsize == 2:
        put_ones(numbers_in(spikes.data, np.uint16), one, packed, lane, at, spikes.stride_t, count, n)
    elif spikes.itemsize == 4:
        put_ones(numbers_in(spikes.data, np.uint32), one, packed, lane, at, spikes.stride_t, count, n)
    else:
        put_ones(numbers_in(spikes.data, np.uint64), one, packed, lane, at, spikes.stride_t, count, n)


@compiled
def put_ones(out: Any, one: int, packed: Any, lane: int, at: int, stride: int, count: int, n: int) -> None:
    for part in range((count + WORD - 1) // WORD):
        for i in range(n):
            word = np.uint32(packed[part, lane + i])
            while word != 0:
                out[at + (part * WORD + lowest_bit(word)) * stride + i] = one
                word &= np.uint32(word - 1)


@compiled
def is_busy(packed: Any, lane: int, n: int) -> bool:
    """Whether more than half of a chunk's words have spikes."""
    busy = 0
    for part in range(len(packed)):
        for i in range(n):
            if packed[part, lane + i] != 0:
                busy += 1
    return 2 * busy > len(packed) * n


class Scratch(NamedTuple):
    """A thread's own memory, see :func:`scratch`. It is not made in the kernel, where every slice of it would be counted."""

    tile: Any
    buffer: Any
    lines: Any
    bits: Any
    fired: Any
    packed: Any
    slots: Any
    starts: Any


def row_width(lanes: int) -> int:
    """From one row of a buffer to the next. Whole vectors are copied, also those that begin with the last lane."""
    return -(-lanes // LANES) * LANES + LANES


def scratch(dtype: Any, chunks: int, n: int) -> Scratch:
    """Memory for so many chunks of ``n`` neurons, or for as many of them as go on at the same time."""
    chunks = min(chunks, TILE // n)
    width = row_width(chunks * n)
    return Scratch(
        tile=memory_apart((FORWARD_ROWS,), dtype),
        buffer=memory_apart((STEPS * width,), dtype),
        lines=memory_apart((LANES * STEPS,), dtype),
        bits=np.zeros(STEPS, np.uint32),
        fired=np.zeros((STEPS, width), np.uint8),
        packed=np.zeros((STEPS // WORD, width), np.int32),
        slots=np.zeros(chunks, np.int64),  # which chunk has the lanes from k * n on
        starts=np.zeros(chunks, np.int64),  # the first step of its unit
    )


@compiled
def borrow_scratch(scratch: Scratch) -> Scratch:
    return Scratch(
        borrow(scratch.tile),
        borrow(scratch.buffer),
        borrow(scratch.lines),
        borrow(scratch.bits),
        borrow(scratch.fired),
        borrow(scratch.packed),
        borrow(scratch.slots),
        borrow(scratch.starts),
    )


@functools.cache
def chunks_kernel() -> Any:
    """The entry point."""

    def advance(
        x: Strided, shared: Any, per_neuron: Any, spikes: Strided, one: int, words: Any, states: Any, checkpoints: Any,
        every: int, jump_first: bool, holds: bool | None, steps: int, begin: int, n: int, notes: Any, noted: Any,
        reached: Any, at: Any, until: Any, compare: bool, limit: int, scratch: Scratch, first: int, last: int,
    ) -> None:  # fmt: skip
        """Let the chunks from ``first`` to ``last`` go on, with ``n`` neurons from ``begin`` on.

        A chunk is where ``at [C]`` says, in units of ``STEPS`` steps, and has the state ``reached [C, F, n]``. It goes on to
        ``until [C]``, but not for more than ``limit`` units and, with ``compare``, not after it has the noted state. Then
        ``at`` and ``reached`` say where it is. The state before every unit is noted in ``notes [units, F, n]``; ``noted`` is
        the same memory as integers. The other arguments are those of the forward kernel, for all ``steps`` of the run.
        """
        x, spikes = borrow_strided(x), borrow_strided(spikes)
        words, states, checkpoints = borrow(words), borrow(states), borrow(checkpoints)
        notes, noted, reached, at, until = borrow(notes), borrow(noted), borrow(reached), borrow(at), borrow(until)
        units, fields = len(notes), reached.shape[1]
        notes, noted, reached = notes.reshape(-1, n), noted.reshape(-1, n), reached.reshape(-1, n)
        tile, buffer, lines, bits, fired, packed, slots, starts = borrow_scratch(scratch)
        width = fired.shape[1]
        c = None if shared is None else load_shared(shared)
        for group in range(first, last, len(slots)):
            alive = min(len(slots), last - group)
            for k in range(alive):
                slots[k] = group + k
                take_chunk(tile, k * n, n, reached, slots[k] * fields, fields, per_neuron, begin)
            gone = 0
            while True:
                # the state after the last unit was put there when the run ended
                alive = leave_or_note(
                    tile, n, slots, alive, at, until, gone == limit, compare, notes, noted, reached, fields, units
                )
                if alive == 0:
                    break
                lanes = (alive * n + LANES - 1) // LANES * LANES  # those behind the last neuron compute what nobody reads
                ends = -1  # which chunk comes to the end of the run
                for k in range(alive):
                    starts[k] = at[slots[k]] * STEPS
                    if starts[k] + STEPS >= steps:
                        ends = k
                gather(buffer, width, lines, bits, x, starts, alive, steps, begin, n)
                packed[:] = 0
                for s in range(STEPS):
                    prefetch_part(x, starts, STEPS, alive, s, begin, n)
                    if spikes.data.size > 0:
                        prefetch_part(spikes, starts, STEPS, alive, s, begin, n)
                    if every > 0 and s % every == 0:
                        for k in range(alive):
                            t = starts[k] + s
                            if t < steps:
                                put_chunk(tile, k * n, n, checkpoints, fields * (t // every), 1, begin, fields)
                    forward_row(tile, buffer[s * width : s * width + lanes], fired[s], lanes, jump_first, c, holds)
                    pack_row(packed[s // WORD], fired[s], s % WORD, lanes)
                    if states.size > 0:
                        for k in range(alive):
                            t = starts[k] + s
                            if t < steps:
                                put_chunk(tile, k * n, n, states, t, steps, begin, fields)
                    if ends >= 0 and starts[ends] + s == steps - 1:
                        put_chunk(tile, ends * n, n, reached, slots[ends] * fields, 1, 0, fields)
                for k in range(alive):
                    t = starts[k]
                    count = min(STEPS, steps - t)
                    if count % WORD:  # no spikes after the end of the run
                        for i in range(n):
                            packed[count // WORD, k * n + i] &= (1 << count % WORD) - 1
                    if words.size > 0:
                        for part in range((count + WORD - 1) // WORD):
                            for i in range(n):
                                words[t // WORD + part, begin + i] = packed[part, k * n + i]
                    if spikes.data.size > 0 and n >= LANES and is_busy(packed, k * n, n):
                        put_rows(spikes, one, fired, k * n, t, count, begin, n)
                    elif spikes.data.size > 0:
                        put_bits(spikes, one, packed, k * n, t, count, begin, n)
                    at[slots[k]] += 1
                gone += 1

    return entry_point(advance)
