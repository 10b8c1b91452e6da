"""What an operator is called with: checked at its entry, as kernels would read and write past the end of what is too small.

The public functions pass what fits. An exported program or a script that calls ``torch.ops.coba_triton`` may not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend.choose import LAUNCHERS
from ..neuron.surrogate import SURROGATES
from .call import DIFFERENTIABLE, Asked, Call, grouper
from .tensors import SPIKES
from .time_blocks import PATHS
from .validation import check_block_steps, check_path, check_time_chunks

INPUT = SPIKES
COMPUTE = (torch.float32, torch.float64)
WORDS = (torch.int32,)


class Operand(NamedTuple):
    """A tensor of an operator, what it must look like, whether it is written to, and whether it may be None."""

    name: str
    tensor: Tensor | None
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    written: bool = False
    optional: bool = False


def rank(tensor: Tensor | None) -> int:
    """The number of axes, none of what is not there."""
    return tensor.dim() if tensor is not None else 0


def rows_of(tensor: Tensor | None, least: int) -> int:
    """The rows that a tensor has, or those that it must have at the least."""
    rows: int = torch.sym_max(tensor.shape[0], least) if tensor is not None and tensor.dim() else least
    return rows


def fields_of(state: Tensor) -> int:
    """The number of fields of a state ``[F, ...]``, or the least that it must have."""
    return DIFFERENTIABLE + 1 if rank(state) and state.shape[0] == DIFFERENTIABLE + 1 else DIFFERENTIABLE


def check_call(call: Call) -> None:
    """What an operator takes beside tensors."""
    backend, spike_dtype, every = call.backend, call.spike_dtype, call.checkpoint_every
    if backend not in LAUNCHERS:
        raise ValueError(f"backend must be 'triton' or 'cpu', got {backend!r}; the reference is no operator")
    if call.method not in SURROGATES:
        raise ValueError(f"method must be one of {', '.join(map(repr, SURROGATES))}, got {call.method!r}")
    if spike_dtype is not None and spike_dtype not in SPIKES:
        raise ValueError(f"spike_dtype must be None for packed spikes or one of {_words(SPIKES)}, got {spike_dtype}")
    if every not in (1, 2, 4, 8, 16, 32, 64) or (every == 64 and backend == "triton"):
        raise ValueError(f"checkpoint_every must be a power of two up to {64 if backend == 'cpu' else 32}, got {every}")
    check_path(call.path, PATHS)
    check_block_steps(call.block_steps)
    check_time_chunks(call.time_chunks)


def check_asked(asked: Asked, rows: int) -> None:
    """What a backward operator is asked for; ``rows``: of the batch."""
    if asked.samples < 1 or rows % asked.samples:
        raise ValueError(f"samples must divide the rows of the batch, {rows}, got {asked.samples}")
    if asked.fields not in (DIFFERENTIABLE, DIFFERENTIABLE + 1):
        raise ValueError(f"fields must be {DIFFERENTIABLE} or {DIFFERENTIABLE + 1}, got {asked.fields}")


def checked(
    groups: tuple[Callable[..., Any], ...],
    operands: Callable[..., Iterator[Operand]],
    function: Callable[..., Any],
    with_data: bool,
) -> Callable[..., Any]:
    """``function`` as an operator, which takes its arguments one by one, and refuses those that do not fit.

    Args:
        groups: the records of an operator's arguments, see :func:`coba_triton.ops.call.grouper`.
        operands: what there is to check. It takes those records, and yields the input first, on whose device all other
            tensors must be. It may assume of each tensor that those before it fit.
        function: takes those records.
        with_data: whether there is something to read, and sizes are numbers. A compiler may know less of a size: what it
            cannot tell to be wrong is looked at when the compiled program runs.
    """
    fits = torch.Size.__eq__ if with_data else _may_fit
    records_of, call_at = grouper(groups), groups.index(Call)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if args[0] is None:  # which PyTorch lets pass for a tensor
            raise TypeError("x must be a tensor, got None")
        records = records_of(args)
        device = args[0].device
        if with_data and device.type != "cpu" and records[call_at].backend == "cpu":
            raise ValueError(f"backend 'cpu' serves tensors on 'cpu', got x on {str(device)!r}; pass backend='triton'")
        check_call(records[call_at])
        for name, tensor, shape, dtypes, written, optional in operands(*records):
            if tensor is None and optional:
                continue
            if tensor is None:
                raise TypeError(f"{name} must be a tensor, got None")
            well = fits(tensor.shape, shape) and tensor.dtype in dtypes and tensor.device == device
            if not well or tensor.layout is not torch.strided or (written and not tensor.is_contiguous()):
                raise ValueError(
                    f"{name} must be {'contiguous' if written else 'dense'} {_words(dtypes)} {list(shape)} on "
                    f"{str(device)!r} to fit the others, got {_layout(tensor)} {tensor.dtype} {list(tensor.shape)} on "
                    f"{str(tensor.device)!r}; call the functions of coba_triton, which pass what fits"
                )
        return function(*records)

    return run


def _layout(tensor: Tensor) -> str:
    if tensor.layout is not torch.strided:
        return str(tensor.layout)
    return "contiguous" if tensor.is_contiguous() else "strided"


def _words(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(str, dtypes))


def _may_fit(found: torch.Size, wanted: tuple[Any, ...]) -> bool:
    """Whether sizes are not known to differ; asking for more would bind a compiled program to these sizes."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(found) == len(wanted) and not any(
        statically_known_true(size != other) for size, other in zip(found, wanted, strict=True)
    )
