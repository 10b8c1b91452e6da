"""The reference against an oracle in plain Python, and what users may pass to it."""

from __future__ import annotations

import math
from collections import namedtuple

import pytest
import torch

from coba_triton import (
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    CobaLIFState,
    coba_lif_feed_forward_integral,
    coba_lif_feed_forward_step,
    coba_lif_integral,
    coba_lif_step,
    default_bio_parameters,
    default_bio_state,
    pack_spikes,
)
from coba_triton.backend.reference import spike
from coba_triton.neuron.surrogate import SURROGATES
from coba_triton.tools.problems import DT, VALUES, problem
from helpers.bits import assert_same_bits

ORDERS = ["decay_first", "jump_first"]


def oracle(drive_e, drive_i, v, g_e, g_i, order):
    """One neuron in Python floats: the equations of the documentation, term by term."""
    q = VALUES
    if order == "jump_first":
        a, b = g_e + drive_e, g_i + drive_i
        g_e = a + (-DT * q["tau_syn_exc_inv"]) * a
        g_i = b + (-DT * q["tau_syn_inh_inv"]) * b
    else:
        g_e = (g_e + (-DT * q["tau_syn_exc_inv"]) * g_e) + drive_e
        g_i = (g_i + (-DT * q["tau_syn_inh_inv"]) * g_i) + drive_i
    current = (q["g_l"] * (q["v_rest"] - v) + g_e * (q["e_rev_E"] - v)) + g_i * (q["e_rev_I"] - v)
    u = v + (DT * q["c_m_inv"]) * current
    z = 1.0 if u - q["v_thresh"] > 0 else 0.0
    return z, (1 - z) * u + z * q["v_reset"], g_e, g_i


@pytest.mark.parametrize("order", ORDERS)
def test_feed_forward_is_the_documented_equation(order: str) -> None:
    case = problem(50, (3,), torch.float64)
    spikes, states = case.run("reference", order=order, record_states=True)
    assert 0.05 < spikes.mean() < 0.5
    for n in range(3):
        v, g_e, g_i = (float(field[n]) for field in case.state)
        for t in range(50):
            x = float(case.x[t, n])
            z, v, g_e, g_i = oracle(max(x, 0.0), max(-x, 0.0), v, g_e, g_i, order)
            assert (z, v, g_e, g_i) == (spikes[t, n], states.v[t, n], states.g_e[t, n], states.g_i[t, n])


@pytest.mark.parametrize("order", ORDERS)
def test_recurrent_is_the_documented_equation(order: str) -> None:
    """Weights on a 2^-10 grid: every order of the sum of weights gives the same number."""
    g = torch.Generator().manual_seed(3)
    steps, inputs, neurons = 60, 4, 5
    grid = lambda *size: torch.round(torch.randn(*size, generator=g, dtype=torch.float64) * 300) / 1024  # noqa: E731
    w_in, w_rec = grid(neurons, inputs), grid(neurons, neurons)
    x = (torch.rand(steps, inputs, generator=g, dtype=torch.float64) < 0.3).double()
    p = CobaLIFParameters(**VALUES)
    state = CobaLIFState(z=torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64), v=-0.2, g_e=0.0, g_i=0.0)
    spikes, states = coba_lif_integral(x, state, w_in, w_rec, p, DT, order=order, record_states=True)
    assert 0.05 < spikes.mean() < 0.5

    z_last, v = state.z.tolist(), [-0.2] * neurons
    g_e, g_i = [0.0] * neurons, [0.0] * neurons
    for t in range(steps):
        z_new = []
        for n in range(neurons):
            drive = [0.0, 0.0]
            sources = [(w_in[n, j], x[t, j]) for j in range(inputs)]
            sources += [(w_rec[n, j], z_last[j]) for j in range(neurons)]
            recurrent = [0.0, 0.0]
            for j, (weight, value) in enumerate(sources):
                total = drive if j < inputs else recurrent
                total[0 if weight > 0 else 1] += float(abs(weight)) * float(value)
            if order == "decay_first":
                # the two sums are added one after the other
                q = VALUES
                e = ((g_e[n] + (-DT * q["tau_syn_exc_inv"]) * g_e[n]) + drive[0]) + recurrent[0]
                i = ((g_i[n] + (-DT * q["tau_syn_inh_inv"]) * g_i[n]) + drive[1]) + recurrent[1]
                current = (q["g_l"] * (q["v_rest"] - v[n]) + e * (q["e_rev_E"] - v[n])) + i * (q["e_rev_I"] - v[n])
                u = v[n] + (DT * q["c_m_inv"]) * current
                z = 1.0 if u - q["v_thresh"] > 0 else 0.0
                v[n], g_e[n], g_i[n] = (1 - z) * u + z * q["v_reset"], e, i
            else:
                e, i = (g_e[n] + drive[0]) + recurrent[0], (g_i[n] + drive[1]) + recurrent[1]
                z, v[n], g_e[n], g_i[n] = oracle(0.0, 0.0, v[n], e, i, order)
            z_new.append(z)
        z_last = z_new
        assert spikes[t].tolist() == z_last
        assert states.z[t].tolist() == z_last
        assert (states.v[t].tolist(), states.g_e[t].tolist(), states.g_i[t].tolist()) == (v, g_e, g_i)


