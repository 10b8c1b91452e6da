"""What a person gives for synapses: arrays and numbers of many kinds, checked and made tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tensors import as_in_memory, is_tracked
from .validation import check_floating, check_int, check_not_nested

MOST = 2**31 - 1  # sources, and neurons


def check_shape(shape: Any) -> tuple[int, int]:
    """N and K."""
    if isinstance(shape, str) or not isinstance(shape, Sequence) or len(shape) != 2:
        raise TypeError(
            f"shape must be (N, K), the numbers of neurons and of sources, got {shape!r:.200}; pass a pair of ints"
        )
    neurons, sources = shape
    return check_int(neurons, "N", 0, MOST), check_int(sources, "K", 0, MOST)


def device_of(named: dict[str, Any]) -> torch.device:
    """Where the tensors with axes are, else the CPU."""
    found = {name: value.device for name, value in named.items() if isinstance(value, Tensor) and value.dim() > 0}
    if len(set(found.values())) > 1:
        got = ", ".join(f"{name} on {str(device)!r}" for name, device in found.items())
        raise ValueError(f"all tensors must be on one device, got {got}; move them with .to(device)")
    return next(iter(found.values()), torch.device("cpu"))


def array_of(value: Any, name: str) -> Any:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise TypeError(f"{name} must be a tensor, an array or a list, got {type(value).__name__} ({error})") from None


def indices(value: Any, name: str, device: torch.device) -> Tensor:
    """int64 ``[S]`` from a tensor, an array or a list."""
    if not isinstance(value, Tensor):
        array = array_of(value, name)
        array = array if array.size else array.astype(np.int64)
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers, got {array.dtype}; use numpy.asarray(..., dtype=numpy.int64)")
        value = torch.from_numpy(array.astype(np.int64))
    check_not_nested(value, name)
    if value.layout is not torch.strided or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got a tensor of {value.dtype}, {value.layout}; use .long()")
    if value.dim() != 1:
        raise ValueError(f"{name} must be one index for each synapse, got shape {list(value.shape)}; use .flatten()")
    return torch.as_tensor(as_in_memory(value), dtype=torch.int64, device=device)


def check_range(indices: Tensor, name: str, size: str, most: int) -> None:
    low, high = limits(indices)
    if indices.numel() and not (low >= 0 and high < most):
        raise ValueError(
            f"{name} must be from 0 to {size} - 1 = {most - 1}, got {int(low if low < 0 else high)}; correct "
            "them, or shape=(N, K)"
        )


def to_tensor(value: Any, name: str, device: torch.device) -> Tensor:
    """A floating tensor from a tensor, an array, a list or a number; what is a tensor is the same one."""
    if isinstance(value, Tensor):
        check_not_nested(value, name)
        if value.layout is not torch.strided:
            raise TypeError(f"{name} must be dense, got {value.layout}; use .to_dense(), or from_torch for a matrix")
        check_floating(value, name)
        return as_in_memory(value).to(device)
    array = array_of(value, name)
    if array.dtype.kind not in "fiu" or (array.dtype.kind != "f" and isinstance(value, np.ndarray) and value.size):
        raise TypeError(f"{name} must be real numbers, got {array.dtype}; use numbers, or an array of a floating dtype")
    keeps = isinstance(value, np.ndarray) and array.dtype.itemsize in (2, 4, 8) and array.dtype.kind == "f"
    dtype = None if keeps else torch.float64 if array.dtype.itemsize > 8 else torch.get_default_dtype()
    plain = np.array(array, dtype=array.dtype.newbyteorder("=") if keeps else np.float64)
    with np.errstate(over="ignore"):
        return torch.from_numpy(plain).to(device=device, dtype=dtype)


def values_of(value: Any, name: str, count: int, sources: int, device: torch.device) -> Tensor:
    """A floating tensor ``[S]``, ``[K, 1]`` or ``[1]``."""
    values = to_tensor(value, name, device)
    values = values.reshape(1) if values.dim() == 0 else values
    if values.shape not in ((1,), (count,), (sources, 1)):
        raise ValueError(
            f"{name} must be one number, one for each of S={count} synapses [{count}] or of K={sources} sources "
            f"[{sources}, 1], got shape {list(values.shape)}; pass one number to share it"
        )
    return values


def limits(values: Tensor) -> tuple[float, float]:
    """The least and the greatest number, NaN if there is one; 0 and 0 of none."""
    if not values.numel():
        return 0.0, 0.0
    low, high = torch.stack(torch.aminmax(values.detach())).tolist()
    return low, high


def example(values: Tensor) -> float:
    """A number that is not finite, of values that have one."""
    flat = values.detach().flatten()
    return float(flat[~torch.isfinite(flat)][0])


def delays_of(delays: Tensor, name: str) -> tuple[Tensor, float, float]:
    """Delays in ms as float32, the shortest and the longest one, after a look at every number."""
    if is_tracked(delays):
        raise ValueError(f"{name} must not require a gradient, got a tensor that does; pass .detach()")
    delays = delays.detach().to(torch.float32)
    shortest, longest = limits(delays)
    if not (math.isfinite(shortest) and math.isfinite(longest)):
        raise ValueError(f"{name} must be finite, got {example(delays)}; correct the numbers where they come from")
    if shortest < 0:
        raise ValueError(f"{name} must not be negative, got {shortest:g} ms; correct its sign")
    return delays, shortest, longest
