"""Run compiled Triton kernels on the CPU, without a GPU.

import ptxsim
with ptxsim.install(arch=80, race=True, seed=1):
    kernel[grid](*cpu_tensors)
"""

from .driver import (
    LOG,
    Options,
    current_options,
    forget,
    install,
    register,
    set_options,
)
from .execute import Finding, KernelFault
from .translate import Unsupported

__all__ = [
    "LOG",
    "Finding",
    "KernelFault",
    "Options",
    "Unsupported",
    "current_options",
    "forget",
    "install",
    "register",
    "set_options",
]
