"""Long runs of networks with sparse synapses and delays: equal to one call, cut and resumed anywhere, and what is kept."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coba_triton import (
    CobaLIF,
    CobaLIFRecurrent,
    EventSource,
    NpzSink,
    PoissonSource,
    Record,
    Synapses,
    Uniform,
    coba_lif_integral,
    open_result,
    simulate,
)
from coba_triton.neuron.records import CobaLIFDelayState, CobaLIFRefractoryState, CobaLIFState
from coba_triton.ops import time_blocks
from coba_triton.stream.block_run import BlockRun
from coba_triton.stream.states import pack_state, unpack_state
from helpers.runs import BLOCK, INPUTS, NEURON, RECORD, N, T, assert_same, begin, drive, run

HELD = NEURON._replace(refractory=2.0)
SPARSE_INPUT = Synapses.fixed_probability(INPUTS, N, 0.5, Uniform(0.0005, 0.003), seed=1)
DENSE_INPUT = SPARSE_INPUT.to_dense()


def synapses(shortest: float = 0.3, longest: float = 4.0) -> Synapses:
    """Excitatory and inhibitory synapses, each with a weight and a delay of its own."""
    weights, delays = Uniform(-0.01, 0.01), Uniform(shortest, longest) if longest > shortest else shortest
    return Synapses.fixed_probability(N, N, 0.3, weights, delays, seed=2)


def network(
    recurrent: Any = None, inputs: Any = SPARSE_INPUT, p: Any = NEURON, delay: Any = None, **options: Any
) -> CobaLIFRecurrent:
    recurrent = synapses() if recurrent is None else recurrent
    return CobaLIFRecurrent(
        INPUTS, N, p, 0.1, input_weights=inputs, recurrent_weights=recurrent, delay=delay, autapses=True, **options
    )


def whole(net: CobaLIFRecurrent, x: Tensor, state: Any = None, **options: Any) -> tuple[Tensor, Any]:
    """What one call makes of the input."""
    with torch.no_grad():
        return coba_lif_integral(x, state, *net._weights(), net.p, 0.1, delay=net.delay, **options)


def assert_fields_equal(one: Any, other: Any) -> None:
    assert one._fields == other._fields
    for name, a, b in zip(one._fields, one, other, strict=True):
        assert a.shape == b.shape, name
        assert torch.equal(a, b), name


KINDS: dict[str, Any] = {
    "delays": {},
    "one step": {"recurrent": synapses()._replace(delays=None, shortest=0.0, longest=0.0)},
    "one step, held": {"recurrent": synapses()._replace(delays=None, shortest=0.0, longest=0.0), "p": HELD},
    "held": {"p": HELD},
    "dense input": {"inputs": DENSE_INPUT},
    "dense with a delay": {"recurrent": synapses().to_dense(), "inputs": DENSE_INPUT, "delay": 1.7},
    "jump first": {"order": "jump_first"},
    "reference": {"backend": "reference"},
}


@pytest.mark.parametrize("block_steps", [32, 96, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_one_call_bit_for_bit(kind: str, block_steps: int) -> None:
    net = network(**KINDS[kind])
    x = drive((INPUTS,))[:]
    spikes, states = whole(net, x, backend="reference", record_states=True, order=net.order)
    assert 50 < spikes.sum() < T * N / 5
    result = simulate(net, x, block_steps=block_steps, record=RECORD, progress=False)
    np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())
    for name in ("v", "g_e", "g_i"):
        np.testing.assert_array_equal(result.traces[name][:], getattr(states, name)[:, [7, 0]].numpy())
    final = whole(net, x, backend="reference", order=net.order)[1]
    assert_fields_equal(result.state, final)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("longest", [2, 24, 25, 60])
def test_a_state_survives_being_packed(longest: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(longest)
    history = (torch.rand(longest, 3, N, generator=g) < 0.5).to(dtype)
    v, g_e, g_i = torch.randn(3, 3, N, generator=g, dtype=dtype)
    state = CobaLIFDelayState(history[-1], v, g_e, g_i, torch.full((3, N), 2.0, dtype=dtype), history)
    packed = pack_state(state)
    assert packed.shape == (5 + -(-longest // 24), 3, N) and packed.dtype == dtype
    assert_fields_equal(unpack_state(packed, True, longest), state)


def test_the_last_spikes_are_whole_numbers_that_other_programs_can_read() -> None:
    history = torch.zeros(30, 1)
    history[-1] = history[-3] = history[-26] = 1.0  # of the last step, two before it, and 25 before it
    packed = pack_state(CobaLIFDelayState(*torch.zeros(5, 1), history))
    assert packed[5:, 0].tolist() == [2.0, 1.0 + 4.0]


@pytest.mark.parametrize("kind", ["delays", "dense with a delay", "held", "one step", "reference"])
@pytest.mark.parametrize("steps", [0, BLOCK, 7 * BLOCK])
def test_resumed_run_is_the_uninterrupted_one(kind: str, steps: int, tmp_path: Path) -> None:
    def changes() -> dict[str, Any]:
        return {"network": network(**KINDS[kind]), "source": drive((INPUTS,))}

    result = run(tmp_path / "whole.zarr", **changes())
    assert result.spikes[:].sum() > 50
    begin(tmp_path / "run.zarr", steps, **changes())
    assert open_result(tmp_path / "run.zarr").steps == steps
    assert run(tmp_path / "run.zarr", resume=True, **changes()).finished
    assert_same(tmp_path / "run.zarr", tmp_path / "whole.zarr")


@pytest.mark.parametrize("first", [40, BLOCK, 3 * BLOCK + 5])
def test_a_finished_run_is_extended(first: int, tmp_path: Path) -> None:
    """Also from a step that is the end of no block, where delays are longer than the last block."""
    net = network(recurrent=synapses(longest=8.0))
    assert net._weights()[1].check_delays(0.1)[1] > 70
    run(tmp_path / "run.zarr", network=net, source=drive((INPUTS,), first))
    run(tmp_path / "run.zarr", network=net, source=drive((INPUTS,)), resume=True)
    run(tmp_path / "whole.zarr", network=net, source=drive((INPUTS,)))
    assert_same(tmp_path / "run.zarr", tmp_path / "whole.zarr")


@pytest.mark.parametrize("form", ["memory", "zarr", "npz"])
@pytest.mark.parametrize("cut", [50, 333])
def test_another_run_goes_on_from_the_state(form: str, cut: int, tmp_path: Path) -> None:
    net, x = network(p=HELD), drive((INPUTS,))[:]
    sink = None if form == "memory" else tmp_path / f"run.{form}"
    first = simulate(net, x[:cut], sink=sink, progress=False)
    if sink is not None:
        first = open_result(sink)
    state = first.state
    assert isinstance(state, CobaLIFDelayState)
    assert_fields_equal(state, whole(net, x[:cut])[1])
    second = simulate(net, x[cut:], state=state, progress=False)
    spikes, final = whole(net, x)
    assert spikes[cut:].sum() > 50
    np.testing.assert_array_equal(second.spikes[:], spikes[cut:].bool().numpy())
    assert_fields_equal(second.state, final)


def test_what_is_kept_of_a_state_is_small(tmp_path: Path) -> None:
    result = simulate(network(), drive((INPUTS,)), sink=NpzSink(tmp_path / "run.npz"), progress=False)
    longest = network()._weights()[1].check_delays(0.1)[1]
    assert result.attributes["config"]["longest_delay"] == longest > 24
    with np.load(tmp_path / "run.npz") as file:
        assert file["state"].shape == (5 + 2, N)
    assert result.state.history.shape == (longest, N)


@pytest.mark.parametrize("record_states", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_of_a_batch(backend: str, record_states: bool) -> None:
    net, x = network(p=HELD, backend=backend), drive((3, INPUTS))[:]
    record = Record(neurons=[2 * N + 1, 4] if record_states else [], variables=("v",), every=5)
    result = simulate(net, x, block_steps=160, record=record, progress=False)
    spikes, states = whole(net, x, backend="reference", record_states=True)
    np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())
    assert_fields_equal(result.state, whole(net, x, backend="reference")[1])
    if record_states:
        np.testing.assert_array_equal(result.traces["v"][:], states.v.flatten(1)[4::5, [2 * N + 1, 4]].numpy())


@pytest.mark.parametrize("inputs", [SPARSE_INPUT, DENSE_INPUT], ids=["sparse", "dense"])
@pytest.mark.parametrize("kind", ["uint8", "poisson", "events", "real"])
def test_counts_and_numbers_as_input(kind: str, inputs: Any) -> None:
    """Several spikes of a channel in one step add up; the grid of an input's sums depends on no other step."""
    x: Any = PoissonSource(8000.0, T, INPUTS, 0.1, seed=3)
    if kind == "uint8":
        x = x[:].to(torch.uint8)
    elif kind == "events":
        steps, channels = x[:].nonzero(as_tuple=True)
        x = EventSource((steps + 1) * 0.1, channels, INPUTS, 0.1, steps=T, weight=x[:][steps, channels])
    elif kind == "real":
        x = x[:] * 0.87 + (torch.rand(T, INPUTS, generator=torch.Generator().manual_seed(0)) < 0.3) * 0.123
    net = network(inputs=inputs, recurrent=synapses()._replace(weights=synapses().weights / 8))
    spikes, _ = whole(net, x[:], backend="cpu")
    assert x[:].max() >= 4
    assert 50 < spikes.sum() < T * N / 2
    for block_steps in (32, 416):
        result = simulate(net, x, block_steps=block_steps, record=Record(inputs=True), progress=False)
        np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())
        expected = (x[:] @ DENSE_INPUT.T if kind != "uint8" else x.float() @ DENSE_INPUT.T).mean(1).numpy()
        np.testing.assert_allclose(result.array("input_e"), expected, rtol=1e-5)
        assert not result.array("input_i").any()


