"""Sparse networks whose neurons are divided among processes: the bits of one process, whatever the number of ranks is.

The functions without ``test_`` in their names run on every rank of a group; see ``ranks.py``.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from coba_triton import CobaLIFParameters, Synapses, coba_lif_integral, distributed
from coba_triton.distributed import ranks as ranks_module
from coba_triton.tools.problems import NetworkProblem, network_problem
from helpers.bits import assert_same_bits
from helpers.marks import slow, slow_cases
from helpers.ranks import Ranks

SIZES = [2, 3, *slow(1, 4)]
N = 30


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    if "forkserver" not in multiprocessing.get_all_start_methods() or not torch.distributed.is_gloo_available():
        pytest.skip("several processes need torch with gloo, and a system that forks")
    processes = Ranks(tmp_path_factory.mktemp("ranks"), 4)
    yield processes
    processes.close()


def onto(synapses: Synapses, own: slice, leaf: Tensor) -> tuple[Synapses, Tensor]:
    """The synapses onto some neurons, numbered as in the network, and their weights as a leaf."""
    here = (synapses.targets >= own.start) & (synapses.targets < own.stop)
    sources = synapses.source_of()
    each = leaf if leaf.dim() == 2 else leaf.expand(synapses.count)[here]
    each = each.detach().clone()
    delays = synapses.delays
    if delays is not None and delays.dim() == 1 and len(delays) == synapses.count:
        delays = delays[here]
    shape = (synapses.neurons, synapses.sources)
    made = Synapses.from_coo(synapses.targets[here], sources[here], each, delays, shape=shape)
    return made, each


def part(case: NetworkProblem, own: slice) -> tuple[dict[str, Tensor], Any, Any]:
    """The leaves of a problem that belong to some of the neurons, and the synapses onto these."""
    leaves = {name: leaf.detach().clone() for name, leaf in case.leaves().items()}
    for name in case.state._fields:
        leaves[name] = leaves[name][..., own].clone()
    for name in case.parameters:
        if leaves[name].dim():
            leaves[name] = leaves[name][..., own].clone()
    inputs: Any = case.input_weights
    if isinstance(inputs, Synapses):
        inputs, leaves["input_weights"] = onto(inputs, own, leaves["input_weights"])
    else:
        leaves["input_weights"] = leaves["input_weights"][own].clone()
    synapses, leaves["recurrent_weights"] = onto(case.recurrent_weights, own, leaves["recurrent_weights"])
    return leaves, inputs, synapses


def run(case: NetworkProblem, leaves: dict[str, Tensor], inputs: Any, synapses: Any, function: Any, **options: Any) -> Any:
    method = options.pop("method", "super")
    p = CobaLIFParameters(**{name: leaves[name] for name in case.parameters}, method=method, alpha=case.alpha)
    state = type(case.state)(*(leaves[name] for name in case.state._fields))
    weights = inputs.with_weights(leaves["input_weights"]) if isinstance(inputs, Synapses) else leaves["input_weights"]
    recurrent = synapses.with_weights(leaves["recurrent_weights"])
    return function(leaves["x"], state, weights, recurrent, p, case.dt, **options)


def outputs(group: Any, case: NetworkProblem, options: dict[str, Any]) -> list[Tensor]:
    """A rank's spikes and states of a problem."""
    own = distributed.owned_neurons(case.recurrent_weights.neurons, group)
    spikes, state = run(case, *part(case, own), distributed.coba_lif_integral, group=group, **options)
    return [spikes, *state]


