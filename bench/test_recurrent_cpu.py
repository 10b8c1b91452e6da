"""Recurrent networks on the CPU path against the eager loop of the reference; weights whose sums are exact.

python -m pytest bench/test_recurrent_cpu.py -s
"""

from __future__ import annotations

import pytest
import torch
from interleaved import compare
from torch import Tensor

from coba_triton import CobaLIFParameters, coba_lif_integral

NEURON = CobaLIFParameters(
    tau_syn_exc_inv=1 / 5,
    tau_syn_inh_inv=1 / 10,
    c_m_inv=1 / 0.2,
    g_l=0.01,
    e_rev_E=0.0,
    e_rev_I=-80.0,
    v_rest=-65.0,
    v_reset=-65.0,
    v_thresh=-50.0,
)
INPUTS = 100


@pytest.mark.parametrize(("steps", "batch", "neurons", "train"), [
    pytest.param(200, 32, 256, False, id="inference-256"),
    pytest.param(200, 32, 1024, False, id="inference-1024"),
    pytest.param(100, 1, 4000, False, id="inference-4000"),
    pytest.param(200, 32, 256, True, id="training-256"),
    pytest.param(100, 32, 1024, True, id="training-1024"),
])  # fmt: skip
def test_speed(steps: int, batch: int, neurons: int, train: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(steps, batch, INPUTS, generator=g) < 0.0025).float()
    w_in = torch.round(torch.rand(neurons, INPUTS, generator=g) * 2) / 1024
    w_rec = torch.round(torch.randn(neurons, neurons, generator=g)) / 2**18

    def run(backend: str) -> tuple[Tensor, Tensor]:
        weights = w_rec.clone().requires_grad_(train)
        spikes, _ = coba_lif_integral(x, None, w_in, weights, NEURON, 0.1, backend=backend)
        if not train:
            return spikes, spikes
        (gradient,) = torch.autograd.grad(spikes.sum(), weights)
        return spikes.detach(), gradient

    (expected, gradient), (spikes, ours) = run("reference"), run("cpu")
    assert torch.equal(spikes, expected)
    torch.testing.assert_close(ours, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
    title = f"{steps} steps of [{batch}, {neurons}], {expected.mean():.2%} spikes per neuron and step"
    compare(title, {name: lambda name=name: run(name)[1] for name in ("reference", "cpu")}, expected.numel())