def test_inhibitory_synapses_of_inputs_are_kept_apart() -> None:
    inputs = Synapses.from_coo([0, 1, 1, 3], [0, 0, 0, 2], [0.004, 0.002, -0.001, -0.008], shape=(N, INPUTS))
    result = simulate(network(inputs=inputs), torch.ones(40, INPUTS), record=Record(inputs=True), progress=False)
    assert result.array("input_e") == pytest.approx(0.006 / N)
    assert result.array("input_i") == pytest.approx(0.009 / N)


def test_the_ring_of_sums_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from coba_triton.backend.cpu import launch

    made: list[int] = []
    make = launch.sparse_ring
    monkeypatch.setattr(launch, "sparse_ring", lambda *args: made.append(1) or make(*args))
    result = simulate(network(), drive((INPUTS,)), block_steps=32, progress=False)
    assert result.spikes[:].sum() > 50
    assert made == [1]


def test_spikes_under_way_keep_their_weights() -> None:
    """The ring goes on from block to block, whatever becomes of the weights meanwhile."""
    recurrent = Synapses.from_coo([1], [0], [0.01], delays=5.0, shape=(2, 2))
    inputs = torch.tensor([[0.6], [0.0]])
    net = CobaLIFRecurrent(1, 2, HELD, 0.1, input_weights=inputs, recurrent_weights=recurrent)
    x = torch.zeros(64, 1)
    x[0] = 1.0
    block_run = BlockRun(net, x, None, Record(), 32)
    first = block_run.finish(block_run.begin(x[:32], 0)).rows["spikes"]
    assert first[0, 0]  # spikes that are under way for 50 steps
    with torch.no_grad():
        block_run.stepper.net.recurrent.weights.zero_()
    block_run.begin(x[32:], 32)
    assert block_run.state.g_e[1] > 0.005


