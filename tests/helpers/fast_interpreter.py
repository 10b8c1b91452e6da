"""Triton's interpreter without work that it repeats at every call.

It exchanges the functions of ``triton.language`` when a kernel starts, and once more whenever the kernel calls a function.
The second time all of them are exchanged already, and to look for them takes most of the time of small kernels.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

patch_language = getattr(interpreter, "_patch_lang", None)
numpy_dtype = getattr(interpreter, "_get_np_dtype", None)


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
    if type(dtype) is not tl.dtype:
        return numpy_dtype(dtype)
    if dtype.name not in _numpy_dtypes:
        _numpy_dtypes[dtype.name] = numpy_dtype(dtype)
    return _numpy_dtypes[dtype.name]


def install() -> None:
    """Use both in this process; a release of Triton without these functions stays as it is."""
    if patch_language and numpy_dtype and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _patch_once
        interpreter._get_np_dtype = _find_numpy_dtype
