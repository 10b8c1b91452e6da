"""Populations with sparse synapses and delays: the reference, the CPU path, gradients, and what PyTorch does with them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coba_triton import (
    CobaLIFCell,
    CobaLIFDelayState,
    CobaLIFParameters,
    CobaLIFRecurrent,
    CobaLIFState,
    Synapses,
    coba_lif_feed_forward_integral,
    coba_lif_integral,
    coba_lif_step,
    simulate,
    unpack_spikes,
)
from coba_triton.ops.grid import grid_of, make_grid
from helpers.bits import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")  # PyTorch says so of its CSR layout
DT = 0.1
P = CobaLIFParameters(
    tau_syn_exc_inv=0.2,
    tau_syn_inh_inv=0.1,
    c_m_inv=5.0,
    g_l=0.01,
    e_rev_E=0.0,
    e_rev_I=-80.0,
    v_rest=-60.0,
    v_reset=-60.0,
    v_thresh=-50.0,
    refractory=1.0,
)


def draw(sources: int, neurons: int, count: int, delays: Any = None, seed: int = 0, scale: float = 0.01) -> Synapses:
    """Random synapses, several of some pairs, with any float32 weights."""
    g = torch.Generator().manual_seed(seed)
    source = torch.randint(max(sources, 1), (count if sources else 0,), generator=g)
    target = torch.randint(neurons, (len(source),), generator=g)
    weights = scale * torch.randn(len(source), generator=g)
    if delays == "mixed":
        delays = 0.1 * torch.randint(1, 23, (len(source),), generator=g)
    return Synapses.from_coo(target, source, weights, delays, shape=(neurons, sources))


def noise(steps: int, batch: int, inputs: int, seed: int = 1) -> Tensor:
    return (torch.rand(steps, batch, inputs, generator=torch.Generator().manual_seed(seed)) < 0.2).float()


def assert_same(found: tuple[Tensor, Any], wanted: tuple[Tensor, Any]) -> None:
    assert type(found[1]) is type(wanted[1])
    assert_same_bits(found[0], wanted[0])
    for a, b in zip(found[1], wanted[1], strict=True):
        assert_same_bits(a, b)


class TestEquations:
    """Against steps written down by hand."""

    def test_a_spike_arrives_after_its_delay(self) -> None:
        """A neuron above threshold spikes in step 0; its two synapses open conductances 3 and 7 steps later."""
        synapses = Synapses.from_coo([1, 2], [0, 0], [0.5, -0.25], [0.3, 0.7], shape=(3, 3))
        state = CobaLIFState(z=0.0, v=torch.tensor([[0.0, -60.0, -60.0]]), g_e=0.0, g_i=0.0)
        p = P._replace(tau_syn_exc_inv=0.0, tau_syn_inh_inv=0.0, refractory=100.0)
        _, states = coba_lif_integral(torch.zeros(10, 1, 0), state, torch.zeros(3, 0), synapses, p, DT, record_states=True)
        assert states.g_e[:, 0, 1].tolist() == [0.0] * 3 + [0.5] * 7
        assert states.g_i[:, 0, 2].tolist() == [0.0] * 7 + [0.25] * 3
        assert states.g_e[:, 0, 2].eq(0).all() and states.g_i[:, 0, 1].eq(0).all()

    def test_without_delays_a_spike_takes_one_step_as_in_a_matrix(self) -> None:
        matrix = torch.zeros(4, 4).uniform_(-1, 1, generator=torch.Generator().manual_seed(0)).mul(2**7).round() / 2**14
        inputs = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)).mul(2**7).round() / 2**10
        x = noise(60, 2, 3)
        for backend in ("reference", "cpu"):
            dense = coba_lif_integral(x, None, inputs, matrix, P, DT, backend=backend)
            assert dense[0].sum() > 5
            for synapses in (
                Synapses.from_torch(matrix),
                matrix.to_sparse(),
                matrix.to_sparse_csr(),
                matrix.to_sparse_csc(),
            ):
                assert_same(coba_lif_integral(x, None, inputs, synapses, P, DT, backend=backend), dense)
            assert_same(coba_lif_integral(x, None, inputs.to_sparse(), matrix, P, DT, backend=backend), dense)
            assert_same(coba_lif_integral(x, None, inputs, matrix, P, DT, backend=backend, delay=DT), dense)

    def test_dense_weights_with_a_delay(self) -> None:
        matrix = 0.01 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
        x, inputs = noise(50, 2, 4), draw(4, 5, 20, scale=0.05)
        by_source = torch.tensor([0.1, 0.2, 0.5, 1.0, 0.3])
        for delay in (0.4, by_source):
            found = coba_lif_integral(x, None, inputs, matrix, P, DT, delay=delay)
            each = torch.as_tensor(delay).expand(5)
            places = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
            synapses = Synapses.from_coo(*places, matrix.flatten(), each[places[1]], shape=(5, 5))
            assert_same(found, coba_lif_integral(x, None, inputs, synapses, P, DT))
            assert found[0].sum() > 0

    @pytest.mark.parametrize("own", [True, False])
    @pytest.mark.parametrize("where", ["recurrent", "inputs", "input value", "input value, no synapses"])
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_reaches_all_neurons(self, value, where, own) -> None:
        """As it would from a matrix, where 0 times it is NaN; on both backends alike."""
        inputs, recurrent = draw(6, 40, 120, scale=0.2), draw(40, 40, 200, "mixed")
        if where == "recurrent":
            weights = recurrent.weights.clone() if own else torch.zeros(1)
            weights[0] = value
            recurrent = recurrent.with_weights(weights)
        if where == "inputs":
            weights = inputs.weights.clone() if own else torch.zeros(1)
            weights[-1] = value
            inputs = inputs.with_weights(weights)
        x = noise(20, 2, 6)
        if "value" in where:
            x[3, :, 2] = value
            inputs = Synapses.from_coo([], [], torch.zeros(0), shape=(40, 6)) if "no" in where else inputs
        reference, cpu = (
            coba_lif_integral(x, None, inputs, recurrent, P, DT, backend=backend) for backend in ("reference", "cpu")
        )
        assert_same_bits(cpu[0], reference[0])
        for _, state in (reference, cpu):
            assert state.v.isnan().all() and state.g_e.isnan().all() and state.g_i.isnan().all()

    @pytest.mark.parametrize("backend", ["reference", "cpu"])
    def test_spikes_under_way_of_more_than_1_are_refused(self, backend) -> None:
        """An exact sum has room for a spike of every synapse, not for several."""
        synapses = Synapses.fixed_number(20, 20, 5, weight=0.01, seed=1)
        x, inputs = torch.zeros(5, 2, 3), torch.ones(20, 3)
        for z in (1.0, -1.0, 0.5):
            coba_lif_integral(
                x, CobaLIFState(torch.full((20,), z), -60.0, 0.0, 0.0), inputs, synapses, P, DT, backend=backend
            )
        past = torch.zeros(2, 2, 20)
        past[0, 0, 3] = -1.5
        delayed = Synapses.fixed_number(20, 20, 5, weight=0.01, delay=0.3, seed=1)
        message = "state.z and state.history must be between -1 and 1 with sparse synapses, got -1.5; give spikes"
        with pytest.raises(ValueError, match=message):
            state = CobaLIFDelayState(0.0, -60.0, 0.0, 0.0, 0.0, past)
            coba_lif_integral(x, state, inputs, delayed, P, DT, backend=backend)
        with pytest.raises(ValueError, match="got 4; give spikes, 0 or 1, or parts of them"):
            coba_lif_integral(x, CobaLIFState(4.0, -60.0, 0.0, 0.0), inputs, synapses, P, DT, backend=backend)

    def test_counts_and_graded_inputs(self) -> None:
        """A sum is exact: of products of any float32 values with any float32 weights, rounded once."""
        g = torch.Generator().manual_seed(0)
        x = torch.randn(3, 1, 50, generator=g) * torch.exp(2 * torch.randn(3, 1, 50, generator=g))
        synapses = draw(50, 6, 200, scale=0.1)
        p = P._replace(tau_syn_exc_inv=0.0, tau_syn_inh_inv=0.0, v_thresh=1e6)
        none = Synapses.from_coo([], [], [], shape=(6, 6))
        for values in (x, (10 * x.abs()).to(torch.uint8)):
            for backend in ("reference", "cpu"):
                for t in range(3):
                    _, state = coba_lif_integral(values[t : t + 1], None, synapses, none, p, DT, backend=backend)
                    for sign, field in ((1, state.g_e), (-1, state.g_i)):
                        exact = [Fraction(0)] * 6
                        sources = synapses.source_of().tolist()
                        for n, k, w in zip(synapses.targets.tolist(), sources, synapses.weights.tolist(), strict=True):
                            if sign * w > 0:
                                exact[n] += Fraction(values[t, 0, k].item()) * abs(Fraction(w))
                        rounded = torch.tensor([float(number) for number in exact]).float()
                        torch.testing.assert_close(field[0], rounded, rtol=2**-23, atol=1e-12)
                        assert (field[0] == rounded).float().mean() > 0.8  # float() rounds once more

    def test_a_value_that_is_not_finite_reaches_every_neuron(self) -> None:
        x = torch.zeros(4, 2, 3)
        x[2, 1, 0] = torch.inf
        for backend in ("reference", "cpu"):
            _, states = coba_lif_integral(x, None, draw(3, 5, 9), draw(5, 5, 9), P, DT, backend=backend, record_states=True)
            assert states.g_e[2:, 1].isnan().all() and states.g_e[:, 0].isfinite().all()
            assert states.g_e[:2].isfinite().all()


class TestGrid:
    """Weights are integers of a power of two, the finest with which the largest sum fits."""

    @pytest.mark.parametrize("seed", range(6))
    def test_finest(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        spread = float(seed)
        synapses = draw(30, 20, 400, seed=seed)
        weights = synapses.weights * torch.exp(spread * torch.randn(400, generator=g))
        grid = make_grid(weights, synapses.indptr, synapses.targets, 20, False)
        assert grid.sums == torch.int64
        for sign in (0, 1):
            sums = [Fraction(0)] * 20
            for n, w in zip(synapses.targets.tolist(), weights.tolist(), strict=True):
                if (w < 0) == bool(sign):
                    sums[n] += abs(Fraction(w))
            scale = Fraction(grid.scales[sign].item())
            assert Fraction(2) ** 61 * Fraction(999, 1000) < max(sums) * scale <= 2**62
            assert grid.scales[2 + sign] == 1 / grid.scales[sign]

    def test_narrow_sums_where_all_weights_are_exact(self) -> None:
        synapses = draw(30, 20, 400)
        weights = torch.where(synapses.weights > 0, 0.004, -0.051)
        grids = [make_grid(weights, synapses.indptr, synapses.targets, 20, narrow) for narrow in (True, False)]
        assert [grid.sums for grid in grids] == [torch.int32, torch.int64]
        for w in (0.004, -0.051):
            whole = w * grids[0].scales[0 if w > 0 else 1].double()
            assert torch.tensor(w).double() * grids[0].scales[0 if w > 0 else 1].double() == torch.round(
                whole.float().double()
            )
        weights[0] *= 1e-9
        assert make_grid(weights, synapses.indptr, synapses.targets, 20, True).sums == torch.int64

    def test_width_changes_no_bit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        synapses = draw(40, 40, 400, 0.3)
        synapses = synapses.with_weights(torch.where(synapses.weights > 0, 0.008, -0.02))
        x, inputs = noise(80, 2, 10), draw(10, 40, 200, scale=0.02)
        narrow = coba_lif_integral(x, None, inputs, synapses, P, DT)
        assert grid_of(synapses.weights, synapses.indptr, synapses.targets, 40).sums == torch.int32
        learned = synapses.with_weights(synapses.weights.clone().requires_grad_())
        assert grid_of(learned.weights, synapses.indptr, synapses.targets, 40).sums == torch.int64
        wide = coba_lif_integral(x, None, inputs, learned, P, DT)
        assert narrow[0].sum() > 20
        assert_same((narrow[0], narrow[1]), (wide[0].detach(), wide[1].detach()))

        graded = CobaLIFDelayState(torch.rand(40), -55.0, 0.0, 0.0, 0.0, torch.rand(3, 2, 40))
        for weights in (synapses, learned):
            found = coba_lif_integral(x, graded, inputs, weights, P, DT, backend="cpu")
            assert_same_bits(
                found[0].detach(), coba_lif_integral(x, graded, inputs, synapses, P, DT, backend="reference")[0]
            )

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("learned", [False, True])
    @pytest.mark.parametrize("backend", ["reference", "cpu"])
    def test_the_largest_sum_fits(self, backend: str, learned: bool, sign: int) -> None:
        """All synapses of a neuron deliver in one step: 32-bit sums and 64-bit ones hold what arrives."""
        neurons = 40
        matrix = torch.zeros(neurons, neurons)
        matrix[0] = 0.75 * sign  # of few bits: 40 of them are the largest sum of their grid
        synapses = Synapses.from_torch(matrix.to_sparse())
        synapses = synapses.with_weights(synapses.weights.clone().requires_grad_(learned))
        grid = grid_of(synapses.weights, synapses.indptr, synapses.targets, neurons)
        assert grid.sums == (torch.int64 if learned else torch.int32)
        start = CobaLIFState(torch.ones(1, neurons), -60.0, 0.0, 0.0)
        x = torch.zeros(1, 1, 0)
        p = P._replace(tau_syn_exc_inv=0.0, tau_syn_inh_inv=0.0)
        _, state = coba_lif_integral(x, start, torch.zeros(neurons, 0), synapses, p, DT, backend=backend)
        received, other = (state.g_e, state.g_i)[::sign]
        assert received[0, 0] == 0.75 * neurons and received[0, 1:].eq(0).all() and other.eq(0).all()

    def test_follows_weights_that_change_in_place(self) -> None:
        synapses = draw(10, 10, 30)
        before = grid_of(synapses.weights, synapses.indptr, synapses.targets, 10)
        assert grid_of(synapses.weights, synapses.indptr, synapses.targets, 10) is before
        synapses.weights.mul_(1024)
        after = grid_of(synapses.weights, synapses.indptr, synapses.targets, 10)
        assert torch.equal(after.scales[:2] * 1024, before.scales[:2])


CASES = {
    "one step": dict(delays=None),
    "one delay": dict(delays=0.3),
    "mixed delays": dict(delays="mixed"),
    "tiles": dict(neurons=2100, delays=0.4, steps=40, count=8000),
    "no input": dict(inputs=0, delays=0.2),
    "single neuron": dict(neurons=1, count=3, delays=0.5),
    "float64": dict(delays="mixed", dtype=torch.float64),
    "jump first": dict(delays="mixed", order="jump_first"),
    "no refractory period": dict(delays=0.3, p=P._replace(refractory=0)),
    "own constants": dict(delays="mixed", p=P._replace(v_thresh=-50 + torch.arange(37) / 20, tau_syn_exc_inv=0.25)),
    "bytes": dict(delays=0.3, x_dtype=torch.uint8),
    "half": dict(delays=0.3, x_dtype=torch.float16),
}


def case(
    neurons: int = 37,
    inputs: int = 8,
    batch: int = 3,
    steps: int = 90,
    count: int = 500,
    delays: Any = None,
    dtype: torch.dtype = torch.float32,
    x_dtype: torch.dtype | None = None,
    p: Any = P,
    order: str = "decay_first",
) -> tuple[Tensor, Any, Synapses, Synapses, Any, dict[str, Any]]:
    x = noise(steps, batch, inputs).to(x_dtype or dtype)
    if x_dtype == torch.uint8:
        x *= 3
    recurrent = draw(neurons, neurons, count, delays).to(dtype)
    start = None
    if not inputs:
        v = -60 + 15 * torch.rand(batch, neurons, generator=torch.Generator().manual_seed(5), dtype=dtype)
        start = CobaLIFState(0.0, v, 0.02, 0.0)
    return x, start, draw(inputs, neurons, 4 * neurons, scale=0.03).to(dtype), recurrent, p, dict(order=order)


@pytest.mark.parametrize("name", CASES)
def test_cpu_has_the_references_bits(name: str) -> None:
    x, start, inputs, recurrent, p, options = case(**CASES[name])
    wanted = coba_lif_integral(x, start, inputs, recurrent, p, DT, backend="reference", **options)
    assert wanted[0].sum() > 0
    assert_same(coba_lif_integral(x, start, inputs, recurrent, p, DT, backend="cpu", **options), wanted)
    wanted = coba_lif_integral(x, start, inputs, recurrent, p, DT, backend="reference", record_states=True, **options)
    assert_same(coba_lif_integral(x, start, inputs, recurrent, p, DT, backend="cpu", record_states=True, **options), wanted)


@pytest.mark.parametrize("delays", [None, 0.2, "mixed"])
def test_blocks_cut_anywhere(delays: Any) -> None:
    x, start, inputs, recurrent, p, _ = case(delays=delays, steps=100)
    whole = coba_lif_integral(x, start, inputs, recurrent, p, DT)
    for backend, cuts in itertools.product(("reference", "cpu"), ((1,), (3, 4, 5), (50,), (97,))):
        parts, state = [], start
        for part in x.tensor_split(cuts):
            spikes, state = coba_lif_integral(part, state, inputs, recurrent, p, DT, backend=backend)
            parts.append(spikes)
        assert_same((torch.cat(parts), state), whole)
    assert_same(coba_lif_integral(x, start, inputs, recurrent, p, DT, block_steps=32), whole)
    state = start
    for t, now in enumerate(x[:40]):
        spikes, state = coba_lif_step(now, state, inputs, recurrent, p, DT)
        assert_same_bits(spikes, whole[0][t])


@pytest.mark.parametrize("long_waits", [10**6, -1])
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("delays", [0.1, 0.4, "mixed"])
def test_threads_share_a_row(
    delays: Any, batch: int, threads: int, long_waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits do not depend on how many threads there are, where they meet, and whether one goes on alone after a meeting."""
    x, start, inputs, recurrent, p, _ = case(neurons=300, batch=batch, count=6000, delays=delays)
    recurrent = recurrent.with_weights(recurrent.weights / 4)
    torch.set_num_threads(1)
    alone = coba_lif_integral(x, start, inputs, recurrent, p, DT, backend="cpu", record_states=True)
    torch.set_num_threads(threads)
    from coba_triton.backend.cpu import launch

    monkeypatch.setattr(launch.shared, "MIN_STEPS_PER_THREAD", 1)
    monkeypatch.setattr(launch.sparse, "MIN_STEPS_TO_MEETING", 1)
    monkeypatch.setattr(launch.sparse, "LONG_WAITS", long_waits)
    monkeypatch.setattr(launch.sparse, "MANY_STEPS", 1 if threads == 2 else 10**9)  # with links, and without
    stops = []
    monkeypatch.setattr(launch.sparse, "_share_no_more_for_a_while", lambda: stops.append(1))
    for _ in range(3):
        found = coba_lif_integral(x, start, inputs, recurrent, p, DT, backend="cpu", record_states=True)
        assert_same(found, alone)
    assert (len(stops) >= 3) == (long_waits < 0 and batch < threads)
    assert 0.001 < alone[0].mean() < 0.5


