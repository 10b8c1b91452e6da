"""Versions of installed packages and of the GPU's driver."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import torch


def package_version(name: str) -> str | None:
    """The version of an installed package, None if it is not installed.

    For PyTorch it is ``torch.__version__``, which names the build (``+cu130``, ``+cpu``); a wheel's metadata may not.
    """
    if name == "torch":
        return str(torch.__version__)
    with suppress(PackageNotFoundError):
        return version(name)
    for distribution in packages_distributions().get(name, ()):  # PyTorch for ROCm installs Triton under another name
        with suppress(PackageNotFoundError):
            return version(distribution)
    return None


def driver_version() -> str | None:
    """The version of NVIDIA's or AMD's driver, None if there is none."""
    if tool := shutil.which("nvidia-smi"):
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return (done.stdout.splitlines() or [""])[0].strip() or None if done.returncode == 0 else None
    amd = Path("/sys/module/amdgpu/version")
    return amd.read_text(encoding="utf-8").strip() if amd.exists() else None
