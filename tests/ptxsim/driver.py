"""A Triton driver without a GPU: kernels are compiled as usual and run on the CPU."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.testing
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver as driver_config

from . import execute
from .cubin import cubin_registers
from .execute import Finding, KernelFault, Memory
from .translate import Program, Unsupported, translate


class Hardware(NamedTuple):
    """What limits the blocks that run at the same time; shared memory in bytes."""

    multiprocessors: int
    shared_per_block: int
    shared: int
    blocks: int
    threads: int
    registers: int


HARDWARE = {
    75: Hardware(40, 65536, 65536, 16, 1024, 65536),
    80: Hardware(108, 166912, 167936, 32, 2048, 65536),
    86: Hardware(84, 101376, 102400, 16, 1536, 65536),
    89: Hardware(128, 101376, 102400, 24, 1536, 65536),
    90: Hardware(132, 232448, 233472, 32, 2048, 65536),
    100: Hardware(148, 232448, 233472, 32, 2048, 65536),
    120: Hardware(188, 101376, 102400, 24, 1536, 65536),
}


@dataclass
class Options:
    """How launches are executed; the README says more."""

    arch: int = 80  # compile for this compute capability
    race: bool = True  # look for data races (off: faster)
    seed: int = 1  # order of blocks and threads; 0: fixed order
    interleave: bool = False  # also switch threads at plain memory accesses
    resident: int | None = None  # blocks that run at the same time; None: decided per kernel
    bounds: str = "view"  # a pointer may reach: "view" its tensor, "storage" the tensor's whole storage
    on_finding: str = "raise"  # or "warn", "record"
    max_findings: int = 8
    timeout: float = 600.0  # seconds per launch
    max_instructions: int | None = None  # per thread
    livelock_steps: int = 20_000_000  # thread switches without any change in memory
    sm_count: int | None = None  # pretend that the GPU has so many SMs
    optimise: str = "-O1"  # for the C++ compiler
    zero_shared: bool = False  # start shared memory at zero instead of all ones
    first_block: tuple[int, int, int] = (0, 0, 0)  # run only a part of the grid ...
    blocks: tuple[int, int, int] | None = None  # ... of this shape
    transform: Callable[[str], str] | None = None  # applied to the PTX text before it is translated

    def __post_init__(self) -> None:
        if self.bounds not in ("view", "storage") or self.on_finding not in ("raise", "warn", "record"):
            raise ValueError("bounds is 'view' or 'storage'; on_finding is 'raise', 'warn' or 'record'")
        if self.arch not in HARDWARE:
            raise ValueError(f"arch must be one of {sorted(HARDWARE)}")


@dataclass
class LaunchRecord:
    """What one launch was and did."""

    kernel: str
    grid: tuple[int, int, int]
    arch: int
    findings: list[Finding]
    seconds: float
    instructions: int = 0
    loads: int = 0
    stores: int = 0
    atomics: int = 0
    syncs: int = 0
    switches: int = 0
    printed: str = ""
    ptx: str = field(default="", repr=False)


@dataclass
class State:
    """What is installed in this process."""

    options: Options | None = None
    bench: bool = False
    cost: float = 0


LOG: list[LaunchRecord] = []  # every launch since install()
_extra: list[torch.Tensor] = []  # that kernels may reach through pointers in memory
_state = State()


def installed() -> Options:
    if _state.options is None:
        raise RuntimeError("ptxsim is not installed: call ptxsim.install(), or run under python -m ptxsim")
    return _state.options


def register(*tensors: torch.Tensor) -> None:
    """Allow access to tensors that a kernel reaches through addresses stored in memory."""
    _extra.extend(tensors)


def forget() -> None:
    """Undo :func:`register`."""
    _extra.clear()


def occupancy(arch: int, threads: int, registers: int, shared: int) -> int:
    """Blocks of a kernel that one SM can hold."""
    hardware = HARDWARE[arch]
    warps = -(-threads // 32)
    by_registers = hardware.blocks
    if registers:  # a warp gets them in units of 256
        by_registers = hardware.registers // (-(-registers * 32 // 256) * 256) // warps
    by_shared = hardware.shared // (shared + 1024) if shared else hardware.blocks
    return min(hardware.blocks, hardware.threads // (warps * 32), by_registers, by_shared)


class Utils:
    """What Triton asks of the driver library."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        options = installed()
        hardware = HARDWARE[options.arch]
        return {
            "max_shared_mem": hardware.shared_per_block,
            "max_num_regs": hardware.registers,
            "multiprocessor_count": options.sm_count or hardware.multiprocessors,
            "warpSize": 32,
            "sm_clock_rate": 1410000,
            "mem_clock_rate": 1215000,
            "mem_bus_width": 5120,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int, *rest: Any) -> tuple[Any, ...]:
        info = cubin_registers(binary, name)
        return object(), object(), info["registers"], info["stack"] // 4, 1024

    def unload_module(self, module: object) -> None:
        pass

    def set_printf_fifo_size(self, size: int) -> None:
        pass


