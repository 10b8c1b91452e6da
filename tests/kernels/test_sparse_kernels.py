"""Triton's kernels of sparse networks, against a plain loop over steps and synapses."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import torch
import triton
from torch import Tensor

from coba_triton import CobaLIFParameters, Synapses, coba_lif_integral
from coba_triton import kernels as kernels_package
from coba_triton.backend import triton as triton_backend
from coba_triton.kernels import recurrent as recurrent_kernels
from coba_triton.kernels import sparse as sparse_kernels
from coba_triton.neuron.surrogate import SURROGATES
from coba_triton.ops.call import Outputs, Projection
from coba_triton.ops.grid import Grid
from coba_triton.tools.problems import DT, VALUES
from helpers.bits import assert_same_bits
from helpers.concurrent_interpreter import programs_take_turns
from helpers.devices import to_device
from helpers.marks import slow, slow_cases
from helpers.planted import PATIENCE, assert_every_bug_shows, load
from helpers.sparse_networks import Connected, SparseProblem, sparse_network_problem

interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="threads stand for programs in Triton's interpreter only"
)


@pytest.fixture
def problem(device: torch.device) -> Callable[..., SparseProblem]:
    """Makes a problem that Triton's kernels solve on the device."""
    return functools.partial(sparse_network_problem, triton_backend, device=device)


@contextlib.contextmanager
def programs(count: int, seed: int = 0, spin_limit: int = 1_000_000) -> Iterator[None]:
    """So many programs share a row, each with tiles of 32 neurons."""
    in_turns = triton.knobs.runtime.interpret and count > 1
    with pytest.MonkeyPatch.context() as patch, programs_take_turns(seed) if in_turns else contextlib.nullcontext():
        patch.setattr(triton_backend.sparse, "PROGRAMS_PER_ROW", count)
        patch.setattr(triton_backend.sparse, "SPARSE_TILE", 32)
        patch.setattr(triton_backend.meeting, "SPIN_LIMIT", spin_limit)
        yield


def of_neurons(neurons: int, dtype: torch.dtype = torch.float32, constants: int = 1) -> Any:
    """What the launcher looks at when it shares rows out among programs."""
    return SimpleNamespace(neurons=neurons, constants=torch.empty(12, 1, dtype=dtype).expand(12, constants))


def assert_as_expected(case: SparseProblem, cuts: tuple[int, ...] = (), **options: Any) -> None:
    expected = case.expected()
    ours = case.run(cuts, **options)
    assert expected["spikes"].any()
    for name, value in expected.items():
        assert_same_bits([ours[name].to(value.dtype)], [value])


FORWARD: dict[str, dict[str, Any]] = {
    "arbitrary weights": {},
    "jump first, per neuron": {"jump_first": True, "per_neuron": True},
    "refractory": {"refractory": True, "batch": 3},
    "one delay": {"delays": (1, 1)},
    "shortest is longest": {"delays": (4, 4)},
    "by source": {"per": "source"},
    "of the network": {"per": "network", "size": 0.05},
    "narrow": {"exact": True, "narrow": True},
    "float64": {"dtype": torch.float64},
    "graded history": {"graded": True},
    "sparse input": {"inputs": 30, "size": 0.1},
    "one neuron": {"neurons": 1, "fan_out": 3},
    "many synapses of a source": {"neurons": 40, "fan_out": 70, "size": 0.005},
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str, problem) -> None:
    case = problem(**FORWARD[name])
    assert (case.net.recurrent.grid.sums == torch.int32) == (name == "narrow")
    assert_as_expected(case)


@pytest.mark.parametrize("cuts", [(1,), (5, 6, 13), *slow(tuple(range(1, 24)))])
def test_bits_do_not_depend_on_blocks(cuts: tuple[int, ...], problem) -> None:
    """The ring goes on where it was; delays are longer and shorter than blocks."""
    assert_as_expected(problem(refractory=True), cuts, spike_dtype=torch.uint8)


def test_long_blocks(problem) -> None:
    """Words that begin and end within a window of steps, and a window that is cut off by the end of the block."""
    assert_as_expected(problem(steps=70, neurons=20, delays=(11, 13), batch=1), (33,), spike_dtype=torch.bool)


