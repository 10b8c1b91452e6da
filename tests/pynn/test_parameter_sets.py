"""Parameter sets of PyNN and NEST: names, units, and what this neuron does not have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from coba_triton import (
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    coba_lif_feed_forward_integral,
    default_bio_parameters,
    from_pynn,
    to_pynn,
)
from coba_triton.neuron.records import NUMERIC_PARAMETERS
from coba_triton.parameter_sets import DEFAULTS

MODELS = ("IF_cond_exp", "iaf_cond_exp")
CURRENT_MODELS = ("IF_curr_exp", "iaf_psc_exp")
BRETTE_PYNN = dict(cm=0.2, tau_m=20.0, v_rest=-60.0, v_thresh=-50.0, v_reset=-60.0, tau_syn_E=5.0, tau_syn_I=10.0)
BRETTE_PYNN |= dict(e_rev_E=0.0, e_rev_I=-80.0, tau_refrac=0.0, i_offset=0.0)
BRETTE_NEST = dict(C_m=200.0, g_L=10.0, E_L=-60.0, V_th=-50.0, V_reset=-60.0, tau_syn_ex=5.0, tau_syn_in=10.0)
BRETTE_NEST |= dict(E_ex=0.0, E_in=-80.0, t_ref=0.0, I_e=0.0)
BRETTE = CobaLIFParameters(1 / 5, 1 / 10, 1 / 0.2, 0.01, -80.0, 0.0, -60.0, -60.0, -50.0)
SETS = [("IF_cond_exp", BRETTE_PYNN), ("iaf_cond_exp", BRETTE_NEST)]
# Brette et al.'s neuron of currents
CUBA_PYNN = {name: value for name, value in BRETTE_PYNN.items() if not name.startswith("e_rev")} | dict(v_rest=-49.0)
CUBA_NEST = dict(C_m=200.0, tau_m=20.0, E_L=-49.0, V_th=-50.0, V_reset=-60.0, tau_syn_ex=5.0, tau_syn_in=10.0)
CUBA_NEST |= dict(t_ref=0.0, I_e=0.0)
CUBA = BRETTE._replace(e_rev_I=-1.0, e_rev_E=1.0, v_rest=-49.0, conductance_based=0)
CURRENT_SETS = [("IF_curr_exp", CUBA_PYNN), ("iaf_psc_exp", CUBA_NEST)]


@pytest.mark.parametrize(("model", "values"), SETS)
def test_units_of_one_neuron_in_both_directions(model: str, values: dict[str, float]) -> None:
    assert from_pynn(values, model)._asdict() == pytest.approx(BRETTE._asdict())
    assert to_pynn(BRETTE, model) == pytest.approx(values)


@pytest.mark.parametrize(("model", "values"), CURRENT_SETS)
def test_units_of_a_neuron_of_currents_in_both_directions(model: str, values: dict[str, float]) -> None:
    """NEST's capacitance is in pF, PyNN's in nF; both have the membrane's time constant in ms instead of a leak."""
    assert from_pynn(values, model)._asdict() == pytest.approx(CUBA._asdict())
    assert to_pynn(CUBA, model) == pytest.approx(values)


@pytest.mark.parametrize("model", CURRENT_MODELS)
def test_a_record_of_the_other_kind_has_no_counterpart(model: str) -> None:
    with pytest.raises(ValueError, match=f"conductance_based must be 0 for {model}, got 1; choose the model"):
        to_pynn(BRETTE, model)
    with pytest.raises(ValueError, match=r"conductance_based must be 1 for IF_cond_exp, got 0; choose the model"):
        to_pynn(CUBA)
    with pytest.raises(ValueError, match=r"conductance_based must be 0 for .*, got tensor\(\[0\., 1\.\]\)"):
        to_pynn(CUBA._replace(conductance_based=torch.tensor([0.0, 1.0])), model)
    with pytest.raises(ValueError, match=rf"e_rev_E must be 1 for {model}, got 2\.0"):
        to_pynn(CUBA._replace(e_rev_E=2.0), model)
    with pytest.raises(ValueError, match=rf"e_rev_I must be -1 for {model}, got -80\.0"):
        to_pynn(CUBA._replace(e_rev_I=-80.0), model)
    several = CUBA._replace(conductance_based=torch.zeros(3), e_rev_E=torch.ones(3))
    assert to_pynn(several, model) == pytest.approx(dict(CURRENT_SETS)[model])


