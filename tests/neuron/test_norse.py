"""Beside norse: our modules inside norse's containers, norse's records inside our functions, and the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import coba_triton as ours
from coba_triton import CobaLIF, CobaLIFCell, CobaLIFFeedForwardCell, CobaLIFParameters, CobaLIFRecurrent

norse = pytest.importorskip("norse.torch", reason="norse is optional: pip install 'coba-triton[norse]'")

T, B, INPUTS, N, DT = 200, 4, 6, 10, 0.1
NEURON = dict(tau_syn_exc_inv=0.2, tau_syn_inh_inv=0.1, c_m_inv=5.0, g_l=0.05, e_rev_E=0.0, e_rev_I=-80.0)
NEURON |= dict(v_rest=-60.0, v_reset=-65.0, v_thresh=-50.0)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def exact(*size: int) -> Tensor:
    """Weights in uS on a grid of 2^-10, so that all sums of them are exact."""
    return (torch.randn(*size) * 4).round() / 1024


def parameters(kind: str, **values: Any) -> Any:
    """A record of norse's own class, or of ours."""
    if kind == "theirs, default":
        return norse.CobaLIFParameters()
    record = norse.CobaLIFParameters if kind.startswith("theirs") else CobaLIFParameters
    neuron = {k: torch.as_tensor(v) for k, v in NEURON.items()} if kind.endswith("tensors") else NEURON
    return record(**neuron | values)


def loop_feed_forward(x: Tensor, state: Any, p: Any) -> tuple[Tensor, Any]:
    """norse's step over time."""
    spikes = []
    for row in x:
        z, state = norse.coba_lif_feed_forward_step(row, state, p, DT)
        spikes.append(z)
    return torch.stack(spikes), state


def feed_forward_problem(p: Any) -> tuple[Tensor, Any]:
    x = float(p.g_l) * (0.2 * torch.randn(T, B, N) + 0.03)
    v = torch.full((B, N), float(p.v_rest))
    return x, norse.CobaLIFFeedForwardState(v, torch.rand(B, N) / 20, torch.rand(B, N) / 20)


@pytest.mark.parametrize("kind", ["theirs, default", "theirs, tensors", "theirs, numbers", "ours, numbers"])
def test_feed_forward_bits(kind: str) -> None:
    """norse's records and states go into our function, and ``jump_first`` gives norse's spikes and states."""
    p = parameters(kind)
    x, state = feed_forward_problem(p)
    want, want_state = loop_feed_forward(x, state, p)
    got, got_state = ours.coba_lif_feed_forward_integral(x, state, p, DT, order="jump_first")
    assert 0.01 < want.mean() < 0.5
    assert torch.equal(got, want)
    for name in want_state._fields:
        assert torch.equal(getattr(got_state, name), getattr(want_state, name)), name
    decay_first, _ = ours.coba_lif_feed_forward_integral(x, state, p, DT)
    assert not torch.equal(decay_first, want)


@pytest.mark.parametrize("kind", ["theirs, tensors", "ours, numbers"])
def test_state_goes_back_to_norse(kind: str) -> None:
    p = parameters(kind)
    x, state = feed_forward_problem(p)
    want, want_state = loop_feed_forward(x, state, p)
    first, state = CobaLIF(p, DT, order="jump_first")(x[:90], state)
    rest, state = loop_feed_forward(x[90:], state, p)
    assert torch.equal(torch.cat([first, rest]), want)
    assert torch.equal(state.v, want_state.v)


def gradient(step: Any, p: Any) -> Tensor:
    """Of one step that ends around the threshold, by its input."""
    x = torch.linspace(0.04, 0.13, N).requires_grad_()
    z, _ = step(x, norse.CobaLIFFeedForwardState(torch.full((N,), -52.0), torch.zeros(N), torch.zeros(N)), p, DT)
    (grad,) = torch.autograd.grad(z.sum(), x)
    return grad


def ours_jump_first(x: Tensor, state: Any, p: Any, dt: float) -> Any:
    spikes, state = ours.coba_lif_feed_forward_integral(x[None], state, p, dt, order="jump_first")
    return spikes[0], state


