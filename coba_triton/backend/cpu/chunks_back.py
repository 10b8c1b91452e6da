"""The way back of unconnected neurons through chunks of time that go side by side; :mod:`.time_chunks` says what for.

A chunk goes back in units of ``STEPS`` steps, which are counted from the end of the run: unit 0 is the last one. It replays
a unit from its checkpoints, goes back through it, and then has the gradient by the state before the unit.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from .chunks import STEPS, WORD, gather, leave_or_note, prefetch_part, row_width, take_chunk
from .feed_forward import FRAME, FRAME_LEFT, backward_row, replay_row
from .lanes import LANES, copy_lanes
from .meeting import memory_apart
from .numba_bridge import borrow, compiled, entry_point, flattened
from .rows import (
    BACKWARD_ROWS,
    FIELDS,
    LEFT,
    RECORDED,
    ROW,
    STATE,
    SUMS,
    TILE,
    Strided,
    borrow_strided,
    copy,
    load_shared,
    load_state,
    store,
)

# Derivatives by constants.
COUNT = (BACKWARD_ROWS - SUMS) // ROW


class BackScratch(NamedTuple):
    """A thread's own memory, see :func:`scratch_back`."""

    tile: Any
    tape: Any
    x: Any
    grad_spikes: Any
    grad_x: Any
    lines: Any
    bits: Any
    words: Any
    slots: Any
    starts: Any


