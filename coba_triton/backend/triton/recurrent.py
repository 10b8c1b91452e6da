"""Neurons with dense recurrent weights, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import recurrent
from ...ops.call import Block, Network, Outputs, SparseNetwork, Sweep, kept_count
from ...ops.spikes import unpack_spikes
from . import hardware, launch
from .launch import cdiv, kernel_view, power_of_2
from .meeting import Meeting
from .parameters import events_ahead, parameters_of, row_in_registers
from .projection import project_events

# Neurons of a program that shares its row, at least, and programs that share a row unasked, at least.
SLICE = 128
ROWS_SHARED_BY = 4
# Neurons whose spikes such a program lists together, at most; a thread has at most 8 of them.
READ_TOGETHER = 4096
# Up to so many neurons a program forms the sweep's product itself, one launch a block; above, one product a step.
SWEEP_IN_ONE_LAUNCH = 256
# Above the first number of neurons of float32, up to the second, programs share rows and hold their weights in registers.
# Else they read them in every step, which pays for up to so many rows.
SWEEP_HELD_FROM = 128
SWEEP_HELD = 512
SWEEP_STREAMED_ROWS = 4
# Of such a program: rows, at most; neurons, half as many where registers are scarce; warps; weights that it reads together,
# for each neuron.
SWEEP_HELD_ROWS = 8
SWEEP_COLUMNS = 32
SWEEP_WARPS = 8
SWEEP_CHUNK = 32


def _is_wide(block: int) -> bool:
    """Whether a thread of a program with ``block`` neurons has 4 of them."""
    return block > 1024


def synapses(rows: Tensor, uses: int) -> None:
    """Nothing is prepared: the kernels read the rows of the matrix itself."""


def is_sparse(sources: Tensor) -> bool:
    """Always: the kernels sum over the events of any sources, so that the host does not wait for a count of them."""
    return True


def unpack(words: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.unpack`."""
    return unpack_spikes(words, steps, dtype)


def fires_often(spikes: Tensor) -> bool:
    """Never: the host does not wait for a count. Where neurons fire often, the caller can choose ``path="dense"``."""
    return False


