"""Modules under the names that they had before they moved into rooms: ``import coba_triton.model`` and the like go on."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "contenders": "tools.contenders",
    "events": "stream.events",
    "model": "neuron.records",
    "operators": "ops.operators",
    "plotting": "stream.plotting",
    "problems": "tools.problems",
    "reference": "backend.reference",
    "results": "stream.results",
    "simulation": "stream.simulation",
    "sinks": "stream.sinks",
    "sources": "stream.sources",
    "spikes": "ops.spikes",
    "surrogate": "neuron.surrogate",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return importlib.machinery.ModuleSpec(fullname, self) if package == __package__ and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        new = f"{__package__}.{MOVED[name.rpartition('.')[2]]}"
        warnings.warn(f"{name} is {new} now; its public names are in {__package__}", DeprecationWarning, stacklevel=2)
        sys.modules[name] = importlib.import_module(new)


sys.meta_path.append(_Finder())
