"""Learning from the defaults: rates at the start, what Adam makes of them, and warnings of layers that cannot learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coba_triton import (
    CobaLIF,
    CobaLIFParameters,
    CobaLIFRecurrent,
    coba_lif_feed_forward_integral,
    coba_lif_integral,
    coba_lif_step,
    default_learning_parameters,
    simulate,
)


@pytest.fixture(autouse=True)
def one_thread(number_of_threads: None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def spikes_of(probability: float, *shape: int) -> Tensor:
    return (torch.rand(*shape) < probability).float()


# Rates at the start


@pytest.mark.parametrize("neurons", [32, 128, 1000])
@pytest.mark.parametrize("inputs", [8, 64, 784, 4096])
def test_a_population_of_any_size_fires_at_the_rate_of_its_input(inputs: int, neurons: int) -> None:
    spikes, _ = CobaLIFRecurrent(inputs, neurons)(spikes_of(0.12, 100, 4, inputs))
    assert 0.03 < spikes.mean() < 0.3
    assert (spikes.sum((0, 1)) == 0).double().mean() < 0.3


def test_a_linear_layer_as_torch_makes_it_drives_neurons() -> None:
    for inputs in (64, 784):
        spikes, _ = nn.Sequential(nn.Linear(inputs, 128), CobaLIF())(spikes_of(0.12, 100, 4, inputs))
        assert 0.02 < spikes.mean() < 0.2


def test_default_parameters_are_those_of_a_membrane_of_20_ms() -> None:
    p = default_learning_parameters
    assert p.g_l == 1.0
    assert 1 / p.c_m_inv == pytest.approx(20.0)  # ms, as g_l is 1
    assert p.alpha * (p.v_thresh - p.v_reset) == 1.0  # the factor of a gradient through a reset at the threshold
    assert CobaLIF().p == CobaLIFRecurrent(2, 2).p
    assert CobaLIF().dt == CobaLIFRecurrent(2, 2).dt == 1.0
    for name in ("tau_syn_exc_inv", "c_m_inv", "g_l", "v_thresh", "method"):
        assert getattr(CobaLIF().p, name) == getattr(p, name)


def test_functions_keep_the_defaults_of_norse() -> None:
    x = torch.ones(5, 3)
    spikes, state = coba_lif_feed_forward_integral(x, None)
    want, want_state = coba_lif_feed_forward_integral(x, None, CobaLIFParameters(), 0.001)
    assert torch.equal(spikes, want) and torch.equal(state.v, want_state.v)
    assert CobaLIFParameters().c_m_inv == 1 / 0.2 and CobaLIFParameters().alpha == 100.0


# Learning


class Recurrent(nn.Module):
    """The shortest classifier: nothing is chosen but its size."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = CobaLIFRecurrent(64, 128, return_state=False), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Any:
        return self.readout(self.hidden(x).sum(0))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(64, 128), CobaLIF(return_state=False))
        self.readout = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Any:
        return self.readout(self.hidden(x).sum(0))