@pytest.mark.parametrize(("model", "values"), CURRENT_SETS)
def test_an_offset_current_of_a_neuron_of_currents(model: str, values: dict[str, float]) -> None:
    """0.1 nA through a leak of 10 nS raises the potential by 10 mV; an input of 0.1 nA that stays does the same."""
    given, current = {"IF_curr_exp": ("i_offset", 0.1), "iaf_psc_exp": ("I_e", 100.0)}[model]
    p = from_pynn(values | {given: current}, model)._replace(v_thresh=0.0)
    assert p.v_rest == pytest.approx(-39.0)
    start = CobaLIFFeedForwardState(-49.0, 0.0, 0.0)
    _, offset = coba_lif_feed_forward_integral(torch.zeros(5000, 1, dtype=torch.float64), start, p, 0.1)
    x = torch.full((5000, 1), 0.1 * (0.1 / 5), dtype=torch.float64)  # what decays in a step
    _, synaptic = coba_lif_feed_forward_integral(x, start, CUBA._replace(v_thresh=0.0), 0.1)
    assert offset.v.item() == pytest.approx(synaptic.v.item(), abs=1e-6) == pytest.approx(-39.0, abs=1e-6)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("p", [CobaLIFParameters(), default_bio_parameters._replace(refractory=5.0)])
def test_there_and_back(p: CobaLIFParameters, model: str) -> None:
    back = from_pynn(to_pynn(p, model), model, method="tanh", alpha=2.0)
    for name in set(NUMERIC_PARAMETERS) - {"alpha"}:
        assert getattr(back, name) == pytest.approx(getattr(p, name), rel=1e-14), name
    assert (back.method, back.alpha) == ("tanh", 2.0)


@pytest.mark.parametrize("model", MODELS)
def test_arrays_stay_one_number_a_neuron(model: str) -> None:
    p = BRETTE._replace(c_m_inv=torch.tensor([4.0, 5.0]), v_thresh=torch.tensor([-50.0, -48.0]))
    values = to_pynn(p, model)
    assert all(isinstance(value, np.ndarray | float) for value in values.values())
    back = from_pynn(values, model)
    assert isinstance(back.c_m_inv, torch.Tensor)
    assert back.c_m_inv.dtype == torch.float32
    torch.testing.assert_close(back.c_m_inv, p.c_m_inv)
    torch.testing.assert_close(back.v_thresh, p.v_thresh)


