"""The neuron model's records: states, parameters with their defaults, and the constants of one step.

Units: ms for time, mV for potentials, nF for capacitance, uS for conductances (so that uS * mV = nA and
nA / nF = mV / ms). Any other consistent system works as well: the arithmetic knows no units.

Source: norse's documented ``coba_lif`` equations (Pehle and Pedersen 2021, doi:10.5281/zenodo.4422025), a
conductance-based leaky integrate-and-fire neuron with exponential synapses as in Brette et al. 2007.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Number = float | Tensor
"""A Python number, a 0-dim tensor, or a tensor that broadcasts over the neurons."""


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
    ``[B, 1]``, ``[B, N]``); floating-point tensors may require grad and may live on another device than the state.

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
            ``heaviside`` (see :mod:`coba_triton.surrogate`).
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


def _on_device(numbers: list[Any], dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
    if torch.compiler.is_compiling():  # products, which a compiler keeps for any dt, where it would freeze tensor(dt)
        one = torch.ones((), dtype=torch.float64, device=device)
        return [(one * number).to(dtype) for number in numbers]
    return torch.tensor([float(number) for number in numbers], dtype=dtype, device=device).unbind()  # one transfer


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
    values = dict(
        decay_e=-dt * p.tau_syn_exc_inv,
        decay_i=-dt * p.tau_syn_inh_inv,
        k=dt * p.c_m_inv,
        g_l=p.g_l,
        e_rev_I=p.e_rev_I,
        e_rev_E=p.e_rev_E,
        v_rest=p.v_rest,
        v_reset=p.v_reset,
        v_thresh=p.v_thresh,
        alpha=p.alpha.detach() if isinstance(p.alpha, Tensor) else p.alpha,
    )
    on_device = iter(_on_device([0.0 if isinstance(value, Tensor) else value for value in values.values()], dtype, device))
    return Constants(
        *(
            value.to(device=device, dtype=dtype) if isinstance(value, Tensor) else number
            for value, number in zip(values.values(), on_device, strict=True)
        )
    )
