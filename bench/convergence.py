"""Compare the explicit Euler step with accurate solutions, for smaller and smaller time steps: its error is of order dt.

    pip install brian2
    python bench/convergence.py --out convergence.png

Unconnected neurons get the same spikes in all runs, on a grid of times that is a multiple of every time step. This package
runs in float64 with dt, dt / 2, dt / 4 and so on. Brian2 integrates the same equations with Runge-Kutta of order 4 and a far
smaller step. ``tests/bench/test_convergence.py`` checks the order of the error: against Brian2 if it is installed, always
against :func:`solve`, which needs no simulator.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from coba_triton import CobaLIFParameters, coba_lif_feed_forward_integral
from coba_triton.stream.plotting import OTHER, OURS

Array = NDArray[np.float64]

GRID = 0.4  # ms between the times at which spikes may arrive and potentials are compared
STEPS = tuple(GRID / 2**k for k in range(2, 8))  # ms, the time steps compared
FIRST = 6  # the times of so many spikes of each neuron are compared
EXCITATORY, INHIBITORY = 0.001, 0.002  # uS
SUBSTEPS = 8  # steps of solve() in GRID
SUBTHRESHOLD = CobaLIFParameters(1 / 5, 1 / 10, 1 / 0.2, 0.01, -80.0, 0.0, -60.0, -60.0, v_thresh=1e6)
SPIKING = SUBTHRESHOLD._replace(v_thresh=-50.0)


class Solution(NamedTuple):
    """A solution of the equations.

    Attributes:
        v: potentials at the times GRID, 2 GRID, ... in mV, ``[T, N]``.
        spikes: the times of the spikes in ms, for each neuron.
    """

    v: Array
    spikes: list[Array]


def drive(steps: int = 150, neurons: int = 64) -> Array:
    """Weights in uS of the spikes that arrive at ``0, GRID, 2 GRID, ...``, ``[T, N]``; negative weights are inhibitory.

    The drive moves the potentials quickly across the threshold. If a potential only touched it, the smallest error
    would decide whether the neuron fires.
    """
    kind = np.random.default_rng(1).random((steps, neurons))
    return EXCITATORY * (kind < 0.9) - INHIBITORY * (kind >= 0.9)


def euler(x: Array, p: CobaLIFParameters, dt: float) -> Solution:
    """This package's solution. A spike has the time at the end of its step."""
    every = round(GRID / dt)
    fine = np.zeros((len(x) * every, x.shape[1]))
    fine[::every] = x
    z, states = coba_lif_feed_forward_integral(torch.from_numpy(fine), None, p, dt, record_states=True)
    return Solution(states.v[every - 1 :: every].numpy(), [dt * (1 + np.flatnonzero(row)) for row in z.numpy().T])


def solve(x: Array, p: CobaLIFParameters) -> Solution:
    """Runge-Kutta of order 4 for the potentials, exact exponentials for the conductances, and bisection for the spikes."""
    decay = np.array([p.tau_syn_exc_inv, p.tau_syn_inh_inv])[:, None]
    reversal = np.array([p.e_rev_E, p.e_rev_I])[:, None]

    def slope(v: Array | float, g: Array) -> Array:
        return p.c_m_inv * (p.g_l * (p.v_rest - v) + (g * (reversal - v)).sum(0))

    def advance(v: Array | float, g: Array, h: float) -> Array:
        """The potentials after ``h`` ms."""
        half, end = g * np.exp(-decay * h / 2), g * np.exp(-decay * h)
        k1 = slope(v, g)
        k2 = slope(v + h / 2 * k1, half)
        k3 = slope(v + h / 2 * k2, half)
        k4 = slope(v + h * k3, end)
        return v + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    neurons = x.shape[1]
    v, g = np.full(neurons, float(p.v_rest)), np.zeros((2, neurons))
    potentials: list[Array] = []
    spikes: list[list[float]] = [[] for _ in range(neurons)]
    h = GRID / SUBSTEPS
    for row, weights in enumerate(x):
        g = g + np.maximum([weights, -weights], 0)
        for substep in range(SUBSTEPS):
            after = advance(v, g, h)
            for n in np.flatnonzero(after > p.v_thresh):
                low, high = 0.0, h
                while low < (middle := (low + high) / 2) < high:
                    low, high = (low, middle) if advance(v[n], g[:, [n]], middle) > p.v_thresh else (middle, high)
                after[n] = advance(p.v_reset, g[:, [n]] * np.exp(-decay * high), h - high).item()
                spikes[n].append(row * GRID + substep * h + high)
            v, g = after, g * np.exp(-decay * h)
        potentials.append(v)
    return Solution(np.array(potentials), [np.array(times) for times in spikes])


