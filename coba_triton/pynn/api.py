"""PyNN's names, as every simulator of PyNN has them."""

from __future__ import annotations

from typing import Any

from pyNN import common, errors, random, space
from pyNN.network import Network
from pyNN.random import GSLRNG, NumpyRNG, RandomDistribution
from pyNN.recording import get_io
from pyNN.space import Space

from . import connectors, currents, simulator, standardmodels
from .control import (
    end,
    get_current_time,
    get_max_delay,
    get_min_delay,
    get_time_step,
    initialize,
    num_processes,
    rank,
    reset,
    run,
    run_for,
    run_until,
    setup,
)
from .populations import Assembly, Population, PopulationView
from .projections import Connection, Projection

set = common.set  # the name is PyNN's
create = common.build_create(Population)
connect = common.build_connect(Projection, connectors.FixedProbabilityConnector, standardmodels.StaticSynapse)
record = common.build_record(simulator)


def record_v(source: Any, filename: Any) -> None:
    """Record the membrane potential of a cell or of a group of cells to a file."""
    record("v", source, filename)


def record_gsyn(source: Any, filename: Any) -> None:
    """Record the conductances of a cell or of a group of cells to a file."""
    record(["gsyn_exc", "gsyn_inh"], source, filename)


def list_standard_models() -> list[str]:
    """The names of all cell types that this simulator has."""
    return [model.__name__ for model in (*standardmodels.MODELS, *standardmodels.SOURCES)]


CURRENTS = ("ACSource", "DCSource", "NoisyCurrentSource", "StepCurrentSource")
globals().update({name: getattr(connectors, name) for name in connectors.__all__})
globals().update({name: getattr(standardmodels, name) for name in standardmodels.__all__})
globals().update({name: getattr(currents, name) for name in CURRENTS})

__all__ = [
    "Assembly",
    "Connection",
    "GSLRNG",
    "Network",
    "NumpyRNG",
    "Population",
    "PopulationView",
    "Projection",
    "RandomDistribution",
    "Space",
    "connect",
    "create",
    "end",
    "errors",
    "get_current_time",
    "get_io",
    "get_max_delay",
    "get_min_delay",
    "get_time_step",
    "initialize",
    "list_standard_models",
    "num_processes",
    "random",
    "rank",
    "record",
    "record_gsyn",
    "record_v",
    "reset",
    "run",
    "run_for",
    "run_until",
    "set",
    "setup",
    "simulator",
    "space",
    *connectors.__all__,
    *standardmodels.__all__,
    *CURRENTS,
]
