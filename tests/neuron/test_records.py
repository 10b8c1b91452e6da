"""Parameters and states of other classes: every public function takes what has the fields, such as norse's records.

Those of norse hold tensors, some of them of integers. A stand-in does so where norse is not installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import coba_triton
from coba_triton import (
    CobaLIF,
    CobaLIFCell,
    CobaLIFFeedForwardCell,
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    CobaLIFRecurrent,
    CobaLIFState,
    check,
    coba_lif_feed_forward_integral,
    coba_lif_feed_forward_step,
    coba_lif_integral,
    coba_lif_step,
    default_bio_parameters,
    default_bio_state,
    from_pynn,
    simulate,
    to_pynn,
)

T, B, N = 60, 2, 5
DEFAULTS = CobaLIFParameters(v_rest=-60, v_reset=-65, v_thresh=-50, e_rev_E=0, e_rev_I=-80)
# norse's records have no refractory period and no current-based synapses
LACKING = ("method", "alpha", "refractory", "conductance_based")
TENSORS = {name: torch.as_tensor(value) for name, value in DEFAULTS._asdict().items() if name not in LACKING}


def record(kind: str, name: str, **fields: Any) -> Any:
    """A record of norse's class of this name, or of a class without any methods."""
    if kind == "stand-in":
        return SimpleNamespace(**fields)
    norse = pytest.importorskip("norse.torch", reason="norse is optional: pip install 'coba-triton[norse]'")
    return getattr(norse, name)(**fields)


@pytest.fixture(params=["stand-in", "norse"])
def theirs(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """Parameters and both states."""
    ours = state()
    parameters = record(request.param, "CobaLIFParameters", **TENSORS, method="super", alpha=100.0)
    assert parameters.v_thresh.dtype == torch.int64
    return (
        parameters,
        record(request.param, "CobaLIFState", **ours._asdict()),
        record(request.param, "CobaLIFFeedForwardState", v=ours.v, g_e=ours.g_e, g_i=ours.g_i),
    )


def state() -> CobaLIFState:
    g = torch.Generator().manual_seed(1)
    v, g_e, g_i = -60 + 9 * torch.rand(B, N, generator=g), *(torch.rand(2, B, N, generator=g) / 20).unbind()
    return CobaLIFState((torch.rand(B, N, generator=g) < 0.5).float(), v, g_e, g_i)


def weights() -> Tensor:
    """Of a grid on which their sums are exact."""
    return (torch.randn(N, N, generator=torch.Generator().manual_seed(2)) * 8).round() / 1024


def drive() -> Tensor:
    return (torch.rand(T, B, N, generator=torch.Generator().manual_seed(3)) < 0.2).float() / 16


def module(make: Callable[..., Any], x: Tensor, s: Any, p: Any, sizes: tuple[int, ...] = ()) -> Any:
    """A module of these parameters, given the weights, called."""
    built = make(*sizes, p, 0.1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(weights())
    return built(x, s)


def simulated(network: Any, s: Any) -> Any:
    result = simulate(network, drive(), state=s, progress=False)
    return (result.spikes[:],)


def checked(*arguments: Any, p: Any, s: Any) -> Any:
    report = check(drive(), s, *arguments, p=p, dt=0.1, backend="cpu")
    assert report.ok, str(report)
    return ()


# every public function that takes parameters or a state: p, the recurrent state r, the feed-forward state f
CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "coba_lif_feed_forward_step": lambda p, r, f: coba_lif_feed_forward_step(drive()[0], f, p, 0.1),
    "coba_lif_step": lambda p, r, f: coba_lif_step(drive()[0], r, weights(), weights(), p, 0.1),
    "coba_lif_feed_forward_integral": lambda p, r, f: coba_lif_feed_forward_integral(drive(), f, p, 0.1),
    "coba_lif_integral": lambda p, r, f: coba_lif_integral(drive(), r, weights(), weights(), p, 0.1),
    "CobaLIFFeedForwardCell": lambda p, r, f: module(CobaLIFFeedForwardCell, drive()[0], f, p),
    "CobaLIFCell": lambda p, r, f: module(CobaLIFCell, drive()[0], r, p, (N, N)),
    "CobaLIF": lambda p, r, f: module(CobaLIF, drive(), f, p),
    "CobaLIFRecurrent": lambda p, r, f: module(CobaLIFRecurrent, drive(), r, p, (N, N)),
    "simulate": lambda p, r, f: simulated(CobaLIF(p, 0.1), f),
    "check": lambda p, r, f: checked(p=p, s=f),
    "check, recurrent": lambda p, r, f: checked(weights(), weights(), p=p, s=r),
    "to_pynn": lambda p, r, f: tuple(map(torch.as_tensor, to_pynn(p).values())),
}


def test_every_function_that_takes_a_record_is_here() -> None:
    def takes(name: str) -> bool:
        value = getattr(coba_triton, name)
        return callable(value) and bool({"p", "state"} & set(inspect.signature(value).parameters))

    assert {name for name in coba_triton.__all__ if takes(name)} == {name.partition(",")[0] for name in CALLS}


@pytest.mark.parametrize("call", CALLS)
def test_records_are_taken(call: str, theirs: tuple[Any, Any, Any]) -> None:
    ours = CobaLIFParameters(**TENSORS), state(), CobaLIFFeedForwardState(*state()[1:])
    got, want = CALLS[call](*theirs), CALLS[call](*ours)
    for a, b in zip(got, want, strict=True):
        for x, y in zip(*((each,) if isinstance(each, Tensor) else each for each in (a, b)), strict=True):
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))


