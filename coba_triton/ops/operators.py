"""The operators behind the whole-sequence functions: schema, shapes, autograd and vmap rules, a kernel per backend.

``coba_triton::feed_forward`` and ``coba_triton::recurrent`` are ordinary differentiable PyTorch operators; each has a
backward operator, and a form that writes spikes into a given buffer. The forward saves its input, one bit per spike, and
the state before every ``checkpoint_every``-th step (recurrent: before every block); the backward recomputes the rest.

Of every operator there are three functions, which take its arguments as the records of :mod:`coba_triton.ops.call`:
``_check_*`` yields the tensors with what they must look like, ``_allocate_*`` makes the outputs without computing them, as
compilers ask for, and ``_compute_*`` fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from ..backend.choose import launcher
from ..neuron.records import Constants, Sums
from ..tuning.tables import launch_parameters
from . import memory, time_blocks
from .call import (
    CPU_CHECKPOINT_EVERY,
    DIFFERENTIABLE,
    SCHEMA,
    Asked,
    Call,
    Incoming,
    Network,
    Outputs,
    Saved,
    Weights,
    grouper,
)
from .constants import constants_gradient
from .operands import COMPUTE, INPUT, WORDS, Operand, check_asked, checked, fields_of, rank, rows_of
from .samples import columns, each, join, join_all, join_constants, part, part_constants
from .spikes import word_count
from .tensors import FLOATING, SPIKES, has_tangent, is_tracked, is_watched
from .time_blocks import choose_block_steps, count_blocks, even_block_steps

NUM_CONSTANTS = len(Constants._fields)
NUM_SUMS = len(Sums._fields)

_library = torch.library.Library("coba_triton", "DEF")

_library.define(
    f"feed_forward(Tensor x, Tensor state, Tensor constants, {SCHEMA[Call]}) "
    "-> (Tensor spikes, Tensor final, Tensor states, Tensor words, Tensor checkpoints)"
)
_library.define(
    f"feed_forward_out(Tensor x, Tensor state, Tensor constants, Tensor(a!) spikes, {SCHEMA[Call]}) "
    "-> (Tensor final, Tensor states)"
)
_library.define(
    f"feed_forward_backward(Tensor x, Tensor constants, {SCHEMA[Saved]}, {SCHEMA[Incoming]}, {SCHEMA[Call]}, "
    f"{SCHEMA[Asked]}) -> (Tensor grad_x, Tensor grad_state, Tensor grad_constants)"
)
_library.define(
    f"recurrent(Tensor x, Tensor z, Tensor state, {SCHEMA[Weights]}, {SCHEMA[Call]}) "
    "-> (Tensor spikes, Tensor z_final, Tensor final, Tensor states, Tensor words, Tensor checkpoints)"
)
_library.define(
    f"recurrent_out(Tensor x, Tensor z, Tensor state, {SCHEMA[Weights]}, Tensor(a!) spikes, {SCHEMA[Call]}) "
    "-> (Tensor z_final, Tensor final)"
)
_library.define(
    f"recurrent_backward(Tensor x, Tensor z, {SCHEMA[Weights]}, {SCHEMA[Saved]}, {SCHEMA[Incoming]}, Tensor? grad_z, "
    f"{SCHEMA[Call]}, {SCHEMA[Asked]}) -> (Tensor grad_x, Tensor grad_z, Tensor grad_state, Tensor grad_input_weights, "
    "Tensor grad_recurrent_weights, Tensor grad_constants)"
)
# The arguments of each operator; a Tensor stands for one that is in no record.
GROUPS: dict[str, tuple[Callable[..., Any], ...]] = {
    "feed_forward": (Tensor, Tensor, Tensor, Call),
    "feed_forward_out": (Tensor, Tensor, Tensor, Tensor, Call),
    "feed_forward_backward": (Tensor, Tensor, Saved, Incoming, Call, Asked),
    "recurrent": (Tensor, Tensor, Tensor, Weights, Call),
    "recurrent_out": (Tensor, Tensor, Tensor, Weights, Tensor, Call),
    "recurrent_backward": (Tensor, Tensor, Weights, Saved, Incoming, Tensor, Call, Asked),
}


def checkpoint_interval(dtype: torch.dtype, backend: str, neurons: int) -> int:
    """Steps between two saved states: at most 1.5 bytes per neuron-step, and no more than a replay can hold."""
    if backend != "cpu":
        return 16 if dtype == torch.float64 else 8
    rule = {"checkpoint_every": CPU_CHECKPOINT_EVERY}
    # a trace cannot look into files, and what saves nothing need not
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return rule["checkpoint_every"]
    device = torch.device("cpu")
    return launch_parameters("cpu", "feed_forward_backward", rule, dtype, device, neurons)["checkpoint_every"]


def checkpoint_count(steps: int, every: int, backend: str) -> int:
    """Saved states: one before every run of ``every`` steps; of a last, shorter run Triton keeps one before each step."""
    return -(-steps // every) if backend == "cpu" else steps // every + steps % every


def _saved_word_count(steps: int) -> int:
    """Rows of saved spike words: two at least, so that a compiler needs no graph of its own for one."""
    rows: int = torch.sym_max(2, word_count(steps))
    return rows


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _clear_spare(words: Tensor, steps: int) -> None:
    if words.shape[0] > word_count(steps):
        words[word_count(steps) :].zero_()


def _unconnected(x: Tensor, constants: Tensor, *states: Tensor) -> Iterator[Operand]:
    """The tensors that every operator of unconnected neurons has, and a state, if it has one."""
    steps, neurons = x.shape if x.dim() == 2 else (0, 0)
    yield Operand("x", x, (steps, neurons), INPUT)
    for state in states:
        yield Operand("state", state, (fields_of(state), neurons), COMPUTE)
    yield _table(constants, neurons, (states[0].dtype,) if states else COMPUTE)


def _table(constants: Tensor, cells: int, dtypes: tuple[torch.dtype, ...]) -> Operand:
    """The constants, one column for all neurons or one for each."""
    shared = rank(constants) == 2 and constants.shape[1] == 1
    return Operand("constants", constants, (NUM_CONSTANTS, 1 if shared else cells), dtypes)


def _written(spikes: Tensor, steps: int, shape: tuple[int, ...]) -> Operand:
    """A buffer for spikes, packed or not."""
    packed = spikes is not None and spikes.dtype == torch.int32
    dtypes = WORDS if packed else SPIKES
    return Operand("spikes", spikes, (word_count(steps) if packed else steps, *shape), dtypes, written=True)


def _saved(saved: Saved, states: int, steps: int, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Operand]:
    """What a forward saved: a bit for each spike, and rows of so many states."""
    yield Operand("words", saved.words, (rows_of(saved.words, word_count(steps)), *shape), WORDS)
    yield Operand("checkpoints", saved.checkpoints, (states, *shape), (dtype,))


def _incoming(grads: Incoming, fields: int, steps: int, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Operand]:
    """The gradients that there are; that by the states of all steps may be one by those of none, as none were recorded."""
    states = grads.states
    none = states is not None and states.dim() > 1 and states.shape[1] == 0
    yield Operand("grad_spikes", grads.spikes, (steps, *shape), FLOATING, optional=True)
    yield Operand("grad_final", grads.final, (fields, *shape), (dtype,), optional=True)
    yield Operand("grad_states", states, (fields, 0 if none else steps, *shape), (dtype,), optional=True)


def _outputs(
    call: Call, spikes: Tensor, states: Tensor | None, words: Tensor | None = None, checkpoints: Tensor | None = None
) -> Outputs:
    """What the kernels fill. Packed spikes serve the backward as they are, so that it needs no other words."""
    packed = spikes.dtype == torch.int32
    states = states if call.record_states else None
    return Outputs(None if packed else spikes, spikes if packed else words, states, checkpoints)


def _saves(call: Call, fields: int, words: Tensor, checkpoints: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The words, and the states as ``[K, F, ...]``, if the call saves any."""
    return (words, checkpoints.unflatten(0, (-1, fields))) if call.save else (None, None)