@pytest.mark.parametrize("part", ["weights", "targets", "indptr", "delays", "input"])
def test_another_network_is_refused(part: str, tmp_path: Path) -> None:
    one = synapses()
    begin(tmp_path / "run.zarr", network=network(one), source=drive((INPUTS,)))
    inputs = SPARSE_INPUT
    if part == "weights":
        one.weights[17] += 2**-20
    elif part == "delays":
        one.delays[17] = 2.05
    elif part == "targets":
        last = int(one.indptr[1]) - 1
        one.targets[last] += 1
    elif part == "indptr":
        one.indptr[5] += 1
    else:
        inputs = SPARSE_INPUT.with_weights(SPARSE_INPUT.weights * 2)
    kind = {"targets": "connections", "indptr": "connections"}.get(part, part)
    where = "weights.input.weights" if part == "input" else f"weights.recurrent.{kind}"
    with pytest.raises(ValueError, match=re.escape(f"begun with another configuration: {where}")):
        run(tmp_path / "run.zarr", network=network(one, inputs), source=drive((INPUTS,)), resume=True)
    assert run(tmp_path / "run.zarr", network=network(), source=drive((INPUTS,)), resume=True).finished


def test_another_delay_of_a_matrix_is_refused(tmp_path: Path) -> None:
    dense = synapses().to_dense()
    begin(tmp_path / "run.zarr", network=network(dense, DENSE_INPUT, delay=1.0), source=drive((INPUTS,)))
    with pytest.raises(ValueError, match=r"begun with another configuration: longest_delay was 10 and is 11"):
        run(tmp_path / "run.zarr", network=network(dense, DENSE_INPUT, delay=1.1), source=drive((INPUTS,)), resume=True)
    per_source = torch.full((N,), 1.0)
    per_source[3] = 0.5
    with pytest.raises(ValueError, match=r"begun with another configuration: weights.delay was"):
        run(
            tmp_path / "run.zarr",
            network=network(dense, DENSE_INPUT, delay=per_source),
            source=drive((INPUTS,)),
            resume=True,
        )