def test_threads_share_the_synapses_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two records with one tensor of sources, each has its own targets."""
    from coba_triton.backend.cpu import launch

    monkeypatch.setattr(launch.shared, "MIN_STEPS_PER_THREAD", 1)
    monkeypatch.setattr(launch.sparse, "MIN_STEPS_TO_MEETING", 1)
    x, start, inputs, recurrent, p, _ = case(neurons=300, batch=1, count=6000, delays=0.4)
    mirrored = 299 - recurrent.targets
    order = torch.argsort(recurrent.source_of() * 300 + mirrored, stable=True)
    other = recurrent._replace(targets=mirrored[order])
    torch.set_num_threads(2)
    for synapses in (recurrent, other):
        wanted = coba_lif_integral(x, start, inputs, synapses, p, DT, backend="reference")
        assert wanted[0].sum() > 0
        assert_same(coba_lif_integral(x, start, inputs, synapses, p, DT, backend="cpu"), wanted)


def test_out_and_packed_spikes() -> None:
    x, start, inputs, recurrent, p, _ = case(delays="mixed", steps=70)
    spikes, state = coba_lif_integral(x, start, inputs, recurrent, p, DT)
    out = torch.full_like(spikes, -1)
    found, after = coba_lif_integral(x, start, inputs, recurrent, p, DT, out=out)
    assert found is out
    assert_same((out, after), (spikes, state))
    words, after = coba_lif_integral(x, start, inputs, recurrent, p, DT, spike_dtype="bits")
    assert_same((unpack_spikes(words, 70, torch.float32), after), (spikes, state))
    with pytest.raises(ValueError, match="must not share memory with recurrent_weights"):
        weights = torch.zeros(spikes.numel())
        synapses = recurrent.with_weights(weights[: recurrent.count])
        coba_lif_integral(x, start, inputs, synapses, p, DT, out=weights.view(spikes.shape))


# Gradients


def gradients(backend: str, record_states: bool = False, **problem: Any) -> list[Tensor]:
    """Of a loss on all outputs, by input, weights, the state with its history, and parameters, in float64."""
    x, _, inputs, recurrent, p, options = case(dtype=torch.float64, **problem)
    batch, neurons = x.shape[1], recurrent.neurons
    p = p._replace(alpha=0.5)
    leaves = {
        "x": x * 0.7,
        "inputs": inputs.weights,
        "recurrent": recurrent.weights,
        "v": torch.linspace(-60, -51, batch * neurons, dtype=torch.float64).view(batch, neurons),
        "g_e": torch.full((batch, neurons), 0.01, dtype=torch.float64),
        "history": noise(25, batch, neurons, seed=7).double() * 0.9,
    }
    leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    numbers = ("tau_syn_exc_inv", "tau_syn_inh_inv", "c_m_inv", "g_l", "e_rev_I", "e_rev_E", "v_rest", "v_reset", "v_thresh")
    learned = {name: torch.tensor(getattr(p, name), dtype=torch.float64).requires_grad_() for name in numbers}
    state = CobaLIFDelayState(leaves["history"][-1], leaves["v"], leaves["g_e"], 0.0, 0.0, leaves["history"])
    spikes, after = coba_lif_integral(
        leaves["x"],
        state,
        inputs.with_weights(leaves["inputs"]),
        recurrent.with_weights(leaves["recurrent"]),
        p._replace(**learned),
        DT,
        backend=backend,
        record_states=record_states,
        **options,
    )
    g = torch.Generator().manual_seed(3)
    loss = (spikes * torch.randn(spikes.shape, generator=g, dtype=torch.float64)).sum()
    for name, field in after._asdict().items():
        if name != "left":
            loss = loss + (field * torch.randn(field.shape, generator=g, dtype=torch.float64)).sum()
    assert spikes.sum() > 5
    return list(torch.autograd.grad(loss, [*leaves.values(), *learned.values()]))


GRADIENT_CASES = {
    "one row": dict(batch=1, delays="mixed"),
    "lanes": dict(batch=18, delays="mixed", steps=40),
    "one vector of lanes": dict(batch=16, delays="mixed", steps=40),
    "two vectors of lanes": dict(batch=32, delays=None, steps=40),
    "one step": dict(batch=5, delays=None, steps=40),
    "jump first": dict(batch=4, delays=0.3, order="jump_first", steps=40),
    "shorter than its delays": dict(batch=4, delays="mixed", steps=5),
    "no refractory period": dict(batch=2, delays=0.3, p=P._replace(refractory=0), steps=40),
}


@pytest.mark.parametrize("record_states", [False, True])
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients(name: str, record_states: bool) -> None:
    problem = GRADIENT_CASES[name]
    for found, wanted in zip(
        gradients("cpu", record_states, **problem), gradients("reference", record_states, **problem), strict=True
    ):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8 * wanted.abs().max().item())


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_links_have_the_units_of_all_weights(dtype: torch.dtype, moved: bool) -> None:
    """Weights of one link of either kind, and of two links, onto two parts of the neurons."""
    from coba_triton.backend.cpu import sparse

    bits, share, generator = 11, 20, torch.Generator().manual_seed(2)
    synapses = draw(12, 37, 300, "mixed")
    binades = torch.randint(-4 if moved else -45, 1, (300,), generator=generator)
    weights = torch.ldexp(synapses.weights.to(dtype), binades)
    weights[::7] = 0
    scale = 2.0**20 if moved else 2.0**62
    indptr, targets = synapses.indptr.numpy(), synapses.targets.numpy()
    splits = np.array([indptr[:-1], [0] * 12, indptr[1:]])
    splits[1] = [low + (targets[low:high] < share).sum() for low, high in itertools.pairwise(indptr)]
    steps = (synapses.delays * 10).round().int().tolist()
    scales = np.array([scale, scale, 1 / scale, 1 / scale], weights.numpy().dtype)
    wires = sparse.Wires(splits, targets, weights.numpy(), 2, synapses.delays.numpy(), 2, np.float32(10), scales)
    starts, middles, numbers = np.empty(25, np.int64), np.empty(24, np.int64), np.empty(1000, np.uint64)
    count, alike = sparse.links_kernel()(wires, 37, bits, moved, starts, middles, numbers)
    assert starts[-1] == count and not alike
    kinds = [0, 0]
    for source, part in itertools.product(range(12), range(2)):
        wanted, found = Counter[int](), Counter[int]()
        for s in range(splits[part, source], splits[part + 1, source]):
            place = (2 * steps[s] + (weights[s] < 0).item()) * 37 + targets[s].item()
            wanted[place] += round(abs(weights[s].item()) * scale)
        at = 2 * source + part
        for kind, (first, last) in enumerate(((starts[at], middles[at]), (middles[at], starts[at + 1]))):
            assert (last - first) % sparse.ABREAST == 0
            for number in numbers[first:last].tolist():
                found[number % 2**bits] += number >> bits if kind else number - number % 2**bits
                kinds[kind] += number >= 2**bits
        assert +found == +wanted
    assert kinds[1] > 50 and (kinds[0] == 0 if moved else kinds[0] > 50)


def test_places_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neurons times delays are too many for the places of links, spikes are sent without, and a gradient says so."""
    from coba_triton.backend.cpu import launch

    x, start, inputs, recurrent, p, _ = case(delays="mixed")
    wanted = coba_lif_integral(x, start, inputs, recurrent, p, DT, backend="cpu")
    monkeypatch.setattr(launch.sparse_backward, "PLACE_BITS", 1)
    assert_same(coba_lif_integral(x, start, inputs, recurrent, p, DT, backend="cpu"), wanted)
    with pytest.raises(ValueError, match=r"need 2 \(D \+ 1\) N <= 2\*\*1 sums a batch row, got D=.* use shorter delays"):
        gradients("cpu", delays="mixed")


