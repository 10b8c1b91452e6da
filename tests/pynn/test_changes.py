"""What changes between two runs: parameters, weights, delays, states, spikes to come, and the network itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

from pyNN.random import NumpyRNG, RandomDistribution

import coba_triton.pynn as sim
from helpers.pynn_networks import signal, spike_times

W = 0.01


def build(kind: str, delay: float = 5.0, **parameters: Any) -> tuple[Any, Any, Any, int]:
    """A source, or a neuron that fires once, onto a neuron; and the sample of the spike."""
    sim.setup(timestep=0.1)
    if kind == "source":
        pre = sim.Population(1, sim.SpikeSourceArray(spike_times=[3.0, 20.0]))
    else:
        pre = sim.Population(1, sim.IF_cond_exp(i_offset=5.0, tau_refrac=1000.0))
    post = sim.Population(2, sim.IF_cond_exp(**parameters))
    projection = sim.Projection(pre, post[0:1], sim.OneToOneConnector(), sim.StaticSynapse(weight=W, delay=delay))
    pre.record("spikes")
    post.record(["gsyn_exc", "gsyn_inh", "v"])
    return pre, post, projection, 30


@pytest.mark.parametrize("pieces", [1, 4], ids="cut_in_{}".format)
@pytest.mark.parametrize("kind", ["source", "neuron"])
@pytest.mark.parametrize("change", ["weight", "connection", "delay", "projection", "population"])
def test_spikes_under_way_keep_what_they_were_sent_with(change: str, kind: str, pieces: int) -> None:
    pre, post, projection, sample = build(kind)
    sim.run(5.0)
    if kind == "neuron":
        sample = round(spike_times(pre)[0][0] / 0.1)
    assert sample <= 50 < sample + 50
    if change == "weight":
        projection.set(weight=5 * W)
    elif change == "connection":
        for connection in projection.connections:
            connection.weight = 5 * W
    elif change == "delay":
        projection.set(delay=0.5)
    elif change == "projection":
        synapse = sim.StaticSynapse(weight=W, delay=5.0)
        sim.Projection(pre, post[0:1], sim.OneToOneConnector(), synapse, receptor_type="inhibitory")
    else:
        sim.Population(3, sim.IF_cond_exp())
    for _ in range(pieces):
        sim.run(20.0 / pieces)
    g = signal(post, "gsyn_exc")
    assert np.flatnonzero(g[:, 0])[0] == sample + 50 and g[sample + 50, 0] == W
    assert not g[:, 1].any()
    second = 200 + (5 if change == "delay" else 50)
    if kind == "source":
        grown = g[second, 0] - 0.98 * g[second - 1, 0]  # tau_syn is 5 ms
        assert grown == pytest.approx(5 * W if change in ("weight", "connection") else W, rel=1e-9)
    arrived = np.flatnonzero(signal(post, "gsyn_inh")[:, 0])
    assert (arrived[:1].tolist() == [250]) == (change == "projection" and kind == "source")


def test_several_changes_while_a_spike_is_under_way() -> None:
    _, post, projection, _ = build("source")
    sim.run(3.5)
    for factor in range(2, 20):
        projection.set(weight=factor * W)
        sim.run(0.2)
    g = signal(post, "gsyn_exc")
    sim.run(10.0)
    g = signal(post, "gsyn_exc")
    assert np.flatnonzero(g[:, 0])[0] == 80 and g[80, 0] == W and g[81, 0] == pytest.approx(0.98 * W)


def test_weights_may_be_0_and_come_back() -> None:
    sim.setup(timestep=0.1)
    source = sim.Population(1, sim.SpikeSourceArray(spike_times=[1.0, 11.0]))
    cells = sim.Population(1, sim.IF_cond_exp())
    projection = sim.Projection(
        source, cells, sim.OneToOneConnector(), sim.StaticSynapse(weight=0.0, delay=1.0), receptor_type="inhibitory"
    )
    cells.record(["gsyn_inh", "gsyn_exc"])
    sim.run(10.0)
    projection.set(weight=W)
    sim.run(10.0)
    g = signal(cells, "gsyn_inh")[:, 0]
    assert np.flatnonzero(g)[0] == 120 and g[120] == W and not signal(cells, "gsyn_exc").any()


def test_parameters_act_from_the_next_step_on() -> None:
    sim.setup(timestep=0.1)
    cells = sim.Population(3, sim.IF_cond_exp(tau_m=10.0))
    cells.record("v")
    sim.run(1.0)
    cells[1:2].set(v_rest=-55.0)
    cells[2].i_offset = 0.1
    sim.run(1.0)
    v = signal(cells, "v")
    assert (v[:11] == -65.0).all() and (v[:, 0] == -65.0).all()
    np.testing.assert_allclose(v[11, 1:] + 65.0, [0.1 / 10 * 10, 0.1 * 0.1], rtol=1e-9)
    assert cells.get("v_rest").tolist() == [-65.0, -55.0, -65.0] and cells[2].i_offset == 0.1
    assert cells[1:3][1:2].get("i_offset") == 0.1


def test_spikes_to_come_are_replaced_and_those_that_were_sent_arrive() -> None:
    source, cells, _, _ = build("source")
    sim.run(4.0)
    source.set(spike_times=[1.0, 6.0])  # one of them is in the past, and one that was given before is none any more
    sim.run(30.0)
    assert spike_times(source) == [[3.0, 6.0]]
    g = signal(cells, "gsyn_exc")[:, 0]
    jumps = np.flatnonzero(np.diff(g) > 0) + 1
    assert jumps.tolist() == [80, 110]


@pytest.mark.parametrize("after", [0.0, 2.0])
def test_states_are_set_now_and_for_every_reset(after: float) -> None:
    sim.setup(timestep=0.1)
    cells = sim.Population(3, sim.IF_cond_exp(tau_syn_E=2.5, e_rev_E=-65.0))
    cells.record(["v", "gsyn_exc"])
    if after:
        sim.run(after)
    cells.initialize(gsyn_exc=lambda i: 0.01 * i, v=-60.0)
    cells[1:2].initialize(v=-62.0)
    cells[2].set_initial_value("v", -63.0)
    sim.run(1.0)
    first = round(after / 0.1)
    g, v = signal(cells, "gsyn_exc"), signal(cells, "v")
    assert g[first].tolist() == [0.0, 0.01, 0.02] and g[first + 1, 2] == pytest.approx(0.02 * 0.96)
    assert v[0].tolist() == ([-60.0, -62.0, -63.0] if not after else [-65.0] * 3)
    assert v[first + 1, 0] == pytest.approx(-60.0 - 5 * 0.1 / 20)
    assert cells.get_data().segments[0] is not None
    assert [cells[i].get_initial_value("v") for i in range(3)] == [-60.0, -62.0, -63.0]
    sim.reset()
    sim.run(1.0)
    assert signal(cells, "v", 1)[0].tolist() == [-60.0, -62.0, -63.0]
    assert signal(cells, "gsyn_exc", 1)[0].tolist() == [0.0, 0.01, 0.02]
    assert cells[1:3].initial_values["v"][1] == -63.0


def test_reset_takes_back_what_is_under_way_and_keeps_weights() -> None:
    _, post, projection, _ = build("source")
    projection.set(weight=2 * W)
    sim.run(5.0)
    sim.reset()
    assert sim.get_current_time() == 0.0
    sim.run(12.0)
    data = post.get_data("gsyn_exc")
    assert len(data.segments) == 2
    g = signal(post, "gsyn_exc", 1)[:, 0]
    assert np.flatnonzero(g)[0] == 80 and g[80] == 2 * W and len(signal(post, "gsyn_exc", 0)) == 51


def test_new_neurons_start_with_their_initial_values() -> None:
    sim.setup(timestep=0.1)
    old = sim.Population(2, sim.IF_cond_exp(i_offset=0.3))
    old.record("v")
    sim.run(5.0)
    new = sim.Population(2, sim.IF_cond_exp(i_offset=0.3))
    new.record("v")
    sim.run(5.0)
    one, other = signal(old, "v"), signal(new, "v")
    np.testing.assert_array_equal(other[-51:], one[:51])
    assert one[-1, 0] > one[50, 0] > one[0, 0]


def uniform(low: float, high: float, seed: int) -> Any:
    return RandomDistribution("uniform", (low, high), rng=NumpyRNG(seed))


def busy(
    change: Any, dtype: str, chance: bool, i_offset: float = 0.5, unit: float | None = None, **parameters: Any
) -> np.ndarray:
    """What is recorded of a network with all kinds of synapses whose spikes are under way whenever it is changed."""
    sim.setup(timestep=0.1, dtype=dtype)
    cells = sim.Population(40, sim.IF_cond_exp(i_offset=np.linspace(i_offset, 3.0, 40), **{"tau_refrac": 2.0, **parameters}))
    noise = sim.Population(50, sim.SpikeSourcePoisson(rate=150.0, duration=0.0 if parameters else 1e6))
    projections = []
    for number, (pre, receptor) in enumerate(((noise, "excitatory"), (cells, "excitatory"), (cells, "inhibitory"))):
        for kind in (sim.StaticSynapse, sim.SimpleStochasticSynapse)[: 1 + chance]:
            weights = uniform(0.0005, 0.002, number)
            some = sim.FixedProbabilityConnector(0.4, rng=NumpyRNG(10 + number))
            projections.append(sim.Projection(pre, cells, some, kind(weight=weights), receptor_type=receptor))
            delays = 0.1 * np.random.default_rng(number).integers(1, 60, len(projections[-1]))
            projections[-1].change("delay", delays)
            if unit is not None:
                projections[-1].change("weight", unit * np.ceil(projections[-1].weights / unit))
    cells.record(["v", "gsyn_exc", "gsyn_inh"])
    for turn in range(6):
        sim.run(5.3)
        change(turn, cells, projections)
    return np.stack([signal(cells, name) for name in ("v", "gsyn_exc", "gsyn_inh")])


def nothing(turn: int, cells: Any, projections: Any) -> None:
    """Let the network as it is."""


def add_neurons(turn: int, cells: Any, projections: Any) -> None:
    sim.Population(3, sim.IF_cond_exp())


def add_sources(turn: int, cells: Any, projections: Any) -> None:
    sim.Population(3, sim.SpikeSourcePoisson(rate=100.0))


def add_silent_sources(turn: int, cells: Any, projections: Any) -> None:
    silent = sim.Population(3, sim.SpikeSourceArray(spike_times=[1e6]))
    sim.Projection(silent, cells, sim.AllToAllConnector(), sim.StaticSynapse(weight=1e-9, delay=1.0 + turn))


def add_a_network(turn: int, cells: Any, projections: Any) -> None:
    others = sim.Population(3, sim.IF_cond_exp())
    sim.Projection(others, others, sim.AllToAllConnector(), sim.StaticSynapse(weight=1e-9, delay=1.0 + turn))
    sim.Projection(cells, others, sim.AllToAllConnector(), sim.StaticSynapse(weight=1e-9, delay=0.1))


def set_the_same(turn: int, cells: Any, projections: Any) -> None:
    projections[-1].change("weight", projections[-1].weights.copy())
    projections[-2].change("delay", projections[-2].delays)


@pytest.mark.parametrize("chance", [False, True], ids=["static", "uncertain"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("change", [add_neurons, add_sources, add_silent_sources, add_a_network, set_the_same])
def test_what_is_under_way_keeps_its_bits(change: Any, dtype: str, chance: bool) -> None:
    """It is added up with what arrives later in the same steps as if nothing had been changed in between."""
    expected = busy(nothing, dtype, chance)
    assert (np.ptp(expected, 1) > 0).all()
    np.testing.assert_array_equal(busy(change, dtype, chance), expected)


@pytest.mark.parametrize(
    ("factor", "chance", "rounded"),
    [
        (2.0, False, False),
        (2.0, True, False),
        (0.5, True, False),
        (1e-3, False, False),
        (1e6, False, False),
        (1.1, False, True),
    ],
)
def test_what_is_under_way_keeps_its_bits_whatever_later_spikes_weigh(factor: float, chance: bool, rounded: bool) -> None:
    """Each cell fires once, before the first change: all that arrives was sent with the weights of that time.

    Sums of weights that are ``rounded`` to few bits are narrow, and those of other weights are not.
    """
    once = dict(tau_refrac=1e6, cm=0.05)

    def change(turn: int, cells: Any, projections: Any) -> None:
        for projection in projections[1 + chance :]:
            projection.change("weight", projection.weights * factor)

    def run(change: Any) -> np.ndarray:
        return busy(change, "float64", chance, 2.5, 2.0**-14 if rounded else None, **once)

    expected = run(nothing)
    assert expected[1:, 54:].any()
    np.testing.assert_array_equal(run(change), expected)


@pytest.mark.parametrize("unit", [None, 2.0**-14], ids=["any", "few_bits"])
def test_a_sum_of_almost_all_that_a_neuron_can_get_keeps_its_bits(unit: float | None) -> None:
    """What was sent before a change and is nearly all of it arrives together with what is sent after it."""

    def run(change: bool, delays: tuple[float, float] = (10.0, 0.1)) -> tuple[np.ndarray, list[list[float]]]:
        sim.setup(timestep=0.1)
        pre = sim.Population(2, sim.IF_cond_exp(i_offset=[5.0, 2.0], tau_refrac=1e6))
        post = sim.Population(200, sim.IF_cond_exp(v_thresh=1000.0))
        post.initialize(gsyn_exc=0.07)
        pre.record("spikes")
        post.record("gsyn_exc")
        rng = np.random.default_rng(1)
        for cell, low, delay in zip((0, 1), (0.1, 0.001), delays, strict=True):
            synapse = sim.StaticSynapse(weight=0.0, delay=delay)
            projection = sim.Projection(pre[cell : cell + 1], post, sim.AllToAllConnector(), synapse)
            weights = rng.uniform(low, 2 * low, 200)
            projection.change("weight", weights if unit is None else unit * np.ceil(weights / unit))
        sim.run(5.0)
        if change:
            sim.Population(1, sim.IF_cond_exp())
        sim.run(20.0)
        return signal(post, "gsyn_exc"), spike_times(pre)

    (early,), (late,) = run(False)[1]
    assert early < 5.0 < late < 15.0
    delays = round(late - early + 0.1, 1), 0.1
    (expected, _), (got, _) = run(False, delays), run(True, delays)
    assert expected[round(late / 0.1) + 1].min() > 0.1
    np.testing.assert_array_equal(got, expected)
