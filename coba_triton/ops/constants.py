"""The constants of a step, derived from the parameters and the time step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..neuron.records import Constants, Sums
from .tensors import is_watched, keep, known, number_key, numbers_on

# A float32 counts down from no larger number one by one.
MOST_REFRACTORY_STEPS = 2**24


def derive_constants(p: Any, dt: float, dtype: torch.dtype, device: torch.device) -> Constants:
    """The constants of a step as tensors of the compute dtype, each of its parameter's own shape.

    The products with ``dt`` are evaluated before the conversion, in the dtype eager PyTorch would use (a Python
    number in double precision, a float32 tensor in float32); gradients flow through them to the parameters.

    Args:
        p: a parameter record, duck-typed.
        dt: time step in ms.
        dtype: compute dtype, float32 or float64.
        device: where the state lives.
    """
    numbers, factors = _numbers_and_factors(p, dt)
    for i, number in enumerate(numbers):
        if isinstance(number, Tensor) and number.dtype == torch.float64:
            numbers[i] = known(number)
    # the numbers of a module on a GPU: three operations for all of them, not one or two for each
    together = [] if is_watched() else [i for i, number in enumerate(numbers) if _is_double_on(device, number)]
    if together:
        doubles = torch.stack([numbers[i] for i in together])
        products = doubles * numbers_on(device, torch.float64, [factors[i] for i in together])
        for i, product in zip(together, products.to(dtype).unbind(), strict=True):
            numbers[i] = product
    for i in {0, 1, 2}.difference(together):
        numbers[i] = factors[i] * numbers[i]
    numbers = [known(number) if isinstance(number, Tensor) else number for number in numbers]
    singles = numbers_on(device, dtype, [0.0 if isinstance(number, Tensor) else number for number in numbers]).unbind()
    return Constants(
        *(
            number.to(device=device, dtype=dtype) if isinstance(number, Tensor) else single
            for number, single in zip(numbers, singles, strict=True)
        )
    )


def _numbers_and_factors(p: Any, dt: float) -> tuple[list[Any], tuple[float, ...]]:
    """What the constants are made of, each as it was given, and what each is multiplied by."""
    numbers = [
        p.tau_syn_exc_inv, p.tau_syn_inh_inv, p.c_m_inv, p.g_l, p.e_rev_I, p.e_rev_E, p.v_rest, p.v_reset, p.v_thresh,
        _fixed(p.alpha), refractory_steps(getattr(p, "refractory", 0), dt), _fixed(getattr(p, "conductance_based", 1)),
    ]  # fmt: skip
    return numbers, (-dt, -dt, dt, *(1.0,) * 9)


def memory_in_steps(p: Any, dt: float) -> float | None:
    """The largest time constant in steps, infinite where something does not decay; None unless all are Python numbers."""
    if number_key(p) is None:
        return None
    slowest = dt * min(p.tau_syn_exc_inv, p.tau_syn_inh_inv, p.c_m_inv * p.g_l)
    return 1 / slowest if slowest > 0 else math.inf


def _fixed(number: Any) -> Any:
    """A number to which no gradient flows."""
    return number.detach() if isinstance(number, Tensor) else number


def _is_double_on(device: torch.device, number: Any) -> bool:
    return isinstance(number, Tensor) and number.dtype == torch.float64 and number.dim() == 0 and number.device == device


def constants_table(p: Any, dt: float, dtype: torch.dtype, device: torch.device, neurons: torch.Size) -> Tensor:
    """The constants as the kernels take them: ``[C, 1]`` where every one is a single number, else ``[C, neurons]``."""
    if (key := number_key(p)) is not None and type(dt) is float:
        made = keep((key, dt, dtype, device), device, lambda: torch.stack(derive_constants(p, dt, dtype, device)))
        return made.unsqueeze(1)
    if device.type != "cpu" and (table := _table_of_doubles(p, dt, dtype, device)) is not None:
        return table
    c = derive_constants(p, dt, dtype, device)
    if all(constant.dim() == 0 for constant in c):
        return torch.stack(c).unsqueeze(1)
    return torch.stack([constant.expand(neurons) for constant in c]).reshape(len(c), -1)


def _table_of_doubles(p: Any, dt: float, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The table ``[C, 1]`` of a module's numbers on a GPU, in three operations; None if some are neither these nor Python's.

    Like :func:`derive_constants`, it multiplies in double precision before it converts.
    """
    if is_watched():
        return None
    numbers, factors = _numbers_and_factors(p, dt)
    if not all(isinstance(number, (int, float)) or _is_double_on(device, number) for number in numbers):
        return None
    doubles = [n if isinstance(n, Tensor) else numbers_on(device, torch.float64, [n]).squeeze() for n in numbers]
    return (torch.stack(doubles) * numbers_on(device, torch.float64, factors)).to(dtype).unsqueeze(1)


def refractory_steps(refractory: Any, dt: float) -> Any:
    """The number of steps for which a neuron is held after a spike: the period in ms rounded up, as NEST does.

    Raises:
        ValueError: if a Python number is of more steps than float32 can count down.
    """
    if isinstance(refractory, Tensor):
        return torch.ceil(refractory.detach().double() / dt - 1e-6)
    # without a period a compiler need not know dt
    steps = math.ceil(refractory / dt - 1e-6) if refractory else 0
    if steps > MOST_REFRACTORY_STEPS:
        raise ValueError(
            f"refractory must be at most {MOST_REFRACTORY_STEPS:,} steps of dt={dt:g} ms, got {refractory:g} ms; "
            "make it shorter, or dt larger"
        )
    return float(steps)


def constants_gradient(sums: Tensor, constants: Tensor) -> Tensor:
    """The gradient by the table ``[C, M]`` or ``[C, 1]`` of the constants, from its sums over time ``[S, M]``.

    Constants that have no derivative get 0. Sums that nobody asked for have no columns, and the gradient has none then.
    """
    if sums.shape[1] and constants.shape[1] == 1:
        # torch.sum has a fixed order: one sum a neuron, then one over the neurons
        sums = sums.sum(1, keepdim=True)
    return torch.nn.functional.pad(sums, (0, 0, 0, len(Constants._fields) - len(Sums._fields)))
