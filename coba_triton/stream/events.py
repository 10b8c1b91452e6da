"""Read lists of spikes, ``(times, neurons)``, from files and from objects of other packages."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.files import is_there, local_path
from ..common.text import decode, plain_minus
from .results import open_result

Events = tuple[NDArray[np.float64], NDArray[np.int64]]

# What the two arrays of an .npz file may be called: as in this package, as in its CSV files, and as in NEST.
NAMES = (("times", "neurons"), ("time_ms", "neuron"), ("times", "senders"))


def read_events(source: Any) -> Events:
    """Read a list of spikes.

    Args:
        source: one of these, or several of them, whose lists are joined:

            - ``.csv``: the header ``time_ms,neuron`` and a line for each spike, as :meth:`Result.to_csv` writes them;
            - ``.npz``: arrays ``times`` in ms and ``neurons`` (or ``senders``), or a result of this package;
            - ``.zarr``: a result of this package;
            - ``.dat`` and ``.gdf``: the files of NEST's spike recorder, with times in ms;
            - ``.nwb``: the table of units, numbered from 0 in its order (needs the extra ``nwb``);
            - any other file that Neo reads, or its ``Block`` or ``Segment``: the spike trains, numbered from 0 (needs the
              extra ``neo``).

    Returns:
        Times in ms and neurons, ``[S]`` each, in the order of the file, which may not be sorted by time. An
        :class:`EventSource` takes them like this.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if a package that reads the file is missing.
        ValueError: if the file is something else, or damaged.

    Example:
        >>> times, neurons = read_events("spikes.csv")  # doctest: +SKIP
    """
    if hasattr(source, "segments") or hasattr(source, "spiketrains"):
        return _neo_trains(source, type(source).__name__)
    if not isinstance(source, str | Path):
        if not isinstance(source, Iterable) or hasattr(source, "__array__"):
            raise TypeError(f"source must be a path, a Block or Segment of Neo, or several, got {type(source).__name__}")
        lists = [read_events(one) for one in source] or [(np.empty(0), np.empty(0, np.int64))]
        times, neurons = (np.concatenate(columns) for columns in zip(*lists, strict=True))
        return times, neurons
    path = local_path(source, "source")
    if not is_there(path):
        raise FileNotFoundError(f"there is no file {str(path)!r}; give the path of a list of spikes")
    if path.suffix.lower() != ".zarr" and not path.is_file():  # a pipe would wait for a writer
        raise ValueError(f"{path} is no regular file; give the path of a list of spikes")
    readers: dict[str, Callable[[Path], Any]] = {
        ".csv": _csv, ".npz": _npz, ".zarr": _result, ".dat": _nest, ".gdf": _nest, ".nwb": _nwb,
    }  # fmt: skip
    times, neurons = readers.get(path.suffix.lower(), _neo)(path)
    times, neurons = np.asarray(times), np.asarray(neurons)
    if times.ndim != 1 or times.shape != neurons.shape or {times.dtype.kind, neurons.dtype.kind} - set("iuf"):
        raise ValueError(
            f"{path} must have a time and a neuron for every spike, got {times.dtype} {list(times.shape)} and "
            f"{neurons.dtype} {list(neurons.shape)}; write both as [spikes]"
        )
    with np.errstate(invalid="ignore"):  # NaN and infinity are refused below, as they are not whole numbers
        whole = neurons.astype(np.int64)
    if (whole != neurons).any():
        raise ValueError(f"{path} must number its neurons, got {neurons[whole != neurons][0]}; are the columns exchanged?")
    return times.astype(np.float64), whole


def _table(path: Path, text: str, columns: list[int], delimiter: str | None) -> list[NDArray[np.float64]]:
    """Read columns of numbers from text."""
    if not text.strip():
        return [np.empty(0)] * len(columns)
    try:
        return list(np.loadtxt(io.StringIO(text), delimiter=delimiter, usecols=columns, ndmin=2).T)
    except ValueError as error:
        raise ValueError(f"{path} is no list of spikes below its header ({error}); correct it there") from None


def _text(path: Path) -> str:
    try:
        return plain_minus(decode(path.read_bytes()))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); save it as such") from None


def _csv(path: Path) -> list[NDArray[np.float64]]:
    header, _, body = _text(path).partition("\n")
    names = [name.strip().strip('"') for name in header.split(",")]
    if not {"time_ms", "neuron"} <= set(names):
        raise ValueError(f"{path} must begin with the header time_ms,neuron, got {header.strip()[:60]!r}; write it there")
    return _table(path, body, [names.index("time_ms"), names.index("neuron")], ",")


def _nest(path: Path) -> list[NDArray[np.float64]]:
    text = _text(path)
    names = next((words for line in text.splitlines() if "sender" in (words := line.lstrip("# ").split())), None)
    if names is not None and "time_ms" not in names:
        raise ValueError(f"{path} has {', '.join(names)}; record with time_in_steps=False, in ms")
    rows = (line for line in text.splitlines() if not line.lstrip().startswith(("#", "sender")))
    columns = [1, 0] if names is None else [names.index("time_ms"), names.index("sender")]
    return _table(path, "\n".join(rows), columns, None)


def _npz(path: Path) -> Any:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = set(file.files)
            found = next((both for both in NAMES if names >= set(both)), None)
            if found and "attributes" not in names:
                return [file[name] for name in found]
    except MemoryError:
        raise
    except Exception as error:  # every kind of archive and compression has its own exception for a damaged file
        raise ValueError(f"{path} is no .npz file of numbers, or damaged ({error}); write it with numpy.savez") from None
    if "attributes" in names:
        return _result(path)
    raise ValueError(f"{path} must have arrays times, in ms, and neurons, got {', '.join(sorted(names))}; rename them")


def _result(path: Path) -> Any:
    return open_result(path).events()


def _nwb(path: Path) -> Any:
    try:
        import h5py
    except ImportError:
        raise ImportError(
            f'{path} needs the package h5py, which is not installed; run: pip install "coba-triton[nwb]"'
        ) from None
    try:
        with h5py.File(path, "r") as file:
            seconds, ends = (file[f"units/{name}"][:] for name in ("spike_times", "spike_times_index"))
    except (OSError, KeyError) as error:
        raise ValueError(f"{path} has no table of units with spike times ({error}); give an NWB file that has one") from None
    return 1000 * seconds, np.repeat(np.arange(len(ends)), np.diff(ends.astype(np.int64), prepend=0))


def _neo(path: Path) -> Any:
    if path.suffix in (".pkl", ".pickle"):
        raise ValueError(f"{path} is a pickle, which may run any code when it is read; save the spikes in another format")
    try:
        import neo
    except ImportError:
        raise ImportError(
            f"{path} is no .csv, .npz, .zarr, .dat, .gdf or .nwb; what else Neo reads needs the package neo, which is not "
            'installed: pip install "coba-triton[neo]"'
        ) from None
    try:
        (block,) = neo.io.get_io(str(path)).read()
    except (OSError, ValueError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{path} is nothing that Neo reads as one block ({error}); give another file") from error
    return _neo_trains(block, str(path))


def _neo_trains(block: Any, what: str) -> Events:
    """The spike trains of a segment, or of a block with one segment."""
    segments = getattr(block, "segments", [block])
    if len(segments) != 1:
        raise ValueError(f"{what} must have one segment, got {len(segments)}; pass the segment, or times and neurons")
    trains = [np.asarray(train.rescale("ms").magnitude, np.float64) for train in segments[0].spiketrains]
    numbers = np.repeat(np.arange(len(trains)), [len(train) for train in trains])
    return np.concatenate([np.empty(0), *trains]), numbers
