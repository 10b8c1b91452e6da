"""Rows of neurons: how a tile of them lies in memory, and how rows of all element types come in and go out.

A thread owns a range of neurons and walks it in tiles. A tile's state stays in the first-level cache for the whole
time block; a row is one time step of a tile. Arrays and layouts are those of ``kernels/feed_forward.py``. The arrays
that come in many element types and strides (``x``, ``spikes`` and their gradients) are passed as flat bytes with a
type code, so that Numba compiles an entry point once for each compute dtype and not once for each combination.

Rows of one tile that a loop writes are parts of one flat array, at offsets known when it is compiled: with an array
for each, LLVM would have too many pairs to prove disjoint, and would not vectorise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...neuron.records import Constants, State, Sums
from .numba_bridge import borrow, compiled, inlined, numbers_in, prefetch_line

# Neurons of a tile at the most: a row of float32 is 4 KiB.
TILE = 1024
# Elements from one row to the next: with a power of two, all rows would compete for the same few cache lines.
ROW = TILE + 48
FIELDS = len(State._fields)
# Where the rows of a tile begin: the state or its gradient, the constants, the steps for which neurons are held, the
# incoming gradient by the state before the step, the gradient by the constants.
# Without a refractory period the row of those steps is not touched, so it lies behind those that a step reads together.
STATE = 0
CONSTANTS = STATE + FIELDS * ROW
LEFT = CONSTANTS + len(Constants._fields) * ROW
RECORDED = LEFT + ROW
SUMS = RECORDED + FIELDS * ROW
# The end of the rows that each pass has in common with the others.
FORWARD_ROWS = RECORDED
BACKWARD_ROWS = SUMS + len(Sums._fields) * ROW

# Steps of unconnected neurons whose parts of a gradient by constants are added up before their sum joins the others.
SUMMED_STEPS = 64

# Bytes that arrive together from memory: 64 on x86; 128 on some others, which only asks twice.
LINE = 64

FLOAT32, FLOAT64, FLOAT16, BFLOAT16, UINT8 = range(5)


@compiled
def scratch_on_line(length: int, dtype: Any) -> Any:
    """An array, not filled, that begins where a line of memory begins.

    Otherwise a vector of a line's size lies in two lines, and to load or store it costs twice as much. Arrays that a kernel
    makes with NumPy's functions begin at multiples of 32 bytes only.
    """
    memory = np.empty(length + LINE, dtype)
    first = -memory.ctypes.data % LINE // memory.itemsize
    return memory[first : first + length]


@compiled
def first_from(ascending: Any, bound: int) -> int:
    """The index of the first number that is not below ``bound``. With NumPy's search, numba would load SciPy for it."""
    low, high = 0, len(ascending)
    while low < high:
        middle = (low + high) // 2
        if ascending[middle] < bound:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def state_at(tile: Any, at: int, j: int) -> State:
    """The state of neuron ``j`` in the rows from offset ``at`` on."""
    return State(tile[at + j], tile[at + ROW + j], tile[at + 2 * ROW + j])


@compiled
def put_state(tile: Any, at: int, j: int, s: State) -> None:
    """The inverse of :func:`state_at`."""
    tile[at + j] = s.v
    tile[at + ROW + j] = s.g_e
    tile[at + 2 * ROW + j] = s.g_i


@compiled
def left_at(tile: Any, at: int, j: int, holds: bool | None) -> Any:
    """The number of steps for which neuron ``j`` is still held, from the row at offset ``at``; None without ``holds``."""
    return None if holds is None else tile[at + j]


@compiled
def load_constants(tile: Any, first: int, j: int) -> Constants:
    """The constants of neuron ``j``, from the rows of the tile from offset ``first`` on."""
    return Constants(
        tile[first + j],
        tile[first + ROW + j],
        tile[first + 2 * ROW + j],
        tile[first + 3 * ROW + j],
        tile[first + 4 * ROW + j],
        tile[first + 5 * ROW + j],
        tile[first + 6 * ROW + j],
        tile[first + 7 * ROW + j],
        tile[first + 8 * ROW + j],
        tile[first + 9 * ROW + j],
        tile[first + 10 * ROW + j],
        tile[first + 11 * ROW + j],
    )


@compiled
def sums_at(tile: Any, j: int) -> Sums:
    """The gradients by the constants of neuron ``j``."""
    return Sums(
        tile[SUMS + j],
        tile[SUMS + ROW + j],
        tile[SUMS + 2 * ROW + j],
        tile[SUMS + 3 * ROW + j],
        tile[SUMS + 4 * ROW + j],
        tile[SUMS + 5 * ROW + j],
        tile[SUMS + 6 * ROW + j],
        tile[SUMS + 7 * ROW + j],
        tile[SUMS + 8 * ROW + j],
    )


