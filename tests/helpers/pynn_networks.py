"""Networks in PyNN's language, for any simulator of PyNN.

``python pynn_networks.py FILE`` writes what NEST makes of :func:`imposed` to the file that the tests compare with. It was
made with NEST 3.10.0 and PyNN 0.13.0.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

STEPS = (0.1, 0.05, 0.02)
CELLS, SOURCES, DURATION = 4, 30, 100.0
BRETTE = dict(cm=0.2, tau_m=20.0, v_rest=-60.0, v_reset=-60.0, tau_syn_E=5.0, tau_syn_I=10.0, e_rev_E=0.0, e_rev_I=-80.0)


def imposed(sim: Any, dt: float, early: float = 0.0) -> np.ndarray:
    """Potentials and both conductances every millisecond of neurons that never fire, ``[3, samples, cells]``.

    All spikes are given, at times that are multiples of 0.1 ms, and so are all delays. ``early``: how much earlier a
    simulator has to be given a time that it would otherwise take for the next step.
    """
    from pyNN.parameters import Sequence

    rng = np.random.default_rng(3)
    sim.setup(timestep=dt, min_delay=dt, max_delay=5.0)
    cells = sim.Population(CELLS, sim.IF_cond_exp(**BRETTE, v_thresh=1000.0, tau_refrac=5.0))
    cells.initialize(v=-60.0)
    trains = [np.unique(np.round(rng.uniform(1, DURATION, rng.poisson(0.02 * DURATION)), 1)) for _ in range(SOURCES)]
    sources = sim.Population(SOURCES, sim.SpikeSourceArray(spike_times=[Sequence(train - early) for train in trains]))
    for receptor, share, low, high in (("excitatory", 0.3, 0.005, 0.02), ("inhibitory", 0.1, 0.01, 0.06)):
        there = np.argwhere(rng.random((SOURCES, CELLS)) < share)
        weights, delays = rng.uniform(low, high, len(there)), np.round(0.1 * rng.integers(1, 20, len(there)), 1)
        synapses = [(int(i), int(j), float(w), float(d)) for (i, j), w, d in zip(there, weights, delays, strict=True)]
        sim.Projection(sources, cells, sim.FromListConnector(synapses), sim.StaticSynapse(), receptor_type=receptor)
    names = ("v", "gsyn_exc", "gsyn_inh")
    cells.record(list(names), sampling_interval=1.0)
    for _ in range(4):
        sim.run(DURATION / 4)
    segment = cells.get_data().segments[0]
    sim.end()
    return np.stack([np.asarray(segment.filter(name=name)[0].magnitude) for name in names])


def signal(cells: Any, name: str, segment: int = 0) -> np.ndarray:
    """The samples of a recorded variable, ``[samples, cells]``."""
    return np.asarray(cells.get_data().segments[segment].filter(name=name)[0].magnitude)


def spike_times(cells: Any, segment: int = 0) -> list[list[float]]:
    """The times of the recorded spikes of every cell in ms."""
    return [train.magnitude.tolist() for train in cells.get_data().segments[segment].spiketrains]


if __name__ == "__main__":
    import pyNN.nest

    np.savez_compressed(sys.argv[1], **{str(dt): imposed(pyNN.nest, dt, dt / 100).astype(np.float32) for dt in STEPS})
