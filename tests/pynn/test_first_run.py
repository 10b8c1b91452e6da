"""What the first run of a process waits for."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

import coba_triton.pynn as sim

SCRIPT = """
import sys
import coba_triton.pynn as sim
from coba_triton.backend.cpu.cache import KernelCache

loaded, load = [], KernelCache.load_overload
KernelCache.load_overload = lambda self, *arguments: loaded.append(self._name) or load(self, *arguments)
sim.setup(timestep=0.1, dtype=sys.argv[1])
in_setup = len(loaded)
source = sim.Population(100, sim.SpikeSourcePoisson(rate=100.0))
cells = sim.Population(200, sim.IF_cond_exp())
for pre, weight in ((source, 0.001), (cells, 0.0001)):  # so many that the kernels for large networks are called as well
    sim.Projection(pre, cells, sim.AllToAllConnector(), sim.StaticSynapse(weight=weight, delay=0.4))
sim.Projection(cells, cells, sim.OneToOneConnector(), sim.StaticSynapse(weight=0.0001, delay=0.2))
cells.record(["spikes", "v", "gsyn_exc"])
sim.run(20.0)
print(in_setup, loaded[in_setup:], cells.mean_spike_count() > 0, "numba.np.linalg" in sys.modules)
"""


@pytest.mark.parametrize(("dtype", "count"), [("float64", 7), ("float32", 9)])  # two with sums of either width
def test_kernels_are_loaded_in_setup_without_the_compiler(dtype: str, count: int) -> None:
    for _ in range(2):  # the first process may have to compile
        command = [sys.executable, "-c", SCRIPT, dtype]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert done.stdout == f"{count} [] True False\n"


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_synapses_take_no_more_memory_than_what_is_kept(kind: str) -> None:
    """Memory that is touched for the first time costs more than the sorting does: so none is taken for a copy in between."""
    sim.setup(timestep=0.1)
    cells = sim.Population(1000, sim.IF_cond_exp())
    own = sim.RandomDistribution("uniform", (0.0, 0.001), rng=sim.NumpyRNG(1))
    synapse = sim.StaticSynapse(weight=0.001 if kind == "shared" else own, delay=0.2)
    for part in (cells[:800], cells[800:]):
        sim.Projection(part, cells, sim.FixedProbabilityConnector(0.3), synapse)
    projections = sim.simulator.state.engine.projections
    count = sum(len(projection) for projection in projections)
    tracemalloc.start()
    sim.run(0.1)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count > 200_000
    assert most < count * (4 if kind == "shared" else 12) + 500_000
