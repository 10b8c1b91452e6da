"""Long runs: a network reads a source in time blocks, and its results go to a sink."""

from __future__ import annotations

import importlib.util
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.files import reason
from ..modules import CobaLIF, CobaLIFRecurrent
from ..ops import validation
from .block_run import BlockRun, BlocksOfInput, Finished, Running
from .identity import checksum_of
from .record import Record
from .results import Result
from .sinks import Checkpoint, Sink, open_sink


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
    call over the whole input. (Matrices of weights whose sums are not exact may be rounded in another order; see
    docs/backends.md.)

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
            commits, running = _Commits(sink, thread, start, show), deque[Running]()
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


def _new_blocks(run: BlockRun, sink: Sink, begun: Checkpoint) -> BlocksOfInput:
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


class _Commits:
    """Hands blocks to the sink's thread, one at a time, and counts the steps that the sink has kept."""

    def __init__(self, sink: Sink, thread: ThreadPoolExecutor, steps: int, show: Callable[[int], None]) -> None:
        self.sink, self.thread, self.steps, self.show = sink, thread, steps, show
        self._pending: tuple[int, Future[None]] | None = None

    def put(self, block: Finished) -> None:
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
