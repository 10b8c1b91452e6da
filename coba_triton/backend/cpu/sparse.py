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

from .events import append, compact, count_nonzero
from .meeting import APART, await_word, listed, memory_apart, publish, wants_alone
from .numba_bridge import borrow, compiled, entry_point, flattened, inlined, numbers_in, prefetch_line
from .recurrent import INPUT, Arriving, add_events, add_values, are_spikes, step_row
from .rows import (
    LEFT,
    LINE,
    ROW,
    STATE,
    TILE,
    Strided,
    borrow_strided,
    copy_part,
    expand,
    first_from,
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
# A neuron and the step in which it fired are one number: more neurons than there can be.
STEP = 2**32
# Bytes of a source's targets that are asked for while those of the one before are read.
MOST_AHEAD = 1024
# Lines of a source's links that are asked for ahead: the processor itself asks for those that follow.
LINES_AHEAD = 14
# Links of a source are added in groups of so many. Links that add 0 fill up its last group, so that nothing has to ask how
# many there are in it: a processor would often guess that wrong.
ABREAST = 4
# In so many meetings a thread may wait long for another one.
MEETINGS_A_WAIT = 512
TILE_SIZE = INPUT + 2 * ROW


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


class Scratch(NamedTuple):
    """What a thread works with. It is made outside of compiled code, which counts no references to it then.

    Attributes:
        tiles: ``[tiles, rows of a tile]``.
        fired: bytes ``[tiles, TILE]``.
        inbox: int64 ``[2 N]``, sums of sparse inputs; without elements: there are none.
        values, bits, events: of the length of an input, and one more for the last.
        lists: what each thread's neurons sent in some steps, int64 ``[2, parts, 1 + together N / parts]`` and some more:
            ``step * STEP + neuron``, after a word of :mod:`.meeting`. Threads of a row share it.
    """

    tiles: Any
    fired: Any
    inbox: Any
    values: Any
    bits: Any
    events: Any
    lists: Any


def scratch(w: Wires, sources: int, dtype: Any, neurons: int, parts: int, together: int, lists: Any) -> Scratch:
    """For a thread with ``neurons`` of a row that ``parts`` threads share, with the ``lists`` that they share, or None.

    ``w`` are the synapses of the inputs, of which there are as many as ``sources``.
    """
    tiles = -(-neurons // TILE)
    return Scratch(
        memory_apart((tiles, TILE_SIZE), dtype),
        memory_apart((tiles, TILE), np.uint8),
        memory_apart((2 * neurons * parts if sources > 0 else 0,), np.int64),
        memory_apart((sources,), dtype),
        memory_apart((sources,), np.uint32),
        memory_apart((sources + 1,), np.int64),
        shared_lists(neurons, parts, together) if lists is None else lists,
    )


def shared_lists(neurons: int, parts: int, together: int) -> Any:
    """Lists of a :class:`Scratch`."""
    length = -(-(1 + together * neurons) // APART) * APART  # so that no two threads write to one line
    return memory_apart((2, parts, length), np.int64)


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


class Paths(NamedTuple):
    """Synapses as those read them who go over them many times.

    Attributes:
        starts: the synapses of source ``k`` are ``starts[k]`` to ``starts[k + 1]``, int64 ``[K + 1]``.
        places: ``(2 d + sign) N + target`` of each synapse, uint32 ``[S]``: which number of ``[T, 2, N]``, counted from the
            step of the source on, is the drive that it adds to.
        weights: ``[S]``.
    """

    starts: Any
    places: Any
    weights: Any


@compiled
def borrow_paths(paths: Paths) -> Paths:
    return Paths(borrow(paths.starts), borrow(paths.places), borrow(paths.weights))


@functools.cache
def paths_kernel() -> Any:
    """Fill the ``places`` and, if there are any, the ``weights`` of :class:`Paths` onto ``neurons``."""

    def paths(wires: Wires, neurons: int, places: Any, weights: Any) -> None:
        w = borrow_wires(wires)
        for source in range(w.splits.shape[1]):
            for s in range(w.splits[0, source], w.splits[1, source]):
                weight = weight_at(w, source, s)
                places[s] = (2 * delay_at(w, source, s) + sign_of(weight)) * neurons + w.targets[s]
                if weights.size > 0:
                    weights[s] = weight

    return entry_point(paths)


class Links(NamedTuple):
    """Synapses as those read them who send spikes along them many times; without elements: they are read as they are.

    A link is one number of 64 bits. Its lowest ``bits`` are the place that it leads to, as in :class:`Paths`. The bits above
    say what it adds there, in units of the grid.

    There are two kinds of links. Those of the first kind have the units as they are: they end with so many zeros that the
    place fits there. Those of the second kind have the units moved up by ``bits``. Units that fit neither kind are divided
    into two links, one of each kind.

    Attributes:
        starts: int64 ``[K parts + 1]``; the links of source ``k`` onto the neurons of part ``p`` begin at ``k parts + p``.
        middles: int64 ``[K parts]``, where those of the second kind begin.
        numbers: uint64. There are so many of each kind that ``ABREAST`` divides them: the last ones may add 0.
        bits: of a place.
        alike: whether all synapses of a source have the same delay.
    """

    starts: Any
    middles: Any
    numbers: Any
    bits: int
    alike: bool


@compiled
def borrow_links(links: Links) -> Links:
    return Links(borrow(links.starts), borrow(links.middles), borrow(links.numbers), links.bits, links.alike)


@functools.cache
def links_kernel() -> Any:
    """Fill :class:`Links`, of ``bits`` a place, onto ``neurons``; all of them are of the second kind where it is ``moved``.

    Returns how many there are, and whether the synapses of each source have the same delay.
    """

    def link(
        wires: Wires, neurons: int, bits: int, moved: bool, starts: Any, middles: Any, numbers: Any
    ) -> tuple[int, bool]:  # fmt: skip
        w = borrow_wires(wires)
        parts, count, alike = len(w.splits) - 1, 0, True
        fits, of_place = 1 << min(64 - bits, 62), (1 << bits) - 1
        for source in range(w.splits.shape[1]):
            for part in range(parts):
                first, last = w.splits[part, source], w.splits[part + 1, source]
                starts[source * parts + part] = count
                of_first, left = delay_at(w, source, first) if first < last else 0, 0
                for kind in range(2):
                    begin = count
                    if kind == 1:
                        middles[source * parts + part] = begin
                    for s in range(first, last if kind == 0 or left > 0 else first):
                        weight, steps = weight_at(w, source, s), delay_at(w, source, s)
                        alike &= steps == of_first
                        units = units_of(weight, w.scales[sign_of(weight)])
                        low = units & of_place
                        low = units if moved or (low > 0 and units < fits) else low
                        left |= low
                        added = low << bits if kind == 1 else units - low
                        numbers[count] = added | ((2 * steps + sign_of(weight)) * neurons + w.targets[s])
                        count += added != 0
                    for k in range((begin - count) % ABREAST):
                        numbers[count] = numbers[begin + k] & np.uint64(of_place)
                        count += 1
        starts[len(starts) - 1] = count
        return count, alike

    return entry_point(link)


@compiled
def weight_at(w: Wires, source: int, s: int) -> Any:
    """The weight of the synapse ``s`` of a source."""
    return w.weights[s if w.weight_of == 2 else source * w.weight_of]


@compiled
def delay_at(w: Wires, source: int, s: int) -> int:
    """Its delay in steps, 0 without delays."""
    return 0 if w.delays.size == 0 else steps_of(w, s if w.delay_of == 2 else source * w.delay_of)


@compiled
def sign_of(weight: Any) -> int:
    """0 where a weight is excitatory, 1 where it is inhibitory."""
    return 1 if weight < 0 else 0


@compiled
def units_of(weight: Any, scale: Any) -> int:
    """The magnitude of a weight in units of its grid."""
    return int(np.rint(abs(weight) * scale))


@inlined
def bits_of_place(links: Links) -> Any:
    """The bits of a link that are its place, all 1."""
    return (np.uint64(1) << np.uint64(links.bits)) - np.uint64(1)


@inlined
def add_links(
    sums: Any, base: Any, links: Links, first: int, last: int, moved: bool, each: bool, under_way: bool
) -> None:  # fmt: skip
    """Add the links from ``first`` to ``last`` to the ``sums``; ``moved``: they are of the second kind.

    With ``each``, every link is asked whether it leads past the end of the sums, see :func:`send_along`; without, no link
    does, and ``base`` has been chosen accordingly.
    """
    around, bits, of_place = np.uintp(len(sums)), np.uint64(links.bits), bits_of_place(links)
    at = np.uintp(first)
    while at != np.uintp(last):  # LLVM would unroll a loop over a range, and then has to ask how many turns are left
        for k in range(ABREAST):
            link = links.numbers[at + np.uintp(k)]
            place = base + np.uintp(link & of_place)
            units = np.int64(link >> bits) if moved else np.int64(link & ~of_place)
            if not each:
                sums[place] += units
            elif place >= around:
                sums[place - around] += units
            elif not under_way:
                sums[place] += units
        at += np.uintp(ABREAST)


@inlined
def send_along(sums: Any, base: Any, links: Links, index: Any, under_way: bool) -> None:
    """Add the links of a source to the ``sums``; those of the step of the spike begin at ``base``.

    A link that leads past the end of the sums goes on at their beginning. Of a spike that was sent before the first step and
    is ``under_way``, only such links are added: along the others it has arrived.
    """
    around = np.uintp(len(sums))
    first, middle, last = links.starts[index], links.middles[index], links.starts[index + np.uintp(1)]
    if not links.alike:
        for moved in range(2):
            begin, end = (middle, last) if moved else (first, middle)
            add_links(sums, base, links, begin, end, moved != 0, True, under_way)
    elif first < last:  # all of them arrive in one step
        past_the_end = base + np.uintp(links.numbers[np.uintp(first)] & bits_of_place(links)) >= around
        if past_the_end:
            base -= around
        if past_the_end or not under_way:
            add_links(sums, base, links, first, middle, False, False, under_way)
            add_links(sums, base, links, middle, last, True, False, under_way)


@inlined
def ask_for_links(links: Links, index: Any) -> None:
    """Ask for the links of a source ahead of their use."""
    data, first = numbers_in(links.numbers, np.uint8), links.starts[index] * links.numbers.itemsize
    for line in range(LINES_AHEAD):
        prefetch_line(data, first + line * LINE)


@compiled
def send_all(sums: Any, slot: int, neurons: int, links: Links, part: int, parts: int, sent: Any) -> None:
    """:func:`send` of the spikes of a list, ``step * STEP + source``, along links; ``slot``: of step 0."""
    a_step, around = np.uintp(2 * neurons), np.uintp(len(sums))
    for k in range(len(sent)):
        following = np.uintp(sent[min(k + 1, len(sent) - 1)] & (STEP - 1))
        ask_for_links(links, following * np.uintp(parts) + np.uintp(part))
        source = np.uintp(sent[k] & (STEP - 1))
        base = np.uintp(slot + (sent[k] >> 32)) * a_step
        base = base - around if base >= around else base
        send_along(sums, base, links, source * np.uintp(parts) + np.uintp(part), False)


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
            sign = sign_of(weight)
            sums[np.uintp((2 * slot + sign) * width + w.targets[s])] += units_of(weight, w.scales[sign])
    else:
        weight = w.weights[source * w.weight_of]
        sign = sign_of(weight)
        units = units_of(weight, w.scales[sign])
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
            sign = sign_of(weight)
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
def arriving_at(sums: Any, at: int, neurons: int, n: int, scales: Any) -> Arriving:
    """What arrives at ``n`` neurons in a step, whose excitatory sums begin at ``at``."""
    return Arriving(sums[at : at + n], sums[at + neurons : at + neurons + n], scales[2], scales[3])


@compiled
def any_input(x: Strided, begin: int, count: int, first: int, sources: int, buffer: Any, bits: Any) -> bool:
    """Whether any of the ``sources`` from ``first`` on sends something in ``count`` steps."""
    for t in range(begin, begin + count):
        values = row_of(buffer, bits, x, t, first, sources)[:sources]
        if count_nonzero(values) > 0:
            return True
    return False


@compiled
def receive(inbox: Any, neurons: int, w: Wires, part: int, values: Any, events: Any) -> Any:
    """Add up what a row of inputs sends; returns the unit of the sums: 0 without events, NaN if a value is not finite."""
    count = compact(events, values)
    unit = unit_of(values) if count > 0 else 0.0
    if unit > 0.0:
        for k in range(count):
            send_value(inbox, neurons, w, events[k], part, values[events[k]], unit, 0)
    return unit


@compiled
def ask_for_targets(w: Wires, source: int, part: int) -> None:
    """Ask for the targets of a source ahead of their use."""
    data = numbers_in(w.targets, np.uint8)
    first, last = 4 * w.splits[part, source], 4 * w.splits[part + 1, source]
    for index in range(first, min(last, first + MOST_AHEAD), LINE):
        prefetch_line(data, index)


@functools.cache
def ring_kernel() -> Any:
    """What the values of the last steps have under way, for the batch rows from ``first`` to ``last``."""

    def ring(ring: Any, history: Any, wires: Wires, prepared: Links, first: int, last: int) -> None:
        ring, history, w, links = borrow(ring), borrow(history), borrow_wires(wires), borrow_links(prepared)
        longest, neurons = ring.shape[1], ring.shape[3]
        events = np.empty(history.shape[2] + 1, np.int64)
        for row in range(first, last):
            sums = flattened(ring[row])
            sums[:] = 0
            for r in range(longest):
                count, base = compact(events, history[r, row]), np.uintp(2 * r * neurons)
                for k in range(count):
                    value = history[r, row, events[k]]
                    if value == 1 and links.numbers.size > 0:
                        send_along(sums, base, links, np.uintp(events[k]), True)
                    else:
                        send_value(sums, neurons, w, events[k], 0, value, 1.0, longest - r)

    return entry_point(ring)


@functools.cache
def send_kernel() -> Any:
    """Add to the ring what spikes send to the neurons of one part; ``slot``: of their first step."""

    def send_spikes(ring: Any, slot: int, events: Any, wires: Wires, part: int) -> None:
        """``events``: each spike as ``(step * B + row) * K + source``."""
        ring, events, w = borrow(ring), borrow(events), borrow_wires(wires)
        batch, longest, _, neurons = ring.shape
        sources = w.splits.shape[1]
        for k in range(len(events)):
            if k + 1 < len(events):
                ask_for_targets(w, events[k + 1] % sources, part)
            cell = events[k] // sources
            now = (slot + cell // batch) % longest
            send(flattened(ring[cell % batch]), now, longest, neurons, w, events[k] % sources, part)

    return entry_point(send_spikes)


@functools.cache
def block_kernel() -> Any:
    """A block of steps of the batch rows from ``first`` to ``last``, and of these the neurons of one part."""

    def block(
        x: Strided, inputs: Wires, input_rows: Any, input_drive: Any, wires: Wires, prepared: Links, ring: Any, start: int,
        shared: Any, per_neuron: Any, state: Any, spikes: Strided, one: int, words: Any, states: Any, chosen: Any,
        jump_first: bool, holds: bool | None, since: int, steps: int, together: int, share: int, long_most: int, done: Any,
        first: int, last: int, part: int, parts: int, own: Scratch,
    ) -> None:  # fmt: skip
        """Steps from ``since`` on; ``done [1]`` takes how many are done then.

        These are less than ``steps`` if the threads of a row had to wait long for each other, more than ``long_most`` times
        and once in every 512 meetings: something else keeps their cores. What is left of the row is for one thread.

        ``input_drive [2, T, B, N]``: without elements, ``inputs`` carry ``x [T, B I]``, if they have synapses, or the dense
        ``input_rows [I, N]``, if these have elements.
        ``states [F T, M]``, or those of the ``chosen`` neurons.
        """
        x, spikes = borrow_strided(x), borrow_strided(spikes)
        incoming, w, links = borrow_wires(inputs), borrow_wires(wires), borrow_links(prepared)
        input_rows, input_drive, ring = borrow(input_rows), borrow(input_drive), borrow(ring)
        state, words = borrow(state), borrow(words)
        states, chosen, done = borrow(states), borrow(chosen), borrow(done)
        tiles, fired, inbox = borrow(own.tiles), borrow(own.fired), borrow(own.inbox)
        buffer, bits, events = borrow(own.values), borrow(own.bits), borrow(own.events)
        lists = borrow(own.lists)
        _, longest, _, neurons = ring.shape
        dense = input_rows.size > 0
        sources = len(input_rows) if dense else incoming.splits.shape[1]
        values, input_count, input_spikes = buffer[:sources], 0, True
        own_first, own_last = min(part * share, neurons), min((part + 1) * share, neurons)
        c = None if shared is None else load_shared(shared)
        number = long_waits = 0
        for row in range(first, last):
            cells = row * neurons
            sums = flattened(ring[row])
            for k in range(len(tiles)):
                begin = own_first + k * TILE
                n = min(TILE, own_last - begin)
                load_per_neuron(tiles[k], per_neuron, cells + begin, n)
                load_state(tiles[k], STATE, LEFT, state, 0, 1, cells + begin, n, len(state))
            slot, begin_t, alone = (start + since) % longest, since, False
            while begin_t < steps and not alone:
                count = min(together, steps - begin_t)
                number += 1
                # who publishes this list has seen that all others had read the last but one
                entries = lists[number % 2, part]
                found = 0
                # a tile goes through all steps at once, unless the input of each step has to be added up before
                by_tiles = not dense and not (
                    inbox.size > 0 and any_input(x, begin_t, count, row * sources, sources, buffer, bits)
                )
                unit = 0.0
                for i in range(count * len(tiles)):
                    k, t = (i // count, i % count) if by_tiles else (i % len(tiles), i // len(tiles))
                    now = begin_t + t
                    if k == 0 and not by_tiles:
                        values = row_of(buffer, bits, x, now, row * sources, sources)[:sources]
                        if dense:
                            input_count = compact(events, values)
                            input_spikes = are_spikes(values, events, input_count)
                        else:
                            unit = receive(inbox, neurons, incoming, part, values, events)
                    tile = tiles[k]
                    begin = own_first + k * TILE
                    n = min(TILE, own_last - begin)
                    cell = cells + begin
                    if input_drive.size > 0:
                        copy_part(tile, INPUT, input_drive[0, now, row], begin, n)
                        copy_part(tile, INPUT + ROW, input_drive[1, now, row], begin, n)
                    elif dense and input_spikes:
                        add_events(tile, INPUT, input_rows, events, input_count, begin, n)
                    elif dense:
                        add_values(tile, INPUT, input_rows, values, events, input_count, begin, n)
                    elif unit != 0:
                        take(tile, INPUT, inbox, begin, n, incoming.scales[2] * unit)
                        take(tile, INPUT + ROW, inbox, neurons + begin, n, incoming.scales[3] * unit)
                    prefetch(spikes, now + 1, cell, n)
                    at = slot + t
                    at = 2 * neurons * (at - longest if at >= longest else at) + begin
                    arriving = arriving_at(sums, at, neurons, n, w.scales)
                    if unit == 0 and input_drive.size == 0 and not dense:
                        step_row(tile, fired[k], n, jump_first, False, c, holds, None, arriving, None)
                    else:
                        step_row(tile, fired[k], n, jump_first, False, c, holds, None, arriving, True)
                    found = append(entries[1:], found, fired[k, :n], t * STEP + begin)
                    if spikes.data.size > 0:
                        to = now * spikes.stride_t + cell
                        if spikes.itemsize == 1:
                            copy_part(spikes.data, to, fired[k], 0, n)
                        else:
                            expand(spikes.data, spikes.itemsize, one, to, fired[k], n)
                    if words.size > 0:
                        pack(words[now // 32, cell : cell + n], fired[k], now % 32, n)
                    if states.size > 0 and chosen.size == 0:
                        store_state(tile, states, now, steps, cell, n, len(state))
                    elif states.size > 0:
                        last = first_from(chosen, cell + n)
                        for k_chosen in range(first_from(chosen, cell), last):
                            for field in range(len(state)):
                                value = tile[row_of_field(STATE, LEFT, field) + chosen[k_chosen] - cell]
                                states[field * steps + now, k_chosen] = value
                impatient = parts > 1 and long_waits > long_most + number // MEETINGS_A_WAIT
                publish(entries, found, number, impatient)
                for turn in range(parts):  # its own first: meanwhile the others go on
                    theirs = lists[number % 2, (part + turn) % parts]
                    word, long_wait = await_word(theirs, number)
                    long_waits += long_wait
                    alone |= wants_alone(word)  # all threads see the same words
                    sent = listed(theirs, word)
                    if links.numbers.size > 0:
                        send_all(sums, slot, neurons, links, part, parts, sent)
                        continue
                    for k in range(len(sent)):
                        source = sent[k] & (STEP - 1)
                        at = slot + (sent[k] >> 32)
                        at = at - longest if at >= longest else at
                        ask_for_targets(w, (sent[k + 1] if k + 1 < len(sent) else sent[k]) & (STEP - 1), part)
                        send(sums, at, longest, neurons, w, source, part)
                slot, begin_t = (slot + count) % longest, begin_t + count
            if part == 0:
                done[0] = begin_t
            for k in range(len(tiles)):
                begin = own_first + k * TILE
                store_state(tiles[k], state, 0, 1, cells + begin, min(TILE, own_last - begin), len(state))

    return entry_point(block)


@functools.cache
def splits_kernel() -> Any:
    """Where the synapses of every source onto neurons from ``bounds[p]`` on begin: ``splits [parts + 1, K]``."""

    def split(indptr: Any, targets: Any, bounds: Any, splits: Any) -> None:
        for source in range(len(indptr) - 1):
            first, last = indptr[source], indptr[source + 1]
            for p in range(len(bounds)):
                splits[p, source] = first + first_from(targets[first:last], bounds[p])

    return entry_point(split)
