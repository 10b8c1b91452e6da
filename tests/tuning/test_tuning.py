"""Where launch parameters come from: tables in their order, warnings for what is no table, and the rule otherwise."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from coba_triton.backend.cpu import launch as cpu_launch
from coba_triton.ops import operators
from coba_triton.tools.problems import problem, recurrent_problem
from coba_triton.tuning import tables as tuning
from helpers.bits import assert_same_bits


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything: what a container's user cannot read, it reads as somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


CPU = torch.device("cpu")
KERNEL = "feed_forward_forward"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch) -> None:
    """No table of the machine's user, and none of the package."""
    monkeypatch.delenv(tuning.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "shipped_table", lambda device: tmp_path / "shipped" / "table.json")
    tuning.forget()
    yield
    tuning.use(None)


def entry(neurons: int = 1024, tile: int = 128, **changes) -> dict:
    return {
        "kernel": KERNEL,
        "dtype": "float32",
        "neurons": neurons,
        "batch": 1,
        "parameters": {"tile": tile, "threads": 1},
        "sources": tuning.source_hash("cpu"),
    } | changes


def write(path: Path, *entries: dict, **changes) -> Path:
    target = tuning.machine("cpu", CPU)
    content = {"format": tuning.FORMAT, "version": tuning.VERSION, "backend": "cpu", "device": target.name}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"entries": list(entries)} | changes))
    tuning.forget()
    return path


def tile(neurons: int = 1024, dtype: torch.dtype = torch.float32) -> int:
    return cpu_launch.shared.parameters_of(KERNEL, dtype, neurons)["tile"]


def test_first_table_with_an_entry_wins(tmp_path, monkeypatch) -> None:
    name = tuning.machine("cpu", CPU).name
    assert tile() == 1024
    write(tuning.shipped_table(name), entry(tile=64))
    assert tile() == 64
    user = write(tuning.user_table(name), entry(tile=128))
    assert tile() == 128
    named = write(tmp_path / "named.json", entry(4096, tile=256))
    monkeypatch.setenv(tuning.VARIABLE, str(named))
    tuning.forget()
    assert (tile(4096), tile(1024)) == (256, 128)
    tuning.use(write(tmp_path / "used.json", entry(tile=512)))
    assert tile() == 512
    tuning.use("off")
    assert tile() == 1024
    tuning.use(None)
    choice = tuning.explain(KERNEL, 1024)
    assert choice.source == str(user) and choice.parameters == {"tile": 128, "threads": 1}
    assert "its entry for neurons=1024" in choice.reason and "tile=128" in str(choice)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_table_that_an_editor_marked(encoding: str) -> None:
    path = write(tuning.user_table(tuning.machine("cpu", CPU).name), entry(tile=64))
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    tuning.forget()
    assert tile() == 64


def test_the_nearest_entry_within_a_factor_of_two_serves() -> None:
    write(tuning.user_table(tuning.machine("cpu", CPU).name), entry(1000, 64), entry(1500, 128))
    assert [tile(n) for n in (499, 500, 1000, 1200, 1300, 3000, 3001)] == [1024, 64, 64, 64, 128, 128, 1024]
    assert tile(1000, torch.float64) == 1024
    choice = tuning.explain(KERNEL, 100, batch=10)
    assert choice.parameters["tile"] == 64 and "neurons=1000, batch=1" in choice.reason
    assert tuning.explain(KERNEL, 5000).source == "rule"


def test_explain_says_why_no_table_serves() -> None:
    choice = tuning.explain("recurrent_forward", 64, batch=2)
    assert choice.source == "rule" and choice.parameters == {"threads": torch.get_num_threads()}
    assert "no table has an entry for recurrent_forward, float32, neurons=64, batch=2" in choice.reason
    assert "not there" in choice.reason
    tuning.use("off")
    assert "tables are off" in tuning.explain(KERNEL, 64).reason


