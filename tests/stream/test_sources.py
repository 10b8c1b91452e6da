"""Poisson spikes and the reading of sources in blocks."""

import json
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from coba_triton import CobaLIF, PoissonSource, Record, simulate, stream_blocks
from coba_triton.backend.cpu.draws import philox

STEPS = 700


def poisson(
    rate: Any = 2000.0, steps: int = STEPS, shape: tuple[int, ...] = (7,), dt: float = 0.1, **options: Any
) -> PoissonSource:
    return PoissonSource(rate, steps, shape, dt, **options)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_generator_against_its_published_vectors(counter: list[int], key: list[int], expected: str) -> None:
    words = philox(*map(np.uint32, (*counter, *key)))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


@pytest.mark.parametrize("rate", [2000.0, torch.tensor([0.0, 100.0, 9e3, 50.0, 0.0, 4e4, 0.0])], ids=["one", "each"])
@pytest.mark.parametrize("block", [1, 33, 64, 699, 5000])
def test_blocks_change_no_spike(rate: Any, block: int) -> None:
    source = poisson(rate, seed=5)
    whole = source[:]
    assert whole.shape == (STEPS, 7)
    assert whole.sum() > 0
    blocks = list(stream_blocks(source, block))
    assert [len(b) for b in blocks[:-1]] == [block] * (len(blocks) - 1)
    torch.testing.assert_close(torch.cat(blocks), whole, rtol=0, atol=0)


def test_equal_rates_are_one_rate() -> None:
    assert torch.equal(poisson(250.0)[:], poisson(torch.full((7,), 250.0))[:])


def test_spikes_depend_on_seed_stream_and_step_only() -> None:
    one = poisson(seed=2**63, stream=3)[:]
    assert torch.equal(one, poisson(seed=2**63, stream=3, steps=900)[:STEPS])
    for other in (poisson(seed=2**63 + 1, stream=3), poisson(seed=2**63, stream=4), poisson(seed=2**31, stream=3)):
        assert (one != other[:]).any()
    assert (one[1:] != one[:-1]).any(1).sum() > STEPS / 2


@pytest.mark.parametrize("rate", [30.0, 3000.0, 30_000.0])
def test_counts_are_poisson(rate: float) -> None:
    x = PoissonSource(rate, 4000, (250,), 0.1, seed=1)[:].double()
    expected = rate * 1e-4
    cells = x.numel()
    assert abs(float(x.mean()) - expected) < 5 * math.sqrt(expected / cells)  # five standard deviations
    assert float(x.var() / x.mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / cells + 1 / (cells * expected)))
    for count in range(4):  # the distribution itself
        share = math.exp(-expected) * expected**count / math.factorial(count)
        assert abs(float((x == count).double().mean()) - share) < 5 * math.sqrt(share / cells) + 1e-12
    neighbours = torch.stack([x[:, 1:].flatten(), x[:, :-1].flatten()])
    later = torch.stack([x[1:].flatten(), x[:-1].flatten()])
    for pairs in (neighbours, later):
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 5 / math.sqrt(cells)


def test_rates_of_channels() -> None:
    rates = torch.tensor([[0.0, 500.0], [5000.0, 50.0]])
    x = PoissonSource(rates, 20_000, (2, 2), 0.1, weight=0.5)[:].double()
    expected = rates.double() * 1e-4 * 20_000
    assert ((x.sum(0) / 0.5 - expected).abs() <= 5 * expected.sqrt()).all()


@pytest.mark.parametrize("rate", [2000.0, torch.linspace(0, 5000, 15).view(5, 3)], ids=["one", "each"])
def test_rows_are_those_of_the_whole(rate: Any) -> None:
    whole = poisson(rate, shape=(5, 3), seed=3)[:]
    for rows in (slice(0, 1), slice(1, 4), slice(4, None), slice(None)):
        part = poisson(rate, shape=(5, 3), seed=3, rows=rows)
        assert torch.equal(part[:], whole[:, rows]) and part.shape == whole[:, rows].shape
    assert poisson(rate, shape=(5, 3), rows=slice(-2, None)).describe()["rows"] == (3, 5, 5)


