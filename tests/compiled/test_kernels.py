"""Every kernel as it is compiled for a GPU, through the public functions: the bits of the reference, and no finding.

Out-of-bounds accesses, races and deadlocks raise by themselves. Races are looked for under every schedule of ``SEEDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ptxsim
from coba_triton import CobaLIFFeedForwardState, CobaLIFParameters, coba_lif_feed_forward_integral
from coba_triton.backend import triton as triton_backend
from coba_triton.kernels import recurrent as recurrent_kernels
from coba_triton.ops.call import Block, Call, Incoming, Network, Outputs, Saved, Sweep, Weights
from coba_triton.ops.constants import derive_constants
from coba_triton.tools.problems import DT, Problem, RecurrentProblem, problem, recurrent_problem
from helpers.barriers import without_barrier
from helpers.bits import assert_same_bits
from helpers.few_neurons import DT as FEW_DT
from helpers.few_neurons import P, assert_same, irregular
from helpers.sparse_memory import sparse_zeros

F32, F64 = torch.float32, torch.float64
SEEDS = (1, 2, 3)
STATES = ("x", "v", "g_e", "g_i")  # whose gradients have autograd's bits


@pytest.fixture(autouse=True)
def own_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test's changes to the options end with it. Slices of 32 neurons, so that small rows have several."""
    monkeypatch.setattr(triton_backend.recurrent, "SLICE", 32)
    with ptxsim.install(**vars(ptxsim.current_options())):
        yield


def schedules() -> Iterator[int]:
    for seed in SEEDS:
        ptxsim.set_options(seed=seed)
        yield seed


def compare(case: Problem | RecurrentProblem, **options: Any) -> None:
    """Spikes and final or recorded state under every schedule."""
    path = {"path": options.pop("path")} if "path" in options else {}
    expected, reference = case.run("reference", **options)
    assert expected.any()
    for _ in schedules():
        spikes, state = case.run("triton", **path, **options)
        assert_same_bits([spikes, *state], [expected, *reference])


def launched() -> set[str]:
    return {record.kernel for record in ptxsim.LOG}


FORWARD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one step of one neuron": ({"steps": 1, "shape": (1,)}, {}),
    "ragged": ({"steps": 35, "shape": (63,)}, {"record_states": True}),
    "whole programs": ({"steps": 33, "shape": (2, 32)}, {"spike_dtype": "bits"}),
    "per neuron, jump first": ({"steps": 17, "shape": (45,), "per_neuron": True}, {"order": "jump_first"}),
    "four warps": ({"steps": 3, "shape": (32801,)}, {"spike_dtype": torch.bool}),
    "float64": ({"steps": 19, "shape": (40,), "dtype": F64, "per_neuron": True}, {"spike_dtype": "bits"}),
    "float16": ({"steps": 19, "shape": (33,), "dtype": torch.float16}, {"spike_dtype": torch.float16}),
    "bfloat16": ({"steps": 9, "shape": (16,), "dtype": torch.bfloat16}, {"spike_dtype": torch.bfloat16}),
    "bool": ({"steps": 9, "shape": (20,), "dtype": torch.bool}, {"spike_dtype": torch.uint8}),
    "refractory": ({"steps": 35, "shape": (45,), "refractory": True}, {"record_states": True}),
    "currents": ({"steps": 35, "shape": (45,), "per_neuron": True, "currents": True}, {"record_states": True}),
}


@pytest.mark.parametrize("name", FORWARD)
def test_feed_forward(name: str) -> None:
    arguments, options = FORWARD[name]
    case = problem(**arguments)
    if name == "one step of one neuron":
        case.x.fill_(40.0)
    compare(case, **options)
    assert launched() == {"forward_kernel"}


