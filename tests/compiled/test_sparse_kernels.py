"""The kernels of sparse networks as they are compiled for a GPU: the bits of a plain loop, and no finding.

Out-of-bounds accesses, races and deadlocks raise by themselves. Races are looked for under every schedule of ``SEEDS``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ptxsim
from coba_triton.backend import triton as triton_backend
from coba_triton.kernels import recurrent as recurrent_kernels
from coba_triton.kernels import sparse as sparse_kernels
from coba_triton.ops.call import Outputs
from helpers.barriers import without_barrier
from helpers.bits import assert_same_bits
from helpers.sparse_memory import sparse_zeros
from helpers.sparse_networks import SparseProblem, sparse_network_problem

F64 = torch.float64
SEEDS = (1, 2, 3)


@pytest.fixture(autouse=True)
def own_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test's changes to the options end with it. Tiles of one warp, so that small rows have several."""
    monkeypatch.setattr(triton_backend.sparse, "SPARSE_TILE", 32)
    with ptxsim.install(**vars(ptxsim.current_options())):
        yield


def together(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    monkeypatch.setattr(triton_backend.sparse, "PROGRAMS_PER_ROW", programs)


def launched() -> dict[str, tuple[int, int, int]]:
    """The kernels that ran, and the grid of their last launch."""
    return {record.kernel: record.grid for record in ptxsim.LOG}


def problem(**options: Any) -> SparseProblem:
    return sparse_network_problem(triton_backend, **{"steps": 11, "neurons": 75, "fan_out": 6, "size": 0.03} | options)


def compare(case: SparseProblem, cuts: tuple[int, ...] = (4,), seeds: tuple[int, ...] = SEEDS, **options: Any) -> None:
    """Spikes, states of all steps and the final state under every schedule."""
    expected = case.expected()
    assert expected["spikes"].any()
    for seed in seeds:
        ptxsim.set_options(seed=seed)
        ours = case.run(cuts, **options)
        for name, value in expected.items():
            assert_same_bits([ours[name].to(value.dtype)], [value])


FORWARD: dict[str, dict[str, Any]] = {
    "arbitrary weights": {},
    "refractory, per neuron": {"refractory": True, "per_neuron": True},
    "narrow, by source": {"exact": True, "narrow": True, "per": "source"},
    "of the network, one step": {"per": "network", "delays": (1, 1), "jump_first": True},
    "float64, graded": {"dtype": F64, "graded": True},
    "many synapses of a source": {"neurons": 40, "fan_out": 50, "size": 0.01},
    "sparse input": {"inputs": 30, "size": 0.1},
}


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    together(monkeypatch, programs)
    case = problem(**FORWARD[name])
    assert (case.net.recurrent.grid.sums == torch.int32) == (name == "narrow, by source")
    compare(case)
    tiles = -(-case.net.neurons // 32)
    assert launched()["sparse_forward_kernel"] == (2, min(programs, tiles), 1)
    assert launched().keys() >= {"scatter_kernel", "compact_kernel"}
    assert ("sparse_projection_kernel" in launched()) == (name == "sparse input")


def test_programs_with_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tiles for two programs; blocks end within a window, and within a word."""
    together(monkeypatch, 2)
    compare(problem(neurons=150, steps=37, delays=(3, 5), batch=1), (31,), SEEDS[:1], spike_dtype=torch.uint8)


def test_programs_of_several_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend.sparse, "SPARSE_TILE", 128)
    together(monkeypatch, 2)
    compare(problem(neurons=200, steps=6, batch=1), seeds=SEEDS[:2])


def test_programs_under_every_interleaving_of_plain_accesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are also switched between ordinary loads and stores."""
    together(monkeypatch, 3)
    ptxsim.set_options(interleave=True)
    compare(problem(steps=5))


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float16], ids=str)
def test_inputs(dtype: torch.dtype) -> None:
    case = problem(inputs=30, size=0.1, steps=4, batch=1)
    case.x = (case.x * 1.7).to(dtype)
    compare(case, (), SEEDS[:1])


