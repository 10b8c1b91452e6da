"""Neurons with sparse synapses and delays, block by block."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...kernels import sparse
from ...ops.call import Outputs, Projection, SparseNetwork, SparseSweep, kept_count
from ...ops.spikes import unpack_spikes
from . import hardware, launch
from .launch import cdiv, contiguous, kernel_view, power_of_2
from .meeting import Meeting
from .parameters import events_ahead
from .projection import events_of, project_events
from .recurrent import launch_driven

# Neurons of a program of a sparse network, at most, and the synapses of a source that it reads together. Where constants of
# single neurons, or float64, take the registers of so many threads, a quarter of the neurons.
SPARSE_TILE = 1024
SYNAPSES_TOGETHER = 32
# The same where one step waits for the other, at most: as many as a source has on average, if there are registers for them.
STEP_SYNAPSES_TOGETHER = 128
# Steps between two meetings of the programs of a row, at most.
SPARSE_WINDOW = 16
# Rows of more neurons are shared by several programs.
ONE_PROGRAM = 256
# Programs of a row, whatever its size is; None for as many as its size and the device ask for.
PROGRAMS_PER_ROW: int | None = None


def _mode(numbers: Tensor | None) -> int:
    """How a kernel finds the weight or the delay of a synapse: one of all, one of each source, or one of each synapse."""
    if numbers is None:
        return 0
    return 1 if numbers.dim() == 2 else 0 if numbers.shape[0] == 1 else 2


def _takes_registers(net: SparseNetwork) -> bool:
    """Whether numbers of 64 bits, or constants of single neurons, take registers that are used otherwise else."""
    return net.constants.dtype == torch.float64 or net.constants.shape[1] > 1


def _programs_and_tile(net: SparseNetwork, batch: int) -> tuple[int, int]:
    """Programs that share a batch row of a sparse network, and neurons that each integrates together, one a thread.

    As many programs as run at once share a row of more than a few neurons, with tiles as small as that allows.
    """
    neurons, constants = net.neurons, net.constants
    most = SPARSE_TILE // 4 if _takes_registers(net) else SPARSE_TILE
    tile = max(hardware.threads_per_warp(), min(most, power_of_2(neurons)))
    programs = PROGRAMS_PER_ROW
    if programs is None and (neurons <= ONE_PROGRAM or triton.knobs.runtime.interpret):  # which runs one program at a time
        programs = 1
    elif programs is None:
        programs = max(1, hardware.resident_programs(constants.device) // batch)
        tile = max(hardware.threads_per_warp(), min(tile, power_of_2(cdiv(neurons, programs))))
    return min(cdiv(neurons, tile), programs), tile


def _window(net: SparseNetwork, steps: int) -> int:
    """Steps that neurons go on alone: no spike arrives sooner, and entries of a list of spikes have 32 bits."""
    return max(1, min(net.shortest, SPARSE_WINDOW, steps, (2**31 - 1) // net.neurons))


def _synapses_together(net: SparseNetwork) -> int:
    """Synapses of a source that are read together where a step waits for them, a power of two."""
    if _takes_registers(net):
        return SYNAPSES_TOGETHER
    average = cdiv(len(net.recurrent.targets), max(1, len(net.recurrent.indptr) - 1))
    return max(SYNAPSES_TOGETHER, min(STEP_SYNAPSES_TOGETHER, power_of_2(max(1, average))))


def _scatter(net: SparseNetwork, sums: Tensor, sources: Tensor, begin: int, around: bool = False) -> None:
    """Add to the ``sums [2, L, B, N]`` of L steps what the ``sources [t, B, K]`` of the steps from ``begin`` on send.

    What arrives in no step of these is left out, or, ``around`` a ring, goes into that of L steps before.
    """
    if sources.shape[0] == 0 or len(net.recurrent.targets) == 0:
        return
    _, limit, batch, neurons = sums.shape
    indptr, targets, weights, delays, grid = net.recurrent
    values, lists, counts = events_of(sources.flatten(0, 1))
    num_warps = 4
    together = SYNAPSES_TOGETHER
    launch.run(
        sparse.scatter_kernel, (len(values),), sums.device, num_warps,
        values, lists, counts, sums, indptr, targets, weights, delays, grid.scales,
        sources.shape[2], batch, neurons, limit, begin, *values.stride(), net.per_ms,
        SOURCES=num_warps * hardware.threads_per_warp() // together, LANES=together,
        WEIGHT=_mode(weights), DELAY=_mode(delays), AROUND=around,
    )  # fmt: skip


def _sparse_projection(net: SparseNetwork, x: Tensor, drive: Tensor | None) -> Tensor | None:
    """The input's drive ``[2, t, B, N]``: the given one, or that of ``x`` through its synapses, if there are any."""
    if drive is None and net.input_rows is not None and x.shape[-1] > 0:
        return project_events(x, net.input_rows)
    if drive is not None or net.inputs is None:
        return drive
    steps, batch, inputs = x.shape
    indptr, targets, weights, _, grid = net.inputs
    if inputs == 0:
        return net.constants.new_zeros(2, steps, batch, net.neurons)
    drive = net.constants.new_empty(2, steps, batch, net.neurons)
    sums = torch.zeros(drive.shape, dtype=grid.sums, device=drive.device)
    values, lists, counts = events_of(x.reshape(-1, inputs))
    rows, num_warps = len(values), 4
    units = torch.empty(rows, dtype=torch.float64, device=drive.device)
    threads, together = num_warps * hardware.threads_per_warp(), SYNAPSES_TOGETHER
    launch.run(
        sparse.sparse_projection_kernel, (rows,), drive.device, num_warps,
        values, lists, counts, sums, units, indptr, targets, weights, grid.scales,
        inputs, net.neurons, rows, *values.stride(),
        BLOCK=threads, SOURCES=threads // together, LANES=together, WEIGHT=_mode(weights),
    )  # fmt: skip
    launch.run(
        sparse.sums_to_drive_kernel, (rows * cdiv(net.neurons, threads),), drive.device, num_warps,
        sums, units, counts, grid.scales, drive, net.neurons, rows, BLOCK=threads,
    )  # fmt: skip
    return drive


