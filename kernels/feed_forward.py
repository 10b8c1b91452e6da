"""Feed-forward populations: a whole time block in one launch, and its recomputing backward.

Arrays are time-major; neurons of all axes are flattened to one axis of length ``M``:

=============  ======================  ===========================================================================
x              ``[T, M]``, strided     net input; float, half or uint8
state          ``[F, M]``              fields of the state before the block
constants      ``[C, M]`` or [C, 1]    rows of ``Constants``; ``constants_stride`` is M or 1
spikes         ``[T, M]`` or None      in the element type of the array
words          ``[ceil(T/32), M]``     spikes packed along time, or None
states         ``[F, T, M]`` or None   the state after every step
checkpoints    ``[K, F, M]`` or None   the state before every ``STEPS``-th step, then before each of the rest
=============  ======================  ===========================================================================

One program owns ``BLOCK`` neurons for the whole block. With ``BLOCK`` equal to the number of threads, no layout
conversion, barrier or shared memory enters the time loop, whatever the sizes and alignments are.
"""

import triton
import triton.language as tl

from ..neuron.records import State
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
    split_input,
    state_of,
    store_fields,
    sweep,
    vjp_input,
)


@triton.jit
def load_rows(pointers, stride, mask, ROWS: tl.constexpr):
    """Consecutive time steps, one register each."""
    return load_fields(pointers, stride, mask, ROWS)


