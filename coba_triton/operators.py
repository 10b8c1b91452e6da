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

from .model import Constants
from .spikes import word_count

NUM_CONSTANTS = len(Constants._fields)

_library = torch.library.Library("coba_triton", "DEF")

_library.define(
    "feed_forward(Tensor x, Tensor state, Tensor constants, str backend, bool jump_first, str method, "
    "ScalarType? spike_dtype, bool record_states, int checkpoint_every) "
    "-> (Tensor spikes, Tensor final, Tensor states, Tensor words, Tensor checkpoints)"
)
_library.define(
    "feed_forward_backward(Tensor x, Tensor constants, Tensor words, Tensor checkpoints, Tensor? grad_spikes, "
    "Tensor? grad_final, Tensor? grad_states, str backend, bool jump_first, str method, int checkpoint_every, "
    "bool x_grad, bool constants_grad) -> (Tensor grad_x, Tensor grad_state, Tensor grad_constants)"
)


def _kernels(backend: str) -> ModuleType:
    """The module that launches a backend's kernels, imported when first needed."""
    return importlib.import_module({"triton": "._triton"}[backend], __package__)


def checkpoint_interval(dtype: torch.dtype) -> int:
    """Steps between two saved states: 12 / 8 bytes per neuron-step in float32, 24 / 16 in float64."""
    return 16 if dtype == torch.float64 else 8


def checkpoint_count(steps: int, every: int) -> int:
    """Saved states: one before every whole run of ``every`` steps, then one before each remaining step."""
    return steps // every + steps % every if every else 0


def _allocate_forward(
    x: Tensor, state: Tensor, spike_dtype: torch.dtype | None, record_states: bool, checkpoint_every: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    steps, neurons = x.shape
    packed = word_count(steps), neurons
    spikes = (
        x.new_empty(packed, dtype=torch.int32)
        if spike_dtype is None
        else x.new_empty(steps, neurons, dtype=spike_dtype)
    )
    # packed spikes serve the backward as they are
    words = x.new_empty(packed if checkpoint_every and spike_dtype is not None else (0, neurons), dtype=torch.int32)
    states = state.new_empty(3, steps if record_states else 0, neurons)
    checkpoints = state.new_empty(checkpoint_count(steps, checkpoint_every), 3, neurons)
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
    spikes, final, states, words, checkpoints = _allocate_forward(
        x, state, spike_dtype, record_states, checkpoint_every
    )
    if x.numel() == 0:
        return spikes, state.clone(), states, words, checkpoints
    _kernels(backend).feed_forward_forward(
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
    return spikes, final, states, words, checkpoints


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
    return _allocate_forward(x, state, spike_dtype, record_states, checkpoint_every)


def _allocate_backward(
    x: Tensor, constants: Tensor, x_grad: bool, constants_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
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
    _kernels(backend).feed_forward_backward(
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
_library.impl("feed_forward_backward", _feed_forward_backward, "CompositeExplicitAutograd")
torch.library.register_fake("coba_triton::feed_forward", _feed_forward_fake, lib=_library)
torch.library.register_fake("coba_triton::feed_forward_backward", _feed_forward_backward_fake, lib=_library)
torch.library.register_autograd("coba_triton::feed_forward", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(
    "coba_triton::feed_forward_backward", _double_backward, setup_context=_double_setup_context, lib=_library
)
