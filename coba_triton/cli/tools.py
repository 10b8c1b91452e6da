"""The options of the commands for people who run kernels: info, check, tune, bench, warmup.

Here are the options with their help texts. A module of the same name does the work; it is imported when it is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..common.garbage import importing
from ..common.signals import silent_start
from .errors import INTERRUPTED, UserError, lack_of_memory, require
from .output import say


@contextmanager
def imports() -> Iterator[None]:
    """Within the block, a command imports what it needs, also PyTorch. Ctrl-C ends it in silence, as at the start."""
    with silent_start(), importing():
        yield


def for_users(command: Callable[..., int]) -> Callable[..., None]:
    """Make a command of a function that returns an exit status. Ctrl-C gives 130, and a lack of memory is a UserError."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            status = command(*args, **options)
        except KeyboardInterrupt:
            say("Interrupted.", error=True)
            status = INTERRUPTED
        except (MemoryError, RuntimeError) as error:
            if (lack := lack_of_memory(error)) is None:
                raise
            raise UserError(f"{lack}; choose smaller sizes") from None
        if status:
            raise typer.Exit(status)

    return run


@for_users
def info(json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    """Show versions, devices, which backends serve each device and which do not, caches, and the tuning tables in use."""
    with imports():
        from . import info

    info.run(json_)
    return 0


@for_users
def check(
    device: Annotated[str | None, typer.Option(help="The device: cuda, cpu, ...; by default the GPU, if any.")] = None,
    backend: Annotated[str, typer.Option(help="The backend to check: auto, triton or cpu.")] = "auto",
    full: Annotated[bool, typer.Option("--full/--quick", help="All cases, or a selection (the default).")] = False,
    only: Annotated[str | None, typer.Option(metavar="TEXT", help="Only cases whose names contain this.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a JSON report to this file, after every case.")] = None,
    apart: Annotated[
        bool | None,
        typer.Option(
            "--apart/--in-process",
            help="Run the cases in another process, which may crash; by default on all devices but the CPU.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="So many processes run cases at the same time.")] = 1,
) -> int:
    """Compare a backend with the reference, bit by bit where the bits must be equal. A mismatch gives exit status 1.

    On a machine with a GPU this shows that the kernels, as they run on this device, give the reference's numbers. Tests on
    another machine cannot show that.
    """
    with imports():
        from . import check

    return check.run(device, backend, "full" if full else "quick", only, report, apart, jobs)


@for_users
def tune(
    neurons: Annotated[int, typer.Option(help="The number of neurons N in one batch row.")],
    kernel: Annotated[
        list[str] | None, typer.Option(help="The name of a kernel to tune, or all (the default); may be repeated.")
    ] = None,
    batch: Annotated[int, typer.Option(help="The number of batch rows B.")] = 1,
    dtype: Annotated[str, typer.Option(help="The dtype: float32 or float64.")] = "float32",
    backend: Annotated[str, typer.Option(help="The backend: auto, triton or cpu.")] = "auto",
    device: Annotated[str | None, typer.Option(help="The device; by default the GPU, if Triton can drive one.")] = None,
    effort: Annotated[str, typer.Option(help="quick: one parameter at a time; full: all combinations.")] = "quick",
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="After this time no measurement begins.")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="The table to write; by default the user's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was cut off.")] = False,
    compile_only: Annotated[bool, typer.Option("--compile-only", help="Compile for --arch; needs no GPU.")] = False,
    arch: Annotated[str | None, typer.Option(help="With --compile-only: sm_80, sm_90, sm_100, gfx942 or gfx1100.")] = None,
) -> int:
    """Measure launch parameters and write the best ones into a table, which launches look into.

    The parameters change no bit of a result: every set is compared with the reference before it is timed.
    """
    require("tune", "matplotlib")
    with imports():
        from . import tune

    wanted = tune.Wanted(kernel or ["all"], neurons, batch, dtype, effort)
    if compile_only:
        return tune.compile_only(wanted, arch, out)
    if arch is not None:
        raise UserError("--arch goes with --compile-only: a run that measures does so for the device it runs on")
    return tune.run(wanted, backend, device, budget, out, resume)


@for_users
def bench(
    suite: Annotated[str, typer.Option(help="The cases: quick, feed-forward, recurrent or full.")] = "quick",
    backend: Annotated[str, typer.Option(help="The backend: auto, triton or cpu.")] = "auto",
    device: Annotated[str | None, typer.Option(help="The device; by default the GPU, if Triton can drive one.")] = None,
    only: Annotated[str | None, typer.Option(metavar="TEXT", help="Only cases whose names contain this.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each contender is called.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Write JSON to this file, and a PNG beside it.")] = None,
    compare: Annotated[Path | None, typer.Option(help="An earlier --out; exit status 1 if something is slower.")] = None,
) -> int:
    """Time this package beside its reference, a compiled step and, if it is installed, norse, in one run.

    Every result is compared with the reference's first. A difference gives exit status 1.
    """
    require("bench", "matplotlib")
    with imports():
        from . import bench

    return bench.run(suite, backend, device, only, rounds, out, compare)


@for_users
def warmup(
    arch: Annotated[
        str | None, typer.Option(help="Compile the GPU kernels for sm_80, sm_90, sm_100, gfx942 or gfx1100; needs no GPU.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="With --arch, the folder of Triton's cache.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="NxB", help="With --arch, neurons and rows such as 1024x32; may be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="The dtype: float32 or float64.")] = "float32",
) -> int:
    """Compile kernels before they are needed: those for the CPU, or with --arch those for a GPU that may be absent.

    Then the first job on a cluster, or on a machine that is rented by the minute, need not compile. The cache serves only
    the same release of Triton and the same path of the folder (TRITON_CACHE_DIR).
    """
    with imports():
        from . import warmup

    return warmup.run(arch, cache, size or [], dtype)


COMMANDS = {  # with what the list of commands says of them
    "info": (info, "Show versions, devices, and which backends serve them."),
    "check": (check, "Compare a backend with the reference, bit by bit."),
    "tune": (tune, "Measure launch parameters and keep the best ones."),
    "bench": (bench, "Time this package beside others."),
    "warmup": (warmup, "Compile kernels before they are needed."),
}
