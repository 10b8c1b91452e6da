"""Small files: read without waiting and without reading on and on, whoever wrote them; written whole or not at all, by one
writer at a time.
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

MOST = 2**24  # bytes of a file that people write, or that is written for them to read


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """What a regular file holds.

    Raises:
        OSError: if it cannot be read, is a folder, a pipe or a device, or is larger than ``limit`` bytes.
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


def read_text(path: str | os.PathLike[str], limit: int = MOST) -> str:
    """The text of a regular file, see :func:`read_bytes` and :func:`coba_triton.common.text.decode`.

    Raises:
        OSError: as there.
        ValueError: if it is no text.
    """
    return decode(read_bytes(path, limit))


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file says; see :func:`read_bytes`.

    Raises:
        OSError: as there.
        ValueError: if it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(read_bytes(path, MOST))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def part_of(path: Path) -> Path:
    """A path beside ``path`` that nobody can guess, so that no link waits there that leads elsewhere."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")


@contextmanager
def written_whole(path: Path, replace: bool = True) -> Iterator[Path]:
    """A new, empty file beside ``path``: takes its place when the block ends well, goes away otherwise.

    Raises:
        FileExistsError: if there is something at ``path`` by then and it is not to be replaced.
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
    """Whether ``path`` is now the same file as ``part``: what is there already stays, even if it came this moment."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, "exists; it has come while its content was made", str(path)) from None
        return False
    return True


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Be the only one that writes to ``path``, among all processes and threads that ask.

    The lock is the operating system's, on an empty file beside ``path``: whoever dies lets it go.

    Raises:
        BlockingIOError: if another one holds it.
        OSError: if the folder is missing or cannot be written to.
    """
    from filelock import FileLock, Timeout

    if not path.parent.is_dir():  # which the lock would make
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}; make it, or choose another path")
    beside = path.with_name(f".{path.name}.lock")
    lock = FileLock(beside, timeout=0, thread_local=False)
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
            beside.unlink()  # while it is held: whoever has opened it sees that it is gone, and makes another one
        lock.release()


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """A path in the file system, and no address: that of ``s3://bucket`` would be a new folder here, called ``s3:``.

    Raises:
        ValueError: if it is an address, also one that has been a :class:`Path`, which has lost a slash.
    """
    text = os.fspath(path)
    if "://" in text or re.match(r"[A-Za-z][\w+.:-]+:/", text):
        raise ValueError(
            f"{name} must be a path of this machine's file system, got the address {text!r}; leave out a leading file://, "
            "or write to a local path and copy it there"
        )
    return Path(path)


def is_there(path: Path) -> bool:
    """Whether there is something at a path, as far as one can see: a folder that must not be looked into has nothing."""
    return os.path.exists(path)


def reason(error: OSError) -> str:
    """Why a file could not be read or written, in words: not every error has those of the system."""
    return error.strerror or str(error) or type(error).__name__
