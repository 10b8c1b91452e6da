"""Draw how the time grows with the length, the number of neurons and the firing rate.

This package is compared with its reference, and with norse if it is installed.

    python bench/scaling.py --out scaling.png

All run in one process, in turns, on the same spikes. A point is the median of its times.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from coba_triton.stream.plotting import NEUTRAL, OTHER, OURS
from coba_triton.tools.contenders import contenders, time_interleaved
from coba_triton.tools.problems import Case, Problem, RecurrentProblem, recurrent_problem

ROUNDS = 5
NAMES = {
    "cpu": ("coba_triton, CPU path", OURS),
    "reference": ("its reference in PyTorch", NEUTRAL),
    "norse, unbind": ("norse, loop over time", OTHER),
}


def measure(case: Case, problem: Problem | RecurrentProblem) -> dict[str, float]:
    """The median seconds of each contender, after a check that its spikes are equal."""
    runs: dict[str, Callable[[], torch.Tensor]] = {
        rival.name: rival.run for rival in contenders(case, "cpu", problem) if rival.name in NAMES
    }
    expected = runs["reference"]()
    assert torch.equal(runs["cpu"](), expected), case.name
    seconds = time_interleaved(runs, ROUNDS, torch.device("cpu"))
    return {name: statistics.median(values) for name, values in seconds.items()}


def at_rate(rate: float) -> tuple[Case, RecurrentProblem]:
    """A recurrent population whose input makes it fire at about this rate, in spikes per neuron and step."""
    case = Case(f"rate-{rate:g}", "recurrent", 100, 16, 512)
    problem = recurrent_problem(case.steps, case.batch, case.neurons, inputs=case.neurons)
    # each neuron has one strong synapse from the input, and only this one can bring it to the threshold
    problem.input_weights = torch.eye(case.neurons) * 1024
    problem.recurrent_weights = torch.round(torch.randn(case.neurons, case.neurons)) / 2**18
    problem.x = (torch.rand(case.steps, case.batch, case.neurons) < rate).float()
    return case, problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scaling.png"), help="the picture (%(default)s)")
    out = parser.parse_args().out
    torch.manual_seed(0)
    figure = Figure((13, 4.2), 120, layout="constrained")
    panels = figure.subplots(1, 3)
    lengths = [Case(f"T-{steps}", "feed_forward", steps, 1, 1000) for steps in (10, 30, 100, 300, 1000, 3000)]
    sizes = [Case(f"N-{batch}", "feed_forward", 100, batch, 1024) for batch in (1, 4, 16, 64, 256)]
    rates = [at_rate(rate) for rate in (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5)]
    plans = [
        ("time steps T", "feed-forward, 1000 neurons", [(case.steps, case, case.build()) for case in lengths]),
        ("neurons in all batch rows", "feed-forward, 100 steps", [(c.batch * c.neurons, c, c.build()) for c in sizes]),
        ("spikes per neuron and step", "recurrent, 100 steps of 16 x 512", [(0.0, *pair) for pair in rates]),
    ]
    for panel, (label, title, points) in zip(panels, plans, strict=True):
        curves: dict[str, list[tuple[float, float]]] = {}
        for x, case, problem in points:
            x = x or float(problem.run("cpu")[0].mean())
            for name, seconds in measure(case, problem).items():
                curves.setdefault(name, []).append((x, 1e9 * seconds / case.neuron_steps))
        for name, curve in curves.items():
            panel.loglog(*zip(*curve, strict=True), ".-", color=NAMES[name][1], label=NAMES[name][0])
            print(f"{title}: {name}: " + ", ".join(f"{x:g}: {y:.2f} ns" for x, y in curve), flush=True)
        panel.set(xlabel=label, ylabel="ns for a neuron and step", title=title)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    others = "" if importlib.util.find_spec("norse") else "; norse is not installed"
    figure.suptitle(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {ROUNDS}{others}")
    figure.savefig(out)
    print(f"Wrote {out}")


if __name__ == "__main__":
    main()