CHUNKS: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "ragged": (irregular(150, 33), {"record_states": True}),
    "packed": (irregular(257, 32), {"spike_dtype": "bits"}),
    "regular firing": (torch.full((260, 3), 0.0012), {"spike_dtype": torch.uint8, "order": "jump_first"}),
    "float64": (irregular(200, 5, dtype=F64), {"spike_dtype": "bits"}),
    "refractory": (irregular(200, 5), {"p": P._replace(refractory=2.0, v_thresh=torch.linspace(-52, -48, 5))}),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_feed_forward_in_chunks(name: str) -> None:
    x, options = CHUNKS[name]
    p = options.get("p", P)
    options = {key: value for key, value in options.items() if key != "p"}
    theirs = coba_lif_feed_forward_integral(x, None, p, FEW_DT, backend="reference", **options)
    assert theirs[0].any()
    for _ in schedules():
        ours = coba_lif_feed_forward_integral(x, None, p, FEW_DT, backend="triton", time_chunks=4, **options)
        assert_same(ours, theirs)
    assert launched() == {"speculate_kernel", "repair_kernel", "settle_kernel"}


@pytest.mark.parametrize("name", ["recorded", "float64", "end"])
def test_feed_forward_gradients_in_chunks(name: str) -> None:
    """As those of a run in order."""
    case = irregular(280, 5, dtype=F64 if name == "float64" else F32)
    p = P._replace(method="triangle", alpha=0.1)

    def run(backend: str) -> list[Tensor]:
        x = case.clone().requires_grad_()
        z, state = coba_lif_feed_forward_integral(
            x, None, p, FEW_DT, backend=backend, time_chunks=4, record_states=name == "recorded"
        )
        loss = (state.v * state.g_e).sum() if name == "end" else z.sum() + state.v.sum()
        return [z.detach(), *(field.detach() for field in state), *torch.autograd.grad(loss, x)]

    theirs = run("reference")
    assert theirs[0].any() and theirs[-1].any()
    for _ in schedules():
        assert_same_bits(run("triton"), theirs)
    assert {f"{name}_back_kernel" for name in ("speculate", "repair", "settle")} < launched()


def test_feed_forward_potentials_on_the_threshold() -> None:
    """Without currents ``u`` stays where ``v`` is: on the threshold, and one ulp on either side of it."""
    thresh = torch.tensor(-10.0)
    v = torch.stack([torch.nextafter(thresh, torch.tensor(-99.0)), thresh, torch.nextafter(thresh, torch.tensor(0.0))])
    state = CobaLIFFeedForwardState(v, 0.0, 0.0)
    spikes, _ = coba_lif_feed_forward_integral(torch.zeros(1, 3), state, CobaLIFParameters(g_l=0.0), DT, backend="triton")
    assert spikes.tolist() == [[0.0, 0.0, 1.0]]


def test_feed_forward_nan_and_infinite_inputs() -> None:
    """A maximum that drops a NaN is one instruction on a GPU, and no difference in Triton's interpreter."""
    case = problem(12, (6,))
    case.x[3, 1], case.x[4, 2], case.x[5, 3] = torch.nan, torch.inf, -torch.inf
    ours, theirs = case.run("triton", record_states=True), case.run("reference", record_states=True)
    for a, b in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


BACKWARD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ragged": ({"steps": 35, "shape": (2, 20)}, {"method": "super"}),
    "whole programs": ({"steps": 16, "shape": (64,)}, {"method": "triangle", "order": "jump_first"}),
    "recorded": ({"steps": 21, "shape": (33,), "per_neuron": True}, {"method": "super", "record_states": True}),
    "float64": ({"steps": 37, "shape": (20,), "dtype": F64}, {"method": "super"}),
    "bfloat16": ({"steps": 11, "shape": (33,), "dtype": torch.bfloat16}, {"method": "super", "spike_dtype": F32}),
    "refractory": ({"steps": 21, "shape": (33,), "per_neuron": True, "refractory": True}, {"method": "super"}),
    "currents": ({"steps": 21, "shape": (33,), "currents": True}, {"method": "super"}),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_feed_forward_gradients(name: str) -> None:
    """Bit for bit by input and initial state; by a parameter to the rounding of a sum over time and neurons."""
    arguments, options = BACKWARD[name]
    case = problem(**arguments)
    expected, their_grads = case.gradients("reference", **options)
    for _ in schedules():
        outputs, our_grads = case.gradients("triton", **options)
        assert_same_bits(outputs, expected)
        assert_same_bits([our_grads[key] for key in STATES], [their_grads[key] for key in STATES])
        for key in case.parameters:
            torch.testing.assert_close(our_grads[key], their_grads[key], rtol=1e-3, atol=1e-5)
    assert launched() == {"forward_kernel", "backward_kernel"}


