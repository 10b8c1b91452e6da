"""Recurrent networks that outgrow one device: every process of a group owns some of the neurons.

A process (rank) holds the synapses onto its own neurons, their parameters and their state. These neurons are as many as
``torch.chunk`` gives it, in order. The ranks exchange the spikes of all neurons, and the bits of the result do not depend on
the number of ranks:

* With dense weights, each rank sums the synapses of the neurons that spiked, ascending by source as one process does. It
  sends its spikes, a bit a neuron, in every step.
* With sparse synapses, sums are exact in any order. Ranks exchange spikes once in as many steps as the shortest delay has,
  or twice, so that messages are under way while neurons go on. They send bits or lists, whichever is shorter.

The device of the tensors must be one that the group's backend serves: ``gloo`` on the CPU, ``nccl`` on GPUs.
"""

from typing import TYPE_CHECKING, Any

from .integral import coba_lif_integral
from .ranks import owned_neurons

if TYPE_CHECKING:
    from ..stream.ranks import simulate

__all__ = ["coba_lif_integral", "owned_neurons", "simulate"]


def __getattr__(name: str) -> Any:
    """Long runs are imported when they are asked for."""
    if name == "simulate":
        from ..stream.ranks import simulate

        return simulate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
