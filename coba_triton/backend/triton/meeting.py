"""How the programs of a launch wait for each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Looks at the arrival counter before a program gives up: seconds on a GPU.
SPIN_LIMIT = 10_000_000


class Meeting(NamedTuple):
    """How the programs of a launch wait for those of their own group.

    Attributes:
        programs: of all groups.
        together: whether they wait for each other.
        arrived: how many programs of each group have arrived, int32 ``[groups]``; None where nobody waits.
        failed: not 0 once a program gave up, int32 ``[1]``; None where nobody waits.
        spin_limit: how often a program looks at the counter before it gives up.
        options: of the launch.
    """

    programs: int
    together: bool
    arrived: Tensor | None
    failed: Tensor | None
    spin_limit: int
    options: dict[str, Any]

    @classmethod
    def of(cls, programs: int, groups: int, device: torch.device) -> Meeting:
        """Each group has so many ``programs``. Where it has one, nobody waits."""
        if programs == 1:
            return cls(groups, False, None, None, SPIN_LIMIT, {})
        arrived, failed = (torch.zeros(size, dtype=torch.int32, device=device) for size in (groups, 1))
        return cls(programs * groups, True, arrived, failed, SPIN_LIMIT, {"launch_cooperative_grid": True})

    def check(self, what: str, way_out: str) -> None:
        """Raise, on the device, if a program gave up; the host does not wait for it."""
        if self.failed is not None:
            torch._assert_async(
                self.failed == 0,
                f"{what}: a program waited for another of its batch row for more than {self.spin_limit} looks and gave up; "
                f"expected all {self.programs} programs to run at once; {way_out}",
            )
