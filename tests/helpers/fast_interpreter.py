"""Triton's interpreter without work that it repeats at every call.

It exchanges the functions of ``triton.language`` when a kernel starts, and once more whenever the kernel calls a function.
The second time all of them are exchanged already, and to look for them takes most of the time of small kernels. In larger
ones, most of the time goes into types, which it makes anew for each result, and into a search for overflows of integers,
whose result it needs only where kernels are debugged.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

patch_language = getattr(interpreter, "_patch_lang", None)
numpy_dtype = getattr(interpreter, "_get_np_dtype", None)
semantic = getattr(interpreter, "interpreter_semantic", None)


@functools.cache
def _languages(function: Callable[..., Any]) -> list[ModuleType]:
    """The modules in which the interpreter exchanges functions for this one."""
    return [value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]


def _patch_once(function: Callable[..., Any]) -> Any:
    """In place of ``_patch_lang``: nothing is left to do where no module has a function of the compiler's."""
    if any(tl.core.is_builtin(module.load) for module in _languages(function)):
        return patch_language(function)
    return interpreter._LangPatchScope()


_numpy_dtypes: dict[str, Any] = {}


def _find_numpy_dtype(dtype: Any) -> Any:
    """In place of ``_get_np_dtype``, which makes a table of all types at every call."""
    element = dtype.scalar
    if type(element) is not tl.dtype:  # a pointer
        return numpy_dtype(dtype)
    if element.name not in _numpy_dtypes:
        _numpy_dtypes[element.name] = numpy_dtype(element)
    return _numpy_dtypes[element.name]


_shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}


def _begin_tensor(self: Any, handle: Any, type: Any) -> None:
    """In place of ``tensor.__init__``: tensors of one shape share their shape."""
    sizes = tuple(type.shape.values) if type.is_block() else ()
    if sizes not in _shapes:
        _shapes[sizes] = tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shapes[sizes]


_block_types: dict[tuple[int, tuple[int, ...]], Any] = {}


def _with_element_type(self: Any, element: Any) -> Any:
    """In place of ``block_type.with_element_ty``: types do not change, so that one of a kind serves all.

    A type that is kept keeps its element's type, so that no other gets its ``id``.
    """
    key = id(element), tuple(self.shape.values)
    if key not in _block_types:
        _block_types[key] = tl.block_type(element, self.shape)
    return _block_types[key]


def _broadcast(lhs: Any, rhs: Any) -> Any:
    """In place of ``broadcast_impl_value``: two tensors of one shape stay what they are."""
    a, b = lhs.type, rhs.type
    if a.is_block() and b.is_block() and a.shape.values == b.shape.values:
        return lhs, rhs
    return type(semantic).broadcast_impl_value(semantic, lhs, rhs)


def _exchanges() -> list[tuple[Any, str, Any, Any]]:
    """An object, one of its names, what that stands for here, and what it stands for in Triton's own interpreter."""
    options = getattr(getattr(semantic, "builder", None), "options", None)
    if not (patch_language and numpy_dtype and hasattr(interpreter, "_LangPatchScope") and options):
        return []
    ours = [
        (interpreter, "_patch_lang", _patch_once),
        (interpreter, "_get_np_dtype", _find_numpy_dtype),
        (semantic.builder, "options", dataclasses.replace(options, sanitize_overflow=options.debug)),
        (tl.tensor, "__init__", _begin_tensor),
        (tl.block_type, "with_element_ty", _with_element_type),
        (tl.block_type, "to_ir", lambda self, builder: self),  # the interpreter computes with the types themselves
        (semantic, "broadcast_impl_value", _broadcast),
    ]
    return [(owner, name, value, getattr(owner, name)) for owner, name, value in ours]


EXCHANGES = _exchanges()


def install() -> None:
    """Use all in this process; a release of Triton that lacks what is exchanged stays as it is."""
    for owner, name, ours, _ in EXCHANGES:
        setattr(owner, name, ours)
