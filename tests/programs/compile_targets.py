"""Compile the kernels ahead of time, exactly as the package launches them, for GPUs that are not there.

Compiling needs a process with ``TRITON_INTERPRET`` unset; this module imports nothing but coba_triton, torch and triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.compiler import ASTSource, CompiledKernel

from coba_triton import CobaLIFFeedForwardState, CobaLIFParameters, coba_lif_feed_forward_integral, coba_lif_integral
from coba_triton.tools.compiler import TARGETS, recorded


def run(
    *,
    dtype: torch.dtype = torch.float32,
    neurons: int = 128,
    method: str = "super",
    per_neuron: bool = False,
    learn: bool = True,
    train: bool = False,
    spike_gradient: bool = True,
    refractory: float = 0.0,
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
        CobaLIFParameters(v_thresh=v_thresh, method=method, refractory=refractory),
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
    "training refractory": {"train": True, "refractory": 5.0, "record_states": True, "neurons": 100},
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
    batch: int = 2,
    train: bool = False,
    per_neuron: bool = False,
    method: str = "super",
    refractory: float = 0.0,
    **options: Any,
) -> None:
    """Call the public function, and autograd when training."""
    options.setdefault("path", "events")  # "auto" would go by what unwritten memory holds
    w_in = torch.ones(neurons, inputs, dtype=dtype, requires_grad=train)
    w_rec = torch.zeros(1, 1, dtype=dtype).expand(neurons, neurons).requires_grad_(train)
    v_thresh = torch.full((neurons,) if per_neuron else (), -10.0, dtype=dtype, requires_grad=train)
    p = CobaLIFParameters(v_thresh=v_thresh, method=method, refractory=refractory)
    x = torch.zeros(34, batch, inputs, dtype=dtype)
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
    "recurrent 256 refractory": {"neurons": 256, "train": True, "refractory": 5.0, "per_neuron": True},
    "recurrent 1024, many rows": {"neurons": 1024, "batch": 64},
    "recurrent 256 float64, many rows": {"neurons": 256, "batch": 64, "dtype": F64, "train": True},
    "recurrent 4096": {"neurons": 4096},
    "recurrent 4000 recorded": {"neurons": 4000, "record_states": True},
    "recurrent 9000": {"neurons": 9000},
    "recurrent 1024 sliced": {"neurons": 1024, "path": "sliced"},
    "recurrent 256 dense": {"neurons": 256, "path": "dense"},
}


# Launches every kernel at least once with every dtype and on every path: enough where nothing but a compiler differs.
FEW = (
    "inference",
    "inference bfloat16 packed",
    "inference float16",
    "inference uint8",
    "inference float64",
    "training circ everything",
    "training heavi_erfc float16",
    "training heaviside bfloat16",
    "training bool",
    "training float64 everything",
    "recurrent 256 everything",
    "recurrent 256 float64",
    "recurrent 1024 sliced",
    "recurrent 256 dense",
)
LESS_USED = ("sm_100", "gfx1100")


def specimens(target: str) -> list[str]:
    """What is compiled for a target: everything, or for those without budgets each kernel, dtype and path."""
    return [name for name in [*SPECIMENS, *RECURRENT_SPECIMENS] if name in FEW or target not in LESS_USED]


def launches(name: str, target: str) -> dict[str, tuple[ASTSource, dict[str, Any]]]:
    """Kernel name to what one specimen launches it with on a target."""
    with recorded(target) as recorders:
        if name in SPECIMENS:
            run(**SPECIMENS[name])
        else:
            run_recurrent(**RECURRENT_SPECIMENS[name])
    return {kernel: recorder.launches[0] for kernel, recorder in recorders.items() if recorder.launches}


def compile_specimen() -> CompiledKernel:
    """One kernel for one GPU."""
    source, options = launches("inference", "sm_80")["forward_kernel"]
    return triton.compile(source, target=TARGETS["sm_80"], options=options)
