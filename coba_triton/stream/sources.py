"""What drives a long run: arrays, chunks, Poisson spikes and lists of spikes. A thread reads the next block ahead."""

from __future__ import annotations

import hashlib
import itertools
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..backend.choose import the_device
from ..ops import validation
from ..ops.tensors import as_in_memory

FIRST = 32  # so many steps are read at once, to know the source's channels and dtype
ROUNDING = 1e-3  # part of a step by which a time in a list may be off
LARGEST = 2**48  # the largest number of steps or channels
MOST_OF_A_CHANNEL = 2**24  # spikes of a channel in a step: float32 cannot count further
MOST_OF_A_STEP = 2**26  # spikes of all channels in a step: to make them takes some tenths of a second
PIECE = 2**22  # after so many spikes and numbers, look whether somebody still waits for them

_reader = threading.local()  # its attribute `stopped` tells a thread whether its source is still wanted


class Described(ABC):
    """A source whose description says what it gives: two with the same description are the same, without comparing data."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the result says about its source; plain JSON."""


class MadeSource(ABC):
    """Input in float32 that is made when it is read. It is the same for every choice of blocks.

    Attributes:
        shape: the number of steps T, and the axes of the channels.
    """

    shape: tuple[int, ...]
    dtype = torch.float32

    @abstractmethod
    def fill(self, start: int, out: Tensor, add: bool = False) -> None:
        """Write steps ``start``, ``start + 1``, ... to ``out [t, *shape]``, contiguous float32, or add them to it."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the result says about its source."""

    def __getitem__(self, steps: slice) -> Tensor:
        start, stop, stride = steps.indices(self.shape[0])
        if stride != 1:
            raise ValueError(f"a {type(self).__name__} is read in slices of consecutive steps, got a stride of {stride}")
        out = torch.empty(max(stop - start, 0), *self.shape[1:])
        self.fill(start, out)
        return out


