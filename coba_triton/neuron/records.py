"""The neuron's records: its states, its parameters with their defaults, and the constants of one step.

Units: ms for time, mV for potentials, nF for capacitance, uS for conductances (so that uS * mV = nA and
nA / nF = mV / ms). Where synapses are currents, nA stands for uS. Any other consistent system works as well: the
arithmetic knows no units.

Source: norse's documented ``coba_lif`` equations (Pehle and Pedersen 2021, doi:10.5281/zenodo.4422025), a
conductance-based leaky integrate-and-fire neuron with exponential synapses as in Brette et al. 2007. With a constant of 0
in them the same equations are those of current-based synapses, of which Brette et al. 2007 describe a network as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Number: TypeAlias = "float | Tensor"
"""A Python number, a 0-dim tensor, or a tensor that broadcasts over the neurons."""


def _detach(value: Any) -> Any:
    return value.detach() if hasattr(value, "detach") else value


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


class CobaLIFRefractoryState(NamedTuple):
    """State of a recurrent population with a refractory period.

    Attributes:
        z: spikes of the last step, 0 or 1, ``[*batch, N]``.
        v: membrane potential in mV, ``[*batch, N]``.
        g_e: excitatory conductance in uS, ``[*batch, N]``.
        g_i: inhibitory conductance in uS, ``[*batch, N]``.
        left: number of steps for which a neuron is still held at ``v_reset``, ``[*batch, N]``; it gets no gradient.
    """

    z: Number
    v: Number
    g_e: Number
    g_i: Number
    left: Number

    def detach(self) -> CobaLIFRefractoryState:
        """The state without its history, for truncated backpropagation through time."""
        return CobaLIFRefractoryState(*map(_detach, self))


class CobaLIFFeedForwardRefractoryState(NamedTuple):
    """State of a feed-forward population with a refractory period.

    Attributes:
        v: membrane potential in mV, shape of the neurons.
        g_e: excitatory conductance in uS, shape of the neurons.
        g_i: inhibitory conductance in uS, shape of the neurons.
        left: number of steps for which a neuron is still held at ``v_reset``, shape of the neurons; it gets no gradient.
    """

    v: Number
    g_e: Number
    g_i: Number
    left: Number

    def detach(self) -> CobaLIFFeedForwardRefractoryState:
        """The state without its history, for truncated backpropagation through time."""
        return CobaLIFFeedForwardRefractoryState(*map(_detach, self))


class CobaLIFDelayState(NamedTuple):
    """State of a recurrent population in which a spike is under way for more than one step.

    Attributes:
        z: spikes of the last step, 0 or 1, ``[*batch, N]``.
        v: membrane potential in mV, ``[*batch, N]``.
        g_e: excitatory conductance in uS, ``[*batch, N]``.
        g_i: inhibitory conductance in uS, ``[*batch, N]``.
        left: number of steps for which a neuron is still held at ``v_reset``, ``[*batch, N]``; it gets no gradient.
        history: spikes of the last D steps, ``[D, *batch, N]``, those of ``z`` in the last row. D is the longest delay in
            steps. What is still on its way to a neuron follows from them.
    """

    z: Number
    v: Number
    g_e: Number
    g_i: Number
    left: Number
    history: Number

    def detach(self) -> CobaLIFDelayState:
        """The state without its past, for truncated backpropagation through time."""
        return CobaLIFDelayState(*map(_detach, self))


FeedForwardState: TypeAlias = CobaLIFFeedForwardState | CobaLIFFeedForwardRefractoryState
RecurrentState: TypeAlias = CobaLIFState | CobaLIFRefractoryState | CobaLIFDelayState


def feed_forward_state(*fields: Any) -> FeedForwardState:
    """The record of these fields: v, g_e, g_i and, with a refractory period, left."""
    return CobaLIFFeedForwardRefractoryState(*fields) if len(fields) == 4 else CobaLIFFeedForwardState(*fields)


def recurrent_state(*fields: Any) -> RecurrentState:
    """The record of these fields: z, v, g_e, g_i; with a refractory period, left; with longer delays, history as well."""
    if len(fields) == 6:
        return CobaLIFDelayState(*fields)
    return CobaLIFRefractoryState(*fields) if len(fields) == 5 else CobaLIFState(*fields)


class CobaLIFParameters(NamedTuple):
    """Parameters of the conductance-based leaky integrate-and-fire neuron.

    Every number may be a Python number, a 0-dim tensor, or a tensor that broadcasts over the neurons (``[N]``,
    ``[B, 1]``, ``[B, N]``); floating-point tensors may require grad and may live on another device than the state. All
    numbers must be finite; inverse time constants and capacitance, ``g_l`` and ``alpha`` must not be negative. Every call
    checks this for Python numbers. Only :func:`coba_triton.simulate` checks it for tensors, because reading them means to
    wait for their device.

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
        refractory: refractory period in ms, rounded up to whole steps. After a spike a neuron is held at ``v_reset`` and
            cannot spike for so long, while its conductances go on; it gets no gradient. With a number other than 0, or
            with a tensor, states have the field ``left``.
        conductance_based: 1 where the synapses are conductances, which drive the neuron with ``g (e_rev - v)``; 0 where they
            are currents, which drive it with ``g e_rev``: then ``e_rev_E`` is 1 and ``e_rev_I`` is -1, without a unit, and
            input, weights, ``g_e`` and ``g_i`` are in nA instead of uS. A tensor may mix both kinds in one population; it
            gets no gradient.
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
    refractory: Number = 0  # an int, because torch.compile takes 0 for a constant, and 0.0 for a number that may change
    conductance_based: Number = 1  # an int, for the same reason