@pytest.mark.parametrize("batch", [24, 32])
def test_gradients_do_not_depend_on_who_reads_a_synapse(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread reads a synapse once for two vectors of rows, and two threads read it once each."""
    from coba_triton.backend.cpu import launch, sparse_backward

    assert sparse_backward.groups(batch, 1, threads=1) == (32, [(0, batch, 0)])
    assert sparse_backward.groups(batch, 1, threads=2) == (16, [(0, 16, 0), (16, batch - 16, 0)])
    alone = gradients("cpu", batch=batch, delays="mixed", steps=40)
    monkeypatch.setattr(launch.sparse_backward, "count_threads", lambda most, work: 2)
    assert_same_bits(gradients("cpu", batch=batch, delays="mixed", steps=40), alone)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("neurons", [37, 1050])
def test_dense_inputs_are_summed_as_in_a_projection(neurons: int, values: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of a block sum up the events of dense inputs; a projection of all steps has the same bits."""
    from coba_triton.ops import sparse_blocks

    g = torch.Generator().manual_seed(4)
    recurrent = draw(neurons, neurons, 8 * neurons)
    x = noise(40, 5, 11) * (3 * torch.rand(40, 5, 11, generator=g) if values else 1)
    weights = 0.1 * torch.randn(neurons, 11, generator=g)

    def everything() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_(), recurrent.weights.clone().requires_grad_()]
        synapses = recurrent.with_weights(leaves[2])
        spikes, state = coba_lif_integral(leaves[0], None, leaves[1], synapses, P, DT, backend="cpu")
        assert 0.01 < spikes.mean() < 0.5
        grads = torch.autograd.grad((spikes * torch.rand(spikes.shape, generator=g)).sum(), leaves)
        return [spikes.detach(), state.v.detach(), *grads]

    seed = g.get_state()
    found = everything()
    projected: list[Tensor] = []

    def input_drive(net: Any, x: Tensor, events: bool) -> Tensor:
        assert events
        projected.append(net.backend.project_events(x, net.input_rows))
        return projected[-1]

    monkeypatch.setattr(sparse_blocks, "input_drive", input_drive)
    g.set_state(seed)
    assert_same_bits(found, everything())
    assert projected


