"""What a backend must offer, with Triton: allocates what the kernels write, and chooses how they are launched."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, overload

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from ..kernels import feed_forward, recurrent, sparse, time_chunks
from ..ops.call import (
    DIFFERENTIABLE,
    Block,
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
from ..ops.spikes import unpack_spikes
from ..tuning.tables import Parameters, launch_parameters

# Steps of float32 whose inputs are on their way while as many are computed; half as many of float64, and in chunks of time.
PREFETCH_STEPS = 16


def replay_steps(dtype: torch.dtype) -> int:
    """Steps that the backward holds in registers: as many as fit without a spill."""
    return 4 if dtype == torch.float64 else 8


def warps_per_program(neurons: int) -> int:
    """One warp a program while there are too few neurons to fill a GPU, else four; a thread has one neuron."""
    return 1 if neurons <= 32768 else 4


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The least one that is not less than ``n``, which is positive."""
    return 1 << (n - 1).bit_length()


@functools.cache
def threads_per_warp() -> int:
    """32 on NVIDIA and in the interpreter, 64 on AMD's data-centre GPUs."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


# By all that Triton compiles for: what a kernel was compiled to, the names of its last arguments, and the driver.
_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, list[str], Any]] = {}


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, num_warps: int, *args: Any, **meta: Any
) -> Callable[..., Any]:
    """Every launch of the package: on the tensors' device, without fusing multiplications into additions.

    Triton takes about 10 us to find what a call was compiled to; here it takes 3. This is right for kernels that are not
    specialized for the values of their numbers, as a test makes sure of.

    Returns:
        What launches again, with other numbers among ``args`` and the same tensors: it has nothing to find.
    """
    try:
        return _launch_on(kernel, grid, device, num_warps, *args, **meta)
    except RuntimeError as error:
        if not meta.get("launch_cooperative_grid") or "cooperative" not in str(error):
            raise
        raise RuntimeError(
            f"{kernel.__name__} needs its {math.prod(grid)} programs to run at once, and {device} does not hold them "
            f"({error}); is a part of it reserved? Pass path='events' for dense weights, else backend='reference'"
        ) from error


def _launch_on(
    kernel: Any, grid: tuple[int, ...], device: torch.device, num_warps: int, *args: Any, **meta: Any
) -> Callable[..., Any]:
    again = functools.partial(_launch_on, kernel, grid, device, num_warps, **meta)
    if device.type != "cpu" and (on := torch.get_device_module(device)).current_device() != device.index:
        with on.device(device):
            _launch_on(kernel, grid, device, num_warps, *args, **meta)
        return again
    if not isinstance(kernel, triton.JITFunction):  # Triton's interpreter
        kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **meta)
        return again
    driver = triton.runtime.driver.active
    compiled_for = [
        (arg.dtype, arg.data_ptr() & 15) if isinstance(arg, Tensor) else arg if arg is None else -(2**31) <= arg < 2**31
        for arg in args
    ]
    key = id(kernel), id(driver), device, num_warps, *meta.values(), *compiled_for
    if (found := _compiled.get(key)) is not None:
        compiled, last, _ = found
        launch, constants = compiled[(*grid, 1, 1)[:3]], [meta[name] for name in last]
        launch(*args, *constants)
        return lambda *args: launch(*args, *constants)
    compiled = kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **meta)
    if isinstance(compiled, CompiledKernel):  # not what stands for one
        _compiled[key] = compiled, kernel.arg_names[len(args) :], driver
    return again


def heuristic(kernel: str, dtype: torch.dtype, neurons: int, batch: int) -> Parameters:
    """The launch parameters where no tuning table has any; see :data:`coba_triton.tuning.SPACE`."""
    if kernel == "feed_forward_forward":
        return {"num_warps": warps_per_program(neurons), "steps": PREFETCH_STEPS // (dtype.itemsize // 4)}
    if kernel == "feed_forward_backward":
        return {"num_warps": warps_per_program(neurons), "steps": replay_steps(dtype)}
    if kernel == "recurrent_forward":
        tile = TILE // (dtype.itemsize // 4)
        block = _power_of_2(neurons) if neurons <= row_in_registers(dtype) else tile
        ahead = min(STEP_EVENTS_AHEAD, events_ahead(dtype))
        # up to 512 neurons, a thread has one of them
        return {"num_warps": max(1, min(16, block // 32)), "events_ahead": ahead, "tile": tile}
    return {"num_warps": 4, "replay_warps": warps_per_program(neurons * batch)}


def parameters_of(kernel: str, state: Tensor, neurons: int, batch: int = 1) -> Mapping[str, int]:
    """The launch parameters of a call, tuned or not; ``state`` has the compute dtype and the device."""
    rule = heuristic(kernel, state.dtype, neurons, batch)
    return launch_parameters("triton", kernel, rule, state.dtype, state.device, neurons, batch)


def _launch_feed_forward(
    kernel: Any, num_warps: int, x: Tensor, constants: Tensor, jump_first: bool, *args: Any, **meta: Any
) -> None:
    neurons = x.shape[1]
    block = threads_per_warp() * num_warps
    _launch(
        kernel,
        (_cdiv(neurons, block),),
        x.device,
        num_warps,
        *args,
        BLOCK=block,
        EVEN=neurons % block == 0,
        PER_NEURON=constants.shape[1] > 1,
        JUMP_FIRST=jump_first,
        **meta,
    )


@overload
def _kernel_view(x: Tensor) -> Tensor: ...
@overload
def _kernel_view(x: Tensor | None) -> Tensor | None: ...
def _kernel_view(x: Tensor | None) -> Tensor | None:
    """Bool is read and written as uint8: Triton's own 1-bit pointers are no array of bytes."""
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x


