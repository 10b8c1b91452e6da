"""The operators as PyTorch sees them: schema, shapes without data, autograd, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from coba_triton import CobaLIFFeedForwardState, CobaLIFParameters, coba_lif_feed_forward_integral
from coba_triton.problems import problem


def arguments(device, *, spike_dtype=torch.float32, record=False, every=8, steps=19, grad=True):
    case = problem(steps, (5,), device=device)
    constants = torch.tensor([-0.2, -0.125, 0.5, 0.25, -1.0, 0.6, -0.2, -0.7, -0.1, 5.0], device=device).unsqueeze(1)
    x, state = case.x.requires_grad_(grad), torch.stack(tuple(case.state)).requires_grad_(grad)
    return x, state, constants.requires_grad_(grad), "triton", False, "super", spike_dtype, record, every


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("spike_dtype", [torch.float32, torch.uint8, None], ids=str)
def test_forward_passes_opcheck(spike_dtype, record, device) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.coba_triton.feed_forward, arguments(device, spike_dtype=spike_dtype, record=record), test_utils=tests
    )


def test_backward_passes_opcheck(device) -> None:
    x, state, constants, *rest = arguments(device, grad=False)
    spikes, final, _, words, checkpoints = torch.ops.coba_triton.feed_forward(x, state, constants, *rest)
    for grads in ((spikes, final, None), (None, final, None), (spikes, None, None)):
        torch.library.opcheck(
            torch.ops.coba_triton.feed_forward_backward,
            (x, constants, words, checkpoints, *grads, "triton", False, "super", 8, True, True),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("steps", [0, 5, 16, 37])
@pytest.mark.parametrize("every", [0, 8, 16])
def test_shapes_without_data(steps, every, device) -> None:
    args = arguments(device, steps=steps, every=every, grad=False)
    real = torch.ops.coba_triton.feed_forward(*args)
    meta = torch.ops.coba_triton.feed_forward(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    assert [(m.shape, m.dtype) for m in meta] == [(r.shape, r.dtype) for r in real]


def test_double_backward_names_the_reference(device) -> None:
    case = problem(9, (3,), device=device)
    case.x.requires_grad_()
    spikes, state = case.run("triton")
    (grad,) = torch.autograd.grad(spikes.sum() + state.v.sum(), case.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiates once.*pass backend='reference'"):
        grad.square().sum().backward()


def test_forward_mode_names_the_reference(device) -> None:
    case = problem(9, (3,), device=device)

    def run(x: torch.Tensor) -> torch.Tensor:
        case.x = x
        return case.run("triton")[1].v

    with pytest.raises(NotImplementedError, match="no forward-mode.*pass backend='reference'"):
        torch.func.jvp(run, (case.x,), (torch.ones_like(case.x),))


def test_operator_without_checkpoints_refuses_a_gradient(device) -> None:
    spikes, *_ = torch.ops.coba_triton.feed_forward(*arguments(device, every=0))
    with pytest.raises(RuntimeError, match="saved nothing for the backward pass"):
        spikes.sum().backward()


def test_only_asked_for_gradients_are_computed(device) -> None:
    """A gradient by the state alone leaves no gradient of the input behind."""
    case = problem(9, (3,), device=device)
    case.state.v.requires_grad_()
    spikes, _ = case.run("triton")
    spikes.sum().backward()
    assert case.x.grad is None and case.state.v.grad is not None


def test_gradients_accumulate_over_calls(device) -> None:
    """One state used twice: ordinary autograd semantics."""
    case = problem(9, (3,), device=device)
    v = case.state.v.requires_grad_()
    first, _ = case.run("triton")
    (once,) = torch.autograd.grad(first.sum(), v)
    twice = case.run("triton")[0].sum() + case.run("triton")[0].sum()
    (both,) = torch.autograd.grad(twice, v)
    torch.testing.assert_close(both, 2 * once)


def test_training_in_place_on_the_input_is_noticed(device) -> None:
    case = problem(9, (3,), device=device)
    x = case.x.clone()
    p = CobaLIFParameters(v_thresh=torch.tensor(-0.1, requires_grad=True, device=device))
    spikes, _ = coba_lif_feed_forward_integral(x, CobaLIFFeedForwardState(-0.2, 0.0, 0.0), p, 0.01, backend="triton")
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spikes.sum().backward()
