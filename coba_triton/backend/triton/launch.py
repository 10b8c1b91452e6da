"""Launches a kernel on the device of its tensors, and prepares what kernels take."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, overload

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least one that is not less than ``n``, which is positive."""
    return 1 << (n - 1).bit_length()


# By all that Triton compiles for: what a kernel was compiled to, the names of its last arguments, and the driver.
_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, list[str], Any]] = {}


def run(
    kernel: Any, grid: tuple[int, ...], device: torch.device, num_warps: int, *args: Any, **meta: Any
) -> Callable[..., Any]:
    """Every launch of the package: on the tensors' device, without fusing multiplications into additions.

    Triton takes about 10 us to find what a call was compiled to; here it takes 3. This is right for kernels that are not
    specialized for the values of their numbers, as a test makes sure of.

    Returns:
        What launches again, with other numbers among ``args`` and the same tensors: it has nothing to find.
    """
    try:
        return _launch_on(kernel, grid, device, num_warps, *args, **meta)
    except RuntimeError as error:
        if not meta.get("launch_cooperative_grid") or "cooperative" not in str(error):
            raise
        raise RuntimeError(
            f"{kernel.__name__} needs its {math.prod(grid)} programs to run at once, and {device} does not hold them "
            f"({error}); is a part of it reserved? Pass path='events' for dense weights, else backend='reference'"
        ) from error


def _launch_on(
    kernel: Any, grid: tuple[int, ...], device: torch.device, num_warps: int, *args: Any, **meta: Any
) -> Callable[..., Any]:
    again = functools.partial(_launch_on, kernel, grid, device, num_warps, **meta)
    if device.type != "cpu" and (on := torch.get_device_module(device)).current_device() != device.index:
        with on.device(device):
            _launch_on(kernel, grid, device, num_warps, *args, **meta)
        return again
    if not isinstance(kernel, triton.JITFunction):  # Triton's interpreter
        kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **meta)
        return again
    driver = triton.runtime.driver.active
    compiled_for = [
        (arg.dtype, arg.data_ptr() & 15) if isinstance(arg, Tensor) else arg if arg is None else -(2**31) <= arg < 2**31
        for arg in args
    ]
    key = id(kernel), id(driver), device, num_warps, *meta.values(), *compiled_for
    if (found := _compiled.get(key)) is not None:
        compiled, last, _ = found
        launch, constants = compiled[(*grid, 1, 1)[:3]], [meta[name] for name in last]
        launch(*args, *constants)
        return lambda *args: launch(*args, *constants)
    compiled = kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **meta)
    if isinstance(compiled, CompiledKernel):  # not what stands for one
        _compiled[key] = compiled, kernel.arg_names[len(args) :], driver
    return again


@overload
def kernel_view(x: Tensor) -> Tensor: ...
@overload
def kernel_view(x: Tensor | None) -> Tensor | None: ...
def kernel_view(x: Tensor | None) -> Tensor | None:
    """Bool is read and written as uint8: Triton's own 1-bit pointers are no array of bytes."""
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x


def none_if_empty(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
