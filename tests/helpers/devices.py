"""Tensors on the device of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(value: Any, device: torch.device) -> Any:
    """The same with all its tensors on the device, also those within tuples, records and dictionaries."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(each, device) for name, each in value.items()}
    if isinstance(value, tuple):
        moved = [to_device(each, device) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
