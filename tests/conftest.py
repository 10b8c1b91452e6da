"""Where the kernels run in the tests.

On a machine without a GPU they run in Triton's interpreter, on CPU tensors. Set ``TRITON_INTERPRET=0`` to run the same
tests on the device of Triton's active driver instead: a GPU, or an emulating driver.
"""

import gc
import importlib.util
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
os.environ["COBA_TRITON_TUNING"] = "off"  # no table of the machine's user
# processes that tests start import this checkout, and what the tests share
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [*map(str, Path(__file__).resolve().parents[1::-1]), os.environ.get("PYTHONPATH")])
)

import pytest
import torch

from coba_triton.backend.choose import triton_device_type
from coba_triton.ops import tensors, validation

if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
    from helpers import fast_interpreter

    fast_interpreter.install()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a worker for every core
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for a job in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


# These files take minutes; the other files fill the time that a worker has left. test_check.py compiles the CPU kernels
# that most tests use. While one worker does that, another one has the tests in Triton's interpreter, and finds the
# compiled kernels afterwards.
LONG = (
    *("kernels/test_compile.py", "kernels/test_compiled.py", "programs/test_fuzz.py", "tools/test_check.py"),
    *("kernels/test_sparse_kernels.py", "kernels/test_recurrent_kernels.py", "kernels/test_time_chunk_kernels.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first; workers take files in this order."""

    def place(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return next((number for number, name in enumerate(LONG) if file.endswith(name)), len(LONG))

    items.sort(key=place)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is parametrized with Triton's backend where Triton is not installed."""
    parameters = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    if any(isinstance(value, str) and value == "triton" for value in parameters):
        _where_kernels_run()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels run."""
    return _where_kernels_run()


def _where_kernels_run() -> torch.device:
    """Skip a test where they run nowhere: without Triton, or with one whose interpreter fails."""
    try:
        return torch.device(triton_device_type())
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def forget_stability_checks() -> None:
    """Every test sees the warnings that a new process would see."""
    validation._stability_checked.clear()
    tensors._kept.clear()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers, alone and after others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def number_of_threads() -> Iterator[None]:
    """A test may change for how many threads PyTorch asks. The next one sees the number from before."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture
def own_garbage() -> Iterator[None]:
    """Garbage is looked for only among what the test makes: among all that earlier tests have left, it takes seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the number of threads, which small problems use, too."""
    monkeypatch.setattr("coba_triton.backend.cpu.launch.shared.MIN_STEPS_PER_THREAD", 100)
    return torch.set_num_threads


@pytest.fixture
def compiles_in_silence() -> Iterator[None]:
    """For tests of what a command prints: that a kernel is compiled depends on what ran before."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("compiling")

    logger = logging.getLogger("coba_triton")
    logger.addFilter(keep)
    yield
    logger.removeFilter(keep)
