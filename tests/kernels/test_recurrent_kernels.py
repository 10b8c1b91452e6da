"""Triton's recurrent kernels beyond what they share with the CPU's: tiles, slices, barriers, and the rounding of sums."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import torch
import triton
import triton.language as tl
from torch import Tensor

from coba_triton import CobaLIFParameters, CobaLIFState, coba_lif_integral, coba_lif_step
from coba_triton import kernels as kernels_package
from coba_triton.backend import triton as triton_backend
from coba_triton.kernels import recurrent as recurrent_kernels
from coba_triton.kernels.neuron import load_fields, store_fields
from coba_triton.neuron.records import Constants
from coba_triton.neuron.surrogate import SURROGATES
from coba_triton.ops.call import Block, Call, Network, Sweep
from coba_triton.tools.problems import DT, VALUES, RecurrentProblem, recurrent_problem
from helpers.bits import assert_same_bits
from helpers.concurrent_interpreter import programs_take_turns
from helpers.marks import slow
from helpers.planted import PATIENCE, assert_every_bug_shows, load

ORDERS = ["decay_first", "jump_first"]


@pytest.mark.slow
def test_bits_do_not_depend_on_batch_and_tiles(device, monkeypatch) -> None:
    case = recurrent_problem(20, 3, 70, device=device, exact=False)
    spikes, final = case.run("triton", path="events")
    case.x, state = case.x[:, 1:2], case.state
    case.state = CobaLIFState(*(field[1:2] for field in state))
    alone = case.run("triton", path="events")
    assert_same_bits([alone[0], *alone[1]], [spikes[:, 1:2], *(field[1:2] for field in final)])
    monkeypatch.setattr(triton_backend.parameters, "ROW_IN_REGISTERS", 0)
    monkeypatch.setattr(triton_backend.parameters, "TILE", 32)
    monkeypatch.setattr(triton_backend.parameters, "EVENTS_AHEAD", 2)
    for spike_dtype in (None, "bits"):
        tiled = case.run("triton", path="events", spike_dtype=spike_dtype)
        alone = case.run("triton", path="events", spike_dtype=spike_dtype)
        assert_same_bits([tiled[0], *tiled[1]], [alone[0], *alone[1]])


@pytest.mark.slow
@pytest.mark.parametrize("spike_dtype", [None, "bits"])
def test_rows_larger_than_a_tile(spike_dtype, device, monkeypatch) -> None:
    monkeypatch.setattr(triton_backend.parameters, "ROW_IN_REGISTERS", 0)
    monkeypatch.setattr(triton_backend.parameters, "TILE", 32)
    case = recurrent_problem(36, 2, 75, device=device, per_neuron=True)
    ours = case.run("triton", path="events", spike_dtype=spike_dtype)
    theirs = case.run("reference", spike_dtype=spike_dtype)
    assert_same_bits([ours[0], *ours[1]], [theirs[0], *theirs[1]])


def test_a_row_that_fills_its_program(device) -> None:
    """Of 32 neurons none is masked; versions of Triton differ in what they take as a mask there."""
    case = recurrent_problem(20, 2, 32, device=device)
    expected, reference = case.run("reference")
    spikes, final = case.run("triton", path="events")
    assert spikes.any()
    assert_same_bits([spikes, *final], [expected, *reference])


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_projections_have_the_same_bits_however_dense_their_sources_are(density, rows, device, monkeypatch) -> None:
    """Rows with many events read each weight once for several rows; those with few go through their events alone."""
    g = torch.Generator().manual_seed(3)
    sources = torch.randn(rows, 11, generator=g) * (torch.rand(rows, 11, generator=g) < density)
    weights = torch.randn(11, 40, generator=g)
    weights[1, 3] = float("inf")
    expected = torch.zeros(2, rows, 40)
    for row, source in (sources != 0).nonzero().tolist():  # ascending: the order in which every sum is added
        signed = torch.stack([weights[source].relu(), (-weights[source]).relu()])
        expected[:, row] += signed * sources[row, source]
    for many in (1, 1000):  # four rows a program, and one
        monkeypatch.setattr(triton_backend.projection, "MANY_ROWS", many)
        assert_same_bits([triton_backend.project_events(sources.to(device), weights.to(device)).cpu()], [expected])


@pytest.mark.slow
@pytest.mark.parametrize("path", ["events", "dense"])
def test_arbitrary_weights_stay_within_the_rounding_of_their_sums(path, device) -> None:
    """Teacher forced: each step starts from the reference's state; a spike may differ only where the potential is
    closer to the threshold than the error of a sum of ``n`` terms, ``n 2^-24`` times the sum of their magnitudes."""
    case = recurrent_problem(40, 2, 60, device=device, exact=False)
    p = CobaLIFParameters(**case.parameters)
    weights = case.input_weights, case.recurrent_weights
    state = case.state
    for x in case.x:
        z, after = coba_lif_step(x, state, *weights, p, DT)
        ours, final = coba_lif_integral(x[None], state, *weights, p, DT, backend="triton", path=path)
        magnitude = x.abs() @ weights[0].abs().t() + state.z.abs() @ weights[1].abs().t()
        bound = (66 * 2**-24) * magnitude + 2**-23
        for name in ("g_e", "g_i"):
            assert ((getattr(final, name) - getattr(after, name)).abs() <= bound).all()
        # k (E - v) carries an error of the conductances to the potential; |E - v| is below 2
        reach = DT * VALUES["c_m_inv"] * 2 * (bound * 2) + 2**-22
        _, unreset = coba_lif_step(x, state, *weights, p._replace(v_thresh=1e9), DT)
        margin = (unreset.v - case.parameters["v_thresh"]).abs()
        differs = ours[0] != z
        assert (margin[differs] <= reach[differs]).all()
        state = after


@pytest.mark.parametrize("path", ["events", "dense"])
def test_free_run_on_arbitrary_weights_diverges_at_the_threshold_only(path, device) -> None:
    """Spiking is chaotic: after a spike that rounding decides, runs part. The first one must be such a spike."""
    case = recurrent_problem(80, 1, 40, device=device, exact=False, seed=4)
    p = CobaLIFParameters(**case.parameters)
    weights = case.input_weights, case.recurrent_weights
    expected, trace = case.run("reference", record_states=True)
    spikes, _ = case.run("triton", path=path)
    differing = (spikes != expected).flatten(1).any(1).nonzero()
    first = int(differing[0]) if len(differing) else None
    print("first divergence:", "none in 80 steps" if first is None else f"step {first} of 80")
    assert torch.equal(spikes[:first], expected[:first])
    if first is not None:
        before = CobaLIFState(*(field[first - 1] for field in trace)) if first else case.state
        _, after = coba_lif_step(case.x[first], before, *weights, p._replace(v_thresh=1e9), DT)  # u: never reset
        margin = (after.v - case.parameters["v_thresh"]).abs()[spikes[first] != expected[first]]
        assert margin.max() < 80 * 2**-20, margin  # the error of a step, carried on by as many steps at the most


GRADIENT_CASES = [
    {"method": "super", "order": "decay_first", "record_states": False},
    *slow(
        {"method": "super", "order": "jump_first", "record_states": True},
        *({"method": m, "order": o, "record_states": False} for m, o in zip(list(SURROGATES)[1:], ORDERS * 3, strict=False)),
    ),
]


def launch_cases() -> Iterator[Any]:
    """A launch for every surrogate; how many launches there are is another matter than the surrogate."""
    for options in GRADIENT_CASES:
        marks, (values,) = ((), (options,)) if isinstance(options, dict) else (options.marks, options.values)
        yield pytest.param(values, True, marks=marks)
        if values["method"] == "super":
            yield pytest.param(values, False, marks=pytest.mark.slow)


@pytest.mark.parametrize(("options", "one_launch"), list(launch_cases()), ids=lambda value: str(value))
def test_gradients(options, one_launch, device, monkeypatch) -> None:
    """Everything by everything in float64, to 1e-8; two blocks, the last a short one."""
    if not one_launch:
        monkeypatch.setattr(triton_backend.recurrent, "SWEEP_IN_ONE_LAUNCH", 0)
        monkeypatch.setattr(triton_backend.hardware, "meets_unasked", lambda: False)
    case = recurrent_problem(37, 2, 9, torch.float64, device, exact=False, binary=False, per_neuron=True)
    ours, our_grads = case.gradients("triton", block_steps=32, **options)
    theirs, their_grads = case.gradients("reference", **options)
    assert torch.equal(ours[0], theirs[0])
    for name, expected in their_grads.items():
        scale = expected.abs().max().clamp(min=1e-30)
        assert (our_grads[name] - expected).abs().max() <= 1e-8 * scale, name
    if options["method"] != "heaviside":
        assert all(grad.abs().max() > 0 for grad in their_grads.values())


@pytest.mark.slow
def test_two_runs_have_equal_bits(device) -> None:
    first, second = (recurrent_problem(20, 2, 40, device=device, exact=False).gradients("triton") for _ in range(2))
    assert_same_bits([*first[0], *first[1].values()], [*second[0], *second[1].values()])


@pytest.mark.slow
def test_saved_memory(device) -> None:
    """One bit a spike and the state before each of about sqrt(T) blocks, on a GPU before fewer blocks."""
    case = recurrent_problem(1000, 1, 32, device=device, inputs=2)
    case.input_weights.requires_grad_()
    sizes: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        torch.ops.coba_triton.recurrent(
            case.x,
            case.state.z,
            torch.stack(case.state[1:]),
            case.input_weights,
            case.recurrent_weights,
            torch.zeros(len(Constants._fields), 1, device=device),
            *Call("triton", spike_dtype=torch.float32, path="dense", save=True),
        )
    for given in (case.x, case.input_weights, case.recurrent_weights, case.state.z):
        sizes.pop(given.untyped_storage().data_ptr())
    assert (0.45 if device.type == "cpu" else 0.125) < sum(sizes.values()) / (1000 * 32) < 0.55


def test_double_backward_names_the_reference(device) -> None:
    case = recurrent_problem(5, 1, 4, device=device)
    case.x.requires_grad_()
    spikes, state = case.run("triton")
    (grad,) = torch.autograd.grad(spikes.sum() + state.v.sum(), case.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiates once.*pass backend='reference'"):
        grad.square().sum().backward()


def test_unknown_path() -> None:
    case = recurrent_problem(2, 1, 3)
    with pytest.raises(ValueError, match="path must be one of 'auto', 'events', 'sliced', 'dense', got 'sparse'"):
        case.run("reference", path="sparse")


interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="threads stand for programs in Triton's interpreter only"
)


@contextlib.contextmanager
def small_slices(spin_limit: int) -> Iterator[None]:
    """Programs of 32 neurons, so that small rows have several."""
    kept = triton_backend.recurrent.SLICE, triton_backend.meeting.SPIN_LIMIT
    triton_backend.recurrent.SLICE, triton_backend.meeting.SPIN_LIMIT = 32, spin_limit
    try:
        yield
    finally:
        triton_backend.recurrent.SLICE, triton_backend.meeting.SPIN_LIMIT = kept


def run_sliced(
    seed: int = 0, spin_limit: int = 300, case: RecurrentProblem | None = None, **options: Any
) -> list[torch.Tensor]:
    """Two rows of three programs at once."""
    case = case or recurrent_problem(12, 2, 75, seed=seed)
    with small_slices(spin_limit), programs_take_turns(seed):
        spikes, final = case.run("triton", path="sliced", **options)
    return [spikes, *final]


@interpreted
@pytest.mark.parametrize("seed", [0, *slow(1, 2)])
def test_slices_agree_with_the_reference(seed, device) -> None:
    expected, reference = recurrent_problem(12, 2, 75, seed=seed).run("reference")
    assert_same_bits(run_sliced(seed, spin_limit=100_000), [expected, *reference])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.float64)], ids=str)
@pytest.mark.parametrize("everything", [False, *slow(True)])
def test_slices_have_the_bits_of_whole_rows_on_any_weights(everything, dtype, device, monkeypatch) -> None:
    """Where each order of a sum would have bits of its own; several lists a row, and most neurons fire."""
    monkeypatch.setattr(triton_backend.recurrent, "READ_TOGETHER", 32)
    options = {"per_neuron": True, "refractory": True} if everything else {}
    case = recurrent_problem(9, 3, 75, dtype, device, exact=False, **options)
    asked = {"record_states": True, "order": "jump_first"} if everything else {"spike_dtype": "bits"}
    spikes, final = case.run("triton", path="events", **asked)
    ours = run_sliced(3, 100_000, case, **asked)
    assert_same_bits(ours, [spikes, *final])
    assert spikes.any()


def test_which_rows_are_shared(monkeypatch) -> None:
    """By N and B alone: rows that no program keeps in registers, where at least four programs can share each."""
    monkeypatch.setattr(triton_backend.hardware, "resident_programs", lambda device: 132)
    monkeypatch.setattr(triton_backend.hardware, "meets_unasked", lambda: True)
    device, sizes = torch.device("cuda", 0), [(2048, 1), (2049, 1), (4000, 8), (4096, 33), (4096, 34), (16000, 1)]
    shared = [triton_backend.recurrent._shares_rows(neurons, batch, device) for neurons, batch in sizes]
    assert shared == [False, True, True, True, False, True]
    slices = [triton_backend.recurrent._slice_of(neurons, batch, torch.float32, device) for neurons, batch in sizes]
    assert slices == [128, 128, 256, 1024, 2048 * 2, 128]
    assert triton_backend.recurrent._slice_of(4096, 33, torch.float64, device) == 4096  # 1024 neurons of float64 would spill
    monkeypatch.setattr(triton_backend.hardware, "meets_unasked", lambda: False)
    assert not triton_backend.recurrent._shares_rows(4096, 1, device)


@interpreted
def test_slices_that_wait_in_vain_raise(device) -> None:
    """One after the other, the first program waits for the second for ever: an exception, no hang."""
    with small_slices(20), pytest.raises(RuntimeError, match="path 'sliced': a program waited .* pass path='events'"):
        recurrent_problem(3, 1, 75).run("triton", path="sliced")


@triton.jit(do_not_specialize=["stride"])
def move_fields_kernel(to_ptr, from_ptr, stride, COUNT: tl.constexpr):
    index = tl.arange(0, 1)
    store_fields(to_ptr + index, stride, load_fields(from_ptr + index, stride, index < 1, COUNT), index < 1, COUNT)


def test_rows_far_apart(device) -> None:
    """Fields, and sources, whose places are beyond 2**31: such a state or input has some gigabytes."""
    stride = 1_100_000_000
    numbers, moved = (torch.zeros(2 * stride + 1, dtype=torch.uint8, device=device) for _ in range(2))
    values = torch.tensor([1, 2, 3], dtype=torch.uint8, device=device)
    numbers[::stride] = values
    move_fields_kernel[(1,)](moved, numbers, stride, COUNT=3)
    assert torch.equal(moved[::stride], values)
    weights = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(device)
    drive = triton_backend.project_events(numbers.as_strided((1, 3), (1, stride)), weights)
    assert_same_bits([drive], [triton_backend.project_events(values.view(1, 3), weights)])
    assert drive.any()


MEET = ("(arrived < target)", "arrived >= target")
SWEEPS = {"held": (2, 16, True), "streamed": (4, 32, False)}  # rows and neurons of a program


@contextlib.contextmanager
def swept_together(kind: str, seed: int, spin_limit: int = 100_000) -> Iterator[None]:
    """The sweep back by several programs at once.

    The memory for the adjoints holds NaN before. Otherwise it may hold the adjoints of the call before, and a program that
    reads another one's too early would read the right numbers.
    """
    together = triton_backend.recurrent._sweep_together

    def in_turns(net: Network, sweep: Sweep, block: Block, adjoints: Tensor, *tile: Any) -> None:
        adjoints.fill_(math.nan)
        with programs_take_turns(seed):
            together(net, sweep, block, adjoints, *tile)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend.recurrent, "_shared_sweep", lambda *sizes: SWEEPS[kind])
        patch.setattr(triton_backend.recurrent, "_sweep_together", in_turns)
        patch.setattr(triton_backend.meeting, "SPIN_LIMIT", spin_limit)
        yield


SWEPT: dict[str, Any] = {"plain": {}, "everything": {"per_neuron": True, "refractory": True}}


@interpreted
@pytest.mark.parametrize(("kind", "problem"), [("held", "everything"), ("streamed", "plain")])
def test_programs_that_go_back_together(kind, problem, device) -> None:
    """Everything by everything in float64, to 1e-8; two blocks and groups of rows, and the same bits under two schedules."""
    case = recurrent_problem(34, 3, 45, torch.float64, exact=False, binary=False, **SWEPT[problem])
    options = {"record_states": True, "order": "jump_first", "method": "circ"} if problem == "everything" else {}
    expected, theirs = case.gradients("reference", **options)
    results = []
    for seed in (0, 1):
        with swept_together(kind, seed):
            outputs, ours = case.gradients("triton", block_steps=32, **options)
        assert torch.equal(outputs[0], expected[0])
        for name, grad in theirs.items():
            assert grad.any() == (name not in ("left", "refractory"))  # which have no derivative
            assert (ours[name] - grad).abs().max() <= 1e-8 * grad.abs().max(), name
        results.append([*outputs, *ours.values()])
    assert_same_bits(*results)


@interpreted
def test_programs_that_wait_in_vain_on_the_way_back_raise(device, monkeypatch) -> None:
    monkeypatch.setattr(triton_backend.recurrent, "_shared_sweep", lambda *sizes: (1, 16, True))
    monkeypatch.setattr(triton_backend.meeting, "SPIN_LIMIT", 20)
    with pytest.raises(RuntimeError, match="backward: a program waited for another .* pass backend='reference'"):
        recurrent_problem(3, 1, 40).gradients("triton")


def test_which_sweeps_are_shared(monkeypatch) -> None:
    """By N, B and the dtype alone: weights that registers hold, or few rows, where all programs run at once."""
    monkeypatch.setattr(triton_backend.hardware, "resident_programs", lambda device: 132)
    monkeypatch.setattr(triton_backend.hardware, "meets_unasked", lambda: True)
    expected = {
        (128, 32): None, (129, 32): (8, 16, True), (257, 32): (8, 16, True), (512, 32): (8, 16, True), (512, 33): None,
        (300, 3): (4, 16, True), (513, 5): None, (513, 4): (4, 32, False), (4224, 1): (1, 32, False), (4225, 1): None,
    }  # fmt: skip
    device = torch.device("cuda", 0)
    assert {size: triton_backend.recurrent._shared_sweep(*size, torch.float32, device) for size in expected} == expected
    assert triton_backend.recurrent._shared_sweep(300, 32, torch.float64, device) is None
    assert triton_backend.recurrent._shared_sweep(256, 2, torch.float64, device) is None
    assert triton_backend.recurrent._shared_sweep(300, 2, torch.float64, device) == (2, 16, False)


SWEEP_PLANTED = {
    "no wait": {"(arrived < target)": "(arrived < 0)", "arrived >= target": "arrived >= 0"},
    "target one short": {"(arrived < target)": "(arrived < target - 1)", "arrived >= target": "arrived >= target - 1"},
    "groups share a counter": {"arrived_ptr + group": "arrived_ptr"},
    "one step too late": {"            t - 1, cells, tl.where(mask, t, 0)": "            t, cells, tl.where(mask, t, 0)"},
}


def sweep_goes_wrong(kind: str, seed: int) -> bool:
    """Whether a gradient is off by more than rounding under this schedule, or a program waits in vain."""
    case = recurrent_problem(6, 5, 45, torch.float64, exact=False)
    _, theirs = case.gradients("reference")
    try:
        with swept_together(kind, seed, PATIENCE):
            _, ours = case.gradients("triton")
    except RuntimeError as error:
        assert "backward: a program waited" in str(error)
        return True
    return any(not ((ours[name] - grad).abs().max() <= 1e-8 * grad.abs().max()) for name, grad in theirs.items())


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("kind", SWEEPS)
def test_planted_bugs_of_the_sweep_are_caught(kind, plant) -> None:
    """Each bug shows under one of a few schedules, and the kernel as it is goes right under all of them."""
    assert_every_bug_shows(SWEEP_PLANTED, plant, lambda seed: sweep_goes_wrong(kind, seed))


@pytest.fixture
def plant(tmp_path, monkeypatch) -> Callable[[str, dict[str, str]], None]:
    """Puts the kernels with a bug in the place of those without."""
    source = Path(recurrent_kernels.__file__).read_text()

    def put(bug: str, edits: dict[str, str]) -> None:
        assert all(source.count(old) == 1 for old in edits), bug  # in the kernel that is meant, and in no other one
        module = load(source, edits, kernels_package.__name__, tmp_path / f"{bug}.py", monkeypatch)
        monkeypatch.setattr(triton_backend.recurrent, "recurrent", module)

    return put


PLANTED = {
    "no wait": {MEET[0]: "(arrived < 0)", MEET[1]: "arrived >= 0"},
    "target one short": {MEET[0]: "(arrived < target - 1)", MEET[1]: "arrived >= target - 1"},
    "single buffer": {"((t % 2) * B + row) * N": "row * N"},
    "rows share a counter": {"arrived_ptr + row": "arrived_ptr"},
    "published after the arrival": {
        "tl.store(published + neurons, spike.to(tl.uint8), mask=mask)": "pass",
        "            count = 0\n            for start in range(0, N, TILE):": (
            "            tl.store(published + neurons, spike.to(tl.uint8), mask=mask)\n"
            "            count = 0\n            for start in range(0, N, TILE):"
        ),
    },
}


def slices_go_wrong(seed: int) -> bool:
    """Whether spikes or states differ under this schedule, or a program waits in vain."""
    expected, reference = recurrent_problem(12, 2, 75, seed=seed).run("reference")
    try:
        ours = run_sliced(seed, PATIENCE)
    except RuntimeError as error:
        assert "path 'sliced'" in str(error)
        return True
    return not all(torch.equal(a, b) for a, b in zip(ours, [expected, *reference], strict=True))


@interpreted
@pytest.mark.slow
def test_planted_barrier_bugs_are_caught(plant, monkeypatch) -> None:
    """Each bug shows under one of a few schedules, and the kernel as it is goes right under all of them."""
    monkeypatch.setattr(torch, "empty", torch.zeros)  # a list that is read too early then names neurons that exist
    assert_every_bug_shows(PLANTED, plant, slices_go_wrong)