@pytest.mark.parametrize(
    ("method", "alpha"), [("super", 1.0), ("triangle", 0.3), ("tanh", 0.5), ("circ", 0.7), ("heavi_erfc", 0.5)]
)
def test_surrogate_derivatives_agree(method: str, alpha: float) -> None:
    p = parameters("ours, numbers", method=method, alpha=alpha)
    want = gradient(norse.coba_lif_feed_forward_step, p)
    assert want.unique().numel() > 3
    torch.testing.assert_close(gradient(ours_jump_first, p), want, rtol=1e-4, atol=1e-6)


def test_norse_has_no_alpha_in_superspike() -> None:
    """norse's ``super`` is 1 / (|x| + 1)^2 for every alpha; ours has the paper's steepness, and is norse's at 1."""
    norse_100, norse_1, ours_1, ours_100 = (
        gradient(step, parameters("ours, numbers", alpha=alpha))
        for step, alpha in (
            (norse.coba_lif_feed_forward_step, 100.0),
            (norse.coba_lif_feed_forward_step, 1.0),
            (ours_jump_first, 1.0),
            (ours_jump_first, 100.0),
        )
    )
    assert torch.equal(norse_100, norse_1)
    torch.testing.assert_close(ours_1, norse_1)
    assert (ours_100 < 0.01 * norse_100).any()


def recurrent_problem() -> tuple[Tensor, Tensor, Tensor, Any]:
    x = (torch.rand(T, B, INPUTS) < 0.3).float()
    state = norse.CobaLIFState(
        (torch.rand(B, N) < 0.5).float(), torch.full((B, N), -52.0), torch.rand(B, N) / 4, torch.rand(B, N) / 20
    )
    return x, exact(N, INPUTS), exact(N, N), state


def loop_recurrent(x: Tensor, state: Any, w_in: Tensor, w_rec: Tensor, p: Any) -> tuple[Tensor, Any]:
    """norse's step over time."""
    spikes = []
    for row in x:
        z, state = norse.coba_lif_step(row, state, w_in, w_rec, p, DT)
        spikes.append(z)
    return torch.stack(spikes), state