@pytest.mark.parametrize(
    ("backend", "rule"), [("cpu", {"threads": 2, "tile": 1024}), ("triton", {"num_warps": 1, "steps": 16})]
)
def test_explain_of_a_backend(backend, rule, threads) -> None:
    threads(2)
    assert tuning.explain(KERNEL, 64, backend=backend).parameters == rule


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no tuning table"),
        ('{"format": "something else", "entries": []}', "is no tuning table"),
        ({"version": 99}, "is of version 99, expected 2"),
        ({"device": "NVIDIA H100", "backend": "triton"}, "is for triton on NVIDIA H100, expected cpu on"),
        ({"entries": [entry(sources="0")]}, "was measured with other kernels"),
        ({"entries": [{"kernel": KERNEL}]}, "has a malformed entry"),
        ({"entries": [entry(neurons=-1)]}, "has a malformed entry"),
        ({"entries": [entry(dtype="float16")]}, "has a malformed entry"),
        ({"entries": [entry(kernel="forward")]}, "unknown kernel 'forward'"),
        ({"entries": [entry(parameters={"tile": 128})]}, "parameters of feed_forward_forward must be tile, threads"),
        ({"entries": [entry(tile=100)]}, "tile of feed_forward_forward must be one of 64, 128, 256, 512, 1024, got 100"),
        ({"entries": [entry(tile="64")]}, "got '64'"),
        ({"entries": [entry(parameters={"tile": 64, "threads": 0})]}, "must be one of 1 to 512, got 0"),
        ({"entries": [entry(neurons=10**400)]}, "has a malformed entry"),
        ({"entries": [entry(batch=True)]}, "has a malformed entry"),
        ({"entries": [entry(batch=1.0)]}, "has a malformed entry"),
        ({"entries": [entry(kernel=[KERNEL])]}, "unknown kernel ['feed_forward_forward']"),
        ({"entries": [entry(dtype=["float32"])]}, "has a malformed entry"),
        ({"entries": [entry(sources=[])]}, "has a malformed entry"),
        ({"entries": [entry(parameters=[])]}, "parameters of feed_forward_forward must be"),
        ({"entries": [[]]}, "has a malformed entry"),
        ({"entries": [entry(parameters={"tile": [64], "threads": {}})]}, "got [64]"),
        ({"device": ["EPYC"]}, "expected triton or cpu on a device's name"),
        ({"backend": {"cpu": 1}}, "expected triton or cpu on a device's name"),
        ({"version": [1] * 10**5}, "is of version [1, 1,"),
        ("[" * 10**5, "is no JSON (it is nested too deeply)"),
        ("1" * 5000, "is no JSON"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b" " * (2**24 + 1), "cannot be read (it is larger than 16,777,216 bytes)"),
    ],
    ids=range(30),
)
def test_what_is_no_table_for_this_machine_is_a_warning_and_the_rule(content, message) -> None:
    path = tuning.user_table(tuning.machine("cpu", CPU).name)
    if isinstance(content, dict):
        write(path, **content)
    else:
        path.parent.mkdir(parents=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match="tuning table .* ignored: tune again with coba-triton tune") as caught:
        assert tile() == 1024
    assert message in str(caught[0].message)
    assert tile() == 1024  # and no second warning


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_not_read(kind) -> None:
    """A pipe would wait for a writer that never comes, and a device may have no end."""
    path = tuning.user_table(tuning.machine("cpu", CPU).name)
    path.parent.mkdir(parents=True)
    make = {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "device": lambda: path.symlink_to("/dev/zero")}
    make[kind]()
    with pytest.warns(UserWarning, match="cannot be read .*(it is no regular file|Is a directory)"):
        assert tile() == 1024
    with pytest.raises(ValueError, match="cannot be read"):
        tuning.use(path)


def test_a_table_that_cannot_be_read_is_a_warning(tmp_path) -> None:
    """While a folder that must not be looked into has no table; nor has a user without a home."""
    path = write(tuning.user_table(tuning.machine("cpu", CPU).name), entry(tile=64))
    path.chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == tmp_path.owner() and "pytest" in str(folder):
            folder.chmod(0o755)
    with as_nobody(), pytest.warns(UserWarning, match="cannot be read .Permission denied."):
        assert tile() == 1024


