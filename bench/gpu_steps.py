"""The steps of ``gpu.py``, each in its own process: python bench/gpu_steps.py STEP --device cuda --out DIR [--small]"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import coba_triton
from coba_triton.common.versions import driver_version, package_version
from coba_triton.ops.spikes import unpack_spikes
from coba_triton.tools import contenders, tuner
from coba_triton.tools.problems import Case, problem, recurrent_problem, sparse_problem
from coba_triton.tuning import tables

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("coba-triton", "torch", "triton", "numpy", "numba", "norse", "snntorch", "spikingjelly")
ROUNDS = 5


class Step:
    """Knows where a step runs, and takes its results."""

    def __init__(self, name: str, device: str, out: Path, small: bool) -> None:
        self.device = torch.device(device)
        self.small = small
        self.out = out
        self.backend = "cpu" if self.device.type == "cpu" else "triton"
        self._lines = (out / f"{name}.jsonl").open("w", encoding="utf-8")

    def say(self, **result: Any) -> None:
        """Write a result to the step's file at once, and print it."""
        self._lines.write(json.dumps(result) + "\n")
        self._lines.flush()
        print(result)

    def needs_a_gpu(self) -> bool:
        """Whether the device is no GPU; then a result says so."""
        if self.device.type != "cuda":
            self.say(text=f"needs a CUDA device, not {str(self.device)!r}")
        return self.device.type != "cuda"


def device_name(device: torch.device) -> str:
    """The name of the card, or of the processor."""
    return tables.cpu_name() if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))


def machine(step: Step) -> None:
    """Describe the machine, and measure its limits: bytes and floating-point operations per second."""
    bandwidth = tuner.copy_bandwidth(step.device)
    size = 512 if step.small else 8192
    a = torch.randn(size, size, device=step.device)
    rounds = 3 if step.small else 10
    seconds = min(tuner.seconds_per_call(lambda: a @ a, step.device, 1) for _ in range(rounds))
    step.say(
        name=device_name(step.device),
        driver=driver_version(),
        versions={name: version for name in PACKAGES if (version := package_version(name))},
        missing=[name for name in PACKAGES if package_version(name) is None],
        sources=tables.source_hash(step.backend),
        copy_gb_per_s=bandwidth / 1e9,
        float32_tflops=2 * size**3 / seconds / 1e12,
        threads=torch.get_num_threads(),
    )


