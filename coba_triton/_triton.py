"""Launches the Triton kernels: allocates what they write, chooses their launch configuration."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
from torch import Tensor

from .kernels import feed_forward

# Steps whose inputs are on their way while as many are computed.
PREFETCH_STEPS = 8


def replay_steps(dtype: torch.dtype) -> int:
    """Steps that the backward holds in registers: as many as fit without a spill."""
    return 4 if dtype == torch.float64 else 8


def warps_per_program(neurons: int) -> int:
    """One warp a program while there are too few neurons to fill a GPU, else four; a thread has one neuron."""
    return 1 if neurons <= 32768 else 4


@functools.cache
def threads_per_warp() -> int:
    """32 on NVIDIA and in the interpreter, 64 on AMD's data-centre GPUs."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


def _launch(kernel: Any, x: Tensor, constants: Tensor, jump_first: bool, *args: Any, **meta: Any) -> None:
    neurons = x.shape[1]
    num_warps = warps_per_program(neurons)
    block = threads_per_warp() * num_warps
    on_device = (
        contextlib.nullcontext() if x.device.type == "cpu" else torch.get_device_module(x.device).device(x.device)
    )
    with on_device:
        kernel[(triton.cdiv(neurons, block),)](
            *args,
            BLOCK=block,
            EVEN=neurons % block == 0,
            PER_NEURON=constants.shape[1] > 1,
            JUMP_FIRST=jump_first,
            num_warps=num_warps,
            enable_fp_fusion=False,
            **meta,
        )


def _kernel_view(x: Tensor | None) -> Tensor | None:
    """Bool is read and written as uint8: Triton's own 1-bit pointers are no array of bytes."""
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x


def _none_if_empty(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def feed_forward_forward(
    x: Tensor,
    constants: Tensor,
    jump_first: bool,
    checkpoint_every: int,
    state: Tensor,
    final: Tensor,
    spikes: Tensor,
    words: Tensor,
    states: Tensor,
    checkpoints: Tensor,
) -> None:
    """Fill ``final`` and every non-empty output; shapes as in :mod:`coba_triton.kernels.feed_forward`."""
    _launch(
        feed_forward.forward_kernel,
        x,
        constants,
        jump_first,
        _kernel_view(x),
        state,
        constants,
        final,
        *(_kernel_view(_none_if_empty(output)) for output in (spikes, words, states, checkpoints)),
        *x.shape,
        *x.stride(),
        constants.stride(0),
        STEPS=checkpoint_every or PREFETCH_STEPS,
    )


def feed_forward_backward(
    x: Tensor,
    constants: Tensor,
    jump_first: bool,
    method: str,
    checkpoint_every: int,
    words: Tensor,
    checkpoints: Tensor,
    grad_spikes: Tensor | None,
    grad_final: Tensor | None,
    grad_states: Tensor | None,
    grad_x: Tensor,
    grad_state: Tensor,
    grad_constants: Tensor,
) -> None:
    """Fill ``grad_state`` and every non-empty gradient; shapes as in :mod:`coba_triton.kernels.feed_forward`."""
    _launch(
        feed_forward.backward_kernel,
        x,
        constants,
        jump_first,
        _kernel_view(x),
        words,
        checkpoints,
        constants,
        grad_spikes,
        grad_final,
        grad_states,
        _none_if_empty(grad_x),
        grad_state,
        _none_if_empty(grad_constants),
        *x.shape,
        *x.stride(),
        *(grad_spikes.stride() if grad_spikes is not None else (0, 0)),
        constants.stride(0),
        EVERY=checkpoint_every,
        STEPS=replay_steps(constants.dtype),
        METHOD=method,
    )
