"""A network that advances block by block through the input of a long run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import DataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..backend.choose import choose_backend, launcher
from ..functional import connections, flat_input
from ..modules import CobaLIF, CobaLIFRecurrent
from ..neuron.records import (
    CobaLIFDelayState,
    CobaLIFParameters,
    FeedForwardState,
    State,
    feed_forward_state,
    numbers_of,
)
from ..ops import validation
from ..ops.call import Network, SparseNetwork, Weights
from ..ops.constants import constants_table
from ..ops.spikes import WORD_BITS, word_count
from ..ops.synapses import Synapses, each_of
from ..ops.tensors import is_refractory
from ..ops.wiring import Wiring, connect, is_sparse
from .identity import sums_of, versions
from .record import Record, check_record
from .sinks import Header
from .sources import Blocks, EventSource, PoissonSource, digest
from .stability import Stability
from .states import pack_state, unpack_state
from .steppers import Dense, Functional, Sparse, Stepper
from .store import checksum, columns_of

if TYPE_CHECKING:
    from ..backend.cpu.launch import ForwardStream

BlocksOfInput = Generator[tuple[Tensor, int | None], None, None]

BLOCK_BYTES = 2**26  # a block of the default length takes this much memory
MAX_BLOCK_STEPS = 2**16
PART_WORK = 2**27  # synapses that are looked at in the first part of a block
LONG = 2**20  # steps that are assumed if a source does not say how long it is


class Running(NamedTuple):
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


class Finished(NamedTuple):
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
        neurons: indices of the neurons whose traces are recorded.
        stepper: what advances the network.
        ahead: how many blocks are begun before the first of them is finished.
        stream: the threads that run the kernels, if blocks run ahead.
        stability: what looks at its state and its spikes.
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
        check_record(record)
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
        self.stepper = self._stepper()
        if record.inputs and self.recurrent:
            self.mean_weights = self._mean_weights(self.weights[0])
        self.stability = Stability(self.p, self.network.dt, stop_if_unstable)
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

    def _cells(self) -> int:
        """Neurons of all rows, as many as any process has."""
        cells: int = self.shape.numel()
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
        return Functional(self.network, self.weights, self.p, torch.arange(0)).integrate(x, state, False)[1]

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

    def _stepper(self) -> Stepper:
        """What advances the network."""
        if not self.recurrent or self.backend == "reference":
            return Functional(self.network, self.weights, self.p, self.neurons)
        dtype = self.state.v.dtype
        constants = constants_table(self.p, self.network.dt, dtype, self.device, self.shape)
        chosen = self.neurons, bool(len(self.recorded)), self._cells(), self.network.block_steps
        if self.wiring is not None:
            return Sparse(self._sparse_network(self.wiring, constants), *chosen)
        input_weights, recurrent_weights = (w.to(dtype) for w in self.weights)
        weights = Weights(input_weights, recurrent_weights, constants)
        uses = (self.blocks.steps or LONG) * self.shape[:-1].numel()
        net = Network.of(weights, self.network.order == "jump_first", launcher(self.backend), uses=uses)
        return Dense(net, *chosen)

    def _sparse_network(self, wiring: Wiring, constants: Tensor) -> SparseNetwork:
        """A network with sparse synapses and delays, in the form that the backend's kernels take."""
        to = connections(wiring, constants, self.network.dt)
        history = getattr(self.state, "history", self.state.z.unsqueeze(0))
        return SparseNetwork.of(to, history, self.network.order == "jump_first", launcher(self.backend))

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

    def read_together(self, blocks: BlocksOfInput) -> BlocksOfInput:
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
    def begin(self, x: Tensor, start: int, input_sum: Any = 0) -> Running:
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
        return Running(start, x, input_sum, before, self.state, words, traces, jobs)

    @torch.no_grad()
    def finish(self, running: Running) -> Finished:
        """Wait for a block, check its state, and take from it what is recorded."""
        start, x, input_sum, before, after, words, traces, jobs = running
        for job in jobs:
            job.result()
        stop = start + len(x)
        state = pack_state(after).cpu().numpy()
        self._check(state, x, start, stop)
        if traces is None:
            traces = self.stepper.traces_later(x, before)
        on_cpu = words.cpu().numpy()
        self.stability.warn_of_constant_spikes(on_cpu, start, stop)
        rows: dict[str, Any] = {"spikes": on_cpu} if self.record.spikes else {}
        if traces is not None:
            kept = slice(self.every - 1, None, self.every)  # the first step of a block is a multiple of `every`
            rows |= {name: getattr(traces, name)[kept].cpu().numpy() for name in self.record.variables}
        if self.populations:
            rows["counts"] = self._count(on_cpu, len(x))
        if self.record.inputs:
            rows["input_e"], rows["input_i"] = self._mean_inputs(x)
        return Finished(start, stop, rows, state, input_sum if isinstance(input_sum, int) else checksum(input_sum))

    def _in_parts(self, x: Tensor, start: int) -> tuple[Tensor, FeedForwardState | None]:
        """Simulate a block in parts of about half a second. Look at the state, and show how far it is, between them."""
        words: list[Tensor] = []
        traces: list[FeedForwardState | None] = []
        done = 0
        while done < len(x) or not words:
            part, began = x[done : done + self.part], time.perf_counter()
            spikes, self.state, kept = self.stepper.advance(part, self.state)
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

    def _check(self, state: Any, x: Tensor, start: int, stop: int) -> None:
        """Look at the packed state after step ``stop``, before which ``x`` was the input since step ``start``."""
        self.stability.check(state, self.state._fields.index("g_e"), x, start, stop)

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


def _weight_sums(weights: Any) -> Tensor:
    """The sum of the excitatory and that of the inhibitory weights of each source, ``[2, I]`` in float64."""
    if not isinstance(weights, Synapses):
        return torch.stack([part.double().sum(0) for part in (weights.relu(), (-weights).relu())])
    sources = weights.source_of()
    each = each_of(weights.weights, sources)
    sums = each.new_zeros(2, weights.sources, dtype=torch.float64)
    for total, part in zip(sums, (each.relu(), (-each).relu()), strict=True):
        total.index_add_(0, sources, part.double())
    return sums


def _unwrapped(network: Any) -> Any:
    """The module itself, without what ``torch.compile``, data parallelism or averaging has wrapped around it."""
    wrappers: tuple[Any, ...] = (DistributedDataParallel, DataParallel, AveragedModel)
    while (inner := getattr(network, "_orig_mod", None)) is not None or isinstance(network, wrappers):
        network = network.module if inner is None else inner
    return network
