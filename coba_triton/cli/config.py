"""Configurations: the keys of their TOML files, the units in them, and the built-in configurations.

Every quantity is written with a unit, which may be any unit of the right dimension. It is converted to the model's units:
ms, mV, nF (capacitance), uS (conductance), nA (current); rates are in Hz. A file has these tables::

    description = "one line"              # optional
    notes = ["what to know", "..."]       # optional; like the rest of this file, copied to summary.json

    [simulation]
    dt = "0.1 ms"
    duration = "1 s"                      # a whole number of steps
    block_steps = 1024                    # optional; steps in a block, rounded up to a multiple of 32; default: 64 MiB
    order = "decay_first"                 # optional; or "jump_first"
    backend = "auto"                      # optional; or "reference", "triton", "cpu"
    device = "auto"                       # optional; or a torch device; "auto": the GPU if Triton has one

    [neuron]
    count = 200
    tau_syn_exc = "5 ms"
    tau_syn_inh = "10 ms"
    c_m = "200 pF"
    g_l = "10 nS"
    e_rev_E = "0 mV"
    e_rev_I = "-80 mV"
    synapses = "conductance"              # optional; or "current": then every weight below is a current, such as "0.1 nA",
                                          # what is written of conductances holds for currents, and there is no e_rev_E or
                                          # e_rev_I, here and in populations
    v_rest = "-65 mV"
    v_reset = "-65 mV"
    v_thresh = "-50 mV"
    refractory = "0 ms"                   # optional; time for which a neuron is held at v_reset after a spike
    i_offset = "0 nA"                     # optional; a constant current, which moves v_rest by i_offset / g_l
    v_init = "-65 mV"                     # optional; where v starts, default: v_rest as it is written; or at random,
                                          # v_init = { low = "-65 mV", high = "-50 mV", seed = 1 }

    [[population]]                        # optional, several; neurons that differ, shown apart in the picture
    name = "inhibitory"
    neurons = [160, 200]                  # from the first to the one after the last, from 0
    v_thresh = "-48 mV"                   # any of the neurons' parameters above; those left out are theirs

    [record]                              # optional; spikes are always recorded
    neurons = [0, 17]                     # whose traces to keep, the first one's v is drawn
    variables = ["v", "g_e", "g_i"]       # default: v
    every = 10                            # steps from one number of a trace to the next; default: 1

and one of six inputs. The model takes conductances: positive input adds to g_e, negative input to g_i. With the first
three, every neuron has its own input. All input of a neuron in one step is summed first and then split by its sign::

    [input]
    kind = "poisson"                      # every neuron has its own Poisson spikes
    seed = 1
    excitatory = { rate = "800 Hz", weight = "2 nS" }
    inhibitory = { rate = "200 Hz", weight = "4 nS" }     # one of the two may be left out

    [input]
    kind = "events"                       # every neuron has spikes that are listed in a file
    excitatory = { path = "spikes.csv", weight = "2 nS" } # .csv, .npz, .dat, .nwb, ..., see coba_triton.read_events
    inhibitory = { path = ["7-0.dat", "7-1.dat"], weight = "4 nS" }  # one of the two may be left out
    start = "0 ms"                        # optional; time in the lists at which the run begins
    first = 0                             # optional; the number that the first neuron has in the lists, NEST's have 1

    [input]
    kind = "file"                         # array [steps, neurons], numbers or booleans; a longer one is cut
    path = "spikes.npz"                   # .npy, .npz or a sparse .npz of scipy, relative to this file
    array = "x"                           # which array of an .npz; optional if it has only one
    weight = "2 nS"                       # of one spike; for input in a unit of conductance that unit, "1 uS"

The other inputs have channels. Synapses, random ones or those of a file, lead from the channels to the neurons::

    [input]
    kind = "recording"                    # one signal, delta-encoded: a channel of ON and one of OFF events
    start = "10 s"                        # optional; where in the recording to begin
    threshold = "0.05 mV"                 # of the delta encoder; without unit if the recording has none
    [input.signal]
    source = "file"                       # .npy or .npz, array [samples]; or "ecg" alone, 30 s of an ECG
    path = "signal.npy"
    array = "x"                           # as above
    sampling_rate = "360 Hz"
    unit = "mV"                           # optional; without it the numbers have no unit
    provenance = "recorded by ..."        # optional; copied to summary.json
    [input.fan_out]
    seed = 1
    probability = 0.5                     # of a connection from a channel to a neuron
    weight = "2 nS"                       # mean of the weights' exponential distribution
    excitatory_fraction = 0.8             # of the connections; the others are inhibitory

    [input]
    kind = "channels"
    [input.spikes]
    source = "poisson"                    # or "file", with path and array as above, [steps, channels]; or "events", with
    seed = 1                              # channels, path, start and first as above
    channels = 400
    rate = "15 Hz"                        # of every channel
    stop = "50 ms"                        # optional; no spikes from then on
    [input.fan_out]                       # as above, or weights in a file:
    path = "weights.npy"                  # [neurons, channels], relative to this file; positive ones excite
    array = "x"                           # as above; or another of the files that the table recurrent may have
    weight = "1 nS"                       # what the number 1 in the file stands for
    [[input.fan_out]]                     # or one or several projections: see below, without source, delay and autapses
    receptor = "excitatory"
    probability = 0.01
    weight = "100 nS"
    seed = 3
    [[input.more]]                        # optional, several; other channels, such as inhibitory ones, whose
    spikes = { source = "poisson", seed = 2, channels = 100, rate = "20 Hz" }  # excitatory_fraction is 0
    fan_out = { seed = 3, probability = 0.5, weight = "4 nS", excitatory_fraction = 0.0 }

    [input]
    kind = "none"                         # neurons that start above rest, have a current, or drive each other

With the table ``recurrent`` the neurons are connected to each other, by random synapses or by those of a file::

    [recurrent]
    seed = 1
    probability = 0.02                    # of a connection from a neuron to another; none to itself
    excitatory_fraction = 0.8             # of the neurons, the first ones; the others are inhibitory
    excitatory_weight = "0.5 nS"
    inhibitory_weight = "5 nS"

    delay = "1 ms"                        # optional; from the end of a spike's step to that in which it arrives, rounded to
                                          # steps; one step by default. NEST and Brian2 deliver a step later: add a step to
                                          # their delays

    [recurrent]
    path = "weights.npy"                  # [neurons, neurons], rows post-synaptic; negative weights inhibit
    array = "x"                           # as above; or an .npz of scipy; or one of row, col, weight and, in ms, delay of
                                          # every synapse; or one that Synapses.save wrote
    weight = "1 nS"                       # what the number 1 in the file stands for, "1 uS" for Synapses.save
    delay = "1 ms"                        # optional, as above; not beside delays in the file

Or with projections, each from one population to another::

    [[projection]]
    source = "excitatory"                 # name of a population, or "all others" for the neurons of none; default: all
    target = "inhibitory"                 # likewise
    receptor = "excitatory"               # or "inhibitory"
    probability = 0.02                    # of a connection from a neuron to another; or number, of synapses:
    number = 80                           # of every target neuron
    per = "target"                        # or "source": number is that of every source; default: "target"
    several = false                       # whether a pair may have several of this number of synapses; default: false
    autapses = false                      # whether a neuron may have a synapse to itself; default: false
    weight = "4 nS"                       # or random ones, { law = "uniform", low = "2 nS", high = "6 nS" },
                                          # { law = "lognormal", mean = "4 nS", std = "2 nS" }, or { law = "normal",
                                          # mean = "4 nS", std = "1 nS" }, above low = "0 nS" and below high, none by default
    delay = { law = "uniform", low = "0.5 ms", high = "2 ms" }  # optional; as weight, one step by default
    seed = 1                              # another one in each projection

    [[projection]]                        # [targets, sources] from a file; keys as in the table recurrent, and
    source = "excitatory"                 # these two, as above
    target = "inhibitory"
    path = "weights.npz"
    weight = "1 nS"

Then excitation and inhibition are not summed first but kept apart, synapse by synapse: positive weights lead to g_e,
negative weights to g_i. If every neuron has its own input, this input is the same as without recurrence. It then takes two
channels for each neuron, so for thousands of neurons ``channels`` are much faster.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    NonNegativeInt,
    PositiveInt,
    Tag,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from coba_triton.common.files import read_text, reason
from coba_triton.common.text import decode, look_alike, plain_minus

from .errors import UserError, nearest

_NUMBER_AND_UNIT = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\d\s.+-].*?)\s*")
# A power in a unit must be a name to the power of one digit. A tower of powers of numbers would take forever to compute.
_POWER = re.compile(r"\s*(?:\*\*|\^|[⁰¹²³⁴-⁹])\s*")
_GOOD_POWER = re.compile(r"(?<=[^\W\d])(?:\s*(?:\*\*|\^)\s*-?\d(?!\s*(?:[\d.^]|\*\*))|[⁰¹²³⁴-⁹](?![⁰¹²³⁴-⁹]))")
_LONGEST = 100  # characters of a quantity
# keys of what has several forms; an item of a list of projections has several, too
_UNIONS = {"input", "signal", "spikes", "fan_out", "recurrent", "v_init", "weight", "delay", "law"}
ALL_OTHERS = "all others"  # the name of the neurons that belong to no population


@functools.cache
def _registry() -> Any:
    import pint

    return pint.UnitRegistry()


@dataclass(frozen=True)
class Unit:
    """A pydantic annotation for a number that is written as text with a unit.

    Attributes:
        symbol: the unit to which the number is converted, and with which it is written back.
        kind: what the number measures, for messages.
        example: an example of such a text, for messages.
        sign: which numbers are allowed.
        or_else: symbol of a unit of another dimension that is allowed as well. A number in it is a :class:`_Other`.
    """

    symbol: str
    kind: str
    example: str
    sign: Literal["any", "not negative", "positive"] = "any"
    or_else: str | None = None

    def parse(self, text: object) -> float:
        """Read text such as ``"200 pF"``.

        Raises:
            ValueError: if there is no number or no unit, the unit is unknown or of another dimension, or the number
                has the wrong sign.
        """
        wanted = f"expected {self.kind} such as {self.example!r}"
        if not isinstance(text, str) or len(text) > _LONGEST or not (match := _NUMBER_AND_UNIT.fullmatch(plain_minus(text))):
            raise ValueError(f"{wanted}, a number with its unit in quotes, got {text!r:.{_LONGEST}}")
        number, unit = float(match[1]), match[2]
        try:
            if len(_POWER.findall(unit)) != len(_GOOD_POWER.findall(unit)):
                raise ValueError("a power is not of one digit")
            quantity = _registry().Quantity(number, _registry().parse_units(unit))
        except Exception:  # pint has a different exception for every way in which a unit can be malformed
            raise ValueError(f"unknown unit {unit!r}; {wanted}, got {text!r}") from None
        symbol = self.or_else if self.or_else and quantity.is_compatible_with(self.or_else) else self.symbol
        if not quantity.is_compatible_with(symbol):
            raise ValueError(f"{unit!r} does not measure {self.kind}; {wanted}, got {text!r}")
        # 15 digits remove the rounding of the conversion, so that "200 pF" and "0.2 nF" give the same number
        value = float(f"{quantity.m_as(symbol):.15g}")
        if not math.isfinite(value):
            raise ValueError(f"{text!r} is too large; {wanted}")
        if (self.sign == "positive" and value <= 0) or (self.sign == "not negative" and value < 0):
            raise ValueError(f"must {'be above 0' if self.sign == 'positive' else 'not be negative'}, got {text!r}")
        return value if symbol == self.symbol else _Other(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(
            lambda value: f"{value!r} {self.or_else if isinstance(value, _Other) else self.symbol}"
        )
        return core_schema.no_info_plain_validator_function(self.parse, serialization=written)


class _Other(float):
    """A number in the other one of two units."""


Time = Annotated[float, Unit("ms", "a time", "5 ms", "not negative")]
PositiveTime = Annotated[float, Unit("ms", "a time", "5 ms", "positive")]
Period = Annotated[float, Unit("ms", "a time", "5 ms", "not negative")]
Potential = Annotated[float, Unit("mV", "a potential", "-65 mV")]
Capacitance = Annotated[float, Unit("nF", "a capacitance", "200 pF", "positive")]
Current = Annotated[float, Unit("nA", "a current", "0.1 nA")]
Conductance = Annotated[float, Unit("uS", "a conductance", "2 nS", "not negative")]
# What a spike adds to a conductance or, where synapses are currents, to a current.
Strength = Annotated[float, Unit("uS", "a conductance or a current", "2 nS", "not negative", or_else="nA")]
Rate = Annotated[float, Unit("Hz", "a rate", "20 Hz", "not negative")]
PositiveRate = Annotated[float, Unit("Hz", "a rate", "20 Hz", "positive")]


def _beside_the_configuration(path: Path, info: ValidationInfo) -> Path:
    return Path(info.context["folder"] / path if info.context else path)


def _known_unit(symbol: str) -> str:
    try:
        _registry().parse_units(symbol)
    except Exception:  # see Unit.parse
        raise ValueError(f"unknown unit {symbol!r}; expected one such as 'mV', or leave it out") from None
    return symbol


InputPath = Annotated[Path, Field(strict=False), AfterValidator(_beside_the_configuration)]


class _Table(BaseModel):
    """A table of the file. It refuses values of another type and unknown keys, and its messages help to correct them."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        for key in table:
            if key not in cls.model_fields:
                hint = nearest(key, cls.model_fields) or f"; the keys are {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown key {key!r}{hint}")
        for key, field in cls.model_fields.items():
            if field.is_required() and key not in table:
                examples = [f', such as {key} = "{m.example}"' for m in field.metadata if isinstance(m, Unit)]
                raise ValueError(f"{key} is missing; add it{''.join(examples)}")
        return table


