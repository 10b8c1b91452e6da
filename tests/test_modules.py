"""The modules: the functions' bits, parameters and buffers, conversions, autapses, and life inside PyTorch."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coba_triton import (
    CobaLIF,
    CobaLIFCell,
    CobaLIFFeedForwardCell,
    CobaLIFParameters,
    CobaLIFRecurrent,
    CobaLIFState,
    Synapses,
    coba_lif_feed_forward_integral,
    coba_lif_feed_forward_step,
    coba_lif_integral,
    coba_lif_step,
    default_bio_parameters,
    default_learning_parameters,
    modules,
    unpack_spikes,
)
from coba_triton.neuron.records import NUMERIC_PARAMETERS
from helpers.bits import assert_same_bits

DT, INPUTS, N, B, T = 0.1, 3, 5, 2, 40
LEARNABLE = tuple(name for name in NUMERIC_PARAMETERS if name not in ("alpha", "refractory", "conductance_based"))
# not one of these is a float32 number
RECORD = CobaLIFParameters(1 / 3, 1 / 7, 1 / 0.3, 0.1, -90.1, 50.3, -60.1, -65.7, -50.9, "triangle", 0.3)
RECORDS = {
    "default": CobaLIFParameters(),
    "bio": default_bio_parameters,
    "numbers": RECORD,
    "integers": RECORD._replace(v_rest=-60, v_reset=-65, c_m_inv=np.int64(3)),
    "0-dim": CobaLIFParameters(*(torch.tensor(k) if isinstance(k, float) else k for k in RECORD)),
    "0-dim float64": RECORD._replace(c_m_inv=torch.tensor(1 / 0.3, dtype=torch.float64)),
    "per neuron": RECORD._replace(v_thresh=torch.linspace(-55, -45, N), g_l=torch.full((B, 1), 0.1)),
    "duck": SimpleNamespace(**RECORD._asdict()),
}
MODULES = {
    "cell": lambda p, **k: CobaLIFCell(INPUTS, N, p, DT, **k),
    "feed-forward cell": lambda p, **k: CobaLIFFeedForwardCell(p, DT, **k),
    "feed-forward": lambda p, **k: CobaLIF(p, DT, **k),
    "recurrent": lambda p, **k: CobaLIFRecurrent(INPUTS, N, p, DT, **k),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
recurrent_modules = pytest.mark.parametrize("make", [MODULES["cell"], MODULES["recurrent"]], ids=["cell", "recurrent"])


def drive(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input that makes the neurons of ``RECORD`` fire."""
    g = torch.Generator().manual_seed(1)
    if isinstance(module, CobaLIF | CobaLIFFeedForwardCell):
        return (0.02 * torch.randn(T, B, N, generator=g) + 0.005).to(dtype)
    return (torch.rand(T, B, INPUTS, generator=g) < 0.4).to(dtype)


def run(module: Any, x: Tensor) -> list[Tensor]:
    """Spikes of all steps and the fields of the final state."""
    if isinstance(module, CobaLIF | CobaLIFRecurrent):
        spikes, state = module(x)
        return [spikes, *state]
    state, rows = None, []
    for row in x:
        z, state = module(row, state)
        rows.append(z)
    return [torch.stack(rows), *state]


def run_functions(module: Any, x: Tensor, p: Any, weights: tuple[Tensor, ...] = ()) -> list[Tensor]:
    """The same from the functional API, given a record of its own."""
    if isinstance(module, CobaLIF):
        spikes, state = coba_lif_feed_forward_integral(x, None, p, DT)
        return [spikes, *state]
    if isinstance(module, CobaLIFRecurrent):
        spikes, state = coba_lif_integral(x, None, *weights, p, DT)
        return [spikes, *state]
    state, rows = None, []
    for row in x:
        if isinstance(module, CobaLIFCell):
            z, state = coba_lif_step(row, state, *weights, p, DT)
        else:
            z, state = coba_lif_feed_forward_step(row, state, p, DT)
        rows.append(z)
    return [torch.stack(rows), *state]


