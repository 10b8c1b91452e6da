"""Long runs against one call over the whole input, whatever keeps them, and what their results say."""

from __future__ import annotations

import csv
import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from coba_triton import (
    CobaLIF,
    CobaLIFCell,
    CobaLIFFeedForwardState,
    CobaLIFRecurrent,
    CobaLIFState,
    EventSource,
    MemorySink,
    NpzSink,
    PoissonSource,
    Record,
    Result,
    ZarrSink,
    open_result,
    simulate,
)
from coba_triton.backend.cpu.launch.recurrent import DENSE_RATE
from coba_triton.stream import plotting
from helpers.runs import INPUTS, NEURON, PER_NEURON, RECORD, N, T, drive, recurrent, whole

NETWORKS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "feed-forward": (lambda: CobaLIF(NEURON, 0.1), (N,)),
    "per-neuron": (lambda: CobaLIF(PER_NEURON, 0.1), (N,)),
    "broadcast": (lambda: CobaLIF(PER_NEURON, 0.1), (1,)),
    "recurrent": (recurrent, (INPUTS,)),
    "batch": (recurrent, (1, INPUTS)),
}


def assert_equal(result: Result, spikes: Tensor, states: Any, shape: tuple[int, ...]) -> None:
    assert (result.steps, result.finished, result.shape) == (T, True, shape)
    assert 50 < spikes.sum() < T * N / 10
    np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())
    for name in ("v", "g_e", "g_i"):
        np.testing.assert_array_equal(result.traces[name][:], getattr(states, name).flatten(1)[:, [7, 0]].numpy())
    flat = spikes.flatten(1).numpy()
    np.testing.assert_array_equal(result.counts(1, "first"), flat[:, :5].sum(1))
    np.testing.assert_array_equal(result.counts(30, "odd"), [flat[k : k + 30, 1::2].sum() for k in range(0, T, 30)])
    np.testing.assert_array_equal(result.counts(7), [flat[k : k + 7].sum() for k in range(0, T, 7)])


@pytest.mark.parametrize("sink", [None, "run.npz", "run.zarr"])
@pytest.mark.parametrize("network", NETWORKS)
def test_result_is_that_of_one_call(network: str, sink: str | None, tmp_path: Path) -> None:
    make, shape = NETWORKS[network]
    source, net = drive(shape), make()
    spikes, states = whole(net, source[:])
    path = None if sink is None else tmp_path / sink
    result = simulate(net, source, sink=path, record=RECORD, block_steps=96, progress=False)
    assert_equal(result, spikes, states, tuple(spikes.shape[1:]))
    if path is not None:
        assert_equal(open_result(path), spikes, states, tuple(spikes.shape[1:]))


@pytest.mark.parametrize("block_steps", [1, 33, 512, None])
def test_block_length_changes_nothing(block_steps: int | None) -> None:
    network, source = recurrent(), drive((INPUTS,))
    spikes, states = whole(network, source[:])
    assert_equal(simulate(network, source, record=RECORD, block_steps=block_steps), spikes, states, (N,))


def test_default_block_is_longer_where_the_input_is_not_copied() -> None:
    x = torch.zeros(64, 2048)

    def block_steps(source: Any, **options: Any) -> int:
        result = simulate(CobaLIF(NEURON, 0.1), source, progress=False, **options)
        return int(result.attributes["block_steps"])

    assert block_steps(x) == block_steps(x.numpy()) == block_steps(x.half()) == 65_536
    copied = 2**26 // (4 * 2048 + 2048 // 8) // 32 * 32 + 32
    assert block_steps(x, record=Record(inputs=True)) == copied
    assert block_steps(x.numpy()[::-1]) == copied
    assert block_steps(x.int()) == copied


@pytest.mark.parametrize(
    "source", [PoissonSource(10.0, 40, 5), EventSource([0.01], [0], 5, steps=40)], ids=["rates", "events"]
)
def test_a_source_of_another_time_step_is_refused(source: Any) -> None:
    """Its spikes would come at another rate than it was asked for."""
    message = "source must have the network's time step, dt=1 ms, got dt=0.001 ms; make the source with dt=1"
    with pytest.raises(ValueError, match=message):
        simulate(CobaLIF(), source, progress=False)


