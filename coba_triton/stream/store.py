"""A long run on the disk: a zarr v3 group in which missing, changed, exchanged and outdated parts are noticed.

The group has the arrays of a result (see :mod:`coba_triton.stream.sinks`), which any zarr reads, and three more:

- ``progress [1]``: the number of finished steps. It is written after everything else of a block.
- ``state [2, F, *neurons]``: the states after the last two blocks (recurrent: z, v, g_e, g_i; else v, g_e, g_i; left, where
  neurons are held after a spike; and where a spike is under way for several steps, the last spikes, see
  :mod:`coba_triton.stream.states`). The state after block ``k`` is in row ``k % 2``.
- ``checksums [blocks, C + 4]`` uint64: a row for each block. It has the number of the block's steps, the checksum of its
  input (0 if the source describes itself), the checksum of the state after it, the checksum of its chunk of every column,
  and a seal. The seal is the checksum of the rest of the row, the block's number, and the run's random name.

Block ``k`` is chunk ``k`` of every column. So a reader knows that a chunk is the one that was written there, and that a
state is the one after the last finished block. The attributes have a checksum of themselves, and the checksums of the arrays
that do not grow.

Everything that is read is checked here and not by zarr, so that nothing in a stranger's file chooses which code runs: chunks
are opened, checked and unpacked in one way, whatever their metadata say. The metadata are written for other programs.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..common.files import read_bytes, reason
from ..neuron.records import NUMERIC_PARAMETERS, OPTIONAL_PARAMETERS
from ..ops.spikes import WORD_BITS

FORMAT = "coba_triton result"
VERSION = 2
BLOSC: Any = {"cname": "lz4", "clevel": 5}  # zstd would pack spikes into half the bytes, in twice the time
MOST_PACKED = 2**31 - 2**16  # bytes; Blosc packs no more at a time
RATIO = 256  # LZ4 makes nothing more than this many times smaller
MOST_ATTRIBUTES = 2**28  # bytes of the file of attributes

DTYPES = (
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *("bool", "float16", "float32", "float64", "complex64", "complex128"),
)
ALWAYS = ("state", "progress", "checksums")  # arrays that every group has
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
TAKEN = {"spikes", "v", "g_e", "g_i", "counts", "input_e", "input_i", "recorded", *ALWAYS, *NUMERIC_PARAMETERS}
TAKEN |= {"file", "attributes", "allow_pickle"}  # arguments of numpy.savez, and the array of the attributes

Array = NDArray[Any]


class Refused(ValueError):
    """A file or folder that is no result, or a damaged one."""


class Column(NamedTuple):
    """An array that grows with the run, ``[T / every, *shape]``.

    Attributes:
        every: how many steps one row stands for.
        shape: the shape of a row.
        dtype: the name of the numbers' type.
        begun: whether the last steps have a row even if they do not fill it.
    """

    every: int
    shape: tuple[int, ...]
    dtype: str
    begun: bool = False

    def rows(self, steps: int) -> int:
        """How many rows there are after ``steps`` steps."""
        return -(-steps // self.every) if self.begun else steps // self.every


def columns_of(config: Mapping[str, Any]) -> dict[str, Column]:
    """The arrays that grow, according to what is recorded in the attribute ``config``."""
    record, dtype = config["record"], config["state_dtype"]
    traced, populations = len(record["neurons"]), len(record["populations"])
    columns = {"spikes": Column(WORD_BITS, tuple(config["neurons"]), "int32", True)} if record["spikes"] else {}
    columns |= {name: Column(record["every"], (traced,), dtype) for name in record["variables"] if traced}
    columns |= {"counts": Column(1, (populations,), "int32")} if populations else {}
    return columns | {name: Column(1, (), dtype) for name in ("input_e", "input_i") if record["inputs"]}


def history_rows(longest: int) -> int:
    """How many rows of a state have the spikes of the last ``longest`` steps: none if a spike takes one step."""
    return -(-longest // 24) if longest > 1 else 0


def state_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a state's chunk, ``[1, F, *neurons]``."""
    fields = 4 if config["network"] == "CobaLIFRecurrent" else 3
    rows = config.get("fields", fields) + history_rows(config.get("longest_delay", 1))
    return (1, rows, *config["neurons"])


