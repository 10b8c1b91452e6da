"""Compare a backend with the reference, on generated cases or on the user's input. Of a failure, show the smallest case."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .. import functional
from ..backend import reference
from ..backend.choose import choose_backend, the_device, triton_device_type
from ..neuron.records import CobaLIFDelayState, CobaLIFParameters, Drive, feed_forward_state, numbers_of, recurrent_state
from ..ops import validation
from ..ops.constants import derive_constants
from ..ops.synapses import Synapses
from ..ops.tensors import is_refractory
from ..ops.wiring import connect, is_sparse
from .check_cases import LEVELS, AnyProblem, Check, Run, generate
from .check_shrink import flatten, shrink, snippet
from .problems import VALUES, NetworkProblem, Problem, RecurrentProblem

# Surrogates that use no exponential and no square root. The last bits of those differ between devices.
EXACT_SURROGATES = ("super", "triangle", "heaviside")


@dataclass(frozen=True)
class Mismatch:
    """The first tensor in which two runs differ.

    Attributes:
        tensor: the tensor's name.
        differing: how many elements differ.
        elements: how many elements the tensor has.
        index: the index of the first element that differs.
        ours: this element in the run that is checked.
        theirs: this element in the other run.
        allowed: the difference that rounding explains; 0 if the bits must be equal.
    """

    tensor: str
    differing: int
    elements: int
    index: tuple[int, ...]
    ours: float
    theirs: float
    allowed: float = 0.0

    def __str__(self) -> str:
        bound = f", allowed are {self.allowed:.3g}" if self.allowed else ""
        return (
            f"{self.tensor}{list(self.index)} is {self.ours!r}, expected {self.theirs!r}{bound}; "
            f"{self.differing:,} of {self.elements:,} elements differ"
        )


@dataclass(frozen=True)
class CheckResult:
    """The result of a check.

    Attributes:
        group: the check's group.
        name: the check's name.
        status: ``passed``, ``failed`` or ``skipped``.
        seconds: how long it took.
        detail: why it failed or was skipped.
        snippet: after a failure, a program that shows the smallest failing case that was found.
    """

    group: str
    name: str
    status: Literal["passed", "failed", "skipped"]
    seconds: float
    detail: str = ""
    snippet: str = ""


@dataclass(frozen=True)
class Report:
    """The results of :func:`check`.

    Attributes:
        backend: the backend that was checked.
        device: the device that it ran on.
        results: one result for each case.
    """

    backend: str
    device: str
    results: tuple[CheckResult, ...]

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The results of the checks that failed."""
        return tuple(result for result in self.results if result.status == "failed")

    @property
    def ok(self) -> bool:
        """Whether no check failed and at least one passed."""
        return not self.failures and any(result.status == "passed" for result in self.results)

    def __str__(self) -> str:
        counts = {
            status: sum(result.status == status for result in self.results) for status in ("passed", "failed", "skipped")
        }
        summary = ", ".join(f"{count} {status}" for status, count in counts.items())
        lines = [f"{self.backend} on {self.device} against the reference: {summary}"]
        for failure in self.failures:
            lines += [f"{failure.group}, {failure.name}: {failure.detail}", failure.snippet]
        return "\n".join(lines)


def compare(name: str, ours: Tensor, theirs: Tensor, allowed: Tensor | float = 0.0) -> Mismatch | None:
    """Compare two tensors. They may differ by ``allowed``, else their bits must be equal; any NaN equals any other.

    Returns:
        The mismatch, None if there is none.
    """
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return Mismatch(
            f"{name}: {ours.dtype} {list(ours.shape)} instead of {theirs.dtype} {list(theirs.shape)}",
            max(1, ours.numel()), max(1, theirs.numel()), (), math.nan, math.nan,
        )  # fmt: skip
    wrong = (ours != theirs) & ~((ours != ours) & (theirs != theirs))
    bound = torch.as_tensor(allowed, device=ours.device)
    if bool((bound > 0).any()):
        wrong &= ~((ours.double() - theirs.double()).abs() <= bound)
    differing = int(wrong.sum())
    if not differing:
        return None
    index = tuple(wrong.nonzero()[0].tolist())
    return Mismatch(
        name, differing, wrong.numel(), index, ours[index].item(), theirs[index].item(),
        float(bound.expand(wrong.shape)[index]),
    )  # fmt: skip


