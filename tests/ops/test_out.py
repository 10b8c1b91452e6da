"""`out=`: the spikes of a run in a buffer that the caller gives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coba_triton import (
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    CobaLIFState,
    coba_lif_feed_forward_integral,
    coba_lif_integral,
)
from coba_triton.tools.problems import problem, recurrent_problem
from helpers.bits import assert_same_bits

FORMATS = [None, torch.float16, torch.uint8, "bits"]


KINDS = ("feed_forward", "recurrent")
BLOCKS = ((None, False), (32, False), (32, True))


def out_cases() -> Iterator[Any]:
    """All together; the interpreter has every format of each kind of network with one kind of blocks."""
    for backend in ("cpu", "reference"):
        for kind, (block_steps, record_states), spike_dtype in itertools.product(KINDS, BLOCKS, FORMATS):
            yield pytest.param(kind, backend, spike_dtype, block_steps, record_states)
    for number, (kind, spike_dtype) in enumerate(itertools.product(KINDS, FORMATS)):
        yield pytest.param(kind, "triton", spike_dtype, *BLOCKS[number % 3], marks=pytest.mark.slow)


@pytest.mark.parametrize(("kind", "backend", "spike_dtype", "block_steps", "record_states"), list(out_cases()), ids=str)
def test_out_takes_what_is_returned_without_it(
    kind: str, backend: str, spike_dtype: torch.dtype | str | None, block_steps: int | None, record_states: bool
) -> None:
    steps = 40 if backend == "triton" else 70
    case = problem(steps, (2, 5)) if kind == "feed_forward" else recurrent_problem(steps, 2, 5)
    options = dict(spike_dtype=spike_dtype, block_steps=block_steps, record_states=record_states)
    want, want_state = case.run(backend, **options)
    out = torch.full_like(want, 7)
    got, state = case.run(backend, out=out, **options)
    assert got is out
    assert torch.equal(out, want) and want.any()
    assert_same_bits(state, want_state)


def buffer(shape: tuple[int, ...] = (8, 3), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize(("out", "message"), [
    pytest.param(buffer((8, 4)), r"out must be contiguous torch.float32 \[8, 3\] on 'cpu' .* got .*\[8, 4\]", id="shape"),
    pytest.param(buffer(dtype=torch.uint8), "torch.float32 .* got contiguous torch.uint8", id="dtype"),
    pytest.param(buffer((3, 8)).t(), "got strided", id="strides"),
])  # fmt: skip
def test_a_buffer_that_does_not_fit(out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coba_lif_feed_forward_integral(torch.zeros(8, 3), out=out)


def test_a_buffer_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"out must be a torch.Tensor or None, got list; use torch.empty"):
        coba_lif_feed_forward_integral(torch.zeros(8, 3), out=[])


NUMBERS = ("tau_syn_exc_inv", "v_thresh", "alpha")


@pytest.mark.parametrize("over", ["input_tensor", "state.z", "state.v", "input_weights", "recurrent_weights", *NUMBERS])
@pytest.mark.parametrize("shift", [0, -2, 2], ids=["on", "before", "behind"])
def test_out_over_an_argument(over: str, shift: int) -> None:
    """Also in part, and over one storage by way of numpy, where every tensor has one of its own."""
    memory = np.zeros(200, np.float32)
    sizes = {"input_tensor": (8, 3), "input_weights": (3, 3), "recurrent_weights": (3, 3)}
    arguments = {name: torch.zeros(sizes.get(name, (3,))) for name in (
        "input_tensor", "state.z", "state.v", "input_weights", "recurrent_weights", *NUMBERS)}  # fmt: skip
    shape = arguments[over].shape
    arguments[over] = torch.from_numpy(memory[100 : 100 + shape.numel()].reshape(shape))

    def run(begin: int) -> Tensor:
        out = torch.from_numpy(memory[begin : begin + 24].reshape(8, 3))
        a = arguments
        state = CobaLIFState(a["state.z"], a["state.v"], 0.0, 0.0)
        p = CobaLIFParameters(**{name: a[name] for name in NUMBERS})
        weights = a["input_weights"], a["recurrent_weights"]
        return coba_lif_integral(a["input_tensor"], state, *weights, p, 0.1, out=out)[0]

    inside = {0: 100, -2: 100 - 24 + 1, 2: 100 + shape.numel() - 1}[shift]
    with pytest.raises(ValueError, match=f"out must not share memory with {over}, got a view of it; use a buffer"):
        run(inside)
    run(100 - 24)  # side by side, in one buffer
    run(100 + shape.numel())


def test_out_over_the_input_of_unconnected_neurons() -> None:
    memory = torch.rand(60, 3)
    x = memory[:40]
    with pytest.raises(ValueError, match="out must not share memory with input_tensor"):
        coba_lif_feed_forward_integral(x, dt=0.1, out=memory[20:])
    with pytest.raises(ValueError, match="out must not share memory with state.g_e"):
        state = CobaLIFFeedForwardState(-20.0, memory[50], 0.0)
        coba_lif_feed_forward_integral(x[:20], state, dt=0.1, out=memory[40:])
    want = coba_lif_feed_forward_integral(x[:20], dt=0.1)[0]
    assert torch.equal(coba_lif_feed_forward_integral(x[:20], dt=0.1, out=memory[20:40])[0], want)
    coba_lif_feed_forward_integral(x[5:5], dt=0.1, out=x[7:7])
    meta = x.to("meta")  # which has no addresses
    coba_lif_feed_forward_integral(meta, dt=0.1, backend="reference", out=torch.empty_like(meta))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_out_and_gradients(backend: str) -> None:
    x = torch.zeros(8, 3, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient flows through, got arguments that require one; call under"):
        coba_lif_feed_forward_integral(x, out=buffer(), backend=backend)
    with torch.no_grad():
        assert not coba_lif_feed_forward_integral(x, out=buffer(), backend=backend)[0].any()


def test_out_in_a_compiled_graph() -> None:
    """A compiler keeps the buffer and the arguments apart, wherever they lie."""
    memory = torch.rand(60, 3)
    run = torch.compile(
        lambda x, out: coba_lif_feed_forward_integral(x, dt=0.1, out=out)[0], fullgraph=True, backend="aot_eager"
    )
    for x, out in ((memory[:40].clone(), torch.empty(40, 3)), (memory[:40], memory[20:])):
        want = coba_lif_feed_forward_integral(x.clone(), dt=0.1)[0]
        assert torch.equal(run(x, out), want) and torch.equal(out, want)
