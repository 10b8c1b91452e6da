"""Several processes: data parallel training and long runs, and recurrent networks whose neurons are divided among them.

The functions without ``test_`` in their names run on every rank of a group; see ``ranks.py``.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coba_triton import (
    CobaLIF,
    CobaLIFParameters,
    CobaLIFRecurrent,
    CobaLIFState,
    PoissonSource,
    Record,
    Synapses,
    coba_lif_integral,
    distributed,
    open_result,
    simulate,
)
from coba_triton.distributed import ranks as ranks_module
from coba_triton.tools.problems import DT, VALUES, RecurrentProblem, recurrent_problem
from helpers.bits import assert_same_bits
from helpers.marks import slow_cases
from helpers.ranks import Ranks

# Sums and products of these, of weights on a coarse grid, and of the surrogate `triangle`, are exact in float64 for a few
# steps: any order of the sums over neurons, rows and ranks gives the same bits.
EXACT = {
    "tau_syn_exc_inv": 1.0,
    "tau_syn_inh_inv": 1.0,
    "c_m_inv": 1.0,
    "g_l": 0.5,
    "e_rev_I": -2.0,
    "e_rev_E": 4.0,
    "v_rest": 0.0,
    "v_reset": -1.0,
    "v_thresh": 1.0,
}
EXACT_DT = 0.5


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    if "forkserver" not in multiprocessing.get_all_start_methods() or not torch.distributed.is_gloo_available():
        pytest.skip("several processes need torch with gloo, and a system that forks")
    processes = Ranks(tmp_path_factory.mktemp("ranks"), 3)
    yield processes
    processes.close()


def grid(*shape: int, seed: int, step: float = 0.25) -> Tensor:
    """Multiples of ``step`` around 0, in float64."""
    return torch.randint(-4, 6, shape, generator=torch.Generator().manual_seed(seed)).double() * step


def exact_problem(steps: int, batch: int, neurons: int) -> RecurrentProblem:
    """Whatever is computed of it, gradients by the surrogate ``triangle`` included, is exact."""
    spikes, v = (grid(batch, neurons, seed=1) > 0.25).double(), grid(batch, neurons, seed=2, step=1.0)
    g_e, g_i = (grid(batch, neurons, seed=seed, step=0.125).abs() for seed in (3, 4))
    state = CobaLIFState(spikes, v, g_e, g_i)
    weights = grid(neurons, 5, seed=5), grid(neurons, neurons, seed=6)
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in EXACT.items()}
    x = (grid(steps, batch, 5, seed=7) > 0).double()
    return RecurrentProblem(x, state, *weights, numbers, alpha=0.5, dt=EXACT_DT)


def own_part(case: RecurrentProblem, own: slice) -> dict[str, Tensor]:
    """The leaves of a problem that belong to some of the neurons, and those that are shared."""
    leaves = {name: leaf.detach().clone() for name, leaf in case.leaves().items()}
    for name in case.state._fields:
        leaves[name] = leaves[name][..., own].clone()
    for name in ("input_weights", "recurrent_weights", *(n for n in case.parameters if leaves[n].dim())):
        leaves[name] = leaves[name][own].clone()
    return leaves


def run(case: RecurrentProblem, leaves: dict[str, Tensor], function: Any, method: str, **options: Any) -> tuple[Tensor, Any]:
    p = CobaLIFParameters(**{name: leaves[name] for name in case.parameters}, method=method, alpha=case.alpha)
    state = type(case.state)(*(leaves[name] for name in case.state._fields))
    weights = leaves["input_weights"], leaves["recurrent_weights"]
    return function(leaves["x"], state, *weights, p, case.dt, **options)


def outputs(group: Any, case: RecurrentProblem, options: dict[str, Any]) -> list[Tensor]:
    """A rank's spikes and states of a problem."""
    leaves = own_part(case, distributed.owned_neurons(case.input_weights.shape[0], group))
    spikes, state = run(case, leaves, distributed.coba_lif_integral, "super", group=group, **options)
    return [spikes, *state]


