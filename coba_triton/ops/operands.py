"""What an operator is called with: checked at its entry, as kernels would read and write past the end of what is too small.

The public functions pass what fits. An exported program or a script that calls ``torch.ops.coba_triton`` may not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..neuron.surrogate import SURROGATES
from .tensors import SPIKES

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


def check_options(backend: str, method: str = "super", spike_dtype: torch.dtype | None = None, every: int = 1) -> None:
    """What an operator takes beside tensors."""
    if backend not in ("triton", "cpu"):
        raise ValueError(f"backend must be 'triton' or 'cpu', got {backend!r}; the reference is no operator")
    if method not in SURROGATES:
        raise ValueError(f"method must be one of {', '.join(map(repr, SURROGATES))}, got {method!r}")
    if spike_dtype is not None and spike_dtype not in SPIKES:
        raise ValueError(f"spike_dtype must be None for packed spikes or one of {_words(SPIKES)}, got {spike_dtype}")
    if every not in (1, 2, 4, 8, 16, 32, 64) or (every == 64 and backend == "triton"):
        raise ValueError(f"checkpoint_every must be a power of two up to {64 if backend == 'cpu' else 32}, got {every}")


def checked(operands: Callable[..., Iterator[Operand]], function: Callable[..., Any], with_data: bool) -> Callable[..., Any]:
    """``function``, an operator's, that refuses what does not fit.

    Args:
        operands: of the operator's arguments, the input first, whose device all others must be on. It may assume of each
            tensor that those before it fit.
        function: takes the operator's arguments.
        with_data: whether there is something to read, and sizes are numbers. A compiler may know less of a size: what it
            cannot tell to be wrong is looked at when the compiled program runs.
    """
    fits = torch.Size.__eq__ if with_data else _may_fit

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if args[0] is None:  # which PyTorch lets pass for a tensor
            raise TypeError("x must be a tensor, got None")
        device = args[0].device
        if with_data and device.type != "cpu" and any(isinstance(arg, str) and arg == "cpu" for arg in args):
            raise ValueError(f"backend 'cpu' serves tensors on 'cpu', got x on {str(device)!r}; pass backend='triton'")
        for name, tensor, shape, dtypes, written, optional in operands(*args):
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
        return function(*args)

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