default_bio_parameters = CobaLIFParameters(
    tau_syn_exc_inv=1 / 0.3,
    tau_syn_inh_inv=1 / 0.5,
    e_rev_E=0.0,
    e_rev_I=-70.0,
    v_thresh=-50.0,
    v_reset=-65.0,
    v_rest=-65.0,
)
default_learning_parameters = CobaLIFParameters(
    tau_syn_exc_inv=1 / 5,
    tau_syn_inh_inv=1 / 5,
    c_m_inv=1 / 20,
    g_l=1.0,
    e_rev_I=-80.0,
    e_rev_E=0.0,
    v_rest=-60.0,
    v_reset=-60.0,
    v_thresh=-50.0,
    method="triangle",
    alpha=0.1,
)
"""The parameters that modules have by default. Times are in ms and potentials in mV, as everywhere. The unit of
conductance is the leak conductance of the neuron: ``g_l`` is 1, and a weight of 0.5 opens half as much as the leak. Then
the capacitance, 20, is the time constant of the membrane in ms. Initial weights are near 0.01 to 0.1 in this unit, so
that optimisers learn with their default rates, Adam with 1e-3.

``alpha`` is 1 over the distance of ``v_thresh`` from ``v_reset``. The gradient through a reset is then multiplied with a
number from -1 to 1, and does not grow without bound over many steps."""
default_bio_state = CobaLIFState(z=0.0, v=-65.0, g_e=0.0, g_i=0.0)

NUMERIC_PARAMETERS = tuple(name for name in CobaLIFParameters._fields if name != "method")
# Parameters that other packages' records, such as norse's, may lack.
OPTIONAL_PARAMETERS = {"refractory": 0, "conductance_based": 1}
# Parameters that get no gradient.
FIXED_PARAMETERS = ("alpha", *OPTIONAL_PARAMETERS)


def numbers_of(p: Any) -> dict[str, Any]:
    """The numbers of a parameter record by name, duck-typed; what it may lack has its default."""
    return {
        name: getattr(p, name, OPTIONAL_PARAMETERS[name]) if name in OPTIONAL_PARAMETERS else getattr(p, name)
        for name in NUMERIC_PARAMETERS
    }


class State(NamedTuple):
    """What a step starts from and what it leaves, for one neuron, an array of registers or a tensor.

    Attributes:
        v: membrane potential in mV; of what :func:`~coba_triton.neuron.step.integrate` returns, that before the reset.
        g_e: excitatory conductance in uS.
        g_i: inhibitory conductance in uS.
    """

    v: Any
    g_e: Any
    g_i: Any


class Drive(NamedTuple):
    """What the synapses add to the two conductances in one step, in uS; not negative.

    Attributes:
        e: joins the excitatory conductance.
        i: joins the inhibitory conductance.
    """

    e: Any
    i: Any


class Constants(NamedTuple):
    """What one step multiplies with, derived once from the parameters and ``dt``: the rows of the kernels' table.

    ``decay_e = -dt * tau_syn_exc_inv``, ``decay_i = -dt * tau_syn_inh_inv`` and ``k = dt * c_m_inv``; ``n_ref`` is the
    refractory period in steps, and ``coupling`` is ``conductance_based``; the others are the parameters of the same name.
    """

    decay_e: Any
    decay_i: Any
    k: Any
    g_l: Any
    e_rev_I: Any
    e_rev_E: Any
    v_rest: Any
    v_reset: Any
    v_thresh: Any
    alpha: Any
    n_ref: Any
    coupling: Any


class Sums(NamedTuple):
    """Derivatives of the loss by the constants that have one, in the order of :class:`Constants`."""

    decay_e: Any
    decay_i: Any
    k: Any
    g_l: Any
    e_rev_I: Any
    e_rev_E: Any
    v_rest: Any
    v_reset: Any
    v_thresh: Any


class Kept(NamedTuple):
    """What the adjoint of a step reads of the step.

    Attributes:
        v: potential before the step in mV.
        u: potential before the reset in mV.
        g_e: excitatory conductance after the step in uS.
        g_i: inhibitory conductance after the step in uS.
    """

    v: Any
    u: Any
    g_e: Any
    g_i: Any


class Adjoint(NamedTuple):
    """Derivatives of the loss by what one step reads and computes.

    Attributes:
        lam: by the state before the step.
        drive: by the drive.
        spike: by ``u - v_thresh``, through the spike.
        u: by the potential before the reset.
        ds: by the bracket of ``dv``.
        g_e: by the excitatory conductance after the step.
        g_i: by the inhibitory conductance after the step.
    """

    lam: State
    drive: Drive
    spike: Any
    u: Any
    ds: Any
    g_e: Any
    g_i: Any
