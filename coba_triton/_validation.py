"""Every check of what a user passes: messages say what, expected, got, and the way out."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Collection, Iterable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .model import NUMERIC_PARAMETERS, is_tracked, number_key
from .spikes import WORD_BITS
from .surrogate import SURROGATES

ORDERS = ("decay_first", "jump_first")
SpikeDtype = torch.dtype | Literal["bits"] | None


def check_dt(dt: Any) -> None:
    if isinstance(dt, bool) or not isinstance(dt, numbers.Real):
        raise TypeError(f"dt must be a positive finite number of ms, got {type(dt).__name__}; pass a Python float")
    # a compiler that looked at the value would compile again for every other one
    if not torch.compiler.is_compiling() and not (math.isfinite(dt) and float(dt) > 0):
        raise ValueError(f"dt must be a positive finite number of ms, got {dt!r}")


def check_order(order: Any) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be 'decay_first' or 'jump_first' (norse's feed-forward step), got {order!r}")


def check_path(path: Any, paths: tuple[str, ...]) -> None:
    if path not in paths:
        raise ValueError(f"path must be one of {', '.join(map(repr, paths))}, got {path!r}")


_accepted: set[tuple[bytes, Any]] = set()


def check_parameters(p: Any) -> None:
    """A record of parameters with numbers and a method; one of Python numbers alone is looked at once."""
    if (key := number_key(p)) is not None and (key, p.method) in _accepted:
        return
    missing = [name for name in (*NUMERIC_PARAMETERS, "method") if not hasattr(p, name)]
    if missing:
        raise TypeError(
            f"parameters must have the fields of CobaLIFParameters, got {type(p).__name__} without "
            f"{', '.join(missing)}; build them with CobaLIFParameters(...)"
        )
    if p.method not in SURROGATES:
        raise ValueError(f"method must be one of {', '.join(map(repr, SURROGATES))}, got {p.method!r}")
    for name in NUMERIC_PARAMETERS:
        check_number(getattr(p, name), name)
    if key is not None and len(_accepted) < 1024:
        _accepted.add((key, p.method))


def check_number(value: Any, name: str) -> None:
    """A real Python number or a real tensor."""
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} must be a real number or tensor, got a tensor of {value.dtype}; use .float()")
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name} must be a real number or a torch.Tensor, got {type(value).__name__}; wrap arrays in torch.as_tensor"
        )


LEARNABLE = tuple(name for name in NUMERIC_PARAMETERS if name != "alpha")


def check_learn(learn: Any, p: Any) -> None:
    """``learn`` names numbers that can take a gradient, and all that require one; ``p`` is a checked record."""
    if isinstance(learn, str) or not isinstance(learn, Collection):
        example = learn if isinstance(learn, str) else "v_thresh"
        raise TypeError(f"learn must be a tuple of parameter names, got {learn!r}; pass learn=({example!r},)")
    for name in learn:
        if name not in LEARNABLE:
            raise ValueError(
                f"learn must name parameters among {', '.join(LEARNABLE)}, got {name!r}; leave it out, and set its "
                "value in p"
            )
    for name in LEARNABLE:
        value = getattr(p, name)
        if name not in learn and isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} must be in learn to get a gradient, got learn={tuple(learn)}; add it, or pass a tensor that "
                "does not require grad"
            )


def check_size(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a positive int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be a positive int, got {value}")


def check_neurons(chosen: Any, count: int, name: str) -> NDArray[np.int64]:
    """Indices of the neurons that a slice, a range, indices (negative ones from the end) or a mask of all of them choose."""
    try:
        which = chosen if isinstance(chosen, slice) else np.atleast_1d(np.asarray(chosen))
        if not isinstance(which, slice):
            which = which if which.size else which.astype(np.int64)
            if which.ndim > 1:
                raise ValueError("they have several axes")
        return np.arange(count)[which]
    except (IndexError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be indices from 0 to {count - 1} (negative ones count from the end) or one boolean for each of "
            f"{count} neurons, all their axes as one, got {chosen!r:.200} ({error})"
        ) from None


def check_input(x: Any, axes: str, rank: int) -> None:
    """``axes`` shows the layout to the user, ``rank`` is the number of axes it has at least."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"input_tensor must be a torch.Tensor {axes}, got {type(x).__name__}; wrap arrays in torch.as_tensor"
        )
    if x.is_complex():
        raise TypeError(f"input_tensor must be real, spikes as bool or integers, got {x.dtype}; use .real")
    if x.dim() < rank:
        raise ValueError(f"input_tensor must be {axes}, got shape {list(x.shape)}; add the missing axes by reshape")


def check_state(state: Any, fields: tuple[str, ...], device: torch.device) -> None:
    missing = [name for name in fields if not hasattr(state, name)]
    if missing:
        raise TypeError(
            f"state must have the fields {', '.join(fields)}, got {type(state).__name__} without {', '.join(missing)}; "
            "pass None to start at rest"
        )
    for name in fields:
        value = getattr(state, name)
        check_number(value, f"state.{name}")
        check_device(value, f"state.{name}", device)


def check_device(value: Any, name: str, device: torch.device) -> None:
    """A tensor with axes must be where the input is; single numbers may be anywhere."""
    if isinstance(value, Tensor) and value.dim() > 0 and value.device != device:
        raise ValueError(
            f"{name} must be on the input's device {str(device)!r}, got {str(value.device)!r}; "
            f"move it with .to({str(device)!r})"
        )


