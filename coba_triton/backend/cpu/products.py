"""The product of a step with the recurrent weights on the way back.

It is written by hand, so that a thread computes it for its own batch rows within the loop over the steps: it waits for no
other thread, and leaves compiled code for no step. A weight is either excitatory or inhibitory. So each is read and
multiplied once, with the adjoint of the drive that its sign says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from .meeting import memory_apart
from .numba_bridge import compiled, flattened

# Batch rows that read a weight together.
ROWS = 4
# Bytes of a vector register, and vectors of sources whose sums stay in registers.
REGISTER, VECTORS = 64, 4


def panels_of(weights: Tensor) -> Tensor:
    """``weights [N, K]`` as panels of neighbouring sources, ``[P, N, W]``; sources that there are not have weights of 0."""
    width = REGISTER * VECTORS // weights.element_size()
    neurons, count = weights.shape
    whole = torch.nn.functional.pad(weights.detach(), (0, -count % width))
    return whole.view(neurons, -1, width).transpose(0, 1).contiguous()


def _panel_product(rows: int) -> Any:
    """The product of some rows' adjoints with a panel of weights."""

    @intrinsic
    def panel_product(context: Any, sums: Any, panels: Any, begin: Any, adjoints: Any, at: Any, neurons: Any) -> Any:
        """Fill ``sums [rows, W]`` from the panel at ``panels[begin]`` and the rows ``[rows, 2 N]`` at ``adjoints[at]``."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sums, panels, begin, adjoints, at, neurons = arguments
            size = signature.args[0].dtype.bitwidth // 8
            lanes, number = REGISTER // size, ir.FloatType() if size == 4 else ir.DoubleType()
            vector, integer = ir.VectorType(number, lanes), at.type
            sums, panels, adjoints = (
                context.make_array(signature.args[k])(context, builder, arguments[k]).data for k in (0, 1, 3)
            )
            kind, module = f"v{lanes}f{8 * size}", builder.module
            one, three = (ir.FunctionType(vector, [vector] * k) for k in (1, 3))
            magnitude = cgutils.get_or_insert_function(module, one, f"llvm.fabs.{kind}")
            add_product = cgutils.get_or_insert_function(module, three, f"llvm.fmuladd.{kind}")

            def vector_at(data: Any, index: Any) -> Any:
                return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())

            def number_in_all(index: Any) -> Any:
                value = builder.load(builder.gep(adjoints, [index]))
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
                return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))

            nothing = ir.Constant(vector, None)
            kept = [[cgutils.alloca_once_value(builder, nothing) for _ in range(VECTORS)] for _ in range(rows)]
            with cgutils.for_range(builder, neurons) as loop:
                first = builder.add(begin, builder.mul(loop.index, integer(lanes * VECTORS)))
                weights = [
                    builder.load(vector_at(panels, builder.add(first, integer(k * lanes))), align=size)
                    for k in range(VECTORS)
                ]
                inhibitory = [builder.fcmp_ordered("<", weight, nothing) for weight in weights]
                magnitudes = [builder.call(magnitude, [weight]) for weight in weights]
                for row in range(rows):
                    by_e = builder.add(builder.add(at, builder.mul(neurons, integer(2 * row))), loop.index)
                    e, i = number_in_all(by_e), number_in_all(builder.add(by_e, neurons))
                    for k in range(VECTORS):
                        adjoint = builder.select(inhibitory[k], i, e)
                        total = builder.call(add_product, [magnitudes[k], adjoint, builder.load(kept[row][k])])
                        builder.store(total, kept[row][k])
            for row in range(rows):
                for k in range(VECTORS):
                    to = vector_at(sums, integer((row * VECTORS + k) * lanes))
                    builder.store(builder.load(kept[row][k]), to, align=size)
            return context.get_dummy_value()

        integer = types.int64
        return types.void(sums, panels, integer, adjoints, integer, integer), generate

    return panel_product


_of_rows, _of_one = _panel_product(ROWS), _panel_product(1)


@compiled
def send_back(grad_z: Any, panels: Any, adjoints: Any, at: int, first: int, last: int, sums: Any) -> None:
    """Fill ``grad_z [B N]``, the gradient by the spikes of a step, for the batch rows from ``first`` to ``last``.

    ``adjoints[at]`` is the first number of the ``[B, 2 N]`` of the next step. ``sums`` is scratch. A sum goes through the
    neurons in their order, whoever computes it.
    """
    count, neurons, width = panels.shape
    flat = flattened(panels)
    for panel in range(count):
        source, begin = panel * width, panel * neurons * width
        n = min(width, neurons - source)
        row = first
        while row < last:
            rows = ROWS if row + ROWS <= last else 1
            if rows == ROWS:
                _of_rows(sums, flat, begin, adjoints, at + 2 * neurons * row, neurons)
            else:
                _of_one(sums, flat, begin, adjoints, at + 2 * neurons * row, neurons)
            for k in range(rows):
                to = (row + k) * neurons + source
                row_of_z, row_of_sums = grad_z[to : to + n], sums[k * width : k * width + n]
                for j in range(n):
                    row_of_z[j] = row_of_sums[j]
            row += rows


def scratch(dtype: Any) -> Any:
    """Room for the sums of a thread."""
    return memory_apart((ROWS * REGISTER * VECTORS // np.dtype(dtype).itemsize,), dtype)
