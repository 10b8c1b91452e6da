"""Which sources send something: numbers that are not 0 are counted, and listed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .lanes import lowest_bit
from .numba_bridge import compiled, entry_point

# Numbers that are compared with 0 at once.
FEW = 16


@intrinsic
def not_zero(context: Any, values: Any, begin: Any) -> Any:
    """Bit k of the result says whether ``values[begin + k]`` is not 0, for k from 0 to 15. NaN is not 0."""
    if values.layout != "C":
        raise TypeError("values that are read together must lie side by side")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at = arguments
        data = context.make_array(signature.args[0])(context, builder, array).data
        vector = ir.VectorType(data.type.pointee, FEW)
        few = builder.load(builder.bitcast(builder.gep(data, [at]), vector.as_pointer()), align=1)
        zeros = ir.Constant(vector, None)
        floating = isinstance(signature.args[0].dtype, types.Float)
        found = builder.fcmp_unordered("!=", few, zeros) if floating else builder.icmp_unsigned("!=", few, zeros)
        return builder.zext(builder.bitcast(found, ir.IntType(FEW)), ir.IntType(64))

    return types.int64(values, types.int64), generate


@intrinsic
def count_bits(context: Any, bits: Any) -> Any:
    """How many bits of an integer are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), generate


@compiled
def count_nonzero(values: Any) -> int:
    count = 0
    whole = len(values) // FEW * FEW
    for begin in range(0, whole, FEW):
        count += count_bits(not_zero(values, begin))
    for n in range(whole, len(values)):
        count += values[n] != 0
    return count


@compiled
def compact(events: Any, values: Any) -> int:
    """The indices of what is not 0, ascending; returns how many."""
    count: int = append(events, 0, values, 0)
    return count


@compiled
def append(events: Any, count: int, values: Any, first: int) -> int:
    """Append the indices of what is not 0, counted from ``first`` on, to a list of ``count``; returns its new length."""
    whole = len(values) // FEW * FEW
    for begin in range(0, whole, FEW):
        found = not_zero(values, begin)
        while found != 0:
            events[np.uintp(count)] = first + begin + lowest_bit(found)
            count += 1
            found &= found - 1
    for n in range(whole, len(values)):
        if values[n] != 0:
            events[np.uintp(count)] = first + n
            count += 1
    return count


@compiled
def unpack(fired: Any, words: Any, bit: int) -> None:
    for j in range(len(words)):
        fired[j] = (words[j] >> bit) & 1


@functools.cache
def count_kernel() -> Any:
    """How many of ``values [M]`` are not 0."""

    def count(values: Any) -> Any:
        return count_nonzero(values)

    return entry_point(count)


@functools.cache
def unpack_kernel() -> Any:
    """Words of 32 steps as a byte for each step."""

    def unpack_words(words: Any, spikes: Any) -> None:
        """Fill ``spikes [T, M]`` from ``words [ceil(T / 32), M]``."""
        for t in range(len(spikes)):
            unpack(spikes[t], words[t // 32], t % 32)

    return entry_point(unpack_words)


@functools.cache
def list_kernel() -> Any:
    """The numbers of ``rows [R, K]`` that are not 0, row by row: in which row each is, its place there, and itself."""

    def list_events(rows: Any) -> tuple[Any, Any, Any]:
        total = 0
        for row in range(len(rows)):
            total += count_nonzero(rows[row])
        row_of_event, source = np.empty(total, np.int32), np.empty(total + 1, np.int32)
        values = np.empty(total, rows.dtype)
        count = 0
        for row in range(len(rows)):
            found = compact(source[count:], rows[row])
            for k in range(count, count + found):
                row_of_event[k], values[k] = row, rows[row, source[k]]
            count += found
        return row_of_event, source[:total], values

    return entry_point(list_events)
