"""``coba-triton simulate --keys``: every key of a configuration, with its unit, its default and its meaning.

The keys, units and defaults are those of the tables in :mod:`coba_triton.cli.config`; here are the meanings.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic_core import PydanticUndefined
from rich.table import Table

from . import config
from .config import Config, Unit

# What a key means, by its name, or by its table and its name where it means something else there.
MEANINGS = {
    "description": "one line about the configuration",
    "notes": "what to know about it; copied to summary.json",
    "dt": "time step",
    "duration": "time to simulate, a whole number of steps",
    "block_steps": "steps in a block, rounded up to a multiple of 32; by default a block takes 64 MiB",
    "order": "whether a conductance decays before its input arrives, or after it",
    "backend": "what computes: auto, cpu, triton or reference",
    "device": "a device of PyTorch; auto: the GPU if Triton has one, else the CPU",
    "count": "number of neurons",
    "tau_syn_exc": "time constant of the excitatory synapses",
    "tau_syn_inh": "time constant of the inhibitory synapses",
    "c_m": "capacitance of the membrane",
    "g_l": "leak conductance",
    "e_rev_E": "reversal potential of excitation; required where synapses are conductances",
    "e_rev_I": "reversal potential of inhibition; required where synapses are conductances",
    "synapses": "what a spike adds to; with current every weight is a current, such as 0.1 nA",
    "v_rest": "resting potential",
    "v_reset": "potential after a spike",
    "v_thresh": "threshold",
    "refractory": "time for which a neuron is held at v_reset after a spike",
    "i_offset": "constant current into every neuron",
    "v_init": "potential at the start, by default v_rest; or a table of a range, see below",
    "Population.name": "name of the population",
    "Population.neurons": "the first neuron and the one after the last, such as [160, 200]",
    "kind": "which input it is",
    "seed": "seed of the random numbers, any whole number",
    "rate": "rate of the spikes of every neuron or channel",
    "weight": "what a spike adds to a conductance or a current; for a file, what the number 1 in it stands for",
    "excitatory": "a table of its own, see below; one of the two may be left out",
    "inhibitory": "a table of its own, see below; one of the two may be left out",
    "path": "file, relative to the configuration",
    "array": "which array of an .npz; needed if it has several",
    "start": "time in the recording or in the lists at which the run begins",
    "EventsInput.first": "number that the first neuron has in the lists; NEST's have 1",
    "EventSpikes.first": "number that the first channel has in the lists",
    "threshold": "step of the delta encoder; without a unit if the recording has none",
    "source": "where the signal or the spikes come from",
    "FanOut.weight": "mean of the weights, which have an exponential distribution",
    "EventFile.path": "file or list of files, relative to the configuration",
    "EventSpikes.path": "file or list of files, relative to the configuration",
    "Projection.source": 'population of the sources, or "all others"; by default all neurons',
    "FileProjection.source": 'population of the sources, or "all others"; by default all neurons',
    "target": 'population of the targets, or "all others"; by default all neurons',
    "receptor": "whether the synapses excite or inhibit",
    "signal": "the recording, a table of its own, see below",
    "sampling_rate": "samples per second of the recording",
    "unit": "unit of the recording; without it the numbers have none",
    "provenance": "where the recording comes from; copied to summary.json",
    "channels": "number of channels",
    "stop": "no spikes from then on",
    "spikes": "a table of its own, see below",
    "fan_out": "the synapses from the channels to the neurons, see below",
    "more": "further groups of channels, each with spikes and fan_out",
    "probability": "probability of a synapse, from 0 to 1",
    "number": "number of synapses of every target, instead of probability",
    "per": "whether number is that of every target or of every source",
    "several": "whether a pair may have several of the number of synapses",
    "autapses": "whether a neuron may have a synapse to itself",
    "excitatory_fraction": "share of the synapses, or of the neurons, that excite",
    "excitatory_weight": "weight of the synapses that excite",
    "inhibitory_weight": "weight of the synapses that inhibit",
    "delay": "time that a spike takes to arrive; by default one step",
    "RandomSynapses.seed": "seed of the random synapses",
    "Record.neurons": "neurons whose traces are kept",
    "variables": "traces to keep: v, g_e and g_i",
    "every": "steps from one number of a trace to the next",
    "Spread.low": "the smallest potential of a range",
    "Spread.high": "the largest potential of a range",
    "law": "the distribution",
    "low": "the smallest number",
    "high": "the largest number",
    "mean": "mean of the numbers",
    "std": "standard deviation of the numbers",
}


class Key(NamedTuple):
    """A key of a table: its name, its unit or type, its default, and its meaning."""

    name: str
    unit: str
    default: str
    meaning: str


class Section(NamedTuple):
    """A table of the file: how its heading is written, the class that describes it, and its keys."""

    heading: str
    model: type[config._Table]
    keys: list[Key]


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation, and everything that it is made of."""
    yield annotation
    inner = annotation if isinstance(annotation, list) else get_args(annotation)
    if get_origin(annotation) is not Literal:
        for part in inner:
            yield from _parts(part)


