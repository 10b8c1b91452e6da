"""Look into cubins: registers, sections, disassembly with the tools of the installed triton package."""

from __future__ import annotations

import bisect
import functools
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton


@functools.cache
def tool(name: str) -> str:
    """nvdisasm or cuobjdump from the installed triton package."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"triton {triton.__version__} has no {name}")
    return str(path)


def disassemble(cubins: Sequence[bytes], architecture: str) -> list[str]:
    """The machine code of each, with labels where branches lead.

    Args:
        cubins: all for the same GPU. One process reads the code of all of them: its start takes most of its time.
        architecture: the GPU, as nvdisasm calls it, such as ``SM90a``.
    """
    codes = [b"".join(data for name, (_, data) in elf_sections(c).items() if name.startswith(".text.")) for c in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as f:
        f.write(b"".join(codes))
        f.flush()
        done = subprocess.run([tool("nvdisasm"), "-b", architecture, f.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("nvdisasm: " + done.stderr.strip())
    branch = re.compile(r"(\bBRA\S*\s[^;]*?)0x([0-9a-f]+)(?=\s*;)")
    targets = {int(found[2], 16) for found in branch.finditer(done.stdout)}
    ends = list(itertools.accumulate(map(len, codes)))
    listings: list[list[str]] = [[] for _ in codes]
    for line in done.stdout.splitlines():
        if found := re.match(r"\s+/\*([0-9a-f]{4,})\*/", line):
            address = int(found[1], 16)
            listing = listings[bisect.bisect_right(ends, address)]
            if address in targets:
                listing.append(f".L_{address:x}:")
            listing.append(branch.sub(r"\1`(.L_\2)", line))
    return ["\n".join(listing) for listing in listings]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack, static shared and local memory, from cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run([tool("cuobjdump"), "-res-usage", f.name], capture_output=True, text=True).stdout
    m = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if not m:
        raise RuntimeError("cuobjdump gave no resource usage")
    return dict(zip(("registers", "stack", "static_shared", "local"), map(int, m.groups()), strict=True))


def elf_sections(binary: bytes) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Section name -> (header fields, contents) of a 64-bit ELF file."""
    (offset,) = struct.unpack_from("<Q", binary, 0x28)
    size, count, names = struct.unpack_from("<HHH", binary, 0x3A)
    heads = [struct.unpack_from("<IIQQQQIIQQ", binary, offset + i * size) for i in range(count)]
    strings = heads[names][4]

    def name(at: int) -> str:
        end = binary.index(b"\0", strings + at)
        return binary[strings + at : end].decode()

    return {name(h[0]): (h, binary[h[4] : h[4] + h[5]] if h[1] != 8 else b"") for h in heads}


def cubin_registers(binary: bytes, kernel: str) -> dict[str, int]:
    """Registers and stack of a kernel straight from the cubin (fast)."""
    out = {"registers": 0, "stack": 0}
    try:
        sections = elf_sections(binary)
    except (struct.error, ValueError, IndexError):
        return out
    for name, (head, data) in sections.items():
        if name == ".text." + kernel:
            out["registers"] = head[7] >> 24  # sh_info
        if name == ".nv.info":
            at = 0
            while at + 4 <= len(data):
                fmt, attribute, size = struct.unpack_from("<BBH", data, at)
                at += 4
                if fmt == 4:
                    if attribute == 0x2F and size >= 8:  # register count
                        out["registers"] = out["registers"] or struct.unpack_from("<I", data, at + 4)[0]
                    if attribute == 0x11 and size >= 8:  # frame size
                        out["stack"] = max(out["stack"], struct.unpack_from("<I", data, at + 4)[0])
                    at += size
    return out
