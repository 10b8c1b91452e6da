"""The compiler of these tests leaves out a pass; it compiles what Triton's own compiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton

from coba_triton.tools.compiler import compile_launch
from helpers import fast_compiler
from programs.compile_targets import launches


@pytest.mark.parametrize(
    ("specimen", "target"),
    [("training packed", "sm_80"), ("recurrent 512, held", "sm_80"), ("sparse 200 narrow packed", "gfx942")],
)
def test_same_code_as_with_the_pass(specimen: str, target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if triton.knobs.runtime.add_stages_inspection_hook is not fast_compiler.leave_out:
        pytest.skip("this Triton has no such hook")
    # what another checkout has left in the cache names the files there
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = "ptx" if target == "sm_80" else "amdgcn"
    kernels = launches(specimen, target).values()
    ours = [compile_launch(kernel, target).asm[code] for kernel in kernels]
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", None)
    assert ours == [compile_launch(kernel, target).asm[code] for kernel in kernels]
