"""The threads that run a kernel's shares at the same time.

They are those of PyTorch's OpenMP, where a process has it. After an operation, PyTorch's threads wait actively for the next
one, for some milliseconds. Other threads on the same cores would get half of the time; these begin at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from ...common.signals import deferred

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# The pool has so many threads at the most. It starts one only when a launch needs it.
MOST_THREADS = 1024
# OpenMP's threads do not survive a fork: a process in which this module was not imported has a pool of its own.
_PROCESS = os.getpid()
# One launch at a time has threads that wait for each other: of two, each could have the threads that the other waits for.
_one_meeting = threading.Lock()


class _OpenMP(NamedTuple):
    parallel: Any
    number: Any
    size: Any
    pause: Any
    give_way: Any


@functools.cache
def _openmp() -> _OpenMP | None:
    """The OpenMP that is loaded with PyTorch, or None; GNU's and LLVM's have these names."""
    if os.name != "posix":
        return None
    loaded = ctypes.CDLL(None)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_pause_resource_all", "sched_yield")
    if not all(hasattr(loaded, name) for name in names):
        return None
    functions = _OpenMP(*(getattr(loaded, name) for name in names))
    functions.parallel.argtypes = (_Region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    functions.parallel.restype = None
    return functions


@functools.cache
def _pool(pid: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not survive a fork. One is started where none is idle."""
    return ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="coba_triton")


def run(kernel: Callable[..., None], *args: Any, shares: Sequence[tuple[Any, ...]], meet: bool = False) -> None:
    """Run ``kernel`` over every share of the neurons or rows, each in a thread of its own: the first in this one.

    ``meet``: the threads wait for each other within the kernel.
    """
    if len(shares) == 1:
        kernel(*args, *shares[0])
        return
    with deferred(), _one_meeting if meet else contextlib.nullcontext():
        openmp = _openmp() if os.getpid() == _PROCESS else None
        if openmp is None or not _run_in_openmp(openmp, kernel, args, shares):
            _run_in_pool(openmp if meet else None, kernel, args, shares)


def _run_in_openmp(openmp: _OpenMP, kernel: Callable[..., None], args: tuple[Any, ...], shares: Sequence[Any]) -> bool:
    """Whether OpenMP gave a thread to every share. It gives fewer within a parallel region, or if the user limits them."""
    began, done, errors = [], [], list[BaseException]()

    def region(_: Any) -> None:
        number = openmp.number()
        if openmp.size() < len(shares) or number >= len(shares):
            return
        began.append(number)
        try:
            kernel(*args, *shares[number])
        except BaseException as error:  # OpenMP's threads have nobody to raise it to
            errors.append(error)
        done.append(number)
        while number == 0 and len(done) < len(shares):
            openmp.give_way()  # OpenMP itself would keep the core, on which another share may be waiting to run

    # as many as PyTorch's operations have: otherwise threads would end and begin again
    openmp.parallel(_Region(region), None, max(torch.get_num_threads(), len(shares)), 0)
    if errors:
        raise errors[0]
    return bool(began)


def _run_in_pool(openmp: _OpenMP | None, kernel: Callable[..., None], args: tuple[Any, ...], shares: Sequence[Any]) -> None:
    """``openmp``: whose idle threads must end first, or None."""
    if openmp is not None:
        openmp.pause(1)  # omp_pause_soft: settings stay; within a parallel region it does nothing
    first, *rest = shares
    jobs = [_pool(os.getpid()).submit(kernel, *args, *share) for share in rest]
    kernel(*args, *first)
    for job in jobs:
        job.result()
