"""The CPU path: Numba compiles the kernels, or loads those that are kept on disk; ``launch`` is the backend."""

from ...common.garbage import importing

with importing():  # most of what a first call takes is the import of Numba, which imports numpy.ma with its first array
    import numpy.ma  # noqa: F401

    from . import numba_bridge as numba_bridge
