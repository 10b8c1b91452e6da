"""``coba-triton check``: show in a table what agrees with the reference; of what does not, show the smallest case."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from coba_triton.tools import check_process, checker
from coba_triton.tools.checker import CheckResult
from coba_triton.tuning import tables

from . import info
from .errors import INTERRUPTED, UserError
from .output import say
from .shared import check_writable, find_target, write_json


def _table(results: list[CheckResult]) -> Table:
    table = Table()
    table.add_column("checked")
    for name in ("passed", "failed", "skipped", "seconds"):
        table.add_column(name, justify="right")
    for group in dict.fromkeys(result.group for result in results):
        members = [result for result in results if result.group == group]
        count = {status: sum(result.status == status for result in members) for status in ("passed", "failed", "skipped")}
        table.add_row(
            group,
            str(count["passed"]),
            Text(str(count["failed"]), style="bold red" if count["failed"] else ""),
            str(count["skipped"]),
            f"{sum(result.seconds for result in members):.1f}",
        )
    return table


def run(
    device: str | None,
    backend: str,
    level: str,
    only: str | None,
    report: Path | None,
    apart: bool | None = None,
    jobs: int = 1,
) -> int:
    """Run the checks; returns the exit status."""
    if jobs > 1 and apart is False:
        raise UserError(
            f"--jobs {jobs} runs cases in {jobs} other processes, and --in-process in none; leave one of them out"
        )
    where, machine = find_target(backend, device)
    used = machine.backend
    try:
        checks = checker.select(used, where, level, only)
        torch.empty(0, device=where)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(str(error).splitlines()[0]) from None
    if report is not None:
        check_writable(report)
    _say_what(machine, where, level)
    console = Console()
    results: list[CheckResult] = []
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    task = progress.add_task("", total=len(checks))
    started = time.perf_counter()
    interrupted = False
    if where.type != "cpu" or jobs > 1 if apart is None else apart:
        running = check_process.run_checks(used, where, level, only, jobs)
    else:
        running = (checker.run_check(each, where) for each in checks)
    written = 0.0
    with Live(console=console, auto_refresh=console.is_terminal, transient=True) as live, closing(running):
        try:
            for each in checks:  # with several processes, one of those that run now
                progress.update(task, description=f"{each.group}, {each.name}"[:60])
                live.update(Group(_table(results), progress))
                results.append(next(running))
                progress.advance(task)
                if report is not None and time.monotonic() > written + 1:
                    _write(report, checker.Report(used, str(where), tuple(results)), machine, level, interrupted=True)
                    written = time.monotonic()
        except KeyboardInterrupt:
            interrupted = True
    say(_table(results))
    done = checker.Report(used, str(where), tuple(results))
    for result in results:
        if result.status == "skipped":
            say(f"skipped: {result.group}, {result.name}: {result.detail}")
    for result in done.failures:
        shown = f"The smallest case found:\n\n{result.snippet}\n" if result.snippet else ""
        say(f"\nMISMATCH: {result.group}, {result.name}\n{result.detail}\n{shown}")
    if report is not None:
        _write(report, done, machine, level, interrupted)
        say(f"Wrote {report}")
    if interrupted:
        say(f"Interrupted after {len(results)} of {len(checks)} checks.")
        return INTERRUPTED
    passed = sum(result.status == "passed" for result in results)
    verdict = (
        "agrees with the reference" if done.ok else "does not agree with the reference" if done.failures else "nothing ran"
    )
    say(f"{used} on {where}: {verdict}; {passed} of {len(checks)} checks passed in {time.perf_counter() - started:.0f} s")
    return 0 if done.ok else 1


def _say_what(machine: tables.Machine, device: torch.device, level: str) -> None:
    say(f"Checking backend {machine.backend} on {device} ({machine.name}) against the reference, {level} level.")
    if device.type == "cpu":
        say("This says nothing about a GPU. Run it on a machine with one to check the kernels as they run there.")
    else:
        say("This checks the kernels as they run on this device, which tests on another machine cannot do.")


def _write(path: Path, report: checker.Report, machine: tables.Machine, level: str, interrupted: bool) -> None:
    write_json(
        path,
        {
            "backend": report.backend,
            "device": report.device,
            "name": machine.name,
            "arch": machine.arch,
            "versions": info.versions(),
            "sources": tables.source_hash(report.backend),
            "level": level,
            "ok": report.ok and not interrupted,
            "interrupted": interrupted,
            "results": [result.__dict__ for result in report.results],
        },
    )
