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
from ...neuron.records import Drive, Kept, State
from ...neuron.step import count_down, decaying, excess, fire, integrate, reset
from .events import FEW, compact, count_nonzero, unpack
from .numba_bridge import borrow, compiled, converted, entry_point, flattened, inlined
from .products import ROWS, send_back
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
    copy_part,
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
    scratch_on_line,
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

# A thread adds to as many elements of a source's sums at a time as fit a second-level cache of this size, those of all
# sources together, but to no fewer than these: a short loop costs more than it saves.
CACHED, COLUMNS = 2**20, 256


class Synapses(NamedTuple):
    """The weights that are not 0 of sources ``[S, N]`` that mostly have none; without elements: read the dense rows.

    Those of source ``s`` in tile ``k`` of their targets are ``starts[s, k]`` to ``starts[s, k + 1]``, ascending:
    ``targets`` counts from the beginning of the tile.
    """

    starts: Any
    targets: Any
    weights: Any


class Feeds(NamedTuple):
    """What drives the neurons of a block. A drive without elements is summed from events.

    ``x`` [T, B I] and ``initial`` [B, N] are the sources of the input and of the first step's recurrent drive;
    ``input_rows`` [I, N] and ``recurrent_rows`` [N, N] have the synapses of a source in a row; where most of them are 0,
    the :class:`Synapses` have the others.
    """

    x: Any
    input_drive: Any
    input_rows: Any
    input_synapses: Synapses
    initial: Any
    recurrent_drive: Any
    recurrent_rows: Any
    recurrent_synapses: Synapses


@compiled
def borrow_synapses(synapses: Synapses) -> Synapses:
    return Synapses(borrow(synapses.starts), borrow(synapses.targets), borrow(synapses.weights))


@compiled
def add_row(drive_e: Any, drive_i: Any, weights: Any, value: Any) -> None:
    """Add the synapses of one source."""
    for n in range(len(drive_e)):
        drive_e[n] += relu(weights[n]) * value
        drive_i[n] += relu(-weights[n]) * value


