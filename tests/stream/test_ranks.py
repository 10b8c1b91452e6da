"""Long runs that several processes share: one result, with the bits of one process.

The functions without ``test_`` in their names run on every rank of a group; see ``ranks.py``.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from coba_triton import (
    CobaLIF,
    CobaLIFParameters,
    CobaLIFRecurrent,
    PoissonSource,
    Record,
    Synapses,
    ZarrSink,
    distributed,
    open_result,
    simulate,
)
from coba_triton.ops import time_blocks
from coba_triton.stream import store
from coba_triton.stream.identity import sums_of
from coba_triton.stream.store import Store
from coba_triton.tools.problems import DT, VALUES
from helpers.marks import slow
from helpers.ranks import Ranks

pytest.importorskip("zarr")
pytestmark = pytest.mark.filterwarnings("ignore:the Euler step", "ignore:.*fire in every step")
N = 30
T = 230
RECORD = Record(
    variables=("v", "g_e"), neurons=[17, 0, 29, 3], populations={"first": range(12), "some": [25, 2, 14]}, inputs=True
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    if "forkserver" not in multiprocessing.get_all_start_methods() or not torch.distributed.is_gloo_available():
        pytest.skip("several processes need torch with gloo, and a system that forks")
    processes = Ranks(tmp_path_factory.mktemp("ranks"), 3)
    yield processes
    processes.close()


def network(kind: str, only: tuple[int, int] | None = None, **changes: Any) -> Any:
    """A network of N neurons; a sparse one with the synapses onto some of them."""
    torch.manual_seed(1)
    p = CobaLIFParameters(**VALUES | {"v_thresh": torch.linspace(-0.15, -0.1, N)} | changes, refractory=0.03)
    if kind == "feed-forward":
        return CobaLIF(p, DT)
    if kind == "dense":
        weights = [torch.round(torch.randn(N, size) * 48) / 1024 for size in (6, N)]
        return CobaLIFRecurrent(
            6, N, p, DT, input_weights=nn.Parameter(weights[0]), recurrent_weights=nn.Parameter(weights[1])
        )
    inputs = Synapses.fixed_probability(6, N, 0.5, 0.12, seed=1, only=only, dtype=torch.float32)
    delay = {"delays": 0.04, "one step": None}[kind]
    synapses = Synapses.fixed_number(N, N, 6, 0.04, delay, seed=2, only=only, dtype=torch.float32)
    return CobaLIFRecurrent(6, N, p, DT, autapses=True, input_weights=inputs, recurrent_weights=synapses)


def source_for(kind: str, steps: int, batch: tuple[int, ...]) -> torch.Tensor:
    if kind == "feed-forward":
        return 0.3 * torch.randn(T, *batch, N, generator=torch.Generator().manual_seed(3))[:steps]
    return (torch.rand(T, *batch, 6, generator=torch.Generator().manual_seed(3)) < 0.3).float()[:steps]


def shared(
    group: Any, kind: str, divide: Any, batch: tuple[int, ...], steps: int, path: Path, options: dict[str, Any]
) -> Any:
    """A rank's part of a run; returns how the result looks to it."""
    only = None
    if divide == "neurons":
        own = distributed.owned_neurons(N, group)
        only = own.start, own.stop
    run = network(kind, only)
    source = source_for(kind, steps, batch)
    result = distributed.simulate(
        run, source, sink=path, divide=divide, group=group, block_steps=64, progress=False, record=RECORD, **options
    )
    return result.steps, result.finished, int(result.spikes[:].sum())


CASES = [
    ("feed-forward", "neurons", ()),
    ("feed-forward", "rows", (5,)),
    ("dense", "rows", (5,)),
    ("delays", "neurons", ()),
    ("delays", "rows", (6,)),
    ("one step", "neurons", (2,)),
]


def assert_same_results(ours: Any, theirs: Any) -> None:
    assert ours.steps == theirs.steps and ours.shape == theirs.shape and ours.finished
    assert np.array_equal(ours.spikes[:], theirs.spikes[:])
    for name in ("v", "g_e"):
        assert np.array_equal(ours.traces[name][:], theirs.traces[name][:]), name
    for name in ("counts", "input_e", "input_i", "recorded"):
        assert np.array_equal(ours.array(name), theirs.array(name)), name
    for one, other in zip(ours.state, theirs.state, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [*slow(1), 2, 3])
@pytest.mark.parametrize(("kind", "divide", "batch"), CASES)
def test_the_result_of_one_process(
    ranks: Ranks, tmp_path: Path, kind: str, divide: str, batch: tuple[int, ...], size: int
) -> None:
    options: dict[str, Any] = {"block_steps": 64, "progress": False, "record": RECORD}
    whole = simulate(network(kind), source_for(kind, T, batch), sink=tmp_path / "whole.zarr", **options)
    count = int(whole.spikes[:].sum())
    assert count > 100
    seen = ranks(size, shared, kind, divide, batch, T, tmp_path / "shared.zarr", {})
    assert seen == [(T, True, count)] * size
    ours = open_result(tmp_path / "shared.zarr")
    assert_same_results(ours, whole)
    assert ours.attributes["config"] == whole.attributes["config"]


