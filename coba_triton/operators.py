"""The operators behind the whole-sequence functions: schema, shapes, autograd rule, and a kernel per backend.

``coba_triton::feed_forward`` and ``coba_triton::feed_forward_backward`` are ordinary differentiable PyTorch operators.
The forward saves its input, one bit per spike, and the state before every ``checkpoint_every``-th step; the backward
recomputes the rest.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _recurrent as _recurrent_blocks
from .model import Constants
from .spikes import word_count
from .tuning import launch_parameters

NUM_CONSTANTS = len(Constants._fields)
# Steps between two saved states of the CPU path: 0.75 bytes per neuron-step of float32, 1.5 of float64.
CPU_CHECKPOINT_EVERY = 16

_library = torch.library.Library("coba_triton", "DEF")

_library.define(
    "feed_forward(Tensor x, Tensor state, Tensor constants, str backend, bool jump_first, str method, "
    "ScalarType? spike_dtype, bool record_states, int checkpoint_every) "
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


_FEED_FORWARD = {"triton": "._triton", "cpu": "._cpu"}
_RECURRENT = {"triton": "._triton", "cpu": "._cpu_recurrent"}


def _kernels(modules: dict[str, str], backend: str) -> ModuleType:
    """The module that launches a backend's kernels, imported when first needed."""
    return importlib.import_module(modules[backend], __package__)


def checkpoint_interval(dtype: torch.dtype, backend: str, neurons: int) -> int:
    """Steps between two saved states: at most 1.5 bytes per neuron-step, and no more than a replay can hold."""
    if backend != "cpu":
        return 16 if dtype == torch.float64 else 8
    rule = {"checkpoint_every": CPU_CHECKPOINT_EVERY}
    if torch.compiler.is_compiling():  # a trace cannot look into files
        return rule["checkpoint_every"]
    device = torch.device("cpu")
    return launch_parameters("cpu", "feed_forward_backward", rule, dtype, device, neurons)["checkpoint_every"]


