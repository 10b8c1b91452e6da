"""Every check of what a user passes: messages say what, expected, got, and the way out."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Collection, Iterable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common.warned import warn
from ..neuron.records import FIXED_PARAMETERS, NUMERIC_PARAMETERS, OPTIONAL_PARAMETERS, numbers_of
from ..neuron.surrogate import SURROGATES
from .spikes import WORD_BITS
from .tensors import FLOATING, NUMBERS, SPIKES, is_tracked, number_key

ORDERS = ("decay_first", "jump_first")
SpikeDtype = torch.dtype | Literal["bits"] | None


def check_dt(dt: Any) -> float:
    return check_time(dt, "dt")


def check_time(time: Any, name: str) -> float:
    """A positive number of ms as a Python float: one of numpy's would take a product with a tensor for its own."""
    if type(time) is float and not torch.compiler.is_compiling() and 0.0 < time < math.inf:
        return time
    if isinstance(time, bool) or not isinstance(time, numbers.Real):
        raise TypeError(f"{name} must be a positive finite number of ms, got {type(time).__name__}; pass a Python float")
    if torch.compiler.is_compiling():  # it would compile again for every other value that is looked at
        return time  # type: ignore[return-value]  # a Real here, a float for every caller
    if not (_is_finite(time) and float(time) > 0):
        raise ValueError(f"{name} must be a positive finite number of ms, got {time!r:.50}")
    return float(time)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no double can hold
        return False


def is_one_of(value: Any, known: Collection[str]) -> bool:
    """Whether a value is one of some words; of an array, ``in`` alone has no answer."""
    return isinstance(value, str) and value in known


def check_flag(value: Any, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_order(order: Any) -> None:
    if not is_one_of(order, ORDERS):
        raise ValueError(f"order must be 'decay_first' or 'jump_first' (norse's feed-forward step), got {order!r:.200}")


def check_path(path: Any, paths: tuple[str, ...]) -> None:
    if not is_one_of(path, paths):
        raise ValueError(f"path must be one of {', '.join(map(repr, paths))}, got {path!r:.200}")


def check_not_nested(x: Tensor, name: str) -> None:
    """A tensor that has one size along each axis."""
    if x.is_nested:
        raise TypeError(f"{name} must be dense, got a nested tensor; use .to_padded_tensor(0.0)")


def check_floating(value: Tensor, name: str) -> None:
    """A tensor of a floating dtype that is computed with."""
    if value.dtype not in FLOATING:
        way_out = ".real" if value.is_complex() else ".float()"
        raise TypeError(f"{name} must be of a floating dtype of 16 bits or more, got {value.dtype}; use {way_out}")


def check_matrix(weights: Tensor, name: str) -> None:
    """A matrix of weights of any layout, rows post-synaptic."""
    check_not_nested(weights, name)
    check_floating(weights, name)
    if weights.dim() != 2:
        raise ValueError(
            f"{name} must be a matrix, rows post-synaptic, got shape {list(weights.shape)}; reshape it to one row for each "
            "neuron and one column for each source"
        )


def check_dense(x: Tensor, name: str) -> None:
    """A tensor of numbers, each in its own place in memory."""
    check_not_nested(x, name)
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got {x.layout}; use .to_dense()")
    if x.dtype not in NUMBERS:
        way_out = ".real" if x.is_complex() else ".float()"
        raise TypeError(
            f"{name} must be real, spikes as bool or integers, of a floating dtype of 16 bits or more, got {x.dtype}; use "
            f"{way_out}"
        )


_accepted: set[tuple[bytes, Any]] = set()


def check_parameters(p: Any) -> None:
    """A record of parameters with numbers and a method; one of Python numbers alone is looked at once."""
    if (key := number_key(p)) is not None and isinstance(p.method, str) and (key, p.method) in _accepted:
        return
    needed = (*(name for name in NUMERIC_PARAMETERS if name not in OPTIONAL_PARAMETERS), "method")
    missing = [name for name in needed if not hasattr(p, name)]
    if missing:
        raise TypeError(
            f"parameters must have the fields of CobaLIFParameters, got {type(p).__name__} without "
            f"{', '.join(missing)}; build them with CobaLIFParameters(...)"
        )
    if not is_one_of(p.method, SURROGATES):
        raise ValueError(f"method must be one of {', '.join(map(repr, SURROGATES))}, got {p.method!r:.200}")
    for name, value in numbers_of(p).items():
        check_number(value, name, name in NOT_NEGATIVE)
    if key is not None and len(_accepted) < 1024:
        _accepted.add((key, p.method))


NOT_NEGATIVE = ("tau_syn_exc_inv", "tau_syn_inh_inv", "c_m_inv", "g_l", "alpha", "refractory", "conductance_based")


def check_number(value: Any, name: str, not_negative: bool = False) -> None:
    """A real tensor, or a real Python number that is finite; to look at a tensor's numbers would wait for a GPU."""
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} must be a real number or tensor, got a tensor of {value.dtype}; use .float()")
        check_dense(value, name)
    elif isinstance(value, bool) or not isinstance(value, float | int | np.floating | np.integer):
        raise TypeError(
            f"{name} must be a real number or a torch.Tensor, got {type(value).__name__}; wrap arrays in torch.as_tensor"
        )
    elif not torch.compiler.is_compiling():  # see check_dt
        _check_finite(value, name, not_negative)


