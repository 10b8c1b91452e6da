# %% [markdown]
# # A long run, killed and resumed
#
# A minute of simulated time is 600,000 steps. You will start such a run in another process, kill it in the middle, look
# at what it left, resume it, and see that the result has the bits of a run that nobody disturbed. It takes half a
# minute.

# %%
# %matplotlib inline
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from coba_triton import open_result

# %% [markdown]
# ## The run
#
# This is the program. It names a source, a network and a path. `resume=True` begins a run that does not exist yet, and
# continues one that was cut off.

# %%
program = """
import sys
from coba_triton import CobaLIF, PoissonSource, Record, simulate

source = PoissonSource(60.0, steps=600_000, shape=(1000,), dt=0.1, weight=0.6, seed=1)  # Hz; in units of the leak
record = Record(neurons=[0, 1], every=10)
simulate(CobaLIF(dt=0.1), source, sink=sys.argv[1], record=record, resume=True, progress=False)
"""
written = Path("run.py").write_text(program)

# %% [markdown]
# ## Killed
#
# Start it, wait until a fifth is finished, and kill it with SIGKILL, which no program can catch. A result can be read
# while it is written, and after its writer has died.

# %%
running = subprocess.Popen([sys.executable, "run.py", "killed.zarr"])
while not Path("killed.zarr/zarr.json").exists() or open_result("killed.zarr").steps < 120_000:
    time.sleep(0.02)
running.kill()
print("exit status", running.wait())
left = open_result("killed.zarr")
print(f"finished: {left.finished}; a fifth or more is there: {left.steps >= 120_000}")

# %% [markdown]
# ## Resumed
#
# The same command again goes on from the last block that was finished:

# %%
done = subprocess.run([sys.executable, "run.py", "killed.zarr"], check=True)
resumed = open_result("killed.zarr")
print(f"{resumed.steps:,} steps, finished: {resumed.finished}")

# %% [markdown]
# ## The same bits
#
# A run without an accident, and a comparison of all spikes, traces and the final state:

# %%
done = subprocess.run([sys.executable, "run.py", "whole.zarr"], check=True)
whole = open_result("whole.zarr")
for start in range(0, whole.steps, 100_000):
    assert np.array_equal(whole.spikes[start : start + 100_000], resumed.spikes[start : start + 100_000])
assert np.array_equal(whole.traces["v"][:], resumed.traces["v"][:])
assert np.array_equal(whole.state.v, resumed.state.v)
print(f"{int(whole.spike_counts().sum()):,} spikes, the same ones in both")

# %% [markdown]
# ## Reading a part
#
# A result reads only what is asked for. Here are the rate of the whole minute and the trace of half a second:

# %%
edges, rates = whole.rates(bin_ms=500.0)
figure, (upper, lower) = plt.subplots(2, figsize=(10, 4), layout="constrained")
upper.stairs(rates, edges / 1000, color="#444444", baseline=None)
upper.set(xlabel="time (s)", ylabel="population rate (Hz)")
stored = slice(3000, 3500)  # every tenth step is kept, which is every ms
lower.plot(np.arange(3000, 3500), whole.traces["v"][stored, 0], color="#222222")
lower.set(xlabel="time (ms)", ylabel="v (mV)")
plt.show()

# %% [markdown]
# What else is promised, and what it costs: [What is promised of long runs](../reliability.md).
