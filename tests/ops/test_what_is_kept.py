"""What was made of tensors is found again until one of them changes."""

from __future__ import annotations

import gc

import torch

from coba_triton.ops.kept import Kept


def test_is_found_until_a_tensor_changes() -> None:
    kept: Kept[object] = Kept()
    a, b = torch.zeros(3), torch.zeros(3)
    first = kept.get(a, (b, None), 1, object)
    assert kept.get(a, (b, None), 1, object) is first
    assert kept.find(a, (b, None), 2) is None
    assert kept.find(a, (b.clone(), None), 1) is None
    assert kept.find(b, (b, None), 1) is None
    b.add_(1)
    assert kept.find(a, (b, None), 1) is None
    second = kept.get(a, (b, None), 1, object)
    assert second is not first and kept.find(a, (b, None), 1) is second
    a.add_(1)
    assert kept.find(a, (b, None), 1) is None


def test_is_given_up_with_its_tensor() -> None:
    kept: Kept[object] = Kept()
    a = torch.zeros(3)
    kept.keep(a, (), None, object())
    assert a in kept and len(kept._made) == 1
    del a
    gc.collect()
    assert len(kept._made) == 0


def test_nothing_is_kept_for_tensors_that_do_not_tell_of_changes() -> None:
    kept: Kept[object] = Kept()
    plain = torch.zeros(3)
    with torch.inference_mode():
        silent = torch.zeros(3)
        for of, others in ((silent, ()), (plain, (silent,))):
            assert kept.get(of, others, None, object) is not kept.get(of, others, None, object)
            assert of not in kept
        assert kept.get(plain, (), None, object) is kept.get(plain, (), None, object)
