"""Compile the kernels ahead of time, exactly as the package launches them, for GPUs that are not there.

``python compile_targets.py TARGET...`` compiles every specimen for each target and prints one line of JSON for each.
It needs a process with ``TRITON_INTERPRET`` unset; it imports nothing but coba_triton, torch and triton.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from coba_triton import (
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    _backends,
    _triton,
    coba_lif_feed_forward_integral,
    coba_lif_integral,
)
from coba_triton.kernels import feed_forward, recurrent

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


class Recorder:
    """Stands for a kernel and keeps what it is launched with instead of launching it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[ASTSource, dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(
            *args: Any, num_warps: int, enable_fp_fusion: bool, launch_cooperative_grid: bool = False, **meta: Any
        ) -> None:
            values = dict(zip(self.kernel.arg_names, args, strict=False)) | meta
            signature, constants, attributes = {}, {}, {}
            for position, name in enumerate(self.kernel.arg_names):
                value = values[name]
                if isinstance(value, torch.Tensor):
                    signature[name] = POINTERS[value.dtype]
                    attributes[(position,)] = [["tt.divisibility", 16]]
                elif value is None or name in meta:
                    signature[name] = "constexpr"
                    constants[name] = value
                else:
                    signature[name] = "i32" if abs(value) < 2**31 else "i64"
            source = ASTSource(self.kernel, signature, constants, attributes)
            options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
            if launch_cooperative_grid:
                options["launch_cooperative_grid"] = True
            self.launches.append((source, options))

        return launch


def run(
    *,
    dtype: torch.dtype = torch.float32,
    neurons: int = 128,
    method: str = "super",
    per_neuron: bool = False,
    learn: bool = True,
    train: bool = False,
    spike_gradient: bool = True,
    **options: Any,
) -> None:
    """Call the public function, and autograd when training."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.zeros(40, neurons, dtype=dtype)
    v = torch.zeros(neurons, dtype=compute, requires_grad=train)
    if train and dtype.is_floating_point:
        x.requires_grad_()
    v_thresh = torch.full((neurons,) if per_neuron else (), -10.0, dtype=compute, requires_grad=train and learn)
    spikes, state = coba_lif_feed_forward_integral(
        x,
        CobaLIFFeedForwardState(v, 0.0, 0.0),
        CobaLIFParameters(v_thresh=v_thresh, method=method),
        0.1,
        backend="triton",
        **options,
    )
    if train:
        (state.v.sum() + (spikes.sum() if spike_gradient else 0)).backward()


F32, F64 = torch.float32, torch.float64
SPECIMENS: dict[str, dict[str, Any]] = {
    "inference": {},
    "inference ragged": {"neurons": 100},
    "inference many": {"neurons": 65536},
    "inference many ragged": {"neurons": 65537},
    "inference packed": {"spike_dtype": "bits"},
    "inference per neuron recorded": {"per_neuron": True, "record_states": True, "order": "jump_first"},
    "inference bfloat16 packed": {"dtype": torch.bfloat16, "spike_dtype": "bits", "neurons": 100},
    "inference float16": {"dtype": torch.float16},
    "inference uint8": {"dtype": torch.bool, "spike_dtype": torch.uint8, "neurons": 100},
    "inference float64": {"dtype": F64, "neurons": 100},
    "training": {"train": True},
    "training ragged": {"train": True, "neurons": 100},
    "training input only": {"train": True, "learn": False},
    "training packed": {"train": True, "spike_dtype": "bits", "spike_gradient": False},
    "training triangle per neuron": {"train": True, "method": "triangle", "per_neuron": True},
    "training tanh jump first": {"train": True, "method": "tanh", "order": "jump_first"},
    "training circ recorded": {"train": True, "method": "circ", "record_states": True, "neurons": 100},
    "training circ everything": {
        "train": True,
        "method": "circ",
        "record_states": True,
        "per_neuron": True,
        "order": "jump_first",
    },
    "training heavi_erfc float16": {"train": True, "method": "heavi_erfc", "dtype": torch.float16},
    "training heaviside bfloat16": {"train": True, "method": "heaviside", "dtype": torch.bfloat16, "neurons": 100},
    "training bool": {"train": True, "dtype": torch.bool, "spike_dtype": F32},
    "training float64": {"train": True, "dtype": F64},
    "training float64 everything": {
        "train": True,
        "dtype": F64,
        "method": "circ",
        "record_states": True,
        "per_neuron": True,
        "neurons": 100,
    },
}


def run_recurrent(
    *,
    neurons: int,
    dtype: torch.dtype = F32,
    inputs: int = 40,
    train: bool = False,
    per_neuron: bool = False,
    method: str = "super",
    **options: Any,
) -> None:
    """Call the public function, and autograd when training."""
    w_in = torch.ones(neurons, inputs, dtype=dtype, requires_grad=train)
    w_rec = torch.zeros(1, 1, dtype=dtype).expand(neurons, neurons).requires_grad_(train)
    v_thresh = torch.full((neurons,) if per_neuron else (), -10.0, dtype=dtype, requires_grad=train)
    p = CobaLIFParameters(v_thresh=v_thresh, method=method)
    x = torch.zeros(34, 2, inputs, dtype=dtype)
    spikes, _ = coba_lif_integral(x, None, w_in, w_rec, p, 0.1, backend="triton", **options)
    if train:
        spikes.sum().backward()


RECURRENT_SPECIMENS: dict[str, dict[str, Any]] = {
    "recurrent 100": {"neurons": 100, "train": True},
    "recurrent 256 packed": {"neurons": 256, "spike_dtype": "bits"},
    "recurrent 256 everything": {
        "neurons": 256,
        "train": True,
        "record_states": True,
        "per_neuron": True,
        "order": "jump_first",
        "method": "circ",
    },
    "recurrent 256 float64": {"neurons": 256, "train": True, "dtype": F64},
    "recurrent 1024": {"neurons": 1024, "train": True},
    "recurrent 4096": {"neurons": 4096},
    "recurrent 4000 recorded": {"neurons": 4000, "record_states": True},
    "recurrent 9000": {"neurons": 9000},
    "recurrent 1024 sliced": {"neurons": 1024, "path": "sliced"},
    "recurrent 256 dense": {"neurons": 256, "path": "dense"},
}
KERNELS = {
    **{name: (feed_forward, name) for name in ("forward_kernel", "backward_kernel")},
    "recurrent_forward_kernel": (recurrent, "forward_kernel"),
    "sliced_forward_kernel": (recurrent, "sliced_forward_kernel"),
    "recurrent_backward_kernel": (recurrent, "backward_kernel"),
    **{name: (recurrent, name) for name in ("compact_kernel", "projection_kernel", "driven_kernel")},
}


def launches(name: str, target: str) -> dict[str, tuple[ASTSource, dict[str, Any]]]:
    """Kernel name to what one specimen launches it with on a target."""
    kernels = {kernel: getattr(module, function) for kernel, (module, function) in KERNELS.items()}
    recorders = {kernel: Recorder(function) for kernel, function in kernels.items()}
    device_type, threads_per_warp = _backends.triton_device_type, _triton.threads_per_warp
    _backends.triton_device_type = lambda: "cpu"
    _triton.threads_per_warp = lambda: TARGETS[target].warp_size  # type: ignore[assignment]
    programs, _triton.resident_programs = _triton.resident_programs, lambda: 132
    for kernel, (module, function) in KERNELS.items():
        setattr(module, function, recorders[kernel])
    try:
        if name in SPECIMENS:
            run(**SPECIMENS[name])
        else:
            run_recurrent(**RECURRENT_SPECIMENS[name])
    finally:
        _backends.triton_device_type, _triton.threads_per_warp = device_type, threads_per_warp
        _triton.resident_programs = programs
        for kernel, (module, function) in KERNELS.items():
            setattr(module, function, kernels[kernel])
    return {kernel: recorder.launches[0] for kernel, recorder in recorders.items() if recorder.launches}


def compile_specimen() -> CompiledKernel:
    """One kernel for one GPU."""
    source, options = launches("inference", "sm_80")["forward_kernel"]
    return triton.compile(source, target=TARGETS["sm_80"], options=options)


def cuobjdump(kernel: CompiledKernel, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def figures(kernel: CompiledKernel) -> dict[str, int]:
    """Registers, spills, and what must not be in a time loop: shared memory, barriers, fused multiply-adds."""
    if "cubin" in kernel.asm:
        usage = cuobjdump(kernel, "-res-usage")
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9]+)", cuobjdump(kernel, "-sass"), re.M)
        return {
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
            "stack": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
            "spills": sum(opcode in ("LDL", "STL") for opcode in opcodes),
            "shared": kernel.metadata.shared,
            "barriers": sum(opcode in ("BAR", "LDS", "STS", "LDSM", "STSM") for opcode in opcodes),
            "instructions": len(opcodes),
            "fused": len(re.findall(r"^\s*fma\.rn\.f", kernel.asm["ptx"], re.M)),
        }
    text = kernel.asm["amdgcn"]

    def figure(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

    return {
        "registers": figure("vgpr_count"),
        "stack": figure("private_segment_fixed_size"),
        "spills": figure("vgpr_spill_count"),
        "shared": kernel.metadata.shared,
        "barriers": len(re.findall(r"^\s+(?:s_barrier|ds_)", text, re.M)),
        "instructions": len(re.findall(r"^\s+[sv]_", text, re.M)),
    }


def main(targets: list[str]) -> None:
    for target in targets:
        for specimen in [*SPECIMENS, *RECURRENT_SPECIMENS]:
            for kernel, (source, options) in launches(specimen, target).items():
                compiled = triton.compile(source, target=TARGETS[target], options=options)
                line = {"target": target, "specimen": specimen, "kernel": kernel, **figures(compiled)}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
