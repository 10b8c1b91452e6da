"""A caller captures forward and training in a CUDA graph: on a GPU alone. Without one, ``backend/test_host_reads.py`` tells
that nothing in these calls would stop a capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from coba_triton import CobaLIFRecurrent, coba_lif_integral
from coba_triton.tools.problems import network_problem, recurrent_problem
from helpers.bits import assert_same_bits

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of the call, and the tensors that a replay fills. Two calls before it compile, and make what is kept."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


def training(case: Any, path: str | None) -> Callable[[], list[Tensor]]:
    """Spikes, final state and gradients of a case."""
    weights = case.recurrent_weights
    leaf = weights if isinstance(weights, Tensor) else weights.weights
    leaf.requires_grad_()
    options = {} if path is None else {"path": path}

    def run() -> list[Tensor]:
        spikes, final = case.run("triton", **options)
        (grad,) = torch.autograd.grad(spikes.square().sum() + final.v.sum(), leaf)
        return [spikes.detach(), *(field.detach() for field in final), grad]

    return run


CASES: dict[str, tuple[Callable[[], Any], str | None]] = {
    "events": (lambda: recurrent_problem(70, 3, 100, device="cuda"), "events"),
    "auto, many neurons": (lambda: recurrent_problem(40, 1, 4000, device="cuda"), "auto"),
    "sliced": (lambda: recurrent_problem(40, 1, 1000, device="cuda"), "sliced"),
    "dense": (lambda: recurrent_problem(40, 2, 300, device="cuda"), "dense"),
    "sparse": (lambda: network_problem(40, 1, 2000, device="cuda"), None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_is_captured(name: str) -> None:
    """A replay on another input has the bits of a call with it."""
    make, path = CASES[name]
    case = make()
    run = training(case, path)
    graph, outputs = captured(run)
    case.x.copy_(case.x.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(outputs, run())
    assert outputs[0].any()


def test_a_module_is_made_a_graphed_callable() -> None:
    layer = CobaLIFRecurrent(20, 300, dt=1.0, backend="triton", return_state=False).cuda()
    x = (torch.rand(50, 4, 20, device="cuda") < 0.2).float()
    plain = layer(x)
    plain.square().sum().backward()
    expected = [plain.detach(), layer.recurrent_weights.grad.clone(), layer.input_weights.grad.clone()]
    layer.zero_grad(set_to_none=True)
    graphed: Any = torch.cuda.make_graphed_callables(layer, (torch.zeros_like(x),))
    spikes = graphed(x)
    spikes.square().sum().backward()
    assert_same_bits([spikes.detach(), layer.recurrent_weights.grad, layer.input_weights.grad], expected)


def test_a_matrix_with_delays_is_refused_while_a_graph_is_captured() -> None:
    x, w_in, w_rec = (torch.zeros(shape, device="cuda") for shape in ((9, 1, 4), (6, 4), (6, 6)))
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        coba_lif_integral(x, None, w_in, w_rec, dt=0.1, backend="triton", delay=1.0)
