"""Compile the kernels ahead of time, exactly as the package launches them, for GPUs that are not there.

Compiling needs a process with ``TRITON_INTERPRET`` unset; this module imports nothing but coba_triton, torch and triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.compiler import ASTSource, CompiledKernel

from coba_triton import CobaLIFFeedForwardState, CobaLIFParameters, coba_lif_feed_forward_integral, coba_lif_integral
from coba_triton.backend import triton as triton_backend
from coba_triton.neuron.records import Constants, Sums
from coba_triton.ops.call import Outputs, Projection, SparseNetwork, SparseSweep
from coba_triton.ops.grid import Grid
from coba_triton.tools.compiler import TARGETS, recorded


def run(
    *,
    dtype: torch.dtype = torch.float32,
    steps: int = 40,
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
    x = torch.zeros(steps, neurons, dtype=dtype)
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
    "inference in chunks": {"steps": 300, "time_chunks": 3},
    "inference in chunks packed ragged": {"steps": 300, "time_chunks": 3, "spike_dtype": "bits", "neurons": 100},
    "inference in chunks float64 everything": {
        "steps": 300,
        "time_chunks": 3,
        "dtype": F64,
        "record_states": True,
        "per_neuron": True,
        "refractory": 5.0,
        "order": "jump_first",
        "neurons": 100,
    },
    "inference in chunks uint8": {"steps": 300, "time_chunks": 3, "dtype": torch.bool, "spike_dtype": torch.uint8},
    "training in chunks": {"steps": 300, "time_chunks": 3, "train": True, "learn": False},
    "training in chunks circ everything": {
        "steps": 300,
        "time_chunks": 3,
        "train": True,
        "learn": False,
        "method": "circ",
        "record_states": True,
        "per_neuron": True,
        "refractory": 5.0,
        "order": "jump_first",
        "neurons": 100,
    },
    "training in chunks float64": {"steps": 300, "time_chunks": 3, "train": True, "learn": False, "dtype": F64},
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
    options.setdefault("path", "events")
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
    "recurrent 512, held": {"neurons": 512, "batch": 32, "train": True},
    "recurrent 500, held, everything": {
        "neurons": 500,
        "batch": 3,
        "train": True,
        "record_states": True,
        "per_neuron": True,
        "refractory": 5.0,
        "order": "jump_first",
        "method": "circ",
    },
    "recurrent 4000, streamed": {"neurons": 4000, "batch": 1, "train": True, "refractory": 5.0},
    "recurrent 1000, streamed, everything": {
        "neurons": 1000,
        "batch": 4,
        "train": True,
        "record_states": True,
        "per_neuron": True,
        "order": "jump_first",
        "method": "circ",
    },
    "recurrent 1000 float64, streamed": {"neurons": 1000, "dtype": F64, "train": True, "batch": 4},
    "recurrent 1024, many rows": {"neurons": 1024, "batch": 64, "train": True},
    "recurrent 256 float64, many rows": {"neurons": 256, "batch": 64, "dtype": F64, "train": True},
    "recurrent 2000 per neuron": {"neurons": 2000, "per_neuron": True, "refractory": 5.0, "record_states": True},
    "recurrent 1000 float64": {"neurons": 1000, "dtype": F64, "spike_dtype": "bits", "refractory": 5.0},
    "recurrent 4096": {"neurons": 4096},
    "recurrent 4000 recorded": {"neurons": 4000, "record_states": True},
    "recurrent 4000 everything": {"neurons": 4000, "per_neuron": True, "refractory": 5.0, "record_states": True},
    "recurrent 4000 float64 everything": {
        "neurons": 4000,
        "dtype": F64,
        "per_neuron": True,
        "refractory": 5.0,
        "record_states": True,
    },
    "recurrent 9000": {"neurons": 9000},
    "recurrent 1024 sliced": {"neurons": 1024, "path": "sliced"},
    "recurrent 4000 sliced": {"neurons": 4000, "batch": 1, "path": "sliced", "spike_dtype": "bits", "refractory": 5.0},
    "recurrent 4096 sliced, many rows": {"neurons": 4096, "batch": 33, "path": "sliced"},
    "recurrent 4096 float64 sliced everything": {
        "neurons": 4096,
        "batch": 16,
        "path": "sliced",
        "dtype": F64,
        "per_neuron": True,
        "refractory": 5.0,
        "record_states": True,
    },
    "recurrent 256 dense": {"neurons": 256, "path": "dense"},
}


def run_sparse(
    *,
    neurons: int,
    dtype: torch.dtype = F32,
    batch: int = 2,
    inputs: int = 40,
    input_dtype: torch.dtype | None = None,
    fan_out: int = 100,
    sums: torch.dtype = torch.int64,
    shortest: int = 2,
    per: str = "synapse",
    train: bool = False,
    per_neuron: bool = False,
    record_states: bool = False,
    packed: bool = False,
    fields: int = 3,
    method: str = "super",
    jump_first: bool = False,
) -> None:
    """Call the backend as the operators of sparse networks do: a block forward and, when training, back."""
    steps, longest = 34, 20

    def projection(sources: int, delays: bool) -> Projection:
        synapses = sources * fan_out
        shape = {"synapse": (synapses,), "source": (sources, 1), "network": (1,)}[per]
        return Projection(
            torch.arange(0, synapses + 1, fan_out),
            torch.zeros(synapses, dtype=torch.int32),
            torch.zeros(shape, dtype=dtype),
            torch.zeros(shape) if delays else None,
            Grid(torch.ones(4, dtype=dtype), sums),
        )

    recurrent, from_inputs = projection(neurons, True), projection(inputs, False) if inputs else None
    constants = torch.zeros(len(Constants._fields), batch * neurons if per_neuron else 1, dtype=dtype)
    names = SparseNetwork._fields
    values = (neurons, None, from_inputs, recurrent, 10.0, shortest, longest, constants, jump_first, triton_backend)
    given = ("neurons", "input_weights", "inputs", "recurrent", "per_ms", "shortest", "longest")
    known = dict(zip((*given, "constants", "jump_first", "backend"), values, strict=True))
    net = SparseNetwork(*(known.get(name) for name in names))
    x = torch.zeros(steps, batch, inputs, dtype=input_dtype or dtype)
    shape = steps, batch, neurons
    state, words = torch.zeros(fields, batch, neurons, dtype=dtype), torch.zeros(2, batch, neurons, dtype=torch.int32)
    states = torch.zeros(fields, *shape, dtype=dtype) if record_states else None
    history = torch.zeros(longest, batch, neurons, dtype=dtype)
    ring = triton_backend.sparse_ring(net, history)
    spikes = None if packed else torch.zeros(shape, dtype=dtype)
    out = Outputs(spikes, words if packed or train else None, states)
    triton_backend.sparse_block(net, ring, 0, x, None, state, out)
    if not train:
        return
    adjoints = torch.zeros(steps + longest, batch, 2, neurons, dtype=dtype)
    sweep = SparseSweep(
        method,
        1,
        torch.zeros_like(state),
        torch.zeros(len(Sums._fields), batch * neurons, dtype=dtype) if per_neuron else None,
        torch.zeros(1, len(recurrent.targets), dtype=dtype),
        torch.zeros(1, len(from_inputs.targets), dtype=dtype) if from_inputs else None,
        {},
    )
    grad_x = torch.zeros(x.shape, dtype=dtype) if inputs else None
    triton_backend.sparse_backward_block(
        net, ring, x, None, state, words, torch.zeros(shape, dtype=dtype), states, sweep, adjoints, grad_x
    )
    triton_backend.sparse_history_gradient(net, history, adjoints[:longest], torch.zeros_like(history), sweep)


SPARSE_SPECIMENS: dict[str, dict[str, Any]] = {
    "sparse 200": {"neurons": 200, "train": True},
    "sparse 200 narrow packed": {"neurons": 200, "sums": torch.int32, "packed": True, "per": "network", "inputs": 0},
    "sparse 200 float64": {"neurons": 200, "train": True, "dtype": F64, "method": "triangle"},
    "sparse 256 everything": {
        "neurons": 256,
        "train": True,
        "record_states": True,
        "per_neuron": True,
        "packed": True,
        "fields": 4,
        "method": "circ",
        "jump_first": True,
        "input_dtype": torch.bfloat16,
    },
    "sparse 4000": {"neurons": 4000, "batch": 1, "train": True},
    "sparse 4000 narrow by source": {"neurons": 4000, "batch": 1, "sums": torch.int32, "per": "source", "train": True},
    "sparse 4000 float64 everything": {
        "neurons": 4000,
        "batch": 1,
        "train": True,
        "dtype": F64,
        "record_states": True,
        "per_neuron": True,
        "packed": True,
        "fields": 4,
        "method": "circ",
        "input_dtype": torch.float16,
    },
    "sparse 4000, many rows, uint8": {"neurons": 4000, "batch": 200, "fan_out": 4, "input_dtype": torch.bool},
}


# Launches every kernel at least once with every dtype and on every path: enough where nothing but a compiler differs.
FEW = (
    "inference",
    "inference bfloat16 packed",
    "inference float16",
    "inference uint8",
    "inference float64",
    "inference in chunks",
    "training circ everything",
    "training heavi_erfc float16",
    "training heaviside bfloat16",
    "training bool",
    "training float64 everything",
    "recurrent 256 everything",
    "recurrent 256 float64",
    "recurrent 1024 sliced",
    "recurrent 512, held",
    "recurrent 1000 float64, streamed",
    "recurrent 256 dense",
    "sparse 200 narrow packed",
    "sparse 256 everything",
    "sparse 4000 narrow by source",
    "sparse 4000 float64 everything",
)
LESS_USED = ("sm_100", "gfx1100")


def specimens(target: str) -> list[str]:
    """What is compiled for a target: everything, or for those without budgets each kernel, dtype and path."""
    return [name for name in [*SPECIMENS, *RECURRENT_SPECIMENS, *SPARSE_SPECIMENS] if name in FEW or target not in LESS_USED]


def launches(name: str, target: str) -> dict[str, tuple[ASTSource, dict[str, Any]]]:
    """Kernel name to what one specimen launches it with on a target."""
    with recorded(target) as recorders:
        if name in SPECIMENS:
            run(**SPECIMENS[name])
        elif name in RECURRENT_SPECIMENS:
            run_recurrent(**RECURRENT_SPECIMENS[name])
        else:
            run_sparse(**SPARSE_SPECIMENS[name])
    return {kernel: recorder.launches[0] for kernel, recorder in recorders.items() if recorder.launches}


def compile_specimen() -> CompiledKernel:
    """One kernel for one GPU."""
    source, options = launches("inference", "sm_80")["forward_kernel"]
    return triton.compile(source, target=TARGETS["sm_80"], options=options)