@triton.jit
def convert_spike(spike, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        spike = spike.to(tl.float32)  # Triton's interpreter converts a bool to bfloat16 wrongly
    return spike.to(dtype)


@triton.jit
def forward_steps(
    xs, t, s, word, c, spikes_ptr, words_ptr, states_ptr, neurons, mask, T, M,
    FIELDS: tl.constexpr, STEPS: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """Advance by ``STEPS`` steps from step ``t``; ``32 % STEPS == 0`` and ``t % STEPS == 0``, or ``STEPS == 1``."""
    for i in tl.static_range(STEPS):
        drive = split_input(xs[i].to(s[0].dtype))
        _, spike, s = advance(s, drive, None, None, None, c, JUMP_FIRST)
        row = (t + i) * M
        if words_ptr is not None:
            word = word | (spike.to(tl.int32) << ((t + i) % 32).to(tl.int32))
        if spikes_ptr is not None:
            tl.store(spikes_ptr + row + neurons, convert_spike(spike, spikes_ptr.dtype.element_ty), mask=mask)
        if states_ptr is not None:
            store_fields(states_ptr + row + neurons, T * M, s, mask, FIELDS)
    if words_ptr is not None:
        end = t + STEPS
        if (end % 32 == 0) | (end == T):
            tl.store(words_ptr + (t // 32) * M + neurons, word, mask=mask)
            word = tl.zeros_like(word)
    return s, word


@triton.jit(do_not_specialize=["T", "M", "x_stride_t", "x_stride_m", "constants_stride"])
def forward_kernel(
    x_ptr, state_ptr, constants_ptr, final_ptr, spikes_ptr, words_ptr, states_ptr, checkpoints_ptr,
    T, M, x_stride_t, x_stride_m, constants_stride,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """Simulate T steps. While ``STEPS`` steps are computed, the inputs of the next ones are on their way."""
    T = tl.cast(T, tl.int64)
    M = tl.cast(M, tl.int64)
    x_stride_t = tl.cast(x_stride_t, tl.int64)
    neurons = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = None if EVEN else neurons < M
    c = load_constants(constants_ptr, constants_stride, neurons, mask, PER_NEURON)
    s = load_fields(state_ptr + neurons, M, mask, FIELDS)
    word = tl.zeros([BLOCK], tl.int32)
    inputs = x_ptr + neurons * x_stride_m
    if checkpoints_ptr is not None:
        checkpoints_ptr += neurons

    whole = T // STEPS * STEPS
    # a block shorter than STEPS reads its first row again and again instead of rows that are not there
    ahead = load_rows(inputs, tl.where(whole > 0, x_stride_t, 0), mask, STEPS)
    for t in range(0, whole, STEPS):
        t = tl.cast(t, tl.int64)
        if checkpoints_ptr is not None:
            store_fields(checkpoints_ptr, M, s, mask, FIELDS)
            checkpoints_ptr += FIELDS * M
        xs = ahead
        # the last iteration reads its own rows again
        inputs += tl.where(t + 2 * STEPS <= T, STEPS * x_stride_t, 0)
        ahead = load_rows(inputs, x_stride_t, mask, STEPS)
        s, word = forward_steps(
            xs, t, s, word, c, spikes_ptr, words_ptr, states_ptr, neurons, mask, T, M, FIELDS, STEPS, JUMP_FIRST
        )
    inputs = x_ptr + neurons * x_stride_m + whole * x_stride_t
    for t in range(whole, T):
        t = tl.cast(t, tl.int64)
        if checkpoints_ptr is not None:
            store_fields(checkpoints_ptr, M, s, mask, FIELDS)
            checkpoints_ptr += FIELDS * M
        xs = load_rows(inputs, x_stride_t, mask, 1)
        inputs += x_stride_t
        s, word = forward_steps(
            xs, t, s, word, c, spikes_ptr, words_ptr, states_ptr, neurons, mask, T, M, FIELDS, 1, JUMP_FIRST
        )
    store_fields(final_ptr + neurons, M, s, mask, FIELDS)


@triton.jit
def replay_step(x, word, i, s, c, JUMP_FIRST: tl.constexpr):
    """One step again, with the stored spike instead of the threshold: the path that was simulated, always."""
    u, _, s = advance(s, split_input(x.to(s[0].dtype)), None, (word >> i) & 1, None, c, JUMP_FIRST)
    return u, s


@triton.jit
def load_word(words_ptr, t, M, neurons, mask):
    """The stored spikes from step ``t`` on, its own in bit 0."""
    return tl.load(words_ptr + (t // 32) * M + neurons, mask=mask) >> (t % 32).to(tl.int32)


@triton.jit
def backward_steps(
    t, s, lam, sums, c,
    x_ptr, words_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
    neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
    STEPS: tl.constexpr, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr, CONSTANTS_GRAD: tl.constexpr,
):  # fmt: skip
    """Replay ``STEPS`` steps in registers from the state before step ``t``, then sweep back through them."""
    xs = load_rows(x_ptr + t * x_stride_t + neurons * x_stride_m, x_stride_t, mask, STEPS)
    if grad_spikes_ptr is not None:
        grads = load_rows(grad_spikes_ptr + t * grad_stride_t + neurons * grad_stride_m, grad_stride_t, mask, STEPS)
    word = load_word(words_ptr, t, M, neurons, mask)

    befores = ()
    kepts = ()
    for i in tl.static_range(STEPS):
        before = s
        u, s = replay_step(xs[i], word, i, s, c, JUMP_FIRST)
        befores = befores + (before,)
        kepts = kepts + (keep(before, u),)

    for i in tl.static_range(STEPS - 1, -1, -1):
        x = xs[i].to(lam.v.dtype)
        z = ((word >> i) & 1).to(lam.v.dtype)
        if grad_spikes_ptr is not None:
            grad_z = grads[i].to(lam.v.dtype)
        else:
            grad_z = tl.zeros_like(lam.v)
        if grad_states_ptr is not None:
            before = t + i - 1
            # the initial state is not recorded; what is read in its stead is masked out
            in_range = neurons < tl.where(before >= 0, M, 0)
            rows = grad_states_ptr + tl.maximum(before, 0) * M + neurons
            recorded = State(
                tl.load(rows, mask=in_range, other=0.0),
                tl.load(rows + T * M, mask=in_range, other=0.0),
                tl.load(rows + 2 * T * M, mask=in_range, other=0.0),
            )
        else:
            recorded = None
        a = sweep(z, kepts[i], grad_z, lam, recorded, c, JUMP_FIRST, METHOD)
        if CONSTANTS_GRAD:
            decayed_e, decayed_i = decaying(state_of(befores[i]), split_input(x), None, JUMP_FIRST)
            sums = add_sums(sums, z, kepts[i], decayed_e, decayed_i, lam, a, c)
        if grad_x_ptr is not None:
            grad_x = vjp_input(x, a.drive)
            tl.store(grad_x_ptr + (t + i) * M + neurons, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        lam = a.lam
    return lam, sums


@triton.jit
def backward_run(
    t, lam, sums, c, x_ptr, words_ptr, checkpoints_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
    neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
    FIELDS: tl.constexpr, EVERY: tl.constexpr, STEPS: tl.constexpr, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
    CONSTANTS_GRAD: tl.constexpr,
):  # fmt: skip
    """Go back through the ``STEPS`` steps from ``t`` on, which are replayed from the checkpoint before them."""
    block = t // EVERY
    s = load_fields(checkpoints_ptr + block * FIELDS * M + neurons, M, mask, FIELDS)
    if EVERY > STEPS:
        for between in range(0, t - block * EVERY, STEPS):
            start = block * EVERY + tl.cast(between, tl.int64)
            xs = load_rows(x_ptr + start * x_stride_t + neurons * x_stride_m, x_stride_t, mask, STEPS)
            word = load_word(words_ptr, start, M, neurons, mask)
            for i in tl.static_range(STEPS):
                _, s = replay_step(xs[i], word, i, s, c, JUMP_FIRST)
    return backward_steps(
        t, s, lam, sums, c,
        x_ptr, words_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
        neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
        STEPS, JUMP_FIRST, METHOD, CONSTANTS_GRAD,
    )  # fmt: skip


@triton.jit
def backward_single(
    t, lam, sums, c, x_ptr, words_ptr, checkpoints_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
    neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
    FIELDS: tl.constexpr, EVERY: tl.constexpr, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
    CONSTANTS_GRAD: tl.constexpr,
):  # fmt: skip
    """Go back through step ``t`` after the last whole run of ``EVERY`` steps, where every step has a checkpoint."""
    s = load_fields(checkpoints_ptr + (T // EVERY + t % EVERY) * FIELDS * M + neurons, M, mask, FIELDS)
    return backward_steps(
        t, s, lam, sums, c,
        x_ptr, words_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
        neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
        1, JUMP_FIRST, METHOD, CONSTANTS_GRAD,
    )  # fmt: skip


@triton.jit
def last_adjoint(zeros, grad_final_ptr, grad_states_ptr, neurons, mask, T, M):
    """The gradient by the state after the last step."""
    lam = State(zeros, zeros, zeros)
    if grad_final_ptr is not None:
        lam = state_of(load_fields(grad_final_ptr + neurons, M, mask, NUM_FIELDS))
    if grad_states_ptr is not None:
        last = load_fields(grad_states_ptr + (T - 1) * M + neurons, T * M, mask, NUM_FIELDS)
        lam = State(lam.v + last[0], lam.g_e + last[1], lam.g_i + last[2])
    return lam


@triton.jit(
    do_not_specialize=[
        "T", "M", "x_stride_t", "x_stride_m", "grad_stride_t", "grad_stride_m", "constants_stride",
    ]
)  # fmt: skip
def backward_kernel(
    x_ptr, words_ptr, checkpoints_ptr, constants_ptr, grad_spikes_ptr, grad_final_ptr, grad_states_ptr,
    grad_x_ptr, grad_state_ptr, grad_constants_ptr,
    T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m, constants_stride,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, EVERY: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """Gradients by input, initial state and constants, in one sweep back through time.

    ``grad_spikes`` [T, M] strided, ``grad_final`` [F, M], ``grad_states`` [F, T, M]: incoming, None where absent;
    ``grad_state`` [F, M]; ``grad_x`` [T, M] and ``grad_constants`` [S, M], the sums over time for each neuron, are None
    where not wanted. The rows of the state that have a derivative are the first three, those of ``State``.
    ``EVERY`` is the forward launch's ``STEPS``; ``STEPS`` divides it: so many steps are held in registers at a time.
    """
    T = tl.cast(T, tl.int64)
    M = tl.cast(M, tl.int64)
    x_stride_t = tl.cast(x_stride_t, tl.int64)
    grad_stride_t = tl.cast(grad_stride_t, tl.int64)
    neurons = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = None if EVEN else neurons < M
    c = load_constants(constants_ptr, constants_stride, neurons, mask, PER_NEURON)
    zeros = tl.zeros([BLOCK], constants_ptr.dtype.element_ty)
    sums = no_sums(zeros)
    lam = last_adjoint(zeros, grad_final_ptr, grad_states_ptr, neurons, mask, T, M)

    whole = T // EVERY * EVERY
    for back in range(0, T - whole):
        lam, sums = backward_single(
            T - 1 - tl.cast(back, tl.int64), lam, sums, c,
            x_ptr, words_ptr, checkpoints_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
            neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
            FIELDS, EVERY, JUMP_FIRST, METHOD, grad_constants_ptr is not None,
        )  # fmt: skip
    for back in range(0, whole // STEPS):
        lam, sums = backward_run(
            whole - (tl.cast(back, tl.int64) + 1) * STEPS, lam, sums, c,
            x_ptr, words_ptr, checkpoints_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
            neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
            FIELDS, EVERY, STEPS, JUMP_FIRST, METHOD, grad_constants_ptr is not None,
        )  # fmt: skip
    store_fields(grad_state_ptr + neurons, M, lam, mask, NUM_FIELDS)
    if grad_constants_ptr is not None:
        store_fields(grad_constants_ptr + neurons, M, sums, mask, NUM_SUMS)