def weights_of(module: Any) -> tuple[Tensor, ...]:
    return tuple(w.detach() for name, w in module.named_parameters() if name.endswith("weights"))


@every_module
@pytest.mark.parametrize("record", RECORDS)
def test_same_bits_as_the_function(make: Any, record: str) -> None:
    p = RECORDS[record]
    module = make(p)
    x = drive(module)
    got = run(module, x)
    assert_same_bits(got, run_functions(module, x, p, weights_of(module)))
    if record == "numbers":
        assert 0.02 < got[0].mean() < 0.5


@every_module
@pytest.mark.parametrize("convert", ["float", "double", "half", "to_bfloat16"])
def test_conversion_does_not_round_python_numbers(make: Any, convert: str) -> None:
    """``.half()`` converts the weights and the tensors; what was given as a Python number keeps its precision."""
    p = RECORD._replace(v_rest=torch.tensor(-60.0), v_reset=torch.tensor(-65))
    module = make(p, learn=("e_rev_E",))
    module = module.to(torch.bfloat16) if convert == "to_bfloat16" else getattr(module, convert)()
    dtype = torch.bfloat16 if convert == "to_bfloat16" else getattr(torch, convert)
    for name in set(NUMERIC_PARAMETERS) - {"refractory", "conductance_based", "v_rest", "v_reset", "e_rev_E"}:
        assert getattr(module, name).dtype == torch.float64
        assert getattr(module, name).item() == getattr(p, name)
    assert module.v_rest.dtype == module.e_rev_E.dtype == module.v_reset.dtype == dtype
    assert all(w.dtype == dtype for w in weights_of(module))

    x = drive(module, dtype)
    want = run_functions(
        module, x, p._replace(v_rest=p.v_rest.to(dtype), e_rev_E=module.e_rev_E.detach()), weights_of(module)
    )
    got = run(module, x)
    assert got[0].dtype == dtype
    assert all(field.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for field in got[1:])
    assert_same_bits([g.detach() for g in got], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_neuron_is_not_promoted(dtype: torch.dtype) -> None:
    x = torch.full((T,), 0.3, dtype=dtype)
    assert_same_bits(run(CobaLIF(RECORD, DT), x), run_functions(CobaLIF(RECORD, DT), x, RECORD))
    cell = CobaLIFFeedForwardCell(RECORD, DT)
    assert_same_bits(run(cell, x), run_functions(cell, x, RECORD))


def test_device_without_float64_gets_float32() -> None:
    def move(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return tensor.clone()

    module = CobaLIF(RECORD)._apply(move)
    assert {buffer.dtype for buffer in module.buffers()} == {torch.float32}


@every_module
def test_meta_device(make: Any) -> None:
    with torch.device("meta"):
        module = make(RECORD)
    assert "v_thresh=[]" in repr(module)
    module = module.to_empty(device="cpu")
    source = make(RECORD)
    module.load_state_dict(source.state_dict())
    assert_same_bits(run(module, drive(module)), run(source, drive(source)))


@every_module
def test_learned_numbers_are_parameters_and_the_others_buffers(make: Any) -> None:
    per_neuron = torch.linspace(-55, -45, N, dtype=torch.float64)
    module = make(RECORD._replace(v_thresh=per_neuron), learn=["v_thresh", "g_l"])
    learned = {name: value for name, value in module.named_parameters() if not name.endswith("weights")}
    assert set(learned) == {"v_thresh", "g_l"}
    assert learned["g_l"].dtype == torch.float32
    assert learned["v_thresh"].dtype == torch.float64
    assert learned["v_thresh"].data_ptr() != per_neuron.data_ptr()
    assert set(dict(module.named_buffers())) == set(NUMERIC_PARAMETERS) - {"refractory", "conductance_based"} - set(learned)
    assert set(NUMERIC_PARAMETERS) - {"refractory", "conductance_based"} <= set(module.state_dict())
    assert isinstance(module.p, CobaLIFParameters)
    assert module.p.g_l is module.g_l
    assert module.p.method == "triangle"


@every_module
def test_every_learned_number_gets_the_functions_gradient(make: Any) -> None:
    module = make(RECORD, learn=LEARNABLE)
    leaves = {name: torch.tensor(getattr(RECORD, name), requires_grad=True) for name in LEARNABLE}
    x = drive(module)

    def loss(outputs: list[Tensor]) -> Tensor:
        return sum(output.sum() for output in outputs)

    loss(run(module, x)).backward()
    loss(run_functions(module, x, RECORD._replace(**leaves), weights_of(module))).backward()
    for name, leaf in leaves.items():
        assert leaf.grad.abs() > 0
        assert torch.equal(getattr(module, name).grad, leaf.grad), name


def test_given_nn_parameter_is_shared() -> None:
    v_thresh = nn.Parameter(torch.tensor(-50.0))
    p = RECORD._replace(v_thresh=v_thresh)
    layers = nn.Sequential(CobaLIF(p, learn=("v_thresh",)), CobaLIF(p, learn=("v_thresh",)))
    assert [id(parameter) for parameter in layers.parameters()] == [id(v_thresh)]


def test_alpha_is_a_constant() -> None:
    alpha = torch.tensor(5.0, requires_grad=True)
    assert not CobaLIF(RECORD._replace(alpha=alpha)).alpha.requires_grad


CASES: dict[str, tuple[Any, type[Exception], str]] = {
    "learn unknown": (
        lambda: CobaLIF(learn=("v_th",)),
        ValueError,
        "learn must name parameters among tau_syn_exc_inv, .* v_thresh, got 'v_th'; leave it out",
    ),
    "learn method": (lambda: CobaLIF(learn=("method",)), ValueError, "got 'method'; leave it out, and set its value"),
    "learn alpha": (lambda: CobaLIF(learn=("alpha",)), ValueError, "got 'alpha'; leave it out, and set its value in p"),
    "learn string": (
        lambda: CobaLIF(learn="g_l"),
        TypeError,
        r"learn must be a tuple of parameter names, got 'g_l'; pass learn=\('g_l',\)",
    ),
    "learn bool": (lambda: CobaLIF(learn=True), TypeError, r"got True; pass learn=\('v_thresh',\)"),
    "value bool": (
        lambda: CobaLIF(RECORD._replace(g_l=torch.tensor(True)), learn=("g_l",)),
        TypeError,
        "g_l must be a real number or tensor, got a tensor of torch.bool",
    ),
    "not in learn": (
        lambda: CobaLIF(RECORD._replace(g_l=torch.tensor(1.0, requires_grad=True)), learn=("v_rest",)),
        ValueError,
        r"g_l must be in learn to get a gradient, got learn=\('v_rest',\); add it, or pass a tensor that does not",
    ),
    "p": (lambda: CobaLIFCell(2, 2, 0.001), TypeError, "build them with CobaLIFParameters"),
    "dt": (lambda: CobaLIFFeedForwardCell(dt=0.0), ValueError, "dt must be a positive finite number of ms, got 0.0"),
    "order": (lambda: CobaLIF(order="first"), ValueError, "order must be 'decay_first' or"),
    "block_steps": (lambda: CobaLIFRecurrent(2, 2, block_steps=0), ValueError, "block_steps must be a positive int"),
    "spike_dtype": (lambda: CobaLIF(spike_dtype="bit"), ValueError, "spike_dtype must be a floating dtype"),
    "backend": (lambda: CobaLIF(backend="gpu")(torch.ones(2)), ValueError, "backend must be one of"),
    "input_size": (lambda: CobaLIFCell(-1, 2), ValueError, "input_size must be an int of at least 0, got -1"),
    "no neurons": (lambda: CobaLIFCell(2, 0), ValueError, "hidden_size must be a positive int, got 0"),
    "hidden_size": (lambda: CobaLIFRecurrent(2, 2.0), TypeError, "hidden_size must be a positive int, got float"),
    "input": (lambda: CobaLIF()([1.0]), TypeError, "input_tensor must be a torch.Tensor .* got list"),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name: str) -> None:
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()


def test_options_reach_the_function() -> None:
    options = dict(order="jump_first", backend="reference", block_steps=32, record_states=True, spike_dtype="bits")
    feed_forward, recurrent = CobaLIF(RECORD, DT, **options), CobaLIFRecurrent(INPUTS, N, RECORD, DT, **options)
    x = drive(feed_forward)
    spikes, states = feed_forward(x)
    want, trace = coba_lif_feed_forward_integral(x, None, RECORD, DT, **options)
    assert_same_bits([spikes, *states], [want, *trace])
    assert states.v.shape == (T, B, N)
    assert unpack_spikes(spikes, T).sum() > 0

    x = drive(recurrent)
    spikes, states = recurrent(x)
    want, trace = coba_lif_integral(x, None, *weights_of(recurrent), RECORD, DT, **options)
    assert_same_bits([spikes, *states], [want, *trace])

    feed_forward.record_states = False
    assert feed_forward(drive(feed_forward))[1].v.shape == (B, N)


@pytest.mark.parametrize("make", [MODULES["feed-forward"], MODULES["recurrent"]], ids=["feed-forward", "recurrent"])
def test_split_run_equals_the_whole(make: Any) -> None:
    module = make(RECORD)
    x = drive(module)
    whole, final = module(x)
    first, state = module(x[:17])
    rest, state = module(x[17:], state)
    assert_same_bits([torch.cat([first, rest]), *state], [whole, *final])


def test_cell_steps_as_the_sequence_does() -> None:
    """On weights whose sums are exact."""
    cell, sequence = CobaLIFCell(INPUTS, N, RECORD, DT), CobaLIFRecurrent(INPUTS, N, RECORD, DT)
    with torch.no_grad():
        for weights in cell.parameters():
            weights.mul_(1024).round_().div_(1024)
    sequence.load_state_dict(cell.state_dict())
    x = drive(cell)
    got = run(cell, x)
    assert got[0].sum() > 0
    assert_same_bits(got, run(sequence, x))


@recurrent_modules
@pytest.mark.parametrize("g_l", [0.25, torch.tensor([0.1, 0.4] * 100), torch.tensor(2)], ids=["one", "each", "int"])
def test_initial_weights_are_measured_by_the_leak(make: Any, g_l: Any) -> None:
    size = CobaLIFCell if make is MODULES["cell"] else CobaLIFRecurrent
    module = size(300, 200, RECORD._replace(g_l=g_l), DT)
    leak = 2.0 if isinstance(g_l, Tensor) and not g_l.is_floating_point() else 0.25
    assert module.input_weights.shape == (200, 300)
    for weights in weights_of(module):
        for sign in (1, -1):
            volley = (sign * weights).relu().sum(1)
            assert volley.mean().item() == pytest.approx(leak, rel=0.03)

    before = module.input_weights.clone()
    module.reset_parameters()
    assert not torch.equal(module.input_weights, before)
    torch.manual_seed(0)
    module.reset_parameters()
    assert torch.equal(module.input_weights, before)


@recurrent_modules
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda w: torch.optim.SGD(w, 1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda w: torch.optim.Adam(w, 1e-3, weight_decay=0.1),
        lambda w: torch.optim.AdamW(w, 1e-3, weight_decay=0.1, amsgrad=True),
    ],
    ids=["SGD", "Adam", "AdamW"],
)
def test_no_autapses_in_training(make: Any, optimizer: Any) -> None:
    module = make(RECORD)
    opt = optimizer(module.parameters())
    off_diagonal = ~torch.eye(N, dtype=torch.bool)
    start = module.recurrent_weights.detach().clone()
    for _ in range(5):
        opt.zero_grad()
        (run(module, drive(module))[2] + 60).square().sum().backward()
        assert not module.recurrent_weights.grad.diagonal().any()
        assert module.recurrent_weights.grad[off_diagonal].abs().max() > 0
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        opt.step()
        assert not module.recurrent_weights.diagonal().any()
    assert (module.recurrent_weights != start)[off_diagonal].all()


@recurrent_modules
def test_autapses(make: Any) -> None:
    with_autapses, without = make(RECORD, autapses=True), make(RECORD)
    assert with_autapses.recurrent_weights.diagonal().all()
    x = drive(with_autapses)
    assert_same_bits(run(with_autapses, x), run_functions(with_autapses, x, RECORD, weights_of(with_autapses)))
    without.load_state_dict(with_autapses.state_dict())  # a diagonal that is written is not used
    w_in, w_rec = weights_of(with_autapses)
    assert_same_bits(run(without, x), run_functions(without, x, RECORD, (w_in, w_rec.clone().fill_diagonal_(0))))
    assert not torch.equal(run(without, x)[0], run(with_autapses, x)[0])


@every_module
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "state_dict"])
def test_copies_run_alike(make: Any, how: str) -> None:
    module = make(RECORD._replace(v_thresh=torch.linspace(-55, -45, N)), learn=("v_thresh",))
    if how == "deepcopy":
        copied = copy.deepcopy(module)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(module))
    elif how == "save":
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        copied = make(RECORD._replace(v_thresh=torch.zeros(N)))
        copied.load_state_dict(torch.load(file, weights_only=True))
    else:
        copied = make(CobaLIFParameters(v_thresh=torch.zeros(N), method="triangle"), learn=("g_l",))
        copied.load_state_dict(module.state_dict())
        copied.g_l.data = copied.g_l.data.double().copy_(module.g_l)
    x = drive(module)
    assert_same_bits([o.detach() for o in run(copied, x)], [o.detach() for o in run(module, x)])
    assert repr(copied) == repr(module) or how in ("save", "state_dict")
    with torch.no_grad():
        copied.v_thresh += 1
    assert not torch.equal(copied.v_thresh, module.v_thresh)


