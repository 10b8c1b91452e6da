"""Contenders: this package, its reference, a compiled step, and other packages, which are timed on the same problem.

A contender runs the whole sequence in one call. Before it is timed, its result is compared with the reference's.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backend import reference
from ..neuron.records import State, numbers_of
from ..ops.constants import derive_constants
from ..ops.spikes import unpack_spikes
from .problems import Case, Problem, RecurrentProblem

# Whether a step adds its input or decays first: as in norse, so that all contenders make the same spikes.
ORDER = {"feed_forward": "jump_first", "recurrent": "decay_first"}
OTHER_PACKAGES = {"norse": "norse==1.1.0", "snntorch": "snntorch", "spikingjelly": "spikingjelly"}


@dataclass(frozen=True)
class Contender:
    """One way to run a case.

    Attributes:
        name: its name in tables.
        run: runs the whole sequence. It returns spikes ``[T, B, N]`` (bits: ``[ceil(T / 32), B, N]``), or in training the
            gradient.
        roundings: how many rounding errors may separate its gradient from the reference's. With 0, and for spikes, all bits
            must be equal. None for another model, which is timed for comparison only.
        note: what else differs from the reference.
        flips: for a contender that fuses operations. Given its spikes and the reference's, it says what is wrong; it
            returns an empty text if rounding explains the difference.
    """

    name: str
    run: Callable[[], Tensor]
    roundings: int | None = 0
    note: str = ""
    flips: Callable[[Tensor, Tensor], str] | None = None


def contenders(case: Case, backend: str, problem: Problem | RecurrentProblem) -> Iterator[Contender]:
    """Everything that can run a case on this machine. The first contender is the reference.

    Args:
        case: the case. Training takes the gradient by the input, in a recurrent case by the recurrent weights.
        backend: this package's backend, ``cpu`` or ``triton``.
        problem: the tensors, from ``case.build()``.
    """
    order = ORDER[case.kind]
    # a weight's gradient sums T B products; the adjoints in them went through up to T sums over 2 N synapses
    summed = case.steps * (case.batch + 2 * case.neurons) if case.kind == "recurrent" else 0
    leaf = problem.recurrent_weights if isinstance(problem, RecurrentProblem) else problem.x
    one = torch.ones((), dtype=case.dtype, device=leaf.device)

    def of(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Make a contender of a run: in training it returns the gradient of the sum of all spikes, else the spikes."""

        def differentiated() -> Tensor:
            leaf.requires_grad_(case.train)
            with torch.set_grad_enabled(case.train):
                spikes = run()
                # of the sum, which itself is not needed
                (result,) = torch.autograd.grad(spikes, leaf, one.expand_as(spikes)) if case.train else (spikes,)
            leaf.requires_grad_(False)
            return result

        return differentiated

    def ours(name: str, **options: Any) -> Callable[[], Tensor]:
        return of(lambda: problem.run(name, order=order, **options)[0])

    yield Contender("reference", ours("reference"))
    yield Contender(backend, ours(backend), summed)
    if problem.x.device.type == "cuda":  # as a CUDA graph: the host has nothing to do
        yield Contender("reference, graphed", graphed(ours("reference")))
        yield Contender(f"{backend}, graphed", graphed(ours(backend)), summed)
    if not case.train:
        shape = case.steps, case.batch, case.neurons
        buffer = torch.empty(shape, dtype=case.dtype, device=problem.x.device)
        yield Contender(f"{backend}, out=", ours(backend, out=buffer))
        yield Contender(f"{backend}, uint8", ours(backend, spike_dtype=torch.uint8))
        yield Contender(f"{backend}, bits", ours(backend, spike_dtype="bits"))
    # the compiler rearranges the backward, so its rounding differs in every step
    compiled = of(lambda: _compiled_loop(problem, order))
    flips = None if case.train else functools.partial(wrong_flips, case, problem)
    yield Contender("compiled step", compiled, max(summed, case.steps), flips=flips)
    if importlib.util.find_spec("norse"):
        note = "" if case.kind == "feed_forward" else "its step drops the input, so it fires less"
        for name, rows in (("norse, unbind", lambda x: x.unbind(0)), ("norse, indexed", _indexed)):
            loop = of(functools.partial(_norse_loop, problem, rows))
            # norse's surrogate has no alpha
            yield Contender(name, loop, 0 if case.kind == "feed_forward" and not case.train else None, note)
    if case.kind == "feed_forward":
        leaky = "LIF without conductances"
        if importlib.util.find_spec("snntorch"):
            yield Contender("snnTorch Leaky", of(lambda: _snntorch_loop(problem.x)), None, leaky)
        if importlib.util.find_spec("spikingjelly"):
            yield Contender("SpikingJelly LIF", of(lambda: _spikingjelly(problem.x)), None, leaky)


def graphed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a CUDA graph, which is captured at the first call. Every call returns the same memory."""
    replay: list[Callable[[], Tensor]] = []

    def capture() -> Callable[[], Tensor]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # a first call, so that the graph has nothing of its compiling and copying
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()

        def again() -> Tensor:
            graph.replay()
            return result

        return again

    def call() -> Tensor:
        if not replay:
            replay.append(capture())
        return replay[0]()

    return call


def _indexed(x: Tensor) -> Iterator[Tensor]:
    return (x[t] for t in range(x.shape[0]))


@functools.cache
def _compiled(step: Callable[..., reference.Step]) -> Any:
    return torch.compile(step, dynamic=False)


def _compiled_loop(problem: Problem | RecurrentProblem, order: str) -> Tensor:
    """Run the reference's step, compiled by torch.compile, in a loop over time."""
    state: Any = problem.state
    c = derive_constants(problem.record(), problem.dt, state.v.dtype, problem.x.device)
    jump_first = order == "jump_first"
    spikes = []
    if isinstance(problem, RecurrentProblem):
        step = _compiled(reference.recurrent_step)
        weights = reference.SplitWeights.of(problem.input_weights, problem.recurrent_weights)
        z, *fields = state
        s = State(*fields)
        for x in problem.x.unbind(0):
            z, s, _ = step(x, z, s, weights, c, jump_first, "super")
            spikes.append(z)
    else:
        step = _compiled(reference.feed_forward_step)
        s = State(*state)
        for x in problem.x.unbind(0):
            z, s, _ = step(x, s, c, jump_first, "super")
            spikes.append(z)
    return torch.stack(spikes)