def gradients(group: Any, case: RecurrentProblem, method: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """A rank's gradients of a weighted sum of everything; without a group, one process's."""
    neurons = case.input_weights.shape[0]
    own = slice(0, neurons) if group is None else distributed.owned_neurons(neurons, group)
    leaves = own_part(case, own)
    for leaf in leaves.values():
        leaf.requires_grad_()
    function = coba_lif_integral
    if group is not None:
        function, options = distributed.coba_lif_integral, options | {"group": group}
    spikes, state = run(case, leaves, function, method, **options)
    weighted = [
        (o * grid(*o.shape[:-1], neurons, seed=i)[..., own].to(o.dtype)).sum() for i, o in enumerate([spikes, *state])
    ]
    torch.stack(weighted).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_exact(gradients: dict[str, Tensor]) -> None:
    """None is 0, and all are multiples of 2^-40, far above where float64 rounds."""
    for name, grad in gradients.items():
        scaled = grad * 2.0**40
        assert grad.any() and torch.equal(scaled, scaled.round()) and scaled.abs().max() < 2**53, name


def joined(parts: list[list[Tensor]]) -> list[Tensor]:
    """What the ranks have of all neurons, as one."""
    return [torch.cat(part, -1) for part in zip(*parts, strict=True)]


# The interpreter takes long for each process: two are enough to show that its kernels do what the others do.
RUNS = [("cpu", 2), ("cpu", 3), *slow_cases(("cpu", 1), ("triton", 2))]
ALL_RUNS = [("reference", 2), ("reference", 3), *slow_cases(("reference", 1)), *RUNS]


@pytest.mark.parametrize(("backend", "size"), RUNS)
@pytest.mark.parametrize("refractory", [False, True], ids=["", "refractory"])
def test_neurons_of_several_ranks_have_the_bits_of_one_process(
    ranks: Ranks, backend: str, refractory: bool, size: int
) -> None:
    """On arbitrary weights; 37 neurons, which 2 and 3 do not divide, in three blocks."""
    case = recurrent_problem(70, 2, 37, exact=False, per_neuron=refractory, refractory=refractory)
    options: dict[str, Any] = {"record_states": True, "block_steps": 32}
    spikes, trace = case.run("cpu", path="events", **options)
    assert spikes.sum() > 100
    parts = ranks(size, outputs, case, options | {"backend": backend})
    assert [part[0].shape[-1] for part in parts] == [len(rows) for rows in torch.arange(37).chunk(size)]
    assert_same_bits(joined(parts), [spikes, *trace])


@pytest.mark.parametrize(("backend", "size"), ALL_RUNS)
def test_orders_inputs_and_formats_on_exact_weights(ranks: Ranks, backend: str, size: int) -> None:
    """Dense graded input, graded first spikes, parameters of each neuron, bits; a sequence in two calls."""
    case = recurrent_problem(41, 3, 20, exact=True, binary=False, per_neuron=True, dtype=torch.float64)
    case.state = case.state._replace(z=grid(3, 20, seed=8))
    options: dict[str, Any] = {"order": "jump_first", "spike_dtype": "bits"}
    spikes, final = case.run("reference", **options)
    parts = ranks(size, outputs, case, options | {"backend": backend})
    assert_same_bits(joined(parts), [spikes, *final])

    whole, x = case.run("reference"), case.x
    case.x = x[:9]
    first, *state = joined(ranks(size, outputs, case, {"backend": backend}))
    case.x, case.state = x[9:], CobaLIFState(*state)
    second, *state = joined(ranks(size, outputs, case, {"backend": backend}))
    assert_same_bits([torch.cat([first, second]), *state], [whole[0], *whole[1]])


def without_batch(group: Any, case: RecurrentProblem) -> list[Tensor]:
    case.x, case.state = case.x[:, 0], CobaLIFState(*(field[0] for field in case.state))
    return outputs(group, case, {})


def test_sequences_without_a_batch_or_without_steps(ranks: Ranks) -> None:
    case = recurrent_problem(20, 2, 9)
    spikes, final = case.run("cpu")
    assert_same_bits(joined(ranks(2, without_batch, case)), [spikes[:, 0], *(field[0] for field in final)])
    case.x = case.x[:0]
    assert_same_bits(joined(ranks(2, outputs, case, {})), [spikes[:0], *case.state])


@pytest.mark.filterwarnings("ignore:the Euler step overshoots")
@pytest.mark.parametrize(("backend", "size"), ALL_RUNS)
@pytest.mark.parametrize("record", [False, True], ids=["final", "recorded"])
def test_gradients_are_those_of_one_process(ranks: Ranks, backend: str, size: int, record: bool) -> None:
    """By everything, bit for bit: with exact sums."""
    case = exact_problem(4, 2, 11)
    options: dict[str, Any] = {"record_states": record}
    expected = gradients(None, case, "triangle", options | {"backend": "reference"})
    assert_exact(expected)
    parts = ranks(size, gradients, case, "triangle", options | {"backend": backend})
    for rank, part in enumerate(parts):
        own = torch.arange(11).chunk(size)[rank]
        for name, grad in expected.items():
            if name in CobaLIFState._fields:
                grad = grad[..., own]
            elif "weights" in name:
                grad = grad[own]
            assert_same_bits([part[name]], [grad])


def test_gradients_through_several_blocks_on_arbitrary_weights(ranks: Ranks) -> None:
    """Every neuron sends to one other: what its ranks send back to a neuron is one product, in any order of the sum."""
    case = recurrent_problem(70, 2, 37, exact=False)
    targets = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    weights = torch.zeros(37, 37)
    weights[targets, torch.arange(37)] = 3 * case.recurrent_weights[targets, torch.arange(37)]
    case.recurrent_weights = weights
    options: dict[str, Any] = {"backend": "cpu", "block_steps": 32}
    expected = gradients(None, case, "super", options | {"path": "events"})
    parts = ranks(2, gradients, case, "super", options)
    for name in ("recurrent_weights", "input_weights"):
        assert expected[name].any()
        assert_same_bits([torch.cat([part[name] for part in parts])], [expected[name]])
    for name in CobaLIFState._fields:
        assert_same_bits([torch.cat([part[name] for part in parts], -1)], [expected[name]])


def test_gradients_with_a_refractory_period(ranks: Ranks) -> None:
    """In float64 those of one process, within rounding; each rank has the periods of its own neurons."""
    case = recurrent_problem(40, 2, 9, torch.float64, per_neuron=True, refractory=True)
    expected = gradients(None, case, "super", {"backend": "reference"})
    for rank, part in enumerate(ranks(2, gradients, case, "super", {"backend": "cpu"})):
        own = torch.arange(9).chunk(2)[rank]
        for name in ("v", "g_e", "v_reset", "v_thresh", "recurrent_weights"):
            wanted = expected[name][own] if name == "recurrent_weights" else expected[name][..., own]
            assert wanted.any()
            torch.testing.assert_close(part[name], wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


def refusal(group: Any, changes: list[dict[str, Any]]) -> str:
    """What a rank raises where each changes its call to its own options and leaves."""
    case = exact_problem(4, 2, 11)
    leaves = own_part(case, distributed.owned_neurons(11, group))
    options = dict(changes[torch.distributed.get_rank(group)])
    leaves |= {name: change(leaves[name]) for name in list(options) if name in leaves for change in [options.pop(name)]}
    try:
        run(case, leaves, distributed.coba_lif_integral, "super", group=group, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def synapses(x: Tensor) -> Synapses:
    return Synapses.from_torch(x)


def layout(x: Tensor) -> Tensor:
    return x.to_sparse()


def rows(x: Tensor) -> Tensor:
    return x[:-1]


def columns(x: Tensor) -> Tensor:
    return x[:, :-1]


def single(x: Tensor) -> Tensor:
    return x.float()


def requiring(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ([{"x": rows}, {}], [r"ValueError: \[T, \*batch\] must be the same on every rank, got \[3, 2\], \[4, 2\]"] * 2),
        ([{"order": "jump_first"}, {}], ["ValueError: order must be the same .* got jump_first, decay_first"] * 2),
        ([{"backend": "reference"}, {}], ["ValueError: backend must be the same on every rank, got reference, cpu"] * 2),
        ([{}, {"block_steps": 2}], ["ValueError: block_steps must be the same on every rank, got None, 2"] * 2),
        ([{"x": requiring}, {}], ["ValueError: whether anything requires a gradient must be the same"] * 2),
        ([{"x": requiring}, {"v": requiring}], [r"ValueError: which of input_tensor .* got \['input_tensor'\], \[\]"] * 2),
        (
            [{}, {"recurrent_weights": rows}],
            [
                "RuntimeError: rank 1 cannot go on: ",
                r"ValueError: recurrent_weights must be the 5 rows 6 to 10 on rank 1 of 2, as .* \[4, 11\]; take the rows",
            ],
        ),
        (
            [{"recurrent_weights": synapses}, {}],
            ["ValueError: whether synapses are sparse must be the same on every rank, got True, False"] * 2,
        ),
        (
            [{"input_weights": layout}, {"input_weights": layout}],
            ["TypeError: recurrent_weights must be coba_triton.Synapses or a sparse matrix where .* got a dense matrix"] * 2,
        ),
        ([{"order": "sideways"}, {}], ["ValueError: order must be 'decay_first'", "RuntimeError: rank 0 cannot go on"]),
        (
            [{"recurrent_weights": columns}, {}],
            ["ValueError: input_weights must be the 5 rows 0 to 4 on rank 0 of 2", "RuntimeError: rank 0 cannot go on"],
        ),
    ],
    ids=[
        "steps",
        "order",
        "backend",
        "blocks",
        "gradient",
        "shared gradient",
        "rows",
        "synapses",
        "layout",
        "argument",
        "columns",
    ],
)
def test_what_ranks_disagree_on_is_refused_by_all(ranks: Ranks, changes: list[Any], messages: list[str]) -> None:
    for got, expected in zip(ranks(2, refusal, changes), messages, strict=True):
        assert re.match(expected, got), got
    assert ranks(2, refusal, [{}, {}]) == ["nothing"] * 2  # they go on


def shares(group: Any, neurons: int) -> tuple[int, int] | str:
    try:
        own = distributed.owned_neurons(neurons, group)
    except ValueError as error:
        return str(error)
    return own.start, own.stop


def test_owned_neurons(ranks: Ranks) -> None:
    for neurons in (3, 5, 8, 100):
        chunks = torch.arange(neurons).chunk(3)
        assert ranks(3, shares, neurons) == [(int(chunk[0]), int(chunk[-1]) + 1) for chunk in chunks]
    message = "every rank must own a neuron, and 3 ranks of ceil(4 / 3) = 2 neurons leave the last one without; use 2 ranks"
    assert ranks(3, shares, 4) == [message] * 3


def test_every_byte_is_packed_and_unpacked() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)
    spikes = ((every[..., None] >> torch.arange(8)) & 1).to(torch.uint8).flatten(1)
    assert torch.equal(ranks_module.pack(spikes), every)
    assert torch.equal(ranks_module.unpack(every), spikes)


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="needs a process group, and there is none; start the program with torchrun"):
        distributed.owned_neurons(10)


