"""Checks in a process of their own: a kernel that crashes, hangs or spoils the device takes its own case alone."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Generator
from multiprocessing.connection import Connection

import torch

from . import checker
from .checker import Result

# Seconds after which a case is given up and its process is killed.
CASE_SECONDS = 300.0


def _serve(backend: str, device: str, level: str, only: str | None, requests: Connection) -> None:
    """Run the checks whose numbers come, and send what became of them, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    checks = checker.select(backend, torch.device(device), level, only)
    requests.send(None)
    while (number := requests.recv()) is not None:
        requests.send(checker.run_check(checks[number], torch.device(device)))


class _Server:
    """A process that runs checks."""

    def __init__(self, backend: str, device: str, level: str, only: str | None) -> None:
        context = multiprocessing.get_context("spawn")  # a process that has used a GPU cannot be forked
        self._requests, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(backend, device, level, only, theirs), daemon=True)
        self._process.start()
        theirs.close()
        if (failure := self._answer()) is not None:
            raise RuntimeError(f"the process that runs the checks {failure}; run them with --in-process to see why")

    def run(self, number: int) -> Result | str:
        """What became of a check, or what became of the process."""
        self._requests.send(number)
        return self._answer()  # type: ignore[return-value]  # only the first answer is None

    def _answer(self) -> Result | str | None:
        try:
            if self._requests.poll(CASE_SECONDS):
                answer: Result | None = self._requests.recv()
                return answer
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return f"did not end within {CASE_SECONDS:g} s, and was killed"

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def run_checks(backend: str, device: torch.device, level: str, only: str | None) -> Generator[Result]:
    """The results of the checks that :func:`coba_triton.tools.checker.select` selects, one after the other.

    After a failure the next case gets a new process: a fault on a device spoils all that its process does afterwards.
    """
    server: _Server | None = None
    try:
        for number, check in enumerate(checker.select(backend, device, level, only)):
            server = server or _Server(backend, str(device), level, only)
            started = time.perf_counter()
            result = server.run(number)
            if isinstance(result, str):
                seconds = time.perf_counter() - started
                result = Result(check.group, check.name, "failed", seconds, f"the process that ran it {result}")
            yield result
            if result.status == "failed":
                server.stop()
                server = None
    finally:
        if server is not None:
            server.stop()
