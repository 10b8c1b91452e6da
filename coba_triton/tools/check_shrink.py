"""Make a failing problem of :func:`coba_triton.check` as small as possible, and write a program that shows the failure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..neuron.records import feed_forward_state, recurrent_state
from ..ops.synapses import Synapses
from .check_cases import AnyProblem, Check
from .problems import NetworkProblem, Problem

SNIPPET_NUMBERS = 400  # the largest problem that a program spells out
# Shrinking stops after so many runs or seconds. Each run may compile kernels, as its sizes are new.
SHRINK_RUNS = 150
SHRINK_SECONDS = 20.0


Some = slice | Tensor  # of Tensors: ascending indices
EVERYTHING = slice(None)


def part(case: AnyProblem, steps: int, rows: slice, neurons: Some, inputs: slice, synapses: Some = EVERYTHING) -> AnyProblem:
    """The first steps of a problem, for some of its neurons.

    ``rows`` and ``inputs`` choose from recurrent problems only, ``synapses`` from sparse ones between neurons.
    """
    if isinstance(case, Problem):
        pick = (slice(None), neurons)
        return replace(
            case,
            x=case.x[:steps][pick],
            state=feed_forward_state(*(torch.as_tensor(field)[neurons] for field in case.state)),
            parameters={name: value[neurons] if value.dim() else value for name, value in case.parameters.items()},
        )

    def few(value: Tensor) -> Tensor:
        if value.dim() == 2 and value.shape[0] > 1:
            value = value[rows]
        return value[..., neurons] if value.dim() else value

    chosen: dict[str, Any] = {
        "x": case.x[:steps, rows, inputs],
        "state": recurrent_state(*(torch.as_tensor(field)[..., rows, :][..., neurons] for field in case.state)),
        "input_weights": _weights_between(case.input_weights, neurons, inputs),
        "recurrent_weights": _weights_between(case.recurrent_weights, neurons, neurons, synapses),
        "parameters": {name: few(value) for name, value in case.parameters.items()},
    }
    return replace(case, **chosen)


def _weights_between(
    weights: Tensor | Synapses, neurons: Some, sources: Some, synapses: Some = EVERYTHING
) -> Tensor | Synapses:
    """The weights of some sources onto some neurons."""
    if not isinstance(weights, Synapses):
        return weights[neurons][:, sources].contiguous()

    def numbered(size: int, chosen: Some) -> tuple[Tensor, int]:
        """The new number of each of them, -1 if it is not chosen; and how many are."""
        numbers = torch.full((size,), -1, device=weights.targets.device)
        count = len(numbers[chosen])
        numbers[chosen] = torch.arange(count, device=numbers.device)
        return numbers, count

    (to, onto), (of, size) = numbered(weights.neurons, neurons), numbered(weights.sources, sources)
    target, source = to[weights.targets.long()], of[weights.source_of()]
    kept = torch.zeros_like(source, dtype=torch.bool)
    kept[synapses] = True
    kept &= (target >= 0) & (source >= 0)

    def few(values: Tensor) -> Tensor:
        if values.dim() == 2:
            return values[sources]
        return values if values.shape[0] == 1 else values[kept]

    delays = None if weights.delays is None else few(weights.delays)
    return Synapses.from_coo(target[kept], source[kept], few(weights.weights), delays, shape=(onto, size))


def flatten(case: AnyProblem) -> AnyProblem:
    """The same problem with a single axis of neurons; a recurrent problem also gets a single axis of batch rows."""
    fields = [torch.as_tensor(field) for field in case.state]
    axes = 1 if isinstance(case, Problem) else 2
    shape = fields[0].shape
    rows = (-1,) if axes == 1 else (-1, shape[-1])
    parameters = {
        name: value if value.dim() == 0 else value.expand(shape).reshape(rows) for name, value in case.parameters.items()
    }
    state: Any = type(case.state)(*(field.reshape(*field.shape[: field.dim() - len(shape)], *rows) for field in fields))
    x = case.x.reshape(len(case.x), *((-1,) if axes == 1 else (-1, case.x.shape[-1])))
    return replace(case, x=x, state=state, parameters=parameters)


def shrink(case: AnyProblem, fails: Callable[[AnyProblem], bool]) -> AnyProblem:
    """The smallest part of a failing problem that still fails: steps, neurons, rows, inputs and synapses are left out."""
    case = flatten(case)
    left, until = SHRINK_RUNS, time.monotonic() + SHRINK_SECONDS

    def smaller(of: AnyProblem, axis: str) -> AnyProblem | None:
        nonlocal left
        for candidate in _candidates(of, axis):
            if left == 0 or time.monotonic() > until:
                return None
            left -= 1
            arguments: dict[str, Any] = {
                "steps": of.x.shape[0], "rows": EVERYTHING, "neurons": EVERYTHING, "inputs": EVERYTHING,
            } | {axis: candidate}  # fmt: skip
            try:
                tried = part(of, **arguments)
                if fails(tried):
                    return tried
            except (RuntimeError, ValueError):
                continue
        return None

    if not fails(case):
        return case
    before = None
    while before is not case:
        before = case
        for axis in _sizes(case):
            while (found := smaller(case, axis)) is not None:
                case = found
    return case


def _sizes(of: AnyProblem) -> dict[str, int]:
    """What can be left out of a problem, and how much of it there is."""
    steps, neurons = of.x.shape[0], torch.as_tensor(of.state.v).shape[-1]
    if isinstance(of, Problem):
        return {"steps": steps, "neurons": neurons}
    synapses = {"synapses": of.recurrent_weights.count} if isinstance(of, NetworkProblem) else {}
    return {"steps": steps, **synapses, "neurons": neurons, "rows": of.x.shape[1], "inputs": of.x.shape[2]}


def _candidates(of: AnyProblem, axis: str) -> Iterator[Some | int]:
    """What might be enough of a problem along an axis."""
    size = _sizes(of)[axis]
    if isinstance(of, NetworkProblem):
        synapses = of.recurrent_weights
        each = torch.arange(size, device=synapses.targets.device)
        if axis == "synapses":
            if size:
                yield each[:0]
            for pieces in (2, 4, 8):
                for number in range(pieces if pieces <= size else 0):
                    yield each[each * pieces // size != number]
            if 2 < size < 8:
                for number in range(size):
                    yield each[each != number]
            return
        connected = torch.cat([synapses.targets.long(), synapses.source_of()]).unique()
        if axis == "neurons" and 0 < len(connected) < size:
            yield connected
    for share in (1, size // 8, size // 2, size - 1):
        if 0 < share < size:
            yield share if axis == "steps" else slice(0, share)
            if axis != "steps":
                yield slice(size - share, size)
    if axis != "steps" and size > 4:
        yield slice(size // 4, size - size // 4)


def _literal(value: Any) -> str:
    if isinstance(value, Synapses):
        pairs = value.targets.tolist(), value.source_of().tolist()
        given = [*map(str, pairs), _literal(value.weights), _literal(value.delays)]
        return f"Synapses.from_coo({', '.join(given)}, shape={(value.neurons, value.sources)})"
    if not isinstance(value, Tensor):
        return repr(value)
    device = "" if value.device.type == "cpu" else f", device={str(value.device)!r}"
    numbers = repr(value.tolist())
    for special in ("nan", "inf"):
        numbers = numbers.replace(special, f'float("{special}")')
    return f"torch.tensor({numbers}, dtype={value.dtype}{device})"


def snippet(case: AnyProblem, check: Check) -> str:
    """A program that runs both sides of a check on a problem and prints where they differ."""
    tensors = [case.x, *case.state, *case.parameters.values()]
    weights: dict[str, Tensor | Synapses] = {}
    if not isinstance(case, Problem):
        weights = {name: getattr(case, name) for name in ("input_weights", "recurrent_weights")}
        for each in weights.values():
            tensors += [each.targets, each.weights] if isinstance(each, Synapses) else [each]
    sparse = any(isinstance(each, Synapses) for each in weights.values())
    if sum(torch.as_tensor(tensor).numel() for tensor in tensors) > SNIPPET_NUMBERS:
        return (
            f"import coba_triton\nprint(coba_triton.check(backend={check.ours.backend!r}, "
            f"device={str(case.x.device)!r}, level='full', only={f'{check.group}, {check.name}'!r}))"
        )
    state = type(case.state).__name__
    lines = [
        "import torch",
        f"from coba_triton import {state}{', Synapses' if sparse else ''}",
        f"from coba_triton.tools.problems import {type(case).__name__}",
        "",
        f"case = {type(case).__name__}(",
        f"    x={_literal(case.x)},",
        f"    state={state}(",
        *(f"        {name}={_literal(value)}," for name, value in case.state._asdict().items()),
        "    ),",
        *(f"    {name}={_literal(value)}," for name, value in weights.items()),
        "    parameters={",
        *(f"        {name!r}: {_literal(value)}," for name, value in case.parameters.items()),
        "    },",
        f"    alpha={case.alpha!r},",
        f"    dt={case.dt!r},",
        ")",
    ]
    for variable, run in (("ours", check.ours), ("theirs", check.theirs)):
        options = "".join(f", {name}={value!r}" for name, value in run.options.items())
        lines.append(f"{variable} = case.{'gradients' if check.gradients else 'run'}({run.backend!r}{options})")
    if check.gradients:
        lines.append("ours, theirs = ({'spikes': r[0][0], **dict(enumerate(r[0][1:])), **r[1]} for r in (ours, theirs))")
    else:
        lines.append("ours, theirs = ({'spikes': spikes, **state._asdict()} for spikes, state in (ours, theirs))")
    lines += [
        "for name in ours:",
        "    same = torch.equal(ours[name], theirs[name])",
        "    print(name, 'same' if same else f'differs: {ours[name].tolist()} instead of {theirs[name].tolist()}')",
    ]
    return "\n".join(lines)
