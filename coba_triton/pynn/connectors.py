"""Connectors that are PyNN's, and draw or list all synapses at once where the result need not be PyNN's number by number.

A connector that was given a generator of random numbers asks it for the numbers that PyNN's own one asks for, in its order:
the network is then the same in every simulator. Without one, the synapses follow from ``setup(rng_seed=...)``.
"""

from __future__ import annotations

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
    FixedNumberPostConnector,
    FixedNumberPreConnector,
    FixedTotalNumberConnector,
    FromFileConnector,
    FromListConnector,
    IndexBasedProbabilityConnector,
    SmallWorldConnector,
)

from . import simulator
from .engine import Array

ONE = {"low": 0, "high": 1}

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


def plain_parameters(connector: Any, projection: Any) -> dict[str, Any] | None:
    """The weight and the delay of all synapses; None where they are not one number each."""
    if connector.callback is not None and connector.callback.__class__.__name__ == "function":
        return None
    space = projection.synapse_type.native_parameters
    space.shape = projection.shape
    if not all(lazy.is_homogeneous for _, lazy in space.items()):
        return None
    return {name: lazy.evaluate(simplify=True) for name, lazy in space.items()}


def connect_all(connector: Any, projection: Any, pre: Array, post: Array, parameters: dict[str, Any]) -> None:
    projection.connect_arrays(pre, post, connector.location_selector, **parameters)
    if connector.callback is not None:
        connector.callback(1.0)


def some_of(count: int, probability: float, seed: list[int]) -> Array:
    """Which of ``count`` things are there, each with the same probability; ascending. Only those cost time."""
    if not probability > 0:
        return np.empty(0, np.int64)
    rng = np.random.default_rng(seed)
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
        parameters = plain_parameters(self, projection)
        if parameters is None or self.allow_self_connections not in (True, False):
            super().connect(projection)
            return
        pre, post = projection.shape
        sources, targets = np.tile(np.arange(pre), post), np.repeat(np.arange(post), pre)
        if not self.allow_self_connections:
            ids = (cells.all_cells.astype(np.int64) for cells in (projection.pre, projection.post))
            of_source, of_target = ids
            others = of_source[sources] != of_target[targets]
            sources, targets = sources[others], targets[others]
        connect_all(self, projection, sources, targets, parameters)


class OneToOneConnector(connectors.OneToOneConnector):
    __doc__ = connectors.OneToOneConnector.__doc__

    def connect(self, projection: Any) -> None:
        parameters = plain_parameters(self, projection)
        if parameters is None:
            super().connect(projection)
            return
        each = np.arange(min(projection.shape))
        connect_all(self, projection, each, each, parameters)


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
        parameters = plain_parameters(self, projection)
        if parameters is None or self.allow_self_connections is not True:
            super().connect(projection)
            return
        pre, post = projection.shape
        if self._drawn_here:
            pairs = some_of(pre * post, self.p_connect, [simulator.state.engine.seed, 2**31 + projection.number])
            targets, sources = np.divmod(pairs, pre)
        elif type(self.rng) is not random.NumpyRNG:
            super().connect(projection)
            return
        else:  # a column of numbers for each target; PyNN's own connector draws them from a copy of the generator, too
            rng = deepcopy(self.rng)
            columns = [np.flatnonzero(rng.next(pre, "uniform", ONE) < self.p_connect) for _ in range(post)]
            sources = np.concatenate([np.empty(0, np.int64), *columns])
            targets = np.repeat(np.arange(post), [len(column) for column in columns])
        connect_all(self, projection, sources, targets, parameters)