def test_gradients_flow_through_several_calls() -> None:
    """A sequence that is cut in two has the gradients of the whole, also through spikes that are under way at the cut."""
    x, _, inputs, recurrent, p, _ = case(dtype=torch.float64, batch=2, delays="mixed", steps=60)
    grads = []
    for cuts in ((), (20, 33)):
        leaf = recurrent.weights.detach().clone().requires_grad_()
        state: Any = None
        total = torch.zeros((), dtype=torch.float64)
        for part in x.tensor_split(cuts):
            spikes, state = coba_lif_integral(part, state, inputs, recurrent.with_weights(leaf), p._replace(alpha=0.5), DT)
            total = total + (spikes * torch.arange(spikes[0].numel()).view(spikes[0].shape)).sum()
        grads.append(torch.autograd.grad(total + state.v.sum(), leaf)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", ["source", "all"])
def test_shared_weights(shape: str) -> None:
    """One weight of each source, or of all synapses, gets the sum of what its synapses get."""
    x, _, inputs, recurrent, p, _ = case(dtype=torch.float64, batch=4, delays=0.3, steps=40)
    shared = torch.full((1,), 0.01) if shape == "all" else 0.02 * torch.sin(torch.arange(37.0))[:, None]
    shared = shared.double().requires_grad_()
    each = (shared.expand(recurrent.count) if shape == "all" else shared[recurrent.source_of(), 0]).detach().requires_grad_()
    found = []
    for weights in (shared, each):
        spikes, _ = coba_lif_integral(x, None, inputs, recurrent.with_weights(weights), p._replace(alpha=0.5), DT)
        found.append((spikes.detach(), torch.autograd.grad(spikes.sum(), weights)[0]))
    assert_same_bits(found[0][0], found[1][0])
    sums = found[1][1].sum().view(1)
    if shape == "source":
        sums = torch.zeros(37, dtype=torch.float64).index_add(0, recurrent.source_of(), found[1][1])[:, None]
    torch.testing.assert_close(found[0][1], sums)


def test_a_weight_of_0_has_no_gradient() -> None:
    """It is of neither sign. Its neighbours have the gradient that they have without it."""
    x, _, inputs, recurrent, p, _ = case(dtype=torch.float64, batch=18, delays="mixed", steps=40)
    silent = torch.arange(recurrent.count) % 3 == 0
    weights = torch.where(silent, 0.0, recurrent.weights)
    for backend in ("reference", "cpu"):
        leaves = [weights.clone().requires_grad_(), torch.where(inputs.weights > 0, inputs.weights, 0.0).requires_grad_()]
        synapses = inputs.with_weights(leaves[1]), recurrent.with_weights(leaves[0])
        spikes, _ = coba_lif_integral(x, None, *synapses, p._replace(alpha=0.5), DT, backend=backend)
        for leaf, grad in zip(leaves, torch.autograd.grad(spikes.sum(), leaves), strict=True):
            assert grad[leaf == 0].eq(0).all() and grad[leaf != 0].ne(0).any(), backend


def test_sparse_leaves_get_sparse_gradients() -> None:
    matrix = torch.where(torch.rand(20, 20, generator=torch.Generator().manual_seed(0)) < 0.2, 0.01, 0.0)
    x, inputs = noise(40, 2, 4), 0.05 * torch.rand(20, 4, generator=torch.Generator().manual_seed(2))
    grads = []
    for leaf in (matrix.to_sparse(), matrix.to_sparse_csr(), matrix.clone()):
        leaf = leaf.requires_grad_()
        spikes, _ = coba_lif_integral(x, None, inputs, leaf, P, DT)
        spikes.mean().backward()
        assert leaf.grad is not None and leaf.grad.layout == leaf.layout
        grads.append(leaf.grad.to_dense())
    assert grads[0].abs().sum() > 0
    for grad in grads[:2]:
        torch.testing.assert_close(grad, grads[2] * (matrix != 0))


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_do_not_depend_on_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from coba_triton.backend.cpu import launch

    x, _, inputs, recurrent, p, _ = case(batch=37, delays="mixed", steps=40)

    def run() -> list[Tensor]:
        leaves = [recurrent.weights.clone().requires_grad_(), inputs.weights.clone().requires_grad_()]
        spikes, _ = coba_lif_integral(x, None, inputs.with_weights(leaves[1]), recurrent.with_weights(leaves[0]), p, DT)
        return list(torch.autograd.grad((spikes * torch.arange(37)).mean(), leaves))

    wanted = run()
    torch.set_num_threads(threads)
    monkeypatch.setattr(launch.shared, "MIN_STEPS_PER_THREAD", 1)
    monkeypatch.setattr(launch.sparse, "MIN_STEPS_TO_MEETING", 1)
    for found, grad in zip(run(), wanted, strict=True):
        assert_same_bits(found, grad)


def test_memory_of_training() -> None:
    """What the forward keeps for its backward: less than 8 bytes a neuron-step."""
    x, _, inputs, recurrent, p, _ = case(neurons=400, batch=4, count=4000, delays=0.5, steps=1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        coba_lif_integral(
            x,
            None,
            inputs,
            recurrent.with_weights(recurrent.weights.clone().requires_grad_()),
            p,
            DT,
            spike_dtype=torch.bool,
        )
    own = {x.data_ptr(), *(t.data_ptr() for t in (*inputs[:3], *recurrent[:4]) if isinstance(t, Tensor))}
    extra = sum(t.nbytes for t in kept if t.data_ptr() not in own)
    assert extra / (1000 * 4 * 400) < 2


# PyTorch


def test_opcheck() -> None:
    x, _, inputs, recurrent, p, _ = case(neurons=9, count=30, batch=2, delays="mixed", steps=20)
    weights = recurrent.weights.clone().requires_grad_()
    captured: list[tuple[Any, ...]] = []
    from coba_triton.ops import sparse_operators

    original = sparse_operators.sparse

    def capture(*args: Any) -> Any:
        captured.append(args)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_operators, "sparse", capture)
        coba_lif_integral(x.requires_grad_(), None, inputs, recurrent.with_weights(weights), p, DT)
    x, history, state, to, call = captured[0]
    args = tuple(
        value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for value in (x, history, state, *to, *call)
    )
    torch.library.opcheck(torch.ops.coba_triton.sparse.default, args)


def test_compile_and_export() -> None:
    x, _, inputs, recurrent, p, _ = case(delays="mixed", steps=40)
    module = CobaLIFRecurrent(8, 37, p, DT, input_weights=inputs, recurrent_weights=recurrent)
    wanted = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    spikes, state = compiled(x)
    assert_same((spikes.detach(), state.detach()), (wanted[0].detach(), wanted[1].detach()))
    spikes.mean().backward()
    grad = module.recurrent_weights.grad.clone()
    module.zero_grad()
    module(x)[0].mean().backward()
    assert_same_bits(module.recurrent_weights.grad, grad)
    assert grad.abs().sum() > 0
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("T", min=2, max=999)},))
    longer = torch.cat([x, x])
    assert_same_bits(exported.module()(longer)[0].detach(), module(longer)[0].detach())