class PoissonSource(MadeSource, Described):
    """Independent Poisson spikes in every channel. They are the same for every choice of blocks.

    The spikes of a step depend only on the seed, the stream and the number of the step (Philox4x32-10, a counter-based
    generator; Salmon et al. 2011, doi:10.1145/2063384.2063405). They are the same on every machine. Several spikes of a
    channel in one step add up. The time to make them is proportional to their number.

    Args:
        rate: rate in Hz, a number or a tensor that broadcasts to the channels.
        steps: T.
        shape: axes of the channels, ``I``, ``(I,)`` or ``(B, I)``.
        dt: time step in ms.
        weight: what one spike adds to the input: a conductance in uS for unconnected neurons, 1 if input weights follow.
        seed: from 0 to 2**64 - 1.
        stream: from 0 to 2**32 - 1; sources with the same seed and different streams are independent.
        rows: a slice of the first axis of ``shape``, for a process that simulates a part of a batch; None for all rows. The
            rows have the same spikes as in the whole source; therefore the rows before them are drawn as well.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a value is out of range or ``rate`` does not broadcast.

    Example:
        >>> source = PoissonSource(20.0, steps=1000, shape=(1, 100), dt=0.1)
        >>> bool((source[300:310] == source[:1000][300:310]).all())
        True
    """

    def __init__(
        self,
        rate: float | Tensor,
        steps: int,
        shape: int | Sequence[int],
        dt: float = 0.001,
        *,
        weight: float = 1.0,
        seed: int = 0,
        stream: int = 0,
        rows: slice | None = None,
    ) -> None:
        validation.check_number(rate, "rate")
        self.dt = validation.check_dt(dt)
        steps = validation.check_int(steps, "steps")
        shape = check_shape(shape)
        if max(steps, math.prod(shape)) > LARGEST:
            raise ValueError(f"steps and channels must be at most {LARGEST:,}, got {steps} of shape {shape!s:.100}")
        validation.check_number(weight, "weight")
        self.seed = validation.check_int(seed, "seed", 0, 2**64 - 1)
        self.stream = validation.check_int(stream, "stream", 0, 2**32 - 1)
        rates = torch.as_tensor(rate, dtype=torch.float64).detach().cpu() + 0.0  # -0.0 is 0.0
        if not bool((torch.isfinite(rates) & (rates >= 0)).all()):
            raise ValueError(f"rate must be finite and not negative, in Hz, got {rate!r}")
        validation.broadcast_neurons(shape, {"rate": rates}, grows=False)
        of_rows = isinstance(rows, slice) and (rows.step is None or rows.step == 1)
        try:
            made = range(shape[0])[rows or slice(None)] if shape and (rows is None or of_rows) else range(1)
        except TypeError:  # its ends are no integers
            made = range(0)
        if rows is not None and not (shape and of_rows and made):
            raise ValueError(
                f"rows must be a slice of consecutive rows of shape {tuple(shape)}, at least one, got {rows!r:.200}"
            )
        self.rows = rows and (made.start, made.stop, shape[0])
        width = math.prod(shape[1:])
        self._first, self._last = made.start * width, made.stop * width
        self.shape = (steps, len(made), *shape[1:]) if shape else (steps,)
        self.rate, self.weight = rates, float(weight)
        expected = (rates * (self.dt / 1000)).numpy()
        most, total = float(expected.max(initial=0.0)), float(np.broadcast_to(expected, shape).sum())
        if not (most <= MOST_OF_A_CHANNEL and total <= MOST_OF_A_STEP):
            raise ValueError(
                f"rate times dt must give at most {MOST_OF_A_CHANNEL:,} spikes of a channel and {MOST_OF_A_STEP:,} of all "
                f"channels in a step, got {most:.3g} and {total:.3g}; give rate in Hz and dt in ms"
            )
        self._piece = max(1, int(PIECE / (total + math.prod(self.shape[1:]))))  # steps
        self._expected = float(expected) if expected.ndim == 0 else 0.0
        each = np.broadcast_to(expected, shape).ravel() if expected.ndim else np.empty(0)
        self._cumulative = np.concatenate([np.zeros(1), np.cumsum(each)]) if each.size else each

    def fill(self, start: int, out: Tensor, add: bool = False) -> None:
        from .loops import poisson_kernel

        rows = out.view(out.shape[0], math.prod(self.shape[1:])).numpy()
        key, stream = np.uint64(self.seed), np.uint32(self.stream)
        options = self._first, self._last, key, stream, self._expected, self._cumulative, self.weight, add
        for begin in range(0, len(rows), self._piece):
            if getattr(_reader, "stopped", bool)():
                raise RuntimeError("the source is not read any longer")  # it ends this thread; nobody sees the error
            poisson_kernel(rows[begin : begin + self._piece], start + begin, *options)

    def describe(self) -> dict[str, Any]:
        rate = self.rate.item() if self.rate.dim() == 0 else digest(self.rate)
        numbers = {name: getattr(self, name) for name in ("dt", "weight", "seed", "stream")}
        return {"kind": "poisson", "rate_hz": rate, **numbers, **({"rows": self.rows} if self.rows else {})}


