"""The records that operators, the loop over time blocks and the launchers of the backends pass on.

Shapes: T steps, M unconnected neurons, B batch rows of N connected neurons, I input channels. F is the number of fields of
a state: those of :class:`~coba_triton.neuron.records.State`, which have derivatives, and perhaps one more, which has none.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..neuron.records import Kept, State
from .grid import Grid, grid_of

if TYPE_CHECKING:
    from ..backend.protocol import Backend

DIFFERENTIABLE = len(State._fields)
"""The first fields of a state, which have a derivative."""
CPU_CHECKPOINT_EVERY = 16
"""Steps between two saved states of the CPU path: 0.75 bytes per neuron-step of float32, 1.5 of float64."""


def kept_count(fields: int) -> int:
    """How many numbers the adjoint of a step reads of the step, for a state of so many fields."""
    return len(Kept._fields) + fields - DIFFERENTIABLE


class Call(NamedTuple):
    """What a caller asks of an operator beside its tensors; the last arguments of every forward operator.

    Attributes:
        backend: the name of the backend that runs the kernels.
        jump_first: whether a step adds its input before the decay.
        method: the surrogate derivative of the spike.
        spike_dtype: the dtype of the spikes, None for packed ones. An operator that writes spikes into a given buffer
            takes the format of the buffer instead.
        record_states: whether the state of every step is returned.
        block_steps: steps of a time block of connected neurons, None for a choice.
        path: how the recurrent drive is added, see :data:`coba_triton.ops.time_blocks.PATHS`.
        checkpoint_every: steps of unconnected neurons between two states that are saved for the backward.
        time_chunks: into how many chunks the time of unconnected neurons is cut, which are simulated side by side; None for
            a choice.
        memory: the largest time constant of unconnected neurons in steps, None where the host does not know it.
        save: whether to save what the backward needs; None saves it where autograd follows a tensor.
    """

    backend: str
    jump_first: bool = False
    method: str = "super"
    spike_dtype: torch.dtype | None = None
    record_states: bool = False
    block_steps: int | None = None
    path: str = "auto"
    checkpoint_every: int = 1
    time_chunks: int | None = None
    memory: float | None = None
    save: bool | None = None


class Asked(NamedTuple):
    """What a backward operator is asked for, its last arguments after those of :class:`Call`.

    Attributes:
        x: whether the gradient by the input is wanted; the next three likewise.
        input_weights: of connected neurons alone.
        recurrent_weights: of connected neurons alone.
        constants: by the table of constants.
        fields: F, the fields of the state.
        samples: the rows of the batch are so many equal groups, one after the other, each with weight gradients of its own.
    """

    x: bool
    input_weights: bool
    recurrent_weights: bool
    constants: bool
    fields: int
    samples: int = 1


class Weights(NamedTuple):
    """What connected neurons have beside their state: ``input [N, I]``, ``recurrent [N, N]`` and their constants."""

    input: Tensor
    recurrent: Tensor
    constants: Tensor


class Saved(NamedTuple):
    """What a forward saved for its backward: spikes packed along time, and states ``[K F, ...]`` from which to go on."""

    words: Tensor
    checkpoints: Tensor

    def split(self, fields: int) -> Saved:
        """The same in contiguous memory, with the states as ``[K, F, ...]``."""
        return Saved(self.words.contiguous(), self.checkpoints.contiguous().unflatten(0, (-1, fields)))


class Outputs(NamedTuple):
    """What the kernels of a forward fill, beside the final state; None where nobody asked for it.

    Attributes:
        spikes: ``[T, ...]`` of any dtype.
        words: spikes packed along time, int32 ``[ceil(T / 32), ...]``.
        states: the state after every step, ``[F, T, ...]``.
        checkpoints: the states that the backward goes on from, ``[K, F, ...]``.
    """

    spikes: Tensor | None = None
    words: Tensor | None = None
    states: Tensor | None = None
    checkpoints: Tensor | None = None


class Incoming(NamedTuple):
    """The gradients of the loss by the outputs of a forward; None where there is none.

    Attributes:
        spikes: by the spikes, ``[T, ...]``.
        final: by the final state, ``[F, ...]``.
        states: by the states of all steps, ``[F, T, ...]``.
    """

    spikes: Tensor | None
    final: Tensor | None
    states: Tensor | None

    def ready(self) -> Incoming:
        """The same as the kernels take it: states in contiguous memory, and None for the states of no step."""
        states = self.states if self.states is not None and self.states.numel() else None
        return Incoming(
            self.spikes,
            None if self.final is None else self.final.contiguous(),
            None if states is None else states.contiguous(),
        )


class Gradients(NamedTuple):
    """What a backward of connected neurons returns. What nobody asked for has no elements.

    Attributes:
        x: ``[T, B, I]``.
        z: by the spikes before the first step, ``[B, N]``.
        state: by the initial state, ``[F, B, N]``.
        input_weights: a sum of each sample, ``[samples, N, I]``.
        recurrent_weights: a sum of each sample, ``[samples, N, N]``.
        constants: as the table of constants is.
    """

    x: Tensor
    z: Tensor
    state: Tensor
    input_weights: Tensor
    recurrent_weights: Tensor
    constants: Tensor


class Exchange(Protocol):
    """How processes that own the ``n`` rows of some of ``N`` neurons each go on together."""

    def gather(self, values: Tensor) -> Tensor:
        """``[..., n]`` of every process to ``[..., N]`` in all of them."""

    def gather_spikes(self, spikes: Tensor) -> Tensor:
        """:meth:`gather` of 0 and 1."""

    def windows(self) -> int:
        """In how many parts to exchange the spikes of the next steps, which are as many as the shortest delay has.

        With two, one is under way while neurons go on. All processes ask before each such run of steps, and get one answer.
        """

    def send_spikes(self, spikes: Tensor) -> Callable[[], Tensor]:
        """Begin to exchange the spikes ``[t, B, n]`` of some steps, uint8.

        A call of what it returns waits for those of all processes: int64, ``(t B + b) N + neuron`` of each spike. Calls are
        in the order in which exchanges began, the same in all processes.
        """

    def add_up(self, parts: Tensor) -> Tensor:
        """The sum over the processes of ``[..., N]``, of which each keeps its own ``[..., n]``."""


class Network(NamedTuple):
    """What is the same in all time blocks of connected neurons.

    Attributes:
        input_weights: ``[N, I]``. With an ``exchange``, all weights have rows only for the neurons that this process owns.
        recurrent_weights: ``[N, N]``.
        input_rows: the transpose ``[I, N]``, in which the synapses of a source are side by side.
        recurrent_rows: the transpose ``[N, N]``, likewise.
        constants: the table of constants, ``[C, B N]`` or ``[C, 1]``.
        jump_first: whether a step adds its drive before the decay.
        backend: runs the kernels.
        input_synapses: what the backend has prepared from ``input_rows``, see
            :meth:`coba_triton.backend.protocol.Backend.synapses`.
        recurrent_synapses: what it has prepared from ``recurrent_rows``.
        exchange: how this process works with those that own the other neurons, None if there are none.
    """

    input_weights: Tensor
    recurrent_weights: Tensor
    input_rows: Tensor
    recurrent_rows: Tensor
    constants: Tensor
    jump_first: bool
    backend: Backend
    input_synapses: Any
    recurrent_synapses: Any
    exchange: Exchange | None = None

    @classmethod
    def of(
        cls, weights: Weights, jump_first: bool, backend: Backend, exchange: Exchange | None = None, uses: int = 0
    ) -> Network:
        """``uses``: steps of all batch rows that the network serves; for few of them a backend prepares nothing."""
        input_rows, recurrent_rows = weights.input.t().contiguous(), weights.recurrent.t().contiguous()
        return cls(
            weights.input,
            weights.recurrent,
            input_rows,
            recurrent_rows,
            weights.constants.contiguous(),
            jump_first,
            backend,
            backend.synapses(input_rows, uses),
            backend.synapses(recurrent_rows, uses),
            exchange,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.constants.dtype

    def send_back(self, adjoints: Tensor, sweep: Sweep) -> None:
        """Fill ``sweep.lam_z``, the gradient by the spikes of a step, from the ``adjoints [B, 2 N]`` of the next one."""
        lam_z, on_cpu = sweep.lam_z, sweep.lam_z.device.type == "cpu"
        weights = sweep.scratch.get("split weights")
        if weights is None:
            weights = split(self.recurrent_weights)
            sweep.scratch["split weights"] = weights = weights.t().contiguous() if on_cpu else weights
        if on_cpu:  # MKL takes the weights in rows of the result up to twice as fast
            product = torch.mm(weights, adjoints.t()).t()
        else:
            product = torch.mm(adjoints, weights, out=lam_z if self.exchange is None else None)
        if self.exchange is not None:
            product = self.exchange.add_up(product.contiguous())
        if product is not lam_z:
            lam_z.copy_(product)


def split(weights: Tensor) -> Tensor:
    """``[N, K]`` to ``[2 N, K]``: excitatory rows, then the magnitudes of the inhibitory ones."""
    return torch.cat([torch.relu(weights), torch.relu(-weights)])


class Sweep(NamedTuple):
    """What a backward of connected neurons reads in every time block, and what it carries back from block to block.

    Attributes:
        method: the surrogate derivative of the spike.
        spikes: the incoming gradient by the spikes, ``[T, B N]``, or None.
        states: the incoming gradient by the states of all steps, ``[F, T, B, N]``, or None.
        lam: carried on; the gradient by the state, ``[F, B, N]``.
        lam_z: carried on; the gradient by the spikes before a step, ``[B, N]``.
        sums: carried on; the gradient by the constants of each neuron, ``[S, B N]``, or None.
        scratch: what a backend works with in every block, under names of its own.
    """

    method: str
    spikes: Tensor | None
    states: Tensor | None
    lam: Tensor
    lam_z: Tensor
    sums: Tensor | None
    scratch: dict[str, Tensor]


class Block(NamedTuple):
    """One time block of ``t`` steps on the way back.

    Attributes:
        start: its first step.
        words: its spikes, packed, int32 ``[ceil(t / 32), B, N]``.
        trajectory: what the adjoints of its steps read, ``[P, t, B, N]``. Its first planes, as many as :func:`kept_count`
            says, are for the adjoint. The last two are the conductances after they decayed, which a gradient by the
            constants needs.
    """

    start: int
    words: Tensor
    trajectory: Tensor


class Projection(NamedTuple):
    """Sparse synapses of ``K`` sources as kernels take them, by source.

    Attributes:
        indptr: the synapses of source ``k`` are ``indptr[k]`` to ``indptr[k + 1]``; int64 ``[K + 1]``.
        targets: int32 ``[S]``, ascending within a source. A pair may have several synapses.
        weights: in uS, of the compute dtype: one for each synapse ``[S]``, for each source ``[K, 1]`` or for all ``[1]``.
        delays: in ms, float32, of such a shape. A spike of step ``t`` arrives in step ``t + round(delay * per_ms)``, all
            in float32. None for inputs, which arrive in their own step.
        grid: how weights become integers.
    """

    indptr: Tensor
    targets: Tensor
    weights: Tensor
    delays: Tensor | None
    grid: Grid


class Connections(NamedTuple):
    """The tensors of neurons that are connected by sparse synapses, as the operators take them; see :class:`Projection`.

    Attributes:
        input_weights: dense ``[N, I]``, or None where inputs have sparse synapses: the next three, which are None otherwise.
        input_indptr, input_targets, input_values: ``[I + 1]``, ``[S]``, and the weights.
        indptr, targets, weights, delays: of the synapses from neuron to neuron.
        constants: the table of constants.
        per_ms: steps in a millisecond.
        shortest: steps of the shortest delay, at least 1.
    """

    input_weights: Tensor | None
    input_indptr: Tensor | None
    input_targets: Tensor | None
    input_values: Tensor | None
    indptr: Tensor
    targets: Tensor
    weights: Tensor
    delays: Tensor
    constants: Tensor
    per_ms: float
    shortest: int


class SparseNetwork(NamedTuple):
    """What is the same in all time blocks of neurons that are connected by sparse synapses.

    Attributes:
        neurons: N.
        input_weights: dense ``[N, I]``, or None where inputs have sparse synapses.
        input_rows: the transpose ``[I, N]``, in which the synapses of a source are side by side, or None.
        inputs: the sparse synapses of inputs, or None.
        recurrent: the synapses from neuron to neuron.
        per_ms: steps in a millisecond.
        shortest: steps of the shortest delay, at least 1.
        longest: R, steps of the longest delay: the length of the ring of sums under way.
        constants: the table of constants, ``[C, B N]`` or ``[C, 1]``.
        jump_first: whether a step adds its drive before the decay.
        backend: runs the kernels.
        exchange: how this process works with those that own the other neurons, None if there are none. With one, N are the
            neurons of this process. All synapses are onto these; the sources of ``recurrent`` are the neurons of all.
    """

    neurons: int
    input_weights: Tensor | None
    input_rows: Tensor | None
    inputs: Projection | None
    recurrent: Projection
    per_ms: float
    shortest: int
    longest: int
    constants: Tensor
    jump_first: bool
    backend: Backend
    exchange: Exchange | None = None

    @classmethod
    def of(
        cls,
        to: Connections,
        history: Tensor,
        jump_first: bool,
        backend: Backend,
        grids: tuple[Grid | None, Grid] | None = None,
        exchange: Exchange | None = None,
    ) -> SparseNetwork:
        """The network that goes on after the spikes ``history [R, ..., N]``; its sums may be narrow if these are 0 or 1.

        ``grids``, of the inputs' synapses and of the others, are those of all processes with an ``exchange``.

        Raises:
            ValueError: if a number under way is above 1, or below -1.
        """
        check_spikes_under_way(history)
        longest, neurons = history.shape[0], history.shape[-1]
        if grids is None:
            spikes = history.device.type == "cpu" and is_binary(history)  # a GPU is not waited for
            of_inputs = None
            if to.input_indptr is not None and to.input_targets is not None and to.input_values is not None:
                of_inputs = grid_of(to.input_values, to.input_indptr, to.input_targets, neurons, spikes=False)
            grids = of_inputs, grid_of(to.weights, to.indptr, to.targets, neurons, spikes)
        input_grid, grid = grids
        inputs = None
        if to.input_indptr is not None and to.input_targets is not None and to.input_values is not None:
            assert input_grid is not None
            values = to.input_values.contiguous()
            inputs = Projection(to.input_indptr.contiguous(), to.input_targets.contiguous(), values, None, input_grid)
        recurrent = Projection(
            to.indptr.contiguous(), to.targets.contiguous(), to.weights.contiguous(), to.delays.contiguous(), grid
        )
        rows = None if to.input_weights is None else to.input_weights.t().contiguous()
        constants = to.constants.contiguous()
        return cls(
            neurons,
            to.input_weights,
            rows,
            inputs,
            recurrent,
            to.per_ms,
            to.shortest,
            longest,
            constants,
            jump_first,
            backend,
            exchange,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.constants.dtype

    def unconnected(self, steps: int) -> SparseNetwork:
        """The same neurons without the synapses between them, for ``steps`` in which none of their spikes arrives."""
        new = self.recurrent.indptr.new_zeros
        none = Projection(
            new(self.neurons + 1),
            self.recurrent.targets[:0],
            self.constants.new_zeros(1),
            new(1, dtype=torch.float32),
            self.recurrent.grid,
        )
        return self._replace(recurrent=none, shortest=steps, exchange=None)


def is_binary(spikes: Tensor) -> bool:
    """Whether all numbers are 0 or 1."""
    return bool(((spikes == 0) | (spikes == 1)).all())


def check_spikes_under_way(history: Tensor) -> None:
    """Refuse numbers for which exact sums have no room. On a GPU, for which the host does not wait, the device raises."""
    expected = "state.z and state.history must be between -1 and 1 with sparse synapses"
    way_out = "give spikes, 0 or 1, or parts of them"
    fits = (history.abs() > 1).logical_not_()
    if history.device.type != "cpu":
        torch._assert_async(fits.all(), f"{expected}; {way_out}")
    elif not fits.all():
        wrong = history[~fits][0].item()
        raise ValueError(f"{expected}, got {wrong:g}; {way_out}")


class SparseSweep(NamedTuple):
    """What a backward through sparse synapses carries back from block to block.

    Attributes:
        method: the surrogate derivative of the spike.
        samples: the rows of the batch are so many equal groups, one after the other, each with weight gradients of its own.
        lam: the gradient by the state, ``[F, B, N]``.
        sums: the gradient by the constants of each neuron, ``[S, B N]``, or None.
        recurrent: the gradient by the weight of every recurrent synapse, ``[samples, S]``, or None.
        inputs: the gradient by the weight of every sparse synapse of an input, ``[samples, S]``, or None.
        scratch: what a backend works with in every block, under names of its own.
    """

    method: str
    samples: int
    lam: Tensor
    sums: Tensor | None
    recurrent: Tensor | None
    inputs: Tensor | None
    scratch: dict[str, Tensor]


SCHEMA = {
    Call: "str backend, bool jump_first, str method, ScalarType? spike_dtype, bool record_states, int? block_steps, "
    "str path, int checkpoint_every, int? time_chunks, float? memory, bool? save",
    Asked: "bool x_grad, bool input_weights_grad, bool recurrent_weights_grad, bool constants_grad, int fields, int samples",
    Weights: "Tensor input_weights, Tensor recurrent_weights, Tensor constants",
    Connections: "Tensor? input_weights, Tensor? input_indptr, Tensor? input_targets, Tensor? input_values, Tensor indptr, "
    "Tensor targets, Tensor weights, Tensor delays, Tensor constants, float per_ms, int shortest",
    Saved: "Tensor words, Tensor checkpoints",
    Incoming: "Tensor? grad_spikes, Tensor? grad_final, Tensor? grad_states",
}
"""How each record stands in the schema of an operator, which has no records."""


def grouper(groups: tuple[Callable[..., Any], ...]) -> Callable[[tuple[Any, ...]], list[Any]]:
    """A function from the flat arguments of an operator to its records. A group that is no record takes one argument."""
    places, start = [], 0
    for group in groups:
        stop = start + len(getattr(group, "_fields", "1"))
        places.append((getattr(group, "_make", itemgetter(0)), slice(start, stop)))
        start = stop
    return lambda args: [make(args[place]) for make, place in places]
