"""The CPU path beyond what it shares with the Triton kernels: threads, processes, layouts, and its compiled code."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

import coba_triton
from coba_triton import CobaLIFFeedForwardState, coba_lif_feed_forward_integral
from coba_triton.backend.cpu import cache as kernel_cache
from coba_triton.backend.cpu import feed_forward as kernels
from coba_triton.backend.cpu import numba_bridge, rows
from coba_triton.tools.problems import Problem, network_problem, problem, recurrent_problem
from helpers.bits import assert_same_bits

ROOT = Path(__file__).resolve().parents[2]


def large(steps: int = 40, neurons: int = 12_345, dtype: torch.dtype = torch.float32) -> Problem:
    """More than one tile a thread, more than one thread, and no whole number of either."""
    return problem(steps, (neurons,), dtype)


def everything(case: Problem, backend: str = "cpu", **options) -> list[torch.Tensor]:
    outputs, grads = case.gradients(backend, **options)
    return [*outputs, *grads.values()]


def test_number_of_threads_changes_no_bit(threads) -> None:
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(everything(large()))
        assert torch.get_num_threads() == count
    for result in results[1:]:
        # gradients by shared parameters are summed over the neurons by torch.sum, after the kernels
        assert_same_bits(result[:8], results[0][:8])


@pytest.mark.parametrize("neurons", [63, 64, 65, 1023, 1024, 1025, 2049])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sizes_around_a_tile(neurons, dtype, threads) -> None:
    threads(2)
    case = problem(130, (neurons,), dtype)
    assert_same_bits(everything(case)[:8], everything(case, "reference")[:8])


def test_several_python_threads_at_once(threads) -> None:
    threads(2)
    expected = everything(large())[:8]
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: everything(large())[:8], range(8)):
            assert_same_bits(result, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_after_a_fork(threads) -> None:
    """The parent's threads are not there in a child."""
    threads(2)
    case = large(400, 1000)
    expected = case.run("cpu")[0].numpy()
    child = os.fork()
    if child == 0:  # compares with NumPy: PyTorch's own threads hang in a child
        os._exit(0 if np.array_equal(case.run("cpu")[0].numpy(), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(case.run("cpu")[0].numpy(), expected)


def test_an_error_in_a_thread_is_raised(threads, monkeypatch) -> None:
    from coba_triton.backend.cpu import launch as cpu_launch

    threads(2)

    def fail(*args: object) -> None:
        if args[-2] > 0:  # not the part of the calling thread
            raise MemoryError("no more")

    monkeypatch.setattr(cpu_launch.feed_forward.feed_forward, "forward_kernel", lambda: fail)
    with pytest.raises(MemoryError, match="no more"):
        large().run("cpu")


def test_in_a_stream_of_blocks_no_thread_waits_for_another(threads) -> None:
    """While one thread is busy with something else, the other one goes on to the next blocks; the bits are the same."""
    from coba_triton.backend.cpu import launch as cpu_launch
    from coba_triton.ops.constants import constants_table

    threads(2)
    case = large(4096, 1000)
    expected, final = case.run("reference", spike_dtype="bits")
    table = constants_table(case.record("super"), case.dt, torch.float32, torch.device("cpu"), torch.Size([1000]))
    busy = threading.Event()
    with (
        closing(cpu_launch.ForwardStream(table, False, torch.stack(list(case.state)), 2048)) as stream,
        ExitStack() as at_last,
    ):
        at_last.callback(busy.set)
        assert len(stream._threads) == 2
        stream._threads[0].submit(busy.wait)
        words = torch.empty_like(expected).split(2048 // 32)
        blocks = [stream.submit(x, part) for x, part in zip(case.x.split(2048), words, strict=True)]
        for _, (_, second) in blocks:
            second.result()
        assert not any(first.done() for _, (first, _) in blocks)
        busy.set()
        for _, jobs in blocks:
            for job in jobs:
                job.result()
    assert_same_bits([torch.cat(words), *blocks[-1][0]], [expected, *final])


def test_misaligned_memory() -> None:
    """A tensor from a buffer may begin at any byte."""
    case = problem(33, (50,))
    raw = np.zeros(case.x.nbytes + 1, np.uint8)
    raw[1:] = np.frombuffer(case.x.numpy().tobytes(), np.uint8)
    expected = case.run("reference")
    case.x = torch.frombuffer(raw, dtype=torch.float32, offset=1).view(33, 50)
    assert case.x.data_ptr() % 4
    spikes, state = case.run("cpu")
    assert_same_bits([spikes, *state], [expected[0], *expected[1]])


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("step", [1, 3])
def test_every_element_type_with_a_stride_and_a_float64_state(x_dtype, step) -> None:
    case = problem(20, (7,), x_dtype)
    wide = case.x.repeat_interleave(step, 1)
    case.x = wide[:, ::step]
    case.state = CobaLIFFeedForwardState(*(field.double() for field in case.state))
    spikes, state = case.run("cpu", spike_dtype=torch.float64)
    expected, reference = case.run("reference", spike_dtype=torch.float64)
    assert state.v.dtype == torch.float64
    assert_same_bits([spikes, *state], [expected, *reference])


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_precision_number_is_read(dtype) -> None:
    """One step of decay-free conductances shows the input as it was read: g_e - g_i is x."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).unsqueeze(0)
    p = coba_triton.CobaLIFParameters(tau_syn_exc_inv=0.0, tau_syn_inh_inv=0.0)
    _, state = coba_lif_feed_forward_integral(x, CobaLIFFeedForwardState(-20.0, 0.0, 0.0), p, 0.1, backend="cpu")
    read = torch.where(x[0].isnan(), torch.nan, state.g_e - state.g_i)
    torch.testing.assert_close(read, x[0].float(), rtol=0, atol=0, equal_nan=True)
    assert state.g_e[x[0].isnan()].isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_are_rounded_to_half_precision_as_torch_rounds(dtype) -> None:
    """The bits of many float32 numbers, subnormal, huge and not finite ones among them, through the store."""

    g = torch.Generator().manual_seed(1)
    patterns = torch.randint(-(2**31), 2**31, (200_000,), generator=g, dtype=torch.int64).to(torch.int32)
    small = torch.randn(100_000, generator=g) * 10.0 ** (torch.rand(100_000, generator=g) * 14 - 9)
    halfway = (torch.arange(2**16, dtype=torch.int32) << 16) + 0x8000
    numbers = torch.cat(
        [patterns.view(torch.float32), small, halfway.view(torch.float32), (halfway >> 3).view(torch.float32)]
    )
    out = torch.zeros(numbers.shape, dtype=dtype)

    @numba.njit
    def store(target, code, row, bits):
        rows.store(target, code, 0, row, bits, len(row))

    code = rows.FLOAT16 if dtype == torch.float16 else rows.BFLOAT16
    store(out.view(torch.uint8).numpy(), code, numbers.numpy(), np.empty(len(numbers), np.uint32))
    expected = numbers.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(1.0).view(torch.int16), expected.nan_to_num(1.0).view(torch.int16))


def test_recorded_states_and_bits_of_a_large_run(threads) -> None:
    threads(2)
    case = large()
    for options in ({"record_states": True}, {"spike_dtype": "bits"}, {"spike_dtype": torch.uint8}):
        spikes, state = case.run("cpu", **options)
        expected, reference = case.run("reference", **options)
        assert_same_bits([spikes, *state], [expected, *reference])


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86 assembly")
def test_machine_code_rounds_every_operation_and_works_on_vectors() -> None:
    """No fused multiply-add; every product of the equations is there as a vector instruction."""

    from coba_triton.backend.cpu import recurrent

    everything(problem(20, (70,)))
    everything(recurrent_problem(20, 2, 70))
    for kernel, at_least in (
        (kernels.forward_kernel(), 8),
        (kernels.backward_kernel("super"), 20),
        (recurrent.block_kernel(), 8),
        (recurrent.backward_kernel("super"), 20),
    ):
        signature = next(s for s in kernel.signatures if "float32" in str(s))
        anew = numba.njit(**numba_bridge.OPTIONS)(kernel.py_func)  # the disk cache keeps no assembly
        anew.compile(signature)
        (assembly,) = anew.inspect_asm().values()
        if kernel is recurrent.backward_kernel("super"):
            # The sums back through recurrent weights are no part of the equations: they alone ask for fused operations.
            (code,) = anew.inspect_llvm().values()
            assert "llvm.fmuladd.v16f32" in code
            assert not re.search(r"\bf(add|sub|mul) [a-z ]*(contract|fast)\b|llvm\.(fma|fmuladd)\.(?!v16f32)", code)
        else:
            assert not re.search(r"\bvfn?m(add|sub)", assembly)
        assert len(re.findall(r"\bv?mulps\b", assembly)) >= at_least


# what a fresh process prints: where its kernels were cached, and how often a compiled one was found there
FRESH = """
import sys, coba_triton, torch
from coba_triton.common.messages import messages_on_stderr
assert "numba" not in sys.modules, "importing the package imports numba"
torch.set_num_threads(1)
from coba_triton.backend.cpu.launch import add_products
sums, sources, rows = torch.zeros(3, 4), torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]), torch.arange(8.0).view(2, 4)
with messages_on_stderr():
    add_products(sums, sources, rows, True)
assert torch.equal(sums, sources.t() @ rows)
from coba_triton.backend.cpu.recurrent import products_kernel
kernel = products_kernel()  # takes a fraction of a second to compile
from coba_triton.cli.info import caches
assert caches()["numba"].startswith(kernel.stats.cache_path or "nowhere, as no folder can be written to")
print(kernel.stats.cache_path, sum(kernel.stats.cache_hits.values()))
"""


def fresh(package: Path, **environment: str) -> list[str]:
    """Run ``FRESH`` with a copy of the package."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_", "PYTHON"))}
    env = clean | {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    done = subprocess.run([sys.executable, "-c", FRESH], cwd=package, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, hits = done.stdout.split()
    compiles = re.findall("compiling the CPU kernel 'products'.* the code is kept (on disk|for this process)", done.stderr)
    assert compiles == ([] if hits == "1" else ["for this process" if path == "None" else "on disk"])
    return [path, hits]


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package whose folder takes no cache: where ``__pycache__`` would be, there is a file."""
    source = Path(coba_triton.__file__).parent
    shutil.copytree(source, tmp_path / "coba_triton", ignore=shutil.ignore_patterns("__pycache__", "kernels"))
    (tmp_path / "coba_triton" / "kernels").mkdir()
    for room in (tmp_path / "coba_triton").glob("**/"):
        (room / "__pycache__").touch()
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the neurons of:UserWarning")  # they fire too often or never
@pytest.mark.parametrize("per_neuron", [False, True])
def test_after_a_warmup_nothing_is_compiled(per_neuron, caplog, tmp_path) -> None:
    pytest.importorskip("xxhash", reason="the extra stream is not installed")
    coba_triton.warmup(per_neuron=per_neuron)
    caplog.clear()
    loaded = {kernel: set(kernel.signatures) for kernel in numba_bridge._reported}  # whether compiled or found on the disk
    with caplog.at_level("INFO", "coba_triton"):
        for case in (problem(40, (5,), per_neuron=per_neuron), recurrent_problem(40, 2, 5, per_neuron=per_neuron)):
            case.x.requires_grad_()
            case.run("cpu")[0].sum().backward()
        problem(200, (5,), per_neuron=per_neuron).run("cpu", time_chunks=3)
        sparse = [{"delays": "none"}, {"delays": "none", "refractory": True}, {"exact": True}, {"neurons": 600, "batch": 1}]
        for options in sparse:
            network = network_problem(**{"steps": 40, "batch": 2, "neurons": 5, "per_neuron": per_neuron} | options)
            network.run("cpu", spike_dtype="bits")
            recurrent = network.recurrent_weights
            recurrent.weights.requires_grad_()
            for spikes in (network.run("cpu")[0], network.run("cpu", record_states=True)[0]):
                spikes.sum().backward()
            assert recurrent.weights.grad is not None
        p = coba_triton.CobaLIFParameters(v_rest=torch.full((5,), -20.0) if per_neuron else -20.0)
        for name, x in (("a", torch.zeros(40, 5)), ("b", torch.zeros(40, 5, dtype=torch.bool))):
            sink = tmp_path / f"{name}.zarr"
            coba_triton.simulate(coba_triton.CobaLIF(p, 0.1), x, sink=sink, progress=False)
        defaults = coba_triton.default_learning_parameters
        p = defaults._replace(v_rest=torch.full((5,), -60.0)) if per_neuron else defaults
        for rate in (0.1, 0.9):  # events and products
            spikes = (torch.rand(40, 2, 5) < rate).float().requires_grad_()
            coba_triton.CobaLIF(p, return_state=False)(spikes).sum().backward()
            coba_triton.CobaLIFRecurrent(5, 5, p, return_state=False)(spikes).sum().backward()
        weight = coba_triton.Normal(1.0, 0.1)
        drawn = coba_triton.Synapses.fixed_probability(5, 5, 0.5, weight, seed=1)
        for per in ("target", "source"):
            coba_triton.Synapses.fixed_number(5, 5, 2, weight, seed=1, per=per)
        layer = coba_triton.CobaLIFRecurrent(5, 5, p, input_weights=drawn, recurrent_weights=drawn)
        layer(spikes)[0].sum().backward()
        source = coba_triton.PoissonSource(10.0, 40, 5, layer.dt)
        coba_triton.simulate(layer, source, record=coba_triton.Record(populations={"all": range(5)}), progress=False)
    assert not caplog.records
    assert {kernel: set(kernel.signatures) for kernel in numba_bridge._reported} == loaded


def test_a_warmup_of_another_dtype() -> None:
    with pytest.raises(ValueError, match=r"dtypes must be torch.float32 or torch.float64, got torch.float16; .*half"):
        coba_triton.warmup([torch.float16])


def test_what_kernels_take_from_other_modules_is_part_of_their_stamp() -> None:
    """The digest covers every module of the folder from which a kernel of the package takes code."""
    folder = Path(kernel_cache.__file__).parent
    package = Path(coba_triton.__file__).parent
    modules = [path for path in package.rglob("*.py") if re.search(r"import .*\bentry_point\b", path.read_text())]
    assert len(modules) >= 12 and package / "stream" / "loops.py" in modules
    taken: set[str] = set()
    while modules:
        code = re.findall(r"^from (?:\.|\.\.backend\.cpu\.)(\w+) import", modules.pop().read_text(), re.M)
        imported = {name for name in code if (folder / f"{name}.py").exists()} - {"cache", "threads"}
        modules += [folder / f"{name}.py" for name in imported - taken]
        taken |= imported
    assert taken == set(kernel_cache.SHARED)


@pytest.fixture
def twice(tmp_path, monkeypatch) -> Callable[[], Any]:
    """Makes dispatchers, as processes have them, of a kernel that takes no time to compile; its code is in ``cache``."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "twice.py").write_text("def twice(x):\n    return 2 * x[0]\n")
    spec = importlib.util.spec_from_file_location("twice", tmp_path / "twice.py")
    monkeypatch.setitem(sys.modules, "twice", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return lambda: numba_bridge.entry_point(module.twice)


def hits(kernel: Any) -> int:
    return sum(kernel.stats.cache_hits.values())


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "head only": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("no code"),
    "first byte": lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]),
    "bit in the middle": lambda path: flip(path, 0.5),
    "bit in the end": lambda path: flip(path, 0.99),
    "appended": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "another pickle": lambda path: seal(path, pickle.dumps(("stamp", "key", "code"))),
    "no pickle": lambda path: seal(path, b"no pickle"),
    "code of another make": lambda path: seal(path, pickle.dumps((*pickle.loads(path.read_bytes()[32:])[:2], (1, 2, 3)))),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "missing": lambda path: path.unlink(),
}