@compiled
def put_sums(tile: Any, j: int, sums: Sums) -> None:
    """The inverse of :func:`sums_at`."""
    tile[SUMS + j] = sums.decay_e
    tile[SUMS + ROW + j] = sums.decay_i
    tile[SUMS + 2 * ROW + j] = sums.k
    tile[SUMS + 3 * ROW + j] = sums.g_l
    tile[SUMS + 4 * ROW + j] = sums.e_rev_I
    tile[SUMS + 5 * ROW + j] = sums.e_rev_E
    tile[SUMS + 6 * ROW + j] = sums.v_rest
    tile[SUMS + 7 * ROW + j] = sums.v_reset
    tile[SUMS + 8 * ROW + j] = sums.v_thresh


@compiled
def constants_of(tile: Any, j: int, shared: Constants | None) -> Any:
    return load_constants(tile, CONSTANTS, j) if shared is None else shared


@compiled
def copy(out: Any, source: Any, start: int, stride: int, neurons: int) -> None:
    """``neurons`` elements from ``start`` on, ``stride`` apart, converted to the dtype of ``out``."""
    if stride == 1:
        run = source[start : start + neurons]
        for j in range(neurons):
            out[j] = run[j]
    else:
        for j in range(neurons):
            out[j] = source[start + j * stride]


@inlined
def copy_part(out: Any, to: int, source: Any, start: int, neurons: int) -> None:
    """:func:`copy` of numbers side by side, from ``to`` on, for what is copied so often that a call would cost as much."""
    part, run = out[to : to + neurons], source[start : start + neurons]
    for j in range(neurons):
        part[j] = run[j]


@compiled
def load(out: Any, bits: Any, source: Any, code: int, start: int, stride: int, neurons: int) -> None:
    """A row of any element type, from flat bytes; ``bits`` is scratch."""
    if code == UINT8:
        copy(out, source, start, stride, neurons)
    elif code == FLOAT32:
        copy(out, numbers_in(source, np.float32), start, stride, neurons)
    elif code == FLOAT64:
        copy(out, numbers_in(source, np.float64), start, stride, neurons)
    else:
        copy(bits, numbers_in(source, np.uint16), start, stride, neurons)
        if code == BFLOAT16:
            for j in range(neurons):
                bits[j] = bits[j] << 16
        else:
            widen_float16(bits, neurons)
        copy(out, numbers_in(bits, np.float32), 0, 1, neurons)


@compiled
def widen_float16(bits: Any, neurons: int) -> None:
    """float16 to float32, in place: the exponent is rebased by a product, which is exact and normalises subnormals."""
    numbers = numbers_in(bits, np.float32)
    rebase = np.float32(2.0**112)
    for j in range(neurons):
        bits[j] = ((bits[j] & 0x8000) << 16) | ((bits[j] & 0x7FFF) << 13)
    for j in range(neurons):
        numbers[j] = numbers[j] * rebase
    for j in range(neurons):
        if (bits[j] & 0x7FFFFFFF) >= 0x47800000:  # 65536 and more: infinity or NaN
            bits[j] = bits[j] | 0x7F800000


@compiled
def store(target: Any, code: int, start: int, row: Any, bits: Any, neurons: int) -> None:
    """A row into flat bytes of any floating element type, rounded to the nearest; ``bits`` is scratch."""
    if code == FLOAT32:
        copy(numbers_in(target, np.float32)[start : start + neurons], row, 0, 1, neurons)
    elif code == FLOAT64:
        copy(numbers_in(target, np.float64)[start : start + neurons], row, 0, 1, neurons)
    else:
        copy(numbers_in(bits, np.float32), row, 0, 1, neurons)
        halves = numbers_in(target, np.uint16)[start : start + neurons]
        if code == BFLOAT16:
            narrow_bfloat16(halves, bits, neurons)
        else:
            narrow_float16(halves, bits, neurons)


@compiled
def narrow_bfloat16(out: Any, bits: Any, neurons: int) -> None:
    for j in range(neurons):
        b = np.int64(bits[j])
        is_nan = (b & 0x7FFFFFFF) > 0x7F800000
        out[j] = 0x7FC0 if is_nan else (b + 0x7FFF + ((b >> 16) & 1)) >> 16


