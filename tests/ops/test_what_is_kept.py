"""What was made of tensors is found again until one of them changes."""

from __future__ import annotations

import gc
import math

import pytest
import torch

from coba_triton import CobaLIFParameters, CobaLIFRecurrent, Synapses, coba_lif_integral
from coba_triton.ops import grid, tensors
from coba_triton.ops import kept as kept_module
from coba_triton.ops.grid import grid_of
from coba_triton.ops.kept import Kept, contents_of
from helpers.bits import assert_same_bits


def test_is_found_until_a_tensor_changes() -> None:
    kept: Kept[object] = Kept()
    a, b = torch.zeros(3), torch.zeros(3)
    first = kept.get(a, (b, None), 1, object)
    assert kept.get(a, (b, None), 1, object) is first
    assert kept.find(a, (b, None), 2) is None
    assert kept.find(a, (b.clone(), None), 1) is None
    assert kept.find(b, (b, None), 1) is None
    b.add_(1)
    assert kept.find(a, (b, None), 1) is None
    second = kept.get(a, (b, None), 1, object)
    assert second is not first and kept.find(a, (b, None), 1) is second
    a.add_(1)
    assert kept.find(a, (b, None), 1) is None


def test_is_given_up_with_its_tensor() -> None:
    kept: Kept[object] = Kept()
    a = torch.zeros(3)
    kept.keep(a, (), None, object())
    assert len(kept._made) == 1
    del a
    gc.collect()
    assert len(kept._made) == 0


def test_nothing_is_kept_for_tensors_that_do_not_tell_of_changes() -> None:
    kept: Kept[object] = Kept()
    plain = torch.zeros(3)
    with torch.inference_mode():
        silent = torch.zeros(3)
        for of, others in ((silent, ()), (plain, (silent,))):
            assert kept.get(of, others, None, object) is not kept.get(of, others, None, object)
            assert of not in kept._made
        assert kept.get(plain, (), None, object) is kept.get(plain, (), None, object)