class Fixed(NamedTuple):
    """An array that does not grow. It is kept in chunks of ``rows`` rows, and each chunk has a checksum."""

    shape: tuple[int, ...]
    dtype: str
    rows: int
    checksums: tuple[str, ...]

    @classmethod
    def of(cls, name: str, array: Array) -> Fixed:
        """Plan the chunks of an array, and compute their checksums.

        Raises:
            ValueError: if a single row is too large for a chunk.
        """
        rows = 1
        if array.ndim and array.size:
            size = array[:1].nbytes
            if size > MOST_PACKED:
                raise ValueError(f"arrays[{name!r}] has rows of {size:,} bytes, more than {MOST_PACKED:,}; turn its axes")
            rows = min(max(2**26 // size, 1), len(array))
        made = cls(array.shape, array.dtype.name, rows, ())
        return made._replace(checksums=tuple(f"{checksum(made.part(array, k)):016x}" for k in range(made.parts)))

    @property
    def parts(self) -> int:
        """How many chunks there are."""
        return -(-self.shape[0] // self.rows) if math.prod(self.shape) and self.shape else math.prod(self.shape)

    @property
    def chunk(self) -> tuple[int, ...]:
        """The shape of a chunk."""
        return (self.rows, *(max(size, 1) for size in self.shape[1:])) if self.shape else ()

    def part(self, array: Array, number: int) -> Array:
        """The chunk ``number`` of the array."""
        return filled(array[number * self.rows : (number + 1) * self.rows] if self.shape else array, self.chunk, self.dtype)


class Row(NamedTuple):
    """A row of ``checksums``: what is known about a block."""

    steps: int
    input: int
    state: int
    chunks: dict[str, int]


def import_or_say(package: str) -> Any:
    """Import a package, or say in an ImportError how to get it."""
    try:
        return __import__(package)
    except ImportError:
        raise ImportError(
            f'results in zarr need the package {package}, which is not installed; run: pip install "coba-triton[stream]", '
            "or keep the result in an .npz file"
        ) from None


def checksum(data: Any) -> int:
    """XXH3 with 64 bits, of bytes or of an array's bytes."""
    data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else data
    return int(import_or_say("xxhash").xxh3_64_intdigest(data))


def filled(rows: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """Rows as a whole, contiguous chunk of little-endian numbers; zeros follow the rows."""
    if shape and len(rows) < shape[0]:
        rows = np.concatenate([rows, np.zeros((shape[0] - len(rows), *rows.shape[1:]), rows.dtype)])
    return np.ascontiguousarray(rows, np.dtype(dtype).newbyteorder("<")).reshape(shape)


def chunk_name(number: int, axes: int) -> str:
    """The name of the file for the chunk ``number`` along the first axis; along the other axes a chunk has everything."""
    return ".".join(["c", *map(str, (number, *[0] * (axes - 1))[:axes])])


def describe_array(
    shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str, packed: bool, names: list[str] | None = None
) -> str:
    """The text of an array's file ``zarr.json``."""
    codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if packed:
        shuffle = {"shuffle": "noshuffle", "blocksize": 0, "typesize": np.dtype(dtype).itemsize}
        codecs.append({"name": "blosc", "configuration": BLOSC | shuffle})
    zero = np.zeros((), dtype).item()
    described = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": [zero.real, zero.imag] if isinstance(zero, complex) else zero,
        "codecs": [*codecs, {"name": "crc32c"}],
        "attributes": {},
        **({"dimension_names": names} if names else {}),
    }
    return json.dumps(described, indent=1)


def difference_of(stored: Any, given: Any, where: str = "") -> str | None:
    """The first difference between two configurations, in words; None if there is none."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in sorted(stored.keys() | given.keys()):
            found = difference_of(stored.get(key), given.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if stored == given else f"{where} was {json.dumps(stored)} and is {json.dumps(given)}"


def seal_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes and, among them, their checksum."""
    plain = {name: value for name, value in attributes.items() if name != "checksum"}
    return plain | {"checksum": f"{checksum(json.dumps(plain).encode()):016x}"}


def describe_group(attributes: dict[str, Any]) -> str:
    """The text of the group's file ``zarr.json``."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": seal_attributes(attributes)}, indent=1)


def check_attributes(where: str, attributes: Any) -> None:
    """Check the attributes of what should be a result.

    Raises:
        ValueError: if they do not belong to a result, are of another format version, or contradict each other.
    """
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise Refused(f"{where} is no result of coba_triton; give a run's folder, a .zarr or an .npz")
    version, versions = attributes.get("format_version"), attributes.get("versions")
    if version != VERSION:
        writer = versions.get("coba_triton") if isinstance(versions, dict) else None
        raise Refused(
            f"{where} is a result of format version {version}, written by coba_triton {writer}, and this one reads "
            f"{VERSION}; read it with the one that wrote it"
        )
    try:
        _check_content(attributes)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise Refused(
            f"{where} is damaged, or not written by coba_triton: its attributes do not hold together ({error!r}); restore "
            "it from a copy"
        ) from None


def _is(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise TypeError(f"{value!r:.60} instead of {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _size(value: Any, least: int = 0) -> int:
    if not least <= _is(value, int) < 2**62:
        raise ValueError(f"the size {value}")
    return int(value)


def _check_content(attributes: dict[str, Any]) -> None:
    """Check everything that a :class:`coba_triton.stream.results.Result` relies on."""
    config = _is(attributes["config"], dict)
    record, neurons = _is(config["record"], dict), [_size(size, 1) for size in _is(config["neurons"], list)]
    block_steps = _size(config["block_steps"], 1)
    if config["network"] not in ("CobaLIF", "CobaLIFRecurrent") or config["state_dtype"] not in ("float32", "float64"):
        raise ValueError("network or state_dtype")
    if not 0 < _is(config["dt_ms"], float, int) < math.inf:
        raise ValueError("dt_ms")
    _is(config["attributes"], dict), _is(config["source"], dict)
    _is(attributes["versions"], dict)
    for neuron in _is(record["neurons"], list):
        if _size(neuron) >= math.prod(neurons):
            raise ValueError(f"neuron {neuron}")
    if set(_is(record["variables"], list)) - {"v", "g_e", "g_i"}:
        raise ValueError("variables")
    _is(record["spikes"], bool), _is(record["inputs"], bool), _is(record["populations"], dict)
    if block_steps % WORD_BITS or block_steps % _size(record["every"], 1):
        raise ValueError("block_steps")
    for name, column in columns_of(config).items():
        if column.rows(block_steps) * math.prod(column.shape) * np.dtype(column.dtype).itemsize > MOST_PACKED:
            raise ValueError(f"the size of a block of {name}")
    if set(_is(config["parameters"], dict)) | set(OPTIONAL_PARAMETERS) != set(NUMERIC_PARAMETERS):
        raise ValueError("parameters")
    recurrent = config["network"] == "CobaLIFRecurrent"
    fields, longest = config.get("fields", 3 + recurrent), _size(config.get("longest_delay", 1), 1)
    if fields not in (3 + recurrent, 4 + recurrent):  # without or with a refractory period
        raise ValueError("fields")
    if longest > 1 and (not recurrent or fields != 5):  # what is under way comes with a field for the refractory period
        raise ValueError("longest_delay")
    if attributes["steps"] is not None:
        _size(attributes["steps"])
    _is(attributes["finished"], bool)
    if "steps_done" in attributes:  # an .npz file has it; a group has the array progress instead
        _size(attributes["steps_done"])
    needed: dict[str, tuple[int, ...] | None] = {
        f"population_{number}": None for number in range(len(record["populations"]))
    }
    needed |= {"recorded": (len(record["neurons"]),)} if record["neurons"] else {}
    needed |= {name: None for name, value in config["parameters"].items() if isinstance(_is(value, str, int, float), str)}
    for name, array in _is(attributes["arrays"], dict).items():
        if not NAME.fullmatch(name) or array["dtype"] not in DTYPES:
            raise ValueError(f"the array {name}")
        shape = tuple(_size(size) for size in _is(array["shape"], list))
        if needed.pop(name, None) not in (None, shape):
            raise ValueError(f"the array {name}")
    if needed:
        raise ValueError(f"without the arrays {sorted(needed)}")


class Store:
    """Reads a run from the disk.

    Attributes:
        path: the folder of the group.
        attributes: the attributes of the group.
        steps: how many steps are finished.
        names: the names of all arrays.

    Raises:
        ValueError: if there is no result, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = self._written()
        try:
            node = json.loads(read_bytes(path / "zarr.json", MOST_ATTRIBUTES))
            attributes = node["attributes"]
            if (node["zarr_format"], node["node_type"]) != (3, "group"):
                raise ValueError("zarr.json is not that of a group of zarr format 3")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise Refused(f"{path} is no result of coba_triton ({error}); give a run's folder, a .zarr or an .npz") from None
        check_attributes(str(path), attributes)
        if attributes.get("checksum") != seal_attributes(attributes)["checksum"] or not isinstance(
            attributes.get("run"), str
        ):
            raise self.damaged("its attributes have changed")
        self.attributes, config = attributes, attributes["config"]
        self.block_steps: int = config["block_steps"]
        self.columns = columns_of(config)
        self.fixed = self._fixed()
        self.names = {*self.columns, *self.fixed, *ALWAYS}
        self._rows: dict[int, Row] = {}
        self.steps = int(self._chunk("progress", 0, (1,), "int64", packed=False)[0])
        self._check_steps()

    def _fixed(self) -> dict[str, Fixed]:
        found = {}
        for name, array in self.attributes["arrays"].items():
            try:
                fixed = Fixed(tuple(array["shape"]), array["dtype"], _size(array["rows"], 1), tuple(array["checksums"]))
            except (KeyError, TypeError, ValueError) as error:
                raise self.damaged(f"the attributes of {name} do not hold together ({error!r})") from None
            size = math.prod(fixed.chunk) * np.dtype(fixed.dtype).itemsize
            if len(fixed.checksums) != fixed.parts or size > MOST_PACKED:
                raise self.damaged(f"the attributes of {name} do not hold together")
            found[name] = fixed
        return found

    def _check_steps(self) -> None:
        if self.steps < 0:
            raise self.damaged(f"progress is {self.steps}")
        if self.attributes["finished"] and self.attributes["steps"] != self.steps:
            raise self.damaged(f"it is finished with {self.attributes['steps']} steps, and progress is {self.steps}")
        if self.steps and self.row(self.blocks - 1).steps != self.steps - (self.blocks - 1) * self.block_steps:
            raise self.damaged(f"progress is {self.steps}, which is the end of no block")

    @property
    def blocks(self) -> int:
        """How many blocks are finished."""
        return -(-self.steps // self.block_steps)

    def _written(self) -> list[bytes | None]:
        """The two files of which a run that writes to the group always changes one before it takes anything away."""
        found: list[bytes | None] = []
        for name, limit in (("zarr.json", MOST_ATTRIBUTES), ("progress/c.0", 64)):
            try:
                found.append(read_bytes(self.path / name, limit))
            except OSError:
                found.append(None)
        return found

    def damaged(self, what: str) -> Refused:
        """The error that says that the group is damaged, and how; or that a run has written to it in the meantime."""
        if self._written() != self._seen:
            return Refused(f"{self.path} has changed since it was opened, as a run has written to it: {what}; open it again")
        return Refused(f"{self.path} is damaged: {what}; restore it from a copy")

    def _chunk(self, name: str, number: int, shape: tuple[int, ...], dtype: str, packed: bool) -> Array:
        """A chunk whose own checksum is right; whether it is the right chunk is for the caller to check."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        what = f"block {number} of {name}"
        try:
            file = read_bytes(self.path / name / chunk_name(number, len(shape)), size + size // 64 + 4096)
        except FileNotFoundError:
            raise self.damaged(f"{what} is missing") from None
        except OSError as error:
            raise self.damaged(f"{what} cannot be read ({reason(error)})") from None
        data, end = file[:-4], file[-4:]
        if import_or_say("google_crc32c").value(data) != int.from_bytes(end, "little") or len(end) < 4:
            raise self.damaged(f"{what} has changed")
        if packed:
            # Blosc's header names the size. Check it first: a stranger's file must not make us take memory for nothing.
            if len(data) < 16 or int.from_bytes(data[4:8], "little") != size or size > RATIO * len(data):
                raise self.damaged(f"{what} has another size")
            try:
                data = import_or_say("numcodecs").Blosc(**BLOSC).decode(data, bytearray(size))
            except (RuntimeError, ValueError) as error:
                raise self.damaged(f"{what} cannot be unpacked ({error})") from None
        if len(data) != size:
            raise self.damaged(f"{what} has another size")
        return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape).astype(dtype, copy=False)

    def row(self, number: int) -> Row:
        """The row of ``checksums`` for a block."""
        if number not in self._rows:
            found = self._chunk("checksums", number, (1, len(self.columns) + 4), "uint64", packed=False)[0]
            steps, given, state, *chunks, seal = found.tolist()
            if seal != seal_of(self.attributes["run"], number, found[:-1]) or not 0 < steps <= self.block_steps:
                raise self.damaged(f"block {number} of checksums is that of another block or run")
            self._rows[number] = Row(steps, given, state, dict(zip(self.columns, chunks, strict=True)))
        return self._rows[number]

    def block(self, name: str, number: int) -> Array:
        """A block's rows of a column, as a whole chunk."""
        column = self.columns[name]
        shape = (column.rows(self.block_steps), *column.shape)
        found = self._chunk(name, number, shape, column.dtype, packed=True)
        if checksum(found) != self.row(number).chunks[name]:
            raise self.damaged(f"block {number} of {name} is not what was written there")
        return found

    def state(self, blocks: int) -> Array:
        """The state after the first ``blocks`` blocks, ``[F, *neurons]``. The group has those after the last two blocks."""
        config = self.attributes["config"]
        found = self._chunk("state", (blocks - 1) % 2, state_shape(config), config["state_dtype"], packed=False)
        if checksum(found) != self.row(blocks - 1).state:
            raise self.damaged(f"state is not that after block {blocks - 1}, the last of {self.steps:,} finished steps")
        return np.array(found[0])

    def fixed_array(self, name: str) -> Array:
        """An array that does not grow."""
        fixed = self.fixed[name]
        parts = []
        for number, expected in enumerate(fixed.checksums):
            parts.append(self._chunk(name, number, fixed.chunk, fixed.dtype, packed=True))
            if f"{checksum(parts[-1]):016x}" != expected:
                raise self.damaged(f"block {number} of {name} is not what was written there")
        if not parts or not fixed.shape:
            return parts[0] if parts else np.empty(fixed.shape, fixed.dtype)
        return np.concatenate(parts)[: fixed.shape[0]]

    def check_blocks(self) -> list[Row]:
        """Check that every chunk is there, and that the last block, its state and the arrays that do not grow are whole.

        Returns:
            The rows of ``checksums`` for all blocks.
        """
        rows = [self.row(number) for number in range(self.blocks)]
        for number, row in enumerate(rows):
            if number < len(rows) - 1 and row.steps != self.block_steps:
                raise self.damaged(f"block {number} has {row.steps} steps")
            for name, column in self.columns.items():
                file = self.path / name / chunk_name(number, 1 + len(column.shape))
                if not file.is_file() or not file.stat().st_size:
                    raise self.damaged(f"block {number} of {name} is missing")
        if rows:
            self.state(len(rows))
            for name in self.columns:
                self.block(name, len(rows) - 1)
        for name in self.fixed:
            self.fixed_array(name)
        return rows

    def result(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The attributes and the arrays of the result. An array is read when it is indexed."""
        shape = state_shape(self.attributes["config"])[1:]
        arrays: dict[str, Any] = {name: Grown(self, name) for name in self.columns}
        arrays |= {name: Lazy(kept.shape, partial(self.fixed_array, name)) for name, kept in self.fixed.items()}
        arrays |= {"state": Lazy(shape, partial(self.state, self.blocks))} if self.steps else {}
        return self.attributes | {"steps_done": self.steps}, arrays


class Grown:
    """A column, which is read by slices of its rows."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name, self._column = store, name, store.columns[name]
        self.shape = (self._column.rows(store.steps), *self._column.shape)

    def __getitem__(self, key: Any) -> Array:
        start, stop, _ = (slice(None) if key is ... else key).indices(self.shape[0])
        width = self._column.rows(self._store.block_steps)
        parts = []
        for number in range(start // width, -(-stop // width) if stop > start else start // width):
            rows = self._store.block(self._name, number)
            parts.append(rows[max(start - number * width, 0) : stop - number * width])
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self._column.dtype)


class Lazy:
    """An array that is read when it is indexed."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[], Array]) -> None:
        self.shape, self._read = shape, read

    def __getitem__(self, key: Any) -> Array:
        return np.asarray(self._read()[key])


def seal_of(run: str, number: int, row: Array) -> int:
    """The seal of a row of checksums, which ties it to one block of one run."""
    return checksum(f"{run} ".encode() + struct.pack("<q", number) + np.ascontiguousarray(row, "<u8").tobytes())
