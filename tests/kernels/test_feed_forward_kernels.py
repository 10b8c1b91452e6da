"""The feed-forward kernels, Triton's and the CPU's, against the reference through the public function: equal bits, or a
derived bound."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from coba_triton import (
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    coba_lif_feed_forward_integral,
    pack_spikes,
    unpack_spikes,
)
from coba_triton.backend.choose import triton_device_type
from coba_triton.neuron.records import Constants
from coba_triton.neuron.surrogate import SURROGATES
from coba_triton.ops.call import Call
from coba_triton.tools.problems import DT, Problem, problem
from helpers.bits import assert_same_bits
from helpers.marks import slow

ORDERS = ["decay_first", "jump_first"]
FLOATS = [torch.float32, torch.float64]
# one step, less than a chunk, whole chunks, chunks and a tail; one neuron, ragged, a whole program, two programs
SIZES = [(1, (1,)), (5, (63,)), *slow((16, (32,)), (35, (2, 20)), (33, (500,)))]


@pytest.fixture(params=["triton", "cpu"])
def backend(request) -> str:
    return request.param


@pytest.fixture
def device(backend) -> torch.device:
    return torch.device("cpu" if backend == "cpu" else triton_device_type())


@pytest.mark.parametrize("per_neuron", [False, True], ids=["shared", "per_neuron"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_has_the_bits_of_the_reference(size, order, dtype, per_neuron, backend, device) -> None:
    case = problem(*size, dtype, device, per_neuron=per_neuron)
    expected, trace = case.run("reference", order=order, record_states=True)
    spikes, states = case.run(backend, order=order, record_states=True)
    assert_same_bits([spikes, *states], [expected, *trace])
    spikes, final = case.run(backend, order=order)
    assert_same_bits([spikes, *final], [expected, *(field[-1] for field in trace)])
    if size[0] > 1:
        assert 0.02 < expected.mean() < 0.6


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int64], ids=str)
def test_input_dtypes(x_dtype, backend, device) -> None:
    case = problem(19, (40,), x_dtype, device)
    spikes, final = case.run(backend)
    expected, reference = case.run("reference")
    assert spikes.sum() > 0
    assert_same_bits([spikes, *final], [expected, *reference])


@pytest.mark.parametrize(
    "spike_dtype", [torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8, "bits"], ids=str
)
@pytest.mark.parametrize("steps", [7, 32, 45])
def test_spike_dtypes(spike_dtype, steps, backend, device) -> None:
    case = problem(steps, (40,), device=device)
    spikes, final = case.run(backend, spike_dtype=spike_dtype)
    expected, reference = case.run("reference", spike_dtype=spike_dtype)
    assert_same_bits([spikes, *final], [expected, *reference])
    if spike_dtype == "bits":
        assert torch.equal(unpack_spikes(spikes, steps, torch.float32), case.run(backend)[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_potentials_on_the_threshold(dtype, backend, device) -> None:
    """Without currents ``u`` stays where ``v`` is: on the threshold, and one ulp on either side of it."""
    thresh = torch.tensor(-10.0, dtype=dtype)
    up, down = (torch.nextafter(thresh, torch.tensor(to, dtype=dtype)) for to in (0.0, -99.0))
    v = torch.stack([down, thresh, up]).to(device)
    p = CobaLIFParameters(g_l=0.0)
    for name in ("reference", backend):
        spikes, state = coba_lif_feed_forward_integral(
            torch.zeros(1, 3, dtype=dtype, device=device), CobaLIFFeedForwardState(v, 0.0, 0.0), p, DT, backend=name
        )
        assert spikes.tolist() == [[0.0, 0.0, 1.0]]
        assert state.v.tolist() == [float(down), float(thresh), -70.0]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, under the interpreter
def test_nan_and_infinite_inputs(backend, device) -> None:
    case = problem(12, (6,), device=device)
    case.x[3, 1] = torch.nan
    case.x[4, 2] = torch.inf
    case.x[5, 3] = -torch.inf
    ours, theirs = case.run(backend, record_states=True), case.run("reference", record_states=True)
    for a, b in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def strided(kind: str, device: torch.device) -> Problem:
    case = problem(21, (4, 10), device=device)
    if kind == "transposed":
        case.x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
    elif kind == "every second":
        case.x = torch.stack([case.x, case.x + 1], -1)[..., 0]
    elif kind == "expanded over neurons":
        case.x = case.x[:, :1, :1].expand(21, 4, 10)
    elif kind == "expanded over time":
        case.x = case.x[:1].expand(21, 4, 10)
    elif kind == "reversed state":
        case.state = CobaLIFFeedForwardState(*(field.t().contiguous().t() for field in case.state))
    return case


@pytest.mark.parametrize(
    "kind", ["transposed", *slow("every second", "expanded over neurons", "expanded over time", "reversed state")]
)
def test_strided_inputs(kind, backend, device) -> None:
    case = strided(kind, device)
    for options in ({}, {"record_states": True}):
        ours, our_grads = case.gradients(backend, **options)
        theirs, their_grads = case.gradients("reference", **options)
        assert_same_bits(ours, theirs)
        for name in ("x", "v", "g_e", "g_i"):
            assert torch.equal(our_grads[name], their_grads[name]), name


@pytest.mark.parametrize("loss", ["sum", "mean", "every third neuron", "one step", "transposed"])
def test_strided_incoming_gradients(loss, backend, device) -> None:
    """``sum`` and ``mean`` send an expanded gradient back, indexing a sparse one, a transpose a strided one."""
    losses = {
        "sum": lambda z: z.sum(),
        "mean": lambda z: z.mean(),
        "every third neuron": lambda z: z[:, ::3].square().sum(),
        "one step": lambda z: z[5].sum(),
        "transposed": lambda z: (z.t().contiguous() * torch.arange(z.numel(), device=z.device).view(z.t().shape)).sum(),
    }
    grads = {}
    for name in (backend, "reference"):
        case = problem(21, (10,), device=device)
        case.x.requires_grad_()
        spikes, _ = case.run(name)
        (grads[name],) = torch.autograd.grad(losses[loss](spikes), case.x)
    assert grads[backend].abs().max() > 0
    assert torch.equal(grads[backend], grads["reference"])


# `exp` and the square root of PyTorch's CPU kernels, Triton's interpreter and a GPU differ in the last bits
EXACT_SURROGATES = ["super", "triangle", "heaviside"]


def gradient_cases() -> Iterator[Any]:
    """Every two values of these four together; those of order and records with each other for one surrogate as well."""
    both = list(itertools.product(ORDERS, (False, True)))
    for order, record in both:
        yield pytest.param(torch.float32, "super", order, record)
    for i, method in enumerate(SURROGATES):
        for dtype, (order, record) in ((torch.float32, both[i % 4]), (torch.float64, both[3 - i % 4])):
            if (dtype, method) != (torch.float32, "super"):
                yield pytest.param(dtype, method, order, record, marks=pytest.mark.slow)


@pytest.mark.parametrize(("dtype", "method", "order", "record"), list(gradient_cases()), ids=str)
def test_gradients(dtype, method, order, record, backend, device) -> None:
    """Float64 gradients agree to 1e-9; those of input and state have autograd's bits where s' needs no `exp`.

    The gradient by a shared parameter is a sum over time and neurons in another order than autograd's; its error is
    measured against float64, relative to the sum of magnitudes that was added up, which the largest gradient by a
    parameter of one neuron bounds from below.
    """
    case = problem(35, (2, 20), dtype, device, per_neuron=record)
    ours, our_grads = case.gradients(backend, method=method, order=order, record_states=record)
    theirs, their_grads = case.gradients("reference", method=method, order=order, record_states=record)
    assert_same_bits(ours, theirs)
    exact = method in EXACT_SURROGATES
    for name, grad in our_grads.items():
        expected = their_grads[name]
        scale = expected.abs().max().clamp(min=1e-30)
        if exact and name in case.state._asdict() | {"x": None}:
            assert torch.equal(grad, expected), name
        elif dtype == torch.float64:
            assert (grad - expected).abs().max() <= 1e-9 * scale, name
        else:
            # 35 steps and 40 neurons are 1400 terms: (1400 ulp) * 6e-8 would be the worst case of one sum
            assert (grad - expected).abs().max() <= 1400 * 2**-24 * scale, name


@pytest.mark.parametrize("steps", [3, 17, *slow(8, 64)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_every_length(steps, dtype, backend, device) -> None:
    """Whole checkpoint intervals, and every kind of rest."""
    case = problem(steps, (33,), dtype, device)
    ours, our_grads = case.gradients(backend, spike_dtype=dtype)
    theirs, their_grads = case.gradients("reference", spike_dtype=dtype)
    assert_same_bits([*ours, *list(our_grads.values())[:4]], [*theirs, *list(their_grads.values())[:4]])


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_half_precision_inputs(x_dtype, backend, device) -> None:
    """State and adjoint stay float32; the input's gradient is rounded once, to the input's dtype."""
    case = problem(20, (33,), x_dtype, device)
    _, ours = case.gradients(backend, spike_dtype=torch.float32)
    _, theirs = case.gradients("reference", spike_dtype=torch.float32)
    assert ours["x"].dtype == x_dtype
    if backend == "triton" and x_dtype == torch.bfloat16:
        import triton

        if triton.knobs.runtime.interpret:
            # the interpreter cuts a float32 off where hardware rounds it to bfloat16: up to one unit in the last place
            torch.testing.assert_close(ours.pop("x"), theirs["x"], rtol=2**-7, atol=0)
    for name in ours.keys() & {"x", "v", "g_e", "g_i"}:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("spike_dtype", [torch.uint8, torch.bool, "bits"], ids=str)
def test_gradients_through_the_state_when_spikes_are_no_floats(spike_dtype, backend, device) -> None:
    grads = {}
    for name in (backend, "reference"):
        case = problem(40, (9,), torch.bool, device)
        v_thresh = case.parameters["v_thresh"].requires_grad_()
        _, final = case.run(name, spike_dtype=spike_dtype)
        (grads[name],) = torch.autograd.grad(final.v.sum(), v_thresh)
    assert grads[backend].item() == pytest.approx(grads["reference"].item(), rel=1e-5)


BLOCKS = [(16, torch.uint8), (32, "bits"), *(pytest.param(steps, None, marks=pytest.mark.slow) for steps in (1, 7))]


@pytest.mark.parametrize(("block_steps", "spike_dtype"), BLOCKS)
@pytest.mark.parametrize("record", [False, True], ids=["final", "recorded"])
def test_blocks_equal_the_whole(block_steps, spike_dtype, record, backend, device) -> None:
    case = problem(45, (33,), device=device)
    options = {"spike_dtype": spike_dtype, "record_states": record}
    whole, split = case.run(backend, **options), case.run(backend, block_steps=block_steps, **options)
    assert_same_bits([split[0], *split[1]], [whole[0], *whole[1]])
    if spike_dtype is None:
        _, whole_grads = case.gradients(backend, **options)
        _, split_grads = case.gradients(backend, block_steps=block_steps, **options)
        for name in ("x", "v", "g_e", "g_i"):
            assert torch.equal(whole_grads[name], split_grads[name]), name
        for name in whole_grads:
            torch.testing.assert_close(split_grads[name], whole_grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (4,), ()], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("spike_dtype", [None, "bits"])
def test_empty_and_small_shapes(shape, steps, spike_dtype, backend, device) -> None:
    x = torch.ones(steps, *shape, device=device, requires_grad=True)
    p = CobaLIFParameters(v_thresh=torch.tensor(-10.0, requires_grad=True))
    results = {}
    for name in (backend, "reference"):
        spikes, states = coba_lif_feed_forward_integral(
            x, None, p, 0.1, backend=name, record_states=True, spike_dtype=spike_dtype
        )
        _, final = coba_lif_feed_forward_integral(x, None, p, 0.1, backend=name)
        grads = [torch.zeros_like(x), torch.zeros_like(p.v_thresh)]
        if final.v.requires_grad:
            grads = torch.autograd.grad(final.v.sum(), [x, p.v_thresh], allow_unused=True, materialize_grads=True)
        results[name] = [spikes, *states, *final, *grads]
    assert_same_bits(results[backend], results["reference"])


def test_unused_memory_is_not_read(backend, device, monkeypatch) -> None:
    """Outputs start as NaN and as set bits: what a kernel leaves out or reads before it writes shows up."""
    empty = torch.Tensor.new_empty
    empty_like = torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.view(torch.uint8).fill_(255)

    def new_empty(self, *args, **kwargs):
        tensor = empty(self, *args, **kwargs)
        poison(tensor)
        return tensor

    def poisoned_like(*args, **kwargs):
        tensor = empty_like(*args, **kwargs)
        poison(tensor)
        return tensor

    case = problem(35, (45,), device=device)
    theirs, their_grads = case.gradients("reference")
    packed, _ = case.run("reference", spike_dtype="bits")
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", poisoned_like)
    ours, our_grads = case.gradients(backend)
    assert_same_bits([case.run(backend, spike_dtype="bits")[0]], [packed])
    monkeypatch.undo()
    assert_same_bits(ours, theirs)
    for name in ("x", "v", "g_e", "g_i"):
        assert torch.equal(our_grads[name], their_grads[name]), name
    assert all(grad.isfinite().all() for grad in our_grads.values())


def test_two_runs_have_equal_bits(backend, device) -> None:
    first, second = (problem(20, (70,), device=device).gradients(backend) for _ in range(2))
    assert_same_bits([*first[0], *first[1].values()], [*second[0], *second[1].values()])


def test_neurons_do_not_depend_on_their_company(backend, device) -> None:
    """The bits of a neuron are the same alone, in a batch, and in another place of it."""
    case = problem(20, (70,), device=device)
    whole, _ = case.run(backend)
    for neurons in (slice(0, 1), slice(31, 34), slice(40, 70)):
        part = Problem(
            case.x[:, neurons],
            CobaLIFFeedForwardState(*(field[neurons] for field in case.state)),
            case.parameters,
        )
        assert torch.equal(part.run(backend)[0], whole[:, neurons])


@pytest.mark.slow
def test_saved_memory_is_below_two_bytes_per_neuron_step(backend, device) -> None:
    """Beyond the input, which is the user's own."""
    # with Triton, every step beyond a multiple of 16 keeps a state
    for dtype, steps in itertools.product(FLOATS, (64, 256, 1000) if backend == "cpu" else (64, 256)):
        case = problem(steps, (32,), dtype, device)
        case.x.requires_grad_()
        sizes: dict[int, int] = {}

        def remember(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            case.run(backend)
        sizes.pop(case.x.untyped_storage().data_ptr())
        per_neuron_step = sum(sizes.values()) / (steps * 32)
        assert 0.5 < per_neuron_step < 2, (dtype, steps, per_neuron_step)


def test_inference_saves_nothing(backend, device) -> None:
    case = problem(64, (4,), device=device)
    _, _, _, words, checkpoints = torch.ops.coba_triton.feed_forward(
        case.x,
        torch.stack(tuple(case.state)),
        torch.ones(len(Constants._fields), 1, device=device),
        *Call(backend, spike_dtype=torch.float32, checkpoint_every=8),
    )
    assert words.numel() == checkpoints.numel() == 0
    assert pack_spikes(torch.zeros(0, 4)).numel() == 0
