"""The operators behind the whole-sequence functions: schema, shapes, autograd and vmap rules, a kernel per backend.

``coba_triton::feed_forward`` and ``coba_triton::recurrent`` are ordinary differentiable PyTorch operators; each has a
backward operator, and a form that writes spikes into a given buffer. The forward saves its input, one bit per spike, and
the state before every ``checkpoint_every``-th step (recurrent: before every block); the backward recomputes the rest.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from ..neuron.records import Constants, Sums
from ..tuning.tables import launch_parameters
from . import time_blocks
from .constants import constants_gradient
from .operands import COMPUTE, INPUT, WORDS, Operand, check_options, checked, rank, rows_of
from .samples import columns, each, join, join_constants, join_optional, part, part_constants
from .spikes import word_count
from .tensors import FLOATING, SPIKES, has_tangent, is_tracked, is_watched
from .time_blocks import PATHS, Network, choose_block_steps
from .validation import check_block_steps, check_path

NUM_CONSTANTS = len(Constants._fields)
NUM_SUMS = len(Sums._fields)
# Steps between two saved states of the CPU path: 0.75 bytes per neuron-step of float32, 1.5 of float64.
CPU_CHECKPOINT_EVERY = 16

_library = torch.library.Library("coba_triton", "DEF")

_library.define(
    "feed_forward(Tensor x, Tensor state, Tensor constants, str backend, bool jump_first, str method, "
    "ScalarType? spike_dtype, bool record_states, int checkpoint_every, bool? save) "
    "-> (Tensor spikes, Tensor final, Tensor states, Tensor words, Tensor checkpoints)"
)
_library.define(
    "feed_forward_out(Tensor x, Tensor state, Tensor constants, str backend, bool jump_first, bool record_states, "
    "Tensor(a!) spikes) -> (Tensor final, Tensor states)"
)
_library.define(
    "feed_forward_backward(Tensor x, Tensor constants, Tensor words, Tensor checkpoints, Tensor? grad_spikes, "
    "Tensor? grad_final, Tensor? grad_states, str backend, bool jump_first, str method, int checkpoint_every, "
    "bool x_grad, bool constants_grad) -> (Tensor grad_x, Tensor grad_state, Tensor grad_constants)"
)
_library.define(
    "recurrent(Tensor x, Tensor z, Tensor state, Tensor input_weights, Tensor recurrent_weights, Tensor constants, "
    "str backend, bool jump_first, str method, ScalarType? spike_dtype, bool record_states, int? block_steps, str path, "
    "bool? save) -> (Tensor spikes, Tensor z_final, Tensor final, Tensor states, Tensor words, Tensor checkpoints)"
)
_library.define(
    "recurrent_out(Tensor x, Tensor z, Tensor state, Tensor input_weights, Tensor recurrent_weights, Tensor constants, "
    "str backend, bool jump_first, int? block_steps, str path, Tensor(a!) spikes) -> (Tensor z_final, Tensor final)"
)
_library.define(
    "recurrent_backward(Tensor x, Tensor z, Tensor input_weights, Tensor recurrent_weights, Tensor constants, "
    "Tensor words, Tensor checkpoints, Tensor? grad_spikes, Tensor? grad_z, Tensor? grad_final, Tensor? grad_states, "
    "str backend, bool jump_first, str method, int? block_steps, int samples, bool x_grad, bool input_weights_grad, "
    "bool recurrent_weights_grad, bool constants_grad) -> (Tensor grad_x, Tensor grad_z, Tensor grad_state, "
    "Tensor grad_input_weights, Tensor grad_recurrent_weights, Tensor grad_constants)"
)


@functools.cache
def feed_forward_kernels(backend: str) -> ModuleType:
    """The module that launches a backend's kernels of unconnected neurons, imported when first needed."""
    return importlib.import_module({"triton": "..backend.triton", "cpu": "..backend.cpu.launch"}[backend], __package__)


@functools.cache
def recurrent_kernels(backend: str) -> ModuleType:
    """The same for recurrent populations."""
    return importlib.import_module(
        {"triton": "..backend.triton", "cpu": "..backend.cpu.launch_recurrent"}[backend], __package__
    )


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
        words[word_count(steps) :] = 0


class ForwardOptions(NamedTuple):
    """What ``coba_triton::feed_forward`` takes after its tensors; ``save``: what the backward needs, None: if asked for."""

    backend: str
    jump_first: bool
    method: str
    spike_dtype: torch.dtype | None
    record_states: bool
    checkpoint_every: int
    save: bool | None


