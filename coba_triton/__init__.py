"""Conductance-based leaky integrate-and-fire networks over long sequences, in PyTorch and Triton."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _old_names as _old_names
from .common.garbage import importing
from .common.signals import is_command_line, silent_start

# A checkout without symbolic links (git on Windows, an unpacked sdist) has its kernels beside the package only.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

try:
    __version__ = version("coba-triton")
except PackageNotFoundError:  # a bare checkout
    __version__ = "0+unknown"

# The public names need PyTorch, which takes a second to import. A program gets all of them at once: afterwards PyTorch knows
# the operators and reads the records from files. The command line gets them when it first asks for one, as help needs none.
if TYPE_CHECKING or not is_command_line():
    with silent_start(), importing():
        from ._public import *  # noqa: F403
        from ._public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        if find_spec(f"{__name__}.{name}") is not None:  # `from .. import functional` asks here before it imports a module
            raise AttributeError(f"module {__name__!r} has not imported {name!r}")
        public = import_module("._public", __name__)
        if name == "__all__" or name in public.__all__:
            return getattr(public, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
