"""``coba_triton.check`` and ``coba-triton check``: what agrees passes, and a planted bug is found, shrunk and shown."""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import coba_triton
from coba_triton import CobaLIFFeedForwardState, CobaLIFParameters, Synapses
from coba_triton.backend.cpu import launch as cpu_launch
from coba_triton.cli import main
from coba_triton.tools import check_process, check_shrink, checker
from coba_triton.tools.check_cases import Check, Run
from coba_triton.tools.check_shrink import part, shrink
from coba_triton.tools.checker import find_mismatch, sums_are_exact
from coba_triton.tools.problems import DT, NetworkProblem, RecurrentProblem, network_problem, problem, recurrent_problem

CPU = torch.device("cpu")


def test_every_quick_case_has_a_name_of_its_own_and_builds() -> None:
    for backend, level in (("cpu", "quick"), ("triton", "full")):
        checks = checker.select(backend, CPU, level, None)
        names = [f"{check.group}, {check.name}" for check in checks]
        assert len(set(names)) == len(names)
        assert {check.ours.backend for check in checks} == {backend}
    assert {
        "forward",
        "gradients",
        "chunking",
        "determinism",
        "recurrent forward",
        "sparse forward",
        "sparse gradients",
    } <= {check.group for check in checks}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_quick_level_passes(backend, monkeypatch) -> None:
    """The interpreter has every sixth case of each group: ``tests/kernels`` runs these problems there as well."""
    generate = checker.generate

    def every_sixth(*arguments: Any) -> Iterator[Check]:
        seen: Counter[str] = Counter()
        for check in generate(*arguments):
            if seen[check.group] % 6 == 0:
                yield check
            seen[check.group] += 1

    if backend == "triton":
        monkeypatch.setattr(checker, "generate", every_sixth)
    report = coba_triton.check(backend=backend, device="cpu")
    assert report.ok, str(report)
    assert len({result.group for result in report.results}) == (25 if backend == "cpu" else 22)
    assert not any(result.status == "skipped" for result in report.results)


def plant(monkeypatch, module, name, spoil) -> None:
    function = getattr(module, name)

    def spoiled(*args, **kwargs):
        result = function(*args, **kwargs)
        return spoil(result, *args, **kwargs)

    monkeypatch.setattr(module, name, spoiled)


def plant_wrong_voltage(monkeypatch) -> None:
    """After at least four steps the last neuron's potential is one ulp off."""

    def spoil(result, x, state, constants, final, *others):
        if x.shape[0] >= 4:
            final[0, -1] = torch.nextafter(final[0, -1], torch.full((), math.inf, dtype=final.dtype))

    plant(monkeypatch, cpu_launch, "feed_forward_forward", spoil)