def compare_gradients(
    case: AnyProblem, ours: dict[str, Tensor], theirs: dict[str, Tensor], options: dict[str, Any]
) -> Mismatch | None:
    """Compare gradients with autograd's. They may differ by what rounding explains.

    Where the kernels do the same operations as autograd, the bits must be equal. A gradient by a shared parameter or a
    weight is a sum over time and neurons, in another order than autograd's. The rounding errors of its terms add up like a
    random walk. Its unit is a rounding of the largest gradient of the array. If that is too little, the terms may have
    cancelled: then the unit is a rounding of their magnitudes' sum.

    Args:
        case: the problem.
        ours: the gradients that are checked, by name.
        theirs: autograd's.
        options: of the reference's run.

    Returns:
        The first mismatch, None if there is none.
    """
    v = torch.as_tensor(case.state.v)
    rounding = 1e-8 if v.dtype == torch.float64 else max(64.0, math.sqrt(case.x.shape[0] * v.numel())) * 2**-24
    bits = isinstance(case, Problem) and options.get("method", "super") in EXACT_SURROGATES
    magnitudes: dict[str, Tensor] | None = None
    for name, grad in ours.items():
        expected = theirs[name]
        equal = not expected.numel() or (bits and name not in case.shared())
        scale = 0.0 if equal else float(expected.abs().max())
        found = compare(f"gradient by {name}", grad, expected, rounding * scale)
        if found and name in case.shared():
            magnitudes = case.magnitudes(**options) if magnitudes is None else magnitudes
            found = compare(f"gradient by {name}", grad, expected, rounding * float(magnitudes[name].max()))
        if found:
            return found
    return None


def find_mismatch(case: AnyProblem, check: Check) -> Mismatch | None:
    """Run both sides of a check on a problem; returns the first mismatch, None if they agree."""
    if not check.bits:
        return _mismatch_of_a_step(case, check)
    (ours, our_grads), (theirs, their_grads) = (
        case.results(run.backend, check.gradients, **run.options) for run in (check.ours, check.theirs)
    )
    # a part of a network whose delays are all one step has no history at the end, though it began with one
    names = ["spikes", *(f"state.{name}" for name in case.state._fields)]
    for name, (one, other) in zip(names, zip(ours, theirs, strict=True), strict=False):
        if found := compare(name, one, other):
            return found
    if check.ours != check.theirs:
        return compare_gradients(case, our_grads, their_grads, check.theirs.options)
    same = (compare(f"gradient by {name}", grad, their_grads[name]) for name, grad in our_grads.items())
    return next(filter(None, same), None)


def _mismatch_of_a_step(case: AnyProblem, check: Check) -> Mismatch | None:
    """Compare every step by itself: the reference starts each step from our state before it.

    A sum of n terms may be wrong by ``n 2^-24`` of the sum of their magnitudes. A spike may differ if the potential is so
    close to the threshold.
    """
    assert not isinstance(case, Problem)
    options = check.ours.options | {"record_states": True}
    order, method = options.get("order", "decay_first"), options.get("method", "super")
    _, trace = case.run(check.ours.backend, **options)
    steps = [name for name in trace._fields if name != "history"]  # the others have a row for each step
    initial = {name: torch.as_tensor(getattr(case.state, name)) for name in steps}
    before = recurrent_state(*(torch.cat([initial[name][None], getattr(trace, name)[:-1]]) for name in steps))
    z, v, g_e, g_i = map(torch.as_tensor, before[:4])
    dtype = trace.v.dtype
    c = derive_constants(case.record(method), case.dt, dtype, case.x.device)
    x = case.x.to(dtype)
    jump_first = order == "jump_first"
    never = c._replace(v_thresh=torch.full_like(c.v_thresh, math.inf))
    drives, magnitude = _drives_of_steps(case, x, z, trace)
    fired, after, _ = reference.step(before, *drives, c, jump_first, method)
    _, unreset, _ = reference.step(before, *drives, never, jump_first, method)
    ulp = torch.finfo(dtype).eps / 2
    terms = x.shape[-1] + trace.v.shape[-1] + 4
    bounds = {
        name: terms * ulp * magnitude + 4 * ulp * (magnitude + old.abs()) for name, old in (("g_e", g_e), ("g_i", g_i))
    }
    reach = c.k.abs() * ((c.e_rev_E - v).abs() * bounds["g_e"] + (c.e_rev_I - v).abs() * bounds["g_i"])
    reach = reach + 16 * ulp * (unreset.v.abs() + v.abs() + c.v_thresh.abs())
    for name, bound in bounds.items():
        if found := compare(f"state.{name}", getattr(trace, name), getattr(after, name), bound):
            return found
    certain = (unreset.v - c.v_thresh).abs() > reach
    ours = torch.where(certain, trace.z, fired)
    if found := compare("spikes", ours, fired):
        return found
    same = trace.z == fired
    return compare("state.v", torch.where(same, trace.v, after.v), after.v, reach)


