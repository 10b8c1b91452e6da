"""Every public name of the package; ``coba_triton`` has them from here."""

from . import __version__
from .functional import (
    coba_lif_feed_forward_integral,
    coba_lif_feed_forward_step,
    coba_lif_integral,
    coba_lif_step,
)
from .modules import CobaLIF, CobaLIFCell, CobaLIFFeedForwardCell, CobaLIFRecurrent
from .neuron.records import (
    CobaLIFDelayState,
    CobaLIFFeedForwardRefractoryState,
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    CobaLIFRefractoryState,
    CobaLIFState,
    default_bio_parameters,
    default_bio_state,
    default_learning_parameters,
)
from .ops.random_synapses import LogNormal, Normal, Uniform
from .ops.spikes import pack_spikes, unpack_spikes
from .ops.synapses import Synapses
from .parameter_sets import from_pynn, to_pynn
from .stream.events import read_events
from .stream.record import Record
from .stream.results import Result, open_result
from .stream.simulation import simulate
from .stream.sinks import MemorySink, NpzSink, ZarrSink
from .stream.sources import EventSource, PoissonSource, stream_blocks
from .tools.checker import check
from .tools.warmup import warmup

__all__ = [
    "CobaLIF",
    "CobaLIFCell",
    "CobaLIFDelayState",
    "CobaLIFFeedForwardCell",
    "CobaLIFFeedForwardRefractoryState",
    "CobaLIFFeedForwardState",
    "CobaLIFParameters",
    "CobaLIFRecurrent",
    "CobaLIFRefractoryState",
    "CobaLIFState",
    "EventSource",
    "LogNormal",
    "MemorySink",
    "Normal",
    "NpzSink",
    "PoissonSource",
    "Record",
    "Result",
    "Synapses",
    "Uniform",
    "ZarrSink",
    "__version__",
    "check",
    "coba_lif_feed_forward_integral",
    "coba_lif_feed_forward_step",
    "coba_lif_integral",
    "coba_lif_step",
    "default_bio_parameters",
    "default_bio_state",
    "default_learning_parameters",
    "from_pynn",
    "open_result",
    "pack_spikes",
    "read_events",
    "simulate",
    "stream_blocks",
    "to_pynn",
    "unpack_spikes",
    "warmup",
]
