"""The CPU kernels of populations with sparse synapses and delays.

Weights become integers, whose sums have no order: so threads may share a batch row, and each adds up what arrives at its own
neurons. A spike of step ``t`` adds to the sums of step ``t + d``, in a ring of as many steps as the longest delay has. The
steps of the shortest delay can be computed before any of their spikes arrives: threads meet once for all of them.

Layouts: ``ring [B, R, 2, N]``; for every source, ``splits [parts + 1, K]`` says where the synapses onto each thread's own
neurons begin and end.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from .meeting import meet
from .numba_bridge import borrow, compiled, entry_point, sources
from .recurrent import INPUT, RECURRENT, compact, step_row
from .rows import (
    LEFT,
    ROW,
    STATE,
    TILE,
    Strided,
    borrow_strided,
    expand,
    load_per_neuron,
    load_shared,
    load_state,
    pack,
    prefetch,
    row_of,
    row_of_field,
    store_state,
)

# Steps that are computed together at the most: their spikes are kept in lists.
MOST_TOGETHER = 32
TILE_SIZE = RECURRENT + 2 * ROW


class Wires(NamedTuple):
    """Sparse synapses: see :class:`coba_triton.ops.call.Projection`.

    Attributes:
        splits: int64 ``[parts + 1, K]``.
        targets: int32 ``[S]``.
        weights: ``[S]``, ``[K]`` or ``[1]``.
        weight_of: which weight a synapse has: 0 that of all, 1 that of its source, 2 its own.
        delays: float32, in ms, likewise; without elements: none.
        delay_of: likewise.
        per_ms: steps in a millisecond, float32.
        scales: of the compute dtype, what makes integers of excitatory and of inhibitory weights, and the inverses.
    """

    splits: Any
    targets: Any
    weights: Any
    weight_of: int
    delays: Any
    delay_of: int
    per_ms: Any
    scales: Any


@compiled
def borrow_wires(w: Wires) -> Wires:
    return Wires(
        borrow(w.splits), borrow(w.targets), borrow(w.weights), w.weight_of, borrow(w.delays), w.delay_of, w.per_ms,
        borrow(w.scales),
    )  # fmt: skip


@compiled
def steps_of(w: Wires, index: int) -> int:
    """A delay in steps."""
    return int(np.rint(w.delays[index] * w.per_ms))


@compiled
def send(sums: Any, now: int, longest: int, width: int, w: Wires, source: int, part: int) -> None:
    """Add what a spike of step ``now`` (modulo the ring) sends to the ``sums [longest 2 width]`` of one row."""
    first, last = w.splits[part, source], w.splits[part + 1, source]
    if w.weight_of == 2:
        slot = now
        if w.delay_of < 2:
            slot = now + steps_of(w, source * w.delay_of)
            slot = slot - longest if slot >= longest else slot
        for s in range(first, last):
            weight = w.weights[s]
            if w.delay_of == 2:
                slot = now + steps_of(w, s)
                slot = slot - longest if slot >= longest else slot
            sign = 1 if weight < 0 else 0
            sums[np.uintp((2 * slot + sign) * width + w.targets[s])] += int(np.rint(abs(weight) * w.scales[sign]))
    else:
        weight = w.weights[source * w.weight_of]
        sign = 1 if weight < 0 else 0
        units = int(np.rint(abs(weight) * w.scales[sign]))
        if w.delay_of == 2:
            for s in range(first, last):
                slot = now + steps_of(w, s)
                slot = slot - longest if slot >= longest else slot
                sums[np.uintp((2 * slot + sign) * width + w.targets[s])] += units
        else:
            slot = now + steps_of(w, source * w.delay_of)
            slot = slot - longest if slot >= longest else slot
            base = (2 * slot + sign) * width
            for s in range(first, last):
                sums[np.uintp(base + w.targets[s])] += units


@compiled
def send_value(
    sums: Any, width: int, w: Wires, source: int, part: int, value: Any, unit: Any, age: int
) -> None:  # fmt: skip
    """Add what any value sends, in units of the grid times ``unit``; it was sent ``age`` steps before the first sum's step.

    What arrived before that step is left out. Without delays everything arrives at once.
    """
    first, last = w.splits[part, source], w.splits[part + 1, source]
    for s in range(first, last):
        weight = w.weights[s if w.weight_of == 2 else source * w.weight_of]
        slot = 0
        if w.delays.size > 0:
            slot = steps_of(w, s if w.delay_of == 2 else source * w.delay_of) - age
        if slot >= 0:
            sign = 1 if weight < 0 else 0
            units = np.rint(np.float64(abs(weight)) * np.float64(value) * (np.float64(w.scales[sign]) / unit))
            sums[np.uintp((2 * slot + sign) * width + w.targets[s])] += int(units)


@compiled
def unit_of(values: Any) -> Any:
    """The least power of two that is not below any magnitude, at least 1; NaN if a value is not finite."""
    largest = 0.0
    finite = True
    for k in range(len(values)):
        largest = max(largest, abs(np.float64(values[k])))
        finite &= bool(np.isfinite(values[k]))
    unit = 1.0
    if largest > 1.0 and finite:
        while unit < largest:
            unit *= 2.0
    return unit if finite else np.nan


@compiled
def take(tile: Any, at: int, sums: Any, begin: int, n: int, inverse: Any) -> None:
    """Sums become a drive, rounded once, in the row from ``at`` on, and begin anew."""
    row, here = tile[at : at + n], sums[begin : begin + n]
    for j in range(n):
        row[j] = here[j]
        here[j] = 0
    for j in range(n):
        row[j] = row[j] * inverse


@compiled
def append(events: Any, count: int, fired: Any, first: int) -> int:
    """Append the neurons that fired, from ``first`` on, to a list; returns its length. ``fired``: a multiple of 8 bytes."""
    eights = fired.view(np.uint64)
    for k in range(len(eights)):
        if eights[k] != 0:
            for j in range(8 * k, 8 * k + 8):
                if fired[j]:
                    events[count] = first + j
                    count += 1
    return count


@functools.cache
def ring_kernel() -> Any:
    """What the values of the last steps have under way, for the batch rows from ``first`` to ``last``."""
    digest = sources()

    def ring(ring: Any, history: Any, wires: Wires, first: int, last: int) -> None:
        _ = digest  # part of the key of the disk cache
        ring, history, w = borrow(ring), borrow(history), borrow_wires(wires)
        longest, _, neurons = history.shape
        events = np.empty(neurons + 1, np.int64)
        for row in range(first, last):
            sums = ring[row].reshape(-1)
            sums[:] = 0
            for r in range(longest):
                count = compact(events, history[r, row])
                for k in range(count):
                    send_value(sums, neurons, w, events[k], 0, history[r, row, events[k]], 1.0, longest - r)

    return entry_point(ring)


@functools.cache
def block_kernel() -> Any:
    """A block of steps of the batch rows from ``first`` to ``last``, and of these the neurons of one part."""
    digest = sources()

    def block(
        x: Strided, inputs: Wires, input_drive: Any, wires: Wires, ring: Any, start: int, shared: Any, per_neuron: Any,
        state: Any, spikes: Strided, one: int, words: Any, states: Any, chosen: Any, jump_first: bool, holds: bool | None,
        steps: int, together: int, lists: Any, counts: Any, arrived: Any, first: int, last: int, part: int, parts: int,
    ) -> None:  # fmt: skip
        """``input_drive [2, T, B, N]``: without elements, ``inputs`` carry ``x [T, B I]``, if they have synapses.

        Threads share ``lists [2, parts, together, N / parts]`` of those that fired, with ``counts [2, parts, together]``.
        ``states [F T, M]``, or those of the ``chosen`` neurons.
        """
        _ = digest  # part of the key of the disk cache
        x, spikes = borrow_strided(x), borrow_strided(spikes)
        incoming, w = borrow_wires(inputs), borrow_wires(wires)
        input_drive, ring, state, words = borrow(input_drive), borrow(ring), borrow(state), borrow(words)
        states, chosen, lists, counts, arrived = (
            borrow(states),
            borrow(chosen),
            borrow(lists),
            borrow(counts),
            borrow(arrived),
        )
        _, longest, _, neurons = ring.shape
        sources = incoming.splits.shape[1]
        if parts == 1:  # a thread has rows of its own
            lists = np.empty((2, 1, together, neurons), np.int32)
            counts = np.empty((2, 1, together), np.int64)
        share = lists.shape[3]
        own_first, own_last = min(part * share, neurons), min((part + 1) * share, neurons)
        tiles = np.zeros(((own_last - own_first + TILE - 1) // TILE, TILE_SIZE), state.dtype)
        fired = np.zeros((len(tiles), TILE), np.uint8)
        buffer = np.empty(sources, state.dtype)
        bits = np.empty(sources, np.uint32)
        events = np.empty(sources + 1, np.int64)
        inbox = np.zeros(2 * neurons if incoming.targets.size > 0 else 0, np.int64)
        c = None if shared is None else load_shared(shared)
        meetings = 0
        for row in range(first, last):
            cells = row * neurons
            sums = ring[row].reshape(-1)
            chosen_first = np.searchsorted(chosen, cells + own_first)
            chosen_last = np.searchsorted(chosen, cells + own_last)
            for k in range(len(tiles)):
                begin = own_first + k * TILE
                n = min(TILE, own_last - begin)
                load_per_neuron(tiles[k], per_neuron, cells + begin, n)
                load_state(tiles[k], STATE, LEFT, state, 0, 1, cells + begin, n, len(state))
            slot = start % longest
            for begin_t in range(0, steps, together):
                end_t = min(begin_t + together, steps)
                side = meetings % 2
                for t in range(begin_t, end_t):
                    unit = 0.0
                    if inbox.size > 0:
                        values = row_of(buffer, bits, x, t, row * sources, sources)[:sources]
                        count = compact(events, values)
                        if count > 0:
                            unit = unit_of(values)
                            for k in range(count):
                                if unit == unit:
                                    send_value(inbox, neurons, incoming, events[k], part, values[events[k]], unit, 0)
                    at = slot + t - begin_t
                    at = 2 * neurons * (at - longest if at >= longest else at)
                    found = 0
                    for k in range(len(tiles)):
                        tile = tiles[k]
                        begin = own_first + k * TILE
                        n = min(TILE, own_last - begin)
                        cell = cells + begin
                        if input_drive.size > 0:
                            tile[INPUT : INPUT + n] = input_drive[0, t, row, begin : begin + n]
                            tile[INPUT + ROW : INPUT + ROW + n] = input_drive[1, t, row, begin : begin + n]
                        elif unit == 0:
                            tile[INPUT : INPUT + n] = 0
                            tile[INPUT + ROW : INPUT + ROW + n] = 0
                        else:
                            take(tile, INPUT, inbox, begin, n, incoming.scales[2] * unit)
                            take(tile, INPUT + ROW, inbox, neurons + begin, n, incoming.scales[3] * unit)
                        take(tile, RECURRENT, sums, at + begin, n, w.scales[2])
                        take(tile, RECURRENT + ROW, sums, at + neurons + begin, n, w.scales[3])
                        prefetch(spikes, t + 1, cell, n)
                        step_row(tile, fired[k], n, jump_first, False, c, holds, None)
                        found = append(lists[side, part, t - begin_t], found, fired[k, : (n + 7) // 8 * 8], begin)
                        if spikes.data.size > 0:
                            to = t * spikes.stride_t + cell
                            if spikes.itemsize == 1:
                                spikes.data[to : to + n] = fired[k, :n]
                            else:
                                expand(spikes.data, spikes.itemsize, one, to, fired[k], n)
                        if words.size > 0:
                            pack(words[t // 32, cell : cell + n], fired[k], t % 32, n)
                        if states.size > 0 and chosen.size == 0:
                            store_state(tile, states, t, steps, cell, n, len(state))
                    counts[side, part, t - begin_t] = found
                    for k in range(chosen_first, chosen_last):
                        n = chosen[k] - cells - own_first
                        for field in range(len(state)):
                            states[field * steps + t, k] = tiles[n // TILE, row_of_field(STATE, LEFT, field) + n % TILE]
                meetings += 1
                meet(arrived, parts, meetings)
                for t in range(end_t - begin_t):
                    now = slot + t
                    now = now - longest if now >= longest else now
                    for other in range(parts):
                        for k in range(counts[side, other, t]):
                            send(sums, now, longest, neurons, w, lists[side, other, t, k], part)
                slot = (slot + end_t - begin_t) % longest
            for k in range(len(tiles)):
                begin = own_first + k * TILE
                store_state(tiles[k], state, 0, 1, cells + begin, min(TILE, own_last - begin), len(state))

    return entry_point(block)


@functools.cache
def splits_kernel() -> Any:
    """Where the synapses of every source onto neurons from ``bounds[p]`` on begin: ``splits [parts + 1, K]``."""
    digest = sources()

    def split(indptr: Any, targets: Any, bounds: Any, splits: Any) -> None:
        _ = digest  # part of the key of the disk cache
        for source in range(len(indptr) - 1):
            first, last = indptr[source], indptr[source + 1]
            for p in range(len(bounds)):
                splits[p, source] = first + np.searchsorted(targets[first:last], bounds[p])

    return entry_point(split)
