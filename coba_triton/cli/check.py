"""``coba-triton check``: a live table of what agrees with the reference, and the smallest case of what does not."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from coba_triton.common.files import local_path, reason, written_whole
from coba_triton.tools import check_process, checker
from coba_triton.tools.checker import Result
from coba_triton.tuning import tables as tuning

from . import info
from .errors import UserError


def _table(results: list[Result]) -> Table:
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
            f"[bold red]{count['failed']}[/]" if count["failed"] else "0",
            str(count["skipped"]),
            f"{sum(result.seconds for result in members):.1f}",
        )
    return table


def run(
    device: str | None, backend: str, level: str, only: str | None, report: Path | None, apart: bool | None = None
) -> int:
    """Run the checks; returns the exit status."""
    try:
        used, where = checker.resolve(backend, device)
        checks = checker.select(used, where, level, only)
        torch.empty(0, device=where)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(str(error).splitlines()[0]) from None
    if report is not None:
        writable(report)
    _say_what(used, where, level)
    console = Console()
    results: list[Result] = []
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    task = progress.add_task("", total=len(checks))
    started = time.perf_counter()
    interrupted = False
    if where.type != "cpu" if apart is None else apart:
        running = check_process.run_checks(used, where, level, only)
    else:
        running = (checker.run_check(each, where) for each in checks)
    written = 0.0
    with Live(console=console, auto_refresh=console.is_terminal, transient=True) as live, closing(running):
        try:
            for each in checks:
                progress.update(task, description=f"{each.group}, {each.name}"[:60])
                live.update(Group(_table(results), progress))
                results.append(next(running))
                progress.advance(task)
                if report is not None and time.monotonic() > written + 1:
                    _write(report, checker.Report(used, str(where), tuple(results)), level, interrupted=True)
                    written = time.monotonic()
        except KeyboardInterrupt:
            interrupted = True
    console.print(_table(results))
    done = checker.Report(used, str(where), tuple(results))
    for result in results:
        if result.status == "skipped":
            print(f"skipped: {result.group}, {result.name}: {result.detail}")
    for result in done.failures:
        shown = f"The smallest case found:\n\n{result.snippet}\n" if result.snippet else ""
        print(f"\nMISMATCH: {result.group}, {result.name}\n{result.detail}\n{shown}")
    if report is not None:
        _write(report, done, level, interrupted)
        print(f"Wrote {report}")
    if interrupted:
        print(f"Interrupted after {len(results)} of {len(checks)} checks.")
        return 130
    passed = sum(result.status == "passed" for result in results)
    verdict = (
        "agrees with the reference" if done.ok else "does not agree with the reference" if done.failures else "nothing ran"
    )
    print(f"{used} on {where}: {verdict}; {passed} of {len(checks)} checks passed in {time.perf_counter() - started:.0f} s")
    return 0 if done.ok else 1


def _say_what(backend: str, device: torch.device, level: str) -> None:
    name = tuning.machine(backend, device).name
    print(f"Checking backend {backend} on {device} ({name}) against the reference, {level} level.")
    if device.type == "cpu":
        print("This says nothing about a GPU: run it on a machine with one, where it settles what tests without one cannot.")
    else:
        print("This settles, for this device, what tests without a GPU cannot.")


def writable(path: Path) -> None:
    """Find out, before the work, whether a file can be written.

    Raises:
        UserError: if it cannot.
    """
    try:
        local_path(path, "a file").parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; name a file")
        probe = path.with_name(f".{path.name}.{os.getpid()}.part")
        probe.touch()
        probe.unlink()
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; name another file") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that appears whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        with written_whole(path) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; make room or name another file") from None


def _write(path: Path, report: checker.Report, level: str, interrupted: bool) -> None:
    machine = tuning.machine(report.backend, torch.device(report.device))
    write_json(
        path,
        {
            "backend": report.backend,
            "device": report.device,
            "name": machine.name,
            "arch": machine.arch,
            "versions": info.versions(),
            "sources": tuning.source_hash(report.backend),
            "level": level,
            "ok": report.ok and not interrupted,
            "interrupted": interrupted,
            "results": [result.__dict__ for result in report.results],
        },
    )
