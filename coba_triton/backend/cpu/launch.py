"""What a backend must offer, on the CPU: launches of the kernels, whose neurons or batch rows are split over threads."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...ops import memory as kept_memory
from ...ops.call import (
    CPU_CHECKPOINT_EVERY,
    DIFFERENTIABLE,
    Call,
    Incoming,
    Network,
    Outputs,
    Projection,
    Saved,
    SparseNetwork,
    SparseSweep,
    Sweep,
    kept_count,
)
from ...ops.kept import Kept
from ...tuning.tables import Parameters, launch_parameters
from . import checksums, feed_forward, products, recurrent, sparse, sparse_backward, time_chunks
from .events import count_kernel, list_kernel, unpack_kernel
from .lanes import LANES
from .meeting import memory_apart
from .rows import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, TILE, UINT8, Strided
from .threads import run

T = TypeVar("T")

# A buffer of this size is worth pages of 2 MiB: the first touch of a page of 4 KiB costs more than the arithmetic.
HUGE_PAGES_FROM = 8 << 20
# Below so many neuron-steps a thread, handing the work over costs more than it saves.
MIN_STEPS_PER_THREAD = 1 << 19
# A thread's neurons are a multiple of this, so that no two threads write to one cache line.
SHARE_OF = 64
# Where threads share a batch row, each has so many neuron-steps to compute before it meets the others: half a microsecond.
MIN_STEPS_TO_MEETING = 1000
# A projection of sources of which more than this are not 0 is a matrix product, of fewer a sum over events.
EVENT_DENSITY = 0.25
# A block follows the dense path if the one before it had a higher rate of spikes per neuron and step.
DENSE_RATE = 0.2
# Weights of which a larger part than this is not 0 are read as dense rows.
SYNAPSE_DENSITY = 1 / 16
# So are weights that serve fewer steps a source than this.
SYNAPSE_USES = 2
# So many sources tell whether it is worth while to look at all of them.
SAMPLED_SOURCES = 64

TYPE_CODES = {
    torch.float32: FLOAT32,
    torch.float64: FLOAT64,
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
    torch.uint8: UINT8,
    torch.bool: UINT8,
}


def heuristic(kernel: str, dtype: torch.dtype, neurons: int, batch: int) -> Parameters:
    """The launch parameters where no tuning table has any; see :data:`coba_triton.tuning.SPACE`."""
    parameters = {"threads": torch.get_num_threads()}
    if kernel.startswith("feed_forward"):
        parameters = {"tile": TILE} | parameters
    if kernel == "feed_forward_backward":
        parameters["checkpoint_every"] = CPU_CHECKPOINT_EVERY
    return parameters


def parameters_of(kernel: str, dtype: torch.dtype, neurons: int, batch: int = 1) -> Mapping[str, int]:
    """The launch parameters of a call, tuned or not."""
    rule = heuristic(kernel, dtype, neurons, batch)
    return launch_parameters("cpu", kernel, rule, dtype, torch.device("cpu"), neurons, batch)


def count_threads(most: int | None, work: int) -> int:
    """Threads for so many neuron-steps: ``most``, or as many as PyTorch uses, which is never exceeded."""
    every = torch.get_num_threads()
    return max(1, min(most or every, every, work // MIN_STEPS_PER_THREAD))


def _split_neurons(name: str, dtype: torch.dtype, steps: int, neurons: int) -> tuple[int, list[tuple[int, int]]]:
    """Neurons of a tile, and from which to which neuron every thread goes. No result depends on either."""
    parameters = parameters_of(name, dtype, neurons)
    threads = count_threads(parameters["threads"], steps * neurons)
    share = -(-neurons // (threads * SHARE_OF)) * SHARE_OF
    return parameters["tile"], [(begin, min(begin + share, neurons)) for begin in range(0, neurons, share)]


def _split_rows(rows: int, work: int, most: int | None = None) -> list[tuple[int, int]]:
    """From which to which row each of at most ``most`` threads goes; ``work``: the cost in steps of unconnected neurons."""
    threads = min(rows, count_threads(most, work)) or 1
    return list(itertools.pairwise(rows * thread // threads for thread in range(threads + 1)))


@functools.cache
def _madvise() -> Callable[..., int] | None:
    return ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None


def ask_for_huge_pages(*outputs: Tensor | None) -> None:
    """Advise the operating system to back large outputs, not yet touched, with huge pages. It may decline."""
    advise = _madvise()
    for output in outputs:
        if advise is not None and output is not None and output.nbytes >= HUGE_PAGES_FROM:
            begin, end = (
                address // mmap.PAGESIZE * mmap.PAGESIZE
                for address in (output.data_ptr() + mmap.PAGESIZE - 1, output.data_ptr() + output.nbytes)
            )
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)


def _bytes(x: Tensor) -> Any:
    """The memory from the first to the last element as a flat array of bytes."""
    length = x.numel()
    if length and not x.is_contiguous():
        length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.detach().as_strided((length,), (1,)).view(torch.uint8).numpy()


_NO_BYTES = Strided(_bytes(torch.empty(0)), 0, 0, 0, 0)


def strided_bytes(x: Tensor | None) -> Strided:
    return _NO_BYTES if x is None else Strided(_bytes(x), TYPE_CODES[x.dtype], x.itemsize, *x.stride())


def array_of_rows(x: Tensor) -> Any:
    """All leading axes as one: ``[..., M]`` as an array of rows."""
    return x.detach().contiguous().view(-1, x.shape[-1]).numpy()


@functools.cache
def nothing(axes: int, dtype: torch.dtype) -> Any:
    """An array without elements, for what a kernel is not given."""
    return torch.empty((0,) * axes, dtype=dtype).numpy()


def rows_if_given(x: Tensor | None, dtype: torch.dtype) -> Any:
    return nothing(2, dtype) if x is None else array_of_rows(x)


def constants_arrays(constants: Tensor) -> tuple[Any, Any]:
    """The constants as (shared, None) or (None, per neuron)."""
    table = array_of_rows(constants)
    return (table[:, 0].copy(), None) if constants.shape[1] == 1 else (None, table)


@functools.cache
def bits_of_one(dtype: torch.dtype) -> int:
    """The bits of the number 1 as an integer."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return int(torch.ones((), dtype=dtype).view(integer))


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


