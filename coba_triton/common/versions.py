"""Versions of installed packages."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, version

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
