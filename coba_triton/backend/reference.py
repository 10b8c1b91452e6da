"""The reference: the neuron's equations in eager PyTorch, one operation a line, differentiated by autograd.

Every other backend must agree with this file bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

# PyTorch's operations under the names by which the neuron's functions, bound below, look for them here
from torch import Tensor, exp, relu, where  # noqa: F401 - see above
from torch import abs as absolute  # noqa: F401 - see above
from torch import div as divide  # noqa: F401 - see above
from torch import sqrt as square_root  # noqa: F401 - see above

from ..neuron import step as equations
from ..neuron import surrogate as derivatives
from ..neuron.operations import bind
from ..neuron.records import Constants, Drive, State
from ..neuron.surrogate import SURROGATES, TWO_OVER_SQRT_PI  # noqa: F401 - the second is for a bound function

split_input = bind(equations.split_input, globals())
add_drive = bind(equations.add_drive, globals())
decaying = bind(equations.decaying, globals())
integrate = bind(equations.integrate, globals())
excess = bind(equations.excess, globals())
fire = bind(equations.fire, globals())
reset = bind(equations.reset, globals())
count_down = bind(equations.count_down, globals())
super_spike = bind(derivatives.super_spike, globals())
triangle = bind(derivatives.triangle, globals())
tanh = bind(derivatives.tanh, globals())
circ = bind(derivatives.circ, globals())
heavi_erfc = bind(derivatives.heavi_erfc, globals())
surrogate = bind(derivatives.surrogate, globals())


class _Spike(torch.autograd.Function):
    """Strict Heaviside with a surrogate derivative; twice differentiable, forward and reverse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, left: Tensor | None, alpha: Tensor, method: str) -> Tensor:
        return fire(x, left).to(x.dtype)  # type: ignore[no-any-return]  # a bound function has no types

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor, str], output: Tensor) -> None:
        x, left, alpha, ctx.method = inputs
        ctx.save_for_backward(x, left, alpha)
        ctx.save_for_forward(x, left, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, left, alpha = ctx.saved_tensors
        return _times_derivative(grad, x, left, alpha, ctx.method), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        x, left, alpha = ctx.saved_tensors
        return _times_derivative(tangent, x, left, alpha, ctx.method)


def _times_derivative(grad: Tensor, x: Tensor, left: Tensor | None, alpha: Tensor, method: str) -> Tensor:
    """The gradient by ``x``, none of a neuron that is held."""
    product: Tensor = grad * surrogate(x, alpha, method)
    return product if left is None else where(left > 0.0, 0.0, product)


def _with_derivative(value: Tensor, of: Tensor) -> Tensor:
    """The ``value``, with the derivative of another tensor, in ordinary operations.

    A compiler takes no function that has a forward mode, and a program that is exported loses the derivative of one.
    """
    nothing: Tensor = where(torch.isfinite(of), of - of.detach(), 0.0)
    return value + nothing


def spike(x: Tensor, alpha: Tensor, method: str, left: Tensor | None = None) -> Tensor:
    """1 where ``x > 0``, else 0, in the dtype of ``x``; differentiable by the named surrogate.

    Args:
        x: distance to the threshold ``u - v_thresh`` in mV, any shape.
        alpha: steepness, broadcasts with ``x``; no gradient flows to it.
        method: a key of :data:`~coba_triton.neuron.surrogate.SURROGATES`.
        left: number of steps for which a neuron is still held and does not spike; None: no neuron is held.
    """
    if SURROGATES[method] is None:
        return fire(x, left).to(x.dtype)  # type: ignore[no-any-return]  # a bound function has no types
    if torch.compiler.is_compiling():
        return _with_derivative(fire(x, left).to(x.dtype), _times_derivative(x, x.detach(), left, alpha, method))
    return _Spike.apply(x, left, alpha, method)  # type: ignore[no-any-return, no-untyped-call]  # torch has no types


class Step(NamedTuple):
    """Spikes and state after one step, and the number of steps for which neurons are held, None without such a period."""

    z: Tensor
    state: State
    left: Tensor | None


def step(s: Any, drive: Drive, recurrent: Drive | None, c: Constants, jump_first: bool, method: str) -> Step:
    """One forward Euler step.

    Args:
        s: the state before it, which has the fields of ``State`` and, with a refractory period, ``left``.
        drive: of the input in this step, in uS.
        recurrent: the recurrent drive in uS, or None.
        c: the step's constants.
        jump_first: add the drive before the decay instead of after it.
        method: surrogate derivative of the spike.
    """
    left = s.left.detach() if hasattr(s, "left") else None
    u = integrate(s, drive, recurrent, c, jump_first)
    z = spike(excess(u, c), c.alpha, method, left)
    after = reset(u, z, left, c)
    return Step(z, after, None if left is None else count_down(left, z.detach(), c))


def feed_forward_step(x: Tensor, s: Any, c: Constants, jump_first: bool, method: str) -> Step:
    """One step of unconnected neurons; the sign of the net input ``x`` (in uS) decides which conductance it joins."""
    return step(s, split_input(x), None, c, jump_first, method)


class SplitWeights(NamedTuple):
    """Weights in uS split by sign, transposed for a product from the left: ``[I, N]`` and ``[N, N]``."""

    input_e: Tensor
    input_i: Tensor
    recurrent_e: Tensor
    recurrent_i: Tensor

    @classmethod
    def of(cls, input_weights: Tensor, recurrent_weights: Tensor) -> SplitWeights:
        w_in, w_rec = input_weights.mT, recurrent_weights.mT
        return cls(relu(w_in), relu(-w_in), relu(w_rec), relu(-w_rec))


def recurrent_step(x: Tensor, z: Any, s: Any, w: SplitWeights, c: Constants, jump_first: bool, method: str) -> Step:
    """One step of a recurrent population; the sign of each synapse decides which conductance it drives.

    Args:
        x: input of this step, ``[*batch, I]``.
        z: spikes of the last step, ``[*batch, N]``.
        s: the state before the step, which has the fields of ``State``, ``[*batch, N]`` each.
        w: the weights, split by sign.
        c: the step's constants.
        jump_first: add the drive before the decay instead of after it.
        method: surrogate derivative of the spike.
    """
    drive, recurrent = matrix_drive(x, w.input_e, w.input_i), matrix_drive(z, w.recurrent_e, w.recurrent_i)
    return step(s, drive, recurrent, c, jump_first, method)


def matrix_drive(x: Tensor, excitatory: Tensor, inhibitory: Tensor) -> Drive:
    """Products with the weights of both signs ``[K, N]``, in the dtype of the neurons, whatever autocast says."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return Drive(x @ excitatory, x @ inhibitory)
    return Drive(x @ excitatory, x @ inhibitory)


class _ExactSum(torch.autograd.Function):
    """The sum over synapses of weight times value, of whole numbers of ``1 / scale``: exact in any order, rounded once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, values: Tensor, targets: Tensor, scale: Tensor, neurons: int) -> Tensor:
        terms = torch.round(weights.double() * values.double() * scale.double()).long()
        sums = torch.zeros(*values.shape[:-1], neurons, dtype=torch.int64, device=values.device)
        return sums.index_add(-1, targets, terms).to(weights.dtype) * (1.0 / scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        weights, values, targets, _, ctx.neurons = inputs
        ctx.save_for_backward(weights, values, targets)
        ctx.save_for_forward(weights, values, targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, values, targets = ctx.saved_tensors
        at_target = grad[..., targets]
        by_weight = (at_target * values).flatten(0, -2).sum(0) if values.dim() > 1 else at_target * values
        return by_weight, at_target * weights, None, None, None

    @staticmethod
    def jvp(ctx: Any, weights_tangent: Tensor | None, values_tangent: Tensor | None, *_: Any) -> Tensor:
        weights, values, targets = ctx.saved_tensors
        terms = torch.zeros_like(values)
        if weights_tangent is not None:
            terms = terms + weights_tangent * values
        if values_tangent is not None:
            terms = terms + weights * values_tangent
        tangent: Tensor = values.new_zeros(*values.shape[:-1], ctx.neurons).index_add(-1, targets, terms)
        return tangent


def _add_up(weights: Tensor, values: Tensor, targets: Tensor, scale: Tensor, neurons: int) -> Tensor:
    """The exact sums of ``weights * values`` onto each target."""
    if torch.compiler.is_compiling():
        sums = values.new_zeros(*values.shape[:-1], neurons).index_add(-1, targets, weights * values)
        return _with_derivative(_ExactSum.forward(weights.detach(), values.detach(), targets, scale, neurons), sums)
    return _ExactSum.apply(weights, values, targets, scale, neurons)  # type: ignore[no-any-return, no-untyped-call]


class SparseWeights(NamedTuple):
    """The synapses of one projection, one after the other.

    Attributes:
        sources: index of the sending neuron or input of each synapse, ``[S]``.
        targets: index of the receiving neuron, ``[S]``.
        weights: in uS, ``[S]``; its sign decides which conductance a synapse drives.
        steps: after how many steps a spike arrives, ``[S]``; None: in its own step.
        scales: what makes integers of excitatory and of inhibitory weights: powers of two.
        neurons: N.
    """

    sources: Tensor
    targets: Tensor
    weights: Tensor
    steps: Tensor | None
    scales: Tensor
    neurons: int


def exact_drive(w: SparseWeights, values: Tensor, unit: Any = 1.0) -> Drive:
    """The drive of the ``values [*batch, S]`` that arrive at the synapses; ``unit``: of which values are fractions."""
    excitatory, inhibitory = (
        _add_up(relu(weights), values, w.targets, scale / unit, w.neurons)
        for weights, scale in ((w.weights, w.scales[0]), (-w.weights, w.scales[1]))
    )
    return Drive(excitatory, inhibitory)


def input_drive(w: SparseWeights, x: Tensor) -> Drive:
    """The drive of an input ``x [*batch, I]`` through sparse synapses.

    A value beyond 1 makes the grid of its row coarser by the least power of two that is not below it. One that is not
    finite drives all neurons with NaN, as it would through a matrix that has a weight of 0.
    """
    largest = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    finite = torch.isfinite(largest)
    fraction, power = torch.frexp(where(finite, largest, 1.0))
    unit = torch.ldexp(torch.ones_like(largest), (power - (fraction == 0.5).int()).clamp(min=0))
    drive = exact_drive(w, where(finite, x, 0.0)[..., w.sources], unit)
    return Drive(where(finite, drive.e, torch.nan), where(finite, drive.i, torch.nan))


def recurrent_drive(w: SparseWeights, history: Tensor) -> Drive:
    """The drive of the spikes that arrive now, of ``history [D, *batch, N]``: in its last row are those of the last step."""
    assert w.steps is not None
    sent = history.movedim(0, -1)[..., w.sources, len(history) - w.steps]
    return exact_drive(w, sent)


def sparse_step(
    drive: Drive, history: Tensor, s: Any, w: SparseWeights, c: Constants, jump_first: bool, method: str
) -> tuple[Step, Tensor]:
    """One step of a population with sparse synapses; returns the history after it as well.

    Args:
        drive: of the input.
        history: spikes of the last D steps, ``[D, *batch, N]``.
        s: the state before the step.
        w: the synapses from neuron to neuron.
        c: the step's constants.
        jump_first: add the drive before the decay instead of after it.
        method: surrogate derivative of the spike.
    """
    done = step(s, drive, recurrent_drive(w, history), c, jump_first, method)
    return done, torch.cat([history[1:], done.z.unsqueeze(0)])