class EventSource(MadeSource):
    """Spikes from a list, ``(times, neurons)``. A spike takes 12 bytes of memory; there is no array of all steps.

    Step k has the spikes after ``k dt`` and up to its end, ``(k + 1) dt``, which is the time that results list. The first
    step also has the spikes at time 0. Times may be off by a thousandth of a step. So the events of a result, as a source,
    give the same spikes again. Several spikes of a channel in one step add up.

    Args:
        times: times in ms, ``[S]``, in any order.
        neurons: the channel of every spike, ``[S]``; if the channels have several axes, they are counted over all axes. From
            a file: ``EventSource(*read_events(path), ...)``.
        shape: axes of the channels, ``I``, ``(I,)`` or ``(B, I)``.
        dt: time step in ms.
        steps: T; later spikes are left out. None for a source that ends with the last spike.
        weight: what one spike adds to the input, a number or one for each spike ``[S]``: a conductance in uS for unconnected
            neurons, 1 if input weights follow. Weights in one channel and step are summed in double precision.
        first: the number of the first channel in ``neurons``; NEST counts from 1.
        start: time in ms at which the first step begins; spikes up to that time are left out.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if there is not one neuron a time, a neuron is no channel, a time is negative or not finite, or there is
            neither a spike nor a number of steps.

    Example:
        >>> source = EventSource([0.1, 0.35, 0.4], [0, 2, 2], shape=3, dt=0.1, weight=0.002)
        >>> source.shape, source[3:4]
        ((4, 3), tensor([[0.0000, 0.0000, 0.0040]]))
    """

    def __init__(
        self,
        times: Any,
        neurons: Any,
        shape: int | Sequence[int],
        dt: float = 0.001,
        *,
        steps: int | None = None,
        weight: Any = 1.0,
        first: int = 0,
        start: float = 0.0,
    ) -> None:
        self.dt = validation.check_dt(dt)
        shape = check_shape(shape)
        validation.check_number(start, "start", not_negative=True)
        if isinstance(start, Tensor):
            raise TypeError("start must be one number of ms, got a tensor; pass a Python float")
        first = validation.check_int(first, "first", 0, LARGEST)
        at, channels = _array(times, "times", np.float64), _array(neurons, "neurons")
        channels = channels.astype(np.int64) if channels.size == 0 else channels
        if at.ndim != 1 or at.shape != channels.shape or channels.dtype.kind not in "iu":
            raise ValueError(
                f"times and neurons must be a number and an integer for every spike, got {at.dtype} {list(at.shape)} and "
                f"{channels.dtype} {list(channels.shape)}; for a dense array pass it as the source itself"
            )
        weights = _array(weight, "weight", np.float64)
        if weights.shape not in ((), at.shape):
            raise ValueError(f"weight must be a number or one for every spike, {list(at.shape)}, got {list(weights.shape)}")
        weights = np.broadcast_to(weights, at.shape)
        for name, numbers in (("times", at), ("weight", weights)):
            validation.check_numbers({name: torch.from_numpy(numbers.copy())})
        if start == 0 and (at < 0).any():
            raise ValueError(f"times must not be negative, got {at.min()} ms; pass start= to leave out what is before it")
        if at.size and at.max() / self.dt > LARGEST:
            raise ValueError(f"times must be of the first {LARGEST:,} steps, got {at.max()} ms; give times and dt in ms")
        width = math.prod(shape)
        channels = channels.astype(np.int64) - first
        if ((channels < 0) | (channels >= width)).any():
            got = f"{channels.min() + first} to {channels.max() + first}"
            raise ValueError(
                f"neurons must be from {first} to {first + width - 1} for channels {list(shape)}, got {got}; change shape "
                "or first, or leave out the spikes of other neurons"
            )
        number = np.ceil((at - start) / self.dt - ROUNDING).astype(np.int64) - 1
        if start == 0:
            number = np.maximum(number, 0)
        if steps is None and not (number >= 0).any():
            raise ValueError("steps must be given if there is no spike, got None; pass a number of steps")
        steps = int(number.max()) + 1 if steps is None else validation.check_int(steps, "steps")
        kept = (number >= 0) & (number < steps)
        cells = number[kept] * width + channels[kept]
        order = np.argsort(cells, kind="stable")
        self._cells, begins = np.unique(cells[order], return_index=True)
        sums = np.add.reduceat(weights[kept][order], begins) if len(begins) else np.empty(0)
        self._values = sums.astype(np.float32)
        self._width = width
        self.shape = (steps, *shape)

    def fill(self, start: int, out: Tensor, add: bool = False) -> None:
        begin = start * self._width
        first, last = np.searchsorted(self._cells, (begin, begin + len(out) * self._width))
        cells, flat = self._cells[first:last] - begin, out.view(-1).numpy()
        if not add:
            flat[:] = 0
        flat[cells] += self._values[first:last]

    def describe(self) -> dict[str, Any]:
        lists = digest(torch.from_numpy(self._cells)), digest(torch.from_numpy(self._values))
        return {"kind": "events", "dt": self.dt, "events": len(self._cells), "digest": "".join(lists)}


