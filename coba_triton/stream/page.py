"""A result as one HTML page, drawn by plotly (``pip install "coba-triton[html]"``).

The page has everything in it and needs no network. One zooms into its panels with the mouse; they share the time.
"""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from .plotting import (
    MAX_POINTS,
    NEUTRAL,
    bin_width,
    color_of,
    extremes,
    populations,
    statistics_cells,
    statistics_note,
    window,
)
from .results import Result

MAX_EVENTS = 500_000  # spikes on a page; more would be slow

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 1em; color: #222222; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 0.3em 1em; text-align: right; border-bottom: 1px solid #cccccc; }}
</style>
</head>
<body>
<h1 style="font-size: 1.2em">{title}</h1>
{figure}
<table>
{rows}
</table>
<p>Statistics of the whole run. {note}</p>
</body>
</html>
"""


def page(result: Result, *, title: str | None = None, start: float | None = None, stop: float | None = None) -> str:
    """A page with the raster, the rates of the populations, the recorded traces of v, and the statistics.

    Args:
        result: a result in which the spikes are recorded.
        title: heading of the page; None for none.
        start: begin of what is drawn, in ms.
        stop: its end, in ms.

    Returns:
        The text of an HTML file.

    Raises:
        ValueError: if ``start`` and ``stop`` are not times of the run.
        ModuleNotFoundError: if plotly is not installed.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    first, last = window(result, start, stop)
    traced = "v" in result.traces
    heights = [3, 1, 1] if traced else [3, 1]
    figure = make_subplots(rows=len(heights), cols=1, shared_xaxes=True, vertical_spacing=0.04, row_heights=heights)
    total = sum(len(steps) for steps, _ in result.event_blocks(first, last))
    every = max(-(-total // MAX_EVENTS), 1)
    blocks = [(s[n % every == 0], n[n % every == 0]) for s, n in result.event_blocks(first, last)]
    steps, neurons = (np.concatenate(column) for column in zip(*blocks, strict=True))
    width = bin_width((last - first) * result.dt, result.dt)
    for number, (name, members) in enumerate(populations(result).items()):
        chosen, label = np.isin(neurons, members), html.escape(name or "all neurons")
        figure.add_trace(
            go.Scattergl(
                x=((steps[chosen] + 1) * result.dt).astype(np.float32),
                y=neurons[chosen].astype(np.int32),
                mode="markers",
                marker={"size": 2 if total > 20_000 else 4, "color": color_of(name, number)},
                name=label,
                hovertemplate="neuron %{y}, %{x} ms",
            ),
            row=1,
            col=1,
        )
        edges, rates = result.rates(width, name or members)
        shown = (edges[1:] > first * result.dt) & (edges[:-1] < last * result.dt)
        line: dict[str, Any] = {"color": color_of(name, number), "shape": "hv"}
        figure.add_trace(
            go.Scatter(x=edges[:-1][shown], y=rates[shown], mode="lines", line=line, name=f"rate of {label}"), row=2, col=1
        )
    if traced:
        begin = first // result.every
        values = result.traces["v"][begin : last // result.every]
        for column, neuron in enumerate(result.recorded[:3]):
            at, trace = extremes(values[:, column], 2 * MAX_POINTS)
            shade = {"color": (NEUTRAL, "#7f8c8d", "#b9a06b")[column]}
            times = (begin + at + 1) * result.every * result.dt
            figure.add_trace(
                go.Scattergl(
                    x=times,
                    y=trace,
                    mode="lines",
                    line=shade,
                    name=f"neuron {neuron}",
                    visible=None if column == 0 else "legendonly",
                ),
                row=3,
                col=1,
            )
        figure.update_yaxes(title_text="v (mV)", row=3, col=1)
    figure.update_yaxes(title_text="neuron" if every == 1 else f"neuron (1 of {every} shown)", row=1, col=1)
    figure.update_yaxes(title_text=f"rate (Hz, {width:g} ms bins)", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title_text="time (ms)", row=len(heights), col=1)
    figure.update_xaxes(range=[first * result.dt, last * result.dt])
    figure.update_layout(template="plotly_white", height=900, margin={"l": 70, "r": 20, "t": 20, "b": 50}, dragmode="zoom")
    head, *cells = statistics_cells(result)
    rows = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    rows += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells]
    drawn = figure.to_html(full_html=False, include_plotlyjs=True, config={"scrollZoom": True, "displaylogo": False})
    return _PAGE.format(
        title=html.escape(title or "coba_triton"),
        figure=drawn,
        rows="\n".join(rows),
        note=html.escape(statistics_note(result)),
    )
