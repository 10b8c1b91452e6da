"""Runs of few neurons in chunks of time, on the CPU: the bits of a run in order, whatever the chunks start from."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coba_triton import (
    CobaLIF,
    CobaLIFFeedForwardRefractoryState,
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    PoissonSource,
    coba_lif_feed_forward_integral,
    simulate,
)
from coba_triton.backend.cpu import launch, time_chunks
from coba_triton.ops.constants import constants_table
from helpers.few_neurons import DT, MEMORY, P, assert_same, bits, irregular


def run(x: Tensor, chunks: int | None, p: CobaLIFParameters = P, state: Any = None, **options: Any) -> Any:
    return coba_lif_feed_forward_integral(x, state, p, DT, backend="cpu", time_chunks=chunks, **options)


def compare(x: Tensor, chunks: int, p: CobaLIFParameters = P, state: Any = None, **options: Any) -> None:
    assert_same(run(x, chunks, p, state, **options), run(x, 1, p, state, **options))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every launch: how many chunks went on, and for how many units together."""
    seen: list[tuple[int, int]] = []
    real = time_chunks.run

    def note(kernel: Any, *args: Any, shares: Any, **options: Any) -> None:
        at = next(arg for arg in args if isinstance(arg, np.ndarray) and arg.dtype == np.int64 and arg.ndim == 1)
        before = at.copy()
        real(kernel, *args, shares=shares, **options)
        seen.append((shares[-1][-1], int((at - before).sum())))

    monkeypatch.setattr(time_chunks, "run", note)
    return seen


KINDS = ("float32", "float16", "bfloat16", "float64", "bool", "uint8", "bits")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("neurons", [1, 3])
def test_spike_formats(kind: str, neurons: int) -> None:
    compare(irregular(3001, neurons), 5, spike_dtype=kind if kind == "bits" else getattr(torch, kind))


@pytest.mark.parametrize("kind", [*KINDS[:-1], "int64"])
@pytest.mark.parametrize("neurons", [1, 17])
def test_input_dtypes(kind: str, neurons: int) -> None:
    x = irregular(2500, neurons)
    x = x.to(getattr(torch, kind)) if kind.startswith(("float", "bfloat")) else (x > 0.011).to(getattr(torch, kind))
    p = P if x.is_floating_point() else P._replace(c_m_inv=0.02, g_l=2.0)
    compare(x, 4, p, record_states=True)


@pytest.mark.parametrize("layout", ["transposed", "every second", "one of many", "expanded", "shared by neurons"])
@pytest.mark.parametrize("neurons", [1, 5])
def test_strides(layout: str, neurons: int) -> None:
    x = irregular(2000, 2 * neurons)
    x = {
        "transposed": lambda: irregular(neurons, 2000, 1).t(),
        "every second": lambda: x[:, ::2],
        "one of many": lambda: x[:, neurons:],
        "expanded": lambda: torch.full((1, neurons), 0.002).expand(2000, neurons),
        "shared by neurons": lambda: x[:, :1].expand(2000, neurons),
    }[layout]()
    compare(x, 6)


@pytest.mark.parametrize("steps", [1, 31, 32, 63, 64, 65, 128, 129, 1000, 4097])
@pytest.mark.parametrize("neurons", [1, 16, 70])
def test_lengths(steps: int, neurons: int) -> None:
    for chunks in (2, 3, 1000):
        compare(irregular(steps, neurons), chunks, spike_dtype="bits")
        compare(irregular(steps, neurons), chunks, record_states=True)