def test_gradients_reach_the_simulators_parameters() -> None:
    cm = torch.tensor(0.2, requires_grad=True)
    p = from_pynn(BRETTE_PYNN | {"cm": cm})
    (grad,) = torch.autograd.grad(p.c_m_inv, cm)
    assert grad.item() == pytest.approx(-1 / 0.2**2)


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (
            "IF_cond_exp",
            {"tau_refrac": -2.0},
            r"tau_refrac must not be negative, got -2\.0; pass tau_refrac=0 to do without",
        ),
        ("IF_cond_exp", {"tau_refrac": np.array([0.0, -0.1])}, "tau_refrac must not be negative"),
        ("iaf_cond_exp", {"t_ref": float("nan")}, "t_ref must be finite"),
        ("iaf_cond_exp", {"I_e": float("inf")}, "I_e must be finite, got inf"),
        ("IF_cond_exp", {"tau_syn_e": 5.0}, "got 'tau_syn_e'; the nearest is 'tau_syn_E'"),
        ("iaf_cond_exp", {"g_l": 5.0}, "got 'g_l'; the nearest is 'g_L'"),
        ("IF_cond_exp", {"cm": 0.0}, r"cm must be positive, got 0\.0"),
        ("iaf_cond_exp", {"C_m": float("nan")}, "C_m must be finite, got nan; correct it where it comes from"),
        ("iaf_cond_exp", {"E_L": [-70.0, float("-inf")]}, r"E_L must be finite, got -inf at \[1\]; correct"),
        ("iaf_psc_alpha", {}, r"model must be 'IF_cond_exp' or .* or 'iaf_psc_exp' \(NEST\), got 'iaf_psc_alpha'"),
        ("IF_curr_exp", {"e_rev_E": 0.0}, "parameters must be of IF_curr_exp, one of .*, got 'e_rev_E'; the nearest is"),
        ("iaf_psc_exp", {"tau_m": 0.0}, r"tau_m must be positive, got 0\.0"),
    ],
)
def test_what_does_not_fit_raises(model: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_pynn(dict(SETS).get(model, {}) | change, model)


@pytest.mark.parametrize("each", [False, True], ids=["one", "each"])
@pytest.mark.parametrize(("model", "values"), SETS)
def test_offset_current_is_the_same_equation(model: str, values: dict[str, float], each: bool) -> None:
    """Against the neuron's equation with its current, step by step in double precision."""
    current, steps, dt = np.array([0.05, 0.12, -0.3, 0.3]), 3000, 0.1  # nA: two of them fire
    given = {"IF_cond_exp": ("i_offset", 1), "iaf_cond_exp": ("I_e", 1000)}[model]
    x = 0.002 * (np.random.default_rng(0).random((steps, 4)) < 0.01)
    v, g, fired = np.full(4, -60.0), np.zeros(4), np.zeros((steps, 4), bool)
    for t in range(steps):
        g = g - dt / 5 * g + x[t]
        v = v + dt / 0.2 * (0.01 * (-60.0 - v) + g * (0.0 - v) + current)
        fired[t] = v > -50
        v[fired[t]] = -60.0
    assert (fired.sum(0) > 5).tolist() == [False, True, False, True]
    start = CobaLIFFeedForwardState(-60.0, 0.0, 0.0)
    for n in range(1 if each else 4):
        one = torch.tensor(current) if each else current[n]
        p = from_pynn(values | {given[0]: one * given[1]}, model)
        assert each or p.v_rest == pytest.approx(-60 + current[n] / 0.01)
        spikes, state = coba_lif_feed_forward_integral(torch.tensor(x if each else x[:, n]), start, p, dt)
        np.testing.assert_array_equal(spikes.bool().numpy(), fired if each else fired[:, n])
        # the current is folded into v_rest, which rounds once more in every step
        np.testing.assert_allclose(state.v, v if each else v[n], rtol=1e-9)
    assert from_pynn(values | {given[0]: 0.0}, model).v_rest == -60.0
    assert isinstance(from_pynn(values | {given[0]: [0.0, 0.1]}, model).v_rest, torch.Tensor)


def test_defaults_are_the_simulators_and_have_a_refractory_period() -> None:
    for model, name in zip((*MODELS, *CURRENT_MODELS), ("tau_refrac", "t_ref") * 2, strict=True):
        p = from_pynn({}, model)
        assert p.refractory == DEFAULTS[model][name] > 0
        assert to_pynn(p, model) == pytest.approx(DEFAULTS[model])
        each = from_pynn({name: [0.0, 2.0]}, model)
        assert each.refractory.tolist() == [0.0, 2.0] and to_pynn(each, model)[name].tolist() == [0.0, 2.0]


def test_no_leak_has_no_counterpart() -> None:
    with pytest.raises(ValueError, match=r"g_l must be positive for IF_cond_exp, got 0\.0"):
        to_pynn(BRETTE._replace(g_l=0.0))


@pytest.mark.parametrize("model", ["iaf_cond_exp", "iaf_psc_exp"])
def test_names_and_defaults_are_nests(model: str) -> None:
    nest = pytest.importorskip("nest", reason="NEST is optional: pip install nest-simulator")
    theirs = nest.GetDefaults(model)
    assert {name: theirs[name] for name in DEFAULTS[model]} == pytest.approx(DEFAULTS[model], rel=1e-6)


def test_currents_converge_to_nests() -> None:
    """NEST's neuron of currents is exact: the error of the Euler step is of order dt, below the threshold."""
    nest = pytest.importorskip("nest", reason="NEST is optional: pip install nest-simulator")
    errors, weights = [], (150.0, -200.0, 300.0)  # pA, of spikes that arrive at 4, 12 and 20 ms
    for dt in (0.1, 0.05, 0.025):
        nest.ResetKernel()
        nest.resolution = dt
        values = dict(DEFAULTS["iaf_psc_exp"], V_th=1e6, tau_syn_in=5.0)
        neuron, meter = nest.Create("iaf_psc_exp", params=values), nest.Create("voltmeter", params={"interval": dt})
        times = np.array([4.0, 12.0, 20.0])
        for time, weight in zip(times, weights, strict=True):
            spikes = nest.Create("spike_generator", params={"spike_times": [time - 1.0]})
            nest.Connect(spikes, neuron, syn_spec={"weight": weight, "delay": 1.0})
        nest.Connect(meter, neuron)
        nest.Simulate(40.0)
        theirs = np.array(meter.events["V_m"])
        x = torch.zeros(len(theirs) + 1, dtype=torch.float64)
        x[np.round(times / dt).astype(int)] = torch.tensor(weights, dtype=torch.float64) / 1000
        p = from_pynn(values, "iaf_psc_exp")
        ours = coba_lif_feed_forward_integral(x, None, p, dt, record_states=True)[1].v.numpy()
        errors.append(np.abs(ours[: len(theirs)] - theirs).max())
    print("largest errors in mV:", errors)
    assert errors[0] < 0.1
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2.0, rtol=0.1)


