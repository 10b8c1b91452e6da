"""Processes of a ``gloo`` group on this machine, started once, which run functions of the tests together."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_groups: dict[int, Any] = {}


def _join(file: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from . import fast_interpreter

        fast_interpreter.install()
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=file.as_uri(), rank=rank, world_size=ranks, timeout=limit)
    for size in range(1, ranks + 1):
        _groups[size] = dist.new_group(range(size), timeout=limit)


def _call(size: int, job: bytes) -> bytes:
    """Tensors travel in the bytes of a plain pickle: not in shared memory, which torch would put them into."""
    function, args = pickle.loads(job)
    return pickle.dumps(function(_groups[size], *args))


class Ranks:
    """``ranks(2, function, *args)``: what ``function(group, *args)`` returns on both ranks of a group of two."""

    def __init__(self, folder: Path, ranks: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["coba_triton.distributed"])  # imports once what takes seconds
        self._ranks = [ProcessPoolExecutor(1, context, _join, (folder / "store", rank, ranks)) for rank in range(ranks)]
        for ready in [rank.submit(dist.get_rank) for rank in self._ranks]:  # a worker starts with its first task
            ready.result(timeout=120)

    def __call__(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        job = pickle.dumps((function, args))
        futures = [rank.submit(_call, size, job) for rank in self._ranks[:size]]
        done, late = wait(futures, timeout=180, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()  # the error of one rank, for which the others may wait
        assert not late, f"ranks {[futures.index(future) for future in late]} of {size} have not ended within 180 s"
        return [pickle.loads(future.result()) for future in futures]

    def close(self) -> None:
        for rank in self._ranks:
            rank.shutdown()