def test_inputs_that_are_not_finite() -> None:
    case = problem(inputs=30, size=0.1, steps=6)
    case.x = case.x * torch.linspace(-4000, 4000, 30)
    case.x[2, 0, 1], case.x[3, 1, 4] = torch.inf, torch.nan
    ours, theirs = case.run(), case.expected()
    assert theirs["states"].isnan().any() and not theirs["states"].isnan().all()
    for key in theirs:
        assert torch.equal(ours[key].isnan(), theirs[key].isnan())
        assert torch.equal(ours[key].nan_to_num(), theirs[key].nan_to_num())


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"inputs": 12, "size": 0.1, "batch": 2},
        {"refractory": True, "per_neuron": True, "per": "source", "graded": True, "jump_first": True},
        {"per": "network", "delays": (1, 1)},
    ],
    ids=["sparse input", "refractory, by source", "of the network"],
)
def test_gradients(options: dict[str, Any], programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything by everything in float64; two blocks, two samples."""
    together(monkeypatch, programs)
    case = problem(**{"dtype": F64, "steps": 7, "neurons": 40 if programs == 1 else 75} | options)
    loss = case.random_loss()
    expected = case.expected_gradients(loss, "super", 2)
    ptxsim.set_options(seed=programs)
    ours = case.gradients(loss, "super", 2, (4,))
    for name, grad in ours.items():
        wanted = expected[name][: len(grad)]
        grad = grad[: len(wanted)] if name != "state" else grad[:3]
        wanted = wanted[: len(grad)]
        assert wanted.any()
        assert (grad - wanted).abs().max() <= 1e-8 * wanted.abs().max(), name
    kernels = {"sparse_backward_kernel", "source_gradient_kernel", "synapse_gradient_kernel"}
    assert launched().keys() >= kernels
    assert launched()["sparse_backward_kernel"][1] == programs


def test_gradients_have_the_same_bits_under_all_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where each order of a sum would have bits of its own."""
    case = problem(inputs=5, size=0.1, steps=5)
    loss = case.random_loss()
    results = []
    for programs, seed in ((1, 1), (3, 1), (2, 2), (3, 3)):
        together(monkeypatch, programs)
        ptxsim.set_options(seed=seed)
        results.append(case.gradients(loss, "super", 1, (3,)))
    assert results[0]["recurrent"].any()
    for other in results[1:]:
        assert_same_bits(other.values(), results[0].values())


BARRIERS = {
    "after the delivery": (sparse_kernels, "the sums are complete before any thread takes them", 1),
    "before an arrival": (recurrent_kernels, "all threads are done before the arrival is announced", 3),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of two warps, whose threads race without it; with Triton 3.6 in few of the steps, so there are many."""
    module, comment, programs = BARRIERS[name]
    monkeypatch.setattr(triton_backend.sparse, "SPARSE_TILE", 64)
    together(monkeypatch, programs)
    case = problem(batch=1, neurons=150, steps=40)
    case.run()
    leave_out, found = without_barrier(Path(str(module.__file__)), comment)
    ptxsim.set_options(transform=leave_out)
    with pytest.raises(ptxsim.KernelFault, match="RACE"):
        for seed in SEEDS:
            ptxsim.set_options(seed=seed)
            case.run()
    assert sum(found) > 0


@pytest.mark.parametrize("order", ["release", "acquire"])
def test_a_meeting_that_orders_nothing_is_noticed(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that count arrivals without releasing or acquiring what was written before race."""
    together(monkeypatch, 3)
    ptxsim.set_options(transform=lambda ptx: ptx.replace(f".gpu.{order}", ".gpu.relaxed"))
    with pytest.raises(ptxsim.KernelFault, match="RACE"):
        problem(batch=1).run()


def test_more_programs_than_the_device_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cooperative launch fails at once where its programs could wait for each other for ever."""
    ptxsim.set_options(sm_count=1, resident=3)
    together(monkeypatch, 3)
    with pytest.raises(RuntimeError, match="run at once.*too many blocks.*backend='reference'"):
        problem().run()


def test_no_output_but_the_state() -> None:
    case = problem(steps=4)
    ring = triton_backend.sparse_ring(case.net, case.history)
    final = triton_backend.sparse_block(case.net, ring, 0, case.x, case.drive, case.state, Outputs())
    assert_same_bits([final], [case.expected()["final"]])


# The axis along which an argument has the rows of the batch.
ROWS = {
    "sparse_forward_kernel": {
        **{"drive_ptr": 2, "ring_ptr": 2, "final_ptr": 1, "lists_ptr": 0},
        **{"spikes_ptr": 1, "words_ptr": 1, "states_ptr": 2},
    },
    "sparse_backward_kernel": {
        **{"trajectory_ptr": 2, "words_ptr": 1, "grad_spikes_ptr": 1, "grad_states_ptr": 2},
        **{"lam_ptr": 1, "adjoints_ptr": 1, "grad_constants_ptr": 1},
    },
}


def test_offsets_above_2_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of 2^21 rows has the bits of that row alone, forward and back; drives and adjoints have 2^31 elements."""
    rows, launch, compared = 2**21, triton_backend.launch.run, []

    def launch_both(kernel: Any, grid: tuple[int, ...], device: Any, num_warps: int, *args: Any, **meta: Any) -> None:
        axes = ROWS.get(kernel.__name__)
        large: list[Any] = []
        for name, value in zip(kernel.arg_names, args, strict=False):
            if axes is None or not isinstance(value, torch.Tensor) or name not in axes:
                large.append(rows if name == "B" else value * rows if name == "states_stride" else value)
                continue
            shape = list(value.shape)
            shape[axes[name]] *= rows
            many = sparse_zeros(torch.Size(shape).numel(), value.dtype).view(shape)
            many.narrow(axes[name], shape[axes[name]] - value.shape[axes[name]], value.shape[axes[name]]).copy_(value)
            large.append(many)
        launch(kernel, grid, device, num_warps, *args, **meta)
        if axes is None:
            return
        with ptxsim.install(arch=ptxsim.current_options().arch, race=False, first_block=(rows - 1, 0, 0), blocks=(1, 1, 1)):
            launch(kernel, (rows, 1), device, num_warps, *large, **meta)
        for name, alone, many in zip(kernel.arg_names, args, large, strict=False):
            if name in axes:
                last = many.narrow(axes[name], many.shape[axes[name]] - alone.shape[axes[name]], alone.shape[axes[name]])
                assert torch.equal(last.nan_to_num(), alone.nan_to_num()), (kernel.__name__, name)
                if many.numel() > 2**31:
                    compared.append(name)

    case = problem(steps=33, neurons=32, batch=1, delays=(1, 1))
    together(monkeypatch, 1)
    monkeypatch.setattr(triton_backend.launch, "run", launch_both)
    case.gradients(case.random_loss(), "super", 1, ())
    assert {"drive_ptr", "states_ptr", "trajectory_ptr", "adjoints_ptr"} <= set(compared)
