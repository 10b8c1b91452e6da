"""The state of the simulator, as PyNN's common code reads it: one network, its clock, and the cells that it has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pyNN import common

from ..common.messages import logger
from .engine import Engine

name = "coba_triton"


class ID(int, common.IDMixin):
    """The number of a cell, which has the cell's parameters as attributes."""


class State(common.control.BaseState):
    """What PyNN asks a simulator for.

    Attributes:
        dt: the time step in ms.
        least_delay, greatest_delay: in ms, as setup() was told; None for those of the synapses that there are.
        engine: the network that runs.
        id_counter: the number of the next cell; cells count from 0 through all populations.
        projection_counter, current_counter: the numbers of the next projection and of the next current source.
        segment_counter: how many times the clock was set back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mpi_rank = 0
        self.num_processes = 1
        self.threads = torch.get_num_threads()
        self.clear(0.1)

    @property
    def t(self) -> float:
        """The time in ms: a count of steps, never a running sum."""
        return round(self.engine.now * self.dt, 12)

    @property
    def min_delay(self) -> float:
        """The shortest delay in ms, as setup() was told or as the synapses have it."""
        return self._delay(self.least_delay, np.min)

    @property
    def max_delay(self) -> float:
        """The longest delay in ms, as setup() was told or as the synapses have it."""
        return self._delay(self.greatest_delay, np.max)

    def _delay(self, given: float | None, limit: Callable[[Any], Any]) -> float:
        if given is not None:
            return given
        found = [limit(projection.delays) for projection in self.engine.projections if len(projection)]
        return float(limit(found)) if found else self.dt

    def clear(self, dt: float, **options: Any) -> None:
        """Begin a new network; ``options`` are those of the engine."""
        self.engine = Engine(float(dt), **options)
        self.dt = self.engine.dt
        self.least_delay: float | None = None
        self.greatest_delay: float | None = None
        self.recorders: set[Any] = set()
        self.write_on_end: list[Any] = []
        self.id_counter = 0
        self.projection_counter = 0
        self.current_counter = 0
        self.segment_counter = 0
        self.running = False
        self.t_start = 0

    def run_until(self, time: float) -> None:
        """Advance to ``time`` in ms, which is rounded up to a whole number of steps."""
        steps = math.ceil(time / self.dt - 1e-6)
        if abs(steps * self.dt - time) > 1e-6 * max(self.dt, abs(time)):
            logger.warning("the time %g ms is no multiple of the time step: the run ends at %g ms", time, steps * self.dt)
        recorders = list(self.recorders)
        for recorder in recorders:
            recorder.begin_run()
        self.running = True
        self.engine.advance(steps - self.engine.now, recorders)

    def reset(self) -> None:
        """Set the clock back to 0, with the initial states and nothing under way. Weights stay as they are."""
        self.running = False
        self.segment_counter += 1
        self.engine.reset(self.segment_counter)
        for recorder in self.recorders:
            recorder.forget()


state = State()
