"""What the first run of a process waits for."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

SCRIPT = """
import sys
import coba_triton.pynn as sim
from coba_triton.backend.cpu.cache import KernelCache

loaded, load = [], KernelCache.load_overload
KernelCache.load_overload = lambda self, *arguments: loaded.append(self._name) or load(self, *arguments)
sim.setup(timestep=0.1, dtype=sys.argv[1])
in_setup = len(loaded)
source = sim.Population(2, sim.SpikeSourcePoisson(rate=1000.0))
cells = sim.Population(50, sim.IF_cond_exp())
for pre, weight in ((source, 0.03), (cells, 0.004)):
    sim.Projection(pre, cells, sim.FixedProbabilityConnector(0.2), sim.StaticSynapse(weight=weight, delay=0.4))
cells.record(["spikes", "v", "gsyn_exc"])
sim.run(20.0)
print(in_setup, loaded[in_setup:], cells.mean_spike_count() > 0, "numba.np.linalg" in sys.modules)
"""


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_kernels_are_loaded_in_setup_without_the_compiler(dtype: str) -> None:
    for _ in range(2):  # the first process may have to compile
        command = [sys.executable, "-c", SCRIPT, dtype]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "3 [] True False\n"
