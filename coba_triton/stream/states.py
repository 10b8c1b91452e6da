"""The state of a run as one array of numbers ``[F, *neurons]``, as sinks keep it.

The fields of the record are its first rows. Spikes that are under way for more than one step follow from those of the last D
steps: further rows have them as whole numbers of 24 bits, which float32 holds. Bit ``i`` of the last row is the spike of the
last but ``i``-th step, and of ``w`` rows before that one, of the last but ``24 w + i``-th.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..neuron.records import CobaLIFDelayState, feed_forward_state, recurrent_state
from .store import history_rows

BITS = 24  # of a number of float32 that counts up to a power of two


def pack_state(state: Any) -> Tensor:
    """The array of a record."""
    if not isinstance(state, CobaLIFDelayState):
        return torch.stack(list(state))
    fields: Any = state[:-1]
    history: Any = state.history
    rows = history_rows(len(history))
    spikes = history.new_zeros(rows * BITS, *history.shape[1:])
    spikes[len(spikes) - len(history) :] = history
    powers = 2.0 ** torch.arange(BITS - 1, -1, -1, dtype=history.dtype, device=history.device)
    words = (spikes.view(rows, BITS, -1) * powers[:, None]).sum(1)  # every partial sum is a whole number below 2**24
    return torch.cat([torch.stack(list(fields)), words.view(rows, *history.shape[1:])])


def unpack_state(array: Tensor, recurrent: bool, longest: int = 1) -> Any:
    """The record of an array.

    Args:
        array: as :func:`pack_state` gives it.
        recurrent: whether the neurons are connected.
        longest: D, steps of the longest delay.
    """
    if longest == 1:
        fields: Sequence[Tensor] = array.unbind()
        return recurrent_state(*fields) if recurrent else feed_forward_state(*fields)
    rows = history_rows(longest)
    numbers = array[len(array) - rows :].long()
    shifts = torch.arange(BITS - 1, -1, -1, device=array.device).view(-1, *[1] * (array.dim() - 1))
    spikes = ((numbers[:, None] >> shifts) & 1).flatten(0, 1)[-longest:].to(array.dtype)
    return recurrent_state(*array[: len(array) - rows].unbind(), spikes)
