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

import torch
from torch import Tensor

TWO_OVER_SQRT_PI = 2.0 / math.sqrt(math.pi)


def super_spike(x: Tensor, alpha: Tensor) -> Tensor:
    q = alpha * torch.abs(x) + 1.0
    return 1.0 / (q * q)


def triangle(x: Tensor, alpha: Tensor) -> Tensor:
    return alpha * torch.relu(1.0 - torch.abs(x))


def tanh(x: Tensor, alpha: Tensor) -> Tensor:
    # 1 - tanh(a)^2 = 4 e / (1 + e)^2 with e = exp(-2 |a|), which does not cancel for large a
    e = torch.exp(-2.0 * torch.abs(alpha * x))
    q = 1.0 + e
    return 4.0 * e / (q * q)


def circ(x: Tensor, alpha: Tensor) -> Tensor:
    square = alpha * alpha
    d = square + x * x
    return square * alpha / (d * torch.sqrt(d))


def heavi_erfc(x: Tensor, alpha: Tensor) -> Tensor:
    a = alpha * x
    return TWO_OVER_SQRT_PI * torch.exp(-(a * a))


SURROGATES: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "super": super_spike,
    "triangle": triangle,
    "tanh": tanh,
    "circ": circ,
    "heavi_erfc": heavi_erfc,
    "heaviside": None,
}
"""Name of a method to its derivative, a function of ``u - v_thresh`` and ``alpha``; None: no gradient."""


class _Spike(torch.autograd.Function):
    """Strict Heaviside with a surrogate derivative; twice differentiable, forward and reverse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: Tensor, method: str) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        x, alpha, ctx.method = inputs
        ctx.save_for_backward(x, alpha)
        ctx.save_for_forward(x, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        derivative = SURROGATES[ctx.method]
        assert derivative is not None
        return grad * derivative(*ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        derivative = SURROGATES[ctx.method]
        assert derivative is not None
        return tangent * derivative(*ctx.saved_tensors)


def spike(x: Tensor, alpha: Tensor, method: str) -> Tensor:
    """1 where ``x > 0``, else 0, in the dtype of ``x``; differentiable by the named surrogate.

    Args:
        x: distance to the threshold ``u - v_thresh`` in mV, any shape.
        alpha: steepness, broadcasts with ``x``; no gradient flows to it.
        method: a key of :data:`SURROGATES`.
    """
    if SURROGATES[method] is None:
        return (x > 0).to(x.dtype)
    return _Spike.apply(x, alpha, method)  # type: ignore[no-any-return, no-untyped-call]  # torch has no types
