"""Triton's compiler without a pass that changes nothing in most kernels.

The pass ``tritongpu-coalesce`` decides how many neighbouring elements of a vector one thread has. Where no vector has more
elements than the program has threads, a thread has one, before the pass and after it: so it is in all loops over time. To
find that out, the pass follows for each load and store everything that depends on anything that it depends on. In an
unrolled loop that is the whole loop, and it takes most of the time in which a kernel compiles.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import triton
from triton._C.libtriton import passes

_TENSOR = re.compile(r"tensor<((?:\d+x)+)")
# Triton keeps what it compiles with a hook under a key of the hook's own, apart from what it compiles without one.
_KEY = "each thread has one element", "each thread has one element"


def _one_element_a_thread(module: Any, threads: int) -> bool:
    """Whether all tensors are vectors with at most one element for each thread."""
    return all(shape.count("x") == 1 and int(shape[:-1]) <= threads for shape in set(_TENSOR.findall(str(module))))


def leave_out(backend: Any = None, stages: Any = None, options: Any = None, *_: Any) -> tuple[str, str]:
    """Triton calls this once for each kernel that it compiles; and without arguments, for the key of the hook."""
    if stages is not None:
        optimise: Callable[[Any, Any], Any] = stages["ttgir"]
        threads = options.num_warps * backend.target.warp_size

        def without_the_pass(module: Any, metadata: Any) -> Any:
            if not _one_element_a_thread(module, threads):
                return optimise(module, metadata)
            with mock.patch.object(passes.ttgpuir, "add_coalesce", lambda manager: None):
                return optimise(module, metadata)

        stages["ttgir"] = without_the_pass
    return _KEY


def install() -> None:
    """Use it in this process; a release of Triton without such a hook compiles as it always does."""
    if hasattr(triton.knobs.runtime, "add_stages_inspection_hook"):
        triton.knobs.runtime.add_stages_inspection_hook = leave_out
