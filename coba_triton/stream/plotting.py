"""Pictures of results: functions that draw one panel each, and an overview with all panels.

Every function takes a :class:`coba_triton.Result` and an ``Axes`` of matplotlib. It draws the time from ``start`` to
``stop`` in ms; None means the beginning and the end of the run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        'pictures need the package matplotlib, which is not installed; run: pip install "coba-triton[cli]"',
        name="matplotlib",
    ) from None

from ..ops.validation import check_int, check_neurons, check_time, is_one_of
from .results import Result

MAX_EVENTS = 100_000  # spikes in a raster; more would give a black area and a slow file
MAX_POINTS = 4000  # points of a trace; each piece of the trace has two
MAX_BINS = 250

EXCITATORY, INHIBITORY, NEUTRAL = "#c0392b", "#2c6fbb", "#222222"
# this package in comparisons, a second curve of it, and what it is compared with
OURS, LIGHTER, OTHER = "#0f7b6c", "#66b8ac", "#8a8f98"
COLORS = {"excitatory": EXCITATORY, "inhibitory": INHIBITORY}
OTHERS = ["#2e7d5b", "#8e5ea2", "#c98a1b", "#5f6b73"]


def populations(result: Result) -> dict[str, NDArray[np.int64]]:
    """The recorded populations. If there are none, all neurons are one population with an empty name."""
    return result.populations or {"": np.arange(result.neurons)}


def color_of(name: str, number: int) -> str:
    return COLORS.get(name) or (OTHERS[number % len(OTHERS)] if name else NEUTRAL)


def _plain(text: str, most: int = 60) -> str:
    """A user's text so that it can be drawn: with printable characters only, and short enough for the picture."""
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _label(name: str) -> str | None:
    """A population's name for the legend. Matplotlib would leave out a label that begins with an underscore."""
    return _plain(f" {name}" if name.startswith("_") else name) or None


def _style(shown: dict[str, Any]) -> dict[str, Any]:
    """How to draw a histogram: filled if there is one population, as a line if there are several."""
    return {"fill": True, "alpha": 0.75} if len(shown) == 1 else {"baseline": None}


def _word_for_word(*texts: Text) -> None:
    """Draw texts as they are; a ``$`` does not begin a formula."""
    for text in texts:
        text.set_parse_math(False)
        text.set_usetex(False)


def window(result: Result, start: float | None, stop: float | None) -> tuple[int, int]:
    """The steps from one time to the other: the first step, and the one after the last."""
    times = (0.0 if start is None else start, result.duration if stop is None else stop)
    known = [isinstance(time, float | int | np.floating | np.integer) and abs(time) < 1e300 for time in times]
    steps = [float(time) / result.dt for time in times] if all(known) else [math.nan]
    if not (math.isfinite(sum(steps)) and 0 <= round(steps[0]) < round(steps[1]) <= result.steps):
        raise ValueError(
            f"start and stop must be times in ms from 0 to {result.duration:g}, start first, got {start!r:.50} "
            f"and {stop!r:.50}"
        )
    return round(steps[0]), round(steps[1])


def _legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[0]:
        legend = ax.legend(
            loc="lower right", bbox_to_anchor=(1, 0.97), ncols=4, frameon=False, fontsize=8, borderaxespad=0.1
        )
        _word_for_word(*legend.get_texts())


