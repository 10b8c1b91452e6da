"""Launches of the CPU kernels for dense recurrent networks, whose batch rows are split over threads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....ops.call import Network, Outputs, Sweep, kept_count
from .. import products, recurrent
from ..events import count_kernel, list_kernel, unpack_kernel
from ..threads import run
from .shared import (
    array_if_given,
    array_of,
    array_of_rows,
    ask_for_huge_pages,
    bits_of_one,
    constants_arrays,
    count_threads,
    gradient_by_spikes,
    holds,
    nothing,
    parameters_of,
    rows_if_given,
    split_rows,
    strided_bytes,
)

# A projection of sources of which more than this are not 0 is a matrix product, of fewer a sum over events.
EVENT_DENSITY = 0.25
# A block follows the dense path if the one before it had a higher rate of spikes per neuron and step.
DENSE_RATE = 0.2
# Weights of which a larger part than this is not 0 are read as dense rows.
SYNAPSE_DENSITY = 1 / 16
# So are weights that serve fewer steps a source than this.
SYNAPSE_USES = 2
# So many sources tell whether it is worth while to look at all of them.
SAMPLED_SOURCES = 64


def synapses(rows: Tensor, uses: int) -> recurrent.Synapses:
    """The weights of ``rows [K, N]`` that are not 0, if they are few and serve many steps, else none at all."""
    sample = rows[:: max(1, len(rows) // SAMPLED_SOURCES)]
    if uses < SYNAPSE_USES * len(rows) or int(torch.count_nonzero(sample)) > SYNAPSE_DENSITY * sample.numel():
        rows = rows[:0]
    return recurrent.Synapses(*recurrent.synapses_kernel()(array_of(rows), int(SYNAPSE_DENSITY * rows.numel())))


def is_sparse(sources: Tensor) -> bool:
    """Whether so few sources are not 0 that a sum over events costs less than a matrix product."""
    return _count_nonzero(sources) <= EVENT_DENSITY * sources.numel()


def fires_often(spikes: Tensor) -> bool:
    """Whether so many neurons fire that a matrix product a step costs less than sums over events."""
    return _count_nonzero(spikes) > DENSE_RATE * spikes.numel()


def _count_nonzero(x: Tensor) -> int:
    """``torch.count_nonzero``, several times as fast."""
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    if x.dtype not in (torch.float32, torch.float64, torch.uint8) or not x.is_contiguous():
        return int(torch.count_nonzero(x))
    return int(count_kernel()(array_of(x.view(-1))))


def unpack(words: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.unpack`."""
    spikes = torch.empty(steps, *words.shape[1:], dtype=torch.uint8)
    unpack_kernel()(array_of(words.reshape(len(words), -1)), array_of(spikes.view(steps, -1)))
    return spikes.to(dtype)