def test_damage_to_the_last_spikes_is_noticed(tmp_path: Path) -> None:
    begin(tmp_path / "run.zarr", network=network(), source=drive((INPUTS,)))
    file = tmp_path / "run.zarr" / "state" / "c.0.0.0"
    data = bytearray(file.read_bytes())
    data[-6] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="block 0 of state has changed"):
        run(tmp_path / "run.zarr", network=network(), source=drive((INPUTS,)), resume=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("inputs", [SPARSE_INPUT, DENSE_INPUT], ids=["sparse", "dense"])
def test_input_that_is_not_finite_is_named(inputs: Any, backend: str) -> None:
    x = drive((INPUTS,))[:]
    x[300, 4] = torch.nan
    where = "the state is no longer finite after step 320, as the source has nan in step 300, channel [4]"
    with pytest.raises(FloatingPointError, match=re.escape(where)):
        simulate(network(inputs=inputs, backend=backend), x, block_steps=64, progress=False)


def test_weights_that_are_not_finite_are_refused() -> None:
    net = network()
    with torch.no_grad():
        net.recurrent_weights[3] = torch.inf
    with pytest.raises(ValueError, match="recurrent_weights must be finite, got inf"):
        simulate(net, drive((INPUTS,)), progress=False)


@pytest.mark.filterwarnings("ignore")
def test_only_spikes_are_under_way() -> None:
    history = torch.zeros(5, N)
    history[-2, 3] = 0.5
    state = CobaLIFDelayState(0.0, -65.0, 0.0, 0.0, 0.0, history)
    with pytest.raises(ValueError, match=r"state.z and state.history must be spikes, 0 or 1, .* got 0.5; round them"):
        simulate(network(), drive((INPUTS,)), state=state, progress=False)
    one_step = network(recurrent=synapses()._replace(delays=None, shortest=0.0, longest=0.0))
    graded = CobaLIFState(torch.full((N,), 0.5), -65.0, 0.0, 0.0)
    x = drive((INPUTS,))[:]
    result = simulate(one_step, x, state=graded, progress=False)  # nothing of it is left after a step
    np.testing.assert_array_equal(result.spikes[:], whole(one_step, x, graded)[0].bool().numpy())


def test_a_state_of_fewer_fields_is_where_a_run_may_begin() -> None:
    z = (torch.arange(N) % 2).float()
    x = drive((INPUTS,))[:]
    for state in (CobaLIFState(z, -60.0, 0.0, 0.0), CobaLIFRefractoryState(z, -60.0, 0.0, 0.0, 3.0)):
        result = simulate(network(p=HELD), x, state=state, progress=False)
        spikes, final = whole(network(p=HELD), x, state)
        np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())
        assert_fields_equal(result.state, final)


def test_a_network_is_as_fast_as_one_call() -> None:
    """Also in many blocks: sums under way, the grid and the threads' shares are not made anew for each."""
    from time import perf_counter

    n = 2000
    recurrent = Synapses.fixed_probability(n, n, 0.02, Uniform(-0.002, 0.002), Uniform(0.3, 5.0), seed=1)
    inputs = Synapses.fixed_probability(100, n, 0.2, 0.002, seed=2)
    net = CobaLIFRecurrent(100, n, NEURON, 0.1, input_weights=inputs, recurrent_weights=recurrent)
    x = PoissonSource(100.0, 4096, 100, 0.1, seed=3)[:].unsqueeze(1)
    with torch.no_grad():
        net.spike_dtype = "bits"
        net(x[:64])
        once, blocks = [], []
        for _ in range(5):
            start = perf_counter()
            net(x)
            once.append(perf_counter() - start)
            start = perf_counter()
            simulate(net, x, block_steps=256, progress=False)
            blocks.append(perf_counter() - start)
    assert min(blocks) < 2 * min(once) + 0.1


def test_unconnected_sources_and_silent_networks() -> None:
    none = Synapses.from_coo([], [], 0.0, delays=1.0, shape=(N, N))
    x = drive((INPUTS,))[:]
    result = simulate(network(none), x, progress=False)
    np.testing.assert_array_equal(result.spikes[:], whole(network(none), x)[0].bool().numpy())
    net = CobaLIFRecurrent(0, N, NEURON, 0.1, recurrent_weights=synapses())
    result = simulate(net, torch.zeros(100, 0), record=Record(inputs=True), progress=False)
    assert not result.spikes[:].any()
    assert not result.array("input_e").any()


