"""``coba-triton bench``: what it writes, what it refuses, and which change of time is a regression."""

import copy
import functools
import json
import math

import pytest
import torch

from coba_triton.cli import bench, main
from coba_triton.tools import ceilings, contenders
from coba_triton.tools.contenders import Contender
from coba_triton.tools.problems import VALUES, Case, recurrent_problem

CASES = (
    Case("inference-tiny", "feed_forward", 30, 2, 10),
    Case("training-tiny", "feed_forward", 30, 2, 10, train=True),
    Case("recurrent-tiny", "recurrent", 30, 2, 10),
)
pytestmark = pytest.mark.usefixtures("own_garbage")  # before a contender's memory is measured, garbage is looked for
measured = functools.cache(ceilings.measure)  # what the machine does at most: once for all tests
ARGUMENTS = ["bench", "--device", "cpu", "--rounds", "3"]


@pytest.fixture(autouse=True)
def few_and_small(monkeypatch) -> None:
    """Small cases, of which the quick contenders: nothing that compiles or belongs to another package."""
    every = contenders.contenders
    monkeypatch.setattr(ceilings, "measure", measured)
    monkeypatch.setattr(bench, "CASES", CASES)
    monkeypatch.setattr(bench, "SUITES", {"quick": tuple(case.name for case in CASES), "full": ("inference-tiny",)})
    monkeypatch.setattr(
        contenders,
        "contenders",
        lambda *arguments: (each for each in every(*arguments) if each.name.split(",")[0] in ("reference", "cpu")),
    )


@pytest.mark.slow
def test_a_run_writes_what_other_tools_read(tmp_path, capsys) -> None:
    out = tmp_path / "folder" / "b.json"
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Copies move" in printed and "cpu, bits" in printed and "speed-up" in printed and "m: memory" in printed
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(out.read_text())
    assert result["backend"] == "cpu" and result["versions"]["torch"] == torch.__version__ and result["copy_gb_per_s"] > 1
    assert result["product_gflop_per_s"] > 1
    assert [case["name"] for case in result["cases"]] == [case.name for case in CASES]
    for case in result["cases"]:
        assert [row["name"] for row in case["contenders"]][:2] == ["reference", "cpu"]
        for row in case["contenders"]:
            assert len(row["seconds"]) == 3 and row["p25_s"] <= row["median_s"] <= row["p75_s"]
            assert row["ns_per_neuron_step"] == pytest.approx(row["median_s"] / 600 * 1e9)
    (inference, training, recurrent) = result["cases"]
    assert (
        inference["contenders"][1]["bytes_moved"] == 600 * 4 * 2 and training["contenders"][1]["bytes_moved"] == 600 * 4 * 3
    )
    assert recurrent["contenders"][1]["bytes_moved"] == 4 * (30 * 2 * 100 + 600 + 10 * 100 + 10 * 10)
    for case in result["cases"]:
        for row in case["contenders"]:
            memory, arithmetic = row["bytes_moved"] / result["copy_gb_per_s"], row["flops"] / result["product_gflop_per_s"]
            assert row["limit"] == ("memory" if memory > arithmetic else "arithmetic")
            least = max(memory, arithmetic) / 1e9
            assert row["percent_of_limit"] == pytest.approx(100 * least / row["median_s"])
    assert 0 < inference["spikes_per_neuron_step"] == pytest.approx(training["spikes_per_neuron_step"])


def test_what_differs_from_the_reference_is_not_timed(monkeypatch, capsys) -> None:
    several = contenders.contenders

    def with_a_wrong_one(*arguments):
        for each in several(*arguments):
            yield each
        yield Contender("wrong", lambda: each.run() + 1)

    monkeypatch.setattr(contenders, "contenders", with_a_wrong_one)
    assert main([*ARGUMENTS, "--only", "recurrent"]) == 1
    assert "not timed: recurrent-tiny: spikes of wrong differ from the reference's" in capsys.readouterr().out


def test_what_cannot_run_here_is_said(monkeypatch, capsys) -> None:
    several = contenders.contenders

    def fail() -> torch.Tensor:
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(contenders, "contenders", lambda *a: (*several(*a), Contender("compiled step", fail)))
    assert main([*ARGUMENTS, "--only", "inference"]) == 0
    assert "not timed: compiled step: RuntimeError: no compiler\n" in capsys.readouterr().out


