"""On a GPU the host reads nothing back from a tensor: not in a forward, not in training, on no path.

The tensors are on PyTorch's ``meta`` device, whose tensors have no numbers: every operation that would read one raises. All
that the package does on a GPU happens, but for the kernels, whose launches are counted. So its scratch is known, too.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from coba_triton import (
    CobaLIF,
    CobaLIFParameters,
    CobaLIFRecurrent,
    Synapses,
    coba_lif_feed_forward_integral,
    coba_lif_integral,
)
from coba_triton.backend import choose
from coba_triton.backend import triton as triton_backend
from coba_triton.ops import operators, sparse_operators, time_blocks, wiring

META = torch.device("meta")
COMPUTE = {
    f"coba_triton::{name}": (module.GROUPS[name], getattr(module, f"_compute_{name}"))
    for module in (operators, sparse_operators)
    for name in module.GROUPS
    if hasattr(module, f"_compute_{name}")
}


class Computing(TorchDispatchMode):
    """Computes the package's operators, which on ``meta`` would only make their outputs."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator._schema.name in COMPUTE:
            groups, compute = COMPUTE[operator._schema.name]
            with self:
                return compute(*operators.grouper(groups)(args))
        return operator(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[collections.Counter[str]]:
    """``meta`` stands for a GPU; what is launched there is counted."""
    counts: collections.Counter[str] = collections.Counter()
    monkeypatch.setattr(choose, "triton_device_type", lambda: "meta")
    monkeypatch.setattr(triton_backend.hardware, "resident_programs", lambda device: 132)
    monkeypatch.setattr(triton_backend.hardware, "meets_unasked", lambda: True)

    def launch(kernel: Any, *args: Any, **meta: Any) -> Callable[..., None]:
        counts.update([kernel.__name__])
        return lambda *args: counts.update([kernel.__name__])

    monkeypatch.setattr(triton_backend.launch, "run", launch)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # knows no meta
    with Computing():
        yield counts


def synapses(sources: int, neurons: int, per: str, delay: float | None, train: bool = False) -> Synapses:
    fan_out = 5
    shape = {"synapse": (sources * fan_out,), "source": (sources, 1), "network": (1,)}[per]
    weights = torch.zeros(shape, device=META, requires_grad=train)
    delays = None if delay is None else torch.full((1,), delay, device=META)
    indptr = torch.arange(sources + 1, device=META) * fan_out
    targets = torch.zeros(sources * fan_out, dtype=torch.int32, device=META)
    return Synapses(indptr, targets, weights, delays, neurons, delay or 0.0, delay or 0.0)


def feed_forward(train: bool = False, dtype: torch.dtype = torch.float32, p: Any = None, **options: Any) -> None:
    x = torch.zeros(40, 3, 64, dtype=dtype, device=META, requires_grad=train and dtype.is_floating_point)
    spikes, state = coba_lif_feed_forward_integral(x, None, p or CobaLIFParameters(), 0.1, backend="triton", **options)
    if train:
        ((spikes.sum() if spikes.is_floating_point() else 0) + state.v.sum()).backward()


def recurrent(
    train: bool = False,
    dtype: torch.dtype = torch.float32,
    p: Any = None,
    neurons: int = 100,
    batch: int = 3,
    **options: Any,
) -> None:
    x = torch.zeros(80, batch, 20, dtype=dtype, device=META)
    weights = (torch.zeros(neurons, inputs, device=META, requires_grad=train) for inputs in (20, neurons))
    spikes, state = coba_lif_integral(x, None, *weights, p or CobaLIFParameters(), 0.1, backend="triton", **options)
    if train:
        ((spikes.sum() if spikes.is_floating_point() else 0) + state.v.sum()).backward()


def sparse(train: bool = False, per: str = "synapse", inputs: str = "sparse", neurons: int = 100, **options: Any) -> None:
    x = torch.zeros(80, 2, 20, device=META, requires_grad=train)
    to = torch.zeros(neurons, 20, device=META, requires_grad=train)
    if inputs == "sparse":
        to = synapses(20, neurons, per, None, train)
    p = CobaLIFParameters(refractory=2.0)
    recurrent = synapses(neurons, neurons, per, 1.5, train)
    spikes, _ = coba_lif_integral(x, None, to, recurrent, p, 0.1, backend="triton", **options)
    if train:
        spikes.sum().backward()


def module(kind: Callable[..., Any], train: bool = False, **options: Any) -> None:
    layer = kind(backend="triton", **options).to(META)
    x = torch.zeros(80, 2, 20, device=META)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1) if train else None
    for _ in range(2 if train else 1):  # the second one with weights that changed
        spikes, _ = layer(x)
        if optimizer is not None:
            optimizer.zero_grad()
            spikes.sum().backward()
            optimizer.step()