@pytest.mark.parametrize("window", [1, 2, 16])
def test_bits_do_not_depend_on_the_window(window: int, problem, monkeypatch) -> None:
    monkeypatch.setattr(triton_backend.sparse, "SPARSE_WINDOW", window)
    assert_as_expected(problem(delays=(3, 7)))


@pytest.mark.skipif(
    not triton.knobs.runtime.interpret and not torch.cuda.is_available(),
    reason="programs run at once on a GPU or in threads",
)
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"delays": (3, 7), "steps": 12}),
        (3, {"delays": (3, 7), "steps": 12}),
        *slow_cases(
            (3, {"delays": (1, 2), "refractory": True}),
            (2, {"exact": True, "narrow": True, "inputs": 20, "size": 0.1}),
        ),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_programs(count: int, options: dict[str, Any], problem, device) -> None:
    """Two programs have tiles of three, so that one has two; three have one each."""
    case, net = problem(**options), of_neurons(75)
    if triton.knobs.runtime.interpret:
        assert triton_backend.sparse._programs_and_tile(net, 2)[0] == 1
    with programs(1):
        assert_as_expected(case, (7,))
    with programs(count):
        assert triton_backend.sparse._programs_and_tile(net, 2)[0] == count
        assert_as_expected(case, (7,))


def test_programs_are_as_many_as_run_at_once(monkeypatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton_backend.hardware, "threads_per_warp", lambda: 32)
    monkeypatch.setattr(triton_backend.hardware, "resident_programs", lambda device: 132)
    for neurons, batch, *expected in [
        (256, 1, 1, 256),
        (257, 1, 9, 32),
        (4000, 1, 125, 32),
        (4000, 100, 1, 1024),
        (10**6, 1, 132, 1024),
        (10**6, 50, 2, 1024),
    ]:
        found = triton_backend.sparse._programs_and_tile(of_neurons(neurons), batch)
        assert found == tuple(expected), (neurons, batch)
        assert found[0] == 1 or found[0] * batch <= 132
    for net in (of_neurons(10**6, torch.float64), of_neurons(10**6, constants=10**6)):
        assert triton_backend.sparse._programs_and_tile(net, 1) == (132, 256)


def test_synapses_that_are_read_together_are_as_many_as_a_source_has() -> None:
    def together(synapses: int, **options: Any) -> int:
        net = of_neurons(10, **options)
        net.recurrent = SimpleNamespace(targets=torch.empty(synapses), indptr=torch.empty(11))
        return triton_backend.sparse._synapses_together(net)

    assert [together(count) for count in (0, 60, 320, 330, 1000, 9000)] == [32, 32, 32, 64, 128, 128]
    assert together(1000, dtype=torch.float64) == together(1000, constants=10) == 32


@pytest.mark.slow
def test_a_batch_row_alone_has_the_same_bits(problem) -> None:
    case = problem(batch=3)
    together = case.run()
    case.drive, case.state, case.history = case.drive[:, :, 1:2], case.state[:, 1:2], case.history[:, 1:2]
    case.x = case.x[:, 1:2]
    alone = case.run()
    assert_same_bits([alone["spikes"], alone["states"]], [together["spikes"][:, 1:2], together["states"][:, :, 1:2]])


def test_both_widths_have_the_same_bits(problem) -> None:
    wide, narrow = (problem(exact=True, narrow=width) for width in (False, True))
    sums = [case.net.recurrent.grid.sums for case in (wide, narrow)]
    assert sums == [torch.int64, torch.int32]
    assert_same_bits(wide.run().values(), narrow.run().values())