@pytest.mark.parametrize("kind", ["theirs, tensors", "theirs, numbers", "ours, numbers"])
def test_recurrent_bits_without_input(kind: str) -> None:
    """Where norse's recurrent step is right: it has no input."""
    p = parameters(kind)
    x, w_in, w_rec, state = recurrent_problem()
    x = torch.zeros_like(x)
    w_rec = w_rec + 1 / 1024  # so that the population keeps itself going
    want, want_state = loop_recurrent(x, state, w_in, w_rec, p)
    got, got_state = ours.coba_lif_integral(x, state, w_in, w_rec, p, DT, order="jump_first")
    assert 0.1 < want[T // 2 :].mean() < 0.6
    assert torch.equal(got, want)
    for name in want_state._fields:
        assert torch.equal(getattr(got_state, name), getattr(want_state, name)), name


def test_norse_drops_the_input_of_its_recurrent_step() -> None:
    """norse documents ``g_e + relu(w_in) x + relu(w_rec) z`` and assigns g_e twice; ours is the documented equation."""
    p = parameters("ours, numbers")
    x, w_in, w_rec, state = recurrent_problem()
    with_input, after = norse.coba_lif_step(x[0], state, w_in, w_rec, p, DT)
    without, after_silence = norse.coba_lif_step(torch.zeros_like(x[0]), state, w_in, w_rec, p, DT)
    assert torch.equal(with_input, without)
    assert torch.equal(after.g_e, after_silence.g_e)

    _, got = ours.coba_lif_integral(x[:1], state, w_in, w_rec, p, DT, order="jump_first")
    g_e = state.g_e + x[0] @ w_in.relu().mT + state.z @ w_rec.relu().mT
    g_i = state.g_i + x[0] @ (-w_in).relu().mT + state.z @ (-w_rec).relu().mT
    assert torch.equal(got.g_e, g_e + -DT * p.tau_syn_exc_inv * g_e)
    assert torch.equal(got.g_i, g_i + -DT * p.tau_syn_inh_inv * g_i)
    assert not torch.equal(got.g_e, after.g_e)


def test_what_docs_norse_says_of_the_cell() -> None:
    """It starts at 0 mV and not at rest, draws weights by the fan-in, has autapses, and another name for its input."""
    cell = norse.CobaLIFCell(INPUTS, 1000, parameters("ours, numbers"), DT)
    zeros = torch.zeros(1, 1000)
    _, at_zero = cell(torch.zeros(1, INPUTS), norse.CobaLIFState(zeros, zeros, zeros, zeros))
    _, left_out = cell(torch.zeros(1, INPUTS))
    assert torch.equal(left_out.v, at_zero.v)
    assert 1000**0.5 * cell.recurrent_weights.std().item() == pytest.approx(1, abs=0.01)
    assert cell.recurrent_weights.diagonal().all()
    with pytest.raises(TypeError, match="input_tensor"):
        norse.coba_lif_step(input_tensor=zeros, state=at_zero, input_weights=zeros, recurrent_weights=zeros)


def test_bio_defaults_are_norses() -> None:
    from norse.torch.functional import coba_lif

    for name in norse.CobaLIFParameters._fields:  # ours have more: a refractory period, for one
        assert getattr(ours.default_bio_parameters, name) == pytest.approx(getattr(coba_lif.default_bio_parameters, name)), (
            name
        )
        assert getattr(CobaLIFParameters(), name) == pytest.approx(getattr(norse.CobaLIFParameters(), name)), name
    assert ours.default_bio_state == coba_lif.default_bio_state


@pytest.mark.filterwarnings("ignore:the neurons of")
@pytest.mark.parametrize("with_state", [False, True], ids=["at rest", "state"])
def test_lift_runs_our_cells_over_time(with_state: bool) -> None:
    p = parameters("ours, numbers")
    cell, sequence = CobaLIFCell(INPUTS, N, p, DT), CobaLIFRecurrent(INPUTS, N, p, DT)
    x, w_in, w_rec, state = recurrent_problem()
    with torch.no_grad():
        cell.input_weights.copy_(w_in)
        cell.recurrent_weights.copy_(w_rec)
    sequence.load_state_dict(cell.state_dict())
    lifted = norse.Lift(cell)
    got, got_state = lifted((x, state)) if with_state else lifted(x)
    want, want_state = sequence(x, state if with_state else None)
    assert want.mean() > 0.01
    assert torch.equal(got, want)
    assert torch.equal(got_state.v, want_state.v)

    currents = 0.03 * torch.randn(T, B, N) + 0.01
    got, got_state = norse.Lift(CobaLIFFeedForwardCell(p, DT))(currents)
    want, want_state = CobaLIF(p, DT)(currents)
    assert torch.equal(got, want)
    assert torch.equal(got_state.v, want_state.v)


def network() -> Any:
    p = parameters("ours, numbers", alpha=0.5)
    return norse.SequentialState(
        norse.Lift(torch.nn.Linear(INPUTS, N)),
        CobaLIF(p, DT, learn=("v_thresh",)),
        CobaLIFRecurrent(N, N, p, DT),
        norse.Lift(torch.nn.Linear(N, 3)),
        norse.LI(),
    )


@pytest.mark.filterwarnings("ignore:the neurons of")
def test_sequential_state_carries_our_states() -> None:
    model, x = network(), torch.rand(T, B, INPUTS)
    whole, final = model(x)
    assert whole.shape == (T, B, 3)
    assert [type(state).__name__ for state in final] == [
        "NoneType",
        "CobaLIFFeedForwardState",
        "CobaLIFState",
        "NoneType",
        "LIState",
    ]
    first, state = model(x[:70])
    rest, state = model(x[70:], state)
    torch.testing.assert_close(torch.cat([first, rest]), whole)
    assert torch.equal(state[2].v, final[2].v)


def test_sequential_state_trains() -> None:
    model, x = network(), torch.rand(50, B, INPUTS)
    target = torch.randn(50, B, 3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[-1] < losses[0]