def result(tmp_path) -> dict:
    out = tmp_path / "b.json"
    assert main([*ARGUMENTS, "--suite", "full", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    for row in content["cases"][0]["contenders"]:
        row |= {"median_s": 1.0, "p25_s": 0.98, "p75_s": 1.02}
    return content


def test_a_regression_is_slower_beyond_noise_and_than_the_machine(tmp_path) -> None:
    old = result(tmp_path)

    def verdict(median: float, reference: float = 1.0, spread: float = 0.02) -> bool:
        new = copy.deepcopy(old)
        new["cases"][0]["contenders"][0] |= {"median_s": reference}
        new["cases"][0]["contenders"][1] |= {"median_s": median, "p25_s": median - spread, "p75_s": median + spread}
        (row,) = [row for row in bench.ratios(old, new) if row["name"] == "cpu"]
        assert row["ratio"] == pytest.approx(median) and row["machine"] == pytest.approx(reference)
        return row["slower"]

    assert verdict(1.3)
    assert not verdict(1.08)  # within the tolerance
    assert not verdict(1.3, spread=0.4)  # within the noise
    assert not verdict(1.3, reference=1.25)  # the machine was slower
    assert verdict(1.3, reference=0.8)
    assert not verdict(0.5)
    assert {row["name"] for row in bench.ratios(old, old)} == {"cpu", "cpu, out=", "cpu, uint8", "cpu, bits"}


@pytest.mark.slow
def test_compare_ends_in_exit_status_1_on_a_regression(tmp_path, capsys) -> None:
    old = result(tmp_path)
    path = tmp_path / "old.json"
    for seconds, status, word in ((1e3, 0, "faster"), (1e-9, 1, "SLOWER")):
        for row in old["cases"][0]["contenders"][1:]:
            row |= {"median_s": seconds, "p25_s": seconds, "p75_s": seconds}
        path.write_text(json.dumps(old))
        assert main([*ARGUMENTS, "--suite", "full", "--compare", str(path)]) == status
        printed = capsys.readouterr().out
        assert "Time now / time then" in printed and word in printed


@pytest.mark.slow
def test_only_times_of_one_machine_are_compared(tmp_path, capsys) -> None:
    old = result(tmp_path) | {"name": "another processor"}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    assert main([*ARGUMENTS, "--compare", str(path)]) == 2
    assert "is of name 'another processor'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "quik"], "--suite must be one of quick, full, got 'quik'; did you mean 'quick'?"),
        (["--only", "nonsense"], "no case of suite quick contains 'nonsense'; it has inference-tiny"),
        (["--rounds", "1"], "--rounds must be at least 2"),
        (["--backend", "reference"], "nothing to check"),
        (["--out", "/proc/no/b.json"], "cannot write"),
        (["--compare", "/proc/no/b.json"], "cannot read /proc/no/b.json"),
    ],
)
def test_bad_arguments(arguments, message, capsys) -> None:
    assert main([*ARGUMENTS, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("coba-triton: ") and message in error


HEAD = '{"format": "coba_triton benchmark", "version": 1, "cases": '


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "other"}',
        "[" * 10**5,
        HEAD + "3}",
        HEAD + "[3]}",
        HEAD + '[{"name": "x", "contenders": []}]}',
        HEAD + '[{"name": "x", "contenders": [{"name": "cpu", "median_s": 0.0, "p75_s": 1.0}]}]}',
        HEAD + '[{"name": ["x"], "contenders": [{"name": "cpu", "median_s": 1.0, "p75_s": 1.0}]}]}',
    ],
    ids=range(9),
)
def test_what_is_no_result_is_refused(content, tmp_path, capsys) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    assert main([*ARGUMENTS, "--compare", str(path)]) == 2
    assert "give a file that coba-triton bench --out wrote" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_keeps_the_cases_that_are_finished(monkeypatch, tmp_path, capsys) -> None:
    measure = bench.measure

    def interrupted(case, *rest):
        if case.train:
            raise KeyboardInterrupt
        return measure(case, *rest)

    monkeypatch.setattr(bench, "measure", interrupted)
    out = tmp_path / "b.json"
    assert main([*ARGUMENTS, "--out", str(out)]) == 130
    assert "Interrupted after 1 of 3 cases." in capsys.readouterr().out
    assert len(json.loads(out.read_text())["cases"]) == 1


@pytest.mark.parametrize("kind", ["feed_forward", "recurrent"])
def test_spikes_that_rounding_moved_are_told_from_wrong_ones(kind) -> None:
    """A compiler that fuses operations may move a spike where the potential is as close to the threshold as rounding."""
    case = Case("case", kind, 1000, 3, 100)
    each = case.build() if kind == "feed_forward" else recurrent_problem(1000, 3, 100)
    expected, trace = each.run("reference", order=contenders.ORDER[kind], record_states=True)
    quiet = torch.where(expected > 0, math.inf, (trace.v - VALUES["v_thresh"]).abs())
    for place, explained in ((quiet.argmin(), True), (quiet.isfinite().nonzero()[0], False)):
        index = torch.unravel_index(place, quiet.shape) if explained else tuple(place)
        spikes = expected.clone()
        spikes[index] = 1
        message = contenders.wrong_flips(case, each, spikes, expected)
        assert (message == "") == explained, message
        moved = Contender("fused", lambda spikes=spikes: spikes, flips=functools.partial(contenders.wrong_flips, case, each))
        if explained:
            contenders.assert_same(case, moved, expected)
        else:
            with pytest.raises(AssertionError, match=r"spikes of fused \(one differs where the potential is"):
                contenders.assert_same(case, moved, expected)


@pytest.mark.parametrize("neurons", [63, 129, 1024, 2500])
def test_neurons_of_a_problem_fire_one_by_one(neurons: int) -> None:
    """Where all of them fire together, spikes tell nothing of which synapses were read, or when."""
    case = recurrent_problem(20 if neurons > 2000 else 70, 1, neurons)
    spikes, _ = case.run("reference")
    counts = spikes.sum(-1)
    assert 0.005 < spikes.mean() < 0.1 and counts.max() < neurons / 3
    case.recurrent_weights = case.recurrent_weights.roll(1, 1)  # each synapse has another source
    assert not torch.equal(case.run("reference")[0], spikes)
