"""When a spike arrives, how long a neuron is held, and what a sample is: all as NEST has it, sample by sample."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

import coba_triton.pynn as sim
from helpers.pynn_networks import signal, spike_times

W = 0.0123


def one_synapse(times: list[float], delay: float, size: int = 1, **setup: object) -> tuple[object, object]:
    sim.setup(timestep=0.1, **setup)
    sources = sim.Population(1, sim.SpikeSourceArray(spike_times=times))
    cells = sim.Population(size, sim.IF_cond_exp())
    sim.Projection(sources, cells, sim.AllToAllConnector(), sim.StaticSynapse(weight=W, delay=delay))
    sources.record("spikes")
    cells.record(["v", "gsyn_exc", "gsyn_inh"])
    return sources, cells


@pytest.mark.parametrize("pieces", [1, 4, 40], ids="cut_in_{}".format)
def test_first_arrival_of_a_source(pieces: int) -> None:
    _, cells = one_synapse([1.0], 1.0)
    for _ in range(pieces):
        sim.run(4.0 / pieces)
    g, v = signal(cells, "gsyn_exc")[:, 0], signal(cells, "v")[:, 0]
    assert len(g) == len(v) == 41
    assert not g[:20].any() and g[20] == W
    assert (v[:21] == -65.0).all() and v[21] > -65.0
    assert not signal(cells, "gsyn_inh").any()


@pytest.mark.parametrize(("time", "sample"), [(0.0, 10), (0.1, 11), (1.0, 20), (1.04, 21), (1.06, 21), (1.1, 21), (0.3, 13)])
def test_sources_off_the_grid_are_recorded_as_given_and_arrive_at_the_next_step(time: float, sample: int) -> None:
    sources, cells = one_synapse([time], 1.0)
    sim.run(4.0)
    g = signal(cells, "gsyn_exc")[:, 0]
    assert np.flatnonzero(g)[0] == sample
    assert spike_times(sources) == [[time]]


def test_all_spikes_of_a_step_count() -> None:
    sources, cells = one_synapse([0.93, 1.0, 1.0], 0.5)
    sim.run(2.0)
    assert signal(cells, "gsyn_exc")[15, 0] == 3 * W
    assert spike_times(sources) == [[0.93, 1.0, 1.0]]


@pytest.mark.parametrize(("delay", "steps"), [(0.1, 1), (0.14, 1), (0.15, 2), (0.16, 2), (0.25, 3), (3.0, 30)])
def test_delays_are_rounded_to_the_nearest_step(delay: float, steps: int) -> None:
    _, cells = one_synapse([1.0], delay)
    sim.run(5.0)
    assert np.flatnonzero(signal(cells, "gsyn_exc")[:, 0])[0] == 10 + steps


@pytest.mark.parametrize("delay", [0.1, 0.4, 7.0])
def test_a_neurons_spike_arrives_its_delay_after_its_time_stamp(delay: float) -> None:
    sim.setup(timestep=0.1)
    first = sim.Population(1, sim.IF_cond_exp(i_offset=2.0, tau_refrac=3.0))
    second = sim.Population(1, sim.IF_cond_exp())
    projection = sim.Projection(first, second, sim.OneToOneConnector(), sim.StaticSynapse(weight=W, delay=delay))
    first.record(["spikes", "v"])
    second.record("gsyn_exc")
    sim.run(30.0)
    (spikes,) = spike_times(first)
    sample = round(spikes[0] / 0.1)
    v, g = signal(first, "v")[:, 0], signal(second, "gsyn_exc")[:, 0]
    assert v[sample] == -65.0 and v[sample - 1] > -65.0
    assert np.flatnonzero(g)[0] == sample + round(delay / 0.1) and g[g > 0][0] == W
    assert projection.get("delay", "list", with_address=False) == [delay]


def test_samples_at_the_reset_potential() -> None:
    sim.setup(timestep=0.1)
    cells = sim.Population(5, sim.IF_cond_exp(i_offset=2.0, tau_refrac=[0.0, 0.1, 2.0, 2.04, 2.06], v_reset=-70.0))
    cells.record(["v", "spikes"])
    sim.run(40.0)
    v = signal(cells, "v")
    held = []
    for cell, times in enumerate(spike_times(cells)):
        begin = round(times[0] / 0.1)
        held.append(int(np.argmax(v[begin:, cell] != -70.0)))
    assert held == [1, 2, 21, 22, 22]


def test_a_run_is_rounded_up(caplog: pytest.LogCaptureFixture) -> None:
    sim.setup(timestep=0.1)
    sim.Population(1, sim.IF_cond_exp())
    assert sim.run(0.3) == 0.3 and not caplog.records
    assert sim.run(0.25) == 0.6
    assert "0.55 ms is no multiple of the time step: the run ends at 0.6 ms" in caplog.text


def test_time_is_a_count_of_steps() -> None:
    sim.setup(timestep=0.1)
    sim.Population(1, sim.IF_cond_exp())
    for _ in range(300):
        sim.run(0.1)
    assert sim.get_current_time() == 30.0


def test_functions_are_called_at_the_times_that_they_ask_for() -> None:
    sim.setup(timestep=0.1)
    cells = sim.Population(1, sim.IF_cond_exp(tau_m=10.0))
    cells.record("v")
    called: list[float] = []

    def change(time: float) -> float:
        called.append(time)
        cells.set(v_rest=-65.0 + time)
        return time + 2.0

    sim.run(5.0, callbacks=[change])
    sim.run_until(6.0)
    assert called == [0.0, 2.0, 4.0, 5.0] and sim.get_current_time() == 6.0
    v = signal(cells, "v")[:, 0]
    assert len(v) == 61 and (v[:21] == -65.0).all() and v[21] == pytest.approx(-65.0 + 2.0 * 0.1 / 10)
    with pytest.raises(ValueError, match="Time 3 is in the past"):
        sim.run_until(3.0)
