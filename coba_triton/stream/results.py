"""What a long run has left: spikes, rates and traces, read when they are asked for."""

from __future__ import annotations

import csv
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.files import is_there, local_path, written_whole
from ..neuron.records import CobaLIFFeedForwardState, CobaLIFState
from ..ops import validation
from ..ops.spikes import WORD_BITS, word_count
from .sinks import crc32, difference_of
from .store import Refused, Store, check_attributes, columns_of, state_shape

Array = NDArray[Any]

READ_BYTES = 2**24  # of packed spikes that are unpacked at a time
DEFLATE = 1040  # times as long as it was is the most that zip's compression makes something
MIN_INTERVALS = 4  # a coefficient of variation of fewer says little


class Intervals(NamedTuple):
    """Intervals between the spikes of every neuron, ``[N]`` each.

    Attributes:
        number: of intervals.
        mean: in ms, NaN without intervals.
        cv: standard deviation over mean: 0 if regular, 1 of a Poisson process; NaN with fewer than
            :data:`MIN_INTERVALS` intervals.
    """

    number: Array
    mean: Array
    cv: Array


class Stored:
    """An array of a result; indexing reads what is asked for.

    Attributes:
        shape: of the array, time first.
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
        """The rows from ``time.start`` to ``time.stop``."""
        return np.asarray(self._array[time.start : time.stop])

    def __len__(self) -> int:
        return int(self.shape[0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype=dtype)


class StoredSpikes(Stored):
    """Packed spikes; indexing gives booleans."""

    def __init__(self, array: Any, steps: int) -> None:
        super().__init__(array, steps)
        self.dtype = np.dtype(bool)

    def words(self, start: int, stop: int) -> Array:
        """The words that hold the steps from ``start`` to ``stop``; those of other steps in them are cleared."""
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
    """A slice of consecutive steps, with a positive stride, and whether it stands for a single step."""
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
    """A run's result; what it has is read from the sink when it is asked for, in blocks where it may be large.

    Attributes:
        attributes: all attributes: ``config``, ``versions`` and more.
        steps: finished steps.
        finished: whether that is the whole run.
        shape: of the neurons.
        dt: time step in ms.
        traces: name to an array ``[T / every, K]`` of the recorded neurons, read by slices: ``v`` in mV, ``g_e`` and
            ``g_i`` in uS, at the end of every step, or of every n-th: row ``j`` at ``(j + 1) * every * dt``.
        every: steps from one row of the traces to the next.
        recorded: the neurons of the traces, ``[K]``.
        populations: name to the neurons whose spikes were counted.
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
        """Number of neurons N, all axes together."""
        return math.prod(self.shape)

    @property
    def duration(self) -> float:
        """Of the finished steps, in ms."""
        return self.steps * self.dt

    @property
    def spikes(self) -> StoredSpikes:
        """All spikes, ``[T, *neurons]``: ``result.spikes[1000:2000]`` and ``result.spikes[:, 3]`` give booleans."""
        if "spikes" not in self:
            raise ValueError("the spikes were not recorded; run again with Record(spikes=True)")
        return StoredSpikes(self._arrays["spikes"], self.steps)

    @property
    def state(self) -> CobaLIFFeedForwardState | CobaLIFState:
        """The state after the last finished step, to go on from it: ``simulate(..., state=result.state)``."""
        if "state" not in self:
            raise ValueError(
                "the result has no state; run it for a step at least, and open the parts of a batch by themselves"
            )
        fields = map(torch.from_numpy, np.array(self._arrays["state"][:]))
        return (CobaLIFState if self.attributes["config"]["network"] == "CobaLIFRecurrent" else CobaLIFFeedForwardState)(
            *fields
        )

    def array(self, name: str) -> Array:
        """A whole array by its name: one of the caller's, a parameter of every neuron, ``input_e``, ...

        Raises:
            KeyError: if there is none of this name.
        """
        if name not in self._arrays:
            raise KeyError(f"the result has no array {name!r}; it has {', '.join(sorted(self._arrays))}")
        return np.asarray(self._arrays[name][...])

    def parameter(self, name: str) -> Array:
        """A parameter of the neurons by its name in :class:`CobaLIFParameters`, broadcast to all of them, ``[N]``."""
        value = self.array(name) if name in self._arrays else self.attributes["config"]["parameters"][name]
        return np.broadcast_to(value, self.shape).ravel()

    def event_blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Array, Array]]:
        """Spikes as ``(steps, neurons)``, block by block, in the order of time and then of neurons.

        Args:
            start: first step.
            stop: step after the last, None for all.
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
            start: first step.
            stop: step after the last, None for all.
            neurons: indices of the neurons to list or a mask of them, None for all.

        Returns:
            Times in ms, a spike of step k coming at its end ``(k + 1) dt``, and neurons (indices into the flattened ones
            where they have several axes), both ``[S]``, in the order of time and then of neurons.
        """
        wanted = self._wanted(neurons)
        parts = [(s[wanted[n]], n[wanted[n]]) for s, n in self.event_blocks(start, stop)] or [(np.empty(0, np.int64),) * 2]
        steps, found = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return (steps + 1) * self.dt, found

    def _wanted(self, neurons: Any) -> Array:
        """Whether each neuron is one of those that are chosen, ``[N]``; None chooses all."""
        wanted = np.zeros(self.neurons, bool)
        wanted[slice(None) if neurons is None else validation.check_neurons(neurons, self.neurons, "neurons")] = True
        return wanted

    def _width(self, bin_ms: float) -> int:
        """Steps in a time bin."""
        width = validation.check_time(bin_ms, "bin_ms") / self.dt
        return round(min(max(width, 1), max(self.steps, 1)))

    def spike_counts(self) -> Array:
        """Number of spikes of every neuron, ``[N]``."""
        counts = np.zeros(self.neurons, np.int64)
        for _, neurons in self.event_blocks():
            counts += np.bincount(neurons, minlength=self.neurons)
        return counts

    def firing_rates(self) -> Array:
        """Mean rate of every neuron in Hz, ``[N]``; NaN before the first step."""
        return self.spike_counts() / (self.duration / 1000) if self.steps else np.full(self.neurons, np.nan)

    def counts(self, bin_steps: int = 1, neurons: Any = None) -> Array:
        """Number of spikes in time bins.

        Args:
            bin_steps: steps in a bin; the last one may be shorter.
            neurons: the name of a recorded population, indices of neurons or a mask of them, or None for all of them.

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
        """Population rate over time.

        Args:
            bin_ms: width of the bins in ms, rounded to steps, at least one.
            neurons: see :meth:`counts`.

        Returns:
            The edges of the bins in ms ``[bins + 1]`` and the mean rate of a neuron in Hz ``[bins]``, NaN of no neurons.
        """
        width = self._width(bin_ms)
        counts = self.counts(width, neurons)
        size = len(self.populations[neurons]) if isinstance(neurons, str) else np.count_nonzero(self._wanted(neurons))
        edges = np.append(np.arange(0, self.steps, width), self.steps) * self.dt
        return edges, counts / np.diff(edges) * 1000 / (size or math.nan)

    def intervals(self) -> Intervals:
        """Count, mean and coefficient of variation of the intervals between the spikes of every neuron."""
        last = np.full(self.neurons, -1, np.int64)
        count, total, squares = np.zeros((3, self.neurons), np.int64)  # whole steps: the sums are exact
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
        """A histogram of all intervals between the spikes of a neuron.

        Args:
            edges: of the bins, in ms.
            neurons: see :meth:`counts`; not a name.

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
        """``(neurons, intervals in steps)`` that end in a block; ``last`` holds every neuron's last spike, -1 for none."""
        order = np.argsort(neurons, kind="stable")
        owner, at = neurons[order], steps[order]
        before = np.empty_like(at)
        before[1:] = at[:-1]
        first = np.ones(len(at), bool)
        first[1:] = owner[1:] != owner[:-1]
        before[first] = last[owner[first]]
        last[owner] = at  # the last one of each neuron stays
        known = before >= 0
        yield owner[known], (at - before)[known]

    def synchrony(self, bin_ms: float = 3.0, neurons: Any = None) -> float:
        """Variance over mean of the population's spike count in time bins: 1 for independent Poisson spikes.

        Source: Potjans and Diesmann 2014, doi:10.1093/cercor/bhs358, with their bins of 3 ms.

        Returns:
            NaN without spikes or with fewer than two whole bins.
        """
        width = self._width(bin_ms)
        counts = self.counts(width, neurons)[: self.steps // width]
        return float(counts.var() / counts.mean()) if len(counts) > 1 and counts.any() else math.nan

    def to_csv(self, path: str | Path) -> None:
        """Write every spike as a line ``time_ms,neuron``, in the order of time; whole or not at all.

        Args:
            path: of the file, replaced if it is there.
        """
        with written_whole(local_path(path, "path")) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["time_ms", "neuron"])
            for steps, neurons in self.event_blocks():
                times = np.round((steps + 1) * self.dt, 9)
                writer.writerows(zip(times.tolist(), neurons.tolist(), strict=True))

    def to_neo(self) -> Any:
        """The result as a ``neo.Block`` of one segment: a spike train a neuron, and the traces as analog signals.

        It holds all spikes in memory. Elephant takes it as it is.

        Raises:
            ImportError: if neo is not installed.
        """
        try:
            import neo
        except ImportError:
            raise ImportError(
                'to_neo() needs the package neo, which is not installed; run: pip install "coba-triton[neo]"'
            ) from None
        from quantities import ms  # neo's units

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
                units="mV" if name == "v" else "uS",
                t_start=self.every * self.dt * ms,
                sampling_period=self.every * self.dt * ms,
                name=name,
                array_annotations={"neuron": self.recorded},
            )
            segment.analogsignals.append(signal)
        block.segments.append(segment)
        return block


