"""Recurrent populations with sparse synapses and delays: exact sums of integers, which have no order.

Arrays are time-major and contiguous; ``B`` batch rows, ``N`` neurons, ``K`` sources and ``S`` synapses of a projection,
``R`` steps of the longest delay:

=============  ======================  ============================================================================
indptr         ``[K + 1]``             the synapses of source ``k`` are ``indptr[k]`` to ``indptr[k + 1]``
targets        ``[S]``                 ascending within a source
weights        [S], [K, 1] or [1]      one for each synapse, for each source, or for all: ``WEIGHT`` says which
delays         likewise, or None       in ms; ``DELAY`` says which. None: a spike arrives in its own step
scales         ``[4]``                 what makes integers of excitatory and of inhibitory weights; then both inverses
ring           ``[2, R, B, N]``        integer sums under way, excitatory and inhibitory, by their step of arrival
drive          ``[2, T, B, N]``        excitatory and inhibitory input of every step
state          ``[F, B, N]``           fields of the state
lists          ``[B, window N]``       scratch: step in the window times N plus neuron, of those that spiked
words          ``[ceil(T/32), B, N]``  spikes packed along time
adjoints       ``[T + R, B, 2, N]``    gradient by the excitatory and by the inhibitory drive
=============  ======================  ============================================================================

A spike needs at least ``window`` steps to arrive. So the neurons of a row go on for so many steps on their own, and so do
those of the backward; in between, several programs that share a row wait for each other.

With as many threads as ``BLOCK`` neurons, all loads and stores of a cell are of one thread.
"""

import triton
import triton.language as tl

from ..neuron.records import Drive, State
from .feed_forward import load_word
from .neuron import (
    NUM_FIELDS,
    NUM_SUMS,
    add_sums,
    load_constants,
    load_fields,
    state_of,
    store_fields,
    sums_of,
    sweep,
)
from .recurrent import compact, load_planes, meet, step_cells

# One number of a synapse for all, for each source, or for each synapse.
SHARED: tl.constexpr = tl.constexpr(0)
BY_SOURCE: tl.constexpr = tl.constexpr(1)


@triton.jit
def load_number(pointer, source, synapse, mask, MODE: tl.constexpr):
    """The weight or the delay of synapses."""
    if MODE == SHARED:
        return tl.broadcast_to(tl.load(pointer), synapse.shape)
    elif MODE == BY_SOURCE:
        return tl.broadcast_to(tl.load(pointer + source), synapse.shape)
    else:
        return tl.load(pointer + synapse, mask=mask, other=0.0)


@triton.jit
def load_steps(delays_ptr, source, synapse, mask, per_ms, MODE: tl.constexpr):
    """The delay of synapses in steps: a float32, rounded to the nearest integer, to the even one of two."""
    steps = load_number(delays_ptr, source, synapse, mask, MODE) * per_ms
    return ((steps + 8388608.0) - 8388608.0).to(tl.int32)


@triton.jit
def nearest(x):
    """The nearest integer, of two the even one, of a number that is not negative; still a float.

    From 2**23 on, or 2**52 in float64, a float is an integer. Where a smaller one is added, the sum is rounded to one.
    """
    if x.dtype == tl.float64:
        return tl.where(x < 4503599627370496.0, (x + 4503599627370496.0) - 4503599627370496.0, x)
    else:
        return tl.where(x < 8388608.0, (x + 8388608.0) - 8388608.0, x)


