"""Launches of the CPU kernels for sparse synapses and delays: threads share batch rows, or each has its own."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from ....ops.call import Outputs, SparseNetwork
from .. import sparse
from ..threads import run
from .prepared import (
    MANY_STEPS,
    NO_LINKS,
    PLACE_BITS,
    PREPARED_AT_MOST,
    bits_for_places,
    kept_links,
    links_of,
    rows_of_events,
    wires_of,
)
from .shared import (
    SHARE_OF,
    array_if_given,
    array_of,
    array_of_rows,
    ask_for_huge_pages,
    bits_of_one,
    constants_arrays,
    count_threads,
    holds,
    parameters_of,
    rows_if_given,
    split_rows,
    strided_bytes,
)

# Where threads share a batch row, each has so many neuron-steps to compute before it meets the others: half a microsecond.
MIN_STEPS_TO_MEETING = 1000
# While something else keeps the cores, threads that meet are slower by far than one alone: until when none shares a row.
_alone_until = 0.0
ALONE_SECONDS = 1.0
# Long waits of a block before its threads stop to share.
LONG_WAITS = 8


def sparse_ring(net: SparseNetwork, history: Tensor) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_ring`."""
    longest, batch, _ = history.shape
    ring = torch.empty(batch, longest, 2, net.neurons, dtype=net.recurrent.grid.sums)
    work = 2 * history.numel()
    wires = wires_of(net.recurrent, net)
    links = kept_links(net)
    run(sparse.ring_kernel(), array_of(ring), array_of(history), wires, links, shares=split_rows(batch, work))
    return ring


def sparse_send(net: SparseNetwork, ring: Tensor, start: int, events: Tensor) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_send`."""
    synapses = net.recurrent
    fan_out = len(synapses.targets) // max(1, len(synapses.indptr) - 1)
    threads = count_threads(None, 8 * len(events) * fan_out)
    share = -(-net.neurons // (threads * SHARE_OF)) * SHARE_OF
    parts = -(-net.neurons // share)
    wires = wires_of(synapses, net, parts, share)
    shares = [(part,) for part in range(parts)]
    run(sparse.send_kernel(), array_of(ring), start % net.longest, array_of(events), wires, shares=shares)


def _sharing_pays() -> bool:
    return time.monotonic() >= _alone_until


def _share_no_more_for_a_while() -> None:
    global _alone_until
    _alone_until = time.monotonic() + ALONE_SECONDS


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
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_block`."""
    _, batch, neurons = state.shape
    spikes, words, states, _ = out
    steps, cells = len(x), batch * neurons
    final = state.clone()
    kept = cells if chosen is None else len(chosen)
    in_place = states is not None and states.is_contiguous()
    trace = state.new_empty(len(state), 0 if states is None or in_place else steps, kept)
    if states is not None and in_place:
        trace = states.view(-1, steps, kept)
    ask_for_huge_pages(spikes)
    most = parameters_of("recurrent_forward", state.dtype, neurons, batch)["threads"]
    work = 4 * steps * cells
    together = min(net.shortest, sparse.MOST_TOGETHER)
    sources = strided_bytes(x.reshape(steps, -1))
    after = (
        array_of(ring),
        start,
        *constants_arrays(net.constants),
        array_of_rows(final.view(-1, cells)),
        strided_bytes(None if spikes is None else spikes.view(steps, cells)),
        bits_of_one(torch.uint8 if spikes is None else spikes.dtype),
        rows_if_given(None if words is None else words.view(-1, cells), torch.int32),
        array_of_rows(trace),
        array_if_given(chosen, 1, torch.int64),
        net.jump_first,
        holds(len(state)),
    )

    def steps_of_rows(rows: list[tuple[int, int]], since: int, parts: int, share: int) -> int:
        """The steps that are done, of the rows that some threads have, or of the one that ``parts`` threads share."""
        inputs, wires = wires_of(net.inputs, net, parts, share), wires_of(net.recurrent, net, parts, share)
        # numbers of their own are worth it to be brought into one form before they are read many times
        prepare = max(wires.weight_of, wires.delay_of) == 2 and len(wires.targets) <= PREPARED_AT_MOST
        prepare &= batch * steps >= MANY_STEPS and bits_for_places(net) <= PLACE_BITS
        links = links_of(net, wires, share) if prepare else NO_LINKS
        lists = sparse.shared_lists(share, parts, together) if parts > 1 else None
        shares = [
            (*some, part, parts, sparse.scratch(inputs, x.shape[-1], final.numpy().dtype, share, parts, together, lists))
            for some in rows
            for part in range(parts)
        ]
        done = np.zeros(1, np.int64)
        middle = inputs, rows_of_events(net, x, drive), array_if_given(drive, 4, state.dtype), wires, links
        kernel = sparse.block_kernel()
        run(kernel, sources, *middle, *after, since, steps, together, share, LONG_WAITS, done, shares=shares, meet=parts > 1)
        return int(done[0])

    threads = min(count_threads(most, work), neurons * together // MIN_STEPS_TO_MEETING)
    rows = split_rows(batch, work, most)
    if len(rows) < threads and batch < torch.get_num_threads() and _sharing_pays():
        share = -(-neurons // (threads * SHARE_OF)) * SHARE_OF
        for row in range(batch):
            done = steps_of_rows([(row, row + 1)], 0, -(-neurons // share), share) if _sharing_pays() else 0
            if done < steps:
                steps_of_rows([(row, row + 1)], done, 1, neurons)
            if 0 < done < steps:
                _share_no_more_for_a_while()
    else:
        steps_of_rows(rows, 0, 1, neurons)
    if states is not None and not in_place:
        states.copy_(trace.view(states.shape))
    return final
