"""What is recorded, and how it comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

import neo
from pyNN.errors import RecordingError

import coba_triton.pynn as sim
from helpers.pynn_networks import signal, spike_times


def firing(size: int = 4, timestep: float = 0.1):
    sim.setup(timestep=timestep)
    return sim.Population(size, sim.IF_cond_exp(i_offset=np.linspace(0.5, 2.0, size), tau_refrac=2.0))


@pytest.mark.parametrize("pieces", [1, 7, 30])
@pytest.mark.parametrize("every", [1, 3, 10, 47])
def test_every_nth_sample_is_kept(every: int, pieces: int) -> None:
    cells = firing()
    cells.record(["v", "gsyn_exc"], sampling_interval=0.1 * every)
    others = firing_twin(pieces)
    for _ in range(pieces):
        sim.run(21.0 / pieces)
    whole = signal(others, "v")
    assert len(whole) == 211
    thinned = signal(cells, "v")
    np.testing.assert_array_equal(thinned, whole[::every])
    assert len(signal(cells, "gsyn_exc")) == len(thinned)
    (v,) = cells.get_data().segments[0].filter(name="v")
    assert v.sampling_period.rescale("ms").magnitude == pytest.approx(0.1 * every) and v.units == 1 * v.units


def firing_twin(pieces: int):
    twin = sim.Population(4, sim.IF_cond_exp(i_offset=np.linspace(0.5, 2.0, 4), tau_refrac=2.0))
    twin.record("v")
    return twin


def test_cleared_data_go_on_with_the_sample_of_the_moment() -> None:
    cells = firing()
    cells.record(["v", "gsyn_inh", "spikes"])
    twin = firing_twin(1)
    twin.record("spikes")
    parts, trains = [], [[], [], [], []]
    for _ in range(3):
        sim.run(20.0)
        segment = cells.get_data(clear=True).segments[-1]
        parts.append(np.asarray(segment.filter(name="v")[0].magnitude))
        assert len(segment.filter(name="gsyn_inh")[0]) == 201
        assert segment.filter(name="v")[0].t_start.rescale("ms").magnitude == pytest.approx(20.0 * (len(parts) - 1))
        for own, train in zip(trains, segment.spiketrains, strict=True):
            own.extend(train.magnitude.tolist())
    whole = signal(twin, "v")
    np.testing.assert_array_equal(np.concatenate([parts[0], parts[1][1:], parts[2][1:]]), whole)
    assert parts[1][0].tolist() == parts[0][-1].tolist()
    assert trains == spike_times(twin) and sum(map(len, trains)) > 8


def test_cells_that_are_recorded_later_have_no_earlier_samples() -> None:
    cells = firing()
    cells[0:2].record("v")
    sim.run(2.0)
    cells[3].as_view().record("v")
    cells[2:3].record("spikes")
    sim.run(2.0)
    v = signal(cells, "v")
    assert v.shape == (41, 3) and not np.isnan(v[:, :2]).any()
    assert np.isnan(v[:20, 2]).all() and not np.isnan(v[20:, 2]).any()
    (data,) = cells.get_data().segments[0].filter(name="v")
    assert data.array_annotations["channel_index"].tolist() == [0, 1, 3]


def test_views_give_their_own_cells() -> None:
    cells = firing(6)
    cells[1:4].record(["spikes", "v"])
    sim.run(50.0)
    counts = cells.get_spike_counts()
    assert list(map(int, counts)) == [1, 2, 3] and counts[2] and counts[3]
    view = cells[2:6]
    assert list(view.get_spike_counts()) == [2, 3] and signal(view, "v").shape == (501, 2)
    assert len(spike_times(view)) == 2 and spike_times(view)[0] == spike_times(cells)[1]
    empty = cells[5:6]
    assert empty.get_spike_counts() == {} and empty.mean_spike_count() == 0
    assert spike_times(empty) == [] and empty.get_data().segments[0].filter(name="v") == []
    assert cells.mean_spike_count() == pytest.approx(sum(counts.values()) / 3)


def test_recording_can_be_ended() -> None:
    cells = firing()
    other = firing_twin(1)
    cells.record(["v", "spikes"])
    sim.run(5.0)
    cells.record(None)
    sim.run(5.0)
    segment = cells.get_data().segments[0]
    assert len(segment.spiketrains) == len(segment.analogsignals) == 0
    assert len(signal(other, "v")) == 101


@pytest.mark.parametrize("every", [1, 2])
def test_recording_can_be_ended_and_begun_again(every: int) -> None:
    """What is recorded after that has its own times, and what was recorded before is gone."""
    cells, sources = firing(), sim.Population(4, sim.SpikeSourcePoisson(rate=200.0))
    twin, other = firing_twin(1), sim.Population(4, sim.SpikeSourceArray(spike_times=[1.0, 39.97, 40.03]))
    twin.record(["spikes", "gsyn_exc"])
    for _ in range(2):
        cells.record(["v", "spikes"])
        sources.record("spikes")
        other.record("spikes")
        sim.run(40.0)
        for population in (cells, sources, other):
            population.record(None)
    cells[1:4].record(["v", "gsyn_exc"], sampling_interval=0.1 * every)
    for population in (cells, sources, other):
        population.record("spikes")
    sim.run(20.0)
    segment = cells.get_data().segments[0]
    for name in ("v", "gsyn_exc"):
        (data,) = segment.filter(name=name)
        assert data.t_start.rescale("ms").magnitude == 80.0 and data.t_stop.rescale("ms").magnitude > 100.0
        np.testing.assert_array_equal(np.asarray(data.magnitude), signal(twin, name)[800::every, 1:4])
    assert spike_times(cells) == [[time for time in train if time > 80.0] for train in spike_times(twin)]
    assert all(train.t_start.rescale("ms").magnitude == 80.0 for train in segment.spiketrains)
    assert min(map(min, spike_times(sources))) > 80.0 and spike_times(other) == [[], [], [], []]
    sim.reset()
    sim.run(10.0)
    first, second = cells.get_data("v").segments
    assert first.analogsignals[0].t_start == 80.0 and second.analogsignals[0].t_start == 0.0
    assert len(second.analogsignals[0]) == 100 // every + 1


def test_data_outlive_the_end_and_not_the_next_setup(tmp_path: Path) -> None:
    cells = firing()
    cells.record(["v", "spikes"], to_file=str(tmp_path / "cells.pkl"))
    sim.run(30.0)
    assert not (tmp_path / "cells.pkl").exists()
    sim.end()
    (segment,) = neo.io.PickleIO(str(tmp_path / "cells.pkl")).read_block().segments
    assert len(segment.spiketrains) == 4 and len(segment.analogsignals[0]) == 301
    assert len(signal(cells, "v")) == 301 and spike_times(cells)[3]
    fresh = firing()
    fresh.record(["v", "spikes"])
    sim.run(1.0)
    assert len(signal(fresh, "v")) == 11 and spike_times(fresh) == [[], [], [], []]


def test_write_data_with_annotations(tmp_path: Path) -> None:
    cells = firing()
    cells.record("spikes")
    cells.annotate(area="V1")
    sim.run(30.0)
    cells[1:3].write_data(str(tmp_path / "part.pkl"), annotations={"script": "this one"})
    block = neo.io.PickleIO(str(tmp_path / "part.pkl")).read_block()
    assert block.annotations["simulator"] == "coba_triton" and block.annotations["script"] == "this one"
    assert block.annotations["area"] == "V1" and len(block.segments[0].spiketrains) == 2


def test_some_variables_of_earlier_segments_can_be_asked_for() -> None:
    cells = firing()
    cells.record(["v", "spikes"])
    for _ in range(3):
        sim.run(30.0)
        sim.reset()
    sim.run(10.0)
    for _ in range(2):  # what is asked for once is not lost
        v = cells.get_data("v").segments
        assert [[signal.name for signal in segment.analogsignals] for segment in v] == [["v"]] * 4
        assert [len(segment.spiketrains) for segment in v] == [0] * 4
        spikes = cells.get_data(["spikes"]).segments
        assert [len(segment.spiketrains) for segment in spikes] == [4] * 4 and not spikes[0].analogsignals
        assert [len(segment.spiketrains) + len(segment.analogsignals) for segment in cells.get_data().segments] == [5] * 4


def test_units_and_addresses() -> None:
    cells = firing()
    cells.record(["v", "gsyn_exc", "gsyn_inh", "spikes"])
    sim.run(10.0)
    segment = cells.get_data().segments[0]
    assert {s.name: str(s.units.dimensionality) for s in segment.analogsignals} == {
        "v": "mV", "gsyn_exc": "uS", "gsyn_inh": "uS",
    }  # fmt: skip
    assert [train.annotations["source_index"] for train in segment.spiketrains] == [0, 1, 2, 3]


@pytest.mark.parametrize("interval", [0.15, 0.05])
def test_intervals_that_are_no_multiples_are_refused(interval: float) -> None:
    cells = firing()
    with pytest.raises(ValueError, match=f"sampling_interval must be a multiple of the time step of 0.1 ms, got {interval}"):
        cells.record("v", sampling_interval=interval)


def test_variables_that_there_are_not_are_refused() -> None:
    cells = firing()
    with pytest.raises(RecordingError, match="Cannot record .*w.* from cell type IF_cond_exp"):
        cells.record("w")
