"""Sources that draw their spikes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

from pyNN import errors
from pyNN.parameters import Sequence

import coba_triton.pynn as sim
from coba_triton.pynn.trains import gamma_hazard
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


def inhomogeneous(pieces: list[float], cells: int = 40, **parameters: Any) -> list[list[float]]:
    sim.setup(timestep=0.1)
    sources = sim.Population(cells, sim.SpikeSourceInhGamma(**parameters))
    sources.record("spikes")
    for piece in pieces:
        sim.run(piece)
    return spike_times(sources)


def intervals_of(trains: list[list[float]], begin: float, end: float) -> np.ndarray:
    """The intervals that begin and end within a time."""
    return np.concatenate([np.diff(train[(train > begin) & (train <= end)]) for train in map(np.array, trains)])


def test_gamma_processes_that_change() -> None:
    parts = {"a": Sequence([4.0, 1.0]), "b": Sequence([0.0025, 0.005]), "tbins": Sequence([100.0, 1100.0])}
    trains = inhomogeneous([2100.0], **parts, start=50.0, duration=2030.0)
    assert trains == inhomogeneous([0.1, 333.3, 1000.0, 766.6], **parts, start=50.0, duration=2030.0)
    assert min(map(min, trains)) > 100.0 and 2070.0 < max(map(max, trains)) <= 2080.0
    regular, irregular = intervals_of(trains, 100.0, 1100.0), intervals_of(trains, 1100.0, 2080.0)
    assert regular.mean() == pytest.approx(10.0, rel=0.03) and regular.std() == pytest.approx(5.0, rel=0.05)
    assert irregular.mean() == pytest.approx(5.0, rel=0.03) and irregular.std() == pytest.approx(5.0, rel=0.05)
    counts = np.histogram(np.concatenate(trains), [100.0, 600.0, 1100.0, 1600.0, 2100.0])[0] / 40
    assert counts == pytest.approx([50.0, 50.0, 100.0, 96.0], rel=0.06)


def test_gamma_processes_of_each_source() -> None:
    shapes = np.array([1.0, 2.0, 5.0, 20.0])
    trains = inhomogeneous([20000.0], 4, a=[Sequence([a]) for a in shapes], b=[Sequence([0.01 / a]) for a in shapes])
    for shape, train in zip(shapes, trains, strict=True):
        intervals = np.diff(train)
        assert intervals.mean() == pytest.approx(10.0, rel=0.08)
        assert intervals.std() / intervals.mean() == pytest.approx(shape**-0.5, rel=0.08)


def test_the_hazard_of_a_gamma_distribution() -> None:
    """Against the integral of the density. Long after it all but reaches that of an exponential distribution."""
    ages, shape, scale = np.linspace(0.05, 8.0, 160), np.array([3.0]), np.array([0.5])
    fine = np.linspace(0.0, 40.0, 800_001)
    density = fine**2 * np.exp(-fine / 0.5) / (2.0 * 0.5**3)
    survival = np.interp(ages, fine, np.cumsum(density[::-1])[::-1] * (fine[1] - fine[0]))
    expected = np.interp(ages, fine, density) / survival
    np.testing.assert_allclose(gamma_hazard(ages, np.repeat(shape, 160), np.repeat(scale, 160)), expected, rtol=1e-3)
    late = gamma_hazard(np.array([320.0, 330.0, 3000.0]), np.full(3, 3.0), np.full(3, 0.5))
    assert (np.diff(late) > 0).all() and (late < 2.0).all() and late[0] > 1.99
    assert gamma_hazard(np.zeros(2), np.array([1.0, 2.0]), np.ones(2)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": [1.0, 2.0]}, "one length, at least 1, got 2, 1 and 1"),
        ({"a": [0.5]}, "a of SpikeSourceInhGamma must be at least 1"),
        ({"b": [0.0]}, "b of SpikeSourceInhGamma must be positive, in s"),
        ({"a": [1.0, 1.0], "b": [1.0, 1.0], "tbins": [5.0, 5.0]}, "tbins of SpikeSourceInhGamma must increase"),
        ({"tbins": [np.nan]}, "tbins of SpikeSourceInhGamma must increase"),
    ],
)
def test_faults_of_gamma_processes(values: dict[str, list[float]], message: str) -> None:
    sim.setup(timestep=0.1)
    with pytest.raises(errors.InvalidParameterValueError, match=message):
        sim.Population(2, sim.SpikeSourceInhGamma(**{name: Sequence(value) for name, value in values.items()}))


def test_gamma_processes_change_between_runs() -> None:
    sim.setup(timestep=0.1)
    sources = sim.Population(30, sim.SpikeSourceInhGamma(a=Sequence([2.0]), b=Sequence([0.01])))
    sources.record("spikes")
    sim.run(157.3)
    before = spike_times(sources)
    sources[10:].set(b=Sequence([0.0005]))
    sim.run(300.0)
    for cell, (old, new) in enumerate(zip(before, spike_times(sources), strict=True)):
        assert new[: len(old)] == old and (new[len(old) :] == [] or new[len(old)] > 157.3)
        assert len(new) - len(old) == pytest.approx(300.0 if cell >= 10 else 15.0, abs=60.0 if cell >= 10 else 12.0)


LATER = {
    "poisson": ("SpikeSourcePoisson", dict(rate=100.0)),
    "refractory": ("SpikeSourcePoissonRefractory", dict(rate=100.0, tau_refrac=6.0)),
    "gamma": ("SpikeSourceGamma", dict(alpha=2.0, beta=200.0)),
    "changing gamma": ("SpikeSourceInhGamma", dict(a=Sequence([2.0]), b=Sequence([0.005]))),
}


def made_later(kind: str, pieces: int, now: float, **parameters: Any) -> tuple[list[list[list[float]]], np.ndarray]:
    """The spikes of both segments of sources that are made at a time, and what arrives after that in steps, in spikes."""
    sim.setup(timestep=0.1)
    cells = sim.Population(40, sim.IF_cond_exp(tau_syn_E=0.1, v_thresh=1000.0))
    sim.run(now)
    model, common = LATER[kind]
    sources = sim.Population(40, getattr(sim, model)(**common, **parameters))
    sources.record("spikes")
    weight = 2.0**-12
    sim.Projection(sources, cells, sim.OneToOneConnector(), sim.StaticSynapse(weight=weight, delay=0.1))
    cells.record("gsyn_exc")
    for _ in range(pieces):
        sim.run(200.0 / pieces)
    arrived = signal(cells, "gsyn_exc")[1 + round(now / 0.1) :] / weight  # the conductance is gone after a step
    sim.reset()
    sim.run(100.0)
    return [spike_times(sources, segment) for segment in (0, 1)], arrived


@pytest.mark.parametrize("now", [100.0, 123.4])
@pytest.mark.parametrize("kind", LATER)
def test_sources_that_are_made_later_begin_then(kind: str, now: float) -> None:
    (trains, again), arrived = made_later(kind, 1, now)
    counts = np.array(list(map(len, trains)))
    # four standard deviations of a Poisson process, which is the most irregular of these
    assert counts.sum() == pytest.approx(40 * 20, abs=4 * 800**0.5) and min(train[0] for train in trains) > now
    # each spike has arrived at its own time; those of the last step are on their way
    for train, samples in zip(trains, arrived.T, strict=True):
        steps = np.ceil((np.array(train) - now) / 0.1 - 1e-6).astype(int)
        np.testing.assert_allclose(samples, np.bincount(steps, minlength=2001)[:2000], atol=1e-9)
    assert [trains, again] == made_later(kind, 50, now)[0]
    # a segment begins at time 0, when the sources are there from the start
    assert 0.0 < min(map(min, again)) < 10.0 and sum(map(len, again)) == pytest.approx(40 * 10, abs=4 * 400**0.5)


@pytest.mark.parametrize("kind", LATER)
def test_sources_that_are_made_later_keep_their_start_and_their_end(kind: str) -> None:
    """Both are times of the clock, as in NEST."""
    (trains, _), _ = made_later(kind, 1, 100.0, start=150.0, duration=100.0)
    times = np.concatenate(trains)
    assert 150.0 < times.min() < 160.0 and 240.0 < times.max() <= 250.0
    (trains, again), _ = made_later(kind, 1, 100.0, start=0.0, duration=50.0)
    assert trains == [[]] * 40 and sum(map(len, again)) > 40
