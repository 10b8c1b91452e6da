"""Sources that draw their spikes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

import coba_triton.pynn as sim
from helpers.pynn_networks import signal, spike_times


def poisson(pieces: int = 1, seed: int = 42, steps: int = 3000, **parameters: Any) -> list[list[float]]:
    sim.setup(timestep=0.1, rng_seed=seed)
    sources = sim.Population(20, sim.SpikeSourcePoisson(**parameters))
    sources.record("spikes")
    for _ in range(pieces):
        sim.run(steps * 0.1 / pieces)
    return spike_times(sources)


def test_spikes_do_not_depend_on_how_a_run_is_cut() -> None:
    whole = poisson(rate=100.0)
    assert whole == poisson(100, rate=100.0) and whole != poisson(rate=100.0, seed=1)


def test_rates_starts_and_durations_of_each_source() -> None:
    rates = np.linspace(0.0, 4000.0, 20)
    trains = poisson(rate=rates, start=50.0, duration=150.05)
    times = np.concatenate(trains)
    assert times.min() > 50.0 and times.max() <= 200.05
    expected = rates * 0.15005
    counts = np.array(list(map(len, trains)))
    assert counts[0] == 0 and (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1e-9).all()


def test_frequent_sources_lose_no_spikes() -> None:
    """At 20 kHz and 0.1 ms there are two spikes in a step, and each one acts."""
    sim.setup(timestep=0.1)
    source = sim.Population(1, sim.SpikeSourcePoisson(rate=20000.0))
    cells = sim.Population(1, sim.IF_cond_exp(tau_syn_E=0.1, v_thresh=1000.0))
    weight = 2.0**-12
    sim.Projection(source, cells, sim.OneToOneConnector(), sim.StaticSynapse(weight=weight, delay=0.1))
    source.record("spikes")
    cells.record("gsyn_exc")
    sim.run(500.0)
    (times,) = spike_times(source)
    arrived = signal(cells, "gsyn_exc")[:, 0] / weight  # the conductance is gone after a step
    steps = np.ceil(np.array(times) / 0.1 - 1e-6).astype(int)
    np.testing.assert_allclose(arrived, np.bincount(steps + 1, minlength=5002)[:5001], atol=1e-9)
    assert arrived.max() > 4 and len(times) == pytest.approx(10000, abs=500)


def test_a_new_rate_holds_from_now_on() -> None:
    sim.setup(timestep=0.1)
    sources = sim.Population(10, sim.SpikeSourcePoisson(rate=100.0))
    sources.record("spikes")
    sim.run(1030.0)
    before = spike_times(sources)
    sources[5:].set(rate=0.0)
    sim.run(1000.0)
    after = spike_times(sources)
    for cell, (old, new) in enumerate(zip(before, after, strict=True)):
        assert new[: len(old)] == old and (len(new) == len(old)) == (cell >= 5)
    assert sources.get("rate").tolist() == [100.0] * 5 + [0.0] * 5


def test_segments_are_fresh_and_reproducible() -> None:
    runs = []
    for _ in range(2):
        sim.setup(timestep=0.1)
        sources = sim.Population(3, sim.SpikeSourcePoisson(rate=100.0))
        sources.record("spikes")
        sim.run(200.0)
        sim.reset()
        sim.run(200.0)
        runs.append([spike_times(sources, segment) for segment in (0, 1)])
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


def test_populations_draw_other_spikes() -> None:
    sim.setup(timestep=0.1)
    both = [sim.Population(2, sim.SpikeSourcePoisson(rate=100.0)) for _ in range(2)]
    for sources in both:
        sources.record("spikes")
    sim.run(200.0)
    assert spike_times(both[0]) != spike_times(both[1])


def renewal(pieces: int) -> tuple[list[list[float]], list[list[float]]]:
    sim.setup(timestep=0.1)
    gamma = sim.Population(40, sim.SpikeSourceGamma(alpha=4, beta=400.0, start=20.0))
    silent = sim.Population(40, sim.SpikeSourcePoissonRefractory(rate=100.0, tau_refrac=6.0, duration=900.0))
    for sources in (gamma, silent):
        sources.record("spikes")
    for _ in range(pieces):
        sim.run(1000.0 / pieces)
    return spike_times(gamma), spike_times(silent)


def test_intervals_are_of_their_distributions() -> None:
    gamma, silent = renewal(1)
    assert (gamma, silent) == renewal(100)
    intervals = np.concatenate([np.diff(train) for train in gamma])
    assert intervals.mean() == pytest.approx(10.0, rel=0.03) and intervals.std() == pytest.approx(5.0, rel=0.05)
    assert min(train[0] for train in gamma) > 20.0
    intervals = np.concatenate([np.diff(train) for train in silent])
    assert intervals.min() >= 6.0 and max(map(max, silent)) <= 900.0
    assert intervals.mean() == pytest.approx(10.0, rel=0.03) and intervals.std() == pytest.approx(4.0, rel=0.05)


def test_intervals_begin_anew_with_other_parameters() -> None:
    sim.setup(timestep=0.1)
    sources = sim.Population(20, sim.SpikeSourceGamma(alpha=2, beta=100.0))
    sources.record("spikes")
    sim.run(157.3)
    before = spike_times(sources)
    sources.set(alpha=5, beta=5000.0)
    sim.run(100.0)
    for old, new in zip(before, spike_times(sources), strict=True):
        assert new[: len(old)] == old and new[len(old)] > 157.3
        assert np.diff(new[len(old) :]).mean() == pytest.approx(1.0, rel=0.25)
