"""Random problems for checks, tuning, benchmarks and tests.

In :func:`problem`, :func:`recurrent_problem` and :func:`network_problem` neurons fire often, and every surrogate derivative
matters. In :func:`sparse_problem` they fire about as often as in simulated networks of the brain. :data:`CASES` are timed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..functional import coba_lif_feed_forward_integral, coba_lif_integral
from ..neuron.records import (
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    CobaLIFState,
    FeedForwardState,
    RecurrentState,
    feed_forward_state,
    recurrent_state,
)
from ..ops.synapses import Synapses

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
# A refractory period in ms that is rounded up to three steps; those of the neurons are up to twice as long.
REFRACTORY = 0.025


def _weighted_sum(outputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of all outputs with random weights, always the same ones."""
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=dtype, device=outputs[0].device)
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=dtype)
        total = total + (output.to(dtype) * weights.to(output.device)).sum()
    return total


class _Runs:
    """What both kinds of problem have in common."""

    x: Tensor
    state: Any
    parameters: dict[str, Tensor]
    alpha: float

    def leaves(self) -> dict[str, Tensor]:
        """All tensors by which a gradient can be taken."""
        raise NotImplementedError

    def shared(self) -> dict[str, Tensor]:
        """Those of :meth:`leaves` that all steps share: parameters and weights."""
        return {name: leaf for name, leaf in self.leaves().items() if name not in ("x", *self.state._fields)}

    def run(self, backend: str, **options: Any) -> tuple[Tensor, Any]:
        """Run the public function; ``options`` are ``method`` and the function's own keywords."""
        raise NotImplementedError

    def record(self, method: str = "super") -> CobaLIFParameters:
        """The parameters as a record, as the public functions take them."""
        numbers: dict[str, Any] = self.parameters
        return CobaLIFParameters(**numbers, method=method, alpha=self.alpha)

    def gradients(self, backend: str, **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The outputs, and the gradients of a randomly weighted sum of all outputs by every leaf (0 if none flows)."""
        leaves = {name: leaf for name, leaf in self.leaves().items() if leaf.is_floating_point()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        spikes, state = self.run(backend, **options)
        outputs = [spikes, *state]
        loss = _weighted_sum(outputs, state.v.dtype)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        for leaf in leaves.values():
            leaf.requires_grad_(False)
        return [output.detach() for output in outputs], dict(zip(leaves, grads, strict=True))

    def magnitudes(self, **options: Any) -> dict[str, Tensor]:
        """The magnitudes of the terms whose sum is a gradient of :meth:`gradients`, added up, for what all steps share.

        The gradient by a parameter has a term for every step and neuron, that by a weight one for every step. The reference
        runs one step after the other, each with parameters and weights of its own, whose gradients are these terms.
        """
        v = torch.as_tensor(self.state.v)
        shared = self.shared()
        sums = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in shared.items()}

        def of_a_step(name: str) -> Tensor:
            leaf, total = shared[name], sums[name]
            own = leaf.to(v.dtype).expand(v.shape if name in self.parameters else leaf.shape).clone().requires_grad_()

            def add(grad: Tensor) -> None:
                total.add_(grad.double().abs().sum_to_size(total.shape))

            own.register_hook(add)
            return own

        record = options.pop("record_states", False)
        state: Any = self.state
        spikes, states = [], []
        for x in self.x.split(1):
            own = {name: of_a_step(name) for name in shared}
            changes: dict[str, Any] = {"x": x, "state": state, "parameters": {name: own[name] for name in self.parameters}}
            for name in own.keys() - self.parameters.keys():
                given = getattr(self, name)
                changes[name] = given.with_weights(own[name]) if isinstance(given, Synapses) else own[name]
            part: _Runs = replace(self, **changes)  # type: ignore[type-var]  # every kind of problem is a dataclass
            fired, state = part.run("reference", **options)
            spikes.append(fired)
            states.append(state)
        last = state._asdict()
        if record:
            last |= {name: torch.stack([getattr(s, name) for s in states]) for name in last if name != "history"}
        _weighted_sum([torch.cat(spikes), *last.values()], v.dtype).backward()
        return sums

    def results(self, backend: str, gradients: bool, **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The outputs, and with ``gradients`` also those of :meth:`gradients`, by the leaf's name."""
        if gradients:
            return self.gradients(backend, **options)
        with torch.no_grad():
            spikes, state = self.run(backend, **options)
        return [spikes, *state], {}


@dataclass
class Problem(_Runs):
    """The arguments of a feed-forward run."""

    x: Tensor
    state: FeedForwardState
    parameters: dict[str, Tensor]
    alpha: float = 5.0
    dt: float = DT

    def leaves(self) -> dict[str, Tensor]:
        return {"x": self.x, **self.state._asdict(), **self.parameters}

    def run(self, backend: str, **options: Any) -> tuple[Tensor, Any]:
        p = self.record(options.pop("method", "super"))
        return coba_lif_feed_forward_integral(self.x, self.state, p, self.dt, backend=backend, **options)


def problem(
    steps: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    per_neuron: bool = False,
    refractory: bool = False,
    currents: bool = False,
) -> Problem:
    """Make a feed-forward problem.

    Args:
        steps: T.
        shape: the axes of the neurons.
        dtype: dtype of the input; with bool and integers the input is spikes.
        device: the device of all tensors.
        per_neuron: whether every neuron has its own parameters.
        refractory: whether there is a refractory period, and neurons that are held at the start.
        currents: whether synapses are currents, with parameters of its own every other neuron's.
    """
    g = torch.Generator().manual_seed(0)
    compute = dtype if dtype in (torch.float32, torch.float64) else torch.float32

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=compute)

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=g, dtype=compute)

    drive = _drawn(steps, shape, compute, torch.device(device), g).mul_(0.35)
    x = (drive.abs() < 0.1).to(dtype) if not dtype.is_floating_point else drive.to(dtype)
    state = CobaLIFFeedForwardState(-0.2 + 0.05 * randn(*shape), 0.3 * rand(*shape), 0.3 * rand(*shape))
    parameters = {
        name: value * (1 + 0.05 * randn(*shape)) if per_neuron else torch.tensor(value, dtype=compute)
        for name, value in VALUES.items()
    }
    fields = [*state, *_held(parameters, torch.as_tensor(state.g_i), per_neuron)] if refractory else state
    if currents:
        _use_currents(parameters, per_neuron)
    return Problem(
        x.to(device),
        feed_forward_state(*(torch.as_tensor(field).to(device) for field in fields)),
        {name: value.to(device) for name, value in parameters.items()},
    )


