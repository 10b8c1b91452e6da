"""A result as one ``.npz`` file: written whole or not at all, and read only after its sizes and checksums were compared."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..common.files import written_whole
from .store import Array, Refused, check_attributes, columns_of, state_shape

PIECE_BYTES = 2**24  # bytes that are read from the file at a time
DEFLATE = 1040  # zip's compression makes nothing more than this many times smaller


def crc32(array: Array) -> int:
    """The checksum of an array in an ``.npz`` file."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_npz(
    path: Path,
    attributes: dict[str, Any],
    arrays: Mapping[str, Array],
    replace: bool,
    changing: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Write arrays, and the attributes as JSON in one more array.

    The file is written beside its path first. It gets its name within the context that ``changing`` makes.

    Raises:
        FileExistsError: if the file is there and ``replace`` is False.
        OSError: if it cannot be written.
    """
    with ExitStack() as stack, written_whole(path, replace) as part:
        with part.open("wb") as file:
            np.savez_compressed(file, **cast(Any, {"attributes": np.array(json.dumps(attributes)), **arrays}))
        stack.enter_context(changing())


# What reading a file raises that holds something else, or is damaged.
_DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)


def check_npz(path: Path) -> None:
    """Refuse a file that is no result. Only its attributes are read.

    Raises:
        ValueError: if it is none.
    """
    try:
        with _opened(path) as file:
            _attributes_of(path, file)
    except Refused:
        raise
    except _DAMAGED as error:
        raise _no_result(path, error) from None


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():
        raise ValueError("no regular file")
    with zipfile.ZipFile(path) as file:
        yield file


def _attributes_of(path: Path, file: zipfile.ZipFile) -> tuple[Any, dict[str, zipfile.ZipInfo]]:
    """The attributes, and the members that hold the other arrays."""
    members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
    attributes = json.loads(str(_read_member(file, members.pop("attributes"), "str", ())))
    check_attributes(str(path), attributes)
    return attributes, members


def _no_result(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"{path} is no result of coba_triton, or damaged ({error}); give the path of one")


def read_npz(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """The attributes and the arrays of a file. Every array has the shape and the checksum that the attributes name.

    Raises:
        ValueError: if the file is no result, or damaged.
    """
    try:
        with _opened(path) as file:
            attributes, members = _attributes_of(path, file)
            kept, steps, config = attributes["arrays"], attributes["steps_done"], attributes["config"]
            shapes = {name: tuple(array["shape"]) for name, array in kept.items()}
            expected = {name: (column.rows(steps), *column.shape) for name, column in columns_of(config).items()}
            expected |= {"state": state_shape(config)[1:]} if steps else {}
            if set(kept) != set(members) or any(shapes[name] != shape for name, shape in expected.items()):
                raise ValueError(f"it holds {sorted(members)}, which do not belong to {steps} steps of it")
            arrays = {name: _read_member(file, info, kept[name]["dtype"], shapes[name]) for name, info in members.items()}
            for name, array in arrays.items():
                if crc32(array) != kept[name]["crc32"]:
                    raise ValueError(f"{name} is not what was written")
    except Refused:
        raise
    except _DAMAGED as error:
        raise _no_result(path, error) from None
    return attributes, arrays


def _read_member(file: zipfile.ZipFile, info: zipfile.ZipInfo, dtype: str, shape: tuple[int, ...]) -> Array:
    """Read one array. Before memory is taken for it, its header must name this dtype and shape, and its size must be one
    that the compressed bytes can hold.
    """
    with file.open(info) as member:
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        found, by_column, kind = read_header[np.lib.format.read_magic(member)](member)
        size = kind.itemsize * math.prod(found)
        name = "str" if kind.kind == "U" else kind.name
        if (found, name) != (shape, dtype) or size > min(info.file_size, DEFLATE * info.compress_size):
            raise ValueError(f"{info.filename} is {kind} of shape {list(found)}, in {info.compress_size:,} bytes")
        array = np.empty(size, np.uint8)
        for begin in range(0, size, PIECE_BYTES):
            part = array[begin : begin + PIECE_BYTES]
            part[:] = np.frombuffer(member.read(len(part)), np.uint8)
        if member.read(1):  # at the end of the data, zipfile compares its own checksum
            raise ValueError(f"{info.filename} is longer than its shape")
    return array.view(kind).reshape(found, order="F" if by_column else "C")
