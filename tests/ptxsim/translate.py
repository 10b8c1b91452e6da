"""Translate the PTX that Triton emits into C++ for the run-time in runtime.h."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

C_TYPE = {
    "s8": "s8",
    "s16": "s16",
    "s32": "s32",
    "s64": "s64",
    "u8": "u8",
    "u16": "u16",
    "u32": "u32",
    "u64": "u64",
    "b8": "u8",
    "b16": "u16",
    "b32": "u32",
    "b64": "u64",
    "f16": "u16",
    "bf16": "u16",
    "f32": "u32",
    "f64": "u64",
    "f16x2": "u32",
    "bf16x2": "u32",
    "f32x2": "u64",
    "pred": "bool",
}
WIDTH = {"f16x2": 32, "bf16x2": 32, "f32x2": 64, "f16": 16, "bf16": 16, "tf32": 32}
TYPE_NAME = re.compile(r"[bsu](8|16|32|64)|f(16|32|64)|bf16|f16x2|bf16x2|f32x2|tf32|e4m3x2|e5m2x2|pred")
POISON = {"bool": "false", "u16": "0x7fffu", "u32": "0x7fc0deadu", "u64": "0x7ff8deaddeaddeadull"}
ROUNDING = {"rn": 0, "rz": 1, "rm": 2, "rp": 3}
INT_RANGE = {
    "s8": ("-128.0", "127.0"),
    "u8": ("0.0", "255.0"),
    "s16": ("-32768.0", "32767.0"),
    "u16": ("0.0", "65535.0"),
    "s32": ("-2147483648.0", "2147483647.0"),
    "u32": ("0.0", "4294967295.0"),
    "s64": ("-9223372036854775808.0", "9223372036854775808.0"),
    "u64": ("0.0", "18446744073709551616.0"),
}
SPECIAL = {
    "%tid.x": "t->tid",
    "%tid.y": "0u",
    "%tid.z": "0u",
    "%ntid.x": "launch.ntid",
    "%ntid.y": "1u",
    "%ntid.z": "1u",
    "%ctaid.x": "t->ctaid[0]",
    "%ctaid.y": "t->ctaid[1]",
    "%ctaid.z": "t->ctaid[2]",
    "%nctaid.x": "launch.nctaid[0]",
    "%nctaid.y": "launch.nctaid[1]",
    "%nctaid.z": "launch.nctaid[2]",
    "%laneid": "t->lane",
    "%warpid": "(t->tid / 32)",
    "%nwarpid": "((launch.ntid + 31) / 32)",
    "%clock": "(u32)t->icount",
    "%clock64": "t->icount",
    "%globaltimer": "t->icount",
    "%globaltimer_lo": "(u32)t->icount",
    "%lanemask_eq": "(1u << t->lane)",
    "%lanemask_lt": "((1u << t->lane) - 1)",
    "%lanemask_le": "(0xffffffffu >> (31 - t->lane))",
    "%lanemask_ge": "(~((1u << t->lane) - 1))",
    "%lanemask_gt": "(~(0xffffffffu >> (31 - t->lane)))",
    "%cluster_ctarank": "0u",
    "%cluster_nctarank": "1u",
    "%cluster_ctaid.x": "0u",
    "%cluster_nctaid.x": "1u",
    "%smid": "(t->ctaid[0] % 108u)",
    "%nsmid": "108u",
    "%dynamic_smem_size": "t->shared_size",
}
COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
BITWISE = {"and": "&", "or": "|", "xor": "^"}
MMA_KIND = {
    "m16n8k8.row.col.f32.tf32.tf32.f32": 0,
    "m16n8k16.row.col.f32.f16.f16.f32": 1,
    "m16n8k16.row.col.f32.bf16.bf16.f32": 2,
    "m16n8k32.row.col.s32.s8.s8.s32": 3,
    "m16n8k32.row.col.s32.u8.u8.s32": 4,
    "m16n8k16.row.col.f16.f16.f16.f16": 5,
    "m16n8k32.row.col.f32.e4m3.e4m3.f32": 6,
    "m16n8k32.row.col.f32.e5m2.e5m2.f32": 7,
    "m8n8k4.row.col.f64.f64.f64.f64": 8,
    "m16n8k4.row.col.f64.f64.f64.f64": 20,
    "m16n8k8.row.col.f64.f64.f64.f64": 21,
    "m16n8k16.row.col.f64.f64.f64.f64": 22,
    "m16n8k4.row.col.f32.tf32.tf32.f32": 100,
    "m16n8k8.row.col.f32.f16.f16.f32": 101,
    "m16n8k8.row.col.f32.bf16.bf16.f32": 102,
    "m16n8k16.row.col.s32.s8.s8.s32": 103,
}
WGMMA_KIND = {"tf32.tf32": 0, "f16.f16": 1, "bf16.bf16": 2, "s8.s8": 3, "u8.u8": 4, "e4m3.e4m3": 6, "e5m2.e5m2": 7}


_ROUND, _SCOPE = "rn rz rm rp", "cta gpu sys"
_TESTS = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan"
_SPACE = "param shared shared::cta global local const"
_MEMORY = f"weak volatile relaxed acquire release {_SCOPE} {_SPACE} nc v2 v4 v8 ca cg cs lu cv wb wt"
_ATOMIC = (
    f"relaxed acquire release acq_rel {_SCOPE} global shared shared::cta "
    "add min max exch cas and or xor inc dec noftz v2 v4 v8"
)
_MATH = f"approx ftz {_ROUND}"
# Modifiers (other than types) that are understood; any other one makes an instruction unsupported.
MODIFIERS = {
    k: set(v.split())
    for k, v in {
        "ld": _MEMORY,
        "ldu": _MEMORY,
        "st": _MEMORY,
        "atom": _ATOMIC,
        "red": _ATOMIC,
        "cp": "async ca cg shared shared::cta global commit_group wait_group wait_all",
        "ldmatrix": "sync aligned m8n8 x1 x2 x4 trans shared shared::cta",
        "stmatrix": "sync aligned m8n8 x1 x2 x4 trans shared shared::cta",
        "mov": "",
        "cvta": f"to {_SPACE}",
        "selp": "",
        "prmt": "",
        "add": f"cc ftz sat {_ROUND}",
        "addc": "cc",
        "sub": f"cc ftz sat {_ROUND}",
        "subc": "cc",
        "mul": f"lo hi wide ftz sat {_ROUND}",
        "mad": f"lo hi wide cc ftz sat {_ROUND}",
        "madc": "lo hi cc",
        "fma": f"ftz sat relu {_ROUND}",
        "div": f"full {_MATH}",
        "rem": "",
        "sqrt": _MATH,
        "rcp": _MATH,
        "rsqrt": _MATH,
        "ex2": _MATH,
        "lg2": _MATH,
        "sin": _MATH,
        "cos": _MATH,
        "tanh": _MATH,
        "min": "ftz NaN",
        "max": "ftz NaN",
        "neg": "ftz",
        "abs": "ftz",
        "copysign": "",
        "testp": "finite infinite number notanumber normal",
        "and": "",
        "or": "",
        "xor": "",
        "not": "",
        "cnot": "",
        "shl": "",
        "shr": "",
        "shf": "l r wrap clamp",
        "bfe": "",
        "bfi": "",
        "popc": "",
        "clz": "",
        "bfind": "shiftamt",
        "brev": "",
        "lop3": "",
        "dp4a": "",
        "setp": f"ftz and or xor {_TESTS}",
        "set": _TESTS,
        "cvt": f"ftz sat satfinite relu rni rzi rmi rpi rna {_ROUND}",
        "bra": "uni",
        "ret": "uni",
        "exit": "",
        "trap": "",
        "brkpt": "",
        "bar": "sync arrive warp cta aligned",
        "barrier": "sync arrive cta aligned",
        "shfl": "sync bfly up down idx",
        "vote": "sync ballot any all uni",
        "match": "sync any all",
        "redux": "sync add min max and or xor NaN",
        "elect": "sync",
        "activemask": "",
        "call": "uni",
        "nanosleep": "",
        "fence": f"proxy async shared::cta async::generic sc acq_rel {_SCOPE} cluster mbarrier_init release",
        "membar": "cta gl sys",
    }.items()
}


def matched(pattern: str, text: str, flags: int = 0) -> re.Match[str]:
    """``re.match``, or an exception that names the text."""
    found = re.match(pattern, text, flags)
    if not found:
        raise Unsupported(f"cannot parse PTX near {text[:80].strip()!r}")
    return found


class Unsupported(NotImplementedError):
    """An instruction or operand that the translator does not know."""


@dataclass
class Program:
    """A translated kernel."""

    name: str
    source: str
    params: list[tuple[int, int]]  # (offset, width) of each kernel parameter
    param_bytes: int
    static_shared: int
    shared_cell: int  # smallest shared memory access, in bytes
    needs_fibres: bool  # has barriers, collectives or atomics
    may_spin: bool  # has atomics or strong loads: blocks may wait for each other
    files: dict[int, str] = field(default_factory=dict)
    instructions: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)


def width(type_name: str) -> int:
    return WIDTH.get(type_name) or int(type_name.lstrip("bfsu"))


def is_float(type_name: str) -> bool:
    return type_name[0] == "f" or type_name.startswith("bf")


def split_operands(text: str) -> list[str]:
    out, depth, current = [], 0, ""
    for ch in text:
        depth += ch in "{[("
        depth -= ch in "}])"
        if ch == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += ch
    if current.strip():
        out.append(current.strip())
    return out


def vector(operand: str) -> list[str]:
    operand = operand.strip()
    if operand.startswith("{"):
        return [x.strip() for x in operand[1:-1].split(",")]
    return [operand]


def matching_brace(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return i
    raise ValueError("unbalanced braces")


def statements(body: str) -> list[tuple[str, str]]:
    """Split a function body into (kind, text): loc, label, open, close, code."""
    body = re.sub(r"/\*.*?\*/", " ", re.sub(r"//[^\n]*", "", body), flags=re.S)
    token = re.compile(r"\s*(?:(\.loc\b[^\n]*)|([{}])|([\w$%.]+)\s*:(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)", re.S)
    pos, out = 0, []
    while pos < len(body):
        if not body[pos:].strip():
            break
        m = token.match(body, pos)
        if not m:
            raise Unsupported(f"cannot parse PTX near {body[pos : pos + 80].strip()!r}")
        pos = m.end()
        if m[1]:
            out.append(("loc", m[1]))
        elif m[2]:
            out.append(("open" if m[2] == "{" else "close", ""))
        elif m[3]:
            out.append(("label", m[3]))
        elif m[4].strip():
            out.append(("code", " ".join(m[4].split())))
    return out


class Function:
    """Translates one .entry or .func body."""

    def __init__(self, module: Module, name: str, params: dict[str, str], body: str) -> None:
        self.module = module
        self.name = name
        self.params = params  # parameter name -> C++ expression of its address
        self.body = body
        self.declarations: list[str] = []
        self.scopes: list[dict[str, str]] = [{}]
        self.labels: list[dict[str, str]] = [{}]
        self.line = 0
        self.site = 0
        self.unique = 0
        self.local_size = 0
        self.local_symbols: dict[str, int] = {}
        self.cas_lines: set[int] = set()

    # -- names and operands ------------------------------------------------------

    def lookup(self, name: str) -> str | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def raw(self, operand: str, bits: int = 32) -> str:
        """An operand as an unsigned C++ expression of at least `bits` bits."""
        o = operand.strip()
        if o.startswith("!"):
            return f"(!{self.raw(o[1:], bits)})"
        found = self.lookup(o)
        if found:
            return found
        if o in SPECIAL:
            return SPECIAL[o]
        m = re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", o)
        if m:
            return f"0x{m[1]}u"
        m = re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", o)
        if m:
            return f"0x{m[1]}ull"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", o):
            value = int(o.rstrip("U"), 0 if not re.fullmatch(r"-?0\d+U?", o) else 8)
            return f"0x{value & ((1 << 64) - 1):x}ull" if bits == 64 else f"0x{value & 0xFFFFFFFF:x}u"
        if re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?", o):
            code = (
                struct.unpack("<Q", struct.pack("<d", float(o)))[0]
                if bits == 64
                else struct.unpack("<I", struct.pack("<f", float(o)))[0]
            )
            return f"0x{code:x}{'ull' if bits == 64 else 'u'}"
        if o in self.local_symbols:
            return f"{self.local_symbols[o]}u"
        if o in self.module.shared_symbols:
            return f"{self.module.shared_symbols[o]}u"
        if o in self.module.global_symbols:
            return f"((MODULE_ID << 48) + {self.module.global_symbols[o]}ull)"
        self.unsupported(f"operand {o}")

    def unsupported(self, what: str) -> NoReturn:
        where = self.module.files.get(self.line >> 24, "?")
        raise Unsupported(f"{what} ({where}:{self.line & 0xFFFFFF})")

    def get(self, type_name: str, operand: str) -> str:
        """An operand as a C++ value of the given PTX type."""
        code = self.raw(operand, width(type_name) if type_name != "pred" else 32)
        if type_name == "pred":
            return f"(({code}) != 0)" if code.startswith("0x") else code
        if type_name == "f32":
            return f"F({code})"
        if type_name == "f64":
            return f"FD({code})"
        if type_name == "f16":
            return f"h2f((u16)({code}))"
        if type_name == "bf16":
            return f"bf2f((u16)({code}))"
        return f"({C_TYPE[type_name]})({code})"

    def put(self, type_name: str, operand: str, expression: str) -> str:
        """Assign a C++ value of the given PTX type."""
        if operand.strip() == "_":
            return f"(void)({expression});"
        d = self.raw(operand)
        if type_name == "f32":
            return f"{d} = nan32(U((float)({expression})));"
        if type_name == "f64":
            return f"{d} = UD((double)({expression}));"
        if type_name == "f16":
            return f"{d} = f2h((float)({expression}));"
        if type_name == "bf16":
            return f"{d} = f2bf((float)({expression}));"
        if type_name == "pred":
            return f"{d} = ({expression});"
        return f"{d} = ({C_TYPE[type_name]})({expression});"

    def assign(self, operand: str, expression: str) -> str:
        return f"(void)({expression});" if operand.strip() == "_" else f"{self.raw(operand)} = {expression};"

    def address(self, operand: str, bits: int = 64) -> str:
        m = matched(r"\[\s*(.*?)\s*\]$", operand.strip())
        sum_of = re.fullmatch(r"(\S+?)\s*\+\s*(-?\w+)", m[1])
        base, offset = (sum_of[1], int(sum_of[2], 0)) if sum_of else (m[1], 0)
        if bits == 32:
            return f"(u32)({self.raw(base)} + {offset & 0xFFFFFFFF}u)"
        return f"((u64)({self.raw(base, 64)}) + {offset & ((1 << 64) - 1)}ull)"

    # -- statements ------------------------------------------------------------------

    def translate(self) -> str:
        code = statements(self.body)
        # Labels belong to the scope they stand in.
        scope_labels: dict[int, dict[str, str]] = {0: {}}
        scope_of_open: dict[int, int] = {}
        stack, counter = [0], 0
        for i, (kind, text) in enumerate(code):
            if kind == "open":
                counter += 1
                scope_of_open[i] = counter
                scope_labels[counter] = {}
                stack.append(counter)
            elif kind == "close":
                stack.pop()
            elif kind == "label":
                name = re.sub(r"\W", "_", text)
                scope_labels[stack[-1]][text] = f"L_{name}" + (f"_{stack[-1]}" if stack[-1] else "")
        self.labels = [scope_labels[0]]
        line = 0
        for kind, text in code:
            if kind == "loc":
                line = self.source_line(text)
            elif kind == "code" and re.search(r"\batom\.\S*global\S*\.cas\.b(16|32)\b", text):
                self.cas_lines.add(line)
        seen, out, pending = set(), [], 0

        def flush() -> None:
            nonlocal pending
            if pending:
                out.append(f"t->icount += {pending};")
            pending = 0

        for i, (kind, text) in enumerate(code):
            if kind == "loc":
                self.line = self.source_line(text)
            elif kind == "open":
                self.scopes.append({})
                self.labels.append(scope_labels[scope_of_open[i]])
            elif kind == "close":
                self.scopes.pop()
                self.labels.pop()
            elif kind == "label":
                flush()
                target = self.label(text)
                seen.add(target)
                out.append(f"{target}:;")
            elif text.startswith(".reg"):
                self.declare_registers(text)
            elif text.startswith(".param"):
                m = matched(r"\.param\s+(?:\.align\s+\d+\s+)?\.[bsuf](\d+)\s+([\w$%]+)(?:\[(\d+)\])?$", text)
                self.unique += 1
                name = f"param_{self.unique}"
                self.declarations.append(f"alignas(16) u8 {name}[{int(m[1]) // 8 * int(m[3] or 1)}];")
                self.scopes[-1][m[2]] = name
            elif text.startswith(".local"):
                m = matched(r"\.local\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\[(\d+)\]", text)
                at = -(-self.local_size // 16) * 16
                self.local_symbols[m[2]] = at
                self.local_size = at + int(m[3])
            elif text.startswith(".shared"):
                self.module.add_shared(text)
            elif text.startswith("."):
                if not text.startswith(".pragma"):
                    self.unsupported(text)
            else:
                pending += 1
                self.module.instructions += 1
                translated, branches = self.instruction(text, seen)
                if branches:
                    flush()
                out.append(translated)
        flush()
        head = [f"alignas(16) u8 local_frame[{max(self.local_size, 16)}];"] if self.local_size else []
        if self.local_size:
            head.append(f"t->local = local_frame; t->local_size = {self.local_size};")
        carry = ["u32 carry = 0; (void)carry;"]
        return "\n".join("  " + x for x in self.declarations + head + carry + out)

    @staticmethod
    def source_line(loc: str) -> int:
        m = matched(r"\.loc\s+(\d+)\s+(\d+)", loc)
        return (int(m[1]) << 24) | int(m[2])

    def declare_registers(self, text: str) -> None:
        m = matched(r"\.reg\s+\.(\w+)\s+(.*)", text)
        kind = "bool" if m[1] == "pred" else f"u{max(16, int(re.sub(r'[a-z]', '', m[1])))}"
        if kind not in POISON:
            self.unsupported(text)
        for name in split_operands(m[2]):
            k = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            names = [f"{k[1]}{j}" for j in range(int(k[2]))] if k else [name]
            for n in names:
                c_name = "v_" + re.sub(r"\W", "_", n.lstrip("%"))
                if len(self.scopes) > 1:
                    self.unique += 1
                    c_name += f"_{self.unique}"
                self.scopes[-1][n] = c_name
                self.declarations.append(f"{kind} {c_name} = {POISON[kind]};")

    def label(self, name: str) -> str:
        for scope in reversed(self.labels):
            if name in scope:
                return scope[name]
        self.unsupported(f"label {name}")

    def instruction(self, text: str, seen: set[str]) -> tuple[str, bool]:
        prefix = ""
        m = re.match(r"@(!?)\s*(\S+)\s+(.*)", text, re.S)
        if m:
            prefix = f"if ({m[1]}{self.raw(m[2])}) "
            text = m[3]
        m = matched(r"(\S+)\s*(.*)", text, re.S)
        opcode, operands = m[1], split_operands(m[2])
        parts = opcode.split(".")
        counts = self.module.opcodes
        counts[opcode] = counts.get(opcode, 0) + 1
        handler = getattr(self, "op_" + parts[0], None)
        allowed = MODIFIERS.get(parts[0])
        unknown = [
            x
            for x in parts[1:]
            if allowed is not None and x not in allowed and not TYPE_NAME.fullmatch(x) and not x.startswith(("L1::", "L2::"))
        ]
        if not handler or unknown:
            self.unsupported(f"opcode {opcode}")
        if parts[0] == "bra":
            target = self.label(operands[0])
            back = "if (t->icount >= t->fuel) watchdog(t); " if target in seen else ""
            return f"{prefix}{{ {back}goto {target}; }}", True
        try:
            code = handler(parts, operands)
        except (KeyError, IndexError, TypeError, ValueError) as e:
            self.unsupported(f"opcode {opcode} {', '.join(operands)} [{type(e).__name__}: {e}]")
        touches_memory = parts[0] in (
            "ld",
            "st",
            "atom",
            "red",
            "cp",
            "ldmatrix",
            "stmatrix",
            "bar",
            "barrier",
            "shfl",
            "mma",
            "wgmma",
            "trap",
            "call",
            "redux",
            "vote",
            "match",
            "fence",
            "membar",
        )
        line = f"t->line = {self.line}u; " if touches_memory else ""
        return f"{prefix}{{ {line}{code} }}", parts[0] in ("ret", "exit")

    def next_site(self) -> int:
        self.module.needs_fibres = True
        self.site += 1
        return self.site

    # -- memory -----------------------------------------------------------------------

    def space(self, parts: list[str]) -> str:
        for p in parts:
            name = p.split("::")[0]
            if name in ("param", "shared", "global", "local", "const"):
                return name
        return "generic"

    def order(self, parts: list[str]) -> tuple[str, str]:
        if "volatile" in parts or "relaxed" in parts or "mmio" in parts:
            order = "RELAXED"
        elif "acquire" in parts:
            order = "ACQUIRE"
        elif "release" in parts:
            order = "RELEASE"
        elif "acq_rel" in parts:
            order = "ACQ_REL"
        else:
            return "WEAK", "GPU_SCOPE"
        self.module.may_spin = self.module.needs_fibres = True
        return order, "CTA_SCOPE" if "cta" in parts else "GPU_SCOPE"

    def note_shared(self, bits: int) -> None:
        self.module.shared_cell = min(self.module.shared_cell, bits // 8)

    def op_ld(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        space, targets = self.space(p), vector(o[0])
        bits, n = width(t), len(targets)
        c_type = C_TYPE[t]
        if space == "param":
            m = matched(r"\[\s*([\w$%]+)\s*(?:\+\s*(\d+))?\s*\]$", o[1])
            base = self.params.get(m[1]) or self.lookup(m[1])
            fetch = f"V v; memcpy(&v, {base} + {m[2] or 0}, sizeof v);"
        else:
            order, scope = self.order(p)
            if order == "WEAK" and self.line in self.cas_lines:
                order = "RELAXED"  # first read of an atomic that is emulated by compare-and-swap
            if space == "shared":
                self.note_shared(bits)
                call = f"ld_shared<V>(t, {self.address(o[1], 32)})"
            elif space == "local":
                call = f"ld_local<V>(t, {self.address(o[1], 32)})"
            elif space in ("global", "const"):
                call = f"ld_global<V>(t, {self.address(o[1])}, {order}, {scope})"
            else:
                call = f"ld_generic<V>(t, {self.address(o[1])}, {order}, {scope})"
            fetch = f"V v = {call};"
        stores = " ".join(self.assign(d, f"v.x[{i}]") for i, d in enumerate(targets))
        return f"typedef Vec<{c_type}, {n}> V; {fetch} {stores}"

    op_ldu = op_ld

    def op_st(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        space, sources = self.space(p), vector(o[1])
        bits, n = width(t), len(sources)
        c_type = C_TYPE[f"b{bits}"]
        values = ", ".join(f"({c_type})({self.raw(s, bits)})" for s in sources)
        value = f"typedef Vec<{c_type}, {n}> V; V v = {{{{{values}}}}};"
        if space == "param":
            m = matched(r"\[\s*([\w$%]+)\s*(?:\+\s*(\d+))?\s*\]$", o[0])
            base = self.lookup(m[1]) or self.params.get(m[1])
            return f"{value} memcpy({base} + {m[2] or 0}, &v, sizeof v);"
        order, scope = self.order(p)
        if space == "shared":
            self.note_shared(bits)
            return f"{value} st_shared<V>(t, {self.address(o[0], 32)}, v);"
        if space == "local":
            return f"{value} st_local<V>(t, {self.address(o[0], 32)}, v);"
        if space == "global":
            return f"{value} st_global<V>(t, {self.address(o[0])}, v, {order}, {scope});"
        return f"{value} st_generic<V>(t, {self.address(o[0])}, v, {order}, {scope});"

    def op_atom(self, p: list[str], o: list[str], has_result: bool = True) -> str:
        self.module.may_spin = self.module.needs_fibres = True
        t = p[-1]
        names = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")
        op = next(x for x in p if x in names)
        if t not in C_TYPE:  # vector and operation may follow the type
            t = next(x for x in p if TYPE_NAME.fullmatch(x))
        if op != p[-2] and t == p[-1] and p[-2] not in ("noftz", "v2", "v4", "v8"):
            raise KeyError(p[-2])
        shared = self.space(p) == "shared"
        order, scope = self.order(p)
        if order == "WEAK":
            order = "RELAXED"
        if "cta" in p:
            scope = "CTA_SCOPE"
        targets = vector(o[0]) if has_result else []
        a = o[1:] if has_result else o
        values = vector(a[1])
        c_type, out = C_TYPE[t], []
        for i, source in enumerate(values):
            v = f"({c_type})({self.raw(source, width(t))})"
            if op == "cas":
                e = f"old == {v} ? ({c_type})({self.raw(a[2], width(t))}) : old"
            elif op == "exch":
                e = v
            elif op == "add" and is_float(t):
                e = self.float_add(t, "old", v)
            elif op in ("min", "max") and is_float(t):
                e = self.float_extreme(t, op, "old", v)
            elif op == "add":
                e = f"old + {v}"
            elif op in ("min", "max"):
                e = f"old {'<' if op == 'min' else '>'} {v} ? old : {v}"
            elif op in ("and", "or", "xor"):
                e = f"old {BITWISE[op]} {v}"
            elif op == "inc":
                e = f"old >= {v} ? 0 : old + 1"
            else:
                e = f"old == 0 || old > {v} ? {v} : old - 1"
            fn = f"[&]({c_type} old) -> {c_type} {{ return {e}; }}"
            if shared:
                self.note_shared(width(t))
                call = f"atomic_shared<{c_type}>(t, {self.address(a[0], 32)} + {i * width(t) // 8}u, {fn})"
            else:
                call = f"atomic_global<{c_type}>(t, {self.address(a[0])} + {i * width(t) // 8}ull, {order}, {scope}, {fn})"
            out.append(self.assign(targets[i], call) if has_result else call + ";")
        return " ".join(out)

    def op_red(self, p: list[str], o: list[str]) -> str:
        if "async" in p:
            raise KeyError("red.async")
        return self.op_atom(p, o, has_result=False)

    def float_add(self, t: str, a: str, b: str) -> str:
        return {
            "f32": f"nan32(U(F({a}) + F({b})))",
            "f64": f"UD(FD({a}) + FD({b}))",
            "f16": f"f2h(h2f({a}) + h2f({b}))",
            "bf16": f"f2bf(bf2f({a}) + bf2f({b}))",
            "f16x2": f"add_halves({a}, {b}, h2f, f2h)",
            "bf16x2": f"add_halves({a}, {b}, bf2f, f2bf)",
        }[t]

    def float_extreme(self, t: str, op: str, a: str, b: str) -> str:
        return {
            "f32": f"U(f{op}_(F({a}), F({b})))",
            "f64": f"UD(f{op}_(FD({a}), FD({b})))",
            "f16": f"f2h(f{op}_(h2f({a}), h2f({b})))",
            "bf16": f"f2bf(f{op}_(bf2f({a}), bf2f({b})))",
        }[t]

    def op_cp(self, p: list[str], o: list[str]) -> str:
        if p[1] != "async" or "bulk" in p or "mbarrier" in p:
            raise KeyError(".".join(p))
        self.module.needs_fibres = True
        self.note_shared(32)
        if "commit_group" in p:
            return "cp_commit(t);"
        if "wait_group" in p:
            return f"cp_wait(t, {self.raw(o[0])});"
        if "wait_all" in p:
            return "cp_commit(t); cp_wait(t, 0);"
        size = int(o[2], 0)
        copied = self.raw(o[3]) if len(o) > 3 and "cache_hint" not in ".".join(p) else str(size)
        return f"cp_async(t, {self.address(o[0], 32)}, {self.address(o[1])}, {size}, {copied});"

    def op_ldmatrix(self, p: list[str], o: list[str]) -> str:
        targets = vector(o[0])
        self.note_shared(16)
        if p[-1] != "b16":
            raise KeyError(p[-1])
        transposed, address = str("trans" in p).lower(), self.address(o[1], 32)
        body = f"u32 q[4]; ldmatrix(t, {self.next_site()}, {len(targets)}, {transposed}, {address}, q);"
        return body + "".join(f" {self.raw(d)} = q[{i}];" for i, d in enumerate(targets))

    def op_stmatrix(self, p: list[str], o: list[str]) -> str:
        sources = vector(o[1])
        self.note_shared(16)
        if p[-1] != "b16":
            raise KeyError(p[-1])
        words = ", ".join(f"(u32)({self.raw(s)})" for s in sources)
        transposed, address = str("trans" in p).lower(), self.address(o[0], 32)
        return f"u32 q[] = {{{words}}}; stmatrix(t, {self.next_site()}, {len(sources)}, {transposed}, {address}, q);"

    def ignore(self, p: list[str], o: list[str]) -> str:
        return ";"

    op_prefetch = op_prefetchu = op_griddepcontrol = op_discard = op_applypriority = op_setmaxnreg = op_pmevent = ignore

    def op_nanosleep(self, p: list[str], o: list[str]) -> str:
        return "pause_thread(t);"

    def op_createpolicy(self, p: list[str], o: list[str]) -> str:
        return self.assign(o[0], "0")

    def op_fence(self, p: list[str], o: list[str]) -> str:
        if p[1] in ("proxy", "mbarrier_init"):
            return ";"
        return f"fence(t, {'CTA_SCOPE' if 'cta' in p else 'GPU_SCOPE'});"

    op_membar = op_fence

    # -- moves ----------------------------------------------------------------------------

    def op_mov(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        if o[0].startswith("{"):
            targets = vector(o[0])
            bits = width(t) // len(targets)
            parts = " ".join(
                self.assign(d, f"(u{max(bits, 8)})(q >> {bits * i})") for i, d in enumerate(targets) if d != "_"
            )
            return f"u64 q = {self.raw(o[1], 64)}; {parts}"
        if o[1].startswith("{"):
            sources = vector(o[1])
            bits = width(t) // len(sources)
            c = C_TYPE["b" + str(width(t))]
            return self.assign(
                o[0], " | ".join(f"(({c})(u{bits})({self.raw(s)}) << {bits * i})" for i, s in enumerate(sources))
            )
        if t == "pred":
            return self.assign(o[0], f"({self.raw(o[1])}) != 0")
        return self.assign(o[0], self.raw(o[1], width(t)))

    def op_cvta(self, p: list[str], o: list[str]) -> str:
        source = self.raw(o[1], 64)
        space = self.space(p)
        if space in ("shared", "local"):
            tag = f"({'SHARED_ID' if space == 'shared' else 'LOCAL_ID'} << 48)"
            return self.assign(o[0], f"(u32)({source})" if "to" in p else f"((u64)(u32)({source}) | {tag})")
        return self.assign(o[0], source)

    def op_selp(self, p: list[str], o: list[str]) -> str:
        w = width(p[-1])
        return self.assign(o[0], f"{self.get('pred', o[3])} ? {self.raw(o[1], w)} : {self.raw(o[2], w)}")

    def op_prmt(self, p: list[str], o: list[str]) -> str:
        if len(p) > 2:
            raise KeyError(p[2])
        return self.assign(o[0], f"prmt({self.raw(o[1])}, {self.raw(o[2])}, {self.raw(o[3])})")

    # -- arithmetic -------------------------------------------------------------------------

    def halves(self, p: list[str], o: list[str], scalar: Callable[[list[str], list[str]], str]) -> str:
        """Apply a scalar operation to both halves of packed operands."""
        packed = p[-1]
        half, bits = packed[:-2], width(packed) // 2
        c = f"u{bits}"
        self.unique += 1
        names = [f"h{self.unique}_{i}" for i in range(2)]
        code = ""
        for i, name in enumerate(names):
            sources = []
            for k, s in enumerate(o[1:]):
                source = f"h{self.unique}_{i}_{k}"
                code += f"{c} {source} = ({c})(({self.raw(s, 64)}) >> {bits * i}); "
                self.scopes[-1][source] = source
                sources.append(source)
            code += f"{c} {name} = 0; "
            self.scopes[-1][name] = name
            code += scalar([*p[:-1], half], [name, *sources]) + " "
        c2 = f"u{2 * bits}"
        return code + self.assign(o[0], f"({c2}){names[0]} | (({c2}){names[1]} << {bits})")

    def float_op(self, p: list[str], o: list[str], name: str, operator: str) -> str:
        """add, sub, mul, div, fma and sqrt with their modifiers."""
        t = p[-1]
        if t in ("f16x2", "bf16x2", "f32x2"):
            return self.halves(p, o, lambda q, x: self.float_op(q, x, name, operator))
        flush = "ftz" in p and t == "f32"
        a = [self.get(t, x) for x in o[1:]]
        if flush:
            a = [f"ftz({x})" for x in a]
        mode = next((ROUNDING[x] for x in p if x in ROUNDING), 0)
        code = {"add": 0, "sub": 1, "mul": 2, "div": 3, "fma": 4, "sqrt": 5}[name]
        if mode and t in ("f32", "f64"):
            padded = a + ["0"] * (3 - len(a))
            e = f"round_{t}({code}, {mode}, {', '.join(padded)})"
        elif mode:
            raise KeyError("rounding")
        elif name == "fma":
            if t in ("f16", "bf16"):
                e = f"std::fma((double){a[0]}, (double){a[1]}, (double){a[2]})"
                if "relu" in p:
                    e = f"fmax_nan({e}, 0.0)"
                return self.assign(o[0], f"{'d2h' if t == 'f16' else 'd2bf'}({e})")
            e = f"std::fma({', '.join(a)})"
        elif name == "sqrt":
            e = f"std::sqrt({a[0]})"
        else:
            e = f"{a[0]} {operator} {a[1]}"
        if "sat" in p:
            e = f"sat({e})"
        if flush:
            e = f"ftz({e})"
        return self.put(t, o[0], e)

    def op_add(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        if is_float(t):
            return self.float_op(p, o, "add", "+")
        if "cc" in p:
            return self.carry_add(t, o, "0")
        if "sat" in p:
            raise KeyError("sat")
        u = "u" + t[1:]
        return self.put(u, o[0], f"{self.get(u, o[1])} + {self.get(u, o[2])}")

    def carry_add(self, t: str, o: list[str], carry: str) -> str:
        w = int(t[1:])
        wide = "u64" if w == 32 else "u128"
        return (
            f"{wide} q = ({wide}){self.get(f'u{w}', o[1])} + ({wide}){self.get(f'u{w}', o[2])} + {carry}; "
            f"{self.assign(o[0], f'(u{w})q')} carry = (u32)(q >> {w});"
        )

    def borrow_sub(self, t: str, o: list[str], borrow: str) -> str:
        u = "u" + t[1:]
        a, b = self.get(u, o[1]), self.get(u, o[2])
        return f"u128 q = (u128){a} - {b} - {borrow}; {self.assign(o[0], f'({u})q')} carry = (u32)(q >> 127);"

    def op_subc(self, p: list[str], o: list[str]) -> str:
        return self.borrow_sub(p[-1], o, "carry")

    def op_addc(self, p: list[str], o: list[str]) -> str:
        return self.carry_add(p[-1], o, "carry")

    def op_sub(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        if is_float(t):
            return self.float_op(p, o, "sub", "-")
        if "cc" in p:
            return self.borrow_sub(t, o, "0")
        if "sat" in p:
            raise KeyError("sat")
        u = "u" + t[1:]
        return self.put(u, o[0], f"{self.get(u, o[1])} - {self.get(u, o[2])}")

    def op_mul(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        if is_float(t):
            return self.float_op(p, o, "mul", "*")
        return self.product(p, o, None)

    def op_mad(self, p: list[str], o: list[str]) -> str:
        if is_float(p[-1]):
            return self.float_op(p, o, "fma", "")
        return self.product(p, o, o[3])

    def product(self, p: list[str], o: list[str], addend: str | None, carry_in: bool = False) -> str:
        t = p[-1]
        w, signed = int(t[1:]), t[0] == "s"
        u = f"u{w}"
        if "wide" in p:
            wide = ("s" if signed else "u") + str(2 * w)
            out = f"u{2 * w}"
            e = f"({out})(({wide}){self.get(t, o[1])} * ({wide}){self.get(t, o[2])})"
            if addend:
                e += f" + ({out})({self.raw(addend, 2 * w)})"
            return self.assign(o[0], f"({out})({e})")
        if "hi" in p:
            wide = {8: "16", 16: "32", 32: "64", 64: "128"}[w]
            c = f"({'s' if signed else 'u'}{wide})"
            e = f"({u})(({c}{self.get(t, o[1])} * {c}{self.get(t, o[2])}) >> {w})"
        elif "lo" in p:
            e = f"({u})((u64){self.get(u, o[1])} * (u64){self.get(u, o[2])})"
        else:
            raise KeyError("mul")
        if not addend:
            return self.assign(o[0], e)
        if "cc" in p or carry_in:
            wide = "u64" if w == 32 else "u128"
            return (
                f"{wide} q = ({wide}){e} + ({wide}){self.get(u, addend)} + {'carry' if carry_in else '0'}; "
                f"{self.assign(o[0], f'({u})q')} carry = (u32)(q >> {w});"
            )
        return self.assign(o[0], f"({u})({e} + {self.get(u, addend)})")

    def op_madc(self, p: list[str], o: list[str]) -> str:
        return self.product(p, o, o[3], carry_in=True)

    def op_fma(self, p: list[str], o: list[str]) -> str:
        return self.float_op(p, o, "fma", "")

    def op_div(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        if is_float(t):
            return self.float_op([x for x in p if x not in ("full", "approx")], o, "div", "/")
        return self.put(t, o[0], f"idiv<{C_TYPE[t]}>({self.get(t, o[1])}, {self.get(t, o[2])})")

    def op_rem(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        return self.put(t, o[0], f"irem<{C_TYPE[t]}>({self.get(t, o[1])}, {self.get(t, o[2])})")

    def op_sqrt(self, p: list[str], o: list[str]) -> str:
        return self.float_op([x for x in p if x != "approx"], o, "sqrt", "")

    def unary_math(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        if t in ("f16x2", "bf16x2"):
            return self.halves(p, o, self.unary_math)
        e = {
            "rcp": "1 / {0}",
            "rsqrt": "1 / std::sqrt({0})",
            "ex2": "std::exp2({0})",
            "lg2": "std::log2({0})",
            "sin": "std::sin({0})",
            "cos": "std::cos({0})",
            "tanh": "std::tanh({0})",
        }[p[0]]
        mode = next((ROUNDING[x] for x in p if x in ROUNDING), 0)
        a = self.get(t, o[1])
        flush = "ftz" in p and t in ("f32", "f64")
        if flush and t == "f32":
            a = f"ftz({a})"
        if p[0] == "rcp" and mode:
            e = f"round_{t}(3, {mode}, 1, {a}, 0)"
        elif t == "f64" and flush:  # the instruction gives the upper half of the result only
            return self.assign(o[0], f"UD({e.format(a)}) & 0xffffffff00000000ull")
        else:
            e = e.format(a)
        return self.put(t, o[0], f"ftz({e})" if flush and t == "f32" else e)

    op_rcp = op_rsqrt = op_ex2 = op_lg2 = op_sin = op_cos = op_tanh = unary_math

    def extreme(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        if "xorsign" in p or "abs" in p:
            raise KeyError("xorsign")
        if t in ("f16x2", "bf16x2"):
            return self.halves(p, o, self.extreme)
        if is_float(t):
            fn = f"f{p[0]}_nan" if "NaN" in p else f"f{p[0]}_"
            e = self.get(t, o[1])
            for x in o[2:]:
                e = f"{fn}({e}, {self.get(t, x)})"
            return self.put(t, o[0], f"ftz({e})" if "ftz" in p and t == "f32" else e)
        a, b = self.get(t, o[1]), self.get(t, o[2])
        return self.put(t, o[0], f"{a} {'<' if p[0] == 'min' else '>'} {b} ? {a} : {b}")

    op_min = op_max = extreme

    def op_neg(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        sign = {
            "f32": "0x80000000u",
            "f64": "0x8000000000000000ull",
            "f16": "0x8000u",
            "bf16": "0x8000u",
            "f16x2": "0x80008000u",
            "bf16x2": "0x80008000u",
        }.get(t)
        if sign:
            return self.assign(o[0], f"{self.raw(o[1], width(t))} ^ {sign}")
        return self.put("u" + t[1:], o[0], f"0 - {self.get('u' + t[1:], o[1])}")

    def op_abs(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        mask = {
            "f32": "0x7fffffffu",
            "f64": "0x7fffffffffffffffull",
            "f16": "0x7fffu",
            "bf16": "0x7fffu",
            "f16x2": "0x7fff7fffu",
            "bf16x2": "0x7fff7fffu",
        }.get(t)
        if mask:
            e = f"{self.raw(o[1], width(t))} & {mask}"
            return self.assign(o[0], f"U(ftz(F({e})))" if "ftz" in p and t == "f32" else e)
        a = self.get(t, o[1])
        return self.put(t, o[0], f"{a} < 0 ? ({C_TYPE[t]})(0 - (u64){a}) : {a}")

    def op_copysign(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        w = width(t)
        mask = "0x8000000000000000ull" if w == 64 else "0x80000000u"
        return self.assign(o[0], f"({self.raw(o[1], w)} & {mask}) | ({self.raw(o[2], w)} & ~{mask})")

    def op_testp(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        fn = {
            "finite": "std::isfinite",
            "infinite": "std::isinf",
            "notanumber": "std::isnan",
            "number": "!std::isnan",
            "normal": "std::isnormal",
        }[p[1]]
        return self.assign(o[0], f"{fn}({self.get(t, o[1])})")

    # -- bits -----------------------------------------------------------------------------------

    def bitwise(self, p: list[str], o: list[str]) -> str:
        t, c = p[-1], BITWISE[p[0]]
        return self.put(t, o[0], f"{self.get(t, o[1])} {c} {self.get(t, o[2])}")

    op_and = op_or = op_xor = bitwise

    def op_not(self, p: list[str], o: list[str]) -> str:
        return self.put(p[-1], o[0], ("!" if p[-1] == "pred" else "~") + self.get(p[-1], o[1]))

    def op_cnot(self, p: list[str], o: list[str]) -> str:
        return self.put(p[-1], o[0], f"{self.get(p[-1], o[1])} == 0")

    def op_shl(self, p: list[str], o: list[str]) -> str:
        u = "u" + p[-1][1:]
        return self.assign(o[0], f"shl<{u}>({self.get(u, o[1])}, {self.get('u32', o[2])})")

    def op_shr(self, p: list[str], o: list[str]) -> str:
        t = p[-1] if p[-1][0] == "s" else "u" + p[-1][1:]
        return self.put(t, o[0], f"shr<{t}>({self.get(t, o[1])}, {self.get('u32', o[2])})")

    def op_shf(self, p: list[str], o: list[str]) -> str:
        a, b, n = (self.get("u32", x) for x in o[1:4])
        k = f"({n} & 31)" if "wrap" in p else f"({n} > 32 ? 32 : {n})"
        pair = f"((u64){a} | ((u64){b} << 32))"
        if p[1] == "l":
            return self.assign(o[0], f"(u32)(({pair} << {k}) >> 32)")
        return self.assign(o[0], f"(u32)({pair} >> {k})")

    def op_bfe(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        u = "u" + t[1:]
        return self.assign(
            o[0],
            f"bfe<{u}>({self.get(u, o[1])}, {self.get('u32', o[2])}, {self.get('u32', o[3])}, {str(t[0] == 's').lower()})",
        )

    def op_bfi(self, p: list[str], o: list[str]) -> str:
        u = "u" + p[-1][1:]
        return self.assign(
            o[0],
            f"bfi<{u}>({self.get(u, o[1])}, {self.get(u, o[2])}, {self.get('u32', o[3])}, {self.get('u32', o[4])})",
        )

    def op_popc(self, p: list[str], o: list[str]) -> str:
        return self.assign(o[0], f"(u32)__builtin_popcountll({self.get('u' + p[-1][1:], o[1])})")

    def op_clz(self, p: list[str], o: list[str]) -> str:
        w = width(p[-1])
        a = self.get(f"u{w}", o[1])
        return self.assign(o[0], f"{a} ? (u32)__builtin_clzll({a}) - {64 - w} : {w}u")

    def op_bfind(self, p: list[str], o: list[str]) -> str:
        w, signed = width(p[-1]), p[-1][0] == "s"
        a = self.get(f"u{w}", o[1])
        if signed:
            a = f"(u{w})({a} >> {w - 1} ? ~{a} : {a})"
        e = f"63 - (u32)__builtin_clzll({a})"
        if "shiftamt" in p:
            e = f"{w - 1} - ({e})"
        return self.assign(o[0], f"{a} ? {e} : 0xffffffffu")

    def op_brev(self, p: list[str], o: list[str]) -> str:
        if p[-1] == "b64":
            a = self.get("u64", o[1])
            return self.assign(o[0], f"((u64)brev((u32){a}) << 32) | brev((u32)({a} >> 32))")
        return self.assign(o[0], f"brev({self.get('u32', o[1])})")

    def op_lop3(self, p: list[str], o: list[str]) -> str:
        return self.assign(o[0], f"lop3({self.raw(o[1])}, {self.raw(o[2])}, {self.raw(o[3])}, {self.raw(o[4])})")

    def op_dp4a(self, p: list[str], o: list[str]) -> str:
        return self.assign(
            o[0],
            f"dp4a({self.raw(o[1])}, {self.raw(o[2])}, {self.raw(o[3])}, "
            f"{str(p[1] == 's32').lower()}, {str(p[2] == 's32').lower()})",
        )

    # -- comparison -------------------------------------------------------------------------------

    def comparison(self, op: str, t: str, a: str, b: str, flush: bool = False) -> str:
        if t[0] == "b" and not is_float(t):
            t = "u" + t[1:]
        x, y = self.get(t, a), self.get(t, b)
        if flush and t == "f32":
            x, y = f"ftz({x})", f"ftz({y})"
        nan = f"(({x}) != ({x}) || ({y}) != ({y}))"
        if op in ("nan", "num"):
            return nan if op == "nan" else f"!{nan}"
        if op in COMPARE:
            e = f"({x} {COMPARE[op]} {y})"
            return f"({e} && !{nan})" if op == "ne" and is_float(t) else e
        return f"(({x} {COMPARE[op[:-1]]} {y}) || {nan})"

    def op_setp(self, p: list[str], o: list[str]) -> str:
        t = p[-1]
        targets = [x.strip() for x in o[0].split("|")]
        combine = next((x for x in p[2:-1] if x in ("and", "or", "xor")), None)
        if t in ("f16x2", "bf16x2"):
            half = t[:-2]
            code = ""
            for i, d in enumerate(targets):
                self.unique += 1
                names = [f"c{self.unique}_{k}" for k in range(2)]
                for name, s in zip(names, o[1:3], strict=True):
                    code += f"u16 {name} = (u16)(({self.raw(s)}) >> {16 * i}); "
                    self.scopes[-1][name] = name
                code += self.assign(d, self.comparison(p[1], half, names[0], names[1])) + " "
            return code
        e = self.comparison(p[1], t, o[1], o[2], "ftz" in p)
        negated = f"!{e}"
        if combine:
            c = {"and": "&&", "or": "||", "xor": "!="}[combine]
            other = self.get("pred", o[3])
            e, negated = f"({e} {c} {other})", f"(!{e} {c} {other})"
        code = f"bool q = {e}, r = {negated}; (void)r; {self.assign(targets[0], 'q')}"
        if len(targets) > 1:
            code += " " + self.assign(targets[1], "r")
        return code

    def op_set(self, p: list[str], o: list[str]) -> str:
        d, s = [x for x in p if TYPE_NAME.fullmatch(x)]
        one = "0x3f800000u" if d == "f32" else "0xffffffffu"
        return self.assign(o[0], f"{self.comparison(p[1], s, o[1], o[2])} ? {one} : 0u")

    # -- conversion ---------------------------------------------------------------------------------

    def op_cvt(self, p: list[str], o: list[str]) -> str:
        types = [x for x in p[1:] if TYPE_NAME.fullmatch(x)]
        d, s = types
        relu = "relu" in p
        if d == "tf32":
            return self.assign(o[0], f"to_tf32({self.raw(o[1])}, {str('rna' in p).lower()})")
        if d in ("bf16x2", "f16x2") and s == "f32":
            if "rn" not in p:
                raise KeyError("rounding")
            fn = "f2bf" if d == "bf16x2" else "f2h"
            hi, lo = self.get(s, o[1]), self.get(s, o[2])
            if relu:
                hi, lo = f"fmax_nan({hi}, 0.0f)", f"fmax_nan({lo}, 0.0f)"
            return self.assign(o[0], f"((u32){fn}({hi}) << 16) | {fn}({lo})")
        if d in ("e4m3x2", "e5m2x2"):
            bits = 4 if d == "e4m3x2" else 5
            if s == "f32":
                hi, lo = self.get(s, o[1]), self.get(s, o[2])
            else:
                x = self.raw(o[1])
                conv = "h2f" if s == "f16x2" else "bf2f"
                hi, lo = f"{conv}((u16)({x} >> 16))", f"{conv}((u16){x})"
            return self.assign(o[0], f"(u16)((f_to_fp8({hi}, {bits}) << 8) | f_to_fp8({lo}, {bits}))")
        if s in ("e4m3x2", "e5m2x2"):
            bits = 4 if s == "e4m3x2" else 5
            x = self.raw(o[1])
            return self.assign(o[0], f"((u32)f2h(fp8_to_f((u8)({x} >> 8), {bits})) << 16) | f2h(fp8_to_f((u8){x}, {bits}))")
        if d.endswith("x2") or s.endswith("x2"):
            raise KeyError(d)
        if is_float(s):
            e = self.get(s, o[1])
            if "ftz" in p and s == "f32":
                e = f"ftz({e})"
            integral = next((x for x in p if x in ("rni", "rzi", "rmi", "rpi")), None)
            if integral:
                e = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}[
                    integral
                ] + f"({e})"
            if not is_float(d):
                lo, hi = INT_RANGE[d]
                c = C_TYPE[d]
                nan = "0"
                if s == "f64" or width(d) == 64:
                    nan = f"({c})(1ull << {width(d) - 1})"
                return self.put(d, o[0], f"to_int<{c}>({e}, {lo}, {hi}, {nan})")
            mode = next((ROUNDING[x] for x in p if x in ROUNDING), 0)
            if mode and d in ("f32", "f64"):
                e = f"to_{d}({e}, {mode})"
            elif mode:
                raise KeyError("rounding")
            elif d in ("f16", "bf16") and s == "f64":
                return self.assign(o[0], f"{'d2h' if d == 'f16' else 'd2bf'}({e})")
            if relu:
                e = f"fmax_nan((float){e}, 0.0f)"
            if "sat" in p:
                e = f"sat({e})"
            if "ftz" in p and d == "f32":
                e = f"ftz((float)({e}))"
            return self.put(d, o[0], e)
        if is_float(d):
            mode = next((ROUNDING[x] for x in p if x in ROUNDING), 0)
            a = self.get(s, o[1])
            if d in ("f16", "bf16"):
                if mode or width(s) == 64:
                    raise KeyError("rounding")
                return self.assign(o[0], f"{'d2h' if d == 'f16' else 'd2bf'}((double){a})")
            if mode:
                return self.put(d, o[0], f"to_{d}({a}, {mode})")
            return self.put(d, o[0], f"({'float' if d == 'f32' else 'double'}){a}")
        if "sat" in p:
            lo, hi = INT_RANGE[d]
            if width(d) == 64 or width(s) == 64:
                raise KeyError("sat")
            return self.put(d, o[0], f"to_int<{C_TYPE[d]}>((double){self.get(s, o[1])}, {lo}, {hi}, 0)")
        return self.put(d, o[0], self.get(s, o[1]))

    # -- control ---------------------------------------------------------------------------------------

    def op_bra(self, p: list[str], o: list[str]) -> str:
        raise KeyError("bra")

    def op_ret(self, p: list[str], o: list[str]) -> str:
        return "return;"

    op_exit = op_ret

    def op_trap(self, p: list[str], o: list[str]) -> str:
        return 'trap(t, "TRAP", "trap instruction");'

    def op_brkpt(self, p: list[str], o: list[str]) -> str:
        return self.op_trap(p, o)

    def op_bar(self, p: list[str], o: list[str]) -> str:
        p = [x for x in p if x not in ("cta", "aligned")]
        if p[1] == "warp":
            return f"warp_sync(t, {self.next_site()});"
        if p[1] not in ("sync", "arrive"):
            raise KeyError(p[1])
        self.module.needs_fibres = True
        count = self.raw(o[1]) if len(o) > 1 else "0"
        return f"barrier(t, {self.raw(o[0])}, {count}, {str(p[1] == 'sync').lower()});"

    op_barrier = op_bar

    def mask_check(self, operand: str) -> str:
        m = self.raw(operand)
        return (
            ""
            if m in ("0xffffffffu",)
            else f'if (({m}) != 0xffffffffu) trap(t, "UNSUPPORTED", "warp instruction with a partial mask"); '
        )

    def op_shfl(self, p: list[str], o: list[str]) -> str:
        mode = {"bfly": 0, "up": 1, "down": 2, "idx": 3}[p[2]]
        targets = [x.strip() for x in o[0].split("|")]
        call = f"shuffle(t, {self.next_site()}, {mode}, {', '.join(self.raw(x) for x in o[1:4])}, q)"
        code = self.mask_check(o[4]) + f"bool q; {self.assign(targets[0], call)}"
        if len(targets) > 1:
            code += " " + self.assign(targets[1], "q")
        return code

    def op_vote(self, p: list[str], o: list[str]) -> str:
        mode = {"ballot": 0, "any": 1, "all": 2, "uni": 3}[p[2]]
        return self.mask_check(o[2]) + self.put(
            p[-1], o[0], f"vote(t, {self.next_site()}, {mode}, {self.get('pred', o[1])})"
        )

    def op_match(self, p: list[str], o: list[str]) -> str:
        targets = [x.strip() for x in o[0].split("|")]
        every = str(p[1] == "all").lower()
        code = (
            self.mask_check(o[2])
            + f"bool q; {self.assign(targets[0], f'match(t, {self.next_site()}, {every}, {self.raw(o[1], 64)}, q)')}"
        )
        return code + (" " + self.assign(targets[1], "q") if len(targets) > 1 else "")

    def op_redux(self, p: list[str], o: list[str]) -> str:
        t, op = p[-1], p[2]
        if "abs" in p:
            raise KeyError("abs")
        if t == "f32":
            code = {"min": 8, "max": 9}[op] + (2 if "NaN" in p else 0)
        elif op in ("min", "max"):
            code = {"min": 1, "max": 2}[op] + (2 if t == "s32" else 0)
        else:
            code = {"add": 0, "and": 5, "or": 6, "xor": 7}[op]
        return self.mask_check(o[2]) + self.assign(o[0], f"redux(t, {self.next_site()}, {code}, {self.raw(o[1])})")

    def op_elect(self, p: list[str], o: list[str]) -> str:
        targets = [x.strip() for x in o[0].split("|")]
        return (
            self.mask_check(o[1])
            + f"warp_sync(t, {self.next_site()}); {self.assign(targets[0], '0u')} "
            + self.assign(targets[1], "t->lane == 0")
        )

    def op_activemask(self, p: list[str], o: list[str]) -> str:
        return self.assign(o[0], "0xffffffffu")

    def op_mma(self, p: list[str], o: list[str]) -> str:
        kind = MMA_KIND[".".join(x for x in p[3:] if x != "satfinite")]
        d, a, b, c = (vector(x) for x in o[:4])
        wide = kind in (8, 20, 21, 22)
        if wide:

            def words(name: str, regs: list[str]) -> str:
                return (
                    f"u32 {name}[] = {{"
                    + ", ".join(f"(u32)({self.raw(r, 64)}), (u32)(({self.raw(r, 64)}) >> 32)" for r in regs)
                    + "}; "
                )
        else:

            def words(name: str, regs: list[str]) -> str:
                return f"u32 {name}[] = {{" + ", ".join(f"(u32)({self.raw(r)})" for r in regs) + "}; "

        code = words("A", a) + words("B", b) + words("C", c) + f"u32 q[8]; mma(t, {self.next_site()}, {kind}, A, B, C, q);"
        for i, x in enumerate(d):
            code += " " + self.assign(x, f"(u64)q[{2 * i}] | ((u64)q[{2 * i + 1}] << 32)" if wide else f"q[{i}]")
        return code

    def op_wgmma(self, p: list[str], o: list[str]) -> str:
        if p[1] in ("fence", "commit_group"):
            return ";"
        if p[1] == "wait_group":
            return ";"
        shape = next(x for x in p if re.fullmatch(r"m64n\d+k\d+", x))
        n = int(matched(r"m64n(\d+)", shape)[1])
        kinds = p[p.index(shape) + 1 :]
        if kinds[0] not in ("f32", "s32"):
            raise KeyError(kinds[0])
        kind = WGMMA_KIND[".".join(kinds[1:3])]
        d = vector(o[0])
        from_registers = o[1].strip().startswith("{")
        tail = o[3:]  # scale-d, scale-a, scale-b, trans-a, trans-b
        scale_d = self.get("pred", tail[0])
        signs = [f"{float(int(x, 0))}f" for x in tail[1:3]] if kind not in (3, 4) else ["1.0f", "1.0f"]
        trans = [int(x, 0) for x in tail[3:]] if kind in (1, 2) else []
        trans_a = trans[0] if not from_registers and trans else 0
        trans_b = trans[-1] if trans else 0
        code = "u32 D[] = {" + ", ".join(self.raw(x) for x in d) + "}; "
        if from_registers:
            code += "u32 A[] = {" + ", ".join(f"(u32)({self.raw(x)})" for x in vector(o[1])) + "}; u64 a_desc = 0; "
        else:
            code += f"u32 *A = nullptr; u64 a_desc = {self.raw(o[1], 64)}; "
        code += (
            f"wgmma(t, {self.next_site()}, {kind}, {n}, A, a_desc, {self.raw(o[2], 64)}, {str(not from_registers).lower()}, "
            f"{str(bool(trans_a)).lower()}, {str(bool(trans_b)).lower()}, {scale_d}, {signs[0]}, {signs[1]}, D);"
        )
        return code + "".join(f" {self.raw(x)} = D[{i}];" for i, x in enumerate(d))

    def op_call(self, p: list[str], o: list[str]) -> str:
        text = ", ".join(o)
        m = matched(r"(?:\(([^)]*)\),\s*)?([\w$]+)(?:,\s*\(([^)]*)\))?$", text)
        returns = [x.strip() for x in (m[1] or "").split(",") if x.strip()]
        args = [x.strip() for x in (m[3] or "").split(",") if x.strip()]
        at = [self.lookup(x) for x in args]

        def value(i: int, bits: int) -> str:
            return f"*(u{bits} *)({at[i]})"

        if m[2] == "__assertfail":
            return f"assert_fail(t, {value(0, 64)}, {value(1, 64)}, {value(2, 32)}, {value(3, 64)});"
        if m[2] == "vprintf":
            return f"*(u32 *)({self.lookup(returns[0])}) = device_printf(t, {value(0, 64)}, {value(1, 64)});"
        if m[2] in self.module.functions:
            pieces = ["t", *(self.lookup(x) or self.unsupported(f"operand {x}") for x in returns + args)]
            call = f"fn_{re.sub(r'[^A-Za-z0-9_]', '_', m[2])}({', '.join(pieces)});"
            frame = "u8 *frame = t->local; u32 frame_size = t->local_size;"
            return f"{frame} {call} t->local = frame; t->local_size = frame_size;"
        raise KeyError(f"call to {m[2]}")


class Module:
    """Translates one PTX module that holds one kernel."""

    def __init__(self, ptx: str) -> None:
        self.ptx = ptx
        self.shared_symbols: dict[str, int] = {}
        self.shared_size = 0
        self.global_symbols: dict[str, int] = {}
        self.global_bytes = bytearray()
        self.files = {int(m[1]): m[2] for m in re.finditer(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M)}
        self.functions: set[str] = set()
        self.opcodes: dict[str, int] = {}
        self.instructions = 0
        self.shared_cell = 4
        self.needs_fibres = self.may_spin = False

    def add_shared(self, text: str) -> None:
        m = matched(r"(?:\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.b(\d+)\s+([\w$]+)(?:\[(\d*)\])?", text.strip())
        align = int(m[1] or 1)
        at = -(-self.shared_size // align) * align
        self.shared_symbols[m[3]] = at
        if m[4]:
            self.shared_size = at + int(m[4]) * int(m[2]) // 8

    def add_global(self, text: str) -> None:
        m = re.match(
            r"(?:\.visible\s+)?\.(?:global|const)\s+(?:\.align\s+(\d+)\s+)?\.(b8|b16|b32|b64|u32|u64|f32|f64|u8)\s+([\w$]+)"
            r"(?:\[(\d+)\])?(?:\s*=\s*\{(.*)\}|\s*=\s*(\S+))?$",
            text.strip(),
            re.S,
        )
        if not m:
            raise Unsupported("module variable " + text[:100])
        size = width(m[2]) // 8
        align = int(m[1] or size)
        at = -(-len(self.global_bytes) // align) * align
        self.global_bytes.extend(b"\0" * (at - len(self.global_bytes)))
        self.global_symbols[m[3]] = at
        values = [x.strip() for x in (m[5] or m[6] or "").split(",") if x.strip()]
        data = bytearray()
        for v in values:
            if v.lower().startswith(("0f", "0d")):
                data += int(v[2:], 16).to_bytes(size, "little")
            else:
                data += (int(v, 0) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
        total = int(m[4] or 1) * size
        self.global_bytes.extend(data + b"\0" * (total - len(data)))

    def translate(self) -> Program:
        ptx = self.ptx
        dynamic: list[str] = []
        for m in re.finditer(r"^\s*((?:\.extern\s+|\.visible\s+)?\.(shared|global|const)\b[^;]*);", ptx, re.M):
            external = m[1].startswith(".extern")
            if m[2] == "shared" and external:
                dynamic.append(m[1])  # after the variables of known size
            elif m[2] == "shared":
                self.add_shared(m[1])
            elif not external:
                self.add_global(m[1])
        found = []
        pattern = re.compile(
            r"^\s*(?:\.visible\s+|\.weak\s+)?\.(entry|func)\s+(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?([^;{]*)([;{])",
            re.M,
        )
        for m in pattern.finditer(ptx):
            if m[6] == "{":
                end = matching_brace(ptx, m.end() - 1)
                found.append((m[1], m[2] or "", m[3], m[4] or "", ptx[m.end() : end]))
                if m[1] == "func":
                    self.functions.add(m[3])
        for text in dynamic:
            self.add_shared(text)
        kernels = [f for f in found if f[0] == "entry"]
        if len(kernels) != 1:
            raise Unsupported(f"{len(kernels)} kernels in one PTX module")
        parts, prototypes = [], []
        layout, total = [], 0
        for kind, returns, name, params, body in found:
            names = [self.param(x) for x in params.split(",") if x.strip()]
            if kind == "entry":
                table, offset = {}, 0
                for pname, size, align in names:
                    offset = -(-offset // align) * align
                    table[pname] = f"P + {offset}"
                    layout.append((offset, size))
                    offset += size
                total = offset
                fn = Function(self, name, table, body)
                parts.append(f'extern "C" void ptxsim_kernel(Thread *t, const u8 *P) {{\n{fn.translate()}\n}}\n')
                kernel = name
            else:
                outs = [self.param(x) for x in returns.split(",") if x.strip()]
                table = {n: f"p_{i}" for i, (n, _, _) in enumerate(outs + names)}
                args = ", ".join(["Thread *t"] + [f"u8 *p_{i}" for i in range(len(table))])
                c_name = "fn_" + re.sub(r"\W", "_", name)
                fn = Function(self, name, table, body)
                text = fn.translate()
                prototypes.append(f"static void {c_name}({args});\n")
                parts.append(f"static void {c_name}({args}) {{\n{text}\n}}\n")
        data = ", ".join(str(b) for b in self.global_bytes) or "0"
        source = (
            '#include "runtime.h"\n'
            + "".join(prototypes)
            + f'extern "C" {{ alignas(16) u8 ptxsim_module_data[] = {{{data}}}; '
            + f"u64 ptxsim_module_size = {len(self.global_bytes)}; }}\n"
            + "\n".join(parts)
        )
        return Program(
            name=kernel,
            source=source,
            params=layout,
            param_bytes=total,
            static_shared=self.shared_size,
            shared_cell=self.shared_cell,
            needs_fibres=self.needs_fibres,
            may_spin=self.may_spin,
            files=self.files,
            instructions=self.instructions,
            opcodes=self.opcodes,
        )

    @staticmethod
    def param(text: str) -> tuple[str, int, int]:
        text = " ".join(text.split())
        m = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[bsuf](\d+)\s+(?:\.ptr\s+)?(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?$",
            text,
        )
        if not m:
            raise Unsupported("kernel parameter " + text)
        size = int(m[2]) // 8
        return m[3], size * int(m[4] or 1), int(m[1] or size)


def translate(ptx: str) -> Program:
    """Translate a PTX module with one kernel; returns a Program."""
    return Module(ptx).translate()
