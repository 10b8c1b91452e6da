"""Connectors that are PyNN's, and draw or list all synapses at once where the result need not be PyNN's number by number.

A connector that was given a generator of random numbers asks it for the numbers that PyNN's own one asks for, in its order:
the network is then the same in every simulator. Without one, those of this module draw from ``setup(rng_seed=...)``.
"""

from __future__ import annotations

import itertools
from copy import deepcopy
from typing import Any

import numpy as np
from pyNN import connectors, random
from pyNN.connectors import (
    ArrayConnector,
    CloneConnector,
    CSAConnector,
    DisplacementDependentProbabilityConnector,
    DistanceDependentProbabilityConnector,
    FixedTotalNumberConnector,
    FromFileConnector,
    FromListConnector,
    IndexBasedProbabilityConnector,
    SmallWorldConnector,
)

from . import simulator
from .engine import Array

ONE = {"low": 0, "high": 1}
DRAWN_TOGETHER = 2**15  # numbers, which the nearest caches hold

__all__ = [
    "AllToAllConnector",
    "ArrayConnector",
    "CSAConnector",
    "CloneConnector",
    "DisplacementDependentProbabilityConnector",
    "DistanceDependentProbabilityConnector",
    "FixedNumberPostConnector",
    "FixedNumberPreConnector",
    "FixedProbabilityConnector",
    "FixedTotalNumberConnector",
    "FromFileConnector",
    "FromListConnector",
    "IndexBasedProbabilityConnector",
    "OneToOneConnector",
    "SmallWorldConnector",
]


def connect_pairs(connector: Any, projection: Any, sources: Array, targets: Array) -> None:
    """Connect ``sources[k]`` to ``targets[k]``, ascending; weights and delays are those of the synapse type."""
    space = projection.synapse_type.native_parameters
    space.shape = projection.shape
    if all(lazy.is_homogeneous for _, lazy in space.items()):
        values = {name: lazy.evaluate(simplify=True) for name, lazy in space.items()}
        projection.connect_arrays(sources, targets, connector.location_selector, **values)
        if connector.callback is not None:
            connector.callback(1.0)
        return
    bounds = np.searchsorted(targets, np.arange(projection.post.size + 1))
    columns = [sources[begin:end] for begin, end in itertools.pairwise(bounds)]
    connector._standard_connect(projection, lambda mask=None: iter(columns))  # which evaluates what each synapse has


def without_self(projection: Any, sources: Array, targets: Array) -> tuple[Array, Array]:
    """Those pairs that are two cells."""
    of_source, of_target = (cells.all_cells.astype(np.int64) for cells in (projection.pre, projection.post))
    others = of_source[sources] != of_target[targets]
    return sources[others], targets[others]


def generator(projection: Any) -> np.random.Generator:
    """What a projection draws from if its connector was given no generator."""
    return np.random.default_rng([simulator.state.engine.seed, 2**31 + projection.number])


def some_of(count: int, probability: float, rng: np.random.Generator) -> Array:
    """Which of ``count`` things are there, each with the same probability; ascending. Only those cost time."""
    if not probability > 0:
        return np.empty(0, np.int64)
    found, last = [np.empty(0, np.int64)], -1
    while last < count - 1:
        expected = (count - 1 - last) * probability
        gaps = rng.geometric(min(probability, 1.0), int(expected + 6 * expected**0.5) + 16)
        found.append(last + np.cumsum(gaps))
        last = int(found[-1][-1])
    everything = np.concatenate(found)
    return everything[: np.searchsorted(everything, count)]


class AllToAllConnector(connectors.AllToAllConnector):
    __doc__ = connectors.AllToAllConnector.__doc__

    def connect(self, projection: Any) -> None:
        pre, post = projection.shape
        sources, targets = np.tile(np.arange(pre), post), np.repeat(np.arange(post), pre)
        if not self.allow_self_connections:
            sources, targets = without_self(projection, sources, targets)
        connect_pairs(self, projection, sources, targets)


