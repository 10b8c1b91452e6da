"""The spike and its surrogate derivatives.

The forward value is always the strict Heaviside function of ``x = u - v_thresh``. The derivative used in the backward
pass is one of

==============  =======================================  =====================================================
name            derivative                               source
==============  =======================================  =====================================================
``super``       ``1 / (alpha |x| + 1)^2``                SuperSpike, Zenke and Ganguli 2018
``triangle``    ``alpha relu(1 - |x|)``                  Bellec et al. 2018
``tanh``        ``1 - tanh(alpha x)^2``                  norse
``circ``        ``alpha^3 / (alpha^2 + x^2)^1.5``        norse
``heavi_erfc``  ``2 / sqrt(pi) exp(-(alpha x)^2)``       norse
``heaviside``   0 (no gradient through the spike)        norse
==============  =======================================  =====================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .operations import absolute, divide, exp, relu, square_root

TWO_OVER_SQRT_PI = 2.0 / math.sqrt(math.pi)


def super_spike(x, alpha):
    q = alpha * absolute(x) + 1.0
    return divide(1.0, q * q)


def triangle(x, alpha):
    return alpha * relu(1.0 - absolute(x))


def tanh(x, alpha):
    e = exp(-2.0 * absolute(alpha * x))
    q = 1.0 + e
    return divide(4.0 * e, q * q)


def circ(x, alpha):
    square = alpha * alpha
    d = square + x * x
    return divide(square * alpha, d * square_root(d))


def heavi_erfc(x, alpha):
    a = alpha * x
    return TWO_OVER_SQRT_PI * exp(-(a * a))


def surrogate(x, alpha, METHOD):
    """The derivative of the spike that a method names, at ``x = u - v_thresh``."""
    if METHOD == "super":
        return super_spike(x, alpha)
    elif METHOD == "triangle":
        return triangle(x, alpha)
    elif METHOD == "tanh":
        return tanh(x, alpha)
    elif METHOD == "circ":
        return circ(x, alpha)
    elif METHOD == "heavi_erfc":
        return heavi_erfc(x, alpha)
    else:
        return x * 0.0


SURROGATES: dict[str, Callable[[Any, Any], Any] | None] = {
    "super": super_spike,
    "triangle": triangle,
    "tanh": tanh,
    "circ": circ,
    "heavi_erfc": heavi_erfc,
    "heaviside": None,
}
"""Name of a method to its derivative, a function of ``u - v_thresh`` and ``alpha``; None: no gradient."""
