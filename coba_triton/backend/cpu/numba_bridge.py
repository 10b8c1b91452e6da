"""How plain functions become CPU kernels: Numba compiles them, for rows of neurons in float32 or float64.

The neuron's equations and the operations that they are written in are compiled as they stand in ``coba_triton/neuron``.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, event
from numba.core.compiler import Compiler
from numba.extending import intrinsic, overload

from ...common.garbage import no_collection
from ...common.messages import logger
from ...neuron import adjoint, operations, step, surrogate
from .cache import KernelCache

OPTIONS: Any = {"nogil": True, "fastmath": False, "error_model": "numpy"}


class _NoMachineCode:
    """Takes the place of what keeps machine code. Numba gives each function's machine code an environment of Python objects;
    a function that has no machine code needs none.
    """

    def set_env(self, name: str, environment: Any) -> None:
        pass


@functools.cache
def _inner_library() -> Any:
    """The class of objects that hold LLVM's code of a function and of those that it calls.

    Numba's own class optimizes the code three times and makes machine code of it. This one optimizes it once and makes none.
    """
    from numba.core.codegen import JITCodeLibrary  # it loads LLVM, which kernels from the disk cache do not need

    class InnerLibrary(JITCodeLibrary):  # type: ignore[misc]  # numba has no types
        @property
        def codegen(self) -> Any:
            return _NoMachineCode()

        def _optimize_functions(self, ll_module: Any) -> None:
            ll_module.data_layout = self._codegen._data_layout

        def _optimize_final_module(self) -> None:
            # Without this, LLVM would see the loops for the first time inside of a kernel. It knows less about them there,
            # and does not turn all of them into vector operations: training takes twice as long.
            passes, builder = self._codegen._module_pass_manager()
            passes.run(self._final_module, builder)

        def _finalize_final_module(self) -> None:
            self._finalize_dynamic_globals()
            self._finalized = True

    return InnerLibrary


class _InnerCompiler(Compiler):  # type: ignore[misc]  # numba has no types
    """Compiles a function that only compiled code calls.

    It stops at LLVM's code, which the kernels take in. Nobody would run machine code of the function itself, and to make it
    would be a third of the time that a first run compiles.
    """

    def define_pipelines(self) -> Any:
        self.state.library = _inner_library()(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()


# For functions that only compiled code calls: without entries for Python and for C.
INNER: Any = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _InnerCompiler}


def _with_literals(function: Callable[..., Any], dtype: type) -> Callable[..., Any]:
    """The function with its float literals in ``dtype``: as in PyTorch, and unlike in NumPy, they do not promote."""

    def cast(value: Any) -> Any:
        return dtype(value) if type(value) is float else value

    code = function.__code__
    names = {name: cast(value) for name, value in function.__globals__.items()}
    return types.FunctionType(code.replace(co_consts=tuple(map(cast, code.co_consts))), names, function.__name__)


def _compute_dtype(arguments: tuple[Any, ...]) -> type:
    """The dtype of the first floating-point argument, a number or an array; float64 if there is none."""
    kinds = (getattr(argument, "dtype", argument) for argument in arguments)
    return next((getattr(np, str(kind)) for kind in kinds if isinstance(kind, numba.types.Float)), np.float64)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Let compiled code call a plain function; returns the function, which stays plain Python."""

    @overload(function, jit_options=INNER | options, strict=False, prefer_literal=True)
    def choose(*arguments: Any) -> Callable[..., Any]:
        return _with_literals(function, _compute_dtype(arguments))

    return function


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`compiled`, for a function that does so little at a time that the calls cost a good part of it."""
    return compiled(function, forceinline=True)


@overload(surrogate.surrogate, jit_options=INNER, strict=False, prefer_literal=True)
def _choose_surrogate(x: Any, alpha: Any, METHOD: Any) -> Callable[..., Any]:
    derivative = surrogate.SURROGATES[METHOD.literal_value]
    if derivative is None:
        return _with_literals(lambda x, alpha, METHOD: x * 0.0, _compute_dtype((x,)))
    return lambda x, alpha, METHOD: derivative(x, alpha)


@overload(operations.exp, jit_options=INNER, strict=False)
def _choose_exp(x: Any) -> Callable[..., Any]:
    return lambda x: np.exp(x)


def converted(number: Any, like: Any) -> Any:
    """An integer as a number of the dtype of another, rounded once."""
    return type(like)(number)


@overload(converted, jit_options=INNER, strict=False)
def _choose_conversion(number: Any, like: Any) -> Callable[..., Any]:
    kind = getattr(np, str(like))
    return lambda number, like: kind(number)


def _compile_the_neuron() -> None:
    taken: set[Any] = {surrogate.surrogate, operations.exp, operations.bind}
    for module in (operations, step, surrogate, adjoint):
        for function in vars(module).values():
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__ and function not in taken:
                compiled(function)


_compile_the_neuron()


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
def numbers_in(context: Any, array: Any, dtype: Any) -> Any:
    """The memory of an array, flat, as numbers of another dtype.

    With NumPy's ``view`` and ``reshape``, Numba would compile their checks and messages into every kernel.
    """
    if array.layout != "C":
        raise numba.errors.TypingError(f"numbers_in: expected an array in C order, got {array}")
    return _memory_as(numba.types.Array(dtype.dtype, 1, "C", readonly=not array.mutable), array, dtype)


@intrinsic
def flattened(context: Any, array: Any) -> Any:
    """The memory of an array, flat: see :func:`numbers_in`."""
    if array.layout != "C":
        raise numba.errors.TypingError(f"flat: expected an array in C order, got {array}")
    return _memory_as(array.copy(ndim=1), array)


def _memory_as(result: Any, *taken: Any) -> Any:
    """A signature and its code: the first argument's memory as an array of the type ``result``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from numba.core.imputils import impl_ret_borrowed
        from numba.np.arrayobj import populate_array

        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        view = context.make_array(result)(context, builder)
        size = context.get_constant(numba.types.intp, context.get_abi_sizeof(context.get_data_type(result.dtype)))
        count = builder.udiv(builder.mul(array.nitems, array.itemsize), size)
        data = builder.bitcast(array.data, view.data.type)
        populate_array(view, data, [count], [size], size, array.meminfo, array.parent)
        return impl_ret_borrowed(context, builder, result, view._getvalue())

    return result(*taken), generate


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


