"""Time few neurons over many steps on the CPU: in order, and in the chunks of time that are chosen.

    python bench/few_neurons.py --neurons 1 8 64 --steps 1000000 --threads 2
    python bench/few_neurons.py --neurons 1 8 64 --inputs irregular --what training learning

Both run in turns in one process, with a check that all bits are equal, and write into buffers that are reused. "irregular"
is excitatory and inhibitory Poisson input, "regular" a constant input that neurons answer with a constant rate, "always" one
that makes them fire in every step. "training" is a forward and a backward with the gradient by the input, "learning" one
with gradients by the parameters of each neuron as well. Each line gives the median and the range of the milliseconds and of
the ratios. With ``--cpu-time``, on one thread, these are times of the processor, which other processes change less.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import coba_triton
from coba_triton import CobaLIFParameters, coba_lif_feed_forward_integral

P = CobaLIFParameters(
    tau_syn_exc_inv=1 / 5,
    tau_syn_inh_inv=1 / 10,
    c_m_inv=1 / 0.2,
    g_l=0.01,
    e_rev_I=-80.0,
    e_rev_E=0.0,
    v_rest=-65.0,
    v_reset=-65.0,
    v_thresh=-50.0,
)
DT = 0.1  # ms
INPUTS = ("irregular", "regular", "always")
WHAT = ("float32", "bits", "training", "learning")


def make_input(kind: str, steps: int, neurons: int) -> Tensor:
    """In uS, ``[steps, neurons]``."""
    if kind == "regular":
        return (0.0002 * torch.linspace(0.8, 1.2, neurons)).repeat(steps, 1)
    if kind == "always":
        return torch.full((steps, neurons), 0.5)
    events = (torch.rand(steps, neurons, generator=torch.Generator().manual_seed(seed)) < 0.05 for seed in (0, 1))
    excitatory, inhibitory = (event.float() for event in events)
    return 0.006 * excitatory - 0.0066 * inhibitory


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def simulate(x: Tensor, packed: bool, chunks: int | None, out: Tensor) -> list[Tensor]:
    """One run; returns all that it computes."""
    spike_dtype = "bits" if packed else None
    spikes, state = coba_lif_feed_forward_integral(
        x, None, P, DT, backend="cpu", spike_dtype=spike_dtype, out=out, time_chunks=chunks
    )
    return [spikes, *state]


def train(x: Tensor, learns: bool, chunks: int | None, gradient: Tensor) -> list[Tensor]:
    """One forward and one backward from the ``gradient`` by the spikes; returns the gradients."""
    x = x.detach().requires_grad_()
    learned = [torch.full((x.shape[1],), value, requires_grad=True) for value in P[:9]] if learns else []
    p = CobaLIFParameters(*(learned or P[:9]), method="triangle", alpha=0.1)
    spikes, _ = coba_lif_feed_forward_integral(x, None, p, DT, backend="cpu", time_chunks=chunks)
    return list(torch.autograd.grad(spikes, [x, *learned], gradient))


def compare(x: Tensor, what: str, rounds: int, clock: Callable[[], float]) -> str:
    """The times of both, which must have the same bits."""
    times: dict[int | None, list[float]] = {1: [], None: []}
    if what in ("training", "learning"):
        run, flag = train, what == "learning"
        buffers = dict.fromkeys(times, torch.rand(x.shape, generator=torch.Generator().manual_seed(2)))
    else:
        run, flag = simulate, what == "bits"
        shape, dtype = ((-(-len(x) // 32), x.shape[1]), torch.int32) if flag else (tuple(x.shape), torch.float32)
        buffers = {chunks: torch.empty(shape, dtype=dtype) for chunks in times}
    results = {}
    for number in range(rounds + 1):
        for chunks, buffer in buffers.items():
            start = clock()
            results[chunks] = run(x, flag, chunks, buffer)
            if number:  # the first time, kernels may be compiled
                times[chunks].append(1e3 * (clock() - start))
        for ours, theirs in zip(results[None], results[1], strict=True):
            if not torch.equal(ours, theirs):
                raise SystemExit("the bits differ")
    ratios = [order / cut for order, cut in zip(times[1], times[None], strict=True)]
    return f"in order {spread(times[1])} ms, in chunks {spread(times[None])} ms, ratio {spread(ratios)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--cpu-time", action="store_true", help="times of the processor, on one thread")
    asked = parser.parse_args()
    threads = 1 if asked.cpu_time else asked.threads
    torch.set_num_threads(threads)
    print(f"coba_triton {coba_triton.__version__}, torch {torch.__version__}, {platform.processor() or platform.machine()}")
    print(f"{asked.steps} steps of {DT} ms, {threads} threads, {'processor' if asked.cpu_time else 'wall'} time")
    clock = time.thread_time if asked.cpu_time else time.perf_counter
    for neurons in asked.neurons:
        for kind in asked.inputs:
            x = make_input(kind, asked.steps, neurons)
            spikes, _ = coba_lif_feed_forward_integral(x, None, P, DT, backend="cpu", time_chunks=1)
            rate = float(spikes.mean()) / DT * 1e3
            for what in asked.what:
                result = compare(x, what, asked.rounds, clock)
                print(f"{neurons} neurons, {kind}, {rate:.0f} Hz, {what}: {result}", flush=True)


if __name__ == "__main__":
    main()