def _held(parameters: dict[str, Tensor], like: Tensor, per_neuron: bool) -> list[Tensor]:
    """Add a refractory period to the parameters; returns the field ``left`` of a state in which some neurons are held."""
    numbers = torch.arange(like.numel()).reshape(like.shape)
    each = numbers.expand(like.shape)[(0,) * (like.dim() - parameters["v_thresh"].dim())] if per_neuron else numbers
    parameters["refractory"] = (REFRACTORY / 2 * (each % 5) if per_neuron else torch.tensor(REFRACTORY)).to(like.dtype)
    return [(numbers % 4 * (numbers % 3 == 0)).to(like.dtype)]


def _use_currents(parameters: dict[str, Tensor], per_neuron: bool) -> None:
    """Make synapses currents: those of all neurons, or of every other one, with reversal potentials of about 1 and -1."""
    like = parameters["e_rev_E"]
    each = torch.arange(like.numel()).reshape(like.shape) % 2 if per_neuron else torch.tensor(0)
    parameters["conductance_based"] = each.to(like.dtype)
    parameters["e_rev_E"] = torch.where(each == 0, like / VALUES["e_rev_E"], like)


# More numbers than this are drawn on the device itself, as a CPU would take minutes. They differ between devices.
DRAWN_ON_CPU = 2**24


