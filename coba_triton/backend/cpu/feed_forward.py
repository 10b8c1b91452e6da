"""The CPU kernels: the reference's own functions, compiled by Numba for rows of neurons.

A thread owns a range of neurons and walks it in tiles. A tile's state stays in the first-level cache for the whole
time block; a row is one time step of a tile. Arrays and layouts are those of ``kernels/feed_forward.py``. The arrays
that come in many element types and strides (``x``, ``spikes`` and their gradients) are passed as flat bytes with a
type code, so that Numba compiles an entry point once for each compute dtype and not once for each combination.

Rows of one tile that a loop writes are parts of one flat array, at offsets known when it is compiled: with an array
for each, LLVM would have too many pairs to prove disjoint, and would not vectorise.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, event
from numba.extending import intrinsic, overload

from ...neuron import records
from ...neuron import surrogate as surrogates
from ...neuron.records import Constants
from ...neuron.surrogate import SURROGATES
from .. import reference
from ..choose import logger
from ..reference import add_drive, integrate, reset
from .cache import KernelCache

OPTIONS: Any = {"nogil": True, "fastmath": False, "error_model": "numpy"}

# Neurons of a tile at the most: a row of float32 is 4 KiB.
TILE = 1024
# Elements from one row to the next: with a power of two, all rows would compete for the same few cache lines.
ROW = TILE + 48
# Where the rows of a tile begin: the state or its gradient, the constants, the incoming gradient by the state before
# the step, the gradient by the constants.
V, G_E, G_I = 0, ROW, 2 * ROW
CONSTANTS = 3 * ROW
IN_V, IN_E, IN_I = 13 * ROW, 14 * ROW, 15 * ROW
SUMS = 16 * ROW
# Rows of a replayed step: the state before it and its u; the state after it begins the next frame.
U = 3 * ROW
FRAME = 4 * ROW

# Bytes that arrive together from memory: 64 on x86; 128 on some others, which only asks twice.
LINE = 64

FLOAT32, FLOAT64, FLOAT16, BFLOAT16, UINT8 = range(5)


def _with_literals(function: Callable[..., Any], dtype: type) -> Callable[..., Any]:
    """The function with its float literals in ``dtype``: as in PyTorch, and unlike in NumPy, they do not promote."""

    def cast(value: Any) -> Any:
        return dtype(value) if type(value) is float else value

    code = function.__code__
    names = {name: cast(value) for name, value in function.__globals__.items()} | {"torch": _numbers()}
    return types.FunctionType(code.replace(co_consts=tuple(map(cast, code.co_consts))), names, function.__name__)


def _compute_dtype(arguments: tuple[Any, ...]) -> type:
    """The dtype of the first floating-point argument, a number or an array; float64 if there is none."""
    kinds = (getattr(argument, "dtype", argument) for argument in arguments)
    return next((getattr(np, str(kind)) for kind in kinds if isinstance(kind, numba.types.Float)), np.float64)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let compiled code call a plain function; returns the function, which stays plain Python."""

    @overload(function, jit_options=OPTIONS, strict=False, prefer_literal=True)
    def choose(*arguments: Any) -> Callable[..., Any]:
        return _with_literals(function, _compute_dtype(arguments))

    return function


_shared: list[Callable[..., Any]] = [add_drive, integrate, reset, *filter(None, SURROGATES.values())]
for _function in _shared:
    compiled(_function)


@compiled
def relu(x: Any) -> Any:
    # a NaN goes through, as in torch.relu
    return 0.0 if x < 0.0 else x


@functools.cache
def _numbers() -> types.ModuleType:
    """What ``torch`` is to a compiled function: the same operations on numbers."""
    module = types.ModuleType("numbers")
    vars(module).update(abs=np.abs, exp=np.exp, sqrt=np.sqrt, relu=relu)
    return module


