"""What commands print. Words stay whole, no line ends in blanks, and colours are for terminals."""

from __future__ import annotations

import re
import sys
import textwrap

from rich.console import Console, RenderableType

_BLANKS = re.compile(r" +((?:\x1b\[[0-9;]*m)*)$", re.MULTILINE)


def _broken(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def say(*things: RenderableType, error: bool = False) -> None:
    """Print texts and tables on standard output, or on standard error.

    On a terminal a text is broken between words. Elsewhere a text keeps its lines, so that programs can read them. A table
    is as wide as the terminal, or 80 columns elsewhere.
    """
    console = Console(stderr=error, markup=False, highlight=False)
    with console.capture() as captured:
        for thing in things:
            if isinstance(thing, str):
                lines = thing.splitlines() or [""]
                console.out("\n".join(_broken(line, console.width) if console.is_terminal else line for line in lines))
            else:
                console.print(thing)
    stream = sys.stderr if error else sys.stdout
    stream.write(_BLANKS.sub(r"\1", captured.get()))
    stream.flush()
