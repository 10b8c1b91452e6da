"""The public functions: single steps and whole sequences, feed-forward and recurrent."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .backend import reference
from .backend.choose import choose_backend
from .neuron.records import (
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    CobaLIFState,
    FeedForwardState,
    RecurrentState,
    feed_forward_state,
    numbers_of,
    recurrent_state,
)
from .ops import operators, sparse_operators, time_blocks, validation
from .ops.call import Call, Connections, Weights, check_spikes_under_way
from .ops.constants import constants_table, derive_constants, memory_in_steps
from .ops.grid import Grid, grid_of
from .ops.spikes import WORD_BITS, pack_spikes, word_count
from .ops.synapses import Synapses
from .ops.tensors import as_in_memory, is_refractory, is_watched, keep, known, number_key, numbers_on
from .ops.validation import SpikeDtype
from .ops.wiring import Wiring, connect, is_sparse

FEED_FORWARD_FIELDS = CobaLIFFeedForwardState._fields
RECURRENT_FIELDS = CobaLIFState._fields

AnyState = TypeVar("AnyState", FeedForwardState, RecurrentState)


def default_spike_dtype(x: Tensor, compute_dtype: torch.dtype, weights: Sequence[Tensor] = ()) -> torch.dtype:
    """The dtype of an input of numbers; of one of bytes or integers, that of half-precision weights or of the state."""
    if x.is_floating_point():
        return x.dtype
    if weights and compute_dtype == torch.float32:
        return functools.reduce(torch.promote_types, (w.dtype for w in weights))
    return compute_dtype


def _state_fields(state: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    return {} if state is None else {f"state.{name}": getattr(state, name) for name in fields if hasattr(state, name)}


def _tensors(p: Any) -> dict[str, Any]:
    """The numbers of a parameter record that are not known to be Python numbers."""
    return {} if number_key(p) is not None else numbers_of(p)


def _is_wide(x: Tensor, values: list[Any], shape: torch.Size) -> bool:
    """Whether eager PyTorch would promote to float64: single numbers do not promote whole arrays."""
    return x.dtype == torch.float64 or any(
        isinstance(value, Tensor) and value.dtype == torch.float64 and (value.dim() > 0 or not shape) for value in values
    )


def _side_by_side(x: Tensor, neurons: torch.Size, fields: list[Any], values: list[Any]) -> Tensor:
    """The fields of a state as one tensor ``[F, *neurons]`` of the compute dtype, which they and ``values`` decide."""
    dtype = torch.float64 if _is_wide(x, [*fields, *values], neurons) else torch.float32
    fields = [known(field) if isinstance(field, Tensor) else field for field in fields]
    singles = numbers_on(x.device, dtype, [0.0 if isinstance(field, Tensor) else field for field in fields])
    if not any(isinstance(field, Tensor) for field in fields):
        return singles.reshape(-1, *(1,) * len(neurons)).expand(-1, *neurons)
    tensors = [
        field.to(device=x.device, dtype=dtype) if isinstance(field, Tensor) else single
        for field, single in zip(fields, singles.unbind(), strict=True)
    ]
    return torch.stack([tensor.expand(neurons) for tensor in tensors])


def _given(state: Any, fields: tuple[str, ...], p: Any) -> list[Any]:
    """The fields of a state, or of that at rest."""
    if state is None:
        return [p.v_rest if name == "v" else 0.0 for name in fields]
    return [getattr(state, name, 0.0) if name == "left" else getattr(state, name) for name in fields]


def initial_feed_forward_state(x: Tensor, state: Any, p: Any, dt: float, step_shape: torch.Size) -> Tensor:
    """Check the arguments of a call; returns its state ``[F, *neurons]``."""
    fields = (*FEED_FORWARD_FIELDS, "left") if is_refractory(p, state) else FEED_FORWARD_FIELDS

    def make(state: Any) -> Tensor:
        validation.check_parameters(p)
        if state is not None:
            validation.check_state(state, FEED_FORWARD_FIELDS, x.device)
        numbers = _tensors(p)
        neurons = validation.broadcast_neurons(step_shape, _state_fields(state, fields) | numbers)
        given = _given(state, fields, p)
        validation.warn_if_unstable(p, dt, given[1], given[2])
        return _side_by_side(x, neurons, given, list(numbers.values()))

    if (key := number_key(p)) is None:
        return make(state)
    if state is None:
        made_for = key, p.method, dt, step_shape, x.dtype == torch.float64, x.device
        return keep(made_for, x.device, lambda: make(None))
    values: list[Any] = [getattr(state, name, None) for name in fields]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for field in values:
        dense = type(field) is Tensor and field.layout is torch.strided and not field.is_nested
        if not (dense and field.shape == step_shape and field.dtype == dtype and field.device == x.device):
            return make(state)
    validation.check_parameters(p)
    validation.warn_if_unstable(p, dt, values[1], values[2])
    return torch.stack(values)


def initial_recurrent_state(
    x: Tensor, state: Any, input_weights: Any, recurrent_weights: Any, p: Any, dt: float, step_shape: torch.Size
) -> Tensor:
    """Check the arguments of a call; returns its last spikes and its state, ``[1 + F, *batch, N]``."""
    fields = (*RECURRENT_FIELDS, "left") if is_refractory(p, state) else RECURRENT_FIELDS
    validation.check_parameters(p)
    validation.check_weights(input_weights, recurrent_weights, x, step_shape[-1])
    neurons = torch.Size([*step_shape[:-1], input_weights.shape[0]])
    if state is not None:
        validation.check_state(state, RECURRENT_FIELDS, x.device)
    numbers = _tensors(p)
    validation.broadcast_neurons(neurons, _state_fields(state, fields) | numbers, grows=False)
    given = _given(state, fields, p)
    validation.warn_if_unstable(p, dt, given[2], given[3])
    return _side_by_side(x, neurons, given, [input_weights, recurrent_weights, *numbers.values()])


def coba_lif_feed_forward_step(
    input_tensor: Tensor,
    state: Any,
    p: Any = CobaLIFParameters(),  # noqa: B008 - an immutable record
    dt: float = 0.001,
) -> tuple[Tensor, FeedForwardState]:
    """One step of unconnected conductance-based LIF neurons, in eager PyTorch.

    Equations: see :func:`coba_lif_feed_forward_integral`, of which this is one step in the order ``decay_first``.

    Args:
        input_tensor: net input in uS, ``[*shape]``: what is positive joins g_e, what is negative g_i.
        state: ``v`` in mV, ``g_e`` and ``g_i`` in uS, each a number or a tensor that broadcasts; None starts at rest.
        p: parameters, see :class:`CobaLIFParameters`.
        dt: time step in ms.

    Returns:
        The spikes, 0 or 1 in the input's floating dtype, and the new state.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes do not broadcast, devices differ, ``dt`` is not positive, or the method is unknown.

    Example:
        >>> z, state = coba_lif_feed_forward_step(torch.ones(3), None, dt=0.1)
        >>> state.g_e
        tensor([1., 1., 1.])
    """
    validation.check_input(input_tensor, "[...]", 0)
    dt = validation.check_dt(dt)
    before = initial_feed_forward_state(input_tensor, state, p, dt, input_tensor.shape)
    c = derive_constants(p, dt, before.dtype, input_tensor.device)
    x = input_tensor.to(before.dtype).expand(before.shape[1:])
    z, *after = _fields_after(reference.feed_forward_step(x, feed_forward_state(*before.unbind()), c, False, p.method))
    return z.to(default_spike_dtype(input_tensor, before.dtype)), feed_forward_state(*after)


def coba_lif_step(
    input_tensor: Tensor,
    state: Any,
    input_weights: Tensor | Synapses,
    recurrent_weights: Tensor | Synapses,
    p: Any = CobaLIFParameters(),  # noqa: B008 - an immutable record
    dt: float = 0.001,
    *,
    delay: Any = None,
) -> tuple[Tensor, RecurrentState]:
    """One step of a recurrent population of conductance-based LIF neurons, in eager PyTorch.

    Equations: see :func:`coba_lif_integral`, of which this is one step in the order ``decay_first``.

    Args:
        input_tensor: input spikes or currents, ``[*batch, I]``.
        state: ``z`` (last spikes), ``v`` in mV, ``g_e`` and ``g_i`` in uS, each a number or a tensor that broadcasts
            to ``[*batch, N]``; None starts at rest.
        input_weights: in uS, ``[N, I]``; a positive weight is an excitatory synapse, a negative one inhibitory. Dense or
            sparse, as in :func:`coba_lif_integral`.
        recurrent_weights: in uS, ``[N, N]``, rows post-synaptic; likewise.
        p: parameters, see :class:`CobaLIFParameters`.
        dt: time step in ms.
        delay: as in :func:`coba_lif_integral`.

    Returns:
        The spikes, 0 or 1 in the input's floating dtype, and the new state.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes do not fit, devices differ, ``dt`` is not positive, or the method is unknown.

    Example:
        >>> z, state = coba_lif_step(torch.ones(3), None, torch.ones(2, 3), torch.zeros(2, 2), dt=0.1)
        >>> state.g_e
        tensor([3., 3.])
    """
    validation.check_input(input_tensor, "[*batch, I]", 1)
    dt = validation.check_dt(dt)
    if is_sparse(input_weights, recurrent_weights, delay):
        validation.check_not_exported()
        wiring = connect(input_tensor, input_weights, recurrent_weights, delay, dt)
        spikes, done = _sparse_integral(
            input_tensor.unsqueeze(0), state, wiring, p, dt, Call("reference", method=p.method), None, None
        )
        return spikes.squeeze(0), done
    before = initial_recurrent_state(input_tensor, state, input_weights, recurrent_weights, p, dt, input_tensor.shape)
    dtype = before.dtype
    c = derive_constants(p, dt, dtype, input_tensor.device)
    given = cast("tuple[Tensor, Tensor]", (input_weights, recurrent_weights))
    w = reference.SplitWeights.of(*(weights.to(dtype) for weights in given))
    s = recurrent_state(*before.unbind())
    z, *after = _fields_after(reference.recurrent_step(input_tensor.to(dtype), s.z, s, w, c, False, p.method))
    return z.to(default_spike_dtype(input_tensor, dtype, given)), recurrent_state(z, *after)


def check_sequence(
    x: Any, axes: str, rank: int, order: Any, block_steps: Any, record_states: Any, spike_dtype: SpikeDtype
) -> int | None:
    """Returns ``block_steps``."""
    validation.check_input(x, axes, rank)
    validation.check_order(order)
    validation.check_flag(record_states, "record_states")
    steps = validation.check_block_steps(block_steps)
    validation.check_spike_dtype(spike_dtype, steps)
    return steps


def _fields_after(done: reference.Step) -> list[Tensor]:
    """The spikes of a step, then the fields of the state after it."""
    return [done.z, *done.state] if done.left is None else [done.z, *done.state, done.left]


def run_reference(
    step: Callable[[Tensor, AnyState], reference.Step], xs: Tensor, state: AnyState, record_states: bool
) -> tuple[list[Tensor], AnyState]:
    """Loop ``step`` over time; returns the spikes of every step and the final or the stacked state."""
    spikes: list[Tensor] = []
    trace: list[AnyState] = []
    for x in xs.unbind(0):
        z, *after = _fields_after(step(x, state))
        state = type(state)(z, *after) if "z" in state._fields else type(state)(*after)
        spikes.append(z)
        if record_states:
            trace.append(state)
    if record_states:
        fields = zip(*trace, strict=True) if trace else ((),) * len(state)
        state = type(state)(*(_stack(list(rows), initial) for rows, initial in zip(fields, state, strict=True)))
    else:  # not what was given, nor what autograd has saved: it may be edited in place
        state = type(state)(*(torch.clone(torch.as_tensor(field)) for field in state))
    return spikes, state


def _stack(rows: list[Any], like: Any) -> Tensor:
    return torch.stack(rows) if rows else like.new_empty(0, *like.shape)


def format_spikes(rows: list[Tensor], like: Tensor, spike_dtype: SpikeDtype, default: torch.dtype) -> Tensor:
    spikes = _stack(rows, like)
    if spike_dtype == "bits":
        return pack_spikes(spikes)
    return spikes.to(spike_dtype or default)


def _spikes_format(
    steps: int, neurons: torch.Size, spike_dtype: SpikeDtype, default: torch.dtype
) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of the spikes of a sequence."""
    if spike_dtype == "bits":
        return torch.Size([word_count(steps), *neurons]), torch.int32
    return torch.Size([steps, *neurons]), spike_dtype or default


