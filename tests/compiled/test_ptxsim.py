"""The executor's own tests: sample kernels against references, and planted bugs that must be found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

import ptxsim
from helpers.sparse_memory import sparse_zeros
from ptxsim import KernelFault, set_options
from ptxsim.translate import translate


@pytest.fixture(autouse=True)
def own_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test's changes to the options end with it."""
    torch.manual_seed(0)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set
    with ptxsim.install(**vars(ptxsim.current_options())):
        yield


def cases(**variants: tuple[Any, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same check with several lists of arguments, by name."""

    def wrap(check: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("arguments", variants.values(), ids=variants.keys())
        def test(arguments: tuple[Any, ...]) -> None:
            check(*arguments)

        return test

    return wrap


def finds(pattern: str, **variants: tuple[Any, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A launch that must have a finding whose kind matches the pattern."""

    def wrap(launch: Callable[..., None]) -> Callable[..., None]:
        def check(*arguments: Any) -> None:
            with pytest.raises(KernelFault) as fault:
                launch(*arguments)
            assert any(re.search(pattern, finding.kind) for finding in fault.value.findings), str(fault.value)

        return cases(**(variants or {"planted": ()}))(check)

    return wrap


def close(a, b, tol):
    err = (a.double() - b.double()).abs().max().item()
    assert err <= tol, f"largest error {err:.3g}, allowed {tol:.3g}"


def equal(a, b):
    assert a.dtype == b.dtype, f"{a.dtype} and {b.dtype}"
    same = (a == b) | ((a != a) & (b != b))
    assert same.all(), f"{(~same).sum().item()} of {same.numel()} differ, first at {(~same).flatten().nonzero()[0].item()}"


# element-wise kernels


@triton.jit
def k_add(x, y, o, n, B: tl.constexpr, MASK: tl.constexpr = True):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    if MASK:
        tl.store(o + i, tl.load(x + i, mask=m, other=0) + tl.load(y + i, mask=m, other=0), mask=m)
    else:
        tl.store(o + i, tl.load(x + i, mask=m, other=0) + tl.load(y + i, mask=m, other=0))


DTYPES = {
    "i8": torch.int8,
    "u8": torch.uint8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
}


def sample(dtype, *shape):
    if dtype == torch.bool:
        return torch.rand(*shape) > 0.5
    if dtype.is_floating_point:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)
    info = torch.iinfo(dtype)
    return torch.randint(max(info.min, -(10**12)), min(info.max, 10**12), shape, dtype=torch.int64).to(dtype)


@cases(**{k: (v,) for k, v in DTYPES.items()})
def test_add(dtype) -> None:
    x, y, o = sample(dtype, 1000), sample(dtype, 1000), torch.zeros(1000, dtype=dtype)
    k_add[(4,)](x, y, o, 1000, B=256)
    equal(o, x + y)


@triton.jit
def k_convert(x, o, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i).to(o.dtype.element_ty))


CONVERSIONS = [
    ("f32", "bf16"),
    ("f32", "f16"),
    ("bf16", "f32"),
    ("f16", "f32"),
    ("f32", "f64"),
    ("f64", "f32"),
    ("f64", "f16"),
    ("f64", "bf16"),
    ("f16", "bf16"),
    ("bf16", "f16"),
    ("f32", "i8"),
    ("f32", "i16"),
    ("f32", "i32"),
    ("f32", "i64"),
    ("f64", "i32"),
    ("f64", "i64"),
    ("i8", "f32"),
    ("u8", "f32"),
    ("i16", "f32"),
    ("i32", "f32"),
    ("i64", "f32"),
    ("i32", "f64"),
    ("i64", "f64"),
    ("i32", "i8"),
    ("i8", "i64"),
    ("u8", "i32"),
    ("i8", "f16"),
    ("i32", "bf16"),
    ("bf16", "i32"),
    ("f16", "i8"),
]


@cases(**{f"{a}_{b}": (a, b) for a, b in CONVERSIONS})
def test_convert(a, b) -> None:
    x = sample(DTYPES[a], 512)
    if a in ("f32", "f64", "f16", "bf16") and b[0] == "i":
        x = x * 10
    elif a in ("f32", "f64"):
        x[:8] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65519.0, 65520.0, 1e-8, 6e-5], dtype=x.dtype)
    o = torch.zeros(512, dtype=DTYPES[b])
    k_convert[(2,)](x, o, B=256)
    ref = x.to(DTYPES[b])
    if b in ("f16", "bf16") and a == "f64":  # torch rounds twice on the way
        close(o.float().nan_to_num(posinf=0, neginf=0), ref.float().nan_to_num(posinf=0, neginf=0), 0.02)
    else:
        equal(o, ref)


