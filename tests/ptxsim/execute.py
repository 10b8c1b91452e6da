"""Run a translated kernel: address regions, launch description, findings."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import build
from .translate import Program

_lock = threading.Lock()
U32, U64 = ctypes.c_uint32, ctypes.c_uint64


class LaunchDesc(ctypes.Structure):
    """Mirrors struct LaunchDesc in runtime.cpp."""

    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("params", ctypes.c_char_p),
        ("module_data", ctypes.c_void_p),
        ("module_size", U64),
        ("grid", U32 * 3),
        ("ntid", U32),
        ("shared_bytes", U32),
        ("shared_cell_shift", U32),
        ("nregions", U32),
        ("nstorages", U32),
        ("region_lo", ctypes.POINTER(U64)),
        ("region_hi", ctypes.POINTER(U64)),
        ("region_host", ctypes.POINTER(U64)),
        ("region_storage", ctypes.POINTER(U64)),
        ("region_size", ctypes.POINTER(U64)),
        ("storage_host", ctypes.POINTER(U64)),
        ("storage_size", ctypes.POINTER(U64)),
        ("storage_shift", ctypes.POINTER(U64)),
        ("seed", U32),
        ("resident", U32),
        ("max_findings", U32),
        ("flags", U32),
        ("cta_first", U32 * 3),
        ("cta_count", U32 * 3),
        ("timeout", ctypes.c_double),
        ("max_instructions", U64),
        ("livelock_steps", U64),
        ("loads", U64),
        ("stores", U64),
        ("atomics", U64),
        ("syncs", U64),
        ("switches", U64),
        ("instructions", U64),
        ("seconds", ctypes.c_double),
    ]


@dataclass
class Finding:
    """Something wrong that a launch did."""

    kind: str
    argument: str  # kernel parameter that the address came from, if any
    offset: int  # byte offset from the start of that argument
    file: str
    line: int
    block: tuple[int, int, int]
    thread: int
    count: int
    detail: str

    def __str__(self) -> str:
        where = f" {self.argument}+{self.offset}" if self.argument else ""
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.kind}{where} at {self.file}:{self.line} block {self.block} thread {self.thread}{times}" + (
            f": {self.detail}" if self.detail else ""
        )


class KernelFault(RuntimeError):
    """A launch had findings; they are in .findings."""

    def __init__(self, kernel: str, findings: list[Finding]) -> None:
        self.kernel, self.findings = kernel, findings
        super().__init__(f"{kernel}: " + "; ".join(map(str, findings)))


class Memory:
    """The address space of one launch: one region per pointer argument."""

    def __init__(self, bounds: str = "view") -> None:
        self.bounds = bounds
        self.regions: list[tuple[str, int, int]] = []  # name, host lo, host hi
        self.extents: list[tuple[int, int, int]] = []  # storage lo, hi, element size
        self.keep: list[Any] = []

    def add_storage(self, tensor: torch.Tensor) -> tuple[int, int]:
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu":
            raise TypeError(f"ptxsim runs kernels on CPU tensors, not on {tensor.device}")
        lo, n = storage.data_ptr(), storage.nbytes()
        self.keep.append(storage)
        if n:
            self.extents.append((lo, lo + n, tensor.element_size()))
        return lo, n

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Register a pointer argument; returns the address that the kernel gets."""
        slo, n = self.add_storage(tensor)
        lo = tensor.data_ptr()
        span = 0
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            span = (last + 1) * tensor.element_size()
        first, end = (lo, lo + span) if self.bounds == "view" else (slo, slo + n)
        self.regions.append((name, first, end))
        return self.virtual(len(self.regions) - 1) + (lo - first)

    def virtual(self, index: int) -> int:
        return ((index + 1) << 48) + (1 << 47) + (self.regions[index][1] & 0xFFF)

    def storages(self) -> list[list[int]]:
        merged: list[list[int]] = []
        for lo, hi, size in sorted(self.extents):
            if merged and lo < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], hi)
                merged[-1][2] = min(merged[-1][2], size)
            else:
                merged.append([lo, hi, size])
        return merged or [[0, 0, 4]]