def synapses_of(weights: Tensor, scale: float, sums: torch.dtype = torch.int64) -> Projection:
    """One source, a synapse onto each of as many neurons; ``scale`` for both signs, so that integers can be read."""
    count = len(weights)
    scales = torch.tensor([scale, scale, 1 / scale, 1 / scale], dtype=weights.dtype)
    return Projection(torch.tensor([0, count]), torch.arange(count, dtype=torch.int32), weights, None, Grid(scales, sums))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_rounded_to_the_nearest_even_integer(dtype: torch.dtype, problem, device) -> None:
    """From halves between small integers to magnitudes of which every float is an integer, up to 2**61."""
    top = 2 ** (23 if dtype == torch.float32 else 52)
    numbers = [0.5, 1.5, 2.5, 3.5, 0.49999997, 0.75, 1e-30, 7.0, top / 2 + 0.5, top / 2 + 1.5, top - 0.5, top - 1.5]
    numbers += [top, top + 1, 2 * top + 2, 2.0**61]
    weights = torch.tensor(numbers, dtype=dtype)
    weights = torch.cat([weights, -weights])
    expected = torch.round(weights.abs().double()).long()
    case = problem(neurons=len(weights), dtype=dtype, steps=1, delays=(1, 1), batch=1)
    recurrent = synapses_of(weights, 1.0)
    indptr = torch.cat([recurrent.indptr, recurrent.indptr[1:].expand(len(weights) - 1)])
    case.net = case.net._replace(recurrent=recurrent._replace(indptr=indptr, delays=torch.tensor([0.01])))
    case.history = torch.zeros(1, 1, len(weights), dtype=dtype)
    case.history[0, 0, 0] = 1
    case = case.on_device()
    sums = triton_backend.sparse_ring(case.net, case.history)
    excitatory, inhibitory = sums[:, 0, 0].cpu()
    assert torch.equal(torch.where(weights < 0, inhibitory, excitatory), expected)
    # the same as a spike of the forward sends it; the first neuron spikes, whatever its input is
    state = torch.zeros(3, 1, len(weights), dtype=dtype, device=device)
    state[0] = -10.0
    state[0, 0, 0] = 10.0
    ring = torch.zeros_like(sums)
    out = Outputs(torch.empty(1, 1, len(weights), dtype=dtype, device=device))
    triton_backend.sparse_block(case.net, ring, 0, case.x, None, state, out)
    assert out.spikes is not None and out.spikes.flatten().tolist() == [1.0] + [0.0] * (len(weights) - 1)
    assert torch.equal(ring, sums)


def test_a_sum_is_rounded_once(problem, device) -> None:
    """2**24 + 1 units become the nearest float32, and 2**61 + 2**37 + 1 does not round to even twice."""
    case = problem(neurons=2, steps=1, delays=(1, 1), batch=1)
    free = case.net.constants.clone()
    free[:2] = 0.0  # conductances do not decay
    ring = torch.tensor([2**24 + 1, 2**61 + 2**37 + 1]).view(1, 1, 1, 2).repeat(2, 1, 1, 1)
    scales = torch.ones(4)
    recurrent = case.net.recurrent._replace(grid=Grid(scales, torch.int64))
    net, ring, x, state = to_device(
        (case.net._replace(constants=free, recurrent=recurrent), ring, case.x, torch.zeros(3, 1, 2)), device
    )
    final = triton_backend.sparse_block(net, ring, 0, x, None, state, Outputs())
    assert final[1, 0].tolist() == final[2, 0].tolist() == [2.0**24, 2.0**61 + 2.0**38]


INPUTS: dict[str, Any] = {
    "graded": lambda x: x * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)),
    "large": lambda x: x * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * 1000,
    "just a power of two": lambda x: x * 8,
    "not finite": lambda x: x.clone().index_put_((torch.tensor([2, 3]), torch.tensor([0, 1]), torch.tensor([1, 4])),
                                                 torch.tensor([torch.inf, torch.nan])),
    "nothing": lambda x: x * 0,
    "bool": lambda x: x.bool(),
    "uint8": lambda x: (x * 3).to(torch.uint8),
    "bfloat16": lambda x: (x * 1.7).to(torch.bfloat16),
    "float16": lambda x: (x * -0.3).to(torch.float16),
    "strided": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name: str, problem) -> None:
    case = problem(inputs=30, steps=6, size=0.05)
    case.x = INPUTS[name](case.x)
    ours, theirs = case.run(), case.expected()
    for key in theirs:
        assert torch.equal(ours[key].isnan(), theirs[key].isnan())
        assert torch.equal(ours[key].nan_to_num(), theirs[key].nan_to_num())
    assert theirs["states"].isnan().any() == (name == "not finite")


