"""The neuron's equations: one forward Euler step.

These are plain functions of numbers, of arrays of registers or of tensors. The reference runs them with PyTorch's
operations, Triton and Numba compile them. Each operation rounds once and keeps its place: so all give the same bits.
Parameters have no annotations, because Triton would evaluate them: ``s`` and ``u`` are a ``State``, ``drive`` and
``recurrent`` a ``Drive``, ``c`` the ``Constants``. ``left`` is the number of steps for which a neuron is still held, or None
where there is no refractory period. It is no field of ``State``, because Triton 3.6 cannot return a record with None.
"""

from __future__ import annotations

from .operations import relu, where
from .records import Drive, State


def split_input(x):
    """The drive of a net input in uS: what is positive is excitatory, what is negative inhibitory."""
    return Drive(relu(x), relu(-x))


def add_drive(g_e, g_i, drive, recurrent):
    """Both conductances with the input's drive added, and then the recurrent one, if there is one."""
    g_e = g_e + drive.e
    g_i = g_i + drive.i
    if recurrent is not None:
        g_e = g_e + recurrent.e
        g_i = g_i + recurrent.i
    return g_e, g_i


def decaying(s, drive, recurrent, JUMP_FIRST):
    """Both conductances as they are when they decay: before the drive joins them or, jump first, after it."""
    g_e = s.g_e
    g_i = s.g_i
    if JUMP_FIRST:
        g_e, g_i = add_drive(g_e, g_i, drive, recurrent)
    return g_e, g_i


def integrate(s, drive, recurrent, c, JUMP_FIRST):
    """The potential before the reset and the new conductances."""
    g_e, g_i = decaying(s, drive, recurrent, JUMP_FIRST)
    g_e = g_e + c.decay_e * g_e
    g_i = g_i + c.decay_i * g_i
    if not JUMP_FIRST:
        g_e, g_i = add_drive(g_e, g_i, drive, recurrent)
    dv = c.k * ((c.g_l * (c.v_rest - s.v) + g_e * (c.e_rev_E - c.coupling * s.v)) + g_i * (c.e_rev_I - c.coupling * s.v))
    return State(s.v + dv, g_e, g_i)


def excess(u, c):
    """How far the potential is above the threshold, in mV."""
    return u.v - c.v_thresh


def fire(x, left):
    """Whether a neuron spikes whose potential is ``x`` above the threshold; one that is held does not."""
    z = x > 0.0
    if left is not None:
        z = z & (left <= 0.0)
    return z


def reset(u, z, left, c):
    """The state after the step; ``z`` is 1 where the neuron spiked, else 0."""
    v = (1.0 - z) * u.v + z * c.v_reset
    if left is not None:
        v = where(left > 0.0, c.v_reset, v)
    return State(v, u.g_e, u.g_i)


def count_down(left, z, c):
    """The number of steps for which a neuron is held after this one: all of them where it spiked, else one less."""
    return z * c.n_ref + relu(left - 1.0)
