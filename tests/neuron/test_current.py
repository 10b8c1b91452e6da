"""Current-based synapses: they drive a neuron with a current that does not depend on its potential."""

from __future__ import annotations

import io
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coba_triton import (
    CobaLIF,
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    CobaLIFRecurrent,
    CobaLIFState,
    Record,
    Synapses,
    coba_lif_feed_forward_integral,
    coba_lif_feed_forward_step,
    coba_lif_integral,
    from_pynn,
    open_result,
    simulate,
)
from coba_triton.stream import plotting
from coba_triton.tools.problems import VALUES, Problem, problem, recurrent_problem
from helpers.bits import assert_same_bits

DT = 0.1
CURRENT = CobaLIFParameters(1 / 5, 1 / 8, 1 / 0.25, 0.0125, -1.0, 1.0, -65.0, -65.0, -50.0, conductance_based=0)
BACKENDS = ["cpu", pytest.param("triton", marks=pytest.mark.slow)]


def where(backend: str, device: torch.device) -> torch.device:
    return torch.device("cpu") if backend == "cpu" else device


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("weight", [0.02, -0.03])
def test_a_pulse_has_its_closed_form(weight, backend, device) -> None:
    """After n steps v is dt / c_m * w * (a^n - b^n) / (a - b) above rest: a sum of products of two decays."""
    steps, p = 60, CURRENT._replace(v_thresh=1e6)
    x = torch.zeros(steps, 1, dtype=torch.float64, device=where(backend, device))
    x[0] = weight
    _, states = coba_lif_feed_forward_integral(x, None, p, DT, backend=backend, record_states=True)
    n = np.arange(1, steps + 1)
    rate = p.tau_syn_exc_inv if weight > 0 else p.tau_syn_inh_inv
    a, b = 1 - DT * p.c_m_inv * p.g_l, 1 - DT * rate
    expected = p.v_rest + DT * p.c_m_inv * weight * (a**n - b**n) / (a - b)
    np.testing.assert_allclose(states.v[:, 0].cpu(), expected, rtol=1e-13)
    current, other = (states.g_e, states.g_i) if weight > 0 else (states.g_i, states.g_e)
    np.testing.assert_allclose(current[:, 0].cpu(), abs(weight) * b ** (n - 1), rtol=1e-13)
    assert not other.any()


