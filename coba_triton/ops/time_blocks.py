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
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from ..neuron.records import Kept, State, Sums
from .constants import constants_gradient
from .spikes import WORD_BITS, pack_spikes, unpack_spikes, word_count

P = ParamSpec("P")
R = TypeVar("R")

PATHS = ("auto", "events", "sliced", "dense")
# Scratch for the drive of one inference block, in bytes.
DRIVE_BYTES = 2**26


class Exchange(Protocol):
    """How processes that own the ``n`` rows of some of ``N`` neurons each go on together."""

    def gather(self, values: Tensor) -> Tensor:
        """``[..., n]`` of every process to ``[..., N]`` in all of them."""

    def gather_spikes(self, spikes: Tensor) -> Tensor:
        """:meth:`gather` of 0 and 1."""

    def add_up(self, parts: Tensor) -> Tensor:
        """The sum over the processes of ``[..., N]``, of which each keeps its own ``[..., n]``."""


class Network(NamedTuple):
    """What is the same in all blocks: weights, constants, order of the step, kernels.

    The weights are ``[N, I]`` and ``[N, N]``; ``input_rows`` and ``recurrent_rows`` are their transposes, with the
    synapses of a source side by side. With an ``exchange`` they are the rows of the neurons that this process owns.
    ``synapses``: what the kernels have made of both rows, for as many steps as they serve.
    """

    input_weights: Tensor
    recurrent_weights: Tensor
    input_rows: Tensor
    recurrent_rows: Tensor
    constants: Tensor
    jump_first: bool
    kernels: ModuleType
    synapses: tuple[Any, Any]
    exchange: Exchange | None = None

    @classmethod
    def of(
        cls,
        input_weights: Tensor,
        recurrent_weights: Tensor,
        constants: Tensor,
        jump_first: bool,
        kernels: ModuleType,
        exchange: Exchange | None = None,
        uses: int = 0,
    ) -> Network:
        """``uses``: steps of all batch rows that the network serves; for few, the kernels prepare nothing."""
        rows = input_weights.t().contiguous(), recurrent_weights.t().contiguous()
        synapses = kernels.synapses(rows[0], uses), kernels.synapses(rows[1], uses)
        constants = constants.contiguous()
        return cls(input_weights, recurrent_weights, *rows, constants, jump_first, kernels, synapses, exchange)

    @property
    def dtype(self) -> torch.dtype:
        return self.constants.dtype


