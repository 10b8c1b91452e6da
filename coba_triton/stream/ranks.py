"""A long run that several processes share: each simulates some of the neurons, and all write one result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..backend.choose import launcher
from ..distributed.ranks import Group, LostRankError, Ranks
from ..distributed.sparse import SparseRows
from ..functional import connections
from ..neuron.records import recurrent_state
from ..ops import validation
from ..ops.call import SparseNetwork, is_binary
from ..ops.synapses import Synapses
from ..ops.wiring import Wiring
from .block_run import BlockRun
from .record import Record
from .results import Result
from .simulation import go_on
from .sinks import Checkpoint, Header, Sink, ZarrSink, open_sink
from .states import pack_state, unpack_state
from .store import Array, difference_of

T = TypeVar("T")
Divide = Literal["neurons", "rows"]


def simulate(
    network: Any,
    source: Any,
    *,
    sink: Sink | str | Path,
    divide: Divide,
    group: Group = None,
    state: Any = None,
    block_steps: int | None = None,
    record: Record | None = None,
    progress: bool | Callable[[int], None] = True,
    resume: bool = False,
    stop_if_unstable: bool = False,
) -> Result:
    """:func:`coba_triton.simulate`, shared by the processes (ranks) of a group, which call it together.

    The result has the bits of one process. All ranks write it, each the chunks of some blocks, into one zarr group. A run
    that was interrupted goes on with ``resume=True``, with any number of ranks, also in one process without this function.

    An error of one rank, in its input, its state or what it writes, stops all of them, and each says what it was. If a rank
    dies, the others raise within seconds, or after the time limit of the group if they do not notice. What was finished is
    kept.

    Args:
        network: as for :func:`coba_triton.simulate`, the same on all ranks. Where ranks share the neurons of a recurrent
            network, it has sparse synapses, and on each rank only those onto the rank's own neurons. The constructors of
            :class:`coba_triton.Synapses` make these with ``only=``, see :func:`coba_triton.distributed.owned_neurons`.
        source: the input of the whole network, the same on all ranks.
        sink: a path that ends in ``.zarr``, or a :class:`coba_triton.ZarrSink`, in a folder that all ranks see.
        divide: what a rank has: some of the ``neurons`` (along the last axis), or some ``rows`` of the batch (along the
            first axis of a step), with all neurons of the network.
        group: of processes, None for all.
        state: of all neurons.
        block_steps: as for :func:`coba_triton.simulate`.
        record: likewise, with the numbers of neurons in the whole network.
        progress: likewise; the first rank shows it.
        resume: likewise.
        stop_if_unstable: likewise.

    Returns:
        The result, on all ranks.

    Raises:
        TypeError, ValueError, OSError, FloatingPointError: as :func:`coba_triton.simulate`.
        RuntimeError: if there is no process group, or another rank has failed.

    Example:
        >>> source = PoissonSource(300.0, 10_000, (8, 100), dt=0.1, weight=0.5, seed=1)  # doctest: +SKIP
        >>> result = simulate(CobaLIF(dt=0.1), source, sink="run.zarr", divide="rows")  # doctest: +SKIP
    """
    ranks = Ranks(group)
    try:
        if not callable(progress):
            validation.check_flag(progress, "progress")
        validation.check_flag(resume, "resume")
        validation.check_flag(stop_if_unstable, "stop_if_unstable")
        if not validation.is_one_of(divide, ("neurons", "rows")):
            raise ValueError(f"divide must be 'neurons' or 'rows', got {divide!r:.50}")
        inner = open_sink(sink)
        if not isinstance(inner, ZarrSink):
            raise ValueError(
                "sink must be a path that ends in .zarr, or a ZarrSink, where several processes share a run, got "
                f"{sink!r:.200}"
            )
    except (TypeError, ValueError) as error:
        ranks.refuse(error)
    try:
        run = RanksRun(ranks, divide, network, source, state, Record() if record is None else record, block_steps,
                       stop_if_unstable)  # fmt: skip
        shared = RanksSink(inner, run)
        with shared.held():
            go_on(run, shared, resume, progress if ranks.rank == 0 else False)
            return Result(*shared.result(), path=inner.path)
    except LostRankError as error:
        raise LostRankError(f"{error} with resume=True: what is finished is kept in {inner.path}") from error


class RanksRun(BlockRun):
    """The part of a network that one process advances.

    Attributes:
        ranks: the processes.
        divide: what each of them has.
        axis: the axis of ``[*shape]`` along which the neurons are divided, counted from the last one.
        whole: blocks of input that are not finished, by their first step.
    """

    def __init__(self, ranks: Ranks, divide: Divide, network: Any, *arguments: Any) -> None:
        self.ranks, self.divide = ranks, divide
        self.rows: SparseRows | None = None
        self.whole: dict[int, Tensor] = {}
        self.axis = -1
        try:
            super().__init__(network, *arguments)
        except (ImportError, OSError, TypeError, ValueError) as error:  # a RuntimeError is one that all ranks raise
            ranks.refuse(error)
        mine = {"config": self.header.config, "versions": self.header.versions, "steps": self.header.steps}
        every = ranks.share_facts(mine)
        for rank, other in enumerate(every):
            if found := difference_of(every[0], other):
                raise ValueError(f"rank {rank} has another run than rank 0: {found}; start all ranks with the same")

    def _own_input(self, x: Tensor) -> Tensor:
        if self.divide == "neurons":
            if self.recurrent:
                return x
            self.ranks.divide(x.shape[-1])
            return x[..., self.ranks.own]
        if x.dim() < 3:
            raise ValueError(
                f"divide='rows' needs an input with a batch axis, [T, B, N] or [T, B, I], got steps of shape "
                f"{list(x.shape[1:])}; divide the neurons"
            )
        self.axis = -(x.dim() - 1)
        self.ranks.divide(x.shape[1], "row")
        return x[:, self.ranks.own]

    def _own_part(self, values: Any) -> Any:
        if not isinstance(values, Tensor) or values.dim() < -self.axis or values.shape[self.axis] == 1:
            return values
        return values.narrow(self.axis, self.ranks.own.start, self.ranks.own.stop - self.ranks.own.start)

    def _whole_shape(self) -> torch.Size:
        shape = list(self.shape)
        shape[self.axis] = self.ranks.neurons
        return torch.Size(shape)

    def _cells(self) -> int:
        cells: int = self.shape.numel() // self.shape[self.axis] * self.ranks.share
        return cells

    def _own_cells(self, cells: Any) -> Any:
        places = np.unravel_index(np.asarray(cells, np.int64), self.whole_shape)
        own = self.ranks.own
        mine = (places[self.axis] >= own.start) & (places[self.axis] < own.stop)
        shifted = [axis[mine] for axis in places]
        shifted[self.axis] = shifted[self.axis] - own.start
        return np.ravel_multi_index(shifted, tuple(self.shape)).astype(np.int64)

    def _places_of_recorded(self) -> Array:
        """Where each of the recorded neurons is among those of all ranks, one rank's after the other's."""
        places = np.unravel_index(np.asarray(self.recorded, np.int64), self.whole_shape)[self.axis]
        owners = places // self.ranks.share
        order = np.argsort(owners, kind="stable")
        return np.argsort(order)

    def _whole_state(self) -> Tensor:
        whole: Tensor = self.join(self.ranks.share_facts(pack_state(self.state).cpu()))
        return whole

    def join(self, parts: Sequence[Any]) -> Any:
        """Arrays ``[..., *shape]`` of all ranks as one."""
        if isinstance(parts[0], Tensor):
            return torch.cat(list(parts), self.axis)
        return np.concatenate(list(parts), self.axis)

    def _digest_of(self, weights: Any) -> Any:
        found = super()._digest_of(weights)
        if self.divide == "rows" or not isinstance(weights, Synapses):
            return found
        parts = self.ranks.share_facts(found)
        return {name: sum(part[name] for part in parts) % 2**64 for name in found}

    def _connect(self, x: Tensor, weights: Sequence[Any], delay: Any) -> Wiring:
        if self.divide == "rows":
            return super()._connect(x, weights, delay)
        if delay is not None:
            raise ValueError(
                "divide='neurons' needs synapses that have their delays, got a matrix and delay=; use Synapses.from_torch"
            )
        inputs, recurrent = weights
        if isinstance(inputs, Tensor) and inputs.layout is torch.strided:
            self.ranks.divide(len(inputs))
            inputs = inputs[self.ranks.own]
        self.rows = SparseRows(self.ranks, x, inputs, recurrent, self.network.dt)
        self.rows.agree()
        return self.rows.wiring

    def _initial_state(self, x: Tensor, state: Any) -> Any:
        if state is not None:
            state = type(state)(*map(self._own_part, state))
        if self.divide == "neurons" and self.recurrent:
            if self.rows is None:
                raise ValueError(
                    "divide='neurons' needs a network with sparse synapses, got matrices; make Synapses, or divide rows"
                )
            history, initial, *_ = self.rows.prepare(x, state, self.p)
            past = (history.clone(),) if self.rows.wiring.longest > 1 else ()
            return recurrent_state(history[-1].clone(), *initial.clone(), *past)
        return super()._initial_state(x, state)

    def _sparse_network(self, wiring: Wiring, constants: Tensor) -> SparseNetwork:
        if self.rows is None:
            return super()._sparse_network(wiring, constants)
        to = connections(wiring, constants, self.network.dt)
        history: Any = getattr(self.state, "history", self.state.z.unsqueeze(0))
        weights = [w.to(constants.dtype) for w in self.rows.weights]
        grids = self.rows.agree_on_grids(weights, history.device.type == "cpu" and is_binary(history))
        jump_first = self.network.order == "jump_first"
        return SparseNetwork.of(to, history, jump_first, launcher(self.backend), grids, self.ranks)

    def load(self, state: Any) -> None:
        longest = 1 if self.wiring is None else self.wiring.longest
        own = self._own_part(torch.from_numpy(state)).contiguous().to(self.device)
        self.state = unpack_state(own, self.recurrent, longest)

    def begin(self, x: Tensor, start: int, input_sum: Any = 0) -> Any:
        self.whole[start] = x
        return super().begin(self._own_input(x), start, input_sum)

    def finish(self, running: Any) -> Any:
        """The finished block, whole in the rank that writes it, and empty in the others, which send their parts."""
        self.current = self.whole.pop(running.start)
        done = super().finish(running)
        self.ranks.share_facts(None)  # whether the state of each rank is finite
        writer = done.start // self.header.block_steps % self.ranks.ranks
        parts: list[Any] | None = [None] * self.ranks.ranks if self.ranks.rank == writer else None
        with self.ranks.reached():
            dist.gather_object((done.rows, done.state), parts, group=self.ranks.group, group_dst=writer)
        if parts is None:
            return done._replace(rows={})
        # a rank has no traces if none of the recorded neurons is its own
        rows = {name: [part[name] for part, _ in parts if name in part] for name in self.header.columns}
        joined = {name: self._joined(name, every) for name, every in rows.items()}
        return done._replace(rows=joined, state=self.join([state for _, state in parts]))

    def _joined(self, name: str, parts: list[Array]) -> Array:
        """The rows of a column, from those of all ranks."""
        if name == "spikes":
            return self.join(parts)  # type: ignore[no-any-return]  # arrays, if arrays are given
        if name == "counts":
            return sum(parts[1:], parts[0])
        if name.startswith("input_"):
            return parts[0]
        return np.concatenate(parts, -1)[..., self._places_of_recorded()]

    def read_together(self, blocks: Any) -> Any:
        with contextlib.closing(blocks):
            while True:
                try:
                    block = next(blocks, None)
                except Exception as error:
                    self.ranks.refuse(error)
                # whether all have read it, and the same
                every = self.ranks.share_facts(None if block is None else (len(block[0]), block[1]))
                for rank, other in enumerate(every):
                    if other != every[0]:
                        raise ValueError(
                            f"rank {rank} has read another block of source than rank 0; give all ranks the same source, the "
                            "input of the whole network"
                        )
                if block is None:
                    return
                yield block

    def _check(self, *arguments: Any) -> None:
        try:
            super()._check(*arguments)
        except FloatingPointError as error:
            self.ranks.refuse(error)

    def _greatest(self, number: float) -> float:
        return float(max(self.ranks.share_facts(number)))

    def _least(self, number: int) -> int:
        return int(min(self.ranks.share_facts(number)))

    def _sum(self, numbers: Tensor) -> Tensor:
        if self.divide == "rows":
            return numbers
        return torch.stack(self.ranks.share_facts(numbers)).sum(0)

    def _reads_in_place(self) -> bool:
        return False

    def sums_up(self, x: Tensor) -> bool:
        return False  # the kernels read a part of the input, and its checksum is that of the whole

    def _mean_inputs(self, x: Tensor) -> tuple[Any, Any]:
        return super()._mean_inputs(self.current)


class RanksSink(Sink):
    """The zarr group that all ranks write to.

    The first rank makes it, and describes how far the run has come. Rank ``k`` modulo their number writes block ``k``. No
    rank writes the next block before this one is there.
    """

    checks_input = True

    def __init__(self, inner: ZarrSink, run: RanksRun) -> None:
        super().__init__()
        self.inner, self.run, self.ranks = inner, run, run.ranks
        self.path = inner.path

    def _by_first(self, action: Callable[[], T]) -> T:
        """Do something in the first rank; all return what it returns, or raise what it raises."""
        told: list[Any] = [None, None]
        if self.ranks.rank == 0:
            try:
                told[0] = action()
            except Exception as error:
                told[1] = error
        with self.ranks.reached():
            dist.broadcast_object_list(told, group=self.ranks.group, group_src=0)
        if told[1] is not None:
            raise told[1]
        return told[0]  # type: ignore[no-any-return]  # what the first rank's action returned

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:

            def hold() -> None:
                stack.enter_context(self.inner.held())

            self._by_first(hold)
            yield

    def begin(self, header: Header, resume: bool) -> Checkpoint:
        return self._by_first(lambda: self.inner.begin(header, resume))

    def go_on(self, blocks: int, steps: int | None) -> Array | None:
        state, run = self._by_first(lambda: (self.inner.go_on(blocks, steps), self.inner.run))
        failure: Exception | None = None
        try:
            if self.ranks.rank:
                self.inner.join(self.run.header)
                if self.inner.run != run:
                    raise ValueError(
                        f"{self.path} is another result on rank {self.ranks.rank} than on rank 0; give all ranks the same "
                        "path, in a folder that all see"
                    )
        except Exception as error:
            failure = error
        self.settle(failure)  # no rank writes before all have read
        return state

    def write(self, start: int, stop: int, block: dict[str, Array], state: Array, given: int) -> None:
        if block:  # that of another rank is empty
            self.inner.write(start, stop, block, state, given)

    def settle(self, error: Exception | None) -> None:
        for other in self.ranks.share_facts(error):
            super().settle(other)

    def end(self, steps: int, finished: bool) -> None:
        if finished:  # otherwise this rank may have failed, and the others may not know it
            self._by_first(lambda: self.inner.end(steps, finished))

    def result(self) -> tuple[dict[str, Any], Mapping[str, Any]]:
        return self.inner.result()
