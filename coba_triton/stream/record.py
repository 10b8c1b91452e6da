"""What to keep of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..ops import validation

Variable = Literal["v", "g_e", "g_i"]
Members = slice | range | Sequence[int] | np.ndarray[Any, Any]


@dataclass(frozen=True)
class Record:
    """What to keep of a run.

    Attributes:
        spikes: whether to keep all spikes, with one bit for each neuron and step.
        variables: which traces to keep: ``v`` (mV), ``g_e``, ``g_i`` (uS, or nA where synapses are currents).
        neurons: the neurons whose traces are kept; if the neurons have several axes, they are counted over all axes.
        every: n, to keep the traces at the end of every n-th step only: at the times ``n dt``, ``2 n dt``, ...
        populations: neurons (a slice, a range, or indices) by name; the spikes of each population are counted in every step.
        inputs: whether to keep the excitatory and the inhibitory conductance in uS that the input adds in every step, as a
            mean over the neurons. Recurrent synapses are not part of it.
    """

    spikes: bool = True
    variables: Sequence[Variable] = ("v",)
    neurons: Sequence[int] = ()
    every: int = 1
    populations: Mapping[str, Members] = field(default_factory=dict)
    inputs: bool = False


def check_record(record: Any) -> None:
    """Refuse a record whose fields are of wrong types."""
    if not isinstance(record, Record):
        raise TypeError(f"record must be a Record or None, got {type(record).__name__}")
    for name, kinds in (("populations", Mapping), ("variables", Sequence)):
        if not isinstance(value := getattr(record, name), kinds) or isinstance(value, str):
            raise TypeError(f"record.{name} must be a {kinds.__name__.lower()}, got {type(value).__name__}")
    for name in record.populations:
        if not isinstance(name, str):
            raise TypeError(f"record.populations must have names, got {name!r:.50}; write it in quotes")
    for name in ("spikes", "inputs"):
        validation.check_flag(getattr(record, name), f"record.{name}")