def plot_raster(
    result: Result, ax: Axes, *, start: float | None = None, stop: float | None = None, max_events: int = MAX_EVENTS
) -> None:
    """Draw a dot for each spike, at its neuron's index. With more than ``max_events`` spikes, only every k-th neuron."""
    max_events = check_int(max_events, "max_events")
    first, last = window(result, start, stop)
    total = sum(len(steps) for steps, _ in result.event_blocks(first, last))
    every = min(math.ceil(total / max_events), result.neurons) if total else 1
    blocks = [(s[n % every == 0], n[n % every == 0]) for s, n in result.event_blocks(first, last)]
    steps, neurons = (np.concatenate(column) for column in zip(*blocks, strict=True))
    shown = populations(result)
    size = float(np.clip(600 * every / result.neurons, 1.4 if len(shown) > 1 else 1, 5))
    for number, (name, members) in enumerate(shown.items()):
        spikes = np.isin(neurons, members)
        ax.plot(
            (steps[spikes] + 1) * result.dt,
            neurons[spikes],
            linestyle="none",
            marker=".",
            markersize=size,
            markeredgewidth=0,
            color=color_of(name, number),
        )
        if len(shown) > 1 and len(members):
            label = ax.annotate(
                _plain(name, 24),
                (1.0, float(np.mean(members))),
                (4, 0),
                xycoords=ax.get_yaxis_transform(),
                textcoords="offset points",
                rotation=270,
                va="center",
                fontsize=8,
                color=color_of(name, number),
            )
            _word_for_word(label)
    ax.set_ylim(-0.5, result.neurons - 0.5)
    ax.set_xlim(first * result.dt, last * result.dt)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel("neuron" if every == 1 else f"neuron (1 of {every} shown)")


def bin_width(duration: float, dt: float) -> float:
    """The shortest width for at most :data:`MAX_BINS` bins that is 1, 2 or 5 times a power of ten ms, in whole steps."""
    shortest = max(duration / MAX_BINS, dt)
    magnitude = 10.0 ** math.floor(math.log10(shortest))
    width = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= shortest * (1 - 1e-9))
    return max(round(width / dt), 1) * dt


def plot_rates(
    result: Result, ax: Axes, *, start: float | None = None, stop: float | None = None, bin_ms: float | None = None
) -> None:
    """Draw the mean rate of every population over time. ``bin_ms`` None chooses a round width, for 100 bins or more."""
    first, last = window(result, start, stop)
    width = bin_width((last - first) * result.dt, result.dt) if bin_ms is None else check_time(bin_ms, "bin_ms")
    shown = populations(result)
    for number, (name, members) in enumerate(shown.items()):
        edges, rates = result.rates(width, name if name else members)
        ax.stairs(rates, edges, color=color_of(name, number), label=_label(name), **_style(shown))
    ax.set_xlim(first * result.dt, last * result.dt)
    ax.set_ylim(bottom=0)
    ax.set_ylabel(f"population rate\n(Hz, {width:g} ms bins)")
    _legend(ax)


