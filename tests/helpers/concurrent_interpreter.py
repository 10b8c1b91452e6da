"""Triton's interpreter with all programs of a launch at once, each in a thread of its own.

The interpreter runs programs one after the other, so a kernel whose programs wait for each other can't end in it. Here
they interleave, with pauses at random loads, stores and atomics, so that a missing wait shows.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

_program = threading.local()
PAUSED = ("create_load", "create_masked_load", "create_store", "create_masked_store", "create_atomic_rmw")


def _run_at_once(self: GridExecutor, *device_args: Any, **device_kwargs: Any) -> None:
    """In place of ``GridExecutor.__call__``."""
    names = inspect.getfullargspec(self.fn).args
    device_kwargs = {name: value for name, value in device_kwargs.items() if name in names}
    args, kwargs = self._init_args_hst(device_args, device_kwargs)
    scope = interpreter._patch_lang(self.fn)
    try:
        bound = inspect.getcallargs(self.fn, *args, **kwargs)
        bound = {n: a if n in self.constexprs else interpreter._implicit_cvt(a) for n, a in bound.items()}
        grid = tuple(self.grid) + (1,) * (3 - len(self.grid))
        interpreter.interpreter_builder.set_grid_dim(*grid)
        errors: list[BaseException] = []

        def run(index: tuple[int, ...]) -> None:
            _program.index = index
            try:
                self.fn(**bound)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(index,)) for index in itertools.product(*map(range, grid))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
    finally:
        scope.restore()
    self._restore_args_dev(device_args, args, device_kwargs, kwargs)


@contextlib.contextmanager
def all_programs_at_once(seed: int, pause: float = 0.002, probability: float = 0.05) -> Iterator[None]:
    """Run every launch inside with all its programs at once; some of them are slower than others."""
    generator = random.Random(seed)
    saved = {name: getattr(InterpreterBuilder, name) for name in (*PAUSED, "create_get_program_id")}
    call, interval = GridExecutor.__call__, sys.getswitchinterval()

    def pausing(method: Any) -> Any:
        def wrapper(self: InterpreterBuilder, *args: Any, **kwargs: Any) -> Any:
            if generator.random() < probability * (1 + sum(_program.index)):
                time.sleep(pause)
            return method(self, *args, **kwargs)

        return wrapper

    def program_id(self: InterpreterBuilder, axis: int) -> Any:
        index = interpreter.np.array([_program.index[axis]], dtype=interpreter.np.int32)
        return interpreter.TensorHandle(index, interpreter.tl.int32)

    for name in PAUSED:
        setattr(InterpreterBuilder, name, pausing(saved[name]))
    InterpreterBuilder.create_get_program_id = program_id
    GridExecutor.__call__ = _run_at_once
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        for name, method in saved.items():
            setattr(InterpreterBuilder, name, method)
        GridExecutor.__call__ = call
        sys.setswitchinterval(interval)