def check_weights(input_weights: Any, recurrent_weights: Any, x: Tensor, inputs: int) -> None:
    for name, weights in (("input_weights", input_weights), ("recurrent_weights", recurrent_weights)):
        if not isinstance(weights, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(weights).__name__}; use torch.as_tensor")
        if not weights.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {weights.dtype}; use .float()")
        if weights.dim() != 2:
            raise ValueError(f"{name} must be a matrix, rows post-synaptic, got shape {list(weights.shape)}")
        check_device(weights, name, x.device)
    neurons = input_weights.shape[0]
    if input_weights.shape[1] != inputs:
        raise ValueError(
            f"input_weights must be [N, I]=[{neurons}, {inputs}] for an input of I={inputs}, got "
            f"{list(input_weights.shape)}; transpose it or change the input"
        )
    if recurrent_weights.shape != (neurons, neurons):
        raise ValueError(
            f"recurrent_weights must be [N, N]=[{neurons}, {neurons}] like input_weights [N, I]="
            f"{list(input_weights.shape)}, got {list(recurrent_weights.shape)}"
        )


def broadcast_neurons(base: Iterable[int], named: dict[str, Any], grows: bool = True) -> torch.Size:
    """The neurons' shape: ``base`` broadcast with every named tensor; ``grows`` allows it to become larger."""
    shape = torch.Size(base)
    for name, value in named.items():
        if not isinstance(value, Tensor) or value.shape in ((), shape):
            continue  # the rule below takes PyTorch 20 us a tensor
        try:
            together = torch.broadcast_shapes(shape, value.shape)
        except RuntimeError:
            together = None
        if together is None or (not grows and together != shape):
            raise ValueError(
                f"{name} must broadcast to the neurons {list(shape)}, got {list(value.shape)}; pass one number to share it"
            )
        shape = together
    return shape


def check_spike_dtype(spike_dtype: Any, block_steps: int | None) -> None:
    if spike_dtype == "bits":
        if block_steps is not None and block_steps % WORD_BITS:
            raise ValueError(f"block_steps must be a multiple of {WORD_BITS} for spike_dtype='bits', got {block_steps}")
    elif spike_dtype is not None and not (
        isinstance(spike_dtype, torch.dtype) and (spike_dtype.is_floating_point or spike_dtype in (torch.bool, torch.uint8))
    ):
        raise ValueError(
            f"spike_dtype must be a floating dtype, torch.bool, torch.uint8, 'bits' or None for the input's, got "
            f"{spike_dtype!r}"
        )


def check_out(out: Any, shape: torch.Size, dtype: torch.dtype, inputs: Iterable[Any]) -> None:
    """``out`` is a buffer for spikes of this shape and dtype, and nothing that it would overwrite or cut off."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor or None, got {type(out).__name__}; use torch.empty")
    x, *others = inputs
    if (out.shape, out.dtype, out.device) != (shape, dtype, x.device) or not out.is_contiguous():
        layout = "contiguous" if out.is_contiguous() else "strided"
        raise ValueError(
            f"out must be contiguous {dtype} {list(shape)} on {str(x.device)!r} for this input and spike_dtype, got "
            f"{layout} {out.dtype} {list(out.shape)} on {str(out.device)!r}; make it with torch.empty"
        )
    if torch._C._are_functorch_transforms_active():
        raise ValueError("out takes the spikes of a plain call, got one within a torch.func transform; leave out= away")
    if out.numel() and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        raise ValueError("out must not share memory with input_tensor, got a view of it; use a buffer of its own")
    if any(isinstance(value, Tensor) and is_tracked(value) for value in (out, x, *others)):
        raise ValueError(
            "out takes spikes that no gradient flows through, got arguments that require one; call under "
            "torch.no_grad(), or leave out= away"
        )


def check_block_steps(block_steps: Any) -> None:
    if block_steps is None:
        return
    if isinstance(block_steps, bool) or not isinstance(block_steps, int):
        raise TypeError(f"block_steps must be a positive int or None, got {type(block_steps).__name__}")
    if block_steps < 1:
        raise ValueError(f"block_steps must be a positive int or None for one block, got {block_steps}")


_stability_checked: set[tuple[Any, ...]] = set()


def warn_if_unstable(p: Any, dt: float, g_e: Any, g_i: Any) -> None:
    """Warn once for each kind of parameters if the Euler step diverges at the given conductances.

    The step multiplies ``v`` by ``1 - dt c_m_inv (g_l + g_e + g_i)``, which grows without bound where it is below -1.
    Looked at once for each ``dt`` and parameters (tensors count by their shape), as it must read tensors back.
    """
    if torch.compiler.is_compiling():
        return
    rates = (p.c_m_inv, p.g_l)
    key = (dt, *(tuple(r.shape) if isinstance(r, Tensor) else r for r in rates))
    if key in _stability_checked:
        return
    with torch.no_grad():
        c_m_inv, g_l, g_e, g_i = (torch.as_tensor(value).detach().double().cpu() for value in (*rates, g_e, g_i))
        factor = dt * c_m_inv * (g_l + g_e + g_i)
        try:
            largest = float(factor.max()) if factor.numel() else 0.0
        except RuntimeError:  # torch.func.vmap cannot read back
            return
    _stability_checked.add(key)
    if largest > 2:
        warnings.warn(
            f"the Euler step is unstable: dt * c_m_inv * (g_l + g_e + g_i) is {largest:.3g} at the given state, more "
            f"than 2; make dt smaller than {dt * 2 / largest:.3g}",
            stacklevel=3,
        )