def shown_by(snippet: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        exec(snippet, {})
    return text.getvalue()


def test_a_planted_bug_ends_in_exit_status_1_and_a_snippet_that_shows_it(monkeypatch, capsys, tmp_path) -> None:
    path = tmp_path / "report.json"
    arguments = ["check", "--device", "cpu", "--only", "forward, [33, 500] torch.float32 jump_first", "--report", str(path)]
    assert main(arguments) == 0
    assert json.loads(path.read_text())["ok"]
    plant_wrong_voltage(monkeypatch)
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "MISMATCH: forward, [33, 500] torch.float32 jump_first" in printed and "does not agree" in printed
    report = json.loads(path.read_text())
    (failed, *_) = [result for result in report["results"] if result["status"] == "failed"]
    assert not report["ok"] and report["backend"] == "cpu" and report["versions"]["torch"]
    assert failed["snippet"] in printed
    # four steps of one neuron: what the planted bug needs, and no more
    assert "state.v[0]" in failed["detail"] and "1 of 1 elements differ" in failed["detail"]
    assert failed["snippet"].count("], [") == 3
    assert "v differs" in shown_by(failed["snippet"])
    monkeypatch.undo()
    assert "differs" not in shown_by(failed["snippet"])


def test_a_planted_wrong_gradient_is_found_and_shown(monkeypatch) -> None:
    def spoil(result, x, constants, saved, grads, grad_x, *others):
        grad_x[-1] *= 1 + 2**-20

    plant(monkeypatch, cpu_launch, "feed_forward_backward", spoil)
    report = coba_triton.check(backend="cpu", device="cpu", only="gradients, super torch.float32")
    (failed,) = report.failures
    assert failed.detail.startswith("gradient by x[") and not report.ok
    assert "x differs" in shown_by(failed.snippet)
    assert failed.snippet in str(report)


def test_a_planted_recurrent_bug_is_found_on_any_weights(monkeypatch) -> None:
    """A wrong synapse is no rounding."""

    def spoil(result, net, x, drive, z, state, out, *others):
        out.states[1] += 2e-5
        return result

    plant(monkeypatch, cpu_launch, "recurrent_block", spoil)
    report = coba_triton.check(backend="cpu", device="cpu", only="recurrent on any weights, [40, 2, 60] events")
    assert not report.ok


def plant_early_arrivals(monkeypatch) -> None:
    """What a spike sends over five steps or more arrives one step too early."""
    original = cpu_launch.sparse_block

    def spoiled(net, *others):
        delays = net.recurrent.delays
        early = None if delays is None else torch.where(delays > 4.5 * DT, delays - DT, delays)
        return original(net._replace(recurrent=net.recurrent._replace(delays=early)), *others)

    monkeypatch.setattr(cpu_launch, "sparse_block", spoiled)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_planted_wrong_delay_is_found_and_shrunk(monkeypatch, kind) -> None:
    """Few synapses are left: the one with the delay, and what lets its source fire."""
    only = f"delays mixed, {kind} input, any weights"
    assert coba_triton.check(backend="cpu", device="cpu", only=only).ok
    plant_early_arrivals(monkeypatch)
    monkeypatch.setattr(check_shrink, "SHRINK_SECONDS", 600.0)  # a busy machine gets as far as a quiet one
    report = coba_triton.check(backend="cpu", device="cpu", only=only)
    (failed,) = report.failures
    assert not report.ok and failed.group == "sparse forward" and "state." in failed.detail
    (line,) = [line for line in failed.snippet.splitlines() if "recurrent_weights=" in line]
    synapses = eval(line.strip().removeprefix("recurrent_weights=").rstrip(","), {"torch": torch, "Synapses": Synapses})
    assert 1 <= synapses.count <= 3 and synapses.neurons <= 4 and synapses.longest > 4.5 * DT
    assert ("input_weights=Synapses" in failed.snippet) == (kind == "sparse")
    assert "differs" in shown_by(failed.snippet)
    monkeypatch.undo()
    assert "differs" not in shown_by(failed.snippet)


@pytest.mark.slow
def test_a_planted_wrong_gradient_by_synapses_is_found_and_shown(monkeypatch) -> None:
    def spoil(result, net, ring, x, drive, state, words, grad_spikes, grad_states, sweep, *others):
        sweep.recurrent[:, -1] *= 1 + 1e-6

    plant(monkeypatch, cpu_launch, "sparse_backward_block", spoil)
    report = coba_triton.check(backend="cpu", device="cpu", only="sparse gradients, [37, 2, 30] super float64 decay_first")
    assert report.failures
    for failed in report.failures:
        assert failed.detail.startswith("gradient by recurrent_weights[") and ", allowed are " in failed.detail
        assert "recurrent_weights differs" in shown_by(failed.snippet)


def test_your_own_sparse_network(monkeypatch) -> None:
    """Any weights have exact sums; only those of a dense matrix of inputs have not, and are compared step by step."""
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(40, 2, 2, 5, generator=g) < 0.3).float()
    p = CobaLIFParameters(refractory=0.3)
    synapses = [
        Synapses.from_coo(
            torch.arange(30) % 7, torch.arange(30) % sources, torch.randn(30, generator=g), delays, shape=(7, sources)
        )
        for sources, delays in ((5, None), (7, 0.2 + 0.1 * (torch.arange(30) % 4)))
    ]
    report = coba_triton.check(x, None, *synapses, p, 0.1, backend="cpu")
    assert report.ok and [result.name for result in report.results] == ["forward", "two runs", "gradients"]
    dense = 0.3 * torch.randn(7, 5, generator=g)
    report = coba_triton.check(x, None, dense, synapses[1], p, 0.1, backend="cpu")
    assert report.ok and [result.name for result in report.results] == ["forward", "two runs"]
    matrix = torch.randn(7, 7, generator=g)
    report = coba_triton.check(x, None, synapses[0], matrix, p, 0.1, backend="cpu", delay=0.3)
    assert report.ok and len(report.results) == 3

    def spoil(result, net, ring, start, x, drive, state, out, *others):
        if out.states is not None:
            out.states[1] += 2e-4
        return result

    plant(monkeypatch, cpu_launch, "sparse_block", spoil)
    report = coba_triton.check(x, None, dense, synapses[1], p, 0.1, backend="cpu")
    assert [failed.name for failed in report.failures] == ["forward"]
    assert "state.g_e" in report.failures[0].detail


