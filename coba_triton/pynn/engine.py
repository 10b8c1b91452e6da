"""The network of numbers behind PyNN's objects: all neurons of all populations, advanced block by block.

Neurons count through all populations in order of creation, and so do sources of spikes. A spike that is stamped with sample
``n`` (the time ``n dt``) and has a delay of ``D`` steps is input of step ``n + D``, which leads from sample ``n + D`` to the
next one. A neuron that fires in step ``k`` has a spike of sample ``k + 1``, so that its synapses have delays of ``D + 1``
steps in this package's count. A source is an input channel, one for each distinct delay of its synapses.

What a step adds to the conductances comes from four places: from the ring of sums that a backend carries on, from the
channels, from synapses that transmit with a probability, and from ``pending``. The synapses with a probability are drawn
between two blocks. So no block is longer than what they have under way: what is sent in a block arrives after it.

What is under way when synapses change keeps the weights that it was sent with. Sums of integers go on in the new network as
they are, in its own units, and sources go on along synapses that have not changed. What cannot, is ``pending``: numbers that
are rounded already, to which a step adds the others.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..backend.choose import choose_backend, launcher, the_device
from ..backend.cpu.magnitudes import magnitudes_of
from ..backend.cpu.sorting import Listed, gather, order_of
from ..backend.cpu.spike_lists import spikes_of
from ..common.warned import warn
from ..functional import connections
from ..neuron.records import CobaLIFParameters, Constants
from ..ops import validation
from ..ops.call import Outputs, SparseNetwork
from ..ops.constants import constants_table
from ..ops.grid import SUM_BITS
from ..ops.spikes import WORD_BITS, word_count
from ..ops.synapses import Synapses, record_of
from ..ops.wiring import Wiring
from .chance import Chance, Uncertain, earlier_in_sample

Array = NDArray[Any]
Model = Callable[[Mapping[str, Tensor]], CobaLIFParameters]

# Rows of the state by PyNN's names, and what they are multiplied with; the last row is the steps that are left to be held.
FIELDS = {"v": (0, 1.0), "gsyn_exc": (1, 1.0), "gsyn_inh": (2, 1.0), "isyn_exc": (1, 1.0), "isyn_inh": (2, -1.0)}
BLOCK_BYTES = 2**24  # of inputs, traces or spikes of a block
MOST_STEPS = 2**12
ROW = {name: index for index, name in enumerate(Constants._fields)}


class Wires(NamedTuple):
    """The synapses of a projection.

    Attributes:
        listed: as they stand; a source of spikes ``k`` has the number ``-1 - k``. Weights times the sign are in uS, or in nA
            for neurons whose synapses are currents, negative where they are inhibitory. Delays are in steps of PyNN's count.
        probabilities: that a synapse transmits a spike; None if all always do.
        number: of the projection.
        changes: how many times weights, delays or probabilities were changed.
    """

    listed: Listed
    probabilities: Array | None
    number: int
    changes: int = 0

    def single(self) -> tuple[Array, Array, Array, Array]:
        """The source, the neuron, the weight and the delay of every synapse."""
        pre, post, weights, delays, sources, neurons, sign = self.listed
        return sources[pre], neurons[post], sign * weights, delays


class Trains(Protocol):
    """What the sources of a population send."""

    def events(self, first: int, last: int) -> tuple[Array, Array, Array]:
        """The events of samples after ``first``, up to ``last``: samples, ascending, sources, and times in ms."""

    def begin(self, segment: int) -> None:
        """Begin anew at time 0."""


class Current(Protocol):
    """A current that is injected into neurons."""

    neurons: Array

    def block(self, first: int, count: int) -> Array:
        """The current in nA in the steps from ``first`` on."""

    def begin(self, segment: int) -> None:
        """Begin anew at time 0."""


class Listener(Protocol):
    """What is given the states of a block."""

    def take(self, first: int, states: Array, neurons: Array) -> None:
        """The states ``[F, t, K]`` of ``neurons [K]`` after the steps from ``first`` on."""


class _Sums(NamedTuple):
    """What arrives in the next steps, integers ``[2, steps, N]`` of each sign, and what their units are, ``[2]``."""

    numbers: Array
    units: Array


class _Group(NamedTuple):
    """The neurons of a population: the first one, how many they are, their model, and its parameters ``[size]``."""

    first: int
    size: int
    model: Model
    parameters: dict[str, Array]


class Engine:
    """The network and its state.

    Args:
        dt: time step in ms.
        dtype: of states, ``float64`` or ``float32``.
        backend: ``auto``, ``cpu`` or ``triton``.
        device: a device of torch.
        seed: of what sources draw.
    """

    def __init__(
        self, dt: float, dtype: str = "float64", backend: str = "auto", device: str = "cpu", seed: int = 42
    ) -> None:
        if not validation.is_one_of(dtype, ("float64", "float32")):
            raise ValueError(f"dtype must be 'float64' or 'float32', got {dtype!r:.200}")
        self.dt = dt
        self.seed = seed
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = the_device(device)
        chosen = choose_backend(backend, self.device)
        if chosen == "reference":
            raise ValueError("backend must be 'cpu' or 'triton' for networks of PyNN, got 'reference'; pass backend='cpu'")
        self.backend = launcher(chosen)
        self.segment = 0
        self.now = 0
        self.neurons = 0
        self.sources = 0
        self.codes = np.empty(0, np.int64)  # of every cell: its neuron, or -1 - its source
        self.groups: list[_Group] = []
        self.trains: list[tuple[int, Trains]] = []
        self.projections: list[Any] = []
        self.currents: list[Current] = []
        self.state = torch.zeros(4, 1, 0, dtype=self.dtype, device=self.device)
        self.initial = torch.zeros(3, 0, dtype=torch.float64)
        self.first_drive = np.zeros((2, 0))  # conductances that were set, which are there from the next step on
        self.pending = np.zeros((2, 0, 0))
        self.traced = np.empty(0, np.int64)
        self.records = np.empty(0, bool)  # whether the spikes of a neuron are kept
        self.records_source = np.empty(0, bool)
        self.spikes = Events()
        self.sent = Events()
        self.wiring_changed = True
        self.constants_changed = True
        self._net: SparseNetwork | None = None
        self._chance: Chance | None = None
        self._ring = torch.empty(0)
        self._words = torch.empty(0, 1, 0, dtype=torch.int32)
        self._known: dict[int, int] = {}  # of every projection, how many changes of its synapses are in the network
        self._since = 0
        self._emitted = -1  # the last sample of which sources have sent
        self._under_way = np.empty(0, np.int64), np.empty(0, np.int64)  # samples and sources of events
        self._channels: dict[int, Array] = {}
        self._input: Synapses | None = None
        self._of_channels: tuple[Array, ...] = ()  # its arrays and the scales of its grid, where NumPy reads them
        self._table = torch.empty(0)
        self._injected: tuple[Array, Tensor] | None = None
        self._peeked: tuple[int, Array] | None = None
        self._limit = 1.0

    # What the network is made of

    def add_neurons(self, model: Model, parameters: dict[str, Array], size: int) -> int:
        """Add neurons, at rest at 0 mV until their state is set; returns the number of the first one."""
        first = self.neurons
        self.groups.append(_Group(first, size, model, parameters))
        self.codes = np.concatenate([self.codes, np.arange(first, first + size)])
        self.neurons += size
        self.state = torch.cat([self.state, self.state.new_zeros(4, 1, size)], 2)
        self.initial = torch.cat([self.initial, self.initial.new_zeros(3, size)], 1)
        self.first_drive = np.concatenate([self.first_drive, np.zeros((2, size))], 1)
        self.records = np.concatenate([self.records, np.zeros(size, bool)])
        self.wiring_changed = self.constants_changed = True
        return first

    def add_sources(self, trains: Trains, size: int) -> int:
        """Add sources of spikes; returns the number of the first one."""
        first = self.sources
        self.trains.append((first, trains))
        self.codes = np.concatenate([self.codes, -1 - np.arange(first, first + size)])
        self.sources += size
        self.records_source = np.concatenate([self.records_source, np.zeros(size, bool)])
        self.wiring_changed = True
        return first

    def replace_trains(self, old: Trains, new: Trains) -> None:
        """Let sources send other spikes from now on; what was sent stays."""
        self.trains = [(first, new if trains is old else trains) for first, trains in self.trains]

    def set_state(self, field: str, neurons: Array, values: Array) -> None:
        """Set a field of the state, now and for every time that the clock is set back."""
        (row, sign), at = FIELDS[field], torch.as_tensor(neurons)
        numbers = torch.as_tensor(sign * np.asarray(values, np.float64))
        self.initial[row, at] = numbers
        self._peeked = None
        if row == 0:
            self.state[0, 0, at.to(self.device)] = numbers.to(self.state)
        else:
            self.state[row, 0, at.to(self.device)] = 0.0
            self.first_drive[row - 1, neurons] = numbers.numpy()

    def reset(self, segment: int) -> None:
        """Set the clock back to 0, with the initial states, nothing under way, and nothing recorded."""
        self.segment, self.now, self._emitted = segment, 0, -1
        self.state.zero_()
        self.state[0, 0] = self.initial[0].to(self.state)
        self.first_drive = self.initial[1:].numpy().copy()
        self.pending = np.zeros((2, 0, self.neurons))
        self._under_way = np.empty(0, np.int64), np.empty(0, np.int64)
        if self._net is not None:
            self._empty_ring(self._net)
        if self._chance is not None:
            self._chance.begin(self.seed, segment)
        self._peeked = None
        self.spikes, self.sent = Events(), Events()
        for _, trains in self.trains:
            trains.begin(segment)
        for current in self.currents:
            current.begin(segment)

    # Running

    def advance(self, steps: int, listeners: Sequence[Listener]) -> None:
        """Simulate some steps; the states of :attr:`traced` neurons go to the listeners."""
        if steps <= 0:
            return
        self._prepare()
        channels = 0 if self._input is None else self._input.sources
        spikes = self.neurons if self.currents else self.neurons // 8
        step = max(channels, spikes, 4 * self.state.element_size() * len(self.traced), 1)
        most = max(WORD_BITS, min(BLOCK_BYTES // step, MOST_STEPS))
        if self._chance is not None:
            most = min(most, self._chance.block)
        while steps > 0:
            count = min(steps, most)
            self._run(count, listeners)
            steps -= count
        self._check()

    def _check(self) -> None:
        """Refuse a state that is not finite. Warn once of conductances that make the Euler step overshoot."""
        if not self.neurons:
            return
        g_l, k = self._table[ROW["g_l"]], self._table[ROW["k"]]
        factor = float((k * (g_l + self._table[ROW["coupling"]] * (self.state[1, 0] + self.state[2, 0]))).max())
        if not np.isfinite(factor) or not bool(torch.isfinite(self.state[0]).all()):
            raise FloatingPointError(
                f"the state is no longer finite at {self.now * self.dt:g} ms; make the time step, the weights or the "
                "currents smaller"
            )
        if factor > self._limit:
            self._limit = 2.0 if factor <= 2 else np.inf
            warn(
                f"{validation.instability(factor)}: timestep / cm * (g_l + g_e + g_i) has reached {factor:.3g} by "
                f"{self.now * self.dt:g} ms; make the time step or the weights smaller"
            )

    def conductances(self) -> Array:
        """The conductances or currents ``[2, N]`` in uS or nA of this moment: with what arrives now, before its step."""
        if self._peeked is None or self._peeked[0] != self.now:
            self._prepare()
            net = self._net
            assert net is not None
            x = self._input_rows(1)
            drive = self._drive(x, 1) if self._has_drive() else None
            after = self._step(net, self._ring.clone(), x, drive, 1, Outputs())
            self._peeked = self.now, after[1:3, 0].cpu().numpy()
        return self._peeked[1]

    def potentials(self) -> Array:
        """The membrane potentials ``[N]`` of this moment in mV."""
        return self.state[0, 0].cpu().numpy()

    def _run(self, count: int, listeners: Sequence[Listener]) -> None:
        """A block."""
        self._emit(self.now + count)
        currents = [(current.neurons, current.block(self.now, count)) for current in self.currents]
        net = self._net
        if self.neurons and net is not None:
            x = self._input_rows(count)
            cuts = self._cuts(currents, count)
            chosen = torch.as_tensor(self.traced, device=self.device) if len(self.traced) else None
            states = self.state.new_empty(4, count, len(self.traced)) if len(self.traced) else None
            spikes, words = None, None
            if self.records.any() or (self._chance is not None and self._chance.watches):
                if len(cuts) == 2:
                    words = self._empty_words(word_count(count))
                else:
                    spikes = torch.empty(count, 1, self.neurons, dtype=torch.uint8, device=self.device)
            for begin, end in itertools.pairwise(cuts):
                net = net._replace(constants=self._constants(currents, begin))
                part = None if x is None else x[begin:end]
                drive = self._drive(part, end - begin, begin) if self._has_drive() else None
                out = Outputs(
                    None if spikes is None else spikes[begin:end], words, None if states is None else states[:, begin:end]
                )
                self.state = self._step(net, self._ring, part, drive, end - begin, out, chosen)
                self._since = (self._since + end - begin) % net.longest
                self.pending = self.pending[:, end - begin :]
                self.first_drive[:] = 0.0
            samples, neurons = self._spikes_of(spikes, words)
            kept = self.records[neurons]
            self.spikes.add(samples[kept], neurons[kept])
            if self._chance is not None:
                self._chance.forget(self.now, count)
                self._chance.send(samples, neurons, np.zeros(len(samples), np.int64))
            if states is not None:
                traces = states.cpu().numpy()
                for listener in listeners:
                    listener.take(self.now, traces, self.traced)
        self.now += count
        oldest = self.now - max(self._channels, default=0)
        steps, sources = self._under_way
        first = int(np.searchsorted(steps, oldest))
        self._under_way = steps[first:], sources[first:]

    def _empty_words(self, rows: int) -> Tensor:
        """Words ``[rows, 1, N]`` without a spike, in memory that is kept from block to block."""
        if self._words.shape[0] < rows or self._words.shape[2] != self.neurons:
            self._words = torch.empty(rows, 1, self.neurons, dtype=torch.int32, device=self.device)
        return self._words[:rows].zero_()

    def _step(
        self, net: SparseNetwork, ring: Tensor, x: Tensor | None, drive: Tensor | None, count: int, out: Outputs,
        chosen: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if x is None or drive is not None:
            net = net._replace(inputs=None)
            x = self.state.new_empty(count, 1, 0)
        return net.backend.sparse_block(net, ring, self._since, x, drive, self.state, out, chosen)

    def _cuts(self, currents: list[tuple[Array, Array]], count: int) -> list[int]:
        """Where a block is cut: where a current changes, and where nothing is pending any more."""
        cuts = {0, count}
        for _, values in currents:
            cuts.update((np.flatnonzero(np.diff(values)) + 1).tolist())
        if self._has_drive():
            cuts.add(min(count, max(1, self.pending.shape[1])))
        return sorted(cuts)

    def _spikes_of(self, spikes: Tensor | None, words: Tensor | None) -> tuple[Array, Array]:
        """The samples and the neurons of the spikes of a block."""
        if words is not None:
            steps, neurons = spikes_of(words[:, 0].cpu().numpy())
        elif spikes is not None:
            steps, neurons = np.nonzero(spikes[:, 0].cpu().numpy())
        else:
            steps, neurons = np.empty(0, np.int64), np.empty(0, np.int64)
        return steps + self.now + 1, neurons

    # Inputs

    def _emit(self, last: int) -> None:
        """Let the sources send their events up to the sample ``last``."""
        found = []
        for first, trains in self.trains:
            samples, sources, times = trains.events(self._emitted, last)
            if len(samples):
                found.append((samples, sources + first, times))
        self._emitted = last
        if not found:
            return
        samples, sources, times = (np.concatenate(parts) for parts in zip(*found, strict=True))
        kept = self.records_source[sources]
        self.sent.add(times[kept], sources[kept])
        if len(found) > 1:
            order = np.argsort(samples, kind="stable")
            samples, sources = samples[order], sources[order]
        if self._chance is not None:
            self._chance.send(samples, self.neurons + sources, earlier_in_sample(samples, sources))
        before = self._under_way
        self._under_way = np.concatenate([before[0], samples]), np.concatenate([before[1], sources])

    def _input_rows(self, count: int) -> Tensor | None:
        """How many spikes each channel gets in the next steps, ``[count, 1, I]``; None for no spike at all."""
        if self._input is None:
            return None
        channels = self._input.sources
        steps, sources = self._under_way
        found = [np.empty(0, np.int64)]
        for delay, channel_of in self._channels.items():
            begin, end = np.searchsorted(steps, [self.now - delay, self.now + count - delay])
            if begin < end:
                channel = channel_of[sources[begin:end]]
                there = channel >= 0
                found.append((steps[begin:end][there] + delay - self.now) * channels + channel[there])
        places, counts = np.unique(np.concatenate(found), return_counts=True)
        if not len(places):
            return None
        rows = np.zeros(count * channels, np.uint8 if counts.max() < 256 else np.float64)
        rows[places] = counts
        x = torch.from_numpy(rows).view(count, 1, channels)
        return (x if x.dtype == torch.uint8 else x.to(self.dtype)).to(self.device)

    def _has_drive(self) -> bool:
        return self._chance is not None or bool(self.pending.shape[1]) or bool(self.first_drive.any())

    def _drive(self, x: Tensor | None, count: int, begin: int = 0) -> Tensor:
        """What the next steps add, but for the ring, ``[2, count, 1, N]``; they are ``begin`` steps after the present."""
        if self._chance is None:
            drive = np.zeros((2, count, self.neurons))
        else:
            drive = self._chance.arriving(self.now + begin, count)
        known = min(count, self.pending.shape[1])
        drive[:, :known] += self.pending[:, :known]
        drive[:, 0] += self.first_drive
        if x is not None:
            self._add_input(drive, x[:, 0].cpu().numpy())
        return torch.as_tensor(drive, dtype=self.dtype, device=self.device).unsqueeze(2)

    def _add_input(self, drive: Array, rows: Array) -> None:
        """Add what the channels send, whose spikes are counted in ``rows [count, I]``, in the bits of a backend's sums."""
        indptr, targets, weights, scales = self._of_channels
        steps, channels = np.nonzero(rows)
        counts = indptr[channels + 1] - indptr[channels]
        before = np.cumsum(counts) - counts
        synapses = np.arange(counts.sum()) + np.repeat(indptr[channels] - before, counts)
        if weights.ndim == 2:  # one for each channel
            each = np.repeat(weights[channels, 0], counts)
        else:
            each = weights[0] if len(weights) == 1 else weights[synapses]
        # of several spikes of a channel in a step the grid is coarser, by the least power of two that is not below them
        units = np.ldexp(1.0, np.frexp(np.maximum(rows.max(1), 1) - 0.5)[1])
        sent = each.astype(np.float64) * np.repeat(rows[steps, channels] / units[steps], counts)
        signs = (sent < 0).astype(np.int64)
        sums = np.zeros(drive.shape, np.int64)
        whole = np.rint(np.abs(sent) * scales[signs]).astype(np.int64)
        np.add.at(sums, (signs, np.repeat(steps, counts), targets[synapses]), whole)
        rounded = torch.from_numpy(sums).to(self.dtype).double().numpy()
        drive += rounded * scales[2:, np.newaxis, np.newaxis] * units[:, np.newaxis]

    # Constants

    def _constants(self, currents: list[tuple[Array, Array]], at: int) -> Tensor:
        """The table of constants with the currents of a step of the block."""
        if not currents:
            return self._table
        total = np.zeros(self.neurons)
        for neurons, values in currents:
            np.add.at(total, neurons, values[at])
        if self._injected is None or not np.array_equal(self._injected[0], total):
            table = self._table.expand(-1, self.neurons).clone()
            moved = torch.as_tensor(total, dtype=self.dtype, device=self.device)
            table[ROW["v_rest"]] += moved / table[ROW["g_l"]]
            self._injected = total, table
        return self._injected[1]

    def _make_constants(self) -> None:
        parts = [
            group.model({name: torch.as_tensor(values) for name, values in group.parameters.items()})
            for group in self.groups
        ]
        fields: dict[str, Any] = {}
        for name in CobaLIFParameters._fields:
            values = [getattr(part, name) for part in parts]
            if isinstance(values[0], str):
                continue
            each = torch.cat(
                [torch.as_tensor(v, dtype=torch.float64).expand(g.size) for v, g in zip(values, self.groups, strict=True)]
            )
            fields[name] = float(each[0]) if bool((each == each[0]).all()) else each
        p = CobaLIFParameters(**fields)
        validation.warn_if_unstable(p, self.dt)
        self._table = constants_table(p, self.dt, self.dtype, self.device, torch.Size([1, self.neurons]))
        self._injected = None

    # Synapses

    def _prepare(self) -> None:
        """Make anew what depends on what was changed."""
        if self.constants_changed and self.neurons:
            self._make_constants()
            if self._net is not None and not self.wiring_changed:
                self._net = self._net._replace(constants=self._table)
            self._peeked = None
        if self.wiring_changed and self.neurons:
            self._wire()
            self._peeked = None
        self.constants_changed = self.wiring_changed = False

    def _hold(self, every: list[Wires]) -> None:
        """Make what sources have sent pending where their synapses have changed, with the weights that it was sent with."""
        known, self._known = self._known, {part.number: part.changes for part in every}
        changed = [part for part in every if part.probabilities is None and known.get(part.number) != part.changes]
        codes = np.concatenate([np.empty(0, np.int64), *(part.listed.sources for part in changed)])
        steps, sources = self._under_way
        concerned = np.isin(sources, -1 - codes)
        self._under_way = steps[concerned], sources[concerned]
        longest = max(self._channels, default=0) + 1
        x = self._input_rows(longest)
        if x is not None:
            held = np.zeros((2, longest, self.neurons))
            self._add_input(held, x[:, 0].cpu().numpy())
            self._pend(held)
        self._under_way = steps[~concerned], sources[~concerned]

    def _pend(self, held: Array) -> None:
        """Let ``held [2, steps, N]`` arrive in the next steps; there may be more neurons by now."""
        used = np.flatnonzero(held.any((0, 2)))
        size, length = held.shape[2], used[-1] + 1 if len(used) else 0
        pending = np.zeros((2, max(length, self.pending.shape[1]), self.neurons))
        pending[:, : self.pending.shape[1], : self.pending.shape[2]] = self.pending
        pending[:, :length, :size] += held[:, :length]
        self.pending = pending

    def _in_ring(self) -> Tensor:
        """The ring as ``[2, R, N]``, in its own memory; its first row is that of the step in which it was made."""
        return self._ring.movedim(1, 2).view(2, -1, self._ring.shape[-1])

    def _sums_in_ring(self) -> _Sums | None:
        """What the ring has under way; it has nothing at time 0."""
        if self._net is None or self.now == 0:
            return None
        numbers = self._in_ring().roll(-self._since, 1).long().cpu().numpy()
        return _Sums(numbers, self._net.recurrent.grid.scales[2:].double().cpu().numpy())

    def _moved(self, sums: _Sums, units: Array, rows: int, most: int) -> Array:
        """Sums in other units, for ``rows`` steps; those that are no whole numbers of them below ``most`` are pending."""
        shift = (np.frexp(sums.units)[1] - np.frexp(units)[1]).astype(np.int64)[:, np.newaxis, np.newaxis]
        if not shift.any() and sums.numbers.shape[1] <= rows and sums.numbers.max(initial=0) < most:
            return sums.numbers
        up, down = np.clip(shift, 0, 62), np.clip(-shift, 0, 62)
        moved = sums.numbers >> down << up
        taken = (moved >> up << down == sums.numbers) & (moved < most)
        taken[:, rows:] = False
        self._pend(np.where(taken, 0, sums.numbers) * sums.units[:, np.newaxis, np.newaxis])
        return np.where(taken, moved, 0)[:, :rows]

    def _wire(self) -> None:
        """The synapses of all projections as the backend takes them."""
        every = [projection.wires() for projection in self.projections]
        self._hold(every)
        under_way, by_chance = self._sums_in_ring(), None
        if self._chance is not None:
            by_chance = _Sums(self._chance.under_way(self.now), np.full(2, self._chance.unit))
        parts = [part for part in every if part.probabilities is None]
        gathered = gather([part.listed for part in parts], self.neurons, self.neurons)
        indptr, targets, weights, lags = map(torch.from_numpy, gathered)
        recurrent = record_of(indptr, targets, weights, lags + 1, self.neurons)
        shortest, longest = (int(recurrent.shortest), int(recurrent.longest)) if recurrent.count else (1, 1)
        inputs: Tensor | Synapses = torch.zeros(self.neurons, 0, dtype=self.dtype)
        self._input, self._channels = None, {}
        given = [part.single() for part in parts if len(part.listed.pre) and part.listed.sources.min() < 0]
        if given:
            pre, post, each, delays = (np.concatenate(column) for column in zip(*given, strict=True))
            outer = np.flatnonzero((pre < 0) & (each != 0))
            sources, steps = -1 - pre[outer], delays[outer].astype(np.int64)
            span = int(steps.max(initial=0)) + 1
            keys, channel = np.unique(sources * span + steps, return_inverse=True)
            for number, (source, lag) in enumerate(zip(keys // span, keys % span, strict=True)):
                self._channels.setdefault(int(lag), np.full(self.sources, -1))[source] = number
        if self._channels:
            shape = self.neurons, len(keys)
            self._input = inputs = _shared(Synapses.from_coo(post[outer], channel, each[outer], shape=shape)).to(self.device)
        wiring = Wiring(inputs, recurrent.to(self.device), shortest, longest)
        silence = torch.zeros(longest, 1, self.neurons, dtype=self.dtype, device=self.device)
        self._net = SparseNetwork.of(connections(wiring, self._table, 1.0), silence, False, self.backend)
        if (own := self._net.inputs) is not None:
            tensors = own.indptr, own.targets, own.weights, own.grid.scales.double()
            self._of_channels = tuple(tensor.cpu().numpy() for tensor in tensors)
        self._empty_ring(self._net)
        self._take_chances([part for part in every if part.probabilities is not None and len(part.listed.pre)])
        self._go_on(under_way, by_chance)

    def _go_on(self, under_way: _Sums | None, by_chance: _Sums | None) -> None:
        """Let what was under way before the synapses were made anew arrive: sums of the ring, and of uncertain synapses."""
        assert self._net is not None
        self._pend(np.zeros((2, 0, 0)))  # which makes room for new neurons
        if under_way is not None:
            grid, ring = self._net.recurrent.grid, self._in_ring()
            units = grid.scales[2:].double().cpu().numpy()
            # as much again has room beside it, also of weights that are rounded up
            most = 2 ** SUM_BITS[grid.sums] - (2**31 if grid.sums == torch.int64 else 0)
            moved = self._moved(under_way, units, ring.shape[1], most)
            ring[:, : moved.shape[1], : moved.shape[2]] += torch.from_numpy(moved).to(ring)
        if by_chance is not None and self._chance is None:
            self._moved(by_chance, by_chance.units, 0, 0)
        elif by_chance is not None and self._chance is not None:
            units = np.full(2, self._chance.unit)
            self._chance.go_on(self.now, self._moved(by_chance, units, self._chance.length, 2**61))

    def _take_chances(self, parts: list[Wires]) -> None:
        """The synapses that transmit with a probability."""
        self._chance = None
        if not parts:
            return
        uncertain = []
        for part in parts:
            pre, post, weights, delays = part.single()
            cells = np.where(pre >= 0, pre, self.neurons - 1 - pre)
            uncertain.append(Uncertain(cells, post, weights, delays, np.asarray(part.probabilities), part.number))
        most = max(1, BLOCK_BYTES // (16 * self.neurons))
        self._chance = Chance(uncertain, self.neurons, self.neurons + self.sources, most)
        self._chance.begin(self.seed, self.segment)

    def _empty_ring(self, net: SparseNetwork) -> None:
        """Begin with nothing under way."""
        silence = torch.zeros(net.longest, 1, net.neurons, dtype=self.dtype, device=self.device)
        self._ring, self._since = net.backend.sparse_ring(net, silence), 0


class Events:
    """Spikes in pieces: when, and whose."""

    def __init__(self) -> None:
        self._parts: list[tuple[Array, Array]] = []

    def add(self, when: Array, whose: Array) -> None:
        if len(when):
            self._parts.append((when, whose))

    def all(self) -> tuple[Array, Array]:
        """All of them, as one piece."""
        if len(self._parts) != 1:
            whens, whoses = [np.empty(0)], [np.empty(0, np.int64)]
            if self._parts:
                whens, whoses = ([part[column] for part in self._parts] for column in (0, 1))
            self._parts = [(np.concatenate(whens), np.concatenate(whoses))]
        return self._parts[0]

    def of(self, first: int, size: int) -> tuple[Array, Array]:
        """Those of the members from ``first`` on; members count from 0."""
        when, whose = self.all()
        own = (whose >= first) & (whose < first + size)
        return when[own], whose[own] - first

    def drop(self, first: int, size: int) -> None:
        """Forget those of the members from ``first`` on."""
        when, whose = self.all()
        others = (whose < first) | (whose >= first + size)
        self._parts = [(when[others], whose[others])]


@functools.cache
def load_kernels(dtype: str, backend: str, device: str) -> None:
    """Load the CPU kernels of an engine from the disk, or compile them, once in a process: so no run waits for them."""
    if choose_backend(backend, the_device(device)) != "cpu":
        return
    two, first = np.zeros(2, np.int32), np.zeros(1, np.int64)
    for least in (0.1, 1e-9) if dtype == "float32" else (0.1,):  # sums have 32 bits where these hold all weights
        engine = Engine(0.1, dtype, backend, device)
        engine.add_neurons(lambda parameters: CobaLIFParameters(), {}, 1)
        listed = Listed(two, two, np.array([0.1, least]), two + 1, first, first, 1.0)
        engine.projections.append(_Wired(Wires(listed, None, 0)))
        engine.records[:] = True
        engine.advance(1, [])
    # for larger networks
    order_of(first, first, 1, 1)
    magnitudes_of(np.zeros(1, dtype), np.arange(2), two[:1], 1, np.ones(2))


class _Wired(NamedTuple):
    """A projection that has nothing but synapses."""

    synapses: Wires

    def wires(self) -> Wires:
        return self.synapses


def _shared(synapses: Synapses) -> Synapses:
    """The same with one weight, or one for each source, where that is all there is; likewise for delays."""
    indptr, count = synapses.indptr, synapses.count

    def shared(values: Tensor) -> Tensor:
        if not count or len(values) != count or values.dim() != 1:
            return values
        if bool((values == values[0]).all()):
            return values[:1].clone()
        firsts = values[indptr[:-1].clamp(max=count - 1)]
        sources = synapses.source_of()
        return firsts.unsqueeze(1) if bool((values == firsts[sources]).all()) else values

    delays = None if synapses.delays is None else shared(synapses.delays)
    return synapses._replace(weights=shared(synapses.weights), delays=delays)