def _drives_of_steps(
    case: RecurrentProblem | NetworkProblem, x: Tensor, z: Tensor, trace: Any
) -> tuple[tuple[Drive, Drive], Tensor]:
    """The two drives of every step, ``[T, B, N]``, from the spikes before it; and the sum of their terms' magnitudes."""
    if isinstance(case, RecurrentProblem):
        w = reference.SplitWeights.of(case.input_weights, case.recurrent_weights)
        drives = Drive(x @ w.input_e, x @ w.input_i), Drive(z @ w.recurrent_e, z @ w.recurrent_i)
        return drives, x.abs() @ case.input_weights.abs().t() + z.abs() @ case.recurrent_weights.abs().t()
    dense = case.input_weights
    assert isinstance(dense, Tensor)  # sums of sparse inputs are exact
    own = dense.mT
    longest = case.recurrent_weights.check_delays(case.dt)[1]
    sent = torch.cat([_history(case, longest), trace.z])
    synapses = functional.reference_synapses(case.recurrent_weights, case.recurrent_weights.weights, case.dt)
    each = [reference.recurrent_drive(synapses, sent[t : t + longest]) for t in range(len(x))]
    recurrent = Drive(*(torch.stack(signed) for signed in zip(*each, strict=True)))
    drives = Drive(x @ torch.relu(own), x @ torch.relu(-own)), recurrent
    return drives, x.abs() @ own.abs() + recurrent.e + recurrent.i


def _history(case: NetworkProblem, longest: int) -> Tensor:
    """The spikes of the last steps before the first one, ``[longest, B, N]``."""
    if isinstance(case.state, CobaLIFDelayState):
        return torch.as_tensor(case.state.history)[-longest:]
    return torch.as_tensor(case.state.z)[None]


def _free_gib(device: torch.device) -> float:
    if device.type == "cpu":
        try:
            with open("/proc/meminfo", encoding="ascii") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20
        except (OSError, StopIteration):
            return 0.0
    return float(torch.get_device_module(device).mem_get_info(device)[0]) / 2**30


def run_check(check: Check, device: torch.device) -> CheckResult:
    """Run one check. If it fails, make the case small and write a program that shows the failure."""
    started = time.perf_counter()

    def result(status: Literal["passed", "failed", "skipped"], detail: str = "", snippet: str = "") -> CheckResult:
        return CheckResult(check.group, check.name, status, time.perf_counter() - started, detail, snippet)

    if check.gib:
        free = _free_gib(device)
        if check.gib > free:
            needs = "no interpreter" if check.gib == math.inf else f"{check.gib:.1f} GiB, {free:.1f} are free"
            return result("skipped", f"needs {needs}")

    def failure(of: AnyProblem) -> tuple[str, type[Exception] | None]:
        """What is wrong, and which error was raised."""
        try:
            found = find_mismatch(of, check)
        except Exception as error:  # whatever a compiler or a driver raises is the result
            return _first_lines(error), type(error)
        return "" if found is None else str(found), None

    try:
        case = check.build(device)
        detail, raised = failure(case)
        if not detail:
            return result("passed")
        if check.gib:
            return result("failed", detail, snippet(case, check))

        def fails_alike(of: AnyProblem) -> bool:
            """A part that only raises an error shows no mismatch, and the other way round."""
            found, error = failure(of)
            return bool(found) and error is raised

        small = shrink(case, fails_alike)
        return result("failed", failure(small)[0] or detail, snippet(small, check))
    except Exception as error:  # after a fault on a device, nothing works there any more
        return result("failed", _first_lines(error))


def _first_lines(error: Exception) -> str:
    """An error in a few lines: a compiler may write hundreds."""
    lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return "\n".join([*lines[:3], *(["..."] if len(lines) > 4 else []), *lines[3:][-1:]])


def default_device() -> torch.device:
    """The GPU, if Triton can drive one, else the CPU."""
    try:
        return torch.device(triton_device_type())
    except RuntimeError:
        return torch.device("cpu")


