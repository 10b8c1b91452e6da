"""torch.func, torch.compile, torch.export, checkpointing and autocast on the operators of every fused backend."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from coba_triton import (
    CobaLIF,
    CobaLIFCell,
    CobaLIFFeedForwardCell,
    CobaLIFFeedForwardState,
    CobaLIFRecurrent,
    CobaLIFState,
    Synapses,
    coba_lif_feed_forward_integral,
    coba_lif_integral,
    coba_lif_step,
)
from coba_triton.ops import operators, sparse_operators
from coba_triton.tools.problems import DT, problem, recurrent_problem
from helpers.bits import assert_same_bits

SAMPLES = 3
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> None:
    torch._dynamo.reset()


backends = pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])


def weighted(outputs: list[Tensor]) -> Tensor:
    """A scalar that every output moves by another amount."""
    total = outputs[0].new_zeros((), dtype=torch.float64)
    for number, output in enumerate(outputs):
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
        total = total + (number + 1) * (output.double().reshape(-1) * weights).sum()
    return total


def feed_forward(device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor], tuple[Any, ...]]:
    """A loss, its arguments, and the axes along which ``SAMPLES`` of them differ (None: shared)."""
    case = problem(19, (SAMPLES, 5), torch.float64, device)
    names = ("tau_syn_exc_inv", "v_thresh")
    shared = [case.parameters[name] for name in names]

    def loss(x: Tensor, v: Tensor, tau: Tensor, threshold: Tensor, backend: str = "cpu") -> Tensor:
        p = case.record()._replace(tau_syn_exc_inv=tau, v_thresh=threshold)
        state = CobaLIFFeedForwardState(v, case.state.g_e[0], case.state.g_i[0])
        spikes, states = coba_lif_feed_forward_integral(x, state, p, DT, backend=backend, record_states=True)
        return weighted([spikes, *states])

    return loss, [case.x, case.state.v, *shared], (1, 0, None, None)


def recurrent(device: torch.device, steps: int = 35) -> tuple[Callable[..., Tensor], list[Tensor], tuple[Any, ...]]:
    case = recurrent_problem(steps, 2 * SAMPLES, 3, torch.float64, device)
    state = CobaLIFState(*(field[:2] for field in case.state))

    def loss(x: Tensor, w_in: Tensor, w_rec: Tensor, tau: Tensor, backend: str = "cpu") -> Tensor:
        p = case.record()._replace(tau_syn_exc_inv=tau)
        spikes, final = coba_lif_integral(x, state, w_in, w_rec, p, DT, backend=backend)
        return weighted([spikes, *final])

    x = case.x.unflatten(1, (SAMPLES, 2))
    return loss, [x, case.input_weights, case.recurrent_weights, case.parameters["tau_syn_exc_inv"]], (1, None, None, None)


KINDS = {"feed-forward": feed_forward, "recurrent": recurrent}
KERNELS = {
    ("feed-forward", "cpu"): "coba_triton.backend.cpu.launch.feed_forward_forward",
    ("feed-forward", "triton"): "coba_triton.backend.triton.feed_forward_forward",
    ("recurrent", "cpu"): "coba_triton.backend.cpu.launch.recurrent_block",
    ("recurrent", "triton"): "coba_triton.backend.triton.recurrent_block",
}
kinds = pytest.mark.parametrize("kind", KINDS)


def assert_close(actual: Any, expected: Any) -> None:
    """float64 results that differ by the order of a few hundred additions."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))
        assert other.abs().max() > 0


def select(args: list[Tensor], axes: tuple[Any, ...], number: int) -> list[Tensor]:
    return [arg if axis is None else arg.select(axis, number) for arg, axis in zip(args, axes, strict=True)]


