"""The tuning loop: propose sets of launch parameters, verify and time them, and write the best set into a table.

A set that cannot be the fastest is left out. The result with the launcher's own rule is compared with the reference first.
Every other set must give the same bits, and only then it is timed. A journal keeps the results, in case the run is killed.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import torch
from torch import Tensor

from ..common.files import held, is_there, read_text, reason, written_whole
from ..tuning import tables
from ..tuning.tables import Parameters, TableError
from . import checker
from .problems import Problem, RecurrentProblem, problem, sparse_problem

Effort = Literal["quick", "full"]
JOURNAL = "coba_triton tuning journal"
LATENCY = 3e-7  # seconds that a load from a GPU's memory takes at least
SAMPLES = {"quick": 9, "full": 25}
SAMPLE_SECONDS = 2e-3  # a sample lasts at least so long: short calls are repeated within it
NEURON_STEPS = 2**22  # neurons times steps of a timed call on a CPU; a GPU gets 32 times as many


@dataclass(frozen=True)
class Task:
    """A launch to tune: the key of its entry in a table, and the device.

    Attributes:
        backend: ``triton`` or ``cpu``.
        kernel: a name in :data:`coba_triton.tuning.tables.KERNELS`.
        dtype: ``float32`` or ``float64``.
        neurons: N of one batch row.
        batch: B.
        device: the device to measure on.
    """

    backend: str
    kernel: str
    dtype: str
    neurons: int
    batch: int
    device: str = "cpu"

    @property
    def recurrent(self) -> bool:
        """Whether the kernel serves recurrent populations."""
        return self.kernel.startswith("recurrent")

    @property
    def key(self) -> dict[str, Any]:
        """The key of the table's entry. Feed-forward kernels have no batch: all neurons count as one row."""
        neurons, batch = (self.neurons, self.batch) if self.recurrent else (self.neurons * self.batch, 1)
        return {"kernel": self.kernel, "dtype": self.dtype, "neurons": neurons, "batch": batch}

    def rule(self) -> Parameters:
        """The parameters that the launcher's own rule gives."""
        key = self.key
        return tables.heuristic(self.backend, self.kernel, tables.DTYPES[self.dtype], key["neurons"], key["batch"])

    def space(self) -> dict[str, tuple[int, ...]]:
        """The values to try for every parameter. A parameter that has no effect at this size has one value."""
        key, rule = self.key, self.rule()
        cells = key["neurons"] * key["batch"]
        space = dict(tables.SPACE[self.backend][self.kernel])
        for name, values in space.items():
            if name == "threads":
                most = torch.get_num_threads()
                values = tuple(sorted({most, *(2**i for i in range(10) if 2**i < most)}))
            elif name == "tile" and self.backend == "cpu":
                values = tuple(value for value in values if value // 2 < cells) or values[:1]
            elif name in ("num_warps", "replay_warps"):
                values = tuple(value for value in values if value * 16 < cells) or values[:1]
            space[name] = values
        if self.backend == "triton" and self.recurrent:
            from ..backend.triton import parameters, recurrent

            if key["neurons"] <= parameters.row_in_registers(tables.DTYPES[self.dtype]) and "tile" in space:
                space["tile"] = (rule["tile"],)
            if self.kernel == "recurrent_backward" and key["neurons"] <= recurrent.SWEEP_IN_ONE_LAUNCH:
                space["num_warps"] = (rule["num_warps"],)
        return {name: tuple(dict.fromkeys((rule[name], *values))) for name, values in space.items()}

    def __str__(self) -> str:
        return f"{self.kernel} of {self.batch} x {self.neurons} neurons, {self.dtype}, {self.backend} on {self.device}"


@dataclass
class Trial:
    """The result of trying one set of parameters. Times are in seconds for one call.

    Attributes:
        parameters: the set.
        status: ``timed``, ``pruned`` (it cannot be the fastest) or ``failed`` (it does not run, or it changes a bit).
        reason: why it was pruned or failed.
        p20: the time below which a fifth of the calls are.
        p50: the median.
        p80: the time above which a fifth of the calls are.
        max_error: the largest difference to the reference where one is allowed, relative to the largest element.
        compiled: registers, spills and occupancy of the kernel, if it was compiled for a GPU.
    """

    parameters: Parameters
    status: Literal["timed", "pruned", "failed"]
    reason: str = ""
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    max_error: float | None = None
    compiled: dict[str, Any] = field(default_factory=dict)


class Workload(Protocol):
    """How a task is verified and timed. :class:`Timed` does it; tests have others."""

    neuron_steps: int
    bytes_moved: int

    def verify(self) -> float:
        """Compare with the reference and with the bits of the rule; returns the largest error.

        Raises:
            ValueError: if something differs; the message says what.
        """

    def time(self, samples: int) -> Sequence[float]:
        """Seconds for a call, measured ``samples`` times."""

    def floor(self, parameters: Parameters) -> float:
        """The seconds that the memory needs to move the bytes: no call can be faster."""

    def compiled(self, parameters: Parameters) -> dict[str, Any]:
        """Registers, spills and occupancy on a GPU; empty elsewhere."""


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes, the best of ten copies, with as many threads as PyTorch uses."""
    elements = 2**24 if device.type == "cpu" else 2**28
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds_per_call(lambda: target.copy_(source), device, 1) for _ in range(10))


def seconds_per_call(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The mean time of ``repeats`` calls. A GPU's events measure it on a GPU, the clock elsewhere."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    module = torch.get_device_module(device)
    begin, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / repeats


class Timed:
    """Times the public function, or its backward, on random neurons."""

    def __init__(self, task: Task, bandwidth: float) -> None:
        self.task, self.bandwidth = task, bandwidth
        self.device = torch.device(task.device)
        dtype = tables.DTYPES[task.dtype]
        cells = task.neurons * task.batch
        budget = NEURON_STEPS if self.device.type == "cpu" else 32 * NEURON_STEPS
        if task.backend == "triton" and self.device.type == "cpu":
            budget = 2**12  # in the interpreter
        steps = min(1024, max(32, budget // cells // 32 * 32))
        self.case: Problem | RecurrentProblem
        if task.recurrent:
            self.case = sparse_problem(min(steps, 256), task.batch, task.neurons, dtype, self.device)
        else:
            self.case = problem(steps, (cells,), dtype, self.device)
        steps = self.case.x.shape[0]
        self.neuron_steps = steps * cells
        item = dtype.itemsize
        self.backward = task.kernel.endswith("backward")
        # what a feed-forward kernel reads and writes: input, spikes, gradients; the memory does not limit recurrent ones
        self.bytes_moved = self.neuron_steps * (3 * item + 2 if self.backward else 2 * item)
        self.options: dict[str, Any] = {"path": "events"} if task.recurrent else {}
        self.expected = self.case.results("reference", self.backward)
        self.rule_bits: list[Tensor] | None = None

    def verify(self) -> float:
        outputs, grads = self.case.results(self.task.backend, self.backward, **self.options)
        expected, expected_grads = self.expected
        worst = 0.0
        for number, (ours, theirs) in enumerate(zip(outputs, expected, strict=True)):
            if found := checker.compare(f"output {number}", ours, theirs):
                raise ValueError(f"not the reference's bits: {found}")
        if found := checker.compare_gradients(self.case, grads, expected_grads, {}):
            raise ValueError(f"not the reference's numbers: {found}")
        for name, ours in grads.items():
            theirs = expected_grads[name]
            scale = float(theirs.abs().max().clamp(min=1e-30)) if theirs.numel() else 1.0
            worst = max(worst, float((ours - theirs).abs().max()) / scale if theirs.numel() else 0.0)
        bits = [*outputs, *grads.values()]
        if self.rule_bits is None:
            self.rule_bits = bits
        for number, (ours, theirs) in enumerate(zip(bits, self.rule_bits, strict=True)):
            if found := checker.compare(f"result {number}", ours, theirs):
                raise ValueError(f"changes bits: {found}")
        return worst

    def _call(self) -> Callable[[], Any]:
        if not self.backward:
            return torch.no_grad()(lambda: self.case.run(self.task.backend, **self.options))
        leaves = [self.case.recurrent_weights if isinstance(self.case, RecurrentProblem) else self.case.x]
        for leaf in leaves:
            leaf.requires_grad_()
        spikes, _ = self.case.run(self.task.backend, **self.options)
        ones = torch.ones_like(spikes)
        return lambda: torch.autograd.grad(spikes, leaves, ones, retain_graph=True)

    def time(self, samples: int) -> list[float]:
        call = self._call()
        call()
        once = seconds_per_call(call, self.device, 1)
        repeats = max(1, min(1000, int(SAMPLE_SECONDS / max(once, 1e-9))))
        return [seconds_per_call(call, self.device, repeats) for _ in range(samples)]

    def floor(self, parameters: Parameters) -> float:
        if self.task.recurrent:
            return 0.0
        if self.device.type != "cpu" and "steps" in parameters:
            # a thread has one neuron and loads the inputs of `steps` steps ahead; so many bytes arrive every LATENCY
            cells = self.task.neurons * self.task.batch
            read = self.neuron_steps * tables.DTYPES[self.task.dtype].itemsize
            on_their_way = cells * parameters["steps"] * tables.DTYPES[self.task.dtype].itemsize
            return max(self.bytes_moved / self.bandwidth, read * LATENCY / on_their_way)
        return self.bytes_moved / self.bandwidth

    def compiled(self, parameters: Parameters) -> dict[str, Any]:
        if self.task.backend != "triton" or self.device.type == "cpu":
            return {}
        arch = tables.machine("triton", self.device).arch
        return compile_for(self.task, parameters, arch)


# The compiled kernels behind each name in a table.
COMPILED = {
    "feed_forward_forward": ("forward_kernel",),
    "feed_forward_backward": ("backward_kernel",),
    "recurrent_forward": ("recurrent_forward_kernel",),
    "recurrent_backward": ("recurrent_backward_kernel", "shared_backward_kernel", "driven_kernel"),
}


def compile_for(task: Task, parameters: Parameters, arch: str) -> dict[str, Any]:
    """Compile a launch for a target, present or not: registers, spills, shared memory, occupancy of the worst kernel.

    Raises:
        ValueError: if the target is unknown or a kernel does not compile; the message says why.
    """
    from . import compiler

    if arch not in compiler.TARGETS:
        raise ValueError(f"unknown architecture {arch!r}; expected one of {', '.join(compiler.TARGETS)}")
    dtype = tables.DTYPES[task.dtype]
    backward = task.kernel.endswith("backward")
    case: Problem | RecurrentProblem
    if task.recurrent:
        case = sparse_problem(34, task.batch, min(task.neurons, 16384), dtype)
    else:
        case = problem(2, (task.neurons * task.batch,), dtype)
    with compiler.recorded(arch) as recorders, tables.forced(task.kernel, parameters):
        leaf = case.recurrent_weights if isinstance(case, RecurrentProblem) else case.x
        leaf.requires_grad_(backward)
        spikes, _ = case.run("triton", **({"path": "events"} if task.recurrent else {}))
        if backward:
            torch.autograd.grad(spikes.sum(), leaf)
    found: dict[str, Any] = {}
    for kernel in COMPILED[task.kernel]:
        for launch in recorders[kernel].launches[:1]:
            try:
                compiled = compiler.compile_launch(launch, arch)
            except Exception as error:  # whatever the compiler raises is the result
                raise ValueError(f"{kernel} does not compile: {str(error).splitlines()[0]}") from None
            figures = compiler.figures(compiled)
            warps = launch[1]["num_warps"]
            share = compiler.occupancy(arch, figures["registers"], warps, figures["shared"])
            if not found or share < found["occupancy"]:
                found = {"kernel": kernel, **figures, "occupancy": share}
    return found


def proposals(
    space: dict[str, tuple[int, ...]], rule: Parameters, effort: Effort
) -> Generator[tuple[Parameters, int], Parameters | None]:
    """Yield sets of parameters, and how many there will be. The first set is the rule's.

    ``full`` yields all combinations. ``quick`` changes one parameter at a time: ``send`` tells it the best set so far, which
    it changes next.
    """
    if effort == "full":
        every = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
        # sets near the rule come first, as the budget may end early
        every.sort(key=lambda parameters: sum(parameters[name] != rule[name] for name in rule))
        for parameters in every:
            yield parameters, len(every)
        return
    total = 1 + sum(len(values) - 1 for values in space.values())
    best = (yield rule, total) or rule
    for name, values in space.items():
        base = best
        for value in values:
            if value != base[name]:
                best = (yield base | {name: value}, total) or best


class Journal:
    """A file with one JSON line for each set of parameters that was tried. It survives when the run is killed.

    Raises:
        TableError: if another tuning run writes to it, if it belongs to another machine or to other kernels, or if it
            exists and ``resume`` is False.
    """

    def __init__(self, path: Path, header: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.header = {"journal": JOURNAL, **header}
        self.trials: dict[str, Trial] = {}
        with ExitStack() as stack:  # lets go of the lock if opening fails
            try:
                stack.enter_context(held(path))
            except BlockingIOError:
                raise TableError(
                    f"{path} is being written by another tuning run; wait for it, or name another --out"
                ) from None
            except OSError as error:
                raise TableError(f"{path} cannot be locked ({reason(error)}); name another --out") from None
            self._file = stack.enter_context(self._open(resume))
            self._stack = stack.pop_all()

    def _open(self, resume: bool) -> IO[str]:
        lines = []
        if is_there(self.path):
            if not resume:
                raise TableError(f"{self.path} is of a run that did not end; continue it with --resume, or remove it")
            lines = self._read()
        # written anew, without the line that a killed run may have left half written
        with written_whole(self.path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in [self.header, *lines]), encoding="utf-8")
        return self.path.open("a", encoding="utf-8")

    def _read(self) -> list[dict[str, Any]]:
        lines = []
        try:
            content = read_text(self.path)
        except (OSError, ValueError) as error:
            why = reason(error) if isinstance(error, OSError) else error
            raise TableError(f"{self.path} cannot be read ({why}); remove it, or name another --out") from None
        for text in content.splitlines():
            try:
                lines.append(json.loads(text))
            except (ValueError, RecursionError):
                break
        if not lines:
            return []
        if lines[0] != self.header:
            raise TableError(f"{self.path} is of another machine, or of other kernels or versions; remove it")
        kept = []
        for line in lines[1:]:
            try:
                trial = Trial(**{name: value for name, value in line.items() if name != "task"})
                key = self._key(line["task"], line["parameters"])
            except (AttributeError, KeyError, TypeError):
                break
            times = {type(seconds) for seconds in (trial.p20, trial.p50, trial.p80)}
            if times != {float if trial.status == "timed" else type(None)} or not isinstance(trial.compiled, dict):
                break
            self.trials[key] = trial
            kept.append(line)
        return kept

    @staticmethod
    def _key(task: dict[str, Any], parameters: Parameters) -> str:
        return json.dumps([task, parameters], sort_keys=True)

    def find(self, task: Task, parameters: Parameters) -> Trial | None:
        """What an earlier run found; None if it did not try this set."""
        return self.trials.get(self._key(asdict(task), parameters))

    def add(self, task: Task, trial: Trial) -> None:
        """Write a line about a trial."""
        self._file.write(json.dumps({"task": asdict(task), **asdict(trial)}) + "\n")
        self._file.flush()

    def close(self, finished: bool) -> None:
        """Close the file. If the run is finished, remove it, as the table has everything."""
        with self._stack:
            self._file.close()
            if finished:
                self.path.unlink(missing_ok=True)


@dataclass
class Progress:
    """How far the tuning of a task is.

    Attributes:
        task: the task.
        done: how many sets were tried.
        total: how many sets there are at most.
        best: the fastest trial so far.
        latest: the last trial.
        eta: seconds that the rest will take at the pace so far.
    """

    task: Task
    done: int
    total: int
    best: Trial | None
    latest: Trial
    eta: float


@dataclass
class Outcome:
    """The result of tuning a task.

    Attributes:
        task: the task.
        trials: all trials; the first is the rule's.
        complete: whether all sets were tried, before the budget ended.
        neuron_steps: neurons times steps of a timed call.
        bytes_moved: bytes that a call reads and writes.
    """

    task: Task
    trials: list[Trial]
    complete: bool
    neuron_steps: int
    bytes_moved: int

    @property
    def best(self) -> Trial:
        """The fastest trial. The rule's, if no other is faster by more than the spread of the rule's times."""
        rule = self.trials[0]
        timed = [trial for trial in self.trials if trial.p50 is not None]
        fastest = min(timed, key=lambda trial: trial.p50 or 0.0, default=rule)
        if rule.p50 is not None and rule.p20 is not None and (fastest.p50 or 0.0) >= rule.p20:
            return rule
        return fastest


def tune(
    task: Task,
    workload: Workload,
    journal: Journal,
    effort: Effort = "quick",
    deadline: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
    show: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Try the sets of parameters for one task.

    Args:
        task: what to tune.
        workload: how to verify and time it.
        journal: has what was found earlier, and takes what is found now.
        effort: ``quick`` or ``full``.
        deadline: no trial begins after the clock shows this.
        clock: the clock, in seconds.
        show: called after every trial.

    Raises:
        ValueError: if the launcher's own rule does not give the reference's numbers. Then nothing can be tuned.
    """
    trials: list[Trial] = []
    started, fresh, best = clock(), 0, None
    generator = proposals(task.space(), task.rule(), effort)
    parameters, total = next(generator)
    complete = True
    while True:
        trial = journal.find(task, parameters)
        if trial is None and trials and clock() >= deadline:
            complete = False
            break
        if trial is None or not trials:  # the rule always runs: the bits of all other sets are compared with its bits
            made = try_parameters(task, workload, parameters, best, effort)
            if not trials and made.status == "failed":
                raise ValueError(f"{task}: the launcher's own parameters failed: {made.reason}")
            if trial is None:
                trial = made
                journal.add(task, trial)
                fresh += 1
        trials.append(trial)
        if trial.p50 is not None and (best is None or trial.p50 < (best.p50 or 0.0)):
            best = trial
        left = total - len(trials)
        show(Progress(task, len(trials), total, best, trial, left * (clock() - started) / max(1, fresh)))
        try:
            parameters, total = generator.send(best.parameters if best else None)
        except StopIteration:
            break
    if best is not None and best is not trials[0] and trials[0].p50 is not None:
        _run_off(task, workload, trials[0], best, SAMPLES[effort])
    return Outcome(task, trials, complete, workload.neuron_steps, workload.bytes_moved)


def _run_off(task: Task, workload: Workload, rule: Trial, best: Trial, samples: int) -> None:
    """Time the rule and the best set again, in turns, so that a busy machine slows both alike."""
    seconds: dict[int, list[float]] = {id(rule): [], id(best): []}
    for _ in range(samples):
        for trial in (rule, best):
            with tables.forced(task.kernel, trial.parameters):
                seconds[id(trial)] += workload.time(1)
    for trial in (rule, best):
        trial.p20, trial.p50, trial.p80 = quantiles(seconds[id(trial)])


def quantiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The times p20, p50 and p80, see :class:`Trial`."""
    ordered = sorted(seconds)
    p20, p50, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
    return p20, p50, p80


def try_parameters(task: Task, workload: Workload, parameters: Parameters, best: Trial | None, effort: Effort) -> Trial:
    """Verify and time one set of parameters, unless it cannot be faster than ``best``."""
    floor = workload.floor(parameters)
    if best is not None and best.p20 is not None and floor >= best.p20:
        reason = f"roofline: no faster than {floor * 1e3:.3g} ms, the best takes {best.p20 * 1e3:.3g} ms"
        return Trial(parameters, "pruned", reason)
    try:
        compiled = workload.compiled(parameters)
    except ValueError as error:
        return Trial(parameters, "failed", str(error))
    if compiled.get("spills"):
        return Trial(parameters, "pruned", f"spills {compiled['spills']} registers", compiled=compiled)
    if best is not None and compiled and compiled["occupancy"] < 0.25 * best.compiled.get("occupancy", 0.0):
        share = f"{compiled['occupancy']:.0%} of the warps are resident, {best.compiled['occupancy']:.0%} of the best's"
        return Trial(parameters, "pruned", f"occupancy: {share}", compiled=compiled)
    with tables.forced(task.kernel, parameters):
        try:
            largest = workload.verify()
            seconds = workload.time(SAMPLES[effort])
        except (ValueError, RuntimeError) as error:
            return Trial(parameters, "failed", str(error).splitlines()[0], compiled=compiled)
    return Trial(parameters, "timed", "", *quantiles(seconds), largest, compiled)


def entry_of(outcome: Outcome, bandwidth: float, versions: dict[str, Any]) -> dict[str, Any]:
    """The entry of a table for a task."""
    best, rule = outcome.best, outcome.trials[0]

    def measured(trial: Trial) -> dict[str, Any]:
        said = {name: value for name, value in asdict(trial).items() if value not in (None, "", {})}
        if trial.p50:
            rate = outcome.bytes_moved / trial.p50
            said |= {"gb_per_s": rate / 1e9, "roofline": rate / bandwidth}
            said["ns_per_neuron_step"] = trial.p50 / outcome.neuron_steps * 1e9
        return said

    return {
        **outcome.task.key,
        "parameters": best.parameters,
        "sources": tables.source_hash(outcome.task.backend),
        "faster_than_rule": (rule.p50 or 0.0) / best.p50 if best.p50 else None,
        "complete": outcome.complete,
        "device": tables.machine(outcome.task.backend, torch.device(outcome.task.device)).name,
        "threads": torch.get_num_threads(),
        "versions": versions,
        "copy_gb_per_s": bandwidth / 1e9,
        "trials": [measured(trial) for trial in outcome.trials],
    }


def write_table(path: Path, target: tables.Machine, entries: list[dict[str, Any]]) -> None:
    """Put entries into a table, where they replace those with the same key. Several processes may do so at a time.

    Raises:
        TableError: if the file is no table for this machine.
        OSError: if it cannot be written.
    """

    def key(entry: dict[str, Any]) -> list[Any]:
        return [entry[name] for name in ("kernel", "dtype", "neurons", "batch")]

    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path, timeout=60):
        content = open_table(path, target)
        new = [key(entry) for entry in entries]
        kept = [entry for entry in content["entries"] if key(entry) not in new]
        with written_whole(path) as part:
            part.write_text(json.dumps(content | {"entries": kept + entries}, indent=1) + "\n", encoding="utf-8")
    tables.forget()


def open_table(path: Path, target: tables.Machine) -> dict[str, Any]:
    """Read a table; if there is no file, make an empty one in memory.

    Raises:
        TableError: if the file is no table for this backend and device.
    """
    if not is_there(path):
        return {
            "format": tables.FORMAT,
            "version": tables.VERSION,
            "backend": target.backend,
            "arch": target.arch,
            "device": target.name,
            "entries": [],
        }
    try:
        content = tables.read_table(path)
        if (content["backend"], content["device"]) != (target.backend, target.name):
            raise TableError(f"is for {content['backend']} on {content['device']}")
    except TableError as error:
        raise TableError(f"{path} {error}; remove it, or name another --out") from None
    return content
