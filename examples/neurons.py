# %% [markdown]
# # Neurons and rasters
#
# You will simulate one neuron, look at its potential and its conductances, then simulate a population and draw a
# raster, and at last let a real electrocardiogram drive 200 neurons. It takes half a minute, most of it to compile.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import numpy as np
import torch

from coba_triton import (
    CobaLIF,
    PoissonSource,
    Record,
    coba_lif_feed_forward_integral,
    default_learning_parameters,
    open_result,
    simulate,
)
from coba_triton.cli import main
from coba_triton.stream.plotting import overview

# %% [markdown]
# ## One neuron
#
# Times are in ms and potentials in mV. Conductances are in units of the leak conductance, here and in all defaults of
# the modules; with other parameters they are in uS. `x` is what the spikes of a step add to the conductances, positive
# for excitation and negative for inhibition.

# %%
p = default_learning_parameters._replace(tau_syn_inh_inv=1 / 10, refractory=2.0)  # a membrane of 20 ms
dt = 0.1  # ms
x = torch.zeros(2000, 1)  # [T, neurons]: 200 ms
x[200:1000:50] = 0.4  # an excitatory spike every 5 ms
x[1200:1300:20] = 2.0  # a burst of excitation
x[1210] = -5.0  # and one inhibitory spike
spikes, states = coba_lif_feed_forward_integral(x, None, p, dt, record_states=True)
print(f"{int(spikes.sum())} spikes; v between {states.v.min():.1f} and {states.v.max():.1f} mV")

# %%
time = dt * torch.arange(1, 2001)
figure, (upper, lower) = plt.subplots(2, figsize=(10, 4.5), sharex=True, layout="constrained")
upper.plot(time, states.v[:, 0], color="#222222")
upper.plot(time[spikes[:, 0] > 0], torch.full((int(spikes.sum()),), -48.0), "|", color="#222222", markersize=12)
upper.axhline(-50, linestyle="--", color="#999999")
upper.set_ylabel("v (mV)")
lower.plot(time, states.g_e[:, 0], color="#c0392b", label="excitatory")
lower.plot(time, states.g_i[:, 0], color="#2c6fbb", label="inhibitory")
lower.set(xlabel="time (ms)", ylabel="conductance (leaks)")
lower.legend(frameon=False)
plt.show()

# %% [markdown]
# The potential rises with every input and leaks away between two of them. A spike resets it, and for 2 ms after it the
# neuron is held at the reset potential. In the burst, the inhibitory spike holds the potential down, although
# excitation goes on.
#
# ## A population
#
# `PoissonSource` makes random spikes, here of 60 Hz for each of 200 neurons. Such few and strong inputs make irregular
# spikes. `simulate` runs the neurons block by block and keeps the spikes and the traces that `Record` names.

# %%
source = PoissonSource(60.0, steps=10_000, shape=(200,), dt=dt, weight=0.6, seed=1)  # Hz
result = simulate(CobaLIF(p, dt), source, record=Record(neurons=[0], inputs=True), progress=False)
rates, intervals = result.firing_rates(), result.intervals()
print(f"{rates.mean():.1f} Hz; coefficient of variation of the intervals {np.nanmean(intervals.cv):.2f}")

# %%
overview(result, title="200 neurons with Poisson input", start=200, stop=700)

# %% [markdown]
# ## A heartbeat
#
# The built-in configuration `ecg` turns five seconds of an electrocardiogram into events: one each time that the signal
# has moved by 0.05 mV. Random weights lead from these events to 200 neurons. This is the command `coba-triton simulate
# ecg --out out/ecg`, called from Python:

# %%
status = main(["simulate", "ecg", "--out", "out/ecg"])
heart = open_result("out/ecg/result.zarr")
times, neurons = heart.events()

# %% [markdown]
# Do the neurons answer to the heartbeat? Each beat has a sharp peak. Align the spikes to the peaks and count them:

# %%
signal = heart.array("signal")[:]
around = np.lib.stride_tricks.sliding_window_view(np.pad(signal, 500, mode="edge"), 1001)  # 100 ms before and after
peaks = np.flatnonzero((signal == around.max(1)) & (signal - around.min(1) > 1.0))  # steps of peaks of more than 1 mV
beats = heart.dt * peaks  # ms
distance = np.subtract.outer(times, beats).ravel()

figure, ax = plt.subplots(figsize=(10, 3), layout="constrained")
ax.hist(distance, bins=np.arange(-200, 205, 5), color="#444444")
ax.set(xlabel="time from the peak of a beat (ms)", ylabel="spikes in 5 ms")
near = (abs(distance) < 50).sum() / len(times)
print(f"{len(beats)} beats; {near:.0%} of the spikes are within 50 ms of a peak")
plt.show()

# %% [markdown]
# The neurons fire around the steep slopes of the beats and are silent between them.