class Simulation(_Table):
    """The time to simulate, and the device."""

    dt: PositiveTime
    duration: PositiveTime
    block_steps: PositiveInt | None = None
    order: Literal["decay_first", "jump_first"] = "decay_first"
    backend: str = "auto"
    device: str = "auto"

    @property
    def steps(self) -> int:
        """The number of steps T."""
        return round(self.duration / self.dt)

    @model_validator(mode="after")
    def _check_duration(self) -> Simulation:
        steps = self.duration / self.dt
        if self.steps < 1 or abs(steps - self.steps) > 1e-6 * steps:
            raise ValueError(
                f"duration must be a whole number of steps of dt = {self.dt} ms, got {self.duration} ms; the "
                f"nearest is {max(self.steps, 1) * self.dt:.12g} ms"
            )
        return self


class Spread(_Table):
    """Random potentials, evenly distributed over a range."""

    low: Potential
    high: Potential
    seed: NonNegativeInt

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low} mV and {self.high} mV; exchange them")
        return self


def _potential_form(value: Any) -> str:
    """Which form it has: one potential, or a table of a range."""
    return "range" if isinstance(value, dict | Spread) else "one"


Start = Annotated[Annotated[Potential, Tag("one")] | Annotated[Spread, Tag("range")], Discriminator(_potential_form)]