def stacked(rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


@backends
@kinds
def test_grad(kind, backend, device) -> None:
    loss, args, axes = KINDS[kind](device)
    grad = torch.func.grad(loss, (0, 1, 2, 3))
    assert_close(*(grad(*select(args, axes, 0), name) for name in (backend, "reference")))


@backends
@kinds
def test_vmap_is_one_call_of_the_kernels(kind, backend, device, monkeypatch) -> None:
    loss, args, axes = KINDS[kind](device)
    expected = [loss(*select(args, axes, number), backend) for number in range(SAMPLES)]
    module, _, name = KERNELS[kind, backend].rpartition(".")
    launch = getattr(__import__(module, fromlist=[name]), name)
    calls = []

    def count(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return launch(*args, **options)

    monkeypatch.setattr(KERNELS[kind, backend], count)
    together = torch.vmap(loss, (*axes, None))(*args, backend)
    assert torch.equal(together, torch.stack(expected))
    assert len(calls) == 1


@backends
@kinds
def test_gradient_of_each_sample(kind, backend, device) -> None:
    """By what the samples share as well: the sums over neurons and batch stay within a sample."""
    loss, args, axes = recurrent(device, 12) if (kind, backend) == ("recurrent", "triton") else KINDS[kind](device)
    grad = torch.func.grad(loss, (0, 1, 2, 3))
    together = torch.vmap(grad, (*axes, None))(*args, backend)
    assert_close(together, stacked([grad(*select(args, axes, number), backend) for number in range(SAMPLES)]))


@kinds
def test_gradient_of_all_samples(kind) -> None:
    """``grad`` around ``vmap``, and ``backward`` around it."""
    loss, args, axes = KINDS[kind](CPU)

    def total(*args: Tensor, backend: str = "cpu") -> Tensor:
        return torch.vmap(loss, (*axes, None))(*args, backend).sum()

    expected = torch.func.grad(lambda *args: total(*args, backend="reference"), (0, 1, 2, 3))(*args)
    assert_close(torch.func.grad(total, (0, 1, 2, 3))(*args), expected)
    leaves = [arg.clone().requires_grad_() for arg in args]
    assert_close(torch.autograd.grad(total(*leaves), leaves), expected)


@kinds
def test_every_argument_of_its_own_and_nested(kind) -> None:
    """Constants and weights of each sample, and a second vmap around the first."""
    loss, args, axes = KINDS[kind](CPU)
    scales = 1 + torch.arange(SAMPLES).double() / 8
    args = [
        arg if axis is not None else scales.reshape(-1, *(1,) * arg.dim()) * arg
        for arg, axis in zip(args, axes, strict=True)
    ]
    every = tuple(0 if axis is None else axis for axis in axes)
    grad = torch.func.grad(loss, (0, 1, 2, 3))
    together = torch.vmap(grad, every)(*args)
    assert_close(together, stacked([grad(*select(args, every, number)) for number in range(SAMPLES)]))
    x, *weights, _ = select(args, every, 0)
    nested = torch.vmap(lambda tau: torch.vmap(lambda scale: grad(x * scale, *weights, tau))(scales))(args[-1])
    for i, j in ((0, 1), (2, 0)):
        assert_close([part[i, j] for part in nested], grad(x * scales[j], *weights, args[-1][i]))


@kinds
def test_an_outer_transform_differentiates_what_the_inner_one_does_not(kind) -> None:
    loss, args, axes = KINDS[kind](CPU)
    first, *others, tau = select(args, axes, 0)

    def outer(scale: Tensor, backend: str) -> Tensor:
        return torch.func.grad(lambda factor: factor * loss(first, *others, tau * scale, backend))(scale)

    one = torch.ones((), dtype=torch.float64)
    assert_close(*([torch.func.grad(outer)(one, name)] for name in ("cpu", "reference")))


@kinds
@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda f: torch.func.grad(lambda t: torch.func.grad(f)(t)), "differentiates once"),
        (torch.func.hessian, "no forward-mode"),
        (lambda f: torch.func.jacfwd(lambda t: torch.vmap(f)(t.expand(2))), "no forward-mode"),
    ],
    ids=["grad of grad", "hessian", "jacfwd of vmap"],
)
def test_second_derivatives_and_forward_mode_name_the_reference(kind, transform, message) -> None:
    loss, args, axes = KINDS[kind](CPU)
    *others, tau = select(args, axes, 0)
    with pytest.raises(NotImplementedError, match=f"{message}.*backend='reference'"):
        transform(lambda tau: loss(*others, tau))(tau)


