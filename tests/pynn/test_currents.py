"""Currents that are injected."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

import coba_triton.pynn as sim
from helpers.pynn_networks import signal, spike_times

CM, TAU, DT = 0.5, 20.0, 0.1


def cells_of(size: int = 1, **parameters: float):
    sim.setup(timestep=DT)
    cells = sim.Population(size, sim.IF_cond_exp(cm=CM, tau_m=TAU, **parameters))
    cells.record(["v", "spikes"])
    return cells


def injected(v: np.ndarray) -> np.ndarray:
    """The current of every step in nA, from the potentials of a cell that is at rest without it."""
    return CM * (np.diff(v) / DT - (-65.0 - v[:-1]) / TAU)


def measured(source, cells, pieces: int = 1, time: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    source.record()
    source.inject_into(cells)
    for _ in range(pieces):
        sim.run(time / pieces)
    data = source.get_data()
    np.testing.assert_allclose(data.times.rescale("ms").magnitude, np.arange(round(time / DT) + 1) * DT, atol=1e-9)
    return injected(signal(cells, "v")[:, 0]), data.magnitude[:, 0]


@pytest.mark.parametrize("pieces", [1, 20])
def test_direct_current(pieces: int) -> None:
    cells = cells_of()
    current, data = measured(sim.DCSource(amplitude=0.2, start=1.0, stop=2.04), cells, pieces)
    expected = np.zeros(301)
    expected[10:20] = 0.2
    np.testing.assert_array_equal(data, expected)
    np.testing.assert_allclose(current, expected[:-1], atol=1e-9)


@pytest.mark.parametrize("pieces", [1, 20])
def test_steps(pieces: int) -> None:
    cells = cells_of()
    source = sim.StepCurrentSource(times=[0.0, 1.0, 1.04, 15.3], amplitudes=[0.1, 0.3, -0.2, 0.0])
    assert source.times.tolist() == [0.0, 1.0, 15.3] and source.amplitudes.tolist() == [0.1, -0.2, 0.0]
    current, data = measured(source, cells, pieces)
    expected = np.repeat([0.1, -0.2, 0.0], [10, 143, 148])
    np.testing.assert_array_equal(data, expected)
    np.testing.assert_allclose(current, expected[:-1], atol=1e-9)


@pytest.mark.parametrize("pieces", [1, 20])
def test_alternating_current(pieces: int) -> None:
    cells = cells_of()
    source = sim.ACSource(amplitude=0.2, offset=0.05, frequency=80.0, phase=30.0, start=5.0, stop=25.0)
    current, data = measured(source, cells, pieces)
    t = np.arange(301) * DT
    expected = np.where((t > 4.99) & (t < 24.99), 0.05 + 0.2 * np.sin(2 * np.pi * 0.08 * (t - 5) + np.pi / 6), 0)
    np.testing.assert_allclose(data, expected, atol=1e-12)
    np.testing.assert_allclose(current, expected[:-1], atol=1e-9)


def test_noise() -> None:
    found = []
    for pieces in (1, 20):
        cells = cells_of(v_thresh=1000.0)
        source = sim.NoisyCurrentSource(mean=0.3, stdev=0.1, start=5.0, stop=905.0, dt=0.5)
        current, data = measured(source, cells, pieces, 1000.0)
        np.testing.assert_allclose(current, data[:-1], atol=1e-9)
        found.append(data)
    np.testing.assert_array_equal(*found)
    active = found[0][50:9050].reshape(-1, 5)
    assert not found[0][:50].any() and not found[0][9050:].any()
    assert (active == active[:, :1]).all() and (np.diff(active[:, 0]) != 0).all()
    assert active.mean() == pytest.approx(0.3, abs=0.01) and active[:, 0].std() == pytest.approx(0.1, rel=0.1)
    assert sim.NoisyCurrentSource().dt == DT


@pytest.mark.parametrize("others", ["nothing", "sources", "neurons that come later"])
def test_a_current_without_neurons_is_recorded(others: str) -> None:
    sim.setup(timestep=DT)
    if others == "sources":
        sim.Population(1, sim.SpikeSourcePoisson())
    step = sim.DCSource(amplitude=0.1, start=1.0)
    noise = sim.NoisyCurrentSource(mean=0.0, stdev=1.0)
    for source in (step, noise):
        source.record()
    sim.run(3.0)
    if others == "neurons that come later":
        sim.Population(1, sim.IF_cond_exp())
    sim.run(1000.0)
    expected = np.repeat([0.0, 0.1], [10, 10021])
    np.testing.assert_array_equal(step.get_data().magnitude[:, 0], expected)
    assert len(np.unique(noise.get_data().magnitude)) == 10031
    sim.reset()
    sim.run(3.0)
    np.testing.assert_array_equal(step.get_data().magnitude[:, 0], expected[:31])


def test_currents_add_up_and_are_those_of_an_offset() -> None:
    cells = cells_of(3)
    cells[0].i_offset = 0.75
    for group in (cells[1:3], [cells[1]], cells[1:2]):
        sim.DCSource(amplitude=0.25).inject_into(group)
    sim.run(100.0)
    trains = spike_times(cells)
    assert trains[0] == trains[1] and len(trains[0]) > 2 and trains[2] == []


def test_values_can_be_changed_between_runs() -> None:
    cells = cells_of()
    source = sim.DCSource(amplitude=0.1)
    source.record()
    cells.inject(source)
    sim.run(1.0)
    source.amplitude += 0.2
    assert source.amplitude == pytest.approx(0.3)
    sim.run(1.0)
    source.set_parameters(stop=2.5)
    sim.run(1.0)
    expected = np.repeat([0.1, 0.3, 0.0], [10, 15, 6])
    np.testing.assert_allclose(source.get_data().magnitude[:, 0], expected)
    np.testing.assert_allclose(injected(signal(cells, "v")[:, 0]), expected[:-1], atol=1e-9)


def test_reset_begins_currents_anew() -> None:
    cells = cells_of()
    source = sim.DCSource(amplitude=0.1, start=0.5, stop=1.0)
    source.record()
    cells.inject(source)
    sim.run(1.5)
    sim.reset()
    sim.run(2.0)
    np.testing.assert_array_equal(signal(cells, "v", 1)[:16], signal(cells, "v", 0))
    assert len(source.get_data()) == 21


def test_what_does_not_fit_is_refused() -> None:
    cells_of()
    sources = sim.Population(1, sim.SpikeSourcePoisson())
    with pytest.raises(TypeError, match="Can't inject current into a spike source"):
        sources.inject(sim.DCSource())
    with pytest.raises(TypeError, match="a current cannot be injected into sources of spikes"):
        sim.DCSource().inject_into(sources)
    with pytest.raises(ValueError, match="times of StepCurrentSource must not be negative, got -0.6 ms"):
        sim.StepCurrentSource(times=[-0.6, 0.8], amplitudes=[0.5, 0.5])
    with pytest.raises(ValueError, match="times of StepCurrentSource must increase"):
        sim.StepCurrentSource(times=[0.8, 0.6], amplitudes=[0.5, 0.5])
    with pytest.raises(ValueError, match="must have as many values, got 1 and 2"):
        sim.StepCurrentSource(times=[0.8], amplitudes=[0.5, 0.5])
    with pytest.raises(ValueError, match="dt of NoisyCurrentSource must be a multiple of the time step of 0.1 ms, got 0.25"):
        sim.NoisyCurrentSource(dt=0.25)
    with pytest.raises(RuntimeError, match="the current was not recorded; call record"):
        sim.DCSource().get_data()
    old = sim.DCSource()
    cells = cells_of()
    with pytest.raises(RuntimeError, match="belong to the network of one setup"):
        old.inject_into(cells)
    new = sim.DCSource()
    sim.setup()
    with pytest.raises(RuntimeError, match="belong to the network of one setup"):
        new.inject_into(cells)
    with pytest.raises(RuntimeError, match="belong to the network of one setup"):
        sim.DCSource().inject_into(cells)