def _models(annotation: Any) -> list[type[config._Table]]:
    return [p for p in _parts(annotation) if isinstance(p, type) and issubclass(p, config._Table)]


def _unit(annotation: Any) -> str:
    parts = list(_parts(annotation))
    for part in parts:
        if isinstance(part, Unit):
            return f"{part.symbol} or {part.or_else}" if part.or_else else part.symbol
    for part in parts:
        if get_origin(part) is Literal:
            return " or ".join(map(str, get_args(part)))
    if list in (get_origin(part) for part in parts):
        return "list"
    names = {str: "text", Path: "path", bool: "true or false", int: "whole number", float: "number"}
    return next((name for kind, name in names.items() if kind in parts), "table")


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None or value == "":
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _only(annotation: Any) -> str | None:
    """The one word that a key may have, such as the kind of an input."""
    words = get_args(annotation) if get_origin(annotation) is Literal else ()
    return words[0] if len(words) == 1 else None


def _section(model: type[config._Table], path: str, several: bool) -> Section:
    heading, keys = f"[[{path}]]" if several else f"[{path}]" if path else "at the top", []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        word = _only(annotation)
        if word:
            heading += f' with {name} = "{word}"'
            continue
        if not path and _models(annotation):
            continue  # the tables of a file have sections of their own
        meaning = MEANINGS.get(f"{model.__name__.partition('[')[0]}.{name}") or MEANINGS[name]
        keys.append(Key(name, _unit([*field.metadata, annotation]), _default(field.get_default()), meaning))
    return Section(heading, model, keys)


def sections() -> list[Section]:
    """Every table that a configuration may have, each once."""
    found: list[Section] = []
    seen: set[type[config._Table]] = set()

    def visit(model: type[config._Table], path: str, several: bool) -> None:
        if model in seen:
            return
        seen.add(model)
        found.append(_section(model, path, several))
        for name, field in model.model_fields.items():
            many = any(get_origin(part) is list for part in _parts(field.annotation))
            for inner in _models(field.annotation):
                visit(inner, f"{path}.{name}" if path else name, many and len(_models(field.annotation)) <= 2)

    visit(Config, "", False)
    return found


def listing() -> list[Any]:
    """Every key, as texts and tables to print."""
    shown: list[Any] = [
        "Keys of a configuration: name, unit or type, default, meaning. A quantity is written with its unit in quotes, "
        'such as "5 ms"; any unit of the same kind will do. On the command line: --set simulation.duration=5s.'
    ]
    for section in sections():
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(max_width=14)
        table.add_column(max_width=14)
        table.add_column()
        for key in section.keys:
            table.add_row(f"  {key.name}", key.unit, key.default, key.meaning)
        shown += ["", section.heading, table] if section.keys else ["", section.heading]
    return shown
