"""PyNN's names and units for the parameters of a neuron."""

from .parameters import from_pynn, to_pynn

__all__ = ["from_pynn", "to_pynn"]
