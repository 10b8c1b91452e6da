"""The synapses of a population, in whatever form they are given, checked and brought into one form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .given import delays_of, to_tensor
from .synapses import Synapses, in_memory, steps_of
from .tensors import as_in_memory, is_capturing, is_watched
from .validation import check_device, check_matrix


class Wiring(NamedTuple):
    """The synapses of a population, checked.

    Attributes:
        inputs: dense ``[N, I]``, or sparse synapses.
        recurrent: from neuron to neuron.
        shortest: steps of the shortest delay.
        longest: D, steps of the longest one.
    """

    inputs: Tensor | Synapses
    recurrent: Synapses
    shortest: int
    longest: int


def is_sparse(input_weights: Any, recurrent_weights: Any, delay: Any = None) -> bool:
    """Whether a population has sparse synapses, or delays."""
    return delay is not None or any(
        isinstance(weights, Synapses) or (isinstance(weights, Tensor) and weights.layout is not torch.strided)
        for weights in (input_weights, recurrent_weights)
    )


def connect(x: Tensor, input_weights: Any, recurrent_weights: Any, delay: Any, dt: float) -> Wiring:
    """Check the synapses for an input ``x [..., I]``; matrices of a sparse layout become records."""
    if isinstance(recurrent_weights, Synapses) and delay is not None:
        raise ValueError(
            "delay is for a matrix of recurrent weights, got one beside Synapses, which have delays of their own; leave "
            "delay= away"
        )
    named = {"input_weights": input_weights, "recurrent_weights": recurrent_weights}
    for name, weights in named.items():
        if isinstance(weights, Tensor) and (name == "recurrent_weights" or weights.layout is not torch.strided):
            check_matrix(weights, name)
            if is_capturing(weights.device):
                raise RuntimeError(
                    f"{name} must be coba_triton.Synapses while a CUDA graph is captured, got a matrix, whose synapses are "
                    "read back in every call; make them once, before the capture, with Synapses.from_torch"
                )
            named[name] = Synapses.from_torch(weights, delay if name == "recurrent_weights" else None)
    inputs, recurrent = named.values()
    check_synapses(inputs, recurrent, x)
    inputs = in_memory(inputs) if isinstance(inputs, Synapses) else as_in_memory(inputs)
    recurrent = in_memory(recurrent)
    return Wiring(inputs, recurrent, *recurrent.check_delays(dt))


def check_delay(delay: Any, neurons: int, dt: float) -> tuple[float, float]:
    """The delay of a recurrent matrix for these neurons; returns the shortest and the longest one, 0 if they are not known.

    They are looked at unless a compiler or a transform looks on.
    """
    values = to_tensor(delay, "delay", delay.device if isinstance(delay, Tensor) else torch.device("cpu"))
    if values.shape not in ((), (1,), (neurons,), (neurons, neurons)):
        raise ValueError(
            f"delay must be a number, [N]=[{neurons}] or [N, N]={[neurons, neurons]}, got shape {list(values.shape)}; pass "
            "one number to share it"
        )
    if values.is_meta or is_watched():
        return 0.0, 0.0
    _, shortest, longest = delays_of(values, "delay")
    steps_of(shortest, longest, dt)
    return shortest, longest


def check_no_delays(inputs: Synapses) -> None:
    """Synapses of an input."""
    if inputs.delays is not None:
        raise ValueError(
            "input_weights must have no delays, as an input arrives in the step in which it is given, got delays of "
            f"{inputs.shortest:g} to {inputs.longest:g} ms; shift the input in time, or make its sources neurons"
        )


def check_synapses(inputs: Any, recurrent: Any, x: Tensor) -> None:
    """The synapses of a population for an input ``x [..., I]``; dense weights of inputs are a matrix ``[N, I]``."""
    for name, synapses in (("input_weights", inputs), ("recurrent_weights", recurrent)):
        if not isinstance(synapses, Tensor | Synapses):
            raise TypeError(
                f"{name} must be a torch.Tensor or coba_triton.Synapses, got {type(synapses).__name__}; use "
                "Synapses.from_coo, from_torch or from_scipy"
            )
        check_device(synapses.indptr if isinstance(synapses, Synapses) else synapses, name, x.device)
    neurons = recurrent.neurons
    if recurrent.sources != neurons:
        raise ValueError(
            f"recurrent_weights must connect N neurons with N neurons, got {recurrent.sources} sources and {neurons} "
            "neurons; make them with shape=(N, N)"
        )
    if isinstance(inputs, Synapses):
        shape = [inputs.neurons, inputs.sources]
        check_no_delays(inputs)
    else:
        check_matrix(inputs, "input_weights")
        shape = list(inputs.shape)
    if shape != [neurons, x.shape[-1]]:
        raise ValueError(
            f"input_weights must be [N, I]=[{neurons}, {x.shape[-1]}] for {neurons} neurons and an input of "
            f"I={x.shape[-1]}, got {shape}; transpose them, or change the input"
        )
