"""Random numbers in compiled loops, and the random synapses that are made of them.

Every number follows from a seed and a counter alone: Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011,
doi:10.1145/2063384.2063405). Logarithms and what follows from them are written out in operations that IEEE 754 rounds in the
same way everywhere, so every machine draws the same.

The counter of draw ``d`` of a neuron is ``(d, neuron, purpose, TAG)``; the neuron is the one whose partners are drawn, a
target or a source. That of the weight and the delay of a synapse is ``(source, target, VALUES + e, TAG)``, where ``e``
counts the earlier synapses of the pair. So nothing depends on what else is drawn, where and in which order.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from .numba_bridge import OPTIONS, entry_point, numbers_in

DRAWS = 16  # counters in one vectorised batch; each gives two gaps
_HIGH = np.uint64(32)
_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476


@numba.njit(inline="always", **OPTIONS)
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Philox4x32-10: four random words from a counter of four words and a key of two, all uint32."""
    for _ in range(10):
        a = np.uint64(0xD2511F53) * np.uint64(c0)
        b = np.uint64(0xCD9E8D57) * np.uint64(c2)
        c0, c1, c2, c3 = np.uint32(b >> _HIGH) ^ c1 ^ k0, np.uint32(b), np.uint32(a >> _HIGH) ^ c3 ^ k1, np.uint32(a)
        k0 = np.uint32(k0 + np.uint32(0x9E3779B9))
        k1 = np.uint32(k1 + np.uint32(0xBB67AE85))
    return c0, c1, c2, c3


@numba.njit(inline="always", **OPTIONS)
def exponential_gaps(gaps: Any, words: Any, first: Any, stream: Any, low: Any, high: Any, k0: Any, k1: Any) -> None:
    """Fill ``gaps [2 DRAWS]`` with ``-log(u)``, u uniform in (0, 1) with 52 bits."""
    for i in range(DRAWS):
        a, b, c, d = philox(np.uint32(first + np.uint32(i)), stream, low, high, k0, k1)
        words[i] = (np.uint64(a) << _HIGH) | np.uint64(b)
        words[DRAWS + i] = (np.uint64(c) << _HIGH) | np.uint64(d)
    bits = numbers_in(gaps, np.uint64)
    for i in range(2 * DRAWS):
        gaps[i] = (np.float64(np.int64(words[i] >> np.uint64(12))) + 0.5) * 2.0**-52
    for i in range(2 * DRAWS):  # u = m 2^e with m in [1/2, 1)
        words[i] = bits[i] >> np.uint64(52)
        bits[i] = (bits[i] & np.uint64(0x000FFFFFFFFFFFFF)) | np.uint64(0x3FE0000000000000)
    for i in range(2 * DRAWS):  # log m = log(1/2) / 2 + 2 artanh(s); |s| < 0.172, so the series is short
        s = (gaps[i] - _SQRT_HALF) / (gaps[i] + _SQRT_HALF)
        q = s * s
        series = (((1 / 23 * q + 1 / 21) * q + 1 / 19) * q + 1 / 17) * q + 1 / 15
        series = (((series * q + 1 / 13) * q + 1 / 11) * q + 1 / 9) * q + 1 / 7
        series = ((series * q + 1 / 5) * q + 1 / 3) * q + 1.0
        gaps[i] = -((np.float64(np.int64(words[i])) - 1022.5) * _LN2 + 2.0 * s * series)


OF_TARGET, OF_SOURCE, VALUES = range(3)  # purposes
TAG = np.uint32(0x5E9A95E5)  # no step of a Poisson source, which has its step here, is as late
UNIFORM, NORMAL, LOG_NORMAL = range(3)
_LN2_HIGH, _LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10


@numba.njit(inline="always", **OPTIONS)
def unit(high: Any, low: Any) -> Any:
    """A number uniform in (0, 1) with 52 bits, from two random words."""
    word = (np.uint64(high) << _HIGH) | np.uint64(low)
    return (np.float64(np.int64(word >> np.uint64(12))) + 0.5) * 2.0**-52


@numba.njit(inline="always", **OPTIONS)
def below(most: Any, high: Any, low: Any) -> Any:
    """A whole number from 0 to ``most - 1``, from two random words."""
    count = np.uint64(most)
    return np.int64((np.uint64(high) * count + ((np.uint64(low) * count) >> _HIGH)) >> _HIGH)


@numba.njit(**OPTIONS)
def log(x: Any) -> Any:
    """The natural logarithm of a positive number, as :func:`exponential_gaps` has it."""
    mantissa, exponent = math.frexp(x)
    s = (mantissa - _SQRT_HALF) / (mantissa + _SQRT_HALF)
    q = s * s
    series = 1 / 23
    for odd in range(21, 0, -2):
        series = series * q + 1.0 / odd
    return (exponent - 0.5) * _LN2 + 2.0 * s * series