def test_a_coarser_grid_keeps_sums_in_range(problem, device) -> None:
    """All synapses of a neuron with the greatest value: the sum is almost all that the integers hold."""
    weights = torch.full((400,), 0.25)
    case = problem(inputs=400, neurons=4, steps=1, batch=1)
    inputs = Projection(torch.arange(401), torch.zeros(400, dtype=torch.int32), weights, None, Grid(
        torch.tensor([2.0**55, 1.0, 2.0**-55, 1.0]), torch.int64))  # fmt: skip
    net, x = to_device((case.net._replace(inputs=inputs), torch.full((1, 1, 400), 3.0)), device)
    drive = triton_backend.sparse._sparse_projection(net, x, None)
    assert drive is not None and drive[0, 0, 0].tolist() == [300.0, 0.0, 0.0, 0.0] and not drive[1].any()


def test_states_of_chosen_neurons(problem, device) -> None:
    case = problem(steps=5)
    whole = case.run()
    chosen = torch.tensor([0, 7, 74, 75, 149])
    states = torch.full((3, 5, 5), torch.nan, device=device)
    there = case.on_device()
    ring = triton_backend.sparse_ring(there.net, there.history)
    out = Outputs(None, None, states)
    triton_backend.sparse_block(there.net, ring, 0, there.x, there.drive, there.state, out, chosen.to(device))
    assert_same_bits([states.cpu()], [whole["states"].flatten(2)[..., chosen]])


def test_synapses_of_nobody(problem) -> None:
    """No synapse, and no input: neurons on their own."""
    case = problem(steps=5, dense=False)
    nobody = case.net.recurrent._replace(
        indptr=torch.zeros(76, dtype=torch.int64), targets=torch.zeros(0, dtype=torch.int32), weights=torch.zeros(0)
    )
    case.net = case.net._replace(recurrent=nobody._replace(delays=torch.zeros(0)))
    ours, expected = case.run(), case.expected()
    assert_same_bits([ours["states"]], [expected["states"]])


GRADIENTS: dict[str, dict[str, Any]] = {
    "super": {"case": {}},
    "sparse input, samples": {"case": {"inputs": 20, "size": 0.1, "batch": 4, "graded": True}, "samples": 2},
    "graded, jump first": {"case": {"graded": True, "jump_first": True, "per_neuron": True}, "samples": 2},
    "refractory": {"case": {"refractory": True, "per": "source"}},
    "of the network": {"case": {"per": "network", "size": 0.03, "delays": (1, 1)}},
    **{method: {"case": {"neurons": 20}, "method": method} for method in SURROGATES if method != "super"},
}
QUICK = ("super", "sparse input, samples")


def assert_gradients(case: SparseProblem, method: str, samples: int, cuts: tuple[int, ...]) -> dict[str, Tensor]:
    loss = case.random_loss()
    expected = case.expected_gradients(loss, method, samples)
    ours = case.gradients(loss, method, samples, cuts)
    for name, grad in ours.items():
        wanted = expected[name][: len(grad)]
        if name == "state":
            grad, wanted = grad[:3], wanted[:3]
        if method != "heaviside":
            assert wanted.any()
        assert (grad - wanted).abs().max() <= 1e-8 * wanted.abs().max().clamp(min=1e-30), name
    return ours


@pytest.mark.parametrize("name", [*QUICK, *slow(*(name for name in GRADIENTS if name not in QUICK))])
def test_gradients(name: str, problem) -> None:
    """By everything in float64, to 1e-8, in blocks that are shorter and longer than delays."""
    options = GRADIENTS[name]
    case = problem(**{"steps": 9, "neurons": 33, "dtype": torch.float64, "fan_out": 6} | options["case"])
    assert_gradients(case, options.get("method", "super"), options.get("samples", 1), (3, 4))


def test_a_weight_of_zero_has_no_gradient(problem) -> None:
    case = problem(steps=9, neurons=33, dtype=torch.float64, fan_out=6)
    grad = case.gradients(case.random_loss(), "super", 1)["recurrent"]
    none = case.net.recurrent.weights == 0
    assert none.any() and not grad[0, none].any() and grad[0, ~none].any()


@interpreted
@pytest.mark.slow
def test_gradients_have_the_same_bits_for_any_number_of_programs(problem) -> None:
    case = problem(steps=8, neurons=75, fan_out=5, delays=(1, 3), inputs=5, size=0.1)
    loss = case.random_loss()
    alone = case.gradients(loss, "super", 1, (5,))
    with programs(3):
        together = case.gradients(loss, "super", 1, (5,))
    with programs(1):
        in_tiles = case.gradients(loss, "super", 1, (5,))
    assert alone["recurrent"].any()
    assert_same_bits(together.values(), alone.values())
    assert_same_bits(in_tiles.values(), alone.values())


