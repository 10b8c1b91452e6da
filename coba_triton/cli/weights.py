"""Weights from the input's channels to the neurons, and among the neurons. They are drawn at random or read from files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coba_triton import LogNormal, Normal, Synapses, Uniform
from coba_triton.common.files import reason
from coba_triton.ops.synapses import each_of

from .config import (
    ALL_OTHERS,
    Config,
    FanOut,
    FileSynapses,
    FileWeights,
    LogNormalLaw,
    Projection,
    RandomSynapses,
    SparseFanOut,
    UniformLaw,
)
from .errors import UserError
from .part import Part

_SYNAPSES = (("row", "col", "weight"), ("row", "col", "data"))  # names of the arrays of an .npz that lists synapses
_SCIPY = {"format", "shape", "data"}  # arrays in every .npz that scipy.sparse.save_npz writes
_SAVED = {"about", "indptr", "targets", "weights"}  # arrays in every .npz that Synapses.save writes
PAIRS = 2**24  # pairs of neurons of which is drawn at a time whether they are connected
_POPULATIONS = {1: "excitatory", -1: "inhibitory", 0: "other"}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Within the block, an error while the file is read becomes a UserError."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is no regular file")  # a pipe would wait for a writer
        yield
    except (MemoryError, UserError):
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}; give a .npy or .npz file") from None
    except Exception:  # every kind of archive and compression has its own exception for a damaged file
        raise UserError(f"{path} is no .npy or .npz file of numbers; write it with numpy.save or numpy.savez") from None


def array_names(path: Path) -> list[str]:
    """The names of the arrays in an ``.npz`` file; empty for a ``.npy`` file.

    Raises:
        UserError: if the file cannot be read.
    """
    with _readable(path), path.open("rb") as file:
        if file.read(6) == b"\x93NUMPY":
            return []
        file.seek(0)
        with np.load(file) as archive:
            return list(archive.files)


def read_array(path: Path, name: str | None) -> Any:
    """Read an array from a ``.npy`` (memory-mapped) or ``.npz`` file, or scipy's sparse array from its own ``.npz`` file.

    Raises:
        UserError: if the file cannot be read, or it is not clear which array of an ``.npz`` is meant.
    """
    names = array_names(path)
    if name is None and set(names) >= _SCIPY:
        return read_sparse(path)
    if len(names) > 1 and name is None:
        raise UserError(f"{path} holds several arrays; name one with the key array: {', '.join(names)}")
    if names and name not in (None, *names):
        raise UserError(f"{path} has no array {name!r}; it has {', '.join(names)}")
    with _readable(path):
        if not names:
            return np.asarray(np.load(path, mmap_mode="r"))
        with np.load(path) as archive:
            return np.asarray(archive[name or names[0]])


def read_sparse(path: Path) -> Any:
    """Read the file that ``scipy.sparse.save_npz`` has written, as an array that is sliced by rows.

    Raises:
        UserError: if scipy is missing or the file is damaged.
    """
    try:
        from scipy.sparse import load_npz
    except ImportError:
        raise UserError(f"{path} needs the package scipy, which is missing; run: pip install scipy") from None
    with _readable(path):
        try:
            return load_npz(path).tocsr()
        except KeyError as error:
            raise UserError(f"{path} is a damaged sparse array, without {error}; write it with save_npz") from None


def dense(rows: Any) -> NDArray[Any]:
    """A sparse array as an ordinary one; other arrays as they are."""
    return np.asarray(rows.toarray() if hasattr(rows, "toarray") else rows)


def read_synapses(settings: FileWeights, shape: tuple[int, int], key: str) -> Synapses:
    """Read synapses from a file.

    The file has an array, which may be sparse, a list of synapses with rows, columns, weights and perhaps delays in ms, or
    what :meth:`coba_triton.Synapses.save` wrote. Synapses of the same row and column stay apart; those of weight 0 are left
    out, unless ``save`` wrote them.

    Args:
        settings: the file, the weight in uS that the number 1 in it stands for, and perhaps a delay.
        shape: the shape that the array must have.
        key: the table of the configuration that names the file, for messages.

    Raises:
        UserError: if the file cannot be read or does not fit.
    """
    path, names = settings.path, set(array_names(settings.path))
    delay = getattr(settings, "delay", None)
    if settings.array is None and names >= _SAVED:
        with _told(key):
            found = Synapses.load(path)
        if (found.neurons, found.sources) != shape:
            raise _unfit(path, (found.neurons, found.sources), shape, key)
        _check_delays(found.delays is not None, settings, key)
        scaled = found.with_weights((found.weights.double() * settings.weight).float())
        return scaled if delay is None else _with_delay(scaled, delay)
    listed_as = next((lists for lists in _SYNAPSES if names >= set(lists)), None)
    delays = None
    if settings.array is None and listed_as and not names >= _SCIPY:
        rows, cols, values = (read_array(path, name) for name in listed_as)
        listed = rows.ndim == 1 and rows.shape == cols.shape == values.shape
        if not (listed and {rows.dtype.kind, cols.dtype.kind} <= {"i", "u"}):
            raise UserError(
                f"{key}: row, col and {listed_as[2]} in {path} must be of one length, the first two integers, got "
                f"{rows.dtype} {list(rows.shape)}, {cols.dtype} {list(cols.shape)} and {list(values.shape)}; give all three "
                "a number for every synapse"
            )
        for name, index, size in (("row", rows, shape[0]), ("col", cols, shape[1])):
            if index.size and (index.min() < 0 or index.max() >= size):
                raise UserError(
                    f"{key}: {name} in {path} must be from 0 to {size - 1}, got {index.min()} to {index.max()}; change "
                    "the file or neuron.count"
                )
        delays = read_array(path, "delay") if "delay" in names else None
        if delays is not None and (delays.shape not in ((), rows.shape) or delays.dtype.kind not in "iuf"):
            raise UserError(
                f"{key}: delay in {path} must be numbers in ms, one or one for every synapse, got {delays.dtype} "
                f"{list(delays.shape)}; give every synapse one"
            )
    else:
        array = read_array(path, settings.array)
        if array.shape != shape:
            raise _unfit(path, array.shape, shape, key)
        if hasattr(array, "tocoo"):
            entries = array.tocoo()
            rows, cols, values = entries.row, entries.col, entries.data
        else:
            _check_numbers(array, path, key)
            rows, cols = array.nonzero()
            values = array[rows, cols]
    _check_numbers(values, path, key)
    _check_delays(delays is not None, settings, key)
    kept = values != 0
    each = delays if delays is None or not delays.ndim else delays[kept]
    weights = (values[kept].astype(np.float64) * settings.weight).astype(np.float32)
    with _told(key):
        return Synapses.from_coo(
            rows[kept], cols[kept], weights, delay if each is None else each.astype(np.float32), shape=shape
        )


@contextmanager
def _told(key: str) -> Iterator[None]:
    """Within the block, an error of a value becomes a UserError that names the table of the configuration."""
    try:
        yield
    except (OverflowError, ValueError) as error:
        what = str(error).replace("pass replace=True", "write several = true")
        raise UserError(f"{key}: {what}") from None


def _unfit(path: Path, found: tuple[int, ...], shape: tuple[int, int], key: str) -> UserError:
    return UserError(
        f"{key}: {path} must have the shape {list(shape)}, rows post-synaptic, got {list(found)}; change the array or "
        "neuron.count"
    )


def _check_delays(has_delays: bool, settings: FileWeights, key: str) -> None:
    """Refuse two delays of one synapse, and those of an input."""
    if not has_delays:
        return
    if not isinstance(settings, FileSynapses):
        raise UserError(
            f"{key}: {settings.path} has delays, and an input arrives in the step in which it is given; leave them out"
        )
    if settings.delay is not None:
        raise UserError(f"{key}: delay is given, and {settings.path} has delays as well; leave one of them out")


def _with_delay(synapses: Synapses, delay: float) -> Synapses:
    delays = torch.full((1,), delay, dtype=torch.float32)
    return synapses._replace(delays=delays, shortest=delays.item(), longest=delays.item())


def _check_numbers(values: NDArray[Any], path: Path, key: str) -> None:
    if values.dtype.kind not in "biuf":
        raise UserError(f"{key}: {path} must hold numbers, got {values.dtype}; convert it")
    if not np.isfinite(values).all():
        raise UserError(f"{key}: {path} has NaN or infinity; weights must be finite")


def input_weights(
    settings: Any, neurons: int, channels: int, members: Mapping[str, NDArray[np.int64]] | None = None
) -> NDArray[np.float32] | Synapses:
    """Weights from the input's channels to the neurons, from a file or at random.

    Args:
        settings: of a table ``fan_out``.
        neurons: N.
        channels: I.
        members: indices of the neurons of every population, by its name.

    Returns:
        In uS: synapses or, of random connections that are excitatory or inhibitory each, a matrix ``[N, I]``.

    Raises:
        UserError: if the file cannot be read or does not fit, or a number is out of range.
    """
    key = "input.fan_out"
    if isinstance(settings, FileWeights):
        return read_synapses(settings, (neurons, channels), key)
    if isinstance(settings, FanOut):
        return draw_fan_out(settings, neurons, channels)
    every = settings if isinstance(settings, list) else [settings]
    return _join([_draw(fan_out, (None, channels), neurons, members or {}, key) for fan_out in every])


def draw_fan_out(settings: FanOut, neurons: int, channels: int) -> NDArray[np.float32]:
    """Random weights ``[N, I]``.

    Connections exist with the given probability. The given fraction of them is excitatory, the others are inhibitory
    (negative). Their strengths are exponentially distributed.
    """
    rng = np.random.default_rng(settings.seed)
    shape = (channels, neurons)
    strength = rng.exponential(settings.weight, shape)
    sign = np.where(rng.random(shape) < settings.excitatory_fraction, 1.0, -1.0)
    connected = rng.random(shape) < settings.probability
    return np.ascontiguousarray((strength * sign * connected).astype(np.float32).T)


def count_synapses(weights: NDArray[np.float32] | Synapses) -> int:
    """The number of synapses; in a matrix, of weights that are not 0."""
    return weights.count if isinstance(weights, Synapses) else int(np.count_nonzero(weights))


@dataclass(frozen=True)
class Recurrent:
    """The synapses among the neurons.

    Attributes:
        synapses: from every neuron to every neuron; with a part, onto the neurons of this process.
        count: how many synapses there are in all.
        signs: 1 for an excitatory neuron, -1 for an inhibitory one, 0 for one that is both or has no synapses, ``[N]``.
        provenance: the origin of the synapses: a seed, or a file and its checksum, or those of several projections.
    """

    synapses: Synapses
    count: int
    signs: NDArray[np.int8]
    provenance: dict[str, Any]

    @classmethod
    def of(cls, synapses: Synapses, provenance: dict[str, Any], part: Part | None = None) -> Recurrent:
        """With the signs of the neurons that the synapses have."""
        sources = synapses.source_of()
        each = each_of(synapses.weights, sources)
        excites, inhibits = (torch.zeros(synapses.sources, dtype=torch.bool) for _ in range(2))
        excites[sources[each > 0]] = True
        inhibits[sources[each < 0]] = True
        count = synapses.count
        if part is not None:
            excites, inhibits, count = part.any(excites), part.any(inhibits), part.add_up(count)
        return cls(synapses, count, (excites.to(torch.int8) - inhibits.to(torch.int8)).numpy(), provenance)

    def populations(self) -> dict[str, NDArray[np.bool_]]:
        """Masks ``[N]`` of the neurons that are excitatory, inhibitory or neither, without empty ones."""
        members = {name: self.signs == sign for sign, name in _POPULATIONS.items()}
        return {name: mask for name, mask in members.items() if mask.any()}


def populations(config: Config) -> dict[str, NDArray[np.int64]]:
    """Indices of the neurons of every population, by its name, and of those that belong to none. Empty without any."""
    if not config.population:
        return {}
    found = {population.name: np.arange(*population.neurons) for population in config.population}
    others = np.setdiff1d(np.arange(config.neuron.count), np.concatenate(list(found.values())))
    return found | ({ALL_OTHERS: others} if others.size else {})


def open_recurrent(config: Config, part: Part | None = None) -> Recurrent | None:
    """The recurrent synapses of a configuration; None if its neurons are not connected.

    With a part, only the synapses onto the neurons of this process are kept. Random ones of a projection are not even made.

    Raises:
        UserError: if a file cannot be read or does not fit, or a number is out of range.
    """
    settings, neurons = config.recurrent, config.neuron.count
    if isinstance(settings, RandomSynapses):
        return draw_recurrent(settings, neurons, part)
    if settings is not None:
        synapses = read_synapses(settings, (neurons, neurons), "recurrent")
        recurrent = Recurrent.of(synapses if part is None else part.onto_own(synapses), _origin(settings), part)
    elif config.projection:
        members, parts, origins = populations(config), [], []
        for number, projection in enumerate(config.projection):
            parts.append(_project(projection, neurons, members, f"projection.{number}", part))
            ends = {end: getattr(projection, end) for end in ("source", "target")}
            count = parts[-1].count if part is None else part.add_up(parts[-1].count)
            origins.append({**ends, "synapses": count, **_origin(projection)})
        recurrent = Recurrent.of(_join(parts, config.simulation.dt), {"projections": origins}, part)
    else:
        return None
    with _told("recurrent" if settings is not None else "projection"):
        recurrent.synapses.check_delays(config.simulation.dt)
    return recurrent


def _origin(settings: Any) -> dict[str, Any]:
    if not isinstance(settings, FileWeights):
        return {"seed": settings.seed}
    with settings.path.open("rb") as file:
        return {"file": str(settings.path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def draw_recurrent(settings: RandomSynapses, neurons: int, part: Part | None = None) -> Recurrent:
    """Draw random synapses: each neuron has a synapse to each other neuron with the same probability, and none to itself.

    The first neurons are excitatory, as many as the given fraction says, and the others are inhibitory. All synapses of a
    neuron have its sign.
    """
    excitatory = round(settings.excitatory_fraction * neurons)
    signs = np.where(np.arange(neurons) < excitatory, 1, -1).astype(np.int8)
    strength = np.where(signs > 0, settings.excitatory_weight, -settings.inhibitory_weight).astype(np.float32)
    rng = np.random.default_rng(settings.seed)
    rows, cols = [], []
    for begin in range(0, neurons, step := max(PAIRS // neurons, 1)):
        connected = rng.random((min(step, neurons - begin), neurons), dtype=np.float32) < settings.probability
        row, col = connected.nonzero()
        others = row + begin != col
        if part is not None:
            others &= (row + begin >= part.own.start) & (row + begin < part.own.stop)
        rows.append((row[others] + begin).astype(np.int32))
        cols.append(col[others].astype(np.int32))
    targets, sources = np.concatenate(rows), np.concatenate(cols)
    with _told("recurrent"):
        synapses = Synapses.from_coo(targets, sources, strength[:, None], settings.delay, shape=(neurons, neurons))
    count = synapses.count if part is None else part.add_up(synapses.count)
    return Recurrent(synapses, count, signs, {"seed": settings.seed})


def _law(value: Any, sign: int) -> Any:
    """A number, or the law of random ones, of one sign."""
    if isinstance(value, float):
        return sign * value
    if isinstance(value, LogNormalLaw):
        return LogNormal(sign * value.mean, value.std)
    if isinstance(value, UniformLaw):
        return Uniform(value.low, value.high) if sign > 0 else Uniform(-value.high, -value.low)
    low, high = 0.0 if value.low is None else value.low, value.high
    ends = (low, high) if sign > 0 else (None if high is None else -high, -low)
    return Normal(sign * value.mean, value.std, *ends)


def _draw(
    settings: SparseFanOut,
    sources: tuple[NDArray[np.int64] | None, int],
    neurons: int,
    members: Mapping[str, NDArray[np.int64]],
    key: str,
    part: Part | None = None,
) -> Synapses:
    """Random synapses from ``sources``: their indices, None for all, and how many there are in all.

    With a part, those onto the neurons of this process.
    """
    chosen, count = sources
    targets = None if settings.target is None else members[settings.target]
    shape = count if chosen is None else len(chosen), neurons if targets is None else len(targets)
    projection = settings if isinstance(settings, Projection) else None
    autapses = projection is None or projection.autapses
    same = projection is not None and projection.source == projection.target
    apart = autapses or same or (chosen is not None and targets is not None)  # populations have no neuron in common
    delay = None if projection is None or projection.delay is None else _law(projection.delay, 1)
    numbers = _law(settings.weight, 1 if settings.receptor == "excitatory" else -1), delay
    options: dict[str, Any] = {"seed": settings.seed, "autapses": autapses or not same, "dtype": torch.float32}
    if part is not None:
        bounds = [part.own.start, part.own.stop]
        options["only"] = tuple(bounds if targets is None else np.searchsorted(targets, bounds).tolist())
    with _told(key):
        if settings.probability is not None:
            drawn = Synapses.fixed_probability(*shape, settings.probability, *numbers, **options)
        elif apart:
            options |= {"per": settings.per, "replace": settings.several}
            drawn = Synapses.fixed_number(*shape, settings.number or 0, *numbers, **options)
        else:
            raise ValueError(
                "number cannot be kept between all neurons and a population, because synapses of a neuron onto itself would "
                "be left out; write a projection for each population, or autapses = true"
            )
        placed = place(drawn, chosen, targets, count, neurons)
    return placed if apart else _without_autapses(placed)


def place(
    synapses: Synapses,
    sources: NDArray[np.int64] | None,
    targets: NDArray[np.int64] | None,
    count: int,
    neurons: int,
) -> Synapses:
    """The same synapses, from and onto these of all sources and neurons; both ascend."""
    if sources is not None:
        fans = torch.zeros(count, dtype=torch.int64)
        fans[torch.from_numpy(sources)] = synapses.indptr.diff()
        weights, delays = (_of_sources(values, sources, count) for values in (synapses.weights, synapses.delays))
        indptr = torch.cat([fans.new_zeros(1), fans.cumsum(0)])
        synapses = synapses._replace(indptr=indptr, weights=weights, delays=delays)
    if targets is not None:
        places = torch.from_numpy(targets).to(torch.int32)
        synapses = synapses._replace(targets=places[synapses.targets.long()], neurons=neurons)
    return synapses


def _of_sources(values: Any, sources: NDArray[np.int64], count: int) -> Any:
    """Numbers of synapses; where each source has one, those of some are placed among all."""
    if values is None or values.dim() < 2:
        return values
    placed = values.new_zeros(count, 1)
    placed[torch.from_numpy(sources)] = values
    return placed


def _without_autapses(synapses: Synapses) -> Synapses:
    """Without synapses from a neuron to itself."""
    sources = synapses.source_of()
    kept = synapses.targets != sources
    weights, delays = synapses.weights, synapses.delays
    return Synapses.from_coo(
        synapses.targets[kept],
        sources[kept],
        weights if len(weights) == 1 else weights[kept],
        delays if delays is None or len(delays) == 1 else delays[kept],
        shape=(synapses.neurons, synapses.sources),
    )


def _project(
    projection: Any, neurons: int, members: Mapping[str, NDArray[np.int64]], key: str, part: Part | None
) -> Synapses:
    """The synapses of a projection among all neurons; with a part, those onto the neurons of this process."""
    source = None if projection.source is None else members[projection.source]
    if isinstance(projection, Projection):
        return _draw(projection, (source, neurons), neurons, members, key, part)
    target = None if projection.target is None else members[projection.target]
    shape = neurons if target is None else len(target), neurons if source is None else len(source)
    placed = place(read_synapses(projection, shape, key), source, target, neurons, neurons)
    return placed if part is None else part.onto_own(placed)


def _join(parts: list[Synapses], dt: float | None = None) -> Synapses:
    """All synapses in one record; where some have delays, the others get one of a step of ``dt`` ms."""
    if dt is not None and any(part.delays is not None for part in parts):
        parts = [part if part.delays is not None else _with_delay(part, dt) for part in parts]
    return Synapses.join(parts)
