"""Where a long run is kept: in memory, in an ``.npz`` file, or in a zarr group that survives being killed.

Whatever keeps it, a result is a record of arrays, a row a step (of ``spikes``: 32 steps), and of attributes:

- ``spikes [T / 32, *neurons]`` int32: bit ``i`` of word ``w`` is the spike of step ``32 w + i``;
- ``v`` (mV), ``g_e``, ``g_i`` (uS) ``[T, K]`` at the end of every step, of the neurons ``recorded [K]``;
- ``counts [T, P]`` int32: spikes of every population, in the order of the attribute ``populations``;
- parameters that differ between neurons, by their names, and arrays that the caller added.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._files import local_path

FORMAT = "coba_triton result"
VERSION = 1
BLOSC: Any = {"cname": "lz4", "clevel": 5}  # fast: zstd packs spikes twice as tightly, in twice the time
_BLOSC_THREADS = threading.Lock()  # whether Blosc uses them is one switch for the process

Array = NDArray[Any]


class Column(NamedTuple):
    """An array that grows with the run: ``[T / every, *shape]``."""

    every: int
    shape: tuple[int, ...]
    dtype: str

    def rows(self, steps: int) -> int:
        """How many rows so many steps have."""
        return -(-steps // self.every)


class Header(NamedTuple):
    """What a sink is told of a run before its first block.

    Attributes:
        config: what the result depends on; plain JSON.
        columns: arrays that grow.
        arrays: arrays that do not.
        steps: T, None if the source does not say.
        block_steps: steps in a block, a multiple of 32.
        state: shape of the state, fields first.
        dtype: of the state.
        versions: what made it, by name.
    """

    config: dict[str, Any]
    columns: dict[str, Column]
    arrays: dict[str, Array]
    steps: int | None
    block_steps: int
    state: tuple[int, ...]
    dtype: str
    versions: dict[str, str]


class Checkpoint(NamedTuple):
    """How far a run has come: finished steps, and the state after them (None before the first)."""

    steps: int
    state: Array | None
    finished: bool


class Sink(ABC):
    """Takes a run's blocks.

    Args:
        attributes: what else to keep with the result; plain JSON. It counts as part of the configuration.
        arrays: arrays to keep with it, by name.
    """

    path: Path | None = None

    def __init__(self, *, attributes: Mapping[str, Any] | None = None, arrays: Mapping[str, Any] | None = None) -> None:
        self.attributes = dict(attributes or {})
        self.arrays = {name: np.asarray(array) for name, array in (arrays or {}).items()}

    def _describe(self, header: Header) -> tuple[dict[str, Any], dict[str, Array]]:
        """The attributes and the fixed arrays of the result that is begun."""
        attributes = {
            "format": FORMAT,
            "format_version": VERSION,
            "config": header.config | {"attributes": self.attributes},
            "steps": header.steps,
            "block_steps": header.block_steps,
            "versions": header.versions,
        }
        return json.loads(json.dumps(attributes)), header.arrays | self.arrays

    @abstractmethod
    def begin(self, header: Header, resume: bool) -> Checkpoint:
        """Make room for the run, or find out how far it has come."""

    @abstractmethod
    def write(self, start: int, stop: int, block: dict[str, Array], state: Array) -> None:
        """Keep the steps from ``start`` to ``stop``, a block's rows, and the state after them, all or nothing."""

    @abstractmethod
    def end(self, steps: int, finished: bool) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """No more blocks come; returns attributes and arrays for :class:`coba_triton.results.Result`."""