@pytest.mark.slow
def test_gradients_of_each_sample_are_those_of_its_rows(problem) -> None:
    case = problem(steps=6, neurons=20, batch=4, inputs=6, size=0.1)
    loss = case.random_loss()
    both = case.gradients(loss, "super", 2, (2,))
    for sample, rows in enumerate((slice(0, 2), slice(2, 4))):
        part = problem(steps=6, neurons=20, batch=4, inputs=6, size=0.1)
        part.x, part.state, part.history = part.x[:, rows], part.state[:, rows].contiguous(), part.history[:, rows]
        own = {name: value[..., rows, :].contiguous() for name, value in loss.items()}
        alone = part.gradients(own, "super", 1, (2,))
        assert_same_bits(
            [both[key][sample] for key in ("recurrent", "inputs")], [alone[key][0] for key in ("recurrent", "inputs")]
        )


def test_sums_are_exact_in_any_order(problem) -> None:
    """Synapses in another order have the same bits, though a sum of floats has others."""
    case = problem(neurons=20, fan_out=40, size=0.01, batch=1)
    indptr, targets, weights, delays, grid = case.net.recurrent
    order = torch.cat(
        [begin + torch.arange(int(count)).flip(0) for begin, count in zip(indptr, indptr.diff(), strict=False)]
    )
    turned = Projection(indptr, targets[order], weights[order], delays[order], grid)
    expected = case.run()
    case.net = case.net._replace(recurrent=turned)
    assert_same_bits(case.run().values(), expected.values())
    synapses = Connected(turned)
    other = torch.zeros(20).index_add(0, synapses.targets, synapses.weights)
    assert not torch.equal(other, torch.zeros(20).index_add(0, synapses.targets.flip(0), synapses.weights.flip(0)))


@interpreted
def test_programs_that_wait_in_vain_raise(problem, monkeypatch) -> None:
    """One after the other, the first program waits for the second for ever: an exception, no hang."""
    case = problem(steps=3)
    monkeypatch.setattr(triton_backend.sparse, "PROGRAMS_PER_ROW", 2)
    monkeypatch.setattr(triton_backend.sparse, "SPARSE_TILE", 32)
    monkeypatch.setattr(triton_backend.meeting, "SPIN_LIMIT", 20)
    with pytest.raises(RuntimeError, match="sparse network: a program waited .* expected all 4 programs"):
        case.run()


PLANTED = {
    "no wait": {"(arrived < target)": "(arrived < 0)", "return arrived >= target": "return arrived >= 0"},
    "target one short": {
        "(arrived < target)": "(arrived < target - 1)",
        "return arrived >= target": "return arrived >= target - 1",
    },
    "rows share a counter": {"meet(arrived_ptr + row,": "meet(arrived_ptr,"},
    "a list's own counter is cleared": {"(1 - counter) * B": "counter * B"},
    "second meeting left out": {
        "waiting = meet(arrived_ptr + row, (meetings + 2) * parts, spin_limit) & waiting": "waiting = waiting & True",
        "(meetings + 1) * parts": "(meetings // 2 + 1) * parts",
    },
}


@interpreted
@pytest.mark.slow
def test_planted_barrier_bugs_are_caught(tmp_path: Path, problem, monkeypatch) -> None:
    """Each bug shows under one of a few schedules, and the kernel as it is goes right under all of them."""
    source = Path(sparse_kernels.__file__).read_text()
    meeting = inspect.getsource(recurrent_kernels.meet.fn)  # programs meet in a function of its own, which may have the bug
    after = "# One number of a synapse for all"
    source = source.replace(after, f"{meeting}\n\n{after}", 1)
    case = problem(steps=12, delays=(1, 3))
    expected = case.expected()

    def with_room(*size: int, **options: Any) -> Tensor:
        """A list that is read too early then names neurons that exist, and one that grows too long stays in its memory."""
        return torch.zeros(*size[:-1], 20 * size[-1] if len(size) == 2 else size[-1], **options)

    def plant(bug: str, edits: dict[str, str]) -> None:
        module = load(source, edits, kernels_package.__name__, tmp_path / f"{bug}.py", monkeypatch)
        monkeypatch.setattr(triton_backend.sparse, "sparse", module)

    def goes_wrong(seed: int) -> bool:
        """Whether a result differs under this schedule, or a program waits in vain."""
        try:
            with programs(3, seed, PATIENCE):
                ours = case.run()
        except RuntimeError as error:
            assert "sparse network" in str(error)
            return True
        return not all(torch.equal(ours[name], expected[name]) for name in expected)

    monkeypatch.setattr(torch, "empty", with_room)
    assert_every_bug_shows(PLANTED, plant, goes_wrong)