def smoke(step: Step) -> None:
    """Compare bits: both directions, torch.compile, CUDA graphs and a streamed run. Any difference ends the step."""
    d, b = step.device, step.backend

    def same(what: str, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
        wrong = [i for i, (x, y) in enumerate(zip(ours, theirs, strict=True)) if not torch.equal(x, y)]
        if wrong:
            raise SystemExit(f"{what}: outputs {wrong} differ from the reference's")
        step.say(text=f"{what}: the bits of the reference")

    for name, case in (
        ("feed-forward", problem(100, (300,), device=d)),
        ("recurrent", recurrent_problem(70, 3, 129, device=d)),
    ):
        spikes, state = case.run(b)
        expected, last = case.run("reference")
        same(name, [spikes, *state], [expected, *last])
        (ours, our_grads), (theirs, their_grads) = case.gradients(b), case.gradients("reference")
        same(f"{name}, training", ours, theirs)
        if name == "feed-forward":
            same(f"{name}, gradient by the input", [our_grads["x"]], [their_grads["x"]])
        kind, rest = type(case), {field: value for field, value in vars(case).items() if field != "x"}
        compiled = torch.compile(
            lambda x, kind=kind, rest=rest: kind(x=x, **rest).run(b)[0], fullgraph=True, backend="aot_eager"
        )
        same(f"{name}, torch.compile", [compiled(case.x)], [expected])
        if d.type == "cuda":
            for train in (False, True):
                leaf = case.x

                def run(case: Any = case, train: bool = train, leaf: torch.Tensor = leaf) -> torch.Tensor:
                    leaf.requires_grad_(train)
                    with torch.set_grad_enabled(train):
                        out = case.run(b)[0]
                        result = torch.autograd.grad(out.sum(), leaf)[0] if train else out
                    leaf.requires_grad_(False)
                    return result

                wanted = run().clone()
                same(f"{name}, CUDA graph{', training' if train else ''}", [contenders.graphed(run)()], [wanted])
    source = torch.rand(2000, 64, device=d) * 0.005
    result = coba_triton.simulate(coba_triton.CobaLIF(coba_triton.CobaLIFParameters(), 0.1).to(d), source, progress=False)
    whole, _ = coba_triton.coba_lif_feed_forward_integral(source, None, dt=0.1, backend="reference")
    same("simulate", [torch.from_numpy(result.spikes[:])], [whole.bool().cpu()])


def processes() -> int:
    """How many processes compile kernels at the same time."""
    return max(1, min(12, len(os.sched_getaffinity(0)) - 2))


def tests(step: Step) -> None:
    """Run the tests of the kernels on the device."""
    if step.needs_a_gpu():
        return
    files = ["kernels/test_feed_forward_kernels.py", "kernels/test_recurrent.py", "kernels/test_recurrent_kernels.py"]
    files += ["kernels/test_sparse_kernels.py", "kernels/test_time_chunk_kernels.py", "ops/test_operators.py"]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:benchmark", "--show-capture=no"]
    command += ["--durations=20"]
    if package_version("pytest-timeout"):
        command += ["--timeout", "60"]
    if package_version("pytest-xdist"):
        command += ["-n", str(processes()), "--dist", "load"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    log = step.out / "pytest.log"  # if the time runs out, it shows how far the tests came
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([*command, *files], cwd=ROOT / "tests", env=environment, stdout=file, stderr=file)
    lines = log.read_text(encoding="utf-8").strip().splitlines() or ["nothing ran"]
    step.say(text=lines[-1], failed=[line for line in lines if line.startswith(("FAILED", "ERROR"))])
    if done.returncode:
        raise SystemExit(1)


def check(step: Step) -> None:
    """Run ``coba-triton check``, which compares all cases with the reference."""
    report = step.out / "check.json"
    command = [sys.executable, "-m", "coba_triton.cli", "check", "--device", str(step.device), "--report", str(report)]
    command += ["--only", "input dtypes"] if step.small else ["--full", "--jobs", str(processes())]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-4000:])
    results = json.loads(report.read_text(encoding="utf-8"))["results"] if report.exists() else []
    count = {status: sum(result["status"] == status for result in results) for status in ("passed", "failed", "skipped")}
    step.say(text=", ".join(f"{number} {status}" for status, number in count.items()), **count)
    if done.returncode:
        raise SystemExit(1)


def host_us(run: Callable[[], Any], device: torch.device) -> float:
    """The microseconds of the host's work: until a call returns, while the device is idle. A median of 20 calls."""
    taken = []
    for _ in range(20):
        contenders.synchronize(device)
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e6


