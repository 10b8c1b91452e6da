# %% [markdown]
# # Train a classifier
#
# You will train a recurrent network to read handwritten digits, with spikes as input, to more than 90 % in a few
# seconds. Then you will see which of the numbers matter. It needs scikit-learn, which has the images: `pip install
# scikit-learn`.

# %%
# %matplotlib inline
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from coba_triton import CobaLIFRecurrent, default_learning_parameters

torch.set_num_threads(1)  # the steps are so small that threads would wait for each other longer than they work

# %% [markdown]
# ## Images as spikes
#
# An image has 8 x 8 pixels. Each pixel sends spikes for 50 ms, with a probability of up to 0.4 in a step of 1 ms, by
# its brightness.

# %%
torch.manual_seed(0)
images, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
train, test = torch.randperm(1797).split([1437, 360])


def encode(chosen):
    """Spikes [T, batch, pixels] of images."""
    return (torch.rand(50, len(chosen), 64) < 0.4 * images[chosen] / 16).float()


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), width_ratios=[1, 3], layout="constrained")
left.imshow(images[0].reshape(8, 8), cmap="gray_r")
left.set(title=f"the digit {digits[0]}", xticks=[], yticks=[])
step, pixel = encode(torch.tensor([0]))[:, 0].nonzero().T
right.plot(step, pixel, "|", color="#222222", markersize=4)
right.set(xlabel="time (ms)", ylabel="pixel", title="its spikes")
plt.show()

# %% [markdown]
# ## The network
#
# 128 recurrent neurons, and a linear readout of how often each of them spikes. The defaults of the module are made for
# this:
#
# * **The neuron remembers.** Its membrane has a time constant of 20 ms and the step is 1 ms, so it sums up what arrives
#   in many steps.
# * **Weights are multiples of the leak conductance.** They are 0.01 to 0.1 then, and Adam's default rate of 1e-3 suits
#   them.
# * **The gradient stays finite.** A reset multiplies the gradient in every step near the threshold. The default
#   surrogate, `triangle`, is 0.1 at the threshold and 0 from 1 mV away on. It keeps that product at 1 or below.


# %%
def build(p=default_learning_parameters, rate=1e-3):
    hidden, readout = CobaLIFRecurrent(64, 128, p, return_state=False), torch.nn.Linear(128, 10)
    return hidden, readout, torch.optim.Adam([{"params": hidden.parameters(), "lr": rate}, {"params": readout.parameters()}])


# %% [markdown]
# ## Training


# %%
def train_epochs(hidden, readout, optimizer, epochs):
    """Train, and return the accuracy on the test images and the mean rate of the hidden neurons in Hz after each epoch."""
    history = []
    for _ in range(epochs):
        for chosen in train[torch.randperm(len(train))].split(32):
            loss = torch.nn.functional.cross_entropy(readout(hidden(encode(chosen)).sum(0)), digits[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            spikes = hidden(encode(test))
            hits = readout(spikes.sum(0)).argmax(1) == digits[test]
        history.append((hits.float().mean().item(), 1000 * spikes.mean().item()))
    return history


started = time.perf_counter()
history = train_epochs(*build(), epochs=10)
print(f"{time.perf_counter() - started:.0f} s")
for epoch in (0, 4, 9):
    print(f"epoch {epoch + 1}: {history[epoch][0]:.0%} of the test images, hidden neurons at {history[epoch][1]:.0f} Hz")

# %% [markdown]
# ## What if?
#
# The same network with a rate that is twenty times as high, and with norse's surrogate derivative, `super`, in place of
# the triangle. Both learn less, and how much less is chance:

# %%
wide = default_learning_parameters._replace(method="super", alpha=1.0)
runs = {
    "defaults": history,
    "learning rate 2e-2": train_epochs(*build(rate=2e-2), epochs=10),
    "super, alpha = 1": train_epochs(*build(wide), epochs=10),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for name, found in runs.items():
    left.plot(range(1, 11), [100 * accuracy for accuracy, _ in found], ".-", label=name)
    right.plot(range(1, 11), [hz for _, hz in found], ".-", label=name)
    print(f"{name}: {found[-1][0]:.0%}")
left.set(xlabel="epoch", ylabel="test images told right (%)")
right.set(xlabel="epoch", ylabel="mean rate of hidden neurons (Hz)")
left.legend(frameon=False)
plt.show()

# %% [markdown]
# `examples/train_digits.py` is a longer program with a validation set, a schedule of the learning rate, and pictures.
# On a GPU, move the modules and the spikes there with `.to("cuda")`; nothing else changes.