@pytest.mark.parametrize("rate", [-0.0, 0, torch.full((7,), -0.0), 1e-320], ids=["one", "int", "each", "denormal"])
def test_without_a_rate_there_are_no_spikes(rate: Any) -> None:
    assert not poisson(rate)[:].any()


def test_making_many_spikes_is_interrupted() -> None:
    """By Ctrl-C in the thread that makes them; and where a thread reads ahead, when nobody reads on."""
    source = poisson(6e10, steps=10_000)  # half an hour of spikes
    source[:1]  # compile
    for read in (lambda: source[:], lambda: list(stream_blocks(source, 10_000))):
        threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
        begin = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            read()
        assert time.perf_counter() - begin < 10
    assert source[:1].sum() > 0  # and can be read again


def test_integers_of_numpy_and_one_size() -> None:
    want = PoissonSource(2000.0, 50, (3,), 0.1, seed=7, stream=2)
    numbers = {"steps": np.int64(50), "shape": np.int32(3), "seed": np.uint64(7), "stream": np.uint8(2)}
    source = PoissonSource(np.float32(2000.0), dt=np.float64(0.1), weight=np.float32(1), **numbers)  # type: ignore[arg-type]
    assert torch.equal(source[np.int64(0) : np.int64(50)], want[:])
    assert json.dumps(source.describe()) == json.dumps(want.describe())
    assert PoissonSource(1.0, 5, 3).shape == PoissonSource(1.0, 5, [3]).shape == (5, 3)  # type: ignore[comparison-overlap]
    blocks = [len(block) for block in stream_blocks(source, np.int16(20))]  # type: ignore[arg-type]
    assert blocks == [20, 20, 10]


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2", ">u4", ">f2", "<f4", "u2", "?"])
def test_byte_orders_and_kinds_of_numbers(dtype: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 3, (50, 3)).astype(dtype)
    x.tofile(tmp_path / "x.bin")
    mapped = np.memmap(tmp_path / "x.bin", dtype, "r", shape=(50, 3))
    for source in (x, mapped, [x[:30], x[30:]]):
        got = torch.cat(list(stream_blocks(source, 20)))
        np.testing.assert_array_equal(got.numpy(), x)
        assert got.numpy().dtype == x.dtype.newbyteorder("=")
    weak = x.astype(float) / 100
    want = simulate(CobaLIF(dt=0.1), weak.astype(np.float32), record=Record(neurons=[0]))
    for source in (weak.astype(">f4"), mapped / np.float32(100)):
        got = simulate(CobaLIF(dt=0.1), source.astype(np.float32), record=Record(neurons=np.int64(0)))  # type: ignore[arg-type]
        np.testing.assert_array_equal(got.traces["v"][:], want.traces["v"][:])


@pytest.mark.parametrize("form", ["coo", "csr", "csc", "lil", "dia", "bsr"])
@pytest.mark.parametrize("kind", ["array", "matrix"])
def test_sparse_arrays(form: str, kind: str) -> None:
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    x = np.random.default_rng(0).random((50, 8)).astype(np.float32)
    x[x < 0.8] = 0
    source = getattr(sparse, f"{form}_{kind}")(x)
    assert torch.equal(torch.cat(list(stream_blocks(source, 20))), torch.from_numpy(x))


