"""Sequences through sparse synapses: a loop over time blocks, forward and back, around a backend's kernels.

What is on its way at the beginning of a block follows from the spikes of the last R steps, where R is the longest delay. The
forward keeps it in a ring of sums that the kernels carry from block to block. The backward makes a ring anew for each block,
from the spikes that were saved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from ..neuron.records import Sums
from .call import (
    DIFFERENTIABLE,
    Asked,
    Call,
    Connections,
    Incoming,
    Outputs,
    Saved,
    SparseNetwork,
    SparseSweep,
    split,
)
from .constants import constants_gradient
from .spikes import WORD_BITS, pack_spikes, unpack_spikes, word_count
from .time_blocks import by_sign, even_block_steps, project, without_autocast, words_of


def input_drive(net: SparseNetwork, x: Tensor, events: bool) -> Tensor | None:
    """The drive ``[2, t, B, N]`` of dense weights.

    None where there are none, or no input, or where the backend sums it up from the ``events`` of ``x`` itself. Processes
    that share the neurons launch a block's kernels many times, for which one projection is made.
    """
    if net.input_weights is None or net.input_rows is None or x.shape[-1] == 0:
        return None
    if not events:
        return project(net.input_weights, x)
    return None if net.exchange is None else net.backend.project_events(x, net.input_rows)


@without_autocast
def forward(
    net: SparseNetwork,
    x: Tensor,
    ring: Tensor,
    state: Tensor,
    out: Outputs,
    block_steps: int,
    start: int = 0,
    chosen: Tensor | None = None,
) -> Tensor:
    """Simulate ``x [T, B, I]`` from the ``ring`` of sums under way and the ``state [F, B, N]``; returns the last state.

    Fill the outputs that are there; a checkpoint is the state before a block. ``start``: steps since the ring was made.
    With ``chosen [K]``, ascending indices into the neurons of all rows, the recorded states are theirs alone, ``[F, T, K]``.
    """
    events = net.input_weights is not None and net.backend.is_sparse(x)
    for number, begin in enumerate(range(0, x.shape[0], block_steps)):
        here = slice(begin, min(begin + block_steps, x.shape[0]))
        if out.checkpoints is not None:
            out.checkpoints[number] = state
        filled = Outputs(
            None if out.spikes is None else out.spikes[here],
            None if out.words is None else words_of(out.words, begin, here.stop - begin),
            None if out.states is None else out.states[:, here],
        )
        drive = input_drive(net, x[here], events)
        block = net.backend.sparse_block if net.exchange is None else _block_of_ranks
        state = block(net, ring, start + begin, x[here], drive, state, filled, chosen)
    return state


def _block_of_ranks(
    net: SparseNetwork,
    ring: Tensor,
    start: int,
    x: Tensor,
    drive: Tensor | None,
    state: Tensor,
    out: Outputs,
    chosen: Tensor | None,
) -> Tensor:
    """:meth:`coba_triton.backend.protocol.Backend.sparse_block` of a process that owns some of the neurons.

    In as many steps as the shortest delay has, no spike arrives that was sent in them. The neurons go through these on their
    own, at once or in two parts. With two, the spikes of one are on their way to the other processes during the other.
    """
    assert net.exchange is not None
    steps, under_way = len(x), deque[tuple[int, Callable[[], Tensor]]]()
    fired = torch.empty(steps, *state.shape[1:], dtype=torch.uint8, device=x.device)
    alone = net.unconnected(net.shortest)

    def deliver() -> None:
        first, sent = under_way.popleft()
        net.backend.sparse_send(net, ring, start + first, sent())

    end = until = 0
    while end < steps:
        if end == until:
            until = min(end + net.shortest, steps)
            window = -(-net.shortest // net.exchange.windows())
        begin, end = end, min(end + window, until)
        here = slice(begin, end)
        while under_way and under_way[0][0] + net.shortest < here.stop:
            deliver()
        filled = Outputs(fired[here], None, None if out.states is None else out.states[:, here])
        own_drive = None if drive is None else drive[:, here].contiguous()
        state = net.backend.sparse_block(alone, ring, start + begin, x[here], own_drive, state, filled, chosen)
        under_way.append((begin, net.exchange.send_spikes(fired[here])))
    while under_way:
        deliver()
    if out.spikes is not None:
        out.spikes.copy_(fired)
    if out.words is not None:
        out.words.copy_(pack_spikes(fired))
    return state


def ring_of(net: SparseNetwork, history: Tensor) -> Tensor:
    """The sums under way after the spikes ``history [R, B, N]`` of the last steps, and of those of other processes."""
    return net.backend.sparse_ring(net, history if net.exchange is None else net.exchange.gather(history))


def bits_of(words: Tensor, first: int, last: int) -> Tensor:
    """The spikes of the steps from ``first`` to ``last`` within one word a neuron, one row a step."""
    bits = torch.arange(first % WORD_BITS, first % WORD_BITS + last - first, dtype=torch.int32, device=words.device)
    return (words >> bits.view(-1, *(1,) * words.dim())) & 1


def last_spikes(history: Tensor, spikes: Tensor, steps: int) -> Tensor:
    """The spikes of the last R steps, from those of the R steps before and ``spikes`` of some more, packed or not."""
    first = max(0, steps - history.shape[0])
    if spikes.dtype == torch.int32:
        # Word by word: PyTorch would index several words with all its threads, which then wait on the cores of ours.
        words = range(first // WORD_BITS, -(-steps // WORD_BITS))
        parts = [bits_of(spikes[word], max(first, word * WORD_BITS), min(steps, (word + 1) * WORD_BITS)) for word in words]
        last = torch.cat(parts) if parts else spikes.new_empty(0, *history.shape[1:])
    else:
        last = spikes[first:steps]
    last = last.to(history.dtype)
    return torch.cat([history[len(last) :], last])


@without_autocast
def backward(
    net: SparseNetwork,
    x: Tensor,
    history: Tensor,
    saved: Saved,
    grads: Incoming,
    grad_history: Tensor | None,
    to: Connections,
    call: Call,
    asked: Asked,
) -> tuple[Tensor, ...]:
    """Go back through :func:`forward`, from the gradients by its outputs and ``grad_history [R, B, N]``."""
    longest, batch, neurons = history.shape
    steps = x.shape[0]
    saved, grads = saved.split(asked.fields), grads.ready()
    block_steps = even_block_steps(call.block_steps, steps, saved.checkpoints.shape[0])
    recurrent = net.recurrent
    new = history.new_zeros
    lam = new(asked.fields, batch, neurons)
    if grads.final is not None:
        lam[:DIFFERENTIABLE] += grads.final[:DIFFERENTIABLE]
    if grads.states is not None:
        lam[:DIFFERENTIABLE] += grads.states[:DIFFERENTIABLE, -1]
    sweep = SparseSweep(
        call.method,
        asked.samples,
        lam,
        new(len(Sums._fields), batch * neurons) if asked.constants else None,
        new(asked.samples, len(recurrent.targets)) if asked.recurrent_weights else None,
        new(asked.samples, len(net.inputs.targets)) if asked.input_weights and net.inputs is not None else None,
        {},
    )
    dense = net.input_weights
    dense_sums = new(asked.samples, x.shape[-1], 2 * neurons) if asked.input_weights and dense is not None else None
    split_input = split(dense) if dense is not None and asked.x else None
    grad_x = x.new_zeros(x.shape if asked.x else (0, *x.shape[1:]))
    input_events = dense is not None and net.backend.is_sparse(x)
    later = new(longest, batch, 2, neurons)
    room = history.new_empty(min(block_steps, steps) + longest, batch, 2, neurons)
    sent = None
    if grads.spikes is not None or grad_history is not None:
        sent = history.new_empty(min(block_steps, steps), batch, neurons)
    empty = steps == 0 or batch * neurons == 0
    for start in reversed(range(0, 0 if empty else steps, block_steps)):
        here = slice(start, min(start + block_steps, steps))
        t = here.stop - start
        words = words_of(saved.words, start, t)
        before = last_spikes(history, saved.words[: word_count(start)], start)
        adjoints = room[: t + longest]
        adjoints[t:] = later
        from_states = None
        if grads.states is not None:  # by the state before each step; the initial state is not recorded
            first = grads.states[:, start - 1 : start] if start else torch.zeros_like(grads.states[:, :1])
            from_states = torch.cat([first, grads.states[:, start : here.stop - 1]], 1)
        by_x = new(t, *x.shape[1:]) if asked.x and net.inputs is not None else None
        block = net.backend.sparse_backward_block if net.exchange is None else _backward_block_of_ranks
        block(
            net,
            ring_of(net, before),
            x[here],
            input_drive(net, x[here], input_events),
            saved.checkpoints[start // block_steps],
            words,
            None if sent is None else _spikes_gradient(grads, grad_history, here, steps, sent[:t]),
            from_states,
            sweep,
            adjoints,
            by_x,
        )
        if by_x is not None:
            grad_x[here] = by_x
        rows = adjoints[:t].flatten(2)
        if split_input is not None:
            grad_x[here] = (rows.flatten(0, 1) @ split_input).view(grad_x[here].shape)
        if dense_sums is not None:
            parts = (tensor.tensor_split(asked.samples, 1) for tensor in (x[here], rows))
            for own, sent_by, received in zip(dense_sums, *parts, strict=False):
                net.backend.add_products(own, sent_by.flatten(0, 1), received.flatten(0, 1), input_events)
        later = adjoints[:longest].clone()
    by_history = new(history.shape)
    if not empty and net.exchange is not None:
        by_history = _history_gradient_of_ranks(net, net.exchange.gather(history), later, sweep)
    elif not empty:
        net.backend.sparse_history_gradient(net, history, later, by_history, sweep)
    if grad_history is not None and steps < longest:  # what was in the history at the end as well
        by_history[steps:] += grad_history[: longest - steps]
    return (
        grad_x,
        by_history,
        sweep.lam,
        new(0) if dense is None or dense_sums is None else by_sign(dense, dense_sums),
        _per_weight(sweep.inputs, to.input_values, to.input_indptr, history),
        _per_weight(sweep.recurrent, to.weights, to.indptr, history),
        constants_gradient(new(len(Sums._fields), 0) if sweep.sums is None else sweep.sums, net.constants),
    )


def _backward_block_of_ranks(
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
    """:meth:`coba_triton.backend.protocol.Backend.sparse_backward_block` of a process that owns some of the neurons.

    In as many steps as the shortest delay has, no spike arrives that was sent in them. So the neurons go back through these
    on their own, and then processes exchange what the spikes of the steps before are worth.
    """
    assert net.exchange is not None
    steps, longest, window = len(x), net.longest, net.shortest
    own = unpack_spikes(words, steps, torch.uint8)
    spikes = net.exchange.gather_spikes(own)
    alone = net.unconnected(window)
    begins = range(0, steps, window)
    before, arriving = [], []
    for begin in begins:
        here = slice(begin, min(begin + window, steps))
        slots = torch.arange(here.start, here.stop, device=ring.device) % longest
        before.append(state)
        arriving.append(ring.index_select(1, slots))
        own_drive = None if drive is None else drive[:, here].contiguous()
        state = net.backend.sparse_block(alone, ring, begin, x[here], own_drive, state, Outputs())
        net.backend.sparse_send(net, ring, begin, torch.nonzero(spikes[here].reshape(-1)).flatten())
    for begin, first, sums in zip(reversed(begins), reversed(before), reversed(arriving), strict=True):
        here = slice(begin, min(begin + window, steps))
        count = here.stop - begin
        later = adjoints[here.stop : here.stop + longest]
        received = _history_gradient_of_ranks(net, spikes[here].to(net.dtype), later, sweep)
        if grad_spikes is not None:
            received = grad_spikes[here] + received
        found = adjoints.new_zeros(2 * count, *adjoints.shape[1:])
        net.backend.sparse_backward_block(
            alone._replace(shortest=count, longest=count),
            sums,
            x[here],
            None if drive is None else drive[:, here].contiguous(),
            first,
            pack_spikes(own[here]),
            received,
            None if grad_states is None else grad_states[:, here].contiguous(),
            sweep._replace(recurrent=None),
            found,
            None if grad_x is None else grad_x[here],
        )
        adjoints[here] = found[:count]


def _history_gradient_of_ranks(net: SparseNetwork, history: Tensor, adjoints: Tensor, sweep: SparseSweep) -> Tensor:
    """The gradient by the own ones of the spikes ``history [t, B, K]`` of all processes, which sum up what each finds."""
    assert net.exchange is not None
    worth = history.new_empty(history.shape)
    net.backend.sparse_history_gradient(net, history, adjoints.contiguous(), worth, sweep)
    return net.exchange.add_up(worth)


def _spikes_gradient(grads: Incoming, grad_history: Tensor | None, here: slice, steps: int, room: Tensor) -> Tensor | None:
    """The gradient by the spikes of a block, of which the last ones are in the history at the end as well.

    All blocks have the same ``room [t, B, N]`` for it: new pages of memory would cost as much as to fill them.
    """
    by_spikes = None if grads.spikes is None else grads.spikes[here]
    if by_spikes is not None and by_spikes.stride(0) == 0 and grad_history is None:
        return by_spikes[:1].to(room.dtype).expand(by_spikes.shape)  # the same in all steps: one of them is enough
    if by_spikes is not None and not (by_spikes.is_contiguous() and by_spikes.dtype == room.dtype):
        by_spikes = room.copy_(by_spikes)
    if grad_history is None:
        return by_spikes
    first = steps - len(grad_history)  # the step of the first row of the history
    begin = max(here.start, first)
    if begin < here.stop:
        by_spikes = room.zero_() if by_spikes is None else room.copy_(by_spikes)
        by_spikes[begin - here.start :] += grad_history[begin - first : here.stop - first]
    return by_spikes


def _per_weight(by_synapse: Tensor | None, weights: Tensor | None, indptr: Tensor | None, like: Tensor) -> Tensor:
    """The gradient ``[samples, *weights.shape]`` by weights that synapses may share, from that by each synapse."""
    if by_synapse is None or weights is None or indptr is None:
        return like.new_empty(0)
    if weights.dim() == 2:
        sums = by_synapse.new_zeros(len(by_synapse), len(weights))
        every = torch.arange(len(weights), device=indptr.device)
        sources = torch.repeat_interleave(every, indptr.diff(), output_size=by_synapse.shape[1])  # so that nothing waits
        return sums.index_add_(1, sources, by_synapse).unsqueeze(2)
    return by_synapse.sum(1, keepdim=True) if weights.shape[0] != by_synapse.shape[1] else by_synapse