@pytest.mark.slow
def test_the_benchmark_runs_under_torchrun() -> None:
    """As the README starts it, on a port that is free."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).parents[1] / "bench" / "neuron_parallel.py"
    run = subprocess.run(
        [*torchrun, script, "--neurons", "45", "--batch", "2", "--steps", "70", "--compare"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "2 processes" in run.stdout and run.stdout.rstrip().endswith("words of 32 steps that differ: 0")


def leaves_without_steps(group: Any, case: RecurrentProblem) -> dict[str, Tensor]:
    case.x = case.x[:0]
    return gradients(group, case, "triangle", {"record_states": False})


def test_gradients_of_no_steps(ranks: Ranks) -> None:
    parts = ranks(2, leaves_without_steps, exact_problem(4, 2, 11))
    for part, own in zip(parts, torch.arange(11).chunk(2), strict=True):
        assert part["x"].shape == (0, 2, 5) and not part["recurrent_weights"].any()
        assert_same_bits([part["v"]], [grid(2, 11, seed=2)[..., own]])  # of the loss by the final v, which is the first


def simulate_rows(group: Any, network: Any, options: dict[str, Any], x: Tensor | None, folder: Path) -> Path:
    """A rank simulates its part of a batch of 5."""
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    rows = slice(5 * rank // size, 5 * (rank + 1) // size)
    source = PoissonSource(**options, rows=rows) if x is None else x[:, rows]
    record, path = Record(variables=("v", "g_e"), neurons=[0, 4]), folder / f"{size}-{rank}.zarr"
    simulate(network, source, sink=path, record=record, block_steps=64)
    return path


@pytest.mark.parametrize("kind", ["feed-forward", "recurrent"])
@pytest.mark.parametrize("source", ["poisson", "tensor"])
def test_a_batch_in_parts_is_the_batch(ranks: Ranks, tmp_path: Path, kind: str, source: str) -> None:
    """Long runs of the rows of a batch, a file a process, read as one."""
    pytest.importorskip("zarr")
    p = CobaLIFParameters(**VALUES)
    torch.manual_seed(0)
    network: Any = CobaLIF(p, DT) if kind == "feed-forward" else CobaLIFRecurrent(9, 20, p, DT)
    options = {"rate": 20_000.0, "steps": 200, "shape": (5, 9), "dt": DT, "weight": 0.5, "seed": 1}
    x = None if source == "poisson" else PoissonSource(**options)[:]
    [whole] = [open_result(path) for path in ranks(1, simulate_rows, network, options, x, tmp_path)]
    parts = open_result(ranks(2, simulate_rows, network, options, x, tmp_path))
    assert parts.shape == whole.shape and parts.steps == whole.steps == 200 and parts.finished
    assert whole.spikes[:].sum() > 100
    for ours, theirs in zip(parts.events(7, 150), whole.events(7, 150), strict=True):
        assert np.array_equal(ours, theirs)
    assert np.array_equal(parts.spikes[:], whole.spikes[:]) and np.array_equal(
        parts.spikes[33:70, 3], whole.spikes[33:70, 3]
    )
    cells = whole.neurons // 5
    assert parts.recorded.tolist() == [0, 4, 2 * cells, 2 * cells + 4]
    for name in ("v", "g_e"):
        assert np.array_equal(parts.traces[name][:, :2], whole.traces[name][:])
    assert (parts.intervals().number == whole.intervals().number).all()


def test_results_of_different_runs_are_not_read_as_one(tmp_path: Path) -> None:
    for dt in (0.1, 0.2):
        simulate(CobaLIF(dt=dt), torch.zeros(10, 2, 3), sink=tmp_path / f"{dt}.npz")
    with pytest.raises(ValueError, match=r"must be of the same neurons .* dt_ms was 0.1 and is 0.2; open each by itself"):
        open_result([tmp_path / "0.1.npz", tmp_path / "0.2.npz"])


def feed_forward() -> nn.Module:
    linear = nn.Linear(5, 11, bias=False)
    linear.weight = nn.Parameter(grid(11, 5, seed=5, step=0.5))
    p = CobaLIFParameters(**EXACT, method="triangle", alpha=0.5)
    return nn.Sequential(linear, CobaLIF(p, EXACT_DT, learn=("v_thresh", "tau_syn_exc_inv"))).double()


def recurrent() -> nn.Module:
    p = CobaLIFParameters(**EXACT, method="triangle", alpha=0.5)
    network = CobaLIFRecurrent(5, 11, p, EXACT_DT, learn=("v_reset", "e_rev_E")).double()
    network.input_weights = nn.Parameter(grid(11, 5, seed=5))
    network.recurrent_weights = nn.Parameter(grid(11, 11, seed=6))
    return network


def parameter_gradients(group: Any, make: Any) -> dict[str, Tensor]:
    """Of a loss of some rows of the batch, the mean over the ranks; without a group, of the sum of all rows."""
    network, x = make(), (grid(3, 4, 5, seed=7) > 0).double()
    rows = slice(None)
    if group is not None:
        rows = slice(2 * torch.distributed.get_rank(group), 2 * torch.distributed.get_rank(group) + 2)
        network = DistributedDataParallel(network, process_group=group)
    spikes, state = network(x[:, rows])
    ((spikes * grid(3, 4, 11, seed=8)[:, rows]).sum() + (state.v * grid(4, 11, seed=9)[rows]).sum()).backward()
    return {name.removeprefix("module."): value.grad for name, value in network.named_parameters()}


@pytest.mark.parametrize("make", [feed_forward, recurrent])
def test_data_parallel_training_has_the_gradients_of_one_process(ranks: Ranks, make: Any) -> None:
    """DistributedDataParallel around the modules: bit for bit, with exact sums."""
    expected = parameter_gradients(None, make)
    assert_exact(expected)
    for part in ranks(2, parameter_gradients, make):
        assert part.keys() == expected.keys()
        assert_same_bits(part.values(), [grad / 2 for grad in expected.values()])