@triton.jit
def deliver(
    list_ptr, count, part, parts, values_ptr, source_stride,
    sums_ptr, limit, M, first, N, indptr_ptr, targets_ptr, weights_ptr, delays_ptr, scale_e, scale_i, per_ms,
    SOURCES: tl.constexpr, LANES: tl.constexpr, WEIGHT: tl.constexpr, DELAY: tl.constexpr, RING: tl.constexpr,
    CACHE: tl.constexpr = tl.constexpr(""), AROUND: tl.constexpr = tl.constexpr(False),
):  # fmt: skip
    """Add the synapses of listed sources to the sums ``[2, limit, M]`` at the steps of their arrival.

    ``parts`` programs share the list, each takes ``SOURCES`` entries at a time, ``LANES`` synapses of each at a time. They
    are sources, whose spikes of step ``first`` arrive after the delay, or nowhere if that is not one of ``limit`` steps;
    ``AROUND``: it is one then, after the last comes the first. Or the sums are a ``RING``: then ``first`` is a slot of it,
    and an entry is the number of steps from there, times N, plus a source. ``values_ptr`` has the sources' values, or is
    None where all of them are 1.
    """
    for start in range(part * SOURCES, count, parts * SOURCES):
        index = start + tl.arange(0, SOURCES)
        listed = index < count
        entry = tl.load(list_ptr + index, mask=listed, other=0, cache_modifier=CACHE)
        if RING:  # integers of 32 bits: to divide those of 64 takes a call
            source = (entry % N).to(tl.int64)
            sent = first + entry // N
            sent = tl.where(sent >= limit, sent - limit, sent)
        else:
            source = entry.to(tl.int64)
            sent = tl.zeros_like(source) + first
        begin = tl.load(indptr_ptr + source, mask=listed, other=0)
        end = tl.load(indptr_ptr + source + 1, mask=listed, other=0)
        longest = tl.max(end - begin, 0).to(tl.int32)
        if values_ptr is not None:
            value = tl.load(values_ptr + source * source_stride, mask=listed, other=0).to(weights_ptr.dtype.element_ty)
            value = value.to(tl.float64)[:, None]
        sent = sent[:, None]
        source = source[:, None]
        for offset in range(0, longest, LANES):
            synapse = begin[:, None] + (offset + tl.arange(0, LANES))[None, :]
            mask = synapse < end[:, None]
            target = tl.load(targets_ptr + synapse, mask=mask, other=0)
            weight = load_number(weights_ptr, source, synapse, mask, WEIGHT)
            size = tl.abs(weight)
            scale = tl.where(weight < 0.0, scale_i, scale_e)
            if values_ptr is not None:
                size = size.to(tl.float64) * tl.abs(value)
            amount = nearest(size * scale).to(sums_ptr.dtype.element_ty)
            if values_ptr is not None:
                amount = tl.where(value < 0.0, -amount, amount)
            slot = sent
            if delays_ptr is not None:
                slot = sent + load_steps(delays_ptr, source, synapse, mask, per_ms, DELAY)
            if RING or AROUND:
                slot = tl.where(slot >= limit, slot - limit, slot)
            else:
                mask = mask & (slot >= 0) & (slot < limit)
            place = (tl.where(weight < 0.0, limit, 0) + slot) * M + target
            tl.atomic_add(sums_ptr + place, amount, mask=mask, sem="relaxed", scope="gpu")


@triton.jit(do_not_specialize=["K", "B", "N", "limit", "begin", "row_stride", "source_stride", "per_ms"])
def scatter_kernel(
    values_ptr, lists_ptr, counts_ptr, sums_ptr, indptr_ptr, targets_ptr, weights_ptr, delays_ptr, scales_ptr,
    K, B, N, limit, begin, row_stride, source_stride, per_ms,
    SOURCES: tl.constexpr, LANES: tl.constexpr, WEIGHT: tl.constexpr, DELAY: tl.constexpr, AROUND: tl.constexpr,
):  # fmt: skip
    """Add what the sources ``[T B, K]`` of T steps from ``begin`` on send to the sums ``[2, limit, B, N]``.

    ``AROUND``: these are a ring, and ``begin`` is a slot of it. A program owns a row of sources, of which ``lists`` and
    ``counts`` say where they are not 0.
    """
    step = tl.program_id(0) // B
    b = (tl.program_id(0) % B).to(tl.int64)
    row = tl.program_id(0).to(tl.int64)
    N = tl.cast(N, tl.int64)
    first = begin + step
    if AROUND:
        first = first % limit
    deliver(
        lists_ptr + row * K, tl.load(counts_ptr + row), 0, 1, values_ptr + row * row_stride, source_stride,
        sums_ptr + b * N, tl.cast(limit, tl.int64), B * N, first, 0, indptr_ptr, targets_ptr, weights_ptr, delays_ptr,
        tl.load(scales_ptr), tl.load(scales_ptr + 1), per_ms, SOURCES, LANES, WEIGHT, DELAY, False, AROUND=AROUND,
    )  # fmt: skip