def checkpoint_count(steps: int, every: int, backend: str) -> int:
    """Saved states: one before every run of ``every`` steps; of a last, shorter run Triton keeps one before each step."""
    if not every:
        return 0
    return -(-steps // every) if backend == "cpu" else steps // every + steps % every


def _allocate_forward(
    x: Tensor, state: Tensor, backend: str, spike_dtype: torch.dtype | None, record_states: bool, checkpoint_every: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    steps, neurons = x.shape
    packed = word_count(steps), neurons
    spikes = (
        x.new_empty(packed, dtype=torch.int32) if spike_dtype is None else x.new_empty(steps, neurons, dtype=spike_dtype)
    )
    # packed spikes serve the backward as they are
    words = x.new_empty(packed if checkpoint_every and spike_dtype is not None else (0, neurons), dtype=torch.int32)
    states = state.new_empty(3, steps if record_states else 0, neurons)
    checkpoints = state.new_empty(checkpoint_count(steps, checkpoint_every, backend), 3, neurons)
    return spikes, torch.empty_like(state), states, words, checkpoints


def _feed_forward(
    x: Tensor,
    state: Tensor,
    constants: Tensor,
    backend: str,
    jump_first: bool,
    method: str,
    spike_dtype: torch.dtype | None,
    record_states: bool,
    checkpoint_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _allocate_forward(x, state, backend, spike_dtype, record_states, checkpoint_every)
    spikes, final, states, words, checkpoints = outputs
    if x.numel() == 0:
        return spikes, state.clone(), states, words, checkpoints
    _kernels(_FEED_FORWARD, backend).feed_forward_forward(
        x,
        constants,
        jump_first,
        checkpoint_every,
        state,
        final,
        spikes if spike_dtype is not None else words,
        words if spike_dtype is not None else spikes,
        states,
        checkpoints,
    )
    return outputs


def _feed_forward_fake(
    x: Tensor,
    state: Tensor,
    constants: Tensor,
    backend: str,
    jump_first: bool,
    method: str,
    spike_dtype: torch.dtype | None,
    record_states: bool,
    checkpoint_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _allocate_forward(x, state, backend, spike_dtype, record_states, checkpoint_every)


def _feed_forward_out(
    x: Tensor, state: Tensor, constants: Tensor, backend: str, jump_first: bool, record_states: bool, spikes: Tensor
) -> tuple[Tensor, Tensor]:
    """The forward into a given buffer ``[T, M]`` or, for packed spikes, int32 ``[ceil(T / 32), M]``; saves nothing."""
    final, states = _feed_forward_out_fake(x, state, constants, backend, jump_first, record_states, spikes)
    if x.numel() == 0:
        return state.clone(), states
    none = spikes.new_empty(0, x.shape[1])
    packed = spikes.dtype == torch.int32
    _kernels(_FEED_FORWARD, backend).feed_forward_forward(
        x,
        constants,
        jump_first,
        0,
        state,
        final,
        none if packed else spikes,
        spikes if packed else none.int(),
        states,
        state.new_empty(0, *state.shape),
    )
    return final, states


def _feed_forward_out_fake(
    x: Tensor, state: Tensor, constants: Tensor, backend: str, jump_first: bool, record_states: bool, spikes: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(state), state.new_empty(3, x.shape[0] if record_states else 0, x.shape[1])


def _allocate_backward(x: Tensor, constants: Tensor, x_grad: bool, constants_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    neurons = x.shape[1]
    return (
        x.new_empty(x.shape if x_grad else (0, neurons)),
        constants.new_empty(3, neurons),
        constants.new_empty(NUM_CONSTANTS, constants.shape[1] if constants_grad else 0),
    )


def _feed_forward_backward(
    x: Tensor,
    constants: Tensor,
    words: Tensor,
    checkpoints: Tensor,
    grad_spikes: Tensor | None,
    grad_final: Tensor | None,
    grad_states: Tensor | None,
    backend: str,
    jump_first: bool,
    method: str,
    checkpoint_every: int,
    x_grad: bool,
    constants_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_state, _ = _allocate_backward(x, constants, x_grad, constants_grad)
    if x.numel() == 0:
        grad_state.zero_() if grad_final is None else grad_state.copy_(grad_final)
        return grad_x, grad_state, constants.new_zeros(NUM_CONSTANTS, constants.shape[1] if constants_grad else 0)
    grad_constants = constants.new_empty(NUM_CONSTANTS, x.shape[1] if constants_grad else 0)
    _kernels(_FEED_FORWARD, backend).feed_forward_backward(
        x,
        constants,
        jump_first,
        method,
        checkpoint_every,
        words,
        checkpoints,
        grad_spikes,
        None if grad_final is None else grad_final.contiguous(),
        None if grad_states is None else grad_states.contiguous(),
        grad_x,
        grad_state,
        grad_constants,
    )
    if constants_grad and constants.shape[1] == 1:
        # torch.sum has a fixed order: one sum a neuron, then one over the neurons
        grad_constants = grad_constants.sum(1, keepdim=True)
    return grad_x, grad_state, grad_constants


def _feed_forward_backward_fake(
    x: Tensor,
    constants: Tensor,
    words: Tensor,
    checkpoints: Tensor,
    grad_spikes: Tensor | None,
    grad_final: Tensor | None,
    grad_states: Tensor | None,
    backend: str,
    jump_first: bool,
    method: str,
    checkpoint_every: int,
    x_grad: bool,
    constants_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_backward(x, constants, x_grad, constants_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, constants, ctx.backend, ctx.jump_first, ctx.method, spike_dtype, _, ctx.checkpoint_every = inputs
    spikes, _, _, words, checkpoints = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(checkpoints)
    ctx.save_for_backward(x, constants, spikes if spike_dtype is None else words, checkpoints)


def _backward(
    ctx: Any, grad_spikes: Tensor | None, grad_final: Tensor | None, grad_states: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    x_grad, state_grad, constants_grad = ctx.needs_input_grad[:3]
    if not ctx.checkpoint_every:
        raise RuntimeError(
            "coba_triton::feed_forward saved nothing for the backward pass: checkpoint_every was 0; pass a positive one"
        )
    x, constants, words, checkpoints = ctx.saved_tensors
    grad_x, grad_state, grad_constants = torch.ops.coba_triton.feed_forward_backward(
        x,
        constants,
        words,
        checkpoints,
        grad_spikes,
        grad_final,
        grad_states,
        ctx.backend,
        ctx.jump_first,
        ctx.method,
        ctx.checkpoint_every,
        x_grad,
        constants_grad,
    )
    return (
        grad_x if x_grad else None,
        grad_state if state_grad else None,
        grad_constants if constants_grad else None,
        *(None,) * 6,
    )


def _double_backward(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        f"the {ctx.backend!r} backend differentiates once, got a gradient of its gradient; pass backend='reference', "
        "which supports double backward and forward-mode differentiation"
    )


def _double_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend = inputs[7]


_library.impl("feed_forward", _feed_forward, "CompositeExplicitAutograd")
_library.impl("feed_forward_out", _feed_forward_out, "CompositeExplicitAutograd")
_library.impl("feed_forward_backward", _feed_forward_backward, "CompositeExplicitAutograd")
torch.library.register_fake("coba_triton::feed_forward", _feed_forward_fake, lib=_library)
torch.library.register_fake("coba_triton::feed_forward_out", _feed_forward_out_fake, lib=_library)
torch.library.register_fake("coba_triton::feed_forward_backward", _feed_forward_backward_fake, lib=_library)
torch.library.register_autograd("coba_triton::feed_forward", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(
    "coba_triton::feed_forward_backward", _double_backward, setup_context=_double_setup_context, lib=_library
)

_library.define(
    "recurrent(Tensor x, Tensor z, Tensor state, Tensor input_weights, Tensor recurrent_weights, Tensor constants, "
    "str backend, bool jump_first, str method, ScalarType? spike_dtype, bool record_states, int block_steps, bool train, "
    "str path) -> (Tensor spikes, Tensor z_final, Tensor final, Tensor states, Tensor words, Tensor checkpoints)"
)
_library.define(
    "recurrent_out(Tensor x, Tensor z, Tensor state, Tensor input_weights, Tensor recurrent_weights, Tensor constants, "
    "str backend, bool jump_first, int block_steps, str path, Tensor(a!) spikes) -> (Tensor z_final, Tensor final)"
)
_library.define(
    "recurrent_backward(Tensor x, Tensor z, Tensor input_weights, Tensor recurrent_weights, Tensor constants, "
    "Tensor words, Tensor checkpoints, Tensor? grad_spikes, Tensor? grad_z, Tensor? grad_final, Tensor? grad_states, "
    "str backend, bool jump_first, str method, int block_steps, bool x_grad, bool constants_grad) "
    "-> (Tensor grad_x, Tensor grad_z, Tensor grad_state, Tensor grad_input_weights, Tensor grad_recurrent_weights, "
    "Tensor grad_constants)"
)


def _recurrent_fake(
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
    block_steps: int,
    train: bool,
    path: str,
) -> tuple[Tensor, ...]:
    steps = x.shape[0]
    packed = word_count(steps), *z.shape
    blocks = (steps + block_steps - 1) // block_steps if train else 0
    return (
        x.new_empty(packed if spike_dtype is None else (steps, *z.shape), dtype=spike_dtype or torch.int32),
        torch.empty_like(z),
        torch.empty_like(state),
        state.new_empty(3, steps if record_states else 0, *z.shape),
        x.new_empty(packed if train and spike_dtype is not None else (0, *z.shape), dtype=torch.int32),
        state.new_empty(blocks, *state.shape),
    )


def _recurrent(
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
    block_steps: int,
    train: bool,
    path: str,
) -> tuple[Tensor, ...]:
    spikes, z_final, final, states, words, checkpoints = _recurrent_fake(
        x,
        z,
        state,
        input_weights,
        recurrent_weights,
        constants,
        backend,
        jump_first,
        method,
        spike_dtype,
        record_states,
        block_steps,
        train,
        path,
    )
    if x.shape[0] == 0 or z.numel() == 0:
        return spikes, z.clone(), state.clone(), states, words, checkpoints
    packed = spikes if spike_dtype is None else words if train else None
    z, state = _recurrent_blocks.forward(
        _recurrent_blocks.Network.of(input_weights, recurrent_weights, constants, jump_first, _kernels(_RECURRENT, backend)),
        x,
        z,
        state,
        spikes if spike_dtype is not None else None,
        packed,
        states if record_states else None,
        checkpoints if train else None,
        block_steps,
        path,
    )
    return spikes, z_final.copy_(z), final.copy_(state), states, words, checkpoints


def _recurrent_out(
    x: Tensor,
    z: Tensor,
    state: Tensor,
    input_weights: Tensor,
    recurrent_weights: Tensor,
    constants: Tensor,
    backend: str,
    jump_first: bool,
    block_steps: int,
    path: str,
    spikes: Tensor,
) -> tuple[Tensor, Tensor]:
    """The forward into a given buffer ``[T, B, N]`` or, for packed spikes, int32 ``[ceil(T / 32), B, N]``."""
    if x.shape[0] == 0 or z.numel() == 0:
        return z.clone(), state.clone()
    net = _recurrent_blocks.Network.of(
        input_weights, recurrent_weights, constants, jump_first, _kernels(_RECURRENT, backend)
    )
    packed = spikes.dtype == torch.int32
    last, final = _recurrent_blocks.forward(
        net, x, z, state, None if packed else spikes, spikes if packed else None, None, None, block_steps, path
    )
    return last.clone(), final.clone()


def _recurrent_out_fake(x: Tensor, z: Tensor, state: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(state)


def _recurrent_backward_fake(
    x: Tensor,
    z: Tensor,
    input_weights: Tensor,
    recurrent_weights: Tensor,
    constants: Tensor,
    words: Tensor,
    checkpoints: Tensor,
    grad_spikes: Tensor | None,
    grad_z: Tensor | None,
    grad_final: Tensor | None,
    grad_states: Tensor | None,
    backend: str,
    jump_first: bool,
    method: str,
    block_steps: int,
    x_grad: bool,
    constants_grad: bool,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape if x_grad else (0, *x.shape[1:])),
        torch.empty_like(z),
        z.new_empty(3, *z.shape),
        torch.empty_like(input_weights),
        torch.empty_like(recurrent_weights),
        constants.new_empty(NUM_CONSTANTS, constants.shape[1] if constants_grad else 0),
    )


def _recurrent_backward(
    x: Tensor,
    z: Tensor,
    input_weights: Tensor,
    recurrent_weights: Tensor,
    constants: Tensor,
    words: Tensor,
    checkpoints: Tensor,
    grad_spikes: Tensor | None,
    grad_z: Tensor | None,
    grad_final: Tensor | None,
    grad_states: Tensor | None,
    backend: str,
    jump_first: bool,
    method: str,
    block_steps: int,
    x_grad: bool,
    constants_grad: bool,
) -> tuple[Tensor, ...]:
    grads = _recurrent_blocks.backward(
        _recurrent_blocks.Network.of(input_weights, recurrent_weights, constants, jump_first, _kernels(_RECURRENT, backend)),
        x,
        z,
        words,
        checkpoints,
        block_steps,
        method,
        None if grad_spikes is None else grad_spikes.reshape(grad_spikes.shape[0], -1),
        grad_z,
        grad_final,
        None if grad_states is None else grad_states.contiguous(),
        x_grad,
        constants_grad,
    )
    grad_constants = grads.constants
    if grad_constants is not None and constants.shape[1] == 1:
        grad_constants = grad_constants.sum(1, keepdim=True)
    return (
        x.new_empty(0, *x.shape[1:]) if grads.x is None else grads.x,
        grads.z,
        grads.state,
        grads.input_weights,
        grads.recurrent_weights,
        constants.new_empty(NUM_CONSTANTS, 0) if grad_constants is None else grad_constants,
    )


def _recurrent_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, z, _, input_weights, recurrent_weights, constants, *options = inputs
    ctx.backend, ctx.jump_first, ctx.method, spike_dtype, _, ctx.block_steps, ctx.train, _ = options
    spikes, _, _, _, words, checkpoints = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(checkpoints)
    words = spikes if spike_dtype is None else words
    ctx.save_for_backward(x, z, input_weights, recurrent_weights, constants, words, checkpoints)


def _recurrent_autograd(
    ctx: Any,
    grad_spikes: Tensor | None,
    grad_z: Tensor | None,
    grad_final: Tensor | None,
    grad_states: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:
    if not ctx.train:
        raise RuntimeError("coba_triton::recurrent saved nothing for the backward pass: train was False; pass train=True")
    needed = ctx.needs_input_grad[:6]
    grads = torch.ops.coba_triton.recurrent_backward(
        *ctx.saved_tensors,
        grad_spikes,
        grad_z,
        grad_final,
        grad_states,
        ctx.backend,
        ctx.jump_first,
        ctx.method,
        ctx.block_steps,
        needed[0],
        needed[5],
    )
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 8


def _recurrent_double_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend = inputs[11]


_library.impl("recurrent", _recurrent, "CompositeExplicitAutograd")
_library.impl("recurrent_out", _recurrent_out, "CompositeExplicitAutograd")
_library.impl("recurrent_backward", _recurrent_backward, "CompositeExplicitAutograd")
torch.library.register_fake("coba_triton::recurrent", _recurrent_fake, lib=_library)
torch.library.register_fake("coba_triton::recurrent_out", _recurrent_out_fake, lib=_library)
torch.library.register_fake("coba_triton::recurrent_backward", _recurrent_backward_fake, lib=_library)
torch.library.register_autograd(
    "coba_triton::recurrent", _recurrent_autograd, setup_context=_recurrent_setup_context, lib=_library
)
torch.library.register_autograd(
    "coba_triton::recurrent_backward", _double_backward, setup_context=_recurrent_double_setup_context, lib=_library
)