def test_your_own_input() -> None:
    x = torch.randn(20, 3, 5)
    p = CobaLIFParameters(v_thresh=torch.linspace(-15.0, -10.0, 5), c_m_inv=torch.tensor(4.0, requires_grad=True))
    report = coba_triton.check(x, None, p=p, dt=0.1, backend="cpu", order="jump_first")
    assert report.ok and [result.name for result in report.results] == ["forward", "two runs", "gradients"]
    weights = 0.01 * torch.randn(4, 5), 0.01 * torch.randn(4, 4)
    report = coba_triton.check(x, None, *weights, dt=0.1, backend="cpu")
    # arbitrary weights: rounding may decide a spike, and with it every gradient
    assert report.ok and [result.name for result in report.results] == ["forward", "two runs"]
    exact = [torch.round(w * 1024) / 1024 for w in weights]
    report = coba_triton.check((x > 1).float(), None, *exact, dt=0.1, backend="cpu")
    assert report.ok and len(report.results) == 3


@pytest.mark.parametrize("seed", [82, 207, 286, 443])
def test_terms_that_cancel(seed: int, monkeypatch) -> None:
    """A gradient may be small because its terms cancel. Their rounding errors do not, and are no fault."""
    torch.manual_seed(seed)
    x = (torch.randn(20, 3, 5) > 1).float()
    weights = [torch.round(0.01 * torch.randn(4, size) * 1024) / 1024 for size in (5, 4)]
    for record in (False, True):
        assert coba_triton.check(x, None, *weights, dt=0.1, backend="cpu", record_states=record).ok

    gradients = RecurrentProblem.gradients

    def spoil(self, backend, **options):
        """Each term is wrong by 1e-4 of itself."""
        outputs, grads = gradients(self, backend, **options)
        if backend == "cpu":
            grads["g_l"] = grads["g_l"] + 1e-4 * self.magnitudes()["g_l"]
        return outputs, grads

    monkeypatch.setattr(RecurrentProblem, "gradients", spoil)
    report = coba_triton.check(x, None, *weights, dt=0.1, backend="cpu")
    assert [failed.name for failed in report.failures] == ["gradients"] and "g_l" in report.failures[0].detail


def test_magnitudes() -> None:
    """Of a gradient whose terms all have one sign, they are the gradient itself; they are never less."""
    for case in (problem(9, (4,)), recurrent_problem(9, 2, 5, per_neuron=True), network_problem(9, 2, 12)):
        magnitudes, (_, grads) = case.magnitudes(), case.gradients("reference")
        assert magnitudes.keys() == case.shared().keys()
        for name, total in magnitudes.items():
            assert (total * (1 + 1e-5) >= grads[name].abs()).all(), name
    case = problem(1, (1,))  # one term
    magnitudes, (_, grads) = case.magnitudes(), case.gradients("reference")
    for name, total in magnitudes.items():
        assert total == grads[name].abs().double(), name


def test_your_own_input_that_fails(monkeypatch) -> None:
    plant_wrong_voltage(monkeypatch)
    report = coba_triton.check(torch.randn(12, 2, 3), CobaLIFFeedForwardState(-20.0, 0.0, 0.0), dt=0.1, backend="cpu")
    assert not report.ok and report.failures[0].group == "your input"
    assert "v differs" in shown_by(report.failures[0].snippet)


def test_sums_are_exact() -> None:
    assert sums_are_exact(recurrent_problem(5, 2, 30))
    assert not sums_are_exact(recurrent_problem(5, 2, 30, exact=False))
    sparse = network_problem(5, 2, 30)
    assert sums_are_exact(sparse) and sums_are_exact(network_problem(5, 2, 30, dense_input=True))
    sparse.input_weights = torch.rand(30, 6)
    assert not sums_are_exact(sparse)
    wide = recurrent_problem(5, 2, 30)
    wide.recurrent_weights[0, 0] = 2.0**15  # 2^15 and multiples of 2^-10 take 25 bits
    assert not sums_are_exact(wide)