def extremes(values: NDArray[Any], points: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The smallest and the largest number in each of ``points / 2`` pieces, so that no peak is lost: indices and values."""
    if len(values) <= points:
        return np.arange(len(values)), values
    bounds = np.linspace(0, len(values), points // 2 + 1).astype(np.int64)
    pieces = [np.arange(a, b) for a, b in itertools.pairwise(bounds)]
    index = np.array([sorted((p[values[p].argmin()], p[values[p].argmax()])) for p in pieces]).ravel()
    return index, values[index]


def plot_traces(
    result: Result,
    ax: Axes,
    variable: str = "v",
    *,
    neurons: Any = None,
    start: float | None = None,
    stop: float | None = None,
) -> None:
    """Draw recorded traces of a variable. With ``v``, also draw the thresholds, and the spikes as lines above them.

    Args:
        result: a result in which the variable is recorded.
        ax: where to draw.
        variable: ``v``, ``g_e`` or ``g_i``.
        neurons: some of the recorded neurons, as indices or a mask of all neurons; None for the first three.
        start: begin of the panel in ms.
        stop: end of the panel in ms.

    Raises:
        ValueError: if the variable or a neuron was not recorded.
    """
    first, last = window(result, start, stop)
    chosen = result.recorded[:3] if neurons is None else check_neurons(neurons, result.neurons, "neurons")
    if not is_one_of(variable, result.traces) or not np.isin(chosen, result.recorded).all():
        raise ValueError(
            f"{variable!s:.50} of the neurons {chosen.tolist()} must be recorded, got "
            f"{', '.join(result.traces) or 'nothing'} of {result.recorded.tolist()}; choose among them"
        )
    begin = first // result.every  # row r is the end of step (r + 1) * every - 1
    values = result.traces[variable][begin : last // result.every]
    threshold = result.parameter("v_thresh")
    shades = [NEUTRAL, "#7f8c8d", "#b9a06b"]
    for number, neuron in enumerate(chosen):
        at, trace = extremes(values[:, list(result.recorded).index(neuron)], MAX_POINTS)
        color = shades[number % len(shades)]
        ax.plot((begin + at + 1) * result.every * result.dt, trace, color=color, linewidth=0.8, label=f"neuron {neuron}")
        if variable == "v" and "spikes" in result:
            times, _ = result.events(first, last, neurons=[neuron])
            height = 0.6 * max(float(threshold[neuron]) - float(values.min(initial=np.inf)), 1.0)
            ax.vlines(times, threshold[neuron], threshold[neuron] + height, color=color, linewidth=0.8)
    if variable == "v":
        for number, level in enumerate(np.unique(threshold[chosen])):
            label = f"threshold {level:g} mV" if len(np.unique(threshold[chosen])) == 1 else "thresholds"
            ax.axhline(level, color=OTHER, linestyle="--", linewidth=0.9, label=label if number == 0 else None)
    ax.set_xlim(first * result.dt, last * result.dt)
    ax.set_ylabel(f"{variable} ({result._unit(variable) or 'uS or nA'})")
    _legend(ax)


def plot_intervals(result: Result, ax: Axes) -> None:
    """Draw a histogram of the intervals between a neuron's spikes, for each population, over the whole run."""
    steps = np.unique(np.geomspace(1, max(result.steps, 2), 60).round())
    edges = (steps - 0.5) * result.dt  # intervals are whole numbers of steps
    shown = populations(result)
    found = np.zeros(len(edges) - 1, bool)
    for number, (name, members) in enumerate(shown.items()):
        counts = result.interval_counts(edges, members)
        share = counts / max(counts.sum(), 1) / np.diff(np.log10(edges))
        ax.stairs(share, edges, color=color_of(name, number), label=_label(name), **_style(shown))
        found |= counts > 0
    ax.set_xscale("log")
    if found.any():
        at = found.nonzero()[0]
        ax.set_xlim(edges[max(at[0] - 1, 0)], edges[at[-1] + 1])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("interval between spikes (ms)")
    ax.set_ylabel("density\n(per decade)")
    _legend(ax)


SAMPLE = 100  # neurons whose synchrony is measured


def _sample(result: Result) -> int:
    """How many neurons of each population stand for it in the synchrony, which grows with their number."""
    return min(SAMPLE, *(len(members) for members in populations(result).values()), result.neurons)


def statistics(result: Result) -> list[dict[str, Any]]:
    """The numbers that :func:`plot_statistics` shows, one row for each population; ``None`` if there are too few spikes.

    They are of the whole run. The synchrony (:meth:`Result.synchrony`) is that of as many neurons of every population,
    evenly spaced and 100 at most: that of a whole population would grow with its size.
    """
    rates, variation, sample = result.firing_rates(), result.intervals().cv, _sample(result)

    def known(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    rows = []
    for name, members in populations(result).items():
        regular = variation[members][np.isfinite(variation[members])]
        rows.append(
            {
                "population": name or "all",
                "neurons": len(members),
                "rate_hz": known(rates[members].mean()),
                "silent": float((rates[members] == 0).mean()),
                "interval_cv": known(regular.mean()) if regular.size else None,
                "synchrony": known(
                    result.synchrony(neurons=members[np.linspace(0, len(members) - 1, sample).round().astype(int)])
                    if sample
                    else math.nan
                ),
            }
        )
    return rows


def statistics_cells(result: Result) -> list[list[str]]:
    """The same as text: the names of the columns, and a row for each population."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "population": lambda row: _plain(row["population"], 24),
        "neurons": lambda row: f"{row['neurons']:,}",
        "rate": lambda row: _number(row["rate_hz"], ".1f", " Hz"),
        "silent": lambda row: f"{row['silent']:.0%}",
        "interval CV": lambda row: _number(row["interval_cv"], ".2f"),
        "synchrony": lambda row: _number(row["synchrony"], ".2f"),
    }
    return [list(columns), *([show(row) for show in columns.values()] for row in statistics(result))]


def statistics_note(result: Result) -> str:
    """What the synchrony is."""
    sample = _sample(result)
    return f"synchrony: variance / mean of the spikes of {sample} neurons in 3 ms, 1 if they are independent"


def plot_statistics(result: Result, ax: Axes) -> None:
    """Draw a table of the populations: rate, silent neurons, CV of the intervals, synchrony."""
    head, *cells = statistics_cells(result)
    ax.axis("off")
    table = ax.table(cells, colLabels=head, loc="center", cellLoc="center", edges="horizontal")
    _word_for_word(*(cell.get_text() for cell in table.get_celld().values()))
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    table.scale(1, 1.6)
    ax.set_title(statistics_note(result), fontsize=8, y=-0.02, va="top")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _input_varies(result: Result, first: int, last: int) -> bool:
    """Whether the mean input over time says more than two numbers would.

    Independent spikes of many sources have a mean that does not change, but for its noise. An input that only starts a
    network is over soon.
    """
    if _input_end(result) < first + 0.2 * (last - first):
        return False
    pieces = np.array_split(np.asarray(result.array("input_e")[first:last], np.float64), 20)
    means = np.array([piece.mean() for piece in pieces if piece.size])
    noise = np.array([piece.std() / math.sqrt(piece.size) for piece in pieces if piece.size])
    return bool(means.std() > 2 * noise.mean())


def _input_end(result: Result) -> int:
    """The step after the last one that has an input."""
    steps = [np.flatnonzero(result.array(name)[:]) for name in ("input_e", "input_i")]
    return max((int(found[-1]) + 1 for found in steps if found.size), default=0)


def plot_inputs(result: Result, ax: Axes, *, start: float | None = None, stop: float | None = None) -> None:
    """Draw the recorded mean input: excitatory upwards, inhibitory downwards."""
    first, last = window(result, start, stop)
    width = round(bin_width((last - first) * result.dt, result.dt) / result.dt)
    begins = np.arange(first, last, width)
    edges = np.append(begins, last)
    for name, sign, color, label in (("input_e", 1, EXCITATORY, "excitatory"), ("input_i", -1, INHIBITORY, "inhibitory")):
        values = result.array(name)[first:last].astype(np.float64)
        if values.any():
            means = np.add.reduceat(values, begins - first) / np.diff(edges)
            ax.stairs(sign * means * 1000 / result.dt, edges * result.dt, color=color, fill=True, alpha=0.8, label=label)
    ax.axhline(0, color=NEUTRAL, linewidth=0.6)
    ax.set_xlim(first * result.dt, last * result.dt)
    unit = {"uS": "nS", "nA": "pA"}.get(result._unit("g_e"), "nS or pA")
    ax.set_ylabel(f"mean input\n({unit} per ms)")
    _legend(ax)


def _plot_recording(result: Result, signal: Axes, events: Axes, first: int, last: int) -> None:
    """Draw the recording that drove the run, and the events that it was encoded into."""
    recording = result.attributes["config"]["attributes"]["recording"]
    unit = _plain(recording["unit"] or "")
    at, values = extremes(result.array("signal")[first:last], MAX_POINTS)
    signal.plot((first + at) * result.dt, values, color=NEUTRAL, linewidth=0.9)
    _word_for_word(signal.set_ylabel(f"recording\n({unit or 'no unit'})"))
    times = [(first + np.flatnonzero(channel)) * result.dt for channel in result.array("events")[first:last].T]
    events.eventplot(times, lineoffsets=[1, 0], linelengths=0.8, linewidths=0.6, colors=[EXCITATORY, INHIBITORY])
    events.set_yticks([1, 0], ["ON", "OFF"])
    _word_for_word(events.set_ylabel(f"events of\n{recording['threshold']:g} {unit}".rstrip(), fontsize=8))


def overview(
    result: Result,
    *,
    title: str | None = None,
    start: float | None = None,
    stop: float | None = None,
    statistics: bool = True,
) -> Figure:
    """Draw a whole result on one page: the input, a raster, the rates, a trace of v, and the statistics of the whole run.

    Args:
        result: a result in which the spikes are recorded.
        title: text above the panels; None for no title.
        start: begin of the panels over time, in ms.
        stop: end of these panels, in ms.
        statistics: whether to add the last row, a histogram of intervals and a table.

    Returns:
        A figure, 11 inches wide.

    Raises:
        ValueError: if the run has no finished step, or ``start`` and ``stop`` are not times of it.
    """
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title must be text or None, got {type(title).__name__}")
    first, last = window(result, start, stop)
    span: dict[str, Any] = {"start": start, "stop": stop}
    recorded = "signal" in result
    panels: list[tuple[float, Callable[[Axes], None] | None]] = []
    if recorded:
        panels += [(2.2, None), (0.6, None)]
    elif "input_e" in result and _input_varies(result, first, last):
        panels += [(1.5, lambda ax: plot_inputs(result, ax, **span))]
    panels += [(3.6, lambda ax: plot_raster(result, ax, **span)), (1.6, lambda ax: plot_rates(result, ax, **span))]
    if "v" in result.traces:
        panels += [(2.0, lambda ax: plot_traces(result, ax, neurons=result.recorded[:1], **span))]
    heights = [height for height, _ in panels]

    figure = Figure((11.0, 1.0 + 0.9 * sum(heights) + (2.4 if statistics else 0)), 120, layout="constrained")
    parts: Any = figure.subfigures(2, height_ratios=[sum(heights), 2.5]) if statistics else [figure]
    axes = parts[0].subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (_, draw) in zip(axes, panels, strict=True):
        if draw is not None:
            draw(ax)
    if recorded:
        _plot_recording(result, axes[0], axes[1], first, last)
    elif "input_e" in result and first < (end := _input_end(result)) < first + 0.2 * (last - first):
        axes[0].axvline(end * result.dt, color=NEUTRAL, linestyle=":", linewidth=1)
        axes[0].annotate("the input ends", (end * result.dt, 1.0), (3, 2), xycoords=axes[0].get_xaxis_transform(),
                         textcoords="offset points", fontsize=8)  # fmt: skip
    axes[-1].set_xlabel("time (ms)")
    if (last - first) * result.dt >= 2000:
        axes[-1].xaxis.set_major_formatter(lambda ms, _: f"{ms / 1000:g}")
        axes[-1].set_xlabel("time (s)")
    axes[-1].set_xlim(first * result.dt, last * result.dt)
    parts[0].align_ylabels(axes)
    if statistics:
        histogram, table = parts[1].subplots(1, 2, width_ratios=[1, 1.3])
        plot_intervals(result, histogram)
        plot_statistics(result, table)
        axes = [*axes, histogram]
        if (first, last) != (0, result.steps):
            histogram.set_title("whole run", loc="left", fontsize=9)
            table.set_title("whole run; " + statistics_note(result), fontsize=8, y=-0.02, va="top")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    title = _plain(title or "", 200)
    if title:
        cv = result.intervals().cv
        irregular = f", CV of intervals {np.nanmean(cv):.2f}" if np.isfinite(cv).any() else ""
        title += f"\n{result.neurons:,} neurons, {result.firing_rates().mean():.1f} Hz{irregular}"
    if not result.finished:
        title = f"{title}\n(stopped after {result.steps:,} steps)".strip()
    if title:
        _word_for_word(figure.suptitle(title, fontsize=12))
    return figure
