"""Recording: spikes are kept by the network, traces by the recorder of each population.

Sample ``n`` of a signal is time ``n dt``. The potential of a sample is the state before step ``n``, which is that after the
step before. A conductance of a sample is what drives step ``n``, with what arrives in it.
"""

from __future__ import annotations

from typing import Any

import neo
import numpy as np
import quantities as pq
from pyNN import recording

from . import simulator
from .engine import FIELDS, Array


def _only(names: list[str], whole: Any) -> Any:
    """A segment with some of the variables."""
    part = neo.Segment(name=whole.name, description=whole.description, rec_datetime=whole.rec_datetime, **whole.annotations)
    if "spikes" in names:
        part.spiketrains = whole.spiketrains
    part.analogsignals = [signal for signal in whole.analogsignals if signal.name in names]
    return part


class Recorder(recording.Recorder):
    """What is recorded of a population."""

    _simulator = simulator

    def __init__(self, population: Any, file: Any = None) -> None:
        super().__init__(population, file)
        self._every = 1
        self._start = simulator.state.engine.now
        self._columns: dict[str, Array] = {}  # indices of the recorded cells, ascending
        self._parts: dict[str, list[tuple[int, Array, Array]]] = {}  # first sample, cells, values [samples, cells]
        self._new: dict[str, Array] = {}  # cells that have no sample yet
        self._engine = simulator.state.engine

    # What PyNN asks for

    def _record(self, variable: Any, new_ids: Any, sampling_interval: float | None = None) -> None:
        if sampling_interval is not None:
            every = sampling_interval / simulator.state.dt
            if every < 1 - 1e-6 or abs(every - round(every)) > 1e-6:
                raise ValueError(
                    f"sampling_interval must be a multiple of the time step of {simulator.state.dt:g} ms, got "
                    f"{sampling_interval:g} ms"
                )
            self.sampling_interval = sampling_interval
            self._every = round(every)
        cells = np.sort(np.fromiter((self.population.id_to_index(cell) for cell in new_ids), np.int64))
        if variable.name == "spikes":
            kept = self._engine.records_source if self.population.is_source else self._engine.records
            kept[self.population.first + cells] = True
            return
        name = variable.name
        self._columns[name] = np.union1d(self._columns.get(name, cells), cells)
        self._new[name] = np.union1d(self._new.get(name, cells), cells)
        self._engine.traced = np.union1d(self._engine.traced, self.population.first + cells)

    def _reset(self) -> None:
        """Record nothing any more, and forget what was recorded: what is recorded next begins at this moment."""
        population, engine = self.population, self._engine
        kept = engine.records_source if population.is_source else engine.records
        kept[population.first : population.first + population.size] = False
        self._columns = {}
        self._recording_start_time = round(engine.now * engine.dt, 12) * pq.ms
        self._clear_simulator()
        if not population.is_source:
            others = (engine.traced < population.first) | (engine.traced >= population.first + population.size)
            engine.traced = engine.traced[others]

    def _clear_simulator(self) -> None:
        """Forget what was recorded; the sample of this moment is the first one of what follows."""
        engine = self._engine
        events = engine.sent if self.population.is_source else engine.spikes
        events.drop(self.population.first, self.population.size)
        self._parts = {}
        self._start = engine.now
        self._new = dict(self._columns)
        if simulator.state.running:
            self.begin_run()

    def _get_spiketimes(self, id: Any, clear: bool = False) -> Any:
        ids = np.asarray(id, np.int64).reshape(-1)
        if not len(ids):
            return {}
        when, cells = self._spikes()
        cells = cells + int(self.population.first_id)
        own = np.isin(cells, ids)
        return cells[own], when[own].copy()

    def _get_all_signals(self, variable: Any, ids: Any, clear: bool = False) -> tuple[Array, None]:
        wanted = np.array([self.population.id_to_index(cell) for cell in ids], np.int64)
        if not len(wanted):
            return np.empty((0, 0)), None
        name, engine, every = variable.name, self._engine, self._every
        count = (engine.now - self._start) // every + 1
        signal = np.full((count, len(wanted)), np.nan)
        for first, cells, values in self._parts.get(name, []):
            at = np.searchsorted(cells, wanted)
            there = (at < len(cells)) & (cells[np.minimum(at, len(cells) - 1)] == wanted)
            row = (first - self._start) // every
            signal[row : row + len(values), there] = values[:, at[there]]
        if name != "v" and (engine.now - self._start) % every == 0:  # what drives the next step
            row, sign = FIELDS[name]
            signal[-1] = sign * engine.conductances()[row - 1][self.population.first + wanted]
        return signal, None

    def _local_count(self, variable: Any, filter_ids: Any = None) -> dict[int, int]:
        _, cells = self._spikes()
        counts = np.bincount(cells, minlength=self.population.size)
        first = int(self.population.first_id)
        return {int(cell): int(counts[int(cell) - first]) for cell in self.filter_recorded(variable, filter_ids)}

    def get(self, variables: Any, *arguments: Any, **options: Any) -> Any:
        """The recorded data as a Neo block.

        PyNN takes all signals out of earlier segments, for good, if it is asked for some variables: it gets all here, and
        what was not asked for is left out of the block.
        """
        if (isinstance(variables, str) and variables == "all") or not any(True for _ in self.cache):
            return super().get(variables, *arguments, **options)
        names = [variables] if isinstance(variables, str) else list(variables)
        block = super().get("all", *arguments, **options)
        block.segments = [_only(names, segment) for segment in block.segments]
        return block

    # What the simulator tells

    def begin_run(self) -> None:
        """Keep the first sample of cells that have none."""
        engine = self._engine
        cells = self._new.pop("v", np.empty(0, np.int64))
        if len(cells) and (engine.now - self._start) % self._every == 0:
            values = engine.potentials()[self.population.first + cells]
            self._parts.setdefault("v", []).append((engine.now, cells, values[np.newaxis]))

    def take(self, first: int, states: Array, neurons: Array) -> None:
        """Keep what is recorded of the states ``[F, t, K]`` of ``neurons [K]`` after the steps from ``first`` on."""
        for name, cells in self._columns.items():
            begin = first + (name == "v")
            skip = (self._start - begin) % self._every
            at = np.searchsorted(neurons, self.population.first + cells)
            row, sign = FIELDS[name]
            values = sign * states[row, skip :: self._every][:, at]
            if len(values):
                self._parts.setdefault(name, []).append((begin + skip, cells, values))

    def forget(self) -> None:
        """Begin anew at the time that it is now."""
        self._parts = {}
        self._start = self._engine.now
        self._new = dict(self._columns)

    def _spikes(self) -> tuple[Array, Array]:
        """The times in ms and the cells of all spikes."""
        first, size = self.population.first, self.population.size
        if self.population.is_source:
            return self._engine.sent.of(first, size)
        samples, cells = self._engine.spikes.of(first, size)
        return np.round(samples * self._engine.dt, 12), cells
