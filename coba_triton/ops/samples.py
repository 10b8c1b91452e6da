"""vmap's samples, side by side along an axis that an operator already has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def join(tensor: Tensor, dim: int | None, size: int, axis: int, length: int | None = None) -> Tensor:
    """``size`` samples along axis ``dim`` (None: the same for all) side by side along ``axis``, counted from the end.

    ``length``: what that axis broadcasts to before.
    """
    tensor = tensor.unsqueeze(axis - 1) if dim is None else tensor.movedim(dim, axis - 1)
    shape = list(tensor.shape)
    shape[axis - 1] = size
    shape[axis] = shape[axis] if length is None else length
    return tensor.expand(shape).flatten(axis - 1, axis)


def join_all(tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...], size: int, axis: int) -> tuple[Any, ...]:
    """:func:`join` of each tensor along its own axis; one that is absent stays absent."""
    return tuple(
        None if tensor is None else join(tensor, dim, size, axis) for tensor, dim in zip(tensors, dims, strict=True)
    )


def part(tensors: tuple[Tensor, ...], size: int, axis: int) -> tuple[list[Tensor], list[int]]:
    """Undo :func:`join`: the samples get an axis of their own, in front of ``axis``; the tensors, and where it is."""
    parts = [tensor.unflatten(axis, (size, tensor.shape[axis] // size)) for tensor in tensors]
    return parts, [tensor.dim() + axis for tensor in tensors]


def join_constants(constants: Tensor, dim: int | None, size: int, cells: int, grad: bool = False) -> Tensor:
    """The table of all samples' cells; one column for all stays one, unless each sample needs a gradient of its own."""
    if dim is None and constants.shape[1] == 1 and not grad:
        return constants
    return join(constants, dim, size, -1, cells)


def part_constants(grad: Tensor, columns: int, size: int) -> Tensor:
    """Each sample's gradient by its constants, ``[C, samples, columns]``."""
    (grad,), _ = part((grad,), size, -1)
    return grad.sum(-1, keepdim=True) if columns == 1 and grad.shape[-1] else grad


def columns(constants: Tensor, dim: int | None) -> int:
    """Columns of one sample's table of constants."""
    return constants.shape[1] if dim is None else constants.movedim(dim, 0).shape[2]


def each(op: Any, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Any, tuple[int, ...]]:
    """One call a sample: for samples that have weights of their own."""
    rows = [
        op(*(arg if dim is None else arg.select(dim, number) for arg, dim in zip(args, in_dims, strict=True)))
        for number in range(size)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
    return outputs, (0,) * len(outputs)
