"""Recurrent networks that outgrow one device: every process of a group owns some of the neurons.

A process (rank) holds the rows of both weight matrices, the parameters and the state of its own neurons: they are as many
as ``torch.chunk`` gives it, in order. In every step it packs its spikes to bits, all ranks gather those of all, and each
sums the synapses of the neurons that spiked, ascending by source as one process does. So the bits of the result do not
depend on the number of ranks, on any weights.

The device of the tensors must be one that the group's backend serves: ``gloo`` on the CPU, ``nccl`` on GPUs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .backend import reference
from .backend.choose import choose_backend, launcher
from .functional import (
    check_sequence,
    default_spike_dtype,
    format_spikes,
    initial_recurrent_state,
    kernel_input,
    own_fields,
    run_reference,
)
from .neuron.records import CobaLIFParameters, RecurrentState, numbers_of, recurrent_state
from .ops import time_blocks, validation
from .ops.call import Asked, Call, Incoming, Network, Saved, Weights
from .ops.constants import constants_table, derive_constants
from .ops.operators import recurrent_forward
from .ops.spikes import pack_spikes
from .ops.validation import SpikeDtype
from .ops.wiring import is_sparse

Group = Any  # torch.distributed.ProcessGroup, which a build of torch without torch.distributed has not


def owned_neurons(neurons: int, group: Group = None) -> slice:
    """The neurons that this rank owns: ``ceil(N / ranks)`` a rank, in order, the last ones fewer.

    That is how ``torch.chunk`` and DTensor's ``Shard(0)`` divide the rows of a matrix.

    Args:
        neurons: N of the whole network.
        group: of processes, None for all.

    Raises:
        RuntimeError: if there is no process group, or this process is not in it.
        ValueError: if a rank would own none.

    Example:
        >>> own = owned_neurons(4000)  # doctest: +SKIP
        >>> recurrent_weights = all_weights[own]  # doctest: +SKIP
    """
    neurons = validation.check_int(neurons, "neurons")
    ranks = _Ranks(group)
    ranks.divide(neurons)
    return ranks.own


class _Ranks:
    """The processes of a group, and which of the neurons each owns: the exchange of :mod:`coba_triton.ops.time_blocks`."""

    def __init__(self, group: Group) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "coba_triton.distributed needs a process group, and there is none; start the program with torchrun and "
                "call torch.distributed.init_process_group() first"
            )
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError("group must have this process among its ranks, and has not; call it on its own ranks alone")

    def divide(self, neurons: int) -> None:
        """Give every rank its share of the neurons."""
        self.neurons, self.share = neurons, -(-neurons // self.ranks)
        if self.share * (self.ranks - 1) >= neurons:
            raise ValueError(
                f"every rank must own a neuron, and {self.ranks} ranks of ceil({neurons} / {self.ranks}) = {self.share} "
                f"neurons leave the last one without; use {-(-neurons // max(self.share, 1))} ranks"
            )
        bounds = [min(rank * self.share, neurons) for rank in range(self.ranks + 1)]
        self.slices = [slice(*pair) for pair in itertools.pairwise(bounds)]
        self.own = self.slices[self.rank]

    def gather(self, values: Tensor) -> Tensor:
        """``[..., n]`` of every rank to ``[..., N]`` in all of them."""
        padded = values.new_zeros(*values.shape[:-1], self.share)
        padded[..., : values.shape[-1]] = values
        return self._join(self._swap([padded] * self.ranks))

    def gather_spikes(self, spikes: Tensor) -> Tensor:
        """:meth:`gather` of 0 and 1, eight neurons in a byte: ``[..., n]`` to uint8 ``[..., N]``."""
        padded = torch.zeros(*spikes.shape[:-1], -(-self.share // 8) * 8, dtype=torch.uint8, device=spikes.device)
        padded[..., : spikes.shape[-1]] = spikes
        every = _unpack(self._swap([_pack(padded)] * self.ranks))
        return self._join(every[..., : self.share])

    def add_up(self, parts: Tensor) -> Tensor:
        """The sum over the ranks, in their order, of ``[..., N]``, of which each keeps its own ``[..., n]``."""
        every = self._swap([parts[..., each].contiguous() for each in self.slices])
        total = every[0]
        for other in every[1:]:
            total = total + other
        return total

    def _swap(self, parts: Sequence[Tensor]) -> Tensor:
        """Give every rank its part, and return what all have for this one, ``[ranks, ...]``.

        In messages, which ``nccl`` takes as one: ``gloo`` has no collective that adds up parts, and is slower in others.
        """
        mine = parts[self.rank]
        every = mine.new_empty(self.ranks, *mine.shape)
        every[self.rank] = mine
        messages = []
        for shift in range(1, self.ranks):
            to, source = (self.rank + shift) % self.ranks, (self.rank - shift) % self.ranks
            messages.append(dist.P2POp(dist.isend, parts[to], group=self.group, group_peer=to))
            messages.append(dist.P2POp(dist.irecv, every[source], group=self.group, group_peer=source))
        for message in dist.batch_isend_irecv(messages) if messages else ():
            message.wait()
        return every

    def _join(self, every: Tensor) -> Tensor:
        return every.movedim(0, -2).flatten(-2)[..., : self.neurons]

    def agree(self, call: dict[str, Any], error: Exception | None) -> None:
        """Raise in all ranks where one has an error or another call than the others, before they wait for each other."""
        calls: list[Any] = [None] * self.ranks
        dist.all_gather_object(calls, None if error else call, group=self.group)
        if error is not None:
            raise error
        if None in calls:
            raise RuntimeError(f"rank {calls.index(None)} refused its arguments; its own error says what to change")
        for name in call:
            given = [other[name] for other in calls]
            if any(value != given[0] for value in given):
                raise ValueError(
                    f"{name} must be the same on every rank, got {', '.join(map(str, given))} on ranks 0 to "
                    f"{self.ranks - 1}; make them equal"
                )


def _pack(spikes: Tensor) -> Tensor:
    """Bytes of 0 and 1 ``[..., 8 W]`` to bits ``[..., W]``, bit ``i`` of a byte being neuron ``8 w + i``.

    In the product of eight bytes with the sum of ``2**(7 k)``, k from 1 to 8, bit ``56 + i`` is byte ``i``, and no two terms
    meet in a bit.
    """
    return (spikes.view(torch.int64) * 0x0102040810204080 >> 56 & 0xFF).to(torch.uint8)


def _unpack(packed: Tensor) -> Tensor:
    """The inverse of :func:`_pack`: byte ``i`` takes bit ``i``, and gives 1 if adding 127 sets its highest bit."""
    bits = packed.to(torch.int64) * 0x0101010101010101 & (0x8040201008040201 - 2**64)
    return (bits + 0x7F7F7F7F7F7F7F7F >> 7 & 0x0101010101010101).view(torch.uint8)


class _Gather(torch.autograd.Function):
    """:meth:`_Ranks.gather`, differentiable once."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: _Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.add_up(grad.clone(memory_format=torch.contiguous_format)), None


