"""Triton's kernels for chunks of time: the bits of a run in order, whatever the chunks start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coba_triton import CobaLIFFeedForwardRefractoryState, CobaLIFFeedForwardState, CobaLIFParameters
from coba_triton import coba_lif_feed_forward_integral as integral
from coba_triton.ops.constants import memory_in_steps
from helpers.devices import to_device
from helpers.few_neurons import DT, MEMORY, P, assert_same, bits, irregular
from helpers.marks import slow

pytest.importorskip("triton", reason="the kernels are Triton's")
from coba_triton.backend.triton import feed_forward as backend
from coba_triton.kernels import time_chunks


def compare(
    x: Tensor, chunks: int, device: torch.device, p: CobaLIFParameters = P, state: Any = None, **options: Any
) -> Any:
    x, state, p = to_device((x, state, p), device)
    ours, theirs = (
        integral(x, state, p, DT, backend=name, time_chunks=count, **options)
        for name, count in (("triton", chunks), ("reference", 1))
    )
    assert_same(ours, theirs)
    return theirs


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched."""
    names: list[str] = []
    real = backend.launch.run

    def launch(kernel: Any, *args: Any, **meta: Any) -> None:
        names.append(kernel.__name__)
        real(kernel, *args, **meta)

    monkeypatch.setattr(backend.launch, "run", launch)
    return names


CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "irregular": (520, 3, 4, {}),
    "packed, ragged": (333, 37, 3, {"spike_dtype": "bits"}),
    "uint8, jump first": (200, 32, 3, {"spike_dtype": torch.uint8, "order": "jump_first"}),
    "recorded": (263, 33, 2, {"record_states": True}),
    "packed and recorded, many chunks": (640, 2, 99, {"spike_dtype": "bits", "record_states": True}),
    "shorter than a chunk": (50, 3, 2, {}),
    "one step more than a chunk": (65, 3, 2, {"spike_dtype": "bits"}),
}


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str, device: torch.device, launches: list[str]) -> None:
    steps, neurons, chunks, options = CASES[name]
    compare(irregular(steps, neurons), chunks, device, **options)
    assert launches == ["speculate_kernel", "repair_kernel", "repair_kernel", "settle_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("refractory", [0, *slow(2.0)])
def test_parameters_of_each_neuron(dtype: torch.dtype, refractory: float, device: torch.device) -> None:
    neurons = 5
    p = P._replace(v_thresh=torch.linspace(-52, -48, neurons), tau_syn_exc_inv=torch.linspace(0.1, 0.5, neurons))
    p = p._replace(refractory=refractory)
    start = [torch.linspace(-70, -51, neurons), torch.linspace(0, 0.05, neurons), torch.linspace(0.05, 0, neurons)]
    state: Any = CobaLIFFeedForwardState(*start)
    if refractory:
        state = CobaLIFFeedForwardRefractoryState(*start, torch.arange(neurons).float())
    spikes, _ = compare(irregular(300, neurons, dtype=dtype), 4, device, p, state, record_states=True)
    assert spikes.any()


BACK = ["speculate_back_kernel", "repair_back_kernel", "repair_back_kernel", "settle_back_kernel"]


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.float64)], ids=str)
def test_training(dtype: torch.dtype, learn: bool, device: torch.device, launches: list[str]) -> None:
    """The checkpoints are the notes; of a last, shorter run of steps there is one before each.

    The sums over time in the gradient by a parameter have one order, for which the sweep back is in order.
    """
    results = []
    for chunks in (3, 1):
        x = irregular(205, 3, dtype=dtype).to(device).requires_grad_()
        thresholds = torch.tensor([-50.0, -51.0, -52.0], device=device, requires_grad=learn)
        p = P._replace(v_thresh=thresholds, method="triangle", alpha=0.1)
        z, state = integral(x, None, p, DT, backend="triton", time_chunks=chunks)
        ((z * torch.linspace(1, 2, len(x), device=device)[:, None]).sum() + state.v.sum()).backward()
        results.append([z, *state, x.grad, *([thresholds.grad] if learn else [])])
    for ours, theirs in zip(*results, strict=True):
        assert ours.abs().max() > 0
        assert torch.equal(bits(ours.detach()), bits(theirs.detach()))
    assert launches[4:] == [*(["backward_kernel"] if learn else BACK), "forward_kernel", "backward_kernel"]


