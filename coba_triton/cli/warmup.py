"""``coba-triton warmup``: compile kernels before they are needed."""

from __future__ import annotations

import re
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from coba_triton.backend.cpu.numba_bridge import compile_count
from coba_triton.tools.warmup import warmup
from coba_triton.tuning.tables import DTYPES

from . import info
from .errors import UserError, check_choice
from .output import say
from .shared import open_compiler

# Neurons in a row x rows. These sizes need every kind of launch: one warp and four, a row in one tile and in several.
SIZES = ("100x1", "1000x1", "1024x32", "256x32", "4096x1", "4096x32", "262144x1")


def run(arch: str | None, cache: Path | None, sizes: list[str], dtype: str) -> int:
    """Compile, and show how far it is; returns the exit status."""
    check_choice("--dtype", dtype, DTYPES)
    if arch is None:
        if cache is not None or sizes:
            raise UserError("--cache and --size are of kernels for a GPU; add --arch")
        begin, before = time.perf_counter(), compile_count()
        warmup([DTYPES[dtype]])
        count = compile_count() - before
        what = f"Compiled {count} CPU kernels" if count else "Found all CPU kernels compiled, and loaded them"
        say(f"{what} in {time.perf_counter() - begin:.1f} s. Cache: {info.caches()['numba']}")
        return 0
    compiler = open_compiler("--arch")
    check_choice("--arch", arch, compiler.TARGETS)
    parsed = [_parse(size) for size in sizes or SIZES]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    done = 0
    with Progress(*columns, console=Console(stderr=True)) as progress:
        line = progress.add_task(f"kernels for {arch}", total=None)
        for done, total, _ in compiler.compile_ahead(arch, parsed, DTYPES[dtype], cache):
            progress.update(line, completed=done, total=total)
    say(f"Compiled {done} kernels for {arch} into {info.caches()['triton']}")
    return 0


def _parse(size: str) -> tuple[int, int]:
    """Read neurons and rows from a word such as ``1024x32``."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", size)
    if match is None:
        raise UserError(f"--size must be neurons and rows such as 1024x32, got {size!r}")
    return int(match[1]), int(match[2])