class Neuron(_Table):
    """The number of neurons, and the parameters that they share."""

    count: PositiveInt
    tau_syn_exc: PositiveTime
    tau_syn_inh: PositiveTime
    c_m: Capacitance
    g_l: Conductance
    e_rev_E: Potential | None = None
    e_rev_I: Potential | None = None
    synapses: Literal["conductance", "current"] = "conductance"
    v_rest: Potential
    v_reset: Potential
    v_thresh: Potential
    refractory: Period = 0.0
    i_offset: Current = 0.0
    v_init: Start | None = None

    @model_validator(mode="after")
    def _check_reversal(self) -> Self:
        for key, example in (("e_rev_E", "0 mV"), ("e_rev_I", "-80 mV")):
            if self.synapses == "conductance" and getattr(self, key) is None:
                raise ValueError(f'{key} is missing; add it, such as {key} = "{example}"')
        return self


class Population(_Table):
    """Neurons with some parameters of their own. A parameter that is None is shared with all neurons."""

    name: str = Field(min_length=1)
    neurons: list[NonNegativeInt] = Field(min_length=2, max_length=2)
    tau_syn_exc: PositiveTime | None = None
    tau_syn_inh: PositiveTime | None = None
    c_m: Capacitance | None = None
    g_l: Conductance | None = None
    e_rev_E: Potential | None = None
    e_rev_I: Potential | None = None
    v_rest: Potential | None = None
    v_reset: Potential | None = None
    v_thresh: Potential | None = None
    refractory: Period | None = None
    i_offset: Current | None = None
    v_init: Start | None = None

    def applied_to(self, neuron: Neuron) -> Neuron:
        """The parameters of these neurons: the population's own, and the shared ones."""
        own = {key: value for key, value in self if key not in ("name", "neurons") and value is not None}
        return neuron.model_copy(update=own)


