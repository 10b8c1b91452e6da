"""Where a long run is kept: in memory, in an ``.npz`` file, or in a zarr group, which survives when the run is killed.

Every sink keeps the same result. It has attributes, and these arrays, whose first axis is time:

- ``spikes [T / 32, *neurons]`` int32: bit ``i`` of word ``w`` is the spike of step ``32 w + i``;
- ``v`` (mV), ``g_e``, ``g_i`` (uS) ``[T / n, K]``: at the end of every n-th step, for the neurons in ``recorded [K]``;
- ``counts [T, P]`` int32: the spikes of every population in every step, in the order of the attribute ``populations``; the
  arrays ``population_0``, ``population_1``, ... have the members of each;
- parameters that differ between neurons, by their names, and arrays that the caller added;
- ``state [F, *neurons]``: the last state (in a zarr group ``[2, F, *neurons]``, see :mod:`coba_triton.stream.store`), with
  what is under way, see :mod:`coba_triton.stream.states`.
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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..common.files import held, local_path, part_of, reason, written_whole
from . import store
from .npz import check_npz, crc32, write_npz
from .results import Result
from .store import BLOSC, DTYPES, FORMAT, NAME, TAKEN, VERSION, Array, Column, Fixed, Store, checksum, difference_of, filled

# Names of the files that this module writes; a writer that was killed leaves one of the third kind behind.
_OWN_FILE = re.compile(r"zarr\.json|c(\.\d+)*|\.zarr\.json\.[0-9a-f]{16}\.part")
_BLOSC_THREADS = threading.Lock()  # held while Blosc's switch for threads, one for the whole process, is turned


class Header(NamedTuple):
    """What a sink is told about a run before its first block.

    Attributes:
        config: everything that the result depends on; plain JSON.
        columns: the arrays that grow with the run.
        arrays: the arrays that do not grow.
        steps: T; None if the source does not say how long it is.
        block_steps: how many steps a block has, a multiple of 32.
        versions: versions of the software that makes the run, by name.
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
        steps: how many steps are finished.
        planned: how many steps the whole run was to have; None if that was not known.
        inputs: for every finished block, the number of its steps and the checksum of its input.
    """

    steps: int = 0
    planned: int | None = None
    inputs: list[tuple[int, int]] = []  # noqa: RUF012 - a field of a tuple, never changed


class Sink(ABC):
    """Takes the blocks of a run and keeps them.

    Args:
        attributes: more to keep with the result; plain JSON. It counts as part of the configuration.
        arrays: arrays of numbers to keep with the result, by name. A name has letters, digits and underscores, and must not
            be one of a result's own arrays.

    Attributes:
        path: the file or the group; None for memory.
        checks_input: whether the sink keeps a checksum of the input of every block.
        changing: makes a context in which the sink puts a new result in the place of an earlier one, or prepares to go on
            with it. Whoever keeps files that belong to the earlier result can remove them there.
    """

    path: Path | None = None
    checks_input = False
    changing: Callable[[], AbstractContextManager[Any]] = staticmethod(contextlib.nullcontext)

    def __init__(self, *, attributes: Mapping[str, Any] | None = None, arrays: Mapping[str, Any] | None = None) -> None:
        try:
            self.attributes: dict[str, Any] = json.loads(json.dumps(dict(attributes or {})))
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"attributes must be plain JSON, numbers and text in lists and dicts, got {error}") from None
        self.arrays = {name: _checked(name, np.asarray(array)) for name, array in (arrays or {}).items()}

    def _describe(self, header: Header) -> tuple[dict[str, Any], dict[str, Array]]:
        """The attributes and the arrays that do not grow, for a result that is begun."""
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
        """While the returned context is open, nobody else writes to the sink's path.

        Raises:
            BlockingIOError: if another run writes to it already.
            OSError: if nothing can be written there.
        """
        return contextlib.nullcontext()

    @abstractmethod
    def begin(self, header: Header, resume: bool) -> Checkpoint:
        """Make room for a new run, or find out how far an earlier one has come. Nothing of an earlier run is changed."""

    def go_on(self, blocks: int, steps: int | None) -> Array | None:
        """Prepare to go on after a number of finished blocks, up to ``steps`` steps.

        Returns:
            The state after these blocks; None if there are none.
        """
        return None

    @abstractmethod
    def write(self, start: int, stop: int, block: dict[str, Array], state: Array, given: int) -> None:
        """Keep one block: all of it or, if the process dies meanwhile, nothing of it.

        Args:
            start: the block's first step.
            stop: the step after its last one.
            block: its rows for every column, by the column's name.
            state: the state after its last step.
            given: the checksum of its input.
        """

    def settle(self, error: Exception | None) -> None:
        """Be told, after each :meth:`write` and in the thread of the caller, how it went; raise its error."""
        if error is not None:
            raise error

    @abstractmethod
    def end(self, steps: int, finished: bool) -> None:
        """Be told that no more blocks come, how many steps are finished, and whether that is the whole run."""

    @abstractmethod
    def result(self) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Attributes and arrays for :class:`coba_triton.stream.results.Result`, after the end."""


