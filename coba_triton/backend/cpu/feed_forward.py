"""The CPU kernels of unconnected neurons; arrays are those of ``kernels/feed_forward.py``."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ...neuron.adjoint import vjp, vjp_constants, vjp_input
from ...neuron.records import Constants, Kept
from ...neuron.step import count_down, decaying, excess, fire, integrate, reset, split_input
from .checksums import add_row
from .numba_bridge import borrow, compiled, entry_point, numbers_in
from .rows import (
    BACKWARD_ROWS,
    CONSTANTS,
    FIELDS,
    FORWARD_ROWS,
    LEFT,
    RECORDED,
    ROW,
    STATE,
    SUMMED_STEPS,
    SUMS,
    TILE,
    Strided,
    borrow_strided,
    constants_of,
    expand,
    left_at,
    load_per_neuron,
    load_shared,
    load_state,
    pack,
    prefetch,
    put_state,
    put_sums,
    row_of,
    scratch_on_line,
    state_at,
    store,
    store_state,
    sums_at,
)

# Rows of a replayed step: the state before it, its potential before the reset, and the steps for which neurons were held
# before it. The state after it begins the next frame.
U = FIELDS * ROW
FRAME_LEFT = U + ROW
FRAME = FRAME_LEFT + ROW


@compiled
def forward_row(
    tile: Any, x: Any, spikes: Any, neurons: int, jump_first: bool, shared: Constants | None, holds: bool | None
) -> None:
    """One step: the state in ``tile`` advances, ``spikes`` takes 0 or 1.

    ``holds``: None, or True where there is a refractory period.
    """
    for j in range(neurons):
        c = constants_of(tile, j, shared)
        left = left_at(tile, LEFT, j, holds)
        u = integrate(state_at(tile, STATE, j), split_input(x[j]), None, c, jump_first)
        spike = fire(excess(u, c), left)
        z: Any = 1.0 if spike else 0.0
        put_state(tile, STATE, j, reset(u, z, left, c))
        if holds is not None:
            tile[LEFT + j] = count_down(left, z, c)
        spikes[j] = spike


@compiled
def replay_row(
    tile: Any, frame: Any, x: Any, words: Any, bit: int, neurons: int, jump_first: bool, shared: Constants | None,
    holds: bool | None,
) -> None:  # fmt: skip
    """One step again, with the stored spike instead of the threshold: from ``frame`` to the one after it."""
    for j in range(neurons):
        c = constants_of(tile, j, shared)
        left = left_at(frame, FRAME_LEFT, j, holds)
        u = integrate(state_at(frame, STATE, j), split_input(x[j]), None, c, jump_first)
        z: Any = 1.0 if (words[j] >> bit) & 1 else 0.0
        frame[U + j] = u.v
        put_state(frame, FRAME, j, reset(u, z, left, c))
        if holds is not None:
            frame[FRAME + FRAME_LEFT + j] = count_down(left, z, c)


@compiled
def backward_row(
    tile: Any, frame: Any, x: Any, words: Any, bit: int, grad_spikes: Any, grad_x: Any, neurons: int,
    jump_first: bool, shared: Constants | None, holds: bool | None, sums: bool | None, METHOD: str,
) -> None:  # fmt: skip
    """The adjoint of the step that ``frame`` holds; ``tile`` has the gradients by the state, after it and then before.

    ``sums``: None, or True to add to the gradients by the constants.
    """
    for j in range(neurons):
        c = constants_of(tile, j, shared)
        z = 1.0 if (words[j] >> bit) & 1 else 0.0
        before, after, lam = state_at(frame, STATE, j), state_at(frame, FRAME, j), state_at(tile, STATE, j)
        kept = Kept(before.v, frame[U + j], after.g_e, after.g_i)
        left = left_at(frame, FRAME_LEFT, j, holds)
        a = vjp(z, kept, left, grad_spikes[j], lam, state_at(tile, RECORDED, j), c, jump_first, METHOD)
        if sums is not None:
            decayed_e, decayed_i = decaying(before, split_input(x[j]), None, jump_first)
            put_sums(tile, j, vjp_constants(sums_at(tile, j), z, kept, left, decayed_e, decayed_i, lam, a, c))
        grad_x[j] = vjp_input(x[j], a.drive)
        put_state(tile, STATE, j, a.lam)


@functools.cache
def forward_kernel() -> Any:
    """The forward entry point."""

    def forward(
        x: Strided, state: Any, shared: Any, per_neuron: Any, final: Any, spikes: Strided, one: int, words: Any,
        states: Any, checkpoints: Any, every: int, jump_first: bool, holds: bool | None, sums: Any, wide: int, steps: int,
        first: int, last: int,
    ) -> None:  # fmt: skip
        """Simulate the neurons from ``first`` to ``last``; arrays without elements are not written.

        Of the constants, ``shared`` [C] and ``per_neuron`` [C, M], one is None. A spike is written with the bits
        ``one``. ``every``: steps between two checkpoints, or 0. ``holds``: None, or True where there is a refractory period.
        ``sums``: None, or the lanes of a checksum of ``x``,
        which is float32 and contiguous then: while a row is at hand, that costs a fraction of reading it again. ``wide``:
        neurons of a tile, at most ``TILE``.
        """
        x, spikes = borrow_strided(x), borrow_strided(spikes)
        words, states, checkpoints = borrow(words), borrow(states), borrow(checkpoints)
        tile = scratch_on_line(FORWARD_ROWS, state.dtype)
        buffer = scratch_on_line(TILE, state.dtype)
        bits = np.empty(TILE, np.uint32)
        fired = np.empty(TILE, np.uint8)
        c = None if shared is None else load_shared(shared)
        fields = len(state)
        for begin in range(first, last, wide):
            n = min(wide, last - begin)
            load_per_neuron(tile, per_neuron, begin, n)
            load_state(tile, STATE, LEFT, state, 0, 1, begin, n, fields)
            for t in range(steps):
                if every > 0 and t % every == 0:
                    store_state(tile, checkpoints, fields * (t // every), 1, begin, n, fields)
                row = row_of(buffer, bits, x, t, begin, n)
                at = t * spikes.stride_t + begin
                out = spikes.data[at : at + n] if spikes.itemsize == 1 else fired
                prefetch(x, t + 1, begin, n)
                prefetch(spikes, t + 1, begin, n)
                forward_row(tile, row, out, n, jump_first, c, holds)
                if sums is not None:
                    add_row(borrow(sums)[begin // 4 :], numbers_in(row, np.uint32), n)
                if spikes.itemsize > 1:
                    expand(spikes.data, spikes.itemsize, one, at, out, n)
                if words.size > 0:
                    pack(words[t // 32, begin : begin + n], out, t % 32, n)
                if states.size > 0:
                    store_state(tile, states, t, steps, begin, n, fields)
            store_state(tile, final, 0, 1, begin, n, fields)

    return entry_point(forward)


@functools.cache
def backward_kernel(method: str) -> Any:
    """The backward entry point for one surrogate derivative."""

    def backward(
        x: Strided, shared: Any, per_neuron: Any, words: Any, checkpoints: Any, grad_spikes: Strided, grad_final: Any,
        grad_states: Any, grad_x: Strided, grad_state: Any, every: int, jump_first: bool, holds: bool | None,
        grad_constants: Any, wide: int, steps: int, first: int, last: int,
    ) -> None:  # fmt: skip
        """Differentiate the neurons from ``first`` to ``last``; arrays without elements are not read or written.

        ``grad_constants`` [S, M] takes sums over time for each neuron, or is None. Every ``SUMMED_STEPS`` steps have a sum
        of their own, and these are added from the last to the first: so they can be computed side by side.
        """
        x, grad_spikes, grad_x = borrow_strided(x), borrow_strided(grad_spikes), borrow_strided(grad_x)
        words, checkpoints, grad_states = borrow(words), borrow(checkpoints), borrow(grad_states)
        tile = scratch_on_line(BACKWARD_ROWS, grad_state.dtype)
        tape = scratch_on_line((every + 2) * FRAME, grad_state.dtype)
        x_buffer = scratch_on_line(TILE, grad_state.dtype)
        gradient_buffer = np.zeros(TILE, grad_state.dtype)
        out = scratch_on_line(TILE, grad_state.dtype)
        bits = np.empty(TILE, np.uint32)
        c = None if shared is None else load_shared(shared)
        sums = None if grad_constants is None else True
        fields = FIELDS if holds is None else FIELDS + 1
        for begin in range(first, last, wide):
            n = min(wide, last - begin)
            load_per_neuron(tile, per_neuron, begin, n)
            tile[:CONSTANTS] = 0
            tile[RECORDED:] = 0
            if sums is not None:
                for k in range(len(grad_constants)):
                    grad_constants[k, begin : begin + n] = 0
            if grad_final.size > 0:
                load_state(tile, STATE, LEFT, grad_final, 0, 1, begin, n, FIELDS)
            if grad_states.size > 0:
                load_state(tile, RECORDED, LEFT, grad_states, steps - 1, steps, begin, n, FIELDS)
                for j in range(FIELDS * ROW):
                    tile[STATE + j] += tile[RECORDED + j]
            for block in range((steps - 1) // every, -1, -1):
                start = block * every
                count = min(every, steps - start)
                load_state(tape, STATE, FRAME_LEFT, checkpoints, fields * block, 1, begin, n, fields)
                for i in range(count):
                    t = start + i
                    row = row_of(x_buffer, bits, x, t, begin, n)
                    prefetch(x, t + 1, begin, n)
                    frame = tape[i * FRAME : (i + 2) * FRAME]
                    replay_row(tile, frame, row, words[t // 32, begin : begin + n], t % 32, n, jump_first, c, holds)
                for i in range(count - 1, -1, -1):
                    t = start + i
                    row = row_of(x_buffer, bits, x, t, begin, n)
                    gradient = gradient_buffer
                    if grad_spikes.data.size > 0:
                        gradient = row_of(gradient_buffer, bits, grad_spikes, t, begin, n)
                        prefetch(grad_spikes, t - 1, begin, n)
                    prefetch(grad_x, t - 1, begin, n)
                    if grad_states.size > 0:
                        if t > 0:
                            load_state(tile, RECORDED, LEFT, grad_states, t - 1, steps, begin, n, FIELDS)
                        else:
                            tile[RECORDED:SUMS] = 0  # the initial state is not recorded
                    backward_row(
                        tile, tape[i * FRAME : (i + 2) * FRAME], row, words[t // 32, begin : begin + n], t % 32,
                        gradient, out, n, jump_first, c, holds, sums, method,
                    )  # fmt: skip
                    if grad_x.data.size > 0:
                        store(grad_x.data, grad_x.code, t * grad_x.stride_t + begin, out, bits, n)
                    if sums is not None and t % SUMMED_STEPS == 0:
                        for k in range(len(grad_constants)):
                            for j in range(n):
                                grad_constants[k, begin + j] += tile[SUMS + k * ROW + j]
                                tile[SUMS + k * ROW + j] = 0
            store_state(tile, grad_state, 0, 1, begin, n, FIELDS)

    return entry_point(backward)