class BackwardOptions(NamedTuple):
    """What ``coba_triton::feed_forward_backward`` takes after its tensors."""

    backend: str
    jump_first: bool
    method: str
    checkpoint_every: int
    x_grad: bool
    constants_grad: bool


def _unconnected(x: Tensor, constants: Tensor, *states: Tensor) -> Iterator[Operand]:
    """The tensors that every operator of unconnected neurons has, and a state, if it has one."""
    steps, neurons = x.shape if x.dim() == 2 else (0, 0)
    yield Operand("x", x, (steps, neurons), INPUT)
    for state in states:
        yield Operand("state", state, (_fields(state), neurons), COMPUTE)
    yield _table(constants, neurons, (states[0].dtype,) if states else COMPUTE)


def _fields(state: Tensor | None) -> int:
    """The fields of a state, of which a refractory period adds one."""
    return 4 if state is not None and state.dim() and state.shape[0] == 4 else 3


def _fields_of(checkpoints: Tensor, states: int) -> int:
    """The fields of the saved states."""
    return 4 if states and checkpoints is not None and checkpoints.dim() and checkpoints.shape[0] == 4 * states else 3


def _table(constants: Tensor, cells: int, dtypes: tuple[torch.dtype, ...]) -> Operand:
    """The constants, one column for all neurons or one for each."""
    shared = rank(constants) == 2 and constants.shape[1] == 1
    return Operand("constants", constants, (NUM_CONSTANTS, 1 if shared else cells), dtypes)


def _written(spikes: Tensor, steps: int, shape: tuple[int, ...]) -> Operand:
    """A buffer for spikes, packed or not."""
    packed = spikes is not None and spikes.dtype == torch.int32
    dtypes = WORDS if packed else SPIKES
    return Operand("spikes", spikes, (word_count(steps) if packed else steps, *shape), dtypes, written=True)


def _given(name: str, grad: Tensor | None, shape: tuple[int, ...], *dtypes: torch.dtype) -> Operand:
    """A gradient, if there is one."""
    return Operand(name, grad, shape, dtypes, optional=True)


def _recorded(grad: Tensor | None, fields: int, steps: int, shape: tuple[int, ...], dtype: torch.dtype) -> Operand:
    """The gradient by the states of all steps, or by those of none, as none were recorded."""
    none = grad is not None and grad.dim() > 1 and grad.shape[1] == 0
    return _given("grad_states", grad, (fields, 0 if none else steps, *shape), dtype)


def _feed_forward_operands(x: Tensor, state: Tensor, constants: Tensor, *options: Any) -> Iterator[Operand]:
    o = ForwardOptions(*options)
    check_options(o.backend, o.method, o.spike_dtype, o.checkpoint_every)
    yield from _unconnected(x, constants, state)


def _feed_forward_fake(x: Tensor, state: Tensor, constants: Tensor, *options: Any) -> tuple[Tensor, ...]:
    o = ForwardOptions(*options)
    steps, neurons = x.shape
    spikes = (
        x.new_empty(word_count(steps), neurons, dtype=torch.int32)
        if o.spike_dtype is None
        else x.new_empty(steps, neurons, dtype=o.spike_dtype)
    )
    # packed spikes serve the backward as they are
    words = x.new_empty(_saved_word_count(steps) if o.save and o.spike_dtype is not None else 0, neurons, dtype=torch.int32)
    states = state.new_empty(len(state), steps if o.record_states else 0, neurons)
    saved = checkpoint_count(steps, o.checkpoint_every, o.backend) if o.save else 0
    # rows of v, g_e and g_i: a compiler knows that there is more than one, and needs no graph for one state alone
    checkpoints = state.new_empty(len(state) * saved, neurons)
    return spikes, state.new_empty(state.shape), states, words, checkpoints


def _feed_forward(x: Tensor, state: Tensor, constants: Tensor, *options: Any) -> tuple[Tensor, ...]:
    o = ForwardOptions(*options)
    spikes, final, states, words, checkpoints = _feed_forward_fake(x, state, constants, *options)
    _clear_spare(words, x.shape[0])
    if x.numel() == 0:
        return spikes, _copy(state), states, words, checkpoints
    packed = words if o.save else None
    feed_forward_kernels(o.backend).feed_forward_forward(
        x,
        constants.contiguous(),
        o.jump_first,
        o.checkpoint_every if o.save else 0,
        state.contiguous(),
        final,
        spikes if o.spike_dtype is not None else None,
        packed if o.spike_dtype is not None else spikes,
        states if o.record_states else None,
        checkpoints.unflatten(0, (-1, len(state))) if o.save else None,
    )
    return spikes, final, states, words, checkpoints


