"""The operators of populations with sparse synapses and delays: ``coba_triton::sparse``, its backward, and its ``out`` form.

They are built as those in :mod:`coba_triton.ops.operators` are. The spikes of the last R steps, of which the last are ``z``,
come in and go out as ``history [R, B, N]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..backend.choose import launcher
from . import sparse_blocks
from .call import SCHEMA, Asked, Call, Connections, Incoming, Outputs, Saved, SparseNetwork
from .kept import Kept
from .operands import COMPUTE, INPUT, Operand, check_asked, fields_of, rank
from .operators import (
    GROUPS,
    NUM_CONSTANTS,
    _BackwardRules,
    _clear_spare,
    _copy,
    _empty_spikes,
    _ForwardRules,
    _incoming,
    _is_plain,
    _library,
    _outputs,
    _saved,
    _saved_states,
    _saved_word_count,
    _saves,
    _table,
    _written,
    register,
)
from .samples import columns, each, join, join_all, join_constants, part, part_constants
from .tensors import FLOATING
from .time_blocks import SUM_BYTES, choose_block_steps, count_blocks

_library.define(
    f"sparse(Tensor x, Tensor history, Tensor state, {SCHEMA[Connections]}, {SCHEMA[Call]}) "
    "-> (Tensor spikes, Tensor last, Tensor final, Tensor states, Tensor words, Tensor checkpoints)"
)
_library.define(
    f"sparse_out(Tensor x, Tensor history, Tensor state, {SCHEMA[Connections]}, Tensor(a!) spikes, {SCHEMA[Call]}) "
    "-> (Tensor last, Tensor final)"
)
_library.define(
    f"sparse_backward(Tensor x, Tensor history, {SCHEMA[Connections]}, {SCHEMA[Saved]}, {SCHEMA[Incoming]}, "
    f"Tensor? grad_last, {SCHEMA[Call]}, {SCHEMA[Asked]}) -> (Tensor grad_x, Tensor grad_history, Tensor grad_state, "
    "Tensor grad_input_weights, Tensor grad_input_values, Tensor grad_weights, Tensor grad_constants)"
)
GROUPS["sparse"] = (Tensor, Tensor, Tensor, Connections, Call)
GROUPS["sparse_out"] = (Tensor, Tensor, Tensor, Connections, Tensor, Call)
GROUPS["sparse_backward"] = (Tensor, Tensor, Connections, Saved, Incoming, Tensor, Call, Asked)
PLACES = {name: index for index, name in enumerate(Connections._fields)}

INDEX = (torch.int64,)
TARGETS = (torch.int32,)
DELAYS = (torch.float32,)


def _one_of(tensor: Tensor | None, sources: int, synapses: int) -> tuple[int, ...]:
    """The shape that numbers of synapses have: one of each source, one of all, or one of each."""
    if rank(tensor) == 2:
        return sources, 1
    return (1,) if tensor is not None and tensor.dim() and tensor.shape[0] == 1 else (synapses,)


def _synapses(
    what: str, sources: int, indptr: Tensor | None, targets: Tensor | None, weights: Tensor | None, dtype: torch.dtype
) -> Iterator[Operand]:
    yield Operand(f"{what}indptr", indptr, (sources + 1,), INDEX)
    count = targets.shape[0] if targets is not None and targets.dim() else 0
    yield Operand(f"{what}targets", targets, (count,), TARGETS)
    yield Operand(f"{what}weights", weights, _one_of(weights, sources, count), (dtype,))


def _connected(x: Tensor, history: Tensor, states: tuple[Tensor, ...], to: Connections) -> Iterator[Operand]:
    """The tensors that every operator of sparse populations has, and a state, if it has one."""
    steps, batch, inputs = x.shape if x.dim() == 3 else (0, 0, 0)
    yield Operand("x", x, (steps, batch, inputs), INPUT)
    longest, _, neurons = history.shape if rank(history) == 3 else (0, 0, 0)
    yield Operand("history", history, (longest, batch, neurons), COMPUTE)
    dtype = history.dtype
    for state in states:
        yield Operand("state", state, (fields_of(state), batch, neurons), (dtype,))
    if to.input_indptr is None:
        yield Operand("input_weights", to.input_weights, (neurons, inputs), (dtype,))
    else:
        yield from _synapses("input_", inputs, to.input_indptr, to.input_targets, to.input_values, dtype)
    yield from _synapses("", neurons, to.indptr, to.targets, to.weights, dtype)
    yield Operand("delays", to.delays, _one_of(to.delays, neurons, to.targets.shape[0]), DELAYS)
    yield _table(to.constants, batch * neurons, (dtype,))


# Which tensors were found to be in order, and what for.
_in_order: Kept[bool] = Kept()
WAY_OUT = "make synapses with a constructor of coba_triton.Synapses"


def _check_once(tensor: Tensor, fits: tuple[Any, ...], check: Callable[[], None]) -> None:
    """Look at the numbers of a tensor, again only if they change. Those of tensors on a GPU are not waited for."""

    def in_order() -> bool:
        check()
        return True

    if tensor.device.type == "cpu" and tensor.numel():
        _in_order.get(tensor, (), fits, in_order)


def _check_wiring(name: str, indptr: Tensor, targets: Tensor, neurons: int) -> None:
    """Whether kernels stay within arrays."""
    count = len(targets)

    def check_indptr() -> None:
        if indptr[0] != 0 or indptr[-1] != count or bool((indptr.diff() < 0).any()):
            raise ValueError(
                f"{name}indptr must rise from 0 to the number of targets, {count}, got {int(indptr[0])} to "
                f"{int(indptr[-1])}; {WAY_OUT}"
            )

    def check_targets() -> None:
        low, high = map(int, targets.aminmax())
        if low < 0 or high >= neurons:
            raise ValueError(f"{name}targets must be from 0 to {neurons - 1}, got {low} to {high}; {WAY_OUT}")

    _check_once(indptr, (count,), check_indptr)
    _check_once(targets, (neurons,), check_targets)


def _check_steps(to: Connections, longest: int) -> None:
    """Whether no spike arrives later than the ring is long, nor before its neurons have been computed."""

    def check_delays() -> None:
        per_ms = torch.tensor(to.per_ms, dtype=torch.float32)
        low, high = (int(torch.round(delay * per_ms)) for delay in to.delays.aminmax())
        if low < max(1, to.shortest) or high > longest:
            raise ValueError(
                f"delays must be from {max(1, to.shortest)} to {longest} steps, which shortest and the history say, got "
                f"{low} to {high}; {WAY_OUT}"
            )

    _check_once(to.delays, (longest, to.shortest, to.per_ms), check_delays)


def check_connections(longest: int, neurons: int, to: Connections) -> None:
    """Look at the numbers of the synapses, by which kernels find their way."""
    if to.input_indptr is not None and to.input_targets is not None:
        _check_wiring("input_", to.input_indptr, to.input_targets, neurons)
    _check_wiring("", to.indptr, to.targets, neurons)
    _check_steps(to, longest)


def _network(history: Tensor, to: Connections, call: Call) -> SparseNetwork:
    check_connections(history.shape[0], history.shape[-1], to)
    return SparseNetwork.of(to, history, call.jump_first, launcher(call.backend))


def _check_sparse(x: Tensor, history: Tensor, state: Tensor, to: Connections, call: Call) -> Iterator[Operand]:
    yield from _connected(x, history, (state,), to)


def _allocate_sparse(x: Tensor, history: Tensor, state: Tensor, to: Connections, call: Call) -> tuple[Tensor, ...]:
    steps, fields, shape = x.shape[0], len(state), history.shape[1:]
    blocks = count_blocks(_block_steps(x, history, to, call), steps) if call.save else 0
    words = _saved_word_count(steps) if call.save and call.spike_dtype is not None else 0
    return (
        _empty_spikes(x, call.spike_dtype, shape),
        history.new_empty(history.shape),
        state.new_empty(state.shape),
        state.new_empty(fields, steps if call.record_states else 0, *shape),
        x.new_empty(words, *shape, dtype=torch.int32),
        state.new_empty(fields * blocks, *shape),
    )


def _block_steps(x: Tensor, history: Tensor, to: Connections, call: Call) -> int:
    """Steps in a block of ``x [T, B, I]``, of the neurons of ``history [R, B, N]``."""
    sums = 0 if to.input_indptr is None else SUM_BYTES // history.element_size()
    cells, sources = history.shape[1] * history.shape[2], x.shape[1] * x.shape[2]
    return choose_block_steps(call.block_steps, x.shape[0], cells, sources, history, bool(call.save), sums)


def _run(
    net: SparseNetwork, x: Tensor, history: Tensor, state: Tensor, out: Outputs, block_steps: int
) -> tuple[Tensor, Tensor]:
    """The spikes of the last steps, and the state, after a run that fills the outputs."""
    steps = x.shape[0]
    ring = sparse_blocks.ring_of(net, history)
    state = sparse_blocks.forward(net, x, ring, state.contiguous(), out, block_steps)
    spikes = out.words if out.spikes is None else out.spikes
    assert spikes is not None
    return sparse_blocks.last_spikes(history, spikes, steps), state


def _compute_sparse(x: Tensor, history: Tensor, state: Tensor, to: Connections, call: Call) -> tuple[Tensor, ...]:
    return sparse_forward(_network(history, to, call), x, history, state, to, call)


def sparse_forward(
    net: SparseNetwork, x: Tensor, history: Tensor, state: Tensor, to: Connections, call: Call
) -> tuple[Tensor, ...]:
    """What ``coba_triton::sparse`` returns, of any network: also of one whose processes exchange spikes."""
    spikes, _, _, states, words, checkpoints = _allocate_sparse(x, history, state, to, call)
    _clear_spare(words, x.shape[0])
    if x.shape[0] == 0 or history.numel() == 0:
        return spikes, _copy(history), _copy(state), states, words, checkpoints
    out = _outputs(call, spikes, states, *_saves(call, len(state), words, checkpoints))
    last, final = _run(net, x, history, state, out, _block_steps(x, history, to, call))
    return spikes, last, final, states, words, checkpoints


def _check_sparse_out(
    x: Tensor, history: Tensor, state: Tensor, to: Connections, spikes: Tensor, call: Call
) -> Iterator[Operand]:
    yield from _connected(x, history, (state,), to)
    yield _written(spikes, x.shape[0], history.shape[1:])


def _allocate_sparse_out(
    x: Tensor, history: Tensor, state: Tensor, to: Connections, spikes: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    return history.new_empty(history.shape), state.new_empty(state.shape)


def _compute_sparse_out(
    x: Tensor, history: Tensor, state: Tensor, to: Connections, spikes: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """The forward into a given buffer ``[T, B, N]`` or, for packed spikes, int32 ``[ceil(T / 32), B, N]``."""
    if x.shape[0] == 0 or history.numel() == 0:
        return _copy(history), _copy(state)
    block_steps = _block_steps(x, history, to, call._replace(save=False))
    return _run(_network(history, to, call), x, history, state, _outputs(call, spikes, None), block_steps)


def _check_sparse_backward(
    x: Tensor,
    history: Tensor,
    to: Connections,
    saved: Saved,
    grads: Incoming,
    grad_last: Tensor | None,
    call: Call,
    asked: Asked,
) -> Iterator[Operand]:
    yield from _connected(x, history, (), to)
    check_asked(asked, x.shape[1])
    steps, shape, dtype = x.shape[0], history.shape[1:], history.dtype
    yield Operand("x, as its gradient is asked for,", x, x.shape, FLOATING if asked.x else INPUT)
    yield from _saved(saved, _saved_states(saved, steps, call, asked), steps, shape, dtype)
    yield from _incoming(grads, asked.fields, steps, shape, dtype)
    yield Operand("grad_last", grad_last, history.shape, (dtype,), optional=True)


def _allocate_sparse_backward(
    x: Tensor,
    history: Tensor,
    to: Connections,
    saved: Saved,
    grads: Incoming,
    grad_last: Tensor | None,
    call: Call,
    asked: Asked,
) -> tuple[Tensor, ...]:
    new, samples = history.new_empty, asked.samples

    def like(weights: Tensor | None, wanted: bool) -> Tensor:
        return new(samples, *weights.shape) if wanted and weights is not None else new(0)

    return (
        x.new_empty(x.shape if asked.x else (0, *x.shape[1:])),
        new(history.shape),
        new(asked.fields, *history.shape[1:]),
        like(to.input_weights, asked.input_weights),
        like(to.input_values, asked.input_weights),
        like(to.weights, asked.recurrent_weights),
        new(NUM_CONSTANTS, to.constants.shape[1] if asked.constants else 0),
    )


def _compute_sparse_backward(
    x: Tensor,
    history: Tensor,
    to: Connections,
    saved: Saved,
    grads: Incoming,
    grad_last: Tensor | None,
    call: Call,
    asked: Asked,
) -> tuple[Tensor, ...]:
    net = _network(history, to, call)
    return sparse_blocks.backward(net, x, history, saved, grads, grad_last, to, call, asked)


class _SparseRules(_ForwardRules):
    operator = "sparse"

    @classmethod
    def remember(cls, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, history, state, to, ctx.call = cls.records(inputs)
        ctx.fields = len(state)
        ctx.numbers = to.per_ms, to.shortest
        spikes, _, _, _, words, checkpoints = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(checkpoints)
        ctx.save_for_backward(x, history, *to[:-2], spikes if ctx.call.spike_dtype is None else words, checkpoints)

    @staticmethod
    def backward(
        ctx: Any,
        grad_spikes: Tensor | None,
        grad_last: Tensor | None,
        grad_final: Tensor | None,
        grad_states: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        call = _ForwardRules.saved_call(ctx)
        needed = ctx.needs_input_grad[1:]
        x_needed, _, _, *connections_needed = needed[: 3 + len(Connections._fields)]
        dense_needed, values_needed = connections_needed[PLACES["input_weights"]], connections_needed[PLACES["input_values"]]
        weights_needed = connections_needed[PLACES["weights"]]
        x, history, *tensors, words, checkpoints = ctx.saved_tensors
        *by, by_constants = torch.ops.coba_triton.sparse_backward(
            x,
            history,
            *tensors,
            *ctx.numbers,
            words,
            checkpoints,
            *Incoming(grad_spikes, grad_final, grad_states),
            grad_last,
            *call,
            *Asked(
                x_needed,
                dense_needed or values_needed,
                weights_needed,
                connections_needed[PLACES["constants"]],
                ctx.fields,
            ),
        )
        by_x, by_history, by_state, by_dense, by_values, by_weights = by
        of = [None] * len(Connections._fields)
        for name, grad in (("input_weights", by_dense), ("input_values", by_values), ("weights", by_weights)):
            of[PLACES[name]] = grad.squeeze(0)
        of[PLACES["constants"]] = by_constants
        grads = by_x, by_history, by_state, *of
        return (
            None,
            *(grad if need else None for grad, need in zip(grads, needed, strict=False)),
            *(None,) * len(call),
        )

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size
        x, history, state, to, call = cls.records(args)
        x_dim, history_dim, state_dim, to_dims, _ = cls.records(in_dims)
        if any(dim is not None for name, dim in zip(to._fields, to_dims, strict=True) if name != "constants"):
            return each(torch.ops.coba_triton.sparse, size, in_dims, args)
        x, history, state = join_all((x, history, state), (x_dim, history_dim, state_dim), size, -2)
        table = join_constants(to.constants, to_dims.constants, size, history[0].numel() // size)
        outputs = torch.ops.coba_triton.sparse(x, history, state, *to._replace(constants=table), *call)
        return part(outputs, size, -2)


class _SparseBackwardRules(_BackwardRules):
    operator = "sparse_backward"

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size
        x, history, to, saved, grads, grad_last, call, asked = cls.records(args)
        x_dim, history_dim, to_dims, saved_dims, grads_dims, grad_last_dim, _, _ = cls.records(in_dims)
        if any(dim is not None for name, dim in zip(to._fields, to_dims, strict=True) if name != "constants"):
            return each(torch.ops.coba_triton.sparse_backward, size, in_dims, args)
        x, history = join(x, x_dim, size, -2), join(history, history_dim, size, -2)
        shared = columns(to.constants, to_dims.constants)
        table = join_constants(to.constants, to_dims.constants, size, history[0].numel() // size, asked.constants)
        tensors = join_all((*saved, *grads, grad_last), (*saved_dims, *grads_dims, grad_last_dim), size, -2)
        asked = asked._replace(samples=size * asked.samples)
        by_x, by_history, by_state, *sums, by_constants = torch.ops.coba_triton.sparse_backward(
            x, history, *to._replace(constants=table), *tensors, *call, *asked
        )
        rows, dims = part((by_x, by_history, by_state), size, -2)
        # one gradient a sample, one after the other; what nobody asked for has no elements
        sums = [by.unflatten(0, (size, -1)) if by.numel() else by.new_empty(size, 0) for by in sums]
        return (*rows, *sums, part_constants(by_constants, shared, size)), (*dims, *(0,) * len(sums), 1)


register("sparse", _check_sparse, _allocate_sparse, _compute_sparse, _SparseRules)
register("sparse_out", _check_sparse_out, _allocate_sparse_out, _compute_sparse_out, None)
register(
    "sparse_backward", _check_sparse_backward, _allocate_sparse_backward, _compute_sparse_backward, _SparseBackwardRules
)


def sparse(x: Tensor, history: Tensor, state: Tensor, to: Connections, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spikes, last spikes, final state and recorded states of the operator. A plain call goes straight to the kernels."""
    if not call.record_states and _is_plain(x, history, state, *(t for t in to if isinstance(t, Tensor))):
        spikes = _empty_spikes(x, call.spike_dtype, history.shape[1:])
        last, final = _compute_sparse_out(x, history, state, to, spikes, call)
        return spikes, last, final, state.new_empty(len(state), 0, *history.shape[1:])
    spikes, last, final, states, *_ = torch.ops.coba_triton.sparse(x, history, state, *to, *call)
    return spikes, last, final, states


def sparse_out(
    x: Tensor, history: Tensor, state: Tensor, to: Connections, spikes: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """Last spikes and final state of ``coba_triton::sparse_out``, which writes to ``spikes``."""
    if _is_plain(x, history, state, *(t for t in to if isinstance(t, Tensor)), spikes):
        return _compute_sparse_out(x, history, state, to, spikes, call)
    last, final = torch.ops.coba_triton.sparse_out(x, history, state, *to, spikes, *call)
    return last, final
