"""Tests of compiled code: they are collected only where ptxsim executes it; ``test_compiled.py`` runs them so."""

from __future__ import annotations

import sys

executed = "ptxsim" in sys.modules and sys.modules["ptxsim"].current_options() is not None
collect_ignore_glob = [] if executed else ["test_*.py"]
if executed:
    from helpers import fast_compiler

    fast_compiler.install()