def _check_feed_forward(x: Tensor, state: Tensor, constants: Tensor, call: Call) -> Iterator[Operand]:
    yield from _unconnected(x, constants, state)


def _allocate_feed_forward(x: Tensor, state: Tensor, constants: Tensor, call: Call) -> tuple[Tensor, ...]:
    steps, neurons = x.shape
    # packed spikes serve the backward as they are
    words = x.new_empty(
        _saved_word_count(steps) if call.save and call.spike_dtype is not None else 0, neurons, dtype=torch.int32
    )
    states = state.new_empty(len(state), steps if call.record_states else 0, neurons)
    saved = checkpoint_count(steps, call.checkpoint_every, call.backend) if call.save else 0
    # rows of fields, not of states: a compiler knows that there is more than one, and needs no graph for one state alone
    checkpoints = state.new_empty(len(state) * saved, neurons)
    return _empty_spikes(x, call.spike_dtype, x.shape[1:]), state.new_empty(state.shape), states, words, checkpoints


def _compute_feed_forward(x: Tensor, state: Tensor, constants: Tensor, call: Call) -> tuple[Tensor, ...]:
    spikes, final, states, words, checkpoints = _allocate_feed_forward(x, state, constants, call)
    _clear_spare(words, x.shape[0])
    if x.numel() == 0:
        return spikes, _copy(state), states, words, checkpoints
    out = _outputs(call, spikes, states, *_saves(call, len(state), words, checkpoints))
    launcher(call.backend).feed_forward_forward(x, state.contiguous(), constants.contiguous(), final, out, call)
    return spikes, final, states, words, checkpoints