GRADIENTS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "ragged": (330, 33, 3, {}),
    "many chunks": (448, 2, 7, {"method": "super", "alpha": 100.0}),
    "recorded, jump first": (270, 4, 4, {"record_states": True, "order": "jump_first"}),
    "float64": (205, 3, 3, {"dtype": torch.float64}),
    "parameters of each neuron": (205, 3, 3, {"v_thresh": torch.tensor([-50.0, -51.0, -52.0]), "refractory": 2.0}),
    "of the end alone": (448, 2, 7, {"end": True}),
    "of bool spikes": (205, 3, 3, {"spike_dtype": torch.bool}),
    "shorter than a chunk": (50, 3, 2, {}),
    "one step more than a chunk": (65, 3, 2, {}),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str, device: torch.device, launches: list[str]) -> None:
    steps, neurons, chunks, options = GRADIENTS[name]
    options = {"method": "triangle", "alpha": 0.1, "dtype": torch.float32, "end": False} | options
    x = irregular(steps, neurons, dtype=options.pop("dtype"))
    end = options.pop("end")
    p = to_device(P._replace(**{field: options.pop(field) for field in P._fields if field in options}), device)
    results = []
    for backend_name, count in (("triton", chunks), ("reference", 1)):
        leaf = x.to(device).clone().requires_grad_()
        before = [torch.full((neurons,), v, dtype=x.dtype, device=device, requires_grad=True) for v in (-60.0, 0.01, 0.01)]
        z, state = integral(
            leaf, CobaLIFFeedForwardState(*before), p, DT, backend=backend_name, time_chunks=count, **options
        )
        weights = torch.linspace(1, 2, steps, dtype=x.dtype, device=device)[:, None]
        loss = sum((k + 1) * field.sum() for k, field in enumerate(state[:3]))
        if z.requires_grad and not end:
            loss = loss + (z * weights).sum()
        grads = torch.autograd.grad(loss, [leaf, *before])
        results.append([grad.cpu() for grad in grads])
    assert results[0][0].abs().max() > 0
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(bits(ours), bits(theirs)), f"{(ours != theirs).sum()} of {ours.numel()} differ"
    assert launches[-4:] == BACK


def test_a_held_neuron_is_not_taken_for_one_at_rest(device: torch.device) -> None:
    """Its potential is that of the guess, but its conductances and the steps for which it is held are not."""
    spikes, _ = compare(4 * irregular(300, 6), 4, device, P._replace(refractory=30.0), record_states=True)
    assert 0.005 < spikes.mean() < 1 / 60


def test_a_pulse_and_then_silence(device: torch.device) -> None:
    """Silent chunks from rest end in rest, as their guess: only in order, one by one, it shows that all are wrong."""
    x = torch.zeros(448, 2)
    x[:5] = 0.005
    _, states = compare(x, 7, device, record_states=True)
    assert (states.v[-1] > -65).all()


def test_regular_firing(device: torch.device) -> None:
    """Neurons that keep their phase meet nowhere: every chunk is settled in order."""
    compare(torch.full((400, 3), 0.0012), 6, device, spike_dtype="bits")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_infinity(device: torch.device) -> None:
    x = irregular(400, 4)
    x[130, 1], x[150, 2], x[160, 3] = float("nan"), float("inf"), -float("inf")
    compare(x, 6, device, record_states=True)


@pytest.mark.parametrize("value", [float("nan"), *slow(-1e30)])
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_any_guess_gives_these_bits(value: float, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = backend.launch.run

    def launch(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        real(kernel, grid, *args, **meta)
        if kernel is time_chunks.speculate_kernel:
            ends, notes = args[5], args[7]  # what other guesses would have left: but for the first chunk, anything
            ends[1:], notes[-(-64 // meta["MARK"]) :] = value, value

    x = irregular(300, 3)
    monkeypatch.setattr(backend.launch, "run", launch)
    compare(x, 4, device)


class TestRule:
    def chunks(self, steps: int, neurons: int, p: CobaLIFParameters = P) -> int:
        return backend.choose_time_chunks(steps, neurons, memory_in_steps(p, DT))

    def test_memory(self) -> None:
        assert memory_in_steps(P, DT) == pytest.approx(MEMORY)
        assert memory_in_steps(P._replace(tau_syn_inh_inv=0.01), DT) == pytest.approx(200)
        assert memory_in_steps(P._replace(g_l=0), DT) == float("inf")
        assert memory_in_steps(P._replace(g_l=torch.tensor(0.1)), DT) is None

    def test_few_neurons_and_many_steps(self) -> None:
        assert self.chunks(1_000_000, 100) == 650
        assert self.chunks(100_000, 100) == 100  # of 25 of the largest time constants
        assert self.chunks(1_000_000, 5000) == 13

    @pytest.mark.parametrize(("steps", "neurons"), [(3999, 100), (1_000_000, 7000)])
    def test_not_worth_it(self, steps: int, neurons: int) -> None:
        assert self.chunks(steps, neurons) == 1

    def test_unknown_or_endless_memories(self) -> None:
        assert self.chunks(1_000_000, 1, P._replace(g_l=0)) == 1
        assert self.chunks(1_000_000, 1, P._replace(g_l=torch.tensor(0.1))) == 1

    def test_calls_follow_it(self, device: torch.device, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "LEAST_CHUNK_STEPS", 64)
        p = P._replace(tau_syn_exc_inv=1.0, tau_syn_inh_inv=1.0, g_l=0.2)
        x = irregular(300, 2).to(device)
        integral(x, None, p, DT, backend="triton")
        assert launches[0] == "speculate_kernel"
        launches.clear()
        integral(x, None, p, DT, backend="triton", time_chunks=1)
        integral(x, None, p._replace(g_l=torch.tensor(0.2)), DT, backend="triton")
        integral(x, None, p, DT, backend="triton", block_steps=128)
        assert set(launches) == {"forward_kernel"}