def choose_block_steps(block_steps: int | None, steps: int, cells: int, itemsize: int, train: bool) -> int:
    """Steps in a block, a multiple of 32: what was asked for, else ``sqrt(T)`` in training, else a bounded scratch."""
    if block_steps is None and train:
        block_steps = torch.sym_int(torch.sym_float(steps) ** 0.5) + 1
    elif block_steps is None:
        block_steps = max(1, min(steps, DRIVE_BYTES // max(1, 2 * cells * itemsize)))
    return word_count(block_steps) * WORD_BITS


def split(weights: Tensor) -> Tensor:
    """``[N, K]`` to ``[2 N, K]``: excitatory rows, then the magnitudes of the inhibitory ones."""
    return torch.cat([torch.relu(weights), torch.relu(-weights)])


def project(weights: Tensor, sources: Tensor) -> Tensor:
    """``relu(W) x`` and ``relu(-W) x`` for sources ``[..., B, K]``, as matrix products: ``[2, ..., B, N]``."""
    rows = sources.reshape(-1, sources.shape[-1]).to(weights.dtype)
    drive = torch.stack([rows @ torch.relu(weights).t(), rows @ torch.relu(-weights).t()])
    return torch.reshape(drive, (2, *sources.shape[:-1], weights.shape[0]))


def spikes_before(words: Tensor, last: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """What each step of a block saw of the one before it, ``[T, B, N]``; ``last``: the z or word before the block."""
    before = unpack_spikes(words, steps, dtype).roll(1, 0)
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
            recurrent = net.kernels.project_events(sources, net.recurrent_rows)
        z = spikes[t]
        state = net.kernels.recurrent_step(
            net, drive[:, t].contiguous(), recurrent, state, z, None if states is None else states[:, t]
        )
    return state


def send_back(net: Network, adjoints: Tensor, split_weights: Tensor, lam_z: Tensor) -> None:
    """Fill ``lam_z [B, N]``, the gradient by the spikes of a step, from the ``adjoints [B, 2 N]`` of the next one."""
    if lam_z.device.type == "cpu":  # MKL takes the weights in rows of the result up to twice as fast
        product = torch.mm(split_weights.t(), adjoints.t()).t()
    else:
        product = torch.mm(adjoints, split_weights, out=lam_z if net.exchange is None else None)
    if net.exchange is not None:
        product = net.exchange.add_up(product.contiguous())
    if product is not lam_z:
        lam_z.copy_(product)


def _without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Matrix products of a sequence stay in its dtype."""

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        network: Any = args[0]
        with torch.autocast(network.constants.device.type, enabled=False):
            return function(*args, **options)

    return run


@_without_autocast
def forward(
    net: Network,
    x: Tensor,
    z: Tensor,
    state: Tensor,
    spikes: Tensor | None,
    words: Tensor | None,
    states: Tensor | None,
    checkpoints: Tensor | None,
    block_steps: int,
    path: str,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill ``spikes [T, B, N]``, ``words``, ``states [3, T, B, N]`` and ``checkpoints``; returns the last z and state.

    With ``chosen [K]``, ascending indices into the neurons of all rows, ``states`` are theirs alone, ``[3, T, K]``.
    """
    events = net.kernels.is_sparse(x)
    dense = path == "dense"
    for number, start in enumerate(range(0, x.shape[0], block_steps)):
        here = slice(start, min(start + block_steps, x.shape[0]))
        steps = here.stop - start
        if checkpoints is not None:
            checkpoints[number] = state
        drive = None if events else project(net.input_weights, x[here])
        stepwise = dense or net.exchange is not None
        scratch = torch.uint8 if net.exchange or not dense else z.dtype
        block_spikes = z.new_empty(steps, *z.shape, dtype=scratch) if spikes is None or stepwise else spikes[here]
        block_words = None if words is None else words[start // WORD_BITS : start // WORD_BITS + word_count(steps)]
        block_states = None if states is None else states[:, here]
        if stepwise:
            if drive is None:
                drive = net.kernels.project_events(x[here], net.input_rows)
            every = block_states if chosen is None else state.new_empty(len(state), steps, *z.shape)
            state = step_by_step(net, drive, z, state, block_spikes, every)
            if chosen is not None and states is not None and every is not None:
                states[:, here] = every.flatten(2)[..., chosen]
            if spikes is not None:
                spikes[here] = block_spikes
            if block_words is not None:
                block_words.copy_(pack_spikes(block_spikes))
        else:
            state = net.kernels.recurrent_block(
                net, x[here], drive, z, state, block_spikes, block_words, block_states, path == "sliced", chosen
            )
        z = block_spikes[-1].to(net.dtype, copy=True)
        if path == "auto" and here.stop < x.shape[0]:
            dense = net.kernels.fires_often(block_spikes)
    return z, state


def kept_count(fields: int) -> int:
    """How many numbers the adjoint of a step reads of it, if the state has so many fields."""
    return len(Kept._fields) + fields - len(State._fields)


class Gradients(NamedTuple):
    """``x [T, B, I]``, ``z [B, N]``, ``state [3, B, N]``, ``constants`` as the table of them, and a sum of each sample by
    the weights, ``[S, N, I]`` and ``[S, N, N]``; what nobody asked for has a first axis (``constants``: a second) of 0.
    """

    x: Tensor
    z: Tensor
    state: Tensor
    input_weights: Tensor
    recurrent_weights: Tensor
    constants: Tensor


@_without_autocast
def backward(
    net: Network,
    x: Tensor,
    z: Tensor,
    words: Tensor,
    checkpoints: Tensor,
    block_steps: int,
    method: str,
    grad_spikes: Tensor | None,
    grad_z: Tensor | None,
    grad_final: Tensor | None,
    grad_states: Tensor | None,
    samples: int,
    x_grad: bool,
    input_weights_grad: bool,
    recurrent_weights_grad: bool,
    constants_grad: bool,
) -> Gradients:
    """Gradients from those by the spikes ``[T, B, N]``, last z, last state and recorded states ``[3, T, B, N]``, if any.

    The rows of the batch are ``samples`` groups, each with weight gradients of its own.
    """
    steps, batch, neurons = x.shape[0], *z.shape
    grad_spikes = None if grad_spikes is None else grad_spikes.flatten(1)
    grad_states = grad_states.contiguous() if grad_states is not None and grad_states.numel() else None
    fields = checkpoints.shape[1]
    lam = z.new_zeros(fields, batch, neurons)
    if grad_final is not None:
        lam += grad_final
    if grad_states is not None:
        lam += grad_states[:, -1]
    lam[len(State._fields) :] = 0
    lam_z = torch.zeros_like(z, memory_format=torch.contiguous_format)
    if grad_z is not None:
        lam_z += grad_z
    split_input, split_recurrent = split(net.input_weights), split(net.recurrent_weights)
    if z.device.type == "cpu":
        split_recurrent = split_recurrent.t().contiguous().t()  # for send_back

    def sums_of(weights: Tensor, needed: bool) -> Tensor:
        return weights.new_zeros(samples if needed else 0, weights.shape[1], 2 * neurons)

    input_sums = sums_of(net.input_weights, input_weights_grad)
    recurrent_sums = sums_of(net.recurrent_weights, recurrent_weights_grad)
    grad_x = x.new_zeros(x.shape if x_grad else (0, *x.shape[1:]))
    constants_sums = z.new_zeros(len(Sums._fields), z.numel() if constants_grad else 0)
    input_events = net.kernels.is_sparse(x)
    for start in reversed(range(0, steps if z.numel() else 0, block_steps)):
        here = slice(start, min(start + block_steps, steps))
        block_words = words[start // WORD_BITS : start // WORD_BITS + word_count(here.stop - start)]
        sent, last = block_words, words[start // WORD_BITS - 1] if start else z
        if net.exchange is not None:
            sent, last = net.exchange.gather(sent), net.exchange.gather(last)
        before = spikes_before(sent, last, here.stop - start, net.dtype)
        events = net.kernels.is_sparse(before)
        recurrent_drive = None if events else project(net.recurrent_weights, before)
        if events and net.exchange is not None:
            recurrent_drive = net.kernels.project_events(before, net.recurrent_rows)
        trajectory = net.kernels.recurrent_replay(
            net,
            x[here],
            None if input_events else project(net.input_weights, x[here]),
            before,
            recurrent_drive,
            checkpoints[start // block_steps],
            block_words,
            constants_grad,
        )
        adjoints = z.new_empty(here.stop - start, batch, 2 * neurons)
        lam_z = net.kernels.recurrent_sweep(
            net, split_recurrent, trajectory, block_words, start, method, grad_spikes, grad_states, lam, lam_z, adjoints,
            constants_sums if constants_grad else None,
        )  # fmt: skip
        for sums, sources, sparse in ((recurrent_sums, before, events), (input_sums, x[here], input_events)):
            for number_of_sample, own in enumerate(sums):
                rows = slice(number_of_sample * (batch // samples), (number_of_sample + 1) * (batch // samples))
                net.kernels.add_products(own, sources[:, rows].flatten(0, 1), adjoints[:, rows].flatten(0, 1), sparse)
        if x_grad:
            grad_x[here] = (adjoints.flatten(0, 1) @ split_input).view(grad_x[here].shape)

    def by_sign(weights: Tensor, sums: Tensor) -> Tensor:
        excitatory, inhibitory = sums.mT.chunk(2, 1)
        return (weights > 0) * excitatory - (weights < 0) * inhibitory

    return Gradients(
        grad_x,
        lam_z,
        lam,
        by_sign(net.input_weights, input_sums),
        by_sign(net.recurrent_weights, recurrent_sums),
        constants_gradient(constants_sums, net.constants),
    )