def gradients(group: Any, case: NetworkProblem, options: dict[str, Any]) -> dict[str, Tensor]:
    """A rank's gradients of a weighted sum of everything; without a group, one process's."""
    neurons = case.recurrent_weights.neurons
    own = slice(0, neurons) if group is None else distributed.owned_neurons(neurons, group)
    leaves, inputs, synapses = part(case, own)
    for leaf in leaves.values():
        if leaf.is_floating_point():
            leaf.requires_grad_()
    function: Any = coba_lif_integral
    if group is not None:
        function, options = distributed.coba_lif_integral, options | {"group": group}
    spikes, state = run(case, leaves, inputs, synapses, function, **options)
    total = torch.zeros((), dtype=state.v.dtype)
    for number, output in enumerate([spikes, *state]):
        generator = torch.Generator().manual_seed(number)
        weights = torch.randn(*output.shape[:-1], neurons, generator=generator, dtype=torch.float64)[..., own]
        total = total + (output * weights.to(output.dtype)).sum()
    total.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def joined(parts: list[list[Tensor]]) -> list[Tensor]:
    """What the ranks have of all neurons, as one."""
    return [torch.cat(part, -1) for part in zip(*parts, strict=True)]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no delays": ({"delays": "none"}, {"record_states": True}),
    "one delay": ({"delays": "one"}, {"spike_dtype": "bits", "order": "jump_first"}),
    "mixed delays": ({"delays": "mixed"}, {"record_states": True}),
    "exact weights, refractory": ({"exact": True, "refractory": True, "per_neuron": True}, {}),
    "dense graded input": ({"dense_input": True, "graded": True, "dtype": torch.float64}, {"block_steps": 32}),
    "graded input": ({"graded": True, "delays": "one"}, {"spike_dtype": torch.uint8}),
    "counts": ({"x_dtype": torch.uint8, "delays": "mixed"}, {"spike_dtype": torch.bool}),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_one_process(ranks: Ranks, name: str, size: int) -> None:
    problem, options = CASES[name]
    case = network_problem(70, 2, N, **problem)
    if problem.get("dense_input"):
        case.x = torch.round(8 * case.x) / 8  # products with a matrix have the same bits where their sums are exact
    spikes, state = case.run("cpu", **options)
    assert spikes.count_nonzero() > 20
    parts = ranks(size, outputs, case, options | {"backend": "cpu"})
    assert_same_bits(joined(parts), [spikes, *state])


@pytest.mark.parametrize("backend", ["reference", *slow("triton")])
@pytest.mark.parametrize("delays", ["none", "mixed"])
def test_other_backends(ranks: Ranks, backend: str, delays: str) -> None:
    case = network_problem(14, 2, N, delays=delays, refractory=True, dense_input=delays == "none")
    spikes, state = case.run("cpu", record_states=True)
    parts = ranks(2, outputs, case, {"backend": backend, "record_states": True})
    assert_same_bits(joined(parts), [spikes, *state])


def shortest_of(problem: NetworkProblem, steps: int) -> NetworkProblem:
    """The same with delays of ``steps`` and more."""
    synapses = problem.recurrent_weights
    delays = synapses.delays + problem.dt * (steps - 1)
    problem.recurrent_weights = synapses._replace(
        delays=delays, shortest=synapses.shortest + problem.dt * (steps - 1), longest=float(delays.max())
    )
    history = torch.zeros(synapses.check_delays(problem.dt)[1] + steps - 1, *problem.state.z.shape)
    history[-1] = problem.state.z
    problem.state = problem.state._replace(history=history)
    return problem


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_messages_under_way_while_neurons_go_on(ranks: Ranks, steps: int) -> None:
    """With several steps between exchanges, in three blocks, and a sequence in two calls."""
    case = shortest_of(network_problem(70, 2, N, delays="mixed"), steps)
    spikes, state = case.run("cpu", record_states=True)
    options = {"backend": "cpu", "record_states": True, "block_steps": 32}
    assert_same_bits(joined(ranks(3, outputs, case, options)), [spikes, *state])
    x, initial = case.x, case.state
    _, whole = case.run("cpu")
    case.x = x[:33]
    first, *between = joined(ranks(2, outputs, case, {"backend": "cpu"}))
    case.x, case.state = x[33:], type(initial)(*between)
    second, *last = joined(ranks(3, outputs, case, {"backend": "cpu"}))
    assert_same_bits([torch.cat([first, second]), *last], [spikes, *whole])


GRADIENTS: dict[str, dict[str, Any]] = {
    "mixed delays": {"delays": "mixed"},
    "dense input": {"delays": "none", "dense_input": True},
    "one delay": {"delays": "one"},
}


