"""The part of one of several processes that torchrun has started for a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.ranks import Ranks
from ..ops.synapses import Synapses
from .errors import UserError


class Part(NamedTuple):
    """The processes of a run, which share its neurons.

    Attributes:
        ranks: the processes.
        own: the neurons of this one.
    """

    ranks: Ranks
    own: slice

    @classmethod
    @contextmanager
    def joined(cls, neurons: int, wait: float) -> Iterator[Part | None]:
        """Within the block, the part of this process; None if it is alone.

        ``wait``: seconds after which another process counts as lost.

        Raises:
            UserError: if the environment says that there are others, and they cannot be reached.
        """
        size = os.environ.get("WORLD_SIZE", "1")
        if size == "1":
            yield None
            return
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=wait))
        except (RuntimeError, ValueError) as error:  # torch has one for each variable, and others for the network
            raise UserError(
                f"WORLD_SIZE is {size} in the environment, and the other processes of the run cannot be reached "
                f"({str(error).splitlines()[0]:.200}); start all with torchrun, or unset WORLD_SIZE for a run of one process"
            ) from None
        try:
            ranks = Ranks(None)
            try:
                ranks.divide(neurons)
            except ValueError as error:
                raise UserError(f"neuron.count: {error}") from None
            yield cls(ranks, ranks.own)
            dist.barrier()  # who leaves first closes connections that others still read from
        finally:
            dist.destroy_process_group()

    def add_up(self, number: int) -> int:
        """The sum over all processes."""
        return int(sum(self.ranks.share_facts(number)))

    def any(self, flags: Tensor) -> Tensor:
        """Which flags are set in any process."""
        return torch.stack(self.ranks.share_facts(flags)).any(0)

    def onto_own(self, synapses: Synapses) -> Synapses:
        """The synapses onto the neurons of this process, which keep their numbers."""
        kept = (synapses.targets >= self.own.start) & (synapses.targets < self.own.stop)
        if bool(kept.all()):
            return synapses

        def of_kept(values: Tensor) -> Tensor:
            return values if values.dim() == 2 or len(values) == 1 else values[kept]

        delays = synapses.delays
        return Synapses.from_coo(
            synapses.targets[kept],
            synapses.source_of()[kept],
            of_kept(synapses.weights),
            None if delays is None else of_kept(delays),
            shape=(synapses.neurons, synapses.sources),
        )
