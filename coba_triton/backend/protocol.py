"""What a backend must offer: the functions that :mod:`coba_triton.ops` calls on it.

A backend is a module or an object with these functions. :data:`coba_triton.backend.choose.LAUNCHERS` names the backends,
and a type checker holds each of them to this protocol. All of them must give the bits of the reference, except where a sum
of weights is rounded.

T, t: steps of a sequence and of a time block; M: unconnected neurons; B, N, I: batch rows, connected neurons, and input
channels; F: fields of a state, of which the first three have a derivative; C and S: rows of the table of constants and of
its gradient, see :class:`~coba_triton.neuron.records.Constants` and :class:`~coba_triton.neuron.records.Sums`. A table of
constants is ``[C, 1]`` where all neurons share them, else it has a column for every neuron. States and constants have the
compute dtype, float32 or float64; inputs may also be half precision, bool or uint8.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.call import Call, Incoming, Network, Outputs, Saved, SparseNetwork, SparseSweep, Sweep


class Backend(Protocol):
    """Launches kernels. A module of functions is one."""

    def heuristic(self, kernel: str, dtype: torch.dtype, neurons: int, batch: int) -> dict[str, int]:
        """The launch parameters of a kernel where no tuning table has any.

        Args:
            kernel: a name in :data:`coba_triton.tuning.tables.KERNELS`.
            dtype: the compute dtype.
            neurons: M or N.
            batch: B, and 1 for unconnected neurons.
        """

    # Unconnected neurons

    def feed_forward_forward(
        self, x: Tensor, state: Tensor, constants: Tensor, final: Tensor, out: Outputs, call: Call
    ) -> None:
        """Simulate ``x [T, M]``, of any strides, from ``state [F, M]``.

        Fill ``final [F, M]`` and every output that is there. Of the call, ``jump_first``, ``time_chunks``, ``memory`` and,
        if there are checkpoints, ``checkpoint_every`` matter. Neither T nor M is 0.

        The checkpoints are the states before every such step; after the last whole run of steps
        :func:`coba_triton.ops.operators.checkpoint_count` says which there are. The run is cut into ``time_chunks`` chunks,
        which are simulated side by side. None is for the backend's choice; no number changes a bit.
        """

    def feed_forward_backward(
        self,
        x: Tensor,
        constants: Tensor,
        saved: Saved,
        grads: Incoming,
        grad_x: Tensor,
        grad_state: Tensor,
        sums: Tensor,
        call: Call,
    ) -> None:
        """Differentiate what :meth:`feed_forward_forward` did, with the spikes of ``saved`` and from its checkpoints.

        Fill the first three rows of ``grad_state [F, M]``, and where they have elements also ``grad_x [T, M]`` and the sums
        over time ``sums [S, M]``. Of the call, ``jump_first``, ``method``, ``checkpoint_every``, ``time_chunks`` and
        ``memory`` matter.
        """

    # Connected neurons

    def synapses(self, rows: Tensor, uses: int) -> Any:
        """Prepare what the kernels read of the weights ``rows [K, N]`` instead of or beside the matrix itself.

        The network serves ``uses`` steps of all batch rows; for few of them this need not pay. What it returns comes back in
        :class:`~coba_triton.ops.call.Network`.
        """

    def is_sparse(self, sources: Tensor) -> bool:
        """Whether the drive of these sources is to be summed over events, not computed as a matrix product."""

    def unpack(self, words: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
        """The spikes ``[T, ...]`` of ``steps`` T in words of 32 steps, ``[ceil(T / 32), ...]``, as 0 or 1 of a dtype."""

    def fires_often(self, spikes: Tensor) -> bool:
        """Whether the block after one with these ``spikes [t, B, N]`` is to take a matrix product a step."""

    def project_events(self, sources: Tensor, weights: Tensor) -> Tensor:
        """The drive ``[2, ..., N]`` of ``sources [..., K]`` through ``weights [K, N]``: ``relu(W) x``, then ``relu(-W) x``.

        Each sum goes over the sources that are not 0, in ascending order.
        """

    def recurrent_block(
        self,
        net: Network,
        x: Tensor,
        drive: Tensor | None,
        z: Tensor,
        state: Tensor,
        out: Outputs,
        sliced: bool | None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Simulate a block from ``state [F, B, N]`` and the spikes ``z [B, N]`` before it; returns the state after it.

        The input's ``drive [2, t, B, N]`` is summed from the events in ``x [t, B, I]`` if it is None. Fill the spikes, words
        and states of ``out`` that are there. ``sliced``: whether several programs may share a batch row, which changes no
        bit; None lets the backend decide by N and B. With ``chosen [K]``, ascending indices into the neurons of all rows,
        the states are theirs alone, ``[F, t, K]``.
        """

    def recurrent_step(
        self, net: Network, drive: Tensor, recurrent_drive: Tensor, state: Tensor, spikes: Tensor, states: Tensor | None
    ) -> Tensor:
        """Simulate one step whose two drives ``[2, B, N]`` are known; returns the state after it.

        Fill ``spikes [B, N]``, and ``states [F, B, N]`` if it is there.
        """

    def recurrent_backward_block(
        self,
        net: Network,
        x: Tensor,
        drive: Tensor | None,
        before: Tensor,
        recurrent_drive: Tensor | None,
        state: Tensor,
        words: Tensor,
        sweep: Sweep,
        start: int,
        adjoints: Tensor,
    ) -> None:
        """Compute a block once more from ``state [F, B, N]``, with the spikes that it had, and go back through it.

        ``start`` is its first step. ``words`` are the spikes of the block, and ``before [t, B, N]`` those that each step saw
        of the one before. A drive that is None is summed from the events in ``x`` or ``before``.

        Carry on ``sweep.lam``, ``sweep.lam_z`` and ``sweep.sums``, and fill ``adjoints [t, B, 2 N]``, the gradients by the
        excitatory and then by the inhibitory drive of every neuron.
        """

    def add_products(self, sums: Tensor, sources: Tensor, rows: Tensor, events: bool) -> None:
        """Add ``sources^T rows``, of ``[R, K]`` and ``[R, M]``, to ``sums [K, M]``. ``events``: few sources are not 0."""

    # Neurons connected by sparse synapses. The drive of a step is the sum of the integers that arrive, which has no order:
    # rint(|weight| * value * scale) of a synapse, added up for each neuron and sign, times the inverse of the scale. A spike
    # has the value 1. ``R`` is the longest delay in steps.

    # Where processes share the neurons, each has N of its own and the synapses onto these. K are the neurons of all of them.
    # Elsewhere K is N.

    def sparse_ring(self, net: SparseNetwork, history: Tensor) -> Tensor:
        """The sums under way after the spikes ``history [R, B, K]`` of the last R steps, the last one in the last row.

        Its values are between -1 and 1. The ring has sums for the next R steps. Its second axis is that of the steps and its
        last one that of the neurons. The other two, of the batch and of both signs, have an order of the backend's own.
        """

    def sparse_send(self, net: SparseNetwork, ring: Tensor, start: int, events: Tensor) -> None:
        """Add to the ring what the spikes of other processes send, as :meth:`sparse_block` does with those of its own.

        ``events``, int64, has ``(t B + b) K + source`` for a spike of step ``start + t`` after the ring was made, of batch
        row ``b``. That step is at most R steps before the next one whose sums are taken.
        """

    def sparse_block(
        self,
        net: SparseNetwork,
        ring: Tensor,
        start: int,
        x: Tensor,
        drive: Tensor | None,
        state: Tensor,
        out: Outputs,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Simulate a block from ``state [F, B, N]``, ``start`` steps after the ring was made; returns the state after it.

        Take what arrives from the ring, and add to it what the spikes of the block send. The input's ``drive [2, t, B, N]``
        comes from ``x [t, B, I]`` if it is None: through ``net.inputs``, or through the dense ``net.input_rows`` as
        :meth:`project_events` has it. There is none if both are None as well.

        Through ``net.inputs``, where the greatest magnitude in a row ``x[t, b]`` is more than 1, the grid of that row's sums
        is coarser by the least power of two that is not below it. A row with a value that is not finite drives all neurons
        with NaN.

        Fill the spikes, words and states of ``out`` that are there. With ``chosen [K]``, ascending indices into the neurons
        of all rows, the states are theirs alone, ``[F, t, K]``.
        """

    def sparse_backward_block(
        self,
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
        """Replay a block of ``t`` steps from ``state [F, B, N]`` and a new ``ring``, and go back through it.

        The replay has the spikes in ``words``, int32 ``[ceil(t / 32), B, N]``, whatever the potentials are. ``grad_spikes
        [t, B, N]`` is the incoming gradient by the spikes, ``grad_states [F, t, B, N]`` that by the states *before* the
        steps; both of the compute dtype.

        ``adjoints [t + R, B, 2, N]``: the gradients by the excitatory and by the inhibitory drive of every step. Those of
        the R steps after the block are there, fill those of the block. Without dense weights of inputs only the first R rows
        are read.

        Carry on ``sweep.lam`` and ``sweep.sums``. Add the block's part to ``sweep.recurrent`` and ``sweep.inputs``, and fill
        ``grad_x [t, B, I]``, of the compute dtype: these three if they are there. A weight of 0 has no gradient, as neither
        sign has.
        """

    def sparse_history_gradient(
        self, net: SparseNetwork, history: Tensor, adjoints: Tensor, grad_history: Tensor, sweep: SparseSweep
    ) -> None:
        """Fill ``grad_history [t, B, K]`` from the ``adjoints [R, B, 2, N]`` of the R steps after the ``history [t, B, K]``.

        Add what the values of the history add to ``sweep.recurrent``, if it is there.
        """
