"""The operators as PyTorch sees them: schema, shapes without data, autograd, and what they refuse."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from coba_triton import CobaLIFFeedForwardState, CobaLIFParameters, coba_lif_feed_forward_integral
from coba_triton.ops.call import Asked, Call
from coba_triton.ops.spikes import word_count
from coba_triton.tools.problems import problem, recurrent_problem
from helpers.bits import assert_same_bits


@pytest.fixture
def backend() -> str:
    """Of the tests that name no other."""
    return "triton"


@pytest.fixture
def device(backend: str, device: torch.device) -> torch.device:
    """Where the backend's tensors are."""
    return torch.device("cpu") if backend == "cpu" else device


def arguments(device, *, spike_dtype=torch.float32, record=False, every=8, steps=19, grad=True, save=True):
    case = problem(steps, (5,), device=device)
    constants = torch.tensor(CONSTANTS, device=device).unsqueeze(1)
    x, state = case.x.requires_grad_(grad), torch.stack(tuple(case.state)).requires_grad_(grad)
    call = Call("triton", False, "super", spike_dtype, record, checkpoint_every=every, save=save)
    return x, state, constants.requires_grad_(grad), *call


ops = torch.ops.coba_triton
CONSTANTS = [-0.2, -0.125, 0.5, 0.25, -1.0, 0.6, -0.2, -0.7, -0.1, 5.0, 0.0, 1.0]
backends = pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])


def opcheck(op: Any, args: tuple[Any, ...], spike_dtype: torch.dtype | None = torch.float32) -> None:
    """PyTorch's own checks; its last one adds up all outputs, which it can't start with integers."""
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    differentiable = any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
    if differentiable and spike_dtype != torch.float32:
        tests.pop()
    torch.library.opcheck(op.default, args, test_utils=tests)


def recurrent_arguments(device, backend, *, spike_dtype=torch.float32, record=False, grad=True, save=True):
    case = recurrent_problem(37 if backend == "cpu" else 4, 2, 5, device=device)
    tensors = case.x, case.state.z, torch.stack(case.state[1:]), case.input_weights, case.recurrent_weights
    constants = torch.tensor(CONSTANTS, device=device).unsqueeze(1)
    tensors = tuple(tensor.requires_grad_(grad) for tensor in (*tensors, constants))
    return *tensors, *Call(backend, False, "super", spike_dtype, record, save=save)


@pytest.mark.parametrize(
    ("backend", "spike_dtype", "record"),
    [
        *(("cpu", spike_dtype, record) for spike_dtype in (torch.float32, torch.uint8, None) for record in (False, True)),
        pytest.param("triton", torch.float32, True, marks=pytest.mark.slow),
    ],
)
def test_forward_passes_opcheck(spike_dtype, record, backend, device) -> None:
    args = list(arguments(device, spike_dtype=spike_dtype, record=record))
    args[3] = backend  # the first of the call's fields
    opcheck(ops.feed_forward, tuple(args), spike_dtype)
    args = recurrent_arguments(device, backend, spike_dtype=spike_dtype, record=record)
    opcheck(ops.recurrent, args, spike_dtype)


@backends
def test_out_passes_opcheck(backend, device) -> None:
    x, state, constants, *_ = arguments(device, grad=False)
    for spikes in (torch.empty_like(x), torch.empty(1, x.shape[1], dtype=torch.int32, device=device)):
        opcheck(ops.feed_forward_out, (x, state, constants, spikes, *Call(backend, record_states=True)))
    tensors = recurrent_arguments(device, backend, grad=False)[:6]
    steps = tensors[0].shape[0]
    for spikes in (
        torch.empty(steps, 2, 5, device=device),
        torch.empty(word_count(steps), 2, 5, dtype=torch.int32, device=device),
    ):
        opcheck(ops.recurrent_out, (*tensors, spikes, *Call(backend)))


