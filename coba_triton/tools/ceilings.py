"""The shortest time that a machine could take for a case: its memory's bandwidth and its arithmetic are the two ceilings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..backend import reference
from ..neuron.records import Drive, State
from ..ops.constants import derive_constants
from .contenders import ORDER
from .problems import Case, Problem, RecurrentProblem
from .tuner import copy_bandwidth, seconds_per_call

MATRIX = 1024  # rows and columns of the matrices whose product is timed


class Ceilings(NamedTuple):
    """What a machine does at most in a second, measured with as many threads as PyTorch uses.

    Attributes:
        bytes: read and written by a copy that is larger than the caches.
        flops: floating-point operations of a product of two float32 matrices, two for each multiplication with its addition.
    """

    bytes: float
    flops: float


def measure(device: torch.device) -> Ceilings:
    """Copy, and multiply matrices; the best of ten of each counts."""
    matrix = torch.ones(MATRIX, MATRIX, device=device)
    target = torch.empty_like(matrix)
    product = min(seconds_per_call(lambda: torch.mm(matrix, matrix, out=target), device, 1) for _ in range(10))
    return Ceilings(copy_bandwidth(device), 2 * MATRIX**3 / product)


class Work(NamedTuple):
    """What a case needs at least, however it is computed.

    Attributes:
        bytes: that go through the memory once: the input, the result, in training the input once more, and the weights.
        flops: floating-point operations; a comparison or a choice is one, a multiplication with addition two.
    """

    bytes: float
    flops: float

    def least(self, ceilings: Ceilings) -> tuple[float, str]:
        """The shortest time in s, and what sets it: ``memory`` or ``arithmetic``."""
        return max((self.bytes / ceilings.bytes, "memory"), (self.flops / ceilings.flops, "arithmetic"))


def work(case: Case, problem: Problem | RecurrentProblem, spikes: Tensor, result: Tensor) -> Work:
    """What a case needs.

    A source that does not fire needs no arithmetic. The way back needs a product in each step of a recurrent network, of the
    adjoints of what each neuron receives with the weights; a weight belongs to one of both conductances. That the neurons'
    steps are computed a second time is counted, their own adjoints are not.

    Args:
        case: the case.
        problem: its arguments.
        spikes: ``[T, B, N]``.
        result: what a contender returns, see :class:`.contenders.Contender`.
    """
    passes = 2 if case.train else 1
    size = passes * problem.x.nbytes + result.nbytes
    flops = float(operations_of_a_step(problem, case.kind) * case.neuron_steps * passes)
    if isinstance(problem, RecurrentProblem):
        size += problem.input_weights.nbytes + problem.recurrent_weights.nbytes
        # the spikes before the first step arrive, those of the last step do not
        sent = int(spikes[:-1].count_nonzero()) + int(torch.count_nonzero(torch.as_tensor(problem.state.z)))
        flops += 2.0 * (int(problem.x.count_nonzero()) + sent) * case.neurons * passes
        if case.train:
            flops += 2.0 * case.neuron_steps * case.neurons  # of the adjoints with the weights
            flops += 2.0 * sent * case.neurons  # the gradient by the recurrent weights
    return Work(size, flops)


class _Operations(TorchDispatchMode):
    """Counts the operations that compute something of a given size."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types
        self.size = size
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += int(isinstance(result, Tensor) and result.numel() == self.size and not func.is_view)
        return result


def operations_of_a_step(problem: Problem | RecurrentProblem, kind: str) -> int:
    """How many operations a neuron needs in a step, without sums over synapses: those of the reference."""
    state: Any = problem.state
    c = derive_constants(problem.record(), problem.dt, state.v.dtype, state.v.device)
    jump_first = ORDER[kind] == "jump_first"
    run: Callable[[], Any]
    if isinstance(problem, RecurrentProblem):
        _, *fields = state
        drive = Drive(*torch.zeros(2, *state.v.shape, dtype=state.v.dtype, device=state.v.device))
        run = lambda: reference.step(State(*fields), drive, drive, c, jump_first, "super")  # noqa: E731
    else:
        run = lambda: reference.feed_forward_step(problem.x[0], State(*state), c, jump_first, "super")  # noqa: E731
    with torch.no_grad(), _Operations(state.v.numel()) as operations:
        run()
    return int(operations.count)