def test_shrinking_keeps_what_fails() -> None:
    def fails(case) -> bool:
        return case.x.shape[0] >= 3 and bool((case.state.v == 7).any())

    case = problem(50, (4, 30))
    case.state.v[2, 20] = 7.0
    small = shrink(case, fails)
    assert small.x.shape == (3, 1) and small.state.v.tolist() == [7.0]
    recurrent = recurrent_problem(50, 3, 20, per_neuron=True)
    recurrent.state.v[1, 11] = 7.0
    small = shrink(recurrent, fails)
    assert small.x.shape == (3, 1, 1) and small.input_weights.shape == (1, 1) and small.recurrent_weights.shape == (1, 1)
    network = network_problem(50, 3, 20, per_neuron=True, refractory=True)
    network.state.v[1, 11] = 7.0
    small = shrink(network, fails)
    assert isinstance(small, NetworkProblem) and small.x.shape == (3, 1, 1) and small.state.history.shape == (9, 1, 1)
    assert small.recurrent_weights.count <= 1 and small.recurrent_weights.neurons == small.input_weights.neurons == 1


def test_a_part_of_a_network_has_the_synapses_between_its_neurons() -> None:
    case = network_problem(5, 2, 30, dense_input=True)
    chosen = part(case, 4, slice(1, 2), slice(10, 25), slice(2, 5))
    assert isinstance(chosen, NetworkProblem) and isinstance(chosen.input_weights, torch.Tensor)
    assert torch.equal(chosen.recurrent_weights.to_dense(), case.recurrent_weights.to_dense()[10:25, 10:25])
    assert torch.equal(chosen.input_weights, case.input_weights[10:25, 2:5])
    few = part(case, 4, slice(None), slice(None), slice(None), slice(3, 40)).recurrent_weights
    whole = case.recurrent_weights
    assert torch.equal(few.weights, whole.weights[3:40]) and torch.equal(few.delays, whole.delays[3:40])
    assert torch.equal(few.targets, whole.targets[3:40]) and torch.equal(few.source_of(), whole.source_of()[3:40])


@pytest.mark.slow
def test_quick_cases_of_sparse_networks_are_lively() -> None:
    """Neurons fire, and their synapses decide when."""
    checks = [check for check in checker.select("cpu", CPU, "quick", "sparse ") if "[9, 1, 1]" not in check.name]
    assert len(checks) > 25
    for check in checks:
        case = check.build(CPU)
        spikes, _ = case.run("cpu")
        silent = replace(case, recurrent_weights=case.recurrent_weights.with_weights(0 * case.recurrent_weights.weights))
        assert 0.02 < spikes.float().mean() < 0.9, check.name
        assert (spikes != silent.run("cpu")[0]).float().mean() > 0.01, check.name


