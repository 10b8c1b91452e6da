"""The oracle: the equations in eager PyTorch, one operation a line, differentiated by autograd.

Every other backend must agree with this file bit for bit. :func:`add_drive`, :func:`integrate` and :func:`reset` have
the same lines as their namesakes in ``kernels/step.py``; a test compares them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..neuron.records import Constants
from ..neuron.surrogate import spike


def add_drive(g: Tensor, drive: Tensor, recurrent: Tensor | None) -> Tensor:
    g = g + drive
    if recurrent is not None:
        g = g + recurrent
    return g


def integrate(
    v: Tensor,
    g_e: Tensor,
    g_i: Tensor,
    input_e: Tensor,
    input_i: Tensor,
    recurrent_e: Tensor | None,
    recurrent_i: Tensor | None,
    c: Constants,
    JUMP_FIRST: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if JUMP_FIRST:
        g_e = add_drive(g_e, input_e, recurrent_e)
        g_i = add_drive(g_i, input_i, recurrent_i)
    g_e = g_e + c.decay_e * g_e
    g_i = g_i + c.decay_i * g_i
    if not JUMP_FIRST:
        g_e = add_drive(g_e, input_e, recurrent_e)
        g_i = add_drive(g_i, input_i, recurrent_i)
    dv = c.k * ((c.g_l * (c.v_rest - v) + g_e * (c.e_rev_E - v)) + g_i * (c.e_rev_I - v))
    u = v + dv
    return u, g_e, g_i


def reset(u: Tensor, z: Tensor, c: Constants) -> Tensor:
    return (1.0 - z) * u + z * c.v_reset


class Step(NamedTuple):
    """Spikes and state after one step."""

    z: Tensor
    v: Tensor
    g_e: Tensor
    g_i: Tensor


def step(
    v: Tensor,
    g_e: Tensor,
    g_i: Tensor,
    input_e: Tensor,
    input_i: Tensor,
    recurrent_e: Tensor | None,
    recurrent_i: Tensor | None,
    c: Constants,
    jump_first: bool,
    method: str,
) -> Step:
    """One forward Euler step.

    Args:
        v: membrane potential in mV.
        g_e: excitatory conductance in uS.
        g_i: inhibitory conductance in uS.
        input_e: excitatory drive of this step in uS, not negative.
        input_i: inhibitory drive of this step in uS, not negative.
        recurrent_e: excitatory recurrent drive in uS, or None.
        recurrent_i: inhibitory recurrent drive in uS, or None.
        c: the step's constants.
        jump_first: add the drive before the decay instead of after it.
        method: surrogate derivative of the spike.
    """
    u, g_e, g_i = integrate(v, g_e, g_i, input_e, input_i, recurrent_e, recurrent_i, c, jump_first)
    z = spike(u - c.v_thresh, c.alpha, method)
    return Step(z, reset(u, z, c), g_e, g_i)


def feed_forward_step(x: Tensor, v: Tensor, g_e: Tensor, g_i: Tensor, c: Constants, jump_first: bool, method: str) -> Step:
    """One step of unconnected neurons; the sign of the net input ``x`` (in uS) decides which conductance it joins."""
    return step(v, g_e, g_i, torch.relu(x), torch.relu(-x), None, None, c, jump_first, method)


class SplitWeights(NamedTuple):
    """Weights in uS split by sign, transposed for a product from the left: ``[I, N]`` and ``[N, N]``."""

    input_e: Tensor
    input_i: Tensor
    recurrent_e: Tensor
    recurrent_i: Tensor

    @classmethod
    def of(cls, input_weights: Tensor, recurrent_weights: Tensor) -> SplitWeights:
        w_in, w_rec = input_weights.mT, recurrent_weights.mT
        return cls(torch.relu(w_in), torch.relu(-w_in), torch.relu(w_rec), torch.relu(-w_rec))


def recurrent_step(
    x: Tensor,
    z: Tensor,
    v: Tensor,
    g_e: Tensor,
    g_i: Tensor,
    w: SplitWeights,
    c: Constants,
    jump_first: bool,
    method: str,
) -> Step:
    """One step of a recurrent population; the sign of each synapse decides which conductance it drives.

    Args:
        x: input of this step, ``[*batch, I]``.
        z: spikes of the last step, ``[*batch, N]``.
        v: membrane potential in mV, ``[*batch, N]``.
        g_e: excitatory conductance in uS, ``[*batch, N]``.
        g_i: inhibitory conductance in uS, ``[*batch, N]``.
        w: the weights, split by sign.
        c: the step's constants.
        jump_first: add the drive before the decay instead of after it.
        method: surrogate derivative of the spike.
    """
    return step(v, g_e, g_i, x @ w.input_e, x @ w.input_i, z @ w.recurrent_e, z @ w.recurrent_i, c, jump_first, method)
