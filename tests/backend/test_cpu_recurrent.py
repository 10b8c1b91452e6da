"""The CPU path of recurrent networks beyond what it shares with Triton's: threads, few synapses, the choice of a path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coba_triton import CobaLIFParameters, CobaLIFState, coba_lif_integral
from coba_triton.backend.cpu import launch as cpu_launch
from coba_triton.neuron.surrogate import SURROGATES
from coba_triton.tools.problems import recurrent_problem
from helpers.bits import assert_same_bits
from helpers.marks import slow

ORDERS = ["decay_first", "jump_first"]


def test_arbitrary_weights_have_the_bits_of_the_triton_kernel(device) -> None:
    """Both sum ascending by source, so they agree on any weights."""
    case = recurrent_problem(12, 2, 40, device=device, exact=False)
    theirs = case.run("triton", path="events", record_states=True)
    case = recurrent_problem(12, 2, 40, exact=False)
    ours = case.run("cpu", path="events", record_states=True)
    assert ours[0].sum() > 10
    assert_same_bits([ours[0], *ours[1]], [field.cpu() for field in (theirs[0], *theirs[1])])


def test_bits_do_not_depend_on_blocks_batch_and_threads(threads) -> None:
    case = recurrent_problem(300, 3, 129, exact=False)
    options = {"path": "events", "record_states": True}
    threads(1)
    whole = case.run("cpu", block_steps=320, **options)
    for count in (1, 2, 3):
        threads(count)
        split = case.run("cpu", block_steps=64 * count, **options)
        assert torch.get_num_threads() == count
        assert_same_bits([split[0], *split[1]], [whole[0], *whole[1]])
    case.x, case.state = case.x[:, 1:2], CobaLIFState(*(field[1:2] for field in case.state))
    alone = case.run("cpu", **options)
    assert_same_bits([alone[0], *alone[1]], [field[:, 1:2] for field in (whole[0], *whole[1])])


def test_gradients_do_not_depend_on_threads(threads) -> None:
    case = recurrent_problem(70, 3, 300, exact=False)
    everything = []
    for count in (1, 2, 3):
        threads(count)
        outputs, grads = case.gradients("cpu", path="events")
        everything.append([*outputs, *grads.values()])
    for result in everything[1:]:
        assert_same_bits(result, everything[0])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_gradient_that_is_the_same_in_all_steps_is_read_as_one_row(sparse, dtype) -> None:
    """As the gradient by the spikes of a readout of their counts is; with the bits of the same numbers in every step."""
    case = recurrent_problem(70, 3, 40, dtype, exact=False)
    counts = torch.linspace(-1, 1, 3 * 40, dtype=dtype).view(3, 40).flip(0)
    weights = case.recurrent_weights.to_sparse_csr() if sparse else case.recurrent_weights
    leaves = [leaf.clone().requires_grad_() for leaf in (case.x, case.input_weights, weights)]
    spikes, _ = coba_lif_integral(leaves[0], None, *leaves[1:], CobaLIFParameters(), 0.1, backend="cpu", block_steps=32)
    assert spikes.any()
    found = [
        [grad.to_dense() for grad in torch.autograd.grad(spikes, leaves, by_spikes, retain_graph=True)]
        for by_spikes in (counts.expand(spikes.shape), counts.expand(spikes.shape).contiguous())
    ]
    assert all(grad.any() for grad in found[0])
    assert_same_bits(*found)


# Whether states are recorded, and parameters are those of each neuron: the first surrogate has both, the others take turns.
# A surrogate takes seconds to compile with each of the two.
CODES = [
    (method, record)
    for number, method in enumerate(SURROGATES)
    for record in (False, True)
    if number % 2 == record or not number
]


@pytest.mark.parametrize("path", ["events", "dense"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("method", "record"), CODES)
def test_gradients(method, order, record, path) -> None:
    """Everything by everything in float64, to 1e-8, over several blocks."""
    case = recurrent_problem(70, 3, 20, torch.float64, exact=path == "dense", binary=False, per_neuron=record)
    options = {"method": method, "order": order, "record_states": record}
    ours, our_grads = case.gradients("cpu", path=path, **options)
    theirs, their_grads = case.gradients("reference", **options)
    assert torch.equal(ours[0], theirs[0])
    for name, expected in their_grads.items():
        scale = expected.abs().max().clamp(min=1e-30)
        assert (our_grads[name] - expected).abs().max() <= 1e-8 * scale, name


def few_synapses(weights: torch.Tensor, density: float = 0.03) -> torch.Tensor:
    """The same weights, most of them 0."""
    return weights * (torch.rand(weights.shape, generator=torch.Generator().manual_seed(7)) < density)


@pytest.mark.parametrize("binary", [True, False], ids=["spikes", "numbers"])
@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.float64)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [(300, 2, 130), (60, 3, 1100)], ids=str)
def test_few_synapses_have_the_bits_of_dense_rows(size, order, dtype, binary, monkeypatch) -> None:
    """Only the synapses that are there are read, tile by tile: forward, and where the backward repeats it."""
    from coba_triton.backend.cpu import launch as cpu_launch

    monkeypatch.setattr(cpu_launch.recurrent, "SYNAPSE_USES", 0)
    case = recurrent_problem(*size, dtype, inputs=70, binary=binary)
    case.input_weights, case.recurrent_weights = few_synapses(8 * case.input_weights), few_synapses(case.recurrent_weights)
    for weights in (case.input_weights, case.recurrent_weights):
        assert cpu_launch.synapses(weights.t(), 1).targets.size == torch.count_nonzero(weights)
    ours, gradients = case.gradients("cpu", order=order, path="events")
    theirs, _ = case.gradients("reference", order=order)
    assert_same_bits(ours, theirs)
    assert theirs[0].sum() > 100
    monkeypatch.setattr(cpu_launch.recurrent, "SYNAPSE_DENSITY", 0)
    assert not cpu_launch.synapses(case.recurrent_weights.t(), 1).targets.size
    dense, dense_gradients = case.gradients("cpu", order=order, path="events")
    assert_same_bits([*ours, *gradients.values()], [*dense, *dense_gradients.values()])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_reaches_neurons_without_a_synapse(value) -> None:
    """As in a matrix product, where 0 times infinity is NaN."""
    case = recurrent_problem(300, 1, 40)
    case.input_weights = few_synapses(case.input_weights)
    case.x[200, 0, 3] = value
    ours, theirs = case.run("cpu", path="events"), case.run("reference")
    for a, b in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert ours[1].g_e.isnan().all()


def test_synapses_are_looked_for_where_they_are_few_and_used_often(monkeypatch) -> None:
    from coba_triton.backend.cpu import launch as cpu_launch

    rows = few_synapses(torch.randn(1000, 1500, generator=torch.Generator().manual_seed(1)))
    found = cpu_launch.synapses(rows, 2000)
    sources = np.repeat(np.arange(1000), np.diff(found.starts[:, [0, -1]])[:, 0])
    tiles = (np.arange(len(found.targets))[:, None] >= found.starts[sources, 1:-1]).sum(1)
    assert np.array_equal(rows.numpy().nonzero(), [sources, 1024 * tiles + found.targets])
    assert np.array_equal(rows[rows != 0].numpy(), found.weights)
    assert not cpu_launch.synapses(rows, 1999).starts.size
    rows[1::2] = 1.0  # none of those that are looked at first
    monkeypatch.setattr(cpu_launch.recurrent, "SAMPLED_SOURCES", 10)
    assert not cpu_launch.synapses(rows, 2000).starts.size


def test_slices_are_for_gpus() -> None:
    with pytest.raises(RuntimeError, match="path 'sliced' is for GPUs .* got backend 'cpu'; pass path='events'"):
        recurrent_problem(3, 1, 4).run("cpu", path="sliced")


def test_busy_blocks_take_the_dense_path(monkeypatch) -> None:
    """The path changes between blocks by the rate of the block before, and the bits stay."""
    case = recurrent_problem(100, 1, 20)
    case.x[40:] = 1
    case.input_weights.abs_()
    case.recurrent_weights.zero_()
    taken = []
    for name in ("recurrent_block", "recurrent_step"):
        function = getattr(cpu_launch, name)
        monkeypatch.setattr(
            cpu_launch, name, lambda *a, name=name, function=function, **k: (taken.append(name), function(*a, **k))[1]
        )
    ours, theirs = case.run("cpu", block_steps=32), case.run("reference")
    rates = [block.mean().item() for block in theirs[0].split(32)]
    expected = ["recurrent_block"]
    for rate in rates[:-1]:
        expected.append("recurrent_step" if rate > cpu_launch.recurrent.DENSE_RATE else "recurrent_block")
    assert list(dict.fromkeys(taken)) == ["recurrent_block", "recurrent_step"]
    assert taken.count("recurrent_block") == expected.count("recurrent_block")
    assert_same_bits([ours[0], *ours[1]], [theirs[0], *theirs[1]])
