"""The backward of populations with sparse synapses, on the CPU.

A group of batch rows is replayed row by row, as in the forward. On the way back, what the spikes of a neuron are worth is a
sum over its synapses in every step. There the rows of a group go side by side, ``LANES`` of them or twice as many: a synapse
is read once for all, and what it adds is one vector operation, or two. Where there are few rows, a group is a single one.

Where rows are side by side, the ``lanes`` numbers of a neuron follow each other. A group's sums do not depend on how many
threads there are.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .events import compact, unpack
from .lanes import LANES, add_product, lowest_bit, no_lanes, put_lanes, transpose_lanes
from .numba_bridge import borrow, compiled, entry_point, flattened, inlined, numbers_in, prefetch_line
from .recurrent import (
    ADJOINT,
    BACKWARD_SIZE,
    FORWARD_SIZE,
    INPUT,
    KEPT,
    KEPT_FIELDS,
    add_events,
    add_values,
    are_spikes,
    row_of_step,
    step_row,
    sweep_tile,
    tile_row,
)
from .rows import (
    LEFT,
    LINE,
    ROW,
    STATE,
    TILE,
    Strided,
    borrow_strided,
    copy_part,
    load_per_neuron,
    load_shared,
    load_state,
    row_of,
    scratch_on_line,
)
from .sparse import Links, Paths, arriving_at, borrow_links, borrow_paths, send_all, take, unit_of


@compiled
def vectors_of(lanes: int) -> int:
    """Of how many vectors of rows the weights' gradients are summed separately."""
    return max(1, lanes // LANES)


@compiled
def to_lanes(cells: Any, at: int, rows: Any, start: int, apart: int, lanes: int, present: int, neurons: int) -> None:
    """Put the ``neurons`` numbers of each of ``present`` rows, ``apart`` from each other, side by side."""
    whole = neurons // LANES * LANES
    together = present // LANES * LANES
    for n in range(0, whole, LANES):
        for lane in range(0, together, LANES):
            transpose_lanes(cells, at + n * lanes + lane, lanes, rows, start + n + lane * apart, apart)
    for lane in range(present):
        for n in range(whole if lane < together else 0, neurons):
            cells[np.uintp(at + n * lanes + lane)] = rows[np.uintp(start + lane * apart + n)]


@compiled
def from_lanes(rows: Any, start: int, apart: int, cells: Any, lanes: int, present: int, neurons: int) -> None:
    """The inverse of :func:`to_lanes`, from the beginning of ``cells`` on."""
    whole = neurons // LANES * LANES
    together = present // LANES * LANES
    for n in range(0, whole, LANES):
        for lane in range(0, together, LANES):
            transpose_lanes(rows, start + n + lane * apart, apart, cells, n * lanes + lane, lanes)
    for lane in range(present):
        for n in range(whole if lane < together else 0, neurons):
            rows[np.uintp(start + lane * apart + n)] = cells[np.uintp(n * lanes + lane)]


@compiled
def send_factor(sums: Any, paths: Paths, scales: Any, source: int, factor: Any) -> None:
    """Add what an input sends to the ``sums [2 N]`` of its row; ``factor``: its value over the grid's unit."""
    half = len(sums) // 2
    for s in range(paths.starts[source], paths.starts[source + 1]):
        place = np.intp(paths.places[s])
        scale = np.float64(scales[1 if place >= half else 0])
        sums[np.uintp(place)] += int(np.rint(np.float64(abs(paths.weights[s])) * factor * scale))


@inlined
def worth(out: Any, flow: Any, at: int, lanes: int, paths: Paths, source: int) -> None:
    """The gradient by what a source sends in a step, in all lanes; its adjoints are those of ``flow`` from ``at`` on."""
    first, last = paths.starts[source], paths.starts[source + 1]
    if lanes == 1:
        total = out[source] * 0
        for s in range(first, last):
            magnitude, place = abs(paths.weights[np.uintp(s)]), at + np.intp(paths.places[np.uintp(s)])
            total += magnitude * flow[np.uintp(place)]
        out[source] = total
    elif lanes == LANES:
        sums = no_lanes(flow)
        for s in range(first, last):
            magnitude, place = abs(paths.weights[np.uintp(s)]), at + np.intp(paths.places[np.uintp(s)]) * LANES
            sums = add_product(sums, magnitude, flow, place)
        put_lanes(out, source * LANES, sums)
    else:
        low, high = no_lanes(flow), no_lanes(flow)
        for s in range(first, last):
            magnitude, place = abs(paths.weights[np.uintp(s)]), at + np.intp(paths.places[np.uintp(s)]) * 2 * LANES
            low = add_product(low, magnitude, flow, place)
            high = add_product(high, magnitude, flow, place + LANES)
        put_lanes(out, source * 2 * LANES, low)
        put_lanes(out, source * 2 * LANES + LANES, high)


@inlined
def add_to_weights(
    by_weight: Any, flow: Any, at: int, lanes: int, paths: Paths, source: int, lane: int, value: Any
) -> None:  # fmt: skip
    """Add what the value that a source sends in a step and one lane adds to the gradient by its weights' magnitudes."""
    for s in range(paths.starts[source], paths.starts[source + 1]):
        place = at + lane + np.intp(paths.places[np.uintp(s)]) * lanes
        by_weight[np.uintp(s)] += value * flow[np.uintp(place)]


@inlined
def add_pair_to_weights(
    by_weight: Any, flow: Any, at: int, lanes: int, paths: Paths, source: int, a: int, b: int
) -> None:  # fmt: skip
    """:func:`add_to_weights` of two spikes, those of the lanes ``a`` and ``b``, one after the other."""
    for s in range(paths.starts[source], paths.starts[source + 1]):
        place = at + np.intp(paths.places[np.uintp(s)]) * lanes
        by_weight[np.uintp(s)] = (by_weight[np.uintp(s)] + flow[np.uintp(place + a)]) + flow[np.uintp(place + b)]


@compiled
def back_through(
    by_spike: Any, by_weights: Any, own: int, flow: Any, at: int, lanes: int, paths: Paths, masks: Any
) -> None:  # fmt: skip
    """What the spikes of all sources are worth in a step, and what those that ``masks`` has add to the weights' gradient.

    ``own``: the first of the rows of ``by_weights`` that the group fills, one for each vector of lanes.
    """
    for source in range(len(masks)):
        worth(by_spike, flow, at, lanes, paths, source)
        for vector in range(vectors_of(lanes)):  # its adjoints have just been read
            mask, lane = masks[source] >> np.uint32(LANES * vector) & np.uint32(2**LANES - 1), LANES * vector
            while mask != 0:
                a = lane + lowest_bit(mask)
                mask &= mask - np.uint32(1)
                if mask == 0:
                    add_to_weights(by_weights[own + vector], flow, at, lanes, paths, source, a, 1.0)
                else:
                    b = lane + lowest_bit(mask)
                    mask &= mask - np.uint32(1)
                    add_pair_to_weights(by_weights[own + vector], flow, at, lanes, paths, source, a, b)


@compiled
def by_sign(by_weight: Any, paths: Paths) -> None:
    """The gradient by magnitudes becomes that by weights; a weight of 0 has none."""
    for s in range(len(by_weight)):
        weight = paths.weights[s]
        signed = -by_weight[s] if weight < 0 else by_weight[s]
        by_weight[s] = 0 if weight == 0 else signed


@inlined
def ask_for_row(numbers: Any, begin: int, n: int) -> None:
    """Ask for ``n`` numbers from ``begin`` on ahead of their use."""
    data = numbers_in(numbers, np.uint8)
    for index in range(begin * numbers.itemsize, min((begin + n) * numbers.itemsize, len(data)), LINE):
        prefetch_line(data, index)


@compiled
def ask_for_cells(trajectory: Any, grad_spikes: Any, adjoints: Any, t: int, at: int, cell: int, n: int) -> None:
    """Ask for what the sweep reads and writes of ``n`` neurons, those from ``cell`` on, or ``at`` in a trajectory."""
    planes, steps, cells = trajectory.shape
    _, batch, _, neurons = adjoints.shape
    for plane in range(planes):  # the potentials of this step have been read with those after the next one
        ask_for_row(trajectory, (plane * steps + (max(t - 1, 0) if plane == 0 else t)) * cells + at, n)
    ask_for_row(grad_spikes, row_of_step(grad_spikes, t) * batch * neurons + cell, n)
    for sign in range(2):
        ask_for_row(adjoints, ((t * batch + cell // neurons) * 2 + sign) * neurons + cell % neurons, n)


@compiled
def lanes_that_fired(masks: Any, words: Any, bit: int, first: int, present: int) -> None:
    """One bit a batch row for every neuron, from the bits of a step in the ``words`` of the rows from ``first`` on."""
    neurons = len(masks)
    masks[:] = 0
    for lane in range(present):
        row = words[(first + lane) * neurons : (first + lane + 1) * neurons]
        for n in range(neurons):
            masks[n] |= np.uint32(((row[n] >> bit) & 1) << lane)


# Neurons that are swept at a time: all that is read and written of them fits a first-level cache.
SWEPT = 256
# Steps back after which the adjoints that are still read move to the end of their window: it stays in a second-level cache.
STEPS_AHEAD = 2


def steps_ahead(steps: int, longest: int) -> int:
    """After how many steps back that happens, in a block of so many steps and with this longest delay."""
    return min(steps, max(longest, STEPS_AHEAD))


@functools.cache
def backward_block_kernel(method: str) -> Any:
    """Replay a block and go back through it, for one group of batch rows from ``first`` on."""

    def backward_block(
        x: Strided, inputs: Paths, input_rows: Any, input_drive: Any, synapses: Paths, prepared: Links, scales: Any,
        ring: Any, shared: Any, per_neuron: Any, state: Any,
        words: Any, grad_spikes: Any, grad_states: Any, lam: Any, grad_constants: Any, adjoints: Any, grad_x: Any,
        jump_first: bool, holds: bool | None, steps: int, ahead: int, trajectories: Any, flows: Any, by_weights: Any,
        by_inputs: Any, lanes: int, rows: int, first: int, number: int,
    ) -> None:  # fmt: skip
        """``state``, ``lam``, ``per_neuron``, ``words``: ``[..., B N]``; ``grad_states [F T, B N]``; ``input_drive`` and
        ``adjoints [T + R, B, 2, N]`` as the protocol has them, ``input_rows`` as :func:`.sparse.block_kernel` has them. What
        is absent has no elements, ``grad_constants`` is None.

        ``scales [8]``: of the grid of the synapses between neurons, then of that of inputs. The ``ring`` is used up.
        ``by_weights [groups, S]`` and ``by_inputs`` take the sums of group ``number`` in this launch. ``trajectories`` and
        ``flows``, one row of numbers a group, are scratch: the second has the adjoints that are still read, of ``ahead``
        steps and of the longest delay. A group has ``lanes`` rows, of which ``rows`` are there.
        """
        x, incoming, paths = borrow_strided(x), borrow_paths(inputs), borrow_paths(synapses)
        links = borrow_links(prepared)
        input_rows, input_drive, ring = borrow(input_rows), borrow(input_drive), borrow(ring)
        state, words = borrow(state), borrow(words)
        grad_spikes, grad_states, lam, adjoints = borrow(grad_spikes), borrow(grad_states), borrow(lam), borrow(adjoints)
        grad_x, trajectories, flows = borrow(grad_x), borrow(trajectories), borrow(flows)
        by_weights, by_inputs = borrow(by_weights), borrow(by_inputs)
        batch, longest, _, neurons = ring.shape
        dense = input_rows.size > 0
        sources = len(input_rows) if dense else len(incoming.starts) - 1
        c = None if shared is None else load_shared(shared)
        # what a step keeps but for the potentials before it
        planes = (KEPT_FIELDS - 1 if holds is None else KEPT_FIELDS) + (0 if grad_constants is None else 2)
        room = trajectories[number, : planes * steps * rows * neurons]
        trajectory = room.reshape(planes, steps, rows * neurons)
        tiles = np.zeros(((neurons + TILE - 1) // TILE, FORWARD_SIZE), state.dtype)
        fired = np.zeros(neurons, np.uint8)
        inbox = np.zeros(2 * neurons if incoming.places.size > 0 else 0, np.int64)
        buffer, bits = np.empty(sources, state.dtype), np.empty(sources, np.uint32)
        events = np.empty(max(sources, neurons) + 1, np.int64)
        values, input_count, input_spikes = buffer[:sources], 0, True
        for lane in range(rows):
            cells = (first + lane) * neurons
            sums = flattened(ring[first + lane])
            for k in range(len(tiles)):
                begin = k * TILE
                n = min(TILE, neurons - begin)
                load_per_neuron(tiles[k], per_neuron, cells + begin, n)
                load_state(tiles[k], STATE, LEFT, state, 0, 1, cells + begin, n, len(state))
            for t in range(steps):
                unit = 1.0
                if inbox.size > 0 or dense:
                    values = row_of(buffer, bits, x, t, (first + lane) * sources, sources)[:sources]
                    input_count = compact(events, values)
                if dense:
                    input_spikes = are_spikes(values, events, input_count)
                if inbox.size > 0:
                    unit = unit_of(values)
                    if unit == unit:
                        for k in range(input_count):
                            factor = np.float64(values[events[k]]) / unit
                            send_factor(inbox, incoming, scales[4:], events[k], factor)
                slot = t % longest
                for k in range(len(tiles)):
                    tile = tiles[k]
                    begin = k * TILE
                    n = min(TILE, neurons - begin)
                    if inbox.size > 0:
                        take(tile, INPUT, inbox, begin, n, scales[6] * unit)
                        take(tile, INPUT + ROW, inbox, neurons + begin, n, scales[7] * unit)
                    elif dense and input_spikes:
                        add_events(tile, INPUT, input_rows, events, input_count, begin, n)
                    elif dense:
                        add_values(tile, INPUT, input_rows, values, events, input_count, begin, n)
                    elif input_drive.size > 0:
                        copy_part(tile, INPUT, input_drive[0, t, first + lane], begin, n)
                        copy_part(tile, INPUT + ROW, input_drive[1, t, first + lane], begin, n)
                    unpack(fired[begin : begin + n], words[t // 32, cells + begin : cells + begin + n], t % 32)
                    arriving = arriving_at(sums, 2 * slot * neurons + begin, neurons, n, scales)
                    step_row(tile, fired[begin : begin + n], n, jump_first, True, c, holds, True, arriving, True)
                    to = lane * neurons + begin
                    for plane in range(planes):
                        copy_part(trajectory[plane, t], to, tile, KEPT + tile_row(plane + 1, holds) * ROW, n)
                count = compact(events, fired)
                send_all(sums, slot, neurons, links, 0, 1, events[:count])
        # back, with the adjoints of the steps after the block
        flat, a_step = flattened(adjoints), 2 * neurons * lanes
        flow = flows[number]
        if rows < lanes:
            flow[:] = 0
        for r in range(longest):
            for sign in range(2):
                at = (ahead + r) * a_step + sign * neurons * lanes
                start = (((steps + r) * batch + first) * 2 + sign) * neurons
                to_lanes(flow, at, flat, start, 2 * neurons, lanes, rows, neurons)
        begin_t = ahead  # the adjoints of step t + 1 begin here, in steps, and those of later ones follow
        tile = np.zeros(BACKWARD_SIZE, state.dtype)
        by_spike, grad_z = np.zeros(neurons * lanes, state.dtype), np.zeros(neurons * rows, state.dtype)
        by_value = np.zeros(sources * lanes, state.dtype)
        masks = np.zeros(neurons, np.uint32)
        every = range(number * vectors_of(lanes), (number + 1) * vectors_of(lanes))
        for own in every:
            if by_weights.size > 0:
                by_weights[own, :] = 0
            if by_inputs.size > 0:
                by_inputs[own, :] = 0
        for back_t in range(steps):
            t = steps - 1 - back_t
            if begin_t == 0:  # the window goes on: its first steps are now its last
                begin_t = ahead
                copy_part(flow, ahead * a_step, flow, 0, longest * a_step)
            begin_t -= 1
            at_t = begin_t * a_step
            if by_weights.size > 0:
                lanes_that_fired(masks, words[t // 32], t % 32, first, rows)
            back_through(by_spike, by_weights, every.start, flow, at_t, lanes, paths, masks)
            from_lanes(grad_z, 0, neurons, by_spike, lanes, rows, neurons)
            for lane in range(rows):
                for begin in range(0, neurons, SWEPT):
                    n = min(SWEPT, neurons - begin)
                    at = lane * neurons + begin + n  # the next ones: the processor's own prefetching stops at a page's end
                    if at < rows * neurons:
                        ask_for_cells(trajectory, grad_spikes, adjoints, t, at, first * neurons + at, n)
                    sweep_tile(
                        tile, trajectory, lane * neurons + begin, state[0], grad_z, lane * neurons + begin, words,
                        per_neuron, grad_spikes, grad_states, lam, grad_constants, t, (first + lane) * neurons + begin, n,
                        jump_first, c, holds, method,
                    )  # fmt: skip
                    copy_part(adjoints[t, first + lane, 0], begin, tile, ADJOINT, n)
                    copy_part(adjoints[t, first + lane, 1], begin, tile, ADJOINT + ROW, n)
            for sign in range(2):
                start = ((t * batch + first) * 2 + sign) * neurons
                to_lanes(flow, at_t + sign * neurons * lanes, flat, start, 2 * neurons, lanes, rows, neurons)
            if inbox.size > 0:
                if grad_x.size > 0:
                    for source in range(sources):
                        worth(by_value, flow, at_t, lanes, incoming, source)
                    from_lanes(flattened(grad_x), (t * batch + first) * sources, sources, by_value, lanes, rows, sources)
                if by_inputs.size > 0:
                    for lane in range(rows):
                        values = row_of(buffer, bits, x, t, (first + lane) * sources, sources)[:sources]
                        count = compact(events, values)
                        for k in range(count):
                            value = values[events[k]]
                            own = every.start + lane // LANES
                            add_to_weights(by_inputs[own], flow, at_t, lanes, incoming, events[k], lane, value)
        for own in every:
            if by_weights.size > 0:
                by_sign(by_weights[own], paths)
            if by_inputs.size > 0:
                by_sign(by_inputs[own], incoming)

    return entry_point(backward_block)


@functools.cache
def history_kernel() -> Any:
    """The gradients by what was sent before the first step, and by its weights, for one group of batch rows."""

    def history_gradient(
        synapses: Paths, history: Any, adjoints: Any, grad_history: Any, by_weights: Any, by_inputs: Any, lanes: int,
        rows: int, first: int, number: int,
    ) -> None:  # fmt: skip
        paths, history, adjoints = borrow_paths(synapses), borrow(history), borrow(adjoints)
        grad_history, by_weights = borrow(grad_history), borrow(by_weights)
        steps, batch, sources = history.shape
        longest, _, _, neurons = adjoints.shape
        # Steps are counted from the first row of the history on. What arrived before its end adds the adjoint 0.
        flow = scratch_on_line((steps + longest) * 2 * neurons * lanes, history.dtype)
        flow[:] = 0
        a_step = 2 * neurons * lanes
        for t in range(longest):
            for sign in range(2):
                at = (steps + t) * a_step + sign * neurons * lanes
                start = ((t * batch + first) * 2 + sign) * neurons
                to_lanes(flow, at, flattened(adjoints), start, 2 * neurons, lanes, rows, neurons)
        by_spike = np.zeros(sources * lanes, history.dtype)
        events = np.empty(sources + 1, np.int64)
        every = range(number * vectors_of(lanes), (number + 1) * vectors_of(lanes))
        if by_weights.size > 0:
            by_weights[every.start : every.stop] = 0
        for r in range(steps):
            at_r = r * a_step
            for source in range(sources):
                worth(by_spike, flow, at_r, lanes, paths, source)
            from_lanes(flattened(grad_history), (r * batch + first) * sources, sources, by_spike, lanes, rows, sources)
            if by_weights.size > 0:
                for lane in range(rows):
                    count = compact(events, history[r, first + lane])
                    for k in range(count):
                        value = history[r, first + lane, events[k]]
                        own = every.start + lane // LANES
                        add_to_weights(by_weights[own], flow, at_r, lanes, paths, events[k], lane, value)
        for own in every:
            if by_weights.size > 0:
                by_sign(by_weights[own], paths)

    return entry_point(history_gradient)


def groups(batch: int, samples: int, threads: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Lanes of a group, and of each group its first row, its number of rows, and its sample.

    A group has two vectors of rows if no thread is busy for longer with it: they read each synapse once for both. Each
    vector has its own sums of the weights' gradients, so that the bits are those of two groups.
    """
    each = batch // samples
    lanes = LANES if each >= LANES // 4 else 1
    if each > LANES:
        rounds, of_two = (-(-samples * -(-each // width) // threads) for width in (LANES, 2 * LANES))
        lanes = 2 * LANES if 2 * of_two <= rounds else LANES
    return lanes, [
        (row, min(lanes, (sample + 1) * each - row), sample)
        for sample in range(samples)
        for row in range(sample * each, (sample + 1) * each, lanes)
    ]
