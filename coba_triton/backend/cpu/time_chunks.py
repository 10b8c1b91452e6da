"""Few neurons over many steps: chunks of one run go on side by side, and the result has the bits of the run in order.

All chunks start at once, from a guess. Two runs under one input forget where they started: rounding makes their states
equal, and from then on they are one. So what a wrong guess spoiled is computed again, from the end of the chunk before,
until the state has the very bits that were noted there. The guess decides how long that takes, and nothing else.

On the way back the gradient by the state takes the place of the state, and the end of the run that of its beginning.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from ...neuron.records import Constants
from .chunks import STEPS, chunks_kernel, scratch
from .chunks_back import add_parts_kernel, chunks_back_kernel, scratch_back
from .rows import FIELDS
from .threads import run

# Lanes of a row that fill a core's vector units.
LANES_OF_CORE = 128
# The neurons of a chunk that go on together until all of them have the noted state.
NEURONS_TOGETHER = 64
# What the gradient by the state is taken to be at the end of a chunk. Any number does.
GUESS_OF_GRADIENT = 0.0
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
    x, state, shared, per_neuron, final, *others = arguments
    units, size, again = _sizes(steps, chunks, shared, per_neuron)
    count = -(-units // size)
    for begin in range(0, state.shape[1], NEURONS_TOGETHER):
        n = min(NEURONS_TOGETHER, state.shape[1] - begin)
        own = [(scratch(state.dtype, -(-count // threads), n),) for _ in range(threads)]
        guess = np.repeat(state[None, :, begin : begin + n], count, 0)  # the state before the run
        advance = functools.partial(run, chunks_kernel(), x, shared, per_neuron, *others, steps, begin, n)
        final[:, begin : begin + n] = _settle(advance, guess, units, size, again, own)


def go_back_in_chunks(method: str, arguments: tuple[Any, ...], sums: Any, steps: int, chunks: int, threads: int) -> None:
    """What the backward kernel does with these arguments, likewise.

    ``sums [S, M]`` takes the gradient by the constants, or is None.
    """
    *read, grad_final, grad_states, grad_x, grad_state, every, jump_first, holds = arguments
    _, shared, per_neuron, *_ = read
    units, size, again = _sizes(steps, chunks, shared, per_neuron)
    count = -(-units // size)
    for begin in range(0, grad_state.shape[1], NEURONS_TOGETHER):
        n = min(NEURONS_TOGETHER, grad_state.shape[1] - begin)
        here, dtype = slice(begin, begin + n), grad_state.dtype
        own = [(scratch_back(dtype, -(-count // threads), n, every),) for _ in range(threads)]
        guess = np.full((count, FIELDS, n), GUESS_OF_GRADIENT, dtype)
        guess[0] = 0
        if grad_final.size:
            guess[0] += grad_final[:FIELDS, here]
        if grad_states.size:
            guess[0] += grad_states[steps - 1 : FIELDS * steps : steps, here]
        parts = None if sums is None else np.empty((units, len(sums), n), dtype)
        how = grad_states, grad_x, every, jump_first, holds, steps, begin, n, parts
        advance = functools.partial(run, chunks_back_kernel(method), *read, *how)
        grad_state[:FIELDS, here] = _settle(advance, guess, units, size, again, own)
        if sums is not None:
            total = np.zeros((len(sums), n), dtype)
            add_parts_kernel()(parts, total)
            sums[:, here] = total


def _sizes(steps: int, chunks: int, shared: Any, per_neuron: Any) -> tuple[int, int, int]:
    """How many units a run has and how many a chunk, and after how many a chunk that is run again gives way.

    Then what those have to say counts that ran at the same time.
    """
    size = -(-steps // (chunks * STEPS))
    again = max(size // 4, int(min(2 * MEMORIES * memory_of(shared, per_neuron), steps)) // STEPS)
    return -(-steps // STEPS), size, again


def _settle(advance: Any, reached: Any, units: int, size: int, again: int, own: list[tuple[Any, ...]]) -> Any:
    """Let chunks of ``size`` units go on, each from its guess ``reached [C, F, n]``, until all is as in a run in order.

    Returns what is reached after all ``units``. ``advance`` lets chunks go on, and ``own`` has what each thread of it owns.
    ``again``: see :func:`_sizes`.
    """
    notes = np.empty((units, *reached.shape[1:]), reached.dtype)
    noted = notes.view(f"i{notes.itemsize}")
    end = reached[-1]

    def go_on(at: Any, reached: Any, until: Any, compare: bool, limit: int) -> None:
        """Let the first ``len(until)`` chunks go on, each to its ``until``."""
        nonlocal end
        count = len(until)
        parts = min(len(own), count)
        shares = [(*own[part], count * part // parts, count * (part + 1) // parts) for part in range(parts)]
        advance(notes, noted, reached, at, until, compare, limit, shares=shares)
        if at[count - 1] == units:
            end = reached[count - 1]

    at = np.arange(0, units, size)
    go_on(at, reached, np.append(at[1:], units), compare=False, limit=units)
    tried, in_order = 2 * len(at), False
    while True:
        # What was computed follows from the notes. It is right if all that chunks have reached are the noted bits.
        (open_ends,) = np.nonzero(at < units)
        differs = noted[at[open_ends]] != reached[open_ends].view(noted.dtype)
        apart = open_ends[differs.any((1, 2))]
        if len(apart) == 0:
            return end
        # Where most chunks went on in vain, the rest is computed in order, and nothing twice.
        in_order = in_order or 2 * len(apart) > tried
        at, reached, tried = at[apart], reached[apart], len(apart)
        if in_order:
            go_on(at, reached, np.array([units]), compare=True, limit=units)
            later = np.append(0, np.flatnonzero(at > at[0]))
            at, reached = at[later], reached[later]
        else:
            go_on(at, reached, np.append(at[1:], units), compare=True, limit=again)
