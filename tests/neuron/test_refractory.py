"""The refractory period: a neuron that spiked is held at its reset potential for whole steps, and cannot spike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from coba_triton import (
    CobaLIF,
    CobaLIFCell,
    CobaLIFFeedForwardRefractoryState,
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    CobaLIFRecurrent,
    CobaLIFRefractoryState,
    CobaLIFState,
    coba_lif_feed_forward_integral,
    coba_lif_feed_forward_step,
    coba_lif_integral,
    coba_lif_step,
    open_result,
    simulate,
    unpack_spikes,
)
from coba_triton.tools.problems import problem, recurrent_problem
from helpers.bits import assert_same_bits

DT = 0.1
# Without a leak or synapses, a potential above the threshold stays there: the neuron spikes whenever it may.
EAGER = CobaLIFParameters(g_l=0.0, v_reset=-5.0, v_thresh=-10.0, v_rest=-20.0)


def spikes_of(refractory: Any, steps: int = 40, backend: str = "reference", **state: Any) -> Tensor:
    p = EAGER._replace(refractory=refractory)
    start = CobaLIFFeedForwardRefractoryState(-5.0, 0.0, 0.0, 0.0)._replace(**state)
    return coba_lif_feed_forward_integral(torch.zeros(steps, 1), start, p, DT, backend=backend)[0][:, 0]


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("refractory", "steps"), [(0.1, 1), (0.2, 2), (0.3, 3), (0.25, 3), (0.30000001, 3), (0.301, 4), (0.01, 1), (2.0, 20)]
)
def test_rounded_up_to_whole_steps(refractory, steps, backend) -> None:
    """Spikes come every 1 + n_ref steps, where n_ref is the period in steps, rounded up."""
    where = spikes_of(refractory, backend=backend).nonzero().flatten().tolist()
    assert where == list(range(0, 40, steps + 1))


def test_a_held_neuron_stays_at_reset_while_its_conductances_go_on() -> None:
    p = CobaLIFParameters(tau_syn_exc_inv=0.5, v_reset=-70.0, v_thresh=-30.0, refractory=0.5)
    state = CobaLIFFeedForwardRefractoryState(-20.0, 0.01, 0.0, 0.0)
    x = torch.zeros(8, 1)
    x[3] = 0.02
    spikes, states = coba_lif_feed_forward_integral(x, state, p, DT, record_states=True)
    assert spikes[0] == 1 and states.left[:6, 0].tolist() == [5, 4, 3, 2, 1, 0]
    assert (states.v[:6] == -70.0).all() and states.v[6] != -70.0
    decay = 1 + torch.tensor(-DT * 0.5)
    expected = torch.tensor(0.01)
    for t in range(8):
        expected = expected * decay + x[t, 0]
        torch.testing.assert_close(states.g_e[t, 0], expected, rtol=1e-6, atol=0)


def test_a_state_that_is_held_goes_on_without_a_period_in_the_parameters() -> None:
    assert spikes_of(0.0, 6, left=3.0).tolist() == [0, 0, 0, 1, 1, 1]
    assert spikes_of(torch.tensor(0.2), 7, left=1.0).tolist() == [0, 1, 0, 0, 1, 0, 0]


def test_no_period_changes_nothing() -> None:
    """The bits of parameters without one, also where the period is a tensor of zeros."""
    case = problem(50, (7,))
    plain = case.run("cpu")
    for nothing in (torch.tensor(0.0), torch.zeros(7)):
        case.parameters["refractory"] = nothing
        for backend in ("reference", "cpu"):
            spikes, state = case.run(backend)
            assert isinstance(state, CobaLIFFeedForwardRefractoryState)
            assert_same_bits([spikes, *state[:3]], [plain[0], *plain[1]])
            assert not state.left.any()


def test_records() -> None:
    x, weights = torch.ones(5, 2, 3), (torch.ones(4, 3), torch.zeros(4, 4))
    p = CobaLIFParameters(refractory=1.0)
    for given in (CobaLIFParameters(), p):
        of_step = coba_lif_feed_forward_step(x[0], None, given, DT)[1], coba_lif_step(x[0], None, *weights, given, DT)[1]
        of_run = coba_lif_feed_forward_integral(x, None, given, DT)[1], coba_lif_integral(x, None, *weights, given, DT)[1]
        kinds = (CobaLIFFeedForwardState, CobaLIFState)
        if given is p:
            kinds = (CobaLIFFeedForwardRefractoryState, CobaLIFRefractoryState)
        assert tuple(map(type, of_step)) == tuple(map(type, of_run)) == kinds
        # a state without `left` is one in which no neuron is held
        feed_forward, recurrent = of_run
        again = coba_lif_feed_forward_integral(x, feed_forward[:3] and CobaLIFFeedForwardState(*feed_forward[:3]), p, DT)
        assert isinstance(again[1], CobaLIFFeedForwardRefractoryState)
        assert isinstance(coba_lif_integral(x, CobaLIFState(*recurrent[:4]), *weights, p, DT)[1], CobaLIFRefractoryState)
    assert not recurrent.detach().left.requires_grad


BACKENDS = ["cpu", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["decay_first", "jump_first"])
@pytest.mark.parametrize(
    ("dtype", "per_neuron", "shape"),
    [(torch.float32, False, (7,)), (torch.float32, True, (3, 67)), (torch.float64, True, (5,))],
    ids=str,
)
def test_unconnected_neurons_have_the_bits_of_the_reference(backend, order, dtype, per_neuron, shape, device) -> None:
    where = torch.device("cpu") if backend == "cpu" else device
    case = problem(45, shape, dtype, where, per_neuron=per_neuron, refractory=True)
    (ours, grads), (theirs, their_grads) = (
        case.gradients(b, order=order, record_states=True) for b in (backend, "reference")
    )
    assert_same_bits(ours, theirs)
    assert ours[0].sum() > 5 and ours[-1].max() == (5 if per_neuron else 3)
    assert not grads.pop("left").any() and not their_grads.pop("left").any()
    for name in ("x", "v", "g_e", "g_i"):
        assert_same_bits([grads[name]], [their_grads[name]])
    assert not grads.pop("refractory").any()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, their_grads[name], rtol=1e-4, atol=1e-4 * float(their_grads[name].abs().max()))
    final = case.run(backend, order=order, block_steps=32)
    assert_same_bits([final[0], *final[1]], [theirs[0], *(field[-1] for field in theirs[1:])])
    case.state = type(case.state)(*(field.detach() for field in case.state))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["events", "dense", "sliced"])
@pytest.mark.parametrize(("dtype", "per_neuron"), [(torch.float32, False), (torch.float64, True)], ids=str)
def test_recurrent_networks_have_the_bits_of_the_reference(backend, path, dtype, per_neuron, device) -> None:
    if backend == "cpu" and path == "sliced":
        pytest.skip("the sliced path is for GPUs")
    where = torch.device("cpu") if backend == "cpu" else device
    case = recurrent_problem(37, 2, 21, dtype, where, per_neuron=per_neuron, refractory=True)
    expected, trace = case.run("reference", record_states=True)
    spikes, states = case.run(backend, record_states=True, path=path)
    assert_same_bits([spikes, *states], [expected, *trace])
    final = case.run(backend, path=path, block_steps=32)
    assert_same_bits([final[0], *final[1]], [expected, *(field[-1] for field in trace)])
    assert expected.sum() > 10 and (trace.left > 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_neuron", [False, True])
@pytest.mark.parametrize("order", ["decay_first", "jump_first"])
def test_gradients_of_recurrent_networks(backend, per_neuron, order, device) -> None:
    """In float64, by everything: within rounding of autograd through the reference."""
    where = torch.device("cpu") if backend == "cpu" else device
    case = recurrent_problem(37, 2, 9, torch.float64, where, per_neuron=per_neuron, refractory=True)
    ours, grads = case.gradients(backend, order=order, block_steps=32)
    theirs, their_grads = case.gradients("reference", order=order)
    assert_same_bits(ours, theirs)
    assert not grads.pop("left").any() and not grads.pop("refractory").any()
    for name, grad in grads.items():
        scale = float(their_grads[name].abs().max())
        torch.testing.assert_close(grad, their_grads[name], rtol=1e-9, atol=1e-9 * scale)
    assert all(grad.any() for grad in grads.values())


def test_a_held_step_passes_no_gradient_but_to_the_reset_potential() -> None:
    """One neuron, held in both steps: its potential is v_reset, whatever the state and the input are."""
    values = [torch.tensor([number], requires_grad=True) for number in (-15.0, 0.3, 0.1)]
    v_reset = torch.tensor(-70.0, requires_grad=True)
    x = torch.tensor([[0.5], [0.5]], requires_grad=True)
    p = CobaLIFParameters(v_reset=v_reset, refractory=1.0)
    for backend in ("reference", "cpu"):
        state = CobaLIFFeedForwardRefractoryState(*values, 2.0)
        _, after = coba_lif_feed_forward_integral(x, state, p, DT, backend=backend)
        assert after.v == -70.0 and after.left == 0.0
        by_v, by_reset, by_x = torch.autograd.grad(after.v.sum(), [values[0], v_reset, x])
        assert by_v == 0.0 and by_reset == 1.0 and not by_x.any()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiled_and_mapped(backend) -> None:
    case = problem(33, (4,), refractory=True)
    p = case.record()

    def run(x: Tensor, left: Tensor) -> tuple[Tensor, Any]:
        state = case.state._replace(left=left)
        return coba_lif_feed_forward_integral(x, state, p, case.dt, backend=backend)

    plain = run(case.x, case.state.left)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(case.x, case.state.left)
    assert_same_bits([compiled[0], *compiled[1]], [plain[0], *plain[1]])
    xs, lefts = torch.stack([case.x, -case.x]), torch.stack([case.state.left, case.state.left + 1])
    mapped = torch.func.vmap(run)(xs, lefts)
    each = [run(x, left) for x, left in zip(xs, lefts, strict=True)]
    fields = zip(*(after for _, after in each), strict=True)
    assert_same_bits([mapped[0], *mapped[1]], [torch.stack([z for z, _ in each]), *(torch.stack(list(f)) for f in fields)])


def test_modules() -> None:
    """A period of 0 is no buffer: what modules without one saved, they load. A number or a tensor is a buffer."""
    plain, held = CobaLIF(dt=DT), CobaLIF(CobaLIFParameters(refractory=0.5), dt=DT)
    assert "refractory" not in plain.state_dict() and plain.refractory == 0.0
    assert held.state_dict()["refractory"] == 0.5 and "refractory=0.5" in repr(held) and "refractory" not in repr(plain)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*refractory"):
        plain.load_state_dict(held.state_dict())
    x = torch.full((50, 3), 0.3)
    ours = coba_lif_feed_forward_integral(x, None, CobaLIFParameters(refractory=0.5), DT)
    spikes, state = held(x)
    assert_same_bits([spikes, *state], [ours[0], *ours[1]])
    assert not torch.equal(spikes, plain(x)[0])
    network = CobaLIFRecurrent(3, 4, CobaLIFParameters(refractory=torch.tensor([0.0, 0.1, 0.2, 0.3])), dt=DT)
    assert isinstance(network(torch.ones(5, 2, 3))[1], CobaLIFRefractoryState)
    cell = CobaLIFCell(3, 4, CobaLIFParameters(refractory=0.5), dt=DT)
    assert isinstance(cell(torch.ones(2, 3))[1], CobaLIFRefractoryState)
    with pytest.raises(ValueError, match="learn must name parameters among"):
        CobaLIF(CobaLIFParameters(refractory=0.5), learn=("refractory",))


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, "5 ms", None])
def test_wrong_periods(wrong) -> None:
    with pytest.raises((TypeError, ValueError), match="refractory must"):
        coba_lif_feed_forward_integral(torch.zeros(3, 2), None, CobaLIFParameters(refractory=wrong), DT)


def test_a_period_that_float32_cannot_count_down() -> None:
    assert spikes_of(2**24 * DT, 3).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match=r"refractory must be at most 16,777,216 steps of dt=0\.1 ms, got 1e\+09 ms"):
        spikes_of(1e9)


def test_wrong_counts() -> None:
    with pytest.raises(ValueError, match=r"state\.left must not be negative"):
        spikes_of(0.1, left=-1.0)


@pytest.mark.parametrize("connected", [False, True])
def test_a_run_in_blocks_that_is_cut_and_goes_on(connected, tmp_path) -> None:
    """Simulated into a file, cut, resumed with a longer source: the spikes and the state of one call."""
    p = CobaLIFParameters(v_thresh=-19.5, refractory=0.7)
    torch.manual_seed(3)
    network: Any = CobaLIFRecurrent(6, 5, p, dt=DT) if connected else CobaLIF(p, dt=DT)
    x = (torch.rand(300, 6) < 0.2).float() * (1.0 if connected else 0.05)
    if connected:
        network.input_weights.data *= 0.1
        network.recurrent_weights.data *= 0.1
    result = simulate(network, x[:200], sink=tmp_path / "run.zarr", block_steps=64, progress=False)
    result = simulate(network, x, sink=tmp_path / "run.zarr", block_steps=64, progress=False, resume=True)
    expected, state = network(x)
    assert torch.equal(torch.as_tensor(result.spikes[:]).to(expected.dtype), expected) and expected.sum() > 10
    again = open_result(tmp_path / "run.zarr").state
    assert_same_bits([field.to(torch.float32) for field in again], [field.detach() for field in state])
    assert type(again) is type(state) and again.left.any()
    bits, _ = coba_lif_feed_forward_integral(x, None, p, DT, spike_dtype="bits")
    assert connected or torch.equal(unpack_spikes(bits, 300, torch.float32), expected)