class Blocks:
    """Reads a source in time blocks. While one block is used, a thread reads the next one.

    Args:
        source: as for :func:`stream_blocks`.
        device: the device that the blocks are copied to; for a GPU, from pinned memory and on a stream of their own.

    Attributes:
        steps: T, None for an iterable of chunks.
        first: the first steps on the CPU, at most :data:`FIRST` of them.
        described: whether the description says what the source gives, see :class:`Described`.
    """

    def __init__(self, source: Any, device: torch.device) -> None:
        if isinstance(source, Tensor) and (source.layout != torch.strided or source.is_nested):
            raise TypeError(f"source must be dense, got a tensor of {source.layout}; use .to_dense(), or an EventSource")
        source = source.tocsr() if hasattr(source, "tocsr") else source  # sparse arrays of scipy are sliced by rows as CSR
        self.source, self.device = _from_numpy(source) if _in_memory(source) else source, device
        self.steps: int | None = None
        self.described = isinstance(source, Described)
        self._dtype: torch.dtype | None = None
        if hasattr(source, "shape") and hasattr(source, "__getitem__"):
            if len(source.shape) < 1:
                raise ValueError("source must have a leading time axis [T, ...], got a 0-dim array; reshape it")
            self.steps = int(source.shape[0])
            self._channels = torch.Size(source.shape[1:])
            self.first = self._read(0, min(self.steps, FIRST)).cpu()
        elif isinstance(source, Iterable):
            chunks = map(_chunk, source)
            chunk = next(chunks, None)
            if chunk is None:
                raise ValueError("source must have at least one chunk [t, ...], got an empty iterator")
            if not chunk.dim():
                raise ValueError("every chunk must have a leading time axis [t, ...], got a 0-dim one; reshape it")
            self._chunks = itertools.chain([chunk], chunks)
            self._channels = chunk.shape[1:]
            self.first = chunk[:FIRST].cpu()
        else:
            raise TypeError(
                "source must be a tensor, an array that gives its steps as slices, a PoissonSource, an EventSource, or an "
                f"iterable of chunks [t, ...], got {type(source).__name__}"
            )
        if self.first.is_complex():
            raise TypeError(f"source must be real, spikes as bool or integers, got {self.first.dtype}; use .real")
        self._dtype = self.first.dtype

    def _read(self, start: int, stop: int) -> Tensor:
        """Read steps of an array, and check that they have the shape and the dtype that it promised."""
        block = _tensor(self.source[start:stop])
        if block.shape != (stop - start, *self._channels) or block.dtype != (self._dtype or block.dtype):
            raise ValueError(
                f"source must give {[stop - start, *self._channels]} of {self._dtype or 'one dtype'} for its steps {start} "
                f"to {stop}, as its shape and its first steps say, got {list(block.shape)} of {block.dtype}"
            )
        return block

    def describe(self) -> dict[str, Any]:
        """What the result says about its source."""
        described = {"kind": "data"} | (self.source.describe() if isinstance(self.source, MadeSource | Described) else {})
        dtype = str(self.first.dtype).removeprefix("torch.")
        return {**described, "described": self.described, "channels": list(self.first.shape[1:]), "dtype": dtype}

    def read(
        self, start: int, block_steps: int, buffers: int | None = None, note: Callable[[Tensor], None] | None = None
    ) -> Iterator[Tensor]:
        """Yield blocks of ``block_steps`` steps from step ``start`` on. The last one may be shorter.

        An iterable of chunks is always read from its beginning.

        Args:
            start: the first step.
            block_steps: how many steps a block has.
            buffers: how many blocks are in use at the same time, the one that is being read included; later blocks are
                read into the memory of earlier ones. None gives every block its own memory.
            note: called with every block, in the thread that reads, before the block is used.
        """
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        stop = threading.Event()
        array = self.steps is not None
        blocks = self._from_array(start, block_steps, buffers) if array else self._from_chunks(block_steps)

        def advance() -> tuple[Tensor, Any] | None:
            _reader.stopped = stop.is_set
            x = next(blocks, None)
            if x is not None and note is not None:
                note(x)
            if x is None or stream is None or x.device.type != "cpu":  # to() copies a block only if it is elsewhere
                return x if x is None else (x.to(self.device), None)
            with torch.cuda.stream(stream):
                return x.pin_memory().to(self.device, non_blocking=True), stream.record_event()

        with ThreadPoolExecutor(1, thread_name_prefix="coba_triton source") as reader:
            try:
                coming = reader.submit(advance)
                while (block := coming.result()) is not None:
                    x, copied = block
                    if copied is not None:
                        torch.cuda.current_stream(self.device).wait_event(copied)
                        x.record_stream(torch.cuda.current_stream(self.device))
                    coming = reader.submit(advance)
                    yield x
            finally:
                stop.set()

    def _from_array(self, start: int, block_steps: int, buffers: int | None) -> Iterator[Tensor]:
        steps = self.steps or 0
        memory: list[Tensor] = []
        for number, begin in enumerate(range(start, steps, block_steps)):
            end = min(begin + block_steps, steps)
            if buffers and isinstance(self.source, MadeSource):
                if len(memory) < buffers:
                    memory.append(torch.empty(block_steps, *self.source.shape[1:]))
                block = memory[number % buffers][: end - begin]
                self.source.fill(begin, block)
            else:
                block = self._read(begin, end)
            yield block

    def _from_chunks(self, block_steps: int) -> Iterator[Tensor]:
        waiting: list[Tensor] = []
        for chunk in self._chunks:
            if not chunk.dim() or chunk.shape[1:] != self._channels or chunk.dtype != self._dtype:
                raise ValueError(
                    f"every chunk must be [t, ...] = [t, {', '.join(map(str, self._channels))}] of "
                    f"{self._dtype} like the first, got {list(chunk.shape)} of {chunk.dtype}"
                )
            waiting.append(chunk)
            while sum(map(len, waiting)) >= block_steps:
                joined = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
                yield joined[:block_steps]
                waiting = [joined[block_steps:]]
        if sum(map(len, waiting)):
            yield torch.cat(waiting)