def _into(out: Tensor | None, spikes: Tensor) -> Tensor:
    return spikes if out is None else out.copy_(spikes)


def coba_lif_feed_forward_integral(
    input_tensor: Tensor,
    state: Any = None,
    p: Any = CobaLIFParameters(),  # noqa: B008 - an immutable record
    dt: float = 0.001,
    *,
    order: str = "decay_first",
    backend: str = "auto",
    block_steps: int | None = None,
    record_states: bool = False,
    spike_dtype: SpikeDtype = None,
    out: Tensor | None = None,
    time_chunks: int | None = None,
) -> tuple[Tensor, FeedForwardState]:
    """Unconnected conductance-based LIF neurons over a whole sequence.

    Every step does, in this order (``jump_first``: the input is added before the decay)::

        g_e = (g_e + (-dt tau_syn_exc_inv) g_e) + relu(x)
        g_i = (g_i + (-dt tau_syn_inh_inv) g_i) + relu(-x)
        u   = v + (dt c_m_inv) ((g_l (v_rest - v) + g_e (e_rev_E - k v)) + g_i (e_rev_I - k v))
        z   = 1 where u - v_thresh > 0, else 0
        v   = (1 - z) u + z v_reset

    where k is ``p.conductance_based``: 1, or 0 where synapses are currents, and uS are nA.

    Differentiable by the input, the initial state and the nine numeric parameters, from gradients on spikes and
    states; the spike's derivative is ``p.method`` (:mod:`coba_triton.neuron.surrogate`). The fused backends keep one bit a
    spike and the state every 8 or 16 steps, and recompute the rest in the backward.

    Source: norse's documented ``coba_lif`` equations, doi:10.5281/zenodo.4422025.

    Args:
        input_tensor: net input in uS, ``[T, *shape]``, floating, bool or integer; what is positive joins g_e, what is
            negative g_i.
        state: ``v`` in mV, ``g_e`` and ``g_i`` in uS, each a number or a tensor that broadcasts; None starts at
            ``v = v_rest`` without conductance.
        p: parameters, see :class:`CobaLIFParameters`; tensors broadcast over the neurons.
        dt: time step in ms.
        order: ``decay_first``, or ``jump_first`` as norse's feed-forward step has it.
        backend: ``auto``, ``reference``, ``triton`` or ``cpu``; all give the same bits.
        block_steps: steps in one launch; None, or recorded states, for all of them. Changes no result.
        record_states: return the state of every step, ``[T, *shape]`` a field, instead of the final one.
        spike_dtype: a floating dtype, ``torch.bool``, ``torch.uint8``, ``"bits"`` for spikes packed along time
            (:func:`coba_triton.unpack_spikes`), or None. With None, spikes have the dtype of a floating input. If the input
            is bool or integer, they have the dtype of the state.
        out: contiguous buffer that takes the spikes and is returned, apart in memory from all arguments; not for
            training. Reusing one in a loop saves the first touch of new memory, which costs a CPU more than the neurons
            do.
        time_chunks: into how many chunks the time is cut, which are simulated side by side. None for a choice, which cuts
            long runs of few neurons where that pays: on a GPU only if all parameters are Python numbers, as the host reads
            no tensor there. 1 for a run in order. Changes no result.

    Returns:
        Spikes ``[T, *shape]`` and the state; float32 unless an array among the arguments is float64.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes do not broadcast, devices differ, or an argument's value is unknown.
        RuntimeError: if the backend that was asked for cannot serve.

    Example:
        >>> spikes, state = coba_lif_feed_forward_integral(torch.full((1000, 4), 0.2), dt=0.1)
        >>> spikes.shape
        torch.Size([1000, 4])
    """
    block_steps = check_sequence(input_tensor, "[T, ...]", 1, order, block_steps, record_states, spike_dtype)
    time_chunks = validation.check_time_chunks(time_chunks)
    dt = validation.check_dt(dt)
    steps, device = input_tensor.shape[0], input_tensor.device
    initial = initial_feed_forward_state(input_tensor, state, p, dt, input_tensor.shape[1:])
    neurons, dtype = initial.shape[1:], initial.dtype
    default = default_spike_dtype(input_tensor, dtype)
    jump_first = order == "jump_first"
    if out is not None:
        wanted = _spikes_format(steps, neurons, spike_dtype, default)
        inputs = {"input_tensor": input_tensor, **_state_fields(state, FEED_FORWARD_FIELDS), **numbers_of(p)}
        validation.check_out(out, *wanted, inputs)

    backend = choose_backend(backend, device)
    validation.check_exported(backend)
    if backend == "reference":
        c = derive_constants(p, dt, dtype, device)
        rows, final = run_reference(
            lambda x, s: reference.feed_forward_step(x, s, c, jump_first, p.method),
            _expand_input(input_tensor, neurons).to(dtype),
            feed_forward_state(*initial.unbind()),
            record_states,
        )
        return _into(out, format_spikes(rows, initial[0], spike_dtype, default)), final
    written = None if spike_dtype == "bits" else spike_dtype or default
    every = operators.checkpoint_interval(dtype, backend, neurons.numel())
    call = Call(
        backend,
        jump_first,
        p.method,
        written,
        record_states,
        block_steps,
        checkpoint_every=every,
        time_chunks=time_chunks,
        memory=memory_in_steps(p, dt),
    )
    x = flat_input(input_tensor, neurons, dtype)
    return _run_operator(x, initial, constants_table(p, dt, dtype, device, neurons), call, out)