@pytest.mark.parametrize(("kind", "divide", "batch"), CASES[::3])
def test_any_number_of_ranks_goes_on(ranks: Ranks, tmp_path: Path, kind: str, divide: str, batch: tuple[int, ...]) -> None:
    """Two ranks begin, three go on, and one process ends the run."""
    path = tmp_path / "run.zarr"
    ranks(2, shared, kind, divide, batch, 70, path, {})
    ranks(3, shared, kind, divide, batch, 140, path, {"resume": True})
    options: dict[str, Any] = {"block_steps": 64, "progress": False, "record": RECORD}
    result = simulate(network(kind), source_for(kind, T, batch), sink=path, resume=True, **options)
    assert_same_results(result, simulate(network(kind), source_for(kind, T, batch), sink=tmp_path / "w.zarr", **options))


def slow_reader(group: Any, path: Path, steps: int, options: dict[str, Any]) -> Any:
    """The last rank takes a second to read how far the run is, between the attributes and the number of steps."""
    read = Store._fixed

    def wait(self: Store) -> Any:
        time.sleep(torch.distributed.get_rank(group))
        return read(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "_fixed", wait)
        return shared(group, "feed-forward", "neurons", (), steps, path, options)


@pytest.mark.slow
def test_a_rank_that_reads_late(ranks: Ranks, tmp_path: Path) -> None:
    """The first rank changes nothing in the result before the others have read what they go on from."""
    for steps in (70, 140, 140):  # the second one makes a block anew, and the third one has nothing to do
        seen = ranks(2, slow_reader, tmp_path / "run.zarr", steps, {"resume": True})
        assert seen[0] == seen[1] and seen[0][:2] == (steps, True)