def recurrent_block(
    net: Network,
    x: Tensor,
    drive: Tensor | None,
    z: Tensor,
    state: Tensor,
    out: Outputs,
    sliced: bool | None,
    chosen: Tensor | None = None,
) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_block`. One event-driven launch."""
    spikes, words, states, _ = out
    if states is not None and chosen is not None:
        every = state.new_empty(len(state), *x.shape[:2], state.shape[2])
        final = recurrent_block(net, x, drive, z, state, Outputs(spikes, words, every), sliced)
        states.copy_(every.flatten(2)[..., chosen])
        return final
    drive = project_events(x, net.input_rows) if drive is None else drive
    first = project_events(z, net.recurrent_rows)
    _, steps, batch, neurons = drive.shape
    if _shares_rows(neurons, batch, state.device) if sliced is None else sliced:
        block = _slice_of(neurons, batch, state.dtype, state.device)
        if block < neurons:
            return _sliced_block(net, drive, first, state, out, block)
    final = torch.empty_like(state)
    parameters = parameters_of("recurrent_forward", state, neurons, batch)
    one_tile = neurons <= row_in_registers(state.dtype)
    block = power_of_2(neurons) if one_tile else parameters["tile"]
    ahead = parameters["events_ahead"]
    per_neuron = net.constants.shape[1] > 1
    if per_neuron and not one_tile:  # the constants of half of the neurons take the registers of the others
        block //= 2
    elif per_neuron and _is_wide(block):
        ahead = max(1, ahead // 2)
    if not one_tile:  # two threads with one neuron would race for its state
        block = max(block, parameters["num_warps"] * hardware.threads_per_warp())
    scratch = torch.empty(3, batch, neurons, dtype=torch.int32, device=state.device)
    launch.run(
        recurrent.forward_kernel, (batch,), state.device, parameters["num_warps"],
        drive, first, net.recurrent_rows, state, net.constants, final, scratch[:2], scratch[2],
        kernel_view(spikes), words, states,
        steps, batch, neurons, net.constants.stride(0), 0 if states is None else states.stride(0),
        BLOCK=block, FIELDS=len(state), ONE_TILE=one_tile, EVEN=block == neurons, UNROLL=ahead, PER_NEURON=per_neuron,
        JUMP_FIRST=net.jump_first,
    )  # fmt: skip
    return final


def _slice_of(neurons: int, batch: int, dtype: torch.dtype, device: torch.device) -> int:
    """Neurons of each of the programs that share a batch row; all of them where one program has the row to itself.

    A thread has at most two neurons, one in float64: more would spill.
    """
    programs = max(1, min(cdiv(neurons, SLICE), hardware.resident_programs(device) // max(1, batch)))
    block = power_of_2(cdiv(neurons, programs))
    return block if block < neurons and block <= row_in_registers(dtype) // 2 else neurons


def _shares_rows(neurons: int, batch: int, device: torch.device) -> bool:
    """Whether programs share rows unasked: those that no program keeps in registers, if at least four can share each."""
    return (
        neurons > row_in_registers(torch.float32)
        and hardware.meets_unasked()
        and hardware.resident_programs(device) >= ROWS_SHARED_BY * batch
    )


def _sliced_block(net: Network, drive: Tensor, first: Tensor, state: Tensor, out: Outputs, block: int) -> Tensor:
    """:func:`recurrent_block` by programs of ``block`` neurons, which wait for those of their row after every step.

    ``first``: the recurrent drive of the first step, ``[2, B, N]``.
    """
    _, steps, batch, neurons = drive.shape
    spikes, words, states, _ = out
    final = torch.empty_like(state)
    device, programs = state.device, cdiv(neurons, block)
    num_warps = max(4, min(16, block // hardware.threads_per_warp()))
    meeting = Meeting.of(programs, batch, device)
    launch.run(
        recurrent.sliced_forward_kernel, (programs, batch), device, num_warps,
        drive, first, net.recurrent_rows, state, net.constants, final,
        torch.empty(2, batch, neurons, dtype=torch.uint8, device=device),
        torch.empty(batch, programs, neurons, dtype=torch.int32, device=device), meeting.arrived, meeting.failed,
        kernel_view(spikes), words, states,
        steps, batch, neurons, net.constants.stride(0), 0 if states is None else states.stride(0), meeting.spin_limit,
        BLOCK=block, FIELDS=len(state), TILE=min(READ_TOGETHER, 8 * num_warps * hardware.threads_per_warp()),
        UNROLL=events_ahead(state.dtype), PER_NEURON=net.constants.shape[1] > 1, JUMP_FIRST=net.jump_first,
        **meeting.options,
    )  # fmt: skip
    meeting.check("path 'sliced'", "pass path='events'")
    return final


def launch_driven(
    net: Network | SparseNetwork,
    drive: Tensor,
    recurrent_drive: Tensor,
    state: Tensor,
    words: Tensor | None = None,
    spikes: Tensor | None = None,
    states: Tensor | None = None,
    trajectory: Tensor | None = None,
) -> Tensor:
    """Steps whose two drives ``[2, ..., B, N]`` are known; returns the state after them.

    With ``words`` their spikes are known as well; ``spikes``, ``states`` and ``trajectory`` are filled if they are there.
    """
    final = torch.empty_like(state)
    cells = state[0].numel()
    steps = drive[0].numel() // cells
    num_warps = parameters_of("recurrent_backward", state, state.shape[2], state.shape[1])["replay_warps"]
    block = hardware.threads_per_warp() * num_warps
    launch.run(
        recurrent.driven_kernel, (cdiv(cells, block),), state.device, num_warps,
        drive, recurrent_drive, state, net.constants, words, final, spikes, states, trajectory,
        steps, cells, net.constants.stride(0), 0 if states is None else states.stride(0),
        BLOCK=block, FIELDS=len(state), KEPT=kept_count(len(state)), PER_NEURON=net.constants.shape[1] > 1,
        JUMP_FIRST=net.jump_first,
    )  # fmt: skip
    return final


def recurrent_step(
    net: Network, drive: Tensor, recurrent_drive: Tensor, state: Tensor, spikes: Tensor, states: Tensor | None
) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_step`."""
    return launch_driven(net, drive, recurrent_drive, state, spikes=spikes, states=states)


def recurrent_backward_block(
    net: Network,
    x: Tensor,
    drive: Tensor | None,
    before: Tensor,
    recurrent_drive: Tensor | None,
    state: Tensor,
    words: Tensor,
    sweep: Sweep,
    start: int,
    adjoints: Tensor,
) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_backward_block`."""
    drive = project_events(x, net.input_rows) if drive is None else drive
    if recurrent_drive is None:
        recurrent_drive = project_events(before, net.recurrent_rows)
    trajectory = state.new_empty(kept_count(len(state)) + 2, len(before), *state.shape[1:])
    launch_driven(net, drive, recurrent_drive, state, words, trajectory=trajectory)
    sweep_back(net, sweep, Block(start, words, trajectory), adjoints)