@pytest.mark.parametrize("order", ["decay_first", "jump_first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("refractory", [0, 2.0, "own"])
@pytest.mark.parametrize("currents", [False, True])
def test_neurons(order: str, dtype: torch.dtype, refractory: Any, currents: bool) -> None:
    neurons = 6
    x = irregular(3000, neurons, dtype=dtype)
    p = P._replace(v_thresh=torch.linspace(-52, -48, neurons), tau_syn_exc_inv=torch.linspace(0.1, 0.5, neurons))
    p = p._replace(refractory=torch.linspace(0, 5, neurons) if refractory == "own" else refractory)
    if currents:
        x, p = 50 * x, p._replace(conductance_based=0, e_rev_E=1.0, e_rev_I=-1.0)
    start = [torch.linspace(-70, -51, neurons), torch.linspace(0, 0.05, neurons), torch.linspace(0.05, 0, neurons)]
    state: Any = CobaLIFFeedForwardState(*start)
    if refractory:
        state = CobaLIFFeedForwardRefractoryState(*start, torch.arange(neurons).float())
    for record in (False, True):
        compare(x, 7, p, state, order=order, record_states=record)
    ours, theirs = (
        coba_lif_feed_forward_integral(x[:600], state, p, DT, order=order, backend=backend, time_chunks=4)
        for backend in ("cpu", "reference")
    )
    assert ours[0].any()
    assert_same(ours, theirs)


def gradients(x: Tensor, chunks: int | None, loss: Any, p: CobaLIFParameters = P, state: Any = None, **options: Any) -> Any:
    """The gradients of a ``loss`` of what a call returns, by the input, the initial state and every number of ``p``."""
    x = x.detach().requires_grad_(x.is_floating_point())
    learned = [value for value in p if isinstance(value, Tensor) and value.requires_grad]
    state = state or CobaLIFFeedForwardState(*(torch.full((x.shape[1],), v) for v in (-60.0, 0.01, 0.02)))
    fields = [field.detach().requires_grad_() for field in state[:3]]
    out = run(x, chunks, p, type(state)(*fields, *state[3:]), **options)
    wanted = [*fields, *learned, *([x] if x.requires_grad else [])]
    return [out[0].detach(), *torch.autograd.grad(loss(*out), wanted)]


def compare_gradients(x: Tensor, chunks: int, loss: Any, *args: Any, **options: Any) -> list[Tensor]:
    """The gradients in order, after a look at the bits of those in chunks."""
    ours, theirs = (gradients(x, count, loss, *args, **options) for count in (chunks, 1))
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(bits(a), bits(b)), f"{number}: {int((bits(a) != bits(b)).sum())} of {a.numel()} differ"
    return theirs


def weighted(z: Tensor, states: Any) -> Tensor:
    """A loss of all spikes and, of the states that are there, recorded or the last one."""
    worth = torch.linspace(1, 2, z.numel(), dtype=torch.float64).to(z.dtype).view_as(z)
    return (z * worth).sum() + (states.v * states.g_e).sum() + states.g_i.square().sum()


SMOOTH = P._replace(method="triangle", alpha=0.1)


def learned(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


class TestBack:
    """The way back in chunks: the bits of the way back in order."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("every", [1, 16, 32, 64])
    @pytest.mark.parametrize("steps", [640, 1003])
    def test_checkpoints(self, dtype: torch.dtype, every: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("coba_triton.ops.operators.checkpoint_interval", lambda *_: every)
        p = SMOOTH._replace(v_thresh=learned(-50, -51, -52, dtype=dtype), refractory=1.0)
        state = CobaLIFFeedForwardRefractoryState(*(torch.full((3,), v, dtype=dtype) for v in (-60.0, 0.01, 0.02, 2.0)))
        for record in (True, False):
            z, *_, by_threshold, _ = compare_gradients(
                irregular(steps, 3, dtype=dtype), 5, weighted, p, state, record_states=record
            )
            assert z.any() and by_threshold.abs().max() > 0

    @pytest.mark.parametrize("steps", [1, 31, 32, 33, 63, 64, 65, 128, 129, 1000, 4097])
    @pytest.mark.parametrize("neurons", [1, 16, 70])
    def test_lengths(self, steps: int, neurons: int) -> None:
        p = SMOOTH._replace(c_m_inv=learned(*[5.0] * neurons))
        for chunks in (2, 3, 1000):
            compare_gradients(irregular(steps, neurons), chunks, weighted, SMOOTH)
            compare_gradients(irregular(steps, neurons), chunks, weighted, p, record_states=True)

    @pytest.mark.parametrize("order", ["decay_first", "jump_first"])
    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize("neurons", [1, 5, 20])
    def test_every_constant(self, order: str, own: bool, neurons: int) -> None:
        """Parameters that all neurons share have one sum over the neurons as well."""
        count = neurons if own else 1
        p = SMOOTH._replace(
            **{name: learned(*[getattr(P, name)] * count) for name in P._fields[:9]}, refractory=1.0 if own else 0
        )
        state = None
        if own:
            state = CobaLIFFeedForwardRefractoryState(*(torch.full((neurons,), v) for v in (-60.0, 0.01, 0.02, 2.0)))
        grads = compare_gradients(irregular(2000, neurons), 7, weighted, p, state, order=order)
        assert all(grad.abs().max() > 0 for grad in grads[4:])  # by v: a neuron that is held at first has none

    @pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("neurons", [1, 3, 70])
    def test_dtypes_of_the_input(self, kind: str, neurons: int) -> None:
        x = irregular(1500, neurons).to(getattr(torch, kind))
        compare_gradients(x, 4, lambda z, _: (z * x).sum(), SMOOTH)

    @pytest.mark.parametrize("neurons", [1, 5])
    def test_strides(self, neurons: int) -> None:
        """Of the input, and of the incoming gradient: that of a sum is one number for all."""
        for x in (irregular(neurons, 2000, 1).t(), irregular(2000, 2 * neurons)[:, ::2]):
            compare_gradients(x, 6, lambda z, _: z.sum(), SMOOTH)
            compare_gradients(x, 6, lambda z, _: z.t().contiguous().square().sum(), SMOOTH)

    def test_a_loss_of_the_end_alone(self) -> None:
        """No chunk but the last has a gradient of its own, so the guess is right only where the true one has come to 0."""
        x = irregular(6000, 2)
        grads = compare_gradients(x, 12, lambda _, state: state.v.sum(), SMOOTH._replace(v_rest=learned(-65, -65)))
        assert grads[-1][-200:].abs().max() > 0

    def test_nan_and_infinity(self) -> None:
        for value in (float("nan"), float("inf")):
            x = irregular(3000, 3)
            x[1500, 1] = value
            compare_gradients(x, 8, weighted, SMOOTH._replace(g_l=learned(0.01, 0.01, 0.01)))

    def test_one_repair(self, passes: list[tuple[int, int]]) -> None:
        x = irregular(20 * 25 * MEMORY, 4)
        gradients(x, 20, weighted, SMOOTH)
        assert [count for count, _ in passes] == [20, 19, 20, 19]
        assert passes[3][1] < passes[2][1] / 2

    def test_any_guess_gives_these_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, p = irregular(6000, 4), SMOOTH._replace(v_thresh=learned(-50, -51, -52, -50))
        want = gradients(x, 1, weighted, p)
        for guess in (float("nan"), 1e30, 1.0):
            monkeypatch.setattr(time_chunks, "GUESS_OF_GRADIENT", guess)
            for a, b in zip(gradients(x, 10, weighted, p), want, strict=True):
                assert torch.equal(bits(a), bits(b))

    def test_number_of_threads_changes_no_bit(self, threads) -> None:
        x, p = irregular(9000, 5), SMOOTH._replace(tau_syn_exc_inv=learned(*[0.2] * 5))
        for count in (1, 2, 3, 7):
            threads(count)
            for chunks in (2, 50):
                compare_gradients(x, chunks, weighted, p)

    def test_many_sizes(self) -> None:
        generator = np.random.default_rng(6)
        for _ in range(40):
            steps, neurons = int(generator.integers(1, 3000)), int(generator.integers(1, 40))
            x = irregular(steps, neurons, int(generator.integers(100))) * float(generator.choice([0.2, 1.0, 4.0]))
            p = SMOOTH._replace(e_rev_E=learned(*[0.0] * neurons)) if generator.integers(2) else SMOOTH
            order, record = str(generator.choice(["decay_first", "jump_first"])), bool(generator.integers(2))
            compare_gradients(x, int(generator.integers(2, 60)), weighted, p, order=order, record_states=record)

    def test_the_rule(self, passes: list[tuple[int, int]]) -> None:
        p = SMOOTH._replace(v_rest=learned(*[-65.0] * 64))
        for steps in (20_000, 2000):
            x = irregular(steps, 64).requires_grad_()
            z, _ = coba_lif_feed_forward_integral(x, None, p, DT, backend="cpu")
            assert bool(passes) == (steps == 20_000)
            passes.clear()
            z.sum().backward()
            assert bool(passes) == (steps == 20_000)
            passes.clear()


def test_one_repair_and_nothing_to_settle(passes: list[tuple[int, int]]) -> None:
    """With irregular firing every chunk meets the notes of the one that it goes on in, well before its end."""
    x = irregular(20 * 25 * MEMORY, 4)
    compare(x, 20)
    assert run(x, 1)[0].mean(0).min() > 0.002
    assert [count for count, _ in passes] == [20, 19]
    assert passes[1][1] < passes[0][1] / 2


@pytest.mark.parametrize("neurons", [1, 8])
def test_regular_firing_settles_in_order(neurons: int, passes: list[tuple[int, int]]) -> None:
    """Neurons that keep their phase meet late or never: one attempt, then the rest in order."""
    compare(torch.full((40 * 25 * MEMORY, neurons), 0.0005), 40)
    first, second, *rest = (count for count, _ in passes)
    assert (first, second) == (40, 39) and rest and set(rest) == {1}


def test_silence_meets_at_once(passes: list[tuple[int, int]]) -> None:
    compare(torch.zeros(5000, 2), 9)
    assert passes == [(9, -(-5000 // time_chunks.STEPS))]


def test_a_pulse_and_then_silence() -> None:
    """Silent chunks from rest end in rest, as their guess: only in order, one by one, it shows that all are wrong."""
    x = torch.zeros(448, 2)
    x[:5] = 0.005
    compare(x, 7, record_states=True)
    assert (run(x, 7)[1].v > -65).all()


def test_some_neurons_keep_their_phase_for_a_while(passes: list[tuple[int, int]]) -> None:
    x = irregular(30_000, 2)
    x[8_000:16_000] = 0.0005
    compare(x, 30)
    assert len(passes) > 3


def test_a_held_neuron_is_not_taken_for_one_at_rest() -> None:
    """Its potential is that of the guess, but its conductances and the steps for which it is held are not."""
    x, p = 4 * irregular(3000, 6), P._replace(refractory=30.0)
    compare(x, 9, p, record_states=True)
    assert 0.005 < run(x, 1, p)[0].mean() < 1 / 60


def test_nan_and_infinity() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        x = irregular(4000, 3)
        x[1500, 1] = value
        compare(x, 8, record_states=True)
        compare(x, 8, spike_dtype="bits")


def test_any_guess_gives_these_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is worse than any state: the result follows from what was compared."""
    x = irregular(12_000, 4)
    want = run(x, 1, record_states=True)
    for guess in (float("nan"), 1e30, 0.0):
        monkeypatch.setattr(time_chunks.np, "repeat", lambda a, n, _, guess=guess: _guessed(a, n, guess))
        assert_same(run(x, 10, record_states=True), want)


def _guessed(state: Any, count: int, guess: float) -> Any:
    every = np.concatenate([state] * count)
    every[1:] = guess
    return every


def test_number_of_threads_changes_no_bit(threads) -> None:
    x = irregular(9000, 5)
    want = run(x, 1)
    for count in (1, 2, 3, 7):
        threads(count)
        for chunks in (2, 3, 50):
            assert_same(run(x, chunks), want)


def test_many_sizes() -> None:
    """Sizes, chunks and formats as they fall."""
    generator = np.random.default_rng(5)
    for _ in range(60):
        steps, neurons = int(generator.integers(1, 3000)), int(generator.integers(1, 40))
        chunks, block = int(generator.integers(2, 60)), 32 * int(generator.integers(1, 90))
        options: dict[str, Any] = {
            "spike_dtype": generator.choice([None, "bits", torch.uint8, torch.float16]),
            "order": str(generator.choice(["decay_first", "jump_first"])),
            "record_states": bool(generator.integers(2)),
        }
        x = irregular(steps, neurons, int(generator.integers(100))) * float(generator.choice([0.2, 1.0, 4.0]))
        p = P._replace(refractory=float(generator.choice([0, 1.5])))
        assert_same(run(x, chunks, p, block_steps=block, **options), run(x, 1, p, **options))


class TestRule:
    """When runs are cut that nobody asked to cut."""

    def chunks(self, steps: int, neurons: int, p: CobaLIFParameters = P, threads: int = 2) -> int:
        table = constants_table(p, DT, torch.float32, torch.device("cpu"), torch.Size([neurons]))
        if not time_chunks.may_pay(steps, neurons):
            return 1
        return time_chunks.choose_chunks(
            steps, neurons, time_chunks.memory_of(*launch.shared.constants_arrays(table)), threads
        )

    def test_memory(self) -> None:
        table = constants_table(P, DT, torch.float32, torch.device("cpu"), torch.Size([]))
        assert time_chunks.memory_of(*launch.shared.constants_arrays(table)) == pytest.approx(MEMORY)
        slow = P._replace(tau_syn_inh_inv=torch.tensor([0.1, 0.01]))
        table = constants_table(slow, DT, torch.float32, torch.device("cpu"), torch.Size([2]))
        assert time_chunks.memory_of(*launch.shared.constants_arrays(table)) == pytest.approx(200)

    def test_few_neurons_and_many_steps(self) -> None:
        assert self.chunks(1_000_000, 1) == 256
        assert self.chunks(1_000_000, 8) == 32
        assert self.chunks(1_000_000, 64) == 4
        assert self.chunks(1_000_000, 1, threads=1) == 128
        assert self.chunks(50_000, 1) == 48  # no chunk is shorter than 1024 steps

    def test_long_memories_take_longer_runs(self) -> None:
        slow = P._replace(tau_syn_inh_inv=1 / 1000)
        assert self.chunks(1_000_000, 1, slow) == 20
        assert self.chunks(100_000, 1, slow) == 1

    @pytest.mark.parametrize(("steps", "neurons"), [(1000, 1), (2048, 1), (10_000_000, 65), (0, 1)])
    def test_not_worth_it(self, steps: int, neurons: int) -> None:
        assert self.chunks(steps, neurons) == 1

    @pytest.mark.parametrize("rate", [0.0, -0.1, float("nan")])
    def test_what_does_not_decay_is_never_forgotten(self, rate: float) -> None:
        assert self.chunks(1_000_000, 2, P._replace(tau_syn_exc_inv=torch.tensor([0.2, rate]))) == 1

    def test_calls_and_modules_follow_it(self, passes: list[tuple[int, int]]) -> None:
        x = irregular(30_000, 2)
        assert_same(run(x, None), run(x, 1))
        assert len(passes) >= 2
        passes.clear()
        kept = [CobaLIF(P, DT, backend="cpu", time_chunks=chunks)(x) for chunks in (None, 9, 1)]
        assert passes[0][0] > passes[2][0] == 9
        assert_same(kept[0], kept[2])
        assert_same(kept[1], kept[2])

    def test_long_runs_follow_it(self, passes: list[tuple[int, int]], tmp_path) -> None:
        """Blocks of a simulation, with a checksum of the input in a store; as many steps as no block divides."""

        def spikes(block_steps: int) -> Any:
            source = PoissonSource(20.0, 40_100, 3, dt=DT, seed=1, weight=0.05)
            result = simulate(
                CobaLIF(P, DT, backend="cpu"), source, block_steps=block_steps, sink=tmp_path / f"{block_steps}.zarr"
            )
            return torch.as_tensor(np.asarray(result.spikes[:]))

        want = spikes(block_steps=1024)
        assert not passes and want.any()
        assert torch.equal(spikes(block_steps=20_000), want)
        assert passes


def test_streams_sum_up_their_input(passes: list[tuple[int, int]]) -> None:
    x = irregular(30_000, 3)
    table = constants_table(P, DT, torch.float32, x.device, torch.Size([3]))
    state = torch.stack([torch.full((3,), -65.0), torch.zeros(3), torch.zeros(3)])
    words = torch.empty(-(-len(x) // 32), 3, dtype=torch.int32)
    sums = launch.lanes(3)
    with closing(launch.ForwardStream(table, False, state, len(x))) as stream:
        after, jobs = stream.submit(x, words, sums)
        for job in jobs:
            job.result()
    assert passes
    assert np.array_equal(sums, launch.row_sums(x))
    z, final = run(x, 1, spike_dtype="bits")
    assert torch.equal(words, z) and torch.equal(bits(after), bits(torch.stack(list(final))))
