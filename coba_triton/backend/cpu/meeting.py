"""Memory that threads of one launch share, and where they wait for each other within compiled code."""

from __future__ import annotations

import math
import os
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from .numba_bridge import compiled

# Bytes of memory that a core takes from the others when it writes to one of them: two lines, since it fetches them in pairs.
APART = 128
# Looks at another thread's word before a thread lets others run on its core.
PATIENCE = 4096


def memory_apart(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of zeros, in no line of memory that another array is in.

    A thread that writes to a line takes it from all other threads, and each of them waits until it has the line again.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 2 * APART, np.uint8)
    first = -memory.ctypes.data % APART
    return memory[first : first + size].view(dtype).reshape(shape)


@intrinsic
def _put(context: Any, word: Any, value: Any) -> Any:
    """Write ``word[0]``, after all that this thread wrote before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        builder.store_atomic(arguments[1], array.data, "release", 8)
        return context.get_dummy_value()

    return numba.types.void(word, numba.types.int64), generate


@intrinsic
def _look(context: Any, word: Any) -> Any:
    """The number in ``word[0]``, before all that this thread reads afterwards."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.load_atomic(array.data, "acquire", 8)

    return numba.types.int64(word), generate


@intrinsic
def _give_way(context: Any) -> Any:
    """Let another thread run on this core."""
    name = "SwitchToThread" if os.name == "nt" else "sched_yield"

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), []), name)
        builder.call(function, [])
        return context.get_dummy_value()

    return numba.types.void(), generate


@compiled
def publish(entries: Any, count: int, number: int) -> None:
    """Let other threads see the ``number``-th list, ``entries[1]`` to ``entries[count]``, all at once.

    The first word says which list it is and how long: who reads it has the beginning of the list in the same line of memory.
    """
    _put(entries, np.int64(number) << 32 | np.int64(count))


@compiled
def await_list(entries: Any, number: int) -> Any:
    """Wait until another thread has published its ``number``-th list here, and return it."""
    looks = 0
    word = _look(entries)
    while word >> 32 != number:
        looks += 1
        if looks > PATIENCE:
            _give_way()
        word = _look(entries)
    return entries[1 : 1 + (word & 0xFFFFFFFF)]
