"""Launches the CPU kernels: splits the neurons over threads."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...neuron.records import State
from ...ops.operators import CPU_CHECKPOINT_EVERY
from ...tuning.tables import Parameters, launch_parameters
from . import feed_forward as kernels
from .rows import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, TILE, UINT8, Strided

# A buffer of this size is worth pages of 2 MiB: the first touch of a page of 4 KiB costs more than the arithmetic.
HUGE_PAGES_FROM = 8 << 20
# Below so many neuron-steps a thread, handing the work over costs more than it saves.
MIN_STEPS_PER_THREAD = 1 << 19
# A thread's neurons are a multiple of this, so that no two threads write to one cache line.
SHARE_OF = 64

TYPE_CODES = {
    torch.float32: FLOAT32,
    torch.float64: FLOAT64,
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
    torch.uint8: UINT8,
    torch.bool: UINT8,
}


@functools.cache
def pool(pid: int, workers: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(workers, thread_name_prefix="coba_triton")


def heuristic(kernel: str, dtype: torch.dtype, neurons: int, batch: int) -> Parameters:
    """The launch parameters where no tuning table has any; see :data:`coba_triton.tuning.SPACE`."""
    parameters = {"threads": torch.get_num_threads()}
    if kernel.startswith("feed_forward"):
        parameters = {"tile": TILE} | parameters
    if kernel == "feed_forward_backward":
        parameters["checkpoint_every"] = CPU_CHECKPOINT_EVERY
    return parameters


def parameters_of(kernel: str, dtype: torch.dtype, neurons: int, batch: int = 1) -> Mapping[str, int]:
    """The launch parameters of a call, tuned or not."""
    rule = heuristic(kernel, dtype, neurons, batch)
    return launch_parameters("cpu", kernel, rule, dtype, torch.device("cpu"), neurons, batch)


def count_threads(most: int | None, work: int) -> int:
    """Threads for so many neuron-steps: ``most``, or as many as PyTorch uses, which is never exceeded."""
    every = torch.get_num_threads()
    return max(1, min(most or every, every, work // MIN_STEPS_PER_THREAD))


def _split(name: str, dtype: torch.dtype, steps: int, neurons: int) -> tuple[int, list[tuple[int, int]]]:
    """Neurons of a tile, and from which to which neuron every thread goes."""
    parameters = parameters_of(name, dtype, neurons)
    threads = count_threads(parameters["threads"], steps * neurons)
    share = -(-neurons // (threads * SHARE_OF)) * SHARE_OF
    return parameters["tile"], [(begin, min(begin + share, neurons)) for begin in range(0, neurons, share)]


def _launch(name: str, kernel: Callable[..., None], *args: Any, dtype: torch.dtype, steps: int, neurons: int) -> None:
    """Run ``kernel`` over all neurons; the result does not depend on the launch parameters."""
    tile, (first, *rest) = _split(name, dtype, steps, neurons)
    jobs = [pool(os.getpid(), len(rest)).submit(kernel, *args, tile, steps, *share) for share in rest]
    kernel(*args, tile, steps, *first)
    for job in jobs:
        job.result()


@functools.cache
def _madvise() -> Callable[..., int] | None:
    return ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None


def ask_for_huge_pages(*outputs: Tensor) -> None:
    """Advise the kernel to back large outputs, not yet touched, with huge pages. It may decline."""
    advise = _madvise()
    for output in outputs:
        if advise is not None and output.nbytes >= HUGE_PAGES_FROM:
            begin, end = (
                address // mmap.PAGESIZE * mmap.PAGESIZE
                for address in (output.data_ptr() + mmap.PAGESIZE - 1, output.data_ptr() + output.nbytes)
            )
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)


def _bytes(x: Tensor) -> Any:
    """The memory from the first to the last element as a flat array of bytes."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.detach().as_strided((length,), (1,)).view(torch.uint8).numpy()


def strided_bytes(x: Tensor | None) -> Strided:
    if x is None:
        return Strided(_bytes(torch.empty(0)), 0, 0, 0, 0)
    return Strided(_bytes(x), TYPE_CODES[x.dtype], x.itemsize, *x.stride())


def array_of_rows(x: Tensor) -> Any:
    """All leading axes as one: ``[..., M]`` as an array of rows."""
    return x.detach().contiguous().view(-1, x.shape[-1]).numpy()


def constants_arrays(constants: Tensor) -> tuple[Any, Any]:
    """The constants as (shared, None) or (None, per neuron)."""
    table = array_of_rows(constants)
    return (table[:, 0].copy(), None) if constants.shape[1] == 1 else (None, table)