@pytest.mark.parametrize("method", ["tanh", "circ", "heavi_erfc"])
def test_surrogates_with_an_exponential_or_a_root(method: str) -> None:
    """In float64, so that the last bits of ``exp`` don't matter."""
    case = problem(9, (5,), F64)
    _, theirs = case.gradients("reference", method=method)
    _, ours = case.gradients("triton", method=method)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-12)


RECURRENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "events": ({"steps": 33, "batch": 2, "neurons": 33}, {"path": "events"}),
    "events, one neuron": ({"steps": 33, "batch": 3, "neurons": 1}, {"path": "events"}),
    "events, two warps": (
        {"steps": 14, "batch": 3, "neurons": 128, "per_neuron": True},
        {"path": "events", "spike_dtype": "bits"},
    ),
    "events, float64": ({"steps": 14, "batch": 2, "neurons": 63, "dtype": F64}, {"path": "events", "record_states": True}),
    "dense": ({"steps": 9, "batch": 2, "neurons": 33}, {"path": "dense", "order": "jump_first"}),
    "events, refractory": ({"steps": 33, "batch": 2, "neurons": 33, "refractory": True}, {"path": "events"}),
    "events, currents": ({"steps": 33, "batch": 2, "neurons": 33, "per_neuron": True, "currents": True}, {"path": "events"}),
    "sliced, refractory": ({"steps": 9, "batch": 1, "neurons": 75, "refractory": True}, {"path": "sliced"}),
    "graded input": (
        {"steps": 9, "batch": 1, "neurons": 20, "binary": False},
        {"path": "events", "spike_dtype": torch.uint8},
    ),
    "sliced": ({"steps": 12, "batch": 2, "neurons": 75}, {"path": "sliced"}),
    "sliced, whole slices": ({"steps": 40, "batch": 1, "neurons": 128}, {"path": "sliced", "spike_dtype": "bits"}),
}
RECURRENT_KERNELS = {
    "events": {"compact_kernel", "projection_kernel", "forward_kernel"},
    "dense": {"driven_kernel"},
    "sliced": {"sliced_forward_kernel"},
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent(name: str) -> None:
    arguments, options = RECURRENT[name]
    case = recurrent_problem(**arguments)
    if name == "graded input":
        case.x[torch.arange(len(case.x)) % 5 != 0] = 0  # few enough to be summed as events
    compare(case, **options)
    assert launched() >= RECURRENT_KERNELS[options["path"]]


def test_rows_larger_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend.parameters, "ROW_IN_REGISTERS", 0)
    monkeypatch.setattr(triton_backend.parameters, "TILE", 32)
    compare(recurrent_problem(35, 2, 75, per_neuron=True), path="events", spike_dtype="bits")