def accuracy_after(epochs: int, make: Callable[[], nn.Module], seed: int) -> float:
    """Of a classifier of scikit-learn's digits on images that it has not seen."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits are scikit-learn's")
    torch.manual_seed(seed)
    images, digits = (torch.tensor(part) for part in datasets.load_digits(return_X_y=True))
    images, order = images.float() / 16, torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(epochs):
        for chosen in train[torch.randperm(len(train))].split(32):
            x = (torch.rand(50, len(chosen), 64) < 0.4 * images[chosen]).float()
            loss = nn.functional.cross_entropy(model(x), digits[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        told = model((torch.rand(50, 360, 64) < 0.4 * images[test]).float()).argmax(1)
    return (told == digits[test]).double().mean().item()


@pytest.mark.parametrize("make", [Recurrent, FeedForward])
def test_the_defaults_learn_digits(make: Callable[[], nn.Module]) -> None:
    assert accuracy_after(4, make, seed=0) >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize(("make", "seed"), [(Recurrent, 1), (FeedForward, 2)])
def test_the_defaults_learn_digits_with_other_seeds(make: Callable[[], nn.Module], seed: int) -> None:
    assert accuracy_after(15, make, seed) >= 0.92


# Spikes alone, for torch.nn.Sequential


def test_spikes_alone() -> None:
    x = spikes_of(0.15, 40, 2, 8)
    for layer in (CobaLIF(return_state=False), CobaLIFRecurrent(8, 8, return_state=False)):
        layer.return_state = True
        want, state = layer(x)
        layer.return_state = False
        assert torch.equal(layer(x), want)
        assert torch.equal(layer(x, state), coba_again(layer, x, state))
        assert "return_state=False" in repr(layer)
        traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.Linear(8, 2)))
        assert traced(x).shape == (40, 2, 2)
    model = nn.Sequential(nn.Linear(8, 6), CobaLIF(return_state=False), nn.Linear(6, 2))
    model(x).sum().backward()
    assert model[0].weight.grad is not None and model[0].weight.grad.abs().sum() > 0


def coba_again(layer: Any, x: Tensor, state: Any) -> Tensor:
    """The spikes that the functions give."""
    if isinstance(layer, CobaLIF):
        return coba_lif_feed_forward_integral(x, state, layer.p, layer.dt)[0]
    return coba_lif_integral(x, state, layer.input_weights, layer.recurrent_weights, layer.p, layer.dt)[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"return_state": 1}, TypeError, "return_state must be True or False, got int"),
        (
            {"return_state": False, "record_states": True},
            ValueError,
            "return_state must be True to return recorded states, got False; leave out record_states",
        ),
    ],
    ids=["type", "recorded"],
)
def test_message(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CobaLIF(**options)


# Warnings


def warned(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return seen


@pytest.mark.parametrize("spike_dtype", [None, torch.uint8, "bits"], ids=str)
def test_silent_neurons_are_warned_of_once(spike_dtype: Any) -> None:
    layer = CobaLIF(spike_dtype=spike_dtype)
    (seen,) = warned(lambda: layer(torch.full((25, 4, 6), 0.01)))
    assert str(seen.message) == (
        "no neuron of CobaLIF fired in 25 steps of 1 ms, although there was input: what follows gets nothing, and hardly "
        "any gradient comes back. Make the input or the weights larger, or v_thresh lower. An input that opens half of "
        "the leak conductance, g_l = 1, is a strong one"
    )
    assert seen.filename == __file__
    assert not warned(lambda: layer(torch.full((25, 4, 6), 0.01)))


@pytest.mark.parametrize("spike_dtype", [None, "bits"], ids=str)
def test_saturated_neurons_are_warned_of_once(spike_dtype: Any) -> None:
    """The trap of norse's parameters, whose membrane has 0.8 ms, with steps of 1 ms."""
    layer = CobaLIFRecurrent(64, 128, CobaLIFParameters(), dt=0.75, spike_dtype=spike_dtype)
    seen = [str(w.message) for w in warned(lambda: layer(spikes_of(0.12, 50, 4, 64)))]
    assert len(seen) == 1 and seen[0].startswith("the neurons of CobaLIFRecurrent fired in 9")
    assert seen[0].endswith("The leak conductance, g_l, is 0.25, and the time constant of the membrane is 0.8 ms")
    assert not warned(lambda: layer(spikes_of(0.12, 50, 4, 64)))


def test_a_layer_that_falls_silent_in_training_is_warned_of() -> None:
    layer, x = CobaLIFRecurrent(64, 32), spikes_of(0.15, 50, 4, 64)
    assert not warned(lambda: layer(x))
    with torch.no_grad():
        layer.input_weights.mul_(-1).clamp_(max=0)
    assert [len(warned(lambda: layer(x))) for _ in range(3)] == [1, 0, 0]  # in the second call
    copied = [len(warned(lambda: layer(torch.zeros(50, 4, 64)))) for _ in range(8)]
    assert not any(copied)


def test_what_is_not_worth_a_warning() -> None:
    for x in (torch.zeros(50, 3), torch.full((10, 3), 0.01), torch.full((50, 0), 0.01), torch.zeros(0, 3)):
        assert not warned(lambda x=x: CobaLIF()(x))
    compiled = torch.compile(CobaLIF(), backend="eager")
    assert not warned(lambda: compiled(torch.full((50, 3), 0.01)))
    assert not warned(lambda: torch.func.vmap(CobaLIF())(torch.full((2, 50, 3), 0.01)))
    assert not warned(lambda: CobaLIF().to("meta")(torch.full((50, 3), 0.01, device="meta")))


P = default_learning_parameters._replace(tau_syn_exc_inv=1.2)  # with steps of 1 ms
CALLS: dict[str, Callable[[Any], Any]] = {
    "module": lambda p: CobaLIF(p),
    "sequence": lambda p: coba_lif_feed_forward_integral(torch.zeros(5, 3), None, p, 1.0),
    "tensor": lambda p: coba_lif_feed_forward_integral(torch.zeros(5, 3), None, p._replace(g_l=torch.ones(3)), 1.0),
    "recurrent": lambda p: coba_lif_integral(torch.zeros(5, 3), None, torch.ones(2, 3), torch.zeros(2, 2), p, 1.0),
    "step": lambda p: coba_lif_step(torch.zeros(3), None, torch.ones(2, 3), torch.zeros(2, 2), p, 1.0),
    "simulate": lambda p: simulate(CobaLIF(), torch.full((640, 3), 9.0), progress=False),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_points_at_the_callers_line(name: str) -> None:
    """And not at PyTorch, which calls modules for the user."""
    p = P._replace(tau_syn_inh_inv=0.2 + len(name) / 1000)  # what was looked at once is not warned of again
    seen = warned(lambda: CALLS[name](p))
    assert seen
    assert {warning.filename for warning in seen} == {__file__}


def test_a_warning_of_a_module_in_a_sequential_points_at_the_callers_line() -> None:
    layers = nn.Sequential(nn.Linear(3, 3), CobaLIF())
    with torch.no_grad():
        layers[0].weight.zero_()
        layers[0].bias.fill_(0.01)
    (seen,) = warned(lambda: layers(torch.ones(50, 3)))
    assert seen.filename == __file__
