"""Where a long run is kept: in memory, in an ``.npz`` file, or in a zarr group that survives being killed.

Whatever keeps it, a result is a record of arrays, a row a step (of ``spikes``: 32 steps), and of attributes:

- ``spikes [T / 32, *neurons]`` int32: bit ``i`` of word ``w`` is the spike of step ``32 w + i``;
- ``v`` (mV), ``g_e``, ``g_i`` (uS) ``[T, K]`` at the end of every step (``[T / n, K]`` of every n-th step), of the neurons
  ``recorded [K]``;
- ``counts [T, P]`` int32: spikes of every population, in the order of the attribute ``populations``, and the members of
  each, ``population_0``, ``population_1``, ...;
- parameters that differ between neurons, by their names, and arrays that the caller added;
- ``state [F, *neurons]``, the last one (in a zarr group ``[2, F, *neurons]``, see :mod:`coba_triton.stream.store`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ..common.files import held, local_path, part_of, reason, written_whole
from . import store as _store
from .store import BLOSC, DTYPES, FORMAT, NAME, TAKEN, VERSION, Array, Column, Fixed, Store, checksum, filled

_OWN_FILE = re.compile(r"zarr\.json|c(\.\d+)*|\.zarr\.json\.[0-9a-f]{16}\.part")  # the last: of a writer that was killed
_BLOSC_THREADS = threading.Lock()  # whether Blosc uses them is one switch for the process


class Header(NamedTuple):
    """What a sink is told of a run before its first block.

    Attributes:
        config: what the result depends on; plain JSON.
        columns: arrays that grow.
        arrays: arrays that do not.
        steps: T, None if the source does not say.
        block_steps: steps in a block, a multiple of 32.
        versions: what made it, by name.
    """

    config: dict[str, Any]
    columns: dict[str, Column]
    arrays: dict[str, Array]
    steps: int | None
    block_steps: int
    versions: dict[str, str]


class Checkpoint(NamedTuple):
    """How far a run has come.

    Attributes:
        steps: finished ones.
        planned: of the whole run, None if that was not known.
        inputs: of every finished block, its steps and the checksum of its input.
    """

    steps: int = 0
    planned: int | None = None
    inputs: list[tuple[int, int]] = []  # noqa: RUF012 - a field of a tuple, never changed


class Sink(ABC):
    """Takes a run's blocks.

    Args:
        attributes: what else to keep with the result; plain JSON. It counts as part of the configuration.
        arrays: numbers to keep with it, by name: letters, digits and underscores, and no name that a result has.

    Attributes:
        path: of the file or the group, None for memory.
        checks_input: whether it keeps a checksum of every block of the input.
    """

    path: Path | None = None
    checks_input = False

    def __init__(self, *, attributes: Mapping[str, Any] | None = None, arrays: Mapping[str, Any] | None = None) -> None:
        try:
            self.attributes: dict[str, Any] = json.loads(json.dumps(dict(attributes or {})))
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"attributes must be plain JSON, numbers and text in lists and dicts, got {error}") from None
        self.arrays = {name: _checked(name, np.asarray(array)) for name, array in (arrays or {}).items()}

    def _describe(self, header: Header) -> tuple[dict[str, Any], dict[str, Array]]:
        """The attributes and the fixed arrays of the result that is begun."""
        attributes = {
            "format": FORMAT,
            "format_version": VERSION,
            "config": header.config | {"attributes": self.attributes},
            "steps": header.steps,
            "block_steps": header.block_steps,
            "finished": False,
            "versions": header.versions,
        }
        return json.loads(json.dumps(attributes)), header.arrays | self.arrays

    def held(self) -> AbstractContextManager[None]:
        """Nobody else writes there meanwhile.

        Raises:
            BlockingIOError: if somebody does.
            OSError: if nothing can be written there.
        """
        return contextlib.nullcontext()

    @abstractmethod
    def begin(self, header: Header, resume: bool) -> Checkpoint:
        """Make room for the run, or find out how far it has come; what is there is not changed."""

    def go_on(self, blocks: int, steps: int | None) -> Array | None:
        """Go on after so many finished blocks, to so many steps; returns the state after them, None if there are none."""
        return None

    @abstractmethod
    def write(self, start: int, stop: int, block: dict[str, Array], state: Array, given: int) -> None:
        """Keep the steps from ``start`` to ``stop``, a block's rows, and the state after them, all or nothing.

        ``given``: the checksum of the block's input.
        """

    @abstractmethod
    def end(self, steps: int, finished: bool) -> None:
        """No more blocks come."""

    @abstractmethod
    def result(self) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Attributes and arrays for :class:`coba_triton.stream.results.Result`, after the end."""


