"""Random synapses: the distributions of their weights and delays, and how threads draw them from counters."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .given import MOST, to_tensor, values_of
from .validation import check_flag, check_int

LEAST_SHARE = 1e-6  # of a normal distribution between its limits


class Uniform(NamedTuple):
    """Values that are equally probable from ``low`` to ``high``."""

    low: float
    high: float


class Normal(NamedTuple):
    """Normally distributed values. Where there are limits, no value is beyond: the rest keeps its distribution.

    Attributes:
        mean, std: of the distribution without limits.
        low, high: the limits, None for none.
    """

    mean: float
    std: float
    low: float | None = None
    high: float | None = None


class LogNormal(NamedTuple):
    """Values whose logarithm is normally distributed; with a negative mean, their negatives.

    Attributes:
        mean, std: of the values themselves, not of their logarithm.
    """

    mean: float
    std: float


Law: TypeAlias = Uniform | Normal | LogNormal


class Wanted(NamedTuple):
    """What the two constructors of random synapses have in common."""

    sources: Any
    neurons: Any
    weight: Any
    delay: Any
    seed: Any
    autapses: Any
    only: Any
    dtype: Any

    def checked(self) -> Wanted:
        """The same, with all its numbers as Python's own and ``only`` as two of them."""
        sources, neurons = check_int(self.sources, "sources", 0, MOST), check_int(self.neurons, "neurons", 0, MOST)
        check_flag(self.autapses, "autapses")
        if not self.autapses and sources != neurons:
            raise ValueError(
                f"autapses=False needs sources that are the neurons, got {sources} sources and {neurons} neurons; leave "
                "it out"
            )
        dtype = torch.get_default_dtype() if self.dtype is None else self.dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32, torch.float64 or None, got {dtype!r:.50}; use .to() for others")
        only = (0, neurons) if self.only is None else self.only
        if isinstance(only, str) or not isinstance(only, Sequence) or len(only) != 2:
            raise TypeError(f"only must be (begin, end) or None, got {self.only!r:.200}; pass a pair of ints")
        begin, end = check_int(only[0], "only[0]", 0, neurons), check_int(only[1], "only[1]", 0, neurons)
        if begin > end:
            raise ValueError(f"only must be (begin, end) with begin <= end, got {(begin, end)}; swap them")
        _check_law(self.weight, "weight")
        _check_law(self.delay, "delay")
        seed = check_int(self.seed, "seed", 0, 2**64 - 1)
        return Wanted(sources, neurons, self.weight, self.delay, seed, self.autapses, (begin, end), dtype)


def _check_law(law: Any, name: str) -> None:
    """Whether values of a distribution can be drawn; a delay's must not be negative. Other values are not looked at."""
    if not isinstance(law, Law):
        return
    for field, value in law._asdict().items():
        if value is None and field in ("low", "high") and isinstance(law, Normal):
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must have numbers, got {law!r:.200}; pass Python floats")
        if not math.isfinite(value):
            raise ValueError(f"{name} must have finite numbers, got {law!r:.200}; leave a limit out that is none")
    low, high = _limits_of(law)
    if not low <= high or getattr(law, "std", 0) < 0 or (isinstance(law, LogNormal) and law.mean == 0):
        raise ValueError(
            f"{name} must have low <= high, std >= 0 and, if logarithmic, a mean that is not 0, got {law!r:.200}; correct it"
        )
    if isinstance(law, Normal):
        between = NormalDist(law.mean, law.std) if law.std > 0 else None
        share = between.cdf(high) - between.cdf(low) if between else float(low <= law.mean <= high)
        if share < LEAST_SHARE:
            raise ValueError(
                f"{name} must have limits that leave more than {LEAST_SHARE:g} of the distribution, got {law!r:.200}; widen "
                "them"
            )
    if name == "delay" and low < 0:
        raise ValueError(f"delay must have no negative values, got {law!r:.200}; pass low=, at least one time step")


def _limits_of(law: Law) -> tuple[float, float]:
    if isinstance(law, Uniform):
        return law.low, law.high
    if isinstance(law, Normal):
        return -math.inf if law.low is None else law.low, math.inf if law.high is None else law.high
    return (0.0, math.inf) if law.mean > 0 else (-math.inf, 0.0)


def _prepared(law: Any) -> Any:
    """A distribution as the loops take it."""
    from ..backend.cpu import draws

    if not isinstance(law, Law):
        return np.zeros(7)
    low, high = _limits_of(law)
    kind = {Uniform: draws.UNIFORM, Normal: draws.NORMAL, LogNormal: draws.LOG_NORMAL}[type(law)]
    if not isinstance(law, Uniform) and law.std == 0:
        kind, first, second = draws.UNIFORM, law.mean, law.mean
    else:
        first, second = law[:2]
    prepared = np.array([kind, first, second, low, high, 0.0, 0.0])
    draws.prepare_kernel(prepared)
    return prepared


def draw(
    wanted: Wanted, probability: float, number: int, replace: bool, by_target: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Rows, targets, weights and delays, as :class:`.synapses.Synapses` has them.

    Count the synapses of every source, then draw them once more and write each to its place: no memory but the result.

    Threads share the neurons whose partners are drawn, and know from the counts where each one's synapses go.
    """
    from ..backend.cpu import draws

    sources, neurons, weight, delay, seed, autapses, (begin, end), dtype = wanted
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)
    span = (begin, end) if by_target else (0, sources if begin < end else 0)
    threads = max(1, min(torch.get_num_threads(), (span[1] - span[0]) // 256))
    edges = [span[0] + (span[1] - span[0]) * i // threads for i in range(threads + 1)]
    places = np.zeros((threads, sources), np.int64)

    def connect(thread: int, targets: Any) -> None:
        first, last, out = edges[thread], edges[thread + 1], places[thread]
        if by_target:
            draws.onto_targets_kernel(first, last, key, probability, number, replace, autapses, out, targets)
        else:
            draws.from_sources_kernel(first, last, key, number, replace, autapses, neurons, begin, end, out, targets)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda thread: connect(thread, np.empty(0, np.int32)), range(threads)))
        indptr = np.zeros(sources + 1, np.int64)
        np.cumsum(places.sum(0), out=indptr[1:])
        places[:] = np.cumsum(places, axis=0) - places + indptr[:-1]
        count = int(indptr[-1])
        targets = np.empty(count, np.int32)
        list(pool.map(lambda thread: connect(thread, targets), range(threads)))
        weights = np.empty(count if isinstance(weight, Law) else 0, np.float64 if dtype == torch.float64 else np.float32)
        delays = np.empty(count if isinstance(delay, Law) else 0, np.float32)
        if len(weights) or len(delays):
            laws = _prepared(weight), _prepared(delay)
            cuts = np.searchsorted(indptr, [count * i // threads for i in range(threads + 1)]).tolist()
            cuts[-1] = sources

            def draw_values(thread: int) -> None:
                draws.values_kernel(cuts[thread], cuts[thread + 1], key, indptr, targets, weights, delays, *laws)

            list(pool.map(draw_values, range(threads)))

    def values(given: Any, name: str, drawn: Any) -> Tensor:
        if isinstance(given, Law):
            return torch.from_numpy(drawn)
        if not isinstance(given, Tensor):
            given = to_tensor(given, name, torch.device("cpu")).to(dtype)
        return values_of(given, name, count, sources, torch.device("cpu"))

    taken = None if delay is None else values(delay, "delay", delays)
    return torch.from_numpy(indptr), torch.from_numpy(targets), values(weight, "weight", weights), taken
