"""What several commands do: find the backend and the device, open the compiler, write files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from coba_triton.common.files import local_path, reason, written_whole
from coba_triton.tools import checker
from coba_triton.tuning import tables
from coba_triton.tuning.tables import Machine

from .errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def find_target(backend: str, device: str | None) -> tuple[torch.device, Machine]:
    """The device, and the machine that the backend is measured or checked on.

    Raises:
        UserError: if the backend is unknown or cannot serve the device.
    """
    try:
        used, where = checker.resolve(backend, device)
        return where, tables.machine(used, where)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error).splitlines()[0]) from None


def open_compiler(option: str) -> ModuleType:
    """The module :mod:`coba_triton.tools.compiler`, for an option that compiles kernels for a GPU that may be absent.

    Raises:
        UserError: if Triton is missing or interprets kernels instead of compiling them.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError(f"{option} needs Triton's compiler, and TRITON_INTERPRET is set; unset it")
    try:
        from coba_triton.tools import compiler
    except ModuleNotFoundError as error:
        raise UserError(f'{option} needs the package {error.name}; run: pip install "coba-triton[interp]"') from None
    return compiler


def check_writable(path: Path) -> None:
    """Find out, before the work begins, whether a file can be written.

    Raises:
        UserError: if it cannot.
    """
    try:
        local_path(path, "a file").parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; name a file")
        probe = path.with_name(f".{path.name}.{os.getpid()}.part")
        probe.touch()
        probe.unlink()
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; name another file") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, which appears whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        with written_whole(path) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; make room or name another file") from None


def write_picture(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG file, which appears whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        with written_whole(path) as part:
            figure.savefig(part, format="png")
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; make room or name another --out") from None
