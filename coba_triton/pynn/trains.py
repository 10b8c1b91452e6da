"""What sources of spikes send: times in ms, in continuous time. A spike is sent at the first sample not before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

WINDOW = 1000  # steps for which times are drawn together, whatever the lengths of runs are
NOTHING = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)


def samples_of(times: Array, dt: float) -> Array:
    """The first sample that is not before a time; a time that is a sample but for rounding is that sample."""
    return np.ceil(np.asarray(times, np.float64) / dt - 1e-6).astype(np.int64)


def in_order(samples: Array, sources: Array, times: Array) -> tuple[Array, Array, Array]:
    order = np.lexsort((times, samples))
    return samples[order], sources[order], times[order]


class ListedTrains:
    """Spikes at given times.

    Args:
        times: of every source, ascending, in ms.
        dt: time step in ms.
    """

    def __init__(self, times: list[Array], dt: float) -> None:
        sources = np.repeat(np.arange(len(times)), [len(train) for train in times])
        every = np.concatenate([np.empty(0), *times])
        self._samples, self._sources, self._times = in_order(samples_of(every, dt), sources, every)

    def begin(self, segment: int) -> None:
        """The same spikes come again."""

    def events(self, first: int, last: int) -> tuple[Array, Array, Array]:
        some = slice(*np.searchsorted(self._samples, [first + 1, last + 1]))
        return self._samples[some], self._sources[some], self._times[some]


class DrawnTrains:
    """Spikes whose times are drawn in windows of :data:`WINDOW` steps.

    The spikes of a window follow from the seed, the segment, the population and the window alone, so that a run may be cut
    anywhere. After a change of parameters they are drawn anew, and those that are not sent yet are taken from the new ones.

    Args:
        key: what the spikes of these sources are drawn from, beside the segment.
        dt: time step in ms.
        segment: how many times the clock was set back.
        now: when the sources are made, in ms: they send nothing before.
    """

    def __init__(self, key: tuple[int, ...], dt: float, segment: int, now: float) -> None:
        self._key, self._dt, self._segment, self._now = key, dt, segment, now
        self._changes = 0
        self._window = -1
        self._drawn = NOTHING

    def begin(self, segment: int) -> None:
        self._segment, self._changes, self._window, self._now = segment, 0, -1, 0.0

    def adopt(self, other: DrawnTrains, now: float) -> None:
        """Take the parameters of ``other`` from ``now`` on, in ms."""
        vars(self).update({name: value for name, value in vars(other).items() if not name.startswith("_")})
        self._changes += 1
        self._window, self._now = -1, now

    def draw(self, rng: np.random.Generator, begin: float, end: float) -> tuple[Array, Array]:
        """Sources, and times after ``begin`` up to ``end``, in ms."""
        raise NotImplementedError(f"{type(self).__name__} must say how times are drawn")

    def events(self, first: int, last: int) -> tuple[Array, Array, Array]:
        found = []
        for window in range(max(first, 0) // WINDOW, -(-max(last, 0) // WINDOW)):
            if window != self._window:
                rng = np.random.default_rng([*self._key, self._segment, self._changes, window])
                begin, end = window * WINDOW, (window + 1) * WINDOW
                sources, times = self.draw(rng, begin * self._dt, end * self._dt)
                samples = np.clip(samples_of(times, self._dt), begin + 1, end)
                self._window, self._drawn = window, in_order(samples, sources, times)
            some = slice(*np.searchsorted(self._drawn[0], [first + 1, last + 1]))
            found.append(tuple(part[some] for part in self._drawn))
        if not found:
            return NOTHING
        samples, sources, times = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return samples, sources, times


class PoissonTrains(DrawnTrains):
    """Poisson processes; of a source that sends several spikes in a step, each one counts.

    Attributes:
        rate: in Hz, of each source.
        start: in ms.
        duration: in ms.
    """

    rate: Array
    start: Array
    duration: Array

    def draw(self, rng: np.random.Generator, begin: float, end: float) -> tuple[Array, Array]:
        low, high = np.maximum(begin, self.start), np.minimum(end, self.start + self.duration)
        span = np.maximum(high - low, 0.0)
        counts = rng.poisson(self.rate * span / 1000.0)
        sources = np.repeat(np.arange(len(counts)), counts)
        return sources, low[sources] + span[sources] * (1.0 - rng.random(len(sources)))


class RenewalTrains(DrawnTrains):
    """Spikes after intervals that are independent of each other. After a change of parameters an interval begins.

    Attributes:
        start: when the first interval begins, of each source, in ms; if that is past when a source is made, it begins then.
        duration: in ms.
    """

    start: Array
    duration: Array

    def __init__(self, key: tuple[int, ...], dt: float, segment: int, now: float) -> None:
        super().__init__(key, dt, segment, now)
        self._rng: np.random.Generator | None = None
        self._next = np.empty(0)

    def intervals(self, rng: np.random.Generator, sources: Array) -> Array:
        """An interval in ms for each of these sources."""
        raise NotImplementedError(f"{type(self).__name__} must say how intervals are drawn")

    def begin(self, segment: int) -> None:
        super().begin(segment)
        self._rng = None

    def adopt(self, other: DrawnTrains, now: float) -> None:
        super().adopt(other, now)
        self._rng = None

    def draw(self, rng: np.random.Generator, begin: float, end: float) -> tuple[Array, Array]:
        if self._rng is None:  # windows come one after the other
            self._rng = rng
            self._next = np.maximum(self.start, self._now) + self.intervals(rng, np.arange(len(self.start)))
        found: list[tuple[Array, Array]] = [(np.empty(0, np.int64), np.empty(0))]
        stop = np.minimum(self.start + self.duration, end)
        while len(ready := np.flatnonzero(self._next <= stop)):
            found.append((ready, self._next[ready]))
            self._next[ready] += self.intervals(self._rng, ready)
        sources, times = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return sources, times


class GammaTrains(RenewalTrains):
    """Intervals of a gamma distribution, of the shape ``alpha`` and the rate ``beta`` in Hz."""

    alpha: Array
    beta: Array

    def intervals(self, rng: np.random.Generator, sources: Array) -> Array:
        return rng.gamma(self.alpha[sources], 1000.0 / self.beta[sources])


class RefractoryPoissonTrains(RenewalTrains):
    """Poisson processes that are silent for ``tau_refrac`` ms after a spike; ``rate`` in Hz is that of the result."""

    rate: Array
    tau_refrac: Array

    def intervals(self, rng: np.random.Generator, sources: Array) -> Array:
        with np.errstate(divide="ignore"):
            mean = 1000.0 / self.rate[sources] - self.tau_refrac[sources]
        drawn = rng.standard_exponential(len(sources))
        return self.tau_refrac[sources] + mean * drawn


def gamma_hazard(age: Array, shape: Array, scale: Array) -> Array:
    """The rate, per unit of ``scale``, at which an interval of a gamma distribution ends that has lasted for ``age``.

    The shape is at least 1, so the rate is at most ``1 / scale``.
    """
    x, a = torch.from_numpy(age / scale), torch.from_numpy(shape)
    survival = torch.special.gammaincc(a, x)
    logarithm = torch.special.xlogy(a - 1.0, x) - x - torch.lgamma(a) - torch.log(survival)
    late = 1.0 / (1.0 + (a - 1.0) / x)  # the first terms of the series of the survival, which underflows
    return torch.where(survival > 1e-280, torch.exp(logarithm), late).numpy() / scale


class InhomogeneousGammaTrains(RenewalTrains):
    """Gamma processes whose parameters change with time, by thinning: Muller et al. 2007, doi:10.1162/neco.2007.19.11.2958.

    Candidates come at the greatest rate that a source ever has. Each becomes a spike with the probability that the rate at
    its time, after its interval so far, has of that. Before the first time of ``tbins`` there are no spikes.

    Attributes:
        a: shapes, for each source a sequence.
        b: scales in s, likewise.
        tbins: when each shape and scale begins, in ms, likewise.
    """

    a: Array
    b: Array
    tbins: Array

    def __init__(self, key: tuple[int, ...], dt: float, segment: int, now: float) -> None:
        super().__init__(key, dt, segment, now)
        self._last = np.empty(0)
        self._bins, self._shapes, self._scales = np.empty((0, 0)), np.empty((0, 0)), np.empty((0, 0))
        self._most = np.empty(0)

    def _begin(self, rng: np.random.Generator) -> None:
        self._rng = rng
        length = max(map(len, self._of("tbins")))

        def table(name: str, filling: float) -> Array:
            return np.stack([np.append(values, np.full(length - len(values), filling)) for values in self._of(name)])

        self._bins, self._shapes, self._scales = table("tbins", np.inf), table("a", 1.0), table("b", np.inf) * 1000.0
        self._most = (1.0 / self._scales).max(1)
        self._last = np.maximum(self.start, self._now)
        self._next = self._last + rng.standard_exponential(len(self._last)) / self._most

    def _of(self, name: str) -> list[Array]:
        return [np.asarray(sequence.value, np.float64) for sequence in vars(self)[name]]

    def draw(self, rng: np.random.Generator, begin: float, end: float) -> tuple[Array, Array]:
        if self._rng is None:
            self._begin(rng)
        assert self._rng is not None
        found: list[tuple[Array, Array]] = [(np.empty(0, np.int64), np.empty(0))]
        stop = np.minimum(self.start + self.duration, end)
        while len(ready := np.flatnonzero(self._next <= stop)):
            times, most = self._next[ready], self._most[ready]
            now = (self._bins[ready] <= times[:, np.newaxis]).sum(1) - 1
            hazard = gamma_hazard(times - self._last[ready], self._shapes[ready, now], self._scales[ready, now])
            fires = (self._rng.random(len(ready)) * most < hazard) & (now >= 0)
            found.append((ready[fires], times[fires]))
            self._last[ready[fires]] = times[fires]
            self._next[ready] = times + self._rng.standard_exponential(len(ready)) / most
        sources, times = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return sources, times
