"""``torch.set_num_threads`` holds for everything that computes on the CPU: no more threads work for a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from coba_triton import (
    CobaLIF,
    CobaLIFParameters,
    CobaLIFRecurrent,
    Normal,
    Synapses,
    coba_lif_feed_forward_integral,
    coba_lif_integral,
    default_learning_parameters,
)
from coba_triton.backend.cpu import launch
from coba_triton.ops import random_synapses

TASKS = Path("/proc/self/task")
IDLE = 2e-3  # a thread that only waits for work takes less time than this, in s
P = CobaLIFParameters(v_thresh=-50.0, v_rest=-60.0, v_reset=-60.0)


def feed_forward() -> Callable[[], object]:
    x = torch.rand(1000, 8192) * 0.1
    return lambda: coba_lif_feed_forward_integral(x, None, P, 0.1)


def feed_forward_training() -> Callable[[], object]:
    x = torch.rand(500, 8, 1024, requires_grad=True)
    layer = CobaLIF(default_learning_parameters, return_state=False)
    return lambda: layer(x).sum().backward()


def recurrent(train: bool = False, rate: float = 0.05) -> Callable[[], object]:
    layer = CobaLIFRecurrent(64, 512, return_state=False)
    x = (torch.rand(400, 8, 64) < rate).float()

    def call() -> None:
        with torch.set_grad_enabled(train):
            spikes = layer(x)
            if train:
                spikes.sum().backward()

    return call


def sparse(train: bool = False, batch: int = 1, neurons: int = 4000) -> Callable[[], object]:
    inputs = Synapses.fixed_probability(20, neurons, 0.1, 0.01, seed=2)
    recurrent = Synapses.fixed_probability(neurons, neurons, 0.02, Normal(0.01, 0.002), 0.3, seed=1)
    if train:
        recurrent = recurrent.with_weights(recurrent.weights.clone().requires_grad_())
    x = (torch.rand(200, batch, 20) < 0.2).float()

    def call() -> None:
        spikes, _ = coba_lif_integral(x, None, inputs, recurrent, P, 0.1)
        if train:
            spikes.sum().backward()

    return call


PATHS: dict[str, Callable[[], Callable[[], object]]] = {
    "feed-forward": feed_forward,
    "feed-forward training": feed_forward_training,
    "recurrent": recurrent,
    "recurrent, dense input": lambda: recurrent(rate=0.9),
    "recurrent training": lambda: recurrent(train=True),
    "sparse, one row": sparse,
    "sparse, eight rows": lambda: sparse(batch=8, neurons=1000),
    "sparse training": lambda: sparse(train=True, batch=48, neurons=500),
}


pytestmark = pytest.mark.filterwarnings("ignore:the neurons of:UserWarning")  # they fire too often


@pytest.fixture(autouse=True)
def shared_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that share a row go on to do so, also while something else keeps the cores."""
    monkeypatch.setattr(launch.sparse, "LONG_WAITS", 2**40)
    monkeypatch.setattr(launch.sparse, "_alone_until", 0.0)


def settle(call: Callable[[], object]) -> None:
    """Load the kernels; threads of an earlier number of threads come to rest."""
    call()
    time.sleep(0.1)


@pytest.mark.parametrize("path", PATHS)
def test_one_thread_is_the_one_that_calls(path: str) -> None:
    """No other thread takes time, also none that ends with the call."""
    torch.manual_seed(0)
    call = PATHS[path]()
    torch.set_num_threads(1)
    settle(call)
    before, own = time.process_time(), time.thread_time()
    call()
    own = time.thread_time() - own
    assert own > IDLE
    assert time.process_time() - before - own < IDLE


def run_times() -> dict[str, float]:
    """For how many seconds each thread of this process has run."""
    return {task.name: int((task / "schedstat").read_text().split()[0]) / 1e9 for task in TASKS.iterdir()}


@pytest.mark.skipif(not TASKS.exists(), reason="Linux tells for how long each thread has run")
@pytest.mark.parametrize("most", [2, 3])
@pytest.mark.parametrize("path", PATHS)
def test_as_many_threads_work_as_pytorch_may_use(path: str, most: int) -> None:
    torch.manual_seed(0)
    call = PATHS[path]()
    torch.set_num_threads(most)
    settle(call)
    before = run_times()
    for _ in range(5):
        call()
    workers = sum(seconds - before.get(thread, 0.0) > IDLE for thread, seconds in run_times().items())
    assert workers == most


@pytest.mark.parametrize("most", [1, 2, 3])
def test_random_synapses_are_drawn_by_as_many_threads(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = []

    def pool(workers: int) -> ThreadPoolExecutor:
        pools.append(workers)
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(random_synapses, "ThreadPoolExecutor", pool)
    torch.set_num_threads(most)
    Synapses.fixed_probability(8000, 8000, 0.001, Normal(1.0, 0.1), seed=1)
    assert pools == [most]
