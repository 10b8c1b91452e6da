"""Time several calls in turns in one process, so that a busy machine slows all of them alike."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch

from coba_triton.tools.contenders import time_interleaved

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "7"))


def compare(title: str, runs: dict[str, Callable[[], Any]], neuron_steps: int) -> None:
    """Time the runs and print a row for each. The first run is the baseline.

    A row has the median time of a call, the spread (half the range between the quartiles), the time for one neuron and step,
    and how many times faster than the baseline the call is.
    """
    seconds = time_interleaved(runs, ROUNDS, torch.device("cpu"))
    machine = platform.processor() or platform.machine()
    print(f"\n{title} ({machine}, torch {torch.__version__}, {torch.get_num_threads()} threads)")
    baseline = statistics.median(next(iter(seconds.values())))
    for name, measured in seconds.items():
        low, median, high = statistics.quantiles(measured, n=4)
        print(
            f"  {name:11} {median * 1e3:9.2f} ms ± {(high - low) / 2e-3:.2f}  {median / neuron_steps * 1e9:7.2f} ns"
            f"  x{baseline / median:.1f}"
        )
