"""Synapses that transmit a spike with a probability."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

from pyNN import errors
from pyNN.random import NumpyRNG, RandomDistribution

import coba_triton.pynn as sim
from helpers.pynn_networks import signal, spike_times

W = 2.0**-6


def network(pieces: list[float], p: float | None = 0.5, seed: int = 42, delay: Any = 0.3, **options: Any) -> Any:
    """Cells that excite each other and are driven by sources, whose synapses transmit with ``p``, or always."""
    sim.setup(timestep=0.1, rng_seed=seed, **options)
    noise = sim.Population(20, sim.SpikeSourcePoisson(rate=300.0))
    cells = sim.Population(30, sim.IF_cond_exp(tau_refrac=2.0))

    def synapse(weight: float) -> Any:
        if p is None:
            return sim.StaticSynapse(weight=weight, delay=delay)
        return sim.SimpleStochasticSynapse(weight=weight, delay=delay, p=p)

    some = sim.FixedProbabilityConnector(0.3)
    sim.Projection(noise, cells, some, synapse(W / 4))
    sim.Projection(cells, cells, some, synapse(W / 2))
    sim.Projection(cells, cells, some, synapse(W), receptor_type="inhibitory")
    sim.Projection(noise, cells, some, sim.StaticSynapse(weight=W / 8, delay=0.7))
    cells.record(["spikes", "v", "gsyn_exc", "gsyn_inh"])
    for piece in pieces:
        sim.run(piece)
    return cells


def traces(cells: Any, segment: int = 0) -> np.ndarray:
    return np.stack([signal(cells, name, segment) for name in ("v", "gsyn_exc", "gsyn_inh")])


def test_the_same_bits_wherever_runs_are_cut() -> None:
    cells = network([60.0])
    whole, spikes = traces(cells), spike_times(cells)
    assert sum(map(len, spikes)) > 50
    cells = network([0.1, 13.3, 0.2, 0.1, 20.0, 26.3])
    assert np.array_equal(traces(cells), whole) and spike_times(cells) == spikes
    assert not np.array_equal(traces(network([60.0], seed=43)), whole)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_probability_of_one_is_a_static_synapse(dtype: str) -> None:
    always, static = (traces(network([60.0], p, dtype=dtype)) for p in (1.0, None))
    assert np.array_equal(always, static)
    assert signal(network([60.0], 0.0), "gsyn_inh").max() == 0


def test_delays_of_one_step_and_of_each_synapse() -> None:
    for delay in (0.1, RandomDistribution("uniform", (0.1, 2.0), rng=NumpyRNG(2))):
        always, static = (traces(network([20.0], p, delay=delay)) for p in (1.0, None))
        assert np.array_equal(always, static)


def test_static_inputs_beside_uncertain_ones_may_have_a_weight_for_each_source() -> None:
    """What the sources send is then added up with what transmits by chance, and has to be the same as without any chance."""
    found = []
    for chance in (True, False):
        sim.setup(timestep=0.1)
        cells = sim.Population(4, sim.IF_cond_exp())
        pairs = sim.Population(2, sim.SpikeSourceArray(spike_times=[1.0])), sim.Population(3, sim.SpikeSourceArray())
        pairs[1].set(spike_times=[2.0])
        for sources, weight in zip(pairs, (W, W / 4), strict=True):
            sim.Projection(sources, cells, sim.AllToAllConnector(), sim.StaticSynapse(weight=weight, delay=0.5))
        if chance:
            sim.Projection(cells, cells, sim.AllToAllConnector(), sim.SimpleStochasticSynapse(weight=W, p=0.0))
        cells.record("gsyn_exc")
        sim.run(4.0)
        found.append(signal(cells, "gsyn_exc"))
    assert np.array_equal(*found)
    assert found[0][15, 0] == 2 * W and found[0][24].max() < found[0][25].min()


def test_every_segment_draws_anew_and_the_same_again() -> None:
    found = []
    for _ in range(2):
        cells = network([20.0])
        sim.reset()
        sim.run(20.0)
        found.append([traces(cells, segment) for segment in (0, 1)])
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(*found[0])


def imposed(p: Any, per_step: int = 1, cells: int = 40) -> tuple[Any, Any]:
    """A source with 1000 steps of ``per_step`` spikes onto cells whose conductances last for one step."""
    sim.setup(timestep=0.1)
    source = sim.Population(1, sim.SpikeSourceArray(spike_times=np.repeat(np.arange(1, 1001) * 0.3, per_step)))
    post = sim.Population(cells, sim.IF_cond_exp(tau_syn_E=0.1, v_thresh=1000.0))
    synapse = sim.SimpleStochasticSynapse(weight=W, delay=0.5, p=p)
    projection = sim.Projection(source, post, sim.AllToAllConnector(), synapse)
    post.record("gsyn_exc")
    return post, projection


def arrived(post: Any) -> np.ndarray:
    """How many spikes arrived at each cell, of those of each of the 1000 steps."""
    g = signal(post, "gsyn_exc") / W
    at = 3 * np.arange(1, 1001) + 5
    assert np.array_equal(g, np.rint(g)) and g.sum() == g[at].sum()
    return g[at].astype(int)


@pytest.mark.parametrize("per_step", [1, 4])
def test_each_spike_and_each_synapse_draws_for_itself(per_step: int) -> None:
    post, _ = imposed(0.3, per_step)
    sim.run(310.0)
    counts = arrived(post)
    assert abs(counts.mean() / per_step - 0.3) < 4 * np.sqrt(0.21 / 40_000)
    assert abs(counts.var() / (0.21 * per_step) - 1) < 0.05  # that of a binomial distribution
    assert abs(counts.sum(0).std() / np.sqrt(0.21 * per_step * 1000) - 1) < 0.5
    of_cells, in_time = np.corrcoef(counts.T), np.corrcoef(counts[1:].ravel(), counts[:-1].ravel())[0, 1]
    assert np.abs(of_cells[~np.eye(40, dtype=bool)]).max() < 0.16 and abs(in_time) < 0.02


def test_probabilities_are_read_and_set() -> None:
    post, projection = imposed(np.array([[0.0, 0.25, 0.5, 1.0]]), cells=4)
    assert projection.get("p", "list", with_address=False) == [0.0, 0.25, 0.5, 1.0]
    assert [connection.p for connection in projection.connections] == [0.0, 0.25, 0.5, 1.0]
    projection[0].p = 1.0
    sim.run(100.0)
    projection.set(p=0.0)
    sim.run(210.0)
    before, after = np.split(arrived(post), [333])  # spikes of 99.9 ms were sent before the change, and arrive
    assert before.sum(0)[[0, 3]].tolist() == [333, 333] and not after.any()
    assert 0.15 < before[:, 1].mean() < 0.35 < before[:, 2].mean() < 0.65
    assert np.array_equal(projection.get("p", "array"), np.zeros((1, 4)))


@pytest.mark.parametrize("kind", ["source", "neuron"])
def test_what_is_under_way_arrives_when_the_network_changes(kind: str) -> None:
    found = []
    for change in (False, True):
        sim.setup(timestep=0.1)
        spiking = (
            sim.SpikeSourceArray(spike_times=[3.0]) if kind == "source" else sim.IF_cond_exp(i_offset=5.0, tau_refrac=99.0)
        )
        pre, post = sim.Population(1, spiking), sim.Population(50, sim.IF_cond_exp())
        projection = sim.Projection(
            pre, post, sim.AllToAllConnector(), sim.SimpleStochasticSynapse(weight=W, delay=8.0, p=0.5)
        )
        post.record("gsyn_exc")
        sim.run(5.0)
        if change:
            projection.set(weight=2 * W, p=1.0)
            sim.Population(3, sim.IF_cond_exp())
        sim.run(10.0)
        found.append(signal(post, "gsyn_exc"))
    assert np.array_equal(*found)
    assert 10 < (found[0].max(0) > 0).sum() < 40


def test_faults() -> None:
    sim.setup(timestep=0.1)
    cells = sim.Population(2, sim.IF_cond_exp())
    for p in (-0.1, 1.5, np.nan):
        with pytest.raises(errors.InvalidParameterValueError, match="p must be a probability from 0 to 1, got"):
            sim.Projection(cells, cells, sim.AllToAllConnector(), sim.SimpleStochasticSynapse(weight=W, p=p))
    static = sim.Projection(cells, cells, sim.AllToAllConnector(), sim.StaticSynapse(weight=W))
    with pytest.raises(errors.NonExistentParameterError, match="StaticSynapse"):
        static[0].p = 0.5
    chance = sim.Projection(cells, cells, sim.AllToAllConnector(), sim.SimpleStochasticSynapse(weight=W))
    assert chance.get("p", "list", with_address=False) == [0.5] * 4
    with pytest.raises(errors.InvalidParameterValueError, match="got 2"):
        chance.set(p=2.0)
    with pytest.raises(errors.ConnectionError, match="not negative"):
        chance.set(weight=-1.0)


@pytest.mark.parametrize("kind", ["one", "of each source", "of each synapse"])
def test_what_stays_the_same_is_made_once(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A block is as short as the shortest delay, so static synapses beside uncertain ones are not looked through in each."""
    from coba_triton import Synapses

    sim.setup(timestep=0.1)
    noise = sim.Population(20, sim.SpikeSourcePoisson(rate=1000.0))
    cells = sim.Population(4, sim.IF_cond_exp(tau_syn_E=0.1, v_thresh=1000.0))
    projection = sim.Projection(noise, cells, sim.AllToAllConnector(), sim.StaticSynapse(weight=W, delay=0.1))
    if kind != "one":
        projection.weights[:] *= 1 + (projection.pre_indices if kind == "of each source" else np.arange(80))
    sim.Projection(cells, cells, sim.AllToAllConnector(), sim.SimpleStochasticSynapse(weight=W, delay=0.1, p=0.5))
    noise.record("spikes")
    cells.record(["gsyn_exc", "spikes"])
    sim.run(1.0)
    moved: list[Any] = []
    monkeypatch.setattr(Synapses, "to", lambda *arguments, **options: moved.append(arguments))
    sim.run(20.0)
    assert not moved
    expected = np.zeros((212, 4))
    weights = np.array(projection.get("weight", "array"))
    for source, train in enumerate(spike_times(noise)):
        np.add.at(expected, np.ceil(np.array(train) / 0.1 - 1e-6).astype(int) + 1, weights[source])
    np.testing.assert_allclose(signal(cells, "gsyn_exc"), expected[:211], atol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["one", "of each source", "of each synapse"])
