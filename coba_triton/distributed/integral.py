"""The one public function: the neurons of this process over a whole sequence, with dense weights or sparse synapses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import reference
from ..backend.choose import choose_backend, launcher
from ..common.versions import package_version
from ..functional import (
    check_sequence,
    default_spike_dtype,
    format_spikes,
    initial_recurrent_state,
    kernel_input,
    own_fields,
    run_reference,
)
from ..neuron.records import CobaLIFParameters, RecurrentState, numbers_of, recurrent_state
from ..ops import time_blocks, validation
from ..ops.call import Asked, Call, Incoming, Network, Saved, Weights
from ..ops.constants import constants_table, derive_constants
from ..ops.operators import recurrent_forward
from ..ops.spikes import pack_spikes
from ..ops.validation import SpikeDtype
from ..ops.wiring import is_sparse
from .ranks import Gather, Group, Ranks, Shared
from .sparse import SparseRows


class _TimeBlocks(torch.autograd.Function):
    """The loop over time blocks, forward and back, as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, call: Call, x: Tensor, z: Tensor, state: Tensor, *weights: Tensor) -> Any:
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
    weights where the input is events (at most a quarter of it is not 0), else where the sums of weights are exact. With
    sparse synapses it has the bits on any weights; so have its gradients, but for the rounding of sums over the neurons of
    several ranks.

    With dense weights each rank sends one bit a neuron and batch row in every step. With sparse synapses it sends these
    bits, or a list of the neurons that spiked, once or twice in as many steps as the shortest delay has.

    Differentiable as that is, for a loss that is the sum of a loss of each rank's neurons: every rank calls ``backward`` on
    its own. The gradients by the input and by single numbers in ``p``, which all ranks share, are the whole ones on every
    rank; all others belong to the rank's neurons.

    Args:
        input_tensor: input spikes or currents, ``[T, *batch, I]``, the same on all ranks.
        state: of the owned neurons, ``[*batch, n]`` a field; None starts at rest.
        input_weights: in uS, ``[n, I]``: the rows of the owned neurons. Or the synapses onto these, see below.
        recurrent_weights: in uS, ``[n, N]``: the rows of the owned neurons, a column for every neuron of the network. Every
            call of a fused backend transposes it, unless it is the transpose of a contiguous matrix. Or sparse: a sparse
            matrix ``[n, N]`` of PyTorch, or :class:`coba_triton.Synapses` onto the owned neurons. Their targets are numbered
            within the network, as the constructors with ``only=`` do it, or from 0 within the rank.
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
        >>> only = own.start, own.stop  # the network of one process, whatever the number of ranks is
        >>> synapses = Synapses.fixed_number(4000, 4000, 80, 0.004, 0.5, seed=1, only=only)  # doctest: +SKIP
        >>> spikes, state = coba_lif_integral(x, None, input_weights[own], synapses, dt=0.1)  # doctest: +SKIP
    """
    ranks = Ranks(group)
    sparse = is_sparse(input_weights, recurrent_weights)
    call: dict[str, Any] = {"whether synapses are sparse": sparse}
    rows: DenseRows | SparseRows | None = None
    error: Exception | None = None
    try:
        block_steps = check_sequence(input_tensor, "[T, *batch, I]", 2, order, block_steps, record_states, spike_dtype)
        dt = validation.check_dt(dt)
        rows = (SparseRows if sparse else DenseRows)(ranks, input_tensor, input_weights, recurrent_weights, dt)
    except (TypeError, ValueError, RuntimeError) as raised:
        error = raised
    if sparse:
        ranks.agree(call, error)
        assert isinstance(rows, SparseRows)
        rows.agree()
    try:
        if error is not None:
            raise error
        assert rows is not None
        prepared = rows.prepare(input_tensor, state, p)
        backend = choose_backend(backend, input_tensor.device)
        tracked = (input_tensor, *prepared, *(getattr(p, name) for name in validation.LEARNABLE))
        train = torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in tracked)
        shared = _shared(input_tensor, p) if train else {}
        call |= {
            "the version of coba_triton": package_version("coba-triton"),
            "the number of neurons": ranks.neurons,
            "[T, *batch]": list(input_tensor.shape[:-1]),
            "the dtype of the state": prepared[0].dtype,
            "dt": dt,
            "order": order,
            "backend": backend,
            "block_steps": block_steps,
            "whether anything requires a gradient": train,
            "which of input_tensor and the numbers in p require a gradient": list(shared),
        }
    except (TypeError, ValueError, RuntimeError) as raised:
        error = raised
    ranks.agree(call, error)
    assert rows is not None
    x = input_tensor
    if shared:
        copies = Shared.apply(ranks, x.device, *shared.values())  # type: ignore[no-untyped-call]  # torch has no types here
        values = dict(zip(shared, copies, strict=True))
        numbers = {name: values.get(name, value) for name, value in numbers_of(p).items()}
        p = CobaLIFParameters(**numbers, method=p.method)
        x = values.get("input_tensor", x)
        prepared = rows.prepare(x, state, p)

    default = default_spike_dtype(x, prepared[0].dtype, rows.weights)
    jump_first = order == "jump_first"
    if backend == "reference":
        every, final = rows.run_reference(x, prepared, p, jump_first, record_states)
        return format_spikes(every, prepared[0][-1], spike_dtype, default), final
    dtype, neurons = prepared[0].dtype, prepared[0].shape[1:]
    cells = neurons[:-1].numel() * ranks.share
    # recorded spikes are part of the differentiable state: they take their format afterwards
    written = dtype if record_states else None if spike_dtype == "bits" else spike_dtype or default
    sources = neurons[:-1].numel() * (x.shape[-1] + ranks.neurons)
    besides = time_blocks.SUM_BYTES // dtype.itemsize  # where inputs have sparse synapses
    block = time_blocks.choose_block_steps(block_steps, len(x), cells, sources, prepared[0], train, besides)
    plan = Call(backend, jump_first, p.method, written, record_states, block, "events", save=train)
    spikes, final = rows.run(x, prepared, p, plan)
    if record_states:
        spikes = pack_spikes(spikes) if spike_dtype == "bits" else spikes.to(spike_dtype or default)
    return spikes, final


class DenseRows:
    """The rows of both matrices that belong to the neurons of this rank."""

    def __init__(self, ranks: Ranks, x: Tensor, input_weights: Tensor, recurrent_weights: Tensor, dt: float) -> None:
        _check_rows(ranks, input_weights, recurrent_weights)
        self.ranks, self.dt = ranks, dt
        self.weights = input_weights, recurrent_weights

    def prepare(self, x: Tensor, state: Any, p: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The initial state, ``[1 + F, *batch, n]`` with the spikes, and both matrices in its dtype."""
        input_weights, recurrent_weights = self.weights
        square = recurrent_weights[:, self.ranks.own]  # the checks are those of one process with these neurons
        initial = initial_recurrent_state(x, state, input_weights, square, p, self.dt, x.shape[1:])
        return initial, input_weights.to(initial.dtype), recurrent_weights.to(initial.dtype)

    def run_reference(
        self, x: Tensor, prepared: tuple[Tensor, ...], p: Any, jump_first: bool, record_states: bool
    ) -> tuple[list[Tensor], RecurrentState]:
        initial, *weights = prepared
        c = derive_constants(p, self.dt, initial.dtype, x.device)
        w = reference.SplitWeights.of(*weights)

        def step(x: Tensor, s: Any) -> reference.Step:
            every = Gather.apply(s.z, self.ranks)  # type: ignore[no-untyped-call]  # torch has no types here
            return reference.recurrent_step(x, every, s, w, c, jump_first, p.method)

        return run_reference(step, x.to(initial.dtype), recurrent_state(*initial.unbind()), record_states)

    def run(self, x: Tensor, prepared: tuple[Tensor, ...], p: Any, call: Call) -> tuple[Tensor, RecurrentState]:
        initial, *weights = prepared
        steps, neurons, dtype = len(x), initial.shape[1:], initial.dtype
        z = initial[0].reshape(-1, neurons[-1])
        state = initial[1:].reshape(len(initial) - 1, *z.shape).contiguous()
        x = kernel_input(x, dtype).reshape(steps, len(z), x.shape[-1])
        spikes, z, state, states = _TimeBlocks.apply(  # type: ignore[no-untyped-call]  # torch has no types here
            self.ranks, call, x, z, state, *weights, constants_table(p, self.dt, dtype, x.device, neurons)
        )
        spikes = spikes.reshape(len(spikes), *neurons)
        if call.record_states:
            return spikes, recurrent_state(spikes, *own_fields(states, (steps, *neurons), len(states)))
        return spikes, recurrent_state(*own_fields(z, neurons, 1), *own_fields(state, neurons, len(state)))


def _check_rows(ranks: Ranks, input_weights: Any, recurrent_weights: Any) -> None:
    """Both matrices have a row for each of the neurons that this rank owns."""
    for name, weights in (("input_weights", input_weights), ("recurrent_weights", recurrent_weights)):
        if not isinstance(weights, Tensor) or weights.dim() != 2:
            got = f"shape {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(
                f"{name} must be a matrix, the rows of the neurons that this rank owns, got {got}; take the rows "
                "owned_neurons(N) of the whole matrix"
            )
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
