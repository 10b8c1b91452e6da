"""Time training through sparse synapses on the CPU beside the same weights as a dense matrix.

    python bench/sparse_training.py --rounds 21

Forward and back through 200 steps of 32 batch rows by default, with dense weights from 100 inputs, of which a tenth sends in
a step. The weights of the inputs set how often the neurons fire: there is a line for each ``--input-scale``. Both run in
turns in one process, and every figure is a median with the least and the greatest value. A ratio is that of two runs that
follow each other. Times are those of the processor, which other processes change less than those of the clock.

The two do not have the same bits: sums through sparse synapses are exact, and those of a matrix are rounded at each
addition. So the spikes of both are compared, and a line says in which share of all steps of all neurons they are equal.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

import coba_triton
from coba_triton import CobaLIFParameters, coba_lif_integral

DT = 0.001  # ms


def spread(values: Sequence[float], digits: int = 0) -> str:
    least, middle, most = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} [{least}, {most}]"


def train(x: Tensor, input_weights: Tensor, weights: Tensor) -> tuple[Tensor, float, float]:
    """The spikes, and the seconds of the processor for the forward and for the way back."""
    inputs, recurrent = (given.clone().requires_grad_() for given in (input_weights, weights))
    begin = time.process_time()
    spikes, _ = coba_lif_integral(x, None, inputs, recurrent, CobaLIFParameters(), DT, backend="cpu")
    middle = time.process_time()
    spikes.sum().backward()
    end = time.process_time()
    assert recurrent.grad is not None and inputs.grad is not None
    return spikes.detach(), middle - begin, end - middle


def compare(x: Tensor, input_weights: Tensor, weights: Tensor, rounds: int) -> str:
    """A line of the table."""
    forms = {"sparse": weights.to_sparse_csr(), "dense": weights}
    first = {name: train(x, input_weights, form)[0] for name, form in forms.items()}  # compiles
    equal = float((first["sparse"] == first["dense"]).float().mean())
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            seconds[name].append(train(x, input_weights, form)[1:])
    a_step = 1e6 / len(x)
    cells = [f"{100 * float(first['sparse'].mean()):.2g} %"]
    for name in forms:
        cells += [spread([a_step * run[part] for run in seconds[name]]) for part in range(2)]
    ratios = [sum(dense) / sum(own) for dense, own in zip(seconds["dense"], seconds["sparse"], strict=True)]
    return "  ".join(f"{cell:>18}" for cell in (*cells, spread(ratios, 2), f"{100 * equal:.4g} %"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=1024, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--inputs", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--density", type=float, default=0.1, help="of the recurrent synapses (%(default)s)")
    parser.add_argument("--input-scale", type=float, nargs="+", default=[0.05, 0.13, 0.3], help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    n, inputs = options.neurons, options.inputs
    weights = torch.randn(n, n) * 0.01 * (torch.rand(n, n) < options.density)
    input_weights = torch.randn(n, inputs).abs() * 0.06
    x = (torch.rand(options.steps, options.batch, inputs) < 0.1).float()
    print(f"coba_triton {coba_triton.__version__}, torch {torch.__version__}, {platform.processor() or platform.machine()}")
    print(f"{options.steps} steps of {options.batch} x {n}, {int(weights.count_nonzero())} synapses")
    print("microseconds of the processor for a step")
    titles = ("spikes", "sparse: forward", "back", "dense: forward", "back", "dense / sparse", "equal spikes")
    print("  ".join(f"{title:>18}" for title in titles))
    for scale in options.input_scale:
        print(compare(x, scale * input_weights, weights, options.rounds), flush=True)


if __name__ == "__main__":
    main()