def compete(step: Step, case: Case, name: str, kind: str, bandwidth: float, rivals: bool, bytes_moved: float | None) -> None:
    """Time this package's ways to run a case, after a check of their results; with ``rivals``, all others as well.

    If the reference cannot run, nothing is timed.
    """
    tensors = case.build(step.device)
    expected, able = None, []
    for contender in contenders.contenders(case, step.backend, tensors):
        ours = contender.name.split(",")[0] == step.backend
        if not ours and not rivals and expected is not None:
            continue
        try:
            expected = contender.run() if expected is None else expected
            contenders.assert_same(case, contender, expected)
            if ours or rivals:
                able.append(contender)
        except Exception as error:  # another package may raise anything; go on with the next one
            if ours:
                raise
            step.say(case=name, missing=contender.name, why=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
            if expected is None:  # the reference, for which a smaller card may lack memory
                return
    for package in contenders.OTHER_PACKAGES if rivals else ():
        if package_version(package) is None:
            step.say(case=name, missing=package, why="it is not installed")
    seconds = contenders.time_interleaved({contender.name: contender.run for contender in able}, ROUNDS, step.device)
    medians = {one: statistics.median(taken) for one, taken in seconds.items()}
    rate = float(expected.double().mean()) if expected is not None and not case.train else None
    for contender in able:
        low, median, high = statistics.quantiles(seconds[contender.name], n=4)
        ours = contender.name in (step.backend, f"{step.backend}, graphed")  # which move as many bytes
        step.say(
            case=name,
            kind=kind,
            run=contender.name,
            ours=ours,
            same=contender.roundings is not None,
            T=case.steps,
            cells=case.batch * case.neurons,
            median_s=median,
            p25_s=low,
            p75_s=high,
            ps_per_neuron_step=median / case.neuron_steps * 1e12,
            ms_per_1000_steps=median / case.steps * 1e6,
            percent_of_copy=100 * bytes_moved * case.neuron_steps / median / bandwidth if ours and bytes_moved else None,
            host_us=host_us(contender.run, step.device) if contender.name.split(",")[0] == step.backend else None,
            times_eager=medians["reference"] / median if rivals else None,
            spikes_per_neuron_step=rate,
        )


def feed_forward(step: Step) -> None:
    """Time unconnected neurons, inference and training, for several numbers of neurons."""
    bandwidth = tuner.copy_bandwidth(step.device)
    for neurons in (64, 1024) if step.small else (1024, 65536, 262144, 4194304):
        for train in (False, True):
            _feed_forward_case(step, neurons, train, bandwidth, rivals=False)


def _feed_forward_case(step: Step, neurons: int, train: bool, bandwidth: float, rivals: bool) -> None:
    steps = 50 if step.small else 200 if rivals or neurons > 2**20 else 1000
    if train and neurons > 2**20:
        steps = 64  # for each neuron and step of the reference, autograd keeps twenty numbers
    kind = "training" if train else "inference"
    case = Case("gpu", "feed_forward", steps, 1, neurons, train)
    # float32 in and out; training: forward 4 + 1.63 saved, backward 4 + 1.63 read, the gradient 4 + 4
    compete(step, case, f"feed-forward {neurons} {kind}", kind, bandwidth, rivals, 19.3 if train else 8.0)


def recurrent(step: Step) -> None:
    """Time recurrent populations with about 1 % spikes per neuron and step."""
    sizes = ((256, 32), (512, 32), (1024, 32), (1024, 1), (4096, 1))
    for neurons, batch in ((32, 1), (64, 4)) if step.small else sizes:
        for train in (False, True) if neurons <= 1024 else (False,):
            _recurrent_case(step, neurons, batch, train, rivals=False)


def _recurrent_case(step: Step, neurons: int, batch: int, train: bool, rivals: bool) -> None:
    kind = "training" if train else "inference"
    steps = 40 if step.small else 200 if rivals else 1000
    case = Case("gpu", "recurrent", steps, batch, neurons, train)
    compete(step, case, f"recurrent {neurons} x {batch} {kind}", kind, 1.0, rivals, None)


def rivals(step: Step) -> None:
    """Time both kinds of populations beside a compiled step and other packages."""
    bandwidth = tuner.copy_bandwidth(step.device)
    for train in (False, True):
        _feed_forward_case(step, 64 if step.small else 262144, train, bandwidth, rivals=True)
        _recurrent_case(step, *((64, 4) if step.small else (1024, 32)), train, rivals=True)


def time_runs(step: Step, case: str, runs: dict[str, Callable[[], Any]], neuron_steps: int, steps: int) -> dict[str, float]:
    """Time runs in turns, and say the result of each; returns the medians in seconds."""
    medians = {}
    for run in runs.values():
        run()  # compiles
    for name, seconds in contenders.time_interleaved(runs, ROUNDS, step.device).items():
        low, median, high = statistics.quantiles(seconds, n=4)
        medians[name] = median
        step.say(
            case=case, run=name, ours=True, median_s=median, p25_s=low, p75_s=high,
            ps_per_neuron_step=median / neuron_steps * 1e12, ms_per_1000_steps=median / steps * 1e6,
        )  # fmt: skip
    return medians


def few(step: Step) -> None:
    """Time few neurons over many steps, whole and in chunks of time."""
    steps = 4000 if step.small else 100_000
    for neurons in (1, 32) if step.small else (1, 32, 512, 4096):
        tensors = Case("gpu", "feed_forward", steps, 1, neurons).build(step.device)  # of numbers, for which the rule holds
        chunks = [1, 8, 32, 128] if neurons <= 512 else [1, 4, 8, 16]
        runs = {f"{count} chunks": functools.partial(tensors.run, step.backend, time_chunks=count) for count in chunks}
        runs["as it chooses"] = functools.partial(tensors.run, step.backend)
        expected = runs["1 chunks"]()[0]
        for name, run in runs.items():
            if not torch.equal(run()[0], expected):
                raise SystemExit(f"{neurons} neurons, {name}: the bits differ from those in one piece")
        time_runs(step, f"few {neurons} x {steps}", runs, neurons * steps, steps)


def networks(step: Step) -> None:
    """Simulate the networks of ``peers/network.py``; the spikes of the smaller ones must be those of the CPU kernels."""
    sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "bench" / "peers")]
    from network import DT, make_coba2005, make_va
    from networks import arguments_of

    cases = (("va", 4000, 1.0), ("coba2005", 4000, 10.0), ("va", 100_000, 1.0), ("va", 1_000_000, 0.2))
    for name, neurons, seconds in (("va", 4000, 0.05),) if step.small else cases:
        net = SimpleNamespace(n=neurons, **(make_va if name == "va" else make_coba2005)(neurons, 1))
        steps = round(seconds * 1000 / DT)
        arguments = arguments_of(net, steps, torch.float32, str(step.device))
        run = functools.partial(coba_triton.coba_lif_integral, **arguments, backend=step.backend)
        words, _ = run()
        spikes = int(unpack_spikes(words[:320], min(steps, 10240), torch.uint8).sum(dtype=torch.int64))
        if neurons <= 100_000 and step.device.type != "cpu":
            few_steps = min(steps, 2000)
            on_cpu = arguments_of(net, few_steps, torch.float32, "cpu")
            expected, _ = coba_triton.coba_lif_integral(**on_cpu, backend="cpu")
            if not torch.equal(words[: few_steps // 32].cpu(), expected[: few_steps // 32]):
                raise SystemExit(f"{name} {neurons}: the bits differ from those of the CPU within {few_steps} steps")
            step.say(text=f"{name} {neurons}: {few_steps} steps have the bits of the CPU")
        contenders.synchronize(step.device)
        case = f"network {name} {neurons}"
        medians = time_runs(step, case, {step.backend: run}, neurons * steps, steps)
        step.say(
            text=f"{case}: {seconds / medians[step.backend]:.3g} biological seconds a second, "
            f"{spikes / min(steps, 10240) / neurons / DT * 1000:.3g} Hz, {len(net.sources):,} synapses"
        )
        del arguments, run, words


def training(step: Step) -> None:
    """Time training through sparse synapses beside the same weights as a dense matrix, forward and back."""
    torch.manual_seed(0)
    for neurons, batch in ((64, 2),) if step.small else ((1024, 32), (4096, 8)):
        weights = torch.randn(neurons, neurons) * 0.01 * (torch.rand(neurons, neurons) < 0.1)
        input_weights = (torch.randn(neurons, 100).abs() * 0.06 * 0.13).to(step.device)
        x = (torch.rand(200, batch, 100) < 0.1).float().to(step.device)

        def run(form: Any, x: Tensor = x, input_weights: Tensor = input_weights) -> Tensor:
            leaf = form.detach().requires_grad_()
            spikes, _ = coba_triton.coba_lif_integral(x, None, input_weights, leaf, dt=0.001, backend=step.backend)
            spikes.sum().backward()
            return spikes

        forms = {"dense": weights.to(step.device), "sparse": weights.to_sparse_csr().to(step.device)}
        runs = {name: functools.partial(run, form) for name, form in forms.items()}
        time_runs(step, f"training {neurons} x {batch}, 10 % of all synapses", runs, 200 * batch * neurons, 200)


def digits(step: Step) -> None:
    """Run the training example of this repository on the device."""
    if step.small:
        step.say(text="left out of the practice run")
        return
    command = [sys.executable, str(ROOT / "examples" / "train_digits.py")]
    command += ["--device", str(step.device), "--out", str(step.out)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-8000:], done.stderr[-4000:])
    if done.returncode:
        raise SystemExit(1)
    step.say(
        case="digits",
        run=step.backend,
        ours=True,
        median_s=time.perf_counter() - started,
        last=done.stdout.splitlines()[-3:],
    )


def tuning_tables(step: Step) -> None:
    """Tune launch parameters for this card at several sizes, into one table that can be shipped."""
    if step.needs_a_gpu():
        return
    from coba_triton.cli import main as command

    table = step.out / "tables.json"
    both = ("feed_forward_forward", "feed_forward_backward")
    tasks = [(("recurrent_forward",), neurons, batch) for neurons, batch in ((512, 32), (1024, 32), (256, 32), (1024, 1))]
    tasks += [(both, neurons, 1) for neurons in (65536, 1048576, 1024)]
    for kernels, neurons, batch in tasks:
        options = [argument for kernel in kernels for argument in ("--kernel", kernel)]
        options += ["--neurons", str(neurons), "--batch", str(batch), "--device", str(step.device)]
        status = command(["tune", *options, "--budget", "4", "--out", str(table)])
        step.say(task=f"{' and '.join(kernels)} {neurons} x {batch}", status=status)
        if status:
            raise SystemExit(status)
    step.say(text=f"tuned {len(tasks)} sizes into {table.name}")


NCU_SECTIONS = ("SpeedOfLight", "WarpStateStats", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis", "InstructionStats")
# What Nsight Compute looks at: the kernel, and a program that launches it.
SPECIMENS = {
    "feed-forward": ("forward_kernel", "problem(200, (262144,), device='cuda').run('triton')"),
    "feed-forward-training": ("backward_kernel", "problem(200, (262144,), device='cuda').gradients('triton')"),
    "recurrent": ("forward_kernel", "sparse_problem(200, 32, 1024, device='cuda').run('triton', path='events')"),
    "sparse": ("sparse_forward_kernel", "network_problem(200, 1, 4000, device='cuda').run('triton')"),
}


def lacks(step: Step, tool: str) -> bool:
    """Whether there is no GPU or no such program; then a result says so."""
    if step.needs_a_gpu():
        return True
    if shutil.which(tool) is None:
        step.say(text=f"{tool} is not installed")
        return True
    return False


def profile(step: Step) -> None:
    """Run Nsight Compute on the most important kernels: bandwidth, occupancy, and what warps wait for."""
    if lacks(step, "ncu"):
        return
    for name, (kernel, call) in SPECIMENS.items():
        program = f"import torch; from coba_triton.tools.problems import *; {call}; torch.cuda.synchronize()"
        command = ["ncu", "--clock-control", "none", "--kernel-name", kernel, "--launch-count", "1"]
        for section in NCU_SECTIONS:
            command += ["--section", section]
        done = subprocess.run([*command, sys.executable, "-c", program], capture_output=True, text=True)
        (step.out / f"ncu-{name}.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        step.say(text=f"ncu of {name}: exit status {done.returncode}, ncu-{name}.txt")


def sanitizer(step: Step) -> None:
    """Run compute-sanitizer on small cases: it finds accesses out of bounds, and races in shared memory."""
    if lacks(step, "compute-sanitizer"):
        return
    program = (
        "from coba_triton.tools.problems import problem, recurrent_problem\n"
        "problem(20, (100,), device='cuda').gradients('triton')\n"
        "recurrent_problem(34, 2, 75, device='cuda').gradients('triton')"
    )
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    wrong = False
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        (step.out / f"sanitizer-{tool}.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        step.say(text=f"{tool}: {(done.stdout.strip().splitlines() or ['nothing was said'])[-1]}")
        wrong |= done.returncode != 0
    if wrong:
        raise SystemExit(1)


def barrier(step: Step) -> None:
    """Check and time the kernel whose programs wait for each other, with a small spin limit, so that it cannot hang long."""
    if step.needs_a_gpu():
        return
    from coba_triton.backend.triton import meeting

    meeting.SPIN_LIMIT = 200_000
    case = recurrent_problem(70, 2, 1000, device=step.device)
    spikes, state = case.run("triton", path="sliced")
    expected, last = case.run("reference")
    if not all(map(torch.equal, [spikes, *state], [expected, *last])):
        raise SystemExit("path 'sliced': the bits differ from the reference's")
    for neurons, batch in ((512, 1), (1024, 1), (2048, 1), (1024, 32), (4096, 1), (4096, 8)):
        tensors = sparse_problem(500, batch, neurons, device=step.device)
        runs = {path: functools.partial(tensors.run, "triton", path=path) for path in ("events", "sliced")}
        time_runs(step, f"barrier {neurons} x {batch}", runs, 500 * batch * neurons, 500)


RUNS: dict[str, Callable[[Step], None]] = {
    "machine": machine,
    "smoke": smoke,
    "tests": tests,
    "check": check,
    "feed-forward": feed_forward,
    "recurrent": recurrent,
    "networks": networks,
    "few": few,
    "training": training,
    "rivals": rivals,
    "digits": digits,
    "tuning": tuning_tables,
    "profile": profile,
    "sanitizer": sanitizer,
    "barrier": barrier,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=[*RUNS, "name"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    if arguments.step == "name":
        print(device_name(torch.device(arguments.device)))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    RUNS[arguments.step](Step(arguments.step, arguments.device, arguments.out, arguments.small))


if __name__ == "__main__":
    main()
