"""The record of sparse synapses: what makes it, what it holds, and what it refuses."""

from __future__ import annotations

import copy
import io
import json
import math
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

from coba_triton import LogNormal, Normal, Synapses, Uniform
from coba_triton.backend.cpu import draws

LAYOUTS = ("coo", "csr", "csc")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def entries(neurons: int, sources: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, columns, weights and delays in no order; some places several times."""
    g = generator(seed)
    rows, columns = (torch.randint(most, (count,), generator=g) for most in (neurons, sources))
    return rows, columns, torch.randn(count, generator=g), 0.1 + torch.rand(count, generator=g)


def sparse(dense: Tensor, layout: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR|CSC) tensor support is in beta state", UserWarning)
        matrix: Tensor = getattr(dense, f"to_sparse_{layout}")()
    return matrix


def values_of(matrix: Tensor) -> Tensor:
    return matrix._values() if matrix.layout is torch.sparse_coo else matrix.values()


def places_of(matrix: Tensor) -> tuple[Tensor, ...]:
    if matrix.layout is torch.sparse_coo:
        return (matrix._indices(),)
    if matrix.layout is torch.sparse_csr:
        return matrix.crow_indices(), matrix.col_indices()
    return matrix.ccol_indices(), matrix.row_indices()


def some_matrix(neurons: int = 7, sources: int = 5, seed: int = 3) -> Tensor:
    g = generator(seed)
    values = torch.randn(neurons, sources, generator=g, dtype=torch.float64)
    return values * (torch.rand(neurons, sources, generator=g) < 0.5)


def listed(synapses: Synapses) -> list[tuple[int, int, float, float | None]]:
    """Every synapse as source, target, weight and delay."""
    sources = synapses.source_of()
    weights, delays = (
        None if value is None else (value[sources, 0] if value.dim() == 2 else value.expand(synapses.count)).tolist()
        for value in (synapses.weights.detach(), synapses.delays)
    )
    assert weights is not None
    return list(zip(sources.tolist(), synapses.targets.tolist(), weights, delays or [None] * synapses.count, strict=True))


def assert_same(one: Synapses, other: Synapses) -> None:
    """Bit for bit the same, in the same dtypes."""
    for name, a, b in zip(one._fields, one, other, strict=True):
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), name
        else:
            assert type(a) is type(b) and a == b, name


def check_record(synapses: Synapses) -> None:
    """What kernels rely on."""
    indptr, targets = synapses.indptr, synapses.targets
    assert indptr.dtype == torch.int64 and targets.dtype == torch.int32
    assert indptr.is_contiguous() and targets.is_contiguous()
    assert indptr.shape == (synapses.sources + 1,) and targets.shape == (synapses.count,)
    assert indptr[0] == 0 and indptr[-1] == synapses.count and (indptr.diff() >= 0).all()
    assert ((targets >= 0) & (targets < synapses.neurons)).all()
    sources = synapses.source_of()
    key = sources * synapses.neurons + targets
    assert (key.diff() >= 0).all()
    shapes = ((synapses.count,), (synapses.sources, 1), (1,))
    assert synapses.weights.shape in shapes
    if synapses.delays is None:
        assert (synapses.shortest, synapses.longest) == (0.0, 0.0)
    else:
        assert synapses.delays.dtype == torch.float32 and synapses.delays.shape in shapes
        assert synapses.shortest == synapses.delays.min().item() and synapses.longest == synapses.delays.max().item()


# From pairs


@pytest.mark.parametrize("given", ["tensors", "arrays", "lists"])
@pytest.mark.parametrize(
    ("neurons", "sources", "count"),
    [(1, 1, 1), (1, 1, 5), (63, 1, 40), (1, 63, 40), (9, 7, 500), (500, 63, 0), (300, 200, 2000)],
    ids=str,
)
def test_pairs_are_sorted_by_source_then_target_and_pairs_stay_in_order(
    neurons: int, sources: int, count: int, given: str
) -> None:
    rows, columns, weights, delays = entries(neurons, sources, count)
    pieces: Sequence[Any] = (rows, columns, weights, delays)
    if given == "arrays":
        pieces = [piece.numpy() for piece in pieces]
    elif given == "lists":
        pieces = [piece.tolist() for piece in pieces]
    synapses = Synapses.from_coo(*pieces, shape=(neurons, sources))
    check_record(synapses)
    assert (synapses.neurons, synapses.sources, synapses.count) == (neurons, sources, count)
    order = np.lexsort((rows.numpy(), columns.numpy()))  # stable
    expected = [(columns[i].item(), rows[i].item(), weights[i].item(), delays[i].item()) for i in torch.from_numpy(order)]
    assert listed(synapses) == expected
    dense = np.zeros((neurons, sources))
    np.add.at(dense, (rows.numpy(), columns.numpy()), weights.double().numpy())
    np.testing.assert_allclose(synapses.to_dense().numpy(), dense, atol=1e-5)


def test_pairs_in_order_give_the_tensor_itself() -> None:
    leaf = torch.randn(3, generator=generator(), requires_grad=True)
    synapses = Synapses.from_coo([0, 1, 0], [0, 0, 2], leaf, shape=(2, 3))
    assert synapses.weights is leaf
    assert Synapses.from_coo([1, 0, 0], [0, 0, 2], leaf, shape=(2, 3)).weights.grad_fn is not None


@pytest.mark.parametrize("form", ["each", "of a source", "shared", "a number of its own"])
def test_gradients_reach_what_was_given(form: str) -> None:
    rows, columns, _, _ = entries(6, 4, 30)
    shapes: dict[str, tuple[int, ...]] = {"each": (30,), "of a source": (4, 1), "shared": (1,), "a number of its own": ()}
    leaf = torch.randn(shapes[form], generator=generator(), requires_grad=True)
    synapses = Synapses.from_coo(rows, columns, leaf, shape=(6, 4))
    check_record(synapses)
    factors = torch.randn(6, 4, generator=generator(1))
    (found,) = torch.autograd.grad((synapses.to_dense() * factors).sum(), leaf)
    each = factors[rows, columns]
    if form == "each":
        torch.testing.assert_close(found, each)
    elif form == "of a source":
        torch.testing.assert_close(found[:, 0], torch.zeros(4).index_add(0, columns, each))
    else:
        torch.testing.assert_close(found.sum(), each.sum())


def test_delays_that_are_all_the_same_need_no_memory() -> None:
    rows, columns, weights, _ = entries(6, 4, 30)
    synapses = Synapses.from_coo(rows, columns, weights, torch.full((30,), 1.5), shape=(6, 4))
    assert synapses.delays is not None and synapses.delays.tolist() == [1.5]
    assert (synapses.shortest, synapses.longest) == (1.5, 1.5)


def test_numbers_of_python_get_the_default_dtype_and_arrays_keep_theirs() -> None:
    def dtype(weights: Any) -> torch.dtype:
        return Synapses.from_coo([0], [0], weights, 1, shape=(1, 1)).weights.dtype

    assert dtype(0.5) == dtype([0.5]) == dtype(1) == dtype([1]) == dtype(np.float32(0.5)) == torch.float32
    assert dtype(np.array([0.5])) == dtype(torch.ones(1, dtype=torch.float64)) == torch.float64
    assert dtype(np.array([0.5], np.float16)) == torch.float16
    assert dtype(np.array([0.5], ">f8")) == torch.float64


# From matrices


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_matrix(layout: str) -> None:
    dense = some_matrix()
    matrix = sparse(dense, layout)
    count = len(values_of(matrix))
    numbered = torch.arange(1.0, count + 1)
    synapses = Synapses.from_torch(matrix, delays=numbered)
    check_record(synapses)
    assert torch.equal(synapses.to_dense(), dense)
    # the delays are in the order of the matrix
    positions = matrix.detach().clone()
    values_of(positions).copy_(numbered)
    expected = positions.to_dense()
    assert all(expected[target, source] == delay for source, target, _, delay in listed(synapses))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_leaf_gets_a_sparse_gradient_with_its_places(layout: str) -> None:
    dense = some_matrix()
    dense[0, 0] = 0.25
    leaf = sparse(dense, layout)
    values_of(leaf)[0] = 0.0  # a stored zero is a synapse
    leaf.requires_grad_()
    synapses = Synapses.from_torch(leaf)
    factors = torch.randn(dense.shape, generator=generator(), dtype=torch.float64)
    (synapses.to_dense().pow(2) * factors).sum().backward()
    assert leaf.grad is not None and leaf.grad.layout is not torch.strided
    found = leaf.grad.to_dense()
    torch.testing.assert_close(found, 2 * leaf.detach().to_dense() * factors, rtol=1e-14, atol=0)
    if layout == "csc":  # PyTorch accumulates no gradient of this layout
        rows, columns = leaf.grad._indices()
        expected = (
            leaf.detach().row_indices(),
            torch.repeat_interleave(torch.arange(dense.shape[1]), leaf.detach().ccol_indices().diff()),
        )
        assert torch.equal(rows, expected[0]) and torch.equal(columns, expected[1])
    else:
        assert leaf.grad.layout is leaf.layout
        assert all(map(torch.equal, places_of(leaf.grad), places_of(leaf.detach())))
    with torch.no_grad():
        before = synapses.weights.clone()
        values_of(leaf.detach()).mul_(1.0 + 1e-9)
    assert torch.equal(synapses.weights, before)  # they are no view, which an optimizer would change
    values_of(leaf.detach()).copy_(values_of(sparse(dense, layout)))
    values_of(leaf.detach())[0] = 0.0
    # a second call adds up
    (Synapses.from_torch(leaf).to_dense().pow(2) * factors).sum().backward()
    torch.testing.assert_close(leaf.grad.to_dense(), 2 * found, rtol=1e-14, atol=0)


def test_a_matrix_with_several_values_of_a_place_keeps_them_apart() -> None:
    indices = torch.tensor([[1, 0, 1], [2, 0, 2]])
    leaf = torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0, 4.0]), (2, 3), check_invariants=True).requires_grad_()
    synapses = Synapses.from_torch(leaf, delays=[0.5, 1.0, 1.5])
    assert listed(synapses) == [(0, 0, 2.0, 1.0), (2, 1, 1.0, 0.5), (2, 1, 4.0, 1.5)]
    synapses.weights.backward(torch.tensor([10.0, 20.0, 30.0]))
    assert leaf.grad is not None and torch.equal(leaf.grad._indices(), indices)
    assert leaf.grad._values().tolist() == [20.0, 10.0, 30.0]
    (found,) = torch.autograd.grad(Synapses.from_torch(leaf).weights, leaf, torch.tensor([10.0, 20.0, 30.0]))
    assert not found.is_coalesced() and found.coalesce().values().tolist() == [10.0, 50.0]


def test_gradients_of_gradients_through_a_sparse_matrix() -> None:
    leaf = sparse(some_matrix(), "coo").requires_grad_()
    cubes = Synapses.from_torch(leaf).weights.pow(3).sum()
    (first,) = torch.autograd.grad(cubes, leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.to_dense().sum(), leaf)
    torch.testing.assert_close(second.to_dense(), 6 * leaf.detach().to_dense())


@pytest.mark.parametrize("delays", [None, 0.5, "of a source", "each"], ids=str)
def test_a_dense_matrix_keeps_every_entry(delays: Any) -> None:
    matrix = some_matrix().requires_grad_()
    g = generator()
    given = {"of a source": torch.rand(5, generator=g), "each": torch.rand(7, 5, generator=g)}
    synapses = Synapses.from_torch(matrix, given.get(delays, delays))
    check_record(synapses)
    assert synapses.count == 35 and torch.equal(synapses.to_dense(), matrix)
    if delays in given:
        expected = given[delays].expand(7, 5)
        assert all(expected[target, source] == delay for source, target, _, delay in listed(synapses))
    factors = torch.randn(7, 5, generator=g, dtype=torch.float64)
    (found,) = torch.autograd.grad((synapses.to_dense() * factors).sum(), matrix)
    assert torch.equal(found, factors)


@pytest.mark.parametrize("form", ["coo", "csr", "csc", "lil", "dok"])
@pytest.mark.parametrize("kind", ["array", "matrix"])
def test_a_matrix_of_scipy(form: str, kind: str) -> None:
    dense = some_matrix().numpy()
    matrix = getattr(scipy.sparse, f"{form}_{kind}")(dense)
    order = matrix.tocoo()
    synapses = Synapses.from_scipy(matrix, delays=1.0 + np.arange(order.nnz))
    check_record(synapses)
    np.testing.assert_array_equal(synapses.to_dense().numpy(), dense)
    expected = {(c, r): 1.0 + i for i, (r, c) in enumerate(zip(order.row.tolist(), order.col.tolist(), strict=True))}
    assert {(source, target): delay for source, target, _, delay in listed(synapses)} == expected


# The record


def test_memory() -> None:
    rows, columns, weights, delays = entries(50, 40, 3000)
    own = Synapses.from_coo(rows, columns, weights, delays, shape=(50, 40))
    assert own.nbytes - own.indptr.nbytes == 12 * own.count
    shared = Synapses.from_coo(rows, columns, 0.5, 1.0, shape=(50, 40))
    assert shared.nbytes - shared.indptr.nbytes == 4 * shared.count + 8


def test_repr_says_what_it_is_and_prints_no_tensor() -> None:
    rows, columns, weights, _ = entries(50, 4000, 3000)
    shared = Synapses.from_coo(rows, columns, 0.004, 0.3, shape=(50, 4000))
    assert repr(shared) == (
        "Synapses(4,000 sources -> 50 neurons, 3,000 synapses, weights 0.004, delays 0.3 ms, 4 bytes a synapse)"
    )
    low, high = weights.min(), weights.max()
    own = Synapses.from_coo(rows, columns, weights, shape=(50, 4000))
    assert f"weights {low:.4g} to {high:.4g}, delays of one step, 8 bytes a synapse" in repr(own)
    assert "weights [3000] of float32" in repr(own.to("meta"))
    assert "0 synapses" in repr(Synapses.from_coo([], [], 0.5, shape=(0, 0)))


def test_to_moves_everything_and_converts_weights_alone() -> None:
    synapses = Synapses.from_coo(*entries(50, 40, 300), shape=(50, 40))
    wide = synapses.to(torch.float64)
    assert wide.weights.dtype == torch.float64
    assert_same(wide.to(dtype=torch.float32), synapses)
    away = synapses.to("meta", torch.float64)
    tensors = [value for value in away if isinstance(value, Tensor)]
    assert len(tensors) == 4 and all(value.device.type == "meta" for value in tensors)
    assert away.weights.dtype == torch.float64 and away.delays is not None and away.delays.dtype == torch.float32


def test_with_weights_takes_every_shape() -> None:
    synapses = Synapses.from_coo(*entries(50, 40, 300), shape=(50, 40))
    for shape in ((300,), (40, 1), (1,)):
        leaf = torch.ones(shape, requires_grad=True)
        assert synapses.with_weights(leaf).weights is leaf
    assert synapses.with_weights(torch.tensor(0.5)).weights.shape == (1,)


@pytest.mark.parametrize(
    ("delays", "dt", "expected"),
    [
        (None, 0.1, (1, 1)),
        (0.3, 0.1, (3, 3)),
        ([0.1, 1.5], 0.1, (1, 15)),
        ([0.06, 0.04999, 25.0], 0.05, (1, 500)),
        (0.35, 0.1, (4, 4)),  # 3.5 in float32
        (0.75, 0.5, (2, 2)),  # halves go to the even one
        (0.625, 0.25, (2, 2)),
        (5, 1.0, (5, 5)),
    ],
)
def test_delays_in_steps(delays: Any, dt: float, expected: tuple[int, int]) -> None:
    count = len(delays) if isinstance(delays, list) else 1
    assert Synapses.from_coo([0] * count, [0] * count, 1.0, delays, shape=(1, 1)).check_delays(dt) == expected


@pytest.mark.parametrize("dt", [0.1, 0.05, 0.025, 1 / 3, 0.2])
def test_delays_in_steps_are_those_of_float32(dt: float) -> None:
    """As a kernel rounds them, next to the halves, where the precision decides."""
    per_ms = np.float32(1.0 / dt)
    near = np.float32((np.arange(1, 200) + 0.5) * dt)
    wider = 0
    for offset in range(-4, 5):
        for delay in (near.view(np.int32) + offset).view(np.float32):
            steps = int(np.rint(delay * per_ms))
            record = Synapses.from_coo([0], [0], 1.0, float(delay), shape=(1, 1))
            assert record.check_delays(dt) == (steps, steps)
            wider += steps != round(float(delay) / dt)
    assert wider > 10  # float64 has other steps


def test_compiled_code_takes_a_record() -> None:
    synapses = Synapses.from_coo(*entries(50, 40, 300), shape=(50, 40))

    @torch.compile(backend="eager", fullgraph=True)
    def use(record: Synapses) -> Tensor:
        return record.weights * record.check_delays(0.1)[1] + record.sources + record.count + record.neurons

    expected = synapses.weights * synapses.check_delays(0.1)[1] + 40 + 300 + 50
    torch.testing.assert_close(use(synapses), expected)


def test_vmap_over_weights() -> None:
    synapses = Synapses.from_coo(*entries(5, 4, 30), shape=(5, 4))
    several = torch.randn(3, 30, generator=generator())
    found = torch.vmap(lambda weights: synapses.with_weights(weights).to_dense())(several)
    for weights, dense in zip(several, found, strict=True):
        torch.testing.assert_close(dense, synapses.with_weights(weights).to_dense())


def test_an_exported_program_takes_a_record_and_can_be_saved() -> None:
    class Dense(torch.nn.Module):
        def forward(self, record: Synapses) -> Tensor:
            return record.weights[record.targets.long()] * record.longest

    synapses = Synapses.from_coo(*entries(5, 4, 30), shape=(5, 4))
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Dense(), (synapses,)), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    assert torch.equal(loaded(synapses), Dense()(synapses))


def test_torch_save_and_copies() -> None:
    synapses = Synapses.from_coo(*entries(5, 4, 30), shape=(5, 4))
    buffer = io.BytesIO()
    torch.save({"synapses": synapses}, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=True)["synapses"], synapses)
    assert_same(copy.deepcopy(synapses), synapses)


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["own", "of a source", "shared", "none"])
def test_a_file_holds_every_bit(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    rows, columns, weights, delays = entries(50, 40, 300)
    forms = {
        "own": (weights, delays),
        "of a source": (weights[:40, None], delays[:40, None]),
        "shared": (weights[:1], delays[:1]),
        "none": (weights, None),
    }
    weights, taken = forms[form]
    synapses = Synapses.from_coo(rows, columns, weights.to(dtype).requires_grad_(), taken, shape=(50, 40))
    synapses.save(tmp_path / "synapses.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["synapses.npz"]
    loaded = Synapses.load(tmp_path / "synapses.npz")
    assert_same(loaded, synapses._replace(weights=synapses.weights.detach()))
    assert not loaded.weights.requires_grad


def test_a_file_of_no_synapses(tmp_path: Path) -> None:
    synapses = Synapses.from_coo([], [], 0.5, 1.0, shape=(0, 0))
    synapses.save(tmp_path / "none")
    assert_same(Synapses.load(tmp_path / "none"), synapses)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synapses = Synapses.from_coo([0], [0], 0.5, shape=(1, 1))
    path = tmp_path / "synapses.npz"
    synapses.save(path)

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"synapses cannot be written to .*synapses.npz \(No space left on device\); choose"):
        synapses.with_weights(torch.ones(1)).save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["synapses.npz"]
    assert_same(Synapses.load(path), synapses)


def rewrite(path: Path, **changes: Any) -> None:
    """Change arrays of a file, or what it says about them."""
    with np.load(path) as file:
        arrays = dict(file)
    about = json.loads(str(arrays["about"]))
    for name, value in changes.items():
        if name in arrays:
            arrays[name] = value
        else:
            about[name] = value
    np.savez(path, **{**arrays, "about": np.array(json.dumps(about))})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit of the targets."""
    with zipfile.ZipFile(path) as file:
        offset = file.getinfo("targets.npy").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 300] ^= 1
    path.write_bytes(content)