def test_per_sample_gradients() -> None:
    """vmap over samples with shared synapses: the rows of one call."""
    x, _, inputs, recurrent, p, _ = case(batch=6, delays="mixed", steps=40, dtype=torch.float64)

    def loss(weights: Tensor, inputs_: Tensor, sample: Tensor) -> Tensor:
        spikes, _ = coba_lif_integral(
            sample, None, inputs.with_weights(inputs_), recurrent.with_weights(weights), p._replace(alpha=0.5), DT
        )
        return (spikes * torch.arange(37)).sum()

    samples = x.unflatten(1, (3, 2)).movedim(1, 0)
    both = torch.func.grad(loss, (0, 1))
    found = torch.func.vmap(both, (None, None, 0))(recurrent.weights, inputs.weights, samples)
    for number, sample in enumerate(samples):
        for one, wanted in zip(found, both(recurrent.weights, inputs.weights, sample), strict=True):
            torch.testing.assert_close(one[number], wanted, rtol=1e-9, atol=1e-9)


def test_reference_has_second_derivatives_and_forward_mode() -> None:
    x, _, inputs, recurrent, p, _ = case(neurons=6, inputs=3, batch=1, count=20, delays=0.2, steps=12, dtype=torch.float64)
    p = p._replace(alpha=0.5, refractory=0)

    def potential(weights: Tensor) -> Tensor:
        _, state = coba_lif_integral(x, None, inputs, recurrent.with_weights(weights), p, DT, backend="reference")
        return state.v.sum()

    w = recurrent.weights
    tangent = torch.ones_like(w)
    forward = torch.func.jvp(potential, (w,), (tangent,))[1]
    torch.testing.assert_close(forward, (torch.func.grad(potential)(w) * tangent).sum())
    assert torch.func.grad(lambda w: torch.func.grad(potential)(w).square().sum())(w).isfinite().all()


