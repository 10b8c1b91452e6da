"""The CPU kernels of recurrent populations, event driven; arrays are those of ``kernels/recurrent.py``.

A thread owns whole batch rows, so that none waits for another. A row's neurons are tiles as in
``feed_forward``, and a tile's drive is summed where its state is: in the first-level cache. Sums over synapses have the one
order of all event-driven kernels: ascending by source.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from ...neuron.adjoint import vjp, vjp_constants
from ...neuron.operations import relu
from ...neuron.records import Drive, Kept
from ...neuron.step import count_down, decaying, excess, fire, integrate, reset
from .numba_bridge import borrow, compiled, entry_point, sources
from .products import send_back
from .rows import (
    BACKWARD_ROWS,
    FIELDS,
    FORWARD_ROWS,
    LEFT,
    RECORDED,
    ROW,
    STATE,
    SUMS,
    TILE,
    Strided,
    borrow_strided,
    constants_of,
    copy,
    expand,
    first_from,
    left_at,
    load_per_neuron,
    load_shared,
    load_state,
    pack,
    prefetch,
    put_state,
    put_sums,
    row_of,
    row_of_field,
    state_at,
    store_state,
    sums_at,
)

KEPT_FIELDS = len(Kept._fields)
# More rows of a tile. Forward: the two drives, each excitatory and then inhibitory, and what a trajectory keeps of a step:
# what its adjoint reads, the steps for which neurons were still held, and the two conductances that decayed.
INPUT = FORWARD_ROWS
RECURRENT = INPUT + 2 * ROW
KEPT = RECURRENT + 2 * ROW
KEPT_LEFT = KEPT + KEPT_FIELDS * ROW
DECAYED = KEPT_LEFT + ROW
FORWARD_SIZE = DECAYED + 2 * ROW
# Backward: what the forward left of the step, the gradient by its spikes, and the adjoints of the two drives.
STEP = BACKWARD_ROWS
STEP_LEFT = STEP + KEPT_FIELDS * ROW
STEP_DECAYED = STEP_LEFT + ROW
GRAD_Z = STEP_DECAYED + 2 * ROW
ADJOINT = GRAD_Z + ROW
BACKWARD_SIZE = ADJOINT + 2 * ROW

# Numbers that are looked through at once for one that is not 0.
FEW = 16

# Elements of a source's sums that a thread adds to at a time: so many of all sources together fit a second-level cache.
COLUMNS = 256


class Synapses(NamedTuple):
    """The weights that are not 0 of sources ``[S, N]`` that mostly have none; without elements: read the dense rows.

    Those of source ``s`` in tile ``k`` of their targets are ``starts[s, k]`` to ``starts[s, k + 1]``, ascending:
    ``targets`` counts from the beginning of the tile.
    """

    starts: Any
    targets: Any
    weights: Any


@compiled
def borrow_synapses(synapses: Synapses) -> Synapses:
    return Synapses(borrow(synapses.starts), borrow(synapses.targets), borrow(synapses.weights))


@compiled
def count_nonzero(values: Any) -> int:
    count = 0
    for n in range(len(values)):
        count += values[n] != 0
    return count


@compiled
def compact(events: Any, values: Any) -> int:
    """The indices of what is not 0, ascending; returns how many. ``events`` has room for one more than ``values``."""
    count = 0
    for begin in range(0, len(values), FEW):
        few = values[begin : min(begin + FEW, len(values))]
        if count_nonzero(few):
            for n in range(len(few)):
                events[count] = begin + n
                count += few[n] != 0
    return count


@compiled
def compact_spikes(events: Any, fired: Any) -> int:
    """:func:`compact` of bytes whose number is a multiple of 8, most of them 0."""
    count = 0
    eights = fired.view(np.uint64)
    for k in range(len(eights)):
        if eights[k] != 0:
            for n in range(8 * k, 8 * k + 8):
                events[count] = n
                count += fired[n]
    return count


@compiled
def add_row(drive_e: Any, drive_i: Any, weights: Any, value: Any) -> None:
    """Add the synapses of one source."""
    for n in range(len(drive_e)):
        drive_e[n] += relu(weights[n]) * value
        drive_i[n] += relu(-weights[n]) * value


@compiled
def add_events(tile: Any, at: int, weights: Any, events: Any, count: int, begin: int, n: int) -> None:
    """Set the two rows from ``at`` on to the sum of the synapses of the neurons that fired, one after the other.

    Four of them in a pass over the sums.
    """
    tile[at : at + n] = 0
    tile[at + ROW : at + ROW + n] = 0
    end = begin + n
    whole = count // 4 * 4
    for k in range(0, whole, 4):
        a, b = weights[events[k], begin:end], weights[events[k + 1], begin:end]
        c, d = weights[events[k + 2], begin:end], weights[events[k + 3], begin:end]
        for j in range(n):
            tile[at + j] = (((tile[at + j] + relu(a[j])) + relu(b[j])) + relu(c[j])) + relu(d[j])
            tile[at + ROW + j] = (((tile[at + ROW + j] + relu(-a[j])) + relu(-b[j])) + relu(-c[j])) + relu(-d[j])
    for k in range(whole, count):
        a = weights[events[k], begin:end]
        for j in range(n):
            tile[at + j] += relu(a[j])
            tile[at + ROW + j] += relu(-a[j])


@compiled
def add_values(tile: Any, at: int, weights: Any, values: Any, events: Any, count: int, begin: int, n: int) -> None:
    """:func:`add_events` of sources that send other numbers than 1."""
    tile[at : at + n] = 0
    tile[at + ROW : at + ROW + n] = 0
    for k in range(count):
        value = values[events[k]]
        add_row(tile[at : at + n], tile[at + ROW : at + ROW + n], weights[events[k], begin : begin + n], value)


@compiled
def add_synapses(
    tile: Any, at: int, synapses: Synapses, rows: Any, values: Any, events: Any, count: int, k: int, begin: int, n: int
) -> None:  # fmt: skip
    """What :func:`add_values`, or without ``values`` :func:`add_events`, sums up from ``rows``, for tile ``k``.

    A weight of 0 adds 0 and can be left out, unless its source sends infinity or NaN.
    """
    tile[at : at + n] = 0
    tile[at + ROW : at + ROW + n] = 0
    for i in range(count):
        source = events[i]
        first, last = synapses.starts[source, k], synapses.starts[source, k + 1]
        if values is None:
            for s in range(first, last):
                weight, j = synapses.weights[s], at + synapses.targets[s]
                tile[j] += relu(weight)
                tile[j + ROW] += relu(-weight)
        elif np.isfinite(values[source]):
            value = values[source]
            for s in range(first, last):
                weight, j = synapses.weights[s], at + synapses.targets[s]
                tile[j] += relu(weight) * value
                tile[j + ROW] += relu(-weight) * value
        else:
            row = rows[source, begin : begin + n]
            add_row(tile[at : at + n], tile[at + ROW : at + ROW + n], row, values[source])


@compiled
def drive_at(tile: Any, at: int, j: int) -> Drive:
    """The drive of neuron ``j`` in the two rows from offset ``at`` on."""
    return Drive(tile[at + j], tile[at + ROW + j])


@compiled
def tile_row(plane: int, holds: bool | None) -> int:
    """The row of a tile for a plane of a trajectory, which has no plane ``left`` without a refractory period."""
    return plane if holds is not None or plane < KEPT_FIELDS else plane + 1


@compiled
def kept_at(tile: Any, at: int, j: int) -> Kept:
    """What a step kept of neuron ``j``, in the rows from offset ``at`` on."""
    return Kept(tile[at + j], tile[at + ROW + j], tile[at + 2 * ROW + j], tile[at + 3 * ROW + j])


@compiled
def step_row(
    tile: Any, fired: Any, neurons: int, jump_first: bool, forced: bool, shared: Any, holds: bool | None, keep: bool | None
) -> None:  # fmt: skip
    """One step of a tile; ``fired`` takes 0 or 1, or gives it where it is ``forced``.

    ``holds``: None, or True where there is a refractory period; ``keep``: None, or True to keep what a trajectory has of
    the inside of a step.
    """
    for j in range(neurons):
        c = constants_of(tile, j, shared)
        before, left = state_at(tile, STATE, j), left_at(tile, LEFT, j, holds)
        drive, recurrent = drive_at(tile, INPUT, j), drive_at(tile, RECURRENT, j)
        u = integrate(before, drive, recurrent, c, jump_first)
        if keep is not None:
            decayed_e, decayed_i = decaying(before, drive, recurrent, jump_first)
            tile[KEPT + j], tile[KEPT + ROW + j] = before.v, u.v
            tile[KEPT + 2 * ROW + j], tile[KEPT + 3 * ROW + j] = u.g_e, u.g_i
            tile[DECAYED + j], tile[DECAYED + ROW + j] = decayed_e, decayed_i
            if holds is not None:
                tile[KEPT_LEFT + j] = left
        spike = fired[j] != 0 if forced else fire(excess(u, c), left)
        z: Any = 1.0 if spike else 0.0
        put_state(tile, STATE, j, reset(u, z, left, c))
        if holds is not None:
            tile[LEFT + j] = count_down(left, z, c)
        fired[j] = spike


@compiled
def unpack(fired: Any, words: Any, bit: int) -> None:
    for j in range(len(words)):
        fired[j] = (words[j] >> bit) & 1


@functools.cache
def projection_kernel() -> Any:
    """``relu(W) x`` and ``relu(-W) x`` for the rows from ``first`` to ``last``."""
    digest = sources()

    def projection(values: Any, weights: Any, drive: Any, first: int, last: int) -> None:
        _ = digest  # part of the key of the disk cache
        values, weights, drive = borrow(values), borrow(weights), borrow(drive)
        inputs, neurons = weights.shape
        tile = np.empty(2 * ROW, drive.dtype)
        events = np.empty(inputs + 1, np.int32)
        for row in range(first, last):
            count = compact(events, values[row])
            spikes = True
            for k in range(count):
                spikes &= values[row, events[k]] == 1
            for begin in range(0, neurons, TILE):
                n = min(TILE, neurons - begin)
                if spikes:
                    add_events(tile, 0, weights, events, count, begin, n)
                else:
                    add_values(tile, 0, weights, values[row], events, count, begin, n)
                copy(drive[0, row, begin : begin + n], tile, 0, 1, n)
                copy(drive[1, row, begin : begin + n], tile, ROW, 1, n)

    return entry_point(projection)


@functools.cache
def synapses_kernel() -> Any:
    """:class:`Synapses` of dense rows, without elements if there are more than ``most``."""
    digest = sources()

    def synapses(rows: Any, most: int) -> tuple[Any, Any, Any]:
        _ = digest  # part of the key of the disk cache
        neurons = rows.shape[1]
        tiles = (neurons + TILE - 1) // TILE
        starts = np.empty((len(rows), tiles + 1), np.int64)
        total = 0
        for source in range(len(rows)):
            starts[source, 0] = total
            for k in range(tiles):
                total += count_nonzero(rows[source, k * TILE : min((k + 1) * TILE, neurons)])
                starts[source, k + 1] = total
            if total > most:
                return starts[:0], np.empty(0, np.uint16), np.empty(0, rows.dtype)
        targets, weights = np.empty(total + 1, np.uint16), np.empty(total + 1, rows.dtype)
        count = 0
        for source in range(len(rows)):
            for begin in range(0, neurons, FEW):
                few = rows[source, begin : min(begin + FEW, neurons)]
                if count_nonzero(few):
                    for n in range(len(few)):
                        targets[count], weights[count] = (begin + n) % TILE, few[n]
                        count += few[n] != 0
        return starts, targets[:total], weights[:total]

    return entry_point(synapses)


@functools.cache
def block_kernel() -> Any:
    """A block of steps of the batch rows from ``first`` to ``last``: simulated, or replayed with the spikes known."""
    digest = sources()

    def block(
        x: Strided, input_drive: Any, input_rows: Any, input_synapses: Synapses, initial: Any, recurrent_drive: Any,
        recurrent_rows: Any, recurrent_synapses: Synapses, shared: Any, per_neuron: Any, state: Any, spikes: Strided,
        one: int, words: Any, forced: bool, states: Any, chosen: Any, trajectory: Any, jump_first: bool, holds: bool | None,
        steps: int, first: int, last: int,
    ) -> None:  # fmt: skip
        """Arrays without elements are not read or written; a drive without elements is summed from events.

        ``x`` [T, B I] and ``initial`` [B, N] are the sources of the input and of the first step's recurrent drive;
        ``input_rows`` [I, N] and ``recurrent_rows`` [N, N] have the synapses of a source in a row; where most of them are 0,
        the :class:`Synapses` have the others. ``state`` is carried on; ``forced``: the spikes are those of ``words``.
        ``states`` are of all neurons, or of those ``chosen`` (ascending). ``holds``: None, or True where there is a
        refractory period.
        """
        _ = digest  # part of the key of the disk cache
        x, spikes = borrow_strided(x), borrow_strided(spikes)
        input_synapses, recurrent_synapses = borrow_synapses(input_synapses), borrow_synapses(recurrent_synapses)
        input_rows, recurrent_rows, initial = borrow(input_rows), borrow(recurrent_rows), borrow(initial)
        input_drive, recurrent_drive = borrow(input_drive), borrow(recurrent_drive)
        state, words, states, trajectory = borrow(state), borrow(words), borrow(states), borrow(trajectory)
        chosen = borrow(chosen)
        inputs, neurons = input_rows.shape
        tiles = np.empty(((neurons + TILE - 1) // TILE, FORWARD_SIZE), state.dtype)
        buffer = np.empty(max(inputs, neurons, 1), state.dtype)
        bits = np.empty(max(inputs, 1), np.uint32)
        fired = np.zeros((neurons + 7) // 8 * 8, np.uint8)
        events = np.empty(len(fired) + 1, np.int32)
        input_events = np.empty(inputs + 1, np.int32)
        c = None if shared is None else load_shared(shared)
        for row in range(first, last):
            cells = row * neurons
            chosen_first, chosen_last = first_from(chosen, cells), first_from(chosen, cells + neurons)
            for k in range(len(tiles)):
                begin = k * TILE
                n = min(TILE, neurons - begin)
                load_per_neuron(tiles[k], per_neuron, cells + begin, n)
                load_state(tiles[k], STATE, LEFT, state, 0, 1, cells + begin, n, len(state))
            for t in range(steps):
                values = buffer[:inputs]
                if input_drive.size == 0:
                    values = row_of(buffer, bits, x, t, row * inputs, inputs)
                    input_count = compact(input_events, values[:inputs])
                if recurrent_drive.size == 0:
                    count = compact(events, initial[row]) if t == 0 else compact_spikes(events, fired)
                for k in range(len(tiles)):
                    tile = tiles[k]
                    begin = k * TILE
                    n = min(TILE, neurons - begin)
                    here = slice(begin, begin + n)
                    cell = cells + begin
                    if input_drive.size == 0 and input_synapses.starts.size > 0:
                        add_synapses(
                            tile, INPUT, input_synapses, input_rows, values, input_events, input_count, k, begin, n
                        )  # fmt: skip
                    elif input_drive.size == 0:
                        add_values(tile, INPUT, input_rows, values, input_events, input_count, begin, n)
                    else:
                        tile[INPUT : INPUT + n] = input_drive[0, t, row, here]
                        tile[INPUT + ROW : INPUT + ROW + n] = input_drive[1, t, row, here]
                    if recurrent_drive.size > 0:
                        tile[RECURRENT : RECURRENT + n] = recurrent_drive[0, t, row, here]
                        tile[RECURRENT + ROW : RECURRENT + ROW + n] = recurrent_drive[1, t, row, here]
                    elif t == 0:
                        add_values(tile, RECURRENT, recurrent_rows, initial[row], events, count, begin, n)
                    elif recurrent_synapses.starts.size > 0:
                        add_synapses(
                            tile, RECURRENT, recurrent_synapses, recurrent_rows, None, events, count, k, begin, n
                        )  # fmt: skip
                    else:
                        add_events(tile, RECURRENT, recurrent_rows, events, count, begin, n)
                    if forced:
                        unpack(fired[here], words[t // 32, cell : cell + n], t % 32)
                    prefetch(spikes, t + 1, cell, n)
                    if trajectory.size == 0:
                        step_row(tile, fired[here], n, jump_first, forced, c, holds, None)
                    else:
                        step_row(tile, fired[here], n, jump_first, forced, c, holds, True)
                        for plane in range(len(trajectory)):
                            copy(trajectory[plane, t, cell : cell + n], tile, KEPT + tile_row(plane, holds) * ROW, 1, n)
                    if spikes.data.size > 0:
                        at = t * spikes.stride_t + cell
                        if spikes.itemsize == 1:
                            spikes.data[at : at + n] = fired[here]
                        else:
                            expand(spikes.data, spikes.itemsize, one, at, fired[here], n)
                    if words.size > 0 and not forced:
                        pack(words[t // 32, cell : cell + n], fired[here], t % 32, n)
                    if states.size > 0 and chosen.size == 0:
                        store_state(tile, states, t, steps, cell, n, len(state))
                for k in range(chosen_first, chosen_last):
                    n = chosen[k] - cells
                    for field in range(len(state)):
                        states[field * steps + t, k] = tiles[n // TILE, row_of_field(STATE, LEFT, field) + n % TILE]
            for k in range(len(tiles)):
                begin = k * TILE
                store_state(tiles[k], state, 0, 1, cells + begin, min(TILE, neurons - begin), len(state))

    return entry_point(block)


@compiled
def sweep_row(
    tile: Any, words: Any, bit: int, neurons: int, jump_first: bool, shared: Any, holds: bool | None, sums: bool | None,
    METHOD: str,
) -> None:  # fmt: skip
    """The adjoint of one step; ``sums``: None, or True to add to the gradients by the constants."""
    for j in range(neurons):
        c = constants_of(tile, j, shared)
        z = 1.0 if (words[j] >> bit) & 1 else 0.0
        kept, lam = kept_at(tile, STEP, j), state_at(tile, STATE, j)
        left = left_at(tile, STEP_LEFT, j, holds)
        a = vjp(z, kept, left, tile[GRAD_Z + j], lam, state_at(tile, RECORDED, j), c, jump_first, METHOD)
        if sums is not None:
            decayed_e, decayed_i = tile[STEP_DECAYED + j], tile[STEP_DECAYED + ROW + j]
            put_sums(tile, j, vjp_constants(sums_at(tile, j), z, kept, left, decayed_e, decayed_i, lam, a, c))
        put_state(tile, STATE, j, a.lam)
        tile[ADJOINT + j], tile[ADJOINT + ROW + j] = a.drive.e, a.drive.i


@compiled
def sweep_tile(
    tile: Any, trajectory: Any, grad_z: Any, at: int, words: Any, per_neuron: Any, grad_spikes: Any, grad_states: Any,
    lam: Any, grad_constants: Any, t: int, cell: int, n: int, jump_first: bool, shared: Any, holds: bool | None,
    METHOD: str,
) -> None:  # fmt: skip
    """The adjoint of step ``t`` of the ``n`` neurons from ``cell`` on, which leaves those of their drives in the tile.

    ``lam`` and ``grad_constants`` are carried on. Of the ``trajectory`` and ``grad_z``, these neurons are those from ``at``
    on: a thread may have them of its own batch rows alone.
    """
    sums = None if grad_constants is None else True
    steps = trajectory.shape[1]
    load_per_neuron(tile, per_neuron, cell, n)
    load_state(tile, STATE, LEFT, lam, 0, 1, cell, n, FIELDS)
    if grad_states.size > 0:
        load_state(tile, RECORDED, LEFT, grad_states, t, steps, cell, n, FIELDS)
    for k in range(len(trajectory)):
        row_at = STEP + tile_row(k, holds) * ROW
        copy(tile[row_at : row_at + n], trajectory[k, t], at, 1, n)
    copy(tile[GRAD_Z : GRAD_Z + n], grad_z, at, 1, n)
    if grad_spikes.size > 0:
        tile[GRAD_Z : GRAD_Z + n] = grad_spikes[t, cell : cell + n] + grad_z[at : at + n]
    if grad_constants is not None:
        for k in range(len(grad_constants)):
            copy(tile[SUMS + k * ROW : SUMS + k * ROW + n], grad_constants[k], cell, 1, n)
    sweep_row(tile, words[t // 32, cell : cell + n], t % 32, n, jump_first, shared, holds, sums, METHOD)
    store_state(tile, lam, 0, 1, cell, n, FIELDS)
    if grad_constants is not None:
        for k in range(len(grad_constants)):
            copy(grad_constants[k, cell : cell + n], tile, SUMS + k * ROW, 1, n)


@functools.cache
def sweep_kernel(method: str) -> Any:
    """The adjoint of a block, from step ``until`` back to ``since``, for the batch rows from ``first`` to ``last``."""
    digest = sources()

    def sweep(
        since: int, until: int, panels: Any, trajectory: Any, words: Any, shared: Any, per_neuron: Any, grad_spikes: Any,
        grad_states: Any, lam: Any, lam_z: Any, adjoints: Any, grad_constants: Any, jump_first: bool, holds: bool | None,
        first: int, last: int, sums_of_rows: Any,
    ) -> None:  # fmt: skip
        """``panels``: the recurrent weights as :func:`.products.panels_of` makes them; without elements, ``lam_z`` stays.

        ``grad_states [F t, M]``: incoming gradient by the recorded states before the steps, or without elements.
        ``grad_constants`` [S, M] is carried on, or is None. ``sums_of_rows`` is scratch.
        """
        _ = digest  # part of the key of the disk cache
        trajectory, words, grad_spikes, grad_states, panels, sums_of_rows = (
            borrow(trajectory), borrow(words), borrow(grad_spikes), borrow(grad_states), borrow(panels),
            borrow(sums_of_rows),
        )  # fmt: skip
        lam, lam_z, adjoints = borrow(lam), borrow(lam_z), borrow(adjoints)
        cells, neurons = trajectory.shape[2], adjoints.shape[2] // 2
        tile = np.zeros(BACKWARD_SIZE, lam.dtype)
        c = None if shared is None else load_shared(shared)
        for t in range(until - 1, since - 1, -1):
            for row in range(first, last):
                for begin in range(0, neurons, TILE):
                    n = min(TILE, neurons - begin)
                    cell = row * neurons + begin
                    sweep_tile(
                        tile, trajectory, lam_z, cell, words, per_neuron, grad_spikes, grad_states, lam, grad_constants,
                        t, cell, n, jump_first, c, holds, method,
                    )  # fmt: skip
                    copy(adjoints[t, row, begin : begin + n], tile, ADJOINT, 1, n)
                    copy(adjoints[t, row, neurons + begin : neurons + begin + n], tile, ADJOINT + ROW, 1, n)
            if panels.size > 0:
                send_back(lam_z, panels, adjoints.reshape(-1), 2 * cells * t, first, last, sums_of_rows)

    return entry_point(sweep)


@functools.cache
def products_kernel() -> Any:
    """``sums += sources^T rows`` from the sources that are not 0, for the columns from ``first`` to ``last``."""
    digest = sources()

    def products(sums: Any, rows: Any, row_of_event: Any, source: Any, values: Any, first: int, last: int) -> None:
        _ = digest  # part of the key of the disk cache
        sums, rows = borrow(sums), borrow(rows)
        for begin in range(first, last, COLUMNS):
            end = min(begin + COLUMNS, last)
            for k in range(len(source)):
                target = sums[source[k], begin:end]
                row = rows[row_of_event[k], begin:end]
                value = values[k]
                for n in range(end - begin):
                    target[n] += value * row[n]

    return entry_point(products)
