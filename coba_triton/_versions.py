"""Versions of installed packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch


def package_version(name: str) -> str | None:
    """The version of an installed package, None if it is not installed.

    PyTorch's is its own, which names the build (``+cu130``, ``+cpu``); a wheel's metadata may leave that out.
    """
    if name == "torch":
        return str(torch.__version__)
    try:
        return version(name)
    except PackageNotFoundError:
        return None