def _array_if_given(x: Tensor | None, axes: int, dtype: torch.dtype) -> Any:
    return nothing(axes, dtype) if x is None else _array(x)


def _gradient_by_spikes(spikes: Tensor | None, dtype: torch.dtype) -> Any:
    """That of all steps ``[T, ...]`` as rows; one row where it is the same in all of them, as that of a sum over time is."""
    if spikes is None:
        return nothing(2, dtype)
    return array_of_rows((spikes[:1] if spikes.stride(0) == 0 else spikes).to(dtype).flatten(1))


def holds(fields: int) -> bool | None:
    """How the kernels are told that a state of so many fields has a refractory period: True, or None without one."""
    return True if fields > DIFFERENTIABLE else None


def _forward_arguments(
    x: Tensor, state: Tensor, constants: Tensor, final: Tensor, out: Outputs, every: int, jump_first: bool
) -> tuple[Any, ...]:
    """What the forward kernel takes before the checksum and the tile."""
    ask_for_huge_pages(*out)
    spikes, words, states, checkpoints = out
    return (
        strided_bytes(x),
        array_of_rows(state),
        *constants_arrays(constants),
        array_of_rows(final),
        strided_bytes(spikes),
        bits_of_one(torch.uint8 if spikes is None else spikes.dtype),
        rows_if_given(words, torch.int32),
        rows_if_given(states, state.dtype),
        rows_if_given(checkpoints, state.dtype),
        every,
        jump_first,
        holds(len(state)),
    )


def _split_time(
    name: str, dtype: torch.dtype, constants: tuple[Any, Any], steps: int, neurons: int, call: Call
) -> tuple[int, int]:
    """Into how many chunks of time a run is cut, and for how many threads; see :mod:`.time_chunks`."""
    asked, memory = call.time_chunks, call.memory
    if asked == 1 or (asked is None and not time_chunks.may_pay(steps, neurons)):
        return 1, 1
    threads = count_threads(parameters_of(name, dtype, neurons)["threads"], time_chunks.COST * steps * neurons)
    memory = time_chunks.memory_of(*constants) if memory is None else memory
    return asked or time_chunks.choose_chunks(steps, neurons, memory, threads), threads


def _run_in_chunks(arguments: tuple[Any, ...], x: Tensor, chunks: int, threads: int, sums: Any = None) -> None:
    """A run in chunks of time, and the checksum of its input, if it has one."""
    time_chunks.run_in_chunks(arguments, len(x), chunks, threads)
    if sums is not None:
        checksums.checksum_kernel()(array_of_rows(x).view(np.uint32), sums)


