"""Run a script that asks PyNN for a simulator by name: ``python -m coba_triton.pynn SCRIPT ARGS``."""

import gc
import os
import runpy
import sys

from . import setup as setup  # without PyNN this says what to install


def main() -> None:
    """Run the script that the command line names, as if it had been started itself."""
    if len(sys.argv) < 2:
        raise SystemExit(
            "usage: python -m coba_triton.pynn SCRIPT ARGS; a script with get_simulator has coba_triton as ARGS"
        )
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    gc.freeze()  # what was imported stays, and is not looked at again while the script runs, nor at its end
    runpy.run_path(sys.argv[0], run_name="__main__")
    gc.freeze()


if __name__ == "__main__":
    main()