def said_by(call: Callable[[], object]) -> str:
    """The error of a call, or "nothing"."""
    try:
        call()
    except (FloatingPointError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def diverges(group: Any, kind: str, path: Path) -> str:
    """A run in which the state of the last neuron, which the last rank owns, does not stay finite."""
    own = distributed.owned_neurons(N, group)
    run = network(kind, (own.start, own.stop), tau_syn_exc_inv=torch.where(torch.arange(N) == N - 1, 1e6, 0.2))
    options: dict[str, Any] = {"divide": "neurons", "group": group, "block_steps": 64, "progress": False}
    return said_by(lambda: distributed.simulate(run, source_for(kind, T, ()), sink=path, **options))


@pytest.mark.parametrize("kind", ["feed-forward", "delays"])
def test_a_state_of_one_rank_that_is_not_finite_stops_all(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    for got in ranks(3, diverges, kind, tmp_path / "run.zarr"):
        assert "FloatingPointError: the state is no longer finite after step 64, as the Euler step is unstable" in got
    assert ranks(3, shared, kind, "neurons", (), T, tmp_path / "other.zarr", {})[0][:2] == (T, True)


def refused(group: Any, path: Path, changes: list[dict[str, Any]]) -> str:
    change = {"divide": "neurons", "sink": path} | changes[torch.distributed.get_rank(group)]
    source = change.pop("source", source_for("feed-forward", 70, ()))
    run: Any = CobaLIF(change.pop("p", CobaLIFParameters(**VALUES)), DT)
    if "delay" in change:
        run = CobaLIFRecurrent(N, 4, CobaLIFParameters(**VALUES), DT, delay=change.pop("delay"))
    return said_by(lambda: distributed.simulate(run, source, group=group, progress=False, **change))


def test_what_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    """Before the first step, on all ranks; nothing is written."""
    path = tmp_path / "run.zarr"
    other = CobaLIFParameters(**VALUES | {"g_l": 0.3})
    for changes, expected in (
        (
            [{}, {"p": other}],
            ["ValueError: rank 1 has another run than rank 0: config.parameters.g_l was 0.25 and is 0.3"] * 2,
        ),
        ([{"divide": "columns"}] * 2, ["ValueError: divide must be 'neurons' or 'rows', got 'columns'"] * 2),
        ([{"delay": 0.03}] * 2, ["ValueError: divide='neurons' needs synapses that have their delays"] * 2),
        ([{}, {"resume": 1}], ["RuntimeError: rank 1 cannot go on: TypeError: resume must be", "TypeError: resume must be"]),
        ([{"sink": None}] * 2, ["ValueError: sink must be a path that ends in .zarr"] * 2),
        ([{"divide": "rows"}] * 2, ["ValueError: divide='rows' needs an input with a batch axis"] * 2),
        (
            [{}, {"record": 3}],
            ["RuntimeError: rank 1 cannot go on: TypeError: record must be a Record", "TypeError: record must be a Record"],
        ),
    ):
        for got, message in zip(ranks(2, refused, path, changes), expected, strict=True):
            assert got.startswith(message), got
    assert not path.exists()
    assert ranks(2, refused, path, [{}, {}]) == ["nothing"] * 2
    for got in ranks(2, refused, path, [{}, {}]):
        assert got.startswith("FileExistsError: ") and "exists; continue it with resume=True" in got
    changed = source_for("feed-forward", 70, ()) + 1
    for got in ranks(2, refused, path, [{"source": changed, "resume": True}] * 2):
        assert "was begun with another input" in got


def disk_is_full(group: Any, path: Path, full: int) -> str:
    """A run in which the disk of one rank is full from its first block on; -1: of none."""
    run, source = CobaLIF(CobaLIFParameters(**VALUES), DT), source_for("feed-forward", T, ())
    put = ZarrSink._put

    def refuse(self: Any, name: str, *arguments: Any) -> None:
        if torch.distributed.get_rank(group) == full and name == "spikes":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        put(self, name, *arguments)

    options: dict[str, Any] = {"block_steps": 32, "progress": False, "resume": path.exists()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ZarrSink, "_put", refuse)
        try:
            return str(distributed.simulate(run, source, sink=path, divide="neurons", group=group, **options).steps)
        except OSError as error:
            return str(error)


def test_a_full_disk_of_one_rank_stops_all(ranks: Ranks, tmp_path: Path) -> None:
    """All say how many steps are kept, and go on when there is room."""
    path = tmp_path / "run.zarr"
    for got in ranks(2, disk_is_full, path, 1):  # the second block is its first
        assert "cannot write steps 32 to 64 (No space left on device); 32 steps are kept: make room" in got
    assert ranks(2, disk_is_full, path, -1) == [str(T)] * 2


def without_a_package(group: Any, path: Path, rank: int) -> str:
    """What a run is told where one rank lacks a package that writes results."""
    find = store.import_or_say

    def missing(package: str) -> Any:
        return find("a_package_that_nobody_has" if torch.distributed.get_rank(group) == rank else package)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "import_or_say", missing)
        return said_by(lambda: shared(group, "feed-forward", "neurons", (), 70, path, {}))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_package_that_one_rank_lacks_stops_all(ranks: Ranks, tmp_path: Path, rank: int) -> None:
    for got in ranks(2, without_a_package, tmp_path / "run.zarr", rank):
        assert "ImportError: results in zarr need the package a_package_that_nobody_has, which is not installed" in got


def cannot_read(group: Any, kind: str, path: Path) -> str:
    """A run whose input the last rank cannot read from step 128 on."""
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)

    def parts() -> Iterator[torch.Tensor]:
        for number, part in enumerate(source_for(kind, T, ()).split(64)):
            if number == 2 and rank == size - 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO), "input.npy")
            yield part

    own = distributed.owned_neurons(N, group)
    run = network(kind, (own.start, own.stop))
    options: dict[str, Any] = {"divide": "neurons", "group": group, "block_steps": 64, "progress": False}
    return said_by(lambda: distributed.simulate(run, parts(), sink=path, **options))


@pytest.mark.parametrize(("kind", "kept"), [("feed-forward", 64), ("delays", 128)])
def test_an_input_that_one_rank_cannot_read_stops_all(ranks: Ranks, tmp_path: Path, kind: str, kept: int) -> None:
    """Of unconnected neurons, a block that was read runs ahead, and is not finished."""
    *others, last = ranks(3, cannot_read, kind, tmp_path / "run.zarr")
    assert last == "OSError: [Errno 5] Input/output error: 'input.npy'"
    assert others == [f"RuntimeError: rank 2 cannot go on: {last}"] * 2
    assert open_result(tmp_path / "run.zarr").steps == kept


def other_input(group: Any, path: Path, how: str) -> str:
    """A run in which the source of rank 1 differs from step 100 on, or ends there."""
    x = source_for("feed-forward", 200, ())
    if torch.distributed.get_rank(group) == 1:
        x = x[:100] if how == "shorter" else torch.cat([x[:100], x[100:] + 1])
    source = iter(x.split(50)) if how == "shorter" else x  # chunks do not say how many steps there are
    options: dict[str, Any] = {"divide": "neurons", "group": group, "block_steps": 64, "progress": False}
    return said_by(lambda: distributed.simulate(CobaLIF(dt=DT), source, sink=path, **options))


