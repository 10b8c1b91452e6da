"""``coba-triton info``: with and without a GPU, Triton and tables."""

import json
import os
import subprocess
import sys

import pytest
import torch

from coba_triton.cli import info, main
from coba_triton.tuning import tables as tuning


def test_info_says_what_serves_and_why_not(capsys) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in ("torch", "numba", "cpu: ", "reference", "Caches of compiled kernels", torch.__version__):
        assert part in text
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu" and found["devices"][0]["threads"] == torch.get_num_threads()
    serves = {row["backend"]: row["serves"] for row in found["backends"]["cpu"]}
    assert serves["auto"] and serves["reference"] and serves["cpu"]


def test_info_without_triton_and_without_a_gpu() -> None:
    """In a process in which triton cannot be imported or found."""
    code = """
import importlib.abc, importlib.metadata, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
find_spec, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else find_spec(name, *rest)
def hidden(name):
    if name == "triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden
sys.meta_path.insert(0, Absent())
from coba_triton.cli import main
sys.exit(main(["info", "--json"]))
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["triton"] is None and [device["device"] for device in found["devices"]] == ["cpu"]
    (row,) = [row for row in found["backends"]["cpu"] if row["backend"] == "triton"]
    assert not row["serves"] and "not installed; install coba-triton[interp]" in row["reason"]


def test_info_names_the_tables(monkeypatch, tmp_path, capsys) -> None:
    path = tmp_path / "table.json"
    path.write_text("{")
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    tables = info.tuning_tables("cpu")
    assert next(table["state"] for table in tables if table["path"] == str(path)).startswith("ignored: it is no JSON")
    assert main(["info"]) == 0
    assert "ignored" in capsys.readouterr().out
    monkeypatch.setenv(tuning.VARIABLE, "off")
    assert info.tuning_tables("cpu") == []


@pytest.mark.parametrize("arguments", [["info", "--yaml"], ["inform"]])
def test_bad_arguments(arguments, capsys) -> None:
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_commands_for_kernels_need_nothing_that_only_simulations_need() -> None:
    """Units, arrays on disk and pictures of runs are not there on every machine with a GPU."""
    program = """if True:
        import sys
        for name in ("pint", "zarr", "numcodecs", "xxhash", "google_crc32c", "matplotlib"):
            sys.modules[name] = None
        from coba_triton.cli import main
        assert main(["info"]) == 0
        assert main(["check", "--device", "cpu", "--only", "on the threshold, torch.float32"]) == 0
        assert main(["simulate", "ecg", "--out", "out"]) == 2
        assert main(["tune", "--neurons", "10"]) == 2
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    simulate, tune = (line for line in done.stderr.splitlines() if line.startswith("coba-triton: "))
    assert simulate == (
        'coba-triton: simulate needs matplotlib, numcodecs, pint, xxhash; run: pip install "coba-triton[cli]"'
    )
    assert tune == 'coba-triton: tune needs matplotlib; run: pip install "coba-triton[cli]"'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "x"], "--cache and --size are of kernels for a GPU; add --arch"),
        (["--dtype", "float16"], "--dtype must be one of float32, float64, got 'float16'"),
        (["--arch", "sm_91"], "--arch must be one of sm_80, sm_90, sm_100, gfx942, gfx1100, got 'sm_91'; did you mean"),
        (["--arch", "sm_90", "--size", "1024"], "--size must be neurons and rows such as 1024x32, got '1024'"),
    ],
)
def test_what_warmup_refuses(arguments, message, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if "--arch" in arguments:
        pytest.importorskip("triton", reason="Triton compiles the kernels, and it is not installed")
    assert main(["warmup", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_warmup_without_a_target_is_of_the_cpu(capsys) -> None:
    """It says at the end what it has done, and a second time that nothing was left to do."""
    assert main(["warmup"]) == 0
    first = capsys.readouterr()
    done, where = first.out.rstrip().split(" s. Cache: ")
    assert (
        done.startswith(("Compiled ", "Found all CPU kernels compiled, and loaded them in "))
        and where == info.caches()["numba"]
    )
    compiled = first.err.count("compiling the CPU kernel")
    assert done.startswith(f"Compiled {compiled} CPU kernels in ") == (compiled > 0)
    assert main(["warmup"]) == 0
    second = capsys.readouterr()
    assert second.out.startswith("Found all CPU kernels compiled, and loaded them in ") and second.err == ""
