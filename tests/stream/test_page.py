"""The HTML page of a result: what is in it, and that a browser draws it without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="pictures need matplotlib")
pytest.importorskip("plotly", reason='pages need plotly: pip install "coba-triton[html]"')

from coba_triton import CobaLIF, MemorySink, Record, Result, simulate
from coba_triton.stream import page as pages
from coba_triton.stream.page import page


def result_of(steps: int = 200) -> Result:
    torch.manual_seed(0)
    x = (torch.rand(steps, 40) < 0.1).float()
    record = Record(neurons=[3, 1], populations={"a <b>": slice(0, 30), "c & d": slice(30, 40)})
    return simulate(CobaLIF(), x, sink=MemorySink(), record=record, progress=False)


def test_what_is_in_it() -> None:
    result = result_of()
    text = page(result, title="a run of <neurons>")
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>a run of &lt;neurons&gt;</title>" in text
    assert "a &lt;b&gt;" in text and "<b>" not in text.partition("</h1>")[0]
    assert f"<td>{result.firing_rates()[:30].mean():.1f} Hz</td>" in text
    assert "synchrony: variance / mean of the spikes of 10 neurons in 3 ms" in text
    outside = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="http[^"]*"', text)
    assert not outside


def test_too_many_spikes_are_thinned_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_EVENTS", 50)
    assert re.search(r"neuron \(1 of \d+ shown\)", page(result_of()))


def test_times_that_are_not_of_the_run() -> None:
    with pytest.raises(ValueError, match="start and stop must be times in ms from 0 to 200"):
        page(result_of(), start=100.0, stop=900.0)


@pytest.mark.slow
def test_a_browser_draws_it(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium here")
    (tmp_path / "run.html").write_text(page(result_of()), "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--virtual-time-budget=10000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    done = subprocess.run(
        [browser, *options, f"file://{tmp_path / 'run.html'}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert 'class="main-svg"' in done.stdout  # plotly has drawn
    assert "gl-canvas" in done.stdout  # the raster, which one can zoom into
    for label in ("time (ms)", "v (mV)", "rate (Hz", "neuron 3"):
        assert label in done.stdout
