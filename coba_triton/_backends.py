"""Which backend serves a request: the one place that knows."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Literal, get_args

import torch

logger = logging.getLogger("coba_triton")

Backend = Literal["auto", "reference", "triton", "cpu"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def triton_device_type() -> str:
    """The torch device type that Triton's kernels run on: its active driver's, or ``cpu`` under its interpreter.

    Raises:
        RuntimeError: if triton is not installed or has no driver; the message says what to do.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "backend 'triton' needs the triton package, which is not installed; install coba-triton[interp], or pass "
            "backend='auto' or 'reference'"
        )
    import triton

    if triton.knobs.runtime.interpret:
        return "cpu"
    try:
        return str(triton.runtime.driver.active.get_active_torch_device().type)
    except RuntimeError:
        raise RuntimeError(
            "backend 'triton' needs a GPU that Triton can drive, and it found none; set TRITON_INTERPRET=1 "
            "before the start to run the kernels in Triton's interpreter, or pass backend='auto' or 'reference'"
        ) from None


@functools.cache
def _report_fallback(what: str) -> None:
    logger.info("backend 'auto' uses the reference: no fused backend serves %s", what)


def choose_backend(backend: str, device: torch.device) -> str:
    """Resolve ``backend`` for tensors on ``device`` to ``reference``, ``triton`` or ``cpu``.

    Raises:
        ValueError: if the name is unknown.
        RuntimeError: if a backend that was asked for by name cannot serve.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "reference":
        return "reference"
    if backend == "cpu":
        if device.type != "cpu":
            raise RuntimeError(
                f"backend 'cpu' serves tensors on 'cpu', got tensors on {device.type!r}; move them with .to('cpu'), or "
                "pass backend='auto' or 'reference'"
            )
        return "cpu"
    if backend == "auto":
        if device.type == "cpu":
            return "cpu"
        try:
            serves = triton_device_type() == device.type
        except RuntimeError:
            serves = False
        if not serves:
            _report_fallback(f"tensors on {device.type!r}")
        return "triton" if serves else "reference"
    served = triton_device_type()
    if served != device.type:
        raise RuntimeError(
            f"backend 'triton' serves tensors on {served!r} here, got tensors on {device.type!r}; move them with "
            f".to({served!r}), or pass backend='auto' or 'reference'"
        )
    return "triton"
