"""Launches of the CPU kernels that go back through sparse synapses and delays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ....ops import memory as kept_memory
from ....ops.call import SparseNetwork, SparseSweep, kept_count
from .. import sparse_backward
from ..lanes import LANES
from ..threads import run
from .prepared import (
    PLACE_BITS,
    bits_for_places,
    links_of,
    paths_of,
    rows_of_events,
    wires_of,
)
from .shared import (
    array_if_given,
    array_of,
    array_of_rows,
    ask_for_huge_pages,
    constants_arrays,
    count_threads,
    gradient_by_spikes,
    holds,
    nothing,
    parameters_of,
    strided_bytes,
)


def _add_groups(kernel: Callable[..., None], args: tuple[Any, ...], batch: int, sweep: SparseSweep, threads: int) -> None:
    """Run a kernel for every group of batch rows, and add its sums to the gradients by magnitudes, group after group.

    The kernel takes scratch for the sums of each group that runs at the same time, then what group it has.
    """
    lanes, every = sparse_backward.groups(batch, sweep.samples, threads)
    together = max(1, min(threads, len(every)))
    vectors = sparse_backward.vectors_of(lanes)
    parts = [
        None if sums is None else _scratch(sweep, name, together * vectors, sums.shape[1])
        for name, sums in (("recurrent", sweep.recurrent), ("inputs", sweep.inputs))
    ]
    scratch = [nothing(2, sweep.lam.dtype) if part is None else part.numpy() for part in parts]
    for begin in range(0, len(every), together):
        now = every[begin : begin + together]
        shares = [(lanes, rows, first, number) for number, (first, rows, _) in enumerate(now)]
        run(kernel, *args, *scratch, shares=shares)
        for number, (_, rows, sample) in enumerate(now):
            for sums, part in zip((sweep.recurrent, sweep.inputs), parts, strict=True):
                if sums is not None and part is not None:
                    for own in range(number * vectors, number * vectors + -(-rows // LANES)):
                        sums[sample] += part[own]


def _scratch(sweep: SparseSweep, name: str, groups: int, numbers: int) -> Tensor:
    """So many numbers for each group, each beginning on a line of memory if they fill whole lines.

    All blocks of a sweep have the same memory: new pages would cost more than its use.
    """
    memory = sweep.scratch.get(name)
    if memory is None or memory.numel() < groups * numbers:
        memory = sweep.scratch[name] = kept_memory.empty((groups * numbers,), sweep.lam.dtype)
        ask_for_huge_pages(memory)
    return memory[: groups * numbers].view(groups, numbers)


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
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_backward_block`."""
    _, batch, neurons = state.shape
    steps, cells, dtype = len(x), batch * neurons, state.dtype
    if bits_for_places(net) > PLACE_BITS:
        raise ValueError(
            f"gradients through sparse synapses need 2 (D + 1) N <= 2**{PLACE_BITS} sums a batch row, got D={net.longest} "
            f"steps, the longest delay, and N={neurons} neurons; use shorter delays or backend 'reference'"
        )
    most = parameters_of("recurrent_backward", dtype, neurons, batch)["threads"]
    threads = count_threads(most, 32 * steps * cells)
    planes = kept_count(len(state)) - 1 + (0 if sweep.sums is None else 2)
    lanes, every = sparse_backward.groups(batch, sweep.samples, threads)
    ask_for_huge_pages(adjoints)
    together = min(threads, len(every))
    ahead = sparse_backward.steps_ahead(steps, net.longest)
    flow = -(-(ahead + net.longest) * 2 * neurons * lanes // LANES) * LANES
    args = (
        strided_bytes(x.reshape(steps, -1)),
        paths_of(net.inputs, net),
        rows_of_events(net, x, drive),
        array_if_given(drive, 4, dtype),
        paths_of(net.recurrent, net),
        links_of(net, wires_of(net.recurrent, net), neurons),
        np.concatenate([array_of(p.grid.scales) for p in (net.recurrent, net.inputs or net.recurrent)]),
        array_of(ring),
        *constants_arrays(net.constants),
        array_of_rows(state.view(-1, cells)),
        array_of(words.view(-1, cells)),
        gradient_by_spikes(grad_spikes, dtype),
        nothing(2, dtype) if grad_states is None else array_of_rows(grad_states.reshape(-1, cells)),
        array_of_rows(sweep.lam.view(-1, cells)),
        None if sweep.sums is None else array_of(sweep.sums),
        array_of(adjoints),
        array_if_given(grad_x, 3, dtype),
        net.jump_first,
        holds(len(state)),
        steps,
        ahead,
        _scratch(sweep, "trajectories", together, planes * steps * lanes * neurons).numpy(),
        _scratch(sweep, "flows", together, flow).numpy(),
    )
    _add_groups(sparse_backward.backward_block_kernel(sweep.method), args, batch, sweep, threads)


def sparse_history_gradient(
    net: SparseNetwork, history: Tensor, adjoints: Tensor, grad_history: Tensor, sweep: SparseSweep
) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_history_gradient`."""
    args = (paths_of(net.recurrent, net), array_of(history), array_of(adjoints), array_of(grad_history))
    threads = count_threads(None, 32 * history.numel())
    _add_groups(sparse_backward.history_kernel(), args, history.shape[1], sweep._replace(inputs=None), threads)