# two ranks are enough for a backend that takes long
@pytest.mark.parametrize(
    ("backend", "size", "name"),
    [
        *(("cpu", size, name) for size in (2, 3) for name in GRADIENTS),
        *slow_cases(*(("cpu", size, name) for size in (1, 4) for name in GRADIENTS)),
        *slow_cases(*(("reference", 2, name) for name in GRADIENTS), ("triton", 2, "one delay")),
    ],
)
def test_gradients(ranks: Ranks, name: str, size: int, backend: str) -> None:
    """Those of one process, in float64 to 1e-12 of the largest: sums over neurons of several ranks are rounded."""
    steps = 14 if backend == "triton" else 45
    case = network_problem(steps, 2, N, torch.float64, refractory=True, per_neuron=True, **GRADIENTS[name])
    expected = gradients(None, case, {"backend": "cpu", "block_steps": 32})
    parts = ranks(size, gradients, case, {"backend": backend, "block_steps": 32})
    for rank, found in enumerate(parts):
        bounds = torch.arange(N).chunk(size)[rank]
        own = slice(int(bounds[0]), int(bounds[-1]) + 1)
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            if name in (*case.state._fields, *case.parameters):
                grad = grad[..., own]
            elif name == "input_weights" and not isinstance(case.input_weights, Synapses):
                grad = grad[own]
            elif name.endswith("weights") and grad.dim() == 1:
                targets = getattr(case, name).targets
                grad = grad[(targets >= own.start) & (targets < own.stop)]
            ours = found[name]
            if name == "recurrent_weights" and grad.dim() == 2:  # one for each source: every rank has a part of its gradient
                ours = torch.stack([other[name] for other in parts]).sum(0)
            assert (ours - grad).abs().max() <= 1e-12 * grad.abs().max(), name


def test_one_rank_has_the_gradients_of_one_process(ranks: Ranks) -> None:
    """Bit for bit by the input and the state, on arbitrary weights of float32."""
    case = network_problem(45, 2, N, delays="one")
    expected, [found] = gradients(None, case, {"backend": "cpu"}), ranks(1, gradients, case, {"backend": "cpu"})
    for name in ("x", "v", "g_e", "g_i", "history"):
        assert_same_bits([found[name]], [expected[name]])


def made_here(group: Any) -> tuple[int, Tensor]:
    """A rank makes the synapses onto its own neurons alone; their number, and the spikes."""
    own = distributed.owned_neurons(200, group)
    only = own.start, own.stop
    inputs = Synapses.fixed_probability(50, 200, 0.2, 0.3, seed=1, only=only)
    synapses = Synapses.fixed_number(200, 200, 20, 0.05, 0.4, seed=2, only=only)
    x = (torch.rand(100, 50, generator=torch.Generator().manual_seed(3)) < 0.1).float()
    p = CobaLIFParameters(tau_syn_exc_inv=0.2, tau_syn_inh_inv=0.1, c_m_inv=5.0, g_l=0.25, v_thresh=-50.0)
    spikes, _ = distributed.coba_lif_integral(x, None, inputs, synapses, p, 0.1, group=group)
    return synapses.count, spikes


def test_no_rank_holds_the_whole_network(ranks: Ranks) -> None:
    [(count, whole)] = ranks(1, made_here)
    assert count == 4000 and whole.any()
    for size in (2, 3):
        parts = ranks(size, made_here)
        assert sum(number for number, _ in parts) == 4000 and max(number for number, _ in parts) < 2200
        assert_same_bits([torch.cat([spikes for _, spikes in parts], -1)], [whole])


