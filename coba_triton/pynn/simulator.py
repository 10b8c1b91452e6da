"""The state of the simulator, as PyNN's common code reads it: one network, its clock, and the cells that it has."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from pyNN import common

from .engine import Engine

logger = logging.getLogger("coba_triton")

name = "coba_triton"

# A delay that nothing is longer than, where setup() was told no greatest delay.
NO_LIMIT = 1e12


class ID(int, common.IDMixin):
    """The number of a cell, which has the cell's parameters as attributes."""


class State(common.control.BaseState):
    """What PyNN asks a simulator for.

    Attributes:
        dt: the time step in ms.
        min_delay, max_delay: in ms, as setup() was told.
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

    def clear(self, dt: float, **options: Any) -> None:
        """Begin a new network; ``options`` are those of the engine."""
        self.dt = float(dt)
        self.engine = Engine(self.dt, **options)
        self.min_delay: float = self.dt
        self.max_delay: float = NO_LIMIT
        self.recorders = set()
        self.write_on_end = []
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
