"""What the launches ask of the GPU."""

from __future__ import annotations

import functools

import torch
import triton


@functools.cache
def threads_per_warp() -> int:
    """32 on NVIDIA and in the interpreter, 64 on AMD's data-centre GPUs."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


def meets_unasked() -> bool:
    """Whether programs of dense networks meet after every step where nobody asked for it.

    Not in the interpreter, which runs one program at a time, nor on AMD's GPUs: there a meeting of all programs is said to
    take longer than what it saves.
    """
    return not triton.knobs.runtime.interpret and triton.runtime.driver.active.get_current_target().backend == "cuda"


def resident_programs(device: torch.device) -> int:
    """Programs that surely run at the same time: one for each of the device's multiprocessors."""
    if triton.knobs.runtime.interpret:
        return 8
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["multiprocessor_count"])
