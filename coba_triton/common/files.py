"""Small files. Reading never waits and never reads without end, whoever wrote the file. Writing gives a whole file or none,
and only one process writes at a time.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .text import decode

LARGEST = 2**24  # bytes of a file that people write or read


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: if the file cannot be read, is a folder, a pipe or a device, or is larger than ``limit`` bytes.
    """

    def without_waiting(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for a writer

    with open(path, "rb", opener=without_waiting) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
        content = file.read(min(found.st_size, limit) + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes", os.fspath(path))
    return content


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a regular file, see :func:`coba_triton.common.text.decode`.

    Raises:
        OSError: as in :func:`read_bytes`.
        ValueError: if the content is no text.
    """
    return decode(read_bytes(path, LARGEST))


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: as in :func:`read_bytes`.
        ValueError: if the content is no JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(read_bytes(path, LARGEST))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def part_of(path: Path) -> Path:
    """A path beside ``path`` with a random name. As nobody can guess it, nobody can have put a link there."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")


@contextmanager
def written_whole(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a new, empty file beside ``path``. When the block ends well, it becomes ``path``; after an error it is removed.

    Raises:
        FileExistsError: if ``replace`` is False and ``path`` exists when the block ends.
    """
    part = part_of(path)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield part
        if replace or not _linked(part, path):
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _linked(part: Path, path: Path) -> bool:
    """Try to give ``part`` the second name ``path``; returns False if the file system has no hard links.

    Unlike a rename, this never replaces a file, not even one that appears at the same moment.

    Raises:
        FileExistsError: if ``path`` exists.
    """
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, "exists; it has come while its content was made", str(path)) from None
        return False
    return True


@contextmanager
def held(path: Path, timeout: float = 0.0) -> Iterator[None]:
    """Within the block, be the only one that writes to ``path``, of all processes and threads that use this function.

    The operating system locks an empty file beside ``path``, and unlocks it when the process dies.

    Raises:
        BlockingIOError: if another one still holds the lock after ``timeout`` seconds.
        OSError: if the folder is missing or cannot be written to.
    """
    from filelock import FileLock, Timeout

    if not path.parent.is_dir():  # the package filelock would make the folder
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}; make it, or choose another path")
    beside = path.with_name(f".{path.name}.lock")
    lock = FileLock(beside, timeout=timeout, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(f"another run is writing to {path}; wait for its end, or choose another path") from None
    except OSError as error:
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"there is no folder {path.parent} for {path.name}; make it, or choose another path"
            ) from None
        raise type(error)(f"the folder {path.parent} cannot be written to ({reason(error)}); choose another path") from None
    try:
        yield
    finally:
        with suppress(OSError):
            beside.unlink()  # while it is locked: who has opened it sees that it is gone, and makes a new one
        lock.release()


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """The path, after a check that it is no address: ``s3://bucket`` would make a new folder with the name ``s3:``.

    Raises:
        ValueError: if it is an address. A :class:`Path` has made one slash of two; that is recognised too.
    """
    text = os.fspath(path)
    if "://" in text or re.match(r"[A-Za-z][\w+.:-]+:/", text):
        raise ValueError(
            f"{name} must be a path of this machine's file system, got the address {text!r}; leave out a leading file://, "
            "or write to a local path and copy it there"
        )
    return Path(path)


def is_there(path: Path) -> bool:
    """Whether a path exists. In a folder that may not be read, nothing exists."""
    return os.path.exists(path)


def reason(error: OSError) -> str:
    """Why a file could not be read or written, in words. Not every error has the words of the operating system."""
    return error.strerror or str(error) or type(error).__name__