def _without_collection(compile_for: Callable[..., Any]) -> Callable[..., Any]:
    """While Numba compiles a kernel, no garbage is collected: there is little, and to look for it takes 8 % of the time."""

    def compile_at_once(signature: Any) -> Any:
        with no_collection():
            return compile_for(signature)

    return compile_at_once


def entry_point(function: Callable[..., Any]) -> Any:
    """Compile lazily, once for each compute dtype and choice of optional arguments, and cache on disk if possible."""
    kernel = numba.njit(**OPTIONS)(function)
    kernel.compile = _without_collection(kernel.compile)
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
    """Says that entry points are compiled, and sums up how long it takes.

    The messages are log records. Where nobody listens to these, a program on a terminal says it once: the first call of a
    session may take half a minute.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.count = 0
        self._begun: list[float] = []
        self._told = False

    def on_start(self, event: Any) -> None:
        if event.data["dispatcher"] not in _reported:
            return
        self._begun.append(time.perf_counter())
        logger.info(_reported[event.data["dispatcher"]])
        if not self._told and not logger.isEnabledFor(logging.INFO) and sys.stderr.isatty():
            self._told = True
            print(
                "coba_triton: compiling CPU kernels, which takes seconds each; their code is kept on disk", file=sys.stderr
            )

    def on_end(self, event: Any) -> None:
        if event.data["dispatcher"] in _reported:
            self.count += 1
            begun = self._begun.pop()
            if not self._begun:  # of what is compiled at once, the longest counts
                self.seconds += time.perf_counter() - begun


_report = _Report()
event.register("numba:compile", _report)


def compile_count() -> int:
    """How many CPU kernels this process has compiled, each for some types of arguments."""
    return _report.count


def compile_seconds() -> float:
    """For how long this process has compiled CPU kernels, in s."""
    return _report.seconds
