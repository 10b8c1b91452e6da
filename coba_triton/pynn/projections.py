"""Projections: the synapses of each are four arrays, and PyNN's objects for single connections are made when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pyNN import common, errors
from pyNN.space import Space

from ..backend.cpu.sorting import Listed
from ..common.messages import logger
from . import simulator
from .engine import Array, Wires
from .standardmodels import SimpleStochasticSynapse, StaticSynapse

MOST_STEPS = 2**24 - 1  # of a delay: the network counts one more, of which a float32 still has all bits


class DelayError(errors.ConnectionError, ValueError):
    """A delay that a synapse cannot have."""


def check_weights(weights: Any, conductances: bool, inhibitory: bool) -> None:
    """Weights of conductances are not negative, whatever the receptor is; those of inhibitory currents are not positive."""
    values = np.asarray(weights, np.float64)
    if not conductances and inhibitory:
        wrong, what = values[~(np.isfinite(values) & (values <= 0))], "currents in nA and not positive where they inhibit"
    else:
        wrong = values[~(np.isfinite(values) & (values >= 0))]
        what = f"{'conductances in uS' if conductances else 'currents in nA'} and not negative"
    if wrong.size:
        raise errors.ConnectionError(
            f"weights must be finite {what}, got {wrong[0]:g}; say receptor_type= for the other sign"
        )


def delay_steps(delays: Any, dt: float) -> Array:
    """Delays in ms as whole numbers of steps: the nearest one, the larger one of two."""
    values = np.asarray(delays, np.float64)
    steps = np.floor(values / dt + 0.5 + 1e-9)
    short, long = values[~(steps >= 1)], values[steps > MOST_STEPS]
    if short.size:
        raise DelayError(f"a delay must be at least one time step of {dt:g} ms, got {short[0]:g} ms; lengthen it")
    if long.size:
        raise DelayError(
            f"a delay must be at most {MOST_STEPS:,} time steps of {dt:g} ms, got {long[0]:g} ms; shorten it, or make the "
            "time step longer"
        )
    return steps.astype(np.int32)


def check_probabilities(probabilities: Any) -> None:
    """Probabilities are from 0 to 1."""
    values = np.asarray(probabilities, np.float64)
    wrong = values[~((values >= 0) & (values <= 1))]
    if wrong.size:
        raise errors.InvalidParameterValueError(f"p must be a probability from 0 to 1, got {wrong[0]:g}")


def is_current(cells: Any) -> bool:
    """Whether cells are of the network of the last setup()."""
    roots = [getattr(part, "root", None) for part in getattr(cells, "populations", [cells])]
    return all(root is not None and root.engine is simulator.state.engine for root in roots)


class Connection(common.Connection):
    """A synapse, whose weight and delay can be read and set."""

    def __init__(self, projection: Projection, index: int) -> None:
        self.projection, self.index = projection, index

    @property
    def presynaptic_index(self) -> int:
        return int(self.projection.pre_indices[self.index])

    @property
    def postsynaptic_index(self) -> int:
        return int(self.projection.post_indices[self.index])

    @property
    def presynaptic_cell(self) -> Any:
        return self.projection.pre[self.presynaptic_index]

    @property
    def postsynaptic_cell(self) -> Any:
        return self.projection.post[self.postsynaptic_index]

    @property
    def weight(self) -> float:
        return float(self.projection.weights[self.index])

    @weight.setter
    def weight(self, value: float) -> None:
        self.projection.change("weight", value, self.index)

    @property
    def delay(self) -> float:
        return float(self.projection.delays[self.index])

    @delay.setter
    def delay(self, value: float) -> None:
        self.projection.change("delay", value, self.index)

    @property
    def p(self) -> float:
        """The probability that a spike is transmitted."""
        return float(self.projection.column("p")[self.index])

    @p.setter
    def p(self, value: float) -> None:
        self.projection.change("p", value, self.index)

    def as_tuple(self, *attribute_names: str) -> tuple[Any, ...]:
        """The values of these attributes, of which the addresses are indices."""
        return tuple(getattr(self, name) for name in attribute_names)


class Projection(common.Projection):
    __doc__ = common.Projection.__doc__

    _simulator = simulator
    _static_synapse_class = StaticSynapse

    def __init__(
        self,
        presynaptic_neurons: Any,
        postsynaptic_neurons: Any,
        connector: Any,
        synapse_type: Any = None,
        source: Any = None,
        receptor_type: str | None = None,
        space: Any = None,
        label: str | None = None,
    ) -> None:
        for population in getattr(postsynaptic_neurons, "populations", [postsynaptic_neurons]):
            if isinstance(population, common.BasePopulation) and not population.celltype.receptor_types:
                raise errors.ConnectionError(
                    f"{type(population.celltype).__name__} is a source of spikes and cannot receive any; let the projection "
                    "end at neurons"
                )
        for cells in (presynaptic_neurons, postsynaptic_neurons):
            if isinstance(cells, common.BasePopulation | common.Assembly) and not is_current(cells):
                raise errors.ConnectionError(
                    f"{cells.label} belongs to a network before the last setup(); make its populations anew after setup()"
                )
        space = Space() if space is None else space
        super().__init__(
            presynaptic_neurons, postsynaptic_neurons, connector, synapse_type, source, receptor_type, space, label
        )
        if not isinstance(self.synapse_type, StaticSynapse | SimpleStochasticSynapse):
            raise errors.InvalidModelError(
                "the synapse type must be StaticSynapse or SimpleStochasticSynapse of coba_triton.pynn, got "
                f"{type(self.synapse_type).__name__}"
            )
        self._engine = simulator.state.engine
        self.number, self.changes = simulator.state.projection_counter, 0
        simulator.state.projection_counter += 1
        self._inhibitory = self.receptor_type == "inhibitory"
        self._conductances = bool(self.post.conductance_based)
        self._numbers = [self._engine.codes[cells.all_cells.astype(np.int64)] for cells in (self.pre, self.post)]
        self._parts: list[tuple[Array, ...]] = []
        connector.connect(self)
        self._put_together()
        self._engine.projections.append(self)
        self._engine.wiring_changed = True

    # What connectors call

    def _convergent_connect(
        self, presynaptic_indices: Any, postsynaptic_index: int, location_selector: Any = None, **parameters: Any
    ) -> None:
        """Connect some cells to one; indices are those of the two groups of the projection."""
        pre = np.asarray(presynaptic_indices, np.int64)
        self.connect_arrays(pre, np.full(len(pre), postsynaptic_index), location_selector, **parameters)

    def connect_arrays(
        self, pre: Array, post: Array, location_selector: Any = None, weight: Any = 0.0, delay: Any = None, p: Any = 1.0
    ) -> None:
        """Make synapses from ``pre[k]`` to ``post[k]``; a weight, a delay or ``p`` is one for all, or one for each."""
        if location_selector is not None:
            raise NotImplementedError("neurons of coba_triton.pynn have no locations; leave location_selector out")
        if pre.size and not (pre.min() >= 0 and pre.max() < self.pre.size):
            raise errors.ConnectionError(
                f"there is no cell of index {pre.max()} among the {self.pre.size} of {self.pre.label}"
            )
        self._parts.append((pre, post, *(np.asarray(values, np.float64) for values in (weight, delay, p))))

    def _put_together(self) -> None:
        """Make one array of each column. What all synapses of a part share is looked at once."""
        parts, self._parts = self._parts, []
        dt, rounded = self._engine.dt, False
        steps = []
        for _, _, weight, delay, probability in parts:
            check_weights(weight, self._conductances, self._inhibitory)
            check_probabilities(probability)
            steps.append(delay_steps(delay, dt))
            rounded = rounded or bool(np.any(np.abs(steps[-1] * dt - delay) > 1e-6 * dt))

        def each(values: Sequence[Any], kind: Any) -> Array:
            columns = [np.broadcast_to(value, part[0].shape) for value, part in zip(values, parts, strict=True)]
            return np.concatenate([np.empty(0, kind), *columns], dtype=kind, casting="unsafe")

        pre, post, weights, _, probabilities = zip(*parts, strict=True) if parts else 5 * [()]
        self.pre_indices, self.post_indices = each(pre, np.int32), each(post, np.int32)
        self.weights, self.delay_steps = each(weights, np.float64), each(steps, np.int32)
        uncertain = isinstance(self.synapse_type, SimpleStochasticSynapse)
        self.probabilities: Array | None = each(probabilities, np.float64) if uncertain else None
        if rounded:
            logger.warning("delays of %s are rounded to multiples of the time step, %g ms", self.label, dt)

    # What the network reads

    def wires(self) -> Wires:
        """The synapses by the numbers of their cells."""
        sign = -1.0 if self._inhibitory and self._conductances else 1.0
        sources, neurons = self._numbers
        listed = Listed(self.pre_indices, self.post_indices, self.weights, self.delay_steps, sources, neurons, sign)
        return Wires(listed, self.probabilities, self.number, self.changes)

    # What users read and change

    def __len__(self) -> int:
        return len(self.pre_indices)

    def __getitem__(self, i: int) -> Connection:
        if not -len(self) <= i < len(self):
            raise IndexError(f"the projection has {len(self)} connections, there is none of index {i}")
        return Connection(self, i % len(self))

    @property
    def connections(self) -> Iterator[Connection]:
        """All connections, each made when it comes."""
        return (Connection(self, i) for i in range(len(self)))

    @property
    def delays(self) -> Array:
        """The delay of every connection in ms, a whole number of steps."""
        return np.round(self.delay_steps * self._engine.dt, 12)

    def change(self, name: str, values: Any, at: Any = slice(None)) -> None:
        """Give some connections other weights or delays, for spikes that are sent from now on."""
        if name == "weight":
            check_weights(values, self._conductances, self._inhibitory)
            self.weights[at] = values
        elif name == "delay":
            self.delay_steps[at] = delay_steps(values, self._engine.dt)
        else:
            column = self.column(name)
            check_probabilities(values)
            column[at] = values
        self.changes += 1
        self._engine.wiring_changed = True

    def _value_list_to_array(self, attributes: dict[str, Any]) -> dict[str, Any]:
        if any(isinstance(value, list) or getattr(value, "ndim", 0) == 1 for value in attributes.values()):
            changed: dict[str, Any] = super()._value_list_to_array(attributes)
            return changed
        return attributes  # without the dense matrix that PyNN makes here

    def _set_attributes(self, parameter_space: Any) -> None:
        for name, lazy in parameter_space.items():
            if lazy.is_homogeneous:
                self.change(name, lazy.evaluate(simplify=True))
            else:
                self.change(name, lazy.evaluate(simplify=False)[self.pre_indices, self.post_indices])

    def column(self, name: str) -> Array:
        """What every connection has by this name."""
        columns = {
            "presynaptic_index": "pre_indices", "postsynaptic_index": "post_indices", "weight": "weights", "delay": "delays",
        }  # fmt: skip
        if self.probabilities is not None:
            columns["p"] = "probabilities"
        if name not in columns:
            kind = type(self.synapse_type)
            raise errors.NonExistentParameterError(name, kind.__name__, list(kind.default_parameters))
        values: Array = getattr(self, columns[name])
        return values

    def _get_attributes_as_list(self, names: list[str]) -> list[tuple[Any, ...]]:
        return list(zip(*(self.column(name).tolist() for name in names), strict=True))

    def _get_attributes_as_arrays(self, names: list[str], multiple_synapses: str = "sum") -> list[Array]:
        pairs = self.pre_indices.astype(np.int64) * self.post.size + self.post_indices
        found = []
        for name in names:
            values = self.column(name)
            dense = np.full(self.pre.size * self.post.size, np.nan)
            if multiple_synapses == "last":
                dense[pairs] = values
            elif multiple_synapses == "first":
                dense[pairs[::-1]] = values[::-1]
            else:
                start = {"sum": 0.0, "min": np.inf, "max": -np.inf}[multiple_synapses]
                dense[pairs] = start
                {"sum": np.add, "min": np.minimum, "max": np.maximum}[multiple_synapses].at(dense, pairs, values)
            found.append(dense.reshape(self.pre.size, self.post.size))
        return found