def bomb(path: Path) -> None:
    """An array that says that it needs a petabyte."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    members["targets.npy"] = members["targets.npy"].replace(b"(300,)", b"(" + b"9" * 12 + b",)", 1)
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"PK nonsense"), "not a zip file"),
        (lambda path: path.write_bytes(b""), "not a zip file"),
        (cut, "zip"),
        (flip, "CRC"),
        (bomb, "targets.npy is int32"),
        (lambda path: np.savez(path, spikes=np.zeros(3)), "about"),
        (lambda path: rewrite(path, format="other"), "its format is 'other'"),
        (lambda path: rewrite(path, neurons=-1), "neurons must be"),
        (lambda path: rewrite(path, neurons=3), "targets must be from 0 to N - 1 = 2"),
        (lambda path: rewrite(path, neurons="many"), "neurons must be"),
        (lambda path: rewrite(path, dtype="float64"), "other dtypes"),
        (lambda path: rewrite(path, indptr=np.arange(41)), "do not divide"),
        (lambda path: rewrite(path, indptr=np.array([0, 400, *[300] * 39])), "do not divide"),
        (lambda path: rewrite(path, indptr=np.zeros((2, 2), np.int64)), "other shapes"),
        (lambda path: rewrite(path, targets=np.arange(300, dtype=np.int32)[::-1] % 50), "not sorted"),
        (lambda path: rewrite(path, weights=np.zeros(7, np.float32)), "weights must be one number"),
        (lambda path: rewrite(path, weights=np.full(300, np.nan, np.float32)), "weights must be finite"),
        (lambda path: rewrite(path, delays=np.full(300, -1, np.float32)), "delays must not be negative"),
        (lambda path: rewrite(path, delays=np.array(["a"])), "delays|can't convert"),
    ],
)
def test_a_foreign_or_damaged_file(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "synapses.npz"
    Synapses.from_coo(*entries(50, 40, 300), shape=(50, 40)).save(path)
    damage(path)
    with pytest.raises(ValueError, match=rf"synapses.npz holds no synapses, or is damaged \((?s:.*)({message})"):
        Synapses.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.npz; give the path"):
        Synapses.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="it is no regular file"):
        Synapses.load(tmp_path)
    with pytest.raises(ValueError, match="path must be a path of this machine's file system"):
        Synapses.load("s3://bucket/synapses.npz")
    with pytest.raises(OSError, match="the synapses cannot be written to"):
        Synapses.from_coo([0], [0], 0.5, shape=(1, 1)).save(tmp_path / "no" / "folder.npz")


# Joined


@pytest.mark.parametrize("count", [0, 1, 100])
def test_joined_parts_have_all_synapses(count: int) -> None:
    parts = [Synapses.from_coo(*entries(9, 7, count, seed), shape=(9, 7)) for seed in range(3)]
    joined = Synapses.join(parts)
    check_record(joined)
    everything = [synapse for part in parts for synapse in listed(part)]
    assert listed(joined) == sorted(everything, key=lambda synapse: synapse[:2])


def shared(rows: list[int], columns: list[int], weights: Any, delays: Any = None) -> Synapses:
    return Synapses.from_coo(rows, columns, weights, delays, shape=(4, 3))


@pytest.mark.parametrize(
    ("parts", "weights", "delays"),
    [
        (lambda: [shared([0], [0], 0.5, 1.0), shared([1, 0], [1, 0], 0.5, 1.0)], [0.5], [1.0]),
        (lambda: [shared([0], [0], 0.5, 1.0), shared([1], [1], -0.5, 2.0)], [[0.5], [-0.5], [0.5]], [[1.0], [2.0], [1.0]]),
        (lambda: [shared([0], [2], 0.5), shared([1], [2], -0.5)], [0.5, -0.5], None),
        (lambda: [shared([0, 1], [0, 1], [0.5, 0.25]), shared([2, 3], [0, 1], [0.5, 0.25])], [[0.5], [0.25], [0.5]], None),
        (lambda: [shared([0, 1], [0, 1], [0.5, 0.5]), shared([2], [0], 0.5)], [0.5], None),
        (lambda: [shared([], [], 0.5), shared([], [], 0.25)], [0.5], None),
    ],
    ids=["of all", "of sources", "of synapses", "found for sources", "found for all", "none"],
)
def test_joined_parts_share_what_they_can(parts: Callable[[], list[Synapses]], weights: Any, delays: Any) -> None:
    joined = Synapses.join(parts())
    check_record(joined)
    assert joined.weights.tolist() == weights
    assert (None if joined.delays is None else joined.delays.tolist()) == delays
    assert torch.equal(joined.to_dense(), sum(part.to_dense() for part in parts()))


@pytest.mark.parametrize("columns", [[0, 1], [0, 0]], ids=["other sources", "the same source"])
def test_learnt_weights_that_are_equal_now_stay_apart(columns: list[int]) -> None:
    leaves = [torch.tensor([0.5], requires_grad=True) for _ in range(2)]
    joined = Synapses.join([shared([row], [columns[row]], leaf) for row, leaf in enumerate(leaves)])
    factors = torch.randn(4, 3, generator=generator())
    found = torch.autograd.grad((joined.to_dense() * factors).sum(), leaves)
    assert [grad.item() for grad in found] == [factors[row, columns[row]].item() for row in range(2)]


def test_one_learnt_weight_of_several_parts_stays_the_leaf() -> None:
    leaf = torch.tensor([0.5], requires_grad=True)
    assert Synapses.join([shared([0], [0], leaf), shared([1, 1], [0, 0], leaf)]).weights is leaf


# Random synapses

LAWS: dict[str, tuple[Any, Any]] = {
    "numbers": (0.004, 0.3),
    "drawn": (Normal(0.004, 0.002, low=0.0), Uniform(0.1, 2.0)),
    "drawn weights": (LogNormal(-0.01, 0.02), None),
}
MAKERS: dict[str, Callable[..., Synapses]] = {
    "probability": lambda **options: Synapses.fixed_probability(60, 60, 0.1, **options),
    "per target": lambda **options: Synapses.fixed_number(60, 60, 7, **options),
    "per target, replaced": lambda **options: Synapses.fixed_number(60, 60, 70, replace=True, **options),
    "per source": lambda **options: Synapses.fixed_number(60, 60, 7, per="source", **options),
    "per source, replaced": lambda **options: Synapses.fixed_number(60, 60, 70, per="source", replace=True, **options),
}


@pytest.mark.parametrize("laws", LAWS)
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("autapses", [True, False])
def test_parts_of_random_synapses_are_those_of_the_whole(maker: str, laws: str, autapses: bool) -> None:
    weight, delay = LAWS[laws]
    make = MAKERS[maker]
    options: dict[str, Any] = {"weight": weight, "delay": delay, "seed": 2**40 + 7, "autapses": autapses}
    whole = make(**options)
    check_record(whole)
    parts = [make(**options, only=only) for only in ((0, 1), (1, 1), (1, 33), (33, 60))]
    for part, (begin, end) in zip(parts, ((0, 1), (1, 1), (1, 33), (33, 60)), strict=True):
        check_record(part)
        assert ((part.targets >= begin) & (part.targets < end)).all()
    assert_same(Synapses.join(parts), whole)
    other = make(**{**options, "seed": 7})
    assert not (whole.count == other.count and torch.equal(whole.targets, other.targets))


@pytest.mark.parametrize("maker", MAKERS)
def test_random_synapses_are_the_same_for_any_number_of_threads(maker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = {
        "probability": lambda: Synapses.fixed_probability(3000, 3000, 0.01, Normal(1.0, 0.5), Uniform(1, 2), seed=1),
    }.get(maker, lambda: Synapses.fixed_number(
        3000, 3000, 20, Normal(1.0, 0.5), Uniform(1, 2), seed=1, per=maker.split(",")[0][4:], replace="," in maker
    ))  # type: ignore[arg-type]  # fmt: skip
    made = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        made.append(make())
    assert_same(made[0], made[1])
    assert_same(made[0], made[2])


@pytest.mark.parametrize("autapses", [True, False])
@pytest.mark.parametrize("per", ["target", "source"])
@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("number", [0, 1, 12, 39, 40])
def test_fixed_number(per: Any, number: int, replace: bool, autapses: bool) -> None:
    if number == 40 and not replace and not autapses:
        with pytest.raises(ValueError, match="number must be at most 39"):
            Synapses.fixed_number(40, 40, 40, 1.0, seed=1, per=per, autapses=False)
        return
    synapses = Synapses.fixed_number(40, 40, number, 1.0, seed=1, per=per, replace=replace, autapses=autapses)
    check_record(synapses)
    dense = synapses.to_dense()
    assert (dense.sum(1 if per == "target" else 0) == number).all()
    assert replace or (dense <= 1).all()
    assert autapses or not dense.diagonal().any()


@pytest.mark.parametrize("probability", [0.0, 1e-300, 1.0])
def test_fixed_probability_at_its_ends(probability: float) -> None:
    synapses = Synapses.fixed_probability(70, 50, probability, 1.0, seed=3)
    check_record(synapses)
    assert synapses.count == (3500 if probability == 1.0 else 0)
    without = Synapses.fixed_probability(50, 50, probability, 1.0, seed=3, autapses=False)
    assert without.count == (2450 if probability == 1.0 else 0) and not without.to_dense().diagonal().any()


@pytest.mark.parametrize(("sources", "neurons"), [(0, 5), (5, 0), (0, 0)])
def test_no_sources_or_no_neurons(sources: int, neurons: int) -> None:
    made = [Synapses.fixed_probability(sources, neurons, 0.5, Uniform(1, 2), Uniform(1, 2), seed=0)]
    made += [
        Synapses.fixed_number(sources, neurons, 0, 1.0, seed=0, per=per, replace=replace)
        for per in ("target", "source")
        for replace in (True, False)
    ]  # type: ignore[call-overload]
    for synapses in made:
        check_record(synapses)
        assert (synapses.sources, synapses.neurons, synapses.count) == (sources, neurons, 0)


@pytest.mark.parametrize("probability", [0.02, 0.3, 0.9])
def test_every_pair_is_equally_probable(probability: float) -> None:
    """Counts by source, by target and by distance within five standard deviations, and fan-ins that vary as they should."""
    sources, neurons = 400, 500
    synapses = Synapses.fixed_probability(sources, neurons, probability, 1.0, seed=11)
    dense = synapses.to_dense().numpy()
    variance = probability * (1 - probability)
    for counts, trials in ((dense.sum(0), neurons), (dense.sum(1), sources)):
        assert np.abs(counts - trials * probability).max() < 5 * math.sqrt(trials * variance)
        assert abs(counts.var() / (trials * variance) - 1) < 5 * math.sqrt(2 / len(counts))
    for both in (dense[:, 1:] * dense[:, :-1], dense[1:] * dense[:-1]):
        assert abs(both.mean() - probability**2) < 5 * math.sqrt(probability / dense.size)


@pytest.mark.parametrize("per", ["target", "source"])
@pytest.mark.parametrize("replace", [True, False])
def test_every_partner_is_equally_probable(per: Any, replace: bool) -> None:
    dense = Synapses.fixed_number(300, 300, 100, 1.0, seed=5, per=per, replace=replace).to_dense().numpy()
    counts = dense.sum(0 if per == "target" else 1)
    variance = 100 * (299 / 300 if replace else 2 / 3)
    assert np.abs(counts - 100).max() < 5 * math.sqrt(variance)
    assert abs(counts.var() / variance - 1) < 5 * math.sqrt(2 / 300)


def values(law: Any, **options: Any) -> np.ndarray[Any, Any]:
    synapses = Synapses.fixed_number(1000, 1000, 100, law, seed=9, dtype=torch.float64, **options)
    return synapses.weights.numpy()


@pytest.mark.parametrize("per", ["target", "source"])
@pytest.mark.parametrize(
    ("law", "reference"),
    [
        (Uniform(-1.0, 3.0), scipy.stats.uniform(-1, 4)),
        (Normal(2.0, 0.5), scipy.stats.norm(2, 0.5)),
        (Normal(2.0, 0.5, low=1.5), scipy.stats.truncnorm(-1, np.inf, 2, 0.5)),
        (Normal(2.0, 0.5, high=1.0), scipy.stats.truncnorm(-np.inf, -2, 2, 0.5)),
        (Normal(0.0, 1.0, low=-0.1, high=2.0), scipy.stats.truncnorm(-0.1, 2)),
        (LogNormal(2.0, 1.0), scipy.stats.lognorm(math.sqrt(math.log(1.25)), scale=2 / math.sqrt(1.25))),
    ],
    ids=["uniform", "normal", "low", "high", "low and high", "log-normal"],
)
def test_values_are_distributed_as_asked(law: Any, reference: Any, per: Any) -> None:
    drawn = values(law, per=per)
    assert len(drawn) == 100_000
    assert scipy.stats.kstest(drawn, reference.cdf).pvalue > 1e-4
    if isinstance(law, Normal):
        assert (law.low is None or drawn.min() >= law.low) and (law.high is None or drawn.max() <= law.high)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 5 / math.sqrt(len(drawn))


def test_values_without_a_spread_and_negative_ones() -> None:
    assert set(values(Normal(2.0, 0.0)).tolist()) == set(values(Uniform(2.0, 2.0)).tolist()) == {2.0}
    assert set(values(LogNormal(-2.0, 0.0)).tolist()) == {-2.0}
    np.testing.assert_array_equal(values(LogNormal(-2.0, 1.0)), -values(LogNormal(2.0, 1.0)))


def test_weights_and_delays_are_independent() -> None:
    synapses = Synapses.fixed_number(1000, 1000, 100, Uniform(1, 2), Uniform(1, 2), seed=9)
    assert synapses.delays is not None
    assert abs(np.corrcoef(synapses.weights.numpy(), synapses.delays.numpy())[0, 1]) < 5 / math.sqrt(synapses.count)


def test_several_synapses_of_a_pair_have_values_of_their_own() -> None:
    synapses = Synapses.fixed_number(3, 4, 50, Uniform(1, 2), Uniform(1, 2), seed=9, replace=True)
    assert synapses.delays is not None
    assert len(set(synapses.weights.tolist())) == len(set(synapses.delays.tolist())) == synapses.count == 200


def test_random_synapses_take_weights_of_tensors() -> None:
    leaf = torch.tensor(0.5, requires_grad=True)
    synapses = Synapses.fixed_probability(60, 60, 0.2, leaf, torch.rand(60, 1, generator=generator()) + 1, seed=1)
    check_record(synapses)
    synapses.to_dense().sum().backward()
    assert leaf.grad is not None and leaf.grad.item() == synapses.count


def test_random_synapses_stay_the_same_in_later_versions() -> None:
    """These numbers are part of what a seed means."""
    synapses = Synapses.fixed_probability(8, 5, 0.3, Normal(1.0, 0.5), Uniform(1.0, 2.0), seed=42)
    assert synapses.source_of().tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 6, 7]
    assert synapses.targets.tolist() == [4, 1, 4, 2, 2, 0, 1, 2, 4, 4]
    assert synapses.weights[:3].tolist() == [1.1861748695373535, 0.9162150621414185, 0.8198534846305847]
    assert synapses.delays is not None
    assert synapses.delays[:3].tolist() == [1.9993983507156372, 1.071123719215393, 1.3015755414962769]
    assert Synapses.fixed_number(8, 5, 3, 1.0, seed=42).targets.tolist() == [0, 3, 4, 0, 2, 0, 1, 3, 1, 3, 4, 1, 4, 2, 2]
    per_source = Synapses.fixed_number(8, 5, 2, 1.0, seed=42, per="source")
    assert per_source.targets.tolist() == [1, 2, 1, 2, 0, 4, 1, 3, 0, 2, 2, 3, 1, 4, 2, 4]


def test_the_functions_behind_the_distributions() -> None:
    x = np.exp(np.linspace(-40, 40, 2001))
    np.testing.assert_allclose([draws.log(value) for value in x], np.log(x), rtol=1e-12, atol=1e-15)
    x = np.linspace(-40, 40, 2001)
    np.testing.assert_allclose([draws.exp(value) for value in x], np.exp(x), rtol=1e-14)
    p = np.concatenate([np.logspace(-300, -1, 500), np.linspace(0.1, 0.9999999, 500)])
    found = [draws.normal_quantile(value) for value in p]
    np.testing.assert_allclose(found, scipy.stats.norm.ppf(p), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose([draws.rate_of(value) for value in p], -np.log1p(-p), rtol=1e-13)
    assert (draws.unit(0, 0), draws.unit(2**32 - 1, 2**32 - 1)) == (2.0**-53, 1 - 2.0**-53)
    assert draws.below(3, 0, 0) == 0 and draws.below(3, 2**32 - 1, 2**32 - 1) == 2
    z = np.linspace(-7, 7, 101)
    np.testing.assert_allclose([draws.normal_share(value) for value in z], scipy.stats.norm.cdf(z), rtol=1e-4, atol=1e-15)


# Errors


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def pair(**changes: Any) -> Synapses:
    return Synapses.from_coo(
        **{"targets": [0, 1], "sources": [2, 0], "weights": [0.5, 0.25], "delays": None, "shape": (2, 3), **changes}
    )


def drawn(**changes: Any) -> Synapses:
    return Synapses.fixed_probability(
        **{"sources": 5, "neurons": 4, "probability": 0.5, "weight": 1.0, "seed": 1, **changes}
    )


def number(**changes: Any) -> Synapses:
    return Synapses.fixed_number(**{"sources": 5, "neurons": 4, "number": 2, "weight": 1.0, "seed": 1, **changes})


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pair(targets=[0]), ValueError, r"targets and sources must be of one length, got 1 and 2; give pairs"),
        (lambda: pair(targets=[0, 2]), ValueError, r"targets must be from 0 to N - 1 = 1, got 2; correct"),
        (lambda: pair(targets=[0, -1]), ValueError, r"targets must be from 0 to N - 1 = 1, got -1; correct"),
        (lambda: pair(sources=[0, 3]), ValueError, r"sources must be from 0 to K - 1 = 2, got 3; correct"),
        (lambda: pair(targets=[0.0, 1.0]), TypeError, r"targets must be integers, got float64; use"),
        (lambda: pair(targets=[True, False]), TypeError, r"targets must be integers, got bool; use"),
        (lambda: pair(sources=torch.ones(2)), TypeError, r"sources must be integers, got a tensor of torch.float32"),
        (lambda: pair(targets=[[0, 1]]), ValueError, r"targets must be one index for each synapse, got shape \[1, 2\]"),
        (lambda: pair(targets=[[0], [1, 1]]), TypeError, r"targets must be a tensor, an array or a list, got list"),
        (
            lambda: pair(targets=torch.zeros(2, dtype=torch.int64, device="meta"), weights=torch.ones(2)),
            ValueError,
            r"all tensors must be on one device, got targets on 'meta', weights on 'cpu'; move them",
        ),
        (lambda: pair(weights=[0.5]*3), ValueError, r"weights must be one number, one for each of S=2 synapses \[2\] or of"),
        (lambda: pair(weights=[0.5, NAN]), ValueError, r"weights must be finite, got nan; correct"),
        (lambda: pair(weights=-INF), ValueError, r"weights must be finite, got -inf; correct"),
        (lambda: pair(weights=1e39), ValueError, r"weights must be finite, got inf; correct"),
        (lambda: pair(weights=["a", "b"]), TypeError, r"weights must be real numbers, got <U1; use numbers"),
        (lambda: pair(weights=np.array([1, 2])), TypeError, r"weights must be real numbers, got int64; use"),
        (lambda: pair(weights=torch.ones(2, dtype=torch.int64)), TypeError, r"weights must be of a floating .*\.float"),
        (lambda: pair(weights=torch.ones(2) * 1j), TypeError, r"weights must be of a floating dtype .*complex64; use .real"),
        (lambda: pair(weights=torch.ones(2).to_sparse()), TypeError, r"weights must be dense, got torch.sparse_coo"),
        (lambda: pair(targets=[0, 0], weights=3e38), ValueError, r"finite sum of magnitudes .* 3.4e\+38, .* neuron 0;"),
        (lambda: pair(targets=[0, 0], weights=-3e38), ValueError, r"finite sum of magnitudes .* 3.4e\+38, .* neuron 0;"),
        (
            lambda: pair(targets=[1, 1], weights=torch.tensor([1.5e308, -1.5e308], dtype=torch.float64)),
            ValueError,
            r"finite sum of magnitudes .* 1.8e\+308, got more for neuron 1;",
        ),
        (lambda: pair(delays=-0.5), ValueError, r"delays must not be negative, got -0.5 ms; correct"),
        (lambda: pair(delays=[0.5, INF]), ValueError, r"delays must be finite, got inf; correct"),
        (lambda: pair(delays=1e40), ValueError, r"delays must be finite, got inf; correct"),
        (lambda: pair(delays=NAN), ValueError, r"delays must be finite, got nan; correct"),
        (lambda: pair(delays=[0.5] * 4), ValueError, r"delays must be one number, one for each of S=2"),
        (lambda: pair(delays=torch.ones(2, requires_grad=True)), ValueError, r"delays must not require a g.*\.detach\(\)"),
        (lambda: pair(shape=5), TypeError, r"shape must be \(N, K\), .* got 5; pass a pair of ints"),
        (lambda: pair(shape=(2, 3, 4)), TypeError, r"shape must be \(N, K\)"),
        (lambda: pair(shape=(-1, 3)), ValueError, r"N must be an int from 0 to 2147483647, got -1"),
        (lambda: pair(shape=(2, 2**31)), ValueError, r"K must be an int from 0 to 2147483647, got 2147483648"),
        (lambda: pair(shape=(2.0, 3)), TypeError, r"N must be an int from 0"),
        (lambda: Synapses.from_torch([[1.0]]), TypeError, r"matrix must be a torch.Tensor, got list; use"),  # type: ignore[arg-type]
        (lambda: Synapses.from_torch(torch.ones(2, 2, dtype=torch.int32)), TypeError, r"matrix must be of a floating dtype"),
        (lambda: Synapses.from_torch(torch.ones(2)), ValueError, r"matrix must be \[N, K\], .* got shape \[2\]"),
        (lambda: Synapses.from_torch(torch.ones(2, 2, 2).to_sparse()), ValueError, r"matrix must be \[N, K\]"),
        (lambda: Synapses.from_torch(torch.ones(2, 2).to_sparse(1)), ValueError, r"matrix must be \[N, K\].* \[2, 2\]"),
        (lambda: Synapses.from_torch(torch.ones(2, 3), torch.ones(2)), ValueError, r"delays must be a number, \[K\]=\[3\]"),
        (lambda: Synapses.from_torch(torch.eye(3).to_sparse(), [1.0] * 9), ValueError, r"delays must be one number, .* S=3"),
        (lambda: Synapses.from_scipy(np.eye(3)), TypeError, r"matrix must be a sparse matrix of SciPy, got ndarray; use"),
        (lambda: Synapses.from_scipy(scipy.sparse.eye_array(3, dtype=int)), TypeError, r"floating dtype, got int64;"),
        (lambda: Synapses.from_scipy(scipy.sparse.coo_array(np.ones(3))), ValueError, r"matrix must be \[N, K\]"),
        (lambda: pair().with_weights(torch.ones(4)), ValueError, r"weights must be one number, one for each of S=2"),
        (lambda: pair().with_weights(0.5), TypeError, r"weights must be a torch.Tensor, got float; use torch.as_tensor"),  # type: ignore[arg-type]
        (lambda: pair().with_weights(torch.ones(2).int()), TypeError, r"weights must be of a floating dtype"),
        (lambda: pair().with_weights(torch.ones(2, device="meta")), ValueError, r"synapses' device 'cpu', got 'meta'; move"),
        (lambda: pair().to(torch.int32), TypeError, r"floating"),
        (
            lambda: pair(delays=0.02).check_delays(0.1),
            ValueError,
            r"a delay must be at least one step of dt=0.1 ms, got 0.02 ms; lengthen it, or make dt smaller",
        ),
        (lambda: pair(delays=[0.04, 1]).check_delays(0.1), ValueError, r"at least one step of dt=0.1 ms, got 0.04 ms"),
        (lambda: pair(delays=1e30).check_delays(0.1), ValueError, r"at most 2,147,483,647 steps of dt=0.1 ms, got 1e"),
        (lambda: pair(delays=1.0).check_delays(0.0), ValueError, r"dt must be a positive finite number"),
        (lambda: Synapses.join([]), ValueError, r"parts must be at least one record of synapses, got none"),
        (lambda: Synapses.join(5), TypeError, r"parts must be a list of records of synapses, got int; put all"),  # type: ignore[arg-type]
        (lambda: Synapses.join(pair()), TypeError, r"parts must be a list of records of synapses, got a single record;"),
        (lambda: Synapses.from_torch(nested()), TypeError, r"matrix must be dense, got a nested tensor; use .to_padded_ten"),
        (lambda: pair(weights=nested()), TypeError, r"weights must be dense, got a nested tensor; use .to_padded_tensor"),
        (lambda: pair(targets=nested()), TypeError, r"targets must be dense, got a nested tensor; use .to_padded_tensor"),
        (lambda: Synapses.join([pair(), 3]), TypeError, r"parts must be records of synapses, got int"),  # type: ignore[list-item]
        (lambda: Synapses.join([pair(), pair(shape=(3, 3))]), ValueError, r"parts must have the same neurons, got 2 and 3;"),
        (lambda: Synapses.join([pair(), pair(shape=(2, 4))]), ValueError, r"parts must have the same sources, got 3 and 4;"),
        (lambda: Synapses.join([pair(), pair().to(torch.float64)]), ValueError, r"the same dtype, got torch.float32 and"),
        (lambda: Synapses.join([pair(), pair(delays=1.0)]), ValueError, r"the same delays, got none and in ms;"),
        (lambda: drawn(probability=1.5), ValueError, r"probability must be a number from 0 to 1, got 1.5; divide percents"),
        (lambda: drawn(probability=NAN), ValueError, r"probability must be a number from 0 to 1, got nan"),
        (lambda: drawn(probability="0.5"), TypeError, r"probability must be a number from 0 to 1, got str"),
        (lambda: drawn(seed=-1), ValueError, r"seed must be an int from 0 to 18446744073709551615, got -1"),
        (lambda: drawn(seed=None), TypeError, r"seed must be an int from 0"),
        (lambda: drawn(sources=2.5), TypeError, r"sources must be an int from 0"),
        (lambda: drawn(autapses=False), ValueError, r"autapses=False needs sources that are the neurons, got 5 "),
        (lambda: drawn(autapses=None), TypeError, r"autapses must be True or False"),
        (lambda: drawn(only=3), TypeError, r"only must be \(begin, end\) or None, got 3; pass a pair of ints"),
        (lambda: drawn(only=(0, 5)), ValueError, r"only\[1\] must be an int from 0 to 4, got 5"),
        (lambda: drawn(only=(3, 2)), ValueError, r"only must be \(begin, end\) with begin <= end, got \(3, 2\); swap them"),
        (lambda: drawn(dtype=torch.int32), TypeError, r"dtype must be torch.float32, torch.float64 or None, got"),
        (lambda: drawn(weight=INF), ValueError, r"weights must be finite, got inf"),
        (lambda: drawn(weight="strong"), TypeError, r"weight must be real numbers"),
        (lambda: drawn(weight=torch.ones(9)), ValueError, r"weight must be one number, one for each of"),
        (lambda: drawn(weight=Normal(1.0, -1.0)), ValueError, r"weight must have low <= high, std >= 0 and, .* correct it"),
        (lambda: drawn(weight=Uniform(2.0, 1.0)), ValueError, r"weight must have low <= high"),
        (lambda: drawn(weight=LogNormal(0.0, 1.0)), ValueError, r"weight must have .* a mean that is not 0, got LogNormal"),
        (lambda: drawn(weight=Normal(1.0, NAN)), ValueError, r"weight must have finite numbers, got Normal"),
        (lambda: drawn(weight=Normal(1.0, 1.0, high=INF)), ValueError, r"leave a limit out that is none"),
        (lambda: drawn(weight=Normal(1.0, "1")), TypeError, r"weight must have numbers, got Normal"),
        (lambda: drawn(weight=Normal(1.0, 0.1, low=3.0)), ValueError, r"limits that leave more than 1e-06 of .* widen them"),
        (lambda: drawn(weight=Normal(1.0, 0.0, low=3.0)), ValueError, r"limits that leave more than 1e-06 of .* widen them"),
        (lambda: drawn(delay=Normal(1.0, 0.1)), ValueError, r"delay must have no negative values, got Normal.* pass low="),
        (lambda: drawn(delay=LogNormal(-1.0, 0.1)), ValueError, r"delay must have no negative values"),
        (lambda: drawn(delay=-1.0), ValueError, r"delays must not be negative, got -1 ms"),
        (lambda: number(number=6), ValueError, r"number must be at most 5, the sources to .* 6; pass replace=True"),
        (lambda: number(number=5, per="source"), ValueError, r"number must be at most 4, the neurons to choose from, got 5"),
        (lambda: number(sources=0, number=1), ValueError, r"at most 0, the sources to choose from, got 1; pass more"),
        (lambda: number(sources=0, number=1, replace=True), ValueError, r"at most 0, the sources to choose from, got 1"),
        (lambda: number(number=-1), ValueError, r"number must be an int from 0"),
        (lambda: number(per="neuron"), ValueError, r"per must be 'target' or 'source', got 'neuron'"),
        (lambda: number(replace=1), TypeError, r"replace must be True or False"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        call()
    assert raised.type is error and "\n" not in str(raised.value)


def test_many_synapses_are_counted_into_the_order_of_a_stable_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of pairs that come several times, of targets and sources that have none, and of a single one."""
    from coba_triton.ops import synapses as module

    generator = torch.Generator().manual_seed(3)
    for count, neurons, sources in ((20_000, 90, 70), (3, 5, 4), (50, 1, 1), (2, 10**6, 10**6)):
        targets, origins = (torch.randint(most, (count,), generator=generator) for most in (neurons, sources))
        weights = torch.arange(count).double()
        made = []
        for counted_from in (0, 10**9):
            monkeypatch.setattr(module, "COUNTED_FROM", counted_from)
            made.append(Synapses.from_coo(targets, origins, weights, shape=(neurons, sources)))
        assert_same(*made)
