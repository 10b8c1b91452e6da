"""Time a recurrent network whose neurons are divided among processes: steps per second, and the cost of the exchange.

    torchrun --standalone --nproc-per-node 2 bench/neuron_parallel.py --neurons 4000
    torchrun --standalone --nproc-per-node 8 bench/neuron_parallel.py --neurons 100000 --device cuda

Every process draws the weights of its own neurons; they do not depend on the number of processes. With --compare the first
process also runs the whole network, and every process compares its spikes with those, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from coba_triton import CobaLIFParameters, PoissonSource, coba_lif_integral, distributed
from coba_triton.distributed.ranks import Ranks
from coba_triton.tools.problems import SPARSE_VALUES

DT = 0.1  # ms
INPUTS = 100
EXCITATORY = 0.8  # of the neurons


def draw_weights(rows: range, neurons: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Input and recurrent weights of some neurons in uS. Each row is drawn by itself. The transposes are contiguous."""
    g = torch.Generator()
    w_in, w_rec = torch.empty(INPUTS, len(rows)), torch.empty(neurons, len(rows))
    for k, neuron in enumerate(rows):
        g.manual_seed(neuron)
        w_in[:, k] = torch.rand(INPUTS, generator=g) * 1e-3
        w_rec[:, k] = torch.rand(neurons, generator=g) / neurons / 100
    w_rec[round(EXCITATORY * neurons) :] *= -4 * EXCITATORY / (1 - EXCITATORY)
    return w_in.to(device).t(), w_rec.to(device).t()


def seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """The seconds that a second call takes, and its result. The first call compiles."""
    run()
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: gloo, cuda: nccl")
    parser.add_argument("--compare", action="store_true", help="with the whole network in one process")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, neurons, steps, batch = dist.get_rank(), options.neurons, options.steps, options.batch
    x = PoissonSource(25.0, steps, (batch, INPUTS), DT, seed=1)[:].to(device)
    p = CobaLIFParameters(**SPARSE_VALUES)
    own = distributed.owned_neurons(neurons)

    def show(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    weights = draw_weights(range(neurons)[own], neurons, device)
    dist.barrier()
    took, (words, _) = seconds(lambda: distributed.coba_lif_integral(x, None, *weights, p, DT, spike_dtype="bits"), device)
    del weights
    spikes = sum((words >> bit & 1).sum() for bit in range(32))
    dist.all_reduce(spikes)
    rate = float(spikes) / (neurons * batch * steps)
    show(
        f"{neurons} neurons x {batch} rows, {rate:.2%} spikes per neuron and step; {dist.get_world_size()} processes, "
        f"{torch.get_num_threads()} threads each: {steps / took:.0f} steps a second, {took / steps * 1e6:.0f} us a step"
    )
    ranks = Ranks(None)
    ranks.divide(neurons)
    z = torch.zeros(batch, words.shape[-1], dtype=torch.uint8, device=device)
    took, _ = seconds(lambda: [ranks.gather_spikes(z) for _ in range(steps)], device)
    show(f"packing, gathering and unpacking {ranks.share * batch} bits a process alone: {took / steps * 1e6:.0f} us a step")
    if options.compare:
        whole = torch.empty(*words.shape[:2], neurons, dtype=torch.int32, device=device)
        if rank == 0:
            weights = draw_weights(range(neurons), neurons, device)
            run = lambda: coba_lif_integral(x, None, *weights, p, DT, spike_dtype="bits", path="events", out=whole)  # noqa: E731
            took, _ = seconds(run, device)
            show(f"one process: {steps / took:.0f} steps a second, {took / steps * 1e6:.0f} us a step")
        dist.broadcast(whole, 0)
        differ = torch.count_nonzero(whole[..., own] != words)
        dist.all_reduce(differ)
        show(f"words of 32 steps that differ: {int(differ)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