@triton.jit
def k_unary(x, o, B: tl.constexpr, OP: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i)
    if OP == "exp":
        y = tl.exp(v)
    elif OP == "log":
        y = tl.log(tl.abs(v) + 1)
    elif OP == "sin":
        y = tl.sin(v * 50000)
    elif OP == "cos":
        y = tl.cos(v)
    elif OP == "sqrt":
        y = tl.sqrt(tl.abs(v))
    elif OP == "sqrt_rn":
        y = tl.sqrt_rn(tl.abs(v))
    elif OP == "rsqrt":
        y = tl.rsqrt(tl.abs(v) + 1)
    elif OP == "sigmoid":
        y = tl.sigmoid(v)
    elif OP == "erf":
        y = tl.erf(v)
    elif OP == "floor":
        y = tl.floor(v)
    elif OP == "ceil":
        y = tl.ceil(v)
    elif OP == "tanh":
        y = libdevice.tanh(v)
    elif OP == "atan":
        y = libdevice.atan(v)
    elif OP == "expm1":
        y = libdevice.expm1(v)
    elif OP == "log1p":
        y = libdevice.log1p(tl.abs(v))
    elif OP == "pow":
        y = libdevice.pow(tl.abs(v) + 0.5, v)
    elif OP == "div":
        y = 1.0 / (1.0 + v * v)
    elif OP == "div_rn":
        y = tl.div_rn(v, v * v + 0.37)
    else:
        y = tl.fma(v, v, -v)
    tl.store(o + i, y)


UNARY = {
    "exp": torch.exp,
    "log": lambda v: (v.abs() + 1).log(),
    "cos": torch.cos,
    "sin": lambda v: (v * 50000).sin(),
    "sqrt": lambda v: v.abs().sqrt(),
    "sqrt_rn": lambda v: v.abs().double().sqrt().float(),
    "rsqrt": lambda v: (v.abs() + 1).rsqrt(),
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "tanh": torch.tanh,
    "atan": torch.atan,
    "expm1": torch.expm1,
    "log1p": lambda v: v.abs().log1p(),
    "pow": lambda v: (v.abs() + 0.5) ** v,
    "div": lambda v: 1 / (1 + v * v),
    "div_rn": lambda v: v / (v * v + 0.37),
    "fma": lambda v: (v.double() * v.double() - v.double()).float(),
}


@cases(**{k: (k,) for k in UNARY})
def test_unary(op) -> None:
    x, o = torch.randn(512) * 2, torch.zeros(512)
    k_unary[(2,)](x, o, B=256, OP=op)
    ref = UNARY[op](x)
    if op in ("sqrt_rn", "div_rn", "floor", "ceil"):
        if op == "div_rn":
            close(o, ref, 3e-7)
        else:
            equal(o, ref)
    else:
        assert torch.allclose(o, ref, rtol=2e-6, atol=2e-6), f"largest error {(o - ref).abs().max().item():.3g}"


@cases(exp=("exp",), log=("log",), sqrt=("sqrt",), div=("div",), sin=("cos",), erf=("erf",), rsqrt=("rsqrt",))
def test_unary64(op) -> None:
    x, o = torch.randn(256, dtype=torch.float64), torch.zeros(256, dtype=torch.float64)
    k_unary[(1,)](x, o, B=256, OP=op)
    assert torch.allclose(o, UNARY[op](x), rtol=1e-13, atol=1e-13), (o - UNARY[op](x)).abs().max().item()


