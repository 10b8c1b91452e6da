"""Make the networks that the peers of this package simulate, and describe the spikes that come out.

    python network.py va va.npz                          # 4000 neurons, 2 % connection probability, 4 and 51 nS
    python network.py va va100k.npz --neurons 100000     # 100 synapses a neuron, 3.2 and 40.8 nS
    python network.py va va1m.npz --neurons 1000000
    python network.py coba2005 coba2005.npz              # brainevent's example: no delay, a constant current

``va`` is benchmark 1 (COBA) of Brette et al. (2007), https://doi.org/10.1007/s10827-007-0038-6, with the numbers of
``VAbenchmarks.py``, an example of PyNN: a refractory period of 5 ms, delays of 0.2 ms, potentials that start anywhere
between reset and threshold. In the first 50 ms, 20 sources of 100 Hz, each of which reaches 1 % of the neurons with
0.1 uS, start an activity that then sustains itself.

A larger ``va`` has 100 synapses a neuron instead of 80 on average. Its weights are smaller by 80 / 100, so that a neuron
receives the same sum of conductances if the rates are the same. Every source draws its 100 targets at random, and may
draw one twice. The 20 sources of the start reach 1 % of all neurons, as before.

``coba2005`` is the network of ``examples/COBA_2005.py`` of brainevent. Every neuron sends 80 synapses, all neurons get a
constant current that would bring them 10 mV above the threshold, and there is no other input. The example writes its
weights in mS beside a resistance of 1 ohm and a current in mA. They are therefore 1000 times weaker, beside the leak, than
the 6 and 67 nS of Brette et al.; the file keeps what the example simulates.

A file holds, for N neurons of which the first ``n_exc`` are excitatory, M synapses and K sources of input:

    sources, targets [M] int32, weights [M] float32     in uS, negative if inhibitory; ascending by source, then target
    input_sources, input_targets [.] int32, input_weights [.] float32      the synapses of the sources of input
    spike_times [S] float64, spike_sources [S] int32    the spikes of the sources of input, ascending, multiples of dt
    v0 [N] float32                                      the first potentials in mV
    and one number each: n_exc, dt and delay in ms, and the constants of the neuron, see `CONSTANTS`

``delay`` is in the count of NEST, Brian2 and PyNN. A neuron that spikes in step k of length dt (the first is step 0) has
its reset potential at the time (k + 1) dt. That time plus the delay is the time n dt at which the conductance of the target
has jumped. Step n is the first one whose potential feels it. A spike of a source of input at the time t counts likewise.
In a simulator in which a spike of step k with a delay of d steps is an input of step k + d, d is one more than here.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import numpy as np

# nF, uS, mV, ms and nA
CONSTANTS = {
    "c_m": 0.2, "g_l": 0.01, "v_rest": -60.0, "v_reset": -60.0, "v_thresh": -50.0, "e_exc": 0.0, "e_inh": -80.0,
    "tau_exc": 5.0, "tau_inh": 10.0, "refractory": 5.0, "i_offset": 0.0,
}  # fmt: skip
DT = 0.1


def bernoulli(sources: int, targets: int, probability: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The ends of synapses that exist with this probability, independently for each pair."""
    rows = [np.flatnonzero(rng.random(targets) < probability).astype(np.int32) for _ in range(sources)]
    return np.repeat(np.arange(sources, dtype=np.int32), [len(row) for row in rows]), np.concatenate(rows)


