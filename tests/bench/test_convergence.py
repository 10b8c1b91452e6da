"""The step is Euler's: its error against accurate solutions of the differential equations shrinks in proportion to dt."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest

spec = importlib.util.spec_from_file_location("convergence", Path(__file__).parents[2] / "bench" / "convergence.py")
convergence: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convergence)

X = convergence.drive()
CASES = {
    "potentials": (convergence.SUBTHRESHOLD, convergence.voltage_error),
    "spike times": (convergence.SPIKING, convergence.spike_error),
}
solve = functools.cache(lambda p: convergence.solve(X, p))


@pytest.mark.parametrize("case", CASES)
def test_error_is_of_the_order_of_dt(case: str) -> None:
    p, error = CASES[case]
    errors = convergence.errors(X, p, solve(p), error)
    assert errors[-1] < 0.005  # mV, and ms
    assert convergence.order(errors) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("change", [{"e_rev_I": -79.0}, {"tau_syn_exc_inv": 0.201}, {"g_l": 0.0101}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_another_equation_is_noticed(case: str, change: dict[str, float]) -> None:
    """What does not shrink with dt, here by one parameter that is off by a hundredth or less, is no error of order 1."""
    p, error = CASES[case]
    errors = convergence.errors(X, p._replace(**change), solve(p), error)
    assert convergence.order(errors) < 0.9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Brian2's own parser
@pytest.mark.parametrize("case", CASES)
def test_error_against_brian2_is_of_the_order_of_dt(case: str) -> None:
    pytest.importorskip("brian2", reason="Brian2 is optional: pip install brian2")
    p, error = CASES[case]
    finest = convergence.STEPS[-1]
    want = convergence.brian2(X, p, finest / (8 if error is convergence.spike_error else 1))
    errors = convergence.errors(X, p, want, error)
    assert convergence.order(errors) == pytest.approx(1, abs=0.05)
    # two independent accurate solutions agree far better than any of ours does
    assert error(solve(p), want) < errors[-1] / 2