def project_events(sources: Tensor, weights: Tensor) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.project_events`."""
    drive = weights.new_empty(2, *sources.shape[:-1], weights.shape[1])
    if sources.numel() == 0:
        return drive.zero_()
    values = sources.to(weights.dtype).reshape(-1, weights.shape[0])
    rows = values.shape[0]
    arrays = array_of(values), array_of(weights), array_of(drive.view(2, rows, -1))
    run(recurrent.projection_kernel(), *arrays, shares=split_rows(rows, drive.numel()))
    return drive


class Drives(NamedTuple):
    """What reaches the neurons in each step of a block: a drive ``[2, t, B, N]``, or the sources whose events it comes from.

    Attributes:
        x: the input's sources ``[t, B, I]``, None if its drive is known.
        input: the input's drive, None if it is to be summed.
        z: the spikes before the first step ``[B, N]``, None if the recurrent drive is known.
        recurrent: the recurrent drive, None if it is to be summed.
    """

    x: Tensor | None = None
    input: Tensor | None = None
    z: Tensor | None = None
    recurrent: Tensor | None = None


def _feeds(net: Network, drives: Drives, steps: int) -> recurrent.Feeds:
    return recurrent.Feeds(
        strided_bytes(None if drives.x is None else drives.x.reshape(steps, -1)),
        array_if_given(drives.input, 4, net.dtype),
        array_of(net.input_rows),
        net.input_synapses,
        array_if_given(drives.z, 2, net.dtype),
        array_if_given(drives.recurrent, 4, net.dtype),
        array_of(net.recurrent_rows),
        net.recurrent_synapses,
    )


def _block(
    net: Network,
    drives: Drives,
    state: Tensor,
    out: Outputs,
    trajectory: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """Simulate a block, or replay it if there is a trajectory to fill: then its spikes are those in ``out.words``."""
    _, batch, neurons = state.shape
    steps = 1 if drives.x is None else len(drives.x)
    spikes, words, states, _ = out
    replay = trajectory is not None
    cells = batch * neurons
    final = state.clone()
    kept = cells if chosen is None else len(chosen)
    in_place = states is not None and states.is_contiguous()
    trace = state.new_empty(len(state), 0 if states is None or in_place else steps, kept)
    if states is not None and in_place:
        trace = states.view(-1, steps, kept)
    ask_for_huge_pages(spikes, trajectory)
    most = parameters_of(f"recurrent_{'backward' if replay else 'forward'}", state.dtype, neurons, batch)["threads"]
    run(
        recurrent.block_kernel(),
        _feeds(net, drives, steps),
        *constants_arrays(net.constants),
        array_of_rows(final.view(-1, cells)),
        strided_bytes(None if spikes is None else spikes.view(steps, cells)),
        bits_of_one(torch.uint8 if spikes is None else spikes.dtype),
        rows_if_given(None if words is None else words.view(-1, cells), torch.int32),
        replay,
        array_of_rows(trace),
        array_if_given(chosen, 1, torch.int64),
        array_if_given(None if trajectory is None else trajectory.view(-1, steps, cells), 3, state.dtype),
        net.jump_first,
        holds(len(state)),
        steps,
        shares=split_rows(batch, 8 * steps * cells, most),
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
    out: Outputs,
    sliced: bool | None,
    chosen: Tensor | None = None,
) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_block`."""
    if sliced:
        raise RuntimeError("path 'sliced' is for GPUs with many processors, got backend 'cpu'; pass path='events'")
    return _block(net, Drives(x, drive, z), state, out, chosen=chosen)


def recurrent_step(
    net: Network, drive: Tensor, recurrent_drive: Tensor, state: Tensor, spikes: Tensor, states: Tensor | None
) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_step`."""
    drives = Drives(input=drive[:, None], recurrent=recurrent_drive[:, None])
    return _block(net, drives, state, Outputs(spikes, states=None if states is None else states.unsqueeze(1)))


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
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_backward_block`.

    Without a gradient by the constants, the trajectory lacks its last two planes.
    """
    steps, batch, neurons = before.shape[0], *state.shape[1:]
    cells, dtype = batch * neurons, state.dtype
    planes = kept_count(len(state)) + (0 if sweep.sums is None else 2)
    ask_for_huge_pages(adjoints)
    drives = Drives(x, drive, before[0].to(net.dtype), recurrent_drive)
    most = parameters_of("recurrent_backward", dtype, neurons, batch)["threads"]
    # A thread with batch rows of its own goes through the block alone. PyTorch's threads share the product of fewer rows.
    alone = net.exchange is None and batch >= count_threads(most, 32 * steps * cells)
    panels = nothing(3, dtype)
    if alone:
        if "panels" not in sweep.scratch:
            sweep.scratch["panels"] = products.panels_of(net.recurrent_weights)
        panels = sweep.scratch["panels"].numpy()
    back = recurrent.Back(
        panels,
        *_incoming(sweep, start, steps),
        array_of_rows(sweep.lam.view(-1, cells)),
        array_of(sweep.lam_z.view(cells)),
        array_of(adjoints),
    )
    sums = None if sweep.sums is None else array_of(sweep.sums)
    spikes = array_of_rows(words.view(-1, cells))
    constants = constants_arrays(net.constants)
    jump_first, held = net.jump_first, holds(len(state))

    def shares(steps: int) -> list[tuple[Any, ...]]:
        rows = split_rows(batch, 32 * cells * steps, most)
        return [(*some, products.scratch(adjoints.numpy().dtype)) for some in rows]

    if alone:
        run(
            recurrent.backward_kernel(sweep.method),
            _feeds(net, drives, steps),
            *constants,
            array_of_rows(state.clone().view(-1, cells)),
            strided_bytes(None),
            bits_of_one(torch.uint8),
            spikes,
            True,
            nothing(2, dtype),
            nothing(1, torch.int64),
            planes,
            jump_first,
            held,
            steps,
            back,
            sums,
            shares=shares(steps),
        )
        return
    trajectory = state.new_empty(planes, steps, batch, neurons)
    _block(net, drives, state, Outputs(words=words), trajectory)
    kept = array_of(trajectory.view(planes, steps, cells))
    for t in reversed(range(steps)):
        kernel = recurrent.sweep_kernel(sweep.method)
        run(kernel, t, t + 1, kept, spikes, *constants, back, sums, jump_first, held, shares=shares(1))
        net.send_back(adjoints[t], sweep)


def _incoming(sweep: Sweep, start: int, steps: int) -> tuple[Any, Any]:
    """The incoming gradients by the spikes of a block, and by the recorded states before each of its steps."""
    dtype, cells = sweep.lam.dtype, sweep.lam_z.numel()
    spikes = None if sweep.spikes is None else sweep.spikes[start : start + steps]
    states = sweep.states
    if states is not None:  # the initial one is not recorded
        earlier = states[:, start - 1 : start] if start else states.new_zeros(len(states), 1, *states.shape[2:])
        states = torch.cat([earlier, states[:, start : start + steps - 1]], 1).view(-1, cells)
    return gradient_by_spikes(spikes, dtype), array_if_given(states, 2, dtype)


def add_products(sums: Tensor, sources: Tensor, rows: Tensor, events: bool) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.add_products`."""
    if not events:
        sums.addmm_(sources.t().to(rows.dtype), rows)
        return
    found = list_kernel()(array_of(sources.to(rows.dtype)))
    shares = split_rows(sums.shape[1], len(found[0]) * sums.shape[1] // 3)
    run(recurrent.products_kernel(), array_of(sums), array_of(rows), *found, shares=shares)
