"""Spikes packed along time: bit ``i`` of word ``w`` is the spike of step ``32 w + i``."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .tensors import NUMBERS

WORD_BITS = 32
# Spikes that are packed or unpacked at a time.
PART = 2**20


def word_count(steps: int) -> int:
    """Words that hold the spikes of so many steps."""
    return (steps + WORD_BITS - 1) // WORD_BITS


def pack_spikes(spikes: Tensor) -> Tensor:
    """Pack spikes along their first axis into 32-bit words, an eighth of a byte per neuron and step.

    Args:
        spikes: ``[T, *shape]`` of any dtype; everything that is not 0 is a spike.

    Returns:
        int32 words ``[ceil(T / 32), *shape]``; the bits past step ``T - 1`` are 0.

    Example:
        >>> pack_spikes(torch.tensor([1, 0, 1])).item()
        5
    """
    _check_dense(spikes, "spikes")
    if spikes.dim() == 0:
        raise ValueError("spikes must have a leading time axis [T, ...], got a 0-dim tensor")
    words = torch.empty(word_count(spikes.shape[0]), *spikes.shape[1:], dtype=torch.int32, device=spikes.device)
    for some in _parts(words):
        steps = spikes[some.start * WORD_BITS : some.stop * WORD_BITS] != 0
        last = steps.new_zeros(-steps.shape[0] % WORD_BITS, *steps.shape[1:])
        bits = torch.cat([steps, last]).unflatten(0, (some.stop - some.start, WORD_BITS)).to(torch.int32)
        words[some] = (bits << _shifts(words)).sum(1, dtype=torch.int32)  # no two steps share a bit: the sum is their union
    return words


def unpack_spikes(words: Tensor, steps: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """The inverse of :func:`pack_spikes`.

    Args:
        words: int32 words ``[ceil(T / 32), *shape]``.
        steps: T.
        dtype: of the result.

    Returns:
        0 or 1 in ``[T, *shape]``.

    Raises:
        TypeError: if ``words`` is not an int32 tensor, or steps or dtype are of the wrong type.
        ValueError: if the number of words does not fit ``steps``.

    Example:
        >>> unpack_spikes(torch.tensor([5], dtype=torch.int32), 3)
        tensor([ True, False,  True])
    """
    _check_dense(words, "words")
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral | torch.SymInt) or steps < 0:
        raise TypeError(f"steps must be the number of them that was packed, got {steps!r:.50}")
    if not isinstance(dtype, torch.dtype) or dtype not in NUMBERS:
        raise TypeError(f"dtype must be torch.bool or one of integers or floating numbers, got {dtype!r:.50}")
    if words.dtype != torch.int32:
        raise TypeError(f"words must be int32 as pack_spikes makes them, got {words.dtype}")
    if words.dim() == 0 or words.shape[0] != word_count(steps):
        raise ValueError(
            f"{steps} steps are held by {word_count(steps)} words on the leading axis, got shape {list(words.shape)}; "
            "pass the T that was packed"
        )
    spikes = torch.empty(steps, *words.shape[1:], dtype=dtype, device=words.device)
    for some in _parts(words):
        out = spikes[some.start * WORD_BITS : some.stop * WORD_BITS]
        out.copy_(((words[some].unsqueeze(1) >> _shifts(words)) & 1).flatten(0, 1)[: out.shape[0]])
    return spikes


def _check_dense(tensor: Any, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}; wrap arrays in torch.as_tensor")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        raise TypeError(f"{name} must be a dense tensor, got one of {tensor.layout} and {tensor.dtype}; use .to_dense()")


def _shifts(words: Tensor) -> Tensor:
    """The places of the bits of a word, along the axis after that of the words."""
    return torch.arange(WORD_BITS, dtype=torch.int32, device=words.device).view(-1, *(1,) * (words.dim() - 1))


def _parts(words: Tensor) -> Iterator[slice]:
    """Words that are packed or unpacked together: few operations, and little memory beside the result."""
    if torch.compiler.is_compiling():  # a graph must not depend on how many there are
        yield slice(0, words.shape[0])
        return
    rows = max(1, PART // (WORD_BITS * max(1, words[:1].numel())))
    for start in range(0, words.shape[0], rows):
        yield slice(start, min(start + rows, words.shape[0]))