def test_currents_do_not_depend_on_the_potential() -> None:
    """The same current moves two neurons by as much; the same conductance moves one at its reversal potential by nothing."""
    v = torch.tensor([-80.0, 0.0], dtype=torch.float64)
    x = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    base = CURRENT._replace(g_l=0.0, v_thresh=1e6)
    moved = {}
    for kind, reversal in ((0, 1.0), (1, 0.0)):
        p = base._replace(conductance_based=kind, e_rev_E=reversal)
        moved[kind] = coba_lif_feed_forward_integral(x, CobaLIFFeedForwardState(v, 0.0, 0.0), p, DT)[1].v - v
    assert moved[0].tolist() == pytest.approx([DT / 0.25 * 0.5] * 2)
    assert moved[1].tolist() == pytest.approx([DT / 0.25 * 0.5 * 80.0, 0.0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["decay_first", "jump_first"])
@pytest.mark.parametrize(
    ("dtype", "per_neuron", "shape"),
    [(torch.float32, False, (7,)), (torch.float32, True, (3, 67)), (torch.float64, True, (5,))],
    ids=str,
)
def test_unconnected_neurons_have_the_bits_of_the_reference(backend, order, dtype, per_neuron, shape, device) -> None:
    case = problem(45, shape, dtype, where(backend, device), per_neuron=per_neuron, currents=True)
    (ours, grads), (theirs, their_grads) = (
        case.gradients(b, order=order, record_states=True) for b in (backend, "reference")
    )
    assert_same_bits(ours, theirs)
    assert ours[0].sum() > 5
    for name in ("x", "v", "g_e", "g_i"):
        assert_same_bits([grads[name]], [their_grads[name]])
    assert not grads.pop("conductance_based").any() and not their_grads.pop("conductance_based").any()
    for name, grad in grads.items():
        assert grad.any()
        torch.testing.assert_close(grad, their_grads[name], rtol=1e-4, atol=1e-4 * float(their_grads[name].abs().max()))
    final = case.run(backend, order=order, block_steps=32)
    assert_same_bits([final[0], *final[1]], [theirs[0], *(field[-1] for field in theirs[1:])])


@pytest.mark.parametrize("connected", [False, True])
def test_a_few_neurons_on_triton(connected, device) -> None:
    """Small enough for Triton's interpreter: bits of a mixed population, and its gradients in float64."""
    make: Any = recurrent_problem if connected else problem
    sizes: Any = (24, 2, 9) if connected else (12, (5,))
    case = make(*sizes, torch.float64, device, per_neuron=True, currents=True)
    (ours, grads), (theirs, their_grads) = (case.gradients(name) for name in ("triton", "reference"))
    assert_same_bits(ours, theirs)
    assert ours[0].any()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, their_grads[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", ["decay_first", "jump_first"])
@pytest.mark.parametrize("record_states", [False, True])
@pytest.mark.parametrize("number", [0.0, 0.3, 1.7])
def test_gradients_have_autograd_s_bits_for_any_number(number, record_states, order) -> None:
    """In float32: sums and products in another order would round otherwise."""
    case = problem(60, (40,))
    case.parameters["conductance_based"] = torch.tensor(number)
    found, expected = (case.gradients(b, order=order, record_states=record_states)[1] for b in ("cpu", "reference"))
    for name in ("x", "v", "g_e", "g_i"):
        assert expected[name].any()
        assert_same_bits([found[name]], [expected[name]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["events", "dense", "sliced"])
@pytest.mark.parametrize(("dtype", "per_neuron"), [(torch.float32, False), (torch.float64, True)], ids=str)
def test_recurrent_networks_have_the_bits_of_the_reference(backend, path, dtype, per_neuron, device) -> None:
    if backend == "cpu" and path == "sliced":
        pytest.skip("the sliced path is for GPUs")
    case = recurrent_problem(37, 2, 21, dtype, where(backend, device), per_neuron=per_neuron, currents=True)
    expected, trace = case.run("reference", record_states=True)
    spikes, states = case.run(backend, record_states=True, path=path)
    assert_same_bits([spikes, *states], [expected, *trace])
    final = case.run(backend, path=path, block_steps=32)
    assert_same_bits([final[0], *final[1]], [expected, *(field[-1] for field in trace)])
    assert expected.sum() > 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_neuron", [False, True])
@pytest.mark.parametrize("order", ["decay_first", "jump_first"])
def test_gradients_of_recurrent_networks(backend, per_neuron, order, device) -> None:
    """In float64, by everything: within rounding of autograd through the reference."""
    case = recurrent_problem(37, 2, 9, torch.float64, where(backend, device), per_neuron=per_neuron, currents=True)
    ours, grads = case.gradients(backend, order=order, block_steps=32)
    theirs, their_grads = case.gradients("reference", order=order)
    assert_same_bits(ours, theirs)
    assert not grads.pop("conductance_based").any()
    for name, grad in grads.items():
        scale = float(their_grads[name].abs().max())
        torch.testing.assert_close(grad, their_grads[name], rtol=1e-9, atol=1e-9 * scale)
    assert all(grad.any() for grad in grads.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("delay", [False, True])
def test_sparse_networks(backend, delay, device) -> None:
    """With the bits of the reference, and gradients in float64 by everything within rounding of autograd's."""
    case = recurrent_problem(40, 2, 12, torch.float64, where(backend, device), per_neuron=True, currents=True)
    generator = torch.Generator().manual_seed(2)
    recurrent = case.recurrent_weights.cpu() * (torch.rand(12, 12, generator=generator) < 0.5)
    targets, sources = recurrent.nonzero(as_tuple=True)
    delays = 0.01 * torch.randint(1, 6, (len(targets),), generator=generator) if delay else None
    numbers = recurrent[targets, sources]
    wired = Synapses.from_coo(targets, sources, numbers, delays, shape=(12, 12)).to(case.x.device)
    p, results = case.record(), {}
    for name in (backend, "reference"):
        weights = wired.weights.detach().requires_grad_()
        tracked = {n: value.detach().requires_grad_() for n, value in case.parameters.items() if n in VALUES}
        spikes, state = coba_lif_integral(
            case.x, case.state, case.input_weights, wired.with_weights(weights), p._replace(**tracked), case.dt, backend=name
        )
        loss = (spikes.cumsum(0).sin()).sum() + state.v.square().sum() + state.g_e.sum()
        results[name] = [spikes, state.v, state.g_e, state.g_i], torch.autograd.grad(loss, [weights, *tracked.values()])
    (ours, grads), (theirs, their_grads) = results[backend], results["reference"]
    assert_same_bits([field.detach() for field in ours], [field.detach() for field in theirs])
    assert ours[0].sum() > 10 and all(grad.any() for grad in grads)
    torch.testing.assert_close(grads, their_grads, rtol=1e-9, atol=1e-9)


def part_of(case: Problem, kind: slice, number: int) -> Any:
    """The neurons of a kind of a problem alone, with a Python number for their kind."""
    p = case.record()
    own = {name: value[kind] for name, value in case.parameters.items() if name in VALUES}
    state = CobaLIFFeedForwardState(*(torch.as_tensor(field)[kind] for field in case.state))
    return case.x[:, kind].contiguous(), state, p._replace(**own, conductance_based=number), case.dt


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_mixed_population_is_its_parts(backend) -> None:
    case = problem(50, (11,), per_neuron=True, currents=True)
    spikes, states = case.run(backend, record_states=True)
    for number in (0, 1):
        kind = slice(number, None, 2)
        alone, its_states = coba_lif_feed_forward_integral(*part_of(case, kind, number), backend=backend, record_states=True)
        assert_same_bits([spikes[:, kind], *(field[:, kind] for field in states)], [alone, *its_states])
        assert alone.sum() > 5


def test_two_kinds_in_a_connected_population() -> None:
    """Neurons of one kind drive those of the other: step by step by hand, in double precision."""
    steps, kind = 200, np.array([0.0, 1.0])
    p = CURRENT._replace(
        e_rev_E=torch.tensor([1.0, 0.0]).double(), e_rev_I=torch.tensor([-1.0, -80.0]).double(),
        conductance_based=torch.from_numpy(kind),
    )  # fmt: skip
    x = (np.random.default_rng(3).random((steps, 1, 1)) < 0.2).astype(float)
    w_in, w_rec = np.array([[0.9], [0.012]]), np.array([[0.0, -0.4], [0.01, 0.0]])
    tensors = map(torch.from_numpy, (w_in, w_rec))
    spikes, state = coba_lif_integral(torch.from_numpy(x), None, *tensors, p, DT)
    v, e, i, z = np.full(2, -65.0), np.zeros(2), np.zeros(2), np.zeros(2)
    fired = np.zeros((steps, 2))
    for t in range(steps):
        e = e * (1 - DT / 5) + np.maximum(w_in, 0) @ x[t, 0] + np.maximum(w_rec, 0) @ z
        i = i * (1 - DT / 8) + np.maximum(-w_in, 0) @ x[t, 0] + np.maximum(-w_rec, 0) @ z
        current = np.where(kind == 0, e - i, e * (0.0 - v) + i * (-80.0 - v))
        v = v + DT / 0.25 * (0.0125 * (-65.0 - v) + current)
        z = (v > -50.0).astype(float)
        v, fired[t] = np.where(z > 0, -65.0, v), z
    assert (fired.sum(0) > 3).all()
    np.testing.assert_array_equal(spikes[:, 0].numpy(), fired)
    np.testing.assert_allclose(state.v[0], v, rtol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_conductances_written_out_change_nothing(backend) -> None:
    case = problem(50, (7,))
    plain = case.gradients(backend)
    for one in (torch.tensor(1.0), torch.ones(7), torch.tensor(1)):
        case.parameters["conductance_based"] = one
        found, grads = case.gradients(backend)
        assert_same_bits(found, plain[0])
        assert_same_bits([grads[name] for name in ("x", "v", "g_e", "g_i")], [plain[1][n] for n in ("x", "v", "g_e", "g_i")])


def test_a_single_step_by_hand() -> None:
    """Its derivative by the potential before it has the leak alone."""
    v = torch.tensor([-60.0], dtype=torch.float64, requires_grad=True)
    state = CobaLIFFeedForwardState(v, 0.3, 0.1)
    p = CURRENT._replace(method="heaviside")
    _, after = coba_lif_feed_forward_step(torch.zeros(1, dtype=torch.float64), state, p, DT)
    current = 0.3 * (1 - DT / 5) - 0.1 * (1 - DT / 8)
    assert after.v.item() == pytest.approx(-60.0 + DT / 0.25 * (0.0125 * -5.0 + current))
    (grad,) = torch.autograd.grad(after.v.sum(), v)
    assert grad.item() == pytest.approx(1 - DT / 0.25 * 0.0125)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
@pytest.mark.parametrize("kind", [0, torch.tensor([0.0, 1.0, 1.0, 0.0])], ids=["all", "mixed"])
def test_compiled_and_mapped(kind) -> None:
    case = problem(33, (4,))
    p = case.record()._replace(conductance_based=kind)

    def run(x: Tensor) -> tuple[Tensor, Any]:
        return coba_lif_feed_forward_integral(x, case.state, p, case.dt, backend="cpu")

    plain = run(case.x)
    assert not torch.equal(plain[1].v, case.run("cpu")[1].v)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(case.x)
    assert_same_bits([compiled[0], *compiled[1]], [plain[0], *plain[1]])
    mapped = torch.func.vmap(run)(torch.stack([case.x, -case.x]))
    each = [run(case.x), run(-case.x)]
    fields = zip(*(after for _, after in each), strict=True)
    assert_same_bits([mapped[0], *mapped[1]], [torch.stack([z for z, _ in each]), *(torch.stack(list(f)) for f in fields)])


def test_modules() -> None:
    """Conductances are no buffer: what modules without the parameter saved, they load. Another number or a tensor is one."""
    plain, current = CobaLIF(dt=DT), CobaLIF(CURRENT, dt=DT)
    assert "conductance_based" not in plain.state_dict() and plain.conductance_based == 1
    assert "conductance_based" not in repr(plain) and "conductance_based=0" in repr(current)
    assert current.state_dict()["conductance_based"] == 0.0
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conductance_based"):
        plain.load_state_dict(current.state_dict())
    x = 2.0 * (torch.rand(80, 3, generator=torch.Generator().manual_seed(0)) < 0.2)
    expected = coba_lif_feed_forward_integral(x, None, CURRENT, DT)
    spikes, state = current(x)
    assert_same_bits([spikes, *state], [expected[0], *expected[1]])
    assert spikes.sum() > 3
    mixed = CobaLIF(CURRENT._replace(conductance_based=torch.tensor([0.0, 1.0, 0.0])), dt=DT)
    assert torch.equal(mixed(x)[0][:, ::2], spikes[:, ::2]) and not torch.equal(mixed(x)[0], spikes)
    with pytest.raises(ValueError, match="learn must name parameters among"):
        CobaLIF(CURRENT, learn=("conductance_based",))


def test_drawn_weights_are_currents() -> None:
    """A volley of one spike of every input is the current that brings a neuron to its threshold, with either sign."""
    torch.manual_seed(1)
    network = CobaLIFRecurrent(2000, 50, CURRENT, dt=DT)
    to_threshold = CURRENT.g_l * (CURRENT.v_thresh - CURRENT.v_rest)
    for weights in (network.input_weights, network.recurrent_weights):
        for part in (weights.relu(), (-weights).relu()):
            assert part.sum(1).mean().item() == pytest.approx(to_threshold, rel=0.1)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0, "current", None, True])
def test_wrong_kinds(wrong) -> None:
    with pytest.raises((TypeError, ValueError), match="conductance_based must"):
        coba_lif_feed_forward_integral(torch.zeros(3, 2), None, CURRENT._replace(conductance_based=wrong), DT)


def test_a_long_run_looks_at_the_numbers_of_a_tensor() -> None:
    network = CobaLIF(CURRENT._replace(conductance_based=torch.tensor([0.0, math.nan])), dt=DT)
    with pytest.raises(ValueError, match=r"conductance_based must be finite, got nan at \[1\]"):
        simulate(network, torch.zeros(40, 2), progress=False)


def test_currents_do_not_make_a_step_unstable() -> None:
    """A current of 30 nA only moves the potential; a conductance of 30 uS draws it at a rate of 120 per ms."""
    state = CobaLIFFeedForwardState(-65.0, 30.0, 0.0)
    x = torch.zeros(1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coba_lif_feed_forward_integral(x, state, CURRENT._replace(g_l=0.0126), DT)
    with pytest.warns(UserWarning, match=r"c_m_inv \* \(g_l \+ g_e \+ g_i\) is 12 at the given state"):
        coba_lif_feed_forward_integral(x, state, CURRENT._replace(g_l=0.0126, conductance_based=1), DT)
    with pytest.warns(UserWarning, match=r"dt \* c_m_inv \* g_l is 4, more than 2; make dt smaller than 0\.025"):
        coba_lif_feed_forward_integral(x, state, CURRENT._replace(g_l=10.0), DT)


def test_long_runs_warn_of_conductances_alone() -> None:
    x = torch.full((64, 2), 3.0)
    p = CURRENT._replace(v_thresh=1e6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate(CobaLIF(p, dt=DT), x, progress=False)
    mixed = CobaLIF(p._replace(conductance_based=torch.tensor([0.0, 1.0])), dt=DT)
    with pytest.warns(UserWarning, match=r"unstable: dt \* c_m_inv \* \(g_l \+ g_e \+ g_i\) has reached"):
        simulate(mixed, x, progress=False)
    with pytest.warns(UserWarning, match=r"fire in every step .* are in nA \(1 pA is 0\.001 nA\)"):
        simulate(CobaLIF(CURRENT, dt=DT), torch.full((128, 2), 100.0), progress=False)


@pytest.mark.parametrize("connected", [False, True])
def test_a_run_in_blocks_that_is_cut_and_goes_on(connected, tmp_path) -> None:
    """Simulated into a file, cut, resumed with a longer source: the spikes and the state of one call."""
    torch.manual_seed(3)
    network: Any = CobaLIFRecurrent(6, 5, CURRENT, dt=DT) if connected else CobaLIF(CURRENT, dt=DT)
    x = (torch.rand(300, 6) < 0.2).float()
    if connected:
        network.input_weights.data = network.input_weights.data.abs()
    options: dict[str, Any] = dict(sink=tmp_path / "run.zarr", block_steps=64, progress=False)
    simulate(network, x[:200], **options)
    result = simulate(network, x, **options, resume=True)
    expected, state = network(x)
    assert torch.equal(torch.as_tensor(result.spikes[:]).to(expected.dtype), expected) and expected.sum() > 10
    again = open_result(tmp_path / "run.zarr")
    assert_same_bits([field.to(torch.float32) for field in again.state], [field.detach() for field in state])
    assert again.parameter("conductance_based").tolist() == [0.0] * len(again.parameter("v_thresh"))
    if not connected:
        other = CobaLIF(CURRENT._replace(conductance_based=1), dt=DT)
        with pytest.raises(ValueError, match="conductance_based"):
            simulate(other, x, **options, resume=True)


def test_runs_with_conductances_are_those_of_older_versions(tmp_path) -> None:
    """Their files do not have the parameter, so what an older version has begun goes on."""
    result = simulate(CobaLIF(dt=DT), torch.zeros(40, 2), sink=tmp_path / "run.zarr", progress=False)
    assert "conductance_based" not in result.attributes["config"]["parameters"]
    assert result.parameter("conductance_based").tolist() == [1.0, 1.0]
    assert result.parameter("refractory").tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "unit", "drawn"),
    [(0, "nA", "pA"), (1, "uS", "nS"), (torch.tensor([0.0, 1.0]), "uS or nA", "nS or pA")],
    ids=str,
)
def test_pictures_and_traces_have_the_unit_of_the_synapses(kind, unit, drawn) -> None:
    axes = pytest.importorskip("matplotlib.figure", reason="matplotlib is optional").Figure().add_subplot()
    record = Record(variables=("v", "g_e"), neurons=(0, 1), inputs=True)
    p = CURRENT._replace(conductance_based=kind)
    result = simulate(CobaLIF(p, dt=DT), torch.zeros(40, 2), record=record, progress=False)
    plotting.plot_traces(result, axes, variable="g_e")
    assert axes.get_ylabel() == f"g_e ({unit})"
    plotting.plot_traces(result, axes)
    assert axes.get_ylabel() == "v (mV)"
    plotting.plot_inputs(result, axes)
    assert axes.get_ylabel() == f"mean input\n({drawn} per ms)"
    pytest.importorskip("neo", reason="neo is optional: pip install 'coba-triton[neo]'")
    v, g_e = result.to_neo().segments[0].analogsignals
    units = "mV", "dimensionless" if "or" in unit else unit
    assert (v.units.dimensionality.string, g_e.units.dimensionality.string) == units


def test_records_of_older_versions_load() -> None:
    """A pickle holds the fields of its time; those that came later have their defaults."""
    fields = CobaLIFParameters(g_l=0.5)[:12]

    class Older:
        def __reduce__(self) -> Any:
            return CobaLIFParameters, fields

    assert pickle.loads(pickle.dumps(Older())) == CobaLIFParameters(g_l=0.5)
    buffer = io.BytesIO()
    torch.save({"p": Older()}, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["p"] == CobaLIFParameters(g_l=0.5)


def test_out_takes_spikes_of_a_mixed_population() -> None:
    """A tensor of kinds that requires a gradient gets none, so nothing follows the call."""
    kind = torch.tensor([0.0, 1.0], requires_grad=True)
    out = torch.empty(5, 2)
    p = CURRENT._replace(conductance_based=kind)
    spikes, state = coba_lif_feed_forward_integral(torch.ones(5, 2), None, p, DT, out=out)
    assert spikes is out and not state.v.requires_grad


def test_a_network_of_pynn_s_currents() -> None:
    """Brette et al.'s network of currents: PyNN's parameters and weights in nA as they are written."""
    p = from_pynn(dict(cm=0.2, tau_m=20.0, v_rest=-49.0, v_reset=-60.0, tau_syn_E=5.0, tau_syn_I=10.0), "IF_curr_exp")
    assert (p.e_rev_E, p.e_rev_I, p.conductance_based, p.g_l) == (1.0, -1.0, 0, 0.01)
    weights = torch.tensor([[0.0, 0.00162 * 200], [-0.009 * 200, 0.0]])
    state = CobaLIFState(0.0, torch.full((1, 2), -55.0), 0.0, 0.0)
    spikes, after = coba_lif_integral(torch.zeros(3000, 1, 1), state, torch.zeros(2, 1), weights, p, DT)
    assert spikes.sum(0)[0, 0] > spikes.sum(0)[0, 1] > 0  # the excited one fires more than the inhibited one
    assert after.g_e[0, 1] == 0.0 and after.g_i[0, 0] == 0.0
