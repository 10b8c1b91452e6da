"""Feed-forward populations: a whole time block in one launch, and its recomputing backward.

Arrays are time-major; neurons of all axes are flattened to one axis of length ``M``:

=============  ======================  ===========================================================================
x              ``[T, M]``, strided     net input; float, half or uint8
state          ``[3, M]``              v, g_e, g_i before the block
constants      ``[10, M]`` or [10, 1]  rows of ``step.Constants``; ``constants_stride`` is M or 1
spikes         ``[T, M]`` or None      in the element type of the array
words          ``[ceil(T/32), M]``     spikes packed along time, or None
states         ``[3, T, M]`` or None   the state after every step
checkpoints    ``[C, 3, M]`` or None   the state before every ``STEPS``-th step, then before each of the rest
=============  ======================  ===========================================================================

One program owns ``BLOCK`` neurons for the whole block. With ``BLOCK`` equal to the number of threads, no layout
conversion, barrier or shared memory enters the time loop, whatever the sizes and alignments are.
"""

import triton
import triton.language as tl

from .step import NUM_CONSTANTS, Constants, integrate, relu, reset, vjp, vjp_constants


@triton.jit
def load_constants(constants_ptr, stride, neurons, mask, PER_NEURON: tl.constexpr):
    """The constants as scalars, or per neuron."""
    values = ()
    for row in tl.static_range(NUM_CONSTANTS):
        if PER_NEURON:
            value = tl.load(constants_ptr + row * stride + neurons, mask=mask, other=None if mask is None else 1.0)
        else:
            value = tl.load(constants_ptr + row)
        values = values + (value,)
    return Constants(
        values[0], values[1], values[2], values[3], values[4], values[5], values[6], values[7], values[8], values[9]
    )


@triton.jit
def load_rows(pointers, stride, mask, ROWS: tl.constexpr):
    """Consecutive time steps, one register each."""
    rows = ()
    for i in tl.static_range(ROWS):
        rows = rows + (tl.load(pointers + i * stride, mask=mask),)
    return rows


@triton.jit
def load_state(pointers, stride, mask):
    """v, g_e, g_i, ``stride`` elements apart."""
    return (
        tl.load(pointers, mask=mask),
        tl.load(pointers + stride, mask=mask),
        tl.load(pointers + 2 * stride, mask=mask),
    )


@triton.jit
def store_state(pointers, stride, v, g_e, g_i, mask):
    tl.store(pointers, v, mask=mask)
    tl.store(pointers + stride, g_e, mask=mask)
    tl.store(pointers + 2 * stride, g_i, mask=mask)