def scratch_back(dtype: Any, chunks: int, n: int, every: int) -> BackScratch:
    """Memory for so many chunks of ``n`` neurons, or for as many of them as go back at the same time."""
    chunks = min(chunks, TILE // n)
    width = row_width(chunks * n)
    line = STEPS * max(n, LANES) + LANES
    return BackScratch(
        tile=memory_apart((BACKWARD_ROWS,), dtype),
        tape=memory_apart(((every + 2) * FRAME,), dtype),
        x=memory_apart((STEPS * width,), dtype),
        grad_spikes=memory_apart((STEPS * width,), dtype),
        grad_x=memory_apart((STEPS * width,), dtype),
        lines=memory_apart((line,), dtype),
        bits=np.zeros(line, np.uint32),
        words=np.zeros((STEPS // WORD, width), np.int32),
        slots=np.zeros(chunks, np.int64),  # which chunk has the lanes from k * n on
        starts=np.zeros(chunks, np.int64),  # the first step of its unit
    )


@compiled
def borrow_scratch_back(scratch: BackScratch) -> BackScratch:
    return BackScratch(
        borrow(scratch.tile),
        borrow(scratch.tape),
        borrow(scratch.x),
        borrow(scratch.grad_spikes),
        borrow(scratch.grad_x),
        borrow(scratch.lines),
        borrow(scratch.bits),
        borrow(scratch.words),
        borrow(scratch.slots),
        borrow(scratch.starts),
    )


@compiled
def take_words(packed: Any, lane: int, words: Any, t: int, begin: int, n: int) -> None:
    """The words of a unit that begins with step ``t``; behind the end of the run nobody spikes."""
    for part in range(len(packed)):
        row = t // WORD + part
        for i in range(n):
            packed[part, lane + i] = words[row, begin + i] if row < len(words) else 0


@compiled
def take_recorded(tile: Any, lane: int, n: int, grad_states: Any, t: int, steps: int, begin: int) -> None:
    """The incoming gradient by the recorded state before step ``t``; the initial state is not recorded."""
    if 0 < t < steps:
        load_state(tile, RECORDED + lane, LEFT, grad_states, t - 1, steps, begin, n, FIELDS)
    else:
        for k in range(FIELDS):
            for i in range(n):
                tile[RECORDED + k * ROW + lane + i] = 0


@compiled
def put_unit(
    target: Strided, buffer: Any, width: int, lane: int, line: Any, bits: Any, t: int, count: int, begin: int, n: int
) -> None:  # fmt: skip
    """A chunk's rows of ``buffer``, for the ``count`` steps from ``t`` on."""
    if n == target.stride_t:  # of all neurons: one run of memory
        for s in range(count):
            for i in range(0, n, LANES):  # what is behind the last neuron, the next row overwrites
                copy_lanes(line, s * n + i, buffer, s * width + lane + i)
        store(target.data, target.code, t * n, line, bits, count * n)
    else:
        for s in range(count):
            row = buffer[s * width + lane : s * width + lane + n]
            store(target.data, target.code, (t + s) * target.stride_t + begin, row, bits, n)


@compiled
def clear_sums(tile: Any, lane: int, n: int) -> None:
    for row in range(COUNT):
        for i in range(n):
            tile[SUMS + row * ROW + lane + i] = 0


@functools.cache
def chunks_back_kernel(method: str) -> Any:
    """The entry point for one surrogate derivative."""

    def go_back(
        x: Strided, shared: Any, per_neuron: Any, words: Any, checkpoints: Any, grad_spikes: Strided, grad_states: Any,
        grad_x: Strided, every: int, jump_first: bool, holds: bool | None, steps: int, begin: int, n: int,
        parts: Any, notes: Any, noted: Any, reached: Any, at: Any, until: Any, compare: bool, limit: int,
        scratch: BackScratch, first: int, last: int,
    ) -> None:  # fmt: skip
        """Let the chunks from ``first`` to ``last`` go back, with ``n`` neurons from ``begin`` on.

        As the kernel of the forward does it, with the gradient by the state instead of the state, and with units that are
        counted from the end of the run: it is noted after every unit. The other arguments are those of the backward kernel,
        for all ``steps`` of the run.

        ``parts [units, S, n]`` takes each unit's part of the gradient by the constants, or is None.
        """
        x, grad_spikes, grad_x = borrow_strided(x), borrow_strided(grad_spikes), borrow_strided(grad_x)
        words, checkpoints, grad_states = borrow(words), borrow(checkpoints), borrow(grad_states)
        notes, noted, reached, at, until = borrow(notes), borrow(noted), borrow(reached), borrow(at), borrow(until)
        units = len(notes)
        notes, noted, reached = notes.reshape(-1, n), noted.reshape(-1, n), reached.reshape(-1, n)
        tile, tape, inputs, gradients, out, lines, bits, packed, slots, starts = borrow_scratch_back(scratch)
        width = packed.shape[1]
        fields = FIELDS if holds is None else FIELDS + 1
        c = None if shared is None else load_shared(shared)
        sums = None if parts is None else True
        for group in range(first, last, len(slots)):
            alive = min(len(slots), last - group)
            for k in range(alive):
                slots[k] = group + k
                take_chunk(tile, k * n, n, reached, slots[k] * FIELDS, FIELDS, per_neuron, begin)
            gone = 0
            while True:
                alive = leave_or_note(
                    tile, n, slots, alive, at, until, gone == limit, compare, notes, noted, reached, FIELDS, -1
                )
                if alive == 0:
                    break
                lanes = (alive * n + LANES - 1) // LANES * LANES  # those behind the last neuron compute what nobody reads
                begins = -1  # which chunk begins with the last step of the run
                for k in range(alive):
                    starts[k] = (units - 1 - at[slots[k]]) * STEPS
                    if starts[k] + STEPS >= steps:
                        begins = k
                    take_words(packed, k * n, words, starts[k], begin, n)
                gather(inputs, width, lines, bits, x, starts, alive, steps, begin, n)
                if grad_spikes.data.size > 0:
                    gather(gradients, width, lines, bits, grad_spikes, starts, alive, steps, begin, n)
                if sums is not None:
                    clear_sums(tile, 0, lanes)
                for block in range(STEPS - every, -1, -every):
                    for k in range(alive):
                        if starts[k] + block < steps:
                            row = fields * ((starts[k] + block) // every)
                            load_state(tape, STATE + k * n, FRAME_LEFT + k * n, checkpoints, row, 1, begin, n, fields)
                    for i in range(every):
                        s = block + i
                        prefetch_part(x, starts, -STEPS, alive, s, begin, n)
                        frame = tape[i * FRAME : (i + 2) * FRAME]
                        row_of_x = inputs[s * width : s * width + lanes]
                        replay_row(tile, frame, row_of_x, packed[s // WORD], s % WORD, lanes, jump_first, c, holds)
                    for i in range(every - 1, -1, -1):
                        s = block + i
                        if grad_spikes.data.size > 0:
                            prefetch_part(grad_spikes, starts, -STEPS, alive, s, begin, n)
                        if begins >= 0 and starts[begins] + s == steps - 1:
                            load_state(tile, STATE + begins * n, LEFT, reached, slots[begins] * FIELDS, 1, 0, n, FIELDS)
                            if sums is not None:
                                clear_sums(tile, begins * n, n)
                        if grad_states.size > 0:
                            for k in range(alive):
                                take_recorded(tile, k * n, n, grad_states, starts[k] + s, steps, begin)
                        backward_row(
                            tile, tape[i * FRAME : (i + 2) * FRAME], inputs[s * width : s * width + lanes],
                            packed[s // WORD], s % WORD, gradients[s * width : s * width + lanes],
                            out[s * width : s * width + lanes], lanes, jump_first, c, holds, sums, method,
                        )  # fmt: skip
                for k in range(alive):
                    if parts is not None:
                        for row in range(COUNT):
                            copy(borrow(parts)[at[slots[k]], row], tile, SUMS + row * ROW + k * n, 1, n)
                    if grad_x.data.size > 0:
                        count = min(STEPS, steps - starts[k])
                        put_unit(grad_x, out, width, k * n, lines, bits, starts[k], count, begin, n)
                    at[slots[k]] += 1
                gone += 1

    return entry_point(go_back)


@functools.cache
def add_parts_kernel() -> Any:
    """Add the ``parts [units, S, n]`` of units to the ``sums [S, n]``, one after the other."""

    def add_parts(parts: Any, sums: Any) -> None:
        parts, total = parts.reshape(len(parts), -1), flattened(sums)
        for unit in range(len(parts)):
            for j in range(len(total)):
                total[j] += parts[unit, j]

    return entry_point(add_parts)
