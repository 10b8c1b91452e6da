"""The machine code of the CPU kernels on disk, which several processes write and which may be damaged.

In the place of Numba's index and numbered files: of two processes that compile a kernel for two dtypes at once, there one
may find the other's code under its own number.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from ...common.files import read_bytes, written_whole
from ...common.garbage import no_collection
from ...common.messages import logger

MOST = 2**28  # bytes of a kernel's code
# Modules of this folder from which kernels of other ones take code.
SHARED = (
    "numba_bridge", "rows", "events", "feed_forward", "checksums", "chunks", "products", "recurrent", "sparse", "lanes",
    "meeting", "draws",
)  # fmt: skip


@functools.cache
def sources() -> str:
    """Digest of what kernels take from other files, whose changes Numba does not see."""
    here = Path(__file__).parent
    neuron = here.parents[1] / "neuron"
    files = [*sorted(neuron.glob("*.py")), *(here / f"{name}.py" for name in SHARED)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class _File:
    """A file for each signature of a kernel: a checksum of all that follows, and what is known of the code.

    Args:
        folder: where.
        name: of the kernel.
        stamp: of its source and of all that it takes in, whose change makes the code obsolete.
    """

    def __init__(self, folder: str, name: str, stamp: Any) -> None:
        self.folder, self.name, self.stamp = folder, name, stamp

    def _path(self, key: Any) -> Path:
        digest = hashlib.sha256(repr((numba.__version__, key)).encode()).hexdigest()
        return Path(self.folder) / f"{self.name}.{digest[:16]}.nbc"

    def load(self, key: Any) -> Any:
        """The code that is kept under ``key``, or None."""
        try:
            content = read_bytes(self._path(key), MOST)
        except FileNotFoundError:
            return None
        digest, payload = content[:32], content[32:]
        if hashlib.sha256(payload).digest() != digest:
            raise ValueError("its checksum is another")
        stamp, kept, code = pickle.loads(payload)
        return code if (stamp, kept) == (self.stamp, key) else None

    def save(self, key: Any, code: Any) -> None:
        """Keep code, whole or not at all."""
        payload = dumps((self.stamp, key, code))
        with written_whole(self._path(key)) as part:
            part.write_bytes(hashlib.sha256(payload).digest() + payload)

    def flush(self) -> None:
        """Forget everything."""
        for path in Path(self.folder).glob(f"{self.name}.*.nbc"):
            path.unlink(missing_ok=True)


class KernelCache(FunctionCache):  # type: ignore[misc]  # numba has no types
    """Numba's cache of a function: what cannot be read is compiled, and what cannot be written is kept in memory alone."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp(), sources()
        self._cache_file = _File(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # What is loaded needs Numba's memory functions, but nothing of what Numba compiles with. To import that takes longer
        # than most kernels run, and Numba does so itself before it compiles anything.
        try:
            with no_collection():
                rtsys.initialize(target_context)
                return self._load_overload(sig, target_context)
        except Exception as error:  # whatever bytes that are no code lead to
            logger.info("the code of %s in %s cannot be used (%s); it is compiled anew", self._name, self._cache_path, error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            logger.info("the code of %s cannot be kept in %s (%s)", self._name, self._cache_path, error)
