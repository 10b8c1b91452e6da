"""What the pictures show, read back from their axes."""

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coba_triton import CobaLIF, Record, Result, simulate
from coba_triton.stream import plotting
from helpers.runs import NEURON, PER_NEURON, RECORD, T, drive


@pytest.fixture(scope="module")
def result() -> Result:
    return simulate(CobaLIF(NEURON, 0.1), drive(), record=RECORD, block_steps=96)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "coba_triton.stream.plotting")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pictures need the package matplotlib, .* pip install "coba-triton\[cli\]"'):
        importlib.import_module("coba_triton.stream.plotting")


def axes() -> Any:
    return Figure().subplots()


def dots(ax: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([line.get_xydata() for line in ax.lines])


def test_raster_has_every_spike(result: Result) -> None:
    alone = simulate(CobaLIF(NEURON, 0.1), drive(), record=Record())
    ax = axes()
    plotting.plot_raster(alone, ax)
    np.testing.assert_allclose(dots(ax), np.stack(alone.events(), 1))
    assert ax.get_xlim() == (0, 100)
    ax = axes()
    plotting.plot_raster(result, ax, start=20, stop=60)  # its populations share neurons and leave some out
    assert len(ax.lines) == 2
    assert (dots(ax)[:, 0] > 20).all() and (dots(ax)[:, 0] <= 60).all()


def test_raster_of_many_spikes_shows_every_kth_neuron(result: Result) -> None:
    alone = simulate(CobaLIF(NEURON, 0.1), drive(), record=Record())
    times, neurons = alone.events()
    ax = axes()
    plotting.plot_raster(alone, ax, max_events=len(times) // 3)
    shown = dots(ax)
    every = int(np.unique(shown[:, 1])[1])
    assert every in (3, 4)
    np.testing.assert_allclose(shown, np.stack([times, neurons], 1)[neurons % every == 0])
    assert ax.get_ylabel() == f"neuron (1 of {every} shown)"


def test_rates(result: Result) -> None:
    ax = axes()
    plotting.plot_rates(result, ax, bin_ms=5.0)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["first", "odd"]
    for patch, name in zip(ax.patches, names, strict=True):
        values = patch.get_data()
        np.testing.assert_allclose(values.values, result.rates(5.0, name)[1])
        np.testing.assert_allclose(values.edges, result.rates(5.0, name)[0])


@pytest.mark.parametrize(
    ("steps", "dt", "width"),
    [(25_000, 0.2, 100), (10_000, 0.1, 50), (1, 0.1, 1), (600, 0.1, 5), (100, 3.0, 2)],
)
def test_bins_are_round_numbers_of_ms(steps: int, dt: float, width: int) -> None:
    assert plotting.bin_width(steps * dt, dt) == pytest.approx(width * dt)


def test_traces_with_thresholds(result: Result) -> None:
    ax = axes()
    plotting.plot_traces(result, ax)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), result.traces["v"][:, 0])
    np.testing.assert_allclose(ax.lines[0].get_xdata(), np.arange(1, T + 1) * 0.1)
    assert ax.lines[-1].get_ydata()[0] == -50.0
    spikes = [segment[0][0] for segment in ax.collections[0].get_segments()]
    np.testing.assert_allclose(spikes, result.events(neurons=[7])[0])
    each = simulate(CobaLIF(PER_NEURON, 0.1), drive(), record=Record(neurons=[3, 12]))
    ax = axes()
    plotting.plot_traces(each, ax)
    assert isinstance(PER_NEURON.v_thresh, torch.Tensor)
    levels = [line.get_ydata()[0] for line in ax.lines[2:]]
    np.testing.assert_allclose(levels, PER_NEURON.v_thresh[[3, 12]])
    with pytest.raises(ValueError, match=r"v of the neurons \[5\] must be recorded, got v of \[3, 12\]; choose"):
        plotting.plot_traces(each, axes(), neurons=[5])


def test_traces_of_every_nth_step_stand_at_their_times() -> None:
    result = simulate(CobaLIF(NEURON, 0.1), drive(), record=Record(neurons=[7], every=10))
    ax = axes()
    plotting.plot_traces(result, ax, start=20, stop=60)
    np.testing.assert_allclose(ax.lines[0].get_xdata(), np.arange(21, 61))
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), result.traces["v"][20:60, 0])
    plotting.plot_traces(result, axes(), start=20.1, stop=20.5)  # between two of them


def test_long_traces_keep_their_peaks() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    at, shown = plotting.extremes(values, 1000)
    assert len(shown) == 1000
    assert (np.diff(at) >= 0).all()
    assert (shown.max(), shown.min()) == (values.max(), values.min())
    np.testing.assert_array_equal(values[at], shown)


