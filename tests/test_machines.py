"""Several machines, imitated: every process is in a network namespace of its own, and a virtual cable joins them.

The tests need root, ``ip`` and namespaces; latency and loss need the scheduler ``netem`` of the kernel as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coba_triton import open_result
from coba_triton.cli import main

pytest.importorskip("zarr")
pytestmark = pytest.mark.slow
NAMES = tuple(f"coba{os.getpid()}{end}" for end in "ab")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
OPTIONS = ["--set", "duration=150ms", "--set", "simulation.block_steps=64"]


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[None]:
    """Two namespaces, and a cable from one to the other."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("several processes need torch with gloo")
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("namespaces of the network need root and the command ip")
    try:
        for name in NAMES:
            if (made := ip("netns", "add", name)).returncode:
                pytest.skip(f"this system makes no namespaces of the network: {made.stderr.strip()}")
        made = ip("link", "add", "cable", "netns", NAMES[0], "type", "veth", "peer", "name", "cable", "netns", NAMES[1])
        if made.returncode:
            pytest.skip(f"this system makes no virtual cables: {made.stderr.strip()}")
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            for command in (["addr", "add", f"{address}/24", "dev", "cable"], ["link", "set", "cable", "up"]):
                assert ip("-n", name, *command).returncode == 0
            assert ip("-n", name, "link", "set", "lo", "up").returncode == 0
        yield
    finally:
        for name in NAMES:
            ip("netns", "del", name)


def start(rank: int, out: Path, *options: str) -> subprocess.Popen[str]:
    own = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29733", "OMP_NUM_THREADS": "1"}
    command = ["ip", "netns", "exec", NAMES[rank], sys.executable, "-m", "coba_triton", "simulate", "va", "--out", str(out)]
    environment = os.environ | own | {"GLOO_SOCKET_IFNAME": "cable"}
    return subprocess.Popen(
        [*command, *OPTIONS, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_steps(out: Path, processes: list[subprocess.Popen[str]]) -> None:
    progress, until = out / "result.zarr" / "progress" / "c.0", time.monotonic() + 120
    while not (progress.exists() and int.from_bytes(progress.read_bytes()[:8], "little") >= 128):
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.02)


def assert_the_bits_of_one_process(out: Path, folder: Path) -> None:
    assert main(["simulate", "va", "--out", str(folder), *OPTIONS]) == 0
    ours, theirs = open_result(out / "result.zarr"), open_result(folder / "result.zarr")
    assert ours.finished and np.array_equal(ours.spikes[:], theirs.spikes[:])
    assert np.array_equal(ours.traces["v"][:], theirs.traces["v"][:])


def finish(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors


def test_the_bits_of_one_process(machines: None, tmp_path: Path) -> None:
    finish([start(rank, tmp_path / "two") for rank in range(2)])
    assert_the_bits_of_one_process(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("network", [["delay", "2ms", "1ms"], ["delay", "1ms", "loss", "0.5%"]], ids=["jitter", "loss"])
def test_slow_networks(machines: None, tmp_path: Path, network: list[str]) -> None:
    for name in NAMES:
        added = subprocess.run(
            ["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "cable", "root", "netem", *network],
            capture_output=True, text=True,
        )  # fmt: skip
        if added.returncode:
            pytest.skip(f"the kernel has no netem: {added.stderr.strip()}")
    finish([start(rank, tmp_path / "two") for rank in range(2)])
    assert_the_bits_of_one_process(tmp_path / "two", tmp_path / "one")


def test_a_cable_that_is_out_for_a_second(machines: None, tmp_path: Path) -> None:
    """What is lost is sent again."""
    processes = [start(rank, tmp_path / "two") for rank in range(2)]
    wait_for_steps(tmp_path / "two", processes)
    assert ip("-n", NAMES[1], "link", "set", "cable", "down").returncode == 0
    time.sleep(1)
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        ip("-n", name, "link", "set", "cable", "up")
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
    finish(processes)
    assert_the_bits_of_one_process(tmp_path / "two", tmp_path / "one")


def test_a_cable_that_stays_out(machines: None, tmp_path: Path) -> None:
    """After the time limit, both say so, and keep what is finished; the run goes on when the cable is back."""
    processes: list[Any] = [start(rank, tmp_path / "two", "--wait", "5") for rank in range(2)]
    wait_for_steps(tmp_path / "two", processes)
    assert ip("-n", NAMES[1], "link", "set", "cable", "down").returncode == 0
    began = time.monotonic()
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode != 0
        assert "lost another rank" in errors and "start all ranks again with --resume" in errors, errors
    assert time.monotonic() - began < 40
    assert ip("-n", NAMES[1], "link", "set", "cable", "up").returncode == 0
    finish([start(rank, tmp_path / "two", "--resume") for rank in range(2)])
    assert_the_bits_of_one_process(tmp_path / "two", tmp_path / "one")
