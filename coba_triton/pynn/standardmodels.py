"""The cell types and synapse types of PyNN that this simulator has, and those that it has not.

:data:`MODELS` is the table of cell types with neurons: how the parameters of each become those of this package's neuron.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import numpy as np
from pyNN import errors
from pyNN.standardmodels import StandardCellType, build_translations, cells, receptors, synapses

from ..parameter_sets import from_pynn
from . import simulator
from .engine import Array, Model
from .trains import (
    DrawnTrains,
    GammaTrains,
    InhomogeneousGammaTrains,
    ListedTrains,
    PoissonTrains,
    RefractoryPoissonTrains,
)

MUST_BE_POSITIVE = ("cm", "tau_m", "tau_syn_E", "tau_syn_I", "alpha", "beta")
MUST_NOT_BE_NEGATIVE = ("tau_refrac", "rate", "duration")


def _same_names(model: Any) -> dict[str, Any]:
    """Translations that keep PyNN's names and units."""
    translations: dict[str, Any] = build_translations(*((name, name) for name in model.default_parameters))
    return translations


def check_values(celltype: Any, parameters: dict[str, Array]) -> None:
    """Refuse parameters with which no cell can run, in PyNN's own class of errors."""
    kind = type(celltype).__name__
    for name, values in parameters.items():
        if values.dtype == object:
            continue
        if not np.isfinite(values).all():
            raise errors.InvalidParameterValueError(
                f"{name} of {kind} must be finite, got {values[~np.isfinite(values)][0]}"
            )
        low = values.min() if values.size else np.inf
        if name in MUST_BE_POSITIVE and not low > 0:
            raise errors.InvalidParameterValueError(f"{name} of {kind} must be positive, got {low:g}")
        if name in MUST_NOT_BE_NEGATIVE and low < 0:
            raise errors.InvalidParameterValueError(f"{name} of {kind} must not be negative, got {low:g}")


class IF_cond_exp(cells.IF_cond_exp):
    __doc__ = cells.IF_cond_exp.__doc__

    translations = _same_names(cells.IF_cond_exp)


class IF_curr_exp(cells.IF_curr_exp):
    __doc__ = cells.IF_curr_exp.__doc__

    translations = _same_names(cells.IF_curr_exp)
    recordable: ClassVar[list[str]] = ["spikes", "v", "isyn_exc", "isyn_inh"]


# How the parameters of a cell type, float64 ``[n]`` by PyNN's names, become those of this package's neuron.
MODELS: dict[type[Any], Model] = {
    cell: functools.partial(from_pynn, model=cell.__name__) for cell in (IF_cond_exp, IF_curr_exp)
}


class SpikeSourceArray(cells.SpikeSourceArray):
    __doc__ = cells.SpikeSourceArray.__doc__

    translations = _same_names(cells.SpikeSourceArray)

    def trains(self, number: int, parameters: dict[str, Array]) -> ListedTrains:
        """What a population of such sources sends."""
        every = [np.asarray(sequence.value, np.float64) for sequence in parameters["spike_times"]]
        for times in every:
            if times.ndim != 1 or not np.isfinite(times).all() or (np.diff(times) < 0).any() or (times < 0).any():
                raise errors.InvalidParameterValueError(
                    f"spike_times of SpikeSourceArray must be times from 0 on in ascending order, got {times}"
                )
        return ListedTrains(every, simulator.state.dt)


class _Drawn:
    """A source that draws its spikes."""

    kind: type[DrawnTrains]

    def trains(self, number: int, parameters: dict[str, Array]) -> DrawnTrains:
        """What a population of such sources sends; ``number`` is that of its first cell."""
        engine = simulator.state.engine
        trains = self.kind((engine.seed, number), engine.dt, engine.segment, simulator.state.t)
        vars(trains).update(parameters)
        return trains


class SpikeSourcePoisson(_Drawn, cells.SpikeSourcePoisson):
    __doc__ = cells.SpikeSourcePoisson.__doc__

    translations = _same_names(cells.SpikeSourcePoisson)
    kind = PoissonTrains