def fixed_number(sources: int, targets: int, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The ends of synapses of which every source has this number, to targets drawn with replacement."""
    drawn = rng.integers(targets, size=(sources, number), dtype=np.int32)
    drawn.sort(axis=1)
    return np.repeat(np.arange(sources, dtype=np.int32), number), drawn.ravel()


def signed(sources: np.ndarray, n_exc: int, w_exc: float, w_inh: float) -> np.ndarray:
    return np.where(sources < n_exc, np.float32(w_exc), np.float32(-w_inh))


def make_va(neurons: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    n_exc = round(0.8 * neurons)
    if neurons == 4000:
        sources, targets = bernoulli(neurons, neurons, 0.02, rng)
        scale = 1.0
    else:
        sources, targets = fixed_number(neurons, neurons, 100, rng)
        scale = 80 / 100
    input_sources, input_targets = bernoulli(20, neurons, 0.01, rng)
    # a spike at the time 0 would be one of before the simulation, so the 500 steps are 1 to 500
    steps, spike_sources = np.nonzero(rng.random((500, 20)) < 100 * DT / 1000)
    return {
        **CONSTANTS, "dt": DT, "delay": 0.2, "n_exc": n_exc, "sources": sources, "targets": targets,
        "weights": signed(sources, n_exc, 0.004 * scale, 0.051 * scale),
        "input_sources": input_sources, "input_targets": input_targets,
        "input_weights": np.full(len(input_sources), 0.1, np.float32),
        "spike_times": np.round((steps + 1) * DT, 10), "spike_sources": spike_sources.astype(np.int32),
        "v0": rng.uniform(-60, -50, neurons).astype(np.float32),
    }  # fmt: skip


def make_coba2005(neurons: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    n_exc = round(0.8 * neurons)
    sources, targets = fixed_number(neurons, neurons, 80, rng)
    none = np.empty(0, np.int32)
    # 0.6 and 6.7 mS, 20 mA and 1 ohm of the example, times the leak of 0.01 uS = 1 / (1 ohm) in its units
    return {
        **CONSTANTS, "i_offset": 0.2, "dt": DT, "delay": 0.0, "n_exc": n_exc, "sources": sources, "targets": targets,
        "weights": signed(sources, n_exc, 0.6e-3 * 0.01, 6.7e-3 * 0.01),
        "input_sources": none, "input_targets": none, "input_weights": np.empty(0, np.float32),
        "spike_times": np.empty(0), "spike_sources": none, "v0": rng.normal(-55, 2, neurons).astype(np.float32),
    }  # fmt: skip


def load(path: str) -> Any:
    """What a file holds, as attributes; ``n`` is the number of neurons."""
    with np.load(path) as file:
        fields = {name: file[name] if file[name].ndim else file[name].item() for name in file.files}
    return SimpleNamespace(n=len(fields["v0"]), **fields)


def each_sign(sources: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> list[tuple[int, Any, Any, Any]]:
    """Sign, sources, targets and absolute weights (one number if all are equal) of the synapses of each sign."""
    parts = []
    for sign in (1, -1):
        chosen = np.flatnonzero(sign * weights > 0)
        if len(chosen):
            values = abs(weights[chosen]).astype(np.float64)
            same = bool((values == values[0]).all())
            parts.append((sign, sources[chosen], targets[chosen], float(values[0]) if same else values))
    return parts


def describe(times: np.ndarray, neurons: np.ndarray, network: Any, seconds: float) -> dict[str, float]:
    """Mean rates in Hz, and the coefficient of variation of the intervals, a mean over neurons with at least 5 spikes."""
    counts = np.bincount(neurons, minlength=network.n)
    order = np.lexsort((times, neurons))
    intervals = np.diff(times[order])
    owner = neurons[order][1:]
    inside = owner == neurons[order][:-1]
    intervals, owner = intervals[inside], owner[inside]
    number = np.maximum(np.bincount(owner, minlength=network.n), 1)
    mean = np.bincount(owner, intervals, network.n) / number
    variance = np.bincount(owner, (intervals - mean[owner]) ** 2, network.n) / number
    enough = counts >= 5
    cv = float((np.sqrt(variance[enough]) / mean[enough]).mean()) if enough.any() else float("nan")
    return {
        "rate_exc": float(counts[: network.n_exc].mean() / seconds),
        "rate_inh": float(counts[network.n_exc :].mean() / seconds),
        "cv": cv,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["va", "coba2005"])
    parser.add_argument("file", help="the .npz file to write")
    parser.add_argument("--neurons", type=int, default=4000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    options = parser.parse_args()
    make = make_va if options.kind == "va" else make_coba2005
    np.savez(options.file, **make(options.neurons, options.seed))


if __name__ == "__main__":
    main()
