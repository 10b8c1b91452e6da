"""Launches of the CPU kernels for unconnected neurons, whose neurons or chunks of time are split over threads."""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....ops.call import Call, Incoming, Outputs, Saved
from .. import checksums, feed_forward, time_chunks
from ..meeting import memory_apart
from ..threads import run
from .shared import (
    array_of_rows,
    ask_for_huge_pages,
    bits_of_one,
    constants_arrays,
    count_threads,
    holds,
    parameters_of,
    rows_if_given,
    split_neurons,
    strided_bytes,
)


def _forward_arguments(
    x: Tensor, state: Tensor, constants: Tensor, final: Tensor, out: Outputs, every: int, jump_first: bool
) -> tuple[Any, ...]:
    """What the forward kernel takes before the checksum and the tile."""
    ask_for_huge_pages(*out)
    spikes, words, states, checkpoints = out
    return (
        strided_bytes(x),
        array_of_rows(state),
        *constants_arrays(constants),
        array_of_rows(final),
        strided_bytes(spikes),
        bits_of_one(torch.uint8 if spikes is None else spikes.dtype),
        rows_if_given(words, torch.int32),
        rows_if_given(states, state.dtype),
        rows_if_given(checkpoints, state.dtype),
        every,
        jump_first,
        holds(len(state)),
    )


def _split_time(
    name: str, dtype: torch.dtype, constants: tuple[Any, Any], steps: int, neurons: int, call: Call
) -> tuple[int, int]:
    """Into how many chunks of time a run is cut, and for how many threads; see :mod:`.time_chunks`."""
    asked, memory = call.time_chunks, call.memory
    if asked == 1 or (asked is None and not time_chunks.may_pay(steps, neurons)):
        return 1, 1
    threads = count_threads(parameters_of(name, dtype, neurons)["threads"], time_chunks.COST * steps * neurons)
    memory = time_chunks.memory_of(*constants) if memory is None else memory
    return asked or time_chunks.choose_chunks(steps, neurons, memory, threads), threads


def _run_in_chunks(arguments: tuple[Any, ...], x: Tensor, chunks: int, threads: int, sums: Any = None) -> None:
    """A run in chunks of time, and the checksum of its input, if it has one."""
    time_chunks.run_in_chunks(arguments, len(x), chunks, threads)
    if sums is not None:
        checksums.checksum_kernel()(array_of_rows(x).view(np.uint32), sums)


def feed_forward_forward(x: Tensor, state: Tensor, constants: Tensor, final: Tensor, out: Outputs, call: Call) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.feed_forward_forward`."""
    steps, neurons = x.shape
    every = 0 if out.checkpoints is None else call.checkpoint_every
    arguments = _forward_arguments(x, state, constants, final, out, every, call.jump_first)
    name, dtype = "feed_forward_forward", state.dtype
    chunks, threads = _split_time(name, dtype, arguments[2:4], steps, neurons, call)
    if chunks > 1:
        _run_in_chunks(arguments, x, chunks, threads)
        return
    tile, shares = split_neurons(name, dtype, steps, neurons)
    run(feed_forward.forward_kernel(), *arguments, None, tile, steps, shares=shares)


def lanes(words: int) -> Any:
    """Room for the checksum of rows of so many words of 32 bits, before the first row."""
    return memory_apart((-(-words // checksums.GROUP) * checksums.LANES,), np.uint32)


def row_sums(x: Tensor) -> Any:
    """The checksum of the rows ``x [T, ...]``, of any dtype, on the CPU: many numbers, of which each change changes some."""
    rows = x.new_empty(len(x), x[:1].numel()) if x.numel() == 0 else x.contiguous().view(len(x), -1)
    rows = rows.view(torch.uint8)
    if rows.shape[1] % 4:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))
    sums = lanes(rows.shape[1] // 4)
    checksums.checksum_kernel()(rows.numpy().view(np.uint32), sums)
    return sums


class ForwardStream:
    """The forward of block after block: a thread goes on with its own neurons and waits for no other between two blocks.

    So a core that something else keeps busy for a while, such as packing the block before, delays its neurons alone. Blocks
    of few neurons and many steps are cut into chunks of time, which threads share.

    Args:
        constants: as in ``kernels/feed_forward.py``.
        jump_first: whether the input is added before the decay.
        state: before the first block, ``[F, M]``.
        steps: of a block.
    """

    def __init__(self, constants: Tensor, jump_first: bool, state: Tensor, steps: int) -> None:
        self._constants, self._jump_first, self._state = constants, jump_first, state
        self._tile, self._shares = split_neurons("feed_forward_forward", state.dtype, steps, state.shape[1])
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="coba_triton") for _ in self._shares]

    def submit(self, x: Tensor, words: Tensor, sums: Any = None) -> tuple[Tensor, list[Future[None]]]:
        """Begin a block ``x [T, M]``, whose spikes go to ``words``; returns the state after it, and when it is there.

        ``sums``: None, or where the checksum of ``x`` goes, see :func:`lanes`.
        """
        before, self._state = self._state, torch.empty_like(self._state)
        out = Outputs(words=words)
        arguments = _forward_arguments(x, before, self._constants, self._state, out, 0, self._jump_first)
        name, call = "feed_forward_forward", Call("cpu")
        chunks, threads = _split_time(name, before.dtype, arguments[2:4], len(x), before.shape[1], call)
        if chunks > 1:
            return self._state, [self._threads[0].submit(_run_in_chunks, arguments, x, chunks, threads, sums)]
        kernel = functools.partial(feed_forward.forward_kernel(), *arguments, sums, self._tile, len(x))
        shares = zip(self._threads, self._shares, strict=True)
        return self._state, [thread.submit(kernel, *share) for thread, share in shares]

    def close(self) -> None:
        """Wait for the blocks that are begun."""
        for thread in self._threads:
            thread.shutdown()


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
    steps, neurons = x.shape
    ask_for_huge_pages(grad_x)
    table = constants_arrays(constants)
    arguments = (
        strided_bytes(x),
        *table,
        array_of_rows(saved.words),
        array_of_rows(saved.checkpoints),
        strided_bytes(grads.spikes),
        rows_if_given(grads.final, constants.dtype),
        rows_if_given(grads.states, constants.dtype),
        strided_bytes(grad_x),
        array_of_rows(grad_state),
        call.checkpoint_every,
        call.jump_first,
        holds(len(grad_state)),
    )
    by_constants = array_of_rows(sums) if sums.numel() else None
    name, dtype = "feed_forward_backward", constants.dtype
    chunks, threads = _split_time(name, dtype, table, steps, neurons, call)
    if chunks > 1:
        time_chunks.go_back_in_chunks(call.method, arguments, by_constants, steps, chunks, threads)
        return
    tile, shares = split_neurons(name, dtype, steps, neurons)
    run(feed_forward.backward_kernel(call.method), *arguments, by_constants, tile, steps, shares=shares)