def _check_finite(value: Any, name: str, not_negative: bool, where: str = "") -> None:
    if not _is_finite(value):
        out = "; for neurons that never fire, pass one that they do not reach, such as 1e9" if name == "v_thresh" else ""
        got = float(value) if isinstance(value, float | np.floating) else f"{value!r:.50}"
        raise ValueError(f"{name} must be finite, got {got}{where}{out or '; correct it where it comes from'}")
    if not_negative and value < 0:
        raise ValueError(f"{name} must not be negative, got {float(value)}{where}; correct its sign")


def check_numbers(named: dict[str, Any]) -> None:
    """The same of every number of tensors, which it reads back."""
    for name, value in named.items():
        tensor, not_negative = torch.as_tensor(value).detach(), name in NOT_NEGATIVE
        wrong = ~torch.isfinite(tensor)
        if not_negative:
            wrong |= tensor < 0
        for index in wrong.nonzero()[:1].tolist():
            _check_finite(tensor[tuple(index)].item(), name, not_negative, f" at {index}" if index else "")


LEARNABLE = tuple(name for name in NUMERIC_PARAMETERS if name not in FIXED_PARAMETERS)


def check_learn(learn: Any, p: Any) -> None:
    """``learn`` names numbers that can take a gradient, and all that require one; ``p`` is a checked record."""
    if isinstance(learn, str | Tensor) or not isinstance(learn, Collection):
        example = learn if isinstance(learn, str) else "v_thresh"
        raise TypeError(f"learn must be a tuple of parameter names, got {learn!r:.200}; pass learn=({example!r:.50},)")
    for name in learn:
        if not is_one_of(name, LEARNABLE):
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


def check_int(value: Any, name: str, least: int = 1, most: float = math.inf) -> int:
    """Any integer, also one of numpy's, as a Python int."""
    wanted = f"an int of at least {least}" if math.isinf(most) else f"an int from {least} to {most}"
    wanted = "a positive int" if (least, most) == (1, math.inf) else wanted
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
    number = int(value)
    if not least <= number <= most:
        raise ValueError(f"{name} must be {wanted}, got {number}")
    return number


def check_neurons(chosen: Any, count: int, name: str) -> NDArray[np.int64]:
    """Indices of the neurons that a slice, a range, indices (negative ones from the end) or a mask of all of them choose."""
    try:
        which = chosen if isinstance(chosen, slice) else np.atleast_1d(np.asarray(chosen))
        if not isinstance(which, slice):
            which = which if which.size else which.astype(np.int64)
            if which.ndim > 1:
                raise ValueError("they have several axes")
        return np.arange(count)[which]
    except (IndexError, OverflowError, RuntimeError, TypeError, ValueError) as error:
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
    check_dense(x, "input_tensor")
    if x.dim() < rank:
        raise ValueError(f"input_tensor must be {axes}, got shape {list(x.shape)}; add the missing axes by reshape")


def check_state(state: Any, fields: tuple[str, ...], device: torch.device) -> None:
    missing = [name for name in fields if not hasattr(state, name)]
    if missing:
        raise TypeError(
            f"state must have the fields {', '.join(fields)}, got {type(state).__name__} without {', '.join(missing)}; "
            "pass None to start at rest"
        )
    for name in fields if not hasattr(state, "left") else (*fields, "left"):
        value = getattr(state, name)
        check_number(value, f"state.{name}", name in ("g_e", "g_i", "left"))
        check_device(value, f"state.{name}", device)