def sparse_ring(net: SparseNetwork, history: Tensor) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_ring`. The ring is ``[2, R, B, N]``."""
    sums = net.recurrent.grid.sums
    ring = torch.zeros(2, *history.shape[:2], net.neurons, dtype=sums, device=history.device)
    _scatter(net, ring, history, -net.longest)
    return ring


def sparse_send(net: SparseNetwork, ring: Tensor, start: int, events: Tensor) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_send`."""
    batch, sources = ring.shape[2], len(net.recurrent.indptr) - 1
    spikes = torch.zeros(net.shortest, batch, sources, dtype=torch.uint8, device=ring.device)
    spikes.view(-1).index_fill_(0, events, 1)
    _scatter(net, ring, spikes, start % net.longest, around=True)


def sparse_block(
    net: SparseNetwork,
    ring: Tensor,
    start: int,
    x: Tensor,
    drive: Tensor | None,
    state: Tensor,
    out: Outputs,
    chosen: Tensor | None = None,
) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_block`. One launch, after that of the input's projection."""
    spikes, words, states, _ = out
    steps, batch = x.shape[:2]
    if states is not None and chosen is not None:
        every = state.new_empty(len(state), steps, *state.shape[1:])
        final = sparse_block(net, ring, start, x, drive, state, Outputs(spikes, words, every))
        states.copy_(every.flatten(2)[..., chosen])
        return final
    neurons, device = net.neurons, state.device
    indptr, targets, weights, delays, grid = net.recurrent
    drive = _sparse_projection(net, x, drive)
    final = state.clone(memory_format=torch.contiguous_format)
    window = _window(net, steps)
    programs, block = _programs_and_tile(net, batch)
    meeting = Meeting.of(programs, batch, device)
    counts = torch.zeros(2, batch, dtype=torch.int32, device=device) if meeting.together else None
    synapses_together = _synapses_together(net)
    launch.run(
        sparse.sparse_forward_kernel, (batch, programs), device, block // hardware.threads_per_warp(),
        drive, ring, indptr, targets, weights, delays, grid.scales, net.constants, final,
        torch.empty(batch, window * neurons, dtype=torch.int32, device=device), counts, meeting.arrived, meeting.failed,
        kernel_view(spikes), words, states,
        steps, batch, neurons, net.longest, start % net.longest, window,
        net.constants.stride(0), 0 if states is None else states.stride(0), meeting.spin_limit, net.per_ms,
        BLOCK=block, FIELDS=len(state), SOURCES=cdiv(block, synapses_together), LANES=synapses_together,
        WEIGHT=_mode(weights), DELAY=_mode(delays), TOGETHER=meeting.together,
        PER_NEURON=net.constants.shape[1] > 1, JUMP_FIRST=net.jump_first, **meeting.options,
    )  # fmt: skip
    meeting.check("sparse network", "pass backend='reference'")
    return final


