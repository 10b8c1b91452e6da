"""Input sources of a configuration. Each gives its input for any block of steps."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from coba_triton import EventSource, PoissonSource, Synapses, read_events
from coba_triton.stream.sources import MadeSource

from .config import (
    Channels,
    Config,
    EventsInput,
    EventSpikes,
    FileInput,
    FileSignal,
    FileSpikes,
    NoInput,
    PoissonInput,
    PoissonSpikes,
    RecordingInput,
    Unit,
    builtin_folder,
)
from .errors import UserError
from .weights import dense, input_weights, place, populations, read_array

Members = Mapping[str, NDArray[np.int64]]

ECG_PROVENANCE = (
    "30 s, from 19:35 on, of record 208 (lead MLII) of the MIT-BIH Arrhythmia Database on PhysioNet, under the Open Data "
    "Commons Attribution License v1.0; Moody and Mark 2001, doi:10.13026/C2F305; Goldberger et al. 2000, "
    "doi:10.1161/01.CIR.101.23.e215"
)


@dataclass(frozen=True)
class Encoded:
    """A signal at the steps of the simulation, and its delta events.

    Attributes:
        values: the signal at the start of every step, in ``unit``, ``[T]``.
        unit: the unit of the signal, None if it has none.
        threshold: the encoder's threshold, in ``unit``.
        events: the number of ON and of OFF events in every step, ``[T, 2]``.
        provenance: where the recording comes from.
    """

    values: NDArray[np.float64]
    unit: str | None
    threshold: float
    events: NDArray[np.int32]
    provenance: str | None


class Source(Protocol):
    """The input of the population. It can be read as net conductances, or as channels with weights."""

    @property
    def weights(self) -> NDArray[np.float32] | Synapses:
        """The weights from the channels to the neurons in uS, ``[N, I]``."""
        ...

    def channels(self, start: int, stop: int) -> NDArray[np.float32]:
        """The channels in steps ``start`` to ``stop``, ``[stop - start, I]``; no number is negative."""
        ...

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """The net conductance in uS that every neuron gets in steps ``start`` to ``stop``, ``[stop - start, N]``."""
        ...


class _Own(ABC):
    """Every neuron has its own input. As channels, it has one for its excitation and one for its inhibition."""

    neurons: int

    @property
    def weights(self) -> Synapses:
        each = np.arange(2 * self.neurons)
        signs = np.repeat(np.array([[1], [-1]], np.float32), self.neurons, axis=0)
        return Synapses.from_coo(each % self.neurons, each, signs, shape=(self.neurons, 2 * self.neurons))

    def channels(self, start: int, stop: int) -> NDArray[np.float32]:
        net = self.read(start, stop)
        return np.concatenate([np.maximum(net, 0), np.maximum(-net, 0)], axis=1)

    @abstractmethod
    def read(self, start: int, stop: int) -> NDArray[np.float32]: ...


class _FannedOut(ABC):
    """Channels from which weights lead to the neurons."""

    weights: NDArray[np.float32] | Synapses

    @abstractmethod
    def channels(self, start: int, stop: int) -> NDArray[np.float32]: ...

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        # channel by channel: a matrix product may round in another way if the block has another length
        channels = self.channels(start, stop).T
        if isinstance(self.weights, Synapses):
            net = np.zeros((stop - start, self.weights.neurons), dtype=np.float32)
            sources = self.weights.source_of()
            own = self.weights.weights
            each = (own[sources, 0] if own.dim() == 2 else own.expand(len(sources))).numpy()
            targets, indptr = self.weights.targets.numpy(), self.weights.indptr.numpy()
            for events, (first, last) in zip(channels, itertools.pairwise(indptr), strict=True):
                np.add.at(net.T, targets[first:last], each[first:last, None] * events)
            return net
        net = np.zeros((stop - start, len(self.weights)), dtype=np.float32)
        for events, weights in zip(channels, self.weights.T, strict=True):
            net += events[:, None] * weights
        return net


def open_source(config: Config) -> Source:
    """Open the source that a configuration names, and check that it is long enough.

    Raises:
        UserError: if a file cannot be read or does not fit, or a package is missing.
    """
    settings, dt, steps, neurons = config.input, config.simulation.dt, config.simulation.steps, config.neuron.count
    if isinstance(settings, PoissonInput):
        return PoissonDrive(settings, dt, steps, neurons)
    if isinstance(settings, EventsInput):
        return EventDrive(settings, dt, steps, neurons)
    if isinstance(settings, FileInput):
        return FileSource(settings, steps, neurons)
    if isinstance(settings, RecordingInput):
        return RecordingSource(settings, dt, steps, neurons, populations(config))
    if isinstance(settings, NoInput):
        return NoChannels(neurons)
    members = populations(config)
    groups = [_open_channels(group, dt, steps, neurons, members) for group in (settings, *settings.more)]
    return groups[0] if len(groups) == 1 else JoinedChannels(groups)


def _open_channels(group: Channels, dt: float, steps: int, neurons: int, members: Members) -> _FannedOut:
    spikes, fan_out = group.spikes, group.fan_out
    if isinstance(spikes, PoissonSpikes):
        return PoissonChannels(spikes, fan_out, dt, steps, neurons, members)
    if isinstance(spikes, EventSpikes):
        return EventChannels(spikes, fan_out, dt, steps, neurons, members)
    return FileChannels(spikes, fan_out, steps, neurons, members)


class NoChannels(_FannedOut):
    """No input."""

    def __init__(self, neurons: int) -> None:
        self.weights = np.empty((neurons, 0), np.float32)

    def channels(self, start: int, stop: int) -> NDArray[np.float32]:
        return np.empty((stop - start, 0), np.float32)


class JoinedChannels(_FannedOut):
    """Several groups of channels, side by side."""

    def __init__(self, groups: Sequence[_FannedOut]) -> None:
        self.groups = groups
        self.weights = _side_by_side([group.weights for group in groups])

    def channels(self, start: int, stop: int) -> NDArray[np.float32]:
        return np.concatenate([group.channels(start, stop) for group in self.groups], axis=1)


def _side_by_side(weights: Sequence[NDArray[np.float32] | Synapses]) -> NDArray[np.float32] | Synapses:
    """The weights of several groups of channels together: synapses, if those of a group are."""
    matrices = [w for w in weights if not isinstance(w, Synapses)]
    if len(matrices) == len(weights):
        return np.concatenate(matrices, axis=1)
    sparse = [w if isinstance(w, Synapses) else Synapses.from_torch(torch.from_numpy(w).to_sparse()) for w in weights]
    before = np.cumsum([0, *(w.sources for w in sparse)])
    count, neurons = int(before[-1]), sparse[0].neurons
    return Synapses.join(
        [
            place(w, np.arange(first, first + w.sources), None, count, neurons)
            for w, first in zip(sparse, before, strict=False)
        ]
    )


class _Made(_Own):
    """Own spikes for every neuron, which are made when they are read. Several in one step add up."""

    sources: Sequence[MadeSource]

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        first, *others = self.sources
        net = first[start:stop]
        for source in others:
            source.fill(start, net, add=True)
        return net.numpy()


class PoissonDrive(_Made):
    """Independent Poisson spikes for every neuron."""

    def __init__(self, settings: PoissonInput, dt: float, steps: int, neurons: int) -> None:
        self.neurons = neurons
        signs = ((settings.excitatory, 1), (settings.inhibitory, -1))
        self.sources = [
            PoissonSource(d.rate, steps, (neurons,), dt, weight=sign * d.weight, seed=settings.seed, stream=stream)
            for stream, (d, sign) in enumerate(signs)
            if d is not None
        ]


def _listed(
    path: Path | list[Path],
    key: str,
    settings: EventsInput | EventSpikes,
    channels: int,
    dt: float,
    steps: int,
    weight: float = 1.0,
) -> EventSource:
    """The spikes in the list of one file or several.

    Raises:
        UserError: if a file cannot be read or does not fit.
    """
    try:
        times, neurons = read_events(path)
        more: dict[str, Any] = {"weight": weight, "first": settings.first, "start": settings.start}
        return EventSource(times, neurons, channels, dt, steps=steps, **more)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"{key}: {error}") from None


class EventDrive(_Made):
    """Spikes for every neuron from lists."""

    def __init__(self, settings: EventsInput, dt: float, steps: int, neurons: int) -> None:
        self.neurons = neurons
        signs = (("excitatory", settings.excitatory, 1), ("inhibitory", settings.inhibitory, -1))
        self.sources = [
            _listed(file.path, f"input.{name}", settings, neurons, dt, steps, weight=sign * file.weight)
            for name, file, sign in signs
            if file is not None
        ]


class PoissonChannels(_FannedOut):
    """Independent Poisson spikes in channels; several in one step add up."""

    def __init__(
        self, spikes: PoissonSpikes, fan_out: Any, dt: float, steps: int, neurons: int, members: Members | None = None
    ) -> None:
        self.source = PoissonSource(spikes.rate, steps, (spikes.channels,), dt, seed=spikes.seed)
        self.end = steps if spikes.stop is None else round(spikes.stop / dt)
        self.weights = input_weights(fan_out, neurons, spikes.channels, members)

    def channels(self, start: int, stop: int) -> NDArray[np.float32]:
        counts = self.source[start:stop].numpy()
        counts[max(self.end - start, 0) :] = 0
        return counts


class EventChannels(_FannedOut):
    """Spikes in channels from a list; several in one step add up."""

    def __init__(
        self, spikes: EventSpikes, fan_out: Any, dt: float, steps: int, neurons: int, members: Members | None = None
    ) -> None:
        self.source = _listed(spikes.path, "input.spikes", spikes, spikes.channels, dt, steps)
        self.weights = input_weights(fan_out, neurons, spikes.channels, members)

    def channels(self, start: int, stop: int) -> NDArray[np.float32]:
        return self.source[start:stop].numpy()


def _check_sequence(path: Path, array: NDArray[np.generic], steps: int, width: int | None, key: str) -> None:
    """Check that an array has numbers, at least ``steps`` rows, and ``width`` columns (None: any number of them).

    ``key`` says in messages what the columns are.
    """
    shape, dtype = array.shape, array.dtype
    if dtype.kind not in "biuf":
        raise UserError(f"{path} must hold numbers or booleans, got {dtype}; convert it")
    if len(shape) != 2 or shape[0] < steps or shape[1] != (width or shape[1]):
        raise UserError(
            f"{path} must have the shape [steps, {key}], at least [{steps}, {width or key}], got {list(shape)}; "
            f"change the array{', neuron.count' if width else ''} or simulation.duration"
        )


class FileSource(_Own):
    """An array ``[steps, neurons]`` from a file, multiplied by the weight."""

    def __init__(self, settings: FileInput, steps: int, neurons: int) -> None:
        self.settings, self.neurons = settings, neurons
        self.array = read_array(settings.path, settings.array)
        _check_sequence(settings.path, self.array, steps, neurons, "neurons")

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        net = dense(self.array[start:stop]).astype(np.float64) * self.settings.weight
        if not np.isfinite(net).all():
            raise UserError(f"{self.settings.path} has NaN or infinity in steps {start} to {stop}; it must be finite")
        return net.astype(np.float32)


class FileChannels(_FannedOut):
    """An array ``[steps, channels]`` from a file."""

    def __init__(self, spikes: FileSpikes, fan_out: Any, steps: int, neurons: int, members: Members | None = None) -> None:
        self.path = spikes.path
        self.array = read_array(spikes.path, spikes.array)
        _check_sequence(spikes.path, self.array, steps, None, "channels")
        self.weights = input_weights(fan_out, neurons, self.array.shape[1], members)

    def channels(self, start: int, stop: int) -> NDArray[np.float32]:
        x = dense(self.array[start:stop]).astype(np.float32)
        if not (np.isfinite(x).all() and (x >= 0).all()):
            raise UserError(
                f"{self.path} has negative or infinite numbers or NaN in steps {start} to {stop}; channels hold spike "
                "counts, which are never negative. To inhibit, a channel needs negative weights"
            )
        return x


@dataclass(frozen=True)
class Signal:
    """A recording: ``values [samples]`` in ``unit`` (None if it has no unit), and the ``sampling_rate`` in Hz."""

    values: NDArray[np.float64]
    sampling_rate: float
    unit: str | None
    provenance: str | None


def open_signal(settings: RecordingInput) -> Signal:
    """Read the recording that a configuration names.

    Raises:
        UserError: if it cannot be read or is no signal.
    """
    if isinstance(settings.signal, FileSignal):
        source = settings.signal
        values = dense(read_array(source.path, source.array))
        if values.ndim != 1 or values.dtype.kind not in "iuf":
            raise UserError(
                f"{source.path} must be numbers of shape [samples], got {values.dtype} of shape "
                f"{list(values.shape)}; choose one channel"
            )
        return Signal(values.astype(np.float64), source.sampling_rate, source.unit, source.provenance)
    with np.load(builtin_folder() / "ecg.npz") as file:  # ecg.txt says what it holds
        potential = (np.cumsum(file["steps"], dtype=np.int64) - 1024) / 200
    return Signal(potential, 360.0, "mV", ECG_PROVENANCE)


def resample(signal: Signal, start: float, dt: float, steps: int) -> NDArray[np.float64]:
    """The signal at the beginning of every step, interpolated linearly.

    Args:
        signal: the recording.
        start: time in the recording of the first step, in ms.
        dt: time step in ms.
        steps: T.

    Returns:
        Values in the signal's unit, ``[T]``.

    Raises:
        UserError: if the recording ends before the last step.
    """
    seconds = max(len(signal.values) - 1, 0) / signal.sampling_rate
    end = (start + dt * (steps - 1)) / 1000
    if end > seconds:
        raise UserError(
            f"the recording lasts {seconds:.6g} s, and start + duration ask for {end:.6g} s; shorten "
            "simulation.duration or input.start"
        )
    samples = (start + dt * np.arange(steps)) * signal.sampling_rate / 1000
    return np.interp(samples, np.arange(len(signal.values)), signal.values)


def delta_encode(values: NDArray[np.float64], threshold: float) -> NDArray[np.int32]:
    """Send-on-delta encoding: an event says that the signal has moved by the threshold since the last event.

    The encoder holds a level, which begins as the first value. When a value is at least one threshold above the level, there
    is an ON event and the level rises by one threshold. When it is as far below the level, there is an OFF event and the
    level falls. A jump over k thresholds gives k events in its step, so the level never lags by a whole threshold.

    Args:
        values: signal, ``[T]``.
        threshold: in the signal's unit, positive.

    Returns:
        Number of ON and of OFF events in every step, ``[T, 2]``.

    Example:
        >>> delta_encode(np.array([0.0, 0.4, 1.0, 3.5, 2.5]), 1.0).tolist()
        [[0, 0], [0, 0], [1, 0], [2, 0], [0, 0]]
    """
    origin, crossed = values[0], 0
    events = np.zeros((len(values), 2), dtype=np.int32)
    for step, value in enumerate(values.tolist()):
        moved = int((value - origin) / threshold - crossed)  # int() rounds towards zero: only whole thresholds count
        if moved:
            crossed += moved
            events[step, 0 if moved > 0 else 1] = abs(moved)
    return events


class RecordingSource(_FannedOut):
    """A recorded signal that is delta-encoded; weights lead from its ON and OFF events to the neurons."""

    def __init__(
        self, settings: RecordingInput, dt: float, steps: int, neurons: int, members: Members | None = None
    ) -> None:
        signal = open_signal(settings)
        threshold = _threshold(settings.threshold, signal.unit)
        values = resample(signal, settings.start, dt, steps)
        if not np.isfinite(values).all():
            raise UserError("the recording has NaN or infinity; correct it or choose another input.start")
        events = delta_encode(values, threshold)
        self.encoded = Encoded(values, signal.unit, threshold, events, signal.provenance)
        self.weights = input_weights(settings.fan_out, neurons, 2, members)

    def channels(self, start: int, stop: int) -> NDArray[np.float32]:
        return self.encoded.events[start:stop].astype(np.float32)


def _threshold(value: float | str, unit: str | None) -> float:
    """The encoder's threshold as a number in the signal's unit."""
    if unit is None:
        if isinstance(value, str):
            raise UserError(
                f"input.threshold must be a number, as the recording has no unit, got {value!r}; write the "
                "bare number or add input.signal.unit"
            )
        threshold = value
    else:
        try:
            threshold = Unit(unit, f"the recorded signal (in {unit})", f"0.1 {unit}").parse(value)
        except ValueError as error:
            raise UserError(f"input.threshold: {error}") from None
    if threshold <= 0:
        raise UserError(f"input.threshold must be above 0, got {value!r}; give the change that makes one event")
    return threshold
