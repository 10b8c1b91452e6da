"""The drive of sources, summed over their events."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import recurrent
from . import launch
from .launch import cdiv, kernel_view, power_of_2
from .parameters import events_ahead

# Rows of sources that a program projects, if there are enough of them to fill a GPU, else one.
ROWS_TOGETHER = 4
MANY_ROWS = 2048


def _warps_for(block: int) -> int:
    """Warps for a program with ``block`` neurons, of which a thread has 2, or 4 where there are more than 1024."""
    return max(1, min(16, block // 64))


def events_of(sources: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of sources ``[R, K]`` as the kernels read them, and the lists ``[R, K]`` and counts ``[R]`` of those not 0."""
    rows, count = sources.shape
    values = kernel_view(sources)
    lists = torch.empty(rows, count, dtype=torch.int32, device=sources.device)
    counts = torch.empty(rows, dtype=torch.int32, device=sources.device)
    block = min(1024, power_of_2(count))
    launch.run(
        recurrent.compact_kernel, (rows,), sources.device, _warps_for(block),
        values, lists, counts, count, *values.stride(), BLOCK=block,
    )  # fmt: skip
    return values, lists, counts


def project_events(sources: Tensor, weights: Tensor) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.project_events`."""
    inputs, neurons = weights.shape
    drive = weights.new_empty(2, *sources.shape[:-1], neurons)
    if sources.numel() == 0 or neurons == 0:
        return drive.zero_()
    values, lists, counts = events_of(sources.reshape(-1, inputs))
    rows = len(values)
    block = min(1024, power_of_2(neurons))
    together = ROWS_TOGETHER if rows >= MANY_ROWS else 1
    launch.run(
        recurrent.projection_kernel, (cdiv(rows, together), cdiv(neurons, block)), weights.device,
        _warps_for(block), values, lists, counts, weights, drive, inputs, neurons, rows, *values.stride(),
        BLOCK=block, UNROLL=events_ahead(weights.dtype), ROWS=together,
    )  # fmt: skip
    return drive
