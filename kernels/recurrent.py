"""Recurrent populations, event driven: only the synapses of neurons that spiked are touched.

Arrays are time-major and contiguous; ``B`` batch rows, ``N`` neurons, ``K`` sources of a projection:

=============  ======================  ============================================================================
weights        ``[K, N]``              transposed: the row of a source holds its synapses; signs are split in registers
drive          ``[2, T, B, N]``        excitatory and inhibitory input of every step
first          ``[2, B, N]``           recurrent drive of the first step, from the spikes before the block
state          ``[F, B, N]``           fields of the state
constants      ``[C, B N]`` or [C, 1]  rows of ``Constants``
lists          ``[2, B, N]``           scratch: the neurons that spiked, ascending; double buffered over steps
words          ``[ceil(T/32), B, N]``  spikes packed along time
trajectory     ``[K + 2, T, B, N]``    what ``neuron.keep`` keeps of a step, then the two conductances that decayed
adjoints       ``[T, B, 2, N]``        gradient by the excitatory and by the inhibitory drive
=============  ======================  ============================================================================

The sum over a neuron's synapses has one order, ascending by source, whatever the launch configuration, the batch and the
length of a block are: bits do not depend on them.
"""

import triton
import triton.language as tl

from ..neuron.records import Drive, State
from .feed_forward import convert_spike, load_word
from .neuron import (
    NUM_FIELDS,
    NUM_SUMS,
    add_sums,
    advance,
    decaying,
    keep,
    load_constants,
    load_fields,
    no_sums,
    relu,
    state_of,
    store_fields,
    sums_of,
    sweep,
)


@triton.jit
def compact(hits, base, list_ptr, values):
    """Append the values that are hit to a list, in order; returns the list's new length."""
    hits = hits.to(tl.int32)
    tl.store(list_ptr + base + tl.cumsum(hits, 0) - 1, values, mask=hits != 0)
    return base + tl.sum(hits, 0)