@triton.jit
def k_int(x, y, o, B: tl.constexpr):
    i = tl.arange(0, B)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(o + i, a // b)
    tl.store(o + B + i, a % b)
    tl.store(o + 2 * B + i, (a << 3) ^ (b >> 2))
    tl.store(o + 3 * B + i, (a & b) | ~a)
    tl.store(o + 4 * B + i, tl.maximum(a, b) - tl.minimum(a, b))
    tl.store(o + 5 * B + i, a * b + tl.abs(b))


@cases(i32=(torch.int32,), i64=(torch.int64,), i16=(torch.int16,))
def test_integer(dtype) -> None:
    x, y = sample(dtype, 128), sample(dtype, 128)
    y[y == 0] = 3
    x[:2], y[:2] = 7, -2
    o = torch.zeros(6, 128, dtype=dtype)
    k_int[(1,)](x, y, o, B=128)
    equal(o[0], torch.div(x, y, rounding_mode="trunc"))
    equal(o[1], torch.fmod(x, y))
    equal(o[2], (x << 3) ^ (y >> 2))
    equal(o[3], (x & y) | ~x)
    equal(o[4], torch.maximum(x, y) - torch.minimum(x, y))
    equal(o[5], x * y + y.abs())


@triton.jit
def k_umulhi(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(o + i, tl.umulhi(v, v + 12345))
    tl.store(o + B + i, libdevice.clz(v))
    tl.store(o + 2 * B + i, libdevice.popc(v))


def test_bit_functions() -> None:
    x, o = torch.randint(0, 2**31 - 20000, (128,), dtype=torch.int32), torch.zeros(3, 128, dtype=torch.int32)
    k_umulhi[(1,)](x, o, B=128)
    v = x.tolist()
    equal(o[0], torch.tensor([a * (a + 12345) >> 32 for a in v], dtype=torch.int32))
    equal(o[1], torch.tensor([32 - a.bit_length() for a in v], dtype=torch.int32))
    equal(o[2], torch.tensor([bin(a).count("1") for a in v], dtype=torch.int32))


@triton.jit
def k_half(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(o + i, v * v + v)
    tl.store(o + B + i, v - v * 2)
    tl.store(o + 2 * B + i, tl.maximum(v, 0.5) - tl.abs(v))
    tl.store(o + 3 * B + i, tl.where(v > 0, -v, v))
    tl.store(o + 4 * B + i, (v.to(tl.float32) * 1.37 + 0.1).to(v.dtype))


@cases(bf16=(torch.bfloat16,), f16=(torch.float16,))
def test_half_arithmetic(dtype) -> None:
    x, o = torch.randn(512).to(dtype), torch.zeros(5, 512, dtype=dtype)
    k_half[(1,)](x, o, B=512)
    close(o[0].float(), (x.double() * x.double() + x.double()).to(dtype).float(), 0.13)
    equal(o[1], x - x * 2)
    equal(o[2], (torch.clamp(x, min=0.5) - x.abs()))
    equal(o[3], torch.where(x > 0, -x, x))
    close(o[4].float(), (x.float() * 1.37 + 0.1).to(dtype).float(), 0.04)


@triton.jit
def k_bool(x, m, o, n, flag, B: tl.constexpr):
    i = tl.arange(0, B)
    q = tl.load(m + i, mask=i < n, other=0).to(tl.int1)
    v = tl.load(x + i, mask=(i < n) & q, other=-1.0)
    if flag:
        v = v * 2
    tl.store(o + i, v > 0, mask=i < n)


@cases(yes=(True,), no=(False,))
def test_bool_tensors(flag) -> None:
    x, m, o = torch.randn(100), torch.rand(100) > 0.5, torch.zeros(100, dtype=torch.bool)
    k_bool[(1,)](x, m, o, 100, flag, B=128)
    equal(o, torch.where(m, x, torch.full_like(x, -1)) > 0)


@triton.jit
def k_scalars(o, none, yes, small, big, f, one, pair, K: tl.constexpr, NAME: tl.constexpr):
    s = small.to(tl.float64) + big.to(tl.float64) + f + one + K
    if none is None:
        s += 1000
    if yes:
        s += 0.5
    if NAME == "abc":
        s += pair[0] * 2 + pair[1]
    tl.store(o, s)


def test_scalar_arguments() -> None:
    o = torch.zeros(1, dtype=torch.float64)
    k_scalars[(1,)](o, None, True, -7, 2**40 + 3, 0.25, 1, (5, 0.125), K=16, NAME="abc")
    close(o, torch.tensor([-7 + 2.0**40 + 3 + 0.25 + 1 + 16 + 1000 + 0.5 + 10 + 0.125], dtype=torch.float64), 1e-3)


@triton.jit
def k_grid3(o, B: tl.constexpr):
    x = tl.program_id(0)
    y = tl.program_id(1)
    z = tl.program_id(2)
    at = ((z * tl.num_programs(1) + y) * tl.num_programs(0) + x) * B
    tl.store(o + at + tl.arange(0, B), tl.zeros((B,), tl.int32) + x + 100 * y + 10000 * z)


def test_grid_3d() -> None:
    o = torch.zeros(4, 3, 2, 64, dtype=torch.int32)
    k_grid3[(2, 3, 4)](o, B=64)
    z, y, x = torch.meshgrid(torch.arange(4), torch.arange(3), torch.arange(2), indexing="ij")
    equal(o, (x + 100 * y + 10000 * z).to(torch.int32)[..., None].expand(4, 3, 2, 64).contiguous())


@triton.jit
def k_strided(x, o, n, sx, so, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i * so, tl.load(x + i * sx, mask=i < n) * 2, mask=i < n)


def test_views() -> None:
    big = torch.arange(1000.0)
    x, out = big[100:700:3], torch.zeros(50, 4)
    o = out[:, 1]
    k_strided[(1,)](x, o, 50, x.stride(0), o.stride(0), B=64)
    equal(o, x[:50] * 2)
    assert (out[:, [0, 2, 3]] == 0).all()


def test_storage_bounds() -> None:
    set_options(bounds="storage")
    arena = torch.zeros(2048)
    x, o = torch.randn(1000), arena[:1000]
    k_add[(4,)](x, x, o, 1000, B=256, MASK=False)  # reaches the rest of the arena
    equal(o, x + x)


@triton.jit
def k_descriptor(a, o, M, N, B: tl.constexpr):
    out = tl.make_tensor_descriptor(o, shape=[M, N], strides=[N, 1], block_shape=[B, B])
    out.store([tl.program_id(0) * B, 0], a.load([tl.program_id(0) * B, 0]) + 1)


def test_tensor_descriptors() -> None:
    a, o = torch.randn(40, 16), torch.zeros(40, 16)
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8))
    try:
        k_descriptor[(3,)](TensorDescriptor.from_tensor(a, [16, 16]), o, 40, 16, B=16)
        equal(o, a + 1)
    except ptxsim.Unsupported:  # tensor maps (TMA)
        assert ptxsim.current_options().arch >= 90


@triton.jit
def k_pointers(table, o, n, B: tl.constexpr):
    p = tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, B)
    tl.store(o + tl.program_id(0) * B + i, tl.load(p + i, mask=i < n, other=0.0))


def test_pointer_table() -> None:
    xs = [torch.randn(40) for _ in range(3)]
    ptxsim.register(*xs)
    table, o = torch.tensor([x.data_ptr() for x in xs]), torch.zeros(3, 64)
    k_pointers[(3,)](table, o, 40, B=64)
    equal(o[:, :40].contiguous(), torch.stack(xs))
    ptxsim.forget()