class Drive(_Table):
    """Poisson spikes of one sign: their rate, and what a spike adds to the conductance."""

    rate: Rate
    weight: Strength


class _Signed(_Table):
    """An input with an excitatory part, an inhibitory part, or both."""

    excitatory: Any = None
    inhibitory: Any = None

    @model_validator(mode="after")
    def _check_signs(self) -> Self:
        if self.excitatory is None and self.inhibitory is None:
            raise ValueError("excitatory or inhibitory is missing; add one of them or both")
        return self


class PoissonInput(_Signed):
    """Independent Poisson spikes for every neuron."""

    kind: Literal["poisson"]
    seed: NonNegativeInt
    excitatory: Drive | None = None
    inhibitory: Drive | None = None


class EventFile(_Table):
    """A list of spikes of one sign, and what a spike adds to the conductance."""

    path: InputPath | list[InputPath]
    weight: Strength


class EventsInput(_Signed):
    """Spikes for every neuron from lists."""

    kind: Literal["events"]
    excitatory: EventFile | None = None
    inhibitory: EventFile | None = None
    start: Time = 0.0
    first: NonNegativeInt = 0


class FileInput(_Table):
    """An array ``[steps, neurons]`` of spikes or conductances."""

    kind: Literal["file"]
    path: InputPath
    array: str | None = None
    weight: Strength


