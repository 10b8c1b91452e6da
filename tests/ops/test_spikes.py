"""Spikes packed along time."""

import pytest
import torch

from coba_triton import pack_spikes, unpack_spikes


@pytest.mark.parametrize("steps", [0, 1, 31, 32, 33, 100])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)], ids=str)
def test_round_trip(steps: int, shape: tuple[int, ...]) -> None:
    spikes = torch.rand(steps, *shape) < 0.4
    words = pack_spikes(spikes)
    assert words.dtype == torch.int32 and words.shape == (-(-steps // 32), *shape)
    assert torch.equal(unpack_spikes(words, steps), spikes)
    assert torch.equal(unpack_spikes(words, steps, torch.float64), spikes.double())


def test_bit_order() -> None:
    spikes = torch.zeros(40)
    spikes[[0, 31, 33]] = 1
    low, high = pack_spikes(spikes).tolist()
    assert low & 0xFFFFFFFF == 1 | 1 << 31
    assert high == 1 << 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack_spikes(torch.tensor(1)), ValueError, "leading time axis"),
        (lambda: unpack_spikes(torch.zeros(1, dtype=torch.int64), 3), TypeError, "int32 as pack_spikes makes them"),
        (lambda: unpack_spikes(torch.zeros(2, dtype=torch.int32), 3), ValueError, "3 steps are held by 1 words"),
        (lambda: unpack_spikes(torch.tensor(2, dtype=torch.int32), 3), ValueError, "got shape \\[\\]"),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
