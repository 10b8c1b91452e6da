"""What every compiled kernel needs: registers, spills, shared memory, occupancy, and the instructions of its time loop.

``python -m programs.budgets TARGET...`` compiles every specimen of ``compile_targets.py`` for each target and prints one
line of JSON a kernel. ``python -m programs.budgets --write`` measures the targets of ``budgets.json``, prints what changed,
and rewrites the file. Both need ``tests`` in ``PYTHONPATH``, and a process with ``TRITON_INTERPRET`` unset; the figures
depend on nothing but the sources and Triton's version.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.compiler import CompiledKernel

from coba_triton.tools.compiler import TARGETS, compile_launch, figures, occupancy
from helpers import fast_compiler
from programs.compile_targets import launches, specimens
from ptxsim.cubin import disassemble

BUDGETS = Path(__file__).resolve().parents[1] / "budgets.json"
BUDGETED = ("sm_80", "sm_90", "gfx942")
NVIDIA = {"sm_80": "SM80", "sm_90": "SM90a", "sm_100": "SM100a"}  # as nvdisasm calls them
# Instruction classes by the start of the opcode; a class that starts with "global" has its bytes counted.
NVIDIA_CLASSES = {
    "global load": r"LDG",
    "global store": r"STG",
    "atomic": r"ATOM|RED\b",
    "shared memory": r"LDS|STS|LDSM|STSM|ATOMS",
    "spill": r"LDL|STL",
    "barrier": r"BAR|MEMBAR|ERRBAR|WARPSYNC",
    "shuffle": r"SHFL|VOTE|MATCH|REDUX",
    "call": r"CALL",
    "branch": r"BRA|BSYNC|BSSY|EXIT|RET",
    "float": r"F(FMA|ADD|MUL|MNMX|SETP|SEL|SET|CHK)|D(ADD|MUL|FMA|SETP|MNMX)|H(ADD|MUL|FMA)2|MUFU|F2F|I2F|F2I|F2FP",
}
AMD_CLASSES = {
    "global load": r"(global|buffer|flat)_load",
    "global store": r"(global|buffer|flat)_store",
    "atomic": r"(global|buffer|flat)_atomic",
    "shuffle": r"ds_(b?permute|swizzle)|v_readlane|v_readfirstlane|v_writelane|v_mov_b32_dpp",
    "shared memory": r"ds_",
    "spill": r"scratch_",
    "barrier": r"s_barrier|buffer_(inv|wb)",
    "call": r"s_swappc|s_call",
    "branch": r"s_(branch|cbranch|endpgm)",
    "wait": r"s_waitcnt|s_nop",
    "float": r"v_\w*f(16|32|64)",
}
NVIDIA_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
AMD_BYTES = (
    dict.fromkeys(["dwordx4", "b128"], 16)
    | dict.fromkeys(["dwordx3", "b96"], 12)
    | dict.fromkeys(["dwordx2", "b64"], 8)
    | dict.fromkeys(["dword", "b32"], 4)
    | dict.fromkeys(["ushort", "sshort", "short", "u16", "i16", "b16"], 2)
    | dict.fromkeys(["ubyte", "sbyte", "byte", "u8", "i8", "b8"], 1)
)
INSTRUCTION = {
    "NVIDIA": re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;"),
    "AMD": re.compile(r"^\t([a-z]\w*[^;]*)"),
}
# A higher figure is worse, except for these.
HIGHER_IS_BETTER = ("occupancy",)
# Parts of a sum that is held to: instructions move between them.
INFORMATIVE = {"instructions", *(f"{kind} in the loop" for kind in ("instructions", "float", "branch", "wait", "other"))}


def instructions(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions of a listing and its loops, first and last index, from backward branches."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        label = re.match(r"^(\.L\w+):", line)
        if label:
            labels[label[1]] = len(code)
            continue
        found = next((match for pattern in INSTRUCTION.values() if (match := pattern.match(line))), None)
        if found and not found[1].startswith(("NOP", "s_nop")):
            code.append(found[1])
    loops = set()
    for i, text in enumerate(code):
        target = re.match(r"(?:BRA|s_c?branch)\S*\s.*?(\.L\w+)", text)
        if target and labels.get(target[1], i + 1) <= i:
            loops.add((labels[target[1]], i))
    return code, sorted(loops, key=lambda loop: loop[0] - loop[1])


def access_bytes(opcode: str) -> int:
    """Bytes that a global load or store moves for one thread; 4 where NVIDIA's opcode names no width."""
    if opcode[0].isupper():
        return next((NVIDIA_BYTES[part] for part in opcode.split(".") if part in NVIDIA_BYTES), 4)
    return next(AMD_BYTES[part] for part in opcode.split("_") if part in AMD_BYTES)


def mix(code: list[str]) -> dict[str, int]:
    """Instructions by class, and the bytes of global loads and stores of one thread."""
    counts: collections.Counter[str] = collections.Counter()
    for text in code:
        opcode = text.split()[0]
        classes = NVIDIA_CLASSES if opcode[0].isupper() else AMD_CLASSES
        kind = next((kind for kind, pattern in classes.items() if re.match(pattern, opcode)), "other")
        counts[kind] += 1
        if kind.startswith("global"):
            counts["bytes"] += access_bytes(opcode)
    return dict(counts)