@compiled
def add_events(tile: Any, at: int, weights: Any, events: Any, count: int, begin: int, n: int) -> None:
    """Set the two rows from ``at`` on to the sum of the synapses of the neurons that fired, one after the other.

    Four of them in a pass over the sums, then two, then one.
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
    if count - whole >= 2:
        a, b = weights[events[whole], begin:end], weights[events[whole + 1], begin:end]
        for j in range(n):
            tile[at + j] = (tile[at + j] + relu(a[j])) + relu(b[j])
            tile[at + ROW + j] = (tile[at + ROW + j] + relu(-a[j])) + relu(-b[j])
        whole += 2
    if whole < count:
        a = weights[events[whole], begin:end]
        for j in range(n):
            tile[at + j] += relu(a[j])
            tile[at + ROW + j] += relu(-a[j])


@compiled
def are_spikes(values: Any, events: Any, count: int) -> bool:
    """Whether all sources that send something send 1."""
    spikes = True
    for k in range(count):
        spikes &= values[events[k]] == 1
    return spikes


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


class Arriving(NamedTuple):
    """The sums of what arrives at a tile in a step: integers of both signs, and what makes numbers of them."""

    e: Any
    i: Any
    inverse_e: Any
    inverse_i: Any


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
    tile: Any, fired: Any, neurons: int, jump_first: bool, forced: bool, shared: Any, holds: bool | None, keep: bool | None,
    arriving: Any, driven: bool | None,
) -> None:  # fmt: skip
    """One step of a tile; ``fired`` takes 0 or 1, or gives it where it is ``forced``.

    ``holds``: None, or True where there is a refractory period; ``keep``: None, or True to keep what a trajectory has of
    the inside of a step. ``arriving``: None where the recurrent drive is in the tile, else the sums from which it is rounded
    once, and which begin anew; then ``driven`` may be None, where no input drives a neuron, else it is True.
    """
    for j in range(neurons):
        c = constants_of(tile, j, shared)
        before, left = state_at(tile, STATE, j), left_at(tile, LEFT, j, holds)
        if arriving is None:
            recurrent = drive_at(tile, RECURRENT, j)
        else:
            recurrent = Drive(
                converted(arriving.e[j], arriving.inverse_e) * arriving.inverse_e,
                converted(arriving.i[j], arriving.inverse_i) * arriving.inverse_i,
            )
            arriving.e[j] = 0
            arriving.i[j] = 0
        drive = Drive(recurrent.e * 0.0, recurrent.e * 0.0) if driven is None else drive_at(tile, INPUT, j)
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


@functools.cache
def projection_kernel() -> Any:
    """``relu(W) x`` and ``relu(-W) x`` for the rows from ``first`` to ``last``."""

    def projection(values: Any, weights: Any, drive: Any, first: int, last: int) -> None:
        values, weights, drive = borrow(values), borrow(weights), borrow(drive)
        inputs, neurons = weights.shape
        tile = scratch_on_line(2 * ROW, drive.dtype)
        events = np.empty(inputs + 1, np.int32)
        for row in range(first, last):
            count = compact(events, values[row])
            spikes = are_spikes(values[row], events, count)
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

    def synapses(rows: Any, most: int) -> tuple[Any, Any, Any]:
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


@compiled
def simulate_rows(
    feeds: Feeds, shared: Any, per_neuron: Any, state: Any, spikes: Strided, one: int, words: Any, forced: bool, states: Any,
    chosen: Any, trajectory: Any, origin: int, jump_first: bool, holds: bool | None, steps: int, first: int, last: int,
) -> None:  # fmt: skip
    """A block of steps of the batch rows from ``first`` to ``last``. Arrays without elements are not read or written.

    ``state`` is carried on; ``forced``: the spikes are those of ``words``. ``states`` are of all neurons, or of those
    ``chosen`` (ascending). The trajectory is of the neurons from ``origin`` on. ``holds``: None, or True where there is a
    refractory period.
    """
    x, spikes = borrow_strided(feeds.x), borrow_strided(spikes)
    input_synapses, recurrent_synapses = borrow_synapses(feeds.input_synapses), borrow_synapses(feeds.recurrent_synapses)
    input_rows, recurrent_rows, initial = borrow(feeds.input_rows), borrow(feeds.recurrent_rows), borrow(feeds.initial)
    input_drive, recurrent_drive = borrow(feeds.input_drive), borrow(feeds.recurrent_drive)
    state, words, states, trajectory = borrow(state), borrow(words), borrow(states), borrow(trajectory)
    chosen = borrow(chosen)
    inputs, neurons = input_rows.shape
    count_tiles = (neurons + TILE - 1) // TILE
    tiles = scratch_on_line(count_tiles * FORWARD_SIZE, state.dtype).reshape(count_tiles, FORWARD_SIZE)
    buffer = scratch_on_line(max(inputs, neurons, 1), state.dtype)
    bits = np.empty(max(inputs, 1), np.uint32)
    fired = np.zeros(neurons, np.uint8)
    events = np.empty(neurons + 1, np.int32)
    input_events = np.empty(inputs + 1, np.int32)
    input_count, input_spikes = 0, True
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
                input_spikes = are_spikes(values, input_events, input_count)
            if recurrent_drive.size == 0:
                count = compact(events, initial[row]) if t == 0 else compact(events, fired)
            for k in range(len(tiles)):
                tile = tiles[k]
                begin = k * TILE
                n = min(TILE, neurons - begin)
                here = slice(begin, begin + n)
                cell = cells + begin
                if input_drive.size == 0 and input_synapses.starts.size > 0:
                    add_synapses(tile, INPUT, input_synapses, input_rows, values, input_events, input_count, k, begin, n)
                elif input_drive.size == 0 and input_spikes:
                    add_events(tile, INPUT, input_rows, input_events, input_count, begin, n)
                elif input_drive.size == 0:
                    add_values(tile, INPUT, input_rows, values, input_events, input_count, begin, n)
                else:
                    copy_part(tile, INPUT, input_drive[0, t, row], begin, n)
                    copy_part(tile, INPUT + ROW, input_drive[1, t, row], begin, n)
                if recurrent_drive.size > 0:
                    copy_part(tile, RECURRENT, recurrent_drive[0, t, row], begin, n)
                    copy_part(tile, RECURRENT + ROW, recurrent_drive[1, t, row], begin, n)
                elif t == 0:
                    add_values(tile, RECURRENT, recurrent_rows, initial[row], events, count, begin, n)
                elif recurrent_synapses.starts.size > 0:
                    add_synapses(tile, RECURRENT, recurrent_synapses, recurrent_rows, None, events, count, k, begin, n)
                else:
                    add_events(tile, RECURRENT, recurrent_rows, events, count, begin, n)
                if forced:
                    unpack(fired[here], words[t // 32, cell : cell + n], t % 32)
                prefetch(spikes, t + 1, cell, n)
                if trajectory.size == 0:
                    step_row(tile, fired[here], n, jump_first, forced, c, holds, None, None, True)
                else:
                    step_row(tile, fired[here], n, jump_first, forced, c, holds, True, None, True)
                    at = cell - origin
                    for plane in range(len(trajectory)):
                        copy(trajectory[plane, t, at : at + n], tile, KEPT + tile_row(plane, holds) * ROW, 1, n)
                if spikes.data.size > 0:
                    at = t * spikes.stride_t + cell
                    if spikes.itemsize == 1:
                        copy_part(spikes.data, at, fired, begin, n)
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


@functools.cache
def block_kernel() -> Any:
    """:func:`simulate_rows`: a block of steps, simulated, or replayed with the spikes known."""

    def block(
        feeds: Feeds, shared: Any, per_neuron: Any, state: Any, spikes: Strided, one: int, words: Any, forced: bool,
        states: Any, chosen: Any, trajectory: Any, jump_first: bool, holds: bool | None, steps: int, first: int, last: int,
    ) -> None:  # fmt: skip
        simulate_rows(
            feeds, shared, per_neuron, state, spikes, one, words, forced, states, chosen, trajectory, 0, jump_first, holds,
            steps, first, last,
        )  # fmt: skip

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
def load_potentials(
    tile: Any, trajectory: Any, at: int, begun: Any, words: Any, t: int, cell: int, n: int, shared: Any, holds: bool | None
) -> None:  # fmt: skip
    """Fill the potentials before step ``t`` in the tile, from those ``begun`` with, or after the reset of the step before.

    The trajectory begins with the potentials before the reset. Arguments are those of :func:`sweep_tile`.
    """
    if t == 0:
        copy_part(tile, STEP, begun, cell, n)
        return
    copy_part(tile, STEP, trajectory[0, t - 1], at, n)
    if holds is not None:
        copy_part(tile, STEP_LEFT, trajectory[KEPT_FIELDS - 1, t - 1], at, n)
    word, bit = words[(t - 1) // 32, cell : cell + n], (t - 1) % 32
    for j in range(n):
        z = 1.0 if (word[j] >> bit) & 1 else 0.0
        u = tile[STEP + j]
        tile[STEP + j] = reset(State(u, u, u), z, left_at(tile, STEP_LEFT, j, holds), constants_of(tile, j, shared)).v


@compiled
def row_of_step(gradient: Any, t: int) -> int:
    """Which row of a gradient by spikes is that of step ``t``: it may have one row for all steps."""
    return t if len(gradient) > 1 else 0


@inlined
def sweep_tile(
    tile: Any, trajectory: Any, at: int, begun: Any, grad_z: Any, at_z: int, words: Any, per_neuron: Any, grad_spikes: Any,
    grad_states: Any, lam: Any, grad_constants: Any, t: int, cell: int, n: int, jump_first: bool, shared: Any,
    holds: bool | None, METHOD: str,
) -> None:  # fmt: skip
    """The adjoint of step ``t`` of the ``n`` neurons from ``cell`` on, which leaves those of their drives in the tile.

    ``lam`` and ``grad_constants`` are carried on. These neurons are those from ``at`` on in the ``trajectory``, and those
    from ``at_z`` on in ``grad_z``: a thread may have both of some batch rows alone.

    ``begun``: None, or the potentials ``[M]`` before the first step, with a trajectory that lacks the plane of those before
    a step: a quarter of what is written and read again.
    """
    sums = None if grad_constants is None else True
    steps = trajectory.shape[1]
    load_per_neuron(tile, per_neuron, cell, n)
    for k in range(FIELDS):
        copy_part(tile, STATE + k * ROW, lam[k], cell, n)
    if grad_states.size > 0:
        load_state(tile, RECORDED, LEFT, grad_states, t, steps, cell, n, FIELDS)
    if begun is not None:
        load_potentials(tile, trajectory, at, begun, words, t, cell, n, shared, holds)
    for k in range(len(trajectory)):
        plane = k if begun is None else k + 1
        copy_part(tile, STEP + tile_row(plane, holds) * ROW, trajectory[k, t], at, n)
    if grad_spikes.size > 0:
        grad, worth = grad_spikes[row_of_step(grad_spikes, t), cell : cell + n], grad_z[at_z : at_z + n]
        for j in range(n):
            tile[GRAD_Z + j] = grad[j] + worth[j]
    else:
        copy_part(tile, GRAD_Z, grad_z, at_z, n)
    if grad_constants is not None:
        for k in range(len(grad_constants)):
            copy(tile[SUMS + k * ROW : SUMS + k * ROW + n], grad_constants[k], cell, 1, n)
    sweep_row(tile, words[t // 32, cell : cell + n], t % 32, n, jump_first, shared, holds, sums, METHOD)
    for k in range(FIELDS):
        copy_part(lam[k], cell, tile, STATE + k * ROW, n)
    if grad_constants is not None:
        for k in range(len(grad_constants)):
            copy(grad_constants[k, cell : cell + n], tile, SUMS + k * ROW, 1, n)


class Back(NamedTuple):
    """What a sweep back through a block reads and carries on.

    ``panels``: the recurrent weights as :func:`.products.panels_of` makes them; without elements, ``lam_z`` stays.
    ``grad_spikes`` [T, M], or [1, M] if it is the same in all steps, and ``grad_states`` [F T, M], which is by the recorded
    states before the steps, may have no elements. ``lam`` [F, M] and ``lam_z`` [M] are carried on. ``adjoints`` [T, B, 2 N]
    are filled.
    """

    panels: Any
    grad_spikes: Any
    grad_states: Any
    lam: Any
    lam_z: Any
    adjoints: Any


@compiled
def sweep_rows(
    since: int, until: int, trajectory: Any, origin: int, words: Any, shared: Any, per_neuron: Any, back: Back,
    grad_constants: Any, jump_first: bool, holds: bool | None, first: int, last: int, sums_of_rows: Any, METHOD: str,
) -> None:  # fmt: skip
    """The adjoint of a block, from step ``until`` back to ``since``, for the batch rows from ``first`` to ``last``.

    The trajectory is of the neurons from ``origin`` on. ``grad_constants`` [S, M] is carried on, or None. ``sums_of_rows``
    is scratch.
    """
    trajectory, words, grad_spikes, grad_states, panels, sums_of_rows = (
        borrow(trajectory), borrow(words), borrow(back.grad_spikes), borrow(back.grad_states), borrow(back.panels),
        borrow(sums_of_rows),
    )  # fmt: skip
    lam, lam_z, adjoints = borrow(back.lam), borrow(back.lam_z), borrow(back.adjoints)
    batch, neurons = adjoints.shape[1], adjoints.shape[2] // 2
    tile = scratch_on_line(BACKWARD_SIZE, lam.dtype)
    tile[:] = 0
    c = None if shared is None else load_shared(shared)
    for t in range(until - 1, since - 1, -1):
        for row in range(first, last):
            for begin in range(0, neurons, TILE):
                n = min(TILE, neurons - begin)
                cell = row * neurons + begin
                sweep_tile(
                    tile, trajectory, cell - origin, None, lam_z, cell, words, per_neuron, grad_spikes, grad_states, lam,
                    grad_constants, t, cell, n, jump_first, c, holds, METHOD,
                )  # fmt: skip
                copy(adjoints[t, row, begin : begin + n], tile, ADJOINT, 1, n)
                copy(adjoints[t, row, neurons + begin : neurons + begin + n], tile, ADJOINT + ROW, 1, n)
        if panels.size > 0:
            send_back(lam_z, panels, flattened(adjoints), 2 * batch * neurons * t, first, last, sums_of_rows)


@functools.cache
def sweep_kernel(method: str) -> Any:
    """:func:`sweep_rows` of one surrogate derivative."""

    def sweep(
        since: int, until: int, trajectory: Any, words: Any, shared: Any, per_neuron: Any, back: Back,
        grad_constants: Any, jump_first: bool, holds: bool | None, first: int, last: int, sums_of_rows: Any,
    ) -> None:  # fmt: skip
        sweep_rows(
            since, until, trajectory, 0, words, shared, per_neuron, back, grad_constants, jump_first, holds, first, last,
            sums_of_rows, method,
        )  # fmt: skip

    return entry_point(sweep)


@functools.cache
def backward_kernel(method: str) -> Any:
    """A block replayed with its spikes, and the sweep back through it, for a few batch rows after the other.

    Their trajectory is small enough to stay in the caches.
    """

    def backward(
        feeds: Feeds, shared: Any, per_neuron: Any, state: Any, spikes: Strided, one: int, words: Any, forced: bool,
        states: Any, chosen: Any, planes: int, jump_first: bool, holds: bool | None, steps: int, back: Back,
        grad_constants: Any, first: int, last: int, sums_of_rows: Any,
    ) -> None:  # fmt: skip
        """Arguments as in :func:`simulate_rows` and :func:`sweep_rows`; ``planes`` of the trajectory."""
        neurons = feeds.input_rows.shape[1]
        trajectory = scratch_on_line(planes * steps * ROWS * neurons, state.dtype).reshape(planes, steps, ROWS * neurons)
        for begin in range(first, last, ROWS):
            end = min(begin + ROWS, last)
            simulate_rows(
                feeds, shared, per_neuron, state, spikes, one, words, forced, states, chosen, trajectory, begin * neurons,
                jump_first, holds, steps, begin, end,
            )  # fmt: skip
            sweep_rows(
                0, steps, trajectory, begin * neurons, words, shared, per_neuron, back, grad_constants, jump_first, holds,
                begin, end, sums_of_rows, method,
            )  # fmt: skip

    return entry_point(backward)


@functools.cache
def products_kernel() -> Any:
    """``sums += sources^T rows`` from the sources that are not 0, for the columns from ``first`` to ``last``."""

    def products(sums: Any, rows: Any, row_of_event: Any, source: Any, values: Any, first: int, last: int) -> None:
        sums, rows = borrow(sums), borrow(rows)
        columns = max(COLUMNS, CACHED // max(1, sums.shape[0] * sums.itemsize))
        for begin in range(first, last, columns):
            end = min(begin + columns, last)
            for k in range(len(source)):
                target = sums[source[k], begin:end]
                row = rows[row_of_event[k], begin:end]
                value = values[k]
                for n in range(end - begin):
                    target[n] += value * row[n]

    return entry_point(products)