def _drawn(
    steps: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Normal random numbers ``[steps, *shape]``. Up to :data:`DRAWN_ON_CPU` numbers are the same on every device."""
    if steps * math.prod(shape) <= DRAWN_ON_CPU:
        return torch.randn(steps, *shape, generator=generator, dtype=dtype).to(device)
    there = torch.Generator(device).manual_seed(generator.initial_seed())
    return torch.randn(steps, *shape, generator=there, dtype=dtype, device=device)


@dataclass
class RecurrentProblem(_Runs):
    """The arguments of a recurrent run."""

    x: Tensor
    state: RecurrentState
    input_weights: Tensor
    recurrent_weights: Tensor
    parameters: dict[str, Tensor]
    alpha: float = 5.0
    dt: float = DT

    def leaves(self) -> dict[str, Tensor]:
        return {
            "x": self.x,
            **self.state._asdict(),
            "input_weights": self.input_weights,
            "recurrent_weights": self.recurrent_weights,
            **self.parameters,
        }

    def run(self, backend: str, **options: Any) -> tuple[Tensor, Any]:
        p = self.record(options.pop("method", "super"))
        weights = self.input_weights, self.recurrent_weights
        return coba_lif_integral(self.x, self.state, *weights, p, self.dt, backend=backend, **options)


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
    refractory: bool = False,
    currents: bool = False,
    seed: int = 0,
) -> RecurrentProblem:
    """Make a recurrent problem.

    Args:
        steps: T.
        batch: B.
        neurons: N.
        dtype: dtype of all arrays, float32 or float64.
        device: the device of all tensors.
        inputs: I.
        exact: whether the weights are multiples of 2^-10, so that sums of them are exact in every order.
        per_neuron: whether every neuron has its own parameters.
        binary: whether the input is spikes.
        refractory: whether there is a refractory period, and neurons that are held at the start.
        currents: whether synapses are currents, with parameters of its own every other neuron's.
        seed: the seed of the random numbers.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=g, dtype=torch.float64)

    def weights(*size: int) -> Tensor:
        # those of 128 sources, shared out among more: else all neurons of a large row fire together
        values = (0.5 * randn(*size) / min(size[1], 128) ** 0.5 - 0.05) * min(1, 128 / size[1])
        return (torch.round(values * 1024) / 1024 if exact else values).to(dtype)

    x = (rand(steps, batch, inputs) < 0.2).double() if binary else torch.round(randn(steps, batch, inputs) * 8) / 8
    spikes = (rand(batch, neurons) < 0.2).double()
    state = CobaLIFState(spikes, -0.2 + 0.05 * randn(batch, neurons), 0.2 * rand(batch, neurons), 0.2 * rand(batch, neurons))
    parameters = {
        name: value * (1 + 0.05 * randn(neurons)) if per_neuron else torch.tensor(value, dtype=torch.float64)
        for name, value in VALUES.items()
    }
    fields = [*state, *_held(parameters, torch.as_tensor(state.g_i), per_neuron)] if refractory else state
    if currents:
        _use_currents(parameters, per_neuron)
    return RecurrentProblem(
        x.to(device, dtype),
        recurrent_state(*(torch.as_tensor(field).to(device, dtype) for field in fields)),
        weights(neurons, inputs).to(device),
        weights(neurons, neurons).to(device),
        {name: value.to(device, dtype) for name, value in parameters.items()},
    )


@dataclass
class NetworkProblem(_Runs):
    """The arguments of a run through sparse synapses."""

    x: Tensor
    state: RecurrentState
    input_weights: Tensor | Synapses
    recurrent_weights: Synapses
    parameters: dict[str, Tensor]
    alpha: float = 5.0
    dt: float = DT

    def leaves(self) -> dict[str, Tensor]:
        inputs = self.input_weights
        return {
            "x": self.x,
            **self.state._asdict(),
            "input_weights": inputs.weights if isinstance(inputs, Synapses) else inputs,
            "recurrent_weights": self.recurrent_weights.weights,
            **self.parameters,
        }

    def run(self, backend: str, **options: Any) -> tuple[Tensor, Any]:
        p = self.record(options.pop("method", "super"))
        weights = self.input_weights, self.recurrent_weights
        return coba_lif_integral(self.x, self.state, *weights, p, self.dt, backend=backend, **options)