def test_out_within_a_transform_is_refused() -> None:
    buffer = torch.empty(4, 3)
    with pytest.raises(ValueError, match="within a torch.func transform; leave out= away"):
        torch.vmap(lambda x: coba_lif_feed_forward_integral(x, dt=DT, out=buffer)[0])(torch.zeros(2, 4, 3))


LENGTHS = [(5, DT), (7, DT), (64, DT), (65, DT), (1200, DT), (33, DT), (33, DT / 2), (33, DT / 3), (40, DT / 4)]


@kinds
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_graphs(compiler, trains, kind) -> None:
    """Two graphs for any lengths, one more for any dt; with ``dynamic=True`` one for everything. The bits are the same."""
    case = recurrent_problem(1200, 2, 6)
    p = case.record("heaviside")  # gradients through v alone, which do not grow with the length

    def run(x: Tensor, dt: float) -> tuple[Tensor, Tensor]:
        if kind == "feed-forward":
            spikes, state = coba_lif_feed_forward_integral(x, None, p, dt)
        else:
            spikes, state = coba_lif_integral(x, None, case.input_weights, case.recurrent_weights, p, dt)
        return spikes, state.v

    for dynamic, graphs_of_lengths, graphs in ((None, 2, 3), (True, 1, 1)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(compiler)
        compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=counter)
        for steps, dt in LENGTHS:
            x = case.x[:steps].clone().requires_grad_(trains)
            outputs, expected = compiled(x, dt), run(x, dt)
            assert all(map(torch.equal, outputs, expected))
            if trains:
                grads = [torch.autograd.grad(v.sum(), x)[0] for _, v in (outputs, expected)]
                assert torch.equal(*grads) and grads[0].abs().max() > 0
            assert counter.frame_count <= (graphs_of_lengths if dt == DT else graphs)


def test_compiled_gradient_of_each_sample() -> None:
    loss, args, axes = feed_forward(CPU)
    grad = torch.vmap(torch.func.grad(loss, (0, 1, 2, 3)), axes)
    assert_close(torch.compile(grad, fullgraph=True, backend="aot_eager")(*args), grad(*args))


def module(kind: str) -> torch.nn.Module:
    p = problem(1, (1,)).record()
    torch.manual_seed(0)
    neurons = CobaLIF(p, DT, learn=("v_thresh",)) if kind == "feed-forward" else CobaLIFRecurrent(6, 4, p, DT)
    return torch.nn.Sequential(torch.nn.Linear(6, 6), neurons)


def gradients(model: torch.nn.Module, run: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """In the order of the parameters' names."""
    spikes, state = run(x)
    parameters = dict(sorted(model.named_parameters()))
    return list(torch.autograd.grad(spikes.sum() + state.v.sum(), list(parameters.values())))


@kinds
def test_compiled_module_trains_as_the_plain_one(kind) -> None:
    model, x = module(kind), torch.rand(20, 2, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, gradients(model, compiled, x), gradients(model, model, x)))


def step_of(kind: str) -> torch.nn.Module:
    """What computes with ordinary operations, or has a matrix with delays, of which the numbers are looked at elsewhere."""
    p = problem(1, (1,)).record()
    torch.manual_seed(0)
    synapses = Synapses.fixed_number(4, 4, 2, weight=0.01, delay=2 * DT, seed=1)
    modules: dict[str, Callable[[], torch.nn.Module]] = {
        "feed-forward cell": lambda: CobaLIFFeedForwardCell(p, DT, learn=("v_thresh",)),
        "cell": lambda: CobaLIFCell(6, 4, p, DT),
        "sparse cell": lambda: CobaLIFCell(6, 4, p, DT, recurrent_weights=synapses),
        "cell with delays": lambda: CobaLIFCell(6, 4, p, DT, delay=DT * torch.tensor([1.0, 3.0, 2.0, 1.0])),
        "delays": lambda: CobaLIFRecurrent(6, 4, p, DT, delay=2 * DT),
        "reference": lambda: CobaLIFRecurrent(6, 4, p, DT, backend="reference"),
        "sparse reference": lambda: CobaLIFRecurrent(6, 4, p, DT, recurrent_weights=synapses, backend="reference"),
    }
    return torch.nn.Sequential(torch.nn.Linear(6, 6), modules[kind]())