@pytest.mark.parametrize("t_ref", [0.1, 0.25, 0.301, 2.0, 5.0])
def test_the_refractory_period_has_nests_number_of_steps(t_ref: float) -> None:
    """A neuron with a constant current: a period lengthens the intervals between spikes by as many steps as in NEST."""
    nest = pytest.importorskip("nest", reason="NEST is optional: pip install nest-simulator")
    intervals = {}
    for period in (0.0, t_ref):
        values = dict(DEFAULTS["iaf_cond_exp"], t_ref=period, I_e=500.0)
        nest.ResetKernel()
        nest.resolution = 0.1
        neuron, recorder = nest.Create("iaf_cond_exp", params=values), nest.Create("spike_recorder")
        nest.Connect(neuron, recorder)
        nest.Simulate(100.0)
        theirs = np.diff(np.round(recorder.events["times"] / 0.1))
        p = from_pynn(values, "iaf_cond_exp")
        start = CobaLIFFeedForwardState(values["E_L"], 0.0, 0.0)
        spikes, _ = coba_lif_feed_forward_integral(torch.zeros(1000, 1), start, p, 0.1)
        ours = np.diff(spikes[:, 0].nonzero().flatten().numpy())
        assert len(set(ours)) == len(set(theirs)) == 1
        intervals[period] = int(ours[0]), int(theirs[0])
    longer = [after - before for after, before in zip(intervals[t_ref], intervals[0.0], strict=True)]
    assert longer[0] == longer[1] == math.ceil(t_ref / 0.1 - 1e-6)


@pytest.mark.parametrize("model", ["IF_cond_exp", "IF_curr_exp"])
def test_names_defaults_and_units_are_pynns(model: str) -> None:
    cells = pytest.importorskip("pyNN.standardmodels.cells", reason="PyNN is optional: pip install pynn")
    cell = getattr(cells, model)
    assert cell.default_parameters == DEFAULTS[model]
    units = {name: cell.units[name] for name in DEFAULTS[model]}
    potentials = dict.fromkeys(("v_rest", "e_rev_E", "e_rev_I", "v_thresh", "v_reset"), "mV")
    potentials = {name: unit for name, unit in potentials.items() if name in DEFAULTS[model]}
    times = dict.fromkeys(("tau_m", "tau_refrac", "tau_syn_E", "tau_syn_I"), "ms")
    assert units == potentials | times | {"cm": "nF", "i_offset": "nA"}


@pytest.mark.parametrize(
    ("p", "pynn", "nest"), [(BRETTE, "IF_cond_exp", "iaf_cond_exp"), (CUBA, "IF_curr_exp", "iaf_psc_exp")]
)
def test_pynn_translates_to_nest_as_we_do(p: CobaLIFParameters, pynn: str, nest: str) -> None:
    pytest.importorskip("nest", reason="NEST is optional: pip install nest-simulator")
    cells = pytest.importorskip("pyNN.nest", reason="PyNN is optional: pip install pynn").standardmodels.cells
    native = getattr(cells, pynn)(**to_pynn(p, pynn)).native_parameters
    native.shape = (1,)
    native.evaluate(simplify=True)
    assert native.as_dict() == pytest.approx(to_pynn(p, nest))
