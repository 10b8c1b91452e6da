"""What :mod:`coba_triton._recurrent` asks of a backend, on the CPU: launches of the recurrent CPU kernels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _cpu_recurrent_kernels as kernels
from ._cpu import MIN_STEPS_PER_THREAD, _constants, _pool
from ._recurrent import Network
from .spikes import pack_spikes, unpack_spikes


def _launch(kernel: Callable[..., None], *args: Any, rows: int, work: int) -> None:
    """Run ``kernel`` over all rows, as many threads as PyTorch uses; ``work``: operations of all rows together."""
    threads = max(1, min(torch.get_num_threads(), rows, work // MIN_STEPS_PER_THREAD))
    bounds = [rows * thread // threads for thread in range(threads + 1)]
    jobs = [
        _pool(os.getpid(), threads - 1).submit(kernel, *args, begin, end) for begin, end in itertools.pairwise(bounds[1:])
    ]
    kernel(*args, bounds[0], bounds[1])
    for job in jobs:
        job.result()


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


def project_events(sources: Tensor, weights: Tensor) -> Tensor:
    """``relu(W) x`` and ``relu(-W) x`` for ``sources [R, K]`` and ``weights [K, N]``: ``[2, R, N]``, summed ascending."""
    rows, neurons = sources.shape[0], weights.shape[1]
    drive = weights.new_empty(2, rows, neurons)
    values = _array(sources.to(weights.dtype))
    _launch(kernels.projection_kernel(), values, _array(weights), _array(drive), rows=rows, work=rows * neurons)
    return drive


def recurrent_block(
    net: Network,
    weights: Tensor,
    drive: Tensor,
    first: Tensor,
    state: Tensor,
    spikes: Tensor | None,
    words: Tensor | None,
    states: Tensor | None,
    sliced: bool,
) -> Tensor:
    """One event-driven block; shapes as in :mod:`coba_triton._triton`. Returns the state."""
    if sliced:
        raise RuntimeError("path 'sliced' is for GPUs with many processors, got backend 'cpu'; pass path='events'")
    _, steps, batch, neurons = drive.shape
    fired = torch.empty(steps, batch, neurons, dtype=torch.uint8)
    trace = state.new_empty(3, steps if states is not None else 0, batch, neurons)
    final = state.clone()
    _launch(
        kernels.block_kernel(), _array(drive), _array(first), _array(weights), *_constants(net.constants), _array(final),
        _array(fired), _array(trace), net.jump_first, rows=batch, work=fired.numel(),
    )  # fmt: skip
    if spikes is not None:
        spikes.copy_(fired)
    if words is not None:
        words.copy_(pack_spikes(fired))
    if states is not None:
        states.copy_(trace)
    return final


def _driven(
    net: Network,
    drive: Tensor,
    recurrent_drive: Tensor,
    state: Tensor,
    fired: Tensor,
    forced: bool,
    trace: Tensor,
    trajectory: Tensor,
) -> Tensor:
    steps, cells = fired.shape[0], state[0].numel()
    final = state.clone()
    flat = [tensor.reshape(*tensor.shape[:2], cells) for tensor in (drive, recurrent_drive)]
    _launch(
        kernels.driven_kernel(), *map(_array, flat), *_constants(net.constants), _array(final.view(3, cells)),
        _array(fired.view(steps, cells)), forced, _array(trace.view(3, -1, cells)), _array(trajectory.view(6, -1, cells)),
        net.jump_first, rows=cells, work=steps * cells,
    )  # fmt: skip
    return final


def recurrent_step(
    net: Network, drive: Tensor, recurrent_drive: Tensor, state: Tensor, spikes: Tensor, states: Tensor | None
) -> Tensor:
    """One step with both drives ``[2, B, N]`` known; fills ``spikes [B, N]`` and returns the state."""
    fired = torch.empty(1, *spikes.shape, dtype=torch.uint8)
    none = state.new_empty(6, 0, *spikes.shape)
    state = _driven(net, drive[:, None], recurrent_drive[:, None], state, fired, False, none[:3], none)
    spikes.copy_(fired[0])
    if states is not None:
        states.copy_(state)
    return state


def recurrent_replay(net: Network, drive: Tensor, recurrent_drive: Tensor, state: Tensor, words: Tensor) -> Tensor:
    """The trajectory ``[6, T, B, N]`` of a block whose spikes are known."""
    trajectory = state.new_empty(6, *drive.shape[1:])
    fired = unpack_spikes(words, drive.shape[1], torch.uint8)
    _driven(net, drive, recurrent_drive, state, fired, True, trajectory[:3, :0], trajectory)
    return trajectory


def recurrent_sweep(
    net: Network,
    split_weights: Tensor,
    trajectory: Tensor,
    words: Tensor,
    start: int,
    method: str,
    grad_spikes: Tensor | None,
    grad_states: Tensor | None,
    lam: Tensor,
    lam_z: Tensor,
    adjoints: Tensor,
    grad_constants: Tensor | None,
) -> Tensor:
    """Sweep back through a block: fills ``adjoints [T, B, 2 N]``, carries ``lam`` on, returns the new ``lam_z``."""
    steps, batch, neurons = trajectory.shape[1:]
    none = lam.new_empty(0, batch, neurons)
    gradients = none if grad_spikes is None else grad_spikes[start : start + steps].view(steps, batch, neurons)
    arrays = [
        _array(trajectory),
        _array(unpack_spikes(words, steps, torch.uint8)),
        *_constants(net.constants),
        _array(gradients.to(lam.dtype)),
    ]
    sums = _array(lam.new_empty(net.constants.shape[0], 0) if grad_constants is None else grad_constants)
    before = torch.zeros_like(lam)
    for t in reversed(range(steps)):
        if grad_states is not None:
            before = grad_states[:, start + t - 1] if start + t > 0 else torch.zeros_like(lam)
        _launch(
            kernels.sweep_kernel(method), t, *arrays, _array(before), _array(lam), _array(lam_z), _array(adjoints), sums,
            net.jump_first, rows=batch, work=batch * neurons,
        )  # fmt: skip
        torch.mm(adjoints[t], split_weights, out=lam_z)
    return lam_z
