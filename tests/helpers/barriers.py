"""Barriers that are taken out of compiled kernels, to see that a test notices."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path


def without_barrier(source: Path, comment: str) -> tuple[Callable[[str], str], list[int]]:
    """A transform of PTX that drops the barriers of all lines with this comment, and how many it dropped in each kernel."""
    text = source.read_text().splitlines()
    lines = [number for number, line in enumerate(text, 1) if line.strip() == f"tl.debug_barrier()  # {comment}"]
    assert lines, comment
    found: list[int] = []

    def leave_out(ptx: str) -> str:
        dropped = 0
        for file in re.findall(rf'^\t\.file\t(\d+) "[^"]*{re.escape(source.name)}"', ptx, re.M):
            for line in lines:
                # what stands between the line that names the place in the source and the next one; then Triton 3.9's own
                # barrier, which it puts before an arrival that releases
                barrier = rf"(\n\t\.loc\t{file} {line} (?:(?!\.loc\t)[^\n]*\n)*?)[^\n]*bar\.sync[^\n]*"
                barrier += r"(?:\n\t\.loc\t[^\n]*\n[^\n]*bar\.sync[^\n]*)?"
                ptx, count = re.subn(barrier, r"\1", ptx)
                dropped += count
        found.append(dropped)
        return ptx

    return leave_out, found
