"""The backward of populations with sparse synapses, on the CPU.

What the spikes of a neuron are worth is a sum over its synapses in every step. The rows of a batch go through it side by
side, ``LANES`` in a group: a synapse is read once for all of them, and what it adds is a few vector operations. Where there
are few rows, a group is a single one.

Within a group, a cell is a neuron in a lane: number ``neuron * lanes + lane``. Cells are in tiles as neurons are elsewhere.
A group's sums do not depend on how many threads there are.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .events import compact
from .lanes import LANES, add_product, no_lanes, put_lanes
from .numba_bridge import borrow, compiled, entry_point, sources
from .recurrent import (
    ADJOINT,
    BACKWARD_SIZE,
    FORWARD_SIZE,
    GRAD_Z,
    INPUT,
    KEPT,
    KEPT_FIELDS,
    RECURRENT,
    STEP,
    step_row,
    sweep_row,
    tile_row,
)
from .rows import (
    CONSTANTS,
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
    row_of,
    row_of_field,
)
from .sparse import Paths, borrow_paths, unit_of


@compiled
def to_lanes(cells: Any, rows: Any, lanes: int, neurons: int, begin: int) -> None:
    """The cells from number ``begin`` on, from the ``rows [rows neurons]`` of a group; lanes without a row get 0."""
    first = begin // lanes
    count = len(cells) // lanes
    for lane in range(lanes):
        if (lane + 1) * neurons <= len(rows):
            row = rows[lane * neurons + first : lane * neurons + first + count]
            for k in range(count):
                cells[k * lanes + lane] = row[k]
        else:
            for k in range(count):
                cells[k * lanes + lane] = 0


@compiled
def from_lanes(rows: Any, cells: Any, lanes: int, neurons: int, begin: int) -> None:
    """The inverse of :func:`to_lanes`."""
    first = begin // lanes
    count = len(cells) // lanes
    for lane in range(len(rows) // neurons):
        row = rows[lane * neurons + first : lane * neurons + first + count]
        for k in range(count):
            row[k] = cells[k * lanes + lane]


@compiled
def send_spike(sums: Any, now: int, neurons: int, lanes: int, paths: Paths, source: int, lane: int) -> None:
    """Add what a spike sends in one lane to the ``sums [R, 2, N, lanes]``, a ring as flat array; ``now``: its slot."""
    around = np.uintp(len(sums) // lanes)
    base = np.uintp(2 * now * neurons)
    for s in range(paths.starts[source], paths.starts[source + 1]):
        place = base + np.uintp(paths.places[s])
        place = place - around if place >= around else place
        sums[place * np.uintp(lanes) + np.uintp(lane)] += paths.units[s]


@compiled
def send_factor(sums: Any, lanes: int, paths: Paths, scales: Any, source: int, lane: int, factor: Any) -> None:
    """Add what an input sends in one lane to the ``sums [2, N, lanes]``; ``factor``: its value over the grid's unit."""
    half = len(sums) // lanes // 2
    for s in range(paths.starts[source], paths.starts[source + 1]):
        place = paths.places[s]
        scale = np.float64(scales[1 if place >= half else 0])
        sums[np.uintp(place * lanes + lane)] += int(np.rint(np.float64(paths.magnitudes[s]) * factor * scale))


@compiled
def worth(out: Any, adjoints: Any, t: int, least: int, neurons: int, lanes: int, paths: Paths) -> None:
    """The gradient by what each source sends in step ``t``, in all lanes, from ``adjoints [T, 2, N, lanes]`` as flat array.

    What arrives before step ``least`` is left out.
    """
    base, begin = 2 * t * neurons, 2 * least * neurons
    for source in range(len(paths.starts) - 1):
        if lanes == 1:
            total = out[source] * 0
            for s in range(paths.starts[source], paths.starts[source + 1]):
                place = base + paths.places[s]
                if place >= begin:
                    total += paths.magnitudes[s] * adjoints[np.uintp(place)]
            out[source] = total
        else:
            sums = no_lanes(adjoints)
            for s in range(paths.starts[source], paths.starts[source + 1]):
                place = base + paths.places[s]
                if place >= begin:
                    sums = add_product(sums, paths.magnitudes[s], adjoints, place * lanes)
            put_lanes(out, source * lanes, sums)