def loop_figures(listing: str, steps: int) -> dict[str, Any]:
    """The largest loop: its instructions, each nested one once, and those and the bytes per neuron and step."""
    code, loops = instructions(listing)
    if not loops:
        return {}
    first, last = loops[0]
    counts = mix(code[first : last + 1])
    moved = counts.pop("bytes", 0)
    total = last + 1 - first
    return {
        "instructions_per_neuron_step": round(total / steps, 2),
        "bytes_per_neuron_step": round(moved / steps, 2),
        "loop": {"instructions": total, **dict(sorted(counts.items()))},
    }


def measure(target: str) -> Iterator[dict[str, Any]]:
    """The figures of every kernel of every specimen of the target."""
    fast_compiler.install()
    launched = []
    distinct: dict[str, tuple[CompiledKernel, int]] = {}  # many specimens launch the same kernels
    for specimen in specimens(target):
        for kernel, (source, options) in launches(specimen, target).items():
            compiled = compile_launch((source, options), target)
            launched.append((specimen, kernel, compiled.hash))
            constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
            # what one thread does in an iteration of the time loop: STEPS steps of its share of the program's neurons
            threads = compiled.metadata.num_warps * TARGETS[target].warp_size
            neurons = max(1, constants.get("BLOCK", threads) // threads)
            distinct[compiled.hash] = compiled, constants.get("STEPS", 1) * neurons
    kernels = [compiled for compiled, _ in distinct.values()]
    if target in NVIDIA:
        listings = disassemble([compiled.asm["cubin"] for compiled in kernels], NVIDIA[target])
    else:
        listings = [compiled.asm["amdgcn"] for compiled in kernels]
    known = {}
    for (key, (compiled, steps)), listing in zip(distinct.items(), listings, strict=True):
        used = figures(compiled, listing)
        used["occupancy"] = round(occupancy(target, used["registers"], compiled.metadata.num_warps, used["shared"]), 3)
        known[key] = used | loop_figures(listing, steps)
        if target in NVIDIA:
            known[key]["ptx"] = hashlib.sha256("\n".join(ptx_code(compiled.asm["ptx"])).encode()).hexdigest()
    for specimen, kernel, key in launched:
        yield {"specimen": specimen, "kernel": kernel, **known[key]}


def ptx_code(ptx: str) -> list[str]:
    """The lines of PTX that are executed, without those that name the GPU, PTX's version or a place in the sources."""
    lines, _, _ = ptx.partition("\n\t.section")
    return [line for line in lines.splitlines() if not re.match(r"\s*(//|\.(version|target|loc|file)\b)", line)]


def measure_all(targets: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """The figures for several targets, measured in processes of their own."""

    def run(target: str) -> list[dict[str, Any]]:
        environment = os.environ | {"TRITON_INTERPRET": "0"}
        command = [sys.executable, "-m", "programs.budgets", target]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"compiling for {target} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(targets, pool.map(run, targets), strict=True))


Budgets = dict[str, dict[str, Any]]  # "target, specimen, kernel" to figures


def keyed(rows: dict[str, list[dict[str, Any]]]) -> Budgets:
    out = {}
    for target, kernels in rows.items():
        for row in kernels:
            figures_only = {name: value for name, value in row.items() if name not in ("specimen", "kernel", "ptx")}
            out[f"{target}, {row['specimen']}, {row['kernel']}"] = figures_only
    return out


def flat(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "loop"} | {
        f"{kind} in the loop": count for kind, count in row.get("loop", {}).items()
    }


def differences(committed: Budgets, measured: Budgets) -> tuple[list[str], list[str]]:
    """What got worse and what else changed, a line each."""
    worse, other = [], []
    for key in committed.keys() | measured.keys():
        if key not in committed or key not in measured:
            worse.append(f"{key}: {'no budget' if key in measured else 'compiled no more'}")
            continue
        before, after = flat(committed[key]), flat(measured[key])
        for name in before.keys() | after.keys():
            old, new = before.get(name, 0), after.get(name, 0)
            if old != new:
                increased = new > old
                bad = increased != (name in HIGHER_IS_BETTER) and name not in INFORMATIVE
                (worse if bad else other).append(f"{key}: {name} {old} -> {new}")
    return sorted(worse), sorted(other)


def read() -> tuple[str, Budgets]:
    """The version of Triton that the budgets hold for, and the budgets."""
    document = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {"triton": None, "budgets": {}}
    return document["triton"], document["budgets"]


def write() -> None:
    measured = keyed(measure_all(BUDGETED))
    worse, other = differences(read()[1], measured)
    for title, lines in (("worse or new", worse), ("changed", other)):
        for line in lines:
            print(f"{title}: {line}")
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in measured.items())
    BUDGETS.write_text(f'{{\n"triton": {json.dumps(triton.__version__)},\n"budgets": {{\n{rows}\n}}\n}}\n')
    print(f"{BUDGETS.name}: {len(measured)} kernels, {len(worse)} figures worse or new, {len(other)} otherwise changed")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    else:
        for name in sys.argv[1:]:
            for row in measure(name):
                print(json.dumps(row), flush=True)
