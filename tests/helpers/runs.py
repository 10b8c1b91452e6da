"""Long runs: networks and inputs, runs that end early, and the comparison of what two of them wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coba_triton import (
    CobaLIF,
    CobaLIFParameters,
    CobaLIFRecurrent,
    PoissonSource,
    Record,
    coba_lif_feed_forward_integral,
    coba_lif_integral,
    simulate,
)

T, N, INPUTS = 1000, 20, 6
NEURON = CobaLIFParameters(
    tau_syn_exc_inv=1 / 5,
    tau_syn_inh_inv=1 / 10,
    c_m_inv=1 / 0.2,
    g_l=0.01,
    e_rev_E=0.0,
    e_rev_I=-80.0,
    v_rest=-65.0,
    v_reset=-65.0,
    v_thresh=-50.0,
)
RECORD = Record(
    variables=("v", "g_e", "g_i"),
    neurons=[7, 0],
    populations={"first": slice(0, 5), "odd": range(1, N, 2)},
    inputs=True,
)
PER_NEURON = NEURON._replace(v_thresh=torch.linspace(-55.0, -48.0, N), method="triangle")


def drive(shape: tuple[int, ...] = (N,), steps: int = T) -> PoissonSource:
    rate, weight = (600.0, 1.0) if shape[-1] == INPUTS else (1500.0, 2**-9)
    return PoissonSource(rate, steps, shape, 0.1, weight=weight, seed=2)


def recurrent(p: CobaLIFParameters = NEURON, **options: Any) -> CobaLIFRecurrent:
    """A network whose weights are whole numbers of 2**-10 uS: their sums are exact in any order."""
    network = CobaLIFRecurrent(INPUTS, N, p, 0.1, **options)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        network.input_weights.copy_(torch.randint(0, 3, (N, INPUTS), generator=g) / 1024)
        network.recurrent_weights.copy_(torch.randint(-3, 3, (N, N), generator=g) / 1024)
    return network


def whole(network: CobaLIF | CobaLIFRecurrent, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """What the reference makes of the input in one call."""
    options: Any = {"backend": "reference", "record_states": True}
    with torch.no_grad():
        if isinstance(network, CobaLIFRecurrent):
            weights = network.input_weights, network.recurrent_weights.clone().fill_diagonal_(0)
            return coba_lif_integral(x, state, *weights, network.p, 0.1, **options)
        return coba_lif_feed_forward_integral(x, state, network.p, 0.1, **options)


BLOCK = 96


def run(path: Path, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "network": CobaLIF(NEURON, 0.1),
        "source": drive(),
        "sink": path,
        "record": RECORD,
        "block_steps": BLOCK,
        "progress": False,
    } | changes
    return simulate(**arguments)


class Stop(Exception):
    """Raised by a test in the middle of a run."""


def stop_at(steps: int) -> Callable[[int], None]:
    def progress(done: int) -> None:
        if done >= steps:
            raise Stop

    return progress


def begin(path: Path, steps: int = 3 * BLOCK, **changes: Any) -> None:
    """A run that ends in its middle."""
    with pytest.raises(Stop):
        run(path, progress=stop_at(steps), **changes)


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and the time it was written."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def assert_same(one: Path, other: Path) -> None:
    """Equal bit for bit: attributes and arrays, but for the name of the run and the seals that depend on it."""
    import zarr  # the extra stream

    first, second = (zarr.open_group(path, mode="r") for path in (one, other))
    attributes = [{k: v for k, v in group.attrs.items() if k not in ("run", "checksum")} for group in (first, second)]
    assert attributes[0] == attributes[1]
    arrays = dict(first.arrays())
    assert arrays.keys() == dict(second.arrays()).keys()
    for name, array in arrays.items():
        kept = (..., slice(-1)) if name == "checksums" else ...
        np.testing.assert_array_equal(array[kept].view(np.uint8), second[name][kept].view(np.uint8), err_msg=name)
