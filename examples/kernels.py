# %% [markdown]
# # Check, tune and benchmark
#
# You will compare a backend with the reference on input of your own, see which launch parameters a call takes, compile
# a Triton kernel for a GPU that is not there, and time this package beside a compiled step. It takes about a minute.
# The cells call the command line from Python: `main(["check", ...])` is `coba-triton check ...`.

# %%
import torch

import coba_triton
from coba_triton import CobaLIFParameters
from coba_triton.cli import main
from coba_triton.tuning import explain

# %% [markdown]
# ## Does a backend give the reference's bits?
#
# `coba_triton.check` runs your input on a backend and on the reference, forward and backward:

# %%
torch.manual_seed(0)
x = 0.01 * torch.randn(300, 4, 33)  # [T, batch, neurons], uS
p = CobaLIFParameters(v_thresh=-50.0, v_rest=-60.0, v_reset=-60.0)
report = coba_triton.check(x, p=p, dt=0.1, backend="cpu")
print(report)

# %% [markdown]
# `coba-triton check` has cases of its own, and about four times as many with `--full`. Here are those about chunks: a
# sequence in parts must have the bits of the whole one.

# %%
status = main(["check", "--device", "cpu", "--only", "chunking"])

# %% [markdown]
# ## What does a launch take?
#
# Launch parameters come from a table that `coba-triton tune` has measured, or from a rule. They change no bit of a
# result.

# %%
print(explain("feed_forward_forward", neurons=1024, batch=32, backend="cpu").parameters)

# %%
command = ["tune", "--neurons", "1024", "--kernel", "feed_forward_forward", "--backend", "cpu", "--out", "table.json"]
status = main(command)

# %% [markdown]
# Times with less than the spread between them are the same, so the rule stays unless something is faster beyond that.
#
# ## What would a GPU get?
#
# Triton compiles for a GPU that is not there. Registers and spills are those of the machine code; occupancy is how many
# warps can be resident, of those that a multiprocessor has.

# %%
command = ["tune", "--neurons", "1024", "--kernel", "feed_forward_forward", "--compile-only", "--arch", "sm_90"]
status = main(command)

# %% [markdown]
# ## How fast is it?

# %%
status = main(["bench", "--device", "cpu", "--only", "inference-small", "--rounds", "5", "--out", "bench.json"])

# %% [markdown]
# `ns` are nanoseconds for a neuron and a step, `limit` compares with the shortest possible time. [The
# glossary](../tuning.md#glossary) has all words. `coba-triton bench --compare bench.json` says later whether something
# became slower.