class PackagedSignal(_Table):
    """The ECG that comes with the package, 30 s."""

    source: Literal["ecg"]


class FileSignal(_Table):
    """An array ``[samples]`` at a fixed sampling rate."""

    source: Literal["file"]
    path: InputPath
    array: str | None = None
    sampling_rate: PositiveRate
    unit: Annotated[str, AfterValidator(_known_unit)] | None = None
    provenance: str | None = None


Q = TypeVar("Q")


class _Law(_Table):
    """A distribution, perhaps between two limits."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        low, high = getattr(self, "low", None), getattr(self, "high", None)
        if high is not None and high < (low or 0):
            raise ValueError(f"low must not be above high, got {low or 0} and {high}, in uS or ms; exchange them")
        return self


class UniformLaw(_Law, Generic[Q]):
    """Numbers that are equally probable in a range."""

    law: Literal["uniform"]
    low: Q
    high: Q


class NormalLaw(_Law, Generic[Q]):
    """Normally distributed numbers, those within the limits."""

    law: Literal["normal"]
    mean: Q
    std: Q
    low: Q | None = None  # 0 of the unit
    high: Q | None = None


class LogNormalLaw(_Law, Generic[Q]):
    """Numbers whose logarithm is normally distributed; mean and standard deviation are their own."""

    law: Literal["lognormal"]
    mean: Q
    std: Q


def _number_form(value: Any) -> str:
    """Which form it has: one number, or the law of random ones."""
    return "law" if isinstance(value, dict | _Table) else "one"


WeightLaw = Annotated[UniformLaw[Strength] | NormalLaw[Strength] | LogNormalLaw[Strength], Field(discriminator="law")]
DelayLaw = Annotated[UniformLaw[Time] | NormalLaw[Time] | LogNormalLaw[Time], Field(discriminator="law")]
Weight = Annotated[Annotated[Strength, Tag("one")] | Annotated[WeightLaw, Tag("law")], Discriminator(_number_form)]
Delay = Annotated[Annotated[Time, Tag("one")] | Annotated[DelayLaw, Tag("law")], Discriminator(_number_form)]


class SparseFanOut(_Table):
    """Random synapses of one kind onto the neurons of a population, or onto all."""

    target: str | None = None
    receptor: Literal["excitatory", "inhibitory"]
    probability: float | None = Field(default=None, gt=0, le=1)
    number: PositiveInt | None = None
    per: Literal["target", "source"] = "target"
    several: bool = False
    weight: Weight
    seed: NonNegativeInt

    @model_validator(mode="after")
    def _check_count(self) -> Self:
        if (self.probability is None) == (self.number is None):
            got = "neither" if self.number is None else "both"
            raise ValueError(f"probability or number says how many synapses there are, got {got}; write one of them")
        return self


class Projection(SparseFanOut):
    """Random synapses of one kind from one population to another."""

    source: str | None = None
    delay: Delay | None = None
    autapses: bool = False


class FanOut(_Table):
    """Random weights from the input's channels to the population."""

    seed: NonNegativeInt
    probability: float = Field(gt=0, le=1)
    weight: Strength
    excitatory_fraction: float = Field(ge=0, le=1)


class FileWeights(_Table):
    """Weights ``[neurons, channels]`` or ``[neurons, neurons]``, rows post-synaptic."""

    path: InputPath
    array: str | None = None
    weight: Strength


class FileSynapses(FileWeights):
    """The same for neurons, with a delay if the file has none."""

    delay: PositiveTime | None = None


class FileProjection(FileSynapses):
    """The same from one population to another, ``[targets, sources]``."""

    source: str | None = None
    target: str | None = None