def feed_forward_forward(x: Tensor, state: Tensor, constants: Tensor, final: Tensor, out: Outputs, call: Call) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.feed_forward_forward`."""
    steps, neurons = x.shape
    every = 0 if out.checkpoints is None else call.checkpoint_every
    arguments = _forward_arguments(x, state, constants, final, out, every, call.jump_first)
    name, dtype = "feed_forward_forward", state.dtype
    chunks, threads = _split_time(name, dtype, arguments[2:4], steps, neurons, call)
    if chunks > 1:
        _run_in_chunks(arguments, x, chunks, threads)
        return
    tile, shares = _split_neurons(name, dtype, steps, neurons)
    run(feed_forward.forward_kernel(), *arguments, None, tile, steps, shares=shares)


def lanes(words: int) -> Any:
    """Room for the checksum of rows of so many words of 32 bits, before the first row."""
    return memory_apart((-(-words // checksums.GROUP) * checksums.LANES,), np.uint32)


def row_sums(x: Tensor) -> Any:
    """The checksum of the rows ``x [T, ...]``, of any dtype, on the CPU: many numbers, of which each change changes some."""
    rows = x.new_empty(len(x), x[:1].numel()) if x.numel() == 0 else x.contiguous().view(len(x), -1)
    rows = rows.view(torch.uint8)
    if rows.shape[1] % 4:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))
    sums = lanes(rows.shape[1] // 4)
    checksums.checksum_kernel()(rows.numpy().view(np.uint32), sums)
    return sums


class ForwardStream:
    """The forward of block after block: a thread goes on with its own neurons and waits for no other between two blocks.

    So a core that something else keeps busy for a while, such as packing the block before, delays its neurons alone. Blocks
    of few neurons and many steps are cut into chunks of time, which threads share.

    Args:
        constants: as in ``kernels/feed_forward.py``.
        jump_first: whether the input is added before the decay.
        state: before the first block, ``[F, M]``.
        steps: of a block.
    """

    def __init__(self, constants: Tensor, jump_first: bool, state: Tensor, steps: int) -> None:
        self._constants, self._jump_first, self._state = constants, jump_first, state
        self._tile, self._shares = _split_neurons("feed_forward_forward", state.dtype, steps, state.shape[1])
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="coba_triton") for _ in self._shares]

    def submit(self, x: Tensor, words: Tensor, sums: Any = None) -> tuple[Tensor, list[Future[None]]]:
        """Begin a block ``x [T, M]``, whose spikes go to ``words``; returns the state after it, and when it is there.

        ``sums``: None, or where the checksum of ``x`` goes, see :func:`lanes`.
        """
        before, self._state = self._state, torch.empty_like(self._state)
        out = Outputs(words=words)
        arguments = _forward_arguments(x, before, self._constants, self._state, out, 0, self._jump_first)
        name, call = "feed_forward_forward", Call("cpu")
        chunks, threads = _split_time(name, before.dtype, arguments[2:4], len(x), before.shape[1], call)
        if chunks > 1:
            return self._state, [self._threads[0].submit(_run_in_chunks, arguments, x, chunks, threads, sums)]
        kernel = functools.partial(feed_forward.forward_kernel(), *arguments, sums, self._tile, len(x))
        shares = zip(self._threads, self._shares, strict=True)
        return self._state, [thread.submit(kernel, *share) for thread, share in shares]

    def close(self) -> None:
        """Wait for the blocks that are begun."""
        for thread in self._threads:
            thread.shutdown()


def feed_forward_backward(
    x: Tensor,
    constants: Tensor,
    saved: Saved,
    grads: Incoming,
    grad_x: Tensor,
    grad_state: Tensor,
    sums: Tensor,
    call: Call,
) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.feed_forward_backward`."""
    steps, neurons = x.shape
    ask_for_huge_pages(grad_x)
    table = constants_arrays(constants)
    arguments = (
        strided_bytes(x),
        *table,
        array_of_rows(saved.words),
        array_of_rows(saved.checkpoints),
        strided_bytes(grads.spikes),
        rows_if_given(grads.final, constants.dtype),
        rows_if_given(grads.states, constants.dtype),
        strided_bytes(grad_x),
        array_of_rows(grad_state),
        call.checkpoint_every,
        call.jump_first,
        holds(len(grad_state)),
    )
    by_constants = array_of_rows(sums) if sums.numel() else None
    name, dtype = "feed_forward_backward", constants.dtype
    chunks, threads = _split_time(name, dtype, table, steps, neurons, call)
    if chunks > 1:
        time_chunks.go_back_in_chunks(call.method, arguments, by_constants, steps, chunks, threads)
        return
    tile, shares = _split_neurons(name, dtype, steps, neurons)
    run(feed_forward.backward_kernel(call.method), *arguments, by_constants, tile, steps, shares=shares)


def synapses(rows: Tensor, uses: int) -> recurrent.Synapses:
    """The weights of ``rows [K, N]`` that are not 0, if they are few and serve many steps, else none at all."""
    sample = rows[:: max(1, len(rows) // SAMPLED_SOURCES)]
    if uses < SYNAPSE_USES * len(rows) or int(torch.count_nonzero(sample)) > SYNAPSE_DENSITY * sample.numel():
        rows = rows[:0]
    return recurrent.Synapses(*recurrent.synapses_kernel()(_array(rows), int(SYNAPSE_DENSITY * rows.numel())))


def is_sparse(sources: Tensor) -> bool:
    """Whether so few sources are not 0 that a sum over events costs less than a matrix product."""
    return _count_nonzero(sources) <= EVENT_DENSITY * sources.numel()


def fires_often(spikes: Tensor) -> bool:
    """Whether so many neurons fire that a matrix product a step costs less than sums over events."""
    return _count_nonzero(spikes) > DENSE_RATE * spikes.numel()


def _count_nonzero(x: Tensor) -> int:
    """``torch.count_nonzero``, several times as fast."""
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    if x.dtype not in (torch.float32, torch.float64, torch.uint8) or not x.is_contiguous():
        return int(torch.count_nonzero(x))
    return int(count_kernel()(_array(x.view(-1))))


def unpack(words: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.unpack`."""
    spikes = torch.empty(steps, *words.shape[1:], dtype=torch.uint8)
    unpack_kernel()(_array(words.reshape(len(words), -1)), _array(spikes.view(steps, -1)))
    return spikes.to(dtype)