@numba.njit(**OPTIONS)
def exp(x: Any) -> Any:
    """The exponential function."""
    power = math.floor(x / _LN2 + 0.5)
    rest = (x - power * _LN2_HIGH) - power * _LN2_LOW
    series = 1.0
    for n in range(14, 0, -1):
        series = series * (rest * (1.0 / n)) + 1.0
    return math.ldexp(series, int(power))


@numba.njit(**OPTIONS)
def rate_of(probability: Any) -> Any:
    """``-log(1 - p)``, also of a small ``p``: the rate of the exponential distribution that exceeds 1 with ``1 - p``."""
    if probability > 0.25:
        return -log(1.0 - probability) if probability < 1.0 else np.inf
    s = probability / (2.0 - probability)
    q = s * s
    series = 1 / 23
    for odd in range(21, 0, -2):
        series = series * q + 1.0 / odd
    return 2.0 * s * series


@numba.njit(**OPTIONS)
def _ratio(r: Any, a: Any, b: Any) -> Any:
    above = ((((((a[7] * r + a[6]) * r + a[5]) * r + a[4]) * r + a[3]) * r + a[2]) * r + a[1]) * r + a[0]
    under = ((((((b[6] * r + b[5]) * r + b[4]) * r + b[3]) * r + b[2]) * r + b[1]) * r + b[0]) * r + 1.0
    return above / under


_CENTRE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3, 2.1213794301586595867e4,
     3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
_TAIL = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1, 1.48103976427480074590e-1,
     1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
_FAR = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
     2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2, 7.86869131145613259100e-4,
     1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
)  # fmt: skip


@numba.njit(**OPTIONS)
def normal_quantile(p: Any) -> Any:
    """The standard normal distribution is below this with the probability ``p``.

    Algorithm AS 241 (Wichura 1988, doi:10.2307/2347330), exact to about 16 digits.
    """
    q = p - 0.5
    if abs(q) <= 0.425:
        return q * _ratio(0.180625 - q * q, *_CENTRE)
    r = math.sqrt(-log(min(p, 1.0 - p)))
    x = _ratio(r - 1.6, *_TAIL) if r <= 5.0 else _ratio(r - 5.0, *_FAR)
    return -x if q < 0.0 else x