# The longest delays of a network problem in steps; one of its synapses has it.
DELAYS = {"none": 1, "one": 3, "mixed": 9}


def network_problem(
    steps: int,
    batch: int,
    neurons: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    inputs: int = 6,
    delays: str = "mixed",
    dense_input: bool = False,
    exact: bool = False,
    per_neuron: bool = False,
    refractory: bool = False,
    x_dtype: torch.dtype | None = None,
    graded: bool = False,
    seed: int = 0,
) -> NetworkProblem:
    """Make a problem of sparse synapses: about six a source, several of some pairs.

    Args:
        steps: T.
        batch: B.
        neurons: N.
        dtype: dtype of the state and the weights, float32 or float64.
        device: the device of all tensors.
        inputs: I.
        delays: ``none``; ``one``, which all synapses have, while every source has one weight; or ``mixed``, where every
            synapse has a delay and a weight of its own.
        dense_input: whether the weights of the input are a matrix. They are multiples of 2^-10 then.
        exact: whether all weights are multiples of 2^-10, so that sums of 32 bits hold them.
        per_neuron: whether every neuron has its own parameters.
        refractory: whether there is a refractory period.
        x_dtype: dtype of the input, that of the state by default. An input of integers has counts of spikes.
        graded: whether the input is any numbers.
        seed: the seed of the random numbers.
    """
    g = torch.Generator().manual_seed(seed)
    longest = DELAYS[delays]

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=g, dtype=torch.float64)

    def weights(*size: int, scale: float, rounded: bool = exact) -> Tensor:
        values = scale * (torch.randn(*size, generator=g, dtype=torch.float64) + 0.3)
        return torch.round(values * 1024) / 1024 if rounded else values

    def synapses(sources: int, shape: tuple[int, ...], scale: float, delay: Any) -> Synapses:
        count = 6 * sources
        source, target = (torch.randint(size, (count,), generator=g) for size in (sources, neurons))
        own = weights(*shape, scale=scale).to(dtype)
        return Synapses.from_coo(target, source, own, delay, shape=(neurons, sources)).to(device)

    count = 6 * neurons
    each = DT * (1 + torch.randint(longest, (count,), generator=g)).clamp(max=longest)
    each[:1] = DT * longest
    delay = {"none": None, "one": DT * longest, "mixed": each.float()}[delays]
    recurrent = synapses(neurons, (neurons, 1) if delays == "one" else (count,), 0.15, delay)
    if dense_input:
        input_weights: Tensor | Synapses = weights(neurons, inputs, scale=0.15, rounded=True).to(device, dtype)
    else:
        input_weights = synapses(inputs, (6 * inputs,), 0.3 * max(1.0, neurons / inputs / 6), None)
    x = (rand(steps, batch, inputs) < 0.2).double() * (1 if x_dtype is None else 1 + torch.floor(2 * rand(steps, batch, 1)))
    x = x if not graded else 2 * rand(steps, batch, inputs) - 0.5
    history = (rand(longest, batch, neurons) < 0.2).double()
    state = [history[-1], -0.2 + 0.05 * (rand(batch, neurons) - 0.5), 0.2 * rand(batch, neurons), 0.2 * rand(batch, neurons)]
    parameters = {
        name: value * (1 + 0.05 * (rand(neurons) - 0.5)) if per_neuron else torch.tensor(value, dtype=torch.float64)
        for name, value in VALUES.items()
    }
    if refractory:
        state += _held(parameters, state[-1], per_neuron)
    elif longest > 1:
        state.append(torch.zeros_like(history[-1]))
    if longest > 1:
        state.append(history)
    return NetworkProblem(
        x.to(device, dtype if x_dtype is None else x_dtype),
        recurrent_state(*(field.to(device, dtype) for field in state)),
        input_weights,
        recurrent,
        {name: value.to(device, dtype) for name, value in parameters.items()},
    )


