"""A network against its equations, written out step by step in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

from pyNN.parameters import Sequence

import coba_triton.pynn as sim
from helpers.pynn_networks import signal, spike_times

DT, STEPS, N, K = 0.1, 1500, 12, 5


def draw(seed: int, currents: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    uniform = rng.uniform
    cells = dict(
        cm=uniform(0.15, 0.3, N), tau_m=uniform(10, 25, N), tau_refrac=rng.integers(0, 50, N) * DT,
        i_offset=uniform(0, 0.15, N),
        tau_syn_E=uniform(3, 6, N), tau_syn_I=uniform(5, 12, N), v_rest=uniform(-66, -60, N), v_reset=uniform(-70, -60, N),
        v_thresh=uniform(-52, -48, N), e_rev_E=uniform(-5, 5, N), e_rev_I=uniform(-90, -75, N),
    )  # fmt: skip
    there = {"inner": rng.random((2, N, N)) < 0.3, "outer": rng.random((2, K, N)) < 0.5}
    weights = {name: uniform(0, 0.01, value.shape) for name, value in there.items()}
    delays = {name: rng.integers(1, 40, value.shape) for name, value in there.items()}
    trains = np.sort(rng.integers(0, STEPS, (K, 60)), 1)
    if currents:  # in nA: a conductance times a driving force of about 60 and 20 mV
        del cells["e_rev_E"], cells["e_rev_I"]
        weights = {name: value * np.array([60.0, -20.0])[:, None, None] for name, value in weights.items()}
    return dict(cells=cells, there=there, weights=weights, delays=delays, trains=trains, v=uniform(-65, -55, N))


def by_hand(net: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Potentials, conductances and spikes of every sample."""
    p = net["cells"]
    g_l = p["cm"] / p["tau_m"]
    held = np.ceil(p["tau_refrac"] / DT - 1e-6)
    arriving = np.zeros((STEPS + 50, 2, N))

    def send(kind: str, source: int, sample: int) -> None:
        for sign in (0, 1):
            for target in np.flatnonzero(net["there"][kind][sign, source]):
                at = sample + net["delays"][kind][sign, source, target]
                arriving[at, sign, target] += abs(net["weights"][kind][sign, source, target])

    for source, train in enumerate(net["trains"]):
        for sample in train:
            send("outer", source, sample)
    v, g, left = net["v"].copy(), np.zeros((2, N)), np.zeros(N)
    tau = np.stack([p["tau_syn_E"], p["tau_syn_I"]])
    vs, gs, spikes = [v], [], []
    for step in range(STEPS + 1):
        g = g - DT / tau * g + arriving[step]
        gs.append(g)
        if step == STEPS:
            break
        synaptic = g[0] * (p["e_rev_E"] - v) + g[1] * (p["e_rev_I"] - v) if "e_rev_E" in p else g[0] - g[1]
        current = g_l * (p["v_rest"] - v) + synaptic + p["i_offset"]
        u = v + DT / p["cm"] * current
        z = (u > p["v_thresh"]) & (left <= 0)
        v = np.where(z | (left > 0), p["v_reset"], u)
        left = np.where(z, held, np.maximum(left - 1, 0))
        vs.append(v)
        for cell in np.flatnonzero(z):
            spikes.append((step + 1, cell))
            send("inner", cell, step + 1)
    return np.array(vs), np.array(gs)[:, 0], np.array(gs)[:, 1] * (1 if "e_rev_E" in p else -1), np.array(spikes)


def by_pynn(net: dict[str, np.ndarray], pieces: int, steps: int = STEPS, **setup: str) -> tuple[np.ndarray, ...]:
    sim.setup(timestep=DT, **setup)
    names, kind = ("gsyn_exc", "gsyn_inh"), sim.IF_cond_exp
    if "e_rev_E" not in net["cells"]:
        names, kind = ("isyn_exc", "isyn_inh"), sim.IF_curr_exp
    cells = sim.Population(N, kind(**net["cells"]), initial_values={"v": net["v"]})
    sources = sim.Population(K, sim.SpikeSourceArray(spike_times=[Sequence(train * DT) for train in net["trains"]]))
    for kind, pre in (("inner", cells), ("outer", sources)):
        for sign, receptor in enumerate(("excitatory", "inhibitory")):
            synapses = [
                (i, j, net["weights"][kind][sign, i, j], net["delays"][kind][sign, i, j] * DT)
                for i, j in np.argwhere(net["there"][kind][sign])
            ]
            sim.Projection(pre, cells, sim.FromListConnector(synapses), sim.StaticSynapse(), receptor_type=receptor)
    cells.record(["spikes", "v", *names])
    for _ in range(pieces):
        sim.run(steps * DT / pieces)
    found = [(round(time / DT), cell) for cell, train in enumerate(spike_times(cells)) for time in train]
    return *(signal(cells, name) for name in ("v", *names)), np.array(sorted(found))


@pytest.mark.parametrize("pieces", [1, 30])
@pytest.mark.parametrize("currents", [False, True], ids=["conductances", "currents"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_sample(seed: int, currents: bool, pieces: int) -> None:
    net = draw(seed, currents)
    expected, found = by_hand(net), by_pynn(net, pieces)
    assert len(expected[3]) > 50
    np.testing.assert_array_equal(found[3], expected[3])
    for one, other in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-15)


def test_a_run_may_be_cut_anywhere() -> None:
    net = draw(2)
    for one, other in zip(by_pynn(net, 1), by_pynn(net, 300), strict=True):
        np.testing.assert_array_equal(one, other)


def test_all_backends_have_the_same_bits(device: torch.device) -> None:
    net = draw(3)
    there = by_pynn(net, 2, 200, backend="triton", device=str(device))
    for one, other in zip(by_pynn(net, 2, 200), there, strict=True):
        np.testing.assert_array_equal(one, other)


def test_both_kinds_of_neurons_in_one_network() -> None:
    """Each kind is what it is alone: neurons of the one drive those of the other."""
    kinds = sim.IF_cond_exp, sim.IF_curr_exp
    found = []
    for first, second in (kinds, kinds[::-1]):
        sim.setup(timestep=DT)
        parts = {}
        for kind in (first, second):
            parts[kind] = sim.Population(3, kind(cm=0.2, i_offset=[0.0, 0.1, 0.2], tau_refrac=2.0))
            parts[kind].record(["v", "spikes"])
        for pre, post, weight in ((kinds[0], kinds[1], 0.5), (kinds[1], kinds[0], 0.01)):
            synapse = sim.StaticSynapse(weight=weight, delay=1.0)
            sim.Projection(parts[pre], parts[post], sim.AllToAllConnector(), synapse, receptor_type="excitatory")
        sim.run(100.0)
        found.append([(signal(parts[kind], "v"), spike_times(parts[kind])) for kind in kinds])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1] == other[1] and min(map(len, one[1])) > 2
    assert found[0][0][1] != found[0][1][1]