@triton.jit
def add_rows(
    drive_e, drive_i, list_ptr, count, source_ptr, source_stride, weights_ptr, N, neurons, mask,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Add the weights of the listed sources one after the other, ``UNROLL`` loads ahead.

    ``source_ptr`` has the sources' values, or is None where all of them are 1.
    """
    columns = weights_ptr + neurons
    width = tl.cast(N, tl.uint32).to(tl.int64)  # one instruction multiplies numbers of 32 bits without a sign
    for start in range(0, count, UNROLL):
        rows = ()
        values = ()
        for i in tl.static_range(UNROLL):
            listed = start + i < count
            source = tl.load(list_ptr + start + i, mask=listed, other=0).to(tl.uint32).to(tl.int64)
            if mask is None:  # one for each neuron: Triton 3.9's interpreter makes no mask of a single truth value
                here = tl.zeros(neurons.shape, tl.int32) + (start + i) < count
            else:
                here = tl.where(mask, start + i, count) < count
            rows = rows + (tl.load(columns + source * width, mask=here, other=0.0),)
            if source_ptr is not None:
                value = tl.load(source_ptr + source * source_stride, mask=listed, other=0)
                values = values + (value.to(drive_e.dtype),)
        for i in tl.static_range(UNROLL):
            row = rows[i]
            if source_ptr is not None:
                drive_e = drive_e + relu(row) * values[i]
                drive_i = drive_i + relu(-row) * values[i]
            else:
                drive_e = drive_e + relu(row)
                drive_i = drive_i - tl.minimum(row, 0.0, propagate_nan=tl.PropagateNan.ALL)  # + relu(-row)
    return drive_e, drive_i


@triton.jit(do_not_specialize=["K", "row_stride", "source_stride"])
def compact_kernel(sources_ptr, lists_ptr, counts_ptr, K, row_stride, source_stride, BLOCK: tl.constexpr):
    """The indices of what is not 0 in each row of ``sources [R, K]``, ascending: ``lists [R, K]``, ``counts [R]``."""
    row = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, K, BLOCK):
        index = start + tl.arange(0, BLOCK)
        value = tl.load(sources_ptr + row * row_stride + index.to(tl.int64) * source_stride, mask=index < K, other=0)
        count = compact(value != 0, count, lists_ptr + row * K, index)
    tl.store(counts_ptr + row, count)


@triton.jit
def project_row(
    row, sources_ptr, lists_ptr, counts_ptr, weights_ptr, drive_ptr, K, N, R, row_stride, source_stride, neurons, mask,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """The drive of one row of sources, through its events."""
    zeros = tl.zeros(neurons.shape, weights_ptr.dtype.element_ty)
    drive_e, drive_i = add_rows(
        zeros, zeros, lists_ptr + row * K, tl.load(counts_ptr + row), sources_ptr + row * row_stride, source_stride,
        weights_ptr, N, neurons, mask, UNROLL,
    )  # fmt: skip
    tl.store(drive_ptr + row * N + neurons, drive_e, mask=mask)
    tl.store(drive_ptr + (R + row) * N + neurons, drive_i, mask=mask)


@triton.jit(do_not_specialize=["K", "N", "R", "row_stride", "source_stride"])
def projection_kernel(
    sources_ptr, lists_ptr, counts_ptr, weights_ptr, drive_ptr, K, N, R, row_stride, source_stride,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``relu(W) x`` and ``relu(-W) x`` for every row of sources; ``drive`` is ``[2, R, N]``.

    A program has ``ROWS`` rows. Where these have more events than there are sources, it goes through all sources and
    reads each one's weights once for all rows, else row by row through the events. The sums have one order and the same
    terms either way: their bits do not depend on the choice.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    N = tl.cast(N, tl.int64)
    neurons = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = neurons < N
    if ROWS == 1:
        project_row(
            first, sources_ptr, lists_ptr, counts_ptr, weights_ptr, drive_ptr, K, N, R, row_stride, source_stride, neurons,
            mask, UNROLL,
        )  # fmt: skip
    else:
        events = 0
        for i in tl.static_range(ROWS):
            events += tl.load(counts_ptr + first + i, mask=first + i < R, other=0)
        if events <= K:
            for row in range(first, tl.minimum(first + ROWS, R)):
                project_row(
                    tl.cast(row, tl.int64), sources_ptr, lists_ptr, counts_ptr, weights_ptr, drive_ptr, K, N, R, row_stride,
                    source_stride, neurons, mask, UNROLL,
                )  # fmt: skip
        else:
            zeros = tl.zeros(neurons.shape, weights_ptr.dtype.element_ty)
            drives_e = ()
            drives_i = ()
            for _ in tl.static_range(ROWS):
                drives_e = drives_e + (zeros,)
                drives_i = drives_i + (zeros,)
            for source in range(0, K):
                source = tl.cast(source, tl.int64)
                weights = tl.load(weights_ptr + source * N + neurons, mask=mask, other=0.0)
                excitatory = relu(weights)
                inhibitory = relu(-weights)
                sums_e = ()
                sums_i = ()
                for i in tl.static_range(ROWS):
                    value = tl.load(
                        sources_ptr + (first + i) * row_stride + source * source_stride, mask=first + i < R, other=0
                    ).to(zeros.dtype)
                    # where there is no event, 0 is added, whatever the weight is
                    sums_e = sums_e + (drives_e[i] + tl.where(value != 0, excitatory, 0.0) * value,)
                    sums_i = sums_i + (drives_i[i] + tl.where(value != 0, inhibitory, 0.0) * value,)
                drives_e = sums_e
                drives_i = sums_i
            for i in tl.static_range(ROWS):
                row = first + i
                tl.store(drive_ptr + row * N + neurons, drives_e[i], mask=tl.where(mask, row, R) < R)
                tl.store(drive_ptr + (R + row) * N + neurons, drives_i[i], mask=tl.where(mask, row, R) < R)


@triton.jit
def first_drive(first_ptr, t, cells, M, mask):
    """Where the sum over events starts: at what the spikes before the block send to its first step, else at 0."""
    if mask is None:  # one for each cell, as in add_rows
        is_first = tl.zeros(cells.shape, tl.int32) + t == 0
    else:
        is_first = tl.where(mask, t, 1) == 0
    return tl.load(first_ptr + cells, mask=is_first, other=0.0), tl.load(first_ptr + M + cells, mask=is_first, other=0.0)


@triton.jit
def step_cells(
    t, cells, s, word, drive, recurrent, c, mask, spikes_ptr, words_ptr, states_ptr, T, M, states_stride,
    FIELDS: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """One step of some cells: integrate, fire, and store what was asked for; returns who spiked, the state and the word."""
    _, spike, s = advance(s, drive, recurrent, None, mask, c, JUMP_FIRST)
    if spikes_ptr is not None:
        tl.store(spikes_ptr + t * M + cells, convert_spike(spike, spikes_ptr.dtype.element_ty), mask=mask)
    if states_ptr is not None:
        store_fields(states_ptr + t * M + cells, states_stride, s, mask, FIELDS)
    if words_ptr is not None:
        word = word | (spike.to(tl.int32) << (t % 32).to(tl.int32))
        if ((t + 1) % 32 == 0) | (t + 1 == T):
            tl.store(words_ptr + (t // 32) * M + cells, word, mask=mask)
            word = tl.zeros_like(word)
    return spike, s, word


@triton.jit
def forward_tile(
    t, row, s, word, list_ptr, count, next_list_ptr, next_count, c, neurons, mask,
    drive_ptr, first_ptr, weights_ptr, spikes_ptr, words_ptr, states_ptr, T, B, N, states_stride,
    FIELDS: tl.constexpr, UNROLL: tl.constexpr, EARLY: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """One step of one row's tile of neurons: sum up, integrate, fire, append the spikes to the next list.

    ``EARLY``: the input is on its way while synapses are summed up, which takes registers.
    """
    M = B * N
    cells = row * N + neurons
    if EARLY:
        drive_e, drive_i = load_fields(drive_ptr + t * M + cells, T * M, mask, 2)
    recurrent_e, recurrent_i = first_drive(first_ptr, t, cells, M, mask)
    recurrent_e, recurrent_i = add_rows(
        recurrent_e, recurrent_i, list_ptr, count, None, 0, weights_ptr, N, neurons, mask, UNROLL
    )
    if not EARLY:
        drive_e, drive_i = load_fields(drive_ptr + t * M + cells, T * M, mask, 2)
    spike, s, word = step_cells(
        t, cells, s, word, Drive(drive_e, drive_i), Drive(recurrent_e, recurrent_i), c, mask, spikes_ptr, words_ptr,
        states_ptr, T, M, states_stride, FIELDS, JUMP_FIRST,
    )  # fmt: skip
    next_count = compact(spike, next_count, next_list_ptr, neurons.to(tl.int32))
    return s, word, next_count


@triton.jit(do_not_specialize=["T", "B", "N", "constants_stride", "states_stride"])
def forward_kernel(
    drive_ptr, first_ptr, weights_ptr, state_ptr, constants_ptr, final_ptr, lists_ptr, words_scratch_ptr,
    spikes_ptr, words_ptr, states_ptr, T, B, N, constants_stride, states_stride,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, ONE_TILE: tl.constexpr, EVEN: tl.constexpr, UNROLL: tl.constexpr,
    PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """A program owns a batch row for the whole block: no program waits for another.

    While one tile of ``BLOCK`` neurons holds the row, its state stays in registers; else each step reads and writes it
    in ``final``, and the started words in ``words_scratch [B, N]``.
    """
    T = tl.cast(T, tl.int64)
    B = tl.cast(B, tl.int64)
    N = tl.cast(N, tl.int64)
    row = tl.program_id(0).to(tl.int64)
    M = B * N
    neurons = tl.arange(0, BLOCK).to(tl.int64)
    list_ptr = lists_ptr + row * N
    count = 0
    if ONE_TILE:
        mask = None if EVEN else neurons < N
        cells = row * N + neurons
        c = load_constants(constants_ptr, constants_stride, cells, mask, PER_NEURON)
        s = load_fields(state_ptr + cells, M, mask, FIELDS)
        word = tl.zeros([BLOCK], tl.int32)
        for t in range(0, T):
            t = tl.cast(t, tl.int64)
            s, word, count = forward_tile(
                t, row, s, word, list_ptr + (t % 2) * M, count, list_ptr + ((t + 1) % 2) * M, 0, c, neurons, mask,
                drive_ptr, first_ptr, weights_ptr, spikes_ptr, words_ptr, states_ptr, T, B, N, states_stride,
                FIELDS, UNROLL, True, JUMP_FIRST,
            )  # fmt: skip
            tl.debug_barrier()  # the list is complete before any thread reads it
        store_fields(final_ptr + cells, M, s, mask, FIELDS)
    else:
        for tile in range(0, N, BLOCK):
            mask = tile + neurons < N
            cells = row * N + tile + neurons
            s = load_fields(state_ptr + cells, M, mask, FIELDS)
            store_fields(final_ptr + cells, M, s, mask, FIELDS)
        for t in range(0, T):
            t = tl.cast(t, tl.int64)
            next_count = 0
            for tile in range(0, N, BLOCK):
                here = tile + neurons
                mask = here < N
                cells = row * N + here
                c = load_constants(constants_ptr, constants_stride, cells, mask, PER_NEURON)
                s = load_fields(final_ptr + cells, M, mask, FIELDS)
                word = tl.load(words_scratch_ptr + cells, mask=tl.where(mask, t % 32, 0) > 0, other=0)
                s, word, next_count = forward_tile(
                    t, row, s, word, list_ptr + (t % 2) * M, count, list_ptr + ((t + 1) % 2) * M, next_count, c, here, mask,
                    drive_ptr, first_ptr, weights_ptr, spikes_ptr, words_ptr, states_ptr, T, B, N, states_stride,
                    FIELDS, UNROLL, False, JUMP_FIRST,
                )  # fmt: skip
                store_fields(final_ptr + cells, M, s, mask, FIELDS)
                tl.store(words_scratch_ptr + cells, word, mask=mask)
            count = next_count
            tl.debug_barrier()  # the list is complete before any thread reads it


@triton.jit
def meet(arrived_ptr, target, spin_limit):
    """Wait until ``target`` arrivals are counted; returns whether they were, within ``spin_limit`` looks.

    What the programs wrote before is there for all of them afterwards, if it is not read from a processor's own cache.
    """
    tl.debug_barrier()  # all threads are done before the arrival is announced
    tl.atomic_add(arrived_ptr, 1, sem="release", scope="gpu")
    arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu")
    looks = 0
    while (arrived < target) & (looks < spin_limit):
        arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu")
        looks += 1
    tl.debug_barrier()  # no thread goes on before the others are known to be there
    return arrived >= target


@triton.jit(do_not_specialize=["T", "B", "N", "constants_stride", "states_stride", "spin_limit"])
def sliced_forward_kernel(
    drive_ptr, first_ptr, weights_ptr, state_ptr, constants_ptr, final_ptr, fired_ptr, lists_ptr, arrived_ptr,
    failed_ptr, spikes_ptr, words_ptr, states_ptr, T, B, N, constants_stride, states_stride, spin_limit,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr,
    PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """Several programs share a batch row, ``BLOCK`` neurons each, and wait for each other after every step.

    A program publishes a byte for each of its neurons, whether it fired, in ``fired [2, B, N]``. When all have, each reads
    the bytes of the whole row and makes its own ascending list of them, in ``lists [B, programs, N]``: the sum over synapses
    has the order of ``forward_kernel``. The bytes are double buffered, as a program is at most one step ahead of another of
    its row. ``arrived [B]`` counts finished steps. Who waits longer than ``spin_limit`` looks sets ``failed`` and gives up.
    """
    T = tl.cast(T, tl.int64)
    B = tl.cast(B, tl.int64)
    N = tl.cast(N, tl.int64)
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    M = B * N
    neurons = part * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = neurons < N
    cells = row * N + neurons
    list_ptr = lists_ptr + (row * parts + part) * N
    c = load_constants(constants_ptr, constants_stride, cells, mask, PER_NEURON)
    s = load_fields(state_ptr + cells, M, mask, FIELDS)
    word = tl.zeros([BLOCK], tl.int32)
    recurrent_e, recurrent_i = load_fields(first_ptr + cells, M, mask, 2)
    drive_e, drive_i = load_fields(drive_ptr + cells, T * M, mask, 2)
    zeros = tl.zeros([BLOCK], weights_ptr.dtype.element_ty)
    step = 0
    waiting = True
    while (step < T) & waiting:
        t = tl.cast(step, tl.int64)
        spike, s, word = step_cells(
            t, cells, s, word, Drive(drive_e, drive_i), Drive(recurrent_e, recurrent_i), c, mask, spikes_ptr, words_ptr,
            states_ptr, T, M, states_stride, FIELDS, JUMP_FIRST,
        )  # fmt: skip
        step += 1
        if step < T:
            published = fired_ptr + ((t % 2) * B + row) * N
            tl.store(published + neurons, spike.to(tl.uint8), mask=mask)
            drive_e, drive_i = load_fields(
                drive_ptr + (t + 1) * M + cells, T * M, mask, 2
            )  # while the others are waited for
            waiting = meet(arrived_ptr + row, step * parts, spin_limit)
            count = 0
            for start in range(0, N, TILE):
                sources = start + tl.arange(0, TILE)
                fired = tl.load(published + sources, mask=sources < N, other=0, cache_modifier=".cg")
                count = compact(fired != 0, count, list_ptr, sources)
            tl.debug_barrier()  # the list is complete before any thread reads it
            recurrent_e, recurrent_i = add_rows(
                zeros, zeros, list_ptr, count, None, 0, weights_ptr, N, neurons, mask, UNROLL
            )  # fmt: skip
    if not waiting:
        tl.store(failed_ptr, 1)
    store_fields(final_ptr + cells, M, s, mask, FIELDS)


@triton.jit(do_not_specialize=["T", "M", "constants_stride", "states_stride"])
def driven_kernel(
    drive_ptr, recurrent_ptr, state_ptr, constants_ptr, words_ptr, final_ptr, spikes_ptr, states_ptr, trajectory_ptr,
    T, M, constants_stride, states_stride,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, KEPT: tl.constexpr, PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """Step with a recurrent drive ``[2, T, M]`` that is known: one step after a matrix product, or a block's replay.

    With ``words`` the spikes are the stored ones: the path that was simulated, always.
    """
    T = tl.cast(T, tl.int64)
    M = tl.cast(M, tl.int64)
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cells < M
    c = load_constants(constants_ptr, constants_stride, cells, mask, PER_NEURON)
    s = load_fields(state_ptr + cells, M, mask, FIELDS)
    for t in range(0, T):
        t = tl.cast(t, tl.int64)
        here = t * M + cells
        drive = Drive(tl.load(drive_ptr + here, mask=mask), tl.load(drive_ptr + T * M + here, mask=mask))
        recurrent = Drive(tl.load(recurrent_ptr + here, mask=mask), tl.load(recurrent_ptr + T * M + here, mask=mask))
        before = s
        known = None
        if words_ptr is not None:
            known = (load_word(words_ptr, t, M, cells, mask) & 1) != 0
        u, spike, s = advance(s, drive, recurrent, known, None, c, JUMP_FIRST)
        if spikes_ptr is not None:
            tl.store(spikes_ptr + here, convert_spike(spike, spikes_ptr.dtype.element_ty), mask=mask)
        if states_ptr is not None:
            store_fields(states_ptr + here, states_stride, s, mask, FIELDS)
        if trajectory_ptr is not None:
            store_fields(trajectory_ptr + here, T * M, keep(before, u), mask, KEPT)
            decayed_e, decayed_i = decaying(state_of(before), drive, recurrent, JUMP_FIRST)
            tl.store(trajectory_ptr + KEPT * T * M + here, decayed_e, mask=mask)
            tl.store(trajectory_ptr + (KEPT + 1) * T * M + here, decayed_i, mask=mask)
    store_fields(final_ptr + cells, M, s, mask, FIELDS)


@triton.jit
def load_planes(planes_ptr, stride, cells, mask, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """``load_fields`` from plane ``FIRST`` on, with addresses of which the compiler keeps fewer in registers."""
    planes = ()
    for i in tl.static_range(COUNT):
        planes = planes + (tl.load(planes_ptr + (FIRST + i) * stride + cells, mask=mask),)
    return planes


@triton.jit
def load_step(
    t, cells, mask, trajectory_ptr, words_ptr, grad_spikes_ptr, grad_states_ptr, T, M, start, steps, grad_stride_t,
    grad_stride_m, KEPT: tl.constexpr, CONSTANTS: tl.constexpr,
):  # fmt: skip
    """What the adjoint of a step reads, and no step writes: one tuple, which :func:`step_back` takes apart."""
    here = t * M + cells
    values = load_planes(trajectory_ptr, T * M, here, mask, 0, KEPT)
    values = values + ((load_word(words_ptr, t, M, cells, mask) & 1).to(values[0].dtype),)
    if grad_spikes_ptr is not None:
        spikes = grad_spikes_ptr + (start + t) * grad_stride_t + cells * grad_stride_m
        values = values + (tl.load(spikes, mask=mask).to(values[0].dtype),)
    if grad_states_ptr is not None:
        before = start + t - 1
        # the initial state is not recorded; what is read in its stead is masked out
        in_range = tl.where(mask, before, -1) >= 0
        states = grad_states_ptr + tl.maximum(before, 0) * M + cells
        for i in tl.static_range(NUM_FIELDS):
            values = values + (tl.load(states + i * steps * M, mask=in_range, other=0.0),)
    if CONSTANTS:
        values = values + load_planes(trajectory_ptr, T * M, here, mask, KEPT, 2)
    return values


@triton.jit
def step_back(
    values, lam, lam_z, sums, c, own_ptr, N, mask, GRAD_SPIKES: tl.constexpr, GRAD_STATES: tl.constexpr,
    CONSTANTS: tl.constexpr, KEPT: tl.constexpr, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """The adjoint of a step, from what :func:`load_step` returned: stores those by the drives, and returns ``lam, sums``."""
    kept = (values[0], values[1], values[2], values[3])
    if KEPT == 5:
        kept = kept + (values[4],)
    z = values[KEPT]
    at: tl.constexpr = KEPT + 1 + GRAD_SPIKES
    grad_z = lam_z
    if GRAD_SPIKES:
        grad_z = values[KEPT + 1] + lam_z
    if GRAD_STATES:
        recorded = State(values[at], values[at + 1], values[at + 2])
    else:
        recorded = None
    a = sweep(z, kept, grad_z, lam, recorded, c, JUMP_FIRST, METHOD)
    if CONSTANTS:
        decayed: tl.constexpr = at + 3 * GRAD_STATES
        sums = add_sums(sums, z, kept, values[decayed], values[decayed + 1], lam, a, c)
    tl.store(own_ptr, a.drive.e, mask=mask)
    tl.store(own_ptr + N, a.drive.i, mask=mask)
    return a.lam, sums


@triton.jit(
    do_not_specialize=["begin", "end", "start", "steps", "T", "B", "N", "constants_stride", "grad_stride_t", "grad_stride_m"]
)  # fmt: skip
def backward_kernel(
    trajectory_ptr, words_ptr, constants_ptr, grad_spikes_ptr, grad_states_ptr, weights_ptr,
    lam_ptr, lam_z_ptr, adjoints_ptr, grad_constants_ptr,
    begin, end, start, steps, T, B, N, constants_stride, grad_stride_t, grad_stride_m,
    BLOCK: tl.constexpr, KEPT: tl.constexpr, UNROLL: tl.constexpr,
    PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """Sweep back from step ``end - 1`` to step ``begin`` of a block of ``T`` that starts at step ``start`` of ``steps``.

    ``lam [3, B, N]``, ``lam_z [B, N]`` (what the recurrence sends back to the spikes) and ``grad_constants [S, B N]``
    (sums) are carried on. With ``weights [N, N]``, rows post-synaptic, a program owns a whole batch row and forms
    ``lam_z`` of the step before itself; without, the caller does so from ``adjoints`` after each single step.
    """
    T = tl.cast(T, tl.int64)
    B = tl.cast(B, tl.int64)
    N = tl.cast(N, tl.int64)
    M = B * N
    grad_stride_t = tl.cast(grad_stride_t, tl.int64)
    row = tl.program_id(0).to(tl.int64)
    neurons = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = neurons < N
    cells = row * N + neurons
    c = load_constants(constants_ptr, constants_stride, cells, mask, PER_NEURON)
    lam = state_of(load_fields(lam_ptr + cells, M, mask, NUM_FIELDS))
    lam_z = tl.load(lam_z_ptr + cells, mask=mask)
    zeros = tl.zeros([BLOCK], constants_ptr.dtype.element_ty)
    sums = no_sums(zeros)
    for back in range(0, end - begin):
        t = end - 1 - tl.cast(back, tl.int64)
        values = load_step(
            t, cells, mask, trajectory_ptr, words_ptr, grad_spikes_ptr, grad_states_ptr, T, M, start, steps, grad_stride_t,
            grad_stride_m, KEPT, grad_constants_ptr is not None,
        )  # fmt: skip
        adjoints = adjoints_ptr + t * 2 * M + row * 2 * N
        lam, sums = step_back(
            values, lam, lam_z, sums, c, adjoints + neurons, N, mask, grad_spikes_ptr is not None,
            grad_states_ptr is not None, grad_constants_ptr is not None, KEPT, JUMP_FIRST, METHOD,
        )  # fmt: skip
        if weights_ptr is not None:
            tl.debug_barrier()  # the adjoints of all neurons are written before any thread reads them
            lam_z = zeros
            for first in range(0, N, UNROLL):
                products_e = ()
                products_i = ()
                for i in tl.static_range(UNROLL):
                    n = first + i
                    weight = tl.load(weights_ptr + n * N + neurons, mask=tl.where(mask, n, N) < N, other=0.0)
                    drive_e = tl.load(adjoints + n, mask=n < N, other=0.0)
                    drive_i = tl.load(adjoints + N + n, mask=n < N, other=0.0)
                    products_e = products_e + (drive_e * relu(weight),)
                    products_i = products_i + (drive_i * relu(-weight),)
                for i in tl.static_range(UNROLL):
                    lam_z = (lam_z + products_e[i]) + products_i[i]
    store_fields(lam_ptr + cells, M, lam, mask, NUM_FIELDS)
    if weights_ptr is not None:
        tl.store(lam_z_ptr + cells, lam_z, mask=mask)
    if grad_constants_ptr is not None:
        for i in tl.static_range(NUM_SUMS):
            total = tl.load(grad_constants_ptr + i * M + cells, mask=mask) + sums[i]
            tl.store(grad_constants_ptr + i * M + cells, total, mask=mask)


@triton.jit
def load_adjoints(adjoints_ptr, N, sources, mask):
    """Those by both drives of some neurons of a row, a column each, as other programs wrote them."""
    e = tl.load(adjoints_ptr + sources, mask=mask, other=0.0, cache_modifier=".cg")
    i = tl.load(adjoints_ptr + N + sources, mask=mask, other=0.0, cache_modifier=".cg")
    return e[:, None], i[:, None]


@triton.jit(
    do_not_specialize=[
        "start", "steps", "T", "B", "N", "constants_stride", "grad_stride_t", "grad_stride_m", "spin_limit",
    ]
)  # fmt: skip
def shared_backward_kernel(
    trajectory_ptr, words_ptr, constants_ptr, grad_spikes_ptr, grad_states_ptr, weights_ptr,
    lam_ptr, lam_z_ptr, adjoints_ptr, grad_constants_ptr, arrived_ptr, failed_ptr,
    start, steps, T, B, N, constants_stride, grad_stride_t, grad_stride_m, spin_limit,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, HELD: tl.constexpr, UNROLL: tl.constexpr,
    KEPT: tl.constexpr, PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """:func:`backward_kernel` for a whole block, by programs that wait for each other after every step.

    A program has ``BLOCK`` neurons of ``ROWS`` batch rows. Those of the same rows store the adjoints of a step, meet, and
    form ``lam_z`` of their own neurons from the adjoints of all. Each step has a place of its own in ``adjoints``, so that
    one meeting a step is enough. With ``HELD`` the weights ``[N, N]`` of a program stay in registers, where ``CHUNK`` is not
    less than N; else ``UNROLL`` chunks of them are read at a time in every step. ``arrived`` counts the steps of each
    group of rows. Who waits longer than ``spin_limit`` looks sets ``failed`` and gives up.
    """
    T = tl.cast(T, tl.int64)
    B = tl.cast(B, tl.int64)
    N = tl.cast(N, tl.int64)
    M = B * N
    grad_stride_t = tl.cast(grad_stride_t, tl.int64)
    GRAD_SPIKES: tl.constexpr = grad_spikes_ptr is not None
    GRAD_STATES: tl.constexpr = grad_states_ptr is not None
    CONSTANTS: tl.constexpr = grad_constants_ptr is not None
    parts = tl.num_programs(0)
    group = tl.program_id(1).to(tl.int64)
    own = tl.arange(0, ROWS * BLOCK)
    first_row = group * ROWS
    first = tl.program_id(0).to(tl.int64) * BLOCK
    rows = first_row + own // BLOCK
    neurons = first + own % BLOCK
    mask = tl.where(neurons < N, rows, B) < B
    cells = rows * N + neurons
    c = load_constants(constants_ptr, constants_stride, cells, mask, PER_NEURON)
    lam = state_of(load_fields(lam_ptr + cells, M, mask, NUM_FIELDS))
    lam_z = tl.load(lam_z_ptr + cells, mask=mask, other=0.0)
    zeros = tl.zeros([ROWS * BLOCK], constants_ptr.dtype.element_ty)
    sums = no_sums(zeros)
    if CONSTANTS:
        sums = sums_of(load_fields(grad_constants_ptr + cells, M, mask, NUM_SUMS))
    targets = first + tl.arange(0, BLOCK).to(tl.int64)
    sources = tl.arange(0, CHUNK).to(tl.int64)
    weights_ptrs = weights_ptr + sources[:, None] * N + targets[None, :]
    if HELD:
        weights = tl.load(weights_ptrs, mask=(sources < N)[:, None] & (targets < N)[None, :], other=0.0)
    values = load_step(
        T - 1, cells, mask, trajectory_ptr, words_ptr, grad_spikes_ptr, grad_states_ptr, T, M, start, steps, grad_stride_t,
        grad_stride_m, KEPT, CONSTANTS,
    )  # fmt: skip
    back = 0
    waiting = True
    while (back < T) & waiting:
        t = T - 1 - tl.cast(back, tl.int64)
        adjoints = adjoints_ptr + t * 2 * M
        lam, sums = step_back(
            values, lam, lam_z, sums, c, adjoints + rows * 2 * N + neurons, N, mask, GRAD_SPIKES, GRAD_STATES, CONSTANTS,
            KEPT, JUMP_FIRST, METHOD,
        )  # fmt: skip
        back += 1
        values = load_step(  # while the others are waited for
            t - 1, cells, tl.where(mask, t, 0) > 0, trajectory_ptr, words_ptr, grad_spikes_ptr, grad_states_ptr, T, M, start,
            steps, grad_stride_t, grad_stride_m, KEPT, CONSTANTS,
        )  # fmt: skip
        waiting = meet(arrived_ptr + group, back * parts, spin_limit)
        if HELD:
            for r in tl.static_range(ROWS):
                row = first_row + r
                e, i = load_adjoints(adjoints + row * 2 * N, N, sources, tl.where(sources < N, row, B) < B)
                total = tl.sum(e * relu(weights) + i * relu(-weights), 0)
                tl.store(lam_z_ptr + row * N + targets, total, mask=tl.where(targets < N, row, B) < B)
        else:
            totals = ()
            for _ in tl.static_range(ROWS):
                totals = totals + (tl.zeros([CHUNK, BLOCK], zeros.dtype),)
            for begin in range(0, N, UNROLL * CHUNK):
                chunks = ()
                for k in tl.static_range(UNROLL):
                    inside = begin + k * CHUNK + sources < N
                    chunks = chunks + (
                        tl.load(
                            weights_ptrs + (begin + k * CHUNK) * N, mask=inside[:, None] & (targets < N)[None, :], other=0.0
                        ),
                    )
                for k in tl.static_range(UNROLL):
                    some = begin + k * CHUNK + sources
                    added = ()
                    for r in tl.static_range(ROWS):
                        row = first_row + r
                        e, i = load_adjoints(adjoints + row * 2 * N, N, some, tl.where(some < N, row, B) < B)
                        added = added + (totals[r] + (e * relu(chunks[k]) + i * relu(-chunks[k])),)
                    totals = added
            for r in tl.static_range(ROWS):
                row = first_row + r
                total = tl.sum(totals[r], 0)
                tl.store(lam_z_ptr + row * N + targets, total, mask=tl.where(targets < N, row, B) < B)
        tl.debug_barrier()  # what a program sends back is complete before its threads read it
        lam_z = tl.load(lam_z_ptr + cells, mask=mask, other=0.0)
    if not waiting:
        tl.store(failed_ptr, 1)
    store_fields(lam_ptr + cells, M, lam, mask, NUM_FIELDS)
    if CONSTANTS:
        for i in tl.static_range(NUM_SUMS):
            tl.store(grad_constants_ptr + i * M + cells, sums[i], mask=mask)
