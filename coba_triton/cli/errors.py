"""Errors that a user can put right, and their messages."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable

INTERRUPTED = 130  # the exit status after Ctrl-C


class UserError(Exception):
    """An error that the user can put right. Its message is one sentence, which says how."""


def lack_of_memory(error: Exception) -> str | None:
    """What an error says of memory that could not be had; None if it is of something else.

    Python and NumPy raise a MemoryError. PyTorch raises a RuntimeError, whose text depends on the device and says where in
    PyTorch it arose; of it, only the size is kept.
    """
    if isinstance(error, MemoryError):
        return f"not enough memory ({error})" if str(error) else "not enough memory"
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if wanted := re.search(r"tried to allocate ([\d.]+) ?(\w+)", text, re.IGNORECASE):
        number, unit = wanted.groups()
        number = f"{int(number):,}" if number.isdigit() else number
        return f"not enough memory (PyTorch asked for {number} {unit})"
    if "out of memory" in text:
        return f"not enough memory ({text.splitlines()[0]:.200})"
    if "Storage size calculation overflowed" in text:
        return "not enough memory (PyTorch asked for more bytes than any machine has)"
    return None


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` for a misspelt word. Empty if no known word is similar."""
    matches = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def check_choice(option: str, value: str, known: Iterable[str]) -> None:
    """Refuse an option's value that is none of the known words.

    Raises:
        UserError: if it is none of them.
    """
    known = tuple(known)
    if value not in known:
        raise UserError(f"{option} must be one of {', '.join(known)}, got {value!r}{nearest(value, known)}")


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules blocks the package
        return False


def require(what: str, *packages: str) -> None:
    """Refuse a command whose packages are not installed. Other commands work without them.

    Raises:
        UserError: if a package is missing.
    """
    missing = [name for name in packages if not _is_there(name)]
    if missing:
        raise UserError(f'{what} needs {", ".join(missing)}; run: pip install "coba-triton[cli]"')
