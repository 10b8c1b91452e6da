"""Constants and states of Python numbers are made once, and are never out of date, whatever changes and whoever asks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from coba_triton import CobaLIF, CobaLIFParameters, CobaLIFRecurrent, coba_lif_feed_forward_integral
from coba_triton.neuron.records import NUMERIC_PARAMETERS
from coba_triton.ops import tensors
from coba_triton.ops.constants import constants_table, derive_constants
from coba_triton.ops.tensors import number_key

CPU = torch.device("cpu")
X = torch.full((200, 5), 0.02)
P = CobaLIFParameters(v_rest=-65.0, v_reset=-65.0, v_thresh=-50.0, e_rev_E=0.0, g_l=0.01)


def spikes(p: CobaLIFParameters, backend: str = "cpu") -> Tensor:
    return coba_lif_feed_forward_integral(X, None, p, 0.1, backend=backend)[0]


def test_the_same_numbers_have_the_same_table() -> None:
    first, again = (constants_table(P, 0.1, torch.float32, CPU, torch.Size([5])) for _ in range(2))
    assert first.data_ptr() == again.data_ptr()
    for other in (P._replace(g_l=0.02), P._replace(alpha=1.0)):
        assert not torch.equal(constants_table(other, 0.1, torch.float32, CPU, torch.Size([5])), first)
    assert not torch.equal(constants_table(P, 0.2, torch.float32, CPU, torch.Size([5])), first)
    assert constants_table(P, 0.1, torch.float64, CPU, torch.Size([5])).dtype == torch.float64


@pytest.mark.parametrize("change", ["in place", "data", "memory"])
def test_a_tensor_that_has_changed_is_read_again(change: str) -> None:
    memory = np.array(-50.0, np.float32)
    threshold = torch.from_numpy(memory)
    p = P._replace(v_thresh=threshold)
    before = spikes(p)
    if change == "in place":
        threshold.sub_(10.0)
    elif change == "data":
        threshold.data = torch.tensor(-60.0)
    else:
        memory -= 10.0
    after = spikes(p)
    assert after.sum() > before.sum() > 0
    assert torch.equal(after, spikes(p, "reference"))


@pytest.mark.filterwarnings("ignore:the neurons of CobaLIF fired")  # in most steps, with the lower threshold
@pytest.mark.parametrize("learn", [(), ("v_thresh",)], ids=["buffer", "parameter"])
def test_a_module_that_has_changed_is_read_again(learn: tuple[str, ...]) -> None:
    module = CobaLIF(P, 0.1, learn=learn, backend="cpu")
    with torch.no_grad():
        before = module(X)[0]
        module.v_thresh.data.fill_(-60.0)
        assert module(X)[0].sum() > before.sum() > 0
        module.load_state_dict(CobaLIF(P, 0.1, learn=learn).state_dict())
        assert torch.equal(module(X)[0], before)


def test_single_tensors_of_any_kind_are_read() -> None:
    negative = torch.tensor(1 + 50j).conj().imag  # a view whose memory has another sign
    assert negative.is_neg()
    for threshold in (negative, torch.tensor(-50), torch.tensor(-50.0).bfloat16(), torch.tensor(-50.0).half()):
        assert torch.equal(spikes(P._replace(v_thresh=threshold)), spikes(P))


def test_negative_zero_is_another_number() -> None:
    for zero in (0.0, -0.0, 0.0):
        _, state = coba_lif_feed_forward_integral(X[:0], None, P._replace(v_rest=zero), 0.1, backend="cpu")
        assert torch.signbit(state.v).all() == (math.copysign(1.0, zero) < 0)
    assert number_key(P._replace(v_rest=0.0)) != number_key(P._replace(v_rest=-0.0))


def test_a_state_at_rest_that_is_edited_is_the_callers() -> None:
    _, state = coba_lif_feed_forward_integral(X[:0], None, P, 0.1, backend="cpu")
    state.v.zero_()
    _, again = coba_lif_feed_forward_integral(X[:0], None, P, 0.1, backend="cpu")
    assert (again.v == -65.0).all()
    _, state = coba_lif_feed_forward_integral(X[:0, :1], None, P, 0.1, backend="cpu")  # one neuron: nothing to expand
    state.v.zero_()
    _, again = coba_lif_feed_forward_integral(X[:0, :1], None, P, 0.1, backend="cpu")
    assert (again.v == -65.0).all()


def test_what_inference_mode_makes_serves_training() -> None:
    p = P._replace(g_l=0.0123)
    with torch.inference_mode():
        spikes(p)
    x = X.clone().requires_grad_()
    coba_lif_feed_forward_integral(x, None, p, 0.1, backend="cpu")[0].sum().backward()
    assert x.grad is not None


def test_what_a_transform_makes_is_not_kept() -> None:
    p = P._replace(g_l=0.0124)
    torch.func.grad(lambda x: coba_lif_feed_forward_integral(x, None, p, 0.1, backend="cpu")[1].v.sum())(X)
    assert all(
        type(kept) is Tensor and not torch._C._functorch.is_gradtrackingtensor(kept) for kept in tensors._kept.values()
    )
    assert torch.equal(spikes(p), spikes(p, "reference"))


def test_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_KEPT_AT_MOST", 8)
    for i in range(40):
        spikes(P._replace(g_l=0.01 + 0.001 * i))
        assert len(tensors._kept) <= 8


def test_doubles_of_one_device_are_converted_together() -> None:
    """As a module's numbers on a GPU are: the bits and the gradients of converting each."""
    numbers = {name: torch.tensor(0.1 + 0.37 * i, dtype=torch.float64) for i, name in enumerate(NUMERIC_PARAMETERS)}
    plain = CobaLIFParameters(**{name: value.item() for name, value in numbers.items()})
    for value in numbers.values():
        value.requires_grad_()  # or they would be read
    p = CobaLIFParameters(**numbers)
    together = derive_constants(p, 0.3, torch.float32, CPU)
    assert [c.item() for c in together] == [c.item() for c in derive_constants(plain, 0.3, torch.float32, CPU)]
    torch.stack(together).sum().backward()
    grads = {name: None if value.grad is None else value.grad.item() for name, value in numbers.items()}
    assert grads == {name: 1.0 for name in NUMERIC_PARAMETERS} | {
        "tau_syn_exc_inv": -0.3, "tau_syn_inh_inv": -0.3, "c_m_inv": 0.3, "alpha": None, "refractory": None,
        "conductance_based": None,
    }  # fmt: skip


def test_a_module_of_half_precision_keeps_its_numbers() -> None:
    module = CobaLIFRecurrent(5, 3, P, 0.1, backend="cpu").half()
    assert module._parameters_for() == P._replace(method="super")