def _array(numbers: Any, name: str, dtype: Any = None) -> NDArray[Any]:
    try:
        return np.asarray(numbers, dtype)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers, got {numbers!r:.100} ({error})") from None


def check_shape(shape: Any) -> tuple[int, ...]:
    """The sizes of the channels' axes as a tuple, from one integer or several."""
    sizes = shape if isinstance(shape, list | tuple) else (shape,)
    return tuple(validation.check_int(size, "every size in shape") for size in sizes)


def _in_memory(x: Any) -> bool:
    """Whether torch can use an array where it is: it is in memory, not in a mapped file, and laid out like a tensor."""
    if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray) or not (x.flags.writeable and x.dtype.isnative):
        return False
    if any(stride < 0 or stride % x.itemsize for stride in x.strides):
        return False
    owner: Any = x
    while isinstance(owner, np.ndarray) and not isinstance(owner, np.memmap):
        owner = owner.base
    return owner is None or isinstance(owner, Tensor)


def _chunk(x: Any) -> Tensor:
    if not hasattr(x, "shape"):  # numpy would make one array of a list of batches
        raise TypeError(
            f"every chunk of source must be a tensor or an array [t, ...], got {type(x).__name__}; if a "
            "loader gives lists, pass the part of each that is time first, such as (batch[0] for batch in loader)"
        )
    return _tensor(x)


def _tensor(x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return as_in_memory(x)
    if isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        raise ValueError("source must have a number everywhere, got a masked array; put one there with .filled(0)")
    array = np.asarray(x.toarray() if hasattr(x, "toarray") else x)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # torch shares memory only with arrays that can be written to; a mapped file is read here, and not by the kernels
    return _from_numpy(array if array.flags.writeable and array.base is None else array.copy())


def _from_numpy(array: Any) -> Tensor:
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise TypeError(f"source must have a dtype that torch has, got {array.dtype}; convert it with .astype") from None


def digest(x: Tensor) -> str:
    """A checksum of a tensor's numbers."""
    # a tensor without elements cannot be viewed as bytes
    content = as_in_memory(x.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data if x.numel() else b""
    return hashlib.sha256(content).hexdigest()[:16]


def stream_blocks(source: Any, block_steps: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Read a long input in time blocks. While one block is used, a thread reads the next one.

    For truncated backpropagation through time, carry the state from block to block with ``state.detach()``.

    Args:
        source: an array ``[T, ...]`` (tensor, numpy array or memmap, sparse array of scipy, zarr or HDF5 array,
            :class:`PoissonSource`, :class:`EventSource`, or anything else that has a ``shape`` and can be sliced by steps);
            or an iterable of chunks ``[t, ...]``, tensors or arrays, which may differ in their lengths.
        block_steps: how many steps a block has.
        device: the device that the blocks are copied to; for a GPU, from pinned memory and on a stream of their own.

    Returns:
        An iterator of tensors ``[block_steps, ...]``; the last one may be shorter. Blocks of a tensor or of a numpy array in
        memory are views of it.

    Raises:
        TypeError: if ``source`` is none of these.
        ValueError: if an array has no time axis, or chunks differ in their shape.

    Example:
        >>> network, state = CobaLIF(dt=0.1), None
        >>> for x in stream_blocks(PoissonSource(20.0, 1000, (8,), dt=0.1), 250):
        ...     spikes, state = network(x, state)
        ...     state = state.detach()
    """
    return Blocks(source, the_device(device)).read(0, validation.check_int(block_steps, "block_steps"))
