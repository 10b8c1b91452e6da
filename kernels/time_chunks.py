"""Feed-forward populations of few neurons: chunks of one long run side by side, with the bits of a run in order.

Forward, the state goes from chunk to chunk; back, the gradient by the state does, in the other direction.

Arrays are those of ``feed_forward.py``, and besides:

=======  =========================  ============================================================================
notes    ``[ceil(T/MARK), F, M]``   the state before every ``MARK``-th step; in training these are the checkpoints
ends     ``[chunks, F, M]``         the state after each chunk; back, the gradient by that before it
late     ``[tiles, chunks]``        1 where a launch has changed the end of a chunk, by programs of ``BLOCK`` neurons
=======  =========================  ============================================================================

``speculate_kernel`` runs all chunks from a guess. ``repair_kernel`` runs a chunk again, from where the chunk before it
ended, until all neurons of the program have the noted bits: what follows there is right already. A second launch of it does
so where the chunk before has another end now, and ``settle_kernel`` runs what is left in order. The host reads nothing in
between. Every state that is used was compared bit for bit, so the result never depends on the guess.
"""

import triton
import triton.language as tl

from ..neuron.records import State
from .feed_forward import backward_run, backward_single, forward_steps, last_adjoint, load_rows
from .neuron import NUM_FIELDS, load_constants, load_fields, no_sums, state_of, store_fields


@triton.jit
def bits_of(number):
    if number.dtype == tl.float64:
        bits = number.to(tl.int64, bitcast=True)
    else:
        bits = number.to(tl.int32, bitcast=True)
    return bits


@triton.jit
def differs(s, pointers, stride, mask, FIELDS: tl.constexpr):
    """Whether any neuron of the program has other bits than those there: -0 is not 0, and a NaN equals itself."""
    others = load_fields(pointers, stride, mask, FIELDS)
    apart = bits_of(s[0]) != bits_of(others[0])
    for i in tl.static_range(1, FIELDS):
        apart = apart | (bits_of(s[i]) != bits_of(others[i]))
    if mask is not None:
        apart = apart & mask
    return tl.max(apart.to(tl.int32), axis=0) != 0


