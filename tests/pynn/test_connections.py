"""Projections: connectors, views, assemblies, and what can be read and set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

from pyNN import connectors, errors
from pyNN.random import NumpyRNG, RandomDistribution

import coba_triton.pynn as sim
from helpers.pynn_networks import signal


@pytest.fixture
def two() -> tuple[Any, Any]:
    sim.setup(timestep=0.1)
    return sim.Population(30, sim.IF_cond_exp()), sim.Population(40, sim.IF_cond_exp())


def pairs(projection: Any) -> list[tuple[float, ...]]:
    return sorted(projection.get(["weight", "delay"], "list"))


def both(pre: Any, post: Any, name: str, *arguments: Any, **options: Any) -> tuple[list[Any], list[Any]]:
    """What this package's connector makes, and PyNN's own."""
    found = []
    for module in (sim, connectors):
        options = {key: NumpyRNG(7) if key == "rng" else value for key, value in options.items()}
        connector = getattr(module, name)(*arguments, **options)
        found.append(pairs(sim.Projection(pre, post, connector, sim.StaticSynapse(weight=0.01, delay=0.5))))
    return found[0], found[1]


@pytest.mark.parametrize("most", [1, 70, 2**15])
def test_numbers_that_are_drawn_together_are_pynns(two: tuple[Any, Any], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coba_triton.pynn.connectors.DRAWN_TOGETHER", most)  # for one target, for two of 40, for all
    pre, post = two
    for sources, targets in ((pre, post), (post, pre + post)):
        ours, theirs = both(sources, targets, "FixedProbabilityConnector", 0.2, rng=True)
        assert ours == theirs and len(ours) > 100


def test_connectors_that_draw_pynns_numbers(two: tuple[Any, Any]) -> None:
    pre, post = two
    ours, theirs = both(pre, post, "FixedProbabilityConnector", 0.2, rng=True)
    assert ours == theirs and len(ours) > 100
    for group in (pre[2:9], pre + post):
        for name in ("AllToAllConnector", "OneToOneConnector"):
            ours, theirs = both(group, group, name)
            assert ours == theirs and len(ours) >= 7
        ours, theirs = both(group, group, "AllToAllConnector", allow_self_connections=False)
        assert ours == theirs and all(one[0] != one[1] for one in ours)
        ours, theirs = both(group, group, "FixedProbabilityConnector", 0.3, allow_self_connections=False, rng=True)
        assert ours == theirs and len(ours) > 5
    for name in ("FixedNumberPreConnector", "FixedNumberPostConnector"):
        ours, theirs = both(pre, post, name, 7, rng=True)
        assert ours == theirs and len(ours) > 200
    ours, theirs = both(pre, post, "OneToOneConnector")
    assert ours == theirs and len(ours) == 30


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("per", ["Pre", "Post"])
def test_fixed_numbers_without_a_generator(per: str, replacement: bool, same: bool) -> None:
    sim.setup(timestep=0.1)
    pre = sim.Population(30, sim.IF_cond_exp())
    post = pre if same else sim.Population(50, sim.IF_cond_exp())
    connector = getattr(sim, f"FixedNumber{per}Connector")(20, allow_self_connections=not same, with_replacement=replacement)
    synapse = sim.StaticSynapse(weight=0.1, delay=RandomDistribution("uniform", (0.1, 2.0), rng=NumpyRNG(1)))
    projection = sim.Projection(pre, post, connector, synapse)
    sources, targets = projection.pre_indices, projection.post_indices
    assert (np.bincount(targets if per == "Pre" else sources) == 20).all()
    others = np.bincount(sources if per == "Pre" else targets)
    assert len(others) == (30 if per == "Pre" else post.size) and others.std() < 8
    if same:
        assert (sources != targets).all()
    unique = len(set(zip(sources.tolist(), targets.tolist(), strict=True)))
    assert (unique < len(projection)) if replacement else (unique == len(projection))
    assert len(set(projection.delays.tolist())) > 10


def test_synapses_with_values_of_their_own_follow_the_seed_as_well() -> None:
    found = []
    for _ in range(2):
        sim.setup(timestep=0.1)
        cells = sim.Population(40, sim.IF_cond_exp())
        synapse = sim.StaticSynapse(weight="0.01 * (1 + d)", delay=0.5)
        connector = sim.FixedProbabilityConnector(0.2, allow_self_connections=False)
        found.append([pairs(sim.Projection(cells, cells, connector, synapse)) for _ in range(2)])
    assert found[0] == found[1] and found[0][0] != found[0][1] and len(found[0][0]) > 200
    for i, j, weight, _ in found[0][0]:
        assert i != j and weight == pytest.approx(0.01 * (1 + abs(i - j)))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_shares_of_pairs(share: float) -> None:
    sim.setup(timestep=0.1)
    pre, post = sim.Population(70, sim.IF_cond_exp()), sim.Population(90, sim.IF_cond_exp())
    projection = sim.Projection(pre, post, sim.FixedProbabilityConnector(share), sim.StaticSynapse(weight=0.1))
    assert len(projection) == pytest.approx(6300 * share, abs=0 if share in (0.0, 1.0) else 150)
    dense = projection.get("weight", "array")
    assert dense.shape == (70, 90) and np.isfinite(dense).sum() == len(projection)


def test_connectors_without_a_generator_follow_the_seed(two: tuple[Any, Any]) -> None:
    found = []
    for seed in (1, 1, 2):
        sim.setup(rng_seed=seed)
        pre, post = sim.Population(100, sim.IF_cond_exp()), sim.Population(200, sim.IF_cond_exp())
        connector = sim.FixedProbabilityConnector(0.1)
        synapse = sim.StaticSynapse(weight=0.1)
        found.append([pairs(sim.Projection(pre, post, connector, synapse)) for _ in range(2)])
    assert found[0] == found[1] and found[0][0] != found[0][1] and found[0] != found[2]
    assert len(found[0][0]) == pytest.approx(2000, abs=200) and len(set(found[0][0])) == len(found[0][0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: sim.FixedNumberPreConnector(5, rng=NumpyRNG(1)),
        lambda: sim.FixedNumberPostConnector(5, rng=NumpyRNG(1)),
        lambda: sim.FixedTotalNumberConnector(50, rng=NumpyRNG(1)),
        lambda: sim.DistanceDependentProbabilityConnector("exp(-d/5)", rng=NumpyRNG(1)),
        lambda: sim.ArrayConnector(np.eye(30, 40, dtype=bool)),
        lambda: sim.FromListConnector([(0, 1, 0.1, 0.2), (29, 39, 0.2, 0.3)]),
        lambda: sim.FixedProbabilityConnector(0.3, allow_self_connections=False, rng=NumpyRNG(1)),
        lambda: sim.FixedProbabilityConnector(0.3, callback=lambda share: None),
    ],
    ids=["pre", "post", "total", "distance", "array", "list", "no_self", "callback"],
)
def test_other_connectors_connect(two: tuple[Any, Any], make: Any) -> None:
    pre, post = two
    projection = sim.Projection(pre, post, make(), sim.StaticSynapse(weight=0.1))
    assert len(projection) == projection.size() == len(pairs(projection)) > 1
    clone = sim.Projection(pre, post, sim.CloneConnector(projection), sim.StaticSynapse(weight=0.1))
    assert {pair[:2] for pair in pairs(clone)} == {pair[:2] for pair in pairs(projection)}


def test_parameters_of_each_synapse(two: tuple[Any, Any]) -> None:
    pre, post = two
    rng = NumpyRNG(3)
    synapse = sim.StaticSynapse(weight=RandomDistribution("uniform", (0.1, 0.2), rng=rng), delay="0.5 + 0.1 * d")
    projection = sim.Projection(pre, post, sim.AllToAllConnector(), synapse)
    weights, delays = projection.get(["weight", "delay"], "array")
    assert weights.shape == (30, 40) and 0.1 < weights.min() < weights.max() < 0.2 and len(np.unique(weights)) == 1200
    distance = np.abs(np.arange(30)[:, None] - np.arange(40))
    np.testing.assert_allclose(delays, 0.5 + 0.1 * distance, atol=1e-9)


def test_weights_and_delays_are_read_and_set(two: tuple[Any, Any]) -> None:
    pre, post = two
    synapses = [(0, 1, 0.1, 0.2), (0, 1, 0.3, 0.4), (5, 2, 0.5, 0.6)]
    projection = sim.Projection(pre, post, sim.FromListConnector(synapses), sim.StaticSynapse())
    for choice, expected in dict(sum=0.4, min=0.1, max=0.3, first=0.1, last=0.3).items():
        dense = projection.get("weight", "array", multiple_synapses=choice)
        assert dense[0, 1] == pytest.approx(expected) and dense[5, 2] == 0.5 and np.isnan(dense).sum() == 1198
    last = next(c for c in projection.connections if c.presynaptic_index == 5)
    assert (last.postsynaptic_index, last.weight, last.delay, last.presynaptic_cell) == (2, 0.5, 0.6, pre[5])
    last.weight, last.delay = 0.7, 1.0
    assert pairs(projection) == [(0, 1, 0.1, 0.2), (0, 1, 0.3, 0.4), (5, 2, 0.7, 1.0)]
    projection.set(weight=0.9, delay=RandomDistribution("uniform", (1.0, 1.0001), rng=NumpyRNG(1)))
    assert pairs(projection) == [(0, 1, 0.9, 1.0), (0, 1, 0.9, 1.0), (5, 2, 0.9, 1.0)]
    projection.set(weight=np.arange(1200.0).reshape(30, 40))
    assert [pair[2] for pair in pairs(projection)] == [1.0, 1.0, 202.0]
    projection[0].weight = 3.0
    assert projection[-3].weight == 3.0 and len(list(projection.connections)) == 3
    with pytest.raises(IndexError, match="the projection has 3 connections, there is none of index 3"):
        projection[3]


def test_views_and_assemblies_are_addressed_as_they_are() -> None:
    sim.setup(timestep=0.1)
    sources = sim.Population(6, sim.SpikeSourceArray(spike_times=[1.0]))
    first, second = sim.Population(5, sim.IF_cond_exp()), sim.Population(7, sim.IF_cond_exp())
    pre = sources[1:6][[1, 3]]  # the sources 2 and 4
    post = first[3:5] + second[np.array([True, False, True, False, False, False, True])]
    projection = sim.Projection(pre, post, sim.FromListConnector([(0, 0, 0.1, 0.1), (1, 4, 0.2, 0.1), (1, 2, 0.3, 0.1)]))
    assert pairs(projection) == [(0, 0, 0.1, 0.1), (1, 2, 0.3, 0.1), (1, 4, 0.2, 0.1)]
    for cells in (first, second):
        cells.record("gsyn_exc")
    sim.run(2.0)
    assert np.flatnonzero(signal(first, "gsyn_exc")[11]).tolist() == [3]
    g = signal(second, "gsyn_exc")[11]
    assert np.flatnonzero(g).tolist() == [0, 6] and g[[0, 6]].tolist() == [0.3, 0.2]
    mixed = sources[0:1] + first[0:1]
    both_kinds = sim.Projection(mixed, second, sim.AllToAllConnector(), sim.StaticSynapse(weight=0.1, delay=0.1))
    assert len(both_kinds) == 14


def test_least_delays() -> None:
    sim.setup(timestep=0.1)
    cells = sim.Population(2, sim.IF_cond_exp())
    assert sim.get_min_delay() == sim.get_max_delay() == 0.1
    sim.Projection(cells, cells, sim.FromListConnector([(0, 1, 0.1, 0.7), (1, 0, 0.1, 2.5)]))
    assert (sim.get_min_delay(), sim.get_max_delay()) == (0.7, 2.5)
    sim.setup(timestep=0.1, min_delay=0.4, max_delay=5.0)
    assert (sim.get_min_delay(), sim.get_max_delay()) == (0.4, 5.0)
    cells = sim.Population(2, sim.IF_cond_exp())
    projection = sim.Projection(cells, cells, sim.AllToAllConnector(), sim.StaticSynapse(weight=0.1))
    assert set(projection.get("delay", "list", with_address=False)) == {0.4}


@pytest.mark.parametrize("delay", [2.2e8, 1677721.6, 1e300, float("inf")])
@pytest.mark.parametrize("kind", ["StaticSynapse", "SimpleStochasticSynapse"])
def test_delays_are_not_longer_than_the_network_counts(kind: str, delay: float) -> None:
    sim.setup(timestep=0.1)
    cells = sim.Population(2, sim.IF_cond_exp())
    source = sim.Population(1, sim.SpikeSourceArray(spike_times=[1.0]))
    message = r"a delay must be at most 16,777,215 time steps of 0.1 ms, got [\de.+inf]+ ms; shorten it"
    with pytest.raises(ValueError, match=message):
        sim.Projection(source, cells, sim.AllToAllConnector(), getattr(sim, kind)(weight=0.1, delay=delay))
    projection = sim.Projection(source, cells, sim.AllToAllConnector(), getattr(sim, kind)(weight=0.1, delay=1677721.5))
    with pytest.raises(errors.ConnectionError, match=message):
        projection.set(delay=delay)
    with pytest.raises(ValueError, match=message):
        projection[1].delay = delay
    assert projection.get("delay", "list", with_address=False) == [1677721.5] * 2
    with pytest.raises(ValueError, match=r"at least one time step of 0.1 ms, got 0 ms; lengthen it"):
        projection.set(delay=0.0)