@compiled
def add_to_weights(
    by_weight: Any, adjoints: Any, t: int, least: int, neurons: int, lanes: int, paths: Paths, source: int, lane: int,
    value: Any,
) -> None:  # fmt: skip
    """Add what the value that a source sends in step ``t`` and one lane adds to the gradient by its weights' magnitudes."""
    base, begin = np.uintp(2 * t * neurons), np.uintp(2 * least * neurons)
    first = paths.starts[source]
    sums = by_weight[first : paths.starts[source + 1]]
    places = paths.places[first : paths.starts[source + 1]]
    for s in range(len(sums)):
        place = base + np.uintp(places[s])
        if place >= begin:
            sums[s] += value * adjoints[place * np.uintp(lanes) + np.uintp(lane)]


@compiled
def by_sign(by_weight: Any, neurons: int, paths: Paths) -> None:
    """The gradient by magnitudes becomes that by weights; a weight of 0 has none."""
    for s in range(len(by_weight)):
        if paths.magnitudes[s] == 0:
            by_weight[s] = 0
        elif paths.places[s] // neurons % 2 == 1:
            by_weight[s] = -by_weight[s]


@compiled
def load_cells(
    tile: Any, per_neuron: Any, start: int, stop: int, lanes: int, neurons: int, begin: int, n: int
) -> None:  # fmt: skip
    """The constants of the cells of a tile, where neurons have their own."""
    if per_neuron is not None:
        for row in range(len(per_neuron)):
            at = CONSTANTS + row * ROW
            to_lanes(tile[at : at + n], per_neuron[row, start:stop], lanes, neurons, begin)


