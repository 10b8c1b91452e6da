# %% [markdown]
# # Fit a neuron to a recording
#
# Every number of the neuron can have a gradient. You will take a noisy recording of a membrane potential, whose neuron
# nobody knows, and find its parameters by gradient descent. It takes some seconds, most of them to compile.

# %%
# %matplotlib inline
import math

import matplotlib.pyplot as plt
import torch

from coba_triton import CobaLIFParameters, coba_lif_feed_forward_integral

torch.manual_seed(0)
dt, steps = 0.1, 10_000  # ms; one second

# %% [markdown]
# ## The recording
#
# It is made here, so that the truth is known: a neuron with excitatory and inhibitory input spikes, and an electrode
# with noise of 0.5 mV. The input is weak enough for the neuron not to spike, as in experiments that measure a membrane.

# %%
truth = {"tau_m": 16.0, "c_m": 0.15, "tau_e": 3.0, "tau_i": 9.0, "v_rest": -68.0}  # ms, nF, ms, ms, mV
spikes = 0.002 * (torch.rand(steps, 1) < 0.02).float() - 0.004 * (torch.rand(steps, 1) < 0.01).float()  # uS


def potential(values):
    """The potential [T] of a neuron with these parameters."""
    p = CobaLIFParameters(
        tau_syn_exc_inv=1 / values["tau_e"],
        tau_syn_inh_inv=1 / values["tau_i"],
        c_m_inv=1 / values["c_m"],
        g_l=values["c_m"] / values["tau_m"],
        e_rev_E=0.0,
        e_rev_I=-85.0,
        v_rest=values["v_rest"],
        v_reset=-65.0,
        v_thresh=0.0,
    )
    _, states = coba_lif_feed_forward_integral(spikes, None, p, dt, record_states=True)
    return states.v[:, 0]


recorded = potential(truth) + 0.5 * torch.randn(steps)
print(f"recorded: {recorded.mean():.1f} mV on average, between {recorded.min():.0f} and {recorded.max():.0f} mV")

# %% [markdown]
# ## The fit
#
# Start from other values. Time constants and capacitance are positive, so their logarithms are what is learned. The
# error is smooth in all parameters as long as no neuron spikes, so L-BFGS, which uses curvature, needs few evaluations.

# %%
first = {"tau_m": 30.0, "c_m": 0.3, "tau_e": 6.0, "tau_i": 5.0, "v_rest": -60.0}
learned = {name: torch.tensor(value if name == "v_rest" else math.log(value)) for name, value in first.items()}
for number in learned.values():
    number.requires_grad_()
optimizer = torch.optim.LBFGS(learned.values(), line_search_fn="strong_wolfe", max_iter=100)
losses = []


def values():
    return {name: number if name == "v_rest" else number.exp() for name, number in learned.items()}


def evaluate():
    loss = (potential(values()) - recorded).square().mean()
    optimizer.zero_grad()
    loss.backward()
    losses.append(loss.item())
    return loss


last = optimizer.step(evaluate)
print(f"root of the mean squared error: {losses[0] ** 0.5:.2f} mV at first, {losses[-1] ** 0.5:.2f} mV at last")

# %%
print("parameter   first    fit  truth")
for name, number in values().items():
    print(f"{name:9} {first[name]:7.2f} {number.item():6.2f} {truth[name]:6.2f}")

# %% [markdown]
# What remains of the error is the noise of the electrode. The fit finds the neuron's parameters, although no spike and
# no conductance was recorded.

# %%
time = dt * torch.arange(steps)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), width_ratios=[1, 2], layout="constrained")
left.semilogy([loss**0.5 for loss in losses], color="#222222")
left.set(xlabel="evaluation", ylabel="error (mV)")
part = slice(3000, 5000)
right.plot(time[part], recorded[part], color="#bbbbbb", label="recorded")
right.plot(time[part], potential(first)[part], "--", color="#2c6fbb", label="first guess")
right.plot(time[part], potential(values())[part].detach(), color="#222222", label="fit")
right.set(xlabel="time (ms)", ylabel="v (mV)")
right.legend(frameon=False, ncols=3)
plt.show()

# %% [markdown]
# In modules, `learn=("tau_syn_exc_inv", "v_rest")` makes parameters of such numbers. A spiking neuron is fitted
# likewise; then the loss needs the surrogate gradient of its spikes, and its potential jumps.
