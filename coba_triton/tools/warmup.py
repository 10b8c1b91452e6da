"""Compile the CPU kernels ahead of their first use."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from ..common.messages import messages_on_stderr
from ..functional import coba_lif_feed_forward_integral, coba_lif_integral
from ..modules import CobaLIF
from ..neuron.records import CobaLIFParameters, default_learning_parameters
from ..ops.constants import constants_table
from ..ops.random_synapses import Normal
from ..ops.synapses import Synapses
from ..stream.record import Record
from ..stream.simulation import simulate
from ..stream.sources import PoissonSource


def warmup(
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    *,
    train: bool = True,
    per_neuron: bool = False,
    method: str | None = None,
) -> None:
    """Compile the CPU kernels now instead of at their first call, and say so on standard error.

    It takes a minute or two, once: the code is kept on the disk, and later processes load it. Of networks with sparse
    synapses or delays, it compiles the kernels for float32: with and without a refractory period, for sums of 32 and of 64
    bits, and in training those that learn weights. It compiles what draws random synapses and Poisson spikes as well.

    What is rarer is still compiled at its first call: gradients by the parameters, sparse networks in float64, and the
    remaining combinations of options.

    Args:
        dtypes: dtypes of state and arithmetic, ``torch.float32`` or ``torch.float64``.
        train: whether to compile the backward kernels too.
        per_neuron: whether the parameters are tensors over the neurons instead of single numbers.
        method: the surrogate derivative of the backward; None for both defaults, the functions' and the modules'.

    Example:
        >>> coba_triton.warmup(train=False)
    """
    defaults = CobaLIFParameters().method, default_learning_parameters.method
    with messages_on_stderr():
        for dtype in dtypes:
            if dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"dtypes must be torch.float32 or torch.float64, got {dtype}; half precision computes in float32"
                )
            v_rest = torch.zeros(2, dtype=dtype) if per_neuron else 0.0
            for each in defaults if method is None else (method,):
                p = CobaLIFParameters(v_rest=v_rest, method=each)
                _warm_up_dense(p, dtype, train)
                if dtype == torch.float32:
                    _warm_up_synapses(p, train)
            if dtype == torch.float32:  # the kernels of a long run check only float32 input while they read it
                x = torch.zeros(1, 2)
                _warm_up_streams(constants_table(p, 1.0, dtype, x.device, x.shape[1:]), x)
        _warm_up_draws()


def _warm_up_dense(p: CobaLIFParameters, dtype: torch.dtype, train: bool) -> None:
    """Compile the kernels of unconnected neurons and of dense weights."""
    from ..backend.cpu.launch import add_products, fires_often, project_events

    x = torch.zeros(1, 1, 2, dtype=dtype, requires_grad=train)
    weights = torch.zeros(2, 2, dtype=dtype)
    for spikes, _ in (
        coba_lif_feed_forward_integral(x, None, p, backend="cpu"),
        coba_lif_feed_forward_integral(x, None, p, backend="cpu", time_chunks=2),
        coba_lif_integral(x, None, weights, weights, p, backend="cpu"),
    ):
        if train:
            spikes.sum().backward()
    project_events(x.detach(), weights)
    fires_often(torch.zeros(1, dtype=torch.uint8))
    if train:
        add_products(torch.zeros(2, 2, dtype=dtype), x.detach()[0], x.detach()[0], True)


def _warm_up_streams(constants: Tensor, x: Tensor) -> None:
    """Compile the kernels that only a long run into a zarr group calls."""
    from ..backend.cpu.launch import ForwardStream, lanes, row_sums

    with closing(ForwardStream(constants, False, x.new_zeros(3, x.shape[1]), len(x))) as stream:
        for job in stream.submit(x, torch.empty(1, x.shape[1], dtype=torch.int32), lanes(x.shape[1]))[1]:
            job.result()
    row_sums(x)


def _warm_up_synapses(p: CobaLIFParameters, train: bool) -> None:
    """Compile the kernels of sparse networks. Sums have 32 bits where these hold all weights, unless weights are learned."""
    from ..backend.cpu.magnitudes import magnitudes_of
    from ..backend.cpu.sorting import order_of
    from ..backend.cpu.sparse import splits_kernel

    x = torch.zeros(1, 1, 2)
    inputs = Synapses.from_coo([0, 1], [0, 1], 1.0, shape=(2, 2))
    for refractory, weights in itertools.product((0.0, 1.0), ((1.0, 1.0), (1.0, 1e-9))):
        recurrent = Synapses.from_coo([0, 1], [1, 0], torch.tensor(weights), shape=(2, 2))
        coba_lif_integral(x, None, inputs, recurrent, p._replace(refractory=refractory), backend="cpu")
    for refractory in (0.0, 1.0) if train else ():
        learned = inputs.with_weights(torch.ones(2, requires_grad=True))
        spikes, _ = coba_lif_integral(x, None, learned, learned, p._replace(refractory=refractory), backend="cpu")
        spikes.sum().backward()
    indptr, targets = inputs.indptr.numpy(), inputs.targets.numpy()  # of threads that share a batch row
    splits_kernel()(indptr, targets, np.arange(2), np.empty((2, 2), np.int64))
    order_of(np.zeros(2, np.int64), np.zeros(2, np.int64), 1, 1)  # of larger networks
    for dtype in (np.float32, np.float64):
        magnitudes_of(np.zeros(1, dtype), np.arange(2), np.zeros(1, np.int32), 1, np.ones(2))


def _warm_up_draws() -> None:
    """Compile what draws random synapses and Poisson spikes, and what counts spikes."""
    weight = Normal(1.0, 0.1)
    Synapses.fixed_probability(2, 2, 0.5, weight, seed=1)
    Synapses.fixed_number(2, 2, 1, weight, seed=1, per="source")
    source = PoissonSource(1.0, 1, (2,), CobaLIF().dt)
    simulate(CobaLIF(), source, record=Record(populations={"all": range(2)}), progress=False)
