"""Simulate a network of `network.py` as the examples of brainevent do; print one JSON line.

    python brainevent_coba.py coba2005.npz --seconds 10

The neurons, the synapses and the event-driven products are those of brainpy and brainevent, integrated by exponential Euler
in single precision. Delays are a row of vectors of spikes that moves on in every step, because the delays of brainpy
interpolate. The network runs on the default device of JAX: on a GPU if there is one, else on a CPU, where all threads share
one processor.

The network is built before it is compiled. The example builds it in the compiled function, where brainpy 2.9 takes the
excitatory and the inhibitory synapses for one and the same: it then reports 59.6 Hz instead of 50.6 Hz.

``wall`` and ``cpu`` are the seconds of the second run of the compiled loop over the steps, from the same first state. It
counts the spikes of each neuron, as the example does. A run that is not timed records them for the CV.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from importlib.metadata import version
from typing import Any

import brainevent
import brainpy
import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import clear_backends
from network import describe, each_sign, load


class Product(brainstate.nn.Module):
    """Spikes of the sources times the matrix of one projection, which gives the conductances that arrive."""

    def __init__(self, sources: np.ndarray, targets: np.ndarray, weight: Any, shape: tuple[int, int]) -> None:
        super().__init__()
        self.in_size, self.out_size = shape
        values = (np.atleast_1d(weight) * u.uS).astype(np.float32)
        number = np.bincount(sources, minlength=shape[0])
        if (number == number[0]).all():
            data = values if isinstance(weight, float) else values.reshape(shape[0], -1)
            self.matrix = brainevent.FixedNumPerPre(data, targets.reshape(shape[0], -1), shape=shape)
        else:
            indptr = np.concatenate([[0], np.cumsum(number)]).astype(np.int32)
            self.matrix = brainevent.CSR(values, targets, indptr, shape=shape)
        # the matrix makes what it needs for a product with the first one, which must not be one that is compiled
        self.update(jnp.zeros(shape[0], jnp.float32))

    def update(self, spikes: jax.Array) -> Any:
        return brainevent.BinaryArray(spikes) @ self.matrix


class Net(brainstate.nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        n, self.n_exc = network.n, network.n_exc
        self.cells = brainpy.state.LIFRef(
            n, R=1 / network.g_l * u.Mohm, tau=network.c_m / network.g_l * u.ms, V_rest=network.v_rest * u.mV,
            V_th=network.v_thresh * u.mV, V_reset=network.v_reset * u.mV, spk_reset="hard",
            # half a step more, so that rounding in the time that single precision keeps does not shorten it
            tau_ref=(network.refractory + network.dt / 2) * u.ms,
        )  # fmt: skip
        self.recurrent = {}
        for sign, sources, targets, weight in each_sign(network.sources, network.targets, network.weights):
            first, last = (0, self.n_exc) if sign > 0 else (self.n_exc, n)
            self.recurrent[sign] = self.project(Product(sources - first, targets, weight, (last - first, n)), sign)
        self.from_inputs = None
        if len(network.spike_times):
            ((sign, sources, targets, weight),) = each_sign(
                network.input_sources, network.input_targets, network.input_weights
            )
            self.from_inputs = self.project(Product(sources, targets, weight, (int(sources.max()) + 1, n)), sign)

    def project(self, product: Product, sign: int) -> Any:
        network = self.network
        tau, reversal = (network.tau_exc, network.e_exc) if sign > 0 else (network.tau_inh, network.e_inh)
        return brainpy.state.AlignPostProj(
            comm=product, syn=brainpy.state.Expon.desc(network.n, tau=tau * u.ms, g_initializer=zero_conductance),
            out=brainpy.state.COBA.desc(E=reversal * u.mV), post=self.cells,
        )  # fmt: skip

    def init_state(self, *_: Any, **__: Any) -> None:
        delay = round(self.network.delay / self.network.dt)
        self.under_way = [brainstate.ShortTermState(jnp.zeros(self.network.n, jnp.float32)) for _ in range(delay)]
        self.counts = brainstate.ShortTermState(jnp.zeros(self.network.n, jnp.int32))

    def update(self, t: Any, inputs: Any) -> jax.Array:
        with brainstate.environ.context(t=t):
            spikes = self.cells.get_spike()
            for passed in self.under_way:
                spikes, passed.value = passed.value, spikes
            self.recurrent[1](spikes[: self.n_exc])
            self.recurrent[-1](spikes[self.n_exc :])
            if inputs is not None:
                self.from_inputs(inputs)
            self.cells(self.network.i_offset * u.nA)
            spikes = self.cells.get_spike() > 0
            self.counts.value += spikes
            return spikes


def zero_conductance(shape: Any, **_: Any) -> Any:
    return jnp.zeros(shape, jnp.float32) * u.uS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="an .npz file of network.py")
    parser.add_argument("--seconds", type=float, default=1.0, help="biological time (%(default)s)")
    parser.add_argument("--backend", help="of the products: numba or jax_raw on a CPU, cuda_raw or jax_raw on a GPU")
    parser.add_argument("--spikes", help="an .npz file for the spikes: step and neuron")
    options = parser.parse_args()
    device = jax.default_backend()
    if device == "cpu":
        # JAX starts as many threads as the process has processors, at its first use after this
        clear_backends()
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if options.backend:
        brainevent.config.set_backend(device, options.backend)
    network = load(options.network)
    steps = round(options.seconds * 1000 / network.dt)
    moments = np.round((network.spike_times + network.delay) / network.dt).astype(int)
    kept = moments < steps
    inputs = np.zeros((moments[kept].max(initial=-1) + 1, int(network.input_sources.max(initial=-1)) + 1), np.float32)
    inputs[moments[kept], network.spike_sources[kept]] = 1
    brainstate.environ.set(dt=network.dt * u.ms)
    net = Net(network)
    brainstate.nn.init_all_states(net)
    net.cells.V.value = jnp.asarray(network.v0) * u.mV
    first = {name: state.value for name, state in net.states().items()}

    def reset() -> None:
        for name, state in net.states().items():
            state.value = first[name]

    def run(record: bool) -> Any:
        result = (lambda spikes: jnp.packbits(spikes)) if record else (lambda spikes: None)
        times = jnp.arange(steps, dtype=jnp.float32) * network.dt * u.ms
        parts = []
        if len(inputs):
            parts.append(
                brainstate.transform.for_loop(
                    lambda t, x: result(net.update(t, x)), times[: len(inputs)], jnp.asarray(inputs)
                )
            )
        if len(inputs) < steps:
            parts.append(brainstate.transform.for_loop(lambda t: result(net.update(t, None)), times[len(inputs) :]))
        return parts

    compiled = brainstate.transform.jit(run, static_argnums=0)
    wall = cpu = 0.0
    for _ in range(2):
        reset()
        began, cpu_began = time.perf_counter(), time.process_time()
        compiled(False)
        net.counts.value.block_until_ready()
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    counts = np.asarray(net.counts.value)
    reset()
    packed = np.concatenate([np.asarray(part) for part in compiled(True)])
    spikes = [np.flatnonzero(np.unpackbits(row, count=network.n)) for row in packed]
    times = np.repeat(np.arange(steps), [len(row) for row in spikes])
    neurons = np.concatenate(spikes)
    if options.spikes:
        np.savez(options.spikes, steps=times, neurons=neurons)
    described = describe(times * network.dt, neurons, network, options.seconds)
    if device == "cpu":  # on a GPU, rounding moves spikes from run to run: sums are in the order in which threads add
        assert (np.bincount(neurons, minlength=network.n) == counts).all(), "the recorded run is not the timed one"
    packages = ("brainevent", "brainstate", "brainpy", "jax", "numpy")
    result = {
        "peer": "brainevent", "mode": options.backend or "default", "method": "exponential_euler", "dtype": "float32",
        "device": jax.devices()[0].device_kind, "threads": 1 if device == "cpu" else None, "neurons": network.n,
        "synapses": len(network.sources), "seconds": options.seconds, "wall": wall, "cpu": cpu, **described,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": {**{name: version(name) for name in packages}, "python": platform.python_version()},
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