def test_a_change_of_any_number_is_seen() -> None:
    """Of tensors that are small, and of such whose checksum is made: all rows, and what is left of the last one."""
    for length in (1, 5, 4096 * 5 + 1000):
        numbers = torch.randn(length)
        before = contents_of(numbers)
        assert contents_of(numbers.clone()) == before
        for place in {0, length // 2, length - 1}:
            kept = numbers[place].item()
            numbers.data[place] = kept + 1e-3
            assert contents_of(numbers) != before
            numbers.data[place] = kept
        assert contents_of(numbers) == before
        assert contents_of(numbers.double()) != before
    assert contents_of(torch.tensor([0.0])) != contents_of(torch.tensor([-0.0]))
    assert contents_of(torch.tensor([math.nan])) == contents_of(torch.tensor([math.nan]))
    assert contents_of(torch._neg_view(torch.ones(2))) == contents_of(-torch.ones(2))


def test_numbers_on_a_gpu_that_are_learned_are_new_every_time() -> None:
    fixed, learned = torch.zeros(3, device="meta"), torch.zeros(3, device="meta", requires_grad=True)
    assert contents_of(fixed) == contents_of(fixed)
    assert contents_of(learned) != contents_of(learned)


def test_nothing_is_kept_that_a_captured_graph_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is the graph's, and has no numbers before the graph runs."""
    kept: Kept[object] = Kept()
    a = torch.zeros(3, device="meta")
    monkeypatch.setattr(tensors, "is_capturing", lambda device: device.type == "meta")
    first = kept.get(a, (), None, object)
    assert kept.find(a, (), None) is None
    monkeypatch.undo()
    second = kept.get(a, (), None, object)
    assert second is not first and kept.find(a, (), None) is second


def test_the_host_waits_for_what_is_kept_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later call may be on another stream. What is learned is not kept, and nothing waits."""
    waits = []
    monkeypatch.setattr(kept_module, "may_be_kept", waits.append)
    indptr, targets = torch.arange(4, device="meta"), torch.zeros(3, dtype=torch.int32, device="meta")
    fixed, learned = torch.zeros(3, device="meta"), torch.zeros(3, device="meta", requires_grad=True)
    grid_of(fixed, indptr, targets, 5, spikes=False)
    assert len(waits) == 2  # its grid, and the largest number of synapses onto a neuron
    monkeypatch.undo()
    grid_of(learned, indptr, targets, 5)
    monkeypatch.setattr(kept_module, "may_be_kept", waits.append)
    monkeypatch.setattr(grid, "_count_fan_in", None)  # known from the call before
    grid_of(learned, indptr, targets, 5)
    assert len(waits) == 2


def fused(weights: torch.Tensor) -> None:
    weights.grad = torch.full_like(weights, -1.0)
    torch.optim.Adam([weights], lr=0.05, fused=True).step()


def data(weights: torch.Tensor) -> None:
    weights.data = weights.data + 0.05


def data_in_place(weights: torch.Tensor) -> None:
    weights.data.add_(0.05)


def from_vector(weights: torch.Tensor) -> None:
    torch.nn.utils.vector_to_parameters(torch.full((weights.numel(),), 0.05), [weights])


def by_numpy(weights: torch.Tensor) -> None:
    weights.detach().numpy()[:] += 0.05


@pytest.mark.parametrize("synapses", [600, 20_000])
@pytest.mark.parametrize("change", [fused, data, data_in_place, from_vector, by_numpy])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_weights_that_change_uncounted_are_used(backend, change, synapses) -> None:
    """PyTorch's count of changes stays as it is; what is simulated is what new synapses with these weights give."""
    generator = torch.Generator().manual_seed(0)
    made = Synapses.fixed_number(200, 200, synapses // 200, weight=1e-4, seed=1)
    weights = torch.full((made.count,), 1e-4).requires_grad_()
    network = made._replace(weights=weights)
    x = (torch.rand(40, 8, 30, generator=generator) < 0.2).float()
    inputs = 0.2 * torch.rand(200, 30, generator=generator)

    def simulate(network: Synapses) -> torch.Tensor:
        spikes, state = coba_lif_integral(x, None, inputs, network, CobaLIFParameters(), 0.1, backend=backend)
        spikes.sum().backward()
        return torch.cat([spikes.flatten(), *(field.flatten() for field in (state.v, state.g_e, network.weights.grad))])

    before = simulate(network)
    counted = weights._version
    change(weights)
    assert change in (from_vector, data) or weights._version == counted
    weights.grad = None
    found = simulate(network)
    expected = simulate(made._replace(weights=weights.detach().clone().requires_grad_()))
    assert_same_bits([found], [expected])
    assert not torch.equal(found, before)


def test_a_module_may_become_double_after_it_ran() -> None:
    synapses = Synapses.fixed_number(30, 30, 5, weight=0.01, seed=1)
    network = CobaLIFRecurrent(8, 30, dt=0.1, recurrent_weights=synapses, backend="cpu")
    x = (torch.rand(50, 2, 8) < 0.3).float()
    network(x)
    spikes, _ = network.double()(x.double())
    assert spikes.dtype == torch.float64 and spikes.shape == (50, 2, 30)


@pytest.mark.parametrize("after", ["double", "load_state_dict"])
def test_a_module_that_ran_may_swap_its_tensors(after) -> None:
    """PyTorch can convert and load in this way, and then refuses tensors of which there are weak references."""
    synapses = Synapses.fixed_number(30, 30, 5, weight=0.01, seed=1)
    network = CobaLIFRecurrent(8, 30, dt=0.1, recurrent_weights=synapses, backend="cpu")
    x = (torch.rand(50, 2, 8) < 0.3).float()
    other = CobaLIFRecurrent(8, 30, dt=0.1, recurrent_weights=synapses.with_weights(2 * synapses.weights), backend="cpu")
    network(x)[0].sum().backward()
    network.zero_grad()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        network.double() if after == "double" else network.load_state_dict(other.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
    if after == "double":
        assert network(x.double())[0].dtype == torch.float64
    else:
        assert torch.equal(network(x)[0], other(x)[0])