Argument = tuple[str, Any, str]  # type, value, name


def flatten(signature: Sequence[Any], args: Sequence[Any], names: Sequence[str], described: object) -> list[Argument]:
    """Pair every run-time argument with its type, as the real launcher does."""
    out: list[Argument] = []
    for i, (kind, value) in enumerate(zip(signature, args, strict=True)):
        name = names[i] if i < len(names) else f"arg{i}"
        if isinstance(kind, tuple):
            out += flatten(kind, value, [f"{name}[{j}]" for j in range(len(kind))], described)
        elif kind == "constexpr":
            continue
        elif kind.startswith("tensordesc"):
            if described:
                raise Unsupported("tensor map (TMA) arguments")
            shape, strides = [int(x) for x in value.shape], [int(x) for x in value.strides]
            flags = value.padding == "nan", bool(getattr(value, "round_f32_to_tf32", False))
            out.append(("*", value.base, name))
            out += [("i64", x, name) for x in shape + strides]
            out += [("i1", x, name) for x in flags]
            out += [("i32", x, name) for x in shape] + [("i64", x, name) for x in strides]
        else:
            out.append((kind, value, name))
    return out


FLOATS = {"fp32": torch.float32, "f32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}


def pack(kind: str, value: Any, size: int) -> bytes:
    """A scalar argument as the kernel reads it."""
    if kind in FLOATS:
        data = bytes(torch.tensor([float(value)], dtype=FLOATS[kind]).view(torch.uint8).tolist())
        return data.ljust(size, b"\0")
    return (int(value) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")


class Launcher:
    """Stands for the launcher that Triton would build for one compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.metadata = metadata
        self.asm: dict[str, Any] | None = None  # set when the kernel is loaded
        self.programs: dict[Callable[[str], str] | None, Program] = {}
        self.signature = list(src.signature.values())
        fn = getattr(src, "fn", None)
        self.names = list(getattr(fn, "arg_names", [])) or list(map(str, src.signature))

    def ptx(self, options: Options) -> str:
        assert self.asm is not None
        text: str = self.asm["ptx"]
        return options.transform(text) if options.transform else text

    def program(self, options: Options) -> Program:
        if options.transform not in self.programs:
            if getattr(self.metadata, "num_ctas", 1) != 1:
                raise Unsupported("thread block clusters (num_ctas > 1)")
            self.programs[options.transform] = translate(self.ptx(options))
        return self.programs[options.transform]

    def capacity(self, options: Options) -> int:
        """Blocks that the GPU can run at the same time."""
        assert self.asm is not None
        threads = self.metadata.num_warps * 32
        registers = cubin_registers(self.asm["cubin"], self.metadata.name)["registers"]
        multiprocessors = options.sm_count or HARDWARE[options.arch].multiprocessors
        return multiprocessors * max(1, occupancy(options.arch, threads, registers, self.metadata.shared))

    def __call__(
        self, gx: int, gy: int, gz: int, stream: Any, function: Any, kernel_metadata: Any, launch_metadata: Any,
        enter_hook: Any, exit_hook: Any, *args: Any,
    ) -> None:  # fmt: skip
        options = installed()
        if _state.bench:
            options = replace(options, race=False)
        if enter_hook is not None:
            enter_hook(launch_metadata)
        if gx * gy * gz:
            self.launch((gx, gy, gz), args, options)
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def parameters(self, args: Sequence[Any], memory: Memory, total: int, program: Program) -> bytes:
        """The kernel's parameter block; every pointer argument becomes a region of ``memory``."""
        flat = flatten(self.signature, args, self.names, getattr(self.metadata, "tensordesc_meta", None))
        for name in ("global_scratch", "profile_scratch"):
            size = getattr(self.metadata, name + "_size", 0) or 0
            flat.append(("*", torch.zeros(size * total, dtype=torch.uint8) if size else None, name))
        if not 0 <= len(flat) - len(program.params) <= 2:
            raise Unsupported(f"{self.metadata.name}: {len(program.params)} kernel parameters for {len(flat)} arguments")
        out = bytearray(program.param_bytes)
        for (kind, value, name), (offset, size) in zip(flat, program.params, strict=False):
            if kind[0] == "*":
                if not isinstance(value, torch.Tensor):
                    value = getattr(value, "base", value)  # of a reinterpreted tensor
                address = memory.add(name, value) if isinstance(value, torch.Tensor) else int(value or 0)
                out[offset : offset + size] = address.to_bytes(8, "little")
            else:
                out[offset : offset + size] = pack(kind, value, size)
        return bytes(out)

    def launch(self, grid: tuple[int, int, int], args: Sequence[Any], options: Options) -> None:
        total = grid[0] * grid[1] * grid[2]
        meta = self.metadata
        program = self.program(options)
        memory = Memory(options.bounds)
        for tensor in _extra:
            memory.add_storage(tensor)
        params = self.parameters(args, memory, total, program)
        resident = options.resident
        if resident is None and program.may_spin:
            resident = self.capacity(options)
        if getattr(meta, "launch_cooperative_grid", False):
            held = resident or self.capacity(options)
            if total > held:
                raise RuntimeError(
                    f"{meta.name}: too many blocks ({total}) for a cooperative launch; the device holds {held}"
                )
        findings, counters, printed = execute.run(
            program,
            grid,
            meta.num_warps * 32,
            meta.shared,
            params,
            memory,
            race=options.race,
            seed=options.seed,
            interleave=options.interleave,
            resident=resident,
            timeout=options.timeout,
            max_instructions=options.max_instructions,
            livelock_steps=options.livelock_steps,
            max_findings=options.max_findings,
            optimise=options.optimise,
            first_block=options.first_block,
            blocks=options.blocks,
            zero_shared=options.zero_shared,
        )
        _state.cost += cost(counters)
        LOG.append(LaunchRecord(meta.name, grid, options.arch, findings, printed=printed, ptx=self.ptx(options), **counters))
        if printed:
            sys.stdout.write(printed)
        if findings and options.on_finding == "raise":
            raise KernelFault(meta.name, findings)
        if options.on_finding == "warn":
            for finding in findings:
                warnings.warn(f"{meta.name}: {finding}", stacklevel=2)


def cost(counters: dict[str, Any]) -> float:
    """A deterministic stand-in for a run time: executed warp instructions, memory accesses counted ten times."""
    accesses: int = counters["loads"] + counters["stores"] + counters["atomics"]
    return float(counters["instructions"] + 10 * accesses) / 32


class _Event:
    """Times in pseudo-cost, in place of ``torch.cuda.Event``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.at = 0.0

    def record(self, *args: Any) -> None:
        self.at = _state.cost

    def elapsed_time(self, other: _Event) -> float:
        return max(other.at - self.at, 1.0)

    def synchronize(self) -> None:
        pass

    wait = query = synchronize


class _Stream:
    """In place of ``torch.cuda.Stream``."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


class DeviceInterface:
    """What Triton asks of torch.cuda."""

    Event, Stream = _Event, _Stream

    @staticmethod
    def current_device() -> int:
        return installed().arch

    @staticmethod
    def synchronize(*args: Any) -> None:
        pass

    @staticmethod
    def set_device(device: Any) -> None:
        pass

    @staticmethod
    def stream(stream: Any) -> _Stream:
        return _Stream()

    @staticmethod
    def default_stream(*args: Any) -> _Stream:
        return _Stream()

    current_stream = default_stream

    @staticmethod
    def get_device_capability(*args: Any) -> tuple[int, int]:
        return divmod(installed().arch, 10)

    @staticmethod
    def is_available() -> bool:
        return True


def benchmark(
    fn: Callable[[], Any], quantiles: Sequence[float] | None = None, return_mode: str = "mean", **ignored: Any
) -> float | list[float]:
    """Replaces triton.testing.do_bench: runs fn once and returns its pseudo-cost."""
    before, outer = _state.cost, _state.bench
    _state.bench = True
    try:
        fn()
    finally:
        _state.bench = outer
    value = _state.cost - before
    if quantiles is not None:
        return [value] * len(quantiles)
    return [value] if return_mode == "all" else value


class Driver(DriverBase):  # type: ignore[misc]  # triton has no types
    """The active driver while ptxsim is installed."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        self.utils = Utils()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", installed().arch, 32)

    def get_current_device(self) -> int:
        # Triton caches compiled kernels per device: one pretended device per architecture.
        return installed().arch

    def set_current_device(self, device: int) -> None:
        pass

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(installed().arch, 10)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> type[DeviceInterface]:
        return DeviceInterface

    def get_benchmarker(self) -> Callable[..., float | list[float]]:
        return benchmark

    def get_empty_cache_for_benchmark(self) -> None:
        return None

    def clear_cache(self, cache: Any) -> None:
        pass

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def allocate_default_profile_scratch(self, size: int, alignment: int, stream: Any) -> None:
        return None


class Installed:
    """Result of install(); leaving it as a context manager uninstalls."""

    def __init__(self, options: Options | None, active: Any, originals: list[tuple[Any, str, Any]]) -> None:
        self.options, self.active, self.originals = options, active, originals

    @property
    def log(self) -> list[LaunchRecord]:
        return LOG

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *exc: object) -> None:
        self.uninstall()

    def uninstall(self) -> None:
        _state.options = self.options
        driver_config._active = self.active
        for owner, name, value in self.originals:
            setattr(owner, name, value)
        self.originals = []


def install(**options: Any) -> Installed:
    """Make ``kernel[grid](*cpu_tensors)`` run the compiled kernel on the CPU. See :class:`Options`.

    Raises:
        RuntimeError: if ``TRITON_INTERPRET`` is set: kernels would not be compiled at all.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set, so that kernels are not compiled at all; unset it before triton is imported"
        )
    chosen = Options(**options)
    patched = [(CompiledKernel, "_init_handles"), (triton.testing, "do_bench"), (triton.testing, "do_bench_cudagraph")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in patched]
    result = Installed(_state.options, driver_config._active, originals)
    if _state.options is None:
        load = CompiledKernel._init_handles

        def init_handles(self: Any) -> None:
            load(self)
            if isinstance(self._run, Launcher) and self._run.asm is None:
                self._run.asm = dict(self.asm)
                self._module_pid = -1  # nothing to unload when this object dies

        CompiledKernel._init_handles = init_handles
        triton.testing.do_bench = triton.testing.do_bench_cudagraph = benchmark
    _state.options = chosen
    driver_config.set_active(Driver())
    LOG.clear()
    return result


def set_options(**changes: Any) -> None:
    """Change options while installed (seed, race, ...)."""
    _state.options = replace(installed(), **changes)


def current_options() -> Options | None:
    """The options in force, None where ptxsim is not installed."""
    return _state.options
