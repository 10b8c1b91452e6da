"""Current sources. A current adds ``I / g_l`` to the resting potential of a neuron, which gives the same equation.

A source says what its current is in every step; the run is cut where it changes. Times are rounded to the nearest step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pyNN.parameters import ParameterSpace, Sequence
from pyNN.standardmodels import StandardCurrentSource, build_translations, electrodes

from . import simulator
from .engine import Array


class _Source(StandardCurrentSource):
    """What all current sources have in common. Attributes that are no parameters are set as usual."""

    def __init__(self, **parameters: Any) -> None:
        self._values: dict[str, Any] = {}
        self._engine = simulator.state.engine
        self._step = self._engine.dt
        self._segment = self._engine.segment
        self._number = simulator.state.current_counter
        simulator.state.current_counter += 1
        self._recorded: list[Array] | None = None
        self._begun = 0
        self.neurons: Array = np.empty(0, np.int64)
        super().__init__(**parameters)
        self.parameter_space.shape = (1,)
        self.set_native_parameters(self.translate(self.parameter_space))

    def inject_into(self, cells: Any) -> None:
        """Inject the current into a population, a view, an assembly or a list of cells."""
        cells = list(cells)
        if any(engine is not simulator.state.engine for engine in (self._engine, *(cell.parent.engine for cell in cells))):
            raise RuntimeError(
                "a current source and the cells that it is injected into belong to the network of one setup(); make them "
                "anew"
            )
        codes = simulator.state.engine.codes[np.fromiter((int(cell) for cell in cells), np.int64)]
        if (codes < 0).any():
            raise TypeError("a current cannot be injected into sources of spikes; inject it into neurons")
        self.neurons = np.concatenate([self.neurons, codes])
        self._join()

    def _join(self) -> None:
        """Let the network ask for the current of every step."""
        if not any(current is self for current in self._engine.currents):
            self._engine.currents.append(self)

    def record(self) -> None:
        """Keep the current of every step from now on."""
        self._recorded, self._begun = [], self._engine.now
        self._join()

    def set_native_parameters(self, parameters: Any) -> None:
        """Take other values, from the next step on."""
        parameters.evaluate(simplify=True)
        values = {name: value.value if isinstance(value, Sequence) else value for name, value in parameters.items()}
        self._values.update(self._checked(values))

    def get_native_parameters(self) -> Any:
        """The values as they are used."""
        return ParameterSpace(self.get_parameters())

    def get_parameters(self) -> dict[str, Any]:
        """The values as they are used, plain numbers and arrays."""
        return dict(self._values)

    def _checked(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: float(value) for name, value in values.items()}

    def _step_of(self, time: float) -> float:
        return float(np.rint(time / self._step))

    def begin(self, segment: int) -> None:
        """Begin anew at time 0."""
        self._segment = segment
        self._begun = 0
        if self._recorded is not None:
            self._recorded = []

    def block(self, first: int, count: int) -> Array:
        """The current in nA in the steps from ``first`` on."""
        values = self.current(np.arange(first, first + count))
        if self._recorded is not None:
            self._recorded.append(values)
        return values

    def current(self, steps: Array) -> Array:
        """The current in nA in these steps."""
        values = self._values
        active = (steps >= self._step_of(values["start"])) & (steps < self._step_of(values["stop"]))
        return np.where(active, self.shape_of(steps), 0.0)

    def shape_of(self, steps: Array) -> Array:
        """The current in these steps where the source is active."""
        raise NotImplementedError(f"{type(self).__name__} must say what its current is")

    def _get_data(self) -> tuple[Array, Array]:
        if self._recorded is None:
            raise RuntimeError("the current was not recorded; call record() before the run")
        now = self._engine.now
        values = np.concatenate([*self._recorded, self.current(np.array([now]))])
        times = np.round(np.arange(self._begun, now + 1) * self._step, 12)
        return times, values


def _same_names(model: Any) -> Any:
    return build_translations(*((name, name) for name in model.default_parameters))


class DCSource(_Source, electrodes.DCSource):
    __doc__ = electrodes.DCSource.__doc__

    translations = _same_names(electrodes.DCSource)

    def shape_of(self, steps: Array) -> Array:
        return np.full(len(steps), self._values["amplitude"])


class ACSource(_Source, electrodes.ACSource):
    __doc__ = electrodes.ACSource.__doc__

    translations = _same_names(electrodes.ACSource)

    def shape_of(self, steps: Array) -> Array:
        values = self._values
        turns = (steps * self._step - values["start"]) * values["frequency"] / 1000.0 + values["phase"] / 360.0
        return np.asarray(values["offset"] + values["amplitude"] * np.sin(2.0 * np.pi * turns))


class StepCurrentSource(_Source, electrodes.StepCurrentSource):
    __doc__ = electrodes.StepCurrentSource.__doc__

    translations = _same_names(electrodes.StepCurrentSource)

    def _checked(self, values: dict[str, Any]) -> dict[str, Any]:
        values = {**self._values, **{name: np.asarray(value, np.float64) for name, value in values.items()}}
        times, amplitudes = values["times"], values["amplitudes"]
        if len(times) != len(amplitudes):
            raise ValueError(
                f"times and amplitudes of StepCurrentSource must have as many values, got {len(times)} and {len(amplitudes)}"
            )
        if (times < 0).any():
            raise ValueError(f"times of StepCurrentSource must not be negative, got {times.min():g} ms")
        if (np.diff(times) <= 0).any():
            raise ValueError(f"times of StepCurrentSource must increase, got {times} ms")
        steps = np.rint(times / self._step)
        # of several times in one step the last one counts
        last = np.append(steps[1:] != steps[:-1], True)[: len(steps)]
        return {"times": np.round(steps[last] * self._step, 12), "amplitudes": amplitudes[last]}

    def current(self, steps: Array) -> Array:
        begins = np.rint(self._values["times"] / self._step)
        return np.append(0.0, self._values["amplitudes"])[np.searchsorted(begins, steps, side="right")]


class NoisyCurrentSource(_Source, electrodes.NoisyCurrentSource):
    __doc__ = electrodes.NoisyCurrentSource.__doc__

    translations = _same_names(electrodes.NoisyCurrentSource)

    def __init__(self, **parameters: Any) -> None:
        self._draws: Array = np.empty(0)
        self._rng: np.random.Generator | None = None
        super().__init__(**{"dt": simulator.state.dt, **parameters})

    def _checked(self, values: dict[str, Any]) -> dict[str, Any]:
        values = super()._checked(values)
        every = values.get("dt", self._step) / self._step
        if every < 1 - 1e-6 or abs(every - round(every)) > 1e-6:
            raise ValueError(
                f"dt of NoisyCurrentSource must be a multiple of the time step of {self._step:g} ms, got {values['dt']:g} ms"
            )
        return values

    def begin(self, segment: int) -> None:
        super().begin(segment)
        self._rng = None

    def shape_of(self, steps: Array) -> Array:
        values = self._values
        start, stop = self._step_of(values["start"]), self._step_of(values["stop"])
        number = (np.clip(steps, start, max(start, stop - 1)) - start).astype(np.int64) // round(values["dt"] / self._step)
        most = int(number.max(initial=0)) + 1
        if self._rng is None:  # numbers follow from the seed, the source and the segment alone
            seed = [self._engine.seed, 2**32 - 1 - self._number, self._segment]
            self._rng = np.random.default_rng(seed)
            self._draws = np.empty(0)
        if most > len(self._draws):
            more = self._rng.standard_normal(max(most - len(self._draws), 1024))
            self._draws = np.append(self._draws, more)
        return np.asarray(values["mean"] + values["stdev"] * self._draws[number])
