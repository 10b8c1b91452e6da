"""Recurrent networks on Triton's kernels and on the CPU's against the reference: equal bits on exact weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from coba_triton import CobaLIFParameters, CobaLIFState, coba_lif_integral
from coba_triton.backend.choose import triton_device_type
from coba_triton.tools.problems import DT, recurrent_problem
from helpers.bits import assert_same_bits

ORDERS = ["decay_first", "jump_first"]
FLOATS = [torch.float32, torch.float64]
# The interpreter takes small ones.
SIZES = {
    "triton": [(1, 1, 63), (33, 3, 1), (33, 1, 63), (14, 3, 129), (4, 1, 500)],
    "cpu": [(1, 1, 63), (33, 3, 1), (33, 1, 63), (70, 3, 129), (33, 3, 500)],
}
PATHS = {"triton": ["events", "dense"], "cpu": ["auto", "events", "dense"]}


@pytest.fixture(params=["triton", "cpu"])
def backend(request) -> str:
    return request.param


@pytest.fixture
def device(backend) -> torch.device:
    return torch.device("cpu" if backend == "cpu" else triton_device_type())


def forward_cases() -> Iterator[Any]:
    """All together; the interpreter has every two values together, and all orders for the smallest network."""
    for (number, size), path in itertools.product(enumerate(SIZES["triton"]), PATHS["triton"]):
        for per_neuron, dtype in ((True, torch.float32), (False, torch.float64)):
            turn = (number + per_neuron + (path == "dense")) % 2
            for order in ORDERS if number == 0 else ORDERS[turn : turn + 1]:
                marks = [pytest.mark.slow] if number else []
                yield pytest.param("triton", size, path, dtype, per_neuron, order, marks=marks)
    every = itertools.product(SIZES["cpu"], PATHS["cpu"], FLOATS, (False, True), ORDERS)
    for size, path, dtype, per_neuron, order in every:
        marks = [pytest.mark.slow] if dtype == torch.float64 else []
        yield pytest.param("cpu", size, path, dtype, per_neuron, order, marks=marks)


@pytest.mark.parametrize(("backend", "size", "path", "dtype", "per_neuron", "order"), list(forward_cases()), ids=str)
def test_forward_has_the_bits_of_the_reference(backend, size, path, dtype, per_neuron, order, device) -> None:
    """Exact weights, with recorded states and without."""
    case = recurrent_problem(*size, dtype, device, per_neuron=per_neuron)
    expected, trace = case.run("reference", order=order, record_states=True)
    spikes, states = case.run(backend, order=order, record_states=True, path=path)
    assert_same_bits([spikes, *states], [expected, *trace])
    spikes, final = case.run(backend, order=order, path=path)
    assert_same_bits([spikes, *final], [expected, *(field[-1] for field in trace)])
    assert size[0] < 5 or size[2] == 1 or expected.sum() > 10


def format_cases() -> Iterator[Any]:
    for spike_dtype, path, record in itertools.product(
        ("bits", torch.float16, torch.bool, torch.uint8), PATHS["triton"], (False, True)
    ):
        marks = [pytest.mark.slow] if record or spike_dtype != "bits" else []
        yield pytest.param("triton", spike_dtype, path, record, marks=marks)
    for spike_dtype, record in itertools.product(
        ("bits", torch.float16, torch.bfloat16, torch.bool, torch.uint8), (False, True)
    ):
        yield pytest.param("cpu", spike_dtype, "auto", record)


@pytest.mark.parametrize(("backend", "spike_dtype", "path", "record"), list(format_cases()), ids=str)
def test_spike_dtypes(backend, spike_dtype, path, record, device) -> None:
    case = recurrent_problem(40, 2, 20, device=device)
    ours = case.run(backend, spike_dtype=spike_dtype, path=path, record_states=record)
    theirs = case.run("reference", spike_dtype=spike_dtype, record_states=record)
    assert_same_bits([ours[0], *ours[1]], [theirs[0], *theirs[1]])


@pytest.mark.parametrize(
    "x_dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64], ids=str
)
@pytest.mark.parametrize("density", [0.05, 0.8])
def test_input_dtypes_and_densities(x_dtype, density, backend, device) -> None:
    case = recurrent_problem(12, 2, 20, device=device, inputs=30)
    g = torch.Generator().manual_seed(5)
    case.x = (torch.rand(case.x.shape, generator=g) < density).to(device, x_dtype)
    ours, theirs = case.run(backend), case.run("reference")
    assert_same_bits([ours[0], *ours[1]], [theirs[0], *theirs[1]])


@pytest.mark.parametrize("binary", [True, False], ids=["spikes", "graded"])
def test_sparse_and_strided_inputs(binary, backend, device) -> None:
    """Graded values are weighted events; time may be a middle axis in memory."""
    case = recurrent_problem(12, 3, 20, device=device, binary=binary, inputs=9)
    case.x = torch.where(torch.arange(12, device=device)[:, None, None] % 5 == 0, case.x, 0.0)
    case.x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
    ours, theirs = case.run(backend), case.run("reference")
    assert_same_bits([ours[0], *ours[1]], [theirs[0], *theirs[1]])


def test_graded_initial_spikes_batch_shapes_and_no_batch(backend, device) -> None:
    case = recurrent_problem(7, 6, 20, device=device)
    z = torch.round(torch.rand(6, 20, generator=torch.Generator().manual_seed(1)) * 8).to(device) / 8
    state = case.state._replace(z=z)
    p = CobaLIFParameters(**case.parameters)
    weights = case.input_weights, case.recurrent_weights
    folded = CobaLIFState(*(field.reshape(2, 3, 20) for field in state))
    shapes = [((7, 6), state), ((7, 2, 3), folded)]
    results = []
    for name in ("reference", backend):
        for shape, initial in shapes:
            spikes, final = coba_lif_integral(case.x.reshape(*shape, -1), initial, *weights, p, DT, backend=name)
            assert spikes.shape == (*shape, 20)
            results.append([spikes.reshape(7, 6, 20), *(field.reshape(6, 20) for field in final)])
        alone, _ = coba_lif_integral(case.x[:, 0], CobaLIFState(*(f[0] for f in state)), *weights, p, DT, backend=name)
        assert torch.equal(alone, results[0][0][:, 0])
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (0, 0, 3)], ids=str)
def test_empty_shapes(shape, backend, device) -> None:
    x = torch.ones(*shape, device=device, requires_grad=True)
    w_in, w_rec = torch.ones(4, 3, device=device, requires_grad=True), torch.ones(4, 4, device=device)
    spikes, states = coba_lif_integral(x, None, w_in, w_rec, backend=backend, record_states=True)
    assert spikes.shape == (*shape[:2], 4) and states.g_e.shape == (*shape[:2], 4)
    _, final = coba_lif_integral(x, None, w_in, w_rec, backend=backend)
    assert final.v.shape == (shape[1], 4)
    final.v.sum().backward()
    assert x.grad.shape == x.shape and not w_in.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize("block_steps", [1, 32, 64])
def test_blocks_equal_the_whole(block_steps, backend, device) -> None:
    """On arbitrary weights: the order of the sums does not depend on the blocks."""
    case = recurrent_problem(70, 2, 33, device=device, exact=False)
    whole = case.run(backend, path="events", block_steps=96, record_states=True)
    split = case.run(backend, path="events", block_steps=block_steps, record_states=True)
    assert_same_bits([split[0], *split[1]], [whole[0], *whole[1]])


@pytest.mark.parametrize(
    ("backend", "path"),
    [*(pytest.param("triton", path, marks=pytest.mark.slow) for path in PATHS["triton"]), ("cpu", "auto")],
)
def test_float32_gradients(backend, path, device) -> None:
    case = recurrent_problem(34, 2, 10, device=device)
    ours, our_grads = case.gradients(backend, path=path)
    theirs, their_grads = case.gradients("reference")
    assert_same_bits(ours, theirs)
    for name, expected in their_grads.items():
        # sums over 34 steps and 20 cells: as many roundings of 2^-24 at the worst
        assert (our_grads[name] - expected).abs().max() <= 680 * 2**-24 * expected.abs().max(), name


@pytest.mark.slow
def test_gradients_where_spikes_are_packed(backend, device) -> None:
    case = recurrent_problem(34, 1, 9, torch.float64, device)
    case.recurrent_weights.requires_grad_()
    grads = []
    for name in (backend, "reference"):
        _, final = case.run(name, spike_dtype="bits")
        grads.append(torch.autograd.grad(final.v.sum() + final.z.sum(), case.recurrent_weights)[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)
