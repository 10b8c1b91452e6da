"""Checksums of rows of words, which the kernels make of their input while they read it."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from .numba_bridge import compiled, entry_point

# A checksum has 16 lanes for every group of 64 columns: lane j takes in the columns j, j + 16, j + 32 and j + 48.
LANES = 16
GROUP = 4 * LANES
_MULTIPLIER = 0x9E3779B1


def _fold(whole: bool) -> Any:
    """A function that folds a group of columns, all 64 of it or fewer, into its lanes.

    With all numbers modulo 2**32: ``lane = (lane * multiplier) turned left by 13 + column 0 + column 16 turned by 7 + column
    32 turned by 14 + column 48 turned by 21``. It is written in vectors of 16 words, as compilers do not find them reliably.
    """

    @intrinsic
    def fold(context: Any, sums: Any, to: Any, row: Any, begin: Any, columns: Any) -> Any:
        """Fold the ``columns`` from ``row[begin]`` on into the lanes from ``sums[to]`` on."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sums, to, row, begin, columns = arguments
            word, place = ir.IntType(32), begin.type
            vector = ir.VectorType(word, LANES)
            sums = context.make_array(signature.args[0])(context, builder, sums).data
            row = context.make_array(signature.args[2])(context, builder, row).data
            turn = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fshl.v{LANES}i32"
            )

            def every(value: Any) -> Any:
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, word(0))
                return builder.shuffle_vector(one, one, ir.Constant(vector, [0] * LANES))

            def words(data: Any, at: Any, count: int = LANES) -> Any:
                some = ir.VectorType(word, count)
                return builder.load(builder.bitcast(builder.gep(data, [at]), some.as_pointer()), align=4)

            def add(numbers: Any, turned_by: Any) -> None:
                turned = builder.call(turn, [numbers, numbers, every(turned_by)])
                builder.store(builder.add(builder.load(total), turned), total)

            total = cgutils.alloca_once_value(builder, ir.Constant(vector, None))
            add(builder.mul(words(sums, to), every(word(_MULTIPLIER))), word(13))
            for number in range(GROUP // LANES):
                first = number * LANES
                there = builder.icmp_signed(">=", columns, place(first + LANES))
                with contextlib.nullcontext() if whole else builder.if_then(there):
                    add(words(row, builder.add(begin, place(first))), word(7 * number))
            if not whole:  # what is less than a vector; no load reaches beyond the row, to what no cache may have yet
                done = builder.and_(columns, place(-LANES))
                turned_by = builder.trunc(builder.mul(builder.sdiv(done, place(LANES)), place(7)), word)
                end = builder.append_basic_block()
                cases = builder.switch(builder.sub(columns, done), end)
                for rest in range(1, LANES):
                    cases.add_case(place(rest), builder.append_basic_block())
                    builder.position_at_end(cases.cases[-1][1])
                    numbers, taken = ir.Constant(vector, None), 0
                    for count in (8, 4, 2, 1):
                        if rest & count:
                            some = words(row, builder.add(builder.add(begin, done), place(taken)), count)
                            at = [k - taken if taken <= k < taken + count else count for k in range(LANES)]
                            nothing = ir.Constant(some.type, None)
                            moved = builder.shuffle_vector(some, nothing, ir.Constant(vector, at))
                            numbers, taken = builder.or_(numbers, moved), taken + count
                    add(numbers, turned_by)
                    builder.branch(end)
                builder.position_at_end(end)
            lanes = builder.bitcast(builder.gep(sums, [to]), vector.as_pointer())
            builder.store(builder.load(total), lanes, align=4)
            return context.get_dummy_value()

        integer = numba.types.int64
        return numba.types.void(sums, integer, row, integer, integer), generate

    return fold


_fold_group, _fold_rest = _fold(whole=True), _fold(whole=False)


@compiled
def add_row(sums: Any, row: Any, columns: int) -> None:
    """Fold a row of words into the lanes of a checksum, so that it does not matter who takes which groups of columns.

    A change of one word changes its lane for good, as the lane's other steps can be undone.

    The groups are taken from the last to the first. In rows of 1000 words that come from memory, this was measured to take
    half the time of the other direction, perhaps because the processor then asks for no lines beyond the row in vain.
    """
    whole = columns // GROUP
    if columns > GROUP * whole:
        _fold_rest(sums, LANES * whole, row, GROUP * whole, columns - GROUP * whole)
    for g in range(whole - 1, -1, -1):
        _fold_group(sums, LANES * g, row, GROUP * g, GROUP)


# :func:`checksum_of` takes so many words as a row: the row and its lanes fit into a cache.
ROW = 4096


def checksum_of(numbers: Any) -> bytes:
    """The checksum of an array ``[n]`` of numbers of four or eight bytes."""
    words = numbers.view(np.uint32)
    whole = len(words) // ROW * ROW
    sums = np.zeros((2, ROW // 4), np.uint32)
    checksum_kernel()(words[:whole].reshape(-1, ROW), sums[0])
    checksum_kernel()(words[whole:].reshape(1, -1), sums[1])
    return sums.tobytes()


@functools.cache
def checksum_kernel() -> Any:
    """The entry point for a checksum of rows of words."""

    def add_all_rows(words: Any, sums: Any) -> None:
        """Fold ``words [T, W]`` into the lanes ``sums [ceil(W / 64) * 16]``."""
        for t in range(len(words)):
            add_row(sums, words[t], words.shape[1])

    return entry_point(add_all_rows)