class _Shared(torch.autograd.Function):
    """What all ranks have in common: as it is, with a gradient that is the sum of those of all ranks."""

    @staticmethod
    def forward(ctx: Any, group: Group, device: torch.device, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.device = group, device
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sums = [grad.to(ctx.device, memory_format=torch.contiguous_format, copy=True) for grad in grads]
        for total in sums:
            dist.all_reduce(total, group=ctx.group)
        return None, None, *(total.to(grad.device) for total, grad in zip(sums, grads, strict=True))


class _TimeBlocks(torch.autograd.Function):
    """The loop over time blocks, forward and back, as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, ranks: _Ranks, call: Call, x: Tensor, z: Tensor, state: Tensor, *weights: Tensor) -> Any:
        net = Network.of(Weights(*weights), call.jump_first, launcher(call.backend), ranks)
        spikes, z_final, final, states, words, checkpoints = recurrent_forward(net, x, z, state, call)
        ctx.call, ctx.net, ctx.fields = call, net, len(state)
        ctx.set_materialize_grads(False)
        if not spikes.is_floating_point():
            ctx.mark_non_differentiable(spikes)
        ctx.save_for_backward(x, z, spikes if call.spike_dtype is None else words, checkpoints)
        return spikes, z_final, final, states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        grad_spikes: Tensor | None,
        grad_z: Tensor | None,
        grad_final: Tensor | None,
        grad_states: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, z, words, checkpoints = ctx.saved_tensors
        needed = x_needed, _, _, input_needed, recurrent_needed, constants_needed = ctx.needs_input_grad[2:]
        asked = Asked(x_needed, input_needed, recurrent_needed, constants_needed, ctx.fields)
        incoming = Incoming(grad_spikes, grad_final, grad_states)
        found = time_blocks.backward(ctx.net, x, z, Saved(words, checkpoints), incoming, grad_z, ctx.call, asked)
        found = found._replace(
            input_weights=found.input_weights.squeeze(0), recurrent_weights=found.recurrent_weights.squeeze(0)
        )
        return None, None, *(grad if need else None for grad, need in zip(found, needed, strict=True))


def coba_lif_integral(
    input_tensor: Tensor,
    state: Any,
    input_weights: Tensor,
    recurrent_weights: Tensor,
    p: Any = CobaLIFParameters(),  # noqa: B008 - an immutable record
    dt: float = 0.001,
    *,
    group: Group = None,
    order: str = "decay_first",
    backend: str = "auto",
    block_steps: int | None = None,
    record_states: bool = False,
    spike_dtype: SpikeDtype = None,
) -> tuple[Tensor, RecurrentState]:
    """This rank's neurons of a recurrent population over a whole sequence; every rank of the group calls it together.

    :func:`coba_triton.coba_lif_integral`, of which it has the equations and, with ``path="events"``, the bits: on any
    weights where the input is events (at most a quarter of it is not 0), else where the sums of weights are exact. Per step
    each rank sends one bit a neuron and batch row.

    Differentiable as that is, for a loss that is the sum of a loss of each rank's neurons: every rank calls ``backward`` on
    its own. The gradients by the input and by single numbers in ``p``, which all ranks share, are the whole ones on every
    rank; all others belong to the rank's neurons.

    Args:
        input_tensor: input spikes or currents, ``[T, *batch, I]``, the same on all ranks.
        state: of the owned neurons, ``[*batch, n]`` a field; None starts at rest.
        input_weights: in uS, ``[n, I]``: the rows of the owned neurons. Neither these nor the recurrent ones may be sparse.
        recurrent_weights: in uS, ``[n, N]``: the rows of the owned neurons, a column for every neuron of the network. Every
            call of a fused backend transposes it, unless it is the transpose of a contiguous matrix.
        p: parameters, see :class:`CobaLIFParameters`; tensors broadcast over the owned neurons.
        dt: time step in ms.
        group: of processes, None for all.
        order: ``decay_first`` or ``jump_first``.
        backend: ``auto``, ``reference``, ``triton`` or ``cpu``.
        block_steps: as in :func:`coba_triton.coba_lif_integral`.
        record_states: return the state of every step, ``[T, *batch, n]`` a field, instead of the final one.
        spike_dtype: as in :func:`coba_triton.coba_lif_feed_forward_integral`.

    Returns:
        Spikes ``[T, *batch, n]`` and the state of the owned neurons.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes do not fit, devices differ, an argument's value is unknown, or ranks disagree.
        RuntimeError: if there is no process group, the backend that was asked for cannot serve, or another rank refused its
            arguments.

    Example:
        >>> own = owned_neurons(4000)  # doctest: +SKIP
        >>> weights = input_weights[own], recurrent_weights[own]  # doctest: +SKIP
        >>> spikes, state = coba_lif_integral(x, None, *weights, dt=0.1)  # doctest: +SKIP
    """
    ranks = _Ranks(group)

    def prepare(x: Tensor, p: Any) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        square = recurrent_weights[:, ranks.own]  # the checks are those of one process with these neurons
        initial = initial_recurrent_state(x, state, input_weights, square, p, dt, x.shape[1:])
        return x, initial, (input_weights.to(initial.dtype), recurrent_weights.to(initial.dtype))

    call: dict[str, Any] = {}
    error = None
    try:
        block_steps = check_sequence(input_tensor, "[T, *batch, I]", 2, order, block_steps, record_states, spike_dtype)
        dt = validation.check_dt(dt)
        _check_rows(ranks, input_weights, recurrent_weights)
        x, initial, weights = prepare(input_tensor, p)
        backend = choose_backend(backend, x.device)
        tracked = (x, initial, *weights, *(getattr(p, name) for name in validation.LEARNABLE))
        train = torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in tracked)
        shared = _shared(x, p) if train else {}
        call = {
            "the number of neurons": ranks.neurons,
            "[T, *batch]": list(x.shape[:-1]),
            "the dtype of the state": initial.dtype,
            "order": order,
            "backend": backend,
            "block_steps": block_steps,
            "whether anything requires a gradient": train,
            "which of input_tensor and the numbers in p require a gradient": list(shared),
        }
    except (TypeError, ValueError, RuntimeError) as raised:
        error = raised
    ranks.agree(call, error)
    if shared:
        copies = _Shared.apply(group, x.device, *shared.values())  # type: ignore[no-untyped-call]  # torch has no types here
        values = dict(zip(shared, copies, strict=True))
        numbers = {name: values.get(name, value) for name, value in numbers_of(p).items()}
        p = CobaLIFParameters(**numbers, method=p.method)
        x, initial, weights = prepare(values.get("input_tensor", x), p)

    z = initial[0]
    default = default_spike_dtype(x, z.dtype, (input_weights, recurrent_weights))
    jump_first = order == "jump_first"
    if backend == "reference":
        c = derive_constants(p, dt, z.dtype, x.device)
        w = reference.SplitWeights.of(*weights)

        def step(x: Tensor, s: Any) -> reference.Step:
            every = _Gather.apply(s.z, ranks)  # type: ignore[no-untyped-call]  # torch has no types here
            return reference.recurrent_step(x, every, s, w, c, jump_first, p.method)

        rows, final = run_reference(step, x.to(z.dtype), recurrent_state(*initial.unbind()), record_states)
        return format_spikes(rows, z, spike_dtype, default), final

    steps, neurons = len(x), z.shape
    z = z.reshape(-1, neurons[-1])
    state = initial[1:].reshape(len(initial) - 1, *z.shape).contiguous()
    # recorded spikes are part of the differentiable state: they take their format afterwards
    written = z.dtype if record_states else None if spike_dtype == "bits" else spike_dtype or default
    block = time_blocks.choose_block_steps(block_steps, steps, len(z) * ranks.share, z.element_size(), train)
    plan = Call(backend, jump_first, p.method, written, record_states, block, "events", save=train)
    x = kernel_input(x, z.dtype).reshape(steps, len(z), x.shape[-1])
    spikes, z, state, states = _TimeBlocks.apply(  # type: ignore[no-untyped-call]  # torch has no types here
        ranks, plan, x, z, state, *weights, constants_table(p, dt, z.dtype, x.device, neurons)
    )
    spikes = spikes.reshape(len(spikes), *neurons)
    if record_states:
        trace = recurrent_state(spikes, *own_fields(states, (steps, *neurons), len(states)))
        return pack_spikes(spikes) if spike_dtype == "bits" else spikes.to(spike_dtype or default), trace
    return spikes, recurrent_state(*own_fields(z, neurons, 1), *own_fields(state, neurons, len(state)))


def _check_rows(ranks: _Ranks, input_weights: Any, recurrent_weights: Any) -> None:
    """Both matrices have a row for each of the neurons that this rank owns."""
    for name, weights in (("input_weights", input_weights), ("recurrent_weights", recurrent_weights)):
        if is_sparse(weights, None):
            got = str(weights.layout) if isinstance(weights, Tensor) else "Synapses"
            raise TypeError(
                f"{name} must be dense where ranks share the neurons, got {got}; give the dense rows that this rank owns, "
                "or run the network in one process with coba_triton.coba_lif_integral"
            )
        if not isinstance(weights, Tensor) or weights.dim() != 2:
            got = f"shape {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"{name} must be a matrix, the rows of the neurons that this rank owns, got {got}")
    neurons = recurrent_weights.shape[1]
    ranks.divide(neurons)
    rows = range(neurons)[ranks.own]
    for name, weights in (("input_weights", input_weights), ("recurrent_weights", recurrent_weights)):
        if len(weights) != len(rows):
            raise ValueError(
                f"{name} must be the {len(rows)} rows {rows.start} to {rows.stop - 1} on rank {ranks.rank} of "
                f"{ranks.ranks}, as recurrent_weights has a column for each of {neurons} neurons, got "
                f"{list(weights.shape)}; take the rows owned_neurons({neurons})"
            )


def _shared(x: Tensor, p: Any) -> dict[str, Tensor]:
    """What all ranks have in common and takes a gradient: the input, and single numbers among the parameters."""
    numbers = numbers_of(p)
    single = {name: value for name, value in numbers.items() if isinstance(value, Tensor) and value.dim() == 0}
    return {name: value for name, value in {"input_tensor": x, **single}.items() if value.requires_grad}
