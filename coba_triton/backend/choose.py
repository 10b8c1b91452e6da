"""Which backend serves a request, and where its launchers are: the one place that knows."""

from __future__ import annotations

import functools
import importlib
import re
from typing import TYPE_CHECKING, cast

import numpy
import torch

from ..common.garbage import importing
from ..common.messages import logger

if TYPE_CHECKING:
    from .protocol import Backend

BACKENDS = ("auto", "reference", "triton", "cpu")
# The modules that launch kernels. The reference, which has none, is no operator.
LAUNCHERS = {"triton": "coba_triton.backend.triton", "cpu": "coba_triton.backend.cpu.launch"}


@functools.cache
def launcher(backend: str) -> Backend:
    """The module that launches a backend's kernels, imported when first needed."""
    with importing():
        return cast("Backend", importlib.import_module(LAUNCHERS[backend]))


def _triton_device() -> tuple[str, str]:
    """The torch device type that Triton's kernels run on, or an empty one; then why, and what to do."""
    try:
        import triton
    except ImportError:
        return "", (
            "backend 'triton' needs the triton package, which is not installed; install coba-triton[interp], or pass "
            "backend='auto' or 'reference'"
        )
    if triton.knobs.runtime.interpret:
        if version(triton.__version__) < [3, 7] and version(numpy.__version__) >= [2, 4]:
            return "", (
                f"backend 'triton' runs in the interpreter of triton {triton.__version__} here, which fails with numpy "
                f"{numpy.__version__}; install triton 3.7 or newer, or numpy below 2.4"
            )
        return "cpu", ""
    try:
        return str(triton.runtime.driver.active.get_active_torch_device().type), ""
    except RuntimeError:
        return "", (
            "backend 'triton' needs a GPU that Triton can drive, and it found none; set TRITON_INTERPRET=1 "
            "before the start to run the kernels in Triton's interpreter, or pass backend='auto' or 'reference'"
        )


# Compilers cannot follow these lines, and a process has one driver. torch.compiler.assume_constant_result sets just this,
# but imports all of torch's compiler.
_triton_device._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions declare none


def version(text: str) -> list[int]:
    """The first two numbers of a version."""
    return [int(number) for number in re.findall(r"\d+", text)[:2]]


def triton_device_type() -> str:
    """The torch device type that Triton's kernels run on: its active driver's, or ``cpu`` under its interpreter.

    Raises:
        RuntimeError: if triton is not installed or has no driver; the message says what to do.
    """
    device_type: str
    device_type, problem = _triton_device()
    if problem:
        raise RuntimeError(problem)
    return device_type


def the_device(device: torch.device | str) -> torch.device:
    """A device by its name.

    Raises:
        ValueError: if there is none of this name.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be a device of torch, such as 'cpu' or 'cuda', got {device!r:.200} ({error!s:.200})"
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
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r:.200}")
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