# Modules


def test_module_and_cell() -> None:
    x, _, inputs, recurrent, p, _ = case(delays="mixed", steps=40)
    module = CobaLIFRecurrent(8, 37, p, DT, input_weights=inputs, recurrent_weights=recurrent)
    cell = CobaLIFCell(8, 37, p, DT, input_weights=inputs, recurrent_weights=recurrent)
    wanted = coba_lif_integral(x, None, inputs, recurrent, p, DT)
    found = module(x)
    assert_same((found[0].detach(), found[1].detach()), wanted)
    state = None
    for t in range(40):
        spikes, state = cell(x[t], state)
        assert_same_bits(spikes.detach(), wanted[0][t])
    assert "500 synapses" in repr(module)
    assert sorted(name for name, _ in module.named_parameters()) == ["input_weights", "recurrent_weights"]
    other = CobaLIFRecurrent(
        8, 37, p, DT, input_weights=inputs, recurrent_weights=recurrent.with_weights(recurrent.weights * 2)
    )
    other.load_state_dict(module.state_dict())
    assert_same_bits(other(x)[0].detach(), wanted[0])
    half = CobaLIFRecurrent(8, 37, p, DT, recurrent_weights=recurrent).half()
    assert half.recurrent_delays.dtype == torch.float32 and half.recurrent_weights.dtype == torch.float16
    assert half(x.bool())[0].dtype == torch.float16


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("delays", [([1.0, 0.5], [0.2, 0.3]), ([0.1, 0.1], [0.3, 0.2]), ([0.2, 0.7], [0.1, 0.1])])
def test_a_module_takes_the_delays_that_it_loads(backend, delays) -> None:
    """Also their shortest and longest, by which it knows how long spikes are under way."""

    def network(delays: list[float]) -> CobaLIFRecurrent:
        synapses = Synapses.from_coo([1, 0], [0, 1], [0.3, 0.2], torch.tensor(delays), shape=(2, 2))
        return CobaLIFRecurrent(1, 2, P, DT, input_weights=torch.ones(2, 1), recurrent_weights=synapses, backend=backend)

    source, other = map(network, delays)
    x = noise(60, 1, 1)
    expected = source(x)
    assert expected[0].any()
    if source.recurrent_delays.shape == other.recurrent_delays.shape:
        other.load_state_dict(source.state_dict())
        assert_same(tuple(map(_detached, other(x))), tuple(map(_detached, expected)))
    source.recurrent_delays.mul_(20.0)
    with pytest.raises(ValueError, match="delays must be from .* steps, which shortest and the history say"):
        source(x)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else type(value)(*(field.detach() for field in value))


