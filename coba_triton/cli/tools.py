"""The commands for people who run kernels: info, check, tune, bench. What they do is imported when one is called."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .config import UserError

INTERRUPTED = 130


def _for_users(command: Callable[..., int]) -> Callable[..., None]:
    """A command that returns its exit status: 130 after Ctrl-C, and errors that a user can put right as one sentence."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            status = command(*args, **options)
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            status = INTERRUPTED
        except MemoryError as error:
            raise UserError(f"not enough memory ({error}); choose smaller sizes") from None
        if status:
            raise typer.Exit(status)

    return run


@_for_users
def info(json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    """Versions, devices, which backend serves each and why another does not, caches, and tuning tables in use."""
    from . import info

    info.run(json_)
    return 0


@_for_users
def check(
    device: Annotated[str | None, typer.Option(help="Where: cuda, cpu, ...; the GPU if Triton has one.")] = None,
    backend: Annotated[str, typer.Option(help="What to check: auto, triton or cpu.")] = "auto",
    full: Annotated[bool, typer.Option("--full/--quick", help="All cases, or a selection (the default).")] = False,
    only: Annotated[str | None, typer.Option(metavar="TEXT", help="Only cases whose names contain this.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a JSON report to this file.")] = None,
) -> int:
    """Compare a backend with the reference, bit by bit where it must be; exit status 1 on a mismatch.

    On a machine with a GPU this settles what tests without one cannot: that the kernels, as they run on this device,
    give the reference's numbers.
    """
    from . import check

    return check.run(device, backend, "full" if full else "quick", only, report)


COMMANDS = (info, check)
