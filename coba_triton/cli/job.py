"""Run a configuration: make its network and its source, choose what to record, and simulate."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coba_triton import (
    CobaLIF,
    CobaLIFFeedForwardState,
    CobaLIFParameters,
    CobaLIFRecurrent,
    CobaLIFState,
    Record,
    Result,
    Synapses,
    open_result,
    simulate,
)
from coba_triton.backend.choose import choose_backend
from coba_triton.backend.cpu.numba_bridge import compile_seconds
from coba_triton.common.files import reason
from coba_triton.distributed import simulate as simulate_together
from coba_triton.distributed.ranks import LostRankError
from coba_triton.stream.sinks import Sink
from coba_triton.stream.sources import Described

from .config import Config, Neuron, Simulation, Spread
from .errors import UserError, lack_of_memory
from .inputs import PoissonChannels, PoissonDrive, Source
from .part import Part
from .weights import Recurrent, populations


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        result: the result, with the steps of earlier attempts.
        backend: the backend that served it, such as ``"triton"``.
        device: the torch device that it ran on.
        steps: how many steps this attempt made.
        wall_time: the time that these steps took, in s, without the time for compiling.
        compile_time: the time for compiling kernels, in s.
    """

    result: Result
    backend: str
    device: str
    steps: int
    wall_time: float
    compile_time: float


class Feed:
    """Gives a source the form of an array ``[T, I]``, for :func:`coba_triton.simulate`."""

    def __init__(self, read: Callable[[int, int], Any], steps: int) -> None:
        self.read = read
        self.shape = (steps, read(0, 1).shape[1])

    def __getitem__(self, steps: slice) -> Tensor:
        start, stop, _ = steps.indices(self.shape[0])
        return torch.as_tensor(self.read(start, stop))


class DrawnFeed(Feed, Described):
    """The same for a source that is drawn at random from a seed: its settings say what it gives."""

    def __init__(self, read: Callable[[int, int], Any], steps: int, settings: dict[str, Any]) -> None:
        super().__init__(read, steps)
        self.settings = settings

    def describe(self) -> dict[str, Any]:
        return {"settings": self.settings}


def _of_every_neuron(config: Config, value: Callable[[Neuron], float]) -> float | Tensor:
    """A parameter of the neurons: one number, or if populations differ in it, one for each neuron, ``[N]``."""
    shared = value(config.neuron)
    own = [value(population.applied_to(config.neuron)) for population in config.population]
    if all(number == shared for number in own):
        return shared
    numbers = torch.full((config.neuron.count,), shared)
    for population, number in zip(config.population, own, strict=True):
        numbers[slice(*population.neurons)] = number
    return numbers


def parameters(config: Config) -> CobaLIFParameters:
    """The parameters for the model, which takes the inverses of the time constants and of the capacitance."""
    values: dict[str, Callable[[Neuron], float]] = {
        "tau_syn_exc_inv": lambda n: 1 / n.tau_syn_exc,
        "tau_syn_inh_inv": lambda n: 1 / n.tau_syn_inh,
        "c_m_inv": lambda n: 1 / n.c_m,
        "g_l": lambda n: n.g_l,
        "e_rev_I": lambda n: -1.0 if n.e_rev_I is None else n.e_rev_I,  # of currents
        "e_rev_E": lambda n: 1.0 if n.e_rev_E is None else n.e_rev_E,
        "v_rest": lambda n: n.v_rest + n.i_offset / n.g_l if n.i_offset else n.v_rest,
        "v_reset": lambda n: n.v_reset,
        "v_thresh": lambda n: n.v_thresh,
        "refractory": lambda n: n.refractory,
        "conductance_based": lambda n: int(n.synapses == "conductance"),
    }
    numbers: dict[str, Any] = {name: _of_every_neuron(config, value) for name, value in values.items()}
    return CobaLIFParameters(**numbers)


def _start(neuron: Neuron, count: int) -> NDArray[np.float64]:
    """Initial potentials of ``count`` neurons."""
    if isinstance(neuron.v_init, Spread):
        return np.random.default_rng(neuron.v_init.seed).uniform(neuron.v_init.low, neuron.v_init.high, count)
    return np.full(count, neuron.v_rest if neuron.v_init is None else neuron.v_init)


def initial_state(config: Config, connected: bool, device: torch.device) -> CobaLIFState | CobaLIFFeedForwardState | None:
    """The initial state; None if the neurons start at the resting potential of the parameters."""
    neuron, own = config.neuron, [population.applied_to(config.neuron) for population in config.population]
    if all(n.v_init is None and not n.i_offset for n in (neuron, *own)):
        return None
    v = _start(neuron, neuron.count)
    for population, members in zip(config.population, own, strict=True):
        if population.v_init is not None or neuron.v_init is None:  # else one draw for all neurons has served them
            where = slice(*population.neurons)
            v[where] = _start(members, v[where].size)
    potentials = torch.from_numpy(v).float().to(device)
    return CobaLIFState(0.0, potentials, 0.0, 0.0) if connected else CobaLIFFeedForwardState(potentials, 0.0, 0.0)


