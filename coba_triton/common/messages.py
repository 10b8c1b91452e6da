"""The package's messages, which are log records, for example that it compiles a kernel."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("coba_triton")


class _OnStderr(logging.Handler):
    """Writes to what is standard error at the moment, so that a bar or a table that is drawn there stays whole."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Within the block, write the package's messages to standard error: each once, also in a block within a block."""
    if any(isinstance(handler, _OnStderr) for handler in logger.handlers):
        yield
        return
    handler = _OnStderr()
    handler.setFormatter(logging.Formatter("coba_triton: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
