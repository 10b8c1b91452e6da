"""The command line, ``coba-triton``; its packages are the optional extra ``coba-triton[cli]``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from ..common.signals import silent_start

_EXTRA = ("rich", "typer")  # packages that every command needs; some commands need more and say so themselves


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; None takes them from ``sys.argv``.

    Returns:
        The exit status: 0 on success, 2 for bad input or a missing package, 130 after Ctrl-C, and 128 plus the signal's
        number after another signal.
    """
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f'coba-triton: the command line needs {", ".join(missing)}; run: pip install "coba-triton[cli]"',
            file=sys.stderr,
        )
        return 2
    with silent_start():
        from .app import run

    return run(arguments)