def test_threshold_is_strict() -> None:
    """A potential that lands exactly on the threshold is no spike; one ulp above is."""
    p = CobaLIFParameters(v_thresh=-20.0)
    z, _ = coba_lif_feed_forward_step(torch.zeros(2), CobaLIFFeedForwardState(-20.0, 0.0, 0.0), p)
    assert z.tolist() == [0.0, 0.0]
    v = torch.nextafter(torch.tensor(-20.0), torch.tensor(0.0))
    z, state = coba_lif_feed_forward_step(torch.zeros(1), CobaLIFFeedForwardState(v, 0.0, 0.0), p._replace(g_l=0.0))
    assert (z.item(), state.v.item()) == (1.0, -70.0)


DERIVATIVES = {
    "super": lambda x, a: 1 / (a * abs(x) + 1) ** 2,
    "triangle": lambda x, a: a * max(0.0, 1 - abs(x)),
    "tanh": lambda x, a: 1 - math.tanh(a * x) ** 2,
    "circ": lambda x, a: a**3 / (a**2 + x**2) ** 1.5,
    "heavi_erfc": lambda x, a: 2 / math.sqrt(math.pi) * math.exp(-((a * x) ** 2)),
    "heaviside": lambda x, a: 0.0,
}


def test_derivatives_are_complete() -> None:
    assert set(DERIVATIVES) == set(SURROGATES)