def select(backend: str, device: torch.device, level: str, only: str | None) -> list[Check]:
    """The checks of a level. With ``only``, those whose group and name contain it.

    Raises:
        ValueError: if the level is unknown or there is no such check.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(map(repr, LEVELS))}, got {level!r}")
    checks = list(generate(backend, device, level))
    chosen = [check for check in checks if only is None or only in f"{check.group}, {check.name}"]
    if not chosen:
        groups = ", ".join(dict.fromkeys(check.group for check in checks))
        raise ValueError(f"no check contains {only!r} in its name; the groups are {groups}")
    return chosen


def resolve(backend: str, device: torch.device | str | None) -> tuple[str, torch.device]:
    """The backend and the device for what a user asks for.

    Raises:
        ValueError: if the backend is unknown, or is the reference.
        RuntimeError: if there is no such device, or the backend cannot serve it.
    """
    device = default_device() if device is None else the_device(device)
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        raise RuntimeError(
            f"device {str(device)!r} is not here: PyTorch {torch.__version__} sees none; run on a machine with one, or "
            "pass device='cpu'"
        )
    used = choose_backend(backend, device)
    if used == "reference":
        raise ValueError(
            f"nothing to check on {str(device)!r}: only the reference serves it, and backends are compared with that; "
            "pass another device, or a backend that serves it"
        )
    return used, device


def _grid(x: Tensor) -> int:
    """The exponent of the largest power of two of which all elements are multiples."""
    mantissa, exponent = torch.frexp(x.double()[x != 0])
    if not mantissa.numel():
        return 1000
    whole = (mantissa * 2.0**53).long()
    return int((exponent - 53 + torch.log2((whole & -whole).double()).int()).min())


def sums_are_exact(case: RecurrentProblem | NetworkProblem) -> bool:
    """Whether the sums over synapses are exact in every order: all terms are multiples of one number, and small enough.

    Sums of sparse synapses always are.
    """
    digits = 53 if torch.as_tensor(case.state.v).dtype == torch.float64 else 24
    sources = ((case.input_weights, case.x), (case.recurrent_weights, torch.as_tensor(case.state.z)))
    for weights, x in sources:
        if isinstance(weights, Synapses):
            continue
        reach = (x.double().abs() @ weights.double().abs().t()).max() if x.numel() and weights.numel() else torch.zeros(())
        if x is not case.x:
            reach = torch.maximum(reach, weights.double().abs().sum(1).max()) if weights.numel() else reach
        if not reach.isfinite() or float(reach) >= 2.0 ** (digits + _grid(weights) + min(0, _grid(x))):
            return False
    return True


def _user_problem(x: Tensor, state: Any, weights: tuple[Any, Any] | None, p: Any, dt: float, delay: Any) -> AnyProblem:
    """Make a problem of the user's arguments, after the checks that the public functions do."""
    validation.check_parameters(p)
    if isinstance(p.alpha, Tensor) and p.alpha.dim():
        raise ValueError(f"alpha must be one number to be checked, got a tensor of {list(p.alpha.shape)}; pass one number")
    needed = {*VALUES, "conductance_based", *(["refractory"] if is_refractory(p, state) else [])}
    numbers = {
        name: torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
        for name, value in numbers_of(p).items()
        if name in needed
    }
    parameters = {name: value.detach().to(x.device) for name, value in numbers.items()}
    alpha = float(p.alpha)
    if weights is None:
        validation.check_input(x, "[T, ...]", 1)
        tensors = functional.initial_feed_forward_state(x, state, p, dt, x.shape[1:]).detach()
        neurons = tensors.shape[1:]
        given = x.detach().reshape(len(x), *(1,) * (len(neurons) - x.dim() + 1), *x.shape[1:]).expand(len(x), *neurons)
        initial = feed_forward_state(*tensors.clone())
        return flatten(Problem(given, initial, parameters, alpha, dt))
    validation.check_input(x, "[T, *batch, I]", 2)
    if is_sparse(*weights, delay):
        wiring = connect(x, *weights, delay, dt)
        history, tensors = (t.detach() for t in functional.initial_sparse_state(x, state, wiring, p, dt, x.shape[1:]))
        past = (history.clone(),) if wiring.longest > 1 else ()
        before = recurrent_state(history[-1].clone(), *tensors.clone(), *past)
        inputs, synapses = wiring.inputs, wiring.recurrent.to(tensors.dtype)
        own = inputs.to(tensors.dtype)
        own = own.with_weights(own.weights.detach()) if isinstance(own, Synapses) else own.detach()
        synapses = synapses.with_weights(synapses.weights.detach())
        return flatten(NetworkProblem(x.detach(), before, own, synapses, parameters, alpha, dt))
    tensors = functional.initial_recurrent_state(x, state, *weights, p, dt, x.shape[1:]).detach()
    before = recurrent_state(*tensors.clone())
    w_in, w_rec = (w.to(tensors.dtype) for w in weights)
    return flatten(RecurrentProblem(x.detach(), before, w_in.detach(), w_rec.detach(), parameters, alpha, dt))


