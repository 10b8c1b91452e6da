"""How signals end the command line: at once and in silence while it is imported, and in an orderly way while it runs."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _is_command_line() -> bool:
    """Whether this process is ``coba-triton`` or ``python -m coba_triton.cli``."""
    program = next(iter(getattr(sys, "argv", ())), "")  # a program that embeds Python may have none
    return Path(program).stem in ("coba-triton", "coba-triton-script") or "coba_triton.cli" in sys.orig_argv


@contextmanager
def silent_start() -> Iterator[None]:
    """Let Ctrl-C end the command line without a traceback while it is imported, when there is nothing to be kept yet."""
    handler = signal.getsignal(signal.SIGINT)
    mine = handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if not mine or not _is_command_line():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def as_interrupts() -> Iterator[list[int]]:
    """Let SIGTERM and SIGHUP interrupt a command as Ctrl-C does, so that it writes what is finished and lets go of locks.

    Yields the signal that has come, if one has. Who ignores a signal, as ``nohup`` does, goes on ignoring it.
    """
    received: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        if not received:  # a second one would cut off what the first one began
            received.append(number)
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
        before = {n: signal.signal(n, interrupt) for n in numbers if n and signal.getsignal(n) == signal.SIG_DFL}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