def _checked(name: Any, array: Array) -> Array:
    """The caller's array, after a check that it can be kept under this name."""
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
    """Keeps the result in memory: spikes with one bit for each neuron and step, and whatever else is recorded."""

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

    If the file cannot be written then, for example on a full disk, the result is written to the folder for temporary files,
    and an OSError says where. The error also has the result as its attribute ``result``.

    Args:
        path: the file.
        overwrite: replace a file that is already there.
        **more: ``attributes`` and ``arrays``, as for :class:`Sink`. The file has all attributes as JSON in the array
            ``attributes``.
    """

    path: Path

    def __init__(self, path: str | Path, *, overwrite: bool = False, **more: Any) -> None:
        super().__init__(**more)
        self.path = local_path(path, "path")
        self.overwrite = overwrite

    def held(self) -> AbstractContextManager[None]:
        return held(self.path)

    def begin(self, header: Header, resume: bool) -> Checkpoint:
        if os.path.lexists(self.path):
            if not self.overwrite:
                raise FileExistsError(
                    f"{self.path} exists; replace it with NpzSink(path, overwrite=True), or choose another path"
                )
            if not self.path.is_file() or self.path.is_symlink():
                raise ValueError(f"{self.path} is no regular file, and is left alone; choose another path")
        return super().begin(header, resume)

    def end(self, steps: int, finished: bool) -> None:
        super().end(steps, finished)
        self._header["arrays"] = {
            name: {"shape": list(array.shape), "dtype": array.dtype.name, "crc32": crc32(array)}
            for name, array in self._fixed.items()
        }
        try:
            write_npz(self.path, *self.result(), self.overwrite, self.changing)
        except OSError as error:
            saved = Path(tempfile.mkdtemp(prefix="coba_triton-")) / self.path.name
            kept = f"the result is kept in {saved}"
            try:
                write_npz(saved, *self.result(), False)
            except OSError:
                shutil.rmtree(saved.parent, ignore_errors=True)
                kept = "the result is in this error's `result`"
            failure = OSError(error.errno, f"cannot be written ({reason(error)}); {kept}", str(self.path))
            failure.result = Result(*self.result())  # type: ignore[attr-defined]
            raise failure from error


class ZarrSink(Sink):
    """Writes every block to a zarr v3 group as soon as it is finished, so that a run that is killed can be resumed.

    It writes the rows of a block first, then the state and the checksums. Last, in one operation, it writes the 12 bytes
    that say how many steps are finished. So these steps are whole, whenever the process dies. See
    :mod:`coba_triton.stream.store`.

    Nothing is forced to the disk: when a machine loses power, the last seconds may be lost or damaged. The checksum of every
    chunk shows that. Resuming checks that all blocks are there, and that the last block and the state are whole.

    Args:
        path: the folder of the group.
        overwrite: replace a result that is already there, if its folder has nothing else; anything else is left alone.
        **more: ``attributes`` and ``arrays``, as for :class:`Sink`.
    """

    path: Path

    checks_input = True

    def __init__(self, path: str | Path, *, overwrite: bool = False, **more: Any) -> None:
        super().__init__(**more)
        self.path = local_path(path, "path")
        self.overwrite = overwrite

    def held(self) -> AbstractContextManager[None]:
        return held(self.path)

    def begin(self, header: Header, resume: bool) -> Checkpoint:
        for package in ("numcodecs", "google_crc32c", "xxhash"):
            store.import_or_say(package)
        for name, column in header.columns.items():
            size = column.rows(header.block_steps) * int(np.prod(column.shape)) * np.dtype(column.dtype).itemsize
            if size > store.MOST_PACKED:
                raise ValueError(
                    f"block_steps={header.block_steps} makes blocks of {size:,} bytes of {name}, more than the "
                    f"{store.MOST_PACKED:,} that a chunk holds; pass a smaller block_steps or record less"
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

    @property
    def run(self) -> str:
        """The random name of the run that is begun or goes on."""
        return str(self._kept.attributes["run"])

    def join(self, header: Header) -> None:
        """Prepare to write some blocks of a run that another process has begun with this header, or goes on with."""
        self._columns, self._block_steps = header.columns, header.block_steps
        self._kept = Store(self.path)
        planned = self._kept.attributes["steps"]
        self._described = planned if planned is not None else self._kept.steps + self._block_steps

    def _check_replaceable(self) -> None:
        if not self.overwrite:
            raise FileExistsError(
                f"{self.path} exists; continue it with resume=True, replace it with ZarrSink(path, overwrite=True), or "
                "choose another path"
            )
        check_replaceable(self.path)

    def _create(self, attributes: dict[str, Any], fixed: dict[str, Array], kept: dict[str, Fixed], header: Header) -> None:
        """Build the empty result beside its path and then move it there, so that it appears whole or not at all."""
        part, place = part_of(self.path), self.path
        config = attributes["config"]
        state = store.state_shape(config)
        part.mkdir()
        try:
            self.path = part
            for name in (*header.columns, *kept, *store.ALWAYS):
                (part / name).mkdir()
            for name, array in kept.items():
                self._describe_array(name, array.shape, array.chunk, array.dtype, True)
                for number in range(array.parts):
                    self._put(name, number, self._packed(array.part(fixed[name], number)), array.chunk)
            self._describe_array("state", (2, *state[1:]), state, config["state_dtype"], False)
            self._describe_array("progress", (1,), (1,), "int64", False)
            self._put_progress(0)
            self._describe_columns(header.steps if header.steps is not None else header.block_steps)
            (part / "zarr.json").write_text(store.describe_group(attributes))
            with self.changing(), replaced(place):
                part.rename(place)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # its name was made up above: nobody else has anything there
            raise
        finally:
            self.path = place
        self._kept = Store(place)

    def _reopen(self, attributes: dict[str, Any]) -> Checkpoint:
        kept = Store(self.path)
        difference = difference_of(_identity(kept.attributes["config"]), _identity(attributes["config"]))
        difference = difference or difference_of(kept.attributes["arrays"], attributes["arrays"], "arrays")
        if difference:
            raise ValueError(
                f"{self.path} was begun with another configuration: {difference}; pass the arguments it was begun with, or "
                "another path"
            )
        for name in kept.names:
            folder = self.path / name
            if folder.is_symlink() or not folder.is_dir():
                raise kept.damaged(f"the array {name!r} is {'a link' if folder.is_symlink() else 'missing'}")
        rows = kept.check_blocks()
        kept.attributes["config"]["source"] = attributes["config"]["source"]  # a list of spikes may be longer by now
        self._kept, self._described = kept, -1  # a run that was killed may not have described its arrays
        return Checkpoint(kept.steps, kept.attributes["steps"], [(row.steps, row.input) for row in rows])

    def go_on(self, blocks: int, steps: int | None) -> Array | None:
        kept = self._kept
        state = kept.state(blocks) if blocks else None
        with self._kept_so_far(blocks * self._block_steps), self.changing():
            self._describe_group(steps=steps, finished=False)
            if kept.steps != blocks * self._block_steps:  # the last block was short, and is made again as a longer one
                self._put_progress(blocks * self._block_steps)
            planned = steps if steps is not None else kept.steps + self._block_steps
            if planned != self._described:
                self._describe_columns(planned)
        return state

    @contextlib.contextmanager
    def _kept_so_far(self, steps: int) -> Iterator[None]:
        """Add to an error of the disk how many steps are kept."""
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
        sealed[-1] = store.seal_of(self._kept.attributes["run"], number, sealed[:-1])
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
        """Write the chunk ``number`` of an array into its file, after a check that the file has no other name.

        The bytes are those that zarr writes. Zarr itself would write them through an event loop, which takes a millisecond
        more from the cores that the kernels use.

        State and progress are written over their old bytes. If their files were truncated or replaced, some file systems
        would bring them to the disk at once, which took another millisecond for each block.
        """
        from google_crc32c import value as crc32c

        file = self.path / name / store.chunk_name(number, len(chunk))
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        if name not in ("state", "progress"):
            file.unlink(missing_ok=True)  # it may be there from a block that was not finished
            flags |= os.O_EXCL
        with open(os.open(file, flags, 0o666), "wb") as out:
            found = os.fstat(out.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise OSError(errno.EMLINK, "has another name as well, and is not written to", str(file))
            out.write(data)
            out.write(crc32c(data).to_bytes(4, "little"))

    def _describe_array(self, name: str, *described: Any) -> None:
        _replace_text(self.path / name / "zarr.json", store.describe_array(*described))

    def _describe_columns(self, steps: int) -> None:
        """Write down how many rows the columns have after ``steps`` steps."""
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
            _replace_text(self.path / "zarr.json", store.describe_group(attributes))


def _replace_text(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        if path.read_bytes() == text.encode():
            return
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def check_replaceable(path: Path) -> None:
    """Refuse to replace what is no result, or a folder that holds something else as well.

    Raises:
        ValueError: if it is one of these.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link; give the path that it leads to")
    if not path.is_dir():
        check_npz(path)
    elif foreign := _foreign(Store(path)):
        raise ValueError(
            f"{foreign} is no part of the result {path}, so the result is not replaced; move it away, or choose another path"
        )


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[None]:
    """Within the block, the result at a path is out of the way. Then it is removed; after an error it is back."""
    if not path.exists():
        yield
        return
    aside = part_of(path)
    path.rename(aside)
    try:
        yield
    except BaseException:
        if not path.exists():
            aside.rename(path)
        raise
    if aside.is_dir():
        _remove(Store(aside))
    else:
        aside.unlink()


