"""Every message for a wrong argument says what, expected, got, and the way out; the stability warning."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from coba_triton import (
    CobaLIF,
    CobaLIFCell,
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    CobaLIFRecurrent,
    CobaLIFState,
    PoissonSource,
    coba_lif_feed_forward_integral,
    coba_lif_feed_forward_step,
    coba_lif_integral,
    coba_lif_step,
    from_pynn,
    simulate,
)
from coba_triton.neuron.records import NUMERIC_PARAMETERS

X = torch.zeros(4, 3)
W_IN, W_REC = torch.zeros(2, 3), torch.zeros(2, 2)
META = torch.zeros(3, device="meta")


def ff(x: Any = X, state: Any = None, p: Any = CobaLIFParameters(), dt: Any = 0.1, **options: Any) -> Any:  # noqa: B008
    return coba_lif_feed_forward_integral(x, state, p, dt, **options)


def rec(x: Any = X, state: Any = None, w_in: Any = W_IN, w_rec: Any = W_REC, **options: Any) -> Any:
    return coba_lif_integral(x, state, w_in, w_rec, **options)


def number(name: str, value: Any) -> Any:
    return ff(p=CobaLIFParameters(**{name: value}))


CASES: dict[str, tuple[Any, type[Exception], str]] = {
    "dt zero": (lambda: ff(dt=0.0), ValueError, "dt must be a positive finite number of ms, got 0.0"),
    "dt nan": (lambda: ff(dt=float("nan")), ValueError, "dt must be a positive finite number of ms, got nan"),
    "dt inf": (lambda: ff(dt=float("inf")), ValueError, "got inf"),
    "dt type": (lambda: ff(dt=torch.tensor(0.1)), TypeError, "got Tensor; pass a Python float"),
    "dt step": (lambda: coba_lif_feed_forward_step(X, None, dt=-1), ValueError, "dt must be"),
    "order": (lambda: ff(order="other"), ValueError, "order must be 'decay_first' or 'jump_first'.*got 'other'"),
    "backend": (lambda: ff(backend="gpu"), ValueError, "one of 'auto', 'reference', 'triton', 'cpu', got 'gpu'"),
    "backend rec": (lambda: rec(backend="gpu"), ValueError, "backend must be one of"),
    "path": (lambda: rec(path="sparse"), ValueError, "one of 'auto', 'events', 'sliced', 'dense', got 'sparse'"),
    "method": (
        lambda: ff(p=CobaLIFParameters(method="sigmoid")),
        ValueError,
        "'super', 'triangle', 'tanh', 'circ', 'heavi_erfc', 'heaviside', got 'sigmoid'",
    ),
    "input type": (lambda: ff(np.zeros((4, 3))), TypeError, "torch.Tensor .* got ndarray; wrap arrays in torch.as_t"),
    "input complex": (lambda: ff(X.to(torch.complex64)), TypeError, "must be real.*complex64"),
    "input rank": (lambda: ff(torch.tensor(1.0)), ValueError, r"must be \[T, ...\], got shape \[\]; add the missing"),
    "input rank rec": (lambda: rec(torch.zeros(3)), ValueError, r"\[T, \*batch, I\], got shape \[3\]"),
    "input rank rec step": (
        lambda: coba_lif_step(torch.tensor(1.0), None, W_IN, W_REC),
        ValueError,
        r"\[\*batch, I\], got shape \[\]",
    ),
    "state fields": (
        lambda: ff(state=SimpleNamespace(v=0.0, g_e=0.0)),
        TypeError,
        "state must have the fields v, g_e, g_i, got SimpleNamespace without g_i; pass None to start at rest",
    ),
    "state needs z": (lambda: rec(state=CobaLIFFeedForwardState(0.0, 0.0, 0.0)), TypeError, "without z"),
    "state type": (
        lambda: ff(state=CobaLIFFeedForwardState("a", 0.0, 0.0)),
        TypeError,
        "state.v must be a real number",
    ),
    "state shape": (
        lambda: ff(state=CobaLIFFeedForwardState(torch.zeros(2), 0.0, 0.0)),
        ValueError,
        r"state.v must broadcast to the neurons \[3\], got \[2\]; pass one number to share it",
    ),
    "state shape rec": (
        lambda: coba_lif_step(X[0], SimpleNamespace(z=torch.zeros(5, 2), v=0.0, g_e=0.0, g_i=0.0), W_IN, W_REC),
        ValueError,
        r"state.z must broadcast to the neurons \[2\], got \[5, 2\]",
    ),
    "state device": (
        lambda: ff(state=CobaLIFFeedForwardState(META, 0.0, 0.0)),
        ValueError,
        r"state.v must be on the input's device 'cpu', got 'meta'; move it with .to\('cpu'\)",
    ),
    "parameters fields": (lambda: ff(p=SimpleNamespace(g_l=1.0)), TypeError, "SimpleNamespace without tau_syn_exc_inv"),
    "parameter shape": (
        lambda: number("v_thresh", torch.zeros(64)),
        ValueError,
        r"v_thresh must broadcast to the neurons \[3\], got \[64\]; pass one number to share it",
    ),
    "parameter bool": (lambda: number("g_l", True), TypeError, "g_l must be a real number .* got bool"),
    "parameter bool tensor": (lambda: number("g_l", torch.tensor(True)), TypeError, "got a tensor of torch.bool"),
    "parameter array": (lambda: number("g_l", np.zeros(3)), TypeError, "got ndarray; wrap arrays in torch.as_tensor"),
    **{
        f"parameter {name} {value}": (
            lambda name=name, value=value: number(name, value),
            ValueError,
            f"{name} must be finite, got {value}; ",
        )
        for name in NUMERIC_PARAMETERS
        for value in (float("nan"), float("inf"), float("-inf"))
    },
    **{
        f"parameter {name} negative": (
            lambda name=name: number(name, -1),
            ValueError,
            f"{name} must not be negative, got -1.0; correct its sign",
        )
        for name in ("tau_syn_exc_inv", "tau_syn_inh_inv", "c_m_inv", "g_l", "alpha")
    },
    "parameter of a module": (
        lambda: CobaLIFCell(3, 2, CobaLIFParameters(g_l=np.float32("nan"))),
        ValueError,
        "g_l must be finite, got nan",
    ),
    "threshold that is never reached": (lambda: number("v_thresh", float("inf")), ValueError, "never fire, pass .* as 1e9"),
    "state nan": (
        lambda: rec(state=CobaLIFState(0.0, float("nan"), 0.0, 0.0)),
        ValueError,
        "state.v must be finite, got nan; correct it where it comes from",
    ),
    "state negative": (
        lambda: ff(state=CobaLIFFeedForwardState(-65.0, 0.0, -0.1)),
        ValueError,
        "state.g_i must not be negative, got -0.1",
    ),
    "rate of a source": (lambda: PoissonSource(float("nan"), 5, (2,)), ValueError, "rate must be finite"),
    "weight of a source": (lambda: PoissonSource(1.0, 5, (2,), weight=float("inf")), ValueError, "weight must be finite"),
    "input sparse": (lambda: ff(X.to_sparse()), TypeError, "must be dense, got torch.sparse_coo; use .to_dense"),
    "weights type with synapses": (lambda: rec(w_in=[[1.0]], delay=1.0), TypeError, "input_weights must be .* got list"),
    "size": (lambda: CobaLIFCell(True, 2), TypeError, "input_size must be .* got bool"),
    "weights type": (lambda: rec(w_in=[[1.0]]), TypeError, "input_weights must be a torch.Tensor, got list"),
    "weights dtype": (lambda: rec(w_rec=W_REC.int()), TypeError, "recurrent_weights must be of a floating dtype"),
    "weights rank": (lambda: rec(w_in=torch.zeros(3)), ValueError, r"input_weights must be a matrix.*got shape \[3\]"),
    "weights inputs": (
        lambda: rec(w_in=torch.zeros(3, 2)),
        ValueError,
        r"\[N, I\]=\[3, 3\] for an input of I=3, got \[3, 2\]; transpose",
    ),
    "weights square": (
        lambda: rec(w_rec=torch.zeros(3, 3)),
        ValueError,
        r"recurrent_weights must be \[N, N\]=\[2, 2\] like input_weights \[N, I\]=\[2, 3\], got \[3, 3\]",
    ),
    "weights device": (lambda: rec(w_in=W_IN.to("meta")), ValueError, "input_weights must be on the input's device"),
    "spike_dtype": (lambda: ff(spike_dtype=torch.int64), ValueError, "or None for the input's, got torch.int64"),
    "spike_dtype name": (lambda: ff(spike_dtype="bit"), ValueError, "'bits' or None"),
    "block_steps": (lambda: ff(block_steps=0), ValueError, "positive int or None for one block, got 0"),
    "block_steps type": (lambda: ff(block_steps=2.0), TypeError, "positive int or None, got float"),
    "time_chunks": (lambda: ff(time_chunks=0), ValueError, "positive int, 1 for a run in order, or None .* got 0"),
    "time_chunks type": (lambda: ff(time_chunks=True), TypeError, "positive int or None, got bool"),
    "block_steps bits": (lambda: ff(block_steps=40, spike_dtype="bits"), ValueError, "multiple of 32 .* got 40"),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name: str) -> None:
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()


def test_unstable_step_warns_once() -> None:
    x, state = torch.zeros(2, 3), CobaLIFFeedForwardState(-20.0, torch.tensor([0.0, 5.0, 1.0]), 0.0)
    p = CobaLIFParameters()
    with pytest.warns(UserWarning, match=r"unstable: dt \* c_m_inv \* .* is 2.62 .* make dt smaller than 0.0381"):
        ff(x, state, p, 0.1)
    with pytest.warns(UserWarning, match=r"overshoots: dt \* c_m_inv \* .* is 1.84 at the given state, more than 1; make"):
        ff(x, state, p, 0.07)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ff(x, state, p, 0.1)
        ff(x, state, p, 0.038)


@pytest.mark.parametrize(("dt", "what"), [(0.3, "overshoots"), (0.5, "is unstable")])
@pytest.mark.parametrize("call", ["function", "recurrent", "module", "cell", "tensor"])
def test_rates_of_synapses_are_looked_at(call: str, dt: float, what: str) -> None:
    p = from_pynn({"t_ref": 0.0, "tau_syn_in": 100.0}, model="iaf_cond_exp")
    with pytest.warns(
        UserWarning, match=rf"step {what}: dt \* tau_syn_exc_inv is {5 * dt:.3g}, .* smaller than 0.2"
    ) as seen:
        match call:
            case "function":
                ff(p=p, dt=dt)
            case "recurrent":
                rec(p=p, dt=dt)
            case "module":
                CobaLIF(p, dt)
            case "cell":
                CobaLIFCell(3, 2, p, dt)
            case "tensor":
                ff(p=p._replace(tau_syn_exc_inv=torch.tensor([0.1, 5.0, 0.1])), dt=dt)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CobaLIF(p, dt=0.1)(X)


def test_unstable_step_warns_of_tensors_and_single_steps() -> None:
    p = CobaLIFParameters(g_l=torch.tensor([1.0, 6.0]))
    with pytest.warns(UserWarning, match="is 3 at the given state"):
        coba_lif_feed_forward_step(torch.zeros(2), None, p, 0.1)
    with pytest.warns(UserWarning, match="unstable"):
        coba_lif_step(X[0], None, W_IN, W_REC, p, 0.2)


def test_numbers_of_numpy() -> None:
    torch.manual_seed(0)
    x, weights = torch.rand(70, 3), (torch.ones(2, 3) / 8, torch.ones(2, 2) / 8)
    p = CobaLIFParameters(c_m_inv=torch.tensor(5.0, requires_grad=True))
    want = coba_lif_integral(x, None, *weights, p, 0.1, block_steps=32)
    for dt in (np.float64(0.1), np.float64("0.1")):
        got = coba_lif_integral(x, None, *weights, p, dt, block_steps=np.int64(32))  # type: ignore[arg-type]
        assert torch.equal(got[0], want[0]) and torch.equal(got[1].v, want[1].v)
    assert coba_lif_step(x[0], None, *weights, p, np.float64(0.1))[1].v.requires_grad
    assert ff(x, dt=np.float32(0.1))[1].v.dtype == torch.float32
    module = CobaLIFRecurrent(np.int64(3), np.uint8(2), dt=np.float64(0.1), block_steps=np.int16(32))  # type: ignore[arg-type]
    assert type(module.hidden_size) is type(module.block_steps) is int
    assert module(x)[0].shape == (70, 2)
    simulate(module, x / 9999, block_steps=np.int64(32))  # type: ignore[arg-type]
