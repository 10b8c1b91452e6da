"""The ways to advance a network by some steps of a long run: through the public functions, or straight through kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import coba_lif_feed_forward_integral, coba_lif_integral, kernel_input
from ..neuron.records import CobaLIFDelayState, CobaLIFParameters, FeedForwardState, feed_forward_state, recurrent_state
from ..ops import sparse_blocks, time_blocks
from ..ops.call import Network, Outputs, SparseNetwork
from ..ops.spikes import WORD_BITS, word_count

STATE_BYTES = 2**24  # memory for the states of all neurons, where they are needed to record those of some


class Stepper(ABC):
    """One of these ways."""

    @abstractmethod
    def advance(self, x: Tensor, state: Any) -> tuple[Tensor, Any, FeedForwardState | None]:
        """Simulate some steps.

        Args:
            x: input ``[t, *shape]`` of neurons without recurrent synapses, or ``[t, *batch, I]``.
            state: the record before them.

        Returns:
            The spikes as bits, the record after the steps, and the traces ``[t, K]`` of the recorded neurons, which are None
            if none are recorded, or if :meth:`traces_later` gives them.
        """

    def traces_later(self, x: Tensor, before: Any) -> FeedForwardState | None:
        """Traces of steps that :meth:`advance` did not give, from their input and the record before them."""
        return None


class Functional(Stepper):
    """The public functions. Neurons without recurrent synapses go this way, and all neurons in the reference.

    Args:
        network: a module for sequences.
        weights: input and recurrent weights of connected neurons, or none.
        p: its parameters.
        recorded: indices of neurons, ``[K]``.
    """

    def __init__(self, network: Any, weights: Sequence[Any], p: CobaLIFParameters, recorded: Tensor) -> None:
        self.network, self.weights, self.p, self.recorded = network, weights, p, recorded

    def integrate(self, x: Tensor, state: Any, record_states: bool, p: Any = None) -> tuple[Tensor, Any]:
        """What the public function returns. With ``p``, it is of neurons with these parameters."""
        options: dict[str, Any] = {
            "order": self.network.order,
            "backend": self.network.backend,
            "record_states": record_states,
            "spike_dtype": "bits",
        }
        if self.weights:
            options["block_steps"] = self.network.block_steps
            input_weights, recurrent_weights = self.weights
            return coba_lif_integral(x, state, input_weights, recurrent_weights, self.p, self.network.dt, **options)
        return coba_lif_feed_forward_integral(x, state, p or self.p, self.network.dt, **options)

    def advance(self, x: Tensor, state: Any) -> tuple[Tensor, Any, FeedForwardState | None]:
        if self.weights and len(self.recorded):
            return self._with_all_states(x, state)
        return *self.integrate(x, state, False), None

    def _with_all_states(self, x: Tensor, state: Any) -> tuple[Tensor, Any, FeedForwardState]:
        """The same for connected neurons some of which are recorded: the states of all are computed.

        It runs over parts of the steps, so that these states take little memory.
        """
        step = len(state) * state.v.numel() * state.v.element_size()
        words, traces = [], []
        for part in x.split(word_count(max(STATE_BYTES // step, 1)) * WORD_BITS):
            spikes, states = self.integrate(part, state, True)
            past: list[Any] = []
            if isinstance(states, CobaLIFDelayState):
                *states, history = states
                past = [history]
            state = recurrent_state(*(field[-1].clone() for field in states), *past)
            words.append(spikes)
            traces.append([field.flatten(1)[:, self.recorded] for field in states[1:]])
        return torch.cat(words), state, feed_forward_state(*map(torch.cat, zip(*traces, strict=True)))

    def traces_later(self, x: Tensor, before: Any) -> FeedForwardState | None:
        """Traces of unconnected neurons: those that are recorded run a second time, without the others."""
        if self.weights or not len(self.recorded):
            return None
        shape = before.v.shape

        def choose(value: Any) -> Any:
            each = isinstance(value, Tensor) and value.dim() > 0
            return value.expand(shape).reshape(-1)[self.recorded] if each else value

        chosen = x.expand(len(x), *shape).reshape(len(x), shape.numel())[:, self.recorded]
        state = feed_forward_state(*map(choose, before))
        p = CobaLIFParameters(*map(choose, self.p))
        return self.integrate(chosen, state, True, p)[1]  # type: ignore[no-any-return]  # states by record_states


class Connected(Stepper):
    """The kernels of a recurrent network, which keep the traces of the recorded neurons alone.

    Args:
        recorded: indices of neurons, ``[K]``.
        records: whether any neuron is recorded, here or in another process that shares the run.
        cells: neurons of all rows, as many as any process has.
        block_steps: as in :func:`coba_triton.coba_lif_integral`.
    """

    sums = False  # whether the inputs have sparse synapses, whose sums are made before the launch

    def __init__(self, recorded: Tensor, records: bool, cells: int, block_steps: int | None) -> None:
        order = recorded.argsort()
        self.ascending, self.places = recorded[order], order.argsort()
        self.records, self.cells, self.block_steps = records, cells, block_steps

    def _launch_steps(self, x: Tensor, fields: int, like: Tensor) -> int:
        """Steps in one launch. On a GPU, a launch writes the states of all neurons where some are recorded."""
        besides = (fields if self.records else 0) + (time_blocks.SUM_BYTES // like.element_size() if self.sums else 0)
        steps: int = time_blocks.choose_block_steps(
            self.block_steps, len(x), self.cells, x[:1].numel(), like, train=False, besides=besides
        )
        return steps

    def advance(self, x: Tensor, state: Any) -> tuple[Tensor, Any, FeedForwardState | None]:
        z, *fields = state
        if isinstance(state, CobaLIFDelayState):
            fields = fields[:-1]
        steps, shape = len(x), z.shape
        rows = shape[:-1].numel(), shape[-1]
        words = torch.empty(word_count(steps), *rows, dtype=torch.int32, device=z.device)
        traces = z.new_empty(len(fields), steps, len(self.ascending)) if len(self.ascending) else None
        state = self._forward(
            kernel_input(x, z.dtype).reshape(steps, rows[0], x.shape[-1]),
            state,
            torch.stack(fields).reshape(len(fields), *rows),
            Outputs(words=words, states=traces),
            self._launch_steps(x, len(fields), z),
            None if traces is None else self.ascending,
        )
        kept = None if traces is None else feed_forward_state(*traces[..., self.places])
        return words.reshape(len(words), *shape), state, kept

    @abstractmethod
    def _forward(self, x: Tensor, state: Any, fields: Tensor, out: Outputs, block_steps: int, chosen: Tensor | None) -> Any:
        """Fill the outputs from ``x [t, B, I]`` and a record, whose ``fields [F, B, N]`` are without its spikes.

        Returns:
            The record after the steps.
        """


class Dense(Connected):
    """Weights that are matrices."""

    def __init__(self, net: Network, *chosen: Any) -> None:
        super().__init__(*chosen)
        self.net = net

    def _forward(self, x: Tensor, state: Any, fields: Tensor, out: Outputs, block_steps: int, chosen: Tensor | None) -> Any:
        shape, z = state.z.shape, state.z.reshape(fields.shape[1:])
        z, fields = time_blocks.forward(self.net, x, z, fields, out, block_steps, "auto", chosen)
        return recurrent_state(z.reshape(shape), *fields.reshape(-1, *shape))


class Sparse(Connected):
    """Sparse synapses and delays. The sums that are under way go on from one call to the next."""

    def __init__(self, net: SparseNetwork, *chosen: Any) -> None:
        super().__init__(*chosen)
        self.sums = net.inputs is not None
        self.net = net
        self.ring: Tensor | None = None  # sums under way after the steps that led to `last`
        self.last: Any = None
        self.since = 0  # steps since the ring was made, or as many less as have gone round it

    def _forward(self, x: Tensor, state: Any, fields: Tensor, out: Outputs, block_steps: int, chosen: Tensor | None) -> Any:
        shape = state.z.shape
        history: Any = state.history if isinstance(state, CobaLIFDelayState) else state.z.unsqueeze(0)
        history = history.reshape(len(history), *fields.shape[1:]).contiguous()
        if self.ring is None or state is not self.last:
            self.ring, self.since = sparse_blocks.ring_of(self.net, history), 0
        fields = sparse_blocks.forward(self.net, x, self.ring, fields, out, block_steps, self.since, chosen)
        self.since = (self.since + len(x)) % len(history)
        assert out.words is not None
        history = sparse_blocks.last_spikes(history, out.words, len(x)).reshape(len(history), *shape)
        past = (history,) if len(history) > 1 else ()
        self.last = recurrent_state(history[-1], *fields.reshape(-1, *shape), *past)
        return self.last