def test_module_draws_the_weights_of_given_synapses() -> None:
    module = CobaLIFRecurrent(8, 37, P, DT, recurrent_weights=draw(37, 37, 3700))
    torch.manual_seed(0)
    module.reset_parameters()
    assert module.recurrent_weights.shape == (3700,)
    torch.testing.assert_close(module.recurrent_weights.std().item(), 0.01 * 2.5066 / 100, rtol=0.1, atol=0)


def test_dense_module_with_a_delay() -> None:
    torch.manual_seed(0)
    module = CobaLIFRecurrent(8, 12, P, DT, delay=0.5)
    x = noise(40, 2, 8)
    found, _ = module(x)
    matrix = module.recurrent_weights.detach().clone().fill_diagonal_(0)
    wanted, _ = coba_lif_integral(x, None, module.input_weights.detach(), matrix, P, DT, delay=0.5)
    assert_same_bits(found.detach(), wanted)


def test_no_synapses_have_no_delays_to_check() -> None:
    x, inputs = noise(20, 2, 8), draw(8, 5, 20, scale=0.05)
    empty = Synapses.from_coo([], [], [], [], shape=(5, 5))
    assert empty.delays is not None
    wanted = coba_lif_integral(x, None, inputs, torch.zeros(5, 5), P, DT)
    assert wanted[0].sum() > 0
    for backend in ("reference", "cpu"):
        assert_same(coba_lif_integral(x, None, inputs, empty, P, DT, backend=backend), wanted)


# What is refused


def small(**replaced: Any) -> Any:
    arguments = (
        dict(x=noise(4, 1, 3), inputs=draw(3, 5, 6), recurrent=draw(5, 5, 9, 0.3), delay=None, path="auto") | replaced
    )
    return coba_lif_integral(
        arguments["x"], None, arguments["inputs"], arguments["recurrent"], P, DT, delay=arguments["delay"],
        path=arguments["path"],
    )  # fmt: skip


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a delay below one step": (lambda: small(recurrent=draw(5, 5, 9, 0.03)), ValueError, "at least one step of dt=0.1 ms"),
    "delays of an input": (lambda: small(inputs=draw(3, 5, 6, 0.3)), ValueError, "input_weights must have no delays"),
    "two kinds of delays": (lambda: small(delay=0.3), ValueError, "delay is for a matrix of recurrent weights"),
    "other sources": (lambda: small(recurrent=draw(4, 5, 9)), ValueError, "must connect N neurons with N neurons, got 4"),
    "other inputs": (lambda: small(inputs=draw(4, 5, 9)), ValueError, r"input_weights must be \[N, I\]=\[5, 3\]"),
    "dense inputs": (lambda: small(inputs=torch.zeros(5, 4)), ValueError, r"input_weights must be \[N, I\]=\[5, 3\]"),
    "path": (lambda: small(path="dense"), ValueError, "path 'dense' is for dense weights"),
    "type": (
        lambda: small(recurrent=[[1.0]]),
        TypeError,
        "recurrent_weights must be a torch.Tensor or coba_triton.Synapses",
    ),
    "module": (
        lambda: CobaLIFRecurrent(3, 6, recurrent_weights=draw(5, 5, 9)),
        ValueError,
        r"recurrent_weights must be \[6, 6\] for input_size=3 and hidden_size=6, got \[5, 5\]",
    ),
}