def check_history(history: Any, neurons: torch.Size, device: torch.device) -> None:
    """The spikes that are under way at the beginning, ``[D, *batch, N]``; a number or ``[N]`` holds for all steps alike."""
    check_number(history, "state.history")
    if not isinstance(history, Tensor):
        return
    check_device(history, "state.history", device)
    shape, axes = history.shape, 1 + len(neurons)
    of_a_step = shape[1:] if history.dim() == axes else shape
    fits = history.dim() < 2 or (history.dim() == axes and shape[0] > 0)
    try:
        fits = fits and torch.broadcast_shapes(of_a_step, neurons) == neurons
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"state.history must be a number or [D, *batch, N], at least one step of neurons {list(neurons)}, got "
            f"{list(shape)}; pass that of a state which a call has returned, or 0.0 for no spikes under way"
        )


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
        check_matrix(weights, name)
        check_dense(weights, name)
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
            f"{list(input_weights.shape)}, got {list(recurrent_weights.shape)}; make both for the same neurons"
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
    if is_one_of(spike_dtype, ("bits",)):
        if block_steps is not None and block_steps % WORD_BITS:
            raise ValueError(f"block_steps must be a multiple of {WORD_BITS} for spike_dtype='bits', got {block_steps}")
    elif spike_dtype is not None and not (isinstance(spike_dtype, torch.dtype) and spike_dtype in SPIKES):
        raise ValueError(
            f"spike_dtype must be a floating dtype of 16 bits or more, torch.bool, torch.uint8, 'bits' or None for the "
            f"input's, got {spike_dtype!r:.200}"
        )


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    if tensor.is_contiguous() or not tensor.numel():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


def check_out(out: Any, shape: torch.Size, dtype: torch.dtype, inputs: dict[str, Any]) -> None:
    """``out`` is a buffer for spikes of this shape and dtype, and nothing that it would overwrite or cut off.

    ``inputs``: every argument by its name, ``input_tensor`` first.
    """
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor or None, got {type(out).__name__}; use torch.empty")
    check_dense(out, "out")
    if not torch.compiler.is_compiling() and out.is_neg():
        raise ValueError("out must be memory to write to, got a view with another sign than its memory; use torch.empty")
    device = inputs["input_tensor"].device
    if (out.shape, out.dtype, out.device) != (shape, dtype, device) or not out.is_contiguous():
        layout = "contiguous" if out.is_contiguous() else "strided"
        raise ValueError(
            f"out must be contiguous {dtype} {list(shape)} on {str(device)!r} for this input and spike_dtype, got "
            f"{layout} {out.dtype} {list(out.shape)} on {str(out.device)!r}; make it with torch.empty"
        )
    if torch._C._are_functorch_transforms_active():
        raise ValueError("out takes the spikes of a plain call, got one within a torch.func transform; leave out= away")
    if (
        out.numel() and not torch.compiler.is_compiling() and device.type != "meta"
    ):  # a compiler keeps memory apart by itself
        begin, end = out.data_ptr(), out.data_ptr() + out.nbytes
        for name, value in inputs.items():
            if not isinstance(value, Tensor) or value.device != device:
                continue
            at = value.data_ptr()
            if at < end and begin < at + _extent(value):
                raise ValueError(f"out must not share memory with {name}, got a view of it; use a buffer of its own")
    # parameters that are fixed take no gradient
    if is_tracked(out) or any(
        is_tracked(v) for name, v in inputs.items() if isinstance(v, Tensor) and name not in FIXED_PARAMETERS
    ):
        raise ValueError(
            "out takes spikes that no gradient flows through, got arguments that require one; call under "
            "torch.no_grad(), or leave out= away"
        )


def exports_to_onnx() -> bool:
    """Whether ``torch.onnx.export`` is at work."""
    exporter = sys.modules.get("torch.onnx")  # which it imports, and which takes 50 ms
    return exporter is not None and bool(exporter.is_in_onnx_export())


# A compiler that the exporter may use takes torch's own function for False. This is what the decorator
# torch.compiler.assume_constant_result does, which would import the compiler.
exports_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions declare none


def check_not_exported() -> None:
    """An ONNX file holds no sparse synapses and no delays."""
    if exports_to_onnx():
        raise RuntimeError(
            "an ONNX file needs dense weights without delays, got sparse synapses or delays, whose exact sums have no ONNX "
            "form; export a module with dense weights, and leave delay= away"
        )


