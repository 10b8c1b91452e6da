"""Write the files beside a run's result (``result.zarr`` or ``result.npz``): ``raster.png`` and ``summary.json``.

Each file appears whole or not at all. ``summary.json`` is written last, so a folder that has it has all files. Both are
removed just before the result that they tell of is replaced, and before a resumed run goes on with it.

The arrays of a result are described in :mod:`coba_triton.stream.sinks`. If a recording drives the run, the result also has
``signal [T]``, its values at the beginnings of the steps, and ``events [T, 2]``, the encoder's ON and OFF events.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

import coba_triton
from coba_triton import NpzSink, Result, ZarrSink, open_result
from coba_triton.common.files import held, is_there, local_path, reason, written_whole
from coba_triton.common.versions import package_version
from coba_triton.stream.plotting import overview, statistics_cells, statistics_note
from coba_triton.stream.sinks import Sink, check_replaceable, replaced

from .config import Config
from .errors import UserError
from .inputs import RecordingSource, Source
from .job import Run
from .weights import Recurrent, count_synapses

FILES = ("raster.png", "summary.json")
RESULTS = ("result.zarr", "result.npz")
PICTURES = (".png", ".pdf", ".svg")


def _local(path: Path) -> Path:
    try:
        return local_path(path, "a result")
    except ValueError as error:
        raise UserError(str(error)) from None


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make the output folder; within the block, no other command writes to it.

    Raises:
        UserError: if it cannot be made or written to, or if another command writes to it.
    """
    with ExitStack() as stack:
        try:
            _local(folder).mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder / FILES[-1]))
        except BlockingIOError:
            raise UserError(f"another command is writing to {folder}; wait for its end, or give another --out") from None
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {reason(error)}; give another folder with --out") from None
        yield


def make_sink(path: Path, name: str, config: Config, source: Source, resume: bool) -> Sink:
    """The sink for a run's result. It replaces an earlier result, also one of the other format, unless the run is resumed.

    Raises:
        UserError: if there is something in the place of the other format that is no result.
    """
    recording = source.encoded if isinstance(source, RecordingSource) else None
    settings = config.model_dump(mode="json")
    del settings["simulation"]["duration"]  # the result has its number of steps, and a resumed run may be longer
    attributes: dict[str, Any] = {"configuration": name, "settings": settings, "recording": None}
    arrays: dict[str, Any] = {}
    if recording is not None:
        facts = {"unit": recording.unit, "threshold": recording.threshold, "provenance": recording.provenance}
        attributes["recording"] = facts
        arrays = {"signal": recording.values, "events": recording.events}
    kind = NpzSink if path.suffix == ".npz" else ZarrSink
    sink: Sink = kind(path, overwrite=True, attributes=attributes, arrays=arrays)
    other = next(path.with_name(result) for result in RESULTS if result != path.name)
    if resume or not os.path.lexists(other):
        sink.changing = functools.partial(_changing, path.parent, None)
        return sink
    try:
        check_replaceable(other)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path.name} takes the place of {other}, which cannot be replaced ({error}); move that away, or give another "
            "--out"
        ) from None
    sink.changing = functools.partial(_changing, path.parent, other)
    return sink


@contextmanager
def _changing(folder: Path, other: Path | None) -> Iterator[None]:
    """Make room for a result that appears or goes on within the block.

    The picture and the summary, which tell of what was there before, are removed, and so is an earlier result of the other
    format. After an error, that result is back.
    """
    with ExitStack() as stack:
        if other is not None:
            stack.enter_context(held(other))
        for file in reversed(FILES):
            try:
                (folder / file).unlink(missing_ok=True)
            except OSError as error:
                raise UserError(
                    f"cannot remove {folder / file}, as of an earlier run: {reason(error)}; move it, or give another --out"
                ) from None
        if other is not None:
            stack.enter_context(replaced(other))
        yield


def title(result: Result) -> str | None:
    """The title for a result: name and description of its configuration; None if it was made without one."""
    attributes = result.attributes["config"]["attributes"]
    if "configuration" not in attributes:
        return None
    description = attributes["settings"]["description"]
    return f"{attributes['configuration']}: {description}" if description else str(attributes["configuration"])


def write(folder: Path, name: str, config: Config, source: Source, recurrent: Recurrent | None, run: Run) -> dict[str, Any]:
    """Write a run's picture and summary, which replace those of an earlier run.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserError: if a file cannot be written.
    """
    summary = summarize(name, config, source, recurrent, run)
    raster, summary_file = (folder / file for file in FILES)
    with _writable(folder):
        summary_file.unlink(missing_ok=True)
        with written_whole(raster) as part:
            overview(run.result, title=title(run.result), statistics=False).savefig(part, format="png")
        with written_whole(summary_file) as part:
            part.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return summary


