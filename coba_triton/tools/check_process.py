"""Run checks in another process. If a kernel crashes, hangs or spoils the device, only its own check fails."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Generator
from multiprocessing.connection import Connection

import torch

from . import checker
from .checker import CheckResult

CASE_SECONDS = 300.0  # after so many seconds the process of a check is killed


def serve(backend: str, device: str, level: str, only: str | None, requests: Connection) -> None:
    """In the other process: receive numbers of checks, run these checks and send their results, until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks handles Ctrl-C
    checks = checker.select(backend, torch.device(device), level, only)
    requests.send(None)
    while (number := requests.recv()) is not None:
        requests.send(checker.run_check(checks[number], torch.device(device)))


class _Server:
    """The process that runs checks, seen from the one that asks for them."""

    def __init__(self, backend: str, device: str, level: str, only: str | None) -> None:
        context = multiprocessing.get_context("spawn")  # after a process has used a GPU, it cannot fork
        self._requests, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(backend, device, level, only, theirs), daemon=True)
        self._process.start()
        theirs.close()
        if (failure := self._answer()) is not None:
            raise RuntimeError(f"the process that runs the checks {failure}; run them with --in-process to see why")

    def run(self, number: int) -> CheckResult | str:
        """Run a check; returns its result, or in words how the process ended."""
        self._requests.send(number)
        return self._answer()  # type: ignore[return-value]  # only the first answer is None

    def _answer(self) -> CheckResult | str | None:
        try:
            if self._requests.poll(CASE_SECONDS):
                answer: CheckResult | None = self._requests.recv()
                return answer
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return f"did not end within {CASE_SECONDS:g} s, and was killed"

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def run_checks(backend: str, device: torch.device, level: str, only: str | None, jobs: int = 1) -> Generator[CheckResult]:
    """Run the checks that :func:`coba_triton.tools.checker.select` selects, and yield the result of each when it is there.

    After a failure the next check gets a new process: after a fault on a device, nothing works in the old one.

    Args:
        backend: as in :func:`coba_triton.check`.
        device: the device.
        level: ``quick`` or ``full``.
        only: the part of a name that selects checks.
        jobs: how many processes run checks at the same time.
    """
    checks = checker.select(backend, device, level, only)
    numbers = iter(range(len(checks)))
    results: queue.SimpleQueue[CheckResult | Exception] = queue.SimpleQueue()
    servers: set[_Server] = set()
    stopping = threading.Event()

    def stop(server: _Server) -> None:
        servers.discard(server)
        server.stop()

    def work() -> None:
        """Ask a process of its own for the results of checks that no other thread has taken."""
        server: _Server | None = None
        try:
            while not stopping.is_set() and (number := next(numbers, None)) is not None:
                if server is None:
                    servers.add(server := _Server(backend, str(device), level, only))
                started = time.perf_counter()
                result = server.run(number)
                if isinstance(result, str):
                    check, seconds = checks[number], time.perf_counter() - started
                    result = CheckResult(check.group, check.name, "failed", seconds, f"the process that ran it {result}")
                if result.status == "failed":
                    stop(server)
                    server = None
                results.put(result)
        except Exception as error:
            results.put(error)
        finally:
            if server is not None:
                stop(server)

    try:
        for _ in range(jobs):
            threading.Thread(target=work, daemon=True).start()
        for _ in checks:
            if isinstance(result := results.get(), Exception):
                raise result
            yield result
    finally:
        stopping.set()
        for server in list(servers):
            server.stop()
