"""``python -m coba_triton`` is the command ``coba-triton``, also under ``torchrun -m coba_triton``."""

import sys

from .cli import main

sys.exit(main())
