"""Run a script or module with the simulator installed.

python -m ptxsim [--arch 80] [--seed 1] [--no-race] [--resident N] [--bounds view|storage] [--optimise=-O1] script.py ...
python -m ptxsim [options] -m pytest tests
"""

from __future__ import annotations

import argparse
import runpy
import sys

import ptxsim


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m ptxsim", usage=__doc__)
    p.add_argument("--arch", type=int, default=80)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--no-race", action="store_true")
    p.add_argument("--interleave", action="store_true")
    p.add_argument("--resident", type=int)
    p.add_argument("--bounds", default="view")
    p.add_argument("--optimise", default="-O1")
    p.add_argument("-m", dest="module", nargs=argparse.REMAINDER)
    p.add_argument("script", nargs=argparse.REMAINDER)
    a = p.parse_args()
    command = a.module or a.script
    if not command:
        p.error("a script or -m module is needed")
    ptxsim.install(
        arch=a.arch,
        seed=a.seed,
        race=not a.no_race,
        interleave=a.interleave,
        resident=a.resident,
        bounds=a.bounds,
        optimise=a.optimise,
    )
    sys.argv = command
    sys.path.insert(0, "")
    if a.module:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
