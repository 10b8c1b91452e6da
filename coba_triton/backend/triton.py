"""What a backend must offer, with Triton: allocates what the kernels write, and chooses how they are launched."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, overload

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from ..kernels import feed_forward, recurrent
from ..ops.call import Block, Call, Incoming, Network, Outputs, Saved, Sweep, kept_count
from ..tuning.tables import Parameters, launch_parameters

# Steps whose inputs are on their way while as many are computed.
PREFETCH_STEPS = 8


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


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, num_warps: int, *args: Any, **meta: Any) -> None:
    """Every launch of the package: on the tensors' device, without fusing multiplications into additions.

    Triton takes about 10 us to find what a call was compiled to; here it takes 3. This is right for kernels that are not
    specialized for the values of their numbers, as a test makes sure of.
    """
    if device.type != "cpu" and (on := torch.get_device_module(device)).current_device() != device.index:
        with on.device(device):
            return _launch(kernel, grid, device, num_warps, *args, **meta)
    if not isinstance(kernel, triton.JITFunction):  # Triton's interpreter
        kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **meta)
        return
    driver = triton.runtime.driver.active
    compiled_for = [
        (arg.dtype, arg.data_ptr() & 15) if isinstance(arg, Tensor) else arg if arg is None else -(2**31) <= arg < 2**31
        for arg in args
    ]
    key = id(kernel), id(driver), device, num_warps, *meta.values(), *compiled_for
    if (found := _compiled.get(key)) is not None:
        compiled, last, _ = found
        compiled[(*grid, 1, 1)[:3]](*args, *[meta[name] for name in last])
        return
    compiled = kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **meta)
    if isinstance(compiled, CompiledKernel):  # not what stands for one
        _compiled[key] = compiled, kernel.arg_names[len(args) :], driver


def heuristic(kernel: str, dtype: torch.dtype, neurons: int, batch: int) -> Parameters:
    """The launch parameters where no tuning table has any; see :data:`coba_triton.tuning.SPACE`."""
    if kernel == "feed_forward_forward":
        return {"num_warps": warps_per_program(neurons), "steps": PREFETCH_STEPS}
    if kernel == "feed_forward_backward":
        return {"num_warps": warps_per_program(neurons), "steps": replay_steps(dtype)}
    if kernel == "recurrent_forward":
        block = _power_of_2(neurons) if neurons <= ROW_IN_REGISTERS else TILE
        return {"num_warps": _warps_for(block), "events_ahead": EVENTS_AHEAD, "tile": TILE}
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


def feed_forward_forward(x: Tensor, state: Tensor, constants: Tensor, final: Tensor, out: Outputs, call: Call) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.feed_forward_forward`."""
    parameters = parameters_of("feed_forward_forward", state, x.shape[1])
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
        STEPS=parameters["steps"] if out.checkpoints is None else call.checkpoint_every,
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
        STEPS=parameters["steps"],
        METHOD=call.method,
    )


# Loads on their way while weights are added; the order of the sum does not depend on it.
EVENTS_AHEAD = 4
# Rows of sources that a program projects, if there are enough of them to fill a GPU, else one.
ROWS_TOGETHER = 4
MANY_ROWS = 2048
# A program of the event-driven kernel keeps so many neurons in registers; a larger row is swept tile by tile.
ROW_IN_REGISTERS = 2048
TILE = 2048
# Looks at the arrival counter before a program of a sliced row gives up: seconds on a GPU.
SPIN_LIMIT = 10_000_000
# Up to so many neurons a program forms the sweep's product itself, one launch a block; above, one product a step.
SWEEP_IN_ONE_LAUNCH = 256


