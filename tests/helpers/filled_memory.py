"""Plugin of pytest: PyTorch fills all memory that it gives out with NaN, or with the largest integer.

A result that reads memory which nothing has written is wrong then in every run, and not only by chance::

    PYTHONPATH=tests python -m pytest -p helpers.filled_memory
"""

import torch

torch.use_deterministic_algorithms(True)  # without it, PyTorch does not look at the next line
torch.utils.deterministic.fill_uninitialized_memory = True
if not torch.empty(1).isnan().all():
    raise RuntimeError(f"torch.empty must be filled with NaN, got torch {torch.__version__}; look for its new switch")