def test_records_are_taken_by_the_distributed_sequence(theirs: tuple[Any, Any, Any]) -> None:
    """In a group of this process alone."""
    dist = pytest.importorskip("torch.distributed", reason="this build of PyTorch has no torch.distributed")
    from coba_triton import distributed

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        got = distributed.coba_lif_integral(drive(), theirs[1], weights(), weights(), theirs[0], 0.1)
    finally:
        dist.destroy_process_group()
    want = CALLS["coba_lif_integral"](*theirs)
    assert torch.equal(got[0], want[0]) and all(map(torch.equal, got[1], want[1]))


def test_modules_hold_integers_as_floating_numbers(theirs: tuple[Any, Any, Any]) -> None:
    """So that they can be learned, and take what another state_dict has in full."""
    network = CobaLIF(theirs[0], 0.1, learn=("v_thresh",))
    network(drive(), theirs[2])[0].sum().backward()
    assert network.v_thresh.grad is not None and network.v_thresh.grad != 0
    network.load_state_dict(CobaLIF(DEFAULTS._replace(v_rest=-60.5), 0.1, learn=("v_thresh",)).state_dict())
    assert network.v_rest == -60.5


def test_what_is_no_record() -> None:
    with pytest.raises(TypeError, match="got SimpleNamespace without tau_syn_exc_inv.*; build them with CobaLIFParameters"):
        check(drive(), p=SimpleNamespace(v_rest=-60.0))


@pytest.mark.parametrize(
    "record",
    [
        CobaLIFParameters(v_thresh=torch.linspace(-55.0, -50.0, 3), method="tanh"),
        default_bio_parameters,
        from_pynn({"tau_refrac": 0.0}),
        CobaLIFState(torch.zeros(2), torch.full((2,), -65.0), 0.0, torch.rand(2, dtype=torch.float64)),
        CobaLIFFeedForwardState(*torch.rand(3, 2)),
        default_bio_state,
    ],
    ids=lambda record: type(record).__name__,
)
def test_saved_records_are_loaded_by_default(record: Any, tmp_path: Path) -> None:
    """Alone, in a checkpoint, and as hyperparameters of Lightning, which saves what its module was made with."""
    model = CobaLIF(dt=0.1)
    saved = {
        "alone": record,
        "checkpoint": {"epoch": 3, "model": model.state_dict(), "state": record, "history": [record, (record,)]},
        "lightning": {
            "state_dict": model.state_dict(),
            "hyper_parameters": {"p": record, "dt": 0.1},
            "hparams_name": "kwargs",
        },
    }
    read: dict[str, Callable[[Any], Any]] = {
        "alone": lambda content: content,
        "checkpoint": lambda content: content["history"][1][0],
        "lightning": lambda content: content["hyper_parameters"]["p"],
    }
    for name, content in saved.items():
        torch.save(content, tmp_path / name)
        back = read[name](torch.load(tmp_path / name))
        assert type(back) is type(record)
        for a, b in zip(back, record, strict=True):
            assert type(a) is type(b)
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
