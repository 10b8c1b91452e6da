"""Where the kernels run in the tests.

On a machine without a GPU they run in Triton's interpreter, on CPU tensors. Set ``TRITON_INTERPRET=0`` to run the same
tests on the device of Triton's active driver instead: a GPU, or an emulating driver.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
os.environ["COBA_TRITON_TUNING"] = "off"  # no table of the machine's user

import pytest
import torch

from coba_triton import _validation
from coba_triton._backends import triton_device_type


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels run."""
    return torch.device(triton_device_type())


@pytest.fixture(autouse=True)
def forget_stability_checks() -> None:
    """Every test sees the warnings that a new process would see."""
    _validation._stability_checked.clear()
