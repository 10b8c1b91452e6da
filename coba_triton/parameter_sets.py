"""Convert parameters of PyNN's and NEST's neurons to and from :class:`CobaLIFParameters`.

PyNN's ``IF_cond_exp`` and NEST's ``iaf_cond_exp`` have synapses that are conductances, PyNN's ``IF_curr_exp`` and NEST's
``iaf_psc_exp`` such that are currents. All of them are this package's neuron. An offset current ``I`` becomes a resting
potential of ``v_rest + I / g_l``, which gives the same equation.

Source: the standard cells ``IF_cond_exp`` and ``IF_curr_exp`` of PyNN (Davison et al. 2009,
doi:10.3389/neuro.11.011.2008) and the models ``iaf_cond_exp`` and ``iaf_psc_exp`` of NEST.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .neuron.records import CobaLIFParameters, Number
from .ops.validation import check_number, check_numbers, check_parameters, is_one_of

# The names and the defaults of the simulators.
DEFAULTS: dict[str, dict[str, float]] = {
    "IF_cond_exp": dict(
        v_rest=-65.0, cm=1.0, tau_m=20.0, tau_refrac=0.1, tau_syn_E=5.0, tau_syn_I=5.0,
        e_rev_E=0.0, e_rev_I=-70.0, v_thresh=-50.0, v_reset=-65.0, i_offset=0.0,
    ),
    "iaf_cond_exp": dict(
        E_L=-70.0, C_m=250.0, g_L=16.6667, t_ref=2.0, tau_syn_ex=0.2, tau_syn_in=2.0,
        E_ex=0.0, E_in=-85.0, V_th=-55.0, V_reset=-60.0, I_e=0.0,
    ),
    "IF_curr_exp": dict(
        v_rest=-65.0, cm=1.0, tau_m=20.0, tau_refrac=0.1, tau_syn_E=5.0, tau_syn_I=5.0,
        v_thresh=-50.0, v_reset=-65.0, i_offset=0.0,
    ),
    "iaf_psc_exp": dict(
        E_L=-70.0, C_m=250.0, tau_m=10.0, t_ref=2.0, tau_syn_ex=2.0, tau_syn_in=2.0,
        V_th=-55.0, V_reset=-70.0, I_e=0.0,
    ),
}  # fmt: skip
NOT_NEGATIVE = {"tau_refrac", "t_ref"}
POSITIVE = {"cm", "tau_m", "tau_syn_E", "tau_syn_I", "C_m", "g_L", "tau_syn_ex", "tau_syn_in"}


def _check_model(model: Any) -> None:
    if not is_one_of(model, DEFAULTS):
        raise ValueError(
            "model must be 'IF_cond_exp' or 'IF_curr_exp' (PyNN), or 'iaf_cond_exp' or 'iaf_psc_exp' (NEST), got "
            f"{model!r:.200}"
        )


def _is_current_based(model: str) -> bool:
    return model in ("IF_curr_exp", "iaf_psc_exp")


def _number(value: Any, name: str) -> Number:
    """Check a parameter. A number becomes a float, an array a tensor of the default dtype; a tensor stays as it is."""
    if isinstance(value, np.ndarray | list | tuple):
        try:
            value = torch.as_tensor(np.asarray(value, dtype=np.float64)).to(torch.get_default_dtype())
        except (OverflowError, TypeError, ValueError) as error:
            raise TypeError(f"{name} must be a number or an array of numbers, got {value!r:.200} ({error})") from None
    check_number(value, name)
    check_numbers({name: value})
    number: Number = value if isinstance(value, Tensor) else float(value)
    if name in NOT_NEGATIVE and bool(torch.as_tensor(number < 0).any()):
        raise ValueError(f"{name} must not be negative, got {number}; pass {name}=0 to do without a refractory period")
    if name in POSITIVE and not bool(torch.as_tensor(number > 0).all()):
        raise ValueError(f"{name} must be positive, got {number}")
    return number


def _resting(v_rest: Number, current: Number, g_l: Number) -> Number:
    """The resting potential with an offset current in nA."""
    return v_rest if isinstance(current, float) and current == 0 else v_rest + current / g_l


def from_pynn(
    parameters: Mapping[str, Any], model: str = "IF_cond_exp", *, method: str = "super", alpha: float = 100.0
) -> CobaLIFParameters:
    """Convert the parameters of a PyNN or NEST population to this package's names and units (ms, mV, nF, uS).

    Weights are not converted. Those of conductances are in uS in PyNN like ours, and in nS in NEST; those of currents are in
    nA in PyNN like ours, and in pA in NEST. Inhibitory weights are negative, as in PyNN's and NEST's current-based models.

    An offset current moves ``v_rest`` of the result to ``v_rest + I / g_l``. A run that is given no state begins there. The
    simulators begin at their own resting potential; to begin like them, pass a state with that potential.

    Args:
        parameters: values by the simulator's names, in its units: nF, ms, mV and nA for PyNN; pF, nS, ms, mV and pA for
            NEST. A value is a number, an array or a list with a number for each neuron ``[N]``, or a tensor,
            through which gradients flow. A missing value has the simulator's default: the refractory period's is not 0.
        model: ``IF_cond_exp`` or ``IF_curr_exp`` for PyNN, ``iaf_cond_exp`` or ``iaf_psc_exp`` for NEST.
        method: surrogate derivative of the spike, see :class:`CobaLIFParameters`.
        alpha: steepness of the surrogate derivative in 1/mV.

    Returns:
        The parameters.

    Raises:
        TypeError: if a value is neither a number nor an array of numbers.
        ValueError: if the model or a name is unknown, the refractory period is negative, a time constant, capacitance or
            conductance is not positive, or a number is not finite.

    Example:
        >>> p = from_pynn({"cm": 0.25, "tau_m": 10.0, "tau_refrac": 5.0})
        >>> p.c_m_inv, p.g_l, p.refractory
        (4.0, 0.025, 5.0)
        >>> from_pynn({"cm": 0.25, "tau_m": 10.0}, "IF_curr_exp").conductance_based
        0
    """
    _check_model(model)
    defaults = DEFAULTS[model]
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters must be a dict of numbers by name, got {type(parameters).__name__}")
    for name in parameters:
        if name not in defaults:
            by_lower = {known.lower(): known for known in defaults}
            nearest = by_lower[difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.0)[0]]
            raise ValueError(
                f"parameters must be of {model}, one of {', '.join(defaults)}, got {name!r}; the nearest is {nearest!r}"
            )
    q = {name: _number(parameters.get(name, default), name) for name, default in defaults.items()}
    if _is_current_based(model):
        reversal: dict[str, Any] = dict(e_rev_E=1.0, e_rev_I=-1.0, conductance_based=0)
    elif model == "IF_cond_exp":
        reversal = dict(e_rev_E=q["e_rev_E"], e_rev_I=q["e_rev_I"])
    else:
        reversal = dict(e_rev_E=q["E_ex"], e_rev_I=q["E_in"])
    if model.startswith("IF_"):
        p = CobaLIFParameters(
            tau_syn_exc_inv=1 / q["tau_syn_E"],
            tau_syn_inh_inv=1 / q["tau_syn_I"],
            c_m_inv=1 / q["cm"],
            g_l=q["cm"] / q["tau_m"],
            v_rest=_resting(q["v_rest"], q["i_offset"], q["cm"] / q["tau_m"]),
            v_reset=q["v_reset"],
            v_thresh=q["v_thresh"],
            method=method,
            alpha=alpha,
            refractory=q["tau_refrac"],
            **reversal,
        )
    else:
        g_l = q["C_m"] / q["tau_m"] / 1000 if _is_current_based(model) else q["g_L"] / 1000
        p = CobaLIFParameters(
            tau_syn_exc_inv=1 / q["tau_syn_ex"],
            tau_syn_inh_inv=1 / q["tau_syn_in"],
            c_m_inv=1000 / q["C_m"],
            g_l=g_l,
            v_rest=_resting(q["E_L"], q["I_e"] / 1000, g_l),
            v_reset=q["V_reset"],
            v_thresh=q["V_th"],
            method=method,
            alpha=alpha,
            refractory=q["t_ref"],
            **reversal,
        )
    check_parameters(p)
    return p


def _plain(value: Any) -> Any:
    """A number as a float, or a tensor with axes as an array in double precision."""
    if isinstance(value, Tensor):
        value = value.detach().double().cpu().numpy()
        return value if value.ndim else float(value)
    return float(value)


def to_pynn(p: Any, model: str = "IF_cond_exp") -> dict[str, Any]:
    """Convert parameters to those of PyNN or NEST, with an offset current of 0.

    The surrogate derivative is left out.

    Args:
        p: parameters in ms, mV, nF and uS, see :class:`CobaLIFParameters`.
        model: ``IF_cond_exp`` for PyNN (nF, ms, mV) or ``iaf_cond_exp`` for NEST (pF, nS, ms, mV); ``IF_curr_exp`` or
            ``iaf_psc_exp`` where synapses are currents.

    Returns:
        The values by name. A tensor with axes becomes a numpy array of float64, everything else a float.

    Raises:
        TypeError: if ``p`` is no parameter record.
        ValueError: if the model is unknown, its synapses are of the other kind, those of a current are scaled by an
            ``e_rev_E`` other than 1 or an ``e_rev_I`` other than -1, or a time constant, capacitance or conductance is not
            positive.

    Example:
        >>> to_pynn(CobaLIFParameters(c_m_inv=4.0, g_l=0.025), "iaf_cond_exp")["g_L"]
        25.0
    """
    _check_model(model)
    check_parameters(p)
    for name in ("tau_syn_exc_inv", "tau_syn_inh_inv", "c_m_inv", "g_l"):
        if not bool(torch.as_tensor(getattr(p, name) > 0).all()):
            raise ValueError(f"{name} must be positive for {model}, got {getattr(p, name)}")
    needed = {"conductance_based": 1.0}
    if _is_current_based(model):
        needed = {"conductance_based": 0.0, "e_rev_E": 1.0, "e_rev_I": -1.0}
    for name, number in needed.items():
        value = getattr(p, name, 1)
        if not bool(torch.as_tensor(value == number).all()):
            raise ValueError(f"{name} must be {number:g} for {model}, got {value}; choose the model that has these synapses")
    c_m, g_l = 1 / _plain(p.c_m_inv), _plain(p.g_l)
    tau_e, tau_i = 1 / _plain(p.tau_syn_exc_inv), 1 / _plain(p.tau_syn_inh_inv)
    e_rev_e, e_rev_i = _plain(p.e_rev_E), _plain(p.e_rev_I)
    refractory = _plain(getattr(p, "refractory", 0.0))
    v_rest, v_thresh, v_reset = _plain(p.v_rest), _plain(p.v_thresh), _plain(p.v_reset)
    # PyNN's and NEST's names; they have tau_m in common, which is in ms in both
    values = dict(
        v_rest=v_rest, cm=c_m, tau_m=c_m / g_l, tau_refrac=refractory, tau_syn_E=tau_e, tau_syn_I=tau_i,
        e_rev_E=e_rev_e, e_rev_I=e_rev_i, v_thresh=v_thresh, v_reset=v_reset, i_offset=0.0,
        E_L=v_rest, C_m=1000 * c_m, g_L=1000 * g_l, t_ref=refractory, tau_syn_ex=tau_e, tau_syn_in=tau_i,
        E_ex=e_rev_e, E_in=e_rev_i, V_th=v_thresh, V_reset=v_reset, I_e=0.0,
    )  # fmt: skip
    return {name: values[name] for name in DEFAULTS[model]}
