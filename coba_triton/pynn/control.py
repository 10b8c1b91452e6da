"""Setting up, running and ending a simulation."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from pyNN import common, recording
from pyNN.common.control import DEFAULT_MIN_DELAY, DEFAULT_TIMESTEP

from ..common.messages import logger
from ..ops import validation
from . import simulator
from .engine import load_kernels

OPTIONS = {"dtype": "dtype", "backend": "backend", "device": "device", "rng_seed": "seed"}
KERNELS = {"dtype": "float64", "backend": "auto", "device": "cpu"}


def setup(timestep: float = DEFAULT_TIMESTEP, min_delay: Any = DEFAULT_MIN_DELAY, **extra_params: Any) -> int:
    """Begin a new network. What was built before is gone, and its data with it.

    Args:
        timestep: in ms.
        min_delay: in ms, the delay of synapses that are given none; ``"auto"``: one time step.
        extra_params: ``max_delay`` in ms; ``threads``, how many threads compute; ``rng_seed``, of what sources and
            connectors without a generator draw, 42 by default; ``dtype``, ``"float64"`` or ``"float32"``; ``backend``,
            ``"auto"``, ``"cpu"`` or ``"triton"``; ``device``, a device of torch. Arguments that other simulators know are
            accepted and have no effect.

    Returns:
        The rank of this process, 0.

    Raises:
        TypeError, ValueError: if an option has a value that it cannot have. The network that was there stays.
        RuntimeError: if several processes of MPI run the script.
    """
    processes = _processes()
    if processes > 1:
        raise RuntimeError(
            f"coba_triton.pynn runs in one process, got {processes} of MPI, of which each would simulate the whole network; "
            "start the script without mpirun, or use coba_triton.distributed for networks over several processes"
        )
    timestep = validation.check_time(timestep, "timestep")
    least = _delay(min_delay, "min_delay")
    greatest = _delay(extra_params.get("max_delay", "auto"), "max_delay")
    common.setup(timestep, min_delay, **extra_params)
    state = simulator.state
    threads = extra_params.get("threads")
    threads = state.threads if threads is None else validation.check_int(threads, "threads")
    if "rng_seed" in extra_params:
        validation.check_int(extra_params["rng_seed"], "rng_seed", 0)
    state.clear(timestep, **{own: extra_params[name] for name, own in OPTIONS.items() if name in extra_params})
    torch.set_num_threads(threads)
    logger.info("forward Euler with a step of %g ms; kernels that are compiled now are kept on disk", timestep)
    load_kernels(*(extra_params.get(name, default) for name, default in KERNELS.items()))
    state.least_delay, state.greatest_delay = least, greatest
    return state.mpi_rank


def _delay(value: Any, name: str) -> float | None:
    """A delay in ms, None where it is ``"auto"``."""
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"{name} must be 'auto' or a positive finite number of ms, got {value!r:.50}")
        return None
    return validation.check_time(value, name)


def _processes() -> int:
    """How many processes of MPI run the script."""
    counts = [int(os.environ.get(name, 1)) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")]
    mpi = sys.modules.get("mpi4py.MPI")
    return max([*counts, 1 if mpi is None else int(mpi.COMM_WORLD.Get_size())])


def end(compatible_output: bool = True) -> None:
    """Write what record() was told to write to files. Data can still be read."""
    for population, variables, filename in simulator.state.write_on_end:
        population.write_data(recording.get_io(filename), variables)
    simulator.state.write_on_end = []


run, run_until = common.build_run(simulator)
run_for = run
reset = common.build_reset(simulator)
initialize = common.initialize
get_current_time, get_time_step, get_min_delay, get_max_delay, num_processes, rank = common.build_state_queries(simulator)