def _weights_form(table: Any) -> str:
    """Which form a table of weights has: several, that of a file with a path, that of synapses of one kind, or random."""
    if isinstance(table, list):
        return "several"
    if isinstance(table, FileWeights) or (isinstance(table, dict) and "path" in table):
        return "file"
    return "one" if isinstance(table, SparseFanOut) or (isinstance(table, dict) and "receptor" in table) else "random"


InputWeights = Annotated[
    Annotated[FanOut, Tag("random")]
    | Annotated[FileWeights, Tag("file")]
    | Annotated[SparseFanOut, Tag("one")]
    | Annotated[list[SparseFanOut], Tag("several")],
    Discriminator(_weights_form),
]


class RecordingInput(_Table):
    """A signal that is delta-encoded; synapses lead from its events to the neurons."""

    kind: Literal["recording"]
    start: Time = 0.0
    threshold: float | str
    signal: Annotated[PackagedSignal | FileSignal, Field(discriminator="source")]
    fan_out: InputWeights


class PoissonSpikes(_Table):
    """Independent Poisson spikes in every channel."""

    source: Literal["poisson"]
    seed: NonNegativeInt
    channels: PositiveInt
    rate: Rate
    stop: PositiveTime | None = None


class FileSpikes(_Table):
    """An array ``[steps, channels]`` of spikes."""

    source: Literal["file"]
    path: InputPath
    array: str | None = None


class EventSpikes(_Table):
    """A list of spikes."""

    source: Literal["events"]
    path: InputPath | list[InputPath]
    channels: PositiveInt
    start: Time = 0.0
    first: NonNegativeInt = 0


class Channels(_Table):
    """Spikes in channels, and the synapses that lead from them to the neurons."""

    spikes: Annotated[PoissonSpikes | FileSpikes | EventSpikes, Field(discriminator="source")]
    fan_out: InputWeights


class ChannelsInput(Channels):
    """One group of channels, or several."""

    kind: Literal["channels"]
    more: list[Channels] = []


class NoInput(_Table):
    """No input."""

    kind: Literal["none"]


class RandomSynapses(_Table):
    """Random connections among the neurons. The first neurons are excitatory, the others inhibitory."""

    seed: NonNegativeInt
    probability: float = Field(gt=0, le=1)
    excitatory_fraction: float = Field(ge=0, le=1)
    excitatory_weight: Strength
    inhibitory_weight: Strength
    delay: PositiveTime | None = None


def _synapses_form(table: Any) -> str:
    return "file" if _weights_form(table) == "file" else "random"


RecurrentWeights = Annotated[
    Annotated[RandomSynapses, Tag("random")] | Annotated[FileSynapses, Tag("file")], Discriminator(_synapses_form)
]
AnyProjection = Annotated[
    Annotated[Projection, Tag("random")] | Annotated[FileProjection, Tag("file")], Discriminator(_synapses_form)
]


def _strengths(value: Any, where: str, within: bool = False) -> Iterator[tuple[str, float]]:
    """All weights in a table or a list, and where they stand; ``within``: in what tells a weight."""
    if isinstance(value, _Table):
        for key, part in value:
            yield from _strengths(part, f"{where}.{key}" if where else key, within or key.endswith("weight"))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _strengths(part, f"{where}.{number}", within)
    elif within and isinstance(value, float):
        yield where, value


class Record(_Table):
    """The traces to keep, and the neurons they belong to."""

    neurons: list[NonNegativeInt] = [0]
    variables: list[Literal["v", "g_e", "g_i"]] = ["v"]
    every: PositiveInt = 1


