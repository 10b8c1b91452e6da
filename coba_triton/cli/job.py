"""The block loop: reads input, advances the neurons, and keeps what is to be recorded."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coba_triton import CobaLIFParameters, coba_lif_feed_forward_integral, coba_lif_integral
from coba_triton._backends import choose_backend

from .config import Config, Neuron, Simulation, UserError
from .inputs import Source
from .weights import Recurrent


@dataclass(frozen=True)
class Block:
    """What is kept of one finished block of ``t`` steps.

    Attributes:
        steps: t.
        spike_steps: step of every spike, counted from the start of the run, in order, ``[S]``.
        spike_neurons: neuron of every spike, ``[S]``.
        traces: a variable's name to its values in the recorded neurons, ``[t, K]``.
        input_e: excitatory input in uS a step, mean over the neurons, ``[t]``.
        input_i: inhibitory input likewise, ``[t]``, not negative.
    """

    steps: int
    spike_steps: NDArray[np.int64]
    spike_neurons: NDArray[np.int32]
    traces: dict[str, NDArray[np.float32]]
    input_e: NDArray[np.float32]
    input_i: NDArray[np.float32]


@dataclass
class Run:
    """A run, and what it has finished so far.

    Attributes:
        backend: the backend that serves it, such as ``"triton"``.
        device: the torch device it runs on.
        blocks: the finished blocks, in order.
        wall_time: of the loop, in s.
        interrupted: whether Ctrl-C ended it.
    """

    backend: str
    device: str
    blocks: list[Block] = field(default_factory=list)
    wall_time: float = 0.0
    interrupted: bool = False

    @property
    def steps(self) -> int:
        """Number of finished steps."""
        return sum(block.steps for block in self.blocks)

    def joined(self) -> Block:
        """The finished blocks as one."""
        first, *_ = self.blocks
        return Block(
            steps=self.steps,
            spike_steps=np.concatenate([block.spike_steps for block in self.blocks]),
            spike_neurons=np.concatenate([block.spike_neurons for block in self.blocks]),
            traces={name: np.concatenate([block.traces[name] for block in self.blocks]) for name in first.traces},
            input_e=np.concatenate([block.input_e for block in self.blocks]),
            input_i=np.concatenate([block.input_i for block in self.blocks]),
        )


def parameters(neuron: Neuron) -> CobaLIFParameters:
    """The model's parameters, which hold the inverses of the time constants and of the capacitance."""
    return CobaLIFParameters(
        tau_syn_exc_inv=1 / neuron.tau_syn_exc,
        tau_syn_inh_inv=1 / neuron.tau_syn_inh,
        c_m_inv=1 / neuron.c_m,
        g_l=neuron.g_l,
        e_rev_I=neuron.e_rev_I,
        e_rev_E=neuron.e_rev_E,
        v_rest=neuron.v_rest,
        v_reset=neuron.v_reset,
        v_thresh=neuron.v_thresh,
    )


def choose_device(simulation: Simulation) -> torch.device:
    """The device that a configuration names; ``"auto"`` is the GPU if Triton drives it, else the CPU.

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


def simulate(config: Config, source: Source, recurrent: Recurrent | None, on_progress: Callable[[int], None]) -> Run:
    """Run a configuration in blocks; Ctrl-C ends it after the last finished block.

    Args:
        config: what to run.
        source: input of every step.
        recurrent: the synapses among the neurons, None if there are none.
        on_progress: called with the number of finished steps, first with 0.

    Returns:
        The run; ``interrupted`` says whether it is complete.

    Raises:
        UserError: if the device or the backend cannot serve, or the state stops being finite.
    """
    simulation = config.simulation
    device = choose_device(simulation)
    try:
        run = Run(choose_backend(simulation.backend, device), str(device))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"simulation.backend: {error}") from error
    begin = time.perf_counter()
    try:
        on_progress(0)
        population = _Population(config, source, recurrent, device)
        for start in range(0, simulation.steps, simulation.block_steps):
            stop = min(start + simulation.block_steps, simulation.steps)
            block = population.advance(start, stop)
            run.blocks.append(block)  # one operation: an interrupt leaves the block out or leaves it whole
            on_progress(stop)
    except KeyboardInterrupt:
        run.interrupted = True
    run.wall_time = time.perf_counter() - begin
    return run


class _Population:
    """The neurons, from rest on."""

    def __init__(self, config: Config, source: Source, recurrent: Recurrent | None, device: torch.device) -> None:
        self.config, self.source, self.device = config, source, device
        self.weights: tuple[Tensor, Tensor] | None = None
        if recurrent is not None:
            self.weights = (
                torch.from_numpy(source.weights).to(device),
                torch.from_numpy(recurrent.weights).to(device),
            )
        self.state: Any = None
        self.stable = True

    def advance(self, start: int, stop: int) -> Block:
        """Simulate steps ``start`` to ``stop``."""
        record = self.config.record
        read = self.source.read if self.weights is None else self.source.channels
        x = torch.from_numpy(read(start, stop)).to(self.device)
        traced = bool(record.neurons)
        try:
            spikes, states = self._integrate(x, traced)
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"the simulation of steps {start} to {stop} failed: {error}") from error
        self.state = type(states)(*(field[-1].clone() for field in states)) if traced else states
        self._check(states, stop)
        input_e, input_i = self._mean_input(x)
        steps, neurons = spikes.nonzero(as_tuple=True)
        return Block(
            steps=stop - start,
            spike_steps=steps.cpu().numpy() + start,
            spike_neurons=neurons.cpu().numpy().astype(np.int32),
            traces={name: getattr(states, name)[:, record.neurons].cpu().numpy() for name in record.variables if traced},
            input_e=input_e.cpu().numpy(),
            input_i=input_i.cpu().numpy(),
        )

    def _integrate(self, x: Tensor, traced: bool) -> tuple[Tensor, Any]:
        simulation, p = self.config.simulation, parameters(self.config.neuron)
        options: dict[str, Any] = {
            "order": simulation.order,
            "backend": simulation.backend,
            "record_states": traced,
            "spike_dtype": torch.bool,
        }
        if self.weights is None:
            return coba_lif_feed_forward_integral(x, self.state, p, simulation.dt, **options)
        return coba_lif_integral(x, self.state, *self.weights, p, simulation.dt, **options)

    def _mean_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Excitatory and inhibitory conductance that every step's input adds, mean over the neurons."""
        if self.weights is None:
            return x.relu().mean(1), (-x).relu().mean(1)
        w = self.weights[0]
        return x @ w.relu().mean(0), x @ (-w).relu().mean(0)

    def _check(self, states: Any, stop: int) -> None:
        """Refuse a state that is not finite, and warn once of conductances at which the Euler step diverges."""
        if not all(torch.isfinite(field).all() for field in self.state):
            raise UserError(
                f"the state is no longer finite after step {stop}, as the Euler step is unstable at these "
                "conductances; make simulation.dt or the weights smaller"
            )
        simulation, neuron = self.config.simulation, self.config.neuron
        factor = simulation.dt / neuron.c_m * (neuron.g_l + float((states.g_e + states.g_i).max()))
        at_rest = simulation.dt / neuron.c_m * neuron.g_l  # the core warns of this one
        if self.stable and factor > 2 >= at_rest:
            self.stable = False
            warnings.warn(
                f"the Euler step is unstable: dt * (g_l + g_e + g_i) / c_m has reached {factor:.3g} by step {stop}, "
                "more than 2, and the spikes mean nothing; make simulation.dt or the weights smaller",
                stacklevel=2,
            )