def project_events(sources: Tensor, weights: Tensor) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.project_events`."""
    drive = weights.new_empty(2, *sources.shape[:-1], weights.shape[1])
    if sources.numel() == 0:
        return drive.zero_()
    values = sources.to(weights.dtype).reshape(-1, weights.shape[0])
    rows = values.shape[0]
    arrays = _array(values), _array(weights), _array(drive.view(2, rows, -1))
    run(recurrent.projection_kernel(), *arrays, shares=_split_rows(rows, drive.numel()))
    return drive


class Drives(NamedTuple):
    """What reaches the neurons in each step of a block: a drive ``[2, t, B, N]``, or the sources whose events it comes from.

    Attributes:
        x: the input's sources ``[t, B, I]``, None if its drive is known.
        input: the input's drive, None if it is to be summed.
        z: the spikes before the first step ``[B, N]``, None if the recurrent drive is known.
        recurrent: the recurrent drive, None if it is to be summed.
    """

    x: Tensor | None = None
    input: Tensor | None = None
    z: Tensor | None = None
    recurrent: Tensor | None = None


def _feeds(net: Network, drives: Drives, steps: int) -> recurrent.Feeds:
    return recurrent.Feeds(
        strided_bytes(None if drives.x is None else drives.x.reshape(steps, -1)),
        _array_if_given(drives.input, 4, net.dtype),
        _array(net.input_rows),
        net.input_synapses,
        _array_if_given(drives.z, 2, net.dtype),
        _array_if_given(drives.recurrent, 4, net.dtype),
        _array(net.recurrent_rows),
        net.recurrent_synapses,
    )


def _block(
    net: Network,
    drives: Drives,
    state: Tensor,
    out: Outputs,
    trajectory: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """Simulate a block, or replay it if there is a trajectory to fill: then its spikes are those in ``out.words``."""
    _, batch, neurons = state.shape
    steps = 1 if drives.x is None else len(drives.x)
    spikes, words, states, _ = out
    replay = trajectory is not None
    cells = batch * neurons
    final = state.clone()
    kept = cells if chosen is None else len(chosen)
    in_place = states is not None and states.is_contiguous()
    trace = state.new_empty(len(state), 0 if states is None or in_place else steps, kept)
    if states is not None and in_place:
        trace = states.view(-1, steps, kept)
    ask_for_huge_pages(spikes, trajectory)
    most = parameters_of(f"recurrent_{'backward' if replay else 'forward'}", state.dtype, neurons, batch)["threads"]
    run(
        recurrent.block_kernel(),
        _feeds(net, drives, steps),
        *constants_arrays(net.constants),
        array_of_rows(final.view(-1, cells)),
        strided_bytes(None if spikes is None else spikes.view(steps, cells)),
        bits_of_one(torch.uint8 if spikes is None else spikes.dtype),
        rows_if_given(None if words is None else words.view(-1, cells), torch.int32),
        replay,
        array_of_rows(trace),
        _array_if_given(chosen, 1, torch.int64),
        _array_if_given(None if trajectory is None else trajectory.view(-1, steps, cells), 3, state.dtype),
        net.jump_first,
        holds(len(state)),
        steps,
        shares=_split_rows(batch, 8 * steps * cells, most),
    )
    if states is not None and not in_place:
        states.copy_(trace.view(states.shape))
    return final


def recurrent_block(
    net: Network,
    x: Tensor,
    drive: Tensor | None,
    z: Tensor,
    state: Tensor,
    out: Outputs,
    sliced: bool | None,
    chosen: Tensor | None = None,
) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_block`."""
    if sliced:
        raise RuntimeError("path 'sliced' is for GPUs with many processors, got backend 'cpu'; pass path='events'")
    return _block(net, Drives(x, drive, z), state, out, chosen=chosen)


def recurrent_step(
    net: Network, drive: Tensor, recurrent_drive: Tensor, state: Tensor, spikes: Tensor, states: Tensor | None
) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_step`."""
    drives = Drives(input=drive[:, None], recurrent=recurrent_drive[:, None])
    return _block(net, drives, state, Outputs(spikes, states=None if states is None else states.unsqueeze(1)))


