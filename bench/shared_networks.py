"""Time a sparse network whose neurons are divided among processes, and draw a model of many more processes.

    torchrun --standalone --nproc-per-node 2 bench/shared_networks.py --neurons 10000
    python bench/shared_networks.py --model docs/processes.png

The first command gives every process so many neurons, each with 100 synapses of the whole network, and prints for several
shortest delays the time of a step, the time of the exchange of spikes alone, and the memory of a process. Run it with one
process as well: that is weak scaling. The second one draws a calculation, not a measurement; its numbers are at the top.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from coba_triton import CobaLIFParameters, Synapses, distributed
from coba_triton.distributed.ranks import Ranks
from coba_triton.stream.plotting import NEUTRAL, OTHER, OURS
from coba_triton.tools.problems import SPARSE_VALUES

DT = 0.1  # ms
FAN_IN = 100
ROUNDS = 5
# The numbers of the model, in seconds and bytes.
RATE = 10.0  # Hz of every neuron
NEURON = 8e-9  # a neuron and step
SPIKE = 20e-9  # to find a spike in what was received, and its synapses
SYNAPSE = 2e-9
MESSAGE = 5e-6  # what a message costs the processor
LATENCY = 20e-6  # from one machine to another
BANDWIDTH = 10e9  # bytes a second, of a machine


def step_seconds(ranks: int, neurons: int, delay: int) -> float:
    """The model: seconds a step of ``neurons`` on each of ``ranks``, with a shortest delay of ``delay`` steps.

    Every rank sends its spikes to each other one, as a list or as bits, once in the shortest delay; nothing overlaps.
    """
    spikes = ranks * neurons * RATE * DT / 1000  # of the whole network in a step
    compute = neurons * NEURON + spikes * (SPIKE + FAN_IN / ranks * SYNAPSE)
    own = min(4 * spikes / ranks, neurons / 8) * delay
    exchange = 0.0 if ranks == 1 else LATENCY + (ranks - 1) * (MESSAGE + own / BANDWIDTH)
    return compute + exchange / delay


def draw(out: Path) -> None:
    figure = Figure((11, 4), 120, layout="constrained")
    counts = [2**k for k in range(13)]
    for panel, neurons in zip(figure.subplots(1, 2), (10_000, 1_000_000), strict=True):
        for delay, color in ((1, NEUTRAL), (2, OTHER), (20, OURS)):
            times = [1e6 * step_seconds(ranks, neurons, delay) for ranks in counts]
            panel.loglog(counts, times, ".-", color=color, label=f"shortest delay {delay} step{'s' * (delay > 1)}")
        alone = neurons * NEURON + neurons * RATE * DT / 1000 * FAN_IN * SYNAPSE
        panel.axhline(1e6 * alone, color="black", lw=0.8, ls=":", label="one rank without an exchange")
        panel.set(xlabel="processes", ylabel="us a step", title=f"{neurons:,} neurons on each, calculated")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    figure.suptitle(
        f"A model, not measured: {RATE:g} Hz, {FAN_IN} synapses a neuron, {1e6 * LATENCY:g} us latency, "
        f"{1e6 * MESSAGE:g} us a message, {BANDWIDTH / 1e9:g} GB/s"
    )
    figure.savefig(out)
    print(f"Wrote {out}")


def measure(per_rank: int, steps: int) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    neurons = per_rank * ranks
    own = distributed.owned_neurons(neurons)
    only = own.start, own.stop
    p = CobaLIFParameters(**SPARSE_VALUES)
    inputs = Synapses.fixed_number(1000, neurons, 100, 3e-4, seed=1, only=only)
    x = (torch.rand(steps, 1000, generator=torch.Generator().manual_seed(0)) < 0.0025).float()
    for delay in (1, 2, 10, 20):
        synapses = Synapses.fixed_number(neurons, neurons, FAN_IN, 2e-6, delay * DT, seed=2, only=only)
        times, spikes = [], torch.zeros(0)
        for _ in range(ROUNDS + 1):
            dist.barrier()
            began = time.perf_counter()
            spikes, _ = distributed.coba_lif_integral(x, None, inputs, synapses, p, DT, spike_dtype=torch.uint8)
            times.append(time.perf_counter() - began)
        exchange = Ranks(None)
        exchange.divide(neurons)
        alone = []
        for begin in range(0, steps - delay, delay):
            part = spikes[begin : begin + delay].unsqueeze(1)
            began = time.perf_counter()
            exchange.send_spikes(part)()
            alone.append(time.perf_counter() - began)
        took = sorted(1e6 * t / steps for t in times[1:])
        if rank == 0:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            rate = float(spikes.float().mean()) / DT * 1000
            print(
                f"{ranks} processes of {per_rank:,} neurons, {rate:.1f} Hz, shortest delay {delay}: "
                f"{statistics.median(took):.0f} [{took[0]:.0f}, {took[-1]:.0f}] us a step; an exchange "
                f"{1e6 * statistics.median(alone):.0f} us, {1e6 * statistics.median(alone) / delay:.0f} us a step; synapses "
                f"{synapses.nbytes / 2**20:.1f} MiB, process {memory / 2**10:.0f} MiB",
                flush=True,
            )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=10_000, help="of every process (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--model", type=Path, help="draw the model to this file, and measure nothing")
    options = parser.parse_args()
    if options.model is not None:
        draw(options.model)
    else:
        measure(options.neurons, options.steps)


if __name__ == "__main__":
    main()