def _foreign(kept: Store) -> Path | None:
    """A file or folder in a result's folder that does not belong to the result; None if there is none."""
    for entry in kept.path.iterdir():
        if entry.name in kept.names and entry.is_dir() and not entry.is_symlink():
            for file in entry.iterdir():
                if not _OWN_FILE.fullmatch(file.name) or file.is_symlink() or not file.is_file():
                    return file
        elif not _OWN_FILE.fullmatch(entry.name) or entry.is_symlink() or not entry.is_file():
            return entry
    return None


def _remove(kept: Store) -> None:
    """Remove the files that belong to a result, and then its folders, unless something else has come into them by now."""
    for folder in (*(kept.path / name for name in kept.names), kept.path):
        for file in folder.iterdir():
            if _OWN_FILE.fullmatch(file.name) and not file.is_dir():
                file.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _blosc_threads() -> Iterator[None]:
    """Let Blosc pack a chunk with several threads, which importing zarr turns off. The bytes are the same."""
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
    """The part of a configuration that a run and its continuation must have in common.

    A source that does not describe itself is compared block by block instead.
    """
    source = config["source"]
    return config | {
        "source": source
        if source.get("described")
        else {name: source.get(name) for name in ("described", "channels", "dtype")}
    }


def open_sink(sink: Any) -> Sink:
    """The sink for what a caller gives: None, a path that ends in ``.zarr`` or ``.npz``, or a sink."""
    if sink is None:
        return MemorySink()
    if isinstance(sink, Sink):
        return sink
    if isinstance(sink, str | Path):
        path = local_path(sink, "sink")
        kind = {".zarr": ZarrSink, ".npz": NpzSink}.get(path.suffix)
        if kind is None:
            raise ValueError(f"sink must be a path that ends in .zarr or .npz, got {str(sink)!r}; or pass a ZarrSink")
        return kind(path)
    raise TypeError(f"sink must be None, a path, or a sink such as ZarrSink, got {type(sink).__name__}")
