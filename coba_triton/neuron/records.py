"""The neuron model's records: states, parameters with their defaults, and the constants of one step.

Units: ms for time, mV for potentials, nF for capacitance, uS for conductances (so that uS * mV = nA and
nA / nF = mV / ms). Any other consistent system works as well: the arithmetic knows no units.

Source: norse's documented ``coba_lif`` equations (Pehle and Pedersen 2021, doi:10.5281/zenodo.4422025), a
conductance-based leaky integrate-and-fire neuron with exponential synapses as in Brette et al. 2007.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

Number = float | Tensor
"""A Python number, a 0-dim tensor, or a tensor that broadcasts over the neurons."""

# The dtypes that are taken: of numbers that need no scale and have more than a few bits.
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SPIKES = (*FLOATING, torch.bool, torch.uint8)
INTEGERS = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))
NUMBERS = frozenset((*SPIKES, *INTEGERS))


def is_tracked(tensor: Tensor) -> bool:
    """Whether autograd follows a tensor, back or forward."""
    return has_tangent(tensor) or (torch.is_grad_enabled() and tensor.requires_grad)


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation follows a tensor."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _detach(value: Number) -> Number:
    return value.detach() if isinstance(value, Tensor) else value


class CobaLIFState(NamedTuple):
    """State of a recurrent population.

    Attributes:
        z: spikes of the last step, 0 or 1, ``[*batch, N]``.
        v: membrane potential in mV, ``[*batch, N]``.
        g_e: excitatory conductance in uS, ``[*batch, N]``.
        g_i: inhibitory conductance in uS, ``[*batch, N]``.
    """

    z: Number
    v: Number
    g_e: Number
    g_i: Number

    def detach(self) -> CobaLIFState:
        """The state without its history, for truncated backpropagation through time."""
        return CobaLIFState(*map(_detach, self))


class CobaLIFFeedForwardState(NamedTuple):
    """State of a feed-forward population.

    Attributes:
        v: membrane potential in mV, shape of the neurons.
        g_e: excitatory conductance in uS, shape of the neurons.
        g_i: inhibitory conductance in uS, shape of the neurons.
    """

    v: Number
    g_e: Number
    g_i: Number

    def detach(self) -> CobaLIFFeedForwardState:
        """The state without its history, for truncated backpropagation through time."""
        return CobaLIFFeedForwardState(*map(_detach, self))


class CobaLIFParameters(NamedTuple):
    """Parameters of the conductance-based leaky integrate-and-fire neuron.

    Every number may be a Python number, a 0-dim tensor, or a tensor that broadcasts over the neurons (``[N]``,
    ``[B, 1]``, ``[B, N]``); floating-point tensors may require grad and may live on another device than the state. Numbers
    have to be finite, and inverse time constants and capacitance, ``g_l`` and ``alpha`` not negative; those of tensors
    are looked at by :func:`coba_triton.simulate` alone, as that waits for their device.

    Attributes:
        tau_syn_exc_inv: inverse time constant of the excitatory synapses in 1/ms.
        tau_syn_inh_inv: inverse time constant of the inhibitory synapses in 1/ms.
        c_m_inv: inverse membrane capacitance in 1/nF.
        g_l: leak conductance in uS.
        e_rev_I: inhibitory reversal potential in mV.
        e_rev_E: excitatory reversal potential in mV.
        v_rest: resting potential in mV.
        v_reset: potential after a spike in mV.
        v_thresh: threshold in mV; a spike needs a potential strictly above it.
        method: surrogate derivative of the spike: ``super``, ``triangle``, ``tanh``, ``circ``, ``heavi_erfc`` or
            ``heaviside`` (see :mod:`coba_triton.neuron.surrogate`).
        alpha: steepness of the surrogate derivative in 1/mV (``circ``: its width in mV); it gets no gradient.
    """

    tau_syn_exc_inv: Number = 1 / 5
    tau_syn_inh_inv: Number = 1 / 5
    c_m_inv: Number = 1 / 0.2
    g_l: Number = 1 / 20 * 1 / 0.2
    e_rev_I: Number = -100.0
    e_rev_E: Number = 60.0
    v_rest: Number = -20.0
    v_reset: Number = -70.0
    v_thresh: Number = -10.0
    method: str = "super"
    alpha: Number = 100.0


default_bio_parameters = CobaLIFParameters(
    tau_syn_exc_inv=1 / 0.3,
    tau_syn_inh_inv=1 / 0.5,
    e_rev_E=0.0,
    e_rev_I=-70.0,
    v_thresh=-50.0,
    v_reset=-65.0,
    v_rest=-65.0,
)
default_bio_state = CobaLIFState(z=0.0, v=-65.0, g_e=0.0, g_i=0.0)

for _record in (CobaLIFState, CobaLIFFeedForwardState, CobaLIFParameters):
    # an exported program that takes or returns one can be saved
    torch.utils._pytree._register_namedtuple(_record, serialized_type_name=f"coba_triton.{_record.__name__}")
    torch.serialization.add_safe_globals([_record])  # torch.load(weights_only=True) reads what holds one

_METHOD = CobaLIFParameters._fields.index("method")
_DOUBLES = struct.Struct(f"{len(CobaLIFParameters._fields) - 1}d")
NUMERIC_PARAMETERS = tuple(name for name in CobaLIFParameters._fields if name != "method")


class Constants(NamedTuple):
    """What one step multiplies with, derived once from the parameters and ``dt``: the rows of the kernels' table.

    ``decay_e = -dt * tau_syn_exc_inv``, ``decay_i = -dt * tau_syn_inh_inv`` and ``k = dt * c_m_inv``; the others
    are the parameters of the same name.
    """

    decay_e: Tensor
    decay_i: Tensor
    k: Tensor
    g_l: Tensor
    e_rev_I: Tensor
    e_rev_E: Tensor
    v_rest: Tensor
    v_reset: Tensor
    v_thresh: Tensor
    alpha: Tensor


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
        and value.device.type == "cpu"
        and not is_watched()
        and not is_tracked(value)
    ):
        # not .item(), which profilers take for a wait
        plain = value.dtype != torch.bfloat16 and not value.is_neg()
        return value.detach().numpy().item() if plain else value.item()
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
    if _is_capturing(device):
        return made  # the memory is the graph's
    streams = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    if streams is not None:
        streams.current_stream(device).synchronize()  # a later call may be on another stream
    if len(_kept) >= _KEPT_AT_MOST:
        if streams is not None:
            streams.synchronize()  # a kernel may still read what is given up
        _kept.clear()
    _kept[key] = made
    return made


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def numbers_on(device: torch.device, dtype: torch.dtype, numbers: Sequence[float]) -> Tensor:
    """Python numbers as a tensor ``[len(numbers)]``, which must not be changed."""
    if torch.compiler.is_compiling():  # products, which a compiler keeps for any dt, where it would freeze tensor(dt)
        one = torch.ones((), dtype=torch.float64, device=device)
        return torch.stack([(one * number).to(dtype) for number in numbers])

    def make() -> Tensor:
        if _is_capturing(device):  # a graph may not copy from the host
            return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])
        return torch.tensor(numbers, dtype=dtype, device=device)

    if is_watched():
        return make()
    return keep((struct.pack(f"{len(numbers)}d", *numbers), dtype, device), device, make)


def derive_constants(p: Any, dt: float, dtype: torch.dtype, device: torch.device) -> Constants:
    """The constants of a step as tensors of the compute dtype, each of its parameter's own shape.

    The products with ``dt`` are evaluated before the conversion, in the dtype eager PyTorch would use (a Python
    number in double precision, a float32 tensor in float32); gradients flow through them to the parameters.

    Args:
        p: a parameter record, duck-typed.
        dt: time step in ms.
        dtype: compute dtype, float32 or float64.
        device: where the state lives.
    """
    factors = (-dt, -dt, dt, *(1.0,) * 7)
    numbers: list[Any] = [
        p.tau_syn_exc_inv, p.tau_syn_inh_inv, p.c_m_inv, p.g_l, p.e_rev_I, p.e_rev_E, p.v_rest, p.v_reset, p.v_thresh,
        _detach(p.alpha),
    ]  # fmt: skip
    for i, number in enumerate(numbers):
        if isinstance(number, Tensor) and number.dtype == torch.float64:
            numbers[i] = known(number)
    # the numbers of a module on a GPU: three operations for all of them, not one or two for each
    together = [] if is_watched() else [i for i, number in enumerate(numbers) if _is_double_on(device, number)]
    if together:
        doubles = torch.stack([numbers[i] for i in together])
        products = doubles * numbers_on(device, torch.float64, [factors[i] for i in together])
        for i, product in zip(together, products.to(dtype).unbind(), strict=True):
            numbers[i] = product
    for i in {0, 1, 2}.difference(together):
        numbers[i] = factors[i] * numbers[i]
    numbers = [known(number) if isinstance(number, Tensor) else number for number in numbers]
    singles = numbers_on(device, dtype, [0.0 if isinstance(number, Tensor) else number for number in numbers]).unbind()
    return Constants(
        *(
            number.to(device=device, dtype=dtype) if isinstance(number, Tensor) else single
            for number, single in zip(numbers, singles, strict=True)
        )
    )


def _is_double_on(device: torch.device, number: Any) -> bool:
    return isinstance(number, Tensor) and number.dtype == torch.float64 and number.dim() == 0 and number.device == device


def constants_table(p: Any, dt: float, dtype: torch.dtype, device: torch.device, neurons: torch.Size) -> Tensor:
    """The constants as the kernels take them: ``[10, 1]`` where every one is a single number, else ``[10, neurons]``."""
    if (key := number_key(p)) is not None and type(dt) is float:
        made = keep((key, dt, dtype, device), device, lambda: torch.stack(derive_constants(p, dt, dtype, device)))
        return made.unsqueeze(1)
    c = derive_constants(p, dt, dtype, device)
    if all(constant.dim() == 0 for constant in c):
        return torch.stack(c).unsqueeze(1)
    return torch.stack([constant.expand(neurons) for constant in c]).reshape(len(c), -1)