def _norse_loop(problem: Problem | RecurrentProblem, rows: Callable[[Tensor], Any]) -> Tensor:
    import norse.torch as norse

    shared = norse.CobaLIFParameters._fields  # norse's neurons have no refractory period
    # in double precision, as the reference has Python numbers: products with dt are rounded once
    given = {name: value for name, value in numbers_of(problem.record()).items() if name in shared}
    numbers = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in given.items()}
    p = norse.CobaLIFParameters(**numbers, method="super")
    recurrent = isinstance(problem, RecurrentProblem)
    state = (norse.CobaLIFState if recurrent else norse.CobaLIFFeedForwardState)(*problem.state)
    spikes = []
    for x in rows(problem.x):
        if isinstance(problem, RecurrentProblem):
            z, state = norse.coba_lif_step(x, state, problem.input_weights, problem.recurrent_weights, p, problem.dt)
        else:
            z, state = norse.coba_lif_feed_forward_step(x, state, p, problem.dt)
        spikes.append(z)
    return torch.stack(spikes)


def _snntorch_loop(x: Tensor) -> Tensor:
    import snntorch

    neuron = snntorch.Leaky(beta=0.95, threshold=1.0).to(x.device)
    potential, spikes = neuron.init_leaky().to(x.device), []
    for row in x.unbind(0):
        z, potential = neuron(row, potential)
        spikes.append(z)
    return torch.stack(spikes)


def _spikingjelly(x: Tensor) -> Tensor:
    from spikingjelly.activation_based import neuron

    spikes: Tensor = neuron.LIFNode(tau=20.0, step_mode="m").to(x.device)(x)
    return spikes


def assert_same(case: Case, contender: Contender, expected: Tensor) -> None:
    """Raise an AssertionError if a contender's result is not the reference's.

    Spikes must be the same, except those that rounding moves if operations are fused. A gradient may differ by its rounding
    errors, which add up like a random walk.
    """
    result = contender.run()
    if contender.roundings is None:
        return
    if case.train:
        allowed = math.sqrt(contender.roundings) * torch.finfo(case.dtype).eps / 2 * float(expected.abs().max())
        assert float((result - expected).abs().max()) <= allowed, f"{case.name}: gradient of {contender.name}"
        return
    spikes = (unpack_spikes(result, case.steps) if result.dtype == torch.int32 else result).to(expected.dtype)
    if not torch.equal(spikes, expected):
        assert contender.flips is not None, f"{case.name}: spikes of {contender.name}"
        wrong = contender.flips(spikes, expected)
        assert not wrong, f"{case.name}: spikes of {contender.name} ({wrong})"


def wrong_flips(case: Case, problem: Problem | RecurrentProblem, spikes: Tensor, expected: Tensor) -> str:
    """Say what is wrong with the spikes of a contender that fuses operations; empty if rounding explains them.

    Until the first spike that differs, both runs are the same except for rounding: about 16 errors in each step, which add
    up like a random walk, in units of the largest potential. So at the first difference the reference's potential must be
    so close to the threshold. Unconnected neurons are looked at one by one; in a recurrent network, the first difference of
    a whole batch row counts.
    """
    _, trace = problem.run("reference", order=ORDER[case.kind], record_states=True)
    state: Any = problem.state
    before = [torch.cat([first[None], after[:-1]]) for first, after in zip(state, trace, strict=True)]
    c = derive_constants(problem.record(), problem.dt, state.v.dtype, problem.x.device)
    never = c._replace(v_thresh=torch.full_like(c.v_thresh, math.inf))
    jump_first = ORDER[case.kind] == "jump_first"
    if isinstance(problem, RecurrentProblem):
        z, *fields = before
        weights = reference.SplitWeights.of(problem.input_weights, problem.recurrent_weights)
        u = reference.recurrent_step(problem.x, z, State(*fields), weights, never, jump_first, "super").state.v
    else:
        u = reference.feed_forward_step(problem.x, State(*before), never, jump_first, "super").state.v
    differs = spikes != expected
    shared = differs.any(-1, keepdim=True) if case.kind == "recurrent" else differs
    first = differs & (shared.cumsum(0) == 1)
    scale = max(float(values.abs().max()) for values in (u, trace.v, c.v_thresh, c.e_rev_E, c.e_rev_I))
    margin = math.sqrt(16 * case.steps) * torch.finfo(u.dtype).eps / 2 * scale
    farthest = float((u - c.v_thresh).abs()[first].max())
    if farthest <= margin:
        return ""
    return f"one differs where the potential is {farthest:.2g} from the threshold, of which rounding explains {margin:.2g}"


def time_interleaved(runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call. In each round every run is called once, so that a busy machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that a call uses, in bytes. On a CPU it is that of the resident set; None on systems but Linux."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        run()
        synchronize(device)
        return int(torch.accelerator.max_memory_allocated(device) - before)
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back to the system
    before = _kilobytes(status, "VmRSS")
    reset.write_text("5")  # from here on, Linux records a new peak
    run()
    return 1024 * (_kilobytes(status, "VmHWM") - before)


def _kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))
