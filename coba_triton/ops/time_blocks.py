"""Recurrent sequences: a loop over time blocks, forward and back, around a backend's kernels.

Forward: the input drive of a block is one projection; then either one event-driven launch for the whole block, or a
matrix product and a pointwise kernel a step where neurons fire often. Training keeps the state before every block (of
about ``sqrt(T)`` steps) and one bit a spike.

Backward, block by block: with the spikes known, both drives of a block are projections and its replay is feed-forward;
only what the recurrence sends back is sequential.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..neuron.records import Sums
from .call import DIFFERENTIABLE, Asked, Call, Gradients, Incoming, Network, Outputs, Saved, Sweep, split
from .constants import constants_gradient
from .spikes import WORD_BITS, pack_spikes, word_count

P = ParamSpec("P")
R = TypeVar("R")

PATHS = ("auto", "events", "sliced", "dense")
# Scratch of one block in bytes. Where the kernels run on a GPU, the host takes about a millisecond for every block.
SCRATCH_BYTES = 2**26
SCRATCH_BYTES_OF_A_GPU = 2**28
# Numbers for each neuron and step of a block: its two drives, and in training what is computed again as well.
DRIVES, COMPUTED_AGAIN = 2, 16
SUM_BYTES = 16  # of the two sums of 64 bits of which sparse synapses of inputs make the drives
# Numbers for each source of input and step on a GPU: a list of those that are not 0, and in training two tensors like x.
LISTED, LISTED_AGAIN = 1, 3


def choose_block_steps(
    block_steps: int | None, steps: int, cells: int, sources: int, like: Tensor, train: bool, besides: int = 0
) -> int:
    """Steps in a block, a multiple of 32: what was asked for, else so many that the scratch is bounded.

    In training the state before each block is kept. Blocks have ``sqrt(T)`` steps then on a CPU, and at least so many on a
    GPU. The scratch is ``like`` a tensor, in its dtype and on its device.

    Args:
        block_steps: what was asked for, or None.
        steps: T.
        cells: neurons of all batch rows.
        sources: inputs of all batch rows. Where processes exchange spikes, all of their neurons as well.
        like: a tensor of the compute dtype.
        train: whether a backward goes through the same blocks.
        besides: numbers that a call on a GPU has for each neuron and step besides.
    """
    if block_steps is None:
        itemsize, on_cpu = like.element_size(), like.device.type == "cpu"
        scratch = SCRATCH_BYTES if on_cpu else SCRATCH_BYTES_OF_A_GPU
        numbers = (COMPUTED_AGAIN if train else DRIVES) * cells
        if not on_cpu:
            numbers += besides * cells + (LISTED_AGAIN if train else LISTED) * sources
        bounded = scratch // torch.sym_max(1, numbers * itemsize)
        root = torch.sym_int(torch.sym_float(steps) ** 0.5) + 1 if train else 1
        block_steps = root if train and on_cpu else torch.sym_max(root, torch.sym_min(steps, bounded))
        if train:
            block_steps = even_block_steps(None, steps, count_blocks(word_count(block_steps) * WORD_BITS, steps))
    return word_count(block_steps) * WORD_BITS


def count_blocks(block_steps: int, steps: int) -> int:
    """Blocks of a run, at least one."""
    blocks: int = torch.sym_max(1, (steps + block_steps - 1) // block_steps)  # no block has to be provably none
    return blocks


def even_block_steps(block_steps: int | None, steps: int, blocks: int) -> int:
    """Steps in each of so many blocks: what was asked for, else as even as words of 32 steps allow.

    So a backward finds the blocks of its forward again, whatever rows of the batch each of both had.
    """
    if block_steps is None:
        block_steps = torch.sym_max(1, (steps + blocks - 1) // blocks)
    return word_count(block_steps) * WORD_BITS


def project(weights: Tensor, sources: Tensor) -> Tensor:
    """``relu(W) x`` and ``relu(-W) x`` for sources ``[..., B, K]``, as matrix products: ``[2, ..., B, N]``."""
    rows = sources.reshape(-1, sources.shape[-1]).to(weights.dtype)
    drive = torch.stack([rows @ torch.relu(weights).t(), rows @ torch.relu(-weights).t()])
    return torch.reshape(drive, (2, *sources.shape[:-1], weights.shape[0]))


def spikes_before(net: Network, words: Tensor, last: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """What each step of a block saw of the one before it, ``[T, B, N]``; ``last``: the z or word before the block."""
    before = net.backend.unpack(words, steps, dtype).roll(1, 0)
    before[0] = (last >> (WORD_BITS - 1)) & 1 if last.dtype == torch.int32 else last
    return before


def step_by_step(net: Network, drive: Tensor, z: Tensor, state: Tensor, spikes: Tensor, states: Tensor | None) -> Tensor:
    """A pointwise kernel a step, after a matrix product or, with an exchange, a sum over the events of all processes.

    Fills ``spikes [t, B, N]``, which must be what the drive can be computed from, and returns the state.
    """
    steps, batch, neurons = drive.shape[1:]
    if net.exchange is None:
        weights = split(net.recurrent_weights).t().contiguous()
    for t in range(steps):
        if net.exchange is None:
            recurrent = (z @ weights).view(batch, 2, neurons).transpose(0, 1).contiguous()
        else:  # what is before a block need not be 0 or 1
            sources = net.exchange.gather_spikes(z) if t else net.exchange.gather(z)
            recurrent = net.backend.project_events(sources, net.recurrent_rows)
        z = spikes[t]
        state = net.backend.recurrent_step(
            net, drive[:, t].contiguous(), recurrent, state, z, None if states is None else states[:, t]
        )
    return state


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Matrix products of a sequence stay in its dtype, whatever autocast says."""

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        network: Any = args[0]
        with torch.autocast(network.constants.device.type, enabled=False):
            return function(*args, **options)

    return run