def recurrent_backward_block(
    net: Network,
    x: Tensor,
    drive: Tensor | None,
    before: Tensor,
    recurrent_drive: Tensor | None,
    state: Tensor,
    words: Tensor,
    sweep: Sweep,
    start: int,
    adjoints: Tensor,
) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_backward_block`.

    Without a gradient by the constants, the trajectory lacks its last two planes.
    """
    steps, batch, neurons = before.shape[0], *state.shape[1:]
    cells, dtype = batch * neurons, state.dtype
    planes = kept_count(len(state)) + (0 if sweep.sums is None else 2)
    ask_for_huge_pages(adjoints)
    drives = Drives(x, drive, before[0].to(net.dtype), recurrent_drive)
    most = parameters_of("recurrent_backward", dtype, neurons, batch)["threads"]
    # A thread with batch rows of its own goes through the block alone. PyTorch's threads share the product of fewer rows.
    alone = net.exchange is None and batch >= count_threads(most, 32 * steps * cells)
    panels = nothing(3, dtype)
    if alone:
        if "panels" not in sweep.scratch:
            sweep.scratch["panels"] = products.panels_of(net.recurrent_weights)
        panels = sweep.scratch["panels"].numpy()
    back = recurrent.Back(
        panels,
        *_incoming(sweep, start, steps),
        array_of_rows(sweep.lam.view(-1, cells)),
        _array(sweep.lam_z.view(cells)),
        _array(adjoints),
    )
    sums = None if sweep.sums is None else _array(sweep.sums)
    spikes = array_of_rows(words.view(-1, cells))
    constants = constants_arrays(net.constants)
    jump_first, held = net.jump_first, holds(len(state))

    def shares(steps: int) -> list[tuple[Any, ...]]:
        rows = _split_rows(batch, 32 * cells * steps, most)
        return [(*some, products.scratch(adjoints.numpy().dtype)) for some in rows]

    if alone:
        run(
            recurrent.backward_kernel(sweep.method),
            _feeds(net, drives, steps),
            *constants,
            array_of_rows(state.clone().view(-1, cells)),
            strided_bytes(None),
            bits_of_one(torch.uint8),
            spikes,
            True,
            nothing(2, dtype),
            nothing(1, torch.int64),
            planes,
            jump_first,
            held,
            steps,
            back,
            sums,
            shares=shares(steps),
        )
        return
    trajectory = state.new_empty(planes, steps, batch, neurons)
    _block(net, drives, state, Outputs(words=words), trajectory)
    kept = _array(trajectory.view(planes, steps, cells))
    for t in reversed(range(steps)):
        kernel = recurrent.sweep_kernel(sweep.method)
        run(kernel, t, t + 1, kept, spikes, *constants, back, sums, jump_first, held, shares=shares(1))
        net.send_back(adjoints[t], sweep)


def _incoming(sweep: Sweep, start: int, steps: int) -> tuple[Any, Any]:
    """The incoming gradients by the spikes of a block, and by the recorded states before each of its steps."""
    dtype, cells = sweep.lam.dtype, sweep.lam_z.numel()
    spikes = None if sweep.spikes is None else sweep.spikes[start : start + steps]
    states = sweep.states
    if states is not None:  # the initial one is not recorded
        earlier = states[:, start - 1 : start] if start else states.new_zeros(len(states), 1, *states.shape[2:])
        states = torch.cat([earlier, states[:, start : start + steps - 1]], 1).view(-1, cells)
    return _gradient_by_spikes(spikes, dtype), _array_if_given(states, 2, dtype)


def add_products(sums: Tensor, sources: Tensor, rows: Tensor, events: bool) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.add_products`."""
    if not events:
        sums.addmm_(sources.t().to(rows.dtype), rows)
        return
    found = list_kernel()(_array(sources.to(rows.dtype)))
    shares = _split_rows(sums.shape[1], len(found[0]) * sums.shape[1] // 3)
    run(recurrent.products_kernel(), _array(sums), _array(rows), *found, shares=shares)


_splits: Kept[Any] = Kept()


def _split_synapses(synapses: Projection, neurons: int, parts: int, share: int) -> Any:
    """Where the synapses of every source onto the neurons of each part begin and end, int64 ``[parts + 1, K]``."""

    def make() -> Any:
        if parts == 1:
            return np.stack([_array(synapses.indptr[:-1]), _array(synapses.indptr[1:])])
        bounds = np.minimum(np.arange(parts + 1) * share, neurons)
        splits = np.empty((parts + 1, len(synapses.indptr) - 1), np.int64)
        sparse.splits_kernel()(_array(synapses.indptr), _array(synapses.targets), bounds, splits)
        return splits

    return _splits.get(synapses.indptr, (synapses.targets,), (parts, share, neurons), make)


def _sharing(numbers: Tensor, synapses: int) -> int:
    """Whether all synapses share a number (0), those of a source do (1), or each has its own (2)."""
    return 1 if numbers.dim() == 2 else 0 if len(numbers) == 1 and synapses != 1 else 2


def _wires(synapses: Projection | None, net: SparseNetwork, parts: int = 1, share: int = 0) -> sparse.Wires:
    if synapses is None:
        empty = nothing(1, net.dtype)
        none = nothing(1, torch.float32)
        return sparse.Wires(nothing(2, torch.int64), nothing(1, torch.int32), empty, 0, none, 0, np.float32(1), empty)
    count, delays = len(synapses.targets), synapses.delays
    return sparse.Wires(
        _split_synapses(synapses, net.neurons, parts, share),
        _array(synapses.targets),
        _array(synapses.weights).reshape(-1),
        _sharing(synapses.weights, count),
        nothing(1, torch.float32) if delays is None else _array(delays).reshape(-1),
        0 if delays is None else _sharing(delays, count),
        np.float32(net.per_ms),
        _array(synapses.grid.scales),
    )


def _rows_of_events(net: SparseNetwork, x: Tensor, drive: Tensor | None) -> Any:
    """The dense weights ``[I, N]`` that the kernels sum up themselves from the events of ``x``; none if there is a drive."""
    if net.input_rows is None or drive is not None or x.shape[-1] == 0:
        return nothing(2, net.dtype)
    return _array(net.input_rows)


def sparse_ring(net: SparseNetwork, history: Tensor) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_ring`."""
    longest, batch, _ = history.shape
    ring = torch.empty(batch, longest, 2, net.neurons, dtype=net.recurrent.grid.sums)
    work = 2 * history.numel()
    wires = _wires(net.recurrent, net)
    # A call of many steps, or a backward, keeps links. For this ring alone they are not worth making.
    links = _linked.find(net.recurrent.weights, _others(net.recurrent), _fits_links(net, 1, net.neurons)) or NO_LINKS
    run(sparse.ring_kernel(), _array(ring), _array(history), wires, links, shares=_split_rows(batch, work))
    return ring


