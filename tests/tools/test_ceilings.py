"""What a case needs at least, and how near to it a machine can come."""

import dataclasses

import pytest
import torch

from coba_triton.tools import ceilings
from coba_triton.tools.ceilings import Ceilings, Work
from coba_triton.tools.problems import Case

STEPS, BATCH, NEURONS = 4, 2, 10
SIZE = STEPS * BATCH * NEURONS


def test_the_longer_of_both_times_is_the_least() -> None:
    machine = Ceilings(bytes=100.0, flops=10.0)
    assert Work(200.0, 10.0).least(machine) == (2.0, "memory")
    assert Work(200.0, 30.0).least(machine) == (3.0, "arithmetic")


def test_a_machine_is_measured() -> None:
    found = ceilings.measure(torch.device("cpu"))
    assert 1e8 < found.bytes < 1e13 and 1e8 < found.flops < 1e14


@pytest.mark.parametrize("kind", ["feed_forward", "recurrent"])
def test_the_operations_of_a_step_do_not_depend_on_its_size(kind) -> None:
    counts = {
        ceilings.operations_of_a_step(Case("", kind, 3, batch, neurons).build(), kind)
        for batch, neurons in ((1, 7), (3, 64))
    }
    assert len(counts) == 1 and 20 <= counts.pop() <= 40


@pytest.mark.parametrize("train", [False, True])
def test_unconnected_neurons_move_their_input_and_their_result(train: bool) -> None:
    case = Case("", "feed_forward", STEPS, BATCH, NEURONS, train=train)
    problem = case.build()
    result = torch.empty(STEPS, BATCH, NEURONS)
    found = ceilings.work(case, problem, result, result)
    passes = 1 + train
    assert found == Work(4 * SIZE * (passes + 1), passes * SIZE * ceilings.operations_of_a_step(problem, "feed_forward"))


@pytest.mark.parametrize("train", [False, True])
def test_a_recurrent_network_sums_over_the_events_that_arrive(train: bool) -> None:
    case = Case("", "recurrent", STEPS, BATCH, NEURONS, train=train)
    problem = case.build()
    problem.x = torch.zeros_like(problem.x)
    problem.x[1, 0, :3] = 1
    spikes = torch.zeros(STEPS, BATCH, NEURONS)
    result = torch.empty(NEURONS, NEURONS) if train else spikes
    silent = ceilings.work(dataclasses.replace(case), problem, spikes, result)
    passes = 1 + train
    neurons = passes * SIZE * ceilings.operations_of_a_step(problem, "recurrent")
    back = 2 * SIZE * NEURONS if train else 0
    assert silent.flops == neurons + 2 * 3 * NEURONS * passes + back
    assert silent.bytes == passes * problem.x.nbytes + result.nbytes + 4 * (NEURONS * 100 + NEURONS**2)
    spikes[1, 1, :5] = 1  # they arrive in the next step
    spikes[-1] = 1  # these arrive after the end
    assert ceilings.work(case, problem, spikes, result).flops == silent.flops + 2 * 5 * NEURONS * (passes + train)
