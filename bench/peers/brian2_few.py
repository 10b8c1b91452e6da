"""Simulate few neurons without synapses between them over many steps in Brian2's C++ standalone mode; print one JSON line.

    python brian2_few.py 8 --steps 1000000

The neurons and the kind of input are those of ``bench/few_neurons.py``: Poisson events of both signs, made beforehand, which
Brian2 reads from memory. All numbers are float32, the method is forward Euler, and there is one thread. ``cpu`` are the
seconds of the processor that the whole compiled program took, the median of three runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import tempfile

import brian2 as b
import numpy as np

EQUATIONS = """
dv/dt = (0.01 * uS * (-65 * mV - v) + g_exc * (0 * mV - v) + g_inh * (-80 * mV - v)) / (0.2 * nF) : volt
dg_exc/dt = -g_exc / (5 * ms) : siemens
dg_inh/dt = -g_inh / (10 * ms) : siemens
"""
INPUT = """
x = inputs(t, i)
g_exc += clip(x, 0 * siemens, 1 * siemens)
g_inh += clip(-x, 0 * siemens, 1 * siemens)
"""
DT = 0.1 * b.ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("neurons", type=int)
    parser.add_argument("--steps", type=int, default=1_000_000)
    asked = parser.parse_args()
    b.set_device("cpp_standalone", build_on_run=False)
    b.prefs.core.default_float_dtype = np.float32
    b.defaultclock.dt = DT
    events = np.random.default_rng(0).random((2, asked.steps, asked.neurons)) < 0.05
    inputs = b.TimedArray((0.006 * events[0] - 0.0066 * events[1]) * b.uS, dt=DT)
    cells = b.NeuronGroup(
        asked.neurons,
        EQUATIONS,
        threshold="v > -50 * mV",
        reset="v = -65 * mV",
        method="euler",
        namespace={"inputs": inputs},
    )
    cells.v = -65 * b.mV
    cells.run_regularly(INPUT, dt=DT)
    spikes = b.SpikeMonitor(cells)
    b.Network(cells, spikes).run(asked.steps * DT)
    seconds = []
    with tempfile.TemporaryDirectory() as directory:
        b.device.build(directory=directory, compile=True, run=False)
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            b.device.run(directory, with_output=False, run_args=[])
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        rate = spikes.num_spikes / asked.neurons / float(asked.steps * DT)
    print(
        json.dumps(
            {
                "simulator": f"Brian2 {b.__version__}",
                "neurons": asked.neurons,
                "steps": asked.steps,
                "cpu": round(statistics.median(seconds), 4),
                "rate": round(rate, 2),
                "python": platform.python_version(),
            }
        )
    )


if __name__ == "__main__":
    main()
