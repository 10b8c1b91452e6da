"""Long runs: a network reads a source in time blocks, and its results go to a sink."""

from __future__ import annotations

import importlib.util
import itertools
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import DataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..backend.choose import choose_backend, launcher
from ..common.files import reason
from ..common.versions import package_version
from ..common.warned import warn
from ..functional import coba_lif_feed_forward_integral, coba_lif_integral, connections, flat_input, kernel_input
from ..modules import CobaLIF, CobaLIFRecurrent
from ..neuron.records import (
    CobaLIFDelayState,
    CobaLIFParameters,
    FeedForwardState,
    State,
    feed_forward_state,
    numbers_of,
    recurrent_state,
)
from ..ops import sparse_blocks, time_blocks, validation
from ..ops.call import Network, Outputs, SparseNetwork, Weights
from ..ops.constants import constants_table
from ..ops.grid import PART, weights_of
from ..ops.spikes import WORD_BITS, word_count
from ..ops.synapses import Synapses
from ..ops.tensors import is_refractory
from ..ops.wiring import Wiring, connect, is_sparse
from .results import Result
from .sinks import Checkpoint, Header, Sink, open_sink
from .sources import Blocks, EventSource, PoissonSource, digest
from .states import pack_state, unpack_state
from .store import checksum, columns_of

if TYPE_CHECKING:
    from ..backend.cpu.launch import ForwardStream

_Blocks = Generator[tuple[Tensor, int | None], None, None]

BLOCK_BYTES = 2**26  # a block of the default length takes this much memory
MAX_BLOCK_STEPS = 2**16
PART_WORK = 2**27  # synapses that are looked at in the first part of a block
LONG = 2**20  # steps that are assumed if a source does not say how long it is
STATE_BYTES = 2**24  # memory for the states of all neurons, where they are needed to record those of some

Variable = Literal["v", "g_e", "g_i"]
Members = slice | range | Sequence[int] | np.ndarray[Any, Any]


@dataclass(frozen=True)
class Record:
    """What to keep of a run.

    Attributes:
        spikes: whether to keep all spikes, with one bit for each neuron and step.
        variables: which traces to keep: ``v`` (mV), ``g_e``, ``g_i`` (uS, or nA where synapses are currents).
        neurons: the neurons whose traces are kept; if the neurons have several axes, they are counted over all axes.
        every: n, to keep the traces at the end of every n-th step only: at the times ``n dt``, ``2 n dt``, ...
        populations: neurons (a slice, a range, or indices) by name; the spikes of each population are counted in every step.
        inputs: whether to keep the excitatory and the inhibitory conductance in uS that the input adds in every step, as a
            mean over the neurons. Recurrent synapses are not part of it.
    """

    spikes: bool = True
    variables: Sequence[Variable] = ("v",)
    neurons: Sequence[int] = ()
    every: int = 1
    populations: Mapping[str, Members] = field(default_factory=dict)
    inputs: bool = False


def simulate(
    network: CobaLIF | CobaLIFRecurrent,
    source: Any,
    *,
    sink: Sink | str | Path | None = None,
    state: Any = None,
    block_steps: int | None = None,
    record: Record | None = None,
    progress: bool | Callable[[int], None] = True,
    resume: bool = False,
    stop_if_unstable: bool = False,
) -> Result:
    """Run a network over a source of any length, with a few blocks of it in memory.

    The network advances block by block and carries its state from one block to the next, with what is under way if it has
    delays. Meanwhile a thread reads the next block, and another thread writes the block before. The spikes are those of one
    call over the whole input.

    A run into a zarr group that is killed loses at most three blocks: two that are computed and one that is written. Call it
    again with the same arguments and ``resume=True``: it goes on from the last finished block, and the result is the same,
    bit for bit. A script may always pass ``resume=True``: it begins a run that does not exist yet, returns a finished one,
    and continues one whose source has become longer. A resumed run reads its old input again and refuses
    another one. It does not have to read a :class:`PoissonSource` again, which is known by its arguments. Only one process
    at a time writes to a path. docs/reliability.md says what is promised, and what it costs.

    Args:
        network: :class:`CobaLIF` (the source gives the net input in uS) or :class:`CobaLIFRecurrent`, which may be wrapped
            by ``torch.compile`` or ``DistributedDataParallel``. Its ``record_states`` and ``spike_dtype`` have no effect
            here. It runs on the device of its parameters.
        source: input ``[T, *shape]``, for a recurrent network ``[T, *batch, I]`` (``torch.zeros(T, 0)`` for no input): an
            array, a :class:`PoissonSource`, or an iterable of chunks, see :func:`stream_blocks`. When a run is resumed, an
            iterable is read from its beginning.
        sink: where the result is kept: None for memory, a path that ends in ``.zarr`` or ``.npz``, or a sink.
        state: initial state, None to start at rest. Where a spike is under way for several steps, ``z`` and ``history`` must
            be spikes, 0 or 1.
        block_steps: how many steps a block has, rounded up to a multiple of 32 and of ``record.every``. None for as many as
            take about 64 MiB, at most 65,536. Input that unconnected neurons can read where it is does not count: a tensor
            or a numpy array in memory, unless its numbers have to be converted or inputs are recorded.
        record: what to keep; None for the spikes alone.
        progress: whether to show a bar with steps per second and the time left, on a terminal and if the package rich is
            installed; or a function that takes the number of finished steps. It is called about once a second.
        resume: whether to continue a run that was interrupted.
        stop_if_unstable: whether to raise, instead of to warn, where conductances become so large that the Euler step is
            unstable. Looked at about once a second.

    Returns:
        The result, as :func:`coba_triton.open_result` gives it.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes do not fit, a parameter, weight or initial state is not finite, a file is damaged or something
            else, or the run to be resumed was begun with another configuration or another input.
        FileExistsError: if the sink's path exists and neither ``resume`` nor the sink's ``overwrite`` is set.
        BlockingIOError: if another run is writing to the sink's path.
        FloatingPointError: if the state stops being finite, or if the Euler step becomes unstable and ``stop_if_unstable``
            is set; the message names the cause. Finished blocks are kept.
        OSError: if the sink cannot be written to. Finished steps are kept.

    Example:
        >>> source = PoissonSource(300.0, steps=10_000, shape=(100,), dt=0.1, weight=0.5)  # half of the leak conductance
        >>> result = simulate(CobaLIF(dt=0.1), source)
        >>> times, neurons = result.events()
    """
    if not callable(progress):
        validation.check_flag(progress, "progress")
    validation.check_flag(resume, "resume")
    validation.check_flag(stop_if_unstable, "stop_if_unstable")
    run = BlockRun(network, source, state, Record() if record is None else record, block_steps, stop_if_unstable)
    sink = open_sink(sink)
    with sink.held():
        go_on(run, sink, resume, progress)
        return Result(*sink.result(), path=sink.path)


