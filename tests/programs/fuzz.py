"""Calls the public functions with what nobody should pass, and notes every exception that is none of those allowed.

A call is a good one of which one to three arguments, or numbers in its records, are exchanged for values of
:func:`hostile`. A fixed seed makes the same calls everywhere; how many there are depends on the time. Whatever comes out
must be a result or an exception of :data:`ALLOWED`: a class that says whose mistake it is, and a message in words.

    PYTHONPATH=tests python -m programs.fuzz --seconds 900 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import io
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ["COBA_TRITON_TUNING"] = "off"

import numpy as np
import torch
from matplotlib.figure import Figure

import coba_triton as ct
from coba_triton.cli import main
from coba_triton.neuron.records import Constants
from coba_triton.ops.call import Asked
from coba_triton.ops.call import Call as OperatorCall
from coba_triton.ops.spikes import word_count
from coba_triton.stream import plotting
from coba_triton.tuning import tables as tuning

# What a call may raise. An error of a file's is one where a path is given, one of memory where a size is.
ALLOWED: dict[str, tuple[type[BaseException], ...]] = {
    "arguments": (TypeError, ValueError, NotImplementedError, MemoryError, FloatingPointError),
    "files": (TypeError, ValueError, MemoryError, OSError, FloatingPointError, ImportError),
    "sequence": (TypeError, ValueError, IndexError),  # of reading parts of a result: as of an array
    "command": (),  # prints a sentence and returns a status
}
# RuntimeError is PyTorch's word for everything. Allowed are what the package says of a backend, and what PyTorch says of
# memory, of tensors without numbers or of more than can be counted, and before an operator of ours is called at all.
RUNTIME_ERRORS = (
    *("backend ", "path 'sliced'"),
    *("memory", "Storage size", "integer multiplication overflow", "meta tensors"),
    *("Expected a value of type", "MathBitsFallback"),
)
SECONDS_OF_A_CALL = 60

Call = tuple[str, Callable[..., Any], list[Any], dict[str, Any]]


class Strange:
    """Has nothing that anything needs."""

    def __repr__(self) -> str:
        return "Strange()"


def numbers() -> list[Any]:
    return [
        0, 1, -1, 2, 3, 31, 33, 2**31, 2**63, -(2**63), 10**400, True, False, 0.0, -0.0, 0.1, 1e-320, 1e308, -1e308,
        math.nan, math.inf, -math.inf, 1j, Fraction(1, 3), Decimal("0.1"), np.float64(0.1), np.float32(0.1),
        np.int64(3), np.int64(-1),
        np.bool_(True), np.complex64(1), np.datetime64("2020"), np.float16(np.nan), np.uint8(255),
    ]  # fmt: skip


def objects() -> list[Any]:
    return [
        None, "", "x", "auto", "cpu", "reference", "bits", "super", "jump_first", "\x00", "\ud800", "$x_{", "x" * 5000,
        b"x", bytearray(b"x"), [], (), {}, set(), [1, [2]], [[]], [None], ["x"], [1, 2], (3,), {"a": 1}, {0: 0}, {"v": 0.1},
        slice(None), slice(0, 5, 0), slice(None, None, -1), slice(10**400), slice("a", "b"), range(3), range(10**30),
        Strange(), Strange, object, int, len, lambda *a: None, iter([]), iter([1]), (x for x in [torch.ones(2, 3)]), ...,
        NotImplemented, Path("/nonexistent/x.zarr"), Path(os.sep), ValueError("x"), torch.float8_e4m3fn, torch.bool,
        torch.complex64, torch.int16, torch.quint8, torch.float16, torch.float64, torch.device("meta"),
        torch.nn.Linear(2, 2),
        ct.CobaLIFParameters(), ct.CobaLIFState(0, 0, 0, 0), ct.default_bio_parameters, ct.CobaLIF(dt=0.1), ct.Record(),
    ]  # fmt: skip


def arrays() -> list[Any]:
    return [
        np.zeros(()), np.zeros(0), np.zeros((0, 3)), np.zeros((3, 0)), np.ones(3), np.ones((5, 3)), np.ones((5, 2, 3), "f4"),
        np.ones((5, 3), ">f4"), np.ones((5, 3), "f2"), np.ones((5, 3), "c8"), np.ones((5, 3), "U1"),
        np.ones((5, 3), "M8[s]"),
        np.ones((5, 3), [("a", "i4")]), np.array([None, 1], object), np.array([10**400]), np.full((5, 3), np.nan, "f4"),
        np.ones((6, 3))[::-1], np.ones((5, 6))[:, ::2], np.broadcast_to(np.float32(1), (5, 3)), np.ones((1,) * 40),
        np.ma.masked_array([1.0, 2.0], [0, 1]), np.ones((5, 3), bool), np.ones((5, 3), "u4"), np.array([-1, 2]),
        np.array([True, False, True]),
    ]  # fmt: skip


@functools.cache
def _tensors() -> list[Any]:
    base = torch.linspace(-1, 1, 15).reshape(5, 3)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.uint8]
    dtypes += [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.complex64]
    found = [base.to(dtype) for dtype in dtypes]
    found += [
        torch.zeros(shape) for shape in ((), (0,), (0, 3), (5, 0), (3,), (5, 1), (1, 3), (5, 2, 3), (3, 3), (2, 2), (1,) * 8)
    ]
    found += [
        base, base.t(), base.flip(0), base[:, ::2], torch.zeros(1).expand(5, 3), torch.full((5, 3), math.nan),
        base * math.inf,
        base.to("meta"), base.to_sparse(), base.to_sparse_csr(), torch.quantize_per_tensor(base, 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), torch.complex(base, base).imag, torch.nn.Parameter(base),
        torch.complex(base, base).conj().imag, torch.zeros(1).expand(2**40, 3), torch.zeros(1).expand(2**62),
        base.to_mkldnn(),
        torch.tensor(1.0, requires_grad=True), torch.tensor(math.nan), torch.tensor(0), torch.tensor(True), torch.tensor(1j),
        torch.empty(5, 3, dtype=torch.int32), torch.zeros(3, dtype=torch.int64), torch.ones(5, 3, requires_grad=True) * 1,
    ]  # fmt: skip
    return found


def hostile(r: random.Random) -> Any:
    """Something that nobody should pass, or that few do."""
    return r.choice(r.choice([numbers, numbers, objects, arrays, _tensors])())


def changed(r: random.Random, value: Any) -> Any:
    """A value with something hostile in it, or in its place."""
    if isinstance(value, tuple) and hasattr(value, "_fields") and r.random() < 0.85:
        return value._replace(**{name: hostile(r) for name in r.sample(value._fields, r.randint(1, 2))})
    if isinstance(value, dict) and value and r.random() < 0.7:
        return value | {r.choice([*value, "x", 3, None]): hostile(r)}
    if type(value) in (list, tuple) and value and r.random() < 0.5:
        return type(value)([hostile(r), *value[1:]])
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and r.random() < 0.4:
        axis = r.randrange(max(value.dim(), 1))
        ways: list[Callable[[], Any]] = [
            lambda: value.narrow(axis, 0, max(value.shape[axis] - 1, 0)),
            lambda: torch.cat([value, value], axis),
            lambda: value.unsqueeze(axis),
            lambda: value.select(axis, 0),
            lambda: value.to(r.choice([torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64])),
            lambda: value.transpose(0, -1),
            lambda: value.detach().requires_grad_(),
        ]
        with contextlib.suppress(Exception):
            return r.choice(ways)()
    return hostile(r)


P = ct.CobaLIFParameters(v_thresh=-50.0, v_rest=-65.0, v_reset=-65.0, e_rev_E=0.0, e_rev_I=-80.0)
X, XR, W, WR = torch.ones(5, 3), torch.ones(5, 2, 3), torch.ones(4, 3), torch.ones(4, 4)
STATE, STATE_R = ct.CobaLIFFeedForwardState(-65.0, 0.0, 0.0), ct.CobaLIFState(0.0, -65.0, 0.0, 0.0)
SEQUENCE = {
    "order": "decay_first", "backend": "auto", "block_steps": None, "record_states": False, "spike_dtype": None,
}  # fmt: skip
CONFIG = {
    "simulation": {"dt": "0.1 ms", "duration": "3.2 ms", "block_steps": 32, "order": "decay_first", "backend": "auto"},
    "neuron": {
        "count": 3, "tau_syn_exc": "5 ms", "tau_syn_inh": "10 ms", "c_m": "200 pF", "g_l": "10 nS", "e_rev_E": "0 mV",
        "e_rev_I": "-80 mV", "v_rest": "-65 mV", "v_reset": "-65 mV", "v_thresh": "-50 mV",
    },
    "input": {"kind": "poisson", "seed": 1, "excitatory": {"rate": "800 Hz", "weight": "2 nS"}},
    "record": {"neurons": [0], "variables": ["v"]},
}  # fmt: skip


@functools.cache
def result() -> ct.Result:
    record = ct.Record(variables=("v", "g_e"), neurons=[0, 2], populations={"a": [0, 1], "b": [2]}, inputs=True)
    source = ct.PoissonSource(2000.0, 320, (3,), 0.1, weight=0.01)
    return ct.simulate(ct.CobaLIF(P, 0.1), source, record=record, progress=False)


def _module(kind: Any) -> Callable[..., Any]:
    """A module made and called: with its arguments first, then those of the call."""

    def call(*args: Any, x: Any, state: Any, **options: Any) -> Any:
        return kind(*args, **options)(x, state)

    return call


def _operator(name: str) -> Callable[..., Any]:
    return lambda *args: getattr(torch.ops.coba_triton, name)(*args)


def _blocks(source: Any, block_steps: Any, device: Any) -> Any:
    return list(zip(range(5), ct.stream_blocks(source, block_steps, device), strict=False))


def _poisson(*args: Any, **options: Any) -> Any:
    return ct.PoissonSource(*args, **options)[:3]


def _simulated(network: Any, source: Any, **options: Any) -> Any:
    if isinstance(source, torch.Tensor) and not source.is_nested and source.shape[:1].numel() > 2**30:
        return None  # a run of days, as it was asked for
    return ct.simulate(network, source, **options)


def _events(*args: Any, **options: Any) -> Any:
    return ct.EventSource(*args, **options)[:3]


def _drawn(function: Any) -> Callable[..., Any]:
    def call(**options: Any) -> None:
        figure = Figure()
        function(result(), figure.subplots(), **options)
        figure.savefig(io.BytesIO(), format="png", dpi=20)

    return call


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    text = str(value).encode("utf-8", "replace").decode()
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" for c in text) + '"'


def _configured(folder: Path, config: dict[str, Any], *arguments: str) -> int:
    path = folder / "config.toml"
    path.write_text("\n".join(f"{_toml(key)} = {_toml(value)}" for key, value in config.items()), encoding="utf-8")
    return _command("simulate", str(path), "--out", str(folder / "out"), *arguments)


def _command(*arguments: Any) -> int:
    """The command line, which must say in one place what it does not like, and never print a traceback."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as printed:
        status = main([str(argument) for argument in arguments])
    if status not in (0, 1, 2) or "Traceback" in printed.getvalue() or (status == 2 and not printed.getvalue().strip()):
        raise AssertionError(f"status {status}: {printed.getvalue()[-500:]}")
    return status