class _SideBySide:
    """An array of several results, one after the other along the second axis; read by slices of the first."""

    def __init__(self, results: Sequence[Result], name: str) -> None:
        self._parts = [result._arrays[name] for result in results]
        first = self._parts[0].shape
        self.shape = (first[0], sum(array.shape[1] for array in self._parts), *first[2:])

    def __getitem__(self, key: Any) -> Array:
        return np.concatenate([array[key] for array in self._parts], 1)


def _common(result: Result) -> dict[str, Any]:
    """What runs over parts of one batch have in common."""
    config = result.attributes["config"]
    own = ("source", "initial_state", "block_steps", "attributes")
    recorded = {name: config["record"][name] for name in ("spikes", "variables", "every")} | {
        "traces": len(result.traces) > 0
    }
    return {name: value for name, value in config.items() if name not in own} | {
        "neurons": ["B", *result.shape[1:]],
        "record": recorded,
    }


def _join(results: Sequence[Result]) -> Result:
    """The results of parts of a batch as one."""
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
    """Open what a run has left, a zarr group or an ``.npz`` file; a run that goes on or was killed may be read as well.

    Args:
        path: of the result; or of several, of runs that simulated one row or more of a batch each: spikes and traces are
            those of the whole batch, as far as all runs have come; populations are not.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is no result or damaged, or if several are not of one batch.

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
    return Result(*_read_npz(path), path)


def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Attributes and arrays of a file, each of the shape and the checksum that the attributes say."""
    errors = (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        RecursionError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    )
    try:
        if not path.is_file():
            raise ValueError("no regular file")
        with zipfile.ZipFile(path) as file:
            members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            attributes = json.loads(str(_member(file, members.pop("attributes"), "str", ())))
            check_attributes(str(path), attributes)
            kept, steps, config = attributes["arrays"], attributes["steps_done"], attributes["config"]
            shapes = {name: tuple(array["shape"]) for name, array in kept.items()}
            grown = {name: (column.rows(steps), *column.shape) for name, column in columns_of(config).items()}
            grown |= {"state": state_shape(config)[1:]} if steps else {}
            if set(kept) != set(members) or any(shapes[name] != shape for name, shape in grown.items()):
                raise ValueError(f"it holds {sorted(members)}, which are not what {steps} steps of it leave")
            arrays = {name: _member(file, info, kept[name]["dtype"], shapes[name]) for name, info in members.items()}
            for name, array in arrays.items():
                if crc32(array) != kept[name]["crc32"]:
                    raise ValueError(f"{name} is not what was written")
    except Refused:
        raise
    except errors as error:
        raise ValueError(f"{path} is no result of coba_triton, or damaged ({error}); give the path of one") from None
    return attributes, arrays


def _member(file: zipfile.ZipFile, info: zipfile.ZipInfo, dtype: str, shape: tuple[int, ...]) -> Array:
    """An array of a file, once it is known to be of this dtype and shape, and its size to be one that the file can hold."""
    with file.open(info) as member:
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        found, by_column, kind = read_header[np.lib.format.read_magic(member)](member)
        size = kind.itemsize * math.prod(found)
        name = "str" if kind.kind == "U" else kind.name
        if (found, name) != (shape, dtype) or size > min(info.file_size, DEFLATE * info.compress_size):
            raise ValueError(f"{info.filename} is {kind} of shape {list(found)}, in {info.compress_size:,} bytes")
        array = np.empty(size, np.uint8)
        for begin in range(0, size, READ_BYTES):
            part = array[begin : begin + READ_BYTES]
            part[:] = np.frombuffer(member.read(len(part)), np.uint8)
        if member.read(1):  # the end, at which zipfile compares its own checksum
            raise ValueError(f"{info.filename} is longer than its shape")
    return array.view(kind).reshape(found, order="F" if by_column else "C")
