"""The grid on which the weights of sparse synapses are added up, so that a sum has no order.

A weight becomes an integer, times a power of two for each sign. Sums of integers are exact in any order, whatever the number
of threads, programs or processes. A sum is rounded once, when it becomes the drive of a neuron.

The power is the finest at which the largest sum of any neuron fits: that of the magnitudes of all its synapses of one sign.
A float32 weight of more than ``2**-38`` of that sum is on the grid as it is; a smaller one is rounded to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .kept import Kept, contents_of
from .tensors import is_watched

# The largest sum is below two to this number: one bit is the sign's, and one is spare for weights that are rounded up.
SUM_BITS = {torch.int64: 62, torch.int32: 30}
# The powers of two of which a number of each dtype, and its inverse, has all bits.
MOST_BITS = {torch.float32: 126, torch.float64: 1000}
# Synapses that are looked at together, to bound the scratch.
PART = 2**22
COUNTED_FROM = 2**14  # synapses that the CPU kernels add up: fewer are not worth it to load them


class Grid(NamedTuple):
    """How weights become integers.

    Attributes:
        scales: of the compute dtype, ``[4]``: what a weight is multiplied with, if it is excitatory and if it is inhibitory;
            then the inverses of both. All of them are powers of two, or NaN if a weight is not finite.
        sums: dtype of the sums, int64, or int32 where all weights and sums are exact in it as well.
    """

    scales: Tensor
    sums: torch.dtype


def weights_of(weights: Tensor, indptr: Tensor, begin: int, end: int) -> Tensor:
    """The weights ``[S]``, ``[K, 1]`` or ``[1]`` of the synapses from ``begin`` to ``end``."""
    if weights.dim() == 2:
        counts = indptr.clamp(begin, end).diff()
        return torch.repeat_interleave(weights[:, 0], counts, output_size=end - begin)
    return weights.expand(end - begin) if weights.shape[0] == 1 else weights[begin:end]


def _bit_length(count: Tensor) -> Tensor:
    """The least ``e`` with ``count < 2**e``, of integers below ``2**63``."""
    high, low = torch.frexp((count >> 31).double())[1], torch.frexp((count & (2**31 - 1)).double())[1]
    return torch.where(high > 0, high + 31, low)


_fan_ins: Kept[Tensor] = Kept()


def _largest_fan_in(targets: Tensor, neurons: int) -> Tensor:
    """The bits of the largest number of synapses onto one neuron, kept until the targets change."""
    if is_watched():
        return _count_fan_in(targets, neurons)
    return _fan_ins.get(targets, (), (neurons, contents_of(targets)), lambda: _count_fan_in(targets, neurons))


def _count_fan_in(targets: Tensor, neurons: int) -> Tensor:
    fan_in = torch.zeros(neurons, dtype=torch.int64, device=targets.device)
    one = torch.ones((), dtype=torch.int64, device=targets.device)
    for begin in range(0, len(targets), PART):  # not bincount, which reads the largest target back from a GPU
        part = targets[begin : begin + PART]
        fan_in.index_add_(0, part, one.expand(len(part)))
    return _bit_length(fan_in.amax() if neurons else fan_in.new_zeros(()))


def make_grid(
    weights: Tensor,
    indptr: Tensor,
    targets: Tensor,
    neurons: int,
    narrow: bool,
    greatest: Callable[[Tensor], Tensor] = lambda numbers: numbers,
) -> Grid:
    """The grid of the synapses of one projection.

    Args:
        weights: in uS, of the compute dtype, ``[S]``, ``[K, 1]`` or ``[1]``.
        indptr, targets: as :class:`coba_triton.Synapses` has them.
        neurons: N.
        narrow: take int32 sums where they are exact. This looks at the weights, for which the host waits.
        greatest: the greatest of such numbers in all processes, where these are the synapses of one of several.
    """
    device, dtype = weights.device, weights.dtype
    limit = MOST_BITS[dtype]
    largest = torch.zeros(2, dtype=torch.float64, device=device)
    if weights.numel():
        largest = torch.stack([weights.amax(), -weights.amin()]).clamp(min=0).double()
    largest = greatest(largest.nan_to_num(nan=math.inf, posinf=math.inf))
    finite = torch.isfinite(largest).all()
    largest = torch.where(finite, largest, 0.0)
    parts = [(begin, min(begin + PART, len(targets))) for begin in range(0, len(targets), PART)]
    most = _largest_fan_in(targets, neurons)
    # first a coarse grid, from the largest weight and the largest number of synapses
    bits = SUM_BITS[torch.int64]
    coarse = bits - 2 - torch.frexp(largest)[1] - greatest(most)
    if device.type == "cpu" and len(targets) >= COUNTED_FROM and not is_watched():
        from ..backend.cpu.magnitudes import magnitudes_of

        scale = torch.ldexp(torch.ones(2, dtype=torch.float64), coarse).numpy()
        numbers, starts, onto = (tensor.contiguous().numpy() for tensor in (weights, indptr, targets))
        sums = torch.from_numpy(magnitudes_of(numbers, starts, onto, neurons, scale))
    else:
        rows = [torch.zeros(neurons, dtype=torch.int64, device=device)] * 2
        for begin, end in parts:
            part = weights_of(weights, indptr, begin, end).double()
            index = targets[begin:end].long()
            for sign in range(2):  # not in place, as weights of several samples have a row each
                magnitudes = torch.ldexp(torch.relu(-part if sign else part), coarse[sign])
                rows[sign] = rows[sign].index_add(0, index, torch.ceil(magnitudes).long())
        sums = torch.stack(rows)
    found = greatest(sums.amax(1) if neurons else sums.new_zeros(2))
    power = torch.where(found > 0, coarse + bits - _bit_length(found), 0).clamp(-limit, limit)
    width = torch.int64
    if narrow:
        fewer = (power - (bits - SUM_BITS[torch.int32])).clamp(-limit, limit)
        used = weights[indptr.diff() > 0, 0] if weights.dim() == 2 else weights
        if not parts or all(_is_exact(part, fewer) for part in used.split(PART)):
            power, width = fewer, torch.int32
    ones = torch.ones_like(power, dtype=torch.float64)
    scales = torch.cat([torch.ldexp(ones, power), torch.ldexp(ones, -power)])
    return Grid(torch.where(finite, scales, torch.nan).to(dtype), width)


def _is_exact(weights: Tensor, power: Tensor) -> bool:
    """Whether weights are whole numbers of ``2**-power``."""
    scaled = torch.ldexp(weights.double().abs(), torch.where(weights < 0, power[1], power[0]))
    return bool((scaled == torch.round(scaled)).all())


_grids: Kept[Grid] = Kept()


def grid_of(weights: Tensor, indptr: Tensor, targets: Tensor, neurons: int, spikes: bool = True) -> Grid:
    """:func:`make_grid`, kept until the weights change.

    Weights that are learned have int64 sums: no host waits for them. So have those that may carry other numbers than
    ``spikes``, whose products are rounded to the grid: no result depends on the width.
    """
    learned = weights.requires_grad or not spikes

    def make() -> Grid:
        with torch.no_grad():
            return make_grid(weights.detach(), indptr, targets, neurons, not learned)

    if is_watched() or (weights.requires_grad and not weights.is_cpu):
        return make()  # their numbers are taken to be new every time
    return _grids.get(weights, (indptr, targets), (neurons, learned, contents_of(weights)), make)
