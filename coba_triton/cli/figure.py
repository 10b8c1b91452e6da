"""The figure of a run: input, raster, population rate and one membrane potential over a shared time axis."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .config import Config
from .inputs import Encoded
from .job import Block
from .weights import Recurrent

SIZE, DPI = (11.0, 9.0), 120  # inches, dots per inch

_BINS = 250  # at most so many bins over the run
_EXCITATORY, _INHIBITORY, _NEUTRAL = "#c0392b", "#2c6fbb", "#222222"
_COLORS = {"excitatory": _EXCITATORY, "inhibitory": _INHIBITORY}


def draw(name: str, config: Config, finished: Block, encoded: Encoded | None, recurrent: Recurrent | None = None) -> Figure:
    """Draw what a run has finished.

    Args:
        name: of the configuration, for the title.
        config: what was run.
        finished: what was kept of it.
        encoded: the recording that drove it, if one did.
        recurrent: the synapses among the neurons, if there are any.

    Returns:
        A figure of :data:`SIZE` inches.
    """
    dt = config.simulation.dt
    in_seconds = finished.steps * dt >= 1000
    step = dt / 1000 if in_seconds else dt  # of the time axis
    traced = "v" in finished.traces
    heights = [2.2, 0.5] if encoded else [1.2 if recurrent else 1.8]
    heights += [4.0 if recurrent else 3.4, 1.6, 2.2][: 3 if traced else 2]

    figure = Figure(SIZE, DPI, layout="constrained")
    axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)
    panels: list[Axes] = list(axes[:, 0])
    title = f"{name}: {config.description}" if config.description else name
    if finished.steps < config.simulation.steps:
        title += f"\n(stopped after {finished.steps:,} of {config.simulation.steps:,} steps)"
    figure.suptitle(title, fontsize=12)
    width = bin_steps(finished.steps, dt)
    rest = iter(panels)
    if encoded:
        _draw_signal(next(rest), encoded, finished.steps, step)
        _draw_events(next(rest), encoded, finished.steps, step)
    else:
        _draw_drive(next(rest), finished, width, dt, step)
    everyone = np.ones(config.neuron.count, dtype=bool)
    populations = recurrent.populations() if recurrent else {"": everyone}
    _draw_raster(next(rest), finished, populations, step)
    _draw_rate(next(rest), finished, populations, width, dt, step)
    if traced:
        _draw_potential(next(rest), config, finished, step)
    panels[-1].set_xlabel("time (s)" if in_seconds else "time (ms)")
    panels[-1].set_xlim(0, finished.steps * step)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels(panels)
    return figure


def bin_steps(steps: int, dt: float) -> int:
    """Steps per bin: 1, 2 or 5 times a power of ten ms, at most :data:`_BINS` bins, at least one step."""
    shortest = max(steps * dt / _BINS, dt)
    magnitude = 10.0 ** np.floor(np.log10(shortest))
    width = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= shortest * (1 - 1e-9))
    return max(round(float(width) / dt), 1)


def _binned(values: NDArray[np.generic], width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of ``values [T]`` over bins of ``width`` steps, the last one shorter, and the edges in steps."""
    starts = np.arange(0, len(values), width)
    edges = np.append(starts, len(values)).astype(np.float64)
    return np.add.reduceat(values.astype(np.float64), starts) / np.diff(edges), edges


def _legend(panel: Axes) -> None:
    panel.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=3, frameon=False, fontsize=8, borderaxespad=0.1)


def _draw_signal(panel: Axes, encoded: Encoded, steps: int, step: float) -> None:
    panel.plot(np.arange(steps) * step, encoded.values[:steps], color=_NEUTRAL, linewidth=0.9)
    panel.set_ylabel(f"recording\n({encoded.unit or 'no unit'})")


def _draw_events(panel: Axes, encoded: Encoded, steps: int, step: float) -> None:
    times = [np.flatnonzero(channel) * step for channel in encoded.events[:steps].T]
    colors = [_EXCITATORY, _INHIBITORY]
    panel.eventplot(times, lineoffsets=[1, 0], linelengths=0.8, linewidths=0.6, colors=colors)
    panel.set_yticks([1, 0], ["ON", "OFF"])
    panel.set_ylabel(f"events of\n{encoded.threshold:g} {encoded.unit or ''}".rstrip(), fontsize=8)


def _draw_drive(panel: Axes, finished: Block, width: int, dt: float, step: float) -> None:
    for values, sign, color, label in (
        (finished.input_e, 1, _EXCITATORY, "excitatory"),
        (finished.input_i, -1, _INHIBITORY, "inhibitory"),
    ):
        if not values.any():
            continue
        means, edges = _binned(values, width)
        panel.stairs(sign * means * 1000 / dt, edges * step, color=color, fill=True, alpha=0.8, label=label)
    panel.axhline(0, color=_NEUTRAL, linewidth=0.6)
    panel.set_ylabel("mean input\n(nS per ms)")
    if panel.get_legend_handles_labels()[0]:
        _legend(panel)


def _draw_raster(panel: Axes, finished: Block, populations: dict[str, NDArray[np.bool_]], step: float) -> None:
    neurons = len(next(iter(populations.values())))
    for name, members in populations.items():
        spikes = members[finished.spike_neurons]
        panel.plot(
            (finished.spike_steps[spikes] + 1) * step,
            finished.spike_neurons[spikes],
            linestyle="none",
            marker=".",
            markersize=float(np.clip(600 / neurons, 1.4 if len(populations) > 1 else 1, 5)),
            markeredgewidth=0,
            color=_COLORS.get(name, _NEUTRAL),
        )
    panel.set_ylim(-0.5, neurons - 0.5)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_ylabel("neuron")


def _draw_rate(
    panel: Axes, finished: Block, populations: dict[str, NDArray[np.bool_]], width: int, dt: float, step: float
) -> None:
    for name, members in populations.items():
        spikes = members[finished.spike_neurons]
        counts = np.bincount(finished.spike_steps[spikes], minlength=finished.steps)
        means, edges = _binned(counts, width)
        rate = means / members.sum() / dt * 1000
        color = _COLORS.get(name, _NEUTRAL)
        if len(populations) == 1:
            panel.stairs(rate, edges * step, color=color, label=name, fill=True, alpha=0.75)
        else:
            panel.stairs(rate, edges * step, color=color, label=name, baseline=None)
    panel.set_ylim(bottom=0)
    panel.set_ylabel(f"population rate\n(Hz, {width * dt:g} ms bins)")
    if any(populations):
        _legend(panel)


def _draw_potential(panel: Axes, config: Config, finished: Block, step: float) -> None:
    neuron, threshold = config.record.neurons[0], config.neuron.v_thresh
    v = finished.traces["v"][:, 0]
    spikes = finished.spike_steps[finished.spike_neurons == neuron]
    top = threshold + 0.6 * max(threshold - float(v.min()), 1.0)
    panel.plot(np.arange(1, finished.steps + 1) * step, v, color=_NEUTRAL, linewidth=0.8, label=f"neuron {neuron}")
    panel.vlines((spikes + 1) * step, threshold, top, color=_EXCITATORY, linewidth=0.8, label="its spikes")
    panel.axhline(threshold, color=_INHIBITORY, linestyle="--", linewidth=0.9, label=f"threshold {threshold:g} mV")
    panel.set_ylabel("v (mV)")
    _legend(panel)
