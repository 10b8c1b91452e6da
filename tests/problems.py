"""Random feed-forward problems in a regime where neurons fire often and every surrogate derivative matters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coba_triton import (
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    CobaLIFState,
    coba_lif_feed_forward_integral,
    coba_lif_integral,
)
from coba_triton.model import NUMERIC_PARAMETERS

DT = 0.01
VALUES = {
    "tau_syn_exc_inv": 20.0,
    "tau_syn_inh_inv": 12.5,
    "c_m_inv": 50.0,
    "g_l": 0.25,
    "e_rev_I": -1.0,
    "e_rev_E": 0.6,
    "v_rest": -0.2,
    "v_reset": -0.7,
    "v_thresh": -0.1,
}
LEARNABLE = tuple(name for name in NUMERIC_PARAMETERS if name != "alpha")


@dataclass
class Problem:
    """Inputs of a feed-forward run, and weights that make a loss of everything it returns."""

    x: Tensor
    state: CobaLIFFeedForwardState
    parameters: dict[str, Tensor]
    generator: torch.Generator
    alpha: float = 5.0
    options: dict[str, Any] = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        return {"x": self.x, "v": self.state.v, "g_e": self.state.g_e, "g_i": self.state.g_i, **self.parameters}

    def run(self, backend: str, **options: Any) -> tuple[Tensor, CobaLIFFeedForwardState]:
        method = options.pop("method", "super")
        p = CobaLIFParameters(**self.parameters, method=method, alpha=self.alpha)
        return coba_lif_feed_forward_integral(self.x, self.state, p, DT, backend=backend, **options)

    def gradients(self, backend: str, **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs, and the gradient of a random weighting of all of them by every leaf (0 where none flows)."""
        leaves = {name: leaf for name, leaf in self.leaves().items() if leaf.is_floating_point()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        spikes, state = self.run(backend, **options)
        outputs = [spikes, *state]
        generator = torch.Generator().manual_seed(7)
        loss = torch.zeros((), dtype=state.v.dtype, device=self.x.device)
        for output in outputs:
            weights = torch.randn(output.shape, generator=generator, dtype=state.v.dtype)
            loss = loss + (output.to(state.v.dtype) * weights.to(output.device)).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        for leaf in leaves.values():
            leaf.requires_grad_(False)
        return [output.detach() for output in outputs], dict(zip(leaves, grads, strict=True))


def problem(
    steps: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    per_neuron: bool = False,
    seed: int = 0,
) -> Problem:
    g = torch.Generator().manual_seed(seed)
    compute = dtype if dtype in (torch.float32, torch.float64) else torch.float32

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=compute)

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=g, dtype=compute)

    drive = 0.35 * randn(steps, *shape)
    x = (drive.abs() < 0.1).to(dtype) if not dtype.is_floating_point else drive.to(dtype)
    state = CobaLIFFeedForwardState(-0.2 + 0.05 * randn(*shape), 0.3 * rand(*shape), 0.3 * rand(*shape))
    parameters = {
        name: value * (1 + 0.05 * randn(*shape)) if per_neuron else torch.tensor(value, dtype=compute)
        for name, value in VALUES.items()
    }
    return Problem(
        x.to(device),
        CobaLIFFeedForwardState(*(s.to(device) for s in state)),
        {name: value.to(device) for name, value in parameters.items()},
        g,
    )


@dataclass
class RecurrentProblem:
    """Inputs of a recurrent run; with ``exact`` weights every order of their sums gives the same number."""

    x: Tensor
    state: CobaLIFState
    input_weights: Tensor
    recurrent_weights: Tensor
    parameters: dict[str, Tensor]
    alpha: float = 5.0

    def leaves(self) -> dict[str, Tensor]:
        return {
            "x": self.x,
            **self.state._asdict(),
            "input_weights": self.input_weights,
            "recurrent_weights": self.recurrent_weights,
            **self.parameters,
        }

    def run(self, backend: str, **options: Any) -> tuple[Tensor, CobaLIFState]:
        p = CobaLIFParameters(**self.parameters, method=options.pop("method", "super"), alpha=self.alpha)
        weights = self.input_weights, self.recurrent_weights
        return coba_lif_integral(self.x, self.state, *weights, p, DT, backend=backend, **options)

    gradients = Problem.gradients


def recurrent_problem(
    steps: int,
    batch: int,
    neurons: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    inputs: int = 6,
    exact: bool = True,
    per_neuron: bool = False,
    binary: bool = True,
    seed: int = 0,
) -> RecurrentProblem:
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=g, dtype=torch.float64)

    def weights(*size: int) -> Tensor:
        values = 0.5 * randn(*size) / size[1] ** 0.5 - 0.05
        return (torch.round(values * 1024) / 1024 if exact else values).to(dtype)

    x = (rand(steps, batch, inputs) < 0.2).double() if binary else torch.round(randn(steps, batch, inputs) * 8) / 8
    spikes = (rand(batch, neurons) < 0.2).double()
    state = CobaLIFState(spikes, -0.2 + 0.05 * randn(batch, neurons), 0.2 * rand(batch, neurons), 0.2 * rand(batch, neurons))
    parameters = {
        name: value * (1 + 0.05 * randn(neurons)) if per_neuron else torch.tensor(value, dtype=torch.float64)
        for name, value in VALUES.items()
    }
    return RecurrentProblem(
        x.to(device, dtype),
        CobaLIFState(*(field.to(device, dtype) for field in state)),
        weights(neurons, inputs).to(device),
        weights(neurons, neurons).to(device),
        {name: value.to(device, dtype) for name, value in parameters.items()},
    )