def calls(r: random.Random, folder: Path) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Endlessly: the name of what is called, what it may raise, and a call with something hostile in it."""
    zeros = torch.zeros
    table = torch.ones(len(Constants._fields), 1)
    call = OperatorCall("cpu", False, "super", torch.float32, True, checkpoint_every=8, save=True)
    forward, recurrent = [X, zeros(3, 3), table], [XR, zeros(2, 4), zeros(3, 2, 4), W, WR, table]
    backward = [X, table, zeros(2, 3, dtype=torch.int32), zeros(3, 3), X, zeros(3, 3), zeros(3, 5, 3)]
    packed = zeros(word_count(5), 2, 4, dtype=torch.int32)
    r_backward = [
        XR, zeros(2, 4), W, WR, table, zeros(2, 2, 4, dtype=torch.int32), zeros(3, 2, 4), zeros(5, 2, 4), zeros(3, 2, 4),
        zeros(3, 5, 2, 4), zeros(2, 4),
    ]  # fmt: skip
    flat = ct.coba_lif_feed_forward_integral
    poisson = {"weight": 1.0, "seed": 1, "stream": 0, "rows": None}
    listed = {"steps": 5, "weight": 1.0, "first": 0, "start": 0.0}
    explained = {"dtype": torch.float32, "device": "cpu"}
    module = {"x": X, "state": STATE, "learn": ("v_thresh",), **SEQUENCE}
    events = {"start": 0, "stop": None, "neurons": [0, 1]}
    run = {"sink": None, "state": None, "block_steps": 32, "record": ct.Record(neurons=[0]), "progress": False}
    times = {"start": None, "stop": None}
    good: list[tuple[str, str, Callable[..., Any], list[Any], dict[str, Any]]] = [
        ("coba_lif_step", "arguments", ct.coba_lif_step, [X, STATE_R, W, WR, P, 0.1], {}),
        ("coba_lif_feed_forward_step", "arguments", ct.coba_lif_feed_forward_step, [X, STATE, P, 0.1], {}),
        ("coba_lif_integral", "arguments", ct.coba_lif_integral, [XR, STATE_R, W, WR, P, 0.1], SEQUENCE | {"path": "auto"}),
        ("coba_lif_integral", "arguments", ct.coba_lif_integral, [XR, None, W, WR, P, 0.1], {"out": zeros(5, 2, 4)}),
        ("coba_lif_feed_forward_integral", "arguments", flat, [X, STATE, P, 0.1], SEQUENCE),
        ("coba_lif_feed_forward_integral", "arguments", flat, [X, None, P], {"out": zeros(5, 3)}),
        ("CobaLIF", "arguments", _module(ct.CobaLIF), [P, 0.1], module),
        ("CobaLIFRecurrent", "arguments", _module(ct.CobaLIFRecurrent), [3, 4, P, 0.1], {"x": XR, "state": STATE_R}),
        ("CobaLIFCell", "arguments", _module(ct.CobaLIFCell), [3, 4, P, 0.1], {"x": X, "state": STATE_R, "autapses": True}),
        ("CobaLIFFeedForwardCell", "arguments", _module(ct.CobaLIFFeedForwardCell), [P, 0.1], {"x": X, "state": STATE}),
        ("from_pynn", "arguments", ct.from_pynn, [{"cm": 0.2, "tau_m": 20.0, "tau_refrac": 0.0}], {"model": "IF_cond_exp"}),
        ("to_pynn", "arguments", ct.to_pynn, [P, "iaf_cond_exp"], {}),
        ("pack_spikes", "arguments", ct.pack_spikes, [X], {}),
        ("unpack_spikes", "arguments", ct.unpack_spikes, [zeros(1, 3, dtype=torch.int32), 5, torch.bool], {}),
        ("PoissonSource", "arguments", _poisson, [100.0, 50, (2, 3), 0.1], poisson),
        ("EventSource", "arguments", _events, [[0.1, 0.3], [0, 2], 3, 0.1], listed),
        ("read_events", "files", ct.read_events, ["x.csv"], {}),
        ("stream_blocks", "arguments", _blocks, [X, 2, "cpu"], {}),
        ("simulate", "files", _simulated, [ct.CobaLIF(P, 0.1), X], run),
        ("Record in simulate", "arguments", lambda **o: ct.simulate(ct.CobaLIF(P, 0.1), X, record=ct.Record(**o)), [],
         {"spikes": True, "variables": ("v",), "neurons": [0], "populations": {"a": [0]}, "inputs": False}),
        ("simulate into a file", "files", lambda sink: ct.simulate(ct.CobaLIF(P, 0.1), X, sink=sink, progress=False),
         [str(folder / f"{r.random()}.zarr")], {}),
        ("open_result", "files", ct.open_result, ["x.zarr"], {}),
        ("Result.events", "arguments", lambda **o: result().events(**o), [], events),
        ("Result.rates", "arguments", lambda *a: result().rates(*a), [5.0, [0]], {}),
        ("Result.counts", "arguments", lambda *a: result().counts(*a), [5, [0]], {}),
        ("Result.synchrony", "arguments", lambda *a: result().synchrony(*a), [5.0, [0]], {}),
        ("Result.interval_counts", "arguments", lambda *a: result().interval_counts(*a), [[0.0, 1.0], [0]], {}),
        ("Result.to_csv", "files", lambda path: result().to_csv(path), [str(folder / "x.csv")], {}),
        ("Result.spikes", "sequence", lambda key: result().spikes[key], [slice(0, 5)], {}),
        ("Result.traces", "sequence", lambda key: result().traces["v"][key], [(slice(0, 5), 0)], {}),
        ("tuning.explain", "arguments", tuning.explain, ["feed_forward_forward", 10, 2], explained),
        ("tuning.use", "files", lambda path: (tuning.use(path), tuning.use(None)), ["off"], {}),
        ("plot_raster", "arguments", _drawn(plotting.plot_raster), [], {**times, "max_events": 100}),
        ("plot_rates", "arguments", _drawn(plotting.plot_rates), [], {**times, "bin_ms": 5.0}),
        ("plot_traces", "arguments", _drawn(plotting.plot_traces), [], {**times, "variable": "v", "neurons": [0]}),
        ("overview", "arguments", lambda **o: plotting.overview(result(), **o), [], {**times, "title": "x"}),
        ("ops.feed_forward", "arguments", _operator("feed_forward"), [*forward, *call], {}),
        ("ops.feed_forward_out", "arguments", _operator("feed_forward_out"), [*forward, zeros(5, 3), *call], {}),
        ("ops.feed_forward_backward", "arguments", _operator("feed_forward_backward"),
         [*backward, *call, *Asked(True, False, False, True, 3)], {}),
        ("ops.recurrent", "arguments", _operator("recurrent"), [*recurrent, *call], {}),
        ("ops.recurrent_out", "arguments", _operator("recurrent_out"), [*recurrent, packed, *call], {}),
        ("ops.recurrent_backward", "arguments", _operator("recurrent_backward"),
         [*r_backward, *call, *Asked(True, True, True, True, 3)], {}),
    ]  # fmt: skip
    commands: list[list[Any]] = [
        ["plot", folder / "out", "--out", folder / "x.png", "--start", 0, "--stop", 2],
        ["check", "--device", "cpu", "--only", "nothing of this name", "--backend", "cpu"],
        ["tune", "--neurons", 8, "--batch", 1, "--kernel", "nothing", "--dtype", "float32", "--budget", 1],
        ["bench", "--suite", "quick", "--rounds", 2, "--only", "nothing of this name", "--compare", folder / "x"],
        ["simulate", "nothing", "--out", folder / "other", "--format", "zarr"],
    ]
    # the last word: what would measure something does not begin
    harmless = {name: ["--only", "nothing of this name"] for name in ("check", "bench")} | {"tune": ["--kernel", "nothing"]}
    tables = [key for key, value in CONFIG.items() if isinstance(value, dict)]
    while True:
        name, kind, function, args, options = r.choice(good)
        if r.random() < 0.1:
            path = r.choice(tables)
            values: dict[str, Any] = CONFIG[path]
            config = CONFIG | {path: changed(r, values) if r.random() < 0.9 else hostile(r)}
            yield "a configuration", "command", functools.partial(_configured, folder, config)
            continue
        if r.random() < 0.05:
            words = list(r.choice(commands))
            words[r.randrange(1, len(words))] = hostile(r)
            words += harmless.get(words[0], [])
            yield f"coba-triton {words[0]}", "command", functools.partial(_command, *words)
            continue
        args, options = list(args), dict(options)
        places: list[Any] = [*range(len(args)), *options]
        for place in r.sample(places, min(len(places), r.choice([1, 1, 1, 2, 3]))):
            target: Any = args if isinstance(place, int) else options
            target[place] = changed(r, target[place])
        yield name, kind, functools.partial(function, *args, **options)


def is_allowed(error: BaseException, kind: str) -> bool:
    """Whether a call of this kind may end so."""
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError | RecursionError):
        return any(words in str(error) for words in RUNTIME_ERRORS)
    return isinstance(error, ALLOWED[kind]) and bool(str(error).strip() or isinstance(error, MemoryError))


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """A call that takes too long or too much memory is ended."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"a call takes more than {SECONDS_OF_A_CALL} s")

    before, memory = signal.signal(signal.SIGALRM, too_long), resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**33, memory[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, memory)