@pytest.mark.parametrize("method", DERIVATIVES)
def test_surrogate_derivative(method: str) -> None:
    x = torch.tensor([-1.7, -0.4, -0.01, 0.0, 0.02, 0.6, 2.1], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(1.5, dtype=torch.float64)
    z = spike(x, alpha, method)
    assert z.tolist() == [0, 0, 0, 0, 1, 1, 1]
    expected = torch.tensor([DERIVATIVES[method](value, 1.5) for value in x.tolist()], dtype=torch.float64)
    if method == "heaviside":
        assert not z.requires_grad
    else:
        (grad,) = torch.autograd.grad(z.sum(), x)
        torch.testing.assert_close(grad, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("method", [name for name in DERIVATIVES if name not in ("heaviside", "triangle")])
def test_reference_differentiates_twice_and_forward(method: str) -> None:
    x = torch.tensor([-0.4, 0.3], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(1.5, dtype=torch.float64)
    (first,) = torch.autograd.grad(spike(x, alpha, method).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    eps = 1e-6
    for n, value in enumerate(x.tolist()):
        slope = (DERIVATIVES[method](value + eps, 1.5) - DERIVATIVES[method](value - eps, 1.5)) / (2 * eps)
        assert second[n].item() == pytest.approx(slope, rel=1e-6)
    _, tangent = torch.func.jvp(lambda x: spike(x, alpha, method), (x.detach(),), (torch.ones(2, dtype=torch.float64),))
    assert torch.equal(tangent, first.detach())


def test_whole_sequence_differentiates_twice() -> None:
    case = problem(5, (2,), torch.float64)
    case.x.requires_grad_()
    spikes, state = case.run("reference")
    (grad,) = torch.autograd.grad(spikes.sum() + state.v.sum(), case.x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), case.x)
    assert second.abs().max() > 0


def test_steps_make_the_integral() -> None:
    case = problem(20, (2, 3))
    spikes, final = case.run("reference")
    p = CobaLIFParameters(**case.parameters, alpha=case.alpha)
    state = case.state
    for t in range(20):
        z, state = coba_lif_feed_forward_step(case.x[t], state, p, DT)
        assert torch.equal(z, spikes[t])
    assert_same_bits(state, final)


def test_recurrent_steps_make_the_integral() -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(20, 2, 4, generator=g) < 0.3).float()
    w_in, w_rec = torch.randn(5, 4, generator=g), torch.randn(5, 5, generator=g)
    p = CobaLIFParameters(**VALUES)
    spikes, final = coba_lif_integral(x, None, w_in, w_rec, p, DT)
    state = None
    for t in range(20):
        z, state = coba_lif_step(x[t], state, w_in, w_rec, p, DT)
        assert torch.equal(z, spikes[t])
    assert_same_bits(state, final)


def test_recurrent_gradients_reach_everything() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(10, 2, 4, generator=g).requires_grad_()
    w_in = torch.randn(5, 4, generator=g).requires_grad_()
    w_rec = torch.randn(5, 5, generator=g).requires_grad_()
    parameters = {name: torch.tensor(value, requires_grad=True) for name, value in VALUES.items()}
    state = CobaLIFState(*(torch.full((2, 5), value).requires_grad_() for value in (0.5, -0.2, 0.1, 0.1)))
    spikes, final = coba_lif_integral(x, state, w_in, w_rec, CobaLIFParameters(**parameters, alpha=5.0), DT)
    (spikes.sum() + final.v.sum()).backward()
    for name, leaf in {"x": x, "w_in": w_in, "w_rec": w_rec, **state._asdict(), **parameters}.items():
        assert leaf.grad is not None and leaf.grad.abs().max() > 0, name


def test_defaults() -> None:
    p = CobaLIFParameters()
    assert tuple(p) == (1 / 5, 1 / 5, 1 / 0.2, 1 / 20 * 1 / 0.2, -100, 60, -20, -70, -10, "super", 100.0, 0.0, 1)
    assert default_bio_parameters == p._replace(
        tau_syn_exc_inv=1 / 0.3, tau_syn_inh_inv=1 / 0.5, e_rev_E=0, e_rev_I=-70, v_thresh=-50, v_reset=-65, v_rest=-65
    )
    assert default_bio_state == (0.0, -65.0, 0.0, 0.0)
    assert CobaLIFState._fields == ("z", "v", "g_e", "g_i")


def test_rest_is_the_initial_state() -> None:
    v_rest = torch.tensor(-0.3, requires_grad=True)
    p = CobaLIFParameters(**VALUES | {"v_rest": v_rest, "g_l": 0.0}, method="heaviside")
    _, state = coba_lif_feed_forward_integral(torch.zeros(3, 2), None, p, DT)
    assert state.v.tolist() == pytest.approx([-0.3, -0.3])
    (grad,) = torch.autograd.grad(state.v.sum(), v_rest)
    assert grad == 2.0  # without a leak, v_rest acts through the initial state only


def test_plain_floats_are_a_state() -> None:
    x = torch.full((4, 3), 0.5)
    spikes, state = coba_lif_feed_forward_integral(x, default_bio_state, default_bio_parameters, 0.01)
    assert spikes.shape == (4, 3) and state.v.shape == (3,)
    z, state = coba_lif_step(x[0], default_bio_state, torch.ones(2, 3), torch.zeros(2, 2), default_bio_parameters)
    assert z.shape == (2,) and state.z.shape == (2,)


def test_records_are_duck_typed() -> None:
    their_state = namedtuple("theirs", "v g_e g_i")(torch.tensor(-0.2), torch.zeros(3), torch.zeros(3))
    their_p = namedtuple("theirs", CobaLIFParameters._fields)(*CobaLIFParameters(**VALUES))
    x = problem(10, (3,)).x
    ours = coba_lif_feed_forward_integral(x, CobaLIFFeedForwardState(-0.2, 0.0, 0.0), CobaLIFParameters(**VALUES), DT)
    theirs = coba_lif_feed_forward_integral(x, their_state, their_p, DT)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1].v, theirs[1].v)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 4), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_any_rank_and_size(shape: tuple[int, ...], steps: int) -> None:
    spikes, states = coba_lif_feed_forward_integral(torch.zeros(steps, *shape), record_states=True)
    assert spikes.shape == (steps, *shape) and states.v.shape == (steps, *shape)
    _, final = coba_lif_feed_forward_integral(torch.zeros(steps, *shape))
    assert final.v.shape == shape