STEPS = ["feed-forward cell", "cell", "sparse cell", "cell with delays", "delays", "reference", "sparse reference"]


@pytest.mark.parametrize("kind", STEPS)
def test_compiled_and_exported_steps_train_as_plain_ones(kind) -> None:
    """In one graph, although the reference has a forward mode, which compilers do not take; and nothing loses a gradient."""
    model, x = step_of(kind), torch.rand(5, 2, 6)
    x = x[0] if "cell" in kind else x
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = gradients(model, model, x)
    assert all(map(torch.equal, gradients(model, compiled, x), expected))
    for strict in (False, True):
        exported = torch.export.export(model, (x,), strict=strict).module()
        assert all(map(torch.equal, gradients(exported, exported, x), expected))
    x[..., 0] = torch.inf
    assert_same_bits([exported(x)[0]], [model(x)[0]])


def test_a_matrix_with_one_delay_is_followed_by_a_compiler() -> None:
    """Also where no module knows how long the delay is."""
    case = recurrent_problem(40, 2, 5)
    p = case.record()
    weights = case.input_weights, case.recurrent_weights

    def run(x: Tensor) -> Tensor:
        spikes: Tensor = coba_lif_integral(x, None, *weights, p, DT, delay=3 * DT)[0]
        return spikes

    assert_same_bits([torch.compile(run, backend="aot_eager", fullgraph=True)(case.x)], [run(case.x)])
    assert run(case.x).any()


@pytest.mark.parametrize("kind", STEPS)
def test_steps_of_an_ensemble(kind) -> None:
    """Samples with weights of their own, through ordinary operations."""
    model, x = step_of(kind), torch.rand(5, 2, 6)
    x = x[0] if "cell" in kind else x
    each = {name: torch.stack([value, 1.5 * value]).detach() for name, value in model.named_parameters()}

    def run(own: dict[str, Tensor]) -> tuple[Tensor, Any]:
        outputs: tuple[Tensor, Any] = torch.func.functional_call(model, own, (x,))
        return outputs

    spikes, state = torch.vmap(run)(each)
    for sample in range(2):
        expected, final = run({name: value[sample] for name, value in each.items()})
        assert torch.equal(spikes[sample], expected)
        torch.testing.assert_close(state.v[sample], final.v)


@kinds
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export_with_any_length(strict, kind) -> None:
    """Exported, saved, loaded: any length, the same bits and gradients, and the state is a record again."""
    model = module(kind)
    dynamic = ({0: torch.export.Dim("T")},)
    exported = torch.export.export(model, (torch.rand(40, 3, 6),), dynamic_shapes=dynamic, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for steps in (1, 2, 5, 33, 1100):
        x = torch.rand(steps, 3, 6)
        (spikes, state), (expected, final) = loaded(x), model(x)
        assert torch.equal(spikes, expected) and all(map(torch.equal, state, final))
        assert type(state) is type(final)
    x = torch.rand(50, 3, 6)
    assert all(map(torch.equal, gradients(loaded, loaded, x), gradients(model, model, x)))


@kinds
def test_checkpointing_gives_the_same_gradients(kind) -> None:
    loss, args, axes = KINDS[kind](CPU)
    leaves = [arg.clone().requires_grad_() for arg in select(args, axes, 0)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    again = torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(again, leaves), expected))