class SpikeSourcePoissonRefractory(_Drawn, cells.SpikeSourcePoissonRefractory):
    __doc__ = cells.SpikeSourcePoissonRefractory.__doc__

    translations = _same_names(cells.SpikeSourcePoissonRefractory)
    kind = RefractoryPoissonTrains

    def trains(self, number: int, parameters: dict[str, Array]) -> DrawnTrains:
        rate, silent = parameters["rate"], parameters["tau_refrac"]
        if (rate * silent >= 1000.0).any():
            raise errors.InvalidParameterValueError(
                f"rate of SpikeSourcePoissonRefractory must be below 1 / tau_refrac, got {rate.max():g} Hz and up to "
                f"{silent.max():g} ms"
            )
        return super().trains(number, parameters)


class SpikeSourceGamma(_Drawn, cells.SpikeSourceGamma):
    __doc__ = cells.SpikeSourceGamma.__doc__

    translations = _same_names(cells.SpikeSourceGamma)
    kind = GammaTrains


class SpikeSourceInhGamma(_Drawn, cells.SpikeSourceInhGamma):
    __doc__ = cells.SpikeSourceInhGamma.__doc__

    translations = _same_names(cells.SpikeSourceInhGamma)
    kind = InhomogeneousGammaTrains

    def trains(self, number: int, parameters: dict[str, Array]) -> DrawnTrains:
        for each in zip(*(parameters[name] for name in ("a", "b", "tbins")), strict=True):
            a, b, tbins = (np.asarray(sequence.value, np.float64) for sequence in each)
            if not (len(a) == len(b) == len(tbins) > 0):
                raise errors.InvalidParameterValueError(
                    "a, b and tbins of SpikeSourceInhGamma must be sequences of one length, at least 1, got "
                    f"{len(a)}, {len(b)} and {len(tbins)}"
                )
            if not (np.isfinite(tbins).all() and (np.diff(tbins) > 0).all()):
                raise errors.InvalidParameterValueError(f"tbins of SpikeSourceInhGamma must increase, got {tbins} ms")
            if not ((a >= 1) & np.isfinite(a)).all():
                raise errors.InvalidParameterValueError(
                    f"a of SpikeSourceInhGamma must be at least 1, where the process has a greatest rate, got {a}"
                )
            if not ((b > 0) & np.isfinite(b)).all():
                raise errors.InvalidParameterValueError(f"b of SpikeSourceInhGamma must be positive, in s, got {b}")
        return super().trains(number, parameters)


SOURCES = (SpikeSourceArray, SpikeSourcePoisson, SpikeSourcePoissonRefractory, SpikeSourceGamma, SpikeSourceInhGamma)


class _Synapse:
    """A synapse that is given no delay has the least one."""

    def _get_minimum_delay(self) -> float:
        state = simulator.state
        return state.dt if state.least_delay is None else state.least_delay


class StaticSynapse(_Synapse, synapses.StaticSynapse):
    __doc__ = synapses.StaticSynapse.__doc__

    translations = _same_names(synapses.StaticSynapse)


class SimpleStochasticSynapse(_Synapse, synapses.SimpleStochasticSynapse):
    __doc__ = synapses.SimpleStochasticSynapse.__doc__

    translations = _same_names(synapses.SimpleStochasticSynapse)


_HAVE = (
    f"coba_triton has the cell types {', '.join(model.__name__ for model in (*MODELS, *SOURCES))}, the synapse types "
    "StaticSynapse and SimpleStochasticSynapse, and the current sources DCSource, StepCurrentSource, ACSource and "
    "NoisyCurrentSource"
)


def _not_here(base: Any) -> type[Any]:
    """A class of a standard model's name that says, when it is asked for, what there is instead."""
    name = base.__name__

    def refuse(self: Any, *args: Any, **parameters: Any) -> None:
        raise NotImplementedError(f"{name} is not available in coba_triton.pynn: {_HAVE}; use one of these")

    # not a subclass: code that looks for the cell types of a simulator does not find it
    return type(name, (), {"__init__": refuse, "__doc__": f"Not available; {_HAVE}.", "__module__": __name__})


def _missing() -> dict[str, type[Any]]:
    """All standard models of PyNN that are not defined above, by name."""
    found: dict[str, type[Any]] = {}
    for module in (cells, synapses, receptors):
        for name, value in vars(module).items():
            of_module = isinstance(value, type) and value.__module__ == module.__name__
            if of_module and not name.startswith("_") and name not in globals():
                found[name] = _not_here(value)
    return found


MISSING = _missing()
AVAILABLE = {model.__name__: model for model in (*MODELS, *SOURCES, StaticSynapse, SimpleStochasticSynapse)}
globals().update(MISSING)

__all__ = ["StandardCellType", *AVAILABLE, *MISSING]