@compiled
def narrow_float16(out: Any, bits: Any, neurons: int) -> None:
    for j in range(neurons):
        b = np.int64(bits[j])
        magnitude = b & 0x7FFFFFFF
        exponent: Any = magnitude >> 23
        if exponent < 113:  # a subnormal counts units of 2**-24
            shift = min(126 - exponent, 25)
            fraction = (magnitude & 0x7FFFFF) | 0x800000
        else:
            shift = 13
            fraction = magnitude - (112 << 23)
        rounded = (fraction + (1 << (shift - 1)) - 1 + ((fraction >> shift) & 1)) >> shift
        if magnitude >= 0x47800000:  # 65536 and more
            rounded = 0x7E00 if magnitude > 0x7F800000 else 0x7C00
        out[j] = rounded | ((b >> 16) & 0x8000)


class Strided(NamedTuple):
    """``[T, M]`` of any element type: flat bytes, the code and size of an element, and the strides in elements."""

    data: Any
    code: int
    itemsize: int
    stride_t: int
    stride_m: int


@compiled
def borrow_strided(x: Strided) -> Strided:
    return Strided(borrow(x.data), x.code, x.itemsize, x.stride_t, x.stride_m)


@compiled
def prefetch(x: Strided, t: int, first: int, neurons: int) -> None:
    """Ask for a row ahead of its use: the processor's own prefetching stops at the end of a row."""
    if x.stride_m == 1 and t >= 0:
        begin = (t * x.stride_t + first) * x.itemsize
        for index in range(begin, min(begin + neurons * x.itemsize, x.data.size), LINE):
            prefetch_line(x.data, index)


@compiled
def row_of(buffer: Any, bits: Any, x: Strided, t: int, first: int, neurons: int) -> Any:
    """A row as an array of the compute dtype: the memory itself where it can be, else a copy in ``buffer``."""
    start = t * x.stride_t + first * x.stride_m
    if x.stride_m == 1 and x.code == (FLOAT64 if buffer.itemsize == 8 else FLOAT32):
        return numbers_in(x.data, buffer.dtype)[start : start + neurons]
    load(buffer, bits, x.data, x.code, start, x.stride_m, neurons)
    return buffer


@compiled
def expand(target: Any, itemsize: int, one: int, start: int, spikes: Any, neurons: int) -> None:
    """Spikes, a byte each, into flat bytes of ``itemsize``, where a spike has the bits ``one``."""
    if itemsize == 2:
        scale(numbers_in(target, np.uint16)[start : start + neurons], spikes, one, neurons)
    elif itemsize == 4:
        scale(numbers_in(target, np.uint32)[start : start + neurons], spikes, one, neurons)
    else:
        scale(numbers_in(target, np.uint64)[start : start + neurons], spikes, one, neurons)


@compiled
def scale(out: Any, spikes: Any, one: int, neurons: int) -> None:
    for j in range(neurons):
        out[j] = one if spikes[j] else 0


@compiled
def pack(words: Any, spikes: Any, bit: int, neurons: int) -> None:
    """Spikes into one bit of their words; bit 0 begins new ones."""
    for j in range(neurons):
        word = np.int32(spikes[j] << bit)
        words[j] = word if bit == 0 else words[j] | word


@compiled
def load_shared(shared: Any) -> Constants:
    """The constants that all neurons share."""
    return Constants(
        shared[0],
        shared[1],
        shared[2],
        shared[3],
        shared[4],
        shared[5],
        shared[6],
        shared[7],
        shared[8],
        shared[9],
        shared[10],
        shared[11],
    )


@compiled
def load_per_neuron(tile: Any, per_neuron: Any, first: int, neurons: int) -> None:
    """Fill the constants of a tile that starts at neuron ``first``."""
    if per_neuron is not None:
        for row in range(len(per_neuron)):
            copy(tile[CONSTANTS + row * ROW : CONSTANTS + (row + 1) * ROW], per_neuron[row], first, 1, neurons)


@compiled
def row_of_field(at: int, left: int, k: int) -> int:
    """Where the row of a state's field ``k`` begins: from ``at`` on, side by side, but the last one at ``left``."""
    return at + k * ROW if k < FIELDS else left


@compiled
def load_state(
    tile: Any, at: int, left: int, states: Any, first: int, every: int, begin: int, neurons: int, count: int
) -> None:  # fmt: skip
    """Rows ``first``, ``first + every``, ... of ``states`` into the ``count`` rows of a state."""
    for k in range(count):
        row = row_of_field(at, left, k)
        copy(tile[row : row + ROW], states[first + k * every], begin, 1, neurons)


@compiled
def store_state(tile: Any, states: Any, first: int, every: int, begin: int, neurons: int, count: int) -> None:
    """The inverse of :func:`load_state`, for the state of a tile."""
    for k in range(count):
        copy(states[first + k * every, begin : begin + neurons], tile, row_of_field(STATE, LEFT, k), 1, neurons)
