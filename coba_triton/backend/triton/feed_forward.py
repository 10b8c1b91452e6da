"""Unconnected neurons: in order, or in chunks of time that are simulated side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import feed_forward, time_chunks
from ...ops.call import DIFFERENTIABLE, Call, Incoming, Outputs, Saved
from . import hardware, launch
from .launch import cdiv, kernel_view, none_if_empty
from .parameters import PREFETCH_STEPS, parameters_of

# A state of a chunk of time is compared every so many steps, a multiple of a word's and of those between two checkpoints.
CHECK_STEPS = 64
# Neurons times chunks with which an H100 is full, as measured: more chunks of 512 or 4096 neurons save nothing.
NEURONS_OF_DEVICE = 65_000
# From so many neurons on, its memory is nearly full in any order.
MANY_NEURONS = 7000
# After so many of the largest time constants, nearly all neurons that spike irregularly have forgotten where they started.
MEMORIES = 25
# Shorter chunks, or fewer, are not worth four launches.
LEAST_CHUNK_STEPS = 512
LEAST_CHUNKS = 4
# A grid of programs has no more on its second axis.
MOST_CHUNKS = 65_535


def choose_time_chunks(steps: int, neurons: int, memory: float | None) -> int:
    """Into how many chunks of time a run is cut, 1 where that does not pay; ``memory``: see :class:`Call`."""
    if memory is None or neurons >= MANY_NEURONS or steps < LEAST_CHUNKS * LEAST_CHUNK_STEPS:
        return 1
    chunks = min(int(steps / max(MEMORIES * memory, LEAST_CHUNK_STEPS)), NEURONS_OF_DEVICE // neurons)
    return chunks if chunks >= LEAST_CHUNKS else 1


def _forward_in_chunks(
    x: Tensor, state: Tensor, constants: Tensor, final: Tensor, out: Outputs, jump_first: bool, chunks: int, steps: int
) -> None:
    """:func:`feed_forward_forward` in at most so many chunks of time; ``steps`` are computed while others are loaded."""
    length, neurons = x.shape
    chunks = min(chunks, MOST_CHUNKS)
    device, fields, block = x.device, len(state), hardware.threads_per_warp()
    chunk_steps = cdiv(length, chunks * CHECK_STEPS) * CHECK_STEPS
    tiles, chunks = cdiv(neurons, block), cdiv(length, chunk_steps)
    mark = CHECK_STEPS if out.checkpoints is None else steps
    notes = state.new_empty(cdiv(length, mark), fields, neurons) if out.checkpoints is None else out.checkpoints
    before, after = (state.new_empty(chunks, fields, neurons) for _ in range(2))
    changed, late = (state.new_empty(tiles, chunks, dtype=torch.uint8) for _ in range(2))
    given, outputs = kernel_view(x), (notes, kernel_view(out.spikes), out.words, out.states)
    sizes = length, neurons, chunk_steps, chunks, *x.stride(), constants.stride(0)
    meta = {"BLOCK": block, "FIELDS": fields, "STEPS": steps, "MARK": mark, "EVEN": neurons % block == 0}
    meta |= {"PER_NEURON": constants.shape[1] > 1, "JUMP_FIRST": jump_first}
    launch.run(
        time_chunks.speculate_kernel, (tiles, chunks), device, 1,
        given, state, constants, before, changed, *outputs, *sizes, **meta,
    )  # fmt: skip
    meta["CHECK"] = CHECK_STEPS
    for _ in range(2):
        launch.run(
            time_chunks.repair_kernel, (tiles, chunks), device, 1,
            given, constants, before, after, changed, late, *outputs, *sizes, **meta,
        )  # fmt: skip
        before, after, changed, late = after, before, late, changed
    launch.run(
        time_chunks.settle_kernel, (tiles,), device, 1,
        given, constants, final, after, before, changed, *outputs, *sizes, **meta,
    )  # fmt: skip


def _backward_in_chunks(
    x: Tensor,
    constants: Tensor,
    saved: Saved,
    grads: Incoming,
    grad_x: Tensor,
    grad_state: Tensor,
    call: Call,
    chunks: int,
    steps: int,
) -> None:
    """:func:`feed_forward_backward` in at most so many chunks of time, without the sums over time."""
    length, neurons = x.shape
    chunks = min(chunks, MOST_CHUNKS)
    device, block = x.device, hardware.threads_per_warp()
    chunk_steps = cdiv(length, chunks * CHECK_STEPS) * CHECK_STEPS
    tiles, chunks = cdiv(neurons, block), cdiv(length, chunk_steps)
    notes = constants.new_empty(length // CHECK_STEPS + 1, DIFFERENTIABLE, neurons)
    before, after = (constants.new_empty(chunks, DIFFERENTIABLE, neurons) for _ in range(2))
    changed, late = (constants.new_empty(tiles, chunks, dtype=torch.uint8) for _ in range(2))
    given = kernel_view(x), saved.words, saved.checkpoints, constants, grads.spikes, grads.states, none_if_empty(grad_x)
    strides = grads.spikes.stride() if grads.spikes is not None else (0, 0)
    sizes = length, neurons, chunk_steps, chunks, *x.stride(), *strides, constants.stride(0)
    meta = {"BLOCK": block, "FIELDS": len(grad_state), "EVERY": call.checkpoint_every}
    meta |= {"STEPS": steps, "CHECK": CHECK_STEPS, "EVEN": neurons % block == 0}
    how = {"PER_NEURON": constants.shape[1] > 1, "JUMP_FIRST": call.jump_first, "METHOD": call.method}
    grid = tiles, chunks
    launch.run(
        time_chunks.speculate_back_kernel, grid, device, 1,
        grads.final, before, changed, notes, *given, *sizes, **meta, **how,
    )  # fmt: skip
    for _ in range(2):
        launch.run(
            time_chunks.repair_back_kernel, grid, device, 1,
            before, after, changed, late, notes, *given, *sizes, **meta, **how,
        )  # fmt: skip
        before, after, changed, late = after, before, late, changed
    launch.run(
        time_chunks.settle_back_kernel, (tiles,), device, 1,
        grad_state, after, before, changed, notes, *given, *sizes, **meta, **how,
    )  # fmt: skip


def _launch_feed_forward(
    kernel: Any, num_warps: int, x: Tensor, constants: Tensor, jump_first: bool, *args: Any, **meta: Any
) -> None:
    neurons = x.shape[1]
    block = hardware.threads_per_warp() * num_warps
    launch.run(
        kernel,
        (cdiv(neurons, block),),
        x.device,
        num_warps,
        *args,
        BLOCK=block,
        EVEN=neurons % block == 0,
        PER_NEURON=constants.shape[1] > 1,
        JUMP_FIRST=jump_first,
        **meta,
    )


def feed_forward_forward(x: Tensor, state: Tensor, constants: Tensor, final: Tensor, out: Outputs, call: Call) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.feed_forward_forward`."""
    parameters = parameters_of("feed_forward_forward", state, x.shape[1])
    length, neurons = x.shape
    chunks = call.time_chunks or choose_time_chunks(length, neurons, call.memory)
    if out.checkpoints is not None:
        steps = call.checkpoint_every
    else:
        steps = parameters["steps"] if chunks == 1 else min(parameters["steps"], PREFETCH_STEPS // 2)
    if chunks > 1:
        _forward_in_chunks(x, state, constants, final, out, call.jump_first, chunks, steps)
        return
    _launch_feed_forward(
        feed_forward.forward_kernel,
        parameters["num_warps"],
        x,
        constants,
        call.jump_first,
        kernel_view(x),
        state,
        constants,
        final,
        kernel_view(out.spikes),
        out.words,
        out.states,
        out.checkpoints,
        *x.shape,
        *x.stride(),
        constants.stride(0),
        FIELDS=len(state),
        STEPS=steps,
    )


def feed_forward_backward(
    x: Tensor,
    constants: Tensor,
    saved: Saved,
    grads: Incoming,
    grad_x: Tensor,
    grad_state: Tensor,
    sums: Tensor,
    call: Call,
) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.feed_forward_backward`."""
    parameters = parameters_of("feed_forward_backward", constants, x.shape[1])
    length, neurons = x.shape
    steps = min(parameters["steps"], call.checkpoint_every)
    chunks = call.time_chunks or choose_time_chunks(length, neurons, call.memory)
    if chunks > 1 and not sums.numel():  # a sum over time has one order
        _backward_in_chunks(x, constants, saved, grads, grad_x, grad_state, call, chunks, steps)
        return
    _launch_feed_forward(
        feed_forward.backward_kernel,
        parameters["num_warps"],
        x,
        constants,
        call.jump_first,
        kernel_view(x),
        saved.words,
        saved.checkpoints,
        constants,
        grads.spikes,
        grads.final,
        grads.states,
        none_if_empty(grad_x),
        grad_state,
        none_if_empty(sums),
        *x.shape,
        *x.stride(),
        *(grads.spikes.stride() if grads.spikes is not None else (0, 0)),
        constants.stride(0),
        FIELDS=len(grad_state),
        EVERY=call.checkpoint_every,
        STEPS=steps,
        METHOD=call.method,
    )
