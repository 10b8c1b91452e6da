"""Spikes packed along time: bit ``i`` of word ``w`` is the spike of step ``32 w + i``."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


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
    if spikes.dim() == 0:
        raise ValueError("spikes must have a leading time axis [T, ...], got a 0-dim tensor")
    words = torch.zeros(word_count(spikes.shape[0]), *spikes.shape[1:], dtype=torch.int32, device=spikes.device)
    for bit in range(min(WORD_BITS, spikes.shape[0])):
        column = (spikes[bit::WORD_BITS] != 0).to(torch.int32) << bit
        words[: column.shape[0]] |= column
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
        TypeError: if ``words`` is not an int32 tensor.
        ValueError: if the number of words does not fit ``steps``.

    Example:
        >>> unpack_spikes(torch.tensor([5], dtype=torch.int32), 3)
        tensor([ True, False,  True])
    """
    if words.dtype != torch.int32:
        raise TypeError(f"words must be int32 as pack_spikes makes them, got {words.dtype}")
    if words.dim() == 0 or words.shape[0] != word_count(steps):
        raise ValueError(
            f"{steps} steps are held by {word_count(steps)} words on the leading axis, got shape {list(words.shape)}; "
            "pass the T that was packed"
        )
    spikes = torch.empty(steps, *words.shape[1:], dtype=dtype, device=words.device)
    for bit in range(min(WORD_BITS, steps)):
        column = spikes[bit::WORD_BITS]
        column.copy_((words[: column.shape[0]] >> bit) & 1)
    return spikes
