"""``coba-triton tune``: measure launch parameters and write a table, or compile them for a GPU that is absent."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from coba_triton.common.files import reason
from coba_triton.stream.plotting import NEUTRAL, OTHER, OURS
from coba_triton.tools import tuner
from coba_triton.tools.tuner import Effort, Journal, Outcome, Task, Trial
from coba_triton.tuning import tables
from coba_triton.tuning.tables import KERNELS, TableError

from . import info
from .errors import INTERRUPTED, UserError, check_choice
from .output import say
from .shared import check_writable, find_target, open_compiler, write_json, write_picture

COMPILE_REPORT = "coba_triton compile report"


@dataclass(frozen=True)
class Wanted:
    """What the user wants to tune.

    Attributes:
        kernels: names of kernels, or ``all``.
        neurons: N of one batch row.
        batch: B.
        dtype: ``float32`` or ``float64``.
        effort: ``quick`` or ``full``.
    """

    kernels: list[str]
    neurons: int
    batch: int
    dtype: str
    effort: str

    def tasks(self, backend: str, device: torch.device) -> tuple[list[Task], Effort]:
        """One task for each kernel, and the effort.

        Raises:
            UserError: if a word is unknown or a size is not positive.
        """
        for kernel in self.kernels:
            check_choice("--kernel", kernel, (*KERNELS, "all"))
        check_choice("--dtype", self.dtype, tables.DTYPES)
        check_choice("--effort", self.effort, get_args(Effort))
        if self.neurons < 1 or self.batch < 1:
            raise UserError(f"--neurons and --batch must be positive, got {self.neurons} and {self.batch}")
        kernels = KERNELS if "all" in self.kernels else dict.fromkeys(self.kernels)
        tasks = [Task(backend, kernel, self.dtype, self.neurons, self.batch, str(device)) for kernel in kernels]
        return tasks, cast(Effort, self.effort)


def run(wanted: Wanted, backend: str, device: str | None, budget: float, out: Path | None, resume: bool) -> int:
    """Tune; returns the exit status."""
    if not budget > 0:
        raise UserError(f"--budget must be a positive number of seconds, got {budget:g}")
    where, target = find_target(backend, device)
    tasks, effort = wanted.tasks(target.backend, where)
    path = out or tables.user_table(target.name)
    if path is None:
        raise UserError("this user has no home for a table; name a file with --out")
    check_writable(path)
    header = {
        "machine": list(target),
        "sources": tables.source_hash(target.backend),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    try:
        tuner.open_table(path, target)
        journal = Journal(path.with_suffix(".journal.jsonl"), header, resume)
    except TableError as error:
        raise UserError(str(error)) from None
    outcomes: list[Outcome] = []
    interrupted = failed = False
    started = time.perf_counter()
    try:
        say(
            f"Tuning for {target.backend} on {target.arch} ({target.name}), up to {budget:g} s; every set of parameters "
            "is compared with the reference, bit by bit where the bits must be equal, before it is timed."
        )
        bandwidth = tuner.copy_bandwidth(where)
        say(f"Copy bandwidth: {bandwidth / 1e9:.1f} GB/s")
        for number, task in enumerate(tasks):
            now = time.perf_counter()
            deadline = now + max(0.0, budget - (now - started)) / (len(tasks) - number)
            try:
                with _progress(task) as show:
                    workload = tuner.Timed(task, bandwidth)
                    outcomes.append(tuner.tune(task, workload, journal, effort, deadline, show=show))
            except ValueError as error:
                failed = True
                say(f"{error}")
    except KeyboardInterrupt:
        interrupted = True
    finally:
        journal.close(finished=not interrupted and all(outcome.complete for outcome in outcomes))
    if outcomes:
        _report(outcomes, bandwidth, path, target)
    if interrupted:
        say(f"Interrupted; what was measured is in {journal.path}: continue with --resume.")
        return INTERRUPTED
    if not all(outcome.complete for outcome in outcomes):
        say(f"The budget of {budget:g} s ended the run; what was measured is in {journal.path}: continue with --resume.")
    return 1 if failed else 0


@contextmanager
def _progress(task: Task) -> Iterator[Any]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.fields[title]}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        line = bar.add_task("", total=None, title=task.kernel, note="preparing")

        def show(progress: tuner.Progress) -> None:
            best = progress.best
            speed = f"best {best.p50 * 1e3:.3g} ms: {_words(best.parameters)}" if best and best.p50 else "nothing timed"
            bar.update(line, completed=progress.done, total=progress.total, note=f"{speed}; ETA {progress.eta:.0f} s")

        yield show


def _meanings(tasks: Iterable[Task]) -> str:
    """What the parameters of some kernels are."""
    names = dict.fromkeys(name for task in tasks for name in tables.SPACE[task.backend][task.kernel])
    return "; ".join(f"{name}: {tables.MEANINGS[name]}" for name in names) + "."


def _words(parameters: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items())


def _report(outcomes: list[Outcome], bandwidth: float, path: Path, target: tables.Machine) -> None:
    say("rule: the parameters that the launcher takes if no table has an entry. " + _meanings(o.task for o in outcomes))
    for outcome in outcomes:
        say(_table(outcome, bandwidth))
        best, rule = outcome.best, outcome.trials[0]
        if best is rule:
            say("Nothing is faster than the launcher's own rule by more than the spread of its times.")
        elif best.p50 and rule.p50:
            say(f"Best: {_words(best.parameters)}, {rule.p50 / best.p50:.2f} times as fast as the launcher's own rule.")
    versions = info.versions()
    picture = path.with_suffix(".png")
    try:
        tuner.write_table(path, target, [tuner.entry_of(outcome, bandwidth, versions) for outcome in outcomes])
        write_picture(picture, draw(outcomes, bandwidth, target))
    except TableError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; make room or name another --out") from None
    say(f"Wrote {path} and {picture}")
    if path == tables.user_table(target.name):
        say("Launches look there from now on.")
    else:
        say(f"To use it: {tables.VARIABLE}={path}, or coba_triton.tuning.use({str(path)!r})")


def _table(outcome: Outcome, bandwidth: float) -> Table:
    table = Table(title=str(outcome.task), title_justify="left")
    table.add_column("parameters")
    for name in ("p20 / p50 / p80 ms", *(() if outcome.task.recurrent else ("% of copy",))):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note")
    rule, best = outcome.trials[0], outcome.best
    # the fastest set comes first; sets that were not timed come last
    for trial in sorted(outcome.trials, key=lambda trial: trial.p50 or float("inf")):
        names_of = [name for name, which in (("best", best), ("rule", rule)) if trial is which]
        note = trial.reason or ", ".join(names_of)
        cells = [""] * (1 if outcome.task.recurrent else 2)
        if trial.p20 and trial.p50 and trial.p80:
            cells[0] = " / ".join(f"{value * 1e3:.3g}" for value in (trial.p20, trial.p50, trial.p80))
            if not outcome.task.recurrent:
                cells[1] = f"{outcome.bytes_moved / trial.p50 / bandwidth:.0%}"
        table.add_row(_words(trial.parameters), *cells, note, style="bold" if trial is best else "")
    return table


def draw(outcomes: list[Outcome], bandwidth: float, target: tables.Machine) -> Figure:
    """Draw the median and p20 to p80 of every set of parameters, the fastest first, and the time to copy as many bytes."""
    figure = Figure((10, 1.2 + sum(0.9 + 0.24 * len(outcome.trials) for outcome in outcomes)), 110, layout="constrained")
    heights = [2 + len(outcome.trials) for outcome in outcomes]
    axes = figure.subplots(len(outcomes), squeeze=False, height_ratios=heights)
    for panel, outcome in zip(axes[:, 0], outcomes, strict=True):
        timed = sorted((trial for trial in outcome.trials if trial.p50), key=lambda trial: trial.p50 or 0.0)
        others = [trial for trial in outcome.trials if not trial.p50]
        labels = []
        for row, trial in enumerate([*timed, *others]):
            rule = trial is outcome.trials[0]
            labels.append(_words(trial.parameters) + (" (rule)" if rule else ""))
            if trial.p50 and trial.p20 and trial.p80:
                color = OURS if trial is outcome.best else OTHER
                panel.plot([trial.p20 * 1e3, trial.p80 * 1e3], [row, row], color=color, linewidth=2)
                panel.plot(trial.p50 * 1e3, row, "o", color=color, markersize=5)
                if rule:
                    panel.plot(trial.p50 * 1e3, row, "o", markerfacecolor="none", markeredgecolor=NEUTRAL, markersize=10)
            else:
                panel.text(0.01, row, f"{trial.status}: {trial.reason}"[:90], fontsize=7, va="center",
                           transform=panel.get_yaxis_transform())  # fmt: skip
        if not outcome.task.recurrent:
            panel.axvline(
                outcome.bytes_moved / bandwidth * 1e3, color=NEUTRAL, linestyle="--", label="copy of as many bytes"
            )
            panel.legend(frameon=False, fontsize=8, loc="upper right")
        panel.set_yticks(range(len(labels)), labels, fontsize=7)
        panel.invert_yaxis()
        panel.set_xlim(left=0)
        panel.set_xlabel("ms for one call: median, p20 to p80")
        panel.set_title(str(outcome.task), fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Launch parameters on {target.name} ({target.arch}); green: chosen, ring: the launcher's rule", fontsize=11
    )
    return figure


def _verdict(trials: list[Trial], rule: dict[str, int]) -> str:
    """What was found out without a measurement."""
    failed, spill = [t for t in trials if t.reason], [t for t in trials if t.compiled.get("spills")]
    chosen = [t.compiled for t in trials if t.parameters == rule and t.compiled]
    parts = [
        f"{len(trials) - len(failed)} of {len(trials)} sets of parameters compile, {len(spill)} of them spill registers."
    ]
    parts += [f"The rule has {found['spills']} spills and {found['occupancy']:.0%} occupancy." for found in chosen]
    return " ".join((*parts, "Which set is fastest, a run on the GPU says: coba-triton tune without --compile-only."))


def compile_only(wanted: Wanted, arch: str | None, out: Path | None) -> int:
    """Compile the launches for a GPU that may be absent; returns the exit status, 1 if a kernel does not compile."""
    compiler = open_compiler("--compile-only")
    if arch is None:
        raise UserError(f"--compile-only needs a target; add --arch, one of {', '.join(compiler.TARGETS)}")
    check_choice("--arch", arch, compiler.TARGETS)
    tasks, effort = wanted.tasks("triton", torch.device("cpu"))
    if out is not None:
        check_writable(out)
    rows: list[dict[str, Any]] = []
    interrupted = False
    say(
        "rule: the parameters that the launcher takes if no table has an entry. registers and spills: 32-bit ones of a "
        "thread; shared: bytes of a block; occupancy: the share of the warps of a multiprocessor that these leave room for. "
        "Times decide, not occupancy: a launch with few blocks does not fill a GPU at any occupancy. " + _meanings(tasks)
    )
    for task in tasks:
        trials: list[Trial] = []
        table = Table(
            title=f"{task.kernel} of {task.batch} x {task.neurons} neurons, {task.dtype}, for {arch}", title_justify="left"
        )
        with compiler.recorded(arch):
            space, rule = task.space(), task.rule()
        table.add_column("parameters")
        for name in ("registers", "spills", "shared B", "occupancy"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("note")
        proposals = tuner.proposals(space, rule, effort)
        try:
            with _progress(task) as show:
                for parameters, total in proposals:
                    try:
                        trial = Trial(parameters, "timed", compiled=tuner.compile_for(task, parameters, arch))
                    except ValueError as error:
                        trial = Trial(parameters, "failed", str(error))
                    trials.append(trial)
                    show(tuner.Progress(task, len(trials), total, None, trial, 0.0))
        except KeyboardInterrupt:
            interrupted = True
        for trial in trials:
            found = trial.compiled
            figures = [str(found.get(name, "")) for name in ("registers", "spills", "shared")]
            share = f"{found['occupancy']:.0%}" if found else ""
            note = trial.reason or ("rule" if trial.parameters == rule else "")
            table.add_row(_words(trial.parameters), *figures, share, note)
            said = {"parameters": trial.parameters, "compiled": found, "error": trial.reason}
            rows.append({**task.key, **said})
        say(table, _verdict(trials, rule))
        if interrupted:
            break
    if out is not None:
        content = {"format": COMPILE_REPORT, "arch": arch, "versions": info.versions(), "compiled": rows}
        write_json(out, content | {"sources": tables.source_hash("triton"), "interrupted": interrupted})
        say(f"Wrote {out}")
    if interrupted:
        return INTERRUPTED
    return 1 if any(row["error"] for row in rows) else 0