@pytest.mark.parametrize(
    ("backend", "given"),
    [
        *(("cpu", given) for given in ("all", "spikes", "final", "states")),
        pytest.param("triton", "all", marks=pytest.mark.slow),
    ],
)
def test_backward_passes_opcheck(given, backend, device) -> None:
    """With gradients of all outputs, and of each alone."""
    x, state, constants, _, *rest = arguments(device, grad=False, record=True)
    spikes, final, states, words, checkpoints = ops.feed_forward(x, state, constants, backend, *rest)
    grads = {"spikes": spikes, "final": final, "states": states}
    given_grads = [grad if given in ("all", name) else None for name, grad in grads.items()]
    options = *Call(backend, checkpoint_every=8), *Asked(True, False, False, True, 3)
    opcheck(ops.feed_forward_backward, (x, constants, words, checkpoints, *given_grads, *options))
    args = recurrent_arguments(device, backend, grad=False, record=True)
    x, z, _, *weights_and_constants = args[:6]
    spikes, last, final, states, words, checkpoints = ops.recurrent(*args)
    grads = {"spikes": spikes, "final": final, "states": states, "z": last}
    given_grads = [grad if given in ("all", name) else None for name, grad in grads.items()]
    tensors = x, z, *weights_and_constants, words, checkpoints, *given_grads
    for needed in ((True,) * 4, (False,) * 4):
        opcheck(ops.recurrent_backward, (*tensors, *Call(backend), *Asked(*needed, 3, 2)))


