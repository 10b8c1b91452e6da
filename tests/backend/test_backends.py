"""Which backend serves, and what is said where none can."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import torch
import triton

from coba_triton.backend import choose
from coba_triton.backend.choose import choose_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def forget_reports():
    choose._report_fallback.cache_clear()


def drive(monkeypatch, device_type: str | None) -> None:
    """Pretend that Triton's active driver is for a device type, or that there is none."""

    class Driver:
        @property
        def active(self):
            if device_type is None:
                raise RuntimeError("0 active drivers ([]). There should only be one.")
            return SimpleNamespace(get_active_torch_device=lambda: torch.device(device_type))

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton.runtime, "driver", Driver())


def test_interpreter_serves_the_cpu(monkeypatch, device) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert choose_backend("triton", CPU) == "triton"
    with pytest.raises(RuntimeError, match="serves tensors on 'cpu' here, got tensors on 'cuda'; move them"):
        choose_backend("triton", GPU)


def test_gpu_driver_serves_the_gpu(monkeypatch) -> None:
    drive(monkeypatch, "cuda")
    assert choose_backend("triton", GPU) == choose_backend("auto", GPU) == "triton"
    assert choose_backend("auto", CPU) == "cpu"
    with pytest.raises(RuntimeError, match="serves tensors on 'cuda' here, got tensors on 'cpu'"):
        choose_backend("triton", CPU)


def test_emulating_driver_serves_its_device(monkeypatch) -> None:
    drive(monkeypatch, "cpu")
    assert choose_backend("triton", CPU) == "triton"


def test_no_driver(monkeypatch, caplog) -> None:
    drive(monkeypatch, None)
    with pytest.raises(RuntimeError, match=r"needs a GPU .* found none; set TRITON_INTERPRET=1"):
        choose_backend("triton", CPU)
    with caplog.at_level(logging.INFO, "coba_triton"):
        assert choose_backend("auto", GPU) == choose_backend("auto", GPU) == "reference"
    assert [record.message for record in caplog.records] == [
        "backend 'auto' uses the reference: no fused backend serves tensors on 'cuda'"
    ]


def test_no_triton(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"not installed; install coba-triton\[interp\]"):
        choose_backend("triton", CPU)
    assert choose_backend("auto", GPU) == "reference"


def test_cpu_serves_the_cpu() -> None:
    assert choose_backend("auto", CPU) == choose_backend("cpu", CPU) == "cpu"
    with pytest.raises(RuntimeError, match=r"'cpu' serves tensors on 'cpu', got tensors on 'cuda'; move .* pass backend="):
        choose_backend("cpu", GPU)