def _feed_forward_out_operands(
    x: Tensor, state: Tensor, constants: Tensor, backend: str, jump_first: bool, record_states: bool, spikes: Tensor
) -> Iterator[Operand]:
    check_options(backend)
    yield from _unconnected(x, constants, state)
    yield _written(spikes, x.shape[0], x.shape[1:])


def _feed_forward_out_fake(x: Tensor, state: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, record_states, _ = others
    return state.new_empty(state.shape), state.new_empty(len(state), x.shape[0] if record_states else 0, x.shape[1])


def _feed_forward_out(
    x: Tensor, state: Tensor, constants: Tensor, backend: str, jump_first: bool, record_states: bool, spikes: Tensor
) -> tuple[Tensor, Tensor]:
    """The forward into a given buffer ``[T, M]`` or, for packed spikes, int32 ``[ceil(T / 32), M]``; saves nothing."""
    final, states = _feed_forward_out_fake(x, state, record_states, spikes)
    if x.numel() == 0:
        return _copy(state), states
    packed = spikes.dtype == torch.int32
    feed_forward_kernels(backend).feed_forward_forward(
        x,
        constants.contiguous(),
        jump_first,
        0,
        state.contiguous(),
        final,
        None if packed else spikes,
        spikes if packed else None,
        states if record_states else None,
        None,
    )
    return final, states


def _feed_forward_backward_operands(x: Tensor, constants: Tensor, *others: Any) -> Iterator[Operand]:
    words, checkpoints, grad_spikes, grad_final, grad_states, *options = others
    o = BackwardOptions(*options)
    check_options(o.backend, o.method, None, o.checkpoint_every)
    yield from _unconnected(x, constants)
    steps, neurons = x.shape
    dtype = constants.dtype
    yield Operand("x, as its gradient is asked for,", x, (steps, neurons), FLOATING if o.x_grad else INPUT)
    yield Operand("words", words, (rows_of(words, word_count(steps)), neurons), WORDS)
    states = checkpoint_count(steps, o.checkpoint_every, o.backend)
    fields = _fields_of(checkpoints, states)
    yield Operand("checkpoints", checkpoints, (fields * states, neurons), (dtype,))
    yield _given("grad_spikes", grad_spikes, (steps, neurons), *FLOATING)
    yield _given("grad_final", grad_final, (fields, neurons), dtype)
    yield _recorded(grad_states, fields, steps, (neurons,), dtype)


def _feed_forward_backward_fake(x: Tensor, constants: Tensor, *others: Any) -> tuple[Tensor, ...]:
    o = BackwardOptions(*others[5:])
    steps, neurons = x.shape
    fields = _fields_of(others[1], checkpoint_count(steps, o.checkpoint_every, o.backend))
    return (
        x.new_empty(x.shape if o.x_grad else (0, neurons)),
        constants.new_empty(3, neurons) if fields == 3 else constants.new_zeros(fields, neurons),
        constants.new_empty(NUM_CONSTANTS, constants.shape[1] if o.constants_grad else 0),
    )


def _feed_forward_backward(
    x: Tensor,
    constants: Tensor,
    words: Tensor,
    checkpoints: Tensor,
    grad_spikes: Tensor | None,
    grad_final: Tensor | None,
    grad_states: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    o = BackwardOptions(*options)
    grads = grad_spikes, grad_final, grad_states
    grad_x, grad_state, shared = _feed_forward_backward_fake(x, constants, words, checkpoints, *grads, *options)
    if x.numel() == 0:
        grad_state.zero_() if grad_final is None else grad_state.copy_(grad_final)
        return grad_x, grad_state, shared.zero_()
    sums = constants.new_empty(NUM_SUMS, x.shape[1] if o.constants_grad else 0)
    feed_forward_kernels(o.backend).feed_forward_backward(
        x,
        constants.contiguous(),
        o.jump_first,
        o.method,
        o.checkpoint_every,
        words.contiguous(),
        checkpoints.contiguous().unflatten(0, (-1, len(grad_state))),
        grad_spikes,
        None if grad_final is None else grad_final.contiguous(),
        grad_states.contiguous() if grad_states is not None and grad_states.numel() else None,  # none were recorded
        grad_x,
        grad_state,
        sums,
    )
    return grad_x, grad_state, constants_gradient(sums, constants)


class RecurrentOptions(NamedTuple):
    """What ``coba_triton::recurrent`` takes after its tensors; ``save`` as in :class:`ForwardOptions`."""

    backend: str
    jump_first: bool
    method: str
    spike_dtype: torch.dtype | None
    record_states: bool
    block_steps: int | None
    path: str
    save: bool | None


class RecurrentBackwardOptions(NamedTuple):
    """What ``coba_triton::recurrent_backward`` takes after its tensors.

    The rows of the batch are ``samples`` equal groups, one after the other, each with weight gradients of its own:
    ``[samples, N, I]`` and ``[samples, N, N]``.
    """

    backend: str
    jump_first: bool
    method: str
    block_steps: int | None
    samples: int
    x_grad: bool
    input_weights_grad: bool
    recurrent_weights_grad: bool
    constants_grad: bool


def _connected(
    block_steps: int | None,
    x: Tensor,
    z: Tensor,
    states: tuple[Tensor, ...],
    input_weights: Tensor,
    recurrent_weights: Tensor,
    constants: Tensor,
) -> Iterator[Operand]:
    """The tensors that every operator of recurrent populations has, and a state, if it has one."""
    check_block_steps(block_steps)
    steps, batch, inputs = x.shape if x.dim() == 3 else (0, 0, 0)
    yield Operand("x", x, (steps, batch, inputs), INPUT)
    neurons = z.shape[1] if rank(z) == 2 else 0
    yield Operand("z", z, (batch, neurons), COMPUTE)
    dtype = (z.dtype,)
    for state in states:
        yield Operand("state", state, (_fields(state), batch, neurons), dtype)
    yield Operand("input_weights", input_weights, (neurons, inputs), dtype)
    yield Operand("recurrent_weights", recurrent_weights, (neurons, neurons), dtype)
    yield _table(constants, batch * neurons, dtype)


def _recurrent_operands(*args: Any) -> Iterator[Operand]:
    o = RecurrentOptions(*args[6:])
    check_options(o.backend, o.method, o.spike_dtype)
    check_path(o.path, PATHS)
    x, z, state, *weights_and_constants = args[:6]
    yield from _connected(o.block_steps, x, z, (state,), *weights_and_constants)


def _recurrent_fake(x: Tensor, z: Tensor, state: Tensor, *others: Any) -> tuple[Tensor, ...]:
    o = RecurrentOptions(*others[3:])
    steps = x.shape[0]
    blocks = _block_count(o.block_steps, steps, z) if o.save else 0
    return (
        x.new_empty(word_count(steps) if o.spike_dtype is None else steps, *z.shape, dtype=o.spike_dtype or torch.int32),
        z.new_empty(z.shape),
        state.new_empty(state.shape),
        state.new_empty(len(state), steps if o.record_states else 0, *z.shape),
        x.new_empty(_saved_word_count(steps) if o.save and o.spike_dtype is not None else 0, *z.shape, dtype=torch.int32),
        state.new_empty(len(state) * blocks, *z.shape),
    )


def _block_count(block_steps: int | None, steps: int, z: Tensor) -> int:
    """Blocks of a recurrent training step, before each of which a state is kept."""
    block = choose_block_steps(block_steps, steps, z.numel(), z.element_size(), train=True)
    blocks: int = torch.sym_max(1, (steps + block - 1) // block)  # no block has to be provably none
    return blocks


def recurrent_forward(net: Network, x: Tensor, z: Tensor, state: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """What ``coba_triton::recurrent`` returns, of any network: also of one whose processes exchange spikes."""
    o = RecurrentOptions(*options)
    outputs = _recurrent_fake(x, z, state, net.input_weights, net.recurrent_weights, net.constants, *options)
    spikes, _, _, states, words, checkpoints = outputs
    _clear_spare(words, x.shape[0])
    if x.shape[0] == 0 or z.numel() == 0:
        return spikes, _copy(z), _copy(state), states, words, checkpoints
    packed = spikes if o.spike_dtype is None else words if o.save else None
    z, state = time_blocks.forward(
        net,
        x,
        z,
        state.contiguous(),
        spikes if o.spike_dtype is not None else None,
        packed,
        states if o.record_states else None,
        checkpoints.unflatten(0, (-1, len(state))) if o.save else None,
        choose_block_steps(o.block_steps, x.shape[0], z.numel(), z.element_size(), bool(o.save)),
        o.path,
    )
    return spikes, z, state, states, words, checkpoints


def _network(
    x: Tensor, input_weights: Tensor, recurrent_weights: Tensor, constants: Tensor, jump_first: bool, backend: str
) -> Network:
    """The network for the steps and batch rows of ``x [T, B, I]``."""
    kernels, uses = recurrent_kernels(backend), x.shape[0] * x.shape[1]
    return Network.of(input_weights, recurrent_weights, constants, jump_first, kernels, uses=uses)


def _recurrent(
    x: Tensor,
    z: Tensor,
    state: Tensor,
    input_weights: Tensor,
    recurrent_weights: Tensor,
    constants: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    o = RecurrentOptions(*options)
    net = _network(x, input_weights, recurrent_weights, constants, o.jump_first, o.backend)
    return recurrent_forward(net, x, z, state, *options)


def _recurrent_out_operands(x: Tensor, z: Tensor, *others: Any) -> Iterator[Operand]:
    state, *tensors, backend, _, block_steps, path, spikes = others
    check_options(backend)
    check_path(path, PATHS)
    yield from _connected(block_steps, x, z, (state,), *tensors)
    yield _written(spikes, x.shape[0], z.shape)


def _recurrent_out_fake(x: Tensor, z: Tensor, state: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), state.new_empty(state.shape)


def _recurrent_out(
    x: Tensor,
    z: Tensor,
    state: Tensor,
    input_weights: Tensor,
    recurrent_weights: Tensor,
    constants: Tensor,
    backend: str,
    jump_first: bool,
    block_steps: int | None,
    path: str,
    spikes: Tensor,
) -> tuple[Tensor, Tensor]:
    """The forward into a given buffer ``[T, B, N]`` or, for packed spikes, int32 ``[ceil(T / 32), B, N]``."""
    if x.shape[0] == 0 or z.numel() == 0:
        return _copy(z), _copy(state)
    net = _network(x, input_weights, recurrent_weights, constants, jump_first, backend)
    packed = spikes.dtype == torch.int32
    block = choose_block_steps(block_steps, x.shape[0], z.numel(), z.element_size(), train=False)
    return time_blocks.forward(
        net, x, z, state.contiguous(), None if packed else spikes, spikes if packed else None, None, None, block, path
    )


def _recurrent_backward_operands(
    x: Tensor, z: Tensor, input_weights: Tensor, recurrent_weights: Tensor, constants: Tensor, *others: Any
) -> Iterator[Operand]:
    words, checkpoints, grad_spikes, grad_z, grad_final, grad_states, *options = others
    o = RecurrentBackwardOptions(*options)
    check_options(o.backend, o.method)
    yield from _connected(o.block_steps, x, z, (), input_weights, recurrent_weights, constants)
    if o.samples < 1 or z.shape[0] % o.samples:
        raise ValueError(f"samples must divide the rows of the batch, {z.shape[0]}, got {o.samples}")
    steps, shape, dtype = x.shape[0], z.shape, (z.dtype,)
    yield Operand("x, as its gradient is asked for,", x, x.shape, FLOATING if o.x_grad else INPUT)
    yield Operand("words", words, (rows_of(words, word_count(steps)), *shape), WORDS)
    blocks = _block_count(o.block_steps, steps, z)
    fields = _fields_of(checkpoints, blocks)
    yield Operand("checkpoints", checkpoints, (fields * blocks, *shape), dtype)
    yield _given("grad_spikes", grad_spikes, (steps, *shape), *FLOATING)
    yield _given("grad_z", grad_z, shape, *dtype)
    yield _given("grad_final", grad_final, (fields, *shape), *dtype)
    yield _recorded(grad_states, fields, steps, shape, z.dtype)


def _recurrent_backward_fake(
    x: Tensor, z: Tensor, input_weights: Tensor, recurrent_weights: Tensor, constants: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    o = RecurrentBackwardOptions(*others[6:])
    return (
        x.new_empty(x.shape if o.x_grad else (0, *x.shape[1:])),
        z.new_empty(z.shape),
        z.new_empty(_fields_of(others[1], _block_count(o.block_steps, x.shape[0], z)), *z.shape),
        z.new_empty(o.samples if o.input_weights_grad else 0, *input_weights.shape),
        z.new_empty(o.samples if o.recurrent_weights_grad else 0, *recurrent_weights.shape),
        constants.new_empty(NUM_CONSTANTS, constants.shape[1] if o.constants_grad else 0),
    )


def recurrent_gradients(
    net: Network,
    x: Tensor,
    z: Tensor,
    words: Tensor,
    checkpoints: Tensor,
    grad_spikes: Tensor | None,
    grad_z: Tensor | None,
    grad_final: Tensor | None,
    grad_states: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """What ``coba_triton::recurrent_backward`` returns, of any network."""
    o = RecurrentBackwardOptions(*options)
    return time_blocks.backward(
        net,
        x,
        z,
        words.contiguous(),
        checkpoints.contiguous().unflatten(0, (-1, _fields_of(checkpoints, _block_count(o.block_steps, x.shape[0], z)))),
        choose_block_steps(o.block_steps, x.shape[0], z.numel(), z.element_size(), train=True),
        o.method,
        grad_spikes,
        grad_z,
        grad_final,
        grad_states,
        o.samples,
        o.x_grad,
        o.input_weights_grad,
        o.recurrent_weights_grad,
        o.constants_grad,
    )


def _recurrent_backward(
    x: Tensor, z: Tensor, input_weights: Tensor, recurrent_weights: Tensor, constants: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    o = RecurrentBackwardOptions(*others[6:])
    net = _network(x, input_weights, recurrent_weights, constants, o.jump_first, o.backend)
    return recurrent_gradients(net, x, z, *others)


def _backend(args: tuple[Any, ...]) -> str:
    """The first word among an operator's arguments."""
    return next(arg for arg in args if isinstance(arg, str))


class _Operator(_SingleLevelFunction):
    """The autograd and vmap rules of one operator. Under vmap the samples join the neurons or the batch of one call."""

    op: Any
    apply: Callable[..., Any]
    remember: Callable[..., None]
    vmap: Callable[..., Any]

    @classmethod
    def register(cls) -> None:
        """As rules of the operator itself, where autograd, compilers and ``torch.func`` find them.

        ``torch.library.register_autograd`` makes rules that ``torch.func.grad`` refuses (PyTorch 2.13). Like those, these
        differentiate at the level of the transform that dispatches here, and go on to the next one below.
        """

        def autograd(keyset: Any, *args: Any) -> Any:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            if any(map(has_tangent, tensors)):  # PyTorch would drop them in silence
                raise NotImplementedError(
                    f"the {_backend(args)!r} backend has no forward-mode differentiation, got a dual tensor; "
                    "pass backend='reference', which has"
                )
            if any(map(is_tracked, tensors)):
                with enable_single_level_autograd_function():
                    return cls.apply(keyset, *args)
            return cls.below(keyset, *args)

        _library.impl(cls.op, autograd, "Autograd", with_keyset=True)
        torch.library.register_vmap(cls.op, cls.vmap, lib=_library)

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


class _Forward(_Operator):
    """A forward operator, whose last argument is ``save``: what a gradient needs is saved where one is tracked."""

    @classmethod
    def forward(cls, ctx: Any, keyset: Any, *args: Any) -> Any:
        *others, save = args
        return super().forward(ctx, keyset, *others, save is None or save)


def _saved(ctx: Any) -> Any:
    """The options of a forward operator whose backward runs."""
    if not ctx.options.save:
        raise RuntimeError(
            "the operator saved nothing for the backward pass, which needs save=None or save=True, got save=False"
        )
    return ctx.options


class _Backward(_Operator):
    """A backward operator, which has no derivative."""

    @staticmethod
    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend = _backend(inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise NotImplementedError(
            f"the {ctx.backend!r} backend differentiates once, got a gradient of its gradient; pass backend='reference', "
            "which supports double backward and forward-mode differentiation"
        )


class _FeedForward(_Forward):
    op = torch.ops.coba_triton.feed_forward.default

    @staticmethod
    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, constants, *options = inputs
        ctx.options = ForwardOptions(*options)
        spikes, _, _, words, checkpoints = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(checkpoints)
        ctx.save_for_backward(x, constants, spikes if ctx.options.spike_dtype is None else words, checkpoints)

    @staticmethod
    def backward(
        ctx: Any, grad_spikes: Tensor | None, grad_final: Tensor | None, grad_states: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        o = _saved(ctx)
        needed = ctx.needs_input_grad[1:4]
        grads = torch.ops.coba_triton.feed_forward_backward(
            *ctx.saved_tensors,
            grad_spikes,
            grad_final,
            grad_states,
            *BackwardOptions(o.backend, o.jump_first, o.method, o.checkpoint_every, needed[0], needed[2]),
        )
        return None, *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * len(o)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, state: Tensor, constants: Tensor, *options: Any) -> Any:
        size = info.batch_size
        x, state = (join(tensor, dim, size, -1) for tensor, dim in zip((x, state), in_dims, strict=False))
        constants = join_constants(constants, in_dims[2], size, x.shape[1] // size)
        return part(torch.ops.coba_triton.feed_forward(x, state, constants, *options), size, -1)


class _FeedForwardBackward(_Backward):
    op = torch.ops.coba_triton.feed_forward_backward.default

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, constants: Tensor, *others: Any) -> Any:
        size, o = info.batch_size, BackwardOptions(*others[5:])
        x = join(x, in_dims[0], size, -1)
        shared = columns(constants, in_dims[1])
        table = join_constants(constants, in_dims[1], size, x.shape[1] // size, o.constants_grad)
        tensors = (join_optional(tensor, dim, size, -1) for tensor, dim in zip(others[:5], in_dims[2:], strict=False))
        *grads, grad_constants = torch.ops.coba_triton.feed_forward_backward(x, table, *tensors, *o)
        (grad_x, grad_state), dims = part(grads, size, -1)
        return (grad_x, grad_state, part_constants(grad_constants, shared, size)), (*dims, 1)


class _Recurrent(_Forward):
    op = torch.ops.coba_triton.recurrent.default

    @staticmethod
    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, z, _, input_weights, recurrent_weights, constants, *options = inputs
        ctx.options = RecurrentOptions(*options)
        spikes, _, _, _, words, checkpoints = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(checkpoints)
        words = spikes if ctx.options.spike_dtype is None else words
        ctx.save_for_backward(x, z, input_weights, recurrent_weights, constants, words, checkpoints)

    @staticmethod
    def backward(
        ctx: Any,
        grad_spikes: Tensor | None,
        grad_z: Tensor | None,
        grad_final: Tensor | None,
        grad_states: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        o = _saved(ctx)
        needed = x_needed, _, _, input_needed, recurrent_needed, constants_needed = ctx.needs_input_grad[1:7]
        x, z, state, input_weights, recurrent_weights, constants = torch.ops.coba_triton.recurrent_backward(
            *ctx.saved_tensors,
            grad_spikes,
            grad_z,
            grad_final,
            grad_states,
            *RecurrentBackwardOptions(
                o.backend,
                o.jump_first,
                o.method,
                o.block_steps,
                1,
                x_needed,
                input_needed,
                recurrent_needed,
                constants_needed,
            ),
        )
        grads = x, z, state, input_weights.squeeze(0), recurrent_weights.squeeze(0), constants
        return None, *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * len(o)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size
        x, z, state, input_weights, recurrent_weights, constants, *options = args
        if in_dims[3] is not None or in_dims[4] is not None:
            return each(torch.ops.coba_triton.recurrent, size, in_dims, args)
        x, z, state = (join(tensor, dim, size, -2) for tensor, dim in zip((x, z, state), in_dims, strict=False))
        constants = join_constants(constants, in_dims[5], size, z.numel() // size)
        outputs = torch.ops.coba_triton.recurrent(x, z, state, input_weights, recurrent_weights, constants, *options)
        return part(outputs, size, -2)


class _RecurrentBackward(_Backward):
    op = torch.ops.coba_triton.recurrent_backward.default

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size
        x, z, input_weights, recurrent_weights, constants = args[:5]
        if in_dims[2] is not None or in_dims[3] is not None:
            return each(torch.ops.coba_triton.recurrent_backward, size, in_dims, args)
        o = RecurrentBackwardOptions(*args[11:])
        x, z = (join(tensor, dim, size, -2) for tensor, dim in zip((x, z), in_dims, strict=False))
        shared = columns(constants, in_dims[4])
        table = join_constants(constants, in_dims[4], size, z.numel() // size, o.constants_grad)
        tensors = (join_optional(tensor, dim, size, -2) for tensor, dim in zip(args[5:11], in_dims[5:], strict=False))
        *grads, input_sums, recurrent_sums, grad_constants = torch.ops.coba_triton.recurrent_backward(
            x, z, input_weights, recurrent_weights, table, *tensors, *o._replace(samples=size * o.samples)
        )
        grads, dims = part(grads, size, -2)
        sums, sums_dims = part((input_sums, recurrent_sums), size, -3)
        return (*grads, *sums, part_constants(grad_constants, shared, size)), (*dims, *sums_dims, 1)


for _operator, _operands, _implementation, _fake in (
    ("feed_forward", _feed_forward_operands, _feed_forward, _feed_forward_fake),
    ("feed_forward_out", _feed_forward_out_operands, _feed_forward_out, _feed_forward_out_fake),
    ("feed_forward_backward", _feed_forward_backward_operands, _feed_forward_backward, _feed_forward_backward_fake),
    ("recurrent", _recurrent_operands, _recurrent, _recurrent_fake),
    ("recurrent_out", _recurrent_out_operands, _recurrent_out, _recurrent_out_fake),
    ("recurrent_backward", _recurrent_backward_operands, _recurrent_backward, _recurrent_backward_fake),
):
    _library.impl(_operator, checked(_operands, _implementation, with_data=True), "CompositeExplicitAutograd")
    torch.library.register_fake(f"coba_triton::{_operator}", checked(_operands, _fake, with_data=False), lib=_library)
for _rules in (_FeedForward, _FeedForwardBackward, _Recurrent, _RecurrentBackward):
    _rules.register()


def _is_plain(*tensors: Tensor) -> bool:
    """Whether nothing follows, transforms, traces or profiles a call."""
    return not (
        is_watched()
        or torch._C._autograd._profiler_enabled()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) or is_tracked(tensor) for tensor in tensors)
    )


def feed_forward(
    x: Tensor,
    state: Tensor,
    constants: Tensor,
    backend: str,
    jump_first: bool,
    method: str,
    spike_dtype: torch.dtype | None,
    record_states: bool,
    checkpoint_every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes, final state and recorded states of the operator. A plain call goes straight to the kernels.

    The dispatcher, and what only a gradient needs, take a third of a short call's time.
    """
    if _is_plain(x, state, constants):
        spikes = _empty_spikes(x, spike_dtype, x.shape[1:])
        return spikes, *_feed_forward_out(x, state, constants, backend, jump_first, record_states, spikes)
    options = ForwardOptions(backend, jump_first, method, spike_dtype, record_states, checkpoint_every, None)
    spikes, final, states, *_ = torch.ops.coba_triton.feed_forward(x, state, constants, *options)
    return spikes, final, states


def recurrent(
    x: Tensor,
    z: Tensor,
    state: Tensor,
    input_weights: Tensor,
    recurrent_weights: Tensor,
    constants: Tensor,
    backend: str,
    jump_first: bool,
    method: str,
    spike_dtype: torch.dtype | None,
    record_states: bool,
    block_steps: int | None,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spikes, last spikes, final state and recorded states of the operator, likewise."""
    tensors = x, z, state, input_weights, recurrent_weights, constants
    if not record_states and _is_plain(*tensors):
        spikes = _empty_spikes(x, spike_dtype, z.shape)
        return (
            spikes,
            *_recurrent_out(*tensors, backend, jump_first, block_steps, path, spikes),
            state.new_empty(len(state), 0, *z.shape),
        )
    options = RecurrentOptions(backend, jump_first, method, spike_dtype, record_states, block_steps, path, None)
    spikes, z, final, states, *_ = torch.ops.coba_triton.recurrent(*tensors, *options)
    return spikes, z, final, states


def _empty_spikes(x: Tensor, spike_dtype: torch.dtype | None, neurons: torch.Size) -> Tensor:
    """A buffer for the spikes of a run over ``x [T, ...]``."""
    rows, dtype = (word_count(len(x)), torch.int32) if spike_dtype is None else (len(x), spike_dtype)
    return x.new_empty(rows, *neurons, dtype=dtype)


def feed_forward_out(x: Tensor, state: Tensor, constants: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Final state and recorded states of ``coba_triton::feed_forward_out``, whose last argument takes the spikes."""
    plain = _is_plain(x, state, constants, others[-1])
    run = _feed_forward_out if plain else torch.ops.coba_triton.feed_forward_out
    final, states = run(x, state, constants, *others)
    return final, states


def recurrent_out(*args: Any) -> tuple[Tensor, Tensor]:
    """Last spikes and final state of ``coba_triton::recurrent_out``, likewise."""
    plain = _is_plain(*(arg for arg in args if isinstance(arg, Tensor)))
    last, final = (_recurrent_out if plain else torch.ops.coba_triton.recurrent_out)(*args)
    return last, final
