"""Tests of calls on a driver that executes nothing: they are collected only where it is; ``test_dry.py`` runs them so."""

from __future__ import annotations

import os

collect_ignore_glob = ["test_*.py"]
if os.environ.get("COBA_TRITON_DRY"):
    import dry

    dry.install()
    collect_ignore_glob = []