class Config(_Table):
    """A whole configuration."""

    description: str = ""
    notes: list[str] = []
    simulation: Simulation
    neuron: Neuron
    population: list[Population] = []
    input: Annotated[
        PoissonInput | EventsInput | FileInput | RecordingInput | ChannelsInput | NoInput, Field(discriminator="kind")
    ]
    recurrent: RecurrentWeights | None = None
    projection: list[AnyProjection] = []
    record: Record = Record()

    @model_validator(mode="after")
    def _check_populations(self) -> Config:
        count, before = self.neuron.count, ""
        names = [population.name for population in self.population]
        if len({*names, ALL_OTHERS}) <= len(names):
            got = ", ".join(map(repr, names))
            raise ValueError(f"population.name must be different in each and not {ALL_OTHERS!r}, got {got}")
        end = 0
        for population in sorted(self.population, key=lambda population: population.neurons):
            first, stop = population.neurons
            if not first < stop <= count:
                raise ValueError(
                    f"population.neurons of {population.name!r} must be a first neuron and the one after the last, up to "
                    f"neuron.count = {count}, got {population.neurons}"
                )
            if first < end:
                raise ValueError(
                    f"population.neurons must be apart, got {population.neurons} of {population.name!r}, and {before!r} "
                    f"ends at {end}"
                )
            end, before = stop, population.name
        for own in (self.neuron, *(population.applied_to(self.neuron) for population in self.population)):
            if own.i_offset and not own.g_l:
                raise ValueError(f"i_offset needs g_l above 0, got i_offset = {own.i_offset} nA and no leak; leave it out")
        return self

    @model_validator(mode="after")
    def _check_synapses(self) -> Config:
        current = self.neuron.synapses == "current"
        for own in (self.neuron, *self.population):
            for key in ("e_rev_E", "e_rev_I"):
                if current and getattr(own, key) is not None:
                    raise ValueError(f"{key} is for conductances, and neuron.synapses is 'current'; leave it out")
        for where, value in _strengths(self, ""):
            if isinstance(value, _Other) != current:
                wanted, got = ("a current such as '0.1 nA'", "uS") if current else ("a conductance such as '2 nS'", "nA")
                raise ValueError(
                    f"{where} must be {wanted}, as neuron.synapses is {self.neuron.synapses!r}, got {value:g} {got}; write "
                    "it so, or change neuron.synapses"
                )
        return self

    @model_validator(mode="after")
    def _check_projections(self) -> Config:
        if self.projection and self.recurrent is not None:
            raise ValueError("recurrent and projection both connect the neurons; write one of them")
        fan_outs: list[Any] = []
        for group in (self.input, *getattr(self.input, "more", [])):
            fan_out = getattr(group, "fan_out", None)
            fan_outs += fan_out if isinstance(fan_out, list) else [fan_out] if isinstance(fan_out, SparseFanOut) else []
        names = {population.name: 0 for population in self.population}
        if sum(stop - first for first, stop in (p.neurons for p in self.population)) < self.neuron.count and names:
            names[ALL_OTHERS] = 0
        tables = [("input.fan_out", fan_out) for fan_out in fan_outs]
        tables += [(f"projection.{number}", projection) for number, projection in enumerate(self.projection)]
        for where, table in tables:
            for end in ("source", "target"):
                name = getattr(table, end, None)
                if name is not None and name not in names:
                    known = (
                        f"; the populations are {', '.join(map(repr, names))}" if names else "; there are none, leave it out"
                    )
                    raise ValueError(
                        f"{where}.{end} must be the name of a population, got {name!r}{nearest(name, names) or known}"
                    )
        seeds = [table.seed for _, table in tables if isinstance(table, SparseFanOut)]
        for seed in seeds:
            if seeds.count(seed) > 1:
                raise ValueError(
                    f"seed must differ between all projections and fan_outs, got {seed} twice: with the same seed, both "
                    "would connect neurons of the same numbers; change one"
                )
        for where, table in [*tables, ("recurrent", self.recurrent)]:
            delay = getattr(table, "delay", None)
            if isinstance(delay, float) and round(delay / self.simulation.dt) < 1:
                raise ValueError(
                    f"{where}.delay must be at least one step of dt = {self.simulation.dt} ms, got {delay} ms; lengthen it, "
                    "or leave it out for one step"
                )
        return self

    @model_validator(mode="after")
    def _check_recorded_neurons(self) -> Config:
        for neuron in self.record.neurons:
            if neuron >= self.neuron.count:
                raise ValueError(
                    f"record.neurons must be below neuron.count = {self.neuron.count}, got {neuron}; they count from 0"
                )
        return self


def builtin_folder() -> Path:
    """The folder of the built-in configurations."""
    return Path(str(importlib.resources.files("coba_triton"))) / "configs"


def builtins() -> dict[str, Path]:
    """The files of the built-in configurations, by name."""
    return {path.stem: path for path in sorted(builtin_folder().glob("*.toml"))}


def describe(name: str) -> str:
    """The description of a built-in configuration. Nothing else in it is checked, so no package is needed for it."""
    return str(tomllib.loads(decode(builtins()[name].read_bytes()))["description"])


