"""Triton's interpreter with all programs of a launch under way together, each in a thread of its own.

The interpreter runs programs one after the other, so a kernel whose programs wait for each other can't end in it. Here
they take turns at their loads, stores and atomics, so that a missing wait shows. One program runs at a time, and random
numbers with a seed say which: a schedule is the same on every machine and in every run.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import threading
from collections.abc import Iterator
from typing import Any

from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

_program = threading.local()
ACCESSES = ("create_load", "create_masked_load", "create_store", "create_masked_store", "create_atomic_rmw")


class Turns:
    """Says which program of a launch runs. Some programs are up to eight times as fast as others."""

    def __init__(self, programs: int, generator: random.Random):
        self.generator = generator
        self.may_run = [threading.Semaphore(0) for _ in range(programs)]
        self.speeds = {program: generator.choice((1, 2, 4, 8)) for program in range(programs)}

    def next(self) -> int:
        return self.generator.choices(list(self.speeds), list(self.speeds.values()))[0]

    def access(self, program: int) -> None:
        """Let another program run first, or the same one again."""
        chosen = self.next()
        if chosen != program:
            self.may_run[chosen].release()
            self.may_run[program].acquire()

    def leave(self, program: int) -> None:
        del self.speeds[program]
        if self.speeds:
            self.may_run[self.next()].release()


def _run_together(self: GridExecutor, generator: random.Random, *device_args: Any, **device_kwargs: Any) -> None:
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
        indices = list(itertools.product(*map(range, grid)))
        turns = Turns(len(indices), generator)
        errors: list[BaseException] = []

        def run(program: int) -> None:
            _program.index, _program.number, _program.turns = indices[program], program, turns
            turns.may_run[program].acquire()
            try:
                self.fn(**bound)
            except BaseException as error:
                errors.append(error)
            finally:
                turns.leave(program)

        threads = [threading.Thread(target=run, args=(program,)) for program in range(len(indices))]
        for thread in threads:
            thread.start()
        turns.may_run[turns.next()].release()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
    finally:
        scope.restore()
    self._restore_args_dev(device_args, args, device_kwargs, kwargs)


@contextlib.contextmanager
def programs_take_turns(seed: int) -> Iterator[None]:
    """Run every launch inside with all its programs under way together, in the schedule that belongs to the seed."""
    generator = random.Random(seed)
    saved = {name: getattr(InterpreterBuilder, name) for name in (*ACCESSES, "create_get_program_id")}
    call = GridExecutor.__call__

    def in_turn(method: Any) -> Any:
        def wrapper(self: InterpreterBuilder, *args: Any, **kwargs: Any) -> Any:
            _program.turns.access(_program.number)
            return method(self, *args, **kwargs)

        return wrapper

    def program_id(self: InterpreterBuilder, axis: int) -> Any:
        index = interpreter.np.array([_program.index[axis]], dtype=interpreter.np.int32)
        return interpreter.TensorHandle(index, interpreter.tl.int32)

    for name in ACCESSES:
        setattr(InterpreterBuilder, name, in_turn(saved[name]))
    InterpreterBuilder.create_get_program_id = program_id
    GridExecutor.__call__ = lambda self, *args, **kwargs: _run_together(self, generator, *args, **kwargs)
    try:
        yield
    finally:
        for name, method in saved.items():
            setattr(InterpreterBuilder, name, method)
        GridExecutor.__call__ = call