def test_initial_state() -> None:
    network, source = CobaLIF(NEURON, 0.1), drive()
    start = CobaLIFFeedForwardState(torch.linspace(-65.0, -51.0, N), 0.01, 0.0)
    spikes, states = whole(network, source[:], start)
    assert_equal(simulate(network, source, state=start, record=RECORD, block_steps=64), spikes, states, (N,))


def test_float64_and_learned_parameters() -> None:
    network = CobaLIF(NEURON, 0.1, learn=("v_thresh", "c_m_inv")).double()
    x = drive()[:].double()
    spikes, states = whole(network, x)
    result = simulate(network, x, record=RECORD, block_steps=64)
    assert_equal(result, spikes, states, (N,))
    assert result.traces["v"][:].dtype == np.float64


@pytest.mark.parametrize("sink", ["run.npz", "run.zarr"])
def test_length_of_an_iterable_need_not_be_known(sink: str, tmp_path: Path) -> None:
    network, x = CobaLIF(NEURON, 0.1), drive()[:]
    spikes, states = whole(network, x)
    simulate(network, iter(x.split(130)), sink=tmp_path / sink, record=RECORD, block_steps=64, progress=False)
    result = open_result(tmp_path / sink)
    assert_equal(result, spikes, states, (N,))
    assert result.array("input_e").shape == (T,)


def test_events_and_rates() -> None:
    network, source = CobaLIF(NEURON, 0.1), drive()
    spikes = whole(network, source[:])[0].bool()
    result = simulate(network, source, block_steps=64)
    steps, neurons = (index.numpy() for index in spikes.nonzero(as_tuple=True))
    times, found = result.events()
    np.testing.assert_allclose(times, (steps + 1) * 0.1)
    np.testing.assert_array_equal(found, neurons)
    times, found = result.events(130, 777, neurons=[3, 11])
    chosen = (steps >= 130) & (steps < 777) & np.isin(neurons, [3, 11])
    np.testing.assert_allclose(times, (steps[chosen] + 1) * 0.1)
    np.testing.assert_array_equal(found, neurons[chosen])
    np.testing.assert_allclose(result.firing_rates(), spikes.sum(0).numpy() / 0.1)
    edges, rates = result.rates(3.0, neurons=[3, 11])
    np.testing.assert_allclose(edges, [*np.arange(0, 100, 3.0), 100])
    np.testing.assert_allclose(rates[5], spikes[150:180, [3, 11]].sum() / 0.003 / 2, rtol=1e-6)
    np.testing.assert_allclose(rates[-1], spikes[990:, [3, 11]].sum() / 0.001 / 2, rtol=1e-6)


@pytest.mark.parametrize(
    "key", [5, -1, slice(3, 700, 7), slice(None, 40), (slice(31, 65), 3), (slice(64, 64),), (slice(0, 9), [2, 0])]
)
def test_dense_slices(key: Any) -> None:
    network, source = CobaLIF(NEURON, 0.1), drive()
    spikes = whole(network, source[:])[0].bool().numpy()
    result = simulate(network, source, block_steps=64)
    np.testing.assert_array_equal(result.spikes[key], spikes[key])


