"""The kernels' arithmetic and the reference's are the same lines."""

import ast
from pathlib import Path

import pytest

import coba_triton
from coba_triton.neuron.records import CobaLIFParameters, Constants

PACKAGE = Path(coba_triton.__file__).parent


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def lines(function: ast.FunctionDef) -> list[str]:
    """Arguments and body without annotations, docstring, and the ``tl.`` and ``torch.`` of function names."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    text = [", ".join(argument.arg for argument in function.args.args), *map(ast.unparse, body)]
    return [line.replace("tl.", "").replace("torch.", "") for line in text]


@pytest.mark.parametrize("name", ["add_drive", "integrate", "reset"])
def test_step_has_the_lines_of_the_reference(name: str) -> None:
    kernel = functions(PACKAGE / "kernels" / "step.py")[name]
    reference = functions(PACKAGE / "backend" / "reference.py")[name]
    assert lines(kernel) == lines(reference)


@pytest.mark.parametrize("name", ["vjp", "vjp_constants"])
def test_cpu_adjoint_has_the_lines_of_the_kernels(name: str) -> None:
    kernel = functions(PACKAGE / "kernels" / "step.py")[name]
    cpu = functions(PACKAGE / "backend" / "cpu" / "feed_forward.py")[name]
    assert lines(cpu) == lines(kernel)


def record(path: Path, name: str) -> list[str]:
    (node,) = (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name)
    return [field.target.id for field in node.body if isinstance(field, ast.AnnAssign)]  # type: ignore[union-attr]


def test_cpu_adjoint_has_the_same_fields() -> None:
    assert record(PACKAGE / "backend" / "cpu" / "feed_forward.py", "Adjoint") == record(
        PACKAGE / "kernels" / "step.py", "Adjoint"
    )


SURROGATE_BRANCHES = {"super": "super_spike", "triangle": "triangle", "tanh": "tanh", "circ": "circ"} | {
    "heavi_erfc": "heavi_erfc"
}


@pytest.mark.parametrize("method", SURROGATE_BRANCHES)
def test_surrogate_has_the_lines_of_the_reference(method: str) -> None:
    branches = {}
    node = functions(PACKAGE / "kernels" / "step.py")["surrogate"].body[1]
    while isinstance(node, ast.If):
        branches[ast.literal_eval(node.test.comparators[0])] = node.body  # type: ignore[attr-defined]
        node = node.orelse[0]
    kernel = "\n".join(map(ast.unparse, branches[method]))
    reference = "\n".join(lines(functions(PACKAGE / "neuron" / "surrogate.py")[SURROGATE_BRANCHES[method]])[1:])
    # names that differ: the rounding of `/` and of the square root must be asked for by name in a kernel
    kernel = kernel.replace("tl.full(q.shape, 1.0, q.dtype)", "1.0").replace("tl.", "").replace("square_root", "sqrt")
    tree = ast.parse(kernel)

    class Divide(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            self.generic_visit(node)
            if isinstance(node.func, ast.Name) and node.func.id == "divide":
                return ast.BinOp(node.args[0], ast.Div(), node.args[1])
            return node

    assert ast.unparse(Divide().visit(tree)) == reference


def test_constants_have_the_same_rows() -> None:
    rows = record(PACKAGE / "kernels" / "step.py", "Constants")
    assert tuple(rows) == Constants._fields
    assert set(rows) & set(CobaLIFParameters._fields) == set(rows) - {"decay_e", "decay_i", "k"}
