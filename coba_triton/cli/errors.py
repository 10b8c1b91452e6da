"""What is wrong with what a user has given, in words."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


class UserError(Exception):
    """What the user can put right: its message is one sentence that says how."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A ``; did you mean ...?`` for a misspelt word, empty if nothing known is near."""
    matches = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is kept from being imported
        return False


def require(what: str, *packages: str) -> None:
    """Refuse a command some of whose packages are not installed; the others work without them.

    Raises:
        UserError: if one is missing.
    """
    missing = [name for name in packages if not _is_there(name)]
    if missing:
        raise UserError(f'{what} needs {", ".join(missing)}; run: pip install "coba-triton[cli]"')