def flip(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 16
    path.write_bytes(content)


def seal(path: Path, payload: bytes) -> None:
    path.write_bytes(hashlib.sha256(payload).digest() + payload)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_code_is_compiled_anew(damage, twice, tmp_path, caplog) -> None:
    assert twice()(np.array([21.0])) == 42
    (path,) = tmp_path.glob("cache/*/*")
    again = twice()
    assert again(np.array([21.0])) == 42 and hits(again) == 1
    damage(path)
    with caplog.at_level("INFO", "coba_triton"):
        again = twice()
        assert again(np.array([21.0])) == 42 and hits(again) == 0
    if not path.is_dir():  # and is whole again
        again = twice()
        assert again(np.array([21.0])) == 42 and hits(again) == 1
    assert ("cannot be used" in caplog.text) == (damage not in (DAMAGES["missing"], DAMAGES["another pickle"]))


def test_code_of_other_sources_is_compiled_anew(twice, monkeypatch) -> None:
    twice()(np.array([21.0]))
    monkeypatch.setattr(kernel_cache, "sources", lambda: "what a module holds that the kernel takes code from")
    again = twice()
    assert again(np.array([21.0])) == 42 and hits(again) == 0


def test_processes_that_compile_at_once_do_not_take_each_other_s_code(twice, monkeypatch) -> None:
    """All have looked for code before any has kept some, and all keep it at once."""
    files = [twice()._cache._cache_file for _ in range(4)]
    dumps, together = kernel_cache.dumps, threading.Barrier(len(files))

    def dump_together(content: Any) -> bytes:
        together.wait(60)
        return dumps(content)

    monkeypatch.setattr(kernel_cache, "dumps", dump_together)
    with ThreadPoolExecutor(len(files)) as processes:
        saved = [processes.submit(file.save, ("signature", n), f"code {n}") for n, file in enumerate(files)]
        assert not any(job.result() for job in saved)
    for file in files:
        assert [file.load(("signature", n)) for n in range(5)] == ["code 0", "code 1", "code 2", "code 3", None]


def test_a_full_disk_keeps_the_code_in_memory(twice, tmp_path, monkeypatch, caplog) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level("INFO", "coba_triton"):
        assert twice()(np.array([21.0])) == 42
    assert "cannot be kept" in caplog.text and not list(tmp_path.glob("cache/*/*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the user's cache folder is elsewhere")
def test_compiled_code_is_cached_where_it_can_be(package, tmp_path) -> None:
    own, user, file = (tmp_path / name for name in ("own", "user", "file"))
    file.touch()
    path, hits = fresh(package, NUMBA_CACHE_DIR=str(own))
    assert Path(path).is_relative_to(own) and hits == "0"
    assert fresh(package, NUMBA_CACHE_DIR=str(own)) == [path, "1"]
    path, _ = fresh(package, XDG_CACHE_HOME=str(user))
    assert Path(path).is_relative_to(user)
    # nowhere to write: it compiles each time, and works
    assert fresh(package, XDG_CACHE_HOME=str(file)) == ["None", "0"]
    # the equations changed: what was compiled from the old ones is not used
    with (package / "coba_triton" / "neuron" / "step.py").open("a") as equations:
        equations.write("# another version\n")
    assert fresh(package, NUMBA_CACHE_DIR=str(own))[1] == "0"


def test_scratch_begins_at_a_line_of_memory() -> None:
    @numba.njit
    def first_byte(length: int, like: np.ndarray) -> int:
        return rows.scratch_on_line(length, like.dtype).ctypes.data

    for dtype in (np.float32, np.float64, np.uint32):
        assert all(first_byte(length, np.empty(1, dtype)) % rows.LINE == 0 for length in range(1, 40))


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_view_with_another_sign_than_its_memory(backend, device) -> None:
    """The imaginary part of a conjugate is read with the sign that it has, and not with that in memory."""
    x = torch.complex(*torch.linspace(-0.1, 0.1, 2 * 40 * 5, device=device).reshape(2, 40, 5)).conj().imag
    assert x.is_neg()
    expected = coba_lif_feed_forward_integral(x.clone(), None, dt=0.1, backend="reference")
    for given in (x, x.detach().requires_grad_()):
        spikes, state = coba_lif_feed_forward_integral(given, None, dt=0.1, backend=backend)
        assert_same_bits([spikes, *state], [expected[0], *expected[1]])
    result = coba_triton.simulate(coba_triton.CobaLIF(dt=0.1, backend=backend), x, progress=False)
    assert torch.equal(torch.from_numpy(result.spikes[:]), expected[0].bool().cpu())


def test_threads_of_a_row_write_to_no_common_line_of_memory() -> None:
    """Two threads that write to one line take it from each other again and again; the result is right, but late."""
    from coba_triton.backend.cpu import meeting, sparse

    arrays = [meeting.memory_apart(shape, dtype) for shape in ((1,), (3, 5), (129,)) for dtype in (np.uint8, np.int64)]
    lines = [set(range(a.ctypes.data // meeting.APART, -(-(a.ctypes.data + a.nbytes) // meeting.APART))) for a in arrays]
    assert sum(map(len, lines)) == len(set().union(*lines))
    assert all(a.ctypes.data % meeting.APART == 0 and not a.any() for a in arrays)
    lists = sparse.shared_lists(300, 3, 5)
    assert lists.shape[2] > 300 * 5 and lists.strides[1] % meeting.APART == 0


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("meet", [True, False])
def test_every_share_runs_once_in_a_thread_of_its_own(openmp: bool, meet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from coba_triton.backend.cpu import threads as of_shares

    if not openmp:
        monkeypatch.setattr(of_shares, "_PROCESS", 0)
    barrier, found, lock = threading.Barrier(3, timeout=60), [], threading.Lock()

    def kernel(common: str, share: int) -> None:
        barrier.wait()  # passes only if all run at the same time
        with lock:
            found.append((common, share, threading.get_ident()))

    torch.set_num_threads(4)
    of_shares.run(kernel, "a", shares=[(0,), (1,), (2,)], meet=meet)
    assert torch.get_num_threads() == 4
    assert sorted(entry[:2] for entry in found) == [("a", 0), ("a", 1), ("a", 2)]
    assert len({entry[2] for entry in found}) == 3


@pytest.mark.parametrize("openmp", [True, False])
def test_an_error_of_openmp_or_the_pool_is_raised(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from coba_triton.backend.cpu import threads as of_shares

    if not openmp:
        monkeypatch.setattr(of_shares, "_PROCESS", 0)

    def kernel(share: int) -> None:
        if share == 1:
            raise ValueError("of share 1")

    with pytest.raises(ValueError, match="of share 1"):
        of_shares.run(kernel, shares=[(0,), (1,)])


def test_the_pool_has_no_more_threads_than_the_largest_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from coba_triton.backend.cpu import threads as of_shares

    monkeypatch.setattr(of_shares, "_PROCESS", 0)
    of_shares._pool.cache_clear()
    before = set(threading.enumerate())
    for count in (2, 5, 3, 6):
        barrier = threading.Barrier(count, timeout=60)
        of_shares.run(lambda barrier, share: barrier.wait(), barrier, shares=[(share,) for share in range(count)])
    assert len(set(threading.enumerate()) - before) == 5


@pytest.mark.parametrize("openmp", [True, False])
def test_ctrl_c_waits_for_all_shares_and_is_not_lost(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from coba_triton.backend.cpu import threads as of_shares

    if not openmp:
        monkeypatch.setattr(of_shares, "_PROCESS", 0)
    handler, done = signal.getsignal(signal.SIGINT), []

    def kernel(share: int) -> None:
        if share == 0:
            signal.raise_signal(signal.SIGINT)
        done.append(share)

    with pytest.raises(KeyboardInterrupt):
        of_shares.run(kernel, shares=[(0,), (1,)], meet=True)
    assert sorted(done) == [0, 1] and signal.getsignal(signal.SIGINT) is handler


LIMITED = """
import threading, torch
from coba_triton.backend.cpu import threads
torch.set_num_threads(2)
barrier = threading.Barrier(2, timeout=60)
threads.run(lambda share: barrier.wait(), shares=[(0,), (1,)], meet=True)
print("met")
"""


def test_threads_meet_where_openmp_may_not_start_them() -> None:
    """With one thread of OpenMP's in the whole process, a pool has them."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        env=os.environ | {"OMP_THREAD_LIMIT": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "met\n", done.stderr


@pytest.mark.parametrize("columns", [1, 16, 40, 64, 100, 129])
def test_checksum_by_its_definition(columns: int) -> None:
    from coba_triton.backend.cpu.launch import row_sums

    def turned(word: int, bits: int) -> int:
        return ((word << bits) | (word >> (32 - bits))) % 2**32

    rows = np.random.default_rng(columns).integers(0, 2**32, (5, columns), np.uint32)
    wanted = [0] * (-(-columns // 64) * 16)
    for row in rows.tolist():
        row += [0] * (-columns % 64)
        for lane in range(len(wanted)):
            first = lane // 16 * 64 + lane % 16
            word = sum(turned(row[first + 16 * quarter], 7 * quarter) for quarter in range(4))
            wanted[lane] = (turned(wanted[lane] * 0x9E3779B1 % 2**32, 13) + word) % 2**32
    assert row_sums(torch.from_numpy(rows.view(np.int32))).tolist() == wanted