def brian2(x: Array, p: CobaLIFParameters, dt: float) -> Solution:
    """Brian2's Runge-Kutta of order 4. Brian2 also fires and resets only at the ends of its steps."""
    import brian2 as b

    b.prefs.codegen.target = "numpy"  # compiles nothing
    b.start_scope()
    b.defaultclock.dt = dt * b.ms
    equations = """
    dv/dt = (leak * (rest - v) + g_e * (reversal_e - v) + g_i * (reversal_i - v)) * per_capacitance : volt
    dg_e/dt = -g_e * decay_e : siemens
    dg_i/dt = -g_i * decay_i : siemens
    """
    constants = dict(
        leak=p.g_l * b.uS, rest=p.v_rest * b.mV, reversal_e=p.e_rev_E * b.mV, reversal_i=p.e_rev_I * b.mV,
        per_capacitance=p.c_m_inv / b.nF, decay_e=p.tau_syn_exc_inv / b.ms, decay_i=p.tau_syn_inh_inv / b.ms,
        threshold=p.v_thresh * b.mV, after_spike=p.v_reset * b.mV,
    )  # fmt: skip
    cells = b.NeuronGroup(
        x.shape[1], equations, threshold="v > threshold", reset="v = after_spike", method="rk4", namespace=constants
    )
    cells.v = p.v_rest * b.mV
    parts = [cells]
    for target, weight, arrives in (("g_e", EXCITATORY, x > 0), ("g_i", INHIBITORY, x < 0)):
        rows, neurons = np.nonzero(arrives)
        # Brian2 delivers a spike at the end of the step in which it is sent; spikes at time 0 are put into the initial state
        later = rows > 0
        getattr(cells, target)[neurons[~later]] = weight * b.uS
        sent = b.SpikeGeneratorGroup(x.shape[1], neurons[later], rows[later] * GRID * b.ms - dt * b.ms)
        synapses = b.Synapses(sent, cells, on_pre=f"{target} += jump", namespace={"jump": weight * b.uS})
        synapses.connect(j="i")
        parts += [sent, synapses]
    # samples are taken at the beginnings of steps, so there is one more at the end
    potentials = b.StateMonitor(cells, "v", record=True, dt=GRID * b.ms)
    fired = b.SpikeMonitor(cells)
    b.Network(*parts, potentials, fired).run((len(x) * GRID + dt) * b.ms)
    trains = fired.spike_trains()
    return Solution(np.array(potentials.v / b.mV).T[1:], [np.array(trains[i] / b.ms) + dt for i in range(x.shape[1])])


def voltage_error(got: Solution, want: Solution) -> float:
    """The largest over neurons and times, in mV."""
    return float(abs(got.v - want.v).max())


def spike_error(got: Solution, want: Solution) -> float:
    """The mean over the first spikes of all neurons, in ms."""
    return float(np.mean([abs(a[:FIRST] - b[:FIRST]) for a, b in zip(got.spikes, want.spikes, strict=True)]))


def errors(x: Array, p: CobaLIFParameters, want: Solution, error: Callable[[Solution, Solution], float]) -> list[float]:
    """Of this package, for each of ``STEPS``."""
    return [error(euler(x, p, dt), want) for dt in STEPS]


def order(errors: list[float]) -> float:
    """The exponent of dt in the error: the slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(STEPS), np.log(errors), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("convergence.png"), help="the picture (%(default)s)")
    out = parser.parse_args().out
    x = drive()
    figure = Figure((9, 4.2), 120, layout="constrained")
    potentials, spikes = brian2(x, SUBTHRESHOLD, GRID / 64), brian2(x, SPIKING, STEPS[-1] / 8)
    plans = [
        ("largest error of a potential", "mV", SUBTHRESHOLD, potentials, voltage_error),
        (f"mean error of the first {FIRST} spikes' times", "ms", SPIKING, spikes, spike_error),
    ]
    for panel, (title, unit, p, want, error) in zip(figure.subplots(1, 2), plans, strict=True):
        found = errors(x, p, want, error)
        panel.loglog(STEPS, found[0] * np.array(STEPS) / STEPS[0], color=OTHER, label="slope 1")
        panel.loglog(STEPS, found, "o", color=OURS, label="coba_triton")
        panel.set(xlabel="time step dt (ms)", ylabel=f"error ({unit})")
        panel.set_title(f"{title}: slope {order(found):.2f}", fontsize=10)
        panel.set_xticks(STEPS, [f"{dt:g}" for dt in STEPS], rotation=30)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, loc="upper left")
        print(f"{title}, {unit}: " + ", ".join(f"dt {dt:g}: {value:.3g}" for dt, value in zip(STEPS, found, strict=True)))
        print(f"  order {order(found):.3f}; {error(solve(x, p), want):.1e} between Brian2 and solve()")
    figure.suptitle(
        f"Euler steps in float64 beside Brian2 {version('brian2')} (Runge-Kutta), {x.shape[1]} neurons, {GRID * len(x):g} ms"
    )
    figure.savefig(out)
    print(f"Wrote {out}")


if __name__ == "__main__":
    main()
