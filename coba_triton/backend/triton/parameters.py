"""How kernels are launched: by a rule, or by a tuning table where there is one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...tuning.tables import Parameters, launch_parameters
from .launch import power_of_2

# Steps of float32 whose inputs are on their way while as many are computed; half as many of float64, and in chunks of time.
PREFETCH_STEPS = 16


def replay_steps(dtype: torch.dtype) -> int:
    """Steps that the backward holds in registers: as many as fit without a spill."""
    return 4 if dtype == torch.float64 else 8


def warps_per_program(neurons: int) -> int:
    """One warp a program while there are too few neurons to fill a GPU, else four; a thread has one neuron."""
    return 1 if neurons <= 32768 else 4


# Weights of float32 on their way while others are added; the order of the sum does not depend on it. Fewer where a program
# goes through one step after the other: only a few neurons spike in a step, and what is not needed is asked for in vain.
EVENTS_AHEAD = 16
STEP_EVENTS_AHEAD = 8
# A program of the event-driven kernel keeps so many neurons of float32 in registers; a larger row is swept tile by tile.
ROW_IN_REGISTERS = 2048
TILE = 2048


def events_ahead(dtype: torch.dtype) -> int:
    """Weights on their way: in float64 everything takes two registers, and as many weights as in float32 would spill."""
    return EVENTS_AHEAD if dtype.itemsize == 4 else max(1, EVENTS_AHEAD // 4)


def row_in_registers(dtype: torch.dtype) -> int:
    """Neurons of a row that one program of the event-driven kernel keeps in registers, at most."""
    return ROW_IN_REGISTERS // (dtype.itemsize // 4)


def heuristic(kernel: str, dtype: torch.dtype, neurons: int, batch: int) -> Parameters:
    """The launch parameters where no tuning table has any; see :data:`coba_triton.tuning.SPACE`."""
    if kernel == "feed_forward_forward":
        return {"num_warps": warps_per_program(neurons), "steps": PREFETCH_STEPS // (dtype.itemsize // 4)}
    if kernel == "feed_forward_backward":
        return {"num_warps": warps_per_program(neurons), "steps": replay_steps(dtype)}
    if kernel == "recurrent_forward":
        tile = TILE // (dtype.itemsize // 4)
        block = power_of_2(neurons) if neurons <= row_in_registers(dtype) else tile
        ahead = min(STEP_EVENTS_AHEAD, events_ahead(dtype))
        # up to 512 neurons, a thread has one of them
        return {"num_warps": max(1, min(16, block // 32)), "events_ahead": ahead, "tile": tile}
    return {"num_warps": 4, "replay_warps": warps_per_program(neurons * batch)}


def parameters_of(kernel: str, state: Tensor, neurons: int, batch: int = 1) -> Mapping[str, int]:
    """The launch parameters of a call, tuned or not; ``state`` has the compute dtype and the device."""
    rule = heuristic(kernel, state.dtype, neurons, batch)
    return launch_parameters("triton", kernel, rule, state.dtype, state.device, neurons, batch)