def test_mismatches_say_where() -> None:
    case = problem(6, (4,))
    check = Check("", "", lambda device: case, Run("reference", {"order": "jump_first"}), Run("reference"))
    assert "elements differ" in str(find_mismatch(case, check))
    nan = torch.tensor([1.0, math.nan])
    assert checker.compare("x", nan, nan.clone()) is None
    assert "x[0] is 2.0, expected 1.0; 1 of 2" in str(checker.compare("x", torch.tensor([2.0, math.nan]), nan))
    assert "torch.float32 [2] instead of torch.float64 [2]" in str(checker.compare("x", nan, nan.double()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "device 'cuda' is not here"),
        (["--device", "gpu"], "device must be a device of torch, such as 'cpu' or 'cuda', got 'gpu'"),
        (["--backend", "tpu"], "backend must be one of"),
        (["--backend", "reference"], "nothing to check"),
        (["--only", "nonsense"], "no check contains 'nonsense' in its name; the groups are forward"),
        (["--report", "/proc/no/report.json"], "cannot write /proc/no/report.json"),
    ],
)
def test_bad_arguments(arguments, message, capsys) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["check", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("coba-triton: ") and message in error and "Traceback" not in error


def test_bad_arguments_from_python() -> None:
    with pytest.raises(TypeError, match="order: options for your own input, but there is none"):
        coba_triton.check(order="jump_first")
    with pytest.raises(ValueError, match="must be given together"):
        coba_triton.check(torch.ones(2, 3), None, torch.ones(3, 3))
    with pytest.raises(ValueError, match="level must be one of 'quick', 'full', got 'slow'"):
        coba_triton.check(level="slow", device="cpu")


def test_ctrl_c_ends_with_what_was_found(monkeypatch, capsys, tmp_path) -> None:
    run_check, done = checker.run_check, []

    def interrupt(check, device):
        if done:
            raise KeyboardInterrupt
        done.append(check)
        return run_check(check, device)

    monkeypatch.setattr(checker, "run_check", interrupt)
    report = tmp_path / "report.json"
    assert main(["check", "--device", "cpu", "--only", "threshold", "--report", str(report)]) == 130
    assert "Interrupted after 1 of 2 checks." in capsys.readouterr().out
    assert json.loads(report.read_text())["interrupted"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_in_a_process_of_its_own(tmp_path) -> None:
    command = [sys.executable, "-m", "coba_triton.cli", "check", "--device", "cpu", "--full"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=180)
    assert process.returncode == 130 and "Traceback" not in out + error


class CompilerError(Exception):
    """As Triton's own, which are no RuntimeErrors."""


def test_what_a_compiler_or_a_driver_raises_is_a_failed_case_in_few_lines(monkeypatch, tmp_path) -> None:
    def fail(*args, **kwargs):
        raise CompilerError("\n".join(["at 11:23:", *(f"line {i}" for i in range(100)), "no attribute 'type'"]))

    monkeypatch.setattr(cpu_launch, "feed_forward_forward", fail)
    path = tmp_path / "report.json"
    assert main(["check", "--device", "cpu", "--only", "on the threshold", "--report", str(path)]) == 1
    report = json.loads(path.read_text())
    assert [result["status"] for result in report["results"]] == ["failed"] * 2
    assert report["results"][0]["detail"] == "CompilerError: at 11:23:\nline 0\nline 1\n...\nno attribute 'type'"


def test_making_a_failing_case_smaller_has_a_time_limit(monkeypatch) -> None:
    monkeypatch.setattr("coba_triton.tools.check_shrink.SHRINK_SECONDS", 0.0)
    tried = []
    assert shrink(problem(20, (30,)), lambda case: not tried.append(case)).x.shape == (20, 30)
    assert len(tried) == 1


def serve_badly(backend, device, level, only, requests) -> None:
    """In the place of the process that runs checks: one passes, one crashes, one hangs, one fails."""
    requests.send(None)
    while (number := requests.recv()) is not None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 2:
            time.sleep(60)
        requests.send(checker.CheckResult("group", str(number), "failed" if number == 3 else "passed", 0.0, "wrong"))


@pytest.mark.slow
def test_a_case_that_takes_its_process_along_leaves_the_others_alone(monkeypatch) -> None:
    monkeypatch.setattr(check_process, "serve", serve_badly)
    monkeypatch.setattr(check_process, "CASE_SECONDS", 15.0)
    results = list(check_process.run_checks("cpu", CPU, "quick", "input dtypes"))
    assert [result.status for result in results[:5]] == ["passed", "failed", "failed", "failed", "passed"]
    assert {result.status for result in results[5:]} == {"passed"}  # those of sparse networks
    assert results[1].detail == "the process that ran it died of SIGSEGV"
    assert results[2].detail == "the process that ran it did not end within 15 s, and was killed"
    assert results[3].detail == "wrong"


@pytest.mark.slow
def test_cases_that_run_apart_are_the_same(tmp_path, capfd) -> None:
    results = []
    for number, options in enumerate((["--apart"], ["--in-process"], ["--jobs", "2"])):
        path = tmp_path / f"{number}.json"
        assert main(["check", "--device", "cpu", "--only", "spike formats, t", *options, "--report", str(path)]) == 0
        results.append({(r["group"], r["name"], r["status"]) for r in json.loads(path.read_text())["results"]})
    assert results[0] == results[1] == results[2] and len(results[0]) > 3


def test_jobs_need_processes(capsys) -> None:
    assert main(["check", "--device", "cpu", "--jobs", "2", "--in-process"]) == 2
    assert "--jobs 2 runs cases in 2 other processes, and --in-process in none" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_two_processes_run_each_case_once(monkeypatch) -> None:
    """A case that takes its process along costs only its own result, and closing the run early ends both processes."""
    monkeypatch.setattr(check_process, "serve", serve_badly)
    monkeypatch.setattr(check_process, "CASE_SECONDS", 15.0)
    results = list(check_process.run_checks("cpu", CPU, "quick", "input dtypes", jobs=2))
    statuses = [result.status for result in results]
    assert statuses.count("failed") == 3 and statuses.count("passed") == len(statuses) - 3
    assert len({result.name for result in results}) == len(results)
    running = check_process.run_checks("cpu", CPU, "quick", "input dtypes", jobs=2)
    next(running)
    running.close()
