"""What computes: the reference, the CPU path and the Triton kernels.

The name is singular because torch.compile does not look into files whose path has ``triton/backends`` in it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import triton
    from .cpu import launch
    from .protocol import Backend

    # a type checker finds out here that each of them offers all that a backend must
    OFFERED: tuple[Backend, ...] = (triton, launch)
