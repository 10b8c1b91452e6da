"""Compile the Triton kernels ahead of time, exactly as the package launches them, for GPUs that may be absent.

The environment variable ``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ..backend import choose
from ..backend.triton import hardware
from ..functional import coba_lif_feed_forward_integral, coba_lif_integral
from ..kernels import feed_forward, recurrent, sparse, time_chunks
from ..neuron.records import CobaLIFParameters
from ..ops.synapses import Synapses
from ..tuning import tables

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
    torch.int64: "*i64",
}
TRITON_FUNCTIONS = {
    **{name: (feed_forward, name) for name in ("forward_kernel", "backward_kernel")},
    **{name: (time_chunks, name) for name in ("speculate_kernel", "repair_kernel", "settle_kernel")},
    **{name: (time_chunks, name) for name in ("speculate_back_kernel", "repair_back_kernel", "settle_back_kernel")},
    "recurrent_forward_kernel": (recurrent, "forward_kernel"),
    "sliced_forward_kernel": (recurrent, "sliced_forward_kernel"),
    "recurrent_backward_kernel": (recurrent, "backward_kernel"),
    "shared_backward_kernel": (recurrent, "shared_backward_kernel"),
    **{name: (recurrent, name) for name in ("compact_kernel", "projection_kernel", "driven_kernel")},
    **{name: (sparse, name) for name in ("scatter_kernel", "sparse_projection_kernel", "sums_to_drive_kernel")},
    **{name: (sparse, name) for name in ("sparse_forward_kernel", "sparse_backward_kernel", "source_gradient_kernel")},
    "synapse_gradient_kernel": (sparse, "synapse_gradient_kernel"),
}

Launch = tuple[ASTSource, dict[str, Any]]


class Recorder:
    """Takes the place of a kernel. Instead of launching it, it keeps the arguments of every launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[Launch] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(
            *args: Any, num_warps: int, enable_fp_fusion: bool, launch_cooperative_grid: bool = False, **meta: Any
        ) -> None:
            values = dict(zip(self.kernel.arg_names, args, strict=False)) | meta
            signature, constants, attributes = {}, {}, {}
            recent = choose.version(triton.__version__) >= [3, 7]
            for position, name in enumerate(self.kernel.arg_names):
                value = values[name]
                if isinstance(value, torch.Tensor):
                    signature[name] = POINTERS[value.dtype]
                    attributes[(position,)] = [["tt.divisibility", 16]]
                elif value is None or name in meta:
                    signature[name] = "constexpr"
                    constants[name] = value
                elif isinstance(value, float):
                    signature[name] = "fp32"
                else:
                    signature[name] = "i32" if abs(value) < 2**31 else "i64"
                # these attributes are part of a kernel's key in Triton's cache; before 3.7 only words had them
                if signature[name] == "constexpr" and (isinstance(value, str) or recent):
                    attributes[(position,)] = []
            source = ASTSource(self.kernel, signature, constants, attributes)
            options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
            if launch_cooperative_grid:
                options["launch_cooperative_grid"] = True
            self.launches.append((source, options))

        return launch


@contextmanager
def recorded(target: str) -> Iterator[dict[str, Recorder]]:
    """Within the block, the backend ``triton`` takes CPU tensors, and its launches are recorded for a target, not made."""
    kernels = {kernel: getattr(module, function) for kernel, (module, function) in TRITON_FUNCTIONS.items()}
    recorders = {kernel: Recorder(function) for kernel, function in kernels.items()}
    kept_type = choose.triton_device_type
    of_device = ("threads_per_warp", "resident_programs", "meets_unasked")
    kept = {name: getattr(hardware, name) for name in of_device}
    choose.triton_device_type = lambda: "cpu"
    hardware.threads_per_warp = functools.cache(lambda: TARGETS[target].warp_size)
    hardware.resident_programs = lambda device: 132
    hardware.meets_unasked = lambda: TARGETS[target].backend == "cuda"
    for kernel, (module, function) in TRITON_FUNCTIONS.items():
        setattr(module, function, recorders[kernel])
    try:
        with tables.off():
            yield recorders
    finally:
        choose.triton_device_type = kept_type
        for name, function in kept.items():
            setattr(hardware, name, function)
        for kernel, (module, function) in TRITON_FUNCTIONS.items():
            setattr(module, function, kernels[kernel])