@triton.jit
def k_asm(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    y = tl.inline_asm_elementwise(
        "{ .reg .f32 t; add.f32 t, $1, $1; mul.f32 $0, t, 0f3FC00000; }",
        "=f,f",
        [tl.load(x + i)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
    tl.store(o + i, y)


def test_inline_assembly() -> None:
    x, o = torch.randn(128), torch.zeros(128)
    k_asm[(1,)](x, o, B=128)
    equal(o, (x + x) * 1.5)


@triton.jit
def k_rand(o, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.rand(42, i))
    tl.store(o + B + i, tl.randn(7, i))


def test_random_numbers() -> None:
    o = torch.zeros(2, 512)
    k_rand[(1,)](o, B=512)
    assert abs(o[0].mean() - 0.5) < 0.05 and abs(o[0, 0].item() - 0.774080157) < 1e-6 and abs(o[1].std() - 1) < 0.1


# reductions, scans, layouts


@triton.jit
def k_softmax(x, o, n, B: tl.constexpr):
    r = tl.program_id(0)
    i = tl.arange(0, B)
    v = tl.load(x + r * n + i, mask=i < n, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(o + r * n + i, e / tl.sum(e, 0), mask=i < n)


def softmax(warps):
    x, o = torch.randn(4, 200), torch.zeros(4, 200)
    k_softmax[(4,)](x, o, 200, B=256, num_warps=warps)
    close(o, x.softmax(1), 1e-6)


test_softmax = cases(w1=(1,), w4=(4,), w8=(8,))(softmax)


@triton.jit
def combine(a0, a1, b0, b1):
    return a0 * b0, a1 * b0 + b1


@triton.jit
def k_scan(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(o + i, tl.cumsum(v, 0))
    _, b = tl.associative_scan((tl.zeros((B,), tl.float32) + 0.5, v), 0, combine)
    tl.store(o + B + i, b)
    tl.store(o + 2 * B + i, tl.flip(v, 0))
    tl.store(o + 3 * B + i, tl.sort(v, 0))
    tl.store(o + 4 * B, tl.argmax(v, 0).to(tl.float32))
    tl.store(o + 4 * B + 1, tl.min(v, 0))


def test_scans() -> None:
    x, o = torch.randn(256), torch.zeros(5, 256)
    k_scan[(1,)](x, o, B=256)
    close(o[0], x.cumsum(0), 1e-4)
    ref, v = torch.zeros(256), 0.0
    for i in range(256):
        v = v * 0.5 + x[i].item()
        ref[i] = v
    close(o[1], ref, 1e-5)
    equal(o[2], x.flip(0))
    equal(o[3], x.sort().values)
    assert o[4, 0] == x.argmax() and o[4, 1] == x.min()


@triton.jit
def k_layout(x, o, h, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    z = tl.reshape((v > 0).to(tl.int32), (B // 32, 32))
    tl.store(o + tl.arange(0, B // 32), tl.sum(z << tl.arange(0, 32)[None, :], 1))
    a, b = tl.split(tl.reshape(v, (B // 2, 2)))
    tl.store(h + i, tl.interleave(b, a))
    t = tl.trans(tl.reshape(v, (B // 32, 32)))
    tl.store(h + B + i, tl.reshape(t, (B,)))
    tl.store(h + 2 * B + i, tl.gather(v, (i * 7) % B, 0))


def test_layouts() -> None:
    x, o, h = torch.randn(1024), torch.zeros(32, dtype=torch.int32), torch.zeros(3, 1024)
    k_layout[(1,)](x, o, h, B=1024)
    equal(o, ((x > 0).view(32, 32).long() << torch.arange(32)).sum(1).to(torch.int32))
    equal(h[0], x.view(-1, 2).flip(1).reshape(-1))
    equal(h[1], x.view(32, 32).t().reshape(-1))
    equal(h[2], x[(torch.arange(1024) * 7) % 1024])


@triton.jit
def k_histogram(x, o, B: tl.constexpr, N: tl.constexpr):
    tl.store(o + tl.arange(0, N), tl.histogram(tl.load(x + tl.arange(0, B)), N))


def test_histogram() -> None:
    x, o = torch.randint(0, 64, (512,), dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    k_histogram[(1,)](x, o, B=512, N=64)
    equal(o, torch.bincount(x, minlength=64).to(torch.int32))


# time loops


@triton.jit
def k_neuron(x, z, v, T, M, decay, threshold, B: tl.constexpr, MUTANT: tl.constexpr = ""):
    i = tl.program_id(0) * B + tl.arange(0, B)
    if MUTANT == "overlap":
        i = tl.program_id(0) * (B // 2) + tl.arange(0, B)
    m = i < M
    if MUTANT == "off_by_one":
        m = i <= M
    u = tl.load(v + i, mask=m, other=0)
    M64 = tl.cast(M, tl.int64)
    for t in range(T):
        u = u * decay + tl.load(x + t * M64 + i, mask=m, other=0)
        s = u > threshold
        u = tl.where(s, 0.0, u)
        if MUTANT == "no_mask":
            tl.store(z + t * M64 + i, s.to(z.dtype.element_ty))
        else:
            tl.store(z + t * M64 + i, s.to(z.dtype.element_ty), mask=m)
    tl.store(v + i, u, mask=m)


def neuron(dtype=torch.float32, spikes=torch.float32, mutant=""):
    T, M = 7, 1000
    x, z, v = torch.randn(T, M, dtype=dtype), torch.zeros(T, M, dtype=spikes), torch.rand(M, dtype=dtype)
    u, ref = v.clone(), torch.zeros(T, M, dtype=spikes)
    k_neuron[(4,)](x, z, v, T, M, 0.875, 1.0, B=256, MUTANT=mutant)
    for t in range(T):
        u = (u.double() * 0.875 + x[t].double()).to(dtype)
        s = u > 1.0
        u = torch.where(s, torch.zeros_like(u), u)
        ref[t] = s.to(spikes)
    equal(z, ref)
    close(v, u, 1e-6)


@cases(
    f32=(torch.float32, torch.float32),
    int8=(torch.float32, torch.int8),
    f64=(torch.float64, torch.float64),
    bool=(torch.float32, torch.bool),
    bf16_out=(torch.float32, torch.bfloat16),
)
def test_neurons(dtype, spikes) -> None:
    neuron(dtype, spikes)


@triton.jit
def k_recurrent(x, w, z, T, Bt, decay, N: tl.constexpr, BB: tl.constexpr, P: tl.constexpr):
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    n = tl.arange(0, N)
    m = (b < Bt)[:, None]
    W = tl.load(w + n[:, None] * N + n[None, :])
    v = tl.zeros((BB, N), tl.float32)
    s = tl.zeros((BB, N), tl.float32)
    at = b[:, None] * N + n[None, :]
    for t in range(T):
        c = tl.dot(s.to(W.dtype), W, input_precision=P) + tl.load(x + t * Bt * N + at, mask=m, other=0.0)
        v = v * decay + c
        f = v > 1.0
        s = f.to(tl.float32)
        v = tl.where(f, 0.0, v)
        tl.store(z + t * Bt * N + at, s, mask=m)


@cases(tf32=(torch.float32, "tf32"), ieee=(torch.float32, "ieee"), bf16=(torch.bfloat16, "ieee"))
def test_recurrent(dtype, precision) -> None:
    T, Bt, N = 5, 23, 32
    x = torch.randint(-8, 9, (T, Bt, N)) / 8
    w = (torch.randint(-8, 9, (N, N)) / 16).to(dtype)
    z = torch.zeros(T, Bt, N)
    k_recurrent[(2,)](x, w, z, T, Bt, 0.5, N=N, BB=16, P=precision)
    v, s = torch.zeros(Bt, N), torch.zeros(Bt, N)
    for t in range(T):
        v = v * 0.5 + s @ w.float() + x[t]
        f = v > 1
        s, v = f.float(), torch.where(f, torch.zeros(()), v)
        equal(z[t], s)


# tl.dot


@triton.jit
def k_matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, P: tl.constexpr, TB: tl.constexpr):
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), c.dtype.element_ty)
    for q in range(0, K, BK):
        kk = q + k
        A = tl.load(a + i[:, None] * K + kk[None, :], mask=(i < M)[:, None] & (kk < K)[None, :], other=0)
        if TB:
            B = tl.trans(tl.load(b + j[:, None] * K + kk[None, :], mask=(j < N)[:, None] & (kk < K)[None, :], other=0))
        else:
            B = tl.load(b + kk[:, None] * N + j[None, :], mask=(kk < K)[:, None] & (j < N)[None, :], other=0)
        acc = tl.dot(A, B, acc, input_precision=P, out_dtype=acc.dtype)
    tl.store(c + i[:, None] * N + j[None, :], acc, mask=(i < M)[:, None] & (j < N)[None, :])


def matmul(dtype, shape, block, precision="ieee", tol=1e-4, transposed=False, **options):
    M, N, K = shape
    if dtype == torch.int8:
        a, b = torch.randint(-128, 127, (M, K), dtype=dtype), torch.randint(-128, 127, (K, N), dtype=dtype)
        c = torch.zeros(M, N, dtype=torch.int32)
    else:
        a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
        c = torch.zeros(M, N, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    BM, BN, BK = block
    grid = (-(-M // BM), -(-N // BN))
    k_matmul[grid](
        a,
        b.t().contiguous() if transposed else b,
        c,
        M,
        N,
        K,
        BM=BM,
        BN=BN,
        BK=BK,
        P=precision,
        TB=transposed,
        **options,
    )
    close(c, a.double() @ b.double(), tol)


SMALL, WIDE = ((50, 64, 72), (32, 64, 32)), ((128, 64, 64), (64, 64, 32))


@cases(
    ieee=(torch.float32, *SMALL, "ieee", 1e-4),
    tf32=(torch.float32, *SMALL, "tf32", 5e-2),
    tf32x3=(torch.float32, *SMALL, "tf32x3", 1e-4),
    bf16=(torch.bfloat16, *SMALL),
    f16=(torch.float16, *SMALL),
    int8=(torch.int8, *SMALL, "ieee", 0),
    bf16_transposed=(torch.bfloat16, *SMALL, "ieee", 1e-4, True),
)
def test_dot(*args) -> None:
    matmul(*args)


@cases(
    bf16=(torch.bfloat16, *WIDE),
    f16=(torch.float16, *WIDE),
    f16_transposed=(torch.float16, *WIDE, "ieee", 1e-4, True),
    tf32=(torch.float32, *WIDE, "tf32", 5e-2),
    int8=(torch.int8, *WIDE, "ieee", 0),
    n128=(torch.bfloat16, (64, 128, 64), (64, 128, 64)),
    n32=(torch.bfloat16, (64, 32, 64), (64, 32, 64)),
    n16=(torch.bfloat16, (64, 16, 64), (64, 16, 64)),
)
def test_dot_wide(*args) -> None:
    matmul(*args)


@cases(s1=(1,), s2=(2,), s3=(3,), s4=(4,))
def test_dot_pipelined(stages) -> None:
    matmul(torch.bfloat16, (32, 32, 256), (32, 32, 32), num_stages=stages)


def test_dot_f64() -> None:
    matmul(torch.float64, (32, 32, 64), (16, 16, 16), tol=1e-10)


# atomics and communication between blocks


@triton.jit
def k_scatter(idx, w, o, n, B: tl.constexpr, OP: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    p = tl.load(idx + i, mask=m, other=0)
    v = tl.load(w + i, mask=m, other=0)
    if OP == "add":
        tl.atomic_add(o + p, v, mask=m)
    elif OP == "relaxed":
        tl.atomic_add(o + p, v, mask=m, sem="relaxed", scope="sys")
    elif OP == "max":
        tl.atomic_max(o + p, v, mask=m)
    elif OP == "min":
        tl.atomic_min(o + p, v, mask=m, sem="release")
    elif OP == "and":
        tl.atomic_and(o + p, v, mask=m)
    elif OP == "or":
        tl.atomic_or(o + p, v, mask=m, scope="gpu")
    else:
        tl.atomic_xor(o + p, v, mask=m)


ATOMICS = {f"add_{k}": ("add", DTYPES[k]) for k in ("f32", "f64", "i32", "i64", "f16", "bf16")}
ATOMICS |= {f"{op}_i32": (op, torch.int32) for op in ("relaxed", "max", "min", "and", "or", "xor")}
ATOMICS |= {
    "max_f32": ("max", torch.float32),
    "min_i64": ("min", torch.int64),
    "relaxed_f32": ("relaxed", torch.float32),
}


@cases(**ATOMICS)
def test_atomics(op, dtype) -> None:
    n = 300
    idx, o = torch.randint(0, 37, (n,), dtype=torch.int32), torch.zeros(38, dtype=dtype)
    w = torch.randint(-4, 5, (n,)).to(dtype)
    ref = o.clone().long()
    for i, v in zip(idx.tolist(), w.tolist(), strict=True):
        v = int(v)
        old = ref[i].item()
        ref[i] = {
            "add": old + v,
            "relaxed": old + v,
            "max": max(old, v),
            "min": min(old, v),
            "and": old & v,
            "or": old | v,
            "xor": old ^ v,
        }[op]
    k_scatter[(2,)](idx, w, o, n, B=256, OP=op)
    equal(o.long(), ref)


@triton.jit
def k_exchange(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    j = i.to(x.dtype.element_ty)
    old = tl.atomic_xchg(x + i, j + 100)
    tl.store(o + i, old)
    got = tl.atomic_cas(x + i, tl.where(j % 2 == 0, j + 100, 0).to(j.dtype), j * 0 - 1, sem="acquire", scope="cta")
    tl.store(o + B + i, got)


@cases(i32=(torch.int32,), i64=(torch.int64,))
def test_exchange(dtype) -> None:
    x = torch.arange(128, dtype=dtype)
    o, ref = torch.zeros(2, 128, dtype=dtype), torch.arange(128, dtype=dtype)
    k_exchange[(1,)](x, o, B=128)
    equal(o[0], ref)
    equal(o[1], ref + 100)
    equal(x, torch.where(ref % 2 == 0, torch.full_like(ref, -1), ref + 100))


@triton.jit
def k_lock(lock, data, o, ROUNDS: tl.constexpr, B: tl.constexpr, LOCKED: tl.constexpr):
    i = tl.arange(0, B)
    for _ in range(ROUNDS):
        if LOCKED:
            while tl.atomic_cas(lock, 0, 1, sem="acquire") == 1:
                pass
            tl.debug_barrier()
        tl.store(data + i, tl.load(data + i) + 1.0)
        if LOCKED:
            tl.debug_barrier()
            tl.atomic_xchg(lock, 0, sem="release")


def test_spin_lock() -> None:
    lock, data, o = torch.zeros(1, dtype=torch.int32), torch.zeros(64), torch.zeros(1)
    k_lock[(5,)](lock, data, o, ROUNDS=3, B=64, LOCKED=True)
    equal(data, torch.full((64,), 15.0))


@triton.jit
def k_last_block(x, partial, count, o, B: tl.constexpr, NB: tl.constexpr, SEM: tl.constexpr):
    p = tl.program_id(0)
    s = tl.sum(tl.load(x + p * B + tl.arange(0, B)))
    tl.store(partial + p, s)
    tl.debug_barrier()
    if tl.atomic_add(count, 1, sem=SEM) == tl.num_programs(0) - 1:
        tl.debug_barrier()
        i = tl.arange(0, NB)
        tl.store(o, tl.sum(tl.load(partial + i, mask=i < tl.num_programs(0), other=0.0)))


def last_block(sem):
    x, partial, count, o = (
        torch.randint(-5, 5, (6 * 128,)).float(),
        torch.zeros(6),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(1),
    )
    k_last_block[(6,)](x, partial, count, o, B=128, NB=8, SEM=sem)
    equal(o, x.sum(0, keepdim=True))


def test_last_block_reduces() -> None:
    last_block("acq_rel")


@triton.jit
def k_flag(flag, data, o, SEM: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(data, 42.0)
        tl.atomic_xchg(flag, 1, sem=SEM)
    else:
        while tl.atomic_add(flag, 0, sem="acquire") == 0:
            pass
        tl.store(o, tl.load(data))


def message(sem):
    flag, data, o = torch.zeros(1, dtype=torch.int32), torch.zeros(1), torch.zeros(1)
    k_flag[(2,)](flag, data, o, SEM=sem)
    equal(o, torch.full((1,), 42.0))


def test_message_by_flag() -> None:
    message("release")


@triton.jit
def k_fence_flag(flag, data, o, FENCED: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(data, 42.0)
        if FENCED:
            tl.inline_asm_elementwise("fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.atomic_xchg(flag, 1, sem="relaxed")
    else:
        while tl.atomic_add(flag, 0, sem="relaxed") == 0:
            pass
        if FENCED:
            tl.inline_asm_elementwise("fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
            tl.debug_barrier()
        tl.store(o, tl.load(data))


def fenced(on):
    flag, data, o = torch.zeros(1, dtype=torch.int32), torch.zeros(1), torch.zeros(1)
    k_fence_flag[(2,)](flag, data, o, FENCED=on)
    equal(o, torch.full((1,), 42.0))


def test_message_by_fence() -> None:
    fenced(True)


@triton.jit
def k_grid_barrier(bar, a, o, T, NP, B: tl.constexpr, MUTANT: tl.constexpr):
    p = tl.program_id(0)
    i = tl.arange(0, B)
    q = (p + 1) % NP
    v = tl.zeros((B,), tl.float32) + p
    for t in range(T):
        slot = 0 if MUTANT == "single_buffer" else t % 2
        tl.store(a + (slot * NP + p) * B + i, v)
        tl.debug_barrier()
        target = (t + 1) * NP
        if MUTANT == "one_short":
            target -= 1
        if MUTANT == "one_long":
            target += 1
        if MUTANT == "relaxed":
            tl.atomic_add(bar, 1, sem="relaxed")
            while tl.atomic_add(bar, 0, sem="relaxed") < target:
                pass
        else:
            tl.atomic_add(bar, 1, sem="acq_rel", scope="gpu")
            while tl.atomic_add(bar, 0, sem="acq_rel", scope="gpu") < target:
                pass
        tl.debug_barrier()
        v = v * 0.5 + tl.load(a + (slot * NP + q) * B + i)
    tl.store(o + p * B + i, v)


def grid_barrier(mutant="", blocks=4, **options):
    T, B = 5, 64
    bar, a, o = torch.zeros(1, dtype=torch.int32), torch.zeros(2, blocks, B), torch.zeros(blocks, B)
    k_grid_barrier[(blocks,)](bar, a, o, T, blocks, B=B, MUTANT=mutant, num_warps=2, **options)
    v = torch.arange(float(blocks))[:, None].expand(blocks, B)
    for _ in range(T):
        v = v * 0.5 + v.roll(-1, 0)
    equal(o, v.contiguous())


@cases(plain=(), cooperative=({"launch_cooperative_grid": True},))
def test_software_grid_barrier(options=None) -> None:
    grid_barrier(**(options or {}))


def test_cooperative_limit() -> None:
    set_options(sm_count=1, resident=8)
    try:
        grid_barrier(blocks=9, launch_cooperative_grid=True)
    except RuntimeError as e:
        assert "cooperative" in str(e), e
        return
    raise AssertionError("a cooperative launch above the device's capacity was accepted")


# debugging aids


@triton.jit
def k_checked(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i, mask=i < n, other=1.0)
    tl.device_assert(v > 0, "value must be positive")
    tl.store(o + i, v, mask=i < n)


def test_device_assert_passes() -> None:
    x, o = torch.rand(100) + 0.1, torch.zeros(100)
    k_checked[(1,)](x, o, 100, B=128, debug=True)
    equal(o, x)


@triton.jit
def k_print(x, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.device_print("value ", tl.load(x + i), i)


def test_device_print(capsys) -> None:
    k_print[(1,)](torch.arange(32.0) / 2, B=32, num_warps=1)
    text = capsys.readouterr().out
    assert "value" in text and "15.5" in text


@triton.autotune(
    configs=[triton.Config({"B": 64}), triton.Config({"B": 256}, num_warps=8), triton.Config({"B": 128}, num_warps=2)],
    key=["n"],
    restore_value=["o"],
)
@triton.jit
def k_tuned(x, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i, mask=i < n) * 3 + tl.load(o + i, mask=i < n), mask=i < n)


def test_autotune() -> None:
    picked = []
    for _ in range(2):
        x, o = torch.randn(1000), torch.zeros(1000)
        k_tuned.cache.clear()
        k_tuned[lambda meta: (triton.cdiv(1000, meta["B"]),)](x, o, 1000)
        close(o, x * 3, 1e-6)
        picked.append(str(k_tuned.best_config))
    assert picked[0] == picked[1]
    assert triton.testing.do_bench(lambda: k_tuned[(lambda meta: (triton.cdiv(1000, meta["B"]),))](x, o, 1000)) > 0


# planted bugs


@finds("OOB_STORE")
def test_store_without_mask() -> None:
    x, y, o = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    k_add[(4,)](x, y, o, 1000, B=256, MASK=False)


@finds("OOB_STORE")
def test_store_into_neighbour() -> None:
    arena = torch.zeros(2048)
    o, other = arena[:1000], arena[1000:]
    k_add[(4,)](torch.randn(1000), other, o, 1000, B=256, MASK=False)


@finds("OOB_LOAD|OOB_STORE", no_mask=("no_mask",), off_by_one=("off_by_one",))
def test_neuron_mutant(mutant) -> None:
    neuron(mutant=mutant)


@finds("RACE_WRITE_AFTER_READ|RACE_READ_AFTER_WRITE|RACE_WRITE_WRITE")
def test_overlapping_programs() -> None:
    neuron(mutant="overlap")


@finds("RACE")
def test_unlocked_update() -> None:
    k_lock[(5,)](torch.zeros(1, dtype=torch.int32), torch.zeros(64), torch.zeros(1), ROUNDS=3, B=64, LOCKED=False)


@finds("RACE")
def test_last_block_relaxed() -> None:
    last_block("relaxed")


@finds("RACE")
def test_message_relaxed() -> None:
    message("relaxed")


@finds("RACE")
def test_message_without_fence() -> None:
    fenced(False)


@finds("RACE", relaxed=("relaxed",), single_buffer=("single_buffer",), one_short=("one_short",))
def test_grid_barrier_mutant(mutant) -> None:
    grid_barrier(mutant)


def drop_barrier(which):
    """Remove one or all (None) bar.sync from the PTX."""

    def transform(text):
        found = list(re.finditer(r"\bbar\.sync\b[^;]*;", text))
        for m in reversed(found if which is None else [found[which]]):
            text = text[: m.start()] + text[m.end() :]
        return text

    return transform


@finds("SHARED_RACE", first=(0,), second=(1,))
def test_reduction_without_barrier(which) -> None:
    set_options(transform=drop_barrier(which))
    softmax(4)


@finds("SHARED_RACE")
def test_dot_without_barrier() -> None:
    set_options(transform=drop_barrier(None))
    matmul(torch.float32, *SMALL, "tf32", 5e-2)


@finds("LIVELOCK")
def test_grid_barrier_waits_for_too_many() -> None:
    set_options(livelock_steps=100_000)
    grid_barrier("one_long")


@finds("LIVELOCK")
def test_grid_barrier_not_resident() -> None:
    set_options(resident=3, livelock_steps=100_000)
    grid_barrier()


@finds("ASSERT")
def test_device_assert_fails() -> None:
    x = torch.rand(100) + 0.1
    x[57] = -1
    k_checked[(1,)](x, torch.zeros(100), 100, B=128, debug=True)


@triton.jit
def k_trap(x, B: tl.constexpr):
    v = tl.load(x + tl.arange(0, B))
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.f32 p, $1, 0f00000000; @p trap; mov.u32 $0, 0; }",
        "=r,f",
        [v],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@finds("TRAP")
def test_trap_instruction() -> None:
    k_trap[(1,)](torch.tensor([1.0] * 31 + [-1.0]), B=32, num_warps=1)


@triton.jit
def k_deadlock(x, B: tl.constexpr):
    v = tl.load(x + tl.arange(0, B))
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.f32 p, $1, 0f00000000; @p bar.sync 1, 64; mov.u32 $0, 0; }",
        "=r,f",
        [v],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@finds("DEADLOCK")
def test_divergent_barrier() -> None:
    k_deadlock[(1,)](torch.tensor([1.0] * 63 + [-1.0]), B=64, num_warps=2)


@triton.jit
def k_misaligned(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    p = (x.to(tl.int64) + 2).to(tl.pointer_type(tl.float32))
    tl.store(o + i, tl.load(p + i, mask=i < B - 1, other=0.0))


@finds("MISALIGNED")
def test_misaligned_load() -> None:
    k_misaligned[(1,)](torch.randn(64), torch.zeros(64), B=64)


@triton.jit
def k_wild(x, o, B: tl.constexpr):
    i = tl.arange(0, B)
    p = tl.load(x).to(tl.pointer_type(tl.float32))
    tl.store(o + i, tl.load(p + i))


@finds("^(WILD|NULL)_LOAD", wild=(0x123456789000,), null=(0,))
def test_bad_pointer(address) -> None:
    k_wild[(1,)](torch.tensor([address]), torch.zeros(64), B=64)


@triton.jit
def k_wrap(x, o, M, t, B: tl.constexpr, WIDE: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    at = (t * tl.cast(M, tl.int64) if WIDE else t * M) + i
    tl.store(o + at, tl.load(x + i, mask=i < M, other=0.0), mask=i < M)


def big_offset(wide):
    M = (1 << 30) + 64
    o, x = sparse_zeros(3 * M), sparse_zeros(M)
    last = (M - 1) // 1024
    x[M - 3 :] = 5.0
    set_options(first_block=(last, 0, 0), blocks=(1, 1, 1))
    k_wrap[(last + 1,)](x, o, M, 2, B=1024, WIDE=wide)
    equal(o[3 * M - 4 :], torch.tensor([0.0, 5.0, 5.0, 5.0]))


def test_offsets_above_2_31() -> None:
    big_offset(True)


@finds("OOB_STORE")
def test_offset_wraps_at_32_bits() -> None:
    big_offset(False)


UNKNOWN = """
.version 8.0
.target sm_80
.file 1 "kernel.py"
.visible .entry kernel(.param .u64 p)
{
.reg .b32 %r<2>;
.loc 1 17 0
INSTRUCTION
ret;
}
"""


@pytest.mark.parametrize("instruction", ["frobnicate.b32 %r0, %r1;", "add.rn.ftz.newmode.f32 %r0, %r1, %r1;"])
def test_an_unknown_instruction_raises_with_its_name_and_line(instruction) -> None:
    """Nothing is guessed, neither an opcode nor a modifier."""
    opcode = re.escape(instruction.split()[0])
    with pytest.raises(ptxsim.Unsupported, match=rf"{opcode} .*kernel\.py:17"):
        translate(UNKNOWN.replace("INSTRUCTION", instruction))
