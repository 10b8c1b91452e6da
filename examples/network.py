# %% [markdown]
# # A published network
#
# The network of Vogels and Abbott (2005), as benchmark 1 of Brette et al. (2007) has it, keeps itself going: 4000
# neurons, 80 % of them excitatory, every pair connected with a probability of 2 %. You will run it from its
# configuration, then build it in Python on the synapses that Brian2 was given, and compare. It takes half a minute.

# %%
# %matplotlib inline
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import coba_triton
from coba_triton import CobaLIFParameters, CobaLIFRecurrent, CobaLIFState, Record, Synapses, open_result, simulate
from coba_triton.cli import main
from coba_triton.stream.plotting import overview

# %% [markdown]
# ## From its configuration
#
# The configuration `va` comes with the package, with the numbers of PyNN's `VAbenchmarks.py`. This is the command
# `coba-triton simulate va --out out/va`, called from Python:

# %%
status = main(["simulate", "va", "--out", "out/va"])

# %%
overview(open_result("out/va/result.zarr"), title="One second of va")

# %% [markdown]
# The sources fall silent after 50 ms. Rates stay near 15 Hz, and intervals are more irregular than those of a Poisson
# process, whose coefficient of variation is 1: neurons fire in bursts with long pauses.
#
# ## The same synapses as in Brian2
#
# `bench/peers/network.py` draws such a network into a file: synapses, first potentials and the spikes of the sources.
# Its peers in Brian2 and NEST read this file, and so does the next cell.

# %%
checkout = Path(coba_triton.__file__).parents[1]  # bench/ is part of a checkout, not of an installed package
subprocess.run([sys.executable, checkout / "bench" / "peers" / "network.py", "va", "va.npz"], check=True)
net = {name: array if array.ndim else float(array) for name, array in np.load("va.npz").items()}
print(f"{len(net['sources']):,} synapses, {len(net['spike_times'])} spikes of the sources")

# %% [markdown]
# `Synapses.from_coo` takes them as they are, one weight and one delay for all pairs. NEST and Brian2 deliver a spike
# one step later than this package does for the same number, so the delay of 0.2 ms is one of 0.3 ms here
# ([why](../networks.md#delays)). Brian2 computes in double precision, so this does, too.

# %%
p = CobaLIFParameters(  # of the file: ms, nF, uS, mV
    1 / net["tau_exc"], 1 / net["tau_inh"], 1 / net["c_m"], net["g_l"], net["e_inh"], net["e_exc"],
    net["v_rest"], net["v_reset"], net["v_thresh"], refractory=net["refractory"],
)  # fmt: skip
dt, steps = 0.1, 10_000
synapses = Synapses.from_coo(net["targets"], net["sources"], net["weights"], 0.3, shape=(4000, 4000)).to(torch.float64)
inputs = Synapses.from_coo(net["input_targets"], net["input_sources"], net["input_weights"], shape=(4000, 20)).to(
    torch.float64
)
network = CobaLIFRecurrent(20, 4000, p, dt, input_weights=inputs, recurrent_weights=synapses).double()

x = torch.zeros(steps, 1, 20, dtype=torch.float64)  # [T, batch, sources]
arrival = np.round((net["spike_times"] + 0.2) / dt).astype(int)
np.add.at(x.numpy(), (arrival, 0, net["spike_sources"]), 1)
start = CobaLIFState(0.0, torch.tensor(net["v0"])[None].double(), 0.0, 0.0)
populations = {"excitatory": range(3200), "inhibitory": range(3200, 4000)}
result = simulate(network, x, state=start, record=Record(populations=populations), progress=False)
spikes = int(result.spike_counts().sum())
print(f"{spikes:,} spikes in the first second")

# %% [markdown]
# ## Beside Brian2 and NEST
#
# | the first second | here | Brian2 2.9.0 | NEST 3.10.0 |
# | --- | ---: | ---: | ---: |
# | spikes | 60,869 | 60,869, each in the same step | |
# | excitatory and inhibitory rate, Hz | 15.3, 15.1 | 15.3, 15.1 | 14.3, 14.5 |
# | coefficient of variation | 1.47 | 1.47 | 1.44 |
#
# Brian2 ran with forward Euler; NEST solves the equations with Runge-Kutta, so its spikes are others and only rates can
# be compared. `bench/peers/README.md` says how to install both and repeat this; `tests/bench/test_peers.py` compares
# all spikes where Brian2 is installed. This package's numbers are those of the run above:

# %%
counts, cv = result.spike_counts(), result.intervals().cv
for name, members in result.populations.items():
    enough = members[counts[members] >= 5]
    print(f"{name}: {counts[members].mean():.1f} Hz, coefficient of variation {cv[enough].mean():.2f}")
assert spikes == 60_869  # Brian2's

# %% [markdown]
# ## How irregular are they?

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
left.hist(counts, bins=np.arange(0, 80, 2), color="#444444")
left.set(xlabel="rate (Hz)", ylabel="neurons", title="Most neurons are slow, some are fast")
right.hist(cv[counts >= 5], bins=np.arange(0, 3, 0.1), color="#444444")
right.axvline(1, linestyle="--", color="#999999", label="Poisson process")
right.set(xlabel="coefficient of variation", ylabel="neurons", title="Intervals are irregular")
right.legend(frameon=False)
plt.show()
