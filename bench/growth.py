"""Draw how the time of a sparse network grows with its neurons and with its synapses.

    python bench/growth.py --out growth.png

The model is that of Brette et al. (2007). The resting potential sets the rate at which every neuron fires, not the network:
the synapses are so weak that they move no potential far. A point is the median of three runs, one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from coba_triton import CobaLIFParameters, CobaLIFState, Synapses, coba_lif_integral
from coba_triton.stream.plotting import LIGHTER, NEUTRAL, OURS

P = CobaLIFParameters(
    tau_syn_exc_inv=1 / 5, tau_syn_inh_inv=1 / 10, c_m_inv=1 / 0.2, g_l=0.01, e_rev_E=0.0, e_rev_I=-80.0,
    v_reset=-60.0, v_thresh=-50.0, refractory=5.0,
)  # fmt: skip
DT = 0.1
ROUNDS = 3


def seconds_per_step(neurons: int, number: int, rest: float, steps: int) -> tuple[float, float]:
    """The median time of a step, and the rate in Hz; ``rest`` above the threshold makes neurons fire on their own."""
    synapses = Synapses.fixed_number(neurons, neurons, number, 1e-7, 1.5, seed=1, per="source")
    inputs = torch.zeros(neurons, 0)
    x = torch.zeros(steps, 1, 0)
    v = -60 + 10 * torch.rand(1, neurons, generator=torch.Generator().manual_seed(0))
    state: Any = CobaLIFState(0.0, v, 0.0, 0.0)
    times, rate = [], 0.0
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        words, state = coba_lif_integral(x, state, inputs, synapses, P._replace(v_rest=rest), DT, spike_dtype="bits")
        times.append((time.perf_counter() - begin) / steps)
        rate = sum(((words >> bit) & 1).sum().item() for bit in range(32)) / neurons / (steps * DT / 1000)
    return statistics.median(times[1:]), rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("growth.png"), help="the picture (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figure = Figure((12, 4.2), 120, layout="constrained")
    left, right = figure.subplots(1, 2)
    print(f"{'neurons':>10}{'synapses':>12}{'Hz':>8}{'us a step':>12}")

    def draw(panel: Any, cases: list[tuple[int, int]], pick: int, colour: str, rest: float) -> None:
        points = []
        for neurons, number in cases:
            seconds, rate = seconds_per_step(neurons, number, rest, max(64, min(2048, 2 * 10**7 // neurons) // 32 * 32))
            points.append(((neurons, number)[pick], seconds * 1e6))
            print(f"{neurons:10,}{neurons * number:12,}{rate:8.1f}{seconds * 1e6:12.1f}", flush=True)
        panel.loglog(*zip(*points, strict=True), "o-", color=colour, label=f"{rate:.0f} Hz")

    for rest, colour in ((-49.0, OURS), (-61.0, LIGHTER)):
        draw(left, [(n, 100) for n in (1000, 3000, 10_000, 30_000, 100_000, 300_000)], 0, colour, rest)
        draw(right, [(10_000, n) for n in (10, 30, 100, 300, 1000, 3000)], 1, colour, rest)
    left.set(xlabel="neurons, each with 100 synapses", ylabel="us a step of 0.1 ms")
    right.set(xlabel="synapses of each of 10,000 neurons")
    for panel in (left, right):
        panel.axhline(100, color=NEUTRAL, lw=0.8, ls="--", label="real time")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