def kernel_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half precision and bytes are read as they are; everything else comes in the compute dtype."""
    x = as_in_memory(x)
    return x if x.dtype in (torch.float16, torch.bfloat16, torch.bool, torch.uint8) else x.to(dtype)


def _expand_input(x: Tensor, neurons: torch.Size) -> Tensor:
    """``[T, *shape]`` for every neuron, ``[T, *neurons]``."""
    steps, *shape = x.shape
    return x.reshape(steps, *(1,) * (len(neurons) - len(shape)), *shape).expand(steps, *neurons)


def flat_input(x: Tensor, neurons: torch.Size, dtype: torch.dtype) -> Tensor:
    """The same as the kernels of unconnected neurons take it, ``[T, M]``."""
    x = kernel_input(x if x.shape[1:] == neurons else _expand_input(x, neurons), dtype)
    return x.reshape(x.shape[0], neurons.numel())


def own_fields(states: Tensor, shape: Sequence[int], count: int) -> Sequence[Tensor]:
    """The fields in ``[count, ...]``, each of ``shape``.

    They lie in one memory, but to autograd each is a tensor of its own, and may be edited in place without the others.
    """
    if not shape or torch.compiler.is_compiling():
        return [field.reshape(shape) for field in states.reshape(count, *shape).unsafe_split(1)]
    return states.reshape(count * shape[0], *shape[1:]).unsafe_chunk(count)


def _run_operator(
    x: Tensor, state: Tensor, constants: Tensor, call: Call, out: Tensor | None
) -> tuple[Tensor, FeedForwardState]:
    """Call the operator once a time block of the input ``x [T, M]``, and put the blocks together."""
    steps, neurons = x.shape[0], state.shape[1:]
    flat = state.reshape(len(state), -1).contiguous()
    # a split of one block would still copy the gradient; blocks of recorded states would add theirs up in another order
    several = call.block_steps and call.block_steps < steps and not call.record_states
    split = call.block_steps if several else None
    blocks = x.split(split) if split else (x,)
    parts: Sequence[Tensor | None] = (None,) * len(blocks)
    if out is not None:
        rows = out.view(out.shape[0], flat.shape[1])
        parts = rows.split(split // WORD_BITS if call.spike_dtype is None else split) if split else (rows,)
    outputs = []
    for block, part in zip(blocks, parts, strict=True):
        if part is None:
            spikes, flat, states = operators.feed_forward(block, flat, constants, call)
        else:
            spikes = part
            flat, states = operators.feed_forward_out(block, flat, constants, part, call)
        outputs.append((spikes, states))
    if out is None:
        out = outputs[0][0] if len(outputs) == 1 else torch.cat([s for s, _ in outputs])
        out = out.reshape(out.shape[0], *neurons)
    if call.record_states:
        states = outputs[0][1] if len(outputs) == 1 else torch.cat([s for _, s in outputs], 1)
        return out, feed_forward_state(*own_fields(states, (steps, *neurons), len(states)))
    return out, feed_forward_state(*own_fields(flat, neurons, len(flat)))


def coba_lif_integral(
    input_tensor: Tensor,
    state: Any,
    input_weights: Tensor | Synapses,
    recurrent_weights: Tensor | Synapses,
    p: Any = CobaLIFParameters(),  # noqa: B008 - an immutable record
    dt: float = 0.001,
    *,
    order: str = "decay_first",
    backend: str = "auto",
    block_steps: int | None = None,
    record_states: bool = False,
    spike_dtype: SpikeDtype = None,
    path: str = "auto",
    out: Tensor | None = None,
    delay: Any = None,
) -> tuple[Tensor, RecurrentState]:
    """A recurrent population of conductance-based LIF neurons over a whole sequence.

    Every step does, in this order (``jump_first``: the drive is added before the decay)::

        g_e = ((g_e + (-dt tau_syn_exc_inv) g_e) + relu(W_in) x) + relu(W_rec) z
        g_i = ((g_i + (-dt tau_syn_inh_inv) g_i) + relu(-W_in) x) + relu(-W_rec) z

    and then integrates, fires and resets as in :func:`coba_lif_feed_forward_integral`. The fused backends gather only
    the synapses of neurons that spiked, one launch for a time block, and sum them in ascending order of the sources. On a
    CPU, of weights that are mostly 0, a long sequence reads only the others.

    Source: norse's documented ``coba_lif`` equations, doi:10.5281/zenodo.4422025. (The recurrent step of norse 1.x
    drops the input term; this one has it.)

    With sparse synapses or delays, a spike of step ``t`` that has a delay of ``d`` steps is in the sum of step ``t + d``.
    Sums through sparse synapses are exact and rounded once, so that all backends have the same bits for any weights.
    ``docs/networks.md`` says how.

    Args:
        input_tensor: input spikes or currents, ``[T, *batch, I]``.
        state: ``z`` (last spikes), ``v`` in mV, ``g_e`` and ``g_i`` in uS, each a number or a tensor that broadcasts
            to ``[*batch, N]``; None starts at ``v = v_rest`` without conductance or spikes.
        input_weights: in uS, ``[N, I]``; a positive weight is an excitatory synapse, a negative one inhibitory. Dense,
            :class:`coba_triton.Synapses` without delays, or a matrix of a sparse layout.
        recurrent_weights: in uS, ``[N, N]``, rows post-synaptic; dense or sparse as well. Every call of a fused backend
            transposes a dense one, unless it is the transpose of a contiguous matrix.
        p: parameters, see :class:`CobaLIFParameters`; tensors broadcast over the neurons.
        dt: time step in ms.
        order: ``decay_first`` or ``jump_first``.
        backend: ``auto``, ``reference``, ``triton`` or ``cpu``; the same bits where the sums of weights are exact.
        block_steps: steps in one launch of a fused backend, rounded up to a multiple of 32; None for about ``sqrt(T)``
            in training, where the state before each block is kept, and else for a bounded scratch.
        record_states: return the state of every step, ``[T, *batch, N]`` a field, instead of the final one.
        spike_dtype: as in :func:`coba_lif_feed_forward_integral`, with one difference: with None, an input of bool or
            integers and weights in half precision, spikes have the dtype of the weights.
        path: how a fused backend adds the recurrent drive: ``events``, ``dense`` (a matrix product a step), ``sliced``
            (events, several programs a batch row; GPUs only), or ``auto``. On a CPU, ``auto`` is dense for a block that
            follows one with more than 0.2 spikes per neuron and step, else events. On a GPU it goes by the sizes alone:
            sliced for few rows of more than 2048 neurons, else events. All have the same bits where the sums of weights are
            exact; sliced has those of events with any weights.
        out: as in :func:`coba_lif_feed_forward_integral`.
        delay: of the synapses of a recurrent matrix in ms, one number or one for each source ``[N]``; None: one step.
            :class:`coba_triton.Synapses` have delays of their own.

    Returns:
        Spikes ``[T, *batch, N]`` and the state. If a delay is longer than one step, it is a :class:`CobaLIFDelayState`; its
        ``history`` is that of the end also where the states of all steps are recorded.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes do not fit, devices differ, or an argument's value is unknown.
        RuntimeError: if the backend that was asked for cannot serve.

    Example:
        >>> x = (torch.rand(100, 8, 3) < 0.1).float()
        >>> spikes, state = coba_lif_integral(x, None, torch.ones(2, 3), torch.zeros(2, 2), dt=0.1)
        >>> spikes.shape
        torch.Size([100, 8, 2])
    """
    block_steps = check_sequence(input_tensor, "[T, *batch, I]", 2, order, block_steps, record_states, spike_dtype)
    dt = validation.check_dt(dt)
    validation.check_path(path, time_blocks.PATHS)
    if is_sparse(input_weights, recurrent_weights, delay):
        validation.check_not_exported()
        wiring = connect(input_tensor, input_weights, recurrent_weights, delay, dt)
        call = Call(backend, order == "jump_first", p.method, None, record_states, block_steps, path)
        return _sparse_integral(input_tensor, state, wiring, p, dt, call, spike_dtype, out)
    initial = initial_recurrent_state(input_tensor, state, input_weights, recurrent_weights, p, dt, input_tensor.shape[1:])
    neurons, dtype, device = initial.shape[1:], initial.dtype, input_tensor.device
    given = cast("tuple[Tensor, Tensor]", (input_weights, recurrent_weights))
    weights = as_in_memory(given[0]).to(dtype), as_in_memory(given[1]).to(dtype)
    default = default_spike_dtype(input_tensor, dtype, given)
    jump_first = order == "jump_first"
    if out is not None:
        wanted = _spikes_format(input_tensor.shape[0], neurons, spike_dtype, default)
        inputs = {"input_tensor": input_tensor, **_state_fields(state, RECURRENT_FIELDS), **numbers_of(p)}
        inputs |= {"input_weights": input_weights, "recurrent_weights": recurrent_weights}
        validation.check_out(out, *wanted, inputs)
    backend = choose_backend(backend, device)
    validation.check_exported(backend)
    if backend == "reference":
        c = derive_constants(p, dt, dtype, device)
        w = reference.SplitWeights.of(*weights)
        rows, final = run_reference(
            lambda x, s: reference.recurrent_step(x, s.z, s, w, c, jump_first, p.method),
            input_tensor.to(dtype),
            recurrent_state(*initial.unbind()),
            record_states,
        )
        return _into(out, format_spikes(rows, initial[0], spike_dtype, default)), final
    table = constants_table(p, dt, dtype, device, neurons)
    written = None if spike_dtype == "bits" else spike_dtype or default
    call = Call(backend, jump_first, p.method, written, record_states, block_steps, path)
    return _run_recurrent_operator(input_tensor, initial, Weights(*weights, table), call, out)


def _run_recurrent_operator(
    x: Tensor, state: Tensor, weights: Weights, call: Call, out: Tensor | None
) -> tuple[Tensor, RecurrentState]:
    """Flatten the batch to one axis, call the operator, and give the result its shape."""
    steps, neurons, dtype = x.shape[0], state.shape[1:], state.dtype
    batch = neurons[:-1].numel()
    x = kernel_input(x, dtype).reshape(steps, batch, x.shape[-1])
    z = state[0].reshape(batch, neurons[-1])
    flat = state[1:].reshape(len(state) - 1, batch, neurons[-1]).contiguous()
    if out is not None and not call.record_states:
        z, flat = operators.recurrent_out(x, z, flat, weights, out.view(out.shape[0], *z.shape), call)
        return out, recurrent_state(*own_fields(z, neurons, 1), *own_fields(flat, neurons, len(flat)))
    if not call.record_states:
        spikes, z, flat, _ = operators.recurrent(x, z, flat, weights, call)
        spikes = spikes.reshape(spikes.shape[0], *neurons)
        return spikes, recurrent_state(*own_fields(z, neurons, 1), *own_fields(flat, neurons, len(flat)))
    # recorded spikes are part of the differentiable state: they take their format afterwards
    spikes, _, _, states = operators.recurrent(x, z, flat, weights, call._replace(spike_dtype=dtype))
    spikes = spikes.reshape(steps, *neurons)
    trace = recurrent_state(spikes, *own_fields(states, (steps, *neurons), len(states)))
    return _into(out, pack_spikes(spikes) if call.spike_dtype is None else spikes.to(call.spike_dtype)), trace


def initial_sparse_state(
    x: Tensor, state: Any, wiring: Wiring, p: Any, dt: float, step_shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """Check the arguments of a call; returns the spikes of the last D steps, ``[D, *batch, N]``, and its state."""
    longest, neurons = wiring.longest, torch.Size([*step_shape[:-1], wiring.recurrent.neurons])
    fields = (*RECURRENT_FIELDS, "left") if longest > 1 or is_refractory(p, state) else RECURRENT_FIELDS
    validation.check_parameters(p)
    if state is not None:
        validation.check_state(state, RECURRENT_FIELDS, x.device)
    numbers = _tensors(p)
    validation.broadcast_neurons(neurons, _state_fields(state, fields) | numbers, grows=False)
    given = _given(state, fields, p)
    validation.warn_if_unstable(p, dt, given[2], given[3])
    history = getattr(state, "history", 0.0) if longest > 1 else 0.0
    validation.check_history(history, neurons, x.device)
    weights = [w.weights if isinstance(w, Synapses) else w for w in wiring[:2]]
    initial = _side_by_side(x, neurons, given, [*weights, *numbers.values(), history])
    if longest == 1:
        return initial[:1], initial[1:]
    sent = torch.as_tensor(history, dtype=initial.dtype, device=x.device)
    if sent.dim() < 2:
        sent = sent.expand(longest, *neurons)
    sent = sent.expand(len(sent), *neurons)[max(0, len(sent) - longest) : -1]
    missing = sent.new_zeros(longest - 1 - len(sent), *neurons)
    return torch.cat([missing, sent, initial[:1]]), initial[1:]


def connections(wiring: Wiring, constants: Tensor, dt: float) -> Connections:
    """The synapses of a population as the operators take them, in the dtype of the table of its constants."""
    inputs, recurrent = wiring.inputs, wiring.recurrent
    input_weights, weights = (w.weights if isinstance(w, Synapses) else w for w in (inputs, recurrent))
    own = input_weights.to(constants.dtype)
    delays, sparse = recurrent.delays, isinstance(inputs, Synapses)
    return Connections(
        None if sparse else own,
        inputs.indptr if isinstance(inputs, Synapses) else None,
        inputs.targets if isinstance(inputs, Synapses) else None,
        own if sparse else None,
        recurrent.indptr,
        recurrent.targets,
        weights.to(constants.dtype),
        numbers_on(constants.device, torch.float32, [dt]) if delays is None or not recurrent.count else delays,
        constants,
        1 / dt,
        wiring.shortest,
    )


def _sparse_integral(
    x: Tensor, state: Any, wiring: Wiring, p: Any, dt: float, call: Call, spike_dtype: SpikeDtype, out: Tensor | None
) -> tuple[Tensor, RecurrentState]:
    """:func:`coba_lif_integral` with sparse synapses or delays."""
    history, initial = initial_sparse_state(x, state, wiring, p, dt, x.shape[1:])
    neurons, dtype, device = initial.shape[1:], initial.dtype, x.device
    inputs, recurrent = wiring.inputs, wiring.recurrent
    given = [w.weights if isinstance(w, Synapses) else w for w in (inputs, recurrent)]
    default = default_spike_dtype(x, dtype, given)
    if out is not None:
        wanted = _spikes_format(x.shape[0], neurons, spike_dtype, default)
        named = {"input_tensor": x, **_state_fields(state, (*RECURRENT_FIELDS, "left", "history")), **numbers_of(p)}
        named |= dict(zip(("input_weights", "recurrent_weights"), given, strict=True))
        validation.check_out(out, *wanted, named)
    if call.path not in ("auto", "events"):
        raise ValueError(f"path {call.path!r} is for dense weights, got sparse synapses or delays; pass path='auto'")
    backend = choose_backend(call.backend, device)
    weights = [w.to(dtype) for w in given]
    if backend == "reference":
        rows, final = _run_sparse_reference(x.to(dtype), history, initial, wiring, weights, p, dt, call)
        return _into(out, format_spikes(rows, initial[0], spike_dtype, default)), final
    to = connections(wiring, constants_table(p, dt, dtype, device, neurons), dt)
    written = None if spike_dtype == "bits" else spike_dtype or default
    call = call._replace(backend=backend, spike_dtype=written)
    steps, batch, N = x.shape[0], neurons[:-1].numel(), neurons[-1]
    x = kernel_input(x, dtype).reshape(steps, batch, x.shape[-1])
    sent = history.reshape(wiring.longest, batch, N).contiguous()
    flat = initial.reshape(len(initial), batch, N).contiguous()
    trace = call.record_states
    if out is not None and not trace:
        last, flat = sparse_operators.sparse_out(x, sent, flat, to, out.view(out.shape[0], batch, N), call)
        spikes = out
    else:  # recorded spikes are part of the differentiable state: they take their format afterwards
        call = call._replace(spike_dtype=dtype) if trace else call
        spikes, last, flat, states = sparse_operators.sparse(x, sent, flat, to, call)
        spikes = spikes.reshape(spikes.shape[0], *neurons)
        flat = states if trace else flat
    past = (last.reshape(len(last), *neurons),) if wiring.longest > 1 else ()
    shape = (steps, *neurons) if trace else neurons
    z = spikes if trace else last[-1].reshape(neurons).clone()
    final = recurrent_state(z, *own_fields(flat, shape, len(flat)), *past)
    if trace:
        spikes = _into(out, pack_spikes(spikes) if written is None else spikes.to(written))
    return spikes, final


def _run_sparse_reference(
    x: Tensor, history: Tensor, initial: Tensor, wiring: Wiring, weights: list[Tensor], p: Any, dt: float, call: Call
) -> tuple[list[Tensor], RecurrentState]:
    """The same, step by step in eager PyTorch."""
    if not is_watched():
        check_spikes_under_way(history)
        sparse_operators.check_connections(wiring.longest, wiring.recurrent.neurons, connections(wiring, initial, dt))
    c = derive_constants(p, dt, initial.dtype, x.device)
    inputs, recurrent = (
        reference_synapses(synapses, own, dt) if isinstance(synapses, Synapses) else None
        for synapses, own in zip(wiring[:2], weights, strict=True)
    )
    assert recurrent is not None
    rows: list[Tensor] = []
    trace: list[Any] = []
    s = recurrent_state(history[-1], *initial.unbind())
    for now in x.unbind(0):
        if inputs is not None:
            drive = reference.input_drive(inputs, now)
        else:
            w = weights[0].mT
            drive = reference.matrix_drive(now, torch.relu(w), torch.relu(-w))
        done, history = reference.sparse_step(drive, history, s, recurrent, c, call.jump_first, call.method)
        s = recurrent_state(*_fields_after(done))
        rows.append(done.z)
        trace.append(s)
    if call.record_states:
        columns = zip(*trace, strict=True) if trace else ((),) * len(s)
        s = recurrent_state(*(_stack(list(column), own) for column, own in zip(columns, s, strict=True)))
    else:
        s = recurrent_state(*(torch.clone(torch.as_tensor(field)) for field in s))
    return rows, s if wiring.longest == 1 else recurrent_state(*s, history.clone())


def reference_synapses(synapses: Synapses, weights: Tensor, dt: float, grid: Grid | None = None) -> reference.SparseWeights:
    """The synapses one by one; ``grid``: on which they are added up, None for that of these synapses."""
    sources = synapses.source_of()
    if grid is None:
        grid = grid_of(weights, synapses.indptr, synapses.targets, synapses.neurons, spikes=False)

    def each(numbers: Tensor) -> Tensor:
        return numbers[sources, 0] if numbers.dim() == 2 else numbers.expand(synapses.count)

    steps = torch.ones_like(sources)
    if synapses.delays is not None:
        steps = torch.round(each(synapses.delays) * torch.tensor(1 / dt, dtype=torch.float32)).long()
    return reference.SparseWeights(sources, synapses.targets.long(), each(weights), steps, grid.scales, synapses.neurons)
