"""The neuron's equations and their adjoint stand once: three compilers take them, and the adjoint is autograd's."""

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from coba_triton.backend import reference
from coba_triton.neuron import adjoint, operations, records, step, surrogate
from coba_triton.neuron.records import CobaLIFParameters, Constants, Drive, Kept, State, Sums

NEURON = (operations, step, adjoint, surrogate)


def functions(module: ModuleType) -> dict[str, Any]:
    """What a module defines itself."""
    found = inspect.getmembers(module, inspect.isfunction)
    return {name: function for name, function in found if function.__module__ == module.__name__ and name != "bind"}


EQUATIONS = {name: function for module in NEURON[1:] for name, function in functions(module).items()}


@pytest.mark.parametrize("name", functions(step) | functions(surrogate))
def test_the_reference_runs_the_equations(name: str) -> None:
    assert getattr(reference, name).__code__ is EQUATIONS[name].__code__


@pytest.mark.parametrize("name", EQUATIONS)
def test_triton_compiles_the_equations(name: str) -> None:
    pytest.importorskip("triton", reason="Triton compiles the kernels, and it is not installed")
    from coba_triton.kernels import neuron

    assert getattr(neuron, name).fn.__code__ is EQUATIONS[name].__code__


TORCH_NAMES = {"absolute": "abs", "divide": "div", "square_root": "sqrt"}


def test_every_operation_has_its_own_in_each_module() -> None:
    """A function that finds Python's operation instead of the compiler's would compute something else, or nothing."""
    triton = pytest.importorskip("triton", reason="Triton compiles the kernels, and it is not installed")
    from coba_triton.kernels import neuron

    for name, python in functions(operations).items():
        assert getattr(reference, name) is getattr(
            torch, {"absolute": "abs", "divide": "div", "square_root": "sqrt"}.get(name, name)
        )
        own = getattr(neuron, name)
        assert isinstance(own, triton.runtime.JITFunction | triton.runtime.interpreter.InterpretedFunction)
        assert own.fn is not python


def test_no_equation_stands_elsewhere() -> None:
    """The packages of the neuron import no compiler."""
    for module in (*NEURON, records):
        assert not {"torch", "triton", "numba", "numpy"} & set(vars(module))


def test_constants_are_the_parameters_three_products_and_a_count() -> None:
    assert set(Constants._fields) & set(CobaLIFParameters._fields) == set(Constants._fields) - {
        "decay_e",
        "decay_i",
        "k",
        "n_ref",
        "coupling",
    }
    assert Sums._fields == Constants._fields[: len(Sums._fields)]


CONSTANTS = Constants(-0.02, -0.05, 0.5, 0.25, -100.0, 60.0, -20.0, -70.0, -10.0, 100.0, 0.0, 1.0)


@pytest.mark.parametrize("coupling", [1.0, 0.0, 0.3])
@pytest.mark.parametrize("jump_first", [False, True])
@pytest.mark.parametrize("method", surrogate.SURROGATES)
def test_the_adjoint_is_autograd_s(method: str, jump_first: bool, coupling: float) -> None:
    """In float64, by everything that a step reads, of neurons below, at, just above and far above the threshold."""
    torch.manual_seed(5)
    count = 64

    def numbers(scale: float) -> Tensor:
        return (scale * torch.rand(count, dtype=torch.float64)).requires_grad_()

    v = (-10.0 + torch.linspace(-2.0, 2.0, count, dtype=torch.float64)).requires_grad_()
    s, x = State(v, numbers(0.1), numbers(0.2)), numbers(1.0)
    x = (x - 0.5).detach().requires_grad_()
    c = Constants(*(torch.full((count,), value, dtype=torch.float64, requires_grad=True) for value in CONSTANTS))
    alpha, coupling_of_each = (torch.full((count,), value, dtype=torch.float64) for value in (2.0, coupling))
    c = c._replace(alpha=alpha, coupling=coupling_of_each)
    drive = reference.split_input(x)
    z, after, _ = reference.step(s, drive, None, c, jump_first, method)
    grad_z, lam = torch.randn(count, dtype=torch.float64), State(*torch.randn(3, count, dtype=torch.float64).unbind())
    total = (z * grad_z).sum() + sum((a * b).sum() for a, b in zip(after, lam, strict=True))
    wanted = torch.autograd.grad(total, [*s, x, *c[: len(Sums._fields)]], allow_unused=True, materialize_grads=True)

    operate = vars(reference)
    names = operate | {"Adjoint": records.Adjoint, "Sums": Sums}
    vjp, vjp_input, vjp_constants = (
        operations.bind(function, names) for function in (adjoint.vjp, adjoint.vjp_input, adjoint.vjp_constants)
    )
    with torch.no_grad():
        u = reference.integrate(s, drive, None, c, jump_first)
        kept = Kept(s.v, u.v, u.g_e, u.g_i)
        a = vjp(z, kept, None, grad_z, lam, None, c, jump_first, method)
        decayed = reference.decaying(s, drive, None, jump_first)
        zero = torch.zeros(count, dtype=torch.float64)
        sums = vjp_constants(Sums(*(zero,) * len(Sums._fields)), z, kept, None, *decayed, lam, a, c)
        found = [*a.lam, vjp_input(x, a.drive), *sums]
        assert 0 < z.sum() < count
        torch.testing.assert_close(found, list(wanted), rtol=1e-12, atol=1e-12)
        recorded = State(*torch.randn(3, count, dtype=torch.float64).unbind())
        more = vjp(z, kept, None, grad_z, lam, recorded, c, jump_first, method)
        expected = [own + other for own, other in zip(a.lam, recorded, strict=True)]
        torch.testing.assert_close(list(more.lam), expected, rtol=1e-12, atol=1e-12)


def test_the_equations_run_on_python_numbers() -> None:
    """One neuron by hand: at rest, a drive of 1 uS raises g_e; a potential above the threshold is reset."""
    u = step.integrate(State(-20.0, 0.0, 0.0), Drive(1.0, 0.0), None, CONSTANTS, False)
    assert u == State(-20.0 + 0.5 * (1.0 * (60.0 - -20.0)), 1.0, 0.0)
    assert step.fire(step.excess(u, CONSTANTS), None)
    assert step.reset(u, 1.0, None, CONSTANTS) == State(-70.0, 1.0, 0.0)