def surrogate(x: Any, alpha: Any, METHOD: str) -> Any:
    """Derivative of the spike at ``x = u - v_thresh``: the function of that name in :data:`SURROGATES`."""
    derivative = SURROGATES[METHOD]
    return x * 0.0 if derivative is None else derivative(x, alpha)


@overload(surrogate, jit_options=OPTIONS, strict=False, prefer_literal=True)
def _choose_surrogate(x: Any, alpha: Any, METHOD: Any) -> Callable[..., Any]:
    derivative = SURROGATES[METHOD.literal_value]
    if derivative is None:
        return _with_literals(lambda x, alpha, METHOD: x * 0.0, _compute_dtype((x,)))
    return lambda x, alpha, METHOD: derivative(x, alpha)


class Adjoint(NamedTuple):
    """Derivatives of the loss by what one step computes, as in ``kernels/step.py``."""

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


@compiled
def vjp(
    z: Any, u: Any, v: Any, g_e: Any, g_i: Any, grad_z: Any, lam_v: Any, lam_e: Any, lam_i: Any,
    in_v: Any, in_e: Any, in_i: Any, c: Constants, JUMP_FIRST: bool, METHOD: str,
) -> Adjoint:  # fmt: skip
    """Adjoint of one step: the lines of ``kernels/step.py``, where they are documented."""
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


@compiled
def vjp_constants(
    acc: Constants, z: Any, v: Any, g_e: Any, g_i: Any, decayed_e: Any, decayed_i: Any, lam_v: Any,
    a: Adjoint, c: Constants,
) -> Constants:  # fmt: skip
    """Add one step's gradient by the constants: the lines of ``kernels/step.py``, where they are documented."""
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


@compiled
def load_constants(tile: Any, first: int, j: int) -> Constants:
    """Ten rows of the tile from offset ``first`` on, at neuron ``j``."""
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
    )


@compiled
def store_constants(tile: Any, first: int, j: int, c: Constants) -> None:
    """The inverse of :func:`load_constants`, but for alpha, which gets no gradient."""
    tile[first + j] = c.decay_e
    tile[first + ROW + j] = c.decay_i
    tile[first + 2 * ROW + j] = c.k
    tile[first + 3 * ROW + j] = c.g_l
    tile[first + 4 * ROW + j] = c.e_rev_I
    tile[first + 5 * ROW + j] = c.e_rev_E
    tile[first + 6 * ROW + j] = c.v_rest
    tile[first + 7 * ROW + j] = c.v_reset
    tile[first + 8 * ROW + j] = c.v_thresh


@compiled
def constants_of(tile: Any, j: int, shared: Constants | None) -> Any:
    return load_constants(tile, CONSTANTS, j) if shared is None else shared


@compiled
def forward_row(tile: Any, x: Any, spikes: Any, neurons: int, jump_first: bool, shared: Constants | None) -> None:
    """One step: the state in ``tile`` advances, ``spikes`` takes 0 or 1."""
    for j in range(neurons):
        c = constants_of(tile, j, shared)
        input_e, input_i = relu(x[j]), relu(-x[j])
        u, g_e, g_i = integrate(tile[V + j], tile[G_E + j], tile[G_I + j], input_e, input_i, None, None, c, jump_first)
        spike = (u - c.v_thresh) > 0.0
        z: Any = 1.0 if spike else 0.0
        tile[V + j] = reset(u, z, c)
        tile[G_E + j] = g_e
        tile[G_I + j] = g_i
        spikes[j] = spike


# A checksum of rows of words has 16 lanes for every group of 64 columns: lane j takes in the columns j, j + 16, ...
LANES = 16
GROUP = 4 * LANES
_MULTIPLIER = np.uint32(0x9E3779B1)


@numba.njit(inline="always", **OPTIONS)
def turned(x: Any, bits: int) -> Any:
    """A word of 32 bits, turned to the left."""
    return np.uint32((x << np.uint32(bits)) | (x >> np.uint32(32 - bits)))


