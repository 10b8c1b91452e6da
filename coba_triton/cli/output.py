"""What commands print. Words stay whole, no line ends in blanks, and colours are for terminals."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterable

from rich.console import Console, RenderableType

from ..common.files import reason
from .errors import UserError

_BLANKS = re.compile(r" +((?:\x1b\[[0-9;]*m)*)$", re.MULTILINE)


def _broken(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def say(*things: RenderableType, error: bool = False) -> None:
    """Print texts and tables on standard output, or on standard error.

    On a terminal a text is broken between words. Elsewhere a text keeps its lines, so that programs can read them. A table
    is as wide as the terminal, or 80 columns elsewhere. Nothing is printed where the stream was closed from the start.

    Raises:
        UserError: if standard output cannot be written to. An error on standard error has nowhere to be told.
    """
    try:
        _print(things, error)
    except BrokenPipeError:  # who reads has left
        raise
    except OSError as failure:
        if not error:
            # what could not be written waits in the stream, and Python would fail to write it once more at its end
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            raise UserError(f"cannot write to standard output: {reason(failure)}; make room, or send it elsewhere") from None


def _print(things: Iterable[RenderableType], error: bool) -> None:
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # a shell's >&- closes it
        return
    console = Console(stderr=error, markup=False, highlight=False)
    with console.capture() as captured:
        for thing in things:
            if isinstance(thing, str):
                lines = thing.splitlines() or [""]
                console.out("\n".join(_broken(line, console.width) if console.is_terminal else line for line in lines))
            else:
                console.print(thing)
    stream.write(_BLANKS.sub(r"\1", captured.get()))
    stream.flush()