def test_a_home_that_cannot_be_looked_into_has_no_table(tmp_path) -> None:
    write(tuning.user_table(tuning.machine("cpu", CPU).name), entry(tile=64))
    (tmp_path / "cache").chmod(0)
    with as_nobody():
        assert tile() == 1024
        choice = tuning.explain(KERNEL, 1024)
        assert "not there" in choice.reason
        case = problem(5, (3,))
        assert case.run("cpu")[0].shape == (5, 3)
    (tmp_path / "cache").chmod(0o700)


def test_a_user_without_a_home_has_no_table(monkeypatch, capsys) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert tuning.user_table("x86_64") is None
    assert tile() == 1024
    assert len(tuning.sources("x86_64")) == 1 and "not there" in tuning.explain(KERNEL, 1024).reason
    assert problem(5, (3,)).run("cpu")[0].shape == (5, 3)
    from coba_triton.cli import main

    assert main(["tune", "--neurons", "8"]) == 2
    assert "this user has no home for a table; name a file with --out" in capsys.readouterr().err


def test_a_named_table_must_be_there(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="cannot be read .*; make one with: coba-triton tune"):
        tuning.use(tmp_path / "no.json")
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "no.json"))
    tuning.forget()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert tile() == 1024


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("forward", 10), ValueError, "kernel must be one of 'feed_forward_forward'"),
        ((KERNEL, 0), ValueError, "must be positive, got 0 and 1"),
        ((KERNEL, 10, 1, torch.float16), ValueError, "dtype must be torch.float32 or torch.float64"),
        ((KERNEL, 10, 1, torch.float32, "cpu", "reference"), ValueError, "has no launch parameters"),
    ],
)
def test_explain_bad_arguments(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        tuning.explain(*arguments)


def test_a_table_reaches_the_launch_and_changes_no_bit(monkeypatch) -> None:
    name = tuning.machine("cpu", CPU).name
    backward = {"tile": 64, "threads": 2, "checkpoint_every": 32}
    case = problem(45, (130,))
    expected = case.gradients("cpu")
    write(tuning.user_table(name), entry(130, 64), entry(130, kernel="feed_forward_backward", parameters=backward))
    assert operators.checkpoint_interval(torch.float32, "cpu", 130) == 32
    seen, kernel = [], cpu_launch.feed_forward.feed_forward.forward_kernel()
    monkeypatch.setattr(
        cpu_launch.feed_forward.feed_forward, "forward_kernel", lambda: lambda *args: (seen.append(args[-4]), kernel(*args))
    )
    tuned = case.gradients("cpu")
    assert seen == [64]
    assert_same_bits([*tuned[0], *tuned[1].values()], [*expected[0], *expected[1].values()])


def test_forced_parameters_hold_within_their_block() -> None:
    with tuning.forced(KERNEL, {"tile": 64}), tuning.forced("recurrent_forward", {"threads": 1}):
        assert tile() == 64 and tile(10**6) == 64
    assert tile() == 1024 and not tuning.forced_parameters


@pytest.mark.parametrize("kernel", tuning.KERNELS)
@pytest.mark.parametrize("backend", tuning.SPACE)
def test_rules_are_within_the_space(backend, kernel) -> None:
    for neurons, dtype in ((1, torch.float32), (5000, torch.float64)):
        rule = tuning.heuristic(backend, kernel, dtype, neurons, 3)
        assert tuning.check_parameters(backend, kernel, rule) == rule and rule.keys() == tuning.SPACE[backend][kernel].keys()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_triton_launch_parameters_change_no_bit(kernel, device) -> None:
    """Every parameter at a value that is not the rule's, in the interpreter or on the device."""
    from coba_triton.backend import triton as triton_backend

    recurrent = kernel.startswith("recurrent")
    case = recurrent_problem(20, 2, 40, device=device, exact=False) if recurrent else problem(20, (70,), device=device)
    rule = triton_backend.heuristic(kernel, torch.float32, 70, 2)
    other = {
        name: next(value for value in values if value != rule[name])
        for name, values in tuning.SPACE["triton"][kernel].items()
    }
    expected = case.gradients("triton")
    with tuning.forced(kernel, other):
        tuned = case.gradients("triton")
    assert_same_bits([*tuned[0], *tuned[1].values()], [*expected[0], *expected[1].values()])