@without_autocast
def forward(
    net: Network,
    x: Tensor,
    z: Tensor,
    state: Tensor,
    out: Outputs,
    block_steps: int,
    path: str,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Simulate ``x [T, B, I]`` from the spikes ``z [B, N]`` and the ``state [F, B, N]``; returns what both are at the end.

    Fill the outputs that are there; a checkpoint is the state before a block. With ``chosen [K]``, ascending indices into
    the neurons of all rows, the recorded states are theirs alone, ``[F, T, K]``.
    """
    events = net.backend.is_sparse(x)
    dense = path == "dense"
    for number, start in enumerate(range(0, x.shape[0], block_steps)):
        here = slice(start, min(start + block_steps, x.shape[0]))
        steps = here.stop - start
        if out.checkpoints is not None:
            out.checkpoints[number] = state
        drive = None if events else project(net.input_weights, x[here])
        stepwise = dense or net.exchange is not None
        scratch = torch.uint8 if net.exchange or not dense else z.dtype
        spikes = z.new_empty(steps, *z.shape, dtype=scratch) if out.spikes is None or stepwise else out.spikes[here]
        words = None if out.words is None else words_of(out.words, start, steps)
        states = None if out.states is None else out.states[:, here]
        if stepwise:
            if drive is None:
                drive = net.backend.project_events(x[here], net.input_rows)
            every = states if chosen is None else state.new_empty(len(state), steps, *z.shape)
            state = step_by_step(net, drive, z, state, spikes, every)
            if chosen is not None and states is not None and every is not None:
                states.copy_(every.flatten(2)[..., chosen])
            if out.spikes is not None:
                out.spikes[here] = spikes
            if words is not None:
                words.copy_(pack_spikes(spikes))
        else:
            filled = Outputs(spikes, words, states)
            sliced = None if path == "auto" else path == "sliced"
            state = net.backend.recurrent_block(net, x[here], drive, z, state, filled, sliced, chosen)
        z = spikes[-1].to(net.dtype, copy=True)
        if path == "auto" and here.stop < x.shape[0]:
            dense = net.backend.fires_often(spikes)
    return z, state


def words_of(words: Tensor, start: int, steps: int) -> Tensor:
    """The words of the block that begins with step ``start``."""
    return words[start // WORD_BITS : start // WORD_BITS + word_count(steps)]


@without_autocast
def backward(
    net: Network, x: Tensor, z: Tensor, saved: Saved, grads: Incoming, grad_z: Tensor | None, call: Call, asked: Asked
) -> Gradients:
    """Go back through :func:`forward`, from the gradients by its outputs and ``grad_z [B, N]``, that by its last spikes."""
    steps, batch, neurons = x.shape[0], *z.shape
    saved, grads = saved.split(asked.fields), grads.ready()
    block_steps = even_block_steps(call.block_steps, steps, saved.checkpoints.shape[0])
    sweep = _begin(net, z, grads, grad_z, call.method, asked)
    split_input = split(net.input_weights) if asked.x else None

    def sums_of(weights: Tensor, needed: bool) -> Tensor:
        return weights.new_zeros(asked.samples if needed else 0, weights.shape[1], 2 * neurons)

    input_sums = sums_of(net.input_weights, asked.input_weights)
    recurrent_sums = sums_of(net.recurrent_weights, asked.recurrent_weights)
    grad_x = x.new_zeros(x.shape if asked.x else (0, *x.shape[1:]))
    input_events = net.backend.is_sparse(x)
    on_cpu = z.device.type == "cpu"  # bytes are read faster there; the spikes before the first step are any numbers
    room = z.new_empty(min(block_steps, steps), batch, 2 * neurons)  # for all blocks: new pages cost as much as to fill them
    for start in reversed(range(0, steps if z.numel() else 0, block_steps)):
        here = slice(start, min(start + block_steps, steps))
        words = words_of(saved.words, start, here.stop - start)
        sent, last = words, saved.words[start // WORD_BITS - 1] if start else z
        if net.exchange is not None:
            sent, last = net.exchange.gather(sent), net.exchange.gather(last)
        before = spikes_before(net, sent, last, here.stop - start, torch.uint8 if start and on_cpu else net.dtype)
        events = net.backend.is_sparse(before)
        recurrent_drive = None if events else project(net.recurrent_weights, before)
        if events and net.exchange is not None:
            recurrent_drive = net.backend.project_events(before, net.recurrent_rows)
        drive = None if input_events else project(net.input_weights, x[here])
        state = saved.checkpoints[start // block_steps]
        adjoints = room[: here.stop - start]
        net.backend.recurrent_backward_block(
            net, x[here], drive, before, recurrent_drive, state, words, sweep, start, adjoints
        )
        for sums, sources, sparse in ((recurrent_sums, before, events), (input_sums, x[here], input_events)):
            parts = (tensor.tensor_split(asked.samples, 1) for tensor in (sources, adjoints))
            for own, sent_by, received in zip(sums, *parts, strict=False):
                net.backend.add_products(own, sent_by.flatten(0, 1), received.flatten(0, 1), sparse)
        if split_input is not None:
            grad_x[here] = (adjoints.flatten(0, 1) @ split_input).view(grad_x[here].shape)

    no_sums = z.new_zeros(len(Sums._fields), 0)
    return Gradients(
        grad_x,
        sweep.lam_z,
        sweep.lam,
        by_sign(net.input_weights, input_sums),
        by_sign(net.recurrent_weights, recurrent_sums),
        constants_gradient(no_sums if sweep.sums is None else sweep.sums, net.constants),
    )


def by_sign(weights: Tensor, sums: Tensor) -> Tensor:
    """The gradient by ``weights [N, K]``, from the sums ``[..., K, 2 N]`` over the sources of both signs."""
    rows = weights.t().contiguous()  # everything in the order of the sums: memory is read in its order
    excitatory, inhibitory = sums.chunk(2, -1)
    chosen = excitatory * rows.sign().clamp_(min=0)
    chosen.addcmul_(inhibitory, rows.sign().clamp_(max=0))
    if chosen.device.type != "cpu":
        return chosen.mT.contiguous()
    found = chosen.new_empty(*sums.shape[:-2], *weights.shape)
    for to, matrix in zip(found, chosen, strict=True):  # a CPU transposes one matrix in blocks, several number by number
        to.copy_(matrix.t())
    return found


def _begin(net: Network, z: Tensor, grads: Incoming, grad_z: Tensor | None, method: str, asked: Asked) -> Sweep:
    """The sweep back, before it enters the last block. A field of the state without a derivative keeps a gradient of 0."""
    lam = z.new_zeros(asked.fields, *z.shape)
    if grads.final is not None:
        lam[:DIFFERENTIABLE] += grads.final[:DIFFERENTIABLE]
    if grads.states is not None:
        lam[:DIFFERENTIABLE] += grads.states[:DIFFERENTIABLE, -1]
    lam_z = torch.zeros_like(z, memory_format=torch.contiguous_format)
    if grad_z is not None:
        lam_z += grad_z
    sums = z.new_zeros(len(Sums._fields), z.numel()) if asked.constants else None
    spikes = None if grads.spikes is None else grads.spikes.flatten(1)
    return Sweep(method, spikes, grads.states, lam, lam_z, sums, {})
