"""The garbage collector waits while much is made that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Within the block, no garbage is collected: a look at all of PyTorch takes 0.1 s."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """A block of imports, which make much and little garbage: none is collected within the block.

    What was made before the end of the block counts as old afterwards. Otherwise the next collection of young objects would
    look at all of it.
    """
    with no_collection():
        try:
            yield
        finally:
            if gc.get_freeze_count() == 0:  # objects that somebody has frozen must stay so
                gc.freeze()
                gc.unfreeze()
