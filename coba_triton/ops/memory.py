"""The memory of large outputs on the CPU, kept for a while.

The first touch of new memory costs more than the neurons that write to it. A loop that drops the spikes of the call before
gives their memory to the next call. No more than :data:`KEPT` bytes are kept unused.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

# Outputs of fewer bytes come from PyTorch, whose allocator keeps their memory.
FROM = 1 << 19
# Bytes that are kept unused at the most, in the whole process; a larger output is never kept.
KEPT = 64 << 20
# A block is taken for an output that needs at least so much of it.
USED = 0.8

_lock = threading.RLock()  # the end of a tensor may come at any time, within this module as well
_unused: list[Any] = []


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU, like that of ``torch.empty``."""
    size = prod(shape) * dtype.itemsize
    if not FROM <= size <= KEPT:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        block = next((block for block in reversed(_unused) if USED * block.nbytes <= size <= block.nbytes), None)
        if block is not None:
            _unused[:] = [other for other in _unused if other is not block]
    if block is None:
        block = torch.empty(size, dtype=torch.uint8).numpy()
    lent = block[:size]
    weakref.finalize(lent, _give_back, block).atexit = False
    storage: Any = torch.from_numpy(lent).untyped_storage()  # keeps `lent` as long as any tensor has it
    made = torch.empty(0, dtype=dtype)
    set_storage: Any = made.set_
    set_storage(storage, 0, tuple(shape))  # no view of another tensor, which autograd would follow
    return made


def _give_back(block: Any) -> None:
    with _lock:
        _unused.append(block)
        while sum(block.nbytes for block in _unused) > KEPT:
            _unused.pop(0)


def release() -> None:
    """Give all memory that is kept unused back to the allocator."""
    with _lock:
        _unused.clear()