def test_repr() -> None:
    p = default_learning_parameters._replace(v_thresh=torch.zeros(4), g_l=0.1, method="tanh")
    assert repr(CobaLIF()) == "CobaLIF(dt=1)"
    assert (
        repr(CobaLIFRecurrent(3, 4, p, 0.1, True, learn=("v_thresh",), backend="reference"))
        == "CobaLIFRecurrent(3, 4, dt=0.1, g_l=0.1, v_thresh=[4], method='tanh', learn=('v_thresh',), "
        "record_states=True, backend='reference')"
    )
    assert repr(CobaLIFCell(3, 4, autapses=True)) == "CobaLIFCell(3, 4, dt=1, autapses=True)"


class Exponential(nn.Module):
    def forward(self, log: Tensor) -> Tensor:
        return log.exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.log()


@every_module
def test_parametrized(make: Any) -> None:
    """A learned number kept positive, and one that is a buffer."""
    module = make(RECORD, learn=("g_l",))
    for name in ("g_l", "c_m_inv"):
        nn.utils.parametrize.register_parametrization(module, name, Exponential())
    x = drive(module)
    assert_same_bits(
        [o.detach() for o in run(module, x)],
        [o.detach() for o in run_functions(module, x, module.p, weights_of(module))],
    )
    sum(o.sum() for o in run(module, x)).backward()
    assert module.parametrizations.g_l.original.grad.abs() > 0
    module.double()
    assert run(module, drive(module, torch.float64))[1].dtype == torch.float64


