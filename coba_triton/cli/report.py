"""What a run leaves behind: ``spikes.npz``, ``traces.npz``, ``raster.png`` and ``summary.json``.

Every file appears whole or not at all, ``summary.json`` last: a folder that has it has all of them.

``spikes.npz`` lists the spikes: ``step`` and ``neuron`` ``[S]``, in order, and the sizes ``T`` and ``N`` and
``dt_ms``. A spike of step k comes at the step's end, ``(k + 1) * dt_ms``. To get the dense array::

    with numpy.load("spikes.npz") as file:
        spikes = numpy.zeros((file["T"], file["N"]), dtype=bool)
        spikes[file["step"], file["neuron"]] = True

``traces.npz`` has a row for the end of every step: ``v`` (mV), ``g_e``, ``g_i`` (uS) ``[T, K]``, as far as
recorded, of the neurons ``neuron`` ``[K]``; ``input_e`` and ``input_i`` ``[T]``, the conductance in uS that
the input, recurrent synapses apart, added in the step, mean over the population; ``dt_ms``; and of a recording
its ``signal`` ``[T]``, at the steps' beginnings, and the encoder's ``events`` ``[T, 2]`` (ON, OFF).
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import coba_triton

from .config import Config, UserError
from .figure import draw
from .inputs import RecordingSource, Source
from .job import Block, Run
from .weights import Recurrent

MIN_INTERVALS = 4  # a CV of fewer says little
FILES = ("spikes.npz", "traces.npz", "raster.png", "summary.json")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``: takes its place when the block ends well, goes away otherwise."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def prepare_folder(folder: Path) -> None:
    """Make the output folder.

    Raises:
        UserError: if it cannot be made or written to.
    """
    probe = folder / f".{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; give another folder with --out") from None


def write(folder: Path, name: str, config: Config, source: Source, recurrent: Recurrent | None, run: Run) -> dict[str, Any]:
    """Write a run's files, which replace those of an earlier run.

    Returns:
        What ``summary.json`` says.

    Raises:
        UserError: if a file cannot be written.
    """
    finished = run.joined()
    summary = summarize(name, config, source, recurrent, run, finished)
    dt = config.simulation.dt
    encoded = source.encoded if isinstance(source, RecordingSource) else None
    traces: dict[str, Any] = {
        **finished.traces,
        "neuron": np.asarray(config.record.neurons, dtype=np.int32),
        "dt_ms": dt,
        "input_e": finished.input_e,
        "input_i": finished.input_i,
    }
    if encoded is not None:
        traces |= {"signal": encoded.values[: finished.steps], "events": encoded.events[: finished.steps]}
    spikes, trace_file, raster, summary_file = (folder / file for file in FILES)
    try:
        summary_file.unlink(missing_ok=True)
        with written_whole(spikes) as part, part.open("wb") as file:
            np.savez_compressed(
                file,
                step=finished.spike_steps,
                neuron=finished.spike_neurons,
                T=finished.steps,
                N=config.neuron.count,
                dt_ms=dt,
            )
        with written_whole(trace_file) as part, part.open("wb") as file:
            np.savez_compressed(file, **traces)
        with written_whole(raster) as part:
            draw(name, config, finished, encoded, recurrent).savefig(part, format="png")
        with written_whole(summary_file) as part:
            part.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; make room or choose another folder") from None
    return summary


def interval_variation(finished: Block, neurons: int) -> NDArray[np.float64]:
    """Coefficient of variation of the intervals between a neuron's spikes: 0 if regular, 1 of a Poisson process.

    Returns:
        ``[N]``, NaN for a neuron with fewer than :data:`MIN_INTERVALS` intervals.
    """
    order = np.lexsort((finished.spike_steps, finished.spike_neurons))
    neuron = finished.spike_neurons[order]
    within = neuron[1:] == neuron[:-1]
    intervals = np.diff(finished.spike_steps[order])[within].astype(np.float64)
    owner = neuron[1:][within]
    count = np.bincount(owner, minlength=neurons)
    enough = np.where(count >= MIN_INTERVALS, count, np.nan)
    mean = np.bincount(owner, intervals, minlength=neurons) / enough
    variance = np.bincount(owner, (intervals - mean[owner]) ** 2, minlength=neurons) / enough
    variation: NDArray[np.float64] = np.sqrt(variance) / mean
    return variation


def _mean_variation(variation: NDArray[np.float64]) -> dict[str, Any]:
    known = variation[np.isfinite(variation)]
    return {"mean": float(known.mean()) if known.size else None, "neurons": known.size}


def summarize(
    name: str, config: Config, source: Source, recurrent: Recurrent | None, run: Run, finished: Block
) -> dict[str, Any]:
    """What ``summary.json`` says; rates are in Hz, times in s unless named otherwise."""
    neurons, dt = config.neuron.count, config.simulation.dt
    simulated = finished.steps * dt / 1000
    rates = np.bincount(finished.spike_neurons, minlength=neurons) / simulated
    variation = interval_variation(finished, neurons)
    settings = config.model_dump(mode="json")
    return {
        "configuration": name,
        "interrupted": run.interrupted,
        "T": config.simulation.steps,
        "steps_done": finished.steps,
        "N": neurons,
        "dt_ms": dt,
        "simulated_s": simulated,
        "spikes": len(finished.spike_steps),
        "rates_hz": {
            "mean": float(rates.mean()),
            "min": float(rates.min()),
            "max": float(rates.max()),
            "fraction_silent": float((rates == 0).mean()),
        },
        "interval_cv": _mean_variation(variation),
        "recurrent": recurrent
        and {
            "synapses": recurrent.synapses,
            "input_synapses": int(np.count_nonzero(source.weights)),
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
        "steps_per_s": finished.steps / run.wall_time,
        "backend": {"asked": config.simulation.backend, "used": run.backend, "device": run.device},
        "seeds": _seeds(settings),
        "recording": source.encoded.provenance if isinstance(source, RecordingSource) else None,
        "versions": {
            "coba_triton": coba_triton.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in ("torch", "numpy", "triton")},
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
    return seeds


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
