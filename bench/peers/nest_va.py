"""Simulate a network of `network.py` with NEST and its ``iaf_cond_exp``; print one JSON line.

    python nest_va.py va.npz --seconds 1

NEST integrates with its own adaptive Runge-Kutta method of order 4 (5). It needs a delay of at least one step, so it cannot
simulate ``coba2005``. ``wall`` and ``cpu`` are the seconds of `nest.Run` alone, after the connections were sorted.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time

import nest
import numpy as np
from network import describe, each_sign, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="an .npz file of network.py")
    parser.add_argument("--seconds", type=float, default=1.0, help="biological time (%(default)s)")
    parser.add_argument(
        "--one-weight", action="store_true", help="store the weight of a projection once (static_synapse_hom_w)"
    )
    parser.add_argument("--spikes", help="an .npz file for the spikes: step and neuron")
    options = parser.parse_args()
    network = load(options.network)
    if network.delay < network.dt:
        parser.error(f"NEST needs a delay of at least one step of {network.dt} ms, got {network.delay} ms")
    nest.verbosity = nest.VerbosityLevel.ERROR
    nest.resolution = network.dt
    nest.local_num_threads = 1
    cells = nest.Create("iaf_cond_exp", network.n, {
        "C_m": network.c_m * 1000, "g_L": network.g_l * 1000, "E_L": network.v_rest, "E_ex": network.e_exc,
        "E_in": network.e_inh, "V_th": network.v_thresh, "V_reset": network.v_reset, "tau_syn_ex": network.tau_exc,
        "tau_syn_in": network.tau_inh, "t_ref": network.refractory, "I_e": network.i_offset * 1000,
        "V_m": network.v0.astype(np.float64),
    })  # fmt: skip
    pairs = [(cells, network.sources, network.targets, network.weights)]
    if len(network.spike_times):
        # one generator for each source; NEST rounds a time up to the next step, so it gets one that is slightly too early
        times = network.spike_times - 0.01 * network.dt
        number = int(network.input_sources.max()) + 1
        generators = nest.Create("spike_generator", number, [
            {"spike_times": times[network.spike_sources == source], "allow_offgrid_times": True} for source in range(number)
        ])  # fmt: skip
        pairs.append((generators, network.input_sources, network.input_targets, network.input_weights))
    first_cell = cells[0].global_id
    for number, (sources, *ends) in enumerate(pairs):
        first_source = sources[0].global_id
        for sign, pre, post, weight in each_sign(*ends):
            model = "static_synapse"
            values = {"weight": np.broadcast_to(weight, len(pre)) * sign * 1000, "delay": np.full(len(pre), network.delay)}
            if options.one_weight and isinstance(weight, float):
                model = f"shared_{number}_{sign}"
                nest.CopyModel("static_synapse_hom_w", model, {"weight": sign * weight * 1000})
                del values["weight"]
            rule = {"synapse_model": model, **values}
            nest.Connect(pre.astype(np.int64) + first_source, post.astype(np.int64) + first_cell, "one_to_one", rule)
    recorder = nest.Create("spike_recorder")
    nest.Connect(cells, recorder)
    nest.Prepare()
    nest.Run(network.dt)  # sorts the connections
    began, cpu_began = time.perf_counter(), time.process_time()
    nest.Run(options.seconds * 1000 - network.dt)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    nest.Cleanup()
    # NEST reports a spike at the end of its step
    steps = np.round(recorder.events["times"] / network.dt).astype(np.int64) - 1
    neurons = np.asarray(recorder.events["senders"]) - first_cell
    if options.spikes:
        np.savez(options.spikes, steps=steps, neurons=neurons)
    result = {
        "peer": "nest", "mode": "static_synapse_hom_w" if options.one_weight else "static_synapse", "method": "rk45",
        "dtype": "float64", "threads": 1, "neurons": network.n, "synapses": len(network.sources),
        "seconds": options.seconds, "wall": wall, "cpu": cpu,
        **describe(steps * network.dt, neurons, network, options.seconds),
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": {"nest": nest.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
