"""The operations that the neuron is written in, on Python numbers.

PyTorch, Triton and Numba have operations of the same names and meaning for what they compute with; :func:`bind` makes a
function call those. Every operation rounds once.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any


def relu(x: Any) -> Any:
    """``x`` where it is positive or NaN, else 0."""
    return 0.0 if x < 0.0 else x


def absolute(x: Any) -> Any:
    """The magnitude of ``x``."""
    return abs(x)


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where the condition holds, else ``b``."""
    return a if condition else b


def divide(a: Any, b: Any) -> Any:
    """The quotient, rounded to the nearest."""
    return a / b


def square_root(x: Any) -> Any:
    """The square root, rounded to the nearest."""
    return math.sqrt(x)


def exp(x: Any) -> Any:
    """The exponential function."""
    return math.exp(x)


def bind(function: Callable[..., Any], names: dict[str, Any]) -> Callable[..., Any]:
    """The same function, which finds the operations, the records and the other functions of the neuron in ``names``.

    Args:
        function: of this package.
        names: the globals of the module whose operations it shall call.
    """
    bound = types.FunctionType(function.__code__, names, function.__name__)
    bound.__doc__, bound.__module__ = function.__doc__, names["__name__"]
    return bound
