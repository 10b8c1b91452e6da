"""Few neurons over many steps: chunks of one run go on side by side, and the result has the bits of the run in order.

All chunks start at once, from a guess. Two runs under one input forget where they started: rounding makes their states
equal, and from then on they are one. So what a wrong guess spoiled is computed again, from the end of the chunk before,
until the state has the very bits that were noted there. The guess decides how long that takes, and nothing else.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...neuron.records import Constants
from .chunks import STEPS, chunks_kernel, scratch
from .threads import run

# Lanes of a row that fill a core's vector units.
LANES_OF_CORE = 128
# The neurons of a chunk that go on together until all of them have the noted state.
NEURONS_TOGETHER = 64
# After so many of the largest time constants, nearly all neurons that spike irregularly have forgotten where they started.
MEMORIES = 25
# Shorter chunks than this cost more to hand out than they save.
LEAST_STEPS = 1024
# A step of a neuron in a chunk costs about as much as so many in a long row of neurons.
COST = 4
# A run is cut only if a chunk, and what is computed again, takes less than this part of the run.
MOST_OF_RUN = 2 / 3


def memory_of(shared: Any, per_neuron: Any) -> float:
    """The largest time constant of the neurons in steps; infinite where something does not decay."""
    c = Constants(*(shared if per_neuron is None else per_neuron))
    slowest = min(float(np.min(rate)) for rate in (-c.decay_e, -c.decay_i, c.k * c.g_l))
    return 1 / slowest if slowest > 0 else math.inf


def may_pay(steps: int, neurons: int) -> bool:
    """Whether a run has so few neurons and so many steps that it is worth while to look at its constants."""
    return neurons <= NEURONS_TOGETHER and steps >= 2 * LEAST_STEPS


def choose_chunks(steps: int, neurons: int, memory: float, threads: int) -> int:
    """Into how many chunks a run is cut: as few as fill the vector units of all threads, 1 where cutting does not pay."""
    least = max(MEMORIES * memory, LEAST_STEPS)
    chunks = min(threads * LANES_OF_CORE // neurons, int(steps / least))
    return chunks if chunks > 1 and 1 / chunks + least / steps < MOST_OF_RUN else 1


def run_in_chunks(arguments: tuple[Any, ...], steps: int, chunks: int, threads: int) -> None:
    """What the forward kernel does with these arguments, for all neurons, with the run cut into so many chunks of time."""
    _, state, shared, per_neuron, *_ = arguments
    size = -(-steps // (chunks * STEPS))
    again = max(size // 4, int(min(2 * MEMORIES * memory_of(shared, per_neuron), steps)) // STEPS)
    for begin in range(0, state.shape[1], NEURONS_TOGETHER):
        _run_together(arguments, steps, size, again, threads, begin, min(begin + NEURONS_TOGETHER, state.shape[1]))


def _run_together(
    arguments: tuple[Any, ...], steps: int, size: int, again: int, threads: int, begin: int, stop: int
) -> None:
    """:func:`run_in_chunks` for the neurons from ``begin`` to ``stop``.

    ``size``: units of a chunk. ``again``: units after which a chunk that is run again gives way to what those have to say
    that ran at the same time.
    """
    x, state, shared, per_neuron, final, *others = arguments
    units, n = -(-steps // STEPS), stop - begin
    notes = np.empty((units, len(state), n), state.dtype)
    noted = notes.view(f"i{notes.itemsize}")

    def go_on(at: Any, reached: Any, until: Any, compare: bool, limit: int) -> None:
        """Let the first ``len(until)`` chunks go on, each to its ``until``."""
        count = len(until)
        parts = min(threads, count)
        shares = [(own[part], count * part // parts, count * (part + 1) // parts) for part in range(parts)]
        how = notes, noted, reached, at, until, compare, limit, steps, begin, n
        run(chunks_kernel(), x, shared, per_neuron, *others, *how, shares=shares)
        if at[count - 1] == units:
            final[:, begin:stop] = reached[count - 1]

    at = np.arange(0, units, size)
    own = [scratch(notes.dtype, -(-len(at) // threads), n) for _ in range(threads)]
    reached = np.repeat(state[None, :, begin:stop], len(at), 0)  # the guess is the state before the run
    go_on(at, reached, np.append(at[1:], units), compare=False, limit=units)
    tried, in_order = 2 * len(at), False
    while True:
        # What was computed follows from the notes. It is right if all states that chunks have reached are the noted ones.
        (open_ends,) = np.nonzero(at < units)
        differs = noted[at[open_ends]] != reached[open_ends].view(noted.dtype)
        apart = open_ends[differs.any((1, 2))]
        if len(apart) == 0:
            return
        # Where most chunks went on in vain, the rest is computed in order, and nothing twice.
        in_order = in_order or 2 * len(apart) > tried
        at, reached, tried = at[apart], reached[apart], len(apart)
        if in_order:
            go_on(at, reached, np.array([units]), compare=True, limit=units)
            later = np.append(0, np.flatnonzero(at > at[0]))
            at, reached = at[later], reached[later]
        else:
            go_on(at, reached, np.append(at[1:], units), compare=True, limit=again)