# Through the public function


def network(device: torch.device, dtype: torch.dtype = torch.float32, per_neuron: bool = False) -> tuple[Any, ...]:
    """Input, both kinds of synapses, and parameters."""
    g = torch.Generator().manual_seed(2)
    neurons, inputs = 40, 9

    def draw(sources: int, count: int, scale: float, delays: Tensor | None) -> Synapses:
        source, target = (torch.randint(size, (count,), generator=g) for size in (sources, neurons))
        weights = (torch.randn(count, generator=g) * scale).to(dtype)
        return Synapses.from_coo(target, source, weights, delays, shape=(neurons, sources))

    delays = DT * torch.randint(2, 7, (400,), generator=g)
    x = ((torch.rand(40, 2, inputs, generator=g) < 0.3) * torch.tensor([0.5, 3.0]).view(2, 1)).to(dtype)
    p = CobaLIFParameters(**(VALUES | {"alpha": 10.0, "refractory": 2.5 * DT}))
    if per_neuron:
        p = p._replace(v_thresh=VALUES["v_thresh"] - 0.05 * torch.rand(neurons, generator=g).to(dtype))
    synapses = draw(inputs, 120, 0.1, None), draw(neurons, 400, 0.03, delays)
    return x.to(device), *(each.to(device) for each in synapses), to_device(p, device)


@pytest.mark.parametrize("spike_dtype", [None, "bits"])
@pytest.mark.parametrize("order", ["decay_first", "jump_first"])
def test_the_public_function_has_the_references_bits(order: str, spike_dtype: Any, device) -> None:
    """In blocks of 32 steps, and in two calls that go on from each other."""
    x, inputs, recurrent, p = network(device, per_neuron=order == "jump_first")
    options: dict[str, Any] = {"order": order, "spike_dtype": spike_dtype}
    expected, final = coba_lif_integral(x, None, inputs, recurrent, p, DT, backend="reference", **options)
    assert expected.any() and final.history.any()
    ours, after = coba_lif_integral(x, None, inputs, recurrent, p, DT, backend="triton", block_steps=32, **options)
    assert_same_bits([ours, *after], [expected, *final])
    _, between = coba_lif_integral(x[:3], None, inputs, recurrent, p, DT, backend="triton", **options)
    _, after = coba_lif_integral(x[3:], between, inputs, recurrent, p, DT, backend="triton", **options)
    assert_same_bits(after, final)


@pytest.mark.slow
@pytest.mark.parametrize("record_states", [False, True])
def test_gradients_of_the_public_function(record_states: bool, device) -> None:
    """By input, weights and a parameter in float64, to 1e-8, in two blocks."""
    grads = []
    for backend in ("triton", "reference"):
        x, inputs, recurrent, p = network(device, torch.float64)
        v_thresh = torch.tensor(p.v_thresh, dtype=torch.float64)
        leaves = [leaf.clone().requires_grad_() for leaf in (x, inputs.weights, recurrent.weights, v_thresh)]
        x, by_input, by_recurrent, v_thresh = leaves
        synapses = inputs.with_weights(by_input), recurrent.with_weights(by_recurrent)
        options = {} if backend == "reference" else {"block_steps": 32}
        spikes, after = coba_lif_integral(
            x, None, *synapses, p._replace(v_thresh=v_thresh), DT, backend=backend, record_states=record_states, **options
        )
        loss = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        total = (spikes * loss.to(device)).sum() + after.v.square().sum() + after.g_e.sum() + after.history.sum()
        grads.append(torch.autograd.grad(total, leaves))
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.any()
        assert (ours - theirs).abs().max() <= 1e-8 * theirs.abs().max()
