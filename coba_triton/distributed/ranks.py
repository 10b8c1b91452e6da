"""The processes of a group, which of the neurons each owns, and what they exchange."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import validation

Group = Any  # torch.distributed.ProcessGroup, which a build of torch without torch.distributed has not


def owned_neurons(neurons: int, group: Group = None) -> slice:
    """The neurons that this rank owns: ``ceil(N / ranks)`` a rank, in order, the last ones fewer.

    That is how ``torch.chunk`` and DTensor's ``Shard(0)`` divide the rows of a matrix.

    Args:
        neurons: N of the whole network.
        group: of processes, None for all.

    Raises:
        RuntimeError: if there is no process group, or this process is not in it.
        ValueError: if a rank would own none.

    Example:
        >>> own = owned_neurons(4000)  # doctest: +SKIP
        >>> recurrent_weights = all_weights[own]  # doctest: +SKIP
    """
    neurons = validation.check_int(neurons, "neurons")
    ranks = Ranks(group)
    ranks.divide(neurons)
    return ranks.own


# So many runs of steps are tried with one exchange of spikes, and so many with two.
TRIALS = 5


class LostRankError(RuntimeError):
    """Another process of the group has died, hangs or cannot be reached."""


class Ranks:
    """The processes of a group, and which of the neurons each owns: the exchange of :mod:`coba_triton.ops.time_blocks`."""

    def __init__(self, group: Group) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "coba_triton.distributed needs a process group, and there is none; start the program with torchrun and "
                "call torch.distributed.init_process_group() first"
            )
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError("group must have this process among its ranks, and has not; call it on its own ranks alone")

    def divide(self, neurons: int, what: str = "neuron") -> None:
        """Give every rank its share of the neurons, or of something else that they have a number of."""
        self.neurons, self.share = neurons, -(-neurons // self.ranks)
        if self.share * (self.ranks - 1) >= neurons:
            raise ValueError(
                f"every rank must own a {what}, and {self.ranks} ranks of ceil({neurons} / {self.ranks}) = {self.share} "
                f"{what}s leave the last one without; use {-(-neurons // max(self.share, 1))} ranks"
            )
        bounds = [min(rank * self.share, neurons) for rank in range(self.ranks + 1)]
        self.slices = [slice(*pair) for pair in itertools.pairwise(bounds)]
        self.own = self.slices[self.rank]
        self.room = 0  # spikes for which a list has room; none: bits are sent
        self.moments: list[float] = []  # when the first runs of steps began
        self.parts = 1
        self.device = torch.device("cpu")

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Within the block, messages are exchanged; say what it means if they are not.

        Raises:
            LostRankError: if another process is gone, or does not answer within the time limit of the group.
        """
        try:
            yield
        except RuntimeError as error:
            cause = str(error).splitlines()[0][:200]
            raise LostRankError(
                f"rank {self.rank} of {self.ranks} lost another rank, which has died, hangs or cannot be reached ({cause}); "
                "start all ranks again"
            ) from error

    def gather(self, values: Tensor) -> Tensor:
        """``[..., n]`` of every rank to ``[..., N]`` in all of them."""
        padded = values.new_zeros(*values.shape[:-1], self.share)
        padded[..., : values.shape[-1]] = values
        return self._join(self._swap([padded] * self.ranks))

    def gather_spikes(self, spikes: Tensor) -> Tensor:
        """:meth:`gather` of 0 and 1, eight neurons in a byte: ``[..., n]`` to uint8 ``[..., N]``."""
        return self._join(self._start_bits(spikes.to(torch.uint8))())

    def windows(self) -> int:
        """See :meth:`coba_triton.ops.call.Exchange.windows`.

        More messages cost time, and save that for which neurons wait. So the ranks try one part a few times and then two,
        and keep to what was faster.
        """
        if self.ranks > 1 and len(self.moments) <= 2 * TRIALS:
            self.moments.append(time.perf_counter())
            tried = len(self.moments) - 1
            self.parts = 1 + (tried >= TRIALS)
            if tried == 2 * TRIALS:
                took = [after - before for before, after in itertools.pairwise(self.moments)]
                one, two = (statistics.median(times[1:]) for times in (took[:TRIALS], took[TRIALS:]))
                slowest = self.greatest(torch.tensor([one, two], dtype=torch.float64, device=self.device))
                self.parts = 1 + bool(slowest[1] < slowest[0])
        return self.parts

    def send_spikes(self, spikes: Tensor) -> Callable[[], Tensor]:
        """See :meth:`coba_triton.ops.call.Exchange.send_spikes`.

        All ranks send lists or all send bits, whichever is shorter. A list has room for twice as many spikes as any rank
        had before, which all of them know. Where that is too little for one rank, all send bits afterwards.
        """
        self.device = spikes.device
        steps, batch, _ = spikes.shape
        room = self.room
        if self.ranks == 1 or 4 * (1 + room) >= steps * batch * -(-self.share // 8):
            wait_for_bits = self._start_bits(spikes)
            return lambda: self._events(_places(wait_for_bits()), steps * batch)
        own = _places(spikes)
        message = torch.zeros(1 + room, dtype=torch.int32, device=spikes.device)
        message[0] = len(own)
        message[1 : 1 + len(own)] = own[:room]
        wait_for_lists = self._start([message] * self.ranks)

        def wait() -> Tensor:
            every = wait_for_lists()
            counts = every[:, 0]
            if int(counts.max()) > room:
                return self._events(_places(self._start_bits(spikes)()), steps * batch)
            listed = torch.arange(room, device=every.device) < counts[:, None]
            rank = torch.repeat_interleave(torch.arange(self.ranks, device=every.device), counts)
            entries = every[:, 1:][listed].long()
            owned = torch.where(rank < self.ranks - 1, self.share, self.neurons - self.share * (self.ranks - 1))
            cell = entries.div(owned, rounding_mode="floor")
            return self._events((rank * steps * batch + cell) * self.share + entries - cell * owned, steps * batch)

        return wait

    def _events(self, places: Tensor, cells: int) -> Tensor:
        """Spikes as ``cell N + neuron`` from places in ``[ranks, cells, share]``; makes room for the next list."""
        rank = places.div(cells * self.share, rounding_mode="floor")
        cell = places.div(self.share, rounding_mode="floor")
        most = int(torch.bincount(rank, minlength=1).max())
        self.room = max(16 + 2 * most, self.room * 3 // 4)
        # neuron = rank * share + place % share
        return (cell - rank * cells) * self.neurons + rank * self.share + places - cell * self.share

    def _start_bits(self, spikes: Tensor) -> Callable[[], Tensor]:
        """Begin to exchange the spikes ``[..., n]`` as bits.

        The call of what it returns gives those of all, uint8 ``[ranks, ..., share]``, in contiguous memory.
        """
        padded = spikes.new_zeros(*spikes.shape[:-1], -(-self.share // 8) * 8)
        padded[..., : spikes.shape[-1]] = spikes
        wait = self._start([pack(padded)] * self.ranks)
        return lambda: unpack(wait())[..., : self.share].contiguous()

    def greatest(self, numbers: Tensor) -> Tensor:
        """The greatest of such numbers in all ranks."""
        numbers = numbers.clone()
        with self.reached():
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return numbers

    def add_up(self, parts: Tensor) -> Tensor:
        """The sum over the ranks, in their order, of ``[..., N]``, of which each keeps its own ``[..., n]``."""
        every = self._swap([parts[..., each].contiguous() for each in self.slices])
        total = every[0]
        for other in every[1:]:
            total = total + other
        return total

    def _swap(self, parts: Sequence[Tensor]) -> Tensor:
        """Give every rank its part, and return what all have for this one, ``[ranks, ...]``."""
        return self._start(parts)()

    def _start(self, parts: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Begin to give every rank its part; a call of what it returns waits for what all have for this one.

        In messages, which ``nccl`` takes as one: ``gloo`` has no collective that adds up parts, and is slower in others.
        """
        mine = parts[self.rank]
        every = mine.new_empty(self.ranks, *mine.shape)
        every[self.rank] = mine
        messages = []
        for shift in range(1, self.ranks):
            to, source = (self.rank + shift) % self.ranks, (self.rank - shift) % self.ranks
            messages.append(dist.P2POp(dist.isend, parts[to], group=self.group, group_peer=to))
            messages.append(dist.P2POp(dist.irecv, every[source], group=self.group, group_peer=source))
        with self.reached():
            started = dist.batch_isend_irecv(messages) if messages else []

        def wait() -> Tensor:
            with self.reached():
                for message in started:
                    message.wait()
            return every

        return wait

    def _join(self, every: Tensor) -> Tensor:
        return every.movedim(0, -2).flatten(-2)[..., : self.neurons]

    def share_facts(self, facts: Any) -> list[Any]:
        """What all ranks have to say, a small object of each.

        Raises:
            RuntimeError: if a rank says that it has failed, see :meth:`refuse`.
        """
        given: list[Any] = [None] * self.ranks
        with self.reached():
            dist.all_gather_object(given, facts, group=self.group)
        for rank, other in enumerate(given):
            if isinstance(other, _Failed) and not isinstance(facts, _Failed):
                raise RuntimeError(f"rank {rank} cannot go on: {other.why}")
        return given

    def refuse(self, error: Exception) -> NoReturn:
        """Raise an error, after the other ranks are told, which are about to share facts."""
        self.share_facts(_Failed(f"{type(error).__name__}: {error}"))
        raise error

    def agree(self, call: dict[str, Any], error: Exception | None) -> None:
        """Raise in all ranks where one has an error or another call than the others, before they wait for each other."""
        if error is not None:
            self.refuse(error)
        given = self.share_facts(call)
        for name in call:
            values = [other.get(name) for other in given]
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"{name} must be the same on every rank, got {', '.join(map(str, values))} on ranks 0 to "
                    f"{self.ranks - 1}; make them equal"
                )


class _Failed(NamedTuple):
    """What a rank says that cannot go on."""

    why: str


def _places(spikes: Tensor) -> Tensor:
    """Where a tensor of bytes is not 0, int64, counted as if it were flat."""
    if spikes.device.type == "cpu":  # several times as fast
        return torch.from_numpy(np.flatnonzero(spikes.view(torch.bool).numpy()))
    return torch.nonzero(spikes.reshape(-1)).flatten()


def pack(spikes: Tensor) -> Tensor:
    """Bytes of 0 and 1 ``[..., 8 W]`` to bits ``[..., W]``, bit ``i`` of a byte being neuron ``8 w + i``.

    In the product of eight bytes with the sum of ``2**(7 k)``, k from 1 to 8, bit ``56 + i`` is byte ``i``, and no two terms
    meet in a bit.
    """
    if spikes.device.type == "cpu":  # several times as fast
        return torch.from_numpy(np.packbits(spikes.numpy(), axis=-1, bitorder="little"))
    return (spikes.view(torch.int64) * 0x0102040810204080 >> 56 & 0xFF).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack`: byte ``i`` takes bit ``i``, and gives 1 if adding 127 sets its highest bit."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, bitorder="little"))
    bits = packed.to(torch.int64) * 0x0101010101010101 & (0x8040201008040201 - 2**64)
    return (bits + 0x7F7F7F7F7F7F7F7F >> 7 & 0x0101010101010101).view(torch.uint8)


class Gather(torch.autograd.Function):
    """:meth:`Ranks.gather`, differentiable once."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.add_up(grad.clone(memory_format=torch.contiguous_format)), None


class Shared(torch.autograd.Function):
    """What all ranks have in common: as it is, with a gradient that is the sum of those of all ranks."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, device: torch.device, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.device = ranks, device
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sums = [grad.to(ctx.device, memory_format=torch.contiguous_format, copy=True) for grad in grads]
        with ctx.ranks.reached():
            for total in sums:
                dist.all_reduce(total, group=ctx.ranks.group)
        return None, None, *(total.to(grad.device) for total, grad in zip(sums, grads, strict=True))