def _user_checks(case: AnyProblem, backend: str, options: dict[str, Any]) -> list[Check]:
    theirs = {name: value for name, value in options.items() if name not in ("path", "block_steps")}
    exact = isinstance(case, Problem) or sums_are_exact(case)
    ours, theirs_run = Run(backend, options), Run("reference", theirs)
    forward = Check("your input", "forward", lambda _: case, ours, theirs_run, bits=exact)
    repeat = Check("your input", "two runs", lambda _: case, ours, ours, gradients=True)
    return [forward, repeat, *([replace(forward, name="gradients", gradients=True)] if exact else [])]


def check(
    input_tensor: Tensor | None = None,
    state: Any = None,
    input_weights: Tensor | Synapses | None = None,
    recurrent_weights: Tensor | Synapses | None = None,
    p: Any = CobaLIFParameters(),  # noqa: B008 - an immutable record
    dt: float = 0.001,
    *,
    backend: str = "auto",
    device: torch.device | str | None = None,
    level: str = "quick",
    only: str | None = None,
    show: Callable[[CheckResult, int], None] = lambda result, total: None,
    **options: Any,
) -> Report:
    """Compare a backend with the reference, on generated cases or on your own input.

    A feed-forward run must have the same bits as the reference, and so must a recurrent run whose sums of weights are exact,
    as those of sparse synapses always are. With other weights every step is compared by itself, from the backend's state
    before it, within the rounding of its sums. Two runs of the backend must have the same bits. Gradients must have the same
    bits as autograd's where the operations are the same; elsewhere they must agree within the rounding of their sums.

    Args:
        input_tensor: your input, as :func:`coba_triton.coba_lif_feed_forward_integral` takes it, or with weights as
            :func:`coba_triton.coba_lif_integral` takes it; None for the generated cases.
        state: the initial state for your input.
        input_weights: weights for your input, ``[N, I]`` in uS, or sparse synapses.
        recurrent_weights: recurrent weights for your input, ``[N, N]`` in uS, or sparse synapses.
        p: parameters for your input; ``alpha`` must be one number.
        dt: time step for your input, in ms.
        backend: the backend to check: ``auto``, ``triton`` or ``cpu``.
        device: the device for the generated cases; None for the GPU, if Triton can drive one, else the CPU. Your input is
            checked on its own device.
        level: ``quick`` or ``full``, for the generated cases.
        only: run only those generated cases whose names contain this text.
        show: called after every case with its result and the number of all cases.
        **options: keywords of the function for your input, such as ``order``, ``path`` or ``delay``.

    Returns:
        A report. ``report.ok`` says whether everything agrees. ``print(report)`` shows what does not, with programs for the
        smallest failing cases that were found.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a value is unknown or shapes do not fit, or there is nothing to check.
        RuntimeError: if the backend cannot serve the device.

    Example:
        >>> check(torch.randn(20, 3), dt=0.1, backend="cpu").ok
        True
    """
    if input_tensor is None:
        if options:
            raise TypeError(f"{', '.join(options)}: options for your own input, but there is none; pass input_tensor")
        backend, device = resolve(backend, device)
        checks = select(backend, device, level, only)
    else:
        if (input_weights is None) != (recurrent_weights is None):
            raise ValueError("input_weights and recurrent_weights must be given together; pass both, or none")
        weights = None if input_weights is None or recurrent_weights is None else (input_weights, recurrent_weights)
        case = _user_problem(input_tensor, state, weights, p, dt, options.pop("delay", None))
        backend, device = resolve(backend, input_tensor.device)
        checks = _user_checks(case, backend, {"method": p.method} | options)
    results = []
    for each in checks:
        results.append(run_check(each, device))
        show(results[-1], len(checks))
    return Report(backend, str(device), tuple(results))
