"""The cases that :func:`coba_triton.check` generates. A case is a problem and two runs of it, which are compared."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..neuron.records import CobaLIFFeedForwardState
from ..neuron.surrogate import SURROGATES
from ..ops.validation import ORDERS
from .problems import DELAYS, VALUES, NetworkProblem, Problem, RecurrentProblem, network_problem, problem, recurrent_problem

AnyProblem = Problem | RecurrentProblem | NetworkProblem
Builder = Callable[[torch.device], AnyProblem]
LEVELS = ("quick", "full")


@dataclass(frozen=True)
class Run:
    """One of the two runs that are compared."""

    backend: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One case: two runs of one problem, and how they are compared.

    Attributes:
        group: what is checked, in a few words.
        name: what distinguishes this case from the others of its group.
        build: makes the problem on a device.
        ours: the run that is checked.
        theirs: the run that it must agree with.
        gradients: whether the gradients by all inputs are compared as well.
        bits: whether all bits must be equal. False if sums over synapses are rounded: then every step is compared on its
            own, within the rounding of its sums.
        gib: memory that the case needs, in GiB; 0 if it is small.
    """

    group: str
    name: str
    build: Builder
    ours: Run
    theirs: Run
    gradients: bool = False
    bits: bool = True
    gib: float = 0.0


def _layout(kind: str, device: torch.device) -> Problem:
    case = problem(21, (40,), device=device)
    if kind == "transposed":
        case.x = case.x.t().contiguous().t()
    elif kind == "every second":
        case.x = torch.stack([case.x, case.x + 1], -1)[..., 0]
    elif kind == "expanded over neurons":
        case.x = case.x[:, :1].expand(21, 40)
    else:
        case.x = case.x[:1].expand(21, 40)
    return case


def _threshold(dtype: torch.dtype, device: torch.device) -> Problem:
    """Three neurons without currents, whose potentials are one ulp below, on, and one ulp above the threshold."""
    case = problem(1, (3,), dtype, device)
    thresh = torch.tensor(VALUES["v_thresh"], dtype=dtype)
    near = [torch.nextafter(thresh, torch.tensor(to, dtype=dtype)) for to in (-9.0, 9.0)]
    case.x = torch.zeros_like(case.x)
    case.parameters["g_l"] = torch.zeros_like(case.parameters["g_l"])
    zero = torch.zeros(3, dtype=dtype, device=device)
    case.state = CobaLIFFeedForwardState(torch.stack([near[0], thresh, near[1]]).to(device), zero, zero)
    return case