@functools.cache
def bits_of_one(dtype: torch.dtype) -> int:
    """The bits of the number 1 as an integer."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return int(torch.ones((), dtype=dtype).view(integer))


def holds(state: Tensor) -> bool | None:
    """How the kernels are told whether a state has a refractory period: True, or None without one."""
    return True if len(state) > len(State._fields) else None


def _forward_arguments(
    x: Tensor,
    constants: Tensor,
    jump_first: bool,
    checkpoint_every: int,
    state: Tensor,
    final: Tensor,
    spikes: Tensor | None,
    words: Tensor | None,
    states: Tensor | None,
    checkpoints: Tensor | None,
) -> tuple[Any, ...]:
    """What the forward kernel takes before the tile."""
    ask_for_huge_pages(*(output for output in (spikes, words, states, checkpoints) if output is not None))
    none = state[:0]
    return (
        strided_bytes(x),
        array_of_rows(state),
        *constants_arrays(constants),
        array_of_rows(final),
        strided_bytes(spikes),
        bits_of_one(torch.uint8 if spikes is None else spikes.dtype),
        array_of_rows(none.int() if words is None else words),
        array_of_rows(none if states is None else states),
        array_of_rows(none if checkpoints is None else checkpoints),
        checkpoint_every,
        jump_first,
        holds(state),
    )


def feed_forward_forward(x: Tensor, constants: Tensor, *others: Any) -> None:
    """Fill ``final`` and every output that is given; shapes as in ``kernels/feed_forward.py``.

    Args: see :func:`_forward_arguments`.
    """
    steps, neurons = x.shape
    arguments = _forward_arguments(x, constants, *others)
    kernel = kernels.forward_kernel()
    _launch("feed_forward_forward", kernel, *arguments, None, dtype=constants.dtype, steps=steps, neurons=neurons)


def lanes(words: int) -> Any:
    """Room for the checksum of rows of so many words of 32 bits, before the first row."""
    return np.zeros(-(-words // kernels.GROUP) * kernels.LANES, np.uint32)


def row_sums(x: Tensor) -> Any:
    """The checksum of the rows ``x [T, ...]``, of any dtype, on the CPU: many numbers, of which each change changes some."""
    rows = x.new_empty(len(x), x[:1].numel()) if x.numel() == 0 else x.contiguous().view(len(x), -1)
    rows = rows.view(torch.uint8)
    if rows.shape[1] % 4:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))
    sums = lanes(rows.shape[1] // 4)
    kernels.checksum_kernel()(rows.numpy().view(np.uint32), sums)
    return sums


class ForwardStream:
    """The forward of block after block: a thread goes on with its own neurons and waits for no other between two blocks.

    So a core that something else keeps busy for a while, such as packing the block before, delays its neurons alone.

    Args:
        constants: as in ``kernels/feed_forward.py``.
        jump_first: whether the input is added before the decay.
        state: before the first block, ``[3, M]``.
        steps: of a block.
    """

    def __init__(self, constants: Tensor, jump_first: bool, state: Tensor, steps: int) -> None:
        self._constants, self._jump_first, self._state = constants, jump_first, state
        self._tile, self._shares = _split("feed_forward_forward", state.dtype, steps, state.shape[1])
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="coba_triton") for _ in self._shares]

    def submit(self, x: Tensor, words: Tensor, sums: Any = None) -> tuple[Tensor, list[Future[None]]]:
        """Begin a block ``x [T, M]``, whose spikes go to ``words``; returns the state after it, and when it is there.

        ``sums``: None, or where the checksum of ``x`` goes, see :func:`lanes`.
        """
        before, self._state = self._state, torch.empty_like(self._state)
        outputs = self._state, None, words, None, None
        arguments = _forward_arguments(x, self._constants, self._jump_first, 0, before, *outputs)
        kernel = functools.partial(kernels.forward_kernel(), *arguments, sums, self._tile, len(x))
        shares = zip(self._threads, self._shares, strict=True)
        return self._state, [thread.submit(kernel, *share) for thread, share in shares]

    def close(self) -> None:
        """Wait for the blocks that are begun."""
        for thread in self._threads:
            thread.shutdown()


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
    """Fill ``grad_state`` and every non-empty gradient; shapes as in ``kernels/feed_forward.py``."""
    steps, neurons = x.shape
    none = constants.new_empty(0, 1)
    ask_for_huge_pages(grad_x)
    _launch(
        "feed_forward_backward",
        kernels.backward_kernel(method),
        strided_bytes(x),
        *constants_arrays(constants),
        array_of_rows(words),
        array_of_rows(checkpoints),
        strided_bytes(grad_spikes),
        array_of_rows(none if grad_final is None else grad_final),
        array_of_rows(none if grad_states is None else grad_states),
        strided_bytes(grad_x),
        array_of_rows(grad_state),
        array_of_rows(grad_constants) if grad_constants.numel() else None,
        checkpoint_every,
        jump_first,
        holds(checkpoints[0]) if len(checkpoints) else None,
        dtype=constants.dtype,
        steps=steps,
        neurons=neurons,
    )
