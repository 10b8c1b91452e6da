"""The table of constants of a module's numbers on a GPU, and how long blocks are there."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from coba_triton import CobaLIF, CobaLIFParameters
from coba_triton.ops import constants
from coba_triton.ops.time_blocks import choose_block_steps, count_blocks, even_block_steps

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("refractory", [0.0, 2.0])
def test_table_of_doubles_has_the_bits_of_python_numbers(dtype: torch.dtype, refractory: float) -> None:
    p = CobaLIFParameters(v_thresh=1.1, refractory=refractory)
    names = [name for name in p._fields if name != "method"]
    doubles = p._replace(**{name: torch.tensor(float(getattr(p, name)), dtype=torch.float64) for name in names})
    for dt in (0.001, 0.1):
        expected = torch.stack(constants.derive_constants(p, dt, dtype, CPU))
        for given in (doubles, doubles._replace(refractory=refractory, conductance_based=1)):
            found = constants._table_of_doubles(given, dt, dtype, CPU)
            assert found is not None and torch.equal(found[:, 0], expected)


def test_a_modules_numbers_on_a_gpu_make_a_table_at_once(monkeypatch) -> None:
    monkeypatch.setattr(constants, "derive_constants", None)
    p = CobaLIF(dt=0.1).to("meta")._parameters_for()
    table = constants.constants_table(p, 0.1, torch.float32, torch.device("meta"), torch.Size([7]))
    assert table.shape == (12, 1) and table.dtype == torch.float32


def test_numbers_that_are_learned_make_no_table_of_doubles() -> None:
    p = CobaLIF(dt=0.1, learn=("v_thresh",)).p
    assert constants._table_of_doubles(p, 0.1, torch.float32, CPU) is None


def test_block_steps() -> None:
    """In training, blocks have sqrt(T) steps on a CPU, and as many as scratch allows on a GPU ("meta" stands for one)."""
    like, on_gpu = torch.empty(0), torch.empty(0, device="meta")
    for cells, sources, train, expected, of_gpu in (
        (32 * 256, 0, True, 64, 512),
        (32 * 1024, 0, True, 64, 128),
        (2**24, 0, True, 64, 64),
        (32 * 1024, 0, False, 256, 1024),
        (2**24, 0, False, 32, 32),
        (1000, 2**18, False, 2016, 256),
        (1000, 2**18, True, 64, 96),
    ):
        assert choose_block_steps(None, 2000, cells, sources, like, train) == expected
        assert choose_block_steps(None, 2000, cells, sources, on_gpu, train) == of_gpu
    assert choose_block_steps(70, 2000, 10, 10, on_gpu, True) == 96
    assert choose_block_steps(None, 2000, 2**15, 0, on_gpu, False, besides=6) == 256


@pytest.mark.parametrize("cells", [32 * 256, 32 * 700, 32 * 1024, 2**24])
@pytest.mark.parametrize("steps", [0, 1, 32, 33, 100, 2000, 2049])
def test_a_backward_finds_the_blocks_of_its_forward(steps, cells) -> None:
    """By their number, so that it may have other rows."""
    found = choose_block_steps(None, steps, cells, 0, torch.empty(0, device="meta"), True)
    assert even_block_steps(None, steps, count_blocks(found, steps)) == found


@pytest.mark.parametrize("train", [False, True])
def test_block_steps_of_any_length_are_one_expression(train: bool) -> None:
    """So that a compiled call has one graph for all lengths and batches: no size is looked at."""
    sizes = ShapeEnv()
    mode = FakeTensorMode(shape_env=sizes)
    dynamic: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 3)
    x = mode.from_tensor(torch.empty(2000, 32, 256, device="meta"), symbolic_context=dynamic)
    with mode:
        steps = choose_block_steps(None, x.shape[0], x[0].numel(), x.shape[1], x, train)
    assert isinstance(steps, torch.SymInt) and not sizes.guards
    assert int(steps) == (512 if train else 2016)