class MemorySink(Sink):
    """Keeps the result in memory: one bit for every neuron and step, and what else is recorded."""

    def begin(self, header: Header, resume: bool) -> Checkpoint:
        if resume:
            raise ValueError(f"{type(self).__name__} cannot resume: it keeps nothing until the end; pass a ZarrSink")
        self._header, self._fixed = self._describe(header)
        self._blocks: list[dict[str, Array]] = []
        self._columns = header.columns
        return Checkpoint(0, None, False)

    def write(self, start: int, stop: int, block: dict[str, Array], state: Array) -> None:
        self._blocks.append(block)

    def end(self, steps: int, finished: bool) -> tuple[dict[str, Any], Mapping[str, Any]]:
        joined = {
            name: np.concatenate([block[name] for block in self._blocks])
            if self._blocks
            else np.empty((0, *column.shape), column.dtype)
            for name, column in self._columns.items()
        }
        return self._header | {"steps_done": steps, "finished": finished}, joined | self._fixed


class NpzSink(MemorySink):
    """Keeps the result in memory and writes it to one ``.npz`` file at the end, whole or not at all.

    Args:
        path: of the file.
        overwrite: replace a file that is there.
        attributes: see :class:`Sink`; the file has all attributes as JSON in the array ``attributes``.
        arrays: see :class:`Sink`.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, **more: Any) -> None:
        super().__init__(**more)
        self.path = local_path(path, "path")
        self.overwrite = overwrite

    def begin(self, header: Header, resume: bool) -> Checkpoint:
        assert self.path is not None
        if self.path.exists() and not self.overwrite:
            raise FileExistsError(f"{self.path} exists; pass overwrite=True to replace it, or another path")
        return super().begin(header, resume)

    def end(self, steps: int, finished: bool) -> tuple[dict[str, Any], Mapping[str, Any]]:
        assert self.path is not None
        attributes, arrays = super().end(steps, finished)
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, attributes=np.array(json.dumps(attributes)), **dict(arrays))
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)
        return attributes, arrays


class ZarrSink(Sink):
    """Writes every block to a zarr v3 group as soon as it is finished; a run that is killed can be resumed.

    Besides a result's arrays, the group has ``progress [1]``, the number of finished steps, and ``state [2, F,
    *neurons]``, the state (recurrent: z, v, g_e, g_i; else v, g_e, g_i) after the last two blocks: the older one and
    the newer one take turns. A block's rows and its state are written first and ``progress`` last, its 12 bytes in one
    operation: whenever the process dies, what ``progress`` counts is whole.
    Nothing is forced to the disk: of a machine that loses power, the last seconds may be lost or damaged. The checksum
    of every chunk tells; resuming checks that all blocks are there, and that the last one and the state are whole.

    Args:
        path: of the group, a folder.
        overwrite: replace a result that is there; anything else is left alone.
        attributes: see :class:`Sink`.
        arrays: see :class:`Sink`.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, **more: Any) -> None:
        super().__init__(**more)
        self.path = local_path(path, "path")
        self.overwrite = overwrite

    def begin(self, header: Header, resume: bool) -> Checkpoint:
        assert self.path is not None
        attributes, fixed = self._describe(header)
        self._columns, self._block_steps = header.columns, header.block_steps
        if self.path.exists():
            if resume:
                return self._reopen(attributes, header)
            if not self.overwrite:
                raise FileExistsError(
                    f"{self.path} exists; continue it with resume=True, replace it with ZarrSink(path, overwrite=True), "
                    "or choose another path"
                )
            open_group(self.path)  # refuses what is no result
        self._create(attributes, fixed, header)
        return Checkpoint(0, None, False)

    def _create(self, attributes: dict[str, Any], fixed: dict[str, Array], header: Header) -> None:
        """Build the empty result beside its place and move it there: it is there whole or not at all."""
        assert self.path is not None
        zarr = import_zarr()
        part = self.path.with_name(f".{self.path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        group = zarr.create_group(part, zarr_format=3, attributes=attributes)
        steps = header.steps if header.steps is not None else header.block_steps
        for name, column in header.columns.items():
            rows = column.rows(header.block_steps)
            group.create_array(
                name,
                shape=(column.rows(steps), *column.shape),
                chunks=(rows, *column.shape),
                dtype=column.dtype,
                compressors=_compressors(),
                dimension_names=_dimensions(name, len(column.shape)),
                chunk_key_encoding={"name": "default", "separator": "."},
            )
        for name, array in fixed.items():
            group.create_array(name, data=array, compressors=_compressors())
        checked = _compressors()[1:]
        shape = header.state
        group.create_array("state", shape=(2, *shape), chunks=(1, *shape), dtype=header.dtype, compressors=checked)
        written: Any = {"write_empty_chunks": True}
        group.create_array("progress", data=np.zeros(1, np.int64), compressors=checked, config=written)
        if self.path.exists():
            shutil.rmtree(self.path)
        part.replace(self.path)
        self._open()

    def _open(self) -> None:
        assert self.path is not None
        self._group = import_zarr().open_group(self.path, mode="r+", use_consolidated=False)
        self._arrays = {name: self._group[name] for name in (*self._columns, "state", "progress")}

    def _reopen(self, attributes: dict[str, Any], header: Header) -> Checkpoint:
        assert self.path is not None
        group = open_group(self.path)
        stored = dict(group.attrs)
        difference = _difference(stored["config"], attributes["config"])
        if difference:
            raise ValueError(
                f"{self.path} was begun with another configuration: {difference}; pass what it was begun with, or another "
                "path"
            )
        steps = check_intact(self.path, group, header.columns, stored["block_steps"])
        state = read(self.path, group["state"], (steps - 1) // stored["block_steps"] % 2) if steps else None
        self._open()
        return Checkpoint(steps, state, bool(stored.get("finished")))

    def write(self, start: int, stop: int, block: dict[str, Array], state: Array) -> None:
        from numcodecs import Blosc

        codec = Blosc(**BLOSC, shuffle=Blosc.NOSHUFFLE)
        number = start // self._block_steps
        for name, rows in block.items():
            column, array = self._columns[name], self._arrays[name]
            end = column.rows(stop)
            if end > array.shape[0]:
                array.resize((max(end, 2 * array.shape[0]), *column.shape))
            with _blosc_threads():
                data = codec.encode(self._chunk(name, rows))
            self._put(name, number, data)
        self._put("state", number % 2, self._chunk("state", state[None]).tobytes())
        self._put("progress", 0, self._chunk("progress", np.array([stop])).tobytes())

    def _chunk(self, name: str, rows: Array) -> Array:
        """Rows as a whole chunk of their array, in the order of its bytes."""
        array = self._arrays[name]
        missing = array.chunks[0] - len(rows)
        if missing:
            rows = np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])
        return np.ascontiguousarray(rows, array.dtype.newbyteorder("<"))

    def _put(self, name: str, number: int, data: bytes) -> None:
        """Write the chunk ``number`` of an array into a file of its own.

        The bytes are zarr's; its own way over an event loop takes a millisecond more of the cores that the kernels fill.
        State and progress are written over what was there: a file that is cut short first, or that another one takes the
        place of, some file systems bring to the disk at once, which took another millisecond a block.
        """
        from google_crc32c import value as crc32c

        assert self.path is not None
        file = chunk_file(self.path, self._arrays[name], number)
        again = name not in self._columns and file.exists()
        if not again:
            file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("r+b" if again else "wb") as out:
            out.write(data)
            out.write(crc32c(data).to_bytes(4, "little"))

    def end(self, steps: int, finished: bool) -> tuple[dict[str, Any], Mapping[str, Any]]:
        if finished and "finished" not in self._group.attrs:
            for name, column in self._columns.items():
                array = self._arrays[name]
                if array.shape[0] != column.rows(steps):
                    array.resize((column.rows(steps), *column.shape))
            self._group.update_attributes({"steps": steps, "finished": True})
        attributes = dict(self._group.attrs) | {"steps_done": steps, "finished": finished}
        return attributes, dict(self._group.arrays())