def sparse_backward_block(
    net: SparseNetwork,
    ring: Tensor,
    x: Tensor,
    drive: Tensor | None,
    state: Tensor,
    words: Tensor,
    grad_spikes: Tensor | None,
    grad_states: Tensor | None,
    sweep: SparseSweep,
    adjoints: Tensor,
    grad_x: Tensor | None,
) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_backward_block`. One launch replays, and one goes back."""
    steps, batch = x.shape[:2]
    neurons, device = net.neurons, state.device
    indptr, targets, weights, delays, grid = net.recurrent
    words = words.contiguous()
    spikes = unpack_spikes(words, steps, torch.uint8)
    # with the spikes known, all that arrives in the block is a sum of what is under way and of what they send
    sums = torch.zeros(2, steps, batch, neurons, dtype=ring.dtype, device=device)
    sums[:, : net.longest] = ring[:, :steps]
    _scatter(net, sums, spikes, 0)
    recurrent_drive = sums.to(net.constants.dtype) * grid.scales[2:].view(2, 1, 1, 1)
    del sums
    drive = _sparse_projection(net, x, drive)
    kept = kept_count(len(state))
    trajectory = state.new_empty(kept + 2, steps, batch, neurons)
    drive = torch.zeros_like(recurrent_drive) if drive is None else drive
    launch_driven(net, drive, recurrent_drive, state.contiguous(), words, trajectory=trajectory)
    programs, block = _programs_and_tile(net, batch)
    meeting = Meeting.of(programs, batch, device)
    launch.run(
        sparse.sparse_backward_kernel, (batch, programs), device, block // hardware.threads_per_warp(),
        trajectory, words, net.constants, contiguous(grad_spikes), contiguous(grad_states), indptr, targets, weights,
        delays, sweep.lam, adjoints, sweep.sums, meeting.arrived, meeting.failed,
        steps, batch, neurons, _window(net, steps), net.constants.stride(0), meeting.spin_limit, net.per_ms,
        BLOCK=block, KEPT=kept, UNROLL=events_ahead(state.dtype), WEIGHT=_mode(weights), DELAY=_mode(delays),
        TOGETHER=meeting.together, PER_NEURON=net.constants.shape[1] > 1, JUMP_FIRST=net.jump_first,
        METHOD=sweep.method, **meeting.options,
    )  # fmt: skip
    meeting.check("sparse network", "pass backend='reference'")
    if sweep.recurrent is not None:
        _add_synapse_gradient(net, net.recurrent, sweep.recurrent, spikes, adjoints, 0)
    if net.inputs is not None:
        if sweep.inputs is not None:
            _add_synapse_gradient(net, net.inputs, sweep.inputs, x, adjoints, 0)
        if grad_x is not None:
            _fill_source_gradient(net, net.inputs, grad_x, adjoints, 0)


def sparse_history_gradient(
    net: SparseNetwork, history: Tensor, adjoints: Tensor, grad_history: Tensor, sweep: SparseSweep
) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_history_gradient`."""
    _fill_source_gradient(net, net.recurrent, grad_history, adjoints, -len(history))
    if sweep.recurrent is not None:
        _add_synapse_gradient(net, net.recurrent, sweep.recurrent, history, adjoints, -len(history))


def _fill_source_gradient(net: SparseNetwork, projection: Projection, grad: Tensor, adjoints: Tensor, begin: int) -> None:
    """Fill ``grad [t, B, K]``, by the values of sources in the steps from ``begin`` on, from ``adjoints [L, B, 2, N]``."""
    steps, batch, sources = grad.shape
    if grad.numel() == 0:
        return
    indptr, targets, weights, delays, _ = projection
    filled = grad if grad.is_contiguous() else torch.empty_like(grad, memory_format=torch.contiguous_format)
    num_warps = 4
    block = num_warps * hardware.threads_per_warp()
    launch.run(
        sparse.source_gradient_kernel, (steps * batch * cdiv(sources, block),), grad.device, num_warps,
        indptr, targets, weights, delays, adjoints, filled, sources, batch, net.neurons, begin, net.per_ms,
        BLOCK=block, UNROLL=events_ahead(grad.dtype), WEIGHT=_mode(weights), DELAY=_mode(delays),
    )  # fmt: skip
    if filled is not grad:
        grad.copy_(filled)


def _add_synapse_gradient(
    net: SparseNetwork, projection: Projection, grad: Tensor, sources: Tensor, adjoints: Tensor, begin: int
) -> None:
    """Add to ``grad [samples, S]`` what the ``sources [t, B, K]`` of the steps from ``begin`` on make of the adjoints."""
    steps, batch, count = sources.shape
    if grad.numel() == 0 or sources.numel() == 0:
        return
    indptr, targets, weights, delays, _ = projection
    samples, synapses = grad.shape
    rows = batch // samples
    # a row for each sample and source, of its values in all steps and rows of the batch
    by_source = sources.unflatten(1, (samples, rows)).permute(1, 3, 0, 2).contiguous()
    values, lists, counts = events_of(by_source.view(samples * count, steps * rows))
    num_warps = 1 if synapses <= 64 * count else 4
    launch.run(
        sparse.synapse_gradient_kernel, (samples * count,), grad.device, num_warps,
        values, lists, counts, indptr, targets, weights, delays, adjoints, grad,
        steps * rows, count, batch, net.neurons, synapses, rows, begin, net.per_ms,
        BLOCK=num_warps * hardware.threads_per_warp(), UNROLL=events_ahead(grad.dtype),
        WEIGHT=_mode(weights), DELAY=_mode(delays),
    )  # fmt: skip
