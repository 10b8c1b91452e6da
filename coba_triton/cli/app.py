"""The commands simulate and plot, the start of every command, and what they print."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import __version__
from ..common.messages import messages_on_stderr
from ..common.signals import as_interrupts
from . import tools
from .errors import INTERRUPTED, UserError, lack_of_memory, require
from .output import say


class Form(StrEnum):
    """The format in which a result is kept."""

    zarr = "zarr"
    npz = "npz"


_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 80}
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=_HELP)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; see :func:`coba_triton.cli.main`."""
    with as_interrupts() as received:
        try:
            with messages_on_stderr():
                _commands()(arguments, prog_name="coba-triton")
            status = 0
        except UserError as error:
            _say(f"coba-triton: {error}")
            status = 2
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        except KeyboardInterrupt:  # before the command began
            status = INTERRUPTED
    return 128 + received[0] if received else status


@functools.cache
def _commands() -> Any:
    """The commands and their options, which typer takes 40 ms to find out."""
    return typer.main.get_command(app)


def _say(message: str) -> None:
    """Print a line on standard error."""
    say(message, error=True)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"coba-triton {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def commands(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Conductance-based leaky integrate-and-fire neurons over long sequences.

    Begin with: coba-triton simulate ecg --out out/ecg
    """
    if context.invoked_subcommand is None:
        say(context.get_help())


@app.command(short_help="Run a network; write its spikes and a picture.")
def simulate(
    config: Annotated[str | None, typer.Argument(help="A TOML file, or the name of a built-in configuration.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; those of an earlier run are replaced.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that was interrupted in this folder.")] = False,
    form: Annotated[Form, typer.Option("--format", help="How to keep the result; only zarr can be resumed.")] = Form.zarr,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a key of the configuration, such as duration=5s; may be repeated."
        ),
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Go on where the time step is too long and the spikes mean nothing.")
    ] = False,
    wait: Annotated[
        float,
        typer.Option(
            min=1.0, max=1e7, help="Under torchrun: seconds after which a process without an answer counts as lost."
        ),
    ] = 300.0,
    list_: Annotated[bool, typer.Option("--list", help="List the built-in configurations.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List every key of a configuration.")] = False,
) -> None:
    """Run a configuration: writes result.zarr, raster.png and summary.json to a folder.

    After Ctrl-C, or if the run is killed, --resume goes on from the last finished block.

    Under torchrun, processes share the neurons: torchrun --nproc-per-node 2 -m coba_triton simulate va --out DIR
    """
    require("simulate", "matplotlib", "numcodecs", "pint", "pydantic", "xxhash")
    if list_:
        _list_builtins()
        return
    if keys:
        with tools.imports():
            from .keys import listing

        say(*listing())
        return
    if config is None:
        raise UserError("no configuration given; name a TOML file or a built-in one (see simulate --list)")
    if out is None:
        raise UserError("no folder for the results given; add --out DIR")
    if resume and form is Form.npz:
        raise UserError("a run into .npz cannot be resumed, as it is written at its end; leave out --format npz")
    try:
        interrupted = _simulate(config, set_ or [], out, resume, form, keep_going, wait)
    except KeyboardInterrupt:
        _say("Interrupted; nothing more was written.")
        raise typer.Exit(INTERRUPTED) from None
    except (MemoryError, RuntimeError) as error:
        if (lack := lack_of_memory(error)) is None:
            raise
        raise UserError(
            f"{lack}; make neuron.count, the channels or simulation.block_steps smaller, or, where synapses have delays, "
            "simulation.dt longer"
        ) from None
    if interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command(short_help="Draw a result; print a table of its populations.")
@tools.for_users
def plot(
    result: Annotated[Path, typer.Argument(help="A result: the folder of a run, a .zarr group or an .npz file.")],
    out: Annotated[
        Path | None, typer.Option(help="PNG, PDF, SVG or HTML file; plot.png or plot.html beside the result by default.")
    ] = None,
    html: Annotated[
        bool, typer.Option("--html", help="Write a page with a raster to zoom into, which needs no network.")
    ] = False,
    start: Annotated[float | None, typer.Option(help="Where the panels over time begin, in ms.")] = None,
    stop: Annotated[float | None, typer.Option(help="Where they end, in ms.")] = None,
) -> int:
    """Draw a result: raster, rates, membrane potential, intervals between spikes, and a table of the populations.

    The table and the intervals are of the whole run, also with --start and --stop.
    """
    require("plot", "matplotlib", "numcodecs", "pint", "pydantic", "xxhash")
    with tools.imports():
        from . import report

    path, table = report.plot(result, out, start, stop, html)
    say(table, f"Wrote {path}")
    return 0


for _name, (_command, _short) in tools.COMMANDS.items():
    app.command(_name, short_help=_short)(_command)


def _list_builtins() -> None:
    with tools.imports():
        from .config import builtin_folder, builtins, describe

    table = Table.grid(padding=(0, 2))
    for name in builtins():
        table.add_row(name, describe(name))
    say(table, f"To make your own, copy one from {builtin_folder()}; simulate --keys lists what may stand in it.")


def _simulate(name: str, changes: list[str], out: Path, resume: bool, form: Form, keep_going: bool, wait: float) -> bool:
    """Run a configuration and write the results; returns whether Ctrl-C ended it."""
    with tools.imports():
        from . import job, report
        from .config import load
        from .inputs import open_source
        from .part import Part
        from .weights import open_recurrent

    name, config = load(name, changes)
    with ExitStack() as stack:
        part = stack.enter_context(Part.joined(config.neuron.count, wait))
        if part is not None and form is Form.npz:
            raise UserError("several processes cannot write one .npz; leave out --format npz")
        first = part is None or part.ranks.rank == 0
        if part is not None and first:
            say(f"{part.ranks.ranks} processes share the {config.neuron.count:,} neurons, at most {part.ranks.share:,} each")
        if first:
            stack.enter_context(report.own_folder(out))
        try:
            source, recurrent = open_source(config), open_recurrent(config, part)
        except (OverflowError, ValueError) as error:  # a number has the right sign and unit, but is too large
            raise UserError(f"{name}: {error}") from None
        sink = report.make_sink(out / f"result.{form.value}", name, config, source, resume or not first)
        with _warnings_in_one_line():
            run = job.run(config, source, recurrent, sink, resume, keep_going, part)
        if not first:
            return False
        if not run.result.steps:
            _say("Interrupted before the first block of steps was finished.")
            return True
        summary = report.write(out, name, config, source, recurrent, run)
        _print_summary(summary)
        say(f"Wrote {sink.path.name if sink.path else ''}, {' and '.join(report.FILES)} to {out}")
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
    if summary["compile_s"]:
        rows.append(("compiling", f"{summary['compile_s']:.1f} s besides, once: the code is kept for later runs"))
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    say(table)
