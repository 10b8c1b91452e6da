"""PyNN on this package: ``import coba_triton.pynn as sim``, and ``pyNN.coba_triton`` by the name that scripts look for.

Without PyNN there are :func:`from_pynn` and :func:`to_pynn`, which convert the parameters of neurons.
"""

import sys
from importlib.util import find_spec

from ..common.garbage import importing
from ..parameter_sets import from_pynn, to_pynn

__all__ = ["from_pynn", "to_pynn"]

if find_spec("pyNN") is not None:
    with importing():
        import pyNN

        from . import api
        from .api import *  # noqa: F403 - PyNN's names

    __all__ += api.__all__
    sys.modules["pyNN.coba_triton"] = sys.modules[__name__]
    pyNN.coba_triton = sys.modules[__name__]
else:

    def __getattr__(name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        raise ModuleNotFoundError(
            f"coba_triton.pynn.{name} needs PyNN, which is not installed; pip install 'coba-triton[pynn]'", name="pyNN"
        )
