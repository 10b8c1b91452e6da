"""Time ``cobanet`` with this package, Brian2 (C++ standalone) and NEST: biological seconds per wall second, same weights.

    pip install brian2 nest-simulator   # both optional
    python bench/cobanet.py --seconds 1

Every simulator draws its own Poisson spikes, and NEST integrates with an adaptive step. So the spike trains differ, but the
rates agree; they are printed beside the speeds. Building and compiling the network is not counted. Each simulator runs in
its own process, with the number of threads that ``--threads`` says.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

import numpy as np

PACKAGES = {"coba_triton": "coba-triton", "brian2": "brian2", "nest": "nest-simulator"}


def network() -> tuple[Any, np.ndarray, np.ndarray]:
    """The built-in configuration, its input weights ``[N, I]`` and recurrent weights ``[N, N]`` in uS."""
    from coba_triton.cli.config import load
    from coba_triton.cli.inputs import open_source
    from coba_triton.cli.weights import open_recurrent

    _, config = load("cobanet")
    recurrent = open_recurrent(config)
    assert recurrent is not None
    return config, open_source(config).weights, recurrent.weights


def run_coba_triton(seconds: float, threads: int) -> tuple[float, float]:
    """Wall seconds of the simulation, and the mean rate in Hz. The Poisson spikes are drawn before, as a tensor."""
    import torch

    from coba_triton import coba_lif_integral, unpack_spikes
    from coba_triton.cli.job import parameters

    torch.set_num_threads(threads)
    config, w_in, w_rec = network()
    dt, rate = config.simulation.dt, config.input.spikes.rate
    steps = round(1000 * seconds / dt)
    x = torch.rand(steps, 1, w_in.shape[1], generator=torch.Generator().manual_seed(2)) < rate * dt / 1000
    # with these strides the transposed weights are contiguous, so nothing is copied at the start of a run
    weights = [torch.from_numpy(np.asfortranarray(w)) for w in (w_in, w_rec)]
    p = parameters(config.neuron)

    def simulate(x: Any) -> Any:
        return coba_lif_integral(x, None, *weights, p, dt, spike_dtype="bits")[0]

    simulate(x[:64])
    start = time.perf_counter()
    words = simulate(x)
    wall = time.perf_counter() - start
    return wall, unpack_spikes(words, steps).mean(dtype=torch.float32).item() * 1000 / dt


def run_brian2(seconds: float, threads: int) -> tuple[float, float]:
    import brian2 as b

    config, w_in, w_rec = network()
    with tempfile.TemporaryDirectory() as folder:
        b.set_device("cpp_standalone", directory=folder, build_on_run=False)
        b.prefs.devices.cpp_standalone.openmp_threads = 0 if threads == 1 else threads
        n = config.neuron
        b.defaultclock.dt = config.simulation.dt * b.ms
        equations = """
        dv/dt = (g_l * (v_rest - v) + g_e * (e_e - v) + g_i * (e_i - v)) / c_m : volt
        dg_e/dt = -g_e / tau_e : siemens
        dg_i/dt = -g_i / tau_i : siemens
        """
        names = dict(
            g_l=n.g_l * b.uS, v_rest=n.v_rest * b.mV, e_e=n.e_rev_E * b.mV, e_i=n.e_rev_I * b.mV, c_m=n.c_m * b.nF,
            tau_e=n.tau_syn_exc * b.ms, tau_i=n.tau_syn_inh * b.ms, v_thresh=n.v_thresh * b.mV, v_reset=n.v_reset * b.mV,
        )  # fmt: skip
        group = b.NeuronGroup(
            n.count, equations, threshold="v > v_thresh", reset="v = v_reset", method="euler", namespace=names
        )
        group.v = names["v_rest"]
        inputs = b.PoissonGroup(w_in.shape[1], config.input.spikes.rate * b.Hz)
        objects = [group, inputs]
        for source, weights in ((inputs, w_in), (group, w_rec)):
            for sign, target in ((1, "g_e"), (-1, "g_i")):
                post, pre = np.nonzero(sign * weights > 0)
                if len(pre):
                    synapses = b.Synapses(source, group, "w : siemens", on_pre=f"{target} += w")
                    synapses.connect(i=pre, j=post)
                    synapses.w = abs(weights[post, pre]) * b.uS
                    objects.append(synapses)
        spikes = b.SpikeMonitor(group)
        net = b.Network(*objects, spikes)
        net.run(seconds * b.second)
        b.device.build(directory=folder, compile=True, run=True)
        return float(b.device._last_run_time), spikes.num_spikes / n.count / seconds


def run_nest(seconds: float, threads: int) -> tuple[float, float]:
    import nest

    config, w_in, w_rec = network()
    n = config.neuron
    nest.verbosity = nest.VerbosityLevel.ERROR
    nest.resolution = config.simulation.dt
    nest.local_num_threads = threads
    cells = nest.Create("iaf_cond_exp", n.count, {
        "C_m": n.c_m * 1000, "g_L": n.g_l * 1000, "E_L": n.v_rest, "E_ex": n.e_rev_E, "E_in": n.e_rev_I, "V_th": n.v_thresh,
        "V_reset": n.v_reset, "V_m": n.v_rest, "tau_syn_ex": n.tau_syn_exc, "tau_syn_in": n.tau_syn_inh, "t_ref": 0.0,
    })  # fmt: skip
    generator = nest.Create("poisson_generator", 1, {"rate": config.input.spikes.rate})
    inputs = nest.Create("parrot_neuron", w_in.shape[1])
    nest.Connect(generator, inputs)
    for source, weights in ((inputs, w_in), (cells, w_rec)):
        post, pre = np.nonzero(weights)
        nest.Connect(
            np.asarray(source.tolist())[pre], np.asarray(cells.tolist())[post], "one_to_one",
            {"weight": weights[post, pre].astype(float) * 1000, "delay": np.full(len(pre), config.simulation.dt)},
        )  # fmt: skip
    recorder = nest.Create("spike_recorder")
    nest.Connect(cells, recorder)
    nest.Prepare()
    start = time.perf_counter()
    nest.Run(seconds * 1000)
    wall = time.perf_counter() - start
    nest.Cleanup()
    return wall, recorder.n_events / n.count / seconds


RUNS = {"coba_triton": run_coba_triton, "brian2": run_brian2, "nest": run_nest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="biological time (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each simulator (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, one after the other (%(default)s)")
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(RUNS[options.one](options.seconds, options.threads)))
        return
    measured: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for name in PACKAGES:
            if not importlib.util.find_spec(name):
                measured[name] = []
                continue
            command = [sys.executable, __file__, "--one", name, "--seconds", str(options.seconds)]
            done = subprocess.run([*command, "--threads", str(options.threads)], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            measured.setdefault(name, []).append(tuple(json.loads(done.stdout.splitlines()[-1])))
    print(f"cobanet, {options.seconds:g} s, {options.threads} threads, {platform.machine()}, median of {options.rounds}")
    for name, runs in measured.items():
        if not runs:
            print(f"  {name:12} not installed (pip install {PACKAGES[name]})")
            continue
        wall, rate = (statistics.median(values) for values in zip(*runs, strict=True))
        spread = (max(run[0] for run in runs) - min(run[0] for run in runs)) / 2
        print(
            f"  {name:12} {version(PACKAGES[name]):8} {wall:7.3f} ± {spread:.3f} s of wall time, "
            f"{options.seconds / wall:8.2f} biological s per wall s, {rate:5.1f} Hz"
        )


if __name__ == "__main__":
    main()
