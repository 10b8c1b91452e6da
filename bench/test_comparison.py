"""Time every contender of every case in turns, in one process, after a check that their results are equal.

    python -m pytest bench/test_comparison.py --benchmark-json=comparison.json
    python bench/table.py comparison.json

snnTorch, SpikingJelly and norse are timed if they are installed (pip install --no-deps norse==1.1.0 nir nirtorch).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from coba_triton.tools.contenders import ORDER, OTHER_PACKAGES, assert_same, contenders, peak_memory, time_interleaved
from coba_triton.tools.problems import CASES, Case

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
BACKEND, DEVICE = ("triton", torch.device("cuda")) if torch.cuda.is_available() else ("cpu", torch.device("cpu"))


class Clock:
    """A clock for pytest-benchmark that shows the times measured in turns. By itself, it would time one after the other."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


clock = Clock()


@functools.lru_cache(maxsize=1)
def measure(case: Case) -> tuple[dict[str, list[float]], dict[str, int | None], float]:
    """Seconds and peak bytes of every contender, and the rate of spikes per neuron and step."""
    problem = case.build(DEVICE)
    rivals = list(contenders(case, BACKEND, problem))
    expected = rivals[0].run()
    for rival in rivals:
        assert_same(case, rival, expected)
    memory = {rival.name: peak_memory(rival.run, DEVICE) for rival in rivals}
    seconds = time_interleaved({rival.name: rival.run for rival in rivals}, ROUNDS, DEVICE)
    return seconds, memory, float(problem.run(BACKEND, order=ORDER[case.kind])[0].mean())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parameters = []
    for case in CASES:
        tiny = dataclasses.replace(case, steps=1, batch=1, neurons=1)
        parameters += [
            pytest.param(case, rival.name, id=f"{case.name}-{rival.name}")
            for rival in contenders(tiny, BACKEND, tiny.build(DEVICE))
        ]
    for package, source in OTHER_PACKAGES.items():
        if not find_spec(package):  # the report names what is missing, and how to get it
            absent = pytest.mark.skip(reason=f"{package} is not installed: pip install {source}")
            parameters.append(pytest.param(CASES[0], package, id=package, marks=absent))
    metafunc.parametrize(("case", "name"), parameters)


@pytest.mark.filterwarnings("default")
@pytest.mark.benchmark(timer=clock)
def test_speed(case: Case, name: str, benchmark: Any) -> None:
    seconds, memory, rate = measure(case)
    rounds = iter(seconds[name])
    benchmark.group = case.name
    benchmark.extra_info.update(steps=case.steps, neuron_steps=case.neuron_steps, peak_bytes=memory[name], rate=rate)
    benchmark.extra_info.update(threads=torch.get_num_threads(), torch=torch.__version__)
    benchmark.pedantic(lambda: clock.advance(next(rounds)), rounds=len(seconds[name]))
