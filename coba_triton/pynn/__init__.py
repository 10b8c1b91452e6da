"""Convert the parameters of neurons between this package, PyNN and NEST."""

from .parameters import from_pynn, to_pynn

__all__ = ["from_pynn", "to_pynn"]
