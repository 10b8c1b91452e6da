"""``python -m coba_triton.cli`` is the command ``coba-triton``."""

import sys

from . import main

sys.exit(main())