def test_state_and_parameters_broadcast_with_the_input() -> None:
    x = problem(6, (4,)).x
    state = CobaLIFFeedForwardState(torch.full((3, 1), -0.2), 0.0, torch.zeros(4))
    p = CobaLIFParameters(**VALUES | {"v_thresh": torch.tensor([[-0.1], [0.0], [0.1]])})
    spikes, final = coba_lif_feed_forward_integral(x, state, p, DT)
    assert spikes.shape == (6, 3, 4) and final.v.shape == (3, 4)
    row, _ = coba_lif_feed_forward_integral(x, CobaLIFFeedForwardState(-0.2, 0.0, 0.0), p._replace(v_thresh=0.1), DT)
    assert torch.equal(spikes[:, 2], row)


@pytest.mark.parametrize(
    ("x", "v", "v_thresh", "expected"),
    [
        (torch.float32, -0.2, 0.0, torch.float32),
        (torch.float64, -0.2, 0.0, torch.float64),
        (torch.float16, -0.2, 0.0, torch.float32),
        (torch.bfloat16, -0.2, 0.0, torch.float32),
        (torch.bool, -0.2, 0.0, torch.float32),
        (torch.int64, -0.2, 0.0, torch.float32),
        (torch.float32, torch.tensor(-0.2, dtype=torch.float64), 0.0, torch.float32),
        (torch.float32, torch.zeros(2, dtype=torch.float64), 0.0, torch.float64),
        (torch.float32, -0.2, torch.zeros(2, dtype=torch.float64), torch.float64),
        (torch.float32, -0.2, torch.tensor(0.0, dtype=torch.float64), torch.float32),
        (torch.bool, torch.zeros(2, dtype=torch.float16), 0, torch.float32),
    ],
    ids=str,
)
def test_dtype_promotion(x: torch.dtype, v: object, v_thresh: object, expected: torch.dtype) -> None:
    state = CobaLIFFeedForwardState(v, 0.0, 0.0)
    spikes, final = coba_lif_feed_forward_integral(torch.ones(3, 2).to(x), state, CobaLIFParameters(v_thresh=v_thresh))
    assert {field.dtype for field in final} == {expected}
    assert spikes.dtype == (x if x.is_floating_point else expected)


def test_products_with_dt_round_like_eager_pytorch() -> None:
    """A float32 tensor makes a float32 product, a Python number a double one that is rounded once."""
    tau = 1 / 0.3
    g_e = torch.tensor([0.7])
    for value, product in ((tau, -0.1 * tau), (torch.tensor(tau), -0.1 * torch.tensor(tau))):
        _, state = coba_lif_feed_forward_step(
            torch.zeros(1), CobaLIFFeedForwardState(0.0, g_e, 0.0), CobaLIFParameters(tau_syn_exc_inv=value), 0.1
        )
        assert torch.equal(state.g_e, g_e + product * g_e)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, "bits"], ids=str)
def test_spike_dtype(dtype: torch.dtype | str) -> None:
    case = problem(40, (5,))
    plain, _ = case.run("reference")
    spikes, _ = case.run("reference", spike_dtype=dtype)
    assert torch.equal(spikes, pack_spikes(plain) if dtype == "bits" else plain.to(dtype))