@pytest.mark.parametrize("every", [1, 2, 4, 16, 32])
def test_gradients_do_not_depend_on_checkpoints(every, device) -> None:
    """Also where there are fewer steps between two of them than the backward would hold in registers."""
    grads = []
    for steps in (every, 8):
        args = arguments(device, every=steps, steps=12)
        _, final, *_ = ops.feed_forward(*args)
        grads.append(torch.autograd.grad(final.sum(), args[:3]))
    for ours, theirs in zip(*grads, strict=True):
        assert ours.abs().max() > 0
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("steps", [0, 5, 16, 37])
@pytest.mark.parametrize(("every", "save"), [(8, None), (8, True), (16, True)])
def test_shapes_without_data(steps, every, save, device) -> None:
    args = arguments(device, steps=steps, every=every, save=save, grad=False)
    real = torch.ops.coba_triton.feed_forward(*args)
    meta = torch.ops.coba_triton.feed_forward(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    assert [(m.shape, m.dtype) for m in meta] == [(r.shape, r.dtype) for r in real]


def test_double_backward_names_the_reference(device) -> None:
    case = problem(9, (3,), device=device)
    case.x.requires_grad_()
    spikes, state = case.run("triton")
    (grad,) = torch.autograd.grad(spikes.sum() + state.v.sum(), case.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiates once.*pass backend='reference'"):
        grad.square().sum().backward()


def test_forward_mode_names_the_reference(device) -> None:
    case = problem(9, (3,), device=device)

    def run(x: torch.Tensor) -> torch.Tensor:
        case.x = x
        return case.run("triton")[1].v

    with pytest.raises(NotImplementedError, match="no forward-mode.*pass backend='reference'"):
        torch.func.jvp(run, (case.x,), (torch.ones_like(case.x),))


def test_operator_that_saved_nothing_refuses_a_gradient(device) -> None:
    spikes, *_ = torch.ops.coba_triton.feed_forward(*arguments(device, save=False))
    with pytest.raises(RuntimeError, match="saved nothing for the backward pass"):
        spikes.sum().backward()


def test_only_asked_for_gradients_are_computed(device) -> None:
    """A gradient by the state alone leaves no gradient of the input behind."""
    case = problem(9, (3,), device=device)
    case.state.v.requires_grad_()
    spikes, _ = case.run("triton")
    spikes.sum().backward()
    assert case.x.grad is None and case.state.v.grad is not None


def test_gradients_accumulate_over_calls(device) -> None:
    """One state used twice: ordinary autograd semantics."""
    case = problem(9, (3,), device=device)
    v = case.state.v.requires_grad_()
    first, _ = case.run("triton")
    (once,) = torch.autograd.grad(first.sum(), v)
    twice = case.run("triton")[0].sum() + case.run("triton")[0].sum()
    (both,) = torch.autograd.grad(twice, v)
    torch.testing.assert_close(both, 2 * once)


def test_training_in_place_on_the_input_is_noticed(device) -> None:
    case = problem(9, (3,), device=device)
    x = case.x.clone()
    p = CobaLIFParameters(v_thresh=torch.tensor(-0.1, requires_grad=True, device=device))
    spikes, _ = coba_lif_feed_forward_integral(x, CobaLIFFeedForwardState(-0.2, 0.0, 0.0), p, 0.01, backend="triton")
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spikes.sum().backward()


NAMES = (
    "feed_forward",
    "feed_forward_out",
    "feed_forward_out packed",
    "feed_forward_backward",
    "recurrent",
    "recurrent_out",
    "recurrent_out packed",
    "recurrent_backward",
)


def all_arguments(backend: str = "cpu", device: torch.device | str = "cpu") -> dict[str, list[Any]]:
    """Arguments of every operator that fit, all gradients given."""
    x, state, constants, *_ = arguments(device, grad=False)
    call = Call(backend, False, "super", torch.float32, True, checkpoint_every=8, save=True)
    spikes, final, states, words, checkpoints = ops.feed_forward(x, state, constants, *call)
    backward = words, checkpoints, spikes, final, states
    r = recurrent_arguments(device, backend, grad=False, record=True)[:6]
    r_spikes, z, r_final, r_states, r_words, r_checkpoints = ops.recurrent(*r, *call)
    r_backward = r_words, r_checkpoints, r_spikes, r_final, r_states, z
    r_tensors = r[0], r[1], *r[3:]
    return {
        "feed_forward": [x, state, constants, *call],
        "feed_forward_out": [x, state, constants, spikes, *call],
        "feed_forward_out packed": [x, state, constants, words[:1], *call],
        "feed_forward_backward": [x, constants, *backward, *call, *Asked(True, False, False, True, 3)],
        "recurrent": [*r, *call],
        "recurrent_out": [*r, r_spikes, *call],
        "recurrent_out packed": [*r, r_words[: word_count(r[0].shape[0])], *call],
        "recurrent_backward": [*r_tensors, *r_backward, *call, *Asked(True, True, True, True, 3)],
    }


def misfits(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensor in ways that no kernel may be given."""
    changed = {f"axis {axis} cut": tensor.narrow(axis, 0, size - 1) for axis, size in enumerate(tensor.shape) if size > 1}
    changed |= {f"axis {axis} empty": tensor.narrow(axis, 0, 0) for axis in range(tensor.dim())}
    changed |= {f"axis {axis} missing": tensor.select(axis, 0) for axis in range(tensor.dim())}
    changed |= {"more axes": tensor[None], "flat": tensor.flatten(), "number": tensor.new_zeros(())}
    changed |= {f"{dtype}": tensor.to(dtype) for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn)}
    if tensor.dtype not in (torch.float16, torch.bool, torch.uint8):
        changed |= {"sparse": tensor.to_sparse(), "elsewhere": tensor.to("meta")}
    return changed


def still_fits(name: str, position: int, what: str) -> bool:
    """What is another call that makes sense: fewer steps where nothing is of their number, and states that are none's."""
    fewer_steps = position == 0 and what in ("axis 0 cut", "axis 0 empty")
    if fewer_steps and (name in ("feed_forward", "recurrent") or (name.endswith("packed") and what == "axis 0 cut")):
        return True
    return (name, position, what) in (
        ("feed_forward_backward", 2, "axis 0 cut"),  # of two words one is needed
        ("feed_forward_backward", 6, "axis 1 empty"),
        ("recurrent_backward", 9, "axis 1 empty"),
    )


@pytest.mark.parametrize("symbolic", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused_at_the_entry(name, symbolic) -> None:
    """Every tensor in turn: kernels would write past the end of what is too small, and read past what is too short."""
    op = getattr(ops, name.split()[0])
    args = all_arguments()[name]
    mode = FakeTensorMode()

    def call(given: list[Any]) -> None:
        if symbolic:
            given = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in given]
        with mode if symbolic else nullcontext():
            op(*given)

    call(args)
    for position, tensor in enumerate(args):
        for what, changed in misfits(tensor).items() if isinstance(tensor, torch.Tensor) else ():
            given = [*args[:position], changed, *args[position + 1 :]]
            if still_fits(name, position, what):
                call(given)
                continue
            with pytest.raises(ValueError, match=" must be .* got .*; ") as caught:
                call(given)
            assert "call the functions of coba_triton" in str(caught.value), (position, what)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("feed_forward", {"backend": "reference"}, "backend must be 'triton' or 'cpu', got 'reference'"),
        ("feed_forward", {"method": "none"}, "method must be one of"),
        ("feed_forward", {"spike_dtype": torch.int64}, "spike_dtype must be None for packed spikes or one of"),
        ("feed_forward", {"checkpoint_every": 0}, "checkpoint_every must be a power of two up to 64, got 0"),
        ("feed_forward", {"checkpoint_every": -8}, "checkpoint_every must be"),
        ("feed_forward_backward", {"checkpoint_every": 10**9}, "checkpoint_every must be"),
        ("feed_forward_backward", {"backend": "gpu"}, "backend must be"),
        ("feed_forward_backward", {"fields": 5}, "fields must be 3 or 4, got 5"),
        ("recurrent", {"block_steps": 0}, "block_steps must be a positive int"),
        ("recurrent", {"path": "fast"}, "path must be one of"),
        ("recurrent_out", {"block_steps": -1}, "block_steps must be a positive int"),
        ("recurrent_out", {"path": ""}, "path must be one of"),
        ("recurrent_backward", {"samples": 0}, "samples must divide the rows of the batch, 2, got 0"),
        ("recurrent_backward", {"samples": 3}, "samples must divide the rows of the batch, 2, got 3"),
        ("recurrent_backward", {"block_steps": -32}, "block_steps must be a positive int"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, change, message) -> None:
    op = getattr(ops, name)
    names = [argument.name for argument in op.default._schema.arguments]
    given = dict(zip(names, all_arguments()[name], strict=True))
    with pytest.raises(ValueError, match=message):
        op(**given | change)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_missing_is_refused(name) -> None:
    """PyTorch lets None pass for a tensor; a gradient may be."""
    args = all_arguments()[name]
    tensors = [position for position, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    gradients = {"feed_forward_backward": tensors[4:], "recurrent_backward": tensors[7:]}.get(name, [])
    for position in tensors:
        given = [*args[:position], None, *args[position + 1 :]]
        if position in gradients:
            getattr(ops, name)(*given)
            continue
        with pytest.raises(TypeError, match="must be a tensor, got None"):
            getattr(ops, name.split()[0])(*given)


@pytest.mark.parametrize("name", ["feed_forward_backward", "recurrent_backward"])
def test_input_of_bytes_has_no_gradient(name) -> None:
    """A kernel would write two bytes for each of them."""
    x, *others = all_arguments()[name]
    with pytest.raises(ValueError, match="x, as its gradient is asked for, must be dense torch.float32 or"):
        getattr(ops, name)(x.bool(), *others)


@backends
@pytest.mark.parametrize("name", NAMES)
def test_strided_tensors_give_the_same(name, backend, device) -> None:
    """What is read may be laid out in any way; what is written must be contiguous."""
    op = getattr(ops, name.split()[0])
    args = all_arguments(backend, device)[name]
    expected = op(*(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args))
    written = {"feed_forward_out": 3, "recurrent_out": 6}.get(name.split()[0])

    def strided(tensor: Any) -> Any:
        """The last axis first in memory, every number twice."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        sevens = torch.full((*tensor.shape[1:], tensor.shape[0], 2), 7, device=tensor.device).to(tensor.dtype)
        spread = sevens.movedim(-2, 0)[..., 0]
        return spread.copy_(tensor)

    given = list(map(strided, args))
    assert not any(arg.is_contiguous() for arg in given if isinstance(arg, torch.Tensor) and arg.numel() > 1)
    if written is not None:
        with pytest.raises(ValueError, match="spikes must be contiguous .* got strided"):
            op(*given)
        given[written] = torch.full_like(args[written], 7)
    assert_same_bits(op(*given), expected)
    if written is not None:
        assert torch.equal(given[written], args[written])


def test_an_exported_program_from_elsewhere_is_refused_what_does_not_fit() -> None:
    """Sizes that an export cannot compare are compared when its program runs."""
    x, state, constants, spikes, *_ = all_arguments()["feed_forward_out"]

    class Program(torch.nn.Module):
        def forward(self, x: torch.Tensor, spikes: torch.Tensor) -> Any:
            return ops.feed_forward_out(x, state, constants, spikes, *Call("cpu"))

    any_steps = {0: torch.export.Dim.AUTO}
    program = torch.export.export(Program(), (x, spikes), dynamic_shapes={"x": any_steps, "spikes": any_steps}).module()
    longer = x.repeat(2, 1)
    program(longer, torch.empty_like(longer))
    with pytest.raises(ValueError, match="spikes must be contiguous .*38, 5.* got contiguous torch.float32 .19, 5."):
        program(longer, spikes)
