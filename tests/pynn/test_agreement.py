"""Against NEST, of which the samples are kept in a file, and against other runs of the same network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyNN", reason="PyNN is optional: pip install 'coba-triton[pynn]'")

import coba_triton.pynn as sim
from helpers.pynn_networks import STEPS, imposed

NEST = Path(__file__).with_name("nest_imposed.npz")


def test_samples_of_nest_to_first_order() -> None:
    """The differences are those of forward Euler: they shrink as the step does. One step of delay would add a weight."""
    differences = []
    with np.load(NEST) as nest:
        for dt in STEPS:
            ours, theirs = imposed(sim, dt), nest[str(dt)]
            assert ours.shape == theirs.shape
            differences.append(np.abs(ours - theirs).max((1, 2)))
    least_weight = 0.005
    for dt, (v, excitatory, inhibitory) in zip(STEPS, differences, strict=True):
        assert v < 5.0 * dt and excitatory < 0.01 * dt and inhibitory < 0.01 * dt
        assert max(excitatory, inhibitory) < least_weight / 5
    ratio = differences[0] / differences[2]
    assert (ratio > 0.8 * STEPS[0] / STEPS[2]).all() and (ratio < 1.25 * STEPS[0] / STEPS[2]).all(), ratio


def test_single_precision_is_near_double() -> None:
    class Single:
        def __getattr__(self, name: str) -> object:
            if name == "setup":
                return lambda **options: sim.setup(dtype="float32", **options)
            return getattr(sim, name)

    double, single = imposed(sim, 0.1), imposed(Single(), 0.1)
    difference = np.abs(double - single).max()
    assert 0 < difference < 1e-3