def learned(neurons: int) -> CobaLIFParameters:
    """Of every neuron, and on the device."""
    return CobaLIFParameters(v_thresh=torch.full((neurons,), -10.0, device=META, requires_grad=True))


FEED_FORWARD = {"forward_kernel"}
EVENTS = {"compact_kernel", "projection_kernel", "forward_kernel"}
SLICED = {"sliced_forward_kernel"}
BACK = {"driven_kernel", "backward_kernel"}
TOGETHER = {"driven_kernel", "shared_backward_kernel"}
SPARSE = {"compact_kernel", "scatter_kernel", "sparse_forward_kernel"}
SPARSE_INPUT = {"sparse_projection_kernel", "sums_to_drive_kernel"}
SPARSE_BACK = {"driven_kernel", "sparse_backward_kernel", "source_gradient_kernel", "synapse_gradient_kernel"}
CASES: dict[str, tuple[Callable[..., None], dict[str, Any], set[str]]] = {
    "feed-forward": (feed_forward, {}, FEED_FORWARD),
    "feed-forward, packed": (feed_forward, {"dtype": torch.bool, "spike_dtype": "bits"}, FEED_FORWARD),
    "feed-forward, training": (feed_forward, {"train": True, "p": learned(64)}, {"forward_kernel", "backward_kernel"}),
    "recorded, training": (feed_forward, {"train": True, "record_states": True}, {"forward_kernel", "backward_kernel"}),
    "recurrent": (recurrent, {}, EVENTS),
    "recurrent, bool": (recurrent, {"dtype": torch.bool, "spike_dtype": "bits"}, EVENTS),
    "recurrent, integers": (recurrent, {"dtype": torch.int64, "block_steps": 32, "record_states": True}, EVENTS),
    "recurrent, refractory": (recurrent, {"p": CobaLIFParameters(refractory=1.0)}, EVENTS),
    "recurrent, one large row": (recurrent, {"neurons": 4000, "batch": 1}, EVENTS - {"forward_kernel"} | SLICED),
    "recurrent, sliced": (recurrent, {"path": "sliced", "neurons": 300}, EVENTS - {"forward_kernel"} | SLICED),
    "recurrent, dense": (recurrent, {"path": "dense"}, EVENTS - {"forward_kernel"} | {"driven_kernel"}),
    "recurrent, training": (recurrent, {"train": True, "p": learned(100)}, EVENTS | BACK),
    "recurrent, training, half": (recurrent, {"train": True, "record_states": True, "dtype": torch.float16}, EVENTS | BACK),
    "recurrent, training, weights held": (recurrent, {"train": True, "neurons": 300, "block_steps": 32}, EVENTS | TOGETHER),
    "recurrent, training, a large row": (
        recurrent, {"train": True, "neurons": 3000, "batch": 1}, {"projection_kernel"} | SLICED | TOGETHER,
    ),
    "recurrent, training, many neurons": (recurrent, {"train": True, "neurons": 1000, "batch": 5}, EVENTS | BACK),
    "recurrent, training, dense": (recurrent, {"train": True, "path": "dense"}, EVENTS - {"forward_kernel"} | BACK),
    "sparse": (sparse, {}, {*SPARSE, *SPARSE_INPUT}),
    "sparse, many neurons": (sparse, {"neurons": 2000, "inputs": "dense"}, {*SPARSE, "projection_kernel"}),
    "sparse, training": (sparse, {"train": True}, {*SPARSE, *SPARSE_INPUT, *SPARSE_BACK}),
    "sparse, training, by source": (sparse, {"train": True, "per": "source", "neurons": 400}, {*SPARSE, *SPARSE_BACK}),
    "sparse, training, of the network": (
        sparse, {"train": True, "per": "network", "inputs": "dense"}, {*SPARSE, "projection_kernel", *SPARSE_BACK},
    ),
    "module": (module, {"kind": CobaLIF}, FEED_FORWARD),
    "recurrent module": (module, {"kind": CobaLIFRecurrent, "input_size": 20, "hidden_size": 70}, EVENTS),
    "recurrent module, training": (
        module,
        {"kind": CobaLIFRecurrent, "input_size": 20, "hidden_size": 70, "learn": ("v_thresh",), "train": True},
        EVENTS | BACK,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_read(name: str, launches: collections.Counter[str]) -> None:
    run, options, expected = CASES[name]
    run(**options)
    assert launches.keys() >= expected, launches


def _nonzero(sources: Tensor, weights: Tensor) -> Tensor:
    return weights.new_zeros(2, *sources.shape[:-1], len(sources.nonzero()))


def _to_host(sums: Tensor, sources: Tensor, rows: Tensor, events: bool) -> None:
    sums += (sources.cpu().t().to(rows.dtype) @ rows.cpu()).to(sums.device)


PLANTED: dict[str, Callable[..., Any]] = {
    "is_sparse": lambda sources: bool(sources.any()),
    "fires_often": lambda spikes: spikes.count_nonzero().item() > 10,
    "project_events": _nonzero,
    "add_products": _to_host,
}


@pytest.mark.parametrize("function", PLANTED)
def test_a_planted_read_is_noticed(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (triton_backend, triton_backend.recurrent):  # what uses it
        monkeypatch.setattr(module, function, PLANTED[function])
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
        recurrent(train=True, block_steps=32)


def test_histograms_and_repeats_of_unknown_length_are_noticed() -> None:
    """They read on a GPU, and hide that they do: no ``item`` is called."""
    numbers = torch.zeros(5, dtype=torch.int64, device=META)
    for reads in (lambda: torch.bincount(numbers, minlength=9), lambda: torch.repeat_interleave(numbers, numbers)):
        with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
            reads()


@pytest.mark.parametrize("kind", ["delay", "layout"])
def test_a_matrix_whose_synapses_are_read_cannot_be_captured(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "is_capturing", lambda device: True)
    x, w_in, w_rec = (torch.zeros(shape, device=META) for shape in ((9, 1, 4), (6, 4), (6, 6)))
    options: dict[str, Any] = {"delay": 1.0}
    if kind == "layout":
        w_rec, options = torch.zeros(6, 6).to_sparse().to(META), {}
    message = "recurrent_weights must be coba_triton.Synapses while a CUDA graph is captured, got a matrix.*from_torch"
    with pytest.raises(RuntimeError, match=message):
        coba_lif_integral(x, None, w_in, w_rec, CobaLIFParameters(), 0.1, backend="triton", **options)


class Counting(Computing):
    """Counts the bytes of all tensors that were made since, as long as something holds their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def now(self) -> int:
        self.held = {place: found for place, found in self.held.items() if not found[0].expired()}
        return sum(size for _, size in self.held.values())

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(operator, types, args, kwargs)
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.now())
        return made


LONG: dict[str, tuple[int, int, int, torch.dtype, bool, bool]] = {
    "dense": (8, 20, 1024, torch.float32, False, False),
    "dense, many inputs": (1, 65536, 128, torch.uint8, False, False),
    "dense, many inputs, training": (1, 65536, 128, torch.float32, False, True),
    "sparse": (8, 20, 1024, torch.float32, True, False),
    "sparse, many inputs": (1, 65536, 128, torch.uint8, True, False),
    "sparse, many inputs, training": (1, 65536, 128, torch.float32, True, True),
}


@pytest.mark.parametrize("name", LONG)
def test_scratch_is_bounded(name: str) -> None:
    """What a long call holds beside its results and what it saves, whatever grows with a block: inputs, and sums of them."""
    batch, inputs, neurons, dtype, is_sparse, train = LONG[name]
    x = torch.zeros(10_000, batch, inputs, dtype=dtype, device=META, requires_grad=train)
    weights: list[Any] = [torch.zeros(neurons, sources, device=META, requires_grad=train) for sources in (inputs, neurons)]
    if is_sparse:
        weights = [synapses(inputs, neurons, "synapse", None, train), synapses(neurons, neurons, "synapse", 1.5, train)]
    with Counting() as counting:
        spikes, state = coba_lif_integral(x, None, *weights, CobaLIFParameters(), 0.1, backend="triton")
        saved = counting.now()
        if train:
            torch.autograd.backward([spikes.sum(), state.v.sum()])
            saved = max(saved, counting.now())
    assert counting.most - saved < 1.25 * time_blocks.SCRATCH_BYTES_OF_A_GPU
