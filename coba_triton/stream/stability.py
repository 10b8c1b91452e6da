"""Whether a run stays finite and stable."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.warned import warn
from ..neuron.records import CobaLIFParameters
from ..ops import validation
from ..ops.spikes import WORD_BITS


class Stability:
    """Looks at the state and at the spikes of a run now and then. Warns once of each kind of trouble.

    Attributes:
        rates: ``dt * c_m_inv``, ``g_l`` and ``conductance_based``, which with the conductances tell whether the Euler step
            is stable.
        limit: the value of ``dt * c_m_inv * (g_l + g_e + g_i)`` beyond which the next warning comes.
        stop_if_unstable: whether to raise where the Euler step is unstable.
        fires_always: whether there was a warning of neurons that fire in every step.
    """

    def __init__(self, p: CobaLIFParameters, dt: float, stop_if_unstable: bool) -> None:
        self.rates = [torch.as_tensor(rate).cpu().numpy() for rate in (dt * p.c_m_inv, p.g_l, p.conductance_based)]
        self.limit = _next_limit(np.max(self.rates[0] * self.rates[1]))  # of the state at rest the run has warned already
        self.stop_if_unstable = stop_if_unstable
        self.fires_always = False

    def check(self, state: Any, g_e: int, x: Tensor, start: int, stop: int) -> None:
        """Refuse a state that is not finite. Warn once of conductances that make the Euler step unstable.

        ``state [F, *shape]`` is that after step ``stop``. Its row ``g_e`` has the excitatory conductance, and the next row
        has the inhibitory one. ``x`` is the input since step ``start``.
        """
        if not np.isfinite(state).all():
            for step, *channel in (~torch.isfinite(x)).nonzero()[:1].tolist():
                raise FloatingPointError(
                    f"the state is no longer finite after step {stop}, as the source has {x[step, *channel].item()} in step "
                    f"{start + step}, channel {channel}; correct it there"
                )
            raise FloatingPointError(
                f"the state is no longer finite after step {stop}, as the Euler step is unstable at these conductances "
                "(input, weights, initial state and parameters are finite); make dt, the weights or the input smaller"
            )
        rate, g_l, coupling = self.rates
        factor = float(np.max(rate * (g_l + coupling * (state[g_e] + state[g_e + 1]))))
        if factor > self.limit:
            self.limit = _next_limit(factor)
            unstable = validation.instability(factor)
            wild = ", and the spikes mean nothing" if factor > 2 else ""
            message = (
                f"{unstable}: dt * c_m_inv * (g_l + g_e + g_i) has reached {factor:.3g} by step {stop}, "
                f"more than {2 if factor > 2 else 1}{wild}; make dt or the weights smaller"
            )
            if factor > 2 and self.stop_if_unstable:
                raise FloatingPointError(f"{message}, or go on with stop_if_unstable=False")
            warn(message)

    def warn_of_constant_spikes(self, words: Any, start: int, stop: int) -> None:
        """Warn once of neurons that fire in every step. Only a few of a block's words ``[W, *shape]`` are looked at."""
        whole = words[: (stop - start) // WORD_BITS]
        always = int((whole[:: max(len(whole) // 8, 1)] == -1).any(0).sum())
        if always and not self.fires_always:
            self.fires_always = True
            units = "uS (1 nS is 0.001 uS)" if self.rates[2].any() else "nA (1 pA is 0.001 nA)"
            warn(
                f"{always} of {words[0].size} neurons fire in every step ({WORD_BITS} in a row by step {stop}): the "
                f"input or the weights, which are in {units}, are too strong, or v_thresh is too low; make them smaller, or "
                "raise v_thresh"
            )


def _next_limit(factor: float) -> float:
    """The next value of ``dt * c_m_inv * (g_l + g_e + g_i)`` that is worth a warning, after it was ``factor``."""
    return 1.0 if factor <= 1 else 2.0 if factor <= 2 else np.inf
