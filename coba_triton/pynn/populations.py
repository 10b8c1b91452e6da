"""Populations, views and assemblies: PyNN's objects, whose numbers are arrays in the population at the root."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np
from pyNN import common, errors
from pyNN.parameters import LazyArray, ParameterSpace, simplify

from . import simulator
from .engine import FIELDS, Array
from .recording import Recorder
from .standardmodels import MODELS, SOURCES, check_values
from .trains import DrawnTrains


class Assembly(common.Assembly):
    __doc__ = common.Assembly.__doc__

    _simulator = simulator

    @property
    def local_size(self) -> int:
        """How many cells there are; PyNN's connectors ask for it."""
        return int(self.size)

    @property
    def receptor_types(self) -> list[str]:
        """Those that all populations have, in the order of the first one: excitatory before inhibitory."""
        first, *others = (population.celltype.receptor_types for population in self.populations)
        return [name for name in first if all(name in known for known in others)]


class _OfView(MutableMapping[str, Any]):
    """The initial values of the cells of a view."""

    def __init__(self, view: PopulationView) -> None:
        self._root, self._at = view.grandparent, view.places

    def __getitem__(self, variable: str) -> Any:
        values = self._root.initial_values[variable].evaluate(simplify=False)
        return LazyArray(values[self._at], shape=(len(self._at),), dtype=float)

    def __setitem__(self, variable: str, value: Any) -> None:
        values = np.array(self._root.initial_values[variable].evaluate(simplify=False), float)
        values[self._at] = value.evaluate(simplify=False)
        self._root.initial_values[variable] = LazyArray(values, shape=(self._root.size,), dtype=float)

    def __delitem__(self, variable: str) -> None:
        raise TypeError("the initial values of a view cannot be deleted; set them with initialize()")

    def __iter__(self) -> Iterator[str]:
        return iter(self._root.initial_values)

    def __len__(self) -> int:
        return len(self._root.initial_values)


class _Cells:
    """What populations and views have in common: ``root`` has the arrays, and ``places`` are the cells' indices in it."""

    _simulator = simulator
    _assembly_class = Assembly
    celltype: Any
    size: int

    @property
    def root(self) -> Population:
        raise NotImplementedError(f"{type(self).__name__} must say whose arrays it uses")

    @property
    def places(self) -> Array:
        raise NotImplementedError(f"{type(self).__name__} must say which cells it has")

    def _get_view(self, selector: Any, label: str | None = None) -> PopulationView:
        return PopulationView(self, selector, label)

    def _get_parameters(self, *names: str) -> Any:
        for name in names:
            if name not in self.celltype.default_parameters:
                raise errors.NonExistentParameterError(
                    name, type(self.celltype).__name__, self.celltype.get_parameter_names()
                )
        values = {name: simplify(self.root.parameters[name][self.places]) for name in names}
        return ParameterSpace(values, shape=(self.size,))

    _get_native_parameters = _get_parameters  # native parameters have PyNN's names and units

    def _set_parameters(self, parameter_space: Any) -> None:
        parameter_space.evaluate(simplify=False)
        self.root.change(parameter_space.as_dict(), self.places)

    def _set_initial_value_array(self, variable: str, initial_values: Any) -> None:
        self.root.set_state(variable, self.places, initial_values.evaluate(simplify=False))


class Population(_Cells, common.Population):
    __doc__ = common.Population.__doc__

    _recorder_class = Recorder

    @property
    def root(self) -> Population:
        return self

    @property
    def places(self) -> Array:
        return np.arange(self.size)

    def _create_cells(self) -> None:
        state = simulator.state
        if self.size < 1:
            raise errors.InvalidDimensionsError(f"a population must have at least one cell, got {self.size}")
        kind = type(self.celltype)
        if kind not in MODELS and kind not in SOURCES:
            raise errors.InvalidModelError(
                f"a population must be of a cell type of coba_triton.pynn, got {kind.__module__}.{kind.__name__}; take one "
                f"of {', '.join(model.__name__ for model in (*MODELS, *SOURCES))} from coba_triton.pynn"
            )
        space = self.celltype.native_parameters
        space.shape = (self.size,)
        space.evaluate(simplify=False)
        self.parameters: dict[str, Array] = {
            name: np.broadcast_to(values, (self.size,)).copy() for name, values in space.as_dict().items()
        }
        check_values(self.celltype, self.parameters)
        self._first_number = state.id_counter
        self.is_source = kind in SOURCES
        if self.is_source:
            self.trains = self.celltype.trains(self._first_number, self.parameters)
            self.first = state.engine.add_sources(self.trains, self.size)
        else:
            self.first = state.engine.add_neurons(MODELS[kind], self.parameters, self.size)
        self.engine = state.engine
        self.all_cells = np.array([simulator.ID(i) for i in range(state.id_counter, state.id_counter + self.size)], object)
        for cell in self.all_cells:
            cell.parent = self
        self._mask_local = np.ones(self.size, bool)
        state.id_counter += self.size

    def change(self, parameters: dict[str, Any], places: Array) -> None:
        """Give some cells other parameters, from the next step on."""
        new = {name: values.copy() for name, values in self.parameters.items()}
        for name, values in parameters.items():
            new[name][places] = values
        check_values(self.celltype, new)
        if not self.is_source:
            self.parameters.update(new)
            self.engine.constants_changed = True
            return
        changed = self.celltype.trains(self._first_number, new)
        self.parameters.update(new)
        if isinstance(self.trains, DrawnTrains):
            self.trains.adopt(changed, self.engine.now * self.engine.dt)
        else:
            self.engine.replace_trains(self.trains, changed)
            self.trains = changed

    def set_state(self, variable: str, places: Array, values: Array) -> None:
        """Set a state variable of some cells, now and for every time that the clock is set back."""
        known = self.celltype.default_initial_values
        if variable not in known or variable not in FIELDS:
            raise errors.NonExistentParameterError(variable, type(self.celltype).__name__, known)
        if not np.isfinite(values).all():
            raise errors.InvalidParameterValueError(f"the initial values of {variable} must be finite, got {values}")
        self.engine.set_state(variable, self.first + places, np.broadcast_to(values, places.shape))

    def _set_cell_initial_value(self, id: Any, variable: str, value: float) -> None:
        super()._set_cell_initial_value(id, variable, value)
        self.set_state(variable, np.array([self.id_to_index(id)]), np.array([value], float))


class PopulationView(_Cells, common.PopulationView):
    __doc__ = common.PopulationView.__doc__

    @property
    def root(self) -> Population:
        root: Population = self.grandparent
        return root

    @property
    def places(self) -> Array:
        places: Array = self.index_in_grandparent(np.arange(self.size))
        return places

    @property
    def initial_values(self) -> Any:
        """The initial values of the cells of the view, by variable."""
        return _OfView(self)