def go_on(run: BlockRun, sink: Sink, resume: bool, progress: bool | Callable[[int], None]) -> None:
    """Simulate the blocks that the sink does not have yet, and give them to it."""
    begun = sink.begin(run.header, resume)
    block_steps, steps = run.header.block_steps, run.header.steps
    if steps is not None and steps < max(begun.planned or 0, begun.steps):
        raise ValueError(
            f"{sink.path} was begun with another configuration: source.steps was {begun.planned or begun.steps} and is "
            f"{steps}; pass the source it was begun with or a longer one, or another path"
        )
    with closing(run.read_together(_new_blocks(run, sink, begun))) as blocks:
        first = next(blocks, None)
        if first is None:  # the sink has all blocks
            sink.end(begun.steps, finished=True)
            return
        start = begun.steps // block_steps * block_steps
        state = sink.go_on(start // block_steps, steps)
        if state is not None:
            run.load(state)
        with (
            _progress(progress, steps, start) as show,
            ThreadPoolExecutor(1, "coba_triton sink") as thread,
            run.threads(),
        ):
            commits, running = _Commits(sink, thread, start, show), deque[_Running]()
            run.show = show
            try:
                for x, input_sum in itertools.chain([first], blocks):
                    running.append(run.begin(x, start, input_sum))
                    start += len(x)
                    if len(running) > run.ahead:
                        commits.put(run.finish(running.popleft()))
                while running:
                    commits.put(run.finish(running.popleft()))
                commits.wait()
            except BaseException:
                commits.drop()
                sink.end(commits.steps, finished=False)
                raise
    sink.end(commits.steps, finished=True)


def _new_blocks(run: BlockRun, sink: Sink, begun: Checkpoint) -> _Blocks:
    """First compare the finished blocks with the source, if it has to be compared; then yield the blocks that are missing.

    If the last finished block was short and the source is longer now, this block comes again.

    Yields:
        A block and the checksum of its input, which is None where the kernels compute it.

    Raises:
        ValueError: if the source differs from what was read before, or ends before it.
    """
    blocks, block_steps = run.blocks, run.header.block_steps
    checks = sink.checks_input and not blocks.described
    if begun.steps and not checks and begun.steps == blocks.steps:
        return
    start = 0 if checks else begun.steps // block_steps * block_steps
    sums, numbers = deque[int | None](), itertools.count(start // block_steps)

    def note(x: Tensor) -> None:
        """In the thread that reads: note the checksum of a block."""
        new = next(numbers) >= len(begun.inputs)
        if not checks:
            sums.append(0)
        else:
            sums.append(None if new and run.sums_up(x) else checksum_of(x))

    for x in blocks.read(start, block_steps, buffers=2 + run.ahead, note=note):
        input_sum, number = sums.popleft(), start // block_steps
        known, expected = begun.inputs[number] if number < len(begun.inputs) else (0, 0)
        if checks and 0 < known <= len(x) and expected != (input_sum if len(x) == known else checksum_of(x[:known])):
            raise ValueError(
                f"{sink.path} was begun with another input: steps {start:,} to {start + known:,} of source differ from what "
                "was read then; pass the source it was begun with, or another path"
            )
        start += len(x)
        if len(x) > known:
            yield x, input_sum
    if start < begun.steps:
        raise ValueError(
            f"source must have the {begun.steps} steps that are finished already, it ended {begun.steps - start} steps "
            "before; pass the source that the run was begun with, or a longer one"
        )


def checksum_of(x: Tensor) -> int:
    """The checksum of a block of input."""
    from ..backend.cpu.launch import row_sums

    return checksum(row_sums(x.detach().cpu()))


class _Commits:
    """Hands blocks to the sink's thread, one at a time, and counts the steps that the sink has kept."""

    def __init__(self, sink: Sink, thread: ThreadPoolExecutor, steps: int, show: Callable[[int], None]) -> None:
        self.sink, self.thread, self.steps, self.show = sink, thread, steps, show
        self._pending: tuple[int, Future[None]] | None = None

    def put(self, block: _Finished) -> None:
        """Wait until the block before this one is written, and begin to write this one."""
        self.wait()
        self._pending = block.stop, self.thread.submit(self.sink.write, *block)

    def drop(self) -> None:
        """Wait until nothing is written any more, after an error of which other processes may not know."""
        if self._pending is not None and self._pending[1].exception() is None:
            self.steps = self._pending[0]

    def wait(self) -> None:
        """Wait until everything is written."""
        if self._pending is None:
            return
        stop, writing = self._pending
        failure: Exception | None = None
        try:
            writing.result()
        except Exception as error:
            failure = error
        try:
            self.sink.settle(failure)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write steps {self.steps:,} to {stop:,} ({reason(error)}); {self.steps:,} steps are kept: "
                "make room and continue with resume=True",
                str(self.sink.path),
            ) from error
        self.steps, self._pending = stop, None
        self.show(stop)


class _Running(NamedTuple):
    """A block that is being simulated.

    Attributes:
        start: its first step.
        x: its input.
        input_sum: the checksum of the input, or the sums of its rows from which it is computed.
        before: the state before the block.
        after: the state after it.
        words: its spikes as bits.
        traces: the recorded traces, None if they are computed later or not recorded.
        jobs: the threads that simulate it.
    """

    start: int
    x: Tensor
    input_sum: Any
    before: Any
    after: Any
    words: Tensor
    traces: FeedForwardState | None
    jobs: Sequence[Future[None]]


class _Finished(NamedTuple):
    """A block that is simulated, as :meth:`coba_triton.stream.sinks.Sink.write` takes it."""

    start: int
    stop: int
    rows: dict[str, Any]
    state: Any
    input_sum: int


class BlockRun:
    """A network that advances block by block.

    The constructor checks all arguments of :func:`simulate`.

    Attributes:
        blocks: the source.
        header: what the sink is told about the run.
        state: the state after the last block that was begun.
        weights: input and recurrent weights of connected neurons, matrices or :class:`Synapses`.
        wiring: the same, if there are sparse synapses or delays.
        p: the parameters, detached from autograd.
        neurons: indices of the neurons whose traces are recorded; ``ascending[places]`` are the same.
        ahead: how many blocks are begun before the first of them is finished.
        stream: the threads that run the kernels, if blocks run ahead.
        rates: ``dt * c_m_inv``, ``g_l`` and ``conductance_based``, which with the conductances tell whether the Euler step
            is stable.
        limit: the value of ``dt * c_m_inv * (g_l + g_e + g_i)`` beyond which the next warning comes.
        part: how many steps of a block are simulated at once, so that it takes about half a second.
        show: told the number of finished steps after each part of a block but the last.
    """

    def __init__(
        self,
        network: Any,
        source: Any,
        state: Any,
        record: Record,
        block_steps: int | None,
        stop_if_unstable: bool = False,
    ) -> None:
        network = _unwrapped(network)
        if not isinstance(network, CobaLIF | CobaLIFRecurrent):
            raise TypeError(
                f"network must be a CobaLIF or a CobaLIFRecurrent, got {type(network).__name__}; give a cell's parameters "
                "and weights to one of them"
            )
        if isinstance(source, PoissonSource | EventSource) and source.dt != network.dt:
            raise ValueError(
                f"source must have the network's time step, dt={network.dt:g} ms, got dt={source.dt:g} ms; make the source "
                f"with dt={network.dt:g}, or the network with dt={source.dt:g}"
            )
        block_steps = validation.check_block_steps(block_steps)
        _check_record(record)
        self.network = cast(Any, network)  # `recurrent` says which of the two classes it is
        self.record = record
        self.device: torch.device = self.network.v_thresh.device
        self.recurrent = isinstance(network, CobaLIFRecurrent)
        self.blocks = Blocks(source, self.device)
        first = self._own_input(self.blocks.first).to(self.device)
        channels = first.shape[1:]
        driven = not self.recurrent or self.network.input_size
        if not (channels if driven else channels[:-1]).numel():
            raise ValueError(
                f"a step of source must have at least one number, got shape {list(channels)}; leave out axes of size 0"
            )
        self.wiring: Wiring | None = None
        with torch.no_grad():
            weights = [w.detach() if isinstance(w, Tensor) else w.with_weights(w.weights.detach()) for w in self._weights()]
            delay = getattr(self.network, "delay", None)
            self.digests = dict(zip(("input", "recurrent"), map(self._digest_of, weights), strict=False))
            if delay is not None:
                self.digests["delay"] = digest(delay) if isinstance(delay, Tensor) else float(delay)
            if self.recurrent and is_sparse(weights[0], weights[1], delay):
                # matrices become records once here, and not for every block
                self.wiring = self._connect(first[:0], weights, delay)
                self.weights: Any = self.wiring[:2]
            else:  # the kernels read rows of the transposed weights
                self.weights = tuple(w.t().contiguous().t() for w in weights)
            p = self.network.p if self.recurrent else self.network._parameters_for(first, 1)
            detached: Any = [value.detach() if isinstance(value, Tensor) else value for value in p]
            self.whole_p: Any = CobaLIFParameters(*detached)
            self.p: Any = CobaLIFParameters(*map(self._own_part, detached))
            self._check_numbers()
            self.state = self._initial_state(first[:0], state)
            if state is not None:
                validation.check_numbers({f"state.{name}": field for name, field in self.state._asdict().items()})
                _check_spikes(self.state)
        self.shape = self.state.v.shape
        self.whole_shape = self._whole_shape()
        cells = self.whole_shape.numel()
        self.recorded = validation.check_neurons(record.neurons, cells, "record.neurons")
        self.neurons = torch.as_tensor(self._own_cells(self.recorded), device=self.device)
        self.every = validation.check_int(record.every, "record.every")
        if (least := math.lcm(WORD_BITS, self.every)) > MAX_BLOCK_STEPS:
            raise ValueError(
                f"record.every must have a common multiple with {WORD_BITS} of at most {MAX_BLOCK_STEPS:,}, got "
                f"{self.every} with {least:,}; take a number with more factors of 2"
            )
        populations = {
            name: validation.check_neurons(members, cells, f"record.populations[{name!r}]")
            for name, members in record.populations.items()
        }
        self.populations = {name: self._own_cells(members) for name, members in populations.items()}
        for name in record.variables:
            if not validation.is_one_of(name, State._fields):
                raise ValueError(f"record.variables must be among 'v', 'g_e' and 'g_i', got {name!r:.50}")
        self.backend = choose_backend(self.network.backend, self.device)
        self.stream: ForwardStream | None = None
        self.ahead = 1 if self.backend == "cpu" and not self.recurrent else 0
        if len(self.neurons) and not self.recurrent:
            self.chosen = self._chosen_parameters()
        self.sparse: SparseNetwork | None = None
        self.ring: Tensor | None = None  # sums under way, made of the state when they are needed
        self.since = 0  # steps since they were made, or as many less as have gone round the ring
        if self.recurrent and self.backend != "reference":
            if self.wiring is None:
                self.connected = self._connected_network()
            else:
                self.sparse = self._sparse_network(self.wiring)
            order = self.neurons.argsort()
            self.ascending, self.places = self.neurons[order], order.argsort()
        if record.inputs and self.recurrent:
            self.mean_weights = self._mean_weights(self.weights[0])
        rates = self.network.dt * self.p.c_m_inv, self.p.g_l, self.p.conductance_based
        self.rates = [torch.as_tensor(rate).cpu().numpy() for rate in rates]
        self.limit = _next_limit(np.max(self.rates[0] * self.rates[1]))  # _check_numbers has warned of the state at rest
        self.fires_always = False
        self.stop_if_unstable = stop_if_unstable
        self.part = self._least(self._first_part())
        self.show: Callable[[int], None] = lambda done: None
        self.header = self._header(state, block_steps, populations)

    # What a process that has a part of the neurons does in another way; see :mod:`coba_triton.stream.ranks`.

    def _own_input(self, x: Tensor) -> Tensor:
        """What this process reads of some steps of the source."""
        return x

    def _own_part(self, values: Any) -> Any:
        """The part of a parameter or of a field of a state for the neurons of this process."""
        return values

    def _own_cells(self, cells: Any) -> Any:
        """The numbers within this process of those among some neurons that it has."""
        return cells

    def _whole_shape(self) -> torch.Size:
        """The axes of all neurons."""
        return torch.Size(self.shape)

    def _whole_state(self) -> Tensor:
        """The state of all neurons, packed."""
        return pack_state(self.state)

    def _digest_of(self, weights: Any) -> Any:
        """What the result keeps of weights, to know them again."""
        return sums_of(weights) if isinstance(weights, Synapses) else digest(weights)

    def _greatest(self, number: float) -> float:
        """The greatest of such numbers of all processes."""
        return number

    def _least(self, number: int) -> int:
        """The least of such numbers of all processes."""
        return number

    def _sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes."""
        return numbers

    def _mean_weights(self, weights: Any) -> list[Tensor]:
        """What a spike of each source adds to the excitatory and the inhibitory conductances, as means over the neurons."""
        dtype = weights.weights.dtype if isinstance(weights, Synapses) else weights.dtype
        return list((self._sum(_weight_sums(weights)) / self.whole_shape[-1]).to(dtype))

    def _connect(self, x: Tensor, weights: Sequence[Any], delay: Any) -> Wiring:
        """The sparse synapses onto the neurons of this process."""
        return connect(x, weights[0], weights[1], delay, self.network.dt)

    def _initial_state(self, x: Tensor, state: Any) -> Any:
        """The state before the first step, of an input of no steps."""
        return self._integrate(x, state, False)[1]

    def _weights(self) -> Sequence[Any]:
        """Input and recurrent weights of connected neurons."""
        return self.network._weights() if self.recurrent else ()

    def _check_numbers(self) -> None:
        """Refuse numbers that are not finite, and warn of parameters for which the Euler step is too large."""
        numbers = numbers_of(self.p)
        weights = [w.weights if isinstance(w, Synapses) else w for w in self.weights]
        validation.check_numbers(numbers | dict(zip(("input_weights", "recurrent_weights"), weights, strict=False)))
        single = {name: v.item() for name, v in numbers.items() if isinstance(v, Tensor) and not v.dim()}
        validation.warn_if_unstable(self.p._replace(**single), self.network.dt)

    def _chosen_parameters(self) -> CobaLIFParameters:
        """The parameters of the recorded neurons."""

        def choose(value: Any) -> Any:
            each = isinstance(value, Tensor) and value.dim() > 0
            return value.expand(self.shape).reshape(-1)[self.neurons] if each else value

        return CobaLIFParameters(*map(choose, self.p))

    def _connected_network(self) -> Network:
        """A recurrent network in the form that the backend's kernels take."""
        dtype = self.state.v.dtype
        constants = constants_table(self.p, self.network.dt, dtype, self.device, self.shape)
        input_weights, recurrent_weights = (w.to(dtype) for w in self.weights)
        weights = Weights(input_weights, recurrent_weights, constants)
        uses = (self.blocks.steps or LONG) * self.shape[:-1].numel()
        return Network.of(weights, self.network.order == "jump_first", launcher(self.backend), uses=uses)

    def _sparse_network(self, wiring: Wiring) -> SparseNetwork:
        """The same for sparse synapses and delays."""
        constants = constants_table(self.p, self.network.dt, self.state.v.dtype, self.device, self.shape)
        to = connections(wiring, constants, self.network.dt)
        jump_first = self.network.order == "jump_first"
        history = getattr(self.state, "history", self.state.z.unsqueeze(0))
        return SparseNetwork.of(to, history, jump_first, launcher(self.backend))

    def _header(self, state: Any, block_steps: int | None, populations: Mapping[str, Any]) -> Header:
        """What the sink is told about the run, of all neurons."""
        cells, record, traced = self.whole_shape.numel(), self.record, len(self.recorded)
        if block_steps is None:
            first, itemsize = self.blocks.first, self.state.v.element_size()
            held = 0 if self._reads_in_place() else first[:1].numel() * first.element_size()
            step = held + cells // 8 + 3 * itemsize * traced
            block_steps = min(BLOCK_BYTES // max(step, 1), MAX_BLOCK_STEPS)
        whole = math.lcm(WORD_BITS, self.every)  # so many steps fill whole rows of every array
        numbers = numbers_of(self.whole_p)
        arrays = {name: value.cpu().numpy() for name, value in numbers.items() if isinstance(value, Tensor) and value.dim()}
        config: dict[str, Any] = {
            "network": type(self.network).__name__,
            "neurons": list(self.whole_shape),
            "dt_ms": self.network.dt,
            "order": self.network.order,
            "backend": self.backend,
            "device": self.device.type,
            "state_dtype": str(self.state.v.dtype).removeprefix("torch."),
            "parameters": {name: digest(value) if name in arrays else float(value) for name, value in numbers.items()},
            "weights": self.digests,
            "source": self.blocks.describe(),
            "initial_state": None if state is None else digest(self._whole_state()),
            "record": {
                "spikes": record.spikes,
                "variables": list(record.variables),
                "neurons": self.recorded.tolist(),
                "every": self.every,
                "populations": {name: digest(torch.from_numpy(members)) for name, members in populations.items()},
                "inputs": record.inputs,
            },
            "block_steps": max(-(-block_steps // whole), 1) * whole,
        }
        if is_refractory(self.p, self.state):
            config["fields"] = len(self.state) - isinstance(self.state, CobaLIFDelayState)
        else:  # as in the runs of versions without a refractory period, which can be resumed
            del config["parameters"]["refractory"]
        if not isinstance(self.p.conductance_based, Tensor) and self.p.conductance_based == 1:  # likewise
            del config["parameters"]["conductance_based"]
        if self.wiring is not None and self.wiring.longest > 1:
            config["longest_delay"] = self.wiring.longest
        arrays |= {"recorded": np.asarray(self.recorded)} if traced else {}
        arrays |= {f"population_{number}": members for number, members in enumerate(populations.values())}
        return Header(config, columns_of(config), arrays, self.blocks.steps, config["block_steps"], versions())

    def _reads_in_place(self) -> bool:
        """Whether the kernels read a block of the input where it is, without a copy or a conversion."""
        source, first = self.blocks.source, self.blocks.first
        if self.recurrent or self.record.inputs or self.backend == "reference":
            return False
        as_it_is = flat_input(first, self.shape, self.state.v.dtype).data_ptr() == first.data_ptr()
        return as_it_is and isinstance(source, Tensor) and source.device == self.device

    def read_together(self, blocks: _Blocks) -> _Blocks:
        """The blocks of the input, each of which all processes have read before one goes on with it."""
        return blocks

    def sums_up(self, x: Tensor) -> bool:
        """Whether the kernels compute the checksum of a block: they can if they read its numbers as they are."""
        plain = x.dtype == self.state.v.dtype == torch.float32 and x.is_contiguous()
        return bool(self.ahead) and plain and x[:1].numel() == self.shape.numel()

    def load(self, state: Any) -> None:
        """Go on from a checkpoint."""
        longest = 1 if self.wiring is None else self.wiring.longest
        self.state = unpack_state(torch.from_numpy(state).to(self.device), self.recurrent, longest)
        self.ring = None

    def _integrate(self, x: Tensor, state: Any, record_states: bool, p: Any = None) -> tuple[Tensor, Any]:
        options: dict[str, Any] = {
            "order": self.network.order,
            "backend": self.network.backend,
            "record_states": record_states,
            "spike_dtype": "bits",
        }
        if self.recurrent:
            options["block_steps"] = self.network.block_steps
            input_weights, recurrent_weights = self.weights
            return coba_lif_integral(x, state, input_weights, recurrent_weights, self.p, self.network.dt, **options)
        return coba_lif_feed_forward_integral(x, state, p or self.p, self.network.dt, **options)

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Within the block, keep threads for the kernels, if blocks run ahead."""
        if not self.ahead:
            yield
            return
        from ..backend.cpu.launch import ForwardStream

        dtype = self.state.v.dtype
        constants = constants_table(self.p, self.network.dt, dtype, self.device, self.shape)
        state = torch.stack(list(self.state)).reshape(len(self.state), -1)
        with closing(ForwardStream(constants, self.network.order == "jump_first", state, self.header.block_steps)) as stream:
            self.stream = stream
            yield

    @torch.no_grad()
    def begin(self, x: Tensor, start: int, input_sum: Any = 0) -> _Running:
        """Simulate a block of input that begins with step ``start``, or let threads simulate it.

        ``input_sum`` is the checksum of the input; None lets the kernels compute it.
        """
        before, traces = self.state, None
        jobs: Sequence[Future[None]] = ()
        if self.stream is not None:
            words = torch.empty(word_count(len(x)), *self.shape, dtype=torch.int32)
            sums = None
            if input_sum is None:
                from ..backend.cpu.launch import lanes

                input_sum = sums = lanes(self.shape.numel())
            flat = flat_input(x, self.shape, before.v.dtype)
            state, jobs = self.stream.submit(flat, words.view(len(words), -1), sums)
            self.state = feed_forward_state(*state.reshape(-1, *self.shape))
        else:
            words, traces = self._in_parts(x, start)
        return _Running(start, x, input_sum, before, self.state, words, traces, jobs)

    @torch.no_grad()
    def finish(self, running: _Running) -> _Finished:
        """Wait for a block, check its state, and take from it what is recorded."""
        start, x, input_sum, before, after, words, traces, jobs = running
        for job in jobs:
            job.result()
        stop = start + len(x)
        state = pack_state(after).cpu().numpy()
        self._check(state, x, start, stop)
        if traces is None and len(self.neurons):
            traces = self._chosen_traces(x, before)
        on_cpu = words.cpu().numpy()
        self._warn_of_constant_spikes(on_cpu, start, stop)
        rows: dict[str, Any] = {"spikes": on_cpu} if self.record.spikes else {}
        if traces is not None:
            kept = slice(self.every - 1, None, self.every)  # the first step of a block is a multiple of `every`
            rows |= {name: getattr(traces, name)[kept].cpu().numpy() for name in self.record.variables}
        if self.populations:
            rows["counts"] = self._count(on_cpu, len(x))
        if self.record.inputs:
            rows["input_e"], rows["input_i"] = self._mean_inputs(x)
        return _Finished(start, stop, rows, state, input_sum if isinstance(input_sum, int) else checksum(input_sum))

    def _in_parts(self, x: Tensor, start: int) -> tuple[Tensor, FeedForwardState | None]:
        """Simulate a block in parts of about half a second. Look at the state, and show how far it is, between them."""
        words: list[Tensor] = []
        traces: list[FeedForwardState | None] = []
        done = 0
        while done < len(x) or not words:
            part, began = x[done : done + self.part], time.perf_counter()
            spikes, kept = self._advance(part)
            words.append(spikes)
            traces.append(kept)
            done += len(part)
            if done < len(x):
                self._check(pack_state(self.state).cpu().numpy(), part, start + done - len(part), start + done)
                self.show(start + done)
            seconds = self._greatest(time.perf_counter() - began)
            if seconds < 0.25 and len(part) == self.part < MAX_BLOCK_STEPS:
                self.part *= 2
            elif seconds > 1 and self.part > WORD_BITS:
                self.part //= 2
        if len(words) == 1:
            return words[0], traces[0]
        fields = [torch.cat(rows) for rows in zip(*(kept for kept in traces if kept is not None), strict=True)]
        return torch.cat(words), feed_forward_state(*fields) if fields else None

    def _first_part(self) -> int:
        """A power of two that takes less than a second where all neurons fire; how long a part takes is known later."""
        if not self.recurrent:
            work = 16 * self.shape.numel()
        else:
            synapses = self.shape[-1] ** 2 if self.wiring is None else self.wiring.recurrent.count
            work = self.shape[:-1].numel() * (synapses + self.shape[-1])
        return int(
            2 ** min(max(int(math.log2(PART_WORK / work)), WORD_BITS.bit_length() - 1), MAX_BLOCK_STEPS.bit_length() - 1)
        )

    def _advance(self, x: Tensor) -> tuple[Tensor, FeedForwardState | None]:
        """Simulate some steps; returns their spikes as bits, and the traces, if they come with them."""
        if self.sparse is not None:
            return self._connected_sparsely(self.sparse, x)
        if self.recurrent and self.backend != "reference":
            return self._connected(x)
        if self.recurrent and len(self.neurons):
            return self._with_all_states(x)
        words, self.state = self._integrate(x, self.state, False)
        return words, None

    def _connected(self, x: Tensor) -> tuple[Tensor, FeedForwardState | None]:
        """Simulate a block of connected neurons, and keep the traces of those that are recorded."""
        z, *others = self.state
        steps, rows, cells = len(x), (self.shape[:-1].numel(), self.shape[-1]), self.shape.numel()
        words = torch.empty(word_count(steps), *rows, dtype=torch.int32, device=self.device)
        traces = z.new_empty(len(others), steps, len(self.ascending)) if len(self.ascending) else None
        block_steps = time_blocks.choose_block_steps(self.network.block_steps, steps, cells, z, False)
        z, state = time_blocks.forward(
            self.connected,
            kernel_input(x, z.dtype).reshape(steps, rows[0], x.shape[-1]),
            z.reshape(rows),
            torch.stack(others).reshape(len(others), *rows),
            Outputs(words=words, states=traces),
            block_steps,
            "auto",
            None if traces is None else self.ascending,
        )
        self.state = recurrent_state(z.reshape(self.shape), *state.reshape(-1, *self.shape))
        kept = None if traces is None else feed_forward_state(*traces[..., self.places])
        return words.reshape(len(words), *self.shape), kept

    def _connected_sparsely(self, net: SparseNetwork, x: Tensor) -> tuple[Tensor, FeedForwardState | None]:
        """The same for sparse synapses and delays. The sums under way go on from block to block."""
        z, v, *others = self.state
        history = z.unsqueeze(0)
        if isinstance(self.state, CobaLIFDelayState):
            *others, history = others
        fields = [v, *others]
        steps, rows, cells = len(x), (self.shape[:-1].numel(), self.shape[-1]), self.shape.numel()
        history = history.reshape(len(history), *rows).contiguous()
        if self.ring is None:
            self.ring, self.since = sparse_blocks.ring_of(net, history), 0
        words = torch.empty(word_count(steps), *rows, dtype=torch.int32, device=self.device)
        traces = z.new_empty(len(fields), steps, len(self.ascending)) if len(self.ascending) else None
        state = sparse_blocks.forward(
            net,
            kernel_input(x, z.dtype).reshape(steps, rows[0], x.shape[-1]),
            self.ring,
            torch.stack(fields).reshape(len(fields), *rows),
            Outputs(words=words, states=traces),
            time_blocks.choose_block_steps(self.network.block_steps, steps, cells, z, False),
            self.since,
            None if traces is None else self.ascending,
        )
        self.since = (self.since + steps) % len(history)
        history = sparse_blocks.last_spikes(history, words, steps).reshape(len(history), *self.shape)
        past = (history,) if len(history) > 1 else ()
        self.state = recurrent_state(history[-1], *state.reshape(-1, *self.shape), *past)
        kept = None if traces is None else feed_forward_state(*traces[..., self.places])
        return words.reshape(len(words), *self.shape), kept

    def _with_all_states(self, x: Tensor) -> tuple[Tensor, FeedForwardState]:
        """The same for the reference, which records the states of all neurons.

        It runs over parts of the block, so that these states take little memory.
        """
        step = len(self.state) * self.shape.numel() * self.state.v.element_size()
        words, traces = [], []
        for part in x.split(word_count(max(STATE_BYTES // step, 1)) * WORD_BITS):
            spikes, states = self._integrate(part, self.state, True)
            past: list[Any] = []
            if isinstance(states, CobaLIFDelayState):
                *states, history = states
                past = [history]
            self.state = type(self.state)(*(field[-1].clone() for field in states), *past)
            words.append(spikes)
            traces.append([field.flatten(1)[:, self.neurons] for field in states[1:]])
        return torch.cat(words), feed_forward_state(*map(torch.cat, zip(*traces, strict=True)))

    def _chosen_traces(self, x: Tensor, before: Any) -> FeedForwardState:
        """Traces of unconnected neurons: those that are recorded run a second time, without the others."""
        chosen = x.expand(len(x), *self.shape).reshape(len(x), self.shape.numel())[:, self.neurons]
        state = feed_forward_state(*(field.reshape(-1)[self.neurons] for field in before))
        return self._integrate(chosen, state, True, self.chosen)[1]  # type: ignore[no-any-return]  # states by record_states

    def _count(self, words: Any, steps: int) -> Any:
        from .loops import count_kernel

        counts = np.empty((len(self.populations), WORD_BITS * len(words)), np.int32)
        for row, members in zip(counts, self.populations.values(), strict=True):
            count_kernel(words.reshape(len(words), -1), members, row)
        return counts[:, :steps].T

    def _mean_inputs(self, x: Tensor) -> tuple[Any, Any]:
        rows = x.reshape(len(x), -1)
        if self.recurrent:
            rows = x.reshape(len(x), self.whole_shape[:-1].numel(), x.shape[-1]).to(self.mean_weights[0].dtype)
            means = [(rows @ weights).mean(1) for weights in self.mean_weights]
        else:
            rows = rows.to(self.state.v.dtype)
            means = [rows.relu().mean(1), (-rows).relu().mean(1)]
        return means[0].cpu().numpy(), means[1].cpu().numpy()

    def _check(self, state: Any, x: Tensor, start: int, stop: int) -> None:
        """Refuse a state that is not finite. Warn once of conductances that make the Euler step unstable."""
        if not np.isfinite(state).all():
            for step, *channel in (~torch.isfinite(x)).nonzero()[:1].tolist():
                raise FloatingPointError(
                    f"the state is no longer finite after step {stop}, as the source has {x[step, *channel].item()} in step "
                    f"{start + step}, channel {channel}; correct it there"
                )
            raise FloatingPointError(
                f"the state is no longer finite after step {stop}, as the Euler step is unstable at these conductances "
                "(input, weights, initial state and parameters are finite); make dt, the weights or the input smaller"
            )
        rate, g_l, coupling = self.rates
        g_e = self.state._fields.index("g_e")
        factor = float(np.max(rate * (g_l + coupling * (state[g_e] + state[g_e + 1]))))
        if factor > self.limit:
            self.limit = _next_limit(factor)
            unstable = validation.instability(factor)
            wild = ", and the spikes mean nothing" if factor > 2 else ""
            message = (
                f"{unstable}: dt * c_m_inv * (g_l + g_e + g_i) has reached {factor:.3g} by step {stop}, "
                f"more than {2 if factor > 2 else 1}{wild}; make dt or the weights smaller"
            )
            if factor > 2 and self.stop_if_unstable:
                raise FloatingPointError(f"{message}, or go on with stop_if_unstable=False")
            warn(message)

    def _warn_of_constant_spikes(self, words: Any, start: int, stop: int) -> None:
        """Warn once of neurons that fire in every step. Only a few of a block's words ``[W, *shape]`` are looked at."""
        whole = words[: (stop - start) // WORD_BITS]
        always = int((whole[:: max(len(whole) // 8, 1)] == -1).any(0).sum())
        if always and not self.fires_always:
            self.fires_always = True
            units = "uS (1 nS is 0.001 uS)" if self.rates[2].any() else "nA (1 pA is 0.001 nA)"
            warn(
                f"{always} of {self.shape.numel()} neurons fire in every step ({WORD_BITS} in a row by step {stop}): the "
                f"input or the weights, which are in {units}, are too strong, or v_thresh is too low; make them smaller, or "
                "raise v_thresh"
            )


def _check_record(record: Any) -> None:
    """Refuse a record whose fields are of wrong types."""
    if not isinstance(record, Record):
        raise TypeError(f"record must be a Record or None, got {type(record).__name__}")
    for name, kinds in (("populations", Mapping), ("variables", Sequence)):
        if not isinstance(value := getattr(record, name), kinds) or isinstance(value, str):
            raise TypeError(f"record.{name} must be a {kinds.__name__.lower()}, got {type(value).__name__}")
    for name in record.populations:
        if not isinstance(name, str):
            raise TypeError(f"record.populations must have names, got {name!r:.50}; write it in quotes")
    for name in ("spikes", "inputs"):
        validation.check_flag(getattr(record, name), f"record.{name}")


def _check_spikes(state: Any) -> None:
    """Refuse an initial state with delays in which other numbers than spikes are under way: results keep bits of them."""
    if not isinstance(state, CobaLIFDelayState):
        return
    history: Any = state.history
    for wrong in history[(history != 0) & (history != 1)][:1].tolist():
        raise ValueError(
            f"state.z and state.history must be spikes, 0 or 1, where spikes take several steps, got {wrong:g}; round them, "
            "or give 0 for none"
        )


def sums_of(synapses: Synapses) -> dict[str, int]:
    """What is kept of synapses to know them again: their number, and sums modulo 2**64 of a hash of each one.

    The sums have no order, and those of several parts of a network add up to those of the network. ``connections`` is of
    sources and targets, and the others are of these with the weight or with the delay.
    """
    sums = {name: np.zeros((), np.uint64) for name in ("connections", "weights", "delays")}
    numbers = torch.arange(synapses.sources, device=synapses.indptr.device).unsqueeze(1)
    delays = torch.full((1,), -1.0) if synapses.delays is None else synapses.delays

    def hashed(hashes: Any, values: Tensor) -> Any:
        return _mixed(hashes ^ values.detach().double().cpu().numpy().view(np.uint64))

    for begin in range(0, synapses.count, PART):
        here = begin, min(begin + PART, synapses.count)
        pairs = hashed(np.uint64(0), synapses.targets[slice(*here)])
        pairs = hashed(pairs, weights_of(numbers, synapses.indptr, *here))
        sums["connections"] += pairs.sum(dtype=np.uint64)
        for name, values in (("weights", synapses.weights), ("delays", delays)):
            sums[name] += hashed(pairs, weights_of(values, synapses.indptr, *here)).sum(dtype=np.uint64)
    return {"synapses": synapses.count} | {name: int(total) for name, total in sums.items()}


def _mixed(numbers: Any) -> Any:
    """A hash of 64 bits of each number, the finalizer of SplitMix64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))


def _weight_sums(weights: Any) -> Tensor:
    """The sum of the excitatory and that of the inhibitory weights of each source, ``[2, I]`` in float64."""
    if not isinstance(weights, Synapses):
        return torch.stack([part.double().sum(0) for part in (weights.relu(), (-weights).relu())])
    sources = weights.source_of()
    each = weights.weights[sources, 0] if weights.weights.dim() == 2 else weights.weights.expand(weights.count)
    sums = each.new_zeros(2, weights.sources, dtype=torch.float64)
    for total, part in zip(sums, (each.relu(), (-each).relu()), strict=True):
        total.index_add_(0, sources, part.double())
    return sums


def _next_limit(factor: float) -> float:
    """The next value of ``dt * c_m_inv * (g_l + g_e + g_i)`` that is worth a warning, after it was ``factor``."""
    return 1.0 if factor <= 1 else 2.0 if factor <= 2 else np.inf


def _unwrapped(network: Any) -> Any:
    """The module itself, without what ``torch.compile``, data parallelism or averaging has wrapped around it."""
    wrappers: tuple[Any, ...] = (DistributedDataParallel, DataParallel, AveragedModel)
    while (inner := getattr(network, "_orig_mod", None)) is not None or isinstance(network, wrappers):
        network = network.module if inner is None else inner
    return network


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on, by name."""
    found = {"python": platform.python_version()}
    for package in ("coba-triton", "torch", "numpy", "triton", "zarr"):
        if installed := package_version(package):
            found[package.replace("-", "_")] = installed
    return found


@contextmanager
def _progress(progress: bool | Callable[[int], None], steps: int | None, done: int) -> Iterator[Callable[[int], None]]:
    """Show how far the run is. Yields a function that takes the number of finished steps."""
    if callable(progress):
        progress(done)
        yield progress
        return
    if not progress or importlib.util.find_spec("rich") is None:
        yield lambda done: None
        return
    from .progress import bar

    with bar(steps, done) as show:
        yield show