def generate(backend: str, device: torch.device, level: str) -> Iterator[Check]:
    """The cases of a level, ``quick`` or ``full``, for a backend on a device."""
    full = level == "full"
    interpreted = backend == "triton" and device.type == "cpu"
    f32, f64, f16, bf16 = torch.float32, torch.float64, torch.float16, torch.bfloat16

    def against_reference(group: str, name: str, build: Any, gradients: bool = False, **options: Any) -> Check:
        theirs = {key: value for key, value in options.items() if key != "path"}
        return Check(group, name, build, Run(backend, options), Run("reference", theirs), gradients)

    sizes = [(1, (1,)), (5, (63,)), (16, (32,)), (35, (2, 20)), (33, (500,))]
    large = [] if interpreted else [(257, (4097,)), (1000, (8, 256)), (5000, (3,))]
    for steps, shape in sizes + large:
        every = itertools.product(ORDERS, (f32, f64), (False, True), (False, True))
        some = zip(ORDERS * 2, (f32, f32, f64, f64), (False, True, True, False), (True, False, False, True), strict=True)
        for order, dtype, per_neuron, record in every if full else some:
            extra = f"{'own' if per_neuron else 'shared'} parameters{', recorded' if record else ''}"
            yield against_reference(
                "forward", f"{[steps, *shape]} {dtype} {order}, {extra}",
                lambda d, s=steps, n=shape, t=dtype, p=per_neuron: problem(s, n, t, d, per_neuron=p),
                order=order, record_states=record,
            )  # fmt: skip
    for dtype in (f16, bf16, torch.bool, torch.uint8, torch.int64):
        yield against_reference("input dtypes", str(dtype), lambda d, t=dtype: problem(19, (40,), t, d))
    for steps, kind in itertools.product((7, 32, 45) if full else (45,), (f16, bf16, f64, torch.bool, torch.uint8, "bits")):
        yield against_reference(
            "spike formats", f"{kind}, {steps} steps", lambda d, s=steps: problem(s, (40,), device=d), spike_dtype=kind
        )
    for dtype in (f32, f64):
        yield against_reference("on the threshold", str(dtype), lambda d, t=dtype: _threshold(t, d))
    for kind in ("transposed", "every second", "expanded over neurons", "expanded over time"):
        yield against_reference("strided input", kind, lambda d, k=kind: _layout(k, d), gradients=True)

    for method, order in itertools.product(SURROGATES, ORDERS if full else ORDERS[:1]):
        for dtype, record in itertools.product((f32, f64), (False, True)) if full else ((f32, True), (f64, False)):
            yield against_reference(
                "gradients", f"{method} {dtype} {order}{', recorded' if record else ''}",
                lambda d, t=dtype, p=record: problem(35, (2, 20), t, d, per_neuron=p),
                gradients=True, method=method, order=order, record_states=record,
            )  # fmt: skip
    for order, dtype, per_neuron in zip(ORDERS, (f32, f64), (False, True), strict=True):
        yield against_reference(
            "refractory period", f"{dtype} {order}, {'own' if per_neuron else 'shared'} parameters",
            lambda d, t=dtype, p=per_neuron: problem(35, (2, 20), t, d, per_neuron=p, refractory=True),
            gradients=True, order=order, record_states=per_neuron,
        )  # fmt: skip
        yield against_reference(
            "current-based synapses", f"{dtype} {order}, {'every other neuron' if per_neuron else 'all neurons'}",
            lambda d, t=dtype, p=per_neuron: problem(35, (2, 20), t, d, per_neuron=p, currents=True),
            gradients=True, order=order, record_states=per_neuron,
        )  # fmt: skip
    for steps in (3, 8, 17, 64, *(() if interpreted else (1000,))):
        yield against_reference(
            "gradients of every length", f"{steps} steps", lambda d, s=steps: problem(s, (33,), device=d), gradients=True
        )
    for steps, block in itertools.product((45, *(() if interpreted else (1000,))), (1, 7, 32)):
        whole = functools.partial(problem, steps, (33,), torch.float32)
        yield Check("chunking", f"{steps} steps by {block}", whole, Run(backend, {"block_steps": block}), Run(backend))
    for steps, neurons in ((300, 3), *(() if interpreted else ((1003, 1), (5000, 40)))):
        run_of_few: Builder = functools.partial(problem, steps, (neurons,), f32)
        cut, whole_run = (Run(backend, {"time_chunks": chunks}) for chunks in (5, 1))
        yield Check("time chunks", f"{[steps, neurons]} in 5 chunks", run_of_few, cut, whole_run, gradients=True)
    twice: dict[str, Builder] = {
        "feed-forward": lambda d: problem(20, (70,), device=d),
        "recurrent": lambda d: recurrent_problem(20, 2, 40, device=d, exact=False),
    }
    for name, build in twice.items():
        yield Check("determinism", name, build, Run(backend), Run(backend), gradients=True)

    paths = ("events", "dense") + (("sliced",) if backend == "triton" and not interpreted else ())
    recurrent = [(33, 3, 1), (1, 1, 63), (33, 1, 63), (14, 3, 129), (4, 1, 500)]
    recurrent += [] if interpreted else [(100, 2, 1024), (20, 1, 2500), *([(20, 1, 4096), (64, 64, 256)] if full else [])]
    for (steps, batch, neurons), path in itertools.product(recurrent, paths):
        all_three = itertools.product(ORDERS, (f32, f64), (False, True))
        few = zip(ORDERS, (f32, f64), (False, True), strict=True)
        for order, dtype, own in all_three if full else few:
            yield against_reference(
                "recurrent forward",
                f"{[steps, batch, neurons]} {dtype} {order} {path}, {'own' if own else 'shared'} parameters",
                lambda d, s=steps, b=batch, n=neurons, t=dtype, p=own: recurrent_problem(s, b, n, t, d, per_neuron=p),
                order=order, path=path, record_states=own,
            )  # fmt: skip
    for spike_dtype, path in itertools.product((f16, torch.bool, "bits"), paths):
        yield against_reference(
            "recurrent spike formats", f"{spike_dtype} {path}", lambda d: recurrent_problem(40, 2, 20, device=d),
            spike_dtype=spike_dtype, path=path,
        )  # fmt: skip
    for path, size in itertools.product(paths, ((40, 2, 60), *(() if interpreted else ((200, 2, 700),)))):
        yield replace(
            against_reference(
                "recurrent on any weights", f"{list(size)} {path}",
                lambda d, s=size: recurrent_problem(s[0], s[1], s[2], device=d, exact=False), path=path,
            ),
            bits=False,
        )  # fmt: skip
    for block in (1, 32, 64):
        ours, theirs = ({"path": "events", "block_steps": steps} for steps in (block, 96))
        any_weights: Builder = lambda d: recurrent_problem(70, 2, 33, device=d, exact=False)  # noqa: E731
        yield Check("recurrent chunking", f"70 steps by {block}", any_weights, Run(backend, ours), Run(backend, theirs))
    for method, path in itertools.product(SURROGATES if full else ("super", "circ"), paths[:2]):
        for order in ORDERS:
            yield against_reference(
                "recurrent gradients", f"{method} float64 {order} {path}",
                lambda d: recurrent_problem(37, 2, 9, f64, d, binary=False, per_neuron=True),
                gradients=True, method=method, order=order, path=path,
            )  # fmt: skip
    for order, path in zip(ORDERS, paths[:2], strict=True):
        yield against_reference(
            "recurrent refractory period", f"float64 {order} {path}",
            lambda d: recurrent_problem(37, 2, 9, f64, d, per_neuron=True, refractory=True),
            gradients=True, order=order, path=path,
        )  # fmt: skip
        yield against_reference(
            "recurrent current-based synapses", f"float64 {order} {path}",
            lambda d: recurrent_problem(37, 2, 9, f64, d, per_neuron=True, currents=True),
            gradients=True, order=order, path=path,
        )  # fmt: skip
    for neurons, path in itertools.product((10, *(() if interpreted else (300,))), paths[:2]):
        yield against_reference(
            "recurrent gradients", f"super float32 {neurons} neurons {path}",
            lambda d, n=neurons: recurrent_problem(34, 2, n, device=d), gradients=True, path=path,
        )  # fmt: skip
    yield from _networks(backend, full, interpreted)
    if full:
        yield from _far(backend, interpreted)