def messages(group: Any, rates: list[float]) -> list[tuple[bool, int]]:
    """Exchange spikes of these probabilities, one after the other; whether each went as bits, and how many came back."""
    exchange = ranks_module.Ranks(group)
    exchange.divide(1001)
    sent: list[int] = []
    start = exchange._start

    def watched(parts: Any) -> Any:
        sent.append(parts[0].element_size())
        return start(parts)

    exchange._start = watched  # type: ignore[method-assign]
    found = []
    generator = torch.Generator().manual_seed(5)
    for rate in rates:
        every = (torch.rand(3, 2, 1001, generator=generator) < rate).to(torch.uint8)
        wait = exchange.send_spikes(every[..., exchange.own])
        events = wait()
        assert torch.equal(events.sort().values, torch.nonzero(every.flatten()).flatten())
        found.append((sent[-1] == 1, len(sent)))
    return found


def test_bits_or_lists_whichever_is_shorter(ranks: Ranks) -> None:
    """First bits, as nothing is known; then lists, until one is too short, and bits where they are shorter."""
    for each in ranks(3, messages, [0.001, 0.001, 0.001, 0.03, 0.2, 0.2, 0.0, *[0.0] * 12]):
        as_bits = [bits for bits, _ in each]
        assert as_bits[:6] == [True, False, False, True, True, True] and not as_bits[-1]
        counts = [count for _, count in each]
        assert counts[3] - counts[2] == 2  # a list that was too short, and then bits


def refusal(group: Any, changes: list[dict[str, Any]]) -> str:
    """What a rank raises where each changes its call."""
    change = dict(changes[torch.distributed.get_rank(group)])
    with pytest.MonkeyPatch.context() as patch:
        if version := change.pop("version", None):
            patch.setattr("coba_triton.distributed.integral.package_version", lambda name: version)
        return refusal_of(group, change)


def refusal_of(group: Any, change: dict[str, Any]) -> str:
    case = network_problem(5, 2, 12, delays=change.pop("delays", "one"))
    own = distributed.owned_neurons(12, group)
    leaves, inputs, synapses = part(case, change.pop("own", own))
    case.dt *= change.pop("dt", 1.0)
    if "inputs" in change:
        inputs = change.pop("inputs")(inputs)
        leaves["input_weights"] = inputs.weights if isinstance(inputs, Synapses) else inputs
    try:
        run(case, leaves, inputs, synapses, distributed.coba_lif_integral, group=group, **change)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def without_a_row(inputs: Synapses) -> Tensor:
    return inputs.to_dense()[:3]


def late(inputs: Synapses) -> Synapses:
    return inputs._replace(delays=torch.tensor([0.5]), shortest=0.5, longest=0.5)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            [{}, {"own": slice(0, 12)}],
            [
                "RuntimeError: rank 1 cannot go on: ",
                r"ValueError: input_weights must be the synapses onto the neurons 6 to 11 on rank 1 of 2, got some onto "
                r"neurons 0 to 11; make them with only=\(6, 12\)",
            ],
        ),
        ([{"version": "0.1"}, {"version": "0.2"}], ["ValueError: the version of coba_triton must .* got 0.1, 0.2 on"] * 2),
        ([{}, {"dt": 2.0}], ["ValueError: dt must be the same on every rank, got 0.01, 0.02"] * 2),
        ([{}, {"order": "jump_first"}], ["ValueError: order must be the same on every rank"] * 2),
        ([{}, {"spike_dtype": "words"}], ["RuntimeError: rank 1 cannot go on", "ValueError: spike_dtype must be"]),
        (
            [{"inputs": without_a_row}] * 2,
            [
                r"ValueError: input_weights must be the 6 rows 0 to 5 on rank 0 of 2, got \[3, 6\]",
                r"ValueError: input_weights must be the 6 rows 6 to 11 on rank 1 of 2",
            ],
        ),
        ([{"inputs": late}] * 2, ["ValueError: input_weights must have no delays"] * 2),
    ],
    ids=["neurons", "version", "dt", "order", "argument", "rows", "input delays"],
)  # fmt: skip
def test_what_ranks_disagree_on_is_refused_by_all(ranks: Ranks, changes: list[Any], messages: list[str]) -> None:
    for got, expected in zip(ranks(2, refusal, changes), messages, strict=True):
        assert re.match(expected, got), got
    assert ranks(2, refusal, [{}, {}]) == ["nothing"] * 2  # they go on
