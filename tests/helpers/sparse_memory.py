"""Large arrays whose untouched pages take no memory."""

from __future__ import annotations

import mmap

import torch

MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


def sparse_zeros(elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros, of which only the pages that are touched become memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)