class OneToOneConnector(connectors.OneToOneConnector):
    __doc__ = connectors.OneToOneConnector.__doc__

    def connect(self, projection: Any) -> None:
        each = np.arange(min(projection.shape))
        connect_pairs(self, projection, each, each)


class FixedProbabilityConnector(connectors.FixedProbabilityConnector):
    __doc__ = connectors.FixedProbabilityConnector.__doc__

    def __init__(
        self,
        p_connect: float,
        allow_self_connections: Any = True,
        location_selector: Any = None,
        rng: Any = None,
        safe: bool = True,
        callback: Any = None,
    ) -> None:
        super().__init__(p_connect, allow_self_connections, location_selector, rng, safe, callback)
        self._drawn_here = rng is None

    def connect(self, projection: Any) -> None:
        numpys = type(self.rng) is random.NumpyRNG
        if self.allow_self_connections not in (True, False) or not numpys:
            super().connect(projection)
            return
        pre, post = projection.shape
        if self._drawn_here:
            targets, sources = np.divmod(some_of(pre * post, self.p_connect, generator(projection)), pre)
        else:  # a column of numbers for each target; PyNN's own connector draws them from a copy of the generator, too
            rng, together = deepcopy(self.rng), max(1, DRAWN_TOGETHER // pre)
            found = [np.empty(0, np.int64)]
            for begin in range(0, post, together):
                columns = min(together, post - begin)
                found.append(np.flatnonzero(rng.next(columns * pre, "uniform", ONE) < self.p_connect) + begin * pre)
            targets, sources = np.divmod(np.concatenate(found), pre)
        if not self.allow_self_connections:
            sources, targets = without_self(projection, sources, targets)
        connect_pairs(self, projection, sources, targets)


class _FixedNumber:
    """Connectors that choose the same number of partners for each cell."""

    n: Any
    allow_self_connections: Any
    with_replacement: bool

    def __init__(
        self,
        n: Any,
        allow_self_connections: Any = True,
        with_replacement: bool = False,
        location_selector: Any = None,
        rng: Any = None,
        safe: bool = True,
        callback: Any = None,
    ) -> None:
        arguments = n, allow_self_connections, with_replacement, location_selector, rng, safe, callback
        super().__init__(*arguments)  # type: ignore[call-arg]  # the next class is PyNN's
        self._drawn_here = rng is None and isinstance(n, int) and allow_self_connections in (True, False)

    def chosen(self, projection: Any, cells: int, partners: int) -> Array | None:
        """The partners of each cell, ``[cells, n]``; None where PyNN's own connector is to choose them."""
        selfless = not self.allow_self_connections and projection.pre == projection.post
        most = partners - selfless
        if not self._drawn_here or (self.n > most and not self.with_replacement):
            return None
        rng = generator(projection)
        if self.with_replacement:
            found = rng.integers(0, most, (cells, self.n))
        else:
            found = np.array([rng.choice(most, self.n, replace=False, shuffle=False) for _ in range(cells)], np.int64)
            found = found.reshape(cells, self.n)
        if selfless:  # those after a cell itself move up
            found += found >= np.arange(cells)[:, np.newaxis]
        return found


class FixedNumberPreConnector(_FixedNumber, connectors.FixedNumberPreConnector):
    __doc__ = connectors.FixedNumberPreConnector.__doc__

    def connect(self, projection: Any) -> None:
        pre, post = projection.shape
        chosen = self.chosen(projection, post, pre)
        if chosen is None:
            super().connect(projection)
            return
        connect_pairs(self, projection, np.sort(chosen, 1).reshape(-1), np.repeat(np.arange(post), chosen.shape[1]))


class FixedNumberPostConnector(_FixedNumber, connectors.FixedNumberPostConnector):
    __doc__ = connectors.FixedNumberPostConnector.__doc__

    def connect(self, projection: Any) -> None:
        pre, post = projection.shape
        chosen = self.chosen(projection, pre, post)
        if chosen is None:
            super().connect(projection)
            return
        targets, sources = chosen.reshape(-1), np.repeat(np.arange(pre), chosen.shape[1])
        order = np.argsort(targets, kind="stable")
        connect_pairs(self, projection, sources[order], targets[order])