# A neuron with a time constant of 20 ms, in ms, mV, nF and uS.
SPARSE_VALUES = {
    "tau_syn_exc_inv": 1 / 5,
    "tau_syn_inh_inv": 1 / 10,
    "c_m_inv": 1 / 0.2,
    "g_l": 0.01,
    "e_rev_I": -80.0,
    "e_rev_E": 0.0,
    "v_rest": -65.0,
    "v_reset": -65.0,
    "v_thresh": -50.0,
}


def sparse_problem(
    steps: int, batch: int, neurons: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> RecurrentProblem:
    """Make a recurrent population that fires about 1 % spikes per neuron and step. Sums of its weights are exact."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(steps, batch, 100, generator=g) < 0.0025
    input_weights = torch.round(torch.rand(neurons, 100, generator=g) * 2) / 1024
    recurrent_weights = torch.round(torch.randn(neurons, neurons, generator=g)) / 2**18
    rest = torch.full((batch, neurons), SPARSE_VALUES["v_rest"])
    state = CobaLIFState(torch.zeros_like(rest), rest, torch.zeros_like(rest), torch.zeros_like(rest))
    return RecurrentProblem(
        x.to(device, dtype),
        recurrent_state(*(torch.as_tensor(field).to(device, dtype) for field in state)),
        input_weights.to(device, dtype),
        recurrent_weights.to(device, dtype),
        {name: torch.tensor(value, dtype=dtype, device=device) for name, value in SPARSE_VALUES.items()},
        alpha=100.0,
        dt=0.1,
    )


# Numbers that a case draws for its input at most.
DRAWN_NUMBERS = 2**26


@dataclass(frozen=True)
class Case:
    """A case to time.

    Attributes:
        name: the name of the case.
        kind: the kind of network.
        steps: T.
        batch: B.
        neurons: N.
        train: whether the gradient by the input, or by the recurrent weights, is computed as well.
        dtype: dtype of all arrays.
    """

    name: str
    kind: Literal["feed_forward", "recurrent"]
    steps: int
    batch: int
    neurons: int
    train: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def neuron_steps(self) -> int:
        """The number of steps times the number of neurons in all rows."""
        return self.steps * self.batch * self.neurons

    def build(self, device: torch.device | str = "cpu") -> Problem | RecurrentProblem:
        """Make the problem.

        Its parameters are Python numbers, as most users give them: no device is asked for them. The input of many neurons
        repeats itself after some steps, as the numbers are drawn on the CPU.
        """
        made: Problem | RecurrentProblem
        if self.kind == "recurrent":
            made = sparse_problem(self.steps, self.batch, self.neurons, self.dtype, device)
        else:
            drawn = min(self.steps, max(32, DRAWN_NUMBERS // max(1, self.batch * self.neurons)))
            made = problem(drawn, (self.batch, self.neurons), self.dtype, device)
            made = replace(made, x=made.x.repeat(-(-self.steps // drawn), 1, 1)[: self.steps])
        numbers: dict[str, Any] = {name: value.item() for name, value in made.parameters.items()}
        return replace(made, parameters=numbers)


CASES = (
    Case("inference-small", "feed_forward", 1000, 1, 1000),
    Case("inference-medium", "feed_forward", 1000, 32, 1024),
    Case("inference-large", "feed_forward", 60, 256, 4096),
    Case("training-small", "feed_forward", 1000, 1, 1000, train=True),
    Case("training-medium", "feed_forward", 300, 32, 1024, train=True),
    Case("training-large", "feed_forward", 20, 256, 4096, train=True),
    Case("recurrent-inference-256", "recurrent", 200, 32, 256),
    Case("recurrent-inference-1024", "recurrent", 200, 32, 1024),
    Case("recurrent-inference-4000", "recurrent", 100, 1, 4000),
    Case("recurrent-training-256", "recurrent", 200, 32, 256, train=True),
    Case("recurrent-training-1024", "recurrent", 100, 32, 1024, train=True),
)
