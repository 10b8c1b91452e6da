"""The code of functions that only compiled code calls, for the kernels which take it in."""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary


class _NoMachineCode:
    """Stands for what keeps machine code: there is none that could be given an environment of Python objects."""

    def set_env(self, name: str, environment: Any) -> None:
        pass


class InnerLibrary(JITCodeLibrary):  # type: ignore[misc]  # numba has no types
    """LLVM's code of a function and of those that it calls, optimized once. No machine code is made of it.

    It has to be optimized here: where LLVM first sees the loops of a function inside of a kernel, it knows less about them,
    and does not make vectors of all of them.
    """

    @property
    def codegen(self) -> Any:
        return _NoMachineCode()

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        passes, builder = self._codegen._module_pass_manager()
        passes.run(self._final_module, builder)

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True