@triton.jit
def stretch(
    t, end, s, c, x_ptr, notes_ptr, spikes_ptr, words_ptr, states_ptr, neurons, mask, T, M, x_stride_t, x_stride_m,
    FIELDS: tl.constexpr, STEPS: tl.constexpr, MARK: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """Simulate the steps from ``t`` to ``end`` with all outputs and notes; both are multiples of 32 steps, or T."""
    word = tl.zeros_like(neurons).to(tl.int32)
    whole = tl.minimum(end, T // STEPS * STEPS)
    inputs = x_ptr + t * x_stride_t + neurons * x_stride_m
    # a stretch shorter than STEPS reads its first row again and again instead of rows that are not there
    ahead = load_rows(inputs, tl.where(t < whole, x_stride_t, 0), mask, STEPS)
    for at in range(t, whole, STEPS):
        at = tl.cast(at, tl.int64)
        if at % MARK == 0:
            store_fields(notes_ptr + at // MARK * FIELDS * M + neurons, M, s, mask, FIELDS)
        xs = ahead
        # the last iteration reads its own rows again
        inputs += tl.where(at + STEPS < whole, STEPS * x_stride_t, 0)
        ahead = load_rows(inputs, x_stride_t, mask, STEPS)
        s, word = forward_steps(
            xs, at, s, word, c, spikes_ptr, words_ptr, states_ptr, neurons, mask, T, M, FIELDS, STEPS, JUMP_FIRST
        )
    for at in range(tl.maximum(t, whole), end):
        at = tl.cast(at, tl.int64)
        if MARK == STEPS:  # checkpoints: of the last, shorter run one before each step
            store_fields(notes_ptr + (T // STEPS + at - whole) * FIELDS * M + neurons, M, s, mask, FIELDS)
        elif at % MARK == 0:
            store_fields(notes_ptr + at // MARK * FIELDS * M + neurons, M, s, mask, FIELDS)
        xs = load_rows(x_ptr + at * x_stride_t + neurons * x_stride_m, x_stride_t, mask, 1)
        s, word = forward_steps(
            xs, at, s, word, c, spikes_ptr, words_ptr, states_ptr, neurons, mask, T, M, FIELDS, 1, JUMP_FIRST
        )
    return s


@triton.jit
def follow(
    t, end, s, c, x_ptr, notes_ptr, spikes_ptr, words_ptr, states_ptr, neurons, mask, T, M, x_stride_t, x_stride_m,
    FIELDS: tl.constexpr, STEPS: tl.constexpr, MARK: tl.constexpr, CHECK: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """Run on from ``t`` until the state has the noted bits; returns whether it had them nowhere, and the state."""
    apart = differs(s, notes_ptr + t // MARK * FIELDS * M + neurons, M, mask, FIELDS)
    while apart & (t < end):
        to = tl.minimum(t + CHECK, end)
        s = stretch(
            t, to, s, c, x_ptr, notes_ptr, spikes_ptr, words_ptr, states_ptr, neurons, mask, T, M, x_stride_t, x_stride_m,
            FIELDS, STEPS, MARK, JUMP_FIRST,
        )  # fmt: skip
        t = to
        if t < end:
            apart = differs(s, notes_ptr + t // MARK * FIELDS * M + neurons, M, mask, FIELDS)
    return apart, s


@triton.jit(do_not_specialize=["T", "M", "chunk_steps", "chunks", "x_stride_t", "x_stride_m", "constants_stride"])
def speculate_kernel(
    x_ptr, state_ptr, constants_ptr, ends_ptr, late_ptr, notes_ptr, spikes_ptr, words_ptr, states_ptr,
    T, M, chunk_steps, chunks, x_stride_t, x_stride_m, constants_stride,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, STEPS: tl.constexpr, MARK: tl.constexpr, EVEN: tl.constexpr,
    PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """Run every chunk from the state before the run: the first one's own, and a guess of the others'."""
    T = tl.cast(T, tl.int64)
    M = tl.cast(M, tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    neurons = tile * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1).to(tl.int64)
    mask = None if EVEN else neurons < M
    c = load_constants(constants_ptr, constants_stride, neurons, mask, PER_NEURON)
    s = load_fields(state_ptr + neurons, M, mask, FIELDS)
    t = chunk * chunk_steps
    s = stretch(
        t, tl.minimum(t + chunk_steps, T), s, c, x_ptr, notes_ptr, spikes_ptr, words_ptr, states_ptr,
        neurons, mask, T, M, tl.cast(x_stride_t, tl.int64), x_stride_m, FIELDS, STEPS, MARK, JUMP_FIRST,
    )  # fmt: skip
    store_fields(ends_ptr + chunk * FIELDS * M + neurons, M, s, mask, FIELDS)
    tl.store(late_ptr + tile * chunks + chunk, 1)


@triton.jit(do_not_specialize=["T", "M", "chunk_steps", "chunks", "x_stride_t", "x_stride_m", "constants_stride"])
def repair_kernel(
    x_ptr, constants_ptr, before_ptr, after_ptr, changed_ptr, late_ptr, notes_ptr, spikes_ptr, words_ptr, states_ptr,
    T, M, chunk_steps, chunks, x_stride_t, x_stride_m, constants_stride,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, STEPS: tl.constexpr, MARK: tl.constexpr, CHECK: tl.constexpr,
    EVEN: tl.constexpr, PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """Run chunks again from the ends ``before``, as the launch before left them; the ends now go to ``after``.

    ``changed``: what that launch wrote as ``late``.
    """
    T = tl.cast(T, tl.int64)
    M = tl.cast(M, tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    neurons = tile * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1).to(tl.int64)
    mask = None if EVEN else neurons < M
    # the end stays unless another one is found; it is not kept in registers until then
    end = load_fields(before_ptr + chunk * FIELDS * M + neurons, M, mask, FIELDS)
    store_fields(after_ptr + chunk * FIELDS * M + neurons, M, end, mask, FIELDS)
    late = False
    again = tl.load(changed_ptr + tile * chunks + tl.maximum(chunk - 1, 0)) != 0
    if again & (chunk > 0):
        c = load_constants(constants_ptr, constants_stride, neurons, mask, PER_NEURON)
        s = load_fields(before_ptr + (chunk - 1) * FIELDS * M + neurons, M, mask, FIELDS)
        t = chunk * chunk_steps
        apart, s = follow(
            t, tl.minimum(t + chunk_steps, T), s, c, x_ptr, notes_ptr, spikes_ptr, words_ptr, states_ptr,
            neurons, mask, T, M, tl.cast(x_stride_t, tl.int64), x_stride_m, FIELDS, STEPS, MARK, CHECK, JUMP_FIRST,
        )  # fmt: skip
        if apart:
            store_fields(after_ptr + chunk * FIELDS * M + neurons, M, s, mask, FIELDS)
            late = differs(s, before_ptr + chunk * FIELDS * M + neurons, M, mask, FIELDS)
    tl.store(late_ptr + tile * chunks + chunk, late.to(tl.uint8))


@triton.jit(do_not_specialize=["T", "M", "chunk_steps", "chunks", "x_stride_t", "x_stride_m", "constants_stride"])
def settle_kernel(
    x_ptr, constants_ptr, final_ptr, before_ptr, ends_ptr, late_ptr, notes_ptr, spikes_ptr, words_ptr, states_ptr,
    T, M, chunk_steps, chunks, x_stride_t, x_stride_m, constants_stride,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, STEPS: tl.constexpr, MARK: tl.constexpr, CHECK: tl.constexpr,
    EVEN: tl.constexpr, PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """Run in order what went on from another end, ``before``, than the chunk before it has now; fill the final state."""
    T = tl.cast(T, tl.int64)
    M = tl.cast(M, tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    neurons = tile * BLOCK + tl.arange(0, BLOCK)
    mask = None if EVEN else neurons < M
    c = load_constants(constants_ptr, constants_stride, neurons, mask, PER_NEURON)
    again = False
    for chunk in range(1, chunks):
        chunk = tl.cast(chunk, tl.int64)
        late = tl.load(late_ptr + tile * chunks + chunk) != 0
        if again:
            t = chunk * chunk_steps
            s = load_fields(ends_ptr + (chunk - 1) * FIELDS * M + neurons, M, mask, FIELDS)
            apart, s = follow(
                t, tl.minimum(t + chunk_steps, T), s, c, x_ptr, notes_ptr, spikes_ptr, words_ptr, states_ptr,
                neurons, mask, T, M, tl.cast(x_stride_t, tl.int64), x_stride_m, FIELDS, STEPS, MARK, CHECK, JUMP_FIRST,
            )  # fmt: skip
            if apart:
                store_fields(ends_ptr + chunk * FIELDS * M + neurons, M, s, mask, FIELDS)
                late = differs(s, before_ptr + chunk * FIELDS * M + neurons, M, mask, FIELDS)
        again = late
    s = load_fields(ends_ptr + (tl.cast(chunks, tl.int64) - 1) * FIELDS * M + neurons, M, mask, FIELDS)
    store_fields(final_ptr + neurons, M, s, mask, FIELDS)


@triton.jit
def stretch_back(
    t, start, lam, c, notes_ptr,
    x_ptr, words_ptr, checkpoints_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
    neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
    FIELDS: tl.constexpr, EVERY: tl.constexpr, STEPS: tl.constexpr, CHECK: tl.constexpr,
    JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """Go back from the gradient by the state before step ``t`` to that before step ``start``, with all outputs and notes.

    ``start`` is a multiple of ``CHECK``, and ``t`` is one, or T. The gradient is noted at every multiple.
    """
    none = no_sums(lam.v)
    whole = tl.minimum(t, T // EVERY * EVERY)
    for back in range(0, t - whole):
        lam, _ = backward_single(
            t - 1 - tl.cast(back, tl.int64), lam, none, c,
            x_ptr, words_ptr, checkpoints_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
            neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
            FIELDS, EVERY, JUMP_FIRST, METHOD, False,
        )  # fmt: skip
    for back in range(0, (whole - start) // STEPS):
        before = whole - tl.cast(back, tl.int64) * STEPS
        if before % CHECK == 0:
            store_fields(notes_ptr + before // CHECK * NUM_FIELDS * M + neurons, M, lam, mask, NUM_FIELDS)
        lam, _ = backward_run(
            before - STEPS, lam, none, c,
            x_ptr, words_ptr, checkpoints_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
            neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
            FIELDS, EVERY, STEPS, JUMP_FIRST, METHOD, False,
        )  # fmt: skip
    return lam


@triton.jit
def follow_back(
    t, start, lam, c, notes_ptr,
    x_ptr, words_ptr, checkpoints_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
    neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
    FIELDS: tl.constexpr, EVERY: tl.constexpr, STEPS: tl.constexpr, CHECK: tl.constexpr,
    JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """Go back from ``t`` until the gradient has the noted bits; returns whether it had them nowhere, and the gradient."""
    apart = differs(lam, notes_ptr + t // CHECK * NUM_FIELDS * M + neurons, M, mask, NUM_FIELDS)
    while apart & (t > start):
        to = tl.maximum(t - CHECK, start)
        lam = stretch_back(
            t, to, lam, c, notes_ptr,
            x_ptr, words_ptr, checkpoints_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
            neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
            FIELDS, EVERY, STEPS, CHECK, JUMP_FIRST, METHOD,
        )  # fmt: skip
        t = to
        if t > start:
            apart = differs(lam, notes_ptr + t // CHECK * NUM_FIELDS * M + neurons, M, mask, NUM_FIELDS)
    return apart, lam


@triton.jit(
    do_not_specialize=[
        "T", "M", "chunk_steps", "chunks", "x_stride_t", "x_stride_m", "grad_stride_t", "grad_stride_m", "constants_stride",
    ]
)  # fmt: skip
def speculate_back_kernel(
    grad_final_ptr, ends_ptr, late_ptr, notes_ptr,
    x_ptr, words_ptr, checkpoints_ptr, constants_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
    T, M, chunk_steps, chunks, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m, constants_stride,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, EVERY: tl.constexpr, STEPS: tl.constexpr, CHECK: tl.constexpr,
    EVEN: tl.constexpr, PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """Go back through every chunk: the last one from the gradients that come in at its end, the others from a guess, 0."""
    T = tl.cast(T, tl.int64)
    M = tl.cast(M, tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    neurons = tile * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1).to(tl.int64)
    mask = None if EVEN else neurons < M
    c = load_constants(constants_ptr, constants_stride, neurons, mask, PER_NEURON)
    zeros = tl.zeros([BLOCK], constants_ptr.dtype.element_ty)
    lam = State(zeros, zeros, zeros)
    if chunk == chunks - 1:
        lam = last_adjoint(zeros, grad_final_ptr, grad_states_ptr, neurons, mask, T, M)
    start = chunk * chunk_steps
    lam = stretch_back(
        tl.minimum(start + chunk_steps, T), start, lam, c, notes_ptr,
        x_ptr, words_ptr, checkpoints_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
        neurons, mask, T, M, tl.cast(x_stride_t, tl.int64), x_stride_m, tl.cast(grad_stride_t, tl.int64), grad_stride_m,
        FIELDS, EVERY, STEPS, CHECK, JUMP_FIRST, METHOD,
    )  # fmt: skip
    store_fields(ends_ptr + chunk * NUM_FIELDS * M + neurons, M, lam, mask, NUM_FIELDS)
    tl.store(late_ptr + tile * chunks + chunk, 1)


@triton.jit(
    do_not_specialize=[
        "T", "M", "chunk_steps", "chunks", "x_stride_t", "x_stride_m", "grad_stride_t", "grad_stride_m", "constants_stride",
    ]
)  # fmt: skip
def repair_back_kernel(
    before_ptr, after_ptr, changed_ptr, late_ptr, notes_ptr,
    x_ptr, words_ptr, checkpoints_ptr, constants_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
    T, M, chunk_steps, chunks, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m, constants_stride,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, EVERY: tl.constexpr, STEPS: tl.constexpr, CHECK: tl.constexpr,
    EVEN: tl.constexpr, PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """As :func:`repair_kernel`: a chunk goes on from where the chunk after it came to."""
    T = tl.cast(T, tl.int64)
    M = tl.cast(M, tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    neurons = tile * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1).to(tl.int64)
    mask = None if EVEN else neurons < M
    end = load_fields(before_ptr + chunk * NUM_FIELDS * M + neurons, M, mask, NUM_FIELDS)
    store_fields(after_ptr + chunk * NUM_FIELDS * M + neurons, M, end, mask, NUM_FIELDS)
    late = False
    after = tl.minimum(chunk + 1, chunks - 1)
    again = tl.load(changed_ptr + tile * chunks + after) != 0
    if again & (chunk < after):
        c = load_constants(constants_ptr, constants_stride, neurons, mask, PER_NEURON)
        lam = state_of(load_fields(before_ptr + after * NUM_FIELDS * M + neurons, M, mask, NUM_FIELDS))
        start = chunk * chunk_steps
        apart, lam = follow_back(
            start + chunk_steps, start, lam, c, notes_ptr,
            x_ptr, words_ptr, checkpoints_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
            neurons, mask, T, M, tl.cast(x_stride_t, tl.int64), x_stride_m, tl.cast(grad_stride_t, tl.int64), grad_stride_m,
            FIELDS, EVERY, STEPS, CHECK, JUMP_FIRST, METHOD,
        )  # fmt: skip
        if apart:
            store_fields(after_ptr + chunk * NUM_FIELDS * M + neurons, M, lam, mask, NUM_FIELDS)
            late = differs(lam, before_ptr + chunk * NUM_FIELDS * M + neurons, M, mask, NUM_FIELDS)
    tl.store(late_ptr + tile * chunks + chunk, late.to(tl.uint8))


@triton.jit(
    do_not_specialize=[
        "T", "M", "chunk_steps", "chunks", "x_stride_t", "x_stride_m", "grad_stride_t", "grad_stride_m", "constants_stride",
    ]
)  # fmt: skip
def settle_back_kernel(
    grad_state_ptr, before_ptr, ends_ptr, late_ptr, notes_ptr,
    x_ptr, words_ptr, checkpoints_ptr, constants_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
    T, M, chunk_steps, chunks, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m, constants_stride,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, EVERY: tl.constexpr, STEPS: tl.constexpr, CHECK: tl.constexpr,
    EVEN: tl.constexpr, PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """As :func:`settle_kernel`, from the last chunk to the first; fills the gradient by the initial state."""
    T = tl.cast(T, tl.int64)
    M = tl.cast(M, tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    neurons = tile * BLOCK + tl.arange(0, BLOCK)
    mask = None if EVEN else neurons < M
    c = load_constants(constants_ptr, constants_stride, neurons, mask, PER_NEURON)
    again = False
    for back in range(1, chunks):
        chunk = chunks - 1 - tl.cast(back, tl.int64)
        late = tl.load(late_ptr + tile * chunks + chunk) != 0
        if again:
            start = chunk * chunk_steps
            lam = state_of(load_fields(ends_ptr + (chunk + 1) * NUM_FIELDS * M + neurons, M, mask, NUM_FIELDS))
            apart, lam = follow_back(
                start + chunk_steps, start, lam, c, notes_ptr,
                x_ptr, words_ptr, checkpoints_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
                neurons, mask, T, M, tl.cast(x_stride_t, tl.int64), x_stride_m, tl.cast(grad_stride_t, tl.int64),
                grad_stride_m, FIELDS, EVERY, STEPS, CHECK, JUMP_FIRST, METHOD,
            )  # fmt: skip
            if apart:
                store_fields(ends_ptr + chunk * NUM_FIELDS * M + neurons, M, lam, mask, NUM_FIELDS)
                late = differs(lam, before_ptr + chunk * NUM_FIELDS * M + neurons, M, mask, NUM_FIELDS)
        again = late
    lam = state_of(load_fields(ends_ptr + neurons, M, mask, NUM_FIELDS))
    store_fields(grad_state_ptr + neurons, M, lam, mask, NUM_FIELDS)