def _compressors() -> tuple[Any, ...]:
    from zarr.codecs import BloscCodec, Crc32cCodec

    return BloscCodec(**BLOSC, shuffle="noshuffle"), Crc32cCodec()


@contextlib.contextmanager
def _blosc_threads() -> Iterator[None]:
    """Let Blosc divide a chunk among its own threads, which importing zarr forbids; the bytes are the same."""
    from numcodecs import blosc

    with _BLOSC_THREADS:
        before, blosc.use_threads = blosc.use_threads, True
        try:
            yield
        finally:
            blosc.use_threads = before


def chunk_file(path: Path, array: Any, number: int) -> Path:
    """Where the group at ``path`` has the chunk ``number`` along the first axis of an array, the others being whole."""
    return path / str(array.basename) / str(array.metadata.encode_chunk_key((number, *[0] * (array.ndim - 1))))


def _dimensions(name: str, axes: int) -> list[str]:
    first = "word" if name == "spikes" else "step"
    last = {"spikes": "neuron", "counts": "population"}.get(name, "recorded")
    return [first, *(f"batch_{axis}" for axis in range(axes - 1)), *[last] * min(axes, 1)]


def import_zarr() -> Any:
    try:
        import zarr
    except ImportError:
        raise ImportError(
            'results in zarr need the package zarr, which is not installed; run: pip install "coba-triton[stream]", or '
            "keep the result in an .npz file"
        ) from None
    return zarr