def test_static_inputs_beside_uncertain_ones_have_the_same_bits_as_alone(kind: str, dtype: str) -> None:
    """Also where a source sends several spikes in a step."""
    found = []
    for chance in (True, False):
        sim.setup(timestep=0.1, dtype=dtype)
        cells = sim.Population(50, sim.IF_cond_exp(v_thresh=1000.0))
        noise = sim.Population(200, sim.SpikeSourcePoisson(rate=3000.0))
        for receptor in ("excitatory", "inhibitory"):
            weight: Any = 1e-4 if kind != "of each synapse" else RandomDistribution("uniform", (5e-5, 2e-4), rng=NumpyRNG(1))
            some, synapse = sim.FixedProbabilityConnector(0.5, rng=NumpyRNG(2)), sim.StaticSynapse(weight=weight, delay=1.0)
            projection = sim.Projection(noise, cells, some, synapse, receptor_type=receptor)
            if kind == "of each source":
                projection.weights[:] *= 1 + projection.pre_indices % 7
        if chance:
            sim.Projection(cells, cells, sim.AllToAllConnector(), sim.SimpleStochasticSynapse(weight=W, delay=0.5, p=0.5))
        cells.record(["v", "gsyn_exc", "gsyn_inh"])
        sim.run(10.0)
        found.append(traces(cells))
    np.testing.assert_array_equal(*found)
    assert found[0][1].max() > 0.0
