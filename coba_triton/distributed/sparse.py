"""The synapses onto the neurons of this process, and a sequence through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import reference
from ..backend.choose import launcher
from ..functional import connections, initial_sparse_state, kernel_input, own_fields, reference_synapses, run_reference
from ..neuron.records import RecurrentState, recurrent_state
from ..ops import sparse_blocks
from ..ops.call import Asked, Call, Connections, Incoming, Saved, SparseNetwork, check_spikes_under_way, is_binary
from ..ops.constants import constants_table, derive_constants
from ..ops.grid import Grid, make_grid
from ..ops.kept import Kept, contents_of
from ..ops.sparse_operators import PLACES, check_connections, sparse_forward
from ..ops.synapses import Synapses
from ..ops.validation import check_device, check_matrix
from ..ops.wiring import Wiring, check_no_delays
from .ranks import Gather, Ranks

# Targets as they are numbered within a rank, for those that are numbered within the network.
_own_targets: Kept[Tensor] = Kept()
# The grids on which all ranks add up weights.
_grids: Kept[Grid] = Kept()


class SparseRows:
    """The synapses onto the neurons of this rank."""

    def __init__(self, ranks: Ranks, x: Tensor, input_weights: Any, recurrent_weights: Any, dt: float) -> None:
        self.ranks, self.dt = ranks, dt
        recurrent = _as_synapses(recurrent_weights, "recurrent_weights")
        ranks.divide(recurrent.sources)
        if isinstance(input_weights, Tensor) and input_weights.layout is torch.strided:
            check_matrix(input_weights, "input_weights")
            inputs: Tensor | Synapses = input_weights
            rows, columns = input_weights.shape
            own = range(ranks.neurons)[ranks.own]
            if rows != len(own):
                raise ValueError(
                    f"input_weights must be the {len(own)} rows {own.start} to {own.stop - 1} on rank {ranks.rank} of "
                    f"{ranks.ranks}, got {[rows, columns]}; take the rows owned_neurons({ranks.neurons})"
                )
        else:
            inputs = self._own(_as_synapses(input_weights, "input_weights"), "input_weights")
            columns = inputs.sources
            check_no_delays(inputs)
        if columns != x.shape[-1]:
            raise ValueError(
                f"input_weights must be for the I={x.shape[-1]} inputs of input_tensor, got {columns} columns; change one "
                "of them"
            )
        recurrent = self._own(recurrent, "recurrent_weights")
        for name, own_weights in (("input_weights", inputs), ("recurrent_weights", recurrent)):
            check_device(own_weights.indptr if isinstance(own_weights, Synapses) else own_weights, name, x.device)
        self.wiring = Wiring(inputs, recurrent, *recurrent.check_delays(dt))

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return tuple(w.weights if isinstance(w, Synapses) else w for w in self.wiring[:2])

    def _own(self, synapses: Synapses, name: str) -> Synapses:
        """The synapses with their targets numbered from the first neuron of this rank on."""
        own = range(self.ranks.neurons)[self.ranks.own]
        if synapses.neurons == len(own):
            return synapses
        targets = synapses.targets
        if synapses.neurons == self.ranks.neurons:

            def within_rank() -> Tensor:
                low, high = map(int, targets.aminmax()) if len(targets) else (own.start, own.start)
                if low < own.start or high >= own.stop:
                    raise ValueError(
                        f"{name} must be the synapses onto the neurons {own.start} to {own.stop - 1} on rank "
                        f"{self.ranks.rank} of {self.ranks.ranks}, got some onto neurons {low} to {high}; make them with "
                        f"only=({own.start}, {own.stop})"
                    )
                return targets - own.start

            return synapses._replace(targets=_own_targets.get(targets, (), own, within_rank), neurons=len(own))
        raise ValueError(
            f"{name} must be synapses onto the {len(own)} neurons of rank {self.ranks.rank} of {self.ranks.ranks}, or onto "
            f"some of all {self.ranks.neurons}, got {synapses.neurons} neurons; make them with "
            f"only=({own.start}, {own.stop})"
        )

    def agree(self) -> None:
        """Learn the shortest and the longest delay of all ranks."""
        given = (self.wiring.shortest, self.wiring.longest) if self.wiring.recurrent.count else None
        every = [steps for steps in self.ranks.share_facts(given) if steps is not None] or [(1, 1)]
        shortest, longest = min(low for low, _ in every), max(high for _, high in every)
        self.wiring = self.wiring._replace(shortest=shortest, longest=longest)

    def prepare(self, x: Tensor, state: Any, p: Any) -> tuple[Tensor, ...]:
        """The spikes of the last D steps, ``[D, *batch, n]``, the initial state, ``[F, *batch, n]``, and the weights."""
        history, initial = initial_sparse_state(x, state, self.wiring, p, self.dt, x.shape[1:])
        check_spikes_under_way(history)  # here, so that all ranks stop
        return history, initial, *(weights.to(initial.dtype) for weights in self.weights)

    def agree_on_grids(self, weights: list[Tensor], binary: bool) -> tuple[Grid | None, Grid]:
        """The grids on which all ranks add up. They are kept until a weight of any rank changes."""
        synapses = [(own, w) for own, w in zip(self.wiring[:2], weights, strict=True) if isinstance(own, Synapses)]
        wanted: list[tuple[Any, ...]] = []
        for number, (own, w) in enumerate(synapses):
            narrow = number == len(synapses) - 1 and binary and not w.requires_grad
            wanted.append((w, (own.indptr, own.targets), (own.neurons, narrow, self.ranks.ranks, contents_of(w))))
        kept = [_grids.find(*key) for key in wanted]
        if not all(self.ranks.share_facts(None not in kept)):
            kept = []
            for w, (indptr, targets), fits in wanted:
                with torch.no_grad():
                    neurons, narrow = fits[:2]
                    made = make_grid(w.detach(), indptr, targets, neurons, narrow, self.ranks.greatest)
                kept.append(_grids.keep(w, (indptr, targets), fits, made))
        *of_inputs, grid = kept
        assert grid is not None
        return (of_inputs[0] if of_inputs else None), grid

    def run_reference(
        self, x: Tensor, prepared: tuple[Tensor, ...], p: Any, jump_first: bool, record_states: bool
    ) -> tuple[list[Tensor], RecurrentState]:
        history, initial, *weights = prepared
        grids = self.agree_on_grids(weights, False)
        c = derive_constants(p, self.dt, initial.dtype, x.device)
        inputs, recurrent = (
            reference_synapses(own, w, self.dt, grid) if isinstance(own, Synapses) and grid is not None else None
            for own, w, grid in zip(self.wiring[:2], weights, grids, strict=True)
        )
        assert recurrent is not None
        past = [history]
        every = [Gather.apply(history, self.ranks)]  # type: ignore[no-untyped-call]  # torch has no types here

        def step(x: Tensor, s: Any) -> reference.Step:
            if inputs is not None:
                drive = reference.input_drive(inputs, x)
            else:
                w = weights[0].mT
                drive = reference.matrix_drive(x, torch.relu(w), torch.relu(-w))
            arriving = reference.recurrent_drive(recurrent, every[-1])
            done = reference.step(s, drive, arriving, c, jump_first, p.method)
            now = done.z.unsqueeze(0)
            past[0] = torch.cat([past[0][1:], now])
            sent = Gather.apply(now, self.ranks)  # type: ignore[no-untyped-call]  # torch has no types here
            every[0] = torch.cat([every[0][1:], sent])
            return done

        start = recurrent_state(history[-1], *initial.unbind())
        spikes, final = run_reference(step, x.to(initial.dtype), start, record_states)
        return spikes, final if self.wiring.longest == 1 else recurrent_state(*final, past[0].clone())

    def run(self, x: Tensor, prepared: tuple[Tensor, ...], p: Any, call: Call) -> tuple[Tensor, RecurrentState]:
        history, initial, *weights = prepared
        grids = self.agree_on_grids(weights, history.device.type == "cpu" and is_binary(history))
        steps, neurons, dtype = len(x), initial.shape[1:], initial.dtype
        batch, own = neurons[:-1].numel(), neurons[-1]
        to = connections(self.wiring, constants_table(p, self.dt, dtype, x.device, neurons), self.dt)
        x = kernel_input(x, dtype).reshape(steps, batch, x.shape[-1])
        sent = history.reshape(len(history), batch, own).contiguous()
        flat = initial.reshape(len(initial), batch, own).contiguous()
        spikes, last, flat, states = _SparseBlocks.apply(  # type: ignore[no-untyped-call]  # torch has no types here
            self.ranks, grids, call, to.per_ms, to.shortest, x, sent, flat, *to[:-2]
        )
        spikes = spikes.reshape(len(spikes), *neurons)
        past = (last.reshape(len(last), *neurons),) if self.wiring.longest > 1 else ()
        if call.record_states:
            return spikes, recurrent_state(spikes, *own_fields(states, (steps, *neurons), len(states)), *past)
        z = last[-1].reshape(neurons).clone()
        return spikes, recurrent_state(z, *own_fields(flat, neurons, len(flat)), *past)


def _as_synapses(weights: Any, name: str) -> Synapses:
    if isinstance(weights, Tensor) and weights.layout is not torch.strided:
        check_matrix(weights, name)
        return Synapses.from_torch(weights)
    if not isinstance(weights, Synapses):
        got = f"a dense matrix {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(
            f"{name} must be coba_triton.Synapses or a sparse matrix where the others are, got {got}; use "
            "Synapses.from_torch"
        )
    return weights


class _SparseBlocks(torch.autograd.Function):
    """The loop over time blocks, forward and back, as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, grids: Any, call: Call, per_ms: float, shortest: int, x: Tensor, history: Tensor,
        state: Tensor, *tensors: Any,
    ) -> Any:  # fmt: skip
        to = Connections._make((*tensors, per_ms, shortest))
        check_connections(history.shape[0], history.shape[-1], to)
        net = SparseNetwork.of(to, history, call.jump_first, launcher(call.backend), grids, ranks)
        spikes, last, final, states, words, checkpoints = sparse_forward(net, x, history, state, to, call)
        ctx.net, ctx.to, ctx.call, ctx.fields = net, to, call, len(state)
        ctx.set_materialize_grads(False)
        if not spikes.is_floating_point():
            ctx.mark_non_differentiable(spikes)
        ctx.save_for_backward(x, history, spikes if call.spike_dtype is None else words, checkpoints)
        return spikes, last, final, states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        grad_spikes: Tensor | None,
        grad_last: Tensor | None,
        grad_final: Tensor | None,
        grad_states: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, history, words, checkpoints = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        places = {name: needed[3 + place] for name, place in PLACES.items() if name not in ("per_ms", "shortest")}
        asked = Asked(
            needed[0], places["input_weights"] or places["input_values"], places["weights"], places["constants"], ctx.fields
        )
        incoming = Incoming(grad_spikes, grad_final, grad_states)
        *by, by_constants = sparse_blocks.backward(
            ctx.net, x, history, Saved(words, checkpoints), incoming, grad_last, ctx.to, ctx.call, asked
        )
        by_x, by_history, by_state, by_dense, by_values, by_weights = by
        of: dict[str, Tensor | None] = dict.fromkeys(places)
        for name, grad in (("input_weights", by_dense), ("input_values", by_values), ("weights", by_weights)):
            of[name] = grad.squeeze(0) if places[name] else None
        of["constants"] = by_constants if places["constants"] else None
        return None, None, None, None, None, by_x if needed[0] else None, by_history, by_state, *of.values()