@pytest.mark.parametrize("density", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_projections_have_the_same_bits_however_dense_their_sources_are(
    dtype: torch.dtype, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs of four rows, the last one of two, that go through all sources or through the events of each row."""
    g = torch.Generator().manual_seed(3)
    sources = (torch.randn(6, 11, generator=g) * (torch.rand(6, 11, generator=g) < density)).to(dtype)
    weights = torch.randn(11, 40, generator=g).to(dtype)
    expected = torch.zeros(2, 6, 40, dtype=dtype)
    for row, source in (sources != 0).nonzero().tolist():
        signed = torch.stack([weights[source].relu(), (-weights[source]).relu()])
        expected[:, row] += signed * sources[row, source]
    monkeypatch.setattr(triton_backend.projection, "MANY_ROWS", 1)
    for _ in schedules():
        assert_same_bits([triton_backend.project_events(sources, weights)], [expected])


def test_slices_under_every_interleaving_of_plain_accesses() -> None:
    """Threads are also switched between ordinary loads and stores."""
    case = recurrent_problem(6, 2, 75)
    expected, reference = case.run("reference")
    for seed in SEEDS:
        ptxsim.set_options(seed=seed, interleave=True)
        spikes, final = case.run("triton", path="sliced")
        assert_same_bits([spikes, *final], [expected, *reference])
    assert ptxsim.LOG[-1].grid == (3, 2, 1)


def test_a_missing_barrier_of_slices_is_noticed() -> None:
    comment = "all threads are done before the arrival is announced"
    case = recurrent_problem(6, 1, 75)
    leave_out, found = without_barrier(Path(str(recurrent_kernels.__file__)), comment)
    ptxsim.set_options(transform=leave_out)
    with pytest.raises(ptxsim.KernelFault, match="RACE"):
        for _ in schedules():
            case.run("triton", path="sliced")
    assert sum(found) > 0


@pytest.mark.parametrize("order", ["release", "acquire"])
def test_slices_that_meet_without_order_are_noticed(order: str) -> None:
    """Programs that count arrivals without releasing or acquiring what was written before race."""
    ptxsim.set_options(transform=lambda ptx: ptx.replace(f".gpu.{order}", ".gpu.relaxed"))
    with pytest.raises(ptxsim.KernelFault, match="RACE"):
        recurrent_problem(6, 1, 75).run("triton", path="sliced")


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_slices_have_the_bits_of_whole_rows_on_any_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each order of a sum would have bits of its own; a row's spikes are listed in several parts."""
    monkeypatch.setattr(triton_backend.recurrent, "READ_TOGETHER", 64)
    case = recurrent_problem(9, 2, 75, dtype, exact=False, per_neuron=True, refractory=True)
    spikes, final = case.run("triton", path="events")
    assert spikes.any()
    for _ in schedules():
        ours, state = case.run("triton", path="sliced")
        assert_same_bits([ours, *state], [spikes, *final])
    assert launched() >= {"forward_kernel", "sliced_forward_kernel"}


def test_more_slices_than_the_device_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cooperative launch fails at once where its programs could wait for each other for ever."""
    ptxsim.set_options(sm_count=1, resident=3)
    monkeypatch.setattr(triton_backend.hardware, "resident_programs", lambda device: 4)
    message = "needs its 4 programs to run at once, and cpu does not hold them .*too many blocks.*Pass path='events'"
    with pytest.raises(RuntimeError, match=message):
        recurrent_problem(3, 2, 75).run("triton", path="sliced")


@pytest.mark.parametrize("steps_per_launch", ["block", "step"])
def test_recurrent_gradients(steps_per_launch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks, the last a short one; sums over synapses and time in float64."""
    if steps_per_launch == "step":
        monkeypatch.setattr(triton_backend.recurrent, "SWEEP_IN_ONE_LAUNCH", 0)
        monkeypatch.setattr(triton_backend.hardware, "meets_unasked", lambda: False)
    case = recurrent_problem(37, 2, 33, F64, exact=False, binary=False, per_neuron=True)
    options = {"order": "jump_first", "record_states": True} if steps_per_launch == "block" else {}
    expected, theirs = case.gradients("reference", **options)
    for seed in SEEDS[:2]:
        ptxsim.set_options(seed=seed)
        outputs, ours = case.gradients("triton", block_steps=32, **options)
        assert torch.equal(outputs[0], expected[0])
        for name, grad in theirs.items():
            assert grad.any()
            assert (ours[name] - grad).abs().max() <= 1e-8 * grad.abs().max(), name
    assert launched() >= {"driven_kernel", "backward_kernel"}


SWEEPS = {"held": (2, 16, True), "streamed": (4, 32, False)}  # rows and neurons of a program that shares a sweep


def share_sweeps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend.recurrent, "_shared_sweep", lambda *sizes: SWEEPS[kind])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("kind", SWEEPS)
def test_programs_that_go_back_together(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks and two groups of rows; the same bits under every schedule, and of float64 the reference's to 1e-8."""
    share_sweeps(kind, monkeypatch)
    everything = {"per_neuron": True, "refractory": True} if dtype == F64 else {}
    case = recurrent_problem(34, 3, 45, dtype, exact=dtype == F32, binary=dtype == F32, **everything)
    options: dict[str, Any] = {"order": "jump_first", "record_states": True, "method": "circ"} if everything else {}
    expected, theirs = case.gradients("reference", **options)
    results = []
    for _ in schedules():
        outputs, ours = case.gradients("triton", block_steps=32, **options)
        assert torch.equal(outputs[0], expected[0])
        # sums over 34 steps and 135 cells, of as many roundings
        bound = 1e-8 if dtype == F64 else 34 * 135 * 2**-24
        for name, grad in theirs.items():
            assert grad.any() == (name not in ("left", "refractory")), name
            assert (ours[name] - grad).abs().max() <= bound * grad.abs().max(), name
        results.append([*outputs, *ours.values()])
    for other in results[1:]:
        assert_same_bits(other, results[0])
    assert launched() >= {"driven_kernel", "shared_backward_kernel"} and "backward_kernel" not in launched()


def test_programs_that_go_back_together_under_every_interleaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are also switched between ordinary loads and stores."""
    case = recurrent_problem(4, 2, 40, exact=False)
    for kind in SWEEPS:
        share_sweeps(kind, monkeypatch)
        ptxsim.set_options(interleave=False)
        expected = case.gradients("triton")[1]
        for seed in SEEDS[:2]:
            ptxsim.set_options(seed=seed, interleave=True)
            assert_same_bits(case.gradients("triton")[1].values(), expected.values())


@pytest.mark.parametrize("kind", SWEEPS)
@pytest.mark.parametrize("order", ["release", "acquire", "barrier"])
def test_sweeps_that_meet_without_order_are_noticed(order: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that count arrivals without releasing or acquiring what was written before race, and so do their threads."""
    share_sweeps(kind, monkeypatch)
    case = recurrent_problem(4, 1, 45)
    comment = "all threads are done before the arrival is announced"
    leave_out, found = without_barrier(Path(str(recurrent_kernels.__file__)), comment)
    if order == "barrier":
        ptxsim.set_options(transform=leave_out)
    else:
        ptxsim.set_options(transform=lambda ptx: ptx.replace(f".gpu.{order}", ".gpu.relaxed"))
    with pytest.raises(ptxsim.KernelFault, match="shared_backward_kernel: .*RACE"):
        for _ in schedules():
            case.gradients("triton")
    assert order != "barrier" or sum(found) > 0


def test_more_programs_of_a_sweep_than_the_device_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    share_sweeps("held", monkeypatch)
    ptxsim.set_options(sm_count=1, resident=2)
    with pytest.raises(RuntimeError, match="shared_backward_kernel needs its 3 programs to run at once.*too many blocks"):
        recurrent_problem(3, 1, 45).gradients("triton")


class LastProgram:
    """Launches run their last program only, on arrays of which only that part becomes memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launch = triton_backend.launch.run
        monkeypatch.setattr(triton_backend.launch, "run", self)
        ptxsim.set_options(race=False)

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        first = [size - 1 for size in grid] + [0] * (3 - len(grid))
        ptxsim.set_options(first_block=tuple(first), blocks=(1, 1, 1))
        self.launch(kernel, grid, *args, **meta)

    @staticmethod
    def zeros(*shape: int, dtype: torch.dtype = F32) -> Tensor:
        return sparse_zeros(torch.Size(shape).numel(), dtype).view(shape)


def constants_of(case: Problem | RecurrentProblem) -> Tensor:
    """The constants' table ``[C, 1]`` as the public functions derive it."""
    return torch.stack(derive_constants(case.record(), DT, F32, torch.device("cpu"))).unsqueeze(1)


STEPS = 33


def test_feed_forward_offsets_above_2_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Input, spikes, recorded states and gradients of more than 2^31 elements, forward and back."""
    zeros = LastProgram(monkeypatch).zeros
    case = problem(STEPS, (40,))
    neurons = 2**26 + 40
    x, spikes, grad_spikes, grad_x = (zeros(STEPS, neurons) for _ in range(4))
    assert x.numel() > 2**31
    state, final, grad_state = (zeros(3, neurons) for _ in range(3))
    states, words = zeros(3, STEPS, neurons), zeros(2, neurons, dtype=torch.int32)
    checkpoints = zeros(STEPS // 8 + STEPS % 8, 3, neurons)
    loss = torch.linspace(-1, 1, 40)
    x[:, -40:] = case.x
    state[:, -40:] = torch.stack(tuple(case.state))
    grad_spikes[:, -40:] = loss
    constants = constants_of(case)
    call = Call("triton", checkpoint_every=8)
    triton_backend.feed_forward_forward(x, state, constants, final, Outputs(spikes, words, states, checkpoints), call)
    saved, grads = Saved(words, checkpoints), Incoming(grad_spikes, None, None)
    triton_backend.feed_forward_backward(x, constants, saved, grads, grad_x, grad_state, torch.empty(0), call)
    case.x.requires_grad_()
    expected, trace = case.run("reference", record_states=True)
    assert_same_bits([spikes[:, -40:], *states[:, :, -40:]], [expected, *trace])
    (grad,) = torch.autograd.grad((expected * loss).sum(), case.x)
    assert torch.equal(grad_x[:, -40:], grad)


def test_recurrent_offsets_above_2_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of 2^21 batch rows has the bits of that row alone; its drive lies past 2^31 elements."""
    neurons = 32
    case = recurrent_problem(STEPS, 1, neurons)
    weights = case.recurrent_weights
    net = Network.of(Weights(case.input_weights, weights, constants_of(case)), False, triton_backend)

    def run(batch: int, zeros: Callable[..., Tensor]) -> list[Tensor]:
        drive, recurrent_drive = (zeros(2, STEPS, batch, neurons) for _ in range(2))
        drive[:, :, -1:] = torch.stack([case.x @ torch.relu(sign * case.input_weights).t() for sign in (1, -1)])
        x, z, state, lam = zeros(STEPS, batch, 1), zeros(batch, neurons), zeros(3, batch, neurons), zeros(3, batch, neurons)
        z[-1:], state[:, -1:] = case.state.z, torch.stack(tuple(case.state)[1:])
        spikes, words = zeros(STEPS, batch, neurons), zeros(2, batch, neurons, dtype=torch.int32)
        trajectory, adjoints = zeros(6, STEPS, batch, neurons), zeros(STEPS, batch, 2 * neurons)
        triton_backend.recurrent_block(net, x, drive, z, state, Outputs(spikes, words), sliced=False)
        triton_backend.recurrent.launch_driven(net, drive, recurrent_drive, state, words, trajectory=trajectory)
        grad_spikes = spikes.flatten(1)  # any numbers serve
        sweep = Sweep("super", grad_spikes, None, lam, zeros(batch, neurons), None, {})
        triton_backend.sweep_back(net, sweep, Block(0, words, trajectory), adjoints)
        return [spikes[:, -1], words[:, -1], trajectory[:, :, -1], adjoints[:, -1], lam[:, -1]]

    alone = run(1, torch.zeros)
    assert alone[0].any() and alone[3].any()
    large = LastProgram(monkeypatch)
    batch = 2**21
    assert STEPS * batch * neurons > 2**31
    assert_same_bits(run(batch, large.zeros), alone)
