"""States that calls return: tensors of their own, which may be edited in place."""

from __future__ import annotations

import dataclasses
from typing import Any

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
from helpers.marks import slow


@pytest.mark.parametrize("record_states", [False, True])
@pytest.mark.parametrize("kind", ["feed_forward", "recurrent"])
@pytest.mark.parametrize("backend", ["cpu", *slow("triton"), "reference"])
def test_states_may_be_edited_in_place(backend: str, kind: str, record_states: bool) -> None:
    """One field leaves the others as they are, to autograd as well."""

    def grad(edit: bool) -> tuple[Tensor, Any]:
        case = problem(40, (2, 5)) if kind == "feed_forward" else recurrent_problem(40, 2, 5)
        x = case.x.float().requires_grad_()
        _, state = dataclasses.replace(case, x=x).run(backend, record_states=record_states)
        loss = (state.v**2).sum() / 1e6  # keeps v for its backward
        for name in ("g_i", "g_e") if record_states else ("z", "g_i", "g_e"):
            field = getattr(state, name, None)
            if field is not None and edit:
                field.mul_(3.0)
            elif field is not None:
                state = state._replace(**{name: field * 3.0})
        loss = loss + sum((field**2).sum() for field in state[-2:]) + (state[0] ** 2).sum() / 1e6
        return torch.autograd.grad(loss, x)[0], state

    (edited, state), (wanted, want) = grad(True), grad(False)
    assert wanted.any() and torch.equal(edited, wanted)
    assert_same_bits(state, want)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (0,), (0, 4)], ids=str)
@pytest.mark.parametrize("record_states", [False, True])
@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_states_of_inference_take_gradients_in_place(
    backend: str, steps: int, record_states: bool, shape: tuple[int, ...]
) -> None:
    with torch.no_grad():
        x = torch.rand(steps, *shape)
        _, state = coba_lif_feed_forward_integral(x, dt=0.1, backend=backend, record_states=record_states)
    offset = torch.ones(shape, requires_grad=True)
    for field in state:
        assert field.shape == ((steps, *shape) if record_states else shape)
        before = field.clone()
        field.add_(offset)
        assert field.requires_grad and torch.equal(field, before + 1)
    if not record_states and all(shape):
        weights = torch.zeros(shape[-1], 2), torch.zeros(shape[-1], shape[-1])
        with torch.no_grad():
            _, connected = coba_lif_integral(torch.rand(steps, *shape[:-1], 2), None, *weights, dt=0.1, backend=backend)
        for field in connected:
            assert field.add_(offset).requires_grad and field.shape == shape


@pytest.mark.parametrize("kind", ["feed_forward", "recurrent"])
@pytest.mark.parametrize("backend", ["cpu", *slow("triton"), "reference"])
def test_state_of_no_steps_is_not_the_one_that_was_given(backend: str, kind: str) -> None:
    given = [torch.rand(2, 5) / 10 for _ in range(4)]
    before = [field.clone() for field in given]
    if kind == "feed_forward":
        state: Any = coba_lif_feed_forward_integral(
            torch.zeros(0, 2, 5), CobaLIFFeedForwardState(*given[1:]), dt=0.1, backend=backend
        )[1]
    else:
        weights = torch.zeros(5, 3), torch.zeros(5, 5)
        state = coba_lif_integral(torch.zeros(0, 2, 3), CobaLIFState(*given), *weights, dt=0.1, backend=backend)[1]
    assert_same_bits(state[-3:], before[1:])
    for field in state:
        field.fill_(7.0)
    assert_same_bits(given, before)


@pytest.mark.parametrize("path", ["events", "dense"])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("backend", ["cpu", *slow("triton")])
def test_recurrent_population_without_input(backend: str, batch: tuple[int, ...], path: str) -> None:
    x, input_weights = torch.zeros(70, *batch, 0), torch.zeros(5, 0, requires_grad=True)
    weights = torch.randint(-3, 3, (5, 5), generator=torch.Generator().manual_seed(0)) / 1024
    p = CobaLIFParameters(v_rest=-5.0, method="triangle", alpha=0.3)

    def run(backend: str, **options: Any) -> list[Tensor]:
        recurrent_weights = weights.clone().requires_grad_()
        spikes, state = coba_lif_integral(x, None, input_weights, recurrent_weights, p, 0.1, backend=backend, **options)
        grads = torch.autograd.grad(spikes.sum() + state.v.sum(), [input_weights, recurrent_weights])
        return [spikes.detach(), *(field.detach() for field in state), *grads]

    *got, grad = run(backend, path=path)
    *want, wanted = run("reference")
    assert want[0].sum() > 10
    assert_same_bits(got, want)
    torch.testing.assert_close(grad, wanted)
