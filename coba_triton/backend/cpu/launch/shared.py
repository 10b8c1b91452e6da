"""What all launches of the CPU kernels share: launch parameters, numbers of threads, and tensors as NumPy arrays."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ....ops.call import CPU_CHECKPOINT_EVERY, DIFFERENTIABLE
from ....tuning.tables import Parameters, launch_parameters
from ..rows import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, TILE, UINT8, Strided

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


def split_neurons(name: str, dtype: torch.dtype, steps: int, neurons: int) -> tuple[int, list[tuple[int, int]]]:
    """Neurons of a tile, and from which to which neuron every thread goes. No result depends on either."""
    parameters = parameters_of(name, dtype, neurons)
    threads = count_threads(parameters["threads"], steps * neurons)
    share = -(-neurons // (threads * SHARE_OF)) * SHARE_OF
    return parameters["tile"], [(begin, min(begin + share, neurons)) for begin in range(0, neurons, share)]


def split_rows(rows: int, work: int, most: int | None = None) -> list[tuple[int, int]]:
    """From which to which row each of at most ``most`` threads goes; ``work``: the cost in steps of unconnected neurons."""
    threads = min(rows, count_threads(most, work)) or 1
    return list(itertools.pairwise(rows * thread // threads for thread in range(threads + 1)))


@functools.cache
def _madvise() -> Callable[..., int] | None:
    return ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None


def ask_for_huge_pages(*outputs: Tensor | None) -> None:
    """Advise the operating system to back large outputs, not yet touched, with huge pages. It may decline."""
    advise = _madvise()
    for output in outputs:
        if advise is not None and output is not None and output.nbytes >= HUGE_PAGES_FROM:
            begin, end = (
                address // mmap.PAGESIZE * mmap.PAGESIZE
                for address in (output.data_ptr() + mmap.PAGESIZE - 1, output.data_ptr() + output.nbytes)
            )
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)


def _bytes(x: Tensor) -> Any:
    """The memory from the first to the last element as a flat array of bytes."""
    length = x.numel()
    if length and not x.is_contiguous():
        length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.detach().as_strided((length,), (1,)).view(torch.uint8).numpy()


_NO_BYTES = Strided(_bytes(torch.empty(0)), 0, 0, 0, 0)


def strided_bytes(x: Tensor | None) -> Strided:
    return _NO_BYTES if x is None else Strided(_bytes(x), TYPE_CODES[x.dtype], x.itemsize, *x.stride())


def array_of_rows(x: Tensor) -> Any:
    """All leading axes as one: ``[..., M]`` as an array of rows."""
    return x.detach().contiguous().view(-1, x.shape[-1]).numpy()


@functools.cache
def nothing(axes: int, dtype: torch.dtype) -> Any:
    """An array without elements, for what a kernel is not given."""
    return torch.empty((0,) * axes, dtype=dtype).numpy()


def rows_if_given(x: Tensor | None, dtype: torch.dtype) -> Any:
    return nothing(2, dtype) if x is None else array_of_rows(x)


def constants_arrays(constants: Tensor) -> tuple[Any, Any]:
    """The constants as (shared, None) or (None, per neuron)."""
    table = array_of_rows(constants)
    return (table[:, 0].copy(), None) if constants.shape[1] == 1 else (None, table)


@functools.cache
def bits_of_one(dtype: torch.dtype) -> int:
    """The bits of the number 1 as an integer."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return int(torch.ones((), dtype=dtype).view(integer))


def array_of(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


def array_if_given(x: Tensor | None, axes: int, dtype: torch.dtype) -> Any:
    return nothing(axes, dtype) if x is None else array_of(x)


def gradient_by_spikes(spikes: Tensor | None, dtype: torch.dtype) -> Any:
    """That of all steps ``[T, ...]`` as rows; one row where it is the same in all of them, as that of a sum over time is."""
    if spikes is None:
        return nothing(2, dtype)
    return array_of_rows((spikes[:1] if spikes.stride(0) == 0 else spikes).to(dtype).flatten(1))


def holds(fields: int) -> bool | None:
    """How the kernels are told that a state of so many fields has a refractory period: True, or None without one."""
    return True if fields > DIFFERENTIABLE else None