def _networks(backend: str, full: bool, interpreted: bool) -> Iterator[Check]:
    """Cases with sparse synapses and delays. Their sums are exact on any weights, so all bits must be equal."""
    f32, f64 = torch.float32, torch.float64

    def case(group: str, name: str, gradients: bool = False, run: dict[str, Any] | None = None, **options: Any) -> Check:
        options = {"steps": 12 if interpreted else 40, "batch": 2, "neurons": 20 if interpreted else 60} | options

        def build(device: torch.device) -> AnyProblem:
            return network_problem(**options, device=device)

        return Check(group, name, build, Run(backend, run or {}), Run("reference", run or {}), gradients)

    # every kind of delays, of input and of weights; in the quick level, these decide whether there is a refractory period
    every = [*itertools.product(DELAYS, (False, True), (False, True))]
    for number, (delays, dense, exact) in enumerate(every[1::9] if interpreted else every):
        settings: Any = itertools.product((f32, f64), ORDERS, (False, True), (False, True))
        if not full or interpreted:
            settings = [(f32, ORDERS[number % 2], number % 3 == 0, dense != exact)]
        for dtype, order, record, refractory in settings:
            words = (
                f"{dtype} {order}, delays {delays}, {'dense' if dense else 'sparse'} input, {'exact' if exact else 'any'} "
                f"weights{', refractory' if refractory else ''}{', recorded' if record else ''}"
            )
            yield case(
                "sparse forward", words, run={"order": order, "record_states": record}, dtype=dtype,
                delays=delays, dense_input=dense, exact=exact, refractory=refractory,
            )  # fmt: skip
    for delays in () if interpreted else ("none", "mixed"):
        for kind in (torch.bool, torch.uint8, torch.float16):
            yield case("sparse input dtypes", f"{kind}, delays {delays}", delays=delays, x_dtype=kind)
        yield case("sparse input dtypes", f"any numbers, delays {delays}", delays=delays, graded=True)
        for spikes in (torch.bool, "bits"):
            yield case("sparse spike formats", f"{spikes}, delays {delays}", run={"spike_dtype": spikes}, delays=delays)
    for steps, batch, neurons in () if interpreted else ((40, 1, 2500), (9, 1, 1), *([(300, 1, 20000)] if full else [])):
        yield case("sparse sizes", f"{[steps, batch, neurons]}", steps=steps, batch=batch, neurons=neurons, exact=True)
    steps, neurons = (40, 9) if interpreted else (70, 20)
    for block in (32,) if interpreted else (1, 32, 64):
        yield Check(
            "sparse chunking", f"{steps} steps by {block}", lambda d: network_problem(steps, 1, neurons, device=d),
            Run(backend, {"block_steps": block}), Run(backend, {"block_steps": 96}),
        )  # fmt: skip
    sizes = ((12, 1, 9),) if interpreted else ((37, 2, 30), (20, 19, 12))
    for (steps, batch, neurons), delays in itertools.product(sizes, ("mixed",) if interpreted else DELAYS):
        orders = ORDERS if full else ORDERS[batch % 2 : batch % 2 + 1]
        for order, method in itertools.product(orders, SURROGATES if full and not interpreted else ("super",)):
            yield case(
                "sparse gradients", f"{[steps, batch, neurons]} {method} float64 {order}, delays {delays}",
                gradients=True, run={"order": order, "method": method}, steps=steps, batch=batch, neurons=neurons,
                dtype=f64, delays=delays, per_neuron=True, refractory=True, graded=delays == "one",
                dense_input=delays == "none" and batch == 2,
            )  # fmt: skip