def _warps_for(block: int) -> int:
    """Warps for a program with ``block`` neurons, of which a thread has 2, or 4 where there are more than 1024."""
    return max(1, min(16, block // 64))


def synapses(rows: Tensor, uses: int) -> None:
    """Nothing is prepared: the kernels read the rows of the matrix itself."""


def is_sparse(sources: Tensor) -> bool:
    """Always: the kernels sum over the events of any sources, so that the host does not wait for a count of them."""
    return True


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
        BLOCK=block, UNROLL=EVENTS_AHEAD, ROWS=together,
    )  # fmt: skip
    return drive


def recurrent_block(
    net: Network,
    x: Tensor,
    drive: Tensor | None,
    z: Tensor,
    state: Tensor,
    out: Outputs,
    sliced: bool,
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
    slices = slices_per_row(neurons, batch, state.device) if sliced else 1
    if slices > 1:
        return _sliced_block(net, drive, first, state, out, slices)
    final = torch.empty_like(state)
    parameters = parameters_of("recurrent_forward", state, neurons, batch)
    one_tile = neurons <= ROW_IN_REGISTERS
    block = _power_of_2(neurons) if one_tile else parameters["tile"]
    scratch = torch.empty(3, batch, neurons, dtype=torch.int32, device=state.device)
    _launch(
        recurrent.forward_kernel, (batch,), state.device, parameters["num_warps"],
        drive, first, net.recurrent_rows, state, net.constants, final, scratch[:2], scratch[2],
        _kernel_view(spikes), words, states,
        steps, batch, neurons, net.constants.stride(0), 0 if states is None else states.stride(0),
        BLOCK=block, FIELDS=len(state), ONE_TILE=one_tile, UNROLL=parameters["events_ahead"],
        PER_NEURON=net.constants.shape[1] > 1, JUMP_FIRST=net.jump_first,
    )  # fmt: skip
    return final


def resident_programs(device: torch.device) -> int:
    """Programs that surely run at the same time: one for each of the device's multiprocessors."""
    if triton.knobs.runtime.interpret:
        return 8
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["multiprocessor_count"])


def slices_per_row(neurons: int, batch: int, device: torch.device) -> int:
    """Programs that share a batch row, none of fewer than 32 neurons; the sum over synapses does not depend on it."""
    wanted = max(1, min(neurons // 32, resident_programs(device) // max(1, batch)))
    return _cdiv(neurons, _power_of_2(_cdiv(neurons, wanted)))


def _sliced_block(net: Network, drive: Tensor, first: Tensor, state: Tensor, out: Outputs, slices: int) -> Tensor:
    """:func:`recurrent_block` by ``slices`` programs a row, which wait for each other after every step.

    ``first``: the recurrent drive of the first step, ``[2, B, N]``.
    """
    _, steps, batch, neurons = drive.shape
    spikes, words, states, _ = out
    final = torch.empty_like(state)
    block = _power_of_2(_cdiv(neurons, slices))
    integers = functools.partial(torch.empty, dtype=torch.int32, device=state.device)
    arrived, failed = (torch.zeros(size, dtype=torch.int32, device=state.device) for size in (batch, 1))
    _launch(
        recurrent.sliced_forward_kernel, (slices, batch), state.device, _warps_for(block),
        drive, first, net.recurrent_rows, state, net.constants, final,
        integers((2, batch, slices, block)), integers((2, batch, slices)), arrived, failed,
        _kernel_view(spikes), words, states,
        steps, batch, neurons, net.constants.stride(0), 0 if states is None else states.stride(0), SPIN_LIMIT,
        BLOCK=block, FIELDS=len(state), SLICES=slices, UNROLL=EVENTS_AHEAD,
        PER_NEURON=net.constants.shape[1] > 1, JUMP_FIRST=net.jump_first, launch_cooperative_grid=True,
    )  # fmt: skip
    torch._assert_async(  # on the device: the host does not wait for it
        failed == 0,
        f"path 'sliced': a program waited for another of its batch row for more than {SPIN_LIMIT} looks and gave "
        f"up; expected all {slices * batch} programs to run at once; pass path='events'",
    )
    return final


def _launch_driven(
    net: Network,
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


def recurrent_replay(
    net: Network,
    x: Tensor,
    drive: Tensor | None,
    before: Tensor,
    recurrent_drive: Tensor | None,
    state: Tensor,
    words: Tensor,
    constants_grad: bool,
) -> Tensor:
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_replay`."""
    drive = project_events(x, net.input_rows) if drive is None else drive
    if recurrent_drive is None:
        recurrent_drive = project_events(before, net.recurrent_rows)
    trajectory = state.new_empty(kept_count(len(state)) + 2, len(before), *state.shape[1:])
    _launch_driven(net, drive, recurrent_drive, state, words, trajectory=trajectory)
    return trajectory


def recurrent_sweep(net: Network, sweep: Sweep, block: Block, adjoints: Tensor) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.recurrent_sweep`.

    One launch where a program can own whole rows; for more neurons a launch and a matrix product a step.
    """
    planes, steps, batch, neurons = block.trajectory.shape
    _, _, grad_spikes, grad_states, lam, lam_z, sums = sweep
    in_one_launch = neurons <= SWEEP_IN_ONE_LAUNCH and net.exchange is None
    # one neuron a thread: no layout conversions between the loads
    if in_one_launch:
        num_warps = max(1, _power_of_2(neurons) // threads_per_warp())
    else:
        num_warps = parameters_of("recurrent_backward", lam, neurons, batch)["num_warps"]
    threads = num_warps * threads_per_warp()
    grad_strides = (0, 0) if grad_spikes is None else grad_spikes.stride()
    weights = net.recurrent_weights.contiguous() if in_one_launch else None

    def launch(begin: int, end: int) -> None:
        _launch(
            recurrent.backward_kernel, (batch, _cdiv(neurons, threads)), lam.device, num_warps,
            block.trajectory, block.words, net.constants, grad_spikes, grad_states,
            weights, lam, lam_z, adjoints, sums,
            begin, end, block.start, 0 if grad_states is None else grad_states.shape[1], steps, batch, neurons,
            net.constants.stride(0), *grad_strides,
            BLOCK=threads, KEPT=planes - 2, UNROLL=EVENTS_AHEAD,
            PER_NEURON=net.constants.shape[1] > 1, JUMP_FIRST=net.jump_first, METHOD=sweep.method,
        )  # fmt: skip

    if in_one_launch:
        launch(0, steps)
        return
    for t in reversed(range(steps)):
        launch(t, t + 1)
        net.send_back(adjoints[t], sweep.split_weights, lam_z)


def add_products(sums: Tensor, sources: Tensor, rows: Tensor, events: bool) -> None:
    """See :meth:`coba_triton.backend.protocol.Backend.add_products`. A matrix product, events or not."""
    sums.addmm_(sources.t().to(rows.dtype), rows)
