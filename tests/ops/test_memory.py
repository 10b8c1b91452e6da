"""Memory of large outputs goes from one output to the next, and never to two at once."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from coba_triton import CobaLIFParameters, coba_lif_feed_forward_integral
from coba_triton.ops import memory
from helpers.bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("own_garbage")
STEPS, NEURONS = 2000, 300


@pytest.fixture(autouse=True)
def _nothing_kept():
    memory.release()
    yield
    memory.release()


def spikes(seed: int = 0) -> torch.Tensor:
    x = torch.rand(STEPS, NEURONS, generator=torch.Generator().manual_seed(seed))
    return coba_lif_feed_forward_integral(x, None, CobaLIFParameters(), 0.001, backend="cpu")[0]


def test_a_dropped_output_gives_its_memory_to_the_next() -> None:
    first = spikes()
    kept, at = first.clone(), first.data_ptr()
    del first
    second = spikes(1)
    assert second.data_ptr() == at
    assert_same_bits(spikes(), kept)


@pytest.mark.parametrize("hold", [lambda z: z[5:7, 3], lambda z: z.numpy(), lambda z: z.view(torch.int32).detach()])
def test_whatever_still_reads_an_output_keeps_its_memory(hold) -> None:
    first = spikes()
    part, at = hold(first), first.data_ptr()
    before = part.copy() if hasattr(part, "copy") else part.clone()
    del first
    gc.collect()
    second = spikes(1)
    assert second.data_ptr() != at
    assert bool((part == before).all())
    del part, second
    gc.collect()
    assert len(memory._unused) == 2


def test_no_more_than_documented_is_kept() -> None:
    outputs = [memory.empty((20 << 20,), torch.uint8) for _ in range(5)]
    outputs.append(memory.empty((memory.KEPT + 1,), torch.uint8))
    del outputs
    assert [block.nbytes for block in memory._unused] == 3 * [20 << 20]
    small = memory.empty((1 << 20,), torch.float64)  # 8 MB do not take a block of 20
    assert len(memory._unused) == 3
    del small
    assert sum(block.nbytes for block in memory._unused) <= memory.KEPT
    memory.release()
    assert not memory._unused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.bool])
def test_outputs_are_ordinary_tensors(dtype: torch.dtype) -> None:
    made = memory.empty((1 << 11, 1 << 10), dtype)
    assert made.dtype == dtype and made.is_contiguous() and not made._is_view() and made.data_ptr() % 64 == 0
    made.fill_(1)
    assert bool(made.all())
    if dtype.is_floating_point:
        weight = torch.ones((), dtype=dtype, requires_grad=True)
        made.mul_(weight).sum().backward()
        assert weight.grad is not None


def test_threads_never_share_a_block() -> None:
    failures = []

    def work(number: int) -> None:
        for k in range(50):
            made = memory.empty((1 << 18,), torch.float32)
            made.fill_(64 * number + k)
            if not bool((made == 64 * number + k).all()):
                failures.append((number, k))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