def _far(backend: str, interpreted: bool) -> Iterator[Check]:
    """Cases with arrays of more than 2^31 elements. The neurons at both ends are compared with a run of them alone."""
    size, steps, ends = 2**20 + 32, 2049, 32

    def build(device: torch.device) -> Problem:
        small = problem(steps, (2 * ends,), torch.uint8, device)
        x = torch.zeros(steps, size, dtype=torch.uint8, device=device)
        x[:, :ends], x[:, -ends:] = small.x[:, :ends], small.x[:, ends:]
        state = [torch.zeros(size, device=device) for _ in small.state]
        for wide, few in zip(state, map(torch.as_tensor, small.state), strict=True):
            wide[:ends], wide[-ends:] = few[:ends], few[ends:]
        return _Far(x, CobaLIFFeedForwardState(*state), small.parameters, small.alpha, small.dt, small=small, ends=ends)

    for kind in (torch.uint8, "bits"):
        run = {"spike_dtype": kind}
        gib = math.inf if interpreted else steps * size * (2 if kind == torch.uint8 else 1) / 2**30 * 1.4
        yield Check("past 2^31", f"spikes as {kind}", build, Run(backend, run), Run("reference", run), gib=gib)


@dataclass(kw_only=True)
class _Far(Problem):
    """A problem that is too large for the reference. The reference runs only the neurons at both ends."""

    small: Problem
    ends: int

    def run(self, backend: str, **options: Any) -> tuple[Tensor, Any]:
        if backend == "reference":
            return self.small.run(backend, **options)
        spikes, state = super().run(backend, **options)
        both = [torch.cat([x[..., : self.ends], x[..., -self.ends :]], -1) for x in (spikes, *state)]
        return both[0], CobaLIFFeedForwardState(*both[1:])