@pytest.mark.parametrize("kind", ["held", "dense input"])
def test_kernels_for_gpus_keep_the_same_bits(kind: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    x = drive((INPUTS,), 200)[:]
    one, other = (
        simulate(network(backend=backend, **KINDS[kind]), x, block_steps=64, record=RECORD, progress=False)
        for backend in ("triton", "reference")
    )
    assert one.spikes[:].sum() > 20
    np.testing.assert_array_equal(one.spikes[:], other.spikes[:])
    np.testing.assert_array_equal(one.traces["v"][:], other.traces["v"][:])
    assert_fields_equal(one.state, other.state)


def test_results_of_parts_of_a_batch_are_read_as_one(tmp_path: Path) -> None:
    net = network(p=HELD)
    source = PoissonSource(600.0, T, (4, INPUTS), 0.1, seed=2)
    expected = simulate(net, source, progress=False)
    assert expected.spikes[:].sum() > 50
    for part in (0, 1):
        rows = slice(2 * part, 2 * part + 2)
        source = PoissonSource(600.0, T, (4, INPUTS), 0.1, seed=2, rows=rows)
        simulate(net, source, sink=tmp_path / f"{part}.zarr", progress=False)
    joined = open_result([tmp_path / "0.zarr", tmp_path / "1.zarr"])
    np.testing.assert_array_equal(joined.spikes[:], expected.spikes[:])
    assert_fields_equal(joined.state, expected.state)


def test_graded_input_loses_nothing_where_weights_are_round() -> None:
    """Sums of 32 bits would be exact for these weights, but not for these inputs."""
    inputs = Synapses.from_coo(range(N), range(N), 1.0, shape=(N, N))
    x = torch.rand(40, N, generator=torch.Generator().manual_seed(0)) * 2e-4
    none = Synapses.from_coo([], [], 0.0, delays=1.0, shape=(N, N))
    net = CobaLIFRecurrent(N, N, NEURON, 0.1, input_weights=inputs, recurrent_weights=none)
    alone = simulate(CobaLIF(NEURON, 0.1), x, record=Record(neurons=range(N)), progress=False)
    connected = simulate(net, x, record=Record(neurons=range(N)), progress=False)
    np.testing.assert_array_equal(connected.traces["v"][:], alone.traces["v"][:])


@pytest.mark.parametrize("kind", ["sparse", "matrix", "reference", "unconnected"])
def test_parts_of_a_block_change_no_bit_and_are_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that takes long is simulated in parts, with its traces, its state, and what is under way."""
    if kind == "sparse":
        net: Any = network(p=HELD)
    elif kind == "unconnected":
        net = CobaLIF(NEURON, 0.1, backend="reference")
    else:
        torch.manual_seed(0)
        net = CobaLIFRecurrent(INPUTS, N, NEURON, 0.1, backend="reference" if kind == "reference" else "cpu")
        with torch.no_grad():
            net.input_weights.fill_(0.01)
            net.recurrent_weights.mul_(1024).round_().div_(1024)
    x = drive((N,) if kind == "unconnected" else (INPUTS,))[:]
    record, results, told = Record(neurons=[3, 1], variables=("v", "g_e")), [], []
    ticks = itertools.count(0.0, 0.5)  # a part seems to take half a second, and keeps its length
    monkeypatch.setattr("coba_triton.stream.block_run.time.perf_counter", lambda: next(ticks))
    for part in (2**16, 32):
        monkeypatch.setattr(BlockRun, "_first_part", lambda self, part=part: part)
        told.append([])
        results.append(simulate(net, x, record=record, progress=told[-1].append))
    whole, parts = results
    assert whole.spikes[:].any()
    np.testing.assert_array_equal(parts.spikes[:], whole.spikes[:])
    for name in ("v", "g_e"):
        np.testing.assert_array_equal(parts.traces[name][:], whole.traces[name][:])
    assert_fields_equal(parts.state, whole.state)
    assert told == [[0, len(x)], [0, *range(32, len(x), 32), len(x)]]


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_launch_has_fewer_steps_where_neurons_are_recorded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it writes the states of all neurons, which count as scratch."""
    net = network() if kind == "sparse" else network(torch.zeros(N, N), DENSE_INPUT)
    seen, choose = [], time_blocks.choose_block_steps

    def noted(*args: Any, **options: Any) -> int:
        seen.append(options["besides"])
        return choose(*args, **options)

    monkeypatch.setattr(time_blocks, "choose_block_steps", noted)
    for record in (Record(), Record(neurons=[0])):
        simulate(net, drive((INPUTS,)), record=record, block_steps=BLOCK, progress=False)
    plain, recorded = dict.fromkeys(seen)
    assert recorded - plain == {"sparse": 4, "dense": 3}[kind]  # v, g_e and g_i, and with delays the steps that are left