def sparse_send(net: SparseNetwork, ring: Tensor, start: int, events: Tensor) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_send`."""
    synapses = net.recurrent
    fan_out = len(synapses.targets) // max(1, len(synapses.indptr) - 1)
    threads = count_threads(None, 8 * len(events) * fan_out)
    share = -(-net.neurons // (threads * SHARE_OF)) * SHARE_OF
    parts = -(-net.neurons // share)
    wires = _wires(synapses, net, parts, share)
    shares = [(part,) for part in range(parts)]
    run(sparse.send_kernel(), _array(ring), start % net.longest, _array(events), wires, shares=shares)


# While something else keeps the cores, threads that meet are slower by far than one alone: until when none shares a row.
_alone_until = 0.0
ALONE_SECONDS = 1.0
# Long waits of a block before its threads stop to share.
LONG_WAITS = 8


def _sharing_pays() -> bool:
    return time.monotonic() >= _alone_until


def _share_no_more_for_a_while() -> None:
    global _alone_until
    _alone_until = time.monotonic() + ALONE_SECONDS


def sparse_block(
    net: SparseNetwork,
    ring: Tensor,
    start: int,
    x: Tensor,
    drive: Tensor | None,
    state: Tensor,
    out: Outputs,
    chosen: Tensor | None = None,
) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_block`."""
    _, batch, neurons = state.shape
    spikes, words, states, _ = out
    steps, cells = len(x), batch * neurons
    final = state.clone()
    kept = cells if chosen is None else len(chosen)
    in_place = states is not None and states.is_contiguous()
    trace = state.new_empty(len(state), 0 if states is None or in_place else steps, kept)
    if states is not None and in_place:
        trace = states.view(-1, steps, kept)
    ask_for_huge_pages(spikes)
    most = parameters_of("recurrent_forward", state.dtype, neurons, batch)["threads"]
    work = 4 * steps * cells
    together = min(net.shortest, sparse.MOST_TOGETHER)
    sources = strided_bytes(x.reshape(steps, -1))
    after = (
        _array(ring),
        start,
        *constants_arrays(net.constants),
        array_of_rows(final.view(-1, cells)),
        strided_bytes(None if spikes is None else spikes.view(steps, cells)),
        bits_of_one(torch.uint8 if spikes is None else spikes.dtype),
        rows_if_given(None if words is None else words.view(-1, cells), torch.int32),
        array_of_rows(trace),
        _array_if_given(chosen, 1, torch.int64),
        net.jump_first,
        holds(len(state)),
    )

    def steps_of_rows(rows: list[tuple[int, int]], since: int, parts: int, share: int) -> int:
        """The steps that are done, of the rows that some threads have, or of the one that ``parts`` threads share."""
        inputs, wires = _wires(net.inputs, net, parts, share), _wires(net.recurrent, net, parts, share)
        # numbers of their own are worth it to be brought into one form before they are read many times
        prepare = max(wires.weight_of, wires.delay_of) == 2 and len(wires.targets) <= PREPARED_AT_MOST
        prepare &= batch * steps >= MANY_STEPS and _bits_of_place(net) <= PLACE_BITS
        links = _links(net, wires, share) if prepare else NO_LINKS
        lists = sparse.shared_lists(share, parts, together) if parts > 1 else None
        shares = [
            (*some, part, parts, sparse.scratch(inputs, x.shape[-1], final.numpy().dtype, share, parts, together, lists))
            for some in rows
            for part in range(parts)
        ]
        done = np.zeros(1, np.int64)
        middle = inputs, _rows_of_events(net, x, drive), _array_if_given(drive, 4, state.dtype), wires, links
        kernel = sparse.block_kernel()
        run(kernel, sources, *middle, *after, since, steps, together, share, LONG_WAITS, done, shares=shares, meet=parts > 1)
        return int(done[0])

    threads = min(count_threads(most, work), neurons * together // MIN_STEPS_TO_MEETING)
    rows = _split_rows(batch, work, most)
    if len(rows) < threads and batch < torch.get_num_threads() and _sharing_pays():
        share = -(-neurons // (threads * SHARE_OF)) * SHARE_OF
        for row in range(batch):
            done = steps_of_rows([(row, row + 1)], 0, -(-neurons // share), share) if _sharing_pays() else 0
            if done < steps:
                steps_of_rows([(row, row + 1)], done, 1, neurons)
            if 0 < done < steps:
                _share_no_more_for_a_while()
    else:
        steps_of_rows(rows, 0, 1, neurons)
    if states is not None and not in_place:
        states.copy_(trace.view(states.shape))
    return final


# Synapses that are prepared to be gone over many times, and kept until their weights change: 8 to 28 bytes each.
PREPARED_AT_MOST = 2**22
# A place has so many bits at the most, half of a link's 64: then the lowest part of a weight's units fits beside it.
PLACE_BITS = 32
# A call with at least so many steps, those of all batch rows added up, prepares the synapses.
MANY_STEPS = 256
_prepared: Kept[tuple[Any, Any]] = Kept()
_linked: Kept[sparse.Links] = Kept()
NO_LINKS = sparse.Links(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64), 0, True)


def _prepare(made: Kept[T], synapses: Projection, fits: tuple[Any, ...], make: Callable[[], T]) -> T:
    """Find what was ``made`` of synapses for the use that ``fits`` names, or make it now.

    It is kept for the next time, unless there are too many synapses.
    """
    if len(synapses.targets) > PREPARED_AT_MOST:
        return make()
    return made.get(synapses.weights, _others(synapses), fits, make)


def _others(synapses: Projection) -> tuple[Tensor | None, ...]:
    """What synapses are prepared from, beside their weights. While these are the same, their grid is, and no other one."""
    return synapses.indptr, synapses.targets, synapses.delays, synapses.grid.scales


def _paths(synapses: Projection | None, net: SparseNetwork) -> sparse.Paths:
    """Synapses prepared for the backward."""
    if synapses is None:
        return sparse.Paths(np.zeros(1, np.int64), np.empty(0, np.uint32), nothing(1, net.dtype))
    count = len(synapses.targets)
    own = _sharing(synapses.weights, count) == 2  # numbers of their own are read where they are

    def make() -> tuple[Any, Any]:
        places, copies = np.empty(count, np.uint32), torch.empty(0 if own else count, dtype=net.dtype).numpy()
        sparse.paths_kernel()(_wires(synapses, net), net.neurons, places, copies)
        return places, copies

    places, copies = _prepare(_prepared, synapses, (net.neurons, net.per_ms), make)
    return sparse.Paths(_array(synapses.indptr), places, _array(synapses.weights).reshape(-1) if own else copies)


def _bits_of_place(net: SparseNetwork) -> int:
    """How many bits the largest place of a synapse between neurons needs; see :class:`.sparse.Links`."""
    return (2 * (net.longest + 1) * net.neurons - 1).bit_length()


def _links(net: SparseNetwork, wires: sparse.Wires, share: int) -> sparse.Links:
    """The synapses between neurons prepared for many steps, onto each ``share`` of the neurons."""
    parts, sources, bits = len(wires.splits) - 1, wires.splits.shape[1], _bits_of_place(net)

    def make() -> sparse.Links:
        most = 2 * len(wires.targets) + 2 * (sparse.ABREAST - 1) * parts * sources + 1
        shapes = ((parts * sources + 1, np.int64), (parts * sources, np.int64), (most, np.uint64))
        starts, middles, numbers = (np.empty(length, kind) for length, kind in shapes)
        moved = net.recurrent.grid.sums == torch.int32  # their units have few bits
        count, alike = sparse.links_kernel()(wires, net.neurons, bits, moved, starts, middles, numbers)
        return sparse.Links(starts, middles, numbers[:count], bits, alike)

    return _prepare(_linked, net.recurrent, _fits_links(net, parts, share), make)


def _fits_links(net: SparseNetwork, parts: int, share: int) -> tuple[Any, ...]:
    return net.neurons, net.per_ms, _bits_of_place(net), parts, share


def _add_groups(kernel: Callable[..., None], args: tuple[Any, ...], batch: int, sweep: SparseSweep, threads: int) -> None:
    """Run a kernel for every group of batch rows, and add its sums to the gradients by magnitudes, group after group.

    The kernel takes scratch for the sums of each group that runs at the same time, then what group it has.
    """
    lanes, every = sparse_backward.groups(batch, sweep.samples, threads)
    together = max(1, min(threads, len(every)))
    vectors = sparse_backward.vectors_of(lanes)
    parts = [
        None if sums is None else _scratch(sweep, name, together * vectors, sums.shape[1])
        for name, sums in (("recurrent", sweep.recurrent), ("inputs", sweep.inputs))
    ]
    scratch = [nothing(2, sweep.lam.dtype) if part is None else part.numpy() for part in parts]
    for begin in range(0, len(every), together):
        now = every[begin : begin + together]
        shares = [(lanes, rows, first, number) for number, (first, rows, _) in enumerate(now)]
        run(kernel, *args, *scratch, shares=shares)
        for number, (_, rows, sample) in enumerate(now):
            for sums, part in zip((sweep.recurrent, sweep.inputs), parts, strict=True):
                if sums is not None and part is not None:
                    for own in range(number * vectors, number * vectors + -(-rows // LANES)):
                        sums[sample] += part[own]


def _scratch(sweep: SparseSweep, name: str, groups: int, numbers: int) -> Tensor:
    """So many numbers for each group, each beginning on a line of memory if they fill whole lines.

    All blocks of a sweep have the same memory: new pages would cost more than its use.
    """
    memory = sweep.scratch.get(name)
    if memory is None or memory.numel() < groups * numbers:
        memory = sweep.scratch[name] = kept_memory.empty((groups * numbers,), sweep.lam.dtype)
        ask_for_huge_pages(memory)
    return memory[: groups * numbers].view(groups, numbers)


def sparse_backward_block(
    net: SparseNetwork,
    ring: Tensor,
    x: Tensor,
    drive: Tensor | None,
    state: Tensor,
    words: Tensor,
    grad_spikes: Tensor | None,
    grad_states: Tensor | None,
    sweep: SparseSweep,
    adjoints: Tensor,
    grad_x: Tensor | None,
) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_backward_block`."""
    _, batch, neurons = state.shape
    steps, cells, dtype = len(x), batch * neurons, state.dtype
    if _bits_of_place(net) > PLACE_BITS:
        raise ValueError(
            f"gradients through sparse synapses need 2 (D + 1) N <= 2**{PLACE_BITS} sums a batch row, got D={net.longest} "
            f"steps, the longest delay, and N={neurons} neurons; use shorter delays or backend 'reference'"
        )
    most = parameters_of("recurrent_backward", dtype, neurons, batch)["threads"]
    threads = count_threads(most, 32 * steps * cells)
    planes = kept_count(len(state)) - 1 + (0 if sweep.sums is None else 2)
    lanes, every = sparse_backward.groups(batch, sweep.samples, threads)
    ask_for_huge_pages(adjoints)
    together = min(threads, len(every))
    ahead = sparse_backward.steps_ahead(steps, net.longest)
    flow = -(-(ahead + net.longest) * 2 * neurons * lanes // LANES) * LANES
    args = (
        strided_bytes(x.reshape(steps, -1)),
        _paths(net.inputs, net),
        _rows_of_events(net, x, drive),
        _array_if_given(drive, 4, dtype),
        _paths(net.recurrent, net),
        _links(net, _wires(net.recurrent, net), neurons),
        np.concatenate([_array(p.grid.scales) for p in (net.recurrent, net.inputs or net.recurrent)]),
        _array(ring),
        *constants_arrays(net.constants),
        array_of_rows(state.view(-1, cells)),
        _array(words.view(-1, cells)),
        _gradient_by_spikes(grad_spikes, dtype),
        nothing(2, dtype) if grad_states is None else array_of_rows(grad_states.reshape(-1, cells)),
        array_of_rows(sweep.lam.view(-1, cells)),
        None if sweep.sums is None else _array(sweep.sums),
        _array(adjoints),
        _array_if_given(grad_x, 3, dtype),
        net.jump_first,
        holds(len(state)),
        steps,
        ahead,
        _scratch(sweep, "trajectories", together, planes * steps * lanes * neurons).numpy(),
        _scratch(sweep, "flows", together, flow).numpy(),
    )
    _add_groups(sparse_backward.backward_block_kernel(sweep.method), args, batch, sweep, threads)


def sparse_history_gradient(
    net: SparseNetwork, history: Tensor, adjoints: Tensor, grad_history: Tensor, sweep: SparseSweep
) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_history_gradient`."""
    args = (_paths(net.recurrent, net), _array(history), _array(adjoints), _array(grad_history))
    threads = count_threads(None, 32 * history.numel())
    _add_groups(sparse_backward.history_kernel(), args, history.shape[1], sweep._replace(inputs=None), threads)
