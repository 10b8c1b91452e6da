"""Triton's own CUDA driver over a ``libcuda`` that executes nothing, for a process without a GPU.

Kernels compile for sm_90 and are launched by Triton's own launchers; what they compute is not computed. So this tells
whether every launch compiles and is accepted, how many launches and other operations a call makes, whether the host waits
for the device, and what a call costs on the host. Of results it tells nothing.

    import dry

    dry.install()  # tensors stay on the CPU
"""

from __future__ import annotations

import collections
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Operations that read something back from a device.
WAITS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal")

_library: Any = None


def _build(folder: Path) -> Path:
    """Compile ``libcuda.c`` to where Triton looks for the driver's library."""
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*command, str(Path(__file__).with_name("libcuda.c"))], check=True)
    return library


def install() -> None:
    """Make it Triton's active driver in this process, before a kernel is launched."""
    global _library
    folder = Path(tempfile.mkdtemp(prefix="dry"))
    library = _build(folder)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    _library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _library.dry_name.restype = ctypes.c_char_p
    import torch
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_stream = lambda device=None: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device=None: (9, 0)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())


def launches() -> collections.Counter[str]:
    """How often each kernel was launched since the last call."""
    counts: collections.Counter[str] = collections.Counter()
    for kernel in range(_library.dry_kernels()):
        counts[_library.dry_name(kernel).decode()] += _library.dry_count(kernel)
    _library.dry_reset()
    return +counts


def operations(run: Callable[[], Any]) -> collections.Counter[str]:
    """The names of PyTorch's operations in a call, and how often they are made."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        run()
    return collections.Counter(event.name for event in profiler.events() if event.name.startswith("aten::"))