def _checked(name: Any, array: Array) -> Array:
    """An array of the caller's that can be kept under its name."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in TAKEN or re.fullmatch(r"population_\d+", name):
        raise ValueError(
            f"the name of an array must be letters, digits and underscores, a letter first, and none of "
            f"{', '.join(sorted(TAKEN))}, population_0, ..., got {name!r}; choose another one"
        )
    if array.dtype.newbyteorder("=").name not in DTYPES:
        raise ValueError(
            f"arrays[{name!r}] must hold booleans or numbers of at most 64 bits a part, got {array.dtype}; convert it, or "
            "keep text in attributes"
        )
    return array.astype(array.dtype.newbyteorder("="))


class MemorySink(Sink):
    """Keeps the result in memory: one bit for every neuron and step, and what else is recorded."""

    def begin(self, header: Header, resume: bool) -> Checkpoint:
        if resume:
            raise ValueError(f"{type(self).__name__} cannot resume: it keeps nothing until the end; pass a ZarrSink")
        self._header, self._fixed = self._describe(header)
        self._blocks: list[dict[str, Array]] = []
        self._columns = header.columns
        return Checkpoint()

    def write(self, start: int, stop: int, block: dict[str, Array], state: Array, given: int) -> None:
        self._blocks.append(block)
        self._fixed["state"] = state

    def end(self, steps: int, finished: bool) -> None:
        self._header |= {"steps_done": steps, "finished": finished}
        for name, column in self._columns.items():
            rows = [block[name] for block in self._blocks]
            self._fixed[name] = np.concatenate(rows) if rows else np.empty((0, *column.shape), column.dtype)

    def result(self) -> tuple[dict[str, Any], Mapping[str, Any]]:
        return self._header, self._fixed


class NpzSink(MemorySink):
    """Keeps the result in memory and writes it to one ``.npz`` file at the end, whole or not at all.

    Where it cannot be written by then, as on a full disk, it is written to the folder for temporary files instead, and an
    OSError says where; the error also has it as its attribute ``result``.

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

    def held(self) -> AbstractContextManager[None]:
        assert self.path is not None
        return held(self.path)

    def begin(self, header: Header, resume: bool) -> Checkpoint:
        assert self.path is not None
        if os.path.lexists(self.path):
            if not self.overwrite:
                raise FileExistsError(f"{self.path} exists; pass overwrite=True to replace it, or another path")
            if not self.path.is_file() or self.path.is_symlink():
                raise ValueError(f"{self.path} is no regular file, and is left alone; choose another path")
        return super().begin(header, resume)

    def end(self, steps: int, finished: bool) -> None:
        assert self.path is not None
        super().end(steps, finished)
        self._header["arrays"] = {
            name: {"shape": list(array.shape), "dtype": array.dtype.name, "crc32": crc32(array)}
            for name, array in self._fixed.items()
        }
        try:
            _write_npz(self.path, *self.result(), self.overwrite)
        except OSError as error:
            from .results import Result

            saved = Path(tempfile.mkdtemp(prefix="coba_triton-")) / self.path.name
            kept = f"the result is kept in {saved}"
            try:
                _write_npz(saved, *self.result(), False)
            except OSError:
                shutil.rmtree(saved.parent, ignore_errors=True)
                kept = "the result is in this error's `result`"
            failure = OSError(error.errno, f"cannot be written ({reason(error)}); {kept}", str(self.path))
            failure.result = Result(*self.result())  # type: ignore[attr-defined]
            raise failure from error


