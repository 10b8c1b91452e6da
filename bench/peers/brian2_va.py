"""Simulate a network of `network.py` with Brian2, in its C++ standalone mode or with its Cython code; print one JSON line.

    python brian2_va.py va.npz --seconds 1 --directory build

Forward Euler, with the same steps as in this package, is what Brian2 chooses by itself for these equations. Its example of
this network asks for exponential Euler. With ``--directory`` the compiled project is kept, and the next call with the same
options only runs it.

``wall`` and ``cpu`` are the seconds of the loop over the steps alone; ``cpu_program`` is that of the whole program that
Brian2 compiled, which also sorts the synapses by their source.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import brian2 as b
import numpy as np
from network import describe, each_sign, load

EQUATIONS = """
dv/dt = (g_l * (v_rest - v) + g_exc * (e_exc - v) + g_inh * (e_inh - v) + i_offset) / c_m : volt (unless refractory)
dg_exc/dt = -g_exc / tau_exc : siemens
dg_inh/dt = -g_inh / tau_inh : siemens
"""
# The loop over the steps is between these two. Brian2 itself measures the time of the processor only.
BEFORE = "timespec began, ended; clock_gettime(CLOCK_MONOTONIC, &began); const std::clock_t clock_began = std::clock();"
AFTER = """
clock_gettime(CLOCK_MONOTONIC, &ended);
std::ofstream(brian::results_dir + "loop.txt")
    << ended.tv_sec - began.tv_sec + 1e-9 * (ended.tv_nsec - began.tv_nsec) << " "
    << double(std::clock() - clock_began) / CLOCKS_PER_SEC << std::endl;
"""


def build(network: Any, method: str) -> tuple[b.Network, b.SpikeMonitor]:
    units = {
        "c_m": b.nF, "g_l": b.uS, "v_rest": b.mV, "v_reset": b.mV, "v_thresh": b.mV, "e_exc": b.mV, "e_inh": b.mV,
        "tau_exc": b.ms, "tau_inh": b.ms, "i_offset": b.nA,
    }  # fmt: skip
    b.defaultclock.dt = network.dt * b.ms
    # Brian2 counts the refractory period from the beginning of the step of the spike, the others from its end
    group = b.NeuronGroup(
        network.n, EQUATIONS, threshold="v > v_thresh", reset="v = v_reset",
        refractory=(network.refractory + network.dt) * b.ms, name="cells", method=method,
        namespace={name: getattr(network, name) * unit for name, unit in units.items()},
    )  # fmt: skip
    group.v = network.v0.astype(np.float64) * b.mV
    objects = [group]
    pairs = [("recurrent", group, network.sources, network.targets, network.weights)]
    if len(network.spike_times):
        # Brian2 reports a spike at the beginning of its step, the file at its end
        inputs = b.SpikeGeneratorGroup(
            int(network.input_sources.max()) + 1, network.spike_sources,
            np.round(network.spike_times - network.dt, 10) * b.ms, name="inputs",
        )  # fmt: skip
        objects.append(inputs)
        pairs.append(("from_inputs", inputs, network.input_sources, network.input_targets, network.input_weights))
    for name, source, *ends in pairs:
        for sign, pre, post, weight in each_sign(*ends):
            target = "g_exc" if sign > 0 else "g_inh"
            shared = isinstance(weight, float)
            synapses = b.Synapses(
                source, group, None if shared else "w : siemens", on_pre=f"{target}_post += w", delay=network.delay * b.ms,
                name=f"{name}_{target}", namespace={"w": weight * b.uS} if shared else None,
            )  # fmt: skip
            synapses.connect(i=pre, j=post)
            if not shared:
                synapses.w = weight * b.uS
            objects.append(synapses)
    spikes = b.SpikeMonitor(group, name="spikes")
    return b.Network(*objects, spikes), spikes


def run_standalone(network: Any, seconds: float, method: str, directory: str) -> tuple[b.SpikeMonitor, dict[str, float]]:
    b.set_device("cpp_standalone", directory=directory, build_on_run=False)
    b.prefs.devices.cpp_standalone.openmp_threads = 0  # one thread
    net, spikes = build(network, method)
    b.device.insert_code("before_network_run", BEFORE)
    b.device.insert_code("after_network_run", AFTER)
    net.run(seconds * b.second)
    b.device.build(directory=directory, compile=True, run=False)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    b.device.run(directory=directory, with_output=False, run_args=[])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall, cpu = map(float, (Path(directory) / "results" / "loop.txt").read_text().split())
    program = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spikes, {"wall": wall, "cpu": cpu, "cpu_program": program}


def run_cython(network: Any, seconds: float, method: str) -> tuple[b.SpikeMonitor, dict[str, float]]:
    b.prefs.codegen.target = "cython"
    net, spikes = build(network, method)
    net.run(0 * b.ms)  # compiles
    began, cpu_began = time.perf_counter(), time.process_time()
    net.run(seconds * b.second)
    return spikes, {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu_began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="an .npz file of network.py")
    parser.add_argument("--seconds", type=float, default=1.0, help="biological time (%(default)s)")
    parser.add_argument("--method", choices=["euler", "exponential_euler"], default="euler", help="(%(default)s)")
    parser.add_argument("--mode", choices=["standalone", "cython"], default="standalone", help="(%(default)s)")
    parser.add_argument("--float32", action="store_true", help="single precision; Brian2's own choice is double")
    parser.add_argument("--directory", help="where to keep the compiled project")
    parser.add_argument("--spikes", help="an .npz file for the spikes: step and neuron")
    options = parser.parse_args()
    network = load(options.network)
    if options.float32:
        b.prefs.core.default_float_dtype = np.float32
    with contextlib.ExitStack() as stack:
        if options.mode == "standalone":
            directory = options.directory or stack.enter_context(tempfile.TemporaryDirectory())
            spikes, seconds = run_standalone(network, options.seconds, options.method, os.path.abspath(directory))
        else:
            spikes, seconds = run_cython(network, options.seconds, options.method)
        steps = np.round(np.asarray(spikes.t / b.ms) / network.dt).astype(np.int64)
        neurons = np.asarray(spikes.i)
    if options.spikes:
        np.savez(options.spikes, steps=steps, neurons=neurons)
    # the largest child: the simulation, or the compiler if the network is small and the project is new
    simulator = resource.RUSAGE_CHILDREN if options.mode == "standalone" else resource.RUSAGE_SELF
    result = {
        "peer": "brian2", "mode": options.mode, "method": options.method,
        "dtype": "float32" if options.float32 else "float64",
        "threads": 1, "neurons": network.n, "synapses": len(network.sources), "seconds": options.seconds, **seconds,
        **describe(steps * network.dt, neurons, network, options.seconds),
        "memory_mb": resource.getrusage(simulator).ru_maxrss / 1024,
        "versions": {"brian2": b.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