def fuzz(seconds: float, seed: int, show: Callable[[str], None] = lambda text: None) -> tuple[Counter[Any], list[str]]:
    """Call for so many seconds of processor time.

    Returns:
        How often each name ended in what, and a report of everything that is not allowed, each kind once.
    """
    r, found = random.Random(seed), Counter[Any]()
    failures: dict[Any, str] = {}
    with tempfile.TemporaryDirectory() as temporary, limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder, home = Path(temporary), os.getcwd()
        os.chdir(folder)  # hostile paths are relative
        torch.manual_seed(0)
        result()
        end = time.process_time() + seconds
        try:
            for number, (name, kind, call) in enumerate(calls(r, folder)):
                if time.process_time() > end:
                    break
                outcome = "a result"
                try:
                    try:
                        signal.alarm(SECONDS_OF_A_CALL)
                        call()
                    finally:
                        signal.alarm(0)
                except Exception as error:
                    outcome = type(error).__name__
                    own = any("coba_triton" in frame.filename for frame in traceback.extract_tb(error.__traceback__)[-1:])
                    found[f"{outcome}, {'in our words' if own else 'in words of others'}"] += 1
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    if (
                        not is_allowed(error, kind)
                        and (key := (name, outcome, where.filename, where.lineno)) not in failures
                    ):
                        failures[key] = f"call {number}, {name}: {outcome}: {error!s:.300}\n  {call!r:.1000}\n" + "".join(
                            traceback.format_tb(error.__traceback__)[-3:]
                        )
                        show(failures[key])
                found[name, outcome] += 1
        finally:
            os.chdir(home)
    return found, list(failures.values())


def report(found: Counter[Any]) -> str:
    """A line for each name, and how its calls ended."""
    lines = []
    for name in sorted({key[0] for key in found if isinstance(key, tuple)}):
        outcomes = {key[1]: count for key, count in found.items() if isinstance(key, tuple) and key[0] == name}
        ended = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(outcomes.items(), key=lambda item: -item[1]))
        lines.append(f"{name}: {sum(outcomes.values()):,} calls: {ended}")
    lines += [f"{key}: {count:,}" for key, count in found.most_common() if isinstance(key, str)]
    total = sum(count for key, count in found.items() if isinstance(key, tuple))
    return "\n".join([*lines, f"{total:,} calls"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faulthandler.enable()
    counts, failed = fuzz(options.seconds, options.seed, lambda text: print(text, flush=True))
    print(report(counts))
    print(f"{len(failed)} kinds of failures")
    sys.exit(bool(failed))