def test_add_adds() -> None:
    source, other = poisson(weight=1.0), poisson(weight=-2.0, stream=1)
    x = source[:]
    other.fill(0, x, add=True)
    assert torch.equal(x, source[:] + other[:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rate": -1.0}, ValueError, "rate must be finite and not negative, in Hz, got -1.0"),
        ({"rate": math.inf}, ValueError, "rate must be finite"),
        ({"rate": "1"}, TypeError, "rate must be a real number or a torch.Tensor, got str"),
        ({"rate": torch.ones(3)}, ValueError, "rate must broadcast to the neurons [7], got [3]"),
        ({"rate": 1e300}, ValueError, "rate times dt must give at most 16,777,216 spikes of a channel"),
        (
            {"rate": torch.full((7,), 1e11)},
            ValueError,
            "and 67,108,864 of all channels in a step, got 1e+07 and 7e+07",
        ),
        ({"rate": 1e308, "dt": 1e308}, ValueError, "got inf and inf"),
        ({"seed": -1}, ValueError, f"seed must be an int from 0 to {2**64 - 1}, got -1"),
        ({"stream": 2**32}, ValueError, f"stream must be an int from 0 to {2**32 - 1}, got {2**32}"),
        ({"seed": 1.0}, TypeError, "seed must be an int from 0 to"),
        ({"shape": 5.0}, TypeError, "every size in shape must be a positive int, got float"),
        ({"shape": (2, 0)}, ValueError, "every size in shape must be a positive int, got 0"),
        ({"steps": 0}, ValueError, "steps must be a positive int, got 0"),
        (
            {"rows": slice(7, 9)},
            ValueError,
            "rows must be a slice of consecutive rows of shape (7,), at least one, got slice",
        ),
        ({"rows": slice(0, 6, 2)}, ValueError, "rows must be a slice of consecutive rows of shape (7,), at least one"),
    ],
)
def test_message(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        poisson(**change)


def chunks(x: Tensor, lengths: list[int]) -> Iterator[Tensor]:
    yield from x.split(lengths)


IN_MEMORY = ["tensor", "numpy", "part", "backwards", "field"]


@pytest.mark.parametrize("form", [*IN_MEMORY, "memmap", "part of a memmap", "read-only", "zarr", "chunks", "arrays"])
def test_forms_of_a_source(form: str, tmp_path: Path) -> None:
    x = torch.randn(130, 3, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x.numpy())
    if form == "zarr":
        zarr = pytest.importorskip("zarr")
        source: Any = zarr.create_array(tmp_path / "x.zarr", data=x.numpy(), chunks=(50, 3))
    else:
        source = {
            "tensor": x,
            "numpy": x.numpy(),
            "part": np.pad(x.numpy(), ((0, 0), (1, 2)))[:, 1:4],
            "backwards": np.ascontiguousarray(x.numpy()[::-1])[::-1],
            "field": np.array([(0, row) for row in x.numpy()], [("tag", "u1"), ("x", "f4", 3)])["x"],
            "memmap": np.load(tmp_path / "x.npy", mmap_mode="r+"),
            "part of a memmap": np.asarray(np.load(tmp_path / "x.npy", mmap_mode="r+"))[:],
            "read-only": np.load(tmp_path / "x.npy", mmap_mode="r"),
            "chunks": chunks(x, [1, 0, 50, 3, 76]),
            "arrays": [x[:64].numpy(), x[64:].numpy()],
        }[form]
    blocks = list(stream_blocks(source, 40))
    assert [len(block) for block in blocks] == [40, 40, 40, 10]
    assert torch.equal(torch.cat(blocks), x)
    if isinstance(source, np.ndarray):  # what can be is read where it is; a file is not, so that a thread reads ahead
        assert np.shares_memory(blocks[1].numpy(), source) == (form in ("numpy", "part"))


def test_batches_of_a_loader() -> None:
    x = torch.randn(9, 3)
    loader = DataLoader(TensorDataset(x), batch_size=4)
    assert torch.equal(torch.cat(list(stream_blocks((batch[0] for batch in loader), 5))), x)
    with pytest.raises(TypeError, match=r"got list; .* such as \(batch\[0\] for batch in loader\)"):
        simulate(CobaLIF(dt=0.1), loader)


def test_error_of_a_source_is_passed_on() -> None:
    def broken() -> Iterator[Tensor]:
        yield torch.zeros(10, 2)
        raise RuntimeError("the microphone is off")

    blocks = stream_blocks(broken(), 10)
    assert next(blocks).shape == (10, 2)
    with pytest.raises(RuntimeError, match="the microphone is off"):
        next(blocks)


class Promises:
    """An array that gives, from step 64 on, what its shape does not say."""

    shape = (200, 3)

    def __init__(self, give: Callable[[int], Any], first: int = 64) -> None:
        self.give, self.first = give, first

    def __getitem__(self, steps: slice) -> Any:
        count = steps.stop - steps.start
        return torch.zeros(count, 3) if steps.start < self.first else self.give(count)


@pytest.mark.parametrize("first", [0, 64])
@pytest.mark.parametrize(
    "give",
    [
        lambda count: torch.zeros(count - 1, 3),
        lambda count: torch.zeros(count + 1, 3),
        lambda count: torch.zeros(count, 1),
        lambda count: torch.zeros(count, 4),
        lambda count: torch.zeros(count),
        lambda count: torch.zeros(1, count, 3),
        lambda count: torch.zeros(count, 3).to(torch.complex64),
        lambda count: torch.zeros(count, 3, dtype=torch.float64),
        lambda count: np.zeros((count, 3), np.int16),
        lambda count: 0.0,
    ],
    ids=["short", "long", "one channel", "more channels", "flat", "batch", "complex", "dtype", "integers", "number"],
)
def test_a_source_that_breaks_its_word_is_refused(give: Callable[[int], Any], first: int) -> None:
    """Never are spikes of other steps or channels than those that were asked for taken for them."""
    source = Promises(give, first)
    own = first == 0 and isinstance(give(2), Tensor | np.ndarray) and give(2).shape == (2, 3)
    message = "source must be real" if own else "source must give .* as its shape and its first steps say, got"
    if own and not np.iscomplexobj(give(2)):
        assert len(list(stream_blocks(source, 64))) == 4  # a dtype of its own from the beginning
        return
    with pytest.raises((TypeError, ValueError), match=message):
        list(stream_blocks(source, 64))
    with pytest.raises((TypeError, ValueError), match=message):
        simulate(CobaLIF(dt=0.1), source, block_steps=64, progress=False)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([torch.zeros(2, 3).to(torch.complex64)], TypeError, "source must be real, spikes as bool or integers, got"),
        (torch.zeros(40, 3, dtype=torch.complex128), TypeError, "source must be real"),
        ([torch.tensor(1.0)], ValueError, "every chunk must have a leading time axis [t, ...], got a 0-dim one"),
        ([torch.zeros(2, 3), torch.tensor(1.0)], ValueError, "every chunk must be [t, ...] = [t, 3] of torch.float32"),
        (3, TypeError, "source must be a tensor, an array that gives its steps as slices"),
        (torch.tensor(1.0), ValueError, "source must have a leading time axis [T, ...], got a 0-dim array"),
        (torch.eye(3).to_sparse(), TypeError, "source must be dense, got a tensor of torch.sparse_coo; use .to_dense()"),
        (np.array(["a"]), TypeError, "source must have a dtype that torch has, got <U1; convert it with .astype"),
        (np.zeros((4, 2), object), TypeError, "source must have a dtype that torch has, got object"),
        ([np.zeros((4, 2), np.longdouble)], TypeError, "source must have a dtype that torch has, got float128"),
        (np.ma.masked_equal([[0, 1.0]], 1.0), ValueError, "got a masked array; put one there with .filled(0)"),
        ([], ValueError, "source must have at least one chunk [t, ...], got an empty iterator"),
        *(
            (source, TypeError, f"every chunk of source must be a tensor or an array [t, ...], got {got}; if a loader gives")
            for source, got in (
                (DataLoader(TensorDataset(torch.zeros(8, 3)), batch_size=4), "list"),
                ([(torch.zeros(4, 3), torch.zeros(4))], "tuple"),
                ([{"x": torch.zeros(4, 3)}], "dict"),
                ([[0.0, 1.0], [1.0, 0.0]], "list"),
                ({"x": torch.zeros(4, 3)}, "str"),
                ("x.npy", "str"),
            )
        ),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], ValueError, "every chunk must be [t, ...] = [t, 3] of torch.float32"),
    ],
)
def test_message_for_a_source(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        list(stream_blocks(source, 10))
