"""The CPU path against the eager loop of the reference: one process, interleaved, equal results first.

python -m pytest bench/test_feed_forward_cpu.py -s
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interleaved import compare
from torch import Tensor

from coba_triton import CobaLIFFeedForwardState, CobaLIFParameters, coba_lif_feed_forward_integral, unpack_spikes

# Most neurons fire in some steps and none in most: the regime of the tests.
NEURON = CobaLIFParameters(20.0, 12.5, 50.0, 0.25, -1.0, 0.6, -0.2, -0.7, -0.1, "super", 5.0)
STATE = CobaLIFFeedForwardState(-0.2, 0.0, 0.0)
DT = 0.01


def infer(x: Tensor, backend: str, spike_dtype: torch.dtype | str | None = None) -> Tensor:
    with torch.no_grad():
        return coba_lif_feed_forward_integral(x, STATE, NEURON, DT, backend=backend, spike_dtype=spike_dtype)[0]


def train(x: Tensor, backend: str) -> Tensor:
    x = x.detach().requires_grad_()
    spikes, state = coba_lif_feed_forward_integral(x, STATE, NEURON, DT, backend=backend)
    (gradient,) = torch.autograd.grad(spikes.sum() + state.v.sum(), x)
    return gradient


INFERENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "reference": lambda x: infer(x, "reference"),
    "cpu": lambda x: infer(x, "cpu"),
    "cpu, uint8": lambda x: infer(x, "cpu", torch.uint8),
    "cpu, bits": lambda x: infer(x, "cpu", "bits"),
}
TRAINING: dict[str, Callable[[Tensor], Tensor]] = {
    "reference": lambda x: train(x, "reference"),
    "cpu": lambda x: train(x, "cpu"),
}


@pytest.mark.parametrize(("runs", "steps", "shape"), [
    pytest.param(INFERENCE, 1000, (1, 1000), id="inference-small"),
    pytest.param(INFERENCE, 1000, (32, 1024), id="inference-medium"),
    pytest.param(INFERENCE, 60, (256, 4096), id="inference-large"),
    pytest.param(TRAINING, 1000, (1, 1000), id="training-small"),
    pytest.param(TRAINING, 300, (32, 1024), id="training-medium"),
    pytest.param(TRAINING, 20, (256, 4096), id="training-large"),
])  # fmt: skip
def test_speed(runs: dict[str, Callable[[Tensor], Tensor]], steps: int, shape: tuple[int, int]) -> None:
    x = 0.35 * torch.randn(steps, *shape, generator=torch.Generator().manual_seed(0))
    expected = runs["reference"](x)
    for name, run in runs.items():
        result = run(x)
        result = unpack_spikes(result, steps, expected.dtype) if result.dtype == torch.int32 else result
        assert torch.equal(result.to(expected.dtype), expected), name
    compare(f"{steps} steps of {list(shape)}", {name: lambda run=run: run(x) for name, run in runs.items()}, x.numel())