def _places(key: str, data: Any, model: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a key may stand: in the tables that the file has, and in those that every configuration has."""
    known = model.model_fields if model is not None else {}
    for name in dict.fromkeys((*known, *data)):
        if name == key:
            yield (*before, name)
        inner = known[name].annotation if name in known else None
        table = inner if isinstance(inner, type) and issubclass(inner, _Table) else None
        if isinstance(data.get(name), dict) or table is not None:
            yield from _places(key, data.get(name, {}), table, (*before, name))


def _set(data: dict[str, Any], change: str) -> None:
    """Change what a file says, as ``--set KEY=VALUE`` asks.

    Raises:
        UserError: if there is no such key or several.
    """
    key, equals, text = change.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise UserError(f"--set must be KEY=VALUE such as simulation.duration=5s, got {change!r:.100}")
    if len(parts) == 1 and parts[0] not in Config.model_fields:
        places = list(_places(parts[0], data, Config))
        if len(places) > 1:
            raise UserError(f"--set {parts[0]}: several tables have this key; write {' or '.join(map('.'.join, places))}")
        parts = places[0] if places else parts
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # words and quantities need no quotes here
    table: Any = data
    for number, part in enumerate(parts[:-1]):
        if isinstance(table, list):
            if not part.isdecimal() or int(part) >= len(table):
                raise UserError(
                    f"--set {key}: {'.'.join(parts[:number])} has the numbers 0 to {len(table) - 1}, got {part!r}"
                )
            table = table[int(part)]
        else:
            table = table.setdefault(part, {})
        if not isinstance(table, dict | list):
            raise UserError(f"--set {key}: {'.'.join(parts[: number + 1])} is no table; see simulate --keys")
    if isinstance(table, list):
        raise UserError(f"--set {key}: name a key of one of its tables, such as {'.'.join(parts[:-1])}.0.weight")
    table[parts[-1]] = value


def load(name: str, changes: Iterable[str] = ()) -> tuple[str, Config]:
    """Read a configuration.

    Args:
        name: path of a TOML file, or the name of a built-in configuration.
        changes: what to change in it, each as ``key=value``; a key is written with its table, such as
            ``simulation.duration``, where another table has one of this name.

    Returns:
        The configuration's short name, and the configuration.

    Raises:
        UserError: if there is no such file, it cannot be read, is not TOML, or has a key or value that is not allowed.
    """
    path = Path(name)
    if not os.path.isfile(path) and name in builtins():
        path = builtins()[name]
    text = ""
    try:
        text = read_text(path)
        data = tomllib.loads(text)
    except FileNotFoundError:
        hint = nearest(name, builtins()) or f"; give a TOML file or one of the names {', '.join(builtins())}"
        raise UserError(f"no configuration {name!r}{hint}") from None
    except OSError as error:
        raise UserError(f"cannot read the file {name!r}: {reason(error)}; give a TOML file") from None
    except ValueError as error:
        place = re.search(r"at line (\d+)", str(error))
        hint = look_alike(text, int(place[1])) if place else ""
        raise UserError(f"{path} is not valid TOML ({error}){hint or '; correct it there'}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply; give a configuration") from None
    for change in changes:
        _set(data, change)
    try:
        return path.stem, Config.model_validate(data, context={"folder": path.parent})
    except ValidationError as error:
        raise UserError(f"{path}: {_sentence(error)}") from None


def _is_form(keys: tuple[int | str, ...]) -> bool:
    """Whether the name of a form follows these keys."""
    if not keys:
        return False
    return keys[-1] in _UNIONS or (isinstance(keys[-1], int) and keys[-2:-1] == ("projection",))


def _sentence(error: ValidationError) -> str:
    """The first error in one sentence, and how many more there are."""
    first, *others = error.errors()
    loc = first["loc"]  # after the key of a table with several forms, pydantic puts the form's name; leave that out
    where = ".".join(str(part) for number, part in enumerate(loc) if not _is_form(loc[:number]))
    context = first.get("ctx", {})
    kind = context.get("discriminator", "").strip("'")
    match first["type"]:
        case "value_error":
            what = str(context["error"])
        case "union_tag_invalid":
            what = f"{kind} must be one of {context['expected_tags']}, got {context['tag']!r}"
        case "union_tag_not_found":
            what = f"{kind} is missing; add it to say what this table describes"
        case _:
            what = f"{first['msg'].removeprefix('Input ')}, got {first['input']!r}"
    more = f" (and {len(others)} more)" if others else ""
    return f"{where}: {what}{more}" if where else f"{what}{more}"
