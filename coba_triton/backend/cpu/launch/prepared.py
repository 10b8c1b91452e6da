"""Sparse synapses in the forms that the CPU kernels take, kept until the synapses change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ....ops.call import Projection, SparseNetwork
from ....ops.kept import Kept
from .. import sparse
from .shared import (
    array_of,
    nothing,
)

T = TypeVar("T")

# Synapses that are prepared to be gone over many times, and kept until their weights change: 8 to 28 bytes each.
PREPARED_AT_MOST = 2**22
# A place has so many bits at the most, half of a link's 64: then the lowest part of a weight's units fits beside it.
PLACE_BITS = 32
# A call with at least so many steps, those of all batch rows added up, prepares the synapses.
MANY_STEPS = 256
_prepared: Kept[tuple[Any, Any]] = Kept()
_linked: Kept[sparse.Links] = Kept()
NO_LINKS = sparse.Links(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64), 0, True)
_splits: Kept[Any] = Kept()


def _split_synapses(synapses: Projection, neurons: int, parts: int, share: int) -> Any:
    """Where the synapses of every source onto the neurons of each part begin and end, int64 ``[parts + 1, K]``."""

    def make() -> Any:
        if parts == 1:
            return np.stack([array_of(synapses.indptr[:-1]), array_of(synapses.indptr[1:])])
        bounds = np.minimum(np.arange(parts + 1) * share, neurons)
        splits = np.empty((parts + 1, len(synapses.indptr) - 1), np.int64)
        sparse.splits_kernel()(array_of(synapses.indptr), array_of(synapses.targets), bounds, splits)
        return splits

    return _splits.get(synapses.indptr, (synapses.targets,), (parts, share, neurons), make)


def _sharing(numbers: Tensor, synapses: int) -> int:
    """Whether all synapses share a number (0), those of a source do (1), or each has its own (2)."""
    return 1 if numbers.dim() == 2 else 0 if len(numbers) == 1 and synapses != 1 else 2


def wires_of(synapses: Projection | None, net: SparseNetwork, parts: int = 1, share: int = 0) -> sparse.Wires:
    if synapses is None:
        empty = nothing(1, net.dtype)
        none = nothing(1, torch.float32)
        return sparse.Wires(nothing(2, torch.int64), nothing(1, torch.int32), empty, 0, none, 0, np.float32(1), empty)
    count, delays = len(synapses.targets), synapses.delays
    return sparse.Wires(
        _split_synapses(synapses, net.neurons, parts, share),
        array_of(synapses.targets),
        array_of(synapses.weights).reshape(-1),
        _sharing(synapses.weights, count),
        nothing(1, torch.float32) if delays is None else array_of(delays).reshape(-1),
        0 if delays is None else _sharing(delays, count),
        np.float32(net.per_ms),
        array_of(synapses.grid.scales),
    )


def _prepare(made: Kept[T], synapses: Projection, fits: tuple[Any, ...], make: Callable[[], T]) -> T:
    """Find what was ``made`` of synapses for the use that ``fits`` names, or make it now.

    It is kept for the next time, unless there are too many synapses.
    """
    if len(synapses.targets) > PREPARED_AT_MOST:
        return make()
    return made.get(synapses.weights, _others(synapses), fits, make)


def _others(synapses: Projection) -> tuple[Tensor | None, ...]:
    """What synapses are prepared from, beside their weights. While these are the same, their grid is, and no other one."""
    return synapses.indptr, synapses.targets, synapses.delays, synapses.grid.scales


def paths_of(synapses: Projection | None, net: SparseNetwork) -> sparse.Paths:
    """Synapses prepared for the backward."""
    if synapses is None:
        return sparse.Paths(np.zeros(1, np.int64), np.empty(0, np.uint32), nothing(1, net.dtype))
    count = len(synapses.targets)
    own = _sharing(synapses.weights, count) == 2  # numbers of their own are read where they are

    def make() -> tuple[Any, Any]:
        places, copies = np.empty(count, np.uint32), torch.empty(0 if own else count, dtype=net.dtype).numpy()
        sparse.paths_kernel()(wires_of(synapses, net), net.neurons, places, copies)
        return places, copies

    places, copies = _prepare(_prepared, synapses, (net.neurons, net.per_ms), make)
    return sparse.Paths(array_of(synapses.indptr), places, array_of(synapses.weights).reshape(-1) if own else copies)


def bits_for_places(net: SparseNetwork) -> int:
    """How many bits the largest place of a synapse between neurons needs; see :class:`.sparse.Links`."""
    return (2 * (net.longest + 1) * net.neurons - 1).bit_length()


def links_of(net: SparseNetwork, wires: sparse.Wires, share: int) -> sparse.Links:
    """The synapses between neurons prepared for many steps, onto each ``share`` of the neurons."""
    parts, sources, bits = len(wires.splits) - 1, wires.splits.shape[1], bits_for_places(net)

    def make() -> sparse.Links:
        most = 2 * len(wires.targets) + 2 * (sparse.ABREAST - 1) * parts * sources + 1
        shapes = ((parts * sources + 1, np.int64), (parts * sources, np.int64), (most, np.uint64))
        starts, middles, numbers = (np.empty(length, kind) for length, kind in shapes)
        moved = net.recurrent.grid.sums == torch.int32  # their units have few bits
        count, alike = sparse.links_kernel()(wires, net.neurons, bits, moved, starts, middles, numbers)
        return sparse.Links(starts, middles, numbers[:count], bits, alike)

    return _prepare(_linked, net.recurrent, _fits_links(net, parts, share), make)


def kept_links(net: SparseNetwork) -> sparse.Links:
    """Those for all neurons that a call of many steps or a backward has kept. If there are none, they are not made."""
    return _linked.find(net.recurrent.weights, _others(net.recurrent), _fits_links(net, 1, net.neurons)) or NO_LINKS


def _fits_links(net: SparseNetwork, parts: int, share: int) -> tuple[Any, ...]:
    return net.neurons, net.per_ms, bits_for_places(net), parts, share


def rows_of_events(net: SparseNetwork, x: Tensor, drive: Tensor | None) -> Any:
    """The dense weights ``[I, N]`` that the kernels sum up themselves from the events of ``x``; none if there is a drive."""
    if net.input_rows is None or drive is not None or x.shape[-1] == 0:
        return nothing(2, net.dtype)
    return array_of(net.input_rows)