@compiled
def spikes_to_lanes(cells: Any, words: Any, bit: int, lanes: int, neurons: int) -> None:
    """The spikes of one step, a byte each."""
    for lane in range(len(words) // neurons):
        row = words[lane * neurons : (lane + 1) * neurons]
        for n in range(neurons):
            cells[n * lanes + lane] = (row[n] >> bit) & 1


@functools.cache
def backward_block_kernel(method: str) -> Any:
    """Replay a block and go back through it, for one group of batch rows from ``first`` on."""
    digest = sources()

    def backward_block(
        x: Strided, inputs: Paths, input_drive: Any, synapses: Paths, scales: Any, ring: Any, shared: Any,
        per_neuron: Any, state: Any,
        words: Any, grad_spikes: Any, grad_states: Any, lam: Any, grad_constants: Any, adjoints: Any, grad_x: Any,
        jump_first: bool, holds: bool | None, steps: int, by_weights: Any, by_inputs: Any, lanes: int, rows: int,
        first: int, number: int,
    ) -> None:  # fmt: skip
        """``state``, ``lam``, ``per_neuron``, ``words``: ``[..., B N]``; ``grad_states [F T, B N]``; ``input_drive`` and
        ``adjoints [T + R, B, 2, N]`` as the protocol has them. What is absent has no elements, ``grad_constants`` is None.

        ``scales [8]``: of the grid of the synapses between neurons, then of that of inputs.
        ``by_weights [groups, S]`` and ``by_inputs`` take the sums of group ``number`` in this launch. A group has ``lanes``
        rows, of which ``rows`` are there.
        """
        _ = digest  # part of the key of the disk cache
        x, incoming, paths = borrow_strided(x), borrow_paths(inputs), borrow_paths(synapses)
        input_drive, ring, state, words = borrow(input_drive), borrow(ring), borrow(state), borrow(words)
        grad_spikes, grad_states, lam, adjoints = borrow(grad_spikes), borrow(grad_states), borrow(lam), borrow(adjoints)
        grad_x, by_weights, by_inputs = borrow(grad_x), borrow(by_weights), borrow(by_inputs)
        longest, neurons = ring.shape[1], ring.shape[3]
        sources = len(incoming.starts) - 1
        cells = neurons * lanes
        start, stop = first * neurons, (first + rows) * neurons
        tiles = (cells + TILE - 1) // TILE
        c = None if shared is None else load_shared(shared)
        keep_sums = None if grad_constants is None else True
        planes = (KEPT_FIELDS if holds is None else KEPT_FIELDS + 1) + (0 if keep_sums is None else 2)
        trajectory = np.empty((steps, planes, cells), state.dtype)
        fired = np.zeros((steps, cells + TILE), np.uint8)
        sums = np.zeros(longest * 2 * cells, np.int64)
        for lane in range(rows):
            under_way = ring[first + lane].reshape(-1)
            for at in range(longest * 2):
                for n in range(neurons):
                    sums[at * cells + n * lanes + lane] = under_way[at * neurons + n]
        for t in range(steps):
            spikes_to_lanes(fired[t], words[t // 32, start:stop], t % 32, lanes, neurons)
        tile_rows = np.zeros((tiles, FORWARD_SIZE), state.dtype)
        for k in range(tiles):
            begin = k * TILE
            n = min(TILE, cells - begin)
            load_cells(tile_rows[k], per_neuron, start, stop, lanes, neurons, begin, n)
            for field in range(len(state)):
                row = row_of_field(STATE, LEFT, field)
                to_lanes(tile_rows[k][row : row + n], state[field, start:stop], lanes, neurons, begin)
        inbox = np.zeros(2 * cells if incoming.places.size > 0 else 0, np.int64)
        units = np.ones(lanes, np.float64)
        buffer, bits = np.empty(sources, state.dtype), np.empty(sources, np.uint32)
        events = np.empty(max(sources, neurons) + 1, np.int64)
        for t in range(steps):
            if inbox.size > 0:
                inbox[:] = 0
                for lane in range(rows):
                    values = row_of(buffer, bits, x, t, (first + lane) * sources, sources)[:sources]
                    count = compact(events, values)
                    units[lane] = unit_of(values)
                    if units[lane] == units[lane]:
                        for k in range(count):
                            factor = np.float64(values[events[k]]) / units[lane]
                            send_factor(inbox, lanes, incoming, scales[4:], events[k], lane, factor)
            slot = t % longest
            for k in range(tiles):
                tile = tile_rows[k]
                begin = k * TILE
                n = min(TILE, cells - begin)
                for sign in range(2):
                    row = tile[RECURRENT + sign * ROW : RECURRENT + sign * ROW + n]
                    here = sums[(2 * slot + sign) * cells + begin : (2 * slot + sign) * cells + begin + n]
                    for j in range(n):
                        row[j] = here[j]
                        here[j] = 0
                    for j in range(n):
                        row[j] = row[j] * scales[2 + sign]
                    row = tile[INPUT + sign * ROW : INPUT + sign * ROW + n]
                    if inbox.size > 0:
                        for j in range(n):
                            row[j] = inbox[sign * cells + begin + j]
                        for j in range(n):
                            row[j] = row[j] * (scales[6 + sign] * units[(begin + j) % lanes])
                    elif input_drive.size > 0:
                        flat = input_drive[sign, t].reshape(-1)[start:stop]
                        to_lanes(row, flat, lanes, neurons, begin)
                    else:
                        for j in range(n):
                            row[j] = 0
                step_row(tile, fired[t, begin : begin + n], n, jump_first, True, c, holds, True)
                for plane in range(planes):
                    copy(trajectory[t, plane, begin : begin + n], tile, KEPT + tile_row(plane, holds) * ROW, 1, n)
            eights = fired[t, : (cells + 7) // 8 * 8].view(np.uint64)
            for k in range(len(eights)):
                if eights[k] != 0:
                    for j in range(8 * k, 8 * k + 8):
                        if fired[t, j]:
                            send_spike(sums, slot, neurons, lanes, paths, j // lanes, j % lanes)
        # back, with the adjoints of the steps after the block
        flow = np.zeros((steps + longest) * 2 * cells, state.dtype)
        for t in range(steps, steps + longest):
            for lane in range(rows):
                for sign in range(2):
                    later = adjoints[t, first + lane, sign]
                    here = flow[(2 * t + sign) * cells : (2 * t + sign + 1) * cells]
                    for n in range(neurons):
                        here[n * lanes + lane] = later[n]
        back = np.zeros((tiles, BACKWARD_SIZE), state.dtype)
        for k in range(tiles):
            begin = k * TILE
            n = min(TILE, cells - begin)
            load_cells(back[k], per_neuron, start, stop, lanes, neurons, begin, n)
            for field in range(FIELDS):
                to_lanes(
                    back[k][STATE + field * ROW : STATE + field * ROW + n], lam[field, start:stop], lanes, neurons, begin
                )
            if grad_constants is not None:
                for row in range(len(grad_constants)):
                    at = SUMS + row * ROW
                    to_lanes(back[k][at : at + n], grad_constants[row, start:stop], lanes, neurons, begin)
        by_spike = np.zeros(cells, state.dtype)
        by_value = np.zeros(sources * lanes, state.dtype)
        if by_weights.size > 0:
            by_weights[number, :] = 0
        if by_inputs.size > 0:
            by_inputs[number, :] = 0
        for back_t in range(steps):
            t = steps - 1 - back_t
            worth(by_spike, flow, t, 0, neurons, lanes, paths)
            if by_weights.size > 0:
                eights = fired[t, : (cells + 7) // 8 * 8].view(np.uint64)
                for k in range(len(eights)):
                    if eights[k] != 0:
                        for j in range(8 * k, 8 * k + 8):
                            if fired[t, j]:
                                add_to_weights(
                                    by_weights[number], flow, t, 0, neurons, lanes, paths, j // lanes, j % lanes, 1.0
                                )  # fmt: skip
            for k in range(tiles):
                tile = back[k]
                begin = k * TILE
                n = min(TILE, cells - begin)
                for plane in range(planes):
                    at = STEP + tile_row(plane, holds) * ROW
                    copy(tile[at : at + n], trajectory[t, plane], begin, 1, n)
                copy(tile[GRAD_Z : GRAD_Z + n], by_spike, begin, 1, n)
                if grad_spikes.size > 0:
                    given = tile[RECORDED : RECORDED + n]
                    to_lanes(given, grad_spikes[t, start:stop], lanes, neurons, begin)
                    for j in range(n):
                        tile[GRAD_Z + j] = given[j] + tile[GRAD_Z + j]
                    for j in range(n):
                        given[j] = 0
                if grad_states.size > 0:
                    for field in range(FIELDS):
                        given = tile[RECORDED + field * ROW : RECORDED + field * ROW + n]
                        to_lanes(given, grad_states[field * steps + t, start:stop], lanes, neurons, begin)
                sweep_row(tile, fired[t, begin : begin + n], 0, n, jump_first, c, holds, keep_sums, method)
                here = flow[2 * t * cells : (2 * t + 2) * cells]
                copy(here[begin : begin + n], tile, ADJOINT, 1, n)
                copy(here[cells + begin : cells + begin + n], tile, ADJOINT + ROW, 1, n)
            if t < longest or input_drive.size > 0:  # nobody reads those of other steps
                for lane in range(rows):
                    for sign in range(2):
                        received = adjoints[t, first + lane, sign]
                        sent = flow[(2 * t + sign) * cells : (2 * t + sign + 1) * cells]
                        for n in range(neurons):
                            received[n] = sent[n * lanes + lane]
            if inbox.size > 0:
                if grad_x.size > 0:
                    worth(by_value, flow, t, 0, neurons, lanes, incoming)
                    for lane in range(rows):
                        for source in range(sources):
                            grad_x[t, first + lane, source] = by_value[source * lanes + lane]
                if by_inputs.size > 0:
                    for lane in range(rows):
                        values = row_of(buffer, bits, x, t, (first + lane) * sources, sources)[:sources]
                        count = compact(events, values)
                        for k in range(count):
                            value = values[events[k]]
                            add_to_weights(
                                by_inputs[number], flow, t, 0, neurons, lanes, incoming, events[k], lane, value
                            )  # fmt: skip
        if by_weights.size > 0:
            by_sign(by_weights[number], neurons, paths)
        if by_inputs.size > 0:
            by_sign(by_inputs[number], neurons, incoming)
        for k in range(tiles):
            begin = k * TILE
            n = min(TILE, cells - begin)
            for field in range(FIELDS):
                row = back[k][STATE + field * ROW : STATE + field * ROW + n]
                from_lanes(lam[field, start:stop], row, lanes, neurons, begin)
            if grad_constants is not None:
                for row_number in range(len(grad_constants)):
                    at = SUMS + row_number * ROW
                    from_lanes(grad_constants[row_number, start:stop], back[k][at : at + n], lanes, neurons, begin)

    return entry_point(backward_block)


@functools.cache
def history_kernel() -> Any:
    """The gradients by what was sent before the first step, and by its weights, for one group of batch rows."""
    digest = sources()

    def history_gradient(
        synapses: Paths, history: Any, adjoints: Any, grad_history: Any, by_weights: Any, by_inputs: Any, lanes: int,
        rows: int, group: int, number: int,
    ) -> None:  # fmt: skip
        _ = digest  # part of the key of the disk cache
        paths, history, adjoints = borrow_paths(synapses), borrow(history), borrow(adjoints)
        grad_history, by_weights = borrow(grad_history), borrow(by_weights)
        steps, _, sources = history.shape
        longest, _, _, neurons = adjoints.shape
        cells = neurons * lanes
        # steps are counted from the first row of the history on: arrivals before its end are of the past
        flow = np.zeros((steps + longest) * 2 * cells, history.dtype)
        for t in range(longest):
            for lane in range(rows):
                for sign in range(2):
                    for n in range(neurons):
                        at = (2 * (steps + t) + sign) * cells + n * lanes + lane
                        flow[at] = adjoints[t, group + lane, sign, n]
        by_spike = np.zeros(sources * lanes, history.dtype)
        events = np.empty(sources + 1, np.int64)
        if by_weights.size > 0:
            by_weights[number, :] = 0
        for r in range(steps):
            worth(by_spike, flow, r, steps, neurons, lanes, paths)
            for lane in range(rows):
                for n in range(sources):
                    grad_history[r, group + lane, n] = by_spike[n * lanes + lane]
                if by_weights.size > 0:
                    count = compact(events, history[r, group + lane])
                    for k in range(count):
                        value = history[r, group + lane, events[k]]
                        add_to_weights(
                            by_weights[number], flow, r, steps, neurons, lanes, paths, events[k], lane, value
                        )  # fmt: skip

        if by_weights.size > 0:
            by_sign(by_weights[number], neurons, paths)

    return entry_point(history_gradient)


def groups(batch: int, samples: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Lanes of a group, and of each group its first row, its number of rows, and its sample."""
    each = batch // samples
    lanes = LANES if each >= LANES // 4 else 1
    return lanes, [
        (row, min(lanes, (sample + 1) * each - row), sample)
        for sample in range(samples)
        for row in range(sample * each, (sample + 1) * each, lanes)
    ]