def open_group(path: Path) -> Any:
    """The zarr group of a result.

    Raises:
        ValueError: if there is something else.
    """
    zarr = import_zarr()
    try:
        group = zarr.open_group(path, mode="r", use_consolidated=False)
        attributes = dict(group.attrs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of coba_triton ({error}); give the path of one, or of nothing") from None
    if attributes.get("format") != FORMAT:
        raise ValueError(f"{path} is a zarr group, but no result of coba_triton; give the path of one, or of nothing")
    if attributes.get("format_version") != VERSION:
        raise ValueError(
            f"{path} is a result of format version {attributes.get('format_version')}, expected {VERSION}; read it with "
            "the version of coba_triton that wrote it, see its attribute versions"
        )
    return group


def read(path: Path, array: Any, key: Any) -> Array:
    """Part of a stored array.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        return np.asarray(array[key])
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {array.name} cannot be read ({error}); restore it from a copy") from error


def check_intact(path: Path, group: Any, columns: Mapping[str, Column], block_steps: int) -> int:
    """The number of finished steps, once everything that they should have left is found to be there.

    Raises:
        ValueError: if an array or a block is missing, or the last block cannot be read.
    """
    try:
        steps = int(read(path, group["progress"], 0))
        arrays = {name: group[name] for name in columns}
    except KeyError as error:
        raise ValueError(f"{path} is damaged: the array {error} is missing; restore it from a copy") from None
    blocks = math.ceil(steps / block_steps)
    for name, column in columns.items():
        for number in range(blocks):
            file = chunk_file(path, arrays[name], number)
            if not file.is_file() or not file.stat().st_size:
                raise ValueError(f"{path} is damaged: block {number} of {name} is missing; restore it from a copy")
        if blocks:
            read(path, arrays[name], slice((blocks - 1) * block_steps // column.every, column.rows(steps)))
    return steps


def _difference(stored: Any, given: Any, where: str = "") -> str | None:
    """The first difference between two configurations, None if there is none."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in sorted(stored.keys() | given.keys()):
            found = _difference(stored.get(key), given.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if stored == given else f"{where} was {json.dumps(stored)} and is {json.dumps(given)}"


def open_sink(sink: Any) -> Sink:
    """A sink from what a caller gives: None, a path that ends in ``.zarr`` or ``.npz``, or a sink."""
    if sink is None:
        return MemorySink()
    if isinstance(sink, Sink):
        return sink
    if isinstance(sink, str | Path):
        path = local_path(sink, "sink")
        kinds = {".zarr": ZarrSink, ".npz": NpzSink}
        kind = kinds.get(path.suffix)
        if kind is None:
            raise ValueError(f"sink must be a path that ends in .zarr or .npz, got {str(sink)!r}; or pass a ZarrSink")
        return kind(path)
    raise TypeError(f"sink must be None, a path, or a sink such as ZarrSink, got {type(sink).__name__}")