def choose_device(simulation: Simulation) -> torch.device:
    """The device that a configuration names. ``"auto"`` means the GPU if Triton drives it, else the CPU.

    Raises:
        UserError: if there is no such device.
    """
    if simulation.device != "auto":
        try:
            return torch.empty(0, device=simulation.device).device
        except (AssertionError, RuntimeError) as error:  # torch asserts that it was built with CUDA
            raise UserError(
                f"simulation.device {simulation.device!r} cannot be used ({error}); write 'auto' or 'cpu'"
            ) from error
    gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    wants_gpu = simulation.backend in ("auto", "triton")
    served = gpu and wants_gpu and choose_backend("auto", gpu) == "triton"
    return gpu if gpu and served else torch.device("cpu")


def make_network(
    config: Config, source: Source, recurrent: Recurrent | None, part: Part | None = None
) -> CobaLIF | CobaLIFRecurrent:
    """The module for the population. If the neurons are connected, it has their weights; with a part, those onto its own."""
    simulation, p = config.simulation, parameters(config)
    options: dict[str, Any] = {"order": simulation.order, "backend": simulation.backend}
    if recurrent is None:
        return CobaLIF(p, simulation.dt, **options)
    given = source.weights
    inputs = given if isinstance(given, Synapses) else torch.from_numpy(given)
    channels = inputs.sources if isinstance(inputs, Synapses) else inputs.shape[1]
    if part is not None and isinstance(inputs, Synapses):
        inputs = part.onto_own(inputs)
    options |= {"autapses": True, "input_weights": inputs, "recurrent_weights": recurrent.synapses}
    return CobaLIFRecurrent(channels, config.neuron.count, p, simulation.dt, **options)


def shown_apart(config: Config, recurrent: Recurrent | None) -> dict[str, NDArray[np.int64]]:
    """The populations that are shown apart: those in the configuration, else neurons by the sign of their synapses."""
    if not config.population:
        return {name: mask.nonzero()[0] for name, mask in recurrent.populations().items()} if recurrent else {}
    return populations(config)


def what_to_record(config: Config, recurrent: Recurrent | None) -> Record:
    """What to record: the traces in the configuration, and what the picture and the summary need."""
    settings = config.record
    return Record(
        variables=settings.variables if settings.neurons else (),
        neurons=settings.neurons if settings.variables else (),
        every=settings.every,
        populations=shown_apart(config, recurrent),
        inputs=True,
    )


def run(
    config: Config,
    source: Source,
    recurrent: Recurrent | None,
    sink: Sink,
    resume: bool = False,
    keep_going: bool = False,
    part: Part | None = None,
) -> Run:
    """Run a configuration into a sink. Ctrl-C ends the run; its finished blocks are kept.

    With a part, this process simulates its own neurons, and all processes write to the sink.

    ``keep_going`` lets a run go on whose time step is too long for its conductances, so that its spikes mean nothing.

    Raises:
        MemoryError, RuntimeError: if there is not enough memory, see :func:`lack_of_memory`.
        UserError: if the device or the backend cannot serve, the Euler step becomes unstable, the sink cannot be written to,
            or its path has something else, something damaged, or the result of another configuration.
    """
    simulation = config.simulation
    device = choose_device(simulation)
    try:
        backend = choose_backend(simulation.backend, device)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"simulation.backend: {error}") from error
    if part is not None and device.type != "cpu":
        raise UserError(
            f"simulation.device: several processes share a run on CPUs, got {device}; set simulation.device=cpu, or use "
            "coba_triton.distributed.simulate in Python"
        )
    network = make_network(config, source, recurrent, part).to(device)
    read = source.read if recurrent is None else source.channels
    feed = Feed(read, simulation.steps)
    if isinstance(source, PoissonChannels | PoissonDrive):
        feed = DrawnFeed(read, simulation.steps, config.input.model_dump(mode="json"))
    path, own_changing = sink.path, sink.changing
    begun = part is not None and part.ranks.rank > 0  # another process changes what is at the path

    @contextmanager
    def changing() -> Iterator[None]:
        nonlocal begun
        with own_changing():
            begun = True
            yield

    sink.changing = changing
    try:
        before = open_result(path).steps if resume and path is not None and path.exists() else 0
        begin, compiled = time.perf_counter(), compile_seconds()
        try:
            share = simulate if part is None else functools.partial(simulate_together, divide="neurons")
            result = share(
                network,
                feed,
                sink=sink,
                state=initial_state(config, recurrent is not None, device),
                block_steps=simulation.block_steps,
                record=what_to_record(config, recurrent),
                resume=resume,
                stop_if_unstable=not keep_going,
            )
        except KeyboardInterrupt:
            if path is None or not begun or not path.exists():  # what is there may be of an earlier run
                raise
            result = open_result(path)
        compiled = compile_seconds() - compiled
        wall_time = time.perf_counter() - begin - compiled
        return Run(result, backend, str(device), result.steps - before, wall_time, compiled)
    except OSError as error:
        where, told = error.filename or path, reason(error)
        told = told if str(where) in told else f"{where}: {told}"
        raise UserError(told.replace("resume=True", "--resume")) from error
    except FloatingPointError as error:
        raise UserError(str(error).replace("stop_if_unstable=False", "--keep-going")) from error
    except LostRankError as error:
        raise UserError(str(error).replace("resume=True", "--resume")) from error
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        if lack_of_memory(error):
            raise
        raise UserError(f"the simulation failed: {error}") from error