def check_exported(backend: str) -> None:
    """What an ONNX file can hold."""
    if exports_to_onnx() and backend != "reference":
        raise RuntimeError(
            f"backend {backend!r} runs one operator for all steps, which has no ONNX form; export with backend='reference', "
            "whose steps become ordinary operations, for one length of the input"
        )


def check_block_steps(block_steps: Any) -> int | None:
    if block_steps is None:
        return None
    if isinstance(block_steps, bool) or not isinstance(block_steps, numbers.Integral):
        raise TypeError(f"block_steps must be a positive int or None, got {type(block_steps).__name__}")
    if block_steps < 1:
        raise ValueError(f"block_steps must be a positive int or None for one block, got {block_steps}")
    return int(block_steps)


def check_time_chunks(time_chunks: Any) -> int | None:
    if time_chunks is None:
        return None
    if isinstance(time_chunks, bool) or not isinstance(time_chunks, numbers.Integral):
        raise TypeError(f"time_chunks must be a positive int or None, got {type(time_chunks).__name__}")
    if time_chunks < 1:
        raise ValueError(
            f"time_chunks must be a positive int, 1 for a run in order, or None for a choice, got {time_chunks}"
        )
    return int(time_chunks)


_stability_checked: set[tuple[Any, ...]] = set()


def warn_if_unstable(p: Any, dt: float, g_e: Any = 0.0, g_i: Any = 0.0) -> None:
    """Warn once for each kind of parameters of what the Euler step makes of them at the given conductances.

    A step multiplies a conductance by ``1 - dt tau_syn_inv``, and the distance of ``v`` from where it is drawn to by
    ``1 - dt c_m_inv (g_l + g_e + g_i)``, or without ``g_e`` and ``g_i`` where they are currents: below 0 they change their
    sign in every step, below -1 they grow without bound.
    Looked at once for each ``dt`` and parameters (tensors count by their shape, and those on a GPU are not waited for).
    """
    if torch.compiler.is_compiling():
        return
    key = _stability_key(p, dt)
    if key in _stability_checked:
        return
    try:
        rates = p.tau_syn_exc_inv, p.tau_syn_inh_inv, p.c_m_inv, p.g_l
        excitatory, inhibitory, c_m_inv, g_l, *g = (_known(value) for value in (*rates, g_e, g_i))
        coupling = _known(getattr(p, "conductance_based", 1))
        found = {"tau_syn_exc_inv": excitatory, "tau_syn_inh_inv": inhibitory}
        if c_m_inv is not None and g_l is not None and coupling is not None:
            drawn = sum((coupling * known for known in g if known is not None), start=g_l)
            found["c_m_inv * (g_l + g_e + g_i)" if coupling.any() else "c_m_inv * g_l"] = c_m_inv * drawn
        factors = {name: dt * float(rate.max()) for name, rate in found.items() if rate is not None and rate.numel()}
    except RuntimeError:  # torch.func.vmap cannot read back
        return
    _stability_checked.add(key)
    for name, factor in factors.items():
        if factor > 1:
            where = " at the given state" if "g_e" in name else ""
            warn(
                f"{instability(factor)}: dt * {name} is {factor:.3g}{where}, more than {2 if factor > 2 else 1}; make dt "
                f"smaller than {dt / factor:.3g}"
            )


def _stability_key(p: Any, dt: float) -> tuple[Any, ...]:
    rates = p.tau_syn_exc_inv, p.tau_syn_inh_inv, p.c_m_inv, p.g_l, getattr(p, "conductance_based", 1)
    return (dt, *(tuple(rate.shape) if isinstance(rate, Tensor) else rate for rate in rates))


def skip_stability(p: Any, dt: float) -> None:
    """Do not look at this kind of parameters, as another one with their numbers was looked at."""
    _stability_checked.add(_stability_key(p, dt))


def instability(factor: float) -> str:
    """What the Euler step does where ``dt`` times a rate is more than 1."""
    return "the Euler step is unstable" if factor > 2 else "the Euler step overshoots"


def _known(value: Any) -> Tensor | None:
    """A number or tensor in double precision, None if it is elsewhere."""
    tensor = torch.as_tensor(value).detach()
    return tensor.double() if tensor.device.type == "cpu" else None