@triton.jit(do_not_specialize=["K", "N", "R", "row_stride", "source_stride"])
def sparse_projection_kernel(
    values_ptr, lists_ptr, counts_ptr, sums_ptr, units_ptr, indptr_ptr, targets_ptr, weights_ptr, scales_ptr,
    K, N, R, row_stride, source_stride,
    BLOCK: tl.constexpr, SOURCES: tl.constexpr, LANES: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """The sums ``[2, R, N]`` of R rows of sources, a program each, which are zeros before, and the ``units [R]``.

    Where values are greater than 1, the grid of the row is coarser by its unit, the least power of two that is not below any
    of them. If one is not finite, the unit is NaN, and nothing is summed up.
    """
    row = tl.program_id(0).to(tl.int64)
    N = tl.cast(N, tl.int64)
    R = tl.cast(R, tl.int64)
    values_ptr += row * row_stride
    lists_ptr += row * K
    count = tl.load(counts_ptr + row)
    dtype: tl.constexpr = weights_ptr.dtype.element_ty
    largest = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        source = tl.load(lists_ptr + index, mask=index < count, other=0).to(tl.int64)
        value = tl.abs(tl.load(values_ptr + source * source_stride, mask=index < count, other=0).to(dtype).to(tl.float64))
        largest = tl.maximum(largest, tl.where(value < float("inf"), value, float("inf")))  # a NaN counts as infinite
    # a float64's exponent is in bits 52 to 62, greater by 1023; it is rounded up
    exponent = tl.maximum((tl.max(largest, 0).to(tl.int64, bitcast=True) + 4503599627370495) >> 52, 1023)
    infinite = exponent > 2046
    exponent = tl.minimum(exponent, 2046)
    unit = (exponent << 52).to(tl.float64, bitcast=True)
    finer = (tl.maximum(2046 - exponent, 1) << 52).to(tl.float64, bitcast=True)
    deliver(
        lists_ptr, tl.where(infinite, 0, count), 0, 1, values_ptr, source_stride, sums_ptr, R, N, row, 0, indptr_ptr,
        targets_ptr, weights_ptr, None, tl.load(scales_ptr) * finer, tl.load(scales_ptr + 1) * finer, 1.0,
        SOURCES, LANES, WEIGHT, 0, False,
    )  # fmt: skip
    tl.store(units_ptr + row, tl.where(infinite, float("nan"), unit))


@triton.jit(do_not_specialize=["N", "R"])
def sums_to_drive_kernel(sums_ptr, units_ptr, counts_ptr, scales_ptr, drive_ptr, N, R, BLOCK: tl.constexpr):
    """The drive ``[2, R, N]``: the sums times the units of their rows. Those of a row without events are not read."""
    tiles = tl.cdiv(N, BLOCK)  # of a row; all programs are on one axis, as the others have at most 65535
    row = (tl.program_id(0) // tiles).to(tl.int64)
    neurons = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    N = tl.cast(N, tl.int64)
    R = tl.cast(R, tl.int64)
    mask = neurons < N
    dtype: tl.constexpr = drive_ptr.dtype.element_ty
    count = tl.load(counts_ptr + row)
    unit = tl.load(units_ptr + row)
    for sign in tl.static_range(2):
        inverse = tl.load(scales_ptr + 2 + sign).to(tl.float64) * unit
        place = (sign * R + row) * N + neurons
        total = tl.load(sums_ptr + place, mask=tl.where(mask, count, 0) > 0, other=0).to(dtype)
        tl.store(drive_ptr + place, (total.to(tl.float64) * inverse).to(dtype), mask=mask)


@triton.jit
def take(ring_ptr, slot, cells, mask, R, M):
    """The sums that arrive for some cells, which are cleared for the step that comes R steps later."""
    place = ring_ptr + tl.cast(slot, tl.int64) * M + cells
    e = tl.load(place, mask=mask, other=0, cache_modifier=".cg")
    tl.store(place, tl.zeros_like(e), mask=mask)
    place += R * M
    i = tl.load(place, mask=mask, other=0, cache_modifier=".cg")
    tl.store(place, tl.zeros_like(i), mask=mask)
    return e, i


@triton.jit(
    do_not_specialize=["T", "B", "N", "R", "first", "window", "constants_stride", "states_stride", "spin_limit", "per_ms"]
)  # fmt: skip
def sparse_forward_kernel(
    drive_ptr, ring_ptr, indptr_ptr, targets_ptr, weights_ptr, delays_ptr, scales_ptr, constants_ptr, final_ptr,
    lists_ptr, counts_ptr, arrived_ptr, failed_ptr, spikes_ptr, words_ptr, states_ptr,
    T, B, N, R, first, window, constants_stride, states_stride, spin_limit, per_ms,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, SOURCES: tl.constexpr, LANES: tl.constexpr, WEIGHT: tl.constexpr,
    DELAY: tl.constexpr, TOGETHER: tl.constexpr, PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """A program of ``(B, parts)`` owns a batch row, or several share it ``TOGETHER``, with tiles of ``BLOCK`` neurons.

    ``window`` steps are integrated, the spikes of all programs listed; then the programs share out the list and add its
    synapses into the ring, from whose slot ``first`` on sums are taken, a slot a step. ``final`` has the initial state when
    the kernel starts. ``counts [2, B]``, the lengths of lists, take turns: one is cleared while the other's list is read.
    ``arrived [B]`` counts how often programs met. Who waits longer than ``spin_limit`` looks sets ``failed`` and gives up.
    """
    sources = N
    steps = tl.cast(T, tl.int32)
    T = tl.cast(T, tl.int64)
    B = tl.cast(B, tl.int64)
    N = tl.cast(N, tl.int64)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    M = B * N
    dtype: tl.constexpr = constants_ptr.dtype.element_ty
    # beside constants that take many registers there are none for addresses that are the same in each step
    FRUGAL: tl.constexpr = PER_NEURON or dtype == tl.float64
    list_ptr = lists_ptr + row * window * N
    meetings = 0
    waiting = True
    begin = 0
    while (begin < steps) & waiting:
        end = tl.minimum(begin + window, steps)
        count = 0
        for tile in range(part * BLOCK, sources, parts * BLOCK):
            neurons = tile + tl.arange(0, BLOCK)
            mask = neurons < sources
            cells = row * N + neurons
            c = load_constants(constants_ptr, constants_stride, cells, mask, PER_NEURON)
            s = load_fields(final_ptr + cells, M, mask, FIELDS)
            if FRUGAL:
                unit_e, unit_i = tl.load(scales_ptr + 2), tl.load(scales_ptr + 3)
            word = tl.zeros([BLOCK], tl.int32)
            if words_ptr is not None:
                begun = tl.where(mask, begin % 32, 0) > 0
                word = tl.load(words_ptr + (begin // 32) * M + cells, mask=begun, other=0)
            for step in tl.range(0, end - begin, disable_licm=FRUGAL):
                t = tl.cast(begin + step, tl.int64)
                slot = first + step
                sum_e, sum_i = take(ring_ptr, tl.where(slot >= R, slot - R, slot), cells, mask, R, M)
                if not FRUGAL:
                    unit_e, unit_i = tl.load(scales_ptr + 2), tl.load(scales_ptr + 3)
                recurrent = Drive(sum_e.to(dtype) * unit_e, sum_i.to(dtype) * unit_i)
                if drive_ptr is not None:
                    drive = Drive(
                        tl.load(drive_ptr + t * M + cells, mask=mask), tl.load(drive_ptr + (T + t) * M + cells, mask=mask)
                    )
                else:
                    drive = Drive(tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype))
                spike, s, word = step_cells(
                    t, cells, s, word, drive, recurrent, c, mask, spikes_ptr, words_ptr, states_ptr, T, M, states_stride,
                    FIELDS, JUMP_FIRST,
                )  # fmt: skip
                entries = step * sources + neurons
                if TOGETHER:
                    fired = tl.sum(spike.to(tl.int32), 0)
                    if fired > 0:
                        place = counts_ptr + (meetings // 2 % 2) * B + row
                        compact(spike, tl.atomic_add(place, fired, sem="relaxed", scope="gpu"), list_ptr, entries)
                else:
                    count = compact(spike, count, list_ptr, entries)
            store_fields(final_ptr + cells, M, s, mask, FIELDS)
            if words_ptr is not None:
                begun = tl.where(mask & (end < steps), end % 32, 0) > 0
                tl.store(words_ptr + (end // 32) * M + cells, word, mask=begun)
        if TOGETHER:
            counter = meetings // 2 % 2
            waiting = meet(arrived_ptr + row, (meetings + 1) * parts, spin_limit)  # the list is complete
            count = tl.load(counts_ptr + counter * B + row, cache_modifier=".cg")
            count = tl.where(waiting, count, 0)
            if part == 0:
                tl.store(counts_ptr + (1 - counter) * B + row, 0)
        else:
            tl.debug_barrier()  # the list is complete, and the slots are clear, before any thread delivers
        deliver(
            list_ptr, count, part, parts, None, 0, ring_ptr + row * N, R, M, first, sources,
            indptr_ptr, targets_ptr, weights_ptr, delays_ptr, tl.load(scales_ptr), tl.load(scales_ptr + 1), per_ms,
            SOURCES, LANES, WEIGHT, DELAY, True, ".cg" if TOGETHER else "",
        )  # fmt: skip
        if TOGETHER:
            waiting = meet(arrived_ptr + row, (meetings + 2) * parts, spin_limit) & waiting  # the sums are complete
            meetings += 2
        else:
            tl.debug_barrier()  # the sums are complete before any thread takes them
        first += end - begin
        first = tl.where(first >= R, first - R, first)
        begin = end
    if TOGETHER:
        if not waiting:
            tl.store(failed_ptr, 1)


@triton.jit
def send_back(
    sources, mask, sent, row, indptr_ptr, targets_ptr, weights_ptr, delays_ptr, adjoints_ptr, B, N, per_ms,
    UNROLL: tl.constexpr, WEIGHT: tl.constexpr, DELAY: tl.constexpr, CACHE: tl.constexpr = tl.constexpr(""),
):  # fmt: skip
    """The gradient by the values of sources in step ``sent`` of a row: a sum over their synapses, in ascending order.

    A term is the magnitude of the weight times the adjoint of its sign when and where the spike arrives.
    """
    begin = tl.load(indptr_ptr + sources, mask=mask, other=0)
    end = tl.load(indptr_ptr + sources + 1, mask=mask, other=0)
    longest = tl.max(end - begin, 0).to(tl.int32)
    held = tl.where(mask, sources, 0)
    # one for each source, as in recurrent.add_rows
    sent = tl.zeros(sources.shape, tl.int64) + sent
    total = tl.zeros(sources.shape, adjoints_ptr.dtype.element_ty)
    for first in range(0, longest, UNROLL):
        products = ()
        for i in tl.static_range(UNROLL):
            synapse = begin + first + i
            here = synapse < end
            target = tl.load(targets_ptr + synapse, mask=here, other=0)
            weight = load_number(weights_ptr, held, synapse, here, WEIGHT)
            arrival = sent
            if delays_ptr is not None:
                arrival = sent + load_steps(delays_ptr, held, synapse, here, per_ms, DELAY)
            here = here & (weight != 0.0) & (arrival >= 0)  # neither sign has a weight of 0
            place = ((arrival * B + row) * 2 + tl.where(weight < 0.0, 1, 0)) * N + target
            adjoint = tl.load(adjoints_ptr + place, mask=here, other=0.0, cache_modifier=CACHE)
            products = products + (tl.abs(weight) * adjoint,)
        for i in tl.static_range(UNROLL):
            total = total + products[i]
    return total


@triton.jit(do_not_specialize=["T", "B", "N", "window", "constants_stride", "spin_limit", "per_ms"])
def sparse_backward_kernel(
    trajectory_ptr, words_ptr, constants_ptr, grad_spikes_ptr, grad_states_ptr, indptr_ptr, targets_ptr, weights_ptr,
    delays_ptr, lam_ptr, adjoints_ptr, grad_constants_ptr, arrived_ptr, failed_ptr,
    T, B, N, window, constants_stride, spin_limit, per_ms,
    BLOCK: tl.constexpr, KEPT: tl.constexpr, UNROLL: tl.constexpr, WEIGHT: tl.constexpr, DELAY: tl.constexpr,
    TOGETHER: tl.constexpr, PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """Sweep back through a block, ``window`` steps at a time: what they read of other neurons' adjoints is of later steps.

    Programs share a row as in :func:`sparse_forward_kernel`. ``lam [F, B, N]`` and ``grad_constants [S, B N]`` are carried
    on. ``grad_spikes [T, B, N]`` and ``grad_states [F, T, B, N]``, by the states before the steps, may be None.
    """
    T = tl.cast(T, tl.int64)
    B = tl.cast(B, tl.int64)
    N = tl.cast(N, tl.int64)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    M = B * N
    meetings = 0
    waiting = True
    end = T
    while (end > 0) & waiting:
        begin = tl.maximum(end - window, 0)
        for tile in range(part * BLOCK, N, parts * BLOCK):
            neurons = tl.cast(tile, tl.int64) + tl.arange(0, BLOCK)
            mask = neurons < N
            cells = row * N + neurons
            c = load_constants(constants_ptr, constants_stride, cells, mask, PER_NEURON)
            lam = state_of(load_fields(lam_ptr + cells, M, mask, NUM_FIELDS))
            if grad_constants_ptr is not None:
                sums = sums_of(load_fields(grad_constants_ptr + cells, M, mask, NUM_SUMS))
            for back in range(0, end - begin):
                t = end - 1 - tl.cast(back, tl.int64)
                here = t * M + cells
                grad_z = send_back(
                    neurons, mask, t, row, indptr_ptr, targets_ptr, weights_ptr, delays_ptr, adjoints_ptr, B, N, per_ms,
                    UNROLL, WEIGHT, DELAY, ".cg" if TOGETHER else "",
                )  # fmt: skip
                kept = load_planes(trajectory_ptr, T * M, here, mask, 0, KEPT)
                z = (load_word(words_ptr, t, M, cells, mask) & 1).to(grad_z.dtype)
                if grad_spikes_ptr is not None:
                    grad_z = tl.load(grad_spikes_ptr + here, mask=mask) + grad_z
                if grad_states_ptr is not None:
                    recorded = State(
                        tl.load(grad_states_ptr + here, mask=mask),
                        tl.load(grad_states_ptr + T * M + here, mask=mask),
                        tl.load(grad_states_ptr + 2 * T * M + here, mask=mask),
                    )
                else:
                    recorded = None
                a = sweep(z, kept, grad_z, lam, recorded, c, JUMP_FIRST, METHOD)
                if grad_constants_ptr is not None:
                    decayed_e, decayed_i = load_planes(trajectory_ptr, T * M, here, mask, KEPT, 2)
                    sums = add_sums(sums, z, kept, decayed_e, decayed_i, lam, a, c)
                lam = a.lam
                adjoints = adjoints_ptr + (t * B + row) * 2 * N
                tl.store(adjoints + neurons, a.drive.e, mask=mask)
                tl.store(adjoints + N + neurons, a.drive.i, mask=mask)
            store_fields(lam_ptr + cells, M, lam, mask, NUM_FIELDS)
            if grad_constants_ptr is not None:
                store_fields(grad_constants_ptr + cells, M, sums, mask, NUM_SUMS)
        if TOGETHER:
            meetings += 1
            waiting = meet(arrived_ptr + row, meetings * parts, spin_limit)  # the adjoints are complete
        else:
            tl.debug_barrier()  # the adjoints of all neurons are written before any thread reads them
        end = begin
    if TOGETHER:
        if not waiting:
            tl.store(failed_ptr, 1)


@triton.jit(do_not_specialize=["K", "B", "N", "begin", "per_ms"])
def source_gradient_kernel(
    indptr_ptr, targets_ptr, weights_ptr, delays_ptr, adjoints_ptr, grad_ptr, K, B, N, begin, per_ms,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, WEIGHT: tl.constexpr, DELAY: tl.constexpr,
):  # fmt: skip
    """The gradient ``[T B, K]`` by the values of sources in T steps from ``begin`` on. ``adjoints`` begin with step 0."""
    tiles = tl.cdiv(K, BLOCK)  # of a row, as above
    program = tl.program_id(0) // tiles
    step = program // B
    b = (program % B).to(tl.int64)
    row = program.to(tl.int64)
    sources = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    B = tl.cast(B, tl.int64)
    N = tl.cast(N, tl.int64)
    mask = sources < K
    total = send_back(
        sources, mask, begin + step, b, indptr_ptr, targets_ptr, weights_ptr, delays_ptr, adjoints_ptr, B, N,
        per_ms, UNROLL, WEIGHT, DELAY,
    )  # fmt: skip
    tl.store(grad_ptr + row * K + sources, total, mask=mask)


@triton.jit(do_not_specialize=["E", "K", "B", "N", "S", "rows", "begin", "per_ms"])
def synapse_gradient_kernel(
    values_ptr, lists_ptr, counts_ptr, indptr_ptr, targets_ptr, weights_ptr, delays_ptr, adjoints_ptr, grad_ptr,
    E, K, B, N, S, rows, begin, per_ms,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, WEIGHT: tl.constexpr, DELAY: tl.constexpr,
):  # fmt: skip
    """Add the gradient by the weights of all synapses to ``grad [samples, S]``, event by event, in ascending order.

    A program has the synapses of one source in one sample, of ``rows`` of the batch: ``values [samples, K, E]`` are those of
    the source in every step, from ``begin`` on, and row. ``lists`` and ``counts`` say which of them are not 0.
    """
    sample = (tl.program_id(0) // K).to(tl.int64)
    source = (tl.program_id(0) % K).to(tl.int64)
    program = tl.program_id(0).to(tl.int64)
    B = tl.cast(B, tl.int64)
    N = tl.cast(N, tl.int64)
    values_ptr += program * E
    lists_ptr += program * E
    count = tl.load(counts_ptr + program)
    first = tl.load(indptr_ptr + source)
    last = tl.load(indptr_ptr + source + 1)
    length = tl.where(count > 0, last - first, 0)
    dtype: tl.constexpr = adjoints_ptr.dtype.element_ty
    for offset in range(0, length, BLOCK):
        synapse = first + offset + tl.arange(0, BLOCK)
        mask = synapse < last
        target = tl.load(targets_ptr + synapse, mask=mask, other=0)
        weight = load_number(weights_ptr, source, synapse, mask, WEIGHT)
        arrives = tl.zeros([BLOCK], tl.int64) + begin
        if delays_ptr is not None:
            arrives = arrives + load_steps(delays_ptr, source, synapse, mask, per_ms, DELAY)
        column = tl.where(weight < 0.0, N, 0) + target
        total = tl.zeros([BLOCK], dtype)
        for event in range(0, count, UNROLL):
            products = ()
            for i in tl.static_range(UNROLL):
                listed = event + i < count
                entry = tl.load(lists_ptr + event + i, mask=listed, other=0)
                value = tl.load(values_ptr + entry, mask=listed, other=0).to(dtype)
                arrival = arrives + entry // rows
                # neither sign has a weight of 0
                here = tl.where(mask & (weight != 0.0) & (arrival >= 0), event + i, count) < count
                place = (arrival * B + sample * rows + entry % rows) * 2 * N + column
                products = products + (tl.load(adjoints_ptr + place, mask=here, other=0.0) * value,)
            for i in tl.static_range(UNROLL):
                total = total + products[i]
        grad = grad_ptr + sample * S + synapse
        total = tl.where(weight < 0.0, -total, total)
        tl.store(grad, tl.load(grad, mask=mask, other=0.0) + total, mask=mask)