@compiled
def add_groups(sums: Any, row: Any, columns: int) -> None:
    for g in range(columns // GROUP):
        for j in range(LANES):
            k = GROUP * g + j
            word = row[k] + turned(row[k + 16], 7) + turned(row[k + 32], 14) + turned(row[k + 48], 21)
            sums[LANES * g + j] = np.uint32(turned(np.uint32(sums[LANES * g + j] * _MULTIPLIER), 13) + word)


@compiled
def add_row(sums: Any, rest: Any, row: Any, columns: int) -> None:
    """Fold a row of words into the lanes of a checksum, so that it does not matter who takes which groups of columns.

    A change of one word changes its lane for good, as the lane's other steps can be undone. ``rest [64]`` is scratch.
    """
    add_groups(sums, row, columns)
    if columns % GROUP:
        whole = columns // GROUP
        rest[:] = 0
        for j in range(columns % GROUP):
            rest[j] = row[GROUP * whole + j]
        add_groups(sums[LANES * whole :], rest, GROUP)


@compiled
def replay_row(
    tile: Any, frame: Any, x: Any, words: Any, bit: int, neurons: int, jump_first: bool, shared: Constants | None
) -> None:
    """One step again, with the stored spike instead of the threshold: from ``frame`` to the one after it."""
    for j in range(neurons):
        c = constants_of(tile, j, shared)
        input_e, input_i = relu(x[j]), relu(-x[j])
        u, g_e, g_i = integrate(frame[V + j], frame[G_E + j], frame[G_I + j], input_e, input_i, None, None, c, jump_first)
        z: Any = 1.0 if (words[j] >> bit) & 1 else 0.0
        frame[U + j] = u
        frame[FRAME + V + j] = reset(u, z, c)
        frame[FRAME + G_E + j] = g_e
        frame[FRAME + G_I + j] = g_i


@compiled
def backward_row(
    tile: Any, frame: Any, x: Any, words: Any, bit: int, grad_spikes: Any, grad_x: Any, neurons: int,
    jump_first: bool, shared: Constants | None, sums: bool | None, METHOD: str,
) -> None:  # fmt: skip
    """The adjoint of the step that ``frame`` holds; ``tile`` has the gradients by the state, after it and then before.

    ``sums``: None, or True to add to the gradients by the constants.
    """
    for j in range(neurons):
        c = constants_of(tile, j, shared)
        z = 1.0 if (words[j] >> bit) & 1 else 0.0
        v, g_e, g_i = frame[V + j], frame[FRAME + G_E + j], frame[FRAME + G_I + j]
        lam_v = tile[V + j]
        a = vjp(
            z, frame[U + j], v, g_e, g_i, grad_spikes[j], lam_v, tile[G_E + j], tile[G_I + j],
            tile[IN_V + j], tile[IN_E + j], tile[IN_I + j], c, jump_first, METHOD,
        )  # fmt: skip
        if sums is not None:
            decayed_e, decayed_i = frame[G_E + j], frame[G_I + j]
            if jump_first:
                decayed_e = decayed_e + relu(x[j])
                decayed_i = decayed_i + relu(-x[j])
            acc = load_constants(tile, SUMS, j)
            acc = vjp_constants(acc, z, v, g_e, g_i, decayed_e, decayed_i, lam_v, a, c)
            store_constants(tile, SUMS, j, acc)
        grad_x[j] = (a.drive_e if x[j] > 0.0 else 0.0) - (a.drive_i if x[j] < 0.0 else 0.0)
        tile[V + j] = a.lam_v
        tile[G_E + j] = a.lam_e
        tile[G_I + j] = a.lam_i


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


@compiled
def load(out: Any, bits: Any, source: Any, code: int, start: int, stride: int, neurons: int) -> None:
    """A row of any element type, from flat bytes; ``bits`` is scratch."""
    if code == UINT8:
        copy(out, source, start, stride, neurons)
    elif code == FLOAT32:
        copy(out, source.view(np.float32), start, stride, neurons)
    elif code == FLOAT64:
        copy(out, source.view(np.float64), start, stride, neurons)
    else:
        copy(bits, source.view(np.uint16), start, stride, neurons)
        if code == BFLOAT16:
            for j in range(neurons):
                bits[j] = bits[j] << 16
        else:
            widen_float16(bits, neurons)
        copy(out, bits.view(np.float32), 0, 1, neurons)


@compiled
def widen_float16(bits: Any, neurons: int) -> None:
    """float16 to float32, in place: the exponent is rebased by a product, which is exact and normalises subnormals."""
    numbers = bits.view(np.float32)
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
        copy(target.view(np.float32)[start : start + neurons], row, 0, 1, neurons)
    elif code == FLOAT64:
        copy(target.view(np.float64)[start : start + neurons], row, 0, 1, neurons)
    else:
        copy(bits.view(np.float32), row, 0, 1, neurons)
        halves = target.view(np.uint16)[start : start + neurons]
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


@intrinsic
def borrow(context: Any, array: Any) -> Any:
    """An argument without its count of references, which the caller holds.

    A slice counts up and down, and threads that count on one array wait for each other's cache line.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        view.meminfo = cgutils.get_null_value(view.meminfo.type)
        view.parent = cgutils.get_null_value(view.parent.type)
        return view._getvalue()

    return array(array), generate


@intrinsic
def prefetch_line(context: Any, data: Any, index: Any) -> Any:
    """Ask for the cache line of ``data[index]``, an array of bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        signature = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0i8")
        # to be read, kept in all caches, data
        builder.call(prefetch, [builder.gep(array.data, [arguments[1]]), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return numba.types.void(data, numba.types.intp), generate


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
        return x.data.view(buffer.dtype)[start : start + neurons]
    load(buffer, bits, x.data, x.code, start, x.stride_m, neurons)
    return buffer


@compiled
def expand(target: Any, itemsize: int, one: int, start: int, spikes: Any, neurons: int) -> None:
    """Spikes, a byte each, into flat bytes of ``itemsize``, where a spike has the bits ``one``."""
    if itemsize == 2:
        scale(target.view(np.uint16)[start : start + neurons], spikes, one, neurons)
    elif itemsize == 4:
        scale(target.view(np.uint32)[start : start + neurons], spikes, one, neurons)
    else:
        scale(target.view(np.uint64)[start : start + neurons], spikes, one, neurons)


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
        shared[0], shared[1], shared[2], shared[3], shared[4], shared[5], shared[6], shared[7], shared[8], shared[9]
    )


@compiled
def load_per_neuron(tile: Any, per_neuron: Any, first: int, neurons: int) -> None:
    """Fill the constants of a tile that starts at neuron ``first``."""
    if per_neuron is not None:
        for row in range(len(per_neuron)):
            copy(tile[CONSTANTS + row * ROW : CONSTANTS + (row + 1) * ROW], per_neuron[row], first, 1, neurons)


@compiled
def load_state(tile: Any, at: int, states: Any, first: int, every: int, begin: int, neurons: int) -> None:
    """Rows ``first``, ``first + every`` and ``first + 2 every`` of ``states`` into three rows of the tile."""
    for k in range(3):
        copy(tile[at + k * ROW : at + (k + 1) * ROW], states[first + k * every], begin, 1, neurons)


@compiled
def store_state(tile: Any, states: Any, first: int, every: int, begin: int, neurons: int) -> None:
    """The first three rows of the tile into rows ``first``, ``first + every`` and ``first + 2 every`` of ``states``."""
    for k in range(3):
        copy(states[first + k * every, begin : begin + neurons], tile, k * ROW, 1, neurons)


def _entry_point(function: Callable[..., Any]) -> Any:
    """Compile lazily, once for each compute dtype and choice of optional arguments, and cache on disk if possible."""
    kernel = numba.njit(**OPTIONS)(function)
    try:
        kernel._cache = KernelCache(function)
        kept = "kept on disk"
    except RuntimeError:  # no folder that Numba tries can be written to
        kept = "kept for this process: no cache folder can be written to, NUMBA_CACHE_DIR names one"
    _reported[kernel] = f"compiling the CPU kernel {function.__name__!r}, which takes seconds; the code is {kept}"
    return kernel


# What is said when an entry point is compiled and not loaded from the cache.
_reported: dict[Any, str] = {}


class _Report(event.Listener):  # type: ignore[misc]  # numba has no types
    def on_start(self, event: Any) -> None:
        if event.data["dispatcher"] in _reported:
            logger.info(_reported[event.data["dispatcher"]])

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Report())


@functools.cache
def _sources() -> str:
    """Digest of what kernels take from other files, whose changes Numba's disk cache does not see."""
    files = (Path(str(name)).read_bytes() for name in (__file__, records.__file__, reference.__file__, surrogates.__file__))
    return hashlib.sha256(b"".join(files)).hexdigest()


@functools.cache
def forward_kernel() -> Any:
    """The forward entry point."""
    sources = _sources()

    def forward(
        x: Strided, state: Any, shared: Any, per_neuron: Any, final: Any, spikes: Strided, one: int, words: Any,
        states: Any, checkpoints: Any, every: int, jump_first: bool, sums: Any, wide: int, steps: int, first: int, last: int,
    ) -> None:  # fmt: skip
        """Simulate the neurons from ``first`` to ``last``; arrays without elements are not written.

        Of the constants, ``shared`` [10] and ``per_neuron`` [10, M], one is None. A spike is written with the bits
        ``one``. ``every``: steps between two checkpoints, or 0. ``sums``: None, or the lanes of a checksum of ``x``,
        which is float32 and contiguous then: while a row is at hand, that costs a fraction of reading it again. ``wide``:
        neurons of a tile, at most ``TILE``.
        """
        _ = sources  # part of the key of the disk cache
        x, spikes = borrow_strided(x), borrow_strided(spikes)
        words, states, checkpoints = borrow(words), borrow(states), borrow(checkpoints)
        tile = np.empty(CONSTANTS + 10 * ROW, state.dtype)
        buffer = np.empty(TILE, state.dtype)
        bits = np.empty(TILE, np.uint32)
        fired = np.empty(TILE, np.uint8)
        rest = np.empty(GROUP, np.uint32)
        c = None if shared is None else load_shared(shared)
        for begin in range(first, last, wide):
            n = min(wide, last - begin)
            load_per_neuron(tile, per_neuron, begin, n)
            load_state(tile, V, state, 0, 1, begin, n)
            for t in range(steps):
                if every > 0 and t % every == 0:
                    store_state(tile, checkpoints, 3 * (t // every), 1, begin, n)
                row = row_of(buffer, bits, x, t, begin, n)
                at = t * spikes.stride_t + begin
                out = spikes.data[at : at + n] if spikes.itemsize == 1 else fired
                prefetch(x, t + 1, begin, n)
                prefetch(spikes, t + 1, begin, n)
                forward_row(tile, row, out, n, jump_first, c)
                if sums is not None:
                    add_row(borrow(sums)[begin // 4 :], borrow(rest), row.view(np.uint32), n)
                if spikes.itemsize > 1:
                    expand(spikes.data, spikes.itemsize, one, at, out, n)
                if words.size > 0:
                    pack(words[t // 32, begin : begin + n], out, t % 32, n)
                if states.size > 0:
                    store_state(tile, states, t, steps, begin, n)
            store_state(tile, final, 0, 1, begin, n)

    return _entry_point(forward)


@functools.cache
def checksum_kernel() -> Any:
    """The entry point for a checksum of rows of words."""
    sources = _sources()

    def add_all_rows(words: Any, sums: Any) -> None:
        """Fold ``words [T, W]`` into the lanes ``sums [ceil(W / 64) * 16]``."""
        _ = sources
        rest = np.empty(GROUP, np.uint32)
        for t in range(len(words)):
            add_row(sums, rest, words[t], words.shape[1])

    return _entry_point(add_all_rows)


@functools.cache
def backward_kernel(method: str) -> Any:
    """The backward entry point for one surrogate derivative."""
    sources = _sources()

    def backward(
        x: Strided, shared: Any, per_neuron: Any, words: Any, checkpoints: Any, grad_spikes: Strided, grad_final: Any,
        grad_states: Any, grad_x: Strided, grad_state: Any, grad_constants: Any, every: int, jump_first: bool,
        wide: int, steps: int, first: int, last: int,
    ) -> None:  # fmt: skip
        """Differentiate the neurons from ``first`` to ``last``; arrays without elements are not read or written.

        ``grad_constants`` [10, M] takes sums over time for each neuron, or is None.
        """
        _ = sources  # part of the key of the disk cache
        x, grad_spikes, grad_x = borrow_strided(x), borrow_strided(grad_spikes), borrow_strided(grad_x)
        words, checkpoints, grad_states = borrow(words), borrow(checkpoints), borrow(grad_states)
        tile = np.empty(SUMS + 10 * ROW, grad_state.dtype)
        tape = np.empty((every + 2) * FRAME, grad_state.dtype)
        x_buffer = np.empty(TILE, grad_state.dtype)
        gradient_buffer = np.zeros(TILE, grad_state.dtype)
        out = np.empty(TILE, grad_state.dtype)
        bits = np.empty(TILE, np.uint32)
        c = None if shared is None else load_shared(shared)
        sums = None if grad_constants is None else True
        for begin in range(first, last, wide):
            n = min(wide, last - begin)
            load_per_neuron(tile, per_neuron, begin, n)
            tile[:CONSTANTS] = 0
            tile[IN_V:] = 0
            if grad_final.size > 0:
                load_state(tile, V, grad_final, 0, 1, begin, n)
            if grad_states.size > 0:
                load_state(tile, IN_V, grad_states, steps - 1, steps, begin, n)
                for j in range(CONSTANTS):
                    tile[V + j] += tile[IN_V + j]
            for block in range((steps - 1) // every, -1, -1):
                start = block * every
                count = min(every, steps - start)
                load_state(tape, V, checkpoints, 3 * block, 1, begin, n)
                for i in range(count):
                    t = start + i
                    row = row_of(x_buffer, bits, x, t, begin, n)
                    prefetch(x, t + 1, begin, n)
                    frame = tape[i * FRAME : (i + 2) * FRAME]
                    replay_row(tile, frame, row, words[t // 32, begin : begin + n], t % 32, n, jump_first, c)
                for i in range(count - 1, -1, -1):
                    t = start + i
                    row = row_of(x_buffer, bits, x, t, begin, n)
                    gradient = gradient_buffer
                    if grad_spikes.data.size > 0:
                        gradient = row_of(gradient_buffer, bits, grad_spikes, t, begin, n)
                        prefetch(grad_spikes, t - 1, begin, n)
                    prefetch(grad_x, t - 1, begin, n)
                    if grad_states.size > 0:
                        if t > 0:
                            load_state(tile, IN_V, grad_states, t - 1, steps, begin, n)
                        else:
                            tile[IN_V:SUMS] = 0  # the initial state is not recorded
                    backward_row(
                        tile, tape[i * FRAME : (i + 2) * FRAME], row, words[t // 32, begin : begin + n], t % 32,
                        gradient, out, n, jump_first, c, sums, method,
                    )  # fmt: skip
                    if grad_x.data.size > 0:
                        store(grad_x.data, grad_x.code, t * grad_x.stride_t + begin, out, bits, n)
            store_state(tile, grad_state, 0, 1, begin, n)
            if sums is not None:
                for k in range(len(grad_constants)):
                    copy(grad_constants[k, begin : begin + n], tile, SUMS + k * ROW, 1, n)

    return _entry_point(backward)
