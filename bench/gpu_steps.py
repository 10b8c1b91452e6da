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
from typing import Any

import torch

import coba_triton
from coba_triton.common.versions import driver_version, package_version
from coba_triton.tools import contenders, tuner
from coba_triton.tools.problems import Case, problem, recurrent_problem, sparse_problem
from coba_triton.tuning import tables

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("coba-triton", "torch", "triton", "numpy", "numba", "norse", "snntorch", "spikingjelly")
ROUNDS = 7


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
        compiled = torch.compile(
            lambda x, case=case: type(case)(**(vars(case) | {"x": x})).run(b)[0], fullgraph=True, backend="aot_eager"
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
    source = torch.rand(2000, 64, device=d) * 0.05
    result = coba_triton.simulate(coba_triton.CobaLIF(coba_triton.CobaLIFParameters(), 0.1).to(d), source, progress=False)
    whole, _ = coba_triton.coba_lif_feed_forward_integral(source, None, dt=0.1, backend="reference")
    same("simulate", [torch.from_numpy(result.spikes[:])], [whole.bool().cpu()])


def tests(step: Step) -> None:
    """Run the tests of the kernels on the device."""
    if step.needs_a_gpu():
        return
    files = ["kernels/test_feed_forward_kernels.py", "kernels/test_recurrent.py", "kernels/test_recurrent_kernels.py"]
    files += ["ops/test_operators.py", "bench/test_training.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "--show-capture=no"]
    if package_version("pytest-xdist"):
        command += ["-n", "12", "--dist", "load"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([*command, *files], cwd=ROOT / "tests", env=environment, capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-2000:])
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    step.say(text=(done.stdout.strip().splitlines() or ["nothing ran"])[-1], failed=failed)
    if done.returncode:
        raise SystemExit(1)


def check(step: Step) -> None:
    """Run ``coba-triton check``, which compares all cases with the reference."""
    report = step.out / "check.json"
    command = [sys.executable, "-m", "coba_triton.cli", "check", "--device", str(step.device), "--report", str(report)]
    command += ["--only", "input dtypes"] if step.small else ["--full"]
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
    """Time this package's ways to run a case, after a check of their results; with ``rivals``, other packages as well."""
    tensors = case.build(step.device)
    expected, able = None, []
    for contender in contenders.contenders(case, step.backend, tensors):
        ours = contender.name.split(",")[0] == step.backend
        if not ours and not rivals and contender.name != "reference":
            continue
        try:
            expected = contender.run() if expected is None else expected
            contenders.assert_same(case, contender, expected)
            able.append(contender)
        except Exception as error:  # another package may raise anything; go on with the next one
            if ours:
                raise
            step.say(case=name, missing=contender.name, why=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    for package in contenders.OTHER_PACKAGES if rivals else ():
        if package_version(package) is None:
            step.say(case=name, missing=package, why="it is not installed")
    seconds = contenders.time_interleaved({contender.name: contender.run for contender in able}, ROUNDS, step.device)
    medians = {one: statistics.median(taken) for one, taken in seconds.items()}
    rate = float(expected.double().mean()) if expected is not None and not case.train else None
    for contender in able:
        low, median, high = statistics.quantiles(seconds[contender.name], n=4)
        ours = contender.name == step.backend
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
            times_eager=medians["reference"] / median,
            spikes_per_neuron_step=rate,
        )


def feed_forward(step: Step) -> None:
    """Time unconnected neurons, inference and training, for several numbers of neurons; then some beside other packages."""
    bandwidth = tuner.copy_bandwidth(step.device)
    sizes, compared = ((64, 1024), (64,)) if step.small else ((1024, 4096, 65536, 262144, 4194304), (262144, 4096))
    for neurons, rivals in [*((n, False) for n in sizes), *((n, True) for n in compared)]:
        for train in (False, True):
            steps = 50 if step.small else 1000 if neurons <= 65536 else 200
            if train and neurons > 2**20:
                steps = 20  # for each neuron and step of the reference, autograd keeps twenty numbers
            kind = "training" if train else "inference"
            case = Case("gpu", "feed_forward", steps, 1, neurons, train)
            # float32 in and out; training: forward 4 + 1.63 saved, backward 4 + 1.63 read, the gradient 4 + 4
            moved = 19.3 if train else 8.0
            compete(step, case, f"feed-forward {neurons} {kind}", kind, bandwidth, rivals, moved)


def recurrent(step: Step) -> None:
    """Time recurrent populations with about 1 % spikes per neuron and step; then some beside other packages."""
    sizes = ((256, 32), (1024, 32), (256, 1), (1024, 1), (1024, 128), (4096, 1), (4096, 32))
    compared = ((1024, 32), (256, 32))
    if step.small:
        sizes, compared = ((32, 1), (64, 4)), ((64, 4),)
    for (neurons, batch), rivals in [*((size, False) for size in sizes), *((size, True) for size in compared)]:
        for train in (False, True):
            if train and neurons > 1024:
                continue
            kind = "training" if train else "inference"
            steps = 40 if step.small else 200 if rivals else 1000
            case = Case("gpu", "recurrent", steps, batch, neurons, train)
            compete(step, case, f"recurrent {neurons} x {batch} {kind}", kind, 1.0, rivals, None)


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
    table = step.out / "tables.json"
    both = ("feed_forward_forward", "feed_forward_backward")
    tasks = [(both, neurons, 1) for neurons in (1024, 65536, 1048576)]
    tasks += [(("recurrent_forward",), neurons, batch) for neurons, batch in ((256, 32), (1024, 32), (4096, 1))]
    for kernels, neurons, batch in tasks:
        command = [sys.executable, "-m", "coba_triton.cli", "tune", "--neurons", str(neurons), "--batch", str(batch)]
        command += [argument for kernel in kernels for argument in ("--kernel", kernel)]
        done = subprocess.run(
            [*command, "--device", str(step.device), "--budget", "6", "--out", str(table)], capture_output=True, text=True
        )
        print(done.stdout[-4000:], done.stderr[-2000:])
        step.say(task=f"{' and '.join(kernels)} {neurons} x {batch}", status=done.returncode)
    step.say(text=f"tuned {len(tasks)} sizes into {table.name}")


SPECIMENS = {
    "feed-forward": "problem(200, (262144,), device='cuda').run('triton')",
    "recurrent": "sparse_problem(200, 32, 1024, device='cuda').run('triton', path='events')",
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
    """Run Nsight Compute on the two most important kernels: bandwidth, occupancy, and what warps wait for."""
    if lacks(step, "ncu"):
        return
    for name, call in SPECIMENS.items():
        program = f"import torch; from coba_triton.tools.problems import *; {call}; torch.cuda.synchronize()"
        command = ["ncu", "--clock-control", "none", "--kernel-name", "forward_kernel", "--launch-count", "1"]
        for section in ("SpeedOfLight", "WarpStateStats", "Occupancy", "LaunchStats"):
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
    from coba_triton.backend import triton as triton_backend

    triton_backend.SPIN_LIMIT = 200_000
    case = recurrent_problem(70, 2, 1000, device=step.device)
    spikes, state = case.run("triton", path="sliced")
    expected, last = case.run("reference")
    if not all(map(torch.equal, [spikes, *state], [expected, *last])):
        raise SystemExit("path 'sliced': the bits differ from the reference's")
    for neurons, batch in ((1024, 1), (4096, 1), (4096, 8)):
        tensors = sparse_problem(500, batch, neurons, device=step.device)
        runs = {path: functools.partial(tensors.run, "triton", path=path) for path in ("events", "sliced")}
        for name, seconds in contenders.time_interleaved(runs, ROUNDS, step.device).items():
            low, median, high = statistics.quantiles(seconds, n=4)
            step.say(
                case=f"barrier {neurons} x {batch}", run=name, ours=True, median_s=median, p25_s=low, p75_s=high,
                ps_per_neuron_step=median / 500 / neurons / batch * 1e12,
            )  # fmt: skip


RUNS: dict[str, Callable[[Step], None]] = {
    "machine": machine,
    "smoke": smoke,
    "tests": tests,
    "check": check,
    "feed-forward": feed_forward,
    "recurrent": recurrent,
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
