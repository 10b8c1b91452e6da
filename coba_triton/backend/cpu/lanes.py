"""Sixteen numbers side by side in vector registers: of each batch row of a group, or of each chunk of time.

Numba keeps an accumulator that is an array in memory, because it may overlap with what a loop reads. A value of this type
stays in registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LANES = 16


class LanesType(types.Type):  # type: ignore[misc]  # numba has no types
    """``LANES`` numbers of a floating type."""

    def __init__(self, scalar: Any) -> None:
        self.scalar = scalar
        super().__init__(name=f"Lanes({scalar})")


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]  # numba has no types
    def __init__(self, manager: Any, lanes: LanesType) -> None:
        super().__init__(manager, lanes, _vector(lanes.scalar))


def _vector(scalar: Any) -> Any:
    return ir.VectorType(ir.FloatType() if scalar.bitwidth == 32 else ir.DoubleType(), LANES)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """The address of the lanes that begin at an index of a flat array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _vector(array_type.dtype).as_pointer())


@intrinsic
def no_lanes(context: Any, like: Any) -> Any:
    """Zeros of the dtype of an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_vector(signature.return_type.scalar), None)

    return LanesType(like.dtype)(like), generate


@intrinsic
def add_product(context: Any, lanes: Any, weight: Any, array: Any, index: Any) -> Any:
    """``lanes + weight * array[index : index + LANES]``, each product and each sum rounded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, factor, values, at = arguments
        vector = _vector(signature.args[2].dtype)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), factor, ir.Constant(ir.IntType(32), 0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        every = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)
        loaded = builder.load(_pointer(context, builder, signature.args[2], values, at), align=array.dtype.bitwidth // 8)
        return builder.fadd(total, builder.fmul(every, loaded))

    return lanes(lanes, array.dtype, array, types.intp), generate


@intrinsic
def put_lanes(context: Any, array: Any, index: Any, lanes: Any) -> Any:
    """``array[index : index + LANES] = lanes``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, at, total = arguments
        pointer = _pointer(context, builder, signature.args[0], values, at)
        builder.store(total, pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), generate


@intrinsic
def copy_lanes(context: Any, target: Any, to: Any, source: Any, start: Any) -> Any:
    """``target[to : to + LANES] = source[start : start + LANES]``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, to, source, start = arguments
        align = signature.args[2].dtype.bitwidth // 8
        lanes = builder.load(_pointer(context, builder, signature.args[2], source, start), align=align)
        builder.store(lanes, _pointer(context, builder, signature.args[0], target, to), align=align)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp), generate


@intrinsic
def transpose_lanes(context: Any, target: Any, to: Any, width: Any, source: Any, start: Any, apart: Any) -> Any:
    """``LANES`` rows of ``source``, ``apart`` from each other, as columns of ``target``, whose rows are ``width`` apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, to, width, source, start, apart = arguments
        align = signature.args[3].dtype.bitwidth // 8

        def place(array: Any, number: int, first: Any, distance: Any) -> Any:
            index = builder.add(first, builder.mul(distance, ir.Constant(distance.type, number)))
            return _pointer(context, builder, signature.args[array], (target, source)[array == 3], index)

        def mixed(a: Any, b: Any, chosen: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), LANES), chosen))

        rows = [builder.load(place(3, number, start, apart), align=align) for number in range(LANES)]
        half = LANES // 2
        while half:  # exchange the squares of this size that are off the diagonal
            low = [j if not j & half else LANES + j - half for j in range(LANES)]
            high = [j + half if not j & half else LANES + j for j in range(LANES)]
            for first in range(LANES):
                if not first & half:
                    a, b = rows[first], rows[first + half]
                    rows[first], rows[first + half] = mixed(a, b, low), mixed(a, b, high)
            half //= 2
        for number, row in enumerate(rows):
            builder.store(row, place(0, number, to, width), align=align)
        return context.get_dummy_value()

    return types.void(target, types.intp, types.intp, source, types.intp, types.intp), generate


@intrinsic
def lowest_bit(context: Any, word: Any) -> Any:
    """The number of the lowest bit that is set in an unsigned word, which is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))
        return builder.zext(number, ir.IntType(64)) if word.bitwidth < 64 else number

    return types.intp(word), generate
