"""The interpreter of these tests, which leaves out what Triton's repeats, computes what Triton's does."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import torch
from triton.runtime import interpreter

from coba_triton.tools.problems import network_problem, problem, recurrent_problem
from helpers import fast_interpreter
from helpers.bits import assert_same_bits


@pytest.mark.parametrize("path", ["feed-forward", "events", "dense", "sparse"])
def test_same_bits_as_in_tritons_own(path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreter._patch_lang is not fast_interpreter._patch_once:
        pytest.skip("the kernels do not run in the interpreter, or this Triton has another one")

    def run() -> list[torch.Tensor]:
        if path == "feed-forward":
            outputs, grads = problem(9, (33,), device=device).gradients("triton", record_states=True)
        elif path == "sparse":
            outputs, grads = network_problem(3, 1, 5, device=device).gradients("triton")
        else:
            outputs, grads = recurrent_problem(9, 2, 20, device=device, exact=False).gradients("triton", path=path)
        return [*outputs, *grads.values()]

    ours = run()
    for owner, name, _, theirs in fast_interpreter.EXCHANGES:
        monkeypatch.setattr(owner, name, theirs)
    assert_same_bits(ours, run())
