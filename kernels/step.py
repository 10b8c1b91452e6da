"""The neuron's arithmetic, written once: every kernel steps and differentiates with these functions.

``add_drive``, ``integrate`` and ``reset`` have the same lines as their namesakes in ``coba_triton/reference.py``. Each
operation rounds once: kernels must be launched with ``enable_fp_fusion=False``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# 2 / sqrt(pi)
TWO_OVER_SQRT_PI: tl.constexpr = tl.constexpr(1.1283791670955126)
NUM_CONSTANTS: tl.constexpr = tl.constexpr(10)


class Constants(NamedTuple):
    """One value a row of the constants' table, in the order of ``coba_triton.model.Constants``."""

    decay_e: Any
    decay_i: Any
    k: Any
    g_l: Any
    e_rev_I: Any
    e_rev_E: Any
    v_rest: Any
    v_reset: Any
    v_thresh: Any
    alpha: Any


@triton.jit
def relu(x):
    # a NaN goes through, as in torch.relu
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def divide(a, b):
    # `/` is approximate for float32 on NVIDIA; div_rn knows no float64, whose `/` is exact
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def add_drive(g, drive, recurrent):
    g = g + drive
    if recurrent is not None:
        g = g + recurrent
    return g


@triton.jit
def integrate(v, g_e, g_i, input_e, input_i, recurrent_e, recurrent_i, c, JUMP_FIRST: tl.constexpr):
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


@triton.jit
def reset(u, z, c):
    return (1.0 - z) * u + z * c.v_reset


@triton.jit
def surrogate(x, alpha, METHOD: tl.constexpr):
    """Derivative of the spike at ``x = u - v_thresh``; the same formulas as ``coba_triton/surrogate.py``."""
    if METHOD == "super":
        q = alpha * tl.abs(x) + 1.0
        return divide(tl.full(q.shape, 1.0, q.dtype), q * q)
    elif METHOD == "triangle":
        return alpha * relu(1.0 - tl.abs(x))
    elif METHOD == "tanh":
        e = tl.exp(-2.0 * tl.abs(alpha * x))
        q = 1.0 + e
        return divide(4.0 * e, q * q)
    elif METHOD == "circ":
        square = alpha * alpha
        d = square + x * x
        return divide(square * alpha, d * square_root(d))
    elif METHOD == "heavi_erfc":
        a = alpha * x
        return TWO_OVER_SQRT_PI * tl.exp(-(a * a))
    else:
        tl.static_assert(METHOD == "heaviside", "unknown surrogate")
        return x * 0.0


class Adjoint(NamedTuple):
    """Derivatives of the loss by what one step computes.

    ``lam_v``, ``lam_e``, ``lam_i``: by the state before the step; ``drive_e``, ``drive_i``: by the drive;
    ``spike``: by ``u - v_thresh`` through the spike; ``u``, ``ds``: by ``u`` and by the bracket of ``dv``;
    ``g_e``, ``g_i``: by the new conductances.
    """

    lam_v: Any
    lam_e: Any
    lam_i: Any
    drive_e: Any
    drive_i: Any
    spike: Any
    u: Any
    ds: Any
    g_e: Any
    g_i: Any


@triton.jit
def vjp(
    z, u, v, g_e, g_i, grad_z, lam_v, lam_e, lam_i, in_v, in_e, in_i, c,
    JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """Adjoint of one step, summed in autograd's order, so that float32 gradients have autograd's bits.

    Args:
        z, u: spike (0 or 1) and potential before the reset.
        v: potential before the step; ``g_e``, ``g_i``: conductances after it.
        grad_z: incoming gradient of the spike, recurrence included.
        lam_v, lam_e, lam_i: gradient by the state after the step.
        in_v, in_e, in_i: incoming gradient by the recorded state before the step, or None.
        c: the step's constants.
    """
    spike = ((grad_z + lam_v * c.v_reset) - lam_v * u) * surrogate(u - c.v_thresh, c.alpha, METHOD)
    du = lam_v * (1.0 - z) + spike
    ds = du * c.k
    dg_e = lam_e + ds * (c.e_rev_E - v)
    dg_i = lam_i + ds * (c.e_rev_I - v)
    if in_v is None:
        lam_v = du
        lam_e = dg_e
        lam_i = dg_i
    else:
        lam_v = in_v + du
        lam_e = in_e + dg_e
        lam_i = in_i + dg_i
    lam_v = ((lam_v - ds * g_i) - ds * g_e) - ds * c.g_l
    if JUMP_FIRST:
        drive_e = dg_e + c.decay_e * dg_e
        drive_i = dg_i + c.decay_i * dg_i
        if in_v is None:
            lam_e = drive_e
            lam_i = drive_i
        else:
            lam_e = in_e + drive_e
            lam_i = in_i + drive_i
    else:
        drive_e = dg_e
        drive_i = dg_i
        lam_e = lam_e + c.decay_e * dg_e
        lam_i = lam_i + c.decay_i * dg_i
    return Adjoint(lam_v, lam_e, lam_i, drive_e, drive_i, spike, du, ds, dg_e, dg_i)


@triton.jit
def vjp_constants(acc, z, v, g_e, g_i, decayed_e, decayed_i, lam_v, a, c):
    """Add one step's gradient by the constants to ``acc``.

    Args:
        acc: a ``Constants`` of sums.
        z, v, g_e, g_i, lam_v: as in ``vjp``, ``lam_v`` being the gradient by the state after the step.
        decayed_e, decayed_i: the conductances that decayed: before the step, jump first with the drive added.
        a: the step's ``Adjoint``.
    """
    bracket = (c.g_l * (c.v_rest - v) + g_e * (c.e_rev_E - v)) + g_i * (c.e_rev_I - v)
    return Constants(
        acc.decay_e + a.g_e * decayed_e,
        acc.decay_i + a.g_i * decayed_i,
        acc.k + a.u * bracket,
        acc.g_l + a.ds * (c.v_rest - v),
        acc.e_rev_I + a.ds * g_i,
        acc.e_rev_E + a.ds * g_e,
        acc.v_rest + a.ds * c.g_l,
        acc.v_reset + lam_v * z,
        acc.v_thresh - a.spike,
        acc.alpha,
    )
