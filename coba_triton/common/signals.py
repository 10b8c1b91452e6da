"""Signals end the command line: while it is imported, at once and without a message; while it runs, after a tidy-up.

They wait while threads run a kernel together.
"""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MODULES = ("coba_triton", "coba_triton.cli")


def is_command_line() -> bool:
    """Whether this process is ``coba-triton``, ``python -m coba_triton`` or ``python -m coba_triton.cli``."""
    program = next(iter(getattr(sys, "argv", ())), "")  # a program that embeds Python may have no argv
    modules = {name for option, name in itertools.pairwise(sys.orig_argv) if option == "-m"}
    return Path(program).stem in ("coba-triton", "coba-triton-script") or not modules.isdisjoint(_MODULES)


@contextmanager
def silent_start() -> Iterator[None]:
    """Within the block, Ctrl-C ends the command line without a traceback, as there is nothing to keep yet."""
    handler = signal.getsignal(signal.SIGINT)
    mine = handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if not mine or not is_command_line():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def as_interrupts() -> Iterator[list[int]]:
    """Within the block, SIGTERM and SIGHUP interrupt a command like Ctrl-C, so that it writes its results and frees locks.

    Yields a list, to which the signal is added when it comes. A signal that the process ignores, as under ``nohup``, is
    still ignored.
    """
    received: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        if not received:  # a second signal would interrupt the tidy-up
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


# Signals whose handlers may raise; Ctrl-C is the last that is handled as before.
_NAMES = ("SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGINT")
_RAISING = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]  # Windows lacks most


@contextmanager
def deferred() -> Iterator[None]:
    """Signals that come within the block are handled at its end, as if they came then.

    An exception of a handler would otherwise leave a call from C without a trace, or a thread without the one it waits for.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    came: list[int] = []
    before: dict[int, Any] = {}
    try:
        for number in _RAISING:
            if callable(signal.getsignal(number)):
                before[number] = signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)
