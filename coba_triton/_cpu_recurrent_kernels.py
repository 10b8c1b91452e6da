"""The CPU kernels of recurrent populations, event driven; arrays are those of ``kernels/recurrent.py``.

A thread owns whole batch rows, so that none waits for another. Sums over synapses have the one order of all event-driven
kernels: ascending by source.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ._cpu_kernels import _entry_point, _sources, compiled, load_shared, relu, vjp, vjp_constants
from .model import Constants
from .reference import add_drive, integrate, reset


@compiled
def constants_at(shared: Any, per_neuron: Any, cell: int) -> Any:
    """The constants of a neuron: ``shared``, or those in column ``cell`` of ``per_neuron`` [10, B N]."""
    if per_neuron is None:
        return shared
    return Constants(
        per_neuron[0, cell],
        per_neuron[1, cell],
        per_neuron[2, cell],
        per_neuron[3, cell],
        per_neuron[4, cell],
        per_neuron[5, cell],
        per_neuron[6, cell],
        per_neuron[7, cell],
        per_neuron[8, cell],
        per_neuron[9, cell],
    )


@compiled
def add_row(drive_e: Any, drive_i: Any, weights: Any, value: Any) -> None:
    """Add the synapses of one source."""
    for n in range(len(drive_e)):
        drive_e[n] += relu(weights[n]) * value
        drive_i[n] += relu(-weights[n]) * value


@compiled
def add_spikes(drive_e: Any, drive_i: Any, weights: Any, fired: Any, count: int) -> None:
    """Add the synapses of the neurons that fired, one after the other, four of them in a pass over the drive."""
    whole = count // 4 * 4
    for k in range(0, whole, 4):
        a, b, c, d = weights[fired[k]], weights[fired[k + 1]], weights[fired[k + 2]], weights[fired[k + 3]]
        for n in range(len(drive_e)):
            drive_e[n] = (((drive_e[n] + relu(a[n])) + relu(b[n])) + relu(c[n])) + relu(d[n])
            drive_i[n] = (((drive_i[n] + relu(-a[n])) + relu(-b[n])) + relu(-c[n])) + relu(-d[n])
    for k in range(whole, count):
        a = weights[fired[k]]
        for n in range(len(drive_e)):
            drive_e[n] += relu(a[n])
            drive_i[n] += relu(-a[n])


@compiled
def step_row(
    v: Any, g_e: Any, g_i: Any, input_e: Any, input_i: Any, recurrent_e: Any, recurrent_i: Any, spikes: Any,
    shared: Any, per_neuron: Any, cell: int, jump_first: bool,
) -> None:  # fmt: skip
    """One step of a row of neurons; ``spikes`` takes 0 or 1."""
    for n in range(len(v)):
        c = constants_at(shared, per_neuron, cell + n)
        u, new_e, new_i = integrate(
            v[n], g_e[n], g_i[n], input_e[n], input_i[n], recurrent_e[n], recurrent_i[n], c, jump_first
        )
        spike = (u - c.v_thresh) > 0.0
        z: Any = 1.0 if spike else 0.0
        v[n] = reset(u, z, c)
        g_e[n] = new_e
        g_i[n] = new_i
        spikes[n] = spike


@functools.cache
def projection_kernel() -> Any:
    """``relu(W) x`` and ``relu(-W) x`` for the rows from ``first`` to ``last``."""
    sources = _sources()

    def projection(values: Any, weights: Any, drive: Any, first: int, last: int) -> None:
        _ = sources  # part of the key of the disk cache
        for row in range(first, last):
            drive[0, row] = 0
            drive[1, row] = 0
            for k in range(values.shape[1]):
                if values[row, k] != 0:
                    add_row(drive[0, row], drive[1, row], weights[k], values[row, k])

    return _entry_point(projection)


@functools.cache
def block_kernel() -> Any:
    """A block of the event-driven forward for the batch rows from ``first`` to ``last``."""
    sources = _sources()

    def block(
        drive: Any, initial: Any, weights: Any, shared: Any, per_neuron: Any, state: Any, spikes: Any, states: Any,
        jump_first: bool, first: int, last: int,
    ) -> None:  # fmt: skip
        """``state`` is carried on; ``spikes [T, B, N]`` are bytes; ``states`` without elements is not written."""
        _ = sources  # part of the key of the disk cache
        steps, neurons = spikes.shape[0], spikes.shape[2]
        fired = np.empty(neurons, np.int32)
        c = None if shared is None else load_shared(shared)
        for row in range(first, last):
            recurrent_e = initial[0, row].copy()
            recurrent_i = initial[1, row].copy()
            count = 0
            for t in range(steps):
                add_spikes(recurrent_e, recurrent_i, weights, fired, count)
                step_row(
                    state[0, row], state[1, row], state[2, row], drive[0, t, row], drive[1, t, row],
                    recurrent_e, recurrent_i, spikes[t, row], c, per_neuron, row * neurons, jump_first,
                )  # fmt: skip
                if states.size > 0:
                    for k in range(3):
                        states[k, t, row] = state[k, row]
                count = 0
                for n in range(neurons):
                    if spikes[t, row, n]:
                        fired[count] = n
                        count += 1
                recurrent_e[:] = 0
                recurrent_i[:] = 0

    return _entry_point(block)


@functools.cache
def driven_kernel() -> Any:
    """Steps whose recurrent drive is known, for the cells from ``first`` to ``last``."""
    sources = _sources()

    def driven(
        drive: Any, recurrent: Any, shared: Any, per_neuron: Any, state: Any, spikes: Any, forced: bool, states: Any,
        trajectory: Any, jump_first: bool, first: int, last: int,
    ) -> None:  # fmt: skip
        """``state [3, M]`` is carried on; with ``forced`` the spikes are given: the path that was simulated, always."""
        _ = sources  # part of the key of the disk cache
        shared_constants = None if shared is None else load_shared(shared)
        for t in range(spikes.shape[0]):
            for m in range(first, last):
                c = constants_at(shared_constants, per_neuron, m)
                v, g_e, g_i = state[0, m], state[1, m], state[2, m]
                decayed_e, decayed_i = g_e, g_i
                if jump_first:
                    decayed_e = add_drive(g_e, drive[0, t, m], recurrent[0, t, m])
                    decayed_i = add_drive(g_i, drive[1, t, m], recurrent[1, t, m])
                u, g_e, g_i = integrate(
                    v, g_e, g_i, drive[0, t, m], drive[1, t, m], recurrent[0, t, m], recurrent[1, t, m], c, jump_first
                )
                if not forced:
                    spikes[t, m] = (u - c.v_thresh) > 0.0
                z: Any = 1.0 if spikes[t, m] else 0.0
                if trajectory.size > 0:
                    trajectory[0, t, m] = v
                    trajectory[1, t, m] = u
                    trajectory[2, t, m] = g_e
                    trajectory[3, t, m] = g_i
                    trajectory[4, t, m] = decayed_e
                    trajectory[5, t, m] = decayed_i
                state[0, m] = reset(u, z, c)
                state[1, m] = g_e
                state[2, m] = g_i
                if states.size > 0:
                    for k in range(3):
                        states[k, t, m] = state[k, m]

    return _entry_point(driven)


@functools.cache
def sweep_kernel(method: str) -> Any:
    """The adjoint of one step of a block, for the batch rows from ``first`` to ``last``."""
    sources = _sources()

    def sweep(
        t: int, trajectory: Any, spikes: Any, shared: Any, per_neuron: Any, grad_spikes: Any, grad_before: Any, lam: Any,
        lam_z: Any, adjoints: Any, grad_constants: Any, jump_first: bool, first: int, last: int,
    ) -> None:  # fmt: skip
        """``grad_before [3, B, N]``: incoming gradient by the recorded state before the step."""
        _ = sources  # part of the key of the disk cache
        neurons = lam_z.shape[1]
        shared_constants = None if shared is None else load_shared(shared)
        for row in range(first, last):
            for n in range(neurons):
                m = row * neurons + n
                c = constants_at(shared_constants, per_neuron, m)
                z = 1.0 if spikes[t, row, n] else 0.0
                grad_z = lam_z[row, n]
                if grad_spikes.size > 0:
                    grad_z = grad_spikes[t, row, n] + grad_z
                v, g_e, g_i = trajectory[0, t, row, n], trajectory[2, t, row, n], trajectory[3, t, row, n]
                lam_v = lam[0, row, n]
                a = vjp(
                    z, trajectory[1, t, row, n], v, g_e, g_i, grad_z, lam_v, lam[1, row, n], lam[2, row, n],
                    grad_before[0, row, n], grad_before[1, row, n], grad_before[2, row, n], c, jump_first, method,
                )  # fmt: skip
                if grad_constants.size > 0:
                    acc = constants_at(None, grad_constants, m)
                    acc = vjp_constants(acc, z, v, g_e, g_i, trajectory[4, t, row, n], trajectory[5, t, row, n], lam_v, a, c)
                    grad_constants[0, m] = acc.decay_e
                    grad_constants[1, m] = acc.decay_i
                    grad_constants[2, m] = acc.k
                    grad_constants[3, m] = acc.g_l
                    grad_constants[4, m] = acc.e_rev_I
                    grad_constants[5, m] = acc.e_rev_E
                    grad_constants[6, m] = acc.v_rest
                    grad_constants[7, m] = acc.v_reset
                    grad_constants[8, m] = acc.v_thresh
                lam[0, row, n] = a.lam_v
                lam[1, row, n] = a.lam_e
                lam[2, row, n] = a.lam_i
                adjoints[t, row, n] = a.drive_e
                adjoints[t, row, neurons + n] = a.drive_i

    return _entry_point(sweep)
