"""Comparisons bit for bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def assert_same_bits(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """As many tensors, with the same types, shapes and numbers."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} differ, by up to {furthest(a, b)}"


def furthest(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return float((a.double() - b.double()).abs().max())
