"""Compile the CPU kernels ahead of their first use."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import torch
from torch import Tensor

from ..backend.choose import logger
from ..functional import coba_lif_feed_forward_integral, coba_lif_integral
from ..neuron.records import CobaLIFParameters
from ..ops.constants import constants_table


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Within the block, write the package's messages, for example that it compiles, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("coba_triton: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def warmup(
    dtypes: Sequence[torch.dtype] = (torch.float32,), *, train: bool = True, per_neuron: bool = False, method: str = "super"
) -> None:
    """Compile the CPU kernels now instead of at their first call, and say so on standard error.

    It takes some seconds, once: the code is kept on the disk, and later processes load it.

    Args:
        dtypes: dtypes of state and arithmetic, ``torch.float32`` or ``torch.float64``.
        train: whether to compile the backward kernels too. Those that give gradients by the parameters are still compiled
            at their first call.
        per_neuron: whether the parameters are tensors over the neurons instead of single numbers.
        method: the surrogate derivative of the backward.

    Example:
        >>> coba_triton.warmup(train=False)
    """
    with messages_on_stderr():
        for dtype in dtypes:
            if dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"dtypes must be torch.float32 or torch.float64, got {dtype}; half precision computes in float32"
                )
            x = torch.zeros(1, 1, 2, dtype=dtype, requires_grad=train)
            weights = torch.zeros(2, 2, dtype=dtype)
            v_rest = torch.zeros(2, dtype=dtype) if per_neuron else 0.0
            p = CobaLIFParameters(v_rest=v_rest, method=method)
            for spikes, _ in (
                coba_lif_feed_forward_integral(x, None, p, backend="cpu"),
                coba_lif_integral(x, None, weights, weights, p, backend="cpu"),
            ):
                if train:
                    spikes.sum().backward()
            if dtype == torch.float32:  # the kernels of a long run check only float32 input while they read it
                _warm_up_streams(constants_table(p, 1.0, dtype, x.device, x.shape[2:]), x.detach()[0])


def _warm_up_streams(constants: Tensor, x: Tensor) -> None:
    """Compile the kernels that only a long run into a zarr group calls."""
    from ..backend.cpu.launch import ForwardStream, lanes, row_sums

    with closing(ForwardStream(constants, False, x.new_zeros(3, x.shape[1]), len(x))) as stream:
        for job in stream.submit(x, torch.empty(1, x.shape[1], dtype=torch.int32), lanes(x.shape[1]))[1]:
            job.result()
    row_sums(x)
