"""The operators as PyTorch sees them: schema, shapes without data, autograd, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coba_triton import CobaLIFFeedForwardState, CobaLIFParameters, coba_lif_feed_forward_integral
from coba_triton.problems import problem, recurrent_problem
from coba_triton.spikes import word_count


def arguments(device, *, spike_dtype=torch.float32, record=False, every=8, steps=19, grad=True, save=True):
    case = problem(steps, (5,), device=device)
    constants = torch.tensor(CONSTANTS, device=device).unsqueeze(1)
    x, state = case.x.requires_grad_(grad), torch.stack(tuple(case.state)).requires_grad_(grad)
    return x, state, constants.requires_grad_(grad), "triton", False, "super", spike_dtype, record, every, save


ops = torch.ops.coba_triton
CONSTANTS = [-0.2, -0.125, 0.5, 0.25, -1.0, 0.6, -0.2, -0.7, -0.1, 5.0]
backends = pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])


def opcheck(op: Any, args: tuple[Any, ...], spike_dtype: torch.dtype | None = torch.float32) -> None:
    """PyTorch's own checks; its last one adds up all outputs, which it can't start with integers."""
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    differentiable = any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
    if differentiable and spike_dtype != torch.float32:
        tests.pop()
    torch.library.opcheck(op.default, args, test_utils=tests)


def recurrent_arguments(device, backend, *, spike_dtype=torch.float32, record=False, grad=True, save=True):
    case = recurrent_problem(37 if backend == "cpu" else 4, 2, 5, device=device)
    tensors = case.x, case.state.z, torch.stack(case.state[1:]), case.input_weights, case.recurrent_weights
    constants = torch.tensor(CONSTANTS, device=device).unsqueeze(1)
    tensors = tuple(tensor.requires_grad_(grad) for tensor in (*tensors, constants))
    return *tensors, backend, False, "super", spike_dtype, record, None, "auto", save


@pytest.mark.parametrize(
    ("backend", "spike_dtype", "record"),
    [
        *(("cpu", spike_dtype, record) for spike_dtype in (torch.float32, torch.uint8, None) for record in (False, True)),
        pytest.param("triton", torch.float32, True, marks=pytest.mark.slow),
    ],
)
def test_forward_passes_opcheck(spike_dtype, record, backend, device) -> None:
    args = list(arguments(device, spike_dtype=spike_dtype, record=record))
    args[3] = backend
    opcheck(ops.feed_forward, tuple(args), spike_dtype)
    args = recurrent_arguments(device, backend, spike_dtype=spike_dtype, record=record)
    opcheck(ops.recurrent, args, spike_dtype)


@backends
def test_out_passes_opcheck(backend, device) -> None:
    x, state, constants, *_ = arguments(device, grad=False)
    for spikes in (torch.empty_like(x), torch.empty(1, x.shape[1], dtype=torch.int32, device=device)):
        opcheck(ops.feed_forward_out, (x, state, constants, backend, False, True, spikes))
    *tensors, _, _, _, _, _, _, _, _ = recurrent_arguments(device, backend, grad=False)
    steps = tensors[0].shape[0]
    for spikes in (
        torch.empty(steps, 2, 5, device=device),
        torch.empty(word_count(steps), 2, 5, dtype=torch.int32, device=device),
    ):
        opcheck(ops.recurrent_out, (*tensors, backend, False, None, "auto", spikes))


@pytest.mark.parametrize(
    ("backend", "given"),
    [
        *(("cpu", given) for given in ("all", "spikes", "final", "states")),
        pytest.param("triton", "all", marks=pytest.mark.slow),
    ],
)
def test_backward_passes_opcheck(given, backend, device) -> None:
    """With gradients of all outputs, and of each alone."""
    x, state, constants, _, *rest = arguments(device, grad=False, record=True)
    spikes, final, states, words, checkpoints = ops.feed_forward(x, state, constants, backend, *rest)
    grads = {"spikes": spikes, "final": final, "states": states}
    given_grads = [grad if given in ("all", name) else None for name, grad in grads.items()]
    options = backend, False, "super", 8, True, True
    opcheck(ops.feed_forward_backward, (x, constants, words, checkpoints, *given_grads, *options))
    args = recurrent_arguments(device, backend, grad=False, record=True)
    x, z, _, *weights_and_constants = args[:6]
    spikes, last, final, states, words, checkpoints = ops.recurrent(*args)
    grads = {"spikes": spikes, "z": last, "final": final, "states": states}
    given_grads = [grad if given in ("all", name) else None for name, grad in grads.items()]
    tensors = x, z, *weights_and_constants, words, checkpoints, *given_grads
    for needed in ((True,) * 4, (False,) * 4):
        opcheck(ops.recurrent_backward, (*tensors, backend, False, "super", None, 2, *needed))


@pytest.mark.parametrize("steps", [0, 5, 16, 37])
@pytest.mark.parametrize(("every", "save"), [(8, None), (8, True), (16, True)])
def test_shapes_without_data(steps, every, save, device) -> None:
    args = arguments(device, steps=steps, every=every, save=save, grad=False)
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


def test_operator_that_saved_nothing_refuses_a_gradient(device) -> None:
    spikes, *_ = torch.ops.coba_triton.feed_forward(*arguments(device, save=False))
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
