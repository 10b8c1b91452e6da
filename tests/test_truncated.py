"""Truncated backpropagation through time over streamed blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from coba_triton import CobaLIF, CobaLIFRecurrent, CobaLIFState, default_bio_state, stream_blocks
from coba_triton.tools.problems import DT, recurrent_problem

T = 120


def gradients(blocks: Any, network: CobaLIFRecurrent, state: Any) -> tuple[Tensor, dict[str, Tensor], list[Any]]:
    """A loss that adds up over blocks, its gradients, and the state before every block."""
    network.zero_grad()
    total, starts = torch.zeros((), dtype=torch.float64), []
    for x in blocks:
        starts.append(state)
        spikes, state = network(x, state)
        loss = (spikes.sum(-1).cumsum(0) * 0.1).sin().sum() + state.v.square().sum()
        loss.backward()
        total = total + loss.detach()
        state = state.detach()
    return total, {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}, starts


@pytest.fixture
def problem() -> tuple[CobaLIFRecurrent, Tensor, Any]:
    made = recurrent_problem(T, 2, 12, torch.float64)
    p: Any = made.parameters | {"method": "super", "alpha": made.alpha}
    record = type("P", (), p)
    network = CobaLIFRecurrent(6, 12, record, DT, autapses=True, learn=("v_thresh", "g_l"))
    network.input_weights.data, network.recurrent_weights.data = made.input_weights, made.recurrent_weights
    return network, made.x, made.state


def test_one_block_is_full_backpropagation(problem: tuple[CobaLIFRecurrent, Tensor, Any]) -> None:
    network, x, state = problem
    loss, found, _ = gradients(stream_blocks(x, T), network, state)
    expected_loss, expected, _ = gradients([x], network, state)
    assert set(found) == {"input_weights", "recurrent_weights", "v_thresh", "g_l"}
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0, name
        assert torch.equal(found[name], gradient), name


def test_truncation_cuts_the_history_and_nothing_else(problem: tuple[CobaLIFRecurrent, Tensor, Any]) -> None:
    """The gradient is the sum of what every block gives alone, from the state that it began with."""
    network, x, state = problem
    _, found, starts = gradients(stream_blocks(x, 50), network, state)
    assert len(starts) == math.ceil(T / 50)
    alone = [gradients([block], network, start)[1] for block, start in zip(x.split(50), starts, strict=True)]
    _, full, _ = gradients([x], network, state)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, sum(each[name] for each in alone))
        assert not torch.allclose(gradient, full[name])


def test_detach() -> None:
    network = CobaLIF(dt=0.1, learn=("g_l",))
    _, state = network(torch.ones(5, 3))
    assert state.v.requires_grad
    cut = state.detach()
    assert type(cut) is type(state)
    assert not cut.v.requires_grad and torch.equal(cut.v, state.v)
    assert default_bio_state.detach() == CobaLIFState(0.0, -65.0, 0.0, 0.0)
