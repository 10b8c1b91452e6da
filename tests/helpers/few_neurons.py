"""Few neurons over many steps, for the tests of chunks of time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coba_triton import CobaLIFParameters

P = CobaLIFParameters(1 / 5, 1 / 10, 1 / 0.2, 0.01, -80.0, 0.0, -65.0, -65.0, -50.0)
DT = 0.5
# u, the largest time constant in steps
MEMORY = 40


def irregular(steps: int, neurons: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Poisson input that makes neurons fire irregularly, at some 30 Hz."""
    generator = torch.Generator().manual_seed(seed)
    e, i = (torch.poisson(torch.full((steps, neurons), rate), generator=generator) for rate in (0.3, 0.2))
    return (0.006 * e - 0.008 * i).to(dtype)


def bits(x: Tensor) -> Tensor:
    """As integers; a NaN's sign and payload are the processor's own."""
    if not x.is_floating_point():
        return x
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x).contiguous()
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def assert_same(ours: Any, theirs: Any) -> None:
    (z, state), (want_z, want_state) = ours, theirs
    for name, a, b in zip(("spikes", *state._fields), (z, *state), (want_z, *want_state), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(bits(a), bits(b)), f"{name}: {int((bits(a) != bits(b)).sum())} of {a.numel()} differ"