@numba.njit(**OPTIONS)
def normal_share(x: Any) -> Any:
    """The probability that the standard normal distribution is below ``x``: where :func:`normal_quantile` crosses it."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if middle <= 0.0 or middle >= 1.0:
            break
        if normal_quantile(middle) < x:
            low = middle
        else:
            high = middle
    return low


def prepare_values(law: Any) -> None:
    """Turn a law from what a user says to what :func:`value_of` needs.

    ``law`` is ``(kind, a, b, low, high, p, q)``. UNIFORM has its ends in ``a, b``. NORMAL has mean and standard deviation
    there, then limits; ``p`` and ``q`` become the probabilities to be below them. LOG_NORMAL has the mean and the standard
    deviation of its values, which become those of their logarithm; ``low`` becomes the sign.
    """
    kind, a, b = int(law[0]), law[1], law[2]
    if kind == NORMAL:
        low, high = law[3], law[4]
        law[5] = normal_share((low - a) / b) if low > -np.inf else 0.0
        law[6] = normal_share((high - a) / b) if high < np.inf else 1.0
    elif kind == LOG_NORMAL:
        variance = log(1.0 + (b / a) * (b / a))
        law[1], law[2] = log(abs(a)) - 0.5 * variance, math.sqrt(variance)
        law[3] = 1.0 if a > 0.0 else -1.0


@numba.njit(inline="always", **OPTIONS)
def value_of(law: Any, u: Any) -> Any:
    """The value of a prepared law at ``u`` in (0, 1)."""
    kind = int(law[0])
    if kind == UNIFORM:
        return law[1] + (law[2] - law[1]) * u
    if kind == NORMAL:
        p = min(max(law[5] + (law[6] - law[5]) * u, 2.0**-60), 1.0 - 2.0**-53)
        return min(max(law[1] + law[2] * normal_quantile(p), law[3]), law[4])
    return law[3] * exp(law[1] + law[2] * normal_quantile(u))


@numba.njit(**OPTIONS)
def draw_with_probability(row: Any, neuron: Any, inverse: float, count: int, key: Any, gaps: Any, words: Any) -> int:
    """Write each of ``count`` partners with the same probability to ``row``, ascending; returns their number.

    The distance between two of them is geometrically distributed: an exponential one, rounded down.

    Args:
        inverse: one over :func:`rate_of` the probability.
        gaps, words: scratch, ``[2 DRAWS]``.
    """
    position, found, draw = -1, 0, np.uint32(0)
    while True:
        exponential_gaps(gaps, words, draw, neuron, np.uint32(OF_TARGET), TAG, key[0], key[1])
        draw = np.uint32(draw + np.uint32(DRAWS))
        for i in range(2 * DRAWS):
            skip = max(gaps[i], 0.0) * inverse
            if not skip < count:
                return found
            position += 1 + int(skip)
            if position >= count:
                return found
            row[found] = position
            found += 1


@numba.njit(**OPTIONS)
def draw_number(row: Any, neuron: Any, purpose: Any, number: int, count: int, replace: bool, key: Any, seen: Any) -> None:
    """Write ``number`` of ``count`` partners to ``row``; without replacement by Floyd's algorithm.

    Args:
        seen: scratch, ``[count]``, in which no other neuron has left ``neuron + 1``.
    """
    a, b, c, d = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
    mark = np.int64(neuron) + 1
    for i in range(number):
        if i % 2:
            a, b = c, d
        else:
            a, b, c, d = philox(np.uint32(i // 2), neuron, purpose, TAG, key[0], key[1])
        if replace:
            row[i] = below(count, a, b)
        else:
            last = count - number + i
            partner = below(last + 1, a, b)
            partner = last if seen[partner] == mark else partner
            seen[partner] = mark
            row[i] = partner


def draw_onto_targets(
    first: int,
    last: int,
    key: Any,
    probability: float,
    number: int,
    replace: bool,
    autapses: bool,
    places: Any,
    targets: Any,
) -> None:
    """Draw the sources of the targets from ``first`` to ``last``, and write their synapses, or count them.

    Args:
        key: the two words of the seed, uint32.
        probability: that a pair has a synapse, if ``number`` is negative.
        number: of synapses of each target.
        replace: whether a pair may have several.
        autapses: whether a target may be its own source.
        places: int64 ``[K]``, where the next synapse of each source goes, or how many there are; carried on.
        targets: ``[S]``, or empty: then synapses are only counted.
    """
    sources = len(places)
    count = sources if autapses or number < 0 else sources - 1
    inverse = 1.0 / rate_of(probability)
    row = np.empty(max(sources, number), np.int64)
    seen = np.zeros(0 if replace or number < 0 else sources, np.int64)
    gaps, words = np.empty(2 * DRAWS), np.empty(2 * DRAWS, np.uint64)
    for target in range(first, last):
        neuron = np.uint32(target)
        if number < 0:
            found = draw_with_probability(row, neuron, inverse, count, key, gaps, words) if probability > 0.0 else 0
        else:
            draw_number(row, neuron, np.uint32(OF_TARGET), number, count, replace, key, seen)
            found = number
        for i in range(found):
            source = row[i]
            if not autapses:
                if number < 0:
                    if source == target:
                        continue
                elif source >= target:
                    source += 1
            place = places[source]
            places[source] = place + 1
            if len(targets):
                targets[place] = target


def draw_from_sources(
    first: int,
    last: int,
    key: Any,
    number: int,
    replace: bool,
    autapses: bool,
    neurons: int,
    begin: int,
    end: int,
    places: Any,
    targets: Any,
) -> None:
    """Draw the targets of the sources from ``first`` to ``last``, and write those from ``begin`` to ``end``, or count them.

    The other arguments are those of :func:`draw_onto_targets`; ``number`` is that of each source.
    """
    count = neurons if autapses else neurons - 1
    row = np.empty(number, np.int64)
    seen = np.zeros(0 if replace else neurons, np.int64)
    for source in range(first, last):
        draw_number(row, np.uint32(source), np.uint32(OF_SOURCE), number, count, replace, key, seen)
        found, place = 0, places[source]
        for i in range(number):
            target = row[i] + 1 if not autapses and row[i] >= source else row[i]
            if begin <= target < end:
                if len(targets):
                    targets[place + found] = target
                found += 1
        places[source] = place + found
        if len(targets):
            targets[place : place + found].sort()


def draw_values(
    first: int,
    last: int,
    key: Any,
    indptr: Any,
    targets: Any,
    weights: Any,
    delays: Any,
    weight_law: Any,
    delay_law: Any,
) -> None:
    """Draw the weights and the delays of the synapses of the sources from ``first`` to ``last``.

    Args:
        key: the two words of the seed, uint32.
        indptr, targets: of the synapses, sorted.
        weights, delays: ``[S]``, or empty where none are drawn.
        weight_law, delay_law: prepared.
    """
    for source in range(first, last):
        before, earlier = -1, 0
        for place in range(indptr[source], indptr[source + 1]):
            target = targets[place]
            earlier = earlier + 1 if target == before else 0
            before = target
            a, b, c, d = philox(np.uint32(source), np.uint32(target), np.uint32(VALUES + earlier), TAG, key[0], key[1])
            if len(weights):
                weights[place] = value_of(weight_law, unit(a, b))
            if len(delays):
                delays[place] = value_of(delay_law, unit(c, d))


prepare_kernel = entry_point(prepare_values)
onto_targets_kernel = entry_point(draw_onto_targets)
from_sources_kernel = entry_point(draw_from_sources)
values_kernel = entry_point(draw_values)