def test_intervals_and_table(result: Result) -> None:
    ax = axes()
    plotting.plot_intervals(result, ax)
    density = ax.patches[0].get_data()
    assert (density.values * np.diff(np.log10(density.edges))).sum() == pytest.approx(1)
    ax = axes()
    plotting.plot_statistics(result, ax)
    cells = {key: cell.get_text().get_text() for key, cell in ax.tables[0].get_celld().items()}
    rows = plotting.statistics(result)
    assert [cells[1, column] for column in (0, 1)] == ["first", "5"]
    assert cells[2, 2] == f"{result.firing_rates()[1::2].mean():.1f} Hz"
    cv = result.intervals().cv[1::2]
    assert rows[1]["interval_cv"] == pytest.approx(np.nanmean(cv))
    each = len(result.populations["odd"]), len(result.populations["first"])
    few = result.populations["odd"][np.linspace(0, each[0] - 1, min(each)).round().astype(int)]
    assert cells[2, 5] == f"{result.synchrony(neurons=few):.2f}"


def test_synchrony_does_not_grow_with_the_population() -> None:
    """Two populations of the same neurons, one four times as large."""
    torch.manual_seed(0)
    common = (torch.rand(4000, 1) < 0.003).expand(4000, 500) & (torch.rand(4000, 500) < 0.3)
    x = 0.05 * (common | (torch.rand(4000, 500) < 0.001)).float()
    record = Record(populations={"small": slice(0, 100), "large": slice(100, 500)})
    rows = plotting.statistics(simulate(CobaLIF(NEURON, 0.1), x, record=record, progress=False))
    assert rows[0]["synchrony"] > 1.5
    assert rows[1]["synchrony"] == pytest.approx(rows[0]["synchrony"], rel=0.15)


def test_what_is_of_the_whole_run_says_so(result: Result) -> None:
    whole, part = (
        [ax.get_title() or ax.get_title("left") for ax in plotting.overview(result, stop=stop).findobj(Axes)]
        for stop in (None, result.duration / 2)
    )
    assert not [title for title in whole if "whole run" in title]
    assert len([title for title in part if title.startswith("whole run")]) == 2


@pytest.mark.parametrize(("kind", "shown"), [("steady", False), ("starts it", False), ("changes", True)])
def test_an_input_that_says_nothing_is_not_drawn(kind: str, shown: bool) -> None:
    torch.manual_seed(0)
    x = 0.01 * (torch.rand(2000, 50) < 0.1).float()
    x[200 if kind == "starts it" else 1000 if kind == "changes" else 2000 :] = 0
    result = simulate(CobaLIF(NEURON, 0.1), x, record=Record(inputs=True), progress=False)
    figure = plotting.overview(result)
    labels = [ax.get_ylabel() for ax in figure.findobj(Axes)]
    assert any("mean input" in label for label in labels) == shown
    texts = [text.get_text() for ax in figure.findobj(Axes) for text in ax.texts]
    assert ("the input ends" in texts) == (kind == "starts it")


def test_overview_of_a_silent_run() -> None:
    silent = simulate(CobaLIF(NEURON, 0.1), torch.zeros(T, 3), record=Record(neurons=[0], inputs=True))
    figure = plotting.overview(silent, title="nothing happens")
    assert figure.get_suptitle() == "nothing happens\n3 neurons, 0.0 Hz"
    assert plotting.statistics(silent)[0]["interval_cv"] is None


NAMES = ["$x_{", "_hidden", "\\frac{", "a\nb\tc", "\ud800", "50 % $$ {0} ^_", "L2/3", "x" * 5000]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_are_drawn_as_they_are(name: str, tmp_path: Path) -> None:
    """A dollar begins no formula, and none of a person's words keeps a result from being drawn."""
    record = Record(populations={name: range(5), "others": slice(5, None)}, neurons=[0])
    result = simulate(CobaLIF(NEURON, 0.1), drive(steps=320), record=record, progress=False)
    recording = {"unit": name, "threshold": 0.5}
    result.attributes["config"]["attributes"]["recording"] = recording
    result._arrays |= {"signal": np.arange(320.0), "events": np.ones((320, 2), np.int32)}
    figure = plotting.overview(result, title=name)
    for form in ("png", "svg", "pdf") if name in ("$x_{", "\ud800") else ("png",):
        figure.savefig(tmp_path / f"picture.{form}")
    legends = [ax.get_legend() for ax in figure.findobj(Axes)]
    shown = {text.get_text().strip() for legend in legends if legend for text in legend.get_texts()}
    if name.isprintable() and len(name) < 60:
        assert {name, "others"} <= shown and figure.get_suptitle().startswith(f"{name}\n20 neurons, ")
    else:
        assert "others" in shown and all(len(text) <= 61 for text in shown)


@pytest.mark.parametrize(("start", "stop"), [(math.nan, None), (None, math.inf), (-math.inf, 5.0), (-5.0, 5.0), (5.0, 5.0)])
def test_times_that_are_none(start: Any, stop: Any, result: Result) -> None:
    with pytest.raises(ValueError, match="start and stop must be times in ms from 0 to 100, start first, got"):
        plotting.overview(result, start=start, stop=stop)
