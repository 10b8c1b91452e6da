"""The result of a long run: its spikes, rates and traces. They are read from where they are kept when they are asked for."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..common.files import is_there, local_path, written_whole
from ..neuron.records import OPTIONAL_PARAMETERS, FeedForwardState, RecurrentState
from ..ops import validation
from ..ops.spikes import WORD_BITS, word_count
from .npz import read_npz
from .states import unpack_state
from .store import Array, Store, difference_of

READ_BYTES = 2**24  # bytes of packed spikes that are unpacked at a time
MIN_INTERVALS = 4  # with fewer intervals, a coefficient of variation says little


class Intervals(NamedTuple):
    """Intervals between the spikes of every neuron. Each field has one number for each neuron, ``[N]``.

    Attributes:
        number: how many intervals the neuron has.
        mean: their mean in ms, NaN without intervals.
        cv: their standard deviation divided by their mean. Regular spikes have 0, a Poisson process has 1. NaN with fewer
            than :data:`MIN_INTERVALS` intervals.
    """

    number: Array
    mean: Array
    cv: Array


class Stored:
    """An array of a result. Indexing it reads the part that is asked for.

    Attributes:
        shape: the shape of the array; the first axis is time.
    """

    def __init__(self, array: Any, length: int) -> None:
        self._array = array
        self.shape = (length, *array.shape[1:])

    def __getitem__(self, key: Any) -> Array:
        time, *rest = key if isinstance(key, tuple) else (key,)
        time, scalar = _slice(time, self.shape[0])
        rows = self._read(time)
        return np.asarray(rows[(0 if scalar else slice(None, None, time.step), *rest)])

    def _read(self, time: slice) -> Array:
        """Read the rows from ``time.start`` to ``time.stop``."""
        return np.asarray(self._array[time.start : time.stop])

    def __len__(self) -> int:
        return int(self.shape[0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype=dtype)


class StoredSpikes(Stored):
    """Spikes, which are kept as bits. Indexing gives booleans."""

    def __init__(self, array: Any, steps: int) -> None:
        super().__init__(array, steps)
        self.dtype = np.dtype(bool)

    def words(self, start: int, stop: int) -> Array:
        """The words that hold the steps from ``start`` to ``stop``. The bits of other steps in them are 0."""
        first = start // WORD_BITS
        words = super()._read(slice(first, word_count(stop)))
        if (words.size and start % WORD_BITS) or stop % WORD_BITS:
            words = words.copy()
            if stop % WORD_BITS:
                words[-1] &= np.int32((1 << stop % WORD_BITS) - 1)
            words[0] &= np.int32(-1 << start % WORD_BITS)
        return words

    def _read(self, time: slice) -> Array:
        if time.stop <= time.start:
            return np.zeros((0, *self.shape[1:]), bool)
        words = self.words(time.start, time.stop)
        bits = np.arange(WORD_BITS, dtype=np.int32).reshape(-1, *[1] * (words.ndim - 1))
        dense = ((words[:, None] >> bits) & 1).astype(bool).reshape(-1, *self.shape[1:])
        first = time.start // WORD_BITS * WORD_BITS
        return dense[time.start - first : time.stop - first]


def _slice(key: Any, length: int) -> tuple[slice, bool]:
    """A key for the time axis as a slice with a positive stride, and whether the key was a single step."""
    if isinstance(key, int | np.integer):
        step = int(key) + (length if key < 0 else 0)
        if not 0 <= step < length:
            raise IndexError(f"step must be from {-length} to {length - 1}, got {key}")
        return slice(step, step + 1, 1), True
    if not isinstance(key, slice):
        raise TypeError(f"time is indexed by an int or a slice, got {type(key).__name__}")
    start, stop, stride = key.indices(length)
    if stride < 1:
        raise ValueError(f"time is sliced forward, got a stride of {stride}")
    return slice(start, max(start, stop), stride), False


class Result:
    """The result of a run. Its arrays are read when they are asked for; large ones are read block by block.

    Attributes:
        attributes: all attributes: ``config``, ``versions`` and more.
        steps: how many steps are finished.
        finished: whether the whole run is finished.
        shape: the axes of the neurons.
        dt: time step in ms.
        traces: arrays ``[T / every, K]`` of the recorded neurons by name, which are read by slices: ``v`` in mV, ``g_e``
            and ``g_i`` in uS. Row ``j`` is the state at the time ``(j + 1) * every * dt``, the end of a step.
        every: how many steps lie between two rows of the traces.
        recorded: indices of the neurons that the traces belong to, ``[K]``.
        populations: indices of the neurons whose spikes were counted, by the population's name.
    """

    def __init__(self, attributes: dict[str, Any], arrays: Mapping[str, Any], path: Path | None = None) -> None:
        config = attributes["config"]
        self.attributes, self._arrays, self.path = attributes, arrays, path
        self.steps: int = attributes["steps_done"]
        self.finished: bool = attributes["finished"]
        self.shape: tuple[int, ...] = tuple(config["neurons"])
        self.dt: float = config["dt_ms"]
        self.every: int = config["record"].get("every", 1)
        rows = self.steps // self.every
        self.traces = {name: Stored(arrays[name], rows) for name in ("v", "g_e", "g_i") if name in arrays}
        self.recorded = self.array("recorded") if "recorded" in arrays else np.empty(0, np.int64)
        names = config["record"]["populations"]
        self.populations = {name: self.array(f"population_{number}") for number, name in enumerate(names)}

    def __repr__(self) -> str:
        where = f" in {self.path}" if self.path else ""
        return f"<Result of {self.steps:,} steps of {self.dt:g} ms, neurons {list(self.shape)}{where}>"

    def __contains__(self, name: str) -> bool:
        """Whether the result has an array of this name."""
        return name in self._arrays

    @property
    def neurons(self) -> int:
        """The number of neurons N, over all axes."""
        return math.prod(self.shape)

    @property
    def duration(self) -> float:
        """The time that the finished steps cover, in ms."""
        return self.steps * self.dt

    @property
    def spikes(self) -> StoredSpikes:
        """All spikes, ``[T, *neurons]``: ``result.spikes[1000:2000]`` and ``result.spikes[:, 3]`` give booleans."""
        if "spikes" not in self:
            raise ValueError("the spikes were not recorded; run again with Record(spikes=True)")
        return StoredSpikes(self._arrays["spikes"], self.steps)

    @property
    def state(self) -> FeedForwardState | RecurrentState:
        """The state after the last finished step. ``simulate(..., state=result.state)`` goes on from it."""
        if "state" not in self:
            raise ValueError(
                "the result has no state; run it for a step at least, and open the parts of a batch by themselves"
            )
        config, array = self.attributes["config"], torch.from_numpy(np.array(self._arrays["state"][:]))
        state: FeedForwardState | RecurrentState = unpack_state(
            array, config["network"] == "CobaLIFRecurrent", config.get("longest_delay", 1)
        )
        return state

    def array(self, name: str) -> Array:
        """A whole array by its name: one that the caller added, a parameter that differs between neurons, ``input_e``, ...

        Raises:
            KeyError: if the result has no array of this name.
        """
        if name not in self._arrays:
            raise KeyError(f"the result has no array {name!r}; it has {', '.join(sorted(self._arrays))}")
        return np.asarray(self._arrays[name][...])

    def parameter(self, name: str) -> Array:
        """A parameter by its name in :class:`CobaLIFParameters`, with one number for each neuron, ``[N]``."""
        numbers = OPTIONAL_PARAMETERS | self.attributes["config"]["parameters"]
        value = self.array(name) if name in self._arrays else numbers[name]
        return np.broadcast_to(value, self.shape).ravel()

    def _unit(self, name: str) -> str:
        """The unit of a variable: of ``g_e`` and ``g_i`` that of conductances or currents, none if neurons have both."""
        if name == "v":
            return "mV"
        conductances = self.parameter("conductance_based") != 0
        return "uS" if conductances.all() else "" if conductances.any() else "nA"

    def event_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Array, Array]]:
        """Spikes as ``(steps, neurons)``, block by block, sorted by time and then by neuron.

        Args:
            start: the first step.
            stop: the step after the last one; None for all steps.
        """
        steps, _ = _slice(slice(start, stop), self.steps)
        spikes = self.spikes
        width = max(READ_BYTES // (4 * max(self.neurons, 1)), 1) * WORD_BITS
        for begin in range(steps.start // width * width, steps.stop, width):
            first, last = max(begin, steps.start), min(begin + width, steps.stop)
            words = spikes.words(first, last).reshape(-1, self.neurons)
            word, neuron = words.nonzero()
            bits = (words[word, neuron][:, None] >> np.arange(WORD_BITS, dtype=np.int32)) & 1
            event, bit = bits.nonzero()
            step = (first // WORD_BITS + word[event]) * WORD_BITS + bit
            order = np.lexsort((neuron[event], step))
            yield step[order], neuron[event][order]

    def events(self, start: int = 0, stop: int | None = None, neurons: Any = None) -> tuple[Array, Array]:
        """Spikes as a list.

        Args:
            start: the first step.
            stop: the step after the last one; None for all steps.
            neurons: indices or a mask of the neurons whose spikes are listed; None for all neurons.

        Returns:
            Times in ms and neurons, ``[S]`` each, sorted by time and then by neuron. A spike in step k has the time at which
            the step ends, ``(k + 1) dt``. If the neurons have several axes, they are counted over all axes.
        """
        wanted = self._wanted(neurons)
        parts = [(s[wanted[n]], n[wanted[n]]) for s, n in self.event_blocks(start, stop)] or [(np.empty(0, np.int64),) * 2]
        steps, found = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return (steps + 1) * self.dt, found

    def _wanted(self, neurons: Any) -> Array:
        """For each neuron, whether it is chosen, ``[N]``; None chooses all."""
        wanted = np.zeros(self.neurons, bool)
        wanted[slice(None) if neurons is None else validation.check_neurons(neurons, self.neurons, "neurons")] = True
        return wanted

    def _width(self, bin_ms: float) -> int:
        """How many steps a time bin has."""
        width = validation.check_time(bin_ms, "bin_ms") / self.dt
        return round(min(max(width, 1), max(self.steps, 1)))

    def spike_counts(self) -> Array:
        """The number of spikes of every neuron, ``[N]``."""
        counts = np.zeros(self.neurons, np.int64)
        for _, neurons in self.event_blocks():
            counts += np.bincount(neurons, minlength=self.neurons)
        return counts

    def firing_rates(self) -> Array:
        """The mean rate of every neuron in Hz, ``[N]``; NaN if no step is finished."""
        return self.spike_counts() / (self.duration / 1000) if self.steps else np.full(self.neurons, np.nan)

    def counts(self, bin_steps: int = 1, neurons: Any = None) -> Array:
        """The number of spikes in time bins.

        Args:
            bin_steps: how many steps a bin has; the last bin may be shorter.
            neurons: the name of a recorded population, indices or a mask of neurons, or None for all neurons.

        Returns:
            ``[ceil(T / bin_steps)]``.
        """
        bin_steps = min(validation.check_int(bin_steps, "bin_steps"), max(self.steps, 1))
        bins = -(-self.steps // bin_steps)
        if isinstance(neurons, str):
            if neurons not in self.populations:
                raise ValueError(f"the result has no population {neurons!r}; it has {', '.join(self.populations) or 'none'}")
            column = Stored(self._arrays["counts"], self.steps)[:, list(self.populations).index(neurons)]
            return np.add.reduceat(column, np.arange(0, self.steps, bin_steps)) if bins else np.zeros(0, np.int64)
        wanted = self._wanted(neurons)
        counts = np.zeros(bins, np.int64)
        for steps, found in self.event_blocks():
            counts += np.bincount(steps[wanted[found]] // bin_steps, minlength=bins)
        return counts

    def rates(self, bin_ms: float, neurons: Any = None) -> tuple[Array, Array]:
        """The mean rate of a population over time.

        Args:
            bin_ms: width of the bins in ms; it is rounded to a whole number of steps, at least one.
            neurons: as for :meth:`counts`.

        Returns:
            The edges of the bins in ms ``[bins + 1]`` and the mean rate of a neuron in Hz ``[bins]``; NaN if no neuron is
            chosen.
        """
        width = self._width(bin_ms)
        counts = self.counts(width, neurons)
        size = len(self.populations[neurons]) if isinstance(neurons, str) else np.count_nonzero(self._wanted(neurons))
        edges = np.append(np.arange(0, self.steps, width), self.steps) * self.dt
        return edges, counts / np.diff(edges) * 1000 / (size or math.nan)

    def intervals(self) -> Intervals:
        """The number, the mean and the coefficient of variation of the intervals between every neuron's spikes."""
        last = np.full(self.neurons, -1, np.int64)
        count, total, squares = np.zeros((3, self.neurons), np.int64)  # whole steps, so the sums are exact
        for steps, neurons in self.event_blocks():
            for owner, lengths in self._lengths(steps, neurons, last):
                count += np.bincount(owner, minlength=self.neurons)
                np.add.at(total, owner, lengths)
                np.add.at(squares, owner, lengths**2)
        n = np.where(count > 0, count, np.nan)
        mean = total / n
        variance = np.maximum(count * squares.astype(np.float64) - total.astype(np.float64) ** 2, 0) / n**2
        cv = np.where(count >= MIN_INTERVALS, np.sqrt(variance) / mean, np.nan)
        return Intervals(count, mean * self.dt, cv)

    def interval_counts(self, edges: Array, neurons: Any = None) -> Array:
        """A histogram of the intervals between the spikes of a neuron, all chosen neurons together.

        Args:
            edges: edges of the bins in ms.
            neurons: indices or a mask of neurons, or None for all neurons.

        Returns:
            ``[len(edges) - 1]``.
        """
        try:
            edges = np.asarray(edges, np.float64)
        except (OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"edges must be numbers in ms, got {edges!r:.100} ({error})") from None
        if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
            raise ValueError(f"edges must be at least two numbers in ms, ascending, got {edges!r:.100}")
        wanted = self._wanted(neurons)
        last, histogram = np.full(self.neurons, -1, np.int64), np.zeros(len(edges) - 1, np.int64)
        for steps, found in self.event_blocks():
            for owner, lengths in self._lengths(steps, found, last):
                histogram += np.histogram(lengths[wanted[owner]] * self.dt, edges)[0]
        return histogram

    @staticmethod
    def _lengths(steps: Array, neurons: Array, last: Array) -> Iterator[tuple[Array, Array]]:
        """``(neurons, intervals in steps)`` of the intervals that end in a block.

        ``last`` has the step of every neuron's last spike, -1 for none, and is brought up to date.
        """
        order = np.argsort(neurons, kind="stable")
        owner, at = neurons[order], steps[order]
        before = np.empty_like(at)
        before[1:] = at[:-1]
        first = np.ones(len(at), bool)
        first[1:] = owner[1:] != owner[:-1]
        before[first] = last[owner[first]]
        last[owner] = at  # of several spikes of a neuron, the last one stays
        known = before >= 0
        yield owner[known], (at - before)[known]

    def synchrony(self, bin_ms: float = 3.0, neurons: Any = None) -> float:
        """The variance of the population's spike count in time bins, divided by its mean.

        It is 1 for independent Poisson spikes. Source: Potjans and Diesmann 2014, doi:10.1093/cercor/bhs358, who use bins
        of 3 ms.

        Returns:
            The ratio; NaN without spikes or with fewer than two whole bins.
        """
        width = self._width(bin_ms)
        counts = self.counts(width, neurons)[: self.steps // width]
        return float(counts.var() / counts.mean()) if len(counts) > 1 and counts.any() else math.nan

    def to_csv(self, path: str | Path) -> None:
        """Write a line ``time_ms,neuron`` for every spike, sorted by time. The file appears whole or not at all.

        Args:
            path: the file; one that is already there is replaced.
        """
        with written_whole(local_path(path, "path")) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["time_ms", "neuron"])
            for steps, neurons in self.event_blocks():
                times = np.round((steps + 1) * self.dt, 9)
                writer.writerows(zip(times.tolist(), neurons.tolist(), strict=True))

    def to_neo(self) -> Any:
        """The result as a ``neo.Block`` with one segment: one spike train for each neuron, and the traces as analog signals.

        The block holds all spikes in memory. Elephant takes it as it is.

        Raises:
            ImportError: if neo is not installed.
        """
        try:
            import neo
        except ImportError:
            raise ImportError(
                'to_neo() needs the package neo, which is not installed; run: pip install "coba-triton[neo]"'
            ) from None
        from quantities import ms  # the package of units that neo uses

        block = neo.Block(name="coba_triton", coba_triton_attributes=json.dumps(self.attributes))
        segment = neo.Segment(name="run")
        times, neurons = self.events() if "spikes" in self else (np.empty(0), np.empty(0, np.int64))
        order = np.argsort(neurons, kind="stable")
        bounds = np.searchsorted(neurons[order], np.arange(self.neurons + 1))
        if "spikes" in self:
            for neuron in range(self.neurons):
                train = times[order[bounds[neuron] : bounds[neuron + 1]]]
                segment.spiketrains.append(neo.SpikeTrain(train, t_stop=self.duration, units="ms", neuron=neuron))
        for name, trace in self.traces.items():
            signal = neo.AnalogSignal(
                trace[:],
                units=self._unit(name) or "dimensionless",
                t_start=self.every * self.dt * ms,
                sampling_period=self.every * self.dt * ms,
                name=name,
                array_annotations={"neuron": self.recorded},
            )
            segment.analogsignals.append(signal)
        block.segments.append(segment)
        return block


