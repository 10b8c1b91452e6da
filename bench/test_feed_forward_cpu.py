"""The CPU path against the eager loop of the reference: one process, interleaved, equal results first.

    python -m pytest bench/test_feed_forward_cpu.py -s

A row gives the median time of a call, the spread (half the range between the quartiles), the time of one neuron for one
step, and how many times faster than the reference the call is.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from coba_triton import CobaLIFFeedForwardState, CobaLIFParameters, coba_lif_feed_forward_integral, unpack_spikes

# Most neurons fire in some steps and none in most: the regime of the tests.
NEURON = CobaLIFParameters(20.0, 12.5, 50.0, 0.25, -1.0, 0.6, -0.2, -0.7, -0.1, "super", 5.0)
STATE = CobaLIFFeedForwardState(-0.2, 0.0, 0.0)
DT = 0.01
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "7"))


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


@pytest.fixture(scope="module", autouse=True)
def machine() -> None:
    print(f"\n{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")


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
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            seconds[name].append(time.perf_counter() - start)
    baseline = statistics.median(seconds["reference"])
    print(f"\n{steps} steps of {list(shape)}")
    for name, measured in seconds.items():
        low, median, high = statistics.quantiles(measured, n=4)
        print(
            f"  {name:11} {median * 1e3:9.2f} ms ± {(high - low) / 2e-3:.2f}  {median / x.numel() * 1e9:7.2f} ns"
            f"  x{baseline / median:.1f}"
        )
