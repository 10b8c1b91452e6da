"""What a result keeps of a run, to know its network, its input and its versions again."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.versions import package_version
from ..ops.grid import PART, weights_of
from ..ops.synapses import Synapses
from .store import checksum


def checksum_of(x: Tensor) -> int:
    """The checksum of a block of input."""
    from ..backend.cpu.launch import row_sums

    return checksum(row_sums(x.detach().cpu()))


def sums_of(synapses: Synapses) -> dict[str, int]:
    """What is kept of synapses to know them again: their number, and sums modulo 2**64 of a hash of each one.

    The sums have no order, and those of several parts of a network add up to those of the network. ``connections`` is of
    sources and targets, and the others are of these with the weight or with the delay.
    """
    sums = {name: np.zeros((), np.uint64) for name in ("connections", "weights", "delays")}
    numbers = torch.arange(synapses.sources, device=synapses.indptr.device).unsqueeze(1)
    delays = torch.full((1,), -1.0) if synapses.delays is None else synapses.delays

    def hashed(hashes: Any, values: Tensor) -> Any:
        return _mixed(hashes ^ values.detach().double().cpu().numpy().view(np.uint64))

    for begin in range(0, synapses.count, PART):
        here = begin, min(begin + PART, synapses.count)
        pairs = hashed(np.uint64(0), synapses.targets[slice(*here)])
        pairs = hashed(pairs, weights_of(numbers, synapses.indptr, *here))
        sums["connections"] += pairs.sum(dtype=np.uint64)
        for name, values in (("weights", synapses.weights), ("delays", delays)):
            sums[name] += hashed(pairs, weights_of(values, synapses.indptr, *here)).sum(dtype=np.uint64)
    return {"synapses": synapses.count} | {name: int(total) for name, total in sums.items()}


def _mixed(numbers: Any) -> Any:
    """A hash of 64 bits of each number, the finalizer of SplitMix64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on, by name."""
    found = {"python": platform.python_version()}
    for package in ("coba-triton", "torch", "numpy", "triton", "zarr"):
        if installed := package_version(package):
            found[package.replace("-", "_")] = installed
    return found