def in_memory(events: list[tuple[int, int]], steps: int = 200, neurons: int = 4) -> Result:
    """A result that has these spikes (step, neuron)."""
    dense = np.zeros((-(-steps // 32) * 32, neurons), np.int64)
    dense[tuple(zip(*events, strict=True))] = 1
    words = (dense.reshape(-1, 32, neurons) << np.arange(32)[:, None]).sum(1).astype(np.uint32).view(np.int32)
    config = {"neurons": [neurons], "dt_ms": 0.1, "record": {"populations": {}}}
    return Result({"config": config, "steps_done": steps, "finished": True}, {"spikes": words})


@pytest.mark.parametrize("read_bytes", [1, 2**24], ids=["block-by-block", "at-once"])
def test_intervals(read_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coba_triton.stream.results.READ_BYTES", read_bytes)
    lengths = np.array([5, 15, 5, 125])
    irregular = np.cumsum([3, *lengths])
    result = in_memory([*((t, 0) for t in (0, 40, 80, 120, 160)), *((t, 2) for t in irregular.tolist()), (7, 1), (9, 1)])
    found = result.intervals()
    assert found.number.tolist() == [4, 1, 4, 0]
    np.testing.assert_allclose(found.mean[:3], [4.0, 0.2, lengths.mean() * 0.1])
    assert found.cv[0] == 0
    assert found.cv[2] == pytest.approx(lengths.std() / lengths.mean())
    assert np.isnan(found.cv[[1, 3]]).all()  # too few
    edges = np.array([0, 0.4, 1.0, 5.0, 20.0])
    assert result.interval_counts(edges).tolist() == [1, 2, 5, 1]
    assert result.interval_counts(edges, [2]).tolist() == [0, 2, 1, 1]


def test_synchrony() -> None:
    together = in_memory([(t, n) for t in (10, 90, 150) for n in range(4)])
    counts = np.zeros(6)
    counts[[0, 3, 5]] = 4  # whole bins of 30 steps
    counts = counts[:6]
    assert together.synchrony(3.0) == pytest.approx(np.var(counts) / np.mean(counts))
    assert np.isnan(in_memory([(0, 0)], steps=40).synchrony(3.0))
    noise = np.random.default_rng(0).random((30_000, 50)) < 0.01
    events = list(zip(*(index.tolist() for index in noise.nonzero()), strict=True))
    assert in_memory(events, 30_000, 50).synchrony(3.0) == pytest.approx(1, abs=0.2)  # sd 0.045


def test_plain_zarr_reads_it(tmp_path: Path) -> None:
    """What the README shows."""
    zarr = pytest.importorskip("zarr")
    network, source = CobaLIF(NEURON, 0.1), drive()
    simulate(network, source, sink=tmp_path / "run.zarr", record=RECORD, block_steps=96, progress=False)
    run = zarr.open_group(tmp_path / "run.zarr", mode="r")
    steps = int(run["progress"][0])
    words = run["spikes"][: -(-steps // 32)]
    spikes = ((words[:, None] >> np.arange(32)[:, None]) & 1).reshape(-1, words.shape[1])[:steps]
    step, neuron = spikes.nonzero()
    expected = whole(network, source[:])[0].nonzero()
    np.testing.assert_array_equal(np.stack([step, neuron], 1), expected.numpy())
    assert run["v"].shape == (T, 2)
    assert run["recorded"][:].tolist() == [7, 0]
    config = run.attrs["config"]
    assert config["parameters"]["v_thresh"] == -50.0
    assert config["source"]["seed"] == 2
    assert run.attrs["versions"]["torch"] == torch.__version__
    assert run.metadata.zarr_format == 3


def test_parameters_of_every_neuron_are_kept(tmp_path: Path) -> None:
    simulate(CobaLIF(PER_NEURON, 0.1), drive(), sink=tmp_path / "run.zarr", progress=False)
    result = open_result(tmp_path / "run.zarr")
    np.testing.assert_array_equal(result.parameter("v_thresh"), PER_NEURON.v_thresh.numpy())
    np.testing.assert_array_equal(result.parameter("v_reset"), np.full(N, -65.0))


def test_attributes_and_arrays_of_the_caller(tmp_path: Path) -> None:
    for sink in (ZarrSink, NpzSink):
        path = tmp_path / f"run.{sink.__name__[:-4].lower()}"
        keep = sink(path, attributes={"animal": "a mouse"}, arrays={"signal": np.arange(5.0)})
        simulate(CobaLIF(NEURON, 0.1), drive(), sink=keep, progress=False)
        result = open_result(path)
        assert result.attributes["config"]["attributes"] == {"animal": "a mouse"}
        np.testing.assert_array_equal(result.array("signal"), np.arange(5.0))
        with pytest.raises(KeyError, match="the result has no array 'noise'; it has"):
            result.array("noise")


def test_csv(tmp_path: Path) -> None:
    result = simulate(CobaLIF(NEURON, 0.1), drive(), block_steps=64)
    result.to_csv(tmp_path / "events.csv")
    with (tmp_path / "events.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    times, neurons = result.events()
    assert header == ["time_ms", "neuron"]
    np.testing.assert_allclose([float(time) for time, _ in rows], times)
    assert [int(neuron) for _, neuron in rows] == neurons.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["events.csv"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_neo_and_elephant() -> None:
    pytest.importorskip("neo", reason="the extra neo is not installed")
    result = simulate(CobaLIF(NEURON, 0.1), drive(), record=RECORD, block_steps=64)
    (segment,) = result.to_neo().segments
    times, neurons = result.events()
    assert len(segment.spiketrains) == N
    for neuron, train in enumerate(segment.spiketrains):
        np.testing.assert_allclose(train.rescale("ms").magnitude, times[neurons == neuron])
        assert float(train.t_stop.rescale("ms")) == pytest.approx(100)
    signal = next(s for s in segment.analogsignals if s.name == "v")
    np.testing.assert_array_equal(signal.magnitude, result.traces["v"][:])
    assert str(signal.units.dimensionality) == "mV"
    assert float(signal.times[0].rescale("ms")) == pytest.approx(0.1)
    statistics = pytest.importorskip("elephant.statistics", reason="elephant is not installed")
    busiest = int(result.spike_counts().argmax())
    cv = statistics.cv(statistics.isi(segment.spiketrains[busiest]))
    assert result.intervals().cv[busiest] == pytest.approx(float(cv), rel=1e-6)


@pytest.mark.parametrize(
    ("package", "call", "message"),
    [
        ("xxhash", lambda r: simulate(CobaLIF(NEURON, 0.1), drive(), sink="x.zarr"), 'pip install "coba-triton[stream]"'),
        ("neo", lambda r: r.to_neo(), 'pip install "coba-triton[neo]"'),
    ],
)
def test_missing_extra(
    package: str, call: Callable[[Result], Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = simulate(CobaLIF(NEURON, 0.1), drive())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=re.escape(message)):
        call(result)


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[int] = []
    simulate(CobaLIF(NEURON, 0.1), drive(), block_steps=320, progress=told.append)
    assert told == [0, 320, 640, 960, 1000]


BACKENDS = ["cpu", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_that_is_not_finite_ends_the_run(backend: str) -> None:
    x = torch.zeros(T, N)
    x[500] = 1e38
    with pytest.raises(FloatingPointError, match="the state is no longer finite after step 512, as the Euler step"):
        simulate(CobaLIF(NEURON, 0.1, backend=backend), x, block_steps=64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_cause_in_the_input_is_named(value: float, backend: str) -> None:
    x = torch.zeros(T, 2, 10)
    x[501, 1, 3] = value
    message = f"no longer finite after step 512, as the source has {value} in step 501, channel [1, 3]; correct it"
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        simulate(CobaLIF(NEURON, 0.1, backend=backend), x, block_steps=64)
    network = CobaLIFRecurrent(10, N, NEURON, 0.1, backend=backend)
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        simulate(network, x, block_steps=64)


def with_nan(name: str) -> CobaLIFRecurrent:
    network = recurrent(learn=("g_l",))
    with torch.no_grad():
        getattr(network, name).view(-1)[2 if "weights" in name else 0] = torch.nan
    return network


@pytest.mark.parametrize(
    ("network", "state", "message"),
    [
        (lambda: with_nan("input_weights"), None, "input_weights must be finite, got nan at [0, 2]"),
        (lambda: with_nan("recurrent_weights"), None, "recurrent_weights must be finite, got nan at [0, 2]"),
        (lambda: with_nan("g_l"), None, "g_l must be finite, got nan; correct it"),
        (
            lambda: recurrent(NEURON._replace(g_l=torch.linspace(0.01, -0.01, N))),
            None,
            "g_l must not be negative, got -0.0005",
        ),
        (
            recurrent,
            CobaLIFState(0.0, torch.full((N,), torch.inf), 0.0, 0.0),
            "state.v must be finite, got inf at [0]",
        ),
    ],
    ids=["input weights", "weights", "parameter", "parameters", "state"],
)
def test_cause_in_an_argument_is_named(network: Callable[[], Any], state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        simulate(network(), drive((INPUTS,)), state=state)


def warned(network: Any, source: Any, **options: Any) -> list[str]:
    """The warnings of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        simulate(network, source, **options)
    return [str(warning.message) for warning in caught]


CHOICES = {
    "mask": np.arange(N) % 5 == 1,
    "negative": [-19, -14, -9, -4],
    "both": [1, -14, 11, -4, 16, 1],
    "slice": slice(1, None, 5),
    "tensor": torch.arange(1, N, 5),
    "mask as a list": [n % 5 == 1 for n in range(N)],
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_neurons_are_chosen_by_index_slice_or_mask(choice: Any) -> None:
    """Four of twenty, however they are named: the rate is theirs, and so are counts, events and intervals."""
    result = simulate(CobaLIF(NEURON, 0.1), drive(), record=Record(neurons=[1, 6, 11, 16]), progress=False)
    spikes = result.spikes[:][:, 1::5]
    assert spikes.sum() > 50
    edges, rates = result.rates(50.0, choice)
    np.testing.assert_allclose(rates, spikes.reshape(2, -1).sum(1) / 4 / 0.05)
    np.testing.assert_allclose(edges, [0.0, 50.0, 100.0])
    np.testing.assert_array_equal(result.counts(500, choice), spikes.reshape(2, -1).sum(1))
    assert len(result.events(neurons=choice)[0]) == spikes.sum()
    np.testing.assert_array_equal(result.interval_counts([0, 1e3], choice), [spikes.sum() - 4])
    expected = result.synchrony(5.0, [1, 6, 11, 16])
    assert result.synchrony(5.0, choice) == expected
    again = simulate(CobaLIF(NEURON, 0.1), drive(), record=Record(neurons=choice), progress=False)
    assert set(again.recorded) == {1, 6, 11, 16}
    np.testing.assert_array_equal(again.traces["v"][:, [0]], result.traces["v"][:, [0]])
    figure = Figure()
    plotting.plot_traces(result, figure.subplots(), neurons=choice)
    assert len([line for line in figure.axes[0].lines if "neuron" in str(line.get_label())]) == len(again.recorded)


def test_no_neurons_have_no_rate() -> None:
    record = Record(populations={"none": [], "some": [0]})
    result = simulate(CobaLIF(NEURON, 0.1), drive(), record=record, progress=False)
    for nobody in ("none", [], np.zeros(N, bool), slice(0)):
        assert np.isnan(result.rates(50.0, nobody)[1]).all() and not result.counts(500, nobody).any()
    assert not np.isnan(result.rates(50.0, "some")[1]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.rates(math.nan), "bin_ms must be a positive finite number of ms, got nan"),
        (lambda r: r.rates(-5.0), "bin_ms must be a positive finite number of ms, got -5.0"),
        (lambda r: r.synchrony(math.inf), "bin_ms must be a positive finite number of ms, got inf"),
        (lambda r: r.counts(0), "bin_steps must be a positive int, got 0"),
        (lambda r: r.rates(5.0, [N]), "neurons must be indices from 0 to 19"),
        (lambda r: r.rates(5.0, [0.5]), "neurons must be indices from 0 to 19"),
        (lambda r: r.counts(5, [True, False]), "neurons must be indices from 0 to 19"),
        (lambda r: r.events(neurons=[[0], [1]]), "they have several axes"),
        (lambda r: r.interval_counts([0, 1], {"a": 1}), "neurons must be indices from 0 to 19"),
    ],
)
def test_message_of_a_result(call: Callable[[Result], Any], message: str) -> None:
    result = simulate(CobaLIF(NEURON, 0.1), drive(steps=96), progress=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(result)
    assert len(result.rates(1e300)[1]) == len(result.counts(10**30)) == 1  # one bin, however wide


def test_unstable_conductances_are_warned_of_once() -> None:
    found = warned(CobaLIF(NEURON, 0.1), torch.full((T, N), 2.0), block_steps=64)
    assert [m[:56] for m in found if "Euler" in m] == ["the Euler step is unstable: dt * c_m_inv * (g_l + g_e + "]
    found = warned(CobaLIF(NEURON, 0.1), torch.linspace(0, 0.3, T)[:, None].expand(T, N), block_steps=64)
    reached = "dt * c_m_inv * (g_l + g_e + g_i) has reached # by step #, more than #"
    assert [re.sub("[0-9.]+", "#", m) for m in found if "Euler" in m] == [
        f"the Euler step overshoots: {reached}; make dt or the weights smaller",
        f"the Euler step is unstable: {reached}, and the spikes mean nothing; make dt or the weights smaller",
    ]


def test_what_is_unstable_at_rest_is_warned_of_once() -> None:
    """By the module, and not again by its calls and runs; but of what comes on top of it."""
    with pytest.warns(UserWarning, match="overshoots: dt .* is 1.5 at the given state"):
        network = CobaLIF(NEURON._replace(g_l=3.0), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(torch.zeros(5, N))
    assert not warned(network, torch.zeros(64, N))
    (unstable,) = (m for m in warned(network, torch.full((64, N), 0.3)) if "Euler" in m)
    assert "is unstable" in unstable and "more than 2" in unstable
    with pytest.warns(UserWarning, match="tau_syn_exc_inv is 2"):
        CobaLIF(NEURON._replace(tau_syn_exc_inv=20.0), 0.1)


@pytest.mark.parametrize("steps", [64, T], ids=["blocks", "one block"])
def test_neurons_that_fire_in_every_step(steps: int) -> None:
    """A weight in nS that is given as one in uS."""
    source = PoissonSource(100.0, T, (N,), 0.1, weight=2.0, seed=2)
    found = warned(CobaLIF(NEURON, 0.1), source, block_steps=steps)
    (message,) = (m for m in found if "every step" in m)
    assert re.search(r"\d+ of 20 neurons fire in every step \(32 in a row by step .* in uS \(1 nS is 0.001 uS\)", message)
    assert not warned(CobaLIF(NEURON, 0.1), drive(), block_steps=steps)


def test_rates_of_a_module_are_looked_at_when_it_runs() -> None:
    network = CobaLIF(NEURON, 0.1)
    network.tau_syn_exc_inv.fill_(11.0)
    with pytest.warns(UserWarning, match=r"dt \* tau_syn_exc_inv is 1.1, more than 1"):
        simulate(network, torch.zeros(32, N))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_recurrent_network_without_input(batch: tuple[int, ...], backend: str) -> None:
    network = CobaLIFRecurrent(0, N, NEURON._replace(v_rest=-45.0), 0.1, backend=backend)
    network.recurrent_weights.data.copy_(torch.randint(-3, 3, (N, N), generator=torch.Generator().manual_seed(0)) / 1024)
    x = torch.zeros(T, *batch, 0)
    spikes, states = whole(network, x)
    assert spikes.sum() > 50
    record = Record(neurons=[7, 0], inputs=True)
    result = simulate(network, x, record=record, block_steps=96)
    np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())
    np.testing.assert_array_equal(result.traces["v"][:], states.v.flatten(1)[:, [7, 0]].numpy())
    assert not result.array("input_e").any()
    with torch.no_grad():
        network.reset_parameters()
    assert network.recurrent_weights.any()
    with pytest.raises(ValueError, match=re.escape("got shape [0, 0]; leave")):
        simulate(network, torch.zeros(T, 0, 0))


@pytest.mark.parametrize("wrap", ["compile", "DataParallel", "AveragedModel", "both"])
def test_wrapped_modules(wrap: str) -> None:
    network, source = recurrent(), drive((INPUTS,))
    want = simulate(network, source).spikes[:]
    wrapped: Any = network
    if wrap in ("DataParallel", "both"):
        wrapped = torch.nn.DataParallel(wrapped)
    if wrap == "AveragedModel":
        wrapped = torch.optim.swa_utils.AveragedModel(wrapped)
    if wrap in ("compile", "both"):
        wrapped = torch.compile(wrapped)
    np.testing.assert_array_equal(simulate(wrapped, source).spikes[:], want)


def test_distributed_module(tmp_path: Path) -> None:
    """Wrapped before there is anything to train."""
    network, source = recurrent(), drive((INPUTS,))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        wrapped: Any = torch.nn.parallel.DistributedDataParallel(network)
        np.testing.assert_array_equal(simulate(wrapped, source).spikes[:], simulate(network, source).spikes[:])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"network": CobaLIFCell(3, 2)}, TypeError, "network must be a CobaLIF or a CobaLIFRecurrent, got CobaLIFCell"),
        ({"sink": 3}, TypeError, "sink must be None, a path, or a sink such as ZarrSink, got int"),
        ({"sink": "run.h5"}, ValueError, "sink must be a path that ends in .zarr or .npz, got 'run.h5'"),
        ({"block_steps": 0}, ValueError, "block_steps must be a positive int or None"),
        ({"source": torch.zeros(5, 0)}, ValueError, "a step of source must have at least one number, got shape [0]; leave"),
        (
            {"record": Record(neurons=[N])},
            ValueError,
            "record.neurons must be indices from 0 to 19 (negative ones count from the end) or one boolean for each of 20",
        ),
        ({"record": Record(neurons=[[0, 1], [2, 3]])}, ValueError, "got [[0, 1], [2, 3]] (they have several axes)"),
        ({"record": Record(neurons=np.ones((4, 5), bool))}, ValueError, "(they have several axes)"),
        ({"record": Record(neurons=[True, False])}, ValueError, "record.neurons must be indices from 0 to 19"),
        ({"record": Record(neurons=[10**400])}, ValueError, "record.neurons must be indices from 0 to 19"),
        ({"record": Record(neurons="first")}, ValueError, "record.neurons must be indices from 0 to 19"),
        ({"record": Record(populations={"a": [[0], [1]]})}, ValueError, "(they have several axes)"),
        ({"record": Record(variables=("w",))}, ValueError, "record.variables must be among 'v', 'g_e' and 'g_i'"),
        ({"record": Record(populations={"a": [0.5]})}, ValueError, "record.populations['a'] must be indices from 0 to 19"),
        ({"resume": True}, ValueError, "MemorySink cannot resume: it keeps nothing until the end; pass a ZarrSink"),
    ],
)
def test_message(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"network": CobaLIF(NEURON, 0.1), "source": drive(), "sink": MemorySink()} | change
    with pytest.raises(error, match=re.escape(message)):
        simulate(**arguments)


def test_spikes_that_were_not_recorded(tmp_path: Path) -> None:
    record = Record(spikes=False, neurons=[7, 0], populations={"first": range(5)})
    network, source = CobaLIF(NEURON, 0.1), drive()
    result = simulate(network, source, sink=tmp_path / "run.zarr", record=record, block_steps=96, progress=False)
    spikes, states = whole(network, source[:])
    np.testing.assert_array_equal(result.traces["v"][:], states.v[:, [7, 0]].numpy())
    np.testing.assert_array_equal(result.counts(10, "first"), spikes[:, :5].reshape(100, 50).sum(1).numpy())
    with pytest.raises(ValueError, match="the spikes were not recorded; run again with Record"):
        result.events()


@pytest.mark.filterwarnings("ignore:.*neurons fire in every step", "ignore:the Euler step overshoots")
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(("rate", "threshold"), [(600.0, -50.0), (6000.0, -64.9)], ids=["events", "matrix-products"])
def test_traces_of_connected_neurons_in_several_rows(rate: float, threshold: float, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("the CPU tensors of this test need Triton's interpreter")
    network = recurrent(NEURON._replace(v_thresh=threshold), backend=backend, block_steps=32)
    source = PoissonSource(rate, 150, (3, INPUTS), 0.1, seed=2)
    chosen = [3 * N - 1, 2, 2, N, 0]
    result = simulate(network, source, record=Record(variables=("v", "g_e", "g_i"), neurons=chosen), block_steps=96)
    spikes, states = whole(network, source[:])
    assert (spikes[:32].mean() > DENSE_RATE) == (rate > 1000)
    np.testing.assert_array_equal(result.spikes[:], spikes.bool().numpy())
    for name in ("v", "g_e", "g_i"):
        np.testing.assert_array_equal(result.traces[name][:], getattr(states, name).flatten(1)[:, chosen].numpy())