class _SideBySide:
    """One array of several results, joined along the second axis. It is read by slices of the first axis."""

    def __init__(self, results: Sequence[Result], name: str) -> None:
        self._parts = [result._arrays[name] for result in results]
        first = self._parts[0].shape
        self.shape = (first[0], sum(array.shape[1] for array in self._parts), *first[2:])

    def __getitem__(self, key: Any) -> Array:
        return np.concatenate([array[key] for array in self._parts], 1)


def _common(result: Result) -> dict[str, Any]:
    """The configuration without what may differ between runs over parts of one batch."""
    config = result.attributes["config"]
    own = ("source", "initial_state", "block_steps", "attributes")
    recorded = {name: config["record"][name] for name in ("spikes", "variables", "every")}
    recorded["traces"] = len(result.traces) > 0
    common = {name: value for name, value in config.items() if name not in own}
    return common | {"neurons": ["B", *result.shape[1:]], "record": recorded}


def _join(results: Sequence[Result]) -> Result:
    """Join the results of runs over parts of a batch into one."""
    first = results[0]
    for result in results:
        difference = difference_of(_common(first), _common(result))
        if difference or not result.shape:
            raise ValueError(
                f"results that are read as one must be of the same neurons in different rows of a batch, but from "
                f"{first.path} to {result.path} {difference or 'there is no axis of rows'}; open each by itself"
            )
    config = first.attributes["config"]
    offsets = np.cumsum([0, *(result.neurons for result in results)])
    arrays: dict[str, Any] = {name: first.array(name) for name in config["parameters"] if name in first}
    together = len({result.steps for result in results}) == 1
    side_by_side = ("spikes", *first.traces, *(["state"] if together else []))
    arrays |= {name: _SideBySide(results, name) for name in side_by_side if name in first}
    if first.traces:
        arrays["recorded"] = np.concatenate([r.recorded + offset for r, offset in zip(results, offsets, strict=False)])
    joined = {
        "neurons": [sum(result.shape[0] for result in results), *first.shape[1:]],
        "source": [result.attributes["config"]["source"] for result in results],
        "initial_state": [result.attributes["config"]["initial_state"] for result in results],
        "record": config["record"] | {"populations": {}, "inputs": False},
    }
    steps, finished = min(result.steps for result in results), all(result.finished for result in results)
    return Result(first.attributes | {"config": config | joined, "steps_done": steps, "finished": finished}, arrays)


def open_result(path: str | Path | Sequence[str | Path]) -> Result:
    """Open the result of a run: a zarr group or an ``.npz`` file. A run that goes on, or that was killed, can be opened too.

    Args:
        path: the path of a result. Or a list of paths of runs that each simulated some rows of one batch: then the spikes
            and traces are those of the whole batch, up to the step that all runs have finished, without populations.

    Raises:
        FileNotFoundError: if there is nothing at a path.
        ValueError: if there is no result, or a damaged one, or if several results are not of one batch.

    Example:
        >>> result = open_result("run.zarr")  # doctest: +SKIP
        >>> times, neurons = result.events(0, 10_000)  # doctest: +SKIP
        >>> result.spikes[10_000:10_100].shape  # doctest: +SKIP
        (100, 1000)
    """
    if isinstance(path, list | tuple) and path:
        return _join([open_result(part) for part in path])
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a path, or a list of at least one, got {type(path).__name__}")
    path = local_path(path, "path")
    if not is_there(path):
        raise FileNotFoundError(f"there is no result at {path}; give the path of a .zarr folder or an .npz file")
    if path.is_dir():
        return Result(*Store(path).result(), path)
    return Result(*read_npz(path), path)