@pytest.mark.filterwarnings("ignore:the Euler step")
@pytest.mark.parametrize("record_states", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_views_with_another_sign_than_their_memory_are_taken(backend: str, record_states: bool, tmp_path: Path) -> None:
    """PyTorch only notes that numbers are negated, as in ``z.conj().imag``; they count as what they are."""

    def negated(values: Tensor) -> Tensor:
        return torch.complex(values, -values).conj().imag

    g = torch.Generator().manual_seed(3)
    x = (torch.rand(30, 2, 4, generator=g) < 0.4).float()
    inputs, weights, delays = torch.rand(5, 4, generator=g), torch.rand(25, generator=g) - 0.3, torch.ones(5, 1) * 0.3
    rows, columns = torch.arange(5).repeat_interleave(5), torch.arange(5).repeat(5)
    synapses = Synapses.from_coo(rows, columns, weights, delays, shape=(5, 5))

    def run(made: Any, onto: Tensor = inputs, source: Tensor = x, **options: Any) -> Tensor:
        spikes, state = coba_lif_integral(
            source, None, onto, made, P, DT, backend=backend, record_states=record_states, **options
        )
        assert spikes.any()
        return torch.cat([spikes.flatten(), state.v.flatten()])

    wanted = run(synapses)
    made = [
        Synapses.from_coo(rows, columns, negated(weights), negated(delays), shape=(5, 5)),
        synapses.with_weights(negated(synapses.weights)),
        synapses._replace(weights=negated(synapses.weights), delays=negated(torch.full((1,), 0.3))),
        Synapses.from_torch(negated(weights.view(5, 5)), negated(torch.tensor(0.3))),
    ]
    for one in made:
        assert torch.equal(run(one), wanted)
        one.save(tmp_path / "synapses.npz")
        assert torch.equal(run(Synapses.load(tmp_path / "synapses.npz")), wanted)
    assert torch.equal(run(synapses, negated(inputs.t().contiguous()).t(), negated(x)), wanted)
    matrix = weights.view(5, 5)
    assert torch.equal(run(matrix, delay=negated(torch.tensor(0.3))), wanted)
    assert torch.equal(run(negated(matrix.t().contiguous()).t(), negated(inputs.t().contiguous()).t()), run(matrix))
    module = CobaLIFRecurrent(
        4, 5, P, DT, autapses=True, input_weights=negated(inputs), recurrent_weights=matrix,
        delay=negated(torch.tensor(0.3)), backend=backend,
    )  # fmt: skip
    plain, other = (simulate(module, source, sink=tmp_path / f"{n}.zarr") for n, source in enumerate((x, negated(x))))
    assert np.array_equal(plain.spikes[:], other.spikes[:]) and plain.spikes[:].any()


def test_a_buffer_for_spikes_is_no_view_with_another_sign() -> None:
    x = torch.zeros(4, 2, 5)
    out = torch.zeros(4, 2, 5, dtype=torch.complex64).conj().imag
    with pytest.raises(ValueError, match="out must be memory to write to, got a view .*; use torch.empty"):
        coba_lif_feed_forward_integral(x, out=out)


SHAPE = r"must be a number or \[D, \*batch, N\], at least one step of neurons \[3, 5\], got \{}; pass that of a state which"


@pytest.mark.parametrize("record_states", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("history", "error", "message"),
    [
        (torch.zeros(4), ValueError, SHAPE.format(r"[4\]")),
        (torch.zeros(2, 5), ValueError, SHAPE.format(r"[2, 5\]")),
        (torch.zeros(3, 5), ValueError, SHAPE.format(r"[3, 5\]")),
        (torch.zeros(0, 3, 5), ValueError, SHAPE.format(r"[0, 3, 5\]")),
        (torch.zeros(2, 3, 4), ValueError, SHAPE.format(r"[2, 3, 4\]")),
        (torch.zeros(2, 2, 3, 5), ValueError, SHAPE.format(r"[2, 2, 3, 5\]")),
        (None, TypeError, "must be a real number or a torch.Tensor, got NoneType; wrap arrays"),
        ("x", TypeError, "must be a real number or a torch.Tensor, got str; wrap arrays"),
        (math.nan, ValueError, "must be finite, got nan; correct it"),
        (
            torch.zeros(2, 3, 5, dtype=torch.complex64),
            TypeError,
            "must be a real number .* tensor of torch.complex64",
        ),
        (torch.zeros(2, 3, 5, device="meta"), ValueError, "must be on the input's device 'cpu', got 'meta'; move it"),
        (torch.zeros(2, 3, 5).to_sparse(), TypeError, "must be dense, got torch.sparse_coo; use .to_dense"),
    ],
)
def test_a_history_that_is_wrong_is_refused(
    history: Any, error: type[Exception], message: str, backend: str, record_states: bool
) -> None:
    state = CobaLIFDelayState(0.0, -65.0, 0.0, 0.0, 0.0, history)
    weights = torch.zeros(5, 2), draw(5, 5, 9, 0.3)
    with pytest.raises(error, match=f"state.history {message}"):
        coba_lif_integral(torch.zeros(4, 3, 2), state, *weights, P, DT, backend=backend, record_states=record_states)
    with pytest.raises(error, match=f"state.history {message}"):
        coba_lif_step(torch.zeros(3, 2), state, *weights, P, DT)


@pytest.mark.parametrize("history", [0, 0.0, torch.zeros(()), torch.zeros(5), torch.zeros(1, 3, 5), torch.zeros(9, 1, 5)])
def test_a_history_without_spikes_is_as_none(history: Any) -> None:
    state, weights = CobaLIFDelayState(0.0, -65.0, 0.0, 0.0, 0.0, history), (torch.ones(5, 2), draw(5, 5, 9, 0.3))
    x = torch.ones(20, 3, 2)
    spikes, _ = coba_lif_integral(x, state, *weights, P, DT)
    assert torch.equal(spikes, coba_lif_integral(x, CobaLIFState(*state[:4]), *weights, P, DT)[0])


@pytest.mark.parametrize("name", REFUSED)
def test_message(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


def test_operators_refuse_what_would_be_read_past_its_end() -> None:
    """A record that was put together by hand may hold anything; the CPU path looks at it once."""
    good = draw(5, 5, 9, 0.3)
    for wrong, message in (
        (good._replace(targets=good.targets.clone().fill_(7)), "targets must be from 0 to 4"),
        (good._replace(indptr=good.indptr + 100), "indptr must"),
        (good._replace(delays=torch.full((9,), 5.0)), "delays must be from"),
    ):
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                small(recurrent=wrong)


@pytest.mark.parametrize("delays", [None, "mixed"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_inference_mode(backend: str, delays: Any) -> None:
    """Synapses may be made, and may change, in inference mode, in which tensors do not tell whether they have changed."""

    def spikes() -> list[Tensor]:
        x, start, inputs, recurrent, p, _ = case(delays=delays)
        found = [coba_lif_integral(x, start, inputs, recurrent, p, DT, backend=backend)[0]]
        matrix = torch.sparse_coo_tensor(torch.stack([inputs.targets, inputs.source_of()]), inputs.weights, (37, 8))
        found.append(coba_lif_integral(x, start, matrix, recurrent, p, DT, backend=backend)[0])
        recurrent.weights.mul_(4)
        return [*found, coba_lif_integral(x, start, inputs, recurrent, p, DT, backend=backend)[0]]

    wanted = spikes()
    assert not torch.equal(wanted[0], wanted[2])
    with torch.inference_mode():
        found = spikes()
    for a, b in zip(found, wanted, strict=True):
        assert_same_bits(a, b)


def test_what_changes_in_place_is_looked_at_again() -> None:
    synapses = draw(5, 5, 9, 0.3)._replace(delays=torch.full((9,), 0.3))
    small(recurrent=synapses)
    assert synapses.delays is not None
    for tensor, wrong, message in (
        (synapses.targets, 7, "targets must be from 0 to 4"),
        (synapses.delays, 5.0, "delays must be from"),
    ):
        before = tensor.clone()
        tensor.fill_(wrong)
        with pytest.raises(ValueError, match=message):
            small(recurrent=synapses)
        tensor.copy_(before)
        small(recurrent=synapses)
