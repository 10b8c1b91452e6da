"""What calls on a GPU launch, and that the host never waits for it, on a driver that executes nothing.

These tests are collected only where that driver is installed; ``test_dry.py`` runs them so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

import dry
from coba_triton import CobaLIF, CobaLIFParameters, CobaLIFRecurrent, coba_lif_feed_forward_integral, coba_lif_integral
from coba_triton.backend import triton as triton_backend
from coba_triton.kernels import feed_forward, recurrent, sparse
from coba_triton.tools import compiler
from coba_triton.tools.problems import sparse_problem
from programs.compile_targets import run_sparse

P = CobaLIFParameters()
X = torch.zeros(40, 3, 64)
LEAF = torch.zeros(40, 3, 64, requires_grad=True)
W_IN, W_REC = torch.zeros(100, 64), torch.zeros(100, 100)
LARGE_IN, LARGE_REC = (torch.zeros(3000, sources) for sources in (64, 3000))
LEAF_REC = torch.zeros(1, 1).expand(3000, 3000).requires_grad_()
MANY, AS_EVENTS = torch.zeros(6, 5, 64), {"backend": "triton", "path": "events"}
HELD_IN, HELD_REC = torch.zeros(300, 64), torch.zeros(300, 300, requires_grad=True)
CASES: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "feed-forward": (
        lambda: coba_lif_feed_forward_integral(X, None, P, 0.1, backend="triton"), {"forward_kernel": 1},
    ),
    "feed-forward, training": (
        lambda: coba_lif_feed_forward_integral(LEAF, None, P, 0.1, backend="triton")[0].sum().backward(),
        {"forward_kernel": 1, "backward_kernel": 1},
    ),
    "module": (lambda: CobaLIF(dt=0.1, backend="triton")(X), {"forward_kernel": 1}),
    "recurrent": (
        lambda: coba_lif_integral(X, None, W_IN, W_REC, P, 0.1, backend="triton"),
        {"compact_kernel": 2, "projection_kernel": 2, "forward_kernel": 1},
    ),
    "recurrent, in two blocks": (
        lambda: coba_lif_integral(X, None, W_IN, W_REC, P, 0.1, backend="triton", block_steps=32),
        {"compact_kernel": 4, "projection_kernel": 4, "forward_kernel": 2},
    ),
    "recurrent, sliced": (
        lambda: coba_lif_integral(X[:, :1], None, LARGE_IN, LARGE_REC, P, 0.1, backend="triton"),
        {"compact_kernel": 2, "projection_kernel": 2, "sliced_forward_kernel": 1},
    ),
    "recurrent, dense": (
        lambda: coba_lif_integral(X, None, W_IN, W_REC, P, 0.1, backend="triton", path="dense"),
        {"compact_kernel": 1, "projection_kernel": 1, "driven_kernel": 40},
    ),
    "sparse": (
        lambda: run_sparse(neurons=100),
        {
            "compact_kernel": 2, "scatter_kernel": 1, "sparse_projection_kernel": 1, "sums_to_drive_kernel": 1,
            "sparse_forward_kernel": 1,
        },
    ),
    "sparse, training": (
        lambda: run_sparse(neurons=2000, train=True),
        {
            "compact_kernel": 7, "scatter_kernel": 2, "sparse_projection_kernel": 2, "sums_to_drive_kernel": 2,
            "sparse_forward_kernel": 1,
            "driven_kernel": 1, "sparse_backward_kernel": 1, "synapse_gradient_kernel": 3, "source_gradient_kernel": 2,
        },
    ),
    "recurrent, training, weights held": (
        lambda: coba_lif_integral(X, None, HELD_IN, HELD_REC, P, 0.1, backend="triton")[0].sum().backward(),
        {"compact_kernel": 8, "projection_kernel": 8, "forward_kernel": 2, "driven_kernel": 2, "shared_backward_kernel": 2},
    ),
    "recurrent, training, many neurons": (
        lambda: coba_lif_integral(MANY, None, LARGE_IN, LEAF_REC, P, 0.1, **AS_EVENTS)[0].sum().backward(),
        {"compact_kernel": 4, "projection_kernel": 4, "forward_kernel": 1, "driven_kernel": 1, "backward_kernel": 6},
    ),
    "recurrent module, training": (
        lambda: CobaLIFRecurrent(64, 100, dt=0.1, backend="triton")(X)[0].sum().backward(),
        {"compact_kernel": 8, "projection_kernel": 8, "forward_kernel": 2, "driven_kernel": 2, "backward_kernel": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_launches_and_no_wait(name: str) -> None:
    run, expected = CASES[name]
    run()  # compiles, and makes what is kept
    dry.launches()
    run()
    assert dry.launches() == expected
    operations = dry.operations(run)
    asserted = operations["aten::_assert_async"]  # waits on a CPU only
    assert operations and not {wait: operations[wait] for wait in dry.WAITS if operations[wait] > asserted}


def test_a_training_step_makes_few_operations_beside_its_launches() -> None:
    """Spike words are unpacked a block at a time: an operation for every bit would be thousands."""
    case = sparse_problem(1000, 2, 256)
    case.recurrent_weights.requires_grad_()
    operations = dry.operations(lambda: case.run("triton")[0].sum().backward())
    shifts = operations["aten::__rshift__"]
    assert 0 < shifts <= 2 * 32  # one for each of 32 blocks, and one for the word before each


def test_the_host_takes_the_compiled_kernel_that_triton_would_take() -> None:
    """What is kept is found by dtypes, alignment and widths: other values of the numbers compile nothing, these do."""
    kernels = [
        kernel
        for module in (feed_forward, recurrent, sparse)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and isinstance(kernel, triton.JITFunction)
    ]
    assert len(kernels) == 16
    for kernel in kernels:
        numbers = [p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
        assert numbers and all(p.do_not_specialize for p in numbers), kernel
    for steps in (40, 1, 16):
        coba_lif_feed_forward_integral(X[:steps], None, P, 0.1, backend="triton")
    before = set(triton_backend.launch._compiled)
    coba_lif_feed_forward_integral(X[:17], None, P, 0.2, backend="triton")
    assert set(triton_backend.launch._compiled) == before
    buffer = torch.zeros(X[:17].numel() + 1)
    coba_lif_feed_forward_integral(buffer[1:].view(17, 3, 64), None, P, 0.2, backend="triton")  # not aligned
    assert len(triton_backend.launch._compiled) == len(before) + 1


@pytest.mark.parametrize("kind", ["feed-forward", "recurrent"])
def test_torch_compile_takes_a_backend_that_is_a_gpus(kind: str) -> None:
    """A compiler cannot follow how the package finds Triton's driver, and need not."""

    def run(x: torch.Tensor) -> torch.Tensor:
        if kind == "feed-forward":
            return coba_lif_feed_forward_integral(x, None, P, 0.1, backend="triton")[0]
        return coba_lif_integral(x, None, W_IN, W_REC, P, 0.1, backend="triton")[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    dry.launches()
    compiled(torch.zeros(40, 3, 64, requires_grad=True)).sum().backward()
    assert {"forward_kernel", "backward_kernel"} <= set(dry.launches())


def test_the_kernels_of_sparse_networks_are_compiled_ahead() -> None:
    """Each of them, for sums of both widths; launches are recorded in a process of its own, as a command does it."""
    program = (
        "import torch; from coba_triton.tools import compiler\n"
        "for kernel, (source, _) in compiler.launches_of('sm_90', [(100, 3)], torch.float32).values():\n"
        "    print(kernel, source.signature.get('ring_ptr'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = {tuple(line.split()) for line in done.stdout.splitlines()}
    names = [name for name, (module, _) in compiler.TRITON_FUNCTIONS.items() if module is sparse]
    assert len(names) == 7 and set(names) <= {name for name, _ in found}
    assert {pointer for name, pointer in found if name == "sparse_forward_kernel"} == {"*i32", "*i64"}


def test_what_is_compiled_ahead_is_found_in_the_cache(tmp_path: Path) -> None:
    """A machine with such a GPU compiles nothing of it again; here another process takes its place."""
    folder = str(tmp_path)
    ahead = "import torch; from pathlib import Path; from coba_triton.tools import compiler; "
    ahead += f"print(len(list(compiler.compile_ahead('sm_90', [(100, 3)], torch.float32, Path({folder!r})))))"
    later = (
        "import dry; dry.install()\n"
        "import torch, triton\n"
        "from coba_triton.tools import compiler\n"
        "found = []\n"
        "triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)\n"
        "for call in compiler._calls(100, 3, torch.float32): call()\n"
        "print(len(found), sum(found))\n"
    )
    environment = os.environ | {"TRITON_CACHE_DIR": folder}
    compiled, counted = (
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout
        for program in (ahead, later)
    )
    assert int(compiled) > 10 and counted.split() == [compiled.strip()] * 2
