"""``coba-triton warmup``: compile kernels before they are needed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import coba_triton
from coba_triton.tuning.tables import DTYPES

from . import info
from .errors import UserError, nearest

# Neurons of a row and rows: programs of one warp and of four, rows in one tile and in several.
SIZES = ("100x1", "1000x1", "1024x32", "256x32", "4096x1", "4096x32", "262144x1")


def run(arch: str | None, cache: Path | None, sizes: list[str], dtype: str) -> int:
    """Compile, and say how far it is; returns the exit status."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be {' or '.join(DTYPES)}, got {dtype!r}{nearest(dtype, DTYPES)}")
    if arch is None:
        if cache is not None or sizes:
            raise UserError("--cache and --size are of kernels for a GPU; add --arch")
        coba_triton.warmup([DTYPES[dtype]])
        return 0
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError("--arch needs Triton's compiler, and TRITON_INTERPRET is set; unset it")
    try:
        from coba_triton.tools import compiler
    except ModuleNotFoundError as error:
        raise UserError(f"--arch needs the package {error.name}; pip install coba-triton[interp]") from None
    if arch not in compiler.TARGETS:
        known = tuple(compiler.TARGETS)
        raise UserError(f"--arch must be one of {', '.join(known)}, got {arch!r}{nearest(arch, known)}")
    parsed = [_parse(size) for size in sizes or SIZES]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    done = 0
    with Progress(*columns, console=Console(stderr=True)) as progress:
        line = progress.add_task(f"kernels for {arch}", total=None)
        for done, total, _ in compiler.compile_ahead(arch, parsed, DTYPES[dtype], cache):
            progress.update(line, completed=done, total=total)
    print(f"Compiled {done} kernels for {arch} into {info.caches()['triton']}")
    return 0


def _parse(size: str) -> tuple[int, int]:
    """Neurons and rows in ``1024x32``."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", size)
    if match is None:
        raise UserError(f"--size must be neurons and rows such as 1024x32, got {size!r}")
    return int(match[1]), int(match[2])