@pytest.mark.parametrize("make", [MODULES["feed-forward"], MODULES["recurrent"]], ids=["feed-forward", "recurrent"])
def test_last_in_a_sequential(make: Any) -> None:
    neurons = make(RECORD, learn=("v_thresh",))
    inputs = N if isinstance(neurons, CobaLIF) else INPUTS
    model = nn.Sequential(nn.Linear(7, inputs), nn.ReLU(), neurons)
    spikes, state = model(torch.rand(T, B, 7))
    assert spikes.shape == (T, B, N)
    (spikes.sum() + state.v.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model[0].weight.grad.abs().max() > 0


def test_functional_call_and_vmap_over_an_ensemble() -> None:
    layers = [CobaLIF(RECORD._replace(v_thresh=v), DT, backend="reference", learn=["v_thresh"]) for v in (-52.0, -48.0)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = drive(layers[0])
    together = torch.func.vmap(lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,))[0])(parameters, buffers)
    assert_same_bits([*together.unbind()], [layer(x)[0] for layer in layers])


def test_examples_run() -> None:
    results = doctest.testmod(modules, extraglobs={"torch": torch})
    assert results.attempted >= 12
    assert results.failed == 0


@pytest.mark.parametrize("module", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
@pytest.mark.parametrize("given", [torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_spikes_of_bytes_fit_the_layer_behind(backend: str, given: torch.dtype, module: torch.dtype) -> None:
    x = torch.randint(0, 2, (40, 2, 3)).to(given)
    layers: list[torch.nn.Module] = [
        CobaLIF(dt=0.1, backend=backend),
        CobaLIFRecurrent(3, 3, dt=0.1, backend=backend),
        CobaLIFFeedForwardCell(dt=0.1),
        CobaLIFCell(3, 3, dt=0.1),
    ]
    for layer in layers:
        twice = copy.deepcopy(layer.to(module)).to(torch.float32).to(module)
        spikes, state = twice(x)
        assert spikes.dtype == module
        assert torch.nn.Linear(3, 2).to(module)(spikes).dtype == module
        assert state.v.dtype == (
            torch.float64 if module == torch.float64 and hasattr(layer, "input_size") else torch.float32
        )
        assert twice(x.half())[0].dtype == torch.float16  # an input of numbers says itself
        assert layer.to("meta").dtype == module


def test_spikes_of_half_weights_and_a_double_state() -> None:
    x, weights = torch.ones(5, 3, dtype=torch.uint8), (torch.ones(2, 3).half(), torch.ones(2, 2).bfloat16())
    assert coba_lif_integral(x, None, *weights)[0].dtype == torch.float32
    state = CobaLIFState(0.0, torch.zeros(2).double(), 0.0, 0.0)
    assert coba_lif_integral(x, state, weights[0], weights[0][:, :2])[0].dtype == torch.float64


def layers(**options: Any) -> dict[str, Any]:
    """Of each kind one, with numbers, tensors and something learned in it."""
    p = default_bio_parameters._replace(v_reset=torch.tensor(-65.0), v_thresh=-64.5)
    return {
        "feed-forward": CobaLIF(p, 0.1, learn=("v_thresh",), **options),
        "recurrent": CobaLIFRecurrent(INPUTS, INPUTS, p, 0.1, learn=("g_l",), **options),
        "feed-forward cell": CobaLIFFeedForwardCell(p, 0.1),
        "cell": CobaLIFCell(INPUTS, INPUTS, p, 0.1, autapses=True),
    }


@pytest.mark.parametrize("name", layers())
def test_symbolic_tracing(name: str) -> None:
    """As for the extraction of features: a graph of the layers, whose parameters stay those of the module."""
    layer, x = layers()[name], torch.rand(T, B, INPUTS)
    model = nn.Sequential(nn.Linear(INPUTS, INPUTS), layer)
    x = x[0] if "cell" in name else x
    traced = torch.fx.symbolic_trace(model)
    calls = [
        node.target for node in traced.graph.nodes if getattr(node.target, "__module__", "") == "coba_triton.functional"
    ]
    assert len(calls) == 1
    for _ in range(2):
        (spikes, state), (want, want_state) = traced(x), model(x)
        assert torch.equal(spikes, want) and torch.equal(state.v, want_state.v)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1.01)
    traced(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
@pytest.mark.parametrize("name", ["feed-forward", "recurrent"])
def test_export_to_onnx(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.onnx.export does first, and where it failed: a graph, and its decomposition."""
    x = torch.rand(4, B, INPUTS)
    layer, fused = layers(backend="reference")[name], layers(backend="cpu")[name]
    if name == "recurrent":
        with torch.no_grad():
            layer.recurrent_weights.fill_(0.5)
    want = layer(x)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert torch.equal(layer(x)[1].v, want[1].v)
    program = torch.export.export(layer, (x,), strict=False).run_decompositions()
    assert torch.equal(program.module()(x)[1].v, want[1].v)
    for strict in (False, True):  # the exporter tries one after the other
        with pytest.raises(
            Exception, match="backend 'cpu' runs one operator for all steps, which has no ONNX form; export w"
        ):
            torch.export.export(fused, (x,), strict=strict)


FLOATING = r"_weights must be of a floating dtype of 16 bits or more, got torch."


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["input", "recurrent"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w: w.long(), TypeError, FLOATING + r"int64; use \.float\(\)"),
        (lambda w: w.bool(), TypeError, FLOATING + r"bool; use \.float\(\)"),
        (lambda w: w + 0j, TypeError, FLOATING + r"complex64; use \.real"),
        (lambda w: w[0], ValueError, r"_weights must be a matrix, .* got shape \[\d\]; reshape it"),
        (lambda w: w[None], ValueError, r"_weights must be a matrix, .* got shape \[1, 5, \d\]; reshape it"),
        (
            lambda w: w[:3],
            ValueError,
            r"_weights must be \[5, \d\] for .*, got \[3, \d\]; transpose them, or pass",
        ),
    ],
)
def test_weights_that_are_wrong_are_refused_by_modules_and_functions_alike(
    change: Any, error: type[Exception], message: str, name: str, kind: str
) -> None:
    """At construction, in the words of a call."""
    given = {"input_weights": torch.ones(N, INPUTS), "recurrent_weights": torch.ones(N, N)}
    wrong = change(given[f"{name}_weights"])
    given[f"{name}_weights"] = wrong.to_sparse() if kind == "sparse" else wrong
    for module in (CobaLIFRecurrent, CobaLIFCell):
        with pytest.raises(error, match=name + message):
            module(INPUTS, N, **given)
    if "for " not in message:
        with pytest.raises(error, match=name + message):
            coba_lif_integral(torch.ones(T, INPUTS), None, **given)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("kind", ["dense", "sparse", "delay"])
@pytest.mark.parametrize("name", ["input", "recurrent"])
def test_weights_of_eight_bits_and_nested_ones_are_refused(name: str, kind: str, layout: torch.layout) -> None:
    """Whatever the other weights are."""
    other: Any = torch.ones(N, N if name == "input" else INPUTS)
    options: dict[str, Any] = {"delay": 1.0} if kind == "delay" else {}
    other = Synapses.from_torch(other) if kind == "sparse" else other
    eight = torch.ones(N, INPUTS if name == "input" else N).to(torch.float8_e4m3fn)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    said = "_weights must be dense, got a nested tensor; use .to_padded_tensor"
    for wrong, message in ((eight, FLOATING + "float8"), (nested, said)):
        given = {f"{name}_weights": wrong, ("recurrent" if name == "input" else "input") + "_weights": other}
        with pytest.raises(TypeError, match=name + message):
            CobaLIFRecurrent(INPUTS, N, **given, **options)
        with pytest.raises(TypeError, match=name + message):
            coba_lif_integral(torch.ones(T, INPUTS), None, **given, **options)


@pytest.mark.parametrize(
    ("delay", "error", "message"),
    [
        ("x", TypeError, "must be real numbers, got <U1; use"),
        (object(), TypeError, "must be real numbers, got object; use"),
        (float("nan"), ValueError, "must be finite, got nan; correct"),
        (float("inf"), ValueError, "must be finite, got inf; correct"),
        (-1.0, ValueError, "must not be negative, got -1 ms; correct its sign"),
        (0.1, ValueError, "must be at least one step of dt=1 ms, got 0.1 ms; lengthen it"),
        (0, ValueError, "must be at least one step of dt=1 ms, got 0 ms; lengthen it"),
        ([1.0] * 4 + [0.2], ValueError, "must be at least one step of dt=1 ms, got 0.2 ms; lengthen it"),
        (1e20, ValueError, "must be at most 2,147,483,647 steps"),
        (
            [1.0, 2.0],
            ValueError,
            r"must be a number, \[[NK]\]=\[5\] or \[N, [NK]\]=\[5, 5\].*, got shape \[2\]; pass one number",
        ),
        (torch.ones(2, device="meta"), ValueError, r"must be a number, \[N\]=\[5\] .* got shape \[2\]; pass one number"),
        (torch.ones(N, dtype=torch.complex64), TypeError, "must be of a floating dtype .*complex64; use .real"),
        (torch.ones(N).to_sparse(), TypeError, "must be dense, got torch.sparse_coo; use .to_dense()"),
        (torch.ones(N, requires_grad=True), ValueError, r"must not require a gradient, .* pass \.detach\(\)"),
    ],
)
def test_a_delay_that_a_call_would_refuse_is_refused_at_construction(
    delay: Any, error: type[Exception], message: str
) -> None:
    for module in (CobaLIFRecurrent, CobaLIFCell):
        with pytest.raises(error, match=f"delay {message}"):
            module(INPUTS, N, delay=delay)
    if not isinstance(delay, Tensor) or not delay.is_meta:
        with pytest.raises(error, match=f"delays? {message}"):
            coba_lif_integral(torch.ones(T, INPUTS), None, torch.ones(N, INPUTS), torch.ones(N, N), dt=1.0, delay=delay)


def test_delays_that_are_right_are_taken() -> None:
    for delay in (1, 1.5, np.float32(2), [1.0] * N, np.ones(N), torch.ones(()), torch.ones(N, N), torch.ones(N).double()):
        layer = CobaLIFRecurrent(INPUTS, N, delay=delay)
        assert layer.delay.dtype == torch.float32
        layer(torch.ones(4, INPUTS))
    with torch.device("meta"):
        assert CobaLIFRecurrent(INPUTS, N, delay=1.5).delay.is_meta


@pytest.mark.parametrize("kind", ["synapses", "layout", "delay", "cell"])
def test_sparse_synapses_are_not_exported_to_onnx(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(4, B, INPUTS)
    matrix = torch.full((5, 5), 0.5)
    given = {"synapses": Synapses.from_torch(matrix), "layout": matrix.to_sparse(), "delay": None}
    options: dict[str, Any] = (
        {"delay": 0.3} if kind == "delay" else {"recurrent_weights": given.get(kind, given["synapses"])}
    )
    layer: nn.Module = CobaLIFRecurrent(INPUTS, 5, dt=0.1, backend="reference", **options)
    if kind == "cell":
        layer, x = CobaLIFCell(INPUTS, 5, dt=0.1, **options), x[0]
    layer(x)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(Exception, match=r"an ONNX file needs dense weights without delays, got sparse synapses or delays"):
        torch.export.export(layer, (x,), strict=False)


def test_onnx_runtime(tmp_path: Any) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    x = torch.rand(4, B, INPUTS)
    for name in ("feed-forward", "recurrent"):
        layer = layers(backend="reference")[name]
        torch.onnx.export(layer, (x,), tmp_path / "m.onnx", dynamo=True, verbose=False)
        session = runtime.InferenceSession(tmp_path / "m.onnx")
        outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_array_equal(outputs[0], layer(x)[0].detach().numpy())