def crc32(array: Array) -> int:
    """The checksum of an array in an ``.npz`` file."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _write_npz(path: Path, attributes: dict[str, Any], arrays: Mapping[str, Array], replace: bool) -> None:
    with written_whole(path, replace) as part, part.open("wb") as file:
        np.savez_compressed(file, **cast(Any, {"attributes": np.array(json.dumps(attributes)), **arrays}))


class ZarrSink(Sink):
    """Writes every block to a zarr v3 group as soon as it is finished; a run that is killed can be resumed.

    A block's rows are written first, then its state and its checksums, and the number of finished steps last, its 12 bytes
    in one operation: whenever the process dies, what that counts is whole. See :mod:`coba_triton.stream.store`.
    Nothing is forced to the disk: of a machine that loses power, the last seconds may be lost or damaged. The checksums of
    every chunk tell; resuming checks that all blocks are there, and that the last one and the state are whole.

    Args:
        path: of the group, a folder.
        overwrite: replace a result that is there, if there is nothing else in its folder; anything else is left alone.
        attributes: see :class:`Sink`.
        arrays: see :class:`Sink`.
    """

    checks_input = True

    def __init__(self, path: str | Path, *, overwrite: bool = False, **more: Any) -> None:
        super().__init__(**more)
        self.path: Path = local_path(path, "path")
        self.overwrite = overwrite

    def held(self) -> AbstractContextManager[None]:
        return held(self.path)

    def begin(self, header: Header, resume: bool) -> Checkpoint:
        for package in ("numcodecs", "google_crc32c", "xxhash"):
            _store.import_or_say(package)
        for name, column in header.columns.items():
            size = column.rows(header.block_steps) * int(np.prod(column.shape)) * np.dtype(column.dtype).itemsize
            if size > _store.MOST_PACKED:
                raise ValueError(
                    f"block_steps={header.block_steps} makes blocks of {size:,} bytes of {name}, more than the "
                    f"{_store.MOST_PACKED:,} that a chunk holds; pass a smaller block_steps or record less"
                )
        attributes, fixed = self._describe(header)
        attributes["run"] = secrets.token_hex(8)
        kept = {name: Fixed.of(name, array) for name, array in fixed.items()}
        attributes["arrays"] = json.loads(json.dumps({name: array._asdict() for name, array in kept.items()}))
        self._columns, self._block_steps = header.columns, header.block_steps
        if self.path.is_symlink():
            raise ValueError(f"{self.path} is a symbolic link; give the path that it leads to")
        if self.path.exists():
            if resume:
                return self._reopen(attributes)
            self._check_replaceable()
        with self._kept_so_far(0):
            self._create(attributes, fixed, kept, header)
        return Checkpoint()

    def _check_replaceable(self) -> None:
        if not self.overwrite:
            raise FileExistsError(
                f"{self.path} exists; continue it with resume=True, replace it with ZarrSink(path, overwrite=True), or "
                "choose another path"
            )
        if foreign := _foreign(Store(self.path)):
            raise ValueError(
                f"{foreign} is no part of the result {self.path}, which is not replaced for that; move it away, or choose "
                "another path"
            )

    def _create(self, attributes: dict[str, Any], fixed: dict[str, Array], kept: dict[str, Fixed], header: Header) -> None:
        """Build the empty result beside its place and move it there: it is there whole or not at all."""
        part, place = part_of(self.path), self.path
        config = attributes["config"]
        state = _store.state_shape(config)
        part.mkdir()
        try:
            self.path = part
            for name in (*header.columns, *kept, *_store.ALWAYS):
                (part / name).mkdir()
            for name, array in kept.items():
                self._describe_array(name, array.shape, array.chunk, array.dtype, True)
                for number in range(array.parts):
                    self._put(name, number, self._packed(array.part(fixed[name], number)), array.chunk)
            self._describe_array("state", (2, *state[1:]), state, config["state_dtype"], False)
            self._describe_array("progress", (1,), (1,), "int64", False)
            self._put_progress(0)
            self._describe_columns(header.steps if header.steps is not None else header.block_steps)
            (part / "zarr.json").write_text(_store.describe_group(attributes))
            old = part_of(place)
            if replaced := place.exists():
                place.rename(old)
            part.rename(place)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # of a name that was made here
            raise
        finally:
            self.path = place
        if replaced:
            _remove(Store(old))
        self._kept = Store(place)

    def _reopen(self, attributes: dict[str, Any]) -> Checkpoint:
        kept = Store(self.path)
        before, given = kept.attributes, attributes
        difference = difference_of(_identity(before["config"]), _identity(given["config"]))
        difference = difference or difference_of(before["arrays"], given["arrays"], "arrays")
        if difference:
            raise ValueError(
                f"{self.path} was begun with another configuration: {difference}; pass what it was begun with, or another "
                "path"
            )
        for name in kept.names:
            folder = self.path / name
            if folder.is_symlink() or not folder.is_dir():
                raise kept.damaged(f"the array {name!r} is {'a link' if folder.is_symlink() else 'missing'}")
        rows = kept.check_blocks()
        kept.attributes["config"]["source"] = attributes["config"]["source"]  # a list of spikes may be longer by now
        self._kept, self._described = kept, -1  # who died may not have come to it
        return Checkpoint(kept.steps, kept.attributes["steps"], [(row.steps, row.input) for row in rows])

    def go_on(self, blocks: int, steps: int | None) -> Array | None:
        kept = self._kept
        state = kept.state(blocks) if blocks else None
        with self._kept_so_far(blocks * self._block_steps):
            self._describe_group(steps=steps, finished=False)
            if kept.steps != blocks * self._block_steps:  # the last block is made anew, with the steps that it lacked
                self._put_progress(blocks * self._block_steps)
            planned = steps if steps is not None else kept.steps + self._block_steps
            if planned != self._described:
                self._describe_columns(planned)
        return state

    @contextlib.contextmanager
    def _kept_so_far(self, steps: int) -> Iterator[None]:
        """Say what an error of the disk leaves."""
        try:
            yield
        except OSError as error:
            kept = f"{steps:,} steps are kept: make room and continue with resume=True"
            raise OSError(error.errno, f"cannot write ({reason(error)}); {kept}", str(self.path)) from error

    def write(self, start: int, stop: int, block: dict[str, Array], state: Array, given: int) -> None:
        number = start // self._block_steps
        if stop > self._described:
            self._describe_columns(max(stop, 2 * self._described))
        row = [stop - start, given, checksum(state)]
        for name, rows in block.items():
            column = self._columns[name]
            chunk = filled(rows, (column.rows(self._block_steps), *column.shape), column.dtype)
            row.append(checksum(chunk))
            self._put(name, number, self._packed(chunk), chunk.shape)
        self._put("state", number % 2, np.ascontiguousarray(state).tobytes(), (1, *state.shape))
        sealed = np.array([*row, 0], np.uint64)
        sealed[-1] = _store.seal_of(self._kept.attributes["run"], number, sealed[:-1])
        self._put("checksums", number, sealed.tobytes(), (1, len(sealed)))
        self._put_progress(stop)

    def end(self, steps: int, finished: bool) -> None:
        attributes = self._kept.attributes
        if finished and not (attributes["finished"] and attributes["steps"] == steps):
            with self._kept_so_far(steps):
                if self._described != steps:
                    self._describe_columns(steps)
                self._describe_group(steps=steps, finished=True)

    def result(self) -> tuple[dict[str, Any], Mapping[str, Any]]:
        return Store(self.path).result()

    def _packed(self, chunk: Array) -> bytes:
        from numcodecs import Blosc

        with _blosc_threads():
            return bytes(Blosc(**BLOSC, shuffle=Blosc.NOSHUFFLE).encode(chunk))

    def _put_progress(self, steps: int) -> None:
        self._put("progress", 0, np.array([steps], "<i8").tobytes(), (1,))

    def _put(self, name: str, number: int, data: bytes, chunk: tuple[int, ...]) -> None:
        """Write the chunk ``number`` of an array into a file of its own, and of nobody else's.

        The bytes are zarr's; its own way over an event loop takes a millisecond more of the cores that the kernels fill.
        State and progress are written over what was there: a file that is cut short first, or that another one takes the
        place of, some file systems bring to the disk at once, which took another millisecond a block.
        """
        from google_crc32c import value as crc32c

        file = self.path / name / _store.chunk_name(number, len(chunk))
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        if name not in ("state", "progress"):
            file.unlink(missing_ok=True)  # of a block that was not finished
            flags |= os.O_EXCL
        with open(os.open(file, flags, 0o666), "wb") as out:
            found = os.fstat(out.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise OSError(errno.EMLINK, "has another name as well, and is not written to", str(file))
            out.write(data)
            out.write(crc32c(data).to_bytes(4, "little"))

    def _describe_array(self, name: str, *described: Any) -> None:
        _replace_text(self.path / name / "zarr.json", _store.describe_array(*described))

    def _describe_columns(self, steps: int) -> None:
        """Say how many rows the columns have in so many steps."""
        self._described = steps
        for name, column in self._columns.items():
            shape, rows = (column.rows(steps), *column.shape), column.rows(self._block_steps)
            names = _dimensions(name, len(column.shape))
            self._describe_array(name, shape, (rows, *column.shape), column.dtype, True, names)
        width = len(self._columns) + 4
        self._describe_array("checksums", (-(-steps // self._block_steps), width), (1, width), "uint64", False)

    def _describe_group(self, **change: Any) -> None:
        attributes = self._kept.attributes
        if any(attributes[name] != value for name, value in change.items()):
            attributes |= change
            _replace_text(self.path / "zarr.json", _store.describe_group(attributes))


def _replace_text(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        if path.read_bytes() == text.encode():
            return
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def _foreign(kept: Store) -> Path | None:
    """Something in a result's folder that is no part of it."""
    for entry in kept.path.iterdir():
        if entry.name in kept.names and entry.is_dir() and not entry.is_symlink():
            for file in entry.iterdir():
                if not _OWN_FILE.fullmatch(file.name) or file.is_symlink() or not file.is_file():
                    return file
        elif not _OWN_FILE.fullmatch(entry.name) or entry.is_symlink() or not entry.is_file():
            return entry
    return None


def _remove(kept: Store) -> None:
    """Remove a result's folder, with what is known to be its own; should there be something else by now, that stays."""
    for folder in (*(kept.path / name for name in kept.names), kept.path):
        for file in folder.iterdir():
            if _OWN_FILE.fullmatch(file.name) and not file.is_dir():
                file.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()


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


def _dimensions(name: str, axes: int) -> list[str]:
    first = "word" if name == "spikes" else "step"
    last = {"spikes": "neuron", "counts": "population"}.get(name, "recorded")
    return [first, *(f"batch_{axis}" for axis in range(axes - 1)), *[last] * min(axes, 1)]


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What two configurations of one run have in common: a source that is compared block by block may be another one."""
    source = config["source"]
    return config | {
        "source": source
        if source.get("described")
        else {name: source.get(name) for name in ("described", "channels", "dtype")}
    }


def difference_of(stored: Any, given: Any, where: str = "") -> str | None:
    """The first difference between two configurations, None if there is none."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in sorted(stored.keys() | given.keys()):
            found = difference_of(stored.get(key), given.get(key), f"{where}.{key}" if where else key)
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