def plot(path: Path, out: Path | None, start: float | None, stop: float | None, as_page: bool) -> tuple[Path, Table]:
    """Draw a result to a file, a picture or a page; returns the file's path and the table of the populations.

    Raises:
        UserError: if there is no such result, it has no spikes or steps, or the file cannot be written.
    """
    as_page = as_page or (out is not None and out.suffix == ".html")
    if as_page and importlib.util.find_spec("plotly") is None:
        raise UserError('plot --html needs plotly; run: pip install "coba-triton[html]"')
    if os.path.isdir(_local(path)):
        path = next((path / name for name in RESULTS if is_there(path / name)), path)
    out = _local(out or path.parent / ("plot.html" if as_page else "plot.png"))
    suffixes = (".html",) if as_page else (*PICTURES, ".html")
    if out.suffix not in suffixes:
        raise UserError(f"--out must end in {', '.join(suffixes)}{' with --html' if as_page else ''}, got {str(out)!r}")
    try:
        result = open_result(path)
        if as_page:
            from coba_triton.stream.page import page

            text = page(result, title=title(result), start=start, stop=stop)
        else:
            figure = overview(result, title=title(result), start=start, stop=stop)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    with _writable(out.parent), written_whole(out) as part:
        if as_page:
            part.write_text(text, encoding="utf-8")
        else:
            figure.savefig(part, format=out.suffix[1:])
    head, *rows = statistics_cells(result)
    table = Table(*head, caption=f"{statistics_note(result)}. All of the whole run.", caption_justify="left")
    for row in rows:
        table.add_row(*row)
    return out, table


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Within the block, an error while a file is written becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {reason(error)}; make room or choose another folder") from None


def _mean_variation(variation: NDArray[np.float64]) -> dict[str, Any]:
    known = variation[np.isfinite(variation)]
    return {"mean": float(known.mean()) if known.size else None, "neurons": known.size}


def summarize(name: str, config: Config, source: Source, recurrent: Recurrent | None, run: Run) -> dict[str, Any]:
    """The content of ``summary.json``. Rates are in Hz; times are in s if their names have no other unit."""
    result = run.result
    rates, variation = result.firing_rates(), result.intervals().cv
    settings = config.model_dump(mode="json")
    return {
        "configuration": name,
        "interrupted": not result.finished,
        "T": config.simulation.steps,
        "steps_done": result.steps,
        "N": config.neuron.count,
        "dt_ms": config.simulation.dt,
        "simulated_s": result.duration / 1000,
        "spikes": int(result.spike_counts().sum()),
        "rates_hz": {
            "mean": float(rates.mean()),
            "min": float(rates.min()),
            "max": float(rates.max()),
            "fraction_silent": float((rates == 0).mean()),
        },
        "interval_cv": _mean_variation(variation),
        "recurrent": recurrent
        and {
            "synapses": recurrent.count,
            "input_synapses": count_synapses(source.weights),
            **recurrent.provenance,
            "populations": {
                population: {
                    "neurons": int(members.sum()),
                    "rate_hz": float(rates[members].mean()),
                    "interval_cv": _mean_variation(variation[members]),
                }
                for population, members in recurrent.populations().items()
            },
        },
        "wall_time_s": run.wall_time,
        "compile_s": run.compile_time,
        "steps_per_s": run.steps / run.wall_time,
        "backend": {"asked": config.simulation.backend, "used": run.backend, "device": run.device},
        "seeds": _seeds(settings),
        "recording": source.encoded.provenance if isinstance(source, RecordingSource) else None,
        "versions": {
            "coba_triton": coba_triton.__version__,
            "python": platform.python_version(),
            **{package: package_version(package) for package in ("torch", "numpy", "triton")},
        },
        "platform": platform.platform(),
        "config": settings,
    }


def _seeds(settings: dict[str, Any], prefix: str = "") -> dict[str, int]:
    """Every seed in a configuration, by its key."""
    seeds = {}
    for key, value in settings.items():
        if key == "seed":
            seeds[prefix + key] = value
        elif isinstance(value, dict):
            seeds |= _seeds(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            tables = {str(number): item for number, item in enumerate(value) if isinstance(item, dict)}
            seeds |= _seeds(tables, f"{prefix}{key}.")
    return seeds