def array(values: Sequence[int]) -> ctypes.Array[ctypes.c_uint64]:
    return (U64 * max(len(values), 1))(*values)


def run(
    program: Program,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    params: bytes,
    memory: Memory,
    *,
    race: bool,
    seed: int,
    interleave: bool,
    resident: int | None,
    timeout: float,
    max_instructions: int | None,
    livelock_steps: int,
    max_findings: int,
    optimise: str,
    first_block: tuple[int, int, int],
    blocks: tuple[int, int, int] | None,
    zero_shared: bool,
) -> tuple[list[Finding], dict[str, Any], str]:
    """Run one launch. Returns the findings, the counters and what was printed."""
    lib = build.load(program.source, optimise)
    engine = build.engine()
    d = LaunchDesc()
    if engine.ptxsim_desc_size() != ctypes.sizeof(d):
        raise RuntimeError("ptxsim: launch description does not match the engine")
    d.kernel = ctypes.cast(lib.ptxsim_kernel, ctypes.c_void_p)
    d.module_data = ctypes.addressof(ctypes.c_uint8.in_dll(lib, "ptxsim_module_data"))
    d.module_size = U64.in_dll(lib, "ptxsim_module_size").value
    d.params = params + b"\0" * 16
    d.grid = (U32 * 3)(*grid)
    d.ntid = threads
    d.shared_bytes = max(shared_bytes, program.static_shared, 16)
    d.shared_cell_shift = int(math.log2(max(1, min(4, program.shared_cell))))
    storages = memory.storages()
    index = []
    for _, lo, hi in memory.regions:
        index.append(next((i for i, s in enumerate(storages) if s[0] <= lo and hi <= s[1]), 0))
    virtual = [memory.virtual(i) for i in range(len(memory.regions))]
    tables = {
        "region_lo": array(virtual),
        "region_hi": array([v + hi - lo for v, (_, lo, hi) in zip(virtual, memory.regions, strict=True)]),
        "region_host": array([lo for _, lo, _ in memory.regions]),
        "region_storage": array(index),
        "storage_host": array([s[0] for s in storages]),
        "storage_size": array([s[1] - s[0] for s in storages]),
        "storage_shift": array([int(math.log2(min(4, s[2]))) for s in storages]),
    }
    for name, table in tables.items():
        setattr(d, name, ctypes.cast(table, ctypes.POINTER(U64)))
    d.nregions, d.nstorages = len(memory.regions), len(storages)
    d.seed = seed
    total = grid[0] * grid[1] * grid[2]
    if resident is None:
        resident = total if program.may_spin else 4 if race else 1
    d.resident = max(1, min(resident, total))
    d.max_findings = max_findings
    slow = program.may_spin  # stores have to be seen to tell a livelock
    d.flags = (
        bool(race)
        | bool(interleave) << 1
        | bool(program.needs_fibres) << 2
        | bool(seed) << 3
        | bool(zero_shared) << 4
        | bool(slow) << 5
    )
    d.cta_first = (U32 * 3)(*first_block)
    d.cta_count = (U32 * 3)(*(blocks or grid))
    d.timeout = timeout
    d.max_instructions = max_instructions or (1 << 63)
    d.livelock_steps = livelock_steps if program.may_spin else (1 << 63)
    with _lock:
        engine.ptxsim_run(ctypes.byref(d))
        text = engine.ptxsim_findings().decode(errors="replace")
        printed = engine.ptxsim_printed().decode(errors="replace")
    counters = {k: getattr(d, k) for k in ("instructions", "loads", "stores", "atomics", "syncs", "switches", "seconds")}
    findings = []
    for row in text.splitlines():
        kind, line, x, y, z, tid, arg, offset, count, detail = row.split("\t", 9)
        line, arg = int(line), int(arg)
        name = memory.regions[arg][0] if 0 <= arg < len(memory.regions) else ""
        if program.files:
            file, line = program.files.get(line >> 24, "?"), line & 0xFFFFFF
        else:
            file = "instruction"
        findings.append(Finding(kind, name, int(offset), file, line, (int(x), int(y), int(z)), int(tid), int(count), detail))
    return findings, counters, printed