def _check_feed_forward_out(x: Tensor, state: Tensor, constants: Tensor, spikes: Tensor, call: Call) -> Iterator[Operand]:
    yield from _unconnected(x, constants, state)
    yield _written(spikes, x.shape[0], x.shape[1:])


def _allocate_feed_forward_out(
    x: Tensor, state: Tensor, constants: Tensor, spikes: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    return state.new_empty(state.shape), state.new_empty(len(state), x.shape[0] if call.record_states else 0, x.shape[1])


def _compute_feed_forward_out(
    x: Tensor, state: Tensor, constants: Tensor, spikes: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """The forward into a given buffer ``[T, M]`` or, for packed spikes, int32 ``[ceil(T / 32), M]``; saves nothing."""
    final, states = _allocate_feed_forward_out(x, state, constants, spikes, call)
    if x.numel() == 0:
        return _copy(state), states
    out = _outputs(call, spikes, states)
    launcher(call.backend).feed_forward_forward(x, state.contiguous(), constants.contiguous(), final, out, call)
    return final, states


def _check_feed_forward_backward(
    x: Tensor, constants: Tensor, saved: Saved, grads: Incoming, call: Call, asked: Asked
) -> Iterator[Operand]:
    yield from _unconnected(x, constants)
    check_asked(asked, 1)
    steps, neurons = x.shape
    yield Operand("x, as its gradient is asked for,", x, (steps, neurons), FLOATING if asked.x else INPUT)
    states = asked.fields * checkpoint_count(steps, call.checkpoint_every, call.backend)
    yield from _saved(saved, states, steps, (neurons,), constants.dtype)
    yield from _incoming(grads, asked.fields, steps, (neurons,), constants.dtype)


def _allocate_feed_forward_backward(
    x: Tensor, constants: Tensor, saved: Saved, grads: Incoming, call: Call, asked: Asked
) -> tuple[Tensor, ...]:
    neurons = x.shape[1]
    return (
        x.new_empty(x.shape if asked.x else (0, neurons)),
        constants.new_empty(asked.fields, neurons),
        constants.new_empty(NUM_CONSTANTS, constants.shape[1] if asked.constants else 0),
    )


def _compute_feed_forward_backward(
    x: Tensor, constants: Tensor, saved: Saved, grads: Incoming, call: Call, asked: Asked
) -> tuple[Tensor, ...]:
    grad_x, grad_state, shared = _allocate_feed_forward_backward(x, constants, saved, grads, call, asked)
    if asked.fields > DIFFERENTIABLE:
        grad_state[DIFFERENTIABLE:] = 0
    if x.numel() == 0:
        grad_state[:DIFFERENTIABLE] = 0 if grads.final is None else grads.final[:DIFFERENTIABLE]
        return grad_x, grad_state, shared.zero_()
    sums = constants.new_empty(NUM_SUMS, x.shape[1] if asked.constants else 0)
    launcher(call.backend).feed_forward_backward(
        x, constants.contiguous(), saved.split(asked.fields), grads.ready(), grad_x, grad_state, sums, call
    )
    return grad_x, grad_state, constants_gradient(sums, constants)


def _connected(x: Tensor, z: Tensor, states: tuple[Tensor, ...], weights: Weights) -> Iterator[Operand]:
    """The tensors that every operator of recurrent populations has, and a state, if it has one."""
    steps, batch, inputs = x.shape if x.dim() == 3 else (0, 0, 0)
    yield Operand("x", x, (steps, batch, inputs), INPUT)
    neurons = z.shape[1] if rank(z) == 2 else 0
    yield Operand("z", z, (batch, neurons), COMPUTE)
    dtype = (z.dtype,)
    for state in states:
        yield Operand("state", state, (fields_of(state), batch, neurons), dtype)
    yield Operand("input_weights", weights.input, (neurons, inputs), dtype)
    yield Operand("recurrent_weights", weights.recurrent, (neurons, neurons), dtype)
    yield _table(weights.constants, batch * neurons, dtype)


def _check_recurrent(x: Tensor, z: Tensor, state: Tensor, weights: Weights, call: Call) -> Iterator[Operand]:
    yield from _connected(x, z, (state,), weights)


def _allocate_recurrent(x: Tensor, z: Tensor, state: Tensor, weights: Weights, call: Call) -> tuple[Tensor, ...]:
    steps, fields = x.shape[0], len(state)
    blocks = count_blocks(_block_steps(x, z, call), steps) if call.save else 0
    words = _saved_word_count(steps) if call.save and call.spike_dtype is not None else 0
    return (
        _empty_spikes(x, call.spike_dtype, z.shape),
        z.new_empty(z.shape),
        state.new_empty(state.shape),
        state.new_empty(fields, steps if call.record_states else 0, *z.shape),
        x.new_empty(words, *z.shape, dtype=torch.int32),
        state.new_empty(fields * blocks, *z.shape),
    )


def _block_steps(x: Tensor, z: Tensor, call: Call) -> int:
    """Steps in a block of ``x [T, B, I]`` and the neurons of ``z [B, N]``."""
    return choose_block_steps(call.block_steps, x.shape[0], z.numel(), x.shape[1] * x.shape[2], z, bool(call.save))


def _saved_states(saved: Saved, steps: int, call: Call, asked: Asked) -> int:
    """Rows that the checkpoints of a forward must have: every field of the state before every block."""
    blocks = rows_of(saved.checkpoints, asked.fields) // asked.fields
    return asked.fields * count_blocks(even_block_steps(call.block_steps, steps, torch.sym_max(1, blocks)), steps)


def _network(x: Tensor, weights: Weights, call: Call) -> Network:
    """The network for the steps and batch rows of ``x [T, B, I]``."""
    return Network.of(weights, call.jump_first, launcher(call.backend), uses=x.shape[0] * x.shape[1])


def recurrent_forward(net: Network, x: Tensor, z: Tensor, state: Tensor, call: Call) -> tuple[Tensor, ...]:
    """What ``coba_triton::recurrent`` returns, of any network: also of one whose processes exchange spikes."""
    weights = Weights(net.input_weights, net.recurrent_weights, net.constants)
    spikes, _, _, states, words, checkpoints = _allocate_recurrent(x, z, state, weights, call)
    _clear_spare(words, x.shape[0])
    if x.shape[0] == 0 or z.numel() == 0:
        return spikes, _copy(z), _copy(state), states, words, checkpoints
    out = _outputs(call, spikes, states, *_saves(call, len(state), words, checkpoints))
    block_steps = _block_steps(x, z, call)
    z, state = time_blocks.forward(net, x, z, state.contiguous(), out, block_steps, call.path)
    return spikes, z, state, states, words, checkpoints


def _compute_recurrent(x: Tensor, z: Tensor, state: Tensor, weights: Weights, call: Call) -> tuple[Tensor, ...]:
    return recurrent_forward(_network(x, weights, call), x, z, state, call)


def _check_recurrent_out(
    x: Tensor, z: Tensor, state: Tensor, weights: Weights, spikes: Tensor, call: Call
) -> Iterator[Operand]:
    yield from _connected(x, z, (state,), weights)
    yield _written(spikes, x.shape[0], z.shape)


def _allocate_recurrent_out(
    x: Tensor, z: Tensor, state: Tensor, weights: Weights, spikes: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), state.new_empty(state.shape)


def _compute_recurrent_out(
    x: Tensor, z: Tensor, state: Tensor, weights: Weights, spikes: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """The forward into a given buffer ``[T, B, N]`` or, for packed spikes, int32 ``[ceil(T / 32), B, N]``."""
    if x.shape[0] == 0 or z.numel() == 0:
        return _copy(z), _copy(state)
    block_steps = _block_steps(x, z, call._replace(save=False))
    out = _outputs(call, spikes, None)
    return time_blocks.forward(_network(x, weights, call), x, z, state.contiguous(), out, block_steps, call.path)


def _check_recurrent_backward(
    x: Tensor,
    z: Tensor,
    weights: Weights,
    saved: Saved,
    grads: Incoming,
    grad_z: Tensor | None,
    call: Call,
    asked: Asked,
) -> Iterator[Operand]:
    yield from _connected(x, z, (), weights)
    check_asked(asked, z.shape[0])
    steps, shape, dtype = x.shape[0], z.shape, z.dtype
    yield Operand("x, as its gradient is asked for,", x, x.shape, FLOATING if asked.x else INPUT)
    yield from _saved(saved, _saved_states(saved, steps, call, asked), steps, shape, dtype)
    yield from _incoming(grads, asked.fields, steps, shape, dtype)
    yield Operand("grad_z", grad_z, shape, (dtype,), optional=True)


def _allocate_recurrent_backward(
    x: Tensor,
    z: Tensor,
    weights: Weights,
    saved: Saved,
    grads: Incoming,
    grad_z: Tensor | None,
    call: Call,
    asked: Asked,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape if asked.x else (0, *x.shape[1:])),
        z.new_empty(z.shape),
        z.new_empty(asked.fields, *z.shape),
        z.new_empty(asked.samples if asked.input_weights else 0, *weights.input.shape),
        z.new_empty(asked.samples if asked.recurrent_weights else 0, *weights.recurrent.shape),
        z.new_empty(NUM_CONSTANTS, weights.constants.shape[1] if asked.constants else 0),
    )


def _compute_recurrent_backward(
    x: Tensor,
    z: Tensor,
    weights: Weights,
    saved: Saved,
    grads: Incoming,
    grad_z: Tensor | None,
    call: Call,
    asked: Asked,
) -> tuple[Tensor, ...]:
    return time_blocks.backward(_network(x, weights, call), x, z, saved, grads, grad_z, call, asked)


class _Rules(_SingleLevelFunction):
    """The autograd and vmap rules of one operator. Under vmap the samples join the neurons or the batch of one call."""

    operator: str
    op: Any
    records: Callable[[tuple[Any, ...]], list[Any]]
    apply: Callable[..., Any]
    remember: Callable[..., None]
    vmap: Callable[..., Any]

    @classmethod
    def register(cls) -> None:
        """As rules of the operator itself, where autograd, compilers and ``torch.func`` find them.

        ``torch.library.register_autograd`` makes rules that ``torch.func.grad`` refuses (PyTorch 2.13). Like those, these
        differentiate at the level of the transform that dispatches here, and go on to the next one below.
        """
        cls.op = getattr(torch.ops.coba_triton, cls.operator).default
        cls.records = staticmethod(grouper(GROUPS[cls.operator]))  # of the arguments, or of what is known of each

        def autograd(keyset: Any, *args: Any) -> Any:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            if any(map(has_tangent, tensors)):  # PyTorch would drop them in silence
                raise NotImplementedError(
                    f"the {cls.call_of(args).backend!r} backend has no forward-mode differentiation, got a dual tensor; "
                    "pass backend='reference', which has"
                )
            if any(map(is_tracked, tensors)):
                with enable_single_level_autograd_function():
                    return cls.apply(keyset, *args)
            return cls.below(keyset, *args)

        _library.impl(cls.op, autograd, "Autograd", with_keyset=True)
        torch.library.register_vmap(cls.op, cls.vmap, lib=_library)

    @classmethod
    def call_of(cls, args: tuple[Any, ...]) -> Call:
        """The record of what the caller asks for."""
        call: Call = cls.records(args)[GROUPS[cls.operator].index(Call)]
        return call

    @classmethod
    def below(cls, keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return cls.op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    @classmethod
    def forward(cls, ctx: Any, keyset: Any, *args: Any) -> Any:
        outer = torch._C._are_functorch_transforms_active()  # the next transform below may track as well
        with torch.set_grad_enabled(outer), _set_fwd_grad_enabled(outer):
            output = cls.below(keyset, *args)
        cls.remember(ctx, args, output)
        return output


class _ForwardRules(_Rules):
    """A forward operator, whose last argument is ``save``: what a gradient needs is saved where one is tracked."""

    @classmethod
    def forward(cls, ctx: Any, keyset: Any, *args: Any) -> Any:
        *others, save = args
        return super().forward(ctx, keyset, *others, save is None or save)

    @staticmethod
    def saved_call(ctx: Any) -> Call:
        """The call whose backward runs."""
        call: Call = ctx.call
        if not call.save:
            raise RuntimeError(
                "the operator saved nothing for the backward pass, which needs save=None or save=True, got save=False"
            )
        return call


class _BackwardRules(_Rules):
    """A backward operator, which has no derivative."""

    @classmethod
    def remember(cls, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend = cls.call_of(inputs).backend

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise NotImplementedError(
            f"the {ctx.backend!r} backend differentiates once, got a gradient of its gradient; pass backend='reference', "
            "which supports double backward and forward-mode differentiation"
        )


class _FeedForwardRules(_ForwardRules):
    operator = "feed_forward"

    @classmethod
    def remember(cls, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, state, constants, ctx.call = cls.records(inputs)
        ctx.fields = len(state)
        spikes, _, _, words, checkpoints = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(checkpoints)
        ctx.save_for_backward(x, constants, spikes if ctx.call.spike_dtype is None else words, checkpoints)

    @staticmethod
    def backward(
        ctx: Any, grad_spikes: Tensor | None, grad_final: Tensor | None, grad_states: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        call = _ForwardRules.saved_call(ctx)
        needed = ctx.needs_input_grad[1:4]
        grads = torch.ops.coba_triton.feed_forward_backward(
            *ctx.saved_tensors,
            *Incoming(grad_spikes, grad_final, grad_states),
            *call,
            *Asked(needed[0], False, False, needed[2], ctx.fields),
        )
        return None, *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * len(call)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size
        x, state, constants, call = cls.records(args)
        x_dim, state_dim, constants_dim, _ = cls.records(in_dims)
        x, state = join_all((x, state), (x_dim, state_dim), size, -1)
        constants = join_constants(constants, constants_dim, size, x.shape[1] // size)
        return part(torch.ops.coba_triton.feed_forward(x, state, constants, *call), size, -1)


class _FeedForwardBackwardRules(_BackwardRules):
    operator = "feed_forward_backward"

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size
        x, constants, saved, grads, call, asked = cls.records(args)
        x_dim, constants_dim, saved_dims, grads_dims, _, _ = cls.records(in_dims)
        x = join(x, x_dim, size, -1)
        shared = columns(constants, constants_dim)
        table = join_constants(constants, constants_dim, size, x.shape[1] // size, asked.constants)
        tensors = join_all((*saved, *grads), (*saved_dims, *grads_dims), size, -1)
        *grads, grad_constants = torch.ops.coba_triton.feed_forward_backward(x, table, *tensors, *call, *asked)
        (grad_x, grad_state), dims = part(grads, size, -1)
        return (grad_x, grad_state, part_constants(grad_constants, shared, size)), (*dims, 1)


class _RecurrentRules(_ForwardRules):
    operator = "recurrent"

    @classmethod
    def remember(cls, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, z, state, weights, ctx.call = cls.records(inputs)
        ctx.fields = len(state)
        spikes, _, _, _, words, checkpoints = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(checkpoints)
        ctx.save_for_backward(x, z, *weights, spikes if ctx.call.spike_dtype is None else words, checkpoints)

    @staticmethod
    def backward(
        ctx: Any,
        grad_spikes: Tensor | None,
        grad_z: Tensor | None,
        grad_final: Tensor | None,
        grad_states: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        call = _ForwardRules.saved_call(ctx)
        needed = x_needed, _, _, input_needed, recurrent_needed, constants_needed = ctx.needs_input_grad[1:7]
        x, z, state, input_weights, recurrent_weights, constants = torch.ops.coba_triton.recurrent_backward(
            *ctx.saved_tensors,
            *Incoming(grad_spikes, grad_final, grad_states),
            grad_z,
            *call,
            *Asked(x_needed, input_needed, recurrent_needed, constants_needed, ctx.fields),
        )
        grads = x, z, state, input_weights.squeeze(0), recurrent_weights.squeeze(0), constants
        return None, *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * len(call)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size
        x, z, state, weights, call = cls.records(args)
        x_dim, z_dim, state_dim, weights_dims, _ = cls.records(in_dims)
        if weights_dims.input is not None or weights_dims.recurrent is not None:
            return each(torch.ops.coba_triton.recurrent, size, in_dims, args)
        x, z, state = join_all((x, z, state), (x_dim, z_dim, state_dim), size, -2)
        table = join_constants(weights.constants, weights_dims.constants, size, z.numel() // size)
        outputs = torch.ops.coba_triton.recurrent(x, z, state, weights.input, weights.recurrent, table, *call)
        return part(outputs, size, -2)


class _RecurrentBackwardRules(_BackwardRules):
    operator = "recurrent_backward"

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size
        x, z, weights, saved, grads, grad_z, call, asked = cls.records(args)
        x_dim, z_dim, weights_dims, saved_dims, grads_dims, grad_z_dim, _, _ = cls.records(in_dims)
        if weights_dims.input is not None or weights_dims.recurrent is not None:
            return each(torch.ops.coba_triton.recurrent_backward, size, in_dims, args)
        x, z = join_all((x, z), (x_dim, z_dim), size, -2)
        shared = columns(weights.constants, weights_dims.constants)
        table = join_constants(weights.constants, weights_dims.constants, size, z.numel() // size, asked.constants)
        tensors = join_all((*saved, *grads, grad_z), (*saved_dims, *grads_dims, grad_z_dim), size, -2)
        asked = asked._replace(samples=size * asked.samples)
        *grads, input_sums, recurrent_sums, grad_constants = torch.ops.coba_triton.recurrent_backward(
            x, z, weights.input, weights.recurrent, table, *tensors, *call, *asked
        )
        grads, dims = part(grads, size, -2)
        sums, sums_dims = part((input_sums, recurrent_sums), size, -3)
        return (*grads, *sums, part_constants(grad_constants, shared, size)), (*dims, *sums_dims, 1)


def register(
    name: str,
    check: Callable[..., Any],
    allocate: Callable[..., Any],
    compute: Callable[..., Any],
    rules: type[_Rules] | None,
) -> None:
    """Make an operator of its three functions, with its rules, if it has any."""
    real, fake = (
        checked(GROUPS[name], check, function, with_data) for function, with_data in ((compute, True), (allocate, False))
    )
    _library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"coba_triton::{name}", fake, lib=_library)
    if rules is not None:
        rules.register()


register("feed_forward", _check_feed_forward, _allocate_feed_forward, _compute_feed_forward, _FeedForwardRules)
register("feed_forward_out", _check_feed_forward_out, _allocate_feed_forward_out, _compute_feed_forward_out, None)
register(
    "feed_forward_backward",
    _check_feed_forward_backward,
    _allocate_feed_forward_backward,
    _compute_feed_forward_backward,
    _FeedForwardBackwardRules,
)
register("recurrent", _check_recurrent, _allocate_recurrent, _compute_recurrent, _RecurrentRules)
register("recurrent_out", _check_recurrent_out, _allocate_recurrent_out, _compute_recurrent_out, None)
register(
    "recurrent_backward",
    _check_recurrent_backward,
    _allocate_recurrent_backward,
    _compute_recurrent_backward,
    _RecurrentBackwardRules,
)


def _is_plain(*tensors: Tensor) -> bool:
    """Whether nothing follows, transforms, traces or profiles a call."""
    return not (
        is_watched()
        or torch._C._autograd._profiler_enabled()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) or is_tracked(tensor) for tensor in tensors)
    )


def feed_forward(x: Tensor, state: Tensor, constants: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes, final state and recorded states of the operator. A plain call goes straight to the kernels.

    The dispatcher, and what only a gradient needs, take a third of a short call's time.
    """
    if _is_plain(x, state, constants):
        spikes = _empty_spikes(x, call.spike_dtype, x.shape[1:])
        return spikes, *_compute_feed_forward_out(x, state, constants, spikes, call)
    spikes, final, states, *_ = torch.ops.coba_triton.feed_forward(x, state, constants, *call)
    return spikes, final, states


def recurrent(x: Tensor, z: Tensor, state: Tensor, weights: Weights, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spikes, last spikes, final state and recorded states of the operator, likewise."""
    if not call.record_states and _is_plain(x, z, state, *weights):
        spikes = _empty_spikes(x, call.spike_dtype, z.shape)
        last, final = _compute_recurrent_out(x, z, state, weights, spikes, call)
        return spikes, last, final, state.new_empty(len(state), 0, *z.shape)
    spikes, last, final, states, *_ = torch.ops.coba_triton.recurrent(x, z, state, *weights, *call)
    return spikes, last, final, states


def _empty_spikes(x: Tensor, spike_dtype: torch.dtype | None, neurons: torch.Size) -> Tensor:
    """A buffer for the spikes of a run over ``x [T, ...]``."""
    steps = x.shape[0]
    rows, dtype = (word_count(steps), torch.int32) if spike_dtype is None else (steps, spike_dtype)
    if type(x) is Tensor and x.device.type == "cpu" and not is_watched():
        return memory.empty((rows, *neurons), dtype)
    return x.new_empty(rows, *neurons, dtype=dtype)


def feed_forward_out(x: Tensor, state: Tensor, constants: Tensor, spikes: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Final state and recorded states of ``coba_triton::feed_forward_out``, which writes to ``spikes``."""
    if _is_plain(x, state, constants, spikes):
        return _compute_feed_forward_out(x, state, constants, spikes, call)
    final, states = torch.ops.coba_triton.feed_forward_out(x, state, constants, spikes, *call)
    return final, states


def recurrent_out(
    x: Tensor, z: Tensor, state: Tensor, weights: Weights, spikes: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """Last spikes and final state of ``coba_triton::recurrent_out``, likewise."""
    if _is_plain(x, z, state, *weights, spikes):
        return _compute_recurrent_out(x, z, state, weights, spikes, call)
    last, final = torch.ops.coba_triton.recurrent_out(x, z, state, *weights, spikes, *call)
    return last, final
