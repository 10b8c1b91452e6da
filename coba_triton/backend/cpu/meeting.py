"""Where threads of one launch wait for each other, within compiled code."""

from __future__ import annotations

import os
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from .numba_bridge import compiled

# Looks at the counter before a thread lets others run on its core.
PATIENCE = 4096


@intrinsic
def _add_one(context: Any, counter: Any) -> Any:
    """Count one more in ``counter[0]``, after all that this thread wrote; returns the number before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return numba.types.int64(counter), generate


@intrinsic
def _look(context: Any, counter: Any) -> Any:
    """The number in ``counter[0]``, before all that this thread reads afterwards."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.load_atomic(array.data, "acquire", 8)

    return numba.types.int64(counter), generate


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
def meet(counter: Any, threads: int, times: int) -> None:
    """Wait until all threads are here for the ``times``-th time; ``counter`` began at 0, and counts their arrivals."""
    if threads > 1:
        _add_one(counter)
        looks = 0
        while _look(counter) < threads * times:
            looks += 1
            if looks > PATIENCE:
                _give_way()