def _none_if_empty(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


# A state of a chunk of time is compared every so many steps, a multiple of a word's and of those between two checkpoints.
CHECK_STEPS = 64
# Neurons times chunks with which an H100 is full, as measured: more chunks of 512 or 4096 neurons save nothing.
NEURONS_OF_DEVICE = 65_000
# From so many neurons on, its memory is nearly full in any order.
MANY_NEURONS = 7000
# After so many of the largest time constants, nearly all neurons that spike irregularly have forgotten where they started.
MEMORIES = 25
# Shorter chunks, or fewer, are not worth four launches.
LEAST_CHUNK_STEPS = 512
LEAST_CHUNKS = 4


def choose_time_chunks(steps: int, neurons: int, memory: float | None) -> int:
    """Into how many chunks of time a run is cut, 1 where that does not pay; ``memory``: see :class:`Call`."""
    if memory is None or neurons >= MANY_NEURONS or steps < LEAST_CHUNKS * LEAST_CHUNK_STEPS:
        return 1
    chunks = min(int(steps / max(MEMORIES * memory, LEAST_CHUNK_STEPS)), NEURONS_OF_DEVICE // neurons)
    return chunks if chunks >= LEAST_CHUNKS else 1


def _forward_in_chunks(
    x: Tensor, state: Tensor, constants: Tensor, final: Tensor, out: Outputs, jump_first: bool, chunks: int, steps: int
) -> None:
    """:func:`feed_forward_forward` in at most so many chunks of time; ``steps`` are computed while others are loaded."""
    length, neurons = x.shape
    device, fields, block = x.device, len(state), threads_per_warp()
    chunk_steps = _cdiv(length, chunks * CHECK_STEPS) * CHECK_STEPS
    tiles, chunks = _cdiv(neurons, block), _cdiv(length, chunk_steps)
    mark = CHECK_STEPS if out.checkpoints is None else steps
    notes = state.new_empty(_cdiv(length, mark), fields, neurons) if out.checkpoints is None else out.checkpoints
    before, after = (state.new_empty(chunks, fields, neurons) for _ in range(2))
    changed, late = (state.new_empty(tiles, chunks, dtype=torch.uint8) for _ in range(2))
    given, outputs = _kernel_view(x), (notes, _kernel_view(out.spikes), out.words, out.states)
    sizes = length, neurons, chunk_steps, chunks, *x.stride(), constants.stride(0)
    meta = {"BLOCK": block, "FIELDS": fields, "STEPS": steps, "MARK": mark, "EVEN": neurons % block == 0}
    meta |= {"PER_NEURON": constants.shape[1] > 1, "JUMP_FIRST": jump_first}
    _launch(
        time_chunks.speculate_kernel, (tiles, chunks), device, 1,
        given, state, constants, before, changed, *outputs, *sizes, **meta,
    )  # fmt: skip
    meta["CHECK"] = CHECK_STEPS
    for _ in range(2):
        _launch(
            time_chunks.repair_kernel, (tiles, chunks), device, 1,
            given, constants, before, after, changed, late, *outputs, *sizes, **meta,
        )  # fmt: skip
        before, after, changed, late = after, before, late, changed
    _launch(
        time_chunks.settle_kernel, (tiles,), device, 1,
        given, constants, final, after, before, changed, *outputs, *sizes, **meta,
    )  # fmt: skip


def _backward_in_chunks(
    x: Tensor,
    constants: Tensor,
    saved: Saved,
    grads: Incoming,
    grad_x: Tensor,
    grad_state: Tensor,
    call: Call,
    chunks: int,
    steps: int,
) -> None:
    """:func:`feed_forward_backward` in at most so many chunks of time, without the sums over time."""
    length, neurons = x.shape
    device, block = x.device, threads_per_warp()
    chunk_steps = _cdiv(length, chunks * CHECK_STEPS) * CHECK_STEPS
    tiles, chunks = _cdiv(neurons, block), _cdiv(length, chunk_steps)
    notes = constants.new_empty(length // CHECK_STEPS + 1, DIFFERENTIABLE, neurons)
    before, after = (constants.new_empty(chunks, DIFFERENTIABLE, neurons) for _ in range(2))
    changed, late = (constants.new_empty(tiles, chunks, dtype=torch.uint8) for _ in range(2))
    given = _kernel_view(x), saved.words, saved.checkpoints, constants, grads.spikes, grads.states, _none_if_empty(grad_x)
    strides = grads.spikes.stride() if grads.spikes is not None else (0, 0)
    sizes = length, neurons, chunk_steps, chunks, *x.stride(), *strides, constants.stride(0)
    meta = {"BLOCK": block, "FIELDS": len(grad_state), "EVERY": call.checkpoint_every}
    meta |= {"STEPS": steps, "CHECK": CHECK_STEPS, "EVEN": neurons % block == 0}
    how = {"PER_NEURON": constants.shape[1] > 1, "JUMP_FIRST": call.jump_first, "METHOD": call.method}
    grid = tiles, chunks
    _launch(
        time_chunks.speculate_back_kernel, grid, device, 1,
        grads.final, before, changed, notes, *given, *sizes, **meta, **how,
    )  # fmt: skip
    for _ in range(2):
        _launch(
            time_chunks.repair_back_kernel, grid, device, 1,
            before, after, changed, late, notes, *given, *sizes, **meta, **how,
        )  # fmt: skip
        before, after, changed, late = after, before, late, changed
    _launch(
        time_chunks.settle_back_kernel, (tiles,), device, 1,
        grad_state, after, before, changed, notes, *given, *sizes, **meta, **how,
    )  # fmt: skip


def feed_forward_forward(x: Tensor, state: Tensor, constants: Tensor, final: Tensor, out: Outputs, call: Call) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.feed_forward_forward`."""
    parameters = parameters_of("feed_forward_forward", state, x.shape[1])
    length, neurons = x.shape
    chunks = call.time_chunks or choose_time_chunks(length, neurons, call.memory)
    if out.checkpoints is not None:
        steps = call.checkpoint_every
    else:
        steps = parameters["steps"] if chunks == 1 else min(parameters["steps"], PREFETCH_STEPS // 2)
    if chunks > 1:
        _forward_in_chunks(x, state, constants, final, out, call.jump_first, chunks, steps)
        return
    _launch_feed_forward(
        feed_forward.forward_kernel,
        parameters["num_warps"],
        x,
        constants,
        call.jump_first,
        _kernel_view(x),
        state,
        constants,
        final,
        _kernel_view(out.spikes),
        out.words,
        out.states,
        out.checkpoints,
        *x.shape,
        *x.stride(),
        constants.stride(0),
        FIELDS=len(state),
        STEPS=steps,
    )


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
    parameters = parameters_of("feed_forward_backward", constants, x.shape[1])
    length, neurons = x.shape
    steps = min(parameters["steps"], call.checkpoint_every)
    chunks = call.time_chunks or choose_time_chunks(length, neurons, call.memory)
    if chunks > 1 and not sums.numel():  # a sum over time has one order
        _backward_in_chunks(x, constants, saved, grads, grad_x, grad_state, call, chunks, steps)
        return
    _launch_feed_forward(
        feed_forward.backward_kernel,
        parameters["num_warps"],
        x,
        constants,
        call.jump_first,
        _kernel_view(x),
        saved.words,
        saved.checkpoints,
        constants,
        grads.spikes,
        grads.final,
        grads.states,
        _none_if_empty(grad_x),
        grad_state,
        _none_if_empty(sums),
        *x.shape,
        *x.stride(),
        *(grads.spikes.stride() if grads.spikes is not None else (0, 0)),
        constants.stride(0),
        FIELDS=len(grad_state),
        EVERY=call.checkpoint_every,
        STEPS=steps,
        METHOD=call.method,
    )


# Weights of float32 on their way while others are added; the order of the sum does not depend on it. Fewer where a program
# goes through one step after the other: only a few neurons spike in a step, and what is not needed is asked for in vain.
EVENTS_AHEAD = 16
STEP_EVENTS_AHEAD = 8
# Rows of sources that a program projects, if there are enough of them to fill a GPU, else one.
ROWS_TOGETHER = 4
MANY_ROWS = 2048
# A program of the event-driven kernel keeps so many neurons of float32 in registers; a larger row is swept tile by tile.
ROW_IN_REGISTERS = 2048
TILE = 2048
# Neurons of a program that shares its row, at least, and programs that share a row unasked, at least.
SLICE = 128
ROWS_SHARED_BY = 4
# Neurons whose spikes such a program lists together, at most; a thread has at most 8 of them.
READ_TOGETHER = 4096
# Looks at the arrival counter before a program of a shared row gives up: seconds on a GPU.
SPIN_LIMIT = 10_000_000
# Up to so many neurons a program forms the sweep's product itself, one launch a block; above, one product a step.
SWEEP_IN_ONE_LAUNCH = 256
# Above the first number of neurons of float32, up to the second, programs share rows and hold their weights in registers.
# Else they read them in every step, which pays for up to so many rows.
SWEEP_HELD_FROM = 128
SWEEP_HELD = 512
SWEEP_STREAMED_ROWS = 4
# Of such a program: rows, at most; neurons, half as many where registers are scarce; warps; weights that it reads together,
# for each neuron.
SWEEP_HELD_ROWS = 8
SWEEP_COLUMNS = 32
SWEEP_WARPS = 8
SWEEP_CHUNK = 32


def _warps_for(block: int) -> int:
    """Warps for a program with ``block`` neurons, of which a thread has 2, or 4 where there are more than 1024."""
    return max(1, min(16, block // 64))


def _is_wide(block: int) -> bool:
    """Whether a thread of a program with ``block`` neurons has 4 of them."""
    return block > 1024


def events_ahead(dtype: torch.dtype) -> int:
    """Weights on their way: in float64 everything takes two registers, and as many weights as in float32 would spill."""
    return EVENTS_AHEAD if dtype.itemsize == 4 else max(1, EVENTS_AHEAD // 4)


def row_in_registers(dtype: torch.dtype) -> int:
    """Neurons of a row that one program of the event-driven kernel keeps in registers, at most."""
    return ROW_IN_REGISTERS // (dtype.itemsize // 4)


def synapses(rows: Tensor, uses: int) -> None:
    """Nothing is prepared: the kernels read the rows of the matrix itself."""


def is_sparse(sources: Tensor) -> bool:
    """Always: the kernels sum over the events of any sources, so that the host does not wait for a count of them."""
    return True


def unpack(words: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.unpack`."""
    return unpack_spikes(words, steps, dtype)


def fires_often(spikes: Tensor) -> bool:
    """Never: the host does not wait for a count. Where neurons fire often, the caller can choose ``path="dense"``."""
    return False


def project_events(sources: Tensor, weights: Tensor) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.project_events`."""
    inputs, neurons = weights.shape
    drive = weights.new_empty(2, *sources.shape[:-1], neurons)
    if sources.numel() == 0 or neurons == 0:
        return drive.zero_()
    sources = sources.reshape(-1, inputs)
    rows = sources.shape[0]
    values = _kernel_view(sources)
    lists = torch.empty(rows, max(1, inputs), dtype=torch.int32, device=weights.device)
    counts = torch.empty(rows, dtype=torch.int32, device=weights.device)
    block = min(1024, _power_of_2(max(1, inputs)))
    _launch(
        recurrent.compact_kernel, (rows,), weights.device, _warps_for(block),
        values, lists, counts, inputs, *values.stride(), BLOCK=block,
    )  # fmt: skip
    block = min(1024, _power_of_2(neurons))
    together = ROWS_TOGETHER if rows >= MANY_ROWS else 1
    _launch(
        recurrent.projection_kernel, (_cdiv(rows, together), _cdiv(neurons, block)), weights.device,
        _warps_for(block), values, lists, counts, weights, drive, inputs, neurons, rows, *values.stride(),
        BLOCK=block, UNROLL=events_ahead(weights.dtype), ROWS=together,
    )  # fmt: skip
    return drive


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
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_block`. One event-driven launch."""
    spikes, words, states, _ = out
    if states is not None and chosen is not None:
        every = state.new_empty(len(state), *x.shape[:2], state.shape[2])
        final = recurrent_block(net, x, drive, z, state, Outputs(spikes, words, every), sliced)
        states.copy_(every.flatten(2)[..., chosen])
        return final
    drive = project_events(x, net.input_rows) if drive is None else drive
    first = project_events(z, net.recurrent_rows)
    _, steps, batch, neurons = drive.shape
    if _shares_rows(neurons, batch, state.device) if sliced is None else sliced:
        block = _slice_of(neurons, batch, state.dtype, state.device)
        if block < neurons:
            return _sliced_block(net, drive, first, state, out, block)
    final = torch.empty_like(state)
    parameters = parameters_of("recurrent_forward", state, neurons, batch)
    one_tile = neurons <= row_in_registers(state.dtype)
    block = _power_of_2(neurons) if one_tile else parameters["tile"]
    ahead = parameters["events_ahead"]
    per_neuron = net.constants.shape[1] > 1
    if per_neuron and not one_tile:  # the constants of half of the neurons take the registers of the others
        block //= 2
    elif per_neuron and _is_wide(block):
        ahead = max(1, ahead // 2)
    if not one_tile:  # two threads with one neuron would race for its state
        block = max(block, parameters["num_warps"] * threads_per_warp())
    scratch = torch.empty(3, batch, neurons, dtype=torch.int32, device=state.device)
    _launch(
        recurrent.forward_kernel, (batch,), state.device, parameters["num_warps"],
        drive, first, net.recurrent_rows, state, net.constants, final, scratch[:2], scratch[2],
        _kernel_view(spikes), words, states,
        steps, batch, neurons, net.constants.stride(0), 0 if states is None else states.stride(0),
        BLOCK=block, FIELDS=len(state), ONE_TILE=one_tile, EVEN=block == neurons, UNROLL=ahead, PER_NEURON=per_neuron,
        JUMP_FIRST=net.jump_first,
    )  # fmt: skip
    return final


def meets_unasked() -> bool:
    """Whether programs of dense networks meet after every step where nobody asked for it.

    Not in the interpreter, which runs one program at a time, nor on AMD's GPUs: there a meeting of all programs is said to
    take longer than what it saves.
    """
    return not triton.knobs.runtime.interpret and triton.runtime.driver.active.get_current_target().backend == "cuda"


def resident_programs(device: torch.device) -> int:
    """Programs that surely run at the same time: one for each of the device's multiprocessors."""
    if triton.knobs.runtime.interpret:
        return 8
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["multiprocessor_count"])


def _slice_of(neurons: int, batch: int, dtype: torch.dtype, device: torch.device) -> int:
    """Neurons of each of the programs that share a batch row; all of them where one program has the row to itself.

    A thread has at most two neurons, one in float64: more would spill.
    """
    programs = max(1, min(_cdiv(neurons, SLICE), resident_programs(device) // max(1, batch)))
    block = _power_of_2(_cdiv(neurons, programs))
    return block if block < neurons and block <= row_in_registers(dtype) // 2 else neurons


def _shares_rows(neurons: int, batch: int, device: torch.device) -> bool:
    """Whether programs share rows unasked: those that no program keeps in registers, if at least four can share each."""
    return neurons > ROW_IN_REGISTERS and meets_unasked() and resident_programs(device) >= ROWS_SHARED_BY * batch


def _sliced_block(net: Network, drive: Tensor, first: Tensor, state: Tensor, out: Outputs, block: int) -> Tensor:
    """:func:`recurrent_block` by programs of ``block`` neurons, which wait for those of their row after every step.

    ``first``: the recurrent drive of the first step, ``[2, B, N]``.
    """
    _, steps, batch, neurons = drive.shape
    spikes, words, states, _ = out
    final = torch.empty_like(state)
    device, programs = state.device, _cdiv(neurons, block)
    num_warps = max(4, min(16, block // threads_per_warp()))
    arrived, failed = (torch.zeros(size, dtype=torch.int32, device=device) for size in (batch, 1))
    _launch(
        recurrent.sliced_forward_kernel, (programs, batch), device, num_warps,
        drive, first, net.recurrent_rows, state, net.constants, final,
        torch.empty(2, batch, neurons, dtype=torch.uint8, device=device),
        torch.empty(batch, programs, neurons, dtype=torch.int32, device=device), arrived, failed,
        _kernel_view(spikes), words, states,
        steps, batch, neurons, net.constants.stride(0), 0 if states is None else states.stride(0), SPIN_LIMIT,
        BLOCK=block, FIELDS=len(state), TILE=min(READ_TOGETHER, 8 * num_warps * threads_per_warp()),
        UNROLL=events_ahead(state.dtype), PER_NEURON=net.constants.shape[1] > 1, JUMP_FIRST=net.jump_first,
        launch_cooperative_grid=True,
    )  # fmt: skip
    torch._assert_async(  # on the device: the host does not wait for it
        failed == 0,
        f"path 'sliced': a program waited for another of its batch row for more than {SPIN_LIMIT} looks and gave "
        f"up; expected all {programs * batch} programs to run at once; pass path='events'",
    )
    return final


def _launch_driven(
    net: Network | SparseNetwork,
    drive: Tensor,
    recurrent_drive: Tensor,
    state: Tensor,
    words: Tensor | None = None,
    spikes: Tensor | None = None,
    states: Tensor | None = None,
    trajectory: Tensor | None = None,
) -> Tensor:
    """Steps whose two drives ``[2, ..., B, N]`` are known; returns the state after them.

    With ``words`` their spikes are known as well; ``spikes``, ``states`` and ``trajectory`` are filled if they are there.
    """
    final = torch.empty_like(state)
    cells = state[0].numel()
    steps = drive[0].numel() // cells
    num_warps = parameters_of("recurrent_backward", state, state.shape[2], state.shape[1])["replay_warps"]
    block = threads_per_warp() * num_warps
    _launch(
        recurrent.driven_kernel, (_cdiv(cells, block),), state.device, num_warps,
        drive, recurrent_drive, state, net.constants, words, final, spikes, states, trajectory,
        steps, cells, net.constants.stride(0), 0 if states is None else states.stride(0),
        BLOCK=block, FIELDS=len(state), KEPT=kept_count(len(state)), PER_NEURON=net.constants.shape[1] > 1,
        JUMP_FIRST=net.jump_first,
    )  # fmt: skip
    return final


def recurrent_step(
    net: Network, drive: Tensor, recurrent_drive: Tensor, state: Tensor, spikes: Tensor, states: Tensor | None
) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_step`."""
    return _launch_driven(net, drive, recurrent_drive, state, spikes=spikes, states=states)


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
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_backward_block`."""
    drive = project_events(x, net.input_rows) if drive is None else drive
    if recurrent_drive is None:
        recurrent_drive = project_events(before, net.recurrent_rows)
    trajectory = state.new_empty(kept_count(len(state)) + 2, len(before), *state.shape[1:])
    _launch_driven(net, drive, recurrent_drive, state, words, trajectory=trajectory)
    sweep_back(net, sweep, Block(start, words, trajectory), adjoints)


def sweep_back(net: Network, sweep: Sweep, block: Block, adjoints: Tensor) -> None:
    """Go back through the trajectory of a block.

    One launch where a program can own whole rows, or where all programs that share the rows run at once; else a launch
    and a matrix product a step.
    """
    planes, steps, batch, neurons = block.trajectory.shape
    tile = None if net.exchange is not None else _shared_sweep(neurons, batch, block.trajectory.dtype, sweep.lam.device)
    if tile is not None:
        return _sweep_together(net, sweep, block, adjoints, *tile)
    _, _, grad_spikes, grad_states, lam, lam_z, sums, _ = sweep
    in_one_launch = neurons <= SWEEP_IN_ONE_LAUNCH and net.exchange is None
    # one neuron a thread: no layout conversions between the loads
    if in_one_launch:
        num_warps = max(1, _power_of_2(neurons) // threads_per_warp())
    else:
        num_warps = parameters_of("recurrent_backward", lam, neurons, batch)["num_warps"]
    threads = num_warps * threads_per_warp()
    grad_strides = (0, 0) if grad_spikes is None else grad_spikes.stride()
    weights = net.recurrent_weights.contiguous() if in_one_launch else None

    first = 0 if in_one_launch else steps - 1
    args = (
        block.trajectory, block.words, net.constants, grad_spikes, grad_states, weights, lam, lam_z, adjoints, sums,
    )  # fmt: skip
    sizes = (
        block.start, 0 if grad_states is None else grad_states.shape[1], steps, batch, neurons,
        net.constants.stride(0), *grad_strides,
    )  # fmt: skip
    again = _launch(
        recurrent.backward_kernel, (batch, _cdiv(neurons, threads)), lam.device, num_warps, *args, first, steps, *sizes,
        BLOCK=threads, KEPT=planes - 2, UNROLL=events_ahead(lam.dtype),
        PER_NEURON=net.constants.shape[1] > 1, JUMP_FIRST=net.jump_first, METHOD=sweep.method,
    )  # fmt: skip
    if in_one_launch:
        return
    net.send_back(adjoints[first], sweep.split_weights, lam_z)
    for t in reversed(range(first)):
        again(*args, t, t + 1, *sizes)
        net.send_back(adjoints[t], sweep.split_weights, lam_z)


def _shared_sweep(neurons: int, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int, bool] | None:
    """Rows and neurons of each of the programs that go back through a block together, and whether they hold their weights.

    None where a program that has a row to itself, or a launch for every step, serves: for few neurons, for many of more than
    a few rows, and where the device does not run all programs at once.
    """
    held = SWEEP_HELD_FROM < neurons <= SWEEP_HELD and dtype.itemsize == 4
    if not meets_unasked() or (neurons <= SWEEP_IN_ONE_LAUNCH and not held):
        return None
    if not held and batch > SWEEP_STREAMED_ROWS:
        return None
    rows = min(_power_of_2(batch), SWEEP_HELD_ROWS)
    block = SWEEP_COLUMNS // 2 if held or dtype.itemsize > 4 else SWEEP_COLUMNS
    programs = _cdiv(neurons, block) * _cdiv(batch, rows)
    return (rows, block, held) if programs <= resident_programs(device) else None


def _sweep_together(net: Network, sweep: Sweep, block: Block, adjoints: Tensor, rows: int, columns: int, held: bool) -> None:
    """:func:`sweep_back` in one launch of programs of ``rows`` x ``columns`` neurons that meet after every step."""
    planes, steps, batch, neurons = block.trajectory.shape
    _, _, grad_spikes, grad_states, lam, lam_z, sums, _ = sweep
    groups, programs = _cdiv(batch, rows), _cdiv(neurons, columns)
    arrived, failed = (torch.zeros(size, dtype=torch.int32, device=lam.device) for size in (groups, 1))
    grad_strides = (0, 0) if grad_spikes is None else grad_spikes.stride()
    _launch(
        recurrent.shared_backward_kernel, (programs, groups), lam.device, SWEEP_WARPS,
        block.trajectory, block.words, net.constants, grad_spikes, grad_states,
        net.recurrent_weights.contiguous(), lam, lam_z, adjoints, sums, arrived, failed,
        block.start, 0 if grad_states is None else grad_states.shape[1], steps, batch, neurons,
        net.constants.stride(0), *grad_strides, SPIN_LIMIT,
        ROWS=rows, BLOCK=columns, CHUNK=_power_of_2(neurons) if held else SWEEP_CHUNK, HELD=held,
        UNROLL=4 if rows <= 2 else 2, KEPT=planes - 2,
        PER_NEURON=net.constants.shape[1] > 1, JUMP_FIRST=net.jump_first, METHOD=sweep.method,
        launch_cooperative_grid=True,
    )  # fmt: skip
    torch._assert_async(
        failed == 0,
        f"backward: a program waited for another of its batch rows for more than {SPIN_LIMIT} looks and gave up; expected "
        f"all {programs * groups} programs to run at once; pass backend='reference'",
    )


def add_products(sums: Tensor, sources: Tensor, rows: Tensor, events: bool) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.add_products`. A matrix product, events or not."""
    sums.addmm_(sources.t().to(rows.dtype), rows)


# Neurons of a program of a sparse network, at most, and the synapses of a source that it reads together. Where constants of
# single neurons, or float64, take the registers of so many threads, a quarter of the neurons.
SPARSE_TILE = 1024
SYNAPSES_TOGETHER = 32
# The same where one step waits for the other, at most: as many as a source has on average, if there are registers for them.
STEP_SYNAPSES_TOGETHER = 128
# Steps between two meetings of the programs of a row, at most.
SPARSE_WINDOW = 16
# Rows of more neurons are shared by several programs.
ONE_PROGRAM = 256
# Programs of a row, whatever its size is; None for as many as its size and the device ask for.
PROGRAMS_PER_ROW: int | None = None


def _mode(numbers: Tensor | None) -> int:
    """How a kernel finds the weight or the delay of a synapse: one of all, one of each source, or one of each synapse."""
    if numbers is None:
        return 0
    return 1 if numbers.dim() == 2 else 0 if numbers.shape[0] == 1 else 2


def _takes_registers(net: SparseNetwork) -> bool:
    """Whether numbers of 64 bits, or constants of single neurons, take registers that are used otherwise else."""
    return net.constants.dtype == torch.float64 or net.constants.shape[1] > 1


def _programs_and_tile(net: SparseNetwork, batch: int) -> tuple[int, int]:
    """Programs that share a batch row of a sparse network, and neurons that each integrates together, one a thread.

    As many programs as run at once share a row of more than a few neurons, with tiles as small as that allows.
    """
    neurons, constants = net.neurons, net.constants
    most = SPARSE_TILE // 4 if _takes_registers(net) else SPARSE_TILE
    tile = max(threads_per_warp(), min(most, _power_of_2(neurons)))
    programs = PROGRAMS_PER_ROW
    if programs is None and (neurons <= ONE_PROGRAM or triton.knobs.runtime.interpret):  # which runs one program at a time
        programs = 1
    elif programs is None:
        programs = max(1, resident_programs(constants.device) // batch)
        tile = max(threads_per_warp(), min(tile, _power_of_2(_cdiv(neurons, programs))))
    return min(_cdiv(neurons, tile), programs), tile


def _window(net: SparseNetwork, steps: int) -> int:
    """Steps that neurons go on alone: no spike arrives sooner, and entries of a list of spikes have 32 bits."""
    return max(1, min(net.shortest, SPARSE_WINDOW, steps, (2**31 - 1) // net.neurons))


def _synapses_together(net: SparseNetwork) -> int:
    """Synapses of a source that are read together where a step waits for them, a power of two."""
    if _takes_registers(net):
        return SYNAPSES_TOGETHER
    average = _cdiv(len(net.recurrent.targets), max(1, len(net.recurrent.indptr) - 1))
    return max(SYNAPSES_TOGETHER, min(STEP_SYNAPSES_TOGETHER, _power_of_2(max(1, average))))


class _Meeting(NamedTuple):
    """How the programs of a batch row wait for each other: whether they do, and what they count in."""

    together: bool
    arrived: Tensor | None
    failed: Tensor | None
    options: dict[str, Any]

    @classmethod
    def of(cls, programs: int, batch: int, device: torch.device) -> _Meeting:
        if programs == 1:
            return cls(False, None, None, {})
        arrived, failed = (torch.zeros(size, dtype=torch.int32, device=device) for size in (batch, 1))
        return cls(True, arrived, failed, {"launch_cooperative_grid": True})

    def check(self, programs: int) -> None:
        """Raise, on the device, if a program gave up; the host does not wait for it."""
        if self.failed is not None:
            torch._assert_async(
                self.failed == 0,
                f"sparse network: a program waited for another of its batch row for more than {SPIN_LIMIT} looks and gave "
                f"up; expected all {programs} programs to run at once; pass backend='reference'",
            )


def _events(sources: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of sources ``[R, K]`` as the kernels read them, and the lists ``[R, K]`` and counts ``[R]`` of those not 0."""
    rows, count = sources.shape
    values = _kernel_view(sources)
    lists = torch.empty(rows, count, dtype=torch.int32, device=sources.device)
    counts = torch.empty(rows, dtype=torch.int32, device=sources.device)
    block = min(1024, _power_of_2(count))
    _launch(
        recurrent.compact_kernel, (rows,), sources.device, _warps_for(block),
        values, lists, counts, count, *values.stride(), BLOCK=block,
    )  # fmt: skip
    return values, lists, counts


def _scatter(net: SparseNetwork, sums: Tensor, sources: Tensor, begin: int, around: bool = False) -> None:
    """Add to the ``sums [2, L, B, N]`` of L steps what the ``sources [t, B, K]`` of the steps from ``begin`` on send.

    What arrives in no step of these is left out, or, ``around`` a ring, goes into that of L steps before.
    """
    if sources.shape[0] == 0 or len(net.recurrent.targets) == 0:
        return
    _, limit, batch, neurons = sums.shape
    indptr, targets, weights, delays, grid = net.recurrent
    values, lists, counts = _events(sources.flatten(0, 1))
    num_warps = 4
    together = SYNAPSES_TOGETHER
    _launch(
        sparse.scatter_kernel, (len(values),), sums.device, num_warps,
        values, lists, counts, sums, indptr, targets, weights, delays, grid.scales,
        sources.shape[2], batch, neurons, limit, begin, *values.stride(), net.per_ms,
        SOURCES=num_warps * threads_per_warp() // together, LANES=together, WEIGHT=_mode(weights), DELAY=_mode(delays),
        AROUND=around,
    )  # fmt: skip


def _sparse_projection(net: SparseNetwork, x: Tensor, drive: Tensor | None) -> Tensor | None:
    """The input's drive ``[2, t, B, N]``: the given one, or that of ``x`` through its synapses, if there are any."""
    if drive is None and net.input_rows is not None and x.shape[-1] > 0:
        return project_events(x, net.input_rows)
    if drive is not None or net.inputs is None:
        return drive
    steps, batch, inputs = x.shape
    indptr, targets, weights, _, grid = net.inputs
    if inputs == 0:
        return net.constants.new_zeros(2, steps, batch, net.neurons)
    drive = net.constants.new_empty(2, steps, batch, net.neurons)
    sums = torch.zeros(drive.shape, dtype=grid.sums, device=drive.device)
    values, lists, counts = _events(x.reshape(-1, inputs))
    rows, num_warps = len(values), 4
    units = torch.empty(rows, dtype=torch.float64, device=drive.device)
    threads, together = num_warps * threads_per_warp(), SYNAPSES_TOGETHER
    _launch(
        sparse.sparse_projection_kernel, (rows,), drive.device, num_warps,
        values, lists, counts, sums, units, indptr, targets, weights, grid.scales,
        inputs, net.neurons, rows, *values.stride(),
        BLOCK=threads, SOURCES=threads // together, LANES=together, WEIGHT=_mode(weights),
    )  # fmt: skip
    _launch(
        sparse.sums_to_drive_kernel, (rows, _cdiv(net.neurons, threads)), drive.device, num_warps,
        sums, units, counts, grid.scales, drive, net.neurons, rows, BLOCK=threads,
    )  # fmt: skip
    return drive


def sparse_ring(net: SparseNetwork, history: Tensor) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_ring`. The ring is ``[2, R, B, N]``."""
    sums = net.recurrent.grid.sums
    ring = torch.zeros(2, *history.shape[:2], net.neurons, dtype=sums, device=history.device)
    _scatter(net, ring, history, -net.longest)
    return ring


def sparse_send(net: SparseNetwork, ring: Tensor, start: int, events: Tensor) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_send`."""
    batch, sources = ring.shape[2], len(net.recurrent.indptr) - 1
    spikes = torch.zeros(net.shortest, batch, sources, dtype=torch.uint8, device=ring.device)
    spikes.view(-1).index_fill_(0, events, 1)
    _scatter(net, ring, spikes, start % net.longest, around=True)


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
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_block`. One launch, after that of the input's projection."""
    spikes, words, states, _ = out
    steps, batch = x.shape[:2]
    if states is not None and chosen is not None:
        every = state.new_empty(len(state), steps, *state.shape[1:])
        final = sparse_block(net, ring, start, x, drive, state, Outputs(spikes, words, every))
        states.copy_(every.flatten(2)[..., chosen])
        return final
    neurons, device = net.neurons, state.device
    indptr, targets, weights, delays, grid = net.recurrent
    drive = _sparse_projection(net, x, drive)
    final = state.clone(memory_format=torch.contiguous_format)
    window = _window(net, steps)
    programs, block = _programs_and_tile(net, batch)
    meeting = _Meeting.of(programs, batch, device)
    counts = torch.zeros(2, batch, dtype=torch.int32, device=device) if meeting.together else None
    synapses_together = _synapses_together(net)
    _launch(
        sparse.sparse_forward_kernel, (batch, programs), device, block // threads_per_warp(),
        drive, ring, indptr, targets, weights, delays, grid.scales, net.constants, final,
        torch.empty(batch, window * neurons, dtype=torch.int32, device=device), counts, meeting.arrived, meeting.failed,
        _kernel_view(spikes), words, states,
        steps, batch, neurons, net.longest, start % net.longest, window,
        net.constants.stride(0), 0 if states is None else states.stride(0), SPIN_LIMIT, net.per_ms,
        BLOCK=block, FIELDS=len(state), SOURCES=_cdiv(block, synapses_together), LANES=synapses_together,
        WEIGHT=_mode(weights), DELAY=_mode(delays), TOGETHER=meeting.together,
        PER_NEURON=net.constants.shape[1] > 1, JUMP_FIRST=net.jump_first, **meeting.options,
    )  # fmt: skip
    meeting.check(programs * batch)
    return final


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
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_backward_block`. One launch replays, and one goes back."""
    steps, batch = x.shape[:2]
    neurons, device = net.neurons, state.device
    indptr, targets, weights, delays, grid = net.recurrent
    words = words.contiguous()
    spikes = unpack_spikes(words, steps, torch.uint8)
    # with the spikes known, all that arrives in the block is a sum of what is under way and of what they send
    sums = torch.zeros(2, steps, batch, neurons, dtype=ring.dtype, device=device)
    sums[:, : net.longest] = ring[:, :steps]
    _scatter(net, sums, spikes, 0)
    recurrent_drive = sums.to(net.constants.dtype) * grid.scales[2:].view(2, 1, 1, 1)
    del sums
    drive = _sparse_projection(net, x, drive)
    kept = kept_count(len(state))
    trajectory = state.new_empty(kept + 2, steps, batch, neurons)
    drive = torch.zeros_like(recurrent_drive) if drive is None else drive
    _launch_driven(net, drive, recurrent_drive, state.contiguous(), words, trajectory=trajectory)
    programs, block = _programs_and_tile(net, batch)
    meeting = _Meeting.of(programs, batch, device)
    _launch(
        sparse.sparse_backward_kernel, (batch, programs), device, block // threads_per_warp(),
        trajectory, words, net.constants, _contiguous(grad_spikes), _contiguous(grad_states), indptr, targets, weights,
        delays, sweep.lam, adjoints, sweep.sums, meeting.arrived, meeting.failed,
        steps, batch, neurons, _window(net, steps), net.constants.stride(0), SPIN_LIMIT, net.per_ms,
        BLOCK=block, KEPT=kept, UNROLL=events_ahead(state.dtype), WEIGHT=_mode(weights), DELAY=_mode(delays),
        TOGETHER=meeting.together, PER_NEURON=net.constants.shape[1] > 1, JUMP_FIRST=net.jump_first,
        METHOD=sweep.method, **meeting.options,
    )  # fmt: skip
    meeting.check(programs * batch)
    if sweep.recurrent is not None:
        _add_synapse_gradient(net, net.recurrent, sweep.recurrent, spikes, adjoints, 0)
    if net.inputs is not None:
        if sweep.inputs is not None:
            _add_synapse_gradient(net, net.inputs, sweep.inputs, x, adjoints, 0)
        if grad_x is not None:
            _fill_source_gradient(net, net.inputs, grad_x, adjoints, 0)


def sparse_history_gradient(
    net: SparseNetwork, history: Tensor, adjoints: Tensor, grad_history: Tensor, sweep: SparseSweep
) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.sparse_history_gradient`."""
    _fill_source_gradient(net, net.recurrent, grad_history, adjoints, -len(history))
    if sweep.recurrent is not None:
        _add_synapse_gradient(net, net.recurrent, sweep.recurrent, history, adjoints, -len(history))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _fill_source_gradient(net: SparseNetwork, projection: Projection, grad: Tensor, adjoints: Tensor, begin: int) -> None:
    """Fill ``grad [t, B, K]``, by the values of sources in the steps from ``begin`` on, from ``adjoints [L, B, 2, N]``."""
    steps, batch, sources = grad.shape
    if grad.numel() == 0:
        return
    indptr, targets, weights, delays, _ = projection
    filled = grad if grad.is_contiguous() else torch.empty_like(grad, memory_format=torch.contiguous_format)
    num_warps = 4
    block = num_warps * threads_per_warp()
    _launch(
        sparse.source_gradient_kernel, (steps * batch, _cdiv(sources, block)), grad.device, num_warps,
        indptr, targets, weights, delays, adjoints, filled, sources, batch, net.neurons, begin, net.per_ms,
        BLOCK=block, UNROLL=events_ahead(grad.dtype), WEIGHT=_mode(weights), DELAY=_mode(delays),
    )  # fmt: skip
    if filled is not grad:
        grad.copy_(filled)


def _add_synapse_gradient(
    net: SparseNetwork, projection: Projection, grad: Tensor, sources: Tensor, adjoints: Tensor, begin: int
) -> None:
    """Add to ``grad [samples, S]`` what the ``sources [t, B, K]`` of the steps from ``begin`` on make of the adjoints."""
    steps, batch, count = sources.shape
    if grad.numel() == 0 or sources.numel() == 0:
        return
    indptr, targets, weights, delays, _ = projection
    samples, synapses = grad.shape
    rows = batch // samples
    # a row for each sample and source, of its values in all steps and rows of the batch
    by_source = sources.unflatten(1, (samples, rows)).permute(1, 3, 0, 2).contiguous()
    values, lists, counts = _events(by_source.view(samples * count, steps * rows))
    num_warps = 1 if synapses <= 64 * count else 4
    _launch(
        sparse.synapse_gradient_kernel, (samples * count,), grad.device, num_warps,
        values, lists, counts, indptr, targets, weights, delays, adjoints, grad,
        steps * rows, count, batch, net.neurons, synapses, rows, begin, net.per_ms,
        BLOCK=num_warps * threads_per_warp(), UNROLL=events_ahead(grad.dtype), WEIGHT=_mode(weights), DELAY=_mode(delays),
    )  # fmt: skip
