"""The neuron for Triton: its equations and their adjoint, compiled, and how a kernel holds a neuron's state.

The functions are those of ``coba_triton/neuron``, with Triton's operations. Each operation rounds once: kernels must be
launched with ``enable_fp_fusion=False``.

A kernel carries the fields of a state as a tuple of registers and does not know what they are.
"""

import triton
import triton.language as tl

from ..neuron import adjoint, step
from ..neuron import surrogate as derivatives
from ..neuron.operations import bind
from ..neuron.records import Adjoint, Constants, Drive, Kept, State, Sums  # noqa: F401 - what the functions find here

NUM_CONSTANTS: tl.constexpr = tl.constexpr(len(Constants._fields))
NUM_SUMS: tl.constexpr = tl.constexpr(len(Sums._fields))
NUM_FIELDS: tl.constexpr = tl.constexpr(len(State._fields))  # of a state, that have a derivative
TWO_OVER_SQRT_PI: tl.constexpr = tl.constexpr(derivatives.TWO_OVER_SQRT_PI)


@triton.jit
def relu(x):
    # a NaN goes through, as in torch.relu
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def exp(x):
    return tl.exp(x)


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


def compiled(function):
    """A function of the neuron, compiled by Triton."""
    return triton.jit(bind(function, globals()))


split_input = compiled(step.split_input)
add_drive = compiled(step.add_drive)
decaying = compiled(step.decaying)
integrate = compiled(step.integrate)
excess = compiled(step.excess)
fire = compiled(step.fire)
reset = compiled(step.reset)
count_down = compiled(step.count_down)
super_spike = compiled(derivatives.super_spike)
triangle = compiled(derivatives.triangle)
tanh = compiled(derivatives.tanh)
circ = compiled(derivatives.circ)
heavi_erfc = compiled(derivatives.heavi_erfc)
surrogate = compiled(derivatives.surrogate)
vjp = compiled(adjoint.vjp)
vjp_input = compiled(adjoint.vjp_input)
vjp_constants = compiled(adjoint.vjp_constants)


@triton.jit
def load_fields(pointers, stride, mask, COUNT: tl.constexpr):
    """``COUNT`` arrays that lie ``stride`` elements apart, a register each."""
    stride = tl.cast(stride, tl.int64)
    fields = ()
    for i in tl.static_range(COUNT):
        fields = fields + (tl.load(pointers + i * stride, mask=mask),)
    return fields


@triton.jit
def store_fields(pointers, stride, fields, mask, COUNT: tl.constexpr):
    """The inverse of :func:`load_fields`."""
    stride = tl.cast(stride, tl.int64)
    for i in tl.static_range(COUNT):
        tl.store(pointers + i * stride, fields[i], mask=mask)


@triton.jit
def load_constants(constants_ptr, stride, neurons, mask, PER_NEURON: tl.constexpr):
    """The constants as scalars, or per neuron."""
    stride = tl.cast(stride, tl.int64)
    values = ()
    for row in tl.static_range(NUM_CONSTANTS):
        if PER_NEURON:
            value = tl.load(constants_ptr + row * stride + neurons, mask=mask, other=None if mask is None else 1.0)
        else:
            value = tl.load(constants_ptr + row)
        values = values + (value,)
    return Constants(
        values[0],
        values[1],
        values[2],
        values[3],
        values[4],
        values[5],
        values[6],
        values[7],
        values[8],
        values[9],
        values[10],
        values[11],
    )


@triton.jit
def no_sums(zeros):
    return Sums(zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)


@triton.jit
def sums_of(fields):
    return Sums(
        fields[0], fields[1], fields[2], fields[3], fields[4], fields[5], fields[6], fields[7], fields[8]
    )  # fmt: skip


@triton.jit
def state_of(fields):
    return State(fields[0], fields[1], fields[2])


@triton.jit
def advance(fields, drive, recurrent, spike, mask, c, JUMP_FIRST: tl.constexpr):
    """One step: what is before the reset, whether it spiked, and the fields after it.

    Args:
        fields: of the state before the step.
        drive: of the input.
        recurrent: drive, or None.
        spike: whether each neuron spikes where that is known, else None.
        mask: which registers hold a neuron that may spike; None: all of them.
        c: the constants.
    """
    left = None
    if len(fields) == 4:
        left = fields[3]
    u = integrate(state_of(fields), drive, recurrent, c, JUMP_FIRST)
    if spike is None:
        spike = fire(excess(u, c), left)
        if mask is not None:
            spike = spike & mask
    z = spike.to(u.v.dtype)
    after = reset(u, z, left, c)
    fields = (after.v, after.g_e, after.g_i)
    if left is not None:
        fields = fields + (count_down(left, z, c),)
    return u, spike, fields


@triton.jit
def keep(fields, u):
    """What the adjoint of a step needs of the fields before it and of what is before the reset, as a tuple."""
    kept = (fields[0], u.v, u.g_e, u.g_i)
    if len(fields) == 4:
        kept = kept + (fields[3],)
    return kept


@triton.jit
def sweep(z, kept, grad_z, lam, recorded, c, JUMP_FIRST: tl.constexpr, METHOD: tl.constexpr):
    """The adjoint of a step, from what :func:`keep` returned; ``lam``: by the state after it."""
    left = None
    if len(kept) == 5:
        left = kept[4]
    return vjp(z, Kept(kept[0], kept[1], kept[2], kept[3]), left, grad_z, lam, recorded, c, JUMP_FIRST, METHOD)


@triton.jit
def add_sums(sums, z, kept, decayed_e, decayed_i, lam, a, c):
    """The sums over time of the derivatives by the constants, with this step added."""
    left = None
    if len(kept) == 5:
        left = kept[4]
    return vjp_constants(sums, z, Kept(kept[0], kept[1], kept[2], kept[3]), left, decayed_e, decayed_i, lam, a, c)