def compile_launch(launch: Launch, target: str) -> CompiledKernel:
    """Compile one recorded launch."""
    source, options = launch
    return triton.compile(source, target=TARGETS[target], options=options)


def cuobjdump(kernel: CompiledKernel, option: str) -> str:
    """What NVIDIA's tool cuobjdump says about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, pattern
    return int(found[1])


def figures(kernel: CompiledKernel, listing: str | None = None) -> dict[str, int]:
    """Registers, spills, and what a time loop must not contain: shared memory, barriers, fused multiply-adds.

    Args:
        kernel: what was compiled.
        listing: its machine code as text, for an NVIDIA GPU, if it is at hand; to make one takes a quarter of a second.
    """
    if "cubin" in kernel.asm:
        usage = cuobjdump(kernel, "-res-usage")
        listing = cuobjdump(kernel, "-sass") if listing is None else listing
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9]+)", listing, re.M)
        return {
            "registers": _number(r"REG:(\d+)", usage),
            "stack": _number(r"STACK:(\d+)", usage),
            "spills": sum(opcode in ("LDL", "STL") for opcode in opcodes),
            "shared": kernel.metadata.shared,
            "barriers": sum(opcode in ("BAR", "LDS", "STS", "LDSM", "STSM") for opcode in opcodes),
            "instructions": len(opcodes),
            "fused": len(re.findall(r"^\s*fma\.rn\.f", kernel.asm["ptx"], re.M)),
        }
    text = kernel.asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        "shared": kernel.metadata.shared,
        "barriers": len(re.findall(r"^\s+(?:s_barrier|ds_)", text, re.M)),
        "instructions": len(re.findall(r"^\s+[sv]_", text, re.M)),
    }


# For each target: registers of a multiprocessor (AMD: of a lane of a SIMD); the granule in which a warp gets registers; the
# largest number of resident warps (AMD: waves of a SIMD); shared memory in bytes. An NVIDIA multiprocessor holds at most 32
# programs. Sources: CUDA C++ Programming Guide, technical specifications per compute capability; AMD's MI300 and RDNA3
# instruction set guides.
LIMITS = {
    "sm_80": (65536, 256, 64, 167936),
    "sm_90": (65536, 256, 64, 233472),
    "sm_100": (65536, 256, 64, 233472),
    "gfx942": (512, 8, 8, 65536),
    "gfx1100": (1536, 24, 16, 65536),
}


def occupancy(target: str, registers: int, num_warps: int, shared: int) -> float:
    """The number of resident warps divided by the largest possible one, computed from registers and shared memory."""
    available, granule, most, memory = LIMITS[target]
    a_warp = max(1, registers)
    if target.startswith("sm_"):
        a_warp *= 32
    a_warp = -(-a_warp // granule) * granule
    warps = min(most, available // a_warp)
    if target.startswith("sm_"):
        programs = min(32, warps // num_warps)
        if shared:
            programs = min(programs, memory // shared)
        warps = min(most, programs * num_warps)
    return warps / most


# Launches are recorded for recurrent networks of at most so many neurons: nobody runs larger dense matrices.
MOST_CONNECTED = 2**13


def _calls(neurons: int, batch: int, dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """The usual calls: all kinds of networks, inference with every spike format, and training with shared parameters.

    Sparse ones have a refractory period and one delay, and either a weight of each synapse or one of each source.
    """
    options: dict[str, Any] = {"dt": 0.1, "backend": "triton"}
    connected = neurons <= MOST_CONNECTED
    x = torch.zeros(33, batch, neurons, dtype=dtype)
    inputs = torch.zeros(33, batch, min(neurons, 128), dtype=dtype)
    w_in, w_rec = (torch.zeros(1, dtype=dtype).expand(neurons, columns) for columns in (inputs.shape[-1], neurons))
    formats: tuple[Any, ...] = (None, torch.bool, torch.uint8, "bits")
    for spike_dtype in formats:
        yield functools.partial(coba_lif_feed_forward_integral, x, None, spike_dtype=spike_dtype, **options)
        if connected:
            yield functools.partial(coba_lif_integral, inputs, None, w_in, w_rec, spike_dtype=spike_dtype, **options)

    def train(function: Callable[..., Any], *args: Any) -> None:
        function(*args, **options)[0].sum().backward()

    for learned in (False, True):
        p = CobaLIFParameters(v_thresh=torch.full((), -10.0, dtype=dtype, requires_grad=learned))
        yield functools.partial(train, coba_lif_feed_forward_integral, x.clone().requires_grad_(), None, p)
        if connected:
            leaves = [weights.detach().requires_grad_() for weights in (w_in, w_rec)]
            yield functools.partial(train, coba_lif_integral, inputs, None, *leaves, p)
    if connected:
        yield from _sparse_calls(inputs, neurons, train, options)


# Synapses of a source in the sparse networks whose launches are recorded.
FAN_OUT = 100


def _sparse_calls(
    inputs: torch.Tensor, neurons: int, train: Callable[..., None], options: dict[str, Any]
) -> Iterator[Callable[[], Any]]:
    """The usual calls of networks with sparse synapses."""
    dtype, fan_out = inputs.dtype, min(neurons, FAN_OUT)

    def synapses(sources: int, weights: torch.Tensor, delay: float | None) -> Synapses:
        targets = torch.arange(fan_out, dtype=torch.int32).repeat(sources)
        delays = None if delay is None else torch.tensor([delay])
        indptr = torch.arange(sources + 1) * fan_out
        return Synapses(indptr, targets, weights, delays, neurons, delay or 0.0, delay or 0.0)

    incoming = synapses(inputs.shape[-1], torch.ones(1, dtype=dtype), None)
    each = torch.ones(neurons * fan_out, dtype=dtype)
    each[:1] = 2.0**-40  # with which 32 bits do not hold the sums
    formats: tuple[Any, ...] = (None, torch.bool, torch.uint8, "bits")
    p = CobaLIFParameters(refractory=2.0)
    for spike_dtype, weights in itertools.product(formats, (each, torch.ones(neurons, 1, dtype=dtype))):
        recurrent = synapses(neurons, weights, 1.5)
        yield functools.partial(coba_lif_integral, inputs, None, incoming, recurrent, p, spike_dtype=spike_dtype, **options)
    learned = incoming.with_weights(torch.ones(incoming.count, dtype=dtype, requires_grad=True))
    recurrent = synapses(neurons, each.clone().requires_grad_(), 1.5)
    yield functools.partial(train, coba_lif_integral, inputs, None, learned, recurrent, p)


def launches_of(target: str, sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> dict[str, tuple[str, Launch]]:
    """The launches of the usual calls for each size, neurons and rows: the kernel's name and the launch, by its hash."""
    found: dict[str, tuple[str, Launch]] = {}
    for neurons, batch in sizes:
        for call in _calls(neurons, batch, dtype):
            with recorded(target) as recorders:
                call()
            for kernel, recorder in recorders.items():
                for source, options in recorder.launches:
                    found.setdefault(f"{source.hash()} {sorted(options.items())}", (kernel, (source, options)))
    return found


def compile_ahead(
    target: str, sizes: Sequence[tuple[int, int]], dtype: torch.dtype, cache: Path | None = None
) -> Iterator[tuple[int, int, str]]:
    """Compile the kernels of the usual calls into Triton's cache, where a machine with such a GPU finds them.

    The cache serves only these kernels, the same release of Triton, and the same path of the folder.

    Args:
        target: a name in :data:`TARGETS`.
        sizes: the sizes of networks, each as the number of neurons in a row and the number of rows.
        dtype: dtype of the input, float32 or float64.
        cache: the folder of the cache; None for Triton's own.

    Yields:
        How many kernels are compiled, how many there are, and the name of the last one.
    """
    if cache is not None:
        triton.knobs.cache.dir = str(cache)
    every = launches_of(target, sizes, dtype)
    with ThreadPoolExecutor() as threads:
        jobs = {threads.submit(compile_launch, launch, target): kernel for kernel, launch in every.values()}
        for number, job in enumerate(as_completed(jobs), 1):
            job.result()
            yield number, len(every), jobs[job]
