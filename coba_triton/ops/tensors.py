"""What a call's tensors and numbers are: which dtypes are taken, who follows a tensor, and what is kept between calls."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..neuron.records import (
    CobaLIFDelayState,
    CobaLIFFeedForwardRefractoryState,
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    CobaLIFRefractoryState,
    CobaLIFState,
)

# The dtypes that are taken: of numbers that need no scale and have more than a few bits.
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SPIKES = (*FLOATING, torch.bool, torch.uint8)
INTEGERS = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))
NUMBERS = frozenset((*SPIKES, *INTEGERS))


def as_in_memory(tensor: Tensor) -> Tensor:
    """The same numbers, in memory as they are.

    Of a view such as ``z.conj().imag``, PyTorch only notes that its numbers have another sign. Kernels and NumPy read what
    is in memory.
    """
    return tensor if torch.compiler.is_compiling() or not tensor.is_neg() else tensor.resolve_neg()


def is_refractory(p: Any, state: Any = None) -> bool:
    """Whether neurons are held after a spike: by their parameters, or still by their state. No tensor is read for that."""
    refractory = getattr(p, "refractory", 0)
    return bool(hasattr(state, "left") or isinstance(refractory, Tensor) or refractory != 0)


def is_tracked(tensor: Tensor) -> bool:
    """Whether autograd follows a tensor, back or forward."""
    return has_tangent(tensor) or (torch.is_grad_enabled() and tensor.requires_grad)


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation follows a tensor."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


for _record in (
    CobaLIFState, CobaLIFFeedForwardState, CobaLIFRefractoryState, CobaLIFFeedForwardRefractoryState, CobaLIFDelayState,
    CobaLIFParameters,
):  # fmt: skip
    # an exported program that takes or returns one can be saved
    torch.utils._pytree._register_namedtuple(_record, serialized_type_name=f"coba_triton.{_record.__name__}")
    # torch.load(weights_only=True) reads what holds one, also where it was saved under the name of an older version
    torch.serialization.add_safe_globals([_record, (_record, f"coba_triton.model.{_record.__name__}")])

_METHOD = CobaLIFParameters._fields.index("method")
_DOUBLES = struct.Struct(f"{len(CobaLIFParameters._fields) - 1}d")


def is_watched() -> bool:
    """Whether a compiler, a transform or a mode looks on, to which every new tensor belongs."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def number_key(p: Any) -> bytes | None:
    """The numbers of a parameter record as a key for :func:`keep`, or None if one is not a Python number."""
    if type(p) is not CobaLIFParameters or is_watched():
        return None
    numbers: Any = (*p[:_METHOD], *p[_METHOD + 1 :])
    for number in numbers:
        if type(number) is not float and type(number) is not int:
            return None
    try:
        return _DOUBLES.pack(*numbers)  # unlike the numbers themselves, these bytes tell -0.0 from 0.0
    except struct.error:  # an int that no double can hold
        return None


def known(value: Any) -> Any:
    """A tensor whose value can be read without waiting for a device, and which nothing follows, as a Python number."""
    if (
        type(value) in (Tensor, torch.nn.Parameter)  # a tensor of a compiler or of a subclass has no value to read
        and value.dim() == 0
        and value.is_cpu
        and not is_watched()
        and not is_tracked(value)
    ):
        # not .item(), which profilers take for a wait
        plain = value.dtype != torch.bfloat16 and not value.is_neg()
        if plain:
            return (value.detach() if value.requires_grad else value).numpy().item()
        return value.item()
    return value


_kept: dict[tuple[Any, ...], Tensor] = {}
_KEPT_AT_MOST = 1024


def keep(key: tuple[Any, ...], device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` made for this key before, else what it makes now; it must follow from the key alone, and not be changed.

    So nothing that is kept can be out of date, and the host waits for a device only where a key is new.
    """
    if (found := _kept.get(key)) is not None:
        return found
    with torch.inference_mode(False):  # so that any later call may save it for a gradient
        made = make()
    if not may_be_kept(device):
        return made
    if len(_kept) >= _KEPT_AT_MOST:
        if device.type not in ("cpu", "meta"):
            torch.get_device_module(device).synchronize()  # a kernel may still read what is given up
        _kept.clear()
    _kept[key] = made
    return made


def may_be_kept(device: torch.device) -> bool:
    """Wait until what was made on this device can be used by a later call on another stream.

    False while a graph is captured: the memory is the graph's, and holds no numbers before the graph runs.
    """
    if is_capturing(device):
        return False
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).current_stream(device).synchronize()
    return True


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def numbers_on(device: torch.device, dtype: torch.dtype, numbers: Sequence[float]) -> Tensor:
    """Python numbers as a tensor ``[len(numbers)]``, which must not be changed."""
    if torch.compiler.is_compiling():  # products, which a compiler keeps for any dt, where it would freeze tensor(dt)
        one = torch.ones((), dtype=torch.float64, device=device)
        return torch.stack([(one * number).to(dtype) for number in numbers])

    def make() -> Tensor:
        if is_capturing(device):  # a graph may not copy from the host
            return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])
        return torch.tensor(numbers, dtype=dtype, device=device)

    if is_watched():
        return make()
    return keep((struct.pack(f"{len(numbers)}d", *numbers), dtype, device), device, make)