@pytest.mark.parametrize("how", ["numbers", "shorter"])
def test_ranks_with_different_inputs_stop(ranks: Ranks, tmp_path: Path, how: str) -> None:
    for got in ranks(2, other_input, tmp_path / "run.zarr", how):
        assert got.startswith("ValueError: rank 1 has read another block of source than rank 0; give all ranks the same")
    assert open_result(tmp_path / "run.zarr").steps < 200


def test_a_rank_does_not_write_into_another_result(ranks: Ranks, tmp_path: Path) -> None:
    """As where a folder is not the same one on all machines, and one of them has an earlier result there."""
    path, earlier = tmp_path / "run.zarr", tmp_path / "earlier.zarr"
    simulate(CobaLIF(CobaLIFParameters(**VALUES), DT), source_for("feed-forward", 70, ()), sink=earlier, progress=False)
    before = {file: file.read_bytes() for file in earlier.rglob("*") if file.is_file()}
    for got in ranks(2, refused, path, [{"block_steps": 32}, {"block_steps": 32, "sink": earlier}]):
        assert "is another result on rank 1 than on rank 0; give all ranks the same path, in a folder that all see" in got
    assert {file: file.read_bytes() for file in earlier.rglob("*") if file.is_file()} == before


def late(group: Any, path: Path) -> int:
    """The second rank begins a second later."""
    time.sleep(torch.distributed.get_rank(group))
    return poisson(group, path)


def test_a_rank_that_is_late(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, late, tmp_path / "late.zarr") == ranks(1, poisson, tmp_path / "one.zarr") * 2


def test_a_sum_of_synapses_has_no_order() -> None:
    whole = Synapses.fixed_number(40, 50, 7, 0.1, 0.3, seed=1)
    parts = [Synapses.fixed_number(40, 50, 7, 0.1, 0.3, seed=1, only=(a, b)) for a, b in ((0, 20), (20, 33), (33, 50))]
    sums = sums_of(whole)
    assert {name: sum(sums_of(part)[name] for part in parts) % 2**64 for name in sums} == sums
    each = whole.with_weights(whole.weights.expand(whole.count).clone())
    assert sums_of(each) == sums

    def changed(synapses: Synapses) -> set[str]:
        return {name for name, value in sums_of(synapses).items() if value != sums[name]}

    each.weights[11] *= 1.5
    assert changed(each) == {"weights"}
    assert changed(whole._replace(delays=torch.tensor([0.4]))) == changed(whole._replace(delays=None)) == {"delays"}
    moved = whole.targets.clone()
    moved[5] += 1
    assert changed(whole._replace(targets=moved)) == {"connections", "weights", "delays"}


def poisson(group: Any, path: Path) -> int:
    source = PoissonSource(20_000.0, 100, (4, N), dt=DT, weight=0.5, seed=1)
    result = distributed.simulate(CobaLIF(CobaLIFParameters(**VALUES), DT), source, sink=path, divide="rows", group=group)
    return int(result.spikes[:].sum())


def test_a_source_that_describes_itself(ranks: Ranks, tmp_path: Path) -> None:
    [one], two = ranks(1, poisson, tmp_path / "one.zarr"), ranks(2, poisson, tmp_path / "two.zarr")
    assert one > 20 and two == [one, one]


def uneven(group: Any, path: Path | None, scratch: int) -> Any:
    """A run of 31 neurons, of which one of two ranks has fewer, with little scratch for a launch."""
    own = slice(0, 31) if path is None else distributed.owned_neurons(31, group)
    only = own.start, own.stop
    inputs = Synapses.fixed_probability(6, 31, 0.5, 0.12, seed=1, only=only, dtype=torch.float32)
    synapses = Synapses.fixed_number(31, 31, 6, 0.04, 20 * DT, seed=2, only=only, dtype=torch.float32)
    run = CobaLIFRecurrent(6, 31, CobaLIFParameters(**VALUES), DT, True, input_weights=inputs, recurrent_weights=synapses)
    options: dict[str, Any] = {"block_steps": 192, "progress": False}
    if path is None:
        return simulate(run, source_for("delays", T, ()), **options).spikes[:]
    before, time_blocks.SCRATCH_BYTES = time_blocks.SCRATCH_BYTES, scratch
    try:
        source = source_for("delays", T, ())
        return distributed.simulate(run, source, sink=path, divide="neurons", group=group, **options).spikes[:]
    finally:
        time_blocks.SCRATCH_BYTES = before


def test_ranks_with_unequally_many_neurons_launch_as_many_steps(ranks: Ranks, tmp_path: Path) -> None:
    """Else they would exchange the spikes of other steps. 15 neurons would have launches of 64 steps, and 16 of 32."""
    expected = uneven(None, None, 0)
    assert expected.sum() > 100
    for spikes in ranks(2, uneven, tmp_path / "run.zarr", 33 * 15 * 8):
        assert np.array_equal(spikes, expected)