def sweep_back(net: Network, sweep: Sweep, block: Block, adjoints: Tensor) -> None:
    """Go back through the trajectory of a block.

    One launch where a program can own whole rows, or where all programs that share the rows run at once; else a launch
    and a matrix product a step.
    """
    planes, steps, batch, neurons = block.trajectory.shape
    tile = None if net.exchange is not None else _shared_sweep(neurons, batch, block.trajectory.dtype, sweep.lam.device)
    if tile is not None:
        return _sweep_together(net, sweep, block, adjoints, *tile)
    _, grad_spikes, grad_states, lam, lam_z, sums, _ = sweep
    in_one_launch = neurons <= SWEEP_IN_ONE_LAUNCH and net.exchange is None
    # one neuron a thread: no layout conversions between the loads
    if in_one_launch:
        num_warps = max(1, power_of_2(neurons) // hardware.threads_per_warp())
    else:
        num_warps = parameters_of("recurrent_backward", lam, neurons, batch)["num_warps"]
    threads = num_warps * hardware.threads_per_warp()
    grad_strides = (0, 0) if grad_spikes is None else grad_spikes.stride()
    weights = net.recurrent_weights.contiguous() if in_one_launch else None

    first = 0 if in_one_launch else steps - 1
    args = (
        block.trajectory, block.words, net.constants, grad_spikes, grad_states, weights, lam, lam_z, adjoints, sums,
    )  # fmt: skip
    sizes = (
        block.start, 0 if grad_states is None else grad_states.shape[1], steps, batch, neurons,
        net.constants.stride(0), *grad_strides,
    )  # fmt: skip
    again = launch.run(
        recurrent.backward_kernel, (batch, cdiv(neurons, threads)), lam.device, num_warps, *args, first, steps, *sizes,
        BLOCK=threads, KEPT=planes - 2, UNROLL=events_ahead(lam.dtype),
        PER_NEURON=net.constants.shape[1] > 1, JUMP_FIRST=net.jump_first, METHOD=sweep.method,
    )  # fmt: skip
    if in_one_launch:
        return
    net.send_back(adjoints[first], sweep)
    for t in reversed(range(first)):
        again(*args, t, t + 1, *sizes)
        net.send_back(adjoints[t], sweep)


def _shared_sweep(neurons: int, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int, bool] | None:
    """Rows and neurons of each of the programs that go back through a block together, and whether they hold their weights.

    None where a program that has a row to itself, or a launch for every step, serves: for few neurons, for many of more than
    a few rows, and where the device does not run all programs at once.
    """
    held = SWEEP_HELD_FROM < neurons <= SWEEP_HELD and dtype.itemsize == 4
    if not hardware.meets_unasked() or (neurons <= SWEEP_IN_ONE_LAUNCH and not held):
        return None
    if not held and batch > SWEEP_STREAMED_ROWS:
        return None
    rows = min(power_of_2(batch), SWEEP_HELD_ROWS)
    block = SWEEP_COLUMNS // 2 if held or dtype.itemsize > 4 else SWEEP_COLUMNS
    programs = cdiv(neurons, block) * cdiv(batch, rows)
    return (rows, block, held) if programs <= hardware.resident_programs(device) else None


def _sweep_together(net: Network, sweep: Sweep, block: Block, adjoints: Tensor, rows: int, columns: int, held: bool) -> None:
    """:func:`sweep_back` in one launch of programs of ``rows`` x ``columns`` neurons that meet after every step."""
    planes, steps, batch, neurons = block.trajectory.shape
    _, grad_spikes, grad_states, lam, lam_z, sums, _ = sweep
    groups, programs = cdiv(batch, rows), cdiv(neurons, columns)
    meeting = Meeting.of(programs, groups, lam.device)
    grad_strides = (0, 0) if grad_spikes is None else grad_spikes.stride()
    launch.run(
        recurrent.shared_backward_kernel, (programs, groups), lam.device, SWEEP_WARPS,
        block.trajectory, block.words, net.constants, grad_spikes, grad_states,
        net.recurrent_weights.contiguous(), lam, lam_z, adjoints, sums, meeting.arrived, meeting.failed,
        block.start, 0 if grad_states is None else grad_states.shape[1], steps, batch, neurons,
        net.constants.stride(0), *grad_strides, meeting.spin_limit,
        ROWS=rows, BLOCK=columns, CHUNK=power_of_2(neurons) if held else SWEEP_CHUNK, HELD=held,
        UNROLL=4 if rows <= 2 else 2, KEPT=planes - 2,
        PER_NEURON=net.constants.shape[1] > 1, JUMP_FIRST=net.jump_first, METHOD=sweep.method, **meeting.options,
    )  # fmt: skip
    meeting.check("backward", "pass backend='reference'")


def add_products(sums: Tensor, sources: Tensor, rows: Tensor, events: bool) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.add_products`. A matrix product, events or not."""
    sums.addmm_(sources.t().to(rows.dtype), rows)
