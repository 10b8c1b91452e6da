"""The adjoint of one step: how the derivatives of a loss go back through :mod:`coba_triton.neuron.step`.

Sums have the order in which autograd adds them up, so that float32 gradients have autograd's bits.
"""

from __future__ import annotations

from .operations import where
from .records import Adjoint, Drive, State, Sums
from .surrogate import surrogate


def vjp(z, kept, left, grad_z, lam, recorded, c, JUMP_FIRST, METHOD):
    """The derivatives by what a step reads, from those by what it leaves.

    Args:
        z: 1 where the neuron spiked, else 0.
        kept: what the step kept.
        left: number of steps for which the neuron was still held before the step, or None.
        grad_z: gradient by the spike, with what the recurrence sends back.
        lam: gradient by the state after the step.
        recorded: gradient by the recorded state before the step, or None.
        c: the step's constants.
        JUMP_FIRST: whether the drive was added before the decay.
        METHOD: name of the spike's derivative.
    """
    spike = ((grad_z + lam.v * c.v_reset) - lam.v * kept.u) * surrogate(kept.u - c.v_thresh, c.alpha, METHOD)
    du = lam.v * (1.0 - z) + spike
    if left is not None:
        spike = where(left > 0.0, 0.0, spike)
        du = where(left > 0.0, 0.0, du)
    ds = du * c.k
    dg_e = lam.g_e + ds * (c.e_rev_E - c.coupling * kept.v)
    dg_i = lam.g_i + ds * (c.e_rev_I - c.coupling * kept.v)
    lam_v = du
    lam_e = dg_e
    lam_i = dg_i
    if recorded is not None:
        lam_v = recorded.v + du
        lam_e = recorded.g_e + dg_e
        lam_i = recorded.g_i + dg_i
    lam_v = ((lam_v - (ds * kept.g_i) * c.coupling) - (ds * kept.g_e) * c.coupling) - ds * c.g_l
    if JUMP_FIRST:
        drive_e = dg_e + c.decay_e * dg_e
        drive_i = dg_i + c.decay_i * dg_i
        lam_e = drive_e
        lam_i = drive_i
        if recorded is not None:
            lam_e = recorded.g_e + drive_e
            lam_i = recorded.g_i + drive_i
    else:
        drive_e = dg_e
        drive_i = dg_i
        lam_e = lam_e + c.decay_e * dg_e
        lam_i = lam_i + c.decay_i * dg_i
    return Adjoint(State(lam_v, lam_e, lam_i), Drive(drive_e, drive_i), spike, du, ds, dg_e, dg_i)


def vjp_input(x, drive):
    """The derivative by a net input ``x``, from that by the drive into which its sign split it."""
    return where(x > 0.0, drive.e, 0.0) - where(x < 0.0, drive.i, 0.0)


def vjp_constants(sums, z, kept, left, decayed_e, decayed_i, lam, a, c):
    """The sums over time of the derivatives by the constants, with one step added.

    Args:
        sums: of the steps so far.
        z, kept, left, lam, c: as :func:`vjp` takes them.
        decayed_e: excitatory conductance that decayed in the step, see :func:`~coba_triton.neuron.step.decaying`.
        decayed_i: inhibitory conductance that decayed in the step.
        a: what :func:`vjp` returned.
    """
    by_e = kept.g_e * (c.e_rev_E - c.coupling * kept.v)
    by_i = kept.g_i * (c.e_rev_I - c.coupling * kept.v)
    bracket = (c.g_l * (c.v_rest - kept.v) + by_e) + by_i
    by_reset = lam.v * z
    if left is not None:
        by_reset = where(left > 0.0, lam.v, by_reset)
    return Sums(
        sums.decay_e + a.g_e * decayed_e,
        sums.decay_i + a.g_i * decayed_i,
        sums.k + a.u * bracket,
        sums.g_l + a.ds * (c.v_rest - kept.v),
        sums.e_rev_I + a.ds * kept.g_i,
        sums.e_rev_E + a.ds * kept.g_e,
        sums.v_rest + a.ds * c.g_l,
        sums.v_reset + by_reset,
        sums.v_thresh - a.spike,
    )
