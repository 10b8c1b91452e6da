"""The commands simulate and plot, the start of every command, and what they print."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..common.signals import as_interrupts
from ..tools.warmup import messages_on_stderr
from . import tools
from .errors import INTERRUPTED, UserError, require


class Form(StrEnum):
    """The format in which a result is kept."""

    zarr = "zarr"
    npz = "npz"


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
for _command in tools.COMMANDS:
    app.command()(_command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; see :func:`coba_triton.cli.main`."""
    with as_interrupts() as received:
        try:
            with messages_on_stderr():
                app(arguments, prog_name="coba-triton")
            status = 0
        except UserError as error:
            _say(f"coba-triton: {error}")
            status = 2
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
    return 128 + received[0] if received else status


def _say(message: str) -> None:
    """Print a line on standard error, as it is."""
    print(message, file=sys.stderr)


@app.callback()
def commands() -> None:
    """Conductance-based leaky integrate-and-fire neurons over long sequences: simulate, check, tune, bench."""


@app.command()
def simulate(
    config: Annotated[str | None, typer.Argument(help="A TOML file, or the name of a built-in configuration.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; those of an earlier run are replaced.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that was interrupted in this folder.")] = False,
    form: Annotated[Form, typer.Option("--format", help="How to keep the result; only zarr can be resumed.")] = Form.zarr,
    list_: Annotated[bool, typer.Option("--list", help="List the built-in configurations.")] = False,
) -> None:
    """Run a configuration: writes result.zarr, raster.png and summary.json to a folder.

    After Ctrl-C, or if the run is killed, --resume goes on from the last finished block.
    """
    require("simulate", "matplotlib", "numcodecs", "pint", "pydantic", "xxhash")
    if list_:
        _list_builtins()
        return
    if config is None:
        raise UserError("no configuration given; name a TOML file or a built-in one (see simulate --list)")
    if out is None:
        raise UserError("no folder for the results given; add --out DIR")
    if resume and form is Form.npz:
        raise UserError("a run into .npz cannot be resumed, as it is written at its end; leave out --format npz")
    try:
        interrupted = _simulate(config, out, resume, form)
    except KeyboardInterrupt:
        _say("Interrupted; nothing more was written.")
        raise typer.Exit(INTERRUPTED) from None
    except MemoryError as error:
        raise UserError(
            f"not enough memory ({error}); make neuron.count, the channels or simulation.block_steps smaller"
        ) from None
    if interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command()
@tools.for_users
def plot(
    result: Annotated[Path, typer.Argument(help="A result: the folder of a run, a .zarr group or an .npz file.")],
    out: Annotated[Path | None, typer.Option(help="PNG, PDF or SVG file; plot.png beside the result by default.")] = None,
    start: Annotated[float | None, typer.Option(help="Where the panels over time begin, in ms.")] = None,
    stop: Annotated[float | None, typer.Option(help="Where they end, in ms.")] = None,
) -> int:
    """Draw a result: raster, rates, membrane potential, intervals between spikes, and a table of the populations."""
    require("plot", "matplotlib", "numcodecs", "pint", "pydantic", "xxhash")
    from . import report

    print(f"Wrote {report.plot(result, out, start, stop)}")
    return 0


def _list_builtins() -> None:
    from .config import builtin_folder, builtins, describe

    table = Table.grid(padding=(0, 2))
    for name in builtins():
        table.add_row(name, describe(name))
    Console(markup=False).print(table)
    print(f"To make your own, copy one from {builtin_folder()}")


def _simulate(name: str, out: Path, resume: bool, form: Form) -> bool:
    """Run a configuration and write the results; returns whether Ctrl-C ended it."""
    from . import job, report
    from .config import load
    from .inputs import open_source
    from .weights import open_recurrent

    name, config = load(name)

    with report.own_folder(out):
        try:
            source, recurrent = open_source(config), open_recurrent(config)
        except (OverflowError, ValueError) as error:  # a number has the right sign and unit, but is too large
            raise UserError(f"{name}: {error}") from None
        sink = report.make_sink(out / f"result.{form.value}", name, config, source)
        with _warnings_in_one_line():
            run = job.run(config, source, recurrent, sink, resume)
        if not run.result.steps:
            _say("Interrupted before the first block of steps was finished.")
            return True
        summary = report.write(out, name, config, source, recurrent, run)
        _print_summary(summary)
        print(f"Wrote {sink.path.name if sink.path else ''}, {' and '.join(report.FILES)} to {out}")
        if not run.result.finished:
            hint = "; continue with --resume" if form is Form.zarr else ""
            _say(f"Interrupted after {run.result.steps:,} of {summary['T']:,} steps; what was finished is written{hint}.")
        return not run.result.finished


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Within the block, show warnings without the source line that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _say(f"coba-triton: warning: {message}")
        yield


def _origin_of(recurrent: dict[str, Any]) -> str:
    """Where the recurrent synapses come from."""
    if "projections" in recurrent:
        count = len(recurrent["projections"])
        return f"{count} projection{'s' * (count > 1)}"
    return recurrent.get("file") or f"random, seed {recurrent['seed']}"


def _print_summary(summary: dict[str, Any]) -> None:
    rates, backend, recurrent, cv = (summary[key] for key in ("rates_hz", "backend", "recurrent", "interval_cv"))
    simulated = f"{summary['simulated_s']:g} s, dt {summary['dt_ms']:g} ms"
    rows = [
        ("steps", f"{summary['steps_done']:,} of {summary['T']:,} ({simulated})"),
        ("neurons", f"{summary['N']:,}, {rates['fraction_silent']:.0%} of them silent"),
        ("spikes", f"{summary['spikes']:,}"),
        ("rate", f"{rates['mean']:.1f} Hz mean, {rates['min']:.1f} to {rates['max']:.1f} Hz"),
        (
            "irregularity",
            f"CV of intervals {cv['mean']:.2f} ({cv['neurons']:,} neurons)" if cv["neurons"] else "unknown",
        ),
    ]
    if recurrent:
        origin = _origin_of(recurrent)
        rows.append(("synapses", f"{recurrent['synapses']:,} ({origin})"))
        for name, population in recurrent["populations"].items():
            mean = population["interval_cv"]["mean"]
            irregularity = "" if mean is None else f", CV of intervals {mean:.2f}"
            rows.append((name, f"{population['neurons']:,} neurons, {population['rate_hz']:.1f} Hz mean{irregularity}"))
    used, on = backend["used"], backend["device"]
    rows += [
        ("backend", used if used == on else f"{used} on {on}"),
        ("wall time", f"{summary['wall_time_s']:.2f} s, {summary['steps_per_s']:,.0f} steps/s"),
    ]
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    Console(markup=False).print(table)