@kinds
def test_autocast_keeps_the_state_in_float32(kind) -> None:
    """A matrix product in bfloat16 before; the same bits as without autocast on its output."""
    case = recurrent_problem(20, 2, 6)
    linear = torch.nn.Linear(6, 6)

    def run(x: Tensor) -> tuple[Tensor, Any]:
        if kind == "feed-forward":
            return coba_lif_feed_forward_integral(x, None, case.record(), DT)
        return coba_lif_integral(x, None, case.input_weights, case.recurrent_weights, case.record(), DT)

    with torch.autocast("cpu", torch.bfloat16):
        x = linear(case.x)
        spikes, state = run(x)
        (grad,) = torch.autograd.grad(state.v.sum(), linear.weight)
    assert x.dtype == spikes.dtype == torch.bfloat16
    assert {field.dtype for field in state} == {torch.float32}
    assert grad.dtype == torch.float32 and grad.abs().max() > 0
    plain, final = run(x.detach())
    assert torch.equal(spikes, plain) and all(map(torch.equal, state, final))


@pytest.mark.parametrize("sparse", [False, True])
def test_many_gradients_of_one_forward(sparse, monkeypatch) -> None:
    """A backward of many gradients goes through the blocks of the forward, also where their length depends on the rows."""

    def as_on_a_gpu(block_steps: int | None, steps: int, cells: int, *_: Any) -> int:
        return block_steps or (32 if cells > 100 else 64)

    for module in (operators, sparse_operators):
        monkeypatch.setattr(module, "choose_block_steps", as_on_a_gpu)
    case = recurrent_problem(96, 2, 20)
    recurrent = Synapses.from_torch(case.recurrent_weights.to_sparse()) if sparse else case.recurrent_weights

    def potentials(x: Tensor) -> Tensor:
        return coba_lif_integral(x, None, case.input_weights, recurrent, case.record(), DT, backend="cpu")[1].v

    v, vjp = torch.func.vjp(potentials, case.x)
    directions = torch.eye(v.numel()).view(-1, *v.shape)[::7]
    (together,) = torch.func.vmap(vjp)(directions)
    alone = [vjp(direction)[0] for direction in directions]
    assert_same_bits(together, alone)
    several = torch.stack([case.x, case.x.flip(0), case.x.roll(3, 0)])  # whose forward has the rows of all
    jacobian = torch.func.jacrev(lambda x: potentials(x)[0, :3])
    assert_same_bits(torch.func.vmap(jacobian)(several), [jacobian(x) for x in several])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_changes_no_bit(backend, sparse) -> None:
    """Of sequences and single steps; in bfloat16, potentials would be 0.03 mV off."""
    case = recurrent_problem(20, 2, 6)
    recurrent = Synapses.from_torch(case.recurrent_weights.to_sparse()) if sparse else case.recurrent_weights
    weights = case.input_weights, recurrent

    def run() -> list[Tensor]:
        spikes, state = coba_lif_integral(case.x, None, *weights, case.record(), DT, backend=backend)
        _, after = coba_lif_step(case.x[0], None, *weights, case.record(), DT)
        return [spikes, *state, *after]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert expected[0].any()
    assert_same_bits(found, expected)


def loss_of(incoming: str, spikes: Tensor, last: Tensor, v: Tensor) -> Tensor:
    """Loss whose gradients arrive in the named layout; an output that it leaves out gets none."""
    weights = torch.linspace(-1, 1, v.numel(), dtype=v.dtype)
    if incoming == "expanded":
        return spikes.sum() + last.sum() + v.sum()
    if incoming == "transposed":
        return sum((output.mT * weights.reshape(v.shape[::-1])).sum() for output in (spikes, last, v))
    return ((v if incoming == "v alone" else last) * weights.reshape(v.shape)).sum()


@kinds
@pytest.mark.parametrize("incoming", ["expanded", "transposed", "v alone", "one other state alone"])
def test_gradients_that_arrive_in_any_layout(incoming, kind) -> None:
    case: Any = problem(37, (5, 6), torch.float64)
    if kind == "recurrent":
        case = recurrent_problem(37, 5, 6, torch.float64)
    case.x.requires_grad_()
    grads = []
    for backend in ("cpu", "reference"):
        spikes, state = case.run(backend)
        last = state.z if kind == "recurrent" else state.g_e
        grads.append(torch.autograd.grad(loss_of(incoming, spikes, last, state.v), case.x))
    assert_close(*grads)