@triton.jit
def convert_spike(spike, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        spike = spike.to(tl.float32)  # Triton's interpreter converts a bool to bfloat16 wrongly
    return spike.to(dtype)


@triton.jit
def forward_steps(
    xs, t, v, g_e, g_i, word, c, spikes_ptr, words_ptr, states_ptr, neurons, mask, T, M,
    STEPS: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """Advance by ``STEPS`` steps from step ``t``; ``32 % STEPS == 0`` and ``t % STEPS == 0``, or ``STEPS == 1``."""
    for i in tl.static_range(STEPS):
        x = xs[i].to(v.dtype)
        u, g_e, g_i = integrate(v, g_e, g_i, relu(x), relu(-x), None, None, c, JUMP_FIRST)
        spike = (u - c.v_thresh) > 0.0
        v = reset(u, spike.to(v.dtype), c)
        row = (t + i) * M
        if words_ptr is not None:
            word = word | (spike.to(tl.int32) << ((t + i) % 32).to(tl.int32))
        if spikes_ptr is not None:
            tl.store(spikes_ptr + row + neurons, convert_spike(spike, spikes_ptr.dtype.element_ty), mask=mask)
        if states_ptr is not None:
            store_state(states_ptr + row + neurons, T * M, v, g_e, g_i, mask)
    if words_ptr is not None:
        end = t + STEPS
        if (end % 32 == 0) | (end == T):
            tl.store(words_ptr + (t // 32) * M + neurons, word, mask=mask)
            word = tl.zeros_like(word)
    return v, g_e, g_i, word


@triton.jit(do_not_specialize=["T", "M", "x_stride_t", "x_stride_m", "constants_stride"])
def forward_kernel(
    x_ptr, state_ptr, constants_ptr, final_ptr, spikes_ptr, words_ptr, states_ptr, checkpoints_ptr,
    T, M, x_stride_t, x_stride_m, constants_stride,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr,
):  # fmt: skip
    """Simulate T steps. While ``STEPS`` steps are computed, the inputs of the next ones are on their way."""
    T = tl.cast(T, tl.int64)
    M = tl.cast(M, tl.int64)
    x_stride_t = tl.cast(x_stride_t, tl.int64)
    neurons = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = None if EVEN else neurons < M
    c = load_constants(constants_ptr, constants_stride, neurons, mask, PER_NEURON)
    v, g_e, g_i = load_state(state_ptr + neurons, M, mask)
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
            store_state(checkpoints_ptr, M, v, g_e, g_i, mask)
            checkpoints_ptr += 3 * M
        xs = ahead
        # the last iteration reads its own rows again
        inputs += tl.where(t + 2 * STEPS <= T, STEPS * x_stride_t, 0)
        ahead = load_rows(inputs, x_stride_t, mask, STEPS)
        v, g_e, g_i, word = forward_steps(
            xs, t, v, g_e, g_i, word, c, spikes_ptr, words_ptr, states_ptr, neurons, mask, T, M, STEPS, JUMP_FIRST
        )
    inputs = x_ptr + neurons * x_stride_m + whole * x_stride_t
    for t in range(whole, T):
        t = tl.cast(t, tl.int64)
        if checkpoints_ptr is not None:
            store_state(checkpoints_ptr, M, v, g_e, g_i, mask)
            checkpoints_ptr += 3 * M
        xs = load_rows(inputs, x_stride_t, mask, 1)
        inputs += x_stride_t
        v, g_e, g_i, word = forward_steps(
            xs, t, v, g_e, g_i, word, c, spikes_ptr, words_ptr, states_ptr, neurons, mask, T, M, 1, JUMP_FIRST
        )
    store_state(final_ptr + neurons, M, v, g_e, g_i, mask)


@triton.jit
def replay_step(x, word, i, v, g_e, g_i, c, JUMP_FIRST: tl.constexpr):
    """One step again, with the stored spike instead of the threshold: the path that was simulated, always."""
    u, g_e, g_i = integrate(v, g_e, g_i, relu(x), relu(-x), None, None, c, JUMP_FIRST)
    return u, reset(u, ((word >> i) & 1).to(v.dtype), c), g_e, g_i


@triton.jit
def load_word(words_ptr, t, M, neurons, mask):
    """The stored spikes from step ``t`` on, its own in bit 0."""
    return tl.load(words_ptr + (t // 32) * M + neurons, mask=mask) >> (t % 32).to(tl.int32)


@triton.jit
def backward_steps(
    t, v, g_e, g_i, lam_v, lam_e, lam_i, acc, c,
    x_ptr, words_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
    neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
    STEPS: tl.constexpr, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr, CONSTANTS_GRAD: tl.constexpr,
):  # fmt: skip
    """Replay ``STEPS`` steps in registers from the state before step ``t``, then sweep back through them."""
    xs = load_rows(x_ptr + t * x_stride_t + neurons * x_stride_m, x_stride_t, mask, STEPS)
    if grad_spikes_ptr is not None:
        grads = load_rows(grad_spikes_ptr + t * grad_stride_t + neurons * grad_stride_m, grad_stride_t, mask, STEPS)
    word = load_word(words_ptr, t, M, neurons, mask)

    us = ()
    vs = (v,)
    ges = (g_e,)
    gis = (g_i,)
    for i in tl.static_range(STEPS):
        u, v, g_e, g_i = replay_step(xs[i].to(v.dtype), word, i, v, g_e, g_i, c, JUMP_FIRST)
        us = us + (u,)
        vs = vs + (v,)
        ges = ges + (g_e,)
        gis = gis + (g_i,)

    for i in tl.static_range(STEPS - 1, -1, -1):
        x = xs[i].to(v.dtype)
        z = ((word >> i) & 1).to(v.dtype)
        if grad_spikes_ptr is not None:
            grad_z = grads[i].to(v.dtype)
        else:
            grad_z = tl.zeros_like(v)
        if grad_states_ptr is not None:
            before = t + i - 1
            # the initial state is not recorded; what is read in its stead is masked out
            recorded = neurons < tl.where(before >= 0, M, 0)
            rows = grad_states_ptr + tl.maximum(before, 0) * M + neurons
            in_v = tl.load(rows, mask=recorded, other=0.0)
            in_e = tl.load(rows + T * M, mask=recorded, other=0.0)
            in_i = tl.load(rows + 2 * T * M, mask=recorded, other=0.0)
        else:
            in_v = None
            in_e = None
            in_i = None
        a = vjp(
            z, us[i], vs[i], ges[i + 1], gis[i + 1], grad_z, lam_v, lam_e, lam_i, in_v, in_e, in_i, c,
            JUMP_FIRST, METHOD,
        )  # fmt: skip
        if CONSTANTS_GRAD:
            decayed_e = ges[i]
            decayed_i = gis[i]
            if JUMP_FIRST:
                decayed_e = decayed_e + relu(x)
                decayed_i = decayed_i + relu(-x)
            acc = vjp_constants(acc, z, vs[i], ges[i + 1], gis[i + 1], decayed_e, decayed_i, lam_v, a, c)
        if grad_x_ptr is not None:
            grad_x = tl.where(x > 0.0, a.drive_e, 0.0) - tl.where(x < 0.0, a.drive_i, 0.0)
            tl.store(grad_x_ptr + (t + i) * M + neurons, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        lam_v = a.lam_v
        lam_e = a.lam_e
        lam_i = a.lam_i
    return lam_v, lam_e, lam_i, acc


@triton.jit(
    do_not_specialize=[
        "T", "M", "x_stride_t", "x_stride_m", "grad_stride_t", "grad_stride_m", "constants_stride",
    ]
)  # fmt: skip
def backward_kernel(
    x_ptr, words_ptr, checkpoints_ptr, constants_ptr, grad_spikes_ptr, grad_final_ptr, grad_states_ptr,
    grad_x_ptr, grad_state_ptr, grad_constants_ptr,
    T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m, constants_stride,
    BLOCK: tl.constexpr, EVERY: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    PER_NEURON: tl.constexpr, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """Gradients by input, initial state and constants, in one sweep back through time.

    ``grad_spikes`` [T, M] strided, ``grad_final`` [3, M], ``grad_states`` [3, T, M]: incoming, None where absent;
    ``grad_x`` [T, M] and ``grad_constants`` [10, M] (sums over time for each neuron): None where not wanted.
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
    acc = Constants(zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    lam_v = zeros
    lam_e = zeros
    lam_i = zeros
    if grad_final_ptr is not None:
        lam_v, lam_e, lam_i = load_state(grad_final_ptr + neurons, M, mask)
    if grad_states_ptr is not None:
        last_v, last_e, last_i = load_state(grad_states_ptr + (T - 1) * M + neurons, T * M, mask)
        lam_v += last_v
        lam_e += last_e
        lam_i += last_i

    blocks = T // EVERY
    whole = blocks * EVERY
    for back in range(0, T - whole):
        t = T - 1 - tl.cast(back, tl.int64)
        v, g_e, g_i = load_state(checkpoints_ptr + (blocks + (t - whole)) * 3 * M + neurons, M, mask)
        lam_v, lam_e, lam_i, acc = backward_steps(
            t, v, g_e, g_i, lam_v, lam_e, lam_i, acc, c,
            x_ptr, words_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
            neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
            1, JUMP_FIRST, METHOD, grad_constants_ptr is not None,
        )  # fmt: skip
    for back in range(0, whole // STEPS):
        t = whole - (tl.cast(back, tl.int64) + 1) * STEPS
        block = t // EVERY
        v, g_e, g_i = load_state(checkpoints_ptr + block * 3 * M + neurons, M, mask)
        if EVERY > STEPS:
            for between in range(0, t - block * EVERY, STEPS):
                start = block * EVERY + tl.cast(between, tl.int64)
                xs = load_rows(x_ptr + start * x_stride_t + neurons * x_stride_m, x_stride_t, mask, STEPS)
                word = load_word(words_ptr, start, M, neurons, mask)
                for i in tl.static_range(STEPS):
                    _, v, g_e, g_i = replay_step(xs[i].to(v.dtype), word, i, v, g_e, g_i, c, JUMP_FIRST)
        lam_v, lam_e, lam_i, acc = backward_steps(
            t, v, g_e, g_i, lam_v, lam_e, lam_i, acc, c,
            x_ptr, words_ptr, grad_spikes_ptr, grad_states_ptr, grad_x_ptr,
            neurons, mask, T, M, x_stride_t, x_stride_m, grad_stride_t, grad_stride_m,
            STEPS, JUMP_FIRST, METHOD, grad_constants_ptr is not None,
        )  # fmt: skip
    store_state(grad_state_ptr + neurons, M, lam_v, lam_e, lam_i, mask)
    if grad_constants_ptr is not None:
        for row in tl.static_range(NUM_CONSTANTS):
            tl.store(grad_constants_ptr + row * M + neurons, acc[row], mask=mask)
