"""What :mod:`coba_triton.ops.time_blocks` asks of a backend, on the CPU: launches of the recurrent CPU kernels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...neuron.records import Kept
from ...ops.time_blocks import Network, kept_count, send_back
from . import recurrent as kernels
from .launch import (
    array_of_rows,
    ask_for_huge_pages,
    bits_of_one,
    constants_arrays,
    count_threads,
    holds,
    parameters_of,
    pool,
    strided_bytes,
)

# A projection of sources of which more than this are not 0 is a matrix product, of fewer a sum over events.
EVENT_DENSITY = 0.25
# A block follows the dense path if the one before it had a higher rate of spikes per neuron and step.
DENSE_RATE = 0.2
# Weights are read as dense rows where a larger part of them is not 0,
SYNAPSE_DENSITY = 1 / 16
# or where they serve fewer steps a source.
SYNAPSE_USES = 2
# So many sources tell whether it is worth to look at all.
SAMPLED_SOURCES = 64


def _launch(kernel: Callable[..., None], *args: Any, rows: int, work: int, most: int | None = None) -> None:
    """Run ``kernel`` over all rows, by ``most`` threads or all; ``work``: its cost in steps of a feed-forward neuron."""
    threads = min(rows, count_threads(most, work)) or 1
    bounds = [rows * thread // threads for thread in range(threads + 1)]
    jobs = [
        pool(os.getpid(), threads - 1).submit(kernel, *args, begin, end) for begin, end in itertools.pairwise(bounds[1:])
    ]
    kernel(*args, bounds[0], bounds[1])
    for job in jobs:
        job.result()


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


def synapses(rows: Tensor, uses: int) -> kernels.Synapses:
    """The weights of ``rows [S, N]`` that are not 0, if few are not; ``uses``: steps of all batch rows that read them."""
    sample = rows[:: max(1, len(rows) // SAMPLED_SOURCES)]
    if uses < SYNAPSE_USES * len(rows) or int(torch.count_nonzero(sample)) > SYNAPSE_DENSITY * sample.numel():
        rows = rows[:0]
    return kernels.Synapses(*kernels.synapses_kernel()(_array(rows), int(SYNAPSE_DENSITY * rows.numel())))


def is_sparse(sources: Tensor) -> bool:
    """Whether a projection is a sum over events, not a matrix product: those of fewer events than a share of the sources."""
    return int(torch.count_nonzero(sources)) <= EVENT_DENSITY * sources.numel()


def fires_often(spikes: Tensor) -> bool:
    """Whether the block after one with these spikes takes a matrix product a step."""
    return int(torch.count_nonzero(spikes)) > DENSE_RATE * spikes.numel()


def project_events(sources: Tensor, weights: Tensor) -> Tensor:
    """``relu(W) x`` and ``relu(-W) x`` for ``sources [..., K]`` and ``weights [K, N]``: ``[2, ..., N]``, ascending."""
    drive = weights.new_empty(2, *sources.shape[:-1], weights.shape[1])
    if sources.numel() == 0:
        return drive.zero_()
    values = sources.to(weights.dtype).reshape(-1, weights.shape[0])
    rows = values.shape[0]
    _launch(
        kernels.projection_kernel(), _array(values), _array(weights), _array(drive.view(2, rows, -1)),
        rows=rows, work=drive.numel(),
    )  # fmt: skip
    return drive


def _block(
    net: Network,
    x: Tensor | None,
    drive: Tensor | None,
    z: Tensor | None,
    recurrent_drive: Tensor | None,
    state: Tensor,
    spikes: Tensor | None,
    words: Tensor | None,
    forced: bool,
    states: Tensor | None,
    trajectory: Tensor | None,
    steps: int,
    chosen: Tensor | None = None,
) -> Tensor:
    """Steps whose drives are known, or else come from the events in ``x`` and those that ``z`` begins."""
    _, batch, neurons = state.shape
    cells = batch * neurons
    final = state.clone()
    none = state.new_empty(0)
    no_drive = none.view(2, 0, batch, neurons)
    input_synapses, recurrent_synapses = net.synapses
    kept = cells if chosen is None else len(chosen)
    in_place = states is not None and states.is_contiguous()
    trace = state.new_empty(len(state), 0 if states is None or in_place else steps, kept)
    if states is not None and in_place:
        trace = states.view(-1, steps, kept)
    no_words = torch.empty(0, cells, dtype=torch.int32)
    ask_for_huge_pages(*(output for output in (spikes, trajectory) if output is not None))
    _launch(
        kernels.block_kernel(),
        strided_bytes(None if x is None else x.reshape(steps, -1)),
        _array(no_drive if drive is None else drive),
        _array(net.input_rows),
        input_synapses,
        _array(none.view(0, neurons) if z is None else z),
        _array(no_drive if recurrent_drive is None else recurrent_drive),
        _array(net.recurrent_rows),
        recurrent_synapses,
        *constants_arrays(net.constants),
        array_of_rows(final.view(-1, cells)),
        strided_bytes(None if spikes is None else spikes.view(steps, cells)),
        bits_of_one(torch.uint8 if spikes is None else spikes.dtype),
        _array(no_words if words is None else words.view(-1, cells)),
        forced,
        array_of_rows(trace),
        _array(torch.empty(0, dtype=torch.int64) if chosen is None else chosen),
        _array(none.view(0, 0, cells) if trajectory is None else trajectory.view(-1, steps, cells)),
        net.jump_first,
        holds(state),
        steps,
        rows=batch,
        work=2 * steps * cells,
        most=parameters_of(f"recurrent_{'backward' if forced else 'forward'}", state.dtype, neurons, batch)["threads"],
    )
    if states is not None and not in_place:
        states.copy_(trace.view(states.shape))
    return final


def recurrent_block(
    net: Network,
    x: Tensor,
    drive: Tensor | None,
    z: Tensor,
    state: Tensor,
    spikes: Tensor | None,
    words: Tensor | None,
    states: Tensor | None,
    sliced: bool,
    chosen: Tensor | None = None,
) -> Tensor:
    """One event-driven block; shapes as in :mod:`coba_triton.backend.triton`. Returns the state."""
    if sliced:
        raise RuntimeError("path 'sliced' is for GPUs with many processors, got backend 'cpu'; pass path='events'")
    return _block(net, x, drive, z, None, state, spikes, words, False, states, None, x.shape[0], chosen)


def recurrent_step(
    net: Network, drive: Tensor, recurrent_drive: Tensor, state: Tensor, spikes: Tensor, states: Tensor | None
) -> Tensor:
    """One step with both drives ``[2, B, N]`` known; fills ``spikes [B, N]`` and returns the state."""
    trace = None if states is None else states.unsqueeze(1)
    return _block(net, None, drive[:, None], None, recurrent_drive[:, None], state, spikes, None, False, trace, None, 1)


def recurrent_replay(
    net: Network,
    x: Tensor,
    drive: Tensor | None,
    before: Tensor,
    recurrent_drive: Tensor | None,
    state: Tensor,
    words: Tensor,
    constants_grad: bool,
) -> Tensor:
    """The trajectory of a block whose spikes are known: ``[K + 2, T, B, N]``, or K where no constant needs a gradient."""
    planes = kept_count(len(state)) + (2 if constants_grad else 0)
    trajectory = state.new_empty(planes, len(before), *state.shape[1:])
    z = before[0].to(net.dtype)
    _block(net, x, drive, z, recurrent_drive, state, None, words, True, None, trajectory, x.shape[0])
    return trajectory


def recurrent_sweep(
    net: Network,
    split_weights: Tensor,
    trajectory: Tensor,
    words: Tensor,
    start: int,
    method: str,
    grad_spikes: Tensor | None,
    grad_states: Tensor | None,
    lam: Tensor,
    lam_z: Tensor,
    adjoints: Tensor,
    grad_constants: Tensor | None,
) -> Tensor:
    """Sweep back through a block: fills ``adjoints [T, B, 2 N]``, carries ``lam`` on, returns the new ``lam_z``."""
    planes, steps, batch, neurons = trajectory.shape
    cells = batch * neurons
    none = lam.new_empty(0, cells)
    gradients = none if grad_spikes is None else grad_spikes[start : start + steps].to(lam.dtype)
    arrays = [
        _array(trajectory.view(planes, steps, cells)),
        _array(words.view(-1, cells)),
        *constants_arrays(net.constants),
        _array(gradients),
    ]
    carried = [
        array_of_rows(lam.view(-1, cells)),
        _array(lam_z.view(cells)),
        _array(adjoints),
        None if grad_constants is None else _array(grad_constants),
    ]
    before = _array(none)
    most = parameters_of("recurrent_backward", lam.dtype, neurons, batch)["threads"]
    for t in reversed(range(steps)):
        if grad_states is not None:
            initial = start + t == 0  # the initial state is not recorded
            before = _array((torch.zeros_like(lam) if initial else grad_states[:, start + t - 1]).reshape(-1, cells))
        _launch(
            kernels.sweep_kernel(method),
            t,
            *arrays,
            before,
            *carried,
            net.jump_first,
            True if planes - 2 * (grad_constants is not None) > len(Kept._fields) else None,
            rows=batch,
            work=32 * cells,
            most=most,
        )
        send_back(net, adjoints[t], split_weights, lam_z)
    return lam_z


def add_products(sums: Tensor, sources: Tensor, rows: Tensor, events: bool) -> None:
    """Add ``sources^T rows``, of ``[R, K]`` and ``[R, M]``, to ``sums [K, M]``."""
    if not events:
        sums.addmm_(sources.t().to(rows.dtype), rows)
        return
    values = _array(sources.to(rows.dtype)).reshape(-1)
    flat = np.flatnonzero(values != 0)  # of bytes: several times as fast as of numbers
    row, source = np.divmod(flat, max(1, sources.shape[1]))
    _launch(
        kernels.products_kernel(), _array(sums), _array(rows), row, source, values[flat],
        rows=sums.shape[1], work=len(flat) * sums.shape[1] // 8,
    )  # fmt: skip
