"""Modules are found under the names that they had before they moved into rooms."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import pytest

from coba_triton import CobaLIFState, _old_names


@pytest.mark.parametrize("name", _old_names.MOVED)
def test_old_module(name: str) -> None:
    if name in ("events", "plotting", "results", "simulation", "sinks", "sources"):
        pytest.importorskip("xxhash", reason="the extra stream is not installed")
        pytest.importorskip("matplotlib", reason="the extra cli is not installed")
    sys.modules.pop(f"coba_triton.{name}", None)
    new = f"coba_triton.{_old_names.MOVED[name]}"
    with pytest.warns(DeprecationWarning, match=f"coba_triton.{name} is {new} now"):
        old = importlib.import_module(f"coba_triton.{name}")
    assert old is importlib.import_module(new) and old.__spec__.name == new


def test_a_state_that_an_older_version_pickled(tmp_path) -> None:
    import torch

    state = CobaLIFState(torch.zeros(2), torch.ones(2), 0.0, 0.0)
    old = pickle.dumps(state, protocol=0).replace(b"coba_triton.neuron.records", b"coba_triton.model")
    assert b"coba_triton.model" in old
    program = "import pickle, sys; s = pickle.load(open(sys.argv[1], 'rb')); print(type(s).__module__, s.v.tolist())"
    (tmp_path / "old").write_bytes(old)
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "old"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["coba_triton.neuron.records", "[1.0,", "1.0]"]
